# ruff: noqa: NPY002 (the global generator is what is tested)
"""Kill a training run again and again, and see whether it ends as one that was never stopped.

``kill_and_resume`` is used by ``tests/test_training.py`` and, with more kills, by a benchmark. It
forks, so it wants a process that has computed nothing with torch yet: run this file for that,
``python tests/killing.py N_KILLS FOLDER [SEED]``; it prints the report as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmbook import training
from llmbook.batches import BatchSampler, write_shards
from llmbook.model import ModelConfig, TransformerLM
from llmbook.training import Trainer, TrainingConfig, list_checkpoints, load_checkpoint

N_STEPS, VOCABULARY = 40, 61
CONFIG = TrainingConfig(
    n_steps=N_STEPS,
    batch_size=4,
    micro_batch_size=2,
    optimizer="muon",
    learning_rate=0.02,
    warmup=5,
    log_every=3,
    evaluate_every=4,
    checkpoint_every=2,
    spike_factor=2.0,
)
TIMES = {"tokens_per_second", "memory", "mfu"}  # what need not be the same


class Words:
    """A tokenizer of numbers, as far as shards need one."""

    vocab_size = VOCABULARY
    special_tokens = {"<|endoftext|>": VOCABULARY - 1}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        """Return some ids."""
        return [byte % (VOCABULARY - 1) for byte in text.encode()]


def write_data(folder: Path) -> None:
    """Write shards of random documents."""
    chance = random.Random(0)
    lengths = [chance.randrange(3, 30) for _ in range(200)]
    documents = [[chance.randrange(VOCABULARY - 1) for _ in range(n)] for n in lengths]
    write_shards(documents, folder, Words())


def train(data: Path, folder: Path) -> None:
    """Train a model that draws random numbers (dropout), with everything that is saved in use."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    sizes = {"vocab_size": VOCABULARY, "context_length": 16, "d_model": 16}
    model = TransformerLM(ModelConfig(**sizes, n_layers=2, n_heads=2, dropout=0.1))
    shards = training.TokenShards(data)
    batches = BatchSampler(shards, CONFIG.batch_size, 16, documents=True)
    validation = [BatchSampler(shards, 4, 16, order="sequential")[0]]

    def noisy(model: torch.nn.Module) -> dict[str, float]:  # a probe may draw what it likes
        return {"noise": float(torch.rand(())) + random.random() + np.random.rand()}

    Trainer(model, batches, CONFIG, validation=validation, folder=folder, probes=[noisy]).train()


def in_child(work: Callable[[], None]) -> int:
    """Start ``work`` in a process of its own, which exits with 0 if all is well; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int | None:
    """Wait for a process: its exit code, or None if it was killed."""
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def die_at(moment: int, what: str) -> None:
    """Let this process be killed at some event: of files, or between two tensors of a save."""
    left = [moment]

    def tick() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "files":
        beginnings = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
        sys.addaudithook(lambda event, _: tick() if event.startswith(beginnings) else None)
    else:
        raw = training._raw

        def ticking(tensor: torch.Tensor) -> Any:
            tick()
            return raw(tensor)

        training._raw = ticking


def outcome(folder: Path) -> dict[str, Any]:
    """Return what must be the same: the last state, the best weights, and the log without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "state": load_checkpoint(list_checkpoints(folder)[N_STEPS]),
        "best": load_checkpoint(folder / "best.safetensors"),
        "rows": [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        "steps": list(list_checkpoints(folder)),
    }


def differing_bits(a: Any, b: Any) -> int:
    """Count the bits in which two nested states differ; another structure counts as all of them."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return max(1, 8 * a.nbytes)
        raw = [t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (a, b)]
        return int(np.unpackbits(raw[0] ^ raw[1]).sum())
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return sum(differing_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return sum(differing_bits(x, y) for x, y in zip(a, b, strict=True))
    return 0 if a == b else 1


def kill_and_resume(n_kills: int, folder: str | Path, seed: int = 0) -> dict[str, int]:
    """Kill runs ``n_kills`` times, let each end, and compare with a run that was left alone.

    A third of the kills come at a random time from outside, a third at a random operation on
    files, a third between two tensors of a save. ``seed`` decides which, and when.
    """
    folder, chance = Path(folder), random.Random(seed)
    data, whole = folder / "data", folder / "whole"
    write_data(data)
    start = time.perf_counter()
    assert ended(in_child(lambda: train(data, whole))) == 0, "the run that is left alone"
    seconds = time.perf_counter() - start
    expected = outcome(whole)
    report = {"kills": 0, "from outside": 0, "at files": 0, "in saves": 0, "half-written files": 0}
    report |= {"runs": 0, "differing bits": 0}
    for number in count():
        run = folder / f"run-{number}"
        while True:
            what = chance.choice(["outside", "files", "saves"]) if report["kills"] < n_kills else ""
            moment, delay = chance.randrange(1, 150), chance.uniform(0.0, seconds)

            def attempt(what: str = what, moment: int = moment, run: Path = run) -> None:
                if what in ("files", "saves"):
                    die_at(moment, what)
                train(data, run)

            pid = in_child(attempt)
            if what == "outside":
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            if code is not None:
                assert code == 0, f"a resumed run failed in {run}"
                break
            report["kills"] += 1
            report[{"outside": "from outside", "files": "at files"}.get(what, "in saves")] += 1
            report["half-written files"] += any(run.glob(".*.part"))
        report["runs"] += 1
        report["differing bits"] += differing_bits(expected, outcome(run))
        leftovers = {path.name for path in run.iterdir()} - {path.name for path in whole.iterdir()}
        assert not leftovers, f"left behind: {sorted(leftovers)}"
        shutil.rmtree(run)
        if report["kills"] >= n_kills:
            return report
    raise AssertionError("unreachable")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_and_resume(int(sys.argv[1]), sys.argv[2], int([*sys.argv, 0][3]))))
