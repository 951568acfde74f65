"""The tables of chapter 23's runs with rewards that can be checked, one row for each run and seed.

A row that is there is not made again: the table is written anew after each run, whole, and the same
command goes on with the first run that is missing. With names as arguments, only these experiments
(and seeds, where an argument is a number). What the runs logged is in ``grpo_curves.csv``. A run
takes 20 to 60 CPU seconds of one thread.
"""

from __future__ import annotations

import copy
import csv
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import RESULTS

from llmbook.environment import whole_file
from llmbook.grpo import (
    GRPO,
    VARIANTS,
    partly_right,
    right_and_ended,
    train_distilled,
    train_grpo,
    two_step_questions,
)
from llmbook.instruction import (
    TUNINGS,
    Message,
    Tuning,
    ask,
    consistent_stories,
    gap_to_floor,
    story_examples,
    tune,
    tuned,
)
from llmbook.model import TransformerLM
from llmbook.rlhf import Prompt, Response, Rewards, each, question_prompts, write_responses
from llmbook.tinyworld import VALUES, Question, judge_reply, make_questions
from llmbook.training import MetricsLog, pretrained

TABLE, CURVES = RESULTS / "grpo.csv", RESULTS / "grpo_curves.csv"
SEEDS = (0, 1, 2)
TEACHER = tuned("facts")  # which has seen the answers about the whole tuning half
WORLD, TOKENIZER, TEMPLATE = TEACHER.world, TEACHER.tokenizer, TEACHER.template
END = TOKENIZER.special_tokens["<|endoftext|>"]
STORIES = story_examples(WORLD, TOKENIZER, 2000)
ASKED = make_questions(WORLD, "fact", "tuning")
HELD_OUT = make_questions(WORLD, "fact", "held_out")
RIGHT = right_and_ended(WORLD)
SETTINGS = GRPO()
ONE = Tuning(n_characters=1)


class Run(NamedTuple):
    """A policy, and what was counted of its replies to questions about the held-out half."""

    experiment: str
    variant: str
    seed: int
    facts: float  # share of right replies among the likeliest ones to all questions
    drawn: float  # share of replies, drawn at temperature 1, that are right and have ended
    any: float  # share of questions to which at least one of 8 drawn replies is so
    ended: float  # share of drawn replies that have ended within 24 tokens
    length: float  # tokens of a drawn reply
    stories: float  # share of consistent stories, of 50 drawn ones
    gap: float  # nats per story above the floor


class Point(NamedTuple):
    """What a run logged, as means over ten steps."""

    experiment: str
    variant: str
    seed: int
    step: int
    reward: float
    true: float  # share of responses that were right and had ended
    entropy: float  # nats per token
    clipped: float
    change: float
    length: float
    finished: float
    informative: float


class Made(NamedTuple):
    """What an experiment leaves behind, and the questions that it is about."""

    policy: TransformerLM
    log: MetricsLog | None = None
    questions: Sequence[Question] = HELD_OUT


# What is counted


def counted(policy: TransformerLM, questions: Sequence[Question]) -> dict[str, float]:
    """Return the numbers of a row, with drawn replies to every seventh question."""
    texts = [question.text for question in questions]
    replies = ask(policy, TOKENIZER, texts, template=TEMPLATE)
    said = zip(questions, replies, strict=True)
    facts = [judge_reply(WORLD, question, reply).right for question, reply in said]
    prompts = question_prompts(TOKENIZER, questions[::7])
    groups = write_responses(
        policy, prompts, tokenizer=TOKENIZER, samples=8, max_new_tokens=24, seed=11, batch_size=128
    )
    flat = [response for group in groups for response in group]
    right = np.array(RIGHT([prompt for prompt in prompts for _ in range(8)], flat)).reshape(-1, 8)
    numbers = {
        "facts": float(np.mean(facts)),
        "drawn": float(right.mean()),
        "any": float(right.any(axis=1).mean()),
        "ended": float(np.mean([response.finished for response in flat])),
        "length": float(np.mean([len(response.ids) for response in flat])),
        "stories": float(np.mean(consistent_stories(policy, TOKENIZER, WORLD, 50))),
        "gap": gap_to_floor(policy, TOKENIZER, WORLD, 100),
    }
    return {name: round(value, 4) for name, value in numbers.items()}


# The runs


def tuned_on(conversations: Sequence[Sequence[Message]], settings: Tuning) -> TransformerLM:
    """Return a copy of the base, tuned on conversations."""
    model = copy.deepcopy(pretrained("tinyworld").model)
    examples = [TEMPLATE.encode(TOKENIZER, one) for one in conversations]
    tune(model, examples, settings, END, stories=STORIES)
    return model


def grpo(
    seed: int,
    reward: Rewards = RIGHT,
    asked: Sequence[Question] = ASKED,
    held_out: Sequence[Question] = HELD_OUT,
    **changes: Any,
) -> Made:
    """Return what a run with rewards makes of the start."""
    policy = copy.deepcopy(partly_right(seed))
    settings = replace(SETTINGS, seed=seed, **changes)
    log = train_grpo(
        policy,
        question_prompts(TOKENIZER, asked),
        reward,
        settings,
        tokenizer=TOKENIZER,
        texts=STORIES if settings.n_texts else (),
        watch={"true": RIGHT},
    )
    return Made(policy, log, held_out)


def imitated(seed: int, pairs: Sequence[Sequence[Message]], n_steps: int = 400) -> Made:
    """Return the start tuned on conversations: 32 x 400 rows, as many as GRPO draws responses."""
    policy = copy.deepcopy(partly_right(seed))
    settings = Tuning(n_steps=n_steps, learning_rate=1e-3, seed=seed)
    examples = [TEMPLATE.encode(TOKENIZER, pair) for pair in pairs]
    tune(policy, examples, settings, END, stories=STORIES)
    return Made(policy)


def known() -> list[list[Message]]:
    """Return the answers about one character that the start has seen."""
    return ONE.conversations(WORLD)


def own_replies(seed: int, judged: bool) -> list[list[Message]]:
    """Return the start's own replies, as many as GRPO draws, the right ones or each first one."""
    n_prompts = SETTINGS.n_steps * SETTINGS.n_prompts
    prompts = question_prompts(TOKENIZER, ASKED)
    samples = max(1, round(n_prompts * SETTINGS.samples / len(prompts)))
    groups = write_responses(
        partly_right(seed),
        prompts,
        tokenizer=TOKENIZER,
        samples=samples,
        max_new_tokens=SETTINGS.max_new_tokens,
        seed=100 + seed,
        batch_size=128,
    )
    kept: dict[tuple[str, str], None] = {}
    for question, prompt, group in zip(ASKED, prompts, groups, strict=True):
        rewards = RIGHT([prompt] * len(group), group) if judged else [1.0, *[0.0] * samples]
        for response, reward in zip(group, rewards, strict=False):
            if reward and response.text:
                kept[question.text, response.text] = None
    return [[Message("user", q), Message("assistant", a)] for q, a in kept]


# Rewards that are wrong, and questions with two steps


def names_any_value(prompt: Prompt, response: Response) -> float:
    """Return 1 if a reply names a value of the right kind, no matter which, and has ended."""
    question: Any = prompt.question
    values = set(VALUES[question.attribute] or WORLD.cast.facts) - {question.character}
    return float(response.finished and bool(values & set(re.findall(r"\w+", response.text))))


def names_the_value(prompt: Prompt, response: Response) -> float:
    """Return 1 if the right value stands in a reply, whatever stands beside it."""
    question: Any = prompt.question
    true = WORLD.cast.facts[question.character][question.attribute]
    return float(true in re.findall(r"\w+", response.text))


@cache
def two_step_start(seed: int, named: bool) -> TransformerLM:
    """Return a model that has seen answers to questions of one and of two steps about six."""
    questions = two_step_questions(WORLD, "tuning", named=named)
    n = 6 * len(questions) // len(tuple(WORLD.cast.facts)[::2])
    pairs = [[Message("user", q.text), Message("assistant", q.reply)] for q in questions[:n]]
    settings = replace(TUNINGS["few"], seed=seed)
    return tuned_on([*settings.conversations(WORLD), *pairs], settings)


def two_steps(seed: int, named: bool, trained: bool) -> Made:
    """Return what rewards for the last step alone make of questions with two."""
    policy = copy.deepcopy(two_step_start(seed, named))
    held_out = two_step_questions(WORLD, "held_out", named=named)
    if not trained:
        return Made(policy, None, held_out)
    asked = two_step_questions(WORLD, "tuning", named=named)
    prompts = question_prompts(TOKENIZER, asked)
    settings = replace(SETTINGS, seed=seed, max_new_tokens=32)
    log = train_grpo(policy, prompts, RIGHT, settings, tokenizer=TOKENIZER, watch={"true": RIGHT})
    return Made(policy, log, held_out)


# A teacher


def distilled(seed: int, exact: bool) -> Made:
    """Return the start, taught on its own responses, as many as GRPO draws."""
    policy = copy.deepcopy(partly_right(seed))
    settings = replace(SETTINGS, seed=seed)
    prompts = question_prompts(TOKENIZER, ASKED)
    log = train_distilled(
        policy, TEACHER.model, prompts, settings, tokenizer=TOKENIZER, exact=exact
    )
    return Made(policy, log)


def teacher_answers(seed: int) -> Made:
    """Return the start tuned on the teacher's answers to the same questions."""
    replies = ask(TEACHER.model, TOKENIZER, [q.text for q in ASKED], template=TEMPLATE)
    pairs = zip(ASKED, replies, strict=True)
    return imitated(seed, [[Message("user", q.text), Message("assistant", a)] for q, a in pairs])


def experiments() -> Iterator[tuple[str, str, Callable[[int], Made]]]:
    """Yield experiment, variant, and what makes the policy from a seed."""
    yield "main", "start", lambda seed: Made(partly_right(seed))
    yield "main", "grpo", grpo
    yield "main", "continued tuning", lambda seed: imitated(seed, known())
    yield (
        "main",
        "rejection sampling",
        lambda seed: imitated(seed, [*known(), *own_replies(seed, True)]),
    )
    yield "wrong", "any value", partial(grpo, reward=each(names_any_value))
    yield "teacher", "exact", partial(distilled, exact=True)
    for named in (False, True):
        for trained in (False, True):
            words = ("named" if named else "hidden", "grpo" if trained else "start")
            yield "two steps", ", ".join(words), partial(two_steps, named=named, trained=trained)
    for n in (4, 8, 16):
        yield "stale", f"{n} steps", partial(grpo, epochs=n)
    yield "teacher", "sampled", partial(distilled, exact=False)
    yield "teacher", "its answers", teacher_answers
    yield (
        "control",
        "own answers, unjudged",
        lambda seed: imitated(seed, [*known(), *own_replies(seed, False)]),
    )
    yield "entropy", "weight 0.02", partial(grpo, entropy_weight=0.02)
    yield "penalty", "KL 0.05", partial(grpo, kl_weight=0.05)
    for name in VARIANTS:
        if name != "grpo":
            yield "variant", name, partial(grpo, variant=VARIANTS[name])
    yield "wrong", "right value among others", partial(grpo, reward=each(names_the_value))
    yield "stories", "32 of each batch", partial(grpo, n_texts=32)


# The tables


def points(experiment: str, variant: str, seed: int, log: MetricsLog) -> list[Point]:
    """Return the curve of a run, as means over ten steps."""
    names = Point._fields[4:]
    return [
        Point(
            *(experiment, variant, seed, int(row["step"])),
            *(round(float(row.get(name, 0.0)), 4) for name in names),
        )
        for row in log.rows
        if "reward" in row
    ]


def read(path: Path, kind: type[Any], n_texts: int) -> list[Any]:
    """Return the rows of a table, if it is there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    whole = n_texts + kind._fields[n_texts:].index("seed") + 1
    whole += "step" in kind._fields
    return [
        kind(*row[:n_texts], *map(int, row[n_texts:whole]), *map(float, row[whole:]))
        for row in rows
    ]


def write(path: Path, kind: type[Any], rows: Sequence[Any]) -> None:
    """Write a table whole."""
    with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([kind._fields, *rows])


def main(arguments: Sequence[str]) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    seeds = [int(one) for one in arguments if one.isdigit()] or list(SEEDS)
    names = [one for one in arguments if not one.isdigit()]
    plan = [(seed, *job) for job in experiments() for seed in seeds]
    for seed, experiment, variant, make in plan:
        done = {row[:3] for row in read(TABLE, Run, 2)}
        if (experiment, variant, seed) in done or (names and experiment not in names):
            continue
        made = make(seed)
        row = Run(experiment, variant, seed, **counted(made.policy, made.questions))
        if made.log is not None:
            curves = {point[:4]: point for point in read(CURVES, Point, 2)}
            curves |= {p[:4]: p for p in points(experiment, variant, seed, made.log)}
            write(CURVES, Point, sorted(curves.values()))
        write(TABLE, Run, sorted([*read(TABLE, Run, 2), row]))
        print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
