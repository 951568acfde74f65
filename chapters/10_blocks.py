# %% [markdown]
# # The block
#
# > Normalize, transform, add: the parts around attention that make a deep stack of layers
# > trainable, up to a mixture of experts, and the block that puts them together.
#
# Attention moves information between tokens and does little else: what comes out is a weighted mean
# of what went in, multiplied by two matrices. Something has to work on the mixture, and then all of
# it has to be repeated twelve, thirty or a hundred times. This is where stacking goes wrong. A
# signal that each layer shrinks by a third has lost five digits after thirty layers, and on the way
# back the gradient loses them again.
#
# A transformer block is the answer: two layers, attention and a feed-forward network, each with
# two precautions. Its result is *added* to its input, and its input is *normalized*. This
# chapter derives both and measures what happens without them.
#
# | | |
# |---|---|
# | **Part** | II. Architecture |
# | **You build** | {py:class}`~llmbook.blocks.LayerNorm`, {py:class}`~llmbook.blocks.RMSNorm`, {py:class}`~llmbook.blocks.GELU`, {py:class}`~llmbook.blocks.SwiGLU`, {py:class}`~llmbook.blocks.FeedForward`, {py:class}`~llmbook.blocks.TransformerBlock`, {py:func}`~llmbook.blocks.initialize_weights`, {py:class}`~llmbook.blocks.MixtureOfExperts` |
# | **You need** | attention ({doc}`09_attention`) and positions ({doc}`08_positions`) as black boxes, the stories of {doc}`01_tinyworld`, gradients |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 60 seconds to run |

# %% tags=["remove-cell"]
#| default_exp blocks

# %% tags=["engine"]
#| export
# The imports that only the module and its engine rooms need.
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Int64
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from llmbook.attention import Backend
from llmbook.environment import check_at_least, check_choice, check_fraction
from llmbook.positions import LearnedEmbedding, check_tensor

# %% [markdown]
# ## Why not simply stack layers?
#
# Take the simplest layer worth stacking: two matrices with a ReLU, $\max(0, x)$, between them.
# (Vectors are columns in this chapter, as in the papers.) All weights are independent with mean 0,
# those of a matrix with $n$ inputs of variance $1/n$. Then a sum $\sum_i w_i x_i$ has variance $n
# \cdot \frac1n \cdot \overline{x^2}$, where a bar denotes the mean: a matrix keeps the mean square
# of its input. Positive and negative sums are equally likely, so ReLU keeps half of it. So the
# layer $f$ halves the mean square, and a stack of $\ell$ of them leaves $2^{-\ell}$. We measure its
# root, the root mean square or rms.

# %%
#| export
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# %% [markdown]
# A random layer, and the root mean square:

# %%
import time
from collections.abc import Iterator

import matplotlib.pyplot as plt

plt.style.use("llmbook.book")
d_model, depth = 128, 48


def random_layer(x: Tensor) -> Tensor:
    up = torch.randn(4 * d_model, d_model) / d_model**0.5
    down = torch.randn(d_model, 4 * d_model) / (4 * d_model) ** 0.5
    return (x @ up.T).relu() @ down.T


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# %% [markdown]
# We send random vectors through 48 such layers, and random gradients back:


# %%
def passed(step) -> tuple[list[float], list[float]]:
    """The rms of the signal after each step, and of a gradient that is random at the end."""
    torch.manual_seed(0)
    signal = [torch.randn(64, d_model, requires_grad=True)]
    for _ in range(depth):
        signal.append(step(signal[-1]))
    gradients = torch.autograd.grad(signal[-1], signal, torch.randn(64, d_model))
    return [rms(x) for x in signal], [rms(g) for g in gradients]


forward, backward = passed(random_layer)
for name, left in (("signal", forward[-1]), ("gradient", backward[0])):
    factor, digits = left ** (1 / depth), -math.log10(left)
    print(f"{name:8} times {factor:.2f} a layer, {digits:.0f} digits lost after {depth}")

# %% [markdown]
# The prediction is a factor of $\sqrt{1/2} \approx 0.71$ per layer. The gradient passes through the
# same matrices, transposed, and through the half of the ReLUs that are open, so it shrinks alike.
# (One matrix then gains the factor of four that the other loses.)
#
# ### Add, do not replace
#
# The remedy is to let each layer *add* something {cite}`he2016deep`: $x' = x + f(x)$. With $J$
# for the matrix of derivatives of $f$, and $\nabla_x$ for the gradient of the loss with respect
# to $x$,
#
# $$
# \frac{\partial x'}{\partial x} = I + J, \qquad
# \nabla_x = (I + J)^\top \nabla_{x'} = \nabla_{x'} + J^\top \nabla_{x'} .
# $$ (blocks-residual)
#
# Multiplied out over all layers, the product of the $I + J_\ell$ has one term $I$: the gradient of
# the last layer reaches the first one unchanged, whatever the $J_\ell$ are. Everything else is
# added to that.
#
# This gives a transformer its shape ({numref}`fig-blocks-stream`). One vector for each token
# runs through the model from bottom to top, the **residual stream**
# {cite}`elhage2021framework`. A layer reads it, computes, and adds its result. Nothing is
# overwritten: the end of the stream is the {term}`embedding` plus the sum of all writes.
#
# ```{figure} ../figures/blocks-stream.svg
# :name: fig-blocks-stream
# :alt: A horizontal line, the residual stream, from the embedding at the left to the logits at the right. At four places a layer reads from it through a normalization, and its result is added further on: attention and feed-forward network of block 1, attention and feed-forward network of block 2. A last normalization stands before the logits.
#
# The residual stream of two blocks. Layers read through a normalization and write by addition;
# the straight line is the direct path of the gradient.
# ```
#
# But how large does the stream grow? The matrices of $f$ are independent of $x$ and have mean
# zero, so that $x$ and $f(x)$ are uncorrelated, and *variances of uncorrelated contributions
# add*. If $f$ halves the mean square $v$, then $v' = v + v/2$: after $\ell$ layers it has grown
# to $1.5^\ell\,v$, and we have exchanged one exponential for another. The reason is that the
# growing stream is fed into $f$. So we normalize what a layer reads. Every write then has the
# same mean square, one half, and after $\ell$ writes
#
# $$
# v_\ell = v_0 + \ell/2, \qquad
# \operatorname{rms}_\ell = \sqrt{1 + \ell/2} \quad\text{for } v_0 = 1 .
# $$ (blocks-growth)
#
# Growth like a square root is tame. It can be removed altogether: if the number $N$ of writes
# is known, we divide each by $\sqrt N$ at the beginning of training, and the whole stream ends
# at $v_N = 1 + \frac12$. GPT-2 does so {cite}`radford2019language`; a model of `n_layers`
# blocks has $N = 2\,$`n_layers`.


# %%
def normalized(x: Tensor) -> Tensor:
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


steps = {
    "replace: f(x)": (random_layer, lambda n: 2.0**-n),
    "add: x + f(x)": (lambda x: x + random_layer(x), lambda n: 1.5**n),
    "normalize: x + f(norm(x))": (
        lambda x: x + random_layer(normalized(x)),
        lambda n: 1 + n / 2,
    ),
    "and scale by 1/√N": (
        lambda x: x + random_layer(normalized(x)) / depth**0.5,
        lambda n: 1 + n / (2 * depth),
    ),
}
measured = {name: passed(step) for name, (step, _) in steps.items()}
for name, (_, variance) in steps.items():
    ends = measured[name][0][-1], variance(depth) ** 0.5
    print(f"{name:26} rms after {depth} layers {ends[0]:.2g}, predicted {ends[1]:.2g}")

# %% [markdown]
# In the first two stacks a few percent a layer, by chance, become a factor of two or three.
#
# The gradient can be predicted, too. The normalization divides by $\sqrt{v_\ell}$, and so $J$ has
# that factor: the mean square of the gradient grows by $1 + \frac{1/2}{v_\ell} = v_{\ell+1}/v_\ell$
# on its way back through layer $\ell$. Over many layers everything between cancels: at layer $\ell$
# it is $v_N/v_\ell$ times that at the end. The same holds for the other three stacks
# ({numref}`fig-blocks-depth`).

# %% mystnb={"figure": {"caption": "Signal and gradient in four stacks of 48 random layers: replacing loses both, adding blows both up, normalizing makes the growth a square root, and scaled writes keep the stream level. Dots are measured, dotted lines predicted.", "name": "fig-blocks-depth"}, "image": {"alt": "Two plots over the layers 0 to 48 with logarithmic axes. Left, the rms of the stream: falling below a ten-millionth when replacing, rising above ten thousand when adding, to 5 when normalizing, staying near 1 when scaled. Right, the rms of the gradient by layer: the same four behaviors, mirrored; largest or smallest at layer 0. Dots lie close to the predicted lines."}}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.6))
layers = range(0, depth + 1, 4)
for name, (_, variance) in steps.items():
    (dots,) = axes[0].plot(layers, measured[name][0][::4], "o", markersize=3.5, label=name)
    style = {"color": dots.get_color(), "linewidth": 1, "linestyle": ":"}
    axes[0].plot(layers, [variance(n) ** 0.5 for n in layers], **style)
    axes[1].plot(layers, measured[name][1][::4], "o", markersize=3.5, color=dots.get_color())
    backward = [(variance(depth) / variance(n)) ** 0.5 for n in layers]
    axes[1].plot(layers, backward, **style)
axes[0].set(yscale="log", xlabel="layer", title="the signal, by layer")
axes[1].set(yscale="log", xlabel="layer", title="the gradient, by layer")
axes[0].set_ylabel("root mean square")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
plt.show()

# %% [markdown]
# ## LayerNorm
#
# What should "normalize" mean? **LayerNorm** {cite}`ba2016layer` was the first answer. It takes
# the vector of one token, alone, subtracts its mean, divides by its standard deviation, and
# lets the model choose a new scale and offset for each feature:
#
# $$
# \begin{aligned}
# y &= \frac{x - \mu}{\sigma}, \qquad
# \mu = \frac1d \sum_i x_i, \qquad
# \sigma^2 = \frac1d \sum_i (x_i - \mu)^2 + \varepsilon, \\
# \operatorname{LayerNorm}(x) &= g \odot y + b .
# \end{aligned}
# $$ (blocks-layernorm)
#
# The small $\varepsilon$ keeps a vector of zeros from being divided by zero. In geometry, $x - \mu$
# is the projection of $x$ onto the plane whose vectors sum to zero, which takes away what points
# along $(1, \dots, 1)$. Dividing by $\sigma$ makes the length $\sqrt d$. So $y$ lies on a sphere
# within that plane: in three dimensions on a circle ({numref}`fig-blocks-sphere`). Two of $d$
# degrees of freedom are gone, an offset and the length, and the direction within the plane is kept.

# %% mystnb={"figure": {"caption": "Where normalization sends 300 random vectors of three dimensions: LayerNorm to a circle perpendicular to (1, 1, 1), RMSNorm to the sphere.", "name": "fig-blocks-sphere"}, "image": {"alt": "Three scatter plots in space. First, a cloud of points stretched along the first axis. Second, after LayerNorm, the points form a circle around the direction (1, 1, 1), drawn as an arrow. Third, after RMSNorm, they lie on a sphere."}}
torch.manual_seed(1)
points = torch.randn(300, 3) * torch.tensor([1.6, 0.9, 0.9]) + 0.3
centered = points - points.mean(dim=1, keepdim=True)
panels = {"vectors": points, "LayerNorm": normalized(centered), "RMSNorm": normalized(points)}
fig = plt.figure(figsize=(8, 3))
for number, (name, at) in enumerate(panels.items(), 1):
    ax = fig.add_subplot(1, 3, number, projection="3d", box_aspect=(1, 1, 1))
    ax.scatter(*at.T, s=5, c=points[:, 0], cmap="cividis", depthshade=False)
    ax.quiver(0, 0, 0, 1.8, 1.8, 1.8, color="#D55E00", linewidth=1.5, arrow_length_ratio=0.15)
    ax.set(xlim=(-2, 2), ylim=(-2, 2), zlim=(-2, 2), xticks=[], yticks=[], zticks=[], title=name)
    ax.view_init(20, -10)
plt.show()


# %% tags=["engine"]
#| export
# Widths and settings that do not fit are named where they enter.
def _check_vectors(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    check_tensor("weight", weight, "d_model")
    d_model = weight.size(0)
    check_tensor("x", x, "...", d_model)  # broadcasting would accept a width of one
    if bias is not None:
        check_tensor("bias", bias, d_model)


def _check_eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise ValueError(f"eps: expected a small positive number, got {eps!r}")


def _check_norm(d_model: int, eps: float, backend: str) -> None:
    _check_size("d_model", d_model)
    check_choice("backend", backend, ("reference", "torch"))
    _check_eps(eps)


def _check_size(argument: str, size: int | None) -> None:
    """Raise unless ``size`` is a whole number from 1 on, and given."""
    if size is None:
        raise ValueError(f"{argument}: expected a whole number, got None")
    check_at_least(**{argument: (1, size)})


def _are_mixed(x: Tensor, weight: Tensor) -> bool:
    """Whether the dtypes differ, so that no kernel is sure to take them; autocast makes one."""
    return x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)


# %% [markdown]
# Whatever the type of the input, the statistics are computed in 32-bit floats, for a reason that we
# will see. The result has the type of the input, also where the gain has another.


# %%
#| export
def layer_norm(
    x: Float[Tensor, "*shape d_model"],
    weight: Float[Tensor, " d_model"],
    bias: Float[Tensor, " d_model"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*shape d_model"]:
    """Center each vector of ``x``, scale it to variance one, then by ``weight``; add ``bias``.

    Mean and variance are taken in float32 (float64 for float64), and the variance is divided by
    ``d_model``, not by ``d_model - 1``. The result has the dtype of ``x``, as in torch. Source: Ba,
    Kiros and Hinton (2016).

    >>> layer_norm(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3))
    tensor([-0.9258, -0.4629,  1.3887])
    """
    _check_vectors(x, weight, bias)
    _check_eps(eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    scaled = (centered * torch.rsqrt(variance + eps)).to(x.dtype) * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


# %% [markdown]
# ### Its gradient
#
# We derive it in two steps; RMSNorm will need the first alone. That is the division, for a
# vector $z$ in place of $x - \mu$: $y = z/r$ with $r^2 = \frac1d \sum_i z_i^2 + \varepsilon$.
# From $\partial r/\partial z_j = z_j/(d\,r)$ follows, with $\delta_{ij} = 1$ for $i = j$ and
# else 0,
#
# $$
# \frac{\partial y_i}{\partial z_j} = \frac{\delta_{ij}}{r} - \frac{z_i}{r^2}\,\frac{z_j}{d\,r}
# = \frac1r \Bigl(\delta_{ij} - \frac{y_i y_j}{d}\Bigr), \qquad
# \nabla_z = \frac1r \Bigl(\nabla_y - y\,\frac{y \cdot \nabla_y}{d}\Bigr).
# $$ (blocks-norm-gradient)
#
# The bracket removes the part of the gradient that points along $y$. That is as it should be: the
# length of $z$ has no effect on $y$, so the loss cannot ask for another. And a long vector gets a
# small gradient, because of $1/r$.
#
# The second step is the mean. We have $z = Px$, where $P = I - \frac1d \mathbf 1 \mathbf 1^\top$
# subtracts the mean, and $P^\top = P$, so $\nabla_x = P \nabla_z$: the gradient is centered as
# well. Since $y$ is centered already, this touches the first term only:
#
# $$
# \nabla_x = \frac1\sigma
# \Bigl(\nabla_y - \overline{\nabla_y} - y\,\frac{y \cdot \nabla_y}{d}\Bigr),
# \qquad \nabla_y = g \odot \nabla_{\mathrm{out}} .
# $$ (blocks-layernorm-gradient)

# %%
torch.manual_seed(0)
x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
gain, out_gradient = torch.rand(16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
layer_norm(x, gain).backward(out_gradient)

with torch.no_grad():
    z = x - x.mean(dim=-1, keepdim=True)
    r = (z.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    y, to_y = z / r, gain * out_gradient
    along = y * (y * to_y).mean(dim=-1, keepdim=True)
    by_hand = (to_y - to_y.mean(dim=-1, keepdim=True) - along) / r
assert torch.allclose(by_hand, x.grad, rtol=0, atol=1e-12)
print(f"length of the gradient {x.grad[0].norm():.2f}, its mean {x.grad[0].mean().abs():.4f},")
print(f"and its component along y {(x.grad[0] @ y[0] / y[0].norm()).abs():.4f}")

# %% [markdown]
# The formula is what autograd computes, and the gradient asks neither for an offset nor for a
# length.
#
# As a module, LayerNorm has a gain and, if wanted, a bias. Its default is PyTorch's *fused* kernel,
# which does all steps in one pass over memory.


# %%
#| export
class LayerNorm(nn.Module):
    """LayerNorm over the last dimension; the gain starts at one, the bias at zero."""

    def __init__(
        self, d_model: int, eps: float = 1e-5, bias: bool = True, backend: Backend = "torch"
    ):
        super().__init__()
        _check_norm(d_model, eps, backend)
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return ``x``, normalized."""
        _check_vectors(x, self.weight)
        if self.backend == "reference" or _are_mixed(x, self.weight):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


# %% [markdown]
# ## RMSNorm
#
# **RMSNorm** {cite}`zhang2019root` leaves out the mean, and the bias with it: it divides by the
# root mean square, and keeps all directions. Llama and most models after it use it.
#
# $$
# \operatorname{RMSNorm}(x) = g \odot \frac{x}{r}, \qquad
# r = \sqrt{\tfrac1d \textstyle\sum_i x_i^2 + \varepsilon}
# $$ (blocks-rmsnorm)


# %%
#| export
def rms_norm(
    x: Float[Tensor, "*shape d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "*shape d_model"]:
    """Scale each vector of ``x`` to root mean square one, then by ``weight``.

    The mean square is taken in float32 (float64 for float64), and the result is rounded to the
    dtype of ``x`` before the gain, as in transformers' Llama, and again after a gain of another
    dtype, as in torch. Source: Zhang and Sennrich (2019).

    >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2))
    tensor([0.8485, 1.1314])
    """
    _check_vectors(x, weight)
    _check_eps(eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return ((wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight).to(x.dtype)


# %% [markdown]
# Why 32-bit statistics? Float16 ends at 65,504, so a square overflows from 256 on; and it has no
# positive number below $6 \cdot 10^{-8}$, so the square of a small number is zero. (Bfloat16
# reaches as far as float32, but has only 8 significant bits, too few for a sum.) Trained models do
# have single activations above 1,000 {cite}`sun2024massive`.

# %%
ones = torch.ones(4, dtype=torch.float16)
for value in (300.0, 3e-4):
    x = torch.full((4,), value, dtype=torch.float16)
    naive = x * torch.rsqrt(x.square().mean() + 1e-12)
    ours = rms_norm(x, ones, eps=1e-12)
    results = f"in float16 {naive[0].item():.2f}, with 32-bit statistics {ours[0].item():.2f}"
    print(f"{value:6}: {results}")

# %% [markdown]
# The right answer is 1 both times. The first naive one is a division by infinity. In the second the
# square is $9 \cdot 10^{-8}$, and the nearest number in float16 is $1.2 \cdot 10^{-7}$.
#
# The module is like that of LayerNorm. By default it uses a faster computation of the same:


# %%
#| export
class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, with a gain that starts at one.

    ``backend="torch"`` computes the same faster. In float32 on a CPU its gradient cannot be
    differentiated again, nor transformed by ``torch.func``; that of ``"reference"`` can.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, backend: Backend = "torch"):
        super().__init__()
        _check_norm(d_model, eps, backend)
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return ``x``, normalized."""
        _check_vectors(x, self.weight)
        plain = self.backend == "reference" or _are_mixed(x, self.weight)
        function = rms_norm if plain else _fast_rms_norm
        return function(x, self.weight, self.eps)


# %% [markdown]
# ### What is subtracting the mean worth?
#
# The mean is one direction among $d$. Of the squared length of a random vector it has a share of
# $1/d$ on average, so LayerNorm and RMSNorm differ little to begin with. They could differ where a
# model *uses* that direction. But subtracting the mean is linear: a matrix $W$ that reads $Px$ is
# the matrix $WP$ reading $x$, and one that should write a centered vector can be $PW$. So a model
# that normalizes what its layers read, with LayerNorm, can be rewritten as one with RMSNorm that
# computes the same {cite}`jiang2023prermsnorm`; {ref}`ex-blocks-center` does it. Subtracting the
# mean does nothing that the matrices could not do. What remains is its effect on training, which we
# measure below, and its cost.

# %% [markdown] tags=["engine"]
# ### Engine room: RMSNorm with its gradient by hand, because PyTorch's version on a CPU is slow

# %% [markdown] tags=["engine"]
# In PyTorch's version for the CPU, LayerNorm is one fused kernel, while RMSNorm is put together
# from square, mean, product and so on. Each writes its result to memory for the next one to
# read, and the whole takes longer than LayerNorm, as we shall measure. We have the gradient, so
# we can write it ourselves. With $y = x/r$ put into {eq}`blocks-norm-gradient`,
#
# $$
# \nabla_x = \frac1r \Bigl(\nabla_y - x \, \frac{x \cdot \nabla_y}{d\,r^2}\Bigr), \qquad
# \nabla_g = \sum_{\text{tokens}} \nabla_{\mathrm{out}} \odot \frac{x}{r} .
# $$ (blocks-rmsnorm-gradient)
#
# Both need the product $\nabla_\mathrm{out} \odot x$, as a table of rows. Then $x \cdot
# \nabla_y$ is this table times the vector $g$, and $\nabla_g$ is the vector of all $1/r$ times
# the table: two products of a matrix and a vector. To be saved for the backward pass are $x$,
# which the stream keeps anyway, and one number for each token.


# %% tags=["engine"]
#| export
def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each vector, without a copy of ``x`` for its squares."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


class _RMSNormFloat32(torch.autograd.Function):
    """RMSNorm with its gradient by hand: saves only ``x`` and one number for each vector."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # autocast stays out, both ways
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, to_out: Tensor) -> Any:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        product = to_out * x
        rows = product.reshape(-1, x.size(-1))
        to_weight = inverse.reshape(-1) @ rows
        along = (rows @ weight).view(inverse.shape) * inverse.square() / x.size(-1)
        to_y = torch.mul(to_out, weight, out=product)  # its memory is used again
        return to_y.addcmul_(x, along, value=-1).mul_(inverse), to_weight, None


# %% [markdown] tags=["engine"]
# It is used where it is the fastest way: on a CPU and in 32 bits. The same arithmetic without a
# gradient gives the same bits, so that a model in use is the one that was trained.


# %% tags=["engine"]
#| export
def _fast_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` by the fastest way that there is for this device and dtype."""
    ours = x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not ours or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNormFloat32.apply(x, weight, eps)
    return (x * _inverse_rms(x, eps)).mul_(weight)  # bit by bit as with a gradient


# %% [markdown]
# ## The feed-forward network
#
# The second layer of a block works on each token alone: up to a larger inner width, through an
# activation, and down again. It can be read as a memory. A row of the first matrix is a key, a
# pattern to be looked for in the stream; the activation says how much of it was found; and the
# corresponding column of the second matrix is what to write then {cite}`geva2021transformer`. With
# four times the width it has $8 d^2$ parameters, twice as many as the four $d \times d$ matrices of
# attention.
#
# ### Which activation?
#
# ReLU decides: what is positive passes, the rest is zero, and so is its gradient. A unit that
# is negative for all inputs gets no gradient any more and stays dead. **GELU**
# {cite}`hendrycks2016gaussian` decides at random, and takes the mean. Pass $x$ with a
# probability that grows with $x$, and let it be the probability that a standard normal variable
# $Z$ falls below $x$. The expected output is
#
# $$
# \operatorname{GELU}(x) = x \, P(Z < x) = x\,\Phi(x)
# = \frac{x}{2} \Bigl(1 + \operatorname{erf} \frac{x}{\sqrt2}\Bigr).
# $$ (blocks-gelu)
#
# There is an approximation without the error function, which GPT-2 was trained with: $\Phi(x)
# \approx \frac12 \bigl(1 + \tanh(c\,(x + a x^3))\bigr)$. Its constants come from comparing powers
# of $x$. On the left, the density is $\frac{1}{\sqrt{2\pi}}(1 - x^2/2 + \dots)$, so $\Phi(x) =
# \frac12 + \frac{1}{\sqrt{2\pi}}(x - x^3/6 + \dots)$. On the right, $\tanh u = u - u^3/3 + \dots$
# gives $\frac12 + \frac c2 \bigl(x + (a - c^2/3)\,x^3 + \dots\bigr)$. So $c = \sqrt{2/\pi}$, and $a
# = \frac{c^2}{3} - \frac16 \approx 0.0455$ is the best fit at zero. The published $a = 0.044715$ is
# better over the whole range:


# %%
#| export
def gelu(
    x: Float[Tensor, "*shape"], approximate: Literal["none", "tanh"] = "none"
) -> Float[Tensor, "*shape"]:
    """``x`` times the probability that a standard normal variable is below ``x``.

    ``approximate="tanh"`` is GPT-2's formula. Source: Hendrycks and Gimpel (2016).
    """
    check_tensor("x", x, "...")
    check_choice("approximate", approximate, ("none", "tanh"))
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


# %% [markdown]
# The errors of the two constants (as a module, the function is `GELU(approximate, backend)`):

# %%
x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
taylor = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + (2 / (3 * math.pi) - 1 / 6) * x**3)))
for name, approximation in (("0.0455", taylor), ("0.044715", gelu(x, "tanh"))):
    error = (approximation - gelu(x)).abs().max().item()
    print(f"largest error with a = {name:8}: {error:.5f}")


# %% tags=["engine"]
#| export
# GELU as a module, by torch's kernel or by the formula.
class GELU(nn.Module):
    """The Gaussian error linear unit, by torch's kernel or by `gelu`."""

    def __init__(self, approximate: Literal["none", "tanh"] = "none", backend: Backend = "torch"):
        super().__init__()
        check_choice("approximate", approximate, ("none", "tanh"))
        check_choice("backend", backend, ("reference", "torch"))
        self.approximate, self.backend = approximate, backend

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return GELU of each number."""
        check_tensor("x", x, "...")
        function = gelu if self.backend == "reference" else F.gelu
        return function(x, approximate=self.approximate)


# %% [markdown]
# Replace the normal distribution by the logistic one and you get **SiLU**, $x\,\sigma(x)$
# {cite}`elfwing2018sigmoid`, a simpler formula for much the same curve
# ({numref}`fig-blocks-activations`). Both are smooth, dip below zero, and let some gradient
# through for negative inputs.

# %% mystnb={"figure": {"caption": "Three activations and their derivatives: GELU and SiLU are ReLU with a soft decision. They dip below zero, and their slope exceeds one.", "name": "fig-blocks-activations"}, "image": {"alt": "Two plots from minus 4 to 4. Left: ReLU is zero, then the diagonal; GELU and SiLU follow it smoothly and dip to about minus 0.17 and minus 0.28. Right, the derivatives: a step from 0 to 1 for ReLU; smooth steps that undershoot zero and overshoot one for the other two."}}
x = torch.linspace(-4, 4, 401, requires_grad=True)
fig, axes = plt.subplots(1, 2, figsize=(8, 3))
for name, function in (("ReLU", F.relu), ("GELU", gelu), ("SiLU", F.silu)):
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    axes[0].plot(x.detach(), y.detach(), label=name)
    axes[1].plot(x.detach(), slope, label=name)
axes[0].set(title="activation", xlabel="input")
axes[1].set(title="its derivative", xlabel="input")
axes[0].legend()
plt.show()

# %% [markdown]
# ### A gate
#
# An activation lets each number decide about itself. A **gated linear unit** computes the decision
# separately, with a matrix of its own {cite}`dauphin2017language`. With SiLU as the gate it is
# **SwiGLU**, which Shazeer compared with its relatives {cite}`shazeer2020glu`:
#
# $$
# \operatorname{FeedForward}(x) =
# W_\text{down}\,\bigl(\operatorname{SiLU}(W_\text{gate}\,x) \odot W_\text{up}\,x\bigr).
# $$ (blocks-swiglu)
#
# So a network can let one feature pass where another is present. GEGLU and ReGLU have GELU and
# ReLU in SiLU's place.
#
# ```{figure} ../figures/blocks-feedforward.svg
# :name: fig-blocks-feedforward
# :alt: Two networks side by side. Left, two matrices: x of width d goes up to 4 d, through an activation, down to d. Right, three matrices: x goes through gate and up, each to 8/3 d; the gate passes through SiLU and is multiplied with the other; down leads back to d. Both have 8 d squared parameters.
#
# A plain and a gated feed-forward network with the same number of parameters.
# ```


# %%
#| export
class SwiGLU(nn.Module):
    """Gate ``up`` with the SiLU of ``gate``, element by element; it has no parameters."""

    def __init__(self) -> None:  # so that the signature says that it takes nothing
        super().__init__()

    def forward(
        self, gate: Float[Tensor, "*shape d_ff"], up: Float[Tensor, "*shape d_ff"]
    ) -> Float[Tensor, "*shape d_ff"]:
        """Return ``silu(gate) * up``."""
        check_tensor("gate", gate, "...")
        check_tensor("up", up, *gate.shape)  # broadcasting would accept other shapes
        return F.silu(gate) * up


# %% tags=["engine"]
#| export
# The activations by name, with and without a gate, and the step between the matrices.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
GATES = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}
#: What a feed-forward network can have between its matrices; the last three have a gate.
ACTIVATIONS = (*_ACTIVATIONS, *GATES)


def activate(activation: str, gate: Tensor | None, up: Tensor) -> Tensor:
    """The inner vector of a feed-forward network, from one linear map of its input, or two.

    ``gate`` is None for an activation without a gate, and only for these.
    """
    check_choice("activation", activation, ACTIVATIONS)
    check_tensor("up", up, "...")
    if (gate is not None) != (activation in GATES):
        expected = "a tensor" if activation in GATES else "None"
        raise ValueError(f"gate: expected {expected} for {activation!r}, got {gate!r:.60}")
    if gate is None:
        return _ACTIVATIONS[activation](up)
    check_tensor("gate", gate, *up.shape)
    return _ACTIVATIONS[GATES[activation]](gate) * up


# %% [markdown]
# There are now three matrices. For an honest comparison the total must stay: $2\,d\,d_\text{ff}
# = 3\,d\,d'_\text{ff}$, so $d'_\text{ff} = \frac23 d_\text{ff}$. Where the plain network has
# the usual $4d$, the gated one has $\frac83 d$, rounded up to a multiple of something that
# suits the hardware. (`ACTIVATIONS` are the names that we know; those in `GATES` have a gate.)


# %%
#| export
def default_d_ff(d_model: int, activation: str = "swiglu", multiple_of: int = 8) -> int:
    """Return the usual inner width: 4 d_model, or 8/3 d_model with a gate, rounded up.

    Both have the same number of parameters, 8 d_model squared, but for the rounding.

    >>> default_d_ff(768, "gelu"), default_d_ff(4096, "swiglu", multiple_of=256)
    (3072, 11008)
    """
    _check_size("d_model", d_model)
    _check_size("multiple_of", multiple_of)
    check_choice("activation", activation, ACTIVATIONS)
    width = 8 * d_model // 3 if activation in GATES else 4 * d_model
    return -(-width // multiple_of) * multiple_of


# %% [markdown]
# Rounded up to a multiple of 256 this gives Llama's widths {cite}`touvron2023llama`:

# %%
for name, size in (("7B", 4096), ("13B", 5120), ("33B", 6656), ("65B", 8192)):
    print(f"Llama {name:3} d_model {size}, d_ff {default_d_ff(size, multiple_of=256):6,}")

# %% [markdown]
# ### Dropout
#
# For small data there is one more precaution. **Dropout** {cite}`srivastava2014dropout` sets each
# number to zero with probability $p$ while training, so that no unit can rely on a single other
# one. Let $m$ be 1 with probability $1 - p$, else 0. Then $\mathbb{E}[m x] = (1 - p)\,x$: the
# next layer would see less while training than in use. *Inverted* dropout divides by $1 - p$ at
# once, and leaves nothing to do at inference:
#
# $$
# \mathbb{E}\Bigl[\frac{m x}{1-p}\Bigr] = x, \qquad
# \operatorname{Var}\Bigl[\frac{m x}{1-p}\Bigr]
# = \frac{x^2\,p\,(1-p)}{(1-p)^2} = x^2\,\frac{p}{1-p} .
# $$ (blocks-dropout)


# %%
def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    if not training or p == 0:
        return x
    return x * (torch.rand_like(x) >= p) / (1 - p)


torch.manual_seed(0)
threes = torch.full((1_000_000,), 3.0)
for name, sample in (
    ("ours", dropout(threes, p=0.2, training=True)),
    ("torch's", F.dropout(threes, p=0.2)),
    ("in use", dropout(threes, p=0.2, training=False)),
):
    values = ", ".join(f"{value:.2f}" for value in sample.unique().tolist())
    print(f"{name:8} values {values:11} mean {sample.mean():.1f}, variance {sample.var():.2f}")

# %% [markdown]
# Mean and variance are as derived: 3 and $3^2 \cdot 0.2 / 0.8 = 2.25$. The noise is the price. A
# model that sees each text once has little chance to overfit, and PaLM, for one, was pretrained
# without dropout {cite}`chowdhery2023palm`. Ours is off unless asked for; when fine-tuning on
# little data it may help. In the network it acts on the inner vector, which `activate` makes of one
# linear map of the input, or of two. It does what `SwiGLU` does, for every activation by name:


# %%
#| export
class FeedForward(nn.Module):
    """Two matrices with an activation between, or three with a gate; each token by itself.

    ``activation`` is one of relu, gelu, gelu_tanh, silu, or with a gate reglu, geglu, swiglu
    (Shazeer, 2020). ``d_ff`` is `default_d_ff` unless given. Dropout acts on the inner vector.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        d_ff = default_d_ff(d_model, activation) if d_ff is None else d_ff
        check_at_least(d_model=(1, d_model), d_ff=(1, d_ff))
        check_choice("activation", activation, ACTIVATIONS)
        check_fraction("dropout", dropout)
        self.activation, self.dropout = activation, dropout
        gated = activation in GATES
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias) if gated else None
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return what is to be added to ``x``."""
        check_tensor("x", x, "...", self.up_proj.in_features)
        gate = None if self.gate_proj is None else self.gate_proj(x)
        inner = activate(self.activation, gate, self.up_proj(x))
        return self.down_proj(F.dropout(inner, self.dropout, self.training))


# %% [markdown]
# The two kinds of {numref}`fig-blocks-feedforward`, with a width of 512:

# %%
for activation in ("gelu", "swiglu"):
    network = FeedForward(512, activation=activation)
    shapes = [tuple(matrix.shape) for matrix in network.parameters()]
    print(f"{activation:7} {sum(p.numel() for p in network.parameters()):,} parameters: {shapes}")

# %% [markdown]
# ## The block
#
# Where does the normalization go? The first transformer {cite}`vaswani2017attention` put it
# *behind* the addition, on the stream itself; GPT-2 put it in *front* of the layers, off the
# stream ({numref}`fig-blocks-prepost`). In formulas,
#
# $$
# \text{post: } x' = \operatorname{norm}(x + f(x)), \qquad
# \text{pre: } x' = x + f(\operatorname{norm}(x)) .
# $$ (blocks-prepost)
#
# ```{figure} ../figures/blocks-prepost.svg
# :name: fig-blocks-prepost
# :alt: Two blocks side by side, each read from bottom to top. Left, pre-norm: from the stream a branch goes through norm and attention and is added back, then a branch through norm and feed-forward network is added back; the stream itself is a straight line. Right, post-norm: the branches go through attention and feed-forward network alone, and after each addition a norm stands on the stream.
#
# A block in two arrangements. With pre-norm the stream runs through untouched. With post-norm
# it is rescaled after every addition.
# ```
#
# The block is given its layers, so that any attention and any feed-forward network fit in.


# %%
#| export
class TransformerBlock(nn.Module):
    """Attention and feed-forward network, each normalized and added to the residual stream.

    ``norm(d_model)`` makes a normalization. ``norm_position="pre"`` computes ``x + f(norm(x))``,
    ``"post"`` the original ``norm(x + f(x))``. Dropout acts on what is added to the stream.
    """

    def __init__(
        self,
        d_model: int,
        attention: nn.Module,
        feed_forward: nn.Module,
        *,
        norm: Callable[[int], nn.Module] = RMSNorm,
        norm_position: Literal["pre", "post"] = "pre",
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_size("d_model", d_model)
        for argument, layer in (("attention", attention), ("feed_forward", feed_forward)):
            if not isinstance(layer, nn.Module):
                raise ValueError(f"{argument}: expected a module, got {layer!r:.60}")
        check_choice("norm_position", norm_position, ("pre", "post"))
        check_fraction("dropout", dropout)
        self.d_model, self.norm_position, self.dropout = d_model, norm_position, dropout
        self.attention_norm, self.attention = norm(d_model), attention
        self.feed_forward_norm, self.feed_forward = norm(d_model), feed_forward


# %% [markdown]
# The pass through the block is {eq}`blocks-prepost`, twice:


# %%
#| export
class TransformerBlock(TransformerBlock):  # continued
    def forward(
        self,
        x: Float[Tensor, "batch sequence d_model"],
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch sequence d_model"]:
        """Return the stream after this block; ``rope``, ``mask``, ``cache`` go to attention."""
        check_tensor("x", x, "batch", "sequence", self.d_model)
        attend = partial(self.attention, rope=rope, mask=mask, cache=cache)
        if self.norm_position == "pre":
            x = x + self._dropped(attend(self.attention_norm(x)))
            return x + self._dropped(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self._dropped(attend(x)))
        return self.feed_forward_norm(x + self._dropped(self.feed_forward(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


# %% [markdown]
# Six blocks in a row, and the promise of {numref}`fig-blocks-stream`: the end of the stream is
# its beginning plus everything that was written.

# %%
from llmbook.attention import MultiHeadAttention

torch.manual_seed(0)
blocks = nn.Sequential(
    *(TransformerBlock(32, MultiHeadAttention(32, 4), FeedForward(32)) for _ in range(6))
)
writes: list[Tensor] = []
for block in blocks:
    for layer in (block.attention, block.feed_forward):
        layer.register_forward_hook(lambda layer, inputs, output: writes.append(output.detach()))
start = torch.randn(2, 10, 32)
end = blocks(start)
assert torch.allclose(end, start + sum(writes), atol=1e-4)
sizes = ", ".join(f"{rms(write):.1f}" for write in writes[:4])
print(f"{len(writes)} writes, the first four with an rms of {sizes}")
print(f"the stream: {rms(start):.1f} at the beginning, {rms(end):.1f} at the end")

# %% [markdown]
# The writes are small because PyTorch draws its weights smaller than we assumed; now we draw them
# ourselves.
#
# ## Initialization
#
# What we assumed of the weights becomes a rule. A matrix gets the standard deviation $1/\sqrt{n}$
# for $n$ inputs, its **fan-in**, which keeps the mean square. GPT-2 takes 0.02 for all matrices
# instead; that equals $1/\sqrt n$ for $n = 2{,}500$. And according to {eq}`blocks-growth`, what
# writes to the stream is to be divided by $\sqrt N$:


# %%
@torch.no_grad()
def draw(blocks: nn.Module, n_writes: int) -> None:
    for name, matrix in blocks.named_parameters():
        if matrix.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            matrix.normal_(std=matrix.size(1) ** -0.5 / (n_writes**0.5 if writes else 1))


for n_writes in (1, 12):
    draw(blocks, n_writes)
    expected = (rms(start) ** 2 + 12 / 2 / n_writes) ** 0.5
    print(f"12 writes / √{n_writes:<2} end at {rms(blocks(start)):.1f}, predicted {expected:.1f}")

# %% [markdown]
# The prediction is {eq}`blocks-growth`. We derived it for a plain network with ReLU, and it holds
# for attention and a gated network nearly as well. `initialize_weights(model, n_layers)` is `draw`
# for a whole model; `std=0.02` gives GPT-2's rule.
#
# The equation also says that $v_0$ belongs to the sum: if the embeddings are much smaller than
# what the layers add to them, then the stream hardly knows at first which token it belongs to.
# We give embeddings a standard deviation of 1, and the $N$ writes together are about as large.
# One case is different. Where the embedding matrix also makes the logits (**weight tying**,
# chapter 11), its rows are multiplied with a vector of length $\sqrt d$, and a standard
# deviation of $\sqrt d$ for the logits would be a bad start. There it is $1/\sqrt d$, and the
# writes shrink along with it.

# %% [markdown] tags=["engine"]
# ### Engine room: `initialize_weights`, because a model has more than matrices

# %% [markdown] tags=["engine"]
# There are also tables, gains and tied weights, and GPT-2's rule. Tables of vectors are found by
# their kind, and an embedding is tied if a linear map has the same weight.

# %% tags=["engine"]
#| export
_WRITERS = {"o_proj", "down_proj"}  # their outputs are added to the residual stream


def _default_embedding_std(module: nn.Module) -> float:
    """1, but 1 / sqrt(d_model) if the embedding is also the matrix that makes the logits."""
    heads = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    embeddings = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
    tied = [weight for weight in embeddings if id(weight) in heads]
    return tied[0].size(-1) ** -0.5 if tied else 1.0


def lookup_tables(module: nn.Module) -> set[int]:
    """The identities of all tables of vectors that are looked up."""
    kinds = nn.Embedding | LearnedEmbedding
    return {id(m.weight) for m in module.modules() if isinstance(m, kinds)}


# %% tags=["engine"]
#| export
@torch.no_grad()
def initialize_weights(
    module: nn.Module,
    n_layers: int,
    *,
    std: float | None = None,
    embedding_std: float | None = None,
) -> None:
    """Draw all weights of ``module`` anew, for a model of ``n_layers`` blocks.

    Matrices are normal with standard deviation 1 / sqrt(fan-in), embeddings with ``embedding_std``:
    1, or 1 / sqrt(d_model) if tied to the output. What writes to the stream (``o_proj``,
    ``down_proj``) is scaled by ``embedding_std`` / sqrt(2 ``n_layers``). With ``std`` all have that
    one, writers divided by sqrt(2 ``n_layers``); 0.02 is GPT-2's. Gains become 1, biases 0.
    """
    _check_size("n_layers", n_layers)
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: expected a module, got {module!r:.60}")
    for argument, value in (("std", std), ("embedding_std", embedding_std)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"{argument}: expected None or above 0, got {value!r}")
    start = embedding_std or std or _default_embedding_std(module)
    embeddings, write = lookup_tables(module), (1.0 if std else start) / math.sqrt(2 * n_layers)
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif id(parameter) in embeddings:
            parameter.normal_(std=start)
        else:
            scale = std or parameter.size(-1) ** -0.5
            parameter.normal_(std=scale * (write if _WRITERS & set(name.split(".")) else 1.0))


# %% [markdown]
# ### A model small enough to compare
#
# To measure what this is worth we need something that learns in seconds: stories of
# {doc}`01_tinyworld`, a vocabulary of 512 tokens, one story a row, cut after 64 targets. The
# model is a thin stack of blocks between an embedding and a matrix that makes logits; chapter 11
# builds the real one.


# %%
class SmallModel(nn.Module):
    def __init__(self, n_layers: int, d_model: int = 32, feed_forward=FeedForward, **options):
        super().__init__()
        self.embedding = nn.Embedding(512, d_model)
        self.positions = LearnedEmbedding(64, d_model)
        self.blocks = nn.Sequential()
        for _ in range(n_layers):
            layers = MultiHeadAttention(d_model, 2), feed_forward(d_model)
            self.blocks.append(TransformerBlock(d_model, *layers, **options))
        is_post = options.get("norm_position") == "post"  # its last block ends in a norm
        self.norm = nn.Identity() if is_post else options.get("norm", RMSNorm)(d_model)
        self.head = nn.Linear(d_model, 512, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.size(1))[None]
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.positions(places))))


# %% [markdown]
# Training is the plainest possible: one step of AdamW (chapter 12) for each batch of eight stories,
# optionally with a **warmup**, during which the learning rate rises from zero. `rows` are 4,000
# stories of up to 65 ids, then $-100$, which is no target; `held_out` are 500 more; `loss_of(model,
# batch)` is the mean cross-entropy; and `train(model, learning_rate, steps, warmup=0, extra=None)`
# is a generator that yields the loss of each step, and adds `extra(model)` to what is minimized.

# %% [markdown] tags=["engine"]
# ### Engine room: stories, training loop and deep models, which all experiments below use

# %% [markdown] tags=["engine"]
# The stories as rows of ids, of which 500 are held out:

# %% tags=["engine"]
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe

stories = [story.text for story in TinyWorld().stories(4500, seed=0)]
tokenizer = train_bpe(stories[:500], 512)
end_id = tokenizer.special_tokens["<|endoftext|>"]
rows = torch.full((len(stories), 65), -100)  # -100: no target
for row, story in zip(rows, stories, strict=True):
    ids = [end_id, *tokenizer.encode(story), end_id][: len(row)]
    row[: len(ids)] = torch.tensor(ids)
rows, held_out = rows[:4000], rows[4000:]

# %% [markdown] tags=["engine"]
# The loss, and the loop:


# %% tags=["engine"]
def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1].clamp(min=0))  # what stands for "no target" is no id
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-100)


def train(model, learning_rate: float, steps: int, warmup: int = 0, extra=None) -> Iterator[float]:
    """Train on batches that are the same for all models; yield the loss of each step after it."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / max(warmup, 1))
        loss = loss_of(model, rows[torch.randint(len(rows), (8,), generator=generator)])
        optimizer.zero_grad()
        (loss if extra is None else loss + extra(model)).backward()
        optimizer.step()
        yield loss.item()


# %% [markdown] tags=["engine"]
# A deep model has twelve layers with ReLU and LayerNorm, and may undo the two rules, of scaled
# writes and of large embeddings.


# %% tags=["engine"]
@torch.no_grad()
def multiply(factor: float, *modules: nn.Module) -> None:
    for module in modules:
        module.weight.mul_(factor)


def deep_model(n_layers=12, scaled=True, embeddings=1.0, std=None, **options) -> SmallModel:
    """A deep model, its writes scaled by depth or not, its embeddings multiplied by a factor."""
    torch.manual_seed(0)
    plain = partial(FeedForward, activation="relu")
    model = SmallModel(n_layers, feed_forward=plain, norm=LayerNorm, **options)
    initialize_weights(model, n_layers, std=std)
    multiply(embeddings, model.embedding, model.positions)
    if not scaled:
        for block in model.blocks:
            undo = (2 * n_layers) ** 0.5
            multiply(undo, block.attention.o_proj, block.feed_forward.down_proj)
    return model


# %% [markdown]
# ### Two rules, kept and broken
#
# A `deep_model` has twelve layers with ReLU and LayerNorm. It keeps or breaks two rules: writes
# divided by $\sqrt N$ (`scaled`), and embeddings about as large as all writes together
# (`embeddings`). First, does the stream of real blocks, with attention, grow as predicted?
# Embeddings and positions have $v_0 = 1 + 1$, to which 24 writes add 12 (we count attention's as
# one half, too), or, scaled, one half.

# %%
for scaled, predicted in ((False, 14**0.5), (True, 2.5**0.5)):
    model = deep_model(scaled=scaled)
    start = model.embedding(rows[:16, :-1].clamp(min=0)) + model.positions.weight
    end = rms(model.blocks(start))
    name = "writes / √N" if scaled else "writes as they are"
    print(f"{name:18} rms at the end {end:.1f}, predicted {predicted:.1f}")

# %% [markdown]
# Now three initializations are trained: ours; GPT-2's 0.02; and ours with embeddings of
# $1/\sqrt d$ under the same writes, which outweigh them. Each is tried at three learning rates,
# for a reason that the result shows ({numref}`fig-blocks-initialization`).

# %%
recipes = {
    "fan-in, embeddings 1": {},
    "0.02, as GPT-2": {"std": 0.02},
    "fan-in, embeddings 1/√d": {"embeddings": 32**-0.5},
}
rates = (2e-3, 6e-3, 2e-2)
final = {
    name: [sum(list(train(deep_model(**recipe), rate, 60))[-10:]) / 10 for rate in rates]
    for name, recipe in recipes.items()
}
best = {name: min(losses) for name, losses in final.items()}
ours, gpt2, small = best.values()
assert abs(ours - gpt2) < 0.5 and small > max(ours, gpt2) + 0.5
assert max(ours, gpt2) < 3.5 and small > 4
for name, loss in best.items():
    size = "above 4" if loss > 4 else "below 3.5"
    print(f"{name:24} at its best rate: {size} nats")

# %% [markdown]
# All nine runs:

# %% mystnb={"figure": {"caption": "Loss after 60 steps of a model of twelve layers. Two initializations reach the same loss, but at different learning rates; small embeddings under large writes do not reach it at any.", "name": "fig-blocks-initialization"}, "image": {"alt": "Loss over three learning rates, 0.002, 0.006 and 0.02, for three initializations. Fan-in with embeddings of 1 falls from 4.2 over 3.4 to about 3. The curve of 0.02 falls from 4.2 to 3 at 0.006 and rises above 4 at 0.02. Fan-in with small embeddings stays above 4."}}
plt.figure(figsize=(6, 3.2))
for name, losses in final.items():
    plt.plot(rates, losses, "o-", label=name)
plt.xscale("log")
plt.xticks(rates, [f"{rate:g}" for rate in rates])
plt.minorticks_off()
plt.xlabel("learning rate")
plt.ylabel("loss after 60 steps (nats)")
plt.legend()
plt.show()

# %% [markdown]
# With a single learning rate we would have drawn the wrong conclusion. AdamW moves each weight by
# about the learning rate in a step, whatever the size of its gradient. At a rate of 0.02 a weight
# of 0.02 is replaced at once; it wants a smaller rate than a weight of $1/\sqrt{32} \approx 0.18$.
# Compared at their best, the two recipes are close (ours may do better still at a higher rate).
# What counts is the proportion within the stream.
#
# ## Before or after?
#
# Back to {eq}`blocks-prepost`, first on paper. Suppose that each write is as large as the
# stream. In a *post-norm* block the sum has twice the mean square, and the norm divides it by
# $\sqrt2$. After $N$ additions the share of the embedding is down to $2^{-N/2}$: for twelve
# blocks, 1/4096. That of the last write is $1/\sqrt2$ however deep the model, and its gradient
# has the same factor. In a *pre-norm* block nothing is divided before the last norm, which
# divides the whole stream by $\sqrt{v_N}$. So the deeper the model, the smaller the gradient at
# its last write: with $v_0 = 2$ it should be $\sqrt{5/50} \approx 0.3$ times as large in 48
# blocks as in 3. Earlier writes get more, as we saw. Xiong and colleagues proved for
# transformer blocks at initialization that post-norm's last layers have gradients that do not
# shrink with depth, and pre-norm's do {cite}`xiong2020layer`. Finally, divide the writes of the
# post-norm model by $\sqrt N$. Each norm then divides by $\sqrt{1 + 1/N}$, and $(1 +
# 1/N)^{-N/2} \to e^{-1/2} \approx 0.61$ of the embedding arrives. We measure the gradients at
# initialization ({numref}`fig-blocks-gradients`).

# %%
arrangements = {
    "pre": {"scaled": False},
    "post": {"scaled": False, "norm_position": "post"},
    "pre, writes / √N": {},
    "post, writes / √N": {"norm_position": "post"},
}


def gradient_norms(model: SmallModel) -> list[float]:
    """The gradient of each block's last matrix, on one batch."""
    model.zero_grad()
    loss_of(model, rows[:16]).backward()
    return [block.feed_forward.down_proj.weight.grad.norm().item() for block in model.blocks]


norms = {name: gradient_norms(deep_model(**how)) for name, how in arrangements.items()}
for name, how in arrangements.items():
    values = norms[name]
    last = [gradient_norms(deep_model(n, **how))[-1] for n in (3, 48)]
    print(f"{name:18} last block / middle block: {values[-1] / values[5]:.1f};", end=" ")
    print(f"last of 48 blocks / last of 3: {last[1] / last[0]:.1f}")

# %% [markdown]
# Block by block, for twelve blocks:

# %% mystnb={"figure": {"caption": "Gradient of the last matrix of each block at initialization. With post-norm it is largest at the end, with pre-norm at the beginning; scaled by depth, it is level in both.", "name": "fig-blocks-gradients"}, "image": {"alt": "Gradient norm over blocks 1 to 12 for four arrangements. Post-norm: about 0.3 up to block 9, then rising to 1.0 at block 12. Pre-norm: falling from 0.5 to 0.24. With scaled writes: level at about 0.5 for pre-norm and 0.7 for post-norm."}}
plt.figure(figsize=(6, 3.2))
for (name, values), style in zip(norms.items(), ("o-", "s-", "o--", "s--"), strict=True):
    plt.plot(range(1, 13), values, style, label=name, color="C0" if "pre" in name else "C1")
plt.ylim(0)
plt.xlabel("block")
plt.ylabel("gradient norm")
plt.legend(ncols=2)
plt.show()

# %% [markdown]
# Pre-norm's last gradient shrinks with depth about as predicted, post-norm's does not. Further
# back, post-norm's is not as small as the embedding's share of the stream: nearly all of it has
# come through the layers, by $J$.
#
# Now we train: the two arrangements as they are, post-norm with warmup, and post-norm with
# scaled writes. For comparison we draw the entropy of the tokens' frequencies, which is the
# loss of a model that knows how frequent each token is and looks at nothing.

# %%
runs = {name: arrangements[name] for name in ("pre", "post", "post, writes / √N")}
runs["post, warmup"] = runs["post"]
models = {name: deep_model(**how) for name, how in runs.items()}
curves = {
    name: list(train(model, 3e-3, 150, warmup=100 if "warmup" in name else 0))
    for name, model in models.items()
}
targets = rows[:, 1:][rows[:, 1:] >= 0]
frequencies = targets.bincount() / len(targets)
blind = -torch.special.xlogy(frequencies, frequencies).sum().item()
late = {name: sum(losses[-20:]) / 20 for name, losses in curves.items()}
assert max(late["pre"], late["post, writes / √N"]) < 3 and abs(late["post"] - blind) < 0.1
print(f"entropy of the frequencies: {blind:.1f} nats")
for name, loss in late.items():
    gap = blind - loss
    below = "more than 1.5 nats below that" if gap > 1.5 else "between that and 1.5 nats below"
    print(f"{name:18} ends", below if gap > 0.1 else "within 0.1 nats of that")

# %% [markdown]
# The way there ({numref}`fig-blocks-training`):

# %% mystnb={"figure": {"caption": "Twelve layers trained for 150 steps. Post-norm falls to the entropy of the frequencies and stays there; warmup lets it creep away; scaled writes let it learn like pre-norm.", "name": "fig-blocks-training"}, "image": {"alt": "Loss over 150 steps. Pre-norm and post-norm with scaled writes fall steadily to about 2.6. Post-norm falls to 4.9, a dotted line, and stays on it. With warmup it falls more slowly, and is just below the line at the end."}}
plt.figure(figsize=(6.5, 3.4))
for (name, losses), color in zip(curves.items(), ("C0", "C1", "C2", "C4"), strict=True):
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(dim=1)
    plt.plot(range(10, len(losses) + 1), smooth, label=name, color=color)
plt.axhline(blind, color="C6", linestyle=":", label="entropy of the frequencies")
plt.xlabel("step")
plt.ylabel("loss (nats)")
plt.legend(ncols=2)
plt.show()

# %% [markdown]
# The post-norm model has learned how frequent tokens are, and nothing else. Is it blind to its
# input? We compare its predictions at different places by their distance to the mean prediction:
# the probability that has to be moved to make one of the other, rounded to a quarter. And we look
# at what gradient still arrives at the embeddings.

# %%
for name, model in models.items():
    with torch.no_grad():
        predictions = model(held_out[:50, :-1].clamp(min=0)).softmax(dim=-1).flatten(0, 1)
    distance = (predictions - predictions.mean(dim=0)).abs().sum(dim=-1).mean() / 2
    gradient_norms(model)
    arrives = model.embedding.weight.grad.norm()
    assert arrives > 1e-4 or arrives < 1e-6
    size = "above 1e-4" if arrives > 1e-4 else "below 1e-6"
    moved = f"probability moved {round(4 * distance.item()) / 4:4.2f}"
    print(f"{name:18} {moved}; gradient at the embeddings {size}")

# %% [markdown]
# It is blind, and has no way back: no gradient is left to tell the embeddings so. Warmup spares
# the model the large steps of its last layers at the beginning, when they do this damage
# {cite}`xiong2020layer`, and it begins to learn, late. Weakening the writes helps more, in the
# spirit of DeepNorm, with which post-norm models of 1,000 layers were trained
# {cite}`wang2022deepnet`. Pre-norm needs neither, and is the default.
#
# ## Which feed-forward network?
#
# Does SwiGLU beat GELU, and LayerNorm RMSNorm, at the same number of parameters? A single run says
# little, and so does a single moment. So we take three seeds of the initialization, and look twice,
# after 80 and after 120 steps ({numref}`fig-blocks-kinds`).


# %%
@torch.no_grad()
def held_out_loss(model: SmallModel) -> float:
    return loss_of(model, held_out[:250]).item()


def held_out_losses(activation: str, norm: type[nn.Module], seed: int) -> list[float]:
    """The loss after 80 and after 120 steps on stories that were not trained on."""
    torch.manual_seed(seed)
    width = default_d_ff(48, activation, multiple_of=1)
    network = partial(FeedForward, d_ff=width, activation=activation)
    model = SmallModel(2, 48, feed_forward=network, norm=norm)
    assert sum(p.numel() for p in model.blocks[0].feed_forward.parameters()) == 8 * 48**2
    initialize_weights(model, n_layers=2)
    steps = enumerate(train(model, 1e-2, steps=120), 1)
    return [held_out_loss(model) for step, _ in steps if step in (80, 120)]


# %% [markdown]
# Four kinds of blocks, three seeds each, with feed-forward networks of equal size:

# %%
kinds = {
    "ReLU, RMSNorm": ("relu", RMSNorm),
    "GELU, RMSNorm": ("gelu", RMSNorm),
    "SwiGLU, RMSNorm": ("swiglu", RMSNorm),
    "GELU, LayerNorm": ("gelu", LayerNorm),
}
results = {
    name: torch.tensor([held_out_losses(*kind, seed) for seed in range(3)])
    for name, kind in kinds.items()
}
relu, gelu_rms, swiglu, gelu_layer = (losses.mean(dim=0) for losses in results.values())
early, late = (gelu_rms - swiglu).tolist()
assert early > 0.02 and late < early / 2 and (gelu_rms - gelu_layer).abs().max() < 0.03
leads = {"SwiGLU before GELU": gelu_rms - swiglu, "RMSNorm before LayerNorm": gelu_layer - gelu_rms}
for name, lead in leads.items():
    after = [f"{round(20 * nats) / 20:.2f}" for nats in lead.tolist()]
    print(f"{name:25} after 80 and 120 steps: {', '.join(after)} nats, to a twentieth")

# %% [markdown]
# All twelve runs:

# %% mystnb={"figure": {"caption": "Four kinds of blocks at equal parameters, three seeds each (dots) and their means (bars). After 80 steps SwiGLU leads with every seed, after 120 steps no longer.", "name": "fig-blocks-kinds"}, "image": {"alt": "Two panels of held-out losses for ReLU, GELU and SwiGLU with RMSNorm and GELU with LayerNorm. After 80 steps ReLU is at 1.89, GELU with either norm at 1.85, and all dots of SwiGLU, around 1.80, are to the left of all others. After 120 steps all lie between 1.60 and 1.70, and the groups overlap."}}
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
for column, (ax, steps) in enumerate(zip(axes, (80, 120), strict=True)):
    for place, losses in enumerate(results.values()):
        ax.plot(losses[:, column], [place] * 3, "o", color=f"C{place}")
        middle = [losses[:, column].mean()] * 2
        ax.plot(middle, [place - 0.25, place + 0.25], color=f"C{place}")
    ax.set(title=f"{steps} steps", xlabel="loss on held-out stories (nats)")
axes[0].set_yticks(range(len(results)), list(results))
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# Had we stopped after 80 steps, we would have reported a victory, with every seed. It was only a
# faster start. What remains after 120 steps is within the noise. The experiment says nothing about
# a million steps, or about each kind at its own best rate. Shazeer's larger comparison found SwiGLU
# and GEGLU ahead of GELU by about 0.04 nats {cite}`shazeer2020glu`; at equal parameters the gate
# costs nothing, and so it has become usual. Between the norms we see no difference. RMSNorm is
# chosen because it is simpler.

# %% [markdown]
# ## A mixture of experts
#
# A feed-forward network is a memory, and a token needs little of it. So one may have $E$
# networks, the **experts**, and use only $k$ of them for each token
# {cite}`shazeer2017outrageously`. Then the parameters grow with $E$ and the computation with
# $k$: Mixtral has 47 billion parameters, of which a token meets 13 billion
# {cite}`jiang2024mixtral`. A **router** chooses. It is one matrix with a row for each expert;
# the softmax of its scores gives probabilities $p_i$, and the $k$ largest become weights:
#
# $$
# \operatorname{MoE}(x) = \sum_{i \in \operatorname{top} k} w_i\,e_i(x), \qquad
# w_i = \frac{p_i}{\sum_{j \in \operatorname{top} k} p_j} .
# $$ (blocks-moe)
#
# Token by token this is a few lines:


# %%
def mixture_by_token(x: Tensor, router: Callable, experts: list[nn.Module], k: int) -> Tensor:
    outputs = []
    for token in x:
        weights, chosen = router(token).softmax(dim=-1).topk(k)
        weights = weights / weights.sum()
        pairs = zip(weights, chosen.tolist(), strict=True)
        outputs.append(sum(weight * experts[i](token) for weight, i in pairs))
    return torch.stack(outputs)


# %% [markdown]
# But a matrix product with one row wastes the hardware. The loop has to be turned around: for
# each expert, *gather* the tokens that chose it, let it work on all of them at once, and
# *scatter* the results back to where the tokens stand ({numref}`fig-blocks-moe`).
#
# ```{figure} ../figures/blocks-moe.svg
# :name: fig-blocks-moe
# :alt: Five tokens at the left go through a router, which sends each to two of four experts. In the middle each expert has its own row of gathered tokens; expert 2 has a capacity of three and drops a fourth. At the right the results are weighted and added at the places of the tokens, together with what a shared expert gives to all of them.
#
# Routing five tokens to two experts each. Gathered by expert, computed, and scattered back;
# expert 2 is full and drops token e. A shared expert sees every token.
# ```
#
# What the router decided is kept in an object, because we shall ask about it later. The **load** of
# an expert is the share of tokens that chose it.


# %%
#| export
class Routing(NamedTuple):
    """Where the tokens of a batch go: all probabilities, weights and numbers of the chosen."""

    probabilities: Float[Tensor, "tokens n_experts"]
    weights: Float[Tensor, "tokens n_active"]
    experts: Int64[Tensor, "tokens n_active"]
    capacity: int | None = None

    @property
    def load(self) -> Float[Tensor, " n_experts"]:
        """The share of tokens that chose each expert; the shares sum to ``n_active``."""
        counts = self.experts.flatten().bincount(minlength=self.probabilities.size(1))
        return counts / max(len(self.experts), 1)


# %% tags=["engine"]
#| export
# More active experts than there are is refused.
def _check_active(n_active: int, n_experts: int) -> None:
    _check_size("n_experts", n_experts)
    _check_size("n_active", n_active)
    if n_active > n_experts:
        raise ValueError(f"n_active: expected at most n_experts, {n_experts}, got {n_active}")


# %% [markdown]
# The router's scores, here called logits, become a routing by {eq}`blocks-moe`:


# %%
#| export
def route(
    logits: Float[Tensor, "tokens n_experts"],
    n_active: int,
    *,
    normalize: bool = True,
    capacity: int | None = None,
) -> Routing:
    """Send each token to the ``n_active`` experts with the largest logits.

    Probabilities are over all experts, in float32 (float64 for float64); with ``normalize`` the
    weights of a token sum to one, as in Mixtral. An expert takes at most ``capacity`` tokens.
    """
    check_tensor("logits", logits, "tokens", "n_experts")
    _check_active(n_active, logits.size(1))
    check_at_least(capacity=(0, capacity))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probabilities = wide.softmax(dim=-1)
    weights, experts = probabilities.topk(n_active, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(probabilities, weights, experts, capacity)


# %% [markdown]
# Sorting makes the gathering simple. We list all choices, first choices of all tokens before
# second ones, and sort the list by expert, stably. Each expert's choices are then one piece of
# it.


# %%
#| export
def places_by_expert(routing: Routing) -> list[Int64[Tensor, " places"]]:
    """Return for each expert its tokens, as places in ``routing.experts.T.flatten()``.

    Place ``p`` is token ``p % tokens``. First choices come before second ones, earlier tokens
    before later ones, and what exceeds the capacity is left out.
    """
    chosen = routing.experts.T.flatten()
    counts = chosen.bincount(minlength=routing.probabilities.size(1)).tolist()
    order = chosen.argsort(stable=True).split(counts)
    return [places[: routing.capacity] for places in order]


# %% [markdown]
# Three tokens, three experts, two choices each:

# %%
routing = route(torch.tensor([[3.0, 2.0, 0.0], [1.0, 5.0, 0.0], [4.0, 0.0, 1.0]]), n_active=2)
print("choices of each token:", routing.experts.tolist())
print("places by expert:     ", [places.tolist() for places in places_by_expert(routing)])
print("tokens by expert:     ", [(places % 3).tolist() for places in places_by_expert(routing)])
print("load:", [round(share, 2) for share in routing.load.tolist()])

# %% [markdown]
# A **capacity** bounds how many tokens an expert takes: on hardware where each expert has its own
# device, the batch waits for the fullest one. It is a factor $c$ times the fair share of $Tk/E$
# choices of $T$ tokens. A token that comes too late is *dropped*: the expert adds nothing to it,
# and the stream carries it on. This happens only in training. In use, what becomes of a token must
# not depend on what else is in the batch.
#
# Gather, compute, scatter, against the loop over tokens:

# %%
torch.manual_seed(0)
tokens, router = torch.randn(50, 16), nn.Linear(16, 4, bias=False)
experts = [FeedForward(16, 24) for _ in range(4)]
with torch.no_grad():
    routing = route(router(tokens), n_active=2)
    output, weights = torch.zeros_like(tokens), routing.weights.T.flatten()
    for expert, places in zip(experts, places_by_expert(routing), strict=True):
        which = places % len(tokens)
        output[which] += expert(tokens[which]) * weights[places, None]
    assert torch.allclose(output, mixture_by_token(tokens, router, experts, k=2), atol=1e-5)
print(f"{len(experts)} products for {routing.experts.numel()} choices; loads", end=" ")
print(", ".join(f"{share:.2f}" for share in routing.load.tolist()))

# %% [markdown]
# The module `MixtureOfExperts(d_model, d_ff, n_experts, n_active)` is just that, with two
# additions. The matrices of all experts are stacked, so that a checkpoint has three tensors and not
# three hundred. And what every token needs, such as grammar, would have to be learned by every
# expert; a **shared expert**, which sees all tokens, relieves the others of it
# {cite}`dai2024deepseekmoe`.

# %% [markdown] tags=["engine"]
# ### Engine room: the mixture as modules, with capacity, stacked matrices and a shared expert

# %% [markdown] tags=["engine"]
# The router is a linear map with a capacity while training:


# %% tags=["engine"]
#| export
class Router(nn.Module):
    """Scores the experts for each token by a linear map, and picks the best ``n_active``."""

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        n_active: int,
        normalize: bool = True,
        capacity_factor: float | None = None,
    ):
        super().__init__()
        _check_size("d_model", d_model)
        _check_active(n_active, n_experts)
        number = isinstance(capacity_factor, int | float) and not isinstance(capacity_factor, bool)
        if capacity_factor is not None and not (number and 0 < capacity_factor < math.inf):
            expected = "expected None or a finite number above 0"
            raise ValueError(f"capacity_factor: {expected}, got {capacity_factor!r}")
        self.n_active, self.normalize = n_active, normalize
        self.capacity_factor = capacity_factor
        self.weight = nn.Parameter(torch.randn(n_experts, d_model) / math.sqrt(d_model))

    def forward(self, tokens: Float[Tensor, "tokens d_model"]) -> Routing:
        """Return where each token goes; capacity counts while training only."""
        check_tensor("tokens", tokens, "tokens", self.weight.size(1))
        capacity = None
        if self.training and self.capacity_factor is not None:
            fair = len(tokens) * self.n_active / len(self.weight)
            capacity = math.ceil(self.capacity_factor * fair)
        logits = F.linear(tokens, self.weight)
        return route(logits, self.n_active, normalize=self.normalize, capacity=capacity)


# %% [markdown] tags=["engine"]
# The experts have the form of our feed-forward networks:


# %% tags=["engine"]
#| export
def _stack(n_experts: int, n_out: int, n_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(n_experts, n_out, n_in) / math.sqrt(n_in))


def _expert(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """One feed-forward network with these matrices."""
    gated = None if gate is None else F.linear(x, gate)
    return F.linear(activate(activation, gated, F.linear(x, up)), down)


# %% tags=["engine"]
#| export
class Experts(nn.Module):
    """Feed-forward networks of one shape, their matrices stacked: (expert, out, in)."""

    def __init__(self, d_model: int, d_ff: int, n_experts: int, activation: str = "swiglu"):
        super().__init__()
        check_at_least(d_model=(1, d_model), d_ff=(1, d_ff), n_experts=(1, n_experts))
        check_choice("activation", activation, ACTIVATIONS)
        self.activation, gated = activation, activation in GATES
        self.gate_proj = _stack(n_experts, d_ff, d_model) if gated else None
        self.up_proj = _stack(n_experts, d_ff, d_model)
        self.down_proj = _stack(n_experts, d_model, d_ff)

    def forward(
        self, tokens: Float[Tensor, "tokens d_model"], routing: Routing
    ) -> Float[Tensor, "tokens d_model"]:
        """Return for each token the weighted sum of what its experts give."""
        check_tensor("tokens", tokens, "tokens", self.up_proj.size(-1))
        output, weights = torch.zeros_like(tokens), routing.weights.T.flatten()
        ups, downs = self.up_proj.unbind(), self.down_proj.unbind()
        gates = [None] * len(ups) if self.gate_proj is None else self.gate_proj.unbind()
        groups = zip(places_by_expert(routing), gates, ups, downs, strict=True)
        for places, gate, up, down in groups:
            if len(places):
                which = places % len(tokens)
                result = _expert(tokens[which], gate, up, down, self.activation)
                result = result * weights[places, None]
                output.index_add_(0, which, result.to(output.dtype))
        return output


# %% [markdown] tags=["engine"]
# The mixture puts them together, and remembers its last routing. A tensor that autograd still
# follows cannot be deep-copied; a copied model therefore gets its routing detached.


# %% tags=["engine"]
#| export
class MixtureOfExperts(nn.Module):
    """Many feed-forward networks, of which each token uses the ``n_active`` that a router picks.

    ``d_shared`` is the width of one more that all use. With a ``capacity_factor``, while training,
    an expert drops what exceeds that many times its fair share. Weights sum to one unless
    ``normalize`` is False, which it should be if one expert is active (chapter 10). ``routing`` is
    that of the last batch; padding counts.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        n_active: int,
        *,
        activation: str = "swiglu",
        d_shared: int = 0,
        capacity_factor: float | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        if d_shared is None:
            raise ValueError("d_shared: expected a whole number, got None")
        check_at_least(d_shared=(0, d_shared))
        self.router = Router(d_model, n_experts, n_active, normalize, capacity_factor)
        self.experts = Experts(d_model, d_ff, n_experts, activation)
        self.shared = FeedForward(d_model, d_shared, activation=activation) if d_shared else None
        self.routing: Routing | None = None

    def forward(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape d_model"]:
        """Return what is to be added to ``x``."""
        check_tensor("x", x, "...", self.router.weight.size(1))
        tokens = x.reshape(-1, x.size(-1))
        self.routing = self.router(tokens)
        output = self.experts(tokens, self.routing)
        if self.shared is not None:
            output = output + self.shared(tokens)
        return output.view_as(x)


# %% tags=["engine"]
#| export
class Routing(Routing):  # continued
    @property
    def dropped(self) -> float:
        """The share of choices that found their expert full."""
        kept, choices = sum(map(len, places_by_expert(self))), self.experts.numel()
        return (choices - kept) / max(choices, 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        # A tensor with a history cannot be copied, and a copied model has no use for it.
        return Routing(self.probabilities.detach(), self.weights.detach(), *self[2:])


# %% [markdown] tags=["engine"]
# Three checks. It is the loop over tokens. If all experts are the same, routing makes no
# difference, since weights sum to one. And if all are active with equal weights, the mixture is
# one wide network: the matrices side by side, and the result divided by $E$.

# %% tags=["engine"]
torch.manual_seed(0)
mixture, tokens = MixtureOfExperts(16, 24, n_experts=4, n_active=2), torch.randn(50, 16)
stacked = mixture.experts


def network(gate: Tensor, up: Tensor, down: Tensor) -> FeedForward:
    one = FeedForward(16, len(up))
    matrices = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    one.load_state_dict(matrices)
    return one


with torch.no_grad():
    each = list(map(network, stacked.gate_proj, stacked.up_proj, stacked.down_proj))
    scores = partial(F.linear, weight=mixture.router.weight)
    one_by_one = mixture_by_token(tokens, scores, each, k=2)
    assert torch.allclose(mixture(tokens), one_by_one, atol=1e-4)
    uniform = route(torch.zeros(50, 4), n_active=4)
    down = torch.cat(list(stacked.down_proj), dim=1) / 4
    wide = network(stacked.gate_proj.flatten(0, 1), stacked.up_proj.flatten(0, 1), down)
    assert torch.allclose(stacked(tokens, uniform), wide(tokens), atol=1e-4)
    for matrices in stacked.parameters():
        matrices.copy_(matrices[:1].expand_as(matrices))
    assert torch.allclose(mixture(tokens), each[0](tokens), atol=1e-4)
print("the loop, equal experts, one wide network: all three agree")

# %% [markdown]
# ### The rich get richer
#
# How does a router learn? The gradient of a weight $w_i$ is $\nabla_\mathrm{out} \cdot e_i(x)$, and
# exists only for the chosen experts. An expert that was chosen is trained, gets better, and is
# chosen more often; one that was not stays as it is. (With $k = 1$ normalization makes the only
# weight a constant 1, and the router learns nothing at all from the loss. Then use $p_i$ itself, as
# Switch does {cite}`fedus2022switch`.)

# %%
for normalize in (True, False):
    torch.manual_seed(0)
    single = MixtureOfExperts(16, 24, n_experts=4, n_active=1, normalize=normalize)
    single(torch.randn(50, 16)).square().mean().backward()
    weight = "1" if normalize else "p"
    print(f"k = 1, weight {weight}: gradient of the router {single.router.weight.grad.norm():.1f}")

# %% [markdown]
# We want the loads $f_i$, the shares of tokens that choose expert $i$, to be equal, $1/E$ each for
# $k = 1$. The natural penalty would be $\sum_i f_i^2$: as $\sum_i f_i = 1$, the inequality of
# Cauchy and Schwarz gives $\sum_i f_i^2 \ge 1/E$, with equality at equal loads. But a load is a
# count, and has no gradient. What does have one is the mean probability $P_i = \frac1T \sum_t
# p_{ti}$. So one of the two factors is replaced by it {cite}`fedus2022switch`:
#
# $$
# L_\text{balance} = E \sum_{i=1}^{E} f_i P_i .
# $$ (blocks-balance)


# %%
#| export
class Routing(Routing):  # continued
    @property
    def balance_loss(self) -> Float[Tensor, ""]:
        """``n_experts * sum(load * mean probability)``: ``n_active`` where all is balanced.

        Source: Fedus, Zoph and Shazeer (2022), eq. 4; for several active experts as transformers'
        ``load_balancing_loss_func``. Only the probabilities carry a gradient.
        """
        return self.load.numel() * (self.load * self.probabilities.mean(dim=0)).sum()


# %% [markdown]
# If all is equal, it is 1, or $k$ with $k$ choices. What does it ask of the router? With
# $\partial p_{ti}/\partial s_{tj} = p_{ti}\,(\delta_{ij} - p_{tj})$ for the scores $s$ of a
# softmax,
#
# $$
# \frac{\partial L_\text{balance}}{\partial s_{tj}}
# = \frac{E}{T}\; p_{tj}\,\Bigl(f_j - \sum_i f_i\,p_{ti}\Bigr) .
# $$ (blocks-balance-gradient)
#
# A descent step lowers the score of each expert whose load is above the mean load that the token
# expects, and raises the others. The value is *not* a distance from balance: $f$ and $P$ need not
# agree, and then it can even be less than 1.

# %%
torch.manual_seed(0)
logits = torch.randn(200, 8, requires_grad=True)
routing = route(logits, n_active=1)
routing.balance_loss.backward()
p, load = routing.probabilities.detach(), routing.load
by_hand = 8 / 200 * p * (load - (p @ load)[:, None])
assert torch.allclose(by_hand, logits.grad, atol=1e-6)
print(f"random scores: value {routing.balance_loss.item():.2f}")

torn = torch.tensor([[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4).log()  # six undecided, four decided
print(f"loads 0.6 and 0.4: value {route(torn, n_active=1).balance_loss.item():.2f}")

# %% [markdown]
# A layer has the load and the penalty of its last batch at hand, as `load` and `balance_loss`;
# `routing` is the last routing, and its `dropped` the share of choices that found their expert
# full.


# %% tags=["engine"]
#| export
# Load and penalty of the last batch, as properties of the layer.
class MixtureOfExperts(MixtureOfExperts):  # continued
    @property
    def load(self) -> Float[Tensor, " n_experts"]:
        """The share of tokens of the last batch that chose each expert; see `Routing`."""
        return self._last().load

    @property
    def balance_loss(self) -> Float[Tensor, ""]:
        """The penalty for unequal loads in the last batch, to be added to the loss."""
        return self._last().balance_loss

    def _last(self) -> Routing:
        if self.routing is None:
            raise RuntimeError("nothing has been routed yet: load and loss are of the last batch")
        return self.routing


# %% [markdown]
# Now the experiment: three layers, 16 experts of which one is active, with and without the
# penalty. It is added to the loss with a small factor, here 0.02, for each layer. We record the
# load of the third layer at every step ({numref}`fig-blocks-load`).


# %%
def train_mixture(factor: float) -> tuple[SmallModel, list[float], Tensor]:
    torch.manual_seed(0)
    sparse = partial(MixtureOfExperts, d_ff=32, n_experts=16, n_active=1, normalize=False)
    model, loads = SmallModel(3, feed_forward=sparse), []
    initialize_weights(model, n_layers=3)

    def penalty(model: SmallModel) -> Tensor:
        loads.append(model.blocks[2].feed_forward.load)
        return factor * sum(block.feed_forward.balance_loss for block in model.blocks)

    losses = list(train(model, 3e-3, steps=100, extra=penalty))
    return model, losses, torch.stack(loads)


mixtures = {factor: train_mixture(factor) for factor in (0.0, 0.02)}
for factor, (_, _, loads) in mixtures.items():
    last = loads[-20:].mean(dim=0)
    most, idle = 16 * last.max().item(), int((last < 0.1 / 16).sum())
    least, about = 2 ** math.floor(math.log2(most)), 4 * round(idle / 4)
    print(f"factor {factor}: the fullest has {least} to {2 * least} times its share;", end=" ")
    print(f"all but idle: {f'about {about} of 16' if about else 'none'}")
difference = sum(mixtures[0.0][1][-20:]) / 20 - sum(mixtures[0.02][1][-20:]) / 20
assert abs(difference) < 0.25
print("the losses differ by less than a quarter of a nat")

# %% [markdown]
# Step by step:

# %% mystnb={"figure": {"caption": "Load of the 16 experts of the third layer over training, each row an expert, sorted by their load at the end. Without the penalty a few take nearly everything; with it nearly all take part.", "name": "fig-blocks-load"}, "image": {"alt": "Two heat maps, steps 0 to 100 from left to right, experts from top to bottom. Left, without balance loss: three bright rows, the others dark from step 15 on. Right, with it: some bright stretches before step 30, and from step 60 on nearly all rows have about the same dim color."}}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for ax, (factor, (_, _, loads)) in zip(axes, mixtures.items(), strict=True):
    order = loads[-20:].mean(dim=0).argsort(descending=True)
    image = ax.imshow(loads[:, order].T, aspect="auto", vmin=0, vmax=0.4, interpolation="none")
    ax.set(title=f"factor {factor}", xlabel="step")
    ax.grid(False)
axes[0].set_ylabel("expert")
fig.colorbar(image, ax=axes, label="share of tokens")
plt.show()

# %% [markdown]
# At this size the loss hardly changes. What the balance buys is evenly spread work. With a capacity
# of 1.25 times the fair share, the collapsed router would drop much of the text:

# %%
for factor, (model, _, _) in mixtures.items():
    layer = model.blocks[2].feed_forward
    with torch.no_grad():
        model(held_out[:100, :-1].clamp(min=0))
    full = layer.routing._replace(capacity=math.ceil(1.25 * 100 * 64 / 16))
    print(f"factor {factor}: share of choices dropped: about {round(5 * full.dropped) / 5:.1f}")

# %% [markdown]
# ## Is it the real thing?
#
# First PyTorch's own layers, forward and gradient, for both backends; then its
# `TransformerEncoderLayer`, in both arrangements, with our weights copied into it and a causal
# mask. We say how far results are apart in units of the largest number, and are content below a
# hundred-thousandth, which is what 32-bit floats can tell apart after some sums.


# %%
def apart(ours: nn.Module, theirs: nn.Module, x: Tensor, **options) -> str:
    """How far outputs, and gradients with respect to the input, differ."""
    results = []
    for module, extra in ((ours, {}), (theirs, options)):
        leaf = x.clone().requires_grad_()
        out = module(leaf, **extra)
        out = out[0] if isinstance(out, tuple) else out
        out.sin().sum().backward()
        results.append((out, leaf.grad))
    pairs = zip(*results, strict=True)
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return "below 0.00001" if worst < 1e-5 else f"{worst:.5f}"


torch.manual_seed(0)
x = torch.randn(2, 12, 64)
for backend in ("reference", "torch"):
    pairs = [(LayerNorm(64, backend=backend), nn.LayerNorm(64))]
    pairs.append((RMSNorm(64, backend=backend), nn.RMSNorm(64, eps=1e-5)))
    for ours, theirs in pairs:
        nn.init.uniform_(ours.weight)
        theirs.load_state_dict(ours.state_dict())
    pairs += [(GELU(kind, backend), nn.GELU(kind)) for kind in ("none", "tanh")]
    for ours, theirs in pairs:
        kind = f"{type(ours).__name__} {getattr(ours, 'approximate', '')}"
        print(f"{backend:10} {kind:11}", apart(ours, theirs, x))

# %% [markdown]
# The encoder layer holds attention and feed-forward network under names of its own:

# %%
mask = nn.Transformer.generate_square_subsequent_mask(12)
for position in ("pre", "post"):
    first = position == "pre"
    theirs = nn.TransformerEncoderLayer(
        64, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=first
    )
    attention = MultiHeadAttention(64, 4, bias=True)
    feed_forward = FeedForward(64, 256, activation="gelu", bias=True)
    ours = TransformerBlock(64, attention, feed_forward, norm=LayerNorm, norm_position=position)
    initialize_weights(ours, n_layers=1)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    theirs.self_attn.in_proj_weight.data = torch.cat([p.weight.data for p in projections])
    theirs.self_attn.out_proj.load_state_dict(attention.o_proj.state_dict())
    theirs.linear1.load_state_dict(feed_forward.up_proj.state_dict())
    theirs.linear2.load_state_dict(feed_forward.down_proj.state_dict())
    print(f"TransformerEncoderLayer, {position}-norm:", apart(ours, theirs, x, src_mask=mask))

# %% [markdown]
# Llama's block and Mixtral's mixture in transformers agree as well, weight for weight.

# %% [markdown] tags=["engine"]
# ### Engine room: the block of Llama and the mixture of Mixtral, and what their weights are called

# %% [markdown] tags=["engine"]
# The block of Llama has rotary positions:

# %% tags=["engine"]
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like a widget for its progress
    from transformers import LlamaConfig, MixtralConfig
    from transformers.models.llama import modeling_llama
    from transformers.models.mixtral import modeling_mixtral

from llmbook.positions import RotaryEmbedding

config = LlamaConfig(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=176
)
config._attn_implementation = "sdpa"
llama = modeling_llama.LlamaDecoderLayer(config, layer_idx=0)
block = TransformerBlock(
    64,
    MultiHeadAttention(64, 4, n_kv_heads=2),
    FeedForward(64, 176),
    norm=partial(RMSNorm, eps=config.rms_norm_eps),
)

# %% tags=["engine"]
names = {"attention_norm": "input_layernorm", "attention": "self_attn"}
names |= {"feed_forward_norm": "post_attention_layernorm", "feed_forward": "mlp"}
for ours, theirs in names.items():
    getattr(llama, theirs).load_state_dict(getattr(block, ours).state_dict())
places = torch.arange(12)[None]
rotation = modeling_llama.LlamaRotaryEmbedding(config)(x, places)
rope = RotaryEmbedding(16)(places)
print("LlamaMLP:         ", apart(block.feed_forward, llama.mlp, x))
print(
    "LlamaDecoderLayer:", apart(partial(block, rope=rope), llama, x, position_embeddings=rotation)
)

# %% [markdown] tags=["engine"]
# Mixtral stacks gate and up into one tensor, and has the same penalty:

# %% tags=["engine"]
config = MixtralConfig(
    hidden_size=64, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
)
config._experts_implementation = "eager"
mixtral = modeling_mixtral.MixtralSparseMoeBlock(config)
ours = MixtureOfExperts(64, 96, n_experts=4, n_active=2)
with torch.no_grad():
    mixtral.gate.weight.copy_(ours.router.weight)
    experts = ours.experts
    mixtral.experts.gate_up_proj.copy_(torch.cat([experts.gate_proj, experts.up_proj], dim=1))
    mixtral.experts.down_proj.copy_(experts.down_proj)
print("MixtralSparseMoeBlock:", apart(ours, mixtral, x))
logits = ours.router.weight @ x.flatten(0, 1).T
theirs = modeling_mixtral.load_balancing_loss_func((logits.T,), num_experts=4, top_k=2)
assert torch.allclose(ours.balance_loss, theirs)
print(f"balance loss {ours.balance_loss.item():.3f}, load_balancing_loss_func {theirs.item():.3f}")

# %% [markdown]
# ## How fast is it?
#
# Forward and backward, in turns, the best of ten of each, in one thread: our RMSNorm against
# Llama's and against LayerNorm, our block against Llama's with equal weights, and the experts' loop
# against the loop over tokens. Above 1 the first of a pair is the faster. (`block` and `llama`,
# `mixture` and its loop `each` are those of the engine rooms above.)


# %%
def best_times(*functions, repeats: int = 10) -> list[float]:
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function().sum().backward()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


threads = torch.get_num_threads()
torch.set_num_threads(1)
x = torch.randn(16, 128, 256, requires_grad=True)
norms = RMSNorm(256), modeling_llama.LlamaRMSNorm(256), LayerNorm(256)
rms_time, llama_time, layer_time = best_times(*(partial(norm, x) for norm in norms))
speed = {"RMSNorm, against Llama's": llama_time / rms_time}
speed["RMSNorm, against LayerNorm"] = layer_time / rms_time
speed["Llama's RMSNorm, against LayerNorm"] = layer_time / llama_time

# %% [markdown]
# Then the block and the mixture:

# %% tags=["nbval-ignore-output"]
h = torch.randn(16, 128, 64, requires_grad=True)
places = torch.arange(128)[None]
rotation, rope = (
    modeling_llama.LlamaRotaryEmbedding(llama.self_attn.config)(h, places),
    RotaryEmbedding(16)(places),
)
ours, theirs = best_times(
    lambda: block(h, rope=rope), lambda: llama(h, position_embeddings=rotation)
)
speed["block, against Llama's"] = theirs / ours
few = torch.randn(64, 16)
ours, theirs = best_times(
    lambda: mixture(few), lambda: mixture_by_token(few, scores, each, 2), repeats=3
)
speed["mixture, against the loop over tokens"] = theirs / ours
torch.set_num_threads(threads)
for name, ratio in speed.items():
    print(f"{name:38} {ratio:5.1f} times as fast")

# %% [markdown]
# Most of a block's time goes into matrix products and attention, which are the same for both: a
# faster norm changes little at this size. On this CPU PyTorch's LayerNorm, a single kernel, is
# faster than either RMSNorm.
#
# ## Exercises
#
# ````{exercise} Fold the gain away
# :label: ex-blocks-fold
# *Ten minutes.* A gain $g$ in front of a matrix is not needed in use: $W (g \odot y) = W' y$.
# Write `fold_gain(norm, linear)`, which changes the matrix and sets the gain to one, in place, so
# that `linear(norm(x))` stays what it was. Why is the gain there in training, if it can be folded
# away?
# ````


# %% tags=["solution"]
def fold_gain(norm: RMSNorm, linear: nn.Linear) -> None:
    """Move the gain of ``norm`` into the matrix that reads from it, in place."""
    # Another parametrization makes for other steps: one number scales a whole column at once. And
    # where several matrices read the same norm, they share it.
    with torch.no_grad():
        linear.weight.mul_(norm.weight)  # column j is multiplied with gain j
        norm.weight.fill_(1.0)


# %% tags=["check"]
torch.manual_seed(0)
norm, linear, x = RMSNorm(8), nn.Linear(8, 8), torch.randn(20, 8)
norm.weight.data.uniform_(0.5, 2.0)
gain, before = norm.weight.detach().clone(), linear(norm(x))
matrix, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
fold_gain(norm, linear)
assert torch.equal(norm.weight, torch.ones(8)), f"the gain becomes one, not {norm.weight.tolist()}"
assert torch.equal(linear.bias, bias), "the bias is added after the matrix: it has no gain"
first = linear.weight[:, 0] / matrix[:, 0]
assert torch.allclose(first, gain[0].expand(8)), "column j of the matrix is multiplied with gain j"
worst = (linear(norm(x)) - before).abs().max()
assert worst < 1e-4, f"the result stays the same, but is off by {worst:.2g}"

# %% [markdown]
# ````{exercise} From LayerNorm to RMSNorm
# :label: ex-blocks-center
# *Twenty minutes.* If everything that is ever written to the stream has mean zero, LayerNorm
# and RMSNorm do the same to it. Write `center_writes(model)` for a `SmallModel` with LayerNorm,
# which changes embeddings, positions and the matrices that write, in place, so that all they
# produce has mean zero, and the model's logits stay the same. (No layer has a bias.) Why is the
# last part possible?
# ````


# %% tags=["solution"]
def center_writes(model: SmallModel) -> None:
    """Subtract from everything that is written to the stream its mean over the features."""
    # LayerNorm subtracts the mean before anything is read, the last one before the logits. So no
    # layer sees what is taken away here.
    with torch.no_grad():
        for table in (model.embedding, model.positions):
            table.weight.sub_(table.weight.mean(dim=1, keepdim=True))
        for block in model.blocks:
            for matrix in (block.attention.o_proj, block.feed_forward.down_proj):
                matrix.weight.sub_(matrix.weight.mean(dim=0, keepdim=True))  # over outputs


# %% tags=["check"]
torch.manual_seed(0)
model, ids = SmallModel(2, norm=LayerNorm), torch.randint(512, (3, 20))
before, names = model(ids), set(model.state_dict())
center_writes(model)
places = torch.arange(20)[None]
stream = model.embedding(ids) + model.positions(places)
for name, table in (("the embeddings", model.embedding), ("the positions", model.positions)):
    mean = table.weight.mean(dim=1).abs().max()
    assert mean < 1e-5, f"each vector of {name} has mean zero, not up to {mean:.2g}"
for number, block in enumerate(model.blocks):
    stream = block(stream)
    mean = stream.mean(dim=-1).abs().max()
    assert mean < 1e-4, f"after block {number} the stream has means of up to {mean:.2g}, not zero"
worst = (model(ids) - before).abs().max() / before.abs().max()
assert worst < 1e-4, f"the logits stay the same, but are off by {worst:.2g} of the largest"
assert set(model.state_dict()) == names, "the same weights, changed in place"
other = SmallModel(2, norm=RMSNorm)
other.load_state_dict(model.state_dict(), strict=False)  # it has no biases
worst = (other(ids) - before).abs().max() / before.abs().max()
assert worst < 1e-4, "with RMSNorm it is the same model"

# %% [markdown]
# ````{exercise} SwiGLU backward
# :label: ex-blocks-swiglu
# *Fifteen minutes.* Derive the gradients of $\operatorname{SiLU}(a) \odot b$ with respect to
# $a$ and $b$, and write `swiglu_gradients(a, b, to_out)`. Express the derivative of SiLU by
# $\sigma(a)$. Which tensors must the forward pass keep, if the rest is computed again?
# ````


# %% tags=["solution"]
def swiglu_gradients(a: Tensor, b: Tensor, to_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``silu(a) * b``, given that of the result."""
    # sigma' = sigma (1 - sigma), so silu' = sigma + a sigma (1 - sigma). Keeping a and b is enough;
    # autograd keeps silu(a) as well, half as much again.
    gate = torch.sigmoid(a)
    return to_out * b * gate * (1 + a * (1 - gate)), to_out * a * gate


# %% tags=["check"]
torch.manual_seed(0)
a, b = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
to_out = torch.randn(4, 6, dtype=torch.float64)
SwiGLU()(a, b).backward(to_out)
to_a, to_b = swiglu_gradients(a.detach(), b.detach(), to_out)
assert torch.allclose(to_b, b.grad), (
    "the gradient of b is that of a product, times that of the result"
)
assert torch.allclose(to_a, a.grad), "the gradient of a needs b, and the derivative of SiLU"
far = torch.full((2, 3), 800.0, dtype=torch.float64)
to_a, _ = swiglu_gradients(-far, torch.ones_like(far), torch.ones_like(far))
assert not to_a.any(), f"far below zero SiLU is flat, so the gradient of a is 0, not {to_a[0, 0]}"

# %% [markdown]
# ````{exercise} Two layers at once
# :label: ex-blocks-parallel
# *Twenty minutes.* GPT-J and PaLM {cite}`chowdhery2023palm` compute both layers from the same
# input: $x' = x + \operatorname{attention}(\operatorname{norm}(x)) +
# f(\operatorname{norm}(x))$. Write `ParallelBlock(d_model, attention, feed_forward)`. Its
# attributes are `norm`, one RMSNorm for both layers, `attention` and `feed_forward`; keyword
# arguments of `forward`, such as `rope`, go to attention. What is won on hardware, and what is
# lost in the model?
# ````


# %% tags=["solution"]
class ParallelBlock(nn.Module):
    """Attention and feed-forward network side by side, reading the same normalized stream."""

    # Won: one norm less, and matrices that read the same input can be multiplied in one product.
    # Lost: the feed-forward network sees what attention has gathered only in the next block.
    def __init__(self, d_model: int, attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, x: Tensor, **options) -> Tensor:
        """Return the stream after this block; the options go to attention."""
        y = self.norm(x)
        return x + self.attention(y, **options) + self.feed_forward(y)


# %% tags=["check"]
from llmbook.positions import RotaryEmbedding

torch.manual_seed(0)
parallel = ParallelBlock(32, MultiHeadAttention(32, 4), FeedForward(32))
x = torch.randn(2, 10, 32)
norms = [module for module in parallel.modules() if isinstance(module, RMSNorm)]
assert norms == [parallel.norm], f"one norm serves both layers, not {len(norms)}"
nn.init.uniform_(parallel.norm.weight, 0.5, 2)
y, found = parallel.norm(x), parallel(x)
attended, transformed = parallel.attention(y), parallel.feed_forward(y)


def is_sum(*parts: Tensor) -> bool:
    return torch.allclose(found, sum(parts), atol=1e-4)


assert not is_sum(attended, transformed), "x itself is added, too, as in any block"
late = parallel.feed_forward(parallel.norm(x + attended))
assert not is_sum(x, attended, late), "the feed-forward network does not wait for attention"
assert is_sum(x, attended, transformed), "x plus what both layers make of norm(x)"
with_rope = parallel(x, rope=RotaryEmbedding(8)(torch.arange(10)[None]))
assert not torch.allclose(with_rope, found), "the options reach attention"

# %% [markdown]
# ````{exercise} Let the experts choose
# :label: ex-blocks-choice
# *Half an hour.* Zhou and colleagues {cite}`zhou2022mixture` turn the choice around: each
# expert takes the `capacity` tokens that give it the highest probability, by a softmax over the
# experts. Write `expert_choice(logits, capacity)` for logits of shape (tokens, experts). It
# returns these probabilities and the numbers of the tokens, both of shape (experts, capacity),
# best first. Loads are then equal by construction. How often may a token be chosen? And why is
# this unfit for a model that writes text from left to right?
# ````


# %% tags=["solution"]
def expert_choice(
    logits: Float[Tensor, "tokens n_experts"], capacity: int
) -> tuple[Float[Tensor, "n_experts capacity"], Int64[Tensor, "n_experts capacity"]]:
    """Return for each expert the weights and numbers of the tokens that it takes, best first."""
    # A token may be chosen by no expert, or by all. Whether it is depends on tokens that come
    # later, which a model that writes does not know: training would look into the future.
    weights, tokens = logits.softmax(dim=-1).T.topk(capacity, dim=-1)
    return weights, tokens


# %% tags=["check"]
torch.manual_seed(0)
logits = torch.randn(12, 3)
weights, tokens = expert_choice(logits, capacity=4)
shapes = f"{tuple(weights.shape)} and {tuple(tokens.shape)}"
expected = (3, 4)
assert weights.shape == tokens.shape == expected, (
    f"each expert takes 4 tokens: (3, 4), not {shapes}"
)
probabilities = logits.softmax(dim=1)
for expert in range(3):
    chosen = tokens[expert].tolist()
    assert len(set(chosen)) == 4, f"expert {expert} takes a token twice: {chosen}"
    left = [token for token in range(12) if token not in chosen]
    worst = probabilities[chosen, expert].min()
    assert worst >= probabilities[left, expert].max(), f"expert {expert} leaves a better token"
    of_token = probabilities[tokens[expert], expert]
    rule = "a weight is the probability of the expert for its token, by a softmax over experts"
    assert torch.allclose(weights[expert], of_token), rule
    assert weights[expert].tolist() == sorted(weights[expert].tolist(), reverse=True), "best first"

# %% [markdown]
# ## Summary
#
# Layers add to a residual stream, so that the gradient has a direct way, $I$ in $I + J$. Adding
# without normalizing grows exponentially, normalizing what is read makes it a square root, and
# writes divided by $\sqrt{2\,n_\text{layers}}$ keep the stream level. LayerNorm projects onto a
# sphere in the plane of mean zero, RMSNorm onto a sphere; their gradients drop what points
# along the output. Post-norm weakens the past with every addition, and a deep model can go
# blind. A gated network has three matrices and two thirds of the width. A mixture of experts has
# the parameters of all experts at the cost of a few, and needs a penalty so that they take part.
#
# **Checklist: a block for a new model.**
#
# - Pre-norm with RMSNorm, SwiGLU with $d_\text{ff} \approx \frac83 d$, no biases, no dropout:
#   Llama's choices, and a good start.
# - Initialize matrices by their fan-in, writers divided by $\sqrt{2\,n_\text{layers}}$. See that
#   embeddings are about as large as all writes together.
# - Before training, print the rms of the stream and the gradient norm of every block. Both should
#   be level.
# - Compare two recipes each at its own best learning rate, and over several seeds.
# - A mixture of experts: give each token two of them or more, add the balance loss with a factor
#   of about 0.01, watch the load of every layer, and drop tokens in training only.
#
# **Further reading.** Xiong and colleagues {cite}`xiong2020layer` on the place of the norm,
# Elhage and colleagues {cite}`elhage2021framework` on the residual stream, Fedus, Zoph and
# Shazeer {cite}`fedus2022switch` on routing. Next, chapter 11 stacks the blocks into a model.
