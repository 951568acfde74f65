"""Norms, feed-forward networks, blocks, initialization and mixtures of experts of chapter 10."""

import copy
import io
import math
import warnings
from functools import partial

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from llmbook import blocks
from llmbook.attention import KVCache, MultiHeadAttention
from llmbook.blocks import (
    ACTIVATIONS,
    GELU,
    Experts,
    FeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
    Router,
    SwiGLU,
    TransformerBlock,
    activate,
    default_d_ff,
    gelu,
    initialize_weights,
    layer_norm,
    places_by_expert,
    rms_norm,
    route,
)
from llmbook.positions import LearnedEmbedding, RotaryEmbedding

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like a widget for its progress
    from transformers import LlamaConfig, MixtralConfig
    from transformers.models.llama.modeling_llama import (
        LlamaDecoderLayer,
        LlamaMLP,
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
    )
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralSparseMoeBlock,
        load_balancing_loss_func,
    )

BACKENDS = ("reference", "torch")
HALF = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def close(ours: Tensor, theirs: Tensor, bound: float | None = None) -> None:
    """Apart by a share of the largest number, as rounding is, on any processor."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    bound = bound or {torch.float64: 1e-10, torch.float32: 1e-4}[ours.dtype]
    largest = theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= bound * largest


class Averaging(nn.Module):
    """Stands for attention: each token gets the mean of those so far."""

    def forward(self, x: Tensor, *, rope=None, mask=None, cache=None) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.size(1) + 1, dtype=x.dtype)[:, None]


def randomized(module: nn.Module) -> nn.Module:
    """Gains and biases, too, so that no test passes because they are ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def agree(
    ours, theirs, x: Tensor, names: dict[str, str] | None = None, bound=None, dtype=None, **options
) -> None:
    """Outputs, gradients of the input, and those of parameters with given names are equal.

    In float64, unless another dtype is given: there rounding is far below any real difference.
    """
    dtype = dtype or torch.float64
    for module in (ours, theirs):
        if isinstance(module, nn.Module):
            module.to(dtype)
    results, x = [], x.to(dtype)
    upstream = torch.randn_like(x)
    for module, extra in ((ours, {}), (theirs, options)):
        leaf = x.clone().requires_grad_()
        out = module(leaf, **extra)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(upstream)
        results.append((out, leaf.grad))
    for a, b in zip(*results, strict=True):
        close(a, b, bound)
    for mine, other in (names or {}).items():
        close(ours.get_parameter(mine).grad, theirs.get_parameter(other).grad, bound)


# --- norms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 5, 16), (2, 3, 5, 16)])
def test_norms_equal_torch(backend, dtype, shape):
    for ours, theirs in (
        (RMSNorm(16, backend=backend), nn.RMSNorm(16, eps=1e-5)),
        (LayerNorm(16, backend=backend), nn.LayerNorm(16)),
        (LayerNorm(16, bias=False, backend=backend), nn.LayerNorm(16, bias=False)),
    ):
        randomized(ours)
        theirs.load_state_dict(ours.state_dict())
        names = {name: name for name, _ in ours.named_parameters()}
        agree(ours, theirs, 3 * torch.randn(shape) + 1, names, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("error")
def test_norms_return_the_dtype_of_their_input_as_torch_does(backend, wide, dtype):
    """Whatever that of the gain is, with the same numbers; torch's LayerNorm refuses some pairs."""
    x = torch.randn(3, 64).to(dtype)
    for ours, theirs in (
        (RMSNorm(64, backend=backend), nn.RMSNorm(64, eps=1e-5)),
        (LayerNorm(64, backend=backend), nn.LayerNorm(64)),
        (LayerNorm(64, bias=False, backend=backend), nn.LayerNorm(64, bias=False)),
    ):
        randomized(ours).to(wide)
        theirs.load_state_dict(ours.state_dict())
        got, want = ours(x), theirs.double()(x.double())
        assert got.dtype == dtype
        close(got.double(), want, bound=4 * torch.finfo(dtype).eps)
        if wide == torch.float32 and isinstance(ours, LayerNorm):
            assert theirs.float()(x).dtype == dtype, "torch's does so, too"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_gradients_of_mixed_norms(kind, backend):
    norm, x = kind(8, backend=backend), torch.randn(3, 8).bfloat16().requires_grad_()
    norm(x).sin().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_equals_llama(dtype, backend):
    ours, theirs = randomized(RMSNorm(32, backend=backend)).to(dtype), LlamaRMSNorm(32, eps=1e-5)
    theirs = theirs.to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 32).to(dtype)
    got, want = ours(x), theirs(x)
    assert got.dtype == dtype
    if backend == "reference":
        assert torch.equal(got, want)  # bit by bit: the same order of roundings
    close(got.float(), want.float(), bound=HALF.get(dtype, 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norms_keep_the_dtype(kind, backend):
    exact = kind(64, backend=backend)
    x = torch.randn(3, 64, dtype=torch.float64)
    want = exact.double()(x)
    torch.testing.assert_close(kind(64, backend=backend).double()(x), want, rtol=1e-12, atol=1e-12)
    for dtype, tolerance in HALF.items():
        got = kind(64, backend=backend).to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [300.0, 30_000.0])
def test_norms_in_float16_do_not_overflow(backend, scale):
    x = torch.tensor([[scale, -scale, scale, -scale]], dtype=torch.float16)
    for norm in (RMSNorm(4, backend=backend), LayerNorm(4, backend=backend)):
        assert norm.half()(x).tolist() == [[1, -1, 1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_vector_stays_zero(backend):
    x = torch.zeros(2, 8, requires_grad=True)
    for norm in (RMSNorm(8, backend=backend), LayerNorm(8, backend=backend)):
        out = norm(x)
        out.sum().backward()
        assert torch.equal(out, torch.zeros(2, 8)) and x.grad.isfinite().all()


def test_backends_agree_where_no_gradient_is_wanted():
    fast, plain = RMSNorm(48), RMSNorm(48, backend="reference")
    randomized(fast)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(2, 7, 48)
    trained = fast(x)
    close(trained, plain(x))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fast(x), trained)  # bit by bit
    frozen = fast.requires_grad_(False)
    close(frozen(x), plain(x))
    assert not frozen(x).requires_grad


def test_the_fast_gradient_takes_what_is_not_contiguous():
    x = torch.randn(16, 6, 4).transpose(0, 2)  # (4, 6, 16), strided
    fast, plain = RMSNorm(16), RMSNorm(16, backend="reference")
    agree(fast, plain, x, {"weight": "weight"}, dtype=torch.float32)
    leaf = torch.randn(3, 16, requires_grad=True)
    RMSNorm(16)(leaf).sum().backward()  # an expanded gradient
    want = torch.autograd.grad(plain(leaf).sum(), leaf)[0]
    close(leaf.grad, want)


def test_the_fast_gradient_by_finite_differences():
    norm = randomized(RMSNorm(6))
    x, upstream = torch.randn(3, 6), torch.randn(3, 6)
    leaf = x.clone().requires_grad_()
    norm(leaf).backward(upstream)
    exact = RMSNorm(6, backend="reference").double()
    exact.load_state_dict(norm.state_dict())
    for i, j in ((0, 0), (1, 4), (2, 5)):
        moved = [x.double().clone() for _ in range(2)]
        moved[0][i, j] += 1e-5
        moved[1][i, j] -= 1e-5
        above, below = ((exact(m) * upstream).sum().item() for m in moved)
        assert (above - below) / 2e-5 == pytest.approx(leaf.grad[i, j].item(), abs=1e-4)


def test_the_fast_gradient_cannot_be_differentiated_again():
    x = torch.randn(2, 8, requires_grad=True)
    for backend, works in (("reference", True), ("torch", False)):
        out = RMSNorm(8, backend=backend)(x).square().sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        if works:
            torch.autograd.grad(first.sum(), x)
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                first.sum().backward()


def test_norms_under_autocast_stay_in_float32():
    x = torch.randn(4, 32, requires_grad=True)
    norm, plain = RMSNorm(32), RMSNorm(32, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
        out.sin().sum().backward()  # inside, too
    assert out.dtype == torch.float32
    want = torch.autograd.grad(plain(x).sin().sum(), x)[0]
    close(x.grad, want)


@given(st.integers(1, 40), st.floats(0.01, 1e4), st.integers(0, 2**31))
def test_what_norms_promise(d_model, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(5, d_model, generator=generator, dtype=torch.float64)
    ones = torch.ones(d_model, dtype=torch.float64)
    rms = rms_norm(x, ones, eps=1e-20)
    close(rms.square().mean(dim=-1), torch.ones(5, dtype=torch.float64))
    close(rms_norm(7 * x, ones, eps=1e-20), rms)  # the length does not matter
    centered = layer_norm(x, ones, eps=1e-20)
    assert centered.mean(dim=-1).abs().max() < 1e-9
    if d_model > 1:
        close(layer_norm(x + scale, ones, eps=1e-20), centered, bound=1e-7)
    zero_mean = x - x.mean(dim=-1, keepdim=True)
    if d_model > 2:
        close(rms_norm(zero_mean, ones), layer_norm(zero_mean, ones))


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms_refuse(kind):
    for arguments, message in (
        ({"d_model": 0}, "d_model: expected at least 1, got 0"),
        ({"d_model": 8, "eps": 0.0}, "eps: expected a small positive number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)


def test_wrong_widths_are_refused():
    with pytest.raises((ValueError, TypeCheckError)):
        rms_norm(torch.ones(2, 1), torch.ones(8))
    with pytest.raises((ValueError, TypeCheckError)):
        layer_norm(torch.ones(2, 1), torch.ones(8))
    with pytest.raises(
        ValueError, match=r"x: expected floats of shape \(..., 8\), got shape \(2, 1\)"
    ):
        RMSNorm(8)(torch.ones(2, 1))


def test_unknown_backend_is_refused():
    # Annotations are checked in tests; without them, the message is ours.
    with pytest.raises((ValueError, TypeCheckError)):
        RMSNorm(8, backend="fast")
    with pytest.raises(ValueError, match="backend: expected one of reference, torch, got 'fast'"):
        blocks._check_norm(8, 1e-5, "fast")


# --- feed-forward networks ----------------------------------------------------------------------


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_equals_torch(approximate, backend):
    agree(GELU(approximate, backend), nn.GELU(approximate), 3 * torch.randn(100))


def test_gelu_is_a_mean_over_decisions():
    x = torch.tensor([-1.0, 0.5, 2.0])
    z = torch.randn(1_000_000)
    passed = torch.stack([(z < value).float().mean() * value for value in x])
    torch.testing.assert_close(gelu(x), passed, atol=5e-3, rtol=0)
    wide = torch.linspace(-10, 10, 10_001, dtype=torch.float64)
    error = (gelu(wide, "tanh") - gelu(wide)).abs().max()
    assert 4e-4 < error < 5e-4
    with pytest.raises((ValueError, TypeCheckError)):
        GELU("quick")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_by_hand(activation, bias):
    layer = FeedForward(12, 20, activation=activation, bias=bias)
    x = torch.randn(2, 3, 12)
    function = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "reglu": F.relu,
        "geglu": F.gelu,
        "swiglu": F.silu,
    }[activation]
    is_gated = layer.gate_proj is not None
    assert is_gated == (activation in ("reglu", "geglu", "swiglu"))
    inner = (
        function(layer.gate_proj(x)) * layer.up_proj(x) if is_gated else function(layer.up_proj(x))
    )
    close(layer(x), layer.down_proj(inner))
    assert (layer.up_proj.bias is not None) == bias


def test_feed_forward_equals_llama():
    config = LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2)
    ours, theirs = FeedForward(24, 40), LlamaMLP(config)
    theirs.load_state_dict(ours.state_dict())
    names = {name: name for name, _ in ours.named_parameters()}
    agree(ours, theirs, torch.randn(2, 5, 24), names)
    a, b = torch.randn(2, 3, 8)
    close(SwiGLU()(a, b), F.silu(a) * b)


def test_widths():
    assert default_d_ff(4096, "swiglu", 256) == 11008  # Llama 7B
    assert default_d_ff(8192, "swiglu", 256) == 22016  # Llama 65B
    assert default_d_ff(768, "gelu") == 3072  # GPT-2
    assert default_d_ff(1, "swiglu") == 8 and default_d_ff(3, "swiglu", 1) == 8
    assert FeedForward(96).down_proj.in_features == 256
    assert FeedForward(96, activation="relu").down_proj.in_features == 384
    plain, gated = FeedForward(96, activation="gelu"), FeedForward(96)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in gated.parameters())


@given(st.integers(1, 10_000), st.integers(1, 300), st.sampled_from(ACTIVATIONS))
def test_width_is_the_next_multiple(d_model, multiple_of, activation):
    width = default_d_ff(d_model, activation, multiple_of)
    share = 8 / 3 if activation in ("reglu", "geglu", "swiglu") else 4
    assert width % multiple_of == 0
    assert int(share * d_model + 1e-9) <= width < share * d_model + multiple_of


def test_dropout_is_inverted_and_off_in_use():
    layer = FeedForward(8, 512, activation="relu", dropout=0.25)
    nn.init.constant_(layer.up_proj.weight, 1.0)
    nn.init.constant_(layer.down_proj.weight, 1 / 512)
    x = torch.full((8192, 8), 0.125)
    with torch.no_grad():
        sample = layer(x)[:, 0].double()
    variance = 0.25 / 0.75 / 512  # of a mean of 512
    assert sample.mean().item() == pytest.approx(1.0, abs=6 * (variance / 8192) ** 0.5)
    assert sample.var().item() == pytest.approx(variance, rel=6 * (2 / 8192) ** 0.5)
    assert torch.equal(layer.eval()(x[:64]), torch.ones(64, 8))
    block = TransformerBlock(8, Averaging(), FeedForward(8), dropout=0.5)
    x = torch.randn(1, 4, 8)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_feed_forward_refuses():
    for arguments, message in (
        ({"d_model": 0}, "d_model: expected at least 1, got 0"),
        ({"d_model": 8, "d_ff": 0}, "d_ff: expected at least 1, got 0"),
        ({"d_model": 8, "activation": "swish"}, "activation: expected one of relu, .*'swish'"),
        ({"d_model": 8, "dropout": 1.0}, "dropout: expected at least 0 and less than 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            FeedForward(**arguments)
    with pytest.raises(ValueError, match="multiple_of: expected at least 1, got 0"):
        default_d_ff(8, "swiglu", 0)


# --- the block ----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_block_equals_encoder_layer(position, activation):
    theirs = nn.TransformerEncoderLayer(
        32,
        4,
        48,
        dropout=0.0,
        activation=activation,
        batch_first=True,
        norm_first=position == "pre",
    )
    attention = MultiHeadAttention(32, 4, bias=True)
    feed_forward = FeedForward(32, 48, activation=activation, bias=True)
    ours = TransformerBlock(32, attention, feed_forward, norm=LayerNorm, norm_position=position)
    randomized(ours)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    pairs = {
        "attention.o_proj": "self_attn.out_proj",
        "feed_forward.up_proj": "linear1",
        "feed_forward.down_proj": "linear2",
        "attention_norm": "norm1",
        "feed_forward_norm": "norm2",
    }
    for mine, other in pairs.items():
        theirs.get_submodule(other).load_state_dict(ours.get_submodule(mine).state_dict())
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    agree(ours, theirs, torch.randn(2, 9, 32), names, src_mask=mask.double())


def test_block_equals_llama():
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    config._attn_implementation = "sdpa"
    theirs = randomized(LlamaDecoderLayer(config, layer_idx=0)).double()
    ours = TransformerBlock(
        32,
        MultiHeadAttention(32, 4, n_kv_heads=2),
        FeedForward(32, 48),
        norm=partial(RMSNorm, eps=config.rms_norm_eps),
    ).double()
    pairs = {
        "attention": "self_attn",
        "feed_forward": "mlp",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }
    for mine, other in pairs.items():
        ours.get_submodule(mine).load_state_dict(theirs.get_submodule(other).state_dict())
    names = {
        f"{mine}.{name}": f"{other}.{name}"
        for mine, other in pairs.items()
        for name, _ in ours.get_submodule(mine).named_parameters()
    }
    x, places = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9)[None]
    with_rope = partial(ours, rope=RotaryEmbedding(8)(places))
    with_rope.get_parameter = ours.get_parameter
    rotation = LlamaRotaryEmbedding(config)(x, places)
    agree(with_rope, theirs, x, names, bound=1e-6, position_embeddings=rotation)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_block_by_the_formula(position):
    block = TransformerBlock(16, Averaging(), FeedForward(16), norm_position=position)
    randomized(block)
    x = torch.randn(2, 5, 16)
    want = x
    for layer, norm in (
        (block.attention, block.attention_norm),
        (block.feed_forward, block.feed_forward_norm),
    ):
        want = want + layer(norm(want)) if position == "pre" else norm(want + layer(want))
    close(block(x), want)
    assert list(dict(block.named_children())) == [
        "attention_norm",
        "attention",
        "feed_forward_norm",
        "feed_forward",
    ]


def test_block_hands_its_options_to_attention():
    seen = {}

    class Recorder(nn.Module):
        def forward(self, x: Tensor, **options) -> Tensor:
            seen.update(options)
            return x

    rope = torch.ones(1, 3, 2), torch.ones(1, 3, 2)
    mask = torch.ones(3, 3, dtype=torch.bool)
    block = TransformerBlock(4, Recorder(), FeedForward(4))
    block(torch.randn(1, 3, 4), rope=rope, mask=mask, cache="a cache")
    assert seen["rope"] is rope and seen["mask"] is mask and seen["cache"] == "a cache"


def test_block_with_a_cache():
    block = TransformerBlock(16, MultiHeadAttention(16, 2), FeedForward(16)).eval()
    x = torch.randn(2, 6, 16)
    rotary = RotaryEmbedding(8)
    with torch.no_grad():
        whole = block(x, rope=rotary(torch.arange(6)[None]))
        cache, parts = KVCache(2, 6, 2, 8), []
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            rope = rotary(torch.arange(start, stop)[None])
            mask = cache.extend(stop - start)
            parts.append(block(x[:, start:stop], rope=rope, mask=mask, cache=cache[0]))
    close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_block_keeps_the_dtype(dtype):
    block = TransformerBlock(16, MultiHeadAttention(16, 2), FeedForward(16)).to(dtype)
    x = torch.randn(2, 5, 16, dtype=dtype)
    assert block(x).dtype == dtype and block(x).isfinite().all()


def test_block_is_causal_and_its_feed_forward_local():
    block = TransformerBlock(16, MultiHeadAttention(16, 2), FeedForward(16))
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4] += 1
    same = (block(x) - block(changed)).abs().amax(dim=-1)[0] < 1e-6
    assert same.tolist() == [True] * 4 + [False] * 2


def test_block_refuses():
    with pytest.raises((ValueError, TypeCheckError)):
        TransformerBlock(8, Averaging(), FeedForward(8), norm_position="both")
    with pytest.raises(ValueError, match=r"dropout: expected at least 0 and less than 1, got -0.1"):
        TransformerBlock(8, Averaging(), FeedForward(8), dropout=-0.1)


# --- initialization -----------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, n_layers: int = 6, d_model: int = 64, tied: bool = False, **options):
        super().__init__()
        self.embedding = nn.Embedding(500, d_model)
        self.positions = LearnedEmbedding(200, d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                d_model,
                MultiHeadAttention(d_model, 2, bias=True, qk_norm=RMSNorm),
                MixtureOfExperts(d_model, 128, 4, 2, d_shared=32)
                if options.get("experts")
                else FeedForward(d_model, 256, activation="gelu", bias=True),
                norm=LayerNorm,
            )
            for _ in range(n_layers)
        )
        self.head = nn.Linear(d_model, 500, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def stds(model: nn.Module) -> dict[str, float]:
    return {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}


def test_initialization_by_fan_in():
    model = Model(experts=True)
    initialize_weights(randomized(model), n_layers=6)
    for name, std in stds(model).items():
        fan_in = model.get_parameter(name).size(-1)
        want = fan_in**-0.5
        if name.startswith(("embedding", "positions")):
            want = 1.0
        if "o_proj" in name or "down_proj" in name:
            want /= 12**0.5
        assert std == pytest.approx(want, rel=0.15), name
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_initialization_of_a_tied_model():
    model = Model(tied=True)
    initialize_weights(model, n_layers=6)
    found = stds(model)
    assert found["embedding.weight"] == pytest.approx(1 / 8, rel=0.05)
    assert found["positions.weight"] == pytest.approx(1 / 8, rel=0.05)
    assert found["blocks.0.attention.o_proj.weight"] == pytest.approx(1 / 8 / 8 / 12**0.5, rel=0.1)
    assert found["blocks.0.attention.q_proj.weight"] == pytest.approx(1 / 8, rel=0.1)


def test_initialization_as_gpt2():
    model = Model(tied=True)
    initialize_weights(model, n_layers=6, std=0.02)
    for name, std in stds(model).items():
        writes = "o_proj" in name or "down_proj" in name
        assert std == pytest.approx(0.02 / (12**0.5 if writes else 1), rel=0.1), name
    initialize_weights(model, n_layers=6, std=0.02, embedding_std=0.5)
    assert stds(model)["embedding.weight"] == pytest.approx(0.5, rel=0.05)
    for arguments, message in (
        ({"n_layers": 0}, "n_layers: expected at least 1, got 0"),
        ({"n_layers": 6, "std": 0.0}, "std: expected None or above 0, got 0.0"),
        ({"n_layers": 6, "embedding_std": -1.0}, "embedding_std: expected None or above 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize_weights(model, **arguments)


def test_initialization_follows_the_seed():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = Model(1)
        initialize_weights(model, 1)
        states.append(model.state_dict())
    assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


@pytest.mark.parametrize("depth", [4, 32])
def test_the_stream_stays_level(depth):
    layers = nn.ModuleList(
        TransformerBlock(64, MultiHeadAttention(64, 4), FeedForward(64)) for _ in range(depth)
    )
    initialize_weights(layers, depth)
    stream = torch.randn(4, 16, 64)
    with torch.no_grad():
        for block in layers:
            stream = block(stream)
    assert 1.0 < stream.square().mean().sqrt() < 1.5


# --- mixtures of experts ------------------------------------------------------------------------


def one_expert(moe: MixtureOfExperts, number: int) -> FeedForward:
    """The expert as a network of its own."""
    experts = moe.experts
    d_ff, d_model = experts.up_proj.shape[1:]
    network = FeedForward(d_model, d_ff, activation=experts.activation)
    stacks = {
        "gate_proj.weight": experts.gate_proj,
        "up_proj.weight": experts.up_proj,
        "down_proj.weight": experts.down_proj,
    }
    network.load_state_dict({k: s[number].detach() for k, s in stacks.items() if s is not None})
    return network


def token_by_token(moe: MixtureOfExperts, x: Tensor) -> Tensor:
    """The definition, without gathering."""
    networks = [one_expert(moe, number) for number in range(len(moe.router.weight))]
    outputs = []
    for token in x.flatten(0, -2):
        weights, chosen = (moe.router.weight @ token).softmax(dim=-1).topk(moe.router.n_active)
        if moe.router.normalize:
            weights = weights / weights.sum()
        outputs.append(sum(w * networks[i](token) for w, i in zip(weights, chosen, strict=True)))
    return torch.stack(outputs).view_as(x)


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([(1, 1), (2, 3), (1, 11)]),
)
def test_mixture_is_what_its_tokens_say(n_experts, n_active, normalize, activation, shape):
    n_active = min(n_active, n_experts)
    options = {"activation": activation, "normalize": normalize}
    moe = MixtureOfExperts(6, 5, n_experts, n_active, **options)
    x = torch.randn(*shape, 6)
    with torch.no_grad():
        close(moe(x), token_by_token(moe, x))
    assert moe.load.sum().item() == pytest.approx(n_active, abs=1e-5)
    assert moe.routing.dropped == 0


def test_all_experts_with_equal_weights_are_one_wide_network():
    moe = MixtureOfExperts(8, 12, n_experts=4, n_active=4)
    nn.init.zeros_(moe.router.weight)
    wide = FeedForward(8, 48)
    experts = moe.experts
    with torch.no_grad():
        wide.gate_proj.weight.copy_(experts.gate_proj.flatten(0, 1))
        wide.up_proj.weight.copy_(experts.up_proj.flatten(0, 1))
        wide.down_proj.weight.copy_(torch.cat(list(experts.down_proj), dim=1) / 4)
    agree(moe, wide, torch.randn(2, 7, 8))


@pytest.mark.parametrize("n_active", [1, 2, 4])
def test_identical_experts_are_one(n_active):
    moe = MixtureOfExperts(8, 12, n_experts=4, n_active=n_active)
    with torch.no_grad():
        for stack in moe.experts.parameters():
            stack.copy_(stack[:1].expand_as(stack))
    agree(moe, one_expert(moe, 0), torch.randn(2, 7, 8))


@pytest.mark.parametrize("n_active", [1, 2, 3])
def test_mixture_equals_mixtral(n_active):
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_local_experts=5,
        num_experts_per_tok=n_active,
    )
    config._experts_implementation = "eager"
    theirs, ours = MixtralSparseMoeBlock(config), MixtureOfExperts(16, 24, 5, n_active)
    e = ours.experts
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([e.gate_proj, e.up_proj], dim=1))
        theirs.experts.down_proj.copy_(e.down_proj)
    names = {"experts.down_proj": "experts.down_proj"}
    if n_active > 1:  # a single normalized weight gives the router a gradient of zero
        names["router.weight"] = "gate.weight"
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    # Theirs takes the softmax in float32 and keeps it so.
    agree(ours, theirs, x, names, bound=1e-5)
    fused = torch.cat([e.gate_proj.grad, e.up_proj.grad], dim=1)
    close(fused, theirs.experts.gate_up_proj.grad, bound=1e-5)
    logits = (x.flatten(0, 1) @ ours.router.weight.T).detach().float().requires_grad_()
    mine = route(logits, n_active).balance_loss
    want = load_balancing_loss_func((logits,), num_experts=5, top_k=n_active)
    close(mine, want)
    close(torch.autograd.grad(mine, logits)[0], torch.autograd.grad(want, logits)[0])


@given(st.integers(2, 12), st.integers(1, 12), st.integers(1, 50), st.integers(0, 2**31))
def test_balance_loss(n_experts, n_active, tokens, seed):
    n_active = min(n_active, n_experts)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, n_experts, generator=generator, dtype=torch.float64)
    logits = logits.float().requires_grad_()
    routing = route(logits, n_active)
    routing.balance_loss.backward()
    p = routing.probabilities.detach()
    load = routing.load
    want = n_experts / tokens * p * (load - (p @ load)[:, None])
    assert (logits.grad - want).abs().max() <= 1e-5 * n_experts  # all of probabilities below 1
    if n_active == n_experts:
        assert routing.balance_loss.item() == pytest.approx(n_active, rel=1e-5)


def test_balance_loss_at_its_ends():
    balanced = 10 * torch.eye(4).repeat(3, 1)
    assert route(balanced, 1).balance_loss.item() == pytest.approx(1.0, abs=1e-3)
    collapsed = torch.tensor([[20.0, 0, 0, 0]] * 9)
    assert route(collapsed, 1).balance_loss.item() == pytest.approx(4.0, abs=1e-3)
    torn = torch.tensor([[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4).log()
    assert route(torn, 1).balance_loss.item() < 1  # it is no distance from balance


def test_capacity_keeps_first_choices_and_early_tokens():
    logits = torch.tensor([[2.0, 1, 0], [2, 1, 0], [1, 2, 0], [2, 0, 1]])
    routing = route(logits, n_active=2, capacity=2)
    tokens = [(places % 4).tolist() for places in places_by_expert(routing)]
    assert tokens == [[0, 1], [2, 0], [3]]  # expert 1: its first choice before second ones
    assert routing.dropped == pytest.approx(3 / 8)
    assert routing.load.tolist() == [1.0, 0.75, 0.25]  # what was wished for


def test_capacity_counts_while_training_only():
    moe = MixtureOfExperts(8, 12, n_experts=4, n_active=1, capacity_factor=0.5)
    x = torch.randn(1, 16, 8)
    out = moe(x)
    kept = out.abs().sum(dim=-1)[0] > 0
    assert moe.routing.capacity == 2  # ceil(0.5 * 16 / 4)
    assert kept.sum().item() == round(16 * (1 - moe.routing.dropped)) <= 8
    whole = moe.eval()(x)
    assert moe.routing.dropped == 0 and (whole.abs().sum(dim=-1) > 0).all()
    close(out[0, kept], whole[0, kept])
    alone = torch.cat([moe(token[None, None]) for token in x[0]], dim=1)
    close(alone, whole)  # nobody depends on who else is there


def test_shared_expert_sees_all_tokens():
    moe = MixtureOfExperts(8, 12, 4, 2, d_shared=20, activation="relu")
    x = torch.randn(2, 5, 8)
    routed = moe.experts(x.flatten(0, 1), moe.router(x.flatten(0, 1))).view_as(x)
    close(moe(x), routed + moe.shared(x))
    assert moe.shared.up_proj.out_features == 20 and moe.shared.activation == "relu"


def test_a_single_normalized_weight_teaches_the_router_nothing():
    for normalize, learns in ((True, False), (False, True)):
        torch.manual_seed(0)
        moe = MixtureOfExperts(8, 12, 4, 1, normalize=normalize)
        moe(torch.randn(3, 5, 8)).square().sum().backward()
        assert (moe.router.weight.grad.abs().max() > 1e-5) == learns


def test_routing_keeps_float64_and_widens_16_bits():
    logits = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(route(logits, 2).probabilities, logits.softmax(dim=-1))
    half = logits.bfloat16()
    assert torch.equal(route(half, 2).probabilities, half.float().softmax(dim=-1))


def test_defaults():
    """What is left out is what the docstrings say."""
    for norm in (RMSNorm(8), LayerNorm(8)):
        assert (norm.eps, norm.backend) == (1e-5, "torch") and (norm.weight == 1).all()
    assert torch.equal(LayerNorm(8).bias, torch.zeros(8))
    small, ones = 1e-3 * torch.arange(-4.0, 4), torch.ones(8)  # where eps matters
    for function in (rms_norm, layer_norm):
        assert torch.equal(function(small, ones), function(small, ones, eps=1e-5))
    assert torch.equal(gelu(small), gelu(small, "none"))
    assert (GELU().approximate, GELU().backend) == ("none", "torch")
    network = FeedForward(8)
    assert (network.activation, network.dropout, network.up_proj.bias) == ("swiglu", 0.0, None)
    assert default_d_ff(50) == default_d_ff(50, "swiglu", 8) == 136
    block = TransformerBlock(8, Averaging(), network)
    assert (block.norm_position, block.dropout) == ("pre", 0.0)
    assert isinstance(block.attention_norm, RMSNorm)
    moe = MixtureOfExperts(8, 12, 4, 2)
    assert (moe.shared, moe.router.capacity_factor, moe.router.normalize) == (None, None, True)
    assert moe.experts.activation == Experts(8, 12, 4).activation == "swiglu"
    assert Router(8, 4, 2).normalize and Router(8, 4, 2).capacity_factor is None
    routing = route(torch.randn(9, 4), 2)
    close(routing.weights.sum(dim=1), torch.ones(9))
    assert routing.capacity is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.ones(2, 4), torch.ones(5)), r"x: .*\(..., 5\), got shape \(2, 4\)"),
        (lambda: rms_norm(torch.ones(4).long(), torch.ones(4)), "x: expected floats, got a tensor"),
        (lambda: rms_norm([1.0], torch.ones(1)), r"x: expected a tensor of floats, got \[1.0\]"),
        (lambda: rms_norm(torch.ones(4), torch.ones(1, 4)), r"weight: .*\(d_model\), got shape"),
        (lambda: rms_norm(torch.ones(4), torch.ones(4), eps=0), "eps: expected a small .* got 0"),
        (lambda: layer_norm(torch.ones(4), torch.ones(4), eps=math.nan), "eps: .* got nan"),
        (
            lambda: layer_norm(torch.ones(4), torch.ones(4), torch.ones(1)),
            r"bias: expected floats of shape \(4\), got shape \(1,\)",
        ),
        (lambda: LayerNorm(8)(torch.ones(2, 1)), r"x: .*\(..., 8\), got shape \(2, 1\)"),
        (lambda: RMSNorm(8, eps="1e-5"), "eps: expected a small positive number, got '1e-5'"),
        (lambda: RMSNorm(None), "d_model: expected a whole number, got None"),
        (lambda: RMSNorm(8.0), "d_model: expected a whole number, got 8.0"),
        (lambda: gelu(2.0), "x: expected a tensor of floats, got 2.0"),
        (lambda: gelu(torch.ones(2), "quick"), "approximate: expected one of none, tanh, got 'qu"),
        (lambda: GELU(backend="jax"), "backend: expected one of reference, torch, got 'jax'"),
        (lambda: GELU()(torch.ones(2).long()), "x: expected floats"),
        (lambda: SwiGLU()(torch.ones(2, 3), torch.ones(2, 1)), r"up: .*\(2, 3\), got shape \(2, 1"),
        (
            lambda: activate("tanh", None, torch.ones(2)),
            "activation: expected one of relu, .*'tanh",
        ),
        (
            lambda: activate("swiglu", None, torch.ones(2)),
            "gate: expected a tensor for 'swiglu', g",
        ),
        (lambda: activate("relu", torch.ones(2), torch.ones(2)), "gate: expected None for 'relu'"),
        (lambda: activate("swiglu", torch.ones(2).long(), torch.ones(2)), "gate: expected floats"),
        (lambda: activate("swiglu", torch.ones(1), torch.ones(2)), r"gate: .*\(2\), got shape"),
        (lambda: MixtureOfExperts(8, 12, 4, 2, d_shared=None), "d_shared: expected a whole number"),
        (lambda: default_d_ff(8, "tanh"), "activation: expected one of relu, .* got 'tanh'"),
        (lambda: default_d_ff(0), "d_model: expected at least 1, got 0"),
        (lambda: FeedForward(8)(torch.ones(2, 9)), r"x: .*\(..., 8\), got shape \(2, 9\)"),
        (
            lambda: TransformerBlock(8, Averaging(), FeedForward(8))(torch.ones(5, 8)),
            r"x: expected floats of shape \(batch, sequence, 8\), got shape \(5, 8\)",
        ),
        (lambda: TransformerBlock(8, FeedForward, FeedForward(8)), "attention: expected a module"),
        (lambda: TransformerBlock(8, Averaging(), None), "feed_forward: expected a module, got No"),
        (lambda: TransformerBlock(0, Averaging(), FeedForward(8)), "d_model: expected at least 1"),
        (
            lambda: TransformerBlock(8, Averaging(), FeedForward(8), norm_position="both"),
            "norm_position: expected one of pre, post, got 'both'",
        ),
        (lambda: initialize_weights(None, 2), "module: expected a module, got None"),
        (lambda: initialize_weights(nn.Linear(2, 2), None), "n_layers: expected a whole number"),
        (lambda: initialize_weights(nn.Linear(2, 2), 1, std=math.inf), "std: .* got inf"),
        (lambda: initialize_weights(nn.Linear(2, 2), 1, embedding_std="1"), "embedding_std: .*'1'"),
        (lambda: route(torch.ones(3), 1), r"logits: .*\(tokens, n_experts\), got shape \(3,\)"),
        (lambda: route(torch.ones(3, 2), None), "n_active: expected a whole number, got None"),
        (lambda: Router(8, 4, 2)(torch.ones(3, 9)), r"tokens: .*\(tokens, 8\), got shape \(3, 9\)"),
        (lambda: Router(8, 4, 2, capacity_factor="1"), "capacity_factor: .* got '1'"),
        (lambda: MixtureOfExperts(8, 12, 4, 2)(torch.ones(2, 9)), r"x: .*\(..., 8\), got shape"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    jaxtyping.config.update("jaxtyping_disable", True)  # as for a reader, to see our messages
    try:
        with pytest.raises(ValueError, match=message):
            call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_an_idle_expert_gets_a_gradient_of_zero():
    moe = MixtureOfExperts(4, 6, n_experts=3, n_active=1)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[1.0], [0], [-1]]).expand(3, 4))
    moe(torch.rand(2, 5, 4) + 0.1).sum().backward()
    moved = moe.experts.up_proj.grad.flatten(1).norm(dim=1) > 0
    assert moved.tolist() == [True, False, False]


def test_a_mixture_can_be_copied_saved_and_cast():
    moe = MixtureOfExperts(8, 12, 4, 2)
    with pytest.raises(RuntimeError, match="nothing has been routed yet"):
        moe.balance_loss  # noqa: B018 (it is a property)
    x = torch.randn(2, 5, 8)
    out = moe(x)
    assert moe.balance_loss.requires_grad
    twin = copy.deepcopy(moe)
    assert torch.equal(twin(x), out) and not copy.deepcopy(moe).balance_loss.requires_grad
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    other = MixtureOfExperts(8, 12, 4, 2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), out)
    half = moe.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and moe.routing.probabilities.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = other(x)
    torch.testing.assert_close(mixed.float(), out, atol=0.1, rtol=0.1)


def test_nothing_to_route():
    moe = MixtureOfExperts(8, 12, 4, 2)
    assert moe(torch.zeros(0, 3, 8)).shape == (0, 3, 8)
    assert moe.routing.dropped == 0


def test_the_balance_loss_balances():
    """A router that sends all to one expert spreads them when the loss is followed."""
    torch.manual_seed(0)
    router = Router(8, 4, 1)
    x = torch.randn(256, 8) + 2
    with torch.no_grad():
        router.weight[0] += 1
    assert router(x).load.max() > 0.9
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        router(x).balance_loss.backward()
        optimizer.step()
    assert router(x).load.max() < 0.5


def test_mixtures_refuse():
    fine = {"d_model": 8, "d_ff": 12, "n_experts": 4, "n_active": 2}
    for change, message in (
        ({"n_experts": 0}, "n_experts: expected at least 1, got 0"),
        ({"n_active": 0}, "n_active: expected at least 1, got 0"),
        ({"n_active": 5}, "n_active: expected at most n_experts, 4, got 5"),
        ({"d_ff": 0}, "d_ff: expected at least 1, got 0"),
        ({"d_shared": -1}, "d_shared: expected at least 0, got -1"),
        ({"capacity_factor": 0.0}, "capacity_factor: expected None or a finite .* got 0.0"),
        ({"capacity_factor": math.inf}, "capacity_factor: expected None or a finite .* got inf"),
        ({"activation": "tanh"}, "activation: expected one of relu, .* got 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(**(fine | change))
    with pytest.raises(ValueError, match="n_experts: expected at least 1, got 0"):
        Experts(8, 12, 0)


def test_routing_refuses():
    logits = torch.randn(6, 2)
    for options, message in (
        ({"n_active": 0}, "n_active: expected at least 1, got 0"),
        ({"n_active": 3}, "n_active: expected at most n_experts, 2, got 3"),
        ({"n_active": 1, "capacity": -1}, "capacity: expected at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            route(logits, **options)
    assert route(logits, 1, capacity=0).dropped == 1


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=": expected Float"):
        rms_norm(torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(ValueError, match=": expected Float"):
        SwiGLU()(torch.ones(2, 8), torch.ones(2, 9))
    with pytest.raises(ValueError, match=": expected Float"):
        TransformerBlock(8, Averaging(), FeedForward(8))(torch.ones(5, 8))
    assert math.isfinite(rms_norm(torch.ones(8), torch.ones(8)).sum())
