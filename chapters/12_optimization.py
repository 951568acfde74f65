# %% [markdown]
# # Loss and optimizers
#
# > What training makes small, and how: a cross-entropy that stays finite and never holds all
# > logits, then AdamW and Muon, equal to torch's step by step, with schedules and clipping.
#
# The model of {doc}`11_model` has every matrix it needs, and says nothing but noise. Nobody
# can choose some millions of numbers, so we let them be moved, a little at a
# time, in a direction that makes the training text less surprising. Two questions decide whether
# this works. *What* is made small: the formula fits on one line, and yet it overflows, takes more
# memory than the model, and counts padding as language unless one takes care. *How* it is made
# small: the plain gradient is a poor direction, and each optimizer is an answer to why.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.optimization.cross_entropy`, {py:func}`~llmbook.optimization.chunked_cross_entropy`, {py:class}`~llmbook.optimization.AdamW`, {py:class}`~llmbook.optimization.Muon`, {py:func}`~llmbook.optimization.parameter_groups`, {py:func}`~llmbook.optimization.build_optimizer`, {py:func}`~llmbook.optimization.cosine_schedule`, {py:func}`~llmbook.optimization.wsd_schedule`, {py:func}`~llmbook.optimization.clip_gradients` |
# | **You need** | the model ({doc}`11_model`), entropy ({doc}`01_tinyworld`), the chain rule of derivatives, singular values |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 45 seconds to run |

# %% tags=["remove-cell"]
#| default_exp optimization

# %% tags=["engine"]
#| export
# More imports: types, argument checks, and what engine rooms need
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from jaxtyping import Bool, Float, Int64
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from llmbook.attention import Backend
from llmbook.blocks import lookup_tables
from llmbook.environment import check_choice, check_fraction, check_whole

# %% [markdown]
# We need PyTorch and two modules of the standard library:

# %%
#| export
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# %% [markdown]
# For examples and plots only, there are the model and the tiny world of earlier chapters:

# %%
import re
import time
from functools import partial

import matplotlib.pyplot as plt

from llmbook.model import ModelConfig, TransformerLM
from llmbook.tinyworld import TinyWorld

plt.style.use("llmbook.book")
torch.set_num_threads(1)

# %% [markdown]
# ## From likelihood to cross-entropy
#
# The principle is {term}`maximum likelihood`: of all parameters $\theta$, take those under which
# the text that was in fact written is most probable. By the chain rule its probability is a
# product over $n$ tokens. The logarithm is increasing, so it moves no maximum, and turns the
# product into a sum; the sign and the $1/n$ make of it a mean that is to be small:
#
# $$
# \arg\max_\theta \prod_{t=1}^{n} q_\theta(x_t \mid x_{<t})
# = \arg\min_\theta \; -\frac1n \sum_{t=1}^{n} \log q_\theta(x_t \mid x_{<t}) .
# $$ (optimization-likelihood)
#
# That mean is the {term}`loss` $L$. What does it tend to? Where contexts repeat, group the sum by
# context $h$. A fraction $\hat p(h)$ of all places has it, and after it token $w$ follows with
# relative frequency $\hat p(w \mid h)$:
#
# $$
# L = -\sum_h \hat p(h) \sum_w \hat p(w \mid h) \log q_\theta(w \mid h)
# = \mathbb{E}_{h}\bigl[ H(\hat p) + D_\mathrm{KL}(\hat p \,\Vert\, q_\theta) \bigr] ,
# $$
#
# where both terms are those of the next token after $h$. So the most likely parameters are those
# that minimize a {term}`cross-entropy`, and it is least where the model equals the frequencies.
# The network writes $q_\theta$ as a {term}`softmax` of its {term}`logits` $z$. With $y$ the token
# that came, the loss at one place is
#
# $$
# \ell = -\log \frac{e^{z_y}}{\sum_w e^{z_w}} = \log Z - z_y , \qquad
# Z = \sum_w e^{z_w} .
# $$ (optimization-loss)
#
# ## The gradient is p minus y
#
# How should the logits change? Differentiate {eq}`optimization-loss` by $z_i$. The second term
# gives $-1$ for $i = y$ and nothing for the others. The first gives
#
# $$
# \frac{\partial \log Z}{\partial z_i} = \frac1Z \frac{\partial Z}{\partial z_i}
# = \frac{e^{z_i}}{Z} = p_i , \qquad \text{so} \qquad
# \frac{\partial \ell}{\partial z_i} = p_i - \mathbb{1}[i = y] .
# $$ (optimization-gradient)
#
# Here $p_i$ is short for $q_\theta(i \mid h)$, and with $y$ written as a vector, 1 for the token
# that came and 0 elsewhere, the gradient is $p - y$: probability minus truth. The right logit is
# pushed up by as much as the model was unsure of it, each wrong one down by as much as it was
# believed, and a token with $p_y = 1$ teaches nothing. We check it by hand and by autograd:

# %%
z = torch.tensor([2.0, 1.0, -1.0, 0.5], requires_grad=True)
y = 1
loss = z.exp().sum().log() - z[y]
loss.backward()
p = z.detach().exp() / z.detach().exp().sum()
by_hand = p - torch.eye(4)[y]
print("p - y:   ", [round(g, 3) for g in by_hand.tolist()])
print("autograd:", [round(g, 3) for g in z.grad.tolist()])
print(f"sum:      {abs(by_hand.sum().item()):.3f}")

# %% [markdown]
# The last line has a consequence that we will meet again: the loss cannot tell logits from the
# same logits plus a constant.
#
# ## Logarithms that stay finite
#
# Equation {eq}`optimization-loss` as it stands breaks early. A format overflows where $e^z$
# exceeds its largest number:

# %%
print("format    overflows from   8 + 0.01   spacing at 8")
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    limits = torch.finfo(dtype)
    last = math.floor(math.log(limits.max))
    naive = torch.tensor([last + 1.0]).to(dtype).exp().sum().log()
    assert naive.isinf() and torch.tensor([float(last)]).to(dtype).exp().isfinite()
    rounded = (torch.tensor(8.0, dtype=dtype) + 0.01).item()
    name = str(dtype).removeprefix("torch.")
    print(f"{name:9} {last + 1:14} {rounded:10.2f}   {8 * limits.eps:.6f}")

# %% [markdown]
# Logits of 12 are common, so float16 fails at once; bfloat16 has the range of float32 but so few
# digits that a loss near 8 moves in steps of 1/16. Hence two rules. The log-sum-exp is computed
# in *32 bits* whatever the logits are. And the largest logit $m$ comes out first:
#
# $$
# \log \sum_w e^{z_w} = \log \Bigl( e^{m} \sum_w e^{z_w - m} \Bigr)
# = m + \log \sum_w e^{z_w - m} , \qquad m = \max_w z_w .
# $$ (optimization-lse)
#
# Now the largest exponential is 1, and the logarithm is taken of a number between 1 and $V$.


# %% tags=["engine"]
#| export
# What no tensor of logits, hidden states or weights can be
def _check_floating(name: str, value: Any, least_ndim: int) -> None:
    """Demand a tensor of floating-point numbers with so many dimensions, the last not empty."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a tensor of floating-point numbers, got {got}")
    if value.ndim < least_ndim or value.size(-1) == 0:
        dimensions = f"{least_ndim} or more dimensions" if least_ndim > 1 else "a dimension"
        expected = f"{dimensions}, the last of at least 1"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(value.shape)}")


# %% [markdown]
# The code first refuses what cannot be logits (the check is in the folded cell above).


# %%
#| export
def log_sum_exp(logits: Float[Tensor, "*batch vocab_size"]) -> Float[Tensor, "*batch"]:
    """Return log(sum(exp(logits))) over the last dimension; finite wherever the logits are.

    Computed in float32 or wider, whatever the dtype of ``logits``.

    >>> round(log_sum_exp(torch.tensor([1000.0, 1000.0])).item(), 2)
    1000.69
    """
    _check_floating("logits", logits, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    peak = wide.detach().amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak.isinf(), 0.0)  # of nothing but -inf the answer is -inf, not NaN
    return (wide - peak).exp().sum(dim=-1).log() + peak.squeeze(-1)


# %% [markdown]
# Logits of a thousand, with both:

# %%
large = torch.tensor([1000.0, 999.0])
print("naive: ", large.exp().sum().log().item())
print(f"stable: {log_sum_exp(large):.3f}")

# %% [markdown]
# ## What counts
#
# Rows of unequal length are padded, and chapter 19 will learn from answers but not from
# questions. Such targets are marked by `ignore_index`, $-100$, and enter neither the sum nor the
# count. The mean is over what counts, $\sum_t k_t \ell_t / \sum_t k_t$ with $k_t$ 0 or 1. If
# nothing counts it is $0/0$, and shall be NaN: a batch without targets is a mistake somewhere,
# and a loss of zero would hide it.
#
# ### Logits kept in bounds
#
# Two devices keep logits in bounds. The loss ignores a common shift, so nothing holds $\log Z$
# where 16-bit numbers are accurate. PaLM adds a **z-loss**, $\zeta \log^2 Z$ with $\zeta =
# 10^{-4}$ {cite}`chowdhery2023palm`. As $\partial \log Z / \partial z_i = p_i$,
#
# $$
# \frac{\partial}{\partial z_i} \bigl( \ell + \zeta \log^2 Z \bigr)
# = p_i - \mathbb{1}[i = y] + 2 \zeta \log Z \, p_i
# = (1 + 2 \zeta \log Z)\, p_i - \mathbb{1}[i = y] .
# $$ (optimization-zloss)
#
# Gemma 2 instead **caps** each logit softly, $c \tanh(z / c)$ with $c = 30$
# {cite}`gemma2024gemma2`. Its slope is $1 - \tanh^2(z / c)$, so small logits pass nearly unchanged.
# (The cap is one line, in the room below.)
#
# {numref}`fig-optimization-bounds` shows both at work. There $\zeta$ is 500 times as large, so that
# 400 steps show it.


# %% mystnb={"figure": {"caption": "Two ways to bound logits. Left, the soft cap is the identity for small logits and never exceeds 30. Right, logits begin with a common shift of 20. Gradient descent on the loss of one token never removes it, as p - y sums to zero; with a z-loss it goes.", "name": "fig-optimization-bounds"}, "image": {"alt": "Left, soft-capped logits from minus 100 to 100: along the dotted diagonal near zero, flat at plus and minus 30. Right, log Z over 400 steps from 22: without z-loss it rises to about 27, with a z-loss of 0.05 it falls to 2."}}
def log_z_over_time(zeta: float) -> list[float]:
    z, history = torch.linspace(19.0, 21.0, 8), []
    for _ in range(400):
        p = z.softmax(dim=0)
        log_z = log_sum_exp(z)
        z = z - 0.5 * ((1 + 2 * zeta * log_z) * p - torch.eye(8)[3])
        history.append(log_z.item())
    return history


figure, axes = plt.subplots(1, 2)
raw = torch.linspace(-100, 100, 200)
axes[0].plot(raw, 30 * torch.tanh(raw / 30))
axes[0].plot(raw, raw, ":", color="gray")
axes[0].set(title="Soft cap at 30", xlabel="logit", ylabel="capped", ylim=(-45, 45))
for zeta in (0.0, 0.05):
    axes[1].plot(log_z_over_time(zeta), label=f"z-loss times {zeta:g}")
axes[1].set(title="log Z while one token is learned", xlabel="step", ylim=(-1, 32))
axes[1].legend()
plt.show()

# %% [markdown]
# ### The equations as code
#
# The equations become two functions. The losses are those of every place, whether it counts or not:


# %%
#| export
def _losses(
    logits: Float[Tensor, "*batch vocab_size"], targets: Int64[Tensor, "*batch"], z_loss: float
) -> Float[Tensor, "*batch"]:
    """The equations of chapter 12, term by term."""
    log_z = log_sum_exp(logits)
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    return log_z - chosen + z_loss * log_z**2


def _mean(total: Float[Tensor, ""], counts: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    """Divide by how many count; over nothing NaN, though with gradients of zero, as in torch."""
    count = counts.sum()
    return (total / count.clamp(min=1)).masked_fill(count == 0, torch.nan)


# %% [markdown]
# A target that does not count is replaced by id 0, so that there is something to look up, and its
# loss by 0. Some targets are ignored here, and then all of them:

# %%
torch.manual_seed(0)
logits, targets = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
targets[1, 2:] = -100
peer = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
counts = targets != -100
losses = _losses(logits, targets.masked_fill(~counts, 0), z_loss=0.0).masked_fill(~counts, 0.0)
ours = _mean(losses.sum(), counts)
assert (ours - peer).abs() < 1e-5
print(f"mean over the {counts.sum()} targets that count: {ours:.3f}, by torch: {peer:.3f}")
print(f"mean over nothing: {_mean(0 * losses.sum(), torch.zeros_like(counts)):.3f}")

# %% [markdown]
# {py:func}`~llmbook.optimization.cross_entropy` joins these: it caps the logits if asked, replaces
# ignored targets, takes the mean, the sum or neither, and refuses wrong input.

# %% [markdown] tags=["engine"]
# ### Engine room: cross_entropy refuses wrong input, caps logits, and can use torch's kernels

# %% [markdown] tags=["engine"]
# A target too few or too many might broadcast to a loss that looks right, and an id of 50,257 where
# the last is 50,256 would be found by a kernel that does not name it. So both are refused first.

# %% tags=["engine"]
#| export
Reduction = Literal["mean", "sum", "none"]


def _is_number(value: Any) -> bool:
    """Whether it is a real number: one of NumPy's, too, or a tensor of one, as rates may be."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_amount(name: str, value: Any, *, positive: bool = False) -> None:
    """Refuse what is negative, infinite or not a number, and zero if it must be ``positive``."""
    if not _is_number(value) or not (0 < value < math.inf or (value == 0 and not positive)):
        expected = "a finite number above 0" if positive else "a finite number of at least 0"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


# %% [markdown] tags=["engine"]
# The same for the arguments of a loss:


# %% tags=["engine"]
#| export
def _check_loss(
    places: Tensor, targets: Any, vocab_size: int, ignore_index: Any, **options: Any
) -> None:
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets: expected a tensor of torch.int64, got {got}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index: expected a whole number, got {ignore_index!r}")
    if targets.shape != places.shape[:-1]:  # some wrong shapes would broadcast
        expected = f"a shape of {tuple(places.shape[:-1])}"
        raise ValueError(f"targets: expected {expected}, got {tuple(targets.shape)}")
    _check_amount("z_loss", options["z_loss"])
    if options["soft_cap"] is not None:
        _check_amount("soft_cap", options["soft_cap"], positive=True)
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return  # to look at values would make the processor wait for the accelerator
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
    if len(wrong):
        expected = f"ids from 0 to {vocab_size - 1}, or {ignore_index}"
        raise ValueError(f"targets: expected {expected}, got {wrong[0]}")


# %% [markdown] tags=["engine"]
# The cap, and the same losses by torch's own functions, which are faster:


# %% tags=["engine"]
#| export
def _capped(
    logits: Float[Tensor, "*batch vocab_size"], soft_cap: float | None
) -> Float[Tensor, "*batch vocab_size"]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if soft_cap is None else soft_cap * torch.tanh(wide / soft_cap)


def _fused_losses(
    logits: Float[Tensor, "*batch vocab_size"], targets: Int64[Tensor, "*batch"], z_loss: float
) -> Float[Tensor, "*batch"]:
    """The same by torch's own functions."""
    flat = logits.reshape(-1, logits.size(-1))
    losses = F.cross_entropy(flat, targets.reshape(-1), reduction="none").view(targets.shape)
    return losses + z_loss * logits.logsumexp(dim=-1) ** 2 if z_loss else losses


# %% [markdown] tags=["engine"]
# {py:func}`~llmbook.optimization.cross_entropy` joins them.


# %% tags=["engine"]
#| export
def cross_entropy(
    logits: Float[Tensor, "*batch vocab_size"],
    targets: Int64[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    backend: Backend = "torch",
) -> Float[Tensor, "*shape"]:
    """Return the loss of predicting ``targets``, in nats, in float32 or wider.

    Targets of ``ignore_index`` do not count; the mean over none is NaN. ``soft_cap`` bounds logits
    to cap tanh(logits / cap) (Gemma 2). ``z_loss`` times the square of their log-sum-exp is added
    for each target (PaLM, section 5). Targets out of range raise a ``ValueError``; on an
    accelerator, where a look would wait for the device, its kernel stops the program.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_choice("backend", backend, ("reference", "torch"))
    _check_floating("logits", logits, 1)
    vocab_size = logits.size(-1)
    _check_loss(logits, targets, vocab_size, ignore_index, z_loss=z_loss, soft_cap=soft_cap)
    counts = targets != ignore_index
    losses_of = _losses if backend == "reference" else _fused_losses
    losses = losses_of(_capped(logits, soft_cap), targets.masked_fill(~counts, 0), z_loss)
    losses = losses.masked_fill(~counts, 0.0)
    if reduction == "none":
        return losses
    return _mean(losses.sum(), counts) if reduction == "mean" else losses.sum()


# %% [markdown]
# ## The loss that never holds all logits
#
# Logits are the largest tensor of a training step. Llama 3 has 128,256 of them for each token: at
# 8,192 tokens that is 4.2 GB in 32 bits, and autograd keeps the softmax and makes a gradient of the
# same size. Yet the loss is a sum over tokens, and each token's logits can be thrown away when its
# gradient is known. By {eq}`optimization-gradient` it is known at once. With the rows $h$ of hidden
# states (from here on $h$ is no longer a context), $z = h W^\top$ and $g = \partial \ell / \partial
# z$, the chain rule gives
#
# $$
# \frac{\partial \ell}{\partial h} = g W , \qquad
# \frac{\partial \ell}{\partial W} = g^\top h ,
# $$
#
# which need nothing but what lies before us ({numref}`fig-optimization-chunks`). So the forward
# pass already makes both gradients, chunk by chunk, and the backward pass only multiplies them by
# the derivative of whatever comes after the loss. Wijmans and colleagues go further and never
# write even a chunk of logits to memory {cite}`wijmans2025cut`.
#
# ```{figure} ../figures/optimization-chunks.svg
# :name: fig-optimization-chunks
# :alt: Hidden states of eight tokens are cut into chunks of two rows. The second chunk times the transposed head gives two rows of logits, which become in place the probabilities and then p minus y. From these come the loss of the chunk, its rows of the gradient of hidden, and a term that is added to the gradient of the head. The buffer of logits is freed, and made anew for the next chunk.
#
# One chunk at a time: logits become probabilities, and these the gradient, in one buffer.
# ```
#
# As a loop, it takes a dozen lines:


# %%
def loss_and_gradients(h: Tensor, W: Tensor, targets: Tensor, chunk_size: int) -> list[Tensor]:
    """The mean loss and its gradients for hidden states and head, a chunk of logits at a time."""
    total, d_h, d_W = torch.zeros(()), torch.zeros_like(h), torch.zeros_like(W)
    for at in range(0, len(h), chunk_size):
        rows = slice(at, at + chunk_size)
        logits = h[rows] @ W.T
        y = F.one_hot(targets[rows], len(W))
        total += (log_sum_exp(logits) - (logits * y).sum(dim=1)).sum()
        g = logits.softmax(dim=1) - y  # p - y
        d_h[rows] = g @ W
        d_W += g.T @ h[rows]
        del logits, y, g  # before the next chunk is made
    return [x / len(h) for x in (total, d_h, d_W)]


torch.manual_seed(0)
hidden = torch.randn(4096, 64, requires_grad=True)
head = torch.nn.Parameter(torch.randn(2048, 64) / 8)
targets = torch.randint(2048, (4096,))

# %% [markdown]
# Autograd, which keeps all logits, must find the same:

# %%
loss = F.cross_entropy(hidden @ head.T, targets)
expected = [loss.detach(), *torch.autograd.grad(loss, (hidden, head))]
found = loss_and_gradients(hidden.detach(), head.detach(), targets, chunk_size=512)
errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
assert max(errors) < 1e-5
print(f"loss: {found[0]:.3f}, by autograd {expected[0]:.3f}; relative errors of all: below 1e-5")

# %% [markdown]
# The exported {py:func}`~llmbook.optimization.chunked_cross_entropy` does the same as a function
# that autograd knows: the forward pass makes both gradients, the backward pass multiplies them by
# what comes in.

# %% [markdown] tags=["engine"]
# ### Engine room: the loop as a function of autograd, in place, in 16 bits, with caps and z-loss

# %% [markdown] tags=["engine"]
# A chunk of logits is overwritten by its own gradient: exponentials, then $p$, then $p - y$. A soft
# cap multiplies that by its slope.


# %% tags=["engine"]
#| export
def _capped_in_place(logits: Tensor, soft_cap: float | None) -> Tensor | None:
    """Bound ``logits``, and return the derivative of doing so, if there is a bound."""
    if soft_cap is None:
        return None
    logits.div_(soft_cap).tanh_()
    slope = 1 - logits**2
    logits.mul_(soft_cap)
    return slope


def _chunk(
    logits: Float[Tensor, "rows vocab_size"],
    targets: Int64[Tensor, "rows 1"],
    counts: Bool[Tensor, "rows 1"],
    z_loss: float,
    soft_cap: float | None,
) -> Float[Tensor, ""]:
    """Return the summed loss of some rows, and turn ``logits`` into its gradient, in place."""
    slope = _capped_in_place(logits, soft_cap)
    chosen = logits.gather(1, targets)
    peak = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(peak).exp_().sum(dim=1, keepdim=True)
    log_z = total.log() + peak
    losses = log_z - chosen + z_loss * log_z**2
    # The gradient of a row is (1 + 2 z log Z) p - y, or nothing where the target does not count.
    logits.mul_(((1 + 2 * z_loss * log_z) / total).masked_fill_(~counts, 0.0))
    logits.scatter_add_(1, targets, -counts.to(logits.dtype))
    if slope is not None:
        logits.mul_(slope)
    return losses.masked_fill_(~counts, 0.0).sum()


# %% [markdown] tags=["engine"]
# Types come first. A head's gradient sums over all chunks, and 16-bit sums lose small terms, so it
# is kept in 32 bits, as the second function below shows.


# %% tags=["engine"]
#| export
def _as_autocast_would(device: str, *tensors: Tensor) -> list[Tensor]:
    """Convert as autocast does for products; inside a Function it would keep what it must not."""
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    narrow = torch.get_autocast_dtype(device)
    return [tensor.to(narrow) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


# %% [markdown] tags=["engine"]
# A head has a row for each token, as wide and of the same type as the hidden states.


# %% tags=["engine"]
#| export
def _check_head(weight: Tensor, hidden: Tensor) -> None:
    _check_floating("weight", weight, 2)
    shape, d_model = tuple(weight.shape), hidden.size(-1)
    if len(shape) != 2 or shape[1] != d_model:
        raise ValueError(f"weight: expected a shape of (vocab_size, {d_model}), got {shape}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight: expected {hidden.dtype} as hidden has, got {weight.dtype}")


# %% [markdown] tags=["engine"]
# And the two products:


# %% tags=["engine"]
#| export
def _add_gradients(
    d_logits: Float[Tensor, "rows vocab_size"],
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    rows: slice,
    d_hidden: Float[Tensor, "tokens d_model"] | None,
    d_weight: Float[Tensor, "vocab_size d_model"] | None,
) -> None:
    narrow = d_logits.to(hidden.dtype)
    if d_hidden is not None:
        torch.mm(narrow, weight, out=d_hidden[rows])
    if d_weight is None:
        return
    if d_weight.dtype == narrow.dtype:
        d_weight.addmm_(narrow.T, hidden[rows])
    else:  # a sum over many chunks, so it is kept in 32 bits
        d_weight.add_(narrow.T @ hidden[rows])


# %% [markdown] tags=["engine"]
# The loop around them is a function with a derivative of its own, as tiled attention was in
# {doc}`09_attention`. If the head is frozen, or nothing needs a gradient, that part is not made.


# %% tags=["engine"]
#| export
class _ChunkedLoss(torch.autograd.Function):
    """The summed loss; both gradients are made on the way, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens d_model"],
        weight: Float[Tensor, "vocab_size d_model"],
        targets: Int64[Tensor, "tokens 1"],
        counts: Bool[Tensor, "tokens 1"],
        options: tuple[int, float, float | None],
    ) -> Float[Tensor, ""]:
        chunk_size, z_loss, soft_cap = options
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for at in range(0, len(hidden), chunk_size):
            rows = slice(at, at + chunk_size)
            logits = (hidden[rows] @ weight.T).to(wide)
            total += _chunk(logits, targets[rows], counts[rows], z_loss, soft_cap)
            _add_gradients(logits, hidden, weight, rows, d_hidden, d_weight)
            del logits  # before the next chunk is made
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scaled = [None if d is None else d * d_total for d in (d_hidden, d_weight)]
        return (*scaled, None, None, None)


# %% [markdown] tags=["engine"]
# Around that go the same arguments as before. The mean divides outside, where autograd knows how:


# %% tags=["engine"]
#| export
def chunked_cross_entropy(
    hidden: Float[Tensor, "*batch d_model"],
    weight: Float[Tensor, "vocab_size d_model"],
    targets: Int64[Tensor, "*batch"],
    *,
    chunk_size: int = 512,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> Float[Tensor, ""]:
    """Return ``cross_entropy(hidden @ weight.T, targets)`` without ever holding all logits.

    There are never more than ``chunk_size`` rows of them. Gradients for ``hidden`` and ``weight``
    are made in the forward pass, so logits are computed once; there is no second derivative.
    Under autocast the products are in its dtype, the softmax in float32 all the same.
    """
    check_whole("chunk_size", chunk_size, 1)
    check_choice("reduction", reduction, ("mean", "sum"))
    _check_floating("hidden", hidden, 1)
    device = hidden.device.type
    hidden, weight = _as_autocast_would(device, hidden, weight)
    _check_head(weight, hidden)
    _check_loss(hidden, targets, len(weight), ignore_index, z_loss=z_loss, soft_cap=soft_cap)
    column = targets.reshape(-1, 1)
    counts = column != ignore_index
    column = column.masked_fill(~counts, 0)
    options = (chunk_size, z_loss, soft_cap)
    with torch.autocast(device, enabled=False):
        rows = hidden.reshape(-1, hidden.size(-1))
        total = _ChunkedLoss.apply(rows, weight, column, counts, options)
    return _mean(total, counts) if reduction == "mean" else total


# %% [markdown]
# ### What it saves
#
# We count the bytes of every tensor from its making to its end. This sees what torch allocates, is
# the same on every machine, and needs no watching of the process. `LiveBytes`, in the folded cell,
# is a context manager that adds up what is alive and keeps the `peak`.

# %% tags=["engine"]
# A context manager that counts the bytes of all living tensors, for this chapter only
import weakref

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self.known:  # no view of something known
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, n_bytes: int) -> None:
        self.live += n_bytes
        self.peak = max(self.peak, self.live)


# %% [markdown]
# The largest sum during loss and gradients, for 4,096 tokens and a vocabulary of 2,048:


# %%
def peak_and_gradients(loss_of: Callable[[], Tensor]) -> tuple[int, tuple[Tensor, ...]]:
    with LiveBytes() as memory:
        gradients = torch.autograd.grad(loss_of(), (hidden, head))
    return memory.peak, gradients


print(f"logits alone    {hidden.size(0) * head.size(0) * 4 / 2**20:5.1f} MiB")
whole, expected = peak_and_gradients(lambda: cross_entropy(hidden @ head.T, targets))
print(f"all at once     {whole / 2**20:5.1f} MiB")
for size in (1024, 512, 128):
    loss_of = partial(chunked_cross_entropy, hidden, head, targets, chunk_size=size)
    peak, found = peak_and_gradients(loss_of)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))
    print(f"chunks of {size:4}  {peak / 2**20:5.1f} MiB")

# %% [markdown]
# Three times the logits, against one chunk of them and a few megabytes for hidden states, head and
# gradients. Below, it turns out to be the faster way as well, as a chunk is small enough to stay in
# the processor's cache.
#
# ## Downhill
#
# Now the second question. The gradient $g = \nabla L(\theta)$ is the direction of steepest
# ascent, so step against it {cite}`robbins1951stochastic`:
#
# $$
# \theta_t = \theta_{t-1} - \eta\, g_t .
# $$ (optimization-sgd)
#
# On a batch, $g_t$ is a random vector whose mean is the full gradient: *stochastic* gradient
# descent, SGD. How large may the **learning rate** $\eta$ be? Near a minimum the loss is a bowl.
# Along an axis with curvature $\kappa$ it is $\frac12 \kappa \theta^2$ and $g = \kappa \theta$,
# so a step multiplies $\theta$ by $1 - \eta \kappa$. That shrinks only if $\eta < 2 / \kappa$.
# The *steepest* axis sets the rate; the *flattest* then shrinks by $1 - \eta \kappa_{\min}$,
# hardly at all if the curvatures differ by a factor of a thousand.
#
# **Momentum** {cite}`polyak1964some` lets past gradients add up in a velocity,
#
# $$
# v_t = \mu v_{t-1} + g_t = \sum_{i=1}^{t} \mu^{t-i} g_i , \qquad
# \theta_t = \theta_{t-1} - \eta\, v_t .
# $$ (optimization-momentum)
#
# Along a flat axis gradients agree and sum up to $g / (1 - \mu)$, ten times as far for $\mu =
# 0.9$. Across a ravine they alternate and cancel. Nesterov's variant steps by $g_t + \mu v_t$, as
# if the velocity had already been updated once more. We watch three paths on $L = \frac12
# (\theta_1^2 + 100\, \theta_2^2)$, the third being Adam, which the next section derives:


# %% mystnb={"figure": {"caption": "Forty steps in a ravine a hundred times as steep across as along. Gradient descent zigzags and crawls; momentum swings and arrives; Adam goes along both axes at the same pace.", "name": "fig-optimization-ravine"}, "image": {"alt": "Three plots of the same elliptic contours with a path from the upper left toward the minimum in the middle. SGD jumps from side to side and after forty steps is only half-way. Momentum swings across a few times and ends in the minimum. Adam sets out diagonally, swings gently and ends near the minimum."}}
def path_of(optimizer_of: Callable[[list], torch.optim.Optimizer]) -> Tensor:
    place = torch.nn.Parameter(torch.tensor([-4.0, 0.5]))
    optimizer, places = optimizer_of([place]), [place.detach().clone()]
    for _ in range(40):
        optimizer.zero_grad()
        (0.5 * (place[0] ** 2 + 100 * place[1] ** 2)).backward()
        optimizer.step()
        places.append(place.detach().clone())
    return torch.stack(places)


figure, axes = plt.subplots(1, 3, sharey=True, figsize=(9, 2.8))
grid = torch.meshgrid(torch.linspace(-5, 2, 80), torch.linspace(-0.9, 0.9, 80), indexing="xy")
walks = {
    "SGD": path_of(lambda p: torch.optim.SGD(p, lr=0.019)),
    "momentum": path_of(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.75)),
    "Adam": path_of(lambda p: torch.optim.Adam(p, lr=0.35, betas=(0.8, 0.95))),
}
for ax, (name, path) in zip(axes, walks.items(), strict=True):
    ax.contour(*grid, 0.5 * (grid[0] ** 2 + 100 * grid[1] ** 2), levels=10, colors="#CCCCCC")
    ax.plot(*path.T, "o-", markersize=3)
    ax.set(title=name, xlabel=r"$\theta_1$")
axes[0].set_ylabel(r"$\theta_2$")
plt.show()
left = {name: path[-1].abs().max().item() for name, path in walks.items()}
assert left["SGD"] > 1.5 > 0.4 > max(left["momentum"], left["Adam"]), left

# %% [markdown]
# The step in code, with Nesterov's variant and the classical decay of weights, which is added to
# the gradient as in `torch.optim.SGD`:


# %%
#| export
def _sgd_step(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor] | None,
) -> None:
    """Step every parameter by its gradient, or by its velocity if there is momentum."""
    momentum = group["momentum"]
    for number, (p, g) in enumerate(zip(parameters, grads, strict=True)):
        update = g + group["weight_decay"] * p
        if velocities is not None:
            v = velocities[number].mul_(momentum).add_(update)
            update = update + momentum * v if group["nesterov"] else v
        p.sub_(group["lr"] * update)


# %% [markdown]
# Two steps down a slope of 1 with $\eta = 0.1$ and $\mu = 0.9$: the second goes 1.9 times as far.

# %%
place, velocity = torch.zeros(1), torch.zeros(1)
settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
for step in (1, 2):
    _sgd_step(settings, [place], [torch.ones(1)], [velocity])
    print(f"after step {step}: {place.item():.2f}, velocity {velocity.item():.1f}")

# %% [markdown]
# The exported {py:class}`~llmbook.optimization.SGD` takes this step with `backend="reference"`; by
# default it hands the same arithmetic to torch's own function.

# %% [markdown] tags=["engine"]
# ### Engine room: a class with torch's interface around each step, and SGD as the first of them

# %% [markdown] tags=["engine"]
# Our optimizers inherit from torch's base class, which keeps groups of parameters and their state,
# so that schedulers and checkpoints work with them. A step is the same for all but for one method,
# `_update`. Parameters without a gradient are left alone. What is no list of parameters, or one
# without any, is refused at once; an iterator that was read before looks like that.


# %% tags=["engine"]
#| export
def _listed(name: str, given: Any) -> list[Any]:
    """Return what was given as a list of at least one thing."""
    if isinstance(given, nn.Module):
        got = f"{type(given).__name__}; say model.parameters()"
        raise ValueError(f"{name}: expected tensors, got a {got}")
    if isinstance(given, Tensor | str | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"{name}: expected an iterable of tensors, got {type(given).__name__}")
    listed = list(given)
    if not listed:
        reason = " (an iterator can be read only once)" if isinstance(given, Iterator) else ""
        raise ValueError(f"{name}: expected at least one parameter, got none{reason}")
    return listed


# %% [markdown] tags=["engine"]
# The step over all groups, with what torch calls a closure:


# %% tags=["engine"]
#| export
def _called(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    if not callable(closure):
        raise ValueError(f"closure: expected a function or None, got {closure!r:.60}")
    with torch.enable_grad():
        return closure()


class _Stepper(torch.optim.Optimizer):
    """What our optimizers share: a step goes over the groups and calls ``_update`` for each."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]):
        super().__init__(_listed("params", params), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change all parameters that have a gradient; return what ``closure`` gave, if given."""
        loss = _called(closure)
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(group, parameters, [p.grad for p in parameters])
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError

    def _buffers(self, parameters: list[Tensor], name: str) -> list[Tensor]:
        """Return what is kept for each parameter under ``name``, zeros at first."""
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if state.get(name) is None:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [state[name] for state in states]


# %% [markdown] tags=["engine"]
# We add what torch's base class lacks. A learning rate of NaN is refused, as are settings in a
# foreign state dict that we would silently ignore, and a group whose iterator was read before, so
# that nothing of it would be trained. And a copy, or what comes out of a pickle, has
# the settings that are not in any group, too: torch's class would forget them.


# %% tags=["engine"]
#| export
class _Stepper(_Stepper):  # continued
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its settings, or the optimizer's defaults, are checked."""
        _check_group(param_group)
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, this class's or that of the class of the same name in torch."""
        if not isinstance(state_dict, Mapping) or "param_groups" not in state_dict:
            got = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict)
            raise ValueError(f"state_dict: expected one of an optimizer, got {got}")
        for group in state_dict["param_groups"]:
            self._check({**self.defaults, **group})
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:  # torch keeps it elsewhere, unless it is fused
                step = torch.as_tensor(state["step"], dtype=torch.float32)
                state["step"] = step.to(_device_of_step(parameter))

    def _check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {n: v for n, v in vars(self).items() if n in ("backend", "ns_dtype")}
        return super().__getstate__() | own


# %% [markdown] tags=["engine"]
# A group is checked before anything is taken from it. Kernels want the number of steps on the
# device of the parameter; but a device without numbers, "meta", could not count.


# %% tags=["engine"]
#| export
def _check_group(group: Any) -> None:
    if not isinstance(group, dict) or "params" not in group:
        got = sorted(group) if isinstance(group, dict) else type(group).__name__
        raise ValueError(f"param_group: expected a dict with params, got {got}")
    if "learning_rate" in group:
        raise ValueError("learning_rate: is called lr here, as in torch's optimizers")
    if isinstance(group["params"], Iterator):  # to be read twice
        group["params"] = _listed("params", group["params"])
    if isinstance(group["params"], Tensor):
        return
    for entry in group["params"]:
        tensor = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if not isinstance(tensor, Tensor):
            raise ValueError(f"params: expected tensors, got one of type {type(tensor).__name__}")


def _device_of_step(parameter: Tensor) -> torch.device:
    return torch.device("cpu") if parameter.is_meta else parameter.device


# %% [markdown] tags=["engine"]
# Whoever comes from another library, or from the next chapter's configuration, may call the rate
# `learning_rate`. The answer names the right word:


# %% tags=["engine"]
#| export
class _Stepper(_Stepper):  # continued
    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Refuse the other name of ``lr``, before Python says only that it is unexpected."""
        if "learning_rate" in options:
            raise TypeError("learning_rate: is called lr here, as in torch's optimizers")
        return super().__new__(cls)


# %% [markdown] tags=["engine"]
# A state dict may also hold what torch's optimizers have and ours do not.


# %% tags=["engine"]
#| export
def _check_share(name: str, value: Any) -> None:
    """Demand a number of at least 0 and less than 1, which may be in a tensor."""
    check_fraction(name, float(value) if _is_number(value) else value)


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def _refuse(group: dict[str, Any], **expected: Any) -> None:
    """Refuse what torch's optimizers have and ours do not; a state dict may hold it."""
    for name, value in expected.items():
        if group.get(name, value) != value:
            raise ValueError(f"{name}: expected {value}, got {group[name]!r}")


# %% [markdown] tags=["engine"]
# Torch has fused kernels, which read and write each number once. They go through memory from front
# to back and look at no strides. If a parameter is a view of some columns of a larger table, such
# a kernel would change the others, too; and with a gradient that is a transpose it would take the
# wrong numbers. So only tensors that are laid out alike, without gaps, are given to it. The others
# go through torch's ordinary operations.


# %% tags=["engine"]
#| export
def _has_kernel(parameter: Tensor, least_bytes: int) -> bool:
    return (
        parameter.device.type in ("cpu", "cuda")
        and parameter.is_floating_point()
        and parameter.dtype.itemsize >= least_bytes
    )


def _is_alike(parameter: Tensor, *others: Tensor) -> bool:
    """Whether all have the same strides, and these leave no gaps and visit no number twice."""
    if any(tensor.layout != torch.strided for tensor in (parameter, *others)):
        return False
    if any(tensor.stride() != parameter.stride() for tensor in others):
        return False
    expected = 1
    for step, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


# %% [markdown] tags=["engine"]
# Parallel lists of tensors are divided accordingly. Mostly all are contiguous, which is seen
# quickly:


# %% tags=["engine"]
#| export
def _fusable_and_not(
    lists: list[list[Tensor]], least_bytes: int = 1
) -> Iterator[tuple[bool, Sequence[int]]]:
    """Yield True and the numbers of what can be fused, False and the numbers of what cannot.

    ``lists`` are parallel: parameters, gradients, and what is kept for them. Numbers of fewer than
    ``least_bytes`` are not fused.
    """
    fits = [_has_kernel(parameter, least_bytes) for parameter in lists[0]]
    if not all(all(map(Tensor.is_contiguous, column)) for column in lists):
        alike = [_is_alike(*tensors) for tensors in zip(*lists, strict=True)]
        fits = [a and b for a, b in zip(fits, alike, strict=True)]
    if all(fits):
        yield True, range(len(fits))
        return
    for is_fused in (True, False):
        if some := [number for number, fit in enumerate(fits) if fit == is_fused]:
            yield is_fused, some


# %% [markdown] tags=["engine"]
# (Our tests found that on a processor the kernel of torch 2.13 for SGD silently leaves most 16-bit
# numbers unchanged; there we do without.)


# %% tags=["engine"]
#| export
def _fused_sgd_step(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    velocities: list[Tensor] | None,
) -> None:
    names = ("lr", "momentum", "weight_decay", "nesterov")
    settings = {name: group[name] for name in names}
    kept = [] if velocities is None else [velocities]
    for is_fused, some in _fusable_and_not([parameters, grads, *kept], least_bytes=4):
        buffers = [None if velocities is None else velocities[i] for i in some]
        sgd(
            [parameters[i] for i in some], [grads[i] for i in some], buffers,
            fused=is_fused, foreach=False, dampening=0, maximize=False, **settings,
        )  # fmt: skip


# %% [markdown] tags=["engine"]
# The simplest optimizer on that base. State has torch's names, so checkpoints can be exchanged.


# %% tags=["engine"]
#| export
class SGD(_Stepper):
    """Stochastic gradient descent with momentum; state dicts are those of ``torch.optim.SGD``."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        backend: Backend = "torch",
    ):
        check_choice("backend", backend, ("reference", "torch"))
        self.backend = backend
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "nesterov": nesterov, "dampening": 0})

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            _check_amount(name, group[name])
        _check_share("momentum", group["momentum"])
        _check_switch("nesterov", group["nesterov"])
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov: expected a momentum above 0 with it, got momentum 0")
        _refuse(group, maximize=False, dampening=0)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        velocities = self._buffers(parameters, "momentum_buffer") if group["momentum"] else None
        if self.backend == "reference":
            _sgd_step(group, parameters, grads, velocities)
        else:
            _fused_sgd_step(group, parameters, grads, velocities)


# %% [markdown]
# ## Adam: each number at its own pace
#
# One rate for all cannot be right: the gradients of an embedding row that occurs once in a
# thousand batches and those of a gain that is used at every token differ by orders of magnitude.
# Adam {cite}`kingma2015adam` keeps for each parameter a running mean of its gradient and of its
# square,
#
# $$
# m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t , \qquad
# v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2 ,
# $$ (optimization-moments)
#
# from $m_0 = v_0 = 0$, and steps by $m / \sqrt v$. (This $v$ is a mean square, no velocity.) The
# units of the gradient cancel: multiply the loss by a thousand, and nothing changes. What remains
# is near $1$ or $-1$ where gradients agree, and near 0 where they are noise.
#
# The start needs care, as the running means begin at zero. Unrolled, $m_t = (1 - \beta_1)
# \sum_{i=1}^{t} \beta_1^{t-i} g_i$. If the gradients are stationary, $\mathbb{E}[g_i] =
# \mathbb{E}[g]$ for all $i$, then by the geometric sum
#
# $$
# \mathbb{E}[m_t] = (1 - \beta_1)\, \mathbb{E}[g] \sum_{i=1}^{t} \beta_1^{t-i}
# = (1 - \beta_1)\, \mathbb{E}[g]\, \frac{1 - \beta_1^{t}}{1 - \beta_1}
# = (1 - \beta_1^{t})\, \mathbb{E}[g] .
# $$ (optimization-bias)
#
# This is exact, at every step, and independence was not needed. So $\hat m_t = m_t / (1 -
# \beta_1^t)$ has expectation $\mathbb{E}[g]$, and likewise $\hat v_t = v_t / (1 - \beta_2^t)$ has
# $\mathbb{E}[g^2]$. (Of their quotient the statement says nothing.) We check it on 400,000
# sequences of gradients with mean 1 and standard deviation 2, so that $\mathbb{E}[g^2] = 5$:

# %%
torch.manual_seed(0)
m, v = torch.zeros(400_000), torch.zeros(400_000)
print(" t   E[m]  1 - 0.9^t  corrected    E[v]  corrected")
for t in range(1, 101):
    g = 1 + 2 * torch.randn(400_000)
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.99).add_(0.01 * g**2)
    if t in (1, 3, 10, 30, 100):
        fixed_m, fixed_v = m.mean() / (1 - 0.9**t), v.mean() / (1 - 0.99**t)
        numbers = f"{m.mean():6.2f} {1 - 0.9**t:10.2f} {fixed_m:10.1f}"
        print(f"{t:2d} {numbers} {v.mean():7.2f} {fixed_v:10.1f}")

# %% [markdown]
# At the first step $\hat m / \sqrt{\hat v} = g / |g|$: each parameter moves by exactly $\eta$,
# whatever its gradient, on the evidence of one batch. Without the correction it would go just as
# far here, as $0.1 / \sqrt{0.01} = 1$, but three times as far for the usual $\beta_2 = 0.999$.
#
# ### Decay, outside of the fraction
#
# Large weights are made smaller by a penalty $\frac{\lambda}{2} \lVert\theta\rVert^2$, whose
# gradient is $\lambda \theta$. For SGD one may add it to $g$. In Adam it would then be divided by
# $\sqrt v$ with all the rest: a parameter with large gradients would hardly decay. **AdamW**
# {cite}`loshchilov2019decoupled` decouples it:
#
# $$
# \theta_t = (1 - \eta \lambda)\, \theta_{t-1}
# - \eta\, \frac{\hat m_t}{\sqrt{\hat v_t} + \varepsilon} .
# $$ (optimization-adamw)
#
# A tiny $\varepsilon$, usually $10^{-8}$, keeps $0/0$ away where all gradients were zero.
# Two groups of parameters start at 1 and see nothing but noise, of standard deviation 0.01 and
# 100. After 500 steps decay alone would leave $(1 - \eta\lambda)^{500}$ of them:

# %%
noise = torch.tensor([0.01, 100.0]).repeat_interleave(2000)
print(f"decay alone:        {(1 - 1e-2 * 0.1) ** 500:.2f}")
for name, kind in {"Adam with L2": torch.optim.Adam, "AdamW": torch.optim.AdamW}.items():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(4000))
    optimizer = kind([weight], lr=1e-2, weight_decay=0.1)
    for _ in range(500):
        weight.grad = noise * torch.randn(4000)
        optimizer.step()
    quiet, loud = (part.mean().item() for part in weight.detach().chunk(2))
    print(f"{name:12} quiet: {quiet:5.2f}, loud: {loud:5.2f}")

# %% [markdown]
# With L2 the loud ones did not decay at all and the quiet ones vanished, for their gradient is
# mostly the penalty. Decoupled, both kept the same share: $\lambda$ means what it says.
#
# Equations {eq}`optimization-moments` to {eq}`optimization-adamw`, line by line:


# %%
#| export
def _adamw_step(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
) -> None:
    """Change the parameters and what is kept for them, in place."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    for p, g, m, v, t in zip(parameters, grads, means, squares, steps, strict=True):
        t += 1
        m.mul_(beta1).add_((1 - beta1) * g)
        v.mul_(beta2).add_((1 - beta2) * g**2)
        unbiased_m = m / (1 - beta1 ** t.item())
        unbiased_v = v / (1 - beta2 ** t.item())
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * unbiased_m / (unbiased_v.sqrt() + group["eps"]))


# %% [markdown]
# Each number's first step has length $\eta$, however large its gradient, and so has the second if
# the gradient stays the same:

# %%
weights = [torch.zeros(3)]
kept = [[torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())]]  # m, v, and t
settings = {"betas": (0.9, 0.999), "lr": 0.01, "weight_decay": 0.0, "eps": 1e-8}
for step in (1, 2):
    _adamw_step(settings, weights, [torch.tensor([1e-3, -1.0, 1e3])], *kept)
    print(f"after step {step}: {[round(number, 4) for number in weights[0].tolist()]}")

# %% [markdown]
# The exported {py:class}`~llmbook.optimization.AdamW` takes this step with `backend="reference"`;
# by default it hands the same arithmetic to torch's fused kernel.

# %% [markdown] tags=["engine"]
# ### Engine room: AdamW as a class, with what it refuses, and fused

# %% [markdown] tags=["engine"]
# Some settings are refused: with a beta of 1 no gradient would ever enter the mean, and a state
# saved by Adam with L2 decay would silently go on as AdamW.


# %% tags=["engine"]
#| export
def _check_adamw(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        _check_amount(name, group[name])
    if not isinstance(group["betas"], tuple | list) or len(group["betas"]) != 2:
        raise ValueError(f"betas: expected two, got {group['betas']!r}")
    for number, beta in enumerate(group["betas"]):
        _check_share(f"betas[{number}]", beta)
    decoupled = {"decoupled_weight_decay": True} if group["weight_decay"] else {}
    _refuse(group, amsgrad=False, maximize=False, **decoupled)


# %% [markdown] tags=["engine"]
# The same step by torch's kernel, where it may be used:


# %% tags=["engine"]
#| export
def _fused_adamw_step(group: dict[str, Any], *lists: list[Tensor]) -> None:
    *tensors, steps = lists  # parameters, gradients, their means, means of their squares
    for is_fused, some in _fusable_and_not([*tensors]):
        parameters, grads, means, squares = ([column[i] for i in some] for column in tensors)
        adamw(
            parameters, grads, means, squares, [], [steps[i] for i in some],
            fused=is_fused, foreach=False, amsgrad=False, maximize=False,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


# %% [markdown] tags=["engine"]
# A complex parameter is two real ones, each with a mean square of its own, as in torch. (Else a
# square could be negative.) State dicts are those of `torch.optim.AdamW`.


# %% tags=["engine"]
#| export
def _as_real(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


# %% tags=["engine"]
#| export
class AdamW(_Stepper):
    """Adam with decoupled weight decay; state dicts are those of ``torch.optim.AdamW``.

    Sources: Kingma & Ba (2015), algorithm 1; Loshchilov & Hutter (2019), algorithm 2, with the
    rate times the decay as in torch. Settings out of range raise a ``ValueError``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        backend: Backend = "torch",
    ):
        check_choice("backend", backend, ("reference", "torch"))
        self.backend = backend
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    def _check(self, group: dict[str, Any]) -> None:
        _check_adamw(group)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        means, squares = (self._buffers(parameters, n) for n in ("exp_avg", "exp_avg_sq"))
        for parameter in parameters:
            if "step" not in (state := self.state[parameter]):
                state["step"] = torch.zeros((), device=_device_of_step(parameter))
        tensors = (parameters, grads, means, squares, [self.state[p]["step"] for p in parameters])
        if self.backend == "reference":
            _adamw_step(group, *map(_as_real, tensors))
        else:
            _fused_adamw_step(group, *tensors)


# %% [markdown]
# ## Muon: a matrix is not a list of numbers
#
# Adam treats a matrix as numbers that happen to be stored together. But a matrix *acts*, and by how
# much it acts is told by its singular values: $G = U S V^\top$, with orthonormal directions in the
# columns $u_k$ of $U$ and $v_k$ of $V$ (now a vector), and strengths $s_k \ge 0$ on the diagonal of
# $S$. The gradients of a transformer's matrices are lopsided. Here is one, of a small model on
# stories of the {term}`tiny world`, a word to a token, one story to a row:

# %%
stories = [re.findall(r"\w+|[^\w\s]", s.text) for s in TinyWorld().stories(1500, seed=0)]
vocabulary = ["", *sorted({word for story in stories for word in story})]  # 0 begins and ends
number_of = {word: number for number, word in enumerate(vocabulary)}
longest = max(map(len, stories)) + 1
rows = torch.full((len(stories), longest + 1), -100)
for row, story in zip(rows, stories, strict=True):
    row[: len(story) + 2] = torch.tensor([0, *(number_of[word] for word in story), 0])
inputs, targets = rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous()
sizes = {"vocab_size": len(vocabulary), "context_length": longest, "n_heads": 2}
print(f"{len(vocabulary)} words, {longest} targets a row")

# %% [markdown]
# The gradient of the matrix that makes the values of the first layer, and its singular values:


# %%
def loss_on(model: TransformerLM, which: Tensor | slice) -> Tensor:
    hidden = model.hidden_states(inputs[which])
    return chunked_cross_entropy(hidden, model.lm_head.weight, targets[which])


torch.manual_seed(0)
model = TransformerLM(ModelConfig(d_model=64, n_layers=2, **sizes))
loss_on(model, slice(64)).backward()
gradient = model.blocks[0].attention.v_proj.weight.grad
spectrum = torch.linalg.svdvals(gradient)
share = (spectrum[:8] ** 2).sum() / (spectrum**2).sum()
print(f"share of the 8 largest of 64 in the squared norm: {share:.0%}")

# %% [markdown]
# A few directions have nearly all of it; a step along it changes little else. What would be a
# fair step? To first order a step of $-\eta D$ lowers the loss by $\eta \langle G, D \rangle$, with
# $\langle G, D \rangle = \sum_{ij} G_{ij} D_{ij}$. Among all $D$ that make no vector longer, that
# is, with spectral norm $\lVert D \rVert_2 \le 1$, take the one that lowers it most
# {cite}`bernstein2024old`. As $G = \sum_k s_k\, u_k v_k^\top$,
#
# $$
# \langle G, D \rangle = \sum_k s_k\, u_k^\top D\, v_k \le \sum_k s_k ,
# $$ (optimization-spectral)
#
# as $u_k^\top D v_k \le \lVert D \rVert_2 \le 1$; and $D = U V^\top$ attains it. So: keep the
# directions and set all strengths to 1. Where Adam's first step is the sign of each number, this
# is the sign of the matrix.
#
# A decomposition at every step would be slow. **Muon** {cite}`jordan2024muon` uses products only.
# Take $X = U S V^\top$, so that $X X^\top = U S^2 U^\top$. Then
#
# $$
# a X + b\, (X X^\top) X + c\, (X X^\top)^2 X = U \bigl( a S + b S^3 + c S^5 \bigr) V^\top :
# $$ (optimization-newton-schulz)
#
# an odd polynomial of a matrix acts on each singular value alone. Divide $G$ by its Frobenius
# norm, so that all lie between 0 and 1, and repeat a polynomial that lifts them toward 1. That is
# the method of Newton and Schulz. Its textbook form, $\frac32 s - \frac12 s^3$, multiplies a small
# value by only 1.5 each time. Muon's coefficients $(3.4445, -4.7750, 2.0315)$ multiply it by 3.4;
# the price is that values do not settle at 1 but move between 0.68 and 1.21.

# %% tags=["engine"]
#| export
# Muon's coefficients, and what no coefficients can be
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def _check_coefficients(name: str, given: Any) -> None:
    three = isinstance(given, tuple | list) and len(given) == 3
    if not three or not all(_is_number(number) and math.isfinite(number) for number in given):
        raise ValueError(f"{name}: expected three finite numbers, got {given!r}")


# %% [markdown]
# (The folded cell holds these coefficients as `_COEFFICIENTS`.)


# %%
#| export
def orthogonalize(
    matrix: Float[Tensor, "*batch rows columns"],
    steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = _COEFFICIENTS,
    eps: float = 1e-7,
) -> Float[Tensor, "*batch rows columns"]:
    """Push the singular values of each matrix toward 1 and keep its singular vectors.

    With the default coefficients those above 0.002 of the norm end between 0.68 and 1.21 after five
    steps. Computed in the dtype of ``matrix``. Source: Jordan et al. (2024), Newton-Schulz.
    """
    _check_floating("matrix", matrix, 2)
    check_whole("steps", steps, 0)
    _check_coefficients("coefficients", coefficients)
    _check_amount("eps", eps)
    a, b, c = coefficients
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix  # so that x x^T is the smaller of the two products
    x = x.reshape(-1, *x.shape[-2:])
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b G + c G G) x, for G = x x^T
    x = x.view(matrix.mT.shape if tall else matrix.shape)
    return x.mT if tall else x


# %% [markdown]
# The polynomial itself, applied again and again, and what it makes of the gradient above:

# %% mystnb={"figure": {"caption": "What Newton-Schulz does to singular values. Left, the polynomial applied one, three and five times: after five, all above 0.002 lie between 0.68 and 1.21 (gray). Right, a real gradient, each spectrum divided by its largest value: all but the last few come within a factor of two.", "name": "fig-optimization-muon"}, "image": {"alt": "Left, three curves over singular values from 0.001 to 1 on a logarithmic axis. Applied once, a hill that reaches 1 only at the right; five times, a steep rise until 0.002 and then a wavy line between 0.68 and 1.21. Right, 64 singular values on a logarithmic axis: the gradient's fall by more than three orders of magnitude, those after Newton-Schulz stay above one half until the last four."}}
figure, axes = plt.subplots(1, 2)
values = torch.logspace(-3, 0, 400)
for steps in (1, 3, 5):
    result, (a, b, c) = values, (3.4445, -4.7750, 2.0315)
    for _ in range(steps):
        result = a * result + b * result**3 + c * result**5
    axes[0].semilogx(values, result, label=f"applied {steps}x")
axes[0].axhspan(0.68, 1.21, color="gray", alpha=0.15)
axes[0].set(title="Strength before and after", xlabel="singular value / norm of the matrix")
after = torch.linalg.svdvals(orthogonalize(gradient))
axes[1].semilogy(spectrum / spectrum[0], label="gradient")
axes[1].semilogy(after / after[0], label="orthogonalized")
axes[1].set(title="A real gradient", xlabel="number of the singular value")
for ax in axes:
    ax.legend()
plt.show()
settled = result[values > 0.002]
assert settled.min() > 0.67 and settled.max() < 1.22 and after[40] > 0.5 * after[0]

# %% [markdown]
# What is orthogonalized is not the gradient but its running mean, with Nesterov's step ahead. How
# long is a step? $U V^\top$ of $n$ by $m$ has $\min(n, m)$ singular values of 1,
# so the mean square of its entries is $\min(n, m) / (n m) = 1 / \max(n, m)$. Times $0.2
# \sqrt{\max(n, m)}$ their root mean square is 0.2, about that of Adam's updates
# {cite}`liu2025muon`, so that one learning rate serves both. The original factor is
# $\sqrt{\max(1, \text{rows}/\text{columns})}$, above 1 only for tall matrices.


# %% tags=["engine"]
#| export
# The factor of the rate, by either rule
def _scale_of_rate(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    rows, columns = shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


# %% [markdown]
# Of the gradient above, orthogonalized and scaled:

# %%
for name, matrix in (("gradient", gradient), ("tall one", torch.randn(256, 64))):
    update = orthogonalize(matrix) * _scale_of_rate(matrix.shape, "match_rms_adamw")
    size = update.square().mean().sqrt()
    print(f"{name}: {tuple(matrix.shape)}, root mean square of the update {size:.1f}")

# %% [markdown]
# With $\operatorname{orth}$ for the method of Newton and Schulz, a step of Muon for a matrix $W$ of
# $n$ by $m$ is
#
# $$
# \begin{aligned}
# M_t &= \mu M_{t-1} + (1 - \mu)\, G_t , \qquad
# D_t = \operatorname{orth}\bigl((1 - \mu)\, G_t + \mu M_t\bigr) , \\
# W_t &= (1 - \eta\lambda)\, W_{t-1} - 0.2 \sqrt{\max(n, m)}\; \eta\, D_t .
# \end{aligned}
# $$ (optimization-muon)
#
# Here $M$ is a running mean, not the sum of momentum in {eq}`optimization-momentum`. Three steps
# with the gradient above, whatever its size:

# %%
W, M = torch.zeros_like(gradient), torch.zeros_like(gradient)
mu, eta, decay = 0.95, 0.1, 0.1
for step in (1, 2, 3):
    M = mu * M + (1 - mu) * gradient
    D = orthogonalize((1 - mu) * gradient + mu * M)
    W = (1 - eta * decay) * W - 0.2 * math.sqrt(max(W.shape)) * eta * D
    print(f"after step {step}: root mean square of the weights {W.square().mean().sqrt():.3f}")

# %% [markdown]
# The exported {py:class}`~llmbook.optimization.Muon` takes this step; its `adjust_lr_fn` chooses
# the factor. The price: for an $n$ by $n$ matrix one iteration takes three products of $2 n^3$
# FLOPs, five take $30 n^3$. Training on $B$ tokens takes $6 B n^2$ for it, so Muon adds the share
# $5 n / B$. At a width of 1,000 and batches of a million tokens that is half a percent.

# %% [markdown] tags=["engine"]
# ### Engine room: Muon as a class: what it refuses, and matrices of one shape together, for speed

# %% [markdown] tags=["engine"]
# What is refused: a parameter that is no matrix, above all.


# %% tags=["engine"]
#| export
def _check_muon(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "eps"):
        _check_amount(name, group[name])
    _check_share("momentum", group["momentum"])
    _check_switch("nesterov", group["nesterov"])
    check_whole("ns_steps", group["ns_steps"], 0)
    _check_coefficients("ns_coefficients", group["ns_coefficients"])
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        expected = "None, original or match_rms_adamw"
        raise ValueError(f"adjust_lr_fn: expected {expected}, got {group['adjust_lr_fn']!r}")
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    params = [p[1] if isinstance(p, tuple) else p for p in params]  # they may come with names
    for parameter in (p for p in params if isinstance(p, Tensor)):
        if parameter.ndim not in (2, 3) or not parameter.is_floating_point():
            got = f"shape {tuple(parameter.shape)} of {parameter.dtype}"
            raise ValueError(f"params: expected matrices, or stacks of them, got {got}")


# %% [markdown] tags=["engine"]
# Matrices of one shape go through the products together, which for small ones saves most of the
# time:


# %% tags=["engine"]
#| export
def _orthogonalized(
    updates: list[Tensor], group: dict[str, Any], dtype: torch.dtype | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield each update's number and what Newton-Schulz makes of it; equal shapes go together."""
    batches: dict[tuple[int, ...], list[int]] = {}
    for number, update in enumerate(updates):
        batches.setdefault(tuple(update.shape), []).append(number)
    for numbers in batches.values():
        stacked = torch.stack([updates[number] for number in numbers])
        stacked = stacked.to(dtype or _fast_dtype(stacked.device))
        settings: dict[str, Any] = {"coefficients": group["ns_coefficients"], "eps": group["eps"]}
        yield from zip(numbers, orthogonalize(stacked, group["ns_steps"], **settings), strict=True)


def _fast_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# %% [markdown] tags=["engine"]
# The step itself, in torch's order. A stack of experts is a batch of matrices already:


# %% tags=["engine"]
#| export
def _muon_step(
    group: dict[str, Any],
    parameters: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    dtype: torch.dtype | None,
) -> None:
    lr, momentum = group["lr"], group["momentum"]
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    nesterov = group["nesterov"]
    updates = list(torch._foreach_lerp(grads, momenta, momentum)) if nesterov else momenta
    torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    for number, update in _orthogonalized(updates, group, dtype):
        p = parameters[number]
        p.add_(update, alpha=-lr * _scale_of_rate(p.shape, group["adjust_lr_fn"]))


# %% [markdown] tags=["engine"]
# State dicts are those of `torch.optim.Muon`.


# %% tags=["engine"]
#| export
class Muon(_Stepper):
    """Momentum, orthogonalized: for matrices, (out, in) or stacked as (expert, out, in).

    State dicts are those of ``torch.optim.Muon``. The rate is multiplied by sqrt(max(1, out / in)),
    or with ``adjust_lr_fn`` "match_rms_adamw" by 0.2 sqrt(max(out, in)). ``ns_dtype`` is that of
    Newton-Schulz, by default bfloat16 on accelerators. Sources: Jordan (2024), Liu (2025).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = None,
    ):
        is_float = isinstance(ns_dtype, torch.dtype) and ns_dtype.is_floating_point
        if ns_dtype is not None and not is_float:
            raise ValueError(f"ns_dtype: expected a floating-point type or None, got {ns_dtype!r}")
        self.ns_dtype = ns_dtype
        numbers = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eps": eps}
        how = {"ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "nesterov": nesterov}
        super().__init__(params, {**numbers, **how, "adjust_lr_fn": adjust_lr_fn})

    def _check(self, group: dict[str, Any]) -> None:
        _check_muon(group)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], grads: list[Tensor]) -> None:
        momenta = self._buffers(parameters, "momentum_buffer")
        _muon_step(group, parameters, grads, momenta, self.ns_dtype)


# %% [markdown]
# ## Who gets what
#
# Muon's argument is about matrices that act on vectors. It does not hold for vectors, nor for
# an embedding, a table in which a step concerns the rows that occurred; and its authors leave
# the head to AdamW as well {cite}`jordan2024muon`. Decay draws a similar line.
# A matrix before a normalization can grow without changing what the model says, and decay
# is what stops it. Gains and biases have nothing to gain from being small. An embedding row that
# does not occur has a gradient of zero, and would decay at every step for nothing;
# OLMo 2 found that small embeddings make for large gradients and leaves them out
# {cite}`olmo2024olmo2`. nanoGPT decays them {cite}`karpathy2022nanogpt`; we follow OLMo
# ({numref}`fig-optimization-groups`).
#
# ```{figure} ../figures/optimization-groups.svg
# :name: fig-optimization-groups
# :alt: Four kinds of parameters. The embedding, also if tied to the head: AdamW without decay. Gains and biases: AdamW without decay. Matrices of the blocks, experts included: Muon with decay. An untied head: AdamW with decay. With AdamW alone, the matrices of the blocks are in its group with decay.
#
# Which optimizer and which decay a parameter gets. A tied matrix is an embedding, and there once.
# ```


# %% tags=["engine"]
#| export
# What is to be trained, by name
def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is to be trained, by name; a parameter under two names once."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    return found


# %% [markdown]
# {py:func}`~llmbook.optimization.parameter_groups` applies the rule: a parameter decays if it has
# two dimensions or more and is not a table that is looked up. `lookup_tables` (chapter 10) finds
# the embeddings, `_trainable` all that is not frozen.


# %% tags=["engine"]
#| export
# The rule, for any parameters, and then for those of a model
def _decayed_and_not(
    parameters: Iterable[nn.Parameter], embeddings: set[int], weight_decay: float
) -> list[dict[str, Any]]:
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for parameter in parameters:
        is_decayed = parameter.ndim >= 2 and id(parameter) not in embeddings
        groups[weight_decay if is_decayed else 0.0].append(parameter)
    return [{"params": some, "weight_decay": decay} for decay, some in groups.items() if some]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer: ``weight_decay`` for matrices, none for the others.

    Not decayed are vectors (gains, biases) and tables that are looked up, tied ones too. Each
    parameter is there once; frozen ones are left out. A ``ValueError`` if all are frozen.
    """
    _check_amount("weight_decay", weight_decay)
    return _decayed_and_not(_trainable(model).values(), lookup_tables(model), weight_decay)


# %% [markdown]
# For a small model with a tied head, the rule gives two groups:

# %%
tied = TransformerLM(ModelConfig(d_model=64, n_layers=2, tie_embeddings=True, **sizes))
for group in parameter_groups(tied, weight_decay=0.1):
    count = sum(p.numel() for p in group["params"])
    print(f"decay {group['weight_decay']}: {len(group['params']):2} tensors, {count:,} numbers")

# %% [markdown] tags=["engine"]
# ### Engine room: two optimizers as one, and the call that builds either

# %% [markdown] tags=["engine"]
# Two optimizers need to be stepped, saved, copied and scheduled as one:


# %% tags=["engine"]
#| export
class Optimizers(torch.optim.Optimizer):
    """Several optimizers as one; ``param_groups`` are all of theirs, so schedules fit it, too."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        for optimizer in optimizers or (None,):
            if not isinstance(optimizer, torch.optim.Optimizer):
                got = type(optimizer).__name__ if optimizers else "none"
                raise ValueError(f"optimizers: expected one or more of torch's kind, got {got}")
        self.optimizers = optimizers
        super().__init__([group for o in optimizers for group in o.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group that is in none of ``optimizers``, as nobody would step it."""
        if not any(param_group is group for o in self.optimizers for group in o.param_groups):
            raise ValueError("param_group: expected a group of one of the optimizers, got another")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each take a step; return what ``closure`` gave, if there is one."""
        loss = _called(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}  # groups are theirs still

    def state_dict(self) -> dict[str, Any]:
        """Return the state dicts of all, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each its state dict; a ``ValueError`` if there are more or fewer."""
        states = state_dict.get("optimizers", ()) if isinstance(state_dict, Mapping) else ()
        if len(states) != len(self.optimizers):
            expected = f"{len(self.optimizers)} optimizers"
            raise ValueError(f"state_dict: expected {expected}, got {len(states)}")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [g for optimizer in self.optimizers for g in optimizer.param_groups]


# %% [markdown] tags=["engine"]
# Muon's share is told by name, since nothing about a head's shape says that it is one:


# %% tags=["engine"]
#| export
def _matrices_of_blocks(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what Muon is for, and the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in _trainable(model).items():
        in_block = "blocks" in name.split(".") and parameter.ndim in (2, 3)
        (matrices if in_block else rest).append(parameter)
    if not matrices:
        raise ValueError("model: expected blocks with matrices, which Muon is for, got none")
    return matrices, rest


# %% [markdown] tags=["engine"]
# And the one call that a training loop makes:


# %% tags=["engine"]
#| export
def build_optimizer(
    model: nn.Module,
    name: Literal["adamw", "muon", "sgd"],
    lr: float,
    *,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float | None = None,
    adamw_lr: float | None = None,
    backend: Backend = "torch",
) -> torch.optim.Optimizer:
    """Return an optimizer for all parameters of ``model`` that are to be trained.

    "muon" is Muon for the matrices of ``model.blocks`` and AdamW, at ``adamw_lr`` or ``lr``, for
    the rest; Muon's rate is scaled so that both may be equal. ``momentum`` is by default 0.95 for
    "muon" and 0.9 for "sgd". Decay is that of ``parameter_groups``.
    """
    check_choice("name", name, ("adamw", "muon", "sgd"))
    for given, value in (("lr", lr), ("adamw_lr", lr if adamw_lr is None else adamw_lr)):
        _check_amount(given, value)
    if momentum is not None:
        _check_share("momentum", momentum)
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return AdamW(groups, lr, betas, weight_decay=weight_decay, backend=backend)
    if name == "sgd":
        momentum = 0.9 if momentum is None else momentum
        return SGD(groups, lr, momentum, weight_decay, backend=backend)
    matrices, rest = _matrices_of_blocks(model)
    others = _decayed_and_not(rest, lookup_tables(model), weight_decay)
    momentum = 0.95 if momentum is None else momentum
    rate = lr if adamw_lr is None else adamw_lr
    muon = Muon(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
    return Optimizers(muon, AdamW(others, rate, betas, weight_decay=weight_decay, backend=backend))


# %% [markdown]
# ### One call for a model
#
# {py:func}`~llmbook.optimization.build_optimizer` makes SGD, AdamW, or Muon with AdamW for the
# rest, with these groups. Who gets what, if the head is not tied:

# %%
untied = TransformerLM(ModelConfig(d_model=64, n_layers=2, **sizes))
built = build_optimizer(untied, "muon", lr=0.02)
for optimizer in built.optimizers:
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        decay = f"decay {group['weight_decay']}"
        name = type(optimizer).__name__
        print(f"{name:6} {decay:10} {len(group['params']):2} tensors, {count:7,} numbers")
held = sum(p.numel() for group in built.param_groups for p in group["params"])
assert held == sum(p.numel() for p in untied.parameters()), "each parameter once"

# %% [markdown]
# ## The rate over time
#
# At the start the gradient points somewhere else after every step and Adam's $\hat v$ rests on
# few batches, so the rate rises over some **warmup**. At the end the noise of the batches keeps
# the loss above the bottom of the valley, by an amount that shrinks with $\eta$, so the rate
# falls. The **cosine** {cite}`loshchilov2017sgdr` falls all the way, and must know when the run
# ends. **Warmup-stable-decay** {cite}`hu2024minicpm` stays at the peak and falls only at the end,
# so that one run can be ended at several lengths; Hägele and colleagues find it as good, best
# with a fall like $1 - \sqrt{\text{progress}}$ {cite}`hagele2024scaling`.
#
# A schedule is a function from the step, counted from 0, to a factor. Ours never begin with a
# factor of 0, which would waste the first step, and stay flat after the end, for runs that go on.


# %% tags=["engine"]
#| export
# Which schedules are refused
def _check_schedule(n_steps: int, warmup: int, final: float, decay: int = 0) -> None:
    for name, value, least in (("n_steps", n_steps, 1), ("warmup", warmup, 0), ("decay", decay, 0)):
        check_whole(name, value, least)
    if warmup + decay > n_steps:
        expected = f"warmup and decay within n_steps = {n_steps}"
        raise ValueError(f"warmup: expected {expected}, got {warmup} and {decay}")
    if not _is_number(final) or not 0 <= final <= 1:
        raise ValueError(f"final: expected a share from 0 to 1, got {final!r}")


# %% [markdown]
# The warmup comes first in all of them:

# %%
#| export
Schedule = Callable[[int], float]


def _warmed_up(step: int, warmup: int, then: Schedule) -> float:
    """Rise linearly: the first of ``warmup`` steps is not 0, and the first after them is 1."""
    return (step + 1) / (warmup + 1) if step < warmup else then(step)


def constant_schedule(*, warmup: int = 0) -> Schedule:
    """Return the factor 1 at every step, after a linear rise in ``warmup`` steps.

    With ``warmup`` w the first factor is 1 / (w + 1), as a first step of 0 would be wasted.

    >>> [constant_schedule(warmup=3)(step) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    check_whole("warmup", warmup, 0)
    return lambda step: _warmed_up(step, warmup, lambda _: 1.0)


# %% [markdown]
# The general form rises, stays and falls:

# %%
#| export
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


def wsd_schedule(
    n_steps: int,
    *,
    warmup: int = 0,
    decay: int | None = None,
    final: float = 0.0,
    shape: str = "linear",
) -> Schedule:
    """Return warmup, stable, decay: the factor of the peak rate at a step, counted from 0.

    The last ``decay`` steps, a fifth unless given, fall from 1 to ``final``, reached at step
    ``n_steps``, the first after the run, and kept. With ``warmup`` w the first factor is
    1 / (w + 1), as a first step of 0 would be wasted. ``shape`` is linear, cosine or sqrt, for
    1 - sqrt(progress). Sources: Hu et al. (2024); Hägele et al. (2024) for the shapes.
    """
    check_choice("shape", shape, tuple(_SHAPES))
    if decay is None:
        _check_schedule(n_steps, warmup, final)
        decay = min(n_steps // 5, n_steps - warmup)
    _check_schedule(n_steps, warmup, final, decay)

    def after_warmup(step: int) -> float:
        progress = min(max(0.0, (step - (n_steps - decay)) / decay), 1.0) if decay else 0.0
        return final + (1 - final) * _SHAPES[shape](progress)

    return lambda step: _warmed_up(step, warmup, after_warmup)


# %% [markdown]
# Cosine and linear schedules are the same without the stable phase:


# %%
#| export
def cosine_schedule(n_steps: int, *, warmup: int = 0, final: float = 0.1) -> Schedule:
    """Return linear warmup, half a cosine from 1 to ``final`` at step ``n_steps``, then flat.

    With ``warmup`` w the first factor is 1 / (w + 1), as a first step of 0 would be wasted.

    >>> [round(cosine_schedule(4, final=0.0)(step), 2) for step in range(6)]
    [1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """
    _check_schedule(n_steps, warmup, final)
    decay = n_steps - warmup
    return wsd_schedule(n_steps, warmup=warmup, decay=decay, final=final, shape="cosine")


def linear_schedule(n_steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Return linear warmup, a linear fall from 1 to ``final`` at step ``n_steps``, then flat.

    With ``warmup`` w the first factor is 1 / (w + 1), as a first step of 0 would be wasted.

    >>> [round(linear_schedule(4, warmup=1)(step), 2) for step in range(6)]
    [0.5, 1.0, 0.67, 0.33, 0.0, 0.0]
    """
    _check_schedule(n_steps, warmup, final)
    decay = n_steps - warmup
    return wsd_schedule(n_steps, warmup=warmup, decay=decay, final=final, shape="linear")


# %% [markdown]
# {numref}`fig-optimization-schedules` shows their shapes.

# %% mystnb={"figure": {"caption": "Schedules for 100 steps, drawn to 120. All rise over 10; each is flat after its end.", "name": "fig-optimization-schedules"}, "image": {"alt": "Factor against step. The cosine falls from 1 at step 10 in a half wave to 0.1 at 100 and stays. The linear one falls in a line to 0. Warmup-stable-decay stays at 1 until step 80 and then falls to 0, in a line, or with sqrt first steeply and then gently."}}
drawn = {
    "cosine": (cosine_schedule(100, warmup=10), "-"),
    "linear": (linear_schedule(100, warmup=10), "-"),
    "wsd, linear": (wsd_schedule(100, warmup=10), "--"),
    "wsd, sqrt": (wsd_schedule(100, warmup=10, shape="sqrt"), "--"),
}
figure, ax = plt.subplots(figsize=(7, 2.8))
for name, (schedule, line) in drawn.items():
    ax.plot([schedule(step) for step in range(120)], line, label=name)
ax.set(title="Factor of the peak rate", xlabel="step")
ax.legend()
plt.show()

# %% [markdown]
# ## One bad batch
#
# Now and then a batch has a gradient many times as long as usual. **Clipping** bounds the damage
# {cite}`pascanu2013difficulty`: all gradients together are one vector; if its norm exceeds a
# maximum $c$, the vector is shortened to it, in place, and keeps its direction:
#
# $$
# g \leftarrow g \cdot \min\Bigl(1, \frac{c}{\lVert g \rVert}\Bigr) , \qquad
# \lVert g \rVert^2 = \sum_p \lVert g_p \rVert^2 ,
# $$ (optimization-clipping)
#
# where $g_p$ is the gradient of parameter $p$. A norm that is not finite has no direction to keep:
# gradients stay, the caller sees the norm, and {doc}`13_training` skips the step. `_global_norm`,
# in the folded cell, computes the norm for tensors of several devices and types.


# %% tags=["engine"]
#| export
# The norm of gradients of several devices and dtypes
def _by_kind(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors by device and dtype, as torch's functions on lists are fast on equal ones."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    yield from kinds.values()


def _tensors_of(parameters: Any) -> list[Tensor]:
    """Return the parameters; what was read before would else be clipped in vain, and silently."""
    given = [parameters] if isinstance(parameters, Tensor) else _listed("parameters", parameters)
    for parameter in given:
        if not isinstance(parameter, Tensor):
            got = type(parameter).__name__
            raise ValueError(f"parameters: expected tensors, got one of type {got}")
    return given


def _global_norm(kinds: list[list[Tensor]]) -> Float[Tensor, ""]:
    norms: list[Tensor] = []
    for grads in kinds:
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        norms += torch._foreach_norm(grads, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


# %% [markdown]
# On a CPU the factor can be looked at for free, and it is usually 1, so the multiplication is
# skipped. On an accelerator a look would make the program wait, so there it always multiplies:


# %%
#| export
@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor] | Tensor, max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients, in place, so that their joint norm is at most ``max_norm``.

    Returns the norm before. If it is not finite the gradients stay as they are, so look at it
    before a step; ``max_norm`` may be infinite, to measure only. Computed in float32 or wider.
    No parameters at all, as from an iterator that was read before, are a ``ValueError``.
    """
    if not _is_number(max_norm) or not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, got {max_norm!r}")
    kinds = list(_by_kind(p.grad for p in _tensors_of(parameters) if p.grad is not None))
    if not kinds:
        return torch.zeros(())
    norm = _global_norm(kinds)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scale = scale.masked_fill(~norm.isfinite(), 1.0)
    if scale.device.type != "cpu" or scale < 1:  # elsewhere to look would be to wait
        for grads in kinds:
            torch._foreach_mul_(grads, scale.to(grads[0].device))
    return norm


# %% [markdown]
# The gradients from above, shortened to a norm of 0.1:

# %%
before = [p.grad.clone() for p in model.parameters()]
norm = clip_gradients(model.parameters(), max_norm=0.1)
again = clip_gradients(model.parameters(), max_norm=math.inf)
ratio = [(p.grad / b)[b != 0] for p, b in zip(model.parameters(), before, strict=True)]
same = torch.cat([r.flatten() for r in ratio])
assert torch.allclose(same, same[0].expand_as(same)), "one factor for all"
print(f"norm before {norm:.3f}, after {again:.3f}; all gradients times {same.mean():.3f}")

# %% [markdown]
# ## A race
#
# Which is best? A race is worth something only if each runner is tuned as much as the others. The
# problem: 44,000 parameters, 80 steps of eight stories, warmup and linear decay, clipping at 1,
# all as above. Each optimizer tries five learning rates, half a decade apart, with one seed;
# momentum, betas and decay (the SGDs have none) are not tuned, for anyone. Then
# it runs at its best rate with three *new* seeds, as the loss of the seed that chose the rate is
# flattered. Measured is the loss on 100 stories that nobody has seen.


# %%
def race(name: str, lr: float, seed: int, n_steps: int = 80) -> float:
    torch.manual_seed(seed)
    model = TransformerLM(ModelConfig(d_model=32, n_layers=2, **sizes))
    if name in ("sgd", "momentum"):
        optimizer = SGD(model.parameters(), lr, momentum=0.9 * (name == "momentum"))
    else:
        optimizer = build_optimizer(model, name, lr)
    factor = linear_schedule(n_steps, warmup=n_steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss_on(model, torch.randint(1400, (8,))).backward()
        clip_gradients(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return loss_on(model, slice(1400, 1500)).item()


rates = {"sgd": 0.3, "momentum": 0.1, "adamw": 0.003, "muon": 0.01}  # the least of five
tried = {name: [low * 10 ** (i / 2) for i in range(5)] for name, low in rates.items()}
tuning = {name: [race(name, lr, seed=0) for lr in tried[name]] for name in rates}

# %% [markdown]
# If the best of five rates were the first or the last, the range would be too small and the
# comparison unfair. So that is checked, too:

# %%
best = {name: min(range(5), key=tuning[name].__getitem__) for name in rates}
final = {name: [race(name, tried[name][best[name]], seed) for seed in (1, 2, 3)] for name in rates}
interior = [0 < number < 4 for number in best.values()]
assert all(interior), "the range is too small"
adaptive = final["adamw"] + final["muon"]
plain = final["sgd"] + final["momentum"]
assert max(adaptive) < 1.7 < min(plain)
floor = TinyWorld().entropy() / (sum(map(len, stories)) / len(stories) + 1)
print("nats per token  best rate  mean of three seeds")
for name, losses in final.items():
    print(f"{name:15} {tried[name][best[name]]:9.2g} {sum(losses) / 3:20.1f}")
print(f"{'floor':15} {floor:30.1f}")
assert max(max(losses) - min(losses) for losses in final.values()) < 0.1
print("the three seeds of each lie within 0.1")

# %% [markdown]
# {numref}`fig-optimization-race` draws both parts of it.

# %% mystnb={"figure": {"caption": "A race, tuned. Left, the loss after 80 steps against the learning rate. Right, three fresh seeds at each one's best rate. AdamW and Muon lead the others by far more than the spread of seeds.", "name": "fig-optimization-race"}, "image": {"alt": "Left, four bowls of loss over learning rate on a logarithmic axis, AdamW and Muon lower than SGD and momentum. Right, three dots for each optimizer: SGD and momentum around 1.8, AdamW around 1.6, Muon around 1.4."}}
figure, axes = plt.subplots(1, 2)
for place, name in enumerate(rates):
    axes[0].semilogx(tried[name], tuning[name], "o-", label=name)
    axes[1].plot([place] * 3, final[name], "o")
axes[0].set(title="One seed", xlabel="learning rate", ylabel="loss (nats per token)", ylim=(1, 3))
axes[0].legend()
axes[1].set(title="At the best rate, three new seeds", ylim=(1, 2.5))
axes[1].set_xticks(range(4), rates)
plt.show()

# %% [markdown]
# AdamW and Muon are ahead of both SGDs, by several times the spread. Here Muon also leads AdamW, by
# about twice the spread; with other widths and numbers of steps we saw ties. Three
# seeds of a model of this size are a hint, no more. Note also the bowls: a rate that is off by a
# factor of ten costs more than the choice between AdamW and Muon. All are far above the floor: 80
# steps are few, and {doc}`13_training` goes on.

# %% [markdown]
# ## Is it the real thing?
#
# Ours and torch's start from the same weights, take ten steps, exchange their state dicts and
# take ten more, each from the other's state. In the end they must agree. Torch's Muon works in 16
# bits, so ours does here, too.

# %%
pairs = {
    "SGD": (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "AdamW": (AdamW, torch.optim.AdamW, {"betas": (0.9, 0.95), "weight_decay": 0.1}),
    "Muon": (Muon, torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
}
for name, (mine, theirs, settings) in pairs.items():
    torch.manual_seed(0)
    sixteen_bits = {"ns_dtype": torch.bfloat16} if name == "Muon" else {}
    start, gradients = torch.randn(8, 12), torch.randn(20, 8, 12)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [mine(weights[:1], 0.01, **settings, **sixteen_bits)]
    optimizers.append(theirs(weights[1:], 0.01, **settings))
    for step, g in enumerate(gradients):
        if step == 10:
            states = [optimizer.state_dict() for optimizer in optimizers]
            for optimizer, state in zip(optimizers, reversed(states), strict=True):
                optimizer.load_state_dict(state)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = g.clone()
            optimizer.step()
    moved = (weights[1] - start).abs().max()
    allowed = (0.02 if name == "Muon" else 1e-5) * moved  # sums of 16 bits depend on their order
    assert (weights[0] - weights[1]).abs().max() < allowed
    share = "2 %" if name == "Muon" else "0.001 %"
    print(f"{name:5} differs by less than {share} of the largest move")

# %% [markdown]
# The loss against torch's, where some targets do not count:

# %%
torch.manual_seed(0)
hidden, head = torch.randn(50, 16, requires_grad=True), torch.randn(31, 16)
wanted = torch.randint(31, (50,)).masked_fill(torch.rand(50) < 0.2, -100)
theirs = F.cross_entropy(hidden @ head.T, wanted)
ours = chunked_cross_entropy(hidden, head, wanted, chunk_size=7)
grads = [torch.autograd.grad(loss, hidden)[0] for loss in (ours, theirs)]
assert torch.allclose(ours, theirs) and torch.allclose(*grads, atol=1e-6)
print(f"loss: {ours:.3f}, torch's {theirs:.3f}; gradients differ by less than 0.000001")

# %% [markdown]
# And the norm, with the gradients that it leaves:

# %%
for parameter, gradient in zip(model.parameters(), before, strict=True):
    parameter.grad = gradient.clone()
theirs = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
clipped = [p.grad.clone() for p in model.parameters()]
for parameter, gradient in zip(model.parameters(), before, strict=True):
    parameter.grad = gradient.clone()
ours = clip_gradients(model.parameters(), 0.01)
assert torch.allclose(ours, theirs)
assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), clipped, strict=True))
print(f"norm: {ours:.2f}, torch's {theirs:.2f}; {len(clipped)} clipped gradients agree")

# %% [markdown]
# ## How fast is it?
#
# With one thread: the loss with its gradients at a vocabulary of 2,048, and a step of a model
# of three million parameters.


# %%
def milliseconds(function: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first is not counted
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:])


hidden = torch.randn(4096, 128, requires_grad=True)
head = torch.nn.Parameter(torch.randn(2048, 128) / 11)
wanted = torch.randint(2048, (4096,))
timed = ModelConfig(vocab_size=2048, context_length=256, d_model=192, n_layers=6, n_heads=4)
model = TransformerLM(timed)
for parameter in model.parameters():
    parameter.grad = 1e-3 * torch.randn_like(parameter)
matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
ways = [
    lambda: F.cross_entropy(hidden @ head.T, wanted).backward(),
    lambda: chunked_cross_entropy(hidden, head, wanted).backward(),
]
turns = [[milliseconds(way, 1) for way in ways] for _ in range(6)]  # by turns, for fairness
whole, chunked = (min(times) for times in zip(*turns, strict=True))

# %% [markdown]
# And the steps, each alone, the least of five times:

# %% tags=["nbval-ignore-output"]
steps = {
    "AdamW, ours": AdamW(model.parameters()).step,
    "AdamW, ours, reference": AdamW(model.parameters(), backend="reference").step,
    "AdamW, torch's default": torch.optim.AdamW(model.parameters()).step,
    "AdamW, torch's fused": torch.optim.AdamW(model.parameters(), fused=True).step,
    "Muon, ours": Muon(matrices).step,
    "clipping, ours": lambda: clip_gradients(model.parameters(), 1e9),
    "clipping, torch's": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9),
}
for name, step in steps.items():
    print(f"{name:24} {milliseconds(step):6.1f} ms")
print(f"head and loss: {whole:.0f} ms; in chunks {whole / chunked:.1f} times as fast")

# %% [markdown]
# When we measured, chunks made head and loss one and a half to two and a half times as fast, so
# the trainer of {doc}`13_training` uses them always. Our AdamW is torch's fused kernel and costs
# the same; torch's default on a processor takes several times as long, since it goes through
# memory once for every operation. Muon's products take well over a hundred times as long as a step
# of AdamW. By the share $5 n / B$ they add, at this width, a tenth to batches of ten thousand
# tokens.
#
# ## Exercises
#
# ````{exercise} Not quite certain
# :label: ex-optimization-smoothing
# *Fifteen minutes.* Label smoothing asks for $y' = (1 - \epsilon)\, y + \epsilon / V$ in the
# place of the one-hot $y$. Derive the gradient by the logits, and write `smoothed_loss(logits,
# targets, epsilon)`, the mean over tokens, from {py:func}`~llmbook.optimization.log_sum_exp`
# alone, without a softmax. What is the least value that it can have, and is it zero?
# ````


# %% tags=["solution"]
def smoothed_loss(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Return the mean cross-entropy to targets that share ``epsilon`` among all tokens."""
    # Sum of y'_i (log Z - z_i) = log Z - (1 - epsilon) z_y - epsilon mean(z), with gradient p - y'.
    # It is least at p = y', where it is the entropy of y': above zero for epsilon > 0.
    chosen = logits.gather(-1, targets[..., None]).squeeze(-1)
    losses = log_sum_exp(logits) - (1 - epsilon) * chosen - epsilon * logits.mean(dim=-1)
    return losses.mean()


# %% tags=["check"]
torch.manual_seed(0)
logits, wanted = torch.randn(6, 9, dtype=torch.float64), torch.randint(9, (6,))
logits = (5 * logits).requires_grad_()
huge = smoothed_loss(1000 * torch.eye(2), torch.tensor([0, 1]), 0.5)
assert huge.isfinite(), f"large logits give {huge}: a probability overflows, or becomes 0"
plain, theirs = smoothed_loss(logits, wanted, 0.0), F.cross_entropy(logits, wanted)
twice = smoothed_loss(logits.repeat(2, 1), wanted.repeat(2), 0.0)
assert torch.allclose(plain, twice), "the same tokens twice have another loss: it is no mean"
assert torch.allclose(plain, theirs), "without smoothing it is no cross-entropy"
for epsilon in (0.1, 0.6, 1.0):
    ours = smoothed_loss(logits, wanted, epsilon)
    shifted = smoothed_loss(logits + 7, wanted, epsilon)
    assert torch.allclose(ours, shifted), "a constant added to all logits changes the loss"
    target = (1 - epsilon) * F.one_hot(wanted, 9) + epsilon / 9
    slope = torch.autograd.grad(ours, logits)[0]
    assert torch.allclose(slope, (logits.softmax(-1) - target) / 6), (
        f"epsilon {epsilon}: the gradient of a token is not p - y', with y' as in the text"
    )
    theirs = F.cross_entropy(logits, wanted, label_smoothing=epsilon)
    assert torch.allclose(ours, theirs), f"epsilon {epsilon}: {ours:.4f}, torch has {theirs:.4f}"

# %% [markdown]
# ````{exercise} How long does a mean remember?
# :label: ex-optimization-memory
# *Ten minutes.* In {eq}`optimization-moments` the weight of a gradient falls by $\beta$ with
# every step. Write `half_life(beta)`, after how many steps half of it is left, and
# `beta_for(tokens, batch_tokens)`, the beta for which half is left after that many `tokens`. What
# becomes of $\beta_2 = 0.95$ at batches of a million tokens if the batch is a hundred times
# smaller and the memory, in tokens, shall be the same?
# ````


# %% tags=["solution"]
def half_life(beta: float) -> float:
    """Return the number of steps after which a gradient has half of its weight."""
    return math.log(0.5) / math.log(beta)


def beta_for(tokens: float, batch_tokens: float) -> float:
    """Return the beta whose half-life is ``tokens``, for batches of ``batch_tokens``."""
    # beta^(tokens / batch) = 1/2. A hundredth of the batch: 0.95^(1/100) = 0.9995.
    return 0.5 ** (batch_tokens / tokens)


# %% tags=["check"]
for beta in (0.5, 0.9, 0.999):
    steps = half_life(beta)
    assert abs(beta**steps - 0.5) < 1e-9, (
        f"of a gradient, {beta**steps:.3f} is left after {steps:.1f} steps with beta {beta}"
    )
for tokens, batch_tokens in ((1000, 1000), (5e6, 1e6), (5e6, 3e4), (1e4, 1e6)):
    beta = beta_for(tokens, batch_tokens)
    left = beta ** (tokens / batch_tokens)
    assert 0 < beta < 1, f"beta is {beta:.3f}, which is no share"
    assert abs(left - 0.5) < 1e-9, (
        f"{left:.3f} is left after {tokens:,.0f} tokens in batches of {batch_tokens:,.0f}"
    )

# %% [markdown]
# ````{exercise} Coefficients compared
# :label: ex-optimization-coefficients
# *Twenty minutes.* Write `steps_needed(coefficients, strength, low)`: how many times the
# polynomial $a s + b s^3 + c s^5$ must be applied until `strength`, a singular value between 0
# and 1, is at least `low`. Compare Muon's with the textbook's $(1.5, -0.5, 0)$ and with $(1.875,
# -1.25, 0.375)$ on the way from 0.001 to 0.7. Show that the last two have $f(1) = 1$ and $f'(1) =
# 0$, and Muon's do not. What does that mean for a matrix that is orthogonal already?
# ````


# %% tags=["solution"]
def steps_needed(coefficients: tuple[float, float, float], strength: float, low: float) -> int:
    """Return after how many iterations a singular value has reached ``low``."""
    # From 0.001 to 0.7: 6 steps with Muon's, 17 with the cubic, 11 with the other quintic. At 1:
    # 1.5 - 0.5 = 1 and 1.5 - 1.5 = 0; 1.875 - 1.25 + 0.375 = 1 and 1.875 - 3.75 + 1.875 = 0. Muon's
    # give 0.701: an orthogonal matrix does not stay as it is, its strengths move to and fro.
    (a, b, c), steps = coefficients, 0
    while strength < low:
        strength = a * strength + b * strength**3 + c * strength**5
        steps += 1
    return steps


# %% tags=["check"]
def applied(coefficients: tuple[float, float, float], strength: float, n: int) -> float:
    a, b, c = coefficients
    for _ in range(n):
        strength = a * strength + b * strength**3 + c * strength**5
    return strength


muon, cubic, quintic = (3.4445, -4.775, 2.0315), (1.5, -0.5, 0.0), (1.875, -1.25, 0.375)
for strength in (0.9, 0.7):
    assert steps_needed(cubic, strength, 0.7) == 0, "what has reached low already needs no step"
for kind, name in ((muon, "Muon's"), (cubic, "the cubic"), (quintic, "the quintic")):
    for strength, low in ((0.001, 0.7), (0.02, 0.5), (0.3, 0.69), (1e-6, 0.1)):
        steps = steps_needed(kind, strength, low)
        case = f"{name} from {strength} to {low}: {steps} steps"
        assert isinstance(steps, int), f"{case} are no whole number"
        reached = [applied(kind, strength, n) >= low for n in range(steps + 1)]
        assert reached[-1], f"{case} do not reach it"
        assert sum(reached) == 1, f"{case}, but fewer reach it already"
assert steps_needed(cubic, 0.5, 0.99) == 4, "the cubic slows down on its way from 0.5 to 0.99"

# %% [markdown]
# ````{exercise} Rows that do not count
# :label: ex-optimization-kept
# *Twenty minutes.* In instruction tuning most targets are ignored, and
# {py:func}`~llmbook.optimization.chunked_cross_entropy` makes their logits for nothing. Write
# `loss_of_kept(hidden, weight, targets)` with the same loss and gradients, which hands it only
# what counts. Why might this be unwelcome on an accelerator?
# ````


# %% tags=["solution"]
def loss_of_kept(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss; logits are made for targets that count and for no others."""
    # How many are kept is known to the accelerator only; the processor has to wait for it before
    # it can ask for a tensor of that size, and torch.compile cannot plan for it.
    kept = targets != -100
    return chunked_cross_entropy(hidden[kept], weight, targets[kept])


# %% tags=["check"]
torch.manual_seed(0)
hidden = torch.randn(4, 25, 8, dtype=torch.float64, requires_grad=True)
weight = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
wanted = torch.randint(13, (4, 25)).masked_fill(torch.rand(4, 25) < 0.8, -100)
wanted[0, :2] = torch.tensor([0, 12])  # the first and the last id count like all others
losses, gradients, peaks = [], [], []
for function in (loss_of_kept, chunked_cross_entropy):
    with LiveBytes() as memory:
        loss = function(hidden, weight, wanted)
        assert loss.requires_grad, "the loss has no gradient"
        gradients.append(torch.autograd.grad(loss, (hidden, weight), allow_unused=True))
    losses.append(loss.detach())
    peaks.append(memory.peak)
assert torch.allclose(*losses), f"the loss is {losses[1]:.4f}, got {losses[0]:.4f}"
for name, ours, theirs in zip(("hidden", "weight"), *gradients, strict=True):
    assert ours is not None, f"{name} gets no gradient"
    assert torch.allclose(ours, theirs), f"the gradient of {name} is another"
assert peaks[0] < peaks[1], f"peak of {peaks[0]} bytes, with all rows {peaks[1]}: none was left out"
nothing = loss_of_kept(hidden, weight, torch.full((4, 25), -100))
assert nothing.isnan(), f"the mean over nothing is NaN, not {nothing.item()}"

# %% [markdown]
# ````{exercise} Only the sign
# :label: ex-optimization-lion
# *Half an hour.* Lion {cite}`chen2023symbolic` keeps one running mean only. With $c_t =
# \beta_1 m_{t-1} + (1 - \beta_1) g_t$ it steps by $\theta_t = (1 - \eta\lambda)\, \theta_{t-1} -
# \eta \operatorname{sign}(c_t)$, and only then sets $m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t$.
# Write `lion_step(parameter, mean, lr, betas, weight_decay)`, which changes parameter and mean in
# place. How much memory does it save against AdamW, and why will its rate be smaller?
# ````


# %% tags=["solution"]
@torch.no_grad()
def lion_step(
    parameter: Tensor, mean: Tensor, lr: float, betas: tuple[float, float], weight_decay: float
) -> None:
    """Take a step of Lion with the gradient of ``parameter``."""
    # One number for each parameter in the place of two: half of the optimizer's state. Each
    # entry moves by the whole rate at every step, also where the gradient is noise.
    grad = parameter.grad
    update = torch.sign(betas[0] * mean + (1 - betas[0]) * grad)
    parameter.mul_(1 - lr * weight_decay).sub_(lr * update)
    mean.mul_(betas[1]).add_((1 - betas[1]) * grad)


# %% tags=["check"]
def step_of(parameter: Tensor, mean: Tensor, gradient: list[float], weight_decay: float) -> None:
    parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    given = parameter.grad.clone()
    try:
        lion_step(parameter, mean, 0.1, (0.9, 0.99), weight_decay)
    except RuntimeError as error:
        raise AssertionError(f"a step is not to be followed by autograd: {error}") from None
    assert torch.equal(parameter.grad, given), "the gradient has been changed"


def near(tensor: Tensor, expected: list[float]) -> bool:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return torch.allclose(tensor.detach(), wanted, rtol=1e-6, atol=1e-14)


parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
mean = torch.zeros(3, dtype=torch.float64)
step_of(parameter, mean, [0.5, -1e-6, 0.0], 0.5)
moved = f"moved from 1, -2 and 3 to {[round(x, 4) for x in parameter.tolist()]}"
assert near(parameter, [0.85, -1.8, 2.85]), f"decay is lr times weight_decay, then a sign: {moved}"
assert near(mean, [0.005, -1e-8, 0.0]), "the mean is kept in place, by the second beta"
# 0.9 * 0.005 - 0.1 * 0.0425 is above zero; with the new mean it is not. The second number has
# -0.9 * 1e-8 + 0.1 * 2e-7, also above zero; with the second beta it is not.
step_of(parameter, mean, [-0.0425, 2e-7, 2.0], 0.0)
assert near(parameter, [0.75, -1.9, 2.75]), "the sign is that of the old mean and the first beta"
assert near(mean, [0.004525, -7.9e-9, 0.02]), "the mean after two steps is another"

# %% [markdown]
# ## Summary
#
# Maximum likelihood asks for the least cross-entropy, whose gradient by the logits is $p - y$.
# Log-sum-exps are computed in 32 bits with the maximum taken out. Because the gradient is known
# with the logits, no more than a chunk of them need exist. SGD follows the gradient, and the
# steepest axis sets its rate; momentum lets agreeing gradients add up. Adam divides by the root
# of a running mean square, with a correction that is exact in expectation, and AdamW keeps decay
# outside of that fraction. Muon makes all singular values of an update alike. Matrices decay,
# vectors and embeddings do not.
#
# **Checklist: loss and optimizer.**
#
# - Compute the loss in 32 bits, in chunks once logits outweigh activations, and let the mean
#   over nothing be NaN.
# - Begin with AdamW, betas of 0.9 and 0.95, decay 0.1 on matrices, clipping at 1; tune the rate
#   first, by factors of three, and see that the best is not at the end of the range.
# - Use Muon for the matrices of blocks where five times the width is far less than the tokens of a
#   batch.
# - Warm up. Take a cosine if you know the length of the run, warmup-stable-decay if not.
# - Compare optimizers only at the best rate of each, over seeds.
#
# **Further reading.** Loshchilov and Hutter {cite}`loshchilov2019decoupled` for decay, Jordan
# {cite}`jordan2024muon` and Liu and colleagues {cite}`liu2025muon` for Muon, Bernstein and
# Newhouse {cite}`bernstein2024old` for optimizers as choices of a norm. Next, {doc}`13_training`
# puts all of it into a loop that survives being killed.
