"""Steps to a loss over batch sizes, and the noise scale of the gradient on the way.

Each run trains a model of two layers at a constant learning rate, on stories of the tiny world that
it sees once, until its loss on other stories has fallen to the last target. It adds a row for each
target to ``results/batch.csv``: how many steps it took. The rows of the method "noise" have the
noise scale there, of the runs with batches of 16 rows. What is there is not measured again.

    python benchmarks/batch.py            # all rows: about 15 minutes with one thread
    python benchmarks/batch.py --limit 3  # three more runs
"""

from __future__ import annotations

import argparse
import csv
from itertools import product

import torch
from measure import RESULTS
from transfer import config_of, rows_of

from llmbook.batches import Batch
from llmbook.environment import seed_everything, whole_file
from llmbook.model import TransformerLM
from llmbook.optimization import AdamW, clip_gradients
from llmbook.scaling import gradient_noise
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe
from llmbook.training import next_token_objective

PATH = RESULTS / "batch.csv"
COLUMNS = ("batch", "log2_rate", "seed", "target", "steps", "noise")
WIDTH, WARMUP, SEEDS, N_STORIES = 64, 10, (0, 1, 2), 25_600
TARGETS = (2.0, 1.5, 1.25, 1.0, 0.8, 0.7)  # nats per token
NOISE_AT = 16  # the batch size whose runs measure the noise, from 128 batches of 2 rows
#: The exponents of the rates that are tried, for each batch size.
RATES = {
    2: (-10, -9, -8, -7),
    4: (-9, -8, -7, -6),
    8: (-8, -7, -6, -5),
    16: (-8, -7, -6, -5),
    32: (-7, -6, -5, -4),
    64: (-7, -6, -5, -4),
    128: (-7, -6, -5, -4),
}


def some_rows(data: Batch, rows: torch.Tensor) -> Batch:
    """Return these rows of the data."""
    return Batch(data.inputs[rows], data.targets[rows])


def run(
    data: Batch, held_out: Batch, batch: int, log2_rate: int, seed: int
) -> list[tuple[float, float | None, float | None]]:
    """Return steps and noise scale, if it is measured, for each target; None if not reached."""
    seed_everything(seed)
    model = TransformerLM(config_of(WIDTH))
    optimizer = AdamW(model.parameters(), 2.0**log2_rate, (0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(len(data.inputs), generator=torch.Generator().manual_seed(seed))
    found: list[tuple[float, float | None, float | None]] = []
    most, last = min(len(order) // batch, 2000), (0, float("inf"))
    every = 10 if batch <= 4 else 5 if batch <= 16 else 2
    for step in range(1, most + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2.0**log2_rate * min(1.0, step / WARMUP)
        rows = order[(step - 1) * batch : step * batch]
        total, count = next_token_objective(model, some_rows(data, rows))
        optimizer.zero_grad()
        (total / count).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        if step % every:
            continue
        with torch.no_grad():
            total, count = next_token_objective(model, held_out)
        loss = float(total / count)
        while len(found) < len(TARGETS) and loss <= (target := TARGETS[len(found)]):
            # Between two measurements, the loss is taken for a straight line
            share = (last[1] - target) / (last[1] - loss) if last[0] else 1.0
            noise = None
            if batch == NOISE_AT:
                pairs = (some_rows(data, order[-2 - i : len(order) - i]) for i in range(0, 256, 2))
                noise = gradient_noise(model, pairs, group=16).batch_size
            found.append((target, last[0] + share * (step - last[0]), noise))
        if len(found) == len(TARGETS):
            break
        last = step, loss
    return found + [(target, None, None) for target in TARGETS[len(found) :]]


def read_rows() -> list[dict[str, str]]:
    """Return what was measured."""
    if not PATH.exists():
        return []
    with PATH.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=None, help="runs to make at most")
    limit = parser.parse_args().limit
    torch.set_num_threads(1)
    world = TinyWorld()
    texts = [story.text for story in world.stories(N_STORIES, 0)]
    tokenizer = train_bpe(texts[:1600], 512)
    data = rows_of(texts, tokenizer)
    held_out = rows_of([story.text for story in world.stories(128, 1)], tokenizer)
    rows = read_rows()
    done = {(int(r["batch"]), int(r["log2_rate"]), int(r["seed"])) for r in rows}
    planned = [(b, rate, seed) for seed, b in product(SEEDS, RATES) for rate in RATES[b]]
    for key in [key for key in planned if key not in done][:limit]:
        for target, steps, noise in run(data, held_out, *key):
            shown = ["" if x is None else f"{x:.1f}" for x in (steps, noise)]
            values = (*map(str, key), f"{target:g}", *shown)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(*values, flush=True)
        with whole_file(PATH) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
