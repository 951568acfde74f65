"""Positions of chapter 08: embeddings, rotations in both layouts, stretched frequencies."""

import copy
import itertools
import math
import subprocess
import sys

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from llmbook.positions import (
    LearnedEmbedding,
    RopeScaling,
    RotaryEmbedding,
    SinusoidalEmbedding,
    apply_rope,
    change_rope_layout,
    check_tensor,
    interleaved_to_half,
    rope_frequencies,
    scale_rope,
)

LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def llama_config(d_head: int = 64, base: float = 10_000.0, **rope) -> LlamaConfig:
    length = rope.pop("max_position_embeddings", 4096)
    return LlamaConfig(
        hidden_size=2 * d_head,
        num_attention_heads=2,
        head_dim=d_head,
        max_position_embeddings=length,
        rope_parameters={"rope_theta": base, "rope_type": "default"} | rope,
    )


def by_matrix(x, cos, sin, layout):
    """Each pair times its 2 by 2 rotation matrix, written out."""
    half = x.size(-1) // 2
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    if layout == "half":
        first, second = x[..., :half], x[..., half:]
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat(turned, -1) if layout == "half" else torch.stack(turned, -1).flatten(-2)


def near(ours, expected, bound=1e-5):
    """Apart by no more than a share of the largest number: rounding, whatever the processor."""
    largest = expected.abs().max().item()
    return (ours - expected).abs().max().item() <= bound * largest if largest else not ours.any()


# --- learned and sinusoidal embeddings ----------------------------------------------------------


def test_learned_rows_are_looked_up_and_padding_is_finite():
    table = LearnedEmbedding(5, 3)
    ids = torch.tensor([[0, 4, 2], [1, -1, -1]])
    vectors = table(ids)
    assert torch.equal(vectors[0], table.weight[[0, 4, 2]])
    assert torch.equal(vectors[1, 1], table.weight[0])
    vectors.sum().backward()
    assert table.weight.grad[3].abs().sum() == 0


@pytest.mark.parametrize("wrong", [5, -2, 100])
def test_learned_positions_outside_the_table_are_named(wrong):
    with pytest.raises(ValueError, match=f"position_ids.*4, got {wrong}"):
        LearnedEmbedding(5, 3)(torch.tensor([[0, wrong]]))


def test_learned_state_is_one_weight():
    assert list(LearnedEmbedding(5, 3).state_dict()) == ["weight"]
    assert LearnedEmbedding(1000, 100).weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_sinusoids_are_those_of_the_paper():
    d_model, positions = 6, torch.tensor([[0, 1, 7, 1000]])
    vectors = SinusoidalEmbedding(d_model)(positions)
    for place, position in enumerate(positions[0].tolist()):
        for i in range(d_model // 2):
            angle = position / 10_000 ** (2 * i / d_model)
            assert vectors[0, place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert vectors[0, place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-4)


@given(st.integers(0, 5000), st.integers(0, 500))
def test_a_shift_of_sinusoids_is_a_rotation_of_pairs(position, shift):
    waves = SinusoidalEmbedding(8)
    here, there = waves(torch.tensor([[position, position + shift]]))[0]
    angle = shift * rope_frequencies(8)
    sin, cos = here.view(-1, 2).T
    expected = torch.stack(
        (sin * angle.cos() + cos * angle.sin(), cos * angle.cos() - sin * angle.sin()), dim=-1
    )
    assert torch.allclose(there, expected.flatten(), atol=2e-3)


# --- frequencies and angles ---------------------------------------------------------------------


@pytest.mark.parametrize("d_head", [2, 8, 64, 128])
@pytest.mark.parametrize("base", [100, 10_000.0, 500_000.0])
def test_frequencies_are_those_of_transformers(d_head, base):
    theirs = LlamaRotaryEmbedding(llama_config(d_head, base)).inv_freq
    assert torch.equal(rope_frequencies(d_head, base), theirs)


def test_angles_are_equal_to_those_of_transformers():
    positions = torch.tensor([[0, 1, 2, 5000], [7, 7, 0, 3]])
    cos, sin = RotaryEmbedding(16)(positions)
    for ours, theirs in zip(
        (cos, sin), LlamaRotaryEmbedding(llama_config(16))(torch.zeros(1), positions), strict=True
    ):
        assert near(torch.cat((ours, ours), dim=-1), theirs)


@pytest.mark.parametrize("module", [RotaryEmbedding(8), SinusoidalEmbedding(8)])
def test_angles_stay_in_float32(module):
    positions = torch.tensor([[0, 1, 100_003]])
    before = module(positions)
    module = copy.deepcopy(module)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module.to(dtype)
        for one, other in zip(before, module(positions), strict=True):
            assert other.dtype == torch.float32
            assert torch.equal(one, other)
    assert not module.state_dict()
    assert not list(module.parameters())


def test_angles_survive_a_model_laid_out_on_meta():
    with torch.device("meta"):
        module = RotaryEmbedding(8, scaling=RopeScaling("yarn", 4, 64))
    module.to_empty(device="cpu")
    positions = torch.tensor([[0, 1, 9]])
    expected = RotaryEmbedding(8, scaling=RopeScaling("yarn", 4, 64))(positions)
    assert torch.equal(module(positions)[0], expected[0])
    module.to("meta")
    assert module(positions.to("meta"))[0].is_meta


def test_padding_counts_as_position_0():
    cos, sin = RotaryEmbedding(8)(torch.tensor([[-1, 0]]))
    assert torch.equal(cos[0, 0], cos[0, 1])
    assert torch.equal(sin[0, 0], torch.zeros(4))
    waves = SinusoidalEmbedding(8)(torch.tensor([[-1, 0, 1]]))[0]
    assert torch.equal(waves[0], waves[1])
    assert not torch.equal(waves[1], waves[2])


def test_what_print_shows():
    assert repr(LearnedEmbedding(5, 3)) == "LearnedEmbedding(context_length=5, d_model=3)"
    shown = repr(RotaryEmbedding(8, 100, RopeScaling("linear", 2)))
    assert "d_head=8, base=100, scaling=RopeScaling(kind='linear', factor=2" in shown


# --- rotations ----------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("rows", [(), (1,), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_equals_the_matrices(layout, rows, dtype):
    x = torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True)
    angles = 100 * torch.rand(*rows, 5, 4)
    cos, sin = angles.cos(), angles.sin()
    ours, expected = apply_rope(x, cos, sin, layout), by_matrix(x, cos, sin, layout)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert ours.dtype == dtype
    assert near(ours, expected, tolerance)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, expected)]
    assert near(*gradients, tolerance)


@LAYOUTS
def test_without_a_batch(layout):
    x, (cos, sin) = torch.randn(3, 5, 8), RotaryEmbedding(8)(torch.arange(5))
    assert torch.equal(apply_rope(x, cos, sin, layout), apply_rope(x[None], cos, sin, layout)[0])


def rounded_once(ours, exact):
    """At most half a unit of the last place away, and what float32 is off where terms cancel."""
    half_unit = torch.finfo(ours.dtype).eps / 2
    return ((ours.double() - exact).abs() <= 1.01 * half_unit * exact.abs() + 1e-5).all()


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rotated_in_float32_and_rounded_once(layout, dtype):
    x, (cos, sin) = torch.randn(2, 3, 5, 8).to(dtype), RotaryEmbedding(8)(torch.arange(5))
    ours = apply_rope(x, cos, sin, layout)
    assert ours.dtype == dtype
    assert rounded_once(ours, by_matrix(x.double(), cos.double(), sin.double(), layout))
    x.requires_grad_()
    apply_rope(x, cos, sin, layout).sum().backward()
    assert x.grad.dtype == dtype


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_may_be_rounded_once_taken(layout, dtype):
    x = torch.randn(2, 3, 5, 8).to(dtype).requires_grad_()
    cos, sin = (z.to(dtype) for z in RotaryEmbedding(8)(torch.arange(5)))
    ours = apply_rope(x, cos, sin, layout)
    assert rounded_once(ours, by_matrix(x.double(), cos.double(), sin.double(), layout))
    ours.sum().backward()
    assert x.grad.dtype == dtype


@LAYOUTS
def test_float32_angles_turn_float64(layout):
    x, (cos, sin) = torch.randn(3, 5, 8).double(), RotaryEmbedding(8)(torch.arange(5))
    ours = apply_rope(x, cos, sin, layout)
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, by_matrix(x, cos.double(), sin.double(), layout), atol=1e-14)


@LAYOUTS
def test_the_gradient_keeps_a_factor_of_the_angles(layout):
    x, weights = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(3, 5, 8)
    angles = RotaryEmbedding(8, scaling=RopeScaling("yarn", 8, 64))(torch.arange(5))
    gradients = [
        torch.autograd.grad((rotate(x, *angles, layout) * weights).sum(), x)[0]
        for rotate in (apply_rope, by_matrix)
    ]
    assert near(*gradients)


@LAYOUTS
def test_memory_of_any_layout_will_do(layout):
    cos, sin = RotaryEmbedding(8)(torch.arange(5))
    for x in (
        torch.randn(2, 5, 3, 8).transpose(1, 2),  # as attention has it
        torch.randn(2, 3, 8, 5).mT,
        torch.randn(2, 3, 5, 9)[..., 1:],
        torch.randn(1).expand(2, 3, 5, 8),
    ):
        before = x.clone()
        ours = apply_rope(x, cos, sin, layout)
        assert near(ours, by_matrix(x, cos, sin, layout))
        assert torch.equal(x, before), "the input is not changed"


@LAYOUTS
def test_first_and_second_derivatives(layout):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(3, 2, dtype=torch.float64)

    def rotate(x):
        return apply_rope(x, angles.cos(), angles.sin(), layout)

    assert torch.autograd.gradcheck(rotate, (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotate(x).square(), (x,))


@LAYOUTS
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(layout):
    x, (cos, sin) = torch.randn(4, 2, 3, 8), RotaryEmbedding(8)(torch.arange(3))
    mapped = torch.vmap(lambda x: apply_rope(x, cos, sin, layout))(x)
    assert near(mapped, apply_rope(x, cos, sin, layout))


@LAYOUTS
def test_autocast_does_not_round_the_rotation(layout):
    x, (cos, sin) = torch.randn(2, 3, 5, 8), RotaryEmbedding(8)(torch.arange(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = apply_rope(x, cos, sin, layout)
        angles = RotaryEmbedding(8)(torch.arange(5))
    assert torch.equal(inside, apply_rope(x, cos, sin, layout))
    assert torch.equal(angles[0], cos)


COMPILED = """
import torch
from llmbook.positions import RopeScaling, RotaryEmbedding, apply_rope

rope = RotaryEmbedding(8, scaling=RopeScaling("yarn", 4.0, 64))
rotate = lambda x, positions: apply_rope(x, *rope(positions))
x, positions = torch.randn(2, 3, 5, 8, requires_grad=True), torch.arange(5)[None]
compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
ours, expected = compiled(x, positions), rotate(x, positions)
assert torch.allclose(ours, expected, atol=1e-4)
gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected)]
assert torch.allclose(*gradients, atol=1e-3)
"""


def test_the_graph_is_whole():
    """What torch.compile needs; without the hook that checks shapes, as for a reader."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]


@settings(max_examples=50)
@given(
    st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000), st.sampled_from([2, 8, 64])
)
def test_scores_depend_on_the_difference_only(m, n, shift, d_head):
    q, k = torch.randn(2, 1, 1, d_head, dtype=torch.float64)
    rope = RotaryEmbedding(d_head)
    for layout in ("half", "interleaved"):
        scores = []
        for by in (0, shift):
            turned = [
                apply_rope(x[None], *rope(torch.tensor([[position + by]])), layout)
                for x, position in ((q, m), (k, n))
            ]
            scores.append((turned[0] * turned[1]).sum())
        assert torch.allclose(*scores, atol=2e-3 * d_head**0.5)


@given(st.sampled_from([2, 4, 6, 64]))
def test_layouts_agree_through_the_permutation(d_head):
    order = interleaved_to_half(d_head)
    x, (cos, sin) = torch.randn(2, 3, 5, d_head), RotaryEmbedding(d_head)(torch.arange(5))
    interleaved = apply_rope(x, cos, sin, "interleaved")
    half = apply_rope(x[..., order], cos, sin, "half")
    assert near(interleaved[..., order], half)
    assert near(half[..., order.argsort()], interleaved)


@LAYOUTS
def test_rotations_keep_lengths(layout):
    x, (cos, sin) = torch.randn(2, 3, 5, 8), RotaryEmbedding(8)(torch.arange(5))
    assert near(apply_rope(x, cos, sin, layout).norm(dim=-1), x.norm(dim=-1))


# --- against transformers -----------------------------------------------------------------------


def test_half_is_the_rotation_of_llama():
    q, k = torch.randn(2, 2, 3, 7, 16)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [9, 10, 11, 12, 13, 14, 15]])
    results = []
    for rotate in ("ours", "theirs"):
        a, b = (x.clone().requires_grad_() for x in (q, k))
        if rotate == "ours":
            rope = RotaryEmbedding(16)(positions)
            turned = apply_rope(a, *rope), apply_rope(b, *rope)
        else:
            rope = LlamaRotaryEmbedding(llama_config(16))(q, positions)
            turned = apply_rotary_pos_emb(a, b, *rope)
        (turned[0] @ turned[1].mT).square().sum().backward()
        results.append((*turned, a.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        assert near(ours, theirs, 1e-4)


def test_interleaved_is_the_rotation_of_gptj():
    x, (cos, sin) = torch.randn(2, 7, 3, 16), RotaryEmbedding(16)(torch.arange(7)[None])
    ours = apply_rope(x.transpose(1, 2), cos, sin, layout="interleaved").transpose(1, 2)
    assert near(ours, gptj_rotary(x, sin, cos))


def test_a_part_of_each_head_as_gpt_neox_and_gptj_rotate_it():
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary

    x, (cos, sin) = torch.randn(2, 3, 7, 16), RotaryEmbedding(4)(torch.arange(7)[None])
    ours = apply_rope(x, cos, sin, d_rope=4)
    theirs = neox_rotary(x, x, *(torch.cat((z, z), dim=-1) for z in (cos, sin)))[0]
    assert near(ours, theirs)
    ours = apply_rope(x, cos, sin, "interleaved", d_rope=4)
    turned = gptj_rotary(x[..., :4].transpose(1, 2), sin, cos).transpose(1, 2)
    assert near(ours, torch.cat((turned, x[..., 4:]), dim=-1))
    assert torch.equal(ours[..., 4:], x[..., 4:]), "the rest stays as it was"


@LAYOUTS
def test_a_part_of_a_head_has_the_gradient_of_its_parts(layout):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = RotaryEmbedding(2)(torch.arange(4))
    angles = cos.double(), sin.double()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, *angles, layout, d_rope=2), (x,))
    whole = RotaryEmbedding(6)(torch.arange(4))
    assert torch.equal(apply_rope(x, *whole, layout, d_rope=6), apply_rope(x, *whole, layout))


@pytest.mark.parametrize("n_heads", [1, 3])
@pytest.mark.parametrize("columns", [(), (5,)])
def test_rows_change_their_layout_as_the_scripts_of_transformers_do(n_heads, columns):
    rows = torch.randn(n_heads * 8, *columns)
    theirs = rows.view(n_heads, 4, 2, *columns).transpose(1, 2).reshape(rows.shape)
    assert torch.equal(change_rope_layout(rows, n_heads, "half"), theirs)
    assert torch.equal(change_rope_layout(theirs, n_heads, "interleaved"), rows)
    part = change_rope_layout(rows, n_heads, "half", d_rope=4).view(n_heads, 8, *columns)
    assert torch.equal(part, rows.view(n_heads, 8, *columns)[:, [0, 2, 1, 3, 4, 5, 6, 7]])


def test_changed_rows_make_the_same_scores():
    x, (cos, sin) = torch.randn(5, 12), RotaryEmbedding(8)(torch.arange(5))
    weights, scores = torch.randn(2, 16, 12), []
    for layout in ("interleaved", "half"):
        q, k = (
            apply_rope((x @ w.T).view(5, 2, 8).transpose(0, 1), cos, sin, layout) for w in weights
        )
        scores.append(q @ k.mT)
        weights = torch.stack([change_rope_layout(w, 2, "half") for w in weights])
    assert near(*scores)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(("d_head", "base"), [(64, 10_000.0), (4, 100.0)])
def test_dynamic_scaling_is_that_of_transformers_at_every_length(d_head, base, factor):
    rope = {"rope_type": "dynamic", "factor": factor, "max_position_embeddings": 512}
    config = llama_config(d_head, base, **rope)
    scaling = RopeScaling("dynamic", factor, 512)
    plain = rope_frequencies(d_head, base)
    for length in (1, 100, 512, 513, 700, 2048):
        theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=length)
        ours, attention = scale_rope(plain, scaling, base, length=length)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=0) and attention == 1
        positions = torch.arange(length)[None]
        their_cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
        cos, _ = RotaryEmbedding(d_head, base, scaling)(positions)
        assert near(cos, their_cos[..., : d_head // 2], 2e-3), "angles of 2,048 radians in float32"
    assert torch.equal(scale_rope(plain, scaling, base)[0], plain), "by default the original"


def test_dynamic_scaling_follows_the_longest_row_and_nothing_before_it():
    rope, plain = RotaryEmbedding(8, scaling=RopeScaling("dynamic", 1.0, 64)), RotaryEmbedding(8)
    short, long = torch.arange(60)[None], torch.arange(100, 160)[None]
    long_alone = rope(long)[0]
    assert torch.equal(rope(short)[0], plain(short)[0]), "a long text before it does not matter"
    both = rope(torch.cat((short, long)))[0]
    assert torch.equal(both[1:], long_alone) and not torch.equal(both[:1], plain(short)[0])
    padded = torch.full((1, 3), -1)
    assert torch.equal(rope(padded)[0], torch.ones(1, 3, 4))
    assert rope(torch.zeros(1, 0, dtype=torch.long))[0].shape == (1, 0, 4)


def test_defaults_are_those_of_the_papers_and_of_transformers():
    assert RopeScaling("yarn", 4.0, 64) == RopeScaling(
        "yarn",
        4.0,
        64,
        1.0,
        4.0,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=None,
        truncate=True,
    )
    assert torch.equal(rope_frequencies(8), rope_frequencies(8, 10_000.0))
    positions = torch.arange(300)[None]
    assert torch.equal(RotaryEmbedding(8)(positions)[0], RotaryEmbedding(8, 10_000.0)(positions)[0])
    waves = SinusoidalEmbedding(8)(positions), SinusoidalEmbedding(8, 10_000.0)(positions)
    assert torch.equal(*waves)
    frequencies, scaling = rope_frequencies(8), RopeScaling("yarn", 4.0, 64)
    assert torch.equal(
        scale_rope(frequencies, scaling)[0], scale_rope(frequencies, scaling, 10_000.0)[0]
    )
    x, angles = torch.randn(1, 5, 8), RotaryEmbedding(8)(torch.arange(5))
    assert torch.equal(apply_rope(x, *angles), apply_rope(x, *angles, "half"))
    # With the fields left out, transformers takes defaults of its own.
    for kind in ("yarn", "llama3"):
        rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 1024}
        if kind == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of Meta's files
        config = llama_config(64, max_position_embeddings=4096, **rope)
        theirs, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        ours, _ = scale_rope(rope_frequencies(64), RopeScaling(kind, 4.0, 1024))
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=0)


SCALINGS = [
    RopeScaling("linear", 4.0),
    RopeScaling("yarn", 4.0, 1024),
    RopeScaling("yarn", 40, 4096, beta_fast=16, beta_slow=2),
    RopeScaling("yarn", 8.0, 2048, attention_factor=1.5),
    RopeScaling("yarn", 8.0, 2048, truncate=False),
    RopeScaling("yarn", 2.0, 30),
    RopeScaling("llama3", 8.0, 8192),
    RopeScaling("llama3", 32, 128, low_freq_factor=0.5, high_freq_factor=8),
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("d_head", "base"), [(64, 10_000.0), (128, 500_000.0), (2, 10_000.0), (8, 100.0)]
)
def test_scaled_frequencies_are_those_of_transformers(scaling, d_head, base):
    names = {
        "linear": (),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
        "llama3": ("low_freq_factor", "high_freq_factor"),
    }[scaling.kind]
    rope = {name: getattr(scaling, name) for name in names}
    rope |= {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.original_context_length:
        rope["original_max_position_embeddings"] = scaling.original_context_length
        rope["max_position_embeddings"] = int(scaling.original_context_length * scaling.factor)
    config = llama_config(d_head, base, **rope)
    theirs, their_factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    ours, our_factor = scale_rope(rope_frequencies(d_head, base), scaling, base)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0)
    assert our_factor == pytest.approx(their_factor)
    positions = torch.arange(50)[None]
    cos, sin = RotaryEmbedding(d_head, base, scaling)(positions)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    assert torch.allclose(cos, their_cos[..., : d_head // 2], atol=1e-4)
    assert torch.allclose(sin, their_sin[..., : d_head // 2], atol=1e-4)


@pytest.mark.parametrize(("d_head", "base"), [(64, 10_000.0), (128, 500_000.0), (4, 100.0)])
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_ntk_is_the_dynamic_kind_of_transformers_at_a_matching_length(d_head, base, factor):
    rope = {"rope_type": "dynamic", "factor": 1.0, "max_position_embeddings": 512}
    config = llama_config(d_head, base, **rope)
    length = int(512 * factor)
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=length)
    ours, _ = scale_rope(rope_frequencies(d_head, base), RopeScaling("ntk", factor), base)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0)
    new_base = base * factor ** (d_head / (d_head - 2))
    assert torch.allclose(ours, rope_frequencies(d_head, new_base), rtol=2e-6, atol=0)


@given(
    kind=st.sampled_from(["linear", "ntk", "dynamic", "yarn", "llama3"]),
    factor=st.floats(1, 64),
    length=st.integers(16, 32_768),
    d_head=st.sampled_from([4, 64, 128]),
)
def test_scaling_never_leaves_the_band(kind, factor, length, d_head):
    before = rope_frequencies(d_head)
    after, attention = scale_rope(before, RopeScaling(kind, factor, length))
    assert (after <= before * (1 + 1e-6)).all()
    assert (after >= before / factor * (1 - 1e-5)).all()
    assert (after[1:] < after[:-1]).all(), "the order of the pairs is kept"
    assert attention >= 1
    if factor == 1:
        assert torch.allclose(after, before)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rope_frequencies(7), "d_head: expected an even number, got 7"),
        (lambda: rope_frequencies(0), "d_head: expected at least 2, got 0"),
        (lambda: rope_frequencies(8, base=1.0), "base: expected a number above 1, got 1.0"),
        (lambda: rope_frequencies(8, base=math.nan), "base: .* got nan"),
        (lambda: interleaved_to_half(5), "d_head: expected an even number, got 5"),
        (lambda: LearnedEmbedding(0, 4), "context_length: expected at least 1, got 0"),
        (lambda: SinusoidalEmbedding(3), "d_model: expected an even number, got 3"),
        (lambda: SinusoidalEmbedding(8, base=0), "base: expected a number above 1, got 0"),
        (lambda: rope_frequencies(8.0), "d_head: expected a whole number, got 8.0"),
        (lambda: RotaryEmbedding(6, base=math.inf), "base: expected a number above 1, got inf"),
        (lambda: LearnedEmbedding(4, 0), "d_model: expected at least 1, got 0"),
        (lambda: RopeScaling("ntk", math.nan), "factor: expected a number from 1 on, got nan"),
        (lambda: RopeScaling("cubic", 2), "kind: expected one of .* got 'cubic'"),
        (lambda: RopeScaling("linear", 0.5), "factor: expected a number from 1 on, got 0.5"),
        (lambda: RopeScaling("yarn", 2), "original_context_length: 'yarn' needs it, got None"),
        (lambda: RopeScaling("llama3", 2, 0), "original_context_length: expected at least 1"),
        (lambda: RopeScaling("yarn", 2, 64, beta_fast=1, beta_slow=2), "beta_slow: expected 0 <"),
        (
            lambda: RopeScaling("llama3", 2, 64, low_freq_factor=4, high_freq_factor=4),
            "low_freq_factor: expected 0 <",
        ),
        (lambda: RopeScaling("yarn", 2, 64, attention_factor=0), "attention_factor: expected"),
        (lambda: RopeScaling("dynamic", 2.0), "original_context_length: 'dynamic' needs it, got"),
        (lambda: RopeScaling("ntk", "2"), "factor: expected a number from 1 on, got '2'"),
        (lambda: RopeScaling("yarn", 2, 64, truncate=1), "truncate: expected True or False, got 1"),
        (lambda: RopeScaling("yarn", 2, 64, beta_slow="1"), "beta_slow: expected 0 <"),
        (lambda: RopeScaling("yarn", 2, 64.0), "original_context_length: expected a whole number"),
        (lambda: rope_frequencies(8, base="10000"), "base: expected a number above 1, got '10000'"),
        (lambda: RotaryEmbedding(8, scaling="yarn"), "scaling: expected a RopeScaling, got 'yarn'"),
        (
            lambda: scale_rope(torch.ones(2, 2), RopeScaling("linear", 2)),
            r"frequencies: expected floats of shape \(half\), got shape \(2, 2\)",
        ),
        (
            lambda: scale_rope(torch.ones(2), RopeScaling("linear", 2), length=0),
            "length: expected at least 1, got 0",
        ),
        (
            lambda: RotaryEmbedding(2, scaling=RopeScaling("ntk", 2)),
            "'ntk' needs at least 2 pairs, got 1",
        ),
        (
            lambda: scale_rope(rope_frequencies(8, 5e5), RopeScaling("yarn", 2, 64)),
            "base: expected the one that the frequencies have, got 10000.0",
        ),
        (
            lambda: scale_rope(rope_frequencies(8), RopeScaling("linear", 2), base=0),
            "base: expected a number above 1, got 0",
        ),
        (
            lambda: apply_rope(torch.zeros(1, 2, 3, 8), torch.zeros(3, 8), torch.zeros(3, 8)),
            r"cos: expected floats of shape \(..., 3, 4\), got shape \(3, 8\)",
        ),
        (
            lambda: apply_rope(torch.zeros(1, 3, 8), *torch.zeros(2, 3, 4), layout="meta"),
            "layout: expected one of half, interleaved, got 'meta'",
        ),
    ],
)
def test_bad_input_is_named(untyped, make, message):
    with pytest.raises(ValueError, match=message):
        make()


@LAYOUTS
@pytest.mark.parametrize("rows", [4, 1])
def test_x_without_heads_is_refused(untyped, layout, rows):
    """The angles of a batch would spread over what are taken for heads: a silent wrong shape."""
    cos, sin = RotaryEmbedding(64)(torch.arange(12).expand(rows, 12))
    message = rf"cos: expected at most the batch dimensions of x, \(\), .* got \({rows},\)"
    with pytest.raises(ValueError, match=message):
        apply_rope(torch.randn(4, 12, 64), cos, sin, layout)
    assert apply_rope(torch.randn(4, 12, 64), cos[0], sin[0], layout).shape == (4, 12, 64)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((12, 64), (12, 32), (12, 32)), r"x: .* \(..., heads, sequence, d_head\), got .*12, 64"),
        (((2, 3, 12, 64), (3, 12, 32), (3, 12, 32)), r"cos: expected at most .* got \(3,\)"),
        (((2, 3, 12, 64), (11, 32), (11, 32)), r"cos: .* \(..., 12, 32\), got shape \(11, 32\)"),
        (((2, 3, 12, 64), (12, 32), (1, 32)), r"sin: .* \(..., 12, 32\), got shape \(1, 32\)"),
        (((2, 3, 12, 64), (12, 32), (32,)), r"sin: .* \(..., 12, 32\), got shape \(32,\)"),
        (((2, 3, 12, 64), (1, 2, 12, 32), (12, 32)), r"cos: expected at most .* got \(1, 2\)"),
    ],
)
def test_angles_that_do_not_fit(untyped, shapes, message):
    with pytest.raises(ValueError, match=message):
        apply_rope(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: apply_rope([1.0], *torch.ones(2, 3, 4)),
            r"x: expected a tensor of floats, got \[",
        ),
        (lambda: apply_rope(torch.ones(1, 3, 8).long(), *torch.ones(2, 3, 4)), "x: .* torch.int64"),
        (lambda: apply_rope(torch.ones(1, 3, 8), None, None), "cos: expected a tensor of floats"),
        (lambda: RotaryEmbedding(8)(torch.ones(3)), "position_ids: .*whole numbers.*float32"),
        (lambda: RotaryEmbedding(8)(torch.ones(3).int()), "whole numbers of 64 bits, .*int32"),
        (lambda: RotaryEmbedding(8)(3), "position_ids: expected a tensor of whole numbers, got 3"),
        (
            lambda: RotaryEmbedding(8)(torch.tensor(3)),
            r"position_ids: .*sequence\), got shape \(\)",
        ),
        (lambda: SinusoidalEmbedding(8)([1, 2]), "position_ids: expected a tensor of whole"),
        (lambda: LearnedEmbedding(4, 8)(torch.ones(3).bool()), "position_ids: .*torch.bool"),
        (
            lambda: change_rope_layout(torch.ones(9, 2), 2, "half"),
            "rows: .* multiple of n_heads, 2",
        ),
        (lambda: change_rope_layout(torch.ones(8), 2, "meta"), "to: expected one of half, inter"),
        (lambda: change_rope_layout(torch.ones(8), 0, "half"), "n_heads: expected at least 1, got"),
        (lambda: change_rope_layout(torch.ones(()), 1, "half"), "rows: expected a multiple"),
        (lambda: change_rope_layout([1.0], 1, "half"), "rows: expected a tensor of floats"),
        (
            lambda: change_rope_layout(torch.ones(8), 2, "half", d_rope=6),
            "d_rope: expected at most the size of a head, 4, got 6",
        ),
        (
            lambda: apply_rope(torch.ones(1, 3, 8), *torch.ones(2, 3, 2), d_rope=3),
            "d_rope: expected an even number, got 3",
        ),
        (
            lambda: apply_rope(torch.ones(1, 3, 8), *torch.ones(2, 3, 4), d_rope=10),
            "d_rope: expected at most the size of a head, 8, got 10",
        ),
        (lambda: check_tensor("m", torch.ones(2), "n", kind="booleans"), "m: expected booleans"),
        (lambda: check_tensor("m", torch.ones(2, 3), 3), r"m: .*\(3\), got shape \(2, 3\)"),
    ],
)
def test_what_is_no_such_tensor_is_named(untyped, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tensors_that_fit_pass():
    check_tensor("x", torch.ones(2, 3), "...", 2, 3)
    check_tensor("x", torch.ones(5, 2, 3).half(), "...", "any", 3)
    check_tensor("x", torch.ones(()), "...")
    check_tensor("x", torch.ones(2, 3).long(), "rows", 3, kind="whole numbers")


SETTINGS = {
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "attention_factor": 1.5,
    "truncate": False,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn", "llama3"])
def test_a_setting_that_a_kind_does_not_read_is_refused(untyped, kind, name):
    read = {"llama3": ["low_freq_factor", "high_freq_factor"], "yarn": list(SETTINGS)[:4]}
    given = {name: SETTINGS[name]}
    if name in read.get(kind, []):
        assert getattr(RopeScaling(kind, 2.0, 64, **given), name) == SETTINGS[name]
        return
    with pytest.raises(ValueError, match=f"{name}: '{kind}' has no use for it, got {given[name]}"):
        RopeScaling(kind, 2.0, 64, **given)


def test_scalings_are_values():
    one, other = RopeScaling("linear", 2.0), RopeScaling("linear", 2.0)
    assert one == other
    assert len({one, other}) == 1
    with pytest.raises(AttributeError):
        one.factor = 3.0


# --- positions of packed rows and of cached decoding --------------------------------------------


def test_packed_documents_are_as_if_alone():
    from llmbook.batches import document_fields, document_mask

    ids = torch.tensor([[0, 5, 6, 0, 7, 8, 9, 0, 3]])
    positions, documents = document_fields(ids, end_of_text=0)
    rope, q, k = RotaryEmbedding(16), *torch.randn(2, 1, 2, 9, 16)
    scores = apply_rope(q, *rope(positions)) @ apply_rope(k, *rope(positions)).mT
    for start, stop in itertools.pairwise([0, 3, 7, 9]):
        here = slice(start, stop)
        alone = rope(torch.arange(stop - start)[None])
        q_alone, k_alone = (apply_rope(x[:, :, here], *alone) for x in (q, k))
        assert near(scores[:, :, here, here], q_alone @ k_alone.mT)
    assert document_mask(documents)[0, 0, 4].tolist() == [False] * 3 + [True] * 2 + [False] * 4


@LAYOUTS
def test_a_new_token_with_kept_keys_scores_as_in_one_go(layout):
    rope, q, k = RotaryEmbedding(16), *torch.randn(2, 2, 3, 9, 16)
    starts = torch.tensor([[0], [40]])  # two rows that do not stand at the same place
    positions = starts + torch.arange(9)
    angles = rope(positions)
    whole = apply_rope(q, *angles, layout) @ apply_rope(k, *angles, layout).mT
    kept = apply_rope(k[:, :, :8], *rope(positions[:, :8]), layout)
    newest = apply_rope(q[:, :, 8:], *rope(positions[:, 8:]), layout)
    assert near(newest @ kept.mT, whole[:, :, 8:, :8])
