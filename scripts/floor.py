"""Measure the time and the peak memory of a forward, and its floor; other scripts import this.

The floor is what no rewrite in PyTorch can avoid: the `F.linear` and `F.scaled_dot_product_attention` calls of a
forward, recorded, and replayed alone on tensors that already exist.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

Run = Callable[[], object]


def timed(run: Run, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class OwnCalls:
    """Measure the `seconds` that the `with` block spends in its own `F.linear` and attention calls.

    This time and that of the whole block come from one run, so a machine that is faster in one run than in the next
    changes both alike. The two functions are replaced, as a TorchFunctionMode would slow every other call, too.
    Not for compiled models, nor on a GPU, where a call only starts the work.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        names = ("linear", "scaled_dot_product_attention")
        self.patches = [patch.object(F, name, self.measured(getattr(F, name))) for name in names]

    def measured(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return call

    def __enter__(self) -> "OwnCalls":
        for each in self.patches:
            each.start()
        return self

    def __exit__(self, *error: object) -> None:
        for each in self.patches:
            each.stop()


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory, as PyTorch does on a GPU, or return False if it has no such setting.

    glibc gives each tensor above 32 MiB back as soon as it is freed, and pages the next one in anew: what is
    timed then is, to a part, the kernel.
    """
    trim_threshold, mmap_max = -1, -4  # glibc's names for them are M_TRIM_THRESHOLD and M_MMAP_MAX
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


class PeakMemory:
    """Measure the `peak_bytes` held at a time inside the `with` block, above what was held before it."""

    def __init__(self, device: str) -> None:
        self.device, self.start, self.peak_bytes = device, 0, 0
        self.trace = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "PeakMemory":
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.trace.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.device == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated() - self.start
        else:
            self.trace.stop()
            self.peak_bytes = max(accumulate(allocations(self.trace)), default=0)


def allocations(trace: profile) -> list[int]:
    """Return bytes allocated (+) and freed (-), in order, by PyTorch's CPU allocator, kernels' workspaces included."""
    assert trace.profiler is not None
    assert trace.profiler.kineto_results is not None
    events: list[Any] = trace.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]


@dataclass(frozen=True)
class Call:
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CallRecorder(TorchFunctionMode):
    """Keep each `F.linear` and `F.scaled_dot_product_attention`, with stand-ins for the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.stand_ins: dict[tuple[object, ...], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.scaled_dot_product_attention):
            place = count()
            args_in, kwargs_in = pytree.tree_map_only(
                Tensor, lambda tensor: self.stand_in(func, next(place), tensor), (args, kwargs)
            )
            self.calls.append(Call(func, args_in, kwargs_in))
        return func(*args, **kwargs)

    def stand_in(self, function: object, place: int, tensor: Tensor) -> Tensor:
        """Return a parameter itself, and for activations of one shape and place the same tensor."""
        if isinstance(tensor, nn.Parameter):
            return tensor
        key = (function, place, tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.stand_ins:
            self.stand_ins[key] = look_alike(tensor)
        return self.stand_ins[key]


def recorded_calls(run: Run) -> list[Call]:
    recorder = CallRecorder()
    with recorder:
        run()
    return recorder.calls


def look_alike(tensor: Tensor) -> Tensor:
    """Return another tensor of the same shape, strides (expanded ones, too), dtype and device."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.ones(length, dtype=tensor.dtype, device=tensor.device)
    if tensor.is_floating_point():
        memory.normal_()
    return memory.as_strided(tensor.shape, tensor.stride())


def flops(call: Call) -> int:
    """Count two for each product of a matmul, or of the two matmuls in attention, all keys included."""
    x: Tensor
    y: Tensor
    x, y = call.args[:2]
    if call.function is F.linear:
        return 2 * x.numel() * len(y)
    return 4 * x.numel() * y.shape[-2]


def replay(calls: list[Call]) -> None:
    for call in calls:
        call.function(*call.args, **call.kwargs)
