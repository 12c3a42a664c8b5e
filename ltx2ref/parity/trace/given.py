"""Read what a port gave: arrays of any library as tensors, under our names, in the reference's shapes.

Nothing here judges. Where a port counts tokens or batch elements otherwise, its taps are compared on what both have,
and a note says so. Everything else that has another shape keeps it, and is reported as such.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arithmetic import NotExact
from ..cases import Inputs
from ..truth import PER_TOKEN, norm
from .sketch import Sketch
from .taps import PHASES, PROJECTED, OutputError, Taps, brief, returned

Given = Mapping[str, Any]
# What others call the outputs.
ALIASES = {
    **dict.fromkeys(("video", "video_sample", "video_output", "output"), "sample"),
    **dict.fromkeys(("audio", "audio_output"), "audio_sample"),
}
OUTPUTS_ALONE = "only the outputs were given: where a difference begins, and whether two cancel, cannot be told"
COORDS = "_coords"
# Taps that follow from others that a port gives, or from the inputs: nothing is lost without them.
DERIVED = (COORDS, ".stream", ".rows", ".context_rows", ".gate")
MOST_OFFSETS = 64  # how many places are tried for tokens among others
SAME = 0.7  # a relative difference below which two tensors show the same tokens; unrelated ones are 1.4 apart


def taps_to_compare(ours: Taps, given: Any, inputs: Inputs, exactly: bool = False) -> tuple[Taps, Given, list[str]]:
    """Return those of our taps that are compared, the candidate's in their shapes, and notes on what is not compared.

    `given` is what the candidate returned. Raises `ValueError` if nothing in it has one of our names.
    """
    given = without_absent(ours, given)
    ours = ours | left_out(ours, given, inputs)
    others = {name: x for name, x in given.items() if name not in ours} if isinstance(given, Mapping) else {}
    theirs = as_taps({name: x for name, x in given.items() if name in ours} if others else given, exactly) | others
    require_common(ours, theirs)
    theirs, cut = fitted(ours, theirs)
    inside = [] if ours.keys() & theirs.keys() - PROJECTED.keys() else [OUTPUTS_ALONE]
    return shown(ours, theirs, inputs), theirs, [*inside, *cut, *suggestions(ours, theirs)]


def without_absent(ours: Taps, given: Any) -> Any:
    """Return what a port gave without the output of an absent stream, which the reference lacks."""
    named = dict(zip(PROJECTED, given, strict=False)) if isinstance(given, tuple | list) else given
    if PROJECTED.keys() <= ours.keys() or not isinstance(named, Mapping):
        return given
    return {name: x for name, x in named.items() if name in ours or (x is not None and 0 not in np.shape(x))}


def left_out(ours: Taps, given: Any, inputs: Inputs) -> Taps:
    """Return the empty output of an absent stream, if a port gave one that is not empty: its shape is wrong."""
    wrong = [name for name in PROJECTED if isinstance(given, Mapping) and name in given and name not in ours]
    return {name: inputs[name.replace("sample", "hidden_states")] for name in wrong}


# ---------------------------------------------------------------- values
def as_taps(given: Any, exactly: bool = False) -> dict[str, Any]:
    """Return what a port returned as taps: a mapping is taken as it is, anything else as the two outputs.

    Tensors of other libraries are converted, unless the port ran under exact arithmetic (`exactly`). Raises
    `OutputError` for values that are not floating-point tensors, and `NotExact` for those that torch did not compute.
    """
    if isinstance(given, Mapping):
        return {name: as_tensor(name, x, exactly) for name, x in given.items()}
    pair = given if isinstance(given, tuple | list) else [getattr(given, name, None) for name in PROJECTED]
    if len(pair) != 2 or any(x is None for x in pair) or isinstance(given, Tensor):
        return returned(given)  # which says what is wrong
    try:
        return {name: as_tensor(name, x, exactly) for name, x in zip(PROJECTED, pair, strict=True)}
    except OutputError:
        returned(given)  # whose error describes both
        raise


def as_tensor(name: str, x: Any, exactly: bool = False) -> Tensor | Sketch:
    """Return one value as a tensor without a history; `name` is for error messages."""
    if isinstance(x, Sketch):
        return x
    found = x if isinstance(x, Tensor) else of_array(x)
    if found is None or not found.is_floating_point() or found.is_meta or found.layout != torch.strided:
        raise OutputError(f"{name}: expected a floating-point tensor, got {brief(x)}")
    if exactly and found is not x:
        raise NotExact(
            f"exact arithmetic cannot see what is computed outside of torch: {name} is returned as {brief(x)}"
        )
    return found.detach()


def of_array(x: Any) -> Tensor | None:
    """Return a copy of an array as a tensor, or None if it is none. Lists are read as float32."""
    ways: dict[str, Callable[[Any], Tensor]] = {
        "__array__": of_numpy,
        "__dlpack__": lambda x: torch.utils.dlpack.from_dlpack(x).clone(),
    }
    if isinstance(x, list | tuple):
        ways = {"__iter__": lambda x: torch.tensor(x, dtype=torch.float64).float()}
    # NumPy first: DLPack of an array with negative strides ends the process.
    for way, convert in ways.items():
        if hasattr(x, way):
            with suppress(BufferError, TypeError, ValueError, RuntimeError):
                return convert(x)
    return None


def of_numpy(x: Any) -> Tensor:
    """Return a copy of anything that NumPy reads as an array; bfloat16 is a dtype of its extensions."""
    array = np.array(x)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


# ---------------------------------------------------------------- names
def renamed_taps(given: Any, names: Mapping[str, str]) -> Any:
    """Return taps under our names, from `names` as {"their name": "our name"}; a star stands for the same text in both.

    Anything but a mapping is returned as it is. Raises `OutputError` if two taps get the same name.
    """
    if not isinstance(given, Mapping) or not names:
        return given
    plain = {theirs: ours for theirs, ours in names.items() if "*" not in theirs}
    patterns = [(re.compile(re.escape(x).replace(r"\*", "(.+?)")), y) for x, y in names.items() if "*" in x]
    taps: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, x in given.items():
        ours = plain.get(name) or next((filled(y, found) for p, y in patterns if (found := p.fullmatch(name))), name)
        if ours in taps:
            raise OutputError(f"names: both {sources[ours]} and {name} would be {ours}")
        taps[ours], sources[ours] = x, name
    return taps


def filled(ours: str, found: re.Match[str]) -> str:
    """Put what the stars of their name stood for in place of the stars in ours, in order."""
    parts = iter(found.groups())
    return re.sub(r"\*", lambda _: next(parts, "*"), ours)


def require_common(reference: Given, candidate: Given) -> None:
    """Raise `ValueError` if the candidate has no tap of the reference, which would leave nothing to compare."""
    if not reference.keys() & candidate.keys():
        got = ", ".join([*candidate][:3]) + " ..." * (len(candidate) > 3) if candidate else "nothing"
        said = [
            f"nothing in common: expected taps or outputs by our names, got {got}",
            *suggestions(reference, candidate),
        ]
        raise ValueError("; ".join(said))


def suggestions(reference: Given, candidate: Given, count: int = 3) -> list[str]:
    """Return, for names that the reference lacks, the names that may be meant."""
    free = [name for name in reference if name not in candidate]
    pairs = (
        (name, likely(name, free)) for name in candidate if name not in reference and name not in PROJECTED.values()
    )
    return [f"you gave `{name}`: did you mean `{meant}`?" for name, meant in pairs if meant][:count]


def likely(name: str, known: Iterable[str]) -> str | None:
    """Return the name that is likely meant by another one, or None."""
    known = [*known]
    if ALIASES.get(name.lower()) in known:
        return ALIASES[name.lower()]
    ends = [x for x in known if x.endswith(f".{name}") or name.endswith(f".{x}")]
    return next(iter(ends if len(ends) == 1 else get_close_matches(name, known, 1, 0.75)), None)


# ---------------------------------------------------------------- shapes
def fitted(reference: Taps, candidate: Given) -> tuple[dict[str, Any], list[str]]:
    """Return the candidate's taps, cut to the tokens and batch elements that the reference has, and notes on it.

    Only what is at the end of the tokens is cut, and never from an output. Where the reference has one noise level for
    each batch element, the same level for each token is judged by the token that is farthest off.
    """
    taps, cut, levels = dict(candidate), [], []
    lengths = {name: x.shape[1] for name in PROJECTED if (x := reference.get(name)) is not None and x.ndim == 3}
    batch = len(reference["sample"]) if "sample" in lengths else 0
    for name, x in candidate.items():
        like = reference.get(name)
        if not isinstance(x, Tensor) or not isinstance(like, Tensor) or x.shape == like.shape or name in PROJECTED:
            continue
        if name.endswith(PER_TOKEN):
            taps[name] = y = by_level(x, like, batch, lengths.get("audio_sample" if hears(name) else "sample", 0))
            levels += [name] if y.shape == like.shape and len(like) == batch else []
            cut += [name] if y.shape == like.shape and len(like) > batch else []
        else:
            taps[name] = y = without_surplus(x, like, 2 if name.endswith(COORDS) else 1)
            cut += [name] if y is not x else []
        if name.endswith((*PHASES, COORDS)) and y.shape[1:] == like.shape[1:] and len(y) == 1:
            taps[name] = y.expand_as(like)  # one table for the whole batch
    return taps, [
        f"{what} ({len(found)} taps, the first is {found[0]})"
        for found, what in (
            (cut, "more tokens than the reference has, at the end: compared without them"),
            (levels, "a noise level for each token, not for each batch element: compared at the worst token"),
        )
        if found
    ]


def by_level(x: Tensor, like: Tensor, batch: int, tokens: int) -> Tensor:
    """Return a tap whose first dimension is B or B * T with as many rows as `like`, if there is a way."""
    rows = x.shape[0]
    if not batch or rows % batch or rows <= len(like) or x.shape[1:] != like.shape[1:]:
        return x
    each = x.unflatten(0, (batch, -1))
    if len(like) > batch:
        return without_surplus(each, like.unflatten(0, (batch, -1)), 1).flatten(0, 1)
    each = each[:, : tokens if 0 < tokens < each.shape[1] else None]
    wide = each.double()
    if norm(wide - wide[:, :1]) > torch.finfo(x.dtype).eps ** 0.5 * norm(wide):
        return x  # the tokens have levels of their own
    apart = (each.double() - like.to(each.device).double()[:, None]).flatten(2).square().sum(-1)
    found: Tensor = each[torch.arange(batch), apart.nan_to_num(torch.inf).argmax(1)]
    return found


def without_surplus(x: Tensor, like: Tensor, tokens: int) -> Tensor:
    """Return `x` without the tokens that `like` lacks, if these are at the end; otherwise return it as it is.

    `tokens` is the dimension. The first tokens have to be those of the reference: nearer to it than any others in a row
    are, and near enough not to be others.
    """
    same = x.ndim == like.ndim and all(
        x.shape[i] in (n, 1 if i == 0 else n) for i, n in enumerate(like.shape) if i != tokens
    )
    surplus = x.shape[tokens] - like.shape[tokens] if same else 0
    if surplus <= 0:
        return x
    true = like.to(x.device).double()
    offsets = [*range(min(surplus, MOST_OFFSETS)), surplus]
    apart = [norm(x.narrow(tokens, i, like.shape[tokens]).double() - true) for i in offsets]
    return x.narrow(tokens, 0, like.shape[tokens]) if apart[0] == min(apart) <= SAME * norm(true) else x


def hears(name: str) -> bool:
    """Tell whether the rows of a tap are those of the audio stream's tokens."""
    layer = re.sub(r"^transformer_blocks\.\d+\.", "", name).partition(".")[0]
    if name.endswith(".context_rows") and layer in ("audio_to_video_attn", "video_to_audio_attn"):
        return layer == "audio_to_video_attn"
    return layer.startswith(
        ("audio_attn", "audio_ff", "audio_time", "audio_prompt", "video_to_audio", "av_cross_attn_audio")
    )


# ---------------------------------------------------------------- what counts
def shown(ours: Taps, theirs: Mapping[str, Any], inputs: Inputs) -> Taps:
    """Return those of our taps that are compared: the candidate has them, or should have them."""
    return {
        name: x
        for name, x in ours.items()
        if name in theirs or not (unused(name, inputs) or name in PROJECTED.values() or name.endswith(DERIVED))
    }


def unused(name: str, inputs: Inputs) -> bool:
    """Tell whether a tap cannot affect the output, so that a candidate may lack it.

    In a self-attention that is perturbed for the whole batch only the values matter, and diffusers skips the rest.
    """
    block, _, tap = name.removeprefix("transformer_blocks.").partition(".")
    mask = inputs.get("perturbation_mask")
    perturbed = int(block) in (inputs.get("spatio_temporal_guidance_blocks") or ()) if block.isdigit() else False
    attention, _, part = tap.partition(".")
    return (
        perturbed
        and (mask is None or not mask.any())
        and attention in ("attn1", "audio_attn1")
        and part in ("norm_q", "norm_k", "q", "k", "sdpa")
    )
