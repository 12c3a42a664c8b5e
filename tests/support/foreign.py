"""A port that looks like no published implementation: other names, layers that return pairs, norms written by hand.

It computes release 2.3 without masks and guidance, with the parameters of one of our models.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2ref import LTX2VideoTransformer3DModel
from ltx2ref.attention import Attention, FeedForward
from ltx2ref.block import Block
from ltx2ref.embeddings import AdaLayerNormSingle, sinusoid
from ltx2ref.parity.trace.layouts import Layout
from ltx2ref.rope import apply_rope, audio_positions, rotation, video_positions

SIDES = ("video", "audio")
NAMES: dict[str, str | tuple[str, ...]] = {
    "transformer_blocks": "layers",
    "proj_in": "enter_video",
    "audio_proj_in": "enter_audio",
    "proj_out": "leave_video",
    "audio_proj_out": "leave_audio",
    "time_embed": "level_video",
    "audio_time_embed": "level_audio",
    "prompt_adaln": "text_level_video",
    "audio_prompt_adaln": "text_level_audio",
    "av_cross_attn_video_scale_shift": "swap_video",
    "av_cross_attn_audio_scale_shift": "swap_audio",
    "av_cross_attn_video_a2v_gate": "gate_video",
    "av_cross_attn_audio_v2a_gate": "gate_audio",
    "emb.timestep_embedder": "second",
    "emb.timestep_embedder.linear_1": "first",
    "linear": "rows",
    "attn1": "self_video",
    "audio_attn1": "self_audio",
    "attn2": "read_video",
    "audio_attn2": "read_audio",
    "audio_to_video_attn": "hear",
    "video_to_audio_attn": "see",
    "ff.net.0.proj": "mlp_video.wide",
    "ff.net.2": "mlp_video.narrow",
    "ff": "mlp_video",
    "audio_ff.net.0.proj": "mlp_audio.wide",
    "audio_ff.net.2": "mlp_audio.narrow",
    "audio_ff": "mlp_audio",
    "to_v": "v",
    "norm_q": "q_scale",
    "norm_k": "k_scale",
    "to_gate_logits": "g",
    "to_out.0": ("o.0", "o"),
    "sdpa": "kernel",
    "scale_shift_table": "table_video",
    "audio_scale_shift_table": "table_audio",
    "prompt_scale_shift_table": "text_table_video",
    "audio_prompt_scale_shift_table": "text_table_audio",
    "video_a2v_cross_attn_scale_shift_table": "swap_table_video",
    "audio_a2v_cross_attn_scale_shift_table": "swap_table_audio",
    "rope": "turn_video",
    "audio_rope": "turn_audio",
    "cross_attn_rope": "turn_video_time",
    "cross_attn_audio_rope": "turn_audio_time",
}
LAYOUT = Layout(NAMES)


class Pair(nn.Module):
    """A linear layer that returns its output and a bias, which its caller adds if there is one, as vLLM's do."""

    def __init__(self, linear: nn.Module, skips_bias: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.skips_bias = linear.weight, linear.bias, skips_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        if self.skips_bias:
            return F.linear(x, self.weight), self.bias  # type: ignore[arg-type]
        return F.linear(x, self.weight, self.bias), None  # type: ignore[arg-type]


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Normalise with torch's own bits, but not through torch's function."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    return normed if weight is None else normed * weight


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention as a kernel does that wants (B, T, H, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Attend(nn.Module):
    def __init__(self, a: Attention) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g = (Pair(x) for x in (a.to_q, a.to_k, a.to_v, a.to_gate_logits))  # type: ignore
        self.o, self.num_heads, self.layout = Pair(a.to_out[0], skips_bias=True), a.num_heads, a.layout
        self.q_scale, self.k_scale = partial(rms, weight=a.norm_q.weight), partial(rms, weight=a.norm_k.weight)
        self.kernel = kernel

    def forward(self, given: list[Tensor], memory: Tensor | None = None, ropes: Any = None) -> Tensor:
        x = given.pop()  # so that the caller need not keep it
        memory = x if memory is None else memory
        q, k, v = self.q_scale(self.q(x)[0]), self.k_scale(self.k(memory)[0]), self.v(memory)[0]
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        if ropes is not None:
            q, k = apply_rope(q, ropes[0], self.layout), apply_rope(k, ropes[1], self.layout)
        out = self.kernel(q, k, v) * (2 * self.g(x)[0].sigmoid())[..., None]
        out, bias = self.o(out.flatten(2))
        return out + bias


class Mlp(nn.Module):
    def __init__(self, f: FeedForward) -> None:
        super().__init__()
        self.wide, self.narrow = Pair(f.net["0"]["proj"]), Pair(f.net["2"])  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)[0], approximate="tanh"))[0]


class Level(nn.Module):
    def __init__(self, a: AdaLayerNormSingle) -> None:
        super().__init__()
        embedder = a.emb["timestep_embedder"]
        self.first, self.second, self.rows = embedder.linear_1, embedder.linear_2, Pair(a.linear)
        self.num_rows = a.num_rows

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.second(F.silu(self.first(sinusoid(level, torch.float32))))
        return self.rows(F.silu(embedded))[0].unflatten(-1, (self.num_rows, -1)), embedded


class Turn(nn.Module):
    """RoPE's tables in diffusers' arrangement, (B, H, T, R)."""

    def __init__(self, config: Any, side: str, axes: int) -> None:
        super().__init__()
        self.config, self.side, self.axes = config, side, axes

    def forward(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        tables = rotation(coords[:, : self.axes], getattr(self.config, self.side), self.config, torch.float32)
        return tables[0].transpose(1, 2), tables[1].transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, b: Block) -> None:
        super().__init__()
        self.self_video, self.self_audio = Attend(b.attn1), Attend(b.audio_attn1)
        self.read_video, self.read_audio = Attend(b.attn2), Attend(b.audio_attn2)
        self.hear, self.see = Attend(b.audio_to_video_attn), Attend(b.video_to_audio_attn)
        self.mlp_video, self.mlp_audio = Mlp(b.ff), Mlp(b.audio_ff)
        self.table_video, self.table_audio = b.scale_shift_table, b.audio_scale_shift_table
        self.text_table_video, self.text_table_audio = b.prompt_scale_shift_table, b.audio_prompt_scale_shift_table
        self.swap_table_video = b.video_a2v_cross_attn_scale_shift_table
        self.swap_table_audio = b.audio_a2v_cross_attn_scale_shift_table

    def forward(self, streams: dict[str, Tensor], c: dict[str, Any]) -> list[Tensor]:
        x, swapped = dict(streams), {}
        for side in SIDES:
            shift, scale, gate, *mlp = (getattr(self, f"table_{side}") + c[f"level_{side}"]).unbind(-2)
            h = rms(x[side]) * (1 + scale) + shift
            rope = c[f"turn_{side}"]
            x[side] = x[side] + gate * getattr(self, f"self_{side}")([h], ropes=(rope, rope))
            text = (getattr(self, f"text_table_{side}") + c[f"text_level_{side}"]).unbind(-2)
            memory = c[f"text_{side}"] * (1 + text[1]) + text[0]
            h = rms(x[side]) * (1 + mlp[4]) + mlp[3]
            x[side] = x[side] + mlp[5] * getattr(self, f"read_{side}")([h], memory)
            rows = (getattr(self, f"swap_table_{side}")[:4] + c[f"swap_{side}"]).unbind(-2)
            gate = getattr(self, f"swap_table_{side}")[4] + c[f"gate_{side}"][..., 0, :]
            swapped[side] = (rms(x[side]), rows, gate)
        (vh, v, v_gate), (ah, a, a_gate) = swapped["video"], swapped["audio"]
        vt, at = c["turn_video_time"], c["turn_audio_time"]
        heard = self.hear([vh * (1 + v[0]) + v[1]], ah * (1 + a[0]) + a[1], (vt, at))
        seen = self.see([ah * (1 + a[2]) + a[3]], vh * (1 + v[2]) + v[3], (at, vt))
        x = {"video": x["video"] + v_gate * heard, "audio": x["audio"] + a_gate * seen}
        for side in SIDES:
            *_, shift, scale, gate = (getattr(self, f"table_{side}") + c[f"level_{side}"]).unbind(-2)[:6]
            h = rms(x[side]) * (1 + scale) + shift
            x[side] = x[side] + gate * getattr(self, f"mlp_{side}")(h)
        return [x["video"], x["audio"]]


class Foreign(nn.Module):
    """The port: `enter`, `level` and so on of each side, and `layers`."""

    def __init__(self, m: LTX2VideoTransformer3DModel) -> None:
        super().__init__()
        self.config = m.config
        for side, ends in zip(SIDES, (m.video, m.audio), strict=True):
            setattr(self, f"enter_{side}", ends.proj_in)
            setattr(self, f"leave_{side}", Pair(ends.proj_out))
            setattr(self, f"out_table_{side}", ends.table)
            for name, layer in (
                ("level", ends.time_embed),
                ("text_level", ends.text_embed),
                ("swap", ends.exchange_embed),
                ("gate", ends.exchange_gate_embed),
            ):
                setattr(self, f"{name}_{side}", Level(layer))  # type: ignore[arg-type]
        self.turn_video, self.turn_audio = Turn(m.config, "video", 3), Turn(m.config, "audio", 1)
        self.turn_video_time, self.turn_audio_time = Turn(m.config, "audio", 1), Turn(m.config, "audio", 1)
        self.layers = [Layer(b) for b in m.transformer_blocks]  # type: ignore[arg-type]

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        timestep: Tensor,
        audio_timestep: Tensor,
        sigma: Tensor,
        audio_sigma: Tensor,
        **grid: Any,
    ) -> tuple[Tensor, Tensor]:
        frames, height, width = grid["num_frames"], grid["height"], grid["width"]
        video = video_positions((frames, height, width), grid["fps"], self.config, torch.float32)
        audio = audio_positions(grid["audio_num_frames"], self.config, torch.float32)
        batch = len(hidden_states)
        video, audio = video.expand(batch, -1, -1, -1), audio.expand(batch, -1, -1, -1)
        levels = {"video": timestep[:, None], "audio": audio_timestep[:, None]}
        sigmas = {"video": sigma[:, None], "audio": audio_sigma[:, None]}
        c: dict[str, Any] = {"text_video": encoder_hidden_states, "text_audio": audio_encoder_hidden_states}
        embedded = {}
        for side in SIDES:
            c[f"level_{side}"], embedded[side] = getattr(self, f"level_{side}")(levels[side])
            c[f"text_level_{side}"], _ = getattr(self, f"text_level_{side}")(sigmas[side])
            c[f"swap_{side}"], _ = getattr(self, f"swap_{side}")(levels[side])
            c[f"gate_{side}"], _ = getattr(self, f"gate_{side}")(levels[side])
        for side, coords in (("video", video), ("audio", audio)):
            for name in (f"turn_{side}", f"turn_{side}_time"):
                cos, sin = getattr(self, name)(coords if name == f"turn_{side}" else coords[:, :1])
                c[name] = (cos.transpose(1, 2), sin.transpose(1, 2))
        x = {"video": self.enter_video(hidden_states), "audio": self.enter_audio(audio_hidden_states)}
        for layer in self.layers:
            x = dict(zip(SIDES, layer(x, c), strict=True))
        return self.left(x["video"], embedded, "video"), self.left(x["audio"], embedded, "audio")

    def left(self, x: Tensor, embedded: dict[str, Tensor], side: str) -> Tensor:
        shift, scale = (getattr(self, f"out_table_{side}") + embedded[side][:, :, None]).unbind(-2)
        velocity: Tensor = getattr(self, f"leave_{side}")(
            F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        )[0]
        return velocity
