"""Exact arithmetic agrees with plain Python, is equal in every mode, layout and number of threads, or raises an error.

pytest tests/parity/test_arithmetic.py
"""

import hashlib
import math
import struct
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
import torch.nn.functional as F
from tiny import random_inputs, random_model, tiny_config
from torch import Tensor, nn

import ltx2ref
from ltx2ref.parity import arithmetic, record
from ltx2ref.parity.arithmetic import NotExact
from ltx2ref.parity.trace.probe import threads
from ltx2ref.parity.trace.taps import trace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def numbers(x: Tensor) -> Any:
    return x.double().tolist()


def exactly(function: Callable[..., Tensor], *given: Any, **options: Any) -> Tensor:
    with torch.no_grad(), ltx2ref.exact():
        return function(*given, **options)


# ---------------------------------------------------------------- the definition, in another language
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 28, 33])
def test_linear_is_one_rounding_of_folded_products(width: int, dtype: str) -> None:
    x, w, b = (draw(*shape).to(DTYPES[dtype]) for shape in ((3, width), (5, width), (5,)))
    expected = [plain.linear(row, numbers(w), numbers(b), dtype) for row in numbers(x)]
    assert numbers(exactly(F.linear, x, w, b)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu"])
def test_activations_are_the_documented_formulas(name: str, dtype: str) -> None:
    x = draw(400, scale=4).to(DTYPES[dtype])
    formula = getattr(plain, name)
    found = exactly(lambda y: F.gelu(y, approximate="tanh") if name == "gelu" else getattr(F, name)(y), x)
    assert numbers(found) == [plain.ROUND[dtype](formula(y)) for y in numbers(x)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 3, 9, 64, 129])
def test_attention_is_one_rounding_and_divides_before_it_sums(keys: int, dtype: str) -> None:
    q, k, v = (draw(1, 1, n, 10, seed=n).to(DTYPES[dtype]) for n in (4, keys, keys))
    mask = draw(4, keys, seed=7).to(DTYPES[dtype])
    mask[1] = -math.inf  # there is nothing to attend to
    mask[2] = torch.finfo(DTYPES[dtype]).min  # everything is masked alike, which gives a plain mean
    expected = [
        plain.attention(a, numbers(k[0, 0]), numbers(v[0, 0]), m, dtype)
        for a, m in zip(numbers(q[0, 0]), numbers(mask), strict=True)
    ]
    assert numbers(exactly(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)[0, 0]) == expected
    assert expected[1] == [0.0] * 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_the_documented_formulas(dtype: str) -> None:
    x, w = draw(4, 29).to(DTYPES[dtype]), draw(29, seed=1).to(DTYPES[dtype])
    x[2] *= 1e-3  # so small that the epsilon matters
    expected = [plain.rms_norm(row, numbers(w), dtype) for row in numbers(x)]
    assert numbers(exactly(F.rms_norm, x, (29,), w, 1e-6)) == expected
    assert numbers(exactly(F.layer_norm, x, (29,), eps=1e-6)) == [plain.layer_norm(row, dtype) for row in numbers(x)]


def test_a_written_out_rms_norm_has_the_bits_of_the_function() -> None:
    x = draw(3, 28).to(torch.bfloat16)

    def written_out(y: Tensor) -> Tensor:
        wide = y.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(y.dtype)

    assert torch.equal(exactly(written_out, x), exactly(F.rms_norm, x, (28,), eps=1e-6))


def test_scalars_are_never_rounded_and_alpha_and_value_are_factors_of_their_own() -> None:
    x, y = draw(50), draw(50, seed=1)
    pairs = list(zip(numbers(x), numbers(y), strict=True))
    assert numbers(exactly(lambda: x * 0.1)) == [plain.float32(a * 0.1) for a, _ in pairs]
    assert numbers(exactly(lambda: torch.add(x, y, alpha=0.3))) == [plain.float32(a + 0.3 * b) for a, b in pairs]
    assert numbers(exactly(lambda: torch.addcmul(x, y, y, value=0.7))) == [
        plain.float32(a + 0.7 * (b * b)) for a, b in pairs
    ]
    assert numbers(exactly(lambda: torch.lerp(x, y, 0.3))) == [plain.float32(a + 0.3 * (b - a)) for a, b in pairs]


def test_factories_compute_too() -> None:
    assert numbers(exactly(lambda: torch.linspace(0, 1, 22))) == [plain.float32(x) for x in plain.linspace(0, 1, 22)]
    assert numbers(exactly(lambda: torch.arange(128) / 128 * 0.1)) == [
        plain.float32(plain.float32(i / 128) * 0.1) for i in range(128)
    ]
    assert numbers(exactly(lambda: torch.arange(0, 1, 0.1))) == [plain.float32(0 + 0.1 * i) for i in range(10)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrow_dtype_is_rounded_twice(dtype: str) -> None:
    digits = {"bfloat16": 8, "float16": 11}[dtype]
    near_tie = 1 + 2.0**-digits + 2.0**-40  # above the tie, but not after the rounding to float32
    x = torch.tensor([near_tie, -near_tie, 65519.9, 65520.0, 1e-8, 3e38])
    given = torch.tensor([near_tie, -near_tie, 65519.99999, 65520.0, 1e-8, 3e38], dtype=torch.float64)
    found = exactly(lambda: given.to(DTYPES[dtype]))
    assert numbers(found) == [plain.ROUND[dtype](y) for y in numbers(given)]
    assert found[0].item() == 1.0 and x.dtype == torch.float32
    product = exactly(lambda: torch.tensor(1.0, dtype=DTYPES[dtype]) * near_tie)
    assert product.item() == 1.0


def test_sums_over_several_dimensions_are_one_fold() -> None:
    x = draw(3, 4, 5)
    assert exactly(lambda: x.sum()).item() == plain.float32(plain.fold(numbers(x.flatten())))
    assert numbers(exactly(lambda: x.mean((0, 2)))) == [
        plain.float32(plain.fold(numbers(x[:, i].flatten())) / 15) for i in range(4)
    ]
    assert exactly(lambda: x.sum((0, 2), keepdim=True)).shape == (1, 4, 1)
    assert exactly(lambda: torch.zeros(0, 3).sum(0)).tolist() == [0.0, 0.0, 0.0]


def test_digests_are_the_documented_ones() -> None:
    x = torch.tensor([[1.0, -0.0, math.nan], [0.0, math.inf, -1.5]])
    nan = struct.pack("<I", 0x7FC00000)
    data = b"".join(nan if math.isnan(y) else struct.pack("<f", y) for y in numbers(x.flatten()))
    assert record.digest(x) == hashlib.sha256(b"float32 2,3\n" + data).digest()[:16]
    other_nan = x.clone()
    other_nan.view(torch.int32)[0, 2] = -1
    assert record.digest(other_nan) == record.digest(x) != record.digest(x.abs())
    narrow = torch.tensor(1.5, dtype=torch.bfloat16)
    assert record.digest(narrow) == hashlib.sha256(b"bfloat16 \n\xc0\x3f").digest()[:16]


# ---------------------------------------------------------------- what must have no influence
def transposed(x: Any) -> Any:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(x, Tensor) and x.ndim > 1 else x


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
def test_mode_layout_and_threads_change_no_bit_of_any_tap(release: str, dtype: str) -> None:
    model = random_model(tiny_config(release), DTYPES[dtype])
    inputs = random_inputs(model.config, DTYPES[dtype], text_masks=torch.float32, per_token=True)
    other = {name: transposed(x) for name, x in inputs.items()}

    def digests(mode: Any, given: dict[str, Any], count: int = 1) -> dict[str, bytes]:
        with threads(count), mode, ltx2ref.exact(), trace(model) as taps:
            model(**given)
        return {name: record.digest(x) for name, x in taps.items()}

    first = digests(torch.no_grad(), inputs)
    assert len(first) > 190
    assert digests(torch.enable_grad(), inputs) == digests(torch.inference_mode(), inputs) == first
    assert digests(torch.no_grad(), other) == digests(torch.inference_mode(), other) == first
    assert digests(torch.no_grad(), inputs, 2) == first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_a_linear_layer_rounds_once_in_every_layout_and_mode(layout: str, mode: Any) -> None:
    layer = nn.Linear(28, 20)
    x = {
        "contiguous": draw(2, 5, 28),
        "transposed": draw(5, 2, 28).transpose(0, 1),
        "expanded": draw(1, 1, 28).expand(2, 5, 28),
    }[layout]
    with mode(), ltx2ref.exact():
        found = layer(x)
    flat = numbers(x.reshape(-1, 28))
    expected = [plain.linear(row, numbers(layer.weight), numbers(layer.bias), "float32") for row in flat]
    assert numbers(found.detach().reshape(-1, 20)) == expected


def test_working_in_parts_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, mask = draw(2, 3, 17, 10), draw(2, 3, 19, 10), draw(2, 3, 19, 10), draw(2, 1, 17, 19)
    x, w = draw(23, 31), draw(37, 31)
    whole = exactly(F.scaled_dot_product_attention, q, k, v, attn_mask=mask), exactly(F.linear, x, w)
    monkeypatch.setattr(arithmetic, "TILE", 64)
    monkeypatch.setattr(arithmetic, "LOGITS", 64)
    parts = exactly(F.scaled_dot_product_attention, q, k, v, attn_mask=mask), exactly(F.linear, x, w)
    assert all(map(torch.equal, whole, parts))


def test_in_place_and_out_variants_have_the_bits_of_the_others() -> None:
    x, y = draw(4, 9), draw(4, 9, seed=1)
    plainly = exactly(lambda: x * y + x)
    into = torch.empty(4, 9)
    assert torch.equal(exactly(lambda: (x * y).add_(x)), plainly)
    assert torch.equal(exactly(lambda: torch.add(x * y, x, out=into)), plainly) and torch.equal(into, plainly)
    assert torch.equal(exactly(lambda: x.clone().mul_(y).add_(x)), plainly)
    own = x.clone()
    assert exactly(lambda: own.addcmul_(own, own)) is own and not torch.equal(own, x)


def test_strides_dtypes_and_integers_are_those_of_torch() -> None:
    q, w = draw(2, 5, 3, 8).transpose(1, 2), draw(4, 8)
    for function in (
        lambda: F.scaled_dot_product_attention(q, q, q),
        lambda: q * 2,
        lambda: q.softmax(-1),
        lambda: torch.arange(7) // 2,
        lambda: torch.arange(7) / 2,
        lambda: q.to(torch.bfloat16) + q,
        lambda: F.rms_norm(q, (8,)),
        lambda: F.linear(q, w),
        lambda: q > 0,
    ):
        exact, native = exactly(function), function()
        assert (exact.shape, exact.dtype, exact.stride()) == (native.shape, native.dtype, native.stride())
    assert torch.equal(exactly(lambda: torch.arange(7) // 2), torch.arange(7) // 2)


def test_a_model_on_the_meta_device_is_built_and_runs() -> None:
    with ltx2ref.exact(), torch.device("meta"):
        assert nn.Linear(3, 4)(torch.randn(2, 3)).is_meta


# ---------------------------------------------------------------- complete, or an error
@torch.library.custom_op("ltx2ref_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.fft.fft(x), r"does not define the operation aten\._fft_r2c"),
        (lambda x: F.conv1d(x[None], x[None]), r"does not define the operation aten\.convolution"),
        (lambda x: x.cumsum(0), r"aten\.cumsum"),
        (lambda x: torch.randn(3), r"aten\.randn"),
        (lambda x: F.dropout(x), r"aten\.(bernoulli_|native_dropout|dropout)"),
        (lambda x: x.index_put((torch.tensor([0]),), x[:1], accumulate=True), r"aten\.index_put"),
        (lambda x: x.scatter_reduce(0, torch.zeros(4, 4, dtype=torch.long), x, "sum"), r"aten\.scatter_reduce"),
        (lambda x: torch.view_as_complex(x.view(-1, 2)) * 2, r"aten\.mul\.Tensor for torch\.complex64"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounding_mode='floor'"),
        (lambda x: torch.linalg.vector_norm(x, 3), "order 3"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), "dropout_p=0, got 0.5"),
        (lambda x: double(x), r"custom operator ltx2ref_tests\.double"),
        (lambda x: torch.randperm(4), r"aten\.randperm.*: make models and inputs before exact\(\)"),
        (lambda x: torch.complex(x, x).abs(), r"of complex numbers"),
        (lambda x: x.to(torch.float8_e4m3fn), r"aten\._to_copy"),
        (lambda x: torch.add(x, x, out=torch.empty(4, 4, dtype=torch.float64)), "out= of another dtype"),
        (lambda x: x.view(torch.int32).numpy(), r"outside of torch: Tensor\.numpy\(\)"),
        (lambda x: x.numpy(), r"outside of torch: Tensor\.numpy\(\)"),
        (lambda x: x.__dlpack__(), r"outside of torch: Tensor\.__dlpack__\(\)"),
        (lambda x: x.data_ptr(), r"outside of torch: Tensor\.data_ptr\(\)"),
    ],
    ids=lambda x: "" if callable(x) else x,
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_the_definition_lacks_or_cannot_see_is_an_error_that_names_it(
    function: Callable[[Tensor], Any], message: str, mode: Any
) -> None:
    x = draw(4, 4)
    function(x)  # torch itself can do it
    with pytest.raises(NotExact, match=message), mode(), ltx2ref.exact():
        function(x)


def test_autocast_and_flushed_subnormals_are_refused_at_the_door() -> None:
    x = draw(3, 3)
    with pytest.raises(NotExact, match="autocast"), torch.autocast("cpu", torch.bfloat16), ltx2ref.exact():
        pass
    with pytest.raises(NotExact, match="autocast"), ltx2ref.exact(), torch.autocast("cpu", torch.bfloat16):
        x @ x
    if torch.set_flush_denormal(True):
        try:
            with pytest.raises(NotExact, match="set_flush_denormal"), ltx2ref.exact():
                pass
        finally:
            torch.set_flush_denormal(False)


def test_a_gradient_is_an_error_and_not_silently_none() -> None:
    layer, x = nn.Linear(3, 4), draw(2, 3)
    with ltx2ref.exact():
        y, z = layer(x), (x @ layer.weight.T).tanh()
    for result in (y, z):
        with pytest.raises(RuntimeError, match="does not require grad"):
            result.sum().backward()


@pytest.mark.slow
def test_tracing_inside_and_outside_sees_the_same() -> None:
    model = random_model(tiny_config("2.3"))
    inputs = random_inputs(model.config)
    with torch.no_grad(), ltx2ref.exact(), trace(model) as inside:
        model(**inputs)
    with torch.no_grad(), trace(model) as outside, ltx2ref.exact():
        model(**inputs)
    assert inside.keys() == outside.keys() and all(torch.equal(x, outside[name]) for name, x in inside.items())


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["attention module", "scripted", "operator", "variance", "vector product"])
def test_what_torch_takes_apart_has_the_same_bits_in_every_mode(name: str) -> None:
    torch.manual_seed(0)
    x, w, b, attention = draw(5, 2, 28).transpose(0, 1), draw(20, 28), draw(20), nn.MultiheadAttention(28, 4)
    scripted = torch.jit.trace(lambda y: F.linear(y, w, b), x)
    functions: dict[str, Callable[[], Tensor]] = {
        "attention module": lambda: attention(x, x, x, need_weights=False)[0],
        "scripted": lambda: scripted(x),
        "operator": lambda: torch.ops.aten.linear.default(x, w, b),
        "variance": lambda: x.var(unbiased=False),
        "vector product": lambda: w @ x[0, 0],
    }
    found = []
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode(), ltx2ref.exact():
            result = functions[name]().detach()
        found.append(numbers(result))
    assert found[0] == found[1] == found[2]
    if name in ("scripted", "operator"):
        assert found[0] == numbers(exactly(F.linear, x, w, b).detach())
    if name == "variance":
        assert found[0] == pytest.approx(x.double().var(unbiased=False).item(), rel=1e-7)


def test_a_zero_that_is_a_maximum_is_positive_in_every_layout() -> None:
    x = torch.cat([torch.zeros(1), -torch.zeros(63)]).repeat(2, 1)
    for function in (
        lambda y: y.amax(1),
        lambda y: y.max(1).values,
        lambda y: torch.maximum(y, -y),
        lambda y: y.clamp(max=torch.zeros(64)),
    ):
        for layout in (x, x.t().contiguous().t(), x[:, :5]):
            if layout.shape[1] == 64 or function(x).ndim == 1:
                assert not exactly(function, layout).signbit().any()


class Wrapped(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_of_a_kind_of_its_own_is_refused() -> None:
    x = draw(2, 3).as_subclass(Wrapped)
    with pytest.raises(NotExact, match="cannot see into Wrapped"):
        exactly(lambda: x * 2)


def test_empty_matrices_and_rows_are_zeros_or_empty() -> None:
    assert exactly(lambda: torch.zeros(2, 0) @ torch.zeros(0, 4)).tolist() == [[0.0] * 4] * 2
    assert exactly(lambda: torch.zeros(0, 3) @ torch.zeros(3, 4)).shape == (0, 4)
    assert exactly(F.linear, torch.zeros(0, 3), torch.zeros(4, 3)).shape == (0, 4)
    q = draw(1, 2, 3, 4)
    assert not exactly(F.scaled_dot_product_attention, q, q[:, :, :0], q[:, :, :0]).any()


def test_compiled_code_is_computed_exactly_too() -> None:
    def function(x: Tensor) -> Tensor:
        return F.linear(x.sin() + 1, x)

    x, compiled = draw(8, 8), torch.compile(function, backend="eager")
    assert torch.equal(exactly(compiled, x), exactly(function, x))


def test_torch_is_itself_again_after_an_error() -> None:
    before = F.linear(draw(2, 3), draw(4, 3))
    with pytest.raises(ZeroDivisionError), ltx2ref.exact():
        raise ZeroDivisionError
    assert torch.equal(F.linear(draw(2, 3), draw(4, 3)), before)


# ---------------------------------------------------------------- other machines
class Coarser(arithmetic.Arithmetic):
    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return super().round(x.to(torch.float16).double(), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "same"),
    [(arithmetic.AS_DEFINED, True), (arithmetic.Nudged(1), True), (Coarser(), False)],
    ids=["itself", "other functions", "coarser"],
)
def test_digests_see_another_rounding_and_not_another_library(machine: arithmetic.Arithmetic, same: bool) -> None:
    model = random_model(tiny_config("2.3"))
    inputs = random_inputs(model.config)

    def digests(m: arithmetic.Arithmetic) -> list[bytes]:
        with torch.no_grad(), ltx2ref.exact(m), trace(model) as taps:
            model(**inputs)
        return [record.digest(x) for x in taps.values()]

    assert (digests(machine) == digests(arithmetic.AS_DEFINED)) == same


def test_the_order_of_a_sum_counts() -> None:
    x = torch.tensor([1.0, 2.0**-53, 2.0**-53, -1.0], dtype=torch.float64)
    assert exactly(lambda: x.sum()).item() == plain.fold(numbers(x)) == 2.0**-53
    assert sum(numbers(x)) == 0.0


def test_operations_are_counted() -> None:
    layer, x = nn.Linear(3, 4), draw(2, 3)
    with torch.no_grad(), ltx2ref.exact() as operations:
        layer(x).add_(1)
    assert operations == {"linear": 1, "add": 1}
