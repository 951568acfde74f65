# %% [markdown]
# # Scaling laws
#
# > Choose a run before you pay for it: how the loss falls with size, data and compute, which
# > settings survive a change of size, and what a run costs.
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
# A large run is paid for once, so nobody tunes it. The learning rate comes from a smaller model.
# How bad can that be?

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.batches import Batch
from llmbook.blocks import initialize_weights, lookup_tables
from llmbook.environment import check_at_least, check_choice, check_text, check_whole
from llmbook.model import ModelConfig, TransformerLM, cache_bytes, count_parameters
from llmbook.model import flops_per_token
from llmbook.optimization import parameter_groups
from llmbook.training import Objective, TrainingConfig, next_token_objective

# %% [markdown]
# {numref}`fig-scaling-transfer` shows 48 small models that differ in their width and their rate
# only. All have two layers and trained for 150 steps of AdamW on the stories of the tiny world
# ({doc}`01_tinyworld`). The command `python benchmarks/transfer.py` trains them, each with two
# seeds, and keeps their losses in `benchmarks/results/transfer.csv`.

# %% [markdown] tags=["engine"]
# ### Engine room: the file of the sweep, and how its curves are drawn

# %% tags=["engine"]
import csv
from pathlib import Path

import matplotlib.pyplot as plt

import llmbook
from llmbook.environment import seed_everything
from llmbook.evaluation import mean_interval
from llmbook.optimization import AdamW, clip_gradients, wsd_schedule
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe

plt.style.use("llmbook.book")
torch.set_num_threads(1)

# %% tags=["engine"]
# The rows of the file, their means over the seeds, and a panel for each method
kept = Path(llmbook.__file__).parents[1] / "benchmarks/results/transfer.csv"
with kept.open(encoding="utf-8") as file:
    sweep = list(csv.DictReader(file))


def mean_losses(method: str, width: int) -> dict[int, float]:
    """The mean loss over the seeds, by the exponent of the rate."""
    rows = [r for r in sweep if r["method"] == method and int(r["width"]) == width]
    rates = sorted({int(r["log2_rate"]) for r in rows})
    same = {rate: [float(r["loss"]) for r in rows if int(r["log2_rate"]) == rate] for rate in rates}
    return {rate: sum(losses) / len(losses) for rate, losses in same.items()}


def minimum(method: str, width: int) -> tuple[float, float]:
    """The exponent of the best rate, by a parabola through three points, and the least loss."""
    losses = mean_losses(method, width)
    best = min(losses, key=losses.__getitem__)
    left, middle, right = (losses[best + shift] for shift in (-1, 0, 1))
    return best + (left - right) / (left - 2 * middle + right) / 2, middle


# %% tags=["engine"]
def draw_curves(titles: Mapping[str, str], widths: Sequence[int]) -> None:
    """Loss over rate, a curve for each width with its minimum marked, a panel for each method."""
    _, axes = plt.subplots(1, len(titles), figsize=(7.5, 3.1), sharey=True)
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


# %% [markdown]
# ### Two panels

# %% mystnb={"figure": {"caption": "Loss over the learning rate for four widths, the minima marked. Left, with one rate for all parameters, the best rate falls as the width grows. Right, with the scales derived below, it stays.", "name": "fig-scaling-transfer"}, "image": {"alt": "Two panels with four U-shaped curves each. Left, the minima move from an exponent of minus 5 at width 32 to minus 8 at width 256. Right, all four minima are at minus 5, one above the other."}}
titles = {"standard": "standard", "mup": "maximal-update parametrization"}
draw_curves(titles, (32, 64, 128, 256))

# %% [markdown]
# On the left, the rate that is best for width 32 makes the model of width 256 *worse than that of
# width 32*: it costs thirty times as much to train and ends at twice the loss. With every
# doubling of the width, the best rate has to be more than halved. On the right, one rate is best
# for all widths. What is different there is not the model but a handful of constants, and they
# can be derived.
#
# ### The scales
#
# Let a matrix $W$ with $n$ columns ({term}`fan-in`) act on a vector $x$ whose entries are of size
# 1. How large should the entries of $W$ be at the start, and how large may a step be?
#
# **Initialization.** Entry $i$ of $Wx$ is $\sum_j W_{ij} x_j$, a sum of $n$ independent terms.
# Signs are random, so variances add up: entries of standard deviation $\sigma$ give a sum of size
# $\sigma \sqrt n$. For this to be 1 at any width, $\sigma = 1/\sqrt n$. That is what
# {doc}`10_blocks` draws, and it is the same in both panels.
#
# **The step.** Adam's step is close to the sign of the gradient, so each entry moves by about the
# rate $\eta$ ({doc}`12_optimization`). The gradient of one token is the outer product $\delta\,
# x^\top$ of what comes back and what came in, so the entries of the step have the signs of
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
# training has begun, head and hidden vector are aligned, and an entry of size $1/\sqrt n$ would
# give logits of size $\sqrt n$. Hence $\sigma \propto 1/n$: at the start the logits of wide models
# are small, and what training adds is of size 1.
#
# **Attention.** A score $q^\top k / \sqrt{d}$ has size 1 if $q$ and $k$ are independent, as they
# are at the start ({doc}`09_attention`). Training aligns them: then the sum is of size $d$, and the
# factor has to be $1/d$ if heads become wider. (If there are *more* heads of the same width,
# nothing changes.)
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
# The exported {py:func}`~llmbook.scaling.mup_scales` also handles what a table with four rows
# leaves out: fan-ins that grow differently, tied heads, experts, and the norms of queries
# and keys. Two functions apply it, {py:func}`~llmbook.scaling.initialize_mup` to the weights and
# {py:func}`~llmbook.scaling.mup_groups` to the groups of an optimizer.

# %% [markdown] tags=["engine"]
# ### Engine room: any model of ours, tied or with experts, and weight decay that stays the same

# %% [markdown] tags=["engine"]
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
#
# **Depth** adds a factor of its own. $L$ layers write to the {term}`residual stream` $2L$ times,
# and {doc}`10_blocks` divides what is written by $\sqrt{2L}$ at the start. But the steps of all
# layers are aligned, like the terms of a product, and add up with $L$ instead of $\sqrt L$.
# Dividing the branches by $L$ keeps the best rate over depth {cite}`dey2025completep`. We have
# measured the width only.


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
    kept = "n_layers n_experts qk_norm tie_embeddings norm_position activation vocab_size positions"
    for name in (*kept.split(), "norm", "bias", "qkv_bias", "d_shared"):
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
    """Draw all weights anew, as ``initialize_weights`` does, and scale them for muP."""
    scales = mup_scales(model, base)
    initialize_weights(model, model.config.n_layers)
    for name, parameter in model.named_parameters():
        parameter.mul_(scales[name].init)


# %% tags=["engine"]
#| export
def mup_groups(
    model: TransformerLM,
    base: ModelConfig,
    learning_rate: int | float,
    weight_decay: int | float = 0.1,
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


# %% [markdown]
# ### Coordinate check
#
# A slip in one of the scales is easily made and hard to see, because the model still trains. The
# **coordinate check** finds it in seconds: train models of several widths for a few steps and see
# how far the outputs have moved. Under muP the distance must not depend on the width.


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
    print(f"{width:5}   {moved[width][0]:8.0f}   {moved[width][1]:3.0f}")
assert moved[256][0] > 2 * moved[32][0] and moved[256][1] < 1.5 * moved[32][1]

# %% [markdown]
# The check is necessary, and not sufficient: the users of the reference implementation report
# models that pass it and whose best rate still moves (microsoft/mup, issues 22, 71 and 73). What
# counts is the right half of {numref}`fig-scaling-transfer`, so draw the curves before you trust a
# transfer.
#
# And look at the heights of the minima, which few reports show:

# %%
for method in ("standard", "mup"):
    found = [minimum(method, width) for width in (32, 64, 128, 256)]
    print(f"{method:8}  best exponent:", "  ".join(f"{rate:.1f}" for rate, _ in found))
    print("              its loss:", "  ".join(f"{loss:4.2f}" for _, loss in found))

# %% [markdown]
# (Exponents are those of 2, from a parabola through the three lowest points of each curve.) The
# best rate of the standard parametrization falls by a factor of 14 as the width grows by 8; that
# of muP by 1.2. At the two larger widths the standard parametrization *at its own best rate*
# reaches the lower loss, by about 0.07 nats; at the smaller ones seeds differ by as much as the
# methods. muP does not make a model better here, it makes its rate predictable. Where one can try
# six rates at the full width, that is not worth its price. Where one can try a single rate, it
# is.
#
# ### What Muon changes
#
# Muon's step is a matrix whose singular values are all 1 ({doc}`12_optimization`). It moves an
# output by the same amount whatever the width, without any factor: a unit vector comes out with
# length 1. So the width should drop out. Whether it does depends on a convention that hides in an
# option. Torch's `"original"` multiplies the step by $\sqrt{\max(1, \text{rows}/\text{columns})}$,
# a constant for matrices that keep their shape. Its `"match_rms_adamw"` multiplies it by
# $0.2\sqrt{\max(\text{rows}, \text{columns})}$, so that entries move as far as with Adam; that is
# convenient, because AdamW's rate and decay can be kept {cite}`liu2025muon`, and it brings the
# $\sqrt n$ back.

# %% mystnb={"figure": {"caption": "Muon for the matrices of the blocks, AdamW with fixed, width-scaled rates for the rest. Loss over Muon's rate, in the two conventions.", "name": "fig-scaling-muon"}, "image": {"alt": "Two panels with three U-shaped curves each, for widths 32, 64 and 128, with their minima marked."}}
titles = {"muon_original": "original", "muon_match_rms": "match_rms_adamw"}
draw_curves(titles, (32, 64, 128))
for method in titles:
    found = [minimum(method, width)[0] for width in (32, 64, 128)]
    print(f"{method:14}  best exponent:", "  ".join(f"{rate:.1f}" for rate in found))

# %% [markdown]
# From width 32 to 128, the best exponent falls by 0.6 under the original rule, and by 1.5 under
# the other. The difference is a factor of two as the width grows by four, which is the $\sqrt n$
# of the second formula. Neither stands quite still, so these are hints and no law. But a rate of
# Muon means nothing without its convention: the same number is off by a factor of $0.2 \sqrt n$,
# about 13 for a width of 4,096 (pytorch/pytorch, issue 160213). {doc}`12_optimization` uses the
# second.
#
# Muon is for matrices between hidden vectors only. Tables have rows that belong to tokens, and rare
# rows should not move as far as frequent ones; the head's output is not a hidden vector. Both go to
# AdamW, with the scales of the table above, and a library that orthogonalizes everything with two
# dimensions gets it wrong in silence (DeepSpeed, issue 7641). In the figure, that is all of muP
# that is left for us to do, and nanochat reports the same for its models (karpathy/nanochat, issue
# 644).
#
# ## Batch size
#
# Twice the batch costs twice the examples per step. At first it saves half of the steps, and at
# some size it saves nothing. Where is the turn? Let $g_i$ be the gradient of the loss of row $i$,
# with mean $G$ and covariance $\Sigma$. The gradient $G_B$ of a batch of $B$ rows has mean $G$ and
# covariance $\Sigma / B$. A step of length $\epsilon$ along it changes the loss, to second order
# with curvature $H$, by
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
# For $B \ll B_{\text{noise}}$ the gain of a step is proportional to $B$, so examples are used as
# well as they can be. For $B \gg B_{\text{noise}}$ a larger batch gains nothing. At $B =
# B_{\text{noise}}$ a run takes twice the fewest steps and twice the fewest examples: this is the
# **critical batch size**. $H$ is not at hand, but if it is about the same in all directions it
# cancels, and what is left is the **simple noise scale** $\operatorname{tr}\Sigma / |G|^2$
# {cite}`mccandlish2018empirical`.
#
# Its two parts follow from squared lengths at two batch sizes, $b < B$. Since $\mathbb{E}|G_b|^2 =
# |G|^2 + \operatorname{tr}\Sigma / b$, and the same for $B$, we have two linear equations with two
# unknowns:
#
# $$\widehat{|G|^2} = \frac{B |G_B|^2 - b |G_b|^2}{B - b}, \qquad
# \widehat{\operatorname{tr}\Sigma} = \frac{|G_b|^2 - |G_B|^2}{1/b - 1/B}.$$
#
# Both are unbiased, because they are linear in the two squares. Their ratio is not, so average each
# of them before you divide.
#
# We measure it on a model of width 64 at three moments of its training. Small batches have 2 rows,
# large ones consist of 16 small ones, so one pass over 80 small batches gives both lengths.

# %% [markdown] tags=["engine"]
# ### Engine room: an estimate from sums, so that rows of unequal length count right

# %% [markdown] tags=["engine"]
# A batch with more tokens should not weigh more than its number of rows. So we take gradients of
# the *sum* over tokens, which is a sum over rows, and divide by the mean number of tokens of a row
# at the end. The large batch is the sum of its small ones, and costs nothing.


# %% tags=["engine"]
#| export
class NoiseScale(NamedTuple):
    """The parts of a gradient's squared length, and the batch size at which they are equal."""

    signal: float  # of the mean gradient G: its squared length
    noise: float  # of one example: the trace of the covariance

    @property
    def batch_size(self) -> float:
        """The simple noise scale, in examples; infinite where the noise drowns the signal."""
        return self.noise / self.signal if self.signal > 0 else math.inf


# %% tags=["engine"]
#| export
def noise_scale(
    small_square: int | float, big_square: int | float, small: int | float, big: int | float
) -> NoiseScale:
    """Return signal and noise from the mean squared lengths of gradients at two batch sizes.

    Source: McCandlish et al. (2018), appendix A.1.

    >>> noise_scale(5.0, 2.0, 1, 4)  # 1 + 4 / 1 and 1 + 4 / 4
    NoiseScale(signal=1.0, noise=4.0)
    """
    _check_positive(small=small, big=big)
    for name, value in (("small_square", small_square), ("big_square", big_square)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value!r:.60}")
    if not small < big:
        raise ValueError(f"big: expected more than small = {small}, got {big}")
    signal = (big * big_square - small * small_square) / (big - small)
    return NoiseScale(signal, (small_square - big_square) / (1 / small - 1 / big))


# %% tags=["engine"]
#| export
def _square(tensors: Iterable[torch.Tensor]) -> float:
    return math.fsum(float(t.double().square().sum()) for t in tensors)


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
            pairs = zip(parameters, grads, strict=True)
            found = [torch.zeros_like(p) if g is None else g for p, g in pairs]
            small.append(_square(found))
            torch._foreach_add_(sums, found)
        big.append(_square(sums))
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
for step in range(81):
    if step in (0, 10, 80):
        pairs = (some_rows(data, row, 2) for row in range(0, 160, 2))
        scales.append(gradient_noise(model, pairs, group=16).batch_size)
        print(f"after {step:2} steps: about {2 ** round(math.log2(scales[-1]))} rows")
    take_step(model, optimizer, some_rows(data, 8 * step, 8))
assert 2 < scales[0] < scales[2] < 100

# %% [markdown]
# At the start a handful of rows agree on where to go: make frequent tokens likely, all others
# unlikely. The noise scale grows as the easy part of the gradient is used up. (A row has about 60
# tokens.) Hence the large runs that begin with small batches and enlarge them, such as Llama 3
# 405B, which went from 4 to 16 million tokens {cite}`grattafiori2024llama3`. It also grows with
# better models, as the loss falls: {cite:t}`kaplan2020scaling` fitted $B_{\text{crit}} = 2 \cdot
# 10^8 / L^{4.8}$ tokens at a loss of $L$ nats, which is 0.3 million at $L = 4$ and 3 million at
# 2.5. These are the batches of the checklists below.
#
# Take the number for what it is. The derivation is for a plain gradient step at its best length;
# Adam divides by the noise, and its rate should grow with $\sqrt B$ rather than $B$ while $B$ is
# small. The scale tells the order of magnitude of a batch, at the cost of a few gradients.
#
# ## Annealing and data mixtures
#
# A tenth or a quarter of the data is often better than the rest: proofread, on the subject, in the
# right language. Where should it go? Reports put it at the end, where the rate decays, and call it
# annealing or mid-training {cite}`hu2024minicpm,grattafiori2024llama3,olmo2024olmo2`. Our test has
# two worlds. Three quarters of all steps show stories of *another* tiny world, with other
# characters and facts; one quarter shows the world that we will be tested on. Each arm sees the
# same number of rows of each, for the same number of steps, with the same schedule. Only the order
# differs:

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
        shown = [round(x, 1) + 0.0 for x in (found.estimate, found.low, found.high)]
        print("ours {:5}: gain on {:5} {:+} ({:+} to {:+})".format(order, name, *shown))

# %% [markdown]
# The order matters. With our world *first*, a model has half forgotten it at the end. With our
# world *last* it does better on our world than with a mixture, but the gain is small beside what is
# lost on the other world, and with three seeds it is not certain. The reason to anneal here is that
# the target is known: of two losses that move against each other, the order chooses one. A team
# that is judged on the good data will anneal on it; its report should show the loss on the rest,
# too. Where the two kinds of data do not contradict each other as our worlds do, the price is
# lower.
#
# **Mixtures** are the same choice without an order. The share of a source has a loss of its own for
# every share, and an optimum can be fitted on small models and used on large ones, with the same
# caution as a learning rate. {cite:t}`ye2024mixing` choose the mixture for a model of a billion
# parameters by fits to smaller runs, and Llama 3 was made in the same way
# {cite}`grattafiori2024llama3`.
#
# ## The cost of a run
#
# A training run is a number of operations. If $N$ parameters meet each of $D$ tokens, it is about
# $6ND$, and attention adds a little ({doc}`11_model`). A device has a peak of $P$ operations a
# second, of which a run reaches a share $u$, the model FLOPs utilization (MFU). From that follow
# the hours of all devices together, and from the hours energy and price:
#
# $$h = \frac{C}{3600\, P u}, \qquad
# \text{energy} = h \cdot \text{power} \cdot \text{PUE}, \qquad
# \text{price} = h \cdot \text{price of an hour}.$$
#
# PUE, the power usage effectiveness, is what the building takes for each watt of a device: 1.1 in
# good data centers {cite}`patterson2021carbon`. That is all of
# {py:func}`~llmbook.scaling.estimate_run`. The only guess in it is $u$.

# %% [markdown] tags=["engine"]
# ### Engine room: devices as data, published runs as data, and what a guess leaves out

# %% [markdown] tags=["engine"]
# Peaks are those of dense products in 16 bits. Data sheets print twice as much, "with sparsity",
# which training does not use. Power is the limit of the device alone. Processors, network and disks
# of a server are not in it, nor are experiments and failed runs: for the OLMo models, development
# took half as much again as the runs that were released {cite}`morrison2025holistically`. The price
# of an hour is the two dollars that {cite:t}`deepseek2024v3` assume, and emissions are 0.42 kg a
# kWh, which is what Meta's reports come to.


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class Hardware:
    """A device to train on."""

    peak_flops: int | float  # operations a second in dense 16-bit products
    memory: int | float  # bytes
    power: int | float  # watts, at most
    source: str = ""

    def __post_init__(self) -> None:
        _check_positive(peak_flops=self.peak_flops, memory=self.memory, power=self.power)
        check_text(self.source, "source")


# %% tags=["engine"]
#| export
#: Devices by name, as their makers describe them.
HARDWARE = {
    "v100": Hardware(125e12, 32e9, 300, "NVIDIA V100 SXM2 data sheet (2020)"),
    "a100": Hardware(312e12, 80e9, 400, "NVIDIA A100 80GB SXM data sheet (2021)"),
    "h100": Hardware(989e12, 80e9, 700, "NVIDIA H100 SXM data sheet (2023), without sparsity"),
    "h800": Hardware(989e12, 80e9, 700, "as the H100, with slower links"),
    "h200": Hardware(989e12, 141e9, 700, "NVIDIA H200 SXM data sheet (2024), without sparsity"),
    "b200": Hardware(2250e12, 180e9, 1000, "NVIDIA HGX B200 data sheet (2025), without sparsity"),
    "rtx4090": Hardware(165e12, 24e9, 450, "NVIDIA Ada architecture whitepaper (2023)"),
}


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class RunEstimate:
    """What a run takes. Hours are of all devices together, days of the calendar."""

    flops: float
    gpu_hours: float
    days: float
    state_bytes: float  # weights, gradients, Adam's two means and 16-bit copies
    least_devices: int  # whose memory holds the state
    energy_mwh: float
    dollars: float
    co2_tonnes: float


# %% tags=["engine"]
#| export
def estimate_run(
    model: ModelConfig | int | float,
    tokens: int | float,
    *,
    hardware: str | Hardware = "h100",
    n_devices: int = 8,
    mfu: int | float = 0.4,
    total_parameters: int | float | None = None,
    sequence: int | None = None,
    price: int | float = 2.0,
    pue: int | float = 1.1,
    carbon: int | float = 0.42,
) -> RunEstimate:
    """Return what training ``model`` on so many ``tokens`` takes, on any number of devices.

    ``model`` is a configuration, or a number of parameters that each token meets; then operations
    are 6 for each of them and each token, and ``total_parameters`` may be more, for experts.
    ``mfu`` is the share of the peak that is reached, ``price`` dollars for an hour of a device,
    ``pue`` what the building takes for each watt, ``carbon`` kilograms of CO2 for a kWh. Not
    counted are activations (see ``memory_breakdown``), the rest of a server, failures, and all runs
    before this one. Sources: Kaplan et al. (2020), section 2.1; Patterson et al. (2021).

    >>> run = estimate_run(7e9, 2e12, hardware="a100", n_devices=1024)
    >>> round(run.gpu_hours), round(run.days, 1), run.least_devices
    (186966, 7.6, 2)
    """
    if isinstance(hardware, str):
        check_choice("hardware", hardware, tuple(HARDWARE))
        hardware = HARDWARE[hardware]
    check_whole("n_devices", n_devices, 1)
    check_at_least(sequence=(1, sequence))
    _check_positive(tokens=tokens, mfu=mfu, price=price, pue=pue, carbon=carbon)
    if mfu > 1:
        raise ValueError(f"mfu: expected a share of the peak, at most 1, got {mfu}")
    if isinstance(model, ModelConfig):
        per_token, n_parameters = flops_per_token(model, sequence), float(count_parameters(model))
    else:
        _check_positive(model=model)
        per_token, n_parameters = 6.0 * model, float(model)
    if total_parameters is not None:
        _check_positive(total_parameters=total_parameters)
        n_parameters = float(total_parameters)
    hours = per_token * tokens / (hardware.peak_flops * mfu) / 3600
    state, energy = 18 * n_parameters, hours * hardware.power * pue / 1e6
    needed = math.ceil(state / hardware.memory)
    costs = energy, hours * price, energy * carbon
    return RunEstimate(per_token * tokens, hours, hours / n_devices / 24, state, needed, *costs)


# %% tags=["engine"]
#| export
class PublishedRun(NamedTuple):
    """A run, and what its authors report."""

    model: ModelConfig | int | float  # or parameters that a token meets
    tokens: int | float
    hardware: str
    gpu_hours: int | float | None
    energy_mwh: int | float | None  # of devices and building
    source: str


def _llama(vocabulary: int, *sizes: int, length: int = 8192) -> ModelConfig:
    width, layers, heads, kv_heads, d_ff = sizes
    return ModelConfig(
        vocab_size=vocabulary,
        context_length=length,
        d_model=width,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=d_ff,
    )


_GPT3 = ModelConfig.preset("gpt2", d_model=12_288, n_layers=96, n_heads=96, context_length=2048)
_LLAMA2_70B = _llama(32_000, 8192, 80, 64, 8, 28_672, length=4096)
_LLAMA3_405B = _llama(128_256, 16_384, 126, 128, 8, 53_248)
_OLMO2_7B = _llama(100_352, 4096, 32, 32, 32, 11_008, length=4096)
_CARD = "the model card"

# %% tags=["engine"]
#| export
#: Runs whose authors report hours or energy. GPT-3: Patterson et al., table 4: 14.8 days on 10,000.
PUBLISHED = {
    "GPT-3 175B": PublishedRun(_GPT3, 300e9, "v100", 3.55e6, 1287, "patterson2021carbon"),
    "Llama 2 7B": PublishedRun(
        ModelConfig.preset("llama2-7b"), 2e12, "a100", 184_320, None, "touvron2023llama2"
    ),
    "Llama 2 70B": PublishedRun(_LLAMA2_70B, 2e12, "a100", 1.72e6, None, "touvron2023llama2"),
    "Llama 3 8B": PublishedRun(
        ModelConfig.preset("llama3-8b"), 15e12, "h100", 1.3e6, None, "meta2024llamamodels"
    ),
    "Llama 3 70B": PublishedRun(
        ModelConfig.preset("llama3-70b"), 15e12, "h100", 6.4e6, None, "meta2024llamamodels"
    ),
    "Llama 3.1 405B": PublishedRun(
        _LLAMA3_405B, 15.6e12, "h100", 30.84e6, None, "meta2024llamamodels"
    ),
    "DeepSeek-V3": PublishedRun(37e9, 14.8e12, "h800", 2.664e6, None, "deepseek2024v3"),
    "OLMo 2 7B": PublishedRun(_OLMO2_7B, 4.05e12, "h100", None, 157, "olmo2024olmo2"),
}


# %% [markdown]
# ### Estimated and reported
#
# With the same guess of 40 % for all:

# %%
print("run             FLOPs     hours   estimated  ratio  MFU that would fit")
ratios = {}
for name, run in PUBLISHED.items():
    guess = estimate_run(run.model, run.tokens, hardware=run.hardware)
    if run.gpu_hours:
        ratio = ratios[name] = guess.gpu_hours / run.gpu_hours
        hours = f"{run.gpu_hours / 1e3:7,.0f}k  {guess.gpu_hours / 1e3:8,.0f}k"
        print(f"{name:14}  {guess.flops:.1e} {hours}   {ratio:.2f}   {0.4 * ratio:.2f}")
assert all(0.3 < ratio < 1.2 for ratio in ratios.values())

# %% [markdown]
# Llama 2 did a little better than we guessed. All others took longer, Llama 3 8B twice as long,
# and each for a reason of its own. GPT-3 ran on older devices, where a fifth of the peak was good.
# The 8B model is the same story at the other end: a device so fast, on a model so small, waits for
# memory and network, and its MFU cannot be guessed from one that is ten times as large.
# DeepSeek-V3 computes in 8 bits, twice as fast at its peak, but on thin experts. The hours of model
# cards also contain restarts, evaluations and long contexts. (The sources are
# {cite:t}`patterson2021carbon`, {cite:t}`touvron2023llama2`, {cite:t}`meta2024llamamodels`,
# {cite:t}`deepseek2024v3` and {cite:t}`olmo2024olmo2`.)
#
# So 40 % is what a good team reaches on a dense model that is large enough, and a first estimate is
# better made with 25 %. In our table it would have been right to a factor of two, which is enough
# to choose between runs. The energy, where it was reported:

# %%
for name, run in PUBLISHED.items():
    if run.energy_mwh:
        hours = run.gpu_hours or math.nan
        guess = estimate_run(run.model, run.tokens, hardware=run.hardware).energy_mwh
        text = f"{name:10} reported {run.energy_mwh:5,.0f} MWh, estimated {guess:4,.0f}"
        print(text, f"(ratio {guess / run.energy_mwh:.1f})")

# %% [markdown]
# The same functions answer for any configuration, before there is a model.
# {py:func}`~llmbook.scaling.info` collects what {doc}`11_model` and {doc}`15_precision` count:


# %% tags=["engine"]
#| export
# What a configuration comes to
def info(config: ModelConfig, sequence: int | None = None) -> dict[str, int | float]:
    """Return the sizes of a model of this configuration by name; nothing is allocated.

    Bytes of weights and cache are for 16 bits, those of the training state for AdamW in mixed
    precision; the cache is that of one row of ``sequence`` tokens, by default ``context_length``.
    """
    if not isinstance(config, ModelConfig):
        raise ValueError(f"config: expected a ModelConfig, got {config!r:.60}")
    check_at_least(sequence=(1, sequence))
    sequence = config.context_length if sequence is None else sequence
    total, inner = count_parameters(config), count_parameters(config, embeddings=False)
    return {
        "parameters": total,
        "active parameters": count_parameters(config, active=True),
        "without embeddings": inner,
        "flops per token, forward": flops_per_token(config, sequence, training=False),
        "flops per token, training": flops_per_token(config, sequence),
        "bytes of weights": 2 * total,
        "bytes of training state": 18 * total,
        "bytes of cache": cache_bytes(config, 1, sequence),
        "tokens at 20 per parameter": 20 * total,
    }


# %%
for name, value in info(ModelConfig.preset("llama3-8b")).items():
    print(f"{name:27} {value:.3g}")

# %% [markdown]
# ## Hyperparameter checklists
#
# What nobody can tune at full size is copied, and should be copied from somewhere.
# {py:func}`~llmbook.scaling.hyperparameter_checklist` has a list for pretraining at five sizes, for
# tuning (all weights, or LoRA), for preference optimization, and for reinforcement learning. Every
# row has a value with its source, and a range. The range is *safe* in one sense: published runs
# that worked lie at both of its ends, and their sources stand in the row. Outside, you are on your
# own, which may be right; but it should be on purpose.

# %% [markdown] tags=["engine"]
# ### Engine room: the lists as data, a page made from them, and a comparison with a configuration

# %% [markdown] tags=["engine"]
# A row is a name, a value, the two ends of the range and the sources, as keys of the bibliography.
# Batches of pretraining count tokens, those of tuning rows; warmup is a share of the steps.


# %% tags=["engine"]
#| export
class Setting(NamedTuple):
    """One row of a checklist; sources are keys of the bibliography, or chapters of this book."""

    name: str
    value: float
    low: float
    high: float
    sources: tuple[str, ...]  # the first has the value, all together the range


CHECKLISTS: dict[str, list[Setting]] = {}
#: The parameters of the sizes that checklists of pretraining are for.
SIZES = {"10M": 10e6, "124M": 124e6, "1B": 1e9, "7B": 7e9, "70B": 70e9}


def _rows(scale: str, rows: str) -> None:
    """Add rows from a text: name, value, low, high and sources on each line."""
    for line in filter(None, map(str.split, rows.splitlines())):
        value, low, high = map(float, line[1:4])
        CHECKLISTS.setdefault(scale, []).append(Setting(line[0], value, low, high, tuple(line[4:])))


for _scale in SIZES:
    _rows(
        _scale,
        """
        weight_decay  0.1   0.01 0.1   brown2020gpt3 biderman2023pythia
        beta1         0.9   0.9  0.9   brown2020gpt3
        beta2         0.95  0.95 0.999 brown2020gpt3 kingma2015adam
        clip_norm     1.0   1.0  1.0   brown2020gpt3
        final         0.1   0    0.1   touvron2023llama2 bergsma2025straight
        z_loss        1e-5  0    1e-4  olmo2024olmo2 brown2020gpt3 chowdhery2023palm
        """,
    )

# %% tags=["engine"]
#| export
_rows(
    "10M",
    """
    learning_rate        1e-3   6e-4 6e-3   biderman2023pythia brown2020gpt3 dey2023cerebras
    batch_tokens         131072 2048 524288 kaplan2020scaling 13_training brown2020gpt3
    warmup_share         0.01   0.00125 0.17 biderman2023pythia brown2020gpt3 dey2023cerebras
    tokens_per_parameter 20     20   4286   hoffmann2022training biderman2023pythia
    """,
)
_rows(
    "124M",
    """
    learning_rate        6e-4   3e-4 6e-3    brown2020gpt3 biderman2023pythia dey2023cerebras
    batch_tokens         524288 245760 2097152 brown2020gpt3 dey2023cerebras biderman2023pythia
    warmup_share         0.01   0.00125 0.17 biderman2023pythia brown2020gpt3 dey2023cerebras
    tokens_per_parameter 20     20   2400    hoffmann2022training brown2020gpt3
    """,
)
_rows(
    "1B",
    """
    learning_rate        3e-4    2e-4 4e-4   biderman2023pythia brown2020gpt3 zhang2024tinyllama
    batch_tokens         2097152 1048576 4194304 zhang2024tinyllama brown2020gpt3 groeneveld2024olmo
    warmup_share         0.01    0.00125 0.0144 biderman2023pythia brown2020gpt3 dey2023cerebras
    tokens_per_parameter 20      20   2727   hoffmann2022training zhang2024tinyllama
    """,
)

# %% tags=["engine"]
#| export
_rows(
    "7B",
    """
    learning_rate        3e-4    1.2e-4 4.2e-4 touvron2023llama2 brown2020gpt3 bi2024deepseek
    batch_tokens         4194304 2097152 9437184 touvron2023llama2 brown2020gpt3 bi2024deepseek
    warmup_share         0.004   0.00125 0.01  touvron2023llama2 brown2020gpt3 biderman2023pythia
    tokens_per_parameter 20      20   1875     hoffmann2022training meta2024llamamodels
    """,
)
_rows(
    "70B",
    """
    learning_rate        1.5e-4  6e-5 3.2e-4  touvron2023llama2 brown2020gpt3 bi2024deepseek
    batch_tokens         4194304 3145728 18874368 touvron2023llama2 brown2020gpt3 bi2024deepseek
    warmup_share         0.004   0.00125 0.01 touvron2023llama2 brown2020gpt3 biderman2023pythia
    tokens_per_parameter 20      1.7  214     hoffmann2022training brown2020gpt3 meta2024llamamodels
    """,
)
# %% tags=["engine"]
#| export
_rows(
    "sft",
    """
    learning_rate 5e-6 2e-6 2e-5 lambert2024tulu3 touvron2023llama2
    batch_rows    128  64   128  lambert2024tulu3 touvron2023llama2
    epochs        2    2    3    lambert2024tulu3 taori2023alpaca
    warmup_share  0.03 0    0.03 lambert2024tulu3 touvron2023llama2
    weight_decay  0    0    0.1  lambert2024tulu3 touvron2023llama2
    """,
)

# %% tags=["engine"]
#| export
_rows(
    "lora",
    """
    learning_rate 2e-4 1e-4 5e-4 dettmers2023qlora schulman2025lora
    rank          64   1    512  dettmers2023qlora schulman2025lora
    alpha         16   16   32   dettmers2023qlora schulman2025lora
    dropout       0.1  0    0.1  dettmers2023qlora schulman2025lora
    batch_rows    16   16   64   dettmers2023qlora
    """,
)
_rows(
    "dpo",
    """
    learning_rate 5e-7 2e-7 1e-6 lambert2024tulu3 rafailov2023direct
    beta          0.1  0.1  0.5  rafailov2023direct
    batch_rows    64   64   128  rafailov2023direct lambert2024tulu3
    epochs        1    1    1    lambert2024tulu3
    warmup_share  0.1  0.1  0.1  lambert2024tulu3
    """,
)
# %% tags=["engine"]
#| export
_rows(
    "ppo",
    """
    learning_rate 3e-7 1e-7 1e-5 lambert2024tulu3 ouyang2022training
    clip_range    0.2  0.1  0.3  schulman2017proximal ouyang2022training
    kl_weight     0.05 0.01 0.1  lambert2024tulu3
    gae_lambda    0.95 0.95 0.95 schulman2017proximal lambert2024tulu3
    batch_rows    512  224  640  ouyang2022training lambert2024tulu3
    """,
)
_rows(
    "grpo",
    """
    learning_rate 1e-6  1e-6 3e-6 shao2024deepseekmath yu2025dapo deepseek2025r1
    group_size    16    16   64   deepseek2025r1 yu2025dapo shao2024deepseekmath
    clip_range    0.2   0.2  0.28 yu2025dapo
    kl_weight     0.001 0    0.04 deepseek2025r1 yu2025dapo shao2024deepseekmath
    temperature   1.0   1.0  1.0  deepseek2025r1 yu2025dapo
    """,
)


# %% tags=["engine"]
#| export
def hyperparameter_checklist(scale: str | int | float) -> dict[str, Setting]:
    """Return the settings for a ``scale`` by name: the value, its safe range, and their sources.

    ``scale`` is one of ``SIZES``, or a number of parameters, which means the size that is nearest
    in the logarithm; or "sft", "lora", "dpo", "ppo" or "grpo", for models of about 7 billion. A
    range ends at values of published runs that worked, not where training begins to fail.

    >>> setting = hyperparameter_checklist("7B")["learning_rate"]
    >>> setting.low, setting.value, setting.high
    (0.00012, 0.0003, 0.00042)
    """
    return {setting.name: setting for setting in CHECKLISTS[_name_of(scale)]}


# %% tags=["engine"]
#| export
def _name_of(scale: str | int | float) -> str:
    """Return the name of a list; that of the nearest size, for a number of parameters."""
    if isinstance(scale, str | bool):
        check_choice("scale", scale, tuple(CHECKLISTS))
        return str(scale)
    _check_positive(scale=scale)
    number = float(scale)
    return min(SIZES, key=lambda name: abs(math.log(SIZES[name] / number)))


# %% tags=["engine"]
#| export
def _shown(value: int | float) -> str:
    return f"{value:,.0f}" if 1000 <= value < math.inf else f"{value:.4g}"


# %% tags=["engine"]
#| export
def checklist_table(scale: str | int | float) -> str:
    """Return a checklist as a table in Markdown, with citations in MyST's syntax."""
    lines = ["| setting | value | safe range | sources |", "|---|---|---|---|"]
    for s in hyperparameter_checklist(scale).values():
        chapters = [f"{{doc}}`{key}`" for key in s.sources if key[0].isdigit()]
        papers = ",".join(key for key in s.sources if not key[0].isdigit())
        cited = ", ".join([f"{{cite:t}}`{papers}`" * bool(papers), *chapters])
        name, span = s.name.replace("_", " "), f"{_shown(s.low)} to {_shown(s.high)}"
        lines.append(f"| {name} | {_shown(s.value)} | {span} | {cited} |")
    return "\n".join(lines) + "\n"


# %% tags=["engine"]
#| export
_WHERE = {"lora": "LoRA", "sft": "Tuning of all weights", "dpo": "Preferences: DPO"}
_WHERE |= {"ppo": "Reinforcement learning: PPO", "grpo": "Reinforcement learning: GRPO"}


def checklist_page() -> str:
    """Return the page of all checklists, in MyST's Markdown, as it stands in the book."""
    parts = [
        "# Checklists\n",
        "Settings to begin with, from {doc}`17_scaling`. The first source of a row has its value; "
        "all of them together have the ends of its range, so that a published run lies at each. "
        "Beyond is not wrong, but it should be on purpose. This page is made by "
        "{py:func}`~llmbook.scaling.checklist_page`; "
        "{py:func}`~llmbook.scaling.check_config` compares a configuration with it.\n",
        "Batches of pretraining are in tokens, those of tuning in rows. Warmup is a share of all "
        "steps, and final a share of the peak rate. Rates are those of AdamW.\n",
    ]
    for scale in CHECKLISTS:
        title = _WHERE.get(scale, f"Pretraining at {scale} parameters")
        parts.append(f"## {title}\n\n{checklist_table(scale)}")
    return "\n".join(parts)


# %% tags=["engine"]
#| export
def check_config(
    model: ModelConfig, training: TrainingConfig, *, scale: str | int | float | None = None
) -> list[str]:
    """Return a warning for each setting of a pretraining run that departs from its checklist.

    ``scale`` is that of ``hyperparameter_checklist``, by default the size of the model. Rates are
    compared for AdamW only, as those of other optimizers mean something else.

    >>> tiny = ModelConfig.preset("gpt2")
    >>> run = TrainingConfig(n_steps=20_000, batch_size=512, learning_rate=0.1, warmup=200)
    >>> check_config(tiny, run)[0]
    'learning_rate: 0.1 is outside 0.0003 to 0.006 (of published runs at 124M); begin with 0.0006'
    """
    for name, value, kind in (
        ("model", model, ModelConfig),
        ("training", training, TrainingConfig),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{name}: expected a {kind.__name__}, got {value!r:.60}")
    n_parameters = count_parameters(model, active=True)
    where = _name_of(n_parameters if scale is None else scale)
    checklist = hyperparameter_checklist(where)
    tokens = training.batch_size * model.context_length
    values = {
        "learning_rate": training.learning_rate if training.optimizer == "adamw" else None,
        "batch_tokens": tokens,
        "batch_rows": training.batch_size,
        "warmup_share": training.warmup / training.n_steps,
        "tokens_per_parameter": training.n_steps * tokens / n_parameters,
        "weight_decay": training.weight_decay,
        "beta1": training.betas[0],
        "beta2": training.betas[1],
        "clip_norm": training.clip_norm or math.inf,
        "final": training.final if training.schedule != "constant" else 1.0,
        "z_loss": training.z_loss,
    }
    found = [(setting, values.get(name)) for name, setting in checklist.items()]
    return [
        f"{s.name}: {_shown(value)} is outside {_shown(s.low)} to {_shown(s.high)} "
        f"(of published runs at {where}); begin with {_shown(s.value)}"
        for s, value in found
        if value is not None and not s.low * (1 - 1e-9) <= value <= s.high * (1 + 1e-9)
    ]


# %% [markdown]
# ### The list for 7 billion

# %%
for setting in hyperparameter_checklist("7B").values():
    numbers = setting.value, setting.low, setting.high
    shown = [f"{x:,.0f}" if x >= 1000 else f"{x:g}" for x in numbers]
    print(f"{setting.name:21} {shown[0]:>9}   safe from {shown[1]} to {shown[2]}")

# %% [markdown]
# All lists, with their sources, are on one page of the book: {doc}`checklists`. It is made from the
# same table, so the two cannot drift apart. Notice how little changes from size to size. Rates fall
# and batches grow; decay, momentum, clipping and the end of the schedule are the same everywhere,
# which says that they matter little, or that nobody dares to change them.
#
# {py:func}`~llmbook.scaling.check_config` reads the list for you. Here it looks at a run whose
# author copied the settings of the tiny model of {doc}`13_training` to one of GPT-2's size:

# %%
gpt2 = ModelConfig.preset("gpt2")
copied = TrainingConfig(n_steps=2200, batch_size=8, learning_rate=0.01, weight_decay=0.0, warmup=50)
for warning in check_config(gpt2, copied):
    print(warning.split(" (of")[0])

# %% [markdown]
# ## A log of negative results
#
# What did not work is seldom printed, so it is tried again. These are the book's own, each with the
# place where its numbers stand. They hold for small models and short runs, like everything here.
#
# | we expected | we found | where |
# |---|---|---|
# | learned positions to be as good as rotary ones | a table of vectors is behind even after 300 steps | {numref}`fig-positions-training` |
# | gated feed-forward layers to win | ahead after 80 steps with every seed, within the noise after 120 | {numref}`fig-blocks-kinds` |
# | RMSNorm to differ from LayerNorm | no difference in the loss | {doc}`10_blocks` |
# | a likelier story to be a better one | beam search finds stories likelier than real ones, and all alike | {doc}`14_generation` |
# | speculative decoding and 8-bit weights to be faster | both are slower for a small model on a processor | {doc}`14_generation` |
# | stochastic rounding to save Adam's second mean | no difference in 60 steps, a small one in 600 | {doc}`15_precision` |
# | a compiler to make training much faster | 8 to 24 % on a processor, and hundreds of steps to pay for itself | {doc}`15_precision` |
# | a way to scale 8-bit numbers to stand out | three seeds cannot tell the ways apart | {doc}`15_precision` |
# | the majority of many answers to help | a few points, while pass@k rises to nearly 1 | {numref}`fig-evaluation-attempts` |
# | a reworded exam in the training text to be harmless | it did as much harm as one or two copies | {doc}`16_evaluation` |
# | muP to improve the loss | at the best rate of widths 128 and 256 it is behind by 0.07 nats | {numref}`fig-scaling-transfer` |
# | Muon's rate to stay, by its original rule | it falls a little with the width | {numref}`fig-scaling-muon` |
# | annealing on good data to be free | a small gain on it, and a larger loss on the rest | above |
#
# ## Exercises
#
# ````{exercise} Half the steps?
# :label: ex-scaling-batch
# *Ten minutes.* A run with batches of `batch` rows has a noise scale of `noise` rows. With batches
# so large that noise does not matter it would need `least_steps`. Write `steps_and_rows(batch,
# noise, least_steps)`, which returns how many steps it needs, and how many rows it reads, from the
# gain of a step in the section on batch size.
# ````


# %% tags=["solution"]
def steps_and_rows(batch: float, noise: float, least_steps: float) -> tuple[float, float]:
    """The steps of a run, and the rows that it reads."""
    steps = least_steps * (1 + noise / batch)
    return steps, steps * batch


# %% tags=["check"]
steps, rows = steps_and_rows(32, 32, 1000)
assert steps == 2000, "at the critical batch size a run needs twice the fewest steps"
assert rows == 64_000, "it reads its batch at each of its steps"
few, most = steps_and_rows(1e9, 32, 1000)
assert abs(few - 1000) < 1, "with an enormous batch, noise does not matter"
assert abs(steps_and_rows(1, 320, 1000)[1] - 321_000) < 1, "small batches use rows best"

# %% [markdown]
# ````{exercise} A rate for a wider model
# :label: ex-scaling-rate
# *Fifteen minutes.* Write `rate_for(name, shape, base_shape, rate)`: Adam's learning rate for one
# parameter of a wider model under muP, from its name, its shape, and its shape in the base model,
# where `rate` was tuned. All heads have the same width in both models. Names are those of
# `model.named_parameters()`; heads are not tied. The check compares with
# {py:func}`~llmbook.scaling.mup_scales`.
# ````


# %% tags=["solution"]
def rate_for(name: str, shape: tuple[int, ...], base_shape: tuple[int, ...], rate: float) -> float:
    """Adam's rate for a parameter, by the ratio of fan-ins."""
    if len(shape) == 1 or name == "embedding.weight":
        return rate
    return rate * base_shape[-1] / shape[-1]


# %% tags=["check"]
wide, narrow = (ModelConfig.preset("tiny", d_model=d, n_heads=d // 32) for d in (256, 64))
with torch.device("meta"):
    shapes = {n: p.shape for n, p in TransformerLM(narrow).named_parameters()}
    big = TransformerLM(wide)
answers = {
    n: rate_for(n, tuple(p.shape), tuple(shapes[n]), 0.01) for n, p in big.named_parameters()
}
assert answers["embedding.weight"] == 0.01, "looking up a row is a sum with one term"
assert answers["norm.weight"] == 0.01, "a gain multiplies entry by entry: its rate stays"
assert answers["lm_head.weight"] == 0.0025, "the head sums over the width, like any matrix"
down = "blocks.0.feed_forward.down_proj.weight"
wanted = 0.01 * shapes[down][1] / big.state_dict()[down].shape[1]
assert math.isclose(answers[down], wanted), "what counts is the number of terms: the columns"
for name, scale in mup_scales(big, narrow).items():
    assert math.isclose(answers[name], 0.01 * scale.rate), f"{name}: {answers[name]}"

# %% [markdown]
# ````{exercise} What a grant buys
# :label: ex-scaling-grant
# *Ten minutes.* You have so many dollars. Write `affordable_tokens(dollars, parameters)`, the
# number of tokens that a dense model can be trained on with H100s at 40 % of their peak and two
# dollars an hour. It is the inverse of {py:func}`~llmbook.scaling.estimate_run` with its defaults.
# `HARDWARE["h100"]` has the peak, as `peak_flops`, in operations a second.
# ````


# %% tags=["solution"]
def affordable_tokens(dollars: float, parameters: float) -> float:
    """The tokens that a budget pays for."""
    flops = dollars / 2.0 * 3600 * HARDWARE["h100"].peak_flops * 0.4
    return flops / (6 * parameters)


# %% tags=["check"]
assert affordable_tokens(1e4, 1e9) > 1e11, "an hour has 3600 seconds"
assert math.isclose(affordable_tokens(2e4, 1e9), 2 * affordable_tokens(1e4, 1e9)), "in proportion"
spent = estimate_run(1e9, affordable_tokens(1e4, 1e9)).dollars
assert math.isclose(spent, 1e4), f"that many tokens cost {spent:,.0f} dollars, not 10,000"

# %% [markdown]
# ## Summary
#
# - (From the first half.)
