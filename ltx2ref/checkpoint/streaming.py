"""Streaming: models larger than the memory, whose blocks are read one ahead of their use and dropped afterwards.

Hooks on the blocks do this. Blocks compute, and traces record, the same as with `load`.
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
from .quantised import Nibbles, ScaleOrder
from .settle import ReadingOptions
from .shell import without_values
from .storage import require_unchanged
from .streams import StreamName

BLOCKS_PREFIX = "transformer_blocks."
Room = dict[str, nn.Parameter]  # the memory of one block, by its parameters' names inside the block
Model = TypeVar("Model", bound="StreamedTransformer")


def stream(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: TransformerConfig | None = None,
    nibbles: Nibbles | None = None,
    scales: ScaleOrder | None = None,
    prefix: str | None = None,
    variant: str | None = None,
    streams: StreamName | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    conventions: Conventions = DIFFUSERS,
) -> "StreamedTransformer":
    """Load a model that keeps two blocks in memory instead of all of them.

    The arguments are those of `load`. The weights outside the blocks, the current block and the next one, which a
    thread reads meanwhile, are in memory. Nothing is mapped, so the file may change or shrink, but every forward from
    then on raises `CheckpointError`, as it does for each weight that cannot be read.

    The model runs one forward at a time. A forward that needs gradients raises `RuntimeError`. Deep copies of the
    model, and the model after `double()`, are streamed as well.
    """
    options = ReadingOptions(config, nibbles, scales, prefix, variant, streams)
    recipe = prepare(path, dtype, options, lora, conventions)
    outside = {
        name: torch.empty(weight.shape, dtype=recipe.dtype, device=device)
        for name, weight in recipe.plan.weights.items()
        if not name.startswith(BLOCKS_PREFIX)
    }
    for name in track(list(outside), f"loading {recipe.plan.source.path.name} outside its blocks"):
        merged_into(outside[name], name, recipe.plan.weights[name], recipe.loras)
    require_unchanged(recipe.plan.source.files)
    return assemble_streamed(outside, BlockReader(recipe, recipe.dtype, torch.device(device)), conventions)


class StreamedTransformer(LTX2VideoTransformer3DModel):
    """A model, made by `stream`, in which all blocks are on the meta device except for the current one."""

    reader: "BlockReader"

    def double(self: Model) -> Model:
        """Convert to float64 in place. The weights are those already rounded to the dtype that `stream` was given."""
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
        """Raise `TypeError`: the blocks cannot be reached through nn.Module."""
        raise TypeError(
            "the blocks of a streamed model stay in its file: to move, convert, change or save it, give "
            "`stream` a device, a dtype or a LoRA, or use `load`"
        )

    # nn.Module's other ways to the parameters would reach only the weights outside the blocks, so they are refused.
    _apply = state_dict = load_state_dict = __reduce_ex__ = refuse


def assemble_streamed(
    outside: dict[str, Tensor], reader: "BlockReader", conventions: Conventions
) -> StreamedTransformer:
    """Build the model from its weights outside the blocks, and put the reader's hooks on the blocks."""
    plan = reader.recipe.plan
    model = without_values(StreamedTransformer, plan.config, conventions, plan.streams).requires_grad_(False)
    nn.Module.load_state_dict(model, outside, strict=False, assign=True)
    model.reader = reader
    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_pre_hook(partial(reader.enter, i))
        block.register_forward_hook(reader.leave, always_call=True)
    return model.eval()


class BlockReader:
    """Hooks that give a block its parameters and take them back, with a thread that reads the next block."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> None:
        self.recipe, self.dtype, self.device = recipe, dtype, device
        self.rooms: tuple[Room, Room] = {}, {}  # one for even blocks and one for odd ones
        self.thread = ThreadPoolExecutor(1, "ltx2ref.stream")  # a single thread, so blocks are read one at a time
        self.ahead: tuple[int, Future[Room]] | None = None
        # The block in memory, its own parameters on the meta device, and the thread that runs it.
        self.resident: tuple[nn.Module, Room, int] | None = None

    def enter(self, i: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Give block `i` its parameters, as a forward pre-hook, and start to read the next block.

        Raises `RuntimeError` if another thread is inside a forward.
        """
        if self.resident is not None and self.resident[2] != threading.get_ident():
            raise RuntimeError("a streamed model runs one forward at a time, and another thread is in one")
        self.vacate()  # an interrupted forward may have left a block behind
        room = self.take(i)
        self.resident = block, dict(block.named_parameters()), threading.get_ident()
        assign(block, room)
        if i + 1 < self.recipe.plan.config.num_layers:
            self.ahead = i + 1, self.thread.submit(self.read, i + 1)

    def leave(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """Take the parameters of a block back, as a forward hook.

        The hook also runs for a block that raised, or whose `enter` raised. Then there is no output. Raises
        `RuntimeError` if the output needs gradients.
        """
        if self.resident is None or self.resident[2] != threading.get_ident():
            return
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # it may still read memory that is about to be overwritten
        self.vacate()
        if out is not None and any(x.requires_grad for x in out):
            raise RuntimeError(
                "a streamed model has no gradients, because its weights are gone when they would be needed: "
                "run it under torch.no_grad(), or use `load`"
            )

    def vacate(self) -> None:
        """Give the block in memory its own parameters on the meta device again."""
        if self.resident is not None:
            block, own, _ = self.resident
            assign(block, own)
            self.resident = None

    def take(self, i: int) -> Room:
        """Return the memory of block `i`, waiting for the thread.

        Raises `CheckpointError` if the block could not be read.
        """
        ahead, self.ahead = self.ahead, None
        future = ahead[1] if ahead is not None and ahead[0] == i else self.thread.submit(self.read, i)
        return future.result()

    def read(self, i: int) -> Room:
        """Read all of block `i`, in the thread.

        Raises `CheckpointError` if the file has changed since its header was read.
        """
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
        require_unchanged(self.recipe.plan.source.files)
        drop_cached(self.recipe)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return room

    def fill(self, out: Tensor, name: str) -> None:
        """Read a weight with its LoRAs into a tensor, rounded first to the dtype that `stream` was given."""
        plan, loras, dtype = self.recipe
        exact = out if out.dtype == dtype else torch.empty(out.shape, dtype=dtype, device="cpu")
        merged_into(exact, name, plan.weights[name], loras)
        if exact is not out:
            out.copy_(exact)

    def convert(self, dtype: torch.dtype) -> None:
        """Make the blocks from now on have this dtype."""
        self.dtype, self.rooms, self.ahead = dtype, ({}, {}), None


def drop_cached(recipe: Recipe) -> None:
    """Drop the cached pages of files that are larger than the memory.

    None of these pages would survive until the next forward, and without them the kernel need not search for the
    oldest.
    """
    files = recipe.plan.source.files
    if hasattr(os, "posix_fadvise") and sum(file.size for file in files) > physical_memory():
        for file in files:
            with file.open() as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def physical_memory() -> int:
    """Return the size of this machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def assign(block: nn.Module, parameters: Room) -> None:
    """Set the parameters of a block by name."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, parameter)
