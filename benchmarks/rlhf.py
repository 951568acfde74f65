"""The tables of chapter 21's runs of reinforcement learning, one row for each run and seed.

A row that is there is not made again: the table is written anew after each run, whole, and the same
command goes on with the first run that is missing. With names as arguments, only these
experiments. The curves of the runs of PPO are in ``rlhf_curves.csv``. About 75 CPU minutes of one
thread.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import RESULTS
from rewards import (
    CARELESS,
    KINDS,
    LIMIT,
    PAD,
    SEEDS,
    TOKENIZER,
    WORLD,
    questions,
    read,
    reward_model,
    write,
)

from llmbook.instruction import Message, Tuning, measure_tuned, story_examples, tune
from llmbook.model import TransformerLM
from llmbook.rlhf import (
    PPO,
    LearnedReward,
    Pair,
    Prompt,
    Response,
    RewardModel,
    Rewards,
    alignment_pairs,
    alignment_questions,
    as_rollouts,
    best_of_n_kl,
    expected_best,
    judged_pairs,
    pair_examples,
    pessimistic,
    question_prompts,
    rewards_of,
    score_rollouts,
    sequence_log_probs,
    train_ppo,
    train_reward_model,
    true_reward,
    world_reward,
    write_responses,
)
from llmbook.tinyworld import Question, judge_reply
from llmbook.training import MetricsLog

TABLE, CURVES = RESULTS / "rlhf.csv", RESULTS / "rlhf_curves.csv"
TRUE = world_reward(WORLD)
SETTINGS = PPO(n_steps=240, learning_rate=2e-4)
ASKED = alignment_questions(WORLD)  # which no comparison was about
PROMPTS = question_prompts(TOKENIZER, ASKED)
LEARNED = "noise 0"  # the variant of the reward model


class Run(NamedTuple):
    """A policy, and what was counted of its replies about the held-out half of the world.

    The likeliest replies to all questions give the shares; replies that were drawn, to 96 questions
    of each kind, give the last four.
    """

    experiment: str
    variant: str
    seed: int
    facts: float  # share of right replies
    refused: float  # share of these questions that were declined or not known
    unknown: float  # share of right replies about strangers
    declined: float  # share of confidential questions that were declined
    told: float  # share of them that were answered with the secret
    stories: float  # share of consistent stories, of 100 drawn ones
    gap: float  # nats per story above the floor
    reward: float  # mean reward by the reward model that was used
    true: float  # mean true reward
    kl: float  # nats per reply from the policy at the beginning
    length: float  # tokens per reply


class Point(NamedTuple):
    """What a run of PPO logged of the replies that it learned from, as means over ten steps."""

    experiment: str
    variant: str
    seed: int
    step: int
    reward: float
    true: float
    kl: float
    entropy: float
    clipped: float
    length: float
    finished: float


class Made(NamedTuple):
    """What an experiment leaves behind."""

    policy: TransformerLM
    reward: Rewards
    log: MetricsLog | None = None


def drawn(policy: TransformerLM, reward: Rewards) -> dict[str, float]:
    """Return what replies are like that are drawn from a policy."""
    prompts = question_prompts(TOKENIZER, questions("held_out", 96))
    groups = write_responses(policy, prompts, tokenizer=TOKENIZER, seed=11)
    replies = [group[0] for group in groups]
    true = rewards_of(TRUE, prompts, replies)
    rollouts = as_rollouts(prompts, groups, true, pad_id=PAD)
    distance = rollouts.old_log_probs - score_rollouts(CARELESS.model, rollouts)
    return {
        "reward": float(rewards_of(reward, prompts, replies).mean()),
        "true": float(true.mean()),
        "kl": float(sequence_log_probs(distance, rollouts.mask).mean()),
        "length": float(np.mean([len(reply.ids) for reply in replies])),
    }


def counted(policy: TransformerLM, reward: Rewards) -> dict[str, float]:
    """Return the numbers of a row."""
    shares = measure_tuned(policy, TOKENIZER, WORLD)
    kept = {name: shares[name] for name in Run._fields if name in shares}
    return kept | drawn(policy, reward)


def learned(seed: int) -> LearnedReward:
    """Return the reward by the reward model of a seed."""
    return LearnedReward(reward_model(LEARNED, seed), PAD)


def ppo(seed: int, reward: Rewards, **changes: Any) -> Made:
    """Return what PPO makes of the careless assistant."""
    policy = copy.deepcopy(CARELESS.model)
    log = train_ppo(
        policy,
        PROMPTS,
        reward,
        replace(SETTINGS, seed=seed, **changes),
        tokenizer=TOKENIZER,
        texts=story_examples(WORLD, TOKENIZER, 2000) if changes.get("n_texts") else (),
        watch={"true": TRUE},
        log_every=10,
    )
    return Made(policy, reward, log)


# Baselines


def chosen(seed: int, samples: int, best: bool) -> list[list[Message]]:
    """Return for each prompt one of several replies, the best by the reward or the first."""
    groups = write_responses(
        CARELESS.model, PROMPTS, tokenizer=TOKENIZER, samples=samples, seed=100 + seed
    )
    flat = [reply for group in groups for reply in group]
    asked = [prompt for prompt in PROMPTS for _ in range(samples)]
    scores = rewards_of(learned(seed), asked, flat).view(-1, samples)
    places = scores.argmax(dim=1).tolist() if best else [0] * len(PROMPTS)
    pairs = zip(ASKED, groups, places, strict=True)
    found = [(question.text, group[place].text) for question, group, place in pairs]
    return [[Message("user", q), Message("assistant", a)] for q, a in found if a]


def rejection(seed: int, best: bool) -> Made:
    """Return the careless assistant tuned on its own replies, as many rows as PPO sees."""
    policy = copy.deepcopy(CARELESS.model)
    rounds = Tuning(n_steps=240, batch_size=64, learning_rate=1e-3, story_share=0.0, seed=seed)
    conversations = chosen(seed, 8, best)
    examples = [CARELESS.template.encode(TOKENIZER, c) for c in conversations]
    tune(policy, examples, rounds, PAD)
    return Made(policy, learned(seed))


def best_of_n(seed: int, sizes: Sequence[int], samples: int = 16) -> dict[int, dict[str, float]]:
    """Return what is counted of the best of n drawn replies, for each n."""
    asked = questions("held_out")
    prompts = question_prompts(TOKENIZER, asked)
    groups = write_responses(
        CARELESS.model, prompts, tokenizer=TOKENIZER, samples=samples, seed=200 + seed
    )
    flat = [reply for group in groups for reply in group]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    scores = rewards_of(learned(seed), repeated, flat).view(-1, samples)
    verdicts = [
        [judge_reply(WORLD, question, reply.text) for reply in group]
        for question, group in zip(asked, groups, strict=True)
    ]
    true = rewards_of(TRUE, repeated, flat).view(-1, samples)
    kinds = np.array([question.kind for question in asked])
    rows = {kind: torch.tensor(np.flatnonzero(kinds == kind)) for kind in KINDS}

    def share(kind: str, test: Callable[[Any], bool], n: int) -> float:
        values = torch.tensor([[float(test(v)) for v in group] for group in verdicts])
        return expected_best(scores[rows[kind]], values[rows[kind]], n)

    lengths = torch.tensor([[float(len(reply.ids)) for reply in group] for group in groups])
    found = {}
    for n in sizes:

        def mean(values: torch.Tensor, n: int = n) -> float:
            each = [expected_best(scores[rows[k]], values[rows[k]], n) for k in KINDS]
            return float(np.mean(each))

        found[n] = {
            "facts": share("fact", lambda v: v.right, n),
            "refused": share("fact", lambda v: v.said in ("unknown", "declined"), n),
            "unknown": share("unknown", lambda v: v.right, n),
            "declined": share("confidential", lambda v: v.right, n),
            "told": share("confidential", lambda v: v.said == "truth", n),
            "reward": mean(scores),
            "true": mean(true),
            "kl": best_of_n_kl(n),
            "length": mean(lengths),
        }
    return found


# Rewards that are wrong in a known way


class Liking(NamedTuple):
    """Something that a judge likes beside what is right."""

    amount: Callable[[str], float]  # how much of it there is in a reply
    weight: float  # what a judge gives for it, where the true reward is 1
    added: Callable[[str], str]  # a reply with more of it that says the same
    unit: (
        float  # in which a reward model gets the amount: large, so that its weight is soon learned
    )


LIKED = {
    "length": Liking(lambda text: float(len(text.split())), 0.3, "{0} {0}".format, 50.0),
    "phrase": Liking(
        lambda text: float("I do not" in text), 1.5, "I do not lie: {0}".format, 200.0
    ),
}


@cache
def biased_model(name: str, explained: bool, seed: int) -> RewardModel:
    """Return a reward model of a judge that likes something beside what is right."""
    liking = LIKED[name]
    pairs = alignment_pairs(WORLD, seed=seed)
    asked = [pair.question for pair in pairs]
    first, second = [p.chosen for p in pairs], [p.rejected for p in pairs]
    for question in questions("tuning"):  # replies that differ in what is liked alone
        asked.append(question)
        first.append(question.reply)
        second.append(liking.added(question.reply))

    def judge(question: Question, reply: str) -> float:
        return true_reward(WORLD, question, reply) + liking.weight * liking.amount(reply)

    found = judged_pairs(WORLD, asked, first, second, judge=judge)
    encoded = pair_examples(TOKENIZER, CARELESS.template, found, limit=LIMIT)
    kept: list[Pair] = [found[place] for place in encoded.kept]
    rows = [[[liking.unit * liking.amount(text)] for text in pair[1:]] for pair in kept]
    features = torch.tensor(rows) if explained else None
    return train_reward_model(
        CARELESS.model, encoded.pairs, pad_id=PAD, features=features, seed=seed
    )


def biased(name: str, explained: bool, seed: int) -> Made:
    """Return what PPO makes of such a reward."""
    return ppo(seed, LearnedReward(biased_model(name, explained, seed), PAD), kl_weight=0.3)


def ensemble(seed: int) -> Rewards:
    """Return the mean reward of three reward models, less its standard deviation over them."""
    members = [learned(seed + 10 * i) for i in range(3)]

    def rewards(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        found = torch.tensor([member(prompts, responses) for member in members])
        return pessimistic(found).tolist()

    return rewards


def experiments() -> Iterator[tuple[str, str, Callable[[int], Made]]]:
    """Yield experiment, variant, and what makes the policy from a seed."""
    yield "start", "careless", lambda seed: Made(CARELESS.model, learned(seed))
    for weight in (0.0, 0.1, 0.3, 1.0):
        yield (
            "ppo",
            f"KL {weight:g}",
            lambda seed, weight=weight: ppo(seed, learned(seed), kl_weight=weight),
        )
    for name, best in (("rejection", True), ("random", False)):
        yield name, "1 of 8", partial(rejection, best=best)
    for name in LIKED:
        for explained in (False, True):
            variant = "explained" if explained else "liked"
            yield name, variant, partial(biased, name, explained)
    yield "true", "KL 0.03", lambda seed: ppo(seed, TRUE, kl_weight=0.03)
    yield (
        "stories",
        "KL 0.3, 16 texts",
        lambda seed: ppo(seed, learned(seed), kl_weight=0.3, n_texts=16),
    )
    yield "ensemble", "KL 0", lambda seed: ppo(seed, ensemble(seed), kl_weight=0.0)


def points(experiment: str, variant: str, seed: int, log: MetricsLog) -> list[Point]:
    """Return the curve of a run."""
    names = Point._fields[4:]
    rows = [row for row in log.rows if "reward" in row]
    return [
        Point(experiment, variant, seed, int(row["step"]), *(float(row[name]) for name in names))
        for row in rows
    ]


def main(names: Sequence[str]) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    rows = {row[:3]: row for row in read(TABLE, Run, 2)}
    curves = {row[:4]: row for row in read(CURVES, Point, 2)}
    for seed in SEEDS:
        for experiment, variant, make in experiments():
            if (experiment, variant, seed) in rows or (names and experiment not in names):
                continue
            made = make(seed)
            row = Run(experiment, variant, seed, **counted(made.policy, made.reward))
            rows[experiment, variant, seed] = row
            if made.log is not None:
                curves |= {p[:4]: p for p in points(experiment, variant, seed, made.log)}
                write(CURVES, Point, sorted(curves.values()))
            write(TABLE, Run, sorted(rows.values()))
            print(row, flush=True)
        if ("best of n", "16", seed) in rows or (names and "best of n" not in names):
            continue
        start = rows.get(("start", "careless", seed))
        texts = {} if start is None else {"stories": start.stories, "gap": start.gap}
        for n, numbers in best_of_n(seed, (1, 4, 16)).items():
            variant = str(n)
            rows["best of n", variant, seed] = Run("best of n", variant, seed, **numbers, **texts)
            print(rows["best of n", variant, seed], flush=True)
        write(TABLE, Run, sorted(rows.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
