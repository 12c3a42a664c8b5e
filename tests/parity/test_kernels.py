"""Kernel shapes are single operations at the head widths, lengths and masks of real models, run by `ltx2ref verify`.

pytest tests/parity/test_kernels.py
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ltx2ref
from ltx2ref import cli
from ltx2ref.parity import record, verify
from ltx2ref.parity.cases import RECORDED
from ltx2ref.parity.kernels import KERNELS, LONG_KERNELS, MASKS, Kernel, compute
from ltx2ref.parity.machines import MACHINES
from ltx2ref.parity.verify import FAILED, IDENTICAL, INCONCLUSIVE, WITHIN, How

CPU = torch.device("cpu")
BY_NAME = {kernel.name: kernel for kernel in (*KERNELS, *LONG_KERNELS)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DISHONEST = {("tf32", "float32")}  # it keeps 11 bits of the factors, which no rounding explains


def verdicts(kernel: Kernel, dtype: str, machine: str | None = None) -> tuple[str | None, str | None]:
    arithmetic = None if machine is None else "native"
    result = verify.verify_one(How(CPU, False, arithmetic, machine), kernel, dtype)
    return result.exact and result.exact.verdict, result.native and result.native.verdict


def test_each_width_length_and_mask_is_there() -> None:
    attentions = [kernel for kernel in KERNELS if kernel.operation == "attention"]
    assert {(x.width, x.length) for x in attentions} == {(w, n) for w in (64, 128) for n in (33, 129, 192)}
    assert {x.kind for x in attentions} == {"", "expanded", *MASKS} and {x.length for x in LONG_KERNELS} == {1025}
    assert len({x.id for x in (*KERNELS, *LONG_KERNELS)} | {case.id for case in RECORDED}) == len(
        [*KERNELS, *LONG_KERNELS, *RECORDED]
    )
    shapes = {
        tuple(n if n == 1 else letter for n, letter in zip(x.inputs(torch.float32)["mask"].shape, "BHTS", strict=True))
        for x in attentions
        if x.kind in MASKS
    }
    assert shapes == {("B", 1, 1, "S"), ("B", 1, "T", "S")}
    assert BY_NAME["attention-64-192-expanded"].inputs(torch.float32)["k"].stride(0) == 0


@pytest.mark.parametrize("dtype", record.EXACT_DTYPES)
@pytest.mark.parametrize(
    "name",
    [
        name if name.endswith(("64-33", "bias-empty")) else pytest.param(name, marks=pytest.mark.slow)
        for name in BY_NAME
    ],
)
def test_a_kernel_shape_is_exactly_identical_and_natively_within_the_budget(name: str, dtype: str) -> None:
    exactly, natively = verdicts(BY_NAME[name], dtype)
    assert exactly == IDENTICAL and natively in ((IDENTICAL, WITHIN) if dtype in DTYPES else (None,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_no_honest_machine_fails_at_a_kernel_shape(machine: str, dtype: str) -> None:
    small = [kernel for kernel in KERNELS if kernel.width == 64 and kernel.length < 192]
    failed = {kernel.name for kernel in small if verdicts(kernel, dtype, machine)[1] == FAILED}
    assert (failed != set()) == ((machine, dtype) in DISHONEST)


def last_key_dropped(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
    """Drop the last key, as a kernel in tiles of 128 may do if its last tile has only one key."""
    keys = k.shape[-2] - (k.shape[-2] % 128 == 1)
    mask = None if attn_mask is None else attn_mask[..., :keys]
    return ATTENTION(q, k[..., :keys, :], v[..., :keys, :], attn_mask=mask, **rest)


ATTENTION = F.scaled_dot_product_attention


def test_a_kernel_with_an_error_in_its_last_tile_fails_at_that_length_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No case is as long as one tile."""
    kernels = [BY_NAME[name] for name in ("attention-64-33", "attention-64-129", "attention-128-129-bool")]
    truths = {kernel: verify.truth_of(kernel, torch.float32) for kernel in kernels}
    monkeypatch.setattr(verify, "truth_of", lambda kernel, dtype: truths[kernel])
    monkeypatch.setattr(F, "scaled_dot_product_attention", last_key_dropped)
    found = {kernel.name: verdicts(kernel, "float32") for kernel in kernels}
    assert found == {
        "attention-64-33": (IDENTICAL, WITHIN),
        "attention-64-129": (FAILED, INCONCLUSIVE),
        "attention-128-129-bool": (FAILED, INCONCLUSIVE),
    }
    case = next(case for case in RECORDED if case.id == "2.3/t2v")
    with torch.no_grad(), ltx2ref.exact():
        outputs = verify.build(case.config, torch.float32)(**case.inputs())
    recorded = record.load_exact(case, "float32").outputs
    assert all(torch.equal(outputs[name], x) for name, x in recorded.items())


def test_a_native_error_in_the_last_tile_is_beyond_the_budget() -> None:
    kernel = BY_NAME["attention-64-129"]
    forward = verify.prepared(kernel, "bfloat16", CPU)
    exact_taps, written_out = verify.run_on("exact", forward), verify.run_on(verify.WRITTEN_OUT, forward)
    x = kernel.inputs(torch.bfloat16)
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    wrong = {"output": last_key_dropped(q, k, v).transpose(1, 2)}
    assert verify.compare_with_exact(kernel, "bfloat16", wrong, exact_taps, written_out).verdict == FAILED
    right = {"output": compute(kernel, x)}
    assert verify.compare_with_exact(kernel, "bfloat16", right, exact_taps, written_out).verdict in (IDENTICAL, WITHIN)


def test_verify_lists_the_long_ones_only_if_all_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for arguments in (["--list"], ["--list", "--all"]):
        assert cli.main(["verify", *arguments]) == 0
        shown.append(capsys.readouterr().out.split("\n"))
    assert shown[0][0] == "2.0/pipeline-t2v" and "kernel/linear-64-33" in shown[0]
    assert {*shown[1]} - {*shown[0]} == {kernel.id for kernel in LONG_KERNELS}
