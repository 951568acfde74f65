"""The table of chapter 21's reward models, one row for each variant and seed.

A row that is there is not made again: the table is written anew after each run, whole, and the same
command goes on with the first run that is missing. With names as arguments, only these
variants. A run takes about 25 CPU seconds of one thread.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import RESULTS

from llmbook.environment import whole_file
from llmbook.instruction import tuned
from llmbook.rlhf import (
    Pair,
    RewardModel,
    alignment_pairs,
    pair_examples,
    score_pairs,
    train_reward_model,
    true_reward,
    world_pairs,
)
from llmbook.tinyworld import Question, make_questions
from llmbook.training import pretrained

TABLE = RESULTS / "rewards.csv"
CARELESS = tuned("careless")
WORLD, TOKENIZER = CARELESS.world, CARELESS.tokenizer
PAD = TOKENIZER.special_tokens["<|endoftext|>"]
LIMIT = CARELESS.model.config.context_length
KINDS: Any = ("fact", "unknown", "confidential")
SEEDS = (0, 1, 2)
#: Share of labels that are flipped, share of pairs that are used, and where the weights come from.
VARIANTS: dict[str, tuple[float, float, str]] = {
    "noise 0": (0.0, 1.0, "careless"),
    "noise 0.1": (0.1, 1.0, "careless"),
    "noise 0.25": (0.25, 1.0, "careless"),
    "tenth of pairs": (0.0, 0.1, "careless"),
    "from the base": (0.0, 1.0, "base"),
}


class RewardRow(NamedTuple):
    """A reward model, and how it orders pairs about the held-out half of the world."""

    variant: str
    seed: int
    noise: float  # share of labels that were flipped in training
    accuracy: float  # share of all pairs in which it prefers the better reply
    invented: float  # the same, of facts against a made-up value
    refused: float  # of facts against refusals
    strangers: float  # of questions about strangers, against a made-up value
    secrets: float  # of confidential questions, against the secret
    margin: float  # mean difference of the two rewards
    calibration_error: float  # mean distance of its confidence and its accuracy, over ten bins


def questions(split: Any, most: int | None = None) -> list[Question]:
    """Return the questions about one half of the world, or as many of each kind, spread evenly."""
    found = []
    for kind in KINDS:
        asked = make_questions(WORLD, kind, split)
        n = len(asked) if most is None else most
        found += [asked[i * len(asked) // n] for i in range(n)]
    return found


@cache
def reward_model(variant: str, seed: int) -> RewardModel:
    """Return the reward model of a variant and seed."""
    noise, share, start = VARIANTS[variant]
    pairs = alignment_pairs(WORLD, noise=noise, seed=seed)
    order = np.random.default_rng(seed).permutation(len(pairs))
    chosen = [pairs[i] for i in order[: round(share * len(pairs))]]
    examples = pair_examples(TOKENIZER, CARELESS.template, chosen, limit=LIMIT).pairs
    backbone = CARELESS.model if start == "careless" else pretrained("tinyworld").model
    return train_reward_model(backbone, examples, pad_id=PAD, seed=seed)


def calibration_error(differences: np.ndarray) -> float:
    """Return the mean distance of confidence and accuracy over ten bins of confidence."""
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    bins = np.minimum((confidence * 20 - 10).astype(int), 9)
    right = differences > 0
    gaps = [
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in range(10)
        if (bins == b).any()
    ]
    return float(sum(gaps))


def group_of(pair: Pair) -> str:
    """Return under which heading a pair is counted."""
    harmful = true_reward(WORLD, pair.question, pair.rejected) < 0
    names = {
        ("fact", True): "invented",
        ("fact", False): "refused",
        ("unknown", True): "strangers",
        ("confidential", True): "secrets",
    }
    return names.get((pair.question.kind, harmful), "other")


def measured(model: RewardModel) -> dict[str, float]:
    """Return how a reward model orders pairs about the held-out half, each kind 96 questions."""
    pairs = world_pairs(WORLD, questions("held_out", 96), seed=5)
    examples = pair_examples(TOKENIZER, CARELESS.template, pairs, limit=LIMIT).pairs
    scores = score_pairs(model, examples, pad_id=PAD).double().numpy()
    differences = scores[:, 0] - scores[:, 1]
    groups = np.array([group_of(pair) for pair in pairs])
    found = {"accuracy": float((differences > 0).mean())}
    for name in ("invented", "refused", "strangers", "secrets"):
        found[name] = float((differences[groups == name] > 0).mean())
    found["margin"] = float(differences.mean())
    return found | {"calibration_error": calibration_error(differences)}


def read(path: Any, kind: Any, n_text: int) -> list[Any]:
    """Return the rows of a table whose first ``n_text`` columns are texts, and the next a seed."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [kind(*row[:n_text], int(row[n_text]), *map(float, row[n_text + 1 :])) for row in rows]


def write(path: Any, kind: Any, rows: Sequence[Any]) -> None:
    """Write a table whole, numbers with four digits after the point."""
    cells = [[round(v, 4) if isinstance(v, float) else v for v in row] for row in rows]
    with whole_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([kind._fields, *cells])


def main(names: Sequence[str]) -> None:
    """Make the runs that are missing."""
    torch.set_num_threads(1)
    rows = {row[:2]: row for row in read(TABLE, RewardRow, 1)}
    for seed in SEEDS:
        for variant in VARIANTS:
            if (variant, seed) in rows or (names and variant not in names):
                continue
            numbers = measured(reward_model(variant, seed))
            row = RewardRow(variant, seed, VARIANTS[variant][0], **numbers)
            rows[variant, seed] = row
            write(TABLE, RewardRow, sorted(rows.values()))
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
