"""The table of chapter 23's rollout engines: the same weights, and what others make of them.

Each engine draws replies to the same questions with the same random numbers; the trainer then
scores their tokens, whole rows at once, in float32. About 2 CPU minutes of one thread.
"""

from __future__ import annotations

import copy
import csv
import sys
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from measure import RESULTS

from llmbook.environment import whole_file
from llmbook.grpo import importance_weights, partly_right
from llmbook.model import TransformerLM
from llmbook.rlhf import (
    Response,
    as_rollouts,
    kl_estimates,
    question_prompts,
    score_rollouts,
    write_responses,
)
from llmbook.tinyworld import TinyWorld, make_questions
from llmbook.training import pretrained

TABLE = RESULTS / "engine.csv"
SEEDS = (0, 1, 2)
WORLD, TOKENIZER = TinyWorld(), pretrained("tinyworld").tokenizer
PAD = TOKENIZER.special_tokens["<|endoftext|>"]
PROMPTS = question_prompts(TOKENIZER, make_questions(WORLD, "fact", "tuning")[::7][:64])
SAMPLES = 8
#: Kind of the weights, and how many replies are written at once.
ENGINES: dict[str, tuple[torch.dtype, int]] = {
    "float32, 64 at once": (torch.float32, 64),
    "float32, 8 at once": (torch.float32, 8),
    "float32, 1 at once": (torch.float32, 1),
    "float64, 64 at once": (torch.float64, 64),
    "bfloat16, 64 at once": (torch.bfloat16, 64),
    "bfloat16, 1 at once": (torch.bfloat16, 1),
}


class Row(NamedTuple):
    """What an engine has drawn, beside what the trainer and the first engine make of it."""

    engine: str
    seed: int
    tokens: int
    equal: float  # share of tokens whose log-probability is the trainer's to the last bit
    mean: float  # mean absolute difference in nats
    most: float  # largest absolute difference in nats
    kl: float  # nats per token from the trainer's policy, by the estimate k3
    other: float  # share of replies that are not those of the first engine
    below: float  # smallest weight of a token
    above: float  # largest weight of a token
    truncated: float  # share of tokens whose weight is above 2
    weight: float  # mean weight, before any is cut


def measured(engine: str, seed: int, policy: TransformerLM, first: Sequence[Response]) -> Row:
    """Return what an engine makes of a policy, and the trainer of the engine's replies."""
    dtype, at_once = ENGINES[engine]
    replies = drawn(copy.deepcopy(policy).to(dtype), seed, at_once)
    flat = list(chain.from_iterable(replies))
    rollouts = as_rollouts(PROMPTS, replies, torch.zeros(len(flat)), pad_id=PAD)
    own, behavior, mask = score_rollouts(policy, rollouts), rollouts.old_log_probs, rollouts.mask
    difference = (own - behavior)[mask].abs()
    weights = importance_weights(own, behavior, mask, most=1e9)[mask]
    numbers = {
        "equal": (difference == 0).double().mean(),
        "mean": difference.mean(),
        "most": difference.max(),
        "kl": kl_estimates(behavior[mask], own[mask]).k3.mean(),
        "below": weights.min(),
        "above": weights.max(),
        "truncated": (weights > 2).double().mean(),
        "weight": weights.double().mean(),
    }
    other = [a.ids != b.ids for a, b in zip(flat, first or flat, strict=True)]
    shares = {name: float(f"{float(value):.4g}") for name, value in numbers.items()}
    return Row(engine, seed, int(mask.sum()), other=sum(other) / len(other), **shares)


def drawn(engine: TransformerLM, seed: int, at_once: int) -> list[list[Response]]:
    """Return replies to all prompts."""
    options = {"samples": SAMPLES, "max_new_tokens": 24, "seed": seed, "batch_size": at_once}
    return write_responses(engine, PROMPTS, tokenizer=TOKENIZER, **options)  # type: ignore[arg-type]


def read() -> dict[tuple[str, int], Row]:
    """Return the rows that are there."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    found = [Row(row[0], int(row[1]), int(row[2]), *map(float, row[3:])) for row in rows]
    return {row[:2]: row for row in found}


def main(names: Sequence[str]) -> None:
    """Measure the engines that are missing."""
    torch.set_num_threads(1)
    rows = read()
    for seed in SEEDS:
        policy = partly_right(seed)
        first: list[Response] = []
        for engine in ENGINES:
            if (engine, seed) in rows or (names and engine not in names):
                continue
            if not first:
                first = list(chain.from_iterable(drawn(policy, seed, 64)))
            rows[engine, seed] = row = measured(engine, seed, policy, first)
            with whole_file(TABLE) as draft, draft.open("w", newline="", encoding="utf-8") as file:
                ordered = sorted(rows.values(), key=lambda r: (list(ENGINES).index(r[0]), r[1]))
                csv.writer(file, lineterminator="\n").writerows([Row._fields, *ordered])
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
