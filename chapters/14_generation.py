# %% [markdown]
# # Generation
#
# > Turn the distribution of the next token into text: choose what is likely without repeating
# > yourself, remember what was read, look ahead by guessing, and weigh less.
#
# | | |
# |---|---|
# | **You build** | {py:func}`~llmbook.generation.sample`, {py:func}`~llmbook.generation.generate` |
# | **You need** | {doc}`13_training` |
# | **It takes** | 90 minutes to read, one minute to run |

# %% tags=["remove-cell"]
#| default_exp generation

# %%
#| export
import codecs
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor, nn

from llmbook.attention import KVCache, LayerCache
from llmbook.batches import random_bits
from llmbook.blocks import RMSNorm, _activate, _check_choice
from llmbook.corpus import _check_at_least
from llmbook.model import TransformerLM, count_parameters
from llmbook.tokenizer import BPETokenizer

# %% [markdown]
# ## Filters


# %%
#| export
def draw(
    probabilities: Float[Tensor, "batch vocab_size"], uniforms: Float[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """Return the token of each row in whose share of the line from 0 to 1 its number falls.

    ``uniforms`` are at least 0 and below 1. What has probability 0 is never drawn. Sums are made
    in float64.

    >>> draw(torch.tensor([[0.5, 0.0, 0.5]] * 3), torch.tensor([0.0, 0.4, 0.5])).tolist()
    [0, 0, 2]
    """
    ends = probabilities.cumsum(dim=-1, dtype=torch.float64)
    targets = uniforms.double()[:, None] * ends[:, -1:]  # the last end is not exactly 1
    found = torch.searchsorted(ends, targets, right=True)[:, 0]
    return found.clamp_(max=ends.size(-1) - 1)  # only where probabilities are NaN


# %%
#| export
def _kept(probabilities: Tensor, keep: Tensor) -> Tensor:
    """Set all others to zero, and scale what is left to a sum of one."""
    kept = torch.where(keep, probabilities, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def keep_top_k(
    probabilities: Float[Tensor, "batch vocab_size"], k: int
) -> Float[Tensor, "batch vocab_size"]:
    """Keep the ``k`` most likely tokens, and all that are as likely as the last of them."""
    least = probabilities.topk(min(k, probabilities.size(-1)), dim=-1).values[:, -1:]
    return _kept(probabilities, probabilities >= least)


# %%
#| export
def keep_top_p(
    probabilities: Float[Tensor, "batch vocab_size"], mass: int | float
) -> Float[Tensor, "batch vocab_size"]:
    """Keep the fewest tokens that have at least ``mass`` together: the nucleus.

    Of equally likely tokens at its border those with the highest ids are inside.
    Source: Holtzman et al. (2020), section 3.1.
    """
    ascending, order = probabilities.sort(dim=-1, stable=True)
    inside = ascending.cumsum(dim=-1) > 1 - mass  # what is outside has at most 1 - mass
    inside[:, -1] = True
    return _kept(probabilities, torch.zeros_like(inside).scatter_(1, order, inside))


# %%
#| export
def keep_min_p(
    probabilities: Float[Tensor, "batch vocab_size"], share: int | float
) -> Float[Tensor, "batch vocab_size"]:
    """Keep what is at least ``share`` times as likely as the most likely token.

    Source: Nguyen et al. (2025), section 3.
    """
    return _kept(probabilities, probabilities >= share * probabilities.amax(dim=-1, keepdim=True))


def keep_typical(
    probabilities: Float[Tensor, "batch vocab_size"], mass: int | float
) -> Float[Tensor, "batch vocab_size"]:
    """Keep tokens whose surprise is nearest to the entropy, until they have ``mass`` together.

    Ties at the border are all kept. Source: Meister et al. (2023), eq. 9 and 10.
    """
    entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
    distance = (-probabilities.log() - entropy).abs()
    ascending, order = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(1, order).cumsum(dim=-1) >= mass
    last = (~reached).sum(dim=-1, keepdim=True).clamp(max=reached.size(-1) - 1)
    return _kept(probabilities, distance <= ascending.gather(1, last))


# %% [markdown]
# ### Penalties


# %%
#| export
def penalize_repetition(
    logits: Float[Tensor, "batch vocab_size"],
    seen: Bool[Tensor, "batch vocab_size"],
    penalty: int | float,
) -> Float[Tensor, "batch vocab_size"]:
    """Divide the positive logits of seen tokens by ``penalty``, multiply the negative ones by it.

    Source: Keskar et al. (2019), section 4.1, who divide all; transformers' version is this one.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_frequency(
    logits: Float[Tensor, "batch vocab_size"],
    counts: Int64[Tensor, "batch vocab_size"],
    frequency: int | float,
    presence: int | float = 0.0,
) -> Float[Tensor, "batch vocab_size"]:
    """Subtract ``frequency`` for each time that a token has occurred, ``presence`` if it has."""
    return logits - frequency * counts - presence * (counts > 0)


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token; without arguments it is drawn from the model's distribution.

    Temperature 0 is greedy: the most likely token. Penalties look at the whole text so far, the
    prompt included. Settings that make no sense, alone or together, raise a ``ValueError``.
    """

    temperature: int | float = 1.0
    top_k: int | None = None
    top_p: int | float | None = None
    min_p: int | float | None = None
    typical_p: int | float | None = None
    repetition_penalty: int | float = 1.0
    frequency_penalty: int | float = 0.0
    presence_penalty: int | float = 0.0

    def __post_init__(self) -> None:
        _check_sampling(self)

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on which tokens have occurred, not only on the logits."""
        neutral = self.repetition_penalty == 1
        return not neutral or self.frequency_penalty != 0 or self.presence_penalty != 0


# %%
#| export
_FILTERS = ("top_k", "top_p", "min_p", "typical_p")


def _check_sampling(sampling: Sampling) -> None:
    if not 0 <= sampling.temperature < math.inf:
        expected = "0 (greedy) or a positive number"
        raise ValueError(f"temperature: expected {expected}, got {sampling.temperature}")
    _check_at_least(top_k=(1, sampling.top_k))
    for name, share in ((name, getattr(sampling, name)) for name in _FILTERS[1:]):
        if share is not None and not (0 < share <= 1 or (name == "min_p" and share == 0)):
            raise ValueError(f"{name}: expected more than 0, at most 1, got {share}")
    if not 0 < sampling.repetition_penalty < math.inf:
        got = sampling.repetition_penalty
        raise ValueError(f"repetition_penalty: expected a positive number, got {got}")
    for name in ("frequency_penalty", "presence_penalty"):
        if not math.isfinite(getattr(sampling, name)):
            raise ValueError(f"{name}: expected a number, got {getattr(sampling, name)}")
    given = [name for name in _FILTERS if getattr(sampling, name) is not None]
    if sampling.temperature == 0 and given:
        expected = "None at temperature 0, which takes the most likely token"
        raise ValueError(f"{given[0]}: expected {expected}, got {getattr(sampling, given[0])}")


# %%
#| export
def _penalized(logits: Tensor, sampling: Sampling, counts: Tensor | None) -> Tensor:
    """Return logits in float32, lower for what has occurred."""
    logits = logits.float()
    if not sampling.has_penalties:
        return logits
    if counts is None:
        raise ValueError("history: expected the text so far for a penalty, got None")
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, counts > 0, sampling.repetition_penalty)
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    return penalize_frequency(logits, counts, frequency, presence)


def _token_counts(history: Int64[Tensor, "batch length"], vocab_size: int) -> Tensor:
    """Count each token in each row; -1 is padding."""
    counts = torch.zeros(len(history), vocab_size, dtype=torch.int64, device=history.device)
    return counts.scatter_add_(1, history.clamp(min=0), (history >= 0).long())


# %%
#| export
def _distribution(logits: Tensor, sampling: Sampling, counts: Tensor | None) -> Tensor:
    """Penalties, temperature, top-k, top-p, min-p, typical: the order of transformers."""
    logits = _penalized(logits, sampling, counts)
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    if sampling.temperature != 1:  # the best is at 0, so that a tiny temperature cannot overflow
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    probabilities = logits.softmax(dim=-1)
    if sampling.top_k is not None:
        probabilities = keep_top_k(probabilities, sampling.top_k)
    if sampling.top_p is not None:
        probabilities = keep_top_p(probabilities, sampling.top_p)
    if sampling.min_p is not None:
        probabilities = keep_min_p(probabilities, sampling.min_p)
    if sampling.typical_p is not None:
        probabilities = keep_typical(probabilities, sampling.typical_p)
    return probabilities


# %%
#| export
def next_token_distribution(
    logits: Float[Tensor, "batch vocab_size"],
    sampling: Sampling,
    history: Int64[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch vocab_size"]:
    """Return the probabilities from which the next token is drawn.

    In this order: repetition, frequency and presence penalty, temperature, top-k, top-p, min-p,
    typical; each filter sees what the one before has left. ``history`` is the text so far, for
    penalties; -1 in it is padding.
    """
    counts = None if history is None else _token_counts(history, logits.size(-1))
    return _distribution(logits, sampling, counts)


# %%
#| export
def _choose(
    logits: Tensor, sampling: Sampling, counts: Tensor | None, uniforms: Tensor | None
) -> Tensor:
    if sampling.temperature == 0 or uniforms is None:
        return _penalized(logits, sampling, counts).argmax(dim=-1)
    return draw(_distribution(logits, sampling, counts), uniforms)


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    sampling: Sampling = Sampling(),
    *,
    history: Int64[Tensor, "batch length"] | None = None,
    uniforms: Float[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " batch"]:
    """Choose a token for each row, as ``sampling`` says.

    ``uniforms``, from 0 to below 1, decide where chance does; without them ``generator`` does.
    """
    counts = None if history is None else _token_counts(history, logits.size(-1))
    if uniforms is None:
        device = logits.device
        uniforms = torch.rand(len(logits), dtype=torch.float64, device=device, generator=generator)
    return _choose(logits, sampling, counts, uniforms)


# %% [markdown]
# ## Randomness of a row


# %%
#| export
def uniforms_of(seed: int, row: int, n: int) -> Float[np.ndarray, " n"]:
    """Return the ``n`` random numbers, from 0 to below 1, of one row: one for each of its steps.

    They depend on nothing but ``seed`` and ``row``, and the first are the same for any ``n``.

    >>> uniforms_of(seed=0, row=7, n=2).round(3)
    array([0.111, 0.222])
    """
    return (random_bits(seed, row, np.arange(n)) >> np.uint64(11)) * 2.0**-53


# %% [markdown]
# ## Text that arrives in pieces


# %%
#| export
class _ArrivingText:
    """Text token by token, given out as soon as it is certain: whole, and before any stop."""

    def __init__(self, tokenizer: BPETokenizer, stop_strings: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stop_strings
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.stopped = "", False

    def add(self, token: int) -> str:
        """Return what can be shown now that ``token`` has come."""
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        places = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._release(min(places))
        begun = (
            n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])
        )
        return self._release(len(self.held) - max(begun, default=0))

    def end(self) -> str:
        """Return what was held back, in case it became a stop, or a character."""
        self.held = "" if self.stopped else self.held + self.decoder.decode(b"", final=True)
        return self._release(len(self.held))

    def _release(self, n: int) -> str:
        shown, self.held = self.held[:n], self.held[n:]
        return shown


# %% [markdown]
# ## generate


# %%
#| export
FinishReason = Literal["stop", "length", "context"]


class Completion(NamedTuple):
    """What was generated after a prompt.

    ``ids`` are all tokens that were chosen, a stop token included; ``text`` ends before whatever
    stopped it, and is None without a tokenizer. ``log_probs`` are the model's own, in nats, before
    temperature, filters and penalties. ``finish_reason``: "stop", a stop token or string; "length",
    ``max_new_tokens``; "context", the model can read no more.
    """

    ids: list[int]
    text: str | None
    finish_reason: FinishReason
    log_probs: list[float]


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class _Options:
    """The arguments of ``generate``, checked."""

    max_new_tokens: int
    sampling: Sampling = Sampling()
    tokenizer: BPETokenizer | None = None
    stop_tokens: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    seed: int = 0
    use_cache: bool = True
    on_full: str = "stop"

    def __post_init__(self) -> None:
        _check_at_least(max_new_tokens=(1, self.max_new_tokens))
        _check_choice("on_full", self.on_full, ("stop", "error", "slide"))
        if isinstance(self.stop_strings, str):
            raise ValueError(f"stop_strings: expected a list of texts, got {self.stop_strings!r}")
        if not all(self.stop_strings):
            raise ValueError("stop_strings: expected texts of at least one character, got ''")
        if self.stop_strings and self.tokenizer is None:
            raise ValueError("tokenizer: expected one, for stop_strings, got None")


# %%
#| export
def _prompt_ids(model: TransformerLM, prompt: str | Sequence[int], options: _Options) -> list[int]:
    """Return the ids of a prompt; a ValueError says why there can be no text after it."""
    if isinstance(prompt, str):
        if options.tokenizer is None:
            raise ValueError("tokenizer: expected one, for prompts that are texts, got None")
        prompt = options.tokenizer.encode(prompt)
    ids = [int(token) for token in prompt]
    config = model.config
    if not ids:
        expected = "at least one token to go on from, such as end of text"
        raise ValueError(f"prompts: expected {expected}, got none")
    if wrong := [token for token in ids if not 0 <= token < config.vocab_size]:
        raise ValueError(f"prompts: expected ids from 0 to {config.vocab_size - 1}, got {wrong[0]}")
    room = config.context_length
    if options.on_full == "error":
        room += 1 - options.max_new_tokens  # the last token need not be read
    if len(ids) > room:
        why = f"context_length = {config.context_length}"
        why += f" and max_new_tokens = {options.max_new_tokens}" * (options.on_full == "error")
        raise ValueError(f"prompts: expected at most {room} tokens, for {why}, got {len(ids)}")
    return ids


# %%
#| export
class _Row:
    """A text on its way: what the model sees of it, and what was added."""

    def __init__(self, number: int, prompt: list[int], context_length: int, options: _Options):
        self.number, self.seen, self.context_length = number, list(prompt), context_length
        self.prompt, self.options, self.moved = prompt, options, False
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.reason: FinishReason | None = None
        tokenizer = options.tokenizer
        self.text = None if tokenizer is None else _ArrivingText(tokenizer, options.stop_strings)

    def take(self, token: int, log_prob: float) -> str:
        """Add a token, and return the text that can be shown; afterwards see whether to go on."""
        if math.isnan(log_prob):
            raise ValueError(f"model: expected logits, got NaN after {len(self.ids)} new tokens")
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.seen.append(token)
        stopped, shown = token in self.options.stop_tokens, ""
        if self.text is not None:
            shown = "" if stopped else self.text.add(token)
            stopped |= self.text.stopped
        self.reason = "stop" if stopped else _limit(self)
        if self.text is not None and self.reason:
            shown += self.text.end()
        return shown


# %%
#| export
def _limit(row: _Row) -> FinishReason | None:
    """Say which limit a row has reached; if it may slide, let it forget the older half."""
    if len(row.ids) == row.options.max_new_tokens:
        return "length"
    if len(row.seen) > row.context_length:
        if row.options.on_full != "slide":
            return "context"
        row.seen, row.moved = row.seen[-max(1, row.context_length // 2) :], True
    return None


def _completion(row: _Row, shown: str) -> Completion:
    reason: FinishReason = row.reason or "length"
    return Completion(row.ids, None if row.text is None else shown, reason, row.log_probs)


# %%
#| export
def _padded(
    texts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int64[Tensor, "batch sequence"], Int64[Tensor, "batch sequence"] | None]:
    """Return ids and positions of texts that all end in the last column; -1 is padding."""
    longest = max(map(len, texts))
    ids = [[0] * (longest - len(text)) + list(text) for text in texts]
    if min(map(len, texts)) == longest:
        return torch.tensor(ids, device=device), None
    places = [[-1] * (longest - len(text)) + list(range(len(text))) for text in texts]
    return torch.tensor(ids, device=device), torch.tensor(places, device=device)


# %%
#| export
Step = Callable[[Tensor, KVCache], Tensor]


class _Reader:
    """Gives the logits after each of several texts: from a cache, or read from the start."""

    def __init__(self, model: TransformerLM, capacity: int, use_cache: bool):
        self.model, self.use_cache, self.step = model, use_cache, _next_step(model)
        self.capacity = min(capacity, model.config.context_length)
        self.cache: KVCache | None = None

    def read(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab_size"]:
        """Read the texts, whatever was read before."""
        ids, positions = _padded(texts, self.model.embedding.weight.device)
        self.cache = self.model.new_cache(len(texts), self.capacity) if self.use_cache else None
        hidden = self.model.hidden_states(ids, position_ids=positions, cache=self.cache)
        return self.model.lm_head(hidden[:, -1])

    def go_on(self, rows: Sequence[_Row], tokens: Tensor) -> Float[Tensor, "batch vocab_size"]:
        """Read the token that each row has got."""
        if self.cache is not None and not any(row.moved for row in rows):
            return self.step(tokens, self.cache)
        for row in rows:
            row.moved = False
        return self.read([row.seen for row in rows])

    @property
    def is_full(self) -> bool:
        """Whether a row cannot be read on as it is; without a cache rows never should be."""
        return self.cache is None or max(self.cache._lengths) >= self.capacity

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these; one may be there twice."""
        if self.cache is not None:
            self.cache.reorder(rows)


# %%
#| export
def _plain_step(model: TransformerLM) -> Step:
    """The next step by the model's own forward pass, with one new token in each row."""

    def step(tokens: Tensor, cache: KVCache) -> Tensor:
        return model.lm_head(model.hidden_states(tokens[:, None], cache=cache)[:, -1])

    return step


# %%
#| export
class _Chooser:
    """Chooses the tokens of a batch of rows, each with its own history and random numbers."""

    def __init__(self, model: TransformerLM, rows: Sequence[_Row], options: _Options):
        self.sampling, self.counts, self.uniforms = options.sampling, None, None
        device = model.embedding.weight.device
        if self.sampling.has_penalties:
            rows_counts = [
                _token_counts(torch.tensor([row.prompt], device=device), model.config.vocab_size)
                for row in rows
            ]
            self.counts = torch.cat(rows_counts)
        if self.sampling.temperature > 0:
            n = max(
                options.max_new_tokens
                if row.options.on_full == "slide"
                else min(options.max_new_tokens, row.context_length + 1)
                for row in rows
            )
            table = np.stack([uniforms_of(options.seed, row.number, n) for row in rows])
            self.uniforms = torch.from_numpy(table).to(device)

    def choose(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of this step, and their log-probabilities in the model."""
        uniforms = None if self.uniforms is None else self.uniforms[:, step]
        tokens = _choose(logits, self.sampling, self.counts, uniforms)[:, None]
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens, torch.ones_like(tokens))
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, tokens)
        return tokens[:, 0], log_probs[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.counts = None if self.counts is None else self.counts[rows]
        self.uniforms = None if self.uniforms is None else self.uniforms[rows]


# %%
#| export
@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards back to what it was; no gradients."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model in training:
            model.train()


# %%
#| export
def _decode(
    model: TransformerLM, rows: list[_Row], options: _Options
) -> Iterator[list[tuple[_Row, str]]]:
    """Add tokens to the rows until all have finished; yield each step's rows and new text."""
    most = max(len(row.seen) for row in rows) + options.max_new_tokens - 1
    reader, chooser = _Reader(model, most, options.use_cache), _Chooser(model, rows, options)
    logits = reader.read([row.seen for row in rows])
    for step in range(options.max_new_tokens):
        tokens, log_probs = chooser.choose(logits, step)
        chosen = zip(rows, tokens.tolist(), log_probs.tolist(), strict=True)
        yield [(row, row.take(token, p)) for row, token, p in chosen if row.reason is None]
        going = [number for number, row in enumerate(rows) if row.reason is None]
        if not going:
            return
        # To drop rows costs a copy of the cache: only when it halves the batch, or one is full.
        if len(going) < len(rows) and (reader.is_full or 2 * len(going) <= len(rows)):
            kept = torch.tensor(going, device=tokens.device)
            rows, tokens = [rows[number] for number in going], tokens[kept]
            reader.keep(kept)
            chooser.keep(kept)
        logits = reader.go_on(rows, tokens)


# %%
#| export
def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    tokenizer: BPETokenizer | None = None,
    stop_tokens: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    seed: int = 0,
    use_cache: bool = True,
    on_full: Literal["stop", "error", "slide"] = "stop",
    batch_size: int = 64,
    first_row: int = 0,
) -> list[Completion]:
    """Return a completion of each prompt."""
    options = _Options(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        tokenizer=tokenizer,
        stop_tokens=frozenset(stop_tokens),
        stop_strings=stop_strings,
        seed=seed,
        use_cache=use_cache,
        on_full=on_full,
    )
    _check_at_least(batch_size=(1, batch_size), first_row=(0, first_row))
    return _generate(model, prompts, options, batch_size, first_row)


# %%
#| export
def _rows(
    model: TransformerLM, prompts: Sequence[Any], options: _Options, first_row: int = 0
) -> list[_Row]:
    if isinstance(prompts, str):
        raise ValueError(f"prompts: expected a list of prompts, got one text, {prompts!r}")
    if not len(prompts):
        raise ValueError("prompts: expected at least one, got none")
    texts = [_prompt_ids(model, prompt, options) for prompt in prompts]
    length = model.config.context_length
    return [_Row(number, text, length, options) for number, text in enumerate(texts, first_row)]


def _generate(
    model: TransformerLM, prompts: Sequence[Any], options: _Options, batch_size: int, first_row: int
) -> list[Completion]:
    rows = _rows(model, prompts, options, first_row)
    shown: dict[int, list[str]] = {row.number: [] for row in rows}
    by_length = sorted(rows, key=lambda row: len(row.prompt))  # less padding; results stay the same
    with _evaluating(model):
        for at in range(0, len(rows), batch_size):
            for step in _decode(model, by_length[at : at + batch_size], options):
                for row, piece in step:
                    shown[row.number].append(piece)
    return [_completion(row, "".join(shown[row.number])) for row in rows]


# %%
#| export
class Piece(NamedTuple):
    """One token of a stream: the text that can be shown with it, and at the end why it ended."""

    id: int
    text: str
    log_prob: float
    finish_reason: FinishReason | None


def stream(model: TransformerLM, prompt: str | Sequence[int], **options: Any) -> Iterator[Piece]:
    """Yield the tokens of ``generate(model, [prompt], **options)`` as they are chosen.

    Their texts are whole characters, and joined are the completion's text: what may become a stop
    string is held back. A bad argument raises its ValueError here, not at the first token.
    """
    checked = _Options(**options)
    (row,) = _rows(model, [prompt], checked)
    return _pieces(model, row, checked)


def _pieces(model: TransformerLM, row: _Row, options: _Options) -> Iterator[Piece]:
    steps = _decode(model, [row], options)
    while True:
        with _evaluating(model):  # not while the caller has the piece
            ((_, text),) = next(steps, [(row, "")])
        yield Piece(row.ids[-1], text, row.log_probs[-1], row.reason)
        if row.reason:
            return


# %% [markdown]
# ## Fewer, larger steps


# %%
#| export
class _Linear:
    """Linear maps of the same vector, put side by side, behind the gain of a norm."""

    def __init__(self, *maps: nn.Linear, norm: nn.Module | None = None):
        weight, biases = torch.cat([m.weight for m in maps]), [m.bias for m in maps]
        if isinstance(norm, RMSNorm):
            weight = weight * (norm.weight * math.sqrt(len(norm.weight)))
        self.weight = weight.t().contiguous()
        self.bias = None if biases[0] is None else torch.cat(biases)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def onto(self, stream: Tensor, x: Tensor) -> Tensor:
        """Add what the map makes of ``x`` to ``stream``."""
        stream = stream if self.bias is None else stream + self.bias
        return torch.addmm(stream, x, self.weight)


# %%
#| export
def _normalized(x: Tensor, norm: nn.Module) -> Tensor:
    """Normalize; the gain of RMSNorm, and the root of d, are left to the map that follows."""
    if not isinstance(norm, RMSNorm):
        return norm(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(length, length.new_tensor(math.sqrt(x.size(-1) * norm.eps)))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rope`` in three calls: ``cos`` and ``sin`` are doubled, with a minus in the first."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


def _store(cache: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Do what ``LayerCache.update`` does, quickly for rows that are alike."""
    step = cache._table._step
    if not isinstance(step.slots, slice):
        return cache.update(k.unsqueeze(2), v.unsqueeze(2))
    cache.keys.select(2, step.slots.start).copy_(k)
    cache.values.select(2, step.slots.start).copy_(v)
    return cache.keys.narrow(2, 0, step.used), cache.values.narrow(2, 0, step.used)


# %%
#| export
class _FusedBlock:
    """A block for one new token in each row, (batch, d_model), in few calls."""

    def __init__(self, block: nn.Module):
        a, f = block.attention, block.feed_forward
        self.norms = block.attention_norm, block.feed_forward_norm
        self.qk_norms, self.activation = (a.q_norm, a.k_norm), f.activation
        self.n_heads, self.n_kv_heads, self.d_head = a.n_heads, a.n_kv_heads, a.d_head
        self.gates = () if f.gate_proj is None else (f.gate_proj,)
        self.qkv = _Linear(a.q_proj, a.k_proj, a.v_proj, norm=block.attention_norm)
        self.up = _Linear(*self.gates, f.up_proj, norm=block.feed_forward_norm)
        self.o, self.down = _Linear(a.o_proj), _Linear(f.down_proj)

    def __call__(self, x: Tensor, rope: Any, mask: Tensor | None, cache: LayerCache) -> Tensor:
        x = self.o.onto(x, self.attend(_normalized(x, self.norms[0]), rope, mask, cache))
        up = self.up(_normalized(x, self.norms[1]))
        gate, up = up.chunk(2, dim=-1) if self.gates else (None, up)
        return self.down.onto(x, _activate(self.activation, gate, up))

    def attend(self, x: Tensor, rope: Any, mask: Tensor | None, cache: LayerCache) -> Tensor:
        """Return what each row gathers, (batch, n_heads * d_head)."""
        heads, q_and_k = self.n_heads, self.n_heads + self.n_kv_heads
        qkv = self.qkv(x).view(len(x), q_and_k + self.n_kv_heads, self.d_head)
        qk, v = qkv.narrow(1, 0, q_and_k), qkv.narrow(1, q_and_k, self.n_kv_heads)
        if self.qk_norms[0] is not None:
            parts = qk.split((heads, self.n_kv_heads), dim=1)
            qk = torch.cat([norm(x) for norm, x in zip(self.qk_norms, parts, strict=True)], dim=1)
        qk = qk if rope is None else _rotated(qk, *rope)
        k, v = _store(cache, qk.narrow(1, heads, self.n_kv_heads), v)
        q = qk.narrow(1, 0, heads).unflatten(1, (self.n_kv_heads, -1))  # heads that share keys
        return F.scaled_dot_product_attention(q, k, v, mask).reshape(len(x), -1)


# %%
#| export
def _fused_step(model: TransformerLM) -> Step:
    """The next step of a small model, where calling functions is most of the work."""
    blocks = [_FusedBlock(block) for block in model.blocks]

    def step(tokens: Tensor, cache: KVCache) -> Tensor:
        positions, mask = cache.next_positions(1), cache.extend(1)
        x, rope = model.embedding(tokens), None
        if model.positions is not None:
            x = x + model.positions(positions)[:, 0]
        if model.rope is not None:
            cos, sin = model.rope(positions)  # (batch or 1, 1, half): the 1 is for all heads
            rope = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        for layer, block in enumerate(blocks):
            x = block(x, rope, mask, cache[layer])
        return model.lm_head(model.norm(x))

    return step


# %%
#| export
_SMALL = 20_000_000  # parameters; above, the copies of matrices cost more than the calls


def _next_step(model: TransformerLM) -> Step:
    """Return the fastest step that there is for a model."""
    config, kinds = model.config, {type(m) for m in model.modules() if hasattr(m, "in_features")}
    plain = config.norm_position == "post" or config.n_experts or kinds != {nn.Linear}
    floats = {parameter.dtype for parameter in model.parameters()}
    if plain or floats != {torch.float32} or count_parameters(model) > _SMALL:
        return _plain_step(model)
    return _fused_step(model)


# %% [markdown]
# ## Beam search


# %%
#| export
class _Beam(NamedTuple):
    """A text among the best so far."""

    score: float  # the sum of log_probs
    ids: list[int]
    log_probs: list[float]


def _extended(
    beams: list[_Beam], log_probs: Float[Tensor, "beams vocab_size"], n: int
) -> list[tuple[int, _Beam]]:
    """Return the best ``n`` texts that are one of ``beams`` and a token, and which beam it was."""
    scores = torch.tensor([beam.score for beam in beams], device=log_probs.device)
    best = (scores[:, None] + log_probs).flatten().topk(min(n, log_probs.numel()))
    found = []
    for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        number, token = divmod(place, log_probs.size(1))
        _, ids, history = beams[number]
        history = [*history, log_probs[number, token].item()]
        found.append((number, _Beam(score, [*ids, token], history)))
    return found


# %%
#| export
def beam_search(
    model: TransformerLM,
    prompt: str | Sequence[int],
    *,
    n_beams: int = 4,
    max_new_tokens: int,
    length_penalty: int | float = 1.0,
    tokenizer: BPETokenizer | None = None,
    stop_tokens: Collection[int] = (),
) -> list[Completion]:
    """Return at most ``n_beams`` completions, best first, found by keeping ``n_beams`` at a time.

    The score of a completion of n tokens is the sum of its ``log_probs`` divided by
    n ** ``length_penalty``: 0 compares likelihoods, above 0 is kinder to long texts. As
    transformers' beam search with ``early_stopping="never"``.
    """
    _check_at_least(n_beams=(1, n_beams))
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty: expected a number, got {length_penalty}")
    options = _Options(
        max_new_tokens=max_new_tokens, tokenizer=tokenizer, stop_tokens=frozenset(stop_tokens)
    )
    (row,) = _rows(model, [prompt], options)
    with _evaluating(model):
        found = _search(model, row, options, n_beams, length_penalty)
    best = sorted(found, key=lambda one: -one[0])[:n_beams]
    return [_finished(row, beam, reason) for _, beam, reason in best]


# %%
#| export
def _search(
    model: TransformerLM, row: _Row, options: _Options, n_beams: int, length_penalty: int | float
) -> list[tuple[float, _Beam, FinishReason]]:
    """Return finished beams with their scores."""
    room = model.config.context_length + 1 - len(row.prompt)
    most, finished = min(options.max_new_tokens, room), []
    reader = _Reader(model, len(row.prompt) + most, use_cache=True)
    beams, logits = [_Beam(0.0, [], [])], reader.read([row.prompt])
    for length in range(1, most + 1):
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        going: list[tuple[int, _Beam]] = []
        # Enough for n_beams to go on, even if as many end with each of the stop tokens.
        wanted = n_beams * max(2, 1 + len(options.stop_tokens))
        for rank, (number, beam) in enumerate(_extended(beams, log_probs, wanted)):
            stopped = beam.ids[-1] in options.stop_tokens
            if (stopped or length == most) and rank < n_beams:
                reason = "stop" if stopped else "length" if most < room else "context"
                finished.append((beam.score / length**length_penalty, beam, reason))
            elif not stopped and len(going) < n_beams:
                going.append((number, beam))
        finished = sorted(finished, key=lambda one: -one[0])[:n_beams]
        hope = max(length**length_penalty, most**length_penalty)  # of sums that are below 0
        enough = len(finished) == n_beams and going[0][1].score / hope <= finished[-1][0]
        if length == most or enough:
            break
        beams = [beam for _, beam in going]
        reader.keep(torch.tensor([number for number, _ in going]))
        logits = reader.go_on([], torch.tensor([beam.ids[-1] for beam in beams]))
    return finished


def _finished(row: _Row, beam: _Beam, reason: FinishReason) -> Completion:
    ids = beam.ids[:-1] if reason == "stop" else beam.ids
    tokenizer = row.options.tokenizer
    text = None if tokenizer is None else tokenizer.decode(ids)
    return Completion(beam.ids, text, reason, beam.log_probs)


# %% [markdown]
# ## Speculative decoding


# %%
#| export
def verify(
    target: Float[Tensor, "drafted_and_one vocab_size"],
    draft: Float[Tensor, "drafted vocab_size"],
    tokens: Sequence[int],
    uniforms: Float[np.ndarray, " drafted_and_one"],
) -> tuple[int, int]:
    """Return how many of the drafted ``tokens`` are accepted, and the token that follows them.

    ``draft`` are the distributions from which they were drawn, ``target`` those at the same places
    and at the one after. A token x passes if u q(x) < p(x). The first that fails is replaced by one
    from max(p - q, 0), scaled. The result has the distribution of the target. Source: Leviathan et
    al. (2023), algorithm 1.
    """
    last = torch.tensor([uniforms[-1]], device=target.device)
    for place, token in enumerate(tokens):
        p, q = target[place], draft[place]
        if uniforms[place] * q[token].item() >= p[token].item():
            rest = (p - q).clamp(min=0)
            rest = rest if rest.sum() > 0 else p  # p and q differ by rounding only
            return place, int(draw(rest[None], last))
    return len(tokens), int(draw(target[-1:], last))


# %%
#| export
def expected_tokens(acceptance: int | float, n_draft: int) -> float:
    """Return how many tokens a pass of the target yields on average.

    (1 - a^(n + 1)) / (1 - a), if each of ``n_draft`` tokens passes with probability ``acceptance``,
    whatever happened to others. Source: Leviathan et al. (2023), eq. 1.

    >>> expected_tokens(0.5, 2)  # 1 + 1/2 + 1/4
    1.75
    """
    return math.fsum(acceptance**k for k in range(n_draft + 1))


@dataclass
class SpeculativeStats:
    """What happened to the drafted tokens: those after a rejection are never ``tested``."""

    n_passes: int = 0
    n_tokens: int = 0
    n_drafted: int = 0
    n_tested: int = 0
    n_accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """The share of tested tokens that passed; NaN if none was tested."""
        return self.n_accepted / self.n_tested if self.n_tested else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens a pass of the target yielded."""
        return self.n_tokens / self.n_passes if self.n_passes else math.nan


# %%
#| export
class _Follower:
    """A model that has read the beginning of a text, and can go back."""

    def __init__(self, model: TransformerLM, capacity: int, n_draft: int):
        self.model, self.n_read, self.step = model, 0, _next_step(model)
        capacity = min(capacity, model.config.context_length)
        self.cache = model.new_cache(1, capacity, spare=n_draft + 1)

    def read(self, text: list[int], n: int) -> Float[Tensor, "n vocab_size"]:
        """Read on to the end of ``text``; return the logits after its last ``n`` tokens."""
        device = self.model.embedding.weight.device
        new = torch.tensor(text[self.n_read :], device=device)
        self.n_read = len(text)
        if len(new) == 1:
            return self.step(new, self.cache)
        hidden = self.model.hidden_states(new[None], cache=self.cache)
        return self.model.lm_head(hidden[0, -n:])

    def back_to(self, length: int) -> None:
        """Forget what was read after the first ``length`` tokens."""
        if length < self.n_read:
            self.cache.truncate(length)
            self.n_read = length


# %%
#| export
def _distributions(logits: Tensor, sampling: Sampling, text: list[int]) -> Tensor:
    """The distributions after the last tokens of ``text``, one for each row of ``logits``."""
    if not sampling.has_penalties:
        return _distribution(logits, sampling, None)
    first = len(text) - len(logits) + 1
    histories = [text[: first + row] + [-1] * (len(logits) - 1 - row) for row in range(len(logits))]
    return next_token_distribution(logits, sampling, torch.tensor(histories, device=logits.device))


def _drafted(
    draft: _Follower, text: list[int], n: int, sampling: Sampling, uniforms: np.ndarray
) -> tuple[list[int], Tensor]:
    """Return ``n`` tokens that the draft adds to ``text``, and their distributions."""
    text, distributions = list(text), []
    for place in range(n):
        distributions.append(_distributions(draft.read(text, 1), sampling, text))
        text.append(int(draw(distributions[-1], torch.from_numpy(uniforms[place : place + 1]))))
    return text[len(text) - n :], torch.cat(distributions)


# %%
#| export
def speculative_generate(
    model: TransformerLM,
    draft: TransformerLM,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    n_draft: int = 4,
    sampling: Sampling = Sampling(),
    tokenizer: BPETokenizer | None = None,
    stop_tokens: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Completion, SpeculativeStats]:
    """Return a completion with the distribution of ``generate``'s, for fewer passes of ``model``.

    In each pass ``draft`` guesses ``n_draft`` tokens, and ``model`` reads all of them at once.
    """
    options = _Options(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        tokenizer=tokenizer,
        stop_tokens=frozenset(stop_tokens),
        stop_strings=stop_strings,
        seed=seed,
    )
    _check_at_least(n_draft=(1, n_draft))
    _check_draft(model, draft)
    (row,) = _rows(model, [prompt], options)
    with _evaluating(model, draft):
        return _speculate(model, draft, row, options, n_draft)


def _check_draft(model: TransformerLM, draft: TransformerLM) -> None:
    ours, theirs = model.config, draft.config
    if ours.vocab_size != theirs.vocab_size:
        expected = f"a vocabulary of {ours.vocab_size} tokens, the model's"
        raise ValueError(f"draft: expected {expected}, got {theirs.vocab_size}")
    if theirs.context_length < ours.context_length:
        expected = f"a context of at least {ours.context_length} tokens, the model's"
        raise ValueError(f"draft: expected {expected}, got {theirs.context_length}")


# %%
#| export
def _speculate(
    model: TransformerLM, draft: TransformerLM, row: _Row, options: _Options, n_draft: int
) -> tuple[Completion, SpeculativeStats]:
    capacity = len(row.prompt) + options.max_new_tokens
    target, guess = (_Follower(m, capacity, n_draft) for m in (model, draft))
    stats, shown = SpeculativeStats(), ""
    while row.reason is None:
        text, left = list(row.seen), options.max_new_tokens - len(row.ids)
        n = min(n_draft, left - 1, row.context_length - len(text))
        uniforms = uniforms_of(options.seed, stats.n_passes, 2 * n + 1)
        tokens, q = _drafted(guess, text, n, options.sampling, uniforms) if n else ([], None)
        logits = target.read(text + tokens, n + 1)
        p = _distributions(logits, options.sampling, text + tokens)
        accepted, last = verify(p, p[:0] if q is None else q, tokens, uniforms[n:])
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        for place, token in enumerate([*tokens[:accepted], last]):
            if row.reason is None:
                shown += row.take(token, log_probs[place, token].item())
        stats.n_passes, stats.n_drafted = stats.n_passes + 1, stats.n_drafted + n
        stats.n_accepted += accepted
        stats.n_tested += min(accepted + 1, n)
        stats.n_tokens = len(row.ids)
        for follower in (target, guess):
            follower.back_to(len(text) + accepted)
    return _completion(row, shown), stats


# %% [markdown]
# ## Fewer bits


# %%
#| export
def quantize_rows(
    weight: Float[Tensor, "rows columns"],
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, " rows"]]:
    """Return whole numbers from -127 to 127, and what one of them is worth in each row.

    The scale of a row is its largest absolute value divided by 127 (absmax), so that no weight is
    farther than half a scale from its number.
    """
    wide = weight.float()
    scale = wide.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


# %%
#| export
class QuantizedLinear(nn.Module):
    """A linear layer whose weights are whole numbers of 8 bits, with a scale for each output.

    Source: the layout of LLM.int8() without its outliers (Dettmers et al., 2022), weights only.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear) -> "QuantizedLinear":
        """Return the layer with the weights of ``linear``, rounded."""
        with torch.device(linear.weight.device):
            made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight, made.scale = quantize_rows(linear.weight.detach())
        if linear.bias is not None:
            made.bias = linear.bias.detach().clone()
        return made

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the linear map of ``x``, in its dtype."""
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)


# %%
#| export
def quantize(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with a ``QuantizedLinear`` in the place of each linear layer.

    A matrix that is shared with another module, such as a tied head, stays as it is.
    """
    model = deepcopy(model)
    weights = [m._parameters.get("weight") for m in model.modules()]
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            shared = sum(child._parameters.get("weight") is w for w in weights if w is not None) > 1
            if type(child) is nn.Linear and not shared:
                setattr(parent, name, QuantizedLinear.of(child))
    return model


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and saved buffers, each tensor once."""
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values())
