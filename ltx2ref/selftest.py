"""Check that the model in this folder computes what diffusers computes, to the bit: python -m PACKAGE.selftest.

Three small models with generated weights run under exact arithmetic, which gives the same bits on every machine and
with every version of torch. selftest.json holds their inputs, and the digests of what diffusers returned for them.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import TransformerConfig
from .parity.exact import exact
from .parity.generator import build, uniform

EXPECTED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def outputs(case: dict[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """Return the digest of each output of a case that is computed in `dtype`."""
    model = build(TransformerConfig.from_diffusers(case["config"]), dtype)
    inputs = {name: input_of(x, dtype) for name, x in case["inputs"].items()}
    with torch.no_grad(), exact():
        video, audio = model(**inputs, return_dict=False)
    return {"sample": digest_of(video), "audio_sample": digest_of(audio)}


def input_of(x: Any, dtype: torch.dtype) -> Any:
    """Return an input: what has a shape is a tensor, either generated from its name or given by its elements."""
    if not isinstance(x, dict):
        return x
    if "shape" not in x:
        return {name: input_of(value, dtype) for name, value in x.items()}
    kind = dtype if x["dtype"] == "the model's" else getattr(torch, x["dtype"])
    if "name" in x:
        return uniform(x["name"], tuple(x["shape"]), seed=x["seed"]).to(kind)
    return torch.tensor(x["elements"], dtype=kind).reshape(x["shape"])


def digest_of(x: Tensor) -> str:
    """Return the first half of the SHA-256 of dtype, shape and bits."""
    shape = f"{str(x.dtype).removeprefix('torch.')} {','.join(map(str, x.shape))}\n"
    return hashlib.sha256(shape.encode() + bytes(x.flatten().view(torch.uint8).tolist())).hexdigest()[:32]


def different_outputs() -> list[str]:
    """Run every case in every recorded dtype, and return the outputs that differ from diffusers'."""
    return [
        f"{name} {dtype} {output}"
        for name, case in EXPECTED["cases"].items()
        for dtype, expected in case["digests"].items()
        for output, digest in outputs(case, getattr(torch, dtype)).items()
        if digest != expected[output]
    ]


def test_the_model_computes_what_diffusers_computes() -> None:
    assert different_outputs() == []


if __name__ == "__main__":
    different = different_outputs()
    print(
        "\n".join(f"differs from {EXPECTED['implementation']}: {x}" for x in different)
        or f"identical to {EXPECTED['implementation']}: {', '.join(EXPECTED['cases'])}"
    )
    sys.exit(bool(different))
