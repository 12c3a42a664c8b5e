"""The mutation study makes mutants of the installed diffusers, keeps none of its source, and counts what is found.

Run with: pytest tests/parity/test_mutation_study.py
"""

import ast
import inspect
import json
from pathlib import Path

import ast_mutants
import hint_labels
import mutation_study
import pytest
import rewrites
import torch
from ast_mutants import Mutant
from diffusers.models.transformers import transformer_ltx2
from mutation_study import ROOT, Results, Task, counted, done, near

ROTATION, ATTENTION = "apply_split_rotary_emb", "LTX2Attention.__init__"
OURS = (
    "tests/support/ast_mutants.py",
    "tests/support/rewrites.py",
    "tests/support/hint_labels.py",
    "scripts/mutation_study.py",
    "docs/mutation-study.md",
)


def the(function: str, operator: str, variant: str, of: str = "") -> Mutant:
    """Return the first mutant of its kind whose node has `of` in it."""
    nodes = [*ast.walk(ast_mutants.definition(function))]
    found = (mutant for mutant, _ in ast_mutants.candidates([function]))
    return next(x for x in found if (x.operator, x.variant) == (operator, variant) and of in ast.dump(nodes[x.node]))


def audited(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(mutation_study, "mutant_named", lambda name: mutant)
    return done(Task("mutant", mutant.id, "float32", ("2.3/t2v",)))


def test_there_are_more_than_300_mutants_of_a_block_and_each_operator_makes_some_somewhere():
    block = [mutant for mutant, _ in ast_mutants.candidates(["LTX2VideoTransformerBlock.forward"])]
    assert len(block) > 300
    assert len({mutant.id for mutant in block}) == len(block)
    some = ["LTX2VideoTransformer3DModel.forward", "LTX2AudioVideoRotaryPosEmbed.forward", ROTATION, "GELU.gelu"]
    made = {mutant.operator for mutant, _ in ast_mutants.candidates(some)} | {mutant.operator for mutant in block}
    assert made == {*ast_mutants.OPERATORS}


def test_every_mutant_of_a_function_compiles_under_the_functions_name():
    for mutant, _ in ast_mutants.candidates([ROTATION]):
        assert ast_mutants.compiled(ROTATION, ast_mutants.changed(mutant)).co_qualname == ROTATION


def test_none_of_diffusers_source_is_kept():
    code = [line.strip() for line in inspect.getsource(transformer_ltx2).splitlines()]
    theirs = {line for line in code if len(line) > 30 and not line.startswith(("#", "from ", "import "))}
    for name in OURS:
        if (ROOT / name).exists():
            kept = {line.strip() for line in (ROOT / name).read_text().splitlines()} & theirs
            assert not kept, (name, kept)


def test_diffusers_is_as_before_after_a_mutant_and_its_defaults_are_exchanged_meanwhile():
    rotate = transformer_ltx2.apply_split_rotary_emb
    cos, sin, x = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4), torch.rand(1, 3, 16)
    before = rotate(x, (cos, sin))
    with ast_mutants.mutated(the(ROTATION, "sign", "dropped", "sin")):
        assert not torch.equal(rotate(x, (cos, sin)), before)
    assert torch.equal(rotate(x, (cos, sin)), before)
    with ast_mutants.mutated(the(ATTENTION, "constant", "* 10", "1e-06")):
        assert transformer_ltx2.LTX2Attention(8, norm_eps=1e-3).norm_q.eps == 1e-3
        assert transformer_ltx2.LTX2Attention(8).norm_q.eps == pytest.approx(1e-5)
    assert transformer_ltx2.LTX2Attention(8).norm_q.eps == 1e-6


def test_another_sign_of_the_rotation_is_found_at_the_queries(monkeypatch: pytest.MonkeyPatch):
    found = audited(the(ROTATION, "sign", "dropped", "sin"), monkeypatch)
    assert found["verdict"] == "diverged"
    assert found["first"] == found["label"] == "transformer_blocks.0.attn1.q"


def test_another_epsilon_is_found_at_the_norm_of_the_queries(monkeypatch: pytest.MonkeyPatch):
    found = audited(the(ATTENTION, "constant", "* 10", "1e-06"), monkeypatch)
    assert found["verdict"] == "diverged"
    assert found["first"] == found["label"] == "transformer_blocks.0.attn1.norm_q"


def test_a_mutant_that_raises_is_a_result(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mutation_study, "mutant_named", lambda name: the("GELU.gelu", "dropped keyword", "0"))
    monkeypatch.setattr(ast_mutants, "mutated", lambda mutant: (_ for _ in ()).throw(RuntimeError("no")))
    assert done(Task("probe", "any", cases=("2.3/t2v",)))["error"] == "RuntimeError: no"


def test_there_are_40_honest_rewrites_and_one_passes_with_other_bits():
    assert len(rewrites.REWRITES) >= 40
    found = done(Task("rewrite", "modulation: x + x * s", "float32", ("2.3/t2v",)))
    assert found["verdict"] == "rounding"


def test_a_rewrite_that_is_none_fails(monkeypatch: pytest.MonkeyPatch):
    wrong = rewrites.Replacing({torch.nn.functional.gelu: lambda x, approximate: torch.nn.functional.relu(x)})
    monkeypatch.setitem(rewrites.REWRITES, "no rewrite", lambda model: wrong)
    assert done(Task("rewrite", "no rewrite", "float32", ("2.3/t2v",)))["verdict"] == "diverged"


def test_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mutant = the(ROTATION, "sign", "dropped", "sin")
    monkeypatch.setattr(mutation_study, "mutant_named", lambda name: mutant)
    monkeypatch.setattr(hint_labels, "label", lambda mutant, one: one["says"])
    base = {
        "kind": "mutant",
        "dtype": "float32",
        "error": 2.0,
        "own error": 1.0,
        "causes": [],
        "at label": "diverged",
        "case": "2.3/t2v",
    }
    lines = [
        {
            "effect": 1.0,
            "verdict": "diverged",
            "first": "rope.cos",
            "label": "rope.cos",
            "hints": ["x"],
            "says": "right",
        },
        {
            "effect": 1.0,
            "verdict": "diverged",
            "first": "rope.sin",
            "label": "rope.cos",
            "hints": ["x"],
            "says": "wrong",
        },
        {"effect": 1.0, "verdict": "diverged", "first": "proj_in", "label": "rope.cos", "hints": [], "says": "none"},
        {"effect": 1e-4, "verdict": "rounding", "first": None, "label": "rope.cos", "hints": [], "says": "none"},
        {"effect": 1e-6, "verdict": "rounding", "first": None, "label": "rope.cos", "hints": [], "says": "none"},
    ]
    file = tmp_path / "found.jsonl"
    file.write_text("".join(json.dumps(base | {"key": str(i), "name": str(i)} | x) + "\n" for i, x in enumerate(lines)))
    found = counted(Results(file, 1), "float32")
    assert (found["audited"], found["effect above 1e-5"], found["of these detected"]) == (5, 4, 3)
    assert (found["localised"], found["or in the same stage"]) == (1, 1)
    assert (found["hinted"], found["hinted right"], found["hinted wrong"]) == (2, 1, 1)


@pytest.mark.parametrize(
    ("first", "label", "where"),
    [
        ("transformer_blocks.0.attn1.q", "transformer_blocks.0.attn1.q", "at"),
        ("transformer_blocks.0.attn1.sdpa", "transformer_blocks.0.attn1.q", "stage"),
        ("transformer_blocks.1.attn1.q", "transformer_blocks.0.attn1.q", "elsewhere"),
        ("norm_out", "proj_out.input", "elsewhere"),
        (None, "proj_in", "elsewhere"),
    ],
)
def test_where_an_audit_points(first: str | None, label: str, where: str):
    assert near(first, label) == where
