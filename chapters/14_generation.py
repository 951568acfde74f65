# %% [markdown]
# # Generation
#
# > Turn the distribution of the next token into text: choose well, remember what was read, guess
# > ahead without changing a probability, and store matrices in a quarter of the space.
#
# A language model does not write. It says how likely each token is to come next, and stops there.
# Writing means to choose, 67 times for a story of the tiny world, and each choice becomes part of
# the question that follows. Always take the most likely token, and there is one story, told for
# ever. Draw as the model says, and once in a while it takes a token that no sane text would have
# there, and must go on from it.
#
# So this chapter has two halves. The first is about *what* to choose, the second about doing it
# fast: for many readers at once, by remembering, by guessing ahead, with fewer bits. All of it is
# done to the model that {doc}`13_training` trained. If that model is not on your disk yet, it is
# trained first, which takes about two minutes more.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:class}`~llmbook.generation.Sampling`, {py:func}`~llmbook.generation.sample`, {py:func}`~llmbook.generation.generate`, {py:func}`~llmbook.generation.stream`, {py:func}`~llmbook.generation.beam_search`, {py:func}`~llmbook.generation.speculative_generate`, {py:func}`~llmbook.generation.quantize` |
# | **You need** | the model and its cache ({doc}`11_model`, {doc}`09_attention`), a trained one ({doc}`13_training`), entropy ({doc}`01_tinyworld`), counter-based random numbers ({doc}`07_batches`) |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 45 seconds to run |

# %% tags=["remove-cell"]
#| default_exp generation

# %% tags=["engine"]
#| export
# The imports that only the module needs
import codecs
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache as remember
from functools import cached_property
from inspect import unwrap
from itertools import count, takewhile
from numbers import Real
from operator import index
from types import FunctionType
from typing import Any, Literal, NamedTuple

from jaxtyping import Bool, Float, Int8, Int64

# %% [markdown]
# The tools are few: a model, its cache and its tokenizer, and random numbers that can be counted.

# %%
#| export
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmbook.attention import KVCache, LayerCache
from llmbook.batches import random_bits
from llmbook.blocks import RMSNorm, activate
from llmbook.environment import check_at_least, check_choice, check_text
from llmbook.model import TransformerLM, count_parameters
from llmbook.tokenizer import BPETokenizer

# %% [markdown]
# ## One token after another
#
# We load the model, train it if nobody has yet, and write the smallest loop there is: read the
# text so far, take the most likely token, append it. A story begins where the one before it
# ended, so the prompt is a single `<|endoftext|>`.

# %%
import tempfile
import time

import matplotlib.pyplot as plt

from llmbook.tinyworld import TinyWorld
from llmbook.training import pretrained

plt.style.use("llmbook.book")
torch.set_num_threads(1)
world = TinyWorld()
trained = pretrained("tinyworld")
model, tokenizer, held_out = trained.model, trained.tokenizer, trained.held_out
end = tokenizer.special_tokens["<|endoftext|>"]


@torch.no_grad()
def greedy(ids: list[int], n: int) -> list[int]:
    while len(ids) < n and (len(ids) == 1 or ids[-1] != end):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids


told = [greedy([end], 128) for _ in range(3)]
print(f"told {len(told)} times: {len({tuple(story) for story in told})} story", end=", ")
print("which ends with", tokenizer.decode(told[0][-1:]))

# %% [markdown]
# Here it is. (A model that was trained on another processor may tell another one.)
#
# > One quiet day, Toby the mouse was very busy. It was raining. Toby is proud to be a mouse. Toby
# > is very proud. Toby is the best gardener in town. Then a stranger called Axel came by. Nobody
# > knew where Axel lived. Toby smiled.
#
# That is the whole story, and the only one. A world with millions of stories has become one story
# learned by heart. To get others we have to draw.
#
# **Drawing.** Lay the probabilities side by side on a line from 0 to 1 and throw a dart: a number
# $u$, uniform on $[0, 1)$. Token $i$ is chosen if $u$ falls into its piece, which has the length
# $p_i$, so it is chosen with probability $p_i$. The ends of the pieces are cumulative sums, and
# the piece is found by binary search. Summed in 32 bits the line may end at 0.9999999, so we
# scale $u$ by its end, and sum in 64.


# %%
#| export
def draw(
    probabilities: Float[Tensor, "batch vocab_size"], uniforms: Float[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """Return the token of each row in whose share of the line from 0 to 1 its number falls.

    ``uniforms`` are at least 0 and below 1. What has probability 0 is never drawn. Sums are made
    in float64; rows need not sum to one. NaN and what is negative raise a ``ValueError``.

    >>> draw(torch.tensor([[0.5, 0.0, 0.5]] * 3), torch.tensor([0.0, 0.4, 0.5])).tolist()
    [0, 0, 2]
    """
    _check_shares(probabilities, to_one=False)
    _check_uniforms(uniforms, len(probabilities))
    return _drawn(probabilities, uniforms)


def _drawn(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    device = probabilities.device
    if device.type == "mps":  # has no float64
        probabilities = probabilities.cpu()
    ends = probabilities.cumsum(dim=-1, dtype=torch.float64)
    targets = uniforms.to(ends)[:, None] * ends[:, -1:]  # the last end is not exactly 1
    return torch.searchsorted(ends, targets, right=True)[:, 0].to(device)


# %% [markdown] tags=["engine"]
# ### Engine room: numbers, ids and tensors are checked where they enter

# %% [markdown] tags=["engine"]
# Each function of this chapter can be called by itself, and a slip should be named where it was
# made: the argument, what was expected, and what came. NaN fails every comparison, so the
# comparisons say what must hold, not what must not.


# %% tags=["engine"]
#| export
def _check_number(
    argument: str, value: object, expected: str, fits: Callable[[Any], bool] = math.isfinite
) -> None:
    """Demand a number that ``fits``; True and "0.5" are none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not fits(value):
        raise ValueError(f"{argument}: expected {expected}, got {value!r}")


def _check_share(argument: str, value: object) -> None:
    _check_number(argument, value, "more than 0, at most 1", lambda share: 0 < share <= 1)


def _check_count(argument: str, value: object, least: int) -> None:
    """Demand a whole number of at least ``least``, not None."""
    if value is None:
        raise ValueError(f"{argument}: expected a whole number of at least {least}, got None")
    check_at_least(**{argument: (least, value)})


# %% [markdown] tags=["engine"]
# Ids come as lists, sets, ranges, arrays or tensors. A text in their place is the most common slip,
# and a costly one: `"7"` is never equal to 7, so a stop token that is a text never stops anything.


# %% tags=["engine"]
#| export
def _as_ids(argument: str, ids: Any) -> list[int]:
    """Return ids as whole numbers of Python."""
    several = isinstance(ids, Iterable) and not isinstance(ids, str | bytes)
    if not several or getattr(ids, "ndim", 1) == 0:
        raise ValueError(f"{argument}: expected a list of ids, got {ids!r:.60}")
    found = []
    for token in ids:
        try:
            if isinstance(token, bool):
                raise TypeError
            found.append(index(token))
        except TypeError:
            expected = "ids, which are whole numbers"
            raise ValueError(f"{argument}: expected {expected}, got {token!r:.60}") from None
    return found


def _check_vocabulary(argument: str, ids: Iterable[int], vocab_size: int) -> None:
    """Demand ids that a model with so many tokens has."""
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        expected = f"ids from 0 to {vocab_size - 1}"
        raise ValueError(f"{argument}: expected {expected}, got {wrong[0]}")


# %% [markdown] tags=["engine"]
# Tensors have a row for each text and a column for each token. Minus infinity is a good logit: it
# says "never". But in each row something must be possible.


# %% tags=["engine"]
#| export
def _check_rows(argument: str, rows: object) -> None:
    """Demand a tensor of floats, (batch, vocab_size), with at least one column."""
    if not isinstance(rows, Tensor):
        raise ValueError(f"{argument}: expected a tensor, got {rows!r:.60}")
    if not rows.is_floating_point():
        raise ValueError(f"{argument}: expected floats, got {rows.dtype}")
    if rows.ndim != 2 or not rows.size(1):
        got = tuple(rows.shape)
        raise ValueError(f"{argument}: expected the shape (batch, vocab_size), got {got}")


def _flaw(logits: Tensor) -> str | None:
    """Say what is wrong with logits from which no token can be drawn."""
    best = logits.amax(dim=-1)  # NaN if there is any in the row
    if all(map(math.isfinite, best.tolist())):
        return None
    return (
        "NaN" if best.isnan().any() else "infinity" if (best == math.inf).any() else "-inf for all"
    )


def _check_logits(logits: object) -> None:
    _check_rows("logits", logits)
    if flaw := _flaw(logits):  # type: ignore[arg-type]
        raise ValueError(f"logits: expected numbers or -inf, one of them finite, got {flaw}")


# %% [markdown] tags=["engine"]
# Filters want probabilities that sum to one, up to the rounding of sixteen bits. Given logits by
# mistake, they would cut at a place that means nothing.


# %% tags=["engine"]
#| export
def _check_shares(shares: object, argument: str = "probabilities", to_one: bool = True) -> None:
    """Demand rows of numbers from 0 on that have a positive sum, or the sum 1."""
    _check_rows(argument, shares)
    assert isinstance(shares, Tensor)
    sums = shares.sum(dim=-1, dtype=torch.promote_types(shares.dtype, torch.float32))
    good = (sums - 1).abs() < 0.02 if to_one else (sums > 0) & (sums < math.inf)
    if not (good & (shares.amin(dim=-1) >= 0)).all():
        expected = (
            "numbers from 0 on that sum to 1" if to_one else "numbers from 0 on, one positive"
        )
        wrong = shares[~(good & (shares.amin(dim=-1) >= 0))][0]
        raise ValueError(f"{argument}: expected {expected}, got the row {wrong.tolist()!s:.60}")


def _check_like(argument: str, table: object, logits: Tensor, dtype: torch.dtype) -> None:
    """Demand a table of ``dtype`` with an entry for each logit."""
    if not isinstance(table, Tensor) or table.dtype != dtype or table.shape != logits.shape:
        got = (table.dtype, tuple(table.shape)) if isinstance(table, Tensor) else table
        expected = f"a {dtype} tensor of shape {tuple(logits.shape)}"
        raise ValueError(f"{argument}: expected {expected}, got {got!r:.60}")


# %% tags=["engine"]
#| export
def _check_uniforms(uniforms: object, n: int) -> None:
    """Demand a number from 0 to below 1 for each of ``n`` rows."""
    if not isinstance(uniforms, Tensor) or not uniforms.is_floating_point():
        raise ValueError(f"uniforms: expected a tensor of floats, got {uniforms!r:.60}")
    if uniforms.shape != (n,):
        raise ValueError(f"uniforms: expected the shape ({n},), got {tuple(uniforms.shape)}")
    inside = (uniforms >= 0) & (uniforms < 1)
    if not inside.all():
        wrong = uniforms[~inside][0].item()
        raise ValueError(f"uniforms: expected numbers from 0 to below 1, got {wrong}")


# %% [markdown]
# ## One real distribution
#
# Everything that follows we shall watch at one place of one story, where the world leaves a
# choice: Ada's name has just been written, and a fact about her is to come. Two facts are told
# already, by *never goes out without* and by *the best friend of Ada is*.

# %%
beginning = (
    "One morning, Ada the frog was very busy. It was a sunny day. Ada never goes out without a "
    "sled. The best friend of Ada is Mia. Ada"
)
prompt = [end, *tokenizer.encode(beginning)]
with torch.no_grad():
    logits = model(torch.tensor([prompt]))[:, -1]
p = logits.softmax(dim=-1)
likely = p[0].argsort(descending=True)[:12]
entropy = torch.special.entr(p).sum().item()
sensible = int((p > 0.01).sum())
assert 7 < sensible < 13 and 2 < entropy < 2.4
print(f"about {round(sensible, -1)} of {p.size(1)} tokens have more than 1 %", end="; ")
print(f"entropy about {entropy:.0f} nats")

# %% [markdown]
# About ten tokens are sensible, and all 951 are possible.
#
# **Temperature.** We may want something between always the best and any at all. Let us ask for
# the distribution $r$ that has the largest mean log-probability, with a bonus $T$ for each nat
# of entropy:
#
# $$
# \max_r \; \sum_i r_i \log p_i + T\, H(r) , \qquad \sum_i r_i = 1 .
# $$
#
# With a multiplier $\lambda$ for the constraint, the derivative with respect to $r_i$ must vanish:
#
# $$
# \log p_i - T (\log r_i + 1) + \lambda = 0
# \quad\Longrightarrow\quad
# r_i = \frac{p_i^{1/T}}{\sum_j p_j^{1/T}} = \frac{e^{s_i/T}}{\sum_j e^{s_j/T}} ,
# $$ (generation-temperature)
#
# where $s_i$ are the {term}`logits`, which differ from $\log p_i$ by a constant. So divide the
# logits by the {term}`temperature` $T$. At $T = 1$ this is the model, towards 0 it is greedy,
# towards infinity uniform.
#
# **The tail.** At $T = 1$ each senseless token is rare, but there are 940 of them. If their
# probabilities sum to $\varepsilon$ at each place, a text of $n$ tokens avoids them all with
# probability $(1 - \varepsilon)^n$. One per cent is enough to spoil every second story:

# %%
for tail in (0.001, 0.01, 0.05):
    print(f"tail {tail:.1%}: a story of 67 tokens is spoiled in {1 - (1 - tail) ** 67:.0%}")

# %% [markdown]
# Nor can the model mend such a text: it has never read one and does not know how to go on. Hence
# filters: set the unlikely to zero, and scale the rest up to one. They differ in where they cut.
# **Top-k** keeps the $k$ most likely {cite}`fan2018hierarchical`. Ties at the border all stay, so
# that the result does not depend on the order of the vocabulary.


# %%
#| export
def _kept(probabilities: Tensor, keep: Tensor) -> Tensor:
    """Set all others to zero, and scale what is left to a sum of one."""
    kept = torch.where(keep, probabilities, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def keep_top_k(
    probabilities: Float[Tensor, "batch vocab_size"], k: int
) -> Float[Tensor, "batch vocab_size"]:
    """Keep the ``k`` most likely tokens, and all that are as likely as the last of them.

    Source: Fan et al. (2018).
    """
    _check_shares(probabilities)
    _check_count("k", k, 1)
    least = probabilities.topk(min(k, probabilities.size(-1)), dim=-1).values[:, -1:]
    return _kept(probabilities, probabilities >= least)


# %% [markdown]
# One $k$ cannot fit all places: after *goes out* a single token makes sense, after *One morning,*
# all 48 names do. **Top-p** lets the distribution decide. It keeps the fewest tokens whose
# probabilities reach a mass, the {term}`nucleus` {cite}`holtzman2020curious`. In ascending order, a
# token is outside if all up to it sum to at most one minus the mass. The first that is not is the
# border, and whatever is likelier is inside; of several that are as likely as the border, only as
# many as the mass needs, those with the highest ids. So only values are sorted, not tokens with
# them, and on a processor NumPy does that several times as fast as PyTorch, as we shall see.


# %%
#| export
def _ascending(values: Tensor) -> Tensor:
    """Sort each row."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))


def keep_top_p(
    probabilities: Float[Tensor, "batch vocab_size"], mass: int | float
) -> Float[Tensor, "batch vocab_size"]:
    """Keep the fewest tokens that have at least ``mass`` together: the nucleus.

    Of equally likely tokens at its border those with the highest ids are inside. Source: Holtzman
    et al. (2020), section 3.1.
    """
    _check_shares(probabilities)
    _check_share("mass", mass)
    return _nucleus(probabilities, mass)


def _nucleus(probabilities: Tensor, mass: int | float) -> Tensor:
    wide = _wide(probabilities.detach())
    ascending, last = _ascending(wide), wide.size(-1) - 1
    sums, most = ascending.cumsum(dim=-1), wide.new_full((len(wide), 1), 1 - mass)
    outside = torch.searchsorted(sums, most, right=True).clamp_(max=last)
    border = ascending.gather(1, outside)
    keep = wide >= border
    too_many = keep.sum(dim=-1, keepdim=True) + outside - wide.size(-1)
    if too_many.any():
        tied = wide == border
        keep &= ~tied | (tied.cumsum(dim=-1) > too_many)
    return _kept(probabilities, keep)


# %% [markdown]
# But when the temperature is high, the tail itself has mass, and the nucleus swallows it. **Min-p**
# looks at the best token instead, and asks of all others a share of its probability
# {cite}`nguyen2025minp`. A sure model then leaves no choice, an unsure one many. In logits the rule
# is $s_i \ge \max_j s_j + T \log(\text{share})$: a hotter text gets a lower bar, but the bar does
# not depend on how many unlikely tokens there are.


# %%
#| export
def keep_min_p(
    probabilities: Float[Tensor, "batch vocab_size"], share: int | float
) -> Float[Tensor, "batch vocab_size"]:
    """Keep what is at least ``share`` times as likely as the most likely token.

    Source: Nguyen et al. (2025).
    """
    _check_shares(probabilities)
    _check_number("share", share, "at least 0, at most 1", lambda share: 0 <= share <= 1)
    return _kept(probabilities, probabilities >= share * probabilities.amax(dim=-1, keepdim=True))


# %% [markdown]
# **Typical** sampling doubts the best token, too. Each token of a text carries a surprise,
# $-\log p_i$, and its mean over what the model expects is the entropy $H$. Human text stays near
# it: neither a run of the obvious nor one of surprises. So keep the tokens whose surprise is
# nearest to $H$, until they have the mass {cite}`meister2023typical`.


# %%
#| export
def keep_typical(
    probabilities: Float[Tensor, "batch vocab_size"], mass: int | float
) -> Float[Tensor, "batch vocab_size"]:
    """Keep tokens whose surprise is nearest to the entropy, until they have ``mass`` together.

    Ties at the border are all kept. Source: Meister et al. (2023).
    """
    _check_shares(probabilities)
    _check_share("mass", mass)
    entropy = torch.special.entr(probabilities).sum(dim=-1, keepdim=True)
    distance = (-probabilities.log() - entropy).abs()
    ascending, order = distance.sort(dim=-1, stable=True)
    reached = probabilities.gather(1, order).cumsum(dim=-1) >= mass
    last = (~reached).sum(dim=-1, keepdim=True).clamp(max=reached.size(-1) - 1)
    return _kept(probabilities, distance <= ascending.gather(1, last))


# %% [markdown]
# **Penalties.** Greedy text from large models falls into loops, and the more often a phrase has
# been repeated, the more likely the model finds it {cite}`holtzman2020curious`. The remedies look
# at the history. The **repetition penalty** divides the logits of all tokens that have occurred by
# a number such as 1.2 {cite}`keskar2019ctrl`. A negative logit would grow by that, so it is
# multiplied instead, as in transformers. The **frequency penalty** subtracts a constant for each
# occurrence, the **presence penalty** one for the first, as services offer them.


# %%
#| export
def penalize_repetition(
    logits: Float[Tensor, "batch vocab_size"],
    seen: Bool[Tensor, "batch vocab_size"],
    penalty: int | float,
) -> Float[Tensor, "batch vocab_size"]:
    """Divide the positive logits of seen tokens by ``penalty``, multiply the negative ones by it.

    Source: Keskar et al. (2019), section 4.1, who divide all; transformers does as here.
    """
    _check_rows("logits", logits)
    _check_like("seen", seen, logits, torch.bool)
    _check_number("penalty", penalty, "a positive number", lambda x: 0 < x < math.inf)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalize_frequency(
    logits: Float[Tensor, "batch vocab_size"],
    counts: Int64[Tensor, "batch vocab_size"],
    frequency: int | float,
    presence: int | float = 0.0,
) -> Float[Tensor, "batch vocab_size"]:
    """Subtract ``frequency`` for each time that a token has occurred, ``presence`` if it has."""
    _check_rows("logits", logits)
    _check_like("counts", counts, logits, torch.int64)
    _check_number("frequency", frequency, "a number")
    _check_number("presence", presence, "a number")
    return logits - frequency * counts - presence * (counts > 0)


# %% [markdown]
# One of the two has a flaw that shows on paper. Softmax does not change when a constant is added
# to all logits, so two models may be the same and have logits that differ by 10. Subtracting
# keeps them the same; dividing does not:

# %%
two, seen = torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]])
for shift in (0, 10):
    scores = two + shift
    divided = penalize_repetition(scores, seen, 1.2).softmax(-1)[0, 0].item()
    subtracted = penalize_frequency(scores, seen.long(), 0.5).softmax(-1)[0, 0].item()
    print(f"logits shifted by {shift:2}: divided {divided:.2f}, subtracted {subtracted:.2f}")

# %% [markdown]
# **Bans.** The bluntest remedy makes a token impossible: some that are never wanted, or whichever
# would complete a run of $n$ tokens that the text has had already.
#
# All settings go into one object. What makes no sense is refused: a negative temperature, a mass of
# 0, or a filter at temperature 0, where the best token is taken whatever the filter says.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token; without arguments it is drawn from the model's distribution.

    Temperature 0 is greedy: the most likely token. Penalties look at the whole text so far, the
    prompt included, and so does ``no_repeat_ngram_size``: no run of so many tokens occurs twice.
    ``banned_tokens``, ids, are never chosen. Settings that make no sense, alone or together, raise
    a ``ValueError``.
    """

    temperature: int | float = 1.0
    top_k: int | None = None
    top_p: int | float | None = None
    min_p: int | float | None = None
    typical_p: int | float | None = None
    repetition_penalty: int | float = 1.0
    frequency_penalty: int | float = 0.0
    presence_penalty: int | float = 0.0
    banned_tokens: Collection[int] = ()
    no_repeat_ngram_size: int | None = None

    def __post_init__(self) -> None:
        self._check()


# %% [markdown]
# The order matters, because each filter sees what the one before it left, scaled up to one. We take
# that of transformers: penalties, temperature, top-k, top-p, min-p, typical. Temperature 0 has a
# distribution, too: all on one token. Speculative decoding, below, needs it.


# %%
#| export
def _distribution(logits: Tensor, sampling: Sampling, counts: Tensor | None) -> Tensor:
    logits = _penalized(logits, sampling, counts)
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).to(logits)
    if sampling.temperature != 1:  # the best is at 0, so that a tiny temperature cannot overflow
        temperature = max(sampling.temperature, torch.finfo(logits.dtype).tiny)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities = logits.softmax(dim=-1)
    if sampling.top_k is not None:
        probabilities = keep_top_k(probabilities, sampling.top_k)
    if sampling.top_p is not None:
        probabilities = _nucleus(probabilities, sampling.top_p)
    if sampling.min_p is not None:
        probabilities = keep_min_p(probabilities, sampling.min_p)
    if sampling.typical_p is not None:
        probabilities = keep_typical(probabilities, sampling.typical_p)
    return probabilities


def next_token_distribution(
    logits: Float[Tensor, "batch vocab_size"],
    sampling: Sampling,
    history: Int64[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch vocab_size"]:
    """Return the probabilities from which the next token is drawn.

    In this order: bans, repetition, frequency and presence penalty, temperature, top-k, top-p,
    min-p, typical; each filter sees what the one before has left. ``history`` is the text so far,
    for penalties and repeats; -1 in it is padding.
    """
    allowed, counts = _prepared(logits, sampling, history)
    return _distribution(allowed, sampling, counts)


# %% [markdown] tags=["engine"]
# ### Engine room: settings are checked, occurrences counted, and `sample` chooses a token

# %% [markdown] tags=["engine"]
# The checks name the argument, its value, and what was expected.

# %% tags=["engine"]
#| export
_FILTERS = ("top_k", "top_p", "min_p", "typical_p")


class Sampling(Sampling):  # continued
    def _check(self) -> None:
        expected = "0 (greedy) or a positive number"
        _check_number("temperature", self.temperature, expected, lambda t: 0 <= t < math.inf)
        check_at_least(top_k=(1, self.top_k), no_repeat_ngram_size=(1, self.no_repeat_ngram_size))
        for name in _FILTERS[1:]:
            share = getattr(self, name)
            if share is not None and not (name == "min_p" and share == 0):
                _check_share(name, share)
        penalty = self.repetition_penalty
        expected = "a positive number"
        _check_number("repetition_penalty", penalty, expected, lambda x: 0 < x < math.inf)
        _check_number("frequency_penalty", self.frequency_penalty, "a number")
        _check_number("presence_penalty", self.presence_penalty, "a number")
        banned = _as_ids("banned_tokens", self.banned_tokens)
        _check_count("banned_tokens", min(banned, default=0), 0)
        vars(self).update(banned_tokens=tuple(sorted(set(banned))))  # frozen for others
        given = [name for name in _FILTERS if getattr(self, name) is not None]
        if self.temperature == 0 and given:
            expected = "None at temperature 0, which takes the most likely token"
            raise ValueError(f"{given[0]}: expected {expected}, got {getattr(self, given[0])}")


# %% [markdown] tags=["engine"]
# Some settings need to know the text so far.


# %% tags=["engine"]
#| export
class Sampling(Sampling):  # continued
    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on which tokens have occurred, not only on the logits."""
        neutral = self.repetition_penalty == 1
        return not neutral or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def needs_history(self) -> bool:
        """Whether there must be the text so far: for penalties, or for what may not return."""
        return self.has_penalties or self.no_repeat_ngram_size is not None


_PLAIN = Sampling()  # draw from the model's distribution


# %% [markdown] tags=["engine"]
# Bans come first. A token whose logit is minus infinity has probability zero, and neither penalties
# nor filters bring it back. To complete a run of $n$ tokens that has occurred, the next token must
# be the last of a run whose first $n - 1$ are the end of the text.


# %% tags=["engine"]
#| export
def _completing(text: Sequence[int], n: int) -> np.ndarray:
    """Return the ids after which the last ``n`` tokens would have occurred before."""
    ids = np.asarray(text, dtype=np.int64)
    if len(ids) < n:
        return ids[:0]
    runs = np.lib.stride_tricks.sliding_window_view(ids, n)
    return runs[(runs[:, :-1] == ids[len(ids) - n + 1 :]).all(axis=1), -1]


# %% tags=["engine"]
#| export
def _allowed(
    logits: Tensor,
    sampling: Sampling,
    texts: Sequence[Sequence[int]],
    stops: Sequence[int] = (),
) -> Tensor:
    """Return logits with minus infinity for ``stops`` and what is forbidden after ``texts``."""
    banned, n = [*sampling.banned_tokens, *stops], sampling.no_repeat_ngram_size
    if not banned and n is None:
        return logits
    logits = logits.clone()
    logits[:, banned] = -math.inf
    if n is not None:
        for row, text in enumerate(texts):
            logits[row, _completing(text, n).tolist()] = -math.inf
    return logits


def _check_any_left(logits: Tensor) -> None:
    if (logits.amax(dim=-1) == -math.inf).any():
        expected = "a token that is neither banned nor a repetition"
        raise ValueError(f"sampling: expected {expected}, got none")


# %% [markdown] tags=["engine"]
# Penalties need to know how often each token has occurred.


# %% tags=["engine"]
#| export
def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _penalized(logits: Tensor, sampling: Sampling, counts: Tensor | None) -> Tensor:
    """Return logits in 32 bits at least, lower for what has occurred."""
    logits = _wide(logits)
    if not sampling.has_penalties:
        return logits
    assert counts is not None  # _prepared and _Chooser see to it
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, counts > 0, sampling.repetition_penalty)
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    return penalize_frequency(logits, counts, frequency, presence)


def _token_counts(history: Int64[Tensor, "batch length"], vocab_size: int) -> Tensor:
    """Count each token in each row; -1 is padding."""
    counts = torch.zeros(len(history), vocab_size, dtype=torch.int64, device=history.device)
    return counts.scatter_add_(1, history.clamp(min=0), (history >= 0).long())


# %% [markdown] tags=["engine"]
# The functions that others call check what they are given, and then do all of this.


# %% tags=["engine"]
#| export
def _check_history(history: object, batch: int, vocab_size: int) -> None:
    """Demand ids of the vocabulary, (batch, length), or -1 for padding."""
    if not isinstance(history, Tensor) or history.dtype != torch.int64:
        got = history.dtype if isinstance(history, Tensor) else history
        raise ValueError(f"history: expected an int64 tensor of ids, got {got!r:.60}")
    if history.ndim != 2 or len(history) != batch:
        got = tuple(history.shape)
        raise ValueError(f"history: expected the shape ({batch}, length), got {got}")
    wrong = history[(history < -1) | (history >= vocab_size)]
    if len(wrong):
        expected = f"ids from 0 to {vocab_size - 1}, or -1 for padding"
        raise ValueError(f"history: expected {expected}, got {wrong[0].item()}")


# %% tags=["engine"]
#| export
def _prepared(
    logits: Tensor, sampling: Sampling, history: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check what was given; return logits without what is forbidden, and counts for penalties."""
    _check_logits(logits)
    _check_sampling(sampling)
    batch, vocab_size = logits.shape
    _check_vocabulary("banned_tokens", sampling.banned_tokens, vocab_size)
    if history is not None:
        _check_history(history, batch, vocab_size)
    elif sampling.needs_history:
        raise ValueError("history: expected the text so far for what looks back, got None")
    texts: list[list[int]] = []
    if history is not None and sampling.no_repeat_ngram_size is not None:
        texts = [[token for token in row if token >= 0] for row in history.tolist()]
    allowed = _allowed(logits, sampling, texts)
    _check_any_left(allowed)
    return allowed, None if history is None else _token_counts(history, vocab_size)


def _check_sampling(sampling: object) -> None:
    if not isinstance(sampling, Sampling):
        expected = "a Sampling, such as Sampling(temperature=0.5)"
        raise ValueError(f"sampling: expected {expected}, got {sampling!r:.60}")


# %% [markdown] tags=["engine"]
# To choose is to draw from the distribution. Greedy needs no dart; everything else does.


# %% tags=["engine"]
#| export
def _choose(
    logits: Tensor, sampling: Sampling, counts: Tensor | None, uniforms: Tensor | None
) -> Tensor:
    if sampling.temperature == 0 or uniforms is None:
        return _penalized(logits, sampling, counts).argmax(dim=-1)
    return _drawn(_distribution(logits, sampling, counts), uniforms)


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    sampling: Sampling = _PLAIN,
    *,
    history: Int64[Tensor, "batch length"] | None = None,
    uniforms: Float[Tensor, " batch"] | None = None,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " batch"]:
    """Choose a token for each row, as ``sampling`` says.

    ``uniforms``, from 0 to below 1, decide where chance does; without them ``generator`` does, or
    else PyTorch's own on the processor. ``history`` is the text so far, for what looks back; -1 in
    it is padding. Logits that are NaN, infinity, or -inf for all of a row raise a ``ValueError``.
    """
    allowed, counts = _prepared(logits, sampling, history)
    if uniforms is None:
        if not isinstance(generator, torch.Generator | None):
            raise ValueError(f"generator: expected a torch.Generator, got {generator!r:.60}")
        device = None if generator is None else generator.device
        n = len(logits)
        uniforms = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
    _check_uniforms(uniforms, len(logits))
    return _choose(allowed, sampling, counts, uniforms)


# %% [markdown]
# ### Nine ways to choose
#
# Here are all of them, at our place in Ada's story ({numref}`fig-generation-filters`).

# %% mystnb={"figure": {"caption": "What each method makes of one distribution of the trained model: gray outlines are the model's probabilities, bars what a token is drawn from. Greedy takes one token (its bar goes on to 1), temperature bends, filters cut and scale up, penalties lower what the text has had: is and never.", "name": "fig-generation-filters"}, "image": {"alt": "Nine bar charts of the twelve likeliest tokens after: Ada. The model has is at 0.3 and nine more near 0.08. Greedy has is alone. Temperature 0.5 raises is to about 0.6, temperature 2 makes all nearly equal and lets others in. Top-k 5 keeps five bars, top-p 0.8 about eight, min-p 0.25 five or six, typical 0.5 drops is and keeps some of those beside it. Repetition penalty 1.5 and frequency penalty 2 shrink the bars of is and never."}}
methods = {
    "greedy": Sampling(temperature=0),
    "temperature 0.5": Sampling(temperature=0.5),
    "temperature 2": Sampling(temperature=2),
    "top-k 5": Sampling(top_k=5),
    "top-p 0.8": Sampling(top_p=0.8),
    "min-p 0.25": Sampling(min_p=0.25),
    "typical 0.5": Sampling(typical_p=0.5),
    "repetition 1.5": Sampling(repetition_penalty=1.5),
    "frequency 2": Sampling(frequency_penalty=2),
}
figure, axes = plt.subplots(3, 3, figsize=(7.2, 5.4), sharex=True, sharey=True)
axes[0, 0].set_ylim(0, 0.7)
words = [tokenizer.decode([token]).strip() for token in likely.tolist()]
for ax, (name, sampling) in zip(axes.flat, methods.items(), strict=True):
    r = next_token_distribution(logits, sampling, torch.tensor([prompt]))[0, likely]
    ax.bar(range(12), r)
    ax.bar(range(12), p[0, likely], fill=False, edgecolor="gray", linewidth=0.8)
    ax.set_title(name + (f" ({r.sum():.0%} shown)" if r.sum() < 0.99 else ""), fontsize=8)
    ax.set_xticks(range(12), words, rotation=90, fontsize=7)
plt.show()

# %% [markdown]
# *Typical* has dropped the likeliest token, *is*: it is too obvious, with a surprise of about one
# nat where about two are expected.
#
# ## Many texts at once
#
# Our loop of three lines reads the whole text again for each token, serves one reader, and knows
# one way to end. The real one shall take many prompts of unequal length, and give each exactly
# what it would get alone ({numref}`fig-generation-loop`).
#
# ```{figure} ../figures/generation-loop.svg
# :name: fig-generation-loop
# :alt: Three prompts of one, four and three tokens stand in rows that end in the same column, padded in front with position minus 1. Each row gets one token a step, at positions that go on from its prompt. Row 0 and row 1 stop at the sign that ends a text, row 2 at its length. An arrow points to one token: its random number depends on the seed, the row and the step.
#
# Padding stands in front, so that all rows end in one column. Position $-1$ hides it from
# attention.
# ```
#
# **Chance without neighbors.** One generator for all would give row 3 other numbers when row 2
# ends early. With the counters of {doc}`07_batches` each number follows from seed, row and step
# alone: the upper 53 of 64 random bits, as a fraction.


# %%
#| export
def uniforms_of(seed: int, row: int, n: int, first_step: int = 0) -> Float[np.ndarray, " n"]:
    """Return random numbers, from 0 to below 1, of ``n`` steps of one row from ``first_step`` on.

    Each depends on nothing but ``seed``, ``row`` and its step.

    >>> uniforms_of(seed=0, row=7, n=2).round(3)
    array([0.743, 0.05 ])
    >>> uniforms_of(seed=0, row=7, n=1, first_step=1).round(3)
    array([0.05])
    """
    _check_seed(seed)
    for argument, value in (("row", row), ("n", n), ("first_step", first_step)):
        _check_count(argument, value, 0)
    steps = np.arange(first_step, first_step + n)
    return (random_bits(seed, row, steps) >> np.uint64(11)) * 2.0**-53


# %% [markdown]
# **When to end.** A stop *token* is a comparison of ids. A stop *string* is harder: `"\n\n"` may
# come as one token or as two, or as the end of one and the beginning of the next. And whoever
# streams text must not show what it would have to take back. So text is held back as long as it
# may become a stop, or as long as the bytes of a character are not complete.
#
# The third end is that the model can read no more. A text longer than the context is never read
# in silence: by default generation ends and says "context". It may also refuse at once, or
# *slide*: forget the older half of what it has read and go on, with positions from 0.

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


# %% [markdown]
# Whatever asks for text takes the same options, checked in one place. (`_PLAIN` is `Sampling()`,
# the model's own distribution.)


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The keyword arguments that ``generate`` and its like have in common, checked.

    ``max_new_tokens``: after how many to end at the latest. ``min_new_tokens``: before so many no
    stop token is chosen and no stop string looked for. ``sampling``: how to choose them.
    ``tokenizer``: needed for prompts, stops and completions that are texts; a prompt is encoded
    as it is, with nothing put before it. ``stop_tokens``: ids, each of which ends a completion
    and is its last. ``stop_strings``: texts, before each of which the completion's text ends.
    ``seed``: the same one gives the same texts, whatever the state of PyTorch's generators.
    ``use_cache``: False reads the whole text at each step, for comparison. ``on_full``: what to
    do at the end of the context, "stop"; "error", a ValueError before any work if the prompt and
    ``max_new_tokens`` do not fit; or "slide", forget the older half and go on.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    sampling: Sampling = _PLAIN
    tokenizer: BPETokenizer | None = None
    stop_tokens: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    seed: int = 0
    use_cache: bool = True
    on_full: Literal["stop", "error", "slide"] = "stop"

    def __post_init__(self) -> None:
        self._check()


# %% [markdown] tags=["engine"]
# ### Engine room: options and prompts are checked, and a row knows when to end

# %% [markdown] tags=["engine"]
# Every option is checked before the first token. A generation that dies on the way, or never ends,
# has cost what it was to give.


# %% tags=["engine"]
#| export
class GenerationOptions(GenerationOptions):  # continued
    def _check(self) -> None:
        _check_count("max_new_tokens", self.max_new_tokens, 1)
        _check_count("min_new_tokens", self.min_new_tokens, 0)
        if self.min_new_tokens > self.max_new_tokens:
            expected = f"at most max_new_tokens = {self.max_new_tokens}"
            raise ValueError(f"min_new_tokens: expected {expected}, got {self.min_new_tokens}")
        _check_sampling(self.sampling)
        if not isinstance(self.tokenizer, BPETokenizer | None):
            raise ValueError(f"tokenizer: expected a BPETokenizer, got {self.tokenizer!r:.60}")
        self._check_stops()
        _check_seed(self.seed)
        check_choice("on_full", self.on_full, ("stop", "error", "slide"))
        if not isinstance(self.use_cache, bool):
            raise ValueError(f"use_cache: expected True or False, got {self.use_cache!r}")


def _check_seed(seed: object) -> None:
    """Demand a whole number that fits into 64 bits."""
    whole = not isinstance(seed, bool) and isinstance(seed, int | np.integer)
    if not whole or not -(2**63) <= seed < 2**63:  # type: ignore[operator]
        raise ValueError(f"seed: expected a whole number of 64 bits, got {seed!r:.60}")


# %% [markdown] tags=["engine"]
# A single id or text where several are expected is a common slip, and so is the text of a special
# token where its id belongs.


# %% tags=["engine"]
#| export
class GenerationOptions(GenerationOptions):  # continued
    def _check_stops(self) -> None:
        given = self.stop_tokens
        for text in given if isinstance(given, Collection) else ():
            if isinstance(text, str) and not isinstance(given, str):
                expected = "ids; a text is one of stop_strings, or has an id in special_tokens"
                raise ValueError(f"stop_tokens: expected {expected}, got {text!r}")
        ids = _as_ids("stop_tokens", given)
        _check_count("stop_tokens", min(ids, default=0), 0)
        vars(self).update(stop_tokens=tuple(sorted(set(ids))))  # frozen for others
        texts = self.stop_strings
        if isinstance(texts, str) or not isinstance(texts, Collection):
            raise ValueError(f"stop_strings: expected a list of texts, got {texts!r:.60}")
        for stop in texts:
            if not check_text(stop, "stop_strings"):
                raise ValueError("stop_strings: expected texts of at least one character, got ''")
        if texts and self.tokenizer is None:
            raise ValueError("tokenizer: expected one, for stop_strings, got None")


# %% [markdown] tags=["engine"]
# Other libraries have other names for the same options, and some of ours live in `sampling`.
# Whoever takes one for another is told where it belongs.


# %% tags=["engine"]
#| export
_NAMES_ELSEWHERE = {
    "do_sample": "sampling",
    "eos_token_id": "stop_tokens",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop": "stop_strings",
}


def _options(given: dict[str, Any]) -> GenerationOptions:
    """Return the options; a TypeError says where one that is unknown or missing belongs."""
    known = [field.name for field in fields(GenerationOptions)]
    for name, value in given.items():
        if name in known:
            continue
        expected = f"it as {_NAMES_ELSEWHERE.get(name)}"
        if name in {field.name for field in fields(Sampling)}:
            expected = f"it in sampling=Sampling({name}={value!r:.60})"
        elif name not in _NAMES_ELSEWHERE:
            expected = f"one of the options {', '.join(known)}"
        raise TypeError(f"{name}: expected {expected}, got {name}={value!r:.60}")
    if "max_new_tokens" not in given:
        raise TypeError("max_new_tokens: expected a whole number of at least 1, got none")
    return GenerationOptions(**given)


# %% [markdown] tags=["engine"]
# Prompts are checked where they enter. An empty one asks for the first token after nothing,
# which no model of this book has learned; the message says what to begin with instead.


# %% tags=["engine"]
#| export
def _prompt_ids(
    model: TransformerLM, prompt: Any, options: GenerationOptions, argument: str
) -> list[int]:
    """Return the ids of a prompt; a ValueError says why there can be no text after it."""
    if isinstance(prompt, str):
        if options.tokenizer is None:
            raise ValueError(f"tokenizer: expected one, for text as {argument}, got None")
        prompt = options.tokenizer.encode(prompt)
    if not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) != 1:
        expected = "a text or a list of ids" + " for each" * (argument == "prompts")
        raise ValueError(f"{argument}: expected {expected}, got {prompt!r:.60}")
    ids, config = _as_ids(argument, prompt), model.config
    if not ids:
        expected = "at least one token to go on from, such as end of text"
        raise ValueError(f"{argument}: expected {expected}, got none")
    _check_vocabulary(argument, ids, config.vocab_size)
    room, why = config.context_length, f"context_length = {config.context_length}"
    if options.on_full == "error":
        room += 1 - options.max_new_tokens  # the last token need not be read
        why += f" and max_new_tokens = {options.max_new_tokens}"
    if len(ids) > room:
        raise ValueError(f"{argument}: expected at most {room} tokens, for {why}, got {len(ids)}")
    return ids


# %% [markdown] tags=["engine"]
# Model and options must fit together. Many models have a table that is longer than their
# vocabulary, padded to a multiple of 64 or more, and one day such an id will be drawn. No tokenizer
# can say what it means. So ids without a text are refused, unless `banned_tokens` excludes them.


# %% tags=["engine"]
#| export
def _check_model(model: object, argument: str = "model") -> None:
    if not isinstance(getattr(model, "_orig_mod", model), TransformerLM):  # if it was compiled
        raise ValueError(f"{argument}: expected a TransformerLM, got {model!r:.60}")


def _check_fit(model: TransformerLM, options: GenerationOptions) -> None:
    """Demand that ids of the options are the model's, and that each it may choose has a text."""
    vocab_size, banned = model.config.vocab_size, set(options.sampling.banned_tokens)
    _check_vocabulary("stop_tokens", options.stop_tokens, vocab_size)
    _check_vocabulary("banned_tokens", banned, vocab_size)
    never = banned.union(options.stop_tokens if options.min_new_tokens else ())
    if len(never) == vocab_size:
        raise ValueError("sampling: expected a token that is not banned, got none")
    if options.tokenizer is None:
        return
    unseen = sorted(set(range(vocab_size)) - banned - options.tokenizer.vocabulary.keys())
    nameless = [token for token in unseen if not _has_text(options.tokenizer, token)]
    if nameless:
        ids = f"range({nameless[0]}, {vocab_size})"
        if nameless != list(range(nameless[0], vocab_size)):
            ids = f"[{', '.join(map(str, nameless[:3]))}{', ...' * (len(nameless) > 3)}]"
        expected = f"a text for each of {vocab_size} tokens, or Sampling(banned_tokens={ids})"
        got = f"none for {len(nameless)} of them, such as {nameless[0]}"
        raise ValueError(f"tokenizer: expected {expected}, got {got}")


def _has_text(tokenizer: BPETokenizer, token: int) -> bool:
    """Whether a token that is none of the vocabulary is a special one."""
    try:
        tokenizer.decode_bytes([token])
    except ValueError:
        return False
    return True


# %% [markdown] tags=["engine"]
# Text arrives token by token. What may become a stop string waits, and so does a character of which
# some bytes are missing.


# %% tags=["engine"]
#| export
class _ArrivingText:
    """Text token by token, given out as soon as it is certain: whole, and before any stop."""

    def __init__(self, tokenizer: BPETokenizer, stop_strings: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, stop_strings
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held, self.stopped = "", False

    def add(self, token: int, may_stop: bool) -> str:
        """Return what can be shown now that ``token`` has come."""
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        if not may_stop:
            return self._release(len(self.held))
        places = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._release(min(places))
        begun = (n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n]))
        return self._release(len(self.held) - max(begun, default=0))

    def end(self) -> str:
        """Return what was held back, in case it became a stop, or a character."""
        self.held = "" if self.stopped else self.held + self.decoder.decode(b"", final=True)
        return self._release(len(self.held))

    def _release(self, n: int) -> str:
        shown, self.held = self.held[:n], self.held[n:]
        return shown


# %% [markdown] tags=["engine"]
# A row is a text on its way. The context counts what the model *reads*: the last token of a text
# need not be read, so that $T$ tokens of context allow texts of $T + 1$, as in training.


# %% tags=["engine"]
#| export
class _Row:
    """A text on its way: what the model sees of it, and what was added."""

    def __init__(
        self, number: int, prompt: list[int], context_length: int, options: GenerationOptions
    ):
        self.number, self.prompt, self.options = number, prompt, options
        self.seen, self.context_length, self.moved = list(prompt), context_length, False
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.reason: FinishReason | None = None
        stops, tokenizer = options.stop_strings, options.tokenizer
        self.text = None if tokenizer is None else _ArrivingText(tokenizer, stops)

    def take(self, token: int, log_prob: float) -> str:
        """Add a token, and return the text that can be shown; afterwards see whether to go on."""
        self.ids.append(token)
        self.seen.append(token)
        self.log_probs.append(log_prob)
        stopped, shown = token in self.options.stop_tokens, ""
        if self.text is not None:
            may_stop = len(self.ids) >= self.options.min_new_tokens
            shown = "" if stopped else self.text.add(token, may_stop)
            stopped |= self.text.stopped
        self.reason = "stop" if stopped else self._limit()
        if self.text is not None and self.reason:
            shown += self.text.end()
        return shown


# %% [markdown] tags=["engine"]
# Limits are looked at after each token. And before each: a model with NaN in its weights should not
# write on.


# %% tags=["engine"]
#| export
def _check_answer(logits: Tensor, n_new: int, argument: str = "model") -> None:
    """Demand logits from a model that has written ``n_new`` tokens."""
    if flaw := _flaw(logits):
        raise ValueError(f"{argument}: expected logits, got {flaw} after {n_new} new tokens")


class _Row(_Row):  # continued
    def _limit(self) -> FinishReason | None:
        """Say which limit the row has reached; if it may slide, let it forget the older half."""
        if len(self.ids) == self.options.max_new_tokens:
            return "length"
        if len(self.seen) > self.context_length:
            if self.options.on_full != "slide":
                return "context"
            self.seen, self.moved = self.seen[-max(1, self.context_length // 2) :], True
        return None

    def completion(self, shown: str) -> Completion:
        """Return what was added; ``shown`` is all of its text."""
        reason: FinishReason = self.reason or "length"
        text = None if self.text is None else shown
        return Completion(self.ids, text, reason, self.log_probs)


# %% [markdown]
# ## Reading each token once
#
# The cache of {doc}`09_attention` keeps keys and values, so that a step reads one new token in each
# row in place of the whole text: a story of $n$ tokens sends $n$ tokens through the layers, not
# $n(n+1)/2$. (Attention still looks back at every key.) The prompts are read at once, with padding
# in front; afterwards a **step** takes the newest token of each row. For a small model most of a
# step is the calling of functions; the room below makes the same numbers with fewer than half of
# the calls.


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


Step = Callable[[Tensor, KVCache], Tensor]


def _plain_step(model: TransformerLM) -> Step:
    """The next step by the model's own forward pass, with one new token in each row."""
    return lambda tokens, cache: model(tokens[:, None], cache=cache)[:, -1]


# %% [markdown] tags=["engine"]
# ### Engine room: a small model's step takes fewer, larger calls

# %% [markdown] tags=["engine"]
# How long should a step take? Our model has some 200,000 weights, and to multiply each by one
# number takes a processor some twenty microseconds. A step takes many times as long, as the last
# section measures. The rest goes into *calls*: each of PyTorch's operations costs a microsecond or
# two before it does anything. Let us count them.

# %% tags=["engine"]
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def calls_of(step: Step) -> int:
    cache = model.new_cache(1)
    step(torch.tensor([end]), cache)
    with Calls() as calls:
        step(torch.tensor([end]), cache)
    return calls.count


plain_calls = calls_of(_plain_step(model))
assert plain_calls > 150
print("calls in one step of the model:", plain_calls)

# %% [markdown] tags=["engine"]
# A large model does not care. A small one runs faster if the same numbers come from fewer calls,
# and algebra finds them. Matrices that read the same vector are put side by side: one product in
# place of three. RMSNorm multiplies by a gain $g$, and a matrix follows, so the gain moves into
# the matrix, once: $(n \odot g) W = n (\operatorname{diag}(g) W)$. And its root is a hypotenuse,
# for which there is a function:
#
# $$
# \frac{x}{\sqrt{|x|^2 / d + \varepsilon}}
# = \frac{\sqrt d \; x}{\operatorname{hypot}\!\big(|x|, \sqrt{d\,\varepsilon}\big)} ,
# $$
#
# three calls in place of seven, with the $\sqrt d$ moved into the matrix as well.


# %% tags=["engine"]
#| export
class _Linear:
    """Linear maps of the same vector, put side by side, behind the gain of a norm."""

    def __init__(self, *maps: nn.Linear, norm: nn.Module | None = None):
        weights: list[Tensor] = [m.weight for m in maps]
        biases: list[Tensor] = [m.bias for m in maps if m.bias is not None]
        weight = torch.cat(weights)
        if isinstance(norm, RMSNorm):
            weight = weight * (norm.weight * math.sqrt(len(norm.weight)))
        self.weight, self.bias = weight, torch.cat(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and len(x) == 1:  # see the next room
            out = (x[:, None] * self.weight).sum(dim=-1)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)

    def onto(self, stream: Tensor, x: Tensor) -> Tensor:
        """Add what the map makes of ``x`` to ``stream``."""
        if torch.compiler.is_compiling():
            return stream + self(x)
        stream = stream if self.bias is None else stream + self.bias
        return torch.addmm(stream, x, self.weight.t())


# %% [markdown] tags=["engine"]
# What is left of the norm divides by the length of its input:


# %% tags=["engine"]
#| export
def _normalizer(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return ``norm``; if it is RMSNorm, without the gain and the root of d: a map follows."""
    if not isinstance(norm, RMSNorm):
        return norm
    least = norm.weight.new_tensor(math.sqrt(len(norm.weight) * norm.eps))

    def normalized(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler has no vectors of hypotenuses
            return x * (x.square().sum(dim=-1, keepdim=True) + least.square()).rsqrt()
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), least)

    return normalized


# %% [markdown] tags=["engine"]
# Queries and keys are rotated in one call, since they lie side by side.


# %% tags=["engine"]
#| export
def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rope`` in three calls: both are doubled, the first half of ``sin`` has a minus."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


# %% [markdown] tags=["engine"]
# The block is that of {doc}`10_blocks`, for one token in each row. In its attention, heads that
# share keys and values are put together.


# %% tags=["engine"]
#| export
class _FusedBlock:
    """A block for one new token in each row, (batch, d_model), in few calls."""

    def __init__(self, block: Any):
        a, f = block.attention, block.feed_forward
        self.norms = [_normalizer(n) for n in (block.attention_norm, block.feed_forward_norm)]
        self.qk_norms, self.activation = (a.q_norm, a.k_norm), f.activation
        self.n_heads, self.n_kv_heads, self.d_head = a.n_heads, a.n_kv_heads, a.d_head
        self.gates = () if f.gate_proj is None else (f.gate_proj,)
        self.qkv = _Linear(a.q_proj, a.k_proj, a.v_proj, norm=block.attention_norm)
        self.up = _Linear(*self.gates, f.up_proj, norm=block.feed_forward_norm)
        self.o, self.down = _Linear(a.o_proj), _Linear(f.down_proj)

    def __call__(self, x: Tensor, rope: Any, mask: Tensor | None, cache: LayerCache) -> Tensor:
        x = self.o.onto(x, self.attend(self.norms[0](x), rope, mask, cache))
        up = self.up(self.norms[1](x))
        gate, up = up.chunk(2, dim=-1) if self.gates else (None, up)
        return self.down.onto(x, activate(self.activation, gate, up))

    def attend(self, x: Tensor, rope: Any, mask: Tensor | None, cache: LayerCache) -> Tensor:
        """Return what each row gathers, (batch, n_heads * d_head)."""
        heads, kv_heads = self.n_heads, self.n_kv_heads
        qkv = self.qkv(x).view(len(x), heads + 2 * kv_heads, self.d_head)
        qk, v = qkv.narrow(1, 0, heads + kv_heads), qkv.narrow(1, heads + kv_heads, kv_heads)
        if self.qk_norms[0] is not None:
            parts = zip(self.qk_norms, qk.split((heads, kv_heads), dim=1), strict=True)
            qk = torch.cat([norm(part) for norm, part in parts], dim=1)
        qk = qk if rope is None else _rotated(qk, *rope)
        k, v = cache.update_one(qk.narrow(1, heads, kv_heads), v)
        q = qk.narrow(1, 0, heads).unflatten(1, (kv_heads, -1))  # those that share keys together
        if not torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(q, k, v, mask).reshape(len(x), -1)
        scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(dim=-1) / math.sqrt(self.d_head)
        shares = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)  # type: ignore[operator]
        return (shares.unsqueeze(4) * v.unsqueeze(2)).sum(dim=3).reshape(len(x), -1)


# %% [markdown] tags=["engine"]
# The step around the blocks does what the model does around its own.


# %% tags=["engine"]
#| export
class _FusedStep:
    """The next step of a small model, where calling functions is most of the work."""

    def __init__(self, model: TransformerLM):
        self.model = model
        self.blocks = [_FusedBlock(block) for block in model.blocks]
        self.head = _Linear(model.lm_head, norm=model.norm)
        self.norm = _normalizer(model.norm)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        positions, mask = cache.next_positions(1), cache.extend(1)
        return self.logits(tokens, positions, mask, cache)

    def logits(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Return logits, (batch, vocab_size), and store keys and values in the layers' caches."""
        model = self.model
        x, rope = model.embedding(tokens), None
        if model.positions is not None:
            x = x + model.positions(positions)[:, 0]
        if model.rope is not None:
            cos, sin = model.rope(positions)  # (batch or 1, 1, half): the 1 is for all heads
            rope = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache[layer])
        return self.head(self.norm(x))


# %% [markdown] tags=["engine"]
# What cannot be fused takes the plain step: experts, post-norm, other layers than linear ones,
# types of 16 bits, and large models, for which the copies would cost more than the calls.
# A model that its owner has compiled has made its own choice: its step is the compiled forward
# pass, and because the cache then works with fixed shapes, it is compiled once and not for each
# token.

# %% tags=["engine"]
#| export
_SMALL = 20_000_000  # parameters


def _is_fusable(model: TransformerLM) -> bool:
    config, kinds = model.config, {type(m) for m in model.modules() if hasattr(m, "in_features")}
    plain = config.norm_position == "post" or config.n_experts or kinds != {nn.Linear}
    plain |= config.layout != "half" or config.d_rope != config.d_head
    floats = {parameter.dtype for parameter in model.parameters()}
    return not plain and floats in ({torch.float32}, {torch.float64}) and not _is_compiled(model)


def _next_step(model: TransformerLM) -> Step:
    """Return the fastest step that there is for a model, without a compiler."""
    fused = _is_fusable(model) and count_parameters(model) <= _SMALL
    return _FusedStep(model) if fused else _plain_step(model)


def _is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``model.compile`` was called with the model, or a part of it."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules())


# %% [markdown] tags=["engine"]
# Did it help?

# %% tags=["engine"]
fused_calls = calls_of(_FusedStep(model))
assert 2 * fused_calls < plain_calls
print(f"{fused_calls} calls in place of {plain_calls}")

# %% [markdown]
# ### Fewer calls still
#
# The fused step is as far as one gets by hand. A compiler goes further: it sees the operations of a
# whole step, and makes single loops of those that only pass a vector on. The shapes must not change
# from token to token, so the compiled step computes with the whole cache and masks what is not
# there yet. `generate(..., compile=True)` uses it and gives the same tokens. The first call takes
# ten to forty seconds, and a C++ compiler must be there, so it is for long texts and many calls;
# `compile="auto"` uses it where it can, and the fused step elsewhere.

# %% [markdown] tags=["engine"]
# ### Engine room: a compiler makes a few kernels of the step

# %% [markdown] tags=["engine"]
# What is left is still calls: each writes its few numbers to memory, and the next fetches them
# again. `torch.compile` reads the step once, draws the graph of its operations, and writes a C++
# program in which neighbors share a loop: a norm, the gain behind it and the sum before it become
# one **kernel**, and nothing between them is stored. It does so only for a graph that stays. Three
# things in a step change with each token: how many keys there are, where the new one goes, and what
# the mask hides. So the compiled step always looks at all slots of the cache, and learns the
# position from a tensor, a number in memory that any program can read, and not from Python, whose
# numbers would be built into it. Then one graph does for every token.


# %% tags=["engine"]
#| export
class _WholeLayer:
    """A layer's cache in compiled code: all of its slots, and where the new token goes."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor):
        self.keys, self.values, self.positions = keys, values, positions

    def update_one(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a token of each row, and return all slots."""
        rows = torch.arange(len(k), device=k.device)
        self.keys[rows, :, self.positions[:, 0]] = k
        self.values[rows, :, self.positions[:, 0]] = v
        return self.keys, self.values


# %% [markdown] tags=["engine"]
# The choice is a good part of a small model's step: a nucleus by the library takes as long as the
# model. Where only the logits, a temperature and a nucleus decide, it goes into the program, too.
# The most likely token is the first that equals the maximum, which is faster than to carry an index
# through the loop. The nucleus needs its border, the largest $b$ for which the tokens with
# $p \ge b$ have the mass that is wanted. To sort for it takes a call. But positive floats have the
# order of their bits read as whole numbers ({doc}`15_precision` shows why), and those up to 1 are
# fewer than $2^{30}$: three marks cut what is left of them into quarters, and after 15 rounds of
# sums, each a loop of the program, one number is left.


# %% tags=["engine"]
#| export
def _best_token(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most likely tokens, their log-probabilities, and their logits."""
    best, n = logits.amax(dim=-1, keepdim=True), logits.size(-1)
    numbers = torch.arange(n, dtype=torch.int32, device=logits.device)
    tokens = torch.where(logits == best, numbers, n).amin(dim=-1)
    return tokens.long(), -(logits - best).exp().sum(dim=-1).log(), best[:, 0]


def _border(shares: Tensor, mass: Tensor) -> Tensor:
    """Return the largest share such that all from it on have the ``mass``, (batch, 1)."""
    low = torch.zeros_like(shares[:, :1], dtype=torch.int32)
    marks = torch.arange(1, 4, dtype=torch.int32, device=shares.device)
    for size in (4**n for n in reversed(range(15))):
        candidates = (low + size * marks).view(torch.float32)[:, :, None]
        sums = torch.where(shares[:, None] >= candidates, shares[:, None], 0.0).sum(dim=-1)
        low = low + size * (sums >= mass).sum(dim=-1, keepdim=True, dtype=torch.int32)
    return low.view(torch.float32)


# %% [markdown] tags=["engine"]
# Of tokens that are tied at the border, so many leave, the first ones, as the mass can spare. Then
# a token is drawn as everywhere: the place of a random number among the running sums.


# %% tags=["engine"]
#| export
def _token_of_nucleus(
    logits: Tensor, uniforms: Tensor, temperature: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from the nucleus, with ``uniforms``; return as ``_best_token``, with the best logits."""
    best = logits.amax(dim=-1, keepdim=True)
    shares = ((logits - best) / temperature).softmax(dim=-1)
    border = _border(shares, mass)
    shares = torch.where(shares >= border, shares, 0.0)
    tied = shares == border
    spare = (shares.sum(dim=-1, keepdim=True) - mass) / border
    shares = torch.where(tied & (tied.cumsum(dim=-1) <= spare), 0.0, shares)
    ends = shares.cumsum(dim=-1, dtype=torch.float64)
    tokens = (ends <= uniforms[:, None] * ends[:, -1:]).sum(dim=-1, keepdim=True)
    return tokens[:, 0], logits.log_softmax(dim=-1).gather(1, tokens)[:, 0], best[:, 0]


# %% [markdown] tags=["engine"]
# So there are three programs: one returns logits, two return tokens.


# %% tags=["engine"]
#| export
def _whole_step(
    step: _FusedStep,
    tokens: Tensor,
    positions: Tensor,
    layers: list[_WholeLayer],
    choice: tuple[Tensor, ...] | None,
) -> Any:
    """The fused step in shapes that do not depend on how much has been read, and the choice."""
    slots = torch.arange(layers[0].keys.size(2), device=tokens.device)
    mask = (slots <= positions)[:, None, None]
    logits = step.logits(tokens, positions, mask, layers)
    if choice is None:
        return logits
    return _token_of_nucleus(logits, *choice) if choice else _best_token(logits)


# %% [markdown] tags=["engine"]
# Inside, the step is the fused one, but for what a compiler does better. Attention is written out,
# as products and sums that melt into the loops around them, where PyTorch's kernel would be a call.
# The same goes for a matrix times a single vector. With more rows it is worth a call, because
# libraries know how to keep pieces of a matrix in the processor's registers.
#
# A cache is prepared once; afterwards only the position moves on. Compiling takes ten to forty
# seconds, so what was compiled is kept, under what its shapes depend on. Weights are an input: they
# may change, and another model of the same kind needs no compiling.
# (PyTorch counts how often a function was compiled, and refuses the ninth time. So each program
# has a copy of the function. And before each call PyTorch would compare some hundred attributes
# with those that it saw while compiling, its *guards*, which takes longer than the arithmetic. All
# that the program depends on is in the key by which we find it, so we switch them off.)


# %% tags=["engine"]
#| export
@remember
def _compiled_step(*shapes: object) -> Callable[..., Any]:
    """Return ``_whole_step``, to be compiled once for these shapes."""
    step = unwrap(_whole_step)  # out of what checks shapes, if anything does
    own = FunctionType(step.__code__.replace(), step.__globals__)
    unguarded = getattr(torch.compiler, "skip_all_guards_unsafe", None)  # since PyTorch 2.8
    options: dict[str, Any] = {"size_asserts": False}
    if unguarded is not None:
        options["guard_filter_fn"] = unguarded
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


# %% tags=["engine"]
#| export
class _CompiledStep:
    """The fused step as a program of a few kernels, for one cache at a time."""

    def __init__(self, model: TransformerLM):
        self.fused, self.kind = _FusedStep(model), repr(model.config)
        self.cache: KVCache | None = None

    def __call__(
        self, tokens: Tensor, cache: KVCache, choice: tuple[Tensor, ...] | None = None
    ) -> Any:
        """Return logits; or, with what a ``choice`` needs, what ``_best_token`` returns."""
        if cache is self.cache:
            self.positions += 1
        else:
            self._prepare(cache, len(tokens))
        cache.extend(1)  # counts the token, and sees to it that there is room
        program = _compiled_step(None if choice is None else len(choice), *self.shapes)
        return program(self.fused, tokens, self.positions, self.layers, choice)

    def _prepare(self, cache: KVCache, batch: int) -> None:
        self.cache = cache
        self.positions = cache.next_positions(1).expand(batch, 1).contiguous()
        parts = [cache[layer] for layer in range(len(self.fused.blocks))]
        self.layers = [_WholeLayer(part.keys, part.values, self.positions) for part in parts]
        keys = parts[0].keys
        self.shapes = self.kind, keys.shape, keys.dtype, keys.device


# %% [markdown] tags=["engine"]
# Some steps cannot be compiled like this, and some machines have no compiler.


# %% tags=["engine"]
#| export
def _no_compiling(model: TransformerLM) -> str | None:
    """Say what is needed to compile the step of a model, if it is not there."""
    if not _is_fusable(model):
        return "False for a model with experts, post-norm, 16 bits, or compiled or quantized parts"
    if model.config.sliding_window is not None:
        return "False for a model with a sliding window"
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or usual
    if model.embedding.weight.device.type != "cuda" and shutil.which(compiler) is None:
        return f"False without a C++ compiler, {compiler}"
    return None


def _may_compile(model: TransformerLM, compile: object, use_cache: bool) -> bool:
    """Return whether to compile the step; a ValueError says why it cannot be, if it must."""
    if not isinstance(compile, bool) and compile != "auto":
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r:.60}")
    wanting = _no_compiling(model) if use_cache else "False with use_cache=False"
    if compile is True and wanting is not None:
        raise ValueError(f"compile: expected {wanting}, got True")
    return compile is not False and wanting is None


# %% [markdown]
# ### The loop
#
# Three objects share the work. A *row* is one text on its way. The *reader* holds the cache and
# gives the logits after each text; without a cache, and after a row has slid, it reads everything
# anew. The *chooser* draws, with each row's own random numbers and, for penalties, its own counts;
# it also returns the log-probability that the model itself gave, since reinforcement learning will
# ask for it. With them the loop is short: read, then choose, and go on until all rows have ended.
#
# Rows that have ended leave the batch. Each departure costs a copy of the cache, so they leave
# when half have ended, or when one can be read no further. (A step compiled for so many rows keeps
# them all until one is full.)


# %%
#| export
def _decode(
    model: TransformerLM,
    rows: list[_Row],
    options: GenerationOptions,
    kept: "TextCache | None",
    compiled: bool,
) -> Iterator[list[tuple[_Row, str]]]:
    """Add tokens to the rows until all have finished; yield each step's rows and new text."""
    most = max(len(row.seen) for row in rows) + options.max_new_tokens - 1
    reader = _Reader(model, most, options.use_cache, kept, compiled)
    chooser = _Chooser(model, rows, options)
    tokens, log_probs = chooser.choose(reader.read([row.seen for row in rows]), 0)
    for step in count(1):
        chosen = zip(rows, tokens.tolist(), log_probs.tolist(), strict=True)
        yield [(row, row.take(token, p)) for row, token, p in chosen if row.reason is None]
        going = [number for number, row in enumerate(rows) if row.reason is None]
        if not going:
            return
        few = 2 * len(going) <= len(rows) and not reader.compiled
        if len(going) < len(rows) and (few or reader.is_full()):
            left = torch.tensor(going, device=tokens.device)
            rows, tokens = [rows[number] for number in going], tokens[left]
            chooser.keep(going)
            reader.keep(left)
        tokens, log_probs = reader.next_tokens(rows, tokens, chooser, step)


# %% [markdown]
# Since no row depends on another, `generate` may sort prompts by length before it cuts them into
# batches: less padding, the same texts. `_options` checks the options, `_rows` the prompts, and
# `_evaluating` switches dropout and gradients off; the last two are in the room below, as is
# `TextCache`, which lets the next call go on from what this one has read.


# %%
#| export
def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    *,
    batch_size: int = 64,
    first_row: int = 0,
    cache: "TextCache | None" = None,
    compile: bool | Literal["auto"] = False,
    **options: Any,
) -> list[Completion]:
    """Return a completion of each prompt, at most ``batch_size`` at a time.

    ``options`` are those of ``GenerationOptions``: ``max_new_tokens``, which must be given,
    ``min_new_tokens``, ``sampling``, ``tokenizer``, ``stop_tokens``, ``stop_strings``, ``seed``,
    ``use_cache`` and ``on_full``. A row depends on its prompt, the seed and its number only, up to
    the rounding of logits; rows are numbered from ``first_row``. A ``cache`` is for a single prompt
    and saves reading again what it has read. ``compile``: True makes a program of the step for one
    token, which takes up to 40 seconds for each number of rows and each power of two of tokens,
    and serves all later calls; "auto" does so where it can, which needs a C++ compiler. Bad prompts
    and options raise a ``ValueError``.
    """
    _check_count("batch_size", batch_size, 1)
    _check_count("first_row", first_row, 0)
    checked = _options(options)
    rows = _rows(model, prompts, checked, first_row=first_row)
    _check_cache(cache, model, rows, checked)
    compiled = _may_compile(model, compile, checked.use_cache)
    shown: dict[int, list[str]] = {row.number: [] for row in rows}
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    with _evaluating(model):
        for at in range(0, len(rows), batch_size):
            batch = by_length[at : at + batch_size]
            for step in _decode(model, batch, checked, cache, compiled):
                for row, piece in step:
                    shown[row.number].append(piece)
    return [row.completion("".join(shown[row.number])) for row in rows]


# %% [markdown] tags=["engine"]
# ### Engine room: the reader, the chooser, a cache to keep, and `stream` for one row

# %% [markdown] tags=["engine"]
# The reader has a cache, or none, or one that was handed in.


# %% tags=["engine"]
#| export
class _Reader:
    """Gives the logits after each of several texts: from a cache, or read from the start."""

    def __init__(
        self,
        model: TransformerLM,
        capacity: int,
        use_cache: bool,
        kept: "TextCache | None" = None,
        compiled: bool = False,
    ):
        self.model, self.use_cache, self.kept, self.compiled = model, use_cache, kept, compiled
        if compiled or _is_compiled(model):  # few shapes, since each of them is compiled
            capacity = max(128, 1 << (capacity - 1).bit_length())
        self.capacity = min(capacity, model.config.context_length)
        self.cache: KVCache | None = None

    @cached_property
    def step(self) -> Step:  # made when it is needed: fusing copies the weights
        return _CompiledStep(self.model) if self.compiled else _next_step(self.model)

    def read(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab_size"]:
        """Read the texts, whatever was read before; into the cache that is kept, what is new."""
        if self.kept is not None:
            self.cache, texts = self.kept.cache, [self.kept.unread(texts[0])]
        elif self.use_cache:
            self.cache = self.model.new_cache(len(texts), self.capacity)
        ids, positions = _padded(texts, self.model.embedding.weight.device)
        hidden = self.model.hidden_states(ids, position_ids=positions, cache=self.cache)
        if self.kept is not None:
            self.kept.ids.extend(texts[0])
        return self.model.lm_head(hidden[:, -1])

    def go_on(self, rows: Sequence[_Row], tokens: Tensor) -> Float[Tensor, "batch vocab_size"]:
        """Read the token that each row has got."""
        if self._can_step(rows):
            return self._step(tokens)
        for row in rows:
            row.moved = False
        return self.read([row.seen for row in rows])

    def next_tokens(
        self, rows: Sequence[_Row], tokens: Tensor, chooser: "_Chooser", step: int
    ) -> tuple[Tensor, Tensor]:
        """Read the token that each row has got; return the next ones and log-probabilities."""
        choice = chooser.for_program(step) if self.compiled and self._can_step(rows) else None
        if choice is None:
            return chooser.choose(self.go_on(rows, tokens), step)
        tokens, log_probs, best = self._step(tokens, choice)
        _check_answer(best[:, None], step)
        return tokens, log_probs


# %% tags=["engine"]
#| export
class _Reader(_Reader):  # continued
    def _can_step(self, rows: Sequence[_Row]) -> bool:
        return self.cache is not None and not any(row.moved for row in rows)

    def _step(self, tokens: Tensor, *choice: Any) -> Any:
        assert self.cache is not None  # _can_step sees to it
        answer = self.step(tokens, self.cache, *choice)
        if self.kept is not None:
            self.kept.ids.extend(tokens.tolist())
        return answer

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these; the fewer that are left are not worth compiling anew."""
        if self.cache is not None:
            self.cache.reorder(rows)
        if self.compiled:
            self.compiled, self.step = False, _next_step(self.model)

    def is_full(self) -> bool:
        """Whether a row cannot be read on as it is; without a cache none ever is."""
        return self.cache is None or int(self.cache.lengths.max()) >= self.capacity


# %% [markdown] tags=["engine"]
# The chooser makes a table of random numbers for many steps at a time, which is faster than one
# step after the other.


# %% tags=["engine"]
#| export
class _Chooser:
    """Chooses the tokens of a batch of rows, each with its own history and random numbers."""

    def __init__(self, model: TransformerLM, rows: Sequence[_Row], options: GenerationOptions):
        self.options, self.sampling, self.rows = options, options.sampling, list(rows)
        self.counts: Tensor | None = None
        self.uniforms = np.empty((len(rows), 0))
        device, vocab_size = model.embedding.weight.device, model.config.vocab_size
        if self.sampling.has_penalties:
            prompts = (torch.tensor([row.prompt], device=device) for row in rows)
            self.counts = torch.cat([_token_counts(prompt, vocab_size) for prompt in prompts])
        rest = replace(self.sampling, temperature=1.0, top_p=None)
        self.is_simple = rest == _PLAIN and model.embedding.weight.dtype == torch.float32
        temperature = max(self.sampling.temperature, torch.finfo(torch.float32).tiny)
        mass = 2.0 if self.sampling.top_p is None else self.sampling.top_p  # 2: keep all
        self.numbers = torch.tensor([temperature, mass], device=device).unbind()

    def choose(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of this step, and their log-probabilities in the model."""
        _check_answer(logits, step)
        uniforms = self._uniforms(step) if self.sampling.temperature > 0 else None
        allowed = self._allowed(logits, step)
        tokens = _choose(allowed, self.sampling, self.counts, uniforms)[:, None]
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens, torch.ones_like(tokens))
        log_probs = _wide(logits).log_softmax(dim=-1).gather(1, tokens)
        return tokens[:, 0], log_probs[:, 0]

    def for_program(self, step: int) -> tuple[Tensor, ...] | None:
        """Return what a compiled step chooses with, if only the temperature and top-p matter."""
        stops = self.options.stop_tokens if step < self.options.min_new_tokens else ()
        if stops or not self.is_simple:
            return None
        if self.sampling.temperature == 0:
            return ()
        return self._uniforms(step).to(self.numbers[0].device), *self.numbers

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.counts = None if self.counts is None else self.counts[rows]
        self.rows, self.uniforms = [self.rows[row] for row in rows], self.uniforms[rows]

    def _allowed(self, logits: Tensor, step: int) -> Tensor:
        stops = self.options.stop_tokens if step < self.options.min_new_tokens else ()
        texts = [row.prompt + row.ids for row in self.rows] if self.sampling.needs_history else []
        allowed = _allowed(logits, self.sampling, texts, tuple(stops))
        if allowed is not logits:
            _check_any_left(allowed)
        return allowed

    def _uniforms(self, step: int) -> Tensor:
        place, seed = step % 256, self.options.seed
        if place == 0:  # a table of so many steps, however many may follow
            tables = [uniforms_of(seed, row.number, 256, step) for row in self.rows]
            self.uniforms = np.stack(tables)
        return torch.from_numpy(np.ascontiguousarray(self.uniforms[:, place]))


# %% [markdown] tags=["engine"]
# Two helpers: dropout and gradients are off while the model works, and only then; and every way to
# generate makes its rows by one function.


# %% tags=["engine"]
#| export
@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off, and afterwards back to what they were."""
    training = [part for model in models for part in model.modules() if part.training]
    for part in training:
        part.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for part in training:
            part.training = True


# %% tags=["engine"]
#| export
def _rows(
    model: TransformerLM,
    prompts: Any,
    options: GenerationOptions,
    argument: str = "prompts",
    first_row: int = 0,
) -> list[_Row]:
    """Return a row for each prompt, numbered from ``first_row``."""
    _check_model(model)
    if isinstance(prompts, str):
        raise ValueError(f"prompts: expected a list of prompts, got one text, {prompts!r}")
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts: expected a list of prompts, got {prompts!r:.60}")
    texts = [_prompt_ids(model, prompt, options, argument) for prompt in prompts]
    if not texts:
        raise ValueError("prompts: expected at least one, got none")
    _check_fit(model, options)
    length = model.config.context_length
    return [_Row(number, text, length, options) for number, text in enumerate(texts, first_row)]


# %% [markdown] tags=["engine"]
# In a conversation each prompt is the one before, its answer, and something new. All but the new
# was read already, so a cache may be handed from call to call. A cache knows how many tokens it
# has, but not which, and a prompt that differs in its tenth token would go on from a text that
# nobody wrote. So a `TextCache` keeps the ids as well: what still agrees stays, the rest is
# forgotten.


# %% tags=["engine"]
#| export
class TextCache:
    """What a model has read of one text, so that the next call need not read it again.

    Hand it to ``generate``, with a single prompt, or to ``stream``: of the prompt they read what
    ``ids``, the tokens read so far, do not begin with; afterwards it has read the prompt and the
    completion but for its last token. It belongs to the weights as they are: once they have
    changed, make a new one. ``capacity`` counts tokens, by default those of the context.
    """

    def __init__(self, model: TransformerLM, capacity: int | None = None):
        _check_model(model)
        check_at_least(capacity=(1, capacity))
        self.model, self.cache = model, model.new_cache(1, capacity)
        self.ids: list[int] = []

    def unread(self, text: Sequence[int]) -> list[int]:
        """Forget what differs from ``text``; return what is left to read, at least its last id."""
        wanted = _as_ids("text", text)
        pairs = zip(self.ids, wanted[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        try:
            self.cache.truncate(same)
        except ValueError:  # a sliding window has lost what stands before
            self.cache.reset()
            same = 0
        self.ids = self.ids[:same]
        return wanted[same:]


# %% tags=["engine"]
#| export
def _check_cache(
    cache: object, model: TransformerLM, rows: Sequence[_Row], options: GenerationOptions
) -> None:
    """Demand a cache of this model, with room for the only row; or none."""
    if cache is None:
        return
    if not isinstance(cache, TextCache):
        raise ValueError(f"cache: expected a TextCache, got {cache!r:.60}")
    if cache.model is not model:
        raise ValueError(f"cache: expected one of this model, got one of {cache.model!r:.60}")
    if len(rows) != 1:
        raise ValueError(f"cache: expected a single prompt with it, got {len(rows)}")
    if not options.use_cache:
        raise ValueError("use_cache: expected True with a cache, got False")
    most = len(rows[0].prompt) + options.max_new_tokens - 1
    needed = min(most, model.config.context_length)
    if cache.cache.capacity < needed:
        got = cache.cache.capacity
        raise ValueError(f"cache: expected a capacity of at least {needed} tokens, got {got}")


# %% [markdown] tags=["engine"]
# A story is told, and its teller asked for another.

# %% tags=["engine"]
remembered = TextCache(model)
first = generate(model, [prompt], max_new_tokens=20, cache=remembered)[0].ids
asked = [*prompt, *first, end]
print(f"read: {len(remembered.ids)} tokens; of the next prompt, {len(asked)} tokens", end=", ")
print(f"{len(asked) - len(remembered.ids)} are left to read")
again = generate(model, [asked], max_new_tokens=20, cache=remembered)[0].ids
assert again == generate(model, [asked], max_new_tokens=20)[0].ids

# %% [markdown] tags=["engine"]
# `stream` is the same loop with one row, which gives each token when it comes.


# %% tags=["engine"]
#| export
class Piece(NamedTuple):
    """One token of a stream: the text that can be shown with it, and at the end why it ended."""

    id: int
    text: str
    log_prob: float
    finish_reason: FinishReason | None


def stream(
    model: TransformerLM,
    prompt: str | Sequence[int],
    *,
    cache: TextCache | None = None,
    compile: bool | Literal["auto"] = False,
    **options: Any,
) -> Iterator[Piece]:
    """Yield the tokens of ``generate(model, [prompt], **options)`` as they are chosen.

    Their texts are whole characters, and joined are the completion's text: what may become a stop
    string is held back. ``cache`` and ``compile`` are as there. A bad argument raises its
    ValueError here, not at the first token.
    """
    checked = _options(options)
    (row,) = _rows(model, [prompt], checked, "prompt")
    _check_cache(cache, model, [row], checked)
    compiled = _may_compile(model, compile, checked.use_cache)
    return _pieces(model, row, _decode(model, [row], checked, cache, compiled))


# %% tags=["engine"]
#| export
# The pieces of a text, while it grows
def _pieces(
    model: TransformerLM, row: _Row, steps: Iterator[list[tuple[_Row, str]]]
) -> Iterator[Piece]:
    while row.reason is None:
        with _evaluating(model):  # not while the caller has the piece
            ((_, text),) = next(steps)
        yield Piece(row.ids[-1], text, row.log_probs[-1], row.reason)


# %% [markdown]
# ### One text, however it is asked for
#
# Everything promised above can be checked at once: with and without a cache, together and alone,
# whole and by `stream`, which gives each token of one text as soon as it is chosen, the texts are
# the same.

# %%
options = {"tokenizer": tokenizer, "stop_tokens": [end], "max_new_tokens": 127}
prompts = [[end], prompt, prompt[:20], prompt[:9], [end]]
together = generate(model, prompts, **options)
uncached = generate(model, prompts, use_cache=False, **options)
alone = [generate(model, [one], first_row=i, **options)[0] for i, one in enumerate(prompts)]
for how, texts in (("without a cache", uncached), ("each alone", alone)):
    same = sum(one.ids == other.ids for one, other in zip(together, texts, strict=True))
    print(f"{how}: {same} of {len(prompts)} texts are the same")
    assert same == len(prompts)
streamed = "".join(piece.text for piece in stream(model, prompts[0], **options))
assert streamed == together[0].text and together[0].ids != together[4].ids
print("two rows with one prompt:", len({together[0].text, together[4].text}), "different texts")
cut = generate(model, prompts[:1], **(options | {"stop_strings": ["y was", "day,"]}))[0]
assert "y was" not in cut.text and "day," not in cut.text
print(f"cut off before the stop string, with finish_reason {cut.finish_reason!r}")

# %% [markdown]
# "The same" has a limit in principle. A matrix product of one row may round otherwise than that
# of thirty-two, and where two tokens are equally likely to seven digits, or $u$ falls that close
# to the end of a piece, the choice may differ.
#
# ## Hot stories
#
# The tiny world can judge what no benchmark of real text can: whether a story keeps to the facts.
# We let the model tell 192 stories at each of five temperatures, with two filters and without. A
# trained model is not quite the same on every processor, so we print a range in which each result
# must lie, and note what it was here for a list in the last section.


# %%
noted = {}


def within(what: str, value: float, low: float, high: float, form: str = ".0%") -> None:
    assert low <= value <= high, f"{what}: {value}"
    noted[what] = f"{value:{form}}"
    print(f"{what}: between {low:{form}} and {high:{form}}")


def consistent(sampling: Sampling, n: int = 192) -> float:
    stories = generate(model, [[end]] * n, sampling=sampling, batch_size=n, **options)
    return sum(world.judge(story.text).consistent for story in stories) / n


temperatures = [0.3, 0.7, 1.0, 1.5, 2.0]
filters = {"no filter": {}, "top-p 0.9": {"top_p": 0.9}, "min-p 0.1": {"min_p": 0.1}}
shares = {
    name: [consistent(Sampling(temperature=t, **kept)) for t in temperatures]
    for name, kept in filters.items()
}
within("consistent at temperature 1", shares["no filter"][2], 0.35, 0.8)
within("consistent at 2, without a filter", shares["no filter"][4], 0, 0.05)
within("consistent at 2, with min-p", shares["min-p 0.1"][4], 0.25, 0.75)

# %% [markdown]
# In {numref}`fig-generation-heat`, with the filters and temperatures between:

# %% mystnb={"figure": {"caption": "The share of stories that are whole and true, with two standard errors. Heat ruins them when nothing is cut; top-p helps until the tail has too much mass; min-p, whose bar does not depend on that mass, helps even at 2. Cold does not cure them.", "name": "fig-generation-heat"}, "image": {"alt": "Share of consistent stories against temperature from 0.3 to 2. Without a filter it falls from about 0.8 to 0.6 at 1, to about 0.1 at 1.5 and to zero at 2. With top-p 0.9 it is above 0.7 up to 1, above one half at 1.5 and nearly zero at 2. With min-p 0.1 it is above 0.7 up to 1 and still nearly one half at 2."}}
figure, ax = plt.subplots()
for name, share in shares.items():
    errors = [2 * math.sqrt(max(s * (1 - s), 0.005) / 192) for s in share]
    ax.errorbar(temperatures, share, errors, marker="o", capsize=3, label=name)
ax.set(xlabel="temperature", ylabel="consistent stories", ylim=(0, 1))
ax.set_title("Heat breaks stories; min-p saves about half of them")
ax.legend()
plt.show()

# %% [markdown]
# Why does cold not cure them all? The judge lists the claims of a story up to where it breaks, that
# is, where it is no story of this world. What stands there? We count a fact as told before if the
# last word of its sentence has occurred.

# %%
cold = generate(model, [[end]] * 192, sampling=Sampling(temperature=0.3), **options)
verdicts = [world.judge(story.text) for story in cold]
claims = [true for verdict in verdicts for _, true in verdict.claims]
wrong = sum(not verdict.consistent for verdict in verdicts)
breaks = [(one.text, v.error_at) for one, v in zip(cold, verdicts, strict=True)]
broken = [(text[:at], text[at:]) for text, at in breaks if at is not None]
again = sum(rest.split(".")[0].split(" ")[-1] in told for told, rest in broken)
within("claims that are false", claims.count(False) / len(claims), 0, 0.01)
within("stories that broke off, of those that are wrong", len(broken) / wrong, 0.8, 1)
within("broke off at a fact told before, of these", again / len(broken), 0.8, 1)

# %% [markdown]
# One that is whole, and one that is not, with a bar where it breaks:

# %% tags=["nbval-ignore-output"]
print(next(one.text for one, v in zip(cold, verdicts, strict=True) if v.consistent))
print("|".join(broken[0]))

# %% [markdown]
# The facts are right. What breaks is the form: in the tiny world no fact is told twice, so the
# model must look back at which it has told, and it has not quite learned to. That is an error of
# the model more than a slip of the dice, and no temperature removes it.
#
# ## The most likely text
#
# Greedy takes the best token, not the best text: a less likely word may open a far more likely
# sentence. A {term}`beam search` keeps the $b$ best beginnings, extends each by every token, and
# keeps the $b$ best of those ({numref}`fig-generation-beams`).
#
# ```{figure} ../figures/generation-beams.svg
# :name: fig-generation-beams
# :alt: A tree with two beams. The has 0.5, a has 0.4; both are kept. A fox has 0.36 and the cat 0.20 and are kept, the dog with 0.15 and a hen with 0.04 are dropped. After three steps a fox ran has 0.29 and the cat sat 0.10.
#
# Two beams. Greedy would have ended on the upper branch.
# ```
#
# Each token multiplies by a probability below one, so long texts lose against short ones. The
# sum of $n$ log-probabilities is therefore divided by $n^\alpha$, a length penalty that is simpler
# than the first of this kind, $((5 + n)/6)^\alpha$ {cite}`wu2016google`. With $\alpha = 0$
# likelihoods are compared, with $\alpha = 1$ means per token.


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
    scores = log_probs.new_tensor([beam.score for beam in beams])
    best = (scores[:, None] + log_probs).flatten().topk(min(n, log_probs.numel()))
    found = []
    for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        if score == -math.inf:  # forbidden
            break
        number, token = divmod(place, log_probs.size(1))
        _, ids, history = beams[number]
        history = [*history, log_probs[number, token].item()]
        found.append((number, _Beam(score, [*ids, token], history)))
    return found


# %% [markdown]
# A beam that ends is set aside. The search is over when $b$ have ended and the best that has not
# could no longer overtake them: its sum can only fall, and dividing by the largest possible
# $n^\alpha$ is the best that can happen to it. The cache follows its beams by `reorder`.


# %%
#| export
def _search(
    reader: _Reader, row: _Row, most: int, n_beams: int, alpha: int | float
) -> list[tuple[float, _Beam]]:
    """Return the best finished beams with their scores, best first."""
    beams, logits = [_Beam(0.0, [], [])], reader.read([row.prompt])
    finished: list[tuple[float, _Beam]] = []
    # Enough for n_beams to go on, even if as many end with each of the stop tokens.
    wanted = n_beams * max(2, 1 + len(row.options.stop_tokens))
    for length in range(1, most + 1):
        going: list[tuple[int, _Beam]] = []
        _check_answer(logits, length - 1)
        log_probs = _allowed_for_beams(_wide(logits).log_softmax(dim=-1), row, beams)
        for rank, (number, beam) in enumerate(_extended(beams, log_probs, wanted)):
            ended = length == most or beam.ids[-1] in row.options.stop_tokens
            if ended and rank < n_beams:
                finished.append((beam.score / length**alpha, beam))
            elif not ended and len(going) < n_beams:
                going.append((number, beam))
        finished = sorted(finished, key=lambda one: -one[0])[:n_beams]
        hope = max(length**alpha, most**alpha)
        full = len(finished) == n_beams
        if not going or (full and going[0][1].score / hope <= finished[-1][0]):
            break
        beams = [beam for _, beam in going]
        if reader.cache is not None:
            reader.cache.reorder(torch.tensor([number for number, _ in going]))
        logits = reader.go_on([], torch.tensor([beam.ids[-1] for beam in beams]))
    return finished


# %% [markdown] tags=["engine"]
# ### Engine room: `beam_search` checks its arguments and makes completions of beams

# %% [markdown] tags=["engine"]
# The public function gives the same completions as `generate`.


# %% tags=["engine"]
#| export
def beam_search(
    model: TransformerLM,
    prompt: str | Sequence[int],
    *,
    n_beams: int = 4,
    length_penalty: int | float = 1.0,
    **options: Any,
) -> list[Completion]:
    """Return at most ``n_beams`` completions, best first, found by keeping ``n_beams`` at a time.

    A completion of n tokens scores the sum of its ``log_probs`` divided by n ** ``length_penalty``,
    as in transformers with ``early_stopping="never"``. Of ``GenerationOptions`` it takes
    ``max_new_tokens``, ``min_new_tokens``, ``tokenizer``, ``stop_tokens``, ``on_full``, except
    "slide", and what is forbidden by ``sampling``; nothing is left to chance, so that a ``seed``
    changes nothing.
    """
    _check_count("n_beams", n_beams, 1)
    _check_number("length_penalty", length_penalty, "a number")
    checked = _options(options)
    _check_for_beams(checked)
    (row,) = _rows(model, [prompt], checked, "prompt")
    most = min(checked.max_new_tokens, row.context_length + 1 - len(row.prompt))
    with _evaluating(model):
        reader = _Reader(model, len(row.prompt) + most, use_cache=True)
        found = _search(reader, row, most, n_beams, length_penalty)
    if not found:
        raise ValueError("sampling: expected a token that is neither banned nor a repetition")
    return [_of_beam(beam, row) for _, beam in found]


# %% [markdown] tags=["engine"]
# Nothing is drawn and nothing streamed, so some options have no meaning here.


# %% tags=["engine"]
#| export
def _check_for_beams(options: GenerationOptions) -> None:
    check_choice("on_full", options.on_full, ("stop", "error"))
    if replace(options.sampling, banned_tokens=(), no_repeat_ngram_size=None) != _PLAIN:
        expected = "banned_tokens and no_repeat_ngram_size only, for a beam search"
        raise ValueError(f"sampling: expected {expected}, got {options.sampling}")
    if options.stop_strings:
        got = options.stop_strings
        raise ValueError(f"stop_strings: expected none for a beam search, got {got}")


def _allowed_for_beams(log_probs: Tensor, row: _Row, beams: Sequence[_Beam]) -> Tensor:
    """Return minus infinity for what must not follow; a beam that nothing may follow dies out."""
    options = row.options
    stops = options.stop_tokens if len(beams[0].ids) < options.min_new_tokens else ()
    texts = [row.prompt + beam.ids for beam in beams]
    return _allowed(log_probs, options.sampling, texts, tuple(stops))


def _of_beam(beam: _Beam, row: _Row) -> Completion:
    done = _Row(row.number, row.prompt, row.context_length, row.options)
    shown = "".join(done.take(*one) for one in zip(beam.ids, beam.log_probs, strict=True))
    return done.completion(shown)


# %% [markdown]
# ### What does likelihood buy?
#
# `beam_search` runs this search for a prompt. We compare the best of eight beams with the greedy
# story, and with 200 real ones that the model has never seen.


# %%
@torch.no_grad()
def log_likelihood(text: str) -> float:
    ids = torch.tensor([[end, *tokenizer.encode(text), end]])
    return -F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()


best = beam_search(model, [end], n_beams=8, length_penalty=0, **options)
real = [log_likelihood(text) for text in held_out[:200]]
greedy_story = generate(model, [[end]], sampling=Sampling(temperature=0), **options)[0]
found = {"greedy": sum(greedy_story.log_probs), "8 beams": sum(best[0].log_probs)}
likelier = sum(one > found["8 beams"] for one in real) / len(real)
gained = found["8 beams"] - found["greedy"]
within("log-likelihood, 8 beams minus greedy (nats)", gained, -1, 5, ".1f")
within(
    "different first sentences of 8 beams", len({one.text.split(".")[0] for one in best}), 1, 5, "d"
)
within("real stories that are likelier than the best beam", likelier, 0, 0.25)

# %% [markdown]
# Where do the two found stories stand among the real ones ({numref}`fig-generation-likelihood`)?

# %% mystnb={"figure": {"caption": "How likely the model finds 200 real stories, and the stories that search found. The left hump has a visitor, whose name alone takes ln 47 = 3.9 nats. Search ends at the right edge of them or beyond: it looks for the most likely text, not for a typical one.", "name": "fig-generation-likelihood"}, "image": {"alt": "Histogram of the log-likelihood of real stories in two humps, near minus 31.5 and minus 27 nats. The greedy story and the best of eight beams stand at the right edge of the right hump or beyond, near minus 25."}}
figure, ax = plt.subplots()
ax.hist(real, bins=25, label="200 real stories")
for (name, value), color in zip(found.items(), ("C1", "C2"), strict=True):
    ax.axvline(value, color=color, label=name)
ax.set(xlabel="log-likelihood under the model (nats)", ylabel="stories")
ax.set_title("The most likely story is not a typical one")
ax.legend()
plt.show()

# %% [markdown]
# A real story has about the surprise that is the entropy of stories, some 28 nats, because
# surprises are what makes it one of many. Search avoids them: its stories are alike and safe. (It
# may even lose the greedy one on the way, as in the figure here: a beginning that is dropped cannot
# recover.) Where one answer is right, as in translation, likely is what is wanted, though even
# there the very best may be the empty text {cite}`stahlberg2019nmt`. For open text, sample.
#
# ## Guess ahead, and change nothing
#
# A pass of a large model over five tokens takes hardly longer than over one: the weights must be
# fetched from memory anyway. If only we knew the next four tokens. {term}`Speculative decoding`
# lets a small *draft* model guess them, and the large *target* judge all at once
# {cite}`leviathan2023fast,chen2023accelerating` ({numref}`fig-generation-speculation`). The
# surprise is that the text has exactly the target's distribution.
#
# ```{figure} ../figures/generation-speculation.svg
# :name: fig-generation-speculation
# :alt: The draft adds four tokens to the text The fox: ran, to, his, barn, one by one. The target reads them in one pass and gives five distributions. Ran and to pass the test u q less than p, his is replaced by her, drawn from p minus q, and the rest is unused.
#
# One round. If all four had passed, $p_5$ would have given a fifth token.
# ```
#
# Let $q$ be the draft's distribution at a place and $p$ the target's, after temperature and
# filters. Token $x$ was drawn from $q$. It should come out with probability $p(x)$, but comes in
# with $q(x)$. Where $q(x) > p(x)$ it comes too often; so accept it with probability
# $\min(1, p(x)/q(x))$. Then $x$ comes in and is accepted with probability
#
# $$
# q(x) \min\!\Big(1, \frac{p(x)}{q(x)}\Big) = \min\big(q(x), p(x)\big) ,
# $$ (generation-accept)
#
# and any token is accepted with probability $\alpha = \sum_x \min(q(x), p(x))$ (no longer the
# length penalty). What is still owed to $x$ is $p(x) - \min(q(x), p(x)) = \max(p(x) - q(x), 0)$, in
# all $1 - \alpha$: just the probability of a rejection. So after a rejection draw from the debts,
# divided by their sum:
#
# $$
# \min\big(q(x), p(x)\big) + (1 - \alpha) \, \frac{\max(p(x) - q(x), 0)}{1 - \alpha} = p(x) .
# $$ (generation-exact)
#
# So at each place, given the text before it, a token comes out as the target would draw it, and by
# the chain rule so does the whole text. Tokens after a rejected one are thrown away, for they were
# drawn after a text that is no longer there; and if all pass, the target's last distribution gives
# one more.


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
    and at the one after. The result has the distribution of the target. Source: Leviathan et al.
    (2023), algorithm 1.
    """
    _check_guesses(target, draft, tokens, uniforms)
    last = torch.from_numpy(uniforms[-1:])
    for place, token in enumerate(tokens):
        p, q = target[place], draft[place]
        if uniforms[place] * q[token].item() >= p[token].item():
            owed = (p - q).clamp(min=0)
            owed = owed if owed.sum() > 0 else p  # p and q differ by rounding only
            return place, int(draw(owed[None], last))
    return len(tokens), int(draw(target[-1:], last))


# %% [markdown]
# Two models, two caches, and after each round both go back to what was accepted. That is what
# `truncate` and the `spare` slots of {doc}`09_attention` are for. A *follower* is a model with its
# cache that reads on to the end of a text and can go back. One round: draft, read, verify, add, go
# back. `_drafted` lets the draft guess, `_distributions_along` gives a distribution for each place
# of a text, and `stats` counts. Random numbers have the round in place of the row: the first $n$
# are for the draft, the other $n + 1$ for `verify`.


# %%
#| export
def _round(
    target: "_Follower", draft: "_Follower", row: _Row, n: int, stats: "SpeculativeStats"
) -> str:
    """Draft ``n`` tokens, verify them, and add what comes out; return the text to show."""
    text, n_before = list(row.seen), len(row.ids)
    uniforms = uniforms_of(row.options.seed, stats.n_passes, 2 * n + 1)
    tokens, q = _drafted(draft, text, n, row, uniforms)
    logits = target.read(text + tokens, n + 1)
    _check_answer(logits, n_before)
    p = _distributions_along(logits, row, text + tokens)
    accepted, last = verify(p, torch.cat(q) if q else p[:0], tokens, uniforms[n:])
    log_probs, shown = _wide(logits).log_softmax(dim=-1), ""
    for place, token in enumerate([*tokens[:accepted], last]):
        if row.reason is None:
            shown += row.take(token, log_probs[place, token].item())
    for follower in (target, draft):
        follower.back_to(len(text) + accepted)
    stats.add(n, accepted, len(row.ids) - n_before)
    return shown


# %% [markdown]
# **How much does it save?** Say each guess passes with probability $\alpha$, independently. The
# round yields at least $k + 1$ tokens if the first $k$ guesses pass, so with $\gamma$ guesses
#
# $$
# \mathbb{E}[\text{tokens}] = \sum_{k=0}^{\gamma} \alpha^k
# = \frac{1 - \alpha^{\gamma + 1}}{1 - \alpha} .
# $$ (generation-expected)


# %%
#| export
def expected_tokens(acceptance: int | float, n_draft: int) -> float:
    """Return how many tokens a pass of the target yields on average.

    If each of ``n_draft`` tokens passes with probability ``acceptance``, whatever happened to
    others. Source: Leviathan et al. (2023), eq. 1.

    >>> expected_tokens(0.5, 2)  # 1 + 1/2 + 1/4
    1.75
    """
    _check_number("acceptance", acceptance, "from 0 to 1", lambda share: 0 <= share <= 1)
    _check_count("n_draft", n_draft, 0)
    return math.fsum(acceptance**k for k in range(n_draft + 1))


# %% [markdown] tags=["engine"]
# ### Engine room: two models follow one text, and `speculative_generate` makes the rounds

# %% [markdown] tags=["engine"]
# A follower knows how much it has read.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# The draft guesses one token after the other. What looks back makes the distribution at each place
# depend on the guesses before it, so each place gets its own history. Such texts never slide, so
# that `row.prompt` is their beginning.


# %% tags=["engine"]
#| export
def _distributions_along(logits: Tensor, row: _Row, text: list[int]) -> Tensor:
    """The distributions after the last tokens of ``text``, one for each row of ``logits``."""
    options, first = row.options, len(text) - len(logits) + 1
    sampling, free = options.sampling, len(row.prompt) + options.min_new_tokens
    if not sampling.needs_history and not sampling.banned_tokens and first >= free:
        return _distribution(logits, sampling, None)
    places = []
    for one, length in zip(logits.split(1), range(first, len(text) + 1), strict=True):
        stops = tuple(options.stop_tokens) if length < free else ()
        one = _allowed(one, sampling, [text[:length]], stops)
        _check_any_left(one)
        history = torch.tensor([text[:length]], device=one.device)
        counts = _token_counts(history, one.size(1)) if sampling.has_penalties else None
        places.append(_distribution(one, sampling, counts))
    return torch.cat(places)


def _drafted(
    draft: _Follower, text: list[int], n: int, row: _Row, uniforms: np.ndarray
) -> tuple[list[int], list[Tensor]]:
    """Return ``n`` tokens that the draft adds to ``text``, and their distributions."""
    text, distributions = list(text), []
    for place in range(n):
        logits = draft.read(text, 1)
        _check_answer(logits, len(row.ids) + place, "draft")
        distributions.append(_distributions_along(logits, row, text))
        uniform = torch.from_numpy(uniforms[place : place + 1])
        text.append(int(draw(distributions[-1], uniform)))
    return text[len(text) - n :], distributions


# %% [markdown] tags=["engine"]
# What happened to the guesses is counted, for the acceptance rate.


# %% tags=["engine"]
#| export
@dataclass
class SpeculativeStats:
    """What happened to the drafted tokens; those after a rejection or an end are not tested."""

    n_passes: int = 0
    n_tokens: int = 0
    n_drafted: int = 0
    n_tested: int = 0
    n_accepted: int = 0

    def add(self, drafted: int, accepted: int, added: int) -> None:
        """Count a round that ``added`` tokens: fewer than ``accepted`` if one ended the text."""
        self.n_passes += 1
        self.n_tokens += added
        self.n_drafted += drafted
        self.n_tested += min(added, drafted)
        self.n_accepted += min(added, accepted)

    @property
    def acceptance_rate(self) -> float:
        """The share of tested tokens that passed; NaN if none was tested."""
        return self.n_accepted / self.n_tested if self.n_tested else math.nan

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens a pass of the target yielded."""
        return self.n_tokens / self.n_passes if self.n_passes else math.nan


# %% [markdown] tags=["engine"]
# Near the end of the context, or of `max_new_tokens`, there is room for fewer guesses; with none
# a round is a plain step.


# %% tags=["engine"]
#| export
def speculative_generate(
    model: TransformerLM,
    draft: TransformerLM,
    prompt: str | Sequence[int],
    *,
    n_draft: int = 4,
    **options: Any,
) -> tuple[Completion, SpeculativeStats]:
    """Return a completion with the distribution of ``generate``'s, for fewer passes of ``model``.

    In each pass ``draft`` guesses ``n_draft`` tokens, and ``model`` reads all of them at once.
    ``options`` are those of ``GenerationOptions``, always with a cache, and without "slide".
    """
    checked = _options(options)
    _check_count("n_draft", n_draft, 1)
    check_choice("on_full", checked.on_full, ("stop", "error"))
    (row,) = _rows(model, [prompt], checked, "prompt")
    _check_draft(model, draft)
    capacity, stats, shown = len(row.prompt) + checked.max_new_tokens, SpeculativeStats(), ""
    with _evaluating(model, draft):
        target, guess = (_Follower(m, capacity, n_draft) for m in (model, draft))
        while row.reason is None:
            left = checked.max_new_tokens - len(row.ids)
            n = min(n_draft, left - 1, row.context_length - len(row.seen))
            shown += _round(target, guess, row, n, stats)
    return row.completion(shown), stats


# %% [markdown] tags=["engine"]
# A draft must speak the same tokens, and reach as far. What `verify` is given by others must fit
# together, and a guess must be one that the draft could have made.


# %% tags=["engine"]
#| export
def _check_guesses(target: Tensor, draft: Tensor, tokens: Any, uniforms: Any) -> None:
    _check_shares(target, "target")
    vocab_size = target.size(1)
    if not isinstance(draft, Tensor) or draft.shape != (len(target) - 1, vocab_size):
        got = tuple(draft.shape) if isinstance(draft, Tensor) else draft
        expected = f"the shape {(len(target) - 1, vocab_size)}, a row less than target"
        raise ValueError(f"draft: expected {expected}, got {got!r:.60}")
    _check_shares(draft, "draft")
    ids = _as_ids("tokens", tokens)
    _check_vocabulary("tokens", ids, vocab_size)
    if len(ids) != len(draft):
        raise ValueError(f"tokens: expected {len(draft)}, one for each row of draft, got {ids}")
    for place, token in enumerate(ids):
        if draft[place, token] == 0:
            raise ValueError(f"tokens: expected what draft could draw, got {token} at {place}")
    if not isinstance(uniforms, np.ndarray):
        raise ValueError(f"uniforms: expected an array, got {uniforms!r:.60}")
    _check_uniforms(torch.from_numpy(uniforms), len(target))


def _check_draft(model: TransformerLM, draft: TransformerLM) -> None:
    _check_model(draft, "draft")
    ours, theirs = model.config, draft.config
    if ours.vocab_size != theirs.vocab_size:
        expected = f"a vocabulary of {ours.vocab_size} tokens, the model's"
        raise ValueError(f"draft: expected {expected}, got {theirs.vocab_size}")
    if theirs.context_length < ours.context_length:
        expected = f"a context of at least {ours.context_length} tokens, the model's"
        raise ValueError(f"draft: expected {expected}, got {theirs.context_length}")


# %% [markdown]
# ### Drafts of every quality
#
# `speculative_generate` makes such rounds until the text ends. As drafts we take a small model
# before training, and after 40, 120 and 300 steps.

# %%
from llmbook.model import ModelConfig

sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 64, "tie_embeddings": True}
torch.manual_seed(0)
small = TransformerLM(ModelConfig(vocab_size=951, context_length=128, **sizes))
rows = [torch.tensor([end, *tokenizer.encode(s.text), end]) for s in world.stories(2400, seed=7)]
optimizer, drafts = torch.optim.AdamW(small.parameters(), lr=1e-2), {}
for step in range(301):
    if step in (0, 40, 120, 300):
        drafts[f"{step} steps"] = deepcopy(small)
    batch = rows[8 * (step % 300) :][:8]
    inputs = nn.utils.rnn.pad_sequence([row[:-1] for row in batch], batch_first=True)
    targets = nn.utils.rnn.pad_sequence([row[1:] for row in batch], True, padding_value=-100)
    optimizer.zero_grad()
    F.cross_entropy(small(inputs).mT, targets).backward()
    optimizer.step()
share = count_parameters(small) / count_parameters(model)
print(f"the draft has {share:.0%} of the parameters of the target")

# %% [markdown]
# Is the promise kept? We ask for two tokens after Ada's name, 1,500 times, with a draft that is
# often wrong, and compare the pairs with their exact probabilities by a chi-square test. If the
# distributions are equal, $\sum (\text{observed} - \text{expected})^2 / \text{expected}$ is near
# the number of pairs, and its tail is an incomplete gamma function. As a control, the same counts
# against the draft's own probabilities.


# %%
def p_value(counts: Tensor, expected: Tensor) -> float:
    rare = expected < 5  # those together
    both = [torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (counts, expected)]
    counts, expected = (x[both[1] > 0] for x in both)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


@torch.no_grad()
def pair_probabilities(model: TransformerLM) -> Tensor:
    first = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    after = torch.tensor([[*prompt, token] for token in likely.tolist()])
    pairs = torch.zeros(len(first), len(first))
    pairs[likely] = first[likely, None] * model(after)[:, -1].softmax(-1)
    pairs[likely[-1]] += (1 - pairs.sum()) / len(first)  # after the unlikely: in the rest
    return pairs.flatten()


draft, counts = drafts["40 steps"], torch.zeros(951 * 951)
for seed in range(1500):
    done, _ = speculative_generate(model, draft, prompt, max_new_tokens=2, n_draft=1, seed=seed)
    counts[951 * done.ids[0] + done.ids[1]] += 1
for name, one in (("target", model), ("draft", draft)):
    rejected = p_value(counts, 1500 * pair_probabilities(one)) < 1e-4
    assert rejected == (one is draft)
    result = "rejected (p-value below" if rejected else "not rejected (p-value above"
    print(f"drawn as the {name} draws: {result} 0.0001)")

# %% [markdown]
# What came out cannot be told from draws of the target; that it came from the draft is out of the
# question. And the savings, measured against {eq}`generation-expected`:


# %%
def measured(draft: TransformerLM, n_draft: int, n: int = 6) -> SpeculativeStats:
    total = SpeculativeStats()
    for seed in range(n):
        arguments = {"n_draft": n_draft, "seed": seed, **options}
        stats = speculative_generate(model, draft, [end], **arguments)[1]
        for name, value in vars(stats).items():
            setattr(total, name, getattr(total, name) + value)
    return total


results = {g: [measured(draft, g) for draft in (*drafts.values(), model)] for g in (2, 4, 8)}
rates = [stats.acceptance_rate for stats in results[4]]
assert rates == sorted(rates) and rates[-1] == 1  # it grows with training
within("guesses of the untrained draft that pass", rates[0], 0, 0.1)
within("guesses of the draft after 300 steps that pass", rates[-2], 0.6, 0.95)
print(f"guesses of the target itself that pass: {rates[-1]:.0%}")
errors = [
    abs(s.tokens_per_pass / expected_tokens(s.acceptance_rate, g) - 1)
    for g in results for s in results[g]
]  # fmt: skip
within("largest deviation from the formula", max(errors), 0, 0.2)

# %% [markdown]
# All fifteen measurements are in {numref}`fig-generation-acceptance`:

# %% mystnb={"figure": {"caption": "Tokens for each pass of the target against the acceptance rate: five drafts, from untrained to the target itself, and the formula for 2, 4 and 8 guesses.", "name": "fig-generation-acceptance"}, "image": {"alt": "Three rising curves over acceptance rates from 0 to 1, which start at 1 and end at 3, 5 and 9 tokens for 2, 4 and 8 guesses. Five measured points lie on each curve, near acceptance 0, 0.4, 0.6, 0.8 and 1."}}
figure, ax = plt.subplots()
grid = [i / 100 for i in range(101)]
for (g, stats), color in zip(results.items(), ("C0", "C1", "C2"), strict=True):
    ax.plot(grid, [expected_tokens(a, g) for a in grid], color=color, label=f"{g} guesses")
    points = [(s.acceptance_rate, s.tokens_per_pass) for s in stats]
    ax.plot(*zip(*points, strict=True), "o", color=color)
ax.set(xlabel="acceptance rate", ylabel="tokens per pass")
ax.set_title("Measured tokens per pass are near the formula")
ax.legend()
plt.show()

# %% [markdown]
# The independence that we assumed is not exact: in this world a place is either certain or a matter
# of dice, and guesses fail together. The points are near the curve all the same. At acceptance 1
# they lie below it because the last round of each story is cut off by its end.
#
# ## Eight bits are enough
#
# If fetching weights is what takes time and room, let them be smaller. Absmax {term}`quantization`
# writes a row of weights as whole numbers times a step $s$ ({numref}`fig-generation-grid`). The
# largest must fit into the range of 8 bits, hence
#
# $$
# s = \frac{\max_j |w_j|}{127} , \qquad n_j = \operatorname{round}(w_j / s) , \qquad
# |w_j - s\, n_j| = s \left| \tfrac{w_j}{s} - n_j \right| \le \frac s2 .
# $$ (generation-absmax)
#
# ```{figure} ../figures/generation-grid.svg
# :name: fig-generation-grid
# :alt: A line with evenly spaced points from minus 127 to 127 steps. Weights of one row stand above it, each moves to the nearest point, at most half a step away.
#
# One large weight makes the grid coarse for its whole row, but only for its row.
# ```
#
# Each output of a layer has a row, and so a step, of its own; with one step for the matrix a
# single outlier would spoil all. Rounding errors are of either sign and average out: an output is
# off by $\sum_j e_j x_j$, with a variance of $\frac{s^2}{12} |x|^2$ if errors are uniform on
# $[-s/2, s/2]$.


# %%
#| export
def quantize_rows(
    weight: Float[Tensor, "rows columns"],
) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, " rows"]]:
    """Return whole numbers from -127 to 127, and what one of them is worth in each row.

    The step of a row is its largest absolute value divided by 127 (absmax), so that no weight is
    farther than half a step from its number. NaN and infinity raise a ``ValueError``.
    """
    _check_weight(weight)
    wide = weight.float()
    step = (wide.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / step[:, None]).round().clamp(-127, 127).to(torch.int8), step


# %% [markdown]
# The layer multiplies by the whole numbers, and by the steps at the end: $s$ is the same for all
# terms of the sum, $\sum_j s\, n_j x_j = s \sum_j n_j x_j$. Activations stay as they are.
# LLM.int8() rounds them, too, and must then keep outliers apart {cite}`dettmers2022int8`.


# %%
#| export
class QuantizedLinear(nn.Module):
    """A linear layer whose weights are whole numbers of 8 bits, with a step for each output.

    They are buffers: no gradient reaches them. Biases keep their type.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        _check_count("in_features", in_features, 1)
        _check_count("out_features", out_features, 1)
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear) -> "QuantizedLinear":
        """Return the layer with the weights of ``linear``, rounded."""
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"linear: expected a Linear layer, got {linear!r:.60}")
        made = cls(linear.in_features, linear.out_features, linear.bias is not None)
        made.weight, made.scale = quantize_rows(linear.weight.detach())
        if linear.bias is not None:
            made.bias = linear.bias.detach().clone()
        return made

    def forward(
        self, x: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Return the linear map of ``x``, in its dtype."""
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            expected = f"floats of shape (..., {self.in_features})"
            raise ValueError(f"x: expected {expected}, got {x.dtype} of {tuple(x.shape)}")
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return out if self.bias is None else out + self.bias.to(x.dtype)


# %% [markdown]
# To quantize a model is to exchange its linear layers. A head that shares its matrix with the
# embedding stays: rounded alone, it would need a second copy. The result is for use, not for the
# disk: what others read are parameters, and `save_model` refuses a model that has lost some.


# %%
#| export
def quantize(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with a ``QuantizedLinear`` in place of each linear layer in it.

    A matrix that is shared with another module, such as a tied head, stays as it is. A model that
    is a linear layer becomes one of the kind.
    """
    _check_module(model)
    if type(model) is nn.Linear:
        return QuantizedLinear.of(model)
    model = deepcopy(model)
    weights = [m._parameters["weight"] for m in model.modules() if "weight" in m._parameters]
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            shared = sum(child._parameters.get("weight") is weight for weight in weights) > 1
            if type(child) is nn.Linear and not shared:
                setattr(parent, name, QuantizedLinear.of(child))
    return model


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and saved buffers, each tensor once."""
    _check_module(model)
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values())


# %% [markdown] tags=["engine"]
# ### Engine room: weights that cannot be rounded are refused

# %% [markdown] tags=["engine"]
# A single infinite weight would make the step of its row infinite, and all others zero.


# %% tags=["engine"]
#| export
def _check_weight(weight: object) -> None:
    """Demand a matrix of finite floats with at least one column."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else weight
        raise ValueError(f"weight: expected a tensor of floats, got {got!r:.60}")
    if weight.ndim != 2 or not weight.size(1):
        raise ValueError(f"weight: expected the shape (rows, columns), got {tuple(weight.shape)}")
    if not weight.float().isfinite().all():
        wrong = weight[~weight.float().isfinite()][0].item()
        raise ValueError(f"weight: expected numbers that float32 has, got {wrong}")


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a module of PyTorch, got {model!r:.60}")


# %% [markdown]
# ### What do eight bits cost?
#
# The bound first, then the loss on real stories, then the memory: of our model,
# and by count of Llama 3 8B, which is stored in 16 bits.

# %%
weight = model.blocks[0].feed_forward.up_proj.weight.detach()
numbers, step = quantize_rows(weight)
error = (numbers * step[:, None] - weight).abs()
assert (error <= step[:, None] / 2 * 1.0001).all()
print(f"largest error: {(error / step[:, None]).max():.2f} steps")
spread = (error.square().mean(dim=1).sqrt() / step).mean().item()
within("root mean square of errors (steps)", spread, 0.27, 0.30, ".3f")
print(f"root mean square of uniform errors: {12**-0.5:.3f}")

# %% [markdown]
# No weight is off by more than half a step, and the errors are close to uniform. Now the loss, and
# the bytes:

# %%
int8 = quantize(model)
ids = [torch.tensor([[end, *tokenizer.encode(text), end]]) for text in held_out[:100]]
with torch.no_grad():
    losses = [
        torch.stack([F.cross_entropy(m(x[:, :-1])[0], x[0, 1:]) for x in ids]).mean().item()
        for m in (model, int8)
    ]
within("change of the loss (nats a token)", losses[1] - losses[0], -0.005, 0.005, "+.3f")
table = 4 * model.embedding.weight.numel() / stored_bytes(model)
print(f"stored: {stored_bytes(int8) / stored_bytes(model):.0%} of the bytes before; ", end="")
print(f"{100 * table:.0f} points of these are the embedding table, which is not rounded")

# %% [markdown]
# A good part of our bytes is the table of embeddings, which stays. In a large model nearly all are
# in linear layers:

# %%
from llmbook.model import parameter_counts

parts = parameter_counts(ModelConfig.preset("llama3-8b"))
linear = sum(parts[name] for name in ("attention", "feed_forward", "lm_head"))
rest = sum(parts.values()) - linear
print(
    f"Llama 3 8B: {2 * (linear + rest) / 1e9:.1f} GB, with int8 {(linear + 2 * rest) / 1e9:.1f} GB"
)

# %% [markdown]
# ## Is it the real thing?
#
# The same weights in transformers: its filters on random logits, its greedy text and its beams,
# and PyTorch's own rounding to a grid.

# %%
import warnings

import llmbook.generation as exported

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like a widget for its progress
    import transformers
    from transformers.generation import logits_process as warpers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
torch.manual_seed(0)
scores = 3 * torch.randn(200, 951, dtype=torch.float64)
history = torch.randint(951, (200, 30))
chosen = {"temperature": 1.4, "top_k": 300, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9}
names = "Temperature", "TopK", "TopP", "MinP", "Typical"
after = warpers.RepetitionPenaltyLogitsProcessor(1.3)(history, scores)
for name, value in zip(names, chosen.values(), strict=True):
    after = getattr(warpers, f"{name}LogitsWarper")(value)(history, after)
ours = exported.next_token_distribution(
    scores, exported.Sampling(repetition_penalty=1.3, **chosen), history
)
error = (ours - after.softmax(-1)).abs().max()
print(f"{len(chosen)} filters and a penalty: {ours.numel():,} probabilities", end=", ")
print("apart by less than 1e-12")
assert error < 1e-12

# %% [markdown]
# And whole texts:

# %%
text = torch.tensor([prompt] * 2)
common = {"attention_mask": torch.ones_like(text), "max_new_tokens": 40, "do_sample": False}
common |= {"eos_token_id": end, "pad_token_id": end}
kept = {**options, "max_new_tokens": 40}
wide = {"num_beams": 4, "early_stopping": "never", "length_penalty": 1.0}
greedily = exported.Sampling(temperature=0)
mine = {
    "greedy": exported.generate(model, [prompt], sampling=greedily, **kept)[0].ids,
    "beams": exported.beam_search(model, prompt, n_beams=4, **kept)[0].ids,
}
for how, given in (("greedy", common), ("beams", common | wide)):
    their_ids = theirs.generate(text, **given)[0, len(prompt) :].tolist()
    same = sum(one == other for one, other in zip(mine[how], their_ids, strict=False))
    print(f"{how}: {same / len(mine[how]):.0%} of our tokens are theirs")

# %% [markdown]
# And the grid:

# %%
zeros = torch.zeros(len(step), dtype=torch.int32)
grid = torch.fake_quantize_per_channel_affine(weight, step, zeros, 0, -127, 127)
other = (grid / step[:, None]).round() != numbers
# Torch multiplies by 1 / step, so a weight that lies halfway may go the other way.
halfway = ((weight / step[:, None]).abs() % 1 - 0.5).abs() < 1e-4
assert not (other & ~halfway).any() and other.float().mean() < 1e-3
print(f"int8: {grid.numel():,} weights on the same points of the grid, but for ties")

# %% [markdown]
# ## How fast is it?
#
# Against `transformers.generate` on the same weights, with one row and with 32; a step with fewer
# calls against the plain one; with a cache against without; with a draft, and with 8 bits, against
# plain; and sorting.


# %%
def seconds_of(run: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def microseconds_of(step: Step) -> float:
    cache = model.new_cache(1)
    return 1e6 * seconds_of(lambda: step(torch.tensor([end]), cache), 100)


def ours_of(model: TransformerLM, n: int, **changes: Any) -> float:
    return seconds_of(lambda: generate(model, [prompt] * n, max_new_tokens=64, **changes))


def theirs_of(n: int) -> float:
    ids = torch.tensor([prompt] * n)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 64, "do_sample": True}
    given |= {"top_k": 0, "eos_token_id": None, "pad_token_id": end}
    return seconds_of(lambda: theirs.generate(ids, **given))


# %% [markdown]
# Each time is the shortest of three; a step's is that of a hundred. Below the times stands what the
# numbers were here that have only been bounded so far.

# %% tags=["nbval-ignore-output"]
for n in (1, 32):
    print(f"{n:2} rows: {theirs_of(n) / ours_of(model, n):.1f} times transformers' speed", end=", ")
    print(f"{n * 64 / ours_of(model, n):.0f} tokens a second")
plain, fused = microseconds_of(_plain_step(model)), microseconds_of(_FusedStep(model))
print(f"a step with fewer calls: {fused:.0f} microseconds, in place of {plain:.0f}")
cached = ours_of(model, 1)
print(f"cache against none, 64 tokens: {ours_of(model, 1, use_cache=False) / cached:.1f} times")
arguments = {"max_new_tokens": 64, "n_draft": 4}
guessed = seconds_of(lambda: speculative_generate(model, drafts["300 steps"], prompt, **arguments))
print(f"with a draft: {cached / guessed:.2f} times the plain speed")
print(f"with 8 bits: {cached / ours_of(int8, 1):.2f} times the plain speed")
rows = next_token_distribution(torch.randn(32, 2048), Sampling())
faster = seconds_of(lambda: rows.sort(dim=-1)) / seconds_of(lambda: np.sort(rows.numpy()))
print(f"sorting 32 rows of 2048 numbers: NumPy {faster:.0f} times PyTorch's speed")
print(*(f"\n{what}: {value}" for what, value in noted.items()), sep="")

# %% [markdown]
# With a compiler there is one more step to go: `generate(..., compile=True)` makes a program of the
# step and of the choice. Compiling takes too long for this chapter, so it was measured apart, by
# `python benchmarks/generation.py`, whose table is `benchmarks/results/generation.md`. Without the
# choice in the program, top-p took nearly as long as the whole model: it sorts, sums twice, and
# searches. What is left of a token's time is the program's, Python's around it, and a share of
# reading the prompt. With eight rows most of it is matrix products.
#
# The draft and the 8 bits are *slower* here. Both save fetching weights from
# memory, and ours all lie in the processor's cache; a draft of one layer costs half of a target of
# two, and our integers are turned into floats before each product. With billions of weights, in
# memory that is slow against the arithmetic, and with kernels that read integers, both pay.
#
# ## Exercises
#
# ````{exercise} A filter that heat does not move
# :label: ex-generation-sigma
# *Fifteen minutes.* Top-$n\sigma$ keeps the tokens whose logit is at least the largest one minus
# $n$ standard deviations of the row's logits (with divisor $V$, not $V - 1$)
# {cite}`tang2024topn`. Write `keep_n_sigma(logits, n)`, which returns the distribution over what
# it keeps. Why does the set that it keeps not depend on the temperature?
# ````


# %% tags=["solution"]
def keep_n_sigma(logits: Tensor, n: float) -> Tensor:
    """Return probabilities of tokens within ``n`` standard deviations of the best, else zero."""
    # Dividing logits by T divides the distance to the best and the deviation by T alike.
    least = logits.amax(-1, keepdim=True) - n * logits.std(-1, correction=0, keepdim=True)
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


# %% tags=["check"]
scores = torch.tensor([[0.0, 2.0, 3.0, -5.0], [1.0, 1.0, 1.0, 1.0]])
one = keep_n_sigma(scores, 1)
assert one[1].tolist() == [0.25] * 4, "equal logits all stay: the bar itself is inside"
assert one.shape == scores.shape and torch.allclose(one.sum(-1), torch.ones(2)), "rows sum to one"
wide = keep_n_sigma(scores, 99)
assert torch.allclose(wide, scores.softmax(-1)), "a low bar keeps everything, as the model has it"
best_alone = (keep_n_sigma(scores, 0) > 0).sum(-1).tolist()
assert best_alone == [1, 4], "n = 0 keeps the best alone, with its equals"
assert torch.equal(keep_n_sigma(scores[:1], 1), one[:1]), "each row has a deviation of its own"
torch.manual_seed(0)
many = torch.randn(50, 100)
sets = [keep_n_sigma(many / t, 1.5) > 0 for t in (0.5, 1, 4)]
assert all(torch.equal(sets[0], other) for other in sets), "the set must not depend on temperature"
for n, expected in ((0.9, [False, True, True, False]), (1, [True, True, True, False])):
    inside = (keep_n_sigma(scores, n)[0] > 0).tolist()
    assert inside == expected, f"3 minus {n} deviations: the squares are divided by V, not V - 1"

# %% [markdown]
# ````{exercise} Drawing without a sum
# :label: ex-generation-gumbel
# *Twenty minutes.* Let $g_i = -\log(-\log u_i)$ with an independent uniform $u_i$ for each token.
# Then $\arg\max_i (s_i + g_i)$ is distributed as softmax of $s$. Write
# `gumbel_draw(logits, uniforms)`, both `(batch, vocab_size)`. Show why it works for two tokens.
# When is it better than `draw`, and when worse?
# ````


# %% tags=["solution"]
def gumbel_draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return a token for each row, drawn with the probabilities softmax(logits)."""
    # -log u is exponential with rate 1; e^(-s - g) = e^(-s) (-log u) has the rate e^s. Of two such
    # waiting times the first is over first with probability e^a / (e^a + e^b). It needs no sum
    # over the vocabulary, which may lie on many machines, but a random number for each token.
    return (logits - (-uniforms.log()).log()).argmax(-1)


# %% tags=["check"]
equal = torch.tensor([[0.2, 0.9, 0.5], [0.1, 0.2, 0.3]])
drawn = gumbel_draw(torch.zeros(2, 3), equal)
assert drawn.shape == (2,), "one token for each row"
assert drawn.tolist() == [1, 2], "of equally likely tokens, that with the largest number wins"
generator = torch.Generator().manual_seed(0)
scores = torch.tensor([0.0, 1.0, -1.0, 2.5, -torch.inf])
uniforms = torch.rand(20_000, 5, generator=generator).clamp(1e-7)
drawn = gumbel_draw(scores.expand(20_000, -1), uniforms)
drawn_counts = drawn.bincount(minlength=5).float()
assert drawn_counts[4] == 0, "what is impossible is never drawn"
wrong = p_value(drawn_counts[:4], 20_000 * scores[:4].softmax(-1))
assert wrong > 1e-4, f"not the distribution softmax(logits): p = {wrong:.1e}"

# %% [markdown]
# ````{exercise} How many guesses?
# :label: ex-generation-guesses
# *Fifteen minutes.* A pass of the target takes the same time however many tokens it reads; each
# guess of the draft takes `cost` times as long. Write `best_n_draft(acceptance, cost, most=64)`:
# the number of guesses in a round, from 0 to `most`, that gives the most tokens per unit of time;
# the smallest of several that are equally good. When does it pay to guess at all?
# ````


# %% tags=["solution"]
def best_n_draft(acceptance: float, cost: float, most: int = 64) -> int:
    """Return how many tokens to draft, from 0 to ``most``, for the most tokens in a given time."""
    # With n guesses a round takes 1 + n cost. One guess gains if 1 + a > 1 + cost: whenever
    # a guess is likelier to pass than it is costly. The best number grows with a.
    return max(range(most + 1), key=lambda n: expected_tokens(acceptance, n) / (1 + n * cost))


# %% tags=["check"]
assert best_n_draft(0.3, 0.5) == 0, "a guess that costs more than it gains does not pay"
assert best_n_draft(0.5, 0.49) == 1, "a guess pays if it is likelier to pass than it is costly"
assert best_n_draft(0.5, 0.5) == 0, "of several that are equally good, the smallest"
assert best_n_draft(1.0, 0.2, most=10) == 10, "perfect guesses: as many as one may"
assert best_n_draft(0.9, 0.02) > best_n_draft(0.6, 0.02), "better drafts guess farther ahead"
assert best_n_draft(0.9, 0.02) > best_n_draft(0.9, 0.2), "dearer drafts guess less far ahead"
assert best_n_draft(0.8, 0.1) == 6, "tokens of a round, the target's own too, by its whole time"
assert best_n_draft(0.99, 0.001) == 64, "without most, 64 is the limit"

# %% [markdown]
# ````{exercise} No phrase twice
# :label: ex-generation-ngrams
# *Half an hour.* With `no_repeat_ngram_size=n` no run of $n$ tokens occurs twice. To find what may
# not come next, it compares the end of the text with all of it, again at each step. Remember
# instead: write a class `Phrases(n)` whose `add(token)` takes the next token of a text and returns
# the set of tokens that would now complete a run of $n$ for the second time. What it does for a
# token must not grow with the text. What would $n = 2$ do to a story of the tiny world?
# ````


# %% tags=["solution"]
class Phrases:
    """The runs of ``n`` tokens of one text, which arrives token by token."""

    def __init__(self, n: int):
        self.n, self.end, self.followers = n, [], {}

    def add(self, token: int) -> set[int]:
        """Take the next token; return those that would repeat a run of ``n`` after it."""
        # Names return: after the second "of Ada" the story may say hardly anything that it said
        # after the first, such as "is". With n = 2 most true stories would be forbidden.
        if len(self.end) == self.n - 1:
            self.followers.setdefault(tuple(self.end), set()).add(token)
        self.end = [*self.end, token][max(0, len(self.end) + 2 - self.n) :]
        return set(self.followers.get(tuple(self.end), ()))


# %% tags=["check"]
class Noted(int):
    looks = 0

    def __eq__(self, other):
        Noted.looks += 1
        return int(self) == int(other)

    def __hash__(self):
        Noted.looks += 1
        return hash(int(self))


def banned_after(ids, n):
    phrases = Phrases(n)
    return [phrases.add(token) for token in ids][-1]


assert banned_after([1, 2, 3, 1, 2], 3) == {3}, "1 2 has been followed by 3"
assert banned_after([1, 2, 3, 1, 2], 2) == {3}, "2 has been followed by 3"
assert banned_after([1, 2, 1, 3, 1], 2) == {2, 3}, "1 has been followed by 2 and by 3: both"
assert banned_after([1, 2, 3], 1) == {1, 2, 3}, "with n = 1 nothing may return"
assert banned_after([1, 2], 5) == set(), "a text that is too short bans nothing"
assert banned_after([7, 7, 7], 3) == {7}, "runs may overlap"
torch.manual_seed(0)
for n in (1, 2, 3, 4):
    ids = torch.randint(4, (1, 25))
    peer = warpers.NoRepeatNGramLogitsProcessor(n)(ids, torch.zeros(1, 4))[0]
    theirs_banned = set((peer == -torch.inf).nonzero()[:, 0].tolist())
    assert banned_after(ids[0].tolist(), n) == theirs_banned, f"transformers differs at n = {n}"
phrases, looks = Phrases(4), []
for token in torch.randint(50, (1000,)).tolist():
    phrases.add(Noted(token))
    looks.append(Noted.looks)
early, late = looks[300] - looks[100], looks[-1] - looks[-201]
assert late <= 2 * early, "the work for a token must not grow with the text"

# %% [markdown]
# ````{exercise} Four bits, in groups
# :label: ex-generation-groups
# *Half an hour.* With 4 bits the grid has 15 points, and one outlier a row hurts. Write
# `round_in_groups(weight, bits, group)`: the rounded weights, as floats, where each `group`
# consecutive weights of a row have an absmax step of their own, with whole numbers up to
# $2^{\text{bits}-1} - 1$. Groups of zeros stay zero. If a step takes 16 bits, what does a weight
# take in groups of 32?
# ````


# %% tags=["solution"]
def round_in_groups(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return ``weight`` (rows, columns) on an absmax grid for each ``group`` of columns."""
    # 4 bits and a share of a step, 16 / 32: four and a half bits.
    groups = weight.view(len(weight), -1, group)
    largest = 2 ** (bits - 1) - 1
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / largest
    return ((groups / step).round() * step).view_as(weight)


# %% tags=["check"]
torch.manual_seed(0)
w = torch.randn(6, 64)
w[0] *= 10
whole = quantize_rows(w)
whole = whole[0] * whole[1][:, None]
assert round_in_groups(w, 8, 64).shape == w.shape, "as many rows and columns as before"
assert torch.allclose(round_in_groups(w, 8, 64), whole, atol=1e-5), (
    "a group that is a row, with 8 bits: the largest weight of the row is 127 steps"
)
rounded = round_in_groups(w, 4, 16)
steps = w.view(6, 4, 16).abs().amax(-1) / 7
off = (rounded - w).view(6, 4, 16).abs().amax(-1)
assert (off <= steps * 0.501).all(), "at most half a step, of its own group"
assert len(rounded[0, :16].unique()) <= 15, "at most 15 values in a group of 4 bits"
zeros = torch.tensor([[0.0] * 4 + [1.0, 0.0, 0.0, -1.0]])
assert torch.allclose(round_in_groups(zeros, 4, 4), zeros), "a group of zeros stays zero"

# %% [markdown]
# ## Summary
#
# A temperature trades likelihood for entropy, and divides the logits. Filters cut the tail, whose
# small probabilities add up over a text: a fixed number, a fixed mass, a share of the best, or the
# nearest to the entropy. Random numbers that follow from seed, row and step make each text of a
# batch independent of the others. With a cache each token is read once, and a small model gains
# more from fewer calls than from fewer numbers. Beam search finds likely texts, which are not
# typical ones. Drafts that are accepted with $\min(1, p/q)$ and replaced from $\max(p - q, 0)$
# leave the distribution exactly as it was. A step of $\max|w|/127$ for each row stores weights in 8
# bits, none of them moved by more than half of it.
#
# **Checklist: choosing how to generate.**
#
# - One right answer: temperature 0, or beams for short texts.
# - Open text: sample at 0.7 to 1; above that with min-p near 0.1.
# - To measure a model, or to train on its own texts: temperature 1 and no filter, or the numbers
#   are of another distribution.
# - Penalties only against loops that you have seen; names and full stops must return.
# - Test that cached equals uncached, alone equals together, streamed equals whole.
# - A draft pays when a guess is likelier to pass than it is costly.
#
# **Further reading.** Holtzman and colleagues {cite}`holtzman2020curious` on what likely text
# lacks, Leviathan and colleagues {cite}`leviathan2023fast` on guessing. Chapter 15 goes below 32
# bits for training as well.
