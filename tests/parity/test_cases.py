"""Each case that was added shows a change of diffusers that no case before it noticed.

    pytest tests/parity/test_cases.py

Changed versions of diffusers run under exact arithmetic, where there is no tolerance. With each single change, the old
case with the most arguments keeps its recorded bits. With many changes at once, so do all 29 old cases.
"""

from collections.abc import Iterator

import pytest
import record_reference
import torch
from mutants import patched
from unnoticed import MUTANTS, changed, without_epsilons

from ltx2ref.parity import audit, record
from ltx2ref.parity.cases import CASES, MORE_CASES, PIPELINE_CASES, Case
from ltx2ref.parity.oracles.diffusers import build_diffusers, traced
from ltx2ref.parity.report.rows import DIVERGED, IDENTICAL, ROUNDING
from ltx2ref.parity.trace.taps import Taps

pytestmark = [pytest.mark.diffusers, pytest.mark.ltx_core]
BY_ID = {case.id: case for case in CASES}
OLD = [case for case in CASES if case.native]
FULLEST = {"2.0": "2.0/i2v", "2.3": "2.5/everything", "2.5": "2.5/everything"}  # changes by the release they apply to


def differing(case: Case, *names: str) -> list[str]:
    """Return the taps of changed diffusers that differ from the recorded ones."""
    dtype = MUTANTS[names[0]].dtype
    model, inputs = record_reference.oracle(case, dtype)
    with patched(changed(MUTANTS[name].change, model) for name in names):
        taps = record_reference.run_exactly(lambda: traced(model, inputs))
    recorded = record.load_exact(case, dtype).digests
    return [name for name, digest in recorded.items() if name not in taps or record.digest(taps[name]) != digest]


def groups() -> Iterator[tuple[str, ...]]:
    """Divide mutants of one dtype into groups in which no two begin at the same tap: one would hide the other."""
    left = list(MUTANTS)
    while left:
        group: dict[tuple[str, str], str] = {}
        for name in left:
            if MUTANTS[name].dtype == MUTANTS[left[0]].dtype:
                group.setdefault((MUTANTS[name].case, MUTANTS[name].tap), name)
        left = [name for name in left if name not in group.values()]
        yield tuple(group.values())


@pytest.mark.slow
@pytest.mark.sample(16)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_change_of_diffusers_shows_in_the_new_case_and_not_in_an_old_one(mutant: str) -> None:
    case = BY_ID[MUTANTS[mutant].case]
    assert differing(case, mutant)[:1] == [MUTANTS[mutant].tap]
    assert differing(BY_ID[FULLEST[case.release]], mutant) == []


@pytest.mark.slow
@pytest.mark.parametrize("names", list(groups()), ids=lambda names: f"{names[0]}-and-{len(names) - 1}-more")
def test_changes_of_diffusers_show_in_no_old_case(names: tuple[str, ...]) -> None:
    assert len(OLD) == 29
    assert {case.id: differing(case, *names) for case in OLD} == {case.id: [] for case in OLD}


def test_each_change_is_in_a_group() -> None:
    assert sorted(name for group in groups() for name in group) == sorted(MUTANTS)


def test_each_new_case_has_a_change_that_shows_in_it() -> None:
    assert {x.case for x in MUTANTS.values()} == {case.id for case in (*PIPELINE_CASES, *MORE_CASES)}


def audited(case: Case, dtype: torch.dtype) -> str:
    """Return the native verdict on diffusers without epsilons in its RMS norms."""

    def run(setup: audit.Setup) -> Taps:
        model = build_diffusers(setup.config.to_diffusers(), setup.state, setup.dtype)
        with changed(without_epsilons, model):
            return traced(model, setup.inputs)

    return audit.audit(audit.Candidate("changed diffusers", None, run), case, dtype, torch.device("cpu")).verdict


@pytest.mark.slow
@pytest.mark.parametrize("case", OLD, ids=lambda case: case.id)
def test_no_old_case_shows_a_bfloat16_audit_that_epsilons_are_missing(case: Case) -> None:
    assert audited(case, torch.bfloat16) in (IDENTICAL, ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", record.NATIVE_DTYPES.values(), ids=record.NATIVE_DTYPES)
def test_a_small_stream_shows_an_audit_that_epsilons_are_missing(dtype: torch.dtype) -> None:
    assert audited(BY_ID["2.3/small-stream-large-outputs"], dtype) == DIVERGED
