# %% [markdown]
# # Attention
#
# > Let every token look up what it needs among the tokens before it: softly, so that looking can be
# > learned; in several heads at once; and in tiles, so that it fits into memory.
#
# *The dough rises when it rests.* What is *it*? The answer stands three words earlier; in another
# text it may stand three thousand words earlier. After {doc}`08_positions` a token is a vector
# that knows its word and its place and nothing else. Attention is the one part of a transformer
# in which anything moves from one token to another; all the rest works on each token by itself.
#
# This chapter begins with a Python dictionary and ends with attention as large models run it: how
# a look-up can be learned, what keeps it stable, what it costs to remember all that was read, and
# what such a layer in fact learns to look for.
#
# | | |
# |---|---|
# | **Part** | II. Architecture |
# | **You build** | {py:func}`~llmbook.attention.softmax`, {py:func}`~llmbook.attention.scaled_dot_product_attention`, {py:class}`~llmbook.attention.MultiHeadAttention`, {py:class}`~llmbook.attention.KVCache`, {py:class}`~llmbook.attention.MultiHeadLatentAttention`, {py:func}`~llmbook.attention.flash_attention`, {py:func}`~llmbook.attention.show_attention` |
# | **You need** | rotary positions ({doc}`08_positions`), document masks ({doc}`07_batches`), entropy ({doc}`01_tinyworld`), the chain rule of derivatives |
# | **It takes** | 60 minutes for the main line, 3.5 hours for everything, 30 seconds to run |

# %% tags=["remove-cell"]
#| default_exp attention

# %% tags=["engine"]
#| export
# The imports that only the module and its engine rooms need.
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.resources import files
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Int64
from torch.autograd.function import once_differentiable

from llmbook.environment import (
    check_at_least,
    check_choice,
    check_even,
    check_fraction,
    check_whole,
)
from llmbook.positions import check_tensor

# %% [markdown]
# ## A dictionary that never says no
#
# A dictionary answers a question, the **query**, by comparing it with its **keys** and returning
# the **value** of the one that is equal. At which temperature does one bake a pie?

# %%
import copy
import math
import time

import matplotlib.pyplot as plt

plt.style.use("llmbook.book")
degrees = {"bread": 220.0, "cake": 180.0, "meringue": 100.0}
print("pie:", degrees.get("pie", "no answer"))

# %% [markdown]
# No answer, although a pie is almost a cake. And nothing can be learned from the failure:
# equality has no derivative, so no small change of a key makes the answer a little better.
#
# So we make three changes ({numref}`fig-attention-lookup`). Keys and query become vectors, here of
# two numbers, how sweet and how airy. The dot product, the **score**, replaces equality: it is
# large if query and key point the same way, and larger the longer they are. And a mean of *all*
# values replaces the single one, each with a weight that grows with its score. The usual way to
# turn numbers $s_j$ into weights that are positive and sum to one is the {term}`softmax`:
#
# $$
# p_j = \frac{e^{s_j}}{\sum_k e^{s_k}} , \qquad s_j = q \cdot k_j , \qquad
# \text{answer} = \sum_j p_j v_j .
# $$ (attention-lookup)
#
# ```{figure} ../figures/attention-lookup.svg
# :name: fig-attention-lookup
# :alt: Left, a dictionary: the query pie is compared with the keys bread, cake and meringue, none is equal, and the answer is an error. Right, soft look-up: the query vector has the scores minus 2, 3 and 0 with the three keys, softmax makes of them the weights 0.006, 0.946 and 0.047, and the answer is the weighted mean of 220, 180 and 100 degrees, which is 176.
#
# A dictionary finds the key that is equal. Soft look-up finds out how similar each key is, and
# mixes the values accordingly.
# ```

# %%
keys = {"bread": (-2.0, 0.0), "cake": (2.0, -1.0), "meringue": (2.0, 2.0)}
pie = (1.0, -1.0)


def look_up(query: tuple, sharpness: float = 1.0) -> float:
    scores = [query[0] * sweet + query[1] * airy for sweet, airy in keys.values()]
    exponentials = [math.exp(sharpness * score) for score in scores]
    weights = [e / sum(exponentials) for e in exponentials]
    print("weights:", " ".join(f"{weight:.3f}" for weight in weights), end="; ")
    return sum(w * value for w, value in zip(weights, degrees.values(), strict=True))


print(f"pie: {look_up(pie):.0f} degrees")
print(f"pie, scores times ten: {look_up(pie, sharpness=10):.0f} degrees")

# %% [markdown]
# Multiply all scores by a growing factor, and the weight of the best key tends to one: the hard
# look-up is the limit of the soft one. But now the answer depends smoothly on every number in it,
# so gradients flow to values, keys and query, and into whatever made them.
#
# ## From one query to all of them
#
# In a transformer the tokens ask each other. Each token $i$ has a vector $x_i$. Three matrices,
# found by training, turn this vector into what the token asks for, what it can be found by, and
# what it hands on:
#
# $$
# q_i = x_i W_Q , \qquad k_i = x_i W_K , \qquad v_i = x_i W_V .
# $$ (attention-projections)
#
# Vectors are rows here, as they are in code. We choose the matrices by hand, so that each number
# can be read. A token has four features: is it a noun, a verb, a pronoun, something else? The
# pronoun asks for a noun, and so does a verb, less urgently, because it wants its subject. A noun
# can be found as one, a pronoun less easily. (Verbs get a key, too, which no query reads yet.)
# Nouns and verbs hand on what they are.

# %%
#| export
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# From here on vectors are tensors of PyTorch:

# %%
words = ["The", "dough", "rises", "when", "it", "rests"]
#                           noun verb pron. other
sentence = torch.tensor([[0.0, 0.0, 0.0, 1.0],   # The
                         [1.0, 0.0, 0.0, 0.0],   # dough
                         [0.0, 1.0, 0.0, 0.0],   # rises
                         [0.0, 0.0, 0.0, 1.0],   # when
                         [0.0, 0.0, 1.0, 0.0],   # it
                         [0.0, 1.0, 0.0, 0.0]])  # rests  # fmt: skip
w_q = torch.tensor([[0.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
w_k = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
w_v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
q, k, v = sentence @ w_q, sentence @ w_k, sentence @ w_v
print("q, k, v:", *(tuple(t.shape) for t in (q, k, v)))

# %% [markdown]
# **One query, by a loop.** This is {eq}`attention-lookup`, but scores are divided by $\sqrt d$,
# where $d$ is the length of a query; the next section says why.


# %%
def attend(query: list, keys: list, values: list) -> tuple[list, list]:
    scores = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
    exponentials = [math.exp(score / math.sqrt(len(query))) for score in scores]
    weights = [e / sum(exponentials) for e in exponentials]
    columns = zip(*values, strict=True)
    return [sum(w * u for w, u in zip(weights, column, strict=True)) for column in columns], weights


answer, weights = attend(q[4].tolist(), k.tolist(), v.tolist())
for word, weight in zip(words, weights, strict=True):
    print(f"it -> {word:6} {weight:.2f}")

# %% [markdown]
# *It* has found the dough. **All queries** need one more loop, which makes $n^2$ scores for $n$
# tokens:

# %%
by_loops = torch.tensor([attend(query, k.tolist(), v.tolist())[0] for query in q.tolist()])

# %% [markdown]
# **As matrices.** Stack the queries as the rows of a matrix $Q$, and keys and values as those of
# $K$ and $V$. The score of query $i$ and key $j$ is then entry $(i, j)$ of $QK^\top$, softmax works
# along each row, and to mix the values with the weights of row $i$ is to multiply by that row. The
# loops become two products of matrices ({numref}`fig-attention-flow`):
#
# $$
# \operatorname{Attention}(Q, K, V) = \operatorname{softmax}\!\Big(\frac{QK^\top}{\sqrt d}\Big) V .
# $$ (attention)
#
# ```{figure} ../figures/attention-flow.svg
# :name: fig-attention-flow
# :alt: The vectors x of six tokens, a matrix of n rows and d_model columns, are multiplied by three matrices to queries, keys and values, each of n rows and d columns. Queries times transposed keys give an n by n matrix of scores; scaled, masked and put through softmax row by row it becomes weights; weights times values give the output, n rows of d columns.
#
# Attention as a flow of matrices. Only in the middle, where a matrix is $n \times n$, does
# anything pass from one token to another. Empty cells are forbidden by a mask, of which more
# below.
# ```

# %%
scores = q @ k.T / math.sqrt(q.size(-1))
as_matrices = scores.softmax(dim=-1) @ v
assert torch.allclose(as_matrices, by_loops)
print(f"{scores.numel()} scores in a matrix of {tuple(scores.shape)}")
print("what it gets:", [round(number, 2) for number in as_matrices[4].tolist()], "(noun, verb)")

# %% [markdown]
# **In batches** nothing changes but the transpose, for `@` multiplies the last two dimensions and
# repeats that over all others:

# %%
batch = torch.stack([sentence, sentence.flip(0)])  # two sentences, (batch, sequence, d_model)
q, k, v = batch @ w_q, batch @ w_k, batch @ w_v
batched = (q @ k.mT / math.sqrt(q.size(-1))).softmax(dim=-1) @ v
assert torch.allclose(batched[0], as_matrices)
print(tuple(batch.shape), "->", tuple(batched.shape))

# %% [markdown]
# Equation {eq}`attention` is due to Vaswani and colleagues {cite}`vaswani2017attention`; the soft
# look-up itself is older, from translation {cite}`bahdanau2015attention`.
#
# ## Why divide by the square root of d?
#
# Let the entries of a query and of a key be independent random numbers with mean 0 and variance
# 1, as they roughly are when training begins. Their score is $s = \sum_{f=1}^{d} q_f k_f$, with a
# term for each feature $f$. Each term has mean
#
# $$
# \mathbb{E}[q_f k_f] = \mathbb{E}[q_f]\,\mathbb{E}[k_f] = 0 ,
# $$
#
# because they are independent, and therefore the variance
#
# $$
# \operatorname{Var}[q_f k_f] = \mathbb{E}[q_f^2 k_f^2] - 0^2
# = \mathbb{E}[q_f^2]\,\mathbb{E}[k_f^2] = 1 .
# $$
#
# The $d$ terms are independent of each other, so their variances add up:
#
# $$
# \operatorname{Var}[s] = d , \qquad \operatorname{Var}\!\left[\frac{s}{\sqrt d}\right]
# = \frac{d}{d} = 1 .
# $$ (attention-variance)
#
# Scores grow like $\sqrt d$, and dividing by $\sqrt d$ keeps them near one. What would be wrong
# with large scores? Two that differ by one standard deviation get weights whose ratio is $e^{\sqrt
# d}$. For $d = 128$ that is 80,000: before anything has been learned, each token attends to a
# single other, picked by chance. Worse, it cannot change its mind. The derivative of the weight
# $p_i = e^{s_i} / Z$, where $Z = \sum_k e^{s_k}$, with respect to a score is
#
# $$
# \frac{\partial p_i}{\partial s_j} = \frac{\delta_{ij}\, e^{s_i} Z - e^{s_i} e^{s_j}}{Z^2}
# = p_i (\delta_{ij} - p_j) ,
# $$ (attention-softmax-gradient)
#
# with $\delta_{ij} = 1$ if $i = j$, else 0. If one weight is nearly 1 and the others nearly 0,
# all of these products are nearly 0. No gradient passes through a saturated softmax. We measure
# both: the {term}`entropy` of the weights over 64 keys, and the sum of the derivatives
# $\partial p_i / \partial s_i = p_i (1 - p_i)$.

# %%
torch.manual_seed(0)
sizes = [4, 16, 64, 256, 1024]
measured = {name: {"entropy": [], "gradient": []} for name in ("undivided", "divided")}
print("   d  deviation  sqrt(d)")
for d in sizes:
    q, k = torch.randn(1000, 1, d), torch.randn(1000, 64, d)
    raw = (q @ k.mT)[:, 0]
    print(f"{d:4d} {raw.std():10.0f} {math.sqrt(d):8.0f}")
    for name, scores in (("undivided", raw), ("divided", raw / math.sqrt(d))):
        p = scores.softmax(dim=-1)
        entropy = torch.special.entr(p).sum(dim=-1).mean()
        measured[name]["entropy"].append(entropy.item())
        measured[name]["gradient"].append((p * (1 - p)).sum(dim=-1).mean().item())

# %% [markdown]
# The scores deviate by the root of $d$, as derived. What becomes of softmax is easier to see in a
# picture:

# %% mystnb={"figure": {"caption": "Entropy of the attention weights, and the gradient that passes through softmax, against the size of a head. Undivided, both vanish as heads grow; divided by the square root, both stay where they are.", "name": "fig-attention-scaling"}, "image": {"alt": "Two plots over d from 4 to 1024. Left, entropy in nats, with a dotted line at ln 64 = 4.16: undivided it falls from 2.8 to 0.1, divided it stays at 3.7. Right, the sum of p (1 - p): undivided it falls from 0.85 to below 0.1, divided it stays at 0.96."}}
figure, axes = plt.subplots(1, 2)
titles = {"entropy": "Entropy of the weights (nats)", "gradient": "Gradient that passes"}
for ax, (what, title) in zip(axes, titles.items(), strict=True):
    for name, values in measured.items():
        ax.plot(sizes, values[what], "o-", label=name)
    ax.set(xscale="log", xticks=sizes, xticklabels=sizes, title=title, xlabel="d")
    ax.minorticks_off()
axes[0].axhline(math.log(64), color="gray", linestyle=":", label="all equal, ln 64")
axes[0].set_ylim(0, 4.4)
axes[1].set_ylim(0, 1.05)
axes[0].legend()
plt.show()

# %% [markdown]
# ## Exponentials that stay finite
#
# Float32 ends near $3.4 \cdot 10^{38}$, and $e^{89}$ is more. A score of 89 gives infinity, and
# infinity divided by infinity is not a number:

# %%
scores = torch.tensor([89.0, 88.0])
print("naive:  ", (scores.exp() / scores.exp().sum()).tolist())
shifted = scores - scores.max()
print("shifted:", [round(p, 3) for p in (shifted.exp() / shifted.exp().sum()).tolist()])

# %% [markdown]
# The second line uses that softmax does not change if the same number $m$ is subtracted from all
# scores:
#
# $$
# \frac{e^{s_j - m}}{\sum_k e^{s_k - m}} = \frac{e^{-m}\, e^{s_j}}{e^{-m} \sum_k e^{s_k}} = p_j .
# $$
#
# With $m = \max_k s_k$ the largest exponential is $e^0 = 1$, so that nothing overflows, and the
# sum is at least 1, so that nothing is divided by zero. What underflows to zero was too small to
# count.
#
# One case is left. A score of $-\infty$ will mean "not allowed" below, and a query may be allowed
# nothing at all. Then the maximum is $-\infty$, and $-\infty - (-\infty)$ is NaN again. We want
# the answer to be *nothing* in this case: weights that are all zero. A maximum of $-\infty$ is
# replaced by 0, so all exponentials are 0; and the sum, at least 1 wherever anything is allowed,
# is raised to 1 where nothing is. As shifting changes nothing, the maximum needs no gradient.


# %%
#| export
def softmax(scores: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """Turn scores along ``dim`` into weights that sum to one; safe for scores of any size.

    A score of -inf has weight 0. Where all are -inf, all weights are 0, not NaN. Computed in
    float32 or wider, returned in the dtype of ``scores``.

    >>> softmax(torch.tensor([[1000.0, 1000.0], [-torch.inf, -torch.inf]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    _check_scores(scores, dim)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    peak = wide.detach().amax(dim, keepdim=True)
    weights = torch.exp(wide - peak.masked_fill(peak == -torch.inf, 0.0))
    total = weights.sum(dim, keepdim=True).clamp(min=1.0)  # the peak alone adds 1, if there is one
    return (weights / total).to(scores.dtype)


# %% tags=["engine"]
#| export
# Scores, masks and scales that cannot be are named
def _check_scores(scores: Tensor, dim: int) -> None:
    check_tensor("scores", scores, "...")
    most = max(scores.ndim, 1)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -most <= dim < most:
        raise ValueError(f"dim: expected {-most} to {most - 1}, got {dim!r}")
    if scores.ndim and not scores.size(dim):
        got = f"got shape {tuple(scores.shape)}"
        raise ValueError(f"scores: expected at least one in dimension {dim}, {got}")


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` is of booleans and spreads over ``shape`` without enlarging it."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else f"{mask!r:.60}"
        raise ValueError(f"mask: expected booleans, True where allowed, got {got}")
    fits = mask.ndim <= len(shape)
    for at in range(1, mask.ndim + 1 if fits else 1):
        fits = fits and mask.size(-at) in (1, shape[-at])
    if not fits:
        expected = f"expected a shape that broadcasts to (..., heads, queries, keys), {shape}"
        raise ValueError(f"mask: {expected}, got {tuple(mask.shape)}")


def _check_device(device: Any) -> None:
    if isinstance(device, str):
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device: expected a device or its name, got {device!r}") from error


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (type(scale) in (int, float) and abs(scale) < torch.inf):
        raise ValueError(f"scale: expected None or a finite number, got {scale!r}")


# %% [markdown]
# ## Who may look at whom
#
# Nothing so far keeps *it* from looking ahead at *rests*. A {term}`language model` must not: if a
# token could see the next one, predicting it would be copying. A **mask** says who may look at
# whom, True where it is allowed, and the scores of all others become $-\infty$ before softmax.
#
# Four masks do almost all the work. Under the {term}`causal mask` a token sees itself and those
# before it. Under a {term}`sliding window` {cite}`beltagy2020longformer` it sees only the last
# $w$ of these, itself included. The cost is then $n w$ instead of $n^2$, and each further layer
# still lets it reach $w - 1$ tokens farther. A document mask ({doc}`07_batches`) keeps to one
# document of a packed row. And {term}`padding` is seen by nobody.
#
# All but the document mask are one rule about positions. With $i$ the position of a query and $j$
# that of a key, and $-1$ for padding, attention is allowed where $0 \le j \le i$ and $j > i - w$.
# The rule speaks of positions, not of places in a row, because it then serves caches as well,
# where the keys of a row lie in any order.


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
    for name, positions in (("query", query_positions), ("key", key_positions)):
        check_tensor(f"{name}_positions", positions, "batch", name, kind="whole numbers")
    check_at_least(window=(1, window))
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    allowed = (key <= query) & (key >= 0)
    return allowed if window is None else allowed & (key > query - window)


# %% [markdown]
# Most sequences have no padding, and their positions simply count:


# %%
#| export
def causal_mask(
    sequence: int, window: int | None = None, device: torch.device | str | None = None
) -> Bool[Tensor, "sequence sequence"]:
    """Return the mask of a sequence without padding: each position sees itself and those before.

    With a ``window``, only the last ``window`` of these, itself included.

    >>> causal_mask(3, window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    check_at_least(sequence=(1, sequence))
    _check_device(device)
    positions = torch.arange(sequence, device=device)[None]
    return attention_mask(positions, positions, window)[0, 0]


# %% [markdown]
# The four masks for a row of twelve tokens ({numref}`fig-attention-masks`):

# %% mystnb={"figure": {"caption": "Who may attend to whom in a row of 12 tokens. Masks combine by and: the last panel is causal and without the padding at its left.", "name": "fig-attention-masks"}, "image": {"alt": "Four square grids of queries, downward, and keys, to the right. Causal: the lower triangle. Sliding window of 4: a band of four cells along the diagonal. Documents of 5, 4 and 3 tokens: three small triangles along the diagonal. Padding of 3 on the left: the lower triangle without its first three columns, so that the first three rows are empty."}}
from llmbook.batches import document_mask

documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
padded = torch.tensor([[-1] * 3 + list(range(9))])
panels = {
    "causal": causal_mask(12),
    "window of 4": causal_mask(12, window=4),
    "documents": document_mask(documents)[0, 0],
    "padding at left": attention_mask(padded, padded)[0, 0],
}
figure, axes = plt.subplots(1, 4, figsize=(7, 2.2))
for ax, (title, mask) in zip(axes, panels.items(), strict=True):
    ax.pcolormesh(mask.flip(0), cmap="Blues", vmin=0, vmax=1.4, edgecolor="white", linewidth=0.6)
    ax.set(title=title, xlabel="key", aspect="equal", xticks=[], yticks=[])
    ax.grid(False)
axes[0].set_ylabel("query")
plt.show()

# %% [markdown]
# The last panel has empty rows. Much code fills forbidden scores with $-10^9$ instead of
# $-\infty$. This avoids the NaN and does something worse: if *all* scores of a row are $-10^9$,
# softmax gives them equal weights, and the query attends to all that it must not see.

# %%
mask = panels["padding at left"]
scores = torch.zeros(12, 12)
for name, filler in (("-1e9", -1e9), ("-inf", -torch.inf)):
    leaked = softmax(scores.masked_fill(~mask, filler)).masked_fill(mask, 0).sum(dim=-1)
    astray = int((leaked > 0.99).sum())
    print(f"{name}: {astray} of 12 queries put all their weight on forbidden keys")

# %% [markdown]
# ## One function
#
# Scores, mask, softmax: these are the weights. A later section runs attention several times side by
# side; each run is called a *head*. The functions allow for it now: the third dimension from the
# end counts heads. Several query heads may share the keys of one: with `n_heads` a multiple of
# `n_kv_heads`, a group of neighboring query heads reads the same keys and values. If there are
# fewer queries than keys and attention is causal, the *ends* are aligned. This is what a decoder
# needs: the newest token is a single query, and sees all keys.


# %% tags=["engine"]
#| export
# Inputs that do not fit are named before they meet, in the words of the caller.
def _check_inputs(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> None:
    """Raise a ValueError unless queries, keys and the mask fit together."""
    for name, tensor in (("q", q), ("k", k)):
        check_tensor(name, tensor, "...", "heads", "sequence", "feature")
    if q.size(-1) != k.size(-1) or q.shape[:-3] != k.shape[:-3]:
        expected = f"expected batch and feature dimensions as in q, {tuple(q.shape)}"
        raise ValueError(f"k: {expected}, got {tuple(k.shape)}")
    if q.size(-3) % k.size(-3):
        raise ValueError(f"k: expected a divisor of {q.size(-3)} heads, got {k.size(-3)}")
    if is_causal and q.size(-2) > k.size(-2):
        expected = f"at most as many queries as keys, {k.size(-2)}"
        raise ValueError(f"q: expected {expected}, with is_causal, got {q.size(-2)}")
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], k.size(-2)))
    _check_scale(scale)


def _check_values(k: Tensor, v: Tensor) -> None:
    check_tensor("v", v, "...", "heads", "sequence", "feature")
    if k.shape[:-1] != v.shape[:-1]:
        expected = f"{tuple(k.shape[:-1])} before the last dimension, as in k"
        raise ValueError(f"v: expected {expected}, got {tuple(v.shape)}")


# %% [markdown]
# The mask that the caller gives, and the causal one if it is wanted, are joined by *and*. Keys and
# values are repeated for the heads that share them:


# %%
#| export
def _joined(mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """Join ``mask`` with the causal one, whose last query sees all keys; None if all is allowed."""
    queries, keys = q.size(-2), k.size(-2)
    if not is_causal or queries == 1:
        return mask
    positions = torch.arange(keys, device=q.device)[None]
    causal = attention_mask(positions[:, keys - queries :], positions)[0, 0]
    return causal if mask is None else mask & causal


def _shared(x: Tensor, n_heads: int) -> Tensor:
    """Repeat each head of keys or values for all the query heads that share it."""
    return x if x.size(-3) == n_heads else x.repeat_interleave(n_heads // x.size(-3), dim=-3)


# %% [markdown]
# With these, the weights are one line for the scores and one for mask and softmax:


# %%
#| export
def attention_weights(
    q: Float[Tensor, "*batch n_heads queries d_head"],
    k: Float[Tensor, "*batch n_kv_heads keys d_head"],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "*batch n_heads queries keys"]:
    """Return the weights that ``scaled_dot_product_attention`` gives to the values.

    They sum to one for each query, or are all zero if it may attend to nothing.
    """
    _check_inputs(q, k, mask, is_causal, scale)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = (q * scale) @ _shared(k, q.size(-3)).mT
    mask = _joined(mask, is_causal, q, k)
    return softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf))


# %% [markdown]
# Attention is the weights times the values. Each weight may also be dropped at random, as a
# regularizer. All this makes several matrices of $n^2$ numbers. PyTorch has the same function as a
# single kernel that makes none (a later section builds its method), and `backend="torch"` calls it.
# Told `is_causal`, it also skips the forbidden half; given a matrix, it cannot.

# %%
#| export
Backend = Literal["reference", "torch"]


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
    """Return for each query the mean of the values under the weights softmax(scale * q k).

    ``mask`` (True: allowed) broadcasts against (..., n_heads, queries, keys); a query that may
    attend to nothing gets zeros. ``is_causal``: the last query sees all keys, the one before it all
    but the last, and so on. ``scale`` is 1 / sqrt(d_head) unless given; ``dropout`` is applied
    whenever it is not 0. Source: Vaswani et al. (2017), eq. 1; groups: Ainslie et al. (2023).
    """
    _check_inputs(q, k, mask, is_causal, scale)
    _check_values(k, v)
    check_fraction("dropout", dropout)
    check_choice("backend", backend, ("reference", "torch"))
    if backend == "torch":
        return _torch_attention(q, k, v, mask, is_causal, scale=scale, dropout_p=dropout)
    weights = attention_weights(q, k, mask, is_causal=is_causal, scale=scale)
    return F.dropout(weights, dropout) @ _shared(v, q.size(-3))


# %% [markdown]
# Under the causal mask *rises* can no longer see *it* or *rests*. The weights of our sentence, row
# by row (the 1 in front is a head):

# %%
q, k, v = ((sentence @ w)[None] for w in (w_q, w_k, w_v))
for word, row in zip(words, attention_weights(q, k, is_causal=True)[0].tolist(), strict=True):
    print(f"{word:6}", *(f"{weight:.2f}" if weight else "   ." for weight in row))
assert scaled_dot_product_attention(q, k, v, is_causal=True).shape == (1, 6, 2)

# %% [markdown] tags=["engine"]
# ### Engine room: PyTorch's fused kernel behind the same function, because it is faster

# %% [markdown] tags=["engine"]
# Two cases deserve care. A plain causal mask is announced by `is_causal` rather than built,
# because the kernel then skips what is forbidden. And with one query a row the heads that share
# keys can be laid out as rows of one matrix, which avoids copying each key for every head of its
# group.


# %% tags=["engine"]
#| export
def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, **options: Any
) -> Tensor:
    """Attention by PyTorch's fused kernel."""
    queries, grouped = q.size(-2), q.size(-3) != k.size(-3)
    if mask is not None and mask.ndim < 2:  # the kernel looks at the last two dimensions
        mask = mask.expand(queries, k.size(-2))
    if queries == 1 and grouped and (mask is None or mask.ndim < 3 or mask.size(-3) == 1):
        folded = q.reshape(*k.shape[:-2], -1, q.size(-1))  # (..., n_kv_heads, group, d_head)
        out = F.scaled_dot_product_attention(folded, k, v, mask, **options)
        return out.reshape(*q.shape[:-1], v.size(-1))
    if is_causal and mask is None and queries == k.size(-2):  # the kernel aligns the beginnings
        options["is_causal"] = True
    else:
        mask = _joined(mask, is_causal, q, k)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped, **options)


# %% [markdown] tags=["engine"]
# Are the two the same function, forward and backward, even where some queries may see nothing?
# In float64, so that rounding is far below any real difference:

# %% tags=["engine"]
torch.manual_seed(0)
inputs = [
    torch.randn(2, heads, 12, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
]
mask = panels["padding at left"]
found = {}
for backend in ("reference", "torch"):
    out = scaled_dot_product_attention(*inputs, mask, backend=backend)
    found[backend] = out, *torch.autograd.grad(out.sin().sum(), inputs)
for ours, theirs in zip(*found.values(), strict=True):
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
unseen = found["torch"][0][:, :, :3]
print(
    f"{unseen.numel()} numbers of queries that see nothing, the largest: {unseen.abs().max():.1f}"
)

# %% [markdown]
# ## Heads
#
# One softmax makes one weighted mean. But *rests* may want its subject, and also the verb that
# was used before it, and one set of weights cannot point to two places without mixing what is
# there. So attention is done several times side by side, in {term}`heads <attention head>`, each
# with matrices of its own and a smaller $d$. A second head looks for verbs:


# %%
def one_head(w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    q, k, v = ((sentence @ w)[None] for w in (w_q, w_k, w_v))
    return scaled_dot_product_attention(q, k, v, is_causal=True)[0]


verb_q = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
verb_k = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
side_by_side = torch.cat([one_head(w_q, w_k, w_v), one_head(verb_q, verb_k, w_v)], dim=-1)
for name, gets in zip(("first", "second"), side_by_side[-1].split(2), strict=True):
    print(f"rests, {name} head:", *(f"{number:.2f}" for number in gets), "(noun, verb)")

# %% [markdown]
# The first head brings the noun, the second the verbs.
#
# The two products $x W_Q$ are one product if the matrices of the heads are set side by side. Then
# the columns of the result belong to the heads in turn, and have to be told apart: split the last
# dimension, and move the heads to the front, where `@` repeats over them
# ({numref}`fig-attention-heads`).
#
# ```{figure} ../figures/attention-heads.svg
# :name: fig-attention-heads
# :alt: A matrix of 6 rows, the tokens, and 4 columns, two of each head. View splits the last dimension, so that each row is 2 heads of 2 columns; transpose moves the heads to the front: two matrices of 6 rows and 2 columns. After attention the same steps go backward, and the output projection mixes the heads.
#
# From one wide matrix to heads, and back. On the way to heads the numbers stay where they are in
# memory; only the way of counting them changes.
# ```

# %%
wide = [torch.cat(pair, dim=1) for pair in ((w_q, verb_q), (w_k, verb_k), (w_v, w_v))]
q, k, v = ((sentence @ w).view(6, 2, 2).transpose(0, 1) for w in wide)  # (heads, sequence, d_head)
out = scaled_dot_product_attention(q, k, v, is_causal=True)
merged = out.transpose(0, 1).flatten(1)  # (sequence, heads * d_head)
assert torch.allclose(merged, side_by_side)
labels = torch.arange(24).view(6, 4)  # row by row, as they lie in memory
right, wrong = labels.view(6, 2, 2).transpose(0, 1), labels.view(2, 6, 2)
print(f"viewed without transposing: {(right != wrong).sum()} of 24 numbers in the wrong place")

# %% [markdown]
# The last line is the classic mistake: `view(heads, sequence, d_head)` has the right shape and
# mixes tokens with heads. No error tells you.
#
# What does it cost? With $H$ heads of $d = d_\text{model} / H$, the four projections have
# $4 d_\text{model}^2$ weights whatever $H$ is, and scores and means take $2 n^2 d_\text{model}$
# multiplications whatever $H$ is: more heads are more, but narrower, questions for the same
# price. The last matrix, $W_O$, mixes what the heads have found.
#
# ### The module
#
# The exported class begins with its sizes and matrices. Two arguments wait for later: heads that
# share keys and values (`n_kv_heads`), and a normalization of queries and keys (`qk_norm`).


# %% tags=["engine"]
#| export
# Sizes that cannot be are named, and those left out are filled in.
def _check_heads(
    d_model: int, n_heads: int, n_kv_heads: int | None, d_head: int | None, dropout: float
) -> tuple[int, int]:
    """Return n_kv_heads and d_head: if not given, n_heads and d_model / n_heads."""
    check_fraction("dropout", dropout)
    check_at_least(d_model=(1, d_model), n_heads=(1, n_heads))
    check_at_least(n_kv_heads=(1, n_kv_heads), d_head=(1, d_head))
    if d_head is None and d_model % n_heads:
        raise ValueError(f"n_heads: expected a divisor of d_model, {d_model}, got {n_heads}")
    if n_kv_heads is not None and n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: expected a divisor of n_heads, {n_heads}, got {n_kv_heads}")
    return n_kv_heads or n_heads, d_head or d_model // n_heads


def _check_way(backend: str, layout: str, scale: float | None) -> None:
    check_choice("backend", backend, ("reference", "torch"))
    check_choice("layout", layout, ("half", "interleaved"))
    _check_scale(scale)


# %% [markdown]
# Unless they are given, `n_kv_heads` is `n_heads` and `d_head` is `d_model / n_heads`:


# %%
#| export
class MultiHeadAttention(nn.Module):
    """Causal self-attention in heads: multi-head, grouped-query or multi-query attention.

    ``n_kv_heads``, a divisor of ``n_heads``, is how many heads have keys and values of their own:
    by default all, with 1 multi-query attention. ``d_head`` is ``d_model / n_heads`` unless given,
    ``output_bias`` is as ``bias``. ``qk_norm(d_head)`` makes the module that normalizes each query
    and key, before they are rotated, as in Qwen3. ``dropout`` drops weights in training. ``layout``
    and ``d_rope`` say which numbers are rotated together, and how many of each head, as in
    ``apply_rope``; ``scale`` multiplies scores, by default 1 / sqrt(d_head).
    """

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
        layout: Literal["half", "interleaved"] = "half",
        d_rope: int | None = None,
        scale: float | None = None,
        backend: Backend = "torch",
    ):
        super().__init__()
        n_kv_heads, d_head = _check_heads(d_model, n_heads, n_kv_heads, d_head, dropout)
        _check_way(backend, layout, scale)
        _check_rotated(d_head, d_rope)
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.layout, self.d_rope = layout, d_rope
        self.dropout, self.scale, self.backend = dropout, scale, backend
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * d_head, bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * d_head, bias)
        out_bias = bias if output_bias is None else output_bias
        self.o_proj = nn.Linear(n_heads * d_head, d_model, out_bias)
        self.q_norm = None if qk_norm is None else qk_norm(d_head)
        self.k_norm = None if qk_norm is None else qk_norm(d_head)


# %% tags=["engine"]
#| export
# What a layer cannot take is named, too.
def _check_rotated(d_head: int, d_rope: int | None) -> None:
    if d_rope is not None:
        check_even(d_rope=d_rope)
        if d_rope > d_head:
            raise ValueError(f"d_rope: expected at most d_head, {d_head}, got {d_rope}")


def _check_memory(spare: int | None, dtype: torch.dtype, device: Any) -> None:
    if spare is None:
        raise ValueError("spare: expected a whole number, got None")
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected a dtype of torch, got {dtype!r:.60}")
    _check_device(device)


def _check_call(x: Tensor, d_model: int, rope: Any, cache: Any = None) -> None:
    """Raise unless a layer is given a batch, and beside it what other functions return."""
    check_tensor("x", x, "batch", "sequence", d_model)
    if rope is not None and not (isinstance(rope, tuple) and len(rope) == 2):
        expected = "the pair of cosines and sines that a RotaryEmbedding returns"
        raise ValueError(f"rope: expected {expected}, got {rope!r:.60}")
    if cache is not None and not hasattr(cache, "update"):
        expected = "the cache of one layer, such as cache[0] of a KVCache"
        raise ValueError(f"cache: expected {expected}, got a {type(cache).__name__}")


# %% [markdown]
# The class gets a method that projects a text into heads, and turns queries and keys by the rotary
# positions of {doc}`08_positions`. (The line `class MultiHeadAttention(MultiHeadAttention)` goes on
# with the class in a new cell; in the package all parts are one class.)

# %%
#| export
from llmbook.positions import apply_rope


class MultiHeadAttention(MultiHeadAttention):  # continued
    def project(
        self, x: Float[Tensor, "batch sequence d_model"], rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[
        Float[Tensor, "batch n_heads sequence d_head"],
        Float[Tensor, "batch n_kv_heads sequence d_head"],
        Float[Tensor, "batch n_kv_heads sequence d_head"],
    ]:
        """Return queries, keys and values in heads; q and k normalized, if so, then rotated."""
        _check_call(x, self.q_proj.in_features, rope)
        batch, sequence, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).view(batch, sequence, -1, self.d_head) for proj in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rope is not None:
            q, k = (apply_rope(z, *rope, self.layout, d_rope=self.d_rope) for z in (q, k))
        return q, k, v


# %% [markdown]
# The pass through the module is then short. Its argument `cache` belongs to a later section;
# without a mask attention is causal.


# %%
#| export
class MultiHeadAttention(MultiHeadAttention):  # continued
    def forward(
        self,
        x: Float[Tensor, "batch sequence d_model"],
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        cache: "LayerCache | None" = None,
    ) -> Float[Tensor, "batch sequence d_model"]:
        """Return what each token gathers. ``rope``: cosines and sines of a ``RotaryEmbedding``.

        Without a mask attention is causal; with a cache, ``mask`` is what its ``extend`` returned.
        """
        _check_call(x, self.q_proj.in_features, rope, cache)
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.update(k, v)
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"scale": self.scale, "dropout": dropout, "backend": self.backend}
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **options)
        return self.o_proj(out.transpose(1, 2).flatten(2))


# %% [markdown]
# The weights are thrown away in there. To look at them we compute them separately:


# %%
#| export
def attention_pattern(
    attention: MultiHeadAttention,
    x: Float[Tensor, "batch sequence d_model"],
    *,
    rope: tuple[Tensor, Tensor] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "batch n_heads sequence sequence"]:
    """Return the weights with which ``attention(x, rope=rope, mask=mask)`` mixes its values."""
    if not isinstance(attention, MultiHeadAttention):
        raise ValueError(f"attention: expected a MultiHeadAttention, got {attention!r:.60}")
    q, k, _ = attention.project(x, rope)
    return attention_weights(q, k, mask, is_causal=mask is None, scale=attention.scale)


# %% [markdown]
# This is *self*-attention: queries, keys and values come from the same text. The first transformer
# translated, and there each layer of the decoder also had **cross-attention**: queries from the
# text being written, keys and values from the text being read, and no causal mask. Equation
# {eq}`attention` does not change, except that queries and keys may differ in number; our function
# computes it as it stands. Models that only continue a text need self-attention alone.
#
# ### Queries and keys of bounded length
#
# The root keeps scores near one *at the start*. During training queries and keys may grow, and
# with them the scores, until the softmax saturates; large models have diverged that way
# {cite}`dehghani2023vit22b`. A remedy is to normalize each query and key {cite}`henry2020qknorm`,
# in Qwen3 {cite}`yang2025qwen3` to root-mean-square 1 (chapter 10), times a learned gain for each
# feature. A vector of $d$ numbers with root-mean-square 1 has length $\sqrt d$. By Cauchy and
# Schwarz $|q \cdot k| \le \sqrt d \sqrt d$, so the scaled score lies between $-\sqrt d$ and
# $\sqrt d$ (times the largest gain of each), whatever the weights. Rotations of
# {doc}`08_positions` keep lengths, so the bound survives RoPE.
#
# We multiply the matrices of queries and keys by 1, 3 and 5, so that scores become 1, 9 and 25
# times as large, and measure the entropy of the weights of the last token, of 64 that it may see:

# %%
torch.manual_seed(0)
random_text = torch.randn(4, 64, 128)
for name, norm in (("without", None), ("with", partial(nn.RMSNorm, eps=1e-6))):
    layer = MultiHeadAttention(128, 4, qk_norm=norm)
    row = []
    for growth in (1, 3, 5):
        with torch.no_grad():
            layer.q_proj.weight.normal_(std=growth * 128**-0.5)
            layer.k_proj.weight.normal_(std=growth * 128**-0.5)
            last = attention_pattern(layer, random_text)[:, :, -1]
        row.append(f"{torch.special.entr(last).sum(dim=-1).mean():.2f}")
    print(f"{name:8} normalization:", *row, "nats")

# %% [markdown]
# Without normalization the weights collapse to almost one key ($\ln 64 = 4.16$ would be all equal).
# With it the growth has no effect. (The matrices are drawn anew each time, so the three entropies
# differ a little.)
#
# ## What it costs to remember
#
# A model writes one token after the other. For the next one it needs the query of the newest
# token only, but keys and values of all. These never change, for under a causal mask no token
# depends on later ones. So they are kept, in the {term}`KV cache`. Per token and layer it holds a
# key and a value for each head that has its own:
#
# $$
# \text{bytes per token} = 2 \cdot n_\text{layers} \cdot n_\text{kv heads} \cdot d_\text{head} \cdot
# \text{bytes per number} .
# $$ (attention-cache-size)
#
# In the first Llama with 7 billion parameters {cite}`touvron2023llama` that is half a megabyte
# for each token. And for each new token the whole cache goes from memory through the processor,
# which takes time. So people let heads share ({numref}`fig-attention-kinds`). In **multi-query**
# attention {cite}`shazeer2019fast` all heads read one set of keys and values; in
# **grouped-query** attention {cite}`ainslie2023gqa` a few heads each, which costs hardly any
# quality. **Latent** attention {cite}`deepseek2024v2` keeps a short vector instead, from which
# keys and values are made; its section follows.
#
# ```{figure} ../figures/attention-kinds.svg
# :name: fig-attention-kinds
# :alt: Four panels with four query heads each at the top. Multi-head: each query head has a key and value head of its own. Grouped-query: two query heads share each of two. Multi-query: all share one. Latent: each query head has keys and values of its own, which are made from one latent vector, and only this is cached.
#
# Which heads keep keys and values. What is cached is drawn solid.
# ```
#
# The sizes of published models
# {cite}`touvron2023llama,jiang2023mistral,almazrouei2023falcon,deepseek2024v3` are in the library
# transformers. A cached number has two bytes. (Mistral's window of 4,096 tokens, which bounds its
# cache, is left out.)

# %%
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like a widget for its progress
    import transformers

llama, mistral = transformers.LlamaConfig(), transformers.MistralConfig()
falcon, deepseek = transformers.FalconConfig(), transformers.DeepseekV3Config()
per_head = deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim + deepseek.v_head_dim
numbers = {  # to keep in each layer
    "Llama 7B, multi-head": (llama, 2 * llama.num_key_value_heads * llama.head_dim),
    "Mistral 7B, 8 of 32 heads": (mistral, 2 * mistral.num_key_value_heads * mistral.head_dim),
    "Falcon 7B, multi-query": (falcon, 2 * falcon.head_dim),
    "DeepSeek-V3, latent": (deepseek, deepseek.kv_lora_rank + deepseek.qk_rope_head_dim),
    "DeepSeek-V3, were it multi-head": (deepseek, deepseek.num_attention_heads * per_head),
}
kib = {name: n * config.num_hidden_layers * 2 / 1024 for name, (config, n) in numbers.items()}

# %% [markdown]
# For one token, and for a text of 128,000 tokens ({numref}`fig-attention-sizes`). The first three
# keep keys and values, the fourth a latent; the last, in a third color, is only there to compare:

# %% mystnb={"figure": {"caption": "Size of the cache for one token and, behind each bar, also for a text of 128,000 tokens.", "name": "fig-attention-sizes"}, "image": {"alt": "Five horizontal bars on a logarithmic axis in KiB. Llama 7B, multi-head: 512 KiB, 62.5 GiB for 128,000 tokens. Mistral 7B, 8 of 32 heads: 128 KiB, 15.6 GiB. Falcon 7B, multi-query: 8 KiB, 1.0 GiB. DeepSeek-V3, latent: 69 KiB, 8.4 GiB. DeepSeek-V3, were it multi-head: 4,880 KiB, 595.7 GiB."}}
bars = plt.barh(list(kib), list(kib.values()), color=["C0", "C0", "C0", "C2", "C6"])
labels = [f"{size:,.0f} KiB; {size * 128_000 / 2**20:,.1f} GiB" for size in kib.values()]
plt.bar_label(bars, labels, padding=4)
plt.gca().invert_yaxis()
plt.grid(axis="y", visible=False)
plt.xscale("log")
plt.xlim(1, 2_000_000)
plt.xlabel("KiB a token (logarithmic); after the semicolon: GiB for 128,000 tokens")
plt.show()

# %% [markdown]
# ## A cache
#
# The simplest cache is a concatenation. We count what it copies:

# %%
torch.manual_seed(0)
layer = MultiHeadAttention(32, 4, n_kv_heads=2)
ten_tokens = torch.randn(1, 10, 32)
q, k, v = layer.project(ten_tokens)
seen_k, seen_v, outputs, copied = k[:, :, :0], v[:, :, :0], [], 0
for t in range(10):
    seen_k = torch.cat([seen_k, k[:, :, t : t + 1]], dim=2)
    seen_v = torch.cat([seen_v, v[:, :, t : t + 1]], dim=2)
    copied += seen_k.numel() + seen_v.numel()
    outputs.append(scaled_dot_product_attention(q[:, :, t : t + 1], seen_k, seen_v))
whole = scaled_dot_product_attention(q, k, v, is_causal=True)
assert torch.allclose(torch.cat(outputs, dim=2), whole, atol=1e-5)
print(f"to keep {seen_k.numel() + seen_v.numel()} numbers, {copied:,} were copied")

# %% [markdown]
# One token at a time gives what all at once give. But three things are missing. Each `cat` copies
# everything, which for $n$ tokens grows like $n^2$; we want memory that is allocated once. Rows of
# a batch have prompts of unequal lengths. And under a sliding window memory need not grow at all.
#
# One rule serves all three: **position $t$ of a row is kept in slot $t \bmod C$** of that row,
# where $C$ is the number of slots ({numref}`fig-attention-cache`). Without a window $C$ is the
# capacity, and the slot is the position. With a window of $w$ and $C = w$ the slots are a ring, and
# token $t$ overwrites token $t - w$, which has just fallen out of the window. Padding is not
# stored. No table of positions is needed: a row of $n$ tokens has in slot $u$ the largest position
# below $n$ that leaves the remainder $u$, which is
#
# $$
# t = (n - 1) - \big( (n - 1 - u) \bmod C \big) ,
# $$ (attention-slots)
#
# and nothing if that is negative. The mask follows from positions, as before. Keys are stored
# rotated, so that each carries its position with it, in whichever slot it lies.
#
# ```{figure} ../figures/attention-cache.svg
# :name: fig-attention-cache
# :alt: Above, a cache without a window: three rows of eight slots; row 0 has positions 0 to 4, row 1 has 0 to 2, row 2 has 0 to 5, each followed by the slot of the next token, other slots are empty. Below, a ring of four slots for a window of four: a row of length 6 has positions 4, 5, 2, 3 in its slots, and position 6 will go to slot 2, where 2 is.
#
# Slots of a cache without a window, and of a ring. The next token of each row goes where the
# arrow points.
# ```


# %%
#| export
def _positions_in_slots(lengths: Tensor, slots: int, used: int | None = None) -> Tensor:
    """Return which position is in each of the first ``used`` slots, -1 for none; a row for each."""
    last = lengths[:, None] - 1
    first = torch.arange(slots if used is None else used, device=lengths.device)
    return (last - (last - first) % slots).clamp(min=-1)


# %% [markdown]
# The rows of the figure:

# %%
print("no window, 8 slots:", _positions_in_slots(torch.tensor([5, 3]), 8).tolist())
print("ring of 4 slots, 6 tokens:", _positions_in_slots(torch.tensor([6]), 4).tolist())

# %% [markdown]
# All layers store the same tokens in the same places. So the cache as a whole works out a step
# once, before the first layer: which token of which row goes to which slot. A layer then only
# writes. It keeps its keys and values in memory allocated once:


# %%
#| export
class LayerCache:
    """Keys and values of one layer, (batch, n_kv_heads, slots, feature): ``cache[layer]``."""

    def __init__(self, table: "KVCache", keys: Tensor, values: Tensor):
        self._table, self.keys, self.values = table, keys, values
        self._stored: Any = None  # the last step that was stored here

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows, slots, columns = self._table._step
        self.keys[rows, :, slots] = k[rows, :, columns]
        self.values[rows, :, slots] = v[rows, :, columns]
        return self.keys, self.values


# %% [markdown]
# The cache holds the layers, and how many tokens each row has; `spare` adds slots to a ring.
# (`_known`, `_stored`, `used` above, and what the docstring says of `truncate` and compiled steps
# belong to the engine room below.)


# %%
#| export
class KVCache:
    """The keys and values of all layers for the tokens read so far, in memory taken once.

    Each step announces its tokens by ``extend``; then each layer calls ``cache[layer].update``.
    ``capacity``, ``window`` and ``spare`` count tokens. A ``window`` of at most ``capacity`` makes
    a ring of ``window + spare`` slots; rows may then be of any length, and ``truncate`` can go back
    ``spare + 1`` tokens. A ``d_value`` of 0 stores keys only. A step compiled by ``torch.compile``
    is compiled once, whatever the lengths; there a row beyond the capacity is a RuntimeError.
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
        check_at_least(batch_size=(1, batch_size), capacity=(1, capacity), window=(1, window))
        check_at_least(n_kv_heads=(1, n_kv_heads), d_head=(1, d_head), d_value=(0, d_value))
        check_at_least(n_layers=(1, n_layers), spare=(0, spare))
        _check_memory(spare, dtype, device)
        self.capacity, self.window, self.device = capacity, window, device
        self.slots = capacity if window is None else min(capacity, window + spare)
        self._counts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._known: list[int] | None = [0] * batch_size  # the same, without asking the device
        self._step: Any = None  # what the layers are to do
        # Zeros: what is not written yet is multiplied by 0, and 0 times a leftover NaN is NaN.
        empty = torch.zeros(batch_size, n_kv_heads, self.slots, 1, dtype=dtype, device=device)
        widths = d_head, d_head if d_value is None else d_value
        memory = [[empty.repeat(1, 1, 1, width) for width in widths] for _ in range(n_layers)]
        self._layers = [LayerCache(self, keys, values) for keys, values in memory]


# %% [markdown]
# Its heart is `extend`, by which a model announces the positions of its next tokens. It returns
# the mask of what they may attend to:


# %%
#| export
class KVCache(KVCache):  # continued
    def __getitem__(self, layer: int) -> LayerCache:
        return self._layers[layer]

    @property
    def lengths(self) -> Int64[Tensor, " batch"]:
        """The number of tokens in each row, which is also its next position."""
        return self._counts.clone()

    def extend(self, position_ids: Tensor) -> Tensor:
        given = position_ids >= 0
        self._counts += given.sum(dim=1)
        rows, columns = given.nonzero(as_tuple=True)
        self._step = rows, position_ids[rows, columns] % self.slots, columns
        held = _positions_in_slots(self._counts, self.slots)
        return attention_mask(position_ids, held, self.window)


# %% [markdown]
# The test that counts: prompts of 5, 3 and 1 tokens with padding at the left, then seven tokens
# each, one by one, with rotary positions. Each token must get what it gets when its row is
# computed at once.

# %%
from llmbook.positions import RotaryEmbedding

rotary = RotaryEmbedding(d_head=8)
three_rows = torch.randn(3, 12, 32)
prompts = torch.tensor([[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2], [-1, -1, -1, -1, 0]])
singles = [torch.tensor([[5 + t], [3 + t], [1 + t]]) for t in range(7)]


def largest_errors(cache: KVCache, window: int | None) -> list[float]:
    """Of each step, the largest difference to attention over whole rows."""
    mask, errors = causal_mask(12, window), []
    whole = layer(three_rows, rope=rotary(torch.arange(12)[None]), mask=mask)
    for positions in [prompts, *singles]:
        mask, given = cache.extend(positions), positions >= 0
        tokens = three_rows[torch.arange(3)[:, None], positions.clamp(min=0)]
        out = layer(tokens, rope=rotary(positions), mask=mask, cache=cache[0])
        expected = whole[given.nonzero()[:, 0], positions[given]]
        errors.append((out[given] - expected).abs().max().item())
    return errors


with torch.no_grad():
    cache = KVCache(3, capacity=12, n_kv_heads=2, d_head=8)
    errors = largest_errors(cache, window=None)
    print("lengths:", cache.lengths.tolist(), " largest error:", f"{max(errors):.4f}")
    for slots in (4, 5):
        cache = KVCache(3, capacity=12, n_kv_heads=2, d_head=8, window=4, spare=slots - 4)
        wrong = sum(error > 1e-4 for error in largest_errors(cache, window=4))
        print(f"window of 4 in a ring of {slots} slots: {wrong} of 8 steps wrong")

# %% [markdown]
# One step goes wrong in a ring of four. The prompt of five is written at once, its last token into
# the slot of its first, and only then do the tokens attend: the first four, whose windows all
# contain position 0, no longer find it. (Five slots hold the prompt, so nothing goes wrong there.)
# If a step brings more than the ring has room for, then attention must get the old slots with the
# new tokens behind them, and what the ring can hold is stored after that. The exported cache does
# so, and more besides. There `extend(n)` also takes a number of tokens, and `next_positions(n)`,
# `nbytes`, `truncate`, `reset` and `reorder` join it.

# %% [markdown] tags=["engine"]
# ### Engine room: the cache, fast, checked and able to go back, because it runs for every token

# %% [markdown] tags=["engine"]
# In the common case all rows are alike. The slots are then a slice, and one token or a whole prompt
# needs no mask. Wherever it can, the plan works on Python's numbers, not on tensors.


# %% tags=["engine"]
#| export
class _Step(NamedTuple):
    """What the layers do in one step."""

    n: int  # tokens in each row, padding included
    rows: Tensor | None  # row of each token to store; None: rows are alike, `slots` is a slice
    slots: slice | Tensor
    source: Tensor | None  # place of each token among the new ones
    used: int  # slots to return
    append: bool  # return old slots and new tokens: some that are needed will be overwritten


def _write(step: _Step, store: Tensor, new: Tensor) -> Tensor:
    """Write ``new`` to its slots; return what attention is to see."""
    seen, new = store[:, :, : step.used], new.detach().to(store.dtype)
    if step.append:
        seen = torch.cat([seen, new], dim=2)
    if step.rows is None:
        store[:, :, step.slots] = new
    else:
        store[step.rows, :, step.slots] = new[step.rows, :, step.source]
    return seen


# %% tags=["engine"]
#| export
def _step_alike(
    start: int, n: int, slots: int, window: int | None, device: Any
) -> tuple[_Step, Tensor | None]:
    """Plan a step that takes every row from ``start`` to ``start + n``, and its mask, if needed."""
    end, first = start + n, start % slots
    used = min(end, slots)
    step = _Step(n, None, slice(first, first + n), None, used, append=False)
    in_window = window is None or (used if n == 1 else end) <= window
    if in_window and (n == 1 or start == 0):
        return step, None  # causal attention, aligned at the end
    keys = _positions_in_slots(torch.tensor([end], device=device), slots, used)
    queries = torch.arange(start, end, device=device)[None]
    return step, attention_mask(queries, keys, window)


# %% [markdown] tags=["engine"]
# In general each row has positions of its own, with $-1$ for padding on either side, and the full
# ring is minded:


# %% tags=["engine"]
#| export
def _step_apart(
    positions: Tensor, before: list[int], after: list[int], slots: int, window: int | None
) -> tuple[_Step, Tensor]:
    """Plan a step in which each row has positions of its own, and its mask."""
    append = positions.size(1) > 1 and max(after) > slots
    lengths, device = before if append else after, positions.device
    used = min(slots, max(lengths))
    oldest = torch.tensor(after, device=device)[:, None] - slots  # that will still be there
    rows, source = ((positions >= 0) & (positions >= oldest)).nonzero(as_tuple=True)
    step = _Step(positions.size(1), rows, positions[rows, source] % slots, source, used, append)
    keys = _positions_in_slots(torch.tensor(lengths, device=device), slots, used)
    keys = torch.cat([keys, positions], dim=1) if append else keys
    return step, attention_mask(positions, keys, window)


# %% [markdown] tags=["engine"]
# Before planning, a step is checked: positions must go on from each row's length, and fit.


# %% tags=["engine"]
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


def _is_ring(cache: "KVCache") -> bool:
    """A ring of at least the window never fills up; all other memory does."""
    return cache.window is not None and cache.window <= cache.capacity


def _positions_of_all(cache: "KVCache", position_ids: Tensor) -> Tensor:
    """Return a row of positions for each row of the cache; one may stand for all."""
    batch_size = len(cache._counts)
    if position_ids.size(0) not in (1, batch_size):
        expected = f"positions of {batch_size} rows, or of one for all"
        raise ValueError(f"position_ids: expected {expected}, got {position_ids.size(0)}")
    return position_ids.expand(batch_size, -1)


# %% tags=["engine"]
#| export
def _plan(cache: "KVCache", position_ids: Tensor | int) -> tuple[_Step, Tensor | None, list[int]]:
    """Return what the layers are to do, the mask, and the lengths of the rows after it."""
    before, capacity = cache._lengths, cache.capacity
    if isinstance(position_ids, Tensor):
        check_tensor("position_ids", position_ids, "rows", "sequence", kind="whole numbers")
        positions = _positions_of_all(cache, position_ids)
        n, added = positions.size(1), _counted(positions, before)
    else:
        check_whole("position_ids", position_ids, 1)
        n, added = position_ids, [position_ids] * len(before)
    after = [length + new for length, new in zip(before, added, strict=True)]
    if max(after) > capacity and not _is_ring(cache):
        expected = f"at most {capacity} tokens in a row, the capacity"
        raise ValueError(f"position_ids: expected {expected}, got {max(after)}")
    alike = min(before) == max(before) and min(added) == n
    if alike and (n == 1 or after[0] <= cache.slots):
        return *_step_alike(before[0], n, cache.slots, cache.window, cache.device), after
    if not isinstance(position_ids, Tensor):
        positions = cache.next_positions(n).expand(len(before), -1)
    return *_step_apart(positions, before, after, cache.slots, cache.window), after


# %% [markdown] tags=["engine"]
# All this asks Python how long the rows are. `torch.compile` would take the answers for constants
# and compile each step anew, since every token changes them. A compiled step therefore knows the
# lengths as a tensor only, works on all slots, always with a mask, and so has the same shapes for
# every token. A single token is written to its slot, and padding is replaced by what was there. For
# several tokens we ask from the side of the slots: which of the new tokens, if any, is the last to
# go there? Where Python cannot look at numbers, checks are left to the device
# (`torch._assert_async`).


# %% tags=["engine"]
#| export
class _FixedStep(NamedTuple):
    """What the layers do in a compiled step: tensors whose shapes do not depend on lengths."""

    n: int
    given: Tensor  # (batch, n): no padding
    slot: Tensor  # (batch,): of the first token
    source: Tensor  # (batch, slots): place of the new token that goes there, -1 for none
    append: bool


def _write_fixed(step: _FixedStep, store: Tensor, new: Tensor) -> Tensor:
    """Write ``new`` to its slots; return what attention is to see."""
    new = new.detach().to(store.dtype)
    seen = torch.cat([store, new], dim=2) if step.append else store
    if step.n == 1:
        rows = torch.arange(len(store), device=store.device)
        old, fresh = store[rows, :, step.slot], step.given[..., None]
        store[rows, :, step.slot] = torch.where(fresh, new[:, :, 0], old)
    else:
        source = step.source[:, None, :, None]
        there = source.clamp(min=0).expand(-1, new.size(1), -1, new.size(3))
        store.copy_(torch.where(source >= 0, new.gather(2, there), store))
    return seen


# %% [markdown] tags=["engine"]
# Slot $u$ will hold position $t$ ({eq}`attention-slots` with the new length). If $t$ is new, it is
# number $t - \text{old length} + 1$ of the tokens given, and `searchsorted` in their running count
# finds its place.


# %% tags=["engine"]
#| export
def _plan_fixed(cache: "KVCache", position_ids: Tensor | int) -> tuple[_FixedStep, Tensor, Tensor]:
    """As ``_plan``, in shapes that do not depend on the lengths; these are a tensor."""
    if not isinstance(position_ids, Tensor):
        position_ids = cache.next_positions(position_ids)
    positions, before = _positions_of_all(cache, position_ids), cache._counts
    n, given = positions.size(1), positions >= 0
    number = given.cumsum(dim=1)  # of each token among those given, from 1
    after = before + number[:, -1]
    going_on = torch.where(given, before[:, None] + number - 1, -1) == positions
    torch._assert_async(going_on.all(), "position_ids: expected rows to go on from their lengths")
    if not _is_ring(cache):
        fits = (after <= cache.capacity).all()
        torch._assert_async(fits, "position_ids: expected no row to grow beyond the capacity")
    append = n > 1 and _is_ring(cache)
    held = _positions_in_slots(after, cache.slots)
    ordinal = held - before[:, None] + 1  # among the new tokens; those before have none
    source = torch.searchsorted(number, ordinal.clamp(min=1)).clamp(max=n - 1)
    source = torch.where(ordinal > 0, source, -1)
    keys = torch.cat([_positions_in_slots(before, cache.slots), positions], 1) if append else held
    step = _FixedStep(n, given, positions[:, 0] % cache.slots, source, append)
    return step, attention_mask(positions, keys, cache.window), after


# %% [markdown] tags=["engine"]
# The class gets the full versions of `extend` and `next_positions`, which take the place of the
# simple ones. Outside of compiled code the lengths are known as Python's numbers, too; after a
# compiled step they are asked for once they are needed.


# %% tags=["engine"]
#| export
class KVCache(KVCache):  # continued
    @property
    def _lengths(self) -> list[int]:
        if self._known is None:
            self._known = self._counts.tolist()
        return self._known

    @_lengths.setter
    def _lengths(self, lengths: list[int]) -> None:
        self._known, self._counts = lengths, torch.tensor(lengths, device=self.device)

    def next_positions(self, n: int) -> Int64[Tensor, "batch_or_1 n"]:
        """Return the next ``n`` positions of each row, or of one row if all are alike."""
        check_whole("n", n, 1)
        known = None if torch.compiler.is_compiling() else self._lengths
        start = self._counts[:1] if known and min(known) == max(known) else self._counts
        return start[:, None] + torch.arange(n, device=self.device)

    def extend(
        self, position_ids: Int64[Tensor, "rows sequence"] | int
    ) -> Bool[Tensor, "batch_or_1 1 sequence keys"] | None:
        """Announce tokens; return the mask for what each layer's ``update`` will return.

        Either how many each row gets, or their positions (one row may stand for all): a row goes on
        from its length, -1 is padding, which is not stored. None: plain causal attention, aligned
        at the end. A ValueError tells of other positions, or of a row beyond the capacity.
        """
        mask: Tensor | None
        if torch.compiler.is_compiling():
            self._step, mask, after = _plan_fixed(self, position_ids)
            self._known = None
            self._counts.copy_(after)
        else:
            self._step, mask, self._lengths = _plan(self, position_ids)
        return mask


# %% [markdown] tags=["engine"]
# A layer checks what it is given, and that it is given once:


# %% tags=["engine"]
#| export
class LayerCache(LayerCache):  # continued
    def update(
        self,
        k: Float[Tensor, "batch n_kv_heads sequence d_head"],
        v: Float[Tensor, "batch n_kv_heads sequence d_value"],
    ) -> tuple[
        Float[Tensor, "batch n_kv_heads keys d_head"],
        Float[Tensor, "batch n_kv_heads keys d_value"],
    ]:
        """Store keys and values of the announced tokens; return all that these may attend to.

        What is returned may be a view, which the next step changes. No gradient flows through it. A
        ValueError tells of tensors that do not fit what was announced, and of a second update.
        """
        step = self._table._step
        compiled = torch.compiler.is_compiling()  # there a second update cannot be told
        if step is None or (not compiled and step is self._stored):
            got = "none" if step is None else "those of a step twice"
            raise ValueError(f"k: expected tokens announced by extend, got {got}")
        _check_fits("k", k, self.keys, step.n)
        _check_fits("v", v, self.values, step.n)
        if not compiled:
            self._stored = step
        write = _write_fixed if isinstance(step, _FixedStep) else _write
        return write(step, self.keys, k), write(step, self.values, v)


# %% [markdown] tags=["engine"]
# While a model writes, each row gets one token at a time. If the rows are equally long, storing
# them is a plain copy, which chapter 14 asks for in every layer of every step, without the checks:


# %% tags=["engine"]
#| export
class LayerCache(LayerCache):  # continued
    def update_one(
        self,
        k: Float[Tensor, "batch n_kv_heads d_head"],
        v: Float[Tensor, "batch n_kv_heads d_value"],
    ) -> tuple[
        Float[Tensor, "batch n_kv_heads keys d_head"],
        Float[Tensor, "batch n_kv_heads keys d_value"],
    ]:
        """Do what ``update`` does for a single token in each row; what is given is not checked."""
        step = self._table._step
        if not isinstance(step, _Step) or not isinstance(step.slots, slice):
            return self.update(k.unsqueeze(2), v.unsqueeze(2))
        self.keys.select(2, step.slots.start).copy_(k)
        self.values.select(2, step.slots.start).copy_(v)
        return self.keys.narrow(2, 0, step.used), self.values.narrow(2, 0, step.used)


# %% tags=["engine"]
#| export
def _check_fits(name: str, new: Tensor, store: Tensor, n: int) -> None:
    """Raise unless ``new`` has the announced tokens of each row, in the heads of the cache."""
    check_tensor(name, new, "...")
    batch_size, heads, _, width = store.shape
    if new.shape != (batch_size, heads, n, width):
        expected = f"{n} announced tokens in each of {batch_size} rows"
        shape = f"(..., {heads}, {n}, {width})"
        raise ValueError(f"{name}: expected {expected}, {shape}, got {tuple(new.shape)}")


# %% [markdown] tags=["engine"]
# Generation sometimes takes tokens back, or goes on from one row several times (chapter 14). As
# positions fix the slots, to take tokens back is to make a row shorter. A ring must then still have
# all that the window reaches; `spare` further slots let it go back that many tokens more than the
# one that it can always go back.


# %% tags=["engine"]
#| export
class KVCache(KVCache):  # continued
    @property
    def nbytes(self) -> int:
        """The size of all keys and values in bytes, in use or not."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self._step, self._lengths = None, [0] * len(self._counts)

    def truncate(self, lengths: Int64[Tensor, " batch"] | int) -> None:
        """Forget each row's tokens from ``lengths`` on; ValueError if its window needs more."""
        before = self._lengths
        if isinstance(lengths, Tensor):
            check_tensor("lengths", lengths, len(before), kind="whole numbers")
            after = lengths.tolist()
        else:
            after = [lengths] * len(before)
        _check_lengths(before, after, self.slots, self.window)
        self._step, self._lengths = None, after

    def reorder(self, rows: Int64[Tensor, " rows"]) -> None:
        """Make row i a copy of what row ``rows[i]`` was; there may be fewer or more than before."""
        check_tensor("rows", rows, "rows", kind="whole numbers")
        wrong = [row for row in rows.tolist() if not 0 <= row < len(self._lengths)]
        if wrong or not len(rows):
            most = len(self._lengths) - 1
            raise ValueError(f"rows: expected 0 to {most}, got {[*wrong, 'none'][0]}")
        self._step, self._lengths = None, [self._lengths[row] for row in rows.tolist()]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


# %% tags=["engine"]
#| export
def _check_lengths(before: list[int], after: list[int], slots: int, window: int | None) -> None:
    """Raise unless rows get shorter and keep all that the window of their next token needs."""
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        overwritten = max(old - slots, 0)  # positions below this one
        least = overwritten + (window or 0) - 1 if overwritten else 0
        if isinstance(new, bool) or not isinstance(new, int) or not least <= new <= old:
            raise ValueError(f"lengths: expected {least} to {old} in row {row}, got {new!r}")


# %% [markdown] tags=["engine"]
# The same rows in the ring of four that went wrong above, and how much memory the ring saves:

# %% tags=["engine"]
with torch.no_grad():
    ring = KVCache(3, capacity=12, n_kv_heads=2, d_head=8, window=4)
    wrong = sum(error > 1e-4 for error in largest_errors(ring, window=4))
    unbounded = KVCache(3, capacity=12, n_kv_heads=2, d_head=8)
print(f"{wrong} of 8 steps wrong; {ring.nbytes:,} bytes instead of {unbounded.nbytes:,}")

# %% [markdown]
# ## Latent attention
#
# Sharing heads saves memory by having fewer keys and values. DeepSeek's way
# {cite}`deepseek2024v2` is to have all of them and keep none. Each token is pressed into a
# **latent** $c_j$ of $r$ numbers, and each head $h$ gets its key and value from that by matrices
# $U_K^h$ and $U_V^h$:
#
# $$
# c_j = x_j W_C , \qquad k_j^h = c_j U_K^h , \qquad v_j^h = c_j U_V^h .
# $$
#
# Only $c_j$ is kept. Do the keys of all tokens then have to be computed anew at every step? In fact
# they need not be computed at all. The score is
#
# $$
# q \cdot k_j^h = q \, (c_j U_K^h)^\top = \big( q \, U_K^{h\top} \big)\, c_j^\top :
# $$ (attention-absorbed)
#
# the matrix moves from the keys, of which there are many, to the query, of which there is one. It
# is *absorbed*. The same works for the values, because a mean commutes with a matrix:
# $\sum_j p_j (c_j U_V^h) = \big( \sum_j p_j c_j \big) U_V^h$. In this form all heads read the
# same $r$ numbers: latent attention has become multi-query attention with wide heads. We compute
# both forms for 4 heads of 8 numbers and a latent of 12:

# %%
torch.manual_seed(0)
latent = torch.randn(1, 10, 12, dtype=torch.float64)  # of ten tokens; the 1 in front: a head
up_k, up_v = torch.randn(2, 4, 12, 8, dtype=torch.float64)  # (heads, d_latent, d_head)
query = torch.randn(4, 1, 8, dtype=torch.float64)  # of the last token
expanded = scaled_dot_product_attention(query, latent @ up_k, latent @ up_v)
mean = scaled_dot_product_attention(query @ up_k.mT, latent, latent, scale=8**-0.5)
absorbed = mean @ up_v
assert torch.allclose(absorbed, expanded)
made, kept = 2 * (latent @ up_k).numel(), latent.numel()
print(f"keys and values of ten tokens: {made} numbers; their latents: {kept}")

# %% [markdown]
# One thing is in the way. A rotary key is $k_j R_j$, with a rotation that depends on the
# position, and then $R_j$ stands between $U_K^h$ and $q$, different for each $j$, so that $U_K^h$
# cannot be moved to the query. So each key gets a second part, of few numbers, that is rotated,
# and shared by all heads; the first part has no positions. Scores add up over both. Latent and
# rotated part are cached, which fits our cache as one head without values.

# %% [markdown] tags=["engine"]
# ### Engine room: DeepSeek's layer, because its rotated part does not fit `MultiHeadAttention`

# %% [markdown] tags=["engine"]
# The latent is normalized before it is used. Queries may be made from a latent of their own, which
# saves weights, not cache.


# %% tags=["engine"]
#| export
class MultiHeadLatentAttention(nn.Module):
    """DeepSeek's latent attention, which caches ``d_latent + d_rope`` numbers for each token.

    A head's key has ``d_head`` numbers made from the latent, and ``d_rope`` rotated ones that all
    heads share. The cache is a ``KVCache`` with ``n_kv_heads=1``, ``d_head=d_latent + d_rope`` and
    ``d_value=0``. ``norm`` is for latents; queries have one, too, if ``d_query_latent`` is given.
    ``scale`` multiplies scores, by default 1 / sqrt(d_head + d_rope); a model stretched by YaRN has
    a larger one. DeepSeek's files are in the layout "interleaved". Source: DeepSeek-AI (2024),
    section 2.1.
    """

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
        layout: Literal["half", "interleaved"] = "half",
        scale: float | None = None,
        backend: Backend = "torch",
    ):
        super().__init__()
        _, d_head = _check_heads(d_model, n_heads, None, d_head, dropout)
        _check_way(backend, layout, scale)
        check_at_least(d_latent=(1, d_latent), d_value=(1, d_value))
        check_at_least(d_query_latent=(1, d_query_latent))
        check_even(d_rope=d_rope)
        self.layout, self.scale = layout, (d_head + d_rope) ** -0.5 if scale is None else scale
        self.n_heads, self.d_head, self.d_value = n_heads, d_head, d_value or d_head
        self.d_latent, self.d_rope, self.dropout, self.backend = d_latent, d_rope, dropout, backend
        self.q_proj = _query_projection(d_model, n_heads * (d_head + d_rope), d_query_latent, norm)
        self.kv_down_proj = nn.Linear(d_model, d_latent + d_rope, bias=False)
        self.kv_norm = norm(d_latent)
        self.kv_up_proj = nn.Linear(d_latent, n_heads * (d_head + self.d_value), bias=False)
        self.o_proj = nn.Linear(n_heads * self.d_value, d_model, bias=False)


# %% tags=["engine"]
#| export
def _query_projection(
    d_model: int, d_out: int, d_latent: int | None, norm: Callable[[int], nn.Module]
) -> nn.Module:
    """One matrix, or two with a normalized latent between them, which have fewer weights."""
    if d_latent is None:
        return nn.Linear(d_model, d_out, bias=False)
    down, up = nn.Linear(d_model, d_latent, bias=False), nn.Linear(d_latent, d_out, bias=False)
    return nn.Sequential(OrderedDict(down=down, norm=norm(d_latent), up=up))


# %% tags=["engine"]
#| export
class MultiHeadLatentAttention(MultiHeadLatentAttention):  # continued
    def project(
        self, x: Float[Tensor, "batch sequence d_model"], rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[
        Float[Tensor, "batch n_heads sequence d_query"], Float[Tensor, "batch 1 sequence d_cached"]
    ]:
        """Return queries, plain and rotated part, and what is cached: latent and rotated key."""
        _check_call(x, self.kv_down_proj.in_features, rope)
        q = self.q_proj(x).view(*x.shape[:2], self.n_heads, -1).transpose(1, 2)
        down = self.kv_down_proj(x)[:, None]  # (batch, 1, sequence, d_latent + d_rope)
        latent, k_rope = down.split((self.d_latent, self.d_rope), dim=-1)
        if rope is not None:
            q_plain, q_rope = q.split((self.d_head, self.d_rope), dim=-1)
            q = torch.cat([q_plain, apply_rope(q_rope, *rope, self.layout)], dim=-1)
            k_rope = apply_rope(k_rope, *rope, self.layout)
        return q, torch.cat([self.kv_norm(latent), k_rope], dim=-1)


# %% [markdown] tags=["engine"]
# Then the two ways to the same result. For many queries at once, in training and for prompts,
# keys and values are made, because a score then takes fewer products (in DeepSeek-V3 192 instead
# of 576). For a single query the absorbed way wins, because it makes none.


# %% tags=["engine"]
#| export
class MultiHeadLatentAttention(MultiHeadLatentAttention):  # continued
    def _expanded(self, q: Tensor, seen: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        """Give each head keys and values of its own, made from the latents in ``seen``."""
        latent, k_rope = seen.split((self.d_latent, self.d_rope), dim=-1)
        kv = self.kv_up_proj(latent[:, 0]).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = kv.split((self.d_head, self.d_value), dim=-1)
        k = torch.cat([k, k_rope.expand(-1, self.n_heads, -1, -1)], dim=-1)
        return scaled_dot_product_attention(q, k, v, mask, **options)

    def _absorbed(self, q: Tensor, seen: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        """Carry the queries to the latents, and the mean of the latents to the values."""
        up = self.kv_up_proj.weight.view(self.n_heads, -1, self.d_latent)
        up_k, up_v = up.split((self.d_head, self.d_value), dim=1)
        q_plain, q_rope = q.split((self.d_head, self.d_rope), dim=-1)
        q = torch.cat([q_plain @ up_k, q_rope], dim=-1)  # (..., d_latent + d_rope)
        latent = seen[..., : self.d_latent]
        return scaled_dot_product_attention(q, seen, latent, mask, **options) @ up_v.mT


# %% tags=["engine"]
#| export
class MultiHeadLatentAttention(MultiHeadLatentAttention):  # continued
    def forward(
        self,
        x: Float[Tensor, "batch sequence d_model"],
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch sequence d_model"]:
        """Return what each token gathers, as ``MultiHeadAttention``; ``rope`` is for ``d_rope``."""
        _check_call(x, self.kv_down_proj.in_features, rope, cache)
        q, seen = self.project(x, rope)
        if cache is not None:
            seen, _ = cache.update(seen, seen[..., :0])
        attend = self._absorbed if cache is not None and x.size(1) == 1 else self._expanded
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"scale": self.scale, "dropout": dropout, "backend": self.backend}
        out = attend(q, seen, mask, is_causal=mask is None, **options)
        return self.o_proj(out.transpose(1, 2).flatten(2))


# %% [markdown] tags=["engine"]
# Token by token through a cache, which takes the absorbed way, against all at once, which does
# not:

# %% tags=["engine"]
torch.manual_seed(0)
mla = MultiHeadLatentAttention(32, 4, d_latent=12, d_rope=8)
two_rows = torch.randn(2, 10, 32)
whole = mla(two_rows, rope=rotary(torch.arange(10)[None]))
cache = KVCache(2, 10, n_kv_heads=1, d_head=12 + 8, d_value=0)
outputs = []
for t in range(10):
    rope, mask = rotary(cache.next_positions(1)), cache.extend(1)
    outputs.append(mla(two_rows[:, t : t + 1], rope=rope, mask=mask, cache=cache[0]))
assert torch.allclose(torch.cat(outputs, dim=1), whole, atol=1e-5)
full = KVCache(2, 10, n_kv_heads=4, d_head=8)
print(f"bytes in the cache: {cache.nbytes:,}; multi-head of the same size: {full.nbytes:,}")

# %% [markdown]
# ## Attention without its matrix
#
# For $n$ tokens each head makes $n^2$ scores, and as many weights, and both have to be kept for
# the backward pass. With 32 heads and 8,192 tokens the weights of one layer are 4 GiB in 16 bits.
# Yet what goes in and what comes out has only $n d$ numbers. Must the matrix exist?
#
# ### Softmax in one pass
#
# The softmax seems to force it: its denominator and its maximum need the whole row before the
# first weight is known. But one may start without them and correct later
# {cite}`milakov2018online,rabe2021memory`. Read the row of scores in blocks. After some blocks
# let $m$ be the largest score so far, and
#
# $$
# \ell = \sum_j e^{s_j - m} , \qquad a = \sum_j e^{s_j - m} v_j ,
# $$ (attention-online)
#
# with sums over what has been read. Now comes a block $B$ with the largest score $m_B$. The new
# maximum is $m' = \max(m, m_B)$. In the old sums each exponent has to become $s_j - m'$, and
# $e^{s_j - m'} = e^{m - m'} e^{s_j - m}$, with the same factor for all. Hence
#
# $$
# \ell' = e^{m - m'} \ell + \sum_{j \in B} e^{s_j - m'} , \qquad
# a' = e^{m - m'} a + \sum_{j \in B} e^{s_j - m'} v_j .
# $$ (attention-rescale)
#
# At the end $a / \ell = \sum_j e^{s_j - m} v_j / \sum_k e^{s_k - m}$ is the output, exactly. We
# start from $m = -\infty$ and zeros; the first factor is then $e^{-\infty} = 0$.

# %%
torch.manual_seed(0)
scores, values = 2 * torch.randn(12).flip(0), torch.randn(12, 3)  # flipped: the peak rises twice
m, total, a = -torch.inf, 0.0, torch.zeros(3)
for s, v in zip(scores.split(4), values.split(4), strict=True):
    higher = max(m, s.max().item())
    shrink = math.exp(m - higher)
    total = shrink * total + (s - higher).exp().sum().item()
    a = shrink * a + (s - higher).exp() @ v
    m = higher
    print(f"largest so far {m:5.2f}, old sums times {shrink:.4f}, sum {total:.2f}")
assert torch.allclose(a / total, softmax(scores) @ values, atol=1e-5)
log_sum = m + math.log(total)
print(f"log-sum-exp {log_sum:.2f}, as of the whole row: {scores.logsumexp(0):.2f}")

# %% [markdown]
# ### Backward without weights
#
# The backward pass needs the weights $P$. It can make them anew, a block at a time, if it knows
# one number for each row, the **log-sum-exp** $L_i = m_i + \log \ell_i$, for
#
# $$
# P_{ij} = \frac{e^{S_{ij} - m_i}}{\ell_i} = e^{S_{ij} - L_i} , \qquad
# S = \frac{Q K^\top}{\sqrt d} , \qquad O = P V .
# $$
#
# Write $dX$ for the derivative of the loss with respect to $X$. Two gradients are those of any
# product: $dV = P^\top dO$ and $dP = dO\, V^\top$. For the scores we sum over all weights that a
# score has an influence on, which are those of its row, with {eq}`attention-softmax-gradient`:
#
# $$
# \begin{aligned}
# dS_{ij} &= \sum_k dP_{ik} \frac{\partial P_{ik}}{\partial S_{ij}}
# = \sum_k dP_{ik} P_{ik} (\delta_{kj} - P_{ij}) \\
# &= P_{ij} \Big( dP_{ij} - \sum_k P_{ik}\, dP_{ik} \Big) .
# \end{aligned}
# $$ (attention-ds)
#
# The last sum, call it $D_i$, seems to need a whole row of weights again. It does not, since
# $dP_{ik} = \sum_f dO_{if} V_{kf}$:
#
# $$
# D_i = \sum_k P_{ik} \sum_f dO_{if} V_{kf} = \sum_f dO_{if} \sum_k P_{ik} V_{kf}
# = \sum_f dO_{if} O_{if} .
# $$ (attention-d)
#
# It is the dot product of two rows that we have. So $dS = P \odot (dP - D)$, and at last
# $dQ = dS\, K / \sqrt d$ and $dK = dS^\top Q / \sqrt d$. All of it can be done block by block.
# Checked against autograd:

# %%
torch.manual_seed(0)
q, k, v = (torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
out = scaled_dot_product_attention(q, k, v)
d_out = torch.randn_like(out)
expected = torch.autograd.grad(out, (q, k, v), d_out)
with torch.no_grad():
    scores = q @ k.mT / 2
    p = (scores - scores.logsumexp(dim=-1, keepdim=True)).exp()
    d_scores = p * (d_out @ v.mT - (d_out * out).sum(dim=-1, keepdim=True))
    by_hand = d_scores @ k / 2, d_scores.mT @ q / 2, p.mT @ d_out
for ours, theirs in zip(by_hand, expected, strict=True):
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
print(f"{p.numel()} weights made anew from {p.size(-1)} numbers, the log-sum-exps")
print(f"gradients of a row of scores sum to {d_scores.sum(dim=-1).abs().max():.6f}")

# %% [markdown]
# The last line is a check that needs no second implementation: adding the same number to all
# scores of a row changes nothing, so their gradients must cancel.
#
# ### Tiles
#
# This is FlashAttention {cite}`dao2022flash,dao2024flash2`: blocks of queries against blocks of
# keys, in **tiles** small enough for the fast memory of a processor
# ({numref}`fig-attention-tiles`). Only a tile of the scores exists at a time. What is kept for
# the backward pass is queries, keys, values, output, and $L$. If attention is causal, tiles above
# the diagonal are not even begun: almost half of all.
#
# ```{figure} ../figures/attention-tiles.svg
# :name: fig-attention-tiles
# :alt: A square of 4 by 4 tiles, blocks of queries downward and blocks of keys to the right. Tiles above the diagonal are empty: skipped. Tiles on the diagonal are masked in part. The row of the third block of queries is marked: its three tiles are visited from left to right, and beside it the running maximum m, sum l and mean a are passed from tile to tile, then a divided by l is the output and m plus log l is stored.
#
# Causal attention in tiles. Maximum, sum and mean of a block of queries pass from tile to tile.
# ```


# %% tags=["engine"]
#| export
# Which tiles there are, and the scores of one of them.
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
        """Yield the blocks of keys that any of the queries ``rows`` may see."""
        seen = min(self.keys, rows.stop + self.keys - self.queries) if self.is_causal else self.keys
        return _blocks(seen, self.size)


def _blocks(stop: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, stop)) for at in range(0, stop, size))


def _tile(
    q: Tensor, k: Tensor, mask: Tensor | None, tiles: _Tiles, rows: slice, columns: slice
) -> Tensor:
    """Return the scores of one tile, -inf where attention is not allowed."""
    scores = q[..., rows, :] @ k[..., columns, :].mT
    diagonal = rows.start + tiles.keys - tiles.queries - columns.start
    if tiles.is_causal and diagonal < columns.stop - columns.start - 1:  # it crosses this tile
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores.masked_fill_(hidden.triu(diagonal + 1), -torch.inf)
    return scores if mask is None else scores.masked_fill_(~mask[..., rows, columns], -torch.inf)


# %% [markdown]
# The forward pass is the loop from above, for a block of rows at a time: `tiles` yields the blocks
# of queries, and for each the blocks of keys that they may see; `_tile` gives the scores of one
# block of rows against one block of columns, $-\infty$ where attention is not allowed. For a row
# that may see nothing we store $L = +\infty$: then its weights $e^{S - L}$ come out as zeros in the
# backward pass, too.


# %%
#| export
def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tiles: _Tiles
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp of each row; ``q`` is scaled already."""
    out = q.new_zeros(*q.shape[:-1], v.size(-1))
    log_sum = q.new_zeros(*q.shape[:-1], 1)
    for rows in tiles.rows():
        mean = out[..., rows, :]  # a view: `out` is written in place
        peak = torch.full_like(log_sum[..., rows, :], -torch.inf)
        total = torch.zeros_like(peak)
        for columns in tiles.columns(rows):
            scores = _tile(q, k, mask, tiles, rows, columns)
            higher = torch.maximum(peak, scores.amax(dim=-1, keepdim=True))
            finite = higher.masked_fill(higher == -torch.inf, 0.0)
            weights, shrink = torch.exp(scores.sub_(finite)), torch.exp(peak - finite)
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            mean.mul_(shrink).add_(weights @ v[..., columns, :])
            peak = higher
        mean.div_(total.clamp(min=1.0))
        log_sum[..., rows, :] = torch.where(total > 0, peak + total.log(), torch.inf)
    return out, log_sum


# %% [markdown]
# A text of 1,000 tokens in tiles of 64:

# %%
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1000, 32, dtype=torch.float64) for _ in range(3))
tiles = _Tiles(1000, 1000, size=64, is_causal=True)
out, _ = _flash_forward(q * 32**-0.5, k, v, None, tiles)
assert torch.allclose(out, scaled_dot_product_attention(q, k, v, is_causal=True))
begun = sum(1 for rows in tiles.rows() for _ in tiles.columns(rows))
print(f"{begun} of {len(list(tiles.rows())) ** 2} tiles begun, each of at most {64 * 64:,} scores")

# %% [markdown] tags=["engine"]
# ### Engine room: the backward pass in tiles, as one function, so that autograd keeps no tiles

# %% [markdown] tags=["engine"]
# The backward pass visits the same tiles, makes the weights of each anew, and adds up gradients.


# %% tags=["engine"]
#| export
def _flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tiles: _Tiles,
    log_sum: Tensor,
    d_out: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; ``mean`` is D, the row sums of d_out times out."""
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in tiles.rows():
        for columns in tiles.columns(rows):
            scores = _tile(q, k, mask, tiles, rows, columns)
            weights = scores.sub_(log_sum[..., rows, :]).exp_()
            d_weights = d_out[..., rows, :] @ v[..., columns, :].mT
            d_scores = d_weights.sub_(mean[..., rows, :]).mul_(weights)
            d_q[..., rows, :] += d_scores @ k[..., columns, :]
            # All queries of a group send gradients to the keys and values that they share.
            d_k[..., columns, :] += (d_scores.mT @ q[..., rows, :]).sum(-3, keepdim=True)
            d_v[..., columns, :] += (weights.mT @ d_out[..., rows, :]).sum(-3, keepdim=True)
    return d_q, d_k, d_v


# %% [markdown] tags=["engine"]
# The two passes become one function for autograd. For 16-bit inputs all is computed in float32.
# Heads that share keys stand in a dimension of their own, the group, which keys and values have
# with size one. Beside the output it returns the log-sum-exps, with a gradient: a score's influence
# on $L_i$ is $\partial L_i / \partial S_{ij} = e^{S_{ij}} / \sum_k e^{S_{ik}} = P_{ij}$, the
# gradient of every log-sum-exp. So a gradient $dL_i$ adds $P_{ij}\, dL_i$ to {eq}`attention-ds`,
# which is the same as taking it from $D_i$. Where a query sees nothing, no score has any.


# %% tags=["engine"]
#| export
class _FlashAttention(torch.autograd.Function):
    """Attention in tiles, of (..., n_kv_heads, group, sequence, feature); and log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, tiles: _Tiles
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        wide_q, wide_k, wide_v = (q * scale).to(dtype), k.to(dtype), v.to(dtype)
        wide_out, log_sum = _flash_forward(wide_q, wide_k, wide_v, mask, tiles)
        out = wide_out.to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, out, log_sum)
        ctx.scale, ctx.tiles = scale, tiles
        return out, log_sum.masked_fill(log_sum == torch.inf, -torch.inf).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_log_sum: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, log_sum = ctx.saved_tensors
        wide_q, wide_k, wide_v, d_out = (x.to(log_sum.dtype) for x in (q * ctx.scale, k, v, d_out))
        mean = (d_out * out).sum(dim=-1, keepdim=True)
        mean -= d_log_sum.unsqueeze(-1).masked_fill(log_sum == torch.inf, 0.0)
        gradients = _flash_backward(wide_q, wide_k, wide_v, mask, ctx.tiles, log_sum, d_out, mean)
        d_q, d_k, d_v = (gradient.to(q.dtype) for gradient in gradients)
        return d_q * ctx.scale, d_k, d_v, None, None, None


# %% tags=["engine"]
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
    return_lse: bool = False,
) -> Any:
    """Return ``scaled_dot_product_attention`` in memory that grows with the sequence only.

    Scores are made in tiles of ``block_size`` by ``block_size`` and not kept; those above the
    diagonal are skipped. With ``return_lse``, the log-sum-exp of each query's scaled scores comes
    second, (..., n_heads, queries), in float32 or wider, -inf where a query sees nothing: it is
    what joins attention over parts of the keys, and has a gradient as the output has. Source: Dao
    et al. (2022); the order of the loops: Dao (2024).
    """
    _check_inputs(q, k, mask, is_causal, scale)
    _check_values(k, v)
    check_whole("block_size", block_size, 1)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    tiles = _Tiles(q.size(-2), k.size(-2), block_size, is_causal)
    groups = k.size(-3), q.size(-3) // k.size(-3)
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.size(-2)).unflatten(-3, groups)  # a view
    q, k, v = q.unflatten(-3, groups), k.unsqueeze(-3), v.unsqueeze(-3)
    out, log_sum = _FlashAttention.apply(q, k, v, mask, scale, tiles)
    out = out.flatten(-4, -3)
    return (out, log_sum.flatten(-3, -2)) if return_lse else out


# %% [markdown] tags=["engine"]
# Is it the same function? With 100 tokens the last tiles are not full, and two heads of queries
# share each head of keys.

# %% tags=["engine"]
torch.manual_seed(0)
inputs = [
    torch.randn(2, heads, 100, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
]
found = []
for way in (flash_attention, scaled_dot_product_attention):
    out = way(*inputs, is_causal=True)
    found.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
for ours, theirs in zip(*found, strict=True):
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)
print(f"{sum(tensor.numel() for tensor in found[0]):,} numbers agree to eleven digits")

# %% [markdown] tags=["engine"]
# Keys may lie on two machines. Each attends to its half; a half has the weight $e^L$ in the whole,
# so softmax over the two log-sum-exps joins the outputs:

# %% tags=["engine"]
torch.manual_seed(0)
q, k, v = (torch.randn(2, heads, 100, 16, dtype=torch.float64) for heads in (4, 2, 2))
halves = [
    flash_attention(q, k[:, :, part], v[:, :, part], return_lse=True)
    for part in (slice(0, 37), slice(37, 100))
]
outputs, log_sums = (torch.stack(part) for part in zip(*halves, strict=True))
joined = (softmax(log_sums, dim=0)[..., None] * outputs).sum(dim=0)
assert torch.allclose(joined, scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-11)
print(f"joined from 37 and 63 keys: {joined.numel():,} numbers as over all {k.size(-2)}")

# %% [markdown]
# ### What it keeps
#
# `flash_attention` is this loop with its backward pass. What does each way keep between forward
# and backward? PyTorch shows us each tensor that autograd saves.

# %%
fused = partial(scaled_dot_product_attention, backend="torch")
ways = {"reference": scaled_dot_product_attention, "flash_attention": flash_attention}
ways["torch"] = fused


def kept_bytes(attention: Callable, n: int) -> int:
    """Memory that autograd keeps for the backward pass, each storage counted once."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = [torch.randn(1, 4, n, 32, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = attention(*inputs, is_causal=True)  # held, or its storage might be used again
    return sum(kept.values()) if out.requires_grad else 0


lengths = [128, 256, 512, 1024, 2048]
kept = {name: [kept_bytes(way, n) / 2**20 for n in lengths] for name, way in ways.items()}
print("tokens          ", "".join(f"{n:7,}" for n in lengths))
for name, row in kept.items():
    print(f"{name:16}", "".join(f"{size:7.1f}" for size in row), "MiB")

# %% [markdown]
# From column to column the text doubles, from 128 to 2,048 tokens. The matrices of the reference
# grow by four each time, rows by two ({numref}`fig-attention-memory`):

# %% mystnb={"figure": {"caption": "Memory kept for the backward pass of one layer with 4 heads of 32. The reference keeps matrices: each doubling of the text costs four times as much. Tiles keep rows: twice as much.", "name": "fig-attention-memory"}, "image": {"alt": "Memory in MiB against sequence length from 128 to 2048, both axes logarithmic. The reference rises steeply from under 1 to over 100 MiB. flash_attention and PyTorch's kernel lie on one line that rises from a quarter of a MiB to 4 MiB."}}
for (name, row), style in zip(kept.items(), ("o-", "s-", "x--"), strict=True):
    plt.loglog(lengths, row, style, base=2, label=name)
plt.xticks(lengths, lengths)
plt.yticks([0.25, 1, 4, 16, 64], [0.25, 1, 4, 16, 64])
plt.xlabel("tokens")
plt.ylabel("MiB kept")
plt.legend()
plt.show()

# %% [markdown]
# Ours and PyTorch's kernel keep the same bytes. On a GPU tiles make attention faster as well
# {cite}`dao2022flash`, although scores are computed twice: what costs time there is to move
# matrices, not to multiply them.

# %% [markdown]
# ## What heads learn
#
# What does attention look up, once it is free to choose? The best-understood answer is the
# **induction head** {cite}`elhage2021framework,olsson2022induction`. It completes patterns that
# it has never seen: after *… ka mo … ka* it predicts *mo*, because that is what followed last
# time. This is held to be a large part of how models learn from examples in their prompt.
#
# One layer cannot do it. The token *ka* can find earlier *ka*s, but what it wants is the token
# *after* one, and the key of *mo* is made from *mo* and its position alone. Two layers can
# ({numref}`fig-attention-induction`). In the first, a head attends to the previous token and so
# notes in *mo* that *ka* stood before it. In the second, *ka* asks who has *ka* noted, finds
# *mo*, and copies it into the prediction.
#
# ```{figure} ../figures/attention-induction.svg
# :name: fig-attention-induction
# :alt: The tokens ra, ka, mo, ti, ra, ka in a row, and a question mark for the next. Layer one: an arrow from mo to the ka before it, the head of the previous token; mo now carries the note "ka before me". Layer two: an arrow from the last ka to mo, because its query ka matches that note; mo is copied to the prediction.
#
# An induction head needs a partner one layer below.
# ```
#
# We train such a model where nothing but this trick helps. A row repeats a random run of tokens,
# none twice within the run. Its length differs from row to row, so neither the statistics of
# tokens nor a fixed distance is of any use.


# %%
def repeated_rows(n: int, generator: torch.Generator, sequence: int = 48, vocab_size: int = 64):
    """Return inputs, targets, and each row's period, from 8 to 24 tokens."""
    runs = torch.rand(n, vocab_size, generator=generator).argsort(dim=1)
    period = torch.randint(8, 25, (n, 1), generator=generator)
    ids = runs.gather(1, torch.arange(sequence + 1) % period)
    return ids[:, :-1], ids[:, 1:], period


ids, targets, period = repeated_rows(3, torch.Generator().manual_seed(0))
for row, length in zip(ids[:, :18].tolist(), period[:, 0].tolist(), strict=True):
    print(f"period {length:2}:", *row)

# %% [markdown]
# The model has embeddings, two layers of attention with rotary positions, each of which adds its
# result to the vector of the token (chapter 10 says why), and a matrix to scores for the next
# token: 41,000 weights.


# %%
class AttentionOnly(nn.Module):
    def __init__(self, n_layers: int, vocab_size: int = 64, d_model: int = 64, n_heads: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(MultiHeadAttention(d_model, n_heads) for _ in range(n_layers))
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(n_layers + 1))
        self.rotary = RotaryEmbedding(d_model // n_heads)
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def forward(self, ids: Tensor, patterns: list | None = None) -> Tensor:
        x, rope = self.embedding(ids), self.rotary(torch.arange(ids.size(1))[None])
        for layer, norm in zip(self.layers, self.norms, strict=False):
            if patterns is not None:
                patterns.append(attention_pattern(layer, norm(x), rope=rope))
            x = x + layer(norm(x), rope=rope)
        return self.head(self.norms[-1](x))


# %% [markdown]
# Two scores tell what a head does. The *previous-token score* is the mean weight that a token
# gives to the one before it. The *prefix-matching score* is the mean weight that goes to tokens
# which followed an earlier occurrence of the present one, where there is one.


# %%
@torch.no_grad()
def head_scores(model: AttentionOnly, ids: Tensor, period: Tensor) -> dict[str, Tensor]:
    """Previous-token and prefix-matching score of each head, (layers, heads)."""
    patterns: list[Tensor] = []
    model(ids, patterns)
    weights = torch.stack(patterns)  # (layers, batch, heads, queries, keys)
    place = torch.arange(ids.size(1))
    followed = torch.zeros(ids.size(0), 1, ids.size(1), ids.size(1))
    followed[:, 0, :, 1:] = ids[:, :, None] == ids[:, None, :-1]  # key j follows a copy of query i
    matched = (weights * followed).sum(dim=-1)
    seen = (place >= period).float()[:, None]  # (batch, 1, queries)
    return {
        "previous": weights.diagonal(-1, -2, -1).mean(dim=(1, 3)),
        "prefix": (matched * seen).sum(dim=(1, 3)) / seen.sum(),
    }


# %% [markdown]
# Training is a plain loop. We keep the loss on tokens that can be known, since a whole period has
# been seen, and with two layers also the scores of the heads every ten steps:


# %%
def train(n_layers: int, steps: int) -> tuple[AttentionOnly, list[float], list[dict]]:
    torch.manual_seed(0)
    generator, held_out = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    ids_test, _, period_test = repeated_rows(32, held_out)
    model = AttentionOnly(n_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, betas=(0.9, 0.99))
    losses, history = [], []
    for step in range(steps):
        ids, targets, period = repeated_rows(32, generator)
        optimizer.param_groups[0]["lr"] = 0.005 * min(1, (step + 1) / 20)
        loss = F.cross_entropy(model(ids).mT, targets, reduction="none")
        losses.append(loss[torch.arange(48) >= period].mean().item())
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if n_layers == 2 and step % 10 == 0:
            history.append(head_scores(model, ids_test, period_test))
    return model, losses, history


torch.set_num_threads(1)  # to share work this small among threads costs more than the work
start = time.perf_counter()
model, losses, history = train(n_layers=2, steps=400)
_, one_layer, _ = train(n_layers=1, steps=1000)
seconds = time.perf_counter() - start

# %% [markdown]
# Blind guessing costs $\ln 64 = 4.2$ nats. To know which tokens the row has, but not their order,
# costs the logarithm of the period, about 2.7 nats on average ({numref}`fig-attention-jump`).

# %% mystnb={"figure": {"caption": "Left: loss on tokens that have been seen a period before. With two layers it creeps down, then falls off a cliff; with one it goes on creeping, toward the loss of one who knows which tokens the row has but not their order. Right: scores of the heads, layer before the point. A previous-token head in layer 1 and induction heads in layer 2 appear together, at the steps of the fall.", "name": "fig-attention-jump"}, "image": {"alt": "Left, loss in nats over 1,000 steps: both curves creep from 4.3 to below 4 during the first 100 steps; then that of two layers falls within about 50 steps to below 1, and ends near 0 at step 400; that of one layer sinks ever more slowly to about 3, above a dotted line at 2.7. Right, scores of four heads from 0 to 1 over 400 steps: all are below 0.1 at first; when the loss falls, the previous-token score of a head in layer 1 rises to about 0.6, and the prefix-matching scores in layer 2 to over 0.9."}}
figure, axes = plt.subplots(1, 2)
axes[0].plot(losses, label="two layers")
axes[0].plot(one_layer, label="one layer")
axes[0].axhline(torch.arange(8.0, 25).log().mean(), color="gray", linestyle=":", label="no order")
axes[0].set(title="Loss where it can be known", xlabel="step", ylabel="nats", ylim=(0, 4.6))
axes[0].legend()
for head, style in ((0, "-"), (1, "--")):
    for name, depth, color in (("previous", 0, "C2"), ("prefix", 1, "C3")):
        score = [scores[name][depth, head] for scores in history]
        label = f"{name}, {depth + 1}.{head + 1}"
        axes[1].plot(range(0, 400, 10), score, style, color=color, label=label)
axes[1].set(title="Score of each head", xlabel="step", ylim=(0, 1.05))
axes[1].legend(loc="lower right", fontsize=8)
plt.show()

# %% [markdown]
# In numbers:

# %%
smooth = torch.tensor(losses).unfold(0, 20, 20).mean(dim=1)
last = {"two layers": smooth[-1].item(), "one layer": sum(one_layer[-40:]) / 40}
jump = int((smooth < 2).nonzero()[0]) * 20
assert 60 < jump < 350 and smooth[jump // 20 - 2] > 3, "the fall takes a few dozen steps"
assert last["two layers"] < 0.5 and last["one layer"] > 2.5
previous, prefix = history[-1]["previous"].amax(dim=1), history[-1]["prefix"].amax(dim=1)
assert previous[0] > 0.4 and prefix[1] > 0.8 and max(previous[1], prefix[0]) < 0.25
print("at the end, two layers: below 0.5 nats; one layer: above 2.5")
print("best head of layer 1: previous-token score above 0.4, prefix-matching below 0.25")
print("best head of layer 2: prefix-matching score above 0.8, previous-token below 0.25")

# %% [markdown]
# The fall takes a few dozen steps, during which nothing changes about the data or the optimizer. A
# plausible reason is that each of the two parts is useless without the other: neither is rewarded
# much until the other is half there, and then both grow fast. In large models the same happens
# early in training, as a visible bump in the loss, and with it appears the ability to learn from a
# prompt {cite}`olsson2022induction`.
#
# The two heads at work on a row that the model has not seen:

# %% mystnb={"figure": {"caption": "The two heads on a row with a period of 12. Left, the previous-token head of layer 1: a line just below the diagonal. Right, the induction head of layer 2: from the second period on, each token attends to tokens that followed its earlier occurrences, 11 and 23 places back.", "name": "fig-attention-heads-learned"}, "image": {"alt": "Two square heat maps of queries, downward, and keys, to the right, over 36 tokens. Left: the dark cells lie one place below the diagonal. Right: the first 12 rows are diffuse; from row 12 on dark cells lie on a line 11 places to the left of the diagonal, and from row 24 on also on one 23 places to the left."}}
ids, _, _ = repeated_rows(1, torch.Generator().manual_seed(5))
ids = ids[:, torch.arange(36) % 12]  # a period of 12, three times
patterns: list[Tensor] = []
with torch.no_grad():
    model(ids, patterns)
best = history[-1]["previous"][0].argmax(), history[-1]["prefix"][1].argmax()
figure, axes = plt.subplots(1, 2, figsize=(7, 3.5))
titles = "layer 1: the previous token", "layer 2: what followed last time"
for ax, weights, head, title in zip(axes, patterns, best, titles, strict=True):
    ax.imshow(weights[0, head], cmap="Blues", vmin=0, vmax=1)
    ax.set(title=title, xlabel="key", xticks=range(0, 36, 12), yticks=range(0, 36, 12))
    ax.grid(False)
axes[0].set_ylabel("query")
plt.show()

# %% [markdown] tags=["engine"]
# ### Engine room: an interactive figure of weights, as HTML that needs no kernel and no network

# %% [markdown] tags=["engine"]
# In your own models you will want to point at a token and see where it looks. The function below
# writes HTML with its data and some JavaScript inside, and a table of the strongest weights for
# those who have no scripts.

# %% tags=["engine"]
#| export
_STYLE = """<style>
.llmbook-attention { max-width: 46rem; font-family: system-ui, sans-serif; font-size: 0.9rem; }
.llmbook-attention button { font: inherit; color: inherit; cursor: pointer; }
.llmbook-attention .heads { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.llmbook-attention .heads button { padding: 0.3rem; border: 2px solid transparent;
  border-radius: 5px; background: none; }
.llmbook-attention .heads button[aria-pressed="true"] { border-color: #3a8fd0; }
.llmbook-attention canvas { display: block; width: 6.5rem; height: 6.5rem; margin-bottom: 0.2rem;
  border: 1px solid #8888; image-rendering: pixelated; }
.llmbook-attention .tokens { display: flex; flex-wrap: wrap; gap: 2px; margin: 0.6rem 0; }
.llmbook-attention .tokens button { --weight: 0; min-width: 2.2em; padding: 0.25em 0.4em;
  border: 1px solid #8888; border-radius: 3px; white-space: pre;
  background: rgba(58, 143, 208, calc(0.55 * var(--weight)));
  box-shadow: inset 0 -4px rgba(58, 143, 208, var(--weight)); }
.llmbook-attention .tokens button.query { outline: 2px solid #d55e00; }
.llmbook-attention button:focus-visible { outline: 3px solid #d55e00; outline-offset: 1px; }
.llmbook-attention .report { min-height: 2.8em; margin: 0.4rem 0; }
.llmbook-attention details div { overflow-x: auto; }
.text_html:has(> .llmbook-attention) { background: none !important; color: inherit !important; }
.llmbook-attention td, .llmbook-attention th { padding: 0.1em 0.8em; text-align: left;
  white-space: pre; }
</style>"""


# %% tags=["engine"]
#| export
def _strongest(tokens: list[str], percent: list) -> str:
    """Return an HTML table of the strongest attention of each token in each head."""
    heads = [(i, h, rows) for i, layer in enumerate(percent) for h, rows in enumerate(layer)]
    table = [["at", "token", *(f"layer {i + 1}, head {h + 1}" for i, h, _ in heads)]]
    for at, token in enumerate(tokens):
        best = [max(enumerate(rows[at]), key=lambda pair: pair[1]) for *_, rows in heads]
        found = [f"{tokens[key]} at {key} ({weight} %)" if weight else "" for key, weight in best]
        table.append([str(at), token, *found])
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table]
    lines[0] = lines[0].replace("td>", "th>")
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _check_picked(shape: tuple[int, ...], **picked: int) -> dict[str, int]:
    """Return places counted from the beginning; raise a ValueError for any that is not there."""
    for (name, at), size in zip(picked.items(), shape, strict=True):
        if isinstance(at, bool) or not isinstance(at, int) or not -size <= at < size:
            raise ValueError(f"{name}: expected {-size} to {size - 1}, got {at!r}")
    return {name: at % size for (name, at), size in zip(picked.items(), shape, strict=True)}


# %% tags=["engine"]
#| export
def _check_figure(tokens: list[str], weights: Tensor) -> None:
    if not isinstance(tokens, list | tuple) or not all(isinstance(t, str) for t in tokens):
        raise ValueError(f"tokens: expected a list of texts, got {tokens!r:.60}")
    n = len(tokens)
    check_at_least(tokens=(1, n))
    check_tensor("weights", weights, "...")
    shape = tuple(weights.shape)
    if len(shape) not in (3, 4) or shape[-2:] != (n, n) or not weights.numel():
        expected = f"expected (layers, heads, {n}, {n}) for {n} tokens"
        raise ValueError(f"weights: {expected}, got {shape}")
    wrong = weights[~((weights > -1e-3) & (weights < 1.001))]  # NaN is among them
    if len(wrong):
        raise ValueError(f"weights: expected numbers from 0 to 1, got {wrong[0]:.4g}")


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class AttentionFigure:
    """An interactive figure; notebooks and the site show its ``html``."""

    html: str

    def __repr__(self) -> str:
        return "AttentionFigure(html=...)"

    def _repr_html_(self) -> str:
        return self.html


# %% tags=["engine"]
#| export
def show_attention(
    tokens: list[str],
    weights: Float[Tensor, "*layers heads queries keys"],
    *,
    layer: int = 0,
    head: int = 0,
    token: int = -1,
) -> AttentionFigure:
    """Return a figure in which one picks a head and a token, and sees where the token attends.

    It works by mouse, touch and keyboard. ``weights``, of one layer or of several, are rounded to
    whole percent; ``layer``, ``head`` and ``token`` are picked at first; -1 is the last.
    """
    _check_figure(tokens, weights)
    n, shape = len(tokens), tuple(weights.shape)
    layers, heads = (1, *shape)[-4:-2]
    picked = _check_picked((layers, heads, n), layer=layer, head=head, token=token)
    percent = (100 * weights.detach().float()).round().int().view(layers, heads, n, n).tolist()
    data = {"tokens": tokens, "weights": percent, **picked}
    inert = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    table = _strongest(tokens, percent)
    script = files("llmbook").joinpath("attention.js").read_text(encoding="utf-8")
    return AttentionFigure(
        f'<div class="llmbook-attention" role="group" aria-label="Attention of {n} tokens">{_STYLE}'
        f"<details open><summary>As a table</summary><div>{table}</div></details>"
        f'<script type="application/json">{inert}</script></div><script>{script}</script>'
    )


# %% [markdown]
# ### A figure to play with
#
# `show_attention` draws weights as a figure that answers. The same row, with syllables for its
# numbers. Each small picture is a head, with queries downward and keys to the right, as above. Pick
# one, point at tokens, or walk with the arrow keys. Which head of layer 1 looks back by one token
# most? (The arguments count from 0, the labels from 1.)

# %% tags=["nbval-ignore-output"]
syllables = [consonant + vowel for consonant in "bdfgklmnprstvwzj" for vowel in "aeio"]
show_attention(
    [syllables[i] for i in ids[0].tolist()],
    torch.stack(patterns)[:, 0],
    layer=1,
    head=int(best[1]),
)

# %% [markdown]
# But a weight says where a head reads, not what the model makes of it, and different weights can
# lead to the same prediction {cite}`jain2019attention`. To know that a head matters, take it away
# and measure, as an exercise does.
#
# ## Is it the real thing?
#
# We compare outputs and gradients, with the same weights, first with PyTorch's function and module.
# Float32 has seven digits, of which a few are lost on the way; so we say how far two results are
# apart in units of the largest number, and are content below a hundred-thousandth.

# %%
import llmbook.attention as exported


def apart(a: Tensor, b: Tensor, x: Tensor) -> str:
    """How far two results differ, and their gradients with respect to x."""
    pairs = [(a, b), [torch.autograd.grad(out.sin().sum(), x)[0] for out in (a, b)]]
    worst = max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)
    return "below 0.00001" if worst < 1e-5 else f"{worst:.5f}"


torch.manual_seed(0)
x = torch.randn(2, 4, 24, 8, requires_grad=True)
ours = exported.flash_attention(x, x, x, is_causal=True)
theirs = F.scaled_dot_product_attention(x, x, x, is_causal=True)
print("scaled_dot_product_attention:", apart(ours, theirs, x))

# %% [markdown]
# PyTorch's module keeps the three matrices in one, and its mask is True where attention is *not*
# allowed:

# %%
theirs = nn.MultiheadAttention(32, 4, batch_first=True)
ours = exported.MultiHeadAttention(32, 4, bias=True)
with torch.no_grad():
    for i, proj in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
        proj.weight.copy_(theirs.in_proj_weight.view(3, 32, 32)[i])
        proj.bias.copy_(theirs.in_proj_bias.view(3, 32)[i])
ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
x = torch.randn(2, 24, 32, requires_grad=True)
hidden = ~causal_mask(24)
out, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
print("nn.MultiheadAttention:", apart(ours(x), out, x))

# %% [markdown]
# The layers of Llama, Qwen3 and DeepSeek-V3 in transformers agree as well, weight for weight.

# %% [markdown] tags=["engine"]
# ### Engine room: the layers of Llama, Qwen3 and DeepSeek, and what their weights are called

# %% [markdown] tags=["engine"]
# For Llama and Qwen3 even the names of the weights are the same. Their layers want cosines for both
# halves, and a mask that is added: 0 or $-\infty$.

# %% tags=["engine"]
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

rope = rotary(torch.arange(24)[None])
doubled = tuple(torch.cat([part, part], dim=-1) for part in rope)
added = torch.zeros(24, 24).masked_fill(hidden, -torch.inf)[None, None]
widths = {"hidden_size": 32, "num_attention_heads": 4, "attn_implementation": "eager"}
grouped = widths | {"num_key_value_heads": 2, "head_dim": 8}
for name, theirs, norm in (
    ("Llama", LlamaAttention(transformers.LlamaConfig(**grouped), 0), None),
    (
        "Qwen3",
        Qwen3Attention(transformers.Qwen3Config(**grouped), 0),
        partial(nn.RMSNorm, eps=1e-6),
    ),
):
    ours = exported.MultiHeadAttention(32, 4, n_kv_heads=2, d_head=8, qk_norm=norm)
    ours.load_state_dict(theirs.state_dict())
    print(f"{name}:", apart(ours(x, rope=rope), theirs(x, doubled, added)[0], x))

# %% [markdown] tags=["engine"]
# DeepSeek names its weights in another way, and stores the rotated features as interleaved pairs,
# so that the permutation of {doc}`08_positions` is needed.

# %% tags=["engine"]
from llmbook.positions import interleaved_to_half

latents = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5}
config = transformers.DeepseekV3Config(**widths, **latents, q_lora_rank=None, num_key_value_heads=4)
theirs, norm = DeepseekV3Attention(config, 0), partial(nn.RMSNorm, eps=1e-6)
ours = exported.MultiHeadLatentAttention(
    32, 4, d_latent=12, d_rope=8, d_head=6, d_value=5, norm=norm
)
state = {name: weight.clone() for name, weight in theirs.state_dict().items()}
order = interleaved_to_half(8)
rotated = state["q_proj.weight"].view(4, 14, 32)[:, 6:]
rotated.copy_(rotated[:, order])
rotated = state["kv_a_proj_with_mqa.weight"][12:]
rotated.copy_(rotated[order])
renamed = {"kv_a_proj_with_mqa": "kv_down_proj", "kv_a_layernorm": "kv_norm"}
renamed |= {"kv_b_proj": "kv_up_proj"}
ours.load_state_dict({
    f"{renamed.get(name.split('.')[0], name.split('.')[0])}.weight": weight
    for name, weight in state.items()
})  # fmt: skip
print("DeepSeek-V3:", apart(ours(x, rope=rope), theirs(x, doubled, added)[0], x))

# %% [markdown]
# ## How fast is it?
#
# What do the three ways cost, forward and backward, as texts get longer? We measure in one thread,
# with tiles of 256 by 256. And what does a cache save when 256 tokens are written one by one?

# %%
seconds_of = {}
for n in (256, 1024):
    inputs = [torch.randn(1, 4, n, 32, requires_grad=True) for _ in range(3)]
    for name, way in ways.items():
        way = partial(way, block_size=256) if way is flash_attention else way
        times = []
        for _ in range(4):
            start = time.perf_counter()
            way(*inputs, is_causal=True).sum().backward()
            times.append(time.perf_counter() - start)
        seconds_of[name, n] = min(times)

# %% [markdown]
# The cache is that of one layer and one row. Times depend on the computer, their ratios less:

# %% tags=["nbval-ignore-output"]
layer = exported.MultiHeadAttention(64, 4, n_kv_heads=2)
wide_rotary, text = RotaryEmbedding(16), torch.randn(1, 256, 64)
cache = exported.KVCache(1, 256, n_kv_heads=2, d_head=16)
with torch.no_grad():
    start = time.perf_counter()
    for t in range(256):
        rope, mask = wide_rotary(cache.next_positions(1)), cache.extend(1)
        layer(text[:, t : t + 1], rope=rope, mask=mask, cache=cache[0])
    cached_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for t in range(256):
        layer(text[:, : t + 1], rope=wide_rotary(torch.arange(t + 1)[None]))
    ratio = (time.perf_counter() - start) / cached_seconds
for n in (256, 1024):
    base = seconds_of["reference", n]
    row = ", ".join(f"{name} {base / seconds_of[name, n]:.1f}" for name in ways)
    print(f"{n} tokens, speed in units of the reference: {row}")
print(f"256 tokens with a cache: {ratio:.1f} times as fast as without, one layer, one row")
print(f"both induction models trained in {seconds:.0f} s")

# %% [markdown]
# Our tiles are written in Python, and still overtake the reference on long texts: they skip
# almost half of the matrix, and what they make fits the processor's cache. What the key-value
# cache saves grows with the text and with the model; here calling the functions is most of what
# remains.
#
# ## Exercises
#
# ````{exercise} How sharp is sharp enough?
# :label: ex-attention-sharp
# *Ten minutes.* The best score of $n$ is $s_1$, the others are at most $s_1 - g$, with a gap
# $g > 0$. Scores are multiplied by $\beta$ before softmax. Show that the best weight is at least
# $1 / (1 + (n - 1) e^{-\beta g})$, and write `needed_sharpness(n, gap, weight)`: the least
# $\beta$ for which this bound is `weight`. How does it grow with the number of keys?
# ````


# %% tags=["solution"]
def needed_sharpness(n: int, gap: float, weight: float) -> float:
    """Return the factor on the scores at which the best of ``n`` keys has at least ``weight``."""
    # p_1 = 1 / (1 + sum of e^(-beta (s_1 - s_j))); each of the n - 1 terms is at most e^(-beta g).
    # Solved for c, it is logarithmic in n: a hundred times the keys cost 4.6 / g more.
    return math.log((n - 1) * weight / (1 - weight)) / gap


# %% tags=["check"]
for n, gap, weight in ((2, 1.0, 0.9), (64, 0.5, 0.99), (100_000, 2.0, 0.5)):
    c = needed_sharpness(n, gap, weight)
    worst = torch.full((n,), -gap, dtype=torch.float64)  # all others just below the best
    worst[0] = 0
    reached = softmax(c * worst)[0].item()
    case = f"{n} keys with a gap of {gap}: the best reaches {reached:.4f}"
    assert reached > weight - 1e-6, f"{case}, not sharp enough for {weight}"
    assert reached < weight + 1e-6, f"{case}, sharper than {weight} needs"

# %% [markdown]
# ````{exercise} How many readers fit?
# :label: ex-attention-budget
# *Ten minutes.* A server has `memory` bytes left for caches. Each user has a text of `tokens`
# tokens. Write `users_that_fit(memory, tokens, n_layers, n_kv_heads, d_head, window)` for numbers
# of two bytes, where a `window` (or None) bounds what is kept. How many fit into 40 GiB with
# 32,768 tokens each for Mistral 7B (32 layers, 8 heads of 128), without its window, and with its
# window of 4,096?
# ````


# %% tags=["solution"]
def users_that_fit(
    memory: int, tokens: int, n_layers: int, n_kv_heads: int, d_head: int, window: int | None
) -> int:
    """Return how many rows of ``tokens`` tokens a cache in ``memory`` bytes can have."""
    # Without the window 4 GiB a user, so 10 of them; with it half a GiB, and 80.
    kept = tokens if window is None else min(tokens, window)
    return memory // (2 * 2 * n_layers * n_kv_heads * d_head * kept)


# %% tags=["check"]
mistral_7b = {"n_layers": 32, "n_kv_heads": 8, "d_head": 128}
GiB = 2**30
unbounded = users_that_fit(40 * GiB, 32768, **mistral_7b, window=None)
assert unbounded == 10, f"10 users: a key and a value in each layer, 128 KiB a token; {unbounded}?"
ring = users_that_fit(40 * GiB, 32768, **mistral_7b, window=4096)
assert ring == 80, f"80 users: a window of 4,096 bounds what is kept; {ring}?"
short = users_that_fit(40 * GiB, 1000, **mistral_7b, window=4096)
assert isinstance(short, int), f"users are whole: {short}"
assert short == 327, f"327 users: a text of 1,000 does not fill a window of 4,096; {short}?"
almost = users_that_fit(40 * GiB - 1, 32768, **mistral_7b, window=None)
assert almost == 9, f"9 users: the last does not fit if one byte is missing; {almost}?"
cache = KVCache(3, 50, 2, 8, n_layers=5, dtype=torch.bfloat16)
assert users_that_fit(cache.nbytes, 50, 5, 2, 8, None) == 3, "as the cache of this chapter counts"

# %% [markdown]
# ````{exercise} Two halves of a text
# :label: ex-attention-merge
# *Twenty minutes.* Keys and values of a very long text lie on two machines. Each computes
# attention over its half, and the log-sum-exp of its scores. Write
# `merge(out_a, log_sum_a, out_b, log_sum_b)`, which returns output and log-sum-exp over both,
# given outputs `(..., queries, d)` and log-sums `(..., queries, 1)`. One half may be invisible to
# a query: its log-sum-exp is then $-\infty$ and its output 0. No overflow, no NaN.
# ````


# %% tags=["solution"]
def merge(
    out_a: Tensor, log_sum_a: Tensor, out_b: Tensor, log_sum_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return attention over the union of two disjoint sets of keys."""
    # Each half has the weight e^L in the whole, so this is softmax over two scores.
    both = torch.cat([log_sum_a, log_sum_b], dim=-1)
    weight_a, weight_b = softmax(both).split(1, dim=-1)
    return weight_a * out_a + weight_b * out_b, both.logsumexp(dim=-1, keepdim=True)


# %% tags=["check"]
torch.manual_seed(0)
q, k, v = (torch.randn(3, n, 4, dtype=torch.float64) for n in (5, 9, 9))
for size, case in ((2, "scores that fit"), (400, "scores whose exponentials overflow")):
    scores = size * q @ k.mT
    halves = []
    for part in (slice(0, 4), slice(4, 9)):
        s = scores[..., part].clone()
        s[0, 0] = -torch.inf if part.start else s[0, 0]
        halves += [softmax(s) @ v[:, part], s.logsumexp(dim=-1, keepdim=True)]
    scores[0, 0, 4:] = -torch.inf
    out, log_sum = merge(*halves)
    whole = scores.logsumexp(dim=-1, keepdim=True)
    assert log_sum.shape == whole.shape, f"one log-sum-exp for each query, not {log_sum.shape}"
    assert torch.allclose(log_sum, whole), f"{case}: not the log-sum-exp over all keys"
    assert torch.allclose(out, softmax(scores) @ v), f"{case}: not the output over all keys"
nothing = torch.zeros(1, 4), torch.full((1, 1), -torch.inf)
out, log_sum = merge(*nothing, *nothing)
assert out.tolist() == [[0.0] * 4], f"a query that sees neither half gets zeros, not {out.tolist()}"
assert log_sum.item() == -torch.inf, f"a sum over nothing has the logarithm -inf, not {log_sum}"

# %% [markdown]
# ````{exercise} Tiles under a window
# :label: ex-attention-window-tiles
# *Twenty minutes.* Under a sliding window many tiles below the diagonal have nothing to do, too.
# Write `window_columns(rows, size, window)`: the blocks of keys, as slices, that any query in the
# slice `rows` may see, for `size` by `size` tiles of a square matrix. For $n$ tokens, how does
# the number of tiles now grow?
# ````


# %% tags=["solution"]
def window_columns(rows: slice, size: int, window: int) -> list[slice]:
    """Return the blocks of keys that the queries ``rows`` may see under a causal window."""
    # The first query sees farthest back. At most window / size + 2 blocks: linear in n.
    first = max(0, rows.start - window + 1) // size * size
    return [slice(at, min(at + size, rows.stop)) for at in range(first, rows.stop, size)]


# %% tags=["check"]
for n, size, window in ((12, 3, 4), (64, 8, 16), (20, 6, 1), (10, 4, 100)):
    mask = causal_mask(n, window)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        columns = window_columns(rows, size, window)
        visited = torch.zeros(n, dtype=torch.bool)
        for block in columns:
            keys, case = f"keys {block.start} to {block.stop - 1}", f"a window of {window}"
            assert block.start % size == 0, f"{keys}: blocks begin at multiples of the size, {size}"
            assert block.stop <= block.start + size, f"{keys} are more than a tile of {size}"
            assert not visited[block].any(), f"{keys} are visited twice"
            assert mask[rows, block].any(), f"{case}: {keys} are of no use to queries from {start}"
            visited[block] = True
        missed = mask[rows][:, ~visited].any()
        assert not missed, f"a window of {window}: queries from {start} miss keys they may see"

# %% [markdown]
# ````{exercise} From many heads to few
# :label: ex-attention-group
# *Half an hour.* A multi-head model can be turned into a grouped-query one and trained a little
# further, if each shared head starts as the *mean* of those that it replaces
# {cite}`ainslie2023gqa`. Write `to_grouped(attention, n_kv_heads)`, which returns such a layer, and
# leaves the given one alone. All else is as it was: `d_head`, `scale`, biases if there are any,
# `q_norm` and `k_norm` if there are. (`copy.deepcopy` copies a layer.) When is it the same function
# as before?
# ````


# %% tags=["solution"]
def to_grouped(attention: MultiHeadAttention, n_kv_heads: int) -> MultiHeadAttention:
    """Return a grouped-query layer whose keys and values are means over those of each group."""
    # The same function if the heads of a group had equal keys and values before.
    grouped = copy.deepcopy(attention)  # all else as it was
    grouped.n_kv_heads = n_kv_heads
    for name in ("k_proj", "v_proj"):
        wide = getattr(attention, name)
        rows = n_kv_heads * attention.d_head
        shared = nn.Linear(wide.in_features, rows, bias=wide.bias is not None)
        means = {
            kind: weight.unflatten(0, (n_kv_heads, -1, attention.d_head)).mean(dim=1).flatten(0, 1)
            for kind, weight in wide.state_dict().items()
        }
        shared.load_state_dict(means)
        setattr(grouped, name, shared)
    return grouped


# %% tags=["check"]
torch.manual_seed(0)
for options in ({}, {"bias": True}, {"bias": True, "output_bias": False, "qk_norm": nn.RMSNorm}):
    many, short = MultiHeadAttention(24, 6, d_head=4, scale=0.4, **options), torch.randn(2, 7, 24)
    for norm in (many.q_norm, many.k_norm):
        if norm is not None:
            nn.init.uniform_(norm.weight, 0.5, 2)
    before = {name: weight.clone() for name, weight in many.state_dict().items()}
    few = to_grouped(many, 2)
    for name in ("k_proj", "v_proj"):
        for (kind, wide), shared in zip(
            getattr(many, name).named_parameters(), getattr(few, name).parameters(), strict=True
        ):
            assert len(shared) == 8, f"{name}: two heads of four features remain, not {len(shared)}"
            mean = wide[:12].unflatten(0, (3, 4)).mean(dim=0)
            rule = "head 0 is the mean of heads 0, 1, 2"
            assert torch.allclose(shared[:4], mean, atol=1e-6), f"{kind} of {name}: {rule}"
    for proj in (many.k_proj, many.v_proj):
        for parameter in proj.parameters():  # make the heads of each group equal
            parts = parameter.data.view(2, 3, 4, *parameter.shape[1:])
            parts[:] = parts[:, :1].clone()
    worst = (to_grouped(many, 2)(short) - many(short)).abs().max()
    assert worst < 1e-4, f"equal heads make the same function, but it is off by {worst:.2g}"
    others = [name for name in before if not name.startswith(("k_proj", "v_proj"))]
    state = many.state_dict()
    same = all(torch.equal(before[name], state[name]) for name in others)
    with torch.no_grad():
        few.q_proj.weight.zero_()
    assert same and many.q_proj.weight.any(), "the layer that was given must stay as it was"

# %% [markdown]
# ````{exercise} Take heads away
# :label: ex-attention-ablation
# *Half an hour.* Do the induction heads need their partners below? Write
# `loss_without(model, layer, heads)`: the loss of the trained model where it can be known, on the
# rows `repeated_rows(64, torch.Generator().manual_seed(9))`, with the output of some heads of a
# layer set to zero. A head's numbers enter `o_proj` in the columns from `head * d_head` on. The
# model must be unchanged afterwards. What does each head of `model` contribute? And both heads of
# layer 1, though it is layer 2 that copies?
# ````


# %% tags=["solution"]
@torch.no_grad()
def loss_without(model: AttentionOnly, layer: int, heads: list[int]) -> float:
    """Return the loss on tokens seen a period before, when some heads of a layer add nothing."""
    # Without layer 1 the loss is above that of the plateau, though the induction heads are as they
    # were: they find nothing. Removing one head of layer 1 costs between nothing and 2 nats,
    # according to its share of the work; removing one of layer 2 costs about 2 nats.
    ids, targets, period = repeated_rows(64, torch.Generator().manual_seed(9))
    attention = model.layers[layer]
    saved = attention.o_proj.weight.clone()
    for head in heads:
        attention.o_proj.weight[:, head * attention.d_head : (head + 1) * attention.d_head] = 0
    loss = F.cross_entropy(model(ids).mT, targets, reduction="none")
    attention.o_proj.weight.copy_(saved)
    return loss[torch.arange(48) >= period].mean().item()


# %% tags=["check"]
before = {name: weight.clone() for name, weight in model.state_dict().items()}
whole = loss_without(model, 0, [])
test_ids, goals, runs = repeated_rows(64, torch.Generator().manual_seed(9))
with torch.no_grad():
    loss = F.cross_entropy(model(test_ids).mT, goals, reduction="none")
known = loss[torch.arange(48) >= runs].mean().item()
rule = "the loss is the mean over tokens of the given rows seen a period before"
assert abs(whole - known) < 1e-4, f"{rule}: {known:.4f} with all heads, not {whole:.4f}"
assert known < 0.4, f"with all heads the loss is that of the end of training, not {known:.2f}"
# A hook does the same from outside: the second head's numbers reach o_proj as zeros.
found, first_head = loss_without(model, 1, [1]), torch.arange(64) < 32
unchanged = [torch.equal(before[name], weight) for name, weight in model.state_dict().items()]
model.load_state_dict(before)
assert all(unchanged), "the model must be as it was"
hook = model.layers[1].o_proj.register_forward_pre_hook(lambda _, args: (args[0] * first_head,))
muted = loss_without(model, 1, [])
hook.remove()
rule = "of head 1 nothing may reach o_proj, and of head 0 everything"
assert abs(found - muted) < 1e-3, f"{rule}: {muted:.3f}, not {found:.3f}"
for depth in (0, 1):
    both, singles = loss_without(model, depth, [0, 1]), []
    for head in (0, 1):
        singles.append(loss_without(model, depth, [head]))
    assert both > 2.5, f"layer {depth + 1}: without both heads {both:.2f}: nothing can be copied"
    assert both > max(singles) > whole, f"layer {depth + 1}: two heads do more than either"

# %% [markdown]
# ## Summary
#
# Attention is a dictionary made smooth: scores are dot products, softmax makes weights of them,
# and the answer is a weighted mean. Dividing by $\sqrt d$ keeps softmax where it can learn,
# subtracting the maximum keeps it finite. Masks are rules about positions. Heads ask several
# questions at once; sharing keys and values among them, or keeping a latent instead, makes the
# cache small. With position $t$ in slot $t \bmod C$ it serves unequal rows and windows alike.
# Softmax can be computed in one pass and its backward pass from one number a row, so the
# $n \times n$ matrix need never exist. Trained on nothing but repetition, two layers suddenly
# learn to look up what followed last time; one layer does not.
#
# **Checklist: choosing attention.**
#
# - Train by the fused kernel, and announce a causal mask by `is_causal`, never by a matrix.
# - Share keys and values: 8 heads of them is what Mistral and Llama 3 chose. Latent attention is
#   for when the cache decides what can be served.
# - Normalize queries and keys if the largest score grows during training.
# - Fill forbidden scores with $-\infty$, and test a row that is all padding.
# - Test every cache against no cache, with unequal prompts, and with texts longer than the
#   window.
#
# **Further reading.** Dao {cite}`dao2024flash2` for the tiles, Elhage and colleagues
# {cite}`elhage2021framework` for a way to read what attention does from its weights. Next, chapter
# 10 builds the block around it.
