"""What the kit holds: whole models at every tap, and the components that they are made of.

A component is a part of one of these models. What it is given and what is expected are taps of the same recording, so
that each stage is judged on its own: a port can be built, and checked, from the sinusoid up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config import TransformerConfig
from ..parity.cases import (
    BATCH,
    INTERLEAVED,
    Case,
    Inputs,
    coords,
    cross_timestep,
    fractional_self_mask,
    isolated,
    keyframes,
    per_token,
    stg_second,
    text_masks,
)

GRID, LONG_GRID = (3, 2, 4), (16, 1, 1)  # the second: 121 pixel frames


def both_self_masks(case: Case, x: Inputs) -> Inputs:
    """The keyframes' mask and the self-attention's in one `attention_kwargs`."""
    return {
        "attention_kwargs": keyframes(case, x)["attention_kwargs"] | fractional_self_mask(case, x)["attention_kwargs"]
    }


def stepped_self_mask(case: Case, x: Inputs) -> Inputs:
    """From 1 - 3.3 * 2**-8 to 1 - 0.7 * 2**-8: bfloat16 makes three steps of it, and rounds none to 1."""
    tokens = x["hidden_states"].shape[1]
    mask = 1 - (case.draw("mask", BATCH, tokens, tokens) * 0.75 + 2) * 2**-8
    return {"attention_kwargs": {"video_self_attention_mask": mask}}


PLAIN = Case("2.0", "kit", grid=GRID, extras=(text_masks,))
T2V = Case("2.3", "kit-t2v", grid=GRID, extras=(text_masks,))
I2V = Case("2.3", "kit-i2v", grid=GRID, extras=(per_token, stg_second))
LONG = Case("2.3", "kit-isolated", grid=LONG_GRID, extras=(isolated,))
NEWEST = Case(
    "2.5",
    "kit",
    INTERLEAVED,
    grid=GRID,
    extras=(per_token, cross_timestep, text_masks, coords, stg_second, both_self_masks),
)
# In bfloat16 the mask of the case above rounds to 1. This one is recorded under exact arithmetic alone, and no model of
# the kit: a component comes from it, whose expected tensors are the exact ones on the native level, too.
MASKED = Case("2.3", "kit-self-mask", grid=GRID, extras=(stepped_self_mask,))
MODELS = (PLAIN, T2V, I2V, LONG, NEWEST)


@dataclass(frozen=True)
class Component:
    """`given` and `outputs` are taps, `raw` are arguments of the model, `weights` begin with one of these."""

    operation: str
    name: str
    case: Case
    module: str
    given: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    arguments: Callable[[TransformerConfig, Inputs], dict[str, Any]] = field(default=lambda config, x: {})
    chain: tuple[tuple[str, str], ...] = ()  # the residual of a stream that is given, and as it leaves

    @property
    def id(self) -> str:
        return f"{self.operation.replace(' ', '-')}/{self.name}"


def pair(name: str) -> tuple[str, ...]:
    return f"{name}.cos", f"{name}.sin"


def below(at: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{at}.{name}" for name in names)


def positions(name: str, case: Case) -> Component:
    keys = ("num_frames", "height", "width", "fps") if name == "video" else ("audio_num_frames",)
    return Component(
        "positions",
        name,
        case,
        f"{name}_coords",
        (),
        (f"{name}_coords",),
        arguments=lambda config, x: {"batch": len(x["hidden_states"]), **{key: x[key] for key in keys}},
    )


def rope(name: str, case: Case) -> Component:
    prefix = "audio_" if name.startswith("audio") else ""
    return Component(
        "rope",
        name,
        case,
        f"{prefix}rope",
        (f"{prefix or 'video_'}coords",),
        (*pair(f"{prefix}rope"), *pair(f"cross_attn_{prefix}rope")),
    )


def rotation(name: str, case: Case, at: str, table: str) -> Component:
    return Component("rotation", name, case, f"{at}.q", (f"{at}.norm_q", *pair(table)), (f"{at}.q",))


def adaln(name: str) -> Component:
    return Component(
        "timestep embedding",
        name.replace("_", "-"),
        I2V,
        name,
        (f"{name}.sinusoid",),
        below(name, "emb", "linear"),
        (f"{name}.",),
    )


def rows(name: str, tap: str, *sources: tuple[str, tuple[int, int], str, tuple[int, int]]) -> Component:
    """`sources`: a table, its rows, the layer whose offsets are added, and which of these."""
    described = [
        {"table": f"{BLOCK}{table}", "rows": chosen, "offsets": f"{layer}.linear", "offset_rows": of_layer}
        for table, chosen, layer, of_layer in sources
    ]
    return Component(
        "rows",
        name,
        I2V,
        f"{BLOCK}{tap}",
        tuple(f"{layer}.linear" for _, _, layer, _ in sources),
        (f"{BLOCK}{tap}",),
        tuple(f"{BLOCK}{table}" for table, *_ in sources),
        arguments=lambda config, x: {"sources": described},
    )


def attention(
    name: str, case: Case, at: str, ropes: tuple[str, str] = ("", ""), mask: str = "", raw: tuple[str, ...] = ()
) -> Component:
    gated = case.config.audio.gated_attn if ".audio_a" in at or ".video_to" in at else case.config.video.gated_attn
    context = () if at.endswith("attn1") else (f"{at}.context",)
    tables = tuple(dict.fromkeys(part for name in ropes if name for part in pair(name)))
    outputs = (
        below(at, "norm_q", "norm_k", "to_v", "q", "k", "sdpa")
        + (below(at, "to_gate_logits", "gate") if gated else ())
        + (f"{at}.to_out",)
    )
    return Component(
        "attention",
        name,
        case,
        at,
        (f"{at}.input", *context, *tables),
        outputs,
        (f"{at}.",),
        (*raw, *((mask,) if mask else ())),
        lambda config, x: {"ropes": ropes, "mask": mask},
    )


def feed_forward(name: str, case: Case, at: str) -> Component:
    return Component(
        "feed-forward", name, case, at, (f"{at}.input",), below(at, "proj", "activation", "output"), (f"{at}.",)
    )


def output(name: str, case: Case, prefix: str) -> Component:
    last = f"transformer_blocks.{case.config.num_layers - 1}.{name}"
    return Component(
        "output",
        name,
        case,
        f"{prefix}proj_out",
        (last, f"{prefix}time_embed.emb"),
        (f"{prefix}norm_out", f"{prefix}proj_out.input", f"{prefix}sample"),
        (f"{prefix}scale_shift_table", f"{prefix}proj_out."),
    )


BLOCK, SECOND = "transformer_blocks.0.", "transformer_blocks.1."
V, A = "audio_to_video_attn", "video_to_audio_attn"
SIDES = (("cross_attn_rope", "cross_attn_audio_rope"), ("cross_attn_audio_rope", "cross_attn_rope"))
ALL_ROPES = (*pair("rope"), *pair("audio_rope"), *pair(SIDES[0][0]), *pair(SIDES[0][1]))
EXCHANGE_OFFSETS = (
    "av_cross_attn_video_scale_shift.linear",
    "av_cross_attn_audio_scale_shift.linear",
    "av_cross_attn_video_a2v_gate.linear",
    "av_cross_attn_audio_v2a_gate.linear",
)
OFFSETS = ("time_embed.linear", "audio_time_embed.linear", "prompt_adaln.linear", "audio_prompt_adaln.linear")
TABLES = ("video_a2v_cross_attn_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table")

COMPONENTS = (
    positions("video", LONG),
    positions("audio", LONG),
    rope("video", LONG),
    rope("audio", LONG),
    rope("video-given", NEWEST),
    rope("audio-given", NEWEST),
    rotation("split", I2V, f"{BLOCK}attn1", "rope"),
    rotation("interleaved", NEWEST, f"{BLOCK}attn1", "rope"),
    rotation("exchange", I2V, f"{BLOCK}{V}", SIDES[0][0]),
    Component("sinusoid", "per-token", I2V, "time_embed", (), ("time_embed.sinusoid",), raw=("timestep",)),
    adaln("time_embed"),
    adaln("audio_prompt_adaln"),
    Component(
        "tokens",
        "keyframes",
        NEWEST,
        f"{BLOCK}attn1.stream",
        (),
        (f"{BLOCK}attn1.stream",),
        ("proj_in.", "keyframes_abs_pos_embedding"),
        ("hidden_states", "video_keyframes_mask"),
    ),
    Component(
        "text projection",
        "video",
        PLAIN,
        "caption_projection",
        (),
        ("caption_projection",),
        ("caption_projection.",),
        ("encoder_hidden_states",),
    ),
    Component(
        "text projection",
        "audio",
        PLAIN,
        "audio_caption_projection",
        (),
        ("audio_caption_projection",),
        ("audio_caption_projection.",),
        ("audio_encoder_hidden_states",),
    ),
    rows("self-attention", "attn1.rows", ("scale_shift_table", (0, 3), "time_embed", (0, 3))),
    rows("feed-forward", "ff.rows", ("scale_shift_table", (3, 6), "time_embed", (3, 6))),
    rows("text-queries", "attn2.rows", ("scale_shift_table", (6, 9), "time_embed", (6, 9))),
    rows("text", "attn2.context_rows", ("prompt_scale_shift_table", (0, 2), "prompt_adaln", (0, 2))),
    rows(
        "audio-to-video",
        f"{V}.rows",
        (TABLES[0], (0, 2), "av_cross_attn_video_scale_shift", (0, 2)),
        (TABLES[0], (4, 5), "av_cross_attn_video_a2v_gate", (0, 1)),
    ),
    rows("audio-to-video-heard", f"{V}.context_rows", (TABLES[1], (0, 2), "av_cross_attn_audio_scale_shift", (0, 2))),
    rows(
        "video-to-audio",
        f"{A}.rows",
        (TABLES[1], (2, 4), "av_cross_attn_audio_scale_shift", (2, 4)),
        (TABLES[1], (4, 5), "av_cross_attn_audio_v2a_gate", (0, 1)),
    ),
    rows("video-to-audio-heard", f"{A}.context_rows", (TABLES[0], (2, 4), "av_cross_attn_video_scale_shift", (2, 4))),
    attention("video-self", T2V, f"{BLOCK}attn1", ("rope", "rope")),
    attention("audio-self", T2V, f"{BLOCK}audio_attn1", ("audio_rope", "audio_rope")),
    attention("video-text", T2V, f"{BLOCK}attn2", mask="encoder_attention_mask"),
    attention("audio-text", T2V, f"{BLOCK}audio_attn2", mask="audio_encoder_attention_mask"),
    attention("audio-to-video", T2V, f"{BLOCK}{V}", SIDES[0]),
    attention("video-to-audio", T2V, f"{BLOCK}{A}", SIDES[1]),
    attention("no-gates", PLAIN, f"{BLOCK}attn1", ("rope", "rope")),
    attention("perturbed", I2V, f"{BLOCK}attn1", ("rope", "rope"), raw=("perturbation_mask",)),
    attention("masked-and-interleaved", NEWEST, f"{SECOND}attn1", ("rope", "rope"), "video_self_attention_mask"),
    attention("stepped-mask", MASKED, f"{BLOCK}attn1", ("rope", "rope"), "video_self_attention_mask"),
    feed_forward("video", T2V, f"{BLOCK}ff"),
    feed_forward("audio", T2V, f"{BLOCK}audio_ff"),
    feed_forward("no-biases", NEWEST, f"{BLOCK}ff"),
    Component(
        "exchange",
        "both",
        I2V,
        BLOCK,
        (f"{BLOCK}{V}.stream", f"{BLOCK}{A}.stream", *EXCHANGE_OFFSETS, *ALL_ROPES),
        (
            *below(f"{BLOCK}{V}", "input", "context", "to_out"),
            *below(f"{BLOCK}{A}", "input", "context", "to_out"),
            f"{BLOCK}ff.stream",
            f"{BLOCK}audio_ff.stream",
        ),
        (f"{BLOCK}{V}.", f"{BLOCK}{A}.", *(f"{BLOCK}{table}" for table in TABLES)),
        chain=((f"{BLOCK}{V}.stream", f"{BLOCK}ff.stream"), (f"{BLOCK}{A}.stream", f"{BLOCK}audio_ff.stream")),
    ),
    Component(
        "block",
        "second",
        T2V,
        SECOND,
        (f"{BLOCK}video", f"{BLOCK}audio", *OFFSETS, *EXCHANGE_OFFSETS, *ALL_ROPES),
        (f"{SECOND}video", f"{SECOND}audio"),
        (SECOND,),
        (
            "encoder_hidden_states",
            "audio_encoder_hidden_states",
            "encoder_attention_mask",
            "audio_encoder_attention_mask",
        ),
        lambda config, x: {"block": 1},
    ),
    output("video", I2V, ""),
    output("audio", I2V, "audio_"),
)
