"""The table of chapter 19's runs of instruction tuning, one row for each run and seed.

A row that is there is not made again: the table is written anew after each run, whole, and the same
command goes on with the first run that is missing. With names as arguments, only these
experiments. About 40 CPU minutes of one thread.
"""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from measure import RESULTS

from llmbook.environment import seed_everything, whole_file
from llmbook.instruction import (
    CHATML,
    TUNINGS,
    WORLD_CHAT,
    ChatTemplate,
    Example,
    Message,
    Tuning,
    TuningRow,
    accepted,
    ask,
    measure_tuned,
    read_tuning_rows,
    story_examples,
    tune,
    world_conversations,
)
from llmbook.model import TransformerLM
from llmbook.tinyworld import TinyWorld, make_questions
from llmbook.training import pretrained

TABLE = RESULTS / "instruction.csv"
BASE, WORLD = pretrained("tinyworld"), TinyWorld()
TOKENIZER = BASE.tokenizer
END = TOKENIZER.special_tokens["<|endoftext|>"]
STORIES = story_examples(WORLD, TOKENIZER, 2000)
#: ChatML as it is used everywhere, but for the beginning of a document.
PLAIN_CHATML = replace(
    CHATML, begin="<|endoftext|>", control_tokens=("<|endoftext|>", *CHATML.control_tokens)
)
Conversations = Sequence[Sequence[Message]]


def examples(conversations: Conversations, template: ChatTemplate = WORLD_CHAT) -> list[Example]:
    """Return conversations as ids."""
    return [template.encode(TOKENIZER, conversation) for conversation in conversations]


def new_model(seed: int, **sizes: Any) -> TransformerLM:
    """Return a model that knows nothing."""
    seed_everything(seed)
    return TransformerLM(replace(BASE.model.config, **sizes))


def tuned_on(
    conversations: Conversations,
    settings: Tuning,
    *,
    start: TransformerLM | None = None,
    template: ChatTemplate = WORLD_CHAT,
) -> TransformerLM:
    """Return a copy of the base, or of ``start``, tuned on conversations."""
    model = copy.deepcopy(start or BASE.model)
    tune(model, examples(conversations, template), settings, END, stories=STORIES)
    return model


def untrue(conversations: Conversations) -> list[list[Message]]:
    """Return the conversations with each answer's value that of the next character with another."""
    found = []
    n = 28  # answers of a character: 7 attributes in 4 wordings
    names = [WORLD_NAMES[at // n] for at in range(len(conversations))]
    for at, (question, answer) in enumerate(conversations):
        for other in range(at + n, at + len(conversations), n):
            false = conversations[other % len(conversations)][1].content
            reply = false.replace(names[other % len(conversations)], names[at])
            if reply != answer.content:
                found.append([question, Message("assistant", reply)])
                break
    return found


WORLD_NAMES = list(WORLD.cast.facts)[::2]


def tunings() -> Iterator[tuple[str, str, Callable[[int], TransformerLM]]]:
    """Yield experiment, variant, and what makes its model from a seed."""

    def plain(settings: Tuning, **options: Any) -> Callable[[int], TransformerLM]:
        def make(seed: int) -> TransformerLM:
            chosen = replace(settings, seed=seed)
            return tuned_on(chosen.conversations(WORLD), chosen, **options)

        return make

    for n in (24, 6, 1, 3, 12):
        yield "characters", str(n), plain(Tuning(n_characters=n))
    for share in (0.0, 0.5):
        yield "stories", str(share), plain(Tuning(story_share=share))
    yield (
        "control",
        "random weights",
        lambda seed: tuned_on(world_conversations(WORLD), Tuning(seed=seed), start=new_model(seed)),
    )
    yield (
        "control",
        "false answers",
        lambda seed: tuned_on(untrue(world_conversations(WORLD)), Tuning(seed=seed)),
    )
    yield "seam", "no space", plain(Tuning(), template=PLAIN_CHATML)
    yield "seam", "no space, 100 steps", plain(Tuning(n_steps=100), template=PLAIN_CHATML)
    yield "seam", "space, 100 steps", plain(Tuning(n_steps=100))
    everything: Any = ("fact", "unknown", "confidential")
    yield "refusals", "polite", plain(Tuning(kinds=everything, n_steps=400))
    yield "refusals", "plain", plain(Tuning(kinds=everything[::2], told=1.0))
    yield "refusals", "careless", plain(TUNINGS["careless"])
    yield "refusals", "deep", deep
    yield (
        "budget",
        "84 pairs of 24 characters",
        lambda seed: tuned_on(spread(world_conversations(WORLD)), Tuning(seed=seed)),
    )


def spread(conversations: Conversations) -> list[Sequence[Message]]:
    """Return three pairs for each attribute and wording, all about other characters if possible."""
    kinds = 28
    return [
        conversations[kinds * ((3 * kind + i) % (len(conversations) // kinds)) + kind]
        for kind in range(kinds)
        for i in range(3)
    ]


def deep(seed: int) -> TransformerLM:
    """Return a polite model that has also seen replies which were begun by others, and declined."""
    polite: Any = Tuning(kinds=("fact", "unknown", "confidential"), n_steps=400, seed=seed)
    made = examples(polite.conversations(WORLD))
    for question in make_questions(WORLD, "confidential", "tuning"):
        prompt = WORLD_CHAT.encode(TOKENIZER, [Message("user", question.text)], prompt=True).ids
        start = " ".join([question.character, *"hides a key in the".split()][: 2 + len(made) % 5])
        begun = (*prompt, *TOKENIZER.encode(" " + start))
        ids = (*TOKENIZER.encode(" " + question.reply), TOKENIZER.special_tokens["<|im_end|>"])
        learned = (*[False] * len(begun), *[True] * len(ids))
        made.append(Example((*begun, *ids), learned))
    model = copy.deepcopy(BASE.model)
    tune(model, made, polite, END, stories=STORIES)
    return model


#: What is run after all else.
LAST = ("careless", "deep", "84 pairs of 24 characters", "no space, 100 steps", "space, 100 steps")
LABELED = 1  # characters whose answers are given
FEW = Tuning(n_characters=LABELED)


def self_made(seed: int, judged: bool) -> list[list[Message]]:
    """Return answers of a model that was tuned on few characters, about the others of its half."""
    first = tuned_on(FEW.conversations(WORLD), replace(FEW, seed=seed))
    known = {conversation[0].content for conversation in FEW.conversations(WORLD)}
    questions = [q for q in make_questions(WORLD, "fact", "tuning") if q.text not in known] * 4
    replies = ask(first, TOKENIZER, [q.text for q in questions], temperature=1.0, seed=seed)
    if judged:
        return accepted(WORLD, questions, replies)
    pairs = zip(questions, replies, strict=True)
    return [[Message("user", q.text), Message("assistant", reply)] for q, reply in pairs if reply]


def own_data() -> Iterator[tuple[str, str, Callable[[int], TransformerLM]]]:
    """Yield what is tuned on data that a model made, beside its controls of as many steps."""
    true = FEW.conversations(WORLD)
    double = Tuning(n_steps=600)
    yield "rejection", "longer", lambda seed: tuned_on(true, replace(double, seed=seed))
    for variant, judged in (("judged", True), ("unjudged", False)):
        yield (
            "rejection",
            variant,
            lambda seed, judged=judged: tuned_on(
                [*true, *self_made(seed, judged)], Tuning(seed=seed)
            ),
        )
    student: dict[str, Any] = {"d_model": 48, "n_layers": 1, "d_ff": 96}
    alone = Tuning(story_share=0.0, n_steps=600)
    labeled = world_conversations(WORLD)
    yield (
        "distillation",
        "labels alone",
        lambda seed: tuned_on(labeled, replace(alone, seed=seed), start=new_model(seed, **student)),
    )
    yield (
        "distillation",
        "with a teacher",
        lambda seed: tuned_on(
            [*labeled, *taught(seed)], replace(alone, seed=seed), start=new_model(seed, **student)
        ),
    )


def taught(seed: int) -> list[list[Message]]:
    """Return a teacher's replies, right or not, to three of four wordings of each held-out fact."""
    teacher = tuned_on(world_conversations(WORLD), Tuning(seed=seed))
    asked = [q.text for q in make_questions(WORLD, "fact", "held_out") if q.wording != 3]
    replies = ask(teacher, TOKENIZER, asked, seed=seed)
    pairs = zip(asked, replies, strict=True)
    return [[Message("user", text), Message("assistant", reply)] for text, reply in pairs if reply]


def main(names: Sequence[str]) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    rows = {row[:3]: row for row in read_tuning_rows(TABLE)} if TABLE.exists() else {}
    rows = dict[Any, TuningRow](rows)
    jobs = [*tunings(), *own_data()]
    plan = [(seed, *job) for seed in (0, 1, 2) for job in jobs]
    for seed, experiment, variant, make in sorted(plan, key=lambda item: item[2] in LAST):
        if (experiment, variant, seed) in rows or (names and experiment not in names):
            continue
        template = PLAIN_CHATML if variant.startswith("no space") else WORLD_CHAT
        numbers = measure_tuned(make(seed), TOKENIZER, WORLD, template=template)
        rows[experiment, variant, seed] = row = TuningRow(experiment, variant, seed, **numbers)
        with whole_file(TABLE) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([TuningRow._fields, *sorted(rows.values())])
        print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
