"""The kit: a NumPy port passes it on both levels, a broken one is told where, and everything in it bears load.

pytest tests/kit/test_kit.py
LTX2REF_CORPUS=full pytest tests/kit/test_kit.py    # broken ports in all cases and both dtypes
"""

import errno
import hashlib
import json
import os
import shutil
import signal
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

import ltx2ref
from ltx2ref import cli, exact, whole
from ltx2ref.kit import check as checking
from ltx2ref.kit.cases import COMPONENTS, MASKED, MODELS, NEWEST, T2V
from ltx2ref.kit.check import check_results
from ltx2ref.kit.export import export
from ltx2ref.kit.identity import identity
from ltx2ref.kit.reading import read_tensors, tensors_under
from ltx2ref.kit.recorded import RecordedModel
from ltx2ref.kit.verdict import EXACT_LEVEL, LEVELS, NATIVE_LEVEL
from ltx2ref.parity import compare, generator, record, truth, verify
from ltx2ref.parity.arithmetic import VERSION
from ltx2ref.parity.audit import audit_natively as audited
from ltx2ref.parity.cases import OUTPUTS, Case
from ltx2ref.parity.machines import MACHINES, machine
from ltx2ref.parity.record import NATIVE_DTYPES, RecordError, digest
from ltx2ref.parity.report.rows import DIVERGED, IDENTICAL
from ltx2ref.parity.run import run
from ltx2ref.parity.trace.probe import probe
from ltx2ref.parity.trace.sketch import sketch
from ltx2ref.parity.trace.taps import PHASES, Taps, trace
from ltx2ref.parity.truth import Truth

pytestmark = pytest.mark.slow

PORT = Path(numpy_port.__file__)
FULL = os.environ.get("LTX2REF_CORPUS") == "full"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_another_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="level = 'exactly': expected native or exact"):
        check_results(tmp_path, level="exactly")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    export(folder)
    return folder


@pytest.fixture(scope="module")
def results(kit: Path) -> Path:
    for level in LEVELS:
        run_port(kit, kit.parent / "results", level)
    return kit.parent / "results"


def run_port(kit: Path, results: Path, level: str = NATIVE_LEVEL) -> None:
    with patch.object(sys, "argv", ["numpy_port.py", str(kit), str(results), "--level", level]):
        numpy_port.main()


def cases(kit: Path) -> list[dict[str, Any]]:
    return json.loads((kit / "kit.json").read_text(encoding="utf-8"))["cases"]


def case_named(kit: Path, name: str) -> dict[str, Any]:
    return next(case for case in cases(kit) if case["id"] == name)


def some(results: Path, name: str, folder: Path) -> Path:
    """Return a folder with the results of one case on both levels."""
    for path in results.rglob(f"{name.replace('/', '-')}.*"):
        copy = folder / path.relative_to(results)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


# ---------------------------------------------------------------- what is in it
def test_it_is_small_and_complete(kit: Path) -> None:
    assert sum(file.stat().st_size for file in kit.iterdir()) <= 22.5e6
    written = {case["file"] for case in cases(kit)} | {"kit.json", "README.md"}
    assert {file.name for file in kit.iterdir()} == written
    assert [case["id"] for case in cases(kit)] == [part.id for part in (*COMPONENTS, *MODELS)]
    assert {case["release"] for case in cases(kit) if case["operation"] == "model"} == {"2.0", "2.3", "2.5"}
    operations = set(numpy_port.OPERATIONS)
    assert {case["operation"] for case in cases(kit)} == operations


def test_every_tensor_is_readable_without_bfloat16_and_said_in_kit_json(kit: Path) -> None:
    for case in cases(kit):
        file = load_file(kit / case["file"])
        named = {
            f"{dtype}/{kind}/{name}"
            for dtype in NATIVE_DTYPES
            for kind, names in (("inputs", case["inputs"]), ("expected", case["outputs"]), ("error", case["outputs"]))
            for name in names
        }
        if case["operation"] != "model":
            taps = [name for name in case["inputs"] if f"float32/exact/inputs/{name}" in file]
            assert set(case["inputs"]) - set(taps) <= set(
                next(part for part in COMPONENTS if part.id == case["id"]).raw
            ), case["id"]
            named |= {
                f"{dtype}/exact/{kind}/{name}"
                for dtype in NATIVE_DTYPES
                for kind, names in (("inputs", taps), ("expected", case["outputs"]))
                for name in names
            }
        assert {name for name in file if "/weights/" not in name} == named, case["id"]
        assert not [name for name, x in file.items() if name.startswith("float32") and x.dtype == np.uint16]


@pytest.mark.sample(2)
@pytest.mark.diffusers
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_what_is_expected_is_what_diffusers_computes_here(case: Case, kit: Path) -> None:
    """This package computes it as well, to the bit where this machine computes with the recording's bits."""
    from ltx2ref.parity.oracles import diffusers

    cpu = torch.device("cpu")
    same_bits = record.environment()["probe"] == probe(cpu, tuple(NATIVE_DTYPES.values()))
    for dtype in NATIVE_DTYPES:
        source = RecordedModel(case, dtype)
        model = diffusers.build_diffusers(case.config.to_diffusers(), source.model.state_dict(), NATIVE_DTYPES[dtype])
        with torch.no_grad(), trace(model, diffusers.LAYOUT) as taps:
            diffusers.run_diffusers(model, source.inputs)
        assert audited(source.model, source.inputs, taps).verdict == IDENTICAL
        natively = verify.verify(case, dtype, cpu, same_bits, "native").native
        assert natively is not None and natively.verdict in (IDENTICAL, verify.WITHIN)


def test_a_digest_is_what_the_readme_says(kit: Path) -> None:
    """Compute it without torch from a file's tensors, as in another language."""
    for case in cases(kit):
        file = load_file(kit / case["file"])
        for dtype, said in case["exact"].items():
            for name, wanted in said["digests"].items() if case["operation"] != "model" else ():
                x = file[f"{dtype}/exact/expected/{name}"]
                kind = "bfloat16" if x.dtype == np.uint16 else "float32"
                text = f"{kind} {','.join(map(str, x.shape))}\n".encode()
                assert hashlib.sha256(text + x.astype(x.dtype.newbyteorder("<")).tobytes()).hexdigest()[:32] == wanted


@pytest.mark.diffusers
@pytest.mark.parametrize("case", [*MODELS, MASKED], ids=lambda case: case.id)
def test_the_exact_level_is_what_diffusers_computes_under_exact_arithmetic(case: Case, kit: Path) -> None:
    """Compare a model's digests, and the digests and tensors of the components that come from it."""
    from ltx2ref.parity.oracles import diffusers

    for dtype in NATIVE_DTYPES:
        source = RecordedModel(case, dtype)
        model = diffusers.build_diffusers(case.config.to_diffusers(), source.weights, NATIVE_DTYPES[dtype])
        with exact():
            taps = diffusers.traced(model, source.inputs)
        for about in cases(kit):
            if case.id in (about["id"], about["from"]):
                digests = about["exact"][dtype]["digests"]
                assert digests == {name: digest(taps[name]).hex() for name in digests}
                assert set(digests) == (set(taps) if about["id"] == case.id else set(about["outputs"]))
                file = read_tensors(kit / about["file"])
                for kind in ("inputs", "expected"):
                    for name, x in tensors_under(file, f"{dtype}/exact/{kind}/").items():
                        assert digest(x) == digest(taps[name]), (about["id"], name)


def test_a_recording_with_another_digest_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, load = "transformer_blocks.1.ff.activation", record.load_exact

    def changed(case: Case, dtype: str) -> record.ExactRecord:
        found = load(case, dtype)
        if (case.id, dtype) == ("2.3/kit-t2v", "bfloat16"):
            found.digests[name] = bytes(16)
        return found

    monkeypatch.setattr(record, "load_exact", changed)
    said = f"2.3/kit-t2v bfloat16: 1 of 232 taps have another digest here than recorded, the first is {name}"
    with pytest.raises(RecordError, match=said):
        export(tmp_path / "kit")
    assert cli.main(["kit", "export", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == f"ltx2ref: {said}\n" and not [*tmp_path.rglob("*.*")]


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from ltx2ref import cli
from ltx2ref.kit import export
def first_case_and_then_a_signal():
    yield {"file": "a.safetensors"}, {}
    assert os.path.exists(sys.argv[3]), "otherwise the test shows nothing"
    os.kill(os.getpid(), int(sys.argv[1]))
    yield {"file": "b.safetensors"}, {}
export.everything = first_case_and_then_a_signal
from ltx2ref import whole
whole.secrets.token_hex = lambda size: "x"
sys.exit(cli.main(["kit", "export", sys.argv[2]]))
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_export_leaves_no_file(number: signal.Signals, there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "kit"
    if there:
        folder.mkdir()
    partial = (folder if there else tmp_path) / ".ltx2ref-x.partial" / "a.safetensors"
    command = [sys.executable, "-c", INTERRUPTED, str(int(number)), str(folder), str(partial)]
    done = subprocess.run(command, cwd=Path(ltx2ref.__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, "")
    assert [*tmp_path.rglob("*")] == ([folder] if there else [])


@pytest.mark.parametrize("there", [False, True])
def test_a_kit_that_cannot_be_put_in_its_place_leaves_no_file(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = tmp_path / "kit", whole.place
    if there:
        folder.mkdir()

    def refused(path: Path, target: Path) -> None:
        if path.name == "a.safetensors" or path.suffix == ".partial":
            raise OSError(errno.EACCES, "Permission denied")
        place(path, target)

    monkeypatch.setattr("ltx2ref.kit.export.everything", lambda: iter([({"file": "a.safetensors"}, {})]))
    monkeypatch.setattr(whole, "place", refused)
    with pytest.raises(ValueError, match="kit: cannot be written: Permission denied"):
        export(folder)
    assert [*tmp_path.rglob("*")] == ([folder] if there else [])
    monkeypatch.undo()
    monkeypatch.setattr("ltx2ref.kit.export.everything", lambda: iter([({"file": "a.safetensors"}, {})]))
    export(folder)
    assert {path.name for path in tmp_path.rglob("*")} == {"kit", "README.md", "a.safetensors", "kit.json"}


def test_a_self_mask_bears_load_in_bfloat16_too() -> None:
    """A mask that rounds to 1 has no effect, which is why there is another one."""
    name, at = "video_self_attention_mask", "transformer_blocks.0.attn1.sdpa"
    for case, bears in ((NEWEST, False), (MASKED, True)):
        source = RecordedModel(case, "bfloat16")
        kwargs = source.inputs["attention_kwargs"]
        ones = source.inputs | {"attention_kwargs": kwargs | {name: torch.ones_like(kwargs[name])}}
        assert (kwargs[name] < 1).any() and (kwargs[name].bfloat16() < 1).any() == bears
        assert torch.equal(run(source.model, source.inputs)[at], run(source.model, ones)[at]) != bears


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_a_component_without_a_native_recording_has_no_false_alarm(dtype: str) -> None:
    """It is judged by the exact tensors, with an allowance for what these lose.

    TF32 does not pass as float32 arithmetic.
    """
    part = next(part for part in COMPONENTS if part.case == MASKED)
    source = RecordedModel(MASKED, dtype)
    true, given = source.truth(part), {name: source.taps[name] for name in part.given}
    expected = {name: source.taps[name] for name in part.outputs}
    for name in MACHINES.keys() - ({"tf32"} if dtype == "float32" else set()):
        with exact(machine(name)):
            taps = run(source.model, source.inputs, given)
        report = checking.noted(
            checking.compare(expected, {tap: taps[tap] for tap in expected}, {tap: true[tap] for tap in expected})
        )
        assert report.passed, (name, report.sentence)


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["rope/video", "rope/audio"])
def test_rope_components_have_no_false_alarm(name: str, kit: Path, tmp_path: Path) -> None:
    """The recorded tables of one of them happen to be almost exact."""
    part = next(part for part in COMPONENTS if part.id == name)
    case, source = case_named(kit, name), RecordedModel(part.case, "float32")
    for other in MACHINES.keys() - {"tf32"}:
        with exact(machine(other)):
            taps = run(source.model, source.inputs)
        save_file({tap: taps[tap].contiguous().numpy() for tap in part.outputs}, tmp_path / case["results"]["float32"])
        verdict = check_results(tmp_path, kit, partial=True)
        assert verdict.status == 0, (other, verdict.given[0].sentence)


# ---------------------------------------------------------------- components on machines that round more often
def in_parts(count: int, matmul: Any = numpy_port.matmul) -> Any:
    """Return a matrix product that is split along its sum, as by tensor parallelism, with each part rounded."""

    def product(a: Any, b: Any) -> Any:
        size = max(-(-a.shape[-1] // count), 1)
        starts = range(0, a.shape[-1], size)
        total, *more = (numpy_port.r(matmul(a[..., i : i + size], b[..., i : i + size])) for i in starts)
        for part in more:
            total = numpy_port.r(total + part)
        return total

    return product


def write_components(kit: Path, results: Path, dtype: str, **changes: Any) -> Path:
    """Have the NumPy port compute all components from their native inputs, rounding after each operation."""
    results.mkdir()
    with patch.multiple(numpy_port, **changes), patch.object(numpy_port.Numbers, "dtype", dtype):
        for case in cases(kit):
            if case["operation"] != "model":
                numpy_port.TAPS.clear()
                file = load_file(kit / case["file"])
                weights, inputs = (numpy_port.given(file, f"{dtype}/{kind}/") for kind in ("weights", "inputs"))
                numpy_port.OPERATIONS[case["operation"]](case, weights, inputs)
                taps = {name: np.ascontiguousarray(numpy_port.TAPS[name], "float32") for name in case["outputs"]}
                save_file(taps, results / case["results"][dtype])
    return results


def wrong_components(results: Path, kit: Path) -> set[str]:
    return {name.split()[0] for name in check_results(results, kit, partial=True).failures}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "count,dtype", [(8, "float32"), (2, "bfloat16"), (3, "bfloat16"), (5, "bfloat16"), (8, "bfloat16")]
)
def test_matrix_products_in_rounded_parts_are_no_failure_of_a_component(
    count: int, dtype: str, kit: Path, tmp_path: Path
) -> None:
    """Another program computes them here, in numbers of parts that no simulated machine has.

    In bfloat16 some take more than two budgets, and pass because a machine explains them.
    """
    results = write_components(kit, tmp_path / "results", dtype, matmul=in_parts(count))
    assert not wrong_components(results, kit)
    with patch.object(checking, "explain_by_machines", lambda rows, *_: [*rows]):
        assert bool(wrong_components(results, kit)) == (dtype == "bfloat16" and count > 2)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["quarters", "eighths"])
def test_components_on_a_machine_that_rounds_more_often_have_no_false_alarm(
    name: str, kit: Path, tmp_path: Path
) -> None:
    sources: dict[str, RecordedModel] = {}
    for part in COMPONENTS:
        source = sources.setdefault(part.case.id, RecordedModel(part.case, "bfloat16"))
        given = source.given(part)
        with exact(machine(name)):
            taps = run(source.model, source.inputs, given)
        for before, after in part.chain:  # the residual continues from what the machine had, not from what was given
            taps[after] = (given[before].double() + taps[after].double() - taps[before].double()).bfloat16()
        found = {tap: taps[tap].float().contiguous().numpy() for tap in part.outputs}
        save_file(found, tmp_path / case_named(kit, part.id)["results"]["bfloat16"])
    verdict = check_results(tmp_path, kit, partial=True)
    assert (verdict.status, verdict.passed) == (0, len(COMPONENTS))
    notes = [note for report in verdict.given for note in report.notes]
    assert any("no farther from float64 than ltx2ref on simulated machines" in note for note in notes)


def erf_gelu(x: Any) -> Any:
    return torch.nn.functional.gelu(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def rotated_backwards(x: Any, rope: Any, layout: str, rotate: Any = numpy_port.rotate) -> Any:
    return rotate(x, (rope[0], -rope[1]), layout)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "bug,dtype,count,components",
    [
        ({"gelu": erf_gelu}, "float32", 8, {"feed-forward", "text-projection", "block"}),
        ({"EPS": 1e-5}, "float32", 8, {"attention", "exchange", "block", "output"}),
        ({"rotate": rotated_backwards}, "float32", 8, {"rotation", "attention", "exchange", "block"}),
        ({"rotate": rotated_backwards}, "bfloat16", 1, {"rotation", "attention", "exchange", "block"}),
        ({"rotate": rotated_backwards}, "bfloat16", 8, {"rotation", "attention", "exchange", "block"}),
    ],
)
def test_a_bug_of_a_component_is_found_however_often_a_machine_rounds(
    bug: dict[str, Any], dtype: str, count: int, components: set[str], kit: Path, tmp_path: Path
) -> None:
    results = write_components(kit, tmp_path / "results", dtype, matmul=in_parts(count), **bug)
    assert {name.split("/")[0] for name in wrong_components(results, kit)} == components


def test_a_kit_with_other_weights_than_this_versions_is_judged_without_machines(kit: Path, tmp_path: Path) -> None:
    case = case_named(kit, "attention/audio-self")
    file = read_tensors(kit / case["file"])
    assert checking.component_of(case, "bfloat16", file) is not None
    for name in (
        "weights/transformer_blocks.0.audio_attn1.to_q.bias",
        "weights/transformer_blocks.0.audio_attn1.to_q.x",
    ):
        assert checking.component_of(case, "bfloat16", file | {f"bfloat16/{name}": torch.ones(20)}) is None
    assert checking.component_of(case | {"id": "attention/of-another-version"}, "bfloat16", file) is None


@pytest.mark.parametrize("given", ["by batch element", "as a sketch"])
def test_an_audit_judges_a_slightly_wrong_tap_however_it_is_given(given: str) -> None:
    """The tap is wrong by 2 to 300 budgets. Simulated machines are asked where there are tensors."""
    source = RecordedModel(T2V, "bfloat16")
    tokens = source.inputs["hidden_states"].shape[1]
    inputs = source.inputs | {"timestep": source.inputs["timestep"][:, None].expand(-1, tokens).contiguous()}
    taps = run(source.model, inputs)
    name = "time_embed.emb" if given == "by batch element" else "proj_in"
    x = taps[name][::tokens] if given == "by batch element" else taps[name]
    theirs: dict[str, Any] = taps | {
        name: (x.double() * (1 + generator.uniform("wrong", tuple(x.shape), 0.03))).bfloat16()
    }
    theirs = {tap: sketch(y) for tap, y in theirs.items()} if given == "as a sketch" else theirs
    row = next(row for row in audited(source.model, inputs, theirs).rows if row.name == name)
    assert row.verdict == DIVERGED and row.budget is not None and 2 < row.budget < 300


# ---------------------------------------------------------------- a port
@pytest.mark.parametrize("level,word", [(NATIVE_LEVEL, "conformant"), (EXACT_LEVEL, "identical")])
def test_the_numpy_port_imports_nothing_of_this_and_passes(level: str, word: str, kit: Path, tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = sys.modules['ltx2ref'] = None;"
        f"sys.argv = ['port', {str(kit)!r}, {str(tmp_path / 'results')!r}, '--level', {level!r}];"
        f"runpy.run_path({str(PORT)!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    verdict = check_results(tmp_path / "results", kit, level)
    assert verdict.status == 0 and verdict.passed == len(verdict.results) == 2 * len(COMPONENTS + MODELS)
    taps = sum(len(result.report.rows) for result in verdict.results if result.report is not None)
    assert verdict.summary == f"ltx2ref kit: {word}, {verdict.passed} of {verdict.passed} cases pass" + (
        f", {taps:,} of {taps:,} taps identical" if level == EXACT_LEVEL else ""
    )
    for result in verdict.results:
        assert result.report is not None
        if level == EXACT_LEVEL:
            digests = case_named(kit, result.case)["exact"][result.dtype]["digests"]
            assert [(row.name, row.verdict) for row in result.report.rows] == [(name, IDENTICAL) for name in digests]
        else:
            worst = max((row.budget or 0.0, row.name) for row in result.report.rows)
            assert worst[0] < 1e-6, (
                result.case,
                worst,
            )  # share of the budget that two independent float64 programs may differ by


def heads_that_rotate_alike(x: Any, rope: Any, layout: str, rotate: Any = numpy_port.rotate) -> Any:
    return rotate(x, tuple(np.repeat(part[:, :, :1], part.shape[2], axis=2) for part in rope), layout)


def bias_after_the_gate(w: Any, name: str, x: Any, linear: Any = numpy_port.linear) -> Any:
    return linear({key: y for key, y in w.items() if not key.endswith("audio_ff.net.0.proj.bias")}, name, x)


@pytest.mark.parametrize(
    "broken,change,first,components",
    [
        ("gelu", erf_gelu, "transformer_blocks.0.ff.activation", {"feed-forward", "text-projection", "block"}),
        (
            "rotate",
            heads_that_rotate_alike,
            "transformer_blocks.0.attn1.q",
            {"rotation", "attention", "exchange", "block"},
        ),
        ("linear", bias_after_the_gate, "transformer_blocks.0.audio_ff.proj", {"feed-forward", "block"}),
    ],
)
def test_a_broken_port_is_told_where(
    broken: str, change: Any, first: str, components: set[str], kit: Path, tmp_path: Path
) -> None:
    """Run the components and one model in float32, in which a mistake shows most."""
    with patch.object(numpy_port, broken, change):
        for case in cases(kit):
            if FULL or case["operation"] != "model" or case["id"] == "2.3/kit-t2v":
                for dtype in NATIVE_DTYPES if FULL else ["float32"]:
                    taps = numpy_port.compute(case, load_file(kit / case["file"]), dtype, NATIVE_LEVEL)
                    save_file(taps, tmp_path / case["results"][dtype])
    verdict = check_results(tmp_path, kit, partial=True)
    wrong = verdict.failures
    assert verdict.status == 1 and wrong["2.3/kit-t2v float32"].first == first
    assert {name.split("/")[0] for name in wrong if not name.startswith("2.")} <= components
    assert {"feed-forward", "rotation"} & components & {name.split("/")[0] for name in wrong}


def sum_in_float32(x: Any) -> Any:
    total = numpy_port.r32(x[..., 0])
    for i in range(1, x.shape[-1]):
        total = numpy_port.r32(total + numpy_port.r32(x[..., i]))
    return total


def modulation_of_one_rounding_less(x: Any, scale: Any, shift: Any) -> Any:
    return numpy_port.r(numpy_port.r(x * (1.0 + scale)) + shift)


def bias_after_rounding(w: Any, name: str, x: Any, linear: Any = numpy_port.linear) -> Any:
    return numpy_port.r(linear({name + ".weight": w[name + ".weight"]}, name, x) + w.get(name + ".bias", 0.0))


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize(
    "broken,change,first,natively",
    [
        ("gelu", erf_gelu, "transformer_blocks.0.ff.activation", 1),
        ("fold", sum_in_float32, {"float32": "proj_in", "bfloat16": "transformer_blocks.0.attn1.sdpa"}, 0),
        ("modulate", modulation_of_one_rounding_less, "transformer_blocks.0.attn1.input", 0),
        ("linear", bias_after_rounding, "proj_in", 0),
    ],
)
def test_on_the_exact_level_a_port_is_told_where_it_computes_otherwise(
    broken: str, change: Any, first: Any, natively: int, dtype: str, kit: Path, tmp_path: Path
) -> None:
    """One port has a bug and others only round differently.

    Of these, the native level finds only the bug, and only in float32.
    """
    case, first = case_named(kit, "2.3/kit-t2v"), first if isinstance(first, str) else first[dtype]
    file, name = load_file(kit / case["file"]), case["results"][dtype]
    (tmp_path / EXACT_LEVEL).mkdir()
    with patch.object(numpy_port, broken, change):
        for level in LEVELS:
            computed = numpy_port.compute(case, file, dtype, level)
            save_file(computed, tmp_path / (name if level == NATIVE_LEVEL else case["exact"][dtype]["results"]))
    verdict = check_results(tmp_path, kit, EXACT_LEVEL, partial=True)
    (report,) = verdict.failures.values()
    assert verdict.status == 1 and report.first == first
    assert report.sentence.startswith(f"first difference at {first} (relative L2 ")
    assert "taps before it are identical" in report.sentence and report.rows[0].verdict == IDENTICAL
    assert check_results(tmp_path, kit, partial=True).status == (natively if dtype == "float32" else 0)


def test_on_the_exact_level_numbers_count_and_not_the_dtype_that_holds_them(
    kit: Path, results: Path, tmp_path: Path
) -> None:
    case = case_named(kit, "feed-forward/video")
    (tmp_path / EXACT_LEVEL).mkdir()
    for dtype, said in case["exact"].items():
        found = load_file(results / said["results"])
        as_bits = {name: (x.view(np.uint32) >> 16).astype(np.uint16) for name, x in found.items()}
        save_file(
            as_bits if dtype == "bfloat16" else {name: x.astype(np.float64) for name, x in found.items()},
            tmp_path / said["results"],
        )
    assert check_results(tmp_path, kit, EXACT_LEVEL, partial=True).status == 0
    save_file(
        {
            name: x * (1 + 2.0**-40)
            for name, x in load_file(tmp_path / said["results"].replace("bfloat16", "float32")).items()
        },
        tmp_path / said["results"].replace("bfloat16", "float32"),
    )
    verdict = check_results(tmp_path, kit, EXACT_LEVEL, partial=True)
    assert (verdict.status, verdict.passed) == (1, 1)


def test_on_the_exact_level_zeros_have_signs_and_nan_is_one() -> None:
    x = torch.tensor([0.0, torch.nan, 1.0])
    digests = {"x": digest(x).hex()}

    def judged(other: Tensor) -> Any:
        return identity(digests, ["x"], {"x": other}, lambda: {"x": x})

    assert judged(x.clone()).verdict == IDENTICAL
    assert (
        judged(x.view(torch.int32).bitwise_xor(torch.tensor([0, 1, 0], dtype=torch.int32)).view(torch.float32)).verdict
        == IDENTICAL
    )
    assert judged(torch.tensor([-0.0, torch.nan, 1.0])).verdict == DIVERGED
    assert judged(torch.tensor([0.0, 1.0, 1.0])).verdict == DIVERGED
    zero = torch.zeros(2)
    assert (
        "in the sign of zeros" in identity({"x": digest(zero).hex()}, ["x"], {"x": -zero}, lambda: {"x": zero}).sentence
    )
    assert "(2,) in place of (3,)" in judged(zero).sentence


# ---------------------------------------------------------------- verdicts
@pytest.mark.parametrize("level,right", [(NATIVE_LEVEL, "conformant"), (EXACT_LEVEL, "identical")])
def test_what_is_missing_is_not_conformant(
    level: str, right: str, kit: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = some(results, "feed-forward/video", tmp_path)
    total = 2 * len(COMPONENTS + MODELS)
    arguments = ["kit", "check", str(folder), "--kit", str(kit), "--level", level]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{total - 2} missing: positions/video float32, positions/video bfloat16, ")
    assert said[0].endswith(f" and {total - 6} more; --partial judges what is there alone")
    taps = ", 6 of 6 taps identical" if level == EXACT_LEVEL else ""
    assert said[-1] == f"ltx2ref kit: incomplete, 2 of {total} cases pass{taps}, {total - 2} not given"
    assert cli.main([*arguments, "--partial", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["level"], found["partial"], len(found["missing"])) == (level, True, total - 2)
    assert found["summary"] == f"ltx2ref kit: {right}, 2 of {total} cases pass{taps}, {total - 2} not given"
    path = next(
        folder.rglob("*.float32.safetensors") if level == NATIVE_LEVEL else (folder / EXACT_LEVEL).glob("*.float32.*")
    )
    left = load_file(path)
    del left["transformer_blocks.0.ff.activation"]
    save_file(left, path)
    verdict = check_results(folder, kit, level, partial=True)
    assert verdict.status == 0 and verdict.summary.endswith("not given, 1 with outputs missing")
    assert verdict.missing[-1] == "feed-forward/video float32: transformer_blocks.0.ff.activation"
    save_file({}, path)  # nothing at all
    assert check_results(folder, kit, level, partial=True).passed == 1


def test_every_output_that_is_missing_counts(kit: Path, results: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(results, tmp_path / "results")
    assert check_results(folder, kit, EXACT_LEVEL).status == 0
    name = case_named(kit, "2.0/kit")["exact"]["bfloat16"]
    found = load_file(folder / name["results"])
    for tap in ("transformer_blocks.0.attn1.rows", "proj_out"):  # derived from other taps, so no port has to write them
        del found[tap]
    save_file(found, folder / name["results"])
    assert check_results(folder, kit, EXACT_LEVEL).status == 0
    del found["rope.cos"]
    save_file(found, folder / name["results"])
    verdict = check_results(folder, kit, EXACT_LEVEL)
    assert (verdict.status, verdict.missing) == (2, ["2.0/kit bfloat16: rope.cos"])


def beside(kit: Path, name: str, tap: str, share: float) -> Taps:
    """Return a case's expected float32 results, but for one output that takes a share of its budget or bound."""
    case = case_named(kit, name)
    file = read_tensors(kit / case["file"])
    expected, error = (tensors_under(file, f"float32/{kind}/") for kind in ("expected", "error"))
    true = expected[tap].double() - error[tap].double()
    allowed = truth.SHARE * truth.norm(error[tap]) + truth.FLOOR * truth.norm(true)
    if tap.endswith(".sinusoid"):
        allowed = truth.norm(checking.sinusoid_bound(file["float32/inputs/timestep"], torch.float32))
    noise = generator.uniform("noise", tuple(true.shape)).double()
    return {key: expected[key] for key in case["outputs"]} | {tap: true + noise * (share * allowed / truth.norm(noise))}


@pytest.mark.parametrize(
    "name,tap,share,status",
    [
        ("feed-forward/video", "transformer_blocks.0.ff.activation", 1.6, 0),
        ("feed-forward/video", "transformer_blocks.0.ff.activation", 2.1, 1),
        ("2.3/kit-t2v", "sample", 1.6, 0),
        ("2.3/kit-t2v", "sample", 2.1, 1),
        ("sinusoid/per-token", "time_embed.sinusoid", 0.9, 0),
        ("sinusoid/per-token", "time_embed.sinusoid", 1.1, 1),  # there is no band above a bound
    ],
)
def test_a_share_between_one_budget_and_two_passes_with_a_note(
    name: str, tap: str, share: float, status: int, kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = beside(kit, name, tap, share)
    save_file({key: x.numpy() for key, x in found.items()}, tmp_path / f"{name.replace('/', '-')}.float32.safetensors")
    assert cli.main(["kit", "check", str(tmp_path), "--kit", str(kit), "--partial"]) == status
    said = capsys.readouterr().out
    note = f"{name} float32: {tap} takes {share:.2f} of its budget: rounded more often than the record"
    assert (note in said.splitlines()) == (1 < share < 2 and status == 0)
    assert said.splitlines()[-1].startswith(f"ltx2ref kit: {('conformant', 'not conformant')[status]}, ")


def test_phases_that_a_port_does_not_show_are_allowed_for(kit: Path, tmp_path: Path) -> None:
    """The port shows only its outputs. Its sinusoids are off by most of their bound, and everything else is right."""
    case, source = case_named(kit, "2.3/kit-t2v"), RecordedModel(MODELS[1], "float32")
    truth = Truth(source.model, source.inputs)
    drawn = {
        name: truth.drawn(name, x, seed=i).float()
        for i, (name, x) in enumerate(source.taps.items())
        if name.endswith(".sinusoid")
    }
    taps = run(source.model, source.inputs, drawn)
    save_file({name: taps[name].numpy() for name in OUTPUTS}, tmp_path / case["results"]["float32"])
    verdict = check_results(tmp_path, kit, partial=True)
    assert verdict.status == 0 and verdict.summary.endswith("with outputs missing")
    with patch.object(compare, "unseen", lambda *_: {}):
        assert check_results(tmp_path, kit, partial=True).status == 1


def test_results_in_every_dtype_and_of_some_cases_are_judged(kit: Path, results: Path, tmp_path: Path) -> None:
    case = next(case for case in cases(kit) if case["id"] == "feed-forward/video")
    for dtype, name in case["results"].items():
        found = {tap: x.astype(np.float32) for tap, x in load_file(results / name).items()}
        if dtype == "bfloat16":  # ties away from zero
            found = {tap: (x.view(np.uint32) + 0x8000 >> 16).astype(np.uint16) for tap, x in found.items()}
        else:
            del found[case["outputs"][0]]
        save_file(found, tmp_path / name)
    verdict = check_results(tmp_path, kit, partial=True)
    assert (verdict.status, verdict.passed) == (0, 2)
    assert (
        verdict.summary == f"ltx2ref kit: conformant, 2 of {len(verdict.results)} cases pass, "
        f"{len(verdict.results) - 2} not given, 1 with outputs missing"
    )


@pytest.mark.parametrize(
    "name,tensors,said",
    [
        ("feed-forward-video.float32.safetensors", {"sample": np.zeros(3)}, "sample is no output of this case"),
        ("feed-forward-video.float32.safetensors", {"transformer_blocks.0.ff.output": np.zeros(3, np.int64)}, "int64"),
        ("feed-forward.safetensors", {"x": np.zeros(3)}, "is the result of no case"),
        ("feed-forward-video.float32.safetensors", b"not a file", "feed-forward-video.float32.safetensors"),
    ],
)
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
    assert check_results(tmp_path, kit).status == check_results(tmp_path, kit, partial=True).status == 2
    save_file({"transformer_blocks.0.ff.output": np.zeros((2, 3))}, tmp_path / "feed-forward-video.float32.safetensors")
    assert check_results(tmp_path, kit).status == 1
    for folder in (tmp_path / "none", kit / "kit.json"):
        with pytest.raises(ValueError, match="expected a folder"):
            check_results(folder, kit)
    with pytest.raises(ValueError, match="exact: expected a folder of results that were computed under exact"):
        check_results(tmp_path, kit, EXACT_LEVEL)
    with pytest.raises(ValueError, match="no kit"):
        check_results(tmp_path, tmp_path)
    older = shutil.copytree(kit, tmp_path / "older") / "kit.json"
    said = json.loads(older.read_text(encoding="utf-8")) | {"arithmetic": VERSION + 1}
    older.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match=f"arithmetic {VERSION + 1}, expected {VERSION}"):
        check_results(tmp_path, older.parent)
    damaged = shutil.copytree(kit, tmp_path / "damaged")
    (damaged / "feed-forward-video.safetensors").write_bytes(b"not a file")
    with pytest.raises(ValueError, match="feed-forward-video"):
        check_results(tmp_path, damaged)
    with pytest.raises(ValueError, match="new or empty"):
        export(kit)


def test_a_last_bit_of_an_angle_is_no_error_of_what_follows(kit: Path, results: Path, tmp_path: Path) -> None:
    """A port whose RoPE tables round differently, by as much as diffusers' own, is judged by its own tables."""
    case = next(case for case in cases(kit) if case["id"] == "2.3/kit-t2v")
    name, source = case["results"]["float32"], RecordedModel(MODELS[1], "float32")
    nudged = {
        tap: torch.nextafter(x, torch.full_like(x, 2.0)) if tap.endswith(".cos") else x
        for tap, x in source.taps.items()
        if tap.endswith(PHASES)
    }
    taps = verify.run(source.model, source.inputs, nudged)
    save_file({tap: x.numpy() for tap, x in (taps | nudged).items() if tap in case["outputs"]}, tmp_path / name)
    assert check_results(tmp_path, kit, partial=True).status == 0


# ---------------------------------------------------------------- everything bears load
NO_USE = "without prompt AdaLN only use_cross_timestep would look at it, as the kit's 2.5 model does"
EXCEPTIONS = {
    "2.0": {"sigma": NO_USE, "audio_sigma": NO_USE},
    "2.3": {},
    "2.5": {"fps": "coordinates are given; 2.3's models and the positions use it"},
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
def test_every_parameter_and_every_input_moves_an_expected_output_by_more_than_the_budget(release: str) -> None:
    sources = [RecordedModel(case, "float32") for case in MODELS if case.release == release]
    idle = {}
    for source in sources:
        unmoved = verify.run(
            source.model, source.inputs
        )  # computed on this machine, which need not have the recording's bits
        budget = {name: beyond(source, name) for name in ("sample", "audio_sample")}
        for name, x in source.weights.items():
            moved = x + generator.uniform(f"moved/{name}", tuple(x.shape), 0.25)
            with patch_parameter(source, name, moved):
                idle[name] = idle.get(name, True) and not moves(source, source.inputs, unmoved, budget)
        for name, changed in changes(source):
            idle[name] = idle.get(name, True) and not moves(source, source.inputs | changed, unmoved, budget)
    assert {name for name, x in idle.items() if x} == EXCEPTIONS[release].keys()
    assert len(idle) > len(sources[0].weights)


def beyond(source: RecordedModel, name: str) -> float:
    true = source.truth(source.case)[name]
    return 2 * (truth.SHARE * truth.norm(source.taps[name].double() - true) + truth.FLOOR * truth.norm(true))


def moves(source: RecordedModel, inputs: dict[str, Any], unmoved: Taps, budget: dict[str, float]) -> bool:
    found = verify.run(source.model, inputs)
    return any(truth.norm(found[name].double() - unmoved[name].double()) > allowed for name, allowed in budget.items())


class patch_parameter:
    def __init__(self, source: RecordedModel, name: str, value: Tensor) -> None:
        self.parameter, self.value = source.model.get_parameter(name), value

    def __enter__(self) -> None:
        self.before, self.parameter.data = self.parameter.data, self.value

    def __exit__(self, *_: object) -> None:
        self.parameter.data = self.before


def changes(source: RecordedModel) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the arguments of this case with each one changed by itself. Arguments that coordinates replace are None."""
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
            assert name == "audio_num_frames", name  # the only number of tokens that is accepted
    for name, mask in (given.get("attention_kwargs") or {}).items():
        yield name, {"attention_kwargs": given["attention_kwargs"] | {name: 1 - mask}}


def test_the_truth_that_is_stored_is_the_models(kit: Path) -> None:
    case = next(case for case in cases(kit) if case["id"] == "2.0/kit")
    file: Taps = read_tensors(kit / case["file"])
    for dtype in NATIVE_DTYPES:
        true = RecordedModel(MODELS[0], dtype).truth(MODELS[0])
        for name in case["outputs"]:
            expected, error = tensors_under(file, f"{dtype}/expected/")[name].double(), file[f"{dtype}/error/{name}"]
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
