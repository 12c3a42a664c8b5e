"""Exact arithmetic: the same bits on every machine, for any torch code.

    with ltx2ref.exact():
        video, audio = model(**inputs, return_dict=False)

Each operation takes its inputs as they are, computes in float64 with sums in a fixed order, and rounds once to the
dtype that its result has in torch. What processors, BLAS libraries, thread counts and torch versions differ in is then
gone, and two implementations have the same bits if they compute the same operations.

The definition is in arithmetic.py. An operation that it does not know is an error that names it, never a native result.
"""
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .arithmetic import DTYPES, EXACT, FORMULAS, NARROW, VERSION, Arithmetic, NotExact
from .taps import Functions as Tracer

# What moves, selects or compares numbers and rounds none of them, or only as a cast does. Views are known as such.
MOVES = {
    "_to_copy", "copy", "copy_", "clone", "lift_fresh", "_unsafe_view", "_reshape_alias", "cat", "stack",
    "constant_pad_nd", "repeat", "roll", "flip", "tril", "triu", "index", "index_select", "index_put",
    "index_copy", "gather", "scatter", "masked_fill", "masked_scatter", "masked_select", "where", "take",
    "embedding", "slice_scatter", "select_scatter", "diagonal_scatter", "split_with_sizes_copy", "fill", "zero",
    "zeros", "ones", "full", "empty", "empty_strided", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "scalar_tensor", "eye", "sort",
    "topk", "argsort", "argmax", "argmin", "max", "min", "amax", "amin", "aminmax", "maximum", "minimum",
    "fmax", "fmin", "clamp", "clamp_min", "clamp_max", "relu", "neg", "abs", "sign", "sgn", "floor", "ceil",
    "trunc", "nan_to_num", "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "isposinf",
    "isneginf", "signbit", "logical_not", "logical_and", "logical_or", "logical_xor", "any", "all", "nonzero",
    "equal", "bucketize", "searchsorted", "unique_dim", "_local_scalar_dense", "is_nonzero", "_assert_async",
    "_assert_tensor_metadata", "detach", "alias", "resize", "set",
}
LEAVES = {"numpy", "__array__", "__dlpack__", "data_ptr"}  # methods that hand a tensor to something that is not torch
PLACEMENT = {"dtype", "out", "layout", "device", "pin_memory"}
DEFINED = {F.linear: "linear", F.rms_norm: "rms_norm", torch.rms_norm: "rms_norm",
           F.scaled_dot_product_attention: "scaled_dot_product_attention"}


@contextmanager
def exact(arithmetic: Arithmetic = EXACT) -> Iterator[Counter[str]]:
    """Compute everything that torch is asked for within the context in exact arithmetic.

    Yields how often each defined operation was computed, by its name in ATen. Gradients, random numbers, autocast,
    tensors that leave torch, custom operators, and operations that the definition lacks raise `NotExact`.
    `arithmetic` is for machines that differ from the definition in one step, to see what that changes.
    """
    if any(isinstance(mode, Tracer) for mode in torch.overrides._get_current_function_mode_stack()):
        raise NotExact("exact(): enter it before trace(), which has to see the calls first")
    dispatched = Dispatched(copy(arithmetic))
    with Called(dispatched), dispatched:
        yield dispatched.operations


class Dispatched(TorchDispatchMode):
    """Computes each operation of ATen by its formula."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.arithmetic, self.operations = arithmetic, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        if any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        if func.namespace != "aten":
            raise NotExact(f"exact arithmetic cannot see into the custom operator {func}")
        name = base_name(func)
        if name in FORMULAS:
            return self.compute(name, func, args, kwargs)
        if func._can_decompose():  # as a whole it arrives under inference mode only
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        moves = (name in MOVES or func.is_view) and not accumulates(name, func, args, kwargs)
        results = tensors_in(result)  # factories put them on the meta device, too
        if not moves and any(computes(x) and not x.is_meta for x in (*tensors, *results)):
            raise NotExact(f"exact arithmetic (version {VERSION}) does not define the operation {func}")
        return result

    def compute(self, name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Return what `func` does, in its dtype, shape and strides, with the formula's numbers in it."""
        overwrites = getattr(func, "_schema", None) is not None and func._schema.is_mutable
        into = kwargs.get("out", args[0]) if overwrites else None
        values = self.values(name, args, kwargs, into.dtype) if into is not None and computes(into) else ()
        result = func(*args, **kwargs)
        results = tensors_in(result)
        if not computes(results[0]) or results[0].is_meta:
            return result
        require_known(func, results[0])
        for x, value in zip(results, values or self.values(name, args, kwargs, results[0].dtype), strict=False):
            x.copy_(self.arithmetic.round(value, x.dtype).expand(x.shape))
        self.operations[name] += 1
        return result

    def values(self, name: str, args: Any, kwargs: Mapping[str, Any], result: torch.dtype) -> tuple[Tensor, ...]:
        """Evaluate the formula: on float64, or on the tensors as they are where it widens them itself."""
        self.arithmetic.operation, self.arithmetic.dtype = name, result
        dtype, given = kwargs.get("dtype"), {key: x for key, x in kwargs.items() if key not in PLACEMENT}

        def wide(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.double() if dtype is None else self.arithmetic.round(x.double(), dtype).double()

        if name not in NARROW:
            args, given = tree_map(wide, (args, given))
        value = FORMULAS[name](self.arithmetic, *args, **given)
        return value if isinstance(value, tuple) else (value,)


class Called(TorchFunctionMode):
    """Catches calls that ATen takes apart in ways that depend on layout, version or mode, and what leaves torch."""

    def __init__(self, dispatched: Dispatched) -> None:
        super().__init__()
        self.dispatched = dispatched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, DEFINED.get(func)
        if getattr(func, "__name__", "") in LEAVES and computes(args[0]):
            raise NotExact(f"exact arithmetic cannot see what is computed outside of torch: Tensor.{func.__name__}()")
        tensors = tensors_in(args, kwargs) if name is not None else []
        if name is None or any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        if torch.is_autocast_enabled(tensors[0].device.type):
            raise NotExact("exact arithmetic does not define autocast: cast the model instead")
        compute = partial(self.compute, name, func, args, kwargs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return WithoutGradient.apply(compute, *tensors)  # type: ignore[no-untyped-call]
        return compute()

    def compute(self, *operation: Any) -> Any:
        with torch._C._DisableTorchDispatch():  # what the formula is made of is no operation of the caller's
            return self.dispatched.compute(*operation)


class WithoutGradient(torch.autograd.Function):
    """A result whose gradient is an error when it is asked for, not silently nothing."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Tensor], *tensors: Tensor) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotExact("exact arithmetic defines no gradients: compute them outside of exact()")


def tensors_in(*given: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in given:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple | list | dict):
            found += tensors_in(*(x.values() if isinstance(x, dict) else x))
    return found


def computes(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def base_name(func: Any) -> str:
    """Return the name of an operation of ATen, without the mark of its in-place variant."""
    name: str = func.overloadpacket.__name__
    return name.removesuffix("_") if not name.startswith("__") else name


def accumulates(name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation that otherwise moves numbers adds them up this time."""
    put = name == "index_put" and (kwargs.get("accumulate", False) or (len(args) > 3 and args[3]))
    return put or "reduce" in func._overloadname


def require_known(func: Any, x: Tensor) -> None:
    if x.dtype not in DTYPES or x.layout != torch.strided:
        raise NotExact(f"exact arithmetic does not define {func} of {x.dtype} ({x.layout}); "
                       f"it defines {', '.join(map(str, DTYPES))}")
    if x.device.type == "mps":
        raise NotExact("exact arithmetic needs float64, which MPS has not: move the model and its inputs to the CPU")
