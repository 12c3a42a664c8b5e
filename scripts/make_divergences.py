"""Write docs/divergences.md: where diffusers and ltx-core differ, measured by switching one convention at a time.

    python scripts/make_divergences.py            write it
    python scripts/make_divergences.py --check    exit with 1 if it is not what this version measures

Every number is a relative L2 distance between outputs on the inputs of a conformance case, the larger one of the two
streams. Nothing but this package runs: what ltx-core computed is in the recorded cases.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from ltx2ref.interface import DIFFUSERS, LTX_CORE_2026_03, LTX_CORE_2026_08, Conventions, LTX2VideoTransformer3DModel
from ltx2ref.parity import record
from ltx2ref.parity.cases import LTX_CORE_CASES, RECORDED, Case, Inputs
from ltx2ref.parity.explain.conventions import divergence, switched
from ltx2ref.parity.generator import build
from ltx2ref.parity.run import cast, run
from ltx2ref.parity.trace.probe import threads
from ltx2ref.parity.trace.taps import Taps
from ltx2ref.parity.truth import norm
from ltx2ref.progress import track

NATIVE = [case for case in RECORDED if case.native]  # the document's numbers are the recording machine's, as theirs are
PATH = Path(__file__).parent.parent / "docs" / "divergences.md"
OUTPUTS = ("sample", "audio_sample")


class Row(NamedTuple):
    """Describe a convention in words, and what to pick."""

    diffusers: str
    march: str
    august: str
    advice: str


ROWS = {
    "rotation_dtype": Row(
        "tables, queries and keys in float32 (or wider), rounded once",
        "tables and products in the model's dtype",
        "the same",
        "It only shows in bfloat16 and float16, as rounding: follow the implementation that you compare with.",
    ),
    "positions_dtype": Row(
        "float32",
        "computed in float32, then rounded to the model's dtype (video's only; audio's stay float32)",
        "float32, since 2026-05-11",
        "Keep float32: in bfloat16 the rounded times turn the fast RoPE planes by radians. Pick `model` only to "
        "reproduce ltx-core up to 1.0.0, or a port made from it.",
    ),
    "text_mask_bias": Row(
        "-10000 on masked tokens",
        "the lowest number of the dtype",
        "the same, by its description (the tensors at hand always keep a token)",
        "There is no difference as long as each row keeps a token. Never pass a row that keeps none: its result "
        "depends on this constant.",
    ),
    "self_mask_bias": Row(
        "`(1 - m) * -10000`: at m = 0.999 a weight is already divided by 22,000",
        "`log(m)`: m is a factor of the attention weight; 0 is the lowest number",
        "the same",
        "Binary masks are safe in both; fractional ones mean what they say only in ltx-core.",
    ),
    "exchange": Row(
        "own timestep; the other stream's sigma with `use_cross_timestep=True`",
        "the other stream's sigma, always",
        "scale and shift: own timestep; gate: the other stream's sigma",
        "Do what your checkpoint's own pipeline does (next section). It matters as soon as the two streams' noise "
        "levels differ, or differ between tokens, as with image conditioning.",
    ),
    "guidance": Row(
        "ignored without `perturbed_attn` (here with a warning)",
        "applied to any model",
        "assumed to be the same (no tensors of it are at hand)",
        "A model whose config lacks `perturbed_attn` (2.0) is guided only in ltx-core.",
    ),
}
INTRO = """# Where the published implementations differ

*Written by `python scripts/make_divergences.py`; edit the script.*

Two implementations are called the reference: diffusers (0.42.1) and the authors' ltx-core (1.0.0, its state of March
2026; later states are not on the package index). In everything that is compared here they differ in the conventions
below and in nothing else: with all of them switched, this model has the bits of ltx-core. In float32, ltx-core 1.0.0
has the bits of diffusers with `use_cross_timestep=True`.

```python
# or LTX_CORE_2026_03; DIFFUSERS is the default
model = ltx2ref.load(path, conventions=ltx2ref.LTX_CORE_2026_08)
# or one alone
dataclasses.replace(ltx2ref.DIFFUSERS, self_mask_bias="log")
```

When a port differs, `ltx2ref audit PORT` tries the switches and names those that make it identical.
`ltx2ref audit ltx2ref:ltx-core-2026-08 PORT` takes ltx-core's conventions as the reference.
"""
EXCHANGE = """## The exchange's noise level

In the exchange, scale, shift and gate follow a noise level. Three choices are in use:

| | scale and shift | gate | here |
|---|---|---|---|
| own | own timestep, per token | own timestep | `use_cross_timestep=False` |
| other | the other stream's sigma | the other stream's sigma | `use_cross_timestep=True`, or `exchange="other"` |
| other gate | own timestep, per token | the other stream's sigma | `exchange="other_gate"` |

ltx-core had *own* in January 2026 and *other* in March (1.0.0), and has had *other gate* since 2026-05-28. diffusers
documents a choice between the first two, and defaults to *own*: no value of `use_cross_timestep` gives the third.
DiffSynth 2.1.12 chooses by release: *other* for 2.0 and 2.3, *other gate* for 2.5. None of these sources says which one
a release was trained with; for 2.5, ltx-core and DiffSynth agree on *other gate*, and diffusers stands alone. Where
both streams and all tokens have the same noise level, as in plain text-to-video sampling, the three are the same.

Distance between the outputs of two choices, float32:

"""
OTHERS = """## What is not a convention

- **One stream alone.** ltx-core takes `video=None` or `audio=None`. Here, [latents of no
  tokens](using.md#one-stream-alone) leave a stream out, with the same bits. diffusers cannot.
- **Partial isolation.** Skipping the exchange in one direction or for one sample, guidance in other blocks for one
  stream than for the other, and a frozen stream: ltx-core can do this, and the documented arguments cannot express it.
  [A few hooks](using.md#guidance-of-ltx-cores-pipelines) can, with the same bits. `isolate_modalities` skips both
  directions for all samples; this is compared.
- **Partial guidance.** diffusers and ltx2ref blend `perturbation_mask` with `lerp`, so spatio-temporal guidance can
  apply to a share of a sample. ltx-core perturbs a sample or does not, and the two agree there.
- **The dtype of a guidance mask.** Another dtype than the model's is an error in diffusers; ltx2ref casts the mask.
- **Floating text masks.** A floating mask (B, S) is multiplicative in the documentation, and a bias in ltx-core: use
  integers there. The presets keep the documented meaning. A floating mask of three dimensions is a bias in both.
- **Units of timesteps.** Timesteps are passed times 1000 here and in diffusers, and multiplied inside ltx-core. As long
  as they are kept in float32 or wider, the numbers are the same.
- **float64 models.** A float64 model is float64 throughout here, whatever the conventions: the truth to measure
  against. Both others compute RoPE and timestep phases in float32 there.
- **What ltx-core 1.0.0 does not have:** release 2.5, configs in which only one stream is gated or modulated, and
  `use_prompt_adaln_single=False`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with docs/divergences.md instead of writing it")
    options = parser.parse_args()
    with threads(record.environment()["threads"]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that guidance has no effect is what is measured
        text = document()
    if not options.check:
        PATH.write_text(text, encoding="utf-8")
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != text:
        sys.exit(f"{PATH.name} is not what this version measures: run python scripts/make_divergences.py")


def document() -> str:
    effects = {
        (case.id, dtype): measured(case, dtype)
        for case, dtype in track([(case, dtype) for case in NATIVE for dtype in record.NATIVE_DTYPES], "switching")
    }
    return (
        "\n".join(
            [INTRO, *ledger(effects), EXCHANGE + "\n".join(exchanges()), "", *sizes(effects), *proof(), OTHERS]
        ).rstrip()
        + "\n"
    )


Effects = dict[tuple[str, str], dict[tuple[str, str], float]]


def switches() -> Iterator[tuple[str, str]]:
    for field in fields(Conventions):
        yield from ((field.name, value) for value in get_args(field.type)[1:])


def flipped(conventions: Conventions, name: str, value: Any) -> Conventions:
    changes: dict[str, Any] = {name: value}
    return replace(conventions, **changes)


def measured(case: Case, dtype: str) -> dict[tuple[str, str], float]:
    """Return how far the outputs move for each switch alone."""
    model, inputs = prepared(case, dtype)
    plain = outputs(model, inputs)
    return {
        (name, value): distance(outputs(switched(model, flipped(DIFFUSERS, name, value)), inputs), plain)
        for name, value in switches()
    }


def prepared(case: Case, dtype: str) -> tuple[LTX2VideoTransformer3DModel, Inputs]:
    return build(case.config, record.NATIVE_DTYPES[dtype], scales=case.scales), cast(
        case.inputs(), record.NATIVE_DTYPES[dtype]
    )


def outputs(model: LTX2VideoTransformer3DModel, inputs: Inputs) -> Taps:
    with torch.no_grad():
        return dict(zip(OUTPUTS, model(**inputs, return_dict=False), strict=True))


def distance(a: Taps, b: Taps) -> float:
    return max(norm(a[name].double() - b[name].double()) / norm(b[name]) for name in OUTPUTS)


def ledger(effects: Effects) -> list[str]:
    """Return the section that says what each convention is, what it changes and what to pick."""
    header = ["`Conventions.`", "diffusers 0.42.1", "ltx-core 1.0.0 (March 2026)", "ltx-core in August 2026"]
    effect = ["`Conventions.`", "first shows at", *record.NATIVE_DTYPES]
    return [
        "## The ledger",
        "",
        *table(header, [[f"`{name}`", row.diffusers, row.march, row.august] for name, row in ROWS.items()]),
        "What to pick:",
        "",
        *(f"- `{name}`: {row.advice}" for name, row in ROWS.items()),
        "",
        "The largest effect on an output in any conformance case, with one convention alone switched from diffusers',",
        "and the first tap at which it shows. [All effects](#effect-of-each-switch-case-by-case) are below.",
        "",
        *table(
            effect,
            [
                [f"`{name}`", first(effects, name), *(largest(effects, name, dtype) for dtype in record.NATIVE_DTYPES)]
                for name in ROWS
            ],
        ),
    ]


def first(effects: Effects, name: str) -> str:
    """Return the first tap whose bits differ, in the first case on which each value of the switch has an effect."""
    found: dict[str, str | None] = {}
    for (case_id, dtype), row in effects.items():
        for (field, value), effect in row.items():
            if field == name and effect and value not in found:
                model, inputs = prepared(next(case for case in NATIVE if case.id == case_id), dtype)
                other = switched(model, flipped(DIFFUSERS, name, value))
                found[value] = divergence(run(model, inputs), run(other, inputs))
    return ", ".join(f"`{tap}`" for tap in found.values()) or "nowhere"


def largest(effects: Effects, name: str, dtype: str) -> str:
    return number(
        max(
            effect
            for (_, at), row in effects.items()
            if at == dtype
            for (field, _), effect in row.items()
            if field == name
        )
    )


def sizes(effects: Effects) -> list[str]:
    header = ["case", *(f"{name} = {value}" for name, value in switches())]
    lines = [
        "## Effect of each switch, case by case",
        "",
        "One convention at a time is switched from diffusers'. 0 means that both outputs keep their bits.",
        "",
    ]
    for dtype in record.NATIVE_DTYPES:
        lines += [
            dtype,
            "",
            *table(header, [[case.id, *map(number, effects[case.id, dtype].values())] for case in NATIVE]),
        ]
    return lines


def exchanges() -> list[str]:
    choices: dict[str, tuple[Conventions, dict[str, Any]]] = {
        "own": (DIFFUSERS, {}),
        "other": (DIFFUSERS, {"use_cross_timestep": True}),
        "other gate": (replace(DIFFUSERS, exchange="other_gate"), {}),
    }
    pairs = [("own", "other"), ("own", "other gate"), ("other", "other gate")]
    rows = []
    for case in NATIVE:
        if case.name in ("t2v", "i2v", "keyframes") and case.conventions == DIFFUSERS:
            model, inputs = prepared(case, "float32")
            found = {name: outputs(switched(model, how), inputs | more) for name, (how, more) in choices.items()}
            rows.append([case.id, *(number(distance(found[b], found[a])) for a, b in pairs)])
    return table(["case", *(f"{a} / {b}" for a, b in pairs)], rows)


def proof() -> list[str]:
    """Switch one convention after the other, and return how far the outputs are from those of ltx-core."""
    rows = []
    for case in LTX_CORE_CASES:
        for dtype in record.NATIVE_DTYPES:
            (model, inputs), recorded = prepared(case, dtype), record.load_record(case, dtype).taps
            row = [case.id, dtype, number(distance(outputs(model, inputs), recorded))]
            for field in fields(Conventions):
                value = getattr(LTX_CORE_2026_03, field.name)
                model = switched(model, flipped(model.conventions, field.name, value))
                row.append(number(distance(outputs(model, inputs), recorded)))
            found = run(model, inputs)
            same = sum(torch.equal(found[name], x) for name, x in recorded.items())
            rows.append([*row, f"{same} of {len(recorded)}"])
    names = [field.name for field in fields(Conventions)]
    differ = [name for name in names if getattr(LTX_CORE_2026_03, name) != getattr(LTX_CORE_2026_08, name)]
    return [
        "## All of them together",
        "",
        "The distance from what ltx-core 1.0.0 computed (recorded), first with diffusers' conventions, then with one",
        "after the other switched to `LTX_CORE_2026_03`, from left to right. The last column counts the recorded taps",
        "that are identical in the end.",
        "",
        *table(["case", "dtype", "diffusers", *(f"+ {name}" for name in names), "identical taps"], rows),
        f"`LTX_CORE_2026_08` differs from `LTX_CORE_2026_03` in {' and '.join(f'`{name}`' for name in differ)}. That",
        "state cannot be installed: `tests/model/test_conventions.py` compares it with tensors that ltx-core 1.2.0",
        "computed, if `LTX2REF_EXTRA_CASES` names the folder that has them.",
        "",
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)] + [""]


def number(x: float) -> str:
    return f"{x:.1e}" if x else "0"


if __name__ == "__main__":
    main()
