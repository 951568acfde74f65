# %% [markdown]
# # Verifiable rewards
#
# > Improve a model by rewards that a program can check: groups in place of a critic, GRPO and its
# > relatives as options of one loss, and a teacher who grades each token.
#
# A reward model guesses what people would say, and a policy that is pushed hard enough learns to
# please the guess. For some tasks nothing has to be guessed. A sum is right or wrong, a program
# passes its tests or fails, and in our tiny world a fact is true or false. A few lines of code can
# check the answer, however it was found. Training on such rewards is called **{term}`reinforcement
# learning with verifiable rewards <verifiable reward>`** {cite}`lambert2024tulu3`. It is how models
# learn to reason at length {cite}`deepseek2025r1`.
#
# With a checker in place of the reward model, one more part of chapter 21 can go. The critic was
# there to say what reward to expect. If the policy answers each question several times, the mean
# reward of these answers says it as well, and needs no training. This is the idea of **GRPO**,
# group relative policy optimization {cite}`shao2024deepseekmath`. The chapter derives it, shows
# what a dozen of its published relatives change, and measures what it can and cannot do.
#
# | | |
# |---|---|
# | **Part** | IV. Alignment |
# | **You build** | {py:func}`~llmbook.grpo.group_advantages`, {py:func}`~llmbook.grpo.grpo_loss`, {py:data}`~llmbook.grpo.VARIANTS`, {py:func}`~llmbook.grpo.importance_weights`, {py:class}`~llmbook.grpo.GroupBatches`, {py:func}`~llmbook.grpo.train_grpo`, {py:func}`~llmbook.grpo.distillation_loss` |
# | **You need** | policy gradients and rollouts ({doc}`21_rlhf`), instruction tuning ({doc}`19_instruction`), evaluation ({doc}`16_evaluation`) |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp grpo

# %% [markdown]
# ## A model that is partly right
#
# Chapter 19 tuned a model on questions about one character alone. It had read about all of them,
# but 28 examples were too few to learn the form, so that about a third of its likeliest replies to
# questions about others were right. This is the best moment for rewards: now and then the model
# does what we want, and we only have to tell it when.

# %% [markdown] tags=["engine"]
# ### Engine room: the imports, the model at the start, and how results are shown

# %% tags=["engine"]
#| export
# The imports of the module
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.environment import check_choice, check_whole
from llmbook.instruction import entropies, Example, masked_mean, response_log_probs
from llmbook.instruction import story_examples, tune, Tuning, WORLD_CHAT
from llmbook.model import save_model, TransformerLM
from llmbook.rlhf import aggregate, check_number, Clip, clipped_terms, Credit, each
from llmbook.rlhf import kl_estimates, leave_one_out, loss_sums, on_tokens, Per, Prompt, Response
from llmbook.rlhf import Rewards, rewards_of, RolloutBatches, RolloutLog, Rollouts, score_rollouts
from llmbook.tinyworld import judge_reply, PHRASES, Question, TinyWorld, VALUES, wordings
from llmbook.tokenizer import BPETokenizer
from llmbook.training import load_or_train, MetricsLog, Pretrained, pretrained, Sink, Trainer
from llmbook.training import TrainingConfig


# %% tags=["engine"]
# What the cells of this chapter share
import csv
import math
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import suppress
from types import SimpleNamespace

import matplotlib.pyplot as plt

import llmbook
from llmbook.evaluation import mean_interval
from llmbook.grpo import GRPO, group_advantages, importance_weights, train_grpo
from llmbook.instruction import ask
from llmbook.rlhf import as_rollouts, question_prompts, write_responses
from llmbook.tinyworld import make_questions
from llmbook.training import Probe, StepReport

torch.set_num_threads(1)
plt.style.use("llmbook.book")
results = Path(llmbook.__file__).parents[1] / "benchmarks" / "results"


# %% tags=["engine"]
#| export
def partly_right(seed: int = 0) -> TransformerLM:
    """Return the base tuned on questions about one character: it often answers in another form.

    It is made on the first call, and kept under ``artifacts/``.
    """
    check_whole("seed", seed, 0)
    base, settings = pretrained("tinyworld"), Tuning(n_characters=1, seed=seed)
    depends_on = {"settings": asdict(settings), "base": base.folder.name}
    train = partial(_tune_into, base, settings)
    load = TransformerLM.from_pretrained
    return load_or_train(f"partly-right-{seed}", depends_on, train, load=load)


def _tune_into(base: Pretrained, settings: Tuning, folder: Path) -> None:
    """Tune a copy of the base with one thread, and leave it in a folder."""
    model, tokenizer, world = copy.deepcopy(base.model), base.tokenizer, TinyWorld()
    examples = [WORLD_CHAT.encode(tokenizer, c) for c in settings.conversations(world)]
    end = tokenizer.special_tokens["<|endoftext|>"]
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order, however many there are
    try:
        tune(model, examples, settings, end, stories=story_examples(world, tokenizer, 2000))
    finally:
        torch.set_num_threads(n_threads)
    save_model(model, folder, eos_token_id=end)


# The notebook's function and the package's are the same, and so is the hash of their code
_tune_into.__module__ = "llmbook.grpo"


# %% tags=["engine"]
# The model at the start, the questions, and how replies are counted
start, tokenizer, world = partly_right(), pretrained("tinyworld").tokenizer, TinyWorld()
pad_id = tokenizer.special_tokens["<|endoftext|>"]
asked, held_out = (make_questions(world, "fact", split) for split in ("tuning", "held_out"))
prompts = question_prompts(tokenizer, asked)


def share_right(model: TransformerLM, questions: Sequence[Question]) -> float:
    """Return the share of right ones among the likeliest replies."""
    replies = ask(model, tokenizer, [question.text for question in questions])
    pairs = zip(questions, replies, strict=True)
    return sum(is_answer(world, one, reply) for one, reply in pairs) / len(questions)


def within(what: str, value: float, low: float, high: float) -> None:
    """Print between what a share lies, in percent, after checking that it does."""
    assert low <= value <= high, f"{what}: {value}"
    print(f"{what}: {100 * low:.0f} to {100 * high:.0f} %")


# %% tags=["engine"]
# Rows of the tables of results as text, shares in percent
def read_rows(name: str) -> list[dict[str, str]]:
    with (results / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


runs, curves = read_rows("grpo"), read_rows("grpo_curves")


def of_runs(experiment: str, variant: str, column: str = "facts") -> list[float]:
    which = [row for row in runs if (row["experiment"], row["variant"]) == (experiment, variant)]
    return [100 * float(row[column]) for row in which]


def show(rows: Mapping[str, tuple[str, str]], columns: Mapping[str, str]) -> None:
    """Print means over three seeds, with intervals of 95 %."""
    print(" " * 28 + "".join(f"{name:>20}" for name in columns))
    for name, which in rows.items():
        cells = []
        for column in columns.values():
            found = mean_interval(of_runs(*which, column))
            low, high = max(found.low, 0.0), min(found.high, 100.0)
            cells.append(f"{found.estimate:.0f} % [{low:.0f}, {high:.0f}]")
        print(f"{name:28}" + "".join(f"{cell:>20}" for cell in cells))


# %% tags=["engine"]
# The results of single runs, and their curves
def list_runs(rows: Mapping[str, tuple[str, str]], columns: Mapping[str, str]) -> None:
    """Print the results of all seeds, in percent."""
    print(" " * 28 + "".join(f"{name:>20}" for name in columns))
    for name, which in rows.items():
        cells = [" ".join(f"{x:3.0f}" for x in of_runs(*which, c)) for c in columns.values()]
        print(f"{name:28}" + "".join(f"{cell:>20}" for cell in cells))


def curve(experiment: str, variant: str, column: str) -> tuple[list[int], Tensor]:
    which = [r for r in curves if (r["experiment"], r["variant"]) == (experiment, variant)]
    steps = sorted({int(row["step"]) for row in which})
    found = [[float(row[column]) for row in which if int(row["step"]) == step] for step in steps]
    return steps, torch.tensor(found)


# %% tags=["engine"]
#| export
def is_answer(world: TinyWorld, question: Question, reply: str) -> bool:
    """Return whether a reply to a question about facts is right, and about whom it should be.

    It must name the right value and no other, somebody whom the question names, and nobody whom
    neither the question nor the right answer names. (``judge_reply`` looks at values alone.)
    """
    verdict = judge_reply(world, question, reply)
    people = {*world.cast.facts, *world.cast.strangers}
    asked, said = (people.intersection(re.findall(r"\w+", t)) for t in (question.text, reply))
    value = world.cast.facts.get(question.character, {}).get(question.attribute)
    return verdict.right and bool(said & asked) and said <= asked | {question.character, value}


def right_and_ended(world: TinyWorld) -> Rewards:
    """Return the reward 1 for an answer that has come to its end, and 0 for any other reply."""
    if not isinstance(world, TinyWorld):
        raise ValueError(f"world: expected a TinyWorld, got {world!r:.60}")

    def checked(prompt: Prompt, response: Response) -> float:
        if prompt.question is None:
            raise ValueError("prompts: expected those of questions, got one without a question")
        return float(response.finished and is_answer(world, prompt.question, response.text))

    return each(checked)


# %% tags=["engine"]
#| export
def two_step_questions(
    world: TinyWorld,
    split: Literal["tuning", "held_out"],
    *,
    named: bool = False,
) -> list[Question]:
    """Return questions about the best friends of half of the characters, in a fixed order.

    The right reply names the value alone, or, with ``named``, the friend before it. The
    ``character`` of each question is the friend, whose attribute is asked for.
    """
    check_choice("split", split, ("tuning", "held_out"))
    found = []
    for name in tuple(world.cast.facts)[0 if split == "tuning" else 1 :: 2]:
        friend = world.cast.facts[name]["friend"]
        first = PHRASES["friend"][0].format(name=name, value=friend) + " " if named else ""
        for attribute in VALUES:
            if attribute in ("friend", "secret"):
                continue
            subject = friend if named else f"The best friend of {name}"
            value = world.cast.facts[friend][attribute]
            reply = first + PHRASES[attribute][0].format(name=subject, value=value)
            for i, wording in enumerate(wordings(attribute)):
                text = wording.format(name=f"the best friend of {name}")
                found.append(Question(text, reply, "fact", friend, attribute, i))
    return found


# %% [markdown]
# ### A hundred steps of practice
#
# `train_grpo`, which the chapter builds, lets the model answer questions about one half of the
# characters, 8 times each, and a checker marks the answers. It never sees a right answer that it
# has not written itself. Here is what it says about the *other* half, before and after:

# %%
policy = copy.deepcopy(start)
log = train_grpo(policy, prompts, right_and_ended(world), GRPO(), tokenizer=tokenizer)
within("right, before practice", share_right(start, held_out[::2]), 0.2, 0.5)
within("right, after practice", share_right(policy, held_out[::2]), 0.85, 1.0)

# %% [markdown]
# Three questions from that half, with the likeliest reply of each model:

# %% tags=["nbval-ignore-output"]
for question in held_out[5:600:200]:
    print(question.text)
    for name, model in (("before", start), ("after", policy)):
        print(f"   {name}: {ask(model, tokenizer, [question.text])[0]}")

# %% [markdown]
# The model at the start often tells a piece of a story, as it did in pretraining. The trained one
# answers in a sentence and stops. It is right about characters that it never practiced on, because
# it knew their facts all along: rewards drew out what pretraining had put in. Whether they can do
# more than that is the question at the end of the chapter.
#
# The checker is short. A reply earns 1 if it names the right value and no other, and has come to
# its end within 24 tokens; anything else earns 0:

# %%
question, reward = held_out[5], right_and_ended(world)
for text, finished in ((question.reply, True), (question.reply, False), ("Yes, indeed.", True)):
    response = Response((1,), (0.0,), finished, text)
    print(
        f"{reward([Prompt((1,), question)], [response])[0]:.0f}  {text} {'' if finished else '...'}"
    )

# %% [markdown]
# The end matters as much as the truth. A reply that is right and then rambles would otherwise earn
# as much as one that stops, and nothing would teach the model to stop.
#
# ## The group is the critic
#
# Chapter 21 derived the gradient of the expected reward $J$ of a policy $\pi_\theta$. For a
# response $y$ with reward $r(y)$, and any baseline $b$ that does not depend on $y$,
#
# $$\nabla J = \mathbb{E}_{y \sim \pi_\theta}\big[(r(y) - b)\, \nabla \log \pi_\theta(y)\big].$$
#
# The nearer $b$ is to the expected reward, the less the estimate varies. PPO trains a critic for
# it, a second model as large as the policy. Now draw a **{term}`group <group of responses>`** of
# $n$ responses $y_1, \dots, y_n$ to the same prompt, with rewards $r_1, \dots, r_n$. Their mean
# $\bar r = \frac1n \sum_j r_j$ is an estimate of the expected reward that costs nothing, since the
# responses are needed anyway. The **{term}`advantage`** of response $i$ is
#
# $$A_i = r_i - \bar r.$$ (eq-grpo-advantage)
#
# ```{figure} ../figures/grpo-group.svg
# :name: fig-grpo-group
# :alt: Two groups of four responses to a prompt. In the first, two rewards are 1 and two are 0, the mean is one half, and the tokens of the right responses are encouraged and those of the wrong ones discouraged. In the second, all rewards are 1, and nothing is changed.
#
# A group is its own critic. Each token of a response gets the response's advantage. A group whose
# rewards are all the same teaches nothing.
# ```
#
# ### Is a mean that contains the reward allowed?
#
# The baseline must not depend on the response, but $\bar r$ contains $r_i$. Let us see what this
# does. Write $g_i = \nabla \log \pi_\theta(y_i)$, and remember from chapter 21 that
# $\mathbb{E}[g_i] = 0$. The responses are independent, so that $\mathbb{E}[r_j g_i] =
# \mathbb{E}[r_j]\, \mathbb{E}[g_i] = 0$ for $j \neq i$. Hence
#
# $$\mathbb{E}[(r_i - \bar r)\, g_i] = \mathbb{E}[r_i g_i] - \frac1n \sum_j \mathbb{E}[r_j g_i]
# = \Big(1 - \frac1n\Big)\, \mathbb{E}[r_i g_i] = \Big(1 - \frac1n\Big) \nabla J.$$
#
# The direction is right, and the length is short by the factor $1 - 1/n$, which a learning rate
# absorbs. The leave-one-out baseline of chapter 21, the mean of the *other* rewards, is
# $\frac{n}{n-1}$ times longer and so unbiased {cite}`kool2019buy`. For a policy that chooses one of
# three responses we can list all groups and take the exact expectation:

# %%
theta = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
rewards = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
(true_gradient,) = torch.autograd.grad((theta.softmax(0) * rewards).sum(), theta)
n = 3
groups = torch.cartesian_prod(*[torch.arange(3)] * n)  # all 27 groups of three
log_pi = theta.log_softmax(0)[groups]
chances = log_pi.sum(dim=1).exp().detach()
for baseline in ("mean", "leave_one_out"):
    advantages = group_advantages(rewards[groups], scale="none", baseline=baseline)
    expected = (chances[:, None] * advantages * log_pi).sum() / n
    (gradient,) = torch.autograd.grad(expected, theta, retain_graph=True)
    ratio = gradient / true_gradient
    print(f"{baseline:13}: {ratio.mean():.3f} times the gradient, in all {len(ratio)} directions")

# %% [markdown]
# ### What dividing by the deviation does
#
# GRPO as published also divides by the standard deviation $s$ of the group's rewards:
#
# $$A_i = \frac{r_i - \bar r}{s}, \qquad s^2 = \frac{1}{n-1} \sum_j (r_j - \bar r)^2.$$
#
# With rewards of 0 and 1, of which a share $p$ is 1, $s \approx \sqrt{p (1 - p)}$. So a right
# response gets $\sqrt{(1-p)/p}$, and a wrong one $-\sqrt{p/(1-p)}$. The next cell prints the
# advantages in groups of 8, and their sum over the right responses, which says how hard the group
# pulls:

# %%
print("right of 8   advantage of a right one   pull, divided by s   pull, not divided")
for right in (1, 2, 4, 7):
    rewards = torch.tensor([[1.0] * right + [0.0] * (8 - right)])
    scaled, plain = (group_advantages(rewards, scale=scale)[0] for scale in ("group", "none"))
    pulls = [float(advantages.clamp(min=0).sum()) for advantages in (scaled, plain)]
    print(f"{right:10} {scaled[0]:26.2f} {pulls[0]:20.2f} {pulls[1]:19.2f}")

# %% [markdown]
# Without the division, a question that is answered half of the time pulls hardest, and one that is
# nearly solved or nearly hopeless pulls less than half as much. The deviation evens this out: it
# makes the hard and the easy questions count for more. Liu and colleagues
# {cite}`liu2025understanding` call that a bias and leave the division out, since the sum of the
# groups' gradients is then no longer the gradient of the mean reward. It is a choice of what to
# optimize, and we will measure whether it matters here.
#
# If all rewards of a group are equal, every advantage is 0 divided by 0, which must not become NaN:
# {py:func}`~llmbook.grpo.group_advantages` says 0.

# %% [markdown] tags=["engine"]
# ### Engine room: the advantages of groups, with their options

# %% tags=["engine"]
#| export
Scale = Literal["group", "none"]
Baseline = Literal["mean", "leave_one_out"]


def group_advantages(
    rewards: Float[Tensor, "prompts samples"],
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
) -> Float[Tensor, "prompts samples"]:
    """Return how much better each response is than the others to its prompt.

    The ``baseline`` is the mean of the group, or that of the other responses. With the ``scale``
    "group", differences are divided by the unbiased standard deviation of the group's rewards.
    Equal rewards give 0. Source: Shao et al. (2024), section 4.1; Liu et al. (2025) for "none".
    """
    check_choice("scale", scale, ("group", "none"))
    check_choice("baseline", baseline, ("mean", "leave_one_out"))
    if rewards.size(1) < 2:
        raise ValueError(f"rewards: expected at least 2 for each prompt, got {rewards.size(1)}")
    if not rewards.isfinite().all():
        raise ValueError("rewards: expected finite numbers, got some that are not")
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out":
        centered = leave_one_out(rewards)
    if scale == "group":
        centered = centered / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return centered.where(informative(rewards)[:, None], 0.0)


# %% tags=["engine"]
#| export
def informative(rewards: Float[Tensor, "prompts samples"]) -> Bool[Tensor, " prompts"]:
    """Return which groups have rewards that differ: the others have nothing to teach."""
    if rewards.ndim != 2 or not rewards.is_floating_point():
        got = f"{rewards.dtype} {tuple(rewards.shape)}"
        raise ValueError(f"rewards: expected fractions (prompts, samples), got {got}")
    return rewards.amax(dim=1) > rewards.amin(dim=1)


# %% [markdown]
# ### Groups that teach nothing
#
# With a chance $p$ of a right response, all $n$ of a group are equal with probability
# $p^n + (1-p)^n$. Most questions begin with a $p$ near 0, and end with one near 1. So most groups
# have nothing to say at first, and again at the end. The log counts how many do:

# %%
steps, shares = log.column("informative")
within("groups that teach something, first ten steps", shares[0], 0.02, 0.2)
within("most, over ten steps", max(shares), 0.2, 0.7)

# %% [markdown]
# One answer is to draw other prompts in place of idle groups, until there are enough useful ones.
# DAPO calls it *dynamic sampling* {cite}`yu2025dapo`. The cheaper answer is to choose questions of
# the right difficulty beforehand.
#
# ## Tokens, responses, and what to divide by
#
# The simplest loss gives each token $y_{i,t}$ of a response $i$ the response's advantage:


# %%
#| export
def policy_gradient_loss(
    log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return the loss whose gradient is that of the expected reward, with the sign turned.

    ``per`` is what ``aggregate`` divides by; with 1 it is the sum over each response, whose
    gradient is unbiased. Source: Williams (1992).
    """
    return aggregate(-advantages.detach() * log_probs.where(mask, 0.0), mask, per=per)


# %% [markdown]
# Summed over a response, $\sum_t \log \pi(y_{i,t} \mid y_{i,<t}) = \log \pi(y_i)$, and the gradient
# is the one derived above. GRPO as published divides the sum by the length $|y_i|$ of each
# response, others divide by the number of all tokens in a batch, and Dr. GRPO divides by a
# constant. Chapter 19 met the same three choices ("What to divide by"), but here they do something
# new. A response's length is a part of what the policy decides.
#
# Suppose that half of the responses are right, and that the length has nothing to do with it.
# Dividing by the length makes a token of a short right response count more than one of a long right
# response, so that right responses become shorter. A wrong response is pushed down, but less per
# token if it is long. So wrong responses become longer, at no gain to anybody. To see this without
# anything else, let a policy have just two parameters, the probability of stopping after each token
# of a right response and of a wrong one. Both begin with 10 tokens on average:


# %%
def lengths_after(per: str | int, n_steps: int = 300, longest: int = 200) -> list[float]:
    """Return the mean lengths of right and of wrong responses after training."""
    draw, places = torch.Generator().manual_seed(0), torch.arange(longest)
    theta = torch.full((2,), -math.log(9.0))  # the logit of one tenth
    for _ in range(n_steps):
        theta.requires_grad_()
        right = (torch.rand(64, 8, generator=draw) < 0.5).long()
        stop = theta[right.flatten()].sigmoid()[:, None]
        ends = torch.rand(512, longest, generator=draw) < stop
        length = torch.where(ends.any(1), ends.long().argmax(1) + 1, longest)[:, None]
        log_probs = torch.where(places == length - 1, stop.log(), (1 - stop).log())
        advantages = group_advantages(right.float(), scale="none").reshape(-1, 1)
        mask = places < length
        loss = policy_gradient_loss(log_probs, advantages.expand(512, longest), mask, per=per)
        theta = (theta - torch.autograd.grad(loss, theta)[0]).detach()
    return (1 / theta.sigmoid()).tolist()


print("divided by                    right responses   wrong responses, tokens")
for name, per in (("the length", "response"), ("all tokens", "token"), ("a constant", 10)):
    wrong, right = (f"{x:.0f}" if x < 100 else "over 100" for x in lengths_after(per))
    print(f"{name:28} {right:>16} {wrong:>17}")

# %% [markdown]
# Divided by the length, right responses shrink and wrong ones grow, although no reward ever asked
# for it. Divided by a constant, the lengths stay: with $s$ for the probability of stopping and $L$
# for the length, $\log \pi(y) = (L-1)\log(1-s) + \log s$ has an expected gradient of zero, whatever
# its sign is, and a constant keeps it so. The number of all tokens in a batch is nearly a constant,
# and so is nearly as good.
#
# ## How far one rollout carries
#
# Responses are expensive, so several steps are taken on each rollout. From the second step on, the
# policy is not the one that wrote them. Chapter 21 derived the cure of PPO: weigh each token by the
# ratio $\rho_{i,t} = \pi_\theta(y_{i,t} \mid \cdot) / \pi_{\text{old}}(y_{i,t} \mid \cdot)$, and
# stop the gradient where the ratio has gone too far in the wanted direction,
#
# $$\ell_{i,t} = -\min\big(\rho_{i,t} A_i,\;
# \operatorname{clip}(\rho_{i,t}, 1 - \epsilon_-, 1 + \epsilon_+)\, A_i\big).$$
#
# The published relatives of GRPO change one of four things. **Which bounds.** With $\epsilon_+ =
# 0.2$, a token of probability 0.01 can rise to 0.012 in one rollout, and one of 0.8 to 0.96. Rare
# tokens have little room to grow, and the policy loses its variety. DAPO raises only the upper
# bound, to 0.28. **Which ratio.** The reward is given to a response, not to its tokens, so GSPO
# {cite}`zheng2025group` takes one ratio for all of it, the geometric mean of the tokens' ratios,
#
# $$\rho_i = \exp\Big(\frac{1}{|y_i|} \sum_t \log \frac{\pi_\theta(y_{i,t} \mid \cdot)}
# {\pi_{\text{old}}(y_{i,t} \mid \cdot)}\Big),$$
#
# and much narrower bounds for it, since a mean varies less. **What happens outside.** A clipped
# token has no gradient. CISPO {cite}`minimax2025m1` keeps it: the ratio is cut at a bound, but
# counts as a weight without a gradient of its own, $-\min(\rho, \rho_{\max})\, A \log \pi_\theta$.
# **What to divide by**, which we have just seen. RLOO {cite}`ahmadian2024back` is the plainest of
# them, with the leave-one-out baseline and no bounds. In `VARIANTS` they are values of one
# dataclass:
#
# | name | baseline | divided by $s$ | bounds | ratio of | divided by |
# |---|---|---|---|---|---|
# | `rloo` | the others' mean | no | none | tokens | 1 |
# | `grpo` | mean | yes | 0.2 on both sides | tokens | the length |
# | `dr_grpo` | mean | no | 0.2 on both sides | tokens | a constant |
# | `dapo` | mean | yes | 0.2 below, 0.28 above | tokens | all tokens |
# | `gspo` | mean | yes | 0.0003 below, 0.0004 above | responses | the length |
# | `cispo` | mean | yes | a weight of at most 5 | tokens | all tokens |
#
# (`dapo` also draws prompts up to four times in search of groups that teach.)

# %% [markdown] tags=["engine"]
# ### Engine room: the variants, and the loss with its options


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class Variant:
    """What distinguishes GRPO from its relatives.

    ``level`` "sequence" takes one ratio for a response, the geometric mean of its tokens' ratios.
    ``clip`` is PPO's, as (below, above) or None; with ``most``, the ratio is instead a weight of
    at most so much, without a gradient of its own. ``draws`` says how often prompts
    are drawn anew in place of groups that teach nothing.
    """

    scale: Scale = "group"
    baseline: Baseline = "mean"
    level: Literal["token", "sequence"] = "token"
    clip: Clip = 0.2
    most: int | float | None = None
    per: Per | int | float = "response"
    draws: int = 1

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("group", "none"))
        check_choice("baseline", self.baseline, ("mean", "leave_one_out"))
        check_choice("level", self.level, ("token", "sequence"))
        for bound in self.clip if isinstance(self.clip, tuple) else (self.clip,):
            if bound is not None:
                check_number("clip", bound, 0)
        low = self.clip[0] if isinstance(self.clip, tuple) else self.clip
        if low is not None:
            check_number("clip", low, 0, 1)
        if self.most is not None:
            check_number("most", self.most, above=0)
        if isinstance(self.per, str):
            check_choice("per", self.per, ("token", "response"))
        else:
            check_number("per", self.per, above=0)
        check_whole("draws", self.draws, 1)


# %% tags=["engine"]
#| export
def check_variant(variant: object) -> None:
    """Demand a ``Variant``, such as those in ``VARIANTS``."""
    if not isinstance(variant, Variant):
        raise ValueError(f"variant: expected a Variant, got {variant!r:.60}")


# %% tags=["engine"]
#| export
#: The variants by the names under which they were published. The constant of Dr. GRPO is the
#: longest response that is allowed; set ``per`` to yours with ``dataclasses.replace``.
VARIANTS: dict[str, Variant] = {
    "rloo": Variant(scale="none", baseline="leave_one_out", clip=None, per=1),
    "grpo": Variant(),
    "dr_grpo": Variant(scale="none", per=24),
    "dapo": Variant(clip=(0.2, 0.28), per="token", draws=4),
    "gspo": Variant(level="sequence", clip=(3e-4, 4e-4)),
    "cispo": Variant(most=5.0, per="token"),
}


# %% tags=["engine"]
#| export
def check_like(mask: Tensor, **values: Tensor | None) -> None:
    """Demand fractions of the mask's shape, (batch, sequence), by their names; None may stand."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"{mask!r:.60}"
        raise ValueError(f"mask: expected truths (batch, sequence), got {got}")
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else f"{value!r:.60}"
            raise ValueError(f"{name}: expected a tensor of fractions, got {got}")
        if value.shape != mask.shape:
            expected = f"the shape of mask, {tuple(mask.shape)}"
            raise ValueError(f"{name}: expected {expected}, got {tuple(value.shape)}")


# %% tags=["engine"]
#| export
def log_ratios(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    level: Literal["token", "sequence"] = "token",
) -> Float[Tensor, "batch sequence"]:
    """Return the logarithm of each token's ratio, new to old, or its mean over the response."""
    check_choice("level", level, ("token", "sequence"))
    check_like(mask, log_probs=log_probs, old_log_probs=old_log_probs)
    change = (log_probs - old_log_probs).where(mask, 0.0)
    if level == "token":
        return change
    means = change.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return on_tokens(means, mask)


# %% tags=["engine"]
#| export
def grpo_terms(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    variant: Variant = VARIANTS["grpo"],
) -> Float[Tensor, "batch sequence"]:
    """Return the loss of each token, without the penalty for divergence; 0 where it is masked."""
    check_variant(variant)
    change = log_ratios(log_probs, old_log_probs, mask, level=variant.level)
    check_like(mask, advantages=advantages)
    advantages = advantages.where(mask, 0.0)
    if variant.most is not None:
        weights = change.detach().exp().clamp(max=variant.most)
        return -weights * advantages * log_probs.where(mask, 0.0)
    return clipped_terms(change, torch.zeros_like(change), advantages, clip=variant.clip)


# %% tags=["engine"]
#| export
def grpo_loss(
    log_probs: Float[Tensor, "batch sequence"],
    old_log_probs: Float[Tensor, "batch sequence"],
    advantages: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    variant: Variant = VARIANTS["grpo"],
    reference: Float[Tensor, "batch sequence"] | None = None,
    kl_weight: int | float = 0.0,
) -> Float[Tensor, ""]:
    """Return the loss of responses, from the log-probabilities of their tokens in nats.

    ``old_log_probs`` are those of the policy that wrote them. ``kl_weight`` times k3, the estimate
    of the divergence from ``reference``, is added to each token. What stands outside of the mask
    has no effect, not even NaN. Source: Shao et al. (2024), equation 3, and those of ``Variant``.
    """
    terms = grpo_terms(log_probs, old_log_probs, advantages, mask, variant=variant)
    terms = terms + kl_penalty(log_probs, reference, mask, kl_weight)
    return aggregate(terms, mask, per=variant.per)


# %% tags=["engine"]
#| export
def kl_penalty(
    log_probs: Float[Tensor, "batch sequence"],
    reference: Float[Tensor, "batch sequence"] | None,
    mask: Bool[Tensor, "batch sequence"],
    kl_weight: int | float,
) -> Float[Tensor, "batch sequence"]:
    """Return ``kl_weight`` times the estimate k3 of each token, and 0 where it is masked."""
    check_number("kl_weight", kl_weight, 0)
    check_like(mask, log_probs=log_probs, reference=reference)
    if not kl_weight:
        return torch.zeros_like(log_probs)
    if reference is None:
        raise ValueError(f"reference: expected log-probabilities for {kl_weight = }, got None")
    policy, other = log_probs.where(mask, 0.0), reference.where(mask, 0.0)
    return kl_weight * kl_estimates(policy, other).k3


# %% [markdown]
# ### One function for all
#
# {py:func}`~llmbook.grpo.grpo_loss` computes them all, from the log-probabilities of the tokens.
# The penalty for divergence from a reference stands in the loss here, as in GRPO's paper, and uses
# the estimate $k_3$. Chapter 21 showed that the gradient of $k_3$ is not that of the divergence it
# estimates. Many recent recipes leave the penalty out, since a checker cannot be fooled as a reward
# model can; we will see what it costs. On the first step after a rollout all ratios are 1, and a
# loss near 0 is then no fault. Its gradient is not 0:

# %%
torch.manual_seed(0)
mask = torch.arange(12) < torch.tensor([[12], [7], [9], [4]])
log_probs = (-torch.rand(4, 12)).requires_grad_()
advantages = on_tokens(group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))[0], mask)
print("           loss   length of the gradient, one step later: loss   clipped tokens")
for name, variant in VARIANTS.items():
    losses, old = [], log_probs.detach()
    for change in (0.0, 0.3):
        loss = grpo_loss(log_probs, old - change * mask, advantages, mask, variant=variant)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        value = abs(round(loss.item(), 2))  # all are positive, but for rounding
        losses += [value, gradient.norm().item(), int((gradient == 0)[mask].sum())]
    print(f"{name:8} {losses[0]:6.2f} {losses[1]:24.2f} {losses[3]:22.2f} {losses[5]:16}")

# %% [markdown]
# In the second half every token has become 35 % likelier. GRPO, Dr. GRPO and DAPO then stop the
# tokens with a positive advantage, GSPO does the same with its narrow bounds, and the other two go
# on.

# %% [markdown] tags=["engine"]
# ### Engine room: credit for groups, groups that teach nothing, the objective, and the run

# %% [markdown] tags=["engine"]
# `GroupCredit` fills in the advantages of a rollout of chapter 21, and {py:class}`GroupBatches`
# adds dynamic sampling to its batches. The rollout in hand is a part of the state of a run, so that
# one that was killed between two steps on the same responses goes on with them.


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class GroupCredit:
    """Gives each token of a response its advantage within the group, for ``RolloutBatches``.

    With ``trainer``, the policy as the trainer computes it, the log-probabilities that count as old
    are computed anew, and the advantages are multiplied by ``importance_weights`` of at most
    ``most``, since those who drew the tokens may have had other numbers.
    """

    variant: Variant = VARIANTS["grpo"]
    trainer: TransformerLM | None = None
    most: int | float = 2.0
    temperature: int | float = 1.0

    def __post_init__(self) -> None:
        check_variant(self.variant)
        if self.trainer is not None and not isinstance(self.trainer, TransformerLM):
            expected = "a TransformerLM or None"
            raise ValueError(f"trainer: expected {expected}, got {self.trainer!r:.60}")
        check_number("most", self.most, above=0)
        check_number("temperature", self.temperature, above=0)

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        samples = int((rollouts.groups == rollouts.groups[0]).sum())
        rewards = rollouts.rewards.view(-1, samples)
        options = {"scale": self.variant.scale, "baseline": self.variant.baseline}
        advantages = group_advantages(rewards, **options)  # type: ignore[arg-type]
        found = rollouts._replace(advantages=on_tokens(advantages.flatten(), rollouts.mask))
        if self.trainer is None:
            return found
        own = score_rollouts(self.trainer, rollouts, temperature=self.temperature)
        weights = importance_weights(own, rollouts.old_log_probs, rollouts.mask, most=self.most)
        return found._replace(old_log_probs=own, advantages=found.advantages * weights)


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class GroupBatches(RolloutBatches):
    """Rollouts of groups; up to ``draws`` times, prompts are drawn in place of idle groups.

    A group is idle if all its rewards are equal. If too few differ after the last draw, idle ones
    fill the rollout. The log gets the share of groups that differ as ``informative``.
    """

    draws: int = 1

    def __post_init__(self) -> None:
        check_whole("draws", self.draws, 1)
        check_whole("samples", self.samples, 2)
        super().__post_init__()

    def make_rollout(self, number: int) -> Rollouts:
        """Return the rollout of some number by the policy as it is."""
        check_whole("number", number, 0)
        Group = tuple[Prompt, list[Response], Tensor]
        kept, idle = list[Group](), list[Group]()
        for draw in range(number * self.draws, (number + 1) * self.draws):
            prompts, responses = self.written(draw)
            asked = [prompt for prompt in prompts for _ in range(self.samples)]
            rewards = rewards_of(self.reward, asked, list(chain.from_iterable(responses)))
            groups = rewards.view(-1, self.samples)
            for own in zip(prompts, responses, groups, informative(groups), strict=True):
                (kept if own[3] else idle).append(own[:3])
            if len(kept) >= self.n_prompts:
                break
        prompts, responses, found = zip(*[*kept, *idle][: self.n_prompts], strict=True)
        return self.credited(prompts, responses, torch.cat(found))


# %% tags=["engine"]
#| export
class GroupBatches(GroupBatches):  # continued
    @property
    def metrics(self) -> dict[str, float]:
        """What is logged of the rollout in hand, with the share of groups that differ."""
        if self.rollout is None:
            return {}
        differ = informative(self.rollout.rewards.view(-1, self.samples))
        return super().metrics | {"informative": float(differ.double().mean())}

    def identity(self) -> dict[str, Any]:
        """What decides on the prompts, the responses and their order."""
        return super().identity() | {"draws": self.draws}


# %% tags=["engine"]
#| export
def grpo_objective(
    model: TransformerLM,
    batch: Rollouts,
    *,
    variant: Variant = VARIANTS["grpo"],
    kl_weight: int | float = 0.0,
    entropy_weight: int | float = 0.0,
    text_weight: int | float = 1.0,
    temperature: int | float = 1.0,
) -> tuple[Float[Tensor, ""], Tensor, dict[str, Tensor]]:
    """Return the summed loss of a batch, what it is divided by, and sums to be logged.

    ``entropy_weight`` times the entropy of each prediction is taken off, and the mean loss of texts
    is added times ``text_weight``.
    """
    for name, weight in (("entropy_weight", entropy_weight), ("text_weight", text_weight)):
        check_number(name, weight, 0)
    if batch.advantages is None:
        raise ValueError("batch: expected advantages, which a credit function gives, got None")
    mask, old, logits = batch.mask, batch.old_log_probs, model(batch.inputs)
    log_probs = response_log_probs(logits, batch.targets, temperature=temperature)
    losses = grpo_terms(log_probs, old, batch.advantages, mask, variant=variant)
    losses = losses + kl_penalty(log_probs, batch.reference_log_probs, mask, kl_weight)
    with torch.set_grad_enabled(bool(entropy_weight)):
        entropy = entropies(logits, temperature=temperature)
    if entropy_weight:
        losses = losses - entropy_weight * entropy
    change = log_ratios(log_probs.detach(), old, mask, level=variant.level)
    logged = {"entropy": entropy.detach(), "clipped": _is_clipped(change, batch, variant).float()}
    logged["change"] = kl_estimates(old, log_probs.detach()).k3
    total, count = loss_sums(losses, mask, per=variant.per)
    # what is logged is a mean over tokens, whatever the loss is divided by
    per_token = count / mask.sum()
    sums = {name: values.where(mask, 0.0).sum() * per_token for name, values in logged.items()}
    if batch.text_targets is not None:
        nats = -response_log_probs(logits, batch.text_targets)
        text_loss = masked_mean(nats, batch.text_targets != -100)
        total = total + text_weight * text_loss * count
        sums["text_loss"] = text_loss.detach() * count
    return total, count, sums


# %% tags=["engine"]
#| export
def _is_clipped(
    change: Float[Tensor, "rows sequence"], batch: Rollouts, variant: Variant
) -> Bool[Tensor, "rows sequence"]:
    """Where the loss has no gradient, or a smaller one, because the ratio is out of bounds."""
    if variant.most is not None:
        return change.exp() > variant.most
    low, high = variant.clip if isinstance(variant.clip, tuple) else (variant.clip, variant.clip)
    advantages = batch.advantages
    if low is None or high is None or advantages is None:
        return torch.zeros_like(change, dtype=torch.bool)
    ratio = change.exp()
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


# %% tags=["engine"]
#| export
@dataclass(frozen=True, kw_only=True)
class GRPO:
    """The settings of a run; each rollout has ``n_prompts`` groups of ``samples`` responses.

    ``epochs`` and ``minibatches`` say how many steps are taken on a rollout. The rate of AdamW
    rises for 10 steps, and is then constant. ``n_texts`` rows of each batch are texts. With
    ``recompute``, the trainer computes the old log-probabilities anew, and corrects for the
    difference.
    """

    variant: Variant = VARIANTS["grpo"]
    kl_weight: int | float = 0.0
    n_steps: int = 100
    n_prompts: int = 16
    samples: int = 8
    epochs: int = 1
    minibatches: int = 1
    learning_rate: int | float = 5e-4
    entropy_weight: int | float = 0.0
    temperature: int | float = 1.0
    max_new_tokens: int = 24
    n_texts: int = 0
    text_weight: int | float = 1.0
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_variant(self.variant)
        for name in ("kl_weight", "entropy_weight", "text_weight"):
            check_number(name, getattr(self, name), 0)
        for name in ("learning_rate", "temperature"):
            check_number(name, getattr(self, name), above=0)
        for name in ("n_steps", "n_prompts", "epochs", "minibatches", "max_new_tokens"):
            check_whole(name, getattr(self, name), 1)
        check_whole("samples", self.samples, 2)
        check_whole("n_texts", self.n_texts, 0)
        check_whole("seed", self.seed, 0)

    def training(self, batch_size: int, **more: Any) -> TrainingConfig:
        """Return what the trainer is told; ``more`` are other fields of its configuration."""
        return TrainingConfig(
            n_steps=self.n_steps,
            batch_size=batch_size,
            learning_rate=self.learning_rate,
            weight_decay=0.0,
            schedule="constant",
            warmup=min(10, self.n_steps),
            seed=self.seed,
            **more,
        )


# %% tags=["engine"]
#| export
def group_batches(
    policy: TransformerLM,
    prompts: Sequence[Prompt],
    reward: Rewards,
    settings: GRPO,
    *,
    tokenizer: BPETokenizer,
    credit: Credit | None = None,
    reference: TransformerLM | None = None,
    texts: Sequence[Example] = (),
    watch: Mapping[str, Rewards] | None = None,
) -> GroupBatches:
    """Return the rollouts of a run; ``credit`` is by default the variant's ``GroupCredit``."""
    if credit is None:
        trainer = policy if settings.recompute else None
        credit = GroupCredit(settings.variant, trainer, temperature=settings.temperature)
    names = ["n_prompts", "samples", "epochs", "minibatches", "temperature", "max_new_tokens"]
    shape = {name: getattr(settings, name) for name in [*names, "n_texts", "seed"]}
    return GroupBatches(
        policy,
        prompts,
        reward,
        credit,
        tokenizer=tokenizer,
        reference=reference,
        texts=texts,
        watch={} if watch is None else watch,
        draws=settings.variant.draws,
        **shape,
    )


# %% tags=["engine"]
#| export
def train_grpo(
    policy: TransformerLM,
    prompts: Sequence[Prompt],
    reward: Rewards,
    settings: GRPO,
    *,
    tokenizer: BPETokenizer,
    texts: Sequence[Example] = (),
    watch: Mapping[str, Rewards] | None = None,
    folder: str | Path | None = None,
    probes: Sequence[Any] = (),
    sinks: Sequence[Sink] = (),
    **training: Any,
) -> MetricsLog:
    """Improve ``policy``, in place, by the rewards of its own responses; return the log.

    The reference, if ``kl_weight`` asks for one, is the policy as it is now. With a ``folder``, a
    run that was stopped goes on. ``training`` are other fields of ``TrainingConfig``.
    """
    reference = copy.deepcopy(policy) if settings.kl_weight else None
    given: dict[str, Any] = {"reference": reference, "texts": texts, "watch": watch}
    batches = group_batches(policy, prompts, reward, settings, tokenizer=tokenizer, **given)
    names = ["variant", "kl_weight", "entropy_weight", "text_weight", "temperature"]
    objective = partial(grpo_objective, **{name: getattr(settings, name) for name in names})
    watching: dict[str, Any] = {"probes": [RolloutLog(), *probes], "sinks": sinks, "folder": folder}
    config = settings.training(batches.batch_size, **training)
    return Trainer(policy, batches, config, objective=objective, **watching).train()


# %% tags=["engine"]
# A run that is killed between two steps on one rollout goes on to the same weights
class Kill(Probe):
    """Raises an error after the second step, once."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.step == 2 and not (trainer.folder / "killed").exists():
            (trainer.folder / "killed").touch()
            raise RuntimeError("killed")


run: Any = partial(
    train_grpo,
    prompts=prompts,
    reward=each(lambda prompt, response: float(len(response.ids))),
    settings=GRPO(n_steps=4, n_prompts=4, samples=4, epochs=3),
    tokenizer=tokenizer,
)
policies = [copy.deepcopy(start) for _ in range(3)]
run(policies[0])
with tempfile.TemporaryDirectory() as folder:
    options = {"folder": folder, "checkpoint_every": 1, "probes": [Kill()]}
    with suppress(RuntimeError):
        run(policies[1], **options)
    run(policies[2], **options)
weights = [torch.nn.utils.parameters_to_vector(one.parameters()) for one in policies]
assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


# %% [markdown]
# ## Does it help?
#
# The run at the beginning could be a matter of luck, or of more training of any kind. So `python
# benchmarks/grpo.py` repeats it with three seeds, each from a start of its own, beside controls
# with the same budget. *Continued tuning* trains as many rows, 12,800, on the answers about the one
# character. *Rejection sampling* lets the start answer all questions as often as GRPO does, keeps
# the right ones, and tunes on these (chapter 21's baseline). *Own answers* does the same without a
# judge. The columns are right replies about the held-out half, the likeliest ones and drawn ones
# that have also ended, and the share of questions that at least one of 8 drawn replies gets right:

# %%
columns = {"right": "facts", "drawn, ended": "drawn", "any of 8": "any"}
show(
    {
        "the start": ("main", "start"),
        "GRPO": ("main", "grpo"),
        "continued tuning": ("main", "continued tuning"),
        "rejection sampling": ("main", "rejection sampling"),
        "own answers, unjudged": ("control", "own answers, unjudged"),
    },
    columns,
)

# %% [markdown]
# Neither more examples of the old kind nor the model's own unjudged answers help. Rejection
# sampling helps a little: it learns from the right answers that the start happened to give, which
# are few. GRPO beats it by a wide margin with as many drawn responses, because its later responses
# come from a policy that is already better. The curves show how it feeds itself:

# %% mystnb={"figure": {"caption": "Three runs of GRPO (their mean, and the range between them). Left: the share of drawn responses that are right and have ended, and of groups whose rewards differ. Right: entropy of the policy, without and with a bonus for it.", "name": "fig-grpo-curves"}, "image": {"alt": "On the left a curve of rewards rises slowly at first, then steeply, and levels off near one; the share of informative groups rises and falls again. On the right, entropy falls from about a third of a nat to almost nothing, and stays higher with a bonus."}}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4))
lines = [(0, "main", "grpo", "reward", "reward"), (0, "main", "grpo", "informative", "informative")]
lines += [
    (1, "main", "grpo", "entropy", "no bonus"),
    (1, "entropy", "weight 0.02", "entropy", "bonus"),
]
for place, experiment, variant, column, label in lines:
    steps, found = curve(experiment, variant, column)
    panels[place].plot(steps, found.mean(dim=1), label=label)
    panels[place].fill_between(steps, found.amin(dim=1), found.amax(dim=1), alpha=0.2)
panels[0].set(xlabel="step", ylabel="share", title="What is rewarded, and what teaches")
panels[1].set(xlabel="step", ylabel="nats per token", title="Entropy")
for panel in panels:
    panel.legend()
plt.show()

# %% [markdown]
# At first only a few responses are right, and few groups teach. Each success makes the next one
# likelier, so that the curve bends upwards, until almost everything is right and nothing is left to
# learn from. This also says what GRPO needs: a start that is sometimes right. A policy that never
# succeeds gets no advantage at all.
#
# ### What is lost on the way
#
# The right panel shows the price of success. The entropy falls, as the policy becomes sure of
# itself. This is *entropy collapse*. Where there is one right answer in one right form, as here, it
# is the aim. Where the policy must still find something, it is the end of learning, since a group
# without variety has no advantages. A weight on the entropy keeps some of it; DAPO's higher upper
# bound is another cure, and so is the penalty for divergence. A policy trained on answers alone
# also forgets how to tell stories, as in chapter 19, and the cure is the same: stories in each
# batch. The columns are right replies and consistent stories, by seed:

# %%
list_runs(
    {
        "the start": ("main", "start"),
        "GRPO": ("main", "grpo"),
        "with stories in each batch": ("stories", "32 of each batch"),
        "with a penalty, 0.05": ("penalty", "KL 0.05"),
        "with a bonus for entropy": ("entropy", "weight 0.02"),
    },
    {"right, by seed": "facts", "stories, by seed": "stories"},
)

# %% [markdown]
# Without stories in its batches, the policy forgets them, in one run nearly all of them. With 32
# stories beside the 128 responses it keeps most, and is about as often right, though one of the
# three runs had not come as far after a hundred steps. The reward says nothing about stories, so
# nothing defends them; whatever should survive training has to be in it.
#
# ### The relatives, and stale rollouts
#
# How many steps can be taken on one rollout? All runs take a hundred steps, so that with 16 on
# each rollout the policy writes a sixteenth of the responses:

# %%
list_runs(
    {"1 step on each rollout": ("main", "grpo")}
    | {f"{n} steps on each rollout": ("stale", f"{n} steps") for n in (4, 8, 16)},
    {"right, by seed": "facts", "drawn, ended": "drawn"},
)

# %% [markdown]
# With one step on each rollout all gradients are those of the present policy. The more steps a
# rollout serves, the fewer responses there are to learn from, and the older they are. With one step
# on each rollout all ratios are 1 and no bound ever acts, so we compare the published variants with
# four:

# %%
list_runs(
    {"grpo": ("stale", "4 steps")}
    | {name: ("variant", name) for name in VARIANTS if name != "grpo"},
    {"right, by seed": "facts", "drawn, ended": "drawn", "stories": "stories"},
)

# %% [markdown]
# One row stands out, and not because of its loss. DAPO may draw prompts four times in search of
# groups that teach, so it has up to four times as many responses to learn from, and most groups
# here are idle. What it spends on drawing, the others could spend on more rollouts. RLOO, which has
# no bounds, suffers most from the later steps on a rollout. The rest differ by no more than seeds
# do. The choice of a variant is a detail here beside the presence of a group, a checker and a start
# that is partly right. In long responses, where lengths differ a thousandfold, what to divide by
# matters more.
#
# ## Same weights, other numbers
#
# The ratio of the first step should be 1, since nothing has changed yet. But large systems write
# responses with one program, made for speed, and train with another. Ours does, too: responses are
# written token by token with a cache, and scored as whole rows. The weights are the same, but sums
# are taken in another order, in other batch shapes, perhaps in another precision. How different are
# the log-probabilities? The next cell writes 512 responses with float32 and with bfloat16 weights,
# and lets the float32 model score them:

# %%
for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
    engine = copy.deepcopy(start).to(dtype)
    options = {"samples": 8, "max_new_tokens": 24, "batch_size": 64}
    responses = write_responses(engine, prompts[::11], tokenizer=tokenizer, **options)
    zeros = torch.zeros(8 * len(responses))
    rollouts = as_rollouts(prompts[::11], responses, zeros, pad_id=pad_id)
    own, mask = score_rollouts(start, rollouts), rollouts.mask
    weights = importance_weights(own, rollouts.old_log_probs, mask, most=100.0)[mask]
    difference = float((own - rollouts.old_log_probs)[mask].abs().max())
    assert difference < 1e-3 if name == "float32" else 0.01 < difference < 3.0
    size = "below a thousandth" if name == "float32" else "more than a hundredth"
    print(
        f"{name:8}: largest difference of a token {size} of a nat, {int(mask.sum()) // 1000} "
        "thousand tokens"
    )

# %% [markdown]
# In float32, only rounding is left. In bfloat16 a token's probability can be off by several
# percent, and errors add up over a response: the policy that trains is then not the one that wrote.
# That this happens in real systems, and can make a run collapse, was reported by Yao and colleagues
# {cite}`yao2025efficient`, who proposed a cure: treat the engine as what it is, another policy, and
# weigh each token by the ratio of probabilities, cut at some bound {cite}`ionides2008truncated`:
#
# $$w_{i,t} = \min\Big(\frac{\pi_{\text{trainer}}(y_{i,t} \mid \cdot)}
# {\pi_{\text{engine}}(y_{i,t} \mid \cdot)},\; w_{\max}\Big).$$


# %%
#| export
def importance_weights(
    log_probs: Float[Tensor, "batch sequence"],
    behavior: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    most: int | float = 2.0,
) -> Float[Tensor, "batch sequence"]:
    """Return how much likelier the trainer finds each token than who drew it, at most ``most``.

    The weights have no gradient, and are 1 outside of the mask. Source: Yao et al. (2025).
    """
    check_number("most", most, above=0)
    check_like(mask, log_probs=log_probs, behavior=behavior)
    change = (log_probs - behavior).where(mask, 0.0).detach()
    return change.exp().clamp(max=most)


# %% [markdown]
# `GRPO(recompute=True)` does so: the trainer computes the old log-probabilities anew, and
# multiplies each advantage by its weight. `python benchmarks/engine.py` has measured the
# differences by engine; a weight of 1 would mean that both agree:

# %%
for row in read_rows("engine"):
    if row["seed"] == "0":
        low, high = float(row["below"]), float(row["above"])
        print(f"{row['engine']:22} weights from {low:.2f} to {high:.2f}")

# %% [markdown]
# Another way out is to make the engine compute exactly what the trainer computes
# {cite}`he2025defeating`, or to write and train in the same 16 bits {cite}`qi2025defeating`. What
# must never be done is to decode the responses and encode them again. Another cut of the same text
# gives other ids, which nobody has drawn; our responses are ids from beginning to end.
#
# ## A checker that can be fooled
#
# A checker is a program, and a program checks what it was written to check. Here are two that look
# reasonable. The first rewards a reply that names a value of the right kind, and so checks the form
# but not the truth. The second looks for the right value anywhere in the reply, and does not mind
# others beside it. The column *ended* says how many drawn replies come to an end, and *right* is,
# as always, judged properly:

# %%
list_runs(
    {
        "right and ended": ("main", "grpo"),
        "names any value": ("wrong", "any value"),
        "right value among others": ("wrong", "right value among others"),
    },
    {"right, by seed": "facts", "drawn, ended": "drawn", "ended, by seed": "ended"},
)

# %% [markdown]
# Both rewards rise nearly to their maximum, and both policies are useless. The first learns to say
# *some* value in the right form, since a wrong one pays as well as a true one and is easier to
# find. The second has the truth in its replies, so that the first column looks fine. But nobody
# paid it for stopping, and it goes on until it is cut off. Neither policy did anything wrong by its
# reward. Read responses with high rewards before you believe the curve, and try replies that should
# fail on the checker before you train.
#
# ## What an outcome cannot teach
#
# So far rewards have drawn out what the model could do. Can they teach something new? Take
# questions with two steps, such as this one:

# %%
hidden = two_step_questions(world, "held_out")[0]
spoken = two_step_questions(world, "held_out", named=True)[0]
print(hidden.text)
print(f"   hidden: {hidden.reply}")
print(f"   named:  {spoken.reply}")

# %% [markdown]
# The model knows both facts that are needed, who the friend is and what is true of the friend. A
# start was tuned on the questions about six characters in each of the two forms, and then practiced
# on the tuning half, with the reward for the right value alone:

# %%
list_runs(
    {
        f"{form}, {when}": ("two steps", f"{form}, {name}")
        for form in ("hidden", "named")
        for when, name in (("before", "start"), ("after", "grpo"))
    },
    {"right, by seed": "facts"},
)
for form in ("hidden", "named"):
    _, found = curve("two steps", f"{form}, grpo", "reward")
    last = [round(100 * float(x), -1) for x in found[-1]]
    print(f"{form}: reward on the practiced half at the end, by seed: about {last} %")

# %% [markdown]
# With the middle step spoken, rewards lift the model nearly to the top, on characters that it never
# practiced on. With the step hidden they gain a little, and about six of seven replies about the
# other half stay wrong. A chain of look-ups is easy for the model as long as the result of the
# first stands in the text, where the second can read it. To do both inside of one forward pass is
# another ability, of which it has little. A reward can encourage only what already happens: few
# groups have rewards that differ, and some of those by luck, since a guess among a dozen values is
# now and then right and teaches nothing about the next question. This is the case for thinking
# aloud, and chapter 24 builds on it.
#
# ## A teacher who grades each token
#
# A reward of one bit for a whole response is little to learn from. If there is a better model, it
# can say much more: how likely it would have been to write each token. **{term}`On-policy
# distillation`** lets the student write, as in GRPO, and the teacher grade
# {cite}`agarwal2024policy,gu2024minillm,lu2025policy`. The loss is the divergence of the student
# $\pi$ from the teacher $q$ at each position of the student's own responses. It is called the
# *reverse* divergence, since what is usually minimized, when a student reads the teacher's texts,
# is $\mathrm{KL}(q \,\|\, \pi)$:
#
# $$\mathrm{KL}(\pi \,\|\, q) =
# \sum_{v} \pi(v \mid \cdot) \log \frac{\pi(v \mid \cdot)}{q(v \mid \cdot)}.$$
#
# Both models have a number for every token $v$ of the vocabulary, so the sum can be taken exactly.
# Systems with a large vocabulary often take just the token that was drawn. The gradient of the sum
# is
#
# $$\nabla\, \mathrm{KL} = \sum_v \nabla \pi(v)\, \log \frac{\pi(v)}{q(v)} + \sum_v \nabla \pi(v)
# = \mathbb{E}_{v \sim \pi}\Big[\log \frac{\pi(v)}{q(v)}\, \nabla \log \pi(v)\Big],$$
#
# since $\sum_v \nabla \pi(v) = \nabla 1 = 0$. That is the policy gradient with an advantage for
# each token, $A_t = \log q(y_t) - \log \pi(y_t)$. (At each position the prefix counts as given: how
# a token changes what is written later is left out.)

# %% [markdown] tags=["engine"]
# ### Engine room: both losses, and distillation as a run


# %% tags=["engine"]
#| export
def distillation_loss(
    student: Float[Tensor, "batch sequence vocab_size"],
    teacher: Float[Tensor, "batch sequence vocab_size"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    direction: Literal["reverse", "forward"] = "reverse",
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return the divergence, in nats, between what two models predict, from their logits.

    "reverse" is that of the student from the teacher, which forgives what the student leaves out;
    "forward" is that of the teacher from the student. The teacher gets no gradient. Source: Gu et
    al. (2024), Agarwal et al. (2024).
    """
    check_choice("direction", direction, ("reverse", "forward"))
    if student.shape != teacher.shape:
        expected = f"the student's shape, {tuple(student.shape)}"
        raise ValueError(f"teacher: expected {expected}, got {tuple(teacher.shape)}")
    own, other = student.log_softmax(-1), teacher.detach().log_softmax(-1)
    p, q = (own, other) if direction == "reverse" else (other, own)
    divergence = (p.exp() * (p - q)).sum(-1)
    return aggregate(divergence, mask, per=per)


# %% tags=["engine"]
#| export
def sampled_distillation_loss(
    log_probs: Float[Tensor, "batch sequence"],
    teacher: Float[Tensor, "batch sequence"],
    mask: Bool[Tensor, "batch sequence"],
    *,
    old_log_probs: Float[Tensor, "batch sequence"] | None = None,
    per: Per | int | float = "token",
) -> Float[Tensor, ""]:
    """Return a loss whose gradient estimates that of the reverse divergence, token by token.

    Each token was drawn by the student, and the teacher's log-probability of it, less the student's
    own, is its advantage. ``old_log_probs`` are those at the time of drawing, if they differ.
    """
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    advantages = (teacher.detach() - old).where(mask, 0.0)
    terms = clipped_terms(log_probs.where(mask, 0.0), old.where(mask, 0.0), advantages, clip=None)
    return aggregate(terms, mask, per=per)


# %% tags=["engine"]
#| export
class TeacherCredit:
    """Gives each token the teacher's log-probability less the student's, for ``RolloutBatches``.

    The teacher is the ``reference`` of the rollouts.
    """

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        if rollouts.reference_log_probs is None:
            raise ValueError("rollouts: expected the log-probabilities of a teacher, got none")
        advantages = rollouts.reference_log_probs - rollouts.old_log_probs
        return rollouts._replace(advantages=advantages.where(rollouts.mask, 0.0))


# %% tags=["engine"]
#| export
def distillation_objective(
    model: TransformerLM,
    batch: Rollouts,
    *,
    teacher: TransformerLM,
    direction: Literal["reverse", "forward"] = "reverse",
    text_weight: int | float = 1.0,
) -> tuple[Float[Tensor, ""], Tensor, dict[str, Tensor]]:
    """Return the summed divergence over the vocabulary, the number of tokens, and sums to log."""
    check_number("text_weight", text_weight, 0)
    mask, logits = batch.mask, model(batch.inputs)
    with torch.no_grad():
        opinion = teacher(batch.inputs)
    count = mask.sum()
    total = distillation_loss(logits, opinion, mask, direction=direction) * count
    sums = {"divergence": total.detach()}
    if batch.text_targets is not None:
        nats = -response_log_probs(logits, batch.text_targets)
        text_loss = masked_mean(nats, batch.text_targets != -100)
        total = total + text_weight * text_loss * count
        sums["text_loss"] = text_loss.detach() * count
    return total, count, sums


# %% tags=["engine"]
#| export
def train_distilled(
    student: TransformerLM,
    teacher: TransformerLM,
    prompts: Sequence[Prompt],
    settings: GRPO,
    *,
    tokenizer: BPETokenizer,
    exact: bool = True,
    texts: Sequence[Example] = (),
    sinks: Sequence[Sink] = (),
) -> MetricsLog:
    """Teach ``student``, in place, on its own responses what a teacher predicts there.

    ``exact`` compares the whole distributions of each next token, else only the drawn tokens count.
    Rewards play no part. The rollouts are those of ``settings``.
    """
    if teacher.config.vocab_size != student.config.vocab_size:
        expected = f"the student's vocabulary of {student.config.vocab_size}"
        raise ValueError(f"teacher: expected {expected}, got {teacher.config.vocab_size}")
    nothing = each(lambda prompt, response: 0.0)
    given: dict[str, Any] = {"reference": teacher, "texts": texts, "credit": TeacherCredit()}
    batches = group_batches(student, prompts, nothing, settings, tokenizer=tokenizer, **given)
    if exact:
        weight = settings.text_weight
        objective = partial(distillation_objective, teacher=teacher, text_weight=weight)
    else:
        variant = Variant(clip=None, per="token")
        objective = partial(grpo_objective, variant=variant, text_weight=settings.text_weight)
    config = settings.training(batches.batch_size)
    probes = [RolloutLog()]
    return Trainer(
        student, batches, config, objective=objective, probes=probes, sinks=sinks
    ).train()


# %% [markdown]
# ### One token for all
#
# On average over all tokens that could be drawn, the sampled loss has the gradient of the exact
# one:

# %%
torch.manual_seed(0)
student, teacher = torch.randn(1, 1, 6, requires_grad=True), torch.randn(1, 1, 6)
one = torch.ones(1, 1, dtype=torch.bool)
(exact,) = torch.autograd.grad(distillation_loss(student, teacher, one), student)
mean = torch.zeros_like(exact)
for v, chance in enumerate(student.detach().softmax(-1)[0, 0]):
    log_probs = student.log_softmax(-1)[..., v]
    loss = sampled_distillation_loss(log_probs, teacher.log_softmax(-1)[..., v], one)
    mean += chance * torch.autograd.grad(loss, student)[0]
torch.testing.assert_close(mean, exact)
print(f"length of the gradient: {exact.norm():.4f} exactly, {mean.norm():.4f} by drawn tokens")

# %% [markdown]
# ### A bit against a distribution
#
# The teacher here is the model "facts" of chapter 19, which was tuned on the answers about the
# whole tuning half. The student is our start, and it writes as many responses as GRPO does. The
# control is tuning the start on the teacher's answers to the same questions:

# %%
show(
    {
        "GRPO": ("main", "grpo"),
        "teacher, all tokens": ("teacher", "exact"),
        "teacher, drawn tokens": ("teacher", "sampled"),
        "tuning on its answers": ("teacher", "its answers"),
    },
    columns | {"stories": "stories"},
)

# %% [markdown]
# The teacher's grades are worth as much as rewards, without a single reward. At the same number of
# responses the exact loss does at least as well as the drawn tokens, which estimate it with noise.
# Tuning on the teacher's answers is as good here, and cheaper: there is one right answer in one
# form, so imitation has nothing to average over. What the methods do to everything else differs.
# Graded at its own responses alone, the student is free to change elsewhere, and without stories in
# the batch it loses them; the tuning run had stories in its batches. In larger models, where the
# teacher's texts are not what the student would write, learning on the student's own responses is
# reported to be worth its price {cite}`agarwal2024policy,lu2025policy`.
#
# ## Is it the real thing?
#
# `trl` has a trainer for GRPO. Its loss, called with the same log-probabilities, is ours in value
# and gradient:

# %% [markdown] tags=["engine"]
# ### Engine room: a trainer without its surroundings


# %% tags=["engine"]
# The loss of trl's GRPOTrainer needs a few attributes, and no model
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.trainer.grpo_trainer import GRPOTrainer


def loss_of_trl(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **how: Any
) -> Tensor:
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1)
    known = {"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2}
    stand_in = SimpleNamespace(
        **known | how,
        accelerator=same,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        **dict.fromkeys(("aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled"), False),
        beta=0.0,
        current_gradient_accumulation_steps=1,
        max_completion_length=24,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, 0 * log_probs, None),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids"), ids)
    inputs |= {"completion_mask": mask.long(), "old_per_token_logps": old}
    inputs |= {"advantages": advantages, "num_items_in_batch": mask.sum()}
    return GRPOTrainer._compute_loss(stand_in, None, inputs)


# %% tags=["engine"]
# What trl calls them
names_of_trl: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}
names_of_trl["gspo"] |= {"epsilon_low": 3e-4, "epsilon_high": 4e-4}

# %% [markdown]
# ### The same losses

# %%
log_probs = (-2 * torch.rand(6, 10)).requires_grad_()
old = log_probs.detach() + 0.3 * torch.randn(6, 10)
mask = torch.arange(10) < torch.tensor([[10], [3], [7], [1], [9], [5]])
row_advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.2], [0.0, 0.0, 1.0]])).flatten()
for name, how in names_of_trl.items():
    advantages = on_tokens(row_advantages, mask)
    ours = grpo_loss(log_probs, old, advantages, mask, variant=VARIANTS[name])
    theirs = loss_of_trl(log_probs, old, row_advantages, mask, **how)
    gradients = [torch.autograd.grad(loss, log_probs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*gradients)
    print(f"{name:8} {float(ours.detach()):8.4f}, and {float(theirs.detach()):8.4f} by trl")

# %% [markdown]
# ## How fast is it?
#
# A step of GRPO writes and then learns. Which takes longer? The next cell writes 128 responses, as
# a step of our run does, once together and once each prompt alone, and takes a step on them:


# %% tags=["nbval-ignore-output"]
def seconds(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


batches = group_batches(
    copy.deepcopy(start), prompts, right_and_ended(world), GRPO(), tokenizer=tokenizer
)
rollout = batches.make_rollout(0)
together, alone = (
    seconds(
        lambda size=size: write_responses(
            start, prompts[:16], tokenizer=tokenizer, samples=8, max_new_tokens=24, batch_size=size
        )
    )
    for size in (128, 8)
)


def learn() -> None:
    total, count, _ = grpo_objective(batches.policy, rollout)
    (total / count).backward()


learning = seconds(learn)
print(f"writing takes {together / learning:.1f} times as long as learning from it")
print(f"prompt by prompt, writing takes {alone / together:.1f} times as long as all at once")

# %% [markdown]
# Writing is a loop over tokens, of which each needs the one before; learning takes all at once.
# That is why large systems put so much work into their engines, and accept that these compute other
# numbers.
#
# %% [markdown]
# ## Exercises
#
# ````{exercise} Groups that teach nothing
# :label: ex-grpo-idle
# *Five minutes.* A policy answers a question right with probability `share`. Write
# `idle(share, samples)`, the probability that all `samples` of its replies get the same reward, 0
# or 1, so that the group has nothing to teach. At which share is a group of 8 most useful, and what
# does that say about the questions that a run should be given? (`informative(rewards)` says of
# each row of a tensor whether its rewards differ.)
# ````


# %% tags=["solution"]
def idle(share: float, samples: int) -> float:
    """The probability that all replies of a group are right, or all are wrong."""
    # The least is at one half: questions that are sometimes answered teach most.
    return share**samples + (1 - share) ** samples


# %% tags=["check"]
assert idle(0.5, 2) == 0.5, "at one half, two replies are the same in half of all cases"
assert idle(0.0, 8) == 1.0 and idle(1.0, 8) == 1.0, "a question that is never or always answered"
assert abs(idle(0.1, 8) - idle(0.9, 8)) < 1e-12, "right and wrong are alike"
draw = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0)) < 0.1
same = float((~informative(draw.float())).double().mean())
assert abs(idle(0.1, 8) - same) < 0.01, f"of drawn groups, {same:.2f} have equal rewards"

# %% [markdown]
# ````{exercise} Room to grow
# :label: ex-grpo-room
# *Ten minutes.* The clip stops a good token once its probability has grown by the factor
# 1 + `high` within a rollout. Write `rollouts_needed(start, goal, high)`: over how many rollouts
# must a token at least be encouraged, until its probability has risen from `start` to `goal`, if
# each takes it just to the bound? Compare a token of probability 0.01 with one of 0.5, and the
# bounds 0.2 of GRPO and 0.28 of DAPO.
# ````


# %% tags=["solution"]
def rollouts_needed(start: float, goal: float, high: float) -> int:
    """How often a probability must grow by the factor 1 + high."""
    return math.ceil(math.log(goal / start) / math.log1p(high))


# %% tags=["check"]
found = rollouts_needed(0.01, 0.9, 0.2), rollouts_needed(0.01, 0.9, 0.28)
assert found == (25, 19), f"from 0.01 to 0.9 it takes 25 rollouts, or 19, not {found}"
assert rollouts_needed(0.5, 0.9, 0.2) == 4, "0.5 becomes 0.6, 0.72, 0.86, and only then 0.9"
assert rollouts_needed(0.5, 0.5, 0.2) == 0, "who is there need not go"

# %% [markdown]
# ````{exercise} Read the divisor
# :label: ex-grpo-divisor
# *Twenty minutes.* Write `token_weights(mask, per)`, which says how much each token's own term
# counts in the loss of {py:func}`~llmbook.rlhf.aggregate`: a tensor of the shape of `mask`, 0 where
# it is false. `per` is `"token"`, `"response"`, or a number. Rows without any token are no
# responses.
# ````


# %% tags=["solution"]
def token_weights(mask: Tensor, per: str | float) -> Tensor:
    """The factor of each token's term in the loss."""
    lengths = mask.sum(dim=1, keepdim=True)
    n_responses = (lengths > 0).sum()
    if per == "token":
        weights = torch.ones_like(mask, dtype=torch.float32) / mask.sum()
    elif per == "response":
        weights = 1 / lengths.clamp(min=1) / n_responses
    else:
        weights = torch.ones_like(mask, dtype=torch.float32) / per / n_responses
    return weights.expand(mask.shape).where(mask, 0.0)


# %% tags=["check"]
mask = torch.arange(6) < torch.tensor([2, 6, 0])[:, None]
for per in ("token", "response", 6):
    terms = torch.zeros(3, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(aggregate(terms, mask, per=per), terms)
    found = token_weights(mask, per)
    assert found.shape == mask.shape, "one weight for each place"
    assert not found[~mask].any(), f"per {per}: what is masked has a weight"
    assert torch.allclose(found, expected), f"per {per}: not the factors that aggregate has"

# %% [markdown]
# ````{exercise} How many tokens are left
# :label: ex-grpo-effective
# *Fifteen minutes.* Weighted tokens are worth fewer equal ones: $(\sum w)^2 / \sum w^2$ of them,
# the effective sample size. Write `effective_share(weights, mask)`: that number of the tokens where
# `mask` is true, divided by how many these are. It is 1 for equal weights, whatever they are, and
# falls the further the engine's policy is from the trainer's.
# ````


# %% tags=["solution"]
def effective_share(weights: Tensor, mask: Tensor) -> float:
    """The effective sample size of the tokens in a mask, as a share of their number."""
    chosen = weights[mask].double()
    return float(chosen.sum() ** 2 / chosen.square().sum() / len(chosen))


# %% tags=["check"]
mask = torch.tensor([[True, True, False], [True, True, False]])
equal = torch.full((2, 3), 3.0)
assert abs(effective_share(equal, mask) - 1) < 1e-6, "equal weights lose nothing, of any size"
weights = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
assert abs(effective_share(weights, mask) - 0.25) < 1e-6, "one weight of four is one token of four"
weights = torch.tensor([[2.0, 1.0, 9.0], [1.0, 0.0, 9.0]])
assert abs(effective_share(weights, mask) - 16 / 6 / 4) < 1e-6, "2, 1, 1, 0 are worth 2.67 tokens"

# %% [markdown]
# ````{exercise} One scale for all groups
# :label: ex-grpo-batch
# *Twenty minutes.* The deviation of a group makes nearly solved and nearly hopeless questions count
# more than others. Another choice keeps the mean of each group as its baseline, and divides by one
# deviation for all groups: the unbiased one of all the centered rewards. Write
# `batch_advantages(rewards)`, of the shape (prompts, samples). If all groups have equal rewards,
# all advantages are 0.
# ````


# %% tags=["solution"]
def batch_advantages(rewards: Tensor) -> Tensor:
    """Rewards less the mean of their group, over one deviation."""
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    return centered / (centered.std() + 1e-6)


# %% tags=["check"]
rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
found = batch_advantages(rewards)
assert found.shape == rewards.shape, "one advantage for each reward"
assert not batch_advantages(torch.ones(2, 3)).any(), "equal rewards must give zeros, and no NaN"
assert found[2].abs().max() < 1e-6, "a group of equal rewards teaches nothing, whatever others do"
assert torch.allclose(found.sum(dim=1), torch.zeros(3), atol=1e-5), "each group has a baseline"
assert abs(float(found[0, 0] / found[1, 0]) - 1.5) < 1e-3, "all groups have one scale: 0.75 and 0.5"
assert abs(float(found.std()) - 1) < 1e-3, "the unbiased deviation of all advantages is not 1"


# %% [markdown]
# ## Summary
#
# A verifiable reward needs no model of what people like. A group of responses to the same prompt
# gives the baseline, so that no critic is needed: the mean of the group shortens the gradient by $1
# - 1/n$ and leaves its direction. GRPO's relatives differ in four choices, and are options of one
# loss here: whether to divide by the group's deviation, what bounds the ratio and whether it is one
# of tokens or of responses, what happens outside of the bounds, and what to divide by. Dividing
# each response by its length makes wrong responses long.
#
# In our world, a policy that was right about a third of the time became right nearly always, far
# beyond what tuning on its own right answers gave at the same budget. It did not learn two steps in
# its head from the outcome alone, but it did once the steps were spoken. A teacher who grades
# tokens is quicker than one bit for each response, if there is one.
#
# ### Checklist
#
# - Is the start sometimes right? If hardly any group has rewards that differ, choose easier prompts
#   or tune first.
# - Try best-of-n and rejection sampling before you train by rewards (chapter 21).
# - Read responses with high rewards. Test the checker with replies that should fail.
# - Log reward, length, the share that finish, entropy, clipped tokens and informative groups.
# - Divide by a constant or by all tokens, unless lengths should change.
# - Keep ids and their log-probabilities. Compare the engine's with the trainer's.
# - Compare with continued tuning at the same budget, over several seeds, on held-out prompts.
# - Mix in what must not be forgotten.
#
# ### Further reading
#
# GRPO comes from DeepSeekMath {cite}`shao2024deepseekmath`, and R1 showed what it does at scale
# {cite}`deepseek2025r1`. Dr. GRPO {cite}`liu2025understanding` and DAPO {cite}`yu2025dapo` explain
# their changes well. Yue and colleagues {cite}`yue2025does` ask whether rewards teach anything that
# the base model could not do when it may try often enough, and Cui and colleagues
# {cite}`cui2025entropy` study the collapse of entropy.
