"""A second, independent implementation of the LTX-2 forward, in float64 NumPy.

Written from the equations, by other hands than the package, of which it imports nothing. It is there to be
read: attention runs head by head, softmax is spelled out, nothing is fused, and every number is float64, from
the sinusoid and the rotary angles to the output. Parameter names and config keys are those of diffusers.

    sub-layer    x + gate * f(rms(x) * (1 + scale) + shift)     (shift, scale, gate) = table + AdaLN(timestep)
    block        self-attention, text attention, exchange between the streams, feed-forward
    attention    q = rms(Wq x) * g, k = rms(Wk c) * g, both rotated; per head softmax(q k^T / sqrt(d) + b) v
                 times 2 * sigmoid(the head's logit of x); heads joined; Wo
    output       Wo(layer_norm(x) * (1 + scale) + shift)        (shift, scale) = table + timestep embedding

Array axes: B batch, T tokens, S text tokens, D width, K modulation rows, P position axes, R = head_dim / 2.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]
EPS = 1e-6


@dataclass
class Stream:
    """One stream: its tokens `x`, which the blocks change, and what stays as it is for all blocks."""

    prefix: str  # of its parameter names: "" (video) or "audio_"
    x: Array  # (B, T, D)
    text: Array  # (B, S, D)
    heads: int
    gated: bool  # gates per head in the attentions whose queries come from this stream
    modulates_queries: bool  # text attention: three more rows, for its queries and its gate
    modulates_text: bool  # text attention: two rows for its keys and values
    offsets: Array  # (B, 1|T, 6|9, D), from the timestep
    embedding: Array  # (B, 1|T, D), from the timestep
    exchange_offsets: Array  # (B, 1|T, 5, D)
    text_offsets: Array | None  # (B, 1, 2, D), from sigma
    angles: Array  # (B, T, D/2), for self-attention
    time_angles: Array  # (B, T, audio D/2), for the exchange
    text_bias: Array | None  # (B, 1|T, S)
    self_bias: Array | None  # (B, T, T)


def default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def f64(x: Any) -> Array:
    return np.asarray(x, dtype=np.float64)


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)  # some configs have no bias


def rms_norm(x: Array) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)


def modulate(x: Array, scale: Array, shift: Array) -> Array:
    return x * (1.0 + scale) + shift


def sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - np.maximum(np.max(scores, axis=-1, keepdims=True), -1e300))
    return powers / np.maximum(np.sum(powers, axis=-1, keepdims=True), 1e-300)  # 0 where nothing is kept


def video_positions(config: dict[str, Any], frames: int, height: int, width: int, fps: float) -> Array:
    """The middles of the patches: (3, T), seconds and pixels, in (frame, height, width) order."""
    sizes = config["patch_size_t"], config["patch_size"], config["patch_size"]
    middles = []
    for axis, count in enumerate((frames, height, width)):
        start, scale = np.arange(0.0, count, sizes[axis]), config["vae_scale_factors"][axis]
        bounds = [start * scale, (start + sizes[axis]) * scale]
        if axis == 0:  # causal: the first latent frame stands for fewer frames
            bounds = [np.maximum(t + config["causal_offset"] - scale, 0.0) / fps for t in bounds]
        middles.append((bounds[0] + bounds[1]) / 2.0)
    return np.stack([grid.reshape(-1) for grid in np.meshgrid(*middles, indexing="ij")])


def audio_positions(config: dict[str, Any], frames: int) -> Array:
    """The middles of the patches: (1, T), seconds."""
    size, scale = config["audio_patch_size_t"], config["audio_scale_factor"]
    start = np.arange(0.0, frames, size)
    mel = [np.maximum(i * scale + config["causal_offset"] - scale, 0.0) for i in (start, start + size)]
    return ((mel[0] + mel[1]) / 2.0 * config["audio_hop_length"] / config["audio_sampling_rate"])[None]


def rope_angles(middle: Array, maxima: list[float], width: int, theta: float) -> Array:
    """(B, P, T) positions -> (B, T, width / 2) angles; each head gets its own R of them."""
    batch, axes, tokens = middle.shape
    count = width // (2 * axes)
    frequencies = theta ** np.linspace(0.0, 1.0, count) * math.pi / 2.0
    angles = np.zeros((batch, tokens, width // 2))
    for p in range(axes):
        u = middle[:, p, :, None] / maxima[p] * 2.0 - 1.0
        first = width // 2 - count * axes + p  # what is left over stays zero, on the left
        angles[:, :, first::axes] = u * frequencies
    return angles


def rotate(x: Array, angles: Array, layout: str) -> Array:
    """One head, x (T, 2R), angles (T, R): "split" turns (r, r + R) together, "interleaved" (2r, 2r + 1)."""
    first, second = slice(0, None, 2), slice(1, None, 2)
    if layout == "split":
        first, second = slice(0, angles.shape[-1]), slice(angles.shape[-1], None)
    out = np.empty_like(x)
    out[:, first] = x[:, first] * np.cos(angles) - x[:, second] * np.sin(angles)
    out[:, second] = x[:, second] * np.cos(angles) + x[:, first] * np.sin(angles)
    return out


def attention(
    w: Weights, name: str, x: Array, context: Array, heads: int, gated: bool, layout: str = "",
    x_angles: Array | None = None, context_angles: Array | None = None,
    bias: Array | None = None, keep: Array | None = None,
) -> Array:  # fmt: skip
    """x (B, T, .), context (B, S, .). keep (B,): 1 = attention, 0 = v instead (self-attention only)."""
    q = rms_norm(linear(w, name + ".to_q", x)) * w[name + ".norm_q.weight"]  # over all heads at once
    k = rms_norm(linear(w, name + ".to_k", context)) * w[name + ".norm_k.weight"]
    v = linear(w, name + ".to_v", context)
    gates = 2.0 * sigmoid(linear(w, name + ".to_gate_logits", x)) if gated else np.ones((*x.shape[:2], heads))
    size = q.shape[-1] // heads
    joined = np.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(heads):
            part, planes = slice(h * size, (h + 1) * size), slice(h * size // 2, (h + 1) * size // 2)
            q_head, k_head, v_head = q[b, :, part], k[b, :, part], v[b, :, part]
            if x_angles is not None and context_angles is not None:
                q_head = rotate(q_head, x_angles[b, :, planes], layout)
                k_head = rotate(k_head, context_angles[b, :, planes], layout)
            scores = q_head @ k_head.T / math.sqrt(size) + (0.0 if bias is None else bias[b])
            result = softmax(scores) @ v_head
            if keep is not None:
                result = v_head + keep[b] * (result - v_head)
            joined[b, :, part] = result * gates[b, :, h : h + 1]
    return linear(w, name + ".to_out.0", joined)


def multiplicative_bias(mask: Array) -> Array:
    return (1.0 - f64(mask)) * -10000.0


def text_mask_bias(mask: Array | None) -> Array | None:
    """(B, S) of any dtype is multiplicative; (B, 1|T, S) is a bias if floating, "keep" if bool."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return multiplicative_bias(mask)[:, None, :]
    if mask.dtype == np.bool_:
        return np.where(mask, 0.0, -np.inf)
    if not np.issubdtype(mask.dtype, np.floating):
        raise ValueError(f"text mask of 3 dimensions and dtype {mask.dtype}")
    return f64(mask)


def adaln(w: Weights, name: str, timestep: Array) -> tuple[Array, Array]:
    """(B,), (B, 1) or (B, T) -> offsets (B, 1|T, K, D) of K rows, and the embedding (B, 1|T, D)."""
    phases = f64(timestep).reshape(len(timestep), -1, 1) * np.exp(-math.log(10000.0) * np.arange(128) / 128.0)
    sinusoid = np.concatenate([np.cos(phases), np.sin(phases)], axis=-1)
    hidden = linear(w, name + ".emb.timestep_embedder.linear_1", sinusoid)
    embedding = linear(w, name + ".emb.timestep_embedder.linear_2", hidden * sigmoid(hidden))
    offsets = linear(w, name + ".linear", embedding * sigmoid(embedding))
    return offsets.reshape(*embedding.shape[:2], -1, embedding.shape[-1]), embedding


def rows(table: Array, offsets: Array | None) -> list[Array]:
    """K rows that broadcast to (B, T, D): the table's (D), plus its offset (B, 1|T, D) if any."""
    return [row if offsets is None else row + offsets[:, :, k] for k, row in enumerate(table)]


def make_stream(config: dict[str, Any], w: Weights, inputs: dict[str, Any], name: str) -> Stream:
    prefix, other, heard = ("", "audio", "a2v") if name == "video" else ("audio_", "video", "v2a")
    x = linear(w, prefix + "proj_in", f64(inputs[prefix + "hidden_states"]))
    batch, tokens, width = x.shape
    keyframes = inputs.get("video_keyframes_mask")  # (B, T, 1)
    if name == "video" and keyframes is not None and config["use_keyframes_abs_pos_embedding"]:
        x = x + (keyframes > 0) * w["keyframes_abs_pos_embedding"]

    coords = inputs.get(name + "_coords")  # bounds (B, P, T, 2), or points (B, P, T), taken as they are
    if coords is not None:
        middle = f64(coords) if coords.ndim == 3 else (f64(coords[..., 0]) + f64(coords[..., 1])) / 2.0
    elif name == "video":
        frames, height, cols = inputs["num_frames"], inputs["height"], inputs["width"]
        middle = video_positions(config, frames, height, cols, inputs.get("fps", 24.0))[None]
    else:
        middle = audio_positions(config, inputs["audio_num_frames"])[None]
    middle = np.broadcast_to(middle, (batch, middle.shape[1], tokens))
    maxima = [config[prefix + "pos_embed_max_pos"], config["base_height"], config["base_width"]]
    seconds = max(config["pos_embed_max_pos"], config["audio_pos_embed_max_pos"])
    theta, time_width = config["rope_theta"], config["audio_cross_attention_dim"]

    text = f64(inputs[prefix + "encoder_hidden_states"])
    if config["use_prompt_embeddings"]:
        hidden = gelu(linear(w, prefix + "caption_projection.linear_1", text))
        text = linear(w, prefix + "caption_projection.linear_2", hidden)
    self_mask = inputs.get("video_self_attention_mask") if name == "video" else None

    timestep = default(inputs.get(prefix + "timestep"), inputs["timestep"])
    sigma = {"video": inputs.get("sigma"), "audio": default(inputs.get("audio_sigma"), inputs.get("sigma"))}
    exchange_timestep = f64(sigma[other] if inputs.get("use_cross_timestep") else timestep)
    ratio = config["cross_attn_timestep_scale_multiplier"] / config["timestep_scale_multiplier"]
    offsets, embedding = adaln(w, prefix + "time_embed", timestep)
    scale_shifts, _ = adaln(w, f"av_cross_attn_{name}_scale_shift", exchange_timestep)
    gate, _ = adaln(w, f"av_cross_attn_{name}_{heard}_gate", exchange_timestep * ratio)
    modulates_text = config["cross_attn_mod"] or config["audio_cross_attn_mod"]  # one does for both streams
    from_sigma = modulates_text and config["use_prompt_adaln_single"]
    return Stream(
        prefix, x, text, config[prefix + "num_attention_heads"], config[prefix + "gated_attn"],
        config[prefix + "cross_attn_mod"], modulates_text, offsets, embedding,
        exchange_offsets=np.concatenate([scale_shifts, gate], axis=2),
        text_offsets=adaln(w, prefix + "prompt_adaln", sigma[name])[0] if from_sigma else None,
        angles=rope_angles(middle, maxima, width, theta),
        time_angles=rope_angles(middle[:, :1], [seconds], time_width, theta),
        text_bias=text_mask_bias(inputs.get(prefix + "encoder_attention_mask")),
        self_bias=None if self_mask is None else multiplicative_bias(self_mask),
    )  # fmt: skip


def self_attention(w: Weights, block: str, s: Stream, layout: str, keep: Array | None) -> None:
    shift, scale, gate = rows(w[f"{block}{s.prefix}scale_shift_table"], s.offsets)[0:3]
    h, name = modulate(rms_norm(s.x), scale, shift), f"{block}{s.prefix}attn1"
    heard = attention(w, name, h, h, s.heads, s.gated, layout, s.angles, s.angles, s.self_bias, keep)
    s.x = s.x + gate * heard


def text_attention(w: Weights, block: str, s: Stream) -> None:
    h, text, gate = rms_norm(s.x), s.text, f64(1.0)
    if s.modulates_queries:
        shift, scale, gate = rows(w[f"{block}{s.prefix}scale_shift_table"], s.offsets)[6:9]
        h = modulate(h, scale, shift)
    if s.modulates_text:  # the text itself is not normalised
        shift, scale = rows(w[f"{block}{s.prefix}prompt_scale_shift_table"], s.text_offsets)
        text = modulate(text, scale, shift)
    s.x = s.x + gate * attention(w, f"{block}{s.prefix}attn2", h, text, s.heads, s.gated, bias=s.text_bias)


def exchange(w: Weights, block: str, video: Stream, audio: Stream, layout: str) -> None:
    v, a = rms_norm(video.x), rms_norm(audio.x)  # both from before the exchange
    # Five rows: a2v (scale, shift), v2a (scale, shift), gate. In all other tables shift is first.
    v_rows = rows(w[block + "video_a2v_cross_attn_scale_shift_table"], video.exchange_offsets)
    a_rows = rows(w[block + "audio_a2v_cross_attn_scale_shift_table"], audio.exchange_offsets)
    v_in, a_in, name = modulate(v, *v_rows[0:2]), modulate(a, *a_rows[0:2]), block + "audio_to_video_attn"
    angles = video.time_angles, audio.time_angles
    video.x = video.x + v_rows[4] * attention(w, name, v_in, a_in, audio.heads, video.gated, layout, *angles)
    v_in, a_in, name = modulate(v, *v_rows[2:4]), modulate(a, *a_rows[2:4]), block + "video_to_audio_attn"
    angles = audio.time_angles, video.time_angles
    audio.x = audio.x + a_rows[4] * attention(w, name, a_in, v_in, audio.heads, audio.gated, layout, *angles)


def feed_forward(w: Weights, block: str, s: Stream) -> None:
    shift, scale, gate = rows(w[f"{block}{s.prefix}scale_shift_table"], s.offsets)[3:6]
    hidden = gelu(linear(w, f"{block}{s.prefix}ff.net.0.proj", modulate(rms_norm(s.x), scale, shift)))
    s.x = s.x + gate * linear(w, f"{block}{s.prefix}ff.net.2", hidden)


def output(w: Weights, s: Stream) -> Array:
    centred = s.x - np.mean(s.x, axis=-1, keepdims=True)  # rms_norm of it is the layer norm
    shift, scale = (row + s.embedding for row in w[s.prefix + "scale_shift_table"])  # the same for both
    return linear(w, s.prefix + "proj_out", modulate(rms_norm(centred), scale, shift))


def forward(config: dict[str, Any], weights: Weights, inputs: dict[str, Any]) -> tuple[Array, Array]:
    """The model's velocities (video, audio). `inputs`: the arguments of the model's forward, by name."""
    if config["norm_elementwise_affine"] or config["activation_fn"] != "gelu-approximate":
        raise ValueError("no checkpoint is like this, and these equations do not cover it")
    video, audio = (make_stream(config, weights, inputs, name) for name in ("video", "audio"))
    perturbed = default(inputs.get("spatio_temporal_guidance_blocks"), []) if config["perturbed_attn"] else []
    keep = f64(default(inputs.get("perturbation_mask"), np.zeros(len(video.x)))).reshape(-1)
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}."
        for stream in (video, audio):
            self_attention(weights, block, stream, config["rope_type"], keep if i in perturbed else None)
            text_attention(weights, block, stream)
        if not inputs.get("isolate_modalities"):
            exchange(weights, block, video, audio, config["rope_type"])
        for stream in (video, audio):
            feed_forward(weights, block, stream)
    return output(weights, video), output(weights, audio)
