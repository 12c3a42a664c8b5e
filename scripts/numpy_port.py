"""Compute the LTX-2 forward in NumPy, as a second, independent implementation that reads the conformance kit.

    ltx2ref kit export kit
    python scripts/numpy_port.py kit results                  float64, which rounds nothing
    ltx2ref kit check results
    python scripts/numpy_port.py kit results --level exact    rounds as diffusers does, to the bit
    ltx2ref kit check results --level exact

It was written from the equations, independently of the package, and imports neither the package nor torch. It is meant
to be read, and to be a pattern for ports to other languages: attention runs head by head, softmax is spelled out,
nothing is fused, and every array is float64, from the sinusoid and the rotary angles to the output. Parameter names and
config keys are those of diffusers.

On the exact level the same equations are rounded where diffusers has an operation that rounds: `r` stands for the
model's dtype, and `r32` for float32, in which positions, sinusoids, rotations and the insides of an RMS norm are
computed whatever the model's dtype is. docs/arithmetic.md defines both, and the order of sums. On the native level `r`
and `r32` do nothing.

    sub-layer    x + gate * f(rms(x) * (1 + scale) + shift)     (shift, scale, gate) = table + AdaLN(timestep)
    block        self-attention, text attention, exchange between the streams, feed-forward
    attention    q = rms(Wq x) * g, k = rms(Wk c) * g, both rotated; per head softmax(q k^T / sqrt(d) + b) v
                 times 2 * sigmoid(the head's logit of x); heads joined; Wo
    output       Wo(layer_norm(x) * (1 + scale) + shift)        (shift, scale) = table + timestep embedding

Array axes: B batch, T tokens, S text tokens, D width, H heads, K modulation rows, P position axes, R = head_dim / 2.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray
Weights = dict[str, Array]
Rope = tuple[Array, Array]  # cosines and sines (B, T, H, R)
EPS = 1e-6
TAPS: dict[str, Array] = {}  # what the last operation computed, by the kit's names


def tap(name: str, x: Array) -> Array:
    TAPS[name] = x
    return x


@dataclass
class Stream:
    """Hold one stream: its tokens `x`, which the blocks change, and what stays the same for all blocks."""

    prefix: str  # before its parameter names: "" (video) or "audio_"
    x: Array  # (B, T, D)
    text: Array  # (B, S, D)
    heads: int
    modulates_queries: bool  # text attention: three more rows, for its queries and its gate
    modulates_text: bool  # text attention: two rows for its keys and values
    offsets: Array  # (B, 1|T, 6|9, D), from the timestep
    embedding: Array  # (B, 1|T, D), from the timestep
    exchange_offsets: Array  # (B, 1|T, 5, D)
    text_offsets: Array | None  # (B, 1, 2, D), from sigma
    rope: Rope  # for self-attention
    time_rope: Rope  # for the exchange
    text_bias: Array | None  # (B, 1|T, S)
    self_bias: Array | None  # (B, T, T)


def default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def f64(x: Any) -> Array:
    return np.asarray(x, dtype=np.float64)


# ---------------------------------------------------------------- arithmetic
class Numbers:
    """Name the dtype that operations round to."""

    dtype = "float64"  # the model's: float32, bfloat16 or float16 on the exact level


def rounded(x: Array, dtype: str) -> Array:
    """Round to nearest, ties to even; to 16 bits by way of float32."""
    if dtype == "float64":
        return f64(x)
    with np.errstate(over="ignore"):
        single = f64(x).astype(np.float32)
        if dtype == "bfloat16":
            bits = single.view(np.uint32)
            upper = (bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)
            single = np.where(np.isnan(single), single, upper.astype(np.uint32).view(np.float32))
        return f64(single.astype(np.float16) if dtype == "float16" else single)


def r(x: Array) -> Array:
    return rounded(x, Numbers.dtype)


def r32(x: Array) -> Array:
    return rounded(x, "float64" if Numbers.dtype == "float64" else "float32")


def fold(x: Array) -> Array:
    """Sum over the last axis: the last half is added onto the first half, until one term is left."""
    while (n := x.shape[-1]) > 1:
        half = n // 2
        x = np.concatenate([x[..., :half] + x[..., n - half :], x[..., half : n - half]], axis=-1)
    return x[..., 0]


def matmul(a: Array, b: Array) -> Array:
    """Multiply (..., M, K) by (N, K), both with K last."""
    return fold(a[..., :, None, :] * b)


def linear(w: Weights, name: str, x: Array) -> Array:
    return r(matmul(x, w[name + ".weight"]) + w.get(name + ".bias", 0.0))  # some configs have no bias


def rms_norm(x: Array, weight: Array | None = None) -> Array:
    mean = r32(fold(r32(x * x)) / x.shape[-1])[..., None]
    y = r32(x * r32(1.0 / np.sqrt(r32(mean + EPS))))
    return r(y if weight is None else r32(y * weight))


def layer_norm(x: Array) -> Array:
    d = x - (fold(x) / x.shape[-1])[..., None]
    return r(d / np.sqrt(fold(d * d) / x.shape[-1] + EPS)[..., None])


def modulate(x: Array, scale: Array, shift: Array) -> Array:
    return r(r(x * r(1.0 + scale)) + shift)


def residual(x: Array, gate: Array, y: Array) -> Array:
    return r(x + r(gate * y))


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    weights: Array = np.where(x >= 0, 1.0, e) / (1.0 + e)
    return weights


def silu(x: Array) -> Array:
    return r(x * sigmoid(x))


def gelu(x: Array) -> Array:
    return r(x * sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - np.maximum(np.max(scores, axis=-1, keepdims=True), -1e300))
    weights: Array = powers / np.maximum(fold(powers)[..., None], 1e-300)  # 0 where nothing is kept
    return weights


def linspace(count: int) -> Array:
    """Count from 0 to 1, from both ends."""
    i, step = np.arange(count), 1.0 / max(count - 1, 1)
    return np.where(i < max(count // 2, 1), step * i, 1.0 - step * (count - 1 - i))


# ---------------------------------------------------------------- the model
def video_positions(config: dict[str, Any], frames: int, height: int, width: int, fps: float) -> Array:
    """Return the bounds of the patches (3, T, 2): seconds and pixels, in (frame, height, width) order."""
    sizes, axes = (config["patch_size_t"], config["patch_size"], config["patch_size"]), []
    for axis, count in enumerate((frames, height, width)):
        start, scale = np.arange(0.0, count, sizes[axis]), config["vae_scale_factors"][axis]
        bounds = np.stack([start, start + sizes[axis]], axis=-1) * scale
        if axis == 0:  # causal: the first latent frame stands for fewer frames
            bounds = r32(np.maximum(bounds + config["causal_offset"] - scale, 0.0) / fps)
        axes.append(bounds)
    index = np.meshgrid(*(np.arange(len(bounds)) for bounds in axes), indexing="ij")
    return np.stack([bounds[i.reshape(-1)] for bounds, i in zip(axes, index, strict=True)])


def audio_positions(config: dict[str, Any], frames: int) -> Array:
    """Return the bounds of the patches (1, T, 2) in seconds."""
    size, scale = config["audio_patch_size_t"], config["audio_scale_factor"]
    start = np.arange(0.0, frames, size)
    mel = np.maximum(np.stack([start, start + size], axis=-1) * scale + config["causal_offset"] - scale, 0.0)
    return r32(r32(mel * config["audio_hop_length"]) / config["audio_sampling_rate"])[None]


def middles(coords: Array) -> Array:
    """Return the middles (B, P, T) of bounds (B, P, T, 2), and points (B, P, T) as they are."""
    return coords if coords.ndim == 3 else r32(r32(coords[..., 0] + coords[..., 1]) / 2.0)


def rope_tables(config: dict[str, Any], name: str, middle: Array, maxima: list[float], width: int) -> Rope:
    """Turn positions (B, P, T) into cosines and sines (B, T, H, R) of D/2 angles: each head gets its own R of them."""
    batch, axes, tokens = middle.shape
    count = width // (2 * axes)
    f = f64 if config["rope_double_precision"] else r32
    frequencies = r32(f(f(f(config["rope_theta"] ** f(linspace(count))) * math.pi) / 2.0))
    angles = np.zeros((batch, tokens, width // 2))
    for p in range(axes):
        u = r32(r32(middle[:, p, :, None] / maxima[p]) * 2.0 - 1.0)
        first = width // 2 - count * axes + p  # what is left over stays zero, on the left
        angles[:, :, first::axes] = r32(u * frequencies)
    by_head: Array = angles.reshape(batch, tokens, config["num_attention_heads"], -1)  # the audio has as many
    return tap(name + ".cos", r32(np.cos(by_head))), tap(name + ".sin", r32(np.sin(by_head)))


def rotate(x: Array, rope: Rope, layout: str) -> Array:
    """Rotate x (B, T, H, 2R): "split" turns channels (i, i + R) of a head together, "interleaved" (2i, 2i + 1)."""
    (cos, sin), half, split = rope, x.shape[-1] // 2, layout == "split"
    first, second = (slice(0, half), slice(half, None)) if split else (slice(0, None, 2), slice(1, None, 2))
    a, b, out = x[..., first], x[..., second], np.empty_like(x)
    a_sin, b_sin = (a * sin, b * sin) if split else (r32(a * sin), r32(b * sin))  # "split" adds and multiplies in one
    out[..., first] = r32(r32(a * cos) - b_sin)
    out[..., second] = r32(r32(b * cos) + a_sin)
    return r(out)


def attention(
    w: Weights, name: str, x: Array, context: Array, heads: int, layout: str = "", x_rope: Rope | None = None,
    context_rope: Rope | None = None, bias: Array | None = None, keep: Array | None = None,
) -> Array:  # fmt: skip
    """Attend from x (B, T, .) to context (B, S, .). keep (B,): 1 = attention, 0 = v instead (self-attention only)."""
    q = tap(name + ".norm_q", rms_norm(linear(w, name + ".to_q", x), w[name + ".norm_q.weight"]))  # over all heads
    k = tap(name + ".norm_k", rms_norm(linear(w, name + ".to_k", context), w[name + ".norm_k.weight"]))
    v = tap(name + ".to_v", linear(w, name + ".to_v", context))
    q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in (q, k, v))
    if x_rope is not None and context_rope is not None:
        q, k = rotate(q, x_rope, layout), rotate(k, context_rope, layout)
    q, k, result = tap(name + ".q", q), tap(name + ".k", k), np.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(heads):  # from the scores to the result nothing is rounded
            scores = matmul(q[b, :, h], k[b, :, h]) * (1.0 / math.sqrt(q.shape[-1]))
            result[b, :, h] = r(matmul(softmax(scores + (0.0 if bias is None else bias[b])), v[b, :, h].T))
    tap(name + ".sdpa", result)
    if keep is not None:
        result = r(v + keep[:, None, None, None] * (result - v))
    if name + ".to_gate_logits.weight" in w:
        logits = tap(name + ".to_gate_logits", linear(w, name + ".to_gate_logits", x))
        result = r(result * tap(name + ".gate", r(2.0 * r(sigmoid(logits))))[..., None])
    return tap(name + ".to_out", linear(w, name + ".to_out.0", result.reshape(*result.shape[:2], -1)))


def multiplicative_bias(mask: Array) -> Array:
    return r(r(1.0 - r(mask)) * -10000.0)


def text_mask_bias(mask: Array | None) -> Array | None:
    """Return the bias: a mask (B, S) is multiplicative; (B, 1|T, S) is a bias if floating, "keep" if bool."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return multiplicative_bias(mask)[:, None, :]
    if mask.dtype == np.bool_:
        return np.where(mask, 0.0, -np.inf)
    if not np.issubdtype(mask.dtype, np.floating):
        raise ValueError(f"text mask of 3 dimensions and dtype {mask.dtype}")
    return r(mask)


def sinusoid(timestep: Array) -> Array:
    frequencies = r32(np.exp(r32(-math.log(10000.0) * np.arange(128)) / 128.0))
    phases = r32(r32(timestep).reshape(len(timestep), -1, 1) * frequencies)
    return r(r32(np.concatenate([np.cos(phases), np.sin(phases)], axis=-1)))


def timestep_embedding(w: Weights, name: str, phases: Array) -> tuple[Array, Array]:
    """Turn phases (B, 1|T, 256) into offsets (B, 1|T, K, D) of K rows, and the embedding (B, 1|T, D)."""
    hidden = linear(w, name + ".emb.timestep_embedder.linear_1", phases)
    embedding = linear(w, name + ".emb.timestep_embedder.linear_2", silu(hidden))
    offsets = linear(w, name + ".linear", silu(embedding))
    tap(name + ".emb", flat(embedding)), tap(name + ".linear", flat(offsets))
    return offsets.reshape(*embedding.shape[:2], -1, embedding.shape[-1]), embedding


def adaln(w: Weights, name: str, timestep: Array) -> tuple[Array, Array]:
    """Return modulation rows and embedding for timesteps (B,), (B, 1) or (B, T)."""
    phases = sinusoid(timestep)
    tap(name + ".sinusoid", flat(phases))
    return timestep_embedding(w, name, phases)


def flat(x: Array) -> Array:
    """Join the noise levels of all tokens of all batch elements in one dimension."""
    return x.reshape(-1, x.shape[-1])


def rows(name: str, *sources: tuple[Array, Array | None]) -> list[Array]:
    """Return K rows that broadcast to (B, T, D): the tables' (K, D), plus offsets (B, 1|T, K, D) if any."""
    if any(offsets is None for _, offsets in sources):
        return [row for table, _ in sources for row in table]
    found = np.concatenate([r(table + offsets) for table, offsets in sources], axis=2)
    tap(name, found.reshape(-1, *found.shape[2:]))
    return [found[:, :, k] for k in range(found.shape[2])]


def text_features(config: dict[str, Any], w: Weights, prefix: str, text: Array) -> Array:
    if not config["use_prompt_embeddings"]:
        return text
    hidden = gelu(linear(w, prefix + "caption_projection.linear_1", text))
    return tap(prefix + "caption_projection", linear(w, prefix + "caption_projection.linear_2", hidden))


def tokens(config: dict[str, Any], w: Weights, prefix: str, latents: Array, keyframes: Array | None) -> Array:
    """Project latents (B, T, C) to (B, T, D); `keyframes` (B, T, 1) belong to video in 2.5."""
    x = tap(prefix + "proj_in", linear(w, prefix + "proj_in", latents))
    if keyframes is not None and config["use_keyframes_abs_pos_embedding"]:
        x = r(x + (keyframes > 0) * w["keyframes_abs_pos_embedding"])
    return x


def ropes(config: dict[str, Any], prefix: str, coords: Array) -> tuple[Rope, Rope]:
    """Return the rotations for self-attention and for the exchange, which rotates by time alone."""
    middle = middles(coords)
    maxima = [config[prefix + "pos_embed_max_pos"], config["base_height"], config["base_width"]]
    seconds = max(config["pos_embed_max_pos"], config["audio_pos_embed_max_pos"])
    return (
        rope_tables(config, prefix + "rope", middle, maxima, config[prefix + "cross_attention_dim"]),
        rope_tables(config, f"cross_attn_{prefix}rope", middle[:, :1], [seconds], config["audio_cross_attention_dim"]),
    )


def coordinates(config: dict[str, Any], inputs: dict[str, Any], name: str) -> Array:
    """Return the bounds of the patches (B|1, P, T, 2)."""
    coords = inputs.get(name + "_coords")
    if coords is not None:
        return f64(coords)
    if name == "video":
        grid = inputs["num_frames"], inputs["height"], inputs["width"]
        return video_positions(config, *grid, inputs.get("fps", 24.0))[None]
    return audio_positions(config, inputs["audio_num_frames"])[None]


def make_stream(config: dict[str, Any], w: Weights, inputs: dict[str, Any], name: str) -> Stream:
    prefix, other, direction = ("", "audio", "a2v") if name == "video" else ("audio_", "video", "v2a")
    x = tokens(
        config,
        w,
        prefix,
        f64(inputs[prefix + "hidden_states"]),
        inputs.get("video_keyframes_mask") if name == "video" else None,
    )
    coords = coordinates(config, inputs, name)
    tap(name + "_coords", np.broadcast_to(coords, (len(x), *coords.shape[1:])))
    rope, time_rope = ropes(config, prefix, np.broadcast_to(coords, (len(x), *coords.shape[1:])))
    self_mask = inputs.get("video_self_attention_mask") if name == "video" else None

    timestep = default(inputs.get(prefix + "timestep"), inputs["timestep"])
    sigma = {"video": inputs.get("sigma"), "audio": default(inputs.get("audio_sigma"), inputs.get("sigma"))}
    exchange_timestep = f64(sigma[other] if inputs.get("use_cross_timestep") else timestep)
    ratio = config["cross_attn_timestep_scale_multiplier"] / config["timestep_scale_multiplier"]
    offsets, embedding = adaln(w, prefix + "time_embed", timestep)
    scale_shifts, _ = adaln(w, f"av_cross_attn_{name}_scale_shift", exchange_timestep)
    gate, _ = adaln(w, f"av_cross_attn_{name}_{direction}_gate", r32(exchange_timestep * ratio))
    modulates_text = config["cross_attn_mod"] or config["audio_cross_attn_mod"]  # one does for both streams
    from_sigma = modulates_text and config["use_prompt_adaln_single"]
    return Stream(
        prefix, x, text_features(config, w, prefix, f64(inputs[prefix + "encoder_hidden_states"])),
        config[prefix + "num_attention_heads"], config[prefix + "cross_attn_mod"], modulates_text, offsets, embedding,
        exchange_offsets=np.concatenate([scale_shifts, gate], axis=2),
        text_offsets=adaln(w, prefix + "prompt_adaln", sigma[name])[0] if from_sigma else None,
        rope=rope, time_rope=time_rope, text_bias=text_mask_bias(inputs.get(prefix + "encoder_attention_mask")),
        self_bias=None if self_mask is None else multiplicative_bias(self_mask),
    )  # fmt: skip


def self_attention(w: Weights, block: str, s: Stream, layout: str, keep: Array | None) -> None:
    name = f"{block}{s.prefix}attn1"
    shift, scale, gate = rows(name + ".rows", (w[f"{block}{s.prefix}scale_shift_table"][0:3], s.offsets[:, :, 0:3]))
    h = tap(name + ".input", modulate(rms_norm(tap(name + ".stream", s.x)), scale, shift))
    s.x = residual(s.x, gate, attention(w, name, h, h, s.heads, layout, s.rope, s.rope, s.self_bias, keep))


def text_attention(w: Weights, block: str, s: Stream) -> None:
    name = f"{block}{s.prefix}attn2"
    h, text, gate = rms_norm(tap(name + ".stream", s.x)), s.text, f64(1.0)
    if s.modulates_queries:
        table = w[f"{block}{s.prefix}scale_shift_table"][6:9]
        shift, scale, gate = rows(name + ".rows", (table, s.offsets[:, :, 6:9]))
        h = modulate(h, scale, shift)
    if s.modulates_text:  # the text itself is not normalised
        shift, scale = rows(name + ".context_rows", (w[f"{block}{s.prefix}prompt_scale_shift_table"], s.text_offsets))
        text = modulate(text, scale, shift)
    h, text = tap(name + ".input", h), tap(name + ".context", text)
    s.x = residual(s.x, gate, attention(w, name, h, text, s.heads, bias=s.text_bias))


def exchange(w: Weights, block: str, video: Stream, audio: Stream, layout: str) -> None:
    # Five rows: a2v (scale, shift), v2a (scale, shift), gate. In all other tables shift is first.
    tables = {
        "": w[block + "video_a2v_cross_attn_scale_shift_table"],
        "audio_": w[block + "audio_a2v_cross_attn_scale_shift_table"],
    }
    before = {"": video.x, "audio_": audio.x}  # both read the streams as they were
    for name, s, other, two in (
        ("audio_to_video_attn", video, audio, slice(0, 2)),
        ("video_to_audio_attn", audio, video, slice(2, 4)),
    ):
        name, table, offsets = block + name, tables[s.prefix], s.exchange_offsets
        sources = (table[two], offsets[:, :, two]), (table[4:5], offsets[:, :, 4:5])
        scale, shift, gate = rows(name + ".rows", *sources)
        h = tap(name + ".input", modulate(rms_norm(tap(name + ".stream", before[s.prefix])), scale, shift))
        context_rows = (tables[other.prefix][two], other.exchange_offsets[:, :, two])
        scale, shift = rows(name + ".context_rows", context_rows)
        context = tap(name + ".context", modulate(rms_norm(before[other.prefix]), scale, shift))
        attended = attention(w, name, h, context, audio.heads, layout, s.time_rope, other.time_rope)
        s.x = residual(s.x, gate, attended)


def feed_forward(w: Weights, block: str, s: Stream) -> None:
    name = f"{block}{s.prefix}ff"
    shift, scale, gate = rows(name + ".rows", (w[f"{block}{s.prefix}scale_shift_table"][3:6], s.offsets[:, :, 3:6]))
    h = tap(name + ".input", modulate(rms_norm(tap(name + ".stream", s.x)), scale, shift))
    s.x = residual(s.x, gate, mlp(w, name, h))


def mlp(w: Weights, name: str, x: Array) -> Array:
    hidden = tap(name + ".activation", gelu(tap(name + ".proj", linear(w, name + ".net.0.proj", x))))
    return tap(name + ".output", linear(w, name + ".net.2", hidden))


def run_block(
    w: Weights, i: int, video: Stream, audio: Stream, layout: str, keep: Array | None, isolated: bool
) -> None:
    block = f"transformer_blocks.{i}."
    for stream in (video, audio):
        self_attention(w, block, stream, layout, keep)
        text_attention(w, block, stream)
    if not isolated:
        exchange(w, block, video, audio, layout)
    for stream in (video, audio):
        feed_forward(w, block, stream)
    tap(block + "video", video.x), tap(block + "audio", audio.x)


def output(w: Weights, prefix: str, x: Array, embedding: Array) -> Array:
    shift, scale = (r(row + embedding) for row in w[prefix + "scale_shift_table"])  # the same for both
    normed = modulate(tap(prefix + "norm_out", layer_norm(x)), scale, shift)
    projected = tap(prefix + "proj_out", linear(w, prefix + "proj_out", tap(prefix + "proj_out.input", normed)))
    return tap(prefix + "sample", projected)


def forward(config: dict[str, Any], weights: Weights, inputs: dict[str, Any]) -> tuple[Array, Array]:
    """Return the model's velocities (video, audio). `inputs` are the arguments of its forward, by name."""
    if config["norm_elementwise_affine"] or config["activation_fn"] != "gelu-approximate":
        raise ValueError("no checkpoint is like this, and these equations do not cover it")
    video, audio = (make_stream(config, weights, inputs, name) for name in ("video", "audio"))
    perturbed = default(inputs.get("spatio_temporal_guidance_blocks"), []) if config["perturbed_attn"] else []
    keep = r(default(inputs.get("perturbation_mask"), np.zeros(len(video.x)))).reshape(-1)
    for i in range(config["num_layers"]):
        run_block(
            weights,
            i,
            video,
            audio,
            config["rope_type"],
            keep if i in perturbed else None,
            bool(inputs.get("isolate_modalities")),
        )
    return output(weights, "", video.x, video.embedding), output(weights, "audio_", audio.x, audio.embedding)


# ---------------------------------------------------------------- the conformance kit
def model(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    forward(case["config"], w, x | case["arguments"])


def positions_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    name = case["module"]
    coords = coordinates(case["config"], case["arguments"], name.removesuffix("_coords"))
    tap(name, np.repeat(coords, case["arguments"]["batch"], axis=0))


def rope_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    ((name, coords),) = x.items()
    ropes(case["config"], "audio_" if name == "audio_coords" else "", coords)


def sinusoid_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    tap(case["module"] + ".sinusoid", flat(sinusoid(x["timestep"])))


def timestep_embedding_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    timestep_embedding(w, case["module"], x[case["module"] + ".sinusoid"][None])


def rows_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    sources = []
    for source in case["arguments"]["sources"]:
        table = w[source["table"]]
        offsets = x[source["offsets"]].reshape(1, len(x[source["offsets"]]), -1, table.shape[1])
        sources.append((table[slice(*source["rows"])], offsets[:, :, slice(*source["offset_rows"])]))
    rows(case["module"], *sources)


def rotation_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    vectors, cos, sin = (x[name] for name in case["inputs"])
    tap(case["module"], rotate(vectors.reshape(*cos.shape[:3], -1), (cos, sin), case["config"]["rope_type"]))


def attention_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    name, config, given = case["module"], case["config"], case["arguments"]
    heads = config["audio_num_attention_heads" if "audio" in name else "num_attention_heads"]
    rope, context_rope = ((x[at + ".cos"], x[at + ".sin"]) if at else None for at in given["ropes"])
    mask = x.get(given["mask"])
    bias = multiplicative_bias(mask) if mask is not None and mask.ndim == 3 else text_mask_bias(mask)
    h = x[name + ".input"]
    attention(
        w,
        name,
        h,
        x.get(name + ".context", h),
        heads,
        config["rope_type"],
        rope,
        context_rope,
        bias,
        x.get("perturbation_mask"),
    )


def feed_forward_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    mlp(w, case["module"], x[case["module"] + ".input"])


def text_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    prefix = case["module"].removesuffix("caption_projection")
    text_features(case["config"], w, prefix, x[prefix + "encoder_hidden_states"])


def tokens_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    tap(case["module"], tokens(case["config"], w, "", x["hidden_states"], x["video_keyframes_mask"]))


def exchange_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    block = case["module"]
    video, audio = (given_stream(case, w, x, name) for name in ("video", "audio"))
    video.x, audio.x = x[block + "audio_to_video_attn.stream"], x[block + "video_to_audio_attn.stream"]
    exchange(w, block, video, audio, case["config"]["rope_type"])
    tap(block + "ff.stream", video.x), tap(block + "audio_ff.stream", audio.x)


def block_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    i = case["arguments"]["block"]
    video, audio = (given_stream(case, w, x, name) for name in ("video", "audio"))
    video.x, audio.x = (x[f"transformer_blocks.{i - 1}.{name}"] for name in ("video", "audio"))
    run_block(w, i, video, audio, case["config"]["rope_type"], x.get("perturbation_mask"), False)


def given_stream(case: dict[str, Any], w: Weights, x: dict[str, Any], name: str) -> Stream:
    """Return what the kit gives an exchange or a block for a stream: offsets, tables, text."""
    prefix, direction = ("", "a2v") if name == "video" else ("audio_", "v2a")
    config, batch = case["config"], len(x["rope.cos"])
    width = config[prefix + "num_attention_heads"] * config[prefix + "attention_head_dim"]

    def offsets(layer: str) -> Array | None:
        found = x.get(layer + ".linear")
        return None if found is None else found.reshape(batch, -1, found.shape[-1] // width, width)

    def rope(at: str) -> Rope:
        return x[at + ".cos"], x[at + ".sin"]

    exchange_offsets = [offsets(f"av_cross_attn_{name}_{part}") for part in ("scale_shift", f"{direction}_gate")]
    return Stream(
        prefix, np.empty(0), x.get(prefix + "encoder_hidden_states", np.empty(0)),
        config[prefix + "num_attention_heads"], config[prefix + "cross_attn_mod"],
        config["cross_attn_mod"] or config["audio_cross_attn_mod"], default(offsets(prefix + "time_embed"), f64(0)),
        f64(0), np.concatenate([y for y in exchange_offsets if y is not None], axis=2),
        offsets(prefix + "prompt_adaln"), rope(prefix + "rope"), rope(f"cross_attn_{prefix}rope"),
        text_mask_bias(x.get(prefix + "encoder_attention_mask")), None,
    )  # fmt: skip


def output_case(case: dict[str, Any], w: Weights, x: dict[str, Any]) -> None:
    prefix, (stream, embedding) = case["module"].removesuffix("proj_out"), (x[name] for name in case["inputs"])
    output(w, prefix, stream, embedding.reshape(len(stream), -1, stream.shape[-1]))


OPERATIONS = {
    "model": model,
    "positions": positions_case,
    "rope": rope_case,
    "sinusoid": sinusoid_case,
    "timestep embedding": timestep_embedding_case,
    "rows": rows_case,
    "rotation": rotation_case,
    "attention": attention_case,
    "feed-forward": feed_forward_case,
    "text projection": text_case,
    "tokens": tokens_case,
    "exchange": exchange_case,
    "block": block_case,
    "output": output_case,
}


def given(file: dict[str, Array], prefix: str) -> dict[str, Array]:
    """Read tensors in float64, and integer masks as they are; bfloat16 is the upper half of a float32's bits."""
    found = {}
    for name, x in file.items():
        if name.startswith(prefix):
            if x.dtype == np.uint16:
                x = (x.astype(np.uint32) << 16).view(np.float32)
            found[name.removeprefix(prefix)] = f64(x) if np.issubdtype(x.dtype, np.floating) else x
    return found


def compute(case: dict[str, Any], file: dict[str, Array], dtype: str, level: str) -> dict[str, Array]:
    """Compute a case, and return every tap that the kit asks for."""
    TAPS.clear()
    inputs = given(file, f"{dtype}/inputs/")
    if level == "exact":
        inputs |= given(file, f"{dtype}/exact/inputs/")
    Numbers.dtype = dtype if level == "exact" else "float64"
    try:
        OPERATIONS[case["operation"]](case, given(file, f"{dtype}/weights/"), inputs)
    finally:
        Numbers.dtype = "float64"
    names = case["exact"][dtype]["digests"] if level == "exact" else case["outputs"]
    # What has been rounded, to float32 or to fewer bits, a float32 holds as it is.
    return {name: np.ascontiguousarray(TAPS[name], "float32" if level == "exact" else "float64") for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path, help="a folder that `ltx2ref kit export` wrote")
    parser.add_argument("results", type=Path, help="a folder for the results")
    parser.add_argument("--level", choices=["native", "exact"], default="native")
    options = parser.parse_args()
    for case in json.loads((options.kit / "kit.json").read_text(encoding="utf-8"))["cases"]:
        file = load_file(options.kit / case["file"])
        exact = {dtype: said["results"] for dtype, said in case["exact"].items()}
        for dtype, result in (exact if options.level == "exact" else case["results"]).items():
            path = options.results / result
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(compute(case, file, dtype, options.level), path)


if __name__ == "__main__":
    main()
