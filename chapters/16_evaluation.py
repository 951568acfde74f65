# %% [markdown]
# # Evaluation
#
# > Know whether a model got better: scores that can be compared, answers read as they were meant,
# > and an interval beside every number.
#
# Two models of one architecture read the same hundred stories. The first has a {term}`perplexity`
# of 11, the second one of 23, and lower is better. Yet the second predicts the stories far better:
# to write them down with its help takes 1.1 bits per byte, and with the first 3.5. Both pairs of
# numbers are right, and we will compute them in a moment. The two perplexities only look alike; one
# is per byte, the other per token.
#
# Most numbers that are said of language models have such a trap in them. The score changes with the
# tokenizer, with a space at the end of the question, with where a long text was cut. An answer is
# marked wrong because it was written as 1,234. A model wins by two points on two hundred questions,
# and would have lost on two hundred others. This chapter builds the measurements that later
# chapters rely on, and for each it looks for the trap.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.evaluation.perplexity`, {py:func}`~llmbook.evaluation.bits_per_byte`, {py:func}`~llmbook.evaluation.check_causal`, {py:func}`~llmbook.evaluation.score_choices`, {py:func}`~llmbook.evaluation.parse_answer`, {py:func}`~llmbook.evaluation.pass_at_k`, {py:func}`~llmbook.evaluation.confidence_interval`, {py:func}`~llmbook.evaluation.paired_test` |
# | **You need** | training ({doc}`13_training`), generation ({doc}`14_generation`), bits per byte ({doc}`01_tinyworld`), means and variances |
# | **It takes** | 60 minutes for the main line, 2.5 hours for everything, 90 seconds to run |

# %% tags=["remove-cell"]
#| default_exp evaluation

# %% tags=["engine"]
#| export
# The imports of the module
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import permutations, product
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from llmbook.batches import Tokenizer
from llmbook.environment import check_at_least, check_choice, check_fraction, check_text
from llmbook.optimization import cross_entropy
from llmbook.tokenizer import valid_text
from llmbook.training import unnoticed

# %% [markdown]
# Here are the two models. They have the same layers and train for the same 40 steps on the same
# stories of the tiny world. One reads bytes, the other tokens of a {term}`BPE <byte-pair
# encoding>`:

# %%
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from llmbook.batches import BatchSampler, TokenShards, pack_documents, write_shards
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig, TransformerLM
from llmbook.tinyworld import PHRASES, VALUES, TinyWorld
from llmbook.tokenizer import BPETokenizer, train_bpe
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
# Chapter 13's {py:func}`~llmbook.training.documents_score` tells the bits and the bytes of texts:

# %%
tokenizers = {"bytes": BPETokenizer.from_merges([]), "BPE": train_bpe(stories, 1024)}
found = {}
for name, length in (("bytes", 384), ("BPE", 128)):
    tokenizer = tokenizers[name]
    bits, n_bytes = documents_score(trained(tokenizer, length, 40), tokenizer, held_out)
    n_tokens = sum(len(tokenizer.encode(text)) + 1 for text in held_out)
    found[name] = 2 ** (bits / n_tokens), bits / n_bytes
    print(f"{name:5}: perplexity {found[name][0]:3.0f}, {found[name][1]:.1f} bits per byte")
assert found["bytes"][0] < found["BPE"][0] / 1.5 and found["bytes"][1] > 2 * found["BPE"][1]

# %% [markdown]
# ## Per what?
#
# A model with tokenizer $\tau$ cuts a text $x$ into $n_\tau$ tokens, and the chain rule gives $\log
# q(x) = \sum_t \log q(x_t \mid x_{<t})$. The left side does not know about tokens. (To be exact, it
# is the probability of this one way to cut $x$. Others spell the same text, so $q(x)$ is a little
# more; chapter 06 adds them all up.) The right side has a number of terms that the tokenizer
# decides. So
#
# $$
# \text{perplexity} = \exp\Bigl(-\frac{\log q(x)}{n_\tau}\Bigr) , \qquad
# \text{bits per byte} = \frac{-\log_2 q(x)}{b} .
# $$ (evaluation-units)
#
# Only $n_\tau$ depends on the tokenizer; the number of bytes $b$ belongs to the text. For two
# models $q$ and $r$ and the same $x$, the ratio of their bits per byte is $\log q(x) / \log r(x)$:
# it asks which one finds the text more probable, and nothing else. The ratio of the logarithms of
# their perplexities is that same number times $n_\rho / n_\tau$. Here the byte model has about four
# times as many terms, so each of them is smaller. From {eq}`evaluation-units` also follows how to
# go from one to the other,
#
# $$
# \text{bits per byte} = \frac{n_\tau}{b} \log_2 (\text{perplexity}) .
# $$ (evaluation-conversion)
#
# Two more traps are in the units. Losses are in nats and compressors count bits, and to forget the
# $\ln 2 \approx 0.693$ makes a model look 31 % better. And the bytes must be those of the *text*.
# Programs that have only token ids at hand decode each one and add up the lengths. But a token may
# hold a part of a character. Alone it is no valid UTF-8, decodes to the replacement character
# U+FFFD, and that takes three bytes:

# %%
text = "Zoë naïvely ordered 抹茶 and crème brûlée for 12 €."
print("counted in                          bytes")
for name, tokenizer in tokenizers.items():
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    print(f"pieces decoded one by one, {name:5} {sum(len(piece.encode()) for piece in pieces):8}")
print(f"the text itself {len(text.encode()):25}")

# %% [markdown]
# With so many bytes to divide by, the score is 39 % lower than it should be, and no weight of the
# model has changed. In English the error is small, which is why it lives long.
#
# ## The log-probability of each token
#
# All scores of this chapter come from one place. At position $t$ the model has read $x_1$ to $x_t$
# and its logits are about $x_{t+1}$. So the logits of all positions but the last are held against
# the ids of all positions but the first:


# %%
#| export
def model_logits(
    model: nn.Module, ids: Int64[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence vocab_size"]:
    """Return the logits of a model that returns them, or as transformers a record with them."""
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


def next_log_probs(
    model: nn.Module, ids: Int64[Tensor, "batch sequence"]
) -> Float[Tensor, "batch targets"]:
    """Return log q of each id after the first of its row, in nats, given those before it there."""
    logits, targets = model_logits(model, ids[:, :-1]), ids[:, 1:]
    return -cross_entropy(logits, targets.contiguous(), reduction="none")


# %% [markdown]
# What did the first token get? Nothing: there is no position before it. So a text is put after a
# special token, and in this book that is `<|endoftext|>`, which ended the previous document in
# training. (Many models have one of their own for this, called BOS, beginning of sequence.) It must
# be there *once*. We take the model that chapter 13 has trained, and compare:

# %%
run = pretrained("tinyworld")
model, tokenizer = run.model, run.tokenizer
end = tokenizer.special_tokens["<|endoftext|>"]
means = {}
for name, before in {"once": [end], "missing": [], "three times": [end] * 3}.items():
    nats, n_tokens = 0.0, 0
    for story in held_out[:50]:
        ids = tokenizer.encode(story)
        log_probs = next_log_probs(model, torch.tensor([before + ids]))[0]
        nats -= log_probs[1 - len(ids) :].sum().item()  # in each case all tokens but the first
        n_tokens += len(ids) - 1
    means[name] = math.exp(nats / n_tokens)
    worse = means[name] > 1.1 * means["once"]
    print(f"start token {name:12} {'more than 10 % worse' if worse else 'perplexity of 1.5'}")
assert 1.45 < means["once"] < 1.55 and 1.45 < means["three times"] < 1.65
assert means["missing"] > 1.1 * means["once"]

# %% [markdown]
# Without the start token this model is about a fifth worse at all the *other* tokens, with a
# perplexity of 1.85: it has never seen a row that begins with anything else. Large models, whose
# attention leans on the first position, can break altogether. Doubled, it does little harm here, as
# documents may be empty; but a model that never saw it twice is outside of what it knows. It comes
# about when a tokenizer adds it and the program does, too, so ours adds it only if it is not there.

# %% [markdown]
# ## A model must not see the future
#
# All of this rests on one assumption: that logits at position $t$ depend on tokens up to $t$ only.
# A mask that is off by one, a normalization over the whole row, or an expert layer that sorts all
# tokens of a row by their score breaks it. Then the loss is wonderful, in training and in
# evaluation, and the model cannot generate. No score shows the fault, but a direct test does.
# Change the tokens from some place on, and the logits before it must stay what they were:


# %%
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

    A row of ``length`` random ids is read twice; the second time the last ids, from one of several
    places on, are others. Logits before that place may differ by ``tolerance`` times their spread.
    """
    check_at_least(length=(2, length), seed=(0, seed), vocab_size=(2, vocab_size))
    _check_positive("tolerance", tolerance)
    size = vocab_size or _vocabulary(model)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(size, (1, length), generator=random)
    places = sorted({1, length // 2, length - 1})
    changed = ids.repeat(len(places), 1)
    for row, place in enumerate(places):  # adding 1 to size - 1 makes each id another one
        changed[row, place:] += torch.randint(1, size, (length - place,), generator=random)
    changed %= size
    device = next(model.parameters()).device
    with unnoticed(model):
        found = model(torch.cat([ids, changed]).to(device))
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


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r:.60}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


# %% [markdown]
# Our model passes. One whose logits are averaged with those of the next position, as an off-by-one
# in a convolution would do it, is refused:


# %%
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
# cut into windows, and it matters how. If windows follow each other, the first tokens of each have
# hardly any context, and are scored as if the text began there. If each window moves on by a
# {term}`stride` $s < T$, only its last $s$ tokens count, and the others are what they are predicted
# from:


# %%
#| export
class Window(NamedTuple):
    """A piece of a text: the model reads ids ``start`` to ``end``, and those from ``first`` count.

    Each id is predicted from those before it in the window, so ``first`` has ``first - start`` ids
    of context, and the last one, ``end - 1``, is read by nobody.
    """

    start: int
    first: int
    end: int


# %%
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


# %% [markdown]
# Every token but the first is scored once, and after the first window has at least $T + 1 - s$
# tokens of context. The price is $T / s$ times the work. {numref}`fig-evaluation-windows` shows
# both, with stories in windows of 16 tokens:


# %% mystnb={"figure": {"caption": "Windows of 16 tokens. Left, how many tokens before it each token gets to see, with two strides. Right, the perplexity of the same model on the same stories, over the stride.", "name": "fig-evaluation-windows"}, "image": {"alt": "Left, two sawtooth lines over 48 tokens: with a stride of 16 the context falls to 1 at each window and rises to 16, with a stride of 4 it stays between 13 and 16. Right, perplexity rises with the stride, from 2.2 at 1 to 5.2 at 16."}}
def windowed(ids: list[int], stride: int, size: int = 16) -> Tensor:
    parts = []
    for window in plan_windows(len(ids), size, stride):
        log_probs = next_log_probs(model, torch.tensor([ids[window.start : window.end]]))[0]
        parts.append(log_probs[window.first - window.start - 1 :])
    return torch.cat(parts)


rows = [[end, *tokenizer.encode(story), end] for story in held_out[:15]]
strides, by_stride = (1, 2, 4, 8, 16), []
for stride in strides:
    with torch.no_grad():
        by_stride.append(torch.cat([windowed(row, stride) for row in rows]).mean().neg().exp())
assert sorted(by_stride) == by_stride and by_stride[-1] > 1.5 * by_stride[0]
figure, axes = plt.subplots(1, 2)
for stride in (16, 4):
    plan = plan_windows(49, 16, stride)
    seen = [place - w.start for w in plan for place in range(w.first, w.end)]
    axes[0].plot(range(1, 49), seen, label=f"stride {stride}")
axes[0].set(title="Context of each token", xlabel="token", ylabel="tokens seen", ylim=(0, 20))
axes[0].legend(loc="lower right")
axes[1].plot(strides, by_stride, "o-")
axes[1].set(title="Perplexity", xlabel="stride", xticks=strides, ylim=(1, None))
plt.show()

# %% [markdown]
# The same weights and the same text have perplexities from 2.2 to 5.2. Whoever reports one has to
# say which windows it is from; {py:func}`~llmbook.evaluation.perplexity` takes a stride of half the
# context length unless told otherwise. For texts that fit, as our stories do into 128 tokens, there
# is one window and nothing to choose.
#
# Put together, this is a function: {py:func}`~llmbook.evaluation.score_texts`, in the room below,
# returns the nats, tokens and bytes of each text, and the two measures of {eq}`evaluation-units`
# follow from their sums. (The numbers of each text are kept, because the intervals below need
# them.)


# %%
#| export
class TextScores(NamedTuple):
    """How surprised a model was by some texts: for each the nats, and its tokens and bytes."""

    nats: Float[np.ndarray, " texts"]
    n_tokens: Int64[np.ndarray, " texts"]
    n_bytes: Int64[np.ndarray, " texts"]

    @property
    def perplexity(self) -> float:
        """e to the nats per token."""
        return math.exp(self.nats.sum() / self.n_tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits for all texts, divided by their bytes."""
        if not self.n_bytes.sum():
            raise ValueError("texts: expected at least one byte, got none")
        return float(self.nats.sum() / math.log(2) / self.n_bytes.sum())


# %% [markdown] tags=["engine"]
# ### Engine room: rows of unequal length, models of others, and texts of any length

# %% [markdown] tags=["engine"]
# A model is anything that maps ids to logits, one of `transformers` as well as ours. How many ids
# it reads at once stands in its configuration, under one of several names.

# %% tags=["engine"]
#| export
Numbers = Sequence[float | int | np.number | np.bool_] | np.ndarray | Tensor
Clusters = Sequence[Hashable] | np.ndarray
Rows = Sequence[Sequence[int]]


def _context_length(model: nn.Module, given: int | None = None) -> int:
    """How many ids the model reads at once: what is ``given``, or what its configuration says."""
    check_at_least(context_length=(1, given))
    config = getattr(model, "config", None)
    names = ("context_length", "max_position_embeddings", "n_positions")
    known = [getattr(config, name) for name in names if getattr(config, name, None)]
    if given is None and not known:
        raise ValueError("context_length: expected a number, as model.config has none, got None")
    if given is not None and known and given > known[0]:
        raise ValueError(f"context_length: expected at most the model's {known[0]}, got {given}")
    return int(known[0] if given is None else given)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
# says of a row does not depend on what comes after it, so padding needs no mask; it only costs
# time. Rows are therefore sorted by length.


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
# A text without a token, and without an end to predict, has no windows: it counts with 0 nats. That
# is allowed for one of many texts, but a test set without any byte has no bits per byte, and an
# empty one no score at all. Each model is first asked whether it sees the future.


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
    check_causal(model, vocab_size=tokenizer.vocab_size, length=min(16, size))
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
# longer ones, its last window begins where the one before ended, and ours reaches back.) The
# opening's two numbers differ in the tokenizer alone, and {eq}`evaluation-conversion` turns one
# into the other.

# %% tags=["engine"]
scores = score_texts(model, tokenizer, held_out, stride=128)
bits, n_bytes = documents_score(model, tokenizer, held_out)
assert math.isclose(scores.bits_per_byte, bits / n_bytes, rel_tol=1e-5)
ratio = scores.n_tokens.sum() / scores.n_bytes.sum()
assert math.isclose(scores.bits_per_byte, ratio * math.log2(scores.perplexity), rel_tol=1e-9)
print(f"{scores.bits_per_byte:.1f} bits per byte, here and in chapter 13")


# %% [markdown]
# ## Multiple choice by likelihood
#
# A model that has only been pretrained does not answer questions; it continues texts. It can still
# take an exam. We put each answer after the question, let the model say how probable it is there,
# and take the likeliest {cite}`brown2020gpt3`. With context $h$ and an answer $a$ of $m$ tokens
# that is
#
# $$
# s(a) = \log q(a \mid h) = \sum_{t=1}^{m} \log q(a_t \mid h, a_{<t}) .
# $$ (evaluation-choice)
#
# The facts of the tiny world make such an exam, with four answers to each question, the first one
# right:

# %%
draws, facts = random.Random(0), []
for name, known in world.cast.facts.items():
    for attribute in ("species", "home", "food", "toy", "job"):
        stem = PHRASES[attribute][1].format(name=name, value="|").partition("|")[0].rstrip()
        others = [value for value in VALUES[attribute] if value != known[attribute]]
        answers = [known[attribute], *draws.sample(others, 3)]
        facts.append((stem, [" " + answer for answer in answers]))
print(*facts[1], sep="\n")


# %% [markdown]
# Equation {eq}`evaluation-choice` as code, one answer after the other:


# %%
def log_prob_of(context: str, answer: str) -> float:
    before, ids = [end, *tokenizer.encode(context)], tokenizer.encode(answer)
    with torch.no_grad():
        log_probs = next_log_probs(model, torch.tensor([before + ids]))[0]
    return log_probs[-len(ids) :].sum().item()


for answer in facts[1][1]:
    print(f"{answer:12} {'likely' if log_prob_of(facts[1][0], answer) > -1 else 'unlikely'}")
right = sum(
    max(answers, key=lambda answer: log_prob_of(stem, answer)) == answers[0]
    for stem, answers in facts[:100]
)
assert right > 95
print("more than 95 of 100 questions right")

# %% [markdown]
# ### The seam
#
# Now write the same questions with the space at the end of the context and not at the beginning of
# the answer, which looks harmless:

# %%
right = sum(
    max(answers, key=lambda answer: log_prob_of(stem + " ", answer.strip())) == answers[0]
    for stem, answers in facts[:100]
)
assert right < 60
print("fewer than 60 of 100 questions right, where guessing has 25")

# %% [markdown]
# In our run it was 31. The model knows every one of these facts, and is hardly better than a guess.
# {numref}`fig-evaluation-seam` shows why: text in training has never been cut like this. A space
# and the word after it are one token, so after the single token "space" no word ever came.
#
# ```{figure} ../figures/evaluation-seam.svg
# :name: fig-evaluation-seam
# :alt: As one text, the answer is a token with a space; separately, a lone space ends the context.
#
# The same characters in three ways. What the model has learned is in the first row.
# ```
#
# The cure is to encode context and answer **jointly**, as the text that they are together, and to
# look for the seam afterwards. White space at the end of the context goes over to the answer. If a
# token stretches across the seam, as where "un" is continued by "happy", it belongs to the answer,
# together with the end of the context that is in it. All answers to a question then share what
# comes before, so their probabilities are still those of alternatives after the same beginning.
#
# ### Longer answers lose
#
# Each token multiplies the probability by a number below 1. Between answers of unequal length, the
# sum of {eq}`evaluation-choice` therefore prefers short ones. What it should be divided by is a
# matter of choice, and evaluation programs differ:
#
# | `normalization` | score | remark |
# |---|---|---|
# | "none" | $s(a)$ | the probability itself; right where an answer ends in the same sign as the others |
# | "token" | $s(a) / m$ | depends on the tokenizer |
# | "character" | $s(a) / \text{characters}$ | `acc_norm` of EleutherAI's harness {cite}`gao2024harness` |
# | "byte" | $s(a) / \text{bytes}$ | the same for English; our default |
# | "unconditional" | $s(a) - \log q(a \mid \text{neutral})$ | how much more likely the context makes it {cite}`brown2020gpt3,holtzman2021surface` |

# %% [markdown] tags=["engine"]
# ### Engine room: the seam, all choices in one batch, and choices that cannot be compared

# %% [markdown] tags=["engine"]
# `encode_pairs` finds the seam. It compares the ids of the context with those of context and answer
# together, and the shared part ends at the first difference.

# %% tags=["engine"]
#| export
Seam = Literal["joint", "separate"]
TooLong = Literal["error", "truncate"]
Normalization = Literal["none", "token", "character", "byte", "unconditional"]


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
# What is too long is refused, unless the caller asks for a cut. Then the oldest tokens go, the
# start token first, and all choices lose the same ones: cut by its own length, each would be judged
# after another context.


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
# One choice may begin another, as "10" begins "100" where each digit is a token. The longer one is
# then a part of the event that is the shorter one, and never more likely. Such choices are refused,
# token by token; an `ending` that is scored with each of them, such as a full stop, tells them
# apart.


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
# All choices of a question are one batch. The result is that of one by one:

# %% tags=["engine"]
for stem, answers in facts[:20]:
    together = score_choices(model, tokenizer, stem, answers, normalization="none").log_probs
    alone = [log_prob_of(stem, answer) for answer in answers]
    assert np.allclose(together, alone, atol=1e-3)
print("20 questions: the same one by one and in a batch")

# %% [markdown]
# ### What length does to a score
#
# All of this, and the batch that makes it fast, is now in
# {py:func}`~llmbook.evaluation.score_choices`. We measure the bias with a model that hardly knows
# the facts: the second one of the opening, after 120 steps. Each answer is a sentence in one of
# three wordings, which are of unequal length.

# %%
small = trained(tokenizers["BPE"], 128, 120)
draws, statements = random.Random(1), []
for name, known in list(world.cast.facts.items())[:40]:
    for attribute in ("home", "food", "job"):
        others = [value for value in VALUES[attribute] if value != known[attribute]]
        said = [(draws.choice((0, 2, 4)), v) for v in (known[attribute], *draws.sample(others, 3))]
        sentences = [f" {PHRASES[attribute][i].format(name=name, value=v)}" for i, v in said]
        statements.append((f"One morning, {name} sat by the window. It was cold.", sentences))

# %% [markdown]
# Which sentence wins under each normalization, and how long is it?

# %%
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
# {numref}`fig-evaluation-normalization` shows what it took:

# %% mystnb={"figure": {"caption": "What one model picks among four sentences of unequal length, by the normalization. Dotted, what a blind guess would pick.", "name": "fig-evaluation-normalization"}, "image": {"alt": "Bars for five normalizations. Right answers are between 20 and 40 percent for all. The shortest is picked in two thirds of all cases without normalization, in a quarter of them per byte; the longest in 5 percent without, in nearly half per byte and in more than half with unconditional."}}
figure, axes = plt.subplots(1, 3, sharey=True)
guesses = (0.25, *guess)
for panel, title in enumerate(("The right one", "The shortest one", "The longest one")):
    axes[panel].barh(list(shares), [share[panel] for share in shares.values()])
    axes[panel].axvline(guesses[panel], color="gray", linestyle=":")
    axes[panel].set(title=title, xlim=(0, 0.8), xlabel="share of picks")
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# Without normalization, two thirds of all picks are the shortest answer and hardly any the longest.
# Division by the length turns the bias around rather than remove it: the end of a long answer is
# easy to guess, so its mean looks good. The share of right answers lies between a fifth and two
# fifths, and nothing but the normalization has changed. What a weak model "prefers" among answers
# of unequal length is for the greater part their length. Report which normalization it was, and
# when you write an exam yourself, make the answers equally long.
#
# One more convention helps to compare exams with two answers and with ten. The **centered
# accuracy** is 0 for guessing and 1 for perfection {cite}`li2024dclm`: with $c$ the accuracy of
# guessing, it is $(\text{accuracy} - c) / (1 - c)$.


# %%
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
# ## Answers in free text
#
# Models that were tuned to answer write what they like: "The answer is (B).", "so she has
# $1,234.50", or "\boxed{\frac{1}{2}}". The exact match of strings calls all of them wrong. So an
# answer is first found and brought into one form, and then compared.
# {py:func}`~llmbook.evaluation.parse_answer` knows three kinds, and
# {py:func}`~llmbook.evaluation.exact_match` compares numbers by their value:

# %% [markdown] tags=["engine"]
# ### Engine room: how a letter, a number and a box are found

# %% [markdown] tags=["engine"]
# The rules are few, because each further one finds answers where there are none. A letter counts
# after "answer is" and the like, in brackets, or where it stands alone; a sentence that begins with
# "A" chooses nothing. A number may have a sign, which is not the minus of a subtraction, commas
# between thousands, a currency sign, decimals, an exponent of two digits at most (a model may write
# 1e999999999, and nobody should compute that), or a denominator. Braces in a box are counted until
# the first is closed.


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
def exact_match(text: str, answer: str, kind: AnswerKind | None = None) -> bool:
    """Whether a text gives the answer: the same one by ``parse_answer``, numbers by their value.

    Without a ``kind``, the texts are the same but for case, white space and a last full stop.
    """
    check_text(text)
    check_text(answer, "answer")
    if kind is None:
        return _plain(text) == _plain(answer)
    letters = string.ascii_uppercase
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


# %% [markdown]
# ### The kinds at work
#
# Here are answers as models write them:

# %%
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
    print(f"{kind:7} {text:52} {parse_answer(text, kind)}")
assert exact_match("That makes 0.50 euros.", "1/2", "number")

# %% [markdown]
# What finds no answer returns None, and None is wrong. Count the Nones apart: a model of which a
# third of all answers cannot be read has another problem than one that is wrong a third of the
# time, and a parser that works for one model's style may fail for another's.
#
# ## Several attempts: pass@k
#
# A model that samples answers is asked the same question $k$ times. How probable is it that at
# least one answer is right? With probability $p$ of a right answer it is $1 - (1 - p)^k$. But $p$
# is not known: what we have are $n$ samples, $c$ of them right. To put $\hat p = c / n$ into the
# formula is biased, because the function is curved: on average it gives too little. Here is how to
# be right on average {cite}`chen2021codex`. Imagine the first $k$ of the $n$ samples to be the
# attempts. Whether one of them is right has exactly the expectation that we want. But it is
# wasteful and noisy, as the order of samples means nothing. So average over all $\binom{n}{k}$ ways
# to choose the attempts. The average of estimates that are all right on average is so, too. A
# choice fails if all its $k$ members are among the $n - c$ wrong ones, and that happens in
# $\binom{n - c}{k}$ choices:
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
# Both formulas, averaged over all that can happen in $n = 5$ samples of a model with $p = 0.3$:

# %%
p, n, k = 0.3, 5, 3
chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
unbiased = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
plugged = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
assert math.isclose(unbiased, 1 - (1 - p) ** k)
print(f"truth {1 - (1 - p) ** k:.3f}, pass@k {unbiased:.3f}, with c / n put in {plugged:.3f}")

# %% [markdown]
# pass@k is the right score where somebody can check the answers, as tests check a program. Where
# nobody can, one answer must be chosen, and the natural choice is the most frequent one
# {cite}`wang2023consistency`. Its score, majority@k, is again an average over all choices of $k$
# samples; {py:func}`~llmbook.evaluation.majority_at_k` counts them exactly, in the room below.
# {numref}`fig-evaluation-attempts` has both for the little model of the last section:

# %% [markdown] tags=["engine"]
# ### Engine room: all majorities, counted

# %% [markdown] tags=["engine"]
# For each number of votes that the truth may get, a table counts the ways to draw the other answers
# such that none has more votes: one answer after the other, by how many votes are drawn in all and
# how many answers are tied with the truth. A tie of $t$ others is won once in $t + 1$ times.


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
# Twenty samples for each question about the facts, scored both ways:

# %% mystnb={"figure": {"caption": "Twenty samples for each of 240 questions, drawn among four answers as the model finds them likely. The chance that one of k is right rises and rises; the chance that the most frequent of them is right does not.", "name": "fig-evaluation-attempts"}, "image": {"alt": "Two lines over k from 1 to 20 that begin at the same height, a little above guessing. pass at k rises steeply; majority at k stays nearly flat."}}
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
plt.plot(range(1, 21), passed, label="pass@k")
plt.plot(range(1, 21), majority, "--", label="majority@k")
plt.xlabel("k")
plt.xticks((1, 5, 10, 15, 20))
plt.ylim(0, 1)
plt.legend()
plt.show()

# %% [markdown]
# The two answer different questions. A model that guesses among four answers has the right one
# among twenty samples nearly always, and its majority stays near 40 %. Whoever reports
# pass@k has to say who does the checking.

# %% [markdown]
# ## How sure are we?
#
# A model is right in 84 of 100 questions. Had we written another hundred, the result would have
# been another. What we want to know is the probability $p$ of a right answer to *such* questions,
# and the hundred are a sample {cite}`miller2024error`. Each answer is 1 with probability $p$ and
# else 0, with variance $p (1 - p)$; the mean $\hat p$ of $n$ independent ones has a variance $n$
# times smaller, and its root is the {term}`standard error`,
#
# $$
# \mathrm{SE} = \sqrt{\frac{p (1 - p)}{n}} .
# $$ (evaluation-error)
#
# For large $n$ the mean is normally distributed, and lies within $z = 1.96$ standard errors of $p$
# in 95 % of all samples. The textbook's interval, which is Wald's, now puts $\hat p$ in the place
# of the unknown $p$: $\hat p \pm z \sqrt{\hat p (1 - \hat p) / n}$. Look what becomes of it for a
# model that is right in 20 of 20: the estimated error is zero, and so we would be certain. Wilson
# {cite}`wilson1927` did not put anything in. Which $p$ are compatible with what we saw? Those from
# which $\hat p$ is at most $z$ of *their* standard errors away:
#
# $$
# (\hat p - p)^2 \le z^2 \, \frac{p (1 - p)}{n} .
# $$
#
# Multiply out and sort by powers of $p$:
#
# $$
# \Bigl(1 + \frac{z^2}{n}\Bigr) p^2 - \Bigl(2 \hat p + \frac{z^2}{n}\Bigr) p + \hat p^2 \le 0 .
# $$
#
# Between the two roots of this parabola it holds, and the formula for quadratic equations gives
# them as
#
# $$
# \frac{1}{1 + z^2 / n} \left( \hat p + \frac{z^2}{2 n}
# \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}} \right) .
# $$ (evaluation-wilson)
#
# The middle is no longer $\hat p$ but is drawn toward one half, as if $z^2/2 \approx 2$ right and 2
# wrong answers had been added, and the interval never leaves 0 to 1.


# %%
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


# %% [markdown]
# All estimates of the book come as such an `Interval`. The quantile $z$ is that of the normal
# distribution:


# %%
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


# %% [markdown]
# The textbook's interval and Wilson's, for few questions:

# %%
print("right    Wald                     Wilson")
for right, n in ((20, 20), (19, 20), (84, 100), (840, 1000)):
    wald, wilson = (confidence_interval(right, n, method=m) for m in ("wald", "wilson"))
    print(f"{right:4} of {n:4}  {wald!s:24} {wilson}")

# %% [markdown]
# Does an interval of 95 % cover the truth in 95 % of all samples? This need not be simulated: for
# each $p$, add up the probabilities of those outcomes whose interval contains $p$.
# {numref}`fig-evaluation-coverage` does it for 50 questions:


# %% mystnb={"figure": {"caption": "How often intervals of 95 % contain the truth, for 50 questions, computed exactly. The lines jump because there are only 51 outcomes.", "name": "fig-evaluation-coverage"}, "image": {"alt": "Coverage over the true accuracy from 0.5 to 1. Wilson stays near the dotted line at 0.95 throughout. Wald is at 0.90 to 0.95 at first and falls toward zero as the accuracy nears 1."}}
def coverage(p: float, n: int, method: str) -> float:
    covering = (c for c in range(n + 1) if p in confidence_interval(c, n, method=method))
    return sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in covering)


truths = np.linspace(0.5, 0.995, 100)
covered = {m: [coverage(p, 50, m) for p in truths] for m in ("wald", "wilson")}
assert min(covered["wilson"]) > 0.85 and min(covered["wald"]) < 0.5
for method, style in (("wilson", "-"), ("wald", "--")):
    plt.plot(truths, covered[method], style, label=method.title())
plt.axhline(0.95, color="gray", linestyle=":")
plt.xlabel("true accuracy")
plt.ylabel("coverage")
plt.ylim(0, 1.02)
plt.legend(loc="lower left")
plt.show()

# %% [markdown]
# Where a good model is tested, near 1, Wald's interval fails, as is well known
# {cite}`brown2001interval`, and Wilson's does not.
#
# ### What never happened
#
# A model was asked 100 times for a secret and never told it. Is the rate of leaks 0? If it were
# $p$, there would be no leak with probability $(1 - p)^n$. The largest $p$ under which this is
# still at least 5 % solves $(1 - p)^n = 0.05$. With $\log (1 - p) \approx -p$ it is $p \approx -\ln
# 0.05 / n \approx 3 / n$, the **rule of three**:


# %%
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


# %% [markdown]
# Zero of a hundred is compatible with three leaks in a hundred, and to claim less than one in a
# thousand takes three thousand attempts:

# %%
for n in (100, 1000, 3000):
    print(f"0 of {n}: less than {rule_of_three(n):.2%}, 3 / n is {3 / n:.2%}")

# %% [markdown]
# ## Which of two is better?
#
# One model is right in 150 of 200 questions, another one in 160. Their intervals overlap, so
# perhaps nothing can be said? But both have answered the *same* questions, and most of these are
# easy for both or hard for both. Take the difference item by item, $d_i = a_i - b_i$. Its variance
# is
#
# $$
# \mathrm{Var}(a - b) = \mathrm{Var}(a) + \mathrm{Var}(b) - 2 \, \mathrm{Cov}(a, b) ,
# $$ (evaluation-paired)
#
# and the covariance is what an unpaired comparison throws away. For right and wrong there is an
# exact test, McNemar's {cite}`mcnemar1947`. Items on which both agree say nothing about which one
# is better. On the others, $w$ wins and $l$ losses, and if the models are equally good then each
# was decided by a fair coin. How probable is a split at least so uneven, on either side?
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
# The same two accuracies, 80 and 75 % of 200, with two histories:

# %%
print(f"18 wins, 8 losses:  p = {sign_test(18, 8):.3f}")
print(f"11 wins, 1 loss:    p = {sign_test(11, 1):.3f}")

# %% [markdown]
# The function {py:func}`~llmbook.evaluation.paired_test` does this for arrays of scores. Where
# scores are not 0 and 1, such as bits per byte of texts, it flips the signs of the differences
# $d_i$ instead, as the coin would, and counts how often their sum is as far from zero as the one
# observed (a permutation test). Here are our two little models on the same questions, one trained
# twice as long:

# %% [markdown] tags=["engine"]
# ### Engine room: means, clusters, paired tests and the bootstrap

# %% [markdown] tags=["engine"]
# Not all scores are 0 or 1. For the mean of any values, the variance is estimated from the sample
# as well, with $n - 1$ for the one degree of freedom that the mean has used, and the normal
# quantile becomes Student's. That matters for few values: with the three seeds of a training run it
# is 4.30, not 1.96. For whole degrees of freedom Student's distribution is a finite sum.


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
# Questions often come in **clusters**: ten about one text, or one in ten wordings. Then they are
# not independent. In the extreme, ten copies of each question, the error of {eq}`evaluation-error`
# would be too small by $\sqrt{10}$, as the sample has no more information than a tenth of it. The
# remedy is to add up the deviations in each cluster *before* squaring, so that what goes together
# is counted together {cite}`miller2024error`:
#
# $$
# \mathrm{SE}^2 = \frac{G}{G - 1} \, \frac{1}{n^2}
# \sum_{g=1}^{G} \Bigl( \sum_{i \in g} (x_i - \bar x) \Bigr)^2 .
# $$ (evaluation-clusters)
#
# For clusters of one item, $G = n$ gives the usual formula back.


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
# The paired test and its outcome. With clusters, a coin decides about a whole cluster:


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
    for name, value in (("n_resamples", n_resamples), ("seed", seed)):
        if value is None:
            raise ValueError(f"{name}: expected a whole number, got None")
    check_at_least(n_resamples=(least, n_resamples), seed=(0, seed))


# %% [markdown] tags=["engine"]
# For a statistic that is no mean, such as bits per byte, which is a ratio of two sums, or a median,
# there is the {term}`bootstrap` {cite}`efron1979bootstrap`. The sample stands for the population;
# draw from it as many items as it has, with replacement, and look how the statistic varies.


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
# SciPy {cite}`virtanen2020scipy` has the same quantiles, intervals and tests:

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
# And clusters: 40 questions, each in 10 wordings that are answered alike. How often does the
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
# The exam is compared question by question, and bits per byte text by text:

# %%
longer = trained(bpe, 128, 240)
right = {
    name: [score_choices(m, bpe, *item, normalization="none").best == 0 for item in facts]
    for name, m in (("120 steps", small), ("240 steps", longer))
}
for name, answers in right.items():
    print(f"{name}: {np.mean(answers):.1f} of the questions right")
test = paired_test(right["240 steps"], right["120 steps"])
assert 0.03 < test.difference.margin < 0.1
print(f"difference: known to about {round(100 * test.difference.margin, -1):.0f} points")
texts = [score_texts(m, bpe, held_out) for m in (small, longer)]
test = paired_test(*(scores.nats / scores.n_bytes / math.log(2) for scores in texts))
assert test.wins > 95 and test.difference.margin < 0.02 < test.difference.low
print(f"bits per byte: {test.difference.estimate:.1f} less, known to about 0.01")

# %% [markdown]
# On 240 questions, the difference of the accuracies is not to be told from zero (in our run
# $+0.008$, with an interval from $-0.050$ to $+0.066$). Bits per byte show it on every single text:
# 0.18 less, from 0.17 to 0.19. A question says only right or wrong, and a text has dozens of
# log-probabilities. While a model is trained, the likelihood of held-out text is the sharper tool,
# and the exam tells whether what it measures is what you wanted.
#
# ### How many questions?
#
# Before an experiment, ask what it could show. Suppose that the true difference is $\delta$, and
# the standard deviation of one item's difference $\sigma$, so that the mean of $n$ has the standard
# error $\sigma / \sqrt n$. We will call it significant if it is more than $z_{\alpha}$ standard
# errors from zero. It is normally distributed around $\delta$, so it passes that mark with a
# probability of $1 - \beta$, the {term}`power`, if the mark lies $z_{\beta}$ standard errors below
# $\delta$:
#
# $$
# \delta = (z_\alpha + z_\beta) \frac{\sigma}{\sqrt n}
# \quad \Longrightarrow \quad
# n = \Bigl( \frac{(z_\alpha + z_\beta) \, \sigma}{\delta} \Bigr)^2 .
# $$ (evaluation-power)
#
# With the usual 95 % and a power of 80 %, $z_\alpha + z_\beta = 1.96 + 0.84$. Unpaired, $\sigma^2$
# is $2 p (1 - p)$ for items of two systems. Paired, where the two differ on a share $u$ of the
# items, $d_i$ is $\pm 1$ there and 0 elsewhere, so $\sigma^2 = u - \delta^2$.


# %%
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


# %% [markdown]
# How many questions does it take to see a difference of two points, at an accuracy of 80 %?

# %%
print(f"each model has its own questions: {items_needed(0.02, accuracy=0.8):6}")
for share in (0.2, 0.1, 0.05):
    print(f"the same, and they differ on {share:.0%}: {items_needed(0.02, disagreement=share):6}")

# %% [markdown]
# Many well-known test sets have some hundred questions. They cannot show two points, whatever the
# table of results says.
#
# ### The same run again
#
# All intervals so far answer what would happen with other *questions*. A claim about a method, such
# as "this optimizer is better", is also about other *runs*. Here is the same model with five seeds,
# which change the first weights and the order of the stories:

# %%
runs = [small, *(trained(bpe, 128, 120, seed) for seed in range(1, 5))]
by_run = [
    [score_choices(m, bpe, *item, normalization="none").best == 0 for item in facts] for m in runs
]
scores = [score_texts(m, bpe, held_out) for m in runs]
by_text = np.array([s.nats / s.n_bytes / math.log(2) for s in scores])
accuracies, losses = np.mean(by_run, axis=1), by_text.mean(axis=1)
assert np.ptp(accuracies) < 0.15 and 0 < np.ptp(losses) < 0.03
print("five accuracies within 15 points, five losses within 0.03 bits per byte")

# %% [markdown]
# They come from one method, so what differs is luck. {numref}`fig-evaluation-seeds` has all five:

# %% mystnb={"figure": {"caption": "Five runs that differ in the seed alone, each with its interval of 95 % over the questions and over the texts.", "name": "fig-evaluation-seeds"}, "image": {"alt": "Left, five accuracies around 0.4 with intervals of about 6 points to either side that all overlap. Right, five values of bits per byte around 0.6, with intervals that all overlap."}}
figure, axes = plt.subplots(1, 2)
exams = [confidence_interval(sum(answers), len(answers)) for answers in by_run]
for axis, found in zip(axes, (exams, [mean_interval(row) for row in by_text]), strict=True):
    middles = [one.estimate for one in found]
    reach = [[one.estimate - one.low for one in found], [one.high - one.estimate for one in found]]
    axis.errorbar(range(5), middles, yerr=reach, fmt="o", capsize=4)
    axis.set(xlabel="seed", xticks=range(5))
axes[0].set(title="Accuracy", ylim=(0, 1))
axes[1].set(title="Bits per byte")
plt.show()

# %% [markdown]
# In our run, the standard deviation over seeds is 2 points of accuracy and 0.003 bits per byte. The
# standard error over 240 questions is 3 points, and that of a paired difference over 100 texts
# 0.003 bits per byte. So here the two kinds of noise are about equally large, and the paired test
# does not tell the best of these runs from the worst ($p = 0.07$). But more items make only one
# kind smaller. With 1,000 texts, such a difference would be significant, the test would be right
# that the two *models* differ, and it would be wrong to say that a method is better.
#
# So a comparison of two methods needs several runs of each, and then the runs are what is counted:
# {py:func}`~llmbook.evaluation.mean_interval` of three or five numbers, with Student's wide
# quantile. An interval over the questions of a single run does not see what another run would have
# given.
#
# ## Exercises
#
# ````{exercise} The shift by one
# :label: ex-evaluation-shift
# *Ten minutes.* A colleague's evaluation says that a model has a perplexity of 400, and in training
# it was 5. Write `mean_surprise(logits, ids)`, the mean of $-\log q(x_t \mid x_{<t})$ in nats over
# all tokens but the first of one row, from `logits` of shape `(n, vocab_size)` and `ids` of shape
# `(n,)`. `logits[t]` is what the model said after it had read `ids[t]`. Then think of what the
# colleague has done.
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
# *Twenty minutes.* Answers get rewards, not only right and wrong. Write `best_of_k(rewards, k)`,
# the unbiased estimate from $n$ rewards of how large the largest reward of $k$ answers is on
# average. Sort them. In how many of the choices of $k$ is the $i$-th smallest one the largest? With
# rewards of 0 and 1 you must get pass@k.
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
assert best_of_k(rewards, 5) == 2.0, "the best of all is not the largest"
assert best_of_k(rewards, 2) == best_of_k(rewards[::-1], 2), "the order of rewards matters"
found = best_of_k([1.0, 1.0, 0.0, 0.0, 0.0], 2)
assert not math.isclose(found, 1 - 0.6**2), "an answer is drawn twice: that is not unbiased"
assert math.isclose(found, pass_at_k(5, 2, 2)), f"two of five right, k = 2: {found:.3f}, not 0.7"

# %% [markdown]
# ````{exercise} How often must you ask?
# :label: ex-evaluation-attempts
# *Ten minutes.* You want to publish: "our assistant tells a secret in less than `rate` of all
# attempts, at a confidence of `level`". Write `attempts_needed(rate, level)`, the least number of
# attempts, none of which may succeed, after which you can.
# ````


# %% tags=["solution"]
def attempts_needed(rate: float, level: float) -> int:
    """Return after how many attempts without success the rate is below ``rate``."""
    # (1 - rate)^n is at most 1 - level; 3 / rate is an approximation, for a level of 95 % only
    return math.ceil(math.log(1 - level) / math.log(1 - rate))


# %% tags=["check"]
for rate, level in ((0.01, 0.99), (0.01, 0.95), (0.3, 0.9), (0.002, 0.5)):
    n = attempts_needed(rate, level)
    assert (1 - rate) ** n <= 1 - level, (
        f"with a rate of {rate}, {n} attempts without success happen with probability "
        f"{(1 - rate) ** n:.4f}, more than 1 - {level}"
    )
    assert (1 - rate) ** (n - 1) > 1 - level, f"rate {rate}, level {level}: {n - 1} are enough"
