# %% [markdown]
# # Mixed precision
#
# > Train with fewer bits: what rounding to 16, 8, or 4 bits costs, where it fails, and the recipe
# > that makes it safe.
#
# Every number in our models so far has taken 32 bits. Half as many bits would take half the
# memory, and processors built for short numbers multiply them several times as fast. So it's
# tempting to convert the whole model to 16 bits and train as before. Nothing crashes. The loss
# falls, too, just not as far as it should, and no message says why.
#
# To see what went wrong, we take numbers apart bit by bit and round them ourselves, to every format
# that models are trained in. Then we can say which parts of a training step may be short, which may
# not, and what to do about the rest.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.precision.float_fields`, {py:func}`~llmbook.precision.round_to`, {py:func}`~llmbook.precision.quantize_blocks`, {py:func}`~llmbook.precision.emulate`, {py:class}`~llmbook.precision.GradScaler`, {py:class}`~llmbook.precision.MixedPrecision`, {py:func}`~llmbook.precision.memory_breakdown` |
# | **You need** | optimizers ({doc}`12_optimization`), the training loop ({doc}`13_training`), logarithms |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 90 seconds to run |

# %% tags=["remove-cell"]
#| default_exp precision

# %% tags=["engine"]
#| export
# The imports of the module
import json
import math
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llmbook.environment import check_at_least, check_choice, check_text
from llmbook.positions import check_tensor

# %% [markdown]
# ## Two runs that go wrong
#
# Our data are stories of the tiny world, one to a row, cut into tokens by the tokenizer of
# chapter 13's model.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from llmbook.batches import BatchSampler, pack_documents, write_shards
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import AdamW
from llmbook.tinyworld import TinyWorld
from llmbook.training import compact, next_token_objective, pretrained

plt.style.use("llmbook.book")
torch.set_num_threads(1)
trained = pretrained("tinyworld")
stories = [story.text for story in TinyWorld().stories(1500, seed=1)]
shards = write_shards(stories, Path(tempfile.mkdtemp()) / "stories", trained.tokenizer)
sampler = BatchSampler(pack_documents(shards, 128, "one_per_row"), batch_size=8)

# %% [markdown]
# The function below trains with AdamW. After each step it stores the weights as the function
# `store` says, in 16 bits for example, and it counts how many weights the last step has changed.


# %%
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


# %% [markdown]
# The first run trains a small model from the beginning, three times, with the same seeds and
# batches in both types. The only difference is the type in which the weights are stored between
# steps. `bfloat16` has 16 bits and the range of `float32`.


# %%
def new_model(seed: int, **changes: Any) -> TransformerLM:
    seed_everything(seed)
    sizes = {"context_length": 128, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64}
    return TransformerLM(ModelConfig(vocab_size=trained.tokenizer.vocab_size, **sizes | changes))


stores = {"float32": lambda weight: weight, "bfloat16": lambda weight: weight.to(torch.bfloat16)}
curves, last = {}, {}
for name, store in stores.items():
    runs = [train(new_model(seed), store, rate=5e-4, n_steps=80)[0] for seed in range(3)]
    curves[name] = torch.tensor(runs)
    last[name] = curves[name][:, -10:].mean(dim=1)
stalled = last["bfloat16"] - last["float32"]
assert (stalled > 0.15).all() and (stalled < 0.6).all(), stalled
print("last ten steps: 16-bit weights cost 0.15 to 0.6 nats a token with each of 3 seeds")

# %% [markdown]
# Where does the difference come from? Late in training, when steps are small, it is plain to see.
# Continue the trained model for a few steps at a rate of 0.0001, and count:

# %%
moved = {}
for name, store in stores.items():
    moved[name] = train(deepcopy(trained.model), store, rate=1e-4, n_steps=5)[1]
assert moved["float32"] > 0.7 and moved["bfloat16"] < 0.04, moved
print("weights that a step moved: over 70% of those in 32 bits, under 4% of those in 16 bits")

# %% [markdown]
# (In 32 bits the rest are embeddings of tokens that haven't come up.) In 16 bits the weights have
# frozen. The gradient is there, the optimizer divides and averages as it should, and then the
# update disappears when the weight is stored. {numref}`fig-precision-stall` shows the first run.

# %% mystnb={"figure": {"caption": "The same training with weights stored in 32 and in 16 bits, with three seeds each.", "name": "fig-precision-stall"}, "image": {"alt": "Loss over 80 steps. Both groups of three curves begin at 7.4 nats per token. The 32-bit curves fall to about 5.3, the bfloat16 curves fall more slowly from the start and end about 0.3 higher."}}
figure, ax = plt.subplots()
for color, (name, runs) in zip(("C0", "C1"), curves.items(), strict=True):
    for losses in runs:
        ax.plot(losses, color=color, alpha=0.4, linewidth=1)
    ax.plot(runs.mean(dim=0), color=color, label=f"weights in {name}")
ax.set(xlabel="step", ylabel="loss (nats per token)")
ax.legend()
plt.show()

# %% [markdown]
# The second run uses the other 16-bit type, `float16`, for everything, and looks at the gradients
# of the trained model:

# %%
batch = compact(sampler[0])
vanished = {}
for dtype in (torch.float32, torch.float16):
    model = deepcopy(trained.model).to(dtype)
    total, count = next_token_objective(model, batch)
    (total / count).backward()
    vanished[dtype] = (model.lm_head.weight.grad == 0).float().mean().item()
assert vanished[torch.float32] < 0.01 and 0.4 < vanished[torch.float16] < 0.95, vanished
print("gradients of the output layer that are exactly zero:")
print("in float32 under 1%, in float16 between 40% and 95%")

# %% [markdown]
# This time it is the gradients that are gone, for most of the weights of the output layer.
# Two formats of the same size, two different failures. To understand them, we need to know which
# numbers a format has.
#
# ## Floats, bit by bit
#
# A floating-point number is scientific notation in base two. It has a sign, an exponent, and the
# digits after the leading one, the **fraction** (also called mantissa). With $E$ bits that hold a
# whole number $e$ and $m$ bits that hold a whole number $f$, the value is
#
# $$
# x = (-1)^s \cdot 2^{\,e - b} \cdot \Bigl(1 + \frac{f}{2^m}\Bigr), \qquad b = 2^{E-1} - 1 .
# $$ (precision-value)
#
# The {term}`bias <bias of an exponent>` $b$ makes negative exponents possible without a second
# sign. The leading one isn't stored, because it's always there, except when $e = 0$. Then the value
# is $(-1)^s \cdot 2^{1-b} \cdot f / 2^m$, without the one. These are the {term}`subnormal numbers`.
# They fill the gap between zero and the smallest normal number $2^{1-b}$ with even steps, and one
# of them ($f = 0$) is zero itself.
#
# ```{figure} ../figures/precision-layouts.svg
# :name: fig-precision-layouts
# :alt: Eight rows of cells, one cell per bit, colored by sign, exponent, and fraction. float32 has 1, 8 and 23 bits; tfloat32 1, 8 and 10; bfloat16 1, 8 and 7; float16 1, 5 and 10; float8 e4m3 1, 4 and 3; float8 e5m2 1, 5 and 2; float4 e2m1 1, 2 and 1; e8m0 has 8 exponent bits only.
#
# Where the bits go. Exponent bits buy range, fraction bits buy digits.
# ```
#
# What the largest exponent means depends on the format. In most, it is reserved: $f = 0$ is
# infinity, any other $f$ is NaN. `float8_e4m3fn` is too short to give away a whole exponent, so
# only its very last code is NaN, and it has no infinity, which is what the `fn` stands for (finite,
# with NaN) {cite}`micikevicius2022fp8`. `float4_e2m1fn` has only numbers. Last, `float8_e8m0fnu`
# has neither sign nor fraction (`u` for unsigned): it is a power of two, used only as a scale.


# %%
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
def _check_whole(name: str, value: object, least: int) -> None:
    if value is None:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got None")
    check_at_least(**{name: (least, value)})


class FloatFormat(FloatFormat):  # continued
    def __post_init__(self) -> None:
        check_text(self.name, "name")
        _check_whole("exponent_bits", self.exponent_bits, 2)
        _check_whole("fraction_bits", self.fraction_bits, 0)
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
        _check_whole("code", code, 0)
        if code >= 2**self.bits:
            raise ValueError(f"code: expected at most {2**self.bits - 1}, got {code}")


# %% [markdown]
# Equation {eq}`precision-value` as code turns a code, the bits read as a whole number, into its
# value:


# %%
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


# %% [markdown]
# The formats have the names that PyTorch gives them. `tfloat32` and `float4_e2m1fn` have no type of
# their own there: the first exists only inside GPUs, which round `float32` to it on the way into a
# product, and of the second, PyTorch only knows pairs packed into a byte.

# %%
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

# %% [markdown]
# Everything else follows from these few numbers. Half of the spacing, relative to the number, is
# the largest error of rounding, $2^{-(m+1)}$, called the {term}`unit roundoff` $u$. In digits,
# $-\log_{10} u$ of them can be trusted. All of this table is computed:

# %%
print("format           bits  digits    largest   normal from   subnormal from  infinity")
for format in FORMATS.values():
    digits = (format.fraction_bits + 1) * math.log10(2)
    print(
        f"{format.name:15} {format.bits:5} {digits:7.1f} {format.largest:10.4g} "
        f"{format.smallest_normal:13.3g} {format.smallest_subnormal:16.3g}  "
        f"{'yes' if format.has_infinities else 'no'}"
    )

# %% [markdown]
# Now the two failures have numbers. `bfloat16` keeps the range of `float32` and pays with digits:
# just above 1, the next number is 0.8% away, so an update of less than 0.4% of the weight is
# rounded away. AdamW's updates are about as large as the rate, 0.0001, and most of our weights are
# larger than 0.05, so most updates are too small.
#
# `float16` has three digits, but nothing between 0 and 0.00000006. Recall from
# {doc}`12_optimization` that the gradient of a logit is $p - y$, divided here by the number of
# targets, about 500. If the model gives a wrong token a probability of one in a million, its
# gradient is 0.000000002, far below half of the smallest number, and rounds to zero. A trained
# model is that sure about most tokens in most places. `bfloat16` would keep these gradients, and
# `float16`, whose spacing is an eighth, would keep more of the updates. Neither has both the range
# and the digits.
#
# A normal number keeps all its digits wherever it stands, because the spacing grows with it.
# {numref}`fig-precision-line` shows this for the short formats.

# %% mystnb={"figure": {"caption": "Left, all positive numbers of three short formats, on a logarithmic scale. Right, the largest error of rounding relative to the number, by the number's size. Each format has a floor of its own, climbs where subnormal numbers begin, and stops where numbers overflow.", "name": "fig-precision-line"}, "image": {"alt": "Left, three rows of ticks. e2m1 has seven from 0.5 to 6, e4m3 about a hundred from 0.002 to 448, e5m2 about a hundred from 0.00002 to 57344, thinner and spread over a longer range. Right, error against size on logarithmic axes: float16, bfloat16, e4m3, e5m2 and e2m1 each as a flat jagged line between their bounds that rises toward the left end."}}
figure, axes = plt.subplots(1, 2, width_ratios=[3, 4])
short = ["float4_e2m1fn", "float8_e4m3fn", "float8_e5m2"]
for row, name in enumerate(short):
    format = FORMATS[name]
    codes = range(1, 2 ** (format.bits - 1))
    values = [v for code in codes if math.isfinite(v := format.decode(code))]
    axes[0].vlines(values, row - 0.3, row + 0.3, color=f"C{row}", linewidth=0.9)
axes[0].set(xscale="log", yticks=range(3), yticklabels=["e2m1", "e4m3", "e5m2"], xlabel="number")
sizes = 2 ** torch.linspace(-30, 20, 2000, dtype=torch.float64)
for color, name in enumerate([*short, "float16", "bfloat16"]):
    format = FORMATS[name]
    inside = sizes[(sizes < format.largest) & (sizes > format.smallest_subnormal)]
    exponent = inside.log2().floor().clamp(min=format.smallest_exponent)
    error = 2 ** (exponent - format.fraction_bits) / 2 / inside
    axes[1].plot(inside, error, color=f"C{color}", label=name, linewidth=1.2)
axes[1].set(xscale="log", yscale="log", ylim=(1e-4, 100), xlabel="number", ylabel="relative error")
axes[1].legend(ncols=2, loc="upper right")
plt.show()

# %% [markdown]
# ## Rounding
#
# Since $m$ digits follow the leading one, the numbers between $2^k$ and $2^{k+1}$ are the whole
# multiples of $2^{k-m}$. That's their spacing. Below the smallest normal number, the spacing stops
# shrinking. So rounding is a division by the spacing, which is a power of two and loses nothing, a
# rounding to a whole number, and a multiplication:
#
# $$
# \operatorname{round}(x) = \sigma \cdot \Bigl\lfloor \frac{x}{\sigma} \Bigr\rceil , \qquad
# \sigma = 2^{\max(\lfloor \log_2 |x| \rfloor,\; 1-b) \,-\, m} .
# $$ (precision-round)
#
# A tie, where $x / \sigma$ ends in exactly one half, goes to the even neighbor. Always rounding it
# up would push sums up; half of the even neighbors are below and half above.
#
# No logarithm is needed for $\lfloor \log_2 |x| \rfloor$: it stands in the bits of $x$. We read the
# same memory as whole numbers, shift out the fraction, and mask the sign. Written back with a
# fraction of zero, the exponent is the power of two that we want.


# %%
#| export
def _spacing(x: Float[Tensor, "*shape"], target: FloatFormat) -> Float[Tensor, "*shape"]:
    """The distance of neighbors in ``target`` around each number, which is float32 or float64."""
    wide = x.dtype == torch.float64
    integers, shift, bias = (torch.int64, 52, 1023) if wide else (torch.int32, 23, 127)
    exponent = (x.contiguous().view(integers) >> shift) & (2 * bias + 1)
    exponent = exponent.clamp_(target.smallest_exponent + bias, 2 * bias) - target.fraction_bits
    return exponent.bitwise_left_shift_(shift).view(x.dtype)


# %% [markdown]
# Two decisions are left. What is too large becomes infinite, or the largest number if it is to
# *saturate*. And the rounding may be *stochastic*, which the next section is about.


# %%
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
# ### Engine room: names, what is too large, and arguments that are refused

# %% [markdown] tags=["engine"]
# A format may be given by its name, by the short name that papers use, or as a type of PyTorch.
# float64 is none of them: nothing here is as precise, and the rounding is done in it.


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
# A rounded number that is larger than the largest is too large. So the limit is half a step above
# the largest number, as in IEEE 754.


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


# %% [markdown]
# ### What happens to a number
#
# Everything that can happen happens to one of these:

# %%
examples = torch.tensor([1 / 3, 1.0625, 1.1875, 0.001, 1e-5, 500.0, 1e5])
print("number         ", *(f"{x:9.4g}" for x in examples.tolist()))
for name in ("tfloat32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"):
    print(f"{name:15}", *(f"{x:9.4g}" for x in round_to(examples, name).tolist()))

# %% [markdown]
# Read the row of `float8_e4m3fn`, which has steps of 1/8 above 1. 1.0625 and 1.1875 are ties, and
# go down to 1 and up to 1.25, both with an even last digit. 0.001 is its smallest subnormal number
# 0.00195 after rounding up, and 0.00001 has vanished. 500 saturates at 448, as it does in PyTorch.
# `float8_e5m2`, with one digit fewer, gets 512.
#
# What does the GPU do for `tfloat32`? It keeps 10 fraction bits of a `float32` and sums in
# `float32`. Its instruction for this conversion, `cvt.rna.tf32`, rounds ties away from zero, and
# a product that gets unconverted numbers ignores their last 13 bits. Here ties go to even, as
# everywhere else in the chapter. The difference is at most in ties, one number in 8,192.

# %% [markdown]
# ### A number taken apart
#
# {py:func}`~llmbook.precision.float_fields` goes the other way: it rounds a number and returns the
# fields that stand in memory. With $k = |x| / \sigma$, the number of spacings, the exponent and
# fraction together are simply $k + (e - 1) \cdot 2^m$: all numbers of a format, in order, have
# consecutive codes.


# %%
#| export
class FloatFields(NamedTuple):
    """The fields of a number: its sign, the stored exponent and fraction, its value, its bits."""

    sign: int
    exponent: int
    fraction: int
    value: float
    bits: str


def float_fields(number: float, format: str | torch.dtype | FloatFormat = "float32") -> FloatFields:
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
# What is no number
def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r:.60}")


# %% [markdown]
# Three numbers in three formats. The last line of each group shows what became of 1,000:

# %%
for name in ("float16", "bfloat16", "float8_e4m3fn"):
    for number in (0.1, 0.001, 1000.0):
        _, exponent, fraction, value, bits = float_fields(number, name)
        format = FORMATS[name]
        power = max(exponent, 1) - format.bias
        lead = int(exponent > 0)
        print(
            f"{name:14} {number:6g}  {bits:19} ({lead} + {fraction}/{2**format.fraction_bits})",
            end="",
        )
        print(f" x 2^{power} = {value:.6g}")

# %% [markdown]
# Look at 0.001 in `float8_e4m3fn`: its exponent field is 0, so there is no leading one, and it is a
# subnormal number with a single digit.

# %% [markdown] tags=["engine"]
# ### Engine room: the figure below, which works without a kernel or a network (`show_bits`)

# %% [markdown] tags=["engine"]
# The function writes HTML with the formats and the number's codes inside, a script that turns bits
# into values by the rules of `FloatFormat.decode`, and a table for readers without scripts.

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
# Here you can set the bits yourself. Click a bit to flip it, or walk with the arrow keys and press
# the space bar. The two buttons at the end go to the next number down or up. Which bits make
# the largest number of each format, and what does the next code mean?

# %%
show_bits(math.pi, "float16")

# %% [markdown]
# ### Equal to PyTorch's casts
#
# A cast of PyTorch and back is a rounding to nearest, so the two must agree bit for bit. The test
# numbers are all 65,536 values of `bfloat16` and of `float16`, every midpoint between neighbors of
# a short format, and random bit patterns, which are numbers of any size, infinities and NaN.

# %%
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
for format in FORMATS.values():
    if format.dtype is None:
        continue
    ours, theirs = round_to(numbers, format), numbers.to(format.dtype).float()
    same = (ours == theirs) & (ours.signbit() == theirs.signbit()) | ours.isnan() & theirs.isnan()
    assert (same | ((format.name == "float8_e8m0fnu") & (numbers.abs() < 2.0**-126))).all()
    print(f"{format.name:15} equal: {same.sum():,} of {len(numbers):,}")

# %% [markdown]
# The numbers of `float8_e8m0fnu` that differ are all subnormal in `float32`. Of what lies between
# $2^{-127}$ and $2^{-126}$, PyTorch takes the larger power even where the smaller one is nearer. No
# scale is ever that small. For `float4_e2m1fn` there is no cast, but its numbers are few enough to
# check every midpoint by hand, as the tests of the package do. How much slower is our arithmetic
# than a cast, which the processor does in one instruction?

# %% tags=["nbval-ignore-output"]
import time


def seconds(call: Callable) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


million = torch.randn(1_000_000)
for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
    cast = seconds(lambda dtype=dtype: million.to(dtype).float())
    ratio = seconds(lambda name=name: round_to(million, name)) / cast
    print(f"{name}: round_to takes {ratio:.0f} times as long as a cast and back")

# %% [markdown]
# So where PyTorch has the type, use the cast. What it lacks is the next section.
#
# ## Rounding by chance
#
# Return to the frozen weight. It stands at 1 in `bfloat16`, the next number is $\sigma = 1/128$
# away, and each step wants to add a ten-thousandth of that. To nearest, nothing ever happens: it
# isn't that the error is large, it's the *same* error every time, and a thousand steps lose a
# thousand updates.
#
# {term}`Stochastic rounding <stochastic rounding>` draws lots. Let $x$ lie between the neighbors
# $a$ and $a + \sigma$, at a share $t = (x - a) / \sigma$ of the way. Go up with probability $t$,
# else down. Then
#
# $$
# \mathbb{E}[\operatorname{round}(x)] = (1 - t)\, a + t\, (a + \sigma) = a + t \sigma = x , \qquad
# \operatorname{Var} = t (1 - t)\, \sigma^2 \le \frac{\sigma^2}{4} .
# $$ (precision-stochastic)
#
# A single rounding is worse than to nearest: the error may be a whole spacing instead of half of
# one. But its mean is zero, and independent errors average out. After $n$ updates of $t \sigma$,
# the weight has moved by $n t \sigma$ on average, with a standard deviation of about $\sqrt{n t}\,
# \sigma$. Here are ten thousand weights, each with a thousand updates of a ten-thousandth of the
# spacing:

# %%
spacing = 1 / 128
kept = {"nearest": torch.ones(10_000), "stochastic": torch.ones(10_000)}
generator = torch.Generator().manual_seed(0)
for _ in range(1000):
    kept["nearest"] = round_to(kept["nearest"] + 1e-4 * spacing, "bfloat16")
    kept["stochastic"] = round_to(
        kept["stochastic"] + 1e-4 * spacing,
        "bfloat16",
        rounding="stochastic",
        generator=generator,
    )
print("mean movement after updates that add up to 0.1 spacings:")
for name, weights in kept.items():
    print(f"{name:10} {(weights - 1).mean() / spacing:.2f} spacings")

# %% [markdown]
# No single weight has moved by a tenth of a spacing, since there is no such number. About one in
# ten has moved by a whole one. In {numref}`fig-precision-walk`, updates are larger, and single
# weights can be followed.

# %% mystnb={"figure": {"caption": "A weight that should rise by one hundredth of its spacing in each step. Rounded to nearest it stays. Rounded stochastically, twelve of them wander around the line.", "name": "fig-precision-walk"}, "image": {"alt": "Position of a weight in spacings over 1000 steps. The wanted line rises from 0 to 10. To nearest, a flat line at 0. Twelve stochastic staircases rise along the wanted line and end between about 4 and 16."}}
paths = torch.ones(1001, 12)
for step in range(1000):
    wanted = paths[step] + 0.01 * spacing
    paths[step + 1] = round_to(wanted, "bfloat16", rounding="stochastic", generator=generator)
figure, ax = plt.subplots()
ax.plot((paths - 1) / spacing, color="C0", alpha=0.4, linewidth=1)
ax.plot([0, 1000], [0, 10], color="C1", label="wanted")
ax.plot([0, 1000], [0, 0], color="C3", label="to nearest")
ax.plot([], [], color="C0", alpha=0.5, label="stochastic, 12 weights")
ax.set(xlabel="step", ylabel="movement (spacings)")
ax.legend()
plt.show()

# %% [markdown]
# Does it repair the run at the beginning of the chapter? The same three seeds, with weights in 16
# bits between steps, only rounded by chance:

# %%
generator = torch.Generator().manual_seed(0)


def by_chance(weight: Tensor) -> Tensor:
    return round_to(weight, "bfloat16", rounding="stochastic", generator=generator)


runs = [train(new_model(seed), by_chance, rate=5e-4, n_steps=80)[0] for seed in range(3)]
behind = torch.tensor(runs)[:, -10:].mean(dim=1) - last["float32"]
assert behind.abs().max() < 0.1, behind
print("loss above that of 32-bit weights: 0.15 to 0.6 nats to nearest, below 0.1 by chance")

# %% [markdown]
# The noise of the weights averages out over steps, and the loss hardly notices. This was found
# for whole-number weights {cite}`gupta2015deep`, and holds for `bfloat16`
# {cite}`zamirai2021revisiting`, where the other cure is to keep what was lost in a second number:
# Kahan's, in the next section. A word of caution: that updates vanish doesn't prove that they were
# needed. In one ladder of models whose embeddings had frozen in the same way, thawing them changed
# the loss by no more than noise {cite}`karpathy2026nanochat`. Measure, as we did here.
#
# ## What a sum loses
#
# A loss, a norm, a gradient, and every entry of a matrix product are sums of many terms. Let $u$ be
# the unit roundoff. Every addition gives the true result times $1 + \delta$ with $|\delta| \le u$.
# Summed one after the other, the first number goes through $n - 1$ additions, the last through one.
# So to first order
#
# $$
# \Bigl| \hat s - \sum_i x_i \Bigr| \;\le\; k\, u \sum_i |x_i| , \qquad
# k = n - 1 \text{ one after the other}, \quad k = \lceil \log_2 n \rceil \text{ in pairs},
# $$ (precision-sum)
#
# since in pairs, of pairs, of pairs, every number goes through only $\lceil \log_2 n \rceil$
# additions. **Kahan's summation** keeps a second number $c$ with what the last addition lost. The
# low digits of $y$ that did not fit are the difference between what was added, $t - s$, and
# what should have been:
#
# $$
# y = x_i - c, \qquad t = s + y, \qquad c = (t - s) - y, \qquad s = t .
# $$ (precision-kahan)
#
# Its bound is $k = 2 + O(n u)$ {cite}`higham2002accuracy`, which hardly depends on $n$ as long as
# $n u$ is small. The fourth way is to sum in a wider format and round once at the end, $k \approx
# 1$. In code, for many rows at once, noting the sum whenever the number of terms is a power of two:


# %%
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


# %% [markdown]
# PyTorch rounds after each of these operations, since the tensors have the short type. The terms
# are uniform between 0 and 1, so that nothing cancels:

# %%
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
print(f"8,192 terms with a mean of 0.5, one by one in bfloat16: {stuck.min():.0f} in each row")

# %% [markdown]
# The sum of about 4,096 has come to a standstill at 256, where the spacing of `bfloat16` is 2 and
# no term reaches half of it. This is the frozen weight once more. {numref}`fig-precision-sums` has
# the rest.

# %% mystnb={"figure": {"caption": "Mean relative error of a sum by its number of terms. The gray line is the unit roundoff of the format. Kahan and wide coincide.", "name": "fig-precision-sums"}, "image": {"alt": "Three panels, bfloat16, float16 and float32, of relative error against the number of terms from 16 to 8192 on logarithmic axes. One by one rises in all panels; in bfloat16 and float16 it jumps toward 1. The other three stay flat below the unit roundoff, in pairs a little above the other two."}}
figure, axes = plt.subplots(1, 3, figsize=(7, 3))
for ax, dtype in zip(axes, (torch.bfloat16, torch.float16, torch.float32), strict=True):
    for way, style in zip(("one by one", "in pairs", "Kahan", "wide"), "---:", strict=True):
        ax.plot(lengths, [errors[dtype, way, n] for n in lengths], style, label=way)
    ax.axhline(torch.finfo(dtype).eps / 2, color="gray", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="terms", title=str(dtype).removeprefix("torch."))
axes[0].set_ylabel("relative error")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# Kahan and the wide accumulator stay below the unit roundoff, which is the best that a result in
# the format can have, and pairs aren't far from it: errors of either sign partly cancel, so they
# stay well inside their bounds. So matrix units multiply short numbers and add in 32 bits. The
# products don't lose anything: two numbers with $m + 1$ digits have a product with $2m + 2$, which
# are 16 for `bfloat16` and 22 for `float16`, and `float32` has 24.

# %%
at = 8192
print(f"{at:,} terms, error in units of the unit roundoff:")
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    u = torch.finfo(dtype).eps / 2
    ways = {way: errors[dtype, way, at] / u for way in ("one by one", "in pairs", "Kahan", "wide")}
    assert max(ways["Kahan"], ways["wide"]) < 2 and ways["in pairs"] < 13 < ways["one by one"]
    print(f"{str(dtype)[6:]:9}", ", ".join(f"{way} {e:.2g}" for way, e in ways.items()))

# %% [markdown]
# ## A scale for each block
#
# With 8 bits, and certainly with 4, a tensor doesn't fit into the range as it is. It is divided by
# a **scale** first, so that its largest absolute value, its *amax*, becomes the largest number of
# the format. One scale for the whole tensor has a weakness we know from {doc}`14_generation`: a
# single outlier makes it coarse for all others. There each row got a step of its own. The formats
# of recent GPUs go further and give a scale to each short block of neighbors in a row
# {cite}`rouhani2023ocp`:
#
# - **MXFP8** has blocks of 32 numbers in e4m3 (or e5m2), and their scale is a power of two in e8m0.
#   That makes $8 + 8/32 = 8.25$ bits per value. **MXFP4** does the same with e2m1, in 4.25 bits.
# - **NVFP4** has blocks of 16 numbers in e2m1, whose scale is itself a number in e4m3, with three
#   fraction bits. Since these scales reach no farther than 448, the tensor has another scale in
#   `float32`. That makes $4 + 8/16 = 4.5$ bits per value {cite}`nvidia2025nvfp4`.


# %%
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
        _check_whole("size", self.size, 1)
        check_choice("scale", self.scale, FORMATS)
        if not isinstance(self.tensor_scale, bool):
            raise ValueError(f"tensor_scale: expected True or False, got {self.tensor_scale!r:.60}")

    @property
    def bits_per_value(self) -> float:
        """Bits of a value and its share of the block's scale; the tensor's scale is not counted."""
        return FORMATS[self.element].bits + FORMATS[self.scale].bits / self.size


# %% [markdown]
# The formats by name, and what a tensor in one of them consists of:


# %%
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


# %% [markdown]
# The rule for a power of two is that of the specification: take the largest power of two in the
# block and in the element's format, $2^{\lfloor \log_2 \mathrm{amax} \rfloor}$ over $2^8$ for e4m3
# or $2^2$ for e2m1. The largest value then lies between 256 and 512, and what exceeds 448
# saturates. NVFP4 can do better, as its scale has digits: amax over 6, the largest number of e2m1,
# rounded to e4m3.


# %%
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
# ### Engine room: exact powers of two, and blocks that are refused

# %% [markdown] tags=["engine"]
# The power of two at or below a number stands in its exponent, as before; for zero it is the
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


# %% [markdown]
# ### What the scales buy
#
# We take the weights of a layer of our trained model, and what flows into
# it. In large models, a few channels of the latter are many times larger than all others
# {cite}`dettmers2022int8`. Ours is too small to have them, so we make one channel in 64 a hundred
# times larger, and then measure the error of the *other* 63:


# %%
def one_scale(x: Tensor, name: str) -> Tensor:
    scale = x.abs().max() / FORMATS[name].largest
    return round_to(x / scale, name, saturate=True) * scale


seen = {}
layer = trained.model.blocks[1].feed_forward.up_proj
hook = layer.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
with torch.no_grad():
    trained.model(batch.inputs)
hook.remove()
usual = seen["x"].flatten(0, 1)
loud = usual.clone()
loud[:, 17] *= 100
tensors = {"weights": layer.weight.detach(), "activations": usual, "with outliers": loud}
print("root mean square of errors, relative to the values, is at most")
print("format                 bits ", *(f"{name:>14}" for name in tensors))
for name in ("float8_e4m3fn", "mxfp8", "float4_e2m1fn", "mxfp4", "nvfp4"):
    row = []
    for kind, x in tensors.items():
        blocks = name in BLOCK_FORMATS
        found = quantize_blocks(x, name).dequantize() if blocks else one_scale(x, name)
        quiet = torch.arange(64) != 17 if kind == "with outliers" else slice(None)
        error = (found - x)[:, quiet].square().mean() / x[:, quiet].square().mean()
        row.append(error.sqrt().item())
    bits = BLOCK_FORMATS[name].bits_per_value if blocks else FORMATS[name].bits
    label = name if blocks else f"{name}, one scale"
    print(f"{label:24} {bits:4.2f}", *(f"{min(100, 5 * math.ceil(20 * e)):13}%" for e in row))

# %% [markdown]
# With 8 bits, the scales hardly matter: e4m3 has exponents of its own, and its relative error is
# the same for all but the smallest numbers. With 4 bits they decide. With an outlier and one scale,
# all quiet channels become zero. In blocks, only the outlier's neighbors suffer. Our rows are so
# short that these are half of all channels for MXFP4, and a quarter for NVFP4; in a row of 4,096 it
# would be 32 or 16. The table prices the formats for storage. What they do to *training* is
# measured at the end of the chapter.

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
# division: add a random whole number to the bits of the `float32`, read as an `int32`, and set
# the lower half to zero. Write `round_by_bits(x, generator)` that does so for finite numbers.
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
# *Half an hour.* Kahan's trick works for weights, too: keep what the last update lost in a second
# `bfloat16` number. Write `kahan_update(weight, lost, update)`. All three are `bfloat16`, and
# it returns the new weight and the new lost part, with no operation in a wider type. How many bits
# does a weight take now, compared with one in 32 bits?
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
# ## Training in 8 and 4 bits
#
# The recipe of this chapter computes products in 16 bits. Recent GPUs multiply 8-bit numbers twice
# as fast again, and 4-bit numbers faster still. We have no such unit, but we don't need one to know
# what the rounding does to the loss. A product of rounded numbers, summed in 32 bits, is the same
# whether the numbers are stored in 8 bits or in 32. So we **emulate**: round the operands to the
# short format, and multiply in `float32`. This shows the *accuracy* of such training, digit by
# digit apart from the order of sums. It says nothing about *speed*; in fact, all the rounding makes
# it slower.
#
# A linear layer does three products, one forward and two backward, with $X$ the inputs (one row
# for each token), $W$ the weights, and $G$ the gradient of the outputs:
#
# $$
# Y = X W^\top, \qquad dX = G W, \qquad dW = G^\top X .
# $$ (precision-products)
#
# All operands are rounded: $X$ and $W$ to e4m3, which has more digits, and $G$ to e5m2, which has
# more range, since gradients vary more {cite}`micikevicius2022fp8`. Each needs a scale before it is
# rounded, and this is where recipes differ:
#
# - **Current** scaling takes the amax of the tensor at hand. That means reading the tensor twice,
#   once for the amax and once to round it.
# - **Delayed** scaling takes the largest amax of the last steps, 16 here, which is known
#   beforehand. If a tensor grows suddenly, its largest values saturate until the history has caught
#   up.
# - **Block** scaling uses the formats above. The blocks have to lie along the direction that the
#   product sums over, so that a scale can be taken out of each partial sum. The three products sum
#   over features, outputs, and tokens. So each operand is rounded twice, in two directions.
#
# With 4 bits, rounding gradients to nearest has the bias we know, so they are rounded by chance, as
# in NVIDIA's recipe {cite}`nvidia2025nvfp4`.


# %%
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
        _check_whole("history", self.history, 1)
        if not isinstance(self.stochastic, bool):
            raise ValueError(f"stochastic: expected True or False, got {self.stochastic!r:.60}")


# %% [markdown]
# Some common ones have names. Forward and backward formats are the same where blocks are scaled,
# since a scale for each block leaves little need for a wider range:

# %%
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

# %% [markdown]
# `emulate(model, recipe)` returns a copy of a model whose linear layers do this. The layers
# differ from `nn.Linear` only in the three products.

# %% [markdown] tags=["engine"]
# ### Engine room: a layer with rounded products (`EmulatedLinear`), and a model of them (`emulate`)

# %% [markdown] tags=["engine"]
# The layer rounds an operand along one of its two dimensions. With one scale for the whole tensor
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
        _check_whole("in_features", in_features, 1)
        _check_whole("out_features", out_features, 1)
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
        out = _RoundedProducts.apply(rows, self.weight, self)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


# %% [markdown] tags=["engine"]
# The three products are written out by hand. What the backward pass needs is rounded in the forward
# pass already, as a real implementation would, which thereby keeps activations in 8 bits:


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
# A model is emulated by exchanging its linear layers, in a copy.


# %% tags=["engine"]
#| export
def emulate(
    model: nn.Module, recipe: str | Recipe, *, keep: Collection[str] = ("lm_head",)
) -> nn.Module:
    """Return a copy of ``model`` whose linear layers round the operands of their products.

    Layers whose own name is in ``keep`` stay as they are. ``recipe`` is one of ``RECIPES`` or made
    anew. Train the copy as any model: its weights are float32.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a module of PyTorch, got {model!r:.60}")
    recipe = _find_recipe(recipe)
    if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
        raise ValueError(f"keep: expected a collection of names, got {keep!r:.60}")
    model = deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name not in keep:
                biased = child.bias is not None
                layer = EmulatedLinear(
                    child.in_features, child.out_features, biased, recipe=recipe
                ).to(child.weight.device)
                layer.weight, layer.bias = child.weight, child.bias
                setattr(parent, name, layer.train(child.training))
    return model


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


# %% [markdown]
# ### What it does to the loss
#
# Embeddings, norms, attention scores, and the output layer stay in `float32`, as is usual. Each
# recipe trains from the same start on the same batches as `float32`, with three seeds. It is judged
# by the mean loss of its last ten steps, where the noise of the batches is the same for both. The
# interval is Student's for three differences, at 95%. It is wide; three runs support no more.


# %%
def final_loss(seed: int, recipe: str | None) -> float:
    model = new_model(seed)
    model = model if recipe is None else emulate(model, recipe)
    losses, _ = train(model, stores["float32"], rate=3e-3, n_steps=40)
    return sum(losses[-10:]) / 10


control = torch.tensor([final_loss(seed, None) for seed in range(3)])
bounds = {"fp8_current": (-0.01, 0.02), "nvfp4": (0.02, 0.2)}
for recipe, (low, high) in bounds.items():
    worse = torch.tensor([final_loss(seed, recipe) for seed in range(3)]) - control
    half = 4.303 * worse.std() / math.sqrt(3)
    assert low < worse.mean() - half and worse.mean() + half < high, (recipe, worse)
    print(f"{recipe:11} nats above float32, 95% interval: within {low} to {high}")

# %% [markdown]
# With 8 bits, the difference is a few thousandths of a nat, hardly more than three runs can
# resolve. With 4 bits, it can be seen. A longer comparison of all recipes, with 200 steps and twice
# the width, was made by `benchmarks/rounding.py`. Losses are in nats per token:
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
# What can be read from it, and what can't? Products in `bfloat16` cost nothing here: the difference
# is less than a thousandth of a nat, with an interval to match. Products in 8 bits without scales
# cost about a hundredth, and that interval excludes zero. The three ways to scale can't be told
# apart from each other, nor from no cost at all; three seeds of a model this small don't tell which
# is better. Four bits cost 5% of the loss, which is a lot. The recipe of a 12-billion-parameter
# model that came within about 1.5% of its 8-bit loss {cite}`nvidia2025nvfp4` has more parts: some
# layers stay in 16 bits, tensors are rotated at random so that outliers spread over their block,
# and the weights get the same blocks in both directions.
#
# ### A faster product is not a faster run
#
# How much of this is worth it? Say that products take a share $p$ of a training step and become $k$
# times as fast, while everything else stays as it is. The step then takes $1 - p + p / k$ of its
# time (Amdahl's law), so it is
#
# $$
# S = \frac{1}{1 - p + p / k}
# $$ (precision-amdahl)
#
# times as fast, which is less than $k$ unless $p = 1$. nanochat's log {cite}`karpathy2026nanochat`
# has a complete set of numbers for `fp8_current` on H100 GPUs, a model of 26 layers, and compiled
# kernels. On paper, 8-bit products are twice as fast as in `bfloat16`. The feed-forward layer
# measured alone, with its roundings, was 1.38 times as fast. Training as a whole processed 1.17
# times as many tokens per second. What share does that imply, and what's left at equal quality, for
# which the log gives a speedup of about 1.05?

# %%
product, run, equal_quality = 1.38, 1.17, 1.05
share = (1 - 1 / run) / (1 - 1 / product)
print(f"a run {run} times as fast: products took {share:.0%} of the time")
print(f"even products that take no time would give {1 / (1 - share):.1f} times")
print(f"{run / equal_quality - 1:.0%} more tokens were needed for the same quality")

# %% [markdown]
# Half of the step wasn't products, so half of the gain was gone. Most of what remained was paid
# back in extra steps, since each one is a little less accurate. Per-row scales were more accurate,
# and their overhead made the run *slower* than in 16 bits, 0.90 times. None of this speaks against
# 8 bits: larger matrices have a larger share, and the log finds that larger models gain more. It
# speaks for asking of any faster kernel: what share of the step is it, and is a step still worth as
# much? Only a whole run to the same loss answers.
