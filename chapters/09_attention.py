# %% [markdown]
# # Attention
#
# > Let every token look up what it needs among all tokens before it: softly, so that it can be
# > learned; in heads, so that several look-ups happen at once; in tiles, so that it fits.
#
# (Draft: the exported code first.)

# %% tags=["remove-cell"]
#| default_exp attention

# %%
#| export
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from html import escape
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmbook.corpus import _check_at_least
from llmbook.positions import apply_rope

# %% [markdown]
# softmax


# %%
#| export
def softmax(scores: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """Turn scores along ``dim`` into weights that sum to one; safe for scores of any size.

    A score of -inf has weight 0, and where all of them are -inf so are all weights, without NaN.
    Computed in float32 at least, returned in the dtype of ``scores``.

    >>> softmax(torch.tensor([[1000.0, 1000.0], [-torch.inf, -torch.inf]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    peak = wide.detach().amax(dim, keepdim=True)
    weights = torch.exp(wide - peak.masked_fill(peak == -torch.inf, 0.0))
    total = weights.sum(dim, keepdim=True).clamp(min=1.0)  # the peak alone adds 1, if there is one
    return (weights / total).to(scores.dtype)


# %% [markdown]
# masks


# %%
#| export
def attention_mask(
    query_positions: Int64[Tensor, "batch queries"],
    key_positions: Int64[Tensor, "batch keys"],
    window: int | None = None,
) -> Bool[Tensor, "batch 1 queries keys"]:
    """Return where attention is allowed (True): to keys at or before the query, within the window.

    A position of -1 is padding: nothing attends to it, and it attends to nothing. ``window`` is
    how many positions a query sees, its own included; None is all.
    """
    _check_at_least(window=(1, window))
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    allowed = (key <= query) & (key >= 0)
    return allowed if window is None else allowed & (key > query - window)


def causal_mask(
    sequence: int, window: int | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "sequence sequence"]:
    """Return the mask of a sequence without padding: each position sees itself and those before.

    With a ``window``, only the last ``window`` of them, itself included.

    >>> causal_mask(4, window=2).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    _check_at_least(sequence=(1, sequence))
    positions = torch.arange(sequence, device=device)[None]
    return attention_mask(positions, positions, window)[0, 0]


# %% [markdown]
# sdpa


# %%
#| export
Backend = Literal["reference", "torch"]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> None:
    """Raise a ValueError unless queries, keys and values fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3:
            expected = "expected (..., heads, sequence, feature)"
            raise ValueError(f"{name}: {expected}, got the shape {tuple(x.shape)}")
    if k.shape[:-1] != v.shape[:-1]:
        expected = f"{tuple(k.shape[:-1])} before the last dimension, as in k"
        raise ValueError(f"v: expected {expected}, got {tuple(v.shape[:-1])}")
    if q.size(-1) != k.size(-1) or q.shape[:-3] != k.shape[:-3]:
        expected = f"batch and feature dimensions of q, {tuple(q.shape)}"
        raise ValueError(f"k: expected the {expected}, got {tuple(k.shape)}")
    if q.size(-3) % k.size(-3):
        raise ValueError(f"k: expected a divisor of {q.size(-3)} heads, got {k.size(-3)}")
    if is_causal and q.size(-2) > k.size(-2):
        expected = f"at most as many queries as keys, {k.size(-2)}"
        raise ValueError(f"q: expected {expected}, with is_causal, got {q.size(-2)}")


def _combined_mask(
    mask: Tensor | None, is_causal: bool, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Join ``mask`` with the causal one, in which the last query sees the last key."""
    if not is_causal or queries == 1:
        return mask
    causal = causal_mask(keys, device=device)[keys - queries :]
    return causal if mask is None else mask & causal


# %%
#| export
def _reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Attention as the equations have it."""
    group = q.size(-3) // k.size(-3)
    if group > 1:  # head h of the queries reads head h // group of the keys
        k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    scores = (q * scale) @ k.mT  # (..., n_heads, queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(softmax(scores), dropout) @ v


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, causal: bool
) -> Tensor:
    """The same by PyTorch's fused kernel."""
    grouped = q.size(-3) != k.size(-3)
    if grouped and q.size(-2) == 1 and (mask is None or mask.ndim < 3 or mask.size(-3) == 1):
        # One query a row: the heads of a group are rows of one matrix, and no key is copied.
        folded = q.reshape(*k.shape[:-2], -1, q.size(-1))
        out = F.scaled_dot_product_attention(folded, k, v, mask, dropout, scale=scale)
        return out.reshape(*q.shape[:-1], v.size(-1))
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


# %%
#| export
def scaled_dot_product_attention(
    q: Float[Tensor, "*batch n_heads queries d_head"],
    k: Float[Tensor, "*batch n_kv_heads keys d_head"],
    v: Float[Tensor, "*batch n_kv_heads keys d_value"],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "reference",
) -> Float[Tensor, "*batch n_heads queries d_value"]:
    """Return for each query the mean of the values, weighted by softmax(scale q k).

    ``mask`` is True where attention is allowed and broadcasts against (..., n_heads, queries,
    keys); a query that may attend to nothing gets zeros. ``is_causal`` aligns the ends: the last
    query sees all keys, the one before it all but the last. ``scale`` is 1/sqrt(d_head) unless
    given. Where ``n_heads`` is a multiple of ``n_kv_heads``, so many queries share keys and values.
    ``dropout`` is the probability with which a weight is dropped, always. Source: Vaswani et al.
    (2017), eq. 1; groups from Ainslie et al. (2023).
    """
    _check_shapes(q, k, v, is_causal)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    queries, keys = q.size(-2), k.size(-2)
    if backend == "torch" and is_causal and mask is None and queries == keys:
        return _torch_attention(q, k, v, None, scale, dropout, causal=True)
    mask = _combined_mask(mask, is_causal, queries, keys, q.device)
    if backend == "torch":
        return _torch_attention(q, k, v, mask, scale, dropout, causal=False)
    if backend == "reference":
        return _reference_attention(q, k, v, mask, scale, dropout)
    raise ValueError(f"backend: expected 'reference' or 'torch', got {backend!r}")


# %% [markdown]
# Cache: which slot holds which position


# %%
#| export
class _Step(NamedTuple):
    """Where the tokens of one step go in the cache, and which slots attention is to see."""

    rows: Tensor | None  # None: all rows are alike, and `slots` and `source` are those of each
    slots: slice | Tensor
    source: slice | Tensor
    used: int
    append: bool  # see the new tokens after the old slots, for writing loses some that are needed


def _positions_in_slots(lengths: list[int], slots: int, used: int, device: Any) -> Tensor:
    """Return which position each of the first ``used`` slots holds, for rows of these lengths.

    It is the largest below the length that equals the slot modulo ``slots``, or -1 for none.
    """
    last = torch.tensor(lengths, device=device)[:, None] - 1
    positions = last - (last - torch.arange(used, device=device)) % slots
    return positions.clamp(min=-1)


# %%
#| export
def _step_alike(
    start: int, n: int, slots: int, window: int | None, device: Any
) -> tuple[_Step, Tensor | None]:
    """Plan a step that takes every row from ``start`` to ``start + n``, and its mask if needed."""
    end, first = start + n, start % slots
    used = min(end, slots)
    step = _Step(None, slice(first, first + n), slice(0, n), used, False)
    in_window = window is None or (used if n == 1 else end) <= window
    if in_window and (n == 1 or start == 0):
        return step, None
    keys = _positions_in_slots([end], slots, used, device)
    queries = torch.arange(start, end, device=device)[None]
    return step, attention_mask(queries, keys, window)


def _step_apart(
    positions: Tensor, before: list[int], after: list[int], slots: int, window: int | None
) -> tuple[_Step, Tensor]:
    """Plan a step in which each row has positions of its own, -1 where it has none; and its mask."""
    append = positions.size(1) > 1 and max(after) > slots
    lengths, device = before if append else after, positions.device
    used = min(slots, max(lengths))
    overwritten = positions < torch.tensor(after, device=device)[:, None] - slots
    rows, source = ((positions >= 0) & ~overwritten).nonzero(as_tuple=True)
    step = _Step(rows, positions[rows, source] % slots, source, used, append)
    keys = _positions_in_slots(lengths, slots, used, device)
    keys = torch.cat([keys, positions], dim=1) if append else keys
    return step, attention_mask(positions, keys, window)


# %%
#| export
def _counted(positions: Tensor, lengths: list[int]) -> list[int]:
    """Return how many tokens ``positions`` adds to each row; raise unless they go on from there."""
    given = positions >= 0
    start = torch.tensor(lengths, device=positions.device)[:, None]
    expected = torch.where(given, start + given.cumsum(dim=1) - 1, -1)
    if not torch.equal(positions, expected):
        row = int((positions != expected).any(dim=1).nonzero()[0, 0])
        rule = f"row {row} to go on from {lengths[row]}, with -1 for padding"
        raise ValueError(f"position_ids: expected {rule}, got {positions[row].tolist()}")
    return given.sum(dim=1).tolist()


# %%
#| export
class _SlotTable:
    """Which slot of a cache holds which position: that of a row's position p is p % slots."""

    def __init__(self, batch_size: int, capacity: int, window: int | None, slots: int, device: Any):
        self.capacity, self.window, self.slots, self.device = capacity, window, slots, device
        self._lengths, self._step = [0] * batch_size, _Step(None, slice(0), slice(0), 0, False)

    @property
    def lengths(self) -> Int64[Tensor, " batch"]:
        """The number of tokens in each row, which is also its next position."""
        return torch.tensor(self._lengths, device=self.device)

    def next_positions(self, n: int) -> Int64[Tensor, "rows n"]:
        """Return the next ``n`` positions of each row; a single row if all rows are alike."""
        alike = min(self._lengths) == max(self._lengths)
        start = torch.tensor(self._lengths[:1] if alike else self._lengths, device=self.device)
        return start[:, None] + torch.arange(n, device=self.device)

    def _check_room(self, lengths: list[int]) -> None:
        bounded = self.window is None or self.window > self.capacity
        if bounded and max(lengths) > self.capacity:
            expected = f"at most {self.capacity} tokens in a row, the capacity"
            raise ValueError(f"position_ids: expected {expected}, got {max(lengths)}")


# %%
#| export
class _Announcing(_SlotTable):
    """A slot table to which tokens can be added."""

    def extend(
        self, position_ids: Int64[Tensor, "rows sequence"] | int
    ) -> Bool[Tensor, "batch_or_1 1 sequence keys"] | None:
        """Announce the next tokens; return the mask for what each layer's ``update`` will return.

        ``position_ids`` is how many tokens each row gets, or their positions: each row goes on from
        its length, and -1 marks padding, which is not stored. One row stands for all. The result is
        None where causal attention, aligned at the end, needs no mask: a prompt from the start, or
        one token each, if rows are alike and no window cuts. A ValueError tells of a row that
        would exceed the capacity, or of positions that do not go on from the last ones.
        """
        before, batch_size = self._lengths, len(self._lengths)
        if isinstance(position_ids, int):
            _check_at_least(position_ids=(1, position_ids))
            n, added, positions = position_ids, [position_ids] * batch_size, None
        else:
            positions = position_ids.expand(batch_size, -1)
            n, added = positions.size(1), _counted(positions, before)
        after = [length + new for length, new in zip(before, added, strict=True)]
        self._check_room(after)
        alike = min(before) == max(before) and min(added) == n
        if alike and (n == 1 or after[0] <= self.slots):
            self._step, mask = _step_alike(before[0], n, self.slots, self.window, self.device)
        else:
            if positions is None:
                positions = self.next_positions(n).expand(batch_size, -1)
            self._step, mask = _step_apart(positions, before, after, self.slots, self.window)
        self._lengths = after
        return mask


# %%
#| export
class LayerCache:
    """The keys and values of one layer, (batch, n_kv_heads, slots, feature): an item of a cache."""

    def __init__(self, table: _SlotTable, keys: Tensor, values: Tensor):
        self._table, self.keys, self.values = table, keys, values

    def update(
        self,
        k: Float[Tensor, "batch n_kv_heads sequence d_head"],
        v: Float[Tensor, "batch n_kv_heads sequence d_value"],
    ) -> tuple[
        Float[Tensor, "batch n_kv_heads keys d_head"],
        Float[Tensor, "batch n_kv_heads keys d_value"],
    ]:
        """Store keys and values of the announced tokens; return all that these may attend to.

        What is returned may be a view, which the next step changes. No gradient flows through it.
        """
        step = self._table._step
        return _write(self.keys, k, step), _write(self.values, v, step)


def _write(store: Tensor, new: Tensor, step: _Step) -> Tensor:
    new = new.to(store.dtype).detach()
    seen = store[:, :, : step.used]
    if step.append:
        seen = torch.cat([seen, new], dim=2)
    if step.rows is None:
        store[:, :, step.slots] = new
    else:
        store[step.rows, :, step.slots] = new[step.rows, :, step.source]
    return seen


# %%
#| export
class _Layers(_Announcing):
    """The layers of a cache, and what can be done to their rows."""

    _layers: list[LayerCache]

    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    @property
    def nbytes(self) -> int:
        """The size of all keys and values in bytes, in use or not."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self._lengths = [0] * len(self._lengths)

    def truncate(self, lengths: Int64[Tensor, " batch"] | int) -> None:
        """Forget the tokens of each row from position ``lengths`` on.

        A ValueError tells of a row that is shorter, or whose window reaches into what is lost.
        """
        before = self._lengths
        after = [lengths] * len(before) if isinstance(lengths, int) else lengths.tolist()
        for row, (old, new) in enumerate(zip(before, after, strict=True)):
            lost, oldest = old - self.slots, new + 1 - (self.window or new + 1)
            if not 0 <= new <= old or max(oldest, 0) < lost:
                least = 0 if lost <= 0 else lost - 1 + (self.window or 0)
                raise ValueError(f"lengths: expected {least} to {old} in row {row}, got {new}")
        self._lengths = after

    def reorder(self, rows: Int64[Tensor, " rows"]) -> None:
        """Make row i a copy of what row ``rows[i]`` was; there may be fewer or more than before."""
        self._lengths = [self._lengths[row] for row in rows.tolist()]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


# %%
#| export
class KVCache(_Layers):
    """The keys and values of all layers for the tokens read so far, in memory taken at once.

    Each step announces its tokens by ``extend``, which works out slots and mask once; then each
    layer calls ``cache[layer].update(k, v)``. ``capacity``, ``window`` and ``spare`` count tokens.
    With a ``window`` of at most ``capacity`` memory is a ring of ``window + spare`` slots, and rows
    may be of any length; ``truncate`` can then go back ``spare + 1`` tokens.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        n_kv_heads: int,
        d_head: int,
        *,
        n_layers: int = 1,
        d_value: int | None = None,
        window: int | None = None,
        spare: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        slots = _n_slots(batch_size, capacity, window, spare)
        super().__init__(batch_size, capacity, window, slots, device)
        _check_at_least(n_layers=(1, n_layers), n_kv_heads=(1, n_kv_heads))
        _check_at_least(d_head=(1, d_head), d_value=(0, d_value))
        shape, widths = (
            (batch_size, n_kv_heads, slots),
            (d_head, d_head if d_value is None else d_value),
        )
        # Zeros, for attention multiplies what is not yet written by 0, and 0 times NaN is NaN.
        memory = partial(torch.zeros, dtype=dtype, device=device)
        self._layers = [
            LayerCache(self, *(memory(*shape, width) for width in widths)) for _ in range(n_layers)
        ]


def _n_slots(batch_size: int, capacity: int, window: int | None, spare: int) -> int:
    _check_at_least(batch_size=(1, batch_size), capacity=(1, capacity))
    _check_at_least(window=(1, window), spare=(0, spare))
    return capacity if window is None else min(capacity, window + spare)


# %% [markdown]
# MHA


# %%
#| export
class _Heads(nn.Module):
    """The projections of attention, into heads and out of them."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        backend: Backend = "torch",
    ):
        super().__init__()
        n_kv_heads, d_head = _check_heads(d_model, n_heads, n_kv_heads, d_head)
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.dropout, self.backend = dropout, backend
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * d_head, bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * d_head, bias)
        self.o_proj = nn.Linear(
            n_heads * d_head, d_model, bias if output_bias is None else output_bias
        )
        self.q_norm = qk_norm(d_head) if qk_norm else None
        self.k_norm = qk_norm(d_head) if qk_norm else None


def _check_heads(
    d_model: int, n_heads: int, n_kv_heads: int | None, d_head: int | None
) -> tuple[int, int]:
    """Return n_kv_heads and d_head, by default as many as n_heads, and d_model / n_heads."""
    _check_at_least(d_model=(1, d_model), n_heads=(1, n_heads))
    _check_at_least(n_kv_heads=(1, n_kv_heads), d_head=(1, d_head))
    if d_head is None and d_model % n_heads:
        raise ValueError(f"n_heads: expected a divisor of d_model, {d_model}, got {n_heads}")
    if n_kv_heads is not None and n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: expected a divisor of n_heads, {n_heads}, got {n_kv_heads}")
    return n_kv_heads or n_heads, d_head or d_model // n_heads


# %%
#| export
class MultiHeadAttention(_Heads):
    """Causal self-attention in ``n_heads`` heads, which may share keys and values in groups.

    ``n_kv_heads`` is ``n_heads`` by default (multi-head), 1 for multi-query, else grouped-query
    attention; ``d_head`` is ``d_model / n_heads``. ``qk_norm(d_head)`` makes the normalization of
    each query and key, before the rotation, as in Qwen3. ``output_bias`` is as ``bias``.
    """

    def forward(
        self,
        x: Float[Tensor, "batch sequence d_model"],
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch sequence d_model"]:
        """Return what each token has gathered; ``rope`` is what a ``RotaryEmbedding`` gives.

        Without a mask attention is causal. With a cache, ``mask`` is what ``extend`` returned.
        """
        batch, sequence, _ = x.shape
        q, k, v = (
            proj(x).view(batch, sequence, -1, self.d_head).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, sequence, d_head)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=mask is None,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


# %% [markdown]
# MLA


# %%
#| export
class _LatentHeads(nn.Module):
    """The projections of latent attention: down to a latent, up to heads, and out of them."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_latent: int,
        d_rope: int,
        d_head: int | None = None,
        d_value: int | None = None,
        d_query_latent: int | None = None,
        norm: Callable[[int], nn.Module] = nn.RMSNorm,
        dropout: float = 0.0,
        backend: Backend = "torch",
    ):
        super().__init__()
        _, d_head = _check_heads(d_model, n_heads, None, d_head)
        _check_at_least(d_latent=(1, d_latent), d_rope=(2, d_rope), d_value=(1, d_value))
        self.n_heads, self.d_head, self.d_value = n_heads, d_head, d_value or d_head
        self.d_latent, self.d_rope, self.dropout, self.backend = d_latent, d_rope, dropout, backend
        linear = partial(nn.Linear, bias=False)
        self.q_proj = _query_projection(d_model, n_heads * (d_head + d_rope), d_query_latent, norm)
        self.kv_down_proj = linear(d_model, d_latent + d_rope)
        self.kv_norm = norm(d_latent)
        self.kv_up_proj = linear(d_latent, n_heads * (d_head + self.d_value))
        self.o_proj = linear(n_heads * self.d_value, d_model)


def _query_projection(
    d_model: int, d_out: int, d_latent: int | None, norm: Callable[[int], nn.Module]
) -> nn.Module:
    """One matrix, or two with a normalized latent between them."""
    if d_latent is None:
        return nn.Linear(d_model, d_out, bias=False)
    down, up = nn.Linear(d_model, d_latent, bias=False), nn.Linear(d_latent, d_out, bias=False)
    return nn.Sequential(OrderedDict(down=down, norm=norm(d_latent), up=up))


# %%
#| export
class _LatentAttention(_LatentHeads):
    """Two ways to the same result: keys and values made from the latents, or never made."""

    def _expanded(self, q: Tensor, seen: Tensor, **options: Any) -> Tensor:
        """Give each head keys and values of its own, made from the latents in ``seen``."""
        latent, k_rope = seen.split((self.d_latent, self.d_rope), dim=-1)
        kv = self.kv_up_proj(latent[:, 0])
        kv = kv.view(*kv.shape[:2], self.n_heads, -1).transpose(1, 2)
        k, v = kv.split((self.d_head, self.d_value), dim=-1)
        k = torch.cat([k, k_rope.expand(-1, self.n_heads, -1, -1)], dim=-1)
        return scaled_dot_product_attention(q, k, v, **options)

    def _absorbed(self, q: Tensor, seen: Tensor, **options: Any) -> Tensor:
        """Carry the queries to the latents instead, and the mean of the latents to the values."""
        up = self.kv_up_proj.weight.view(self.n_heads, -1, self.d_latent)
        up_k, up_v = up.split((self.d_head, self.d_value), dim=1)
        q, q_rope = q.split((self.d_head, self.d_rope), dim=-1)
        q = torch.cat([q @ up_k, q_rope], dim=-1)  # (batch, n_heads, sequence, d_latent + d_rope)
        latent = seen[..., : self.d_latent]
        return scaled_dot_product_attention(q, seen, latent, **options) @ up_v.mT


# %%
#| export
class MultiHeadLatentAttention(_LatentAttention):
    """DeepSeek's latent attention: per token a cache of ``d_latent + d_rope`` numbers.

    Keys and values of all heads are made from one latent vector; a key has ``d_head`` numbers from
    it and ``d_rope`` rotated ones, which all heads share. Its cache is a ``KVCache`` with
    ``n_kv_heads=1``, ``d_head=d_latent + d_rope`` and ``d_value=0``. Queries have a latent of their
    own if ``d_query_latent`` is given. Source: DeepSeek-AI (2024), section 2.1.
    """

    def forward(
        self,
        x: Float[Tensor, "batch sequence d_model"],
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch sequence d_model"]:
        """As ``MultiHeadAttention.forward``; ``rope`` is for ``d_rope`` features."""
        q = self.q_proj(x).view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)
        latent, k_rope = self.kv_down_proj(x)[:, None].split((self.d_latent, self.d_rope), dim=-1)
        if rope is not None:
            q_plain, q_rope = q.split((self.d_head, self.d_rope), dim=-1)
            q = torch.cat([q_plain, apply_rope(q_rope, *rope)], dim=-1)
            k_rope = apply_rope(k_rope, *rope)
        seen = torch.cat([self.kv_norm(latent), k_rope], dim=-1)  # one head for all
        if cache is not None:
            seen, _ = cache.update(seen, seen[..., :0])
        attend = self._absorbed if cache is not None and x.size(1) == 1 else self._expanded
        out = attend(
            q,
            seen,
            mask=mask,
            is_causal=mask is None,
            scale=(self.d_head + self.d_rope) ** -0.5,
            dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


# %% [markdown]
# Flash


# %%
#| export
class _Tiles(NamedTuple):
    """A matrix of scores, cut into tiles of ``size`` by ``size``."""

    queries: int
    keys: int
    size: int
    is_causal: bool

    def rows(self) -> Iterator[slice]:
        """Yield the blocks of queries."""
        return _blocks(self.queries, self.size)

    def columns(self, rows: slice) -> Iterator[slice]:
        """Yield the blocks of keys that any of the queries ``rows`` sees."""
        seen = min(self.keys, rows.stop + self.keys - self.queries) if self.is_causal else self.keys
        return _blocks(seen, self.size)

    def scores(
        self, q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, columns: slice
    ) -> Tensor:
        """Return the scores of a tile, -inf where attention is not allowed."""
        scores = q[..., rows, :] @ k[..., columns, :].mT
        diagonal = rows.start + self.keys - self.queries - columns.start
        if self.is_causal and diagonal < columns.stop - columns.start - 1:  # it crosses this tile
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores.masked_fill_(hidden.triu(diagonal + 1), -torch.inf)
        if mask is not None:
            scores.masked_fill_(~mask[..., rows, columns], -torch.inf)
        return scores


def _blocks(stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(0, stop, size))


# %%
#| export
def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: _Tiles
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of each row of scores; ``q`` is scaled already."""
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    out = q.new_zeros(*batch, tiles.queries, v.size(-1))
    log_sum = q.new_zeros(*batch, tiles.queries, 1)
    for rows in tiles.rows():
        mean = out[..., rows, :]
        peak = torch.full_like(log_sum[..., rows, :], -torch.inf)
        total = torch.zeros_like(peak)
        for columns in tiles.columns(rows):
            scores = tiles.scores(q, k, mask, rows, columns)
            higher = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
            finite = higher.masked_fill(higher == -torch.inf, 0.0)
            weights, shrink = torch.exp(scores - finite), torch.exp(peak - finite)
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            mean.mul_(shrink).add_(weights @ v[..., columns, :])
            peak = higher
        mean.div_(total.clamp(min=1.0))
        # +inf for a row that may attend to nothing: its weights exp(scores - inf) are zeros.
        log_sum[..., rows, :] = torch.where(total > 0, peak + total.log(), torch.inf)
    return out, log_sum


# %%
#| export
def _flash_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    tiles: _Tiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, tile by tile, with the weights computed anew."""
    d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
    mean = (d_out * out).sum(dim=-1, keepdim=True)  # D: the mean of d_weights under the weights
    for rows in tiles.rows():
        for columns in tiles.columns(rows):
            scores = tiles.scores(q, k, mask, rows, columns)
            weights = torch.exp(scores - log_sum[..., rows, :])
            d_weights = d_out[..., rows, :] @ v[..., columns, :].mT
            d_scores = weights * (d_weights - mean[..., rows, :])
            d_q[..., rows, :] += d_scores @ k[..., columns, :]
            d_k[..., columns, :] += _over_group(d_scores.mT @ q[..., rows, :])
            d_v[..., columns, :] += _over_group(weights.mT @ d_out[..., rows, :])
    return d_q, d_k, d_v


def _over_group(gradient: Tensor) -> Tensor:
    """Add up what the queries of a group send to the keys and values that they share."""
    return gradient.sum(dim=-3, keepdim=True)


# %%
#| export
class _FlashAttention(torch.autograd.Function):
    """Attention in tiles: (batch, n_kv_heads, group, sequence, feature), a group of 1 in k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, tiles: _Tiles
    ) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        wide = [x.to(dtype) for x in (q * scale, k, v)]
        out, log_sum = _flash_forward(wide[0], wide[1], wide[2], mask, tiles)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, out, log_sum)
        ctx.scale, ctx.tiles = scale, tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, log_sum = ctx.saved_tensors
        dtype = log_sum.dtype
        wide = (x.to(dtype) for x in (d_out, q * ctx.scale, k, v))
        d_q, d_k, d_v = _flash_backward(*wide, mask, out, log_sum, ctx.tiles)
        return (d_q * ctx.scale).to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


# %%
#| export
def flash_attention(
    q: Float[Tensor, "*batch n_heads queries d_head"],
    k: Float[Tensor, "*batch n_kv_heads keys d_head"],
    v: Float[Tensor, "*batch n_kv_heads keys d_value"],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    block_size: int = 64,
) -> Float[Tensor, "*batch n_heads queries d_value"]:
    """The same as ``scaled_dot_product_attention``, in memory that grows with the sequence only.

    Scores are made in tiles of ``block_size`` by ``block_size`` and thrown away; for the backward
    pass the log-sum-exp of each row is kept, and tiles are made anew. Tiles above the diagonal are
    skipped. Source: Dao et al. (2022), algorithms 1 and 4; the order of the loops from Dao (2023).
    """
    _check_shapes(q, k, v, is_causal)
    _check_at_least(block_size=(1, block_size))
    scale = q.size(-1) ** -0.5 if scale is None else scale
    tiles = _Tiles(q.size(-2), k.size(-2), block_size, is_causal)
    groups = k.size(-3), q.size(-3) // k.size(-3)
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.size(-2)).unflatten(-3, groups)
    out = _FlashAttention.apply(
        q.unflatten(-3, groups), k.unsqueeze(-3), v.unsqueeze(-3), mask, scale, tiles
    )
    return out.flatten(-4, -3)
