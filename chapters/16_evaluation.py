# %% [markdown]
# # Evaluation
#
# > Know whether a model got better: scores that can be compared, answers that are read as they were
# > meant, and an interval beside every number.
#
# TODO problem
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.evaluation.perplexity`, {py:func}`~llmbook.evaluation.bits_per_byte`, {py:func}`~llmbook.evaluation.score_choices`, {py:func}`~llmbook.evaluation.parse_answer`, {py:func}`~llmbook.evaluation.pass_at_k`, {py:func}`~llmbook.evaluation.confidence_interval`, {py:func}`~llmbook.evaluation.paired_test`, {py:func}`~llmbook.evaluation.check_causal` |
# | **You need** | the model ({doc}`11_model`), training ({doc}`13_training`), bits per byte ({doc}`01_tinyworld`), means and variances |
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
# next


# %%
#| export
def model_logits(
    model: nn.Module, ids: Int64[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence vocab_size"]:
    """Return a model's logits, whether it returns them or, as transformers, has them in a record."""
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


def next_log_probs(
    model: nn.Module, ids: Int64[Tensor, "batch sequence"]
) -> Float[Tensor, "batch targets"]:
    """Return log q of each id after the first of its row, in nats, given those before it there."""
    logits, targets = model_logits(model, ids[:, :-1]), ids[:, 1:]
    return -cross_entropy(logits, targets.contiguous(), reduction="none")


# %% [markdown]
# windows


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
# engine: any model

# %% tags=["engine"]
#| export
Numbers = Sequence[float] | np.ndarray | Tensor
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


def _start_id(tokenizer: Tokenizer, start: str) -> int:
    """The id of the special token with which a text begins."""
    if not isinstance(tokenizer, Tokenizer):
        expected = "an object with vocab_size, special_tokens and encode"
        raise ValueError(f"tokenizer: expected {expected}, got {tokenizer!r:.60}")
    check_choice("start", start, tuple(tokenizer.special_tokens))
    return tokenizer.special_tokens[start]


def _begun(ids: Sequence[int], start: int) -> list[int]:
    """The ids after exactly one ``start``, whether or not the tokenizer has put one there."""
    return [int(id) for id in ids] if len(ids) and ids[0] == start else [start, *map(int, ids)]


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


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


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
    size = _context_length(model, context_length)
    windows = plan_windows(len(ids), size, max(1, size // 2) if stride is None else stride)
    rows = [ids[window.start : window.end] for window in windows]
    found = rows_log_probs(model, rows, batch_tokens=batch_tokens)
    parts = [part[w.first - w.start - 1 :] for part, w in zip(found, windows, strict=True)]
    return torch.cat(parts)


# %% [markdown]
# texts


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


def _as_texts(texts: Any) -> list[str]:
    """Several texts, at least one."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected several texts, got {texts!r:.60}")
    found = [valid_text(text, "texts") for text in texts]
    if not found:
        raise ValueError("texts: expected at least one text, got none")
    return found


# %%
#| export
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


# %% [markdown]
# causal


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
# choices

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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many equal ids both begin."""
    unequal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(unequal, min(len(a), len(b)))


def _without(ids: Sequence[int], start: int) -> list[int]:
    """The ids without the ``start`` that a tokenizer may have put before them."""
    return _begun(ids, start)[1:]


# %% tags=["engine"]
#| export
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


# %%
#| export
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


def _check_pairs(pairs: Any) -> None:
    """Demand pairs of ids, none empty, and at least one pair."""
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Sequence) or not len(pairs):
        raise ValueError(f"pairs: expected at least one pair of ids, got {pairs!r:.60}")
    for place, pair in enumerate(pairs):
        good = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not good or not all(hasattr(ids, "__len__") and len(ids) for ids in pair):
            expected = "pairs of ids, neither part empty"
            raise ValueError(f"pairs: expected {expected}, got {pair!r:.60} at {place}")


# %%
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
    shorter could only win: an ``ending`` that all of them get sets them apart. A context that is too
    long is an error or cut on the left, for all choices at the same place. ``options`` are
    ``context_length`` and ``batch_tokens`` of ``score_continuations``.
    """
    check_choice("normalization", normalization, get_args(Normalization))
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
        scores = log_probs - found(_begun(tokenizer.encode(check_text(neutral, "neutral")), first))
    else:
        scores = log_probs / _sizes(texts, n_tokens, normalization)
    return ChoiceScores(scores, log_probs, n_tokens)


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
def _check_share(name: str, value: Any) -> None:
    known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not known or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r:.60}")


# %% [markdown]
# answers

# %% tags=["engine"]
#| export
AnswerKind = Literal["letter", "number", "boxed"]


def parse_answer(text: str, kind: AnswerKind, *, letters: str = "ABCD") -> str | None:
    r"""Return the answer that a text gives, in one form, or None if it gives none.

    "letter": of ``letters``, the last after "answer is" or the like, else the last in brackets, else
    one that stands alone or opens the text before a point, bracket or colon. "number": the last
    number, without thousands commas, currency sign, plus sign and idle zeros. "boxed": what the last
    \boxed{...} holds, inner braces included.

    >>> parse_answer("2 + 2 = 4, so she has $1,234.50.", "number")
    '1234.5'
    >>> print(parse_answer(r"Hence \boxed{\frac{1}{2}}.", "boxed"))
    \frac{1}{2}
    """
    check_choice("kind", kind, get_args(AnswerKind))
    check_text(text)
    if kind == "letter":
        return _letter(text, letters)
    return _number(text) if kind == "number" else _boxed(text)


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
    (?P<power> [eE] [-+]? \d{1,2} (?!\d) | / 0* [1-9] \d* )?""",
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


def _letter(text: str, letters: str) -> str | None:
    """The letter that a text chooses."""
    if not isinstance(letters, str) or not letters.isalpha():
        raise ValueError(f"letters: expected letters such as 'ABCD', got {letters!r:.60}")
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
# pass at k


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
def _check_at_most(name: str, value: int, other: str, most: int) -> None:
    if value > most:
        raise ValueError(f"{name}: expected at most {other} = {most}, got {value}")


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
# intervals


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


def t_quantile(level: float, degrees: int) -> float:
    """Return what ``normal_quantile`` is for Student's distribution with so many degrees of freedom.

    Up to 400 by the finite sums for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4), beyond
    by an expansion around the normal quantile (26.7.5).

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


# %%
#| export
def mean_interval(
    values: Numbers, level: float = 0.95, *, clusters: Sequence[Hashable] | None = None
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


# %%
#| export
def standard_error(values: Numbers) -> float:
    """Return the standard error of the mean of independent ``values``, at least two of them."""
    numbers = as_numbers(values, "values", 2)
    return float(numbers.std(ddof=1) / math.sqrt(len(numbers)))


def clustered_standard_error(values: Numbers, clusters: Sequence[Hashable]) -> float:
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


# %%
#| export
@dataclass(frozen=True)
class PairedTest:
    """The outcome of ``paired_test``: by how much a is above b, and how likely that is by chance."""

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


# %%
#| export
def paired_test(
    a: Numbers,
    b: Numbers,
    *,
    method: Literal["auto", "mcnemar", "permutation"] = "auto",
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Compare two systems by their scores on the same items, in the same order.

    "mcnemar", for scores of 0 and 1, asks how probable it is that a fair coin splits the items on
    which they differ as unevenly; it is exact. "permutation" flips the signs of differences, of whole
    clusters if given, all ways up to 14 of them, else ``n_resamples`` drawn ones. "auto" is the first
    where it applies and there are no clusters. The interval is that of ``mean_interval``.
    """
    first, second = as_numbers(a, "a", 2), as_numbers(b, "b", 2)
    if len(first) != len(second):
        raise ValueError(f"b: expected as many scores as a, {len(first)}, got {len(second)}")
    check_choice("method", method, ("auto", "mcnemar", "permutation"))
    check_at_least(n_resamples=(1, n_resamples), seed=(0, seed))
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


# %% tags=["engine"]
#| export
def bootstrap(
    values: Numbers,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
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
    check_at_least(n_resamples=(2, n_resamples), seed=(0, seed))
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
    right about ``accuracy`` of the time. With it, they have the same items, and differ on that share.

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
