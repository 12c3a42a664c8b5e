"""Follow tensors from a norm to the sub-layer that uses it, so that a residual gets its name from the data alone.

Many ports normalise their residuals by a function, `F.rms_norm` or a few lines of their own, and not by a module with a
name. Counting such calls would give a wrong name to every residual after one norm more, or one less. Here each result
is followed through the operations that a norm and a modulation consist of. What a sub-layer is given then says whose
norm it is, or nothing: a residual without a name is missing, and no residual has a wrong one.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

LAYOUT_CHANGES = {"contiguous", "clone", "reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze"}
CASTS = LAYOUT_CHANGES | {"to", "float", "double", "half", "bfloat16", "type", "type_as"}
POWERS = {"pow", "pow_", "__pow__", "square", "abs", "float_power"}
STATISTICS = {"mean", "sum", "norm", "vector_norm", "var"}
SCALINGS = {"mul", "rmul", "imul", "div", "truediv", "itruediv"}
SCALARS = {"sub", "addcmul", "lerp", "add", "rsqrt", "sqrt", "reciprocal", "clamp", "clamp_min", "neg"}
# What a statistic, or the result of a norm, may pass through: scales, shifts, roots and changes of layout.
POINTWISE = CASTS | {
    f"{before}{name}{after}"
    for name in SCALARS | {"mul", "div", "truediv"}
    for before, after in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
}
FOLLOWED = POINTWISE | POWERS | STATISTICS


class NormOf(NamedTuple):
    """What a tensor was computed from."""

    kind: str  # "cast", "power" or "statistic" of the source, or the source "normed"
    source: Tensor
    version: int | Tensor  # the source's when it was read, to notice that it was changed in place
    entered: int  # how many sub-layers had begun
    layer_norm: bool = False  # normed by F.layer_norm,
    normed: Tensor | None = None  # and this was its result, if the tensor is another one


class Flow:
    """Says of which tensor another one is the norm, scaled and shifted."""

    def __init__(self) -> None:
        self.origins = WeakIdKeyDictionary()
        self.entered = 0  # how many sub-layers have begun

    def residual(self, x: Tensor) -> Tensor | None:
        """Return the tensor of which `x` is the norm, or None if that is unknown or has changed since."""
        origin = self.origins.get(x)
        if origin is None or origin.kind != "normed":
            return None
        if isinstance(origin.version, Tensor):
            return origin.version
        return origin.source if origin.version == origin.source._version else None

    def last_norm(self, x: Tensor) -> Tensor | None:
        """Return the result of the `F.layer_norm` that `x` was computed from by a scale and a shift, or None."""
        origin = self.origins.get(x)
        if origin is None or not origin.layer_norm:
            return None
        return x if origin.normed is None else origin.normed

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note where the result of an operation comes from."""
        if not isinstance(result, Tensor):
            return
        if func in (F.rms_norm, F.layer_norm):
            self.normed(args[0] if args else kwargs["input"], result, func is F.layer_norm)
        elif (name := getattr(func, "__name__", "")) in FOLLOWED:
            given = among((*args, *kwargs.values()))
            if name.endswith("_") or not any(x is result for x in given):  # a cast may have nothing to do
                self.combined(name, given, result)

    def combined(self, name: str, given: list[Tensor], result: Tensor) -> None:
        """Note where the result of a followed operation on tensors comes from."""
        origins = [self.origins.get(x) for x in given]
        if len({id(x) for x in given}) == 1:
            self.of_one(name, given, origins[0], result)
            return
        known = [(x, origin) for x, origin in zip(given, origins, strict=True) if origin is not None]
        normed = [(x, origin) for x, origin in known if origin.kind == "normed"]
        statistics = [(x, origin) for x, origin in known if origin.kind == "statistic"]
        if len(normed) == 1:
            x, origin = normed[0]
            self.forget(result)
            # A sum with the source is the next residual, and not the norm of this one.
            if result.numel() == x.numel() and not any(y is origin.source for y in given):
                self.origins[result] = self.passed_on(x, origin, "normed", result)
        elif len(given) == 2 and len(statistics) == 1 and name.strip("_") in SCALINGS:
            other = given[0] if given[1] is statistics[0][0] else given[1]
            cast = self.origins.get(other)
            if (other if cast is None or cast.kind != "cast" else cast.source) is statistics[0][1].source:
                self.normed(other, result, False)
            else:
                self.forget(result)
        else:
            self.forget(result)

    def of_one(self, name: str, given: list[Tensor], origin: NormOf | None, result: Tensor) -> None:
        """Note the result of an operation on one tensor, and perhaps numbers."""
        kind = "cast" if origin is None else origin.kind
        squared = name in POWERS or (len(given) == 2 and name.strip("_") == "mul")
        if name in CASTS or (name in POINTWISE and not squared and kind in ("statistic", "normed")):
            after = kind
        elif name in STATISTICS and kind != "normed":
            after = "statistic"
        else:
            after = "statistic" if kind == "statistic" else "power" if squared and kind == "cast" else ""
        self.forget(result)
        if after and origin is not None:
            self.origins[result] = self.passed_on(given[0], origin, after, result)
        elif after and result is not given[0]:
            x = given[0]
            self.origins[result] = NormOf(after, x, -1 if x.is_inference() else x._version, self.entered)

    def normed(self, x: Tensor, result: Tensor, layer_norm: bool) -> None:
        """Note the result of a norm. A norm of a norm, both for the same sub-layer, is one of the residual."""
        origin, source = self.origins.get(x), x
        if origin is not None and (origin.kind == "cast" or (origin.kind, origin.entered) == ("normed", self.entered)):
            source = origin.source
        self.forget(result)
        if result is not source:
            version: int | Tensor
            if source.is_inference():  # such a tensor does not count its changes
                version = source.clone()
            else:
                version = source._version if origin is None or source is x else origin.version
            self.origins[result] = NormOf("normed", source, version, self.entered, layer_norm)

    def passed_on(self, x: Tensor, origin: NormOf, kind: str, result: Tensor) -> NormOf:
        """Return the origin of a result that was computed from `x`."""
        if not origin.layer_norm or origin.normed is not None:
            return origin._replace(kind=kind)
        overwritten = result is x
        return origin._replace(kind=kind, layer_norm=not overwritten, normed=None if overwritten else x)

    def forget(self, x: Tensor) -> None:
        """Forget where a tensor comes from that is overwritten."""
        if x in self.origins:
            del self.origins[x]


def among(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among values."""
    return [x for x in values if isinstance(x, Tensor)]
