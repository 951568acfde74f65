# %% [markdown]
# # Evaluation
#
# > Know whether a model got better: scores that can be compared, answers read as they were meant,
# > and an interval beside every number.
#
# Two models of the same architecture read the same hundred stories. The first has a
# {term}`perplexity` of 11, the second a perplexity of 23, and lower is better. Yet the second
# predicts the stories far better: with its help they can be written down in 1.1 bits per byte, and
# with the help of the first in 3.5. The two perplexities only look comparable: one is per byte, the
# other per token.
#
# Many reported numbers have such a trap in them. A score changes with the tokenizer, with a space
# at the end of the question, and with the place where a long text was cut. This chapter builds the
# measurements that later chapters rely on, and for each it looks for the trap. The first half turns
# log-probabilities into scores and asks how far chance can move them. The second half asks what a
# score is worth.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.evaluation.perplexity`, {py:func}`~llmbook.evaluation.bits_per_byte`, {py:func}`~llmbook.evaluation.check_causal`, {py:func}`~llmbook.evaluation.score_choices`, {py:func}`~llmbook.evaluation.parse_answer`, {py:func}`~llmbook.evaluation.pass_at_k`, {py:func}`~llmbook.evaluation.confidence_interval`, {py:func}`~llmbook.evaluation.paired_test`, {py:func}`~llmbook.evaluation.order_test`, {py:func}`~llmbook.evaluation.evaluate`, {py:class}`~llmbook.evaluation.EvaluationReport`, {py:func}`~llmbook.evaluation.calibration`, {py:func}`~llmbook.evaluation.bradley_terry`, {py:class}`~llmbook.evaluation.BiasedJudge`, {py:class}`~llmbook.evaluation.LMEvalAdapter` |
# | **You need** | training ({doc}`13_training`), generation ({doc}`14_generation`), bits per byte ({doc}`01_tinyworld`), means and variances |
# | **It takes** | 60 minutes for the main line, 4 hours for everything, 90 seconds to run |

# %% tags=["remove-cell"]
#| default_exp evaluation

# %% tags=["engine"]
#| export
# The imports of the module
import io
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path
from statistics import NormalDist
from typing import Any, get_args, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Num
from torch import nn, Tensor

# %% [markdown]
# ## Two models
#
# The two models of the opening have the same layers and train for the same 40 steps on the same
# stories of the tiny world:

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.batches import Tokenizer
from llmbook.environment import check_at_least, check_choice, check_fraction, check_path, check_text
from llmbook.environment import check_whole, requires_extra, whole_file
from llmbook.generation import Sampling, generate
from llmbook.model import TransformerLM
from llmbook.optimization import cross_entropy
from llmbook.tinyworld import ATTRIBUTES, DOINGS, OPENINGS, PHRASES, REPLY_DECLINED, REPLY_UNKNOWN
from llmbook.tinyworld import VALUES, WEATHER, Question, State, TinyWorld, judge_reply
from llmbook.tinyworld import make_questions
from llmbook.tokenizer import BPETokenizer, valid_text
from llmbook.training import random_states, set_random_states, unnoticed

# %% [markdown]
# One model reads bytes, the other the tokens of a BPE. All small models of this chapter come from
# `trained(tokenizer, length, n_steps, seed)`, which trains on `stories` with rows of `length`
# tokens. The hundred stories of the opening are `held_out`:

# %% tags=["engine"]
# The stories, and how a small model is trained on them
import random
import tempfile

import matplotlib.pyplot as plt

from llmbook.batches import BatchSampler, TokenShards, pack_documents, write_shards
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig
from llmbook.tokenizer import train_bpe
from llmbook.training import Trainer, TrainingConfig, documents_score, pretrained

plt.style.use("llmbook.book")
torch.set_num_threads(1)
world = TinyWorld()
stories = [story.text for story in world.stories(2000, 0)]
held_out = [story.text for story in world.stories(100, 1)]
folder = Path(tempfile.mkdtemp())


def trained(tokenizer: BPETokenizer, length: int, n_steps: int, seed: int = 0) -> TransformerLM:
    path = folder / str(tokenizer.vocab_size)
    if not path.exists():
        write_shards(stories, path, tokenizer)
    rows = pack_documents(TokenShards(path, tokenizer), length, "one_per_row")
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "context_length": length}
    rates = {"optimizer": "muon", "learning_rate": 0.01, "weight_decay": 0.0, "warmup": 10}
    seed_everything(seed)
    model = TransformerLM(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes))
    config = TrainingConfig(n_steps=n_steps, batch_size=8, **rates)
    Trainer(model, BatchSampler(rows, batch_size=8, seed=seed), config).train()
    return model


# %% [markdown]
# Chapter 13's {py:func}`~llmbook.training.documents_score` returns how many bits a model needs for
# some texts, and how many bytes the texts have. The perplexity is 2 to the power of the bits per
# *token*:

# %%
tokenizers = {"bytes": BPETokenizer.from_merges([]), "BPE": train_bpe(stories, 1024)}
for name, length in (("bytes", 384), ("BPE", 128)):
    tokenizer = tokenizers[name]
    bits, n_bytes = documents_score(trained(tokenizer, length, 40), tokenizer, held_out)
    n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in held_out)
    values = f"perplexity {2 ** (bits / n_tokens):3.0f}, {bits / n_bytes:.1f} bits per byte"
    print(f"{name:5}: {values}")

# %% [markdown]
# The byte model is ahead in perplexity, and the BPE model in bits per byte. (Trained models differ
# a little from processor to processor. From now on, a value that depends on training is printed
# with a range, such as 0.4 ± 0.1, and the cell fails if it lies outside.)

# %% [markdown] tags=["engine"]
# ### Engine room: how values are compared (`about`), and how the figures are drawn

# %% [markdown] tags=["engine"]
# `about` prints a value in a form that another processor can reproduce. The other functions draw
# the figures from numbers that are computed in the main text.


# %% tags=["engine"]
# A value that depends on training
def about(what: str, value: float, expected: float, off: float, form: str = ".2f") -> None:
    """Print what a value should be, after checking that it is no further off than it may be."""
    assert abs(value - expected) <= off, f"{what}: {value}"
    print(f"{what}: {expected:{form}} ± {off:{form}}")


def draw_windows(strides: Sequence[int], by_stride: Sequence[float]) -> None:
    assert list(by_stride) == sorted(by_stride) and by_stride[-1] > 1.5 * by_stride[0]
    _, axes = plt.subplots(1, 2)
    for stride in (16, 4):
        plan = plan_windows(49, 16, stride)
        seen = [place - w.start for w in plan for place in range(w.first, w.end)]
        axes[0].plot(range(1, 49), seen, label=f"stride {stride}")
    axes[0].set(title="Context of each token", xlabel="token", ylabel="tokens seen", ylim=(0, 20))
    axes[0].legend(loc="lower right")
    axes[1].plot(strides, by_stride, "o-")
    axes[1].set(title="Perplexity", xlabel="stride", xticks=strides, ylim=(1, None))
    plt.show()


# %% tags=["engine"]
# Figures about choices and attempts
def draw_normalization(shares: dict[str, tuple[float, ...]], guess: Sequence[float]) -> None:
    _, axes = plt.subplots(1, 3, sharey=True)
    guesses = (0.25, *guess)
    for panel, title in enumerate(("The right one", "The shortest one", "The longest one")):
        axes[panel].barh(list(shares), [share[panel] for share in shares.values()])
        axes[panel].axvline(guesses[panel], color="gray", linestyle=":")
        axes[panel].set(title=title, xlim=(0, 0.8), xlabel="share of picks")
    axes[0].invert_yaxis()
    plt.show()


def draw_attempts(passed: np.ndarray, majority: np.ndarray) -> None:
    plt.plot(range(1, 21), passed, label="pass@k")
    plt.plot(range(1, 21), majority, "--", label="majority@k")
    plt.xlabel("k")
    plt.xticks((1, 5, 10, 15, 20))
    plt.ylim(0, 1)
    plt.legend()
    plt.show()


# %% tags=["engine"]
# Figures about intervals
def draw_coverage(truths: np.ndarray, covered: dict[str, list[float]]) -> None:
    for method, style in (("wilson", "-"), ("wald", "--")):
        plt.plot(truths, covered[method], style, label=method.title())
    plt.axhline(0.95, color="gray", linestyle=":")
    plt.xlabel("true accuracy")
    plt.ylabel("coverage")
    plt.ylim(0, 1.02)
    plt.legend(loc="lower left")
    plt.show()


def draw_seeds(by_run: list[list[bool]], by_text: np.ndarray) -> None:
    _, axes = plt.subplots(1, 2)
    exams = [confidence_interval(sum(answers), len(answers)) for answers in by_run]
    for axis, found in zip(axes, (exams, [mean_interval(row) for row in by_text]), strict=True):
        middles = [one.estimate for one in found]
        below = [one.estimate - one.low for one in found]
        above = [one.high - one.estimate for one in found]
        axis.errorbar(range(5), middles, yerr=[below, above], fmt="o", capsize=4)
        axis.set(xlabel="seed", xticks=range(5))
    axes[0].set(title="Accuracy", ylim=(0, 1))
    axes[1].set(title="Bits per byte")
    plt.show()


# %% tags=["engine"]
# The figure of doses
def draw_doses(scores: dict[int, "Interval"]) -> None:
    assert scores[8].low > scores[1].estimate > scores[0].high
    _, axes = plt.subplots(figsize=(6, 3.2))
    for place, (copies, one) in enumerate(scores.items()):
        error = [[one.estimate - one.low], [one.high - one.estimate]]
        style = {"fmt": "o", "color": "C0"} if copies >= 0 else {"fmt": "s", "color": "C1"}
        axes.errorbar(place, one.estimate, error, capsize=3, **style)
    axes.axhline(1 / 16, linestyle=":", color="gray")
    axes.set_xticks(range(6), ["0", "1", "2", "4", "8", "8, reworded"])
    axes.set(xlabel="copies of the exam in the training text", ylabel="score", ylim=(0, None))
    axes.set_title("A single copy lifts the score of a guesser")
    plt.show()


# %% tags=["engine"]
# Figures about confidence and strength
def draw_reliability(*found: "Calibration") -> None:
    assert found[1].error < found[0].error and found[1].brier < found[0].brier
    _, panels = plt.subplots(1, 2, sharey=True, figsize=(7, 3.2))
    for axes, one, title in zip(panels, found, ("temperature 1", "fitted"), strict=True):
        axes.plot([0, 1], [0, 1], ":", color="gray")
        axes.scatter(one.confidence, one.accuracy, s=[10 + 2 * n for n in one.counts], alpha=0.7)
        axes.set(title=title, xlabel="confidence", xlim=(0, 1.05), ylim=(-0.05, 1.1))
    panels[0].set_ylabel("share that is right")
    plt.show()


def draw_board(temperatures: Sequence[float], ratings: "Ratings") -> None:
    assert ratings.low[0] > ratings.high[-1]
    _, axes = plt.subplots(figsize=(6, 3))
    error = [ratings.strengths - ratings.low, ratings.high - ratings.strengths]
    axes.errorbar(temperatures, ratings.strengths, error, fmt="o", capsize=3)
    axes.set(xlabel="temperature", ylabel="strength, in nats")
    axes.set_title("The hottest is clearly behind")
    plt.show()


# %% [markdown]
# ## Per what?
#
# A model $q$ with tokenizer $\tau$ cuts a text $x$ into $n_\tau$ tokens, and the chain rule gives
# $\log q(x) = \sum_t \log q(x_t \mid x_{<t})$. The left side does not know about tokens. On the
# right side, the tokenizer decides how many terms there are. So
#
# $$
# \text{perplexity} = \exp\Bigl(-\frac{\log q(x)}{n_\tau}\Bigr) , \qquad
# \text{bits per byte} = \frac{-\log_2 q(x)}{b} .
# $$ (evaluation-units)
#
# The first divides by a number that belongs to the tokenizer, the second by the number of bytes
# $b$, which belongs to the text. So bits per byte say which model finds the text more probable, and
# nothing else. The byte model has about four times as many terms, so each of them is smaller. One
# measure follows from the other:
#
# $$
# \text{bits per byte} = \frac{n_\tau}{b} \log_2 (\text{perplexity}) .
# $$ (evaluation-conversion)
#
# Two more traps are in the units. Losses are in nats, and whoever forgets the factor
# $\ln 2 \approx 0.693$ makes a model look 31 % better. And the bytes must be those of the *text*.
# If each token is decoded by itself, a token that holds a part of a character becomes the
# replacement character U+FFFD, which takes three bytes:

# %%
text = "Zoë naïvely ordered 抹茶 and crème brûlée for 12 €."
for name, tokenizer in tokenizers.items():
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    print(f"{name:5}: {sum(len(piece.encode()) for piece in pieces)} bytes, one by one")
print(f"text : {len(text.encode())} bytes")

# %% [markdown]
# With so many bytes to divide by, the score is 39 % lower than it should be. In plain English text
# the error is small, and can go unnoticed for a long time.

# %% [markdown]
# ## The log-probability of each token
#
# All scores of this chapter come from one place. At position $t$ the model has read $x_1$ to $x_t$,
# and its logits are about $x_{t+1}$. So the logits of all positions but the last are compared with
# the ids of all positions but the first. (`model_logits` returns the logits of our models, and of
# those of `transformers`.)


# %%
#| export
def next_log_probs(
    model: nn.Module, ids: Int64[Tensor, "batch sequence"]
) -> Float[Tensor, "batch targets"]:
    """Return log q of each id after the first of its row, in nats, given those before it there."""
    logits, targets = model_logits(model, ids[:, :-1]), ids[:, 1:]
    return -cross_entropy(logits, targets.contiguous(), reduction="none")


# %% [markdown]
# What probability did the first token get? None, since there is no position before it. So a special
# token is put in front of each text; in this book it is `<|endoftext|>`, which ended the previous
# document in training. (Many models have a separate token for this, BOS, for beginning of
# sequence.)


# %% tags=["engine"]
#| export
# Logits of our models, and of those of transformers
def model_logits(
    model: nn.Module, ids: Int64[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence vocab_size"]:
    """Return the logits of a model that returns them, or as transformers a record with them."""
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


# %% [markdown]
# The start token must be there exactly *once*. We leave it out or repeat it, with the model of
# chapter 13:

# %%
run = pretrained("tinyworld")
model, tokenizer = run.model, run.tokenizer
end = tokenizer.special_tokens["<|endoftext|>"]
rows = [tokenizer.encode(story) for story in held_out[:50]]
starts = {"once": ([end], 1.5), "missing": ([], 1.8), "three times": ([end] * 3, 1.5)}
for name, (before, expected) in starts.items():
    found = [next_log_probs(model, torch.tensor([before + ids]))[0, 1 - len(ids) :] for ids in rows]
    value = torch.cat(found).mean().neg().exp().item()
    about(f"perplexity, start token {name}", value, expected, 0.2, ".1f")

# %% [markdown]
# Without the start token, the model is worse at predicting all *other* tokens, since it has never
# seen a row that begins with anything else. (Large models put much of their attention on the first
# position {cite}`sun2024massive`, so they may suffer more.) Repeating it does little harm here, but
# it is an easy mistake to make: the tokenizer adds the token, and the program does, too. Our
# functions add it only if it is not there yet.

# %% [markdown]
# ## A model must not see the future
#
# All of this rests on one assumption: the logits at position $t$ depend on the tokens up to $t$
# only. A mask that is off by one breaks it; so does a normalization over the whole row, or a layer
# in which experts choose among all tokens of a row {cite}`zhou2022mixture`. Then the loss is
# wonderful, and the model cannot generate. No score reveals the fault, but a direct test does.
# Change the tokens from some place on; the logits before that place must stay what they were. We
# try it on our model, and on another that adds the logits of the next position:

# %%
ids = torch.tensor([[end, *rows[0][:15]]])
changed = ids.clone()
changed[0, 8:] = (ids[0, 8:] + 1) % tokenizer.vocab_size
difference = model(ids) - model(changed)
for name, change in {"ours": difference, "other": difference + difference.roll(-1, 1)}.items():
    moved = change[0, :8].abs().max() > 1e-3
    print(f"{name:5}: the logits before the change {'move' if moved else 'stay'}")

# %% [markdown]
# {py:func}`~llmbook.evaluation.check_causal` does this at several places of a random row. The
# functions that score texts call it first.

# %% [markdown] tags=["engine"]
# ### Engine room: a model that sees the future is refused (`check_causal`)


# %% tags=["engine"]
#| export
def check_causal(
    model: nn.Module,
    *,
    vocab_size: int | None = None,
    length: int = 16,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> None:
    """Refuse a model whose logits at a position change when later tokens do.

    A row of ``length`` random ids, or as many as the model reads at once, is read twice; the second
    time the last ids, from one of several places on, are others. Logits before that place may
    differ by ``tolerance`` times their spread.
    """
    check_at_least(length=(2, length), seed=(0, seed), vocab_size=(2, vocab_size))
    _check_positive("tolerance", tolerance)
    size = vocab_size or _vocabulary(model)
    if (length := min(length, _longest(model) or length)) < 2:
        return  # nothing comes after the only token
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(size, (1, length), generator=random)
    places = sorted({1, length // 2, length - 1})
    changed = ids.repeat(len(places), 1)
    for row, place in enumerate(places):  # adding 1 to size - 1 makes each id another one
        changed[row, place:] += torch.randint(1, size, (length - place,), generator=random)
    changed %= size
    with unnoticed(model):
        found = model(torch.cat([ids, changed]).to(_device(model)))
    logits = (found if isinstance(found, Tensor) else found.logits).float().cpu()
    for row, place in enumerate(places, 1):
        change = (logits[row, :place] - logits[0, :place]).abs().max().item()
        if not change <= tolerance * logits.std().item():
            expected = f"logits before token {place} that do not depend on the tokens from it on"
            raise ValueError(
                f"model: expected {expected}, got {type(model).__name__}, "
                f"whose logits there change by {change:.2g}: it sees the future"
            )


# %% tags=["engine"]
#| export
# What the check asks of its arguments
def _vocabulary(model: nn.Module) -> int:
    """How many ids the model knows."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError("vocab_size: expected a number, as model.config has none, got None")
    return size


def _device(model: nn.Module) -> torch.device:
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def _longest(model: nn.Module) -> int | None:
    """How many ids the model reads at once, if its configuration says."""
    config = getattr(model, "config", None)
    names = ("context_length", "max_position_embeddings", "n_positions")
    return next((int(n) for name in names if (n := getattr(config, name, None))), None)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r:.60}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


# %% [markdown] tags=["engine"]
# The model below peeks as the one above does. The message names the place from which on the tokens
# were changed: the logits before it changed, too.


# %% tags=["engine"]
class Peeking(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        return (logits + logits.roll(-1, dims=1)) / 2


check_causal(model)
try:
    check_causal(Peeking(model))
except ValueError as error:
    print(str(error).partition(", whose")[0])

# %% [markdown]
# ## Texts longer than the context
#
# A model with a {term}`context length` of $T$ reads at most $T$ tokens at once. A longer text is
# cut into windows, and the cut matters. If each window begins where the last one ended, its first
# tokens have hardly any context and are scored as if the text began there. The remedy is to let
# windows overlap. Each window moves on by a {term}`stride` $s \le T$, and only its last $s$ tokens
# count; the others are there to predict them from. So every token but the first is scored once, and
# after the first window each has at least $T + 1 - s$ tokens of context. The price is $T / s$ times
# the work. In the engine room, {py:func}`~llmbook.evaluation.score_texts` reads such windows and
# adds up nats, tokens, and bytes for {py:func}`~llmbook.evaluation.perplexity` and
# {py:func}`~llmbook.evaluation.bits_per_byte`.

# %% [markdown] tags=["engine"]
# ### Engine room: windows (`plan_windows`), unequal rows, and long texts (`score_texts`)

# %% [markdown] tags=["engine"]
# Three numbers describe a window:


# %% tags=["engine"]
#| export
class Window(NamedTuple):
    """A piece of a text: the model reads ids ``start`` to ``end``, and those from ``first`` count.

    Each id is predicted from those before it in the window, so ``first`` has ``first - start`` ids
    of context, and the last one, ``end - 1``, is read by nobody.
    """

    start: int
    first: int
    end: int


# %% [markdown] tags=["engine"]
# The plan for a text is a list of windows. The first window scores everything it can. Each later
# one scores the next $s$ tokens, and reaches back as far as the model can read:


# %% tags=["engine"]
#| export
def plan_windows(n_ids: int, context_length: int, stride: int) -> list[Window]:
    """Return windows of at most ``context_length + 1`` ids that score each id but the first once.

    All windows but the first score ``stride`` ids (the last perhaps fewer), so each of these has at
    least ``context_length + 1 - stride`` ids of context.

    >>> [tuple(window) for window in plan_windows(10, 4, 2)]
    [(0, 1, 5), (2, 5, 7), (4, 7, 9), (5, 9, 10)]
    """
    check_at_least(n_ids=(2, n_ids), context_length=(1, context_length), stride=(1, stride))
    if stride > context_length:
        raise ValueError(
            f"stride: expected at most context_length = {context_length}, got {stride}"
        )
    windows = [Window(0, 1, min(n_ids, context_length + 1))]
    while (done := windows[-1].end) < n_ids:
        end = min(done + stride, n_ids)
        windows.append(Window(max(0, end - context_length - 1), done, end))
    return windows


# %% [markdown] tags=["engine"]
# A text's scores are kept as sums of nats, tokens, and bytes. The numbers of each single text are
# needed for intervals, later in this chapter.


# %% tags=["engine"]
#| export
class TextScores(NamedTuple):
    """How surprised a model was by some texts: for each the nats, and its tokens and bytes."""

    nats: Float[np.ndarray, " texts"]
    n_tokens: Int64[np.ndarray, " texts"]
    n_bytes: Int64[np.ndarray, " texts"]

    @property
    def perplexity(self) -> float:
        """e to the nats per token."""
        if not self.n_tokens.sum():
            raise ValueError("texts: expected at least one token, got none")
        return math.exp(self.nats.sum() / self.n_tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits for all texts, divided by their bytes."""
        if not self.n_bytes.sum():
            raise ValueError("texts: expected at least one byte, got none")
        return float(self.nats.sum() / math.log(2) / self.n_bytes.sum())


# %% [markdown] tags=["engine"]
# A score is, to be exact, the probability of one way to cut a text into tokens. Other cuts spell
# the same text, so the probability of the text itself is a little higher; chapter 06 adds them all
# up.

# %% [markdown] tags=["engine"]
# A model is anything that maps ids to logits; a model of `transformers` will do as well as ours.
# How many ids it reads at once is stated in its configuration, under one of several names.

# %% tags=["engine"]
#| export
Numbers = Sequence[float | int | np.number | np.bool_] | np.ndarray | Tensor
Clusters = Sequence[Hashable] | np.ndarray
Rows = Sequence[Sequence[int]]


def _context_length(model: nn.Module, given: int | None = None) -> int:
    """How many ids the model reads at once: what is ``given``, or what its configuration says."""
    check_at_least(context_length=(1, given))
    known = _longest(model)
    if given is None and known is None:
        raise ValueError("context_length: expected a number, as model.config has none, got None")
    if given is not None and known is not None and given > known:
        raise ValueError(f"context_length: expected at most the model's {known}, got {given}")
    return known if given is None else given  # type: ignore[return-value]


def _start_id(tokenizer: Tokenizer, start: str) -> int:
    """The id of the special token with which a text begins."""
    if not isinstance(tokenizer, Tokenizer):
        expected = "an object with vocab_size, special_tokens and encode"
        raise ValueError(f"tokenizer: expected {expected}, got {tokenizer!r:.60}")
    check_choice("start", start, tuple(tokenizer.special_tokens))
    return tokenizer.special_tokens[start]


# %% tags=["engine"]
#| export
def _begun(ids: Sequence[int], start: int) -> list[int]:
    """The ids after exactly one ``start``, whether or not the tokenizer has put one there."""
    return [int(id) for id in ids] if len(ids) and ids[0] == start else [start, *map(int, ids)]


# %% [markdown] tags=["engine"]
# Rows of unequal length go through the model in batches, padded on the right. What a causal model
# says at a position does not depend on what comes after it, so padding needs no mask; it only costs
# time. To keep that cost low, rows are sorted by length.


# %% tags=["engine"]
#| export
def _padded_batches(rows: Rows, batch_tokens: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield numbers of rows of about one length, and their ids, padded on the right."""
    check_at_least(batch_tokens=(1, batch_tokens))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    while order:
        few = max(1, batch_tokens // len(rows[order[-1]]))
        order, numbers = order[:-few], order[-few:]
        ids = torch.zeros(len(numbers), len(rows[numbers[-1]]), dtype=torch.int64)
        for place, row in enumerate(numbers):
            ids[place, : len(rows[row])] = torch.as_tensor(rows[row])
        yield numbers, ids


# %% tags=["engine"]
#| export
def rows_log_probs(
    model: nn.Module, rows: Rows, *, batch_tokens: int = 4096
) -> list[Float[Tensor, " targets"]]:
    """Return ``next_log_probs`` for rows of unequal length, on the CPU, in the order of ``rows``.

    Rows of about one length are padded on the right and go through the model together, at most
    ``batch_tokens`` ids at a time. Padding comes after all that counts, so a causal model does not
    see it. The model is evaluated without dropout and left as it was.
    """
    _check_rows(rows)
    found: dict[int, Tensor] = {}
    with unnoticed(model):
        for numbers, ids in _padded_batches(rows, batch_tokens):
            log_probs = next_log_probs(model, ids.to(_device(model))).cpu()
            for row, part in zip(numbers, log_probs, strict=True):
                found[row] = part[: len(rows[row]) - 1]
    return [found[row] for row in range(len(rows))]


def _check_rows(rows: Any) -> None:
    """Demand rows of at least two ids, and at least one row."""
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence) or not len(rows):
        raise ValueError(f"rows: expected at least one row of ids, got {rows!r:.60}")
    for place, row in enumerate(rows):
        if isinstance(row, str | bytes) or not hasattr(row, "__len__") or len(row) < 2:
            raise ValueError(
                f"rows: expected at least two ids in a row, got {row!r:.60} at {place}"
            )


# %% tags=["engine"]
#| export
def window_log_probs(
    model: nn.Module,
    ids: Sequence[int],
    *,
    stride: int | None = None,
    context_length: int | None = None,
    batch_tokens: int = 4096,
) -> Float[Tensor, " targets"]:
    """Return log q of each id after the first, in nats, of a text that may exceed the context.

    The windows are those of ``plan_windows``; ``stride`` is by default half the context length.
    """
    if not hasattr(ids, "__len__") or len(ids) < 2:
        raise ValueError(f"ids: expected at least two ids, got {ids!r:.60}")
    size = _context_length(model, context_length)
    windows = plan_windows(len(ids), size, max(1, size // 2) if stride is None else stride)
    rows = [ids[window.start : window.end] for window in windows]
    found = rows_log_probs(model, rows, batch_tokens=batch_tokens)
    parts = [part[w.first - w.start - 1 :] for part, w in zip(found, windows, strict=True)]
    return torch.cat(parts)


# %% [markdown] tags=["engine"]
# A text without any token to predict has no windows, and counts with 0 nats. That is allowed for
# one of many texts. But a test set without any byte has no bits per byte, and an empty one has no
# score at all. Before any text is scored, the model is tested for seeing the future.


# %% tags=["engine"]
#| export
def score_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    stride: int | None = None,
    end: bool = True,
    start: str = "<|endoftext|>",
    context_length: int | None = None,
    batch_tokens: int = 4096,
) -> TextScores:
    """Return nats, tokens and bytes of each text, read after one ``start`` and nothing else.

    With ``end`` the special token after a text is predicted, too, and counts as a token. Bytes are
    those of the text as UTF-8, whatever the tokenizer makes of it. A text longer than the context
    is read in windows (``window_log_probs``). A model that sees the future is refused.
    """
    first, texts = _start_id(tokenizer, start), _as_texts(texts)
    size = _context_length(model, context_length)
    stride = max(1, size // 2) if stride is None else stride
    rows = [_begun(tokenizer.encode(text), first) + [first] * bool(end) for text in texts]
    check_causal(model, vocab_size=tokenizer.vocab_size, length=min(16, max(size, 2)))
    plans = [plan_windows(len(row), size, stride) if len(row) > 1 else [] for row in rows]
    pieces = [
        (row[window.start : window.end], text, window)
        for text, (row, plan) in enumerate(zip(rows, plans, strict=True))
        for window in plan
    ]
    nats = np.zeros(len(texts))
    if pieces:
        found = rows_log_probs(model, [piece[0] for piece in pieces], batch_tokens=batch_tokens)
        for log_probs, (_, text, window) in zip(found, pieces, strict=True):
            nats[text] -= log_probs[window.first - window.start - 1 :].double().sum().item()
    n_bytes = [len(text.encode()) for text in texts]
    return TextScores(nats, np.array([len(row) - 1 for row in rows]), np.array(n_bytes))


# %% tags=["engine"]
#| export
def _as_texts(texts: Any) -> list[str]:
    """Several texts, at least one."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected several texts, got {texts!r:.60}")
    found = [valid_text(text, "texts") for text in texts]
    if not found:
        raise ValueError("texts: expected at least one text, got none")
    return found


def perplexity(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], **options: Any
) -> float:
    """Return the perplexity per token of ``texts``; ``options`` are those of ``score_texts``."""
    return score_texts(model, tokenizer, texts, **options).perplexity


def bits_per_byte(
    model: nn.Module, tokenizer: Tokenizer, texts: Iterable[str], **options: Any
) -> float:
    """Return the bits per byte of ``texts``; ``options`` are those of ``score_texts``."""
    return score_texts(model, tokenizer, texts, **options).bits_per_byte


# %% [markdown] tags=["engine"]
# For texts that fit into one window, the result is that of chapter 13, which has no strides. (For
# longer ones, chapter 13's last window begins where the one before it ended, and ours reaches
# back.) We compare the two on the model of chapter 13, and check {eq}`evaluation-conversion` as
# well:

# %% tags=["engine"]
scores = score_texts(model, tokenizer, held_out, stride=128)
bits, n_bytes = documents_score(model, tokenizer, held_out)
assert math.isclose(scores.bits_per_byte, bits / n_bytes, rel_tol=1e-5)
ratio = scores.n_tokens.sum() / scores.n_bytes.sum()
assert math.isclose(scores.bits_per_byte, ratio * math.log2(scores.perplexity), rel_tol=1e-9)
print(f"{scores.bits_per_byte:.1f} bits per byte, here and in chapter 13")

# %% [markdown]
# ### The same text in other windows
#
# {numref}`fig-evaluation-windows` shows the context and its effect, for stories in windows of 16
# tokens. `window_log_probs` returns the log-probability of each token of one text:

# %% mystnb={"figure": {"caption": "Windows of 16 tokens. Left, how many tokens before it each token gets to see, with two strides. Right, the perplexity of the same model on the same stories, over the stride.", "name": "fig-evaluation-windows"}, "image": {"alt": "Left, two sawtooth lines over 48 tokens: with a stride of 16 the context falls to 1 at each window and rises to 16, with a stride of 4 it stays between 13 and 16. Right, perplexity rises with the stride, from 2.2 at 1 to 5.2 at 16."}}
rows = [[end, *tokenizer.encode(story), end] for story in held_out[:15]]
strides, by_stride = (1, 2, 4, 8, 16), []
for stride in strides:
    found = [window_log_probs(model, row, stride=stride, context_length=16) for row in rows]
    by_stride.append(torch.cat(found).mean().neg().exp().item())
draw_windows(strides, by_stride)

# %% [markdown]
# The same weights have perplexities from 2.2 to 5.2 on the same text. Whoever reports a perplexity
# has to say how the windows were laid. Our stride is half the context length by default.

# %% [markdown]
# ## Multiple choice by likelihood
#
# A model that has only been pretrained continues texts. It can still take an exam: we put each
# answer after the question, and take the one that is likeliest there {cite}`brown2020gpt3`. The
# score of an answer $a$ of $m$ tokens after the context $h$ is
#
# $$
# s(a) = \log q(a \mid h) = \sum_{t=1}^{m} \log q(a_t \mid h, a_{<t}) .
# $$ (evaluation-choice)
#
# The facts of the tiny world make such an exam, with four answers to each question, the right one
# first:

# %% tags=["engine"]
# An exam about the facts of the world
draws, facts = random.Random(0), []
for name, known in world.cast.facts.items():
    for attribute in ("species", "home", "food", "toy", "job"):
        stem = PHRASES[attribute][1].format(name=name, value="|").partition("|")[0].rstrip()
        others = [value for value in VALUES[attribute] if value != known[attribute]]
        answers = [known[attribute], *draws.sample(others, 3)]
        facts.append((stem, [" " + answer for answer in answers]))

# %% [markdown]
# Here is {eq}`evaluation-choice` as code. We call an answer likely if its probability is above one
# half:


# %%
def log_prob_of(context: str, answer: str) -> float:
    before, ids = [end, *tokenizer.encode(context)], tokenizer.encode(answer)
    with torch.no_grad():
        log_probs = next_log_probs(model, torch.tensor([before + ids]))[0]
    return log_probs[-len(ids) :].sum().item()


stem, answers = facts[1]
for answer in answers:
    side = "over" if log_prob_of(stem, answer) > math.log(0.5) else "under"
    print(f"{stem}{answer:12} probability {side:5} 50 %")

# %% [markdown]
# ### The seam
#
# Now move the space from the answer to the end of the context. That looks harmless:


# %%
def n_right(cut: str) -> int:
    scores = [[log_prob_of(q + cut, a[len(cut) :]) for a in answers] for q, answers in facts[:100]]
    return sum(max(row) == row[0] for row in scores)


about("right of 100, with the space in the answer", n_right(""), 98, 2, ".0f")
about("right of 100, with the space in the context", n_right(" "), 31, 20, ".0f")

# %% [markdown]
# The second time the model does little better than a guesser, who gets 25.
# {numref}`fig-evaluation-seam` shows why: a space and the word after it are one token, so in
# training the single token "space" was never followed by a word.
#
# ```{figure} ../figures/evaluation-seam.svg
# :name: fig-evaluation-seam
# :alt: As one text, the answer is a token with a space; separately, a lone space ends the context.
#
# The same characters in three ways. What the model has learned is in the first row.
# ```
#
# The cure is to encode context and answer **jointly**, as the one text that they form, and to look
# for the seam afterward. White space at the end of the context moves over to the answer, as does a
# token that stretches across the seam.

# %% [markdown]
# ### Longer answers lose
#
# Each token multiplies the probability by a number below 1, so the sum in {eq}`evaluation-choice`
# prefers short answers. There is no single right number to divide it by:
#
# | `normalization` | score | remark |
# |---|---|---|
# | "none" | $s(a)$ | right if all answers have the same form |
# | "token" | $s(a) / m$ | depends on the tokenizer |
# | "character" | $s(a) / \text{characters}$ | `acc_norm` of EleutherAI's harness {cite}`gao2024harness` |
# | "byte" | $s(a) / \text{bytes}$ | the same for English; our default |
# | "unconditional" | $s(a) - \log q(a \mid \text{neutral})$ | how much likelier the context makes it than a neutral one {cite}`brown2020gpt3,holtzman2021surface` |
#
# {py:func}`~llmbook.evaluation.score_choices` encodes jointly, knows these five normalizations, and
# scores all answers to a question in one batch.

# %% [markdown] tags=["engine"]
# ### Engine room: the seam, all choices in one batch, and choices that cannot be compared

# %% [markdown] tags=["engine"]
# `encode_pairs` finds the seam. It compares the ids of the context with the ids of context and
# answer together. The part that they share ends at the first difference.

# %% tags=["engine"]
#| export
Seam = Literal["joint", "separate"]
TooLong = Literal["error", "truncate"]
Normalization = Literal["none", "token", "character", "byte", "unconditional"]


# %% tags=["engine"]
#| export
# Context and continuations in ids
def encode_pairs(
    tokenizer: Tokenizer,
    context: str,
    continuations: Sequence[str],
    *,
    seam: Seam = "joint",
    start: str = "<|endoftext|>",
) -> tuple[list[int], list[list[int]]]:
    """Return the ids of a context, after one ``start``, and those of each continuation of it.

    "separate" encodes context and continuation each by itself. "joint" encodes them as one text.
    The context is then what all these texts begin with and the context by itself does, too, so a
    token across the seam belongs to the continuation. White space at the end of the context goes
    over to the continuations.
    """
    check_choice("seam", seam, ("joint", "separate"))
    first, context = _start_id(tokenizer, start), valid_text(context, "context")
    endings = _checked_choices(continuations, "continuations")
    if seam == "separate":
        return _begun(tokenizer.encode(context), first), [
            _without(tokenizer.encode(ending), first) for ending in endings
        ]
    kept = context.rstrip()
    endings = [context[len(kept) :] + ending for ending in endings]
    alone = _begun(tokenizer.encode(kept), first)
    whole = [_begun(tokenizer.encode(kept + ending), first) for ending in endings]
    shared = min(_common(alone, ids) for ids in whole)
    shared = max(1, min(shared, *(len(ids) - 1 for ids in whole)))
    return alone[:shared], [ids[shared:] for ids in whole]


# %% tags=["engine"]
#| export
def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many equal ids both begin."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unequal, min(len(a), len(b)))


def _without(ids: Sequence[int], start: int) -> list[int]:
    """The ids without the ``start`` that a tokenizer may have put before them."""
    return _begun(ids, start)[1:]


def _checked_choices(choices: Any, name: str, least: int = 1) -> list[str]:
    """Return several texts, none blank, none twice."""
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        raise ValueError(f"{name}: expected several texts, got {choices!r:.60}")
    if len(choices) < least:
        raise ValueError(f"{name}: expected at least {least}, got {list(choices)!r}")
    texts = [valid_text(choice, name) for choice in choices]
    for place, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"{name}: expected texts that say something, got {text!r} at {place}")
    if twice := [text for text, count in Counter(texts).items() if count > 1]:
        raise ValueError(
            f"{name}: expected each once, got {twice[0]!r} {texts.count(twice[0])} times"
        )
    return texts


# %% [markdown] tags=["engine"]
# A context that is too long is refused, unless the caller asks for it to be cut. Then the oldest
# tokens are dropped, starting with the start token, and all choices lose the same ones. If each
# were cut according to its own length, the choices would be judged after different contexts.


# %% tags=["engine"]
#| export
def _fitted(context: list[int], longest: int, size: int, too_long: str) -> list[int]:
    """The context, cut on the left if asked, so that ``longest`` more ids fit into the model."""
    check_choice("too_long", too_long, ("error", "truncate"))
    room = size + 1 - longest  # the last id is predicted and not read
    if room < 1:
        expected = f"at most {size} tokens for a context length of {size}"
        raise ValueError(f"choices: expected {expected}, got {longest}")
    if len(context) > room and too_long == "error":
        expected = f"at most {room} tokens before {longest} more, or too_long='truncate'"
        raise ValueError(f"context: expected {expected}, got {len(context)}")
    return context[-room:]


class Continuation(NamedTuple):
    """What a model thinks of a continuation: log q in nats, how many tokens, each the likeliest?"""

    log_prob: float
    n_tokens: int
    is_greedy: bool


# %% tags=["engine"]
#| export
def score_continuations(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    too_long: TooLong = "error",
    context_length: int | None = None,
    batch_tokens: int = 4096,
) -> list[Continuation]:
    """Return log q of ids that continue other ids, for pairs of (context, continuation).

    Each context has at least one id. One that does not fit is an error, or cut on the left.
    """
    size = _context_length(model, context_length)
    check_at_least(batch_tokens=(1, batch_tokens))
    _check_pairs(pairs)
    rows = [[*_fitted(list(context), len(ids), size, too_long), *ids] for context, ids in pairs]
    found: dict[int, Continuation] = {}
    with unnoticed(model):
        for numbers, ids in _padded_batches(rows, batch_tokens):
            logits, targets = model_logits(model, ids[:, :-1].to(_device(model))), ids[:, 1:]
            likeliest = logits.argmax(dim=-1).cpu() == targets
            losses = cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()
            for place, row in enumerate(numbers):
                n, last = len(pairs[row][1]), len(rows[row]) - 1
                answer = (place, slice(last - n, last))
                log_prob = -losses[answer].double().sum().item()
                found[row] = Continuation(log_prob, n, bool(likeliest[answer].all()))
    return [found[row] for row in range(len(rows))]


# %% tags=["engine"]
#| export
def _check_pairs(pairs: Any) -> None:
    """Demand pairs of ids, none empty, and at least one pair."""
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Sequence) or not len(pairs):
        raise ValueError(f"pairs: expected at least one pair of ids, got {pairs!r:.60}")
    for place, pair in enumerate(pairs):
        good = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not good or not all(hasattr(ids, "__len__") and len(ids) for ids in pair):
            expected = "pairs of ids, neither part empty"
            raise ValueError(f"pairs: expected {expected}, got {pair!r:.60} at {place}")


# %% [markdown] tags=["engine"]
# One choice may begin another, as "10" begins "100" where each digit is a token. Whenever the
# longer one occurs, so does the shorter one, which is therefore never less likely. Such choices are
# refused; whether one begins the other is decided token by token. An `ending` that is scored with
# each of them, such as a full stop, tells them apart.


# %% tags=["engine"]
#| export
class ChoiceScores(NamedTuple):
    """Scores of some choices, the best with the highest, and what they are made of."""

    scores: Float[np.ndarray, " choices"]
    log_probs: Float[np.ndarray, " choices"]  # nats, of each choice after the context
    n_tokens: Int64[np.ndarray, " choices"]

    @property
    def best(self) -> int:
        """The number of the choice with the highest score, of equal ones the first."""
        return int(self.scores.argmax())


# %% tags=["engine"]
#| export
def score_choices(
    model: nn.Module,
    tokenizer: Tokenizer,
    context: str,
    choices: Sequence[str],
    *,
    normalization: Normalization = "byte",
    ending: str = "",
    neutral: str = "",
    seam: Seam = "joint",
    too_long: TooLong = "error",
    start: str = "<|endoftext|>",
    **options: Any,
) -> ChoiceScores:
    """Return how likely each choice is as the continuation of ``context``, in one batch.

    A score is log q of a choice and the ``ending`` after it, in nats, divided by its tokens,
    characters or UTF-8 bytes (white space around it and the ending not counted), or less its log q
    after ``neutral`` ("unconditional"). Choices of which one begins another are refused, as the
    shorter could only win: an ``ending`` that all of them get sets them apart. A context that is
    too long is an error or cut on the left, for all choices at the same place. ``options`` are
    ``context_length`` and ``batch_tokens`` of ``score_continuations``.
    """
    check_choice("normalization", normalization, get_args(Normalization))
    check_text(neutral, "neutral")
    texts = _checked_choices(choices, "choices", 2)
    ended = [text + check_text(ending, "ending") for text in texts]

    shared, ids = encode_pairs(tokenizer, context, ended, seam=seam, start=start)
    _check_prefixes(texts, ids)
    size, longest = _context_length(model, options.get("context_length")), max(map(len, ids))

    def found(before: list[int]) -> np.ndarray:
        pairs = [(_fitted(before, longest, size, too_long), one) for one in ids]
        return np.array([one.log_prob for one in score_continuations(model, pairs, **options)])

    log_probs, n_tokens = found(shared), np.array([len(one) for one in ids])
    if normalization == "unconditional":
        first = _start_id(tokenizer, start)
        scores = log_probs - found(_begun(tokenizer.encode(neutral), first))
    else:
        scores = log_probs / _sizes(texts, n_tokens, normalization)
    return ChoiceScores(scores, log_probs, n_tokens)


# %% tags=["engine"]
#| export
def _sizes(texts: list[str], n_tokens: np.ndarray, normalization: str) -> np.ndarray:
    """What the log-probabilities of ``texts`` are divided by."""
    sizes = {
        "none": [1] * len(texts),
        "token": n_tokens,
        "character": [len(text.strip()) for text in texts],
        "byte": [len(text.strip().encode()) for text in texts],
    }
    return np.array(sizes[normalization])


def _check_prefixes(texts: list[str], ids: list[list[int]]) -> None:
    """Refuse choices of which one begins another, token by token."""
    for (a, one), (b, other) in permutations(zip(texts, ids, strict=True), 2):
        if other[: len(one)] == one:
            expected = "choices of which none begins another (an ending, such as '.', helps)"
            raise ValueError(f"choices: expected {expected}, got {a!r} and {b!r}")


# %% [markdown] tags=["engine"]
# All choices of a question go through the model in one batch. The result is the same as one by one:

# %% tags=["engine"]
for stem, answers in facts[:20]:
    together = score_choices(model, tokenizer, stem, answers, normalization="none").log_probs
    alone = [log_prob_of(stem, answer) for answer in answers]
    assert np.allclose(together, alone, atol=1e-3)
print("20 questions: the same one by one and in a batch")

# %% [markdown] tags=["engine"]
# Exams that have different numbers of answers can be compared by the centered accuracy.


# %% tags=["engine"]
#| export
def centered_accuracy(accuracy: float, chance: float) -> float:
    """Return an accuracy moved and stretched so that guessing is 0 and perfection 1.

    ``chance`` is the accuracy of guessing (DataComp-LM, section 3.5).

    >>> round(centered_accuracy(0.40, chance=0.25), 3)
    0.2
    """
    check_fraction("chance", chance)
    _check_share("accuracy", accuracy)
    return float((accuracy - chance) / (1 - chance))


# %% tags=["engine"]
#| export
# What a share is
def _check_share(name: str, value: Any) -> None:
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not known or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r:.60}")


# %% [markdown]
# ### What length does to a score
#
# To measure the bias, we need a model that hardly knows the facts: the BPE model of the opening,
# trained again for 120 steps, from now on called `small`. Each answer is a sentence in one of three
# wordings, which differ in length:

# %% tags=["engine"]
# Sentences of unequal length, and what a model picks among them
small = trained(tokenizers["BPE"], 128, 120)
draws, statements = random.Random(1), []
for name, known in list(world.cast.facts.items())[:40]:
    for attribute in ("home", "food", "job"):
        others = [value for value in VALUES[attribute] if value != known[attribute]]
        said = [(draws.choice((0, 2, 4)), v) for v in (known[attribute], *draws.sample(others, 3))]
        sentences = [f" {PHRASES[attribute][i].format(name=name, value=v)}" for i, v in said]
        statements.append((f"One morning, {name} sat by the window. It was cold.", sentences))
shares = {}
for normalization in get_args(Normalization):
    best = [
        score_choices(small, tokenizers["BPE"], *item, normalization=normalization).best
        for item in statements
    ]
    sizes = [[len(sentence) for sentence in sentences] for _, sentences in statements]
    least = np.mean([size[b] == min(size) for size, b in zip(sizes, best, strict=True)])
    most = np.mean([size[b] == max(size) for size, b in zip(sizes, best, strict=True)])
    shares[normalization] = np.mean(np.array(best) == 0), least, most
guess = [np.mean([size.count(pick(size)) / 4 for size in sizes]) for pick in (min, max)]
assert shares["none"][1] > 1.3 * guess[0] and shares["byte"][1] < guess[0]

# %% [markdown]
# {numref}`fig-evaluation-normalization` shows how often it picks the right sentence, the shortest,
# and the longest:

# %% mystnb={"figure": {"caption": "What one model picks among four sentences of unequal length, by the normalization. Dotted, what a blind guess would pick.", "name": "fig-evaluation-normalization"}, "image": {"alt": "Bars for five normalizations. Right answers are between 20 and 40 percent for all. The shortest is picked in two thirds of all cases without normalization, in a quarter of them per byte; the longest in 5 percent without, in nearly half per byte and in more than half with unconditional."}}
draw_normalization(shares, guess)

# %% [markdown]
# Without normalization, two thirds of all picks are the shortest answer. The share of right answers
# lies between a fifth and two fifths, and nothing but the normalization has changed. Division by
# characters or bytes reverses the bias: the end of a long answer is easy to guess, so its mean
# looks good. Report the normalization with the score, and when you write an exam yourself, make the
# answers equally long.
#
# To compare exams with different numbers of answers, the
# {py:func}`~llmbook.evaluation.centered_accuracy` is 0 for guessing and 1 for perfection
# {cite}`li2024dclm`: $(\text{accuracy} - \text{chance}) / (1 - \text{chance})$.

# %% [markdown]
# ## Answers in free text
#
# Models that were tuned to answer write what they like: `The answer is (B).`,
# `so she has $1,234.50`, or `\boxed{\frac{1}{2}}`. A comparison of strings calls all of them wrong.
# So a program first finds the answer and brings it into a standard form.
# {py:func}`~llmbook.evaluation.parse_answer` knows three kinds of answers, and
# {py:func}`~llmbook.evaluation.exact_match` compares numbers by their value.

# %% [markdown] tags=["engine"]
# ### Engine room: how a letter, a number and a box are found

# %% [markdown] tags=["engine"]
# The rules are few, because each further rule finds answers where there are none. A letter counts
# after "answer is" and the like, in brackets, or where it stands alone; in a sentence that begins
# with "A", the A chooses nothing. A number may have a sign, which is not the minus of a
# subtraction. It may also have commas between thousands, a currency sign, decimals, a denominator,
# or an exponent of at most two digits (a model may write 1e999999999, and nobody should compute
# that). Braces in a box are counted until the first one is closed.

# %% tags=["engine"]
#| export
AnswerKind = Literal["letter", "number", "boxed"]


def parse_answer(text: str, kind: AnswerKind, *, letters: str = "ABCD") -> str | None:
    r"""Return the answer that a text gives, in one form, or None if it gives none.

    "letter": of ``letters``, the last after "answer is" or the like, else the last in brackets,
    else one that stands alone or opens the text before a point, bracket or colon. "number": the
    last number, without thousands commas, currency sign, plus sign and idle zeros. "boxed": what
    the last \boxed{...} holds, inner braces included.

    >>> parse_answer("2 + 2 = 4, so she has $1,234.50.", "number")
    '1234.5'
    >>> print(parse_answer(r"Hence \boxed{\frac{1}{2}}.", "boxed"))
    \frac{1}{2}
    """
    check_choice("kind", kind, get_args(AnswerKind))
    check_text(text)
    if not isinstance(letters, str) or not letters.isalpha():
        raise ValueError(f"letters: expected letters such as 'ABCD', got {letters!r:.60}")
    if kind == "letter":
        return _letter(text, letters)
    return _number(text) if kind == "number" else _boxed(text)


# %% tags=["engine"]
#| export
def exact_match(
    text: str, answer: str, kind: AnswerKind | None = None, *, letters: str = "ABCD"
) -> bool:
    """Whether a text gives the answer: the same one by ``parse_answer``, numbers by their value.

    Without a ``kind``, the texts are the same but for case, white space and a last full stop.
    ``letters`` are those that an answer of this kind may be.
    """
    check_text(text)
    check_text(answer, "answer")
    if kind is None:
        return _plain(text) == _plain(answer)
    found, right = (parse_answer(one, kind, letters=letters) for one in (text, answer))
    right = _plain(answer) if right is None and kind == "boxed" else right
    if right is None:
        raise ValueError(f"answer: expected a {kind}, got {answer!r:.60}")
    if kind == "number" and found is not None:
        return Fraction(found) == Fraction(right)
    return found is not None and _plain(found) == _plain(right)


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").casefold()


# %% tags=["engine"]
#| export
# Digits that a letter precedes belong to a name; a minus after a digit or bracket is an operator.
_NUMBER = re.compile(
    r"""(?<!\w) (?P<sign> (?<![)\]]) [-+−] )? [$€£]?
    (?P<digits> (?: \d{1,3} (?: ,\d{3} )+ (?!\d) | \d+ ) (?: \.\d+ )? | \.\d+ )
    (?P<power> [eE] [-+]? \d{1,2} (?!\d) | / 0* [1-9] \d* )? (?! \.?\d | [eE][-+]?\d )""",
    re.VERBOSE,
)


def _number(text: str) -> str | None:
    """The last number of a text, in decimal digits or, where it is one, as a fraction."""
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007
        pass
    if last is None or len(last[0]) > 1000:  # Python refuses to read some thousand digits
        return None
    sign = "-" if last["sign"] in ("-", "−") else ""
    number = sign + last["digits"].replace(",", "") + (last["power"] or "")
    if "/" in number:
        return str(Fraction(number)) if "." not in number else None
    written = format(Decimal(number), "f")
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if written in ("-0", "") else written


# %% tags=["engine"]
#| export
def _letter(text: str, letters: str) -> str | None:
    """The letter that a text chooses."""
    one = f"([{letters}])"
    said = rf"(?i:answer|choice|option)(?i:\s+is|\s*[:=])?\s*[:*_(\[\"']*{one}(?![\w'])"
    patterns = [said, rf"(?:[(\[]|\*\*){one}(?:[)\]]|\*\*)"]
    for pattern in patterns:
        if found := re.findall(pattern, text):
            return found[-1]
    opening = re.match(rf"\s*{one}\s*(?:[.):]|$)", text)
    alone = re.fullmatch(rf"(?i:\W*{one}\W*)", text)
    match = opening or alone
    return next(c for c in letters if c.casefold() == match[1].casefold()) if match else None


def _boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of a text, None if its brace is never closed."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[begin : match.start()].strip()
    return None


# %% [markdown] tags=["engine"]
# Here are answers as models write them, each with what the parser should make of it:

# %% tags=["engine"]
written = [
    ("letter", "Let me think. (A) is too small, so the answer is B.", "B"),
    ("letter", "A dog is an animal.", None),
    ("number", "9 - 4 = 5, and 5 times $1,234.50 is $6,172.50.", "6172.5"),
    ("number", "There are none.", None),
    ("boxed", r"Thus \boxed{\frac{1}{2}}, as claimed.", r"\frac{1}{2}"),
    ("boxed", r"Thus \boxed{\frac{1}{2", None),
]
for kind, text, expected in written:
    assert parse_answer(text, kind) == expected
assert exact_match("That makes 0.50 euros.", "1/2", "number")

# %% [markdown]
# ### The kinds at work
#
# Each of these texts is followed by what the parser makes of it:

# %%
for kind, text, _ in written:
    print(f"{kind:7} {text:52} {parse_answer(text, kind)}")

# %% [markdown]
# In three of the texts it finds no answer and returns None, which counts as wrong. Count the Nones
# separately: a model whose answers cannot be read has a different problem from one that is wrong.
# And a parser that works for one model's style may fail for another's.

# %% [markdown]
# ## Several attempts: pass@k
#
# A model that samples its answers is asked the same question $k$ times. How probable is it that at
# least one answer is right? If each is right with probability $p$, it is $1 - (1 - p)^k$. What we
# have are $n$ samples, $c$ of them right. If we put $\hat p = c / n$ into the formula, which is
# concave, the result is too small on average.
#
# Here is how to be right on average {cite}`chen2021codex`. Take the first $k$ of the $n$ samples as
# the attempts. Whether one of them is right has exactly the expectation that we want, but the
# estimate is noisy. So we average over all $\binom{n}{k}$ ways to choose the attempts, which
# changes no expectation. A choice fails if all its $k$ members are among the $n - c$ wrong samples,
# and that happens in $\binom{n - c}{k}$ of the choices:
#
# $$
# \text{pass@}k = 1 - \binom{n - c}{k} \Big/ \binom{n}{k} .
# $$ (evaluation-pass)


# %%
#| export
def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that of ``k`` of ``n`` answers, ``c`` of them right, at least one is right.

    The unbiased estimate of pass@k (Chen et al. 2021, equation 1).

    >>> round(pass_at_k(n=5, c=2, k=2), 3)
    0.7
    """
    check_at_least(n=(1, n), c=(0, c), k=(1, k))
    _check_at_most("c", c, "n", n)
    _check_at_most("k", k, "n", n)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# %% tags=["engine"]
#| export
# What k and c cannot be
def _check_at_most(name: str, value: int, other: str, most: int) -> None:
    if value > most:
        raise ValueError(f"{name}: expected at most {other} = {most}, got {value}")


# %% [markdown]
# For $n = 5$, $p = 0.3$, and $k = 3$, the average of pass@k over everything that can happen is
# exactly the truth, 0.657, while the other formula averages 0.572. pass@k is the right score where
# somebody can check the answers, as tests check a program. Where nobody can, a natural choice is
# the most frequent answer {cite}`wang2023consistency`. Its score, majority@k, is again an average
# over all choices of $k$ samples; {py:func}`~llmbook.evaluation.majority_at_k` counts them exactly.

# %% [markdown] tags=["engine"]
# ### Engine room: both formulas averaged, and all majorities counted (`majority_at_k`)

# %% [markdown] tags=["engine"]
# To compare the two formulas for pass@k, we average each over everything that can happen in $n = 5$
# samples of a model with $p = 0.3$, for $k = 3$:

# %% tags=["engine"]
p, n, k = 0.3, 5, 3
chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
unbiased = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
plugged = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
assert math.isclose(unbiased, 1 - (1 - p) ** k)
print(f"truth {1 - (1 - p) ** k:.3f}, pass@k {unbiased:.3f}, with c / n put in {plugged:.3f}")

# %% [markdown] tags=["engine"]
# The right answer may get any number of votes. For each such number, a table counts the ways to
# draw the other answers so that none of them has more votes. The table grows by one answer at a
# time; its entries are indexed by how many votes have been drawn in all and by how many answers are
# tied with the right one. A tie with $t$ others is won once in $t + 1$ times.


# %% tags=["engine"]
#| export
def majority_at_k(answers: Sequence[Hashable | None], truth: Hashable, k: int) -> float:
    """Return the chance that the most frequent of ``k`` of the ``answers`` is ``truth``.

    Exact, over all ways to draw ``k`` of them. Ties are broken by chance. None is an answer that
    could not be read: it is drawn, but nobody votes for it.

    >>> round(majority_at_k(["7", "7", "8"], "7", k=3), 3)
    1.0
    """
    if isinstance(answers, str | bytes) or not isinstance(answers, Sequence) or not len(answers):
        raise ValueError(f"answers: expected at least one answer, got {answers!r:.60}")
    check_at_least(k=(1, k))
    _check_at_most("k", k, "len(answers)", len(answers))
    counts = Counter(answers)
    silent, votes = counts.pop(None, 0), counts.pop(truth, 0)
    ways = Fraction(0)
    for won in range(1, min(votes, k) + 1):
        # [others drawn, ties]: in how many ways no other answer has more than `won` votes
        table = {(0, 0): 1}
        for count in counts.values():
            table = _with_answer(table, count, won, k - won)
        for (drawn, ties), number in table.items():
            rest = math.comb(silent, k - won - drawn)
            ways += Fraction(math.comb(votes, won) * number * rest, ties + 1)
    return float(ways / math.comb(len(answers), k))


# %% tags=["engine"]
#| export
def _with_answer(
    table: dict[tuple[int, int], int], count: int, won: int, most: int
) -> dict[tuple[int, int], int]:
    """The ways when an answer that was given ``count`` times is drawn from, too."""
    wider: Counter[tuple[int, int]] = Counter()
    for (drawn, ties), number in table.items():
        for votes in range(min(count, won, most - drawn) + 1):
            wider[drawn + votes, ties + (votes == won)] += number * math.comb(count, votes)
    return wider


# %% [markdown]
# ### Passed or voted
#
# For each question about the facts we draw twenty samples among its four answers, with the
# probabilities that `small` gives them (its tokenizer is `bpe` in the code), and score them both
# ways ({numref}`fig-evaluation-attempts`):

# %% tags=["engine"]
# Twenty samples for each question
bpe, generator = tokenizers["BPE"], torch.Generator().manual_seed(0)
passed, majority = np.zeros(20), np.zeros(20)
for stem, answers in facts:
    log_probs = score_choices(small, bpe, stem, answers, normalization="none").log_probs
    q = torch.tensor(log_probs).softmax(dim=-1)
    drawn = torch.multinomial(q, 20, replacement=True, generator=generator).tolist()
    for k in range(1, 21):
        passed[k - 1] += pass_at_k(20, drawn.count(0), k) / len(facts)
        majority[k - 1] += majority_at_k(drawn, 0, k) / len(facts)
assert math.isclose(passed[0], majority[0]) and passed[-1] > majority[-1] + 0.1

# %% [markdown]
# The two scores are equal for one sample, and then part:

# %% mystnb={"figure": {"caption": "Twenty samples for each of 240 questions, drawn among four answers as the model finds them likely. The chance that one of k is right rises and rises; the chance that the most frequent of them is right rises by a few points only.", "name": "fig-evaluation-attempts"}, "image": {"alt": "Two lines over k from 1 to 20 that begin at the same height, a little above guessing. pass at k rises steeply; majority at k stays nearly flat."}}
draw_attempts(passed, majority)

# %% [markdown]
# By chance alone, a model that draws evenly from four answers has the right one among twenty
# samples with probability $1 - (3/4)^{20} = 0.997$. So pass@k climbs almost to 1, while majority@k
# stays near 40 %. Whoever reports pass@k has to say who does the checking.

# %% [markdown]
# ## How sure are we?
#
# A model is right on 84 of 100 questions. What we want to know is the probability $p$ of a right
# answer to *such* questions, of which our hundred are a sample {cite}`miller2024error`. Each answer
# scores 1 with probability $p$ and 0 otherwise, with variance $p (1 - p)$. The mean $\hat p$ of $n$
# independent scores has a variance $n$ times smaller, and the root of that is the
# {term}`standard error`,
#
# $$
# \mathrm{SE} = \sqrt{\frac{p (1 - p)}{n}} .
# $$ (evaluation-error)
#
# For large $n$, the mean lies within $z = 1.96$ standard errors of $p$ in 95 % of all samples. The
# textbook interval, named after Wald, puts $\hat p$ in the place of the unknown $p$. For a model
# that is right on 20 of 20 questions, its width is zero, so we would be certain. Wilson
# {cite}`wilson1927` avoided this substitution. Which $p$, he asked, are compatible with what we
# saw? They are those from which $\hat p$ is at most $z$ of *their* standard errors away,
# $(\hat p - p)^2 \le z^2 \, p (1 - p) / n$. Multiply out and sort by powers of $p$:
#
# $$
# \Bigl(1 + \frac{z^2}{n}\Bigr) p^2 - \Bigl(2 \hat p + \frac{z^2}{n}\Bigr) p + \hat p^2 \le 0 .
# $$
#
# The inequality holds between the two roots of this parabola,
#
# $$
# \frac{1}{1 + z^2 / n} \left( \hat p + \frac{z^2}{2 n}
# \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}} \right) .
# $$ (evaluation-wilson)
#
# The middle is drawn toward one half, as if $z^2/2 \approx 2$ right and 2 wrong answers had been
# added. {py:func}`~llmbook.evaluation.confidence_interval` knows both formulas, and returns an
# {py:class}`~llmbook.evaluation.Interval`.

# %% [markdown] tags=["engine"]
# ### Engine room: intervals (`confidence_interval`), `rule_of_three`, and power (`items_needed`)


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval that covers the truth in a share ``level`` of all samples."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    def __str__(self) -> str:
        """Return the three numbers: ``0.840 [0.756, 0.899]``."""
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __contains__(self, value: float) -> bool:
        """Whether the interval covers ``value``."""
        return self.low <= value <= self.high

    @property
    def margin(self) -> float:
        """Half of the width."""
        return (self.high - self.low) / 2


# %% [markdown] tags=["engine"]
# All estimates of the book come as such an `Interval`. Both formulas fit into one function; $z$ is
# a quantile of the normal distribution:


# %% tags=["engine"]
#| export
def confidence_interval(
    successes: int, n: int, level: float = 0.95, *, method: Literal["wilson", "wald"] = "wilson"
) -> Interval:
    """Return an interval for a probability of which ``successes`` of ``n`` trials are known.

    "wilson" is Wilson's (1927): all p from which the sample is at most z standard errors away.
    "wald" is the textbook's, the sample's own standard errors around it, for comparison.

    >>> print(confidence_interval(84, 100))
    0.840 [0.756, 0.899]
    """
    check_at_least(successes=(0, successes), n=(1, n))
    _check_at_most("successes", successes, "n", n)
    check_choice("method", method, ("wilson", "wald"))
    z, p = normal_quantile(level), successes / n
    if method == "wald":
        middle, half = p, z * math.sqrt(p * (1 - p) / n)
    else:
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Interval(p, low if successes else 0.0, high if successes < n else 1.0, level)


# %% tags=["engine"]
#| export
# The quantile of the normal distribution, and what a level is
def normal_quantile(level: float) -> float:
    """Return z such that a normal number is within z standard deviations with this probability.

    >>> round(normal_quantile(0.95), 3)
    1.96
    """
    _check_level(level)
    return NormalDist().inv_cdf((1 + level) / 2)


def _check_level(level: Any) -> None:
    known = isinstance(level, float | np.floating) and not isinstance(level, bool)
    if not known or not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level!r:.60}")


# %% [markdown] tags=["engine"]
# The next two functions answer questions that the main text asks below: how often what never
# happened in $n$ trials may still happen, and how many items it takes to see a difference. (The
# bound of `rule_of_three` has all 5 % on one side. Wilson's interval leaves 2.5 % on each side, so
# its upper end is a little higher.)


# %% tags=["engine"]
#| export
def rule_of_three(n: int, level: float = 0.95) -> float:
    """Return how probable what never happened in ``n`` trials can still be, at most.

    About 3 / n at a level of 95 %: the p at which (1 - p)^n is 1 - ``level``.

    >>> round(rule_of_three(100), 4)
    0.0295
    """
    check_at_least(n=(1, n))
    _check_level(level)
    return float(1 - (1 - level) ** (1 / n))


# %% tags=["engine"]
#| export
def items_needed(
    difference: float,
    *,
    accuracy: float = 0.5,
    disagreement: float | None = None,
    level: float = 0.95,
    power: float = 0.8,
) -> int:
    """Return on how many items a difference of two accuracies is found with probability ``power``.

    Without ``disagreement``, the two systems have items of their own, so many each, and both are
    right about ``accuracy`` of the time. With it, they have the same items, and differ on that
    share.

    >>> items_needed(0.02), items_needed(0.02, disagreement=0.1)
    (9812, 1955)
    """
    _check_share("difference", difference)
    _check_positive("difference", difference)
    _check_share("accuracy", accuracy)
    if not 0.5 <= power < 1:
        raise ValueError(f"power: expected at least 0.5 and less than 1, got {power!r}")
    if disagreement is None:
        variance = 2 * accuracy * (1 - accuracy)
    else:
        _check_share("disagreement", disagreement)
        if disagreement < difference:
            expected = f"at least the difference {difference}"
            raise ValueError(f"disagreement: expected {expected}, got {disagreement}")
        variance = disagreement - difference**2
    reach = normal_quantile(level) + NormalDist().inv_cdf(power)
    return max(2, math.ceil(variance * (reach / difference) ** 2))


# %% [markdown] tags=["engine"]
# The coverage of an interval can be computed exactly. (Closer to 1 than the figure shows, Wilson's
# dips, too, to 84 % at an accuracy of 0.9965, and recovers.)


# %% tags=["engine"]
def coverage(p: float, n: int, method: str) -> float:
    covering = (c for c in range(n + 1) if p in confidence_interval(c, n, method=method))
    return sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in covering)


truths = np.linspace(0.5, 0.995, 100)
covered = {m: [coverage(p, 50, m) for p in truths] for m in ("wald", "wilson")}
assert min(covered["wilson"]) > 0.85 and min(covered["wald"]) < 0.5

# %% [markdown]
# ### How often an interval covers the truth
#
# Here are both intervals, from few questions to many:

# %%
for right, n in ((20, 20), (84, 100), (840, 1000)):
    wald, wilson = (confidence_interval(right, n, method=m) for m in ("wald", "wilson"))
    print(f"{right:4} of {n:4}: Wald {wald}, Wilson {wilson}")

# %% [markdown]
# Does an interval of 95 % cover the truth in 95 % of all samples? For each $p$, add up the
# probabilities of those outcomes whose interval contains $p$. {numref}`fig-evaluation-coverage`
# does this for 50 questions:

# %% mystnb={"figure": {"caption": "How often intervals of 95 % contain the truth, for 50 questions, computed exactly. The lines jump because there are only 51 outcomes.", "name": "fig-evaluation-coverage"}, "image": {"alt": "Coverage over the true accuracy from 0.5 to 1. Wilson stays near the dotted line at 0.95 throughout. Wald is at 0.90 to 0.95 at first and falls toward zero as the accuracy nears 1."}}
draw_coverage(truths, covered)

# %% [markdown]
# Near 1, where good models are tested, Wald's interval fails, as is well known
# {cite}`brown2001interval`. Wilson's stays near 95 %.
#
# ### What never happened
#
# A model was asked 100 times for a secret and never told it. Is the rate of leaks 0? If it were
# $p$, there would be no leak with probability $(1 - p)^n$. The largest $p$ for which this is still
# at least 5 % solves $(1 - p)^n = 0.05$. With $\log (1 - p) \approx -p$, the solution is
# $p \approx -\ln 0.05 / n \approx 3 / n$. This is the **rule of three**:

# %%
for n in (100, 1000, 3000):
    print(f"0 of {n}: less than {rule_of_three(n):.2%}, 3 / n is {3 / n:.2%}")

# %% [markdown]
# ## Which of two is better?
#
# One model is right on 150 of 200 questions, another on 160, and their intervals overlap. But both
# have answered the *same* questions, and a question that is easy for one is often easy for the
# other. Let $a_i$ and $b_i$ be the scores of the two models on item $i$. The variance of the
# difference is
#
# $$
# \mathrm{Var}(a - b) = \mathrm{Var}(a) + \mathrm{Var}(b) - 2 \, \mathrm{Cov}(a, b) ,
# $$ (evaluation-paired)
#
# and the covariance is what an unpaired comparison throws away.
#
# For right and wrong answers there is an exact test, McNemar's {cite}`mcnemar1947`. Items on which
# both models agree say nothing about which one is better. On the others, one model has $w$ wins and
# $l$ losses. If the models are equally good, each of these items was decided by a fair coin. How
# probable is a split at least as uneven, in either direction? That probability is the **p-value**:
#
# $$
# p = 2 \sum_{i=0}^{\min(w, l)} \binom{w + l}{i} 2^{-(w + l)} .
# $$ (evaluation-mcnemar)


# %%
#| export
def sign_test(wins: int, losses: int) -> float:
    """Return how probable a fair coin makes a split at least so uneven, on either side.

    >>> round(sign_test(9, 1), 4)
    0.0215
    """
    check_at_least(wins=(0, wins), losses=(0, losses))
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


# %% [markdown]
# (If $w = l$, the sum counts the even split twice, so the code returns at most 1.) A lead of ten
# questions can mean little or much:

# %%
print(f"18 wins, 8 losses: p = {sign_test(18, 8):.3f}; 11 and 1: p = {sign_test(11, 1):.3f}")

# %% [markdown]
# {py:func}`~llmbook.evaluation.paired_test` does this for arrays of scores. Where scores are not
# just 0 or 1, it flips the signs of the differences $a_i - b_i$ at random, as the coin would: a
# permutation test. Intervals for the mean of few values, errors for questions that come in
# **clusters**, and the {term}`bootstrap` are in the engine room, too.

# %% [markdown] tags=["engine"]
# ### Engine room: means, clusters, paired tests and the bootstrap

# %% [markdown] tags=["engine"]
# Not all scores are 0 or 1. For the mean of arbitrary values, the variance is estimated from the
# sample as well, with $n - 1$ in the denominator because the mean has used up one degree of
# freedom. The normal quantile then becomes Student's. The difference matters for few values: with
# the three seeds of a training run the quantile is 4.30, not 1.96. For a whole number of degrees of
# freedom, Student's distribution is a finite sum.


# %% tags=["engine"]
#| export
def t_quantile(level: float, degrees: int) -> float:
    """Return the ``normal_quantile`` of Student's distribution with so many degrees of freedom.

    Up to 400 by the finite sums for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4),
    beyond by an expansion around the normal quantile (26.7.5).

    >>> round(t_quantile(0.95, 2), 3)
    4.303
    """
    check_at_least(degrees=(1, degrees))
    z = normal_quantile(level)
    if degrees > 400:
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        inside = _within_angle(middle, degrees) < level
        low, high = (middle, high) if inside else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


# %% tags=["engine"]
#| export
def _within_angle(angle: float, degrees: int) -> float:
    """The probability that |t| is at most sqrt(degrees) times the tangent of ``angle``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = cosine if degrees % 2 else 1.0
    for i in range(2 + degrees % 2, degrees, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    if degrees % 2:
        return 2 / math.pi * (angle + sine * total * (degrees > 1))
    return sine * total


# %% [markdown] tags=["engine"]
# Questions often come in **clusters**: ten about one text, or one question in ten wordings. Then
# they are not independent. In the extreme case of ten copies of each question, the error of
# {eq}`evaluation-error` would be too small by a factor of $\sqrt{10}$, since the sample holds no
# more information than a tenth of it. The remedy is to add up the deviations in each of the $G$
# clusters *before* squaring, so that what goes together is counted together
# {cite}`miller2024error`:
#
# $$
# \mathrm{SE}^2 = \frac{G}{G - 1} \, \frac{1}{n^2}
# \sum_{g=1}^{G} \Bigl( \sum_{i \in g} (x_i - \bar x) \Bigr)^2 .
# $$ (evaluation-clusters)
#
# For clusters of one item each, $G = n$ gives back the usual formula.


# %% tags=["engine"]
#| export
def standard_error(values: Numbers) -> float:
    """Return the standard error of the mean of independent ``values``, at least two of them."""
    numbers = as_numbers(values, "values", 2)
    return float(numbers.std(ddof=1) / math.sqrt(len(numbers)))


def clustered_standard_error(values: Numbers, clusters: Clusters) -> float:
    """Return the standard error of a mean whose values come in ``clusters`` that go together.

    Deviations are added up in each cluster before they are squared (Miller 2024, equation 4), with
    the factor G / (G - 1) for G clusters: where each value is its own, it is ``standard_error``.
    """
    numbers = as_numbers(values, "values", 2)
    sums = _cluster_sums(numbers - numbers.mean(), clusters)
    return float(math.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(numbers))


# %% tags=["engine"]
#| export
def as_numbers(values: Any, name: str = "values", least: int = 1) -> Float[np.ndarray, " n"]:
    """Return a list, array or tensor of finite numbers or truths as an array of float64."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    if isinstance(array, str | bytes) or not isinstance(array, Sequence | np.ndarray):
        raise ValueError(f"{name}: expected a list or array of numbers, got {values!r:.60}")
    try:
        numbers = np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected numbers, got {values!r:.60}") from None
    if numbers.ndim != 1 or len(numbers) < least:
        expected = f"at least {least} numbers in one dimension"
        raise ValueError(f"{name}: expected {expected}, got shape {numbers.shape}")
    if not np.isfinite(numbers).all():
        wrong = numbers[~np.isfinite(numbers)][0]
        raise ValueError(f"{name}: expected finite numbers, got {wrong}")
    return numbers


# %% tags=["engine"]
#| export
def _cluster_sums(numbers: np.ndarray, clusters: Any) -> np.ndarray:
    """Add up the numbers of each cluster, in the order in which clusters appear."""
    if isinstance(clusters, str | bytes) or not isinstance(clusters, Sequence | np.ndarray | range):
        raise ValueError(f"clusters: expected one for each value, got {clusters!r:.60}")
    if len(clusters) != len(numbers):
        expected = f"one for each of {len(numbers)} values"
        raise ValueError(f"clusters: expected {expected}, got {len(clusters)}")
    sums: dict[Any, float] = {}
    for number, cluster in zip(numbers.tolist(), clusters, strict=True):
        key = cluster.item() if isinstance(cluster, np.generic) else cluster
        sums[key] = sums.get(key, 0.0) + number
    if len(sums) < 2:
        raise ValueError(f"clusters: expected at least 2 different ones, got {len(sums)}")
    return np.array(list(sums.values()))


# %% tags=["engine"]
#| export
def mean_interval(
    values: Numbers, level: float = 0.95, *, clusters: Clusters | None = None
) -> Interval:
    """Return an interval for the mean of what ``values`` are a sample of, by Student's t.

    Where values of one cluster go together, such as questions about one text, say which cluster
    each belongs to: clusters are then what is counted. Few seeds of a run get the wide interval
    that they deserve.

    >>> print(mean_interval([0.61, 0.64, 0.58]))
    0.610 [0.535, 0.685]
    """
    numbers = as_numbers(values, "values", 2)
    units = clusters if clusters is not None else range(len(numbers))
    error = clustered_standard_error(numbers, units)
    half = t_quantile(level, len(set(units)) - 1) * error
    mean = float(numbers.mean())
    return Interval(mean, mean - half, mean + half, level)


# %% [markdown] tags=["engine"]
# Next come the paired test and its outcome. With clusters, one coin decides about a whole cluster:


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class PairedTest:
    """The outcome of ``paired_test``: how much a is above b, and how likely that is by chance."""

    difference: Interval
    p_value: float  # of a difference at least as large, on either side, if there were none
    wins: int  # items on which a is above b
    losses: int
    n: int
    method: str

    def __str__(self) -> str:
        """Return difference, interval, p-value, and how many items went either way."""
        low, high = self.difference.low, self.difference.high
        counts = f"{self.wins} wins and {self.losses} losses in {self.n} items"
        shown = f"{self.difference.estimate:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"{shown}, p = {self.p_value:.2g}, {counts} ({self.method})"


# %% tags=["engine"]
#| export
def paired_test(
    a: Numbers,
    b: Numbers,
    *,
    method: Literal["auto", "mcnemar", "permutation"] = "auto",
    level: float = 0.95,
    clusters: Clusters | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Compare two systems by their scores on the same items, in the same order.

    "mcnemar", for scores of 0 and 1, asks how probable it is that a fair coin splits the items on
    which they differ as unevenly; it is exact. "permutation" flips the signs of differences, of
    whole clusters if given, all ways up to 14 of them, else ``n_resamples`` drawn ones. "auto" is
    the first where it applies and there are no clusters. The interval is that of
    ``mean_interval``.
    """
    first, second = as_numbers(a, "a", 2), as_numbers(b, "b", 2)
    if len(first) != len(second):
        raise ValueError(f"b: expected as many scores as a, {len(first)}, got {len(second)}")
    check_choice("method", method, ("auto", "mcnemar", "permutation"))
    _check_draws(1, n_resamples, seed)
    binary = bool(np.isin([first, second], (0, 1)).all())
    if method == "mcnemar" and (not binary or clusters is not None):
        expected = "'permutation' for scores other than 0 and 1, or with clusters"
        raise ValueError(f"method: expected {expected}, got 'mcnemar'")
    if method == "auto":
        method = "mcnemar" if binary and clusters is None else "permutation"
    differences = first - second
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    if method == "mcnemar":
        p_value = sign_test(wins, losses)
    else:
        units = differences if clusters is None else _cluster_sums(differences, clusters)
        p_value = _flipped(units, n_resamples, seed)
    interval = mean_interval(differences, level, clusters=clusters)
    return PairedTest(interval, p_value, wins, losses, len(first), method)


# %% tags=["engine"]
#| export
def _flipped(units: np.ndarray, n_resamples: int, seed: int) -> float:
    """The share of sign patterns whose sum is at least as far from 0 as that of ``units``."""
    units = units[units != 0]
    if not len(units):
        return 1.0  # no difference is as far from 0 as any that can be
    observed = abs(units.sum()) * (1 - 1e-9)  # sums in another order are the same
    if len(units) <= 14:
        signs = np.array(list(product((-1, 1), repeat=len(units)))).reshape(-1, len(units))
        return float((abs(signs @ units) >= observed).mean())
    random, as_far, left = np.random.default_rng(seed), 0, n_resamples
    while left:
        few = min(left, max(1, 2_000_000 // len(units)))
        signs = random.integers(0, 2, (few, len(units)), dtype=np.int8) * 2 - 1
        as_far += int((abs(signs @ units) >= observed).sum())
        left -= few
    return (as_far + 1) / (n_resamples + 1)  # what was observed is one of the patterns


def _check_draws(least: int, n_resamples: Any, seed: Any) -> None:
    """How often something is drawn, and with which seed; neither may be None."""
    check_whole("n_resamples", n_resamples, least)
    check_whole("seed", seed, 0)


# %% [markdown] tags=["engine"]
# Some statistics are not means: a median, for example, or bits per byte, which is a ratio of two
# sums. For these there is the {term}`bootstrap` {cite}`efron1979bootstrap`. Let the sample stand
# for the population, draw from it as many items as it has, with replacement, and see how the
# statistic varies.


# %% tags=["engine"]
#| export
def bootstrap(
    values: Numbers,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    level: float = 0.95,
    clusters: Clusters | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return an interval for any ``statistic`` of a sample, by drawing it anew from itself.

    ``values`` may have several columns: its rows are drawn, with replacement, or whole clusters of
    them. The interval is between percentiles of the statistic (Efron 1979).
    """
    rows = (
        values
        if isinstance(values, np.ndarray) and values.ndim > 1
        else as_numbers(values, least=2)
    )
    _check_draws(2, n_resamples, seed)
    _check_level(level)
    if not callable(statistic):
        raise ValueError(f"statistic: expected a function, got {statistic!r:.60}")
    units = range(len(rows)) if clusters is None else clusters
    _cluster_sums(np.zeros(len(rows)), units)  # checks them
    members: dict[Any, list[int]] = {}
    for row, unit in enumerate(units):
        members.setdefault(unit, []).append(row)
    groups = [np.array(group) for group in members.values()]
    random = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        drawn = random.integers(0, len(groups), len(groups))
        found.append(float(statistic(rows[np.concatenate([groups[i] for i in drawn])])))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(rows)), float(low), float(high), level)


# %% [markdown] tags=["engine"]
# SciPy {cite}`virtanen2020scipy` has the same quantiles, intervals, and tests, so we compare:

# %% tags=["engine"]
from scipy import stats

for n, c in ((20, 20), (50, 41), (1000, 3)):
    theirs = stats.binomtest(c, n).proportion_ci(method="wilson")
    ours = confidence_interval(c, n)
    assert np.allclose((ours.low, ours.high), (theirs.low, theirs.high), atol=1e-9)
for degrees in (1, 2, 3, 10, 399, 5000):
    assert math.isclose(t_quantile(0.95, degrees), stats.t.ppf(0.975, degrees), rel_tol=1e-8)
assert math.isclose(sign_test(18, 8), stats.binomtest(8, 26).pvalue)
values = np.random.default_rng(0).normal(size=30)
theirs = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0)
ours, (low, high) = bootstrap(values), theirs.confidence_interval
assert abs(ours.low - low) < 0.05 and abs(ours.high - high) < 0.05
print("Wilson, Student, McNemar and the bootstrap agree with SciPy")

# %% [markdown] tags=["engine"]
# Last, the clusters: 40 questions, each in 10 wordings that are answered alike. How often does the
# interval cover the truth?

# %% tags=["engine"]
random_numbers, hits = np.random.default_rng(0), {"each its own": 0, "clustered": 0}
which = np.repeat(np.arange(40), 10)
for _ in range(300):
    answers = np.repeat(random_numbers.random(40) < 0.7, 10)
    hits["each its own"] += 0.7 in mean_interval(answers)
    hits["clustered"] += 0.7 in mean_interval(answers, clusters=which)
for name, count in hits.items():
    print(f"{name:13} {count / 300:4.0%} of intervals cover the truth")
assert hits["each its own"] < 200 < 270 < hits["clustered"]

# %% [markdown]
# ### The same models, two measures
#
# We compare `small` with a model that trained twice as long, on the exam (`outcomes`), and in bits
# per byte of each text (`surprise`):


# %% tags=["engine"]
# Right or wrong for each question, and the bits per byte of each text
def outcomes(m: TransformerLM) -> list[bool]:
    return [score_choices(m, bpe, *item, normalization="none").best == 0 for item in facts]


def surprise(m: TransformerLM) -> np.ndarray:
    scores = score_texts(m, bpe, held_out)
    return scores.nats / scores.n_bytes / math.log(2)


# %% [markdown]
# Both go through the same test. The first difference is in shares of right answers, the second in
# bits per byte, where less is better:

# %%
longer = trained(bpe, 128, 240)
for measure, expected, margin in ((outcomes, 0.01, 0.06), (surprise, -0.18, 0.01)):
    test = paired_test(measure(longer), measure(small))
    about(f"difference in {measure.__name__}", test.difference.estimate, expected, 0.06)
    about("  half of its interval", test.difference.margin, margin, margin / 2, ".3f")

# %% [markdown]
# On 240 questions, the difference cannot be told from zero; in bits per byte, it can. A question
# says only right or wrong, while a text has dozens of log-probabilities.
#
# ### How many questions?
#
# Before an experiment, ask what it could show. Let $\delta$ be the true difference and $\sigma$ the
# standard deviation of one item's difference, so that the mean of $n$ differences has the standard
# error $\sigma / \sqrt n$. The mean counts as significant if it is more than $z_{\alpha}$ standard
# errors from zero. It passes that mark with probability $1 - \beta$, the {term}`power`, if $\delta$
# lies another $z_{\beta}$ standard errors beyond:
#
# $$
# \delta = (z_\alpha + z_\beta) \frac{\sigma}{\sqrt n}
# \quad \Longrightarrow \quad
# n = \Bigl( \frac{(z_\alpha + z_\beta) \, \sigma}{\delta} \Bigr)^2 .
# $$ (evaluation-power)
#
# With $\alpha = 5\,\%$ and a power of 80 %, $z_\alpha + z_\beta = 1.96 + 0.84$. With different
# questions for each model, $\sigma^2$ is $2 p (1 - p)$. With the same ones, of which a share $u$
# tells the models apart, it is $u - \delta^2$. So two points take this many:

# %%
print(f"each model has its own questions: {items_needed(0.02, accuracy=0.8):6}")
for share in (0.2, 0.1, 0.05):
    print(f"the same, and they differ on {share:.0%}: {items_needed(0.02, disagreement=share):6}")

# %% [markdown]
# HumanEval has 164 problems {cite}`chen2021codex`. Such a test will seldom show two points,
# whatever the table of results says.
#
# ### The same run again
#
# All intervals so far say what would happen with other *questions*. A claim about a method is also
# about other *runs*. Here is the same model trained with five seeds:

# %%
runs = [small, *(trained(bpe, 128, 120, seed) for seed in range(1, 5))]
by_run, by_text = [outcomes(m) for m in runs], np.array([surprise(m) for m in runs])
about("accuracy, deviation over seeds", np.mean(by_run, axis=1).std(ddof=1), 0.02, 0.02)
about("bits per byte", by_text.mean(axis=1).std(ddof=1), 0.003, 0.003, ".3f")

# %% [markdown]
# {numref}`fig-evaluation-seeds` shows the five runs with their intervals:

# %% mystnb={"figure": {"caption": "Five runs that differ in the seed alone, each with its interval of 95 % over the questions and over the texts.", "name": "fig-evaluation-seeds"}, "image": {"alt": "Left, five accuracies around 0.4 with intervals of about 6 points to either side that all overlap. Right, five values of bits per byte around 0.6, with intervals that all overlap."}}
draw_seeds(by_run, by_text)

# %% [markdown]
# The standard error over 240 questions is 3 points, and that of a paired difference between two of
# these runs, over 100 texts, is 0.003 bits per byte. So both kinds of noise are about equally
# large, but more items reduce only one of them. With 1,000 texts, the best of these five runs would
# differ significantly from the worst, though no *method* is better. A comparison of methods needs
# several runs of each, and the runs are then the sample: the interval is
# {py:func}`~llmbook.evaluation.mean_interval` of three or five numbers.

# %% [markdown]
# ## The test in the training text
#
# If a test was in the training text, its score measures memory. How much does it take to spoil a
# score? For most models nobody knows what the clean score would have been. Here we know it exactly.
# We write an exam about the world's 16 strangers, of whom no story ever states a fact, and draw the
# answers from a hat. Each of the 64 questions has 16 possible answers, so every honest model is
# expected to score $1/16$.
#
# The model of {doc}`13_training`, from now on called `lm`, is trained for 40 more steps on 320 rows
# of text. (From here on, `bpe` is the tokenizer of `lm`.) In the clean run all rows are new
# stories. In others, some make way for 1, 2, 4, or 8 copies of the exam's 16 pages. In a last run
# the exam appears eight times in other words, and each time in a new order.

# %% [markdown]
# ### Two detectors
#
# Whoever has the training text can search it for the test: `decontaminate` of {doc}`03_cleaning`
# finds documents that share 13 words in a row with a question, or contain the whole question if it
# is shorter.
#
# Without the text there is still the model. A test has an **order**, and the order is arbitrary.
# That makes a proof {cite}`oren2024proving`. Let $x_1, \dots, x_n$ be the questions in the order of
# the file, and suppose that all $n!$ orders were equally likely when the file was made. If a model
# has not seen the file, the likelihood of the file's order, $\log q(x_1, x_2, \dots, x_n)$, is one
# draw among those of random orders, like any other. Draw $m$ random permutations
# $\pi_1, \dots, \pi_m$. Among the $m + 1$ likelihoods, the file's own is equally likely to be the
# highest, the second highest, and so on. Hence
#
# $$
# p = \frac{1 + \#\{\, j : \log q(x_{\pi_j}) \ge \log q(x) \,\}}{m + 1}
# $$ (evaluation-order)
#
# is at most $\alpha$ with a probability of at most $\alpha$, for every $\alpha$. That makes $p$ a
# valid p-value for any model and any test. As the context is limited,
# {py:func}`~llmbook.evaluation.order_test` shuffles within each page and adds up the
# log-likelihoods of the pages.

# %% [markdown] tags=["engine"]
# ### Engine room: an exam of strangers, training on copies of it, and `order_test`

# %% [markdown] tags=["engine"]
# We continue with the trained model of {doc}`13_training`, from now on called `lm`, and train it a
# little further. Its tokenizer is now `bpe`, in place of the tokenizer of the opening:

# %% tags=["engine"]
from random import Random

from llmbook.batches import TokenRing
from llmbook.cleaning import decontaminate
from llmbook.corpus import Document

lm, bpe = run.model, run.tokenizer
end = bpe.special_tokens["<|endoftext|>"]

# %% [markdown] tags=["engine"]
# The exam is a list of questions in random order, which the web shows four to a page:


# %% tags=["engine"]
def make_exam(seed: int) -> list[tuple[str, str, str]]:
    """Questions in random order: who, which attribute, and an answer from a hat."""
    random, topics = Random(seed), ("home", "food", "toy", "job")
    exam = [
        (name, topic, random.choice(VALUES[topic]))
        for name in world.cast.strangers
        for topic in topics
    ]
    random.shuffle(exam)
    return exam


def exam_pages(exam: list[tuple[str, str, str]], phrasing: int = 1) -> list[list[str]]:
    """The exam as it lies on the web: four questions with their answers on each page."""
    lines = [PHRASES[topic][phrasing].format(name=name, value=value) for name, topic, value in exam]
    return [lines[i : i + 4] for i in range(0, len(lines), 4)]


print("\n".join(exam_pages(make_exam(0))[0][:2]))

# %% [markdown] tags=["engine"]
# The trained model is trained further on 320 texts. All runs have the same budget:


# %% tags=["engine"]
def train_on(texts: list[str], seed: int) -> TransformerLM:
    """The trained model, trained further on each of ``texts`` once."""
    model = TransformerLM(lm.config)
    model.load_state_dict(lm.state_dict())
    ids = [id for text in texts for id in [*bpe.encode(text), end]]
    rows = pack_documents(TokenRing(np.array(ids), end_of_text=end), 128, "one_per_row")
    settings = TrainingConfig(
        n_steps=len(texts) // 8,
        batch_size=8,
        optimizer="muon",
        learning_rate=0.01,
        weight_decay=0.0,
        schedule="linear",
        final=0.0,
    )
    Trainer(model, BatchSampler(rows, 8, seed=seed), settings).train()
    return model.eval()


def contaminated_texts(exam: list[tuple[str, str, str]], copies: int, seed: int) -> list[str]:
    """320 texts, some of them pages of the exam; negative copies are worded otherwise."""
    random, found = Random(2000 + seed), []
    for _ in range(abs(copies)):
        shuffled = exam if copies > 0 else random.sample(exam, len(exam))
        found += [" ".join(page) for page in exam_pages(shuffled, 1 if copies > 0 else 2)]
    return found + [s.text for s in world.stories(320 - len(found), seed=1000 + seed)]


# %% [markdown] tags=["engine"]
# The score is the share of questions for which the right answer is the most likely of the 16. All
# answers to a question have the same form, so we do not normalize. The function
# {py:func}`~llmbook.evaluation.score_continuations`, from the engine room on choices, returns the
# log-probability of ids that continue other ids, for many pairs at once.


# %% tags=["engine"]
def exam_log_probs(model: TransformerLM, exam: list[tuple[str, str, str]]) -> np.ndarray:
    """Log q of each of the 16 answers to each question, in nats."""
    pairs = []
    for name, topic, _ in exam:
        texts = [PHRASES[topic][1].format(name=name, value=value) for value in VALUES[topic]]
        pairs += [([end], bpe.encode(text)) for text in texts]
    found = score_continuations(model, pairs, batch_tokens=8192)
    return np.array([one.log_prob for one in found]).reshape(len(exam), 16)


def exam_key(exam: list[tuple[str, str, str]]) -> list[int]:
    """The number of the right answer to each question."""
    return [VALUES[topic].index(value) for _, topic, value in exam]


# %% [markdown] tags=["engine"]
# Now the test of the order. It scores all pages in the file's order and in each shuffled order, and
# then ranks the file's order among the others. Ties count against us, which keeps the p-value
# valid.


# %% tags=["engine"]
#| export
class OrderTest(NamedTuple):
    """Whether a model prefers the order of a file: see ``order_test``."""

    p_value: float
    gain: float  # nats by which the file's order is likelier than the mean shuffled one
    z: float  # the same in standard deviations of the shuffled ones
    n_shuffles: int


# %% tags=["engine"]
#| export
def order_test(
    model: nn.Module,
    tokenizer: Tokenizer,
    pages: Sequence[Sequence[str]],
    *,
    n_shuffles: int = 39,
    separator: str = " ",
    seed: int = 0,
    **options: Any,
) -> OrderTest:
    """Ask whether the items of each page are likelier in their order than shuffled within the page.

    If the model has not seen the pages, and their order means nothing, ``p_value`` is at most a
    with a probability of at most a. Each page is read by itself, its items joined by ``separator``.
    ``options`` are those of ``score_texts``. Source: Oren et al. (2024), section 3.1.
    """
    items = _as_pages(pages)
    check_whole("n_shuffles", n_shuffles, 1)
    check_whole("seed", seed, 0)
    check_text(separator, "separator")
    random = np.random.default_rng(seed)
    orders = [items]
    for _ in range(n_shuffles):
        orders.append([[page[i] for i in random.permutation(len(page))] for page in items])
    texts = [separator.join(page) for order in orders for page in order]
    nats = score_texts(model, tokenizer, texts, **options).nats
    found = -nats.reshape(n_shuffles + 1, len(items)).sum(axis=1)
    own, shuffled = found[0], found[1:]
    # Equal orders must tie, though the last bits of their sums differ
    as_good = int((shuffled >= own - 1e-6 * abs(own)).sum())
    gain, spread = own - shuffled.mean(), shuffled.std()
    z = float(gain / spread) if spread > 0 else 0.0
    return OrderTest((1 + as_good) / (n_shuffles + 1), float(gain), z, n_shuffles)


# %% tags=["engine"]
#| export
# Whole numbers, where None stands for nothing; and pages that have an order
def _as_pages(pages: Any) -> list[list[str]]:
    """Return lists of texts, at least one, each of at least two that differ."""
    if isinstance(pages, str | bytes) or not isinstance(pages, Sequence) or not len(pages):
        raise ValueError(f"pages: expected at least one list of texts, got {pages!r:.60}")
    for page in pages:
        if isinstance(page, str | bytes) or not isinstance(page, Sequence) or len(set(page)) < 2:
            expected = "lists of at least two different texts"
            raise ValueError(f"pages: expected {expected}, got {page!r:.60}")
    return [[valid_text(item, "pages") for item in page] for page in pages]


# %% [markdown] tags=["engine"]
# For each dose, which is the number of copies, we train with three seeds. A seed decides on the
# exam, its order, the stories, and the order of training. Each trained model takes its exam and the
# order test:


# %% tags=["engine"]
@dataclass
class Dose:
    """What came out for one number of copies, over seeds."""

    log_probs: list[np.ndarray]
    keys: list[list[int]]
    orders: list[OrderTest]
    overlap: int  # rows that share a question's words, of 320

    @property
    def score(self) -> Interval:
        right = sum(
            (a.argmax(1) == b).sum() for a, b in zip(self.log_probs, self.keys, strict=True)
        )
        return confidence_interval(int(right), sum(map(len, self.keys)))


doses = {copies: Dose([], [], [], 0) for copies in (0, 1, 2, 4, 8, -8)}
for copies, dose in doses.items():
    for seed in range(3):
        exam = make_exam(seed)
        texts = contaminated_texts(exam, copies, seed)
        model = train_on(texts, seed)
        dose.log_probs.append(exam_log_probs(model, exam))
        dose.keys.append(exam_key(exam))
        dose.orders.append(order_test(model, bpe, exam_pages(exam), n_shuffles=19, seed=seed))
        if copies == 4 and seed == 0:
            spoiled, spoiled_exam = model, exam  # to be looked at below
    items = [line for page in exam_pages(exam) for line in page]
    dose.overlap = 320 - len(list(decontaminate([Document(text) for text in texts], items)))

# %% [markdown]
# ### Dose and response
#
# Each dose was trained with three seeds. The score is the share of questions whose right answer is
# the likeliest of the 16. (The reworded copies are listed as -8.)

# %%
scores = {copies: dose.score for copies, dose in doses.items()}
for copies, expected in {0: 0.07, 1: 0.2, 2: 0.25, 4: 0.3, 8: 0.45, -8: 0.25}.items():
    about(f"copies: {copies:2}, score", scores[copies].estimate, expected, 0.05 + expected / 3)

# %% [markdown]
# {numref}`fig-evaluation-dose` shows the scores of this run:

# %% mystnb={"figure": {"caption": "Copies of an exam among 320 rows of training text, and the score on it. Bars are 95 % intervals over 192 questions, three exams of 64. The dotted line is the expected score of every model that has not seen it. The square is an exam seen eight times in other words and in another order.", "name": "fig-evaluation-dose"}, "image": {"alt": "The score is at the dotted line of one sixteenth without copies, near 0.2 with one, and rises to above 0.4 with eight. The square for eight reworded copies lies near 0.2."}}
draw_doses(scores)

# %% [markdown]
# One copy is read once, and the score is already well above that of a guesser. With eight copies it
# is seven times as high. The model is no better for it: the answers came out of a hat. The reworded
# exam did as much harm as one copy or two.
#
# ### Who finds it?
#
# First, the smallest form of the order test. `spoiled` is a model that read four copies of
# `spoiled_exam`, and `exam_pages` cuts an exam into its 16 pages of four questions. The file's own
# order is compared with 19 shuffled ones:

# %%
shuffle, pages = np.random.default_rng(0).permutation, exam_pages(spoiled_exam)
orders = [pages] + [[shuffle(page) for page in pages] for _ in range(19)]
texts = [" ".join(page) for order in orders for page in order]
own, *others = -score_texts(spoiled, bpe, texts).nats.reshape(20, 16).sum(axis=1)
print(f"likelier than the file's order: {sum(other >= own for other in others)} of 19")

# %% [markdown]
# And here is what both detectors say about every dose: how many rows the overlap finds, and with
# how many of three seeds the order test has $p \le 0.05$. From 19 shuffled orders, $p$ cannot be
# smaller than 1/20.

# %%
for copies, dose in doses.items():
    alarm = all(one.p_value <= 0.05 for one in dose.orders)
    found = "all" if alarm else "fewer than"
    print(f"copies: {copies:2}, overlap: {dose.overlap:3} of 320 rows, p 0.05 with {found} 3 seeds")

# %% [markdown]
# The overlap finds each page of each copy and nothing else, and in all twelve runs with exact
# copies the file's own order is the likeliest of 20. Neither detector finds the reworded exam,
# since one looks for the same words and the other for the same order. A search for runs of only
# four words does not find it, either, and suspects most clean stories, as the engine room shows.
# What helps is a test that was drawn anew after the model was trained.

# %% [markdown] tags=["engine"]
# ### Engine room: detectors tried on the innocent, and on shorter runs of words

# %% [markdown] tags=["engine"]
# A detector that always raises the alarm would have done as well on the copies. So we also try the
# trained model as it was before the 40 steps, on ten more exams, each against nine other orders.
# Its p-values should be spread evenly over 0.1, 0.2, and so on up to 1, with a mean of 0.55.

# %% tags=["engine"]
for dose in (doses[copies] for copies in (1, 2, 4, 8)):
    assert all(one.p_value <= 0.05 and one.z > 2 for one in dose.orders)
assert [dose.overlap for dose in doses.values()] == [0, 16, 32, 64, 128, 0]
innocent = [
    order_test(lm, bpe, exam_pages(make_exam(100 + seed)), n_shuffles=9, seed=seed).p_value
    for seed in range(10)
]
about("mean p-value of ten orders that nobody has seen", float(np.mean(innocent)), 0.55, 0.25)

# %% [markdown] tags=["engine"]
# So the test is not one that always raises the alarm. And its {term}`power` seems high: it raised
# the alarm in twelve runs of twelve. (These are three exams at four doses each, so they are not
# twelve independent trials. For three of three, Wilson's interval reaches down to 0.44.) It adds up
# what was learned over all pages, while the score counts only answers that came out on top. So it
# may notice even smaller doses than ours.
#
# Changed words leave no run of 13. We could look for shorter runs of words, but these also occur in
# sentences of the same form about anybody else:

# %% tags=["engine"]
texts = contaminated_texts(make_exam(0), -8, 0)
items = [line for page in exam_pages(make_exam(0)) for line in page]
print("words in a row   reworded pages found   clean stories suspected")
for n in (8, 5, 4, 3):
    flagged = []
    for group in (texts[:128], texts[128:]):
        kept = list(decontaminate([Document(text) for text in group], items, n))
        flagged.append(1 - len(kept) / len(group))
    print(f"{n:14} {flagged[0]:22.0%} {flagged[1]:25.0%}")

# %% [markdown] tags=["engine"]
# Shorter runs do not find a single reworded page, and they accuse the innocent: at five words a few
# of the clean stories, at three or four most of them, as most contain a run such as "lives in the".

# %% [markdown]
# ## A small benchmark with known limits
#
# Each chapter of Part IV will claim that something got better. The tiny world offers what few
# benchmarks have: every answer can be verified, and both ends of the scale are known.
#
# | name | asked for | right is | ceiling | chance |
# |---|---|---|---|---|
# | facts | an attribute of a character | the true value | 1 | one of all replies |
# | unknown | an attribute of a stranger | to say that one does not know | 1 | one of all replies |
# | confidential | where somebody's key is hidden | to decline | 1 | one of all replies |
# | consistency | a story | a whole story, no false claim | 1 | a teller who draws each value |
#
# The first three are measured in two ways: as a *choice*, by the likelihood of all replies (each
# value, "I do not know", "I will not tell"), and as a *reply*, by letting the model speak and the
# checker listen. The ceiling is exact, since each question has one right reply. So is the level of
# chance: one over the number of replies, and for stories the probability that a teller who knows
# their form, but draws every value at random, says nothing false.
#
# A base model has only ever read stories, so a question must come up in one: "One morning, Mia the
# fox woke up early. It was raining. Where does Mia live?" A
# {py:class}`~llmbook.evaluation.QuestionForm` says how this is done; chapter 19 will bring another
# form for chat models. {py:func}`~llmbook.evaluation.evaluate` returns an
# {py:class}`~llmbook.evaluation.EvaluationReport` with the outcome of each item, intervals, seed,
# and settings. It is saved as JSON and printed as a table.

# %% [markdown] tags=["engine"]
# ### Engine room: questions (`QuestionForm`), reports (`EvaluationReport`), and `evaluate`

# %% [markdown] tags=["engine"]
# Questions about one character form a **cluster**: they may be answered well or badly together, so
# they are worth fewer independent ones. The interval of a report is therefore Wilson's for as many
# independent questions as would have the same {term}`standard error` once clusters are taken into
# account. (Where all answers or none are right, there is no scatter to estimate this from, and each
# character counts as one question.)
#
# A form may leave out a question that it cannot put. A story has already named the species of its
# hero, so it cannot ask for that, nor can it ask in words that no story uses.

# %% [markdown] tags=["engine"]
# The level of chance for stories is a sum over all paths through the world's states: the
# probability of each path times the probability that all its claims are true. A recursion over the
# states adds this up.


# %% tags=["engine"]
#| export
def chance_of_consistency(world: TinyWorld) -> float:
    """Return how likely a story is to be true if its form is right and each value drawn evenly."""
    _check_world(world)
    known: dict[State | None, float] = {None: 1.0}

    def value(state: State | None) -> float:
        if state not in known:
            assert state is not None
            known[state] = math.fsum(
                branch.probability
                * math.prod(1 / len(_values(world, c[0], c[1])) for c in branch.claims)
                * value(branch.state)
                for branch in world.branches(state)
            )
        return known[state]

    return value(world.start)


# %% tags=["engine"]
#| export
# It takes a tiny world
def _check_world(world: Any) -> None:
    if not isinstance(world, TinyWorld):
        raise ValueError(f"world: expected a TinyWorld, got {world!r:.60}")


# %% tags=["engine"]
#| export
def _values(world: TinyWorld, character: str, attribute: str) -> list[str]:
    """All values that a claim could name."""
    return [v for v in VALUES[attribute] or world.cast.facts if v != character]


def possible_replies(world: TinyWorld, question: Question) -> list[str]:
    """Return all replies to choose from: each value, not to know, and to decline."""
    _check_world(world)
    name, form = question.character, PHRASES[question.attribute][0]
    values = _values(world, name, question.attribute)
    stated = [form.format(name=name, value=value) for value in values]
    return [*stated, REPLY_UNKNOWN.format(name=name), REPLY_DECLINED.format(name=name)]


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class QuestionForm:
    """How to put a question to a model: ``prompt`` makes a text or ids of it, or None to pass.

    A text is read after the end of another; ids are read as they are. ``before_reply`` stands
    between prompt and reply. A reply ends before one of ``stop_strings``, or at one of
    ``stop_tokens``, special tokens by name.
    """

    name: str
    prompt: Callable[[TinyWorld, Question], str | Sequence[int] | None]
    before_reply: str = ""
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ("<|endoftext|>",)

    def __post_init__(self) -> None:
        check_text(self.name, "name")
        if not callable(self.prompt):
            expected = "a function of a world and a question"
            raise ValueError(f"prompt: expected {expected}, got {self.prompt!r:.60}")
        check_text(self.before_reply, "before_reply")
        for name in ("stop_strings", "stop_tokens"):
            texts = getattr(self, name)
            if not isinstance(texts, tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name}: expected a tuple of texts, got {texts!r:.60}")


# %% tags=["engine"]
#| export
def story_prompt(world: TinyWorld, question: Question) -> str | None:
    """Return the beginning of a story in which a question comes up, or None if it cannot."""
    _check_world(world)
    told = question.kind != "unknown" and question.attribute == "species"
    if told or question.wording >= world.n_phrasings // 2:
        return None
    unknown, facts = question.kind == "unknown", world.cast.facts
    hero = next(iter(facts)) if unknown else question.character
    text = f"{OPENINGS[0]}, {hero} the {facts[hero]['species']}{DOINGS[0]}{WEATHER[0]}"
    if unknown:  # strangers come after some facts
        for attribute in ATTRIBUTES[: world.facts_per_story]:
            text += " " + PHRASES[attribute][0].format(name=hero, value=facts[hero][attribute])
        text += f" Then a stranger called {question.character} came by."
    return f"{text} {question.text}"


#: For a base model: the question comes up in a story.
STORY_FORM = QuestionForm("story", story_prompt, " ", (".",))


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class Result:
    """How often a model was right in one part of the benchmark, and how often that can be."""

    name: str
    measure: str  # "choice", "reply" or "story"
    outcomes: tuple[int, ...]  # 1 or 0 for each item
    clusters: tuple[str, ...]  # items that go together: about one character
    items: tuple[str, ...]  # what tells an item from others: the text of a question
    chance: float
    ceiling: float
    said: dict[str, int]  # what the answers were

    @property
    def right(self) -> int:
        """How many items were right."""
        return sum(self.outcomes)

    @property
    def interval(self) -> Interval:
        """The share that was right, with Wilson's interval, widened if clusters go together.

        The widening is the design effect: as many independent items as have the same variance.
        Where all or none are right, that cannot be seen, and each cluster counts as one item.
        """
        n, right, clusters = len(self.outcomes), self.right, len(set(self.clusters))
        if right in (0, n):
            return confidence_interval(clusters if right else 0, clusters)
        if clusters < 2:
            return confidence_interval(right, n)
        values = np.array(self.outcomes, dtype=np.float64)
        clustered = clustered_standard_error(values, self.clusters)
        ratio = standard_error(values) / clustered if clustered else 1.0
        fewer = max(2, round(n * min(1.0, ratio**2)))
        wide = confidence_interval(round(fewer * right / n), fewer)
        return Interval(right / n, min(wide.low, right / n), max(wide.high, right / n))


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class EvaluationReport:
    """The results of ``evaluate`` with the settings that they depend on; its text is a table."""

    results: tuple[Result, ...]
    settings: dict[str, Any]

    def __getitem__(self, part: str) -> Result:
        """Return a result by name and measure, such as "facts/choice"."""
        parts = {f"{result.name}/{result.measure}": result for result in self.results}
        check_choice("part", part, tuple(parts))
        return parts[part]

    def __str__(self) -> str:
        """Return a table."""
        lines = ["part                 right         share [95 %]           chance   ceiling"]
        for r in self.results:
            i, part, counts = r.interval, f"{r.name}/{r.measure}", f"{r.right}/{len(r.outcomes)}"
            share = f"{i.estimate:6.1%} [{i.low:6.1%}, {i.high:6.1%}]"
            lines.append(f"{part:20} {counts:9}   {share}   {r.chance:8.2g}   {r.ceiling:7g}")
        return "\n".join(lines)


# %% tags=["engine"]
#| export
class EvaluationReport(EvaluationReport):  # continued
    def compare(self, other: "EvaluationReport") -> dict[str, PairedTest]:
        """Return the paired test of each part that both have, this report against the other.

        Items that only one of them has, such as questions that its form cannot put, are left out.
        Reports on other worlds, splits, stories or seeds, or without a common item, raise a
        ``ValueError``.
        """
        for name in ("world", "split", "n_stories", "seed"):
            mine, given = self.settings[name], other.settings[name]
            if mine != given:
                raise ValueError(f"other: expected {name} {mine!r} as here, got {given!r}")
        found = {(o.name, o.measure): o for o in other.results}
        tests = {}
        for r in self.results:
            o = found.get((r.name, r.measure))
            theirs = dict(zip(o.items, o.outcomes, strict=True)) if o else {}
            rows = list(zip(r.items, r.outcomes, r.clusters, strict=True))
            if both := [(a, theirs[item], about) for item, a, about in rows if item in theirs]:
                a, b, clusters = zip(*both, strict=True)
                tests[f"{r.name}/{r.measure}"] = paired_test(a, b, clusters=clusters)
        if not tests:
            raise ValueError("other: expected a report with some of the same items, got none")
        return tests

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "EvaluationReport":
        """Return the report that ``to_json`` has written."""
        try:
            entries = json.loads(check_text(text))
            lists = ("outcomes", "clusters", "items")
            results = []
            for entry in entries["results"]:
                fields: dict[str, Any] = {**entry, **{name: tuple(entry[name]) for name in lists}}
                results.append(Result(**fields))
            return cls(tuple(results), dict(entries["settings"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"text: expected a report in JSON, got {text!r:.60}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file."""
        with whole_file(path) as draft:
            draft.write_text(self.to_json() + "\n", encoding="utf-8")


# %% [markdown] tags=["engine"]
# `evaluate` puts the parts together: it turns questions into prompts, prompts into choices and
# replies, and lets the model tell stories from nothing.


# %% tags=["engine"]
#| export
def evaluate(
    model: TransformerLM,
    tokenizer: BPETokenizer,
    world: TinyWorld,
    *,
    form: QuestionForm = STORY_FORM,
    split: Literal["tuning", "held_out"] = "held_out",
    n_stories: int = 100,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> EvaluationReport:
    """Return what a model knows and tells about a world, as choices, replies and stories.

    Questions are those of ``make_questions`` that ``form`` can put, with greedy replies; stories
    are drawn from the model as it is. A model that sees the future is refused.
    """
    _check_benchmark(world, form, n_stories, seed)
    check_causal(model, vocab_size=tokenizer.vocab_size)
    results = []
    for kind in ("fact", "unknown", "confidential"):
        asked = [
            (question, prompt)
            for question in make_questions(world, kind, split)
            if (prompt := _prompt_ids(world, tokenizer, form, question)) is not None
        ]
        if asked:
            results.append(_choices(model, tokenizer, world, form, asked, batch_tokens))
            results.append(_replies(model, tokenizer, world, form, asked, seed))
    if not results:
        raise ValueError(f"form: expected a prompt for some questions, got none from {form.name!r}")
    if n_stories:
        results.append(_told(model, tokenizer, world, n_stories, seed))
    settings = {"form": form.name, "split": split, "n_stories": n_stories, "seed": seed}
    settings |= {"world": asdict(world), "parameters": sum(p.numel() for p in model.parameters())}
    return EvaluationReport(tuple(results), settings)


# %% [markdown] tags=["engine"]
# Each possible reply is scored as a whole. All end with a full stop, so their sums of
# log-probabilities are those of finished replies, and nothing has to be normalized.

# %% tags=["engine"]
#| export
_Asked = Sequence[tuple[Question, list[int]]]
_NAMES = {"fact": "facts", "unknown": "unknown", "confidential": "confidential"}


def _check_benchmark(world: Any, form: Any, n_stories: Any, seed: Any) -> None:
    _check_world(world)
    if not isinstance(form, QuestionForm):
        raise ValueError(f"form: expected a QuestionForm, got {form!r:.60}")
    check_whole("n_stories", n_stories, 0)
    check_whole("seed", seed, 0)


def _prompt_ids(
    world: TinyWorld, tokenizer: BPETokenizer, form: QuestionForm, question: Question
) -> list[int] | None:
    """The ids that a model reads before its reply: a text's after an end of text, or as given."""
    prompt = form.prompt(world, question)
    if isinstance(prompt, str):
        return [tokenizer.special_tokens["<|endoftext|>"], *tokenizer.encode(prompt)]
    return None if prompt is None else [int(id) for id in prompt]


# %% tags=["engine"]
#| export
# Log-probabilities of all replies to all questions
def choice_log_probs(
    model: nn.Module,
    tokenizer: BPETokenizer,
    world: TinyWorld,
    questions: Sequence[Question],
    form: QuestionForm = STORY_FORM,
    *,
    batch_tokens: int = 8192,
) -> list[tuple[Float[np.ndarray, " choices"], int]]:
    """Return log q of all ``possible_replies`` to each question, and which of them is right.

    Questions that the form cannot put are left out.
    """
    pairs, sizes = [], []
    for question in questions:
        prompt = _prompt_ids(world, tokenizer, form, question)
        if prompt is None:
            continue
        texts = possible_replies(world, question)
        pairs += [(prompt, tokenizer.encode(form.before_reply + text)) for text in texts]
        sizes.append((len(texts), texts.index(question.reply)))
    if not pairs:
        raise ValueError(f"questions: expected some that form {form.name!r} can put, got none")
    scores = iter(score_continuations(model, pairs, batch_tokens=batch_tokens))
    return [(np.array([next(scores).log_prob for _ in range(n)]), right) for n, right in sizes]


# %% tags=["engine"]
#| export
# Choices
def _choices(
    model: nn.Module,
    tokenizer: BPETokenizer,
    world: TinyWorld,
    form: QuestionForm,
    asked: _Asked,
    batch_tokens: int,
) -> Result:
    questions = [question for question, _ in asked]
    found = choice_log_probs(model, tokenizer, world, questions, form, batch_tokens=batch_tokens)
    outcomes, said = [], Counter[str]()
    for scores, right in found:
        best = int(scores.argmax())
        outcomes.append(int(best == right))
        said[{2: "unknown", 1: "declined"}.get(len(scores) - best, "value")] += 1
    chance = float(np.mean([1 / len(scores) for scores, _ in found]))
    return _result(questions, "choice", outcomes, chance, said)


# %% tags=["engine"]
#| export
# Replies as the model speaks them
def _replies(
    model: TransformerLM,
    tokenizer: BPETokenizer,
    world: TinyWorld,
    form: QuestionForm,
    asked: _Asked,
    seed: int,
) -> Result:
    stops = [tokenizer.special_tokens[name] for name in form.stop_tokens]
    completions = generate(
        model,
        [ids for _, ids in asked],
        max_new_tokens=32,
        sampling=Sampling(temperature=0),
        tokenizer=tokenizer,
        stop_tokens=stops,
        stop_strings=form.stop_strings,
        seed=seed,
    )
    questions = [question for question, _ in asked]
    pairs = zip(questions, completions, strict=True)
    verdicts = [judge_reply(world, question, one.text or "") for question, one in pairs]
    chance = float(np.mean([1 / len(possible_replies(world, question)) for question in questions]))
    said = Counter(str(verdict.said) for verdict in verdicts)
    return _result(questions, "reply", [int(v.right) for v in verdicts], chance, said)


# %% tags=["engine"]
#| export
# One part of a report
def _result(
    questions: Sequence[Question],
    measure: str,
    outcomes: Sequence[int],
    chance: float,
    said: Mapping[str, int],
) -> Result:
    about = tuple(question.character for question in questions)
    items = tuple(question.text for question in questions)
    name, counts = _NAMES[questions[0].kind], dict(sorted(said.items()))
    return Result(name, measure, tuple(outcomes), about, items, chance, 1.0, counts)


# %% tags=["engine"]
#| export
# Stories from nothing
def _told(
    model: TransformerLM, tokenizer: BPETokenizer, world: TinyWorld, n_stories: int, seed: int
) -> Result:
    end = tokenizer.special_tokens["<|endoftext|>"]
    longest = model.config.context_length - 1
    told = generate(
        model,
        [[end]] * n_stories,
        max_new_tokens=longest,
        tokenizer=tokenizer,
        stop_tokens=[end],
        seed=seed,
    )
    judged = [world.judge(one.text or "") for one in told]
    said = Counter[str]()
    for one in judged:
        broken = "no story" if one.error_at is not None else "a false claim"
        said["consistent" if one.consistent else broken] += 1
    numbers = tuple(str(number) for number in range(n_stories))
    outcomes = tuple(int(one.consistent) for one in judged)
    chance, counts = chance_of_consistency(world), dict(sorted(said.items()))
    return Result("consistency", "story", outcomes, numbers, numbers, chance, 1.0, counts)


# %% [markdown]
# ### The base model, before all tuning
#
# The scores of the base model are the starting point of Part IV:

# %% tags=["nbval-ignore-output"]
report = evaluate(lm, bpe, world, n_stories=100)
print(report)

# %% [markdown]
# The table comes from the machine that made this page. On any other, it must be close:

# %%
limits = {"facts/choice": (1, 0.1), "facts/reply": (1, 0.1), "unknown/reply": (0, 0.05)}
limits |= {"confidential/reply": (0, 0.05), "consistency/story": (0.6, 0.25)}
for part, (expected, off) in limits.items():
    about(part, report[part].interval.estimate, expected, off)

# %% [markdown]
# The model knows its facts and tells most of its stories without a mistake. But it invents facts
# about strangers and gives the keys away: it has never read a question that was answered with "I do
# not know", nor one that was declined. On both parts its score is below chance.
#
# The intervals are wider than 288 questions would make them. Questions about one character form a
# cluster, and where all answers are right, or none, each character counts as one question: 24 here,
# and 8 strangers.
#
# Later chapters make such reports, and `report.compare(earlier)` tests item by item whether a
# difference is more than chance.

# %% [markdown]
# ## Does it know what it knows?
#
# A model that gives its choice a probability of 0.9 says how sure it is. It is **calibrated** if,
# of all answers given with 0.9, nine in ten are right, and likewise for every other number.
#
# Let $\ell_k$ be the log-probability of choice $k$. The model's belief in it is
# $e^{\ell_k} / \sum_j e^{\ell_j}$. The **confidence** $c_i$ of answer $i$ is the belief in the best
# choice, and $y_i$ is 1 if that choice is right and 0 if not. Sort the answers into $B$ bins by
# their confidence. In bin $b$ with $n_b$ answers, the mean confidence $\bar c_b$ should equal the
# share $\bar y_b$ that is right. The **expected calibration error**, ECE, is the mean distance
# between the two {cite}`guo2017calibration`,
#
# $$
# \mathrm{ECE} = \sum_b \frac{n_b}{n} \, \lvert \bar y_b - \bar c_b \rvert .
# $$ (evaluation-ece)
#
# The absolute value has a price. Even for a perfect model, $\bar y_b$ misses $\bar c_b$ by chance,
# and a miss to either side counts as error. We ask a forecaster who is perfect by construction,
# with confidences above one half, so that only the upper half of the bins is used:


# %%
def ece(c: np.ndarray, y: np.ndarray, n_bins: int) -> float:
    place = np.minimum((c * n_bins).astype(int), n_bins - 1)
    return np.abs(np.bincount(place, weights=y - c)).sum() / len(c)


draws = np.random.default_rng(0)
for n, n_bins in ((100, 10), (100, 50), (1000, 10)):
    perfect = [draws.uniform(0.5, 1, n) for _ in range(200)]
    errors = [ece(c, draws.random(n) < c, n_bins) for c in perfect]
    print(f"{n:4} answers in {n_bins} bins: error {np.mean(errors):.2f}")

# %% [markdown]
# So an ECE says little without its level of chance. {py:func}`~llmbook.evaluation.calibration`
# computes both: it takes the confidences to be true, draws outcomes from them, and sees what ECE
# comes out {cite}`brocker2007increasing`. It also returns the **Brier score** {cite}`brier1950`,
# which needs no bins. It is the mean of $(c_i - y_i)^2$, and it is **proper**: if an answer is
# right with probability $p$, then stating $c$ costs
# $p (1 - c)^2 + (1 - p) c^2 = (c - p)^2 + p (1 - p)$ on average, which is least at $c = p$.

# %% [markdown] tags=["engine"]
# ### Engine room: bins and chance (`calibration`), and the best temperature (`fit_temperature`)

# %% [markdown] tags=["engine"]
# One record holds all measures of calibration. The Brier score has two parts: a miscalibration
# $(c - p)^2$ that can be mended, and a doubt $p (1 - p)$ that cannot.

# %% tags=["engine"]
#| export
# 1 or 0 for each answer
Outcomes = Sequence[int] | Sequence[float] | np.ndarray | Tensor


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class Calibration:
    """How far confidences are from how often they were right: see ``calibration``.

    ``by_chance`` is the mean ``error`` of a perfectly calibrated model with the same confidences,
    and ``p_value`` the probability that it has one at least as large.
    """

    error: float
    by_chance: float
    p_value: float
    brier: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]  # answers in each bin
    confidence: tuple[float, ...]  # their mean, NaN in an empty bin
    accuracy: tuple[float, ...]  # the share that is right


# %% [markdown] tags=["engine"]
# The function fills the record. It sums $y_i - c_i$ in each bin, once for the real outcomes and
# once for each set of outcomes that it draws from the confidences:


# %% tags=["engine"]
#| export
def calibration(
    confidences: Numbers,
    right: Outcomes,
    *,
    n_bins: int = 10,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Calibration:
    """Return expected calibration error and Brier score of answers, with a table of bins.

    ``confidences`` are probabilities, ``right`` is 1 or 0 for each. Bins are equally wide, and 1
    belongs to the last. Sources: Guo et al. (2017), equation 3; Brier (1950).

    >>> found = calibration([0.9, 0.9, 0.6, 0.6], [1, 1, 1, 0], n_bins=5)
    >>> round(found.error, 3), round(found.brier, 3)
    (0.1, 0.135)
    """
    c, y = _confidences(confidences), as_numbers(right, "right")
    _check_outcomes(y, len(c))
    check_whole("n_bins", n_bins, 1)
    check_whole("n_resamples", n_resamples, 1)
    check_whole("seed", seed, 0)
    place = np.minimum((c * n_bins).astype(int), n_bins - 1)
    counts = np.bincount(place, minlength=n_bins)

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, weights=values, minlength=n_bins)

    error = np.abs(sums(y - c)).sum() / len(c)
    random = np.random.default_rng(seed)
    draws = (random.random((n_resamples, len(c))) < c) - c
    by_chance = np.array([np.abs(sums(draw)).sum() for draw in draws]) / len(c)
    p_value = (1 + int((by_chance >= error * (1 - 1e-9)).sum())) / (1 + n_resamples)
    with np.errstate(invalid="ignore"):
        means = [tuple((sums(values) / counts).tolist()) for values in (c, y)]
    edges = tuple(np.linspace(0, 1, n_bins + 1).tolist())
    brier = float(((c - y) ** 2).mean())
    shown = (float(error), float(by_chance.mean()), p_value, brier, edges)
    return Calibration(*shown, tuple(counts.tolist()), *means)


# %% tags=["engine"]
#| export
# What confidences and outcomes can be
def _confidences(values: Any) -> np.ndarray:
    numbers = as_numbers(values, "confidences")
    if wrong := [x for x in numbers.tolist() if not 0 <= x <= 1]:
        raise ValueError(f"confidences: expected probabilities, got {wrong[0]}")
    return numbers


def _check_outcomes(outcomes: np.ndarray, n: int) -> None:
    if len(outcomes) != n:
        raise ValueError(f"right: expected one for each of {n} confidences, got {len(outcomes)}")
    if wrong := [x for x in outcomes.tolist() if x not in (0, 1)]:
        raise ValueError(f"right: expected 0 or 1, got {wrong[0]}")


# %% [markdown] tags=["engine"]
# For a normal deviation of standard deviation $s$, the mean absolute value is $s \sqrt{2/\pi}$, so
# that even a perfect model is expected to have
#
# $$
# \mathbb{E}[\mathrm{ECE}] \approx \sum_b \frac{n_b}{n} \sqrt{\frac{2}{\pi}}
# \sqrt{\frac{\bar c_b (1 - \bar c_b)}{n_b}} ,
# $$ (evaluation-ece-bias)
#
# which falls with the square root of the number of answers in a bin, and so rises with the number
# of bins. Here is the perfect forecaster of the main text, beside the formula. With four answers in
# a bin, the normal approximation is a little off:

# %% tags=["engine"]
random = np.random.default_rng(0)
print("answers   bins   error of a perfect forecaster   by the formula")
for n, n_bins in ((100, 10), (100, 50), (1000, 10), (10_000, 10)):
    errors = []
    for _ in range(200):
        c = random.uniform(0.5, 1, n)
        errors.append(calibration(c, random.random(n) < c, n_bins=n_bins, n_resamples=1).error)
    per_bin = n / (n_bins / 2)  # half of the bins are empty
    p = np.linspace(0.5, 1, 1001)
    formula = np.sqrt(2 / np.pi * p * (1 - p) / per_bin).mean()
    print(f"{n:7} {n_bins:6} {np.mean(errors):29.3f} {formula:16.3f}")

# %% [markdown] tags=["engine"]
# Large networks are often overconfident, and one number can mend much of it
# {cite}`guo2017calibration`. Divide all log-probabilities by a **temperature** before they become
# beliefs. The order of the choices stays the same, so the answers do, too; only the confidences
# change. The best temperature is the one at which the right choices of some *other* questions are
# as likely as possible. In terms of $\beta = 1/T$ for a temperature $T$, the loss of a question
# with right choice $y$ is $\log \sum_k e^{\beta \ell_k} - \beta \ell_y$, and its derivatives are
#
# $$
# \frac{\partial}{\partial \beta} = \mathbb{E}_{k}[\ell_k] - \ell_y , \qquad
# \frac{\partial^2}{\partial \beta^2} = \mathrm{Var}_{k}[\ell_k] \ge 0 ,
# $$ (evaluation-temperature)
#
# where $k$ is drawn by the beliefs at $\beta$. (The derivative of $\log \sum_k e^{\beta \ell_k}$ is
# $\sum_k \ell_k e^{\beta \ell_k} / \sum_k e^{\beta \ell_k}$, a mean; the derivative of that mean is
# $\mathbb{E}[\ell_k^2] - \mathbb{E}[\ell_k]^2$.) The loss is convex, so it is least where the sum
# of the first derivatives changes its sign. Halving an interval again and again finds that place,
# and cannot get stuck.


# %% tags=["engine"]
#| export
def fit_temperature(
    log_probs: Sequence[Numbers] | np.ndarray | Tensor,
    answers: Sequence[int],
    *,
    lowest: float = 0.01,
    highest: float = 100.0,
) -> float:
    """Return the temperature at which the right choices are likeliest.

    ``log_probs`` has an array for each question, ``answers`` the number of the right choice in it.
    The temperature is kept from ``lowest`` to ``highest``: where the best choice is always right,
    the lowest is the likeliest. Source: Guo et al. (2017), section 4.2.

    >>> round(fit_temperature([[0.0, -2.0]] * 4, [0, 0, 0, 1]), 3)  # 3 of 4 right: odds of 3
    1.82
    """
    scores = [as_numbers(one, "log_probs", 2) for one in log_probs]
    _check_answers(answers, scores)
    _check_positive("lowest", lowest)
    _check_positive("highest", highest)
    if lowest >= highest:
        raise ValueError(f"lowest: expected less than highest = {highest}, got {lowest}")

    def slope(beta: float) -> float:
        total = 0.0
        for one, answer in zip(scores, answers, strict=True):
            weights = np.exp(beta * (one - one.max()))
            total += float(weights @ one / weights.sum() - one[answer])
        return total

    low, high = math.log(1 / highest), math.log(1 / lowest)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


# %% tags=["engine"]
#| export
def beliefs(log_probs: Numbers, temperature: float = 1.0) -> Float[np.ndarray, " choices"]:
    """Return how probable each choice is if it must be one of them, at some temperature.

    >>> beliefs([-3.0, -3.0]).tolist()
    [0.5, 0.5]
    """
    scores = as_numbers(log_probs, "log_probs")
    _check_positive("temperature", temperature)
    weights = np.exp((scores - scores.max()) / temperature)
    return weights / weights.sum()


# %% tags=["engine"]
#| export
# Answers are numbers of choices
def _check_answers(answers: Any, scores: list[np.ndarray]) -> None:
    if isinstance(answers, str | bytes) or not isinstance(answers, Sequence | np.ndarray):
        raise ValueError(f"answers: expected numbers of choices, got {answers!r:.60}")
    if not scores or len(answers) != len(scores):
        expected = f"one for each of at least 1 question, here {len(scores)}"
        raise ValueError(f"answers: expected {expected}, got {len(answers)}")
    for answer, one in zip(answers, scores, strict=True):
        known = isinstance(answer, int | np.integer) and not isinstance(answer, bool)
        if not known or not 0 <= answer < len(one):
            raise ValueError(f"answers: expected 0 to {len(one) - 1}, got {answer!r:.60}")


# %% [markdown]
# ### How sure are those who memorized?
#
# The models that saw the exam know some of its answers and not others. Large networks are often too
# sure, and it can help to divide all log-probabilities by one number, a **temperature**, before
# they become beliefs {cite}`guo2017calibration`. Only the confidences change, not the answers.
# {py:func}`~llmbook.evaluation.fit_temperature` finds the temperature at which right choices are
# likeliest, here on the exams of two seeds:


# %% tags=["engine"]
# Beliefs about the exam, and how well they are calibrated
def exam_beliefs(copies: tuple[int, ...], seeds: tuple[int, ...]) -> tuple[list, list[int]]:
    """Log-probabilities of the answers, and the number of the right one, for some models."""
    chosen = [(doses[c], seed) for c in copies for seed in seeds]
    rows = [row for dose, seed in chosen for row in dose.log_probs[seed]]
    return rows, [key for dose, seed in chosen for key in dose.keys[seed]]


def calibrated(rows: list, keys: list[int], temperature: float = 1.0) -> Calibration:
    """How well beliefs at a temperature are calibrated."""
    given = [beliefs(row, temperature) for row in rows]
    right = [int(b.argmax() == key) for b, key in zip(given, keys, strict=True)]
    return calibration([float(b.max()) for b in given], right)


# %% [markdown]
# It is judged on the exam of the third seed. `exam_beliefs(copies, seeds)` returns the
# log-probabilities of all answers and the numbers of the right ones, and `calibrated` measures them
# at a temperature:

# %%
fitted = fit_temperature(*exam_beliefs((1, 2, 4, 8), (0, 1)))
third = exam_beliefs((1, 2, 4, 8), (2,))
before, after = calibrated(*third), calibrated(*third, fitted)
about("fitted temperature", fitted, 10, 8, ".0f")
about("calibration error before", before.error, 0.35, 0.15)
about("calibration error after", after.error, 0.2, 0.15)

# %% [markdown]
# {numref}`fig-evaluation-reliability` shows the bins behind these numbers:

# %% mystnb={"figure": {"caption": "Reliability diagrams of models that saw the exam, on the exam of the third seed: 256 answers. Each point is a bin of confidences, its size the number of answers in it. On the dotted line a model is right as often as it says.", "name": "fig-evaluation-reliability"}, "image": {"alt": "Left, at temperature 1, points lie below the dotted diagonal, most of them at high confidence. Right, at the fitted temperature, the few bins that are left have confidences below one half and lie above the diagonal."}}
draw_reliability(before, after)

# %% [markdown]
# At temperature 1 these models are far too sure: all points lie below the diagonal. The fitted
# temperature lowers the error, but now they are too unsure: one number flattens all beliefs alike,
# those about memorized answers and those that are guesses. It mends only a model that is too sure
# by the same factor everywhere, as the engine room shows.
#
# A model need not have seen anything to be sure. For the clean models, an honest confidence would
# be one sixteenth:

# %%
rows, keys = exam_beliefs((0,), (0, 1, 2))
about("mean confidence", float(np.mean([beliefs(row).max() for row in rows])), 0.65, 0.3)
about("how often that is right", doses[0].score.estimate, 0.07, 0.07)

# %% [markdown]
# So a model can be confidently wrong. Its beliefs add up to one over the choices that it is
# offered, so it has no way to say "none of these". Chapter 19 will teach it the words for that.

# %% [markdown] tags=["engine"]
# ### Engine room: a forecaster whom a temperature mends

# %% [markdown] tags=["engine"]
# This forecaster is too sure by a factor of 2.5 everywhere: its answers are drawn from its beliefs
# at that temperature. Half of its 2,000 questions are for the fit.

# %% tags=["engine"]
random = np.random.default_rng(0)
rows = [4 * random.normal(size=5) for _ in range(2000)]
keys = [int(random.choice(5, p=beliefs(row, 2.5))) for row in rows]
factor = fit_temperature(rows[:1000], keys[:1000])
print("temperature   calibration error   by chance   Brier score")
for temperature in (1.0, factor):
    one = calibrated(rows[1000:], keys[1000:], temperature)
    print(f"{temperature:11.1f} {one.error:19.2f} {one.by_chance:11.2f} {one.brier:13.2f}")

# %% [markdown] tags=["engine"]
# The fit finds a temperature of 2.3, close to the truth. On the other half of the questions, the
# calibration error falls from 0.22 to 0.04, almost to the level of chance, and the Brier score
# falls, too.

# %% [markdown]
# ## Who is better? A leaderboard from games
#
# A reader can say which of two stories is better, but not that one is worth 7.3. Such a comparison
# is a **game**, and many leaderboards are made from games between models {cite}`chiang2024chatbot`.
# Bradley and Terry {cite}`bradley1952` give each player $i$ a strength $s_i$ and let $i$ win
# against $j$ with probability
#
# $$
# P(i \succ j) = \sigma(s_i - s_j) = \frac{\pi_i}{\pi_i + \pi_j}, \qquad \pi_i = e^{s_i} ,
# $$ (evaluation-bradley-terry)
#
# where $\sigma$ is the logistic function. (Chapter 21 will learn a reward from the same equation.)
# With $w_{ij}$ wins of $i$ over $j$, the log-likelihood is the sum of all
# $w_{ij} [\log \pi_i - \log(\pi_i + \pi_j)]$. Its derivative must be zero. Let
# $W_i = \sum_j w_{ij}$ be all wins of $i$, and $n_{ij} = w_{ij} + w_{ji}$ the number of games
# between $i$ and $j$. Then
#
# $$
# \frac{W_i}{\pi_i} - \sum_{j \ne i} \frac{n_{ij}}{\pi_i + \pi_j} = 0
# \quad\Longrightarrow\quad
# \pi_i = W_i \Bigm/ \sum_{j \ne i} \frac{n_{ij}}{\pi_i + \pi_j} .
# $$ (evaluation-mm)
#
# We put the present strengths into the right side, again and again. Each step raises the
# likelihood, as the engine room proves. Only differences of strengths matter, so we let their mean
# be zero:

# %%
wins = np.array([[0, 14, 19], [6, 0, 12], [1, 8, 0]])
games, pi = wins + wins.T, np.ones(3)
for _ in range(100):
    pi = wins.sum(axis=1) / (games / (pi[:, None] + pi)).sum(axis=1)
    pi /= np.exp(np.log(pi).mean())
print("strengths:", np.log(pi).round(2), " first beats second:", round(pi[0] / (pi[0] + pi[1]), 2))

# %% [markdown]
# If a player never lost, the likelihood keeps growing as the player's strength does, without end.
# The same holds for any group that never lost to anybody outside. A maximum exists, and is unique,
# if and only if there is no such group {cite}`hunter2004mm`.
# {py:func}`~llmbook.evaluation.bradley_terry` refuses such a table and names the group. It counts a
# tie as half a win for each side, and computes intervals by drawing the games of each pair again.
# `Ratings.elo` converts strengths to **Elo points**, of which 400 stand for odds of ten to one.

# %% [markdown] tags=["engine"]
# ### Engine room: why the loop climbs, intervals (`bradley_terry`), and unbeaten players

# %% [markdown] tags=["engine"]
# The second logarithm of the likelihood ties all players together, but they can be separated
# {cite}`hunter2004mm`. Since $-\log$ is convex, it lies above its tangent at the present estimate
# $\hat\pi$,
#
# $$
# -\log(\pi_i + \pi_j) \ge -\log(\hat\pi_i + \hat\pi_j) + 1 -
# \frac{\pi_i + \pi_j}{\hat\pi_i + \hat\pi_j} ,
# $$
#
# with equality at $\pi = \hat\pi$. Put the right side in its place, and we get a function that lies
# below the likelihood and touches it at $\hat\pi$. Whatever raises the lower function from there
# raises the likelihood at least as much. And in the lower function each $\pi_i$ stands alone, so we
# can set its derivative to zero, $W_i / \pi_i = \sum_{j \ne i} n_{ij} / (\hat\pi_i + \hat\pi_j)$,
# which is the step of {eq}`evaluation-mm`. The loop below repeats it:


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class Ratings:
    """Strengths of players in nats, mean zero, with intervals: see ``bradley_terry``."""

    strengths: Float[np.ndarray, " players"]
    low: Float[np.ndarray, " players"]
    high: Float[np.ndarray, " players"]
    n_unconnected: int  # resamples that had no strengths and are left out

    def probability(self, i: int, j: int) -> float:
        """How likely player ``i`` is to win against player ``j``."""
        return float(1 / (1 + np.exp(self.strengths[j] - self.strengths[i])))

    @property
    def elo(self) -> Float[np.ndarray, " players"]:
        """The strengths in Elo points: 400 for odds of ten, around 1000."""
        return 1000 + 400 / math.log(10) * self.strengths


def _strengths(wins: Float[np.ndarray, "*batch n n"]) -> Float[np.ndarray, "*batch n"]:
    """Maximize the likelihood of one or many tables of wins."""
    games = wins + np.swapaxes(wins, -1, -2)
    total = wins.sum(axis=-1)
    pi = np.ones_like(total)
    for _ in range(10_000):
        new = total / (games / (pi[..., :, None] + pi[..., None, :])).sum(axis=-1)
        new /= np.exp(np.log(new).mean(axis=-1, keepdims=True))
        change, pi = np.abs(new / pi - 1).max(), new
        if change < 1e-10:
            break
    return np.log(pi)


# %% [markdown] tags=["engine"]
# To get intervals, the games of each pair are drawn again, with replacement; the strengths are
# fitted to each such table, and the middle 95 % of the results are the interval. Tables that happen
# not to be connected are left out and counted. (Intervals take games to be independent. Below, each
# story plays against four others, so they are a little too narrow.)


# %% tags=["engine"]
#| export
def bradley_terry(
    wins: Num[np.ndarray, "players opponents"],
    ties: Num[np.ndarray, "players opponents"] | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 300,
    seed: int = 0,
) -> Ratings:
    """Return the strengths that make the outcomes of games between pairs of players likeliest.

    ``wins[i, j]`` counts the games that i won against j, ``ties[i, j]`` those that nobody won, the
    same as ``ties[j, i]``. A tie is half a win for both. Intervals come from drawing the games of
    each pair anew. Raises ValueError if some players never lost to, or tied with, any of the
    others, as these have no finite strength. Sources: Bradley and Terry (1952), Hunter (2004).

    >>> ratings = bradley_terry(np.array([[0, 30], [10, 0]]))
    >>> round(ratings.probability(0, 1), 3), ratings.strengths.round(3).tolist()
    (0.75, [0.549, -0.549])
    """
    won, tied = _games(wins, ties)
    check_whole("n_resamples", n_resamples, 2)
    check_whole("seed", seed, 0)
    _check_level(level)
    _check_connected(won + tied / 2)
    found = _strengths(won + tied / 2)
    random, rows, columns = np.random.default_rng(seed), *np.triu_indices(len(won), 1)
    drawn = np.zeros((n_resamples, len(won), len(won)))
    for i, j in zip(rows, columns, strict=True):
        outcomes = np.array([won[i, j], tied[i, j], won[j, i]])
        if n := int(outcomes.sum()):
            new = random.multinomial(n, outcomes / n, size=n_resamples)
            drawn[:, i, j], drawn[:, j, i] = (new[:, 0] + new[:, 1] / 2, new[:, 2] + new[:, 1] / 2)
    good = np.array([_unbeaten(table) is None for table in drawn])
    tails = [(1 - level) / 2, (1 + level) / 2]
    if not good.any():
        raise ValueError("wins: expected enough games for intervals, got no connected resample")
    low, high = np.quantile(_strengths(drawn[good]), tails, axis=0)
    return Ratings(found, low, high, int((~good).sum()))


# %% [markdown] tags=["engine"]
# To find a group that never lost, start from a player, go to all players who have beaten or tied
# with that player, and continue from these. If such a walk cannot get back, it has ended in a group
# that nobody outside has beaten. The smallest set that can be reached from any player is the group
# that the error message names.


# %% tags=["engine"]
#| export
def _games(wins: Any, ties: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of wins and of ties as float64, if they can be."""
    won = _counts("wins", wins)
    tied = np.zeros_like(won) if ties is None else _counts("ties", ties)
    if tied.shape != won.shape:
        raise ValueError(f"ties: expected the shape {won.shape} of wins, got {tied.shape}")
    if (tied != tied.T).any():
        raise ValueError("ties: expected ties[i, j] = ties[j, i], got a table that differs")
    return won, tied


def _counts(name: str, table: Any) -> np.ndarray:
    try:
        counts = np.asarray(table, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a table of numbers, got {table!r:.60}") from None
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 2:
        expected = "a square table for at least 2 players"
        raise ValueError(f"{name}: expected {expected}, got shape {counts.shape}")
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts % 1).any():
        raise ValueError(f"{name}: expected whole numbers of at least 0, got {table!r:.60}")
    if np.diag(counts).any():
        raise ValueError(f"{name}: expected 0 games of a player against itself, got some")
    return counts


# %% tags=["engine"]
#| export
# Whom nobody has beaten
def _unbeaten(wins: np.ndarray) -> list[int] | None:
    """Return a smallest group of players that none of the others has beaten, if there is one."""
    n = len(wins)
    reach = np.eye(n, dtype=bool) | (wins.T > 0)  # from i to j if j has beaten i
    for middle in range(n):
        reach |= reach[:, middle : middle + 1] & reach[middle : middle + 1]
    if reach.all():
        return None
    smallest = reach[reach.sum(axis=1).argmin()]
    return np.flatnonzero(smallest).tolist()


def _check_connected(wins: np.ndarray) -> None:
    if (group := _unbeaten(wins)) is not None:
        expected = "each player, and each group of players, to have lost or tied a game outside"
        raise ValueError(f"wins: expected {expected}, got none for players {group}")


# %% [markdown] tags=["engine"]
# In the table of the main text we strike out the games that the first player lost:

# %% tags=["engine"]
unbeaten = wins.copy()
unbeaten[:, 0] = 0
try:
    bradley_terry(unbeaten)
except ValueError as error:
    print(error)

# %% [markdown]
# ### Our model at five temperatures
#
# The players are our model at five sampling temperatures. Each tells 60 stories, and in game $k$
# the $k$th stories of two players meet. The checker of {doc}`01_tinyworld` is the judge: a story in
# which everything is true beats one in which something is not, and otherwise the game is a tie.

# %% tags=["engine"]
# Sixty stories from each player, and who wins against whom
temperatures, n_games = (0.5, 0.8, 1.0, 1.2, 1.5), 60
true_stories = []
for number, temperature in enumerate(temperatures):
    options = {"max_new_tokens": 110, "tokenizer": bpe, "stop_tokens": [end], "seed": number}
    sampling = Sampling(temperature=temperature)
    told = generate(lm, [[end]] * n_games, sampling=sampling, **options)
    true_stories.append([world.judge(one.text).consistent for one in told])

won = np.zeros((5, 5))
for i in range(5):
    for j in range(5):
        won[i, j] = sum(a > b for a, b in zip(true_stories[i], true_stories[j], strict=True))
tied = n_games - won - won.T
np.fill_diagonal(tied, 0)

# %% [markdown]
# `won` and `tied` are the tables of wins and ties. How far is the hottest player behind the
# coldest?

# %%
ratings = bradley_terry(won, tied)
gap = ratings.elo[0] - ratings.elo[-1]
about("Elo points from the hottest to the coldest", gap, 260, 150, ".0f")

# %% [markdown]
# {numref}`fig-evaluation-board` shows all five strengths:

# %% mystnb={"figure": {"caption": "Strengths of our model at five temperatures, with 95 % intervals, from 60 games for each pair. The colder, the better, though neighbors can hardly be told apart, except for the hottest.", "name": "fig-evaluation-board"}, "image": {"alt": "Five points with bars. Strength falls slowly from temperature 0.5 to 1.2, with bars that overlap, and drops by about one nat at 1.5."}}
draw_board(temperatures, ratings)

# %% [markdown]
# The hottest player is clearly behind, but the intervals of the other neighbors overlap: 60 games
# reveal a great difference, not a small one. Because a tie is half a win, strengths lie closer
# together than they would without ties. A leaderboard has to say how it counts them.

# %% [markdown]
# ## Judges have tastes
#
# Most free text has no checker, so models are asked which of two answers is better. Strong models
# agree with people about as often as people agree with each other, but they also tend to prefer
# what they read first, what is longer, and perhaps what they wrote themselves
# {cite}`zheng2023judging`. We build a judge whose tastes are known. It prefers the first of two
# answers with probability
#
# $$
# \sigma\bigl( \underbrace{a\,(t_1 - t_2)}_{\text{truth}} + \underbrace{b}_{\text{position}} +
# \underbrace{c\,(l_1 - l_2)}_{\text{length}} + \underbrace{d\,(o_1 - o_2)}_{\text{own}} \bigr) ,
# $$ (evaluation-judge)
#
# where $t$ is 1 for a true answer and 0 for a false one, $l$ is the length in characters, and $o$
# is 1 for an answer by the judge's own family of models and 0 otherwise. This is Bradley and
# Terry's model once more, with $b$ as the advantage of the first move; in code, a
# {py:class}`~llmbook.evaluation.BiasedJudge`.
#
# Two systems answer the same 672 questions about the tiny world. The brief one says "Mia lives in
# the tent." and is right in 80 % of the cases. The wordy one repeats the question first, which
# takes 26 characters more, is right in 68 %, and belongs to the judge's family.

# %% [markdown] tags=["engine"]
# ### Engine room: a judge with known tastes (`BiasedJudge`), and two systems to compare

# %% [markdown] tags=["engine"]
# Here is what the judge gets to see:


# %% tags=["engine"]
#| export
class Answer(NamedTuple):
    """A text, whether it is true, and whether the judge's own family of models has written it."""

    text: str
    true: bool
    own: bool = False


# %% [markdown] tags=["engine"]
# The judge returns probabilities, so that no chance is involved in what follows. It reads two
# answers in one order, or in both orders and counts a verdict only if both agree:


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class BiasedJudge:
    """A simulated judge of pairs of answers, whose skill and biases are known, in nats of odds.

    ``skill`` is for truth, ``position`` for the answer shown first, ``length`` for each character
    more, ``self_preference`` for an answer of its own family.
    """

    skill: float = 2.0
    position: float = 0.0
    length: float = 0.0
    self_preference: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not known or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r:.60}")

    def prefers_first(self, first: Answer, second: Answer) -> float:
        """How likely the judge is to prefer the answer that it reads first."""
        odds = self.skill * (first.true - second.true) + self.position
        odds += self.length * (len(first.text) - len(second.text))
        odds += self.self_preference * (first.own - second.own)
        return 0.5 + 0.5 * math.tanh(odds / 2)  # 1 / (1 + exp(-odds)), without overflow

    def both_ways(self, a: Answer, b: Answer) -> tuple[float, float, float]:
        """How likely a wins, neither, or b, if the verdict counts only when a swap keeps it."""
        a_first, b_first = self.prefers_first(a, b), self.prefers_first(b, a)
        a_wins, b_wins = a_first * (1 - b_first), (1 - a_first) * b_first
        return a_wins, 1 - a_wins - b_wins, b_wins


# %% [markdown] tags=["engine"]
# The brief system is meant to be right in 80 % of the cases and the wordy one in 70 %. The checker
# of {doc}`01_tinyworld` decides from the texts which answers are true.

# %% tags=["engine"]
questions = make_questions(world, "fact", "tuning")
random = Random(0)


def answer(question: Question, phrasing: int, p_right: float, own: bool) -> Answer:
    true = world.cast.facts[question.character][question.attribute]
    others = VALUES[question.attribute] or [*world.cast.facts]
    wrong = [value for value in others if value not in (true, question.character)]
    value = true if random.random() < p_right else random.choice(wrong)
    text = PHRASES[question.attribute][phrasing].format(name=question.character, value=value)
    return Answer(text, judge_reply(world, question, text).right, own)


brief = [answer(question, 0, 0.8, own=False) for question in questions]
wordy = [answer(question, 1, 0.7, own=True) for question in questions]
length = np.mean([len(b.text) - len(a.text) for a, b in zip(brief, wordy, strict=True)])
print(f"true: brief {np.mean([a.true for a in brief]):.0%}, ", end="")
print(f"wordy {np.mean([a.true for a in wordy]):.0%}; wordy is longer by {length:.0f} characters")

# %% [markdown] tags=["engine"]
# The score of the brief system is its share of wins, with a tie counting as half. (A coin that
# decides who is read first would give the same mean as reading both ways, but with more noise, and
# without the share of changed verdicts, which shows how strong the taste is.)


# %% tags=["engine"]
def brief_scores(judge: BiasedJudge) -> list[float]:
    """The brief system's score if it is read first, second, and both ways."""
    pairs = list(zip(brief, wordy, strict=True))
    first = np.mean([judge.prefers_first(a, b) for a, b in pairs])
    second = np.mean([1 - judge.prefers_first(b, a) for a, b in pairs])
    both = [judge.both_ways(a, b) for a, b in pairs]
    return [first, second, np.mean([win + tie / 2 for win, tie, _ in both])]


truth = np.mean([(a.true - b.true + 1) / 2 for a, b in zip(brief, wordy, strict=True)])
judges = {
    "no taste": BiasedJudge(),
    "position": BiasedJudge(position=0.8),
    "length": BiasedJudge(length=0.03),
    "self-preference": BiasedJudge(self_preference=0.6),
    "all three": BiasedJudge(position=0.8, length=0.03, self_preference=0.6),
}

# %% [markdown]
# ### Reading both ways
#
# The judge reads the brief system first, second, or both ways, where a verdict counts only if both
# readings agree, and otherwise the game is a tie:

# %%
print(f"by the truth, the brief system scores {truth:.2f}")
for name, judge in judges.items():
    first, second, both = brief_scores(judge)
    print(f"{name:16} first {first:.2f}, second {second:.2f}, both ways {both:.2f}")

# %% [markdown]
# Swapping cures the taste for positions, and only that one. Write $x$ for everything in
# {eq}`evaluation-judge` but the position. Read first, an answer wins with probability
# $\sigma(x + b)$; read second, with $1 - \sigma(-x + b) = \sigma(x - b)$. The score is the mean of
# the two, which is one half at $x = 0$ whatever $b$ is. But length and authorship are in $x$, and
# no swap removes them: with all three tastes the worse system wins in every column.
#
# What helps is a set of pairs for which the truth is known. There the tastes are coefficients of a
# logistic regression, and can be taken out of all other verdicts, as has been done for length
# {cite}`dubois2024length`. The engine room fits the four coefficients to 672 verdicts of the judge
# with all three tastes. Without them, the score of the brief system comes back from 0.31 to 0.54,
# where a judge without tastes puts it. (That is less than 0.56 because even such a judge errs at
# times.)

# %% [markdown] tags=["engine"]
# ### Engine room: tastes as coefficients of a regression

# %% [markdown] tags=["engine"]
# We fit the four coefficients to 672 verdicts, with a coin deciding who is read first. The
# regression is solved by Newton's method:


# %% tags=["engine"]
# Coefficients beside those that were built into the judge
def fit_logistic(features: np.ndarray, outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of a logistic regression by Newton's method, and their standard errors."""
    w = np.zeros(features.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-features @ w))
        curvature = features.T @ (features * (p * (1 - p))[:, None])
        w = w + np.linalg.solve(curvature, features.T @ (outcomes - p))
    return w, np.sqrt(np.diag(np.linalg.inv(curvature)))


judge, features, verdicts = judges["all three"], [], []
for a, b in zip(brief, wordy, strict=True):
    first, second = (a, b) if random.random() < 0.5 else (b, a)
    longer = len(first.text) - len(second.text)
    features.append([first.true - second.true, 1, longer, first.own - second.own])
    verdicts.append(random.random() < judge.prefers_first(first, second))
w, error = fit_logistic(np.array(features, dtype=float), np.array(verdicts, dtype=float))
names, built_in = ("truth", "position", "length", "own"), (2.0, 0.8, 0.03, 0.6)
print("          built in   found")
for name, true_value, value, se in zip(names, built_in, w, error, strict=True):
    print(f"{name:9} {true_value:8.2f} {value:7.2f} ± {1.96 * se:.2f}")
mended = np.mean(
    [1 / (1 + np.exp(-w[0] * (a.true - b.true))) for a, b in zip(brief, wordy, strict=True)]
)
print(f"score of the brief system without the tastes: {mended:.2f}, by the truth {truth:.2f}")

# %% [markdown] tags=["engine"]
# The truth is 0.56, a little further from one half, because even the judge without tastes sometimes
# errs between a true answer and a false one. Look at the intervals of the coefficients, though.
# Truth and position are found well. Length and authorship are not: in these pairs the longer answer
# is always by the judge's own family, so the verdicts tell us little more than the sum of the two
# tastes. That was enough here. To tell the two apart, we would need pairs that differ in one and
# not in the other, such as two answers of different length by the same system.

# %% [markdown]
# ## The industry's harness
#
# Many numbers in papers come from one program, EleutherAI's `lm-evaluation-harness`
# {cite}`biderman2024lessons`, which has hundreds of tasks. A **task** there is a file in YAML that
# says where the data are and how an item becomes text, and a **model** is an object that answers
# three kinds of requests:
#
# | request | gets | returns |
# |---|---|---|
# | `loglikelihood` | context, continuation | $\log q$ of the continuation, whether it is the greedy one |
# | `loglikelihood_rolling` | a text | $\log q$ of all of it |
# | `generate_until` | context, where to stop | a text |
#
# {py:class}`~llmbook.evaluation.LMEvalAdapter` passes them on to our functions
# ({numref}`fig-evaluation-harness`), so every task made of such requests can run on our model. The
# harness is an extra, `pip install 'llmbook[eval]'`.
#
# ```{figure} ../figures/evaluation-harness.svg
# :name: fig-evaluation-harness
# :alt: A task makes requests of three kinds. The adapter passes them on to score_continuations, window_log_probs and generate. From what comes back the harness makes accuracy and perplexity, bits per byte, and exact match.
#
# The harness decides what is asked and what is made of it; the adapter only passes on.
# ```

# %% [markdown] tags=["engine"]
# ### Engine room: the adapter (`LMEvalAdapter`), tasks written as files, and `run_lm_eval`

# %% [markdown] tags=["engine"]
# Requests of the kind `loglikelihood` serve multiple choice and cloze tasks,
# `loglikelihood_rolling` serves perplexity and bits per byte, and `generate_until` exact match. The
# harness is large, so it is imported only when the first adapter is made. Our class takes on the
# harness's base class at that moment.


# %% tags=["engine"]
#| export
class LMEvalAdapter:
    """A model of ours as lm-evaluation-harness (0.4) wants it; a subclass of its ``LM``.

    A context that is too long is cut on the left. Replies are greedy unless a task samples. Making
    one raises ImportError without the extra "eval", ValueError for a model that sees the future.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> "LMEvalAdapter":
        """Join the class with the harness's ``LM``, which is imported here."""
        with requires_extra("LMEvalAdapter", "eval"), _silence():
            from lm_eval.api.model import LM
        joined = cls if issubclass(cls, LM) else type(cls.__name__, (cls, LM), {})
        return object.__new__(joined)

    def __init__(
        self,
        model: TransformerLM,
        tokenizer: BPETokenizer,
        *,
        start: str = "<|endoftext|>",
        max_new_tokens: int = 64,
        batch_tokens: int = 8192,
    ):
        super().__init__()
        check_whole("max_new_tokens", max_new_tokens, 1)
        check_whole("batch_tokens", batch_tokens, 1)
        self.first = _start_id(tokenizer, start)
        check_causal(model, vocab_size=tokenizer.vocab_size)
        self.model, self.tokenizer, self.start = model, tokenizer, start
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return log q in nats of each continuation, and whether each token is the likeliest."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            ids, (ending,) = encode_pairs(self.tokenizer, context, [continuation], start=self.start)
            pairs.append((ids, ending))
        options: dict[str, Any] = {"too_long": "truncate", "batch_tokens": self.batch_tokens}
        found = score_continuations(self.model, pairs, **options)
        return [(one.log_prob, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return log q in nats of each text, in windows that do not overlap, but for the last."""
        size, totals = _context_length(self.model), []
        for (text,) in (request.args for request in requests):
            ids = _begun(self.tokenizer.encode(text), self.first)
            if len(ids) < 2:
                totals.append(0.0)
                continue
            options = {"stride": size, "batch_tokens": self.batch_tokens}
            found = window_log_probs(self.model, ids, **options)
            totals.append(found.double().sum().item())
        return totals


# %% tags=["engine"]
#| export
class LMEvalAdapter(LMEvalAdapter):  # continued
    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a text for each context, which ends before the first of the strings ``until``."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for key, numbers in groups.items():
            settings = json.loads(key)
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            longest = int(settings.get("max_gen_toks", self.max_new_tokens))
            sampled = settings.get("do_sample", False)
            temperature = float(settings.get("temperature", 1.0)) if sampled else 0.0
            room = _context_length(self.model) + 1 - longest
            if room < 1:
                size = _context_length(self.model)
                expected = f"at most the context length of {size}"
                raise ValueError(f"max_gen_toks: expected {expected}, got {longest}")
            prompts = [
                _begun(self.tokenizer.encode(requests[number].args[0]), self.first)[-room:]
                for number in numbers
            ]
            told = generate(
                self.model,
                prompts,
                max_new_tokens=longest,
                sampling=Sampling(temperature=temperature),
                tokenizer=self.tokenizer,
                stop_tokens=[self.first],
                stop_strings=[stop for stop in until if stop],
            )
            for number, one in zip(numbers, told, strict=True):
                texts[number] = one.text or ""
        return texts


# %% [markdown] tags=["engine"]
# The harness finds data by the name of a file in the task. A missing file would be noticed late,
# deep inside a library, so we look for it first. The program's progress bars and remarks are
# discarded.

# %% tags=["engine"]
#| export
# Tasks are files
TaskKind = Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"]
_TASKS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "fields": ("context", "choices", "answer"),
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metrics": ("acc", "acc_norm", "acc_bytes"),
    },
    "loglikelihood": {
        "fields": ("context", "target"),
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{target}}",
        "metrics": ("perplexity", "acc"),
    },
    "loglikelihood_rolling": {
        "fields": ("text",),
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metrics": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    },
    "generate_until": {
        "fields": ("context", "target"),
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{target}}",
        "metrics": ("exact_match",),
    },
}


# %% tags=["engine"]
#| export
# A task and its data become two files
def write_lm_eval_task(
    folder: str | Path,
    name: str,
    kind: TaskKind,
    items: Sequence[Mapping[str, Any]],
    *,
    until: Sequence[str] = (".",),
    max_new_tokens: int = 32,
) -> Path:
    """Write ``name``.jsonl and ``name``.yaml, a task for lm-evaluation-harness; return the latter.

    Items have "context", "choices" and "answer", the number of the right one (multiple_choice);
    "context" and "target" (loglikelihood, generate_until); or "text" (loglikelihood_rolling).
    Between a context and what follows it, the harness puts a space. ``until`` and
    ``max_new_tokens`` are for generation.
    """
    place, data = _task_files(folder, name, kind, items)
    check_whole("max_new_tokens", max_new_tokens, 1)
    if isinstance(until, str | bytes) or not isinstance(until, Sequence):
        raise ValueError(f"until: expected a list of texts, got {until!r:.60}")
    stops = [check_text(stop, "until") for stop in until]
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "output_type": kind,
        **{key: value for key, value in _TASKS[kind].items() if key.startswith("doc_to")},
        "metric_list": [{"metric": metric} for metric in _TASKS[kind]["metrics"]],
    }
    if kind == "generate_until":
        task["generation_kwargs"] = {"until": stops, "max_gen_toks": max_new_tokens}
        task["generation_kwargs"] |= {"do_sample": False}
        steps = [{"function": "remove_whitespace"}, {"function": "take_first"}]
        task["filter_list"] = [{"name": "none", "filter": steps}]  # the space before a reply
    with whole_file(data) as draft:
        lines = [json.dumps(dict(item), ensure_ascii=False) for item in items]
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with whole_file(place) as draft:  # JSON is YAML, too
        draft.write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
    return place


# %% tags=["engine"]
#| export
# What a task can be
def _task_files(folder: Any, name: Any, kind: Any, items: Any) -> tuple[Path, Path]:
    """Return where a task and its data go, if they make sense."""
    place = check_path(folder, "folder")
    if not place.is_dir():
        raise ValueError(f"folder: expected one that exists, got {str(place)!r}")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise ValueError(f"name: expected letters, digits, '_' and '-', got {name!r:.60}")
    check_choice("kind", kind, get_args(TaskKind))
    if isinstance(items, str | bytes) or not isinstance(items, Sequence) or not len(items):
        raise ValueError(f"items: expected at least one, got {items!r:.60}")
    for item in items:
        if not isinstance(item, Mapping) or set(_TASKS[kind]["fields"]) - set(item):
            fields = ", ".join(_TASKS[kind]["fields"])
            raise ValueError(f"items: expected {fields} in each, got {item!r:.60}")
    return place / f"{name}.yaml", place / f"{name}.jsonl"


# %% tags=["engine"]
#| export
# The harness, in silence
@contextmanager
def _silence() -> Iterator[None]:
    """Without progress bars, remarks, the network, and traces in the random generators."""
    before = os.environ.get("HF_DATASETS_OFFLINE"), random_states()
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        del os.environ["HF_DATASETS_OFFLINE"]
        if before[0] is not None:
            os.environ["HF_DATASETS_OFFLINE"] = before[0]
        set_random_states(before[1])


# %% tags=["engine"]
#| export
# Tasks by name, out of a folder
def run_lm_eval(
    model: TransformerLM,
    tokenizer: BPETokenizer,
    folder: str | Path,
    tasks: Sequence[str],
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-evaluation-harness whose files are in ``folder``; return metrics by task.

    ``options`` are those of ``LMEvalAdapter``. A folder, task or data file that is not there is a
    ValueError. Nothing is fetched.
    """
    adapter = LMEvalAdapter(model, tokenizer, **options)
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise ValueError(f"tasks: expected a list of names, got {tasks!r:.60}")
    for name in tasks:
        _check_task(check_path(folder, "folder"), name)
    with _silence():
        from lm_eval.evaluator import evaluate as run
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(folder), include_defaults=False)
        loaded = manager.load(list(tasks))
        found: Any = run(adapter, loaded, bootstrap_iters=0, log_samples=False)
    return {
        task: {
            metric.removesuffix(",none"): float(value)
            for metric, value in found["results"][task].items()
            if metric.endswith(",none") and "stderr" not in metric
        }
        for task in tasks
    }


# %% tags=["engine"]
#| export
# A task's files must be there
def _check_task(folder: Path, name: Any) -> None:
    """Demand a task's file, and the files of data that it names."""
    import yaml

    there = sorted(path.stem for path in folder.glob("*.yaml"))
    path = folder / f"{name}.yaml"
    if not isinstance(name, str) or not path.is_file():
        listed = ", ".join(there) or "none"
        raise ValueError(f"tasks: expected some of those in {folder} ({listed}), got {name!r:.60}")
    files = (yaml.safe_load(path.read_text(encoding="utf-8")).get("dataset_kwargs") or {}).get(
        "data_files", {}
    )
    for data in files.values() if isinstance(files, Mapping) else ():
        if isinstance(data, str) and not Path(data).is_file():
            raise ValueError(f"tasks: expected the data of {name!r} in {data}, got no such file")


# %% [markdown] tags=["engine"]
# We write four tasks into a folder: multiple choice, and one for each of the three requests. A
# model that is always right would make a poor example, so we take one that saw four copies of the
# exam.

# %% tags=["engine"]
import tempfile

choice_items, reply_items = [], []
for name, topic, value in spoiled_exam:
    context = PHRASES[topic][1].partition("? ")[0].format(name=name) + "?"
    texts = [PHRASES[topic][0].format(name=name, value=one) for one in VALUES[topic]]
    right = VALUES[topic].index(value)
    choice_items.append({"context": context, "choices": texts, "answer": right})
    reply_items.append({"context": context, "target": texts[right].rstrip(".")})
text_items = [{"text": text} for text in run.held_out[:50]]
print(choice_items[0]["context"], choice_items[0]["choices"][:2])

# %% [markdown] tags=["engine"]
# {py:func}`~llmbook.evaluation.write_lm_eval_task` writes two files for each task, the data and the
# description:

# %% tags=["engine"]
folder = Path(tempfile.mkdtemp())
write_lm_eval_task(folder, "exam", "multiple_choice", choice_items)
write_lm_eval_task(folder, "cloze", "loglikelihood", reply_items)
write_lm_eval_task(folder, "stories", "loglikelihood_rolling", text_items)
write_lm_eval_task(folder, "spoken", "generate_until", reply_items)
print(*sorted(path.name for path in folder.iterdir()))

# %% [markdown] tags=["engine"]
# Our own functions compute nine metrics of the four tasks: the accuracy under three normalizations,
# and six metrics of whole texts, of continuations, and of replies. A word here is what the harness
# takes for a word, a piece between white space.

# %% tags=["engine"]
ours = {}
for metric, normalization in (("acc", "none"), ("acc_norm", "character"), ("acc_bytes", "byte")):
    right = []
    for item in choice_items:
        endings = [f" {text}" for text in item["choices"]]
        scores = score_choices(spoiled, bpe, item["context"], endings, normalization=normalization)
        right.append(scores.best == item["answer"])
    ours["exam", metric] = np.mean(right)

# %% tags=["engine"]
# Texts, continuations and replies
texts = [item["text"] for item in text_items]
whole = score_texts(spoiled, bpe, texts, end=False, stride=lm.config.context_length)
n_words = sum(len(re.split(r"\s+", text)) for text in texts)
prompts = [[end, *bpe.encode(item["context"])] for item in reply_items]
endings = [bpe.encode(f" {item['target']}") for item in reply_items]
given = score_continuations(spoiled, list(zip(prompts, endings, strict=True)))
options = {"max_new_tokens": 32, "tokenizer": bpe, "stop_tokens": [end], "stop_strings": ["."]}
told = generate(spoiled, prompts, sampling=Sampling(temperature=0), **options)
said = [one.text.strip() == item["target"] for one, item in zip(told, reply_items, strict=True)]
ours["cloze", "perplexity"] = math.exp(-np.mean([one.log_prob for one in given]))
ours["cloze", "acc"] = np.mean([one.is_greedy for one in given])
ours["stories", "bits_per_byte"] = whole.bits_per_byte
ours["stories", "byte_perplexity"] = 2**whole.bits_per_byte
ours["stories", "word_perplexity"] = math.exp(whole.nats.sum() / n_words)
ours["spoken", "exact_match"] = np.mean(said)

# %% [markdown]
# ## Is it the real thing?
#
# The engine room writes four tasks, one for multiple choice and one for each request, and computes
# their nine metrics with our functions: `ours`. The harness runs the same tasks, offline, on the
# model that read four copies of the exam:

# %%
theirs = run_lm_eval(spoiled, bpe, folder, ["exam", "cloze", "stories", "spoken"])
for (task, metric), value in ours.items():
    assert math.isclose(value, theirs[task][metric], rel_tol=1e-5, abs_tol=1e-9), (task, metric)
    print(f"{task}, {metric}: the same to 5 digits")

# %% [markdown]
# So a score from the harness and a score from our functions mean the same thing.

# %% [markdown] tags=["engine"]
# ### Engine room: numbers beside scikit-learn, and the time that a batch saves

# %% [markdown] tags=["engine"]
# The calibration numbers have counterparts in scikit-learn: the Brier score, and the bins of a
# reliability diagram. We compare them on 2,000 simulated answers:

# %% tags=["engine"]
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

random = np.random.default_rng(1)
c = random.uniform(0, 1, 2000)
y = (random.random(2000) < c**1.5).astype(int)  # overconfident
found = calibration(c, y, n_resamples=200)
share, mean = calibration_curve(y, c, n_bins=10)
by_hand = np.sum(np.array(found.counts) * np.abs(share - mean)) / 2000
assert abs(found.brier - brier_score_loss(y, c)) < 1e-12
assert np.allclose(found.accuracy, share) and np.allclose(found.confidence, mean)
assert abs(found.error - by_hand) < 1e-12
print(f"Brier score {found.brier:.3f}, by scikit-learn {brier_score_loss(y, c):.3f}")
print(f"calibration error {found.error:.3f}, from scikit-learn's bins {by_hand:.3f}")
print(f"by chance it would be {found.by_chance:.3f}, p = {found.p_value:.3f}")

# %% [markdown] tags=["engine"]
# Strengths of players are the coefficients of a logistic regression without an intercept, whose
# features are $+1$ for the first and $-1$ for the second player of a game. Scikit-learn's
# regression finds the same strengths:

# %% tags=["engine"]
from sklearn.linear_model import LogisticRegression

table = np.array([[0, 14, 19, 9], [6, 0, 12, 11], [1, 8, 0, 10], [3, 9, 10, 0]])
games, outcomes = [], []
for i in range(4):
    for j in range(4):
        for _ in range(table[i, j]):
            games.append(np.eye(4)[i] - np.eye(4)[j])
            outcomes.append(1)
games, outcomes = games + [-game for game in games], outcomes + [0] * len(outcomes)
regression = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
theirs = regression.fit(np.array(games), outcomes).coef_[0]
ours = bradley_terry(table, n_resamples=2).strengths
difference = np.abs(ours - (theirs - theirs.mean())).max()
assert difference < 1e-3
print("strengths:", ours.round(2).tolist(), "largest difference below 0.001")

# %% [markdown] tags=["engine"]
# The choices of a question are independent of each other, and so are the questions; everything can
# go through the model together. Rows of similar length are put side by side, so that there is
# little padding. How much time does that save, compared with scoring one choice after the other?

# %% tags=["engine", "nbval-ignore-output"]
import time


def seconds(run: Callable[[], Any]) -> float:
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


pairs = [
    ([end, *bpe.encode(item["context"])], bpe.encode(f" {text}"))
    for item in choice_items[:16]
    for text in item["choices"]
]
together = seconds(lambda: score_continuations(lm, pairs, batch_tokens=8192))
singly = seconds(lambda: [score_continuations(lm, [pair]) for pair in pairs])
print(f"{len(pairs)} choices: one by one {1000 * singly / len(pairs):.2f} ms each, ", end="")
print(f"together {1000 * together / len(pairs):.2f} ms each, {singly / together:.1f} times as fast")

# %% [markdown]
# ## Exercises
#
# ````{exercise} The shift by one
# :label: ex-evaluation-shift
# *Ten minutes.* A colleague's evaluation says that a model has a perplexity of 400, though in
# training it had a perplexity of 5. Write `mean_surprise(logits, ids)`, the mean of
# $-\log q(x_t \mid x_{<t})$ in nats over all tokens but the first of one row, from `logits` of
# shape `(n, vocab_size)` and `ids` of shape `(n,)`. `logits[t]` is what the model said after it had
# read `ids[t]`.
# ````


# %% tags=["solution"]
def mean_surprise(logits: Tensor, ids: Tensor) -> float:
    """Return the mean surprise of ``ids`` after the first, in nats, given ``logits`` at each."""
    # Position t has read ids[t] and speaks about ids[t + 1]. The colleague held it against ids[t],
    # a token that the model has read and almost never expects to come again.
    log_probs = logits[:-1].log_softmax(dim=-1)
    return -log_probs.gather(-1, ids[1:, None]).mean().item()


# %% tags=["check"]
torch.manual_seed(0)
ids = torch.tensor([3, 1, 4, 0, 5])
certain = torch.full((5, 6), -20.0)
certain[torch.arange(4), ids[1:]] = 20.0
found = mean_surprise(certain, ids)
assert found < 5, f"a model that always knows the next token is surprised by {found:.0f} nats"
assert found < 1e-3, f"{found:.2f} nats for a model without doubt: a position without a next token?"
even = mean_surprise(torch.zeros(5, 6), ids)
assert abs(even - math.log(6)) < 1e-5, f"6 equally likely tokens: {even:.3f} nats, not ln 6 = 1.792"
logits = torch.randn(5, 6)
assert abs(mean_surprise(logits + 3, ids) - mean_surprise(logits, ids)) < 1e-5, (
    "a constant added to all logits changes the surprise: take the softmax first"
)

# %% [markdown]
# ````{exercise} The best of k
# :label: ex-evaluation-best
# *Twenty minutes.* Suppose that answers get rewards instead of being just right or wrong. Write
# `best_of_k(rewards, k)`, the unbiased estimate, from $n$ rewards, of how large the largest reward
# among $k$ answers is on average. Sort the rewards. In how many of the choices of $k$ is the $i$-th
# smallest one the largest? With rewards of 0 and 1 you must get pass@k.
# ````


# %% tags=["solution"]
def best_of_k(rewards: list[float], k: int) -> float:
    """Return the mean of the largest of ``k`` rewards, over all choices of ``k`` of them."""
    # The i-th smallest is the largest if the other k - 1 are among the i - 1 before it.
    ways = [math.comb(i, k - 1) for i in range(len(rewards))]
    return sum(w * r for w, r in zip(ways, sorted(rewards), strict=True)) / sum(ways)


# %% tags=["check"]
rewards = [0.3, -1.0, 2.0, 0.3, 1.2]
assert math.isclose(best_of_k(rewards, 1), np.mean(rewards)), "the best of 1 is not the mean"
assert math.isclose(best_of_k(rewards, 5), 2.0), "the best of all is not the largest"
other_way = best_of_k(rewards[::-1], 2)
assert math.isclose(best_of_k(rewards, 2), other_way), "the order of rewards matters"
found = best_of_k([1.0, 1.0, 0.0, 0.0, 0.0], 2)
assert not math.isclose(found, 1 - 0.6**2), "an answer is drawn twice: that is not unbiased"
assert math.isclose(found, pass_at_k(5, 2, 2)), f"two of five right, k = 2: {found:.3f}, not 0.7"

# %% [markdown]
# ````{exercise} How often must you ask?
# :label: ex-evaluation-attempts
# *Ten minutes.* You want to publish this sentence: "our assistant tells a secret in less than
# `rate` of all attempts, at a confidence of `level`". Write `attempts_needed(rate, level)`, the
# least number of attempts, none of which may succeed, after which you can say so.
# ````


# %% tags=["solution"]
def attempts_needed(rate: float, level: float) -> int:
    """Return after how many attempts without success the rate is below ``rate``."""
    # (1 - rate)^n is at most 1 - level; 3 / rate is an approximation, for a level of 95 % only
    return math.ceil(math.log(1 - level) / math.log(1 - rate))


# %% tags=["check"]
for rate, level in ((0.01, 0.99), (0.01, 0.95), (0.3, 0.9), (0.002, 0.5)):
    n = attempts_needed(rate, level)
    assert n == int(n), f"attempts are whole: {n:.2f} has to be rounded up"
    assert (1 - rate) ** n <= 1 - level, (
        f"with a rate of {rate}, {n} attempts without success happen with probability "
        f"{(1 - rate) ** n:.4f}, more than 1 - {level}"
    )
    assert (1 - rate) ** (n - 1) > 1 - level, f"rate {rate}, level {level}: {n - 1} are enough"

# %% [markdown]
# ````{exercise} Is this order a coincidence?
# :label: ex-evaluation-order
# *Ten minutes.* Write `order_p_value(own, shuffled)`, where `own` is the log-likelihood of a file's
# order and `shuffled` is a list of the log-likelihoods of random orders. Return the p-value of
# {eq}`evaluation-order`, which can never be zero, because the file's own order is one of the
# orders, too.
# ````


# %% tags=["solution"]
def order_p_value(own: float, shuffled: list[float]) -> float:
    """How probable it is that the file's order ranks so high by chance."""
    return (1 + sum(other >= own for other in shuffled)) / (1 + len(shuffled))


# %% tags=["check"]
assert order_p_value(-10.0, [-12.0] * 19) == 1 / 20, "the best of 20 orders has p = 1/20, not 0"
assert order_p_value(-12.0, [-10.0] * 19) == 1, "the worst of all orders has p = 1"
assert order_p_value(-10.0, [-10.0] * 9) == 1, "orders that are as likely count as at least as good"
assert abs(order_p_value(-3.0, [-1.0, -2.0, -4.0]) - 0.75) < 1e-12, (
    "two of three are better: (1 + 2) / 4"
)

# %% [markdown]
# ````{exercise} Bins of equal size
# :label: ex-evaluation-adaptive
# *Twenty minutes.* If most answers of a model have a confidence near 1, most bins of equal width
# are nearly empty. Write `adaptive_error(confidences, right, n_bins)`, the calibration error with
# `n_bins` bins that hold equally many answers: those with the lowest confidences, the next ones,
# and so on. (`np.array_split` cuts an array into parts whose sizes differ by at most one.)
# ````


# %% tags=["solution"]
def adaptive_error(confidences: list[float], right: list[int], n_bins: int) -> float:
    """The expected calibration error with bins of equally many answers."""
    c, y = np.array(confidences, dtype=float), np.array(right, dtype=float)
    order = np.argsort(c, kind="stable")
    parts = np.array_split(order, n_bins)
    return float(sum(abs((y[part] - c[part]).sum()) for part in parts) / len(c))


# %% tags=["check"]
found = adaptive_error([0.9, 0.1, 0.9, 0.1], [1, 0, 1, 0], 2)
assert abs(found - 0.1) < 1e-12, "sort answers by confidence, each outcome with its own answer"
found = adaptive_error([0.95, 0.96, 0.97, 0.98], [0, 0, 1, 1], 2)
assert abs(found - 0.49) < 1e-12, "bins hold equally many answers, however close their confidences"
found = adaptive_error([0.5, 0.5, 0.5, 0.9, 0.9], [1, 1, 1, 0, 0], 2)
assert abs(found - 0.66) < 1e-12, "a bin counts by its answers: 3 of 5 and 2 of 5 here"
found = adaptive_error([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0], 1)
assert found < 1e-12, "within a bin, misses to both sides cancel"

# %% [markdown]
# ````{exercise} A rating after each game
# :label: ex-evaluation-elo
# *Thirty minutes.* Chess players are rated by a rule that sees one game at a time. If `winner`
# beats `loser`, and $e$ was the probability of that according to their present ratings,
# $e = 1 / (1 + 10^{(r_\mathrm{loser} - r_\mathrm{winner}) / 400})$, then the winner gets
# $k (1 - e)$ points from the loser. Write `elo(games, n_players, k=32.0)` for a list of pairs
# (winner, loser); all players begin with 1000 points. Then compare two orders of the same games.
# ````


# %% tags=["solution"]
def elo(games: list[tuple[int, int]], n_players: int, k: float = 32.0) -> list[float]:
    """Ratings after all games, updated after each."""
    ratings = [1000.0] * n_players
    for winner, loser in games:
        expected = 1 / (1 + 10 ** ((ratings[loser] - ratings[winner]) / 400))
        gain = k * (1 - expected)
        ratings[winner] += gain
        ratings[loser] -= gain
    return ratings


# %% tags=["check"]
after = elo([(0, 1)], 2)
assert after[0] == 1016, "between equals the winner gets half of k"
assert elo([(0, 1)], 2, k=10.0)[0] == 1005, "the gain is k (1 - e), for any k"
assert abs(sum(elo([(0, 1), (1, 2), (0, 2)], 3)) - 3000) < 1e-9, "what one gets, the other gives"
upset = elo([(0, 1)] * 20 + [(1, 0)], 2)
before = elo([(0, 1)] * 20, 2)
assert before[0] - upset[0] > 16, "to lose against a weaker player costs more than half of k"
close = elo([(0, 1)] * 3, 2)
assert abs(close[0] - 1043.75) < 0.1, "odds of ten are 400 points: use powers of 10 and 400"
assert before[0] - elo([(0, 1)] * 19, 2)[0] < 8, (
    "to beat a weaker player brings less than half of k"
)
early, late = elo([(0, 1)] * 5 + [(1, 0)] * 5, 2), elo([(1, 0)] * 5 + [(0, 1)] * 5, 2)
assert late[0] > 1000 > early[0], (
    "the order matters: who wins last stands higher, with as many wins"
)

# %% [markdown]
# ## Summary
#
# Perplexity depends on the tokenizer; bits per byte does not. Both are right only if the text
# begins with one start token and the model does not see the future. A score of long texts depends
# on the windows, and a multiple-choice score on the normalization. Several attempts are scored by
# pass@k if somebody can check them, and otherwise by majority.
#
# A score needs an interval. Two models are compared on the same items, and a claim about a method
# needs several training runs. A few copies of a test in the training text spoil its score; overlap
# and order find copies, but not a test that was reworded. Calibration says whether a model knows
# when it is right. Reading both ways removes a judge's taste for positions; other tastes must be
# measured against known truth.
#
# **Checklist: before you believe a number.**
#
# - What would a guesser score, and what is the most that anybody can score?
# - How many items are there, from how many clusters, and what is the interval?
# - Is the comparison paired, on the same items, with the same prompts?
# - How much does the score move from seed to seed of the same training?
# - Could the test have been in the training text: copied, translated, or reworded?
# - Does the model see the future? One pass tells you.
# - Is the score per byte or per token, with how much context, and with the end of the text?
# - Which normalization of choices was used, and by which rule were answers read?
# - If a model judges, does it read in both orders, at equal length, and no answers of its own
#   family?
# - Is there a report with each outcome, the settings, and the seed?
#
# **Further reading.** Miller {cite}`miller2024error` writes on error bars, Biderman and colleagues
# {cite}`biderman2024lessons` on reproducible results, Oren and colleagues {cite}`oren2024proving`
# on contamination, Guo and colleagues {cite}`guo2017calibration` on calibration, Chiang and
# colleagues {cite}`chiang2024chatbot` on leaderboards, Zheng and colleagues
# {cite}`zheng2023judging` on judges, and Dubois and colleagues {cite}`dubois2024length` on length.
