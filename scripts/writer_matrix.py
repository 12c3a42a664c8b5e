"""Compare what real writers of quantised weights and of LoRAs store with what ltx2ref reads: a row for each format.

    python scripts/writer_matrix.py            print the table; exit status 1 if a row differs
    python scripts/writer_matrix.py --write    put it into docs/checkpoints.md as well

Each writer quantises one layer, and decodes it itself. The layer is stored as a file, and read as `load` reads it, in
float32. Writers of LoRAs (scripts/lora_matrix.py) change a small model, which `load` reads with their file. A writer
that is not installed is a row that says so. The writers are installed beside ltx2ref: comfy-kitchen, convert_to_quant
(with prodigy-plus-schedule-free), gguf, optimum-quanto, bitsandbytes, mlx (mlx-cpu), torchao, nvidia-modelopt, peft,
diffusers and lycoris-lora (with toml).
"""

import argparse
import importlib
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lora_matrix import LORA_WRITERS, compare
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx2ref.checkpoint.header import read_header
from ltx2ref.checkpoint.match import companions_of
from ltx2ref.checkpoint.names import Dialect
from ltx2ref.checkpoint.quantised import Weight, identify
from ltx2ref.checkpoint.sayings import read_sayings
from ltx2ref.checkpoint.settle import settle_facts

DOCUMENT = Path(__file__).parents[1] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- writer_matrix.py -->", "<!-- end of writer_matrix.py -->"
LAYER = "transformer_blocks.0.attn1.to_q"
SHAPE = (384, 1024)
State = dict[str, Tensor]


class Written(NamedTuple):
    """One layer as a writer stores and decodes it."""

    tensors: State  # by suffix behind the layer's name
    decoded: Tensor  # by the writer, in float32
    metadata: dict[str, str] = {}  # noqa: RUF012  # never changed
    config: dict[str, Any] | None = None  # of the folder
    scales: str | None = None  # the argument of `load`


class Row(NamedTuple):
    """A line of the table."""

    writer: str
    format: str
    read_as: str
    result: str
    good: bool


def weight() -> Tensor:
    """Return a layer with rows of different sizes, as float32."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05
    return x * torch.logspace(-1, 0, SHAPE[0])[:, None]


def mark(**said: Any) -> State:
    """Return ComfyUI's marker of a layer."""
    return {"comfy_quant": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)}


def comfy_kitchen() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield the layouts of comfy-kitchen, with the markers that ComfyUI writes."""
    from comfy_kitchen.tensor import get_layout_class  # type: ignore[import-not-found]

    def layer(layout: str, said: Mapping[str, Any], **options: Any) -> Written:
        of = get_layout_class(layout)
        codes, parameters = of.quantize(weight(), **options)
        stored = {f"weight{suffix}": x.contiguous() for suffix, x in of.state_dict_tensors(codes, parameters).items()}
        return Written(stored | mark(**said), of.dequantize(codes, parameters).float())

    int8 = {"format": "int8_tensorwise"}
    rotated = [
        (f"int8 ConvRot, groups of {n}", "TensorWiseINT8Layout", int8 | {"convrot": True, "convrot_groupsize": n})
        for n in (256, 64, 16)
    ]
    layouts: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("float8_e4m3fn", "TensorCoreFP8Layout", {"format": "float8_e4m3fn"}, {}),
        ("float8_e5m2", "TensorCoreFP8Layout", {"format": "float8_e5m2"}, {"dtype": torch.float8_e5m2}),
        ("int8, one scale", "TensorWiseINT8Layout", int8, {}),
        ("int8 by row", "TensorWiseINT8Layout", int8 | {"per_row": True}, {"per_channel": True}),
        *(
            (name, layout, said, {"per_channel": True, "convrot": True, "convrot_groupsize": said["convrot_groupsize"]})
            for name, layout, said in rotated
        ),
        ("nvfp4", "TensorCoreNVFP4Layout", {"format": "nvfp4"}, {}),
        ("mxfp8", "TensorCoreMXFP8Layout", {"format": "mxfp8"}, {}),
        (
            "convrot_w4a4",
            "TensorCoreConvRotW4A4Layout",
            {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int4"},
            {},
        ),
        ("asym_w4a8_int8", "AsymW4A8Int8Layout", {"format": "asym_w4a8_int8", "group_size": 16}, {}),
        ("asym_w4a8_int8, no table", "AsymW4A8Int8Layout", {"format": "asym_w4a8_int8"}, {"codebook": False}),
        ("asym_w4a8_int8, corrected", "AsymW4A8Int8Layout", {"format": "asym_w4a8_int8"}, {"symmetric": False}),
        ("asym_w4a8_int8, 6 bits", "AsymW4A8Int8Layout", {"format": "asym_w4a8_int8"}, {"bits": 6}),
    ]
    for name, layout, said, options in layouts:
        yield name, lambda layout=layout, said=said, options=options: layer(layout, said, **options)  # type: ignore[misc]


def convert_to_quant() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield the modes of the command convert_to_quant. Its own layouts decode."""
    from convert_to_quant.comfy import quant_ops  # type: ignore[import-not-found]

    def decoded(stored: State) -> Tensor:
        said = json.loads(bytes(stored["comfy_quant"].tolist()))
        codes, scale = stored["weight"], stored["weight_scale"]
        if said["format"] in quant_ops.QUANT_ALGOS:
            layout = quant_ops.LAYOUTS[quant_ops.QUANT_ALGOS[said["format"]]["comfy_tensor_layout"]]
            options = {"block_size": said.get("group_size"), "is_weight": True, "orig_dtype": torch.float32}
            found: Tensor = layout.dequantize(codes, scale=scale, **options)
            return unrotated(found, said["convrot_groupsize"]) if said.get("convrot") else found
        import comfy_kitchen as ck  # type: ignore[import-not-found]

        if said["format"] == "mxfp8":
            found = ck.dequantize_mxfp8(codes, scale.view(torch.float8_e8m0fnu), torch.float32)
        else:
            found = ck.dequantize_nvfp4(codes, stored["weight_scale_2"], scale, torch.float32)
        return found

    def unrotated(found: Tensor, group: int) -> Tensor:
        from convert_to_quant.utils.convrot import build_hadamard  # type: ignore[import-not-found]

        turned: Tensor = found.reshape(len(found), -1, group) @ build_hadamard(group)
        return turned.reshape(found.shape)

    def run(options: list[str]) -> Written:
        with tempfile.TemporaryDirectory() as folder:
            source, result = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
            save_file({f"{LAYER}.weight": weight(), f"{LAYER}.bias": torch.zeros(SHAPE[0])}, source)
            usual = ["--comfy_quant", "--simple", "--save-quant-metadata", "--device", "cpu"]
            command = [sys.executable, "-m", "convert_to_quant.convert_to_quant", "-i", str(source), "-o", str(result)]
            done = subprocess.run([*command, *usual, *options], capture_output=True, text=True, check=False)
            if not result.exists():
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            with safe_open(result, "pt") as file:
                metadata = file.metadata() or {}
            tensors = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in load_file(result).items()}
        del tensors["bias"]
        return Written(tensors, decoded(tensors), metadata)

    row = ["--scaling_mode", "row"]
    modes = {
        "float8_e4m3fn": [],
        "float8_e4m3fn_rowwise": row,
        "float8_e4m3fn_blockwise": ["--scaling_mode", "block", "--block_size", "64"],
        "int8_tensorwise, one scale": ["--int8", "--scaling_mode", "tensor"],
        "int8_tensorwise by row": ["--int8", *row],
        "int8_tensorwise ConvRot": ["--int8", *row, "--convrot"],
        "int8_tensorwise ConvRot, groups of 64": ["--int8", *row, "--convrot", "--convrot-group-size", "64"],
        "int8_blockwise": ["--int8", "--scaling_mode", "block", "--block_size", "128"],
        "nvfp4": ["--nvfp4"],
        "mxfp8": ["--mxfp8"],
    }
    for name, options in modes.items():
        yield name, lambda options=options: run(options)  # type: ignore[misc]


def optimum_quanto() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield quanto's int8 of a Linear layer."""
    from optimum.quanto import freeze, qint8, quantize  # type: ignore[import-not-found]

    def run() -> Written:
        model: Any = torch.nn.Sequential(torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight())
        quantize(model, weights=qint8)
        freeze(model)
        return Written(
            {name.removeprefix("0."): x for name, x in model.state_dict().items()}, model[0].weight.dequantize()
        )

    yield "qint8", run


def bitsandbytes() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield the formats of bitsandbytes of 4 and 8 bits, on the CPU."""
    from bitsandbytes import functional  # type: ignore[import-not-found]

    def four(kind: str, nested: bool) -> Written:
        codes, state = functional.quantize_4bit(weight(), quant_type=kind, blocksize=64, compress_statistics=nested)
        parts = {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}
        return Written({"weight": codes, **parts}, functional.dequantize_4bit(codes, state))

    def eight() -> Written:
        codes, scale, _ = functional.int8_vectorwise_quant(weight().half())
        return Written({"weight": codes, "SCB": scale}, functional.int8_vectorwise_dequant(codes, scale).float())

    for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False)):
        yield f"{kind}{', nested' if nested else ''}", lambda kind=kind, nested=nested: four(kind, nested)  # type: ignore[misc]
    yield "int8", eight


def mlx() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield MLX's affine formats, whose decoder is run in float32."""
    import mlx.core as mx  # type: ignore[import-not-found]
    import numpy as np

    def run(bits: int) -> Written:
        codes, scales, biases = mx.quantize(mx.array(weight().numpy()), group_size=64, bits=bits)
        decoded = torch.from_numpy(np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=bits)))
        parts = {"weight": codes, "scales": scales, "biases": biases}
        return Written({name: torch.from_numpy(np.array(x)) for name, x in parts.items()}, decoded)

    for bits in (8, 4, 2):
        yield f"affine, {bits} bits, groups of 64", lambda bits=bits: run(bits)  # type: ignore[misc]


def torchao() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield torchao's NVFP4 with the markers of the published files."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor  # type: ignore[import-not-found]

    def run(swizzled: bool) -> Written:
        scale = weight().abs().max() / 2688
        found = NVFP4Tensor.to_nvfp4(weight(), 16, per_tensor_scale=scale, is_swizzled_scales=swizzled)
        said = {"format": "torchao_nvfp4", "block_size": 16, "is_swizzled_scales": swizzled}
        marker = {"torchao_nvfp4": mark(**said)["comfy_quant"]}
        parts = {"weight": found.qdata.view(torch.uint8), "weight_scale": found.scale, "weight_scale_2": scale}
        return Written(parts | marker, found.dequantize(torch.float32))

    yield "nvfp4, swizzled", lambda: run(True)
    yield "nvfp4, flat", lambda: run(False)


def modelopt() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield the tensors that ModelOpt exports, with its own arrangement for cuBLAS, and the config that it writes."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format  # type: ignore[import-not-found]
    from modelopt.torch.export.diffusers_utils import swizzle_nvfp4_scales  # type: ignore[import-not-found]
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor  # type: ignore[import-not-found]

    def config(algorithm: str) -> dict[str, Any]:
        said = {"producer": {"name": "modelopt", "version": version("nvidia-modelopt")}}
        written: dict[str, Any] = convert_hf_quant_config_format(said | {"quantization": {"quant_algo": algorithm}})
        return written

    def nvfp4(swizzled: bool) -> Written:
        found, scale, scale_2 = NVFP4QTensor.quantize(weight(), 16)
        decoded = found.dequantize(torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        parts = {"weight": found._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2.reshape(())}
        if swizzled:
            named = {f"{LAYER}.{name}": x for name, x in parts.items()}
            parts = {name.removeprefix(f"{LAYER}."): x for name, x in swizzle_nvfp4_scales(named).items()}
            return Written(parts, decoded, {"quantization_config": json.dumps(config("NVFP4"))}, scales="tiled")
        return Written(parts, decoded, config={"quantization_config": config("NVFP4")})

    def fp8() -> Written:
        found, scale = FP8QTensor.quantize(weight())
        decoded = found.dequantize(torch.float32, scale=scale)
        parts = {"weight": found._quantized_data, "weight_scale": scale.reshape(()), "input_scale": torch.ones(())}
        return Written(parts, decoded, config={"quantization_config": config("FP8")})

    yield "NVFP4, config.json", lambda: nvfp4(False)
    yield "NVFP4 for cuBLAS, read with scales='tiled'", lambda: nvfp4(True)
    yield "FP8", fp8


def diffusers() -> Iterator[tuple[str, Callable[[], Written]]]:
    """Yield a layer that diffusers' layerwise casting stores in float8."""
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting

    def run() -> Written:
        model: Any = torch.nn.Sequential(torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False))
        with torch.no_grad():
            model[0].weight.copy_(weight())
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
        stored = model[0].weight.detach()
        return Written({"weight": stored}, stored.float())

    yield "layerwise casting", run


WRITERS: dict[str, tuple[str, Callable[[], Iterator[tuple[str, Callable[[], Written]]]]]] = {
    "comfy-kitchen": ("comfy_kitchen", comfy_kitchen),
    "convert_to_quant": ("convert_to_quant", convert_to_quant),
    "optimum-quanto": ("optimum.quanto", optimum_quanto),
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "mlx": ("mlx.core", mlx),
    "torchao": ("torchao", torchao),
    "nvidia-modelopt": ("modelopt.torch.quantization", modelopt),
    "diffusers": ("diffusers", diffusers),
}


def read(written: Written) -> Weight:
    """Return the layer as `load` finds it in a file with these tensors. Raises `ValueError`."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors", delete=False) as opened:
        path = Path(opened.name)
    save_file(
        {f"{LAYER}.{name}": x.contiguous() for name, x in written.tensors.items()}, path, written.metadata or None
    )
    file, stored = read_header(path)
    dialect, companions = Dialect("lightricks", ""), companions_of(stored)
    said = read_sayings(file.metadata, written.config, dialect, stored, companions)
    name = next(name for name in (f"{LAYER}.weight", f"{LAYER}.weight._data") if name in stored)
    found = identify(SHAPE, stored[name], companions.get(name, {}), said.of(name))
    problems, _ = settle_facts([found], file.metadata, said.quantiser, None, written.scales)
    if said.problems or problems:
        raise ValueError("; ".join([*said.problems, *problems]))
    return found


def gguf_rows() -> Iterator[Row]:
    """Yield a row for each type that the gguf library can write."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    for kind in GGMLQuantizationType:
        try:
            codes = quants.quantize(weight().numpy(), kind)
        except NotImplementedError:
            continue
        path = Path(tempfile.mkdtemp(), "layer.gguf")
        writer = GGUFWriter(path, "ltxv")
        writer.add_tensor(f"{LAYER}.weight", codes, raw_dtype=kind)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
        _, stored = read_header(path)
        found = identify(SHAPE, stored[f"{LAYER}.weight"], {}, ())
        decoded = torch.from_numpy(quants.dequantize(codes, kind)).float().reshape(SHAPE)
        yield compared("gguf", kind.name, found, decoded)


def compared(writer: str, format: str, found: Weight, decoded: Tensor) -> Row:
    """Return the row of a layer that was read: whether its float32 has the bits of the writer's own."""
    ours = found.read(torch.float32)
    facts = ", ".join(
        f"{name} {found.facts[name]}" for name in ("nibbles", "scales", "rotation") if found.facts.get(name)
    )
    read_as = f"{found.label}{f': {facts}' if facts else ''}"
    if torch.equal(ours, decoded):
        return Row(writer, format, read_as, "bits equal", True)
    error = float((ours.double() - decoded.double()).abs().max() / decoded.double().abs().max())
    return Row(writer, format, read_as, f"within {error:.1e} of the largest: order of products", error < 1e-6)


def lora_rows() -> Iterator[Row]:
    """Yield a row for each kind of LoRA: whether the changed weights have the bits of those that the writer means."""
    for (writer, what), write in LORA_WRITERS.items():
        try:
            found = compare(write)
        except ModuleNotFoundError as error:
            yield Row(writer, what, "", f"not installed: {error}", True)
            continue
        said = f"{found.differing} weights within {found.error:.1e} of the largest" if found.differing else "bits equal"
        yield Row(
            writer, what, found.read_as, f"{said}, {found.changed} changed", found.changed > 0 and found.error < 1e-6
        )


def rows() -> Iterator[Row]:
    """Yield the rows of all writers."""
    yield from quantised_rows()
    yield from lora_rows()


def quantised_rows() -> Iterator[Row]:
    """Yield the rows of the writers of quantised weights."""
    yield from gguf_rows()
    for writer, (module, layouts) in WRITERS.items():
        try:
            importlib.import_module(module)
            found = list(layouts())
        except ImportError as error:
            yield Row(writer, "", "", f"not installed: {error}", True)
            continue
        for format, run in found:
            try:
                written = run()
                yield compared(writer, format, read(written), written.decoded)
            except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
                text = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                lacks = "No module named" in text  # something that the writer needs and that is not there
                yield Row(writer, format, "", f"cannot be run here: {text}" if lacks else text, lacks)


def table(found: list[Row]) -> str:
    """Return the rows as Markdown, with the versions of the writers."""
    lines = ["| writer | format | read as | result |", "|---|---|---|---|"]
    lines += [f"| {row.writer} | {row.format} | {row.read_as} | {row.result} |" for row in found]
    installed = {row.writer for row in found if not row.result.startswith("not installed")}
    writers = dict.fromkeys(row.writer for row in found)
    versions = ", ".join(f"{writer} {version(writer)}" for writer in writers if writer in installed)
    return "\n".join([*lines, "", f"Writers: {versions}."])


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it into the document if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/checkpoints.md")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.manual_seed(0)
    found = list(rows())
    text = table(found)
    print(text)
    if options.write:
        document = DOCUMENT.read_text(encoding="utf-8")
        parts = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
        DOCUMENT.write_text(parts.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", document), encoding="utf-8")
    return 0 if all(row.good for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
