"""The trainer on several ranks: the same run as in one process, and the same again after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from llmbook import training
from llmbook.batches import BatchSampler
from llmbook.distributed import (
    ByteCounter,
    RankError,
    Ranks,
    launch,
    load_sharded,
    save_sharded,
    shard_by_torch,
)
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import build_optimizer
from llmbook.precision import GradScaler, MixedPrecision
from llmbook.training import CheckpointError, RunConfig, Trainer, TrainingConfig, list_checkpoints

SIZES: dict[str, Any] = {"vocab_size": 61, "context_length": 16, "d_model": 16, "n_layers": 2}
SETTINGS: dict[str, Any] = {
    "n_steps": 6,
    "batch_size": 12,
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
    batches = BatchSampler(ids, changes.get("batch_size", 12), 16)
    validation = [BatchSampler(ids, 4, 16, order="sequential", seed=1)[i] for i in range(3)]
    options: dict[str, Any] = {"validation": validation, "folder": folder}
    if changes.get("precision") == "float16":  # of which the first steps overflow
        del changes["precision"]
        scaler = GradScaler(init_scale=2.0**24, growth_interval=3)
        options["precision"] = MixedPrecision("float16", scaler=scaler)
    config = TrainingConfig(**{**SETTINGS, "parallel": parallel, **changes})
    return Trainer(model, batches, config, **options)


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
            assert other_row[name] == pytest.approx(value, rel=50 * tolerance, abs=1e-5), name


WAYS = ("ddp", "fsdp", "tp")
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"sizes": {"bias": True, "norm": "layernorm"}},
    "muon, tied": {"optimizer": "muon", "sizes": {"tie_embeddings": True}},
    "bfloat16": {"precision": "bfloat16", "optimizer": "sgd", "sizes": {"qk_norm": False}},
    "float16": {"precision": "float16", "optimizer": "sgd", "sizes": {"qk_norm": False}},
}


def everything(folder: Path) -> dict[Any, Any]:
    """Train by all ways in all cases, and keep checkpoints of one; on each rank."""
    found: dict[Any, Any] = {}
    for way in WAYS:
        for case, changes in CASES.items():
            found[way, case] = outcome(way, folder / way if case == "adamw" else None, **changes)
    return found


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found, and the folder in which they left their checkpoints."""
    folder = tmp_path_factory.mktemp("ranks")
    return launch(everything, 2, folder, timeout=120.0), folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_on_two_ranks_is_that_of_one_process(way: str, case: str, on_two_ranks: Any):
    alone = outcome(None, **CASES[case])
    tolerance = 2e-3 if case in ("bfloat16", "float16") else 2e-5
    if case == "float16":
        assert alone["rows"][-1]["overflows"] > 0
    (first, second), _ = on_two_ranks
    same(alone, first[way, case], tolerance)
    for name, weight in first[way, case]["weights"].items():
        assert torch.equal(weight, second[way, case]["weights"][name]), name


def apart(way: str) -> Any:
    """Begin with another seed on each rank; return the weights, some chance, and what is sent."""
    rank, chance = dist.get_rank(), {}
    torch.manual_seed(rank)
    model = TransformerLM(ModelConfig(**SIZES, n_heads=4))
    first = [p.detach().clone() for p in model.parameters()]
    batches = BatchSampler(np.arange(2000) % 61, 12, 16)
    torch.manual_seed(5)
    config = TrainingConfig(n_steps=1, batch_size=12, micro_batch_size=2, parallel=way)
    trainer = Trainer(model, batches, config)
    ranks, weights = trainer.parallel, [whole(p) for p in model.parameters()]
    states = ranks.random_states()
    chance["begun"] = torch.rand(()).item()
    ranks.set_random_states(states)
    chance["resumed"] = torch.rand(()).item()
    several = {**states, "ranks": states.get("ranks", [])[:1]}
    ranks.set_random_states(several)  # as if there had been another number of them
    chance["of another number"] = torch.rand(()).item()
    with ByteCounter() as traffic:
        trainer.accumulate(next(iter(batches)))
    reduced = {n: k for n, k in traffic.calls.items() if n.startswith(("allreduce", "reduce"))}
    return first, weights, chance, reduced


def whole(tensor: Any) -> torch.Tensor:
    """A whole tensor, of which this rank may have a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@pytest.mark.parametrize("way", WAYS)
def test_ranks_begin_alike_draw_their_own_chance_and_exchange_once_a_step(way: str):
    (first, weights, chance, reduced), (_, others, other, _) = launch(apart, 2, way)
    for begun, one, two in zip(first, weights, others, strict=True):
        assert torch.equal(begun, one) and torch.equal(one, two)
    for name, drawn in chance.items():
        assert (drawn == other[name]) is (way == "tp"), name
    assert chance["begun"] == chance["resumed"] and other["begun"] == other["resumed"]
    # The last of three micro-batches exchanges, in one bucket or three units; then the loss's sum.
    expected = {"ddp": {"allreduce": 2}, "fsdp": {"reduce_scatter": 3, "allreduce": 1}}
    assert way == "tp" or reduced == expected[way]


def one_overflows(way: str) -> list[tuple[bool, float]]:
    """Return what rank 1's overflow means on this rank, and then a step without one."""
    trainer = make(way, precision="float16", optimizer="sgd", sizes={"qk_norm": False})
    precision = MixedPrecision("float16", scaler=GradScaler(init_scale=8.0))
    trainer.precision, found = precision, []
    weight, is_other = trainer.model.blocks[1].attention.v_proj.weight, trainer.parallel.rank == 1
    for grows in (is_other, False):
        hook = weight.register_hook(lambda g: g * torch.inf) if way == "ddp" and grows else None
        trainer.optimizer.zero_grad()
        sums = trainer.accumulate(next(iter(trainer.batches)))
        if hook is not None:
            hook.remove()
        elif grows:
            weight.grad.to_local()[0, 0] = torch.inf
        settled = trainer.parallel.settle(precision, trainer.optimizer, sums.loss)
        found.append((settled, precision.scaler.get_scale()))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_on_one_rank_is_one_on_all(way: str):
    assert launch(one_overflows, 2, way) == [[(False, 4.0), (True, 4.0)]] * 2


# --- checkpoints --------------------------------------------------------------------------------


def copied(source: Path, target: Path) -> Path:
    """Copy a run as it was at its checkpoint before the last."""
    shutil.copytree(source, target)
    (target / "step-000000006.safetensors").unlink()
    (target / ".lock").unlink(missing_ok=True)
    return target


def go_on(folder: Path, others: tuple[str, ...]) -> dict[str, Any]:
    """Go on from checkpoints, each by another way than the one that wrote it."""
    found = {}
    for way, other in zip(WAYS, others, strict=True):
        found[other] = outcome(other, folder / f"{way} by {other}", **CASES["adamw"])
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_two_ranks_is_one_of_one_process(
    way: str, on_two_ranks: Any, tmp_path: Path
):
    (first, _), folder = on_two_ranks
    alone = outcome(None, copied(folder / way, tmp_path / "run"), **CASES["adamw"])
    same(alone, first[way, "adamw"])


def test_a_checkpoint_is_resumed_at_another_number_of_ranks_and_by_another_way(
    on_two_ranks: Any, tmp_path: Path
):
    (first, _), folder = on_two_ranks
    others = ("fsdp", "ddp", "fsdp")
    for way, other in zip(WAYS, others, strict=True):
        copied(folder / way, tmp_path / f"{way} by {other}")
    found = launch(go_on, 3, tmp_path, others, timeout=120.0)
    for other in others:
        same(found[0][other], first["ddp", "adamw"])


def in_pieces(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Save a sharded model after a step; load it into another; and once where rank 1 sees none."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = shard_by_torch(TransformerLM(ModelConfig(**SIZES, n_heads=2)))
        optimizer = build_optimizer(model, "adamw", lr=0.1)
        if seed == 0:
            model(torch.arange(8)[None]).sum().backward()
            optimizer.step()
            save_sharded(folder, model, optimizer)
        else:
            load_sharded(folder, model, optimizer)
        states = [p.full_tensor() for state in optimizer.state.values() for p in state.values()
                  if isinstance(p, DTensor)]  # fmt: skip
        found.append([p.full_tensor() for p in model.parameters()] + states)
    with pytest.raises(ValueError, match="folder: expected the same") as caught:
        load_sharded(folder / "none" if dist.get_rank() else folder, model, optimizer)
    with pytest.raises(ValueError, match="folder: expected one that save_sharded wrote"):
        load_sharded(folder / "none", model, optimizer)
    return (*found, str(caught.value))


def test_pieces_are_loaded_with_their_optimizer_and_by_all_ranks_or_none(tmp_path: Path):
    for saved, loaded, message in launch(in_pieces, 2, tmp_path / "pieces"):
        assert len(saved) == len(loaded) > 60
        assert all(torch.equal(one, other) for one, other in zip(saved, loaded, strict=True))
        got = "got a checkpoint on rank 0, no checkpoint on rank 1"
        assert message == f"folder: expected the same on each rank, {got}"


def test_only_rank_0_writes(on_two_ranks: Any):
    _, folder = on_two_ranks
    for way in WAYS:
        names = {path.name for path in (folder / way).iterdir()}
        steps = {"step-000000004.safetensors", "step-000000006.safetensors"}
        assert names - {".lock"} == {"metrics.jsonl", "best.safetensors", *steps}
        rows = [json.loads(x) for x in (folder / way / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 2, 3, 4, 6]


def test_a_killed_run_of_two_ranks_ends_with_the_same_bits(tmp_path: Path):
    script = Path(__file__).with_name("killing_ranks.py")
    command = [sys.executable, "-W", "ignore", str(script), "2", str(tmp_path), "3", "fsdp"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 2 and found["differing bits"] == 0


# --- what goes wrong ----------------------------------------------------------------------------


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "batch": ("ddp", {"batch_size": 7}, "batch_size: expected a multiple of 2 ranks, got 7"),
    "shards": ("fsdp", {"batch_size": 7}, "batch_size: expected a multiple of 2 ranks, got 7"),
    "heads": (
        "tp", {"sizes": {"n_kv_heads": 1}}, "n_kv_heads: expected a multiple of 2 ranks, got 1"
    ),
    "queries": (
        "tp",
        {"sizes": {"n_heads": 3, "d_head": 4, "n_kv_heads": 3}},
        "n_heads: expected a multiple of 2 ranks, got 3",
    ),
    "inner": ("tp", {"sizes": {"d_ff": 33}}, "d_ff: expected a multiple of 2 ranks, got 33"),
    "experts": (
        "tp", {"sizes": {"n_experts": 2, "n_active_experts": 1}}, "n_experts: expected 0"
    ),
}  # fmt: skip


def refusals(folder: Path) -> dict[str, str]:
    """Return what each bad request is answered, on this rank."""
    found = {}
    for name, (way, changes, _) in BAD.items():
        try:
            made = {"micro_batch_size": None, **changes}
            make(way, folder, **made)
        except ValueError as error:
            found[name] = str(error)
    try:
        torch.manual_seed(0)
        model = TransformerLM(ModelConfig(**SIZES, n_heads=2))
        Ranks("ddp").prepare(model, object(), TrainingConfig(n_steps=1, batch_size=2))
    except ValueError as error:
        found["sampler"] = str(error)
    (folder / "step-000000002.safetensors").write_bytes(b"nothing")
    try:
        make("ddp", folder).train()
    except CheckpointError as error:
        found["damaged"] = str(error)
    return found


def test_every_rank_says_what_is_wrong(tmp_path: Path):
    first, second = launch(refusals, 2, tmp_path)
    assert first == second
    for name, (_, _, message) in BAD.items():
        assert message in first[name]
    assert "batches: expected a sampler with a rank and a world_size" in first["sampler"]
    assert "no checkpoint is whole" in first["damaged"]


def one_fails(what: str) -> None:
    """Train on two ranks, of which the second dies or stands still."""
    trainer = make("ddp")
    if dist.get_rank():
        trainer.train_step = lambda batch: fail(what)  # type: ignore[method-assign]
    trainer.train()


def fail(what: str) -> Any:
    """Die, or stand still."""
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dies", "rank 1 of 2 died of SIGKILL"),
        ("stands still", "rank 0 of 2 waited too long for the others"),
    ],
)
def test_a_rank_that_dies_or_stands_still_ends_the_others(what: str, message: str):
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        launch(one_fails, 2, what, timeout=60.0 if what == "dies" else 3.0)
    assert time.monotonic() - start < 50, "nobody waits"


def test_ranks_need_other_processes_and_a_known_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="parallel: expected several processes, as in: torchrun"):
        Ranks("ddp")
    with pytest.raises(ValueError, match="parallel: expected one of ddp, fsdp, tp, got 'zero'"):
        Ranks("zero")
    with pytest.raises(ValueError, match="timeout: expected a finite number above 0"):
        Ranks("ddp", timeout=0.0)
    with pytest.raises(ValueError, match="parallel: expected one of ddp, fsdp, tp, got 'zero'"):
        TrainingConfig(n_steps=1, batch_size=1, parallel="zero")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"training\.parallel: expected ddp, fsdp or tp, as 2"):
        training.run(small_run(None), "nowhere")


# --- the command --------------------------------------------------------------------------------


def small_run(way: str | None) -> RunConfig:
    """A run of a few seconds."""
    return RunConfig.from_dict(
        {
            "data": {"kind": "tinyworld", "n_stories": 200, "n_held_out": 4},
            "tokenizer": {"vocab_size": 400},
            "model": {"context_length": 256, "d_model": 32, "n_layers": 2, "n_heads": 2},
            "training": {
                "n_steps": 30, "batch_size": 8, "learning_rate": 0.01, "log_every": 5,
                "checkpoint_every": 5, "evaluate_every": 15, "threads": 1, "parallel": way,
            },
        }
    )  # fmt: skip


def torchrun(config: Path, folder: Path, what: str, after: int) -> tuple[int, str]:
    """Run the command; kill a rank, or press Ctrl-C, after a new checkpoint of at least a step."""
    after = max(after, 1 + max(list_checkpoints(folder / "training"), default=0))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    here = ["--local-addr=127.0.0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*launcher, *here, "-m", "llmbook.training", str(config), "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    ranks: dict[str, int] = {}
    try:
        while what != "ends" and process.poll() is None:
            if max(list_checkpoints(folder / "training"), default=0) >= after:
                ranks = {environ(p).get("RANK", "none"): p for p in children(process.pid)}
                if what == "killed":
                    os.kill(ranks["1"], signal.SIGKILL)
                else:
                    process.send_signal(signal.SIGINT)
                break
            time.sleep(0.02)
        said = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks.values()), "nothing stays"
    return process.returncode, said


def children(pid: int) -> list[int]:
    """Return the processes that a process started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def environ(pid: int) -> dict[str, str]:
    """Return the environment of a process."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_command_under_torchrun_is_killed_and_goes_on_by_other_ways(tmp_path: Path):
    alone = training.run(small_run(None), tmp_path / "alone")
    folder = tmp_path / "run"
    stages = (("ddp", "killed", 5), ("fsdp", "stopped", 10), ("fsdp", "killed", 1))
    for way, what, after in (*stages, ("tp", "ends", 30)):
        small_run(way).to_yaml(tmp_path / f"{way}.yaml")
        code, said = torchrun(tmp_path / f"{way}.yaml", folder, what, after)
        assert (code == 0) is (what == "ends"), said
        assert f"on 2 ranks ({way})" in said, said
        assert said.count("on 2 ranks") == 1, "rank 0 speaks for all"
        if what == "killed":
            assert "exitcode  : -9" in said and "rank      : 1" in said, said
        if what == "stopped":  # by Ctrl-C: each rank ends its step, and rank 0 saves
            assert said.count("stopped; the same command goes on") == 2, said
            assert max(list_checkpoints(folder / "training")) >= 10
    together = training.load_run(folder)
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(together.model.state_dict()[name], weight, rtol=0, atol=2e-3)
    for name in ("loss", "validation_loss", "gap"):
        steps, values = together.log.column(name)
        assert alone.log.column(name)[0] == steps
        assert values == pytest.approx(alone.log.column(name)[1], rel=1e-3), name
