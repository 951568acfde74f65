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
    assert 0.015 < LearnedEmbedding(100, 100).weight.std() < 0.025


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
        assert torch.equal(torch.cat((ours, ours), dim=-1), theirs)


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
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert ours.dtype == dtype
    assert torch.allclose(ours, expected, atol=tolerance)
    weights = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, expected)]
    assert torch.allclose(*gradients, atol=tolerance)


@LAYOUTS
def test_without_a_batch(layout):
    x, (cos, sin) = torch.randn(3, 5, 8), RotaryEmbedding(8)(torch.arange(5))
    assert torch.equal(apply_rope(x, cos, sin, layout), apply_rope(x[None], cos, sin, layout)[0])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rotated_in_float32_and_rounded_once(layout, dtype):
    x, (cos, sin) = torch.randn(2, 3, 5, 8).to(dtype), RotaryEmbedding(8)(torch.arange(5))
    ours = apply_rope(x, cos, sin, layout)
    assert ours.dtype == dtype
    assert torch.equal(ours, by_matrix(x.float(), cos, sin, layout).to(dtype))
    x.requires_grad_()
    apply_rope(x, cos, sin, layout).sum().backward()
    assert x.grad.dtype == dtype


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_may_be_rounded_once_taken(layout, dtype):
    x = torch.randn(2, 3, 5, 8).to(dtype).requires_grad_()
    cos, sin = (z.to(dtype) for z in RotaryEmbedding(8)(torch.arange(5)))
    ours = apply_rope(x, cos, sin, layout)
    assert torch.equal(ours, by_matrix(x.float(), cos.float(), sin.float(), layout).to(dtype))
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
    assert torch.allclose(*gradients, atol=1e-6)


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
        assert torch.allclose(ours, by_matrix(x, cos, sin, layout), atol=1e-6)
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
    assert torch.allclose(mapped, apply_rope(x, cos, sin, layout), atol=1e-6)


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
assert torch.allclose(ours, expected, atol=1e-6)
gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected)]
assert torch.allclose(*gradients, atol=1e-5)
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
    assert torch.allclose(interleaved[..., order], half, atol=1e-6)
    assert torch.allclose(half[..., order.argsort()], interleaved, atol=1e-6)


@LAYOUTS
def test_rotations_keep_lengths(layout):
    x, (cos, sin) = torch.randn(2, 3, 5, 8), RotaryEmbedding(8)(torch.arange(5))
    assert torch.allclose(apply_rope(x, cos, sin, layout).norm(dim=-1), x.norm(dim=-1), atol=1e-5)


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
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def test_interleaved_is_the_rotation_of_gptj():
    x, (cos, sin) = torch.randn(2, 7, 3, 16), RotaryEmbedding(16)(torch.arange(7)[None])
    ours = apply_rope(x.transpose(1, 2), cos, sin, layout="interleaved").transpose(1, 2)
    assert torch.allclose(ours, gptj_rotary(x, sin, cos), atol=1e-6)


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
    assert torch.allclose(ours, theirs, rtol=2e-6, atol=0)
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
    assert torch.allclose(ours, theirs, rtol=2e-6, atol=0)
    new_base = base * factor ** (d_head / (d_head - 2))
    assert torch.allclose(ours, rope_frequencies(d_head, new_base), rtol=2e-6, atol=0)


@given(
    kind=st.sampled_from(["linear", "ntk", "yarn", "llama3"]),
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
        (lambda: RotaryEmbedding(2, scaling=RopeScaling("ntk", 2)), "'ntk' needs at least two"),
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
            "cos: expected 8 / 2 angles a position, got 8",
        ),
        (
            lambda: apply_rope(torch.zeros(1, 3, 8), *torch.zeros(2, 3, 4), layout="meta"),
            "layout: expected 'half' or 'interleaved', got 'meta'",
        ),
    ],
)
def test_bad_input_is_named(untyped, make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
        assert torch.allclose(scores[:, :, here, here], q_alone @ k_alone.mT, atol=1e-5)
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
    assert torch.allclose(newest @ kept.mT, whole[:, :, 8:, :8], atol=1e-4)
