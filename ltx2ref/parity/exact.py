"""Compute in exact arithmetic: the same bits on every machine, for any torch code.

    with ltx2ref.exact():
        video, audio = model(**inputs, return_dict=False)

Each operation takes its inputs as they are, computes in float64 with sums in a fixed order, and rounds once to the
dtype that its result has in torch. Differences between processors, BLAS libraries, thread counts and torch versions
disappear, and two implementations have the same bits if they compute the same operations.

The definition is in arithmetic.py. An operation that it lacks raises an error that names it, and is never computed
natively.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .arithmetic import AS_DEFINED, DEFINED_DTYPES, FORMULAS, NARROW, VERSION, Arithmetic, NotExact

# fmt: off
# A zero that one of these returns becomes +0: which of two zeros a processor picks depends on length and layout.
EXTREMES = {
    "max", "min", "amax", "amin", "aminmax", "maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min",
    "clamp_max",
}
# Operations that move, select or compare numbers, and do not round them, or only as a cast does. Views need no entry:
# torch marks them.
MOVES = EXTREMES | {
    "_to_copy", "copy", "clone", "lift_fresh", "_unsafe_view", "_reshape_alias", "cat", "stack", "constant_pad_nd",
    "repeat", "roll", "flip", "tril", "triu", "index", "index_select", "index_put", "index_copy", "gather",
    "scatter", "masked_fill", "masked_scatter", "masked_select", "where", "take", "embedding", "slice_scatter",
    "select_scatter", "diagonal_scatter", "split_with_sizes_copy", "fill", "zero", "zeros", "ones", "full", "empty",
    "empty_strided", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
    "new_empty", "new_empty_strided", "scalar_tensor", "eye", "sort", "topk", "argsort", "argmax", "argmin", "relu",
    "neg", "abs", "sign", "sgn", "floor", "ceil", "trunc", "nan_to_num", "eq", "ne", "lt", "le", "gt", "ge",
    "isnan", "isinf", "isfinite", "isposinf", "isneginf", "signbit", "logical_not", "logical_and", "logical_or",
    "round", "index_fill", "count_nonzero", "isin", "logical_xor", "any", "all", "nonzero", "equal", "bucketize",
    "searchsorted", "unique_dim", "_local_scalar_dense", "is_nonzero", "_assert_async", "_assert_tensor_metadata",
    "detach", "alias", "resize", "set",
}
# fmt: on
# These are defined as a whole, because ATen takes them apart in more than one way.
WHOLE = {"linear", "rms_norm", "scaled_dot_product_attention"}
LEAVES = {"numpy", "__array__", "__dlpack__", "data_ptr"}  # methods that hand a tensor to other libraries
LEAVE_WITH_NUMBERS = {"tolist", "__reduce_ex__", "share_memory_"}  # these, too, except for integers
PLAIN_TYPES = (Tensor, nn.Parameter, nn.Buffer)
PLACEMENT = {"dtype", "out", "layout", "device", "pin_memory"}


@contextmanager
def exact(arithmetic: Arithmetic = AS_DEFINED, random: bool = False) -> Iterator[Counter[str]]:
    """Compute everything that torch is asked for within the context in exact arithmetic.

    Yields a counter of the defined operations that were computed, by their names in ATen. Results have no gradients.
    Other threads are not affected.

    `arithmetic` may be a simulated machine (machines.py), which differs from the definition in one step. `random`
    permits random numbers, which layers draw when they are built within the context; nothing may depend on them.

    Raises `NotExact` for random numbers, autocast, tensors that leave torch or have a subclass of their own, custom
    operators, and operations that the definition lacks.
    """
    refuse_environment()
    dispatched = Dispatched(copy(arithmetic), random)
    with torch._C._AutoDispatchBelowAutograd(), Called(), dispatched:  # so that operations arrive whole, in every mode
        yield dispatched.operations


def refuse_environment() -> None:
    """Raise `NotExact` if autocast is on, or if subnormal numbers are flushed to zero."""
    refuse_autocast()
    if not torch.tensor([2.0**-140]).mul(0.5).item():
        raise NotExact("exact arithmetic keeps subnormal numbers: expected torch.set_flush_denormal(False)")


def refuse_autocast() -> None:
    """Raise `NotExact` if autocast is on."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise NotExact("exact arithmetic does not define autocast: cast the model instead")


class Dispatched(TorchDispatchMode):
    """Computes each operation of ATen by its formula."""

    def __init__(self, arithmetic: Arithmetic, random: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.arithmetic, self.random, self.operations = arithmetic, random, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in(args, kwargs)
        if any(type(x) not in PLAIN_TYPES for x in tensors):
            found = next(type(x) for x in tensors if type(x) not in PLAIN_TYPES)
            raise NotExact(f"exact arithmetic cannot see into {found.__name__}, a subclass of torch.Tensor")
        if func.namespace in ("prim", "profiler") or any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        if func.namespace != "aten":
            raise NotExact(f"exact arithmetic cannot see into the custom operator {func}")
        name = base_name(func)
        if name in WHOLE or (name in FORMULAS and not func._can_decompose()):
            return self.compute(name, func, args, kwargs)
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if self.random and torch.Tag.nondeterministic_seeded in func.tags:
            return result
        results = [x for x in tensors_in(result) if not x.is_meta]  # factories put them on the meta device, too
        require_defined(name, func, args, kwargs, tensors, results)
        if name in EXTREMES:
            for x in filter(computes, results):
                x.add_(0.0)
        return result

    def compute(self, name: str, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run `func` for its dtype, shape and strides, and put the formula's numbers into the result."""
        into = kwargs.get("out", args[0]) if func._schema.is_mutable else None
        if "out" in kwargs and any(computes(x) and x.dtype != kwargs["out"].dtype for x in tensors_in(args)):
            raise NotExact(f"exact arithmetic does not define {func} with an out= of another dtype")
        values = self.values(name, args, kwargs, into.dtype) if into is not None and computes(into) else ()
        result = func(*args, **kwargs)
        results = tensors_in(result)
        if not computes(results[0]) or results[0].is_meta:
            return result
        require_known(func, results[0])
        for x, value in zip(results, values or self.values(name, args, kwargs, results[0].dtype), strict=True):
            if value.shape != x.shape:
                raise NotExact(
                    f"exact arithmetic does not define {func} for these arguments: the result has the shape "
                    f"{tuple(x.shape)}, the formula's {tuple(value.shape)}"
                )
            x.copy_(self.arithmetic.round(value, x.dtype))
        self.operations[name] += 1
        return result

    def values(self, name: str, args: Any, kwargs: Mapping[str, Any], result: torch.dtype) -> tuple[Tensor, ...]:
        """Evaluate the formula on float64 tensors, or on the tensors as they are if it converts them itself."""
        self.arithmetic.operation, self.arithmetic.dtype = name, result
        dtype, given = kwargs.get("dtype"), {key: x for key, x in kwargs.items() if key not in PLACEMENT}

        def wide(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.double() if dtype is None else self.arithmetic.round(x.double(), dtype).double()

        if name not in NARROW:
            args, given = tree_map(wide, (args, given))
        value = FORMULAS[name](self.arithmetic, *args, **given)
        return (value[0],) if name == "rms_norm" else value if isinstance(value, tuple) else (value,)


class Called(TorchFunctionMode):
    """Catches tensors that leave torch, and autocast, which acts before an operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in LEAVES or (name in LEAVE_WITH_NUMBERS and computes(args[0])):
            raise NotExact(f"exact arithmetic cannot see what is computed outside of torch: Tensor.{name}()")
        refuse_autocast()
        return func(*args, **(kwargs or {}))


def tensors_in(*given: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    for x in given:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple | list | dict):
            found += tensors_in(*(x.values() if isinstance(x, dict) else x))
    return found


def computes(x: Tensor) -> bool:
    """Tell whether a tensor holds floating-point or complex numbers, which can be rounded."""
    return x.is_floating_point() or x.is_complex()


def base_name(func: Any) -> str:
    """Return the name of an ATen operation without the underscore of its in-place variant."""
    name: str = func.overloadpacket.__name__
    return name.removesuffix("_") if not name.startswith("__") else name


def require_defined(
    name: str, func: Any, args: Any, kwargs: Mapping[str, Any], given: list[Tensor], results: list[Tensor]
) -> None:
    """Raise `NotExact` if an operation has no formula and does more than move numbers; it has run already."""
    put = name == "index_put" and (kwargs.get("accumulate", False) or (len(args) > 3 and args[3]))
    other = put or {"reduce", "decimals"} & {*func._overloadname.split("_")}
    moves = (name in MOVES or func.is_view) and not other
    random = torch.Tag.nondeterministic_seeded in func.tags and bool(results)
    narrowed = (
        name in ("_to_copy", "copy")
        and any(computes(x) and x.dtype not in DEFINED_DTYPES for x in results)
        and any(x.dtype in DEFINED_DTYPES for x in given)
    )
    complexes = any(x.is_complex() for x in (*given, *results)) and not func.is_view
    if random or narrowed or complexes or (not moves and any(map(computes, (*given, *results)))):
        raise NotExact(
            f"exact arithmetic (version {VERSION}) does not define the operation {func}"
            f"{': make models and inputs before exact()' * random}{' of complex numbers' * complexes}"
        )


def require_known(func: Any, x: Tensor) -> None:
    """Raise `NotExact` for a result whose dtype, layout or device exact arithmetic does not define."""
    if x.dtype not in DEFINED_DTYPES or x.layout != torch.strided:
        raise NotExact(
            f"exact arithmetic does not define {func} for {x.dtype} ({x.layout}); "
            f"it defines {', '.join(map(str, DEFINED_DTYPES))}"
        )
    if x.device.type == "mps":
        raise NotExact("exact arithmetic needs float64, which MPS lacks: move the model and its inputs to the CPU")
