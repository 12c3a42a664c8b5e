"""What has to hold for any weights and inputs: invariances, symmetries, independence, and gradients.

pytest tests/model/test_properties.py
"""

import re
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RELEASES, Inputs, random_inputs, random_model, tiny_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import ltx2ref.embeddings
import ltx2ref.model
from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig
from ltx2ref.block import Perturbation
from ltx2ref.rope import Rope, apply_rope, rotation

bounded = settings(max_examples=10, deadline=None, derandomize=True, database=None)
LAYOUTS = ["split", "interleaved"]
seeds, releases, layouts = st.integers(0, 999), st.sampled_from([*RELEASES]), st.sampled_from(LAYOUTS)
every_release = pytest.mark.parametrize("release", RELEASES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
pytestmark = pytest.mark.filterwarnings("ignore:.*no effect")  # releases before 2.5 have no keyframes

# Two float64 computations of the same numbers, in other shapes or another order, differ by some hundred roundings of
# 1e-16, a few of which are amplified. The bugs that the tests look for change the result by 1e-6 and more.
ROUNDING = 1e-12


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def floats(tree: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors of `tree` to `dtype`."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def run(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        video, audio = model(**inputs, return_dict=False)
    return video, audio


# ---------------------------------------------------------------- rotary position embedding
def random_rope(axes: int, seed: int, shift: float = 0.0) -> tuple[TransformerConfig, Tensor, Rope]:
    """Return random x (B, T, H, 2R) and its rotation by random positions, moved by a `shift` of the whole range."""
    config, generator = tiny_config("2.0"), torch.Generator().manual_seed(seed)
    stream = config.video if axes == 3 else config.audio
    x = torch.randn(2, 7, stream.num_heads, stream.head_dim, generator=generator, dtype=torch.float64)
    shares = torch.rand(2, axes, 7, generator=generator, dtype=torch.float64) + shift
    positions = shares * torch.tensor(stream.max_position)[:, None]
    return config, x, rotation(positions, stream, config, torch.float64)


@bounded
@given(axes=st.sampled_from([1, 3]), seed=seeds, shift=st.floats(0.1, 2.0), layout=layouts)
def test_products_of_rotated_vectors_depend_on_relative_positions_only(
    axes: int, seed: int, shift: float, layout: str
) -> None:
    config, x, here = random_rope(axes, seed)
    _, _, there = random_rope(axes, seed, shift)

    def products(q_rope: Rope, k_rope: Rope) -> Tensor:
        q, k = apply_rope(x, q_rope, layout), apply_rope(x.flip(1), k_rope, layout)
        return torch.einsum("b t h d, b s h d -> b h t s", q, k)

    # Each of four angles f * (2 p / max - 1) takes five roundings, relative to at most 5 f.
    phase_error = 4 * 5 * torch.finfo(torch.float64).eps * 5 * config.rope_theta * torch.pi / 2
    bound = phase_error * x.norm(dim=-1).amax() ** 2
    assert (products(there, there) - products(here, here)).abs().amax() <= bound
    assert distance(products(there, here), products(here, here)) > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_layout
def test_planes_left_over_from_the_axes_come_first_and_do_not_rotate(layout: str, dtype: torch.dtype) -> None:
    config, x, rope = random_rope(3, seed=0)
    x, left_over = x.to(dtype), config.video.dim // 2 % 3
    channels = "(two r)" if layout == "split" else "(r two)"
    before, after = (
        rearrange(y, f"b t h {channels} -> b t (h r) two", two=2) for y in (x, apply_rope(x, rope, layout))
    )
    assert left_over == 2
    assert torch.equal(after[:, :, :left_over], before[:, :, :left_over])
    assert (after != before)[:, :, left_over:].any(-1).all()


def interleave(x: Tensor, heads: int, dim: int = -1) -> Tensor:
    """Move channels from (head, half, plane) order, the split layout, to (head, plane, half) order."""
    order = rearrange(torch.arange(x.shape[dim]), "(h two r) -> (h r two)", h=heads, two=2)
    return x.index_select(dim, order)


@bounded
@given(axes=st.sampled_from([1, 3]), seed=seeds)
def test_the_two_layouts_rotate_alike_up_to_a_permutation_of_the_channels(axes: int, seed: int) -> None:
    _, x, rope = random_rope(axes, seed)
    split, interleaved = apply_rope(x, rope, "split"), apply_rope(interleave(x, 1), rope, "interleaved")
    bound = 6 * torch.finfo(torch.float64).eps * x.abs().amax()  # each element rounds two products and a sum
    assert (interleave(split, 1) - interleaved).abs().amax() <= bound


@every_release
def test_a_model_of_one_layout_is_one_of_the_other_with_permuted_queries_and_keys(release: str) -> None:
    split = random_model(tiny_config(release), torch.float64)
    interleaved = random_model(tiny_config(release, rope_type="interleaved"), torch.float64)
    heads = split.config.num_attention_heads
    interleaved.load_state_dict(
        {
            name: interleave(x, heads, 0) if re.search(r"to_[qk]\.|norm_[qk]\.", name) else x
            for name, x in split.state_dict().items()
        }
    )
    inputs = random_inputs(split.config, torch.float64)
    for a, b in zip(run(interleaved, inputs), run(split, inputs), strict=True):
        assert distance(a, b) <= ROUNDING


# ---------------------------------------------------------------- the two streams
@every_release
@pytest.mark.parametrize("stream", ["video", "audio"])
def test_both_directions_read_the_streams_before_the_exchange(release: str, stream: str) -> None:
    """In a single block, nothing that one stream receives comes back to the other."""
    model = random_model(tiny_config(release, num_layers=1))
    inputs = random_inputs(model.config)
    before = dict(zip(("video", "audio"), run(model, inputs), strict=True))
    attention, rows = ("audio_to_video", [0, 1]) if stream == "video" else ("video_to_audio", [2, 3])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if attention in name or re.search(f"av_cross_attn_{stream}_..._gate", name):
                parameter.mul_(1.5)
            elif "a2v_cross_attn_scale_shift_table" in name:
                parameter[rows] *= 1.5
                parameter[4] *= 1.5 if f"{stream}_a2v" in name else 1
    after = dict(zip(("video", "audio"), run(model, inputs), strict=True))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {stream}


def entries(model: LTX2VideoTransformer3DModel, inputs: Inputs) -> list[Any]:
    """Return the arguments of the first block."""
    seen: list[Any] = []
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args))
    run(model, inputs)
    handle.remove()
    return seen


def counterpart(name: str) -> str:
    """Return the parameter of a block that is to the other stream what `name` is to its own."""
    starts = {
        "audio_to_video": "video_to_audio",
        "video_to_audio": "audio_to_video",
        "video_a2v": "audio_a2v",
        "audio_a2v": "video_a2v",
        "audio_": "",
        "": "audio_",
    }
    start = next(start for start in starts if name.startswith(start))
    return starts[start] + name.removeprefix(start)


@pytest.mark.slow
@every_release
@every_layout
def test_streams_of_equal_size_are_the_same_function(release: str, layout: str) -> None:
    """If the weights of the streams are swapped, including the rows for each direction, the outputs are swapped."""
    sizes = {"attention_head_dim": 14, "audio_attention_head_dim": 14}
    sizes |= {"cross_attention_dim": 28, "audio_cross_attention_dim": 28}
    heads = {"num_attention_heads": 2, "audio_num_attention_heads": 2}
    config = tiny_config(release, rope_type=layout, ff_bias=True, **heads, **sizes)
    (block, *_), (mirror, *_) = (random_model(config, seed=seed).transformer_blocks for seed in (0, 1))
    directions = [2, 3, 0, 1, 4]
    state = {counterpart(name): x for name, x in block.state_dict().items()}
    mirror.load_state_dict({name: x[directions] if "a2v_cross" in name else x for name, x in state.items()})

    inputs = random_inputs(config, batch=3, per_token=True, text_masks=torch.int64, self_mask=True)
    vx, ax, vc, ac, *_ = entries(random_model(config), inputs)
    swapped = (c._replace(exchange_offsets=c.exchange_offsets[:, :, directions[:4]]) for c in (ac, vc))
    perturbation = Perturbation(keep=torch.tensor([0.0, 1.0, 0.25])[:, None, None], isolated=False)
    with torch.no_grad():
        video, audio = block(vx, ax, vc, ac, perturbation)
        mirrored_audio, mirrored_video = mirror(ax, vx, *swapped, perturbation)
    assert torch.equal(video, mirrored_video)
    assert torch.equal(audio, mirrored_audio)


# ---------------------------------------------------------------- independence
def text_masks(length: int) -> st.SearchStrategy[Tensor]:
    """Return masks (2, LENGTH) in which each row keeps something and masks something."""
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(lambda x: any(x) and not all(x))
    return st.tuples(row, row).map(torch.tensor)


@pytest.mark.slow
@bounded
@given(release=releases, masks=st.tuples(text_masks(6), text_masks(9)), seed=seeds)
def test_masked_text_tokens_have_no_influence(release: str, masks: tuple[Tensor, Tensor], seed: int) -> None:
    config = tiny_config(release)
    model, inputs = random_model(config), random_inputs(config, seed=seed, grid=(3, 1, 5))
    before = run(model, inputs)
    for prefix, mask in zip(("", "audio_"), masks, strict=True):
        inputs[prefix + "encoder_attention_mask"] = mask
    masked = run(model, inputs)
    for prefix, mask in zip(("", "audio_"), masks, strict=True):
        name = prefix + "encoder_hidden_states"
        inputs[name] = torch.where(mask[..., None], inputs[name], 5 - 3 * inputs[name])
    assert all(map(torch.equal, run(model, inputs), masked))
    assert not any(map(torch.equal, masked, before))


@every_release
def test_masking_a_token_is_leaving_it_out(release: str) -> None:
    config = tiny_config(release)
    model, inputs = random_model(config, torch.float64), random_inputs(config, torch.float64)
    masked, shorter = dict(inputs), dict(inputs)
    for prefix, keep in (("", [0, 1, 2, 3]), ("audio_", [2, 5, 6, 7, 8])):
        name = prefix + "encoder_hidden_states"
        mask = torch.zeros(inputs[name].shape[:2], dtype=torch.int64)
        mask[:, keep] = 1
        masked[prefix + "encoder_attention_mask"], shorter[name] = mask, inputs[name][:, keep]
    for a, b in zip(run(model, masked), run(model, shorter), strict=True):
        assert distance(a, b) <= ROUNDING


@pytest.mark.slow
@bounded
@given(release=releases, layout=layouts, seed=seeds)
def test_rows_of_a_batch_are_independent(release: str, layout: str, seed: int) -> None:
    config = tiny_config(release, rope_type=layout, perturbed_attn=True)
    model = random_model(config, torch.float64)
    inputs = random_inputs(
        config,
        torch.float64,
        seed,
        batch=3,
        grid=(3, 1, 5),
        per_token=True,
        text_masks=torch.bool,
        stg=True,
        coords=torch.float64,
        self_mask=True,
        keyframes=True,
        use_cross_timestep=True,
    )
    together = run(model, inputs)
    for i in range(3):
        row = tree_map(lambda x: x[i : i + 1] if isinstance(x, Tensor) else x, inputs)  # noqa: B023
        for a, b in zip(run(model, row), together, strict=True):
            assert distance(a, b[i : i + 1]) <= ROUNDING


@pytest.mark.slow
@bounded
@given(release=releases, seed=seeds)
def test_equal_timesteps_of_all_tokens_are_a_timestep_of_the_batch(release: str, seed: int) -> None:
    config = tiny_config(release)
    model, inputs = random_model(config, torch.float64), random_inputs(config, torch.float64, seed)
    per_batch, per_column, per_token = dict(inputs), dict(inputs), dict(inputs)
    for prefix in ("", "audio_"):
        name, tokens = prefix + "timestep", inputs[prefix + "hidden_states"].shape[1]
        per_column[name] = inputs[name][:, None]
        per_token[name] = inputs[name][:, None].expand(-1, tokens)
    truth = run(model, per_batch)
    assert all(map(torch.equal, run(model, per_column), truth))
    for a, b in zip(run(model, per_token), truth, strict=True):
        assert distance(a, b) <= ROUNDING


# ---------------------------------------------------------------- gates
GATES = {"self-attention": 2, "feed-forward": 5, "text attention": 8}  # rows


def close(model: LTX2VideoTransformer3DModel, left_open: str) -> None:
    """Set all gates to zero except one kind, in tables and offsets.

    2.0's text attention has no gate and loses its end.
    """
    rows = [row for gate, row in GATES.items() if gate != left_open and row < model.config.video.num_rows]
    silent = [] if left_open == "exchange" else [r"av_cross_attn_.*_gate\.linear\."]
    silent += [] if left_open == "text attention" or model.config.cross_attn_mod else [r"attn2\.to_out"]
    with torch.no_grad():
        for name, x in model.named_parameters():
            if re.search(r"blocks\.\d\.(audio_)?scale_shift_table", name):
                x[rows] = 0
            elif re.match(r"(audio_)?time_embed\.linear\.", name):
                x.unflatten(0, (model.config.video.num_rows, -1))[rows] = 0
            elif "a2v_cross_attn_scale_shift_table" in name and left_open != "exchange":
                x[4] = 0
            elif any(re.search(pattern, name) for pattern in silent):
                x.zero_()


@pytest.mark.slow
@every_release
@pytest.mark.parametrize("left_open", ["", "exchange", *GATES])
def test_a_block_is_the_identity_when_all_of_its_gates_are_closed(release: str, left_open: str) -> None:
    model = random_model(tiny_config(release))
    close(model, left_open)
    vx, ax, *rest = entries(model, random_inputs(model.config))
    with torch.no_grad():
        outputs = model.transformer_blocks[0](vx, ax, *rest)
    assert [torch.equal(x, y) for x, y in zip(outputs, (vx, ax), strict=True)] == [left_open == ""] * 2


# ---------------------------------------------------------------- side effects
@every_release
@every_layout
def test_nothing_that_a_module_was_given_or_returned_is_changed_later(release: str, layout: str) -> None:
    """A hook can keep such a tensor unchanged. Only tensors that no module has seen are changed in place."""
    model = random_model(tiny_config(release, rope_type=layout))
    seen = [(x, x._version) for x in model.parameters()]

    def look(*values: Any) -> None:
        seen.extend((x, x._version) for x in tree_leaves(values[1:]) if isinstance(x, Tensor))

    for module in model.modules():
        module.register_forward_pre_hook(look, with_kwargs=True)
        module.register_forward_hook(look, with_kwargs=True)
    run(model, random_inputs(model.config, per_token=True, self_mask=True, stg=True, keyframes=True))
    assert len(seen) > 500 and all(x._version == version for x, version in seen)


# ---------------------------------------------------------------- gradients
def gradients(model: nn.Module, outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a random linear function of the outputs, by the parameters on which they depend."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(outputs, parameters, weights, allow_unused=True)
    return {name: x for name, x in zip(names, found, strict=True) if x is not None}


EXCHANGE = r"audio_to_video_attn|video_to_audio_attn|a2v_cross_attn_scale_shift_table|av_cross_attn_"
# Options of the inputs, and the parameters that have no influence with them.
UNREACHED: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, r"keyframes_abs_pos_embedding"),
    "everything": ({"per_token": True, "self_mask": True, "stg": True, "keyframes": True}, r"^$"),
    "isolated": ({"keyframes": True, "isolate_modalities": True}, EXCHANGE),
    "perturbed": ({"keyframes": True, "spatio_temporal_guidance_blocks": [0, 1]}, r"attn1\.(to|norm)_[qk]\."),
}


@pytest.mark.slow
@every_release
@pytest.mark.parametrize("case", UNREACHED)
def test_each_number_of_each_parameter_moves_the_output(release: str, case: str) -> None:
    options, unreached = UNREACHED[case]
    config = tiny_config(release, perturbed_attn=True)
    model, inputs = random_model(config, torch.float64), random_inputs(config, torch.float64, **options)
    found = gradients(model, model(**inputs, return_dict=False))
    for name, x in model.named_parameters():
        gradient = found.get(name, torch.zeros_like(x))
        assert not gradient.any() if re.search(unreached, name) else gradient.all(), name


# From the output back to the attentions of the last exchange, gradients equal those of diffusers. What exchange and
# self-attention read is read by several modules, where gradients are summed in another order.
SAME_GRAPH = r"^(audio_)?(proj_out|scale_shift_table)|\.1\.((audio_)?ff|audio_to_video|video_to_audio)"
SUB_LAYER = r"transformer_blocks\.\d\.\w+|\w+"


@pytest.mark.slow
@pytest.mark.diffusers
@every_release
@every_layout
@pytest.mark.parametrize(
    "options",
    [{}, {"per_token": True, "text_masks": torch.bool, "coords": torch.float32, "keyframes": True, "stg": True}],
)
def test_gradients_are_as_good_as_those_of_diffusers(
    release: str, layout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ltx2ref.parity.oracles import diffusers as oracles

    config = tiny_config(release, rope_type=layout)
    model, inputs = random_model(config), random_inputs(config, **options)
    theirs = oracles.build_diffusers(config.to_diffusers(), model.state_dict(), torch.float32)
    record = gradients(theirs, oracles.run_diffusers(theirs.requires_grad_(True), inputs))

    # The truth is conditional on the float32 angles and sinusoids, whose error is the same for both.
    for module, function in ((ltx2ref.model, "rotation"), (ltx2ref.embeddings, "sinusoid")):
        monkeypatch.setattr(module, function, Tape(getattr(module, function)))
    ours = gradients(model, model(**inputs, return_dict=False))
    model, inputs = model.double(), floats(inputs, torch.float64)
    truth = gradients(model, model(**inputs, return_dict=False))

    assert ours.keys() == record.keys() == truth.keys()
    different = [name for name in ours if not torch.equal(ours[name], record[name])]
    assert [name for name in different if re.search(SAME_GRAPH, name)] == []
    # Each sub-layer has a budget. The gradient of a key's bias alone is little more than cancelled terms.
    layers = {name: found[0] for name in ours if (found := re.match(SUB_LAYER, name))}
    for layer in set(layers.values()):
        a, b, exact = (
            torch.cat([grads[name].double().flatten() for name in grads if layers[name] == layer])
            for grads in (ours, record, truth)
        )
        budget = 1.5 * (b - exact).norm() + 4 * 2**-23 * exact.norm()
        assert (a - exact).norm() <= budget, f"{layer}: {(a - exact).norm() / budget:.2f} of the budget"


class Tape:
    """A function that records its results. Once the model is in float64, it returns the recorded results, widened."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.results: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        if torch.float64 in args:
            return floats(self.results.pop(0), torch.float64)
        self.results.append(self.function(*args))
        return self.results[-1]
