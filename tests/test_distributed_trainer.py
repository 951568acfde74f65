"""The trainer on several ranks: the same run as in one process, and the same again after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmbook.batches import BatchSampler
from llmbook.distributed import Ranks, launch
from llmbook.model import ModelConfig, TransformerLM
from llmbook.training import Trainer, TrainingConfig

SIZES: dict[str, Any] = {"vocab_size": 61, "context_length": 16, "d_model": 16, "n_layers": 2}
SETTINGS: dict[str, Any] = {
    "n_steps": 6,
    "batch_size": 8,
    "micro_batch_size": 2,
    "learning_rate": 0.01,
    "clip_norm": 0.5,
    "log_every": 2,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "spike_factor": 100.0,
}


def make(parallel: str | None, folder: Path | None = None, **changes: Any) -> Trainer:
    """Return a trainer of a small model on random tokens, some of which end documents."""
    sizes = {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True, **changes.pop("sizes", {})}
    torch.manual_seed(0)
    model = TransformerLM(ModelConfig(**SIZES, **sizes))
    ids = np.random.default_rng(0).integers(61, size=2000)
    batches = BatchSampler(ids, changes.get("batch_size", 8), 16)
    validation = [BatchSampler(ids, 4, 16, order="sequential", seed=1)[i] for i in range(3)]
    more = {k: changes.pop(k) for k in ("precision_object", "ways") if k in changes}
    config = TrainingConfig(**{**SETTINGS, "parallel": parallel, **changes})
    precision = more.get("precision_object")
    return Trainer(
        model, batches, config, validation=validation, folder=folder, precision=precision
    )


def outcome(parallel: str | None, folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Train, and return what came of it: weights, and the rows of the log without times."""
    trainer = make(parallel, folder, **changes)
    trainer.train()
    rows = [dict(row) for row in trainer.log.rows]
    for row in rows:
        for name in ("tokens_per_second", "memory"):
            row.pop(name, None)
    state = trainer.parallel.gathered(trainer.model.state_dict())
    return {"weights": {k: v.clone() for k, v in state.items()}, "rows": rows}


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 2e-5) -> None:
    """Compare two outcomes."""
    for name, weight in one["weights"].items():
        torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=tolerance)
    assert len(one["rows"]) == len(other["rows"]) > 0
    for row, other_row in zip(one["rows"], other["rows"], strict=True):
        assert row.keys() == other_row.keys()
        for name, value in row.items():
            assert other_row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_on_two_ranks_is_that_of_one_process(parallel: str, optimizer: str):
    tied = {"tie_embeddings": optimizer == "muon"}
    alone = outcome(None, optimizer=optimizer, sizes=tied)
    for found in launch(run_here, 2, parallel, {"optimizer": optimizer, "sizes": tied}):
        if found["rows"]:
            same(alone, found)


def run_here(parallel: str, changes: dict[str, Any], folder: Path | None = None) -> Any:
    return outcome(parallel, folder, **changes)
