# ruff: noqa: NPY002 (the global generator is what is tested)
"""Kill a run of two ranks again and again, and see whether it ends as one that was left alone.

``kill_and_resume`` is used by ``tests/test_distributed_trainer.py`` and, with more kills, by a
benchmark: ``python tests/killing_ranks.py N_KILLS FOLDER [SEED] [WAY]`` prints the report as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from killing import CONFIG, VOCABULARY, die_at, differing_bits, outcome, write_data

from llmbook import training
from llmbook.batches import BatchSampler
from llmbook.distributed import RankError, launch
from llmbook.model import ModelConfig, TransformerLM
from llmbook.training import Trainer


def train(data: Path, folder: Path, way: str, death: tuple[int, str, float] | None) -> int:
    """Train on this rank a model with dropout; die at some moment, if this is the rank to die."""
    if death is not None and death[0] == dist.get_rank():
        _, what, moment = death
        if what == "time":
            dies = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL))
            dies.daemon = True
            dies.start()
        else:
            die_at(int(moment), what)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    sizes = {"vocab_size": VOCABULARY, "context_length": 16, "d_model": 16}
    model = TransformerLM(ModelConfig(**sizes, n_layers=2, n_heads=2, dropout=0.1))
    config = replace(CONFIG, batch_size=8, parallel=way)
    shards = training.TokenShards(data)
    batches = BatchSampler(shards, config.batch_size, 16, documents=True)
    validation = [BatchSampler(shards, 4, 16, order="sequential")[0]]
    trainer = Trainer(model, batches, config, validation=validation, folder=folder)
    trainer.train()
    return trainer.step


def kill_and_resume(
    n_kills: int, folder: str | Path, seed: int = 0, way: str = "ddp"
) -> dict[str, Any]:
    """Kill one of two ranks ``n_kills`` times, let each run end, compare with one left alone.

    Half of the kills come at a random time, a quarter at a random operation on files and a quarter
    between two tensors of a save. ``seed`` decides which rank, what, and when.
    """
    folder, chance = Path(folder), random.Random(seed)
    data, whole = folder / "data", folder / "whole"
    write_data(data)
    launch(train, 2, data, folder / "first", way, None)  # starts what later launches fork
    start = time.perf_counter()
    launch(train, 2, data, whole, way, None)
    seconds = time.perf_counter() - start
    expected = outcome(whole)
    report: dict[str, Any] = {"kills": 0, "of rank 0": 0, "of rank 1": 0, "in saves": 0}
    report |= {"runs": 0, "differing bits": 0, "longest end in seconds": 0.0}
    for number in count():
        run = folder / f"run-{number}"
        while True:
            death = None
            if report["kills"] < n_kills:
                what = chance.choice(["time", "time", "files", "saves"])
                limit = seconds if what == "time" else 150
                rank = 0 if what == "saves" else chance.randrange(2)  # only rank 0 saves
                death = rank, what, chance.uniform(0, limit)
            start = time.perf_counter()
            try:
                launch(train, 2, data, run, way, death)
                break
            except RankError as error:
                if death is None or "SIGKILL" not in str(error):
                    raise
                report["kills"] += 1
                report[f"of rank {death[0]}"] += 1
                report["in saves"] += death[1] == "saves"
            longest = max(report["longest end in seconds"], time.perf_counter() - start)
            report["longest end in seconds"] = longest
        report["runs"] += 1
        report["differing bits"] += differing_bits(expected, outcome(run))
        shutil.rmtree(run)
        if report["kills"] >= n_kills:
            return report
    raise AssertionError("unreachable")


if __name__ == "__main__":
    from killing_ranks import kill_and_resume as by_name  # ranks import it: a script has no name

    torch.set_num_threads(1)
    n_kills, place, *others = sys.argv[1:]
    options: dict[str, Any] = dict(zip(("seed", "way"), others, strict=False))
    options["seed"] = int(options.get("seed", 0))
    print(json.dumps(by_name(int(n_kills), place, **options)))
