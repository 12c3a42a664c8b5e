"""Sketches are what docs/trace-format.md says, tell differences within 20 %, and trace files keep what they are given.

pytest tests/parity/test_tracefile.py -s                          # prints how good the estimates are
LTX2REF_CORPUS=full pytest tests/parity/test_tracefile.py -s      # of every mutant in four cases: the table in the docs
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import mutants
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltx2ref.parity import verify
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.record import NATIVE_DTYPES
from ltx2ref.parity.trace import sketch as sketches
from ltx2ref.parity.trace.probe import threads
from ltx2ref.parity.trace.sketch import BUCKETS, HIGH, LOW, SKETCHED_CHUNK, SPELLING, Estimate, Sketch, estimate, sketch
from ltx2ref.parity.trace.taps import Taps, trace
from ltx2ref.parity.trace.tracefile import TRACE_SCHEMA, Trace, TraceError, load_trace, renamed, save_trace

FULL = os.environ.get("LTX2REF_CORPUS") == "full"
FORMAT = (Path(__file__).parents[2] / "docs" / "trace-format.md").read_text()
BY_ID = {case.id: case for case in CASES}
NAN, INF = math.nan, math.inf
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# ---------------------------------------------------------------- the oracle: plain integers, and fsum
def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    return x ^ x >> 15


def hash_of(index: int) -> int:
    return mix(mix(index // 2**32) ^ index % 2**32)


def place(index: int) -> tuple[int, int]:
    """Return bucket and sign of an element."""
    return hash_of(index) // 2**24, -1 if hash_of(index) & 2**23 else 1


def bits_of(x: Tensor) -> list[int]:
    raw, size = x.contiguous().view(torch.uint8).numpy().tobytes(), x.element_size()
    parts = [raw[i : i + size] for i in range(0, len(raw), size)]
    if size == 8:
        return [mix(int.from_bytes(part[:4], "little")) ^ int.from_bytes(part[4:], "little") for part in parts]
    return [int.from_bytes(part, "little", signed=True) for part in parts]


def oracle(x: Tensor) -> tuple[list[float], list[float], int]:
    """Return the buckets, the sum of absolute values in each, and the checksum."""
    flat = x.reshape(-1)
    addends: list[list[float]] = [[] for _ in range(BUCKETS)]
    for i, value in enumerate(flat.tolist()):
        bucket, sign = place(i)
        addends[bucket].append(sign * float(value) if math.isfinite(value) else 0.0)
    checksum = sum(b * (2 * hash_of(i) + 1) for i, b in enumerate(bits_of(flat))) % 2**64
    return [math.fsum(a) for a in addends], [math.fsum(map(abs, a)) for a in addends], checksum


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a: Sketch, b: Sketch) -> bool:
    """Compare as two machines agree: checksums exactly, and sums within 1e-12."""
    sums = (a.buckets - b.buckets).norm() <= 1e-12 * a.norm and abs(a.norm - b.norm) <= 1e-12 * a.norm
    return bool(sums) and Sketch(**vars(a) | {"buckets": b.buckets, "norm": b.norm}) == b


# ---------------------------------------------------------------- the sketch
@pytest.mark.parametrize("dtype", SPELLING, ids=str)
def test_a_sketch_is_what_plain_integers_say(dtype: torch.dtype) -> None:
    x = (normal(3, 5, 41) * 40).to(dtype)
    found, (buckets, sizes, checksum) = sketch(x), oracle(x)
    for value, expected, size in zip(found.buckets.tolist(), buckets, sizes, strict=True):
        assert abs(value - expected) <= 1e-15 * size
    assert found.checksum == checksum and (found.shape, found.dtype) == ((3, 5, 41), dtype)
    assert found.norm == pytest.approx(math.sqrt(math.fsum(v * v for v in x.double().flatten().tolist())), rel=1e-15)
    assert (found.min, found.max, found.strange) == (x.double().min(), x.double().max(), (0, 0, 0))


def test_indices_of_more_than_32_bits_are_hashed_as_plain_integers_say() -> None:
    for chunk in (0, 1, 2**32 // SKETCHED_CHUNK - 1, 2**32 // SKETCHED_CHUNK, 5 * 2**32 // SKETCHED_CHUNK + 7):
        odd = sketches.odd_hashes(chunk, torch.device("cpu"))
        for i in (0, 1, 12345, SKETCHED_CHUNK - 1):
            assert odd[i] == 2 * hash_of(chunk * SKETCHED_CHUNK + i) + 1
            assert divmod(int(odd[i] >> 24), 2) == (
                place(chunk * SKETCHED_CHUNK + i)[0],
                place(chunk * SKETCHED_CHUNK + i)[1] < 0,
            )


def test_a_tensor_of_many_chunks_is_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(2 * SKETCHED_CHUNK + 17, dtype=torch.bfloat16)
    whole = sketch(x)
    sketches.odd_hashes.cache_clear()
    monkeypatch.setattr(sketches, "SKETCHED_CHUNK", 2**12)
    assert close(sketch(x), whole)
    sketches.odd_hashes.cache_clear()
    buckets = np.zeros(BUCKETS)
    some = np.arange(len(x), dtype=np.uint32)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        some = (some ^ some >> np.uint32(shift)) * np.uint32(factor)
    some ^= some >> np.uint32(15)
    np.add.at(buckets, some >> np.uint32(24), x.double().numpy() * np.where(some >> np.uint32(23) & 1, -1.0, 1.0))
    assert np.allclose(whole.buckets.numpy(), buckets, rtol=0, atol=1e-12 * whole.norm)


def test_values_that_are_not_finite_are_counted_and_else_count_as_zero() -> None:
    x, zeros = normal(9, 50), torch.tensor([[NAN, INF, -INF, INF]])
    x[2:4, 10:14], clean = zeros, x.clone()
    clean[2:4, 10:14] = 0
    found, expected = sketch(x), sketch(clean)
    assert found.strange == (2, 4, 2) and torch.equal(found.buckets, expected.buckets)
    assert (found.norm, found.min, found.max) == (expected.norm, expected.min, expected.max)
    assert found.checksum == oracle(x)[2] != expected.checksum


@pytest.mark.parametrize("x", [torch.full((3,), NAN), torch.zeros(0, 7), torch.tensor([INF])])
def test_without_finite_elements_there_are_no_extrema(x: Tensor) -> None:
    found = sketch(x)
    assert (found.min, found.max, found.norm, found.buckets.abs().max()) == (None, None, 0, 0)
    assert estimate(found, found) == (0, 0, 0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.expand(4, -1, -1),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2],
        lambda x: x[0, 1, 2],
        lambda x: x[:, 1:],
        lambda x: x.clone().requires_grad_(),
    ],
)
def test_strides_do_not_matter(view: Callable[[Tensor], Tensor]) -> None:
    x = view(normal(1, 6, 8))
    assert sketch(x) == sketch(x.detach().clone(memory_format=torch.contiguous_format))


def test_sketches_repeat_themselves_to_the_bit_with_any_number_of_threads() -> None:
    x = normal(3, SKETCHED_CHUNK)
    with threads(1):
        first = sketch(x)
    with threads(2):
        assert sketch(x) == sketch(x) == first
    with torch.inference_mode():
        assert sketch(x) == first


class LargestResult(TorchDispatchMode):
    """A mode that notes the number of elements of the largest result of any operation, except for views of `x`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.largest = x, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for y in result if isinstance(result, list | tuple) else [result]:
            if isinstance(y, Tensor) and y.untyped_storage().data_ptr() != self.x.untyped_storage().data_ptr():
                self.largest = max(self.largest, y.numel())
        return result


def test_memory_does_not_grow_with_the_tensor() -> None:
    x = normal(20 * SKETCHED_CHUNK, dtype=torch.bfloat16)
    with LargestResult(x) as mode:
        sketch(x)
    assert mode.largest == SKETCHED_CHUNK


def test_a_dtype_without_real_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot sketch torch\.complex64, only torch\.bool"):
        sketch(torch.zeros(3, dtype=torch.complex64))


# ---------------------------------------------------------------- the checksum
def test_bits_that_no_sum_sees_are_seen_by_the_checksum() -> None:
    x = normal(1000)
    x[500] = 0
    negative = x.clone()
    negative[500] = -0.0
    assert estimate(sketch(x), sketch(negative))[:2] == (0, 0) and sketch(x).same_bits(sketch(negative)) is False
    assert sketch(x).same_bits(sketch(x.clone())) is True
    assert sketch(x).same_bits(sketch(x.double())) is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_bit_changes_the_checksum_and_so_do_swapped_elements(dtype: torch.dtype) -> None:
    x = normal(300, dtype=dtype)
    raw = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    seen = {sketch(x).checksum}
    for index in (0, 1, 150, 299):
        for bit in (0, 5, 8 * x.element_size() - 1):
            y = x.clone()
            y.view(raw)[index] ^= (1 << bit) - ((1 << 64) if bit == 63 else 0)
            seen.add(sketch(y).checksum)
    for i, j in pairwise((0, 10, 150, 299)):
        y = x.clone()
        y[i], y[j] = x[j], x[i]
        seen.add(sketch(y).checksum)
    seen.add(sketch(-x).checksum)
    assert len(seen) == 1 + 12 + 3 + 1


def test_without_a_checksum_nothing_is_said_of_bits() -> None:
    x = sketch(normal(10))
    assert without_checksum(x).same_bits(x) is None and x.same_bits(without_checksum(x)) is None


# ---------------------------------------------------------------- the estimate
def without_checksum(x: Sketch) -> Sketch:
    return Sketch(**vars(x) | {"checksum": None})


def relative(a: Tensor, b: Tensor) -> float:
    return ((b.double() - a.double()).norm() / a.double().norm()).item()


def test_a_sketch_is_not_away_from_itself() -> None:
    x = sketch(normal(1000))
    assert estimate(x, x) == Estimate(0, 0, 0)
    guessed = estimate(x, without_checksum(x))
    assert guessed[:2] == (0, 0) and 0 < guessed.high < 1e-8
    assert estimate(sketch(torch.zeros(3)), sketch(torch.zeros(3, dtype=torch.float64))) == (0, 0, 0)


def test_one_element_that_differs_is_told_exactly() -> None:
    x = normal(7, 1000)
    for index in range(50):
        y = x.clone()
        y[index % 7, index] += 0.25
        assert estimate(sketch(x), sketch(y)).relative == pytest.approx(relative(x, y), rel=1e-12)


def test_the_norms_bound_the_estimate() -> None:
    x = normal(1000)
    for factor in (1000.0, 2.0, 0.001, -1.0):
        found = estimate(sketch(x), sketch(x * factor))
        assert abs(abs(factor) - 1) * (1 - 1e-6) <= found.low and found.high <= (1 + abs(factor)) * (1 + 1e-6)
        assert found.low * 0.999 <= abs(factor - 1) <= found.high * 1.001


def test_two_equal_differences_in_one_bucket_cancel_or_double_and_the_checksum_still_sees_them() -> None:
    places: dict[int, tuple[int, int]] = {}
    x, found = normal(5000), set()
    for i in range(5000):
        bucket, sign = place(i)
        if bucket in places and len(found) < 2:
            j, other = places[bucket]
            y = x.double()
            y[i] += 0.5
            y[j] += 0.5
            guess = estimate(sketch(x.double()), sketch(y))
            ratio = guess.relative / relative(x, y)
            assert ratio == pytest.approx(math.sqrt(2)) if sign == other else ratio < 0.1
            assert sketch(x.double()).same_bits(sketch(y)) is False and guess != (0, 0, 0)
            found.add(sign == other)
        places[bucket] = i, sign
    assert found == {True, False}


def test_other_counts_of_what_is_not_finite_are_infinitely_far_and_other_shapes_an_error() -> None:
    x = normal(10)
    y = x.clone()
    y[3] = NAN
    assert estimate(sketch(x), sketch(y)) == (INF, INF, INF) == estimate(sketch(x * 0), sketch(x))
    assert estimate(sketch(y), sketch(y.double())).relative == 0
    with pytest.raises(ValueError, match=r"different shapes: \[10\] and \[2, 5\]"):
        estimate(sketch(x), sketch(x.view(2, 5)))


def error_and_miss(a: Tensor, b: Tensor) -> tuple[float, bool]:
    """Return the estimate's error, estimated / true - 1, and whether the truth is outside its interval."""
    found, true = estimate(sketch(a), sketch(b)), relative(a, b)
    return found.relative / true - 1, not found.low <= true <= found.high


@pytest.mark.slow
def test_the_interval_holds_the_truth_in_95_of_100_cases_whatever_differs() -> None:
    draw = random.Random(0)
    base = torch.ones(2**12)
    for size in (1, 2, 3, 4, 5, 6, 7, 9, 11, 20, 100, 3000):
        errors, misses = [], 0
        for _ in range(200):
            y = base.clone()
            y[draw.sample(range(2**12), size)] += 0.5
            error, missed = error_and_miss(base, y)
            errors.append(abs(error))
            misses += missed
        assert misses <= 10 and sum(error > 0.2 for error in errors) <= 10, size


@pytest.mark.parametrize("stride", [2, 3, 7, 8, 64, 100, 128, 256, 1000, 1024])
def test_regular_differences_are_told_as_well_as_random_ones(stride: int) -> None:
    x = normal(2**17)
    results = []
    for offset in range(0, stride, max(1, stride // 16)):
        y = x.clone()
        y[offset::stride] *= 1.01
        results.append(error_and_miss(x, y))
    assert sum(missed for _, missed in results) <= 1 and max(abs(error) for error, _ in results) < 0.2


def test_the_interval_is_of_3_5_standard_deviations_of_chi_square() -> None:
    draws = torch.distributions.Chi2(torch.tensor(256.0))
    torch.manual_seed(0)
    ratio = (draws.sample((200_000,)) / BUCKETS).sqrt()
    assert (ratio.std() * math.sqrt(2 * BUCKETS)).item() == pytest.approx(1, rel=0.01)
    assert ((ratio * LOW > 1) | (ratio * HIGH < 1)).double().mean() < 0.001 and LOW > 0.864 and HIGH < 1.18


# ---------------------------------------------------------------- real taps
def taps_of(case_id: str, dtype: str, mutant: str | None = None, double: bool = False) -> Taps:
    case = BY_ID[case_id]
    model = verify.build(case.config, NATIVE_DTYPES[dtype])
    inputs = verify.cast(case.inputs(), NATIVE_DTYPES[dtype])
    if double:
        model, inputs = model.double(), verify.moved(inputs, lambda x: x.double() if x.is_floating_point() else x)
    if mutant is None:
        return verify.run(model, inputs)
    with mutants.inject(mutant, model):
        return verify.run(model, inputs)


SAMPLE = ("gelu-erf", "rope-axis-major", "scale-shift-swapped", "sequential-exchange", "unscaled-gate-timestep")
# That case perturbs block 0, before which there is no block.
UNFIT = {"2.5/everything": {"stg-wrong-block"}}


def candidates(case_id: str) -> dict[str, Callable[[], Taps]]:
    """Return candidates for a float32 reference: bfloat16, float64, and bugs."""
    chosen = [name for name in mutants.MUTANTS if FULL or name in SAMPLE]
    return {
        "bfloat16": lambda: taps_of(case_id, "bfloat16"),
        "float64": lambda: taps_of(case_id, "float32", double=True),
    } | {
        name: lambda name=name: taps_of(case_id, "float32", name)  # type: ignore[misc]
        for name in chosen
        if name not in UNFIT.get(case_id, set())
    }


def through_a_file(taps: Mapping[str, Any], path: Path) -> dict[str, Any]:
    save_trace(path, {name: sketch(x) for name, x in taps.items()}, implementation="ltx2ref", fingerprint={})
    return load_trace(path).taps


@pytest.mark.slow
def test_on_real_taps_the_estimate_is_within_20_percent_for_95_of_100(tmp_path: Path) -> None:
    found: dict[str, list[tuple[float, bool]]] = {"bfloat16": [], "float64": [], "bugs": []}
    for case_id in ("2.3/t2v", "2.0/i2v", "2.5/everything", "2.3/text-masks") if FULL else ("2.3/t2v",):
        reference = taps_of(case_id, "float32")
        stored = through_a_file(reference, tmp_path / "reference")
        for kind, candidate in candidates(case_id).items():
            other = {name: x for name, x in candidate().items() if name in reference}
            for name, x in through_a_file(other, tmp_path / "candidate").items():
                if other[name].shape != reference[name].shape:
                    continue
                true, guess = relative(reference[name], other[name]), estimate(stored[name], x)
                assert (true == 0) <= (guess.relative == 0), name
                if true > 1e-8:
                    found.get(kind, found["bugs"]).append((guess.relative / true, guess.low <= true <= guess.high))
    print()
    for kind, results in found.items():
        ratios, inside = np.array(results).T
        print(
            f"{kind:9} {len(results):6} taps; estimated / true:",
            *np.quantile(ratios, [0, 0.025, 0.5, 0.975, 1]).round(3),
            f"; beyond 20 %: {(abs(ratios - 1) > 0.2).mean():.4f}",
            f"; outside the interval: {1 - inside.mean():.4f}",
        )
        assert len(results) > 100 and (abs(ratios - 1) <= 0.2).mean() >= 0.99 and inside.mean() >= 0.99


def test_sketches_can_be_made_while_the_model_runs() -> None:
    case = BY_ID["2.3/t2v"]
    model, inputs = verify.build(case.config, torch.float32), case.inputs()
    with torch.no_grad(), trace(model, keep=sketch) as taps:
        model(**inputs)
    full = verify.run(model, inputs)
    assert taps == {name: sketch(x) for name, x in full.items()} and len(full) > 200


# ---------------------------------------------------------------- files
FINGERPRINT = {"torch": "2.13.0", "device": "cpu", "threads": 2, "tf32": False, "sdpa": ["math", "flash"]}


def saved(path: Path, taps: Mapping[str, Tensor | Sketch], **more: Any) -> Trace:
    save_trace(path, taps, **{"implementation": "mine", "fingerprint": FINGERPRINT} | more)
    return load_trace(path)


def same(a: Tensor | Sketch, b: Tensor | Sketch) -> bool:
    if isinstance(a, Sketch) or isinstance(b, Sketch):
        return a is b or bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and sketch(a).same_bits(sketch(b)) is True


def test_a_trace_comes_back_as_it_was_in_its_order(tmp_path: Path) -> None:
    config, inputs = BY_ID["2.3/t2v"].config.to_diffusers(), {"hidden_states": "ab" * 32}
    taps = {f"z.{dtype!s}": (normal(3, 5) * 40).to(dtype) for dtype in SPELLING} | {
        "rope.cos": normal(1, 3).expand(4, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5),
        "turned": normal(3, 4).T,
        'äöü "quoted"': normal(2),
        "grad": normal(2).requires_grad_(),
    }
    more = {"case": "2.3/t2v", "conventions": {"exchange": "other"}}
    found = saved(tmp_path / "trace", taps, config=config, inputs=inputs, **more)
    assert list(found.taps) == list(taps) and all(same(found.taps[name], x) for name, x in taps.items())
    assert found[1:] == ("mine", FINGERPRINT, json.loads(json.dumps(config)), inputs, TRACE_SCHEMA, *more.values())
    with safe_open(tmp_path / "trace", "pt") as file:
        assert all(same(file.get_tensor(name), x) for name, x in taps.items())


def test_a_sketch_comes_back_rounded_to_31_bits_and_then_as_it_was(tmp_path: Path) -> None:
    heavy = normal(400)
    heavy[7] = 1e6
    x = {
        "b": normal(20, 30),
        "a": normal(4) * 1e-30,
        "nan": torch.tensor([NAN, INF, 3, -INF]),
        "heavy": heavy,
        "zero": torch.zeros(5),
        "empty": torch.zeros(0),
        "large": normal(9).double() * 1e150,
    }
    taps = {name: sketch(y) for name, y in x.items()} | {"no checksum": without_checksum(sketch(normal(3)))}
    once = saved(tmp_path / "once", taps)
    assert list(once.taps) == list(taps)
    for name, y in once.taps.items():
        assert isinstance(y, Sketch) and close(y, Sketch(**vars(taps[name]) | {"buckets": y.buckets})), name
        assert (y.buckets - taps[name].buckets).abs().max() <= 2**-30 * taps[name].buckets.abs().max()
        assert estimate(taps[name], y).relative < 2e-9
    assert saved(tmp_path / "twice", once.taps) == once


def test_full_tensors_and_sketches_share_a_file(tmp_path: Path) -> None:
    taps = {"c": normal(3), "b": sketch(normal(4)), "a": normal(5), "0": sketch(normal(6))}
    found = saved(tmp_path / "trace", taps).taps
    assert list(found) == ["c", "b", "a", "0"]
    assert [isinstance(x, Sketch) for x in found.values()] == [False, True, False, True]


@pytest.mark.slow
def test_a_sketch_trace_of_the_full_model_is_under_8_megabytes(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{i}.audio_to_video_attn.context_rows.{j}" for i in range(48) for j in range(110)]
    some = [sketch(normal(1, 1024, 8, seed=seed)) for seed in range(7)]
    taps = {name: Sketch(**vars(some[i % 7]) | {"shape": (1, 1024, 4096)}) for i, name in enumerate(names)}
    assert saved(tmp_path / "trace", taps, config=BY_ID["2.3/t2v"].config.to_diffusers()).taps.keys() == taps.keys()
    size = (tmp_path / "trace").stat().st_size
    print(f"\n{len(taps)} sketches: {size} bytes")
    assert size < 7.2e6


def test_a_file_that_is_there_is_replaced_and_one_that_is_read_keeps_its_numbers(tmp_path: Path) -> None:
    before = saved(tmp_path / "trace", {"x": torch.ones(10_000)})
    after = saved(tmp_path / "trace", {"x": torch.zeros(10)})
    assert before.taps["x"].sum() == 10_000 and after.taps["x"].shape == (10,)
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize(
    ("taps", "more", "message"),
    [
        ({"x": torch.zeros(3, dtype=torch.complex64)}, {}, "x: torch.complex64 on cpu cannot be stored"),
        ({"x": torch.zeros(3, device="meta")}, {}, "x: torch.float32 on meta cannot be stored"),
        ({"sketches": torch.zeros(3)}, {}, "cannot be names of taps"),
        ({}, {"fingerprint": {"a": object()}}, "not JSON: .*object"),
        ({}, {"fingerprint": {"a": NAN}}, "not JSON compliant"),
        ({"x": sketch(torch.ones(3).double() * 1e200)}, {}, "x: expected 256 buckets and a norm that are finite"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, taps: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=message) as error:
        saved(tmp_path / "trace", taps, **more)
    assert str(error.value).startswith(str(tmp_path / "trace: ")) and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "trace", tmp_path / "folder"):
        with pytest.raises(TraceError, match=rf"{path}: cannot be written: "):
            saved(path, {"x": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# ---------------------------------------------------------------- files of others
def test_tensors_without_any_metadata_are_a_trace(tmp_path: Path) -> None:
    x = {"transformer_blocks.0.video": normal(2, 3), "proj_in": normal(2, 3, dtype=torch.bfloat16)}
    save_file(x, tmp_path / "port.safetensors")
    found = load_trace(tmp_path / "port.safetensors")
    assert found.taps.keys() == x.keys() and all(same(found.taps[name], y) for name, y in x.items())
    assert found[1:] == ("port", {}, None, {}, None, None, None)
    save_file(x, tmp_path / "port.safetensors", {"format": "pt", "trace": '{"schema": 1}'})
    assert load_trace(tmp_path / "port.safetensors")[1:] == ("port", {}, None, {}, 1, None, None)


LEAST = {"name": "x", "shape": [3], "dtype": "F32", "norm": 5}


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.float64], ids=str)
def test_a_sketch_may_lack_all_but_its_buckets_norm_shape_and_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    buckets = torch.arange(BUCKETS)[None].to(dtype)
    save_file({"sketches": buckets}, tmp_path / "x", {"trace": json.dumps({"schema": 1, "sketches": [LEAST]})})
    found = load_trace(tmp_path / "x").taps
    assert found == {"x": Sketch((3,), torch.float32, 5, None, None, 0, 0, 0, torch.arange(256.0).double(), None)}
    more = LEAST | {"exponent": -2, "min": -1, "nan": 2, "checksum": None, "future": [1]}
    save_file({"sketches": buckets}, tmp_path / "x", {"trace": json.dumps({"schema": 1, "sketches": [more]})})
    found = load_trace(tmp_path / "x").taps
    assert found == {"x": Sketch((3,), torch.float32, 5, -1, None, 2, 0, 0, torch.arange(256.0).double() / 4, None)}


def trace_of(**said: Any) -> dict[str, Any]:
    return {"schema": 1} | said


def one(**said: Any) -> dict[str, Any]:
    return trace_of(sketches=[LEAST | said])


ROW = torch.ones(1, BUCKETS)


@pytest.mark.parametrize(
    ("tensors", "said", "message"),
    [
        ({}, {"schema": 2}, "schema 2, expected 1"),
        ({}, {}, "schema None, expected 1"),
        ({}, {"schema": True}, "schema True, expected 1"),
        ({}, trace_of(taps={}), "taps: expected a list"),
        ({}, trace_of(taps=[["x"]]), "taps: expected names"),
        ({}, trace_of(config=[]), "config: expected a dict"),
        ({}, trace_of(implementation=3), "implementation: expected a str"),
        ({"x": ROW}, trace_of(taps=["x", "x"]), "taps: a name occurs twice"),
        ({"x": ROW}, trace_of(taps=["x", "y"]), "y: in the list of taps or in the file, but not in both"),
        ({"x": ROW, "y": ROW.clone()}, trace_of(taps=["x"]), "y: in the list of taps or in the file, but not in both"),
        ({"x": ROW.clone(), "sketches": ROW}, one(), "x: both a tensor and a sketch"),
        ({}, one(), "1 sketches are described, but there is no tensor sketches"),
        ({"sketches": ROW}, trace_of(), r"sketches F32 \[1, 256\]: expected .* \[0, 256\]"),
        ({"sketches": ROW[:, 1:]}, one(), r"sketches F32 \[1, 255\]: expected"),
        ({"sketches": ROW.half()}, one(), r"sketches F16 \[1, 256\]: expected I32 or F32 or F64"),
        ({"sketches": ROW * NAN}, one(), "x: buckets that are not finite"),
        ({"sketches": ROW.double() * 1e300}, one(exponent=900), "x: buckets that are not finite"),
        ({"sketches": ROW}, trace_of(sketches=[3]), "sketch 0: expected a name"),
        ({"sketches": ROW}, one(name=None), "sketch 0: expected a name"),
        ({"sketches": ROW.expand(2, 256).clone()}, trace_of(sketches=[LEAST, LEAST]), "sketch 1: expected a name"),
        ({"sketches": ROW}, one(shape=None), "x: shape: expected a list of whole numbers, got None"),
        ({"sketches": ROW}, one(shape=[-1]), "x: shape: expected a list of whole numbers"),
        ({"sketches": ROW}, one(dtype="Q4_K"), "x: dtype: expected one of BOOL"),
        ({"sketches": ROW}, one(dtype=[]), "x: dtype: expected one of BOOL"),
        ({"sketches": ROW}, one(norm=-1), "x: norm: expected a finite number that is not negative, got -1"),
        ({"sketches": ROW}, one(norm=10**400), "x: norm: expected a finite number"),
        ({"sketches": ROW}, one(min="0"), "x: min: expected a finite number, got 0"),
        ({"sketches": ROW}, one(nan=0.5), "x: nan: expected a whole number, got 0.5"),
        ({"sketches": ROW}, one(exponent=5000), "x: exponent: expected a small whole number, got 5000"),
        ({"sketches": ROW}, one(checksum="0x" + "1" * 14), "x: checksum: expected 16 hexadecimal digits"),
        ({"x": torch.zeros(3, dtype=torch.complex64)}, trace_of(), "x: dtype C64, expected one of BOOL"),
    ],
)
def test_a_contradictory_trace_is_refused_with_the_file_and_the_tap(
    tmp_path: Path, tensors: dict[str, Tensor], said: dict[str, Any], message: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", {"trace": json.dumps(said)})
    with pytest.raises(TraceError, match=message) as error:
        load_trace(tmp_path / "x.safetensors")
    assert str(error.value).startswith(str(tmp_path / "x.safetensors: "))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1, "schema": 1}', '{"schema": NaN}', "[" * 5000])
def test_metadata_that_are_not_a_json_object_are_refused(tmp_path: Path, text: str) -> None:
    save_file({"x": ROW}, tmp_path / "x", {"trace": text})
    with pytest.raises(TraceError, match="metadata 'trace': "):
        load_trace(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04", b"\x80\2", b"\0"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content.ljust(64, b"\0") if content else content)
    with pytest.raises(TraceError, match=str(tmp_path / "x")):
        load_trace(tmp_path / "x")
    with pytest.raises(TraceError, match="cannot be read"):
        load_trace(tmp_path / "none")


def test_an_empty_tensor_of_impossible_size_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(TraceError, match="x: F32"):
        load_trace(tmp_path / "x")


def test_a_damaged_file_is_refused_or_a_trace(tmp_path: Path) -> None:
    taps = {"a": normal(3), "b": sketch(normal(4)), "c": torch.tensor([True]), "d": sketch(normal(5))}
    saved(tmp_path / "good", taps)
    good, draw, refused = (tmp_path / "good").read_bytes(), random.Random(0), 0
    for _ in range(800):
        bad = bytearray(good)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(good) - 2 * 4 * BUCKETS)  # counts the header and the full tensors
            bad[at] = draw.choice((draw.randrange(256), ord(draw.choice('{}[]",:0129eE-\\ '))))
        if draw.random() < 0.2:
            del bad[draw.randrange(len(bad)) :]
        (tmp_path / "bad").write_bytes(bad)
        try:
            assert isinstance(load_trace(tmp_path / "bad"), Trace)
        except TraceError as error:
            assert str(tmp_path / "bad") in str(error)
            refused += 1
    assert refused > 300


def test_names_are_mapped_by_a_dict_or_a_function(tmp_path: Path) -> None:
    found = saved(tmp_path / "trace", {"block_0.x": normal(3), "out": normal(2)})
    assert list(renamed(found, {"block_0.x": "transformer_blocks.0.video", "unused": "y"}).taps) == [
        "transformer_blocks.0.video",
        "out",
    ]
    assert list(renamed(found, lambda name: re.sub(r"block_(\d+).x", r"transformer_blocks.\1.video", name)).taps) == [
        "transformer_blocks.0.video",
        "out",
    ]
    with pytest.raises(TraceError, match=r"mine: out: two taps would get this name, the second is out"):
        renamed(found, {"block_0.x": "out"})


# ---------------------------------------------------------------- the documentation
def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", FORMAT, re.MULTILINE | re.DOTALL)


def test_the_documented_hashes_are_right() -> None:
    rows = re.findall(r"^\| (\d+) \| 0x([0-9a-f]{8}) \| (\d+) \| (-?1) \|$", FORMAT, re.MULTILINE)
    assert len(rows) >= 10 and any(int(index) >= 2**32 for index, *_ in rows)
    for index, digest, bucket, sign in rows:
        assert (hash_of(int(index)), place(int(index))) == (int(digest, 16), (int(bucket), int(sign)))


def test_the_documented_sketches_are_right() -> None:
    small, large = (json.loads(text) for text in blocks("json")[-2:])
    documented = {
        "small": torch.tensor([1, -2, 0.5, NAN, INF, -INF, -0.0, 3]),
        "large": torch.arange(-500.0, 500).view(10, 100),
    }
    documented["small bf16"] = documented["small"].bfloat16()
    for said in (*small, large):
        found = sketch(documented[said["tensor"]])
        buckets = said["buckets"]
        buckets = (
            {i: x for i, x in enumerate(buckets) if x}
            if isinstance(buckets, list)
            else {int(i): x for i, x in buckets.items()}
        )
        assert {i: x for i, x in enumerate(found.buckets.tolist()) if x} == buckets
        assert (list(found.shape), SPELLING[found.dtype]) == (said["shape"], said["dtype"])
        assert (found.norm, found.min, found.max) == (said["norm"], said["min"], said["max"])
        assert found.strange == tuple(said.get(key, 0) for key in ("nan", "inf", "neg_inf"))
        assert f"{found.checksum:016x}" == said["checksum"]


def test_the_documented_writer_without_python_writes_what_we_write(tmp_path: Path) -> None:
    compiler = shutil.which("rustc")
    if compiler is None:
        pytest.skip("rustc is not installed")
    (tmp_path / "writer.rs").write_text(blocks("rust")[0])
    subprocess.run([compiler, "-C", "debuginfo=0", "-o", "writer", "writer.rs"], cwd=tmp_path, check=True)
    subprocess.run(["./writer"], cwd=tmp_path, check=True)
    found = load_trace(tmp_path / "port.safetensors")
    expected = sketch(torch.arange(-500.0, 500).view(1, 10, 100))
    assert found.implementation == "my port" and found.taps == {"proj_in": expected}
