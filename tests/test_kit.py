"""The kit: a NumPy port passes it, a broken one is told where, and everything in it bears load.

    pytest tests/test_kit.py
"""
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy_port
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from ltx2ref import cli
from ltx2ref.kit import check as checking
from ltx2ref.kit.cases import COMPONENTS, MODELS
from ltx2ref.kit.check import check, failures
from ltx2ref.kit.export import Source, export
from ltx2ref.parity import generator, judge, record, verify
from ltx2ref.parity.audit import judge as audited
from ltx2ref.parity.cases import Case
from ltx2ref.parity.probe import probe
from ltx2ref.parity.record import DTYPES
from ltx2ref.parity.report import DIVERGED, IDENTICAL
from ltx2ref.parity.taps import PHASES, Taps, trace

pytestmark = pytest.mark.slow

PORT = Path(numpy_port.__file__)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    export(folder)
    return folder


@pytest.fixture(scope="module")
def results(kit: Path) -> Path:
    run_port(kit, kit.parent / "results")
    return kit.parent / "results"


def run_port(kit: Path, results: Path) -> None:
    with patch.object(sys, "argv", ["numpy_port.py", str(kit), str(results)]):
        numpy_port.main()


def cases(kit: Path) -> list[dict[str, Any]]:
    return json.loads((kit / "kit.json").read_text(encoding="utf-8"))["cases"]


# ---------------------------------------------------------------- what is in it
def test_it_is_small_and_complete(kit: Path) -> None:
    assert sum(file.stat().st_size for file in kit.iterdir()) <= 20e6
    written = {case["file"] for case in cases(kit)} | {"kit.json", "README.md"}
    assert {file.name for file in kit.iterdir()} == written
    assert [case["id"] for case in cases(kit)] == [part.id for part in (*COMPONENTS, *MODELS)]
    assert {case["release"] for case in cases(kit) if case["operation"] == "model"} == {"2.0", "2.3", "2.5"}
    operations = set(numpy_port.OPERATIONS)
    assert {case["operation"] for case in cases(kit)} == operations


def test_every_tensor_is_readable_without_bfloat16_and_said_in_kit_json(kit: Path) -> None:
    for case in cases(kit):
        file = load_file(kit / case["file"])
        named = {f"{dtype}/{kind}/{name}" for dtype in DTYPES
                 for kind, names in (("inputs", case["inputs"]), ("expected", case["outputs"]),
                                     ("error", case["outputs"])) for name in names}
        assert {name for name in file if "/weights/" not in name} == named, case["id"]
        assert not [name for name, x in file.items() if name.startswith("float32") and x.dtype == np.uint16]


@pytest.mark.diffusers
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_what_is_expected_is_what_diffusers_computes_here(case: Case, kit: Path) -> None:
    """And what this package does; where this machine computes with the recording's bits, to the bit."""
    from ltx2ref.parity.oracles import diffusers
    cpu = torch.device("cpu")
    same_bits = record.environment()["probe"] == probe(cpu, tuple(DTYPES.values()))
    for dtype in DTYPES:
        source = Source(case, dtype)
        model = diffusers.build_diffusers(case.config.to_diffusers(), source.model.state_dict(), DTYPES[dtype])
        with torch.no_grad(), trace(model, diffusers.LAYOUT) as taps:
            diffusers.run_diffusers(model, source.inputs)
        assert audited(source.model, source.inputs, taps).verdict == IDENTICAL
        natively = verify.verify(case, dtype, cpu, same_bits, "native").native
        assert natively is not None and natively.verdict in (IDENTICAL, verify.WITHIN)


# ---------------------------------------------------------------- a port
def test_the_numpy_port_imports_nothing_of_this_and_passes(kit: Path, tmp_path: Path) -> None:
    code = ("import sys, runpy; sys.modules['torch'] = sys.modules['ltx2ref'] = None;"
            f"sys.argv = ['port', {str(kit)!r}, {str(tmp_path / 'results')!r}];"
            f"runpy.run_path({str(PORT)!r}, run_name='__main__')")
    subprocess.run([sys.executable, "-c", code], check=True)
    verdict = check(tmp_path / "results", kit)
    assert verdict.status == 0 and verdict.passed == len(verdict.results) == 2 * len(COMPONENTS + MODELS)
    assert verdict.summary == f"ltx2ref kit: conformant, {verdict.passed} of {verdict.passed} cases pass"
    for result in verdict.results:
        assert result.report is not None
        worst = max((row.budget or 0.0, row.name) for row in result.report.rows)
        assert worst[0] < 1e-6, (result.case, worst)  # of the budget: two float64 programs by different hands


def erf_gelu(x: Any) -> Any:
    return torch.nn.functional.gelu(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def heads_that_rotate_alike(x: Any, rope: Any, layout: str, rotate: Any = numpy_port.rotate) -> Any:
    return rotate(x, tuple(np.repeat(part[:, :, :1], part.shape[2], axis=2) for part in rope), layout)


def bias_after_the_gate(w: Any, name: str, x: Any, linear: Any = numpy_port.linear) -> Any:
    return linear({key: y for key, y in w.items() if not key.endswith("audio_ff.net.0.proj.bias")}, name, x)


@pytest.mark.parametrize("broken,change,first,components", [
    ("gelu", erf_gelu, "transformer_blocks.0.ff.activation", {"feed-forward", "text-projection", "block"}),
    ("rotate", heads_that_rotate_alike, "transformer_blocks.0.attn1.q", {"rotation", "attention", "exchange", "block"}),
    ("linear", bias_after_the_gate, "transformer_blocks.0.audio_ff.proj", {"feed-forward", "block"}),
])
def test_a_broken_port_is_told_where(broken: str, change: Any, first: str, components: set[str], kit: Path,
                                     tmp_path: Path) -> None:
    with patch.object(numpy_port, broken, change):
        run_port(kit, tmp_path)
    verdict = check(tmp_path, kit)
    wrong = failures(verdict)
    assert verdict.status == 1 and wrong["2.3/kit-t2v float32"].first == first
    assert {name.split("/")[0] for name in wrong if not name.startswith("2.")} <= components
    assert {"feed-forward", "rotation"} & components & {name.split("/")[0] for name in wrong}


def test_results_in_every_dtype_and_of_some_cases_are_judged(kit: Path, results: Path, tmp_path: Path) -> None:
    case = next(case for case in cases(kit) if case["id"] == "feed-forward/video")
    for dtype, name in case["results"].items():
        found = {tap: x.astype(np.float32) for tap, x in load_file(results / name).items()}
        if dtype == "bfloat16":  # ties away from zero
            found = {tap: (x.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) for tap, x in found.items()}
        else:
            del found[case["outputs"][0]]
        save_file(found, tmp_path / name)
    verdict = check(tmp_path, kit)
    assert (verdict.status, verdict.passed) == (0, 2)
    assert verdict.summary == f"ltx2ref kit: conformant, 2 of {len(verdict.results)} cases pass, " \
                              f"{len(verdict.results) - 2} not given"


@pytest.mark.parametrize("name,tensors,said", [
    ("feed-forward-video.float32.safetensors", {"sample": np.zeros(3)}, "sample is no output of this case"),
    ("feed-forward-video.float32.safetensors", {"transformer_blocks.0.ff.output": np.zeros(3, np.int64)}, "int64"),
    ("feed-forward.safetensors", {"x": np.zeros(3)}, "is the result of no case"),
    ("feed-forward-video.float32.safetensors", b"not a file", "feed-forward-video.float32.safetensors"),
])
def test_results_that_are_none_are_refused_in_one_line(
    name: str, tensors: Any, said: str, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(tensors, bytes):
        (tmp_path / name).write_bytes(tensors)
    else:
        save_file(tensors, tmp_path / name)
    code = cli.main(["kit", "check", str(tmp_path), "--kit", str(kit)])
    out, error = capsys.readouterr()
    assert (code, out, len(error.splitlines())) == (2, "", 1) and said in error


def test_wrong_shapes_and_nothing_at_all_do_not_pass(kit: Path, tmp_path: Path) -> None:
    assert check(tmp_path, kit).status == 2
    save_file({"transformer_blocks.0.ff.output": np.zeros((2, 3))}, tmp_path / "feed-forward-video.float32.safetensors")
    assert check(tmp_path, kit).status == 1
    for folder in (tmp_path / "none", kit / "kit.json"):
        with pytest.raises(ValueError, match="expected a folder"):
            check(folder, kit)
    with pytest.raises(ValueError, match="no kit"):
        check(tmp_path, tmp_path)
    damaged = shutil.copytree(kit, tmp_path / "damaged")
    (damaged / "feed-forward-video.safetensors").write_bytes(b"not a file")
    with pytest.raises(ValueError, match="feed-forward-video"):
        check(tmp_path, damaged)
    with pytest.raises(ValueError, match="new or empty"):
        export(kit)


def test_a_last_bit_of_an_angle_is_no_error_of_what_follows(kit: Path, results: Path, tmp_path: Path) -> None:
    """A port whose RoPE tables round otherwise, by as much as diffusers' own, is judged by its own tables."""
    case = next(case for case in cases(kit) if case["id"] == "2.3/kit-t2v")
    name, source = case["results"]["float32"], Source(MODELS[1], "float32")
    nudged = {tap: torch.nextafter(x, torch.full_like(x, 2.0)) if tap.endswith(".cos") else x
              for tap, x in source.taps.items() if tap.endswith(PHASES)}
    taps = verify.run(source.model, source.inputs, nudged)
    save_file({tap: x.numpy() for tap, x in (taps | nudged).items() if tap in case["outputs"]}, tmp_path / name)
    assert check(tmp_path, kit).status == 0


# ---------------------------------------------------------------- everything bears load
NO_USE = "without prompt AdaLN only use_cross_timestep would look at it, as the kit's 2.5 model does"
EXCEPTIONS = {"2.0": {"sigma": NO_USE, "audio_sigma": NO_USE}, "2.3": {},
              "2.5": {"fps": "coordinates are given; 2.3's models and the positions use it"}}


@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
def test_every_parameter_and_every_input_moves_an_expected_output_by_more_than_the_budget(release: str) -> None:
    sources = [Source(case, "float32") for case in MODELS if case.release == release]
    idle = {}
    for source in sources:
        unmoved = verify.run(source.model, source.inputs)  # on this machine, whose bits need not be the recording's
        budget = {name: beyond(source, name) for name in ("sample", "audio_sample")}
        for name, x in source.weights.items():
            moved = x + generator.uniform(f"moved/{name}", tuple(x.shape), 0.25)
            with patch_parameter(source, name, moved):
                idle[name] = idle.get(name, True) and not moves(source, source.inputs, unmoved, budget)
        for name, changed in changes(source):
            idle[name] = idle.get(name, True) and not moves(source, source.inputs | changed, unmoved, budget)
    assert {name for name, x in idle.items() if x} == EXCEPTIONS[release].keys()
    assert len(idle) > len(sources[0].weights)


def beyond(source: Source, name: str) -> float:
    true = source.truth(source.case)[name]
    return 2 * (judge.SHARE * judge.norm(source.taps[name].double() - true) + judge.FLOOR * judge.norm(true))


def moves(source: Source, inputs: dict[str, Any], unmoved: Taps, budget: dict[str, float]) -> bool:
    found = verify.run(source.model, inputs)
    return any(judge.norm(found[name].double() - unmoved[name].double()) > allowed
               for name, allowed in budget.items())


class patch_parameter:
    def __init__(self, source: Source, name: str, value: Tensor) -> None:
        self.parameter, self.value = source.model.get_parameter(name), value

    def __enter__(self) -> None:
        self.before, self.parameter.data = self.parameter.data, self.value

    def __exit__(self, *_: object) -> None:
        self.parameter.data = self.before


def changes(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each argument of this case by itself, changed. What a case replaces by coordinates is None in it."""
    given = source.inputs
    grid = {"num_frames": "height", "height": "width", "width": "num_frames"}
    for name, x in given.items():
        if x is None or name == "attention_kwargs":
            continue
        if isinstance(x, Tensor):
            yield name, {name: 1 - x if "mask" in name else x * 1.25}
        elif name in grid:  # the same number of tokens in another grid
            yield name, {name: given[grid[name]], grid[name]: x}
        elif name == "fps":
            yield name, {} if "video_coords" in given else {name: 24.0}
        elif name == "spatio_temporal_guidance_blocks":
            yield name, {name: [1 - i for i in x]}
        elif isinstance(x, bool):
            yield name, {name: not x}
        else:
            assert name == "audio_num_frames", name  # the number of tokens: any other is refused
    for name, mask in (given.get("attention_kwargs") or {}).items():
        yield name, {"attention_kwargs": given["attention_kwargs"] | {name: 1 - mask}}


def test_the_truth_that_is_stored_is_the_models(kit: Path) -> None:
    case = next(case for case in cases(kit) if case["id"] == "2.0/kit")
    file: Taps = checking.load_file(kit / case["file"])
    for dtype in DTYPES:
        true = Source(MODELS[0], dtype).truth(MODELS[0])
        for name in case["outputs"]:
            expected, error = checking.part(file, f"{dtype}/expected/")[name].double(), file[f"{dtype}/error/{name}"]
            rounded = error.double().abs() * 2.0**-23 + 1e-30  # the error is stored in float32
            assert ((expected - error.double() - true[name]).abs() <= rounded).all(), name


def test_check_says_what_is_wrong_and_writes_a_page(
    kit: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    name = "2.3-kit-t2v.float32.safetensors"
    found = load_file(results / name)
    found["transformer_blocks.1.attn2.sdpa"] = -found["transformer_blocks.1.attn2.sdpa"]
    save_file(found, folder / name)
    code = cli.main(["kit", "check", str(folder), "--kit", str(kit), "--html", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert code == 1 and "first divergence at transformer_blocks.1.attn2.sdpa (diverged)" in said
    assert said.splitlines()[-1].startswith("ltx2ref kit: not conformant, 0 of ")
    assert "attn2" in (tmp_path / "page.html").read_text(encoding="utf-8")
    code = cli.main(["kit", "check", str(folder), "--kit", str(kit), "--json"])
    report = next(x for x in json.loads(capsys.readouterr().out)["results"] if x["report"])["report"]
    assert (code, report["verdict"]) == (1, DIVERGED)
