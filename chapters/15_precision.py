# %% [markdown]
# # Mixed precision
#
# > Train with fewer bits: what rounding to 16, 8, or 4 bits costs, where it fails, and the recipe
# > that makes it safe.
#
# Almost every number in our models so far has taken 32 bits. Half as many bits would take half the
# memory, and processors built for short numbers multiply them several times as fast. So it's
# tempting to convert the whole model to 16 bits and train as before. Nothing crashes. The loss
# falls, too, just not as far as it should.
#
# To see what went wrong, we take numbers apart bit by bit and round them ourselves. Then we can say
# which parts of a training step may be short, and how the rest is protected. After that we count
# how much memory this saves, look at what a compiler adds, and go down to 8 and 4 bits.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.precision.float_fields`, {py:func}`~llmbook.precision.round_to`, {py:func}`~llmbook.precision.quantize_blocks`, {py:func}`~llmbook.precision.emulate`, {py:class}`~llmbook.precision.CastProducts`, {py:class}`~llmbook.precision.GradScaler`, {py:class}`~llmbook.precision.MixedPrecision`, {py:func}`~llmbook.precision.memory_breakdown` |
# | **You need** | the count of activations in {doc}`11_model`, optimizers ({doc}`12_optimization`), the training loop ({doc}`13_training`), quantization in {doc}`14_generation`, logarithms |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 90 seconds to run |

# %% tags=["remove-cell"]
#| default_exp precision

# %% tags=["engine"]
#| export
# The imports of the module
import json
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.resources import files
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import nn, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

# %% [markdown]
# ## Two runs that go wrong
#
# The data are stories of the tiny world, one to a row; `sampler` deals them out in batches of
# eight. The model is `trained`, the one that {doc}`13_training` made.

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.blocks import GATES
from llmbook.environment import check_at_least, check_choice, check_fraction, check_text
from llmbook.environment import check_whole
from llmbook.model import ModelConfig, TransformerLM, activation_bytes, count_parameters
from llmbook.model import parameter_counts
from llmbook.optimization import AdamW, clip_gradients
from llmbook.positions import check_tensor
from llmbook.training import Precision

# %% [markdown]
# `train(model, store, rate, n_steps)` is a plain loop with AdamW and one addition: after each step
# it passes every weight through a function, `weight.copy_(store(weight))`, which may round it to 16
# bits. It returns the losses and the share of the weights that the last step changed.
# `new_model(seed)` makes a small model with random weights.

# %% [markdown] tags=["engine"]
# ### Engine room: the data, the training loop, and the drawing of all figures of the chapter

# %% tags=["engine"]
# What the experiments need, and their data
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt

from llmbook.batches import BatchSampler, pack_documents, write_shards
from llmbook.environment import seed_everything
from llmbook.tinyworld import TinyWorld
from llmbook.training import compact, next_token_objective, pretrained

plt.style.use("llmbook.book")
torch.set_num_threads(1)
trained = pretrained("tinyworld")
stories = [story.text for story in TinyWorld().stories(1500, seed=1)]
shards = write_shards(stories, Path(tempfile.mkdtemp()) / "stories", trained.tokenizer)
sampler = BatchSampler(pack_documents(shards, 128, "one_per_row"), batch_size=8)


# %% [markdown] tags=["engine"]
# `next_token_objective` returns the summed loss of a batch and the number of its targets.


# %% tags=["engine"]
def train(model: nn.Module, store: Callable, rate: float, n_steps: int) -> tuple[list, float]:
    """The losses, and the share of the weights that the last step moved."""
    optimizer = AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for step in range(n_steps):
        total, count = next_token_objective(model, compact(sampler[step]))
        optimizer.zero_grad()
        (total / count).backward()
        before = nn.utils.parameters_to_vector(model.parameters())
        optimizer.step()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(store(weight))
        losses.append((total / count).item())
    after = nn.utils.parameters_to_vector(model.parameters())
    return losses, (before != after).float().mean().item()


# %% tags=["engine"]
def new_model(seed: int, **changes: Any) -> TransformerLM:
    seed_everything(seed)
    sizes = {"context_length": 128, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64}
    return TransformerLM(ModelConfig(vocab_size=trained.tokenizer.vocab_size, **sizes | changes))


# %% [markdown] tags=["engine"]
# The second experiment converts the whole model and looks at the gradients of its output layer:


# %% tags=["engine"]
def zero_share(dtype: torch.dtype) -> float:
    model = deepcopy(trained.model).to(dtype)
    total, count = next_token_objective(model, compact(sampler[0]))
    (total / count).backward()
    return (model.lm_head.weight.grad == 0).float().mean().item()


# %% [markdown] tags=["engine"]
# The functions that draw figures come in the order of the figures. They get what they draw from the
# cells of the main line.


# %% tags=["engine"]
def draw_losses(curves: dict[str, Tensor]) -> None:
    _, ax = plt.subplots()
    for color, (name, runs) in zip(("C0", "C1"), curves.items(), strict=True):
        for losses in runs:
            ax.plot(losses, color=color, alpha=0.4, linewidth=1)
        ax.plot(runs.mean(dim=0), color=color, label=f"weights in {name}")
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    ax.legend()
    plt.show()


# %% tags=["engine"]
def draw_formats() -> None:
    _, axes = plt.subplots(1, 2, width_ratios=[3, 4])
    short = ["float4_e2m1fn", "float8_e4m3fn", "float8_e5m2"]
    for row, name in enumerate(short):
        format = FORMATS[name]
        codes = range(1, 2 ** (format.bits - 1))
        values = [v for code in codes if math.isfinite(v := format.decode(code))]
        axes[0].vlines(values, row - 0.3, row + 0.3, color=f"C{row}", linewidth=0.9)
    axes[0].set(
        xscale="log", yticks=range(3), yticklabels=["e2m1", "e4m3", "e5m2"], xlabel="number"
    )
    sizes = 2 ** torch.linspace(-30, 20, 2000, dtype=torch.float64)
    for color, name in enumerate([*short, "float16", "bfloat16"]):
        format = FORMATS[name]
        inside = sizes[(sizes < format.largest) & (sizes > format.smallest_subnormal)]
        exponent = inside.log2().floor().clamp(min=format.smallest_exponent)
        error = 2 ** (exponent - format.fraction_bits) / 2 / inside
        axes[1].plot(inside, error, color=f"C{color}", label=name, linewidth=1.2)
    axes[1].set(
        xscale="log", yscale="log", ylim=(1e-4, 100), xlabel="number", ylabel="relative error"
    )
    axes[1].legend(ncols=2, loc="upper right")
    plt.show()


# %% tags=["engine"]
def draw_walk(spacing: float, generator: torch.Generator) -> None:
    paths = torch.ones(1001, 12)
    for step in range(1000):
        wanted = paths[step] + 0.01 * spacing
        paths[step + 1] = round_to(wanted, "bfloat16", rounding="stochastic", generator=generator)
    _, ax = plt.subplots()
    ax.plot((paths - 1) / spacing, color="C0", alpha=0.4, linewidth=1)
    ax.plot([0, 1000], [0, 10], color="C1", label="wanted")
    ax.plot([0, 1000], [0, 0], color="C3", label="to nearest")
    ax.plot([], [], color="C0", alpha=0.5, label="stochastic, 12 weights")
    ax.set(xlabel="step", ylabel="movement (spacings)")
    ax.legend()
    plt.show()


def draw_sums(errors: dict, lengths: list[int]) -> None:
    _, axes = plt.subplots(1, 3, figsize=(7, 3))
    for ax, dtype in zip(axes, (torch.bfloat16, torch.float16, torch.float32), strict=True):
        for way, style in zip(("one by one", "in pairs", "Kahan", "wide"), "---:", strict=True):
            ax.plot(lengths, [errors[dtype, way, n] for n in lengths], style, label=way)
        ax.axhline(torch.finfo(dtype).eps / 2, color="gray", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="terms", title=str(dtype).removeprefix("torch."))
    axes[0].set_ylabel("relative error")
    axes[1].legend(fontsize=8)
    plt.show()


# %% tags=["engine"]
def draw_gradients(values: Tensor) -> None:
    _, axes = plt.subplots(figsize=(7, 2.8))
    bins = np.arange(-36, 19)
    for scale, color in ((1.0, "C1"), (2.0**16, "C0")):
        exponents = torch.log2(values * scale).floor().numpy()
        label = "no scale" if scale == 1 else "scale $2^{16}$"
        weights = np.full(len(exponents), 100 / len(exponents))
        axes.hist(exponents, bins, weights=weights, alpha=0.6, color=color, label=label)
    axes.axvspan(-24, -14, color="gray", alpha=0.35, linewidth=0)
    axes.axvspan(-14, 16, color="gray", alpha=0.12, linewidth=0)
    axes.set_xlabel("exponent of the gradient")
    axes.set_ylabel("share of values (%)")
    axes.legend()
    plt.show()


# %% tags=["engine"]
def draw_scale(log: Any) -> None:
    exponents = [int(math.log2(scale)) for scale in log.column("loss_scale")[1]]
    overflows = [int(count) for count in log.column("overflows")[1]]
    assert overflows[0] > 3
    _, axes = plt.subplots(figsize=(7, 2.6))
    steps = log.column("loss_scale")[0]
    axes.step([0, *steps], [24, *exponents], where="post", label="exponent of the scale")
    axes.step([0, *steps], [0, *overflows], where="post", label="batches repeated so far")
    axes.set_xlabel("step")
    axes.set_yticks(range(0, 25, 4))
    axes.legend()
    plt.show()


# %% tags=["engine"]
def draw_memory(totals: dict, models: dict) -> None:
    _, axes = plt.subplots(figsize=(7.5, 3.4))
    places = np.array([0, 1, 2, 4, 5, 6, 8, 9, 10])
    below = np.zeros(9)
    parts = next(iter(totals.values()))
    full = np.repeat([sum(totals[name, "float32"].values()) for name in models], 3)
    for part in parts:
        height = 100 * np.array([entries[part] for entries in totals.values()]) / full
        axes.bar(places, height, bottom=below, width=0.85, label=part)
        below += height
    axes.set_xticks(places, ["fp32", "mixed", "pure"] * 3)
    for place, name in zip((1, 5, 9), models, strict=True):
        axes.annotate(name, (place, 106), ha="center")
    axes.set_ylim(0, 118)
    axes.set_ylabel("% of float32")
    axes.legend(ncols=6, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    plt.show()


# %% [markdown]
# ### Weights that stop moving
#
# The first experiment trains a small model from scratch, with three seeds, twice each. The only
# difference is the type in which the weights are stored between steps: `float32`, or `bfloat16`,
# which has 16 bits and the same range.

# %%
stores = {"float32": nn.Identity(), "bfloat16": lambda weight: weight.to(torch.bfloat16)}
curves, last = {}, {}
for name, store in stores.items():
    runs = [train(new_model(seed), store, rate=5e-4, n_steps=80)[0] for seed in range(3)]
    curves[name] = torch.tensor(runs)
    last[name] = curves[name][:, -10:].mean(dim=1)
stalled = last["bfloat16"] - last["float32"]
assert (stalled > 0.15).all() and (stalled < 0.6).all(), stalled
print("last ten steps: 16-bit weights cost 0.15 to 0.6 nats a token with each of 3 seeds")

# %% [markdown]
# With each seed, storing the weights in 16 bits has cost at least 0.15 nats after no more than 80
# steps. (Where results differ a little between processors, the cells of this chapter print bounds
# that hold on all of them.) {numref}`fig-precision-stall` shows the losses.

# %% mystnb={"figure": {"caption": "The same training with weights stored in 32 and in 16 bits, with three seeds each.", "name": "fig-precision-stall"}, "image": {"alt": "Loss over 80 steps. Both groups of three curves begin at 7.4 nats per token. The 32-bit curves fall to about 5.3, the bfloat16 curves fall more slowly from the start and end about 0.3 higher."}}
draw_losses(curves)

# %% [markdown]
# The loss falls more slowly from the start. The reason is easiest to see late in training, when
# steps are small. We continue the trained model for five steps at a rate of 0.0001, and count the
# weights that the last step moved:

# %%
how = {"rate": 1e-4, "n_steps": 5}
moved = {name: train(deepcopy(trained.model), stores[name], **how)[1] for name in stores}
assert moved["float32"] > 0.7 and moved["bfloat16"] < 0.04, moved
print("weights that a step moved: over 70% of those in 32 bits, under 4% of those in 16 bits")

# %% [markdown]
# In 16 bits the weights have frozen. The gradient is there, but the update disappears when the
# weight is stored. (In 32 bits, the weights that don't move are mostly embeddings of tokens that
# haven't come up.)
#
# ### Gradients that are zero
#
# The second experiment uses the other 16-bit type, `float16`, for everything: weights, activations,
# and gradients. It makes one backward pass of the trained model and counts the gradients of its
# output layer that are zero:

# %%
vanished = {dtype: zero_share(dtype) for dtype in (torch.float32, torch.float16)}
assert vanished[torch.float32] < 0.01 and 0.4 < vanished[torch.float16] < 0.95, vanished
print("gradients of the output layer that are exactly zero:")
print("in float32 under 1%, in float16 between 40% and 95%")


# %% [markdown]
# This time the updates aren't even computed: the gradients are gone. Two formats of the same size
# fail in two different ways. To understand them, we need to know which numbers a format has.

# %% [markdown]
# ## Floats, bit by bit
#
# A floating-point number is scientific notation in base two. It has a sign, an exponent, and the
# digits after the leading one, which are called the **fraction** (or mantissa). The sign is one bit
# $s$. With $E$ bits that hold a whole number $e$ and $m$ bits that hold a whole number $f$, the
# value is
#
# $$
# x = (-1)^s \cdot 2^{\,e - b} \cdot \Bigl(1 + \frac{f}{2^m}\Bigr), \qquad b = 2^{E-1} - 1 .
# $$ (precision-value)
#
# The {term}`bias <bias of an exponent>` $b$ makes negative exponents possible without a second
# sign. The leading one isn't stored, because it's always there, except when $e = 0$. Then the value
# is $(-1)^s \cdot 2^{1-b} \cdot f / 2^m$, without the one. These are the {term}`subnormal numbers`,
# which fill the gap between zero and the smallest normal number $2^{1-b}$ with even steps. With
# $f = 0$ the same rule gives zero. In code:


# %%
def value(bits: int, E: int, m: int) -> float:
    s, e, f = bits >> (E + m), (bits >> m) % 2**E, bits % 2**m
    bias = 2 ** (E - 1) - 1
    return (-1) ** s * 2.0 ** (max(e, 1) - bias) * ((e > 0) + f / 2**m)


bits = torch.tensor(0.1).half().view(torch.int16).item()
print(f"0.1 in float16: bits {bits:016b}, value {value(bits, 5, 10):.6f}")


# %% [markdown]
# {numref}`fig-precision-layouts` shows how the formats of this chapter divide their bits; `e4m3` is
# short for four bits of exponent and three of fraction.
#
# ```{figure} ../figures/precision-layouts.svg
# :name: fig-precision-layouts
# :alt: Eight rows of cells, one cell per bit, colored by sign, exponent, and fraction. float32 has 1, 8 and 23 bits; tfloat32 1, 8 and 10; bfloat16 1, 8 and 7; float16 1, 5 and 10; float8 e4m3 1, 4 and 3; float8 e5m2 1, 5 and 2; float4 e2m1 1, 2 and 1; e8m0 has 8 exponent bits only.
#
# Where the bits go. Exponent bits buy range, fraction bits buy digits.
# ```
#
# The largest exponent is reserved in most formats, for infinity and NaN. The short ones cannot
# afford that, and the engine room has their rules. One of them, `float8_e8m0fnu`, has neither a
# sign nor a fraction; it holds powers of two and is used only for scales. `FORMATS` has the eight
# formats by name.

# %% [markdown] tags=["engine"]
# ### Engine room: formats as a class, and all of them by name (`FloatFormat`, `FORMATS`)

# %% [markdown] tags=["engine"]
# What the largest exponent means depends on the format. In most it is reserved: with $f = 0$ it
# stands for infinity, and with any other $f$ for NaN. `float8_e4m3fn` is too short to give away a
# whole exponent. Only the last code of either sign is NaN, and it has no infinity, which is what
# the `fn` stands for (finite, with NaN) {cite}`micikevicius2022fp8`. In `float4_e2m1fn` every code
# is a number. The `u` of `float8_e8m0fnu` stands for unsigned.
#
# The class keeps the fields of a format and derives everything else from them: the bias, the
# spacing above 1 (`epsilon`), and the smallest and largest numbers. A format without fraction bits
# has neither zero nor subnormal numbers, so its codes with $e = 0$ are no exception, and the
# smallest number of e8m0 is $2^{-127}$.


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format: how many bits its fields have, and what its largest codes mean.

    ``top`` is "infinity" if the largest exponent holds infinities and NaN, as in IEEE 754, "nan" if
    the largest code alone is NaN, and "number" if all codes are numbers. A format without fraction
    bits has no zero and no subnormal numbers.
    """

    name: str
    exponent_bits: int
    fraction_bits: int
    top: Literal["infinity", "nan", "number"] = "infinity"
    signed: bool = True
    dtype: torch.dtype | None = None

    @property
    def bits(self) -> int:
        """How many bits a number has."""
        return self.signed + self.exponent_bits + self.fraction_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def has_infinities(self) -> bool:
        """Whether plus and minus infinity are among its values."""
        return self.top == "infinity"

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next larger number."""
        return 2.0**-self.fraction_bits

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return (1 if self.fraction_bits else 0) - self.bias

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a leading one."""
        return 2.0**self.smallest_exponent

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number of all."""
        return self.smallest_normal * self.epsilon

    @property
    def largest(self) -> float:
        """The largest finite number."""
        reserved = {"infinity": 2**self.fraction_bits, "nan": 1, "number": 0}[self.top]
        return self.decode(2 ** (self.exponent_bits + self.fraction_bits) - 1 - reserved)


# %% tags=["engine"]
#| export
# Formats that cannot be, and codes that a format does not have, are refused
class FloatFormat(FloatFormat):  # continued
    def __post_init__(self) -> None:
        check_text(self.name, "name")
        check_whole("exponent_bits", self.exponent_bits, 2)
        check_whole("fraction_bits", self.fraction_bits, 0)
        if self.exponent_bits > 8 or self.fraction_bits > 23:
            expected = "at most the 8 and 23 bits of float32"
            got = f"{self.exponent_bits} and {self.fraction_bits}"
            raise ValueError(f"exponent_bits, fraction_bits: expected {expected}, got {got}")
        check_choice("top", self.top, ("infinity", "nan", "number"))
        if not isinstance(self.signed, bool):
            raise ValueError(f"signed: expected True or False, got {self.signed!r:.60}")
        if not isinstance(self.dtype, torch.dtype | None):
            raise ValueError(f"dtype: expected one of torch, or None, got {self.dtype!r:.60}")

    def _check_code(self, code: int) -> None:
        check_whole("code", code, 0)
        if code >= 2**self.bits:
            raise ValueError(f"code: expected at most {2**self.bits - 1}, got {code}")


# %% [markdown] tags=["engine"]
# A number's **code** is its bits, read as a whole number; `decode` is equation
# {eq}`precision-value`, with infinities and NaN:


# %% tags=["engine"]
#| export
class FloatFormat(FloatFormat):  # continued
    def decode(self, code: int) -> float:
        """Return the value of the bits ``code``, a whole number from 0 to ``2**bits - 1``."""
        self._check_code(code)
        m, magnitude = self.fraction_bits, code % 2 ** (self.exponent_bits + self.fraction_bits)
        exponent, fraction = magnitude >> m, magnitude % 2**m
        sign = -1.0 if code > magnitude else 1.0
        if self.top == "infinity" and exponent == 2**self.exponent_bits - 1:
            return math.nan if fraction else sign * math.inf
        if self.top == "nan" and magnitude == 2 ** (self.exponent_bits + m) - 1:
            return math.nan
        if exponent == 0 and m:
            return sign * math.ldexp(fraction, 1 - self.bias - m)
        return sign * math.ldexp(2**m + fraction, exponent - self.bias - m)


# %% [markdown] tags=["engine"]
# The formats have the names that PyTorch gives them. Two have no type of their own there:
# `tfloat32` exists only inside GPUs, which round `float32` to it on the way into a product, and
# `float4_e2m1fn` is known to PyTorch only as pairs packed into a byte.

# %% tags=["engine"]
#| export
#: The formats by name.
FORMATS = {
    format.name: format
    for format in (
        FloatFormat("float32", 8, 23, dtype=torch.float32),
        FloatFormat("tfloat32", 8, 10),
        FloatFormat("bfloat16", 8, 7, dtype=torch.bfloat16),
        FloatFormat("float16", 5, 10, dtype=torch.float16),
        FloatFormat("float8_e4m3fn", 4, 3, "nan", dtype=torch.float8_e4m3fn),
        FloatFormat("float8_e5m2", 5, 2, dtype=torch.float8_e5m2),
        FloatFormat("float4_e2m1fn", 2, 1, "number"),
        FloatFormat("float8_e8m0fnu", 8, 0, "nan", False, getattr(torch, "float8_e8m0fnu", None)),
    )
}


# %% [markdown] tags=["engine"]
# The table of their limits, a line for each (e8m0 has no subnormal numbers, so the last two columns
# of numbers agree):


# %% tags=["engine"]
def limits_of(format: FloatFormat) -> str:
    digits = (format.fraction_bits + 1) * math.log10(2)
    return (
        f"{format.name:15} {format.bits:5} {digits:7.1f} {format.largest:10.4g} "
        f"{format.smallest_normal:13.3g} {format.smallest_subnormal:16.3g}  "
        f"{'yes' if format.has_infinities else 'no'}"
    )


# %% [markdown]
# ### What the formats can hold
#
# The largest error of rounding a normal number, relative to the number, is half of the spacing
# above 1, $2^{-(m+1)}$. It is called the {term}`unit roundoff` $u$, and $-\log_{10} u$ is the
# number of decimal digits that can be trusted. The table is computed from the fields alone:

# %%
print("format           bits  digits    largest   normal from   subnormal from  infinity")
for format in FORMATS.values():
    print(limits_of(format))

# %% [markdown]
# Now the two failures have numbers. `bfloat16` keeps the range of `float32` and pays with digits:
# just above 1, the next number is 0.8% away. An update of less than half of the spacing, 0.2% to
# 0.4% of the weight, is rounded away. AdamW's updates are about as large as the rate, 0.0001, which
# is 0.2% of 0.05. About nine in ten of our weights are larger than that.
#
# `float16` has three digits, but nothing between 0 and 0.00000006. Recall from
# {doc}`12_optimization` that the gradient of a logit is $p - y$, divided here by the number of
# targets, about 500. If a wrong token has a probability of one in a million, its gradient is
# 0.000000002, which rounds to zero, and a trained model is that sure about most tokens in most
# places. Neither format has both the range and the digits, as {numref}`fig-precision-line` shows.

# %% mystnb={"figure": {"caption": "Left, all positive numbers of three short formats, on a logarithmic scale. Right, the largest error of rounding relative to the number, by the number's size. Each format has a floor of its own, climbs where subnormal numbers begin, and stops where numbers overflow.", "name": "fig-precision-line"}, "image": {"alt": "Left, three rows of ticks. e2m1 has seven from 0.5 to 6, e4m3 about a hundred from 0.002 to 448, e5m2 about a hundred from 0.00002 to 57344, thinner and spread over a longer range. Right, error against size on logarithmic axes: float16, bfloat16, e4m3, e5m2 and e2m1 each as a flat jagged line between their bounds that rises toward the left end."}}
draw_formats()


# %% [markdown]
# On the right, every format has a flat stretch, in which the relative error is never above its unit
# roundoff. To the left of it, among the subnormal numbers, digits are lost one by one.
#
# ## Rounding
#
# Since $m$ digits follow the leading one, the numbers between $2^k$ and $2^{k+1}$ are the whole
# multiples of $2^{k-m}$. That's their spacing. Below the smallest normal number, it stops
# shrinking. So rounding takes three steps: divide by the spacing, which is a power of two and loses
# nothing; round to a whole number; multiply by the spacing:
#
# $$
# \operatorname{round}(x) = \sigma \cdot \Bigl\lfloor \frac{x}{\sigma} \Bigr\rceil , \qquad
# \sigma = 2^{\max(\lfloor \log_2 |x| \rfloor,\; 1-b) \,-\, m} .
# $$ (precision-round)
#
# A tie, where $x / \sigma$ ends in exactly one half, goes to the even neighbor, because sums would
# drift upward if ties were always rounded up. In code, and checked against a cast of PyTorch:


# %%
def nearest(x: Tensor, E: int, m: int) -> Tensor:
    exponent = x.abs().log2().floor().clamp(min=2 - 2 ** (E - 1))
    spacing = 2 ** (exponent - m)
    return (x / spacing).round() * spacing  # round() takes ties to the even neighbor


x = torch.randn(100_000)
equal = (nearest(x, 5, 10) == x.half().float()).sum()
print(f"{equal:,} of {len(x):,} numbers are rounded as by a cast to float16")


# %% [markdown]
# {py:func}`~llmbook.precision.round_to` is this function for all eight formats. A number that is
# too large becomes infinite, or the largest number of the format if it is to *saturate*. And
# rounding goes to the nearest number unless it is *stochastic*; a later section says why one might
# want that.

# %% [markdown] tags=["engine"]
# ### Engine room: rounding to any format (`round_to`), a number taken apart (`float_fields`)

# %% [markdown] tags=["engine"]
# No logarithm is needed for $\lfloor \log_2 |x| \rfloor$. The function below reads the same memory
# as whole numbers, shifts out the fraction, and masks the sign. Written back with a fraction of
# zero, the exponent is the power of two that we want.


# %% tags=["engine"]
#| export
def _spacing(x: Float[Tensor, "*shape"], target: FloatFormat) -> Float[Tensor, "*shape"]:
    """The distance of neighbors in ``target`` around each number, which is float32 or float64."""
    wide = x.dtype == torch.float64
    integers, shift, bias = (torch.int64, 52, 1023) if wide else (torch.int32, 23, 127)
    exponent = (x.contiguous().view(integers) >> shift) & (2 * bias + 1)
    exponent = exponent.clamp_(target.smallest_exponent + bias, 2 * bias) - target.fraction_bits
    return exponent.bitwise_left_shift_(shift).view(x.dtype)


# %% [markdown] tags=["engine"]
# The two choices, saturation and chance, are left to the caller:


# %% tags=["engine"]
#| export
def round_to(
    x: Float[Tensor, "*shape"],
    format: str | torch.dtype | FloatFormat,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    saturate: bool | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Round each number to one that ``format`` has; the result is float32, of float64 float64.

    Nearest with ties to even is what a cast of torch does. ``rounding="stochastic"`` takes the
    neighbor above with a probability that makes the mean right, drawn with ``generator``. What
    is too large becomes the largest number if ``saturate``, else infinity, or NaN in a format that
    has none. By default that is as in torch: formats with infinities do not saturate, e8m0 gives
    NaN, e4m3 and e2m1 saturate. The sign of what is rounded to e8m0 is dropped. No gradient passes.

    >>> round_to(torch.tensor([3.14159, 1e5, 1e-8]), "float16").tolist()
    [3.140625, inf, 0.0]
    """
    target = _check_rounding(x, format, rounding, saturate, generator)
    x = x.detach() if target.signed else x.detach().abs()
    # Spacings below 2**-126 would be subnormal in float32, whose exponent field we write.
    narrow = x.dtype != torch.float64 and target.smallest_subnormal >= 2.0**-126
    wide = x.to(torch.float32 if narrow else torch.float64)
    spacing = _spacing(wide, target)
    scaled = wide / spacing
    if rounding == "nearest":
        rounded = scaled.round_().mul_(spacing)  # to a whole number, ties to even
    else:
        below = scaled.floor()
        draw = torch.rand(x.shape, generator=generator, dtype=wide.dtype, device=x.device)
        rounded = below.add_(draw < scaled - below).mul_(spacing).copysign_(wide)
    rounded = _fit(rounded, target, saturate)
    return rounded.to(x.dtype if x.dtype == torch.float64 else torch.float32)


# %% [markdown] tags=["engine"]
# A format may be given by its name, by the short name that papers use, or as a type of PyTorch.
# float64 is none of them: no format here is as precise, and the rounding itself is done in it.


# %% tags=["engine"]
#| export
_SHORT_NAMES = {
    "fp32": "float32",
    "tf32": "tfloat32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m1": "float4_e2m1fn",
    "e8m0": "float8_e8m0fnu",
}


def float_format(format: str | torch.dtype | FloatFormat) -> FloatFormat:
    """Return the format with this name, or of this dtype of torch.

    Short names are fp32, tf32, bf16, fp16, e4m3, e5m2, e2m1 and e8m0. Unknown ones raise a
    ``ValueError`` that lists the known.

    >>> float_format("bf16").name, float_format(torch.float16).bits
    ('bfloat16', 16)
    """
    if isinstance(format, FloatFormat):
        return format
    if isinstance(format, torch.dtype):
        name = str(format).removeprefix("torch.")
    else:
        name = _SHORT_NAMES.get(format, format) if isinstance(format, str) else format
    if not isinstance(name, str) or name not in FORMATS:
        expected = f"expected one of {', '.join(FORMATS)}"
        raise ValueError(f"format: {expected}, got {format!r:.60}")
    return FORMATS[name]


# %% [markdown] tags=["engine"]
# A number is too large if it is still larger than the largest number after rounding. So the limit
# is half a step above the largest number, as in IEEE 754.


# %% tags=["engine"]
#| export
def _fit(x: Tensor, target: FloatFormat, saturate: bool | None) -> Tensor:
    """Replace what is too large for ``target``, and for e8m0, zero, in ``x`` itself."""
    if not target.fraction_bits:
        x.clamp_(min=target.smallest_normal)
    if saturate is None:
        saturate = target.signed and not target.has_infinities
    if saturate:
        return x.clamp_(-target.largest, target.largest)
    if target.has_infinities:
        x.masked_fill_(x > target.largest, torch.inf)
        return x.masked_fill_(x < -target.largest, -torch.inf)
    return x.masked_fill_(x.abs() > target.largest, torch.nan)


# %% tags=["engine"]
#| export
def _check_rounding(
    x: object, format: object, rounding: object, saturate: object, generator: object
) -> FloatFormat:
    """Refuse what cannot be rounded, or not so; return the format."""
    check_tensor("x", x, "...")
    target = float_format(format)  # type: ignore[arg-type]
    check_choice("rounding", rounding, ("nearest", "stochastic"))
    if saturate is not None and not isinstance(saturate, bool):
        raise ValueError(f"saturate: expected True, False or None, got {saturate!r:.60}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator, got {generator!r:.60}")
    if generator is not None and rounding == "nearest":
        expected = 'expected None, as nothing is drawn unless rounding is "stochastic"'
        raise ValueError(f"generator: {expected}, got {generator!r:.60}")
    if target.top == "number":
        if saturate is False:
            expected = f"expected True or None, as {target.name} has neither infinity nor NaN"
            raise ValueError(f"saturate: {expected}, got False")
        if x.isnan().any():  # type: ignore[attr-defined]
            raise ValueError(f"x: expected numbers, as {target.name} has no NaN, got nan")
    return target


# %% [markdown] tags=["engine"]
# In recent versions of PyTorch, a cast to `float8_e4m3fn` saturates; in older ones, what was too
# large became NaN. What does a GPU do for `tfloat32`? It keeps 10 fraction bits of each `float32`
# factor and sums in `float32`. According to the manual of NVIDIA's instruction set, the instruction
# for this conversion, `cvt.rna.tf32`, rounds ties away from zero. Here ties go to even, as
# everywhere else in the chapter. The two roundings can differ only at ties, which are one number in
# 8,192 if the 13 bits that are dropped are random.

# %% [markdown] tags=["engine"]
# The seven numbers in the first row show everything that can happen. Each row below it has the same
# numbers, rounded to one format:

# %% tags=["engine"]
examples = torch.tensor([1 / 3, 1.0625, 1.1875, 0.001, 1e-5, 500.0, 1e5])
print("number         ", *(f"{x:9.4g}" for x in examples.tolist()))
for name in ("tfloat32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"):
    print(f"{name:15}", *(f"{x:9.4g}" for x in round_to(examples, name).tolist()))


# %% [markdown] tags=["engine"]
# Read the row of `float8_e4m3fn`, which has steps of 1/8 above 1. The numbers 1.0625 and 1.1875
# (printed with four digits) are ties. They go down to 1 and up to 1.25, both of which have an even
# last digit. 0.001 is rounded up to the smallest subnormal number, 0.00195, and 0.00001 has
# vanished. 500 saturates at 448. `float8_e5m2`, with one fraction bit fewer, rounds it to 512, and
# makes 100,000 infinite.
#
# `float_fields` is the reverse of `decode`. Let $k = |x| / \sigma$ be the number of spacings in
# $x$. Then the exponent and fraction, read together as one whole number, are simply $k + (e - 1)
# \cdot 2^m$. For subnormal numbers, which have the spacing of $e = 1$, put 1 in the place of $e$.
# So all positive numbers of a format, in order, have consecutive codes.


# %% tags=["engine"]
#| export
class FloatFields(NamedTuple):
    """The fields of a number: its sign, the stored exponent and fraction, its value, its bits."""

    sign: int
    exponent: int
    fraction: int
    value: float
    bits: str


# %% [markdown] tags=["engine"]
# Rounding comes first; the rest is arithmetic on whole numbers.


# %% tags=["engine"]
#| export
def float_fields(
    number: float | np.number, format: str | torch.dtype | FloatFormat = "float32"
) -> FloatFields:
    """Round ``number`` to ``format`` and take it apart; ``bits`` shows sign, exponent, fraction.

    >>> float_fields(-0.75, "e4m3")
    FloatFields(sign=1, exponent=6, fraction=4, value=-0.75, bits='1 0110 100')
    """
    target = float_format(format)
    _check_number("number", number)
    x = round_to(torch.tensor(float(number), dtype=torch.float64), target)
    value, m = x.item(), target.fraction_bits
    if math.isfinite(value):
        spacing = _spacing(x, target).item()
        exponent = math.frexp(spacing)[1] - 1 + m
        code = int(abs(value) / spacing) + ((exponent + target.bias - 1) << m)
    else:  # infinity, or the NaN whose first fraction bit is set
        quiet = 2**m >> 1 if target.top == "infinity" else 2**m - 1
        code = ((2**target.exponent_bits - 1) << m) + (quiet if math.isnan(value) else 0)
    exponent, fraction = code >> m, code % 2**m
    sign = int(target.signed and math.copysign(1, value) < 0)
    fields = [f"{sign}"] * target.signed + [f"{exponent:0{target.exponent_bits}b}"]
    bits = " ".join(fields + [f"{fraction:0{m}b}"] * (m > 0))
    return FloatFields(sign, exponent, fraction, value, bits)


# %% tags=["engine"]
#| export
# Refuse what is not a number
def _check_number(name: str, value: object) -> None:
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not known:
        raise ValueError(f"{name}: expected a number, got {value!r:.60}")


# %% [markdown] tags=["engine"]
# The figure is HTML that contains the formats and the number's codes, a script that turns bits into
# values by the rules of `FloatFormat.decode`, and a table for readers without scripts.

# %% tags=["engine"]
#| export
# The figure's look; its script is llmbook/precision.js
_STYLE = """<style>
.llmbook-bits { max-width: 46rem; font-family: system-ui, sans-serif; font-size: 0.95rem; }
.llmbook-bits button { font: inherit; color: inherit; cursor: pointer; background: none; }
.llmbook-bits .formats { display: flex; flex-wrap: wrap; gap: 0.4rem; margin-bottom: 0.7rem; }
.llmbook-bits .formats button { padding: 0.2em 0.6em; border: 2px solid #8888;
  border-radius: 5px; }
.llmbook-bits .formats button[aria-pressed="true"] { border-color: #3a8fd0; }
.llmbook-bits .bits { display: flex; flex-wrap: wrap; gap: 3px; align-items: center; }
.llmbook-bits .bits button { width: 1.75em; height: 2.1em; padding: 0; border: 1px solid #8888;
  border-radius: 3px; font-family: monospace; }
.llmbook-bits .bits .sign { background: rgba(170, 68, 153, 0.3); }
.llmbook-bits .bits .exponent { background: rgba(58, 143, 208, 0.3); }
.llmbook-bits .bits .fraction { background: rgba(0, 158, 115, 0.25); }
.llmbook-bits .bits .step { width: auto; padding: 0 0.5em; margin-left: 0.4em; }
.llmbook-bits button:focus-visible { outline: 3px solid #d55e00; outline-offset: 1px; }
.llmbook-bits .report { min-height: 4.2em; margin: 0.6rem 0; }
.llmbook-bits .report strong { font-size: 1.15em; }
.llmbook-bits details div { overflow-x: auto; }
.text_html:has(> .llmbook-bits) { background: none !important; color: inherit !important; }
.llmbook-bits td, .llmbook-bits th { padding: 0.1em 0.8em; text-align: left; white-space: pre; }
</style>"""


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class BitsFigure:
    """An interactive figure; notebooks and the site show its ``html``."""

    html: str

    def __repr__(self) -> str:
        return "BitsFigure(html=...)"

    def _repr_html_(self) -> str:
        return self.html


# %% tags=["engine"]
#| export
def show_bits(number: float = math.pi, format: str | torch.dtype = "float16") -> BitsFigure:
    """Return a figure in which one flips the bits of ``number`` and sees what it becomes.

    It works by mouse, touch and keyboard, begins with ``format``, and offers all formats of at most
    16 bits. Without a script it is a table of the number in these formats.
    """
    chosen = float_format(format).name
    _check_number("number", number)
    if math.isnan(number):
        raise ValueError(f"number: expected a number that all formats have, got {number}")
    offered = [f for f in FORMATS.values() if f.bits <= 16 and f.signed]
    if chosen not in (names := [f.name for f in offered]):
        raise ValueError(f"format: expected one of {', '.join(names)}, got {format!r}")
    apart = [float_fields(number, f) for f in offered]
    data = [
        {
            "name": f.name,
            "exponent": f.exponent_bits,
            "fraction": f.fraction_bits,
            "top": f.top,
            "code": int(fields.bits.replace(" ", ""), 2),
        }
        for f, fields in zip(offered, apart, strict=True)
    ]
    rows = [("format", "sign exponent fraction", "value")]
    rows += [(name, a.bits, f"{a.value:.6g}") for name, a in zip(names, apart, strict=True)]
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    lines[0] = lines[0].replace("td>", "th>")
    table = "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
    inert = json.dumps({"formats": data, "chosen": names.index(chosen)}, separators=(",", ":"))
    script = files("llmbook").joinpath("precision.js").read_text(encoding="utf-8")
    label = f"The number {number:.6g}, bit by bit"
    return BitsFigure(
        f'<div class="llmbook-bits" role="group" aria-label="{label}">{_STYLE}'
        f"<details open><summary>{label}, as a table</summary><div>{table}</div></details>"
        f'<script type="application/json">{inert}</script></div><script>{script}</script>'
    )


# %% [markdown]
# ### A number to play with
#
# {py:func}`~llmbook.precision.float_fields` is the reverse of our function `value`: it rounds a
# number and returns the fields that stand in memory, with the bits in the order sign, exponent,
# fraction:

# %%
for name in ("float16", "bfloat16", "float8_e4m3fn"):
    fields = float_fields(0.001, name)
    print(f"0.001 in {name:13} {fields.bits:19} = {fields.value:.6g}")

# %% [markdown]
# In `float8_e4m3fn` the exponent field of 0.001 is 0, so there is no leading one: it is a subnormal
# number with a single binary digit.
#
# Now set the bits yourself, with the mouse, or with the arrow keys and the space bar. Which bits
# make the largest number of each format, and what does the next code mean?

# %%
show_bits(math.pi, "float16")

# %% [markdown]
# ## Rounding by chance
#
# Return to the frozen weights. Suppose that a weight stands at 1 in `bfloat16`. The next number is
# $\sigma = 1/128$ away, and each step wants to add a ten-thousandth of that. Rounded to nearest,
# nothing ever happens. The trouble isn't that the error is large. It is the *same* error every
# time.
#
# {term}`Stochastic rounding <stochastic rounding>` draws lots. Let $x$ lie between the neighbors
# $a$ and $a + \sigma$, a share $t = (x - a) / \sigma$ of the way up. Go up with probability $t$,
# and down otherwise. Then
#
# $$
# \mathbb{E}[\operatorname{round}(x)] = (1 - t)\, a + t\, (a + \sigma) = a + t \sigma = x , \qquad
# \operatorname{Var} = t (1 - t)\, \sigma^2 \le \frac{\sigma^2}{4} .
# $$ (precision-stochastic)
#
# A single rounding is worse than rounding to nearest, but its mean error is zero, and independent
# errors average out. After $n$ updates of $t \sigma$ with a small $t$, the weight has moved by $n t
# \sigma$ on average, with a standard deviation of about $\sqrt{n t}\, \sigma$. Here are ten
# thousand weights, each with a thousand updates of a ten-thousandth of the spacing:

# %%
spacing, generator = 1 / 128, torch.Generator().manual_seed(0)
by_nearest = chance = torch.ones(10_000, dtype=torch.float64)  # sums before rounding are exact
by_chance = {"rounding": "stochastic", "generator": generator}
for _ in range(1000):
    by_nearest = round_to(by_nearest + 1e-4 * spacing, "bfloat16")
    chance = round_to(chance + 1e-4 * spacing, "bfloat16", **by_chance)
print("mean movement after updates that add up to 0.1 spacings:")
for name, weights in (("nearest", by_nearest), ("stochastic", chance)):
    print(f"{name:10} {(weights - 1).mean() / spacing:.2f} spacings")

# %% [markdown]
# On average, the weights have moved as far as they should. No single weight has moved by a tenth of
# a spacing, since there is no such number; about one in ten has moved by a whole one. In
# {numref}`fig-precision-walk` the updates are larger.

# %% mystnb={"figure": {"caption": "A weight that should rise by one hundredth of its spacing in each step. Rounded to nearest it stays. Rounded stochastically, twelve of them wander around the line.", "name": "fig-precision-walk"}, "image": {"alt": "Position of a weight in spacings over 1000 steps. The wanted line rises from 0 to 10. To nearest, a flat line at 0. Twelve stochastic staircases rise along the wanted line and end between about 4 and 16."}}
draw_walk(spacing, generator)

# %% [markdown]
# The twelve weights wander, but around the right line. Does stochastic rounding repair the first
# experiment of the chapter? We train with the same three seeds, with weights in 16 bits that are
# rounded by chance:

# %%
store = lambda weight: round_to(weight, "bfloat16", **by_chance)  # noqa: E731
runs = [train(new_model(seed), store, 5e-4, n_steps=80)[0] for seed in range(3)]
behind = torch.tensor(runs)[:, -10:].mean(dim=1) - last["float32"]
assert behind.abs().max() < 0.1, behind
print("loss above that of 32-bit weights: 0.15 to 0.6 nats to nearest, below 0.1 by chance")

# %% [markdown]
# The noise of the weights averages out over steps, and the loss hardly notices. This was found for
# fixed-point weights {cite}`gupta2015deep`, and it holds for `bfloat16`
# {cite}`zamirai2021revisiting`. But that updates vanish doesn't prove that they were needed. In one
# series of models whose embeddings had frozen in the same way, thawing them changed the loss by no
# more than noise {cite}`karpathy2026nanochat`.
#
# ## What a sum loses
#
# A weight is a sum of updates. A loss, a norm, a gradient, and every entry of a matrix product are
# long sums, too. Every addition gives the true result times $1 + \delta$ with $|\delta| \le u$,
# where $u$ is the unit roundoff. If the terms $x_1, \dots, x_n$ are added one after the other, the
# first goes through $n - 1$ additions. If they are added in pairs, then pairs of pairs, and so on,
# every term goes through only $\lceil \log_2 n \rceil$. If no term goes through more than $k$
# additions, the computed sum $\hat s$ is, to first order, off by
#
# $$
# \Bigl| \hat s - \sum_i x_i \Bigr| \;\le\; k\, u \sum_i |x_i| , \qquad
# k = n - 1 \text{ one after the other}, \quad k = \lceil \log_2 n \rceil \text{ in pairs} .
# $$ (precision-sum)
#
# **Kahan's summation** keeps a second number $c$, which holds what the last addition lost, with the
# sign reversed. In this section, $s$ is the sum so far and $t$ the next one. When $y$ is added to
# $s$, its low digits may not fit. They are the difference between what was added, $t - s$, and what
# should have been added, $y$:
#
# $$
# y = x_i - c, \qquad t = s + y, \qquad c = (t - s) - y, \qquad s = t .
# $$ (precision-kahan)
#
# Its bound has $k = 2 + O(n u)$ {cite}`higham2002accuracy`, which hardly depends on $n$ as long as
# $n u$ is small. The fourth way is to sum in a wider format and round once at the end, which gives
# $k \approx 1$. Here is the plain sum beside Kahan's, for 8,192 numbers between 0 and 1 in
# `bfloat16`:

# %%
terms = torch.rand(8192, generator=torch.Generator().manual_seed(0)).bfloat16()
plain = s = c = torch.zeros((), dtype=torch.bfloat16)
for x in terms:
    plain = plain + x
    y = x - c
    t = s + y
    c, s = (t - s) - y, t
print(f"one by one {plain:.0f}, Kahan {s:.0f}, the true sum {terms.double().sum():.1f}")


# %% [markdown]
# One by one, the sum has come to a standstill at 256, where the spacing of `bfloat16` is 2 and no
# term is larger than half of it. This is the frozen weight once more. Kahan's sum is right to its
# last digit, although $n u$ is 32 here and the bound promises nothing. {numref}`fig-precision-sums`
# has all four ways in three formats, which the engine room measures.

# %% [markdown] tags=["engine"]
# ### Engine room: four ways to add, measured in three formats

# %% [markdown] tags=["engine"]
# The first function adds one by one, with or without Kahan's correction, for many rows at once, and
# notes the sum whenever the number of terms is a power of two. The second adds in pairs.


# %% tags=["engine"]
def running_sums(x: Tensor, kahan: bool) -> dict[int, Tensor]:
    total = lost = torch.zeros_like(x[:, 0])
    sums = {}
    for n, term in enumerate(x.T, start=1):
        y = term - lost
        new = total + y
        if kahan:
            lost = (new - total) - y
        total = new
        if n & (n - 1) == 0:
            sums[n] = total
    return sums


def pairwise_sum(x: Tensor) -> Tensor:
    while x.size(1) > 1:
        x = x[:, ::2] + x[:, 1::2]
    return x[:, 0]


# %% [markdown] tags=["engine"]
# The terms are uniform between 0 and 1, so that nothing cancels:

# %% tags=["engine"]
lengths = [2**k for k in range(4, 14)]
uniform = torch.rand(32, lengths[-1], generator=torch.Generator().manual_seed(0))
errors = {}
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    x = uniform.to(dtype)
    one_by_one, kahan = running_sums(x, kahan=False), running_sums(x, kahan=True)
    for n in lengths:
        exact = x[:, :n].double().sum(dim=1)
        wider = torch.float64 if dtype == torch.float32 else torch.float32
        found = {
            "one by one": one_by_one[n],
            "in pairs": pairwise_sum(x[:, :n]),
            "Kahan": kahan[n],
            "wide": x[:, :n].to(wider).sum(dim=1).to(dtype),
        }
        for way, result in found.items():
            errors[dtype, way, n] = ((result.double() - exact).abs() / exact).mean().item()
stuck = running_sums(uniform.bfloat16(), kahan=False)[8192]
assert (stuck == stuck[0]).all()
print(f"8,192 terms with a mean of 0.5, one by one in bfloat16: {stuck.min():.0f} in each row")

# %% [markdown] tags=["engine"]
# These are the errors of the longest sums, in units of the unit roundoff:

# %% tags=["engine"]
at = 8192
print(f"{at:,} terms, error in units of the unit roundoff:")
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    u = torch.finfo(dtype).eps / 2
    ways = {way: errors[dtype, way, at] / u for way in ("one by one", "in pairs", "Kahan", "wide")}
    assert max(ways["Kahan"], ways["wide"]) < 2 and ways["in pairs"] < 13 < ways["one by one"]
    print(f"{str(dtype)[6:]:9}", ", ".join(f"{way} {e:.2g}" for way, e in ways.items()))

# %% [markdown]
# ### Four ways to add
#
# These are the mean errors over 32 rows of up to 8,192 terms:

# %% mystnb={"figure": {"caption": "Mean relative error of a sum by its number of terms. The gray line is the unit roundoff of the format. Kahan and wide coincide.", "name": "fig-precision-sums"}, "image": {"alt": "Three panels, bfloat16, float16 and float32, of relative error against the number of terms from 16 to 8192 on logarithmic axes. One by one rises in all panels; in bfloat16 and float16 it jumps toward 1. The other three stay flat below the unit roundoff, in pairs a little above the other two."}}
draw_sums(errors, lengths)

# %% [markdown]
# One by one, the error grows with the number of terms. At 8,192 terms it is 94% of the sum in
# `bfloat16` and half of it in `float16`. The other ways stay below the unit roundoff. That is why
# matrix units multiply short numbers and add in 32 bits. The multiplications themselves lose
# nothing: two numbers of $m + 1$ digits have a product of at most $2m + 2$, which is 16 digits for
# `bfloat16` and 22 for `float16`, and `float32` has 24.

# %% [markdown]
# ## A recipe in three parts
#
# Which numbers really need 32 bits? Nearly all of the work is in products of matrices. A product
# has three kinds of numbers. Its *factors* are read once and multiplied; rounding them changes each
# by at most one part in $2^{m+1}$, in either direction. Its *partial sums* are updated once for
# every pair of factors, and there errors pile up. They stay in 32 bits inside the unit that
# multiplies, where they cost no memory. Its *result* is rounded once. And the weights? They are
# sums as well, over all steps of the training run.
#
# So the recipe, which follows Micikevicius and colleagues {cite}`micikevicius2018mixed`, has three
# parts for any 16-bit format ({numref}`fig-precision-recipe`): **master weights** in 32 bits, to
# which every update is added; **products** in 16 bits, from copies of the weights that are made
# anew in each step; and **sums** in 32 bits, both those inside products and those in softmax,
# normalization, and the loss. `float16` needs a fourth part, a scale for the loss, which has
# sections of its own below.
#
# ```{figure} ../figures/precision-recipe.svg
# :name: fig-precision-recipe
# :alt: A training step from left to right. Master weights in 32 bits are cast to a 16-bit copy for the products; norms, softmax and loss stay in 32 bits. The loss is scaled, gradients return through 16-bit products, arrive in 32 bits, are unscaled, checked and clipped, and update the master weights.
#
# One step of mixed precision. Only the products, and what passes between them, are in 16 bits.
# ```
#
# ## What goes down, and what stays up
#
# Nobody wants to write casts into every layer of a model. **Autocast** makes them: it is a context
# in which each operation is looked up in two lists. `DOWN` has the products, such as `F.linear`,
# `torch.matmul`, and attention. They get their inputs in 16 bits. `UP` has operations that sum many
# numbers, or whose results have a large range: norms, softmax, losses, sums, exponentials. (The
# exponential of 12 is over 160,000, which `float16` cannot hold.) They get theirs in 32 bits.
# Everything else takes what it gets.

# %% [markdown] tags=["engine"]
# ### Engine room: the lists (`DOWN`, `UP`) and a context that obeys them (`CastProducts`)

# %% tags=["engine"]
#| export
#: What autocast computes in 16 bits: products of matrices.
DOWN = frozenset(
    {F.linear, F.bilinear, F.scaled_dot_product_attention, F.conv1d, F.conv2d}
    | {torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum}
    | {Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv}
    | {Tensor.addmm, Tensor.baddbmm}
)
#: What autocast computes in 32 bits: long sums, and what has a large range.
UP = frozenset(
    {F.rms_norm, F.layer_norm, F.group_norm, torch.rms_norm, torch.layer_norm, F.normalize}
    | {F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.mse_loss, F.kl_div}
    | {torch.softmax, torch.log_softmax, torch.logsumexp, torch.exp, torch.log, torch.pow}
    | {Tensor.softmax, Tensor.log_softmax, Tensor.logsumexp, Tensor.exp, Tensor.log, Tensor.pow}
    | {torch.sum, torch.cumsum, torch.prod, torch.rsqrt, torch.norm, torch.var}
    | {Tensor.sum, Tensor.cumsum, Tensor.prod, Tensor.rsqrt, Tensor.norm, Tensor.var}
    | {torch.cumprod, Tensor.cumprod, Tensor.__pow__, Tensor.__rpow__}
)


# %% [markdown] tags=["engine"]
# An operation with an `out` argument is left alone, as in PyTorch's autocast, since its result has
# a place and a type already.

# %% tags=["engine"]
#| export
_SIXTEEN_BITS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_ACTIVE: list["CastProducts"] = []  # the contexts that we are in, the innermost last
_MAY_BE_CAST = {torch.float32, *_SIXTEEN_BITS.values()}


def _widened(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in _SIXTEEN_BITS.values()
    return value.float() if is_narrow else value


# %% tags=["engine"]
#| export
class CastProducts(TorchFunctionMode):
    """Within this context products run in ``dtype`` and sensitive functions in float32.

    Autocast by hand, by the lists ``DOWN`` and ``UP``. With ``emulate`` numbers are rounded to
    ``dtype`` and back before and after each product, so that any processor can be used. Float64
    and whole numbers are left as they are. The backward pass belongs outside.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, emulate: bool = False):
        super().__init__()
        if dtype not in _SIXTEEN_BITS.values():
            raise ValueError(f"dtype: expected torch.float16 or torch.bfloat16, got {dtype!r}")
        self.dtype, self.emulate = dtype, emulate

    def __enter__(self) -> "CastProducts":
        """Begin to cast; blocks that are computed again find out what was active."""
        _ACTIVE.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Cast no more."""
        _ACTIVE.pop()
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with arguments of the type that its list says."""
        kwargs = dict(kwargs or {})
        lower = func in DOWN and "out" not in kwargs
        if lower:
            args, kwargs = tree_map(self.narrow, (args, kwargs))
        elif func in UP and not self.emulate:
            args, kwargs = tree_map(_widened, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map(self.narrow, result) if lower and self.emulate else result

    def narrow(self, value: Any) -> Any:
        """Return a float tensor in 16 bits, or rounded to them; anything else as it is."""
        if not isinstance(value, Tensor) or value.dtype not in _MAY_BE_CAST:
            return value
        low = value.to(self.dtype)
        return low.to(value.dtype) if self.emulate else low


# %% tags=["engine"]
# Imports for the experiments
import time

from llmbook.optimization import chunked_cross_entropy, cosine_schedule, cross_entropy
from llmbook.optimization import parameter_groups
from llmbook.tokenizer import train_bpe
from llmbook.training import Trainer, TrainingConfig

# %% [markdown] tags=["engine"]
# The experiments from here to those in the trainer use another small model, with a tokenizer of its
# own that has 512 tokens.

# %% tags=["engine"]
stories = [story.text for story in TinyWorld().stories(1200, 0)]
tokenizer = train_bpe(stories, 512)
folder = Path(tempfile.mkdtemp())
shards = write_shards(stories, folder / "stories", tokenizer)
rows = pack_documents(shards, 128, "one_per_row")
batches = BatchSampler(rows, batch_size=8)


def tiny_model(seed: int = 0, backend: str = "torch", **changes: int) -> TransformerLM:
    seed_everything(seed)
    sizes = {"context_length": 128, "d_model": 32, "n_layers": 2, "n_heads": 2} | changes
    return TransformerLM(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes), backend)


batch = compact(batches[0])


# %% [markdown] tags=["engine"]
# Logits and gradients within a context, and what type each part of the model returns there:


# %% tags=["engine"]
def gradients_under(context: Any) -> list[Tensor]:
    model = tiny_model()
    with context:
        logits = model(batch.inputs)
    cross_entropy(logits.float(), batch.targets).backward()
    return [logits.detach(), *[p.grad for p in model.parameters()]]


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    pairs = zip(some, others, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def types_under(context: Any) -> str:
    model, lines = tiny_model(), []
    for name in ("blocks.0.attention_norm", "blocks.0.attention.q_proj", "blocks.0", "lm_head"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: lines.append(f"{name:26} {output.dtype}")
        )
    with context:
        model(batch.inputs)
    return "\n".join(lines).replace("torch.", "")


# %% [markdown]
# ### Autocast in six lines
#
# PyTorch lets us step in before any of its functions is called. So autocast is a look-up and a
# cast. We try it on a tiny model, of two blocks and width 32; `types_under` lists what type some of
# its parts return:


# %%
class Autocast(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for names, kind in ((DOWN, torch.bfloat16), (UP, torch.float32)):
            if func in names:
                args = [x.to(kind) if torch.is_tensor(x) else x for x in args]
        return func(*args, **(kwargs or {}))


print(types_under(Autocast()))

# %% [markdown]
# The normalization returns 32 bits, and the two products return 16. The residual stream, which is
# the output of a block, stays in 32 bits without being on a list: it begins as a row of the
# embedding, which is a master weight, and the sum of a 32-bit and a 16-bit number has 32 bits. Is
# this the autocast that everybody uses? `gradients_under` returns the logits and all gradients of
# one step within a context, and `distance` the largest relative difference between two such lists:

# %%
theirs = gradients_under(torch.autocast("cpu", torch.bfloat16))
for context in (Autocast(), CastProducts(torch.bfloat16), CastProducts(emulate=True)):
    ours = gradients_under(context)
    equal, off = sum(map(torch.equal, ours, theirs)), distance(ours, gradients_under(nullcontext()))
    print(f"{equal} of {len(ours)} tensors are PyTorch's; they are {off:.0%} off float32")


# %% [markdown]
# Logits and gradients agree with PyTorch's to the last bit, for our six lines and for
# `CastProducts`, the class in the package. The last row has an option for processors without 16-bit
# arithmetic. A product of 16-bit numbers with 32-bit sums is the same as a 32-bit product of
# *rounded* numbers whose result is rounded, except for the order of its sums. So with
# `emulate=True`, tensors keep their 32 bits and are only rounded. This shows on any machine what 16
# bits do to training, and saves neither time nor memory.
#
# The `backward` of a training step stands outside the context. Each cast is an operation like any
# other, and its derivative is the cast in the other direction. So gradients flow in 16 bits exactly
# where values did, and they arrive at the master weights in 32 bits.

# %% [markdown] tags=["engine"]
# ### Engine room: a backward pass inside of autocast

# %% [markdown] tags=["engine"]
# PyTorch's manual advises against running the backward pass under autocast. A function with a
# derivative of its own shows why. What its `backward` computes with care in 32 bits is cast down by
# the context:


# %% tags=["engine"]
class SquaredNorm(torch.autograd.Function):
    """The squared norm of x @ w; the gradient of w is a product of its own making."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            ctx.save_for_backward(x, w)
            return (x @ w).square().sum()

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[None, Tensor]:
        x, w = ctx.saved_tensors
        return None, 2 * d_total * (x.T @ (x @ w))


x = torch.randn(64, 32)
kinds = {}
for where in ("outside", "inside"):
    w = torch.ones(32, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        total = SquaredNorm.apply(x, w)
        if where == "inside":
            total.backward()
    if where == "outside":
        total.backward()
    kinds[where] = w.grad
error = distance([kinds["inside"]], [kinds["outside"]])
assert 5e-4 < error < 5e-2
print(f"backward inside of autocast: the gradient is off by about {error:.1%}, with no warning")


# %% [markdown] tags=["engine"]
# With `backward` inside, the gradient is only as accurate as `bfloat16` allows, although the
# function asked for 32 bits, and nothing says so.

# %% [markdown]
# ## Gradients that vanish
#
# The three parts of the recipe are in place. What remains is the range of `float16`. It holds
# normal numbers from $2^{-14}$ on. Below that it has a fixed grid with a step of $2^{-24}$, and
# whatever is at or below $2^{-25}$ rounds to zero. We catch the gradients that enter the backward
# pass of each linear map, in the tiny model after 40 steps of training, with a batch of 64
# stories. What would become of them in `float16`, if all are multiplied by a factor first?


# %% tags=["engine"]
# The gradients that enter linear maps, without those that are exactly zero in 32 bits
def gradient_values(model: nn.Module, batch: Any) -> Tensor:
    caught = []
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [
        module.register_full_backward_hook(lambda m, into, out: caught.append(out[0].flatten()))
        for module in linears
    ]
    cross_entropy(model(batch.inputs), batch.targets).backward()
    for hook in hooks:
        hook.remove()
    values = torch.cat(caught).abs()
    return values[values > 0]


model = tiny_model()
optimizer = AdamW(model.parameters(), lr=3e-3)
for step in range(40):
    batch = compact(batches[step])
    optimizer.zero_grad()
    cross_entropy(model(batch.inputs), batch.targets).backward()
    optimizer.step()
values = gradient_values(model, compact(rows.batch(range(64))))


# %% [markdown]
# Their absolute values are in `values`, and a small function counts what `float16` does to them:


# %% tags=["engine"]
# The shares that vanish, and that lose digits, by tenths
def in_float16(scaled: Tensor) -> str:
    lost = float((scaled <= 2.0**-25).float().mean())
    coarse = float(((scaled > 2.0**-25) & (scaled < 2.0**-14)).float().mean())
    over = int((scaled >= 65520).sum())
    shares = f"{round(lost, 1):.0%} become zero, {round(coarse, 1):.0%} lose digits"
    return f"{shares}, {over} are too large"


# %% [markdown]
# Three factors:

# %%
for exponent in (0, 10, 16):
    print(f"times 2^{exponent:2}: {in_float16(values * 2**exponent)}")

# %% [markdown]
# Without a scale, about one gradient in ten becomes zero, and nearly all the others lose digits.
# With a factor of $2^{16}$ almost all are safe. {numref}`fig-precision-gradients` shows why: the
# range is wide enough, but it is in the wrong place.

# %% mystnb={"figure": {"caption": "Exponents of the gradients that enter linear maps, without a scale and with one of 2^16. Float16 holds what lies in the light band with all its digits, what lies in the dark band with fewer; left of $2^{-25}$ everything is zero.", "name": "fig-precision-gradients"}, "image": {"alt": "Two histograms of the same shape over exponents from -36 to 18. Without a scale the values lie mostly between -28 and -14: nine tenths in the dark band of float16's subnormal numbers, from -24 to -14, the rest left of it. With the scale the histogram has moved right by 16 and lies within the light band, mostly between -12 and 2; the band goes on to 16."}}
draw_gradients(values)

# %% [markdown]
# We can move all gradients at once. Differentiation is linear: if $S$ is a constant, then $\nabla
# (S L) = S\, \nabla L$, at every weight and at every place in between. So the loss is multiplied by
# the **loss scale** $S$ once, before the backward pass, and the gradients of the weights, which are
# in 32 bits, are divided by it once, afterward. Loss scales are powers of two, because such a
# factor changes the exponent of a number and none of its digits, so that both operations are exact.

# %% [markdown]
# ## A scale that finds itself
#
# How large may $S$ be? If it is too large, the largest gradients become infinite, and infinity
# divided by $S$ is still infinite. That is a message that cannot be missed, and it comes *before*
# the optimizer has acted. A scale that is too small gives no sign at all. So a **dynamic** scale
# keeps testing the limit. If a gradient is infinite or NaN, the step is skipped and the scale is
# halved; after 2,000 good steps in a row it is doubled. In equilibrium, about one step in 2,000 is
# lost, and the scale follows the gradients when they shrink.
#
# Here is all of it, in a loop whose scale begins far too high and may grow after four good steps.
# The gradients are ones, and step 11 has an infinite one:

# %%
weight, scale, good, history = nn.Parameter(torch.zeros(4)), 2.0**20, 0, []
for step in range(16):
    loss = (weight.half() * (math.inf if step == 11 else 1.0)).sum()  # a product in float16
    (gradient,) = torch.autograd.grad(loss.float() * scale, weight)
    finite = bool((gradient / scale).isfinite().all())
    history.append(f"{'' if finite else 'x'}{math.log2(scale):.0f}")
    if finite:
        weight.data -= gradient / scale
        good += 1
    if not finite or good == 4:
        scale, good = scale * (2 if finite else 0.5), 0
print("exponent of the scale, x where the step was skipped:", *history)

# %% [markdown]
# The scale is halved five times before a step can be taken, at $2^{15}$. ($2^{16}$ is just too
# large for `float16`, which ends at 65,504.) After four good steps it tries $2^{16}$, and takes
# that back at once. The infinite gradient then costs it another factor of two: the scaler cannot
# know that no scale would have helped.
#
# {py:class}`~llmbook.precision.GradScaler` packs this into the methods that PyTorch's scaler has.
# The order of the operations within a step is forced:
#
# 1. `scale(loss).backward()` runs once for each micro-batch. Their gradients are added, so they
#    need the *same* scale, which does not change before the step is over.
# 2. `unscale_(optimizer)` divides `.grad`, once, and notes whether all of it is finite.
# 3. Clipping, and whatever else looks at gradients, comes after that.
# 4. `step(optimizer)` takes the step, or skips it. If it is skipped, the schedule has to wait, too:
#    the rate must not move on if the weights did not.
# 5. `update()` changes the scale, after `step` has been called for every optimizer.

# %% [markdown] tags=["engine"]
# ### Engine room: the scaler (`GradScaler`), states that torch's takes, and a wrong order

# %% [markdown] tags=["engine"]
# A power of two changes no digit of a gradient; any other factor rounds twice:

# %% tags=["engine"]
for scale in (2.0**16, 1e5):
    changed = (values * scale / scale != values).float().mean()
    print(f"scale {scale:7,.0f}: {'none' if changed == 0 else 'some'} of the gradients change")


# %% [markdown] tags=["engine"]
# The class keeps the scale, the number of good steps since the last change, and for each optimizer
# what was found since the last update.


# %% tags=["engine"]
#| export
class GradScaler:
    """Scales losses so that gradients fit into float16, and skips steps that overflow.

    Decides as ``torch.amp.GradScaler`` does, and takes and gives its state dicts. Use it as
    ``scale(loss).backward()``, ``unscale_(optimizer)``, clipping, ``step(optimizer)``,
    ``update()``. Source: Micikevicius et al. (2018), section 3.2. Settings out of range raise a
    ``ValueError``; calls in the wrong order, such as a second ``step`` before ``update``, raise a
    ``RuntimeError`` as in torch.
    """

    def __init__(
        self,
        *,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        self._scale = _as_scale("init_scale", init_scale)
        self.set_growth_factor(growth_factor)
        self.set_backoff_factor(backoff_factor)
        self.set_growth_interval(growth_interval)
        self._enabled, self._growth_tracker = _as_switch("enabled", enabled), 0
        self._found: dict[int, Tensor] = {}  # by optimizer: whether a gradient was not finite
        self._stepped: set[int] = set()

    def scale(self, outputs: Any) -> Any:
        """Return a loss, or a list, tuple or iterable of losses, times the scale.

        >>> GradScaler().scale(torch.ones(())).item()
        65536.0
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):  # as a tensor, because float16 cannot hold 65,536
            return outputs * torch.tensor(self._scale, device=outputs.device)
        if not isinstance(outputs, Iterable) or isinstance(outputs, str | bytes):
            raise ValueError(f"outputs: expected a tensor or several, got {outputs!r:.60}")
        scaled = map(self.scale, outputs)
        return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled


# %% [markdown] tags=["engine"]
# To learn whether all numbers of a tensor are finite, it is enough to look at its smallest and its
# largest: an infinity would be one of them, and if anything is NaN, both are. The answer stays on
# the device until `step` reads it.


# %% tags=["engine"]
#| export
class GradScaler(GradScaler):  # continued
    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of ``optimizer`` by the scale, and note if any is not finite."""
        if not self._enabled:
            return
        self._check_fresh(optimizer, "unscale_")
        gradients = _gradients_of(optimizer)
        extremes = [end for gradient in gradients for end in torch.aminmax(gradient)]
        first = extremes[0].device
        self._found[id(optimizer)] = ~torch.stack([x.to(first) for x in extremes]).isfinite().all()
        torch._foreach_mul_(gradients, _float32(1 / self._scale))

    def found_inf(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the gradients of ``optimizer`` were not all finite when they were unscaled."""
        _check_optimizer(optimizer)
        if not self._enabled:
            return False
        if id(optimizer) not in self._found:
            name = type(optimizer).__name__
            raise RuntimeError(f"optimizer: expected unscale_() first, got {name} without it")
        return bool(self._found[id(optimizer)])

    def step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> Any:
        """Let ``optimizer`` take its step, unless a gradient was not finite; unscale if needed."""
        if not self._enabled:
            return optimizer.step(*arguments)
        if arguments:  # a closure would make gradients of its own
            raise ValueError(f"arguments: expected none, got {arguments!r:.60}")
        if id(optimizer) in self._stepped or id(optimizer) not in self._found:
            self._check_fresh(optimizer, "step")
            self.unscale_(optimizer)
        self._stepped.add(id(optimizer))
        return None if self.found_inf(optimizer) else optimizer.step()

    def update(self, new_scale: float | None = None) -> None:
        """Change the scale after a step: down if any gradient overflowed, else at times up."""
        if not self._enabled:
            return
        if new_scale is not None:
            self._scale = _as_scale("new_scale", new_scale)
        elif not self._found:
            raise RuntimeError("update: expected unscale_() or step() before it, got neither")
        elif any(map(bool, self._found.values())):
            self._scale, self._growth_tracker = _float32(self._scale * self._backoff_factor), 0
        else:
            self._growth_tracker += 1
            if self._growth_tracker == self._growth_interval:
                grown = _float32(self._scale * self._growth_factor)
                self._scale = grown if math.isfinite(grown) else self._scale
                self._growth_tracker = 0
        self._found, self._stepped = {}, set()


# %% [markdown] tags=["engine"]
# PyTorch keeps the scale as a number in 32 bits, so each new scale is rounded to that. Gradients in
# float16 are refused. They belong to weights in float16, which have no room for small updates, and
# dividing them would let them vanish after all.


# %% tags=["engine"]
#| export
def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


_LARGEST = float(np.finfo(np.float32).max)


def _as_scale(name: str, value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 < value <= _LARGEST or _float32(value) == 0:
        expected = "a positive number that float32 holds"
        raise ValueError(f"{name}: expected {expected}, got {value!r:.60}")
    return _float32(value)


# %% [markdown] tags=["engine"]
# Gradients are collected once for each optimizer.


# %% tags=["engine"]
#| export
def _as_switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r:.60}")
    return value


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"optimizer: expected one of torch.optim, got {optimizer!r:.60}")


def _gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of all parameters of an optimizer, the values of sparse ones."""
    gradients = []
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if (gradient := parameter.grad) is None:
            continue
        if gradient.dtype == torch.float16:
            got = f"a gradient in float16, of a weight of shape {tuple(parameter.shape)}"
            raise ValueError(f"optimizer: expected weights and gradients in float32, got {got}")
        values = gradient._values() if gradient.is_sparse else gradient
        gradients += [values] if values.numel() else []
    if not gradients:
        name = type(optimizer).__name__
        raise RuntimeError(f"optimizer: expected gradients, got {name} without any")
    return gradients


# %% tags=["engine"]
#| export
class GradScaler(GradScaler):  # continued
    def _check_fresh(self, optimizer: Any, method: str) -> None:
        """Refuse what was unscaled or stepped since the last update."""
        _check_optimizer(optimizer)
        done = "step" if id(optimizer) in self._stepped else "unscale_"
        if id(optimizer) in self._found:
            got = f"{type(optimizer).__name__} after {done}()"
            raise RuntimeError(f"optimizer: expected update() before {method}(), got {got}")

    def is_enabled(self) -> bool:
        """Whether anything is scaled."""
        return self._enabled

    def get_scale(self) -> float:
        """Return the scale, 1 if scaling is not enabled."""
        return self._scale if self._enabled else 1.0

    def get_growth_factor(self) -> float:
        """Return what the scale is multiplied by after ``growth_interval`` good steps."""
        return self._growth_factor

    def set_growth_factor(self, growth_factor: float) -> None:
        """Set what the scale is multiplied by to grow, more than 1."""
        if _as_scale("growth_factor", growth_factor) <= 1:
            raise ValueError(f"growth_factor: expected more than 1, got {growth_factor!r}")
        self._growth_factor = growth_factor

    def get_backoff_factor(self) -> float:
        """Return what the scale is multiplied by after a gradient that was not finite."""
        return self._backoff_factor

    def set_backoff_factor(self, backoff_factor: float) -> None:
        """Set what the scale is multiplied by to shrink, more than 0 and less than 1."""
        check_fraction("backoff_factor", backoff_factor)
        if backoff_factor == 0:
            raise ValueError(f"backoff_factor: expected more than 0, got {backoff_factor!r}")
        self._backoff_factor = backoff_factor

    def get_growth_interval(self) -> int:
        """Return how many good steps in a row let the scale grow."""
        return self._growth_interval

    def set_growth_interval(self, growth_interval: int) -> None:
        """Set how many good steps in a row let the scale grow."""
        check_whole("growth_interval", growth_interval, 1)
        self._growth_interval = growth_interval


# %% [markdown] tags=["engine"]
# The names in a state dict are those of PyTorch, so a run may switch from one scaler to the other.


# %% tags=["engine"]
#| export
class GradScaler(GradScaler):  # continued
    def state_dict(self) -> dict[str, Any]:
        """Return scale, settings and the count of good steps, empty if not enabled."""
        if not self._enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state, of this class or of ``torch.amp.GradScaler``."""
        if not self._enabled:
            return
        if missing := sorted(GradScaler().state_dict().keys() - state_dict.keys()):
            expected = "the state of a scaler that was enabled"
            raise ValueError(f"state_dict: expected {expected}, got one without {missing[0]!r}")
        check_at_least(_growth_tracker=(0, state_dict["_growth_tracker"]))
        self._scale = _as_scale("scale", state_dict["scale"])
        self.set_growth_factor(state_dict["growth_factor"])
        self.set_backoff_factor(state_dict["backoff_factor"])
        self.set_growth_interval(state_dict["growth_interval"])
        self._growth_tracker = state_dict["_growth_tracker"]


# %% [markdown] tags=["engine"]
# For the experiment that follows, a step in either order, with a gradient of length 2 that is to be
# clipped to 1:


# %% tags=["engine"]
def moved_by(order: str) -> float:
    weight = nn.Parameter(torch.zeros(4))
    sgd, scaler = torch.optim.SGD([weight], lr=1.0), GradScaler()
    scaler.scale(weight.sum()).backward()  # a gradient of four ones
    for part in order.split(", then "):
        if part == "clip":
            clip_gradients([weight], 1.0)
        else:
            scaler.unscale_(sgd)
    scaler.step(sgd)
    scaler.update()
    return weight.detach().norm().item()


# %% [markdown] tags=["engine"]
# And the loop of the main line, with this class, takes the same way:

# %% tags=["engine"]
weight = nn.Parameter(torch.zeros(4))
sgd, scaler = torch.optim.SGD([weight], lr=1.0), GradScaler(init_scale=2.0**20, growth_interval=4)
taken, trace = 0, []
for step in range(16):
    sgd.zero_grad()
    loss = (weight.half() * (math.inf if step == 11 else 1.0)).sum()  # a product in float16
    scaler.scale(loss).backward()
    scaler.unscale_(sgd)
    taken += not scaler.found_inf(sgd)
    trace.append(("x" if scaler.found_inf(sgd) else "") + f"{math.log2(scaler.get_scale()):.0f}")
    scaler.step(sgd)
    scaler.update()
assert trace == history
print(f"{taken} of {len(trace)} steps were taken")

# %% [markdown]
# ### The order, by experiment
#
# It is an easy mistake to clip too early. The gradient below has a length of 2, and clipping should
# cut it to 1. `moved_by(order)` takes one step of plain gradient descent with a rate of 1 and a
# loss scale of 65,536:

# %%
for order in ("unscale_, then clip", "clip, then unscale_"):
    print(f"{order}: the weights have moved by {moved_by(order):.2g}")


# %% [markdown]
# In the second run, clipping saw a gradient 65,536 times too long and cut it to 1; then it was
# divided by 65,536. Nothing fails visibly. With plain gradient descent the model learns far too
# slowly, and Adam, which divides by the size of its gradients, hides even that.
#
# ## Each part taken away once
#
# Is every part of the recipe needed? We train the tiny model of the autocast section for 60 steps,
# from three seeds, and take away one part at a time, with emulated casts. In one variant every
# result is rounded, also those of norms and softmax. *Weights in 16 bits* rounds the weights after
# each step, and AdamW's two means with them; rounding the means alone shows no effect in so few
# steps, as a later engine room finds. We compare validation losses with the run in `float32` that
# has the *same* seed. With three of them, the 95% interval of a mean difference is
# $\pm 4.30\, s/\sqrt 3$, where $s$ is the standard deviation of the three differences, and 4.30 is
# Student's factor.
#
# A *large batch* has about a million targets, ours some 800, and the mean over a thousand times as
# many makes each gradient a thousand times smaller. To imitate this, the loss is divided by
# $2^{10}$, and the gradients are multiplied by $2^{10}$ after the backward pass.

# %% [markdown] tags=["engine"]
# ### Engine room: a run from which parts can be taken away

# %% [markdown] tags=["engine"]
# The run with a loss scale imitates a large batch, too. *Weights in 16 bits* means that after each
# step, the weights and the two means of AdamW are rounded to `bfloat16`. This takes away two things
# at once, but rounding the means alone shows no effect in so few steps, as a later engine room
# finds. With *everything rounded*, the master weights have 32 bits, but the result of every single
# operation is rounded. For this the model runs on its reference backend, which spells all
# operations out.


# %% tags=["engine"]
class RoundEverything(CastProducts):
    """Round what any operation returns, in the dtype of the products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return tree_map(self.narrow, func(*args, **(kwargs or {})))


# %% [markdown] tags=["engine"]
# One run does the following in each step: scale, backward, unscale, clip, step, update. Its
# schedule counts only the steps that were taken.


# %% tags=["engine"]
def run_once(seed: int, options: dict[str, Any], n_steps: int = 60, rate: float = 3e-3) -> float:
    model = tiny_model(seed, options.get("backend", "torch"), **options.get("sizes", {}))
    groups = parameter_groups(model, 0.1)
    optimizer = options.get("optimizer", AdamW)(groups, lr=rate, betas=(0.9, 0.95))
    scaler = GradScaler(enabled=options.get("scaled", False))
    schedule, taken = cosine_schedule(n_steps, warmup=10), 0
    for step in range(n_steps):
        batch = compact(batches[1000 * seed + step])
        with options.get("context", nullcontext)():
            loss = cross_entropy(model(batch.inputs), batch.targets)
        optimizer.zero_grad()
        scaler.scale(loss / options.get("parts", 1)).backward()
        scaler.unscale_(optimizer)
        torch._foreach_mul_([p.grad for p in model.parameters()], options.get("parts", 1))
        clip_gradients(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(taken)
        taken += not (scaler.is_enabled() and scaler.found_inf(optimizer))
        scaler.step(optimizer)
        scaler.update()
        if options.get("pure"):
            round_in_place([model.state_dict(), *optimizer.state.values()])
    with torch.no_grad():
        return float(cross_entropy(model(held_out.inputs), held_out.targets))


# %% [markdown] tags=["engine"]
# These are the variants, and the function that rounds what is stored:


# %% tags=["engine"]
def round_in_place(stored: list[dict[str, Tensor]]) -> None:
    for entries in stored:
        for name, tensor in entries.items():
            if name != "step":
                tensor.data.copy_(tensor.bfloat16())


def rounded_to(dtype: torch.dtype, kind: Any = CastProducts) -> Callable[[], Any]:
    return partial(kind, dtype, emulate=True)


BF16, FP16 = torch.bfloat16, torch.float16
held_out = compact(rows.batch(range(1100, 1164)))
variants: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 products": {"context": rounded_to(BF16)},
    "float16, scaled, large batch": {"context": rounded_to(FP16), "scaled": True, "parts": 2**10},
    "float16, no scale": {"context": rounded_to(FP16)},
    "float16, no scale, large batch": {"context": rounded_to(FP16), "parts": 2**10},
    "bfloat16, weights in 16 bits": {"context": rounded_to(BF16), "pure": True},
    "bfloat16, everything rounded": {
        "context": rounded_to(BF16, RoundEverything),
        "backend": "reference",
    },
}


# %% [markdown] tags=["engine"]
# The difference to the control is printed as bounds that hold on every processor:


# %% tags=["engine"]
def against(control: str, name: str, losses: dict[str, list[float]]) -> tuple[float, float]:
    """The mean difference to the control, and half the width of its interval."""
    difference = np.subtract(losses[name], losses[control])
    return float(difference.mean()), float(4.303 * difference.std(ddof=1) / math.sqrt(3))


def bounded(control: str, name: str, losses: dict[str, list[float]]) -> str:
    """Where the interval of the difference lies, in words."""
    mean, half = against(control, name, losses)
    for low, high in ((-0.01, 0.01), (-0.05, 0.05), (0.1, 0.2), (0.1, 0.5)):
        if low <= mean - half and mean + half <= high:
            sure = f"between {low:+.2f} and {high:+.2f} nats"
            return sure if low > 0 else f"within {high} nats of none"
    raise AssertionError((name, mean, half))


# %% [markdown]
# ### The result
#
# `variants` has the runs by name. `run_once` trains one and returns its validation loss, and
# `bounded` states where the interval of the difference to `float32` lies:

# %%
losses = {name: [run_once(s, options) for s in range(3)] for name, options in variants.items()}
print("95% interval of the difference to float32:")
for name in list(variants)[1:]:
    print(f"{name:30} {bounded('float32', name, losses)}")


# %% [markdown]
# Products in 16 bits cost nothing that three seeds could show. Take away the master weights, or the
# loss scale in a large batch, and the run is worse by far more than its interval.
# `benchmarks/results/recipe.md` has the same runs with more digits, and runs twice as long, in
# nats:
#
# | | above `float32`, 60 steps | 120 steps |
# |:---|---:|---:|
# | the first three | 0.000 ± 0.000 | 0.000 ± 0.000 |
# | `float16`, no scale, large batch | 0.285 ± 0.059 | 0.322 ± 0.055 |
# | `bfloat16`, weights in 16 bits | 0.162 ± 0.006 | 0.285 ± 0.025 |
# | `bfloat16`, everything rounded | 0.015 ± 0.011 | 0.048 ± 0.002 |
#
# In our *small* batch `float16` did no harm without a loss scale: most gradients lose digits
# without vanishing, and that seems to be what AdamW forgives. And rounding everything costs next to
# nothing in 60 steps, but more in 120, and the sums of larger models are longer than ours.
#
# ## In the trainer
#
# A plain loop skips a batch whose gradients overflow. Our trainer has a budget in steps, and each
# of its batches should count. So it *repeats* the batch with half the scale, and counts one step
# when it is taken. Neither schedule nor optimizer has moved in between, and a run in `float16` has
# as many steps as one in `float32`. If the *loss* is not finite, no scale will mend it: the scale
# stays as it is, and the guard of {doc}`13_training` must decide.
#
# {py:class}`~llmbook.precision.MixedPrecision` puts this into the form that the trainer expects.
# Its argument is `"float32"`, `"bfloat16"`, or `"float16"`, on any device, and all that one writes
# is `Trainer(model, sampler, config, precision=MixedPrecision("float16"))`. A run that is stopped
# and resumed ends with the same bits as one that is not, because the scale is in its checkpoints;
# the engine room shows it, and how the scale behaves on the way.
#
# Could the optimizer's two running means have 16 bits, too? Not if they are rounded to nearest: a
# mean that changes by one part in a thousand stands still. With stochastic rounding they can.
# `CompactAdamW` in the engine room takes half the memory for its state, and both ways of rounding
# are measured there.

# %% [markdown] tags=["engine"]
# ### Engine room: `MixedPrecision`, a resumed run, and an optimizer in 16 bits (`CompactAdamW`)


# %% tags=["engine"]
#| export
class MixedPrecision(Precision):
    """Train in ``float32``, ``bfloat16`` or ``float16`` by name, with weights in float32.

    For the ``precision`` of a ``Trainer``, on any device. Float16 scales its losses with
    ``scaler``. A batch whose gradients overflow is repeated with a smaller scale, until that is
    below ``lowest_scale``. With ``emulate`` products are only rounded, as by ``CastProducts``.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def __init__(
        self,
        name: str = "bfloat16",
        *,
        scaler: GradScaler | None = None,
        emulate: bool = False,
        lowest_scale: float = 2.0**-14,
    ):
        super().__init__(name)
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(f"scaler: expected a GradScaler, got {scaler!r:.60}")
        self.scaler = scaler or GradScaler(enabled=name == "float16")
        self.emulate = _as_switch("emulate", emulate)
        self.lowest_scale = _as_scale("lowest_scale", lowest_scale)
        self.overflows = 0

    def computing(self, device: torch.device) -> Any:
        """Return the context of a forward pass on ``device``."""
        dtype = _SIXTEEN_BITS.get(self.name, torch.bfloat16)
        if self.emulate and self.name != "float32":
            return CastProducts(dtype, emulate=True)
        return torch.autocast(device.type, dtype, enabled=self.name != "float32")

    def scaled(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the loss times the scale."""
        _check_loss(loss)
        return self.scaler.scale(loss)

    def settle(self, optimizer: torch.optim.Optimizer, loss: Float[Tensor, ""]) -> bool:
        """Unscale gradients; return False if they have overflowed and a smaller scale may help."""
        _check_loss(loss)
        if not self.scaler.is_enabled():
            return True
        scale = self.scaler.get_scale()
        self.scaler.unscale_(optimizer)
        overflown = self.scaler.found_inf(optimizer)
        smaller = overflown and scale >= self.lowest_scale and bool(loss.isfinite())
        self.scaler.update(scale if overflown and not smaller else None)  # not its fault: it stays
        self.overflows += smaller
        return not smaller


# %% [markdown] tags=["engine"]
# A model that was cast as a whole has lost its master weights already. The message names the first
# of them. The scale, its settings, and the counts go into checkpoints, and the scale also goes into
# the log.


# %% tags=["engine"]
#| export
def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        raise ValueError(f"loss: expected a tensor of one number, got {loss!r:.60}")


class MixedPrecision(MixedPrecision):  # continued
    def check(self, model: nn.Module) -> None:
        """Refuse a ``model`` whose trained weights have 16 bits."""
        for name, weight in model.named_parameters():
            if weight.requires_grad and weight.dtype in _SIXTEEN_BITS.values():
                got = f"{name} in {weight.dtype}"
                raise ValueError(f"model: expected master weights in float32, got {got}")

    def numbers(self) -> dict[str, float]:
        """Return the scale and how many batches were repeated, if losses are scaled."""
        if not self.scaler.is_enabled():
            return {}
        return {"loss_scale": self.scaler.get_scale(), "overflows": float(self.overflows)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler and the count, empty if losses are not scaled."""
        state = self.scaler.state_dict()
        return {"scaler": state, "overflows": self.overflows} if state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if not self.scaler.is_enabled():
            return
        if missing := sorted({"scaler", "overflows"} - state.keys()):
            raise ValueError(f"state: expected scaler and overflows, got none of {missing[0]!r}")
        self.scaler.load_state_dict(state["scaler"])
        self.overflows = state["overflows"]


# %% [markdown] tags=["engine"]
# A run that {py:func}`~llmbook.training.run` starts from a file of settings gets a precision by
# `trainer=partial(Trainer, precision=MixedPrecision("float16"))`. If a loss is finite and a
# gradient is not, the scale is to blame, unless it has become so small already that it cannot be
# the reason.
#
# The trainer of the next experiment has casts that are emulated, and a scale that begins far too
# high and may grow after every ten good steps. The scale settles lower than it would in a plain
# loop, because our trainer takes the gradient of the *sum* of all losses, and divides by the count
# in 32 bits, after the backward pass. With some 800 targets in a batch, that keeps a factor of
# $2^{9}$ to $2^{10}$ that the usual mean would have lost.


# %% tags=["engine"]
def half_trainer(name: str) -> Trainer:
    config = TrainingConfig(
        n_steps=30, batch_size=8, learning_rate=3e-3, log_every=1, checkpoint_every=15
    )
    scaler = GradScaler(init_scale=2.0**24, growth_interval=10)
    precision = MixedPrecision("float16", scaler=scaler, emulate=True)
    sampler = BatchSampler(rows, batch_size=8)
    return Trainer(tiny_model(), sampler, config, folder=folder / name, precision=precision)


def stopped_and_resumed() -> tuple[Trainer, Trainer, Any]:
    stopped, whole = half_trainer("stopped"), half_trainer("whole")
    for _ in range(15):
        stopped.train_step(next(iter(stopped.batches)))
    stopped.save()
    resumed, log = half_trainer("stopped"), whole.train()
    resumed.train()
    assert resumed.precision.state_dict() == whole.precision.state_dict()
    return resumed, whole, log


# %% [markdown] tags=["engine"]
# A run in `float16` begins with a scale that is far too high. One trainer is stopped after 15 of 30
# steps, and another one, made anew, goes on from its checkpoint. A third is never stopped:

# %% tags=["engine"]
resumed, whole, log = stopped_and_resumed()
equal = sum(map(torch.equal, resumed.parameters, whole.parameters))
print(f"{whole.step} steps, {whole.guard.skipped} skipped by the guard; resumed: ", end="")
print(f"{equal} of {len(whole.parameters)} tensors are equal to the bit")

# %% [markdown] tags=["engine"]
# The resumed run ended with exactly the weights, and the scale, of the one that was never stopped.
# {numref}`fig-precision-scale` shows that scale.

# %% mystnb={"figure": {"caption": "The scale of the loss in a run of 30 steps that may grow after every 10 good ones, and how often a batch was repeated so far.", "name": "fig-precision-scale"}, "image": {"alt": "Two step curves over 30 training steps. The exponent of the scale falls from 24 to 10 in the first step, and then goes between 10 and 11: up after ten good steps, down where that was too much. The count of repeated batches jumps to 14 in the first step, and later rises by one wherever the scale falls."}} tags=["engine"]
draw_scale(log)

# %% [markdown] tags=["engine"]
# In the first step the batch was repeated until the gradients fit. Later, after every ten good
# steps, the scale tried double, and came back where double was too much.

# %% [markdown] tags=["engine"]
# A running mean is a sum that can get stuck. With $\beta_2 = 0.999$ the mean of squares changes by
# at most one part in a thousand when gradients get smaller, and bfloat16 has steps of one part in
# 128 to 256. Rounded to nearest, it never comes down again. Stochastic rounding moves it with a
# probability that makes it right on average. The optimizer below keeps both means in bfloat16, and
# has 32 bits only for the parameter that it is working on.


# %% tags=["engine"]
#| export
# Two ways to get from 32 to 16 bits
def _by_chance(x: Tensor) -> Tensor:
    return round_to(x, "bfloat16", rounding="stochastic").bfloat16()


_TO_BFLOAT16 = {"nearest": torch.Tensor.bfloat16, "stochastic": _by_chance}


# %% [markdown] tags=["engine"]
# The optimizer works on one parameter at a time:


# %% tags=["engine"]
#| export
class CompactAdamW(AdamW):
    """``AdamW`` that keeps its two means in bfloat16: half the memory of its state.

    ``rounding`` is "stochastic", drawn from torch's global generator, or "nearest", which lets the
    mean of squares get stuck if ``betas[1]`` is above 0.996. Arithmetic is in float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rounding: str = "stochastic",
    ):
        check_choice("rounding", rounding, ("nearest", "stochastic"))
        super().__init__(params, lr, betas, eps, weight_decay)
        for group in self.param_groups:
            group["rounding"] = rounding

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change all parameters that have a gradient; return what ``closure`` gave, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in (p for p in group["params"] if p.grad is not None):
                    self.param_groups = [{**group, "params": [parameter]}]
                    self._convert(parameter, torch.Tensor.float)
                    super().step()
                    self._convert(parameter, _TO_BFLOAT16[group["rounding"]])
        finally:
            self.param_groups = groups
        return loss

    def _convert(self, parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = change(state[name])


# %% [markdown] tags=["engine"]
# First we look at the mean of squares by itself. A weight gets gradients of 1 for 50 steps and then
# of 0.01, and its mean of squares should fall by a factor $0.999^{1000} = 0.37$ in the next
# thousand steps:

# %% tags=["engine"]
for rounding in ("float32", "nearest", "stochastic"):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(1000))
    options = {} if rounding == "float32" else {"rounding": rounding}
    kind = AdamW if rounding == "float32" else CompactAdamW
    optimizer = kind([weight], lr=1e-3, weight_decay=0.0, **options)
    means = []
    for step in range(1050):
        weight.grad = torch.full((1000,), 1.0 if step < 50 else 0.01)
        optimizer.step()
        if step in (49, 1049):
            means.append(float(optimizer.state[weight]["exp_avg_sq"].float().mean()))
    print(f"{rounding:10} the mean of squares falls by a factor {means[1] / means[0]:.2f}")

# %% [markdown] tags=["engine"]
# Next we train a model of one layer with $\beta_2 = 0.999$:


# %% tags=["engine"]
def with_state(rounding: str | None) -> dict[str, Any]:
    def make(groups: Any, **options: Any) -> torch.optim.Optimizer:
        options["betas"] = (0.9, 0.999)
        kind = AdamW if rounding is None else partial(CompactAdamW, rounding=rounding)
        return kind(groups, **options)

    return {"optimizer": make, "sizes": {"d_model": 16, "n_layers": 1}}


kinds = {"float32": None, "nearest": "nearest", "stochastic": "stochastic"}
states = {name: [run_once(s, with_state(r)) for s in range(3)] for name, r in kinds.items()}
print(
    f"float32 state: {np.mean(states['float32']):.0f} nats; 95% interval of the difference to it:"
)
for name in ("nearest", "stochastic"):
    print(f"{name:10} {bounded('float32', name, states)}")

# %% [markdown] tags=["engine"]
# In 60 steps no difference can be seen: the mean of squares has hardly begun to fall by then. For
# 600 steps of this model, `benchmarks/results/recipe.md` has +0.0023 ± 0.0007 nats for rounding to
# nearest, and -0.0004 ± 0.0009 for stochastic rounding. The first is small, but its interval
# excludes zero.

# %% [markdown]
# ## Half the memory?
#
# It is often said that mixed precision halves the memory. Let us count. In `float32`, training
# takes 16 bytes for each parameter: itself, its gradient, and two means. In mixed precision all of
# these have 32 bits as before, and a copy in 16 bits is *added* for each product and kept until the
# backward pass has used it. That makes 18 bytes for each weight of a product.
#
# What shrinks are the activations, which {doc}`11_model` counted, and not all of them. What the
# norms have read from the residual stream stays in 32 bits. The inputs of products have 16, but q,
# k, and v, which share one input, have it cast once *each*, and so do gate and up. For a model with
# SwiGLU, this makes $47 d$ bytes for each token and layer in place of $75 d$ in `float32`: 63%, not
# half. The engine room derives it. The logits are in 32 bits for the softmax, here as in `float32`.
#
# {py:func}`~llmbook.precision.memory_breakdown` adds up all parts. To check it, `LiveMemory` counts
# the bytes of all tensors that are alive, in a mode in which PyTorch reports every tensor that is
# made. This count is the same on every machine.

# %% [markdown] tags=["engine"]
# ### Engine room: the formula (`memory_breakdown`), and tensors counted (`LiveMemory`)

# %% [markdown] tags=["engine"]
# What shrinks are the activations. Equation {eq}`model-activations` counts what the backward pass
# needs: $4 d + 2 (h + k) d_h + c\, d_f$ numbers for each token and layer, with the widths $d$,
# $d_h$, and $d_f$ of the model, of a head, and of the feed-forward network, $h$ query heads, $k$
# key-value heads, and $c$ by the activation function. Of these, $2d$ are what the two norms have
# read from the residual stream; they stay in 32 bits. The inputs of products have 16 bits. But q,
# k, and v, which share one input, have it cast once *each*, and so do gate and up. So their two
# inputs, $2d$ numbers, become $3 + n_g$ vectors of $d$ numbers, where $n_g$ is 2 with a gate and 1
# without. In bytes:
#
# $$
# A_{\text{mixed}} = 4 \cdot 2d + 2\, \bigl( (3 + n_g)\, d + 2 (h + k)\, d_h + c\, d_f \bigr)
# \quad \text{per token and layer.}
# $$ (precision-activations)
#
# With $h d_h = k d_h = d$ and a SwiGLU of the usual width, $c\, d_f = \tfrac{32}{3} d$, this is $47
# d$ bytes in place of $75 d$ in `float32`: 63%, not half.

# %% tags=["engine"]
#| export
#: Bytes of state for each parameter, of optimizers: of matrices in blocks, and of all else.
STATE_BYTES = {"sgd": (0, 0), "adamw": (8, 8), "compact_adamw": (4, 4), "muon": (4, 8)}


# %% [markdown] tags=["engine"]
# `memory_breakdown` adds up all parts:


# %% tags=["engine"]
#| export
def memory_breakdown(
    config: ModelConfig,
    batch_size: int,
    sequence: int,
    *,
    precision: str = "float32",
    optimizer: str = "adamw",
    checkpointing: bool = False,
    chunk_size: int | None = None,
) -> dict[str, int]:
    """Return the bytes that a training step keeps, by what they are for.

    ``precision`` is "float32", "bfloat16" or "float16" for mixed precision as by autocast, or
    "pure" for 16 bits everywhere. ``optimizer`` is one of ``STATE_BYTES``. With ``checkpointing``
    each block keeps its input only, and one block at a time is computed again. ``chunk_size`` is
    that of ``chunked_cross_entropy``, None for all logits at once. A ``ValueError`` for experts.

    Left out are what lives only while one operation runs, what dropout keeps (masks, and without a
    fused kernel the weights of attention: with rate 0.1, width 128 and 128 tokens in a row, forward
    passes keep 1.7 times this in float32 and 2.1 times in mixed precision), and what norms of q and
    k keep in mixed precision (1.2 times this in the same model; nothing in float32).

    >>> parts = memory_breakdown(ModelConfig.preset("gpt2"), 8, 1024, precision="bfloat16")
    >>> round(parts["optimizer"] / 1e9, 1), round(parts["activations"] / 1e9, 1)  # in GB
    (1.0, 3.1)
    """
    check_at_least(batch_size=(1, batch_size), sequence=(1, sequence), chunk_size=(1, chunk_size))
    check_choice("precision", precision, ("float32", "bfloat16", "float16", "pure"))
    check_choice("optimizer", optimizer, tuple(STATE_BYTES))
    tokens, counts = batch_size * sequence, parameter_counts(config)
    n, in_blocks = count_parameters(config), counts["attention"] + counts["feed_forward"]
    size = 2 if precision == "pure" else 4
    products = in_blocks + config.vocab_size * config.d_model
    matrices, others = STATE_BYTES[optimizer]
    state = matrices * in_blocks + others * (n - in_blocks)
    logits = config.vocab_size * (tokens if chunk_size is None else min(chunk_size, tokens))
    return {
        "weights": size * n,
        "16-bit copies": 2 * products if precision in _SIXTEEN_BITS else 0,
        "gradients": size * n,
        "optimizer": state * size // 4,
        "activations": _activations(config, batch_size, sequence, precision, checkpointing),
        "logits": size * logits,
    }


# %% [markdown] tags=["engine"]
# The activations are {eq}`precision-activations`. With checkpointing, which comes below, they are
# the inputs of all blocks and one block in full:


# %% tags=["engine"]
#| export
def _activations(config: ModelConfig, rows: int, length: int, precision: str, again: bool) -> int:
    """What the forward pass keeps up to the head, in bytes; all blocks, or their inputs and one."""
    d, tokens = config.d_model, rows * length
    whole = activation_bytes(config, rows, length, torch.float16) // 2  # in numbers
    ends = 2 * d * tokens
    layer = (whole - ends) // config.n_layers
    if precision in _SIXTEEN_BITS:
        gates = 2 if config.activation in GATES else 1  # products that share an input
        layer = 8 * d * tokens + 2 * (layer + (gates - 1) * d * tokens)
        ends = (4 + 2) * d * tokens
    else:
        size = 2 if precision == "pure" else 4
        layer, ends = layer * size, ends * size
    stream = d * tokens * (2 if precision == "pure" else 4)
    kept = config.n_layers * stream + layer if again else config.n_layers * layer
    return kept + ends


# %% [markdown] tags=["engine"]
# `LiveMemory` counts storages, since several views can share one, and subtracts each when it is
# freed.


# %% tags=["engine"]
#| export
class LiveMemory(TorchDispatchMode):
    """Within this context, counts the bytes of tensors that were made in it and are still alive.

    ``live`` is how many they are now, ``peak`` the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, and count the storages of what it returns, once each."""
        kwargs = kwargs or {}
        self._known.update(_storages((args, kwargs)))  # was there before, or is counted
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, n_bytes: int) -> None:
        self.live += n_bytes
        self.peak = max(self.peak, self.live)


# %% tags=["engine"]
#| export
# The memory behind all tensors in nested lists, tuples and dicts
def _storages(tree: Any) -> list[Any]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]


# %% [markdown] tags=["engine"]
# What is alive after a forward pass is what it keeps: activations and copies of weights. We measure
# it with a model of four blocks and 1,024 tokens.

# %% tags=["engine"]
medium = ModelConfig(vocab_size=512, context_length=128, d_model=128, n_layers=4, n_heads=4)
tokens = torch.arange(8 * 128).reshape(8, 128) % 512


def kept_by(model: TransformerLM, precision: str) -> int:
    with LiveMemory() as memory, MixedPrecision(precision).computing(tokens.device):
        total = model(tokens).sum()
    assert total.requires_grad  # the graph is alive, and all that it holds
    return memory.live


# %% [markdown] tags=["engine"]
# The formula leaves out what dropout and norms of q and k keep. How much is that in this model,
# relative to the formula?

# %% tags=["engine"]
kept: dict[str, int] = {}


def formula(config: ModelConfig, precision: str) -> int:
    parts = memory_breakdown(config, 8, 128, precision=precision)
    return parts["activations"] + parts["16-bit copies"]


for name, changes in {"dropout of 0.1": {"dropout": 0.1}, "qk-norm": {"qk_norm": True}}.items():
    config = ModelConfig(**vars(medium) | changes)
    models = {precision: TransformerLM(config) for precision in ("float32", "bfloat16")}
    with warnings.catch_warnings(action="ignore"):  # that two types rule out a fused kernel
        ratios = [kept_by(model, kind) / formula(config, kind) for kind, model in models.items()]
    print(f"{name:16} float32 {ratios[0]:.1f} times the formula, mixed {ratios[1]:.1f} times")

# %% [markdown] tags=["engine"]
# On this processor, dropout makes attention keep its weights and a mask for each pair of tokens.
# The norms of q and k in mixed precision get their inputs cast up to 32 bits, and keep them in that
# form.

# %% [markdown] tags=["engine"]
# Three models, from the size of ours to one of 7 billion parameters, each with its rows and tokens
# in a row:

# %% tags=["engine"]
small = ModelConfig(vocab_size=512, context_length=128, d_model=64, n_layers=4, n_heads=4)
models = {
    "0.3M, 8 x 128": (small, 8, 128),
    "124M, 8 x 1,024": (ModelConfig.preset("gpt2"), 8, 1024),
    "6.7B, 1 x 4,096": (ModelConfig.preset("llama2-7b"), 1, 4096),
}
kinds_of_precision = ("float32", "bfloat16", "pure")
totals = {
    (name, kind): memory_breakdown(*shape, precision=kind)
    for name, shape in models.items()
    for kind in kinds_of_precision
}

# %% [markdown]
# ### Is the formula right?
#
# We compare the formula with what is alive after a forward pass, which is activations and copies of
# weights, in `medium`, a model of four blocks, with 8 rows of 128 tokens:

# %%
for precision in ("float32", "bfloat16"):
    kept[precision] = kept_by(TransformerLM(medium), precision)
    ratio = kept[precision] / formula(medium, precision)
    print(f"{precision:8} {kept[precision] / 1e6:.1f} MB are kept, {ratio:.2f} times the formula")

# %% [markdown]
# The formula is right to within about a percent. (It leaves out dropout, and norms of q and k in
# mixed precision. A dropout of 0.1 makes this model keep 1.7 times as much in `float32` and 2.1
# times in mixed precision; such norms, 1.0 and 1.2 times.) Mixed precision keeps two thirds of what
# `float32` keeps. Here is what that means for a whole step with AdamW, in three models, from the
# size of ours to 7 billion parameters; a row's name has the parameters, then rows times tokens in a
# row. The last column is for *pure* 16 bits: everything has 16 bits, the optimizer's state and the
# logits included.

# %%
for name in models:
    full, mixed, pure = (sum(totals[name, kind].values()) for kind in kinds_of_precision)
    shares = f"mixed {mixed / full:.0%}, pure 16 bits {pure / full:.0%}"
    print(f"{name:16} {full / 1e9:7.3f} GB in float32; {shares}")

# %% [markdown]
# Where activations take most of the memory ({numref}`fig-precision-memory`), mixed precision saves
# a fifth to a quarter. Where weights and optimizer do, it saves next to nothing. Its point is
# speed, on hardware that multiplies 16-bit numbers faster.

# %% mystnb={"figure": {"caption": "Bytes of a training step with AdamW in float32, in mixed precision and in pure 16 bits, relative to float32.", "name": "fig-precision-memory"}, "image": {"alt": "Three groups of three stacked bars, for float32, mixed and pure 16 bits, in percent of float32. With 0.3 million parameters they are 100, 74 and 50 high, and three quarters of each is activations. With 124 million they are 100, 81 and 50; activations are more than half, logits a fifth. With 6.7 billion they are 100, 99 and 50; the optimizer is more than a third, activations a quarter, and in mixed precision the copies of weights take what activations save."}}
draw_memory(totals, models)


# %% [markdown]
# ## What else saves memory
#
# If activations fill the memory, why keep them? **Activation checkpointing**
# {cite}`chen2016sublinear` keeps only the input of each block, and computes the block a second time
# when the backward pass arrives there. The price is one more forward pass. Since a backward pass
# takes about twice the operations of a forward pass, a step takes at most $4/3$ of the operations.
# The gradients are equal to the bit, as the engine room shows.

# %% [markdown] tags=["engine"]
# ### Engine room: checkpointing as PyTorch does it, and the steps that are measured

# %% [markdown] tags=["engine"]
# As a function with a derivative of its own, checkpointing takes a dozen lines:


# %% tags=["engine"]
class Recomputed(torch.autograd.Function):
    """A block that keeps its input and is computed again for its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)  # a Function's forward pass is not recorded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, gradient)  # adds to .grad of the weights, and of x
        return x.grad, None


# %% [markdown] tags=["engine"]
# PyTorch's version also restores the state of the random generators, so that dropout is the same
# the second time, and that of autocast. We use that version, and check it against ours.


# %% tags=["engine"]
#| export
def checkpoint_blocks(model: TransformerLM) -> TransformerLM:
    """Let each block of ``model`` keep its input only in training; return ``model``.

    Gradients are the same. Memory: the stream before each block, and one block at a time.
    Source: Chen et al. (2016).
    """
    if not isinstance(model, TransformerLM):
        raise ValueError(f"model: expected a TransformerLM, got {model!r:.60}")
    for block in model.blocks:
        if not isinstance(block.forward, partial):  # not twice
            block.forward = partial(_checkpointed, block.forward)
    return model


def _checkpointed(forward: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    active = _ACTIVE[-1] if _ACTIVE else None

    def contexts() -> tuple[Any, Any]:
        again = type(active)(active.dtype, emulate=active.emulate) if active else nullcontext()
        return nullcontext(), again

    result: Tensor = checkpoint(
        forward, *arguments, use_reentrant=False, context_fn=contexts, **options
    )
    return result


# %% [markdown] tags=["engine"]
# Here are all three, with what they keep:


# %% tags=["engine"]
class OurBlock(nn.Module):
    """A block that is computed again by the function above."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return Recomputed.apply(x, partial(self.block, **options))


def plain_medium() -> TransformerLM:
    seed_everything(0)
    return TransformerLM(medium)


ours = plain_medium()
ours.blocks = nn.ModuleList(map(OurBlock, ours.blocks))
three = {"plain": plain_medium(), "ours": ours, "torch's": checkpoint_blocks(plain_medium())}
gradients = {}
for name, model in three.items():
    kept[name] = kept_by(model, "float32")
    model(tokens).square().mean().backward()
    gradients[name] = [p.grad for p in model.parameters()]
    same = sum(map(torch.equal, gradients[name], gradients["plain"]))
    equal = f"{same} of {len(gradients[name])} gradients equal"
    print(f"{name:8} keeps {kept[name] / 1e6:5.1f} MB; {equal}")
assert kept["ours"] < kept["plain"] / 5 and same == len(gradients["plain"])


# %% [markdown] tags=["engine"]
# One training step, with any of the ways to save memory:


# %% tags=["engine"]
def step_of(model: TransformerLM, optimizer: torch.optim.Optimizer, **how: Any) -> None:
    parts = tokens.split(how.get("rows", 8))
    for part in parts:
        with MixedPrecision(how.get("precision", "float32")).computing(part.device):
            hidden, head = model.hidden_states(part[:, :-1]), model.lm_head.weight
            if "chunk_size" in how:
                loss = chunked_cross_entropy(
                    hidden, head, part[:, 1:], chunk_size=how["chunk_size"]
                )
            else:
                loss = cross_entropy(model.lm_head(hidden), part[:, 1:])
        (loss / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


# %% [markdown] tags=["engine"]
# The ways to save memory, by name:


# %% tags=["engine"]
ways: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed precision": {"precision": "bfloat16"},
    "checkpointing": {"checkpointing": True},
    "accumulation, 4 x 2 rows": {"rows": 2},
    "loss in chunks of 128": {"chunk_size": 128},
    "foreach optimizer": {"kernel": {"foreach": True}},
    "all but mixed precision": {"checkpointing": True, "rows": 2, "chunk_size": 128},
}


def prepared(how: Mapping[str, Any]) -> Callable[[], None]:
    model = plain_medium()
    if how.get("checkpointing"):
        checkpoint_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), **how.get("kernel", {"fused": True}))
    step = partial(step_of, model, optimizer, **how)
    step()  # makes the state of the optimizer
    return step


# %% [markdown] tags=["engine"]
# What was there before the step, weights and the optimizer's state, takes 12 bytes a parameter and
# is added to what the step has alive at once:


# %% tags=["engine"]
def peak_of(step: Callable[[], None]) -> int:
    with LiveMemory() as memory:
        step()
    return 12 * count_parameters(medium) + memory.peak


steps = {name: prepared(how) for name, how in ways.items()}

# %% [markdown]
# ### One at a time, and all together
#
# Now we try everything that saves memory on the same model, and measure the most bytes that are
# alive at once in a whole step. Accumulation cuts a batch of 8 rows into four parts. The chunked
# loss is that of {doc}`12_optimization`. PyTorch's `foreach` optimizer makes temporary copies of
# all tensors; the fused optimizer, which all other rows use, makes none.

# %%
peaks = {name: peak_of(step) for name, step in steps.items()}
peaks["the formula"] = sum(memory_breakdown(medium, 8, 127).values())
for name, peak in peaks.items():
    print(f"{name:26} {peak / 1e6:5.1f} MB, {peak / peaks['plain']:4.0%}")


# %% [markdown]
# Checkpointing and accumulation each save more than half of the memory, and together with the loss
# in chunks they save two thirds. The chunked loss saves more where the vocabulary is larger than
# our 512 tokens. How the optimizer works makes no difference to the *peak*, which is reached before
# its turn. And what does this cost in time? (That of mixed precision depends on the processor.)


# %% tags=["engine"]
# The best time of several calls
def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# %% [markdown]
# Here is the best time of three, relative to the plain step. That one is timed anew for each row,
# so its own ratio shows how noisy the clock is:

# %% tags=["nbval-ignore-output"]
del steps["mixed precision"]
for name, step in steps.items():
    print(f"{name:26} {seconds(step) / seconds(steps['plain']):.2f}")


# %% [markdown]
# When nothing else kept the machine busy, checkpointing took about the $4/3$ that its operations
# predict. Accumulation took longer, too: it makes four times as many calls from Python, with
# smaller matrices in each.
#
# ## A compiler in between
#
# Besides products, a step has norms, casts, activations, and additions. Each of them is a call from
# Python into a kernel that reads its inputs from memory and writes its output back. `torch.compile`
# {cite}`ansel2024pytorch` attacks both costs. It runs the function once with symbols in place of
# tensors, and notes the operations in a **graph**. A compiler then **fuses** neighbors: a chain of
# elementwise operations becomes one loop that reads and writes once.
#
# The graph is valid only for what it was made from, so the code is kept together with **guards**:
# this argument is a tensor of that dtype and that shape, that flag is True. If a guard fails, the
# function is compiled **anew**. What cannot be noted, such as a decision that depends on the
# numbers in a tensor, **breaks** the graph in two. With a backend that only counts, we can watch
# how many graphs there are after each call:


# %% tags=["engine"]
# A backend of torch.compile that counts graphs, and two functions to compile
def graphs_of(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[int]:
    """How many graphs there are after each call."""
    graphs, counts = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend)
    for arguments in calls:
        assert torch.equal(compiled(*arguments), function(*arguments))
        counts.append(len(graphs))
    return counts


def scaled_up(x: Tensor, factor: int) -> Tensor:
    return (x * factor).relu() + 1


def with_a_decision(x: Tensor) -> Tensor:
    return x * 2 + 1 if x.sum() > 0 else x * 2 - 1


# %% [markdown]
# `scaled_up(x, factor)` is `(x * factor).relu() + 1`, and `with_a_decision(x)` is `x * 2 + 1` or
# `x * 2 - 1`, by the sign of the sum of `x`:

# %%
short, longer, longest = (torch.arange(n, dtype=torch.float32) for n in (4, 5, 6))
print("the same call twice  ", graphs_of(scaled_up, [(short, 2), (short, 2)]))
print("lengths 4, 5, 6      ", graphs_of(scaled_up, [(short, 2), (longer, 2), (longest, 2)]))
print("float32, then float64", graphs_of(scaled_up, [(short, 2), (short.double(), 2)]))
print("a decision on numbers", graphs_of(with_a_decision, [(short,), (short,), (-short,)]))

# %% [markdown]
# The same call is compiled once. A second length is compiled once more, now for *any* length, and
# the third costs nothing. Each dtype has a graph of its own. A decision on numbers needs one graph
# before it and one for each branch that is taken. So compiled code prefers fixed shapes, few kinds
# of arguments, and no decisions. Training is like that, and generation has to be made so
# ({doc}`14_generation`, which measures it).
#
# When does it pay? `python benchmarks/precision.py` measured training steps in `float32` with one
# thread, on a machine with other work to do, so the second digit of a ratio says little:
#
# | parameters | llmbook | compiling | pays after | transformers | compiling | pays after |
# |---|---:|---:|---:|---:|---:|---:|
# | 0.28M | 1.22 | 29 s | 1,148 steps | 1.08 | 10 s | 1,034 steps |
# | 1M | 1.21 | 16 s | 253 steps | 1.24 | 13 s | 192 steps |
# | 3M | 1.10 | 23 s | 303 steps | 1.11 | 11 s | 122 steps |
#
# *(speeds relative to the same code run eagerly; more in `benchmarks/results/precision.md`)*
#
# Compiled code was 8 to 24 percent faster, and had paid for itself after one hundred to a thousand
# steps. Our compiled code was 1.15 to 1.18 times as fast as transformers' eager code. Don't expect
# much more on a processor: most of a step is products, whose kernels are the same.
# `TrainingConfig(compile=True)` compiles the blocks one by one; all of them are alike, so one
# compilation serves all.
#
# ## A scale for each block
#
# With 8 bits, and certainly with 4, a tensor doesn't fit into the range as it is. It is divided by
# a **scale** first, so that its largest absolute value, its *amax*, becomes the largest number of
# the format. One scale for the whole tensor has a weakness that we know from {doc}`14_generation`:
# a single outlier makes it coarse for all other numbers. The formats of recent GPUs give a scale to
# each short block of neighbors in a row {cite}`rouhani2023ocp`:
#
# - **MXFP8** has blocks of 32 numbers in e4m3 (or e5m2), and their scale is a power of two in e8m0.
#   That makes $8 + 8/32 = 8.25$ bits per value. **MXFP4** does the same with e2m1, in 4.25 bits.
# - **NVFP4** has blocks of 16 numbers in e2m1, whose scale is itself a number in e4m3, with three
#   fraction bits. Since these scales reach no farther than 448, the tensor as a whole has another
#   scale in `float32`. That makes $4 + 8/16 = 4.5$ bits per value {cite}`nvidia2025nvfp4`.
#
# A scale that is a power of two follows from the exponents: the largest power of two in the block,
# divided by the largest in the format, which is $2^8$ for e4m3 and $2^2$ for e2m1. What still
# exceeds the format's largest number saturates. NVFP4 can do better, since its scale has digits:
# amax over 6, the largest number of e2m1, rounded to e4m3.
# {py:func}`~llmbook.precision.quantize_blocks` does this with any of the formats.

# %% [markdown] tags=["engine"]
# ### Engine room: block formats by name (`quantize_blocks`), and blocks that are refused


# %% [markdown] tags=["engine"]
# Here are four numbers as a block of MXFP4. The largest one takes the scale to 4, and the two small
# ones vanish:

# %% tags=["engine"]
block = torch.tensor([0.1, 0.7, 2.5, 24.0])
scale = 2.0 ** (block.abs().max().log2().floor() - 2)
print(f"scale {scale:.0f}:", (round_to(block / scale, "e2m1") * scale).tolist())


# %% [markdown] tags=["engine"]
# For e4m3, the largest value of a block lies between 256 and 512 once it is divided by the scale,
# and what exceeds 448 saturates.


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class BlockFormat:
    """A format in which ``size`` neighbors share a scale, and with ``tensor_scale`` all another."""

    name: str
    element: str
    size: int
    scale: str
    tensor_scale: bool = False

    def __post_init__(self) -> None:
        check_text(self.name, "name")
        check_choice("element", self.element, FORMATS)
        check_whole("size", self.size, 1)
        check_choice("scale", self.scale, FORMATS)
        if not isinstance(self.tensor_scale, bool):
            raise ValueError(f"tensor_scale: expected True or False, got {self.tensor_scale!r:.60}")

    @property
    def bits_per_value(self) -> float:
        """Bits of a value and its share of the block's scale; the tensor's scale is not counted."""
        return FORMATS[self.element].bits + FORMATS[self.scale].bits / self.size


# %% [markdown] tags=["engine"]
# Here are the formats by name, and what a tensor in one of them consists of:


# %% tags=["engine"]
#| export
#: The block formats by name.
BLOCK_FORMATS = {
    block.name: block
    for block in (
        BlockFormat("mxfp8", "float8_e4m3fn", 32, "float8_e8m0fnu"),
        BlockFormat("mxfp8_e5m2", "float8_e5m2", 32, "float8_e8m0fnu"),
        BlockFormat("mxfp4", "float4_e2m1fn", 32, "float8_e8m0fnu"),
        BlockFormat("nvfp4", "float4_e2m1fn", 16, "float8_e4m3fn", tensor_scale=True),
    )
}


class QuantizedBlocks(NamedTuple):
    """The numbers of a tensor, the scale of each block, and the scale of all, 1 if there is none.

    Each is a number of its format, kept in float32.
    """

    values: Tensor
    scales: Tensor
    tensor_scale: Tensor

    def dequantize(self) -> Tensor:
        """Return the tensor that they stand for, in float32."""
        size = self.values.size(-1) // self.scales.size(-1)
        return self.values * (self.scales * self.tensor_scale).repeat_interleave(size, dim=-1)


# %% tags=["engine"]
#| export
def quantize_blocks(
    x: Float[Tensor, "*batch n"],
    format: str | BlockFormat,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    generator: torch.Generator | None = None,
) -> QuantizedBlocks:
    """Round ``x`` to a block format, in blocks of neighbors along the last dimension.

    ``rounding`` is that of the values; scales are never drawn. What exceeds the largest number
    saturates. NaN, infinities, and a last dimension that is no multiple of the block raise a
    ``ValueError``. Sources: OCP Microscaling Formats 1.0 (2023); NVIDIA (2025), "Pretraining Large
    Language Models with NVFP4".
    """
    block = _check_blocks(x, format)
    element = FORMATS[block.element]
    x = x.detach().float()
    amax = x.abs().unflatten(-1, (-1, block.size)).amax(dim=-1)
    tensor_scale = torch.ones((), device=x.device)
    if block.tensor_scale:
        largest = element.largest * FORMATS[block.scale].largest
        tensor_scale = (amax.amax() / largest).clamp(min=torch.finfo(torch.float32).tiny)
        scales = round_to(amax / element.largest / tensor_scale, block.scale)
    else:
        scales = _power_of_two_below(amax.double()) / _power_of_two_below(element.largest)
        scales = round_to(scales.float(), block.scale)
    whole = (scales * tensor_scale).repeat_interleave(block.size, dim=-1)
    scaled = torch.where(whole > 0, x / whole, 0.0)  # a scale so small that it became zero
    values = round_to(scaled, element, rounding=rounding, saturate=True, generator=generator)
    return QuantizedBlocks(values, scales, tensor_scale)


# %% [markdown] tags=["engine"]
# The power of two at or below a number stands in its exponent, as before. For zero we take the
# smallest that e8m0 has.


# %% tags=["engine"]
#| export
def _power_of_two_below(x: Tensor | float) -> Tensor:
    wide = torch.as_tensor(x, dtype=torch.float64).contiguous()
    exponent = (wide.view(torch.int64) >> 52).clamp(min=1023 - 127)
    return (exponent << 52).view(torch.float64)


def _check_blocks(x: object, format: object) -> BlockFormat:
    check_tensor("x", x, "...", "n")
    if not isinstance(format, BlockFormat):
        check_choice("format", format, BLOCK_FORMATS)
        format = BLOCK_FORMATS[format]  # type: ignore[index]
    n: int = x.size(-1)  # type: ignore[attr-defined]
    if n % format.size or not x.numel():  # type: ignore[attr-defined]
        expected = f"whole blocks of {format.size} along the last dimension, and at least one"
        shape = tuple(x.shape)  # type: ignore[attr-defined]
        raise ValueError(f"x: expected {expected}, got shape {shape}")
    if not x.isfinite().all():  # type: ignore[attr-defined]
        wrong = x[~x.isfinite()][0].item()  # type: ignore[index, attr-defined]
        raise ValueError(f"x: expected finite numbers, got {wrong}")
    return format


# %% [markdown] tags=["engine"]
# For the table of errors, we take the weights of one layer of our trained model, and the
# activations that flow into it. In large models, a few channels of the activations are many times
# larger than all others {cite}`dettmers2022int8`. Ours is too small to have such channels, so we
# make one channel in 64 a hundred times larger, and then measure the error of the *other* 63.


# %% tags=["engine"]
def one_scale(x: Tensor, name: str) -> Tensor:
    scale = x.abs().max() / FORMATS[name].largest
    return round_to(x / scale, name, saturate=True) * scale


seen = {}
layer = trained.model.blocks[1].feed_forward.up_proj
hook = layer.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
with torch.no_grad():
    trained.model(compact(sampler[0]).inputs)
hook.remove()
usual = seen["x"].flatten(0, 1)
loud = usual.clone()
loud[:, 17] *= 100
tensors = {"weights": layer.weight.detach(), "activations": usual, "with outliers": loud}


# %% tags=["engine"]
def errors_of(name: str) -> list[float]:
    """The errors of a format in each of the tensors, relative to their root mean square."""
    errors = []
    for kind, x in tensors.items():
        blocks = name in BLOCK_FORMATS
        found = quantize_blocks(x, name).dequantize() if blocks else one_scale(x, name)
        quiet = torch.arange(64) != 17 if kind == "with outliers" else slice(None)
        error = (found - x)[:, quiet].square().mean() / x[:, quiet].square().mean()
        errors.append(error.sqrt().item())
    return errors


# %% [markdown]
# ### What block scales gain
#
# Here are the errors for weights of our trained model, and for activations that flow into them. In
# large models, a few channels of the activations are many times larger than all others
# {cite}`dettmers2022int8`. To imitate this, the last column has one of 64 channels made a hundred
# times larger, and the error is that of the *other* 63:

# %%
print("root mean square of errors, relative to the values, is at most")
print("format          ", *(f"{name:>14}" for name in tensors))
for name in ("float8_e4m3fn", "mxfp8", "float4_e2m1fn", "mxfp4", "nvfp4"):
    print(f"{name:16}", *(f"{min(100, 5 * math.ceil(20 * e)):13}%" for e in errors_of(name)))

# %% [markdown]
# With 8 bits, block scales hardly matter: e4m3 has exponents of its own. With 4 bits they decide as
# soon as there are outliers; without any, only NVFP4 gains. With an outlier and one scale, all
# quiet channels become zero, an error of 100%. In blocks, only the outlier's neighbors suffer,
# which are half of all channels in our short rows for MXFP4, and a quarter for NVFP4.
#
# ## Training in 8 and 4 bits
#
# Recent GPUs multiply 8-bit numbers twice as fast again as 16-bit ones, on paper, and 4-bit numbers
# faster still. We have no such unit, but we can round the factors to the short format, and multiply
# in `float32`. This shows the *accuracy* of such training and says nothing about its *speed*; all
# the rounding makes it slower.
#
# A linear layer takes part in three products, one forward and two backward. Let $X$ be its inputs
# (one row for each token), $W$ its weights, and $G$ the gradient of its outputs:
#
# $$
# Y = X W^\top, \qquad dX = G W, \qquad dW = G^\top X .
# $$ (precision-products)
#
# All factors are rounded: $X$ and $W$ to e4m3, which has more digits, and $G$ to e5m2, which has
# more range, since gradients vary more {cite}`micikevicius2022fp8`. Each needs a scale before it is
# rounded: from its own amax (**current** scaling), from the largest amax of the last 16 steps,
# which is known beforehand (**delayed**), or one for each **block** along the direction that the
# product sums over.
#
# With 4 bits, gradients are rounded by chance, as in NVIDIA's recipe {cite}`nvidia2025nvfp4`,
# because small ones would vanish again and again. `emulate(model, recipe)` returns a copy of a
# model whose linear layers do all this, by a recipe's name.

# %% [markdown] tags=["engine"]
# ### Engine room: recipes, a layer with rounded products, and a model of them (`emulate`)


# %% [markdown] tags=["engine"]
# Recipes differ in their scales:
#
# - **Current** scaling takes the amax of the tensor that is to be rounded, which means reading the
#   tensor twice.
# - **Delayed** scaling takes the largest amax of the last 16 steps, which is known beforehand. If a
#   tensor grows suddenly, its largest values saturate until the history has caught up.
# - **Block** scaling uses the formats above. The blocks have to lie along the direction that the
#   product sums over, so that a scale can be factored out of each partial sum. The three products
#   sum over features, outputs, and tokens, so each factor is rounded twice, in two directions.


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How operands of products are rounded: formats forward and backward, and their scales.

    ``scaling`` is "none", "current" (the amax of the tensor), "delayed" (the largest amax of the
    last ``history`` steps) or "block", with names of block formats. With ``stochastic`` gradients
    are rounded by chance, from torch's global generator.
    """

    forward: str = "float8_e4m3fn"
    backward: str = "float8_e5m2"
    scaling: Literal["none", "current", "delayed", "block"] = "current"
    history: int = 16
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_choice("scaling", self.scaling, ("none", "current", "delayed", "block"))
        known: Collection[str] = BLOCK_FORMATS if self.scaling == "block" else FORMATS
        check_choice("forward", self.forward, known)
        check_choice("backward", self.backward, known)
        check_whole("history", self.history, 1)
        if not isinstance(self.stochastic, bool):
            raise ValueError(f"stochastic: expected True or False, got {self.stochastic!r:.60}")


# %% [markdown] tags=["engine"]
# Some common recipes have names. Forward and backward formats are the same where blocks are scaled,
# since a scale for each block leaves little need for a wider range:

# %% tags=["engine"]
#| export
#: Recipes by name.
RECIPES = {
    "bfloat16": Recipe(forward="bfloat16", backward="bfloat16", scaling="none"),
    "fp8_unscaled": Recipe(scaling="none"),
    "fp8_current": Recipe(),
    "fp8_delayed": Recipe(scaling="delayed"),
    "mxfp8": Recipe(forward="mxfp8", backward="mxfp8", scaling="block"),
    "mxfp4": Recipe(forward="mxfp4", backward="mxfp4", scaling="block", stochastic=True),
    "nvfp4": Recipe(forward="nvfp4", backward="nvfp4", scaling="block", stochastic=True),
}

# %% [markdown] tags=["engine"]
# The layer rounds a factor along one of its two dimensions. With one scale for the whole tensor,
# the dimension doesn't matter. A tensor of zeros has an amax of zero, and gets a scale of 1:


# %% tags=["engine"]
#| export
class EmulatedLinear(nn.Linear):
    """A linear layer whose three products have rounded operands, and sums in float32.

    The weights stay as they are; biases are added in float32. With delayed scales, the amax of the
    last steps is a buffer, which only training changes.
    """

    history: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, recipe: str | Recipe
    ):
        check_whole("in_features", in_features, 1)
        check_whole("out_features", out_features, 1)
        super().__init__(in_features, out_features, bias)
        self.recipe = _find_recipe(recipe)
        if self.recipe.scaling == "delayed":
            self.register_buffer("history", torch.zeros(3, self.recipe.history))

    def _rounded(self, x: Tensor, role: int, dim: int) -> Tensor:
        """Round the inputs (role 0), the weights (1) or the gradients (2), a matrix."""
        recipe, gradient = self.recipe, role == 2
        name = recipe.backward if gradient else recipe.forward
        rounding: Any = "stochastic" if gradient and recipe.stochastic else "nearest"
        if recipe.scaling == "block":
            return _round_blocks(x, name, dim, rounding)
        if recipe.scaling == "none":
            return round_to(x, name, rounding=rounding)
        scale = self._amax(x.abs().amax(), role) / FORMATS[name].largest
        scale = torch.where(scale > 0, scale, 1.0)
        return round_to(x / scale, name, rounding=rounding, saturate=True) * scale

    def _amax(self, amax: Tensor, role: int) -> Tensor:
        """The amax that the scale is made of: this one, or if delayed, the largest of the last."""
        if self.recipe.scaling == "current":
            return amax
        past = self.history[role].amax()
        if self.training:
            self.history[role] = self.history[role].roll(1)
            self.history[role, 0] = amax
        return torch.where(past > 0, past, amax)  # the first step has no past

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the linear map of ``x``, in float32."""
        check_tensor("x", x, "...", self.in_features)
        rows = x.reshape(-1, self.in_features).float()
        with torch.autocast(x.device.type, enabled=False):
            out = _RoundedProducts.apply(rows, self.weight, self)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


# %% [markdown] tags=["engine"]
# The three products are written out by hand. What the backward pass needs is rounded in the forward
# pass already. A real implementation would do the same, and so keep activations in 8 bits:


# %% tags=["engine"]
#| export
class _RoundedProducts(torch.autograd.Function):
    """The three products of a linear layer, each with rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: EmulatedLinear) -> Tensor:
        rounded_x, rounded_weight = layer._rounded(x, 0, dim=1), layer._rounded(weight, 1, dim=1)
        ctx.layer = layer
        if layer.recipe.scaling == "block":  # other sums, other blocks
            ctx.save_for_backward(layer._rounded(x, 0, dim=0), layer._rounded(weight, 1, dim=0))
        else:
            ctx.save_for_backward(rounded_x, rounded_weight)
        return rounded_x @ rounded_weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), layer = gradients, ctx.layer
        x, weight = ctx.saved_tensors
        by_output = by_token = layer._rounded(gradient, 2, dim=1)
        if layer.recipe.scaling == "block":
            by_token = layer._rounded(gradient, 2, dim=0)
        return by_output @ weight, by_token.T @ x, None


# %% [markdown] tags=["engine"]
# To emulate a model, exchange its linear layers, in a copy:


# %% tags=["engine"]
#| export
def emulate(
    model: nn.Module, recipe: str | Recipe, *, keep: Collection[str] = ("lm_head",)
) -> nn.Module:
    """Return a copy of ``model`` whose linear layers round the operands of their products.

    Layers whose own name is in ``keep`` stay as they are. ``recipe`` is one of ``RECIPES`` or made
    anew. Train the copy as any model: its weights are float32. A model without a linear layer to
    exchange raises a ``ValueError``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a module of PyTorch, got {model!r:.60}")
    recipe = _find_recipe(recipe)
    if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
        raise ValueError(f"keep: expected a collection of names, got {keep!r:.60}")
    root = nn.ModuleDict({"model": deepcopy(model)})  # the model itself may be a linear layer
    exchanged = 0
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in keep:
                setattr(parent, name, _emulated(child, recipe))
                exchanged += 1
    if not exchanged:
        raise ValueError(f"model: expected linear layers besides {tuple(keep)}, got none")
    return root["model"]


# %% tags=["engine"]
#| export
# A layer with the weights of another
def _emulated(linear: nn.Linear, recipe: Recipe) -> EmulatedLinear:
    """A layer with the same weights."""
    biased = linear.bias is not None
    layer = EmulatedLinear(linear.in_features, linear.out_features, biased, recipe=recipe)
    layer = layer.to(linear.weight.device)
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)


# %% [markdown] tags=["engine"]
# Along tokens, the number of rows need not be a multiple of the block. Zeros fill the last block,
# where they change neither its amax nor a sum.


# %% tags=["engine"]
#| export
def _round_blocks(
    x: Tensor, name: str, dim: int, rounding: Literal["nearest", "stochastic"]
) -> Tensor:
    """Round a matrix in blocks along ``dim``, of which the last may be short."""
    along = x if dim == 1 else x.T
    n = along.size(1)
    padded = F.pad(along, (0, -n % BLOCK_FORMATS[name].size))
    rounded = quantize_blocks(padded, name, rounding=rounding).dequantize()[:, :n]
    return rounded if dim == 1 else rounded.T


def _find_recipe(recipe: object) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    check_choice("recipe", recipe, RECIPES)
    return RECIPES[recipe]  # type: ignore[index]


# %% [markdown] tags=["engine"]
# A run is judged by the mean loss of its last ten steps, where the noise of the batches is the same
# for all recipes:


# %% tags=["engine"]
def final_loss(seed: int, recipe: str | None) -> float:
    model = new_model(seed)
    model = model if recipe is None else emulate(model, recipe)
    losses, _ = train(model, stores["float32"], rate=3e-3, n_steps=40)
    return sum(losses[-10:]) / 10


control = torch.tensor([final_loss(seed, None) for seed in range(3)])


def lies_within(recipe: str, low: float, high: float) -> bool:
    worse = torch.tensor([final_loss(seed, recipe) for seed in range(3)]) - control
    half = 4.303 * worse.std() / math.sqrt(3)
    return bool(low < worse.mean() - half and worse.mean() + half < high)


# %% [markdown]
# ### What it does to the loss
#
# Embeddings, norms, attention scores, and the output layer stay in `float32`, as is usual. We try
# current scaling in 8 bits and NVFP4, with the model of the first experiment, for 40 steps, from
# the same starts and on the same batches as `float32`. The interval is Student's again. It is wide,
# and three runs support no more. `lies_within` trains them and checks that the interval lies
# between two bounds:

# %%
for recipe, (low, high) in {"fp8_current": (-0.01, 0.02), "nvfp4": (0.02, 0.2)}.items():
    assert lies_within(recipe, low, high)
    print(f"{recipe:11} nats above float32, 95% interval: within {low} to {high}")

# %% [markdown]
# For a longer comparison, with 200 steps and twice the width, there is `benchmarks/rounding.py`.
# Losses are in nats per token:
#
# | products in | loss | above `float32` | 95% interval |
# |:---|---:|---:|---:|
# | `float32` | 1.304 | | |
# | `bfloat16` | 1.304 | 0.0000 | ± 0.0003 |
# | e4m3 and e5m2, no scales | 1.313 | 0.0097 | ± 0.0039 |
# | the same, current scales | 1.309 | 0.0054 | ± 0.0057 |
# | the same, delayed scales | 1.306 | 0.0025 | ± 0.0076 |
# | MXFP8 | 1.310 | 0.0065 | ± 0.0127 |
# | MXFP4 | 1.387 | 0.0837 | ± 0.0391 |
# | NVFP4 | 1.363 | 0.0597 | ± 0.0070 |
#
# Products in `bfloat16` cost nothing here. Products in 8 bits without scales cost about a hundredth
# of a nat, and that interval excludes zero. The three ways to scale can't be told apart from each
# other, nor from no cost at all. Four bits cost 5 to 6% of the loss, which is a lot. NVIDIA's
# recipe came within about 1.5% of the 8-bit loss with a model of 12 billion parameters
# {cite}`nvidia2025nvfp4`. It has more parts: some layers stay in 16 bits, tensors are rotated at
# random so that outliers spread, and the weights get the same blocks in both directions.
#
# ### A faster product is not a faster run
#
# How much faster does all this make a training run? Say that products take a share $p$ of a
# training step and become $k$ times as fast, while everything else stays as it is. The step then
# takes $1 - p + p / k$ of its time (Amdahl's law), and its speedup (not a loss scale here) is
#
# $$
# S = \frac{1}{1 - p + p / k}
# $$ (precision-amdahl)
#
# which is less than $k$ unless $p = 1$. nanochat's log {cite}`karpathy2026nanochat` has a complete
# set of numbers for what we call `fp8_current`, on H100 GPUs, with a model of 26 layers. On paper,
# 8-bit products are twice as fast as products in `bfloat16`. The feed-forward layer measured alone
# was 1.38 times as fast. Training as a whole processed 1.17 times as many tokens per second. At
# equal quality, the log gives a speedup of about 1.05.

# %%
product, run, equal_quality = 1.38, 1.17, 1.05
share = (1 - 1 / run) / (1 - 1 / product)
print(f"a run {run} times as fast: products took {share:.0%} of the time")
print(f"{run / equal_quality - 1:.0%} more tokens were needed for the same quality")

# %% [markdown]
# About half of the step wasn't products, so half of the gain was gone. Most of what remained was
# paid back in extra steps, since each step is a little less accurate. Scales for each row, which
# are more accurate, made the run *slower* than in 16 bits, 0.90 times as fast. The log finds that
# larger models gain more. But ask of any faster kernel what share of the step it speeds up, and
# whether a step is still worth as much. Only a whole run to the same loss answers both.
#
# ## On a GPU
#
# The speed of mixed precision can be seen only on a GPU. The script `benchmarks/gpu.py` trains a
# model of GPT-2's shape, with 124 million parameters, in float32, tf32, bfloat16, and float16,
# eager and compiled. It reports tokens per second, memory, our formula's memory, and MFU. We had no
# GPU when this was written, so its table is empty. If you have one, run it.
#
# ## Is it the real thing?
#
# First we check the rounding. A cast in PyTorch to a short type and back is a rounding to nearest,
# so the two must agree bit for bit: on all 65,536 values of `bfloat16` and of `float16`, every
# midpoint between neighbors of an 8-bit format, and random bit patterns, which are numbers of any
# size, infinities, and NaN.

# %% tags=["engine"]
# The numbers, and a comparison that tells zeros apart and takes NaN for equal
every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
codes = [
    torch.tensor([f.decode(c) for c in range(2**f.bits)]) for f in FORMATS.values() if f.bits == 8
]
middles = [(v := c[c.isfinite()].sort().values)[1:] / 2 + v[:-1] / 2 for c in codes]
generator = torch.Generator().manual_seed(0)
noise = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int32, generator=generator)
numbers = torch.cat(
    [
        every.view(torch.bfloat16).float(),
        every.view(torch.float16).float(),
        noise.view(torch.float32),
        *middles,
    ]
)


def agreeing(format: FloatFormat) -> Tensor:
    ours, theirs = round_to(numbers, format), numbers.to(format.dtype).float()
    same = (ours == theirs) & (ours.signbit() == theirs.signbit()) | ours.isnan() & theirs.isnan()
    assert (same | ((format.name == "float8_e8m0fnu") & (numbers.abs() < 2.0**-126))).all()
    return same.sum()


# %% [markdown]
# We count the numbers on which both agree:

# %%
for format in (f for f in FORMATS.values() if f.dtype is not None):
    print(f"{format.name:15} equal: {agreeing(format):,} of {len(numbers):,}")


# %% [markdown]
# The two agree on every number in five formats. In `float8_e8m0fnu` they differ on some numbers
# that are subnormal in `float32`, where PyTorch takes the larger power of two even if the smaller
# one is nearer.
#
# Next we run our scaler and PyTorch's side by side, for 300 steps with two optimizers, two
# micro-batches, and clipping. In a third of the steps, at random, a micro-batch has gradients that
# are infinite, NaN, or too large to be scaled. After each step, scales, counters, and weights must
# be the same, and halfway the two scalers exchange their states.


# %% tags=["engine"]
# Two weights with an optimizer each, under one scaler
class Twin:
    """Two weights with an optimizer each, under one scaler."""

    def __init__(self, scaler: Any):
        self.scaler = scaler
        self.weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        self.optimizers = [torch.optim.SGD([self.weights[0]], lr=0.1), AdamW([self.weights[1]])]

    def step(self, factors: list[float]) -> dict[str, Any]:
        """Two micro-batches whose losses are multiplied by ``factors``, then a step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for factor in factors:
            losses = [(weight * factor).sum() for weight in self.weights]
            for loss in self.scaler.scale(losses):
                loss.backward()
        for weight, optimizer in zip(self.weights, self.optimizers, strict=True):
            self.scaler.unscale_(optimizer)
            clip_gradients([weight], 1.0)
            self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.state_dict()


# %% [markdown]
# A difference would end the cell:

# %% tags=["engine"]
# 300 steps; the factor 1e38 is finite, but its gradient becomes infinite once it is scaled
settings = {"init_scale": 2.0**10, "growth_interval": 3, "growth_factor": 1.7}
twins = [Twin(GradScaler(**settings)), Twin(torch.amp.GradScaler("cpu", **settings))]
draws = np.random.default_rng(0)
skipped, scales = 0, set()
for step in range(300):
    bad = draws.choice([math.inf, math.nan, 1e38]) if draws.random() < 1 / 3 else 1.0
    first, second = (twin.step(list(draws.permutation([0.5, bad]))) for twin in twins)
    assert first == second, "the same scale, settings and count of good steps"
    assert all(map(torch.equal, twins[0].weights, twins[1].weights))
    skipped += first["_growth_tracker"] == 0 and bad != 1.0
    scales.add(first["scale"])
    if step == 150:
        for twin, state in zip(twins, (second, first), strict=True):
            twin.scaler.load_state_dict(state)

# %% [markdown]
# It found none:

# %%
print(f"{step + 1} steps, {skipped} skipped, {len(scales)} different scales: ours are PyTorch's")

# %% [markdown] tags=["engine"]
# ### Engine room: the trainer, held against a loop of PyTorch's parts

# %% [markdown] tags=["engine"]
# Last, our `MixedPrecision` within the trainer, with products that really are in float16, is
# compared with a loop of PyTorch's parts: its autocast, its scaler, its clipping, its AdamW. The
# loop repeats a batch that overflows, as the trainer does.

# %% tags=["engine"]
config = TrainingConfig(
    n_steps=6, batch_size=8, learning_rate=3e-3, betas=(0.9, 0.999), weight_decay=0.0
)
sampler = BatchSampler(rows, batch_size=8)
ours = Trainer(tiny_model(), sampler, config, precision=MixedPrecision("float16"))
ours.train()
theirs, scaler = tiny_model(), torch.amp.GradScaler("cpu")
optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.0)
rate, taken = torch.optim.lr_scheduler.LambdaLR(optimizer, ours.schedule), 0
while taken < 6:
    part, before = compact(BatchSampler(rows, batch_size=8)[taken]), scaler.get_scale()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        hidden = theirs.hidden_states(part.inputs)
        total = chunked_cross_entropy(hidden, theirs.lm_head.weight, part.targets, reduction="sum")
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    for weight in theirs.parameters():
        weight.grad /= int((part.targets != -100).sum())
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= before:
        taken += 1
        rate.step()
pairs = zip(ours.parameters, theirs.parameters(), strict=True)
difference = max((a - b).abs().max().item() for a, b in pairs)
assert difference < 1e-4 and ours.precision.scaler.state_dict() == scaler.state_dict()
print(f"the same scale, 2^{math.log2(scaler.get_scale()):.0f}; weights differ by less than 0.0001")


# %% [markdown]
# ## How fast is it?
#
# We compare our rounding with a cast there and back, the work of our scaler with PyTorch's, on a
# million gradients in 48 tensors, and `CastProducts` with PyTorch's autocast in a forward pass:


# %% tags=["engine"]
# What is timed
def decide(scaler: Any) -> None:
    scaler.scale(torch.ones(()))
    scaler.unscale_(sgd)
    scaler.step(sgd)
    scaler.update()


def forward(context: Any) -> None:
    with torch.no_grad(), context:
        model(batch.inputs)


million, model = torch.randn(1_000_000), tiny_model()
many = [nn.Parameter(torch.zeros(20_000)) for _ in range(48)]
for weight in many:
    weight.grad = torch.ones(20_000)
sgd = torch.optim.SGD(many, lr=0.0)
timed: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "rounding": (lambda: round_to(million, "bfloat16"), lambda: million.bfloat16().float()),
    "scaler": (lambda: decide(GradScaler()), lambda: decide(torch.amp.GradScaler("cpu"))),
    "autocast": (
        lambda: forward(CastProducts(torch.bfloat16)),
        lambda: forward(torch.autocast("cpu", torch.bfloat16)),
    ),
}

# %% [markdown]
# `timed` has a pair of functions for each, ours and PyTorch's:

# %% tags=["nbval-ignore-output"]
for name, (ours, theirs) in timed.items():
    print(f"{name}: ours takes {seconds(ours, 7) / seconds(theirs, 7):.1f} times as long")

# %% [markdown]
# Where PyTorch has the type, use the cast. Our scaler reads everything twice, and PyTorch's kernel
# once. Our context is called from Python for each operation; `MixedPrecision` uses PyTorch's own,
# unless it has to emulate.

# %% [markdown]
# ## Exercises
#
# ````{exercise} Counting in short formats
# :label: ex-precision-count
# *Ten minutes.* A counter of tokens is kept as a float and grows by 1. Write
# `largest_count(fraction_bits)`, the number at which it stops growing, if the format has that many
# fraction bits and rounds to nearest, ties to even.
# ````


# %% tags=["solution"]
def largest_count(fraction_bits: int) -> int:
    """The whole number to which adding 1 changes nothing."""
    return 2 ** (fraction_bits + 1)


# %% tags=["check"]
for name in ("float8_e4m3fn", "bfloat16", "float16"):
    counter = torch.tensor(0.0)
    while (grown := round_to(counter + 1, name)) > counter:
        counter = grown
    answer, m = largest_count(FORMATS[name].fraction_bits), FORMATS[name].fraction_bits
    assert answer >= counter, f"with {m} fraction bits it still grows at {answer}"
    assert answer <= counter, f"with {m} fraction bits it never gets to {answer}"

# %% [markdown]
# ````{exercise} Stochastic rounding with bits
# :label: ex-precision-bits
# *Twenty minutes.* A `bfloat16` is the upper half of a `float32`. So stochastic rounding needs no
# division: add a random whole number to the bits of the `float32`, read as an `int32`, and set the
# lower half to zero. Write `round_by_bits(x, generator)`, which does this for finite numbers.
# ````


# %% tags=["solution"]
def round_by_bits(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 by chance, with whole numbers only; the result is float32."""
    bits = x.view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -(2**16)).view(torch.float32)


# %% tags=["check"]
generator = torch.Generator().manual_seed(1)
exact = torch.tensor([1.0, -2.5, 0.0, 2.0**-100])
shape = tuple(round_by_bits(exact, generator).shape)
assert shape == (4,), f"4 numbers became {shape}: the noise has to be int32, as the bits are"
assert torch.equal(round_by_bits(exact, generator), exact), "a number of bfloat16 has to stay"
for share in (0.01, 0.25, 0.5, 0.9):
    for sign in (1, -1):
        x = torch.full((40_000,), sign * (1 + share / 128))
        rounded = round_by_bits(x, generator)
        values = sorted(set(rounded.abs().tolist()))
        assert set(values) <= {1.0, 1.0078125}, f"neighbors of {x[0]:.5f} only, got {values[:3]}"
        up = (rounded.abs() > 1).float().mean().item()
        message = f"{share:.0%} of the way to the next number: up in {up:.1%} of all cases"
        assert abs(up - share) < 0.015, message

# %% [markdown]
# ````{exercise} A weight that remembers
# :label: ex-precision-kahan
# *Half an hour.* Kahan's summation works for weights, too: keep what the last update lost in a
# second `bfloat16` number. Write `kahan_update(weight, lost, update)`. All three are `bfloat16`,
# and it returns the new weight and the new lost part, with no operation in a wider type. How many
# bits does a weight take now, compared with one in 32 bits?
# ````


# %% tags=["solution"]
def kahan_update(weight: Tensor, lost: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Add update to weight, and return what did not fit for the next time; 32 bits in all."""
    y = update - lost
    new = weight + y
    return new, (new - weight) - y


# %% tags=["check"]
weight = torch.tensor([1.0, -3.0, 0.01]).bfloat16()
start, lost = weight.clone(), torch.zeros(3).bfloat16()
update = torch.tensor([1e-4, -2e-4, 1e-6]).bfloat16()
for _ in range(500):
    weight, lost = kahan_update(weight, lost, update)
assert weight.dtype == lost.dtype == torch.bfloat16, "weight and lost part have to stay bfloat16"
progress = (weight.double() - start.double()) / (500 * update.double())
assert (progress > 0.5).all(), f"the weight has moved by {progress.tolist()} of what was added"
assert (progress - 1).abs().max() < 0.15, f"moved by {progress.tolist()} of what was added"

# %% [markdown]
# ````{exercise} In the right order
# :label: ex-precision-order
# *Fifteen minutes.* Write `scaled_step(model, optimizer, scaler, losses, max_norm)`, which does one
# step of float16 training. `losses` are those of the micro-batches, already divided by their
# number. Gradients are added over all of them by `backward()`, and clipped to `max_norm`, and then
# the step is taken or skipped. Return whether it was taken. `scaler` is a `GradScaler` with the
# methods `scale`, `unscale_`, `step`, and `update`; its `get_scale()` is the scale, and its
# `found_inf(optimizer)` says, after `unscale_`, whether a gradient was infinite or NaN.
# `clip_gradients(parameters, max_norm)` clips.
# ````


# %% tags=["solution"]
def scaled_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    losses: list[Tensor],
    max_norm: float,
) -> bool:
    """Take one step from the losses of all micro-batches; return whether it was taken."""
    optimizer.zero_grad()
    for loss in losses:
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    taken = not scaler.found_inf(optimizer)
    clip_gradients(model.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    return taken


# %% tags=["check"]
def after_steps(factors: list[list[float]], max_norm: float) -> tuple[Tensor, list[bool], float]:
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    sgd, scaler = torch.optim.SGD(model.parameters(), lr=1.0), GradScaler(init_scale=2.0**8)
    taken = []
    for step in factors:
        losses = [(model(torch.ones(1, 2)) * factor).sum() for factor in step]
        taken.append(scaled_step(model, sgd, scaler, losses, max_norm))
    return model.weight.detach().flatten(), taken, scaler.get_scale()


moved = after_steps([[3.0]], 1.0)[0]
assert moved.norm() > 0.5, "clip after unscaling: the step is far too short"
assert moved.norm() < 1.01, "clip the gradient to max_norm before the step"
assert torch.allclose(after_steps([[0.1, 0.2]], 9.0)[0], torch.tensor([-0.3, -0.3])), (
    "the gradients of all micro-batches add up, each scaled once and all unscaled once"
)
assert torch.allclose(after_steps([[0.1], [0.1]], 9.0)[0], torch.tensor([-0.2, -0.2])), (
    "gradients of the step before must be gone"
)
weights, taken, scale = after_steps([[0.1], [math.inf], [0.1]], 9.0)
assert weights.isfinite().all(), "a step with an infinite gradient must not be taken"
assert scale == 2.0**7, "update the scale once in each step"
assert taken == [True, False, True], "say whether the step was taken"

# %% [markdown]
# ````{exercise} The schedule waits
# :label: ex-precision-schedule
# *Ten minutes.* A loop in float16 has a schedule that is a function of the step. Write
# `rates(schedule, skipped)`. The list `skipped` holds a Boolean for each step that was tried, in
# order. Return the list of the rates that the steps had which were *taken*. `schedule(0)` is the
# rate of the first step that is taken.
# ````


# %% tags=["solution"]
def rates(schedule: Callable[[int], float], skipped: list[bool]) -> list[float]:
    """Return the rate of each step that was taken."""
    return [schedule(step) for step in range(skipped.count(False))]


# %% tags=["check"]
ramp = [False, True, True, False, False]
found = rates(lambda step: step / 10, ramp)
assert len(found) == 3, "one rate for each step that was taken, none for those skipped"
assert found[0] == 0.0, "the first step taken has schedule(0)"
assert found[1] < 0.15, "the schedule must wait while steps are skipped"
assert list(map(float, found)) == [0.0, 0.1, 0.2], (
    "each step that is taken moves the schedule on by one"
)
assert list(rates(lambda step: step / 10, [True, True, False])) == [0.0], (
    "steps skipped at the very beginning must not move the schedule either"
)

# %% [markdown]
# ````{exercise} What fits?
# :label: ex-precision-fit
# *Twenty minutes.* Write `largest_batch(config, sequence, memory, **options)` for a
# model with this `ModelConfig`: the largest number
# of rows of `sequence` tokens whose training step fits into `memory` bytes. Use
# `memory_breakdown(config, batch_size, sequence, **options)`, which returns a dictionary of bytes,
# by what they are for. Return 0 if not even one row fits. Be careful: do not try all numbers from 1
# on, for there may be millions.
# ````


# %% tags=["solution"]
def largest_batch(config: ModelConfig, sequence: int, memory: float, **options: Any) -> int:
    """Return how many rows fit into ``memory`` bytes, 0 if none does."""

    def fits(n_rows: int) -> bool:
        return sum(memory_breakdown(config, n_rows, sequence, **options).values()) <= memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# %% tags=["check"]
def bytes_of(n_rows: int, **options: Any) -> int:
    return sum(memory_breakdown(medium, n_rows, 128, **options).values())


for options in ({}, {"precision": "bfloat16"}, {"checkpointing": True, "chunk_size": 300}):
    for n_rows in (1, 7, 50):
        found = largest_batch(medium, 128, bytes_of(n_rows, **options), **options)
        assert found >= n_rows, f"{n_rows} rows fit exactly, so they fit"
        assert found <= n_rows, f"{n_rows} rows fill the memory, {found} do not fit"
assert largest_batch(medium, 128, bytes_of(1) - 1) == 0, "not even one row fits"
far = largest_batch(medium, 1, 1e12)
one = {"config": medium, "sequence": 1}
fits = sum(memory_breakdown(batch_size=far, **one).values()) <= 1e12
more = sum(memory_breakdown(batch_size=far + 1, **one).values()) <= 1e12
assert fits and not more, f"of the shortest rows, {far:,} are not the most that fit"
assert bytes_of(1) < 1e9 and far > 100_000, "millions of short rows fit, so do not stop early"

# %% [markdown]
# ## Summary
#
# - A format divides its bits between range (the exponent) and digits (the fraction). `bfloat16` has
#   the range of `float32` and two or three digits; `float16` has three digits and a small range.
# - An update of less than half the spacing is lost when it is rounded to nearest. Stochastic
#   rounding is right on average.
# - Sums have 32 bits: weights, and the sums within products, softmax, norms, and losses. Factors
#   have 16.
# - Autocast is two lists of functions and a cast before each. The backward pass runs outside.
# - A loss scale moves all gradients into `float16`'s range at once, and finds itself: halved at
#   each infinity, doubled after many good steps. A step that overflows moves neither weights nor
#   optimizer nor schedule, and our trainer repeats its batch.
# - Mixed precision saves a third of the activations, and nothing of weights and optimizer. For
#   memory, checkpointing and accumulation do more.
# - A compiler fuses what lies between products, and pays for itself after some hundreds of steps of
#   one shape.
# - With 8 or 4 bits, numbers need scales, and with 4 bits a scale for each short block. How much
#   faster a run becomes depends on the share of products in a step.
#
# **Checklist.** Use bfloat16 where the hardware has it, and no scaler. Keep master weights in
# float32, and look at their dtype after every `.to()`. In float16: unscale, then clip, then step,
# then update; log the scale, and worry if it keeps falling. Leave `backward` outside of autocast.
# Compile when the shapes have settled. Judge a shorter format by a whole run to the same loss, with
# more than one seed.
#
# **Further reading.** The recipe and the loss scale are due to Micikevicius and colleagues
# {cite}`micikevicius2018mixed`. Kalamkar and colleagues {cite}`kalamkar2019bfloat16` train a wide
# range of models in bfloat16 with the settings of float32. Zamirai and colleagues
# {cite}`zamirai2021revisiting` show that pure bfloat16 fails in the updates of weights, and that
# stochastic rounding or Kahan's sum mends this. On 8 and 4 bits, see {cite}`micikevicius2022fp8`
# and {cite}`nvidia2025nvfp4`.
