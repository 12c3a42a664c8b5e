"""Every tap of the catalogue has its name and shape in three implementations, and recording it changes no bit.

pytest tests/parity/test_taps.py
"""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from ltx2ref import LTX2VideoTransformer3DModel, trace
from ltx2ref.parity import verify
from ltx2ref.parity.cases import CASES, Case, Inputs
from ltx2ref.parity.oracles import diffusers
from ltx2ref.parity.record import NATIVE_DTYPES
from ltx2ref.parity.trace.sketch import sketch
from ltx2ref.parity.trace.taps import Taps

BY_ID = {case.id: case for case in CASES}
needs_ltx_core = pytest.mark.ltx_core  # skipped where it is not installed: conftest.py

# Video has T tokens of width D, H heads of width d, N noise levels and R angles. For audio these are U, E, G, e, M and
# r. There are S text tokens.
CATALOGUE = {
    "video_coords": "B 3 T 2",
    "audio_coords": "B 1 U 2",
    "rope": "B T H R",
    "audio_rope": "B U G r",
    "cross_attn_rope": "B T G r",
    "cross_attn_audio_rope": "B U G r",
    "proj_in": "B T D",
    "audio_proj_in": "B U E",
    "time_embed": "N 256 D K*D",
    "audio_time_embed": "M 256 E k*E",
    "prompt_adaln": "B 256 D 2*D",
    "audio_prompt_adaln": "B 256 E 2*E",
    "av_cross_attn_video_scale_shift": "N 256 D 4*D",
    "av_cross_attn_audio_scale_shift": "M 256 E 4*E",
    "av_cross_attn_video_a2v_gate": "N 256 D 1*D",
    "av_cross_attn_audio_v2a_gate": "M 256 E 1*E",
    "caption_projection": "B S D",
    "audio_caption_projection": "B S E",
    "video": "B T D",
    "audio": "B U E",
    "norm_out": "B T D",
    "audio_norm_out": "B U E",
    "proj_out.input": "B T D",
    "audio_proj_out.input": "B U E",
    "proj_out": "B T C",
    "audio_proj_out": "B U c",
    "sample": "B T C",
    "audio_sample": "B U c",
}
# For each sub-layer: queries, keys, their widths, heads, width of a head, noise levels of queries and of keys.
ATTENTIONS = {
    "attn1": "T T D D H d N N",
    "audio_attn1": "U U E E G e M M",
    "attn2": "T S D D H d N B",
    "audio_attn2": "U S E E G e M B",
    "audio_to_video_attn": "T U D E G e N M",
    "video_to_audio_attn": "U T E D G e M N",
}
FEED_FORWARDS = {"ff": "T D N", "audio_ff": "U E M"}


def catalogue(blocks: int) -> dict[str, str]:
    shapes: dict[str, str] = {}
    for name, shape in CATALOGUE.items():
        if name.endswith("rope"):
            shapes |= {f"{name}.cos": shape, f"{name}.sin": shape}
        elif "256" in shape:
            n, first, second, third = shape.split()
            shapes |= {
                f"{name}.sinusoid": f"{n} {first}",
                f"{name}.emb": f"{n} {second}",
                f"{name}.linear": f"{n} {third}",
            }
        elif name in ("video", "audio"):
            shapes |= {f"transformer_blocks.{i}.{name}": shape for i in range(blocks)}
        else:
            shapes[name] = shape
    for i in range(blocks):
        shapes |= {f"transformer_blocks.{i}.{name}": shape for name, shape in inside_a_block()}
    return shapes


def inside_a_block() -> Iterator[tuple[str, str]]:
    for at, letters in ATTENTIONS.items():
        t, s, dim, kv_dim, h, d, n, m = letters.split()
        yield from {
            f"{at}.stream": f"B {t} {dim}",
            f"{at}.rows": f"{n} 3 {dim}",
            f"{at}.input": f"B {t} {dim}",
            f"{at}.norm_q": f"B {t} {h}*{d}",
            f"{at}.norm_k": f"B {s} {h}*{d}",
            f"{at}.to_v": f"B {s} {h}*{d}",
            f"{at}.q": f"B {t} {h} {d}",
            f"{at}.k": f"B {s} {h} {d}",
            f"{at}.sdpa": f"B {t} {h} {d}",
            f"{at}.to_gate_logits": f"B {t} {h}",
            f"{at}.gate": f"B {t} {h}",
            f"{at}.to_out": f"B {t} {dim}",
        }.items()
        if not at.endswith("attn1"):  # a stream that attends to itself
            yield from {f"{at}.context": f"B {s} {kv_dim}", f"{at}.context_rows": f"{m} 2 {kv_dim}"}.items()
    for at, letters in FEED_FORWARDS.items():
        t, dim, n = letters.split()
        yield from {
            f"{at}.stream": f"B {t} {dim}",
            f"{at}.rows": f"{n} 3 {dim}",
            f"{at}.input": f"B {t} {dim}",
            f"{at}.proj": f"B {t} 4*{dim}",
            f"{at}.activation": f"B {t} 4*{dim}",
            f"{at}.output": f"B {t} {dim}",
        }.items()


def fits(shape: str, x: Tensor, case: Case) -> bool:
    v, a = case.config.video, case.config.audio
    tokens = case.grid[0] * case.grid[1] * case.grid[2]
    sizes = {
        "B": case.batch,
        "T": tokens,
        "U": 11,
        "S": 9,
        "D": v.dim,
        "H": v.num_heads,
        "d": v.head_dim,
        "R": v.head_dim // 2,
        "E": a.dim,
        "G": a.num_heads,
        "e": a.head_dim,
        "r": a.head_dim // 2,
        "K": v.num_rows,
        "k": a.num_rows,
        "C": v.out_channels,
        "c": a.out_channels,
    }

    def size(letters: str) -> set[int]:
        if letters in ("N", "M"):  # one for each batch element, or one for each of its tokens
            return {case.batch, case.batch * sizes["T" if letters == "N" else "U"]}
        product = 1
        for letter in letters.split("*"):
            product *= int(letter) if letter.isdigit() else sizes[letter]
        return {product}

    letters = shape.split()
    return len(letters) == x.ndim and all(n in size(part) for n, part in zip(x.shape, letters, strict=True))


def prepared(case_id: str, dtype: str = "float32") -> tuple[LTX2VideoTransformer3DModel, Inputs]:
    case = BY_ID[case_id]
    return verify.build(case.config, NATIVE_DTYPES[dtype]), verify.cast(case.inputs(), NATIVE_DTYPES[dtype])


def hooks(model: nn.Module) -> int:
    return sum(
        len(kind)
        for module in model.modules()
        for kind in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._backward_hooks,
        )
    )


def output(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out = model(**inputs)
    return out.sample, out.audio_sample


def same(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_every_tap_of_the_catalogue_is_there_in_its_shape_and_no_other() -> None:
    shapes, seen = catalogue(blocks=2), set()
    for case in CASES:
        taps = verify.run(*prepared(case.id))
        wrong = {name: tuple(x.shape) for name, x in taps.items() if not fits(shapes.get(name, ""), x, case)}
        assert not wrong, case.id
        seen |= taps.keys()
    assert seen == shapes.keys()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("case_id", ["2.0/t2v", "2.3/i2v", "2.3/isolated", "2.5/everything"])
def test_a_trace_changes_no_bit_of_the_output_and_leaves_no_hook_behind(case_id: str, dtype: str) -> None:
    model, inputs = prepared(case_id, dtype)
    before, plain = hooks(model), output(model, inputs)
    with trace(model) as taps:
        assert hooks(model) > before
        traced = output(model, inputs)
    assert hooks(model) == before == 0
    assert same(plain, traced) and same(plain, (taps["sample"], taps["audio_sample"]))
    recorded = len(taps)
    assert same(plain, output(model, inputs)) and len(taps) == recorded


def test_a_forward_that_raises_leaves_no_hook_behind() -> None:
    model, inputs = prepared("2.3/t2v")
    plain, mine = output(model, inputs), model.proj_in.register_forward_hook(lambda *_: None)

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("out of memory")

    for name in ("transformer_blocks.1.attn2", "transformer_blocks.0.ff.net.2", "audio_proj_out"):
        with (
            patch.object(model.get_submodule(name), "forward", fail),
            pytest.raises(RuntimeError, match="memory"),
            trace(model) as taps,
        ):
            output(model, inputs)
        assert "proj_in" in taps and "audio_sample" not in taps
        assert hooks(model) == 1
    mine.remove()
    assert same(plain, output(model, inputs))


def test_the_taps_are_those_of_the_last_forward() -> None:
    model, inputs = prepared("2.3/t2v")
    once = verify.run(model, inputs)
    with trace(model) as taps:
        output(model, inputs | {"fps": 30.0, "hidden_states": -inputs["hidden_states"]})
        output(model, inputs)
    assert list(taps) == list(once) and same(taps.values(), once.values())


def test_autocast_is_traced_as_it_computes() -> None:
    model, inputs = prepared("2.3/i2v")
    with torch.autocast("cpu", torch.bfloat16):
        plain = output(model, inputs)
        with trace(model) as taps:
            traced = output(model, inputs)
    assert same(plain, traced) and list(taps) == list(verify.run(model, inputs))
    assert taps["transformer_blocks.0.attn1.to_v"].dtype == taps["transformer_blocks.1.ff.proj"].dtype == torch.bfloat16
    assert taps["rope.cos"].dtype == torch.float32


def test_a_trace_keeps_what_it_is_asked_to() -> None:
    model, inputs = prepared("2.5/everything", "bfloat16")
    full = verify.run(model, inputs)
    with torch.no_grad(), trace(model, keep=sketch) as taps:
        model(**inputs)
    assert list(taps) == list(full) and all(taps[name] == sketch(x) for name, x in full.items())


def test_taps_are_copies() -> None:
    """Tensors that are changed in place afterwards, or by the next block, stay in the trace as they were."""
    model, inputs = prepared("2.3/t2v")
    taps = verify.run(model, inputs)
    kept = {name: x.clone() for name, x in taps.items()}
    for name in taps:
        x = taps[name]
        taps[name] = torch.zeros_like(x)
        x.zero_()
    assert same(verify.run(model, inputs).values(), kept.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "case_id",
    [
        "2.0/t2v",
        "2.0/interleaved",
        "2.0/isolated",
        "2.3/i2v",
        "2.3/stg-one-of-batch",
        "2.3/coords",
        "2.3/one-stream-flags",
        "2.5/everything",
    ],
)
def test_diffusers_has_the_same_taps_to_the_bit(case_id: str) -> None:
    model, inputs = prepared(case_id)
    port = diffusers.build_diffusers(model.config.to_diffusers(), model.state_dict(), torch.float32)
    with torch.no_grad(), trace(port, diffusers.LAYOUT) as theirs:
        diffusers.run_diffusers(port, inputs)
    assert hooks(port) == 0
    assert_same_taps(verify.run(model, inputs), theirs)


@pytest.mark.slow
@needs_ltx_core
@pytest.mark.parametrize(
    "case_id",
    [
        "2.0/cross-timestep",
        "2.0/isolated",
        "2.3/cross-timestep",
        "2.3/i2v-cross-timestep",
        "2.3/stg-one-of-batch",
        "2.3/interleaved",
    ],
)
def test_ltx_core_has_the_same_taps_to_the_bit(case_id: str) -> None:
    from ltx2ref.parity.oracles import ltx_core

    model, inputs = prepared(case_id)
    inputs |= {"use_cross_timestep": True}
    port = ltx_core.build_ltx_core(model.config.to_diffusers(), model.state_dict(), torch.float32)
    with torch.no_grad(), trace(port.model, ltx_core.LAYOUT) as theirs:
        ltx_core.run_ltx_core(port, inputs)
    assert hooks(port) == 0
    assert_same_taps(verify.run(model, inputs), theirs)


def assert_same_taps(ours: Taps, theirs: Taps) -> None:
    assert ours.keys() == theirs.keys()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}
    assert [name for name, x in ours.items() if not same([x], [theirs[name]])] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("case_id", ["2.0/interleaved", "2.3/i2v", "2.3/isolated", "2.5/everything"])
def test_a_models_own_taps_in_place_of_themselves_change_no_bit(case_id: str, dtype: str) -> None:
    model, inputs = prepared(case_id, dtype)
    taps = verify.run(model, inputs)
    again = verify.run(model, inputs, taps)
    assert list(taps) == list(again) and same(taps.values(), again.values())


# For each tap, the first tap that is computed from it.
FOLLOWED_BY = {
    "rope.cos": "transformer_blocks.0.attn1.q",
    "cross_attn_audio_rope.sin": "transformer_blocks.0.audio_to_video_attn.k",
    "audio_time_embed.sinusoid": "audio_time_embed.emb",
    "av_cross_attn_video_a2v_gate.linear": "transformer_blocks.0.audio_to_video_attn.rows",
    "proj_in": "transformer_blocks.0.attn1.stream",
    "transformer_blocks.0.attn1.input": "transformer_blocks.0.attn1.norm_q",
    "transformer_blocks.0.attn1.sdpa": "transformer_blocks.0.attn1.to_out",
    "transformer_blocks.0.audio_attn1.to_gate_logits": "transformer_blocks.0.audio_attn1.gate",
    "transformer_blocks.0.attn2.stream": "transformer_blocks.0.attn2.input",
    "transformer_blocks.1.attn2.context": "transformer_blocks.1.attn2.norm_k",
    "transformer_blocks.1.video_to_audio_attn.k": "transformer_blocks.1.video_to_audio_attn.sdpa",
    "transformer_blocks.1.ff.proj": "transformer_blocks.1.ff.activation",
    "transformer_blocks.1.ff.output": "transformer_blocks.1.video",
    "transformer_blocks.0.video": "transformer_blocks.1.attn1.stream",
    "transformer_blocks.1.audio": "audio_norm_out",
    "norm_out": "proj_out.input",
    "audio_proj_out": "audio_sample",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLLOWED_BY)
def test_another_value_at_a_tap_changes_what_follows_and_nothing_before(name: str) -> None:
    model, inputs = prepared("2.3/t2v")
    taps = verify.run(model, inputs)
    changed = verify.run(model, inputs, {name: taps[name].roll(1, 0) + 0.5})
    differing = [at for at in taps if not torch.equal(taps[at], changed[at])]
    assert differing[0] == FOLLOWED_BY[name]
    assert "sample" in differing or "audio_sample" in differing
