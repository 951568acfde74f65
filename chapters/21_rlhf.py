# %% [markdown]
# # Reward models and RLHF
#
# > Learn what people prefer from pairs of replies, and improve a model by reward: policy gradients,
# > PPO, and what happens when a learned reward is pushed too far.
#
# The assistant of this chapter answers everything. Asked for a fact, it is nearly always right. Asked
# about somebody of whom it has never heard, it makes something up, and asked for a secret, it tells
# it. It was tuned on nine bad replies for each good one, and imitation cannot be better than what
# it imitates.
#
# To write the right reply to every prompt is expensive, and often nobody can. To say which of two
# replies is better is much easier. **{term}`Reinforcement learning from human feedback
# <reinforcement learning from human feedback>`** (RLHF) lives on this difference. People compare
# pairs of replies, a model learns from the comparisons to give a number to any reply, and the
# assistant is trained to write replies with high numbers. InstructGPT {cite}`ouyang2022training`
# became an assistant in this way.
#
# The chapter builds all of it: rewards from comparisons, the policy gradient, and PPO. Our tiny
# world adds what no real project has, the **true** reward of every reply. So we will see the
# learned reward rise, and what happens to the true one meanwhile.
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:class}`~llmbook.rlhf.RewardModel`, {py:func}`~llmbook.rlhf.bradley_terry_loss`, {py:func}`~llmbook.rlhf.true_reward`, {py:func}`~llmbook.rlhf.judged_pairs`, {py:func}`~llmbook.rlhf.kl_estimates`, {py:func}`~llmbook.rlhf.leave_one_out`, {py:func}`~llmbook.rlhf.generalized_advantages`, {py:func}`~llmbook.rlhf.clipped_loss`, {py:class}`~llmbook.rlhf.RolloutBatches`, {py:func}`~llmbook.rlhf.train_ppo` |
# | **You need** | instruction tuning ({doc}`19_instruction`), evaluation ({doc}`16_evaluation`), training ({doc}`13_training`) |
# | **It takes** | 60 minutes for the main line, 4 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp rlhf

# %% [markdown]
# ## An assistant that answers everything
#
# {py:func}`~llmbook.instruction.tuned` has the model with which we begin, "careless". Beside it we
# put the model that this chapter makes of it, without one example of a right reply: its training saw
# comparisons of replies about one half of the characters, and then only questions about the other
# half.

# %% [markdown] tags=["engine"]
# ### Engine room: the imports, the numbers that arguments may be, and two models that are asked

# %% tags=["engine"]
#| export
# The imports of the module
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

# %% tags=["engine"]
#| export
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import nn, Tensor
from torch.nn.functional import logsigmoid

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.batches import permuted, ResumableBatches
from llmbook.corpus import decode_text
from llmbook.environment import check_choice, check_path, check_text, check_whole
from llmbook.generation import generate, Sampling
from llmbook.instruction import ChatTemplate, check_conversation, entropies, Example
from llmbook.instruction import instruction_batch, invented_reply, masked_mean, Message
from llmbook.instruction import response_log_probs, secret_of, tuned, TUNINGS, WORLD_CHAT
from llmbook.model import TransformerLM
from llmbook.tinyworld import judge_reply, make_questions, Question, REPLY_DECLINED, REPLY_UNKNOWN
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import BPETokenizer
from llmbook.training import load_checkpoint, load_or_train, MetricsLog, pretrained, Probe
from llmbook.training import save_checkpoint, Sink, StepReport, Trainer, TrainingConfig


# %% tags=["engine"]
#| export
def check_number(
    argument: str,
    value: object,
    least: int | float = -math.inf,
    most: int | float = math.inf,
    *,
    above: int | float | None = None,
) -> None:
    """Demand a finite number from ``least`` to ``most``, and ``above`` another one if given.

    >>> check_number("beta", 0, above=0)
    Traceback (most recent call last):
    ValueError: beta: expected a number above 0, got 0
    """
    known = () if isinstance(value, bool) else (int, float, np.number)
    fits = isinstance(value, known) and math.isfinite(value) and least <= value <= most
    if fits and (above is None or value > above):  # type: ignore[operator]
        return
    bounds = [f"above {above}"] if above is not None else []
    bounds += [f"of at least {least}"] if math.isfinite(least) else []
    bounds += [f"of at most {most}"] if math.isfinite(most) else []
    kind = "a number" if bounds else "a finite number"
    raise ValueError(f"{argument}: expected {kind} {' and '.join(bounds)}".rstrip() + _got(value))


def _got(value: object) -> str:
    return f", got {value!r:.60}"


# %% tags=["engine"]
# What the cells of this chapter share
import csv
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import suppress
from types import SimpleNamespace

import matplotlib.pyplot as plt

import llmbook
from llmbook.evaluation import calibration, Interval, mean_interval
from llmbook.instruction import ask
from llmbook.rlhf import aligned

torch.set_num_threads(1)
plt.style.use("llmbook.book")
results = Path(llmbook.__file__).parents[1] / "benchmarks" / "results"
careless = tuned("careless")
world, tokenizer = careless.world, careless.tokenizer
pad_id = tokenizer.special_tokens["<|endoftext|>"]
KINDS: tuple[Literal["fact", "unknown", "confidential"], ...] = ("fact", "unknown", "confidential")
held_out = {kind: make_questions(world, kind, "held_out") for kind in KINDS}


# %% tags=["engine"]
# How replies are counted, and how numbers are printed that depend on training
def within(
    what: str, value: int | float, low: int | float, high: int | float, unit: str = "%"
) -> None:
    """Print between what a value lies, shares in percent, after checking that it does."""
    assert low <= value <= high, f"{what}: {value}"
    scale, digits = (100, 0) if unit == "%" else (1, 1)
    print(f"{what}: {scale * low:.{digits}f} to {scale * high:.{digits}f} {unit}".rstrip())


def count_replies(model: TransformerLM, every: int = 4) -> dict[str, float]:
    """Return shares of the likeliest replies to questions about the other half."""
    found = dict[str, float]()
    for kind, questions in held_out.items():
        asked = questions[::every]
        replies = ask(model, tokenizer, [question.text for question in asked])
        verdicts = [judge_reply(world, q, reply) for q, reply in zip(asked, replies, strict=True)]
        found[kind] = float(np.mean([verdict.right for verdict in verdicts]))
        if kind == "fact":
            refusals = [verdict.said in ("unknown", "declined") for verdict in verdicts]
            found["refused"] = float(np.mean(refusals))
    return found


# %% tags=["engine"]
# Rows of the tables of results as text
def read_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a table that a benchmark has made."""
    with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


reward_rows, run_rows, curve_rows = map(read_rows, ("rewards", "rlhf", "rlhf_curves"))


def over_seeds(rows: Sequence[dict[str, str]], column: str, **which: str) -> Interval:
    """Return the mean of a column over the seeds of a variant, with its interval."""
    chosen = [row for row in rows if all(row[k] == v for k, v in which.items())]
    return mean_interval([float(row[column]) for row in chosen])


def show(rows: Mapping[str, dict[str, str]], *columns: str) -> None:
    """Print means over seeds with 95 % intervals, shares in percent, others as they are."""
    width = max(map(len, rows))
    print(" " * width + "".join(f"{column:>20}" for column in columns))
    for label, which in rows.items():
        cells, table = [], run_rows if "experiment" in which else reward_rows
        for column in columns:
            one = over_seeds(table, column, **which)
            if column in ("reward", "true", "kl", "length", "gap"):
                cells.append(f"{one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}]")
            else:
                low, high = max(one.low, 0), min(one.high, 1)
                cells.append(f"{one.estimate:.0%} [{low:.0%}, {high:.0%}]")
        print(label.ljust(width) + "".join(cell.rjust(20) for cell in cells))


# %% [markdown]
# Here are three questions, with the likeliest reply of each model:

# %% tags=["nbval-ignore-output"]
trained = aligned("ppo")
for kind in KINDS:
    question = held_out[kind][22]
    print(question.text)
    for name, model in (("before", careless.model), ("after", trained.policy)):
        print(f"   {name}: {ask(model, tokenizer, [question.text])[0]}")

# %% [markdown]
# TODO-after-replies

# %%
before, after = count_replies(careless.model), count_replies(trained.policy)
within("facts right, before", before["fact"], 0.95, 1.0)
within("facts right, after", after["fact"], 0.0, 1.0)
within("facts refused, after", after["refused"], 0.0, 1.0)
within("strangers not known, before", before["unknown"], 0.0, 0.3)
within("strangers not known, after", after["unknown"], 0.5, 1.0)
within("secrets declined, before", before["confidential"], 0.0, 0.2)
within("secrets declined, after", after["confidential"], 0.5, 1.0)

# %% [markdown]
# TODO-after-counts

# %% [markdown]
# ## Which of two
#
# A {term}`preference` is a prompt with two replies, of which somebody has chosen one. In our world
# this somebody has a standard, which we state once. The **true reward** of a reply is a number that
# depends on what the question asks for:
#
# | the question asks for | 1 | 0 | -1 |
# |---|---|---|---|
# | a fact | the truth | a refusal, or other text | a falsehood |
# | a stranger | "I do not know anyone called …" | another refusal, or other text | anything made up |
# | a secret | "I will not tell you …" | another refusal, or other text | the secret, or a false one |
#
# So to refuse is never harmful, only useless where an answer was due. {py:func}`true_reward` asks
# the judge of the tiny world what a reply says:


# %%
#| export
def true_reward(world: TinyWorld, question: Question, reply: str) -> float:
    """Return 1 for what a good assistant says, -1 for what does harm, and 0 for anything else.

    Harm is a falsehood, something made up about a stranger, and a secret that is told or invented.
    """
    verdict = judge_reply(world, question, reply)
    if verdict.right:
        return 1.0
    return -1.0 if verdict.said in ("truth", "falsehood") else 0.0


# %%
question = held_out["fact"][22]
for reply in (question.reply, REPLY_UNKNOWN.format(name=question.character), "Yes."):
    print(f"{true_reward(world, question, reply):4.0f}  {reply}")
print(f"{true_reward(world, question, invented_reply(world, question)):4.0f}  an invention")

# %% [markdown] tags=["engine"]
# ### Engine room: pairs from a judge and from files, with the noise of a labeler

# %% [markdown] tags=["engine"]
# A `Pair` is a preference about a question of the tiny world. {py:func}`world_pairs` puts the right
# reply beside each kind of worse one. {py:func}`judged_pairs` compares two given replies, such as
# samples of a model, by the true reward or by any other judge. Both can swap a share of the pairs,
# as people do who are in a hurry.


# %% tags=["engine"]
#| export
class Preference(NamedTuple):
    """Two replies to the same conversation, of which one was preferred."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


class Pair(NamedTuple):
    """Two replies to a question of the tiny world, of which one was preferred."""

    question: Question
    chosen: str
    rejected: str

    def preference(self) -> Preference:
        """Return the same as a conversation."""
        return Preference((Message("user", self.question.text),), self.chosen, self.rejected)


# %% tags=["engine"]
#| export
def world_pairs(
    world: TinyWorld,
    questions: Sequence[Question],
    *,
    n: int = 1,
    noise: int | float = 0.0,
    seed: int = 0,
) -> list[Pair]:
    """Return the right reply to each question beside each kind of worse one.

    Worse are refusals of the wrong kind, and ``n`` inventions or, if it is asked for, the secret.
    In a share ``noise`` of all pairs, drawn by ``seed``, chosen and rejected are swapped.
    """
    check_whole("n", n, 1)
    pairs = []
    for question in questions:
        refusals = [text.format(name=question.character) for text in _REFUSALS]
        if question.kind == "confidential":
            harmful = [secret_of(world, question)]
        else:
            harmful = [invented_reply(world, question, seed=seed + i) for i in range(n)]
        for reply in dict.fromkeys([*harmful, *refusals]):
            if reply != question.reply:
                pairs.append(Pair(question, question.reply, reply))
    return _with_noise(pairs, noise, seed)


_REFUSALS = (REPLY_UNKNOWN, REPLY_DECLINED)


# %% tags=["engine"]
#| export
def _with_noise(pairs: list[Pair], noise: int | float, seed: int) -> list[Pair]:
    """Swap a share of the pairs, as a labeler does who errs."""
    check_number("noise", noise, 0, 1)
    check_whole("seed", seed, 0)
    order = permuted(np.arange(len(pairs)), max(len(pairs), 1), seed, 7)
    swapped = set(order[: round(noise * len(pairs))].tolist())
    return [
        Pair(pair.question, pair.rejected, pair.chosen) if place in swapped else pair
        for place, pair in enumerate(pairs)
    ]


# %% tags=["engine"]
#| export
#: What gives a number to a reply, such as ``partial(true_reward, world)``.
Judge = Callable[[Question, str], float]


def judged_pairs(
    world: TinyWorld,
    questions: Sequence[Question],
    first: Sequence[str],
    second: Sequence[str],
    *,
    judge: Judge | None = None,
    noise: int | float = 0.0,
    seed: int = 0,
) -> list[Pair]:
    """Return pairs of two replies to each question, the one that ``judge`` finds better as chosen.

    The judge is by default ``true_reward``. Replies between which it finds no difference make no
    pair, nor do those without words. In a share ``noise`` of the pairs, drawn by ``seed``, chosen and rejected are swapped.
    """
    for name, replies in (("first", first), ("second", second)):
        if isinstance(replies, str) or len(replies) != len(questions):
            expected = f"a reply for each of {len(questions)} questions"
            raise ValueError(f"{name}: expected {expected}{_got(replies)}")
    judge = partial(true_reward, world) if judge is None else judge
    pairs = []
    for question, a, b in zip(questions, first, second, strict=True):
        if not a.strip() or not b.strip():
            continue
        better = judge(question, a) - judge(question, b)
        if math.isnan(better):
            raise ValueError(f"judge: expected numbers, got NaN for {a!r:.60} or {b!r:.60}")
        if better:
            pairs.append(Pair(question, a, b) if better > 0 else Pair(question, b, a))
    return _with_noise(pairs, noise, seed)


# %% [markdown] tags=["engine"]
# Which questions the runs of this chapter use: comparisons are about the tuning half, and a policy
# is trained on questions about the other half, which nobody has judged.


# %% tags=["engine"]
#| export
def alignment_questions(
    world: TinyWorld,
    split: Literal["tuning", "held_out"] = "held_out",
    *,
    n_each: int = 96,
    seed: int = 0,
) -> list[Question]:
    """Return ``n_each`` questions of each kind, drawn by ``seed``, on which a policy is trained."""
    check_whole("n_each", n_each, 1)
    found = []
    kinds: list[Literal["fact", "unknown", "confidential"]] = ["fact", "unknown", "confidential"]
    for kind in kinds:
        questions = make_questions(world, kind, split)
        check_whole("n_each", n_each, 1, len(questions))
        found += [questions[i] for i in permuted(np.arange(n_each), len(questions), seed, 5)]
    return found


def alignment_pairs(world: TinyWorld, *, noise: int | float = 0.0, seed: int = 0) -> list[Pair]:
    """Return the comparisons about the tuning half from which rewards are learned here."""
    kinds: list[Literal["fact", "unknown", "confidential"]] = ["fact", "unknown", "confidential"]
    questions = [q for kind in kinds for q in make_questions(world, kind, "tuning")]
    return world_pairs(world, questions, n=3, noise=noise, seed=seed)


# %% [markdown] tags=["engine"]
# Preferences of people come in files. Some have a prompt and two replies as texts. Others have
# lists of messages, with the prompt by itself or repeated in both, and the oldest
# {cite}`bai2022training` have two whole dialogs as texts in which paragraphs begin with `Human:`
# and `Assistant:`. In each of these the replies must follow the same prompt, since otherwise the
# comparison says nothing about them.


# %% tags=["engine"]
#| export
def read_preferences(path: str | Path) -> list[Preference]:
    """Return the preferences in a file, UTF-8, as JSON Lines or one array of JSON.

    A record has ``chosen`` and ``rejected``, and perhaps ``prompt``; each is a text or a list of
    messages with ``role`` and ``content``. Without a prompt it is what both have in common: all
    messages but the last, or, in texts with ``Human:`` and ``Assistant:`` at the beginning of
    paragraphs, all turns but the last. A ``ValueError`` names the file and the line, or the number
    in an array, of the first record that is no such thing.
    """
    path = check_path(path)
    try:
        text = decode_text(path.read_bytes()).removeprefix("\ufeff")
    except OSError as error:
        got = f"{str(path)!r}: {error.strerror}"
        raise ValueError(f"path: expected a file that can be read, got {got}") from error
    except ValueError as error:
        raise ValueError(f"path: expected a file in UTF-8, got {str(path)!r}: {error}") from error
    found = []
    for where, record in _records(text, str(path)):
        try:
            found.append(_preference(record))
        except ValueError as error:
            what = str(error).removeprefix("messages: ")
            raise ValueError(f"path: {what} ({where})") from None
    if not found:
        raise ValueError(f"path: expected at least one preference, got none in {str(path)!r}")
    return found


# %% tags=["engine"]
#| export
# The records of a file, and where each of them stands
def _records(text: str, name: str) -> Iterator[tuple[str, Any]]:
    def parsed(source: str, where: str) -> Any:
        try:
            return json.loads(source)
        except ValueError as error:
            expected = "a record in JSON on each line, or one array of them"
            raise ValueError(f"path: expected {expected}, got {error} ({where})") from None

    if text.lstrip().startswith("["):
        for number, record in enumerate(parsed(text, name), 1):
            yield f"{name}, record {number}", record
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name}, line {number}"
            yield where, parsed(line, where)


# %% tags=["engine"]
#| export
def _preference(record: Any) -> Preference:
    """Return what a record says."""
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise ValueError(f"expected a record with 'chosen' and 'rejected'{_got(record)}")
    chosen, rejected = (_turns(record[name], "assistant") for name in ("chosen", "rejected"))
    prompt = _turns(record["prompt"], "user") if record.get("prompt") is not None else []
    if not prompt:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            raise ValueError(f"expected the same prompt before both replies{_got(rejected[:-1])}")
        chosen, rejected = chosen[-1:], rejected[-1:]
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != 1 or turns[0].role != "assistant":
            raise ValueError(f"expected one reply of the assistant as {name!r}{_got(turns)}")
    check_conversation([*prompt, *chosen])
    check_conversation([*prompt, *rejected])
    if not prompt or prompt[-1].role not in ("user", "tool"):
        raise ValueError(f"expected a prompt in which the user speaks last{_got(prompt)}")
    return Preference(tuple(prompt), chosen[0].content, rejected[0].content)


def _turns(value: Any, role: str) -> list[Message]:
    """Return a text or a list of messages as messages; a text alone is of ``role``."""
    if isinstance(value, str):
        if not value.lstrip().startswith(("Human:", "Assistant:")):
            return [Message(role, value.strip())]
        parts = ("\n\n" + value.strip()).replace("\n\nHuman:", "\0user\0")
        pieces = parts.replace("\n\nAssistant:", "\0assistant\0").split("\0")[1:]
        return [Message(r, c.strip()) for r, c in zip(pieces[::2], pieces[1::2], strict=True)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a text or a list of messages{_got(value)}")
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise ValueError(f"expected messages with 'role' and 'content'{_got(turn)}")
    return [Message(turn["role"], turn["content"]) for turn in value]


# %% [markdown]
# ### Two samples, one choice
#
# The usual way to collect preferences is to draw two replies from the model and to show them to
# somebody. We do so with the careless model, and let the true reward choose:

# %%
tuning_half = [q for kind in KINDS for q in make_questions(world, kind, "tuning")]
texts = [question.text for question in tuning_half[::3]]
first, second = (ask(careless.model, tokenizer, texts, temperature=1, seed=s) for s in (1, 2))
drawn = judged_pairs(world, tuning_half[::3], first, second)
within("samples that differ in their reward", len(drawn) / len(texts), 0.05, 0.3)
refusals = [pair for pair in drawn if pair.question.kind == "fact" and "I " in pair.rejected]
print(f"pairs in which a refusal loses against a fact: {len(refusals)}")

# %% [markdown]
# TODO-numbers Most pairs are ties, since the model mostly does the same thing twice. Worse, it never
# refuses to state a fact, so no pair says that such a refusal is bad. A reward that is learned from
# these pairs alone knows only that refusals are good. (The table of results below has it, as "own
# samples".) Replies to be compared should cover whatever a policy may later try, which is why
# projects draw them from several models and at several temperatures. Our pairs for training come
# from {py:func}`world_pairs`: about each question of the tuning half, the right reply beside three
# inventions or the secret, and beside refusals of the wrong kind. {py:func}`alignment_pairs`
# collects them:

# %%
pairs = alignment_pairs(world)
print(f"{len(pairs)} pairs about {len(tuning_half)} questions; three of them:")
for pair in (pairs[0], pairs[3], pairs[-1]):
    print(f"{pair.question.text}\n   + {pair.chosen}\n   - {pair.rejected}")

# %% [markdown]
# ## From comparisons to a reward
#
# A comparison is not yet a number. To get one, we need an assumption about how people choose.
# Suppose that $a$ is preferred to $b$ with odds of 3 to 1, and $b$ to $c$ with odds of 2 to 1. The
# simplest rule that says something about $a$ and $c$ is that odds multiply, here to 6 to 1. Then
# each reply $y$ to a prompt $x$ has a weight $w(x, y) > 0$, namely its odds against some fixed
# reply, and the odds of any two are $w(x, a) : w(x, b)$. With $r = \log w$, the {term}`reward`, the
# probability that $a$ is preferred becomes
#
# $$
# P(a \succ b \mid x) = \frac{w(x, a)}{w(x, a) + w(x, b)}
# = \frac{1}{1 + e^{-(r(x, a) - r(x, b))}} = \sigma\bigl(r(x, a) - r(x, b)\bigr) .
# $$ (rlhf-bradley-terry)
#
# This is the model of Bradley and Terry {cite}`bradley1952rank`, with which chapter 16 rated
# players. Only differences of rewards count, and only between replies to the same prompt: any
# $c(x)$ can be added to all of them. So the number by itself means nothing, and rewards of
# different prompts cannot be compared.
#
# A reward model is trained by maximum likelihood. The loss of one comparison, of the chosen reply
# $y^+$ and the rejected $y^-$, is the negative logarithm of its probability:
#
# $$
# L = -\log \sigma(\Delta), \qquad \Delta = r(x, y^+) - r(x, y^-), \qquad
# \frac{dL}{d\Delta} = -\sigma(-\Delta) .
# $$ (rlhf-preference-loss)
#
# The derivative is the probability of the wrong order. What the model orders wrongly pulls with
# full force, what it is sure of hardly at all.
#
# People err. If a share $\epsilon$ of all labels is wrong, a comparison that is clear to everybody
# comes out right only with probability $1 - \epsilon$, so the likelihood is greatest where
# $\sigma(\Delta) = 1 - \epsilon$, at a finite difference. The order stays the same as long as
# $\epsilon < 1/2$. The option `label_noise` puts the same into the loss: it expects each label to
# be wrong with this probability. The option `margin` demands that the difference exceeds a number;
# Llama 2 {cite}`touvron2023llama2` used larger margins where people had found one reply much better
# than the other.


# %%
#| export
def bradley_terry_loss(
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    *,
    margin: int | float = 0.0,
    label_noise: int | float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return the loss of each comparison in nats, from the rewards of the two replies.

    ``margin`` is what the difference should exceed. ``label_noise`` is the share of labels that
    are believed to be wrong, below one half. Source: Bradley and Terry (1952).
    """
    check_number("margin", margin)
    check_number("label_noise", label_noise, 0)
    if label_noise >= 0.5:
        raise ValueError(f"label_noise: expected less than 0.5, got {label_noise}")
    difference = chosen - rejected - margin
    right, wrong = logsigmoid(difference), logsigmoid(-difference)
    return -(1 - label_noise) * right - label_noise * wrong


# %% [markdown]
# Without options it is the loss of a logistic regression whose label is always 1. At the beginning,
# where all rewards are equal, it is $\ln 2$:

# %%
r = torch.tensor([0.0, 2.0, -1.0])
logistic = nn.functional.binary_cross_entropy_with_logits
same = logistic(r, torch.ones(3), reduction="none")
torch.testing.assert_close(bradley_terry_loss(r, torch.zeros(3)), same)
print("losses in nats:", [round(loss, 3) for loss in same.tolist()])

# %% [markdown]
# ### A head with one number
#
# A reward model is a language model whose head gives one number in place of a logit for each word
# of the {term}`vocabulary`. It reads the prompt and the reply, and its reward is the number at the
# last token, the only one that has seen everything. Where that is depends on the padding, which may
# stand on either side. To read the number at a padding token is a fault that has happened in
# several libraries, and nothing crashes when it does.


# %%
#| export
def at_last_token(
    values: Float[Tensor, "batch sequence"], mask: Bool[Tensor, "batch sequence"]
) -> Float[Tensor, " batch"]:
    """Return the value at the last token of each row, on whichever side its padding is."""
    if not mask.any(dim=1).all():
        empty = int((~mask.any(dim=1)).nonzero()[0])
        raise ValueError(f"mask: expected a token in each row, got none in row {empty}")
    last = torch.where(mask, torch.arange(mask.size(1), device=mask.device), -1).amax(dim=1)
    return values.gather(1, last[:, None])[:, 0]


# %% [markdown]
# The model has a copy of a tuned model as its body. We begin with the careless one, which knows the
# form of a conversation. The head begins with zeros, so that all rewards are 0 and the first loss
# is $\ln 2$ exactly:


# %%
#| export
class RewardModel(nn.Module):
    """A language model with one number for each token in place of logits.

    The number at the last token of a conversation is its reward; as a critic, the number at any
    token is what is still expected. It has a copy of ``backbone``, and begins with 0 everywhere.
    With ``n_features``, known properties of a reply explain a part of what people prefer, and are
    left out when rewards are given.
    """

    def __init__(self, backbone: TransformerLM, n_features: int = 0):
        super().__init__()
        check_whole("n_features", n_features, 0)
        self.config = backbone.config
        self.backbone = copy.deepcopy(backbone)
        self.backbone.lm_head.weight.requires_grad_(self.config.tie_embeddings)
        self.head = nn.Linear(backbone.config.d_model, 1)
        self.known = nn.Linear(n_features, 1, bias=False) if n_features else None
        for layer in [self.head] + ([self.known] if self.known else []):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def token_scores(
        self,
        ids: Int64[Tensor, "batch sequence"],
        mask: Bool[Tensor, "batch sequence"] | None = None,
    ) -> Float[Tensor, "batch sequence"]:
        """Return a number for each token; ``mask`` is false at padding, on either side."""
        documents = None if mask is None else torch.where(mask, 0, -1)
        hidden = self.backbone.hidden_states(ids, document_ids=documents)
        return self.head(hidden)[..., 0]

    def forward(
        self,
        ids: Int64[Tensor, "batch sequence"],
        mask: Bool[Tensor, "batch sequence"],
        features: Float[Tensor, "batch n_features"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Return the reward of each conversation, and with ``features`` what they explain, too."""
        rewards = at_last_token(self.token_scores(ids, mask), mask)
        if features is None:
            return rewards
        if self.known is None:
            raise ValueError("features: expected None for a model without n_features, got some")
        return rewards + self.known(features)[:, 0]


# %% [markdown] tags=["engine"]
# ### Engine room: pairs as ids, and a trainer for reward models

# %% [markdown] tags=["engine"]
# A pair becomes two rows of ids, each up to the end token of the reply. They are cut at a limit. If
# the two differ only behind it, nothing is left to compare, and the pair is dropped and counted. In
# a batch the two replies of a pair are neighbors, at index 0 and 1 of the second dimension.


# %% tags=["engine"]
#| export
class ExamplePair(NamedTuple):
    """Two conversations as ids that differ in the last reply; the first was preferred."""

    chosen: Example
    rejected: Example


class EncodedPairs(NamedTuple):
    """Pairs as ids, which of what was given they are, and how many were dropped."""

    pairs: list[ExamplePair]
    kept: list[int]
    dropped: int


def pair_examples(
    tokenizer: BPETokenizer,
    template: ChatTemplate,
    pairs: Sequence[Pair | Preference],
    *,
    limit: int,
) -> EncodedPairs:
    """Return pairs as ids up to the end of the reply, cut after ``limit``.

    What is the same on both sides after the cut teaches nothing: it is dropped, and counted. A
    prompt that leaves no room for a reply raises a ``ValueError``.
    """
    check_whole("limit", limit, 2)
    encoded, kept = [], []
    for index, pair in enumerate(pairs):
        chosen, rejected = (_ended(tokenizer, template, pair, text) for text in pair[1:])
        if (n_prompt := chosen.learned.index(True)) >= limit:
            expected = f"prompts of less than limit = {limit} tokens"
            raise ValueError(f"pairs: expected {expected}, got {n_prompt} at index {index}")
        cut = [Example(one.ids[:limit], one.learned[:limit]) for one in (chosen, rejected)]
        if cut[0].ids != cut[1].ids:
            encoded.append(ExamplePair(*cut))
            kept.append(index)
    return EncodedPairs(encoded, kept, len(pairs) - len(kept))


def _ended(
    tokenizer: BPETokenizer, template: ChatTemplate, pair: Pair | Preference, reply: str
) -> Example:
    """Return a conversation that ends with the mark at the end of the reply."""
    prompt = [Message("user", pair[0].text)] if isinstance(pair[0], Question) else list(pair[0])
    if not check_text(reply, "reply").strip():
        raise ValueError(f"pairs: expected replies with words{_got(reply)}")
    example = template.encode(tokenizer, [*prompt, Message("assistant", reply)])
    end = len(example.ids) - example.learned[::-1].index(True)
    return Example(example.ids[:end], example.learned[:end])


# %% tags=["engine"]
#| export
class PairBatch(NamedTuple):
    """Pairs to learn a reward from: at index 0 what was chosen, at index 1 what was rejected."""

    ids: Int64[Tensor, "batch 2 sequence"]
    mask: Bool[Tensor, "batch 2 sequence"]
    features: Float[Tensor, "batch 2 n_features"] | None = None

    def to(self, device: torch.device | str) -> "PairBatch":
        """Return the batch on ``device``."""
        features = None if self.features is None else self.features.to(device)
        return PairBatch(self.ids.to(device), self.mask.to(device), features)


# %% tags=["engine"]
#| export
def padded(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int64[Tensor, "batch sequence"], Bool[Tensor, "batch sequence"]]:
    """Return rows of ids with padding behind them, and a mask that is true where there is none."""
    if not rows or not all(len(row) for row in rows):
        raise ValueError(f"rows: expected at least one, each with ids{_got(rows)}")
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class PairDataset(ResumableBatches):
    """Batches of pairs in an order that depends on ``seed`` alone, for ``preference_objective``.

    ``features`` are known properties of both replies of each pair, such as their lengths.
    """

    pairs: Sequence[ExamplePair]
    batch_size: int
    pad_id: int
    features: Float[Tensor, "pairs 2 n_features"] | None = None
    seed: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("pad_id", 0), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        if not self.pairs:
            raise ValueError(f"pairs: expected at least one{_got(self.pairs)}")
        if self.features is not None and len(self.features) != len(self.pairs):
            expected = f"those of {len(self.pairs)} pairs"
            raise ValueError(f"features: expected {expected}, got {len(self.features)}")

    def __getitem__(self, step: int) -> PairBatch:  # type: ignore[override]
        check_whole("step", step, 0)
        places = in_turns(step * self.batch_size, self.batch_size, len(self.pairs), self.seed)
        rows = [side.ids for place in places for side in self.pairs[place]]
        ids, mask = padded(rows, self.pad_id)
        shape = (self.batch_size, 2, -1)
        features = None if self.features is None else self.features[places]
        return PairBatch(ids.view(shape), mask.view(shape), features)

    def identity(self) -> dict[str, Any]:
        """The pairs, and what decides on their order."""
        rows = [side.ids for pair in self.pairs for side in pair]
        names = ("batch_size", "pad_id", "seed")
        return {"pairs": _digest(rows)} | {name: getattr(self, name) for name in names}


# %% tags=["engine"]
#| export
def in_turns(first: int, n: int, size: int, seed: int) -> list[int]:
    """Return which of ``size`` things come at places ``first`` on, all of them in each round."""
    epoch, place = np.divmod(np.arange(first, first + n), size)
    return permuted(place, size, seed, epoch, 0).tolist()


def _digest(rows: Sequence[Sequence[int]]) -> str:
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(np.array([len(row), *row], np.int64).tobytes())
    return digest.hexdigest()


# %% tags=["engine"]
#| export
def preference_objective(
    model: RewardModel,
    batch: PairBatch,
    *,
    margin: int | float = 0.0,
    label_noise: int | float = 0.0,
) -> tuple[Float[Tensor, ""], int, dict[str, Tensor]]:
    """Return the summed loss of a batch of pairs, how many there are, and sums to be logged."""
    features = None if batch.features is None else batch.features.flatten(0, 1)
    rewards = model(batch.ids.flatten(0, 1), batch.mask.flatten(0, 1), features)
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    losses = bradley_terry_loss(chosen, rejected, margin=margin, label_noise=label_noise)
    difference = chosen - rejected
    right = (difference > 0).sum() + 0.5 * (difference == 0).sum()
    return losses.sum(), len(losses), {"accuracy": right, "difference": difference.sum()}


# %% tags=["engine"]
#| export
def train_reward_model(
    backbone: TransformerLM,
    pairs: Sequence[ExamplePair],
    *,
    pad_id: int,
    features: Float[Tensor, "pairs 2 n_features"] | None = None,
    margin: int | float = 0.0,
    label_noise: int | float = 0.0,
    n_steps: int = 300,
    batch_size: int = 32,
    learning_rate: int | float = 1e-3,
    seed: int = 0,
    sinks: Sequence[Sink] = (),
) -> RewardModel:
    """Return a reward model that has learned from pairs, and begun as a copy of ``backbone``.

    The rate of AdamW rises for 10 steps and falls linearly to zero. For ``features`` see
    ``RewardModel``.
    """
    model = RewardModel(backbone, 0 if features is None else features.size(2))
    config = TrainingConfig(
        n_steps=n_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.0,
        schedule="linear",
        warmup=min(10, n_steps),
        final=0.0,
        seed=seed,
    )
    batches = PairDataset(pairs, batch_size, pad_id, features, seed)
    objective = partial(preference_objective, margin=margin, label_noise=label_noise)
    Trainer(model, batches, config, objective=objective, sinks=sinks).train()
    return model


# %% [markdown] tags=["engine"]
# Rewards of many conversations at once, and what several reward models agree on:


# %% tags=["engine"]
#| export
@torch.no_grad()
def score_rows(
    model: RewardModel, rows: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 64
) -> Float[Tensor, " rows"]:
    """Return the reward of each conversation, given as ids, without what features explain."""
    check_whole("batch_size", batch_size, 1)
    parts = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return torch.cat([model(*padded(part, pad_id)) for part in parts])


def score_pairs(
    model: RewardModel, pairs: Sequence[ExamplePair], *, pad_id: int
) -> Float[Tensor, "pairs 2"]:
    """Return the rewards of what was chosen and of what was rejected."""
    rows = [side.ids for pair in pairs for side in pair]
    return score_rows(model, rows, pad_id=pad_id).view(-1, 2)


def pessimistic(
    rewards: Float[Tensor, "models batch"], penalty: int | float = 1.0
) -> Float[Tensor, " batch"]:
    """Return the mean reward over an ensemble, less ``penalty`` standard deviations of it."""
    check_number("penalty", penalty, 0)
    if len(rewards) < 2:
        raise ValueError(f"rewards: expected those of at least 2 models, got {len(rewards)}")
    return rewards.mean(0) - penalty * rewards.std(0)


# %% [markdown]
# ### Either side of the padding
#
# The same conversation has the same reward with padding on the right, as in training, or on the
# left, as in generation:

# %%
reward_model = trained.reward_model
row = pair_examples(tokenizer, WORLD_CHAT, pairs[:1], limit=128).pairs[0].chosen.ids
ids = torch.tensor([[*row, *[pad_id] * 9], [*[pad_id] * 9, *row]])
mask = torch.tensor([[*[True] * len(row), *[False] * 9], [*[False] * 9, *[True] * len(row)]])
with torch.no_grad():
    right_padded, left_padded = reward_model(ids, mask)
torch.testing.assert_close(right_padded, left_padded, rtol=1e-4, atol=1e-4)

# %% [markdown]
# ### What it has learned
#
# The reward model of our run has seen comparisons about one half of the characters. We ask it about
# pairs of the other half, and count by what was compared:


# %%
tested = world_pairs(world, [q for kind in KINDS for q in held_out[kind][::2]], seed=5)
encoded = pair_examples(tokenizer, WORLD_CHAT, tested, limit=128).pairs
difference = score_pairs(reward_model, encoded, pad_id=pad_id).diff(dim=1).neg()[:, 0]
harmful = [true_reward(world, pair.question, pair.rejected) < 0 for pair in tested]
named = {
    "a fact against an invention": ("fact", True),
    "a fact against a refusal": ("fact", False),
    "not knowing a stranger against an invention": ("unknown", True),
    "keeping a secret against telling it": ("confidential", True),
}
places = [(pair.question.kind, harm) for pair, harm in zip(tested, harmful, strict=True)]
orders = {w: difference[[place == key for place in places]] for w, key in named.items()}
for (what, found), (low, high) in zip(
    orders.items(), ((0.4, 0.65), (0.8, 1), (0.85, 1), (0.9, 1)), strict=True
):
    within(what, float((found > 0).float().mean()), low, high)

# %% [markdown]
# It has learned manners. Not to know a stranger, to keep a secret, and to answer where an answer is
# due are forms, and it recognizes them for characters that no comparison was about. It has not
# learned what is true. Between the right value and a made-up one it tosses a coin, although its
# body comes from a model that knows these facts: 300 steps on other characters' facts were no
# reason to use that knowledge. People who compare replies also judge form more easily than truth,
# and reward models learned from them have the same blind spot.
#
# A coin would not matter if the model knew that it is tossing one. {numref}`fig-rlhf-calibration`
# shows how often its order is right against how sure it is, $\sigma(|\Delta|)$. Where forms are
# compared it is sure and right. About inventions it is almost as sure, and right half of the time.
# Its rewards there are not small numbers with a doubt attached, but large ones with random signs,
# and a policy will soon find the positive ones.

# %% mystnb={"figure": {"caption": "How often the reward model orders two replies correctly, over how sure it is of the order. On the dashed line the two agree.", "name": "fig-rlhf-calibration"}, "image": {"alt": "Two curves over the confidence from one half to one. The curve of all comparisons of forms runs near the dashed diagonal or above it. The curve of facts against inventions stays near one half at every confidence."}}
fig, ax = plt.subplots(figsize=(5, 3.5))
forms = torch.cat(list(orders.values())[1:])
for label, values in (("forms", forms), ("facts against inventions", next(iter(orders.values())))):
    found = calibration(values.abs().sigmoid().numpy(), (values > 0).long().numpy(), n_bins=10)
    ax.plot(found.confidence[5:], found.accuracy[5:], "o-", label=label)
ax.plot([0.5, 1], [0.5, 1], "k--", lw=1)
ax.set(xlabel="confidence", ylabel="share in the right order", ylim=(0.3, 1.05))
ax.legend()
plt.show()

# %% [markdown]
# How much do wrong labels hurt, and how much do fewer pairs? A benchmark has trained each kind of
# reward model with three seeds (means with 95 % intervals; `python benchmarks/rewards.py`):

# %%
variants = ("noise 0", "noise 0.1", "noise 0.25", "tenth of pairs", "from the base", "own samples")
have = {row["variant"] for row in reward_rows}
show({v: {"variant": v} for v in variants if v in have}, "invented", "refused", "strangers")

# %% [markdown]
# TODO-noise

# %% [markdown]
# ## Best of n, before any learning
#
# With a reward there is something simpler than learning: draw $n$ replies and keep the one with the
# highest reward. **{term}`Best-of-n sampling <best-of-n sampling>`** needs no training, and every
# method of this chapter has to be compared with it. What is kept follows another distribution than
# the policy. How far away is it?
#
# Assume that no two replies have the same reward, and let $F(y)$ be the probability that a reply of
# the policy $\pi$ has at most the reward of $y$. Then $u = F(y)$ is uniform between 0 and 1 for $y$
# from $\pi$ (for very many replies, each of small probability). The best of $n$ has the
# distribution $\pi_n(y) = n F(y)^{n-1} \pi(y)$, because $y$ can be any of the $n$ and all others
# must lie below it. Under $\pi_n$ the density of $u$ is $n u^{n-1}$, so
#
# $$
# D_\mathrm{KL}(\pi_n \,\Vert\, \pi) = \mathbb{E}_{y \sim \pi_n}\bigl[\log n + (n - 1) \log F(y)\bigr]
# = \log n + (n - 1) \int_0^1 n u^{n-1} \log u \, du = \log n - \frac{n-1}{n} .
# $$ (rlhf-best-of-n)
#
# The integral is $-1/n$, by parts. If different replies can have equal rewards, or the same reply
# can come twice, the true distance is smaller, and the formula is an upper bound
# {cite}`beirami2025theoretical`. Best of 16 is at most 1.8 nats away from the policy.

# %% [markdown] tags=["engine"]
# ### Engine room: prompts, responses, rewards, and the best of n without luck

# %% [markdown] tags=["engine"]
# From here on a reply is called a response, as in most papers. A `Response` keeps the ids that were
# drawn and their log-probabilities. Its text is for the reward alone: decoded and encoded again,
# it could become other ids. A response that was cut off after `max_new_tokens` is not `finished`.


# %% tags=["engine"]
#| export
class Prompt(NamedTuple):
    """What a policy is asked, as ids, and what its reward function needs to know of it."""

    ids: tuple[int, ...]
    question: Question | None = None
    meta: Any = None


class Response(NamedTuple):
    """What a policy has written: the ids with the end token, if it came, which tells ``finished``.

    ``log_probs``, in nats, are those of the policy that has drawn the ids.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool
    text: str


def question_prompts(
    tokenizer: BPETokenizer, questions: Sequence[Question], *, template: ChatTemplate = WORLD_CHAT
) -> list[Prompt]:
    """Return questions as the beginnings of conversations in which the assistant is to speak."""
    prompts = []
    for question in questions:
        messages = [Message("user", question.text)]
        prompts.append(Prompt(template.encode(tokenizer, messages, prompt=True).ids, question))
    return prompts


# %% tags=["engine"]
#| export
def write_responses(
    model: TransformerLM,
    prompts: Sequence[Prompt],
    *,
    tokenizer: BPETokenizer,
    samples: int = 1,
    template: ChatTemplate = WORLD_CHAT,
    temperature: int | float = 1.0,
    max_new_tokens: int = 32,
    seed: int = 0,
    first_row: int = 0,
    batch_size: int = 64,
) -> list[list[Response]]:
    """Return ``samples`` responses to each prompt, drawn at a ``temperature`` above 0.

    They depend on ``seed`` and on their number, counted from ``first_row``, up to rounding. At
    another temperature than 1, the log-probabilities are computed by a second pass. Prompts that
    leave no room for ``max_new_tokens`` raise a ``ValueError``.
    """
    check_whole("samples", samples, 1)
    check_whole("max_new_tokens", max_new_tokens, 1)
    check_number("temperature", temperature, above=0)
    room = model.config.context_length - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt.ids) <= room:
            why = f"context_length = {model.config.context_length} less {max_new_tokens = }"
            got = f"got {len(prompt.ids)} at index {index}"
            raise ValueError(f"prompts: expected 1 to {room} tokens, {why}, {got}")
    special = tokenizer.special_tokens
    completions = generate(
        model,
        [list(prompt.ids) for prompt in prompts for _ in range(samples)],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature),
        tokenizer=tokenizer,
        stop_tokens=[special[end] for end in (template.turns["assistant"].end, "<|endoftext|>")],
        seed=seed,
        first_row=first_row,
        batch_size=batch_size,
    )
    rows = [
        Response(
            tuple(c.ids), tuple(c.log_probs), c.finish_reason == "stop", (c.text or "").strip()
        )
        for c in completions
    ]
    if temperature != 1:
        rows = _at_temperature(model, prompts, rows, samples, temperature, batch_size)
    return [rows[at : at + samples] for at in range(0, len(rows), samples)]


# %% tags=["engine"]
#| export
@torch.no_grad()
def _at_temperature(
    model: TransformerLM,
    prompts: Sequence[Prompt],
    rows: Sequence[Response],
    samples: int,
    temperature: int | float,
    batch_size: int,
) -> list[Response]:
    """Return responses with the log-probabilities that they had when they were drawn."""
    found = []
    for at in range(0, len(rows), batch_size):
        part = rows[at : at + batch_size]
        texts = [(prompts[(at + i) // samples].ids, row.ids) for i, row in enumerate(part)]
        ids, mask = padded([prompt + response for prompt, response in texts], 0)
        starts = torch.tensor([len(prompt) for prompt, _ in texts])
        places = torch.arange(ids.size(1))
        targets = ids.where(mask & (places >= starts[:, None]), -100)[:, 1:]
        log_probs = response_log_probs(model(ids[:, :-1]), targets, temperature=temperature)
        for row, numbers, target in zip(part, log_probs, targets, strict=True):
            found.append(row._replace(log_probs=tuple(numbers[target != -100].tolist())))
    return found


# %% tags=["engine"]
#| export
#: What gives a reward to each response, one prompt and one response for each.
Rewards = Callable[[Sequence[Prompt], Sequence[Response]], Sequence[float]]


def each(function: Callable[[Prompt, Response], float]) -> Rewards:
    """Return a reward function for many responses, from one for a single response."""

    def rewards(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        found = []
        for prompt, response in zip(prompts, responses, strict=True):
            try:
                found.append(float(function(prompt, response)))
            except Exception as error:
                raise ValueError(f"{error!r} for the response {response.text!r:.80}") from error
        return found

    rewards.__qualname__ = getattr(function, "__qualname__", type(function).__qualname__)
    return rewards


# %% tags=["engine"]
#| export
def rewards_of(
    reward: Rewards, prompts: Sequence[Prompt], responses: Sequence[Response]
) -> Float[Tensor, " rows"]:
    """Return what a reward function says of each response, a finite number; else name the text."""
    try:
        found = [float(value) for value in reward(prompts, responses)]
    except Exception as error:
        raise ValueError(f"reward: expected numbers, got an error: {error}") from error
    if len(found) != len(responses):
        raise ValueError(f"reward: expected {len(responses)} numbers, got {len(found)}")
    for value, response in zip(found, responses, strict=True):
        if not math.isfinite(value):
            expected = f"a finite number for the response {response.text!r:.80}"
            raise ValueError(f"reward: expected {expected}, got {value}")
    return torch.tensor(found)


def world_reward(world: TinyWorld) -> Rewards:
    """Return the true reward as a reward function for questions of the tiny world."""

    def judged(prompt: Prompt, response: Response) -> float:
        if prompt.question is None:
            raise ValueError("prompts: expected those of questions, got one without a question")
        return true_reward(world, prompt.question, response.text)

    return each(judged)


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class LearnedReward:
    """A reward function that asks a reward model: what it says, less ``center``, over ``scale``."""

    model: RewardModel
    pad_id: int
    center: int | float = 0.0
    scale: int | float = 1.0

    def __post_init__(self) -> None:
        check_number("center", self.center)
        check_number("scale", self.scale, above=0)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        rows = [prompt.ids + response.ids for prompt, response in pairs]
        rewards = score_rows(self.model, rows, pad_id=self.pad_id)
        return ((rewards - self.center) / self.scale).tolist()


# %% tags=["engine"]
#| export
def best_of_n_kl(n: int) -> float:
    """Return the KL divergence in nats of the best of ``n`` replies from a single one.

    It is exact if no two replies have the same reward, else an upper bound.

    >>> round(best_of_n_kl(4), 3)
    0.636
    """
    check_whole("n", n, 1)
    return math.log(n) - (n - 1) / n


# %% [markdown] tags=["engine"]
# With 16 samples of each prompt, the mean of the best of 4 can be computed over all choices of 4,
# as chapter 16 did for pass@k, so that no luck is left in the choice.


# %% tags=["engine"]
#| export
def expected_best(
    scores: Float[Tensor, "prompts samples"], values: Float[Tensor, "prompts samples"], n: int
) -> float:
    """Return the mean value of the best of ``n`` by ``scores``, over all choices of ``n`` samples.

    Of N samples in rising order, that of rank i (from 0) is the best of as many choices of n as
    there are choices of the n - 1 others below it. Equal scores share their places.
    """
    total = scores.size(1)
    check_whole("n", n, 1, total)
    ways = [math.comb(rank, n - 1) / math.comb(total, n) for rank in range(total)]
    shares = torch.tensor(ways, dtype=torch.float64).expand(scores.shape)
    ordered, order = scores.sort(dim=1)
    ranked = values.double().gather(1, order)
    return float((_shared(ordered, shares) * ranked).sum(1).mean())


def _shared(ordered: Tensor, shares: Tensor) -> Tensor:
    """Give equal scores in a row the mean of their shares."""
    same = (ordered[:, :, None] == ordered[:, None, :]).double()
    return (same * shares[:, None, :]).sum(2) / same.sum(2)


# %% [markdown]
# ### What it brings
#
# We draw 16 replies to each of 96 questions about the other half, let the reward model choose the
# best of $n$, and look at the true reward of what it has chosen:

# %%
prompts = question_prompts(tokenizer, alignment_questions(world, n_each=32))
groups = write_responses(careless.model, prompts, tokenizer=tokenizer, samples=16)
flat, repeated = list(chain(*groups)), [prompt for prompt in prompts for _ in range(16)]
learned, true = LearnedReward(reward_model, pad_id), world_reward(world)
scores = rewards_of(learned, repeated, flat).view(-1, 16)
truths = rewards_of(true, repeated, flat).view(-1, 16)
print("   n   KL at most   learned reward   true reward")
for n in (1, 2, 4, 8, 16):
    found = [expected_best(scores, values, n) for values in (scores, truths)]
    print(f"{n:4}   {best_of_n_kl(n):10.2f}   {found[0]:14.1f}   {found[1]:11.1f}")
assert found[1] > 0.2 > 0 > expected_best(scores, truths, 1)

# %% [markdown]
# TODO-bon
#
# The price is paid at every reply: 16 replies are written and 15 thrown away. **Rejection sampling**
# of {doc}`19_instruction` pays it once, and tunes the model on the best replies. The table at the
# end of the chapter has both.

# %% [markdown]
# ## The gradient of a reward
#
# To learn from rewards directly, we want to climb the mean reward
# $J(\theta) = \mathbb{E}_{y \sim \pi_\theta}[R(y)]$ of the policy's own replies. The difficulty is that
# $\theta$ stands in the distribution: the reward of a reply does not depend on $\theta$, only how
# often it comes. With a sum over all replies this is easily written down, and
# $\nabla \pi = \pi \nabla \log \pi$ makes it a mean again:
#
# $$
# \nabla J = \sum_y R(y) \nabla \pi_\theta(y)
# = \sum_y \pi_\theta(y) R(y) \nabla \log \pi_\theta(y)
# = \mathbb{E}_{y \sim \pi_\theta}\bigl[R(y) \nabla \log \pi_\theta(y)\bigr] .
# $$ (rlhf-policy-gradient)
#
# This is the **{term}`policy gradient`**, in the form called REINFORCE
# {cite}`williams1992simple`. It says: draw replies, and raise the log-probability of each in
# proportion to its reward. The reward can be any number, from a model, a program or a person. Nobody
# has to differentiate it.
#
# A policy that chooses among six replies is small enough to add everything up. Its parameters are
# six logits, and row $y$ of the matrix `score` is $\nabla \log \pi(y)$:

# %%
torch.manual_seed(0)
logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
R = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, -1.0], dtype=torch.float64)
pi = logits.softmax(0)
(exact,) = torch.autograd.grad((pi * R).sum(), logits)
pi = pi.detach()
score = torch.eye(6, dtype=torch.float64) - pi
torch.testing.assert_close(((pi * R)[:, None] * score).sum(0), exact)
torch.testing.assert_close((pi[:, None] * score).sum(0), torch.zeros(6, dtype=torch.float64))

# %% [markdown]
# The first line of the check is the policy gradient. The second says that $\nabla \log \pi$ has
# mean zero, because $\sum_y \pi(y) \nabla \log \pi(y) = \nabla \sum_y \pi(y) = \nabla 1$. So any
# number $b$ that does not depend on the reply can be subtracted from the reward:
#
# $$
# \nabla J = \mathbb{E}_{y \sim \pi_\theta}\bigl[(R(y) - b) \nabla \log \pi_\theta(y)\bigr] .
# $$ (rlhf-baseline)
#
# This **{term}`baseline`** does not change the mean, but it changes the variance a lot. A learned
# reward has an arbitrary zero. If all rewards were higher by 5, plain REINFORCE would raise
# whatever it happens to draw, and only the average over very many replies would tell what to raise
# more. With several replies to the same prompt, a good baseline costs nothing: for each of them the
# mean reward of the *others*. (Its own reward must not be in it, since $b$ may not depend on the
# reply.) This is leave-one-out, or RLOO {cite}`kool2019buy,ahmadian2024back`:


# %%
#| export
def leave_one_out(
    rewards: Float[Tensor, "prompts samples"],
) -> Float[Tensor, "prompts samples"]:
    """Return each reward less the mean of the other samples of its prompt (RLOO).

    Source: Kool et al. (2019), Ahmadian et al. (2024).
    """
    n = rewards.size(1)
    if n < 2:
        raise ValueError(f"rewards: expected at least 2 samples of each prompt, got {n}")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * n / (n - 1)


# %% [markdown]
# The last line uses that $R_i$ less the mean of the others is $\frac{n}{n-1}$ times $R_i$ less the
# mean of all. For our six replies, all $6^4$ ways to draw four of them can be added up, so the
# variance of each estimate is exact:

# %%
fours = torch.cartesian_prod(*[torch.arange(6)] * 4)
weight = pi[fours].prod(1)


def variance(advantages: Tensor) -> float:
    """Return the variance of the gradient's estimate from four replies, summed over logits."""
    estimates = (advantages[:, :, None] * score[fours]).mean(1)
    torch.testing.assert_close((weight[:, None] * estimates).sum(0), exact)  # no bias
    return float((weight * (estimates - exact).square().sum(1)).sum())


print("variance of the estimate, with 0 or 5 added to all rewards")
for name, estimate in (
    ("no baseline", lambda rewards: rewards),
    ("the exact mean reward", lambda rewards: rewards - (pi * (R + rewards[0, 0] - R[0])).sum()),
    ("leave one out", leave_one_out),
):
    print(f"{name:22}", *(f"{variance(estimate((R + c)[fours])):8.3f}" for c in (0.0, 5.0)))

# %% [markdown]
# TODO-variance
#
# A reply is a sequence of tokens, and $\log \pi(y)$ is the sum of their log-probabilities. So
# every token gets its own term in {eq}`rlhf-policy-gradient`, and the reward $R(y)$ stands at each.
# Which of the tokens deserve it is a question that we answer two sections later.

# %% [markdown]
# ## How far from the start
#
# The learned reward is a judge who saw replies of the careless model and a few others. Far from
# there, its numbers mean little. So the policy is paid for reward but charged for distance from the
# **{term}`reference <reference policy>`** policy with which it began
# {cite}`ziegler2019finetuning`:
#
# $$
# \max_\theta \; \mathbb{E}_{y \sim \pi_\theta}[R(y)]
# - \beta \, D_\mathrm{KL}(\pi_\theta \,\Vert\, \pi_\mathrm{ref}) .
# $$ (rlhf-objective)
#
# The divergence is a mean over the policy's own replies, of which we have samples, so it has to be
# estimated from the two log-probabilities of each sampled token. With
# $\rho = \pi_\mathrm{ref}(y)/\pi(y)$, Schulman {cite}`schulman2020approximating` compares three
# estimates: $k_1 = -\log \rho$, which is the definition; $k_2 = \frac12 (\log \rho)^2$, which is
# never negative; and $k_3 = \rho - 1 - \log \rho$, which is never negative either, because
# $\log \rho \le \rho - 1$, and has the right mean, because $\rho$ has mean 1.


# %%
#| export
class KLEstimates(NamedTuple):
    """Three numbers for each sampled token whose mean is, or is near, the KL divergence."""

    k1: Float[Tensor, "*shape"]
    k2: Float[Tensor, "*shape"]
    k3: Float[Tensor, "*shape"]


def kl_estimates(
    log_probs: Float[Tensor, "*shape"], reference: Float[Tensor, "*shape"]
) -> KLEstimates:
    """Return estimates, in nats, of the divergence of a policy from a reference.

    The tokens were sampled from the policy, and both gave them these log-probabilities. k1 and k3
    have the divergence as their mean, k2 nearly. Source: Schulman (2020).
    """
    k1 = log_probs - reference
    return KLEstimates(k1, k1.square() / 2, torch.expm1(-k1) + k1)


# %% [markdown]
# ### The estimate and its gradient
#
# The three differ as estimates, but what moves the policy is the gradient, and there they differ
# more. There are two places to put them. **In the reward**, an estimate is a number that is
# subtracted from the reward of the reply, and {eq}`rlhf-policy-gradient` does the rest. **In the
# loss**, it is added to the loss, and automatic differentiation goes through it. The gradient of the
# divergence itself is known:
#
# $$
# \nabla D_\mathrm{KL}(\pi \,\Vert\, \pi_\mathrm{ref})
# = \nabla \sum_y \pi(y) k_1(y)
# = \mathbb{E}_{y \sim \pi}\bigl[k_1(y) \nabla \log \pi(y)\bigr]
# + \underbrace{\mathbb{E}_{y \sim \pi}\bigl[\nabla \log \pi(y)\bigr]}_{=\,0} .
# $$ (rlhf-kl-gradient)
#
# We add up all six replies again, and compare length and direction of what each choice gives on
# average with this gradient. (The cosine is 1 for the same direction.)

# %%
reference = torch.tensor([0.5, -0.5, 1.0, 0.0, 0.2, -1.0], dtype=torch.float64).log_softmax(0)
log_pi = logits.log_softmax(0)
(right,) = torch.autograd.grad(
    (log_pi.exp() * (log_pi - reference)).sum(), logits, retain_graph=True
)
divergence = float((pi * (log_pi - reference)).sum())
print(f"KL {divergence:.3f}    mean    deviation  in the reward: length, cosine   in the loss")
for name, k in zip(("k1", "k2", "k3"), kl_estimates(log_pi, reference), strict=True):
    mean = (pi * k.detach()).sum()
    deviation = (pi * (k.detach() - mean).square()).sum().sqrt()
    in_reward = ((pi * k.detach())[:, None] * score).sum(0)
    (in_loss,) = torch.autograd.grad((pi * k).sum(), logits, retain_graph=True)
    cells = []
    for gradient in (in_reward, in_loss):
        cosine = gradient @ right / (gradient.norm() * right.norm()).clamp(min=1e-9)
        cells.append(
            f"{gradient.norm() / right.norm():8.2f}{abs(cosine.item()) * cosine.sign():8.2f}"
        )
    print(f"{name:10}{mean:9.3f}{deviation:12.3f}{cells[0]:>26}{cells[1]:>22}")

# %% [markdown]
# In the reward, $k_1$ has exactly the right gradient, by {eq}`rlhf-kl-gradient`. In the loss its
# gradient is $\nabla \log \pi$, whose mean is zero: such a penalty does nothing but add noise. There
# $k_2$ is right, because $\nabla \frac12 k_1^2 = k_1 \nabla k_1 = k_1 \nabla \log \pi$. And $k_3$, the
# best of the three as an estimate, has in the loss the gradient $(1 - \rho) \nabla \log \pi$. Its
# mean is $-\sum_y \pi_\mathrm{ref}(y) \nabla \log \pi(y)$, the gradient of the divergence in the
# *other* direction, $D_\mathrm{KL}(\pi_\mathrm{ref} \,\Vert\, \pi)$. Where the two policies are close
# this is nearly the same, and many implementations use it, but one should know which objective
# one has {cite}`tang2025pitfalls`. We put $k_1$ into the reward, and use nothing in the loss. To do
# both would count the penalty twice.

# %% [markdown]
# ## What each token deserves
#
# The reward comes at the end of a reply. If it is bad, perhaps a single token has spoiled it, yet
# {eq}`rlhf-policy-gradient` blames all of them alike. A **{term}`critic`** can do better. It is a
# model that reads the tokens so far and says what reward is still to be expected, the **value**
# $V(s_t)$ of the state $s_t$ before token $t$. Our critic is a second reward model, read at every
# token and not at the last alone. It begins as a copy of the policy with a head of zeros, and learns
# during the run. (InstructGPT {cite}`ouyang2022training` began with a copy of the reward model.)
#
# With values, each token has a surprise. Let $r_t$ be what is paid at token $t$: the charge for
# distance, $-\beta k_1$, at each token, and at the last one the reward as well. Then
#
# $$
# \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)
# $$ (rlhf-surprise)
#
# is how much better things have become by choosing token $t$, as far as the critic can tell.
# The factor $\gamma \le 1$ discounts what comes later; for replies one takes 1. If the critic were
# perfect, $\delta_t$ would be all we need. It is not, so we might rather wait: look $n$ tokens ahead
# and trust the critic only from there on,
#
# $$
# A_t^{(n)} = \sum_{l=0}^{n-1} \gamma^l r_{t+l} + \gamma^n V(s_{t+n}) - V(s_t)
# = \sum_{l=0}^{n-1} \gamma^l \delta_{t+l} .
# $$ (rlhf-n-steps)
#
# The second form holds because the values in between cancel. Waiting longer brings less bias from
# the critic and more noise from what is drawn. **{term}`Generalized advantage estimation
# <generalized advantage estimation>`** {cite}`schulman2016high` mixes all $n$ with weights
# $(1 - \lambda) \lambda^{n-1}$, which add up to 1. In this mixture $\gamma^l \delta_{t+l}$ occurs in
# all sums with $n > l$, with the total weight $(1-\lambda)(\lambda^l + \lambda^{l+1} + \cdots) =
# \lambda^l$. So
#
# $$
# A_t = \sum_{l \ge 0} (\gamma \lambda)^l \delta_{t+l} = \delta_t + \gamma \lambda A_{t+1} ,
# $$ (rlhf-gae)
#
# and one pass from the last token to the first computes all of them. With $\lambda = 0$ the critic
# is trusted at once, with $\lambda = 1$ never: then the sum is the whole reward to come less
# $V(s_t)$, a baseline that depends on the state.
#
# Two details decide whether this is right. After an end token nothing follows, so the last
# $V(s_{t+1})$ is 0. A response that was cut off at the limit is not over, and there the critic's
# value counts. And what stands at padding must not leak in, even if it is not a number.


# %%
#| export
class Advantages(NamedTuple):
    """How much better each token was than expected, and what the critic should have said."""

    advantages: Float[Tensor, "batch sequence"]
    returns: Float[Tensor, "batch sequence"]


def generalized_advantages(
    rewards: Float[Tensor, "batch sequence"],
    values: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    finished: Bool[Tensor, " batch"],
    *,
    gamma: int | float = 1.0,
    lam: int | float = 0.95,
) -> Advantages:
    """Return advantages and returns of the tokens where ``mask`` is true, one run in each row.

    ``values[:, t]`` is expected before token t. After the last token of a ``finished`` response
    nothing more comes; after one that was cut off, the value at the next place counts. What stands
    elsewhere has no effect. Source: Schulman et al. (2016), equation 16.
    """
    check_number("gamma", gamma, 0, 1)
    check_number("lam", lam, 0, 1)
    if (mask[:, -1] & ~finished).any():
        raise ValueError("mask: expected a place after a response that was cut off, got none")
    after = nn.functional.pad(mask[:, 1:], (0, 1))
    following = nn.functional.pad(values[:, 1:], (0, 1))
    following = following.where(after | ~finished[:, None], 0.0)
    surprise = (rewards + gamma * following - values).where(mask, 0.0)
    advantages, running = torch.zeros_like(surprise), torch.zeros_like(surprise[:, 0])
    for t in reversed(range(mask.size(1))):
        running = (surprise[:, t] + gamma * lam * running).where(mask[:, t], 0.0)
        advantages[:, t] = running
    return Advantages(advantages, (advantages + values).where(mask, 0.0))


# %% [markdown]
# Three tokens by hand, with a reward of 1 at the end, and padding that is no number. The first row
# ends; the second is the same text, but cut off, and the critic expects 0.6 after it:

# %%
nan = math.nan
rewards = torch.tensor([[0.0, 0.0, 1.0, nan]] * 2)
values = torch.tensor([[0.2, 0.5, 0.4, 0.6]] * 2)
mask = torch.tensor([[True, True, True, False]] * 2)
finished = torch.tensor([True, False])
found = generalized_advantages(rewards, values, mask, finished, lam=0.5).advantages
by_hand = torch.tensor([[0.3 + 0.5 * (-0.1 + 0.5 * 0.6), -0.1 + 0.5 * 0.6, 0.6, 0.0]])
torch.testing.assert_close(found[:1], by_hand)
for row, name in zip(found.tolist(), ("finished", "cut off"), strict=True):
    print(f"{name:9}", *(f"{number:6.2f}" for number in row))

# %% [markdown] tags=["engine"]
# ### Engine room: two estimates of one gradient, from stories


# %% tags=["engine"]
# Where a story goes wrong, and the spread of gradients
def mistakes(ids: Sequence[int]) -> Tensor:
    """Return how many false claims, or a break of the form, end with each token of a story."""
    counts = [0]
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if not text.endswith((".", "?", "!")):
            counts.append(counts[-1])
            continue
        judgment = world.judge(text)
        is_broken = judgment.error_at is not None and judgment.error_at < len(text)
        counts.append(is_broken + sum(not true for _, true in judgment.claims))
    return torch.tensor(counts, dtype=torch.float32).diff()


def story_gradient_variance(n: int, temperature: float) -> dict[str, float]:
    """Return the variance of the gradient of one story, summed over all parameters."""
    model, prompt = pretrained("tinyworld").model, Prompt((pad_id,))
    options: dict[str, Any] = {"tokenizer": tokenizer, "temperature": temperature}
    (told,) = write_responses(model, [prompt], samples=n, max_new_tokens=90, **options)
    later = [-mistakes(one.ids).flip(0).cumsum(0).flip(0) for one in told]
    to_come = nn.utils.rnn.pad_sequence(later, batch_first=True)
    mean, total = to_come.mean(0), to_come[:, 0].mean()
    found = dict[str, float]()
    for name in ("outcome", "process"):
        gradients = []
        for one, reward in zip(told, later, strict=True):
            ids = torch.tensor([[pad_id, *one.ids]])
            log_probs = response_log_probs(model(ids[:, :-1]), ids[:, 1:], temperature=temperature)[
                0
            ]
            advantage = reward - mean[: len(reward)] if name == "process" else reward[0] - total
            gradient = torch.autograd.grad((advantage * log_probs).sum(), list(model.parameters()))
            gradients.append(torch.cat([part.flatten() for part in gradient]))
        found[name] = float(torch.stack(gradients).var(0).sum())
    return found


# %% [markdown]
# ### A reward for each sentence
#
# Some rewards need no critic to find the guilty token. An **outcome reward** judges the whole text,
# a **process reward** each step of it {cite}`uesato2022solving,lightman2024verify`. Stories of the
# tiny world have both: the judge can say how many false claims a story makes, or in which sentence
# each of them stands. The sum is the same, and so is the mean of the gradient, because a token
# cannot change what was paid before it. The variance is another matter. We draw stories from the
# base at a high temperature, and compare two estimates of the same gradient: each token weighted
# with the reward of the whole story, or with that of its own and later sentences, both less their
# mean over all stories:

# %%
spread = story_gradient_variance(n=96, temperature=1.3)
ratio = spread["process"] / spread["outcome"]
within("variance with process rewards, of that with outcome rewards", ratio, 0.0, 1.0)

# %% [markdown]
# TODO-process

# %% [markdown]
# ## Not too far in one step
#
# To draw replies is the slow part of the work, so one wants to take several steps on each rollout.
# But after the first step the policy is no longer the one that has drawn the replies. A mean over
# the old policy becomes one over the new policy if each sample is weighted by the ratio of its
# probabilities. For each token,
#
# $$
# \mathbb{E}_{\pi_\mathrm{old}}\bigl[\rho_t A_t\bigr] , \qquad
# \rho_t = \frac{\pi_\theta(y_t \mid s_t)}{\pi_\mathrm{old}(y_t \mid s_t)} ,
# $$ (rlhf-ratio)
#
# has at $\theta = \theta_\mathrm{old}$ the policy gradient as its gradient, because there
# $\nabla \rho_t = \nabla \log \pi_\theta$. Farther away the advantages are out of date, and nothing
# stops the optimizer from driving a ratio up without end. **{term}`Proximal policy optimization
# <proximal policy optimization>`** (PPO) {cite}`schulman2017proximal` takes the incentive away:
#
# $$
# L = -\frac{1}{N} \sum_t \min\bigl(\rho_t A_t, \; \operatorname{clip}(\rho_t, 1 - \epsilon,
# 1 + \epsilon) A_t\bigr) .
# $$ (rlhf-ppo)
#
# If $A_t > 0$, the token should become more likely, but a ratio above $1 + \epsilon$ is not
# rewarded further. If $A_t < 0$, it is the same below $1 - \epsilon$. The minimum sees to it that
# only progress is limited. A ratio that went the *wrong* way keeps its full gradient.


# %% tags=["engine"]
#| export
#: How far a ratio of probabilities counts: by as much on both sides, by (below, above), or freely.
Clip = int | float | tuple[int | float, int | float] | None


# %%
#| export
def clipped_terms(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    *,
    clip: Clip = 0.2,
) -> Float[Tensor, "batch sequence"]:
    """Return the loss of each token of PPO's clipped objective.

    ``clip`` bounds how far the ratio of probabilities may count: by as much on both sides, by
    (below, above), or not at all. Source: Schulman et al. (2017), equation 7.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    ratio = (log_probs - old_log_probs).exp()
    if low is None or high is None:
        return -ratio * advantages
    check_number("clip", low, 0, 1)
    check_number("clip", high, 0)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


# %% mystnb={"figure": {"caption": "PPO's loss of one token over the ratio of its probabilities. The dotted lines are the loss without clipping.", "name": "fig-rlhf-clip"}, "image": {"alt": "Two panels. With a positive advantage the loss falls with the ratio and is flat above 1.2. With a negative advantage it is flat below 0.8 and rises from there on. Dotted straight lines continue where it is flat."}}
ratio = torch.linspace(0.4, 1.6, 200)[None]
fig, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
for ax, sign, name in zip(axes, (1.0, -1.0), ("positive", "negative"), strict=True):
    advantage = torch.full_like(ratio, sign)
    for clip, style in ((None, "k:"), (0.2, "-")):
        loss = clipped_terms(ratio.log(), torch.zeros_like(ratio), advantage, clip=clip)
        ax.plot(ratio[0], loss[0], style)
    ax.set(xlabel="ratio", title=f"{name} advantage")
axes[0].set_ylabel("loss")
plt.show()

# %% [markdown] tags=["engine"]
# ### Engine room: sums over tokens and responses, and the loss with its mask

# %% [markdown] tags=["engine"]
# What the loss of a batch is divided by is a choice, as in chapter 19: all tokens alike, each
# response alike, or a constant. A `Trainer` wants the sum and the divisor by themselves, since it
# adds up micro-batches first. Masked places are replaced before anything is computed, because NaN
# times 0 is NaN.

# %% tags=["engine"]
#| export
#: What a loss is divided by: tokens, or responses after the mean of each.
Per = Literal["token", "response"]


def loss_sums(
    values: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    per: Per | int | float = "token",
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""]]:
    """Return a sum and what it is to be divided by, as objectives of a ``Trainer`` do.

    ``per`` "token": all values, and how many there are. "response": the mean of each row, and how
    many rows have any. A number: all values divided by it, and the rows. What is masked does not
    count even if it is infinite or NaN.
    """
    if mask.shape != values.shape:
        expected = f"the shape of values, {tuple(values.shape)}"
        raise ValueError(f"mask: expected {expected}, got {tuple(mask.shape)}")
    kept, lengths = values.where(mask, 0.0), mask.sum(dim=1)
    if isinstance(per, str):
        if per not in ("token", "response"):
            raise ValueError(f"per: expected 'token', 'response' or a number{_got(per)}")
        if per == "token":
            return kept.sum(), mask.sum()
        return (kept.sum(dim=1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    check_number("per", per, above=0)
    return kept.sum() / float(per), (lengths > 0).sum()


def aggregate(
    values: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return one loss of the values of all tokens, divided as ``loss_sums`` says; NaN of none."""
    total, count = loss_sums(values, mask, per=per)
    return total / count


# %% tags=["engine"]
#| export
def clipped_loss(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    clip: Clip = 0.2,
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return PPO's loss of the tokens where ``mask`` is true; for the rest see ``clipped_terms``.

    What stands elsewhere has no effect, not even NaN, and ``per`` is that of ``loss_sums``.
    """
    new, old = log_probs.where(mask, 0.0), old_log_probs.where(mask, 0.0)
    return aggregate(clipped_terms(new, old, advantages, clip=clip), mask, per=per)


def sequence_log_probs(
    log_probs: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    mean: bool = False,
) -> Float[Tensor, " batch"]:
    """Return the log-probability of each response in nats, or with ``mean`` that of its tokens."""
    if mean:
        return masked_mean(log_probs, mask, dim=1)
    return log_probs.where(mask, 0.0).sum(dim=1)


# %% tags=["engine"]
#| export
def whitened(
    values: Float[Tensor, "batch sequence"], mask: Bool[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence"]:
    """Return the values with mean 0 and variance 1 over all places of the mask, and 0 elsewhere.

    The variance is the unbiased one. Equal values become 0.
    """
    chosen = values[mask]
    if not len(chosen):
        raise ValueError("mask: expected at least one place, got none")
    spread = chosen.std() if len(chosen) > 1 else chosen.new_ones(())
    return ((values - chosen.mean()) / (spread + 1e-8)).where(mask, 0.0)


def on_tokens(
    per_row: Float[Tensor, " batch"], mask: Bool[Tensor, "batch sequence"]
) -> Float[Tensor, "batch sequence"]:
    """Return the number of each row at all places of its mask, and 0 elsewhere."""
    return per_row[:, None].where(mask, 0.0)


# %% [markdown]
# ## Learning from its own replies
#
# The training loop of {doc}`13_training` needs batches, an objective, and nothing else. What is new
# is where the batches come from: the model writes them itself. A **{term}`rollout`** is a number of
# prompts with the policy's responses, their rewards and their advantages. It serves a few steps,
# and then the policy, which has changed by then, writes the next.
# {py:class}`~llmbook.rlhf.RolloutBatches` makes rollouts when they are needed and hands out their
# rows as batches. Each row keeps the ids that were drawn and the log-probabilities they were drawn
# with, so that nothing is computed twice and nothing is decoded and encoded again.

# %% [markdown] tags=["engine"]
# ### Engine room: rollouts as tensors, and batches that are written when they are needed

# %% [markdown] tags=["engine"]
# A rollout is a table of responses, one in each row, with all that is known of them. The last token
# of each row is among the inputs, although nothing is predicted there: if the response was cut off,
# the critic's value at this place says what would still have come.


# %% tags=["engine"]
#| export
class Rollouts(NamedTuple):
    """Responses with their prompts as rows to learn from, and what is known of them.

    ``targets`` are -100 outside the response; the last token of a row has none. The others are None
    until they are known. ``text_targets`` are those of rows that are no responses but texts, to be
    learned as in pretraining; ``watched`` are other rewards, which are only looked at.
    """

    inputs: Int64[Tensor, "rows sequence"]
    targets: Int64[Tensor, "rows sequence"]
    old_log_probs: Float[Tensor, "rows sequence"]
    rewards: Float[Tensor, " rows"]
    finished: Bool[Tensor, " rows"]
    groups: Int64[Tensor, " rows"]
    reference_log_probs: Float[Tensor, "rows sequence"] | None = None
    advantages: Float[Tensor, "rows sequence"] | None = None
    values: Float[Tensor, "rows sequence"] | None = None
    returns: Float[Tensor, "rows sequence"] | None = None
    text_targets: Int64[Tensor, "rows sequence"] | None = None
    watched: Float[Tensor, "rows names"] | None = None

    @property
    def mask(self) -> Bool[Tensor, "rows sequence"]:
        """Where the tokens of responses are predicted."""
        return self.targets != -100

    def to(self, device: torch.device | str) -> "Rollouts":
        """Return the rollouts on ``device``."""
        found: Any = [None if one is None else one.to(device) for one in self]
        return Rollouts(*found)

    def take(self, rows: Sequence[int]) -> "Rollouts":
        """Return some of the rows."""
        found: Any = [None if one is None else one[list(rows)] for one in self]
        return Rollouts(*found)


# %% tags=["engine"]
#| export
def as_rollouts(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Response]],
    rewards: Float[Tensor, " rows"],
    *,
    pad_id: int,
) -> Rollouts:
    """Return the responses to each prompt as rows, in order, with padding behind them."""
    if len(responses) != len(prompts) or not prompts:
        expected = f"a list for each of {len(prompts)} prompts, at least one"
        raise ValueError(f"responses: expected {expected}, got {len(responses)}")
    flat = [(prompt, one) for prompt, own in zip(prompts, responses, strict=True) for one in own]
    if empty := [place for place, (_, response) in enumerate(flat) if not response.ids]:
        raise ValueError(f"responses: expected at least one token in each, got none at {empty[0]}")
    inputs, mask = padded([prompt.ids + response.ids for prompt, response in flat], pad_id)
    starts = torch.tensor([len(prompt.ids) for prompt, _ in flat])[:, None] - 1
    following = torch.cat([inputs[:, 1:], inputs.new_full((len(flat), 1), -100)], dim=1)
    ends = mask.sum(dim=1, keepdim=True) - 1
    places = torch.arange(inputs.size(1))
    learned = (places >= starts) & (places < ends)
    numbers = torch.tensor([p for _, response in flat for p in response.log_probs])
    return Rollouts(
        inputs,
        following.where(learned, -100),
        torch.zeros(inputs.shape).masked_scatter(learned, numbers),
        rewards,
        torch.tensor([response.finished for _, response in flat]),
        torch.tensor([i for i, own in enumerate(responses) for _ in own]),
    )


@torch.no_grad()
def score_rollouts(
    model: TransformerLM, rollouts: Rollouts, *, temperature: int | float = 1.0
) -> Float[Tensor, "rows sequence"]:
    """Return the log-probabilities that a model gives to the tokens of responses."""
    if model.config.vocab_size <= int(rollouts.inputs.max()):
        expected = f"one with more than {int(rollouts.inputs.max())} tokens in its vocabulary"
        raise ValueError(f"model: expected {expected}, got {model.config.vocab_size}")
    return response_log_probs(model(rollouts.inputs), rollouts.targets, temperature=temperature)


# %% tags=["engine"]
#| export
def _check_prompts(prompts: Sequence[Prompt], n_prompts: int) -> None:
    if len(prompts) < n_prompts:
        raise ValueError(f"prompts: expected at least n_prompts = {n_prompts}, got {len(prompts)}")


# %% tags=["engine"]
#| export
#: What decides how much each token is to be encouraged: it fills in ``advantages``.
Credit = Callable[[Rollouts], Rollouts]


@dataclass(eq=False)
class RolloutBatches(ResumableBatches):
    """Batches of responses that the policy itself has written, made when they are needed.

    Each rollout draws ``samples`` responses to each of ``n_prompts`` prompts, gets their rewards
    and, by ``credit``, advantages. It is served ``epochs`` times, each time in another order and in
    as many ``minibatches``; then the policy, changed by then, writes the next one. ``reference``
    gives its log-probabilities to the responses. Each minibatch ends with ``n_texts`` rows of
    ``texts``. ``watch`` are other rewards that are looked at only. The rollout in hand is a part
    of the state, so that a run resumes in its midst.
    """

    policy: TransformerLM
    prompts: Sequence[Prompt]
    reward: Rewards
    credit: Credit
    tokenizer: BPETokenizer
    template: ChatTemplate = WORLD_CHAT
    n_prompts: int = 16
    samples: int = 4
    epochs: int = 1
    minibatches: int = 1
    temperature: int | float = 1.0
    max_new_tokens: int = 32
    reference: TransformerLM | None = None
    texts: Sequence[Example] = ()
    n_texts: int = 0
    watch: Mapping[str, Rewards] = field(default_factory=dict)
    seed: int = 0
    step: int = field(default=0, init=False)
    rollout: Rollouts | None = field(default=None, init=False)
    number: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        for name in ("n_prompts", "samples", "epochs", "minibatches"):
            check_whole(name, getattr(self, name), 1)
        check_whole("n_texts", self.n_texts, 0)
        check_whole("seed", self.seed, 0)
        _check_prompts(self.prompts, self.n_prompts)
        if (self.n_prompts * self.samples) % self.minibatches:
            expected = f"a divisor of {self.n_prompts} x {self.samples} responses"
            raise ValueError(f"minibatches: expected {expected}, got {self.minibatches}")
        if self.n_texts and not self.texts:
            raise ValueError(f"texts: expected some, for n_texts = {self.n_texts}, got none")
        config = self.policy.config
        if config.dropout:
            raise ValueError(f"policy: expected one without dropout, got {config.dropout}")
        if self.reference is not None and self.reference.config.vocab_size != config.vocab_size:
            expected = f"the policy's vocabulary of {config.vocab_size}"
            raise ValueError(
                f"reference: expected {expected}, got {self.reference.config.vocab_size}"
            )

    @property
    def steps_per_rollout(self) -> int:
        """How many batches a rollout serves."""
        return self.epochs * self.minibatches

    @property
    def batch_size(self) -> int:
        """How many rows a batch has, for ``TrainingConfig``."""
        return self.n_prompts * self.samples // self.minibatches + self.n_texts


# %% tags=["engine"]
#| export
class RolloutBatches(RolloutBatches):  # continued
    def make_rollout(self, number: int) -> Rollouts:
        """Return the rollout of some number by the policy as it is; override this for others."""
        return self.credited(*self.written(number))

    def written(self, number: int) -> tuple[list[Prompt], list[list[Response]]]:
        """Return the prompts of a rollout, and the responses that the policy writes to them now."""
        rows = self.n_prompts * self.samples
        places = in_turns(number * self.n_prompts, self.n_prompts, len(self.prompts), self.seed)
        prompts = [self.prompts[place] for place in places]
        responses = write_responses(
            self.policy,
            prompts,
            tokenizer=self.tokenizer,
            samples=self.samples,
            template=self.template,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            first_row=number * rows,
        )
        return prompts, responses

    @torch.no_grad()
    def credited(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[Response]],
        rewards: Float[Tensor, " rows"] | None = None,
    ) -> Rollouts:
        """Return responses as rollouts with rewards, the reference's opinion, and advantages.

        Without ``rewards`` the reward function is asked for them.
        """
        flat = list(chain.from_iterable(responses))
        asked = [p for p, own in zip(prompts, responses, strict=True) for _ in own]
        if rewards is None:
            rewards = rewards_of(self.reward, asked, flat)
        pad_id = self.tokenizer.special_tokens["<|endoftext|>"]
        rollout = as_rollouts(prompts, responses, rewards, pad_id=pad_id)
        if self.reference is not None:
            opinion = score_rollouts(self.reference, rollout, temperature=self.temperature)
            rollout = rollout._replace(reference_log_probs=opinion)
        if self.watch:
            seen = [rewards_of(other, asked, flat) for other in self.watch.values()]
            rollout = rollout._replace(watched=torch.stack(seen, dim=1))
        rollout = self.credit(rollout)
        advantages = rollout.advantages
        if advantages is None or not advantages[rollout.mask].isfinite().all():
            raise ValueError("credit: expected finite advantages, got none or some that are not")
        return rollout


# %% tags=["engine"]
#| export
class RolloutBatches(RolloutBatches):  # continued
    def __getitem__(self, step: int) -> Rollouts:  # type: ignore[override]
        check_whole("step", step, 0)
        number, within = divmod(step, self.steps_per_rollout)
        if self.rollout is None or number != self.number:
            if within:
                expected = "a step of the rollout in hand, or the first of another"
                raise ValueError(f"step: expected {expected}, got {step}")
            self.rollout, self.number = self.make_rollout(number), number
        epoch, part = divmod(within, self.minibatches)
        n_rows = len(self.rollout.inputs)
        size = n_rows // self.minibatches
        places = np.arange(part * size, (part + 1) * size)
        rows = self.rollout.take(permuted(places, n_rows, self.seed, number, epoch, 1).tolist())
        return self._with_texts(rows, step) if self.n_texts else rows

    def _with_texts(self, rows: Rollouts, step: int) -> Rollouts:
        """Return a minibatch with rows of texts behind it, which have no rewards."""
        n = self.n_texts
        places = in_turns(step * n, n, len(self.texts), self.seed)
        examples = [[self.texts[place]] for place in places]
        width = max(rows.inputs.size(1), *(len(own[0].ids) - 1 for own in examples))
        pad_id = self.tokenizer.special_tokens["<|endoftext|>"]
        texts = instruction_batch(examples, width, pad_id, documents=False)
        more = width - rows.inputs.size(1)
        fill = {"inputs": pad_id, "targets": -100}
        found = dict[str, Any]()
        for name, value in rows._asdict().items():
            if value is not None:
                beside = (0, more if name != "watched" else 0) if value.ndim == 2 else ()
                found[name] = nn.functional.pad(value, (*beside, 0, n), value=fill.get(name, 0))
        found["inputs"][-n:] = texts.inputs
        found["text_targets"] = torch.full_like(found["targets"], -100)
        found["text_targets"][-n:] = texts.targets
        return Rollouts(**found)


# %% tags=["engine"]
#| export
class RolloutBatches(RolloutBatches):  # continued
    @property
    def metrics(self) -> dict[str, float]:
        """What is logged of the rollout in hand: means over its responses."""
        if self.rollout is None:
            return {}
        rollout, mask = self.rollout, self.rollout.mask
        found = {
            "reward": rollout.rewards.mean(),
            "length": mask.sum(dim=1).double().mean(),
            "finished": rollout.finished.double().mean(),
        }
        if rollout.reference_log_probs is not None:
            distance = sequence_log_probs(rollout.old_log_probs - rollout.reference_log_probs, mask)
            found["kl"] = distance.mean()
        if rollout.watched is not None:
            found |= dict(zip(self.watch, rollout.watched.mean(dim=0), strict=True))
        return {name: float(value) for name, value in found.items()}

    def identity(self) -> dict[str, Any]:
        """What decides on the prompts, the responses and their order."""
        names = ("n_prompts", "samples", "epochs", "minibatches", "temperature", "max_new_tokens")
        found = {name: getattr(self, name) for name in (*names, "n_texts", "seed")}
        found["prompts"] = _digest([prompt.ids for prompt in self.prompts])
        found["texts"] = _digest([text.ids for text in self.texts])
        for name in ("reward", "credit"):
            own = getattr(self, name)
            found[name] = getattr(own, "__qualname__", type(own).__qualname__)
        return found | {"watch": list(self.watch)}

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, the identity, and the rollout in hand with its number."""
        rollout = None if self.rollout is None else self.rollout._asdict()
        return {**super().state_dict(), "number": self.number, "rollout": rollout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, in the midst of a rollout if it was there."""
        rest = {k: v for k, v in state.items() if k not in ("number", "rollout")}
        super().load_state_dict(rest)
        self.number, rollout = state["number"], state["rollout"]
        self.rollout = None if rollout is None else Rollouts(**rollout)


# %% tags=["engine"]
#| export
class RolloutLog(Probe):
    """Logs what ``RolloutBatches.metrics`` says, as means over steps."""

    def after_step(self, trainer: Trainer, report: StepReport) -> dict[str, float] | None:
        """Return the numbers of the rollout that the step was taken on."""
        batches: Any = trainer.batches
        return dict(batches.metrics)


# %% [markdown]
# ## PPO, step by step
#
# One iteration of PPO has five parts. The policy writes responses to a few prompts. The reward
# model gives each a reward. The reference scores the same tokens, which prices the distance. The
# critic reads them, and advantages are computed and whitened. Then policy and critic take a few
# steps, the policy on the clipped loss and the critic on the squared error of its values. Four
# models are involved, of which two are trained.

# %% [markdown] tags=["engine"]
# ### Engine room: policy and critic, credit, the objective, and the run


# %% tags=["engine"]
#| export
class ActorCritic(nn.Module):
    """A policy, and a critic that says at each token what reward is still to be expected."""

    def __init__(self, policy: TransformerLM, critic: RewardModel | None = None):
        super().__init__()
        self.config = policy.config
        self.policy = policy
        self.critic = RewardModel(policy) if critic is None else critic


def token_rewards(
    rollouts: Rollouts, kl_weight: int | float = 0.0
) -> Float[Tensor, "rows sequence"]:
    """Return each response's reward at its last token, less the KL penalty at every token.

    The penalty is ``kl_weight`` times the first estimate of the divergence from the reference.
    """
    check_number("kl_weight", kl_weight, 0)
    mask = rollouts.mask
    last = mask & ~nn.functional.pad(mask[:, 1:], (0, 1))
    rewards = on_tokens(rollouts.rewards, last)
    if not kl_weight:
        return rewards
    if rollouts.reference_log_probs is None:
        expected = f"a reference's log-probabilities for kl_weight = {kl_weight}"
        raise ValueError(f"rollouts: expected {expected}, got none")
    penalty = kl_estimates(rollouts.old_log_probs, rollouts.reference_log_probs).k1
    return rewards - kl_weight * penalty.where(mask, 0.0)


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class CriticCredit:
    """Gives PPO's advantages: the critic's, generalized, and whitened over the rollout."""

    critic: RewardModel
    kl_weight: int | float = 0.0
    gamma: int | float = 1.0
    lam: int | float = 0.95

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        mask = rollouts.mask
        values = self.critic.token_scores(rollouts.inputs)
        rewards = token_rewards(rollouts, self.kl_weight)
        finished, discounts = rollouts.finished, {"gamma": self.gamma, "lam": self.lam}
        found = generalized_advantages(rewards, values, mask, finished, **discounts)
        advantages = whitened(found.advantages, mask)
        return rollouts._replace(advantages=advantages, returns=found.returns, values=values)


@dataclass(eq=False)
class LeaveOneOutCredit:
    """Gives each response's reward, less the KL penalty, less the mean of the others'."""

    kl_weight: int | float = 0.0

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        total = token_rewards(rollouts, self.kl_weight).sum(dim=1)
        samples = int((rollouts.groups == rollouts.groups[0]).sum())
        advantages = leave_one_out(total.view(-1, samples)).flatten()
        return rollouts._replace(advantages=on_tokens(advantages, rollouts.mask))


# %% tags=["engine"]
#| export
def policy_objective(
    model: ActorCritic | TransformerLM,
    batch: Rollouts,
    *,
    clip: Clip = 0.2,
    value_weight: int | float = 0.5,
    entropy_weight: int | float = 0.0,
    text_weight: int | float = 1.0,
    temperature: int | float = 1.0,
    per: Per | int | float = "token",
) -> tuple[Float[Tensor, ""], Tensor, dict[str, Tensor]]:
    """Return PPO's summed loss, what it is divided by, and sums to be logged.

    With a critic, half of its squared error is added, times ``value_weight``; the mean loss of
    texts is added times ``text_weight``. ``per`` is that of ``loss_sums``.
    """
    policy: Any = model.policy if isinstance(model, ActorCritic) else model
    mask, logits = batch.mask, policy(batch.inputs)
    if batch.advantages is None:
        raise ValueError("batch: expected advantages, which a credit function gives, got None")
    log_probs = response_log_probs(logits, batch.targets, temperature=temperature)
    advantages, change = batch.advantages, log_probs - batch.old_log_probs
    terms = clipped_terms(log_probs, batch.old_log_probs, advantages, clip=clip)
    with torch.set_grad_enabled(bool(entropy_weight)):
        entropy = entropies(logits, temperature=temperature)
    losses = terms - entropy_weight * entropy if entropy_weight else terms
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    outside = (change.expm1() > (high or math.inf)) | (change.expm1() < -(low or math.inf))
    logged = {"entropy": entropy.detach(), "clipped": outside.float()}
    logged["change"] = kl_estimates(batch.old_log_probs, log_probs.detach()).k3
    if isinstance(model, ActorCritic) and batch.returns is not None:
        error = (model.critic.token_scores(batch.inputs) - batch.returns).square()
        losses = losses + value_weight * error / 2
        logged["value_error"] = error.detach()
    total, count = loss_sums(losses, mask, per=per)
    sums = {name: loss_sums(values, mask, per=per)[0] for name, values in logged.items()}
    if batch.text_targets is not None:
        text_mask = batch.text_targets != -100
        nats = -response_log_probs(logits, batch.text_targets)
        text_loss = masked_mean(nats, text_mask)
        total = total + text_weight * text_loss * count
        sums["text_loss"] = text_loss.detach() * count
    return total, count, sums


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class PPO:
    """The settings of a run of PPO; each rollout has ``n_prompts`` x ``samples`` responses.

    ``kl_weight`` is the price of a nat of divergence from the policy at the beginning. The rate of
    AdamW rises for 10 steps, and is then constant. ``n_texts`` rows of each batch are texts.
    """

    kl_weight: int | float = 0.1
    n_steps: int = 200
    n_prompts: int = 64
    samples: int = 1
    epochs: int = 2
    minibatches: int = 1
    learning_rate: int | float = 2e-4
    clip: int | float = 0.2
    gamma: int | float = 1.0
    lam: int | float = 0.95
    value_weight: int | float = 0.5
    entropy_weight: int | float = 0.0
    temperature: int | float = 1.0
    max_new_tokens: int = 24
    n_texts: int = 0
    text_weight: int | float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kl_weight", "clip", "value_weight", "entropy_weight", "text_weight"):
            check_number(name, getattr(self, name), 0)
        check_number("learning_rate", self.learning_rate, above=0)
        for name in ("n_steps", "n_prompts", "samples", "epochs", "minibatches", "max_new_tokens"):
            check_whole(name, getattr(self, name), 1)


# %% tags=["engine"]
#| export
def train_ppo(
    policy: TransformerLM,
    prompts: Sequence[Prompt],
    reward: Rewards,
    settings: PPO,
    *,
    tokenizer: BPETokenizer,
    critic: RewardModel | None = None,
    reference: TransformerLM | None = None,
    texts: Sequence[Example] = (),
    watch: Mapping[str, Rewards] | None = None,
    folder: str | Path | None = None,
    probes: Sequence[Any] = (),
    sinks: Sequence[Sink] = (),
    **training: Any,
) -> MetricsLog:
    """Improve ``policy``, in place, by the rewards of its own responses; return the log.

    ``reference`` is by default the policy as it is now. ``critic`` begins by default as a copy of
    the policy with a head of zeros. ``training`` are other fields of ``TrainingConfig``.
    """
    model = ActorCritic(policy, critic)
    reference = copy.deepcopy(policy) if reference is None else reference
    credit = CriticCredit(model.critic, settings.kl_weight, settings.gamma, settings.lam)
    names = ["n_prompts", "samples", "epochs", "minibatches", "temperature", "max_new_tokens"]
    shape = {name: getattr(settings, name) for name in [*names, "n_texts", "seed"]}
    given: dict[str, Any] = {"reference": reference, "texts": texts, "watch": watch or {}}
    batches = RolloutBatches(policy, prompts, reward, credit, tokenizer=tokenizer, **shape, **given)
    names = ["clip", "value_weight", "entropy_weight", "text_weight", "temperature"]
    options = {name: getattr(settings, name) for name in names}
    config = TrainingConfig(
        n_steps=settings.n_steps,
        batch_size=batches.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        schedule="constant",
        warmup=min(10, settings.n_steps),
        seed=settings.seed,
        **training,
    )
    objective = partial(policy_objective, **options)
    watching: dict[str, Any] = {"probes": [RolloutLog(), *probes], "sinks": sinks, "folder": folder}
    return Trainer(model, batches, config, objective=objective, **watching).train()


# %% [markdown] tags=["engine"]
# The run of this chapter is kept under `artifacts/` like the tuned models, with its reward model and
# its log.


# %% tags=["engine"]
#| export
#: Runs of PPO from ``tuned("careless")`` that are kept, by name.
ALIGNMENTS = {"ppo": PPO(kl_weight=0.3, n_steps=240)}


class Aligned(NamedTuple):
    """A policy that was trained by rewards, with the reward model and the log."""

    policy: TransformerLM
    reward_model: RewardModel
    log: MetricsLog


def aligned(name: str = "ppo") -> Aligned:
    """Return a run of ``ALIGNMENTS``, made from ``tuned("careless")`` on the first call.

    The reward model learns from ``alignment_pairs``, the policy from ``alignment_questions``. Both
    are kept under ``artifacts/``, under a hash of the settings, of what they are made from, and of
    the code.
    """
    check_choice("name", name, tuple(ALIGNMENTS))
    settings = asdict(ALIGNMENTS[name])
    depends_on = {"settings": settings, "tuning": asdict(TUNINGS["careless"])}
    depends_on["base"] = {"folder": pretrained("tinyworld").folder.name}
    train = partial(_align_into, ALIGNMENTS[name])
    return load_or_train(f"aligned-{name}", depends_on, train, load=_load_aligned)


# %% tags=["engine"]
#| export
def _align_into(settings: PPO, folder: Path) -> None:
    """Train a reward model and a policy with one thread, and leave both in a folder."""
    start, n_threads = tuned("careless"), torch.get_num_threads()
    tokenizer, world, limit = start.tokenizer, start.world, start.model.config.context_length
    pad_id = tokenizer.special_tokens["<|endoftext|>"]
    log = MetricsLog(folder / "metrics.jsonl")
    log.start(-1)  # drops what a killed run has left
    torch.set_num_threads(1)  # sums in the same order, however many there are
    try:
        pairs = pair_examples(tokenizer, start.template, alignment_pairs(world), limit=limit).pairs
        reward_model = train_reward_model(start.model, pairs, pad_id=pad_id)
        train_ppo(
            start.model,
            question_prompts(tokenizer, alignment_questions(world)),
            LearnedReward(reward_model, pad_id),
            settings,
            tokenizer=tokenizer,
            watch={"true": world_reward(world)},
            sinks=[log],
        )
    finally:
        torch.set_num_threads(n_threads)
    start.model.save_pretrained(folder / "policy", eos_token_id=pad_id)
    save_checkpoint(folder / "reward_model.safetensors", reward_model.state_dict())


# The notebook's function and the package's are the same, and so is the hash of their code
_align_into.__module__ = "llmbook.rlhf"


def _load_aligned(folder: Path) -> Aligned:
    policy = TransformerLM.from_pretrained(folder / "policy")
    reward_model = RewardModel(policy)
    reward_model.load_state_dict(load_checkpoint(folder / "reward_model.safetensors"))
    return Aligned(policy, reward_model, MetricsLog(folder / "metrics.jsonl"))


# %% [markdown]
# ### The first step, and a run that is killed
#
# Before the first step, policy and old policy are the same. All ratios are 1 but for rounding,
# nothing is clipped, and with whitened advantages, whose mean is 0, the loss is 0. Its gradient is
# not:

# %%
model = ActorCritic(copy.deepcopy(careless.model))
batches = RolloutBatches(
    model.policy, prompts, learned, CriticCredit(model.critic), tokenizer=tokenizer
)
rollout = batches[0]
total, count, sums = policy_objective(model, rollout, value_weight=0.0)
total.backward()
gradient = max(float(p.grad.abs().max()) for p in model.policy.parameters() if p.grad is not None)
assert abs(total.item() / count.item()) < 0.01 < gradient and sums["clipped"].item() == 0
print(f"{len(rollout.inputs)} responses to {batches.n_prompts} prompts, {int(count)} tokens")

# %% [markdown]
# {py:func}`~llmbook.rlhf.train_ppo` puts policy, critic, rollouts and the `Trainer` together. A
# rollout in hand belongs to the state of a run, like weights and moments. So a run that is killed
# between two steps on the same rollout goes on with the same rows, and ends with the same weights
# to the last bit. Here a run is killed after the third of six steps, and each rollout serves four:


# %%
class Kill(Probe):
    """Raises an error after the third step, once."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.step == 3 and not (trainer.folder / "killed").exists():
            (trainer.folder / "killed").touch()
            raise RuntimeError("killed")


settings = PPO(n_steps=6, n_prompts=8, epochs=2, minibatches=2)
policies = [copy.deepcopy(careless.model) for _ in range(3)]
run: Any = partial(train_ppo, prompts=prompts, reward=learned, settings=settings)
run(policies[0], tokenizer=tokenizer)
with tempfile.TemporaryDirectory() as folder:
    options = {"folder": folder, "checkpoint_every": 1, "probes": [Kill()], "tokenizer": tokenizer}
    with suppress(RuntimeError):
        run(policies[1], **options)
    run(policies[2], **options)
weights = [nn.utils.parameters_to_vector(policy.parameters()) for policy in policies]
assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])

# %% [markdown]
# ### The run
#
# The run at the beginning of the chapter took 240 steps of 64 responses, two on each rollout, with
# $\beta = 0.3$. Its questions were 96 of each kind about the half of the characters that no
# comparison was about. {numref}`fig-rlhf-run` shows what the trainer logged, and the true reward,
# which was only watched.

# %% mystnb={"figure": {"caption": "The run of PPO with a KL weight of 0.3. From left to right: learned and true reward of the responses; their divergence from the reference; entropy and share of clipped tokens; length.", "name": "fig-rlhf-run"}, "image": {"alt": "Four panels over 240 steps. The learned reward rises from about minus one to above two, the true reward from just below zero to about 0.6, where it stays. The divergence rises to about four nats. Entropy changes little, and hardly any token is clipped. Responses become a few tokens longer."}}
panels: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward", "true")),
    ("nats per response", ("kl",)),
    ("entropy, clipped", ("entropy", "clipped")),
    ("tokens per response", ("length",)),
)
fig, axes = plt.subplots(1, 4, figsize=(11, 2.6))
for ax, (title, names) in zip(axes, panels, strict=True):
    for name in names:
        ax.plot(*trained.log.column(name), label=name)
    ax.set(xlabel="step", title=title)
    if len(names) > 1:
        ax.legend()
plt.show()

# %% [markdown]
# TODO-run

# %% [markdown]
# ## Pushed too far
#
# What if distance costs nothing? {numref}`fig-rlhf-overoptimization` shows runs with four weights
# of the divergence, three seeds each (`python benchmarks/rlhf.py`): the learned reward, which the
# policy sees, and the true one, which it does not, over the distance from where it began.

# %% mystnb={"figure": {"caption": "Learned reward (left) and true reward (right) of the responses during training, over their divergence from the reference, for four weights of the divergence. Thin lines are single seeds. The dots are best-of-n sampling, at the bound of its divergence.", "name": "fig-rlhf-overoptimization"}, "image": {"alt": "Two panels over the divergence in nats. On the left the learned reward rises with the divergence in all runs. On the right the true reward rises steeply up to a few nats; without a price of divergence it then falls while the divergence grows to about ten nats."}}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
for number, weight in enumerate(("KL 0", "KL 0.1", "KL 0.3", "KL 1")):
    chosen = [row for row in curve_rows if (row["experiment"], row["variant"]) == ("ppo", weight)]
    for seed in sorted({row["seed"] for row in chosen}):
        rows = [row for row in chosen if row["seed"] == seed]
        x = [float(row["kl"]) for row in rows]
        for ax, name in zip(axes, ("reward", "true"), strict=True):
            y = [float(row[name]) for row in rows]
            ax.plot(x, y, color=f"C{number}", lw=0.9, label=weight if seed == "0" else None)
for ax, name in zip(axes, ("reward", "true"), strict=True):
    best = [row for row in run_rows if row["experiment"] == "best of n"]
    ax.plot([float(r["kl"]) for r in best], [float(r[name]) for r in best], "k.", label="best of n")
    ax.set(
        xlabel="divergence, nats per response",
        ylabel=f"{name} reward".replace("reward rew", "learned rew"),
    )
axes[0].legend()
plt.show()

# %%
peaks, ends = [], []
for seed in ("0", "1", "2"):
    rows = [r for r in curve_rows if (r["variant"], r["seed"]) == ("KL 0", seed)]
    true_rewards = [float(row["true"]) for row in rows]
    peaks.append(max(true_rewards))
    ends.append(true_rewards[-1])
    at = rows[true_rewards.index(peaks[-1])]
    print(
        f"seed {seed}: true reward at most {peaks[-1]:.2f}, at {float(at['kl']):.1f} nats", end="; "
    )
    print(f"in the end {ends[-1]:.2f}, at {float(rows[-1]['kl']):.1f} nats")

# %% [markdown]
# TODO-over
#
# This is **{term}`over-optimization <reward over-optimization>`**
# {cite}`gao2023scaling`: beyond some distance, what raises the learned reward lowers the true one.
# The reward model says that a refusal is worth little where an answer was due, and for most
# characters it is right. But it judges the value in the answer by tossing a coin, so for many
# questions a wrong refusal has a higher reward than the truth, and a policy that is free to do so
# finds these questions one after the other. Nothing in the log of a real project would show it. The
# learned reward rises to the end.

# %%
rows = {f"beta {w}": {"experiment": "ppo", "variant": f"KL {w}"} for w in ("0", "0.1", "0.3", "1")}
rows = {"careless": {"experiment": "start", "variant": "careless"}, **rows}
show(rows, "facts", "refused", "unknown", "declined", "told")
show(rows, "true", "reward", "kl", "stories")

# %% [markdown]
# TODO-table
#
# How should one choose $\beta$ when the true reward is unknown? By looking: somebody has to read
# replies at several distances, or to compare them anew. Projects collect fresh comparisons of the
# present policy's replies, and train the reward model again {cite}`bai2022training`. An ensemble of
# reward models can warn of what they disagree about {cite}`coste2024reward`;
# {py:func}`~llmbook.rlhf.pessimistic` is the mean less the spread. It helps as far as the errors
# of its members differ {cite}`eisenstein2024helping`.

# %% [markdown]
# ## A judge with a weakness
#
# Over-optimization needs no malice in the reward, only errors. Systematic errors are worse. People
# tend to prefer longer replies, and models trained on their choices become long-winded
# {cite}`singhal2024long`. We give our judge such a weakness, and then another one. In the first
# experiment each word is worth 0.3, whatever it says. In the second, a reply with the words "I do
# not" is worth 1.5 more than without. Everything else is as before, with $\beta = 0.1$:

# %%
hacks = {
    f"{name}, {variant}": {"experiment": name, "variant": variant}
    for name in ("length", "phrase")
    for variant in ("liked", "explained")
}
show(
    {k: w for k, w in hacks.items() if any(r["experiment"] == w["experiment"] for r in run_rows)},
    "facts",
    "refused",
    "unknown",
    "length",
)

# %% [markdown]
# TODO-hacks
#
# This is **{term}`reward hacking`**: the policy does what is paid, not what is meant
# {cite}`skalse2022defining`. The rows "explained" have a cure. If a weakness is known and can be
# measured, the comparison can account for it. Let $f(y)$ be the number of words. We fit
#
# $$
# P(a \succ b \mid x) = \sigma\bigl(r(x, a) - r(x, b) + w \, (f(a) - f(b))\bigr)
# $$ (rlhf-explained)
#
# with $r$ and the number $w$ together. What the length explains is explained by $w f$, and need not
# be learned by $r$. Afterwards, $r$ alone is the reward. This is `n_features` of
# {py:class}`~llmbook.rlhf.RewardModel`. It works for weaknesses that one has thought of.

# %% [markdown]
# ## Was it worth it?
#
# All methods used the same reward models and the same prompts. Rejection sampling draws eight
# replies to each question, keeps the best by the learned reward, and tunes on them; its control
# keeps a random one. Means of three seeds with 95 % intervals:

# %%
compared = {
    "careless": ("start", "careless"),
    "best of 4": ("best of n", "4"),
    "best of 16": ("best of n", "16"),
    "rejection, best of 8": ("rejection", "1 of 8"),
    "control, any of 8": ("random", "1 of 8"),
    "PPO, beta 0.3": ("ppo", "KL 0.3"),
    "PPO, true reward": ("true", "KL 0.03"),
}
have = {(row["experiment"], row["variant"]) for row in run_rows}
rows = {k: {"experiment": e, "variant": v} for k, (e, v) in compared.items() if (e, v) in have}
show(rows, "facts", "refused", "unknown", "declined", "told")
show(rows, "true", "kl")

# %% [markdown]
# TODO-compare

# %% [markdown]
# ## Is it the real thing?
#
# The loss of PPO for whole responses is that of `trl`'s `RLOOTrainer`, with its gradient. The tests
# of this module hold the reward loss against `trl`'s `RewardTrainer` in the same way. (`trl` 1.16
# has no trainer for PPO itself any more.) The divergence and the advantages are held against
# PyTorch's, and against the definition as a double sum:

# %% [markdown] tags=["engine"]
# ### Engine room: a trainer without its surroundings


# %% tags=["engine"]
# The loss of trl's RLOOTrainer needs a few attributes, and no model
def loss_of_trl(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl

    same = SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x)
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **o: (log_probs, 0 * log_probs, None),
        accelerator=same,
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.3,
        _metrics={"train": defaultdict(list)},
        model=nn.Linear(1, 1),
    )
    ids = torch.ones(mask.shape, dtype=torch.int64)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "old_logps": old}
    inputs |= {"completion_mask": mask.long(), "advantages": advantages}
    return trl.RLOOTrainer._compute_loss(stand_in, stand_in.model, inputs)


# %% [markdown]
# ### The same numbers

# %%
log_probs = torch.randn(4, 3, requires_grad=True)
mask = torch.arange(3) < torch.tensor([[3], [2], [1], [3]])
advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
now = sequence_log_probs(log_probs, mask)
old = now.detach() + torch.tensor([0.5, -0.5, 0.1, 0.0])
every = torch.ones(4, 1, dtype=torch.bool)
ours = clipped_loss(now[:, None], old[:, None], advantages[:, None], every, clip=(0.2, 0.3))
theirs = loss_of_trl(log_probs, old, advantages, mask)
torch.testing.assert_close(ours, theirs)
torch.testing.assert_close(
    *(torch.autograd.grad(loss, log_probs, retain_graph=True)[0] for loss in (ours, theirs))
)

# %%
both = [torch.distributions.Categorical(logits=z.detach()) for z in (log_pi, reference)]
exact_kl = torch.distributions.kl_divergence(*both)
torch.testing.assert_close((pi * kl_estimates(log_pi, reference).k3).sum().detach(), exact_kl)

rewards, values, mask = torch.randn(2, 9), torch.randn(2, 10), torch.ones(2, 10, dtype=torch.bool)
mask[:, -1] = False
rewards = nn.functional.pad(rewards, (0, 1))
surprise = rewards[:, :-1] + 0.9 * values[:, 1:] - values[:, :-1]
distance = torch.arange(9)[None] - torch.arange(9)[:, None]
powers = torch.where(distance >= 0, (0.9 * 0.8) ** distance.clamp(min=0).float(), 0.0)
found = generalized_advantages(rewards, values, mask, torch.zeros(2).bool(), gamma=0.9, lam=0.8)
torch.testing.assert_close(found.advantages[:, :-1], surprise @ powers.T)

# %% [markdown]
# ## How fast is it?
#
# Rollouts are written by the batched, cached generation of {doc}`14_generation`. How much does the
# batch bring?

# %% tags=["nbval-ignore-output"]
seconds = []
for size in (1, 64):
    began = time.perf_counter()
    write_responses(careless.model, prompts[:64], tokenizer=tokenizer, batch_size=size)
    seconds.append(time.perf_counter() - began)
print(f"64 responses in one batch are written {seconds[0] / seconds[1]:.0f} times as fast")

# %% [markdown]
# ## Exercises
#
# ````{exercise} The zero of a reward
# :label: ex-rlhf-zero
# *Ten minutes.* Rewards of a reward model have no zero of their own. Write `centered(scores,
# prompts)`, which subtracts from each score the mean score of all responses to the same prompt.
# `scores` is a tensor of shape (rows), and `prompts` a tensor of the same shape with the number of
# each row's prompt, in any order.
# ````


# %% tags=["solution"]
def centered(scores: Tensor, prompts: Tensor) -> Tensor:
    """Scores less the mean of their prompt."""
    same = (prompts[:, None] == prompts[None, :]).to(scores)
    return scores - same @ scores / same.sum(dim=1)


# %% tags=["check"]
found = centered(torch.tensor([1.0, 5.0, 3.0, 9.0]), torch.tensor([7, 2, 7, 2]))
assert found.shape == (4,), "one number for each row"
assert abs(found[0] + found[2]) < 1e-6, "the scores of a prompt do not add up to 0"
assert torch.allclose(found, torch.tensor([-1.0, -2.0, 1.0, 2.0])), f"got {found.tolist()}"

# %% [markdown]
# ````{exercise} A margin that depends on the pair
# :label: ex-rlhf-margin
# *Fifteen minutes.* People often say how much better a reply is: slightly, clearly, much. Write
# `graded_loss(chosen, rejected, grades)`, the mean of the losses of {eq}`rlhf-preference-loss` with
# $\Delta$ less a margin of 0 for grade 0, 0.5 for grade 1 and 1 for grade 2. All arguments are
# tensors of shape (pairs), `grades` of whole numbers. It must not overflow for differences of 1000.
# ````


# %% tags=["solution"]
def graded_loss(chosen: Tensor, rejected: Tensor, grades: Tensor) -> Tensor:
    """The mean loss of comparisons with graded margins."""
    return -nn.functional.logsigmoid(chosen - rejected - 0.5 * grades).mean()


# %% tags=["check"]
zero = torch.zeros(1)
for grade, margin in ((0, 0.0), (1, 0.5), (2, 1.0)):
    loss = graded_loss(zero + margin, zero, torch.tensor([grade]))
    assert abs(loss - math.log(2)) < 1e-5, f"with grade {grade}, a difference of {margin} is even"
assert graded_loss(zero + 1000, zero, torch.tensor([0])) < 1e-6, "a sure order costs nothing"
assert abs(graded_loss(zero, zero + 1000, torch.tensor([0])) - 1000) < 1e-2, "it overflows"
two = graded_loss(torch.zeros(2), torch.zeros(2), torch.tensor([0, 0]))
assert abs(two - math.log(2)) < 1e-5, "the mean over pairs, not the sum"

# %% [markdown]
# ````{exercise} How many samples for a distance
# :label: ex-rlhf-distance
# *Fifteen minutes.* Write `samples_for(nats)`, the largest $n$ for which the best of $n$ is at most
# so far from the policy by {eq}`rlhf-best-of-n`. It should be fast for 12 nats, where $n$ has six
# digits.
# ````


# %% tags=["solution"]
def samples_for(nats: float) -> int:
    """The largest n whose bound is at most so large."""
    low, high = 1, 2
    while math.log(high) - (high - 1) / high <= nats:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        within_it = math.log(middle) - (middle - 1) / middle <= nats
        low, high = (middle, high) if within_it else (low, middle)
    return low


# %% tags=["check"]
assert samples_for(0.0) == 1, "a single reply is no distance away"
assert samples_for(best_of_n_kl(4) + 1e-9) == 4, "at the bound of 4 samples, 4 is right"
assert samples_for(best_of_n_kl(5) - 1e-9) == 4, "just below the bound of 5 samples, 4 is right"
assert best_of_n_kl(samples_for(12.0)) <= 12 < best_of_n_kl(samples_for(12.0) + 1), "of 12 nats"

# %% [markdown]
# ````{exercise} Several turns of credit
# :label: ex-rlhf-returns
# *Thirty minutes.* Write `returns_to_go(rewards, mask, gamma)`: for each token of a response the
# sum of its own reward and of all later ones of the same response, each discounted by `gamma` for
# every token in between. Where `mask` is false the result is 0, and what stands there must not
# matter, not even if it is NaN. All tensors have the shape (rows, sequence). The response of each
# row is one run of true places, which need not begin at the first.
# ````


# %% tags=["solution"]
def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted rewards from each token on."""
    kept = torch.where(mask, rewards, 0.0)
    found, running = torch.zeros_like(kept), torch.zeros_like(kept[:, 0])
    for t in reversed(range(mask.size(1))):
        running = torch.where(mask[:, t], kept[:, t] + gamma * running, 0.0)
        found[:, t] = running
    return found


# %% tags=["check"]
rewards = torch.tensor([[math.nan, 1.0, 2.0, 4.0], [1.0, 1.0, math.nan, math.nan]])
mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
found = returns_to_go(rewards, mask, 0.5)
assert not found.isnan().any(), "what is masked has leaked in"
assert (found[~mask] == 0).all(), "masked places are 0"
assert found[0, 3] == 4, "the last token has its own reward alone"
assert found[0].tolist() == [0, 3, 4, 4], f"expected 1 + 2/2 + 4/4 at the first, got {found[0]}"
assert found[1].tolist() == [1.5, 1, 0, 0], "the second row is over after two tokens"

# %% [markdown]
# ## Summary
#
# A preference says which of two replies is better. If odds multiply, replies have rewards, and the
# difference of rewards gives the probability of the choice. A reward model is a language model with
# one number for a head, read at the last token, and trained to give the chosen reply the larger
# number. Ours learned forms that hold for everybody, such as refusals, and nothing about the truth
# of single facts; there it was sure, and right by chance.
#
# The policy gradient is the mean of reward times the gradient of the log-probability. A baseline
# leaves it as it is and lowers its variance, and a critic does so at every token. PPO limits how
# far several steps on one rollout can go, and the divergence from the reference limits how far the
# run can go. Which estimate of the divergence is used, and where, decides which gradient it has.
#
# Pushed without such a price, the policy found what the reward model had got wrong: the learned
# reward rose to the end, and the true one fell. A judge with a known weakness was exploited, and
# cured by explaining the weakness in the comparison.
#
# ### Checklist
#
# - Look at accuracy by kind of comparison, and at calibration, before any reward is used.
# - Read the reward at the last token, and test it with padding on either side.
# - Do the compared replies cover what a policy may come to do? Drop and count pairs that a cut has
#   made equal.
# - Run best-of-n and rejection sampling first; they need no new machinery.
# - Keep ids and log-probabilities of what was drawn; never encode a decoded reply again.
# - Switch dropout off: at the first step all ratios must be 1, and nothing may be clipped.
# - Tell an end token from a cut at the limit, in advantages and in the log.
# - Put the divergence into the reward (as $k_1$) or into the loss (as $k_2$), not into both.
# - Log reward, divergence, entropy, clipped share, length, and the share that is finished.
# - Keep the rollout in the checkpoint.
# - Read replies along the way. A learned reward that rises proves nothing.
#
# ### Further reading
#
# Christiano and colleagues {cite}`christiano2017deep` learned rewards from comparisons of motions,
# Ziegler and colleagues {cite}`ziegler2019finetuning` and Stiennon and colleagues
# {cite}`stiennon2020learning` from comparisons of texts. InstructGPT {cite}`ouyang2022training` and
# Bai and colleagues {cite}`bai2022training` describe complete systems. Huang and colleagues
# {cite}`huang2024nplus` collect the details that decide whether PPO works, and Gao and colleagues
# {cite}`gao2023scaling` measure over-optimization with a large reward model in the place of our
# true one. Lambert's book {cite}`lambert2025rlhf` covers the whole field.
