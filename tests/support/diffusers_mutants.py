"""The thirty bugs of mutants.py, under the same names, made in diffusers' model at run time.

`inject(name, model)` returns a context manager, after which the model is as before. For the bugs that mutants.py makes
in a loader, this file gives the model the weights that such a loader would make of its own. `SHOWN_IN` names for each
bug a conformance case in which it shows, and mutants.FIRST the taps at which it may first show.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from diffusers.models.transformers import transformer_ltx2
from mutants import at_24_fps, norm_in_bfloat16, patched
from torch import Tensor, nn

Block = transformer_ltx2.LTX2VideoTransformerBlock
Model = Any  # diffusers' LTX2VideoTransformer3DModel, which has no type annotations
Patch = Any
MUTANTS: dict[str, Callable[[Model], list[Patch]]] = {}
SHOWN_IN: dict[str, str] = {}


def mutant(name: str, case: str) -> Callable[[Callable[[Model], list[Patch]]], None]:
    def register(make: Callable[[Model], list[Patch]]) -> None:
        MUTANTS[name], SHOWN_IN[name] = make, case

    return register


def inject(name: str, model: Model) -> Patch:
    return patched(MUTANTS[name](model))


# ---------------------------------------------------------------- ways to change it
def arguments(model: Model, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Patch]:
    forward = model.forward
    return [patch.object(model, "forward", lambda **given: forward(**given | change(given)))]


def positions(rope: Any, change: Callable[[Tensor], Tensor]) -> Patch:
    """Change what a RoPE module makes its tables from, but not coordinates that it is given."""
    forward = rope.forward
    return patch.object(rope, "forward", lambda coords, device=None: forward(change(coords), device=device))


def planes(rope: Any, change: Callable[[Tensor, int], Tensor]) -> Patch:
    """Change both tables of a RoPE module. `change` receives them as (B, T, PLANES), and the number of axes."""
    forward, heads = rope.forward, rope.num_attention_heads

    def table(x: Tensor, axes: int) -> Tensor:
        if x.ndim == 4:  # (B, H, T, planes of a head)
            return change(x.transpose(1, 2).flatten(2), axes).unflatten(2, (heads, -1)).transpose(1, 2)
        return change(x[..., ::2], axes).repeat_interleave(2, -1)

    def changed(coords: Tensor, device: Any = None) -> tuple[Tensor, Tensor]:
        cos, sin = forward(coords, device=device)
        return table(cos, coords.shape[1]), table(sin, coords.shape[1])

    return patch.object(rope, "forward", changed)


def ropes(model: Model) -> list[Any]:
    return [model.rope, model.audio_rope, model.cross_attn_rope, model.cross_attn_audio_rope]


def rows_of_the_exchange(change: Callable[[list[Tensor]], list[Tensor]]) -> list[Patch]:
    """Change the order of the four rows, scale and shift of either direction, that nothing but the exchange has."""
    rows = Block.get_mod_params

    def changed(*given: Any) -> Any:
        found = [*rows(*given)]
        return change(found) if len(found) == 4 else found

    return [patch.object(Block, "get_mod_params", staticmethod(changed))]


def edited(function: Any, change: Callable[[ast.AST], None]) -> Any:
    """Return a function whose syntax tree was changed before it was compiled again."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    change(tree)
    made: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), "edited", "exec"), function.__globals__, made)
    return made[function.__name__]


def weights(model: Model, change: Callable[[Tensor], Tensor]) -> list[Patch]:
    """Change the weights of all Linear layers in blocks, which are those that quantised files store in few bits."""
    return [
        patch.dict(layer._parameters, weight=nn.Parameter(change(layer.weight.detach()), requires_grad=False))
        for layer in model.transformer_blocks.modules()
        if isinstance(layer, nn.Linear)
    ]


# ---------------------------------------------------------------- noise levels
@mutant("gate-multiplier-1", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return [
        patch.object(model, "_internal_dict", FrozenDict({**model.config, "cross_attn_timestep_scale_multiplier": 1.0}))
    ]


@mutant("swapped-modality-sigma", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"use_cross_timestep": not given.get("use_cross_timestep", False)})


@mutant("unscaled-gate-timestep", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    def unscaled(layer: nn.Module) -> Patch:
        forward = layer.forward
        return patch.object(layer, "forward", lambda timestep, *more, **named: forward(timestep / 1000, *more, **named))

    return [unscaled(model.av_cross_attn_video_a2v_gate), unscaled(model.av_cross_attn_audio_v2a_gate)]


@mutant("sigma-ignored", "2.3/i2v")
def _(model: Model) -> list[Patch]:
    def last(timestep: Tensor) -> Tensor:
        return timestep.reshape(len(timestep), -1)[:, -1]

    return arguments(
        model, lambda given: {"sigma": last(given["timestep"]), "audio_sigma": last(given["audio_timestep"])}
    )


@mutant("per-token-timestep-averaged", "2.3/i2v")
def _(model: Model) -> list[Patch]:
    def average(timestep: Tensor) -> Tensor:
        return timestep.reshape(len(timestep), -1).mean(1, keepdim=True)

    return arguments(
        model,
        lambda given: {"timestep": average(given["timestep"]), "audio_timestep": average(given["audio_timestep"])},
    )


# ---------------------------------------------------------------- positions
@mutant("rope-float32-frequencies", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return [patch.object(rope, "double_precision", False) for rope in ropes(model)]


@mutant("rope-bf16-positions", "2.0/121-frames")
def _(model: Model) -> list[Patch]:
    return [positions(rope, Tensor.bfloat16) for rope in ropes(model)]


@mutant("rope-axis-major", "2.0/121-frames")
def _(model: Model) -> list[Patch]:
    def axis_major(table: Tensor, axes: int) -> Tensor:
        padding = table.shape[-1] % axes
        last = table[..., padding:].unflatten(-1, (-1, axes)).transpose(-1, -2).flatten(-2)
        return torch.cat([table[..., :padding], last], -1)

    return [planes(rope, axis_major) for rope in ropes(model)]


@mutant("rope-patch-start", "2.0/121-frames")
def _(model: Model) -> list[Patch]:
    return [positions(rope, lambda coords: coords[..., 0]) for rope in ropes(model)]


@mutant("rope-right-padding", "2.0/121-frames")
def _(model: Model) -> list[Patch]:
    return [planes(rope, lambda table, axes: table.roll(-(table.shape[-1] % axes), -1)) for rope in ropes(model)]


@mutant("rope-shared-heads", "2.0/121-frames")
def _(model: Model) -> list[Patch]:
    def shared(rope: Any) -> Patch:
        heads = rope.num_attention_heads
        return planes(rope, lambda table, axes: table[..., : table.shape[-1] // heads].repeat(1, 1, heads))

    return [shared(rope) for rope in ropes(model)]


@mutant("fps-dropped", "2.0/121-frames")
def _(model: Model) -> list[Patch]:
    return [positions(model.rope, lambda coords: at_24_fps(coords, 25.0))]


@mutant("fps-dropped-from-exchange", "2.0/121-frames")
def _(model: Model) -> list[Patch]:
    return [positions(model.cross_attn_rope, lambda coords: at_24_fps(coords, 25.0))]


@mutant("max-pos-frames", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    """Positions are latent frames, 25 / 8 in a second, and their maximum is still the one in seconds."""
    return [patch.object(model.rope, "base_num_frames", model.rope.base_num_frames * 8 / 25)]


# ---------------------------------------------------------------- masks and guidance
@mutant("mask-as-bool", "2.3/text-masks")
def _(model: Model) -> list[Patch]:
    """Add a mask of ones and zeros to the logits as it is, which is what one of three dimensions is there for."""

    def as_it_is(given: dict[str, Any]) -> dict[str, Any]:
        dtype, names = given["hidden_states"].dtype, ("encoder_attention_mask", "audio_encoder_attention_mask")
        return {name: given[name].to(dtype)[:, None] for name in names if given.get(name) is not None}

    return arguments(model, as_it_is)


@mutant("mask-ignored", "2.3/text-masks")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"encoder_attention_mask": None, "audio_encoder_attention_mask": None})


@mutant("stg-4d-mask", "2.3/stg-one-of-batch")
def _(model: Model) -> list[Patch]:
    """Give the result a second batch dimension, row i blended by the mask of row j; the port goes on with the first."""
    lerp = torch.lerp
    return [
        patch.object(
            transformer_ltx2,
            "torch",
            SimpleNamespace(**vars(torch) | {"lerp": lambda v, out, keep: lerp(v, out, keep.unsqueeze(1))[0]}),
        )
    ]


@mutant("stg-wrong-block", "2.3/stg")
def _(model: Model) -> list[Patch]:
    return arguments(
        model,
        lambda given: {
            "spatio_temporal_guidance_blocks": [i - 1 for i in given.get("spatio_temporal_guidance_blocks") or ()]
        },
    )


@mutant("stg-without-gate", "2.3/stg-one-of-batch")
def _(model: Model) -> list[Patch]:
    def patched(layer: Any) -> Patch:
        forward = layer.forward

        def ungated(*given: Any, perturbation_mask: Any = None, **named: Any) -> Tensor:
            named |= {} if perturbation_mask is None else {"perturbation_mask": perturbation_mask}
            gates = layer.to_gate_logits if perturbation_mask is None else None
            with patch.dict(layer._modules, to_gate_logits=gates):
                return forward(*given, **named)

        return patch.object(layer, "forward", ungated)

    return [patched(layer) for block in model.transformer_blocks for layer in (block.attn1, block.audio_attn1)]


@mutant("keyframes-unapplied", "2.5/everything")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"video_keyframes_mask": None})


# ---------------------------------------------------------------- layers
@mutant("ff-bias-dropped", "2.5/t2v")
def _(model: Model) -> list[Patch]:
    linears = [x for block in model.transformer_blocks for x in block.audio_ff.modules() if isinstance(x, nn.Linear)]
    return [patch.object(x, "forward", lambda y, x=x: F.linear(y, x.weight)) for x in linears]


@mutant("gelu-erf", "2.5/t2v")
def _(model: Model) -> list[Patch]:
    return [
        patch.object(ff.net[0], "approximate", "none")
        for block in model.transformer_blocks
        for ff in (block.ff, block.audio_ff)
    ]


@mutant("output-norm-bf16", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    def patched(norm: Any) -> Patch:
        def forward(x: Tensor) -> Tensor:
            with patch.object(
                torch, "layer_norm", norm_in_bfloat16
            ):  # F.layer_norm calls this function, so a trace sees it
                return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)

        return patch.object(norm, "forward", forward)

    return [patched(model.norm_out), patched(model.audio_norm_out)]


@mutant("qk-norm-per-head", "2.0/t2v")
def _(model: Model) -> list[Patch]:
    def per_head(norm: Any, heads: int) -> Patch:
        return patch.object(
            norm,
            "forward",
            lambda x: (
                norm.weight
                * F.rms_norm(x.unflatten(-1, (heads, -1)), (x.shape[-1] // heads,), eps=norm.eps).flatten(-2)
            ),
        )

    layers = [x for x in model.modules() if isinstance(x, transformer_ltx2.LTX2Attention)]
    return [per_head(norm, layer.heads) for layer in layers for norm in (layer.norm_q, layer.norm_k)]


@mutant("scale-shift-swapped", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return rows_of_the_exchange(lambda rows: [rows[i] for i in (1, 0, 3, 2)])


@mutant("a2v-v2a-swapped", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return rows_of_the_exchange(lambda rows: rows[2:] + rows[:2])


@mutant("sequential-exchange", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    """Let the audio attend to a video that has attended to the audio, normalised once more before the second half."""
    again = ast.parse("norm_hidden_states = self.audio_to_video_norm.forward(hidden_states)").body

    def change(tree: ast.AST) -> None:
        second = next(
            x
            for x in ast.walk(tree)
            if isinstance(x, ast.If) and isinstance(x.test, ast.Name) and x.test.id == "use_v2a_cross_attention"
        )
        second.body = [*again, *second.body]

    return [patch.object(Block, "forward", edited(Block.forward, change))]


# ---------------------------------------------------------------- what a loader makes of a file
@mutant("fp8-scale-ignored", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return weights(model, lambda x: x * (448 / x.float().abs().max()).to(x.dtype))


@mutant("prompt-adaln-unmapped", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    """Keep the parameters as they were drawn."""
    drawn = torch.Generator().manual_seed(0)
    return [
        patch.dict(
            layer._parameters,
            {
                name: nn.Parameter(
                    ((torch.rand(x.shape, generator=drawn) * 2 - 1) * layer.in_features**-0.5).to(x),
                    requires_grad=False,
                )
                for name, x in layer.named_parameters()
            },
        )
        for adaln in (model.prompt_adaln, model.audio_prompt_adaln)
        for layer in adaln.modules()
        if isinstance(layer, nn.Linear)
    ]


@mutant("nvfp4-nibbles-swapped", "2.5/t2v")
def _(model: Model) -> list[Patch]:
    return weights(model, lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


@mutant("int8-not-unrotated", "2.5/t2v")
def _(model: Model) -> list[Patch]:
    """Rotate groups of 4 columns, where a file's are of 256, which these models do not have."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rotation = torch.kron(two, two) / 2
    return weights(model, lambda x: (x.unflatten(-1, (-1, 4)).float() @ rotation).flatten(-2).to(x.dtype))
