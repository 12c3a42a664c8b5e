"""The NumPy port, rounding as diffusers does, has diffusers' bits at every tap of every case, in all three dtypes.

    pytest tests/kit/test_numpy_port.py

The digests are those that diffusers left under exact arithmetic. The kit's own cases go through its files, in
test_kit.py.
"""

from typing import Any
from unittest.mock import patch

import numpy as np
import numpy_port
import pytest
import torch
from torch import Tensor

from ltx2ref.kit.cases import MANY_FRAMES, MASKED, MODELS
from ltx2ref.parity import record
from ltx2ref.parity.cases import CASES, Case
from ltx2ref.parity.generator import build
from ltx2ref.parity.record import EXACT_DTYPES
from ltx2ref.parity.run import cast

FAST = [(MANY_FRAMES, "bfloat16"), (MASKED, "float32"), (next(x for x in CASES if x.id == "2.5/everything"), "float16")]
ALL = [(case, dtype) for case in (*CASES, *MODELS, MASKED) for dtype in EXACT_DTYPES]


def wide(x: Any) -> Any:
    return (x.double() if x.is_floating_point() else x).numpy() if isinstance(x, Tensor) else x


def computed(case: Case, dtype: str) -> dict[str, Any]:
    """Return every tap of the port as float64 arrays."""
    inputs = cast(case.inputs(), EXACT_DTYPES[dtype])
    inputs |= inputs.pop("attention_kwargs", None) or {}
    weights = build(case.config, EXACT_DTYPES[dtype], scales=case.scales).state_dict()
    numpy_port.TAPS.clear()
    with patch.object(numpy_port.Numbers, "dtype", dtype):
        numpy_port.forward(
            case.config.to_diffusers(),
            {name: wide(x) for name, x in weights.items()},
            {name: wide(x) for name, x in inputs.items() if x is not None},
        )
    return dict(numpy_port.TAPS)


def narrow(name: str, x: Any, dtype: str) -> Tensor:
    """Return a tensor in the dtype that diffusers' tensor has, which must hold the port's numbers unchanged."""
    found = torch.from_numpy(np.array(x))
    rounded = found.to(torch.float32 if name.endswith((".cos", ".sin", "_coords")) else EXACT_DTYPES[dtype])
    assert torch.equal(rounded.double(), found), f"{name} is not rounded"
    return rounded


def differing(case: Case, dtype: str) -> list[str]:
    found = computed(case, dtype)
    return [
        name
        for name, digest in record.load_exact(case, dtype).digests.items()
        if record.digest(narrow(name, found[name], dtype)) != digest
    ]


@pytest.mark.parametrize("case,dtype", FAST, ids=lambda x: getattr(x, "id", x))
def test_the_port_has_the_recorded_bits_at_every_tap(case: Case, dtype: str) -> None:
    assert differing(case, dtype) == []


@pytest.mark.slow
def test_it_has_them_in_every_case_that_diffusers_was_recorded_in(capsys: pytest.CaptureFixture[str]) -> None:
    """Also print how many taps these are."""
    other = {f"{case.id} {dtype}": found for case, dtype in ALL if (found := differing(case, dtype))}
    taps = sum(len(record.load_exact(case, dtype).digests) for case, dtype in ALL)
    with capsys.disabled():
        print(f"{taps - sum(map(len, other.values())):,} of {taps:,} taps of {len(ALL)} runs ", end="")
    assert other == {} and len(ALL) >= 105


def test_one_rounding_that_is_left_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows from the place where it is left out."""
    monkeypatch.setattr(numpy_port, "residual", lambda x, gate, y: numpy_port.r(x + gate * y))
    found = differing(MANY_FRAMES, "float32")
    assert found[0] == "transformer_blocks.0.attn2.stream" and found[-1] == "audio_sample"


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_it_rounds_as_torch_casts(dtype: str) -> None:
    """Ties, subnormal numbers, overflow, both zeros and NaN are covered, by way of float32."""
    x = torch.cat(
        [
            torch.tensor(
                [
                    0.0,
                    -0.0,
                    torch.inf,
                    -torch.inf,
                    torch.nan,
                    65519.99,
                    65520.0,
                    3.4e38,
                    3.5e38,
                    1e-40,
                    6e-8,
                    2.0**-25,
                    1 + 2.0**-8,
                    1 + 2.0**-8 + 2.0**-40,
                    1 + 2.0**-24,
                    1 + 3 * 2.0**-24,
                ],
                dtype=torch.float64,
            ),
            torch.randn(1000, dtype=torch.float64),
        ]
    )
    there = x.float().to(EXACT_DTYPES[dtype]).double()
    here = torch.from_numpy(numpy_port.rounded(x.numpy(), dtype))
    assert torch.equal(here.nan_to_num(nan=7.0), there.nan_to_num(nan=7.0))
    assert torch.equal(here.signbit()[:4], there.signbit()[:4])
