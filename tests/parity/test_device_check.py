"""The check of a device fails what is wrong, names what it left out, and leaves settings as they were.

pytest tests/parity/test_device_check.py
"""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_check
import pytest
import torch
from device_check import FAILED, INCONCLUSIVE, MEASURED, PASSED, UNAVAILABLE, Clock, Row

from ltx2ref.parity.cases import RECORDED
from ltx2ref.parity.trace.taps import Taps

CPU = torch.device("cpu")
CASE = next(case for case in RECORDED if case.id == "2.3/t2v")


@pytest.mark.parametrize(
    ("verdicts", "left_out", "status"),
    [
        ([PASSED, UNAVAILABLE, MEASURED], [], 0),
        ([PASSED, FAILED, INCONCLUSIVE], ["exact: 1 of 2"], 1),
        ([PASSED, INCONCLUSIVE], [], 2),
        ([PASSED], ["exact: 1 of 2"], 2),
        ([PASSED], ["bench"], 0),
    ],
)
def test_the_status_is_1_for_what_failed_and_2_for_what_is_not_known(
    verdicts: list[str], left_out: list[str], status: int
) -> None:
    rows = [Row("native", str(i), "float32", verdict) for i, verdict in enumerate(verdicts)]
    assert device_check.status(rows, Clock(10, left_out=left_out)) == status


def test_what_does_not_fit_is_named_and_not_begun() -> None:
    clock, row = Clock(0.0), Row("native", "a", "float32", PASSED)
    assert list(clock.steps("native", [("a", lambda: row), ("b", lambda: row)])) == []
    assert clock.left_out == ["native: 2 of 2, from a on"]
    clock = Clock(100.0)
    assert [x.what for x in clock.steps("native", [("a", lambda: row)] * 3, reserve=50)] == ["a"] * 3
    assert list(clock.steps("native", [("a", lambda: row)], reserve=200)) == [] and clock.left_out


def test_tf32_is_what_it_was_after_an_error_too() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ZeroDivisionError), device_check.tf32(not before):
        assert torch.backends.cuda.matmul.allow_tf32 is not before
        1 / 0  # noqa: B018
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_a_wrong_kernel_fails_and_a_right_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels(wrong: float) -> Any:
        calls = itertools.count()
        return SimpleNamespace(compute=lambda _, x: x["x"] @ x["x"].mT * (1 + wrong * (next(calls) == 2)))

    x = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    kernel = SimpleNamespace(name="product", inputs=lambda dtype: {"x": x.to(dtype)})
    for wrong, verdict in ((0.0, PASSED), (1e-5, FAILED)):
        monkeypatch.setattr(device_check, "kernels", kernels(wrong))
        assert device_check.kernel_shape(kernel, "float32", CPU).verdict == verdict  # type: ignore[arg-type]


def test_keys_of_stride_0_arrive_as_such() -> None:
    k = torch.rand(1, 5, 2, 3).expand(4, -1, -1, -1)
    there = device_check.placed({"k": k}, CPU)["k"]
    assert there.stride() == k.stride() == (0, 6, 3, 1) and torch.equal(there, k)


def test_a_backend_that_is_not_there_is_no_failure_and_has_a_reason() -> None:
    found = device_check.with_backend("cudnn", CASE, "float32", CPU)
    assert found.verdict == UNAVAILABLE and found.note


def test_a_wrong_forward_fails_with_the_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    run = device_check.run

    def wrong(*given: Any) -> Taps:
        return {name: x + 1e-3 * (name == "sample") for name, x in run(*given).items()}

    monkeypatch.setattr(device_check, "run", wrong)
    found = device_check.with_backend("math", CASE, "float32", CPU)
    assert (found.verdict, found.first) == (FAILED, "sample")


def test_one_that_does_not_repeat_itself_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = device_check.run, itertools.count()
    monkeypatch.setattr(device_check, "run", lambda *given: {name: x + next(calls) for name, x in run(*given).items()})
    assert device_check.with_backend("math", CASE, "float32", CPU).verdict == INCONCLUSIVE


def test_the_table_has_the_devices_name_and_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "device.json"
    monkeypatch.setattr(
        "sys.argv",
        [
            "device_check.py",
            "--device",
            "cpu",
            "--only",
            "native",
            "--only",
            "TF32",
            "--case",
            CASE.id,
            "--json",
            str(file),
        ],
    )
    assert device_check.main() == 0
    said = capsys.readouterr().out
    assert device_check.processor() in said.splitlines()[0]
    assert "| native | float32 | 1 of 1 | 0 | 0 |" in said and "not available: on: it is a GPU's" in said
    assert '"rows"' in file.read_text() and '"left_out": []' in file.read_text()
    monkeypatch.setattr("sys.argv", ["device_check.py", "--device", "cpu", "--only", "exact", "--budget", "0"])
    assert device_check.main() == 2
    count = 3 * len(RECORDED)
    assert f"left out, for want of time or of a part: exact: {count} of {count}, from " in capsys.readouterr().out
