# %% [markdown]
# # Scaling laws
#
# > Choose a run before you pay for it: how the loss falls with size, data and compute, which settings
# > survive a change of size, and what a run costs.
#
# (The opening belongs to the first half of the chapter.)
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.scaling.mup_scales`, {py:func}`~llmbook.scaling.initialize_mup`, {py:func}`~llmbook.scaling.mup_groups`, {py:func}`~llmbook.scaling.noise_scale`, {py:func}`~llmbook.scaling.gradient_noise`, {py:func}`~llmbook.scaling.estimate_run`, {py:func}`~llmbook.scaling.info`, {py:func}`~llmbook.scaling.hyperparameter_checklist`, {py:func}`~llmbook.scaling.check_config` |
# | **You need** | training ({doc}`13_training`), intervals ({doc}`16_evaluation`) |
# | **It takes** | 30 minutes for the main line, 1.5 hours for everything, 45 seconds to run |

# %% tags=["remove-cell"]
#| default_exp scaling

# %% tags=["engine"]
#| export
# The imports of the module
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

# %% [markdown]
# ## Transfer over width
#
# A large run is paid for once, so nobody tunes it. The learning rate comes from a smaller model. How
# bad can that be? The next figure shows 48 small models that differ in their width and their rate
# only. All have two layers and trained for 150 steps of AdamW on the stories of the tiny world
# ({doc}`01_tinyworld`). The command `python benchmarks/transfer.py` trains them, each with two
# seeds, and keeps their losses in `benchmarks/results/transfer.csv`.

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.batches import Batch
from llmbook.blocks import initialize_weights, lookup_tables
from llmbook.environment import check_at_least, check_choice, check_whole
from llmbook.model import ModelConfig, TransformerLM, cache_bytes, count_parameters
from llmbook.model import flops_per_token
from llmbook.optimization import parameter_groups
from llmbook.training import Objective, TrainingConfig, next_token_objective

# %% tags=["engine"]
# The imports and the data of the experiments
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import llmbook
from llmbook.environment import seed_everything
from llmbook.evaluation import mean_interval
from llmbook.model import parameter_counts
from llmbook.optimization import AdamW, clip_gradients, wsd_schedule
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe

plt.style.use("llmbook.book")
torch.set_num_threads(1)
with open(Path(llmbook.__file__).parents[1] / "benchmarks/results/transfer.csv") as file:
    sweep = list(csv.DictReader(file))


def mean_losses(method: str, width: int) -> dict[int, float]:
    """The mean loss over the seeds, by the exponent of the rate."""
    rows = [r for r in sweep if r["method"] == method and int(r["width"]) == width]
    rates = sorted({int(r["log2_rate"]) for r in rows})
    same = {rate: [float(r["loss"]) for r in rows if int(r["log2_rate"]) == rate] for rate in rates}
    return {rate: sum(losses) / len(losses) for rate, losses in same.items()}


def draw_curves(titles: Mapping[str, str], widths: Sequence[int]) -> None:
    """Loss over rate, a curve for each width with its minimum marked, a panel for each method."""
    figure, axes = plt.subplots(1, len(titles), figsize=(7.5, 3.1), sharey=True)
    for axis, (method, title) in zip(axes, titles.items(), strict=True):
        for number, width in enumerate(widths):
            losses = mean_losses(method, width)
            best = min(losses, key=losses.__getitem__)
            axis.plot(losses.keys(), losses.values(), color=f"C{number}", label=f"width {width}")
            axis.plot(best, losses[best], "o", color=f"C{number}")
        axis.set(title=title, xlabel="base-2 logarithm of the learning rate", ylim=(0.55, 2.1))
    axes[0].set_ylabel("held-out loss (nats per token)")
    axes[0].legend()
    plt.show()


# %% mystnb={"figure": {"caption": "Loss over the learning rate for four widths, the minima marked. Left, with one rate for all parameters, the best rate falls as the width grows. Right, with the scales derived below, it stays.", "name": "fig-scaling-transfer"}, "image": {"alt": "Two panels with four U-shaped curves each. Left, the minima move from an exponent of minus 5 at width 32 to minus 8 at width 256. Right, all four minima are at minus 5, one above the other."}}
titles = {"standard": "standard", "mup": "maximal-update parametrization"}
draw_curves(titles, (32, 64, 128, 256))

# %% [markdown]
# On the left, everything that is written to the right of each minimum is lost money. The rate that is
# best for width 32 makes width 256 *worse than width 32*: the larger model costs thirty times as
# much to train and ends at more than twice the loss. With every doubling of the width, the best rate
# has to be halved. On the right, one rate is best for all widths. What is different there is not the
# model but a handful of constants, and they can be derived.
#
# ### The scales
#
# Let a matrix $W$ with $n$ columns ({term}`fan-in`) act on a vector $x$ whose entries are of size 1.
# How large should the entries of $W$ be at the start, and how large may a step be?
#
# **Initialization.** Entry $i$ of $Wx$ is $\sum_j W_{ij} x_j$, a sum of $n$ independent terms. Signs
# are random, so variances add up: entries of standard deviation $\sigma$ give a sum of size
# $\sigma \sqrt n$. For this to be 1 at any width, $\sigma = 1/\sqrt n$. That is what
# {doc}`10_blocks` draws, and it is the same in both panels.
#
# **The step.** Adam's step is close to the sign of the gradient, so each entry moves by about the
# rate $\eta$ ({doc}`12_optimization`). The gradient of one token is the outer product
# $\delta\, x^\top$ of what comes back and what came in, so the entries of the step have the signs of
# $\delta_i x_j$. Multiplied by an $x$ of the same kind, the sum is
#
# $$(\Delta W\, x)_i \approx -\eta \sum_{j=1}^{n} \operatorname{sign}(\delta_i)\, |x_j|
# \;=\; -\eta\, n \cdot O(1).$$
#
# Now the terms are *aligned*: they have the same sign, and it is sizes that add up, not variances.
# The step changes the output by $\eta\, n$, not by $\eta \sqrt n$. For the change to be of the same
# size at any width, $\eta \propto 1/n$. This is the shift on the left of
# {numref}`fig-scaling-transfer`.
#
# **Tables and gains.** Looking up a row of the embedding is a product with a one-hot vector, a sum
# with one term. Nothing grows with the width, and the rate stays as it is. The same holds for gains
# and biases, which multiply or add entry by entry. So no single rate is right for tables *and*
# matrices: as the model grows, a rate that suits the matrices leaves the table untrained.
#
# **The head** is a matrix with $n$ columns too, so its rate falls with $1/n$. But its output is the
# end: logits are compared with each other, and nothing behind them corrects their size. After
# training has begun, head and hidden vector are aligned, and an entry of size $1/\sqrt n$ would give
# logits of size $\sqrt n$. Hence $\sigma \propto 1/n$: at the start the logits of wide models
# are small, and what training adds is of size 1.
#
# **Attention.** A score $q^\top k / \sqrt{d}$ has size 1 if $q$ and $k$ are independent, as they are
# at the start ({doc}`09_attention`). Training aligns them: then the sum is of size $d$, and the
# factor has to be $1/d$ if heads become wider. (If there are *more* heads of the same width, nothing
# changes.)
#
# Together this is the **maximal-update parametrization**, or muP: every matrix learns as fast as it
# can without blowing up, at every width {cite}`yang2022tensor`. With $m$ the width divided by that
# of a base model, whose rate was tuned, and $m_h$ the same for the width of a head:
#
# | parameter | initialization relative to {doc}`10_blocks` | Adam's rate |
# |---|---|---|
# | tables, gains, biases | 1 | $\eta$ |
# | matrices in blocks | 1 | $\eta / m$ |
# | query projection | $1/\sqrt{m_h}$ | $\eta / (m \sqrt{m_h})$ |
# | head | $1/\sqrt m$ | $\eta / m$ |
#
# The third row is the factor of attention in disguise. Adam does not see the size of a gradient, so
# a matrix that is multiplied by a constant $c$ after each step is the same as one that starts $c$
# times as large and has $c$ times the rate. We change the numbers and leave the code of attention
# alone. The smallest form of it needs a dozen lines:

# %%
def width_scales(model: TransformerLM, base: ModelConfig) -> dict[str, tuple[float, float]]:
    m, scales = model.config.d_model / base.d_model, {}
    m_head = model.config.d_head / base.d_head
    for name, parameter in model.named_parameters():
        init, rate = 1.0, 1.0
        if parameter.ndim == 2 and name != "embedding.weight":
            rate = 1 / m
        if name == "lm_head.weight":
            init = 1 / math.sqrt(m)
        if "q_proj" in name:
            init, rate = 1 / math.sqrt(m_head), rate / math.sqrt(m_head)
        scales[name] = (init, rate)
    return scales


# %% [markdown]
# The exported {py:func}`~llmbook.scaling.mup_scales` also handles what a table with four rows leaves
# out: {term}`fan-in`s that grow differently, tied heads, experts, and the norms of queries and keys.
# Two functions apply it, {py:func}`~llmbook.scaling.initialize_mup` to the weights and
# {py:func}`~llmbook.scaling.mup_groups` to the groups of an optimizer.
#
# ### Engine room: any model of ours, tied or with experts, and weight decay that stays the same
#
# A tied head cannot have an initialization of its own. But the last norm has a gain in front of the
# head, and dividing the gain by $m$ divides the logits. Where queries are normalized, their
# projection has no say about their size, and the gain of that norm takes its place. A router has as
# many outputs as there are experts, whatever the width: it is a head.
#
# AdamW multiplies the weights by $1 - \eta\lambda$ at each step. If $\eta$ is divided by $m$, decay
# slows down with it, and with the decay changes the size at which weights settle. So
# {py:func}`~llmbook.scaling.mup_groups` multiplies $\lambda$ by $m$: what stays the same over the
# widths is the product. {cite:t}`wortsman2024proxies` call this independent weight decay, and find
# that the best rate depends less on the size with it.


# %% tags=["engine"]
#| export
class WidthScale(NamedTuple):
    """What is multiplied, for one parameter, as a model becomes wider than its base."""

    init: float  # the weights that initialize_weights draws
    rate: float  # the learning rate of Adam


def _check_widths(model: Any, base: Any) -> None:
    if not isinstance(model, TransformerLM):
        raise ValueError(f"model: expected a TransformerLM, got {type(model).__name__}")
    if not isinstance(base, ModelConfig):
        raise ValueError(f"base: expected a ModelConfig, got {base!r:.60}")
    kept = ("n_layers", "n_experts", "qk_norm", "tie_embeddings", "norm_position", "activation")
    kept += ("vocab_size", "positions", "norm", "bias", "qkv_bias", "d_shared")
    for name in kept:
        wanted, got = getattr(model.config, name), getattr(base, name)
        if wanted != got and (name != "d_shared" or not (wanted and got)):
            raise ValueError(f"base: expected {name} = {wanted!r} as of the model, got {got!r}")
    if base.tie_embeddings and base.norm_position != "pre":
        raise ValueError("model: expected a norm before its tied head, got norm_position 'post'")


# %% tags=["engine"]
#| export
def mup_scales(model: TransformerLM, base: ModelConfig) -> dict[str, WidthScale]:
    """Return the scales of each parameter under the maximal-update parametrization, by its name.

    ``base`` is the configuration for which the rate was tuned; it differs from the model's in its
    widths only, else a ``ValueError`` says in what. Scales of ``init`` are relative to
    ``initialize_weights``; all are 1 where the widths are equal. Attention by 1 / d_head is a scale
    of what makes the queries, and a tied head one of the last norm, which comes to the same for
    Adam. Source: Yang et al. (2022), table 8; their lemma J.1 for the equivalence.

    >>> sizes = {"vocab_size": 64, "context_length": 8, "n_layers": 1, "n_heads": 2}
    >>> model = TransformerLM(ModelConfig(d_model=64, **sizes))
    >>> mup_scales(model, ModelConfig(d_model=16, **sizes))["lm_head.weight"]
    WidthScale(init=0.5, rate=0.25)
    """
    _check_widths(model, base)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in TransformerLM(base).named_parameters()}
    config, tables = model.config, lookup_tables(model)
    width, tied = base.d_model / config.d_model, config.tie_embeddings
    heads = math.sqrt(base.d_head / config.d_head)
    scales = {}
    for name, parameter in model.named_parameters():
        init = rate = 1.0
        parts = name.split(".")
        if parameter.ndim >= 2 and id(parameter) not in tables:
            rate = shapes[name][-1] / parameter.shape[-1]  # of fan-ins
        if name == "lm_head.weight" or "router" in parts:
            init = math.sqrt(rate)
        if ("q_norm" if config.qk_norm else "q_proj") in parts:
            init, rate = init * heads, rate * heads
        if tied and (id(parameter) in tables or {"o_proj", "down_proj"} & set(parts)):
            init /= math.sqrt(width)  # drawn with 1 / sqrt(d_model), or times it
        if tied and parts[0] == "norm":
            init = rate = width
        scales[name] = WidthScale(init, rate)
    return scales


# %% tags=["engine"]
#| export
@torch.no_grad()
def initialize_mup(model: TransformerLM, base: ModelConfig) -> None:
    """Draw all weights of ``model`` anew, as ``initialize_weights`` does, and scale them for muP."""
    scales = mup_scales(model, base)
    initialize_weights(model, model.config.n_layers)
    for name, parameter in model.named_parameters():
        parameter.mul_(scales[name].init)


def mup_groups(
    model: TransformerLM, base: ModelConfig, learning_rate: float, weight_decay: float = 0.1
) -> list[dict[str, Any]]:
    """Return the groups of an AdamW for ``model``, with the ``learning_rate`` tuned on ``base``.

    What decays is what ``parameter_groups`` says, and each step shrinks it by ``learning_rate *
    weight_decay`` at any width. Source: Yang et al. (2022), table 8; for the decay, Wortsman et
    al. (2024).
    """
    _check_positive(learning_rate=learning_rate)
    scales = mup_scales(model, base)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for group in parameter_groups(model, weight_decay):
        for parameter in group["params"]:
            key = scales[names[id(parameter)]].rate, group["weight_decay"]
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": some, "lr": learning_rate * rate, "weight_decay": decay / rate}
        for (rate, decay), some in groups.items()
    ]


# %% tags=["engine"]
#| export
def _check_positive(**values: Any) -> None:
    """Demand finite numbers above 0."""
    for name, value in values.items():
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r:.60}")


# %% [markdown]
# ### Coordinate check
#
# A slip in one of the scales is easily made and hard to see, because the model still trains. The
# **coordinate check** finds it in seconds: train models of several widths for a few steps and see how
# far the outputs have moved. Under muP the distance must not depend on the width.

# %% tags=["engine"]
# The stories, and how a model of the sweep is made
world = TinyWorld()
stories = [story.text for story in world.stories(1600, 0)]
tokenizer = train_bpe(stories, 512)
END, LENGTH = tokenizer.special_tokens["<|endoftext|>"], 64


def rows_of(texts: Sequence[str]) -> Batch:
    """One story in each row, cut after 64 tokens; what is behind its end is no target."""
    ids = torch.full((len(texts), LENGTH + 1), END)
    targets = torch.full((len(texts), LENGTH), -100)
    for row, text in enumerate(texts):
        found = [END, *tokenizer.encode(text), END][: LENGTH + 1]
        ids[row, : len(found)] = torch.tensor(found)
        targets[row, : len(found) - 1] = torch.tensor(found[1:])
    return Batch(ids[:, :-1].contiguous(), targets)


def some_rows(data: Batch, first: int, number: int) -> Batch:
    """Rows from ``first`` on."""
    rows = torch.arange(first, first + number) % len(data.inputs)
    return Batch(data.inputs[rows], data.targets[rows])


def config_of(width: int) -> ModelConfig:
    """The configuration of the sweep: two heads, whose width grows."""
    sizes = {"vocab_size": 512, "context_length": LENGTH, "n_layers": 2, "n_heads": 2}
    return ModelConfig(d_model=width, d_ff=2 * width, **sizes)


data = rows_of(stories)


# %% tags=["engine"]
# One model of the sweep, and a step
def model_of(width: int, mup: bool, rate: float, seed: int = 0) -> tuple[TransformerLM, AdamW]:
    """A new model with its optimizer."""
    seed_everything(seed)
    model, base = TransformerLM(config_of(width)), config_of(32)
    if not mup:
        return model, AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.0)
    initialize_mup(model, base)
    return model, AdamW(mup_groups(model, base, rate, 0.0), rate, (0.9, 0.95), weight_decay=0.0)


def take_step(model: TransformerLM, optimizer: AdamW, batch: Batch) -> float:
    """One step; the loss before it, per token."""
    total, count = next_token_objective(model, batch)
    loss = total / count
    optimizer.zero_grad()
    loss.backward()
    clip_gradients(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


# %%
def movement(width: int, mup: bool, n_steps: int = 4, rate: float = 2.0**-5) -> float:
    """How far logits move in a few steps: the root of the mean square."""
    model, optimizer = model_of(width, mup, rate)
    batch = some_rows(data, 0, 8)
    with torch.no_grad():
        before = model(batch.inputs)
    for _ in range(n_steps):
        take_step(model, optimizer, batch)
    with torch.no_grad():
        return float((model(batch.inputs) - before).square().mean().sqrt())


print("width   standard   muP")
moved = {}
for width in (32, 64, 128, 256):
    moved[width] = movement(width, False), movement(width, True)
    print(f"{width:5}   {moved[width][0]:8.1f}   {moved[width][1]:3.1f}")
assert moved[256][0] > 2 * moved[32][0] and moved[256][1] < 1.5 * moved[32][1]

# %% [markdown]
# The check is necessary, and not sufficient: the users of the reference implementation report models
# that pass it and whose best rate still moves (microsoft/mup, issues 22, 71 and 73). What counts is
# the right half of {numref}`fig-scaling-transfer`, so draw the curves before you trust a transfer.
#
# And look at the heights of the minima, which few reports show:

# %%
for method in ("standard", "mup"):
    best = [min(mean_losses(method, width).values()) for width in (32, 64, 128, 256)]
    print(f"{method:8}  best loss by width: ", "  ".join(f"{loss:.2f}" for loss in best))

# %% [markdown]
# At every width but the smallest, the standard parametrization *at its own best rate* reaches the
# lower loss. muP does not make a model better in our runs, it makes the rate predictable; here the
# price is up to 0.08 nats. With six rates to try at every width it would not be worth it. At the size
# where one can try a single rate, it is.
#
# ### Weight decay and depth
#
# **Weight decay** goes with the product of rate and decay, as each step shrinks a weight by that
# factor. If the rate is divided by $m$, so is the decay, unless one multiplies it back; the
# {term}`engine room` above does. **Depth** adds a second factor. With $L$ layers, each writes to the
# {term}`residual stream` $2L$ times, and {doc}`10_blocks` divides what is written by $\sqrt{2L}$ at the
# start. But the steps of all layers are aligned, like the terms of a product, and add up with $L$
# instead of $\sqrt L$. Dividing the branches by $L$ keeps the best rate over depth
# {cite}`dey2025completep`. We have measured the width only.
#
# ### What Muon changes
#
# Muon's step is a matrix whose singular values are all 1 ({doc}`12_optimization`). It moves an
# output by the same amount whatever the width, without any factor, as a unit vector comes out with
# length 1. So the width should drop out. Whether it does depends on a convention that hides in
# an option. Torch's `"original"` multiplies the step by $\sqrt{\max(1, \text{rows}/\text{columns})}$,
# a constant for matrices that keep their shape. Its `"match_rms_adamw"` multiplies it by
# $0.2\sqrt{\max(\text{rows}, \text{columns})}$, so that entries move as far as with Adam; that is
# convenient, because AdamW's rate and decay can be kept {cite}`liu2025muon`, and it brings the
# $\sqrt n$ back.

# %% mystnb={"figure": {"caption": "Muon for the matrices of the blocks, AdamW with fixed, width-scaled rates for the rest. Loss over Muon's rate, in the two conventions.", "name": "fig-scaling-muon"}, "image": {"alt": "Two panels with three U-shaped curves each, for widths 32, 64 and 128, with their minima marked."}}
titles = {"muon_original": "original", "muon_match_rms": "match_rms_adamw"}
draw_curves(titles, (32, 64, 128))

# %% [markdown]
# With the original rule the best rate stays (between 1/16 and 1/32 at all three widths). With the other
# it falls by half as the width grows by four, which is the $\sqrt n$ of its formula. So a rate of Muon
# means nothing without its convention: the same exponent is off by a factor of $0.2 \sqrt n$, about 13
# for a width of 4,096 (pytorch/pytorch, issue 160213). The chapter on optimizers uses the second.
#
# Muon is for matrices between hidden vectors only. Tables have rows that belong to tokens, and rare
# rows should not move as far as frequent ones; the head's output is not a hidden vector. Both go to
# AdamW, with the scales of the table above, and a library that orthogonalizes everything with two
# dimensions gets it wrong in silence (DeepSpeed, issue 7641). In the figure, that is all of muP that is
# left for us to do, and nanochat reports the same for its models (karpathy/nanochat, issue 644).
#
# ## Batch size
#
# Twice the batch costs twice the examples per step. At first it saves half of the steps, and at some
# size it saves nothing. Where is the turn? Let $g_i$ be the gradient of the loss of row $i$, with mean
# $G$ and covariance $\Sigma$. The gradient $G_B$ of a batch of $B$ rows has mean $G$ and covariance
# $\Sigma / B$. A step of length $\epsilon$ along it changes the loss, to second order with curvature
# $H$, by
#
# $$\mathbb{E}[\Delta L] = -\epsilon\, |G|^2 + \tfrac12 \epsilon^2
# \left( G^\top H G + \frac{\operatorname{tr}(H \Sigma)}{B} \right),$$
#
# because $\mathbb{E}[G_B^\top H G_B] = G^\top H G + \operatorname{tr}(H\Sigma)/B$. The best step is
# where the derivative vanishes, and there the gain is
#
# $$\Delta L_B = \frac{\Delta L_\infty}{1 + B_{\text{noise}} / B},
# \qquad B_{\text{noise}} = \frac{\operatorname{tr}(H \Sigma)}{G^\top H G}.$$
#
# For $B \ll B_{\text{noise}}$ the gain of a step is proportional to $B$, so examples are used as well as
# they can be. For $B \gg B_{\text{noise}}$ a larger batch gains nothing. At
# $B = B_{\text{noise}}$ a run takes twice the fewest steps and twice the fewest examples: this is the
# **critical batch size**. $H$ is not at hand, but if it is about the same in all directions it cancels,
# and what is left is the **simple noise scale** $\operatorname{tr}\Sigma / |G|^2$
# {cite}`mccandlish2018empirical`.
#
# Its two parts follow from squared lengths at two batch sizes, $b < B$. Since
# $\mathbb{E}|G_b|^2 = |G|^2 + \operatorname{tr}\Sigma / b$, and the same for $B$, we have two linear
# equations with two unknowns:
#
# $$\widehat{|G|^2} = \frac{B |G_B|^2 - b |G_b|^2}{B - b}, \qquad
# \widehat{\operatorname{tr}\Sigma} = \frac{|G_b|^2 - |G_B|^2}{1/b - 1/B}.$$
#
# Both are unbiased, because they are linear in the two squares. Their ratio is not, so average each of
# them before you divide.


# %%
#| export
class NoiseScale(NamedTuple):
    """The parts of a gradient's squared length, and the batch size at which they are equal."""

    signal: float  # of the mean gradient G: its squared length
    noise: float  # of one example: the trace of the covariance

    @property
    def batch_size(self) -> float:
        """The simple noise scale, in examples; infinite where the noise drowns the signal."""
        return self.noise / self.signal if self.signal > 0 else math.inf


# %% [markdown]
# We measure it on a model of width 64 at four moments of its training. Small batches have 2 rows, large
# ones consist of 16 small ones, so one pass over 128 small batches gives both lengths:

# %% [markdown]
# ### Engine room: an estimate from sums, so that rows of unequal length count right
#
# A batch with more tokens should not weigh more than its number of rows. So we take gradients of the
# *sum* over tokens, which is a sum over rows, and divide by the mean number of tokens of a row at the
# end. The large batch is the sum of its small ones, and costs nothing.


# %% tags=["engine"]
#| export
def noise_scale(
    small_square: float, big_square: float, small: int | float, big: int | float
) -> NoiseScale:
    """Return signal and noise from the mean squared lengths of gradients at two batch sizes.

    Source: McCandlish et al. (2018), appendix A.1.

    >>> noise_scale(5.0, 2.0, 1, 4)  # 1 + 4 / 1 and 1 + 4 / 4
    NoiseScale(signal=1.0, noise=4.0)
    """
    _check_positive(small=small, big=big)
    for name, value in (("small_square", small_square), ("big_square", big_square)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value:
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r:.60}")
    if not small < big:
        raise ValueError(f"big: expected more than small = {small}, got {big}")
    signal = (big * big_square - small * small_square) / (big - small)
    return NoiseScale(signal, (small_square - big_square) / (1 / small - 1 / big))


# %% tags=["engine"]
#| export
def gradient_noise(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    group: int = 8,
    objective: Objective = next_token_objective,
) -> NoiseScale:
    """Return the noise scale of the gradient in rows, from small batches of equally many rows.

    Every ``group`` of them make a large batch; what is left over is not used. Weights and their
    gradients stay as they are. A ``ValueError`` if there is not one group.
    """
    check_whole("group", group, 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected a parameter that requires a gradient, got none")
    small: list[float] = []
    big: list[float] = []
    n_rows, targets, waiting = None, 0.0, iter(batches)
    while len(some := list(islice(waiting, group))) == group:
        sums = [torch.zeros_like(p) for p in parameters]
        for batch in some:
            rows = len(batch.inputs)
            n_rows = rows if n_rows is None else n_rows
            if rows != n_rows:
                raise ValueError(f"batches: expected {n_rows} rows in each, got {rows}")
            total, count = objective(model, batch)[:2]
            targets += float(count)
            grads = torch.autograd.grad(total, parameters, allow_unused=True)
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]
            small.append(sum(float(g.double().square().sum()) for g in found))
            torch._foreach_add_(sums, found)
        big.append(sum(float(s.double().square().sum()) for s in sums))
    if n_rows is None or not targets:
        raise ValueError(f"batches: expected at least group = {group} of them, got fewer")
    unit = (n_rows * targets / (len(small) * n_rows)) ** 2  # of a batch of n_rows, as a mean
    squares = sum(small) / len(small) / unit, sum(big) / len(big) / (unit * group**2)
    return noise_scale(*squares, n_rows, n_rows * group)


# %% [markdown]
# ### Measured on our model

# %%
model, optimizer = model_of(64, False, 2.0**-6)
scales = []
for step in range(161):
    if step in (0, 10, 40, 160):
        pairs = (some_rows(data, row, 2) for row in range(0, 256, 2))
        scales.append(gradient_noise(model, pairs, group=16).batch_size)
        print(f"after {step:3} steps the noise scale is about {scales[-1]:.1g} rows")
    take_step(model, optimizer, some_rows(data, 8 * step, 8))
assert scales[0] < scales[1] < scales[3]

# %% [markdown]
# At the start a handful of rows agree on where to go: make nouns frequent, and everything else rare.
# The noise scale grows by two orders of magnitude as the easy part of the gradient is used up. Hence
# the large runs that begin with small batches and enlarge them, such as Llama 3, which went from 4
# to 16 million tokens {cite}`grattafiori2024llama3`. It also grows with better models, as the loss
# falls: {cite:t}`kaplan2020scaling` fitted $B_{\text{crit}} = 2 \cdot 10^8 / L^{4.8}$ tokens at a loss
# of $L$ nats, which is 0.3 million at $L = 4$ and 3 million at 2.5. These are the batches of the
# checklists below.
#
# Take the number for what it is. The derivation is for a plain gradient step at its best length; Adam
# divides by the noise, and its rate should grow with $\sqrt B$ rather than $B$ while $B$ is
# small. The scale tells the order of magnitude of a batch, at the cost of a few gradients.
#
# ## Annealing and data mixtures
#
# A tenth or a quarter of the data is often better than the rest: proofread, on the subject, in the right
# language. Where should it go? Reports put it at the end, where the rate decays, and call it annealing
# or mid-training {cite}`hu2024minicpm,grattafiori2024llama3,olmo2024olmo2`. Our test has two worlds.
# Three quarters of all steps show stories of *another* tiny world, with other characters and facts; one
# quarter shows the world that we will be tested on. Each arm sees the same number of rows of each, for the
# same number of steps, with the same schedule. Only the order differs:

# %% tags=["engine"]
# One arm of the experiment, and the loss on both worlds
WORLDS = {"other": TinyWorld(seed=1), "ours": world}
train = {name: rows_of([s.text for s in w.stories(600, 0)]) for name, w in WORLDS.items()}
tests = {name: rows_of([s.text for s in w.stories(96, 1)]) for name, w in WORLDS.items()}


def losses_after(order: str, seed: int, n_steps: int = 100) -> dict[str, float]:
    """Train a model of width 32 on both worlds; return its loss on the test stories of each."""
    model, optimizer = model_of(32, False, 2.0**-5, seed)
    factor, generator = wsd_schedule(n_steps, warmup=10), torch.Generator().manual_seed(seed)
    ours = torch.arange(n_steps) >= n_steps - n_steps // 4  # last
    if order != "last":
        ours = ours.flip(0) if order == "first" else ours[torch.randperm(n_steps)]
    for step in range(n_steps):
        source = train["ours" if ours[step] else "other"]
        first = int(torch.randint(600, (1,), generator=generator))
        for parameters in optimizer.param_groups:
            parameters["lr"] = 2.0**-5 * factor(step)
        take_step(model, optimizer, some_rows(source, first, 8))
    with torch.no_grad():
        sums = {name: next_token_objective(model, batch) for name, batch in tests.items()}
    return {name: float(total / count) for name, (total, count) in sums.items()}


# %%
arms = {order: [losses_after(order, s) for s in range(3)] for order in ("mixed", "last", "first")}
for order in ("last", "first"):
    for name in WORLDS:
        gains = [a[name] - b[name] for a, b in zip(arms["mixed"], arms[order], strict=True)]
        found = mean_interval(gains)
        low, high = found.low, found.high
        print(f"ours {order:5}: gain on {name:5} {np.mean(gains):+.1f} ({low:+.1f} to {high:+.1f})")

# %% [markdown]
# The order matters. With our world *first*, a model has half forgotten it at the end. With our world
# *last* it does better on our world than with a mixture, but the gain is small beside what is lost
# on the other world, and with three seeds it is not certain. The reason to anneal here is that the
# target is known: of two losses that move against each other, the order chooses one. A team that is
# judged on the good data will anneal on it; its report should show the loss on the rest, too. Where the
# two kinds of data do not contradict each other as our worlds do, the price is lower.
#
# **Mixtures** are the same choice without an order. The share of a source has a loss of its own for
# every share, and an optimum can be fitted on small models and used on large ones, with the same
# caution as a learning rate: {cite:t}`ye2024mixing` predict the mixture for a run of a billion
# parameters from fits at a tenth of that, and Llama 3 chose its mixture in the same way
# {cite}`grattafiori2024llama3`.
