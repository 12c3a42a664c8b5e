"""Draw the figures of docs/architecture.md, from the model's own functions, as docs/figures/NAME-{light,dark}.svg.

python scripts/make_figures.py              write them (needs the extra `report`: matplotlib)
python scripts/make_figures.py --out DIR    write them to another folder
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib  # type: ignore[import-not-found, unused-ignore]
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch  # type: ignore[import-not-found, unused-ignore]

from ltx2ref import LTX_2_3
from ltx2ref.describe import Architecture, describe, lengths
from ltx2ref.rope import audio_positions, rotation, video_positions

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
WIDTH = 9.0  # inches


class Look(NamedTuple):
    """Choose colours that are told apart with the common colour blindnesses, on white and on black."""

    ink: str
    faint: str
    paper: str
    video: str
    audio: str
    text: str
    noise: str


LOOKS = {
    "light": Look("#1f2328", "#8c959f", "#ffffff", "#0b62c1", "#c2410c", "#15803d", "#7e22ce"),
    "dark": Look("#e6edf3", "#7d8590", "#0d1117", "#6cb0ff", "#ff9b5e", "#5fd38d", "#c79bff"),
}


def box(ax: Any, x: float, y: float, w: float, h: float, label: str, colour: str, look: Look, size: float = 9) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=0.08",
            linewidth=1.2,
            edgecolor=colour,
            facecolor=colour + "22",
        )
    )
    ax.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=size, color=look.ink)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    ax.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "lw": 1.2,
            "shrinkA": 0,
            "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}",
        },
    )


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """Return an empty figure without axes, on which a unit of both directions is an inch."""
    figure = plt.figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def draw_block(look: Look) -> Any:
    """Draw one block: two streams, four sub-layers, one exchange."""
    figure, ax = canvas(WIDTH, 3.9)
    v, a = LTX_2_3.video, LTX_2_3.audio
    names = ("self_attention", "text_attention", "exchange", "feed_forward")
    xs = (1.15, 3.1, 5.05, 7.0)
    for y, colour, label, stream in ((2.75, look.video, "video", v), (0.55, look.audio, "audio", a)):
        ax.text(0.08, y + 0.47, label, fontsize=10, color=colour, weight="bold", va="center")
        ax.text(0.08, y + 0.20, f"{stream.dim} wide", fontsize=8, color=look.faint, va="center")
        axes = "time, y, x" if label == "video" else "time"
        what = (
            f"{stream.num_heads} heads of {stream.head_dim}\nRoPE of {axes}",
            f"{stream.num_heads} heads of {stream.head_dim}\nno RoPE",
            f"{a.num_heads} heads of {a.head_dim}\nRoPE of time",
            f"{4 * stream.dim} wide\ntanh-GELU",
        )
        for x, name, says in zip(xs, names, what, strict=True):
            box(ax, x, y - 0.12, 1.45, 0.85, "", colour, look)
            ax.text(x + 0.725, y + 0.58, name, ha="center", va="center", fontsize=9, color=look.ink, weight="bold")
            ax.text(x + 0.725, y + 0.17, says, ha="center", va="center", fontsize=7.5, color=look.ink)
        for start, end in ((0.85, 1.15), (2.6, 3.1), (4.55, 5.05), (6.5, 7.0), (8.45, 8.9)):
            arrow(ax, (start, y + 0.3), (end, y + 0.3), colour)
    # The exchange: each stream attends to the other one as it was before.
    ax.plot([4.8], [3.05], "o", color=look.video, ms=4)
    ax.plot([4.8], [0.85], "o", color=look.audio, ms=4)
    arrow(ax, (4.8, 3.05), (5.55, 1.28), look.video)
    arrow(ax, (4.8, 0.85), (5.55, 2.63), look.audio)
    ax.text(5.72, 1.95, "each attends to the other\nas it was before", fontsize=8, color=look.ink, va="center")
    box(ax, 3.1, 1.72, 1.45, 0.46, "text", look.text, look)
    arrow(ax, (3.82, 2.18), (3.82, 2.63), look.text)
    arrow(ax, (3.82, 1.72), (3.82, 1.28), look.text)
    ax.text(
        WIDTH / 2,
        3.72,
        "each box:  x + gate * f(rms_norm(x) * (1 + scale) + shift)",
        ha="center",
        fontsize=9,
        color=look.ink,
        family="monospace",
        va="center",
    )
    return figure


def draw_rope(look: Look) -> Any:
    """Draw the frequencies of the rotation planes over the heads, and the seconds that tokens stand for."""
    figure, (top, low) = plt.subplots(2, 1, figsize=(WIDTH, 6.1), height_ratios=(1.55, 1))
    config, planes = LTX_2_3, LTX_2_3.video.dim // 2
    near = top.inset_axes((0.07, 0.56, 0.36, 0.34))
    for axis, (name, colour) in enumerate((("time", look.noise), ("height", look.video), ("width", look.text))):
        index, freqs = turning(axis)
        top.plot(index[axis::6], freqs[axis::6], ".", ms=3, color=colour, label=name)
        near.plot(index[:6], freqs[:6], "o", ms=5, color=colour)
    still = planes % 3
    near.plot(range(still), [math.pi / 2] * still, "x", ms=5, color=look.faint)
    near.set(xlim=(-0.7, 17.7), ylim=(1.5, 1.72))
    near.set_xticks([0, 5, 10, 15], ["plane 0", "5", "10", "15"], fontsize=7.5)
    near.set_yticks([1.55, 1.6, 1.65], ["1.55", "1.60", "1.65"], fontsize=7.5)
    near.set_title(f"the first planes: {still} (x) do not turn", fontsize=8, color=look.ink)
    top.set(
        yscale="log",
        xlim=(0, planes),
        ylabel="f, radians per unit of u",
        title="split RoPE of video's self-attention: one spectrum over all 32 heads, the axes in turns",
    )
    top.set_xticks(range(0, planes + 1, planes // 8), [f"head {i}" for i in range(0, 32, 4)] + [""])
    legend = top.legend(loc="lower right", frameon=False, markerscale=3)
    for label in legend.get_texts():
        label.set_color(look.ink)
    for y, positions, colour, name in (
        (1, video_positions((5, 1, 1), 24.0, config)[0, 0], look.video, "video, latent frames at 24 fps"),
        (0, audio_positions(34, config)[0, 0], look.audio, "audio, latent frames"),
    ):
        for i, (start, end) in enumerate(positions.tolist()):
            low.barh(y, end - start, left=start, height=0.5, color=colour + ("66" if i % 2 else "33"), edgecolor=colour)
            low.plot([(start + end) / 2], [y], "|", color=look.ink, ms=7)
        low.text(0, y + 0.36, name, color=colour, fontsize=8.5)
    low.set(
        xlim=(-0.02, 1.4),
        ylim=(-0.5, 1.75),
        yticks=[],
        xlabel="seconds; a token's position is the middle of its patch",
        title="both streams have positions on one clock",
    )
    figure.tight_layout(h_pad=1.6)
    return figure


def turning(axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the planes that turn with one axis, and by how much from its middle to its end, found by rotating."""
    config, ends = LTX_2_3, torch.tensor([[10.0], [1024.0], [1024.0]], dtype=torch.float64)
    ends[axis] *= 2
    cos, sin = (x[0, 0].flatten() for x in rotation(ends[None], config.video, config, torch.float64))
    index = ((cos != 1) | (sin != 0)).nonzero().flatten()
    freqs = config.rope_theta ** torch.linspace(0, 1, len(index), dtype=torch.float64) * math.pi / 2
    assert torch.equal(cos[index], freqs.cos()) and torch.equal(sin[index], freqs.sin())
    return index, freqs


def draw_modulation(look: Look) -> Any:
    """Draw whose noise level drives which rows."""
    figure, ax = canvas(WIDTH, 5.0)
    sources = {"timestep": 3.95, "audio_timestep": 2.55, "sigma": 1.6, "audio_sigma": 0.45}
    colours = {"timestep": look.video, "audio_timestep": look.audio, "sigma": look.video, "audio_sigma": look.audio}
    for name, y in sources.items():
        box(ax, 0.1, y - 0.17, 1.35, 0.34, name, colours[name], look)
    uses = "self-attention, feed-forward,\ntext attention; output"
    seen = "as the exchange sees it:\nscale, shift; twice"
    layers = (  # AdaLN layer, y, rows, what they do, from, from with use_cross_timestep
        ("time_embed", 4.45, "9 rows + emb", f"video: {uses}", "timestep", None),
        ("av_cross_attn_video_scale_shift", 3.85, "4 rows", f"video {seen}", "timestep", "audio_sigma"),
        ("av_cross_attn_video_a2v_gate", 3.3, "1 row", "gate of audio to video", "timestep", "audio_sigma"),
        ("audio_time_embed", 2.75, "9 rows + emb", f"audio: {uses}", "audio_timestep", None),
        ("av_cross_attn_audio_scale_shift", 2.2, "4 rows", f"audio {seen}", "audio_timestep", "sigma"),
        ("av_cross_attn_audio_v2a_gate", 1.65, "1 row", "gate of video to audio", "audio_timestep", "sigma"),
        ("prompt_adaln", 1.0, "2 rows", "video's text keys and values (2.3 on)", "sigma", None),
        ("audio_prompt_adaln", 0.45, "2 rows", "audio's text keys and values (2.3 on)", "audio_sigma", None),
    )
    for name, y, count, does, source, crossed in layers:
        colour = look.audio if "audio_" in name else look.video
        box(ax, 2.75, y - 0.2, 2.5, 0.4, name, colour, look, 8.5)
        ax.text(5.33, y, count, fontsize=8, color=look.faint, va="center")
        ax.text(6.2, y, does, fontsize=8, color=look.ink, va="center")
        arrow(ax, (1.45, sources[source]), (2.75, y + 0.06), colours[source])
        if crossed:
            ax.annotate(
                "",
                (2.75, y - 0.08),
                (1.45, sources[crossed]),
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": colours[crossed],
                    "lw": 0.9,
                    "ls": (0, (3, 3)),
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
    ax.text(
        0.1,
        4.78,
        "dashed: in place of the solid line with use_cross_timestep",
        fontsize=8,
        color=look.faint,
        va="center",
    )
    return figure


def share(d: Architecture, step: str, stream: str, what: str) -> float:
    total = d.parameters if what == "parameters" else d.flops
    part: int = sum(getattr(row, what) for row in d.rows if (row.step, row.stream) == (step, stream))
    return part / total


def draw_cost(look: Look) -> Any:
    """Draw where parameters and FLOPs are, for three lengths of video."""
    sizes = {
        "97 frames, 512 x 320": (97, 320, 512),
        "121 frames, 768 x 512": (121, 512, 768),
        "257 frames, 1280 x 704": (257, 704, 1280),
    }
    found = {name: describe(LTX_2_3, lengths(LTX_2_3, *size)) for name, size in sizes.items()}
    first = next(iter(found.values()))
    bars = [("parameters", first, f"parameters\n{first.parameters / 1e9:.2f} billion")] + [
        ("flops", d, f"FLOPs\n{name}\n{d.lengths.video:,} tokens, {d.flops / 1e12:,.0f} T") for name, d in found.items()
    ]
    parts = [
        (step, stream)
        for step in ("self-attention", "text attention", "exchange", "feed-forward")
        for stream in ("video", "audio")
    ]
    figure, ax = plt.subplots(figsize=(WIDTH, 3.9))
    shades = {"self-attention": "ff", "text attention": "c0", "exchange": "88", "feed-forward": "55"}
    for y, (what, d, _) in enumerate(bars):
        left = 0.0
        for step, stream in parts:
            wide = share(d, step, stream, what)
            colour = look.video if stream == "video" else look.audio
            ax.barh(y, wide, left=left, height=0.62, color=colour + shades[step], edgecolor=look.paper, linewidth=1)
            if wide > 0.009 * len(step):
                ax.text(
                    left + wide / 2,
                    y,
                    f"{step}\n{wide:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=look.paper if shades[step] in ("ff", "c0") else look.ink,
                )
            left += wide
        ax.barh(y, 1 - left, left=left, height=0.62, color=look.faint + "88", edgecolor=look.paper, linewidth=1)
    ax.set_yticks(range(len(bars)), [label for *_, label in bars])
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), title="release 2.3; blue: video, orange: audio; both in the order of the block")
    ax.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    figure.tight_layout()
    return figure


FIGURES: dict[str, Callable[[Look], Any]] = {
    "block": draw_block,
    "rope": draw_rope,
    "modulation": draw_modulation,
    "cost": draw_cost,
}


def style(look: Look) -> dict[Any, Any]:
    return {
        "svg.hashsalt": "ltx2ref",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": look.ink,
        "axes.labelcolor": look.ink,
        "axes.edgecolor": look.faint,
        "axes.titlesize": 10,
        "xtick.color": look.ink,
        "ytick.color": look.ink,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default: docs/figures")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        for shade, look in LOOKS.items():
            with matplotlib.rc_context(style(look)):
                figure = draw(look)
                figure.savefig(folder / f"{name}-{shade}.svg", metadata={"Date": None, "Title": f"{name}, {shade}"})
                plt.close(figure)


if __name__ == "__main__":
    matplotlib.use("svg")
    main()
