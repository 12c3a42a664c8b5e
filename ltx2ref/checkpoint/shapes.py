"""The shapes of a model's parameters, from its config alone and without torch: what the files of the model build."""

from collections.abc import Mapping
from functools import cache

from ..config import TransformerConfig
from ..sizes import Sizes, StreamSizes
from .streams import BOTH_STREAMS, is_needed

Shapes = dict[str, tuple[int, ...]]


@cache
def parameter_shapes(config: TransformerConfig, streams: tuple[str, ...] = BOTH_STREAMS) -> Shapes:
    """Return the shapes of all parameters by name, or of those of one stream."""
    block = block_shapes(config)
    shapes = outer_shapes(config) | qualified({f"transformer_blocks.{i}": block for i in range(config.num_layers)})
    return {name: shape for name, shape in shapes.items() if is_needed(name, streams)}


def outer_shapes(config: Sizes) -> Shapes:
    """Return the shapes of the parameters outside the blocks."""
    v, a = config.video, config.audio
    keyframes = {"keyframes_abs_pos_embedding": (1, v.dim)} if config.use_keyframes_abs_pos_embedding else {}
    tables = keyframes | {"scale_shift_table": (2, v.dim), "audio_scale_shift_table": (2, a.dim)}
    layers = {
        "proj_in": linear_shapes(v.in_channels, v.dim),
        "audio_proj_in": linear_shapes(a.in_channels, a.dim),
        "time_embed": ada_layer_norm_shapes(v.dim, v.num_rows),
        "audio_time_embed": ada_layer_norm_shapes(a.dim, a.num_rows),
        "av_cross_attn_video_scale_shift": ada_layer_norm_shapes(v.dim, 4),
        "av_cross_attn_audio_scale_shift": ada_layer_norm_shapes(a.dim, 4),
        "av_cross_attn_video_a2v_gate": ada_layer_norm_shapes(v.dim, 1),
        "av_cross_attn_audio_v2a_gate": ada_layer_norm_shapes(a.dim, 1),
    }
    if config.use_prompt_embeddings:
        layers["caption_projection"] = text_projection_shapes(config.caption_channels, v.dim)
        layers["audio_caption_projection"] = text_projection_shapes(config.caption_channels, a.dim)
    if config.has_text_tables and config.use_prompt_adaln_single:
        layers["prompt_adaln"] = ada_layer_norm_shapes(v.dim, 2)
        layers["audio_prompt_adaln"] = ada_layer_norm_shapes(a.dim, 2)
    layers["proj_out"] = linear_shapes(v.dim, v.out_channels)
    layers["audio_proj_out"] = linear_shapes(a.dim, a.out_channels)
    return tables | qualified(layers)


def block_shapes(config: Sizes) -> Shapes:
    """Return the shapes of the parameters of one block, by their names inside it."""
    v, a = config.video, config.audio
    tables = {
        "scale_shift_table": (v.num_rows, v.dim),
        "audio_scale_shift_table": (a.num_rows, a.dim),
        "video_a2v_cross_attn_scale_shift_table": (5, v.dim),
        "audio_a2v_cross_attn_scale_shift_table": (5, a.dim),
    }
    if config.has_text_tables:
        tables |= {"prompt_scale_shift_table": (2, v.dim), "audio_prompt_scale_shift_table": (2, a.dim)}
    layers = {
        "attn1": attention_shapes(v, v, heads=v),
        "audio_attn1": attention_shapes(a, a, heads=a),
        "attn2": attention_shapes(v, v, heads=v),
        "audio_attn2": attention_shapes(a, a, heads=a),
        "audio_to_video_attn": attention_shapes(v, a, heads=a),
        "video_to_audio_attn": attention_shapes(a, v, heads=a),
        "ff": feed_forward_shapes(v),
        "audio_ff": feed_forward_shapes(a),
    }
    return tables | qualified(layers)


def qualified(layers: Mapping[str, Shapes]) -> Shapes:
    """Return the shapes of several layers together, by the names of the layers and of their parameters."""
    return {f"{layer}.{name}": shape for layer, shapes in layers.items() for name, shape in shapes.items()}


def linear_shapes(channels: int, out: int, bias: bool = True) -> Shapes:
    """Return the shapes of a Linear layer from some channels to `out`."""
    return {"weight": (out, channels)} | ({"bias": (out,)} if bias else {})


def attention_shapes(x: StreamSizes, context: StreamSizes, heads: StreamSizes) -> Shapes:
    """Return the shapes of an attention of one stream to another, with the heads of one of them."""
    inner = heads.num_heads * heads.head_dim
    layers: dict[str, Shapes] = {
        "to_q": linear_shapes(x.dim, inner),
        "to_k": linear_shapes(context.dim, inner),
        "to_v": linear_shapes(context.dim, inner),
        "norm_q": {"weight": (inner,)},
        "norm_k": {"weight": (inner,)},
        **({"to_gate_logits": linear_shapes(x.dim, heads.num_heads)} if x.gated_attn else {}),
        "to_out.0": linear_shapes(inner, x.dim),
    }
    return qualified(layers)


def feed_forward_shapes(x: StreamSizes) -> Shapes:
    """Return the shapes of a feed-forward layer."""
    return qualified(
        {"net.0.proj": linear_shapes(x.dim, 4 * x.dim, x.ff_bias), "net.2": linear_shapes(4 * x.dim, x.dim, x.ff_bias)}
    )


def ada_layer_norm_shapes(dim: int, num_rows: int) -> Shapes:
    """Return the shapes of the layers from a noise level, which enters as 256 sines and cosines, to rows."""
    return qualified(
        {
            "emb.timestep_embedder.linear_1": linear_shapes(256, dim),
            "emb.timestep_embedder.linear_2": linear_shapes(dim, dim),
            "linear": linear_shapes(dim, num_rows * dim),
        }
    )


def text_projection_shapes(channels: int, dim: int) -> Shapes:
    """Return the shapes of the projection of the text."""
    return qualified({"linear_1": linear_shapes(channels, dim), "linear_2": linear_shapes(dim, dim)})
