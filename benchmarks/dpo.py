"""The table of chapter 22's runs on pairs of replies, one row for each run and seed.

All start from ``tuned("careless")``, and are measured on questions about characters and strangers
that no pair is about. A row that is there is not made again: the table is written anew after each
run, whole, and the same command goes on with the first run that is missing. With names as
arguments, only these experiments or variants. About 45 CPU minutes of one thread.
"""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from measure import RESULTS

from llmbook.dpo import PreferenceTuning, SampledPairs, balanced, prefer
from llmbook.environment import whole_file
from llmbook.instruction import (
    WORLD_CHAT,
    Message,
    Tuning,
    TuningRow,
    ask,
    measure_tuned,
    read_tuning_rows,
    story_examples,
    tune,
    tuned,
)
from llmbook.model import TransformerLM
from llmbook.rlhf import (
    Pair,
    Prompt,
    Response,
    each,
    question_prompts,
    true_reward,
    world_pairs,
)
from llmbook.tinyworld import Question, make_questions

TABLE = RESULTS / "dpo.csv"
START = tuned("careless")
WORLD, TOKENIZER = START.world, START.tokenizer
END = TOKENIZER.special_tokens["<|endoftext|>"]
STORIES = story_examples(WORLD, TOKENIZER, 2000)
N_PAIRS = 1600
#: The settings that all others are compared with.
SETTINGS = PreferenceTuning(likelihood=1.0, learning_rate=4e-4, n_steps=150)
#: Without what keeps a model from refusing everything.
BARE = replace(SETTINGS, likelihood=0.0)
#: Half of the pairs are about facts, or none.
HALF = {"fact": 2, "unknown": 1, "confidential": 1}
REFUSALS = {"unknown": 1, "confidential": 1}
Make = Callable[[int], TransformerLM]


def questions(kinds: Sequence[Any] = ("fact", "unknown", "confidential")) -> list[Question]:
    """Return the questions about the half of the world that may be tuned on."""
    return [question for kind in kinds for question in make_questions(WORLD, kind, "tuning")]


def written(seed: int, shares: Mapping[str, float] = HALF, noise: float = 0.0) -> list[Pair]:
    """Return pairs of replies that the world's judge has written itself."""
    pairs = world_pairs(WORLD, questions(), noise=noise, seed=seed)
    return balanced(pairs, shares, N_PAIRS, seed=seed)


def sampled(seed: int, least: float = -1.0) -> list[Pair]:
    """Return pairs of replies that the model has written before it was trained.

    They are the best and the worst of five replies to each question, about as many replies as
    ``online`` draws; what was chosen is worth at least so much.
    """
    asked = questions() + 6 * questions(["confidential"])
    texts = [question.text for question in asked]
    drawn = [
        ask(START.model, TOKENIZER, texts, temperature=1.0, seed=5 * seed + i) for i in range(5)
    ]
    pairs = []
    for question, *replies in zip(asked, *drawn, strict=True):
        told = {reply: true_reward(WORLD, question, reply) for reply in replies if reply}
        best, worst = (choose(told, key=told.__getitem__) for choose in (max, min))
        if told[best] > told[worst] and told[best] >= least:
            pairs.append(Pair(question, best, worst))
    return balanced(pairs, HALF, N_PAIRS, seed=seed)


def preferring(settings: PreferenceTuning, pairs: Callable[[int], Any] = written) -> Make:
    """Return what makes a model from a seed that was trained on pairs."""

    def make(seed: int) -> TransformerLM:
        model = copy.deepcopy(START.model)
        chosen = replace(settings, seed=seed)
        prefer(model, pairs(seed), chosen, tokenizer=TOKENIZER, texts=STORIES)
        return model

    return make


def reward(prompt: Prompt, response: Response) -> float:
    """Return what a reply is truly worth."""
    assert prompt.question is not None
    return true_reward(WORLD, prompt.question, response.text)


def online(settings: PreferenceTuning) -> Make:
    """Return what makes a model from a seed that has written its pairs all along."""
    facts, *others = (questions([kind]) for kind in HALF)
    mixed = list(facts)
    for i in range(len(facts)):  # as many others, in turns
        own = others[i % 2]
        mixed.append(own[i // 2 % len(own)])

    def make(seed: int) -> TransformerLM:
        model = copy.deepcopy(START.model)
        batches = SampledPairs(
            model,
            question_prompts(TOKENIZER, mixed),
            each(reward),
            START.model,
            TOKENIZER,
            texts=STORIES,
            n_texts=settings.n_texts,
            seed=seed,
        )
        prefer(model, batches, replace(settings, seed=seed), tokenizer=TOKENIZER)
        return model

    return make


def imitating(n_steps: int = 150, pairs: Callable[[int], list[Pair]] = written) -> Make:
    """Return what makes a model from a seed that was tuned on the chosen replies alone."""

    def make(seed: int) -> TransformerLM:
        model = copy.deepcopy(START.model)
        said = [(Message("user", p.question.text), p.chosen) for p in pairs(seed)]
        talks = [[user, Message("assistant", reply)] for user, reply in said]
        examples = [WORLD_CHAT.encode(TOKENIZER, talk) for talk in talks]
        settings = Tuning(
            n_steps=n_steps,
            batch_size=SETTINGS.batch_size + SETTINGS.n_texts,
            story_share=SETTINGS.n_texts / (SETTINGS.batch_size + SETTINGS.n_texts),
            learning_rate=SETTINGS.learning_rate,
            seed=seed,
        )
        tune(model, examples, settings, END, stories=STORIES)
        return model

    return make


def runs() -> Iterator[tuple[str, str, Make]]:
    """Yield experiment, variant, and what makes its model from a seed, what matters most first."""
    refusals: Any = partial(written, shares=REFUSALS)
    yield "start", "careless", lambda _: START.model
    yield "refusals", "pairs of refusals only", preferring(BARE, refusals)
    yield "refusals", "half of the pairs about facts", preferring(BARE)
    yield "refusals", "half, and likelihood", preferring(SETTINGS)
    yield "control", "tuning on the chosen", imitating()
    yield "online", "sampled all along", online(SETTINGS)
    yield "online", "sampled once", preferring(SETTINGS, sampled)
    right: Any = partial(sampled, least=1.0)
    yield "online", "sampled once, chosen right", preferring(SETTINGS, right)
    yield "control", "tuning on what was sampled right", imitating(pairs=right)
    yield "refusals", "likelihood", preferring(SETTINGS, refusals)
    yield "refusals", "beta 0.5", preferring(replace(BARE, beta=0.5), refusals)
    yield "refusals", "40 steps", preferring(replace(BARE, n_steps=40), refusals)
    per_token: Any = {"ipo": {"beta": 0.5}, "simpo": {"beta": 2.0, "margin": 0.5}, "orpo": {}}
    for loss in ("orpo", "ipo", "kto", "simpo", "hinge", "apo_zero"):
        yield "loss", loss, preferring(replace(SETTINGS, loss=loss, **per_token.get(loss, {})))
    noisy: Any = partial(written, noise=0.2)
    gentle = replace(BARE, learning_rate=1e-4)
    for loss, noise in (("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2)):
        name = f"{loss}, {noise:.0%} expected"
        yield "noise", name, preferring(replace(gentle, loss=loss, label_smoothing=noise), noisy)
    yield "control", "tuning on the chosen, 300 steps", imitating(300)
    yield "rate", "1e-4, half, no likelihood", preferring(gentle)


def main(names: Sequence[str]) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    for seed, experiment, variant, make in [(seed, *job) for job in runs() for seed in (0, 1, 2)]:
        if names and not {experiment, variant} & set(names):
            continue
        if experiment == "start" and seed:
            continue
        if (experiment, variant, seed) in known_rows():
            continue
        numbers = measure_tuned(make(seed), TOKENIZER, WORLD)
        rows = known_rows()  # another process may have added some
        rows[experiment, variant, seed] = row = TuningRow(experiment, variant, seed, **numbers)
        with whole_file(TABLE) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([TuningRow._fields, *sorted(rows.values())])
        print(row, flush=True)


def known_rows() -> dict[Any, TuningRow]:
    """Return the rows that are there, by experiment, variant and seed."""
    return {row[:3]: row for row in read_tuning_rows(TABLE)} if TABLE.exists() else {}


if __name__ == "__main__":
    main(sys.argv[1:])
