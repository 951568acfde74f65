"""Attention, masks, caches, tiles and heads of chapter 09, against PyTorch and transformers."""

import itertools
import json
import math
from functools import partial
from html.parser import HTMLParser

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmbook.attention import (
    KVCache,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    attention_mask,
    attention_pattern,
    attention_weights,
    causal_mask,
    flash_attention,
    scaled_dot_product_attention,
    show_attention,
    softmax,
)
from llmbook.batches import document_mask
from llmbook.positions import (
    RopeScaling,
    RotaryEmbedding,
    change_rope_layout,
    interleaved_to_half,
)

reference = partial(scaled_dot_product_attention, backend="reference")
fused = partial(scaled_dot_product_attention, backend="torch")
TINY_TILES = partial(flash_attention, block_size=5)
ALL = {"reference": reference, "torch": fused, "flash": TINY_TILES}


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def qkv(batch=2, heads=4, kv_heads=None, queries=7, keys=7, d_head=8, d_value=None, dtype=None):
    kv_heads, d_value = kv_heads or heads, d_value or d_head
    shapes = (heads, queries, d_head), (kv_heads, keys, d_head), (kv_heads, keys, d_value)
    return tuple(
        torch.randn(batch, *s, dtype=dtype or torch.float64).requires_grad_() for s in shapes
    )


def results(attention, inputs, *args, **options):
    """Output and gradients, for a loss that no symmetry makes zero."""
    out = attention(*inputs, *args, **options)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    return (out.detach(), *torch.autograd.grad(loss, inputs))


def assert_same(ours, theirs, **tolerances):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-9} | tolerances)


# Softmax


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20))
def test_softmax_is_a_distribution_and_torchs(scores):
    ours = softmax(torch.tensor(scores))
    assert ours.sum().item() == pytest.approx(1, abs=1e-5)
    expected = torch.tensor(scores, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_softmax_keeps_the_dtype_and_has_no_gradient_in_empty_rows(dtype):
    scores = torch.randn(3, 5).to(dtype)
    scores[1] = -torch.inf
    scores.requires_grad_()
    weights = softmax(scores)
    weights[..., 0].sum().backward()
    assert weights.dtype == dtype and weights[1].tolist() == [0.0] * 5
    assert scores.grad.isfinite().all() and scores.grad[1].tolist() == [0.0] * 5


def test_softmax_gradient_equals_torchs():
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softmax, scores)
    assert torch.autograd.gradcheck(partial(softmax, dim=0), scores)
    one = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(softmax, one)


# Masks


@given(st.integers(1, 12), st.none() | st.integers(1, 14))
def test_causal_mask_by_its_definition(sequence, window):
    mask = causal_mask(sequence, window)
    for q, k in itertools.product(range(sequence), repeat=2):
        assert mask[q, k] == (k <= q and (window is None or q - k < window))


def test_attention_mask_knows_padding_and_window():
    positions = torch.tensor([[-1, 0, 1, 2], [0, 1, 2, -1]])
    mask = attention_mask(positions, positions, window=2)
    expected = [
        [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
    ]
    assert mask.int()[:, 0].tolist() == expected


def test_attention_mask_is_transformers_sliding_window():
    from transformers import MistralConfig
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = MistralConfig(sliding_window=3, attn_implementation="eager")
    theirs = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 9, 4),
        cache=None,
        attention_mask=None,
        position_ids=torch.arange(9)[None],
    )
    assert torch.equal(theirs[0, 0] == 0, causal_mask(9, window=3))


# One function, three ways to compute it


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"mask": causal_mask(7, 3)},
    "documents": {"mask": document_mask(torch.tensor([[0, 0, 0, 1, 1, 2, -1], [0] * 7]))},
    "per head": {"mask": torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(0)) > 0.4},
    "both": {"mask": causal_mask(7).flip(0, 1), "is_causal": True},
    "nothing": {"mask": torch.zeros(7, 7, dtype=torch.bool)},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_backends_and_tiles_agree(name, kv_heads):
    inputs = qkv(kv_heads=kv_heads, d_value=6)
    expected = results(reference, inputs, **MASKS[name])
    assert_same(results(fused, inputs, **MASKS[name]), expected)
    for size in (1, 3, 7, 64):
        tiled = results(partial(flash_attention, block_size=size), inputs, **MASKS[name])
        assert_same(tiled, expected)


@pytest.mark.parametrize("attention", ALL.values(), ids=ALL)
def test_gradients_numerically(attention):
    inputs = qkv(batch=1, heads=2, kv_heads=1, queries=3, keys=5, d_head=2, d_value=3)
    assert torch.autograd.gradcheck(partial(attention, is_causal=True), inputs)


@pytest.mark.parametrize("attention", ALL.values(), ids=ALL)
def test_queries_that_see_nothing_get_zeros(attention):
    inputs = qkv()
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[0, :, 3] = mask[1, :, :, 2] = mask[1, :, 6] = False
    out, *gradients = results(attention, inputs, mask)
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not out[0, :, 3].any() and not gradients[0][1, :, 6].any()
    assert not gradients[1][1, :, 2].any() and out[0, :, 2].any()


@pytest.mark.parametrize("attention", ALL.values(), ids=ALL)
@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_causal_with_fewer_queries_aligns_the_ends(attention, queries, kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    whole = attention(q, k, v, is_causal=True)
    torch.testing.assert_close(
        attention(q[:, :, -queries:], k, v, is_causal=True), whole[:, :, -queries:]
    )


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made meanwhile."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("attention", ALL.values(), ids=ALL)
def test_few_queries_make_no_square_of_the_keys(attention):
    q, k, v = (torch.randn(1, n, 4) for n in (3, 1000, 1000))
    with Largest() as largest:
        attention(q, k, v, is_causal=True)
    assert largest.numel < 10_000


@given(
    st.integers(1, 9), st.integers(0, 9), st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.integers(1, 12), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60)
def test_tiles_of_any_size(queries, more, heads, block_size, is_causal, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads[0], queries, 4), (heads[1], queries + more, 4), (heads[1], queries + more, 3)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    mask = torch.rand(queries, queries + more, generator=generator) > 0.3
    ours = flash_attention(q, k, v, mask, is_causal=is_causal, block_size=block_size)
    torch.testing.assert_close(ours, reference(q, k, v, mask, is_causal=is_causal))


@pytest.mark.parametrize("attention", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(attention, dtype):
    inputs = qkv(dtype=dtype)
    exact = results(reference, tuple(x.detach().double().requires_grad_() for x in inputs))
    ours = results(attention, inputs)
    assert {x.dtype for x in ours} == {dtype}
    for x, want in zip(ours, exact, strict=True):
        bound = 30 * torch.finfo(dtype).eps * want.abs().max()
        assert (x.double() - want).abs().max() <= bound


@pytest.mark.parametrize("attention", ALL.values(), ids=ALL)
def test_large_scores_and_a_scale(attention):
    q, k, v = qkv(dtype=torch.float32)
    out = attention(1e4 * q, 1e4 * k, v)
    assert out.isfinite().all()
    q, k, v = qkv()
    torch.testing.assert_close(
        attention(q, k, v, scale=0.0), v.mean(dim=-2, keepdim=True).expand_as(q)
    )


def test_torch_is_the_default_kernels_equal():
    q, k, v = qkv()
    ours = reference(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("attention", [reference, fused])
def test_dropout_drops_and_rescales(attention):
    q, k = torch.zeros(2, 1, 1, 400, 4)
    v = torch.ones(1, 1, 400, 1)
    out = attention(q, k, v, dropout=0.25)
    assert out.std() > 0.01 and out.mean().item() == pytest.approx(1, abs=0.02)


def test_flash_saves_nothing_quadratic():
    def saved(attention, n):
        sizes = []
        inputs = qkv(batch=1, heads=1, queries=n, keys=n, dtype=torch.float32)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.untyped_storage().nbytes()) or x, lambda x: x
        )
        with hooks:
            attention(*inputs, is_causal=True)
        return sum(sizes)

    assert saved(flash_attention, 512) == pytest.approx(2 * saved(flash_attention, 256), rel=0.01)
    assert saved(reference, 512) > 3.5 * saved(reference, 256)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(4, 8), (4, 8), (4, 8)], {}, r"q: .*\(..., heads, sequence, feature\), got shape \(4, 8"),
        ([(1, 4, 8), (4, 8), (4, 8)], {}, r"k: .*\(..., heads, sequence, feature\), got shape \(4"),
        (
            [(1, 4, 8), (1, 4, 8), (8,)],
            {},
            r"v: .*\(..., heads, sequence, feature\), got shape \(8",
        ),
        ([(2, 4, 8), (2, 5, 8), (2, 4, 8)], {}, r"v: expected \(2, 5\)"),
        ([(2, 4, 8), (2, 5, 6), (2, 5, 8)], {}, "k: expected batch and feature"),
        ([(1, 2, 4, 8), (3, 2, 5, 8), (3, 2, 5, 8)], {}, "k: expected batch and feature"),
        ([(3, 4, 8), (2, 5, 8), (2, 5, 8)], {}, "k: expected a divisor of 3 heads, got 2"),
        ([(2, 6, 8), (2, 5, 8), (2, 5, 8)], {"is_causal": True}, "q: expected at most as many"),
        ([(2, 4, 8)] * 3, {"scale": math.nan}, "scale: expected None or a finite number, got nan"),
        ([(2, 4, 8)] * 3, {"scale": "1"}, "scale: expected None or a finite number, got '1'"),
    ],
)
@pytest.mark.parametrize("attention", ALL.values(), ids=ALL)
def test_shapes_that_do_not_fit(untyped, attention, shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes), **options)


def test_unknown_backend(untyped):
    with pytest.raises(ValueError, match="backend: expected one of reference, torch, got 'jax'"):
        scaled_dot_product_attention(*qkv(), backend="jax")
    for layer in (MultiHeadAttention, partial(MultiHeadLatentAttention, d_latent=6, d_rope=4)):
        with pytest.raises(ValueError, match="backend: expected one of reference, torch, got 'jax"):
            layer(24, 4, backend="jax")
        with pytest.raises(ValueError, match="layout: expected one of half, interleaved, got 'me"):
            layer(24, 4, layout="meta")
        with pytest.raises(ValueError, match="scale: expected None or a finite number, got inf"):
            layer(24, 4, scale=math.inf)
    with pytest.raises(ValueError, match=r"block_size: expected a whole number .* got None"):
        flash_attention(*qkv(), block_size=None)
    for wrong in (1.0, -0.1, "0"):
        with pytest.raises(ValueError, match="dropout: expected at least 0 and less than 1, got"):
            scaled_dot_product_attention(*qkv(), dropout=wrong)
    with pytest.raises(
        ValueError, match=r"block_size: expected a whole number of at least 1, got 0"
    ):
        flash_attention(*qkv(), block_size=0)


@pytest.mark.parametrize("shape", [(6, 7), (7, 6), (3, 1, 7, 7), (2, 3, 7, 7), (1, 2, 4, 7, 7)])
@pytest.mark.parametrize("attention", [*ALL.values(), attention_weights], ids=[*ALL, "weights"])
def test_masks_that_do_not_spread_over_the_scores_are_named(untyped, attention, shape):
    inputs = qkv()[: 2 if attention is attention_weights else 3]
    expected = (
        r"mask: expected a shape that broadcasts to \(..., heads, queries, keys\), \(2, 4, 7, 7"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        attention(*inputs, torch.ones(shape, dtype=torch.bool))
    assert str(caught.value).endswith(f"got {shape}")


@pytest.mark.parametrize("shape", [(), (7,), (1, 7), (7, 1), (4, 1, 1), (2, 1, 7, 7), (1, 1, 1, 1)])
def test_masks_that_spread_are_taken(shape):
    inputs, mask = qkv(), torch.rand(shape) > 0.3
    whole = mask.expand(2, 4, 7, 7)
    for attention in ALL.values():
        torch.testing.assert_close(attention(*inputs, mask), reference(*inputs, whole))


# Log-sum-exps


def lse_of(q, k, mask=None, is_causal=False, scale=None):
    """The log-sum-exp of each query's scores, by the matrix."""
    k = k.repeat_interleave(q.size(-3) // k.size(-3), dim=-3)
    scores = (q.size(-1) ** -0.5 if scale is None else scale) * (q @ k.mT)
    causal = torch.ones(q.size(-2), k.size(-2)).tril(k.size(-2) - q.size(-2)).bool()
    mask = torch.ones_like(causal) if mask is None else mask
    return scores.masked_fill(~(mask & causal if is_causal else mask), -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "nothing"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_log_sum_exp_and_its_gradient(name, kv_heads):
    inputs = qkv(kv_heads=kv_heads, d_value=6)
    options = MASKS[name]
    out, lse = TINY_TILES(*inputs, **options, return_lse=True)
    assert lse.shape == (2, 4, 7) and torch.equal(out, TINY_TILES(*inputs, **options))
    expected = lse_of(*inputs[:2], **options)
    seen = expected.isfinite()
    torch.testing.assert_close(lse, expected)
    weight = torch.linspace(-1, 1, seen.sum(), dtype=torch.float64)
    losses = [
        (o * torch.linspace(-1, 2, o.numel()).view_as(o)).sum() + (s[seen] * weight).sum()
        for o, s in ((out, lse), (reference(*inputs, **options), expected))
    ]
    assert_same(*(torch.autograd.grad(loss, inputs) for loss in losses))


def test_the_log_sum_exp_where_a_query_sees_nothing():
    inputs, mask = qkv(), torch.ones(7, 7, dtype=torch.bool)
    mask[3] = False
    out, lse = TINY_TILES(*inputs, mask, return_lse=True)
    assert (lse[..., 3] == -torch.inf).all() and not out[:, :, 3].any()
    lse.logsumexp(-1).sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs[:2]) and not inputs[0].grad[:, :, 3].any()
    for dtype in (torch.float16, torch.bfloat16):
        half = [x.detach().to(dtype) for x in inputs]
        assert flash_attention(*half, return_lse=True)[1].dtype == torch.float32


def test_outputs_over_parts_of_the_keys_are_joined_by_their_log_sum_exps():
    inputs = qkv(kv_heads=2)
    q, k, v = inputs
    parts = [
        TINY_TILES(q, k[:, :, at], v[:, :, at], return_lse=True, scale=0.3)
        for at in (slice(0, 2), slice(2, 7))
    ]
    outs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
    joined = (lses.softmax(dim=0)[..., None] * outs).sum(dim=0)
    whole = reference(q, k, v, scale=0.3)
    found = [(o, *torch.autograd.grad(o.sin().sum(), inputs)) for o in (joined, whole)]
    assert_same(*found)


def test_the_gradient_of_the_log_sum_exp_numerically():
    inputs = qkv(batch=1, heads=2, kv_heads=1, queries=3, keys=5, d_head=2, d_value=3)
    tiles = partial(flash_attention, is_causal=True, block_size=2, return_lse=True)
    assert torch.autograd.gradcheck(tiles, inputs)


# The cache


def steps_of(lengths, n):
    """Split rows of ``lengths`` tokens into one padded prompt and single tokens; -1 is padding."""
    prompt = max(lengths) - n
    first = torch.full((len(lengths), prompt), -1)
    for row, length in enumerate(lengths):
        first[row, prompt - (length - n) :] = torch.arange(length - n)
    later = torch.tensor(lengths)[:, None] - n + torch.arange(n)
    return [first, *later.split(1, dim=1)]


def run(model, x, cache, pieces, rope):
    """Feed ``pieces`` of positions one after the other; return outputs by row and position."""
    outputs = torch.zeros_like(x)
    rows = torch.arange(len(x))[:, None]
    for piece in pieces:
        positions = cache.next_positions(piece) if isinstance(piece, int) else piece
        positions = positions.expand(len(x), -1)
        mask = cache.extend(piece)
        tokens = x[rows, positions.clamp(min=0)]
        out = model(tokens, rope=rope(positions), mask=mask, cache=cache[0])
        assert out.isfinite().all()
        given = positions >= 0
        outputs[rows.expand_as(positions)[given], positions[given]] = out[given]
    return outputs


def models(backend="torch"):
    torch.manual_seed(1)
    grouped = MultiHeadAttention(24, 4, n_kv_heads=2, backend=backend).double()
    latent = MultiHeadLatentAttention(
        24, 4, d_latent=5, d_rope=6, d_head=3, d_value=7, backend=backend
    ).double()
    return {
        "grouped": (grouped, {"n_kv_heads": 2, "d_head": 6}),
        "latent": (latent, {"n_kv_heads": 1, "d_head": 11, "d_value": 0}),
    }


PIECES = {
    "one by one": [1] * 12,
    "prompt, then one by one": [5] + [1] * 7,
    "chunks": [4, 3, 1, 4],
    "whole": [12],
    "positions": [torch.arange(6)[None], torch.arange(6, 7)[None], torch.arange(7, 12)[None]],
}


@pytest.mark.parametrize("kind", ["grouped", "latent"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("window", "spare"), [(None, 0), (4, 0), (4, 3), (1, 0), (12, 0), (50, 0)])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@torch.no_grad()
def test_cached_is_uncached_for_rows_alike(kind, backend, window, spare, pieces):
    model, sizes = models(backend)[kind]
    rope = RotaryEmbedding(6)
    x = torch.randn(3, 12, 24, dtype=torch.float64)
    whole = model(x, rope=rope(torch.arange(12)[None]), mask=causal_mask(12, window))
    cache = KVCache(3, 12, **sizes, window=window, spare=spare, dtype=torch.float64)
    torch.testing.assert_close(run(model, x, cache, pieces, rope), whole)
    assert cache.lengths.tolist() == [12] * 3


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.none() | st.integers(1, 9),
    st.integers(0, 3), st.randoms(use_true_random=False), st.sampled_from(["grouped", "latent"]),
)  # fmt: skip
@settings(max_examples=80)
@torch.no_grad()
def test_cached_is_uncached_for_rows_apart(lengths, window, spare, random, kind):
    """Random pieces with padding anywhere, rows of unequal lengths, some of which end early."""
    model, sizes = models()[kind]
    rope = RotaryEmbedding(6)
    x = torch.randn(len(lengths), max(lengths), 24, dtype=torch.float64)
    whole = model(
        x, rope=rope(torch.arange(max(lengths))[None]), mask=causal_mask(max(lengths), window)
    )
    cache = KVCache(len(lengths), 9, **sizes, window=window, spare=spare, dtype=torch.float64)
    done, pieces = [0] * len(lengths), []
    while any(a < b for a, b in zip(done, lengths, strict=True)):
        n = random.randint(1, 4)
        piece = torch.full((len(lengths), n), -1)
        for row, length in enumerate(lengths):
            for column in range(n):
                if done[row] < length and random.random() < 0.7:
                    piece[row, column] = done[row]
                    done[row] += 1
        pieces.append(piece)
    outputs = run(model, x, cache, pieces, rope)
    assert cache.lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        torch.testing.assert_close(outputs[row, :length], whole[row, :length])


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_left_padded_prompts_then_tokens(window):
    model, sizes = models()["grouped"]
    rope, lengths = RotaryEmbedding(6), [12, 9, 7]
    x = torch.randn(3, 12, 24, dtype=torch.float64)
    whole = model(x, rope=rope(torch.arange(12)[None]), mask=causal_mask(12, window))
    cache = KVCache(3, 12, **sizes, window=window, dtype=torch.float64)
    outputs = run(model, x, cache, steps_of(lengths, 3), rope)
    assert cache.next_positions(2).tolist() == [[12, 13], [9, 10], [7, 8]]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(outputs[row, :length], whole[row, :length])


def test_a_single_token_needs_no_mask_and_a_prompt_none():
    cache = KVCache(2, 8, 1, 4)
    assert cache.extend(3) is None and cache.extend(1) is None
    assert cache.extend(2).shape == (1, 1, 2, 6)
    ring = KVCache(2, 8, 1, 4, window=3)
    assert all(ring.extend(1) is None for _ in range(7)) and ring.slots == 3
    spare = KVCache(2, 8, 1, 4, window=3, spare=2)
    masks = [spare.extend(1) for _ in range(4)]
    assert masks[:3] == [None] * 3 and masks[3].tolist() == [[[[False, True, True, True]]]]


def test_cache_returns_views_of_memory_taken_once():
    cache = KVCache(2, 8, 1, 4, n_layers=3, d_value=2)
    assert cache.nbytes == 3 * 2 * 8 * (4 + 2) * 4
    cache.extend(3)
    k, v = cache[2].update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 2, requires_grad=True))
    assert k.shape == (2, 1, 3, 4) and v.shape == (2, 1, 3, 2) and not v.requires_grad
    assert k.untyped_storage().data_ptr() == cache[2].keys.untyped_storage().data_ptr()
    assert not cache[1].keys.any()


@pytest.mark.parametrize(("window", "spare", "back"), [(None, 0, 5), (4, 2, 3), (4, 0, 1)])
@torch.no_grad()
def test_truncate_takes_back(window, spare, back):
    model, sizes = models()["grouped"]
    rope = RotaryEmbedding(6)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    cache = KVCache(2, 12, **sizes, window=window, spare=spare, dtype=torch.float64)
    run(model, torch.randn_like(x), cache, [12 - back], rope)
    cache.reset()
    run(model, x, cache, [12 - back], rope)
    wrong = torch.cat([x[:, : 12 - back], torch.randn_like(x[:, :back])], dim=1)
    run(model, wrong, cache, [1] * back, rope)
    cache.truncate(12 - back)
    out = run(model, x, cache, [1] * back, rope)[:, 12 - back :]
    whole = model(x, rope=rope(torch.arange(12)[None]), mask=causal_mask(12, window))
    torch.testing.assert_close(out, whole[:, 12 - back :])


@torch.no_grad()
def test_truncate_rows_apart_and_reorder():
    model, sizes = models()["grouped"]
    rope = RotaryEmbedding(6)
    x = torch.randn(3, 10, 24, dtype=torch.float64)
    whole = model(x, rope=rope(torch.arange(10)[None]))
    cache = KVCache(3, 10, **sizes, dtype=torch.float64)
    run(model, x, cache, [8], rope)
    cache.truncate(torch.tensor([8, 5, 3]))
    cache.reorder(torch.tensor([2, 0, 0, 1]))
    assert cache.lengths.tolist() == [3, 8, 8, 5]
    y = x[[2, 0, 0, 1]]
    out = run(model, y, cache, [1, 1], rope)
    for row, (source, length) in enumerate([(2, 3), (0, 8), (0, 8), (1, 5)]):
        both = slice(length, length + 2)
        torch.testing.assert_close(out[row, both], whole[source, both])


@pytest.mark.parametrize("before", ["nothing", "reset", "truncate", "reorder"])
@pytest.mark.parametrize("stored", [False, True])
def test_nothing_is_stored_before_it_is_announced(before, stored):
    """Not at first, and not after rows were changed; for the fast way of one token, too."""
    cache, one = KVCache(2, 4, 1, 4), torch.ones(2, 1, 1, 4)
    if before != "nothing":
        cache.extend(1)
        if stored:
            cache[0].update(one, one)
        {"reset": cache.reset, "truncate": lambda: cache.truncate(0)}.get(
            before, lambda: cache.reorder(torch.tensor([1, 0]))
        )()
    for store, new in ((cache[0].update, one), (cache[0].update_one, one[:, :, 0])):
        with pytest.raises(ValueError, match="k: expected tokens announced by extend, got none"):
            store(new, new)
    if not stored:
        assert not cache[0].keys.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.extend(None), "position_ids: expected a whole number .* got None"),
        (lambda c: c.extend(1.5), "position_ids: expected a whole number .* got 1.5"),
        (lambda c: c.extend(torch.zeros(2, 1)), "position_ids: expected whole numbers.*float32"),
        (lambda c: c.extend(torch.tensor([0])), r"position_ids: .*\(rows, sequence\), got shape"),
        (lambda c: c.next_positions(0), "n: expected a whole number of at least 1, got 0"),
        (lambda c: c.next_positions(None), "n: expected a whole number .* got None"),
        (lambda c: c.truncate(torch.tensor([0])), r"lengths: .* \(2\), got shape \(1,\)"),
        (lambda c: c.truncate(0.5), "lengths: expected 0 to 0 in row 0, got 0.5"),
        (lambda c: c.truncate(None), "lengths: expected 0 to 0 in row 0, got None"),
        (lambda c: c.reorder(torch.tensor([0, 2])), "rows: expected 0 to 1, got 2"),
        (lambda c: c.reorder(torch.tensor([-1])), "rows: expected 0 to 1, got -1"),
        (lambda c: c.reorder(torch.tensor([], dtype=torch.int64)), "rows: .* 0 to 1, got none"),
        (lambda c: c.reorder([0, 1]), "rows: expected a tensor of whole numbers, got"),
        (lambda c: (c.extend(1), c[0].update(None, None)), "k: expected a tensor of floats, got N"),
    ],
)
def test_what_a_cache_cannot_take_is_named(untyped, call, message):
    cache = KVCache(2, 4, 1, 4)
    with pytest.raises(ValueError, match=message):
        call(cache)


def test_cache_refuses(untyped):
    cache = KVCache(2, 4, 1, 4)
    with pytest.raises(ValueError, match="at most 4 tokens in a row, the capacity, got 5"):
        cache.extend(5)
    with pytest.raises(
        ValueError, match="position_ids: expected a whole number of at least 1, got 0"
    ):
        cache.extend(0)
    assert cache.lengths.tolist() == [0, 0]
    cache.extend(torch.tensor([[0, 1], [-1, 0]]))
    with pytest.raises(ValueError, match=r"row 1 to go on from 1, with -1 for padding, got \[2\]"):
        cache.extend(torch.tensor([[2], [2]]))
    with pytest.raises(ValueError, match=r"row 0 to go on from 2.* got \[-2\]"):
        cache.extend(torch.tensor([[-2], [1]]))
    with pytest.raises(ValueError, match="positions of 2 rows, or of one for all, got 3"):
        cache.extend(torch.zeros(3, 1, dtype=torch.long))
    for rows, n in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match="k: expected 2 announced tokens in each of 2 rows"):
            cache[0].update(torch.zeros(rows, 1, n, 4), torch.zeros(rows, 1, n, 4))
    with pytest.raises(ValueError, match=r"\(..., 1, 2, 4\), got \(2, 3, 2, 4\)"):
        cache[0].update(torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4))
    with pytest.raises(ValueError, match=r"v: .*\(..., 1, 2, 4\), got \(2, 1, 2, 1\)"):
        cache[0].update(torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 1))
    cache[0].update(torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4))
    with pytest.raises(ValueError, match="k: expected tokens announced by extend"):
        cache[0].update(torch.zeros(2, 1, 2, 4), torch.zeros(2, 1, 2, 4))
    with pytest.raises(ValueError, match="lengths: expected 0 to 1 in row 1, got 2"):
        cache.truncate(2)
    with pytest.raises(ValueError, match="lengths: expected 0 to 2 in row 0, got -1"):
        cache.truncate(-1)
    ring = KVCache(1, 9, 1, 4, window=4, spare=1)
    ring.extend(20)
    with pytest.raises(ValueError, match="lengths: expected 18 to 20 in row 0, got 17"):
        ring.truncate(17)
    ring.truncate(18)
    with pytest.raises(ValueError, match="at most 4 tokens"):
        KVCache(1, 4, 1, 4, window=5).extend(5)
    sizes = {"batch_size": 1, "capacity": 4, "n_kv_heads": 1, "d_head": 4}
    for name in (*sizes, "n_layers", "window"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            KVCache(**sizes | {name: 0})


# The cache in compiled code


@pytest.fixture
def compiled():
    """Compile a step anew, as one graph; ``compiled.graphs()`` says how many were made since."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def compile_step(model, cache):
        def step(tokens, positions, rope):
            mask = cache.extend(positions)
            return model(tokens, rope=rope, mask=mask, cache=cache[0])

        return torch.compile(step, backend="eager", fullgraph=True, dynamic=False)

    compile_step.graphs = lambda: counters["stats"]["unique_graphs"]
    yield compile_step
    torch._dynamo.reset()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("kind", "window", "spare"),
    [("grouped", None, 0), ("latent", 4, 0), ("grouped", 4, 3), ("grouped", 1, 0)],
)
@torch.no_grad()
def test_a_step_with_a_cache_is_compiled_once(compiled, kind, window, spare):
    """A graph for the prompt and one for all single tokens; the same numbers as without a cache."""
    model, sizes = models()[kind]
    rope = RotaryEmbedding(6)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    whole = model(x, rope=rope(torch.arange(12)[None]), mask=causal_mask(12, window))
    cache = KVCache(2, 12, **sizes, window=window, spare=spare, dtype=torch.float64)
    step, outputs = compiled(model, cache), []
    for piece in torch.arange(12).split([5, *[1] * 7]):
        n = len(piece)
        outputs.append(step(x[:, piece], n, rope(cache.next_positions(n).expand(2, -1))))
    assert compiled.graphs() == 2
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    assert cache.lengths.tolist() == [12, 12]
    cache.truncate(11)  # outside of compiled code the lengths are known again
    again = step(x[:, [11]], 1, rope(torch.tensor([[11], [11]])))
    torch.testing.assert_close(again, whole[:, 11:])
    assert compiled.graphs() == 2


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("kind", "window"), [("latent", None), ("grouped", 4)])
@torch.no_grad()
def test_compiled_rows_apart_with_padding(compiled, kind, window):
    """Positions as a tensor, -1 for padding before, between and after; a prompt beyond the ring."""
    model, sizes = models()[kind]
    rope = RotaryEmbedding(6)
    x = torch.randn(3, 12, 24, dtype=torch.float64)
    whole = model(x, rope=rope(torch.arange(12)[None]), mask=causal_mask(12, window))
    pieces = [
        torch.tensor([[-1, 0, -1, 1, 2, 3, 4], [0, -1, -1, -1, -1, 1, -1], [0, 1, 2, 3, 4, 5, 6]]),
        torch.tensor([[5], [-1], [7]]),
        torch.tensor([[-1], [-1], [-1]]),
        torch.tensor([[6], [2], [-1]]),
        torch.tensor([[7, -1], [3, 4], [8, 9]]),
    ]
    cache = KVCache(3, 12, **sizes, window=window, dtype=torch.float64)
    step, rows = compiled(model, cache), torch.arange(3)[:, None]
    for positions in pieces:
        out = step(x[rows, positions.clamp(min=0)], positions, rope(positions))
        given = positions >= 0
        expected = whole[given.nonzero()[:, 0], positions[given]]
        torch.testing.assert_close(out[given], expected)
    assert cache.lengths.tolist() == [8, 5, 10] and compiled.graphs() == 3
    cache.reorder(torch.tensor([2, 0]))
    assert cache.next_positions(1).tolist() == [[10], [8]]


@pytest.mark.usefixtures("untyped")
@torch.no_grad()
def test_compiled_steps_go_on_from_plain_ones(compiled):
    model, sizes = models()["grouped"]
    rope = RotaryEmbedding(6)
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    whole = model(x, rope=rope(torch.arange(12)[None]))
    for capacity in (12, 14):  # another cache, whose size becomes a symbol
        cache = KVCache(2, capacity, **sizes, dtype=torch.float64)
        run(model, x, cache, [5], rope)
        step = compiled(model, cache)
        outputs = [step(x[:, t : t + 1], 1, rope(torch.full((2, 1), t))) for t in range(5, 11)]
        assert cache.lengths.tolist() == [11, 11]
        outputs.append(run(model, x, cache, [1], rope)[:, 11:])
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole[:, 5:])


@pytest.mark.usefixtures("untyped")
@torch.no_grad()
def test_compiled_steps_check_on_the_device(compiled):
    model, sizes = models()["grouped"]
    cache = KVCache(2, 6, **sizes, dtype=torch.float64)
    step, x = compiled(model, cache), torch.randn(2, 6, 24, dtype=torch.float64)
    step(x, 6, None)
    with pytest.raises(RuntimeError, match="position_ids: expected no row to grow beyond"):
        step(x[:, :1], 1, None)
    cache = KVCache(2, 6, **sizes, dtype=torch.float64)
    step = compiled(model, cache)
    with pytest.raises(RuntimeError, match="position_ids: expected rows to go on"):
        step(x[:, :2], torch.tensor([[0, 1], [1, 2]]), None)


# Modules


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_backends_of_the_modules_agree(kind):
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    rope = RotaryEmbedding(6)(torch.arange(9)[None])
    found = []
    for backend in ("reference", "torch"):
        model = models(backend)[kind][0]
        out = model(x, rope=rope)
        found.append((out, *torch.autograd.grad(out.sin().sum(), [x, *model.parameters()])))
    assert_same(*found)


def test_equals_torchs_multi_head_attention():
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).double()
    ours = MultiHeadAttention(24, 4, bias=True).double()
    with torch.no_grad():
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            getattr(ours, name).weight.copy_(theirs.in_proj_weight.view(3, 24, 24)[i])
            getattr(ours, name).bias.copy_(theirs.in_proj_bias.view(3, 24)[i])
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    hidden = ~causal_mask(9)
    a, b = ours(x), theirs(x, x, x, attn_mask=hidden, need_weights=False)[0]
    grads = [torch.autograd.grad(out.sin().sum(), x) for out in (a, b)]
    assert_same((a, *grads[0]), (b, *grads[1]))


def gradients(out, x, model):
    return out.detach(), *torch.autograd.grad(out.sin().sum(), [x, *model.parameters()])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_transformers_llama_and_qwen3(family, kv_heads):
    import transformers
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3

    name, module = {"llama": ("Llama", modeling_llama), "qwen3": ("Qwen3", modeling_qwen3)}[family]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        attn_implementation="eager",
    )
    theirs = getattr(module, f"{name}Attention")(config, 0).double()
    norm = partial(nn.RMSNorm, eps=config.rms_norm_eps) if family == "qwen3" else None
    ours = MultiHeadAttention(24, 4, n_kv_heads=kv_heads, d_head=8, qk_norm=norm).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    cos, sin = RotaryEmbedding(8, config.rope_parameters["rope_theta"])(torch.arange(9)[None])
    bias = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~causal_mask(9), -torch.inf)
    doubled = tuple(torch.cat([y, y], dim=-1).double() for y in (cos, sin))
    a, b = ours(x, rope=(cos, sin)), theirs(x, doubled, bias[None, None])[0]
    tolerance = {"atol": 1e-4, "rtol": 1e-4}  # ours rotates in float32
    names = [name for name, _ in theirs.named_parameters()]
    assert names and {name for name, _ in ours.named_parameters()} == set(names)
    theirs_first = [dict(ours.named_parameters())[name] for name in names]
    grads = (
        torch.autograd.grad(a.sin().sum(), [x, *theirs_first]),
        torch.autograd.grad(b.sin().sum(), [x, *theirs.parameters()]),
    )
    assert_same((a, *grads[0]), (b, *grads[1]), **tolerance)


@pytest.mark.parametrize("query_latent", [None, 10])
def test_equals_transformers_deepseek(query_latent):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=query_latent,
        kv_lora_rank=7,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=3,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, 0).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MultiHeadLatentAttention(
        24,
        4,
        d_latent=7,
        d_rope=6,
        d_head=5,
        d_value=3,
        d_query_latent=query_latent,
        norm=partial(nn.RMSNorm, eps=1e-6),
    ).double()
    names = {
        "q_proj": "q_proj",
        "q_a_proj": "q_proj.down",
        "q_a_layernorm": "q_proj.norm",
        "q_b_proj": "q_proj.up",
        "kv_a_proj_with_mqa": "kv_down_proj",
        "kv_a_layernorm": "kv_norm",
        "kv_b_proj": "kv_up_proj",
        "o_proj": "o_proj",
    }
    state = {}
    for name, value in theirs.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        state[f"{names[layer]}.{kind}"] = value.clone()
    # DeepSeek's rotary features come in interleaved pairs, ours in halves.
    order = interleaved_to_half(6)
    last = "q_proj.up.weight" if query_latent else "q_proj.weight"
    by_head = state[last].view(4, 11, -1)
    by_head[:, 5:] = by_head[:, 5:][:, order]
    state["kv_down_proj.weight"][7:] = state["kv_down_proj.weight"][7:][order]
    ours.load_state_dict(state)
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    cos, sin = RotaryEmbedding(6)(torch.arange(9)[None])
    bias = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~causal_mask(9), -torch.inf)
    doubled = tuple(torch.cat([y, y], dim=-1).double() for y in (cos, sin))
    a, b = ours(x, rope=(cos, sin)), theirs(x, doubled, bias[None, None])[0]
    grads = [torch.autograd.grad(out.sin().sum(), x) for out in (a, b)]
    assert_same((a, *grads[0]), (b, *grads[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("d_rope", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_the_other_layout_with_permuted_rows_is_the_same(d_rope, bias):
    """Meta's rows in an interleaved layer, and the same rows permuted in a half-split one."""
    sizes = {"n_kv_heads": 2, "d_rope": d_rope, "bias": bias, "qk_norm": nn.RMSNorm}
    meta = MultiHeadAttention(24, 4, **sizes, layout="interleaved").double()
    ours = MultiHeadAttention(24, 4, **sizes, d_head=6).double()
    state = dict(meta.state_dict())
    for name in state:
        heads = {"q_proj": 4, "k_proj": 2, "q_norm": 1, "k_norm": 1}.get(name.split(".")[0])
        if heads:
            nn.init.normal_(state[name])
            state[name] = change_rope_layout(state[name], heads, "half", d_rope=d_rope)
    ours.load_state_dict(state)
    x, rope = torch.randn(2, 9, 24).double(), RotaryEmbedding(d_rope or 6)(torch.arange(9)[None])
    torch.testing.assert_close(ours(x, rope=rope), meta(x, rope=rope), rtol=1e-9, atol=1e-9)
    patterns = [attention_pattern(layer, x, rope=rope) for layer in (ours, meta)]
    torch.testing.assert_close(*patterns, rtol=1e-9, atol=1e-9)
    wrong = MultiHeadAttention(24, 4, **sizes).double()
    wrong.load_state_dict(meta.state_dict())
    assert not torch.allclose(wrong(x, rope=rope), meta(x, rope=rope), atol=1e-3)


def test_part_of_each_head_rotates_as_in_phi():
    from transformers import PhiConfig
    from transformers.models.phi.modeling_phi import PhiAttention, PhiRotaryEmbedding

    config = PhiConfig(
        hidden_size=32,
        num_attention_heads=2,
        partial_rotary_factor=0.25,
        attn_implementation="eager",
    )
    theirs = PhiAttention(config, 0).double()
    ours = MultiHeadAttention(32, 2, bias=True, d_rope=4).double()
    state = {name.replace("dense", "o_proj"): w for name, w in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x, positions = torch.randn(2, 9, 32, dtype=torch.float64), torch.arange(9)[None]
    bias = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~causal_mask(9), -torch.inf)
    expected = theirs(x, PhiRotaryEmbedding(config)(x, positions), bias[None, None])[0]
    got = ours(x, rope=RotaryEmbedding(4)(positions))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_scale_of_ones_own(backend):
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    torch.manual_seed(3)
    plain = MultiHeadAttention(24, 4, backend=backend).double()
    scaled = MultiHeadAttention(24, 4, backend=backend, scale=6**-0.5 * 4).double()
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.q_proj.weight.mul_(4)
    torch.testing.assert_close(scaled(x), plain(x))
    patterns = [attention_pattern(layer, x) for layer in (plain, scaled)]
    torch.testing.assert_close(*patterns)
    sizes = {"d_latent": 5, "d_rope": 6, "d_head": 3, "backend": backend}
    plain = MultiHeadLatentAttention(24, 4, **sizes).double()
    scaled = MultiHeadLatentAttention(24, 4, **sizes, scale=9**-0.5 * 4).double()
    scaled.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.q_proj.weight.mul_(4)
    torch.testing.assert_close(scaled(x), plain(x))
    cache = KVCache(2, 9, 1, 11, d_value=0, dtype=torch.float64)  # absorbed
    parts = [scaled(x[:, t : t + 1], mask=cache.extend(1), cache=cache[0]) for t in range(9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), scaled(x))


def test_equals_transformers_deepseek_stretched_by_yarn_and_interleaved():
    """Its files as they are, and the scale that it has under YaRN."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=7,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=3,
        max_position_embeddings=256,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, 0).double()
    scale = 11**-0.5 * (0.1 * math.log(4.0) + 1) ** 2
    assert theirs.scaling == pytest.approx(scale)
    sizes = {"d_latent": 7, "d_rope": 6, "d_head": 5, "d_value": 3, "layout": "interleaved"}
    norm = partial(nn.RMSNorm, eps=1e-6)
    ours = MultiHeadLatentAttention(24, 4, **sizes, norm=norm, scale=scale).double()
    names = {"kv_a_proj_with_mqa": "kv_down_proj", "kv_a_layernorm": "kv_norm"}
    names |= {"kv_b_proj": "kv_up_proj"}
    state = {}
    for name, weight in theirs.state_dict().items():
        layer, kind = name.split(".")
        state[f"{names.get(layer, layer)}.{kind}"] = weight
    ours.load_state_dict(state)
    x, positions = torch.randn(2, 9, 24, dtype=torch.float64), torch.arange(9)[None]
    bias = torch.zeros(9, 9, dtype=torch.float64).masked_fill(~causal_mask(9), -torch.inf)
    expected = theirs(x, DeepseekV3RotaryEmbedding(config)(x, positions), bias[None, None])[0]
    scaling = RopeScaling("yarn", 4.0, 64, attention_factor=1.0)
    got = ours(x, rope=RotaryEmbedding(6, scaling=scaling)(positions))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


LAYERS = {
    "heads": lambda **options: MultiHeadAttention(16, 2, **options),
    "latent": lambda **options: MultiHeadLatentAttention(
        16, 2, d_latent=6, d_rope=4, d_head=4, **options
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda layer: layer(torch.randn(5, 16)),
            r"x: expected floats of shape \(batch, sequence, 16\), got shape \(5, 16\)",
        ),
        (lambda layer: layer(torch.randn(2, 5, 8)), r"x: .*sequence, 16\), got shape \(2, 5, 8\)"),
        (
            lambda layer: layer(torch.zeros(2, 5).long()),
            "x: expected floats, got a tensor of torch",
        ),
        (lambda layer: layer([1.0]), r"x: expected a tensor of floats, got \[1.0\]"),
        (
            lambda layer: layer(torch.randn(2, 5, 16), mask=torch.ones(4, 4).bool()),
            r"mask: expected a shape that broadcasts to .*\(2, 2, 5, 5\), got \(4, 4\)",
        ),
        (lambda layer: layer(torch.randn(2, 5, 16), mask=torch.ones(5, 5)), "mask: .* booleans"),
        (
            lambda layer: layer(torch.randn(2, 5, 16), rope=RotaryEmbedding(4)),
            "rope: expected the pair of cosines and sines that a RotaryEmbedding returns, got Rot",
        ),
        (
            lambda layer: layer(torch.randn(2, 5, 16), rope=RotaryEmbedding(6)(torch.arange(5))),
            r"cos: expected floats of shape \(..., 5, ",
        ),
        (
            lambda layer: layer(torch.randn(2, 5, 16), cache=KVCache(2, 5, 2, 8)),
            r"cache: expected the cache of one layer, such as cache\[0\] of a KVCache, got a KVCa",
        ),
        (lambda layer: layer.project(torch.randn(5, 16)), r"x: expected .*\(batch, sequence, 16\)"),
    ],
)
def test_what_a_layer_cannot_take_is_named(untyped, kind, call, message):
    with pytest.raises(ValueError, match=message):
        call(LAYERS[kind]())


def test_biases_dropout_and_state(untyped):
    model = MultiHeadAttention(24, 4, bias=True, output_bias=False, dropout=0.5)
    assert set(model.state_dict()) == {
        *(
            f"{name}.{kind}"
            for name in ("q_proj", "k_proj", "v_proj")
            for kind in ("weight", "bias")
        ),
        "o_proj.weight",
    }
    x = torch.randn(1, 5, 24)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 24, "n_heads": 5}, "n_heads: expected a divisor of d_model, 24, got 5"),
        ({"d_model": 24, "n_heads": 4, "n_kv_heads": 3}, "n_kv_heads: expected a divisor of"),
        ({"d_model": 24, "n_heads": 0}, "n_heads: expected at least 1, got 0"),
        ({"d_model": 24, "n_heads": 4, "n_kv_heads": 0}, "n_kv_heads: expected at least 1"),
        ({"d_model": 24, "n_heads": 4, "d_head": 0}, "d_head: expected at least 1, got 0"),
        ({"d_model": 0, "n_heads": 4}, "d_model: expected at least 1, got 0"),
        ({"d_model": 24, "n_heads": 4, "d_rope": 3}, "d_rope: expected an even number, got 3"),
        ({"d_model": 24, "n_heads": 4, "d_rope": 8}, "d_rope: expected at most d_head, 6, got 8"),
    ],
)
def test_heads_that_cannot_be(untyped, arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**arguments)


def test_a_latent_head_rotates_pairs(untyped):
    with pytest.raises(ValueError, match="d_rope: expected an even number, got 3"):
        MultiHeadLatentAttention(24, 4, d_latent=6, d_rope=3)
    for name in ("d_latent", "d_value", "d_query_latent"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            MultiHeadLatentAttention(24, 4, **{"d_latent": 6, "d_rope": 4, name: 0})


def test_defaults():
    """What is left out is what the docstrings say."""
    layer = MultiHeadAttention(24, 4)
    assert (layer.n_kv_heads, layer.d_head, layer.dropout, layer.backend) == (4, 6, 0.0, "torch")
    assert (layer.layout, layer.d_rope, layer.scale, layer.q_norm) == ("half", None, None, None)
    assert all(p.bias is None for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    assert MultiHeadAttention(24, 4, bias=True).o_proj.bias is not None
    latent = MultiHeadLatentAttention(24, 4, d_latent=5, d_rope=2)
    assert (latent.d_head, latent.d_value, latent.dropout, latent.backend) == (6, 6, 0.0, "torch")
    assert latent.scale == 8**-0.5 and latent.layout == "half"
    assert isinstance(latent.q_proj, nn.Linear) and isinstance(latent.kv_norm, nn.RMSNorm)
    cache = KVCache(3, 5, 2, 4)
    assert len(cache._layers) == 1 and cache.slots == 5 and cache.window is None
    assert cache[0].values.shape == (3, 2, 5, 4) and cache[0].keys.dtype == torch.float32
    assert KVCache(1, 9, 1, 1, window=4).slots == 4
    q, k, v = qkv()
    assert torch.equal(scaled_dot_product_attention(q, k, v), reference(q, k, v, scale=8**-0.5))
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k, v, block_size=64))
    assert torch.equal(softmax(q), softmax(q, dim=-1)) and causal_mask(3).tolist()[2] == [True] * 3
    page = Page(show_attention(["a", "b"], torch.eye(2)[None]).html)
    assert (page.data["layer"], page.data["head"], page.data["token"]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax([1.0]), "scores: expected a tensor of floats, got"),
        (lambda: softmax(torch.ones(2).long()), "scores: expected floats, got a tensor of torch"),
        (lambda: softmax(torch.ones(2, 3), dim=2), "dim: expected -2 to 1, got 2"),
        (lambda: softmax(torch.ones(2, 3), dim=-3), "dim: expected -2 to 1, got -3"),
        (lambda: softmax(torch.ones(2, 3), dim=0.0), "dim: expected -2 to 1, got 0.0"),
        (lambda: softmax(torch.tensor(1.0), dim=1), "dim: expected -1 to 0, got 1"),
        (lambda: softmax(torch.ones(3), dim=1), "dim: expected -1 to 0, got 1"),
        (lambda: softmax(torch.ones(3), dim=-2), "dim: expected -1 to 0, got -2"),
        (lambda: softmax(torch.ones(2, 0)), r"scores: expected at least one .* got shape \(2, 0\)"),
        (lambda: attention_mask(torch.ones(2), torch.ones(2)), "query_positions: expected whole"),
        (
            lambda: attention_mask(torch.zeros(1, 2).long(), torch.zeros(2).long()),
            r"key_positions: .* \(batch, key\), got shape \(2,\)",
        ),
        (
            lambda: attention_mask(*[torch.zeros(1, 2).long()] * 2, window=0),
            "window: expected at least 1, got 0",
        ),
        (lambda: causal_mask(3, device="nowhere"), "device: expected .*, got 'nowhere'"),
        (lambda: KVCache(1, 1, 1, 1, device=""), "device: expected a device .* got ''"),
        (lambda: KVCache(1, 1, 1, 1, dtype=None), "dtype: expected a dtype of torch, got None"),
        (lambda: KVCache(1, 1, 1, 1, spare=None), "spare: expected a whole number, got None"),
        (lambda: causal_mask(0), "sequence: expected at least 1, got 0"),
        (lambda: causal_mask(3, window=0), "window: expected at least 1, got 0"),
        (lambda: attention_pattern(nn.Linear(2, 2), None), "attention: expected a MultiHeadAttent"),
    ],
)
def test_what_functions_cannot_take_is_named(untyped, call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_qk_norm_bounds_the_scores():
    """A normalized query has norm at most sqrt(d_head), so a score is at most sqrt(d_head)."""
    model = MultiHeadAttention(24, 4, qk_norm=nn.RMSNorm)
    q = model.q_norm(100 * torch.randn(50, 6))
    k = model.k_norm(100 * torch.randn(50, 6))
    assert (q @ k.mT / math.sqrt(6)).abs().max() <= math.sqrt(6) + 1e-4


# The figure


class Page(HTMLParser):
    """What a browser would make of the figure: texts by tag, and the data."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.cells, self.scripts = [], [], []
        self.feed(html)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        elif self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def test_the_figure_holds_data_table_and_script():
    tokens = ["<b>", "&", '"a"', "</script>"]
    weights = causal_mask(4).float()[None, None].repeat(2, 3, 1, 1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    html = show_attention(tokens, weights, layer=-1, head=1)._repr_html_()
    page = Page(html)
    assert page.open == [] and html.count("</script>") == 2
    assert page.data["tokens"] == tokens and page.data["weights"][1][2][1] == [50, 50, 0, 0]
    assert (page.data["layer"], page.data["head"], page.data["token"]) == (1, 1, 3)
    assert page.cells[:3] == ["at", "token", "layer 1, head 1"]
    assert page.cells[8:11] == ["0", "<b>", "<b> at 0 (100 %)"]
    assert html == show_attention(tokens, weights, layer=-1, head=1).html, "the same each time"
    assert "http" not in html, "nothing is loaded from anywhere"


def test_the_figure_of_one_layer_and_of_nothing():
    page = Page(show_attention(["a", "b"], torch.zeros(1, 2, 2)).html)
    assert page.data["weights"] == [[[[0, 0], [0, 0]]]] and page.cells[-1] == ""


def test_the_figure_refuses(untyped):
    with pytest.raises(ValueError, match=r"weights: expected \(layers, heads, 2, 2\) for 2 tokens"):
        show_attention(["a", "b"], torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="layer: expected -1 to 0, got 1"):
        show_attention(["a", "b"], torch.zeros(3, 2, 2), layer=1)
    with pytest.raises(ValueError, match="token: expected -2 to 1, got 2"):
        show_attention(["a", "b"], torch.zeros(3, 2, 2), token=2)
    with pytest.raises(ValueError, match="head: expected -3 to 2, got -4"):
        show_attention(["a", "b"], torch.zeros(3, 2, 2), head=-4)
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        show_attention([], torch.zeros(1, 0, 0))
    with pytest.raises(ValueError, match="weights: expected a tensor of floats, got"):
        show_attention(["a"], [[[1.0]]])
    with pytest.raises(ValueError, match="weights: expected floats, got a tensor of torch"):
        show_attention(["a"], torch.ones(1, 1, 1).long())
    for wrong in (math.nan, 3.5, -1.5):
        with pytest.raises(ValueError, match=f"weights: expected numbers from 0 to 1, got {wrong}"):
            show_attention(["a"], torch.tensor([[[wrong]]]))
    with pytest.raises(ValueError, match="tokens: expected a list of texts, got"):
        show_attention([1, 2], torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"head: expected -1 to 0, got 0\.5"):
        show_attention(["a"], torch.zeros(1, 1, 1), head=0.5)


# Looking inside


def test_the_pattern_is_what_the_module_uses():
    layer = MultiHeadAttention(24, 4, n_kv_heads=2, qk_norm=nn.RMSNorm).double()
    x, rope = torch.randn(2, 9, 24, dtype=torch.float64), RotaryEmbedding(6)(torch.arange(9)[None])
    for mask in (None, causal_mask(9, 3)):
        weights = attention_pattern(layer, x, rope=rope, mask=mask)
        v = layer.v_proj(x).view(2, 9, 2, 6).transpose(1, 2).repeat_interleave(2, dim=1)
        out = layer.o_proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, layer(x, rope=rope, mask=mask))
        assert (weights[:, :, ~causal_mask(9)] == 0).all()


def test_weights_sum_to_one_or_nothing():
    q, k, _ = qkv(kv_heads=2)
    mask = torch.rand(2, 4, 7, 7) > 0.5
    mask[0, 0, 3] = False
    total = attention_weights(q, k, mask).sum(dim=-1)
    torch.testing.assert_close(total, mask.any(dim=-1).double())


def test_a_mask_must_be_boolean(untyped):
    for attention in ALL.values():
        with pytest.raises(ValueError, match="mask: expected booleans"):
            attention(*qkv(), torch.zeros(7, 7))


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_must_be_a_probability(untyped, dropout):
    with pytest.raises(ValueError, match="dropout: expected at least 0 and less than 1"):
        MultiHeadAttention(24, 4, dropout=dropout)
    with pytest.raises(ValueError, match="dropout: expected at least 0 and less than 1"):
        MultiHeadLatentAttention(24, 4, d_latent=6, d_rope=4, dropout=dropout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_modules_and_caches_in_other_dtypes(dtype):
    for model, sizes in models().values():
        model, rope = model.to(dtype), RotaryEmbedding(6)
        x = torch.randn(2, 6, 24).to(dtype)
        whole = model(x, rope=rope(torch.arange(6)[None]))
        cache = KVCache(2, 6, **sizes, dtype=dtype)
        cached = run(model, x, cache, [2, 1, 3], rope)
        assert whole.dtype == cached.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
        assert (cached - whole).abs().max() <= bound * whole.abs().max()


@pytest.mark.parametrize("counts", [[3, 3], [3, 1]])
def test_one_token_for_each_row_is_stored_as_update_does(counts):
    given = [torch.randn(2, 2, 3, 4) for _ in range(2)]
    last = [torch.randn(2, 2, 1, 4) for _ in range(2)]
    seen = []
    for one in (False, True):
        cache = KVCache(2, 8, 2, 4)
        ids = torch.tensor([[p if p < n else -1 for p in range(3)] for n in counts])
        cache.extend(ids)
        cache[0].update(*given)
        cache.extend(1)
        store = cache[0].update_one if one else cache[0].update
        seen.append(store(*(x[:, :, 0] if one else x for x in last)))
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs)
