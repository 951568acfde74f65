# %% [markdown]
# # Positions
#
# > Turn token ids into vectors that know where they stand: learned, sinusoidal and rotary
# > embeddings, and ways to stretch them to longer texts.
#
# *Dog bites man* is no news; *man bites dog* is. The two have the same words. To a transformer
# that has not been told otherwise they are the same input, because the operation at its heart,
# attention, treats what it reads as a bag: it compares every token with every other and has no
# notion of before and after. The order has to be put in.
#
# How it is put in decides how fast the model learns, whether it can read a text longer than any it
# was trained on, and whether its weights make sense in another program. The method that Llama,
# Qwen, Mistral, Gemma and DeepSeek share, rotary embeddings, can be derived from a single demand.
# We do that, build it so that it is fast enough for every layer of every step, and measure what
# happens where the training text ends.
#
# | | |
# |---|---|
# | **Part** | II. Architecture |
# | **You build** | {py:class}`~llmbook.positions.LearnedEmbedding`, {py:class}`~llmbook.positions.SinusoidalEmbedding`, {py:class}`~llmbook.positions.RotaryEmbedding`, {py:func}`~llmbook.positions.rope_frequencies`, {py:func}`~llmbook.positions.apply_rope`, {py:func}`~llmbook.positions.scale_rope` |
# | **You need** | position ids and document ids ({doc}`07_batches`), matrices, complex numbers |
# | **It takes** | 60 minutes for the main line, 2 hours for everything, 45 seconds to run |

# %% tags=["remove-cell"]
#| default_exp positions

# %% tags=["engine"]
#| export
# The imports that only the module needs
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

from jaxtyping import Float, Float32, Int64

from llmbook.environment import check_at_least, check_choice, check_even

# %% [markdown]
# PyTorch is all that the chapter computes with:

# %%
#| export
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

# %% [markdown]
# ## From ids to vectors
#
# A token id is a name, not a quantity: token 7 is not more than token 3. So each token of the
# vocabulary gets a vector of its own, its {term}`embedding`, a row of a table $E$ with $V$ rows
# and $d$ columns. Write token $x_t$ as a {term}`one-hot vector`, all zeros but for a one at place
# $x_t$, and stack these as the rows of a matrix $O$. Then looking up is a matrix product
# ({numref}`fig-positions-lookup`):
#
# $$
# X = O E , \qquad X_t = \sum_{v} O_{tv} E_v = E_{x_t} ,
# \qquad \frac{\partial L}{\partial E} = O^\top \frac{\partial L}{\partial X} .
# $$ (positions-onehot)
#
# ```{figure} ../figures/positions-lookup.svg
# :name: fig-positions-lookup
# :alt: Left, three ids, 3, 0 and 3. In the middle their one-hot rows of five places, with ones at places 3, 0 and 3. They multiply a table of five rows, of which rows 0 and 3 are colored. Right, the product: row 3, row 0, row 3.
#
# Looking up rows is a product with one-hot rows. Rows that nobody asks for do not matter.
# ```
#
# Nobody multiplies by all those zeros. But the product tells what the gradient is: row $v$ of
# $O^\top \, \partial L / \partial X$ is the sum of the gradients at the places where $v$ stands.
# Rows of tokens that do not occur get exactly zero.

# %%
torch.manual_seed(0)
E = torch.randn(5, 4, requires_grad=True)
x = torch.tensor([3, 0, 3])
one_hot = nn.functional.one_hot(x, num_classes=5).float()
assert torch.equal(E[x], one_hot @ E), "lookup is a product"
gradient = torch.randn(3, 4)
E[x].backward(gradient)
assert torch.allclose(E.grad, one_hot.T @ gradient), "and so is its gradient"
for row, (size, count) in enumerate(zip(E.grad.norm(dim=1), one_hot.sum(dim=0), strict=True)):
    print(f"row {row} of E: looked up {count:.0f} times, its gradient has the length {size:.1f}")

# %% [markdown]
# `nn.Embedding` is this table. In chapter 11 it becomes the first layer of the model.
#
# ## Why order is lost
#
# {doc}`07_batches` said what attention does: at each place, a weighted mean of what other places
# hold. Chapter 09 takes it apart; here its formula is enough. From the row $X_t$ of each token come
# three vectors by three matrices $W_Q$, $W_K$, $W_V$: a **query** (what am I looking for?), a
# **key** (what am I?) and a **value** (what do I hand on?). The **score** of token $n$ for token
# $m$ is the inner product of $m$'s query with $n$'s key. A {term}`softmax` turns the scores of each
# row into weights, and the output is the mean of the values under these weights:
#
# $$
# Y(X) = \operatorname{softmax}(X A X^\top)\, X B ,
# $$ (positions-attention)
#
# where $A = W_Q W_K^\top$ (with some constant factor) and $B = W_V$. Now shuffle the tokens:
# replace $X$ by $PX$, with a permutation matrix $P$, for which $P^\top P = I$. The scores become
# $P X A X^\top P^\top$: rows and columns in the new order. The softmax works on each row for
# itself and does not care in which order the columns come, so the weights are shuffled in the
# same way, and
#
# $$
# Y(PX) = P \operatorname{softmax}(X A X^\top)\, P^\top P\, X B = P\, Y(X) .
# $$ (positions-equivariance)
#
# Each token gets what it got before, wherever it stands. This is {term}`permutation
# equivariance`. Everything else in a transformer acts on each place alone and keeps the property,
# so without positions *dog* has the same vector in both sentences.

# %%
A, B = torch.randn(2, 4, 4) / 2


def attend(X: Tensor, causal: bool = False) -> Tensor:
    scores = X @ A @ X.T
    if causal:  # a place sees itself and what is before it
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return scores.softmax(dim=-1) @ X @ B


dog, bites, man = torch.randn(3, 4)
news, no_news = torch.stack((man, bites, dog)), torch.stack((dog, bites, man))
for words, place in (("man bites dog", 2), ("dog bites man", 0)):
    result = attend(news if place else no_news)[place]
    print(f"{words}: the vector of dog is {[round(number, 2) for number in result.tolist()]}")
assert torch.allclose(attend(news)[2], attend(no_news)[0], atol=1e-5)

# %% [markdown]
# A language model has a causal mask: each place sees only what is before it. That breaks the
# symmetry, but only partly. One layer still treats all that a place sees as a bag:

# %%
swapped = torch.stack((bites, man, dog))  # the first two have changed places
one = [attend(X, causal=True)[-1] for X in (news, swapped)]
two = [attend(attend(X, causal=True), causal=True)[-1] for X in (news, swapped)]
for layers, (a, b) in (("one layer", one), ("two layers", two)):
    change = ((a - b).norm() / a.norm()).item()
    print(f"after {layers}, the vector of the last place changes by {change:.0%}")

# %% [markdown]
# With two layers the order leaks in, because the second layer reads vectors that depend on how
# much each place could see. A head that attends evenly to everything, where only the first token
# carries a mark, even computes $1/t$ at place $t$. Models trained without any positions find out
# by themselves where they are, and end up nearly as good {cite}`haviv2022transformer`. How fast
# they learn is another matter, which we shall measure.
#
# ## A vector for each position
#
# The simplest remedy: give each position a vector as well, and add it to that of the token. GPT-2
# {cite}`radford2019language` **learns** these vectors, one row of a table for each position.


# %%
#| export
class LearnedEmbedding(nn.Module):
    """A learned vector for each position from 0 to ``context_length - 1`` (as in GPT-2).

    Position -1, padding, gets the vector of position 0. On a CPU other positions outside the table
    raise a ``ValueError``. On a GPU, where looking at them would make the program wait, and under
    ``torch.compile``, those past the end stop the kernel with an assertion, and those below -1
    count as 0. The table starts with a standard deviation of 0.02.
    """

    def __init__(self, context_length: int, d_model: int):
        super().__init__()
        check_at_least(context_length=(1, context_length), d_model=(1, d_model))
        self.weight = nn.Parameter(torch.empty(context_length, d_model).normal_(std=0.02))

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> Float[Tensor, "*batch sequence d_model"]:
        """Return the vectors of ``position_ids``."""
        check_tensor("position_ids", position_ids, "...", "sequence", kind="whole numbers")
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_positions(position_ids, len(self.weight))
        return nn.functional.embedding(position_ids.clamp(min=0), self.weight)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return "context_length={}, d_model={}".format(*self.weight.shape)


# %% tags=["engine"]
#| export
# Tensors that do not fit, and positions outside of the table, are named in the caller's words
_IS_KIND: dict[str, Callable[[torch.dtype], bool]] = {
    "floats": lambda dtype: dtype.is_floating_point,
    "booleans": lambda dtype: dtype == torch.bool,
    "whole numbers": lambda dtype: (
        dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    ),
}


def check_tensor(argument: str, value: object, *sizes: str | int, kind: str = "floats") -> None:
    """Demand a tensor of one kind whose dimensions have these sizes; a name stands for any size.

    "..." at the beginning stands for any dimensions. Kinds: floats, booleans, whole numbers.

    >>> check_tensor("x", torch.ones(5, 16), "batch", "sequence", 16)
    Traceback (most recent call last):
    ValueError: x: expected floats of shape (batch, sequence, 16), got shape (5, 16)
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{argument}: expected a tensor of {kind}, got {value!r:.60}")
    if not _IS_KIND[kind](value.dtype):
        raise ValueError(f"{argument}: expected {kind}, got a tensor of {value.dtype}")
    least, fits = len(sizes) - (sizes[0] == "..."), True
    for at in range(1, least + 1):
        any_size = isinstance(sizes[-at], str)
        fits = fits and value.ndim >= at and (any_size or value.size(-at) == sizes[-at])
    if not fits or (sizes[0] != "..." and value.ndim != least):
        expected = f"{kind} of shape ({', '.join(map(str, sizes))})"
        raise ValueError(f"{argument}: expected {expected}, got shape {tuple(value.shape)}")


def _check_positions(position_ids: Int64[Tensor, "*batch sequence"], length: int) -> None:
    wrong = position_ids[(position_ids < -1) | (position_ids >= length)]
    if len(wrong):
        raise ValueError(f"position_ids: expected -1 (padding) to {length - 1}, got {wrong[0]}")


# %% [markdown]
# A table has an end. Position 1,024 of GPT-2 has no row, so the text must stop there:

# %%
table = LearnedEmbedding(context_length=1024, d_model=8)
print(f"positions 0 to 1,023: vectors of shape {tuple(table(torch.arange(1024)[None]).shape)}")
try:
    table(torch.tensor([[1023, 1024]]))
except ValueError as error:
    print(error)

# %% [markdown]
# Nor do rows 500 and 501 know that they are neighbors, until training has told them.
#
# ### Waves
#
# The first transformer {cite}`vaswani2017attention` computes its vectors instead. Think of how we
# write numbers: the last digit changes at each step, the one before it ten times as slowly, and
# so on. Let smooth waves take the place of digits. Pair $i$ of dimensions, for
# $i = 0, \dots, d/2 - 1$, holds the sine and the cosine of the position times a **frequency**
# $\omega_i$, in radians per position:
#
# $$
# p_{t,2i} = \sin(t\,\omega_i), \qquad p_{t,2i+1} = \cos(t\,\omega_i), \qquad
# \omega_i = b^{-2i/d}, \quad b = 10{,}000 .
# $$ (positions-waves)
#
# Each pair is the hand of a clock. The first turns by one radian a token, the last needs
# $2\pi\, b^{1 - 2/d}$ tokens for one turn ({numref}`fig-positions-waves`). Rotary embeddings,
# "RoPE", will use the same frequencies, hence the name of the function.


# %%
#| export
def rope_frequencies(d_head: int, base: int | float = 10_000.0) -> Float32[Tensor, " half"]:
    """Return base^(-2i / d_head) for each pair i of dimensions: radians per position, float32.

    Source: Su et al. (2024), section 3.2.2; the sinusoids of Vaswani et al. (2017) have the same.

    >>> rope_frequencies(4, base=100.0)
    tensor([1.0000, 0.1000])
    """
    check_even(d_head=d_head)
    _check_base(base)
    return 1.0 / base ** (torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)


# %% tags=["engine"]
#| export
# A base from which no waves come is refused
def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_base(base: int | float) -> None:
    if not _is_number(base) or not 1 < base < math.inf:
        raise ValueError(f"base: expected a number above 1, got {base!r}")


# %% [markdown]
# A small module turns positions into angles, for both kinds of embedding. It has no state to save,
# and padding, position $-1$, counts as position 0.


# %%
#| export
class _Angles(nn.Module):
    """Position times frequency in float32, also in a model that is cast to another type.

    It has no state to save. Padding, position -1, counts as position 0.
    """

    frequencies: Tensor

    def __init__(self, frequencies: Float32[Tensor, " half"]):
        super().__init__()
        self.register_buffer("frequencies", frequencies.clone(), persistent=False)

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> Float32[Tensor, "*batch sequence half"]:
        """Return the angles in radians."""
        return position_ids.clamp(min=0).float()[..., None] * self.frequencies


# %% [markdown]
# The waves are the sines and cosines of these angles, side by side ({numref}`fig-positions-waves`):


# %%
#| export
class SinusoidalEmbedding(nn.Module):
    """Waves: sin(t w_i) at dimension 2i, cos(t w_i) at 2i + 1, where w_i = base^(-2i / d_model).

    No parameters; the result is float32 whatever the model is cast to. Position -1, padding, counts
    as 0. Source: Vaswani et al. (2017), section 3.5.
    """

    def __init__(self, d_model: int, base: int | float = 10_000.0):
        super().__init__()
        check_even(d_model=d_model)
        with torch.device("cpu"):  # real numbers, also where a model is laid out on "meta"
            self.angles = _Angles(rope_frequencies(d_model, base))

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> Float32[Tensor, "*batch sequence d_model"]:
        """Return the vectors of ``position_ids``."""
        check_tensor("position_ids", position_ids, "...", "sequence", kind="whole numbers")
        angles = self.angles(position_ids)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


# %% mystnb={"figure": {"caption": "Sinusoidal embeddings. Left: every row is the vector of a position; fast waves on the left, slow ones on the right. Right: three of its columns as waves.", "name": "fig-positions-waves"}, "image": {"alt": "Left, an image of 128 positions by 64 dimensions: in the leftmost columns narrow stripes alternate, further right stripes grow wider until the columns are of one color. Right, sines over the position with wavelengths of about 6, 26 and 112 tokens."}}
import matplotlib.pyplot as plt

plt.style.use("llmbook.book")
waves = SinusoidalEmbedding(64)(torch.arange(128))
figure, (left, right) = plt.subplots(1, 2, width_ratios=(1, 1.2))
left.imshow(waves, aspect="auto", cmap="RdBu", vmin=-1.2, vmax=1.2, interpolation="nearest")
left.set(xlabel="dimension", ylabel="position")
left.grid(False)
for i in (0, 5, 10):
    right.plot(waves[:, 2 * i], label=f"i = {i}")
right.set(xlabel="position", ylabel="sine of pair i", ylim=(-1.1, 1.6))
right.legend(ncols=3, loc="upper center")
plt.show()

# %% [markdown]
# Why waves? By the addition theorems, a shift by $\Delta$ positions turns each hand by the angle
# $\Delta\omega_i$, wherever it stood:
#
# $$
# \begin{pmatrix} \sin((t + \Delta)\omega_i) \\ \cos((t + \Delta)\omega_i) \end{pmatrix} =
# \begin{pmatrix} \cos \Delta\omega_i & \sin \Delta\omega_i \\
# -\sin \Delta\omega_i & \cos \Delta\omega_i \end{pmatrix}
# \begin{pmatrix} \sin(t\,\omega_i) \\ \cos(t\,\omega_i) \end{pmatrix} .
# $$ (positions-shift)
#
# The matrix does not contain $t$. So "three tokens back" is one fixed linear map, which a model
# can learn once for all positions. And the inner product of two such vectors depends on nothing
# but the distance: $p_m \cdot p_n = \sum_i \cos((m - n)\,\omega_i)$, since
# $\sin a \sin b + \cos a \cos b = \cos(a - b)$.
#
# But attention does not take this inner product. It takes that of a query and a key, each made
# from the *sum* of token and position by a learned matrix. With $A$ as above, the score is
#
# $$
# (x_m + p_m)^\top A\, (x_n + p_n) =
# x_m^\top A\, x_n + x_m^\top A\, p_n + p_m^\top A\, x_n + p_m^\top A\, p_n ,
# $$ (positions-sum)
#
# and nothing singles out the distance. The second term depends on $n$ alone, the third on $m$
# alone, and the last on $m - n$ only for a very special $A$, which training would have to find.

# %%
p = SinusoidalEmbedding(64)(torch.arange(200))
A64 = torch.randn(64, 64) / 8


def spread_along_diagonals(scores: Tensor) -> float:
    """How much scores of the same distance differ, at most."""
    most = len(scores) // 2
    diagonals = [scores.diagonal(offset) for offset in range(-most, most + 1)]
    return max((diagonal.max() - diagonal.min()).item() for diagonal in diagonals)


plain, mixed = spread_along_diagonals(p @ p.T), spread_along_diagonals(p @ A64 @ p.T)
assert plain < 1e-3
print("scores of the same distance, without a matrix: differ by less than 0.001")
print(f"with a random matrix between: differ by up to {mixed:.0f}")

# %% [markdown]
# ## Rotary embeddings
#
# Su and colleagues {cite}`su2024roformer` turned the question around. Do not hope that the score
# will depend on the distance; demand it. Position shall enter when query and key are compared: a
# function $f$ gives the query $q$ of position $m$ the form $f(q, m)$, likewise the key, and for
# some function $g$
#
# $$
# \langle f(q, m), f(k, n) \rangle = g(q, k, m - n)
# \qquad \text{for all } q, k \in \mathbb{R}^d, \ m, n \ge 0 .
# $$ (positions-requirement)
#
# ### What the demand allows
#
# We look for an $f$ that is linear in the vector, as all maps around it are, and that leaves
# position 0 alone: $f(q, m) = R_m q$ with a matrix $R_m$, and $R_0 = I$. Then
# {eq}`positions-requirement` reads $q^\top R_m^\top R_n\, k = g(q, k, m - n)$ for all $q$ and
# $k$, which says that the matrix $R_m^\top R_n$ depends on $m - n$ only.
#
# *The same position twice.* $R_m^\top R_m = R_0^\top R_0 = I$. So each $R_m$ is orthogonal: it
# keeps lengths, and $R_m R_m^\top = I$ as well.
#
# *Neighbors.* $R_m^\top R_{m+1} = R_0^\top R_1 = R_1$. Multiply by $R_m$ from the left:
# $R_{m+1} = R_m R_1$. Starting from $R_0 = I$, this gives
#
# $$
# R_m = R^m \quad \text{with one orthogonal matrix } R = R_1 .
# $$ (positions-power)
#
# Conversely, every such choice fulfills the demand, for
# $(R^m)^\top R^n = (R^\top)^m R^n = R^{n-m}$, as $R^\top = R^{-1}$.
#
# ### Two dimensions: a complex number
#
# In the plane an orthogonal matrix is a rotation or a reflection. A reflection undoes itself,
# $R^2 = I$, and position 2 would look like position 0; so $R$ rotates by some angle $\omega$.
# Read the plane as complex numbers, and rotating is multiplying by $e^{\mathrm{i}\omega}$; the
# inner product of $q$ and $k$ is the real part of $q \bar{k}$, with $\bar{k}$ the conjugate. Then
# $f(q, m) = q\, e^{\mathrm{i} m \omega}$, and
#
# $$
# \langle f(q, m), f(k, n) \rangle
# = \operatorname{Re}\!\big( q e^{\mathrm{i} m \omega}\, \overline{k e^{\mathrm{i} n \omega}} \big)
# = \operatorname{Re}\!\big( q \bar{k}\, e^{\mathrm{i} (m - n) \omega} \big) .
# $$ (positions-complex)
#
# There stands the difference ({numref}`fig-positions-rotation`). In real numbers, with
# $q = a + \mathrm{i} b$, the product has the real part $a \cos m\omega - b \sin m\omega$ and the
# imaginary part $a \sin m\omega + b \cos m\omega$. As a matrix:
#
# $$
# f\!\left( \begin{pmatrix} a \\ b \end{pmatrix}, m \right) =
# \begin{pmatrix} \cos m\omega & -\sin m\omega \\ \sin m\omega & \cos m\omega \end{pmatrix}
# \begin{pmatrix} a \\ b \end{pmatrix} .
# $$ (positions-matrix)
#
# ```{figure} ../figures/positions-rotation.svg
# :name: fig-positions-rotation
# :alt: Three planes. In the first, a query and a key at position 0, with an angle between them. In the second the query has position 3 and the key position 1: each is turned, the query by 3 omega, the key by omega, and the angle between them has changed by 2 omega. In the third the positions are 6 and 4: both are turned further, and the angle between them is that of the second plane.
#
# One pair of dimensions. Query and key turn with their positions; the angle between them, and so
# their inner product, knows only the difference.
# ```
#
# ### Many dimensions
#
# Every orthogonal matrix is, in a suitable orthonormal basis $U$, made of rotations of pairs
# along the diagonal, and of entries $\pm 1$ {cite}`horn2013matrix`. Two entries 1 are a rotation
# by 0, two entries $-1$ one by $\pi$. What may be left, a lone 1 and a lone $-1$, which flips a
# sign from token to token, we leave out. So
# $R^{n-m} = U D^{n-m} U^\top$, where $D$ rotates pair $i$ by $\omega_i$, and the score
# $q^\top U\, D^{n-m}\, U^\top k$ is that of the vectors $U^\top q$ and $U^\top k$. But $q$ and
# $k$ come out of learned matrices, which can learn $U$ as well. Nothing is lost if we set
# $U = I$.
#
# {term}`Rotary position embedding`, **RoPE**, is therefore not one idea among many. Apart from such
# flips it is *all* that linear maps can do to meet the demand: cut the vector into pairs, and
# turn pair $i$ of the token at position $m$ by $m\,\omega_i$. Only the angles are ours to choose.
# The code is the formula, and {numref}`fig-positions-scores` shows what it gains over added
# waves:


# %%
def rope_complex(x: Tensor, position_ids: Tensor) -> Tensor:
    """Turn the neighbors x[0], x[1], then x[2], x[3], and so on, read as complex numbers."""
    angles = position_ids[:, None] * rope_frequencies(x.size(-1))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # (sequence, half)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


positions = torch.arange(64)
q, k = torch.randn(2, 64)
rotary = rope_complex(q.expand(64, 64), positions) @ rope_complex(k.expand(64, 64), positions).T
p = SinusoidalEmbedding(64)(positions)
added = (q + p) @ A64 @ (k + p).T
assert spread_along_diagonals(rotary) < 1e-3
spread = spread_along_diagonals(added)
print(f"scores of the same distance: rotary, below 0.001 apart; waves, up to {spread:.0f} apart")

# %% [markdown]
# As pictures:

# %% mystnb={"figure": {"caption": "The score of one and the same query and key, wherever they stand. Rotary scores are constant along each diagonal.", "name": "fig-positions-scores"}, "image": {"alt": "Two square images over the positions of key and query, 64 by 64. Left, waves added: bands along rows and columns cross, with bright blobs where they meet, and nothing follows the diagonal. Right, rotary: stripes along the diagonal, each of one color."}}
figure, axes = plt.subplots(1, 2)
for ax, scores, title in zip(axes, (added, rotary), ("waves, added", "rotary"), strict=True):
    ax.imshow(scores)
    ax.set(title=title, xlabel="position of the key", ylabel="position of the query")
    ax.grid(False)
plt.show()

# %% [markdown]
# ### Which frequencies?
#
# RoPE takes over the waves' $\omega_i = b^{-2i/d}$, where $d$ now is the size of a head. Pair $i$
# comes round after a {term}`wavelength` of
#
# $$
# \lambda_i = \frac{2\pi}{\omega_i} = 2\pi\, b^{2i/d} \quad \text{tokens.}
# $$ (positions-wavelength)
#
# The fastest pair tells *the token before* from *the token before that*, and is ambiguous after
# six tokens. A slow pair hardly turns over a whole paragraph, so it can compare contents wherever
# they stand. Llama 2 {cite}`touvron2023llama2` has $b = 10{,}000$, Llama 3
# {cite}`grattafiori2024llama3` 500,000, both with heads of 128 dimensions. How many of their 64
# pairs turn at least once within the context?

# %%
for name, base, length in (("Llama 2", 10_000, 4096), ("Llama 3", 500_000, 8192)):
    wavelengths = 2 * math.pi / rope_frequencies(128, base)
    turning = (wavelengths <= length).sum().item()
    longest = float(f"{wavelengths[-1]:.2g}")
    print(f"{name}: wavelengths 6 to {longest:,.0f}; {turning} pairs turn in {length:,} tokens")

# %% [markdown]
# The others see only part of their circle in training, which will matter when texts get longer.
#
# Often one reads that RoPE makes scores decay with distance. Take a query that equals its key. By
# {eq}`positions-complex` the score is a sum of cosines, $\sum_i |q_i|^2 \cos(\Delta\omega_i)$,
# which are all 1 at distance 0 and then fall out of step: it decays, more slowly with a larger
# base. But take independent vectors. Each pair adds
# $|q_i| |k_i| \cos(\varphi_i + \Delta \omega_i)$ with a random angle $\varphi_i$, and turning a
# random angle changes nothing: there is no decay at all ({numref}`fig-positions-decay`). Barbero
# and colleagues {cite}`barbero2025round` find that a trained model does not rely on it.

# %% mystnb={"figure": {"caption": "Score against distance, relative to its size at distance 0. It decays where query and key are equal (here with all $|q_i|$ equal), and not where they are independent.", "name": "fig-positions-decay"}, "image": {"alt": "Two plots over the distance from 1 to 8,192, logarithmic. Left, query equals key: from 1 the score falls with wiggles, to about 0.15 at 1,000 tokens and around 0 at 8,192 with base 10,000, to about 0.4 and 0.3 with base 500,000. Right, independent: the root mean square over 1,000 pairs is flat at 1 for both bases."}}
distances = torch.logspace(0, 13, 200, base=2).round()
q, k = torch.randn(2, 1000, 64, dtype=torch.complex64)  # 64 pairs each
figure, (left, right) = plt.subplots(1, 2, sharex=True, sharey=True)
for base, color in ((10_000, "C0"), (500_000, "C1")):
    turns = distances[:, None] * rope_frequencies(128, base)
    left.semilogx(distances, turns.cos().mean(dim=1), color=color, label=f"base {base:,}")
    scores = (torch.polar(torch.ones_like(turns), turns) @ (q * k.conj()).T).real
    rms = scores.square().mean(dim=1).sqrt()
    right.semilogx(distances, rms / (q * k.conj()).sum(dim=1).real.square().mean().sqrt(), color)
    assert rms.min() / rms.max() > 0.8, "independent vectors: no decay"
left.set(title="query = key", xlabel="distance (tokens)", ylabel="relative score", ylim=(-0.2, 1.2))
right.set(title="independent", xlabel="distance (tokens)", ylabel="")
left.legend(loc="lower left")
plt.show()

# %% [markdown]
# ### Two layouts
#
# Which two numbers make a pair? The paper and Meta's code take neighbors, $(x_0, x_1)$,
# $(x_2, x_3)$: the **interleaved** layout. Hugging Face's code takes $(x_0, x_{d/2})$,
# $(x_1, x_{1 + d/2})$: the **half-split** layout, `"half"` in code, which touches memory in long
# runs ({numref}`fig-positions-layouts`). They are equally good, but weights trained with
# one give nonsense with the other, and no error.
#
# ```{figure} ../figures/positions-layouts.svg
# :name: fig-positions-layouts
# :alt: Two rows of eight cells. In the upper, interleaved, cells 0 and 1 have one color, 2 and 3 the next, and so on. In the lower, half, the colors come in the order 1, 2, 3, 4 twice: dimensions 0, 2, 4, 6, then 1, 3, 5, 7. Arrows lead from each upper cell to its place below. Brackets join the two members of the first pair in each row.
#
# The same four pairs in both layouts, a color for each, and the permutation between them.
# ```
#
# If $\Pi$ is the permutation that sorts the even dimensions before the odd ones, then half-split
# rotation of $\Pi x$ is $\Pi$ applied to the interleaved rotation of $x$: the same pairs turn by
# the same angles, and only their places differ. Scores agree, as
# $(\Pi q)^\top (\Pi k) = q^\top k$.


# %%
#| export
def interleaved_to_half(d_head: int) -> Int64[Tensor, " d_head"]:
    """Return the order in which interleaved dimensions stand in the layout "half".

    ``x[..., order]`` goes from interleaved to half, ``y[..., order.argsort()]`` back.

    >>> interleaved_to_half(6)
    tensor([0, 2, 4, 1, 3, 5])
    """
    check_even(d_head=d_head)
    return torch.arange(d_head).view(-1, 2).T.flatten()


# %% [markdown]
# The half-split rotation is the formula as well, with $a$ and $b$ half a head apart. Rotations and
# scores must agree with the interleaved ones, and must not without the permutation:


# %%
def rope_half(x: Tensor, position_ids: Tensor) -> Tensor:
    angles = position_ids[:, None] * rope_frequencies(x.size(-1))
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat(
        (x1 * angles.cos() - x2 * angles.sin(), x1 * angles.sin() + x2 * angles.cos()), dim=-1
    )


order = interleaved_to_half(64)
q, k = torch.randn(2, 20, 64)
ids = torch.arange(20)
assert torch.allclose(rope_complex(q, ids)[:, order], rope_half(q[:, order], ids), atol=1e-5)
interleaved = rope_complex(q, ids) @ rope_complex(k, ids).T
half = rope_half(q[:, order], ids) @ rope_half(k[:, order], ids).T
wrong = rope_half(q, ids) @ rope_half(k, ids).T
assert (interleaved - half).abs().max() < 1e-4
print("order of 8 dimensions:", interleaved_to_half(8).tolist())
print("scores with the permutation: less than 0.0001 apart")
print(f"scores without it: up to {(interleaved - wrong).abs().max():.0f} apart")

# %% [markdown]
# A model does not permute its vectors; it is cheaper to permute once the *rows* of the matrices
# that make them. A linear layer of PyTorch computes $q = W x$ for a column $x$ (its $W$ is
# $W_Q^\top$), and $\Pi q = (\Pi W)\, x$, head by head. So to turn weights
# of Meta's into weights for Hugging Face's code, one permutes the rows of the matrices for
# queries and keys, `q_proj` and `k_proj` (and their biases), and nothing else: values are not
# rotated. The scripts that convert checkpoints do it by a reshape:

# %%
n_heads, d_head, d_model = 4, 16, 64
W = torch.randn(n_heads * d_head, d_model)
ours = W.unflatten(0, (n_heads, d_head))[:, interleaved_to_half(d_head)].flatten(0, 1)
theirs = W.view(n_heads, d_head // 2, 2, d_model).transpose(1, 2).reshape(-1, d_model)
assert torch.equal(ours, theirs)
print("the rows of each head, in their new order:", interleaved_to_half(d_head).tolist())

# %% [markdown] tags=["engine"]
# ### Engine room: rows of a checkpoint in the other layout, also back, for biases and parts of heads

# %% [markdown] tags=["engine"]
# For whole checkpoints the permutation is a function of its own. A bias is a column of rows, the
# gain of a normalized query or key is one head of them, and where only the first numbers of each
# head are rotated, only these are permuted.


# %% tags=["engine"]
#| export
def change_rope_layout(
    rows: Float[Tensor, "*rows_and_columns"],
    n_heads: int,
    to: Literal["half", "interleaved"],
    *,
    d_rope: int | None = None,
) -> Float[Tensor, "*rows_and_columns"]:
    """Return the weight or bias of ``q_proj`` or ``k_proj`` for the other layout of rotations.

    ``rows`` has the rows of ``n_heads`` heads one after the other and is in the layout that ``to``
    is not: Meta's files are interleaved, those of Hugging Face half. For ``k_proj`` the number is
    that of the key heads; for the gain of a normalized query or key it is 1. Of each head the first
    ``d_rope`` rows are rotated: by default all.
    """
    check_tensor("rows", rows, "...")
    check_at_least(n_heads=(1, n_heads))
    check_choice("to", to, ("half", "interleaved"))
    if rows.ndim == 0 or rows.size(0) % n_heads:
        expected = f"a multiple of n_heads, {n_heads}, as the first size"
        raise ValueError(f"rows: expected {expected}, got shape {tuple(rows.shape)}")
    d_head = rows.size(0) // n_heads
    d_rope = _rotated(d_head, d_rope)
    order = interleaved_to_half(d_rope)
    order = torch.cat((order if to == "half" else order.argsort(), torch.arange(d_rope, d_head)))
    return rows.unflatten(0, (n_heads, d_head))[:, order.to(rows.device)].flatten(0, 1)


def _rotated(d_head: int, d_rope: int | None) -> int:
    """Return how many numbers of a head are rotated, which must be pairs: all unless given."""
    if d_rope is None:
        d_rope = d_head
    check_even(d_rope=d_rope)
    if d_rope > d_head:
        raise ValueError(f"d_rope: expected at most the size of a head, {d_head}, got {d_rope}")
    return d_rope


# %% [markdown] tags=["engine"]
# There and back again nothing has changed, and Meta's rows become those of Hugging Face:

# %% tags=["engine"]
assert torch.equal(change_rope_layout(W, n_heads, "half"), theirs)
assert torch.equal(change_rope_layout(theirs, n_heads, "interleaved"), W)
print(f"{len(W)} rows of {n_heads} heads: in the other layout, and back, without a difference")

# %% [markdown]
# ### The rotation, made fast
#
# Queries and keys are rotated in every layer, forward and backward. The arithmetic is nothing; what
# costs is memory. Each operation reads its inputs and writes its result, and `rope_half` has seven
# after the angles: four products, a sum, a difference, and the joining. Two facts save most of it.
#
# First, one operation can do more. $x \odot (\cos, \cos)$, written once for both halves, is already
# half of the result; PyTorch's `addcmul_` then adds $-x_2 \odot \sin$ to its first half and
# $x_1 \odot \sin$ to its second in place, without a further copy. Second, the gradient needs no
# bookkeeping. If $y = R x$ with an orthogonal $R$, then
#
# $$
# \frac{\partial L}{\partial x} = R^\top \frac{\partial L}{\partial y}
# = R^{-1} \frac{\partial L}{\partial y} :
# $$ (positions-gradient)
#
# the gradient of a rotation is the rotation back, the same function with $-\sin$. It does not even
# need $x$. With `rope_half`, to rotate back is to rotate by the negative positions:

# %%
x, gradient = torch.randn(2, 20, 64)
x.requires_grad_()
by_autograd = torch.autograd.grad(rope_half(x, ids), x, gradient)[0]
error = (by_autograd - rope_half(gradient, -ids)).abs().max()
assert error < 1e-5
print(
    f"gradients of up to {gradient.abs().max():.0f}: turned back, they differ by less than 0.00001"
)

# %% [markdown]
# {py:func}`~llmbook.positions.apply_rope` uses both facts. It takes the cosines and sines of all
# positions, and rotates any number of heads, in either layout.

# %% [markdown] tags=["engine"]
# ### Engine room: apply_rope, in few passes over memory and with a gradient of its own

# %% [markdown] tags=["engine"]
# For `x` in 16 bits the products are taken in 32, because the cosine is, and rounded once. A
# `torch.autograd.Function` tells PyTorch about the gradient: `setup_context` keeps what `backward`
# will need.


# %% tags=["engine"]
#| export
def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x_i, x_{i + half}) by the angle of pair i; ``cos`` is there for both halves.

    One pass writes x cos, and one over each half adds what comes from the other half.
    """
    half = sin.size(-1)
    rotated = x * cos  # in float32 at least, because cos is
    rotated[..., :half].addcmul_(x[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin)
    return rotated.to(x.dtype)


class _RotateHalf(torch.autograd.Function):
    """``_rotate_half`` with its gradient: the rotation back. Cosine and sine get none.

    Where both carry a factor, the gradient is the transpose, with the same factor and -sin.
    """

    generate_vmap_rule = True  # torch.vmap maps over the tensor operations inside

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate."""
        return _rotate_half(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the angles; the input is not needed."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Rotate the gradient by minus the angle."""
        cos, sin = ctx.saved_tensors
        rotate = _RotateHalf.apply if torch.is_grad_enabled() else _rotate_half
        return rotate(gradients[0], cos, -sin), None, None


# %% [markdown] tags=["engine"]
# The interleaved layout is one multiplication of complex numbers, for which PyTorch has a fast
# kernel that passes over memory only once. It needs pairs that lie side by side; a tensor whose
# memory is laid out otherwise is copied first.


# %% tags=["engine"]
#| export
def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply the neighbors (x_2i, x_2i+1), read as a complex number, by cos + i sin."""
    real = x if x.dtype in (torch.float32, torch.float64) else x.float()
    steps = (real.storage_offset(), *real.stride()[:-1])
    if real.stride(-1) != 1 or any(step % 2 for step in steps):  # no view of pairs is possible
        real = real.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(real.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


# %% [markdown] tags=["engine"]
# Both layouts behind one function:


# %% tags=["engine"]
#| export
def apply_rope(
    x: Float[Tensor, "*batch heads sequence d_head"],
    cos: Float[Tensor, "*#batch sequence half"],
    sin: Float[Tensor, "*#batch sequence half"],
    layout: Literal["half", "interleaved"] = "half",
    *,
    d_rope: int | None = None,
) -> Float[Tensor, "*batch heads sequence d_head"]:
    """Rotate each pair of ``x`` by its angle; ``cos`` and ``sin`` are those of ``RotaryEmbedding``.

    Pairs are (x_i, x_{i + half}) in the layout "half" (Hugging Face), (x_2i, x_{2i+1}) in
    "interleaved" (the paper, Meta). Computed in float32 (float64 for float64), even from angles of
    16 bits, returned in the dtype of ``x``. In "half", cos and sin get no gradient where x does.
    Only the first ``d_rope`` numbers of each head are rotated, in pairs among themselves, the
    others stay as they are (GPT-NeoX, Phi); unless it is given, all are. A ``ValueError`` tells of
    angles that do not fit, such as those of a batch for an ``x`` without heads.

    >>> x, quarter = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[torch.pi / 2, 0]])
    >>> apply_rope(x, quarter.cos(), quarter.sin()).round()
    tensor([[[-3.,  2.,  1.,  4.]]])
    >>> apply_rope(x, quarter.cos(), quarter.sin(), layout="interleaved").round()
    tensor([[[-2.,  1.,  3.,  4.]]])
    """
    _check_rotation(x, cos, sin, layout, d_rope)
    if d_rope is not None and d_rope < x.size(-1):
        turning, rest = x.tensor_split([d_rope], dim=-1)
        return torch.cat((apply_rope(turning, cos, sin, layout), rest), dim=-1)
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # the same for all heads
    if cos.dtype.itemsize < 4:
        cos, sin = cos.float(), sin.float()
    if layout == "half":
        # For one new token, autograd.Function costs more than the rotation: only where it is needed
        tracked = x.requires_grad and torch.is_grad_enabled()
        rotate = _RotateHalf.apply if tracked else _rotate_half
        return rotate(x, torch.cat((cos, cos), dim=-1), sin)
    return _rotate_interleaved(x, cos, sin)


def _check_rotation(x: Tensor, cos: Tensor, sin: Tensor, layout: str, d_rope: int | None) -> None:
    """Raise a ValueError unless there is one angle for each pair of every head of ``x``."""
    check_choice("layout", layout, ("half", "interleaved"))
    check_tensor("x", x, "...", "heads", "sequence", "d_head")
    if d_rope is None and x.size(-1) % 2:
        raise ValueError(f"x: expected heads of an even size, got shape {tuple(x.shape)}")
    half = _rotated(x.size(-1), d_rope) // 2
    for name, angles in (("cos", cos), ("sin", sin)):
        check_tensor(name, angles, "...", x.size(-2), half)
        before, batch = angles.shape[:-2], x.shape[:-3]
        fits = len(before) <= len(batch)
        for at in range(1, len(before) + 1 if fits else 1):
            fits = fits and before[-at] in (1, batch[-at])
        if not fits:
            rows = f"{tuple(batch)}, which are before heads, sequence and feature"
            expected = f"at most the batch dimensions of x, {rows}, got {tuple(before)}"
            raise ValueError(f"{name}: expected {expected} before (sequence, half)")


# %% [markdown]
# ### Angles, once for all layers
#
# The angles are the same for all heads and layers, so they are computed once a step, by a module
# without parameters. It takes the scaling of a later section as an option.


# %%
#| export
class RotaryEmbedding(nn.Module):
    """Cosine and sine of the angle of each pair at each position, for ``apply_rope``.

    No parameters, nothing in the state dict. The result is float32, whatever the model is cast to,
    times the attention factor of ``scaling``. Position -1, padding, counts as 0. Where a part of
    each head is rotated, ``d_head`` is the size of that part.
    """

    def __init__(
        self, d_head: int, base: int | float = 10_000.0, scaling: "RopeScaling | None" = None
    ):
        super().__init__()
        self.d_head, self.base, self.scaling = d_head, base, scaling
        self.attention_factor = 1.0
        with torch.device("cpu"):  # real numbers, also where a model is laid out on "meta"
            frequencies = rope_frequencies(d_head, base)
            if scaling is not None:  # "dynamic" stretches later, once it sees how long a text is
                frequencies, self.attention_factor = scale_rope(frequencies, scaling, base)
        self.angles = _Angles(frequencies)

    def forward(
        self, position_ids: Int64[Tensor, "*batch sequence"]
    ) -> tuple[Float32[Tensor, "*batch sequence half"], Float32[Tensor, "*batch sequence half"]]:
        """Return cosine and sine."""
        check_tensor("position_ids", position_ids, "...", "sequence", kind="whole numbers")
        angles = self.angles(position_ids)
        if self.scaling is not None and self.scaling.kind == "dynamic":
            angles = angles * _dynamic_share(self.scaling, position_ids, angles.size(-1))
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor == 1:
            return cos, sin
        return cos * self.attention_factor, sin * self.attention_factor

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"d_head={self.d_head}, base={self.base}, scaling={self.scaling}"


# %% [markdown]
# Is it still the same function, and is the gradient what {eq}`positions-gradient` says?

# %%
cos, sin = RotaryEmbedding(64)(ids)
x, gradient = torch.randn(2, 1, 20, 64)  # one head
x.requires_grad_()
for layout, expected in (("half", rope_half(x, ids)), ("interleaved", rope_complex(x, ids))):
    rotated = apply_rope(x, cos, sin, layout)
    back = torch.autograd.grad(rotated, x, gradient)[0]
    error = (rotated - expected).abs().max()
    gradient_error = (back - apply_rope(gradient, cos, -sin, layout)).abs().max()
    assert max(error, gradient_error) < 1e-5
    print(f"{layout:11} rotation and gradient differ by less than 0.00001")

# %% [markdown]
# ## Positions are given, not counted
#
# `RotaryEmbedding` asks for {term}`position ids`. It could count from zero by itself, and many
# programs do; two cases then go wrong. In a packed row ({doc}`07_batches`) several documents
# share a row, and each has its own position 0. And when text is generated, the model reads one
# new token at a time and keeps the rotated keys of those before (chapter 09); the one token that
# it reads now stands at position 57, not 0 ({numref}`fig-positions-ids`).
#
# ```{figure} ../figures/positions-ids.svg
# :name: fig-positions-ids
# :alt: Above, a packed row of nine tokens in three documents of 3, 4 and 2 tokens; its position ids are 0 1 2, 0 1 2 3, 0 1. Below, generation: keys at positions 0 to 4 are kept, and a new token arrives with position id 5.
#
# Position ids restart in every document of a packed row, which ◆ opens, and go on where kept keys
# end.
# ```
#
# We pack three documents and compare each with itself alone:

# %%
from llmbook.batches import document_fields

inputs = torch.tensor([[0, 5, 6, 0, 7, 8, 9, 0, 3]])  # 0 is end of text, which opens a document
position_ids, document_ids = document_fields(inputs, end_of_text=0)
print("position ids:", position_ids.tolist(), " document ids:", document_ids.tolist())
rope = RotaryEmbedding(16)
q, k = torch.randn(2, 1, 4, 9, 16)  # (batch, heads, sequence, d_head)
together = apply_rope(q, *rope(position_ids)) @ apply_rope(k, *rope(position_ids)).mT
for number in range(3):
    here = document_ids[0] == number
    angles = rope(torch.arange(here.sum())[None])
    alone = apply_rope(q[:, :, here], *angles) @ apply_rope(k[:, :, here], *angles).mT
    error = (together[:, :, here][..., here] - alone).abs().max()
    assert error < 1e-4
    print(f"document {number}: {alone[0, 0].numel():2} scores a head, as if alone")

# %% [markdown]
# Rotary scores forgive a constant shift, so positions that simply count on through the row would
# do, too (a learned table would not forgive it). What nothing forgives is a wrong difference.
# Five keys are kept, and the sixth token arrives:

# %%
whole = apply_rope(q, *rope(torch.arange(9)[None])) @ apply_rope(k, *rope(torch.arange(9)[None])).mT
kept = apply_rope(k[:, :, :5], *rope(torch.arange(5)[None]))
for position in (5, 0):
    query = apply_rope(q[:, :, 5:6], *rope(torch.tensor([[position]])))
    error = (query @ kept.mT - whole[:, :, 5:6, :5]).abs().max()
    print(f"the new token at position {position}: scores are off by up to {error:.1f}")

# %% [markdown]
# Padding has position $-1$, which is treated as 0: a table has no row $-1$, and nobody looks at
# what comes out.
#
# ## Angles need 32 bits
#
# Models are trained and run in 16 bits where possible. `bfloat16` has 8 significant bits, so
# above 256 it cannot hold every whole number: positions 998 to 1,002 all become 1,000. And an
# angle of 1,000 radians that is off by 1/256 of itself points anywhere. We compute angles in
# several types and compare with 64 bits.

# %%
points = torch.logspace(0, 17, 400, base=2).long().unique()
exact_frequencies = 10_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
exact = points[:, None] * exact_frequencies


def worst_error(dtype: torch.dtype) -> Tensor:
    angles = points.to(dtype)[:, None] * exact_frequencies.to(dtype)
    return (angles.double() - exact).abs().amax(dim=1)


bf16, f32 = worst_error(torch.bfloat16), worst_error(torch.float32)
confused = (torch.arange(2000).bfloat16() == 1000).sum().item()
print("positions that bfloat16 takes for 1,000:", confused)
for most in (256, 4096, 131_072):
    near = points <= most
    wide, narrow = bf16[near].max(), f32[near].max()
    print(f"up to {most:7,}: bfloat16 off by up to {wide:3.0f} radians, float32 by {narrow:.5f}")

# %% [markdown]
# {numref}`fig-positions-precision` shows the errors of each type, and what they do to scores.

# %% mystnb={"figure": {"caption": "Left: the largest error of an angle, over 64 pairs. Right: the score of a query and a key that are neighbors, relative to that at one position, moved along the text. It should not change.", "name": "fig-positions-precision"}, "image": {"alt": "Left, doubly logarithmic, error in radians against position from 1 to 131,072. bfloat16 rises from about 0.002 to hundreds and crosses 1 near position 300; float16 is a factor of eight lower and ends at 65,504; float32 stays below 0.01. Right, the score against position 0 to 4,096: a flat line for float32, for bfloat16 points near it up to 256. Beyond, most points lie at 1 and the others fall in steps at 256, 512, 1,024 and 2,048, from 0.9 to 0.55."}}
figure, (left, right) = plt.subplots(1, 2)
below = points < 65_504  # the largest float16
left.loglog(points, bf16, label="bfloat16")
left.loglog(points[below], worst_error(torch.float16)[below], label="float16")
left.loglog(points, f32.clamp(min=1e-9), label="float32")
left.axhline(1, color="gray", linewidth=1)
left.set(xlabel="position", ylabel="error (radians)", ylim=(1e-8, 1e3))
left.legend(loc="lower right")
m = torch.randint(4096, (1500,)).sort().values
for dtype, style in ((torch.bfloat16, "C0."), (torch.float32, "C2-")):
    turns = [(x.to(dtype)[:, None] * exact_frequencies.to(dtype)).double() for x in (m + 1, m)]
    right.plot(m, (turns[0] - turns[1]).cos().mean(dim=1), style, markersize=2)
right.set(xlabel="position of the key", ylabel="score of neighbors", ylim=(0.4, 1.05))
plt.show()

# %% [markdown]
# In 16 bits two neighbors get the score of a token with itself, if their positions are rounded to
# the same number, or else that of tokens 2, 4, 8 or 16 apart ({numref}`fig-positions-precision`).
# The demand fails silently, and long texts suffer {cite}`wang2024precision`. In 32 bits positions
# are exact up to $2^{24}$. Once taken, cosine and sine lie between $-1$ and 1 and may be rounded.
# But a model in PyTorch is cast as a whole, `model.to(torch.bfloat16)`, and its frequencies with
# it. Our
# module, as it stands, falls into that trap:

# %%
place = torch.tensor([[100_003]])
right = RotaryEmbedding(64)(place)[0]
cast = RotaryEmbedding(64).to(torch.bfloat16)
error = (cast(place)[0].float() - right).abs().max()
assert error > 0.5
print(f"after a cast to bfloat16, cosines at position 100,003 are off by up to {error:.0f}")

# %% [markdown] tags=["engine"]
# ### Engine room: frequencies that no cast can round

# %% [markdown] tags=["engine"]
# An exact copy is kept out of PyTorch's reach and put back after each move or cast, all of which go
# through the method `_apply` of `nn.Module`.


# %% tags=["engine"]
#| export
class _Angles(_Angles):  # continued
    def __init__(self, frequencies: Float32[Tensor, " half"]):
        nn.Module.__init__(self)
        self.exact = frequencies  # not a buffer: PyTorch neither casts, moves nor empties it
        self.register_buffer("frequencies", frequencies.clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Angles":
        """Follow the model to its device, and undo any cast."""
        super()._apply(fn, recurse)
        self.frequencies = self.exact.to(self.frequencies.device)
        return self


# %% [markdown]
# ### After a cast
#
# With these frequencies a model can be cast as a whole:

# %%
cast = RotaryEmbedding(64).to(torch.bfloat16)
assert torch.equal(cast(place)[0], right)
print(f"after a cast to bfloat16: all {right.numel()} cosines as before, in {cast(place)[0].dtype}")

# %% [markdown]
# ## Does it help?
#
# We train four tiny transformers that differ in nothing but positions, to predict the next byte
# of documentation, for 300 steps on windows of 64 bytes. The next three chapters explain each line
# of the model, so the cells that define and train it are folded here.


# %% tags=["engine"]
# Four tiny transformers in one class
class TinyModel(nn.Module):
    def __init__(self, positions: str):
        super().__init__()
        kinds = {"learned": LearnedEmbedding(64, 64), "sinusoidal": SinusoidalEmbedding(64)}
        nn.init.normal_(kinds["learned"].weight, std=0.25)  # half as large as the tokens' vectors
        self.added, self.rotary = kinds.get(positions), positions == "rotary"
        self.rope = RotaryEmbedding(32)
        self.table, self.head = nn.Embedding(256, 64), nn.Linear(64, 256, bias=False)
        sizes = ((64, 192), (64, 64), (64, 256), (256, 64))
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in sizes) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        position_ids = torch.arange(ids.size(1))[None]
        x = 0.5 * self.table(ids)
        x = x if self.added is None else x + self.added(position_ids)
        for mix, out, up, down in self.layers:
            parts = mix(nn.functional.rms_norm(x, (64,))).unflatten(-1, (3, 2, 32))
            q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (batch, heads, sequence, d_head)
            if self.rotary:
                q, k = (apply_rope(z, *self.rope(position_ids)) for z in (q, k))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).flatten(2))
            x = x + down(up(nn.functional.rms_norm(x, (64,))).relu())
        return self.head(nn.functional.rms_norm(x, (64,)))


# %% [markdown]
# `losses_on(model, starts, length)` gives the loss at every place of the windows that begin at
# `starts`. `train(model, length, steps, rate, rows)` trains a model on such windows and returns the
# loss of each step.

# %% tags=["engine"]
# The text, the losses, and a loop that trains
from llmbook.corpus import read_installed_docs

modules = ["argparse", "asyncio", "email", "json", "logging", "typing", "unittest"]
text = "\n".join(document.text for document in read_installed_docs(modules))
data = torch.tensor(list(text.encode()))
n_train = len(data) * 9 // 10


def losses_on(model: nn.Module, starts: Tensor, length: int) -> Tensor:
    windows = data[starts[:, None] + torch.arange(length + 1)]
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none")


def train(model: nn.Module, length: int, steps: int, rate: float, rows: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    history = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, 1.5 * (1 - step / steps))
        loss = losses_on(model, torch.randint(n_train - length, (rows,)), length).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


# %% [markdown]
# Each model starts from the same seed and is judged on text held out from training:

# %%
models, histories, held_out = {}, {}, {}
test_starts = torch.linspace(n_train, len(data) - 257, 180).long()
for kind in ("none", "learned", "sinusoidal", "rotary"):
    torch.manual_seed(0)
    models[kind] = TinyModel(kind)
    histories[kind] = train(models[kind], length=64, steps=300, rate=4e-3, rows=16)
    with torch.no_grad():
        held_out[kind] = losses_on(models[kind], test_starts, 64).mean().item()
for better, worse, least in (("rotary", "sinusoidal", 0.1), ("sinusoidal", "none", 0.05)):
    assert held_out[better] + least < held_out[worse]
    print(f"{better} leads {worse} by more than {least} nats per byte of held-out text")
assert 2.0 < held_out["rotary"] < 2.3 < held_out["none"] < 2.7

# %% [markdown]
# {numref}`fig-positions-training` shows how they got there.

# %% mystnb={"figure": {"caption": "Loss of four tiny models that differ in their positions only, in training.", "name": "fig-positions-training"}, "image": {"alt": "Four falling curves over 300 steps. None and learned nearly coincide and end near 2.55 nats per byte. Sinusoidal is above them at first, crosses them at about 130 steps and ends near 2.35. Rotary is lowest from 50 steps on and ends near 2.1."}}
for kind, history in histories.items():
    smooth = torch.tensor(history).view(-1, 15).mean(dim=1)
    plt.plot(
        torch.arange(15, 301, 15), smooth, label=f"{kind}: {held_out[kind]:.2f} on held-out text"
    )
plt.xlabel("step")
plt.ylabel("loss (nats per byte)")
plt.ylim(1.9, 3.6)
plt.legend()
plt.show()

# %% [markdown]
# Rotary embeddings win by a wide margin ({numref}`fig-positions-training`). The learned table
# does not help yet: it must find out for each of 64 positions what the waves have from the start.
# With three other seeds rotary led sinusoidal by 0.2 to 0.3. But three hundred steps are few: they
# show how fast a model learns, not where it would end.
#
# ## Longer than in training
#
# Training on long texts is expensive, so models are trained on short ones, and one would like to
# read longer ones afterwards. A learned table simply ends. RoPE has an angle for every position,
# but the slow pairs, which did not get round once, then reach angles never seen. Let the training
# length be $T$, and let us read texts of $sT$ tokens. What can be done to the frequencies? This
# is {term}`context extension`.
#
# **Linear interpolation** {cite}`chen2023extending` squeezes the positions: $m$ becomes $m/s$.
# Since only the product of position and frequency counts, this is
#
# $$
# \omega_i' = \omega_i / s , \qquad \lambda_i' = s\,\lambda_i .
# $$ (positions-linear)
#
# No angle leaves the range of training. But neighbors, which the fastest pair told apart by a
# radian, are now a fraction $1/s$ of that apart.
#
# **NTK-aware scaling** {cite}`bloc972023ntk` leaves the fast pairs alone and stretches the slow
# ones, by changing the base to some $b'$. The fastest pair has $\omega_0 = b^0 = 1$ for any base.
# Demand that the slowest, $i = d/2 - 1$, be interpolated by the full factor:
#
# $$
# (b')^{-(d-2)/d} = b^{-(d-2)/d} / s \quad\Longleftrightarrow\quad b' = b\, s^{d/(d-2)} .
# $$ (positions-ntk)
#
# Then $\omega_i' / \omega_i = (b'/b)^{-2i/d} = s^{-2i/(d-2)}$ for all pairs. This falls evenly on
# a logarithmic scale, from 1 to $1/s$. The name refers to the neural tangent kernel, in whose
# theory a network learns fine detail only if its inputs hold high frequencies
# {cite}`tancik2020fourier`; so those should not be lost.
#
# **By parts.** With the new base, a pair in the middle that never got round in training is
# stretched by less than $s$, so it still leaves its range. Count the **turns** that pair $i$
# makes within the original context:
#
# $$
# r_i = \frac{T\,\omega_i}{2\pi} = \frac{T}{\lambda_i} .
# $$ (positions-turns)
#
# A pair with many turns has seen all angles, and needs no change. One with less than a turn must
# be stretched by $s$. In between, let a share $\kappa_i$ of the frequency be kept:
#
# $$
# \omega_i' = \kappa_i\, \omega_i + (1 - \kappa_i)\, \frac{\omega_i}{s} ,
# $$ (positions-kept)
#
# with $\kappa_i = 1$ for pairs that turn often and $\kappa_i = 0$ for those that turn seldom.
#
# **Llama 3.1** lets $\kappa$ rise evenly from 0 at $r = 1$ to 1 at $r = 4$, numbers that Meta's
# code says were found by a grid search {cite}`meta2024llamamodels`. **YaRN** {cite}`peng2024yarn`
# came before, and its paper has the same ramp between 1 and 32 turns. Its published code, and
# transformers after it, let the ramp be even in the *index* of the pair instead. The index at
# which a pair makes $r$ turns follows from $T\, b^{-2i/d} = 2\pi r$:
#
# $$
# i(r) = \frac{d}{2} \cdot \frac{\ln \big( T / (2\pi r) \big)}{\ln b} .
# $$ (positions-yarn)
#
# The ramp goes from $i(32)$, rounded down, to $i(1)$, rounded up. YaRN does one thing more. Over
# more tokens a softmax spreads out; to sharpen it, cosine and sine are multiplied by
# $0.1 \ln s + 1$, and scores therefore by its square. Its authors fitted that formula to models
# of several sizes; it is not derived.


# %%
#| export
@dataclass(frozen=True)
class RopeScaling:
    """How to stretch the frequencies of RoPE to texts ``factor`` times as long as in training.

    Kinds: "linear" (position interpolation), "ntk" (a larger base), "dynamic" (a base that grows
    with the text once it is longer than ``original_context_length``), "yarn" and "llama3", which
    keep pairs that turn often within ``original_context_length`` tokens and stretch the others.
    "yarn" mixes between ``beta_fast`` and ``beta_slow`` turns, evenly over the index of the pair,
    whose ends are rounded outward if ``truncate``; its ``attention_factor`` multiplies cosine and
    sine, and is 0.1 ln(factor) + 1 unless given. "llama3" mixes between ``high_freq_factor`` and
    ``low_freq_factor`` turns. What is impossible, and a setting that the kind has no use for, raise
    a ``ValueError``.
    """

    kind: Literal["linear", "ntk", "dynamic", "yarn", "llama3"]
    factor: int | float
    original_context_length: int | None = None
    low_freq_factor: int | float = 1.0
    high_freq_factor: int | float = 4.0
    beta_fast: int | float = 32.0
    beta_slow: int | float = 1.0
    attention_factor: int | float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_scaling(self)


# %% [markdown]
# By NTK-aware scaling, pair $i$ keeps the share $s^{-2i/(d-2)}$ of its frequency, as derived:


# %%
#| export
def _ntk_share(factor: float | Tensor, frequencies: Tensor) -> Tensor:
    """What each pair keeps of its frequency under a base for texts ``factor`` times as long."""
    half = len(frequencies)
    index = torch.arange(half, device=frequencies.device)
    return factor ** (-index / (half - 1))


# %% [markdown]
# Which share $\kappa_i$ of its frequency a pair keeps is, by Llama 3's rule, a ramp in the number
# of turns:


# %%
#| export
def _llama3_kept(
    frequencies: Float[Tensor, " half"], scaling: RopeScaling
) -> Float[Tensor, " half"]:
    """The share of each pair's frequency that Llama 3 keeps, a ramp in the number of turns."""
    turns = frequencies * (scaling.original_context_length or 1) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


# %% [markdown]
# From it follow the new frequencies; {eq}`positions-kept` is the last line. YaRN's ramp, with its
# roundings, is in the engine room.


# %%
#| export
def scale_rope(
    frequencies: Float[Tensor, " half"],
    scaling: RopeScaling,
    base: int | float = 10_000.0,
    *,
    length: int | None = None,
) -> tuple[Float[Tensor, " half"], float]:
    """Return the scaled frequencies, and the factor for cosine and sine (1 unless "yarn").

    ``frequencies`` are those of ``rope_frequencies`` with the same ``base``, on which only "yarn"
    depends. The factor is 0.1 ln(factor) + 1 for "yarn", unless ``scaling`` has another. ``length``
    is that of the text, on which only "dynamic" depends: by default its original context.
    """
    _check_scale_rope(frequencies, scaling, base, length)
    factor, attention_factor = scaling.factor, 1.0
    if scaling.kind == "linear":
        return frequencies / factor, attention_factor
    if scaling.kind in ("ntk", "dynamic"):
        growth = factor if scaling.kind == "ntk" else _dynamic_growth(scaling, length)
        return frequencies * _ntk_share(growth, frequencies), attention_factor
    if scaling.kind == "llama3":
        kept = _llama3_kept(frequencies, scaling)
    else:
        kept = _yarn_kept(frequencies, scaling, base)
        attention_factor = scaling.attention_factor or 0.1 * math.log(factor) + 1
    return frequencies * (kept + (1 - kept) / factor), attention_factor


# %% [markdown] tags=["engine"]
# ### Engine room: YaRN's ramp to the letter, a factor that follows the text, refused scalings

# %% [markdown] tags=["engine"]
# YaRN's published code goes two steps further than its formula: the ends of the ramp are rounded
# outward, and the last may lie beyond the last pair. Models depend on it, so we do the same.


# %% tags=["engine"]
#| export
def _yarn_kept(
    frequencies: Float[Tensor, " half"], scaling: RopeScaling, base: int | float
) -> Float[Tensor, " half"]:
    """The share of each pair's frequency that YaRN keeps: 1 for fast pairs, 0 for slow ones."""
    half, length = len(frequencies), scaling.original_context_length or 1
    if not math.isclose(frequencies[-1], base ** ((1 - half) / half), rel_tol=1e-3):
        raise ValueError(f"base: expected the one that the frequencies have, got {base}")

    def index(turns: int | float) -> float:  # of the pair that makes so many turns in the context
        return half * math.log(length / (2 * math.pi * turns)) / math.log(base)

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)  # not half - 1: as in YaRN's code
    ramp = (torch.arange(half, device=frequencies.device) - first) / max(last - first, 0.001)
    return 1 - ramp.clamp(0, 1)


# %% [markdown] tags=["engine"]
# A fixed factor blurs short texts as much as long ones. **Dynamic** scaling, as transformers has
# it, lets the factor follow the text: for $L$ tokens, more than the $T$ of training, it is
#
# $$
# s\,\frac{L}{T} - (s - 1) ,
# $$
#
# which is 1 at $L = T$, so that nothing changes there, and with $s = 1$ it is $L/T$, just what the
# text needs; a larger $s$ stretches earlier. Two remarks. The length of a batch is that of its
# longest row. And keys that are kept while a text grows keep the angles that they were stored with,
# although the factor has changed since; transformers does the same.


# %% tags=["engine"]
#| export
def _dynamic_growth(scaling: RopeScaling, length: Any) -> Any:
    """The factor for a text of so many tokens (a number or a tensor), at least 1."""
    original = scaling.original_context_length or 1
    growth = scaling.factor * (original if length is None else length) / original
    growth = growth - (scaling.factor - 1)
    return growth.clamp(min=1.0) if isinstance(growth, Tensor) else max(growth, 1.0)


def _dynamic_share(scaling: RopeScaling, position_ids: Tensor, half: int) -> Tensor:
    """What each pair keeps of its frequency, for the longest text among ``position_ids``."""
    pairs = torch.empty(half, device=position_ids.device)
    if not position_ids.numel():
        return torch.ones_like(pairs)
    return _ntk_share(_dynamic_growth(scaling, position_ids.max().float() + 1), pairs)


# %% [markdown] tags=["engine"]
# What is impossible is refused when the scaling is described, not when a model is built with it;
# and so is a setting that the kind does not read, since whoever gives one expects it to matter.


# %% tags=["engine"]
#| export
_OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "dynamic": (),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


def _check_scaling(scaling: RopeScaling) -> None:
    kind, length = scaling.kind, scaling.original_context_length
    check_choice("kind", kind, tuple(_OWN_SETTINGS))
    if not _is_number(scaling.factor) or not 1 <= scaling.factor < math.inf:
        raise ValueError(f"factor: expected a number from 1 on, got {scaling.factor!r}")
    check_at_least(original_context_length=(1, length))
    if length is None and kind in ("dynamic", "yarn", "llama3"):
        raise ValueError(f"original_context_length: {kind!r} needs it, got None")
    for field in fields(scaling)[3:]:  # after kind, factor and length, which all kinds may have
        value = getattr(scaling, field.name)
        if field.name not in _OWN_SETTINGS[kind] and value != field.default:
            raise ValueError(f"{field.name}: {kind!r} has no use for it, got {value!r}")
    for slow, fast in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        low, high = getattr(scaling, slow), getattr(scaling, fast)
        if not (_is_number(low) and _is_number(high) and 0 < low < high < math.inf):
            raise ValueError(f"{slow}: expected 0 < {slow} < {fast}, got {low!r} and {high!r}")
    attention = scaling.attention_factor
    if attention is not None and not (_is_number(attention) and 0 < attention < math.inf):
        raise ValueError(f"attention_factor: expected a number above 0, got {attention!r}")
    if not isinstance(scaling.truncate, bool):
        raise ValueError(f"truncate: expected True or False, got {scaling.truncate!r}")


# %% tags=["engine"]
#| export
def _check_scale_rope(
    frequencies: Tensor, scaling: RopeScaling, base: int | float, length: int | None
) -> None:
    check_tensor("frequencies", frequencies, "half")
    if not isinstance(scaling, RopeScaling):
        raise ValueError(f"scaling: expected a RopeScaling, got {scaling!r:.60}")
    _check_base(base)
    check_at_least(length=(1, length))
    least = 2 if scaling.kind in ("ntk", "dynamic") else 1
    if len(frequencies) < least:
        expected = f"{scaling.kind!r} needs at least {least} pairs"
        raise ValueError(f"frequencies: {expected}, got {len(frequencies)}")


# %% [markdown]
# ### What each does to the frequencies
#
# {numref}`fig-positions-stretch` shows what each does to a head like that of Llama 3, of 8,192
# tokens stretched by 8.

# %% mystnb={"figure": {"caption": "By how much each pair's wavelength is stretched, against that wavelength, for a factor of 8. The line marks the original context.", "name": "fig-positions-stretch"}, "image": {"alt": "Stretch from 1 to 8 against wavelengths from 6 to 2.5 million tokens, both logarithmic. Linear is a horizontal line at 8. NTK-aware is a straight line that rises from 1 at the shortest to 8 at the longest wavelength. Llama 3 stays at 1 up to a wavelength of 2,048 and rises steeply to 8 at 8,192, the original context. YaRN begins to rise at a wavelength of about 250 and reaches 8 just after 8,192."}}
frequencies = rope_frequencies(128, base=500_000)
for kind in ("linear", "ntk", "yarn", "llama3"):
    scaling = RopeScaling(kind, factor=8, original_context_length=8192)
    scaled, attention_factor = scale_rope(frequencies, scaling, base=500_000)
    plt.loglog(2 * math.pi / frequencies, frequencies / scaled, ".-", markersize=4, label=kind)
plt.axvline(8192, color="gray", linewidth=1)
plt.xlabel("wavelength (tokens)")
plt.ylabel("stretch")
plt.yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
plt.minorticks_off()
plt.legend()
plt.show()

# %% [markdown]
# ### What it does to a model
#
# Our rotary model has never seen more than 64 bytes. We let it read 256, and look at the loss by
# position: as it is, with each scaling, and after 20 further steps on long windows
# ({numref}`fig-positions-extension`).

# %%
import copy


def loss_by_position(model: nn.Module, scaling: RopeScaling | None, steps: int = 0) -> Tensor:
    model = copy.deepcopy(model)
    model.rope = RotaryEmbedding(32, scaling=scaling)
    torch.manual_seed(0)
    train(model, length=256, steps=steps, rate=1e-3, rows=4)
    with torch.no_grad():
        return losses_on(model, test_starts, 256).mean(dim=0).view(16, 16).mean(dim=1)


scalings = {None: None} | {
    kind: RopeScaling(kind, factor=4, original_context_length=64)
    for kind in ("linear", "ntk", "yarn", "llama3")
}
as_is = {kind: loss_by_position(models["rotary"], scaling) for kind, scaling in scalings.items()}
tuned = {
    kind: loss_by_position(models["rotary"], scalings[kind], steps=20)
    for kind in (None, "linear", "yarn")
}

# %% [markdown]
# The curves show where each fails.

# %% mystnb={"figure": {"caption": "A model trained on 64 bytes reads 256. Left, as it is and with the frequencies stretched in four ways; right, three of these after 20 more steps on 256 bytes.", "name": "fig-positions-extension"}, "image": {"alt": "Two plots of the loss against the position up to 256, with a line at 64. Left, no further training: as it is, the loss is near 2.15 up to 64 and then climbs to 2.8; linear is near 3.2 everywhere; NTK stays near 2.2 up to about 170 and climbs to 2.6; YaRN and llama3 stay near 2.2 throughout. Right, after 20 steps: linear has come down to about 2.5; as it is and YaRN lie close together near 2.15, YaRN a little lower beyond 64."}}
figure, (left, right) = plt.subplots(1, 2, sharex=True, sharey=True)
middle = torch.arange(8, 256, 16)
for number, (kind, losses) in enumerate(as_is.items()):
    left.plot(middle, losses, color=f"C{number}", label=kind or "as it is")
    if kind in tuned:
        right.plot(middle, tuned[kind], color=f"C{number}", label=kind)
for ax, title in ((left, "no further training"), (right, "after 20 steps")):
    ax.axvline(64, color="gray", linewidth=1)
    ax.set(title=title, xlabel="position")
right.legend(*left.get_legend_handles_labels(), loc="upper right", ncols=2)
left.set(ylabel="loss (nats per byte)", ylim=(2.0, 3.4))
plt.show()

# %% [markdown]
# In numbers, how much worse are the last 64 bytes than the first 64 were as it is?

# %%
inside, beyond = slice(0, 4), slice(12, 16)  # the first 64 bytes, and the last 64
bounds = {None: (0.4, 1.0), "linear": (0.7, 1.4), "ntk": (0.1, 0.7)}
bounds |= dict.fromkeys(("yarn", "llama3"), (-0.1, 0.25))
for kind, (low, high) in bounds.items():
    worse = (as_is[kind][beyond].mean() - as_is[None][inside].mean()).item()
    assert low < worse < high
    print(f"{kind or 'as it is':8} between {low:4} and {high:4} nats per byte worse")
change = {kind: (y[beyond].mean() - as_is[None][inside].mean()).item() for kind, y in as_is.items()}
assert change["ntk"] < change[None], "NTK helps, yet not to the end"
assert (as_is["linear"] - as_is[None])[inside].mean() > 0.5, "linear blurs from the start"
cured = (as_is["linear"] - tuned["linear"]).mean().item()
assert cured > 0.3
print("20 steps lower the loss with linear by more than 0.3")
assert -0.05 < (tuned[None] - tuned["yarn"])[beyond].mean() < 0.2, "there YaRN hardly leads"
curves = [*as_is.values(), *tuned.values()]
assert all(y[beyond].mean() > y[2:4].mean() - 0.1 for y in curves), "no curve falls beyond 64"

# %% [markdown]
# Unchanged, the model fails soon after its training ended. Linear interpolation blurs the
# neighborhood, on which a byte depends most; further training puts it right, for which its authors
# needed at most 1,000 steps with large models. NTK-aware scaling holds for twice the length, and by
# parts it works at once.
#
# The control, 20 steps on long windows with the frequencies as they
# were, is nearly as good as YaRN: for a tiny model and a factor of 4 a little training is cure
# enough. With Llama it was not: over 10,000 steps brought it from 2,048 tokens to no more than
# 2,560 {cite}`chen2023extending`. And no curve falls beyond 64. Longer texts have become
# readable, not useful: to draw on what is far away has to be learned, on long texts.
#
# ## Is it the real thing?
#
# **Llama in transformers** rotates queries and keys by `apply_rotary_pos_emb`. Rotations, and the
# gradients of a loss of the scores, must be the same:

# %%
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like a widget for its progress
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64)
position_ids = torch.randint(4096, (2, 50))
q, k, weights = torch.randn(2, 4, 50, 64), torch.randn(2, 2, 50, 64), torch.randn(2, 1, 50, 50)


def with_gradients(rotate: Callable[..., tuple[Tensor, Tensor]], *angles: Tensor) -> list[Tensor]:
    a, b = (x.clone().requires_grad_() for x in (q, k))
    turned = rotate(a, b, *angles)
    scores = turned[0] @ turned[1].repeat_interleave(2, dim=1).mT
    (scores.sigmoid() * weights).sum().backward()
    return [*turned, a.grad, b.grad]


theirs = with_gradients(apply_rotary_pos_emb, *LlamaRotaryEmbedding(config)(q, position_ids))
ours = with_gradients(
    lambda q, k, *angles: (apply_rope(q, *angles), apply_rope(k, *angles)),
    *RotaryEmbedding(64)(position_ids),
)
errors = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
assert max(errors) < 1e-4
print(f"q, k and their gradients, {sum(z.numel() for z in ours):,} numbers: the same to 0.0001")

# %% [markdown]
# **Meta's code** multiplies complex numbers. Written from the formula, in 64 bits:

# %%
exact_frequencies = 10_000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
turn = torch.exp(1j * position_ids[:, None, :, None] * exact_frequencies)


def by_complex_numbers(*vectors: Tensor) -> tuple[Tensor, ...]:
    pairs = [torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) for x in vectors]
    return tuple(torch.view_as_real(z * turn).flatten(-2).float() for z in pairs)


theirs = with_gradients(by_complex_numbers)
ours = with_gradients(
    lambda q, k, *angles: tuple(apply_rope(x, *angles, layout="interleaved") for x in (q, k)),
    *RotaryEmbedding(64)(position_ids),
)
errors = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
assert max(errors) < 5e-3
print("q, k and their gradients: the same to 0.005")

# %% [markdown]
# The looser bound is the price of 32-bit angles at positions up to 4,096. Last, the
# **frequencies** of every scaling. What transformers calls "dynamic" is NTK-aware scaling with a
# factor that follows the length of the text; at $s$ times the original length its base is that of
# our "ntk".

# %%
long, original = 8 * 8192, {"original_max_position_embeddings": 8192}
theirs_for = {
    "linear": (long, {"rope_type": "linear", "factor": 8.0}),
    "ntk": (8192, {"rope_type": "dynamic", "factor": 1.0}),
    "yarn": (long, {"rope_type": "yarn", "factor": 8.0} | original),
    "llama3": (
        long,
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | original,
    ),
}
for kind, (longest, rope) in theirs_for.items():
    rope = {"rope_theta": 500_000.0} | rope
    config = LlamaConfig(head_dim=128, max_position_embeddings=longest, rope_parameters=rope)
    theirs = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=long)
    scaling = RopeScaling(kind, factor=8.0, original_context_length=8192)
    ours = scale_rope(rope_frequencies(128, 500_000.0), scaling, base=500_000.0)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert math.isclose(ours[1], theirs[1])
    print(f"{kind:7} 64 frequencies agree to 6 digits; factor of cosine and sine {ours[1]:.3f}")

# %% [markdown]
# ## How fast is it?
#
# We rotate queries and keys, forward and backward, laid out in memory as attention has them,
# against transformers and against `rope_half` as it stood above. One new token with kept keys,
# forward only, is a case of its own. Numbers say how many times as fast as transformers. The folded
# cell has the four ways, `ways_to_rotate`, and `race`, which times them by turns.

# %% tags=["engine"]
# The ways to rotate, and a race between them
import time


def race(ways: dict[str, Callable[..., Any]], q: Tensor, k: Tensor) -> dict[str, float]:
    """The shortest time of each way in seconds; they take turns, so that all share disturbances."""
    repeats, best = 5 if q.requires_grad else 100, dict.fromkeys(ways, math.inf)
    for _ in range(10):
        for name, rotate in ways.items():
            start = time.perf_counter()
            for _ in range(repeats):
                turned = [x.transpose(1, 2).contiguous() for x in rotate(q, k)]
                if q.requires_grad:
                    torch.autograd.grad(turned, (q, k), turned)
            best[name] = min(best[name], (time.perf_counter() - start) / repeats)
    return best


def ways_to_rotate(sequence: int) -> dict[str, Callable[..., Any]]:
    cos, sin = RotaryEmbedding(64)(torch.arange(sequence)[None])
    cos2, sin2 = (torch.cat((z, z), dim=-1) for z in (cos, sin))
    ids = torch.arange(sequence)
    return {
        "transformers": lambda q, k: apply_rotary_pos_emb(q, k, cos2, sin2),
        "rope_half": lambda q, k: (rope_half(q, ids), rope_half(k, ids)),
        "ours, half": lambda q, k: (apply_rope(q, cos, sin), apply_rope(k, cos, sin)),
        "ours, interleaved": lambda q, k: tuple(
            apply_rope(x, cos, sin, layout="interleaved") for x in (q, k)
        ),
    }


# %% [markdown]
# The race, in training and for one new token:

# %% tags=["nbval-ignore-output"]
for name, rows, length in (("training", 8, 256), ("one token", 1, 1)):
    q, k = torch.randn(2, rows, length, 8, 64).transpose(2, 3)  # as attention has them
    if length > 1:
        q.requires_grad_(), k.requires_grad_()
    times = race(ways_to_rotate(length), q, k)
    ratios = ", ".join(f"{way} {times['transformers'] / t:.1f}" for way, t in times.items())
    print(f"{name}: {ratios}")

# %% [markdown]
# In training memory decides: ours passes over it less often, and the interleaved layout, a single
# pass, is far ahead on a CPU. For one token it is the number of calls that counts, and ours are a
# little slower. `torch.compile`, which takes too long for this chapter, makes a single kernel of
# `apply_rope` and another of its gradient, and roughly halves the time once more; but it leaves
# complex numbers, and so the interleaved layout, as they are.
#
# ## Exercises
#
# ````{exercise} The gradient of a table
# :label: ex-positions-gradient
# *Ten minutes.* Write `embedding_gradient(ids, gradient, vocab_size)`, the gradient of an
# embedding table, without a one-hot matrix. `ids` has any shape, `gradient` the same and one
# dimension more. How large would the one-hot matrix be for 8 rows of 2,048 tokens and 128,000
# ids, in 32 bits?
# ````


# %% tags=["solution"]
def embedding_gradient(ids: Tensor, gradient: Tensor, vocab_size: int) -> Tensor:
    """Return the gradient of a table of ``vocab_size`` rows, given that of the rows looked up."""
    # 8 * 2,048 * 128,000 * 4 bytes = 8.4 GB.
    table = torch.zeros(vocab_size, gradient.size(-1), dtype=gradient.dtype)
    return table.index_add(0, ids.flatten(), gradient.flatten(0, -2))


# %% tags=["check"]
for shape in ((5,), (2, 30), (2, 3, 4)):
    ids, embedding = torch.randint(7, shape), nn.Embedding(9, 4)
    gradient = torch.randn(*shape, 4)
    embedding(ids).backward(gradient)
    found = embedding_gradient(ids, gradient, 9)
    assert found.shape == (9, 4), "one row for each id of the vocabulary"
    assert not found[7:].any(), "ids 7 and 8 do not occur: their rows are zero"
    assert torch.allclose(found, embedding.weight.grad, atol=1e-5), "an id that repeats adds up"

# %% [markdown]
# ````{exercise} Shifts as matrices
# :label: ex-positions-shift
# *Fifteen minutes.* Write `shift_matrix(d_model, shift)`: the matrix that turns the sinusoidal
# vector of every position $t$ into that of $t + \Delta$, by {eq}`positions-shift`. What is the
# matrix of $-\Delta$? Why has a learned table no such matrix?
# ````


# %% tags=["solution"]
def shift_matrix(d_model: int, shift: int) -> Tensor:
    """Return M with M p_t = p_(t + shift) for the vectors of SinusoidalEmbedding(d_model)."""
    # M is orthogonal: the matrix of -shift is its transpose. Learned rows are independent: with
    # more positions than dimensions no one matrix maps all of them as wished.
    angles = shift * rope_frequencies(d_model)
    blocks = torch.stack((angles.cos(), angles.sin(), -angles.sin(), angles.cos()), dim=-1)
    return torch.block_diag(*blocks.view(-1, 2, 2))


# %% tags=["check"]
p = SinusoidalEmbedding(16)(torch.arange(100))
for shift in (0, 1, 7, 40):
    M = shift_matrix(16, shift)
    assert M.shape == (16, 16), "a square matrix of size d_model"
    assert torch.allclose(p[: 100 - shift] @ M.T, p[shift:], atol=1e-4), f"wrong for shift {shift}"
assert torch.allclose(shift_matrix(16, -3), shift_matrix(16, 3).T, atol=1e-6), "back is transposed"

# %% [markdown]
# ````{exercise} How large a base?
# :label: ex-positions-base
# *Fifteen minutes.* Write `least_base(d_head, context_length)`: the smallest base with which the
# slowest pair makes at most one turn within the context. How long is the context for which the
# 500,000 of Llama 3 is just enough, with heads of 128? Does that make it a model for such texts?
# ````


# %% tags=["solution"]
def least_base(d_head: int, context_length: int) -> float:
    """Return the base with which the slowest pair's wavelength is ``context_length``."""
    # 2 pi base^((d - 2) / d) = context_length. 500,000 is enough for 2.6 million tokens. But the
    # slow pairs of a model trained on 8,192 tokens have seen a small part of their circle.
    return (context_length / (2 * math.pi)) ** (d_head / (d_head - 2))


# %% tags=["check"]
for d_head, context_length in ((128, 8192), (64, 2048), (128, 2_560_000)):
    base = least_base(d_head, context_length)
    slowest = 2 * math.pi / rope_frequencies(d_head, base)[-1].item()
    assert math.isclose(slowest, context_length, rel_tol=1e-4), f"its wavelength is {slowest:.0f}"

# %% [markdown]
# ````{exercise} Rotate a part
# :label: ex-positions-partial
# *Fifteen minutes.* GPT-NeoX {cite}`black2022neox` rotates only the first quarter of each head
# and leaves the rest, which then compares contents regardless of distance. Write
# `apply_partial_rope(x, cos, sin)`: rotate as many dimensions as there are angles for, in the
# layout "half" *within that part*, and leave the others.
# ````


# %% tags=["solution"]
def apply_partial_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``2 * cos.size(-1)`` dimensions of ``x``."""
    rotated, rest = x.tensor_split([2 * cos.size(-1)], dim=-1)
    return torch.cat((apply_rope(rotated, cos, sin), rest), dim=-1)


# %% tags=["check"]
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary

x, (cos, sin) = torch.randn(2, 3, 10, 32), RotaryEmbedding(8)(torch.arange(10)[None])
found = apply_partial_rope(x, cos, sin)
assert torch.equal(found[..., 8:], x[..., 8:]), "only the first 8 dimensions turn"
expected = neox_rotary(x, x, *(torch.cat((z, z), dim=-1) for z in (cos, sin)))[0]
assert torch.allclose(found, expected, atol=1e-6), "pairs are (0, 4), (1, 5), (2, 6), (3, 7)"

# %% [markdown]
# ````{exercise} ALiBi
# :label: ex-positions-alibi
# *Twenty-five minutes.* Press and colleagues {cite}`press2022alibi` use no vectors at all. They
# subtract from each score the distance times a slope, so that distant tokens count less. Head
# $h = 1, \dots, H$ of $H$, a power of two, has the slope $2^{-8h/H}$. Write the tensors
# `alibi_slopes(n_heads)` and `alibi_bias(n_heads, position_ids)`. The bias, which is added to the
# scores, is of shape (batch, heads, sequence, sequence), $-\text{slope} \cdot (m - n)$ for query
# $m$ and key $n$, and 0 for keys after the query, which a mask will hide. At which distance does
# the bias of the steepest and of the flattest of 8 heads reach $-10$, a weight of about $e^{-10}$?
# ````


# %% tags=["solution"]
def alibi_slopes(n_heads: int) -> Tensor:
    """Return the slope of each head: a geometric sequence that ends at 2^-8."""
    # Steepest: 1/2, distance 20. Flattest: 1/256, distance 2,560.
    return 2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads)


def alibi_bias(n_heads: int, position_ids: Tensor) -> Tensor:
    """Return -slope * distance, of shape (batch, heads, sequence, sequence), 0 for later keys."""
    distance = (position_ids[:, :, None] - position_ids[:, None, :]).clamp(min=0)
    return -alibi_slopes(n_heads)[:, None, None] * distance[:, None]


# %% tags=["check"]
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

assert torch.allclose(alibi_slopes(8), 0.5 ** torch.arange(1, 9)), "1/2, 1/4, ..., 1/256"
mask = torch.ones(12, 12).tril().bool()
for n_heads in (1, 4, 8, 16):
    bias = alibi_bias(n_heads, torch.arange(12).expand(2, 12))
    assert bias.shape == (2, n_heads, 12, 12), "batch, heads, queries, keys"
    assert not bias.masked_select(~mask).any(), "0 for keys after the query"
    theirs = build_alibi_tensor(torch.ones(2, 12), n_heads, torch.float32).view(2, n_heads, 1, 12)
    scores = torch.randn(2, n_heads, 12, 12)
    weights = [(scores + b).masked_fill(~mask, -torch.inf).softmax(-1) for b in (bias, theirs)]
    assert torch.allclose(*weights, atol=1e-5), "the weights are not those of BLOOM"
gap = alibi_bias(2, torch.tensor([[3, 7]]))[0, 0, 1, 0].item()
assert math.isclose(gap, -4 / 16), "distances are those of the position ids, not of the row"

# %% [markdown]
# ## Summary
#
# Ids become vectors by looking up rows, which is a product with one-hot vectors; the gradient
# touches only rows that occur. Attention is permutation equivariant, and a causal mask breaks
# that only partly, so positions must be given. A learned table ends; waves do not, and a shift
# turns their pairs, but added to the token's vector the distance is lost in the matrices of
# attention. The demand that the score depend on the distance only, with maps that are linear,
# leaves powers of one orthogonal matrix, and so, up to a basis, pairs that turn: RoPE. Pairs are
# neighbors or halves, and a permutation of rows leads from one layout to the other. Position ids
# come from outside. Angles are computed in 32 bits. Beyond the training length slow pairs leave
# the angles they know; frequencies are then stretched, the slow ones fully and the fast ones not
# at all.
#
# **Checklist: positions.**
#
# - A new model: RoPE. Base 10,000 for a few thousand tokens; larger, such as 500,000, for long
#   ones.
# - Weights of others: find out the layout before anything else. Wrong pairs raise no error.
# - Pass position ids in packed rows and while generating; test both against one document alone.
# - Compute angles in float32; look at `model.to(torch.bfloat16)` with suspicion.
# - Longer texts without training: YaRN or Llama 3's rule. With training, even a little: the same,
#   and linear interpolation becomes usable. Measure the loss by position, also on short texts.
#
# **Further reading.** Su and colleagues {cite}`su2024roformer` on RoPE; Chen and colleagues
# {cite}`chen2023extending` and Peng and colleagues {cite}`peng2024yarn` on longer contexts; Barbero
# and colleagues {cite}`barbero2025round` on what trained models do with their pairs; Kazemnejad and
# colleagues {cite}`kazemnejad2023impact` on models without positions. Next, chapter 09 takes the
# queries and keys that now know where they stand, and builds attention.
