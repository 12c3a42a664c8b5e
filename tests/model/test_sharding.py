"""The recipes of docs/sharding.md on 2 processes compute what one does, by the audit's verdict at every tap.

pytest tests/model/test_sharding.py
LTX2REF_CORPUS=full pytest tests/model/test_sharding.py    # each release in each dtype
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from tiny import random_model, tiny_config

import ltx2ref

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    ltx2ref.save(random_model(tiny_config("2.3"), torch.bfloat16), folder / "model.safetensors", dialect="lightricks")
    here = os.pathsep.join([str(Path(ltx2ref.__file__).parents[1]), str(Path(sharded.__file__).parent)])
    both = [
        subprocess.Popen(
            [sys.executable, sharded.__file__, str(rank), str(folder)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": here},
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)[-5000:]
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("release", "dtype"), sharded.MODELS)
@pytest.mark.parametrize("recipe", sharded.RECIPES)
def test_every_tap_is_within_the_budget_of_one_process(
    recipe: str, release: str, dtype: str, found: dict[str, Any]
) -> None:
    result = found[f"{recipe} {release} {dtype}"]
    assert result["taps"] >= 194 and result["budget"] <= 1
    assert result["verdict"] in (("identical",) if recipe == "fsdp" else ("identical", "rounding")), result


def test_each_process_keeps_its_share_of_the_weights(found: dict[str, Any]) -> None:
    kept = {recipe: found[f"{recipe} 2.3 bfloat16"]["kept"] for recipe in sharded.RECIPES}
    assert 0.5 <= kept["fsdp"] < 0.52 and 0.5 < kept["tensor_parallel"] < 0.56 and kept["sequence"] == 1


@pytest.mark.parametrize("bug", sharded.BUGS)
def test_a_mistake_in_a_recipe_would_be_seen(bug: str, found: dict[str, Any]) -> None:
    assert found[bug]["verdict"] == "diverged"


@pytest.mark.parametrize("recipe", sharded.RECIPES)
def test_start_py_gives_the_outputs(recipe: str, found: dict[str, Any]) -> None:
    verdicts = found[f"start.py with {recipe}"]
    allowed = ("identical",) if recipe == "fsdp" else ("identical", "rounding")
    assert verdicts.keys() == {"sample", "audio_sample"} and set(verdicts.values()) <= set(allowed)
