"""Each simulated machine computes differently from exact arithmetic, and the table says what it was told.

pytest tests/parity/test_machines.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import machine_table
import pytest
import torch
import torch.nn.functional as F
from machine_table import EXACT, FAILED, HELD_APART, NATIVE, NOTED, PASSED, SUSPECTED, Found, Task
from mutants import FIRST
from torch import Tensor

import ltx2ref
from ltx2ref.parity.machines import MACHINES, machine

pytestmark = pytest.mark.diffusers


def drawn(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [
        torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 2
        for shape in ((1, 1, 40, 96), (32, 96), (32,))
    ]
    return [x.to(dtype) for x in (*found, -9.2 * torch.arange(128, dtype=torch.float64) / 128)]


def computed(x: Tensor, weight: Tensor, bias: Tensor, exponents: Tensor) -> list[Tensor]:
    """Run one operation of each kind that machines compute differently."""
    return [
        F.linear(x, weight, bias),
        F.scaled_dot_product_attention(x, x, x),
        x.sum(-1),
        exponents.exp(),
        x.exp(),
        (1000 * x).sin(),
        x.cos(),
        F.gelu(x, approximate="tanh"),
        F.rms_norm(x, (96,), eps=1e-6),
    ]


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_differs_from_exact_arithmetic_by_rounding_and_in_float64_by_order_alone(name: str) -> None:
    for dtype, close in ((torch.float64, 1e-14), (torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
        given = drawn(dtype)
        with ltx2ref.exact():
            definition = computed(*given)
        with ltx2ref.exact(machine(name)):
            found = computed(*given)
        same = all(torch.equal(a, b) for a, b in zip(definition, found, strict=True))
        assert not same or dtype != torch.float32
        for a, b in zip(definition, found, strict=True):
            assert (a.double() - b.double()).norm() <= close * a.double().norm(), dtype


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_repeats_itself(name: str) -> None:
    given = drawn(torch.float32)
    with ltx2ref.exact(machine(name)):
        first = computed(*given)
    with ltx2ref.exact(machine(name)):
        again = computed(*given)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_tensor_cores_cut_off_what_is_beyond_float32() -> None:
    a = torch.tensor([[1.0, 1.0]])
    for small, nearest, toward_zero in (
        (-0.75 * 2.0**-24, 1 - 2.0**-24, 1 - 2.0**-24),
        (-0.25 * 2.0**-24, 1.0, 1 - 2.0**-24),
        (0.75 * 2.0**-23, 1 + 2.0**-23, 1.0),
    ):
        b = torch.tensor([[1.0], [small]])
        with ltx2ref.exact(machine("truncated-sums")):
            cut = a @ b
        with ltx2ref.exact():
            rounded = a @ b
        assert (cut.item(), rounded.item()) == (toward_zero, nearest)


# ---------------------------------------------------------------- the table
def test_the_page_has_the_table_of_these_machines_bugs_and_bounds() -> None:
    assert machine_table.is_current()
    assert {*HELD_APART} < {*MACHINES} and 3 * len(HELD_APART) >= len(MACHINES)


def everything_right(bad: Callable[[Task], Found | None] = lambda task: None) -> machine_table.Results:
    results = {}
    for task in machine_table.all_tasks(
        [NATIVE, "halves", "tf32", "split-sums"], ["2.3/t2v"], [*machine_table.KINDS], every_bug=False
    ):
        right = Found(FAILED, FIRST[task.what][0][0], 100.0) if task.what in FIRST else Found(PASSED, None, 0.5)
        results[task.key] = dict.fromkeys(machine_table.KINDS[task.kind], bad(task) or right)
    return results


@pytest.mark.parametrize(
    ("kind", "name", "dtype", "found", "wrong", "cell"),
    [
        ("honest", "halves", "bfloat16", Found(FAILED, "sample", 2.4), 2, "| halves | 0 | 1 | 0 | 1 | 0 | 0 |"),
        ("honest", "halves", "bfloat16", Found(SUSPECTED, "sample", 1.4), 0, "| 0 (1 suspect) |"),
        ("honest", "split-sums", "float32", Found(NOTED, "sample", 1.4), 0, "0 (1 noted)"),
        ("honest", "tf32", "float32", Found(FAILED, "sample", 1000.0), 0, "| tf32 (its float32 is another"),
        ("bug", "halves", "float32", Found(PASSED, None, 0.5), 62, "| halves | 0 | - | 0 | - |"),
        ("exact", EXACT, "bfloat16", Found(PASSED, None, None), 62, "by digests, bfloat16: 0 of 30 bugs found"),
    ],
)
def test_false_alarms_and_missed_bugs_are_counted_and_suspects_apart(
    kind: str, name: str, dtype: str, found: Found, wrong: int, cell: str
) -> None:
    results = everything_right(
        lambda task: found if task[:3] == (kind, name, dtype) and (kind != "exact" or task.what in FIRST) else None
    )
    assert machine_table.wrong_results(results) == wrong
    assert cell in machine_table.tables(results, [NATIVE, "halves", "tf32", "split-sums"], "a command")


def test_nothing_is_wrong_where_all_passed_and_every_bug_was_found() -> None:
    results = everything_right()
    assert machine_table.wrong_results(results) == 0
    said = machine_table.tables(results, [NATIVE, "split-sums"], "a command")
    assert "| split-sums | 30 | - | 30 | - |" in said and "missed" not in said


def test_results_of_other_bounds_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    machine_table.save(path, everything_right())
    assert machine_table.load(path) == everything_right()
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"facts": {"judged": "otherwise"}}))
    with pytest.raises(ValueError, match="results of other bounds"):
        machine_table.load(path)
