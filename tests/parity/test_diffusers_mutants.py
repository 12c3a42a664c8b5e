"""Thirty known bugs, made in diffusers itself, are found by the audit at the taps where they are made.

pytest tests/parity/test_diffusers_mutants.py
"""

import re

import diffusers_mutants
import mutants
import pytest
import torch

from ltx2ref.parity.cases import CASES
from ltx2ref.parity.compare import compare_forwards
from ltx2ref.parity.generator import build
from ltx2ref.parity.oracles import diffusers
from ltx2ref.parity.report.rows import DIVERGED
from ltx2ref.parity.run import cast, run

pytestmark = pytest.mark.diffusers
BY_ID = {case.id: case for case in CASES}


def test_it_has_the_bugs_of_our_own_model_and_of_our_loaders() -> None:
    assert diffusers_mutants.MUTANTS.keys() == mutants.FIRST.keys() == {*mutants.MUTANTS, *mutants.LOADERS}
    assert len(set(mutants.ROWS.values())) == 30


@pytest.mark.slow
@pytest.mark.sample(8)
@pytest.mark.parametrize("name", mutants.FIRST)
def test_a_bug_in_diffusers_is_found_where_it_is_made_and_gone_afterwards(name: str) -> None:
    case = BY_ID[diffusers_mutants.SHOWN_IN[name]]
    ours, inputs = build(case.config, torch.float32), cast(case.inputs(), torch.float32)
    model = diffusers.build_diffusers(case.config.to_diffusers(), ours.state_dict(), torch.float32)
    before = diffusers.traced(model, inputs)
    with diffusers_mutants.inject(name, model):
        wrong = diffusers.traced(model, inputs)
    after = diffusers.traced(model, inputs)
    assert before.keys() == after.keys() and all(torch.equal(x, after[tap]) for tap, x in before.items())
    assert any(not torch.equal(before[tap], wrong[tap]) for tap in ("sample", "audio_sample"))
    report = compare_forwards(ours, inputs, run(ours, inputs), wrong)
    assert (
        report.verdict,
        report.first and re.sub(r"^transformer_blocks\.\d+\.", "", report.first) in mutants.FIRST[name][0],
    ) == (DIVERGED, True), report.sentence
