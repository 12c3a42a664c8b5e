"""Each case that was added shows a change of diffusers that no case before it noticed.

    pytest tests/test_cases.py

Changed diffusers runs under exact arithmetic, where there is no tolerance. In the fast run it has the recorded bits in
those old cases that have most of the arguments, in the slow run in all 29.
"""
import pytest
import record_reference
import torch
from diffusers_mutants import MUTANTS, changed, without_epsilons

from ltx2ref.parity import audit, record
from ltx2ref.parity.cases import CASES, MORE_CASES, PIPELINE_CASES, Case
from ltx2ref.parity.oracles.diffusers import build_diffusers, traced
from ltx2ref.parity.report import DIVERGED, ROUNDING
from ltx2ref.parity.taps import Taps

pytestmark = pytest.mark.diffusers
BY_ID = {case.id: case for case in CASES}
OLD = [case for case in CASES if case.native]
SOME = ("2.0/i2v", "2.3/text-masks-3d", "2.5/everything")
FAST = ("residual-where-channels-fit-2.3", "masked-text-lowest")


def changed_taps(mutant: str, case: Case) -> Taps:
    model, inputs = record_reference.oracle(case, MUTANTS[mutant].dtype)
    with changed(MUTANTS[mutant].change, model):
        return record_reference.run_exactly(lambda: traced(model, inputs))


def differing(mutant: str, case: Case) -> list[str]:
    taps, recorded = changed_taps(mutant, case), record.load_exact(case, MUTANTS[mutant].dtype).digests
    return [name for name, digest in recorded.items() if name not in taps or record.digest(taps[name]) != digest]


@pytest.mark.parametrize("mutant", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in MUTANTS])
def test_a_change_of_diffusers_shows_in_the_new_case_and_not_in_some_old_ones(mutant: str) -> None:
    assert differing(mutant, BY_ID[MUTANTS[mutant].case])[:1] == [MUTANTS[mutant].tap]
    assert {case: differing(mutant, BY_ID[case]) for case in SOME} == {case: [] for case in SOME}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_change_of_diffusers_shows_in_no_old_case(mutant: str) -> None:
    others = [case for case in OLD if case.id not in SOME]
    assert len(others) + len(SOME) == 29
    assert {case.id: differing(mutant, case) for case in others} == {case.id: [] for case in others}


def test_each_new_case_has_a_change_that_shows_in_it() -> None:
    assert {x.case for x in MUTANTS.values()} == {case.id for case in (*PIPELINE_CASES, *MORE_CASES)}


def audited(case: Case, dtype: torch.dtype) -> str:
    """The verdict on diffusers without epsilons in its RMS norms, natively."""
    def run(setup: audit.Setup) -> Taps:
        model = build_diffusers(setup.config.to_diffusers(), setup.state, setup.dtype)
        with changed(without_epsilons, model):
            return traced(model, setup.inputs)
    return audit.audit(audit.Candidate("changed diffusers", None, run), case, dtype, torch.device("cpu")).verdict


@pytest.mark.slow
@pytest.mark.parametrize("case", OLD, ids=lambda case: case.id)
def test_no_old_case_shows_a_bfloat16_audit_that_epsilons_are_missing(case: Case) -> None:
    assert audited(case, torch.bfloat16) == ROUNDING


@pytest.mark.parametrize("dtype", record.DTYPES.values(), ids=record.DTYPES)
def test_a_small_stream_shows_an_audit_that_epsilons_are_missing(dtype: torch.dtype) -> None:
    assert audited(BY_ID["2.3/small-stream-large-outputs"], dtype) == DIVERGED
