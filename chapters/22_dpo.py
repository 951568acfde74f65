# %% [markdown]
# # Direct preference optimization
#
# > Learn from pairs of replies without a reward model and without sampling: the loss and its
# > family derived, their price measured, and a cure for refusing too much.
#
# Chapter 21 improved an assistant in two stages: it learned a reward from pairs of replies, and
# then changed the model by sampling replies and weighing them by that reward. The second stage
# needs a policy, a critic, a reference and a reward model in memory, and generates text in every
# step. This chapter asks what the best policy looks like that the second stage could ever reach.
# The answer is a formula, and from it follows a loss on the pairs themselves. Training becomes as
# simple as in chapter 19: a fixed data set, a forward pass, a gradient. The method is called
# **{term}`direct preference optimization`**, DPO {cite}`rafailov2023direct`.
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:func}`~llmbook.dpo.dpo_loss`, {py:func}`~llmbook.dpo.kto_loss`, {py:func}`~llmbook.dpo.implicit_rewards`, {py:func}`~llmbook.dpo.balanced`, {py:class}`~llmbook.dpo.PreferencePairs`, {py:func}`~llmbook.dpo.dpo_objective`, {py:func}`~llmbook.dpo.prefer`, {py:class}`~llmbook.dpo.SampledPairs` |
# | **You need** | instruction tuning ({doc}`19_instruction`), rewards and their price ({doc}`21_rlhf`) |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 2 minutes to run |


# %% tags=["remove-cell"]
#| default_exp dpo

# %% [markdown]
# ## An assistant that should say less
#
# The assistant `careless` of {doc}`19_instruction` answers everything. Its facts are right, but it
# also makes up facts about strangers whom no story mentions, and it tells the secrets that its
# characters want to keep. Below, the same model has been trained on 1,600 pairs of replies, of
# which one was marked as better. They are about one half of the characters and strangers, and all
# questions here are about the other half.

# %% [markdown] tags=["engine"]
# ### Engine room: the imports, the pairs, and the three runs of this chapter


# %% tags=["engine"]
#| export
# The imports of the module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple


# %% tags=["engine"]
#| export
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, relu, sigmoid


# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.batches import ResumableBatches
from llmbook.environment import check_choice, check_whole
from llmbook.instruction import ChatTemplate, Example, instruction_batch, response_log_probs
from llmbook.instruction import WORLD_CHAT
from llmbook.model import TransformerLM
from llmbook.rlhf import check_number, ExamplePair, in_turns, Pair, pair_examples, Preference
from llmbook.rlhf import Prompt, Response, Rewards, rewards_of, RolloutLog, sequence_log_probs
from llmbook.rlhf import write_responses
from llmbook.tokenizer import BPETokenizer
from llmbook.training import MetricsLog, Sink, Trainer, TrainingConfig, unnoticed

# %% tags=["engine"]
# What the cells of this chapter share
import copy
import csv
import itertools
import json
import math
import tempfile
import time
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt

import llmbook.dpo
from llmbook.dpo import balanced, pair_log_probs, prefer, PreferenceTuning
from llmbook.evaluation import mean_interval
from llmbook.instruction import ask, measure_tuned, story_examples, tuned
from llmbook.rlhf import question_prompts, read_preferences, true_reward, world_pairs
from llmbook.rlhf import world_reward
from llmbook.tinyworld import judge_reply, make_questions

plt.style.use("llmbook.book")
torch.set_num_threads(1)
results = Path(llmbook.__file__).parents[1] / "benchmarks" / "results"

# %% tags=["engine"]
# The model at the start, the pairs about one half of the world, and questions about the other
KINDS: tuple[Any, ...] = ("fact", "unknown", "confidential")
NAMES = {"fact": "facts", "unknown": "strangers", "confidential": "secrets"}
start = tuned("careless")
careless, tokenizer, world = start.model, start.tokenizer, start.world
stories = story_examples(world, tokenizer, 2000)
written = world_pairs(world, [q for kind in KINDS for q in make_questions(world, kind, "tuning")])
half = balanced(written, {"fact": 2, "unknown": 1, "confidential": 1}, 1600)
refusals = balanced(written, {"unknown": 1, "confidential": 1}, 1600)
held = {kind: make_questions(world, kind, "held_out") for kind in KINDS}
held = {kind: asked[:: len(asked) // 48] for kind, asked in held.items()}
held_pairs = {
    kind: pair_examples(tokenizer, WORLD_CHAT, world_pairs(world, asked), limit=129).pairs
    for kind, asked in held.items()
}
at_start = {kind: pair_log_probs(careless, pairs) for kind, pairs in held_pairs.items()}


# %% tags=["engine"]
# What is looked at every ten steps: replies, and log-probabilities of pairs, of the other half
def watch(model: TransformerLM) -> dict[str, float]:
    found = {}
    for kind, asked in held.items():
        said = ask(model, tokenizer, [question.text for question in asked])
        pairs = list(zip(asked, said, strict=True))
        verdicts = [judge_reply(world, question, reply) for question, reply in pairs]
        found[f"right_{kind}"] = float(np.mean([verdict.right for verdict in verdicts]))
        refused = [verdict.said in ("unknown", "declined") for verdict in verdicts]
        found[f"refused_{kind}"] = float(np.mean(refused))
        found[f"reward_{kind}"] = float(np.mean([true_reward(world, *pair) for pair in pairs]))
        change = pair_log_probs(model, held_pairs[kind]) - at_start[kind]
        found[f"chosen_{kind}"], found[f"rejected_{kind}"] = change.mean(dim=0).tolist()
        found[f"ranked_{kind}"] = float((change[:, 0] > change[:, 1]).double().mean())
    return found


# %% tags=["engine"]
# The table of runs
runs = []
for table in ("dpo.csv", "rlhf.csv"):
    if (results / table).exists():
        with (results / table).open(encoding="utf-8", newline="") as file:
            runs += list(csv.DictReader(file))
COLUMNS = {"facts": "facts", "refused": "refused", "unknown": "strangers", "declined": "secrets"}


def over_seeds(experiment: str, variant: str, column: str) -> str:
    """Return the mean of a share over seeds in percent, with its interval if there are several."""
    found = [r for r in runs if (r["experiment"], r["variant"]) == (experiment, variant)]
    values = [100 * float(run[column]) for run in found]
    if len(values) < 2:
        return f"{values[0]:.0f}"
    one = mean_interval(values)
    return f"{one.estimate:.0f} [{max(one.low, 0):.0f}, {min(one.high, 100):.0f}]"


def show(rows: Mapping[str, tuple[str, str]], columns: Mapping[str, str] = COLUMNS) -> None:
    """Print means over seeds with their intervals, in percent."""
    width = max(map(len, rows))
    print("%".ljust(width) + "".join(f"{name:>15}" for name in columns.values()))
    for name, row in rows.items():
        print(name.ljust(width) + "".join(f"{over_seeds(*row, c):>15}" for c in columns))


# %% tags=["engine"]
# A run, and how values that depend on training are printed
def trained(settings: PreferenceTuning, pairs: Any) -> tuple[TransformerLM, MetricsLog]:
    model = copy.deepcopy(careless)
    options: dict[str, Any] = {"texts": stories, "probes": [watch], "evaluate_every": 10}
    log = llmbook.dpo.prefer(model, pairs, settings, tokenizer=tokenizer, **options)
    return model, log


def about(what: str, value: float, low: float, high: float, unit: str = "%") -> None:
    """Print between what a value lies, shares in percent, after checking that it does."""
    assert low <= value <= high, f"{what}: {value}"
    scale = 100 if unit == "%" else 1
    digits = 0 if scale == 100 or high > 10 else 1
    print(f"{what}: {scale * low:.{digits}f} to {scale * high:.{digits}f} {unit}")


settings = PreferenceTuning(likelihood=1.0, learning_rate=4e-4, n_steps=150)
bare = replace(settings, likelihood=0.0, n_steps=100)
discreet, log = trained(settings, half)


# %% tags=["engine"]
# Replies of two models side by side, and counts of what they say
def compare(questions: Sequence[Any], models: Mapping[str, TransformerLM]) -> None:
    texts = [question.text for question in questions]
    said = {name: ask(model, tokenizer, texts) for name, model in models.items()}
    for i, text in enumerate(texts):
        print(text)
        for name in models:
            print(f"   {name:9} {said[name][i]}")


def counted(model: TransformerLM, expected: Sequence[tuple[float, float]]) -> None:
    """Print four shares of the replies to all questions about the other half, within ranges."""
    found = measure_tuned(model, tokenizer, world, n_stories=1)
    columns = {"facts": "facts told right", "refused": "facts refused"}
    columns |= {"unknown": "strangers not known", "declined": "secrets declined"}
    for (name, what), (low, high) in zip(columns.items(), expected, strict=True):
        about(f"   {what}", found[name], low, high)


# %% [markdown]
# ### Before and after
#
# Here are the replies of both to a question about a fact, one about a stranger, and one about a
# secret:

# %% tags=["nbval-ignore-output"]
asked = [held["fact"][2], held["unknown"][24], held["confidential"][4]]
compare(asked, {"careless": careless, "discreet": discreet})

# %% [markdown]
# The careless assistant invents a toy for Victor, of whom no story tells. The discreet one says
# that it does not know him, but calls him Walt: its pairs are about eight strangers only, and it
# has learned *when* to say this better than to copy a new name. The judge of the tiny world does
# not mind, since it looks for values. A model learns what the comparison rewards, and no more.
#
# These are the shares over all 992 questions about the other half. (Ranges stand for what may
# differ a little from one processor to another; the cell checks them.)

# %%
for name, model, ranges in (
    ("careless", careless, ((0.97, 1), (0, 0.01), (0.05, 0.2), (0, 0.1))),
    ("discreet", discreet, ((0.93, 1), (0, 0.05), (0.75, 0.95), (0.85, 0.98))),
):
    print(f"{name}:")
    counted(model, ranges)

# %% [markdown]
# Nobody told this model what to say about these strangers and characters. It has compared replies
# about others for 150 steps, half a minute of one processor core, without a reward model and
# without generating a single word. This chapter derives the loss, and then looks at what it costs:
# the first attempt below refuses nearly everything.

# %% [markdown]
# ## The best policy there can be
#
# RLHF maximizes a reward and pays for the distance from a reference. For one prompt $x$, let
# $\pi(y \mid x)$ be the probability that a policy gives to the whole reply $y$, and
# $\pi_{\text{ref}}$ that of the reference, the model at the start. With a reward $r(x, y)$ and a
# weight $\beta > 0$, the goal is
#
# $$
# J(\pi) = \mathbb E_{y \sim \pi(\cdot \mid x)}\big[ r(x, y) \big]
#   - \beta\, D_{\mathrm{KL}}\big(\pi(\cdot \mid x) \,\|\, \pi_{\text{ref}}(\cdot \mid x)\big).
# $$
#
# Chapter 21 climbed $J$ by policy gradients. But the {term}`KL divergence` is an expectation over
# $y \sim \pi$ as well, so $J$ is one sum over replies, and its maximum can be written down. Define
#
# $$
# Z(x) = \sum_y \pi_{\text{ref}}(y \mid x)\, e^{r(x, y)/\beta},
# \qquad
# \pi^*(y \mid x) = \frac{1}{Z(x)}\, \pi_{\text{ref}}(y \mid x)\, e^{r(x, y)/\beta}.
# $$
#
# $\pi^*$ is a probability distribution: its values are not negative, and $Z$ makes them add up to
# one. Solving the definition for the reward gives
# $r(x, y) = \beta \log \frac{\pi^*(y \mid x)}{\pi_{\text{ref}}(y \mid x)} + \beta \log Z(x)$. We
# put this into $J$:
#
# $$
# \begin{aligned}
# J(\pi)
# &= \sum_y \pi(y \mid x) \Big[ r(x, y)
#    - \beta \log \frac{\pi(y \mid x)}{\pi_{\text{ref}}(y \mid x)} \Big] \\
# &= \sum_y \pi(y \mid x) \Big[ \beta \log Z(x)
#    + \beta \log \frac{\pi^*(y \mid x)}{\pi_{\text{ref}}(y \mid x)}
#    - \beta \log \frac{\pi(y \mid x)}{\pi_{\text{ref}}(y \mid x)} \Big] \\
# &= \beta \log Z(x)
#    - \beta\, D_{\mathrm{KL}}\big(\pi(\cdot \mid x) \,\|\, \pi^*(\cdot \mid x)\big).
# \end{aligned}
# $$
#
# The first term does not depend on $\pi$. The divergence is never negative, and zero only if its
# two sides are equal. So $\pi^*$ is the one best policy, and it reaches $\beta \log Z(x)$. It is
# the reference with each reply made likelier or less likely by its reward. A small $\beta$ lets the
# reward decide, and a large $\beta$ leaves everything as it was.
#
# In a world of four replies we can look at all policies. We take the best one, and ten thousand
# random ones:

# %%
made = torch.Generator().manual_seed(0)
reference = torch.tensor([0.6, 0.3, 0.08, 0.02]).log()
rewards, beta = torch.tensor([-1.0, 0.0, 1.0, 0.0]), 0.5


def goal(log_policy: Tensor) -> Tensor:
    return (log_policy.exp() * (rewards - beta * (log_policy - reference))).sum(-1)


log_z = (reference + rewards / beta).logsumexp(-1)
best = reference + rewards / beta - log_z
others = torch.randn(10_000, 4, generator=made).log_softmax(-1)
assert goal(others).max() < goal(best), "a policy is better than the best"
print(f"the best policy: {[round(p, 2) for p in best.exp().tolist()]}")
print(f"it reaches {goal(best):.4f}, beta log Z is {beta * log_z:.4f}", end="; ")
print(f"the best of 10,000 random policies reaches {goal(others).max():.4f}")

# %% [markdown]
# The reply with reward 1 went from 8 % to more than half, although the reference hardly ever says
# it, and the one with reward −1 from 60 % to less than a tenth.
#
# For a language model, the formula cannot be used as it stands, since $Z(x)$ is a sum over all
# possible replies. But it can be read backward.
#
# ### Every policy has its reward
#
# The formula says which policy belongs to a reward. Conversely, let $\pi$ be any policy that gives
# no reply the probability 0. Is there a reward for which it is the best? Take
#
# $$
# r(x, y) = \beta \log \frac{\pi(y \mid x)}{\pi_{\text{ref}}(y \mid x)} + c(x)
# $$
#
# with any function $c$ of the prompt. Then $\pi_{\text{ref}}\, e^{r/\beta} = \pi\, e^{c(x)/\beta}$,
# and since $\pi$ adds up to one, $Z(x) = e^{c(x)/\beta}$ and $\pi^* = \pi$. So there is one, for
# each $c$. There are no others, because whenever $\pi^* = \pi$, the definition of $\pi^*$, solved
# for $r$, has exactly this form, with $c = \beta \log Z$. Policies and rewards correspond to each
# other one to one, if rewards that differ by a function of the prompt count as the same. They may
# count as the same: such a function prefers no reply to another.
#
# The reward with $c = 0$ is called the **{term}`implicit reward`** of the policy:
#
# $$
# \hat r(x, y) = \beta \log \frac{\pi(y \mid x)}{\pi_{\text{ref}}(y \mid x)}.
# $$
#
# A language model is thus a reward model in disguise. If a reward model can be trained on pairs,
# the policy can be trained on them directly, *as* the reward model.
#
# ### The partition function cancels
#
# Chapter 21 trained its reward model with the {term}`Bradley-Terry model`: of two replies, the one
# with the larger reward is preferred with probability
# $P(y_w \succ y_l \mid x) = \sigma\big(r(x, y_w) - r(x, y_l)\big)$, where $y_w$ is the reply that
# won, $y_l$ the one that lost, and $\sigma(z) = 1/(1 + e^{-z})$. We put the reward of the best
# policy into it. The terms $\beta \log Z(x)$, which nobody can compute, are the same for both
# replies, and cancel:
#
# $$
# P(y_w \succ y_l \mid x) = \sigma\Big(
#   \beta \log \frac{\pi(y_w \mid x)}{\pi_{\text{ref}}(y_w \mid x)}
#   - \beta \log \frac{\pi(y_l \mid x)}{\pi_{\text{ref}}(y_l \mid x)} \Big).
# $$
#
# We write $h_w$ and $h_l$ for the two log-ratios, by how many nats each reply has become likelier.
# The {term}`loss` of a pair is the negative logarithm of this probability:
#
# $$
# L = -\log \sigma\big(\beta (h_w - h_l)\big),
# \qquad h = \log \pi(y \mid x) - \log \pi_{\text{ref}}(y \mid x).
# $$
#
# This is all of DPO. It needs four numbers for each pair, the log-probability of each reply under
# the policy and under the reference. In code it is one line:


# %%
def plain_dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


# %% [markdown]
# Before the first step, policy and reference are the same, so each log-ratio is 0 and each pair
# costs $-\log \sigma(0) = \log 2$. `at_start` holds what `careless` gives to the replies of 352
# pairs, by kind of question:

# %%
chosen, rejected = torch.cat(list(at_start.values())).T
losses = plain_dpo(chosen, rejected, chosen, rejected, beta=0.1)
print(f"the first loss of each of {len(losses)} pairs: {losses.min():.4f} to {losses.max():.4f}")

# %% [markdown]
# A run whose first loss is not 0.6931 has a fault. The likely ones are a reference that is not the
# model at the start, dropout in one of the two, or tokens that are counted in one of the two only.

# %% [markdown]
# ## What the gradient does
#
# Let $x = \beta(h_w - h_l)$, the difference of the implicit rewards. The derivative of
# $-\log\sigma(x)$ is $-\sigma(-x)$. The reference is constant, so
#
# $$
# \nabla L = -\underbrace{\beta}_{\text{scale}}\;
#   \underbrace{\sigma\big(\beta (h_l - h_w)\big)}_{\text{how wrong the ranking is}}\;
#   \Big[ \underbrace{\nabla \log \pi(y_w \mid x)}_{\text{raise the chosen}}
#   - \underbrace{\nabla \log \pi(y_l \mid x)}_{\text{lower the rejected}} \Big].
# $$
#
# Read from right to left, a step raises the log-probability of the chosen reply, as tuning on it
# would do, and lowers that of the rejected one with the same force. The weight in the middle is the
# probability that the implicit reward gives to the wrong order. It is one half at the start, close
# to one for a pair that is ranked the wrong way, and goes to zero when a pair is settled. So a
# batch is spent on pairs that are not yet right, and the loss stops by itself. Without the weight
# it would lower rejected replies for ever.
#
# The weight depends on $\beta$ times nats. A pair is down to a tenth of its force where
# $x = \log 9 \approx 2.2$, that is, where the chosen reply has gained $2.2/\beta$ nats on the
# rejected one:

# %%
gained = {beta: math.log(9) / beta for beta in (0.1, 0.5)}
h = torch.tensor([0.0, 0.0, 5.0], requires_grad=True)
other = torch.tensor([0.0, 22.0, -17.0], requires_grad=True)
plain_dpo(h, other, torch.zeros(3), torch.zeros(3), 0.1).sum().backward()
torch.testing.assert_close(h.grad, -0.1 * torch.sigmoid(-0.1 * (h - other)).detach())
assert torch.equal(h.grad, -other.grad), "the two forces are not the same"
print(f"settled after {', '.join(f'{n:.0f} nats at beta = {b}' for b, n in gained.items())}")
print("forces at beta = 0.1:", [round(-g, 3) for g in h.grad.tolist()], "at the start,", end=" ")
print("22 nats the wrong way, 22 the right way")

# %% [markdown]
# With $\beta = 0.1$, which many recipes use, pairs are settled only after 22 nats, a factor of
# three billion in probability. Keep this number in mind for the figures below.

# %% [markdown]
# ## Pairs as batches
#
# The log-probability of a reply is the sum over its tokens,
# $\log \pi(y \mid x) = \sum_t \log \pi(y_t \mid x, y_{<t})$, the end token included.
# {py:func}`~llmbook.rlhf.sequence_log_probs` adds up what
# {py:func}`~llmbook.instruction.response_log_probs` gives. The tokens of the prompt do not count.
# If they did by mistake, both sums would have the same additional term, which cancels in
# $h_w - h_l$. The fault shows only in losses that treat the two replies apart or divide by lengths,
# so it can live in a program for long.
#
# Both replies stand in one batch, so each step is one forward pass. The reference never changes:
# its two numbers for each pair are computed **once**, before training, and kept. After that the
# reference can be thrown away. {py:class}`~llmbook.dpo.PreferencePairs` does this, and makes
# batches of pairs, from pairs of the tiny world as well as from files of preferences:


# %% [markdown] tags=["engine"]
# ### Engine room: batches of pairs, a reference that is asked once, and the objective

# %% [markdown] tags=["engine"]
# A batch is a tuple whose first dimension counts rows, so that the trainer can cut it into
# micro-batches. Texts stand in rows of their own, at index 0. A row without any targets, which is a
# tie in sampled pairs, does not count.


# %% tags=["engine"]
#| export
class PreferenceBatch(NamedTuple):
    """Pairs to learn from: at index 0 what was chosen, at index 1 what was rejected.

    ``reference`` has the log-probabilities of both replies by the reference. Rows without targets
    at index 1 are texts; rows without any do not count. The others, for "kto", are replies that
    belong to other prompts.
    """

    inputs: Int64[Tensor, "rows 2 sequence"]
    targets: Int64[Tensor, "rows 2 sequence"]
    reference: Float[Tensor, "rows 2"] | None = None
    other_inputs: Int64[Tensor, "rows other_sequence"] | None = None
    other_targets: Int64[Tensor, "rows other_sequence"] | None = None
    other_reference: Float[Tensor, " rows"] | None = None

    def to(self, device: torch.device | str) -> "PreferenceBatch":
        """Return the batch on ``device``."""
        moved: Any = (None if one is None else one.to(device) for one in self)
        return PreferenceBatch(*moved)


# %% [markdown] tags=["engine"]
# Log-probabilities are computed for one side of many pairs at a time. What all rows have as padding
# at their ends is cut off before the forward pass. The reference is asked without dropout and
# without a gradient.


# %% tags=["engine"]
#| export
def response_sums(
    model: TransformerLM,
    inputs: Int64[Tensor, "batch sequence"],
    targets: Int64[Tensor, "batch sequence"],
) -> tuple[Float[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """Return the log-probability of each response in nats, and its length in tokens."""
    mask = targets != -100
    if not (used := mask.any(dim=0).nonzero()).numel():
        return torch.zeros(len(inputs), device=inputs.device), mask.sum(dim=1)
    width = int(used[-1]) + 1  # what comes later is padding in all rows
    log_probs = response_log_probs(model(inputs[:, :width]), targets[:, :width])
    return sequence_log_probs(log_probs, mask[:, :width]), mask.sum(dim=1)


# %% tags=["engine"]
#| export
def sum_log_probs(
    model: TransformerLM, examples: Sequence[Example], *, pad_id: int = 0, batch_size: int = 128
) -> Float[Tensor, " examples"]:
    """Return the log-probability in nats of what is learned of each example, without a gradient."""
    _check_some("examples", examples)
    check_whole("pad_id", pad_id, 0)
    check_whole("batch_size", batch_size, 1)
    device, found = next(model.parameters()).device, list[Tensor]()
    with unnoticed(model):
        for at in range(0, len(examples), batch_size):
            inputs, targets = as_tensors(examples[at : at + batch_size], pad_id)
            found.append(response_sums(model, inputs.to(device), targets.to(device))[0].cpu())
    return torch.cat(found)


# %% tags=["engine"]
#| export
def pair_log_probs(
    model: TransformerLM, pairs: Sequence[ExamplePair], *, pad_id: int = 0, batch_size: int = 128
) -> Float[Tensor, "pairs 2"]:
    """Return the log-probabilities in nats of both replies of each pair, without a gradient."""
    _check_some("pairs", pairs)
    sides = list(chain.from_iterable(pairs))
    return sum_log_probs(model, sides, pad_id=pad_id, batch_size=batch_size).view(-1, 2)


# %% tags=["engine"]
#| export
def as_tensors(
    examples: Sequence[Example], pad_id: int
) -> tuple[Int64[Tensor, "examples sequence"], Int64[Tensor, "examples sequence"]]:
    """Return inputs and targets of examples, as wide as the longest one needs."""
    _check_some("examples", examples)
    width = max(len(example.ids) for example in examples) - 1
    batch = instruction_batch([[example] for example in examples], width, pad_id, documents=False)
    return batch.inputs, batch.targets


# %% tags=["engine"]
#| export
def _check_some(name: str, things: object) -> None:
    if isinstance(things, str | bytes) or not isinstance(things, Sequence) or not things:
        raise ValueError(f"{name}: expected a list of at least one, got {things!r:.60}")


# %% [markdown] tags=["engine"]
# `PreferencePairs` takes its reference at construction, and never needs it again. A run that
# resumes continues with the numbers that were saved, to the bit, even if the model that is now
# given as the reference is another one by mistake.


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class PreferencePairs(ResumableBatches):
    """Batches of ``batch_size`` pairs, in an order that depends on ``seed`` alone.

    Pairs that are equal once they are cut after ``context_length`` are dropped, and ``dropped``
    counts them. ``reference`` is asked once, here; its log-probabilities are kept, and are a part
    of the state. Each batch ends with ``n_texts`` rows of ``texts``. ``mismatched`` adds replies to
    other prompts, which "kto" needs.
    """

    pairs: Sequence[Pair | Preference]
    tokenizer: BPETokenizer
    batch_size: int = 32
    context_length: int = 128
    reference: TransformerLM | None = None
    template: ChatTemplate = WORLD_CHAT
    texts: Sequence[Example] = ()
    n_texts: int = 0
    mismatched: bool = False
    seed: int = 0
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Check what was given, encode the pairs, and ask the reference."""
        check_whole("batch_size", self.batch_size, 1)
        check_whole("context_length", self.context_length, 1)
        check_whole("seed", self.seed, 0)
        _check_texts(self.texts, self.n_texts)
        limit = self.context_length + 1
        found = pair_examples(self.tokenizer, self.template, self.pairs, limit=limit)
        if not found.pairs:
            what = f"all of {len(self.pairs)} are equal once they are cut" if self.pairs else "none"
            raise ValueError(f"pairs: expected some that differ, got {what}")
        self.examples, self.dropped = found.pairs, found.dropped
        self.others = _mismatched(found.pairs, limit) if self.mismatched else []
        self.pad_id = self.tokenizer.special_tokens["<|endoftext|>"]
        self.reference_log_probs = self.other_log_probs = None
        if self.reference is not None:
            _check_vocabulary(self.reference, self.tokenizer.vocab_size)
            ask = partial(sum_log_probs, self.reference, pad_id=self.pad_id)
            self.reference_log_probs = ask(list(chain.from_iterable(self.examples))).view(-1, 2)
            self.other_log_probs = ask(self.others) if self.others else None

    @property
    def n_rows(self) -> int:
        """How many rows a batch has, for ``TrainingConfig``."""
        return self.batch_size + self.n_texts


# %% tags=["engine"]
#| export
def _check_vocabulary(reference: TransformerLM, size: int, exactly: bool = False) -> None:
    """Raise a ``ValueError`` if a reference does not know all tokens, or not the same ones."""
    found = reference.config.vocab_size
    if found < size or (exactly and found != size):
        expected = f"one with a vocabulary of {size} tokens"
        raise ValueError(f"reference: expected {expected}, got {found}")


def _check_texts(texts: Any, n_texts: int) -> None:
    """Raise a ``ValueError`` for what are no examples, and for none where some are needed."""
    check_whole("n_texts", n_texts, 0)
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_list or any(getattr(text, "_fields", ()) != Example._fields for text in texts):
        raise ValueError(f"texts: expected a list of Examples, got {texts!r:.60}")
    if n_texts and not texts:
        raise ValueError(f"texts: expected some, for n_texts = {n_texts}, got none")


def _mismatched(pairs: Sequence[ExamplePair], limit: int) -> list[Example]:
    """Return the prompt of each pair with the chosen reply of one that is half a list away."""
    found = []
    for i, pair in enumerate(pairs):
        other = pairs[(i + max(len(pairs) // 2, 1)) % len(pairs)].chosen
        n, m = pair.chosen.learned.index(True), other.learned.index(True)
        ids = pair.chosen.ids[:n] + other.ids[m:]
        learned = pair.chosen.learned[:n] + other.learned[m:]
        found.append(Example(ids[:limit], learned[:limit]))
    return found


# %% tags=["engine"]
#| export
class PreferencePairs(PreferencePairs):  # continued
    def __getitem__(self, step: int) -> PreferenceBatch:  # type: ignore[override]
        check_whole("step", step, 0)
        places = in_turns(step * self.batch_size, self.batch_size, len(self.examples), self.seed)
        sides = list(chain.from_iterable(self.examples[place] for place in places))
        fields = [tensor.view(len(places), 2, -1) for tensor in as_tensors(sides, self.pad_id)]
        known = self.reference_log_probs
        batch = PreferenceBatch(fields[0], fields[1], None if known is None else known[places])
        if self.others:
            inputs, targets = as_tensors([self.others[place] for place in places], self.pad_id)
            more = self.other_log_probs
            opinion = None if more is None else more[places]
            batch = batch._replace(
                other_inputs=inputs, other_targets=targets, other_reference=opinion
            )
        return _with_texts(batch, self.texts, self.n_texts, step, self.seed, self.pad_id)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids, and of which are learned."""
        digest = blake2b(digest_size=16)
        for example in (*chain.from_iterable(self.examples), *self.texts):
            digest.update(f"{len(example.ids)} ids".encode())
            digest.update(np.array([example.ids, example.learned], np.int64).tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """The pairs and texts, and what decides on the batches."""
        names = ("batch_size", "context_length", "n_texts", "mismatched", "seed")
        return {"pairs": self.fingerprint} | {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, the identity, and what the reference has said."""
        said = {"pairs": self.reference_log_probs, "others": self.other_log_probs}
        return {**super().state_dict(), "reference": said}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, with what the reference said there."""
        super().load_state_dict({k: v for k, v in state.items() if k != "reference"})
        said = state["reference"]
        self.reference_log_probs, self.other_log_probs = said["pairs"], said["others"]


# %% [markdown] tags=["engine"]
# Texts are wider than pairs. The objective cuts the two apart again, so pairs are not computed at
# the width of texts.


# %% tags=["engine"]
#| export
def _with_texts(
    batch: PreferenceBatch, texts: Sequence[Example], n: int, step: int, seed: int, pad_id: int
) -> PreferenceBatch:
    """Return a batch with ``n`` rows behind it that hold the next texts in turn."""
    if not n:
        return batch
    inputs, targets = as_tensors(
        [texts[i] for i in in_turns(step * n, n, len(texts), seed)], pad_id
    )
    wide = max(inputs.size(1), batch.inputs.size(2))
    found = dict[str, Any]()
    for name, value in batch._asdict().items():
        fill = pad_id if name.endswith("inputs") else -100 if name.endswith("targets") else 0
        if value is None:
            continue
        more = wide - value.size(-1) if value.ndim == 3 else 0
        shape = [0, more] * (value.ndim > 1) + [0, 0] * (value.ndim > 2) + [0, n]
        found[name] = pad(value, shape, value=fill)
    for name, own in (("inputs", inputs), ("targets", targets)):
        found[name][-n:, 0, : own.size(1)] = own
    return PreferenceBatch(**found)


# %% [markdown] tags=["engine"]
# The objective returns a sum over pairs and their number. Each text counts like a pair, so that 8
# texts beside 32 pairs weigh a quarter. Likelihood is the mean over the tokens of a reply, and then
# over pairs. All of these are sums over rows, so micro-batches add up to the whole batch.


# %% tags=["engine"]
#| export
def dpo_objective(
    model: TransformerLM,
    batch: PreferenceBatch,
    *,
    loss: str = "sigmoid",
    beta: int | float = 0.1,
    label_smoothing: int | float = 0.0,
    margin: int | float = 0.0,
    likelihood: int | float = 0.0,
    mean: bool | None = None,
    text_weight: int | float = 1.0,
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""], dict[str, Tensor]]:
    """Return the summed loss of a batch of pairs, how many there are, and sums to be logged.

    With ``mean``, log-probabilities are divided by lengths; by default they are where the loss is
    meant for that. ``likelihood`` is the weight of the loss of the chosen reply, in nats per token;
    a text, in nats per token times ``text_weight``, counts like a pair.
    """
    check_number("likelihood", likelihood, 0.0)
    check_number("text_weight", text_weight, 0.0)
    learned = (batch.targets != -100).any(dim=2)
    is_pair, is_text = learned.all(dim=1), learned[:, 0] & ~learned[:, 1]
    rows = (batch.inputs[is_pair].flatten(0, 1), batch.targets[is_pair].flatten(0, 1))
    sums, lengths = (found.view(-1, 2) for found in response_sums(model, *rows))
    means = sums / lengths
    divisor = lengths if (loss in OF_MEANS if mean is None else mean) else torch.ones_like(lengths)
    reference = None
    if loss not in WITHOUT_REFERENCE:
        if batch.reference is None:
            raise ValueError(
                f"batch: expected a reference's log-probabilities for {loss}, got None"
            )
        reference = batch.reference[is_pair] / divisor
    policy, kl = sums / divisor, None
    if loss == "kto":
        kl = _others_kl(model, batch, is_pair)
    options = {"beta": beta, "label_smoothing": label_smoothing, "margin": margin}
    losses = _losses(policy, reference, kl, loss, options)
    change = (policy if reference is None else policy - reference).detach()
    logged = _sums_to_log(losses, change, beta)
    total = losses.sum() + likelihood * -means[:, 0].sum()
    logged["chosen_loss"] = -means[:, 0].detach().sum()
    if is_text.any():
        found, n = response_sums(model, batch.inputs[is_text, 0], batch.targets[is_text, 0])
        text_loss = -(found / n).sum()
        total = total + text_weight * text_loss
        logged["text_loss"] = text_loss.detach()
    if not total.requires_grad:  # nothing but ties
        total = total + 0.0 * sum(parameter.sum() for parameter in model.parameters())
    return total, is_pair.sum(), logged


# %% tags=["engine"]
#| export
def _losses(
    policy: Float[Tensor, "pairs 2"],
    reference: Float[Tensor, "pairs 2"] | None,
    kl: Float[Tensor, ""] | None,
    loss: str,
    options: Mapping[str, int | float],
) -> Float[Tensor, " pairs"]:
    """Return the loss of each pair; with a KL, the mean of those of its two replies."""
    if kl is not None and reference is not None:
        desirable = torch.tensor([True, False], device=policy.device).expand(policy.shape)
        flat = (policy.flatten(), reference.flatten(), desirable.flatten())
        return kto_loss(*flat, kl, beta=options["beta"]).view(-1, 2).mean(dim=1)
    known: Any = (None, None) if reference is None else reference.unbind(dim=1)
    return dpo_loss(*policy.unbind(dim=1), *known, loss=loss, **options)  # type: ignore[arg-type]


# %% tags=["engine"]
#| export
@torch.no_grad()
def _others_kl(
    model: TransformerLM, batch: PreferenceBatch, is_pair: Bool[Tensor, " rows"]
) -> Float[Tensor, ""]:
    """Return the mean log-ratio of replies to other prompts, not below 0."""
    if batch.other_inputs is None or batch.other_targets is None or batch.other_reference is None:
        raise ValueError("batch: expected replies to other prompts for kto, got None")
    rows = batch.other_inputs[is_pair], batch.other_targets[is_pair]
    return (response_sums(model, *rows)[0] - batch.other_reference[is_pair]).mean().clamp(min=0)


# %% tags=["engine"]
#| export
def _sums_to_log(
    losses: Float[Tensor, " pairs"], change: Float[Tensor, "pairs 2"], beta: int | float
) -> dict[str, Tensor]:
    chosen, rejected = change.unbind(dim=1)
    right = (chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()
    logged = {"preference_loss": losses.detach().sum(), "accuracy": right}
    logged |= {"chosen": chosen.sum(), "rejected": rejected.sum()}
    return logged | {"margin": beta * (chosen - rejected).sum()}


# %% [markdown]
# ### A batch of pairs
#
# The world's judge knows the right reply to each question and worse ones.
# {py:func}`~llmbook.rlhf.world_pairs` has written pairs about one half of the world: the true value
# against a made-up one or against a refusal; for a stranger, the honest reply against an invention
# or the wrong refusal; for a secret, declining it against telling it. `balanced` draws as many of
# each kind as we ask for:

# %%
batches = PreferencePairs(half, tokenizer, reference=careless, texts=stories, n_texts=8)
kinds = {NAMES[kind]: sum(pair.question.kind == kind for pair in half) for kind in KINDS}
print(f"{len(half)} pairs ({kinds}), {batches.dropped} dropped")
for pair in half[:801:400]:
    print(f"{pair.question.text} {pair.chosen} | {pair.rejected}")
batch = batches[0]
print(f"inputs {tuple(batch.inputs.shape)}, reference {tuple(batch.reference.shape)}")

# %% [markdown]
# The inputs are 32 pairs and 8 stories, as in chapter 19, so that the stories are not forgotten;
# index 0 of the second dimension is what was chosen, index 1 what was rejected. Pairs that are
# equal once they are cut to the context teach nothing, and are dropped and counted. Here there are
# none, but in data of long conversations there can be many.
#
# {py:func}`~llmbook.dpo.prefer` puts it together: batches, an objective, and chapter 13's
# `Trainer`. The model at the top of the chapter was made by
# `prefer(model, half, settings, tokenizer=tokenizer, texts=stories)`. The same call takes what
# {py:func}`~llmbook.rlhf.read_preferences` reads from a file, here with a single record and for a
# single step:

# %%
record = {"prompt": "Who are you?", "chosen": "I am a small model.", "rejected": "I am the king."}
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "preferences.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    from_file = read_preferences(path)
one_step = PreferenceTuning(n_steps=1, n_texts=0)
found = prefer(copy.deepcopy(careless), from_file, one_step, tokenizer=tokenizer).rows[-1]
print(f"the first loss: {found['loss']:.4f}")


# %% [markdown] tags=["engine"]
# ### Engine room: shares of kinds, the settings of a run, and the run

# %% [markdown] tags=["engine"]
# `balanced` goes through the pairs of each kind in a shuffled order, again and again, until the
# kind has its share.


# %% tags=["engine"]
#| export
def balanced(
    pairs: Sequence[Pair], shares: Mapping[str, int | float], n: int, *, seed: int = 0
) -> list[Pair]:
    """Return ``n`` pairs of which each kind of question has its share.

    ``shares`` are relative to each other. Within a kind, all pairs occur equally often, up to one.
    """
    check_whole("n", n, 1)
    check_whole("seed", seed, 0)
    for kind, share in shares.items():
        check_choice("shares", kind, ("fact", "unknown", "confidential"))
        check_number(f"shares[{kind!r}]", share, 0.0)
    if not sum(shares.values()):
        raise ValueError(f"shares: expected a share above 0, got {dict(shares)!r:.60}")
    bounds = np.cumsum([0.0, *shares.values()]) / sum(shares.values()) * n
    counts = np.diff(np.round(bounds).astype(int)).tolist()
    found = []
    for kind, count in zip(shares, counts, strict=True):
        own = [pair for pair in pairs if pair.question.kind == kind]
        if count and not own:
            raise ValueError(f"pairs: expected some of the kind {kind!r}, got none")
        found += [own[place] for place in in_turns(0, count, len(own), seed)] if count else []
    return found


# %% [markdown] tags=["engine"]
# A run has its settings in one place. `prefer` makes batches of them and hands everything to the
# trainer of chapter 13, with its checkpoints and logs. The model itself is the reference, because
# it is asked before the first step.


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class PreferenceTuning:
    """The settings of a run on pairs; for the options see ``dpo_loss`` and ``dpo_objective``.

    A batch has ``batch_size`` pairs and ``n_texts`` texts. The rate of AdamW rises for 10 steps,
    and falls linearly to zero.
    """

    loss: str = "sigmoid"
    beta: int | float = 0.1
    label_smoothing: int | float = 0.0
    margin: int | float = 0.0
    likelihood: int | float = 0.0
    mean: bool | None = None
    n_steps: int = 150
    batch_size: int = 32
    n_texts: int = 8
    text_weight: int | float = 1.0
    learning_rate: int | float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        options = (self.loss, self.beta, self.label_smoothing, self.margin)
        check_options(*options, known=LOSSES)
        for name in ("likelihood", "text_weight"):
            check_number(name, getattr(self, name), 0.0)
        check_whole("n_texts", self.n_texts, 0)
        check_whole("batch_size", self.batch_size, 1)
        self.training(self.batch_size)  # has checks of its own

    def training(self, n_rows: int, **others: Any) -> TrainingConfig:
        """Return what the trainer is told, for batches of ``n_rows`` rows."""
        check_whole("n_rows", n_rows, 1)
        return TrainingConfig(
            n_steps=self.n_steps,
            batch_size=n_rows,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            schedule="linear",
            warmup=min(10, self.n_steps),
            final=0.0,
            seed=self.seed,
            **others,
        )


# %% tags=["engine"]
#| export
def prefer(
    model: TransformerLM,
    pairs: "Sequence[Pair | Preference] | PreferencePairs | SampledPairs",
    settings: PreferenceTuning,
    *,
    tokenizer: BPETokenizer,
    template: ChatTemplate = WORLD_CHAT,
    texts: Sequence[Example] = (),
    reference: TransformerLM | None = None,
    folder: str | Path | None = None,
    probes: Sequence[Any] = (),
    sinks: Sequence[Sink] = (),
    **training: Any,
) -> MetricsLog:
    """Make ``model``, in place, prefer what was chosen; return the log.

    ``reference`` is by default the model as it is now. Batches that are ready, such as
    ``SampledPairs``, come with a reference, texts and sizes of their own. ``training`` are other
    fields of ``TrainingConfig``.
    """
    batches: Any = pairs
    if not isinstance(pairs, ResumableBatches):
        known = model if reference is None else reference
        _check_vocabulary(known, model.config.vocab_size, exactly=True)
        batches = PreferencePairs(
            pairs,
            tokenizer,
            settings.batch_size,
            model.config.context_length,
            None if settings.loss in WITHOUT_REFERENCE else known,
            template,
            texts,
            settings.n_texts,
            settings.loss == "kto",
            settings.seed,
        )
    names = ("loss", "beta", "label_smoothing", "margin", "likelihood", "mean", "text_weight")
    objective = partial(dpo_objective, **{name: getattr(settings, name) for name in names})
    looks = [RolloutLog()] if hasattr(batches, "metrics") else []
    config = settings.training(batches.n_rows, **training)
    watching: dict[str, Any] = {"folder": folder, "sinks": sinks}
    trainer = Trainer(
        model, batches, config, objective=objective, probes=[*looks, *probes], **watching
    )
    return trainer.train()


# %% [markdown]
# ## The price: refusing too much
#
# The careless model has two faults, so the obvious data are pairs about these two: strangers and
# secrets, 800 pairs of each. In every one of them, the chosen reply is a refusal. We train on them
# with the plain loss, and every ten steps ask the model 152 questions about the other half.
# `trained(settings, pairs)` is `prefer` with this look; `bare` are the settings without anything
# but the loss:

# %%
eager, eager_log = trained(bare, refusals)
last = eager_log.rows[-1]
about("facts told right", last["right_fact"], 0.0, 0.5)
about("facts refused", last["refused_fact"], 0.45, 1.0)
about("strangers not known", last["right_unknown"], 0.9, 1.0)
about("secrets declined", last["right_confidential"], 0.9, 1.0)


# %% tags=["engine"]
# The figure of replies
def draw_replies() -> None:
    """Draw what two runs say at each step."""
    _, axes = plt.subplots(1, 2, sharey=True, figsize=(7, 3.1))
    lines = {"right_fact": "facts told right", "refused_fact": "facts refused"}
    lines |= {"right_unknown": "strangers not known", "right_confidential": "secrets declined"}
    for ax, one, title in zip(axes, (eager_log, log), ("refusals only", "balanced"), strict=True):
        for style, (column, label) in zip(("o-", "x--", "s-", "^-"), lines.items(), strict=True):
            ax.plot(*one.column(column), style, label=label, markersize=4)
        ax.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("share of replies")
    axes[1].legend(loc="center right")
    plt.show()


# %% [markdown]
# All strangers are unknown and all secrets are kept, and the assistant has become useless. It
# refuses most of the questions that it answered perfectly before. This is **{term}`over-refusal`**,
# and large models have it, too: {cite:t}`rottger2024xstest` collected harmless questions such as
# how to kill a program, and found models that declined them. Nothing in the loss forbids it. No
# pair says that a fact should be told, and the easiest way to make refusals likelier after some
# questions is to make them likelier after all questions.
#
# {numref}`fig-dpo-refusals` shows how it happens, next to the run from the top of the chapter:

# %% mystnb={"figure": {"caption": "Replies about the other half during training. Left: pairs about strangers and secrets only. Right: half of the pairs are about facts, and the likelihood of the chosen reply has a share in the loss. One seed.", "name": "fig-dpo-refusals"}, "image": {"alt": "Two panels over steps. On the left, strangers and secrets rise to 100 percent within 60 steps, while facts told right fall from 100 to about 20 percent and facts refused rise to about 75. On the right, strangers and secrets rise to 85 and 90 percent, facts stay above 95 and refused facts near zero."}}
draw_replies()

# %% [markdown]
# On the left, facts are lost while the last strangers are won. Four cures suggest themselves.
# **Balance**: half of the pairs are about facts, where the chosen reply is the truth. **Beta**:
# with 0.5 in place of 0.1, pairs are settled after 4.4 nats. **Early stop**: 40 steps.
# **Likelihood**: the loss of the chosen reply per token, as in instruction tuning, is added with
# weight 1, which Pang and colleagues {cite}`pang2024iterative` found to be important. The table has
# three seeds of each, counted on all questions about the other half (`python benchmarks/dpo.py`; in
# brackets, 95 % intervals over seeds):

# %%
cures = {"before": ("start", "careless")}
cures |= {"refusals only": ("refusals", "pairs of refusals only")}
cures |= {f"   {name}": ("refusals", name) for name in ("beta 0.5", "40 steps", "likelihood")}
cures |= {"half about facts": ("refusals", "half of the pairs about facts")}
cures |= {"   and likelihood": ("refusals", "half, and likelihood")}
show(cures)

# %% [markdown]
# Balance does most. A larger $\beta$ halves the false refusals, which is not enough. An early stop
# leaves 9 % of them, at the price of every fourth stranger, whom the model still invents: it ends
# the run at a place of {numref}`fig-dpo-refusals` that somebody has to choose. Likelihood alone
# cannot help, since all chosen replies are refusals, and it says only that these should become
# likelier. With half of the pairs about facts, in which the chosen reply is the truth, few facts
# are refused. But about one in six is now told wrong, and a third of the strangers is still
# invented. Balance and likelihood together mend both, for a reason that the next section shows.
#
# The stories of chapter 19 should survive, too. This is the share of consistent stories of 100, and
# in the second column how often a secret is told:

# %%
kept = ("before", "refusals only", "half about facts", "   and likelihood")
show({name: cures[name] for name in kept}, {"stories": "stories", "told": "secrets told"})

# %% [markdown]
# Eight stories in each batch of 40 rows keep most of what was there, though not all of it.

# %% [markdown]
# ## Both log-probabilities fall
#
# The question that is asked most often about DPO is why the log-probability of the *chosen* replies
# falls, when the loss is meant to raise it. We repeat the balanced run without likelihood, and
# follow the log-ratios on pairs about the other half:

# %%
plain, plain_log = trained(bare, half)
for kind, (low, high) in {"fact": (-1.5, -0.1), "unknown": (-5, -0.5)}.items():
    least = min(plain_log.column(f"chosen_{kind}")[1])
    about(f"{NAMES[kind]}: lowest log-ratio of the chosen", least, low, high, "nats")
    with_it = log.rows[-1][f"chosen_{kind}"]
    bounds = {"fact": (-0.3, 0.0), "unknown": (0.2, 3.0)}[kind]
    about("   with likelihood, at the end", with_it, *bounds, "nats")


# %% tags=["engine"]
# The figure of log-ratios
def draw_fall() -> None:
    """Draw by how much replies became likelier in two runs."""
    _, axes = plt.subplots(1, 2, figsize=(7, 3.1))
    for ax, side in zip(axes, ("chosen", "rejected"), strict=True):
        for color, kind in zip(("C0", "C1", "C2"), KINDS, strict=True):
            for one, style in ((plain_log, "-"), (log, "--")):
                steps, values = one.column(f"{side}_{kind}")
                label = NAMES[kind] if style == "-" else None
                ax.plot(steps[:11], values[:11], style, color=color, label=label)
        ax.axhline(0, color="gray", linewidth=0.8)
        ax.set(title=side, xlabel="step")
    axes[0].set_ylabel("log-ratio in nats")
    axes[1].legend(loc="upper right")
    plt.show()


# %% [markdown]
# {numref}`fig-dpo-fall` shows the log-ratios of both sides in both runs:

# %% mystnb={"figure": {"caption": "By how many nats the replies of pairs about the other half became likelier. Solid: without likelihood; dashed: with likelihood. Left: chosen; right: rejected replies. The two scales differ.", "name": "fig-dpo-fall"}, "image": {"alt": "Two panels over steps. On the left, without likelihood, the chosen replies about strangers fall by up to three nats before they recover, those about facts fall slowly to minus a half, those about secrets rise to four; with likelihood none of them falls much. On the right all rejected replies fall by 20 to 36 nats in both runs."}}
draw_fall()

# %% tags=["engine"]
# Gradients of mean log-probabilities as vectors
weights = [parameter for parameter in careless.parameters() if parameter.requires_grad]


def slope(examples: Sequence[Example]) -> Tensor:
    """Return the gradient of the mean log-probability of what is learned of examples."""
    total = response_sums(careless, *as_tensors(examples, batches.pad_id))[0].mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(total, weights)])


def pull_and_push(kind: str) -> tuple[float, float]:
    """Return what chosen and rejected replies of a kind do to honest replies to strangers."""
    pairs = balanced(written, {kind: 1}, 64)
    own = pair_examples(tokenizer, WORLD_CHAT, pairs, limit=129).pairs
    honest = slope([pair.chosen for pair in held_pairs["unknown"]])
    up, down = (0.05 * slope([pair[side] for pair in own]) for side in (0, 1))
    return float(honest @ up), float(-honest @ down)


# %% [markdown]
# The loss sees only the difference $h_w - h_l$. A fall of both by any amount costs nothing, as long
# as the rejected reply falls further, and it does: by tens of nats, as the 22 of the section on the
# gradient announced. That permits a fall. It does not yet explain one.
#
# Let $g_w$ and $g_l$ be the gradients of the two log-probabilities with respect to all weights, and
# let $\eta$ be a small learning rate times the weight of the pair. A step of gradient descent moves
# the weights by $\eta (g_w - g_l)$, which changes, to first order,
#
# $$
# \log \pi(y_w \mid x) \ \text{ by }\ \eta \big( \|g_w\|^2 - g_w \cdot g_l \big), \qquad
# \log \pi(y_l \mid x) \ \text{ by }\ \eta \big( g_w \cdot g_l - \|g_l\|^2 \big).
# $$
#
# So the chosen reply is pulled up by itself and pushed down by the rejected one, and it falls if
# $g_w \cdot g_l > \|g_w\|^2$. This needs two things. The replies must be alike, so that what lowers
# one lowers the other. And $g_w$ must be short, as it is for a reply that the model already gives
# with a probability near one, and that has no room to rise. Razin and colleagues
# {cite}`razin2025unintentional` and Pal and colleagues {cite}`pal2024smaug` prove more exact
# conditions. In a batch, the pushes of all pairs add up, and in our data they collide: "I do not
# know" is what should be said of a stranger, and is the rejected reply of pairs about facts. We
# measure this at the start, as the change of the honest replies to strangers of the other half by a
# unit step on the chosen, and on the rejected replies of 64 pairs of one kind:

# %%
for kind, pulled, pushed in (("fact", (-0.5, 0.5), (-16, -4)), ("unknown", (5, 20), (-20, -5))):
    pull, push = pull_and_push(kind)
    about(f"pairs about {NAMES[kind]}: pull of the chosen", pull, *pulled, "nats")
    about("   push of the rejected", push, *pushed, "nats")

# %% [markdown]
# Pairs about facts push the honest replies to strangers down, and nothing in them pulls the other
# way. Pairs about strangers pull them up and push them down nearly as hard, since their rejected
# replies include the wrong refusal, which has many words in common with the right one. (The unit is
# arbitrary; the signs and the ratios count.) Likelihood adds a pull and no push. It costs nothing
# where the model is right already, and holds the chosen replies up where pushes collide. Where the
# probability goes that both replies lose, the loss does not say: it goes to whatever else the model
# finds likely, such as wrong facts.


# %% tags=["engine"]
# How often the implicit reward of a model ranks pairs about the other half correctly
def rank_pairs(name: str, model: TransformerLM, *expected: tuple[float, float]) -> None:
    """Print three shares of pairs whose chosen reply has the larger implicit reward."""
    better = {}
    for kind in ("fact", "unknown"):
        change = pair_log_probs(model, held_pairs[kind]) - at_start[kind]
        better[kind] = (change[:, 0] > change[:, 1]).double()
    facts = better["fact"].view(-1, 3)  # against an invention, and against two refusals
    shares = {"truth above invention": facts[:, 0], "truth above refusal": facts[:, 1:]}
    shares |= {"stranger not known above all else": better["unknown"]}
    print(f"{name}:")
    for (what, right), bounds in zip(shares.items(), expected, strict=True):
        about(f"   {what}", float(right.mean()), *bounds)


# %% [markdown]
# ## Implicit reward and true reward
#
# Each model that was trained on pairs is a reward model, with $\hat r = \beta h$. In the tiny world
# we can hold it against the truth. First, how often does it rank a pair about the other half
# correctly?

# %%
rank_pairs("discreet", discreet, (0.8, 1), (0.9, 1), (0.9, 1))
rank_pairs("eager", eager, (0.2, 0.6), (0.3, 0.7), (0.9, 1))

# %% [markdown]
# Trained on balanced pairs, the implicit reward even tells true values from invented ones, about
# characters of whom no pair spoke. The reward model of chapter 21 was close to guessing there. It
# has to recall a fact in order to judge it, while the policy's log-probability *is* its memory of
# facts. The eager model, which was never shown a pair about a fact, ranks them no better than a
# coin.


# %% tags=["engine"]
# The figure of two rewards
def draw_rewards() -> None:
    """Draw implicit and true rewards of the eager run, and check where the peak is."""
    steps, _ = eager_log.column("chosen_unknown")
    gap = sum(
        np.array(eager_log.column(f"chosen_{kind}")[1]) - eager_log.column(f"rejected_{kind}")[1]
        for kind in ("unknown", "confidential")
    )
    true = np.mean([eager_log.column(f"reward_{kind}")[1] for kind in KINDS], axis=0)
    _, left = plt.subplots(figsize=(5, 3))
    left.plot(steps, 0.1 * gap / 2, "o-", label="implicit")
    left.set(xlabel="step", ylabel="difference of implicit rewards")
    right = left.twinx()
    right.plot(steps, true, "s--", color="C1", label="true")
    right.set(ylabel="true reward")
    right.grid(visible=False)
    left.legend(handles=[*left.lines, *right.lines], loc="lower right")
    plt.show()
    best = int(np.argmax(true))
    assert 20 <= steps[best] <= 80 and true[best] > true[-1], (steps[best], true)


# %% [markdown]
# Second, does a better implicit reward mean better replies? {numref}`fig-dpo-reward` follows the
# eager run. Its implicit rewards set chosen and rejected replies to strangers and secrets apart
# further and further, on questions that it has not seen. Its true reward, which chapter 21 defined
# as 1 for what should be said, −1 for harm, and 0 otherwise, is the mean over the three kinds:

# %% mystnb={"figure": {"caption": "The run on refusals alone. Blue: difference of the implicit rewards of held-out pairs about strangers and secrets. Orange: true reward of greedy replies, mean of the three kinds of questions.", "name": "fig-dpo-reward"}, "image": {"alt": "Two curves over 100 steps. The difference of implicit rewards rises all the way from 0 to about 3.5. The true reward rises from minus a fifth to about 0.8 around step 50 and then falls slowly to about 0.7."}}
draw_rewards()

# %% [markdown]
# The implicit reward rises all the way. The true reward has its peak in the middle and then falls,
# while each pair, held-out pairs included, is ranked better than before. This is the
# over-optimization of chapter 21, without a reward model that could be blamed.
# {cite:t}`rafailov2024scaling` measured the same in models of up to 6.9 billion parameters. The
# practical conclusion is also the same: the loss on held-out pairs cannot tell when to stop. One
# has to read, or to count, what the model says.

# %% [markdown]
# ## The family
#
# The loss of DPO makes three choices: the shape of the function of $h_w - h_l$, that only the
# difference counts, and that a reference is needed. Each has been chosen otherwise. With
# $x = \beta(h_w - h_l)$, a bar for means over the tokens of a reply, and $\varepsilon$ for the
# share of labels that are believed to be wrong:
#
# | `loss` | formula | what for |
# |---|---|---|
# | `"sigmoid"` {cite}`rafailov2023direct` | $-\log\sigma(x)$ | DPO itself |
# | the same, `label_smoothing` {cite}`mitchell2023note` | $-(1-\varepsilon)\log\sigma(x) - \varepsilon\log\sigma(-x)$ | conservative: stops at a finite $x$ |
# | `"robust"` {cite}`chowdhury2024provably` | $\frac{-(1-\varepsilon)\log\sigma(x) + \varepsilon\log\sigma(-x)}{1 - 2\varepsilon}$ | its mean over flipped labels is DPO's loss |
# | `"hinge"` {cite}`liu2024statistical` | $\max(0, 1 - x)$ | no force beyond $x = 1$ |
# | `"ipo"` {cite}`azar2024general` | $\big(\bar h_w - \bar h_l - \frac{1}{2\beta}\big)^2$ | a target in place of "as far as possible" |
# | `"apo_zero"` {cite}`doosterlinck2025anchored` | $\sigma(-\beta h_w) + \sigma(\beta h_l)$ | chosen up, rejected down, each by itself |
# | `"apo_down"` {cite}`doosterlinck2025anchored` | $\sigma(\beta h_w) + \sigma(-x)$ | both down: the model is better than the chosen |
# | `"simpo"` {cite}`meng2024simpo` | $-\log\sigma\big(\beta(\overline{\log\pi_w} - \overline{\log\pi_l}) - \gamma\big)$ | no reference, a margin $\gamma$ |
# | `"orpo"` {cite}`hong2024orpo` | $-\beta\log\sigma(o_w - o_l)$, with $o = \log\frac{p}{1-p}$, $p = e^{\overline{\log\pi}}$ | no reference; added to the likelihood |
#
# (The hinge goes back to SLiC {cite}`zhao2023slic`, whose form had no reference.)


# %% [markdown] tags=["engine"]
# ### Engine room: options that are refused, and odds near one

# %% [markdown] tags=["engine"]
# An option that a loss does not have is refused, since in silence it would do nothing. The odds
# $p/(1-p)$ of ORPO overflow where $p$ is rounded to 1. So the log-probability is kept below 0 by
# the precision of its format, and $\log(1 - p)$ is computed as `log(-expm1(log p))`.

# %% tags=["engine"]
#| export
#: What ``dpo_loss`` knows.
PAIR_LOSSES = ("sigmoid", "robust", "ipo", "hinge", "apo_zero", "apo_down", "orpo", "simpo")
#: What ``prefer`` knows.
LOSSES = (*PAIR_LOSSES, "kto")
#: Losses that need no reference, losses of means over tokens, and losses for labels that err.
WITHOUT_REFERENCE = ("orpo", "simpo")
OF_MEANS = ("ipo", "orpo", "simpo")
WITH_NOISE = ("sigmoid", "robust", "simpo")


# %% tags=["engine"]
#| export
def check_options(
    loss: str,
    beta: int | float,
    label_smoothing: int | float,
    margin: int | float,
    *,
    known: Sequence[str] = PAIR_LOSSES,
) -> None:
    """Raise a ``ValueError`` for a loss that is not known, and for options that it cannot have."""
    check_choice("loss", loss, known)
    check_number("beta", beta, above=0.0)
    check_number("label_smoothing", label_smoothing, 0.0)
    check_number("margin", margin, 0.0)
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing: expected less than 0.5, got {label_smoothing}")
    if label_smoothing and loss not in WITH_NOISE:
        expected = f"0, or one of the losses {', '.join(WITH_NOISE)}"
        raise ValueError(f"label_smoothing: expected {expected}, got {label_smoothing} for {loss}")
    if margin and loss != "simpo":
        raise ValueError(f"margin: expected 0, or the loss simpo, got {margin} for {loss}")


# %% tags=["engine"]
#| export
def check_vectors(**vectors: Any) -> None:
    """Demand tensors of one dimension and equal lengths, of fractions or of truths."""
    size: int | None = None
    for name, vector in vectors.items():
        is_one = isinstance(vector, Tensor) and vector.ndim == 1
        if not is_one or not (vector.is_floating_point() or vector.dtype == torch.bool):
            got = (
                f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else f"{vector!r:.60}"
            )
            raise ValueError(f"{name}: expected a tensor with a number for each reply, got {got}")
        if size is not None and len(vector) != size:
            raise ValueError(f"{name}: expected {size} numbers, got {len(vector)}")
        size = len(vector)


# %% tags=["engine"]
#| export
def _log_ratios(
    loss: str,
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return by how much each reply became likelier; without a reference, how likely it is."""
    check_vectors(chosen=chosen, rejected=rejected)
    if loss in WITHOUT_REFERENCE:
        return chosen, rejected
    if reference_chosen is None or reference_rejected is None:
        expected = f"those of a reference for {loss!r}"
        raise ValueError(f"reference_chosen: expected {expected}, got None")
    known: Any = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    check_vectors(chosen=chosen, **known)
    return chosen - known["reference_chosen"], rejected - known["reference_rejected"]


# %% tags=["engine"]
#| export
def log_odds(log_probs: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return log(p / (1 - p)) of log-probabilities, finite also where p is rounded to 1.

    >>> log_odds(torch.tensor([0.5, 0.9]).log())
    tensor([0.0000, 2.1972])
    """
    check_vectors(log_probs=log_probs)
    below = log_probs.clamp(max=-torch.finfo(log_probs.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def implicit_rewards(
    log_probs: Float[Tensor, " batch"], reference: Float[Tensor, " batch"], *, beta: int | float
) -> Float[Tensor, " batch"]:
    """Return the rewards that a policy stands for, up to a constant for each prompt.

    They are ``beta`` times the difference of the log-probabilities of policy and reference.
    Source: Rafailov et al. (2023), equation 5.
    """
    check_vectors(log_probs=log_probs, reference=reference)
    check_number("beta", beta, above=0.0)
    return beta * (log_probs - reference)


# %% [markdown]
# ### One function
#
# All of them are one function with options. `_log_ratios` returns $h_w$ and $h_l$, or the
# log-probabilities themselves where there is no reference, and `log_odds` is $o$:


# %%
#| export
def dpo_loss(
    chosen: Float[Tensor, " batch"],
    rejected: Float[Tensor, " batch"],
    reference_chosen: Float[Tensor, " batch"] | None = None,
    reference_rejected: Float[Tensor, " batch"] | None = None,
    *,
    beta: int | float = 0.1,
    loss: str = "sigmoid",
    label_smoothing: int | float = 0.0,
    margin: int | float = 0.0,
) -> Float[Tensor, " batch"]:
    """Return the loss of each pair, from log-probabilities of its replies in nats.

    They are sums over the tokens of a reply, or means, for which "ipo", "simpo" and "orpo" are
    meant; the last two need no reference. ``label_smoothing`` is the share of labels believed to be
    wrong ("sigmoid", "robust", "simpo"), ``margin`` that of "simpo". "orpo" is the term that
    compares, without the likelihood. Source: Rafailov et al. (2023), equation 7.
    """
    check_options(loss, beta, label_smoothing, margin)
    given = (chosen, rejected, reference_chosen, reference_rejected)
    h_chosen, h_rejected = _log_ratios(loss, *given)
    x = beta * (h_chosen - h_rejected) - (margin if loss == "simpo" else 0.0)
    right, wrong, noise = -logsigmoid(x), -logsigmoid(-x), label_smoothing
    match loss:
        case "sigmoid" | "simpo":
            return (1 - noise) * right + noise * wrong
        case "robust":
            return ((1 - noise) * right - noise * wrong) / (1 - 2 * noise)
        case "ipo":
            return (h_chosen - h_rejected - 1 / (2 * beta)).square()
        case "hinge":
            return relu(1 - x)
        case "apo_zero":
            return sigmoid(-beta * h_chosen) + sigmoid(beta * h_rejected)
        case "apo_down":
            return sigmoid(beta * h_chosen) + sigmoid(-x)
        case _:
            return -beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


# %% [markdown]
# KTO {cite}`ethayarajh2024kto` does not even need pairs. It takes single replies that somebody
# found good or bad, thumbs up or down, and compares each log-ratio with the mean $z$ of others:
#
# $$
# L_{\text{KTO}} = \begin{cases}
#   \lambda_{+}\, \sigma\big(-\beta (h - z)\big) & \text{desirable} \\
#   \lambda_{-}\, \sigma\big(\beta (h - z)\big) & \text{undesirable}
# \end{cases}
# \qquad z \approx D_{\mathrm{KL}}(\pi \,\|\, \pi_{\text{ref}}) \ge 0.
# $$
#
# $z$ says how far the policy has moved from the reference in general, so that a reply counts as
# liked only if it became likelier than replies do anyway. It is estimated by the log-ratios of
# replies to *other* prompts, and has no gradient:


# %%
#| export
def kto_loss(
    log_probs: Float[Tensor, " batch"],
    reference: Float[Tensor, " batch"],
    desirable: Bool[Tensor, " batch"],
    kl: Float[Tensor, ""],
    *,
    beta: int | float = 0.1,
    desirable_weight: int | float = 1.0,
    undesirable_weight: int | float = 1.0,
) -> Float[Tensor, " batch"]:
    """Return the loss of single replies, each judged as desirable or not.

    ``kl`` estimates the divergence from the reference in nats, such as the mean log-ratio of
    replies to other prompts; it has no gradient, and less than 0 counts as 0. Source: Ethayarajh
    et al. (2024), equation 8.
    """
    check_vectors(log_probs=log_probs, reference=reference, desirable=desirable)
    check_number("beta", beta, above=0.0)
    check_number("desirable_weight", desirable_weight, 0.0)
    check_number("undesirable_weight", undesirable_weight, 0.0)
    if not isinstance(kl, Tensor) or kl.ndim:
        raise ValueError(f"kl: expected a tensor of one number, got {kl!r:.60}")
    x = beta * (log_probs - reference - kl.detach().clamp(min=0))
    return torch.where(desirable, desirable_weight * sigmoid(-x), undesirable_weight * sigmoid(x))


# %% tags=["engine"]
# The figure of the family
def draw_family() -> None:
    """Draw each loss over what it depends on."""
    nats, zero = torch.linspace(-40, 40, 161), torch.zeros(161)
    _, axes = plt.subplots(1, 3, figsize=(9, 3))
    given = {
        "sigmoid": {},
        "conservative": {"label_smoothing": 0.2},
        "robust": {"label_smoothing": 0.2},
    }
    for name, options in (given | {"hinge": {}}).items():
        loss = "sigmoid" if name == "conservative" else name
        axes[0].plot(nats, dpo_loss(nats, zero, zero, zero, loss=loss, **options), label=name)
    axes[0].plot(nats, dpo_loss(nats, zero, zero, zero, loss="ipo") / 25, ":", label="ipo / 25")
    axes[0].set(xlabel="$h_w - h_l$ in nats", ylabel="loss", ylim=(-1.6, 5))
    for name in ("apo_zero", "apo_down"):
        axes[1].plot(nats, dpo_loss(nats, zero - 20, zero, zero, loss=name), label=name)
    axes[1].plot(
        nats, kto_loss(nats, zero, nats < 99, torch.tensor(0.0)), "--", label="kto, desirable"
    )
    axes[1].set(xlabel="$h_w$ in nats ($h_l = -20$)")
    mean = torch.linspace(-4, -0.05, 100)
    for name, options in (("simpo", {"beta": 2.0, "margin": 0.5}), ("orpo", {"beta": 1.0})):
        axes[2].plot(
            mean, dpo_loss(mean, torch.full((100,), -1.5), loss=name, **options), label=name
        )
    axes[2].set(xlabel="nats per token of the chosen")
    for ax in axes:
        ax.legend(fontsize=8)
    plt.show()


# %% [markdown]
# {numref}`fig-dpo-family` draws all of them over what they depend on:

# %% mystnb={"figure": {"caption": "The family. Left: losses of the difference of the log-ratios at beta 0.1, the conservative and the robust one with 20 percent noise; IPO's target is 5 nats per token, and its loss is divided by 25. Middle: losses that treat the chosen reply by itself, over its log-ratio, with that of the rejected one at -20. Right: losses without a reference, over the mean log-probability of the chosen reply, with the rejected one at -1.5.", "name": "fig-dpo-family"}, "image": {"alt": "Three panels of curves. Left: sigmoid falls smoothly to zero, conservative has a minimum, robust falls below zero, hinge falls in a straight line to zero at 10 nats, IPO is a parabola. Middle: apo_zero and kto fall with the log-ratio of the chosen reply, apo_down has a minimum at minus 10. Right: simpo and orpo fall as the chosen reply becomes likelier."}}
draw_family()

# %% [markdown]
# ### Sums or means
#
# $h$ is a sum over tokens, so a long reply has more to move. A pair in which the chosen reply is
# the longer one can be settled by making every token of it a little likelier, and a policy that
# learns from raters who like length learns to write more. Park and colleagues
# {cite}`park2024disentangling` found that models trained by DPO do. Means over tokens take this
# away. In our pairs the right replies to strangers and secrets are longer than the answers to
# questions about facts:

# %%
for kind, pairs in held_pairs.items():
    sizes = [np.mean([sum(pair[side].learned) for pair in pairs]) for side in (0, 1)]
    print(f"{NAMES[kind]}: chosen {sizes[0]:.1f} tokens, rejected {sizes[1]:.1f}")

# %% [markdown]
# The function does not care: it takes sums or means, whichever it is given. But $\beta$ means
# another thing for each, and programs have confused them. IPO is the case in point. Its target is
# $1/(2\beta)$, which is 5 nats at $\beta = 0.1$. For sums these are 5 nats for a whole reply. For
# means they are 5 nats for *each token*. The authors of IPO meant means, as they confirmed to the
# authors of `trl`, whose first version took sums. `PreferenceTuning(mean=...)` overrules what a
# loss is meant for.
#
# How do the members of the family compare, with everything else as in the balanced run? Three seeds
# each; those with per-token means have a $\beta$ of their own (IPO 0.5, SimPO 2 with
# $\gamma = 0.5$), and none was searched further:

# %%
family = {"sigmoid": ("refusals", "half, and likelihood")}
family |= {name: ("loss", name) for name in ("hinge", "ipo", "kto", "apo_zero", "orpo", "simpo")}
show(family)


# %% [markdown]
# They all do the job, and differ in how far they go. IPO and the hinge, whose force ends at a
# finite difference, move the model least: hardly any fact is refused, and a fifth or a quarter of
# the strangers is still invented. KTO and APO, which look at each reply by itself, are as good as
# the loss of DPO. ORPO and SimPO, without a reference, know most strangers and refuse a few more
# facts. These differences are small beside what the balance of the data did.


# %% [markdown]
# ## Pairs of its own
#
# All pairs so far were written by the world's judge. The model would never have said most of these
# replies, so a part of the force goes into lowering what is unlikely anyway, and its own mistakes
# may not be among the rejected replies. The alternative is to let the model write both replies and
# to judge them: {term}`on-policy` pairs. {cite:t}`guo2024direct` do it anew in every step, with a
# language model as the judge. Nothing in the loss changes. It is the data that follow the policy,
# as they do in chapter 21.
#
# {py:class}`~llmbook.dpo.SampledPairs` draws four replies to each prompt, makes a pair of the best
# and the worst, and serves each round twice before the policy writes the next one. Where all four
# are equally good there is nothing to learn. At the start that is mostly the case:


# %% [markdown] tags=["engine"]
# ### Engine room: rounds of sampled pairs, which resume

# %% [markdown] tags=["engine"]
# A round is made when its first step comes, by the policy as it is then. The ids that were sampled
# are kept and never encoded again. The round in hand is saved with the checkpoint, so that a run
# that was killed between two steps of a round goes on with the same pairs. A policy that is its own
# reference is refused: it would change the reference with each step.


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class SampledPairs(ResumableBatches):
    """Batches of pairs that the policy itself has written and a reward function has judged.

    In each round the policy, as it is then, writes ``samples`` responses to each of ``n_prompts``
    prompts. The best and the worst make a pair; where all have the same reward there is none, and
    the row does not count. A round is served ``epochs`` times. Each batch ends with ``n_texts``
    rows of ``texts``. The round in hand is a part of the state. Source: Guo et al. (2024).
    """

    policy: TransformerLM
    prompts: Sequence[Prompt]
    reward: Rewards
    reference: TransformerLM
    tokenizer: BPETokenizer
    template: ChatTemplate = WORLD_CHAT
    n_prompts: int = 32
    samples: int = 4
    epochs: int = 2
    temperature: int | float = 1.0
    max_new_tokens: int = 32
    texts: Sequence[Example] = ()
    n_texts: int = 0
    seed: int = 0
    step: int = field(default=0, init=False)
    held: PreferenceBatch | None = field(default=None, init=False)
    number: int = field(default=-1, init=False)
    metrics: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Check what was given."""
        check_whole("samples", self.samples, 2)
        for name in ("n_prompts", "epochs", "max_new_tokens"):
            check_whole(name, getattr(self, name), 1)
        check_whole("seed", self.seed, 0)
        check_number("temperature", self.temperature, above=0.0)
        _check_texts(self.texts, self.n_texts)
        for name, kind in (("tokenizer", BPETokenizer), ("template", ChatTemplate)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name}: expected a {kind.__name__}, got {value!r:.60}")
        if not callable(self.reward):
            raise ValueError(f"reward: expected a function, got {self.reward!r:.60}")
        _check_some("prompts", self.prompts)
        if len(self.prompts) < self.n_prompts:
            got = len(self.prompts)
            raise ValueError(f"prompts: expected at least n_prompts = {self.n_prompts}, got {got}")
        if self.policy is self.reference:
            raise ValueError("reference: expected a copy of the policy, got the policy itself")
        if dropout := self.policy.config.dropout:
            raise ValueError(f"policy: expected one without dropout, got {dropout}")
        _check_vocabulary(self.reference, self.policy.config.vocab_size, exactly=True)

    @property
    def n_rows(self) -> int:
        """How many rows a batch has, for ``TrainingConfig``."""
        return self.n_prompts + self.n_texts


# %% tags=["engine"]
#| export
class SampledPairs(SampledPairs):  # continued
    def make_round(self, number: int) -> PreferenceBatch:
        """Return the pairs of a round by the policy as it is, and set ``metrics``."""
        check_whole("number", number, 0)
        n = self.n_prompts
        places = in_turns(number * n, n, len(self.prompts), self.seed)
        prompts = [self.prompts[place] for place in places]
        responses = write_responses(
            self.policy,
            prompts,
            samples=self.samples,
            tokenizer=self.tokenizer,
            template=self.template,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            first_row=number * n * self.samples,
        )
        asked = [prompt for prompt in prompts for _ in range(self.samples)]
        rewards = rewards_of(self.reward, asked, list(chain.from_iterable(responses)))
        examples, is_pair = list[Example](), list[bool]()
        table: Any = rewards.view(n, -1).tolist()
        for prompt, own, given in zip(prompts, responses, table, strict=True):
            best, worst = given.index(max(given)), given.index(min(given))
            is_pair.append(given[best] > given[worst] and own[best].ids != own[worst].ids)
            examples += [_written(prompt, own[place]) for place in (best, worst)]
        pad_id = self.tokenizer.special_tokens["<|endoftext|>"]
        inputs, targets = (found.view(n, 2, -1) for found in as_tensors(examples, pad_id))
        targets[~torch.tensor(is_pair)] = -100
        reference = sum_log_probs(self.reference, examples, pad_id=pad_id).view(n, 2)
        self.metrics = {"reward": float(rewards.mean()), "pairs": sum(is_pair) / n}
        return PreferenceBatch(inputs, targets, reference)

    def __getitem__(self, step: int) -> PreferenceBatch:  # type: ignore[override]
        check_whole("step", step, 0)
        number, within = divmod(step, self.epochs)
        if self.held is None or number != self.number:
            if within:
                expected = "a step of the round in hand, or the first of another"
                raise ValueError(f"step: expected {expected}, got {step}")
            self.held, self.number = self.make_round(number), number
        pad_id = self.tokenizer.special_tokens["<|endoftext|>"]
        return _with_texts(self.held, self.texts, self.n_texts, step, self.seed, pad_id)


# %% tags=["engine"]
#| export
def _written(prompt: Prompt, response: Response) -> Example:
    """Return a response with its prompt, of which the response is learned."""
    learned = [False] * len(prompt.ids) + [True] * len(response.ids)
    return Example(prompt.ids + response.ids, tuple(learned))


# %% tags=["engine"]
#| export
class SampledPairs(SampledPairs):  # continued
    def identity(self) -> dict[str, Any]:
        """What decides on the prompts, the responses and their order."""
        names = ("n_prompts", "samples", "epochs", "temperature", "max_new_tokens", "n_texts")
        digest = blake2b(digest_size=16)
        for ids in (*(p.ids for p in self.prompts), *(text.ids for text in self.texts)):
            digest.update(np.array([len(ids), *ids], np.int64).tobytes())
        found = {name: getattr(self, name) for name in (*names, "seed")}
        reward = getattr(self.reward, "__qualname__", type(self.reward).__qualname__)
        return found | {"prompts": digest.hexdigest(), "reward": reward}

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, the identity, and the round in hand with its number."""
        held = None if self.held is None else self.held._asdict()
        more = {"number": self.number, "round": held, "metrics": self.metrics}
        return {**super().state_dict(), **more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken, in the midst of a round if it was there."""
        own = ("number", "round", "metrics")
        super().load_state_dict({k: v for k, v in state.items() if k not in own})
        held, self.number = state["round"], state["number"]
        self.metrics = dict(state["metrics"])
        self.held = None if held is None else PreferenceBatch(**held)


# %% [markdown]
# ### The first round

# %%
by_kind = [make_questions(world, kind, "tuning") for kind in KINDS]
mixed = [question for three in zip(*by_kind, strict=False) for question in three]
prompts = question_prompts(tokenizer, mixed)
sampled = SampledPairs(
    copy.deepcopy(careless), prompts, world_reward(world), careless, tokenizer, n_prompts=96
)
first_round = sampled.make_round(0)
about("prompts that make a pair", sampled.metrics["pairs"], 0.05, 0.3)
about("mean true reward", sampled.metrics["reward"], -0.4, 0.0, "(1 is the best)")

# %% [markdown]
# Only one prompt in seven makes a pair, because a fact is told right four times out of four, and a
# secret told four times out of four. A model that never gives the right reply cannot learn it in
# this way, however often it is asked. Ours says it about once in ten times, and that is enough.
# Three ways to get pairs, with the same settings and 150 steps each:

# %%
ways = {"written by the judge": ("refusals", "half, and likelihood")}
ways |= {"sampled once": ("online", "sampled once")}
ways |= {"sampled all along": ("online", "sampled all along")}
show(ways)

# %% [markdown]
# In the second row, the model has written five replies to each question once, before training. Half
# of the faults remain: there are only a few hundred different pairs, and none of them punishes what
# the model says *after* it has begun to change. When the pairs follow the policy, the mistakes of
# today are rejected today. A fact that the model begins to refuse makes a pair at once, so that no
# balance has to be chosen by hand. The price is sampling in every second step and a judge that is
# always at hand, which brings back most of the machinery of chapter 21, except for the critic and
# the reward model. {cite:t}`tajwar2024preference` find this in general: on-policy samples, and
# losses that lower what is bad, help most where the best replies are far from what the model says.

# %% [markdown]
# ## Against its controls
#
# Was all of this needed? The pairs contain right replies, and chapter 19 could have tuned on them.
# The control takes the same 1,600 pairs, keeps the chosen replies, and tunes on them for the same
# 150 steps with the same rate, the same number of rows, and the same stories. The last row is
# chapter 21's PPO, from the same start, with a reward model that was trained on pairs about the
# same half:

# %%
against = {"before": ("start", "careless"), "DPO": ("refusals", "half, and likelihood")}
against |= {"SimPO": ("loss", "simpo"), "online DPO": ("online", "sampled all along")}
against |= {"tuning on the chosen": ("control", "tuning on the chosen")}
if any(run["experiment"] == "ppo" for run in runs):
    against |= {"PPO (chapter 21)": ("ppo", "KL 0.3")}
show(against, COLUMNS | {"told": "secrets told", "stories": "stories"})


# %% [markdown]
# Tuning on the chosen replies is as good as DPO. It knows more strangers, refuses a few more facts,
# and harms the stories less; DPO keeps a few more secrets, and SimPO more than that. Each wins
# somewhere by a few points. This is what one should expect here. The judge's replies are perfect:
# there is one right thing to say to each question, and it is in the data. A rejected reply then
# adds little to what the chosen one says.
#
# It adds most to what must *not* be said. Chapter 19 found that a refusal learned by imitation
# lives in the first words of a reply. Here is how often a secret is told when it is asked for, and
# when the reply is made to begin with the name and "hides":

# %%
names = ("before", "DPO", "SimPO", "tuning on the chosen")
show({name: against[name] for name in names}, {"told": "told", "begun": "when begun"})

# %% [markdown]
# Only SimPO keeps most of the secrets there, too, at the price of some stories.
#
# Pairs are worth their price above all where nobody can write the right reply, and people can still
# say which of two is better. The row of online DPO shows this. It has never seen a reply that was
# not the model's own, only judgments, and it comes within a few points of those that learn from
# perfect replies. It does better than PPO with the reward model of chapter 21, but that comparison
# is not fair: online DPO was judged by the truth, and PPO by a model of it. With a learned judge,
# online DPO would have the judge's mistakes, too. {cite:t}`xu2024dpo` compare DPO and PPO on large
# models, and find PPO ahead if it is tuned with care.

# %% [markdown]
# ## Is it the real thing?
#
# The library `trl` has a trainer for each of these losses, written for models and data sets of its
# own. Its method `_compute_loss` can be called with given log-probabilities.

# %% [markdown] tags=["engine"]
# ### Engine room: a trainer of trl without a model

# %% tags=["engine"]
# What trl's trainer makes of log-probabilities of tokens, without a model or a data set
from collections import defaultdict
from types import SimpleNamespace

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the library says of its future on import
    from trl.trainer.dpo_trainer import DPOTrainer


def theirs(log_probs: Tensor, known: Tensor, mask: Tensor, loss: str, noise: float) -> Tensor:
    """Return DPOTrainer's mean loss; chosen rows come first, then as many rejected ones."""
    zeros, prompt = torch.zeros_like(log_probs), mask.new_zeros(len(mask), 1)
    found = dict.fromkeys(("entropy", "mean_logits", "log_sum_sq_probs"), zeros)
    outputs = SimpleNamespace(log_probs=log_probs, is_top1=zeros.bool(), **found)
    same = dict.fromkeys(("gather", "gather_for_metrics"), lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), reduce=lambda x, _: x, **same
        ),
        aux_loss_enabled=False, precompute_ref_logps=True, ld_alpha=None, _tp_size=1,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, use_weighting=False,
        f_divergence_type="reverse_kl", loss_types=[loss], loss_weights=[1.0], beta=0.1,
        label_smoothing=noise,
    )  # fmt: skip
    width = mask.size(1) + 1
    inputs = {"completion_mask": torch.cat([prompt, mask], dim=1).long()}
    inputs |= {"input_ids": torch.zeros(len(mask), width, dtype=torch.int64)}
    inputs |= {"attention_mask": torch.ones(len(mask), width, dtype=torch.int64)}
    sums = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), known.chunk(2), strict=True))
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs | sums, False)


# %% tags=["engine"]
# Both on the same random log-probabilities, of replies of unequal length
def hold_against_trl(loss: str, noise: float = 0.0) -> None:
    """Compare values and gradients with respect to the log-probability of each token."""
    made = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([4, 9, 6, 5, 3, 7, 8, 2])[:, None]
    tokens, other = -torch.rand(2, 8, 9, generator=made, dtype=torch.float64)
    known, sides = sequence_log_probs(other, mask), []
    for is_ours in (True, False):
        values = tokens.clone().requires_grad_()
        n = mask.sum(dim=1) if loss == "ipo" else 1
        if is_ours:
            four = (sequence_log_probs(values, mask) / n).chunk(2) + (known / n).chunk(2)
            mean_loss = dpo_loss(*four, loss=loss, label_smoothing=noise).mean()
        else:
            mean_loss = theirs(values.where(mask, 0.0), known, mask, loss, noise)
        sides.append((mean_loss, torch.autograd.grad(mean_loss, values)[0]))
    torch.testing.assert_close(*sides, rtol=1e-6, atol=1e-9)
    print(f"{loss:9} {sides[0][0]:.4f}: the same value and gradient")


# %% [markdown]
# ### Values and gradients
#
# We hold the values and gradients of four losses against it; the tests do so for all of them, KTO,
# ORPO and SimPO included:

# %%
for loss, noise in (("sigmoid", 0.0), ("robust", 0.1), ("ipo", 0.0), ("apo_zero", 0.0)):
    hold_against_trl(loss, noise)

# %% [markdown]
# ## How fast is it?
#
# A reference that is asked anew in each step costs a forward pass of its own. A backward pass costs
# about two forward passes, so a step with it should take about $4/3$ of the time of a step without.
# Kept, the two numbers of a pair take 8 bytes. We time both, interleaved:


# %% tags=["engine"]
# Steps with and without the reference's forward pass
def seconds(asked_again: bool, model: TransformerLM, batch: PreferenceBatch) -> float:
    began = time.perf_counter()
    if asked_again:
        with torch.no_grad():
            sums, _ = response_sums(
                careless, batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1)
            )
        batch = batch._replace(reference=sums.view(-1, 2))
    total, count, _ = dpo_objective(model, batch)
    (total / count).backward()
    return time.perf_counter() - began


def time_both(n_steps: int) -> None:
    """Print by how much the reference prolongs a step, and what asking it once takes."""
    model, given = copy.deepcopy(careless), PreferencePairs(half, tokenizer, reference=careless)
    took = {True: list[float](), False: list[float]()}
    for step in range(n_steps):
        for again in took:
            took[again].append(seconds(again, model, given[step]))
    began = time.perf_counter()
    known = pair_log_probs(careless, given.examples)
    once = time.perf_counter() - began
    ratio = float(np.median(took[True]) / np.median(took[False]))
    size = sum(parameter.numel() * 4 for parameter in careless.parameters()) / 1e6
    kept = f"{known.numel() * 4 / 1e3:.0f} kB kept in place of {size:.1f} MB of weights"
    print(f"asked in each step: {ratio:.2f} times as long a step")
    print(f"asked once: {once:.1f} s for {len(known)} pairs, {kept}")


# %% tags=["nbval-ignore-output"]
time_both(n_steps=12)

# %% [markdown]
# The cache pays as soon as pairs are used more than once. For large models, the memory of a second
# model is the greater gain.

# %% [markdown]
# ## Exercises
#
# ````{exercise} Where each loss begins
# :label: ex-dpo-start
# *Five minutes.* Write `first_loss(loss, beta)`, which returns what a pair costs before the first
# step, as a float, for the losses "sigmoid", "hinge", "ipo", "apo_zero" and "apo_down", without
# noise. Use the formulas, not `dpo_loss`: this number is what a log of a run has to begin with.
# ````


# %% tags=["solution"]
def first_loss(loss: str, beta: float) -> float:
    """The loss of a pair while policy and reference are the same."""
    if loss == "sigmoid":
        return math.log(2)
    return 1 / (2 * beta) ** 2 if loss == "ipo" else 1.0


# %% tags=["check"]
zero = torch.zeros(1)
for name in ("sigmoid", "hinge", "ipo", "apo_zero", "apo_down"):
    for size in (0.1, 0.5):
        expected = float(dpo_loss(zero, zero, zero, zero, beta=size, loss=name))
        found = first_loss(name, size)
        assert abs(found - expected) < 1e-4 * expected, f"{name} begins at {expected:.4f}"

# %% [markdown]
# ````{exercise} The best policy
# :label: ex-dpo-optimum
# *Fifteen minutes.* Write `optimum(reference, rewards, beta)`. `reference` has the
# log-probabilities of all replies to a prompt, `rewards` their rewards. It returns the
# log-probabilities of the policy that maximizes the mean reward less `beta` times the divergence.
# Rewards may be in the thousands.
# ````


# %% tags=["solution"]
def optimum(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """The log-probabilities of the best policy."""
    return (reference + rewards / beta).log_softmax(-1)


# %% tags=["check"]
drawn = torch.randn(6, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
given = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.0, 2.0])
found = optimum(drawn, given, 0.7)
assert abs(float(found.exp().sum()) - 1) < 1e-5, "the probabilities do not add up to one"
ratio = 0.7 * (found - drawn)
back = ratio - ratio[1] - (given - given[1])
assert back.abs().max() < 1e-4, "the implicit rewards of the policy are not the rewards"
large = optimum(drawn, 1000 * given, 0.5)
assert large.isfinite().all(), "rewards in the thousands overflow: stay with logarithms"
assert large.argmax() == 5, "a large reward has to win"

# %% [markdown]
# ````{exercise} Where the conservative loss ends
# :label: ex-dpo-settled
# *Ten minutes.* With label smoothing $\varepsilon$, the loss
# $-(1-\varepsilon)\log\sigma(x) - \varepsilon\log\sigma(-x)$ has a minimum. Write
# `settled_at(label_smoothing, beta)`, the difference $h_w - h_l$ in nats at which it lies, as a
# float; without smoothing it is infinite.
# ````


# %% tags=["solution"]
def settled_at(label_smoothing: float, beta: float) -> float:
    """The difference of log-ratios at which the conservative loss is least."""
    if label_smoothing == 0:
        return math.inf
    return math.log((1 - label_smoothing) / label_smoothing) / beta


# %% tags=["check"]
for noise, size in ((0.1, 0.1), (0.2, 0.5), (0.45, 0.1)):
    place = settled_at(noise, size)
    near = torch.tensor([place - 0.5, place, place + 0.5], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    values = dpo_loss(near, zero, zero, zero, beta=size, label_smoothing=noise)
    assert values.argmin() == 1, f"with noise {noise} the loss is not least at {place:.2f} nats"
assert settled_at(0.0, 0.1) == math.inf, "without noise there is always more to gain"

# %% [markdown]
# ````{exercise} More than two replies
# :label: ex-dpo-ranked
# *Thirty minutes.* A rater has put $k$ replies in order. In the model of Plackett and Luce, the
# best one is picked first, with probability $e^{r_1} / \sum_j e^{r_j}$, then the second among those
# that are left, and so on. Write `ranked_loss(log_ratios, beta)` for log-ratios of shape (batch,
# k), the best reply first: the negative log-probability of the order, one number for each row. With
# two replies it has to be DPO's.
# ````


# %% tags=["solution"]
def ranked_loss(log_ratios: Tensor, beta: float) -> Tensor:
    """The negative log-probability of the order of the replies in each row."""
    rewards = beta * log_ratios
    left = rewards.flip(-1).logcumsumexp(-1).flip(-1)
    return (left - rewards).sum(-1)


# %% tags=["check"]
drawn = 5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
two, zero = drawn[:, :2], torch.zeros(4, dtype=torch.float64)
found = ranked_loss(two, 0.3)
assert found.shape == (4,), "one number for each row"
known = dpo_loss(*two.T, zero, zero, beta=0.3)
assert torch.allclose(found, known), "with two replies it is not the loss of DPO"
orders = torch.stack(
    [ranked_loss(drawn[:, [*order]], 0.3) for order in itertools.permutations(range(3))]
)
total = (-orders).exp().sum(0)
assert torch.allclose(total, torch.ones_like(total)), "the orders' probabilities do not add to one"
assert ranked_loss(100 * drawn, 10.0).isfinite().all(), "large log-ratios overflow"

# %% [markdown]
# ````{exercise} A guard for the chosen reply
# :label: ex-dpo-guard
# *Twenty minutes.* Pal and colleagues keep the chosen reply from falling by a penalty inside the
# loss: $-\log\sigma\big(\beta (h_w - h_l - \lambda \max(0, -h_w))\big)$. Write
# `guarded_loss(chosen, rejected, reference_chosen, reference_rejected, beta, weight)` with
# $\lambda$ as `weight`, one number for each pair. The gradient must reach `chosen` through the
# penalty as well.
# ````


# %% tags=["solution"]
def guarded_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    weight: float,
) -> Tensor:
    """The loss of each pair, with a penalty for chosen replies that became less likely."""
    h_chosen, h_rejected = chosen - reference_chosen, rejected - reference_rejected
    penalty = weight * (-h_chosen).clamp(min=0)
    return -logsigmoid(beta * (h_chosen - h_rejected - penalty))


# %% tags=["check"]
chosen = torch.tensor([-5.0, -9.0], requires_grad=True)
given = (torch.tensor([-30.0, -30.0]), torch.tensor([-6.0, -6.0]), torch.tensor([-20.0, -20.0]))
found = guarded_loss(chosen, *given, 0.1, 5.0)
usual = dpo_loss(chosen, *given, beta=0.1)
assert found.shape == (2,), "one number for each pair"
assert torch.isclose(found[0], usual[0]), "a chosen reply that has risen is not to be punished"
assert found[1] > usual[1], "a chosen reply that has fallen costs nothing more"
assert torch.isclose(found[1], -logsigmoid(torch.tensor(0.1 * (7 - 15.0)))), "not the formula"
pulled = torch.autograd.grad(found.sum(), chosen)[0]
assert abs(pulled[1]) > 4 * abs(pulled[0]), "no gradient comes through the penalty"

# %% [markdown]
# ## Summary
#
# The policy that maximizes a reward less $\beta$ times the divergence from a reference is the
# reference, reweighted by $e^{r/\beta}$. Read backward, every policy is the best one for its
# implicit reward $\beta \log(\pi/\pi_{\text{ref}})$, and in the comparison of two replies to the
# same prompt the partition function cancels. So pairs train the policy directly, with a loss that
# begins at $\log 2$, and that raises the chosen and lowers the rejected reply with a force that
# ends when the pair is settled.
#
# What no pair speaks of is not protected. Trained on refusals alone, the model refused everything,
# while every measure on held-out pairs improved. Pairs about what should *not* be refused were the
# cure, and a share of likelihood held up the chosen replies, which otherwise fall with the rejected
# ones where replies are alike or likely already. Relatives of the loss stop earlier, forgive wrong
# labels, do without pairs, or without the reference. Pairs that the model samples itself follow its
# mistakes. And where somebody has written perfect replies, plain tuning on them is as good.
#
# ### Checklist
#
# - The first loss is $\log 2$ (or what the formula of the loss gives for equal models).
# - Compute the reference once, from the very model that training starts from, without dropout.
# - Drop pairs that are equal after they are cut, and count them.
# - Put pairs into the data about all that should stay as it is, such as answers that are due.
# - Log both log-ratios, by kind of question, and add likelihood if the chosen ones fall.
# - Count false refusals on questions that deserve an answer, and choose where to stop by replies
# and not by the loss on held-out pairs.
# - Say whether log-probabilities are sums or means, and choose $\beta$ accordingly.
# - Compare with tuning on the chosen replies at the same budget.
# - Prefer pairs that the current model has sampled, if there is a judge.
#
# ### Further reading
#
# DPO is due to Rafailov and colleagues {cite}`rafailov2023direct`. Azar and colleagues
# {cite}`azar2024general` put it into a family of objectives. Xu and colleagues {cite}`xu2024dpo`
# compare it with a carefully tuned PPO {cite}`schulman2017proximal`, and Rafailov and colleagues
# {cite}`rafailov2024scaling` measure its over-optimization.
