"""A streamed model computes the bits of the resident one, with two blocks in memory, and fails rather than guess.

pytest tests/checkpoint/test_streaming.py
LTX2REF_CORPUS=full pytest tests/checkpoint/test_streaming.py    # two layers at real width, with larger quantised ones
"""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from safetensors.torch import save_file
from test_checkpoints import DIALECTS, FORMATS, GGUF, WITHOUT_CONFIG, Write
from tiny import RELEASES, Inputs, random_inputs, random_model, tiny_config
from torch import Tensor

import ltx2ref
from ltx2ref import CheckpointError, LTX2VideoTransformer3DModel, TransformerConfig
from ltx2ref.checkpoint import streaming
from ltx2ref.checkpoint.shapes import parameter_shapes
from ltx2ref.checkpoint.storage import Stored
from ltx2ref.checkpoint.streaming import StreamedTransformer
from ltx2ref.parity.audit import audit_natively
from ltx2ref.parity.run import run
from ltx2ref.parity.trace.sketch import sketch

pytestmark = pytest.mark.slow

LAYERS = 5
FULL = os.environ.get("LTX2REF_CORPUS") == "full"


def written(
    folder: Path,
    release: str = "2.3",
    write: Write = writers.write_transformer_only,
    name: str = "ltx.safetensors",
    config: TransformerConfig | None = None,
    **options: Any,
) -> Path:
    config = config or tiny_config(release, num_layers=LAYERS)
    write(folder / name, random_model(config).state_dict(), config, **options)
    return folder / name


def both(path: Path, **options: Any) -> tuple[StreamedTransformer, LTX2VideoTransformer3DModel]:
    return ltx2ref.stream(path, **options), ltx2ref.load(path, **options)


def inputs_of(model: LTX2VideoTransformer3DModel, **options: Any) -> Inputs:
    return random_inputs(model.config, model.proj_in.weight.dtype, **options)


def assert_same(streamed: StreamedTransformer, resident: LTX2VideoTransformer3DModel, **options: Any) -> None:
    """Require the same taps in the same order."""
    inputs = inputs_of(resident, **options)
    a, b = run(streamed, inputs), run(resident, inputs)
    assert list(a) == list(b) and len(a) > 80
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ---------------------------------------------------------------- the same bits
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tap_of_a_streamed_model_is_the_resident_one_s(release: str, dtype: torch.dtype, tmp_path: Path) -> None:
    streamed, resident = both(written(tmp_path, release), dtype=dtype)
    assert_same(streamed, resident, text_masks=torch.int64, per_token=True)
    assert_same(streamed, resident, isolate_modalities=True)  # a second forward reads the blocks again


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_streams(dialect: str, tmp_path: Path) -> None:
    name, write, options = DIALECTS[dialect]
    config = tiny_config("2.3", num_layers=3)
    given = config if dialect in WITHOUT_CONFIG else None
    assert_same(*both(written(tmp_path, write=write, name=name, config=config, **options), config=given))


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", FORMATS)
def test_every_quantised_format_streams(name: str, tmp_path: Path) -> None:
    _, write, options, release = FORMATS[name]
    config = writers.quantisable_config(release, num_layers=3)
    assert_same(*both(written(tmp_path, write=write, config=config, **options)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", GGUF)
def test_gguf_streams(name: str, tmp_path: Path) -> None:
    options, release = GGUF[name]
    config = writers.quantisable_config(release, num_layers=3)
    assert_same(*both(written(tmp_path, write=writers.write_gguf, name="ltx.gguf", config=config, **options)))


def test_loras_are_merged_as_each_block_is_read(tmp_path: Path) -> None:
    path, generator = written(tmp_path), torch.Generator().manual_seed(1)
    pairs = {}
    for name, shape in parameter_shapes(tiny_config("2.3", num_layers=LAYERS)).items():
        if name.endswith("to_q.weight") or name == "proj_in.weight":
            layer = "transformer." + name.removesuffix(".weight")
            pairs[f"{layer}.lora_A.weight"] = torch.randn(3, shape[1], generator=generator)
            pairs[f"{layer}.lora_B.weight"] = torch.randn(shape[0], 3, generator=generator)
    save_file(pairs, tmp_path / "lora.safetensors")
    plain, changed = ltx2ref.load(path), both(path, lora=[(tmp_path / "lora.safetensors", 0.5)])
    assert_same(*changed)
    name = "transformer_blocks.3.attn1.norm_q"
    assert not torch.equal(run(plain, inputs_of(plain))[name], run(changed[1], inputs_of(plain))[name])


def two_of_a_block(name: str) -> bool:
    """Choose few layers: to quantise them takes most of the time, and the truth, in float32, much of the memory.

    Each has 16 million elements, which are decoded in four pieces.
    """
    wide = ["ff.net.2"] if FULL else []
    return name.removeprefix("transformer_blocks.0.") in ("attn1.to_q", "audio_ff.net.2", *wide)


REAL = {
    "bf16": (writers.write_transformer_only, {}, 2 if FULL else 1),
    "fp8": (writers.write_fp8_scaled, {"quantised": two_of_a_block}, 1),
    "nvfp4": (writers.write_nvfp4, {"quantised": two_of_a_block}, 1),
}


@pytest.fixture(scope="module")
def real_state() -> Iterator[dict[str, Tensor]]:
    """Return as many layers of real width as `REAL` asks for: one has 0.8 billion parameters in 1.6 GB."""
    layers = max(layers for _, _, layers in REAL.values())
    shapes, noise = parameter_shapes(replace(ltx2ref.LTX_2_3, num_layers=layers)), torch.randn(2**22 + 1).bfloat16()
    state = {}
    for i, (name, shape) in enumerate(shapes.items()):
        size, scale = torch.Size(shape).numel(), 1.0 if "norm_" in name else 0.3 * shape[-1] ** -0.5
        state[name] = noise.roll(i).repeat(-(-size // len(noise)))[:size].mul_(scale).reshape(shape)
    yield state
    state.clear()


@pytest.mark.sample(2)
@pytest.mark.parametrize("format", REAL)
def test_at_real_width_the_bits_are_the_same(format: str, real_state: dict[str, Tensor], tmp_path: Path) -> None:
    (write, options, layers), path = REAL[format], tmp_path / "ltx.safetensors"
    config = replace(ltx2ref.LTX_2_3, num_layers=layers)
    write(path, {name: real_state[name] for name in parameter_shapes(config)}, config, **options)
    try:
        streamed, resident = both(path)
        assert {x.dtype for x in resident.parameters()} == {torch.bfloat16}
        assert_same(streamed, resident, batch=1, grid=(1, 2, 3), audio_frames=3, text_tokens=(4, 4))
    finally:
        path.unlink()  # pytest keeps the folders of three runs


# ---------------------------------------------------------------- memory
def bytes_of(tensors: Any) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if not x.is_meta}
    return sum(storages.values())


def test_never_are_more_than_two_blocks_in_memory_and_none_is_left_on_a_block(tmp_path: Path) -> None:
    config = writers.quantisable_config("2.3", num_layers=LAYERS)
    model = ltx2ref.stream(written(tmp_path, config=config))
    outside = bytes_of(x for name, x in model.named_parameters() if not name.startswith("transformer_blocks"))
    block = 2 * sum(x.numel() for x in model.transformer_blocks[0].parameters())
    seen: list[tuple[int, int]] = []

    def count(*args: Any) -> None:
        alive = [x for x in gc.get_objects() if type(x) is torch.nn.Parameter]
        seen.append((bytes_of(model.parameters()) - outside, bytes_of(alive) - outside))

    gc.collect()
    # Models that other tests left are still there.
    other = bytes_of(x for x in gc.get_objects() if type(x) is torch.nn.Parameter) - outside
    for each in model.transformer_blocks:
        each.ff.register_forward_pre_hook(count)
    run(model, inputs_of(model))
    assert len(seen) == LAYERS
    assert all(here == block and alive - other <= 2 * block for here, alive in seen)
    assert all(x.is_meta for x in model.transformer_blocks.parameters())


PEAK = """
import sys, torch, ltx2ref
from tiny import random_inputs
def resident(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
torch.set_num_threads(1)
torch.randn(64, 64, dtype=torch.bfloat16) @ torch.randn(64, 64, dtype=torch.bfloat16)  # libraries' own memory
idle = resident("VmRSS")
model = getattr(ltx2ref, sys.argv[2])(sys.argv[1])
with torch.no_grad():
    model(**random_inputs(model.config, torch.bfloat16, batch=1, grid=(1, 2, 3)))
print(resident("VmHWM") - idle)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the memory")
def test_the_peak_of_the_process_is_not_that_of_all_blocks(tmp_path: Path) -> None:
    """Mapped pages count, so neither blocks that stay in memory nor pages that stay mapped are missed."""
    config = replace(writers.quantisable_config("2.3", num_layers=24), attention_head_dim=128, cross_attention_dim=512)
    path = written(tmp_path, config=config)

    def peak(function: str) -> int:
        here = os.pathsep.join([str(Path(ltx2ref.__file__).parents[1]), str(Path(writers.__file__).parent)])
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), function],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": here},
        )
        return int(done.stdout)

    shapes = parameter_shapes(config)
    blocks = 2 * sum(torch.Size(x).numel() for name, x in shapes.items() if name.startswith("transformer_blocks"))
    streamed, resident = peak("stream"), peak("load")
    path.unlink()
    assert blocks > 2**27 and resident > 0.95 * blocks  # the measurement sees pages that are only mapped
    assert resident - streamed > 0.75 * blocks


# ---------------------------------------------------------------- reading ahead
def test_the_next_block_is_read_while_the_current_one_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block waits until the next one is in memory, and its own weights must not have changed by then."""
    path = written(tmp_path)
    finished = [threading.Event() for _ in range(LAYERS)]
    read = streaming.BlockReader.read
    threads, order = set(), []

    def watched(self: Any, i: int) -> Any:
        room = read(self, i)
        threads.add(threading.get_ident())
        order.append(i)
        finished[i].set()
        return room

    monkeypatch.setattr(streaming.BlockReader, "read", watched)
    streamed, resident = both(path)
    for i, block in enumerate(streamed.transformer_blocks[:-1]):
        block.register_forward_pre_hook(lambda *_, event=finished[i + 1]: assert_set(event))
    assert_same(streamed, resident)
    assert order == list(range(LAYERS)) and threading.get_ident() not in threads and len(threads) == 1


@pytest.mark.parametrize("larger", [False, True])
def test_pages_of_a_file_larger_than_the_memory_are_given_back(
    larger: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, dropped = written(tmp_path), []
    monkeypatch.setattr(streaming, "physical_memory", lambda: path.stat().st_size - larger)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *what: dropped.append(what))
    streamed, resident = both(path)
    assert_same(streamed, resident)
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * LAYERS * larger


def assert_set(event: threading.Event) -> None:
    assert event.wait(60), "the next block was not read meanwhile"


def test_blocks_may_be_run_alone_and_in_any_order(tmp_path: Path) -> None:
    streamed, resident = both(written(tmp_path))
    arguments: dict[int, Any] = {}
    for i, block in enumerate(resident.transformer_blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: arguments.update({i: args}))
    run(resident, inputs_of(resident))
    for i in (3, 1, 1, 4, 2, 0):
        with torch.no_grad():
            theirs, ours = (model.transformer_blocks[i](*arguments[i]) for model in (resident, streamed))
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)), i


# ---------------------------------------------------------------- failures
def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, touch, overwrite, Path.unlink])
@pytest.mark.parametrize("when", ["before the forward", "in its second block", "while the fourth block is read"])
def test_a_file_that_changes_raises_and_nothing_is_computed_from_it(
    damage: Callable[[Path], None], when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    model = ltx2ref.stream(path)
    inputs, into, ran = inputs_of(model), Stored.into, list[int]()

    def reading(stored: Stored, out: Tensor) -> None:
        if "blocks.3.audio_ff.net.2" in stored.name and path.exists():
            damage(path)
        into(stored, out)

    for i, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    if when == "before the forward":
        damage(path)
    elif when == "in its second block":
        model.transformer_blocks[1].ff.register_forward_hook(lambda *_: damage(path))
    else:
        monkeypatch.setattr(Stored, "into", reading)
    with pytest.raises(CheckpointError, match=r"ltx\.safetensors: (changed while|cannot be read)"):
        run(model, inputs)
    # The third block may have been read before the second one was damaged.
    assert ran == {"b": [], "w": [0, 1, 2]}.get(when[0], ran) and len(ran) <= 3
    assert all(x.is_meta for x in model.transformer_blocks.parameters())
    with pytest.raises(CheckpointError):
        run(model, inputs)


def test_after_a_failed_read_the_next_forward_is_whole_again(tmp_path: Path) -> None:
    path = written(tmp_path)
    streamed, resident = both(path)
    handle = streamed.transformer_blocks[1].register_forward_hook(lambda *_: os.rename(path, tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        run(streamed, inputs_of(streamed))
    handle.remove()
    (tmp_path / "gone").rename(path)
    assert_same(streamed, resident)


def test_a_scale_that_means_nothing_raises_in_the_forward(tmp_path: Path) -> None:
    config, path = writers.quantisable_config("2.3", num_layers=3), tmp_path / "ltx.safetensors"
    layers, _ = writers.encode_linears(
        writers.cast(random_model(config).state_dict(), torch.bfloat16),
        writers.published_linears,
        writers.fp8_encoder(torch.float8_e4m3fn),
    )
    layers["transformer_blocks.2.attn1.to_q.weight_scale"].fill_(float("nan"))
    writers.save(path, writers.prefixed(layers), writers.lightricks_metadata(config))
    model = ltx2ref.stream(path)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.attn1\.to_q\.weight_scale.*not finite"):
        run(model, inputs_of(model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_forward_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    streamed, resident = both(written(tmp_path))

    def interrupt(*args: Any) -> None:
        raise error

    handle = streamed.transformer_blocks[2].ff.register_forward_hook(interrupt)
    with pytest.raises(error):
        run(streamed, inputs_of(streamed))
    handle.remove()
    assert_same(streamed, resident)


def test_two_forwards_at_a_time_are_refused(tmp_path: Path) -> None:
    model = ltx2ref.stream(written(tmp_path))
    inputs, errors = inputs_of(model), list[Exception]()

    def second() -> None:
        try:
            run(model, inputs)
        except Exception as error:
            errors.append(error)

    def meanwhile(*args: Any) -> None:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    handle = model.transformer_blocks[1].ff.register_forward_hook(meanwhile)
    expected = run(model, inputs)["sample"]
    handle.remove()
    assert [str(error) for error in errors] == [
        "a streamed model runs one forward at a time, and another thread is in one"
    ]
    assert torch.equal(run(model, inputs)["sample"], expected)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda model, _: model.state_dict(),
        lambda model, _: model.load_state_dict({}),
        lambda model, _: model.to("cpu"),
        lambda model, _: model.half(),
        lambda model, _: model.bfloat16(),
        lambda model, _: model.cpu(),
        lambda model, _: model.share_memory(),
        lambda model, _: pickle.dumps(model),
        lambda model, _: copy.copy(model),
        lambda model, folder: ltx2ref.save(model, folder / "transformer"),
        lambda model, folder: torch.save(model, folder / "model.pt"),
    ],
    ids=[
        "state_dict",
        "load_state_dict",
        "to",
        "half",
        "bfloat16",
        "cpu",
        "share_memory",
        "pickle",
        "copy",
        "save",
        "torch.save",
    ],
)
def test_what_a_streamed_model_cannot_do_is_said(misuse: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model = ltx2ref.stream(written(tmp_path))
    with pytest.raises(TypeError, match="the blocks of a streamed model stay in its file"):
        misuse(model, tmp_path)


@pytest.mark.parametrize("of", ["hidden_states", "audio_encoder_hidden_states"])
def test_gradients_are_refused_rather_than_wrong(of: str, tmp_path: Path) -> None:
    model = ltx2ref.stream(written(tmp_path))
    inputs = inputs_of(model)
    assert not model(**inputs).sample.requires_grad
    inputs[of] = inputs[of].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        model(**inputs)
    with torch.inference_mode():
        model(**inputs)


@pytest.mark.parametrize("options", [{"dtype": torch.int8}, {"lora": [("x", "y")]}])
def test_arguments_are_checked_as_load_does(options: dict[str, Any], tmp_path: Path) -> None:
    path, said = written(tmp_path), list[str]()
    for function in (ltx2ref.stream, ltx2ref.load):
        with pytest.raises(ValueError) as error:
            function(path, **options)
        said.append(str(error.value))
    assert said[0] == said[1]


# ---------------------------------------------------------------- audits
def test_an_audit_of_a_streamed_model_says_what_it_says_of_the_resident_one(tmp_path: Path) -> None:
    """The audit uses the float64 truth and teacher forcing, for which it copies the streamed model."""
    streamed, resident = both(written(tmp_path, config=tiny_config("2.3", num_layers=3)))
    inputs = inputs_of(resident)
    theirs = run(resident, inputs)
    assert audit_natively(streamed, inputs, theirs).verdict == "identical"
    theirs["transformer_blocks.2.attn1.sdpa"] = theirs["transformer_blocks.2.attn1.sdpa"] * 1.1
    reports = [audit_natively(model, inputs, theirs) for model in (streamed, resident)]
    assert reports[0] == reports[1] and reports[0].verdict == "diverged"
    assert reports[0].first == "transformer_blocks.2.attn1.sdpa"


def test_a_doubled_copy_is_of_the_rounded_weights_and_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path, dtype=torch.float32)
    streamed, resident = both(path, dtype=torch.bfloat16)
    double = copy.deepcopy(streamed).double()
    assert_same(double, copy.deepcopy(resident).double())
    assert_same(streamed, resident)
    assert not torch.equal(
        run(double, inputs_of(double))["sample"],
        run(unrounded := ltx2ref.load(path).double(), inputs_of(unrounded))["sample"],
    )


def test_a_sketch_trace_is_the_resident_one_s(tmp_path: Path) -> None:
    traces = []
    for model in both(written(tmp_path)):
        with torch.no_grad(), ltx2ref.trace(model, keep=sketch) as taps:
            model(**inputs_of(model))
        traces.append(taps)
    assert traces[0] == traces[1] and "transformer_blocks.4.audio_ff.rows" in traces[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_where_a_tensor_lies_in_its_file_changes_no_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """One noise level is multiplied with mapped weights, which float32 once summed in another order."""
    path = written(tmp_path, dtype=dtype)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    for spaces in range(0, 64, 8):
        moved = tmp_path / f"{spaces}.safetensors"
        text, data = path.read_bytes()[8 : 8 + length], path.read_bytes()[8 + length :]
        moved.write_bytes((length + spaces).to_bytes(8, "little") + text + b" " * spaces + data)
        loaded, streamed = ltx2ref.load(moved), ltx2ref.stream(moved)
        inputs = {name: x[:1] if isinstance(x, Tensor) else x for name, x in inputs_of(loaded).items()}
        outputs = [run(model, inputs) for model in (loaded, streamed, copy.deepcopy(loaded))]
        assert all(torch.equal(x, other[name]) for other in outputs[1:] for name, x in outputs[0].items()), spaces
