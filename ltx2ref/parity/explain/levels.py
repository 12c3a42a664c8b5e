"""Find out which noise level a sinusoid was made from: an argument, reduced over tokens, times a factor, rounded.

Ports differ from the reference in one or several of these at the same time, so all combinations are tried, the simplest
first. Each single difference is one cause: a noise level in [0, 1] stays one, whatever else is wrong with it.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ...embeddings import sinusoid
from ..truth import norm, sinusoid_bound
from .evidence import Evidence

ARGUMENTS = ("timestep", "audio_timestep", "sigma", "audio_sigma")
PLAIN = ""  # a level that is not reduced, or not rounded


class Level(NamedTuple):
    """One way of making the noise level of a sinusoid."""

    source: str  # the argument, or several that are equal here: "timestep (= sigma)"
    reduction: str = PLAIN  # "maximum of {}" and so on, over the tokens or the batch
    factor: float = 1.0
    rounding: str = PLAIN  # "rounded to bfloat16" and so on

    def __str__(self) -> str:
        text = self.reduction.format(self.source) if self.reduction else self.source
        factor = "" if self.factor == 1 else f" * {self.factor:g}"
        return text + factor + (f" {self.rounding}" if self.rounding else "")

    @property
    def steps(self) -> int:
        """Count what is done to the argument."""
        return (self.reduction != PLAIN) + (self.factor != 1) + (self.rounding != PLAIN)

    def differences(self, own: "Level") -> dict[str, "Level"]:
        """Return each single difference from the reference's level in words, and `own` with only that difference."""
        found: dict[str, Level] = {}
        if (self.source, self.reduction) != (own.source, own.reduction):
            changed = own._replace(source=self.source, reduction=self.reduction)
            here, there = (x._replace(factor=1.0, rounding=PLAIN) for x in (changed, own))
            found[f"the noise level {here} in place of {there}"] = changed
        if self.factor != own.factor:
            changed = own._replace(factor=self.factor)
            here, there = (x._replace(rounding=PLAIN) for x in (changed, own))
            found[f"{here} in place of {there}: a timestep multiplier applied twice, or not at all"] = changed
        if self.rounding != own.rounding:
            found[f"a noise level {self.rounding}"] = own._replace(rounding=self.rounding)
        return found


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum of {}": lambda x: x.amax(1, keepdim=True),
    "mean of {}": lambda x: x.mean(1, keepdim=True),
    "minimum of {}": lambda x: x.amin(1, keepdim=True),
    "{} of the first token": lambda x: x[:, :1],
    "{} of the last token": lambda x: x[:, -1:],
    "maximum of {} over the batch": lambda x: x.amax((0, 1), keepdim=True).expand(len(x), 1),
    "{} of the first batch element": lambda x: x[:1].expand_as(x),
}
ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "rounded to bfloat16": lambda x: x.bfloat16().float(),
    "rounded to float16": lambda x: x.half().float(),
    "rounded to an integer": lambda x: x.round(),
    "truncated to an integer": lambda x: x.floor(),
}
THOUSAND = 1000.0  # noise levels are also kept in [0, 1], and may be rounded there


def wrong_level(e: Evidence) -> str | None:
    """Recognise a sinusoid made from another noise level, or from one that was scaled, reduced or rounded."""
    own, found = levels(e)
    if own is None or found is None or own == found:
        return None
    source = "the noise level " if (found.source, found.reduction) != (own.source, own.reduction) else ""
    meaning = ": a timestep multiplier applied twice, or not at all" if found.factor != own.factor else ""
    return f"{source}{found} in place of {own}{meaning}"


def levels(e: Evidence) -> tuple[Level | None, Level | None]:
    """Return the noise levels of the reference's sinusoid and of the candidate's; None where nothing fits."""
    if not e.inputs or not e.name.endswith(".sinusoid") or e.config is None:
        return None, None
    own = fitting(e, e.reference)
    found = own if own is not None and is_made_of(e, made(e, own), e.candidate) else fitting(e, e.candidate, own)
    return own, found


def single_differences(stages: Mapping[str, Evidence]) -> dict[str, dict[str, Tensor]]:
    """Return each single difference of a stage's noise level in words, and what it adds to the sinusoid."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, e in stages.items():
        own, other = levels(e)
        if own is not None and other is not None and own != other:
            right = sines(e, own)
            found[name] = {
                what: (sines(e, level) - right).flatten(0, 1) for what, level in other.differences(own).items()
            }
    return found


def fitting(e: Evidence, wanted: Tensor, own: Level | None = None) -> Level | None:
    """Return the simplest level whose sinusoid is `wanted`: the reference's own argument is tried first."""
    known = arguments(e)
    first = [own.source] if own is not None and own.source in known else []
    for steps in range(4):
        for source in [*first, *(name for name in known if name not in first)]:
            for level in ways(e, source, known[source]):
                if level.steps == steps and is_made_of(e, made(e, level), wanted):
                    return level
    return None


def ways(e: Evidence, source: str, x: Tensor) -> Iterator[Level]:
    """Yield every level that an argument can be made into, apart from reductions that change nothing."""
    several, batch = x.shape[1] > 1, len(x) > 1
    reductions = [PLAIN] + [
        name for name in REDUCTIONS if (batch if "batch" in name else several) and not torch.equal(reduced(x, name), x)
    ]
    for reduction, factor, rounding in product(reductions, factors(e), (PLAIN, *ROUNDINGS)):
        yield Level(source, reduction, factor, rounding)


def factors(e: Evidence) -> list[float]:
    """Return the factors that a noise level may have, 1 first: multipliers of the config applied too often or never."""
    config = e.config
    if config is None:
        return [1.0]
    ratio = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier
    multipliers = {THOUSAND, config.timestep_scale_multiplier, config.cross_attn_timestep_scale_multiplier, ratio}
    return sorted({y for x in multipliers for y in (x, 1 / x)} | {1.0}, key=lambda x: (x != 1, x))


def arguments(e: Evidence) -> dict[str, Tensor]:
    """Return the forward's noise levels, (B, 1|T) each. Equal ones share an entry with all their names."""
    found: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name in ARGUMENTS:
        if e.inputs and e.inputs.get(name) is not None:
            x = e.inputs[name].reshape(len(e.inputs[name]), -1).float()
            same = next((other for other, y in found.items() if torch.equal(x, y)), None)
            if same is None:
                found[name] = x
            names.setdefault(same or name, []).append(name)
    return {name if not (more := names[name][1:]) else f"{name} (= {' = '.join(more)})": x for name, x in found.items()}


def made(e: Evidence, level: Level) -> list[Tensor]:
    """Return the values, (B, 1|T), that a level may have: it can be rounded as it is given, or in [0, 1]."""
    x = arguments(e)[level.source]
    x = reduced(x, level.reduction) if level.reduction else x
    factor = level.factor * gate_factor(e)
    if not level.rounding:
        return [x * factor]
    rounded = ROUNDINGS[level.rounding]
    return [rounded(x) * factor, rounded(x * factor), rounded(x / THOUSAND) * THOUSAND * factor]


def reduced(x: Tensor, name: str) -> Tensor:
    """Return one noise level for all tokens, or for the whole batch."""
    return REDUCTIONS[name](x)


def gate_factor(e: Evidence) -> float:
    """Return the factor by which the gate of an exchange scales the noise level; 1 for other taps."""
    if e.config is None or "gate" not in e.name:
        return 1.0
    return e.config.cross_attn_timestep_scale_multiplier / e.config.timestep_scale_multiplier


def is_made_of(e: Evidence, values: list[Tensor], wanted: Tensor) -> bool:
    """Tell whether a sinusoid of one of these levels is `wanted`, within the bound of a right sinusoid."""
    return any(is_sinusoid_of(x, wanted) for x in values)


def is_sinusoid_of(x: Tensor, wanted: Tensor) -> bool:
    """Tell whether the sinusoid of the levels `x`, (B, 1|T), is `wanted`, (B, 1|T, 256)."""
    if len(x) != len(wanted) or x.shape[1] not in (1, wanted.shape[1]) or wanted.shape[-1] != 256:
        return False
    x = x.expand(wanted.shape[:2])
    bound = sinusoid_bound(x, wanted.dtype).reshape(wanted.shape)
    off = sinusoid(x.double(), torch.float64) - wanted.double()
    return norm(off) <= norm(bound)


def sines(e: Evidence, level: Level) -> Tensor:
    """Return the sinusoid of a level in float64, in the shape of the tap by token."""
    values = next((x for x in made(e, level) if is_sinusoid_of(x, e.candidate)), made(e, level)[0])
    return sinusoid(values.double(), torch.float64).expand_as(e.reference)
