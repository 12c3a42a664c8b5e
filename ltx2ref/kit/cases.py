"""The kit's cases: whole models, with an expected value for every tap, and the components they consist of.

A component is a part of one of these models. Its inputs and expected outputs are taps of the same recording, so each
stage is judged on its own. This way a port can be built and checked step by step, beginning with the sinusoid.
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

SMALL_GRID = (3, 2, 4)  # latent frames, height, width
MANY_FRAMES_GRID = (16, 1, 1)  # 121 pixel frames


def both_self_masks(case: Case, x: Inputs) -> Inputs:
    """Return the mask of keyframes and the mask of self-attention as one `attention_kwargs`."""
    return {
        "attention_kwargs": keyframes(case, x)["attention_kwargs"] | fractional_self_mask(case, x)["attention_kwargs"]
    }


def stepped_self_mask(case: Case, x: Inputs) -> Inputs:
    """Return a self-attention mask whose values bfloat16 does not round to 1.

    They lie between 1 - 3.3 * 2**-8 and 1 - 0.7 * 2**-8, and bfloat16 rounds them to three different values.
    """
    tokens = x["hidden_states"].shape[1]
    mask = 1 - (case.draw("mask", BATCH, tokens, tokens) * 0.75 + 2) * 2**-8
    return {"attention_kwargs": {"video_self_attention_mask": mask}}


OLDEST = Case("2.0", "kit", grid=SMALL_GRID, extras=(text_masks,))
T2V = Case("2.3", "kit-t2v", grid=SMALL_GRID, extras=(text_masks,))
I2V = Case("2.3", "kit-i2v", grid=SMALL_GRID, extras=(per_token, stg_second))
MANY_FRAMES = Case("2.3", "kit-isolated", grid=MANY_FRAMES_GRID, extras=(isolated,))
NEWEST = Case(
    "2.5",
    "kit",
    INTERLEAVED,
    grid=SMALL_GRID,
    extras=(per_token, cross_timestep, text_masks, coords, stg_second, both_self_masks),
)
# In bfloat16 the mask of the case above rounds to 1, so one component has a case of its own. That case is recorded only
# under exact arithmetic, and its exact tensors are the expected values of native runs as well.
MASKED = Case("2.3", "kit-self-mask", grid=SMALL_GRID, extras=(stepped_self_mask,))
MODELS = (OLDEST, T2V, I2V, MANY_FRAMES, NEWEST)


@dataclass(frozen=True)
class Component:
    """A part of a model as a case of its own.

    `given` and `outputs` are names of taps. `raw` are arguments of the model that the component takes unchanged.
    `weights` are prefixes of the names of its parameters. `arguments` returns whatever else kit.json tells a port.
    """

    operation: str
    name: str
    case: Case
    module: str
    given: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    raw: tuple[str, ...] = ()
    arguments: Callable[[TransformerConfig, Inputs], dict[str, Any]] = field(default=lambda config, x: {})
    chain: tuple[tuple[str, str], ...] = ()  # for each residual, its tap before the component and its tap after it

    @property
    def id(self) -> str:
        """Return the name of the case."""
        return f"{self.operation.replace(' ', '-')}/{self.name}"


def cos_and_sin(name: str) -> tuple[str, ...]:
    """Return the names of the two taps of a RoPE table."""
    return f"{name}.cos", f"{name}.sin"


def below(at: str, *names: str) -> tuple[str, ...]:
    """Return the names of taps inside a module."""
    return tuple(f"{at}.{name}" for name in names)


def positions_component(name: str, case: Case) -> Component:
    """Return the component that computes the bounds of patches from the size of a stream's grid."""
    keys = ("num_frames", "height", "width", "fps") if name == "video" else ("audio_num_frames",)
    return Component(
        operation="positions",
        name=name,
        case=case,
        module=f"{name}_coords",
        given=(),
        outputs=(f"{name}_coords",),
        arguments=lambda config, x: {"batch": len(x["hidden_states"]), **{key: x[key] for key in keys}},
    )


def rope_component(name: str, case: Case) -> Component:
    """Return the component that computes a stream's RoPE tables from the bounds of its patches.

    There are two tables, for self-attention and for the exchange.
    """
    prefix = "audio_" if name.startswith("audio") else ""
    return Component(
        operation="rope",
        name=name,
        case=case,
        module=f"{prefix}rope",
        given=(f"{prefix or 'video_'}coords",),
        outputs=(*cos_and_sin(f"{prefix}rope"), *cos_and_sin(f"cross_attn_{prefix}rope")),
    )


def rotation_component(name: str, case: Case, at: str, table: str) -> Component:
    """Return the component that rotates the normalised queries of one attention by a table."""
    return Component(
        operation="rotation",
        name=name,
        case=case,
        module=f"{at}.q",
        given=(f"{at}.norm_q", *cos_and_sin(table)),
        outputs=(f"{at}.q",),
    )


def adaln_component(name: str) -> Component:
    """Return the component that computes an AdaLN layer from its sinusoid."""
    return Component(
        operation="timestep embedding",
        name=name.replace("_", "-"),
        case=I2V,
        module=name,
        given=(f"{name}.sinusoid",),
        outputs=below(name, "emb", "linear"),
        weights=(f"{name}.",),
    )


def text_projection_component(name: str, prefix: str) -> Component:
    """Return the component that projects a stream's text features to the width of the stream."""
    return Component(
        operation="text projection",
        name=name,
        case=OLDEST,
        module=f"{prefix}caption_projection",
        given=(),
        outputs=(f"{prefix}caption_projection",),
        weights=(f"{prefix}caption_projection.",),
        raw=(f"{prefix}encoder_hidden_states",),
    )


def rows_component(name: str, tap: str, *sources: tuple[str, tuple[int, int], str, tuple[int, int]]) -> Component:
    """Return the component that computes rows of modulation: table + offsets.

    A source is a table, the first and last row taken from it, the AdaLN layer with the offsets, and the offsets' rows.
    """
    described = [
        {"table": f"{BLOCK_0}{table}", "rows": chosen, "offsets": f"{layer}.linear", "offset_rows": of_layer}
        for table, chosen, layer, of_layer in sources
    ]
    return Component(
        operation="rows",
        name=name,
        case=I2V,
        module=f"{BLOCK_0}{tap}",
        given=tuple(f"{layer}.linear" for _, _, layer, _ in sources),
        outputs=(f"{BLOCK_0}{tap}",),
        weights=tuple(f"{BLOCK_0}{table}" for table, *_ in sources),
        arguments=lambda config, x: {"sources": described},
    )


def attention_component(
    name: str, case: Case, at: str, ropes: tuple[str, str] = ("", ""), mask: str = "", raw: tuple[str, ...] = ()
) -> Component:
    """Return the component that computes one attention, from its modulated input to its output projection."""
    gated = case.config.audio.gated_attn if ".audio_a" in at or ".video_to" in at else case.config.video.gated_attn
    context = () if at.endswith("attn1") else (f"{at}.context",)
    tables = tuple(dict.fromkeys(part for name in ropes if name for part in cos_and_sin(name)))
    outputs = (
        below(at, "norm_q", "norm_k", "to_v", "q", "k", "sdpa")
        + (below(at, "to_gate_logits", "gate") if gated else ())
        + (f"{at}.to_out",)
    )
    return Component(
        operation="attention",
        name=name,
        case=case,
        module=at,
        given=(f"{at}.input", *context, *tables),
        outputs=outputs,
        weights=(f"{at}.",),
        raw=(*raw, *((mask,) if mask else ())),
        arguments=lambda config, x: {"ropes": ropes, "mask": mask},
    )


def feed_forward_component(name: str, case: Case, at: str) -> Component:
    """Return the component that computes one feed-forward."""
    return Component(
        operation="feed-forward",
        name=name,
        case=case,
        module=at,
        given=(f"{at}.input",),
        outputs=below(at, "proj", "activation", "output"),
        weights=(f"{at}.",),
    )


def output_component(name: str, case: Case, prefix: str) -> Component:
    """Return the component that computes the end of a stream: the last norm, its modulation and the projection."""
    last = f"transformer_blocks.{case.config.num_layers - 1}.{name}"
    return Component(
        operation="output",
        name=name,
        case=case,
        module=f"{prefix}proj_out",
        given=(last, f"{prefix}time_embed.emb"),
        outputs=(f"{prefix}norm_out", f"{prefix}proj_out.input", f"{prefix}sample"),
        weights=(f"{prefix}scale_shift_table", f"{prefix}proj_out."),
    )


BLOCK_0, BLOCK_1 = "transformer_blocks.0.", "transformer_blocks.1."
V, A = "audio_to_video_attn", "video_to_audio_attn"
SIDES = (("cross_attn_rope", "cross_attn_audio_rope"), ("cross_attn_audio_rope", "cross_attn_rope"))
ALL_ROPES = (*cos_and_sin("rope"), *cos_and_sin("audio_rope"), *cos_and_sin(SIDES[0][0]), *cos_and_sin(SIDES[0][1]))
EXCHANGE_OFFSETS = (
    "av_cross_attn_video_scale_shift.linear",
    "av_cross_attn_audio_scale_shift.linear",
    "av_cross_attn_video_a2v_gate.linear",
    "av_cross_attn_audio_v2a_gate.linear",
)
OFFSETS = ("time_embed.linear", "audio_time_embed.linear", "prompt_adaln.linear", "audio_prompt_adaln.linear")
TABLES = ("video_a2v_cross_attn_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table")

COMPONENTS = (
    positions_component("video", MANY_FRAMES),
    positions_component("audio", MANY_FRAMES),
    rope_component("video", MANY_FRAMES),
    rope_component("audio", MANY_FRAMES),
    rope_component("video-given", NEWEST),
    rope_component("audio-given", NEWEST),
    rotation_component("split", I2V, f"{BLOCK_0}attn1", "rope"),
    rotation_component("interleaved", NEWEST, f"{BLOCK_0}attn1", "rope"),
    rotation_component("exchange", I2V, f"{BLOCK_0}{V}", SIDES[0][0]),
    Component(
        operation="sinusoid",
        name="per-token",
        case=I2V,
        module="time_embed",
        given=(),
        outputs=("time_embed.sinusoid",),
        raw=("timestep",),
    ),
    adaln_component("time_embed"),
    adaln_component("audio_prompt_adaln"),
    Component(
        operation="tokens",
        name="keyframes",
        case=NEWEST,
        module=f"{BLOCK_0}attn1.stream",
        given=(),
        outputs=(f"{BLOCK_0}attn1.stream",),
        weights=("proj_in.", "keyframes_abs_pos_embedding"),
        raw=("hidden_states", "video_keyframes_mask"),
    ),
    text_projection_component("video", ""),
    text_projection_component("audio", "audio_"),
    rows_component("self-attention", "attn1.rows", ("scale_shift_table", (0, 3), "time_embed", (0, 3))),
    rows_component("feed-forward", "ff.rows", ("scale_shift_table", (3, 6), "time_embed", (3, 6))),
    rows_component("text-queries", "attn2.rows", ("scale_shift_table", (6, 9), "time_embed", (6, 9))),
    rows_component("text", "attn2.context_rows", ("prompt_scale_shift_table", (0, 2), "prompt_adaln", (0, 2))),
    rows_component(
        "audio-to-video",
        f"{V}.rows",
        (TABLES[0], (0, 2), "av_cross_attn_video_scale_shift", (0, 2)),
        (TABLES[0], (4, 5), "av_cross_attn_video_a2v_gate", (0, 1)),
    ),
    rows_component(
        "audio-to-video-heard", f"{V}.context_rows", (TABLES[1], (0, 2), "av_cross_attn_audio_scale_shift", (0, 2))
    ),
    rows_component(
        "video-to-audio",
        f"{A}.rows",
        (TABLES[1], (2, 4), "av_cross_attn_audio_scale_shift", (2, 4)),
        (TABLES[1], (4, 5), "av_cross_attn_audio_v2a_gate", (0, 1)),
    ),
    rows_component(
        "video-to-audio-heard", f"{A}.context_rows", (TABLES[0], (2, 4), "av_cross_attn_video_scale_shift", (2, 4))
    ),
    attention_component("video-self", T2V, f"{BLOCK_0}attn1", ("rope", "rope")),
    attention_component("audio-self", T2V, f"{BLOCK_0}audio_attn1", ("audio_rope", "audio_rope")),
    attention_component("video-text", T2V, f"{BLOCK_0}attn2", mask="encoder_attention_mask"),
    attention_component("audio-text", T2V, f"{BLOCK_0}audio_attn2", mask="audio_encoder_attention_mask"),
    attention_component("audio-to-video", T2V, f"{BLOCK_0}{V}", SIDES[0]),
    attention_component("video-to-audio", T2V, f"{BLOCK_0}{A}", SIDES[1]),
    attention_component("no-gates", OLDEST, f"{BLOCK_0}attn1", ("rope", "rope")),
    attention_component("perturbed", I2V, f"{BLOCK_0}attn1", ("rope", "rope"), raw=("perturbation_mask",)),
    attention_component(
        "masked-and-interleaved", NEWEST, f"{BLOCK_1}attn1", ("rope", "rope"), "video_self_attention_mask"
    ),
    attention_component("stepped-mask", MASKED, f"{BLOCK_0}attn1", ("rope", "rope"), "video_self_attention_mask"),
    feed_forward_component("video", T2V, f"{BLOCK_0}ff"),
    feed_forward_component("audio", T2V, f"{BLOCK_0}audio_ff"),
    feed_forward_component("no-biases", NEWEST, f"{BLOCK_0}ff"),
    Component(
        operation="exchange",
        name="both",
        case=I2V,
        module=BLOCK_0,
        given=(f"{BLOCK_0}{V}.stream", f"{BLOCK_0}{A}.stream", *EXCHANGE_OFFSETS, *ALL_ROPES),
        outputs=(
            *below(f"{BLOCK_0}{V}", "input", "context", "to_out"),
            *below(f"{BLOCK_0}{A}", "input", "context", "to_out"),
            f"{BLOCK_0}ff.stream",
            f"{BLOCK_0}audio_ff.stream",
        ),
        weights=(f"{BLOCK_0}{V}.", f"{BLOCK_0}{A}.", *(f"{BLOCK_0}{table}" for table in TABLES)),
        chain=((f"{BLOCK_0}{V}.stream", f"{BLOCK_0}ff.stream"), (f"{BLOCK_0}{A}.stream", f"{BLOCK_0}audio_ff.stream")),
    ),
    Component(
        operation="block",
        name="second",
        case=T2V,
        module=BLOCK_1,
        given=(f"{BLOCK_0}video", f"{BLOCK_0}audio", *OFFSETS, *EXCHANGE_OFFSETS, *ALL_ROPES),
        outputs=(f"{BLOCK_1}video", f"{BLOCK_1}audio"),
        weights=(BLOCK_1,),
        raw=(
            "encoder_hidden_states",
            "audio_encoder_hidden_states",
            "encoder_attention_mask",
            "audio_encoder_attention_mask",
        ),
        arguments=lambda config, x: {"block": 1},
    ),
    output_component("video", I2V, ""),
    output_component("audio", I2V, "audio_"),
)
