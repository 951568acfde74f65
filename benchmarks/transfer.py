"""The best learning rate over widths and depths: standard, maximal-update parametrization, Muon.

Each run trains a small model from nothing on stories of the tiny world and adds one row to
``results/transfer.csv``. Rows that are there are not measured again, so the script may be stopped
at any moment and called once more. The runs are ordered so that any prefix is of use.

    python benchmarks/transfer.py                # all rows: about an hour with one thread
    python benchmarks/transfer.py --sweep depth  # one of width, depth, decay
    python benchmarks/transfer.py --limit 5      # five more rows
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from itertools import product
from typing import NamedTuple

import torch
from measure import RESULTS

from llmbook.batches import Batch
from llmbook.environment import seed_everything, whole_file
from llmbook.model import ModelConfig, TransformerLM, count_parameters
from llmbook.optimization import AdamW, Muon, Optimizers, clip_gradients, linear_schedule
from llmbook.scaling import initialize_mup, mup_groups
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import BPETokenizer, train_bpe
from llmbook.training import next_token_objective

PATH = RESULTS / "transfer.csv"
WIDTHS, SEEDS = (32, 64, 128, 256), (0, 1)
THREE_SEEDS = (0, 1, 2)
DEPTHS, DEPTH_RATES = (1, 2, 4, 8, 16), (-7, -6, -5, -4, -3)
DECAYS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
VOCABULARY, LENGTH, ROWS, STEPS, WARMUP = 512, 64, 8, 150, 15
#: The exponents of the rates, for each method.
RATES = {
    "standard": (-9, -8, -7, -6, -5, -4),
    "mup": (-8, -7, -6, -5, -4, -3),
    "muon_original": (-8, -7, -6, -5, -4, -3),
    "muon_match_rms": (-9, -8, -7, -6, -5, -4),
}
METHODS = tuple(RATES)
ADAMW_RATE = 2.0**-6  # of tables, head and gains beside Muon


class Key(NamedTuple):
    """What decides a run."""

    method: str
    width: int
    layers: int
    log2_rate: int
    weight_decay: float
    seed: int


COLUMNS = (*Key._fields, "parameters", "steps", "loss", "seconds")


def config_of(width: int, layers: int = 2) -> ModelConfig:
    """Return a model of two heads, whose every width grows."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        context_length=LENGTH,
        d_model=width,
        n_layers=layers,
        n_heads=2,
        d_ff=2 * width,
    )


def rows_of(texts: list[str], tokenizer: BPETokenizer) -> Batch:
    """Return stories as rows, one in each, what is not a target marked.

    The end of a story is no target here; in the cells of chapter 17 it is one.
    """
    end = tokenizer.special_tokens["<|endoftext|>"]
    ids = torch.full((len(texts), LENGTH + 1), end)
    targets = torch.full((len(texts), LENGTH), -100)
    for row, text in enumerate(texts):
        found = [end, *tokenizer.encode(text)][: LENGTH + 1]
        ids[row, : len(found)] = torch.tensor(found)
        targets[row, : len(found) - 1] = torch.tensor(found[1:])
    return Batch(ids[:, :-1].contiguous(), targets)


def optimizer_of(
    model: TransformerLM, method: str, rate: float, decay: float
) -> torch.optim.Optimizer:
    """Return the optimizer of a method; Muon leaves table, head and gains to AdamW under muP.

    With "mup_fixed_decay" the rates are those of muP, but all matrices have one weight decay.
    """
    base = config_of(WIDTHS[0])
    if method == "standard":
        return AdamW(model.parameters(), rate, (0.9, 0.95), weight_decay=0.0)
    if method in ("mup", "mup_fixed_decay"):
        groups = mup_groups(model, base, rate, decay)
        if method == "mup_fixed_decay":
            groups = [g | {"weight_decay": decay if g["weight_decay"] else 0.0} for g in groups]
        return AdamW(groups, rate, (0.9, 0.95))
    inside = {id(p) for p in model.blocks.parameters() if p.ndim >= 2}
    groups = mup_groups(model, base, ADAMW_RATE, 0.0)
    rest = [{**g, "params": [p for p in g["params"] if id(p) not in inside]} for g in groups]
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    rule = {"muon_original": "original", "muon_match_rms": "match_rms_adamw"}[method]
    muon = Muon(matrices, rate, 0.0, adjust_lr_fn=rule)
    adamw = AdamW([g for g in rest if g["params"]], ADAMW_RATE, (0.9, 0.95), weight_decay=0.0)
    return Optimizers(muon, adamw)


def loss_of(data: Batch, held_out: Batch, key: Key) -> tuple[float, int]:
    """Return the loss on the held-out rows after training, and the number of parameters."""
    seed_everything(key.seed)
    model = TransformerLM(config_of(key.width, key.layers))
    seed_everything(key.seed)
    if key.method != "standard":
        initialize_mup(model, config_of(WIDTHS[0]))
    optimizer = optimizer_of(model, key.method, 2.0**key.log2_rate, key.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    factor = linear_schedule(STEPS, warmup=WARMUP)
    order = torch.randperm(len(data.inputs), generator=torch.Generator().manual_seed(key.seed))
    for step in range(STEPS):
        rows = order[torch.arange(step * ROWS, (step + 1) * ROWS) % len(order)]
        total, count = next_token_objective(model, Batch(data.inputs[rows], data.targets[rows]))
        optimizer.zero_grad()
        (total / count).backward()
        clip_gradients(model.parameters(), 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        optimizer.step()
    with torch.no_grad():
        total, count = next_token_objective(model, held_out)
    loss = float(total / count)
    return (loss if math.isfinite(loss) else math.inf), count_parameters(model)


def over_widths() -> list[Key]:
    """Return all runs over widths, seed by seed; Muon is too slow here for the largest width."""
    runs = []
    for seed, adam in product(SEEDS, (True, False)):
        methods, widths = (METHODS[:2], WIDTHS) if adam else (METHODS[2:], WIDTHS[:-1])
        for width, method in product(widths, methods):
            runs += [Key(method, width, 2, rate, 0.0, seed) for rate in RATES[method]]
    return runs


def over_depths() -> list[Key]:
    """Return all runs over depths, at the smallest width."""
    each = product(THREE_SEEDS, DEPTHS, METHODS[:2], DEPTH_RATES)
    return [Key(method, WIDTHS[0], depth, rate, 0.0, seed) for seed, depth, method, rate in each]


def over_decays() -> list[Key]:
    """Return all runs over weight decays, at two widths and the best rate of muP."""
    each = product(THREE_SEEDS, (WIDTHS[0], WIDTHS[2]), ("mup", "mup_fixed_decay"), DECAYS)
    runs = [Key(method, width, 2, -5, decay, seed) for seed, width, method, decay in each]
    # Without decay, and at the base width, the two are one
    return [k for k in runs if k.method == "mup" or (k.weight_decay and k.width != WIDTHS[0])]


SWEEPS = {"width": over_widths, "depth": over_depths, "decay": over_decays}


def read_rows() -> list[dict[str, str]]:
    """Return what was measured."""
    if not PATH.exists():
        return []
    with PATH.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def key_of(row: dict[str, str]) -> Key:
    """Return what decided the run of a row."""
    whole = (int(row[name]) for name in ("width", "layers", "log2_rate"))
    return Key(row["method"], *whole, float(row["weight_decay"]), int(row["seed"]))


def write_rows(rows: list[dict[str, str]]) -> None:
    """Write all rows, or none."""
    with whole_file(PATH) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", choices=tuple(SWEEPS), default=None, help="default: all")
    parser.add_argument("--limit", type=int, default=None, help="rows to measure at most")
    options = parser.parse_args()
    wanted = [SWEEPS[options.sweep]] if options.sweep else list(SWEEPS.values())
    planned = dict.fromkeys(key for runs in wanted for key in runs())
    torch.set_num_threads(1)
    world = TinyWorld()
    texts = [story.text for story in world.stories(STEPS * ROWS, 0)]
    tokenizer = train_bpe(texts, VOCABULARY, special_tokens=["<|endoftext|>"])
    data = rows_of(texts, tokenizer)
    held_out = rows_of([story.text for story in world.stories(256, 1)], tokenizer)
    rows = read_rows()
    done = {key_of(row) for row in rows}
    for key in [key for key in planned if key not in done][: options.limit]:
        start = time.perf_counter()
        loss, parameters = loss_of(data, held_out, key)
        seconds = time.perf_counter() - start
        values = (*key, parameters, STEPS, f"{loss:.4f}", f"{seconds:.1f}")
        rows.append({name: str(value) for name, value in zip(COLUMNS, values, strict=True)})
        write_rows(rows)
        print(*values, flush=True)


if __name__ == "__main__":
    main()
