"""A model larger than the memory: each block is read when it is needed, one ahead of time, and is gone after use.

Hooks on the blocks do it. What the blocks compute, and what a trace sees of them, is what it is with `load`.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..interface import DIFFUSERS, Conventions
from ..progress import track
from .loading import LTX2VideoTransformer3DModel, Recipe, prepare
from .lora import merged_into
from .quantised import Nibbles

BLOCKS_PREFIX = "transformer_blocks."
Room = dict[str, nn.Parameter]  # memory for one block, by the names of its parameters in it
Model = TypeVar("Model", bound="StreamedTransformer")


def stream(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: TransformerConfig | None = None,
    nibbles: Nibbles | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    conventions: Conventions = DIFFUSERS,
) -> "StreamedTransformer":
    """The model of `load`, which see for the arguments, with two blocks in memory in place of all.

    In memory are the weights outside the blocks, the block that computes and the next one, which a thread reads
    meanwhile. Nothing is mapped: the file may change or shrink, but every forward from then on raises
    `CheckpointError`, as it does for each weight that cannot be read. For forwards, one at a time; a forward of
    which gradients would be needed raises `RuntimeError`. A deep copy, and `double()`, are streamed, too.
    """
    recipe = prepare(path, dtype, config, nibbles, lora, conventions)
    outside = {
        name: torch.empty(weight.shape, dtype=recipe.dtype, device=device)
        for name, weight in recipe.plan.weights.items()
        if not name.startswith(BLOCKS_PREFIX)
    }
    for name in track(list(outside), f"loading {recipe.plan.source.path.name} outside its blocks"):
        merged_into(outside[name], name, recipe.plan.weights[name], recipe.loras)
    require_unchanged(recipe)
    return assemble_streamed(outside, BlockReader(recipe, recipe.dtype, torch.device(device)), conventions)


class StreamedTransformer(LTX2VideoTransformer3DModel):
    """A model whose blocks are on the meta device but for the one that computes. Made by `stream`."""

    reader: "BlockReader"

    def double(self: Model) -> Model:
        """In float64, in place: of the weights as rounded to the dtype that `stream` was given."""
        nn.Module._apply(self, Tensor.double)
        self.reader.convert(torch.float64)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamedTransformer":
        outside = {
            name: x.detach().clone() for name, x in self.named_parameters() if not name.startswith(BLOCKS_PREFIX)
        }
        reader = BlockReader(self.reader.recipe, self.reader.dtype, self.reader.device)
        return assemble_streamed(outside, reader, self.conventions)

    def refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "the blocks of a streamed model are in its file: to move, convert, change or save it, give "
            "`stream` a device, a dtype or a LoRA, or use `load`"
        )

    # The rest of nn.Module's ways to the parameters would do a part of the work, on the weights outside the blocks.
    _apply = state_dict = load_state_dict = __reduce_ex__ = refuse


def assemble_streamed(
    outside: dict[str, Tensor], reader: "BlockReader", conventions: Conventions
) -> StreamedTransformer:
    with torch.device("meta"):
        model = StreamedTransformer(reader.recipe.plan.config, conventions).requires_grad_(False)
    nn.Module.load_state_dict(model, outside, strict=False, assign=True)
    model.reader = reader
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(partial(reader.enter, i))
        block.register_forward_hook(reader.leave, always_call=True)
    return model.eval()


class BlockReader:
    """Hooks that give a block its parameters, and take them back, and the thread that reads the next block's."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> None:
        self.recipe, self.dtype, self.device = recipe, dtype, device
        self.rooms: tuple[Room, Room] = {}, {}  # of even blocks and of odd ones
        self.thread = ThreadPoolExecutor(1, "ltx2ref.stream")  # one: never are two blocks read at a time
        self.ahead: tuple[int, Future[Room]] | None = None
        self.resident: tuple[nn.Module, Room, int] | None = None  # its own parameters on meta, and whose it is

    def enter(self, i: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of block `i`."""
        if self.resident is not None and self.resident[2] != threading.get_ident():
            raise RuntimeError("a streamed model runs one forward at a time, and another thread is in one")
        self.vacate()  # a forward that was interrupted
        room = self.take(i)
        self.resident = block, dict(block.named_parameters()), threading.get_ident()
        assign(block, room)
        if i + 1 < self.recipe.plan.config.num_layers:
            self.ahead = i + 1, self.thread.submit(self.read, i + 1)

    def leave(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Forward hook, also of a block that raised, or whose `enter` did: then there is no output."""
        if self.resident is None or self.resident[2] != threading.get_ident():
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # it may still be reading what is about to be overwritten
        self.vacate()
        if out is not None and any(x.requires_grad for x in out):
            raise RuntimeError(
                "a streamed model has no gradients, its weights are gone when they would be needed: "
                "run it under torch.no_grad(), or use `load`"
            )

    def vacate(self) -> None:
        if self.resident is not None:
            block, own, _ = self.resident
            assign(block, own)
            self.resident = None

    def take(self, i: int) -> Room:
        """Block `i`, read by now, or read now. Raises what the reading raised: `CheckpointError`."""
        ahead, self.ahead = self.ahead, None
        future = ahead[1] if ahead is not None and ahead[0] == i else self.thread.submit(self.read, i)
        return future.result()

    def read(self, i: int) -> Room:
        """In the thread: all of block `i`, of a file that is still the one whose header was read."""
        block = f"{BLOCKS_PREFIX}{i}."
        stored = [item for item in self.recipe.plan.weights.items() if item[0].startswith(block)]
        room = self.rooms[i % 2]
        if not room:
            room.update(
                {
                    name.removeprefix(block): nn.Parameter(
                        torch.empty(weight.shape, dtype=self.dtype, device=self.device), requires_grad=False
                    )
                    for name, weight in stored
                }
            )
        for name, _ in sorted(stored, key=lambda item: (item[1].tensor.file.path, item[1].tensor.start)):
            self.fill(room[name.removeprefix(block)], name)
        require_unchanged(self.recipe)
        drop_cached(self.recipe)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return room

    def fill(self, out: Tensor, name: str) -> None:
        plan, loras, dtype = self.recipe
        exact = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device="cpu")
        merged_into(exact, name, plan.weights[name], loras)
        if exact is not out:
            out.copy_(exact)

    def convert(self, dtype: torch.dtype) -> None:
        self.dtype, self.rooms, self.ahead = dtype, ({}, {}), None


def require_unchanged(recipe: Recipe) -> None:
    for file in recipe.plan.source.files:
        file.open().close()


def drop_cached(recipe: Recipe) -> None:
    """Of files that are larger than the memory, no page is still there when the next forward wants it: the kernel need
    not search for the oldest ones."""
    files = recipe.plan.source.files
    if hasattr(os, "posix_fadvise") and sum(file.size for file in files) > physical_memory():
        for file in files:
            with file.open() as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def assign(block: nn.Module, parameters: Room) -> None:
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, parameter)
