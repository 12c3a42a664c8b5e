<<<<<<< HEAD
"""Changes of diffusers that no conformance case noticed, and the case and tap at which each shows now.

A change is made at run time, of a model's arguments, attributes or layers: `changed(change, model)` is a context.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

Given = dict[str, Any]
Change = Callable[[Any], list[Any]]


class Mutant(NamedTuple):
    change: Change
    case: str
    tap: str
    dtype: str = "float32"


MUTANTS: dict[str, Mutant] = {}


def mutant(name: str, case: str, tap: str, dtype: str = "float32") -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        MUTANTS[name] = Mutant(change, case, tap, dtype)
        return change
    return add


@contextmanager
def changed(change: Change, model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for each in change(model):
            stack.enter_context(each)
        yield


def arguments(change: Callable[[Given], Given]) -> Change:
    """Change what the model is called with."""
    def patches(model: Any) -> list[Any]:
        forward = model.forward
        return [patch.object(model, "forward", lambda **given: forward(**given | change(given)))]
    return patches


def attributes(*at: str, **values: Any) -> Change:
    def patches(model: Any) -> list[Any]:
        return [patch.object(model.get_submodule(name), key, value) for name in at for key, value in values.items()]
    return patches


def outputs(change: Callable[[Given, Tensor, str], Tensor]) -> Change:
    """Change what the model returns, given its arguments."""
    def patches(model: Any) -> list[Any]:
        forward = model.forward

        def other(**given: Any) -> tuple[Tensor, ...]:
            names = ("hidden_states", "audio_hidden_states")
            return tuple(change(given, x, name) for x, name in zip(forward(**given), names, strict=True))
        return [patch.object(model, "forward", other)]
    return patches


def add(name: str, case: str, tap: str, change: Change, dtype: str = "float32") -> None:
    mutant(name, case, tap, dtype)(change)


# ---------------------------------------------------------------- as a pipeline calls it
def with_residual(given: Given, x: Tensor, name: str) -> Tensor:
    return x + given[name] if x.shape == given[name].shape else x


def rows_by_latents(given: Given) -> Given:
    """Rows whose latents are equal are computed once, although their text differs."""
    same = all(torch.equal(given[name][:1].expand_as(given[name]), given[name])
               for name in ("hidden_states", "audio_hidden_states"))
    return {name: given[name][:1].expand_as(given[name]) for name in (
        "encoder_hidden_states", "audio_encoder_hidden_states")} if same else {}


def audio_level_of_tokens(given: Given) -> Given:
    """Where the video has a timestep for each token, and the audio has not, the audio takes the first token's."""
    timestep, audio = given["timestep"], given.get("audio_timestep")
    return {"audio_timestep": timestep[:, 0]} if audio is not None and audio.ndim < timestep.ndim else {}


for release in ("2.0", "2.3", "2.5"):
    add(f"residual-where-channels-fit-{release}", f"{release}/pipeline-t2v", "sample", outputs(with_residual))
    add(f"rows-cached-by-latents-{release}", f"{release}/pipeline-t2v",
        "caption_projection" if release == "2.0" else "transformer_blocks.0.attn2.context", arguments(rows_by_latents))
    add(f"audio-level-of-a-token-{release}", f"{release}/pipeline-i2v", "audio_time_embed.sinusoid",
        arguments(audio_level_of_tokens))


# ---------------------------------------------------------------- arguments that are absent
def default(**values: Callable[[Given], Any]) -> Change:
    return arguments(lambda given: {name: value(given) for name, value in values.items() if given.get(name) is None})


add("fps-default-25", "2.3/defaults", "video_coords", default(fps=lambda given: 25.0))
add("audio-timestep-default-sigma", "2.3/defaults", "audio_time_embed.sinusoid",
    default(audio_timestep=lambda given: given.get("sigma")))
add("audio-sigma-default-timestep", "2.3/defaults", "audio_prompt_adaln.sinusoid",
    default(audio_sigma=lambda given: given["timestep"]))
add("audio-mask-default-video's", "2.3/defaults", "transformer_blocks.0.audio_attn2.sdpa",
    default(audio_encoder_attention_mask=lambda given: given.get("encoder_attention_mask")))
add("video-mask-default-audio's", "2.5/batch-3", "transformer_blocks.0.attn2.sdpa",
    default(encoder_attention_mask=lambda given: given.get("audio_encoder_attention_mask")))
add("audio-mask-only-with-video's", "2.5/batch-3", "transformer_blocks.0.audio_attn2.sdpa", arguments(
    lambda given: {} if given.get("encoder_attention_mask") is not None else {"audio_encoder_attention_mask": None}))


# ---------------------------------------------------------------- other batches
def squeezed_mask(given: Given) -> Given:
    """The mask loses the dimension of a batch of one, and is then a bias that fits all rows."""
    mask = given.get("encoder_attention_mask")
    if mask is None or mask.squeeze().ndim != 1:
        return {}
    return {"encoder_attention_mask": mask.squeeze()[None, None].to(given["hidden_states"].dtype)}


def sigma_by_halves(given: Given) -> Given:
    """One sigma for each half of the batch, as if there were two rows."""
    sigma = given.get("sigma")
    return {} if sigma is None or len(sigma) < 2 else {
        "sigma": sigma[[0, -1]].repeat_interleave(-(-len(sigma) // 2), 0)[:len(sigma)]}


add("mask-of-one-row-squeezed", "2.3/defaults", "transformer_blocks.0.attn2.sdpa", arguments(squeezed_mask))
add("sigma-by-halves-of-the-batch", "2.5/batch-3", "prompt_adaln.sinusoid", arguments(sigma_by_halves))


# ---------------------------------------------------------------- noise levels, rates
def highest(timestep: Tensor) -> Tensor:
    return timestep.reshape(len(timestep), -1).amax(1)


add("sigma-from-highest-timestep", "2.3/other-sigma", "prompt_adaln.sinusoid", arguments(
    lambda given: {"sigma": highest(given["timestep"])}))
add("audio-sigma-from-highest-timestep", "2.3/other-sigma", "audio_prompt_adaln.sinusoid", arguments(
    lambda given: {"audio_sigma": highest(given["audio_timestep"] if given.get("audio_timestep") is not None
                                          else given["timestep"])} if given.get("audio_sigma") is not None else {}))
add("fps-rounded", "2.0/other-rates", "video_coords", arguments(
    lambda given: {"fps": round(given["fps"])} if "fps" in given else {}))
for name, tap, change in (
    ("hop-length-160", "audio_coords", attributes("audio_rope", hop_length=160)),
    ("sampling-rate-16000", "audio_coords", attributes("audio_rope", sampling_rate=16000)),
    ("audio-scale-4", "audio_coords", attributes("audio_rope", scale_factors=[4])),
    ("vae-scales-8-32-32", "video_coords", attributes("rope", scale_factors=(8, 32, 32))),
    ("theta-10000", "rope.cos", attributes("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope",
                                           theta=10000.0)),
):
    add(name, "2.0/other-rates", tap, change)


# ---------------------------------------------------------------- guidance
def perturbation(change: Callable[[Tensor], Tensor]) -> Change:
    return arguments(lambda given: {} if given.get("perturbation_mask") is None else {
        "perturbation_mask": change(given["perturbation_mask"])})


def without_gates(model: Any) -> list[Any]:
    attentions = [x for x in model.modules() if getattr(x, "to_gate_logits", None) is not None]
    return [] if model.config.perturbed_attn else [patch.object(x, "to_gate_logits", None) for x in attentions]


SHARES = ("2.3/stg-shares", "transformer_blocks.0.attn1.to_out")
add("perturbation-rounded", *SHARES, perturbation(torch.round))
add("perturbation-as-bool", *SHARES, perturbation(lambda x: (x != 0).to(x.dtype)))
for name, some in (("first", slice(0, 1)), ("last", slice(-1, None))):
    add(f"{name}-guidance-block-alone", "2.3/stg-shares",
        f"transformer_blocks.{0 if name == 'first' else 1}.attn1.to_out",
        arguments(lambda given, some=some: {
            "spatio_temporal_guidance_blocks": (given.get("spatio_temporal_guidance_blocks") or [])[some]}))
add("gates-with-guidance-alone", "2.3/gates-without-guidance", "transformer_blocks.0.attn1.to_gate_logits",
    without_gates)


# ---------------------------------------------------------------- masks
def text_bias(fill: Callable[[Tensor, torch.dtype], Tensor]) -> Change:
    """Masks (B, S) become a bias, or True to keep, (B, 1, S) by another rule."""
    names = ("encoder_attention_mask", "audio_encoder_attention_mask")
    return arguments(lambda given: {
        name: fill(given[name], given["hidden_states"].dtype)[:, None] for name in names
        if given.get(name) is not None and given[name].ndim == 2})


def self_mask(change: Callable[[Tensor], Tensor]) -> Change:
    return arguments(lambda given: {} if given.get("video_self_attention_mask") is None else {
        "video_self_attention_mask": change(given["video_self_attention_mask"].to(given["hidden_states"].dtype))})


EMPTY = ("2.0/empty-text-rows", "transformer_blocks.0.attn2.sdpa")
add("masked-text-lowest", *EMPTY, text_bias(lambda x, dtype: (1 - x.to(dtype)) * torch.finfo(dtype).min))
add("masked-text-not-attended", *EMPTY, text_bias(lambda x, dtype: x.bool()))
SOFT = ("2.3/soft-self-mask", "transformer_blocks.0.attn1.sdpa")
add("self-mask-at-one-half", *SOFT, self_mask(lambda x: (x > 0.5).to(x.dtype)), "bfloat16")
add("self-mask-rounded-down", *SOFT, self_mask(torch.floor), "bfloat16")


# ---------------------------------------------------------------- sizes
LARGE = "2.3/small-stream-large-outputs"
add("outputs-clamped-to-4", LARGE, "sample", outputs(lambda given, x, name: x.clamp(-4, 4)))
add("output-norm-epsilon-float32", LARGE, "norm_out", attributes(
    "norm_out", "audio_norm_out", eps=float(np.float32(1e-6))))

# Exact arithmetic sees these epsilons in each case. Natively bfloat16 hides them where streams are of unit size.
NORMS = ("norm1", "audio_norm1", "norm2", "audio_norm2", "audio_to_video_norm", "video_to_audio_norm", "norm3",
         "audio_norm3")


def without_epsilons(model: Any) -> list[Any]:
    norms = [getattr(block, name) for block in model.transformer_blocks for name in NORMS]
    norms += [x for name, x in model.named_modules() if name.endswith((".norm_q", ".norm_k"))]
    return [patch.object(x, "eps", 0.0) for x in norms]
=======
"""The thirty bugs of mutants.py, under the same names, in diffusers' model: it is changed at run time.

`inject(name, model)` gives a context manager; the model is itself again afterwards. Where mutants.py has a loader's
bugs, this one gives the model the weights that such a loader would make of its own. `SHOWN_IN` names for each bug a
conformance case in which it shows, and mutants.FIRST the taps at which it may first show.
"""
import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from diffusers.models.transformers import transformer_ltx2
from mutants import at_24_fps, norm_in_bfloat16
from torch import Tensor, nn

Block = transformer_ltx2.LTX2VideoTransformerBlock
Model = Any  # diffusers' LTX2VideoTransformer3DModel, which has no types
Patch = Any
MUTANTS: dict[str, Callable[[Model], list[Patch]]] = {}
SHOWN_IN: dict[str, str] = {}


def mutant(name: str, case: str) -> Callable[[Callable[[Model], list[Patch]]], None]:
    def register(make: Callable[[Model], list[Patch]]) -> None:
        MUTANTS[name], SHOWN_IN[name] = make, case

    return register


@contextmanager
def inject(name: str, model: Model) -> Iterator[None]:
    with ExitStack() as stack:
        for change in MUTANTS[name](model):
            stack.enter_context(change)
        yield


# ---------------------------------------------------------------- ways to change it
def arguments(model: Model, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Patch]:
    forward = model.forward
    return [patch.object(model, "forward", lambda **given: forward(**given | change(given)))]


def positions(rope: Any, change: Callable[[Tensor], Tensor]) -> Patch:
    """Change what a RoPE module makes its tables from, but not the coordinates that it is given."""
    forward = rope.forward
    return patch.object(rope, "forward", lambda coords, device=None: forward(change(coords), device=device))


def planes(rope: Any, change: Callable[[Tensor, int], Tensor]) -> Patch:
    """Change both tables of a RoPE module. `change` is given them as (B, T, planes), and the number of axes."""
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
    """Change the weights of all Linear layers in blocks, which are those that quantised files have in few bits."""
    return [patch.dict(layer._parameters, weight=nn.Parameter(change(layer.weight.detach()), requires_grad=False))
            for layer in model.transformer_blocks.modules() if isinstance(layer, nn.Linear)]


# ---------------------------------------------------------------- noise levels
@mutant("gate-multiplier-1", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return [patch.object(model, "_internal_dict", FrozenDict(
        {**model.config, "cross_attn_timestep_scale_multiplier": 1.0}))]


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

    return arguments(model, lambda given: {
        "sigma": last(given["timestep"]), "audio_sigma": last(given["audio_timestep"])})


@mutant("per-token-timestep-averaged", "2.3/i2v")
def _(model: Model) -> list[Patch]:
    def average(timestep: Tensor) -> Tensor:
        return timestep.reshape(len(timestep), -1).mean(1, keepdim=True)

    return arguments(model, lambda given: {
        "timestep": average(given["timestep"]), "audio_timestep": average(given["audio_timestep"])})


# ---------------------------------------------------------------- positions
@mutant("rope-float32-frequencies", "2.0/121-frames")
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
        return planes(rope, lambda table, axes: table[..., :table.shape[-1] // heads].repeat(1, 1, heads))

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
    """A mask of ones and zeros is added to the logits as it is, which is what one of three dimensions is there for."""
    def as_it_is(given: dict[str, Any]) -> dict[str, Any]:
        dtype, names = given["hidden_states"].dtype, ("encoder_attention_mask", "audio_encoder_attention_mask")
        return {name: given[name].to(dtype)[:, None] for name in names if given.get(name) is not None}

    return arguments(model, as_it_is)


@mutant("mask-ignored", "2.3/text-masks")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"encoder_attention_mask": None, "audio_encoder_attention_mask": None})


@mutant("stg-4d-mask", "2.3/stg-one-of-batch")
def _(model: Model) -> list[Patch]:
    """The result gets a second batch dimension, row i blended by the mask of row j; the port goes on with the first."""
    lerp = torch.lerp
    return [patch.object(transformer_ltx2, "torch", SimpleNamespace(**vars(torch) | {
        "lerp": lambda v, out, keep: lerp(v, out, keep.unsqueeze(1))[0]}))]


@mutant("stg-wrong-block", "2.3/stg")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {
        "spatio_temporal_guidance_blocks": [i - 1 for i in given.get("spatio_temporal_guidance_blocks") or ()]})


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
    return [patch.object(ff.net[0], "approximate", "none")
            for block in model.transformer_blocks for ff in (block.ff, block.audio_ff)]


@mutant("output-norm-bf16", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    def patched(norm: Any) -> Patch:
        def forward(x: Tensor) -> Tensor:
            with patch.object(torch, "layer_norm", norm_in_bfloat16):  # which F.layer_norm calls: a trace sees that
                return F.layer_norm(x, norm.normalized_shape, eps=norm.eps)

        return patch.object(norm, "forward", forward)

    return [patched(model.norm_out), patched(model.audio_norm_out)]


@mutant("qk-norm-per-head", "2.0/t2v")
def _(model: Model) -> list[Patch]:
    def per_head(norm: Any, heads: int) -> Patch:
        return patch.object(norm, "forward", lambda x: norm.weight * F.rms_norm(
            x.unflatten(-1, (heads, -1)), (x.shape[-1] // heads,), eps=norm.eps).flatten(-2))

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
    """The audio hears a video that has heard the audio: its stream is normalised once more before the second half."""
    again = ast.parse("norm_hidden_states = self.audio_to_video_norm.forward(hidden_states)").body

    def change(tree: ast.AST) -> None:
        second = next(x for x in ast.walk(tree) if isinstance(x, ast.If) and isinstance(x.test, ast.Name)
                      and x.test.id == "use_v2a_cross_attention")
        second.body = [*again, *second.body]

    return [patch.object(Block, "forward", edited(Block.forward, change))]


# ---------------------------------------------------------------- what a loader makes of a file
@mutant("fp8-scale-ignored", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    return weights(model, lambda x: x * (448 / x.float().abs().max()).to(x.dtype))


@mutant("prompt-adaln-unmapped", "2.3/t2v")
def _(model: Model) -> list[Patch]:
    """The parameters keep what they were drawn as."""
    drawn = torch.Generator().manual_seed(0)
    return [patch.dict(layer._parameters, {name: nn.Parameter(
        ((torch.rand(x.shape, generator=drawn) * 2 - 1) * layer.in_features ** -0.5).to(x), requires_grad=False)
        for name, x in layer.named_parameters()})
        for adaln in (model.prompt_adaln, model.audio_prompt_adaln)
        for layer in adaln.modules() if isinstance(layer, nn.Linear)]


@mutant("nvfp4-nibbles-swapped", "2.5/t2v")
def _(model: Model) -> list[Patch]:
    return weights(model, lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


@mutant("int8-not-unrotated", "2.5/t2v")
def _(model: Model) -> list[Patch]:
    """A file's rotation is of 256 columns, which these models do not have: this one is of 4."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    rotation = torch.kron(two, two) / 2
    return weights(model, lambda x: (x.unflatten(-1, (-1, 4)).float() @ rotation).flatten(-2).to(x.dtype))
>>>>>>> main
