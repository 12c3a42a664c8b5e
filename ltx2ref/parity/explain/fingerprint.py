"""Tell which conventions a candidate follows, from its numbers: each is told by the value that fits best.

Bits are not needed. A value counts if it makes the candidate's tap up to rounding, from the candidate's own taps before
it, and if all others are clearly farther away. Where a case cannot tell, nothing is said.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...interface import attention_bias, exchange_mode, text_attention_mask
from ...rope import apply_rope
from ..judge import dtype_name
from ..trace.taps import ADALN_LAYERS
from ..truth import norm
from .evidence import Evidence, Sides, local_evidence
from .formulas import perturbed
from .levels import Level, levels
from .mistakes import (
    NARROW_DTYPES,
    ROTATED,
    activations,
    attended,
    given,
    gridded,
    heard,
    mask_of,
    mistuned,
    normed,
    own_table,
)
from .patterns import Guess, gap, rounding

CLOSER = 3.0  # the best value is closer to the candidate than any other by this factor
TAPS = 4  # how many taps are looked at for each convention
SWITCHES = {"float32", "model", "linear", "lowest", "log"}  # values that the fields of `Conventions` have
EXCHANGED = re.compile(r"av_cross_attn_.*\.sinusoid")
NOISE = 0.25  # of an epsilon: two values that differ by less cannot be told apart


@dataclass(frozen=True)
class Trait:
    """One convention: the taps that show it, and such a tap under each of its values."""

    name: str
    taps: str  # a regular expression
    ways: Callable[[Evidence], Iterable[Guess]]
    switch: bool = False  # whether it is a field of `Conventions`


def rotated_in(e: Evidence) -> Iterator[Guess]:
    """Yield RoPE tables, queries or keys in float32, and in the model's narrower dtype."""
    narrow = model_dtype(e)
    if narrow.itemsize > 2 or e.config is None:
        return
    if e.part in ("cos", "sin"):  # its own numbers tell whether a table was rounded
        yield "float32", e.candidate.float() * (1 + torch.finfo(narrow).eps / 3)
        yield "model", e.candidate.to(narrow)
        return
    x, table = given(e, f"{e.block}{e.layer}.norm_{e.part}"), ROTATED[e.layer][e.part == "k"]
    cos, sin = (given(e, table + end) for end in (".cos", ".sin"))
    if x is None or cos is None or sin is None:
        return
    x = x.unflatten(-1, (cos.shape[2], -1))
    yield "float32", apply_rope(x, (cos.float(), sin.float()), e.config.rope_type)
    yield "model", apply_rope(x, (cos.to(narrow), sin.to(narrow)), e.config.rope_type)


def positions_in(e: Evidence) -> Iterator[Guess]:
    """Yield coordinates or RoPE tables from positions in float32, and rounded to narrower dtypes."""
    narrow, table = model_dtype(e), own_table(e)
    if e.name == "video_coords":
        if e.inputs and e.inputs.get("video_coords") is None and e.config is not None:
            coords = gridded(e, "video", e.config, e.inputs.get("fps", 24.0)).movedim(2, 1).expand_as(e.reference)
            yield "float32", coords.float()
            yield from ((value, coords.to(dtype)) for value, dtype in other_dtypes(narrow))
    elif table is not None and "video_coords" not in e.candidate_taps:
        yield "float32", table.make(e)
        for value, dtype in other_dtypes(narrow):
            yield value, table.moved(table.coords.to(dtype)).make(e)  # what follows is computed in that dtype
            yield value, table.moved(table.coords.to(dtype).to(table.coords.dtype)).make(e)


def other_dtypes(narrow: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Return dtypes that positions may be rounded to: the model's own is called "model"."""
    return [("model" if dtype == narrow else dtype_name(dtype), dtype) for dtype in NARROW_DTYPES]


def model_dtype(e: Evidence) -> torch.dtype:
    """Return the dtype of the reference's weights."""
    return torch.float32 if e.model is None else next(e.model.parameters()).dtype


def frequencies_in(e: Evidence) -> Iterator[Guess]:
    """Yield RoPE tables of float64 and of float32 frequencies."""
    table = own_table(e)
    if table is None:
        return
    names = ("float64", "float32") if table.config.rope_double_precision else ("float32", "float64")
    other = next(x for what, x in mistuned(table) if what.startswith("frequencies computed in "))
    yield names[0], table.make(e)
    yield names[1], other.make(e)


def masked_by(e: Evidence) -> Iterator[Guess]:
    """Yield text attention or self-attention under each bias for what is masked."""
    q, k, v = (given(e, f"{e.block}{e.layer}.{name}") for name in ("q", "k", "to_v"))
    mask, text = mask_of(e, e.layer), e.layer.endswith("attn2")
    if mask is None or q is None or k is None or v is None or (text and mask.ndim == 3):
        return
    heads, dtype = (q, k, v.unflatten(-1, k.shape[2:])), e.reference.dtype
    for kind in ("linear", "lowest") if text else ("linear", "log"):
        made = text_attention_mask(mask, dtype, kind) if text else attention_bias(mask, dtype, kind)[:, None]
        yield kind, attended(heads, made)
    yield "ignored", attended(heads, None)


def guided_by(e: Evidence) -> Iterator[Guess]:
    """Yield the result of a perturbed self-attention: not perturbed, its own values, or nothing."""
    keep = (e.inputs or {}).get("perturbation_mask")
    out, v, gate = (given(e, f"{e.block}{e.layer}.{name}") for name in ("sdpa", "to_v", "gate"))
    if not perturbed(e) or out is None or v is None or e.model is None:
        return
    last: Any = e.model.get_submodule(f"{e.block}{e.layer}.to_out.0")
    values = v.unflatten(-1, out.shape[2:])
    kept = torch.zeros(()) if keep is None else keep.reshape(-1, 1, 1, 1)

    def result(x: Tensor) -> Tensor:
        x = (x if gate is None else x * gate[..., None]).flatten(2)
        return F.linear(x.double(), last.weight.double(), last.bias.double())

    yield "values", result(torch.lerp(values.float(), out.float(), kept.float()))
    yield "ignored", result(out)
    yield "removed", result(out * kept.to(out.dtype))


def ordered(e: Evidence) -> Iterator[Guess]:
    """Yield the context of an exchange from the other stream before and after its own change."""
    for what, guess in heard(e):
        yield ("both directions at once" if "before" in what else "one direction after the other"), guess


def epsilons(e: Evidence) -> Iterator[Guess]:
    """Yield normalised queries or keys under each epsilon."""
    for what, guess in normed(e):
        yield what.removeprefix("an epsilon of ") or "1e-06", guess


def activated(e: Evidence) -> Iterator[Guess]:
    """Yield the activation under each function."""
    yield from ((what.removeprefix("the "), guess) for what, guess in activations(e))


TRAITS = (
    Trait("rotation_dtype", r"^rope\.cos$|\.(attn1|audio_attn1)\.[qk]$", rotated_in, switch=True),
    Trait("positions_dtype", r"^video_coords$|^rope\.(cos|sin)$", positions_in, switch=True),
    Trait("RoPE frequencies", r"rope\.(cos|sin)$", frequencies_in),
    Trait("text_mask_bias", r"\.(audio_)?attn2\.sdpa$", masked_by, switch=True),
    Trait("self_mask_bias", r"\.attn1\.sdpa$", masked_by, switch=True),
    Trait("guidance", r"\.(audio_)?attn1\.to_out$", guided_by),
    Trait("order of the exchange", r"\.(video_to_audio_attn|audio_to_video_attn)\.context$", ordered),
    Trait("q/k norm eps", r"\.norm_[qk]$", epsilons),
    Trait("activation", r"ff\.activation$", activated),
)


def followed_conventions(sides: Sides) -> dict[str, str]:
    """Return the value of each convention that the candidate's taps tell."""
    found = noise_conventions(sides)
    for trait in TRAITS:
        taps = [x for x in sides.ours if re.search(trait.taps, x) and isinstance(sides.theirs.get(x), Tensor)]
        votes: set[str] | None = None
        for name in taps[:TAPS]:
            e = local_evidence(name, sides)
            fitting = None if e is None else vote(e, [*trait.ways(e)])
            if fitting is not None:
                votes = fitting if votes is None else votes & fitting
        if votes and len(votes) == 1:
            found[trait.name] = votes.pop()
    return found


def vote(e: Evidence, values: list[Guess]) -> set[str] | None:
    """Return the values that one tap leaves possible; None if it tells nothing."""
    if len(values) < 2:
        return None
    off: dict[str, float] = {}
    for what, x in values:
        if x.numel() == e.candidate.numel():
            x = x.reshape(e.candidate.shape)
            far = gap(x if e.name.endswith("_coords") else x.to(e.candidate.dtype), e.candidate)
            off[what] = min(far, off.get(what, far))
    best = min(off, key=lambda what: off[what], default=None)
    if best is None or not off[best] <= rounding(e) * norm(e.candidate):
        return None
    dtype = torch.float32 if e.name.endswith("_coords") else e.candidate.dtype  # coordinates are few and exact
    least = NOISE * torch.finfo(dtype).eps * norm(e.candidate)
    found = {what for what, far in off.items() if far <= max(CLOSER * off[best], least)}
    return found if len(found) < len(off) else None


def noise_conventions(sides: Sides) -> dict[str, str]:
    """Return which noise levels drive the exchange, and what else is done to noise levels."""
    inputs, made = sides.inputs, dict[str, Level]()
    for layer in ADALN_LAYERS:
        e = local_evidence(f"{layer}.sinusoid", sides)
        level = None if e is None else levels(e)[1]
        if level is not None:
            made[layer] = level
    found: dict[str, str] = {}
    alone = ("audio_time_embed", "audio_prompt_adaln")
    own_levels = inputs.get("audio_timestep") is not None or inputs.get("audio_sigma") is not None
    exchanged = made.get("av_cross_attn_video_a2v_gate")
    shared = own_levels and (
        any("audio" not in made[name].source for name in alone if name in made)
        or (exchanged is not None and exchanged.source == "sigma")  # video's own, where only audio's can be meant
    )
    parts = [
        driver(made, inputs, shared, *layers)
        for layers in (
            ("av_cross_attn_video_scale_shift", "av_cross_attn_audio_scale_shift"),
            ("av_cross_attn_video_a2v_gate", "av_cross_attn_audio_v2a_gate"),
        )
    ]
    modes = {("own", "own"): "own", ("other", "other"): "other", ("own", "other"): "other_gate"}
    mode = next((mode for drivers, mode in modes.items() if [*drivers] == parts), None)
    if mode is not None:
        reductions = {level.reduction for name, level in made.items() if "av_cross" in name and level.reduction}
        found["exchange"] = ", ".join([mode, *(x.format("level") for x in sorted(reductions))])
    if shared:
        found["noise levels"] = "one for both streams"
    if roundings := {level.rounding for level in made.values() if level.rounding}:
        found["noise level"] = ", ".join(sorted(roundings))
    if factors := {level.factor for name, level in made.items() if "gate" in name and level.factor != 1}:
        found["gate level"] = ", ".join(f"* {factor:g}" for factor in sorted(factors))
    return found


def driver(made: Mapping[str, Level], inputs: Mapping[str, Any], shared: bool, video: str, audio: str) -> str | None:
    """Return "own" or "other": whose noise level drives both directions. None if this case cannot tell.

    `shared` says that both streams have video's sigma.
    """
    found = {"own", "other"}
    for layer, own, other in ((video, "timestep", "audio_sigma"), (audio, "audio_timestep", "sigma")):
        if layer in made:
            names = set(re.findall(r"\w+", made[layer].source))
            own = own if inputs.get(own) is not None else own.removeprefix("audio_")
            other = "sigma" if shared or inputs.get(other) is None else other
            here = {what for what, name in (("own", own), ("other", other)) if name in names}
            found &= here or {"own", "other"} if shared else here
    return found.pop() if len(found) == 1 and {video, audio} & made.keys() else None


def switched_at(found: Mapping[str, str], sides: Sides, names: Sequence[str], what: str) -> str | None:
    """Return the switch of the reference that explains a cause, such as "exchange = 'other'", or None.

    `found` are the candidate's conventions, `names` the taps of the cause, and `what` what it looks like.
    """
    own = sides.model.conventions
    mode = exchange_mode(own, bool(sides.inputs.get("use_cross_timestep")))
    exchange, of_levels = found.get("exchange", mode), what.startswith("the noise level")
    if exchange != mode and "," not in exchange and of_levels and all(EXCHANGED.fullmatch(name) for name in names):
        return f"exchange = {exchange!r}"
    changed = (x for x in TRAITS if x.switch and found.get(x.name) in SWITCHES - {getattr(own, x.name)})
    why = next((x for x in changed if all(re.search(x.taps, name) for name in names)), None)
    return None if why is None else f"{why.name} = {found[why.name]!r}"
