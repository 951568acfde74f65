"""What packing and its masks do to instruction tuning: ``python benchmarks/packing.py [CASE ...]``.

Each case tunes the base model of the tiny world for 200 steps on the 672 questions about the tuning
half of its characters and on 224 stories, with three seeds. "rows" has one example in a row, 32
rows a step; "packed" has as many as fit, 8 rows a step, which are about as many examples;
"unmasked" is packed without documents, so an example sees those before it; "unended" is "rows" with
the end token of each reply masked, as by a collator that masks whatever equals the pad token. What
comes out is in ``results/packing.csv``: of 336 held-out questions the number answered right, the
number of replies that ended within 24 tokens, CPU seconds (one thread), and the share of padding.
A case that is named is measured anew; without names all of them are.
"""

from __future__ import annotations

import copy
import csv
import sys
import time
from pathlib import Path

import torch

from llmbook.generation import Sampling, generate
from llmbook.instruction import (
    WORLD_CHAT,
    Example,
    InstructionDataset,
    Message,
    story_examples,
    world_conversations,
)
from llmbook.tinyworld import TinyWorld, judge_reply, make_questions
from llmbook.training import Trainer, TrainingConfig, pretrained

RESULTS = Path(__file__).parent / "results" / "packing.csv"
CASES = {
    "rows": {"batch_size": 32, "packed": False, "documents": True},
    "packed": {"batch_size": 8, "packed": True, "documents": True},
    "unmasked": {"batch_size": 8, "packed": True, "documents": False},
    "unended": {"batch_size": 32, "packed": False, "documents": True},
}
FIELDS = ("case", "seed", "right", "ended", "questions", "seconds", "padding")


def without_end(example: Example) -> Example:
    """Return an example whose last learned token is not learned."""
    learned = list(example.learned)
    learned[max(i for i, on in enumerate(learned) if on)] = False
    return Example(example.ids, tuple(learned))


def measure(case: str, seed: int) -> dict[str, object]:
    """Tune, ask, and return a row of the table."""
    base, world = pretrained("tinyworld"), TinyWorld()
    tokenizer, options = base.tokenizer, CASES[case]
    examples = [WORLD_CHAT.encode(tokenizer, c) for c in world_conversations(world)]
    if case == "unended":
        examples = [without_end(example) for example in examples]
    examples += story_examples(world, tokenizer, 224)
    end = tokenizer.special_tokens["<|endoftext|>"]
    data = InstructionDataset(examples, context_length=128, pad_id=end, seed=seed, **options)
    rates = {"learning_rate": 3e-3, "weight_decay": 0.0, "warmup": 10}
    config = TrainingConfig(
        n_steps=200, batch_size=data.batch_size, schedule="linear", final=0.0, seed=seed, **rates
    )
    model = copy.deepcopy(base.model)
    begin = time.thread_time()
    Trainer(model, data, config).train()
    seconds = time.thread_time() - begin
    questions = make_questions(world, "fact", "held_out")[::2]
    prompts = [
        WORLD_CHAT.encode(tokenizer, [Message("user", q.text)], prompt=True).ids for q in questions
    ]
    stop = [end, tokenizer.special_tokens["<|im_end|>"]]
    greedy = {"sampling": Sampling(temperature=0), "tokenizer": tokenizer, "stop_tokens": stop}
    replies = generate(model, prompts, max_new_tokens=24, **greedy)
    right = [
        judge_reply(world, question, reply.text.strip())
        for question, reply in zip(questions, replies, strict=True)
    ]
    ended = sum(reply.finish_reason != "length" for reply in replies)
    n_right = sum(verdict.right for verdict in right)
    print(case, seed, n_right, ended, file=sys.stderr, flush=True)
    values = (case, seed, n_right, ended, len(questions), f"{seconds:.1f}", f"{data.padding:.3f}")
    return dict(zip(FIELDS, values, strict=True))


def main() -> None:
    """Measure the cases that are named, or all, and write the table."""
    torch.set_num_threads(1)
    cases = sys.argv[1:] or list(CASES)
    rows = []
    if RESULTS.exists():
        with RESULTS.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["case"] not in cases]
    for case in cases:
        rows += [measure(case, seed) for seed in range(3)]
    rows.sort(key=lambda row: (list(CASES).index(str(row["case"])), int(str(row["seed"]))))
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
