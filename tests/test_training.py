# ruff: noqa: NPY002 (the global generator is what is tested)
"""The trainer: equal to plain loops and to itself after any kill, and clear about what is wrong."""

import copy
import dataclasses
import errno
import functools
import gzip
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path
from typing import get_type_hints

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from llmbook import training
from llmbook.batches import (
    Batch,
    BatchSampler,
    ResumableBatches,
    TokenShards,
    pack_documents,
    write_shards,
)
from llmbook.corpus import Document
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import AdamW, parameter_groups
from llmbook.tinyworld import TinyWorld
from llmbook.tokenizer import train_bpe
from llmbook.training import (
    RUNS,
    WORD_KINDS,
    CheckpointError,
    CheckpointWarning,
    DataConfig,
    GapToFloor,
    LivePlot,
    LogWarning,
    MetricsLog,
    NotebookBar,
    Precision,
    Probe,
    ProgressBar,
    RunConfig,
    SpikeDetector,
    TensorBoard,
    Trainer,
    TrainingConfig,
    TrainingError,
    activation_scales,
    artifacts_folder,
    compact,
    compressors,
    documents_score,
    list_checkpoints,
    load_checkpoint,
    load_model_state,
    load_or_train,
    load_run,
    main,
    newest_checkpoint,
    next_token_objective,
    peak_flops,
    peak_memory,
    pretrained,
    random_states,
    report,
    run,
    save_checkpoint,
    set_random_states,
    split_rows,
    unnoticed,
    update_ratio,
    word_kinds,
)

VOCABULARY = 31
SIZES = {"vocab_size": VOCABULARY, "context_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 2}


class Digits:
    """A tokenizer, as far as shards need one."""

    vocab_size = VOCABULARY
    special_tokens = {"<|endoftext|>": 30}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 30 for character in text]


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    chance = random.Random(1)
    documents = [[chance.randrange(30) for _ in range(chance.randrange(2, 20))] for _ in range(60)]
    return write_shards(documents, tmp_path_factory.mktemp("shards") / "train", Digits())


def made(**changes):
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(**SIZES | changes))


def configured(**changes):
    return TrainingConfig(**{"n_steps": 6, "batch_size": 4, "log_every": 2} | changes)


def trainer_of(shards, model=None, folder=None, *, validate=True, **changes):
    names = {"objective": "objective", "sinks": "sinks", "probes": "probes"}
    names |= {"optimizer_of": "optimizer"}  # a function; the setting of that name is a text
    options = {names[name]: changes.pop(name) for name in names if name in changes}
    config = configured(**changes)
    batches = BatchSampler(shards, config.batch_size, 8)
    validation = [BatchSampler(shards, 4, 8, order="sequential")[0]] if validate else None
    model = made() if model is None else model
    return Trainer(model, batches, config, validation=validation, folder=folder, **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# --- the objective and accumulation -------------------------------------------------------------


def test_the_objective_is_the_summed_cross_entropy(shards):
    model, batch = made().double(), BatchSampler(shards, 4, 8, documents=True)[0]
    batch.targets[0, 3:] = -100
    total, count = next_token_objective(model, batch)
    logits = model(batch.inputs, document_ids=batch.document_ids)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == (batch.targets != -100).sum()


def test_the_objective_adds_z_loss_and_balance(shards):
    batch = BatchSampler(shards, 4, 8)[0]
    model = made().double()
    plain, count = next_token_objective(model, batch)
    more, _ = next_token_objective(model, batch, z_loss=0.1)
    squares = model(batch.inputs).logsumexp(-1).square().sum()
    torch.testing.assert_close(more - plain, 0.1 * squares, rtol=1e-9, atol=0)
    experts = made(n_experts=4, n_active_experts=2).double()
    plain, count = next_token_objective(experts, batch)
    more, _ = next_token_objective(experts, batch, balance_loss=0.5)
    expected = 0.5 * experts.balance_loss().item() * count.item()  # routers are in float32
    assert (more - plain).item() == pytest.approx(expected, rel=1e-4)


@given(st.lists(st.integers(0, 8), min_size=4, max_size=4), st.integers(1, 4))
@settings(max_examples=20)
def test_accumulated_gradients_are_those_of_the_whole_batch(lengths, rows):
    ids = torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(sum(lengths)))
    targets = ids[:, 1:].clone()
    for row, length in enumerate(lengths):
        targets[row, length:] = -100
    batch = Batch(ids[:, :-1], targets)
    whole, parts = (
        Trainer(made().double(), Numbers(), configured(batch_size=4, micro_batch_size=m))
        for m in (None, rows if 4 % rows == 0 else 1)
    )
    one, two = whole.accumulate(batch)[:2], parts.accumulate(batch)[:2]
    torch.testing.assert_close(one, two)
    assert int(one[1]) == sum(lengths)
    for p, q in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_compact_changes_no_loss(tmp_path):
    texts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    packed = pack_documents(write_shards(texts, tmp_path / "s", Digits()), 8, "one_per_row")
    batch = packed.batch([0, 1, 2])
    short = compact(batch)
    assert short.inputs.shape == (3, 6) and short.document_ids is None
    model = made().double()
    torch.testing.assert_close(
        next_token_objective(model, batch), next_token_objective(model, short)
    )


def test_compact_keeps_masks_that_are_needed(tmp_path):
    packed = pack_documents(write_shards([[1, 2], [3, 4, 5]], tmp_path / "s", Digits()), 8)
    batch = compact(packed.batch([0]))
    assert batch.document_ids is not None and batch.position_ids is not None
    padded_first = Batch(
        *[torch.tensor([[5, 6]])] * 2, torch.tensor([[0, 0]]), torch.tensor([[-1, 0]])
    )
    assert compact(padded_first).document_ids is not None
    empty = Batch(torch.tensor([[5, 6]]), torch.full((1, 2), -100))
    assert compact(empty).inputs.shape == (1, 1)


def test_rows_are_split_in_order_and_none_stays_none():
    batch = Batch(torch.arange(10).view(5, 2), torch.arange(10).view(5, 2))
    parts = list(split_rows(batch, 2))
    assert [len(part.inputs) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert all(part.document_ids is None for part in parts)
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        next(split_rows(batch, 0))


# --- a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 2])
def test_the_trainer_is_a_plain_torch_loop(micro, shards):
    ours, theirs = made().double(), made().double()
    trainer = trainer_of(
        shards,
        ours,
        micro_batch_size=micro,
        n_steps=8,
        warmup=2,
        weight_decay=0.1,
        schedule="linear",
        final=0.0,
    )
    trainer.train()
    vectors = {id(p) for p in theirs.parameters() if p.ndim < 2} | {id(theirs.embedding.weight)}
    groups = [
        {"params": [p for p in theirs.parameters() if id(p) not in vectors], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if id(p) in vectors], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, trainer.schedule)
    for batch, _ in zip(BatchSampler(shards, 4, 8), range(8), strict=False):
        loss = F.cross_entropy(theirs(batch.inputs).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_every_optimizer_and_schedule_lowers_the_loss(optimizer, schedule, shards):
    rate = {"adamw": 0.01, "muon": 0.01, "sgd": 0.1}[optimizer]
    trainer = trainer_of(
        shards, n_steps=30, optimizer=optimizer, schedule=schedule, learning_rate=rate, warmup=2
    )
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate() < before


def test_bfloat16_trains_float32_weights(shards):
    trainer = trainer_of(shards, precision="bfloat16", n_steps=20, learning_rate=0.01)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate() < before
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


class Hesitant(Precision):
    """Finds the gradients unfit at the first attempts, and doubles them meanwhile."""

    NAMES = ("hesitant",)

    def __init__(self, refusals=2):
        super().__init__("hesitant")
        self.refusals, self.attempts, self.losses = refusals, 0, []

    def scaled(self, loss):
        return 2 * loss

    def settle(self, optimizer, loss):
        self.attempts += 1
        self.losses.append(float(loss))
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad /= 2
        return self.attempts > self.refusals

    def numbers(self):
        return {"loss_scale": 2.0}

    def state_dict(self):
        return {"attempts": self.attempts}

    def load_state_dict(self, state):
        self.attempts = state["attempts"]


def test_a_precision_may_scale_losses_and_have_a_batch_repeated(shards, tmp_path):
    settings = {"optimizer": "sgd", "weight_decay": 0.0, "micro_batch_size": 2, "log_every": 1}
    plain = trainer_of(shards, **settings)
    before, updates = [], []

    class Watching(Probe):
        def before_update(self, trainer):
            before.append(all(p.grad is None or not p.grad.any() for p in trainer.parameters))

    config = configured(**settings)
    options = {"probes": [Watching()], "folder": tmp_path, "precision": Hesitant()}
    trainer = Trainer(made(), BatchSampler(shards, 4, 8), config, **options)
    plain.train()
    updates = trainer.train().column("loss_scale")
    assert torch.equal(weights(plain.model), weights(trainer.model))
    assert (trainer.step, trainer.batches.step, trainer.skipped) == (6, 6, 0)
    assert before == [True] * 8  # two attempts more than steps
    assert trainer.precision.losses[0] == trainer.precision.losses[1] == trainer.precision.losses[2]
    assert updates == ([1, 2, 3, 4, 5, 6], [2.0] * 6)
    again = Trainer(
        made(), BatchSampler(shards, 4, 8), config, **options | {"precision": Hesitant()}
    )
    again.resume()
    assert again.precision.attempts == 8
    with pytest.raises(ValueError, match=r"^precision: expected 'hesitant', as in the checkpoint"):
        trainer_of(shards, folder=tmp_path, validate=False, **settings).resume()


def test_a_precision_judges_the_model_and_is_one(shards):
    class Strict(Precision):
        def check(self, model):
            raise ValueError("model: expected another, got this")

    given = made(), BatchSampler(shards, 4, 8), configured()
    with pytest.raises(ValueError, match=r"^model: expected another, got this"):
        Trainer(*given, precision=Strict())
    assert Trainer(*given, precision=Precision("bfloat16")).identity()["precision"] == "bfloat16"
    assert Trainer(*given).identity()["precision"] == "float32"
    with pytest.raises(ValueError, match=r"^name: expected one of float32, bfloat16, got"):
        Precision("float16")


@pytest.mark.usefixtures("untyped")
def test_what_is_no_precision_is_refused(shards):
    with pytest.raises(ValueError, match=r"^precision: expected a Precision, .* got 'float16'"):
        Trainer(made(), BatchSampler(shards, 4, 8), configured(), precision="float16")


def test_a_checkpoint_from_before_there_were_precisions(shards):
    trainer = trainer_of(shards)
    state = trainer.state_dict()
    assert state.pop("precision") == {}
    trainer_of(shards).load_state_dict(state)


class Numbers(ResumableBatches):
    """Batches of another kind than tokens: x, and what y should be."""

    def identity(self):
        return {"what": "numbers"}

    def __getitem__(self, step):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return x, 2 * x.sum(dim=1)


def squares(model, batch):
    x, y = batch
    return (model(x).squeeze(1) - y).square().sum(), len(y)


def test_other_models_batches_and_objectives(tmp_path):
    class Pair(tuple):
        def __new__(cls, *fields):
            return super().__new__(cls, fields)

    class Pairs(Numbers):
        def __getitem__(self, step):
            return Pair(*super().__getitem__(step))

    config = configured(n_steps=200, learning_rate=0.1, weight_decay=0.0, micro_batch_size=2)
    batches = Pairs()
    trainer = Trainer(
        nn.Linear(3, 1),
        batches,
        config,
        objective=squares,
        validation=[batches[999]],
        folder=tmp_path,
    )
    trainer.train()
    assert trainer.evaluate() < 0.01
    torch.testing.assert_close(trainer.model.weight, torch.full((1, 3), 2.0), atol=0.1, rtol=0)


def test_a_batch_of_the_wrong_size_is_refused(shards):
    trainer = Trainer(made(), BatchSampler(shards, 2, 8), configured(batch_size=4))
    with pytest.raises(ValueError, match="batch_size: expected batches of 4 rows, got one of 2"):
        trainer.train()


def test_a_model_without_parameters_is_refused(shards):
    model = made().requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected parameters to train, got none"):
        Trainer(model, BatchSampler(shards, 4, 8), configured())


COMPILED = """
import sys, torch
from torch import nn
from llmbook.batches import BatchSampler, TokenShards
from llmbook.model import ModelConfig, TransformerLM
from llmbook.training import Trainer, TrainingConfig

graphs, compile_ = [], nn.Module.compile
backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # no compiler of C++
nn.Module.compile = lambda module: compile_(module, backend=backend)
shards, trainers = TokenShards(sys.argv[1]), []
for compiled in (False, True):
    torch.manual_seed(0)
    sizes = {"context_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 2}
    model = TransformerLM(ModelConfig(vocab_size=31, **sizes)).double()
    config = TrainingConfig(n_steps=30, batch_size=4, log_every=1, evaluate_every=5,
                            compile=compiled)
    batches = BatchSampler(shards, 4, 8)
    trainers.append(Trainer(model, batches, config, validation=[batches[0]]))
    trainers[-1].train()
for p, q in zip(*[trainer.parameters for trainer in trainers]):
    torch.testing.assert_close(p, q)
plain, compiled = (torch.tensor(t.log.column("stream/1")[1]) for t in trainers)
torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=0)
print(len(graphs))
"""


def test_a_compiled_model_is_trained_to_the_same_weights(tmp_path):
    write_shards([[i % 30 for i in range(400)]], tmp_path / "s", Digits())
    command = [sys.executable, "-c", COMPILED, str(tmp_path / "s")]  # types are not checked there
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 4, "looking at activations compiles nothing anew"
    assert not done.stderr


# --- guards -------------------------------------------------------------------------------------


def poisoned(bad_steps, value):
    """An objective that is ``value`` at some steps, counted by its calls."""
    calls = iter(range(10**6))

    def objective(model, batch):
        total, count = next_token_objective(model, batch)
        return (total * value if next(calls) in bad_steps else total), count

    return objective


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_touches_nothing(value, shards):
    trainer = trainer_of(shards, validate=False, objective=poisoned({2}, value))
    batches = iter(trainer.batches)
    for _ in range(2):
        trainer.train_step(next(batches))
    before, state = weights(trainer.model), trainer.optimizer.state_dict()
    kept = [{k: v.clone() for k, v in s.items()} for s in state["state"].values()]
    trainer.train_step(next(batches))
    assert torch.equal(weights(trainer.model), before)
    now = list(trainer.optimizer.state_dict()["state"].values())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(kept, now, strict=True) for k in a)
    assert (trainer.skipped, trainer.guard.skipped_in_a_row, trainer.step) == (1, 1, 3)
    trainer.train_step(next(batches))
    assert trainer.guard.skipped_in_a_row == 0 and not torch.equal(weights(trainer.model), before)


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(shards):
    trainer = trainer_of(shards, validate=False)
    hook = trainer.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before = weights(trainer.model)
    trainer.train_step(trainer.batches[0])
    assert trainer.skipped == 1 and torch.equal(weights(trainer.model), before)
    hook.remove()


def test_a_batch_without_targets_is_skipped(shards):
    trainer = trainer_of(shards, validate=False)
    batch = trainer.batches[0]
    before = weights(trainer.model)
    trainer.train_step(batch._replace(targets=torch.full_like(batch.targets, -100)))
    assert trainer.skipped == 1 and torch.equal(weights(trainer.model), before)


def test_too_many_skipped_steps_end_training(shards):
    trainer = trainer_of(shards, objective=poisoned(range(9), math.nan), max_skipped=3, n_steps=9)
    with pytest.raises(
        TrainingError, match=r"step 4: 4 steps in a row were skipped, .* loss was nan"
    ):
        trainer.train()


def test_spikes_are_told_from_the_median():
    detector = SpikeDetector(5.0, window=8)
    assert not detector.is_spike(1000.0), "too early to tell"
    for _ in range(8):
        detector.remember(1.0)
    assert detector.is_spike(6.0) and not detector.is_spike(4.9) and detector.is_spike(6.0)
    assert list(detector.recent) == [1.0] * 8, "asking changes nothing"
    assert not SpikeDetector(None).is_spike(1e9)
    with pytest.raises(ValueError, match=r"factor: expected a finite .*, more than 1, got -1.0"):
        SpikeDetector(-1.0)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        SpikeDetector(2.0, window=0)


def test_a_spike_is_skipped(shards):
    trainer = trainer_of(
        shards, validate=False, objective=poisoned({30}, 100.0), spike_factor=10.0, n_steps=40
    )
    trainer.train()
    assert trainer.skipped == 1


# --- evaluation and monitoring ------------------------------------------------------------------


def test_evaluation_is_the_mean_over_targets_not_over_batches(shards):
    batches = [BatchSampler(shards, 4, 8)[0], BatchSampler(shards, 1, 8)[7]]
    batches[1].targets[:, 2:] = -100
    trainer = Trainer(
        made(dropout=0.5).double(), BatchSampler(shards, 4, 8), configured(), validation=batches
    )
    losses = []
    trainer.model.eval()
    for batch in batches:
        logits = trainer.model(batch.inputs).flatten(0, 1)
        losses.append(F.cross_entropy(logits, batch.targets.flatten(), reduction="sum").item())
    trainer.model.train()
    assert trainer.evaluate() == pytest.approx(sum(losses) / (32 + 2), rel=1e-9)
    assert trainer.model.training


def test_evaluation_leaves_out_what_is_only_for_training(shards):
    trainer = trainer_of(shards, z_loss=1.0)
    assert trainer.evaluate() == trainer_of(shards).evaluate()


def test_evaluation_without_data():
    shards_free = Trainer(nn.Linear(3, 1), Numbers(), configured(), objective=squares)
    with pytest.raises(ValueError, match="validation: expected at least one batch"):
        shards_free.evaluate()
    with pytest.raises(ValueError, match="validation: expected batches, as evaluate_every is set"):
        Trainer(nn.Linear(3, 1), Numbers(), configured(evaluate_every=2), objective=squares)
    empty = Batch(torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100))
    trainer = Trainer(made(), Numbers(), configured(), validation=[empty])
    assert math.isnan(trainer.evaluate())


def test_training_does_not_notice_that_it_is_watched(shards):
    def noisy(model):
        return {"noise": torch.rand(()).item() + random.random() + np.random.rand()}

    results = []
    for options in ({"log_every": 1, "evaluate_every": 1, "probes": [noisy]}, {"log_every": 99}):
        seed_everything(3)
        trainer = trainer_of(shards, made(dropout=0.3), **options)
        trainer.train()
        results.append(weights(trainer.model))
    assert torch.equal(*results)


def test_the_log_has_everything(shards, tmp_path):
    trainer = trainer_of(shards, folder=tmp_path, evaluate_every=3)
    trainer.peak = 1e9
    log = trainer.train()
    assert [row["step"] for row in log.rows] == [0, 2, 3, 4, 6]
    names = {"loss", "gradient_norm", "update_ratio", "rate", "skipped", "targets", "mfu"}
    names |= {"tokens_per_second", "memory", "stream/0", "stream/1", "logits", "logits/max"}
    assert names <= log.rows[1].keys() and log.rows[-1]["targets"] == 6 * 32
    assert "validation_loss" in log.rows[0] and "loss" not in log.rows[0]
    assert MetricsLog(tmp_path / "metrics.jsonl").rows == log.rows
    assert log.rows[-1]["mfu"] == pytest.approx(
        training.flops_per_token(trainer.model.config) * log.rows[-1]["tokens_per_second"] / 1e9
    )


def test_the_logged_loss_is_the_mean_since_the_last_row(shards):
    trainer = trainer_of(shards, validate=False, log_every=3)
    reports = []
    step = trainer.train_step
    trainer.train_step = lambda batch: reports.append(step(batch)) or reports[-1]
    _, losses = trainer.train().column("loss")
    each = [report.loss for report in reports]
    assert losses == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-9)


def test_scales_and_ratios():
    model = made()
    ids = torch.tensor([[1, 2, 3]])
    scales = activation_scales(model, ids)  # they are measured in float32
    logits = model(ids)
    assert scales["logits/max"] == pytest.approx(logits.abs().max().item(), rel=1e-4)
    assert scales["logits"] == pytest.approx(logits.square().mean().sqrt().item(), rel=1e-4)
    last = model.blocks[1](
        model.blocks[0](model.embedding(ids), rope=model.rope(torch.arange(3)[None])),
        rope=model.rope(torch.arange(3)[None]),
    )
    assert scales["stream/1"] == pytest.approx(last.square().mean().sqrt().item(), rel=1e-4)
    assert model.training and not model.blocks[0]._forward_hooks
    before = [torch.tensor([3.0, 4.0])]
    assert update_ratio(before, [torch.tensor([3.0, 4.5])]) == pytest.approx(0.1)
    assert update_ratio([torch.zeros(2)], [torch.ones(2)]) == math.inf


def test_speed_and_memory_are_measured():
    assert 1e8 < peak_flops() < 1e14
    assert peak_memory() > 1e7


def test_waiting_for_batches_counts_and_evaluation_does_not(shards, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])

    class Slow(BatchSampler):
        def __getitem__(self, step):
            now[0] += 2.0
            return super().__getitem__(step)

    def probe(model):
        now[0] += 100.0
        return {"probed": 1.0}

    config = configured(n_steps=4, log_every=2, evaluate_every=1)
    trainer = Trainer(made(), Slow(shards, 4, 8), config, probes=[probe])
    update = trainer.update

    def slow_update():
        now[0] += 1.0
        return update()

    trainer.update = slow_update
    assert trainer.train().column("tokens_per_second")[1] == [32 / 3] * 2


def test_unnoticed_restores_everything():
    model = made(dropout=0.5)
    state = random_states()
    with unnoticed(model):
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(3), random.random(), np.random.rand()
    after = random_states()
    assert torch.equal(state["torch"], after["torch"]) and state["numpy"] == after["numpy"]
    assert state["python"] == after["python"] and model.training


# --- logs ---------------------------------------------------------------------------------------


def test_a_log_is_cut_back_and_a_torn_line_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = MetricsLog(path)
    assert again.rows == log.rows
    again.start(2)
    again.write({"step": 3, "loss": math.nan})
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3] and math.isnan(MetricsLog(path).column("loss")[1][-1])
    with pytest.raises(ValueError, match="name: expected one of loss, step, got 'x'"):
        log.column("x")


def test_a_damaged_log_is_read_up_to_the_damage(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.warns(LogWarning, match=r"log.jsonl: line 2 is no row"):
        assert MetricsLog(path).rows == [{"step": 1}]


def test_a_full_disk_does_not_end_training_and_leaves_no_half_line(shards, tmp_path):
    resource = pytest.importorskip("resource")
    trainer = trainer_of(shards, folder=tmp_path, n_steps=8, checkpoint_every=2)
    trainer.train()
    assert list(list_checkpoints(tmp_path)) == [6, 8]
    rest = trainer_of(shards, folder=tmp_path, n_steps=8, checkpoint_every=2)
    (tmp_path / "step-000000008.safetensors").unlink()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 40, hard))
    try:
        with pytest.warns((CheckpointWarning, LogWarning)) as caught:
            rest.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    texts = [str(warning.message) for warning in caught]
    assert any("step-000000008.safetensors: not saved: " in text for text in texts)
    assert any("metrics.jsonl: a row is not written" in text for text in texts)
    assert torch.equal(weights(rest.model), weights(trainer.model))
    assert list(list_checkpoints(tmp_path)) == [6] and not list(tmp_path.glob(".*.part"))
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_tensorboard_gets_the_curves(shards, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(shards, sinks=[TensorBoard(tmp_path)], evaluate_every=2)
    log = trainer.train()
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "validation_loss", "gradient_norm"):
        points = [(e.step, e.value) for e in events.Scalars(name)]
        steps, values = log.column(name)
        assert [step for step, _ in points] == steps
        assert [value for _, value in points] == pytest.approx(values, rel=1e-5)


def test_tensorboard_forgets_steps_that_come_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, rows in ((-1, [(1, 5.0), (2, 4.0), (3, 9.0)]), (2, [(3, 3.0)])):
        sink = TensorBoard(tmp_path)
        sink.start(start)
        for step, loss in rows:
            sink.write({"step": step, "loss": loss})
        sink.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 5.0), (2, 4.0), (3, 3.0)]


def test_the_bar_and_the_plot(shards, capsys):
    plot = LivePlot(("loss", "gradient_norm", "never"))
    trainer = trainer_of(shards, sinks=[ProgressBar(6), plot])
    trainer.train()
    shown = capsys.readouterr()
    assert "6/6" in shown.out and "loss=" in shown.out and not shown.err
    assert [axes.get_ylabel() for axes in plot._figure.axes] == ["loss", "gradient norm"]


def test_sinks_are_closed_when_training_fails(shards):
    class Sink:
        closed = False

        def start(self, step):
            pass

        def write(self, row):
            raise RuntimeError("broken")

        def close(self):
            self.closed = True

    sink = Sink()
    with pytest.raises(RuntimeError, match="broken"):
        trainer_of(shards, sinks=[sink]).train()
    assert sink.closed


# --- checkpoints --------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(VALUES)
@settings(max_examples=60)
def test_a_checkpoint_returns_what_was_saved(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    save_checkpoint(path, {"value": value})
    assert load_checkpoint(path) == {"value": value}


@pytest.mark.parametrize("dtype", list(training._DTYPES.values()))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensors_of_every_kind_keep_their_bits(dtype, shape, tmp_path):
    tensor = torch.randn(shape).mul(50).to(dtype)
    other = tensor.mT if tensor.ndim == 2 else tensor
    save_checkpoint(tmp_path / "c", {"a": tensor, "b": [other, {1: tensor}]})
    loaded = load_checkpoint(tmp_path / "c")
    for found, expected in (
        (loaded["a"], tensor),
        (loaded["b"][0], other),
        (loaded["b"][1][1], tensor),
    ):
        assert found.dtype == dtype and torch.equal(found, expected)


def test_tied_tensors_are_stored_once_and_the_file_is_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    big = torch.randn(1000)
    save_checkpoint(tmp_path / "c.safetensors", {"model": {"a": big, "b": big}})
    assert (tmp_path / "c.safetensors").stat().st_size < 6000
    assert torch.equal(load_file(tmp_path / "c.safetensors")["model/a"], big)


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"a": torch.arange(20.0), "n": 3})
    whole = path.read_bytes()
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"c.safetensors: damaged"):
            load_checkpoint(path)
    for size in (0, 1, 8, 31, 32, 33, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"c.safetensors: "):
            load_checkpoint(path)


def test_a_checkpoint_goes_into_an_open_file_and_comes_out_of_one(tmp_path):
    state = {"a": torch.arange(5.0), "n": 3, "deep": {"b": [torch.ones(2, dtype=torch.int8)]}}
    save_checkpoint(tmp_path / "c", state)
    memory = io.BytesIO()
    save_checkpoint(memory, state)
    assert memory.getvalue() == (tmp_path / "c").read_bytes() and not memory.closed
    memory.seek(0)
    assert str(load_checkpoint(memory)) == str(state)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive, archive.open("c", "w") as file:
        save_checkpoint(file, state)
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive, archive.open("c") as file:
        assert str(load_checkpoint(file)) == str(state)
    with (tmp_path / "two").open("wb") as file:  # after something else
        file.write(b"before")
        save_checkpoint(file, state)
    with (tmp_path / "two").open("rb") as file:
        assert file.read(6) == b"before" and str(load_checkpoint(file)) == str(state)
    with (tmp_path / "two").open("rb") as file, pytest.raises(CheckpointError, match="two: damag"):
        load_checkpoint(file)
    with pytest.raises(ValueError, match="state: a: expected tensors, numbers and texts"):
        save_checkpoint(memory, {"a": object()})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: save_checkpoint(f.open("w"), {}), "path: expected a file that is o"),
        (lambda f: load_checkpoint(f.open("r")), "path: expected a file that is open"),
        (lambda f: save_checkpoint(None, {}), "path: expected a path, got None"),
        (lambda f: load_checkpoint(5), "path: expected a path, got 5"),
        (lambda f: save_checkpoint(f, [1]), r"state: expected a dictionary, got \[1\]"),
        (lambda f: list_checkpoints(None), "folder: expected a path, got None"),
        (lambda f: newest_checkpoint(5), "folder: expected a path, got 5"),
        (lambda f: load_run(f.parent), "folder: expected one with a finished run, got"),
        (lambda f: run({}, f), r"config: expected a RunConfig, got \{\}"),
        (lambda f: report(5), "result: expected what run and pretrained return, got 5"),
        (lambda f: load_or_train(5, {}, print), "name: expected letters, digits"),
        (lambda f: load_or_train("a", {}, 5), "train: expected a function of a folder"),
        (lambda f: pretrained("gpt5"), "name: expected one of tinyworld"),
        (lambda f: compressors("text"), "texts: expected a tuple of texts, got 'text'"),
        (lambda f: compressors(["a"], "b"), "seen: expected a tuple of texts, got 'b'"),
        (lambda f: compressors([b"a"]), r"texts.*: expected .*str.*, got .*b'a'"),
        (lambda f: compressors([]), "texts: expected at least one byte, got none"),
        (lambda f: split_rows([1, 2], 1).__next__(), "batch: expected a tuple of tens"),
        (lambda f: compact(5), "batch: expected a Batch, with inputs and targets, got"),
        (lambda f: next_token_objective(nn.Linear(1, 1), 5), "model: expected a Transf"),
        (lambda f: next_token_objective(made(), 5), "batch: expected a Batch, with in"),
        (lambda f: activation_scales(nn.Linear(1, 1), 5), "model: expected a Transform"),
        (lambda f: documents_score(5, 5, []), "model: expected a TransformerLM, got 5"),
        (lambda f: documents_score(made(), 5, []), "tokenizer: expected a BPETokenizer"),
        (lambda f: load_model_state(made(), 5), "state: expected a state dict, got 5"),
        (lambda f: training.uncompiled(5), "model: expected a module of PyTorch, got 5"),
        (lambda f: training.model_state(5), "model: expected a module of PyTorch, got"),
        (lambda f: peak_flops("tpu9"), "device: expected one of PyTorch's, got 'tpu9'"),
        (lambda f: peak_memory(1.5), "device: expected one of PyTorch's, got 1.5"),
        (lambda f: MetricsLog().write({"loss": 1.0}), "row: expected a step among its numbers"),
        (lambda f: MetricsLog().write({"step": "1"}), r"row.*: expected .*, got .*'1'"),
        (lambda f: ProgressBar(0), "n_steps: expected at least 1, got 0"),
        (lambda f: NotebookBar(0), "n_steps: expected at least 1, got 0"),
        (lambda f: LivePlot("loss"), "names: expected a tuple of texts, got 'loss'"),
        (lambda f: training.Guard(max_skipped=-1), "max_skipped: expected at least 0, got -1"),
        (lambda f: training.Guard(0.5), "spike_factor: expected a finite number, more than 1"),
        (lambda f: SpikeDetector(1.0), "factor: expected a finite number, more than 1, got 1.0"),
        (lambda f: SpikeDetector(2.0, 0), "window: expected at least 1, got 0"),
        (
            lambda f: update_ratio([], []),
            r"after: expected tensors shaped as before, \[",
        ),
        (
            lambda f: update_ratio([torch.ones(2)], [torch.ones(3)]),
            r"after: expected tensors shaped as before, \[\(2,\)\], got \[\(3,\)\]",
        ),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_a_function_cannot_use_is_named(call, message, tmp_path):
    (tmp_path / "f").write_text("text")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the files opened above
        with pytest.raises(ValueError, match=f"^{message}"):
            call(tmp_path / "f")


def test_what_is_no_checkpoint_is_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(CheckpointError, match="missing: no such checkpoint"):
        load_checkpoint(tmp_path / "missing")
    save_file({"a": torch.zeros(40)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="other: damaged"):
        load_checkpoint(tmp_path / "other")
    with pytest.raises(CheckpointError, match="no checkpoint of ours"):
        load_checkpoint(tmp_path)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match="state: a/0: expected tensors, numbers and texts"):
        save_checkpoint(tmp_path / "c", {"a": [object()]})
    with pytest.raises(ValueError, match="state: a: expected one of"):
        save_checkpoint(tmp_path / "c", {"a": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="state: 'checksum': expected another name"):
        save_checkpoint(tmp_path / "c", {"checksum": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save_checkpoint(path, {"n": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"n": 2})
    assert load_checkpoint(path) == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_last_and_the_best_are_kept(shards, tmp_path):
    trainer = trainer_of(
        shards,
        folder=tmp_path,
        n_steps=12,
        checkpoint_every=2,
        evaluate_every=2,
        keep_last=3,
        learning_rate=0.05,
        schedule="constant",
    )
    steps, losses = trainer.train().column("validation_loss")
    assert list(list_checkpoints(tmp_path)) == [8, 10, 12]
    best = min(losses)
    assert trainer.load_best() == steps[losses.index(best)]
    assert trainer.evaluate() == best
    with pytest.raises(
        ValueError, match=r"folder: expected the one with best.safetensors, got None"
    ):
        trainer_of(shards).load_best()


def test_random_states_come_back():
    seed_everything(5)
    np.random.rand(3), torch.randn(1), random.gauss(0, 1)
    states = random_states()
    first = torch.rand(2), np.random.randn(3), random.random()
    set_random_states(states)
    second = torch.rand(2), np.random.randn(3), random.random()
    assert (
        torch.equal(first[0], second[0]) and (first[1] == second[1]).all() and first[2] == second[2]
    )


def test_random_states_of_devices_that_are_not_here_are_passed_over():
    states = random_states()
    torch.rand(3)
    states |= {"cuda": [states["torch"]] * 9 if not torch.cuda.is_available() else states["cuda"]}
    states |= {"mps": states["torch"] if not torch.backends.mps.is_available() else states["mps"]}
    set_random_states(states)
    assert torch.equal(torch.get_rng_state(), states["torch"])


def test_what_was_loaded_is_not_tied_to_its_file(tmp_path):
    path = tmp_path / "c"
    save_checkpoint(path, {"a": torch.ones(5000)})
    loaded = load_checkpoint(path)["a"]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded, torch.ones(5000))


# --- resuming -----------------------------------------------------------------------------------

FAR = {"n_steps": 10, "checkpoint_every": 2, "evaluate_every": 5, "spike_factor": 3.0}


def stop_after(trainer, steps):
    """Let ``trainer`` break off like a crash would."""
    step = trainer.train_step

    def limited(batch):
        if trainer.step == steps:
            raise RuntimeError("power failure")
        return step(batch)

    trainer.train_step = limited
    with pytest.raises(RuntimeError, match="power failure"):
        trainer.train()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon"},
        {"optimizer": "sgd"},
        {"precision": "bfloat16", "prefetch": True},
    ],
)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_run_that_broke_off_ends_with_the_same_bits(options, steps, shards, tmp_path):
    options = {**FAR, **options, "micro_batch_size": 2}
    seed_everything(1)
    whole = trainer_of(shards, made(dropout=0.2), tmp_path / "whole", **options)
    expected = whole.train()
    seed_everything(1)
    stop_after(trainer_of(shards, made(dropout=0.2), tmp_path / "broken", **options), steps)
    seed_everything(1 if steps == 1 else 2)  # before the first checkpoint there is nothing to go by
    again = trainer_of(shards, made(dropout=0.2), tmp_path / "broken", **options)
    log = again.train()
    assert torch.equal(weights(again.model), weights(whole.model))
    times = {"tokens_per_second", "memory"}
    rows = [
        [{k: v for k, v in r.items() if k not in times} for r in some.rows]
        for some in (expected, log)
    ]
    assert rows[0] == rows[1]


def test_prefetching_changes_no_bit_and_counts_what_was_handed_out(shards):
    threads = threading.active_count()
    trainers = [trainer_of(shards, prefetch=prefetch) for prefetch in (False, True)]
    for trainer in trainers:
        trainer.train()
        assert trainer.batches.step == 6
    assert torch.equal(*[weights(trainer.model) for trainer in trainers])
    assert threading.active_count() == threads

    class Broken(BatchSampler):
        def __getitem__(self, step):
            if step == 3:
                raise OSError("the disk is gone")
            return super().__getitem__(step)

    trainer = Trainer(made(), Broken(shards, 4, 8), configured(prefetch=True))
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    assert trainer.step == 3 and trainer.batches.step == 3


def test_a_finished_run_is_not_trained_again(shards, tmp_path):
    first = trainer_of(shards, folder=tmp_path, **FAR)
    rows = list(first.train().rows)
    again = trainer_of(shards, folder=tmp_path, **FAR)
    again.train_step = None
    assert again.train().rows == rows and again.step == 10
    assert torch.equal(weights(first.model), weights(again.model))


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(shards, tmp_path):
    whole = trainer_of(shards, folder=tmp_path, **FAR)
    whole.train()
    damage(tmp_path / "step-000000010.safetensors")
    again = trainer_of(shards, folder=tmp_path, **FAR)
    with pytest.warns(CheckpointWarning, match=r"step-000000010.safetensors: damaged.*one before"):
        again.train()
    assert torch.equal(weights(again.model), weights(whole.model))
    for path in tmp_path.glob("step-*"):
        damage(path)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match="no checkpoint is whole"),
    ):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_another_run_is_not_resumed(shards, tmp_path):
    trainer_of(shards, folder=tmp_path, **FAR).train()
    with pytest.raises(
        ValueError, match=r"learning_rate: expected 0.001, as in the checkpoint, got 0.1"
    ):
        trainer_of(shards, folder=tmp_path, **FAR, learning_rate=0.1).train()
    other = Trainer(
        made(),
        BatchSampler(shards, 4, 8, seed=9),
        configured(**FAR),
        folder=tmp_path,
        validation=[BatchSampler(shards, 4, 8)[0]],
    )
    with pytest.raises(ValueError, match="state: seed: expected 9"):
        other.train()
    wider = trainer_of(shards, made(d_model=32), tmp_path, **FAR)
    with pytest.raises(ValueError, match=r"model.d_ff: expected 48, as in the checkpoint, got 88"):
        wider.train()
    with pytest.raises(ValueError, match=r"model.d_head: expected 8, as in the checkpoint, got 4"):
        trainer_of(shards, made(n_heads=4), tmp_path, **FAR).train()  # the same shapes
    assert wider.step == 0 and wider.batches.step == 0, "refused before anything is taken over"
    trainer_of(shards, folder=tmp_path, **FAR | {"keep_last": 1, "log_every": 5}).train()


def test_a_folder_has_one_trainer_at_a_time(shards, tmp_path):
    outer = trainer_of(shards, folder=tmp_path)
    step = outer.train_step

    def nosy(batch):
        with pytest.raises(TrainingError, match="another process is training there"):
            trainer_of(shards, folder=tmp_path).train()
        return step(batch)

    outer.train_step = nosy
    outer.train()


def test_ctrl_c_finishes_the_step_saves_and_goes_on(shards, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    whole = trainer_of(shards, folder=tmp_path / "a", n_steps=8)
    whole.train()
    stopped = trainer_of(shards, folder=tmp_path / "b", n_steps=8)
    step = stopped.train_step

    def pressed(batch):
        if stopped.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return step(batch)

    stopped.train_step = pressed
    stopped.train()
    assert stopped.interrupted and stopped.step == 5
    assert list(list_checkpoints(tmp_path / "b")) == [5]
    assert signal.getsignal(signal.SIGINT) is handler
    again = trainer_of(shards, folder=tmp_path / "b", n_steps=8)
    again.train()
    assert not again.interrupted and torch.equal(weights(again.model), weights(whole.model))


def test_a_second_ctrl_c_interrupts_at_once(shards):
    trainer = trainer_of(shards)

    def pressed(batch):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    trainer.train_step = pressed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_training_in_a_thread(shards):
    trainer = trainer_of(shards)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.step == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_that_are_killed_end_with_the_same_bits(tmp_path):
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, "-W", "ignore", str(script), "24", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 24 and found["differing bits"] == 0
    assert found["half-written files"] >= 1, "some were killed during a save"


# --- what users extend, each in at most a dozen lines, without private names ----------------------


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(average.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                average.lerp_(p.grad, 1 - group["betas"][1])


def lion(model):
    return Lion(parameter_groups(model, 0.1), lr=1e-3)


class AveragedWeights(Probe):
    def attach(self, trainer):
        self.model = trainer.register("averaged weights", copy.deepcopy(trainer.model))

    def after_step(self, trainer, report):
        if report.taken:
            for mean, p in zip(self.model.parameters(), trainer.model.parameters(), strict=True):
                mean.data.lerp_(p.data, 0.1)

    def evaluate(self, trainer):
        return {"averaged_loss": trainer.scores(self.model)["validation_loss"]}


class NoiseScale(Probe):  # of McCandlish and others (2018), from micro-batches and the whole batch
    def before_update(self, trainer):
        self.squares, self.whole = [], 0.0

    def after_micro_batch(self, trainer, batch, sums):
        last, self.whole = self.whole, torch.cat([p.grad.flatten() for p in trainer.parameters])
        self.squares.append(((self.whole - last) / sums.targets).square().sum())

    def after_step(self, trainer, report):
        n, small = len(self.squares), sum(self.squares) / len(self.squares)
        large = (self.whole / report.targets).square().sum()
        return {"noise_scale": n * (small - large) / (n * large - small)}


def counting(model, batch):
    logits = model(batch.inputs)
    total = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    right = (logits.argmax(-1) == batch.targets).sum()
    return total, (batch.targets != -100).sum(), {"accuracy": right}


EXTENSIONS = (Lion, AveragedWeights, NoiseScale, counting)


@pytest.mark.parametrize("extension", EXTENSIONS, ids=lambda extension: extension.__name__)
def test_an_extension_takes_a_few_lines_and_no_private_name(extension):
    lines = [line for line in inspect.getsource(extension).splitlines() if line.strip()]
    assert len(lines) <= 12, "a dozen with the lines that name class and methods"
    assert not re.search(r"[ .]_[a-z]", "\n".join(lines))


def test_lion_is_its_update_and_resumes_to_the_same_bits(shards, tmp_path):
    model, p = made(), nn.Parameter(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([0.3, -0.1])
    Lion([p], lr=0.1, weight_decay=0.5).step()
    assert p.tolist() == pytest.approx([0.95 - 0.1, -1.9 + 0.1], abs=1e-5)
    whole = trainer_of(shards, model, tmp_path / "whole", **FAR, optimizer_of=lion)
    before = whole.evaluate()
    whole.train()
    assert whole.evaluate() < before
    stop_after(trainer_of(shards, None, tmp_path / "broken", **FAR, optimizer_of=lion), 5)
    again = trainer_of(shards, None, tmp_path / "broken", **FAR, optimizer_of=lion)
    again.train()
    assert torch.equal(weights(again.model), weights(whole.model))


def test_averaged_weights_are_evaluated_saved_and_resumed(shards, tmp_path):
    def trainer(folder):
        probe = AveragedWeights()
        return probe, trainer_of(shards, made(), folder, **FAR, probes=[probe])

    probe, whole = trainer(tmp_path / "whole")
    expected = made()
    step = whole.learn

    def learn(batch):
        report = step(batch)
        for mean, p in zip(expected.parameters(), whole.model.parameters(), strict=True):
            mean.data.lerp_(p.data, 0.1)
        return report

    whole.learn = learn
    log = whole.train()
    assert torch.equal(weights(probe.model), weights(expected))
    assert log.rows[-1]["averaged_loss"] == pytest.approx(
        next_token_objective(expected, whole.validation[0])[0].item() / 32, rel=1e-4
    )
    stop_after(trainer(tmp_path / "broken")[1], 5)
    again, resumed = trainer(tmp_path / "broken")
    resumed.train()
    assert torch.equal(weights(again.model), weights(probe.model))


def test_the_noise_scale_is_that_of_its_definition(shards):
    probe = NoiseScale()
    trainer = trainer_of(shards, made().double(), probes=[probe], micro_batch_size=1)
    batch, model = trainer.batches[0], made().double()
    vectors = []
    for part in split_rows(batch, 1):
        total, count = next_token_objective(model, part)
        gradients = torch.autograd.grad(total / count, list(model.parameters()))
        vectors.append(torch.cat([g.flatten() for g in gradients]))
    trainer.train_step(batch)
    stacked = torch.stack(vectors)
    variance = stacked.var(dim=0).sum()
    square = stacked.mean(dim=0).square().sum() - variance / 4  # without the bias of the noise
    row = trainer.monitor.row()
    assert row["noise_scale"] == pytest.approx(float(variance / square), rel=1e-6)


def test_other_sums_of_the_objective_are_logged_and_tell_the_best(shards, tmp_path):
    best = {"best": "validation_accuracy", "best_is": "highest", "evaluate_every": 2}
    options = {"objective": counting, "n_steps": 12, "learning_rate": 0.05, "log_every": 3}
    trainer = trainer_of(shards, folder=tmp_path, **options, **best, micro_batch_size=2)
    steps, found = trainer.train().column("validation_accuracy")
    assert trainer.checkpoints.best()["step"] == steps[found.index(max(found))]
    assert trainer.checkpoints.best()["value"] == trainer.best == max(found)
    trainer.load_best()
    batch = trainer.validation[0]
    assert trainer.scores()["validation_accuracy"] == max(found)
    right = trainer.model(batch.inputs).argmax(-1) == batch.targets
    assert max(found) == pytest.approx(float(right.float().mean()))
    assert len(trainer.log.column("accuracy")[1]) == 4
    with pytest.raises(ValueError, match="best: expected one of validation_loss, validation_acc"):
        trainer_of(shards, **options, **best | {"best": "bleu"}).train()
    unnamed = trainer_of(shards, **options, **best | {"best": "bleu", "evaluate_every": None})
    with pytest.raises(ValueError, match="best: expected one of validation_loss, validation_acc"):
        unnamed.train()
    assert unnamed.step == 0, "told before the first step, not after the last"


def test_sums_of_the_objective_outlive_a_kill(shards, tmp_path):
    options = FAR | {"objective": counting, "log_every": 5, "checkpoint_every": 1}
    expected = trainer_of(shards, folder=tmp_path / "whole", **options).train()
    stop_after(trainer_of(shards, folder=tmp_path / "broken", **options), 3)
    log = trainer_of(shards, folder=tmp_path / "broken", **options).train()
    assert log.column("accuracy") == expected.column("accuracy")
    assert log.column("loss") == expected.column("loss")


@pytest.mark.parametrize("name", ["NAdam", "RMSprop", "Adagrad"])
def test_an_optimizer_of_torch_by_name(name, shards):
    trainer = trainer_of(shards, n_steps=20, optimizer=name, optimizer_options={"eps": 1e-6})
    assert type(trainer.optimizer) is getattr(torch.optim, name)
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-6}
    assert sorted(group["weight_decay"] for group in trainer.optimizer.param_groups) == [0.0, 0.1]
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate() < before


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "lr_scheduler"])
def test_what_is_no_optimizer_for_a_trainer(name):
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, muon, sgd, or a class"):
        configured(optimizer=name)


def test_options_that_an_optimizer_does_not_have(shards):
    with pytest.raises(ValueError, match="optimizer_options: expected arguments of sgd: "):
        trainer_of(shards, optimizer="sgd", optimizer_options={"temperature": 1.0})
    trainer = trainer_of(shards, optimizer="sgd", optimizer_options={"momentum": 0.5})
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.5


def test_probes_see_every_moment(shards):
    seen = []

    class Watching(Probe):
        def attach(self, trainer):
            seen.append("attach")

        def after_micro_batch(self, trainer, batch, sums):
            assert not sums.loss.requires_grad
            seen.append(("micro", trainer.step, len(batch.inputs), int(sums.targets)))

        def after_step(self, trainer, report):
            seen.append(("step", trainer.step, report.taken, report.skipped))

        def evaluate(self, trainer):
            assert not torch.is_grad_enabled() and not trainer.model.training
            seen.append(("evaluate", trainer.step))
            return {"watched": 1}

    options = {"n_steps": 2, "micro_batch_size": 2, "objective": poisoned({2}, math.nan)}
    trainer = trainer_of(shards, validate=False, probes=[Watching()], **options, evaluate_every=1)
    log = trainer.train()
    assert log.column("watched") == ([0, 1, 2], [1, 1, 1])
    micro = [("micro", step, 2, 16) for step in (0, 0, 1, 1)]
    steps = [("step", 1, True, None), ("step", 2, False, "the loss was nan")]
    looks = [("evaluate", step) for step in (0, 1, 2)]
    assert seen == [
        "attach", looks[0], *micro[:2], steps[0], looks[1], *micro[2:], steps[1], looks[2]
    ]  # fmt: skip


@pytest.mark.parametrize("probe", [Probe])
def test_what_is_no_probe(probe, shards):
    with pytest.raises(ValueError, match="probes: expected probes or functions of the model, got"):
        trainer_of(shards, probes=[probe])


def test_what_cannot_be_registered(shards):
    trainer = trainer_of(shards)
    model = nn.Linear(2, 2)
    assert trainer.register("reference", model) is model
    with pytest.raises(ValueError, match="name: expected one that is not registered yet, got 'ref"):
        trainer.register("reference", model)
    with pytest.raises(ValueError, match=r"thing: expected something with state_dict\(\), got"):
        trainer.register("other", object())
    trainer.train_step(trainer.batches[0])
    with pytest.raises(ValueError, match="name: expected to register before the first step"):
        trainer.register("late", model)


def test_a_step_of_ones_own_with_batches_made_by_the_model_itself(shards, tmp_path):
    class Rewarded(Trainer):
        """As in reinforcement learning: draw, rate, and learn twice, near a reference model."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.reference = self.register("reference", copy.deepcopy(self.model).eval())

        def learn(self, batch, objective=None):
            with torch.no_grad():
                probabilities = self.model(batch.inputs)[:, -1].softmax(-1)
            tokens = probabilities.multinomial(1)[:, 0]
            made = (batch.inputs, tokens, (tokens < 10).float())
            super().learn(made, self.rated)
            return super().learn(made, self.rated)

        def rated(self, model, batch):
            inputs, tokens, rewards = batch
            log_probs = model(inputs)[:, -1].log_softmax(-1)
            chosen = log_probs.gather(1, tokens[:, None])[:, 0]
            with torch.no_grad():
                near = self.reference(inputs)[:, -1].log_softmax(-1)
            gap = (log_probs.exp() * (log_probs - near)).sum(-1)
            loss = -(chosen * (rewards - 0.3)).sum() + 0.01 * gap.sum()
            return loss, len(tokens), {"reward": rewards.sum(), "kl": gap.sum()}

    def trainer(folder, n_steps=60):
        settings = {"batch_size": 16, "learning_rate": 0.01, "log_every": 10, "checkpoint_every": 7}
        config = configured(n_steps=n_steps, **settings, micro_batch_size=8)
        return Rewarded(made(), BatchSampler(shards, 16, 8), config, folder=folder)

    seed_everything(0)
    whole = trainer(tmp_path / "whole")
    rewards = whole.train().column("reward")[1]
    assert rewards[-1] > 1.5 * rewards[0] and whole.step == 60
    assert whole.log.column("kl")[1][-1] > whole.log.column("kl")[1][0]
    seed_everything(0)
    stop_after(trainer(tmp_path / "broken"), 20)
    again = trainer(tmp_path / "broken")
    again.train()
    assert torch.equal(weights(again.model), weights(whole.model))
    torch.testing.assert_close(weights(again.reference), weights(made()))


def test_a_batch_of_any_kind_is_handed_to_the_objective(shards):
    class Texts(Numbers):
        def __getitem__(self, step):
            return {"x": torch.ones(2, 3)}

    def objective(model, batch):
        return model(batch["x"]).square().sum(), 2

    trainer = Trainer(nn.Linear(3, 1), Texts(), configured(), objective=objective)
    first = trainer.train().column("loss")[1]
    assert first[-1] < first[0]


# --- what an extension can do wrong ---------------------------------------------------------------


class Failing(Probe):
    """Measures ``value`` from the fourth step on; before, 1."""

    def __init__(self, value):
        self.value = value

    def evaluate(self, trainer):
        return {"found": self.value if trainer.step >= 4 else 1}


@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_an_evaluation_that_fails_at_the_end_loses_nothing(checkpoint_every, shards, tmp_path):
    options = {"n_steps": 4, "checkpoint_every": checkpoint_every}
    whole = trainer_of(shards, **options)
    whole.train()
    failing = trainer_of(shards, folder=tmp_path, **options, probes=[Failing(torch.ones(2))])
    with pytest.raises(ValueError, match=r"probes: Failing: found: expected a number, got tensor"):
        failing.train()
    again = trainer_of(shards, folder=tmp_path, **options, probes=[Failing(torch.tensor(2.5))])
    log = again.train()
    assert again.step == 4 and torch.equal(weights(again.model), weights(whole.model))
    assert log.column("found") == ([4], [2.5]), "made up for"
    assert (
        trainer_of(shards, folder=tmp_path, **options, probes=[Failing(9)]).train().rows == log.rows
    )


def test_another_best_begins_anew(shards, tmp_path):
    options = {"n_steps": 4, "evaluate_every": 1, "checkpoint_every": 1, "probes": [Failing(7)]}
    stop_after(trainer_of(shards, folder=tmp_path, **options), 2)
    trainer = trainer_of(shards, folder=tmp_path, **options, best="found", best_is="highest")
    trainer.train()
    assert trainer.best == 7 and trainer.checkpoints.best()["metric"] == "found"
    assert trainer.checkpoints.best()["step"] == 4


def test_numbers_of_steps_are_averaged_and_outlive_a_kill(shards, tmp_path):
    class Counting(Probe):
        updates = 0

        def before_update(self, trainer):
            assert all(p.grad is None or not p.grad.any() for p in trainer.parameters)
            self.updates += 1

        def after_step(self, trainer, report):
            return {"step_twice": torch.tensor(2.0 * trainer.step)} if trainer.step % 2 else None

    options = {"n_steps": 6, "log_every": 6, "checkpoint_every": 1}
    stop_after(trainer_of(shards, folder=tmp_path, **options, probes=[Counting()]), 3)
    probe = Counting()
    trainer = trainer_of(shards, folder=tmp_path, **options, probes=[probe])
    assert trainer.train().column("step_twice") == ([6], [6.0])  # of steps 1, 3 and 5
    assert probe.updates == 3


def test_the_rate_of_an_optimizer_of_ones_own_is_logged(shards):
    steps, rates = trainer_of(shards, optimizer_of=lion, log_every=1).train().column("rate")
    schedule = trainer_of(shards).schedule
    assert rates == pytest.approx([1e-3 * schedule(step - 1) for step in steps])


def test_scores_of_another_model_or_of_nothing(shards):
    trainer, other = trainer_of(shards), made().double()
    for p in other.parameters():
        p.data.zero_()
    assert trainer.scores(other)["validation_loss"] == pytest.approx(math.log(VOCABULARY))
    assert other.training and trainer.scores() != trainer.scores(other)
    empty = trainer_of(shards, validate=False)
    assert empty.scores() == {}
    with pytest.raises(ValueError, match="validation: expected at least one batch"):
        empty.evaluate()


def test_a_trainer_of_another_class_is_another_run(shards, tmp_path):
    class Doubled(Trainer):
        pass

    trainer = trainer_of(shards, folder=tmp_path, n_steps=2)
    trainer.train()
    given = (made(), trainer.batches, trainer.config)
    with pytest.raises(ValueError, match=r"trainer class: expected 'Trainer', .*got '.*Doubled'"):
        Doubled(*given, folder=tmp_path).resume()
    state = trainer.state_dict()
    del state["config"]["trainer class"]  # as the first ones were saved
    Doubled(*given).load_state_dict(state)


def test_a_step_of_ones_own_gets_the_batch_on_the_device(shards):
    class Told(Batch):
        def to(self, device):
            moved.append(device)
            return self

    class Own(Trainer):
        def learn(self, batch, objective=None):
            assert moved == [torch.device("cpu")]
            return super().learn(batch, objective)

    moved = []
    Own(made(), BatchSampler(shards, 4, 8), configured()).train_step(
        Told(*BatchSampler(shards, 4, 8)[0])
    )
    assert moved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected a function of the model that returns one, got"),
        ({"optimizer": torch.optim.SGD}, "optimizer: expected a function of the model that"),
        ({"optimizer": AdamW([nn.Parameter(torch.ones(1))])}, "optimizer: expected a function of"),
        ({"validation": Batch(torch.ones(1), torch.ones(1))}, "validation: expected a list of bat"),
        ({"validation": iter(())}, "validation: expected a list of batches, got tuple_iterator"),
        ({"batches": []}, "batches: expected ResumableBatches, .* got list"),
        ({"config": {}}, "config: expected a TrainingConfig, got dict"),
        ({"objective": 5}, "objective: expected a function of a model and a batch, got int"),
        ({"sinks": [print]}, "sinks: expected things that start, write and close, got <built-in"),
        ({"peak": 0.0}, "peak: expected a finite number, more than 0, got 0.0"),
        ({"peak": "1e9"}, "peak: expected a finite number, more than 0, got '1e9'"),
    ],
)
def test_what_a_trainer_cannot_be_given(options, message, shards):
    given = {"batches": BatchSampler(shards, 4, 8), "config": configured()} | options
    # Without the hook of these tests, which refuses wrong types before the trainer can.
    prepare = inspect.unwrap(Trainer.__init__)
    with pytest.raises(ValueError, match=message):
        prepare(object.__new__(Trainer), made(), **given)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.SGD, "optimizer: expected a function of the model that returns one, got type"),
        (lambda model: None, "optimizer: expected a function that returns one of torch.optim, got"),
        (lambda model: AdamW(made().parameters()), "optimizer: expected one .* of another model"),
    ],
)
def test_what_no_function_may_return_as_an_optimizer(optimizer, message, shards):
    with pytest.raises(ValueError, match=message):
        trainer_of(shards, optimizer_of=optimizer)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda loss: loss, "objective: expected a sum, a count, .* got Tensor"),
        (lambda loss: (loss,), "objective: expected a sum, a count, .* got 1 values"),
        (lambda loss: (loss, 2, 3), "objective: expected other sums by name, got int"),
        (lambda loss: (loss[None], 2), r"objective: expected a loss .* got shape \(1,\)"),
        (lambda loss: (loss.item(), 2), "objective: expected a loss .* got float"),
        (lambda loss: (loss.detach(), 2), "objective: expected a loss with a gradient, got one th"),
        (lambda loss: (loss, 2, {"loss": loss}), "objective: expected another name, 'loss' is tak"),
    ],
)
def test_what_an_objective_cannot_return(found, message, shards):
    def objective(model, batch):
        return found(model(batch.inputs).sum())

    with pytest.raises(ValueError, match=message):
        trainer_of(shards, objective=objective).train()


def test_what_a_probe_cannot_return(shards):
    class Stepping(Probe):
        def after_step(self, trainer, report):
            return {"loss": 3.0}

    for probes, message in (
        ([lambda model: None], r"probes: .*<lambda>: expected numbers by name, got None"),
        ([lambda model: {"a": "x"}], "probes: .*: a: expected a number, got 'x'"),
        ([lambda model: {"validation_loss": 1}], "probes: .* another name, 'validation_loss' is"),
        ([Failing(1), Failing(1)], "probes: Failing: expected another name, 'found' is taken"),
        ([Stepping()], "probes: .*Stepping: expected another name, 'loss' is taken"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(shards, probes=probes).train()
    trainer = trainer_of(shards, objective=counting, probes=[lambda model: {"accuracy": 1.0}])
    with pytest.raises(
        ValueError, match="probes: expected names that differ, got 'accuracy' twice"
    ):
        trainer.train()


def test_a_step_of_ones_own_returns_a_report(shards):
    trainer = trainer_of(shards)
    trainer.learn = lambda batch: None
    with pytest.raises(ValueError, match="learn: expected a StepReport, got NoneType"):
        trainer.train()


def test_a_step_without_targets_says_so(shards):
    trainer = trainer_of(shards)
    batch = trainer.batches[0]
    report = trainer.train_step(batch._replace(targets=torch.full_like(batch.targets, -100)))
    assert report.skipped == "there were no targets"


# --- what a run depends on ------------------------------------------------------------------------


class Smoothed(Probe):
    def attach(self, trainer):
        trainer.register("smoothed", nn.Linear(1, 1))


def test_what_differs_from_the_checkpoint_is_named(shards, tmp_path):
    options = {"n_steps": 4, "checkpoint_every": 2}
    trainer_of(shards, folder=tmp_path, **options).train()

    def refused(message, **changes):
        trainer = trainer_of(shards, folder=tmp_path, **options | changes)
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert trainer.step == 0 and torch.equal(before, weights(trainer.model))

    def torch_adamw(model, **changes):
        return torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95))

    def other_betas(model):
        return AdamW(parameter_groups(model, 0.1), 1e-3, (0.9, 0.99))

    def other_rate(model):
        return AdamW(parameter_groups(model, 0.1), 2e-3, (0.9, 0.95))

    refused(
        "optimizer class: expected 'AdamW', as in the checkpoint, got 'Lion'", optimizer_of=lion
    )
    refused(r"optimizer group 0, betas: expected \[0.9, 0.95\].*got \[0.9, 0.99\]",
            optimizer_of=other_betas)  # fmt: skip
    refused("optimizer group 0, lr: expected 0.001, .*got 0.002", optimizer_of=other_rate)
    refused("optimizer group 0, ", optimizer_of=torch_adamw)  # the same name, more settings
    refused("optimizer: expected 'adamw', as in the checkpoint, got 'NAdam'", optimizer="NAdam")
    refused(r"objective: expected 'next_token_objective\(.*\)', as .* got 'counting'",
            objective=counting)  # fmt: skip
    refused(r"registered: expected \[\], as in the checkpoint, got \['smoothed'\]",
            probes=[Smoothed()])  # fmt: skip
    refused("n_steps: expected 4, as in the checkpoint, got 5", n_steps=5)
    trainer_of(shards, folder=tmp_path / "more", probes=[Smoothed()], **options).train()
    with pytest.raises(ValueError, match=r"registered: expected \['smoothed'\], .* got \[\]"):
        trainer_of(shards, folder=tmp_path / "more", **options).train()


def test_settings_of_a_partial_objective_must_agree(shards, tmp_path):
    def scaled(model, batch, weight):
        total, count = next_token_objective(model, batch)
        return weight * total, count

    for weight, message in ((1.0, None), (2.0, r"objective: expected .*scaled\(weight=1.0\)', as")):
        objective = functools.partial(scaled, weight=weight)
        trainer = trainer_of(shards, folder=tmp_path, objective=objective)
        if message is None:
            trainer.train()
        else:
            with pytest.raises(ValueError, match=message):
                trainer.train()


def test_a_checkpoint_of_an_earlier_version_goes_on(shards, tmp_path):
    whole = trainer_of(shards, folder=tmp_path / "whole", **FAR)
    whole.train()
    stop_after(trainer_of(shards, folder=tmp_path / "old", **FAR), 5)
    path = list_checkpoints(tmp_path / "old")[4]
    state = load_checkpoint(path)
    new = {"optimizer_options", "best", "best_is", "objective", "registered", "optimizer class"}
    state["config"] = {
        k: v for k, v in state["config"].items() if k not in new and "optimizer group" not in k
    }
    state["counters"].pop("other_sums")
    state.pop("registered")
    save_checkpoint(path, state)
    with pytest.warns(CheckpointWarning, match="of an earlier version"):
        again = trainer_of(shards, folder=tmp_path / "old", **FAR)
        again.train()
    assert torch.equal(weights(again.model), weights(whole.model))
    save_checkpoint(path, state)
    with (
        pytest.warns(CheckpointWarning, match="of an earlier version"),
        pytest.raises(ValueError, match=r"learning_rate: expected 0.001"),
    ):
        trainer_of(shards, **FAR, learning_rate=0.1).load_state_dict(state)


def test_compiled_runs_resume_plain_and_back(shards, tmp_path):
    plain = trainer_of(shards, folder=tmp_path / "plain", **FAR)
    plain.train()
    compiled = torch.compile(made(), backend="eager")
    first = trainer_of(shards, compiled, tmp_path / "compiled", **FAR)
    first.train()
    names = load_checkpoint(list_checkpoints(tmp_path / "compiled")[10])["model"].keys()
    assert names == made().state_dict().keys()
    for model, folder in ((made(), "compiled"), (torch.compile(made(), backend="eager"), "plain")):
        trainer = trainer_of(shards, model, tmp_path / folder, **FAR)
        assert trainer.resume() == 10 and trainer.load_best() > 0
        trainer.resume()
        assert torch.equal(weights(model), weights(plain.model))
    assert "logits/max" in first.log.rows[-1]
    old = {f"_orig_mod.{name}": value for name, value in plain.model.state_dict().items()}
    model = made()
    load_model_state(model, old)
    assert torch.equal(weights(model), weights(plain.model)), "a file of an earlier version"


def test_the_setting_compile_may_change(shards, tmp_path):
    config = configured(**FAR).to_dict()
    assert config["compile"] is False
    stop_after(trainer_of(shards, folder=tmp_path, **FAR), 5)
    state = newest_checkpoint(tmp_path)
    state["config"]["compile"] = True
    trainer = trainer_of(shards, **FAR)
    trainer.load_state_dict(state)
    assert trainer.step == 4


# --- checkpoints that could not be read back ------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": torch.ones(1)}, "a/b": torch.zeros(1)}, "state: 'a/b': expected names that d"),
        ({"": {1: torch.ones(1), "1": torch.ones(1)}}, "state: '1': expected names that differ"),
        ({"": {"a": torch.ones(1)}, "a": torch.zeros(1)}, "state: 'a': expected names that differ"),
        ({"a": [torch.ones(1)], "a/0": torch.zeros(1)}, "state: 'a/0': expected names that differ"),
        ({"checksum": torch.ones(1)}, "state: 'checksum': expected another name"),
        ({"": {"checksum": torch.ones(1)}}, "state: 'checksum': expected another name"),
        ({"__metadata__": torch.ones(1)}, "state: '__metadata__': expected another name"),
        ({"\ud800": torch.ones(1)}, r"state: '\\ud800': expected another name"),
        ({"a": {(1, 2): 3}}, r"state: a: expected keys that are texts or numbers, got \(1, 2\)"),
        (
            {"": {b"a": 1}},
            "state: the outermost: expected keys that are texts or numbers, got b'a'",
        ),
        ({"a": {math.nan: 1}}, "state: a: expected keys that are texts or numbers, got nan"),
        ({"a": torch.ones(1, device="meta")}, "state: a: expected a dense tensor with values"),
        ({"a": torch.eye(2).to_sparse()}, "state: a: expected a dense tensor with values"),
        ({"a": {1, 2}}, "state: a: expected tensors, numbers and texts"),
    ],
)
def test_what_could_not_be_read_back_is_refused(state, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "c", state)
    assert not list(tmp_path.iterdir())


def test_a_state_that_contains_itself_is_refused(tmp_path):
    state = {"a": 1}
    state["b"] = state
    with pytest.raises(ValueError, match="state: expected an end"):
        save_checkpoint(tmp_path / "c", state)


@pytest.mark.parametrize("key", [1, 1.5, True, None, "", "$tensor", "a/b", "ä", math.inf, -0.0])
def test_keys_that_come_back(key, tmp_path):
    save_checkpoint(tmp_path / "c", {"a": {key: torch.ones(2)}, "b": {key: 3}})
    loaded = load_checkpoint(tmp_path / "c")
    assert list(loaded["a"]) == [key] and type(next(iter(loaded["a"]))) is type(key)
    assert loaded["b"] == {key: 3}


# --- the floor, and bits per byte ---------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return TinyWorld()


@pytest.fixture(scope="module")
def story_tokenizer(world):
    return train_bpe([story.text for story in world.stories(2000, 0)], 1024)


def test_tokens_never_cross_branches(world, story_tokenizer):
    for story in world.stories(50, 5):
        parts = [token for _, text in story.parts for token in story_tokenizer.encode(text)]
        assert parts == story_tokenizer.encode(story.text)


def test_kinds_of_words(world, story_tokenizer):
    cut = functools.lru_cache(maxsize=None)(lambda text: training._cut(story_tokenizer, text))
    for story in world.stories(40, 5):
        kinds = word_kinds(world, story, cut)
        tokens = cut(story.text)
        assert len(kinds) == len(tokens) + 1 and set(kinds) <= set(WORD_KINDS)
        hero = story.parts[1][1].split()[1]
        assert kinds[tokens.index(f" {hero}")] == "who", "the hero's name, where it comes first"
        floors = world.surprises(tokens, cut)
        certain = [f for f, kind in zip(floors, kinds, strict=False) if kind == "certain"]
        assert max(certain) < 1e-9, "what is certain surprises nobody"
        assert sum(kind == "species" for kind in kinds) >= 1


def test_the_gap_of_a_model_that_knows_nothing(world, story_tokenizer):
    stories = list(world.stories(70, 6))
    probe = GapToFloor(world, stories, story_tokenizer)
    size = story_tokenizer.vocab_size
    model = TransformerLM(ModelConfig(**SIZES | {"vocab_size": size, "context_length": 128}))
    nn.init.zeros_(model.lm_head.weight)
    found = probe(model)
    n_tokens = sum(len(story_tokenizer.encode(story.text)) + 1 for story in stories)
    loss = sum(found[f"loss/{kind}"] for kind in WORD_KINDS)
    floor = sum(found[f"floor/{kind}"] for kind in WORD_KINDS)
    assert loss == pytest.approx(n_tokens / len(stories) * math.log(size), rel=1e-4)
    assert floor == pytest.approx(-sum(story.log_prob for story in stories) / len(stories))
    assert found["gap"] == pytest.approx(loss / floor - 1)
    with pytest.raises(ValueError, match="stories: expected at least 1, got 0"):
        GapToFloor(world, [], story_tokenizer)


def test_bits_of_documents(story_tokenizer):
    size = story_tokenizer.vocab_size
    model = TransformerLM(ModelConfig(**SIZES | {"vocab_size": size})).double()
    texts = ["Mia lives in the barn.", "", "One morning, Tom the cat woke up early. " * 3]
    bits, n_bytes = documents_score(model, story_tokenizer, texts)
    assert n_bytes == sum(map(len, texts))
    expected = 0.0
    end = story_tokenizer.special_tokens["<|endoftext|>"]
    for text in texts:
        ids = torch.tensor([[end, *story_tokenizer.encode(text), end]])
        for start in range(0, ids.size(1) - 1, 8):
            piece = ids[:, start : start + 9]
            logits = model.eval()(piece[:, :-1])
            loss = F.cross_entropy(logits[0], piece[0, 1:], reduction="sum").item()
            expected += loss / math.log(2)
    assert bits == pytest.approx(expected, rel=1e-9)
    for batch_tokens in (1, 10):  # in batches of any size
        found = documents_score(model, story_tokenizer, iter(texts), batch_tokens)
        assert found == (pytest.approx(expected, rel=1e-9), n_bytes)


def test_compressors():
    texts = ["the cat sat on the mat. " * 20, "a dog " * 30]
    alone, primed = compressors(texts), compressors(texts, seen=texts)
    n_bytes = sum(map(len, texts))
    joined = "\0".join([*texts, ""]).encode()
    assert alone["gzip"] == pytest.approx(8 * len(gzip.compress(joined, mtime=0)) / n_bytes)
    assert primed["gzip"] < alone["gzip"] and primed["xz"] < alone["xz"]
    with pytest.raises(ValueError, match="texts: expected at least one byte, got none"):
        compressors([""])


# --- configurations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate: expected a finite number, more than 0, got -1.0"),
        (
            {"learning_rate": math.nan},
            "learning_rate: expected a finite number, more than 0, got n",
        ),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number, more than 0, got 0.0"),
        ({"learning_rate": "fast"}, "learning_rate: expected float, got fast"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number, 0 or more, got -0.1"),
        ({"clip_norm": 0.0}, "clip_norm: expected a finite number, more than 0, got 0.0"),
        ({"spike_factor": 1.0}, "spike_factor: expected a finite number, more than 1, got 1.0"),
        ({"n_steps": 0}, "n_steps: expected at least 1, got 0"),
        ({"n_steps": 2.5}, "n_steps: expected int, got 2.5"),
        ({"n_steps": True}, "n_steps: expected int, got True"),
        ({"micro_batch_size": 3}, "micro_batch_size: expected a divisor of batch_size = 4, got 3"),
        ({"micro_batch_size": 0}, "micro_batch_size: expected at least 1, got 0"),
        (
            {"optimizer": "adam"},
            "optimizer: expected one of adamw, muon, sgd, or a class of torch.optim",
        ),
        ({"schedule": "cos"}, "schedule: expected one of cosine, wsd, linear, constant, got 'cos'"),
        (
            {"precision": "float16"},
            r"precision: expected float32 or bfloat16, or .*MixedPrecision\('float16'\), got",
        ),
        ({"precision": "fp8"}, "precision: expected one of float32, bfloat16, got 'fp8'"),
        ({"warmup": 7}, "warmup: expected at most n_steps = 6, got 7"),
        ({"evaluate_every": 0}, "evaluate_every: expected at least 1, got 0"),
        ({"betas": [0.9]}, r"betas: expected a tuple with 2 elements, got \[0.9\]"),
        ({"betas": [0.9, 1.5]}, r"betas\[1\]: expected at least 0 and less than 1, got 1.5"),
        ({"final": 2.0}, "final: expected a share from 0 to 1, got 2.0"),
        ({"final": math.nan}, "final: expected a share from 0 to 1, got nan"),
        ({"seed": 2**32}, r"seed: expected less than 2\*\*32, got 4294967296"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"learning_rat": 0.1}, "learning_rat: no such setting; did you mean learning_rate?"),
        ({"xyz": 0.1}, "xyz: no such setting; there are n_steps, "),
        ({"batch_size": None}, "batch_size: expected a value, but it is missing"),
    ],
)
def test_settings_that_cannot_be(entries, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_dict({"n_steps": 6, "batch_size": 4} | entries)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lr", "did you mean learning_rate?"),
        ("max_steps", "did you mean n_steps?"),
        ("lerning_rate", "did you mean learning_rate?"),
        ("wd", "there are n_steps, batch_size, micro_batch_size"),
    ],
)
def test_the_names_that_other_libraries_use(name, hint):
    message = f"^{re.escape(f'{name}: no such setting; {hint}')}"
    with pytest.raises(TypeError, match=message):
        TrainingConfig(n_steps=1, batch_size=1, **{name: 0.1})
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_dict({"n_steps": 1, "batch_size": 1, name: 0.1})
    with pytest.raises(TypeError, match=message):
        dataclasses.replace(configured(), **{name: 0.1})
    again = pickle.loads(pickle.dumps(configured(learning_rate=0.5)))
    assert again == copy.deepcopy(again) == configured(learning_rate=0.5)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainingConfig)])
@pytest.mark.usefixtures("untyped")
def test_settings_of_a_wrong_kind(name):
    may_be_none = {"micro_batch_size", "adamw_rate", "clip_norm", "evaluate_every"}
    may_be_none |= {"checkpoint_every", "threads", "spike_factor", "parallel"}
    for value in [object(), *([] if name in may_be_none else [None])]:
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            configured(**{name: value})
    if name in may_be_none:
        assert getattr(configured(**{name: None}), name) is None


def test_settings_that_are_not_given_have_their_documented_defaults():
    expected = {
        "micro_batch_size": None, "optimizer": "adamw", "optimizer_options": {},
        "learning_rate": 1e-3, "adamw_rate": None, "weight_decay": 0.1, "betas": (0.9, 0.95),
        "clip_norm": 1.0, "schedule": "cosine", "warmup": 0, "final": 0.1, "z_loss": 0.0,
        "balance_loss": 0.01, "evaluate_every": None, "best": "validation_loss",
        "best_is": "lowest", "log_every": 10, "checkpoint_every": None, "keep_last": 2, "seed": 0,
        "precision": "float32", "compile": False, "threads": None,
        "parallel": None, "prefetch": False, "spike_factor": None, "max_skipped": 20,
    }  # fmt: skip
    assert vars(TrainingConfig(n_steps=1, batch_size=2)) == expected | {
        "n_steps": 1, "batch_size": 2,
    }  # fmt: skip
    assert vars(DataConfig(kind="tinyworld")) == {
        "kind": "tinyworld", "packages": ("stdlib", "numpy", "matplotlib"), "paths": (),
        "n_stories": 20_000, "n_held_out": 400, "held_out": 0.03, "validation_rows": 128,
        "clean": True, "layout": "best_fit",
    }  # fmt: skip
    assert vars(training.TokenizerConfig()) == {
        "vocab_size": 2048, "pattern": "gpt4", "special_tokens": ("<|endoftext|>",), "path": None,
    }  # fmt: skip
    defaults = {
        SpikeDetector.__init__: {"window": 64},
        training.Guard.__init__: {"spike_factor": None, "max_skipped": 20},
        training.Guard.reason_to_skip: {"targets": 1.0},
        training.Checkpointer.__init__: {"keep_last": 2},
        MetricsLog.__init__: {"path": None},
        LivePlot.__init__: {"names": ("loss", "validation_loss")},
        documents_score: {"batch_tokens": 4096},
        compressors: {"seen": ()},
        pretrained: {"name": "tinyworld", "progress": None},
        peak_memory: {"device": "cpu"},
        peak_flops: {"device": "cpu", "dtype": torch.float32},
        next_token_objective: {"z_loss": 0.0, "balance_loss": 0.0},
        run: {"sinks": (), "trainer": Trainer, "probes": (), "say": None},
        load_or_train: {"load": TransformerLM.from_pretrained, "folder": None},
    }
    for function, wanted in defaults.items():
        parameters = inspect.signature(function).parameters.values()
        assert {p.name: p.default for p in parameters if p.default is not p.empty} == wanted


def test_missing_settings_and_numbers_as_yaml_reads_them():
    with pytest.raises(ValueError, match="batch_size: expected a value, but it is missing"):
        TrainingConfig.from_dict({"n_steps": 6})
    config = TrainingConfig.from_dict(
        {"n_steps": 6, "batch_size": 4, "learning_rate": "1e-3", "clip_norm": 1, "betas": [0, 0.9]}
    )
    assert config.learning_rate == 0.001 and config.betas == (0.0, 0.9)
    assert TrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", RUNS)
def test_presets_survive_yaml(name, tmp_path):
    RUNS[name].to_yaml(tmp_path / "run.yaml")
    assert RunConfig.from_yaml(tmp_path / "run.yaml") == RUNS[name]
    assert RUNS[name].model_config(1000).vocab_size == 1000


def edited(**sections):
    entries = RUNS["tinyworld"].to_dict()
    for section, changes in sections.items():
        entries[section] = entries[section] | changes if isinstance(changes, dict) else changes
    return entries


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"n_step": 3}}, "training.n_step: no such setting; did you mean n_steps?"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: expected a finite number"),
        ({"data": {"kind": "web"}}, "data.kind: expected one of tinyworld, documentation"),
        ({"data": {"kind": "files"}}, "data.paths: expected 1 for 'files', got 0"),
        (
            {"data": {"kind": "shards", "paths": ["a"]}},
            "data.paths: expected 2 for 'shards'",
        ),
        (
            {"data": {"kind": "shards", "paths": ["a", "b"]}},
            "tokenizer.path: expected the file that made the shards, got None",
        ),
        ({"data": {"held_out": 1.5}}, "data.held_out: expected a share between 0 and 1, got 1.5"),
        ({"data": {"packages": 3}}, "data.packages: expected tuple or str, got 3"),
        (
            {"tokenizer": {"vocab_size": 100}},
            "tokenizer.vocab_size: expected at least 259",
        ),
        (
            {"tokenizer": {"special_tokens": []}},
            "tokenizer.special_tokens: expected '<",
        ),
        ({"model": {"d_model": 63}}, "model.n_heads: expected a divisor of d_model = 63"),
        ({"model": {"width": 63}}, "model.width: not a field of ModelConfig"),
        (
            {"model": {"vocab_size": 63}},
            "model.vocab_size: follows from the tokenizer",
        ),
        ({"model": 3}, "model: expected settings by name, got 3"),
        ({"optimizer": {}}, "expected the sections data, tokenizer, training, model, got"),
    ],
)
def test_runs_that_cannot_be(sections, message, tmp_path):
    import yaml

    entries = edited(**{k: v for k, v in sections.items() if k != "optimizer"})
    entries |= {"optimizer": {}} if "optimizer" in sections else {}
    with pytest.raises(ValueError, match=message.replace("|", "[|]")):
        RunConfig.from_dict(entries)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(ValueError, match=r"run.yaml: "):
        RunConfig.from_yaml(tmp_path / "run.yaml")


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"none.yaml: No such file"):
        RunConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"bad.yaml: "):
        RunConfig.from_yaml(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match=r"empty.yaml: expected the sections .* got None"):
        RunConfig.from_yaml(tmp_path / "empty.yaml")


# --- runs and artifacts -------------------------------------------------------------------------


def small_run(**sections):
    model = {"context_length": 160, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16}
    changes = {
        "data": {"n_stories": 60, "n_held_out": 8},
        "tokenizer": {"vocab_size": 400, "special_tokens": ["<|endoftext|>"]},
        "training": {"n_steps": 4, "batch_size": 2, "warmup": 0}
        | {"evaluate_every": 2, "checkpoint_every": 1, "log_every": 2},
    }
    entries = edited(**changes)
    entries["model"] = model
    for section, some in sections.items():
        entries[section] |= some
    return RunConfig.from_dict(entries)


def test_a_run_leaves_a_model_and_nobody_notices(tmp_path):
    states, threads = random_states(), torch.get_num_threads()
    result = run(small_run(), tmp_path / "run")
    after = random_states()
    assert torch.equal(states["torch"], after["torch"]) and states["numpy"] == after["numpy"]
    assert torch.get_num_threads() == threads
    assert len(result.held_out) == 8 and not result.model.training
    assert [row["step"] for row in result.log.rows] == [0, 2, 4]
    assert "gap" in result.log.rows[-1] and "mfu" in result.log.rows[-1]
    again = run(small_run(), tmp_path / "run")
    assert torch.equal(weights(again.model), weights(result.model)), "loaded, not trained anew"
    with pytest.raises(ValueError, match=r"training.n_steps: got 5, but .* is of a run with 4"):
        run(small_run(training={"n_steps": 5}), tmp_path / "run")
    numbers = report(result)
    assert numbers["bits per byte"] > 1 and numbers["held-out bytes"] > 1000


def test_a_run_that_could_not_begin_leaves_the_folder_free(tmp_path):
    data = {"kind": "files", "paths": [str(tmp_path / "misspelled")]}
    with pytest.raises(ValueError, match=r"data.paths: no file or folder"):
        run(small_run(data=data), tmp_path / "run")
    assert run(small_run(), tmp_path / "run").log.rows


def test_a_run_takes_a_precision_through_its_trainer(tmp_path):
    made = []

    class Recorded(Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    with_precision = functools.partial(Recorded, precision=Precision("bfloat16"))
    run(small_run(), tmp_path / "run", trainer=with_precision)
    assert made[0].identity()["precision"] == "bfloat16"


def test_the_peak_is_that_of_the_precision(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(training, "peak_flops", lambda *what: asked.append(what) or 1e9)
    run(small_run(training={"precision": "bfloat16"}), tmp_path / "run")
    assert asked == [(training.best_device(), torch.bfloat16)]


def test_a_run_that_was_stopped_goes_on(tmp_path):
    whole = run(small_run(), tmp_path / "whole")

    class Press:
        def start(self, step):
            pass

        def write(self, row):
            if row["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)

        def close(self):
            pass

    with pytest.raises(KeyboardInterrupt):
        run(small_run(), tmp_path / "run", [Press()])
    assert not (tmp_path / "run" / "model").exists()
    result = run(small_run(), tmp_path / "run")
    assert torch.equal(weights(result.model), weights(whole.model))


def test_runs_on_files_and_on_shards(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"The number {number} is in this file. " * 4)
    data = {"kind": "files", "paths": [str(texts)], "held_out": 0.3, "clean": False}
    first = run(small_run(data={**data, "layout": "windows"}), tmp_path / "files")
    assert 0 < len(first.held_out) < 12
    made_data = tmp_path / "files" / "data"
    data = {"kind": "shards", "paths": [str(made_data / "train"), str(made_data / "validation")]}
    tokenizer = {"path": str(made_data / "tokenizer.json")}
    second = run(small_run(data=data, tokenizer=tokenizer), tmp_path / "shards")
    assert second.held_out == [] and second.tokenizer.vocab_size == first.tokenizer.vocab_size
    assert "bits per byte" not in report(second)
    everything = {"kind": "files", "paths": [str(texts)], "held_out": 0.999999, "clean": False}
    with pytest.raises(ValueError, match="held_out: expected a share that leaves some of both"):
        run(small_run(data=everything), tmp_path / "nothing")


def test_documentation_is_cleaned_and_split_by_file(tmp_path):
    data = DataConfig(kind="documentation", packages=("json", "filelock"), held_out=0.3)
    train, held_out = training._train_and_held_out(data, print)
    assert train and held_out and not set(train) & set(held_out)
    assert "\r" not in "".join(train)


def test_a_single_text_file_is_learned_from_and_its_end_held_out(tmp_path):
    text = "".join(f"The number {n} comes after the number {n - 1}.\n" for n in range(1, 400))
    (tmp_path / "input.txt").write_text(text)
    data = {"kind": "files", "paths": str(tmp_path / "input.txt"), "held_out": 0.1, "clean": False}
    said = []
    result = run(small_run(data=data), tmp_path / "run", say=said.append)
    assert len(result.held_out) == 1 and text.endswith(result.held_out[0])
    assert 0.09 < len(result.held_out[0]) / len(text) < 0.11
    assert result.held_out[0].startswith("The number "), "cut at the beginning of a line"
    shards = TokenShards(tmp_path / "run" / "data" / "train", result.tokenizer)
    learned = result.tokenizer.decode(shards[:], skip_special_tokens=True)
    assert learned + result.held_out[0] == text
    assert any("1 documents from 1 files" in line for line in said)
    assert (tmp_path / "run" / "data" / "preparation.txt").read_text().splitlines() == said[:-1]


@pytest.mark.parametrize("n", [2, 3, 40])
def test_of_few_documents_some_are_held_out(n):
    documents = [Document(f"text {i}", id=f"{i}", metadata={"path": "one"}) for i in range(n)]
    train, held_out = training._held_out(documents, 0.01)
    assert train and held_out and sorted(train + held_out) == sorted(d.text for d in documents)
    files = [Document(f"text {i}", id=f"{i}", metadata={"path": str(i % 2)}) for i in range(n)]
    train, held_out = training._held_out(files, 0.01)
    assert {int(text[5:]) % 2 for text in train} == {1 - int(held_out[0][5:]) % 2}
    with pytest.raises(ValueError, match=r"data.held_out: expected a share that leaves some"):
        training._split_text("one", 0.01)


def test_what_is_not_read_dropped_or_masked_is_told(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "program.py").write_text("print('not read')\n" * 9)
    for number in range(12):
        words = f"The letter number {number} is for somebody who lives far away from here. "
        (texts / f"{number}.txt").write_text(
            words * 2 + f"Write to person{number}@example.org soon."
        )
    (texts / "copy.txt").write_text((texts / "1.txt").read_text())
    (texts / "short.txt").write_text("Too short.")
    said = []
    data = {"kind": "files", "paths": [str(texts)], "held_out": 0.3}
    run(small_run(data=data), tmp_path / "run", say=said.append)
    told = "\n".join(said)
    assert "14 documents from 14 files, 0 problems; passed over, by suffix: .py 1" in told
    assert re.search(r"cleaning keeps 12 of 14 documents and \d\d\.\d% of the characters", told)
    assert re.search(r"\n  .*: 1 documents and \d+ characters less\n", told)
    assert re.search(r"failed word_count 1; masked EMAIL 12\b", told)
    assert re.search(r"removing duplicates keeps \d+ documents", told)
    assert "bytes to learn from" in told and "training a tokenizer of 400 tokens" in told
    only = {"kind": "files", "paths": [str(texts / "short.txt")]}
    with pytest.raises(
        ValueError, match=r"data.clean: expected some text after cleaning, got none: "
    ):
        run(small_run(data=only), tmp_path / "nothing")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("pass")
    with pytest.raises(ValueError, match=r"data.paths.*passed over, by suffix: .py 1"):
        run(small_run(data={"kind": "files", "paths": [str(tmp_path / "code")]}), tmp_path / "no")


def test_only_settings_that_no_weight_depends_on_may_change(tmp_path, capsys):
    first = run(small_run(), tmp_path / "run")
    changed = small_run(training={"evaluate_every": 1, "log_every": 1, "keep_last": 1})
    again = run(changed, tmp_path / "run")
    assert torch.equal(weights(again.model), weights(first.model))
    assert RunConfig.from_dict(json.loads((tmp_path / "run" / "run.json").read_text())) == changed
    changed.to_yaml(tmp_path / "run.yaml")
    arguments = (tmp_path / "run.yaml", "--folder", tmp_path / "run")
    assert commanded(*arguments, "--training.evaluate_every", "2") == 0
    assert commanded(*arguments, "--training.learning_rate", "0.5") == 2
    expected = "training.learning_rate: got 0.5, but "
    assert expected in capsys.readouterr().err
    assert commanded(*arguments, "--data.n_stories", "61") == 2
    assert "data.n_stories: got 61, but " in capsys.readouterr().err
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("best", "best_is", "optimizer_options"):
        del settings["training"][name]
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    run(changed, tmp_path / "run")  # a folder of an earlier version


def test_settings_of_training_may_change_until_there_is_a_checkpoint(tmp_path, capsys):
    small_run(training={"best": "gab"}).to_yaml(tmp_path / "run.yaml")
    arguments = (tmp_path / "run.yaml", "--folder", tmp_path / "run")
    assert commanded(*arguments) == 2
    assert "training.best: expected one of validation_loss, gap, " in capsys.readouterr().err
    right = ("--training.best", "gap", "--training.learning_rate", "0.02")
    assert commanded(*arguments, *right) == 0


def test_a_maker_of_trainers_that_makes_none(tmp_path):
    with pytest.raises(ValueError, match="trainer: expected a function that returns a Trainer"):
        run(small_run(), tmp_path / "run", trainer=lambda *given, **options: None)


def test_training_starts_from_a_saved_model(tmp_path):
    first = run(small_run(), tmp_path / "first")
    start = str(tmp_path / "first" / "model")
    entries = small_run(
        training={"n_steps": 1, "learning_rate": 1e-9, "optimizer": "sgd"}
    ).to_dict()
    entries["tokenizer"] = {}
    second = run(
        RunConfig.from_dict(entries | {"model": {"start_from": start}}), tmp_path / "second"
    )
    torch.testing.assert_close(weights(second.model), weights(first.model), atol=1e-5, rtol=0)
    assert not torch.equal(weights(second.model), weights(first.model))
    assert second.tokenizer.vocab_size == first.tokenizer.vocab_size
    config = RunConfig.from_dict(entries | {"model": {"start_from": start}})
    assert config.model_config(1) == first.model.config
    config.to_yaml(tmp_path / "run.yaml")
    assert RunConfig.from_yaml(tmp_path / "run.yaml") == config
    assert "vocab_size:" not in (tmp_path / "run.yaml").read_text()
    missing = {"model": {"start_from": str(tmp_path / "nowhere")}}
    with pytest.raises(ValueError, match=r"model.start_from: expected a folder of a saved model"):
        run(RunConfig.from_dict(entries | missing), tmp_path / "third")
    both = {"model": {"start_from": start, "d_model": 3}}
    with pytest.raises(ValueError, match=r"model.d_model: expected nothing else with start_from"):
        RunConfig.from_dict(entries | both)
    large = train_bpe(["abcdefgh " * 90, "other words entirely"], 420)
    large.save(tmp_path / "large.json")
    config = RunConfig.from_dict(
        entries
        | {"model": {"start_from": start}, "tokenizer": {"path": str(tmp_path / "large.json")}}
    )
    if large.vocab_size > first.model.config.vocab_size:
        with pytest.raises(ValueError, match=r"model.start_from: expected a model of at least"):
            run(config, tmp_path / "fourth")


def test_a_file_explains_its_settings_and_leaves_out_what_is_of_no_use(tmp_path):
    RUNS["documentation"].to_yaml(tmp_path / "run.yaml")
    lines = (tmp_path / "run.yaml").read_text().splitlines()
    assert "  n_steps: 400                        # steps of the optimizer" in lines
    names = [line.split(":")[0].strip() for line in lines]
    assert "packages" in names and "adamw_rate" in names
    assert not {"paths", "n_stories", "n_held_out", "balance_loss"} & set(names)
    settings = [line for line in lines if line.startswith("  ") and "d_model" not in line]
    model = {"context_length", "n_layers", "tie_embeddings", "n_heads"}
    assert all("  # " in s for s in settings if s.split(":")[0].strip() not in model)
    entries = edited(data={"paths": ["odd"]}, training={"optimizer": "adamw", "adamw_rate": 0.5})
    config = RunConfig.from_dict(entries)
    config.to_yaml(tmp_path / "odd.yaml")
    assert RunConfig.from_yaml(tmp_path / "odd.yaml") == config, "what somebody has set is kept"


@pytest.mark.parametrize("kind", [TrainingConfig, DataConfig, training.TokenizerConfig])
def test_every_setting_is_explained(kind):
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        assert re.fullmatch(r".{5,60}", hints[field.name].__metadata__[0])


def test_extensions_reach_a_run_from_a_file(tmp_path):
    probe = AveragedWeights()
    made_by = functools.partial(Trainer, optimizer=lion, objective=counting)
    best = {"best": "validation_accuracy", "best_is": "highest"}
    config = small_run(training={**best, "micro_batch_size": 1})
    config.to_yaml(tmp_path / "run.yaml")
    config = RunConfig.from_yaml(tmp_path / "run.yaml")
    probes = [
        probe,
        NoiseScale(),
        lambda model: {"head": float(model.lm_head.weight.detach().norm())},
    ]
    result = run(config, tmp_path / "run", trainer=made_by, probes=probes)
    names = {"averaged_loss", "head", "gap", "validation_accuracy", "noise_scale"}
    assert names <= result.log.rows[-1].keys()
    state = newest_checkpoint(tmp_path / "run" / "training")
    assert state["config"]["optimizer class"] == "Lion"
    assert state["config"]["objective"] == "counting"
    assert state["registered"].keys() == {"averaged weights"}
    best = load_checkpoint(tmp_path / "run" / "training" / "best.safetensors")
    assert best["metric"] == "validation_accuracy"


def test_load_or_train_trains_once(tmp_path):
    calls = []

    def train(draft):
        calls.append(draft)
        (draft / "result").write_text("42")

    def load(folder):
        return (folder / "result").read_text()

    results = [load_or_train("answer", {"n": 1}, train, load=load, folder=tmp_path) for _ in "ab"]
    assert results == ["42", "42"] and len(calls) == 1
    load_or_train("answer", {"n": 2}, train, load=load, folder=tmp_path)
    assert len(calls) == 2, "other settings, another artifact"
    with pytest.raises(ValueError, match="name: expected letters"):
        load_or_train("../answer", {}, train, load=load, folder=tmp_path)


def test_load_or_train_goes_on_in_the_draft_after_a_crash(tmp_path):
    def train(draft):
        if not (draft / "half").exists():
            (draft / "half").write_text("done")
            raise RuntimeError("crash")
        (draft / "result").write_text((draft / "half").read_text())

    load = lambda folder: (folder / "result").read_text()  # noqa: E731
    with pytest.raises(RuntimeError, match="crash"):
        load_or_train("x", {}, train, load=load, folder=tmp_path)
    assert load_or_train("x", {}, train, load=load, folder=tmp_path) == "done"
    assert not list(tmp_path.glob(".*.draft"))


def test_load_or_train_at_once_from_two_threads_trains_once(tmp_path):
    calls = []

    def train(draft):
        calls.append(draft)
        time.sleep(0.2)

    def ask():
        load_or_train("x", {}, train, load=lambda folder: folder, folder=tmp_path)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_the_hash_knows_the_code(monkeypatch, tmp_path):
    train = training._claim
    first = training._fingerprint({"n": 1}, train)
    assert first == training._fingerprint({"n": 1}, train) != training._fingerprint({"n": 2}, train)
    sources = training._module_sources(["training"])
    assert {"training", "optimization", "model", "attention", "corpus"} <= sources.keys()
    monkeypatch.setattr(training, "_module_sources", lambda names: sources | {"model": "pass"})
    assert first != training._fingerprint({"n": 1}, train)


def test_the_hash_of_documentation_knows_its_versions():
    assert training._versions(RUNS["tinyworld"].data) == {}
    versions = training._versions(RUNS["documentation"].data)
    assert versions.keys() == {"stdlib", "numpy", "matplotlib"}
    assert versions["numpy"] == np.__version__
    assert versions["stdlib"] == ".".join(map(str, sys.version_info[:3]))


def test_where_artifacts_are(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMBOOK_ARTIFACTS", raising=False)
    assert artifacts_folder() == Path(__file__).resolve().parents[1] / "artifacts"
    monkeypatch.setattr(training, "_package_folder", lambda: tmp_path / "llmbook")
    monkeypatch.chdir(tmp_path)
    assert artifacts_folder() == tmp_path / "artifacts"
    monkeypatch.setenv("LLMBOOK_ARTIFACTS", str(tmp_path / "other"))
    assert artifacts_folder() == tmp_path / "other"


def test_pretrained_keeps_what_it_trained(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMBOOK_ARTIFACTS", str(tmp_path))
    monkeypatch.setitem(RUNS, "tinyworld", small_run())
    first, second = pretrained(), pretrained("tinyworld")
    assert torch.equal(weights(first.model), weights(second.model))
    assert len(list(tmp_path.glob("tinyworld-*"))) == 1
    third = load_run(next(tmp_path.glob("tinyworld-*")))
    assert torch.equal(weights(third.model), weights(first.model))
    with pytest.raises(ValueError, match="name: expected one of tinyworld"):
        pretrained("gpt5")


# --- the command line ---------------------------------------------------------------------------


def commanded(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_the_command_line_trains_what_a_file_says(tmp_path, capsys):
    assert commanded("--preset", "tinyworld", "--write", tmp_path / "run.yaml") == 0
    assert RunConfig.from_yaml(tmp_path / "run.yaml") == RUNS["tinyworld"]
    assert commanded("--preset", "gpu", "--write", tmp_path / "run.yaml") == 2
    assert "expected a new file" in capsys.readouterr().err, "what was edited is not overwritten"
    assert commanded("--preset", "gpu", "--write", tmp_path / "new" / "run.yaml") == 0
    small_run().to_yaml(tmp_path / "run.yaml")
    assert commanded(tmp_path / "run.yaml", "--folder", tmp_path / "plain") == 0
    assert not list((tmp_path / "plain").rglob("*tensorboard*")), "curves are written when asked"
    assert not list((tmp_path / "plain").rglob("events.*"))
    capsys.readouterr()
    arguments = (tmp_path / "run.yaml", "--folder", tmp_path / "run", "--tensorboard")
    assert commanded(*arguments) == 0
    shown = capsys.readouterr().out
    assert "4/4" in shown and "bits per byte of xz: " in shown and "gap: " in shown
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert commanded(*arguments) == 0, "a finished run is reported again"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "expected a file CONFIG or a --preset, one of tinyworld"),
        (("--preset", "gpt5"), 2, "preset: expected one of tinyworld"),
        (("nowhere.yaml",), 2, "nowhere.yaml: No such file"),
        (("--bogus",), 2, "bogus: no such setting; there are model, config, preset"),
    ],
)
def test_bad_requests(arguments, code, message, capsys):
    assert commanded(*arguments) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (TrainingError("x"), 1)])
def test_exit_codes(error, code, capsys):
    def fail():
        raise error

    assert training._exit_code(fail) == code
    expected = "stopped; the same command goes on" if code == 130 else "error: x"
    assert capsys.readouterr().err.strip() == expected


def test_ctrl_c_at_the_command_line(monkeypatch, tmp_path, capsys):
    def pressed(config, folder, sinks, say):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run", pressed)
    assert commanded("--preset", "tinyworld", "--folder", tmp_path) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err


def test_settings_are_changed_on_the_command_line(tmp_path, capsys):
    (tmp_path / "input.txt").write_text("One line after another, and so on and on.\n" * 300)
    changes = {"data.kind": "files", "data.paths": tmp_path / "input.txt", "data.clean": "false"}
    changes |= {"data.held_out": 0.1, "tokenizer.vocab_size": 300, "training.n_steps": 2}
    changes |= {
        "training.warmup": 0,
        "training.learning_rate": "1e-3",
        "training.betas": "[0.8, 0.9]",
    }
    changes |= {"training.clip_norm": "null", "model.n_layers": 1, "model.d_model": 32}
    options = [text for name, value in changes.items() for text in (f"--{name}", value)]
    arguments = ("--preset", "tinyworld", *options)
    assert commanded(*arguments, "--write", tmp_path / "run.yaml") == 0
    config = RunConfig.from_yaml(tmp_path / "run.yaml")
    assert config.data.paths == (str(tmp_path / "input.txt"),) and config.data.clean is False
    assert config.training.betas == (0.8, 0.9) and config.training.clip_norm is None
    assert config.training.learning_rate == 0.001 and config.model["d_model"] == 32
    assert config.model["n_heads"] == 4, "what was not given is as in the preset"
    folder = tmp_path / "run"
    assert commanded(tmp_path / "run.yaml", "--folder", folder) == 0
    shown = capsys.readouterr().out
    assert "reading " in shown and "training a tokenizer" in shown
    assert f"The model is in {folder / 'model'}." in shown
    script = "\n".join(
        line[2:] for line in shown[shown.index("The model is in") :].splitlines()[1:]
    )
    exec(script, {})
    assert capsys.readouterr().out.strip()
    more = ("--model.start_from", folder / "model", "--training.seed", "5")
    assert (
        commanded("--preset", "tinyworld", *options[:-4], *more, "--folder", tmp_path / "on") == 0
    )
    assert load_run(tmp_path / "on").model.config.d_model == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--training.n_step", "3"), "training.n_step: no such setting; did you mean n_steps?"),
        (("--training.n_steps", "x"), "training.n_steps: expected int, got x"),
        (("--training.clip_norm", "x"), "training.clip_norm: expected float or nothing, got x"),
        (("--training.n_steps", "0"), "training.n_steps: expected at least 1, got 0"),
        (("--model.d_model", "63"), "model.n_heads: expected a divisor of d_model = 63"),
        (("--model.width", "63"), "model.width: not a field of ModelConfig"),
        (("--model.d_modl", "64"), "model.d_modl: not a field of ModelConfig; did you mean d_mod"),
        (("--trainin.n_steps", "3"), "trainin.n_steps: no such setting; did you mean training?"),
        (("--folder",), "expected one argument"),
    ],
)
def test_bad_overrides(arguments, message, capsys):
    assert commanded("--preset", "tinyworld", *arguments) == 2
    assert message in capsys.readouterr().err


def test_text_that_is_not_there(tmp_path, capsys):
    arguments = ("--data.kind", "files", "--data.paths", tmp_path / "nowhere")
    assert commanded("--preset", "tinyworld", *arguments, "--folder", tmp_path / "run") == 2
    assert "data.paths: no file or folder" in capsys.readouterr().err
    shards = ("--data.kind", "shards", "--data.paths", '["a/b", "a/c"]', "--folder", tmp_path / "s")
    for path, name in ((tmp_path / "no.json", "tokenizer.path"), (__file__, "data.paths")):
        assert commanded("--preset", "tinyworld", *shards, "--tokenizer.path", path) == 2
        assert f"{name}: no file or folder" in capsys.readouterr().err


def test_progress_of_pretrained(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # whoever imported it: no notebook
    monkeypatch.setenv("LLMBOOK_ARTIFACTS", str(tmp_path / "a"))
    monkeypatch.setitem(RUNS, "tinyworld", small_run())
    pretrained(progress=False)
    assert not capsys.readouterr().out
    pretrained(progress=True)
    assert not capsys.readouterr().out, "nothing is trained"
    monkeypatch.setenv("LLMBOOK_ARTIFACTS", str(tmp_path / "b"))
    pretrained(progress=True)
    shown = capsys.readouterr().out
    assert "writing 60 stories" in shown and "4/4" in shown and "training " in shown


def test_progress_in_a_notebook(monkeypatch):
    import IPython.display as shown

    calls = []

    class Handle:
        def update(self, data, raw):
            calls.append(data.keys())

    def display(data, raw, display_id):
        calls.append(data.keys())
        return Handle()

    monkeypatch.setattr(shown, "display", display)
    monkeypatch.setattr(shown, "clear_output", lambda: calls.append("cleared"))
    bar = NotebookBar(10)
    bar.say("reading")
    bar.start(0)
    bar.write({"step": 5, "loss": 2.0})
    bar.close()
    assert calls == [{"image/png"}, {"image/png"}, "cleared"], "once a second at most"


def test_help(capsys):
    assert commanded("--help") == 0
    assert "a run that was stopped goes on" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["<|endoftext|>", (1, "<|endoftext|>"), None])
def test_special_tokens_of_a_run_are_texts(wrong):
    with pytest.raises(ValueError, match=r"^special_tokens: "):
        training.TokenizerConfig(special_tokens=wrong)
