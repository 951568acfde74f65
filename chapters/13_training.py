# %% [markdown]
# # The training loop
#
# > Train a model that can be watched, stopped, killed and resumed, and that ends with the same
# > weights every time.
#
# A model, a stream of batches, a loss, an optimizer: all parts are there, and ten lines join them.
# Then the run begins, and what happens next is not in the ten lines. The batch does not fit into
# memory. One bad batch turns every weight into NaN. The loss climbs on the third night, and nobody
# can say since when. The machine restarts; the file that should hold the model is cut in half. A
# team that trained a model of 175 billion parameters kept a logbook of just such days
# {cite}`zhang2022opt`.
#
# So the loop grows here in visible steps, each for one of these failures. Then we use it twice: on
# the tiny world, whose best possible loss is known, and on real documentation, against programs
# that compress text for a living.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:class}`~llmbook.training.Trainer`, {py:class}`~llmbook.training.TrainingConfig`, {py:class}`~llmbook.training.MetricsLog`, {py:func}`~llmbook.training.save_checkpoint`, {py:func}`~llmbook.training.load_checkpoint`, {py:func}`~llmbook.training.load_or_train`, {py:func}`~llmbook.training.pretrained`, a command line |
# | **You need** | batches ({doc}`07_batches`), the model ({doc}`11_model`), loss and optimizers ({doc}`12_optimization`), the tiny world ({doc}`01_tinyworld`) |
# | **It takes** | 60 minutes for the main line, 2.5 hours for everything, 3 minutes to run |

# %% tags=["remove-cell"]
#| default_exp training

# %%
#| export
import difflib
import gzip
import importlib.metadata
import importlib.util
import io
import json
import lzma
import math
import os
import platform
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from statistics import median
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar
from typing import cast, get_args, get_origin, runtime_checkable


# %% [markdown]
# And from the chapters before:

# %%
#| export
import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from llmbook.batches import Batch, BatchSampler, ResumableBatches, TokenShards
from llmbook.batches import pack_documents, write_shards
from llmbook.cleaning import clean_documents
from llmbook.corpus import Document, read_files
from llmbook.corpus import read_installed_docs, read_jsonl, write_jsonl
from llmbook.deduplication import deduplicate
from llmbook.environment import check_at_least, check_choice, check_fraction, whole_file
from llmbook.environment import whole_directory, requires_extra
from llmbook.environment import best_device, seed_everything
from llmbook.model import ModelConfig, TransformerLM, flops_per_token, save_model
from llmbook.optimization import build_optimizer, chunked_cross_entropy, clip_gradients
from llmbook.optimization import constant_schedule, cosine_schedule, cross_entropy
from llmbook.optimization import linear_schedule, wsd_schedule
from llmbook.tinyworld import Story, TinyWorld
from llmbook.tokenizer import GPT2_PATTERN, GPT4_PATTERN, BPETokenizer, train_bpe


# %% [markdown]
# ## Ten lines
#
# Stories of the tiny world, one in each row, and a model of two small blocks:

# %%
import errno
import subprocess
import tempfile
import unittest.mock

import matplotlib.pyplot as plt

from llmbook.model import count_parameters
from llmbook.optimization import AdamW

plt.style.use("llmbook.book")
torch.set_num_threads(1)
stories = [story.text for story in TinyWorld().stories(2000, 0)]
tokenizer = train_bpe(stories, 1024)
folder = Path(tempfile.mkdtemp())
shards = write_shards(stories, folder / "stories", tokenizer)
rows = pack_documents(shards, 128, "one_per_row")
sampler = BatchSampler(rows, batch_size=8)


def small_model(**changes: Any) -> TransformerLM:
    seed_everything(0)
    sizes = {"context_length": 128, "d_model": 32, "n_layers": 2, "n_heads": 2}
    return TransformerLM(ModelConfig(vocab_size=tokenizer.vocab_size, **sizes | changes))


# %% [markdown]
# And here is training:

# %%
model = small_model()
optimizer = AdamW(model.parameters(), lr=1e-2)
losses = []
for step in range(60):
    batch = sampler[step]
    logits = model(batch.inputs, document_ids=batch.document_ids)
    loss = cross_entropy(logits, batch.targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[0] > 5 and losses[-1] < 3.5
print("the loss has fallen by more than half:", losses[-1] < losses[0] / 2)

# %% [markdown]
# ## A sum and a count
#
# The first number one wants is the loss on text that was not trained on. Two batches of it, one
# full and one with few targets, invite the first mistake: to average the two means.

# %%
full = sampler[100]
short = Batch(*[None if field is None else field[:1, :3] for field in sampler[101]])
with torch.no_grad():
    sums, counts = [], []
    for batch in (full, short):
        logits = model(batch.inputs, document_ids=batch.document_ids)
        sums.append(float(cross_entropy(logits, batch.targets, reduction="sum")))
        counts.append(int((batch.targets != -100).sum()))
of_means = (sums[0] / counts[0] + sums[1] / counts[1]) / 2
of_targets = sum(sums) / sum(counts)
print("targets:", counts[0] > 400, counts[1])
print("the mean of means is off by more than 5 %:", abs(of_means / of_targets - 1) > 0.05)

# %% [markdown]
# Three targets got the same weight as five hundred. So what we pass around is never a mean: an
# {term}`objective` returns a **sum** of losses and the **number** of targets. With the chunked
# loss of {doc}`12_optimization` the logits are never all in memory.

# %%
#| export
#: From a model and a batch to the summed loss of its targets and their number.
Objective = Callable[[nn.Module, Any], tuple[Float[Tensor, ""], Any]]
#: What is measured at once: numbers by name.
Row = Mapping[str, int | float]


def next_token_objective(
    model: nn.Module, batch: Batch, *, z_loss: float = 0.0, balance_loss: float = 0.0
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""]]:
    """Return the loss of predicting each next token, summed, in nats, and the number of targets.

    ``model`` is a ``TransformerLM``. ``z_loss`` is that of ``cross_entropy``; ``balance_loss``
    weighs the balance loss of experts, which counts once for each target; it is no sum over
    targets, so with it micro-batches are only nearly the whole batch.
    """
    lm = cast(TransformerLM, model)
    hidden = lm.hidden_states(
        batch.inputs, position_ids=batch.position_ids, document_ids=batch.document_ids
    )
    weight = lm.lm_head.weight
    total = chunked_cross_entropy(hidden, weight, batch.targets, reduction="sum", z_loss=z_loss)
    count = (batch.targets != -100).sum()
    if balance_loss:
        total = total + balance_loss * lm.balance_loss() * count
    return total, count


# %% [markdown]
# Rows of one story are mostly padding, and a mask of documents has nothing to hide in a row that
# holds a single one: in a causal model nothing looks to the right, where the padding is. Both can
# be left out without changing any loss.


# %%
#| export
def compact(batch: Batch) -> Batch:
    """Return ``batch`` without what no loss depends on.

    That is padding at the end of all rows, and the numbers of documents where each row has one
    document and then padding: the causal mask hides the padding from it.
    """
    used = (batch.targets != -100).any(dim=0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    short: Any = [None if field is None else field[:, :length] for field in batch]
    if batch.document_ids is not None and _is_single(short[3]):
        short[2:] = None, None
    return Batch(*short)


def _is_single(document_ids: Int64[Tensor, "batch sequence"]) -> bool:
    """Whether each row is document 0 and then padding, which is document -1."""
    one = (document_ids <= 0).all() and (document_ids[:, 0] == 0).all()
    return bool(one and (document_ids.diff(dim=1) <= 0).all())


# %% [markdown]
# The losses before and after:

# %%
batch = sampler[0]
before, after = (next_token_objective(model, b) for b in (batch, compact(batch)))
share = compact(batch).inputs.numel() / batch.inputs.numel()
print(
    "same loss:", torch.allclose(before[0], after[0]), " same targets:", bool(before[1] == after[1])
)
print("places left: less than 80 %:", share < 0.8)

# %% [markdown]
# ## A batch that does not fit
#
# The activations of a batch outgrow memory long before the weights do. **Accumulation** cuts a
# batch into $M$ micro-batches and lets gradients add up in `.grad`, as PyTorch does anyway. Is
# that the same? Let micro-batch $m$ have $N_m$ targets with losses $\ell_{mt}$, and
# $N = \sum_m N_m$. Differentiation is linear, so
#
# $$
# \nabla \frac1N \sum_{m=1}^{M} \sum_{t=1}^{N_m} \ell_{mt}
#   = \frac1N \sum_{m=1}^{M} \nabla \sum_{t=1}^{N_m} \ell_{mt} .
# $$ (training-accumulation)
#
# The gradients of the *sums* add up, and one division by the total count ends it. The usual
# shortcut, `(loss / M).backward()` with mean losses, computes
# $\frac1M \sum_m \frac{1}{N_m} \nabla \sum_t \ell_{mt}$, in which a target weighs $1/(M N_m)$: the
# same only if all $N_m$ are equal. With padding or masked prompts they are not. We measure both.


# %%
#| export
def split_rows(batch: Any, rows: int | None) -> Iterator[Any]:
    """Yield micro-batches of at most ``rows`` rows; None leaves the batch whole.

    A batch is a named tuple of tensors with one row for each example, and None where there is
    nothing.
    """
    check_at_least(rows=(1, rows))
    n_rows = len(batch[0])
    for start in range(0, n_rows, rows or n_rows):
        parts = (
            None if field is None else field[start : start + (rows or n_rows)] for field in batch
        )
        yield type(batch)(*parts)


# %% [markdown]
# One batch with uneven rows, cut in four, both ways:


# %%
def gradient(parts: Iterable[Batch], right: bool) -> Tensor:
    parts = list(parts)
    totals = [next_token_objective(model, part) for part in parts]
    n = sum(count for _, count in totals)
    weights = [1 / n if right else 1 / (len(parts) * count) for _, count in totals]
    model.zero_grad()
    sum(w * total for w, (total, _) in zip(weights, totals, strict=True)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


uneven = sampler[0]._replace(targets=sampler[0].targets.clone())
for row in range(6):  # as in instruction tuning, where only answers count
    uneven.targets[row, 4 + row :] = -100
whole = gradient([uneven], right=True)
for name, right in (("sum over count ", True), ("mean of means", False)):
    error = (gradient(split_rows(uneven, 2), right) - whole).norm() / whole.norm()
    print(f"{name}: off by more than 10 %: {bool(error > 0.1)}, below 1e-5: {bool(error < 1e-5)}")

# %% [markdown]
# The first layer of our trainer is {eq}`training-accumulation`, still without the division. The
# whole trainer will be seven such layers ({numref}`fig-training-layers`), one for each need, each
# a class on top of the one before. It needs its settings first.
#
# ```{figure} ../figures/training-layers.svg
# :name: fig-training-layers
# :alt: Seven boxes stacked. From the bottom: gradients, which add up micro-batches; steps, which divide, clip, set the rate and update; guard, which skips steps that are not finite or spike; evaluation; measurements; checkpoints; and the trainer on top, the loop. Beside each box stands the failure that calls for it.
#
# The trainer in seven layers, and the failure that each one is there for.
# ```
#
# ### Settings that are checked
#
# A run that fails after a day because of a typing error in a file is a day lost. So everything
# that decides a run sits in one place, is checked at once, and can be written to a file and read
# back.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class _Settings:
    n_steps: int  # of the optimizer
    batch_size: int  # rows for each of them
    micro_batch_size: int | None = None  # rows in one forward pass, by default all
    optimizer: str = "adamw"  # or muon, sgd
    learning_rate: float = 1e-3  # the peak; with muon, that of the matrices
    adamw_rate: float | None = None  # with muon, that of all else; None: the default there
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)  # of adamw
    clip_norm: float | None = 1.0
    schedule: str = "cosine"  # or wsd, linear, constant
    warmup: int = 0  # steps
    final: float = 0.1  # of the peak, at the end of cosine, wsd and linear
    z_loss: float = 0.0
    balance_loss: float = 0.01  # of experts
    evaluate_every: int | None = None  # steps; None: at the end
    log_every: int = 10
    checkpoint_every: int | None = None  # steps; None: at the end
    keep_last: int = 2
    seed: int = 0  # of weights and order in ``run``; a Trainer is given both
    precision: str = "float32"  # or bfloat16, by autocast
    compile: bool = False
    threads: int | None = None  # of the CPU in ``run``; None: as it is
    prefetch: bool = False  # prepare the next batch in a thread
    spike_factor: float | None = None  # skip steps with a gradient so many times the usual one
    max_skipped: int = 20  # in a row


# %% [markdown]
# The class itself adds the way to files and back.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class TrainingConfig(_Settings):
    """Everything that decides how a model is trained, checked, but for the model and the data.

    Rates are peaks; ``warmup``, ``evaluate_every`` and the like count steps of the optimizer. What
    cannot be raises a ``ValueError`` that names the field, its value and what was expected.
    """

    def __post_init__(self) -> None:
        _check_settings(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "TrainingConfig":
        """Return the configuration with these fields; the inverse of ``to_dict``."""
        return _from_dict(cls, entries)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as numbers, texts and lists, fit for JSON and YAML."""
        return _plain(asdict(self))


# %% [markdown]
# What is checked: counts, choices, shares, amounts.


# %%
#| export
def _check_settings(config: _Settings) -> None:
    counts = {"n_steps": 1, "batch_size": 1, "log_every": 1, "keep_last": 1, "warmup": 0}
    counts |= {"evaluate_every": 1, "checkpoint_every": 1, "max_skipped": 0, "seed": 0}
    check_at_least(**{name: (least, getattr(config, name)) for name, least in counts.items()})
    check_at_least(micro_batch_size=(1, config.micro_batch_size), threads=(1, config.threads))
    if config.batch_size % (config.micro_batch_size or 1):
        expected = f"a divisor of batch_size = {config.batch_size}"
        raise ValueError(f"micro_batch_size: expected {expected}, got {config.micro_batch_size}")
    check_choice("optimizer", config.optimizer, ("adamw", "muon", "sgd"))
    check_choice("schedule", config.schedule, ("cosine", "wsd", "linear", "constant"))
    check_choice("precision", config.precision, ("float32", "bfloat16"))
    for name in ("learning_rate", "adamw_rate", "clip_norm"):
        _check_amount(name, getattr(config, name), above=0.0)
    for name in ("weight_decay", "z_loss", "balance_loss"):
        _check_amount(name, getattr(config, name))
    _check_amount("spike_factor", config.spike_factor, above=1.0)
    for place, beta in enumerate(config.betas):
        check_fraction(f"betas[{place}]", beta)
    if config.seed >= 2**32:
        raise ValueError(f"seed: expected less than 2**32, got {config.seed}")
    if not 0 <= config.final <= 1:
        raise ValueError(f"final: expected a share from 0 to 1, got {config.final}")
    if config.warmup > config.n_steps:
        raise ValueError(
            f"warmup: expected at most n_steps = {config.n_steps}, got {config.warmup}"
        )


# %% [markdown]
# NaN fails every comparison, so an amount is asked first whether it is a finite number.


# %%
#| export
def _check_amount(name: str, value: float | None, above: float | None = None) -> None:
    """Refuse what is negative, infinite or NaN, or not ``above`` what is given."""
    if value is None:
        return
    least = "0 or more" if above is None else f"more than {above:g}"
    number = isinstance(value, int | float) and math.isfinite(value)
    if not number or (value < 0 if above is None else value <= above):
        raise ValueError(f"{name}: expected a finite number, {least}, got {value!r}")


# %% [markdown]
# Files have traps of their own: misspelled names, and `1e-3`, which YAML takes for a text because
# it has no dot.

# %%
#| export
_T = TypeVar("_T")


def _from_dict(kind: Callable[..., _T], entries: Any) -> _T:
    """Build a dataclass from what a file says; a ValueError names what is unknown or wrong."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"expected settings by name, got {entries!r}")
    known = {f.name: f for f in fields(cast(Any, kind))}
    for name in entries.keys() - known.keys():
        close = difflib.get_close_matches(str(name), known, 1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"
        raise ValueError(f"{name}: no such setting{hint}")
    for name, f in known.items():
        if name not in entries and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{name}: expected a value, but it is missing")
    given = {name: _converted(name, value, known[name].type) for name, value in entries.items()}
    return kind(**given)


# %% [markdown]
# A value is taken as the kind that its field says. Integers serve as floats, `1e-3` too; `true` is
# no number.


# %%
#| export
def _converted(name: str, value: Any, kind: Any) -> Any:
    """Return a value of a file as the ``kind`` of its field, or raise a ValueError."""
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if isinstance(value, str) and float in options:  # YAML takes 1e-3 for a text
        with suppress(ValueError):
            return float(value)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list | tuple) and get_origin(options[0]) is tuple:
        return _as_tuple(name, value, get_args(options[0]))
    plain = tuple(get_origin(option) or option for option in options)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        names = " or ".join("nothing" if p is NoneType else p.__name__ for p in plain)
        raise ValueError(f"{name}: expected {names}, got {value!r}")
    return value


# %% [markdown]
# Lists become tuples, since a configuration must not change under a run.


# %%
#| export
def _as_tuple(name: str, values: Sequence[Any], kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    kinds = (kinds[0],) * len(values) if kinds[-1] is Ellipsis else kinds
    if len(values) != len(kinds):
        raise ValueError(f"{name}: expected {len(kinds)} values, got {list(values)}")
    return tuple(_converted(name, value, kind) for value, kind in zip(values, kinds, strict=True))


def _plain(value: Any) -> Any:
    """Tuples as lists, as files have them."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


# %% [markdown]
# Each message names the setting, what it was and what was expected:

# %%
for wrong in ({"learning_rat": 0.1}, {"learning_rate": -1}, {"micro_batch_size": 3}):
    try:
        TrainingConfig.from_dict({"n_steps": 100, "batch_size": 8} | wrong)
    except ValueError as error:
        print(error)

# %% [markdown]
# ### The first layer
#
# `objective` may be anything that returns a sum and a count. `compute` runs it at the precision
# that was asked for; `bfloat16` has a chapter of its own, chapter 15.


# %%
#| export
class _Gradients:
    """The first layer of the trainer: gradients of a batch, in micro-batches."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, objective: Objective | None = None
    ):
        self.model, self.config = model, config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("model: expected parameters to train, got none")
        self.device = self.parameters[0].device
        self.objective = objective or _default_objective(model, config)
        self.score = objective or next_token_objective  # what evaluation adds up

    def compute(self, objective: Objective, batch: Any) -> tuple[Tensor, Any]:
        """Return summed loss and number of targets, at the precision that was asked for."""
        batch = compact(batch) if isinstance(batch, Batch) else batch
        batch = batch.to(self.device) if hasattr(batch, "to") else batch
        bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return objective(self.model, batch)

    def accumulate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Add up the gradients of all micro-batches; return summed loss and number of targets."""
        total, count = torch.zeros((2,), device=self.device).unbind()
        for part in split_rows(batch, self.config.micro_batch_size):
            loss, n_targets = self.compute(self.objective, part)
            loss.backward()
            total, count = total + loss.detach(), count + n_targets
        return total, count


# %% [markdown]
# What the settings ask for is built by the names of {doc}`12_optimization`.


# %%
#| export
def _default_objective(model: nn.Module, config: TrainingConfig) -> Objective:
    experts = getattr(getattr(model, "config", None), "n_experts", 0)
    balance_loss = config.balance_loss if experts else 0.0
    return partial(next_token_objective, z_loss=config.z_loss, balance_loss=balance_loss)


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    decay = {"weight_decay": config.weight_decay, "betas": config.betas}
    name, rate = cast(Any, config.optimizer), config.learning_rate
    return build_optimizer(model, name, rate, adamw_lr=config.adamw_rate, **cast(Any, decay))


def _schedule(config: TrainingConfig) -> Callable[[int], float]:
    if config.schedule == "constant":
        return constant_schedule(warmup=config.warmup)
    make = {"cosine": cosine_schedule, "wsd": wsd_schedule, "linear": linear_schedule}
    return make[config.schedule](config.n_steps, warmup=config.warmup, final=config.final)


# %% [markdown]
# Cut in whatever way, the gradient is the same up to rounding:

# %%
gradients = {}
for micro in (None, 4, 2, 1):
    config = TrainingConfig(n_steps=1, batch_size=8, micro_batch_size=micro)
    layer = _Gradients(small_model(), config)
    total, count = layer.accumulate(uneven)
    gradients[micro] = torch.cat([p.grad.flatten() for p in layer.parameters]) / count
errors = [(g - gradients[None]).norm() / gradients[None].norm() for g in gradients.values()]
print("largest relative difference below 1e-5:", bool(max(errors) < 1e-5))

# %% [markdown]
# ## A step
#
# The second layer divides by the count, clips, sets the rate and updates. Loss, norm and count are
# fetched from the device together: on a GPU each `.item()` waits until all queued work is done, so
# there is one wait in a step and not one in each micro-batch.


# %%
#| export
class _Steps(_Gradients):
    """The second layer: one step of the optimizer, with a clipped gradient and a scheduled rate."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, objective: Objective | None = None
    ):
        super().__init__(model, config, objective)
        self.step = 0  # how many were taken
        self.optimizer, self.schedule = _optimizer(model, config), _schedule(config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def train_step(self, batch: Any) -> dict[str, float]:
        """Learn from one batch; return its mean loss, the norm of the gradient, the targets."""
        self.optimizer.zero_grad()
        total, count = self.accumulate(batch)
        if gradients := [p.grad for p in self.parameters if p.grad is not None]:
            torch._foreach_div_(gradients, count)  # from the sum over all targets to the mean
        norm = clip_gradients(self.parameters, self.config.clip_norm or math.inf)
        numbers = torch.stack([total / count, norm.to(total), count]).tolist()  # waits for a GPU
        report = dict(zip(("loss", "gradient_norm", "targets"), numbers, strict=True))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(self.step)
        self.step += 1
        self.update(report)
        return report

    def update(self, report: dict[str, float]) -> None:
        """Change the weights."""
        self.optimizer.step()


# %% [markdown]
# ## Steps that do harm
#
# One overflow in 16 bits, and the loss is NaN. So are then all gradients, the weights that have
# one, and Adam's two averages, for good. It takes a single step:


# %%
def poisoned_at(step: int, factor: float) -> Objective:
    calls = iter(range(1_000_000))

    def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        total, count = next_token_objective(model, batch)
        return (total * factor if next(calls) == step else total), count

    return objective


config = TrainingConfig(n_steps=100, batch_size=8, learning_rate=1e-2)
layer = _Steps(small_model(), config, poisoned_at(2, math.nan))
for step in range(3):
    layer.train_step(sampler[step])
print("NaN in every matrix and vector:", all(bool(p.isnan().any()) for p in layer.parameters))

# %% [markdown]
# A step that is not finite must not be taken: weights and optimizer stay as they were, the
# schedule goes on, and the step is *counted*. Many in a row mean that the run is dead, and it
# should say so.
#
# A finite step can do harm as well. A batch of garbage makes a gradient many times the usual one.
# Clipping limits its length, not its direction, and Adam's memory of squared gradients is inflated
# for $1/(1 - \beta_2)$ steps. PaLM's authors met **spikes** of the loss some twenty times, though
# they clipped, and each time went back a hundred steps and passed over a few hundred batches
# {cite}`chowdhery2023palm`. We look
# *before* the step: a norm far above the median of the last 64 is refused. The median, unlike the
# mean, is not moved by the very outliers that we look for.


# %%
#| export
class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and why."""


class SpikeDetector:
    """Tells a gradient norm ``factor`` times the median of the last ``window`` ones it accepted.

    It says nothing before it has seen a quarter of the window; a ``factor`` of None never does.
    """

    def __init__(self, factor: float | None, window: int = 64):
        _check_amount("factor", factor, above=1.0)
        check_at_least(window=(1, window))
        self.factor, self.recent = factor, deque[float](maxlen=window)

    def is_spike(self, norm: float) -> bool:
        """Judge ``norm``, and remember it if it is none."""
        if self.factor is None:
            return False
        ready = 4 * len(self.recent) >= cast(int, self.recent.maxlen)
        spike = ready and norm > self.factor * median(self.recent)
        if not spike:
            self.recent.append(norm)
        return spike


# %% [markdown]
# The third layer puts the question before each update.


# %%
#| export
class _Guarded(_Steps):
    """The third layer: steps that would do harm are skipped and counted."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, objective: Objective | None = None
    ):
        super().__init__(model, config, objective)
        self.spikes, self.skipped, self.skipped_in_a_row = SpikeDetector(config.spike_factor), 0, 0

    def reason_to_skip(self, report: Row) -> str | None:
        """Say why the step that ``report`` is of should not be taken, or None."""
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(report[name]):
                return f"the {name.replace('_', ' ')} was {report[name]}"
        norm, factor = report["gradient_norm"], self.spikes.factor
        spike = self.spikes.is_spike(norm)
        return f"the gradient norm was {norm:.3g}, {factor} times the usual" if spike else None

    def update(self, report: dict[str, float]) -> None:
        """Change the weights, unless there is a reason not to."""
        reason = self.reason_to_skip(report)
        if reason is None:
            super().update(report)
        self.skipped += reason is not None
        self.skipped_in_a_row = 0 if reason is None else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.config.max_skipped:
            row = f"{self.skipped_in_a_row} steps in a row were skipped"
            raise TrainingError(f"step {self.step}: {row}, the last because {reason}")


# %% [markdown]
# Thirty good batches, then one that is NaN, infinite, or a thousand times too large:

# %%
config = TrainingConfig(n_steps=100, batch_size=8, learning_rate=1e-2, spike_factor=10.0)
for factor in (math.nan, math.inf, 1000.0):
    layer = _Guarded(small_model(), config, poisoned_at(30, factor))
    for step in range(30):
        layer.train_step(sampler[step])
    before = [p.detach().clone() for p in layer.parameters]
    layer.train_step(sampler[30])
    same = all(torch.equal(a, b) for a, b in zip(before, layer.parameters, strict=True))
    print(f"factor {factor}: skipped {layer.skipped}, weights untouched: {same}")

# %% [markdown]
# ## To look without touching
#
# Evaluation must change nothing. Dropout is off in it, gradients are not recorded, and one more
# trap is shut: whoever draws a random number while looking shifts all those of the training that
# follows. So the generators of Python, NumPy and PyTorch are set back.


# %%
#| export
def random_states() -> dict[str, Any]:
    """Return the states of all global random generators: of Python, NumPy, PyTorch."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    inner = numpy_state["state"] | {"key": numpy_state["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": numpy_state | {"state": inner},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set all global random generators to what ``random_states`` returned, as far as they exist."""
    random.setstate(states["python"])
    inner = states["numpy"]["state"]
    key = np.array(inner["key"], np.uint32)
    np.random.set_state({**states["numpy"], "state": {**inner, "key": key}})  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    if states["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


# %% [markdown]
# Everything that looks at the model does so inside this block.


# %%
#| export
@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """Evaluate in here and training goes on as if nobody had looked.

    There is no dropout and no gradient, and all random generators are set back.
    """
    was_training, states = model.training, random_states()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        set_random_states(states)


# %% [markdown]
# The fourth layer adds up sums and counts over all validation batches. A **probe** measures
# something else at the same moments; the gap to the floor will be one.


# %%
#| export
class _Evaluated(_Guarded):
    """The fourth layer: how good the model is on text that it does not learn from."""

    validation: Sequence[Any] | None = None
    probes: Sequence[Callable[[nn.Module], Row]] = ()

    def evaluate(self) -> float:
        """Return the mean loss over all targets of the validation batches, in nats.

        A ``ValueError`` if there are no batches, NaN if they have no targets.
        """
        if not self.validation:
            raise ValueError("validation: expected at least one batch to evaluate on, got none")
        total, count = 0.0, 0
        with unnoticed(self.model):
            for batch in self.validation:
                loss, n_targets = self.compute(self.score, batch)
                total, count = total + float(loss), count + int(n_targets)
        return total / count if count else math.nan

    def evaluation(self) -> dict[str, float]:
        """Return what is logged of an evaluation: the loss, and what the probes say."""
        row = {"validation_loss": self.evaluate()} if self.validation else {}
        with unnoticed(self.model):
            for probe in self.probes:
                row |= probe(self.model)
        return row


# %% [markdown]
# ## What to watch
#
# The loss says late that something is wrong, and never what. These say more.
#
# | logged | what it is | rough alarm |
# |---|---|---|
# | `gradient_norm` | length of the whole gradient before clipping | climbs for hundreds of steps |
# | `update_ratio` | $\lVert \Delta\theta \rVert / \lVert \theta \rVert$ of one step | far above $10^{-2}$, or below $10^{-5}$ before the end |
# | `stream/0`, … | root-mean-square of what a block hands on, for one row | keeps growing |
# | `logits/max` | largest logit in absolute value | keeps growing: the case for a z-loss |
# | `tokens_per_second`, `mfu` | targets a second; share of the machine's arithmetic | falls |
# | `memory`, `skipped` | peak memory; steps not taken | climb |
#
# Instabilities of large models can be provoked in small ones by a high rate, and some foretold
# from the norms of activations and gradients {cite}`wortsman2024proxies`. MFU, **model FLOPs
# utilization** {cite}`chowdhery2023palm`, is the arithmetic that the model needs,
# `flops_per_token` of {doc}`11_model` times tokens per second, over what the machine could do at
# best. That peak we measure with a large matrix product of the same precision.


# %%
#| export
@torch.no_grad()
def activation_scales(model: nn.Module, ids: Int64[Tensor, "batch sequence"]) -> dict[str, float]:
    """Return how large the numbers are inside a ``TransformerLM`` that reads ``ids``.

    "stream/0" and so on are the root-mean-square of what each block hands on, "logits" that of
    the logits, "logits/max" the largest of them in absolute value.
    """
    scales: dict[str, Tensor] = {}

    @torch.compiler.disable  # in a compiled model it would be compiled, once for each layer
    def measure(layer: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        scales[f"stream/{layer}"] = output.float().square().mean().sqrt()

    hooks = [
        block.register_forward_hook(partial(measure, layer))
        for layer, block in enumerate(cast(Any, model).blocks)
    ]
    was_training = model.training
    try:
        logits = model.eval()(ids).float()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    scales |= {"logits": logits.square().mean().sqrt(), "logits/max": logits.abs().max()}
    return dict(zip(scales, torch.stack(list(scales.values())).tolist(), strict=True))


# %% [markdown]
# Peaks: of arithmetic, and of memory.


# %%
#| export
@cache
def peak_flops(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return the operations a second of the fastest large matrix product, measured once here."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)  # draws no random number
    fastest = math.inf
    for _ in range(6):  # the first warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits until it is there
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def peak_memory(device: torch.device | str = "cpu") -> float:
    """Return the most bytes that this process has held, on a GPU those of tensors; or NaN."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


# %% [markdown]
# The update ratio wants the weights of before, so it costs a copy on the steps that are logged.


# %%
#| export
def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the norm of the change of all weights over the norm of the weights before it."""
    changes = torch._foreach_norm(torch._foreach_sub(list(after), list(before)))
    norms = torch._foreach_norm(list(before))
    both = (torch.linalg.vector_norm(torch.stack(n)).item() for n in (changes, norms))
    change, norm = both
    return change / norm if norm else math.inf


# %% [markdown]
# ### Where numbers go
#
# A {term}`sink` takes rows of numbers. The first writes **JSON lines**: text that any tool reads,
# to which a line is appended in one piece. After a kill some rows belong to steps that come again;
# `start` cuts them off, so that no step is there twice.


# %%
#| export
@runtime_checkable
class Sink(Protocol):
    """Where a trainer sends what it measures, as rows of numbers by name, "step" among them."""

    def start(self, step: int) -> None:
        """Training goes on after ``step`` steps, or begins (-1): forget rows of later ones."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Training has stopped."""


# %% [markdown]
# The log of a run: rows in memory, and in the file.


# %%
#| export
class MetricsLog:
    """Rows of numbers by name, in memory and, if there is a ``path``, in a file of JSON lines.

    >>> log = MetricsLog()
    >>> log.write({"step": 10, "loss": 3.5})
    >>> log.column("loss")
    ([10], [3.5])
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self.rows = [] if self.path is None else _read_rows(self.path)

    def start(self, step: int) -> None:
        """Drop the rows of later steps, which will come again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if self.path is not None and self.path.exists():
            _write_rows(self.path, self.rows)

    def write(self, row: Row) -> None:
        """Add a row; a line is written whole or, when the disk is full, not at all."""
        self.rows.append(dict(row))
        if self.path is not None:
            _append_row(self.path, row)

    def close(self) -> None:
        """Do nothing: the file has all rows already."""

    def column(self, name: str) -> tuple[list[int], list[int | float]]:
        """Return the steps that have a value called ``name``, and the values."""
        there = sorted({key for row in self.rows for key in row})
        if name not in there:
            raise ValueError(f"name: expected one of {', '.join(there)}, got {name!r}")
        rows = [row for row in self.rows if name in row]
        return [int(row["step"]) for row in rows], [row[name] for row in rows]


# %% [markdown]
# A line that was cut off in the middle has no newline at its end, and is left out. When the disk
# is full a row is given up, with a warning; a missing point in a curve is no reason to lose a run.


# %%
#| export
class LogWarning(UserWarning):
    """A row of a log could not be written, or not be read."""


def _read_rows(path: Path) -> list[Row]:
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was cut off
        try:
            row = json.loads(line)
            rows.append({str(name): value for name, value in row.items()})
            int(row["step"])
        except (AttributeError, KeyError, TypeError, ValueError):
            message = f"{path}: line {number} is no row of a log; what follows it is left out"
            warnings.warn(message, LogWarning, stacklevel=4)
            return rows[: number - 1]
    return rows


# %% [markdown]
# Appending bypasses Python's buffer, so that a line reaches the system whole.


# %%
#| export
def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with whole_file(path) as draft:
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _append_row(path: Path, row: Row) -> None:
    line = json.dumps(dict(row)).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            whole = file.write(line) == len(line)
            reason = "the disk took only a part of it"
        except OSError as error:
            whole, reason = False, str(error)
        if not whole:
            file.truncate(end)
            warnings.warn(f"{path}: a row is not written: {reason}", LogWarning, stacklevel=3)


# %% [markdown]
# The second sink speaks TensorBoard's format, whose `purge_step` does what our `start` does. The
# third is a bar of `tqdm` for the command line.


# %%
#| export
class TensorBoard:
    """A sink that writes curves into ``folder``; see them by ``tensorboard --logdir folder``."""

    def __init__(self, folder: str | Path):
        self.folder, self._writer = Path(folder), cast(Any, None)

    def start(self, step: int) -> None:
        """Open a file of events that replaces those of later steps."""
        with requires_extra("TensorBoard", extra="train"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Add a point to the curve of each name."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()


# %% [markdown]
# The bar writes to standard output and knows where a resumed run begins.


# %%
#| export
class ProgressBar:
    """A sink that shows a bar of ``n_steps`` on standard output, with the last loss."""

    def __init__(self, n_steps: int):
        self.n_steps, self._bar = n_steps, cast(Any, None)

    def start(self, step: int) -> None:
        """Show the bar, filled up to ``step``."""
        from tqdm import tqdm

        self._bar = tqdm(total=self.n_steps, initial=max(step, 0), unit="step", file=sys.stdout)

    def write(self, row: Row) -> None:
        """Fill it further."""
        self._bar.update(int(row["step"]) - self._bar.n)
        shown = {name: row[name] for name in ("loss", "validation_loss") if name in row}
        if shown:
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})

    def close(self) -> None:
        """Leave the bar as it is, and end its line."""
        if self._bar is not None:
            self._bar.close()


# %% [markdown]
# The fourth draws in the notebook while training goes on: one figure, replaced again and again.


# %%
#| export
class LivePlot:
    """A sink that draws the columns ``names`` in the notebook, anew with each row that has one."""

    def __init__(self, names: Sequence[str] = ("loss", "validation_loss")):
        self.names, self.log = tuple(names), MetricsLog()
        self._figure = self._shown = cast(Any, None)

    def start(self, step: int) -> None:
        """Open the figure."""
        with requires_extra("A plot in a notebook", extra="book"):
            import matplotlib.pyplot as plt
            from IPython.display import display
        self.log.start(step)
        self._figure = plt.figure()
        self._shown = display(_picture(self._figure), display_id=True)
        plt.close(self._figure)  # else the notebook shows it a second time

    def write(self, row: Row) -> None:
        """Draw the figure again with this row."""
        self.log.write(row)
        if any(name in row for name in self.names):
            plot_columns(self.log, self.names, self._figure)
            if self._shown is not None:  # outside of a notebook there is no handle
                self._shown.update(_picture(self._figure))

    def close(self) -> None:
        """Leave the figure as it is."""


# %% [markdown]
# Each column gets a panel of its own.


# %%
#| export
def plot_columns(log: MetricsLog, names: Sequence[str], figure: Any) -> None:
    """Draw columns of ``log`` against steps, one above the other, into a matplotlib ``figure``."""
    figure.clear()
    there = [name for name in names if any(name in row for row in log.rows)]
    axes = cast(Any, None)
    for place, name in enumerate(there):
        axes = figure.add_subplot(len(there), 1, place + 1, sharex=axes)
        axes.plot(*log.column(name), marker="o", markersize=2.5)
        axes.set_ylabel(name.replace("_", " "), fontsize="small")
    if there:
        axes.set(xlabel="step")
        figure.align_ylabels()


def _picture(figure: Any) -> Any:
    """What a notebook can show, and replace."""
    from IPython.display import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image(buffer.getvalue())


# %% [markdown]
# The fifth layer measures the update of the steps that are logged; only these pay for it. The loss
# that is logged is the mean over all targets since the last row. The clock runs while a step waits
# for its batch, and stands still while we look.


# %%
#| export
class _Measured(_Evaluated):
    """The fifth layer: what is logged of the steps."""

    peak: float | None = None  # operations a second
    loss_sum = target_sum = all_targets = 0.0  # since the last row of the log; since the beginning
    seconds = recent_targets = 0.0  # since the last row, and since this process began
    clock: float | None = None  # when the work on the step before had ended

    def is_due(self, every: int | None) -> bool:
        """Whether what is done ``every`` so many steps, and at the end, is done after this one."""
        last = self.step == self.config.n_steps
        return last or (every is not None and self.step % every == 0)

    def train_step(self, batch: Any) -> dict[str, float]:
        """Learn from one batch, and add it to the sums."""
        start = self.clock or time.perf_counter()  # so waiting for the batch counts
        report = super().train_step(batch)
        self.clock = time.perf_counter()
        self.seconds += self.clock - start
        if math.isfinite(report["loss"]):
            self.loss_sum += report["loss"] * report["targets"]
            self.target_sum += report["targets"]
        self.all_targets += report["targets"]
        self.recent_targets += report["targets"]
        return report

    def update(self, report: dict[str, float]) -> None:
        """Change the weights; if the step is logged, measure by how much."""
        if not self.is_due(self.config.log_every):
            return super().update(report)
        before = [parameter.detach().clone() for parameter in self.parameters]
        super().update(report)
        report["update_ratio"] = update_ratio(before, self.parameters)


# %% [markdown]
# A row of the log is put together, and the sums begin again.


# %%
#| export
def _measurements(trainer: _Measured, batch: Any, report: Row) -> dict[str, float]:
    """Return what is logged of the steps since the last time; the loss is their mean."""
    loss = trainer.loss_sum / trainer.target_sum if trainer.target_sum else math.nan
    speed = trainer.recent_targets / trainer.seconds
    rate = trainer.config.learning_rate * trainer.schedule(trainer.step - 1)
    row = {**report, "loss": loss, "targets": trainer.all_targets, "rate": rate}
    row |= {"skipped": float(trainer.skipped), "tokens_per_second": speed}
    row |= {"memory": peak_memory(trainer.device)}
    config = getattr(trainer.model, "config", None)
    if trainer.peak is not None and isinstance(config, ModelConfig):
        row["mfu"] = flops_per_token(config) * speed / trainer.peak
    if isinstance(trainer.model, TransformerLM) and isinstance(batch, Batch):
        ids = compact(next(split_rows(batch, 1))).inputs.to(trainer.device)
        with unnoticed(trainer.model):
            row |= activation_scales(trainer.model, ids)
    trainer.loss_sum = trainer.target_sum = trainer.recent_targets = trainer.seconds = 0.0
    return row


# %% [markdown]
# ## A file that is whole or absent
#
# `torch.save(state, path)` opens the file, which empties it, and writes. A kill in between leaves
# neither the old checkpoint nor the new. The cure: write under another name, force the
# bytes to the disk, and rename, which replaces the old name in one step. The order matters, and
# the second step is the one that is forgotten: file systems may carry out a rename before the
# writes that came first {cite}`pillai2014crash`. {numref}`fig-training-checkpoint` shows what a
# kill leaves at each moment.
#
# ```{figure} ../figures/training-checkpoint.svg
# :name: fig-training-checkpoint
# :alt: A time line of a save with four stages: writing the draft, fsync, rename, removal of old checkpoints. Below each stage stands what a kill at that moment leaves: a draft that is swept away and the checkpoint of step 200; the same; checkpoints of steps 200 and 300; the newest two.
#
# A save, and what a kill leaves: at every moment there is a whole checkpoint.
# ```
#
# The format is safetensors, as for models: it opens everywhere and can run no code. What is no
# tensor (step, rates, random states) is JSON in the header. Disks also damage files at rest, so
# the last tensor is a checksum of all bytes before it.


# %%
#| export
class CheckpointError(ValueError):
    """A checkpoint is not what it should be; the message names the file."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, or one that is damaged was passed over."""


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHECKSUM, _DIGEST_SIZE = "checksum", 32


# %% [markdown]
# A nested state becomes a tree of JSON with tensors by name. JSON knows neither tuples nor keys
# that are numbers, which optimizers have; a key that begins with a dollar sign marks them. Tied
# weights are stored once.


# %%
#| export
def _to_tree(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """Return ``value`` as JSON has it; its tensors go to ``tensors`` under the names in it."""
    if isinstance(value, Tensor):
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() == 0 or place not in seen:  # tied weights are stored once
            seen[place] = name
            tensors[name] = value.detach()
        return {"$tensor": name if value.numel() == 0 else seen[place]}
    if isinstance(value, Mapping):
        entries = [
            [key, _to_tree(entry, f"{name}/{key}" if name else str(key), tensors, seen)]
            for key, entry in value.items()
        ]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(entries) if plain else {"$items": entries}
    if isinstance(value, list | tuple):
        parts = [_to_tree(part, f"{name}/{i}", tensors, seen) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"state: {name}: expected tensors, numbers and texts, got {type(value)}")


# %% [markdown]
# And back.


# %%
#| export
def _from_tree(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_from_tree(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(_from_tree(part, tensors) for part in tree["$tuple"])
    if "$items" in tree:
        return {key: _from_tree(entry, tensors) for key, entry in tree["$items"]}
    return {key: _from_tree(entry, tensors) for key, entry in tree.items()}


# %% [markdown]
# The header of a safetensors file says where each tensor is. Ours is written by hand, so that the
# bytes go from the tensors' memory to the disk and through the checksum once, without a copy.


# %%
#| export
def _header(tree: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the beginning of a safetensors file: where each tensor is, and the rest as JSON."""
    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(tree)}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"state: {name}: expected one of {set(_DTYPES)}, got {tensor.dtype}")
        entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    entry = {"dtype": "U8", "shape": [_DIGEST_SIZE]}
    header[_CHECKSUM] = {**entry, "data_offsets": [end, end + _DIGEST_SIZE]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor: a view of its memory, if that is on the CPU and without gaps."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# %% [markdown]
# Write, force, rename. At the end the folder too is forced to the disk: the name is in it.


# %%
#| export
def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, nested dictionaries of tensors, numbers and texts, to one file, or nothing.

    It is a safetensors file; what is no tensor is JSON in its header, and the last tensor is a
    checksum of all before it. The file is complete and on the disk when it gets its name.
    A ``ValueError`` names what cannot be stored, an ``OSError`` says that the disk refused.
    """
    path, tensors = Path(path), dict[str, Tensor]()
    tree = _to_tree(state, "", tensors, {})
    if _CHECKSUM in tensors:
        raise ValueError(f"state: {_CHECKSUM!r}: expected another name, this one is taken")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = blake2b(digest_size=_DIGEST_SIZE)
    with whole_file(path) as draft, draft.open("wb") as file:
        for part in (_header(tree, tensors), *map(_raw, tensors.values())):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk, too, where the system can do that."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# %% [markdown]
# Loading compares the checksum before anything in the file is believed. Whatever is wrong, the
# message names the file.


# %%
#| export
def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the state that ``save_checkpoint`` wrote, its tensors on the CPU.

    A ``CheckpointError`` names the file and what is wrong: missing, damaged, or another format.
    """
    path = Path(path)
    try:
        content = path.read_bytes()  # tensors that are mapped to the file would need it for ever
        body, checksum = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
        if blake2b(body, digest_size=_DIGEST_SIZE).digest() != checksum:
            raise CheckpointError(f"{path}: damaged: the contents do not match the checksum")
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        return _from_tree(json.loads(header["__metadata__"]["state"]), load(content))
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (KeyError, OSError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no checkpoint of ours: {error}") from error


# %% [markdown]
# Every single bit counts:

# %%
path = folder / "demo.safetensors"
save_checkpoint(path, {"weights": torch.arange(8.0), "step": 3, "betas": (0.9, 0.95)})
print(load_checkpoint(path)["betas"])
whole, found = path.read_bytes(), 0
for place in range(len(whole)):
    broken = bytearray(whole)
    broken[place] ^= 1 << place % 8
    path.write_bytes(broken)
    try:
        load_checkpoint(path)
    except CheckpointError:
        found += 1
print("all flipped bits found:", found == len(whole))

# %% [markdown]
# ### Which one to go on from
#
# The newest whole one. A damaged one is passed over with a warning, and since the last *k* are
# kept, there is one before it. Drafts of killed saves are swept away.

# %%
#| export
_CHECKPOINT = re.compile(r"step-(\d{9})\.safetensors", re.ASCII)


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.safetensors"


def list_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a trainer's ``folder`` by step, oldest first, whole or damaged."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("step-*.safetensors")
        if (match := _CHECKPOINT.fullmatch(path.name))
    }
    return dict(sorted(found.items()))


def newest_checkpoint(folder: str | Path) -> dict[str, Any] | None:
    """Return the state in the newest whole checkpoint of ``folder``, or None if there is none.

    Damaged ones are passed over with a ``CheckpointWarning``; if all are, a ``CheckpointError``.
    """
    paths = list(list_checkpoints(folder).values())
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; taking the one before", CheckpointWarning, stacklevel=3)
    if paths:
        raise CheckpointError(f"{folder}: no checkpoint is whole; remove them to begin anew")
    return None


def _sweep(folder: Path, keep_last: int) -> None:
    """Remove old checkpoints, and drafts that killed saves left."""
    surplus = list(list_checkpoints(folder).values())[:-keep_last]
    for path in (*surplus, *folder.glob(".*.part")):
        path.unlink(missing_ok=True)


# %% [markdown]
# What must a checkpoint hold, so that the steps to come are the same to the last bit? Everything
# they depend on: weights; the optimizer's averages; the step, of which the schedule is a function;
# the sampler's step and the identity of its data; the random generators, for dropout; the sums
# since the last row of the log; the norms by which spikes are judged. A missing one gives a run
# that looks fine and is another. The sixth layer is that list.

# %%
#| export
_COUNTERS = ("step", "skipped", "skipped_in_a_row", "loss_sum", "target_sum", "all_targets", "best")


class _Saved(_Measured):
    """The sixth layer: what outlives the process."""

    batches: ResumableBatches
    folder: Path | None = None
    best = math.inf  # the lowest validation loss

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the steps to come depend on, fit for ``save_checkpoint``."""
        return {
            "config": _settings_of(self),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "norms": list(self.spikes.recent),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "random": random_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; a ``ValueError`` says what is not as it was then."""
        _load_state(self, state)

    def save(self) -> None:
        """Write a checkpoint and remove old ones; if the disk refuses, that is a warning."""
        if self.folder is not None and _save(_place(self.folder, self.step), self.state_dict()):
            _sweep(self.folder, self.config.keep_last)


# %% [markdown]
# Resuming with other settings, of training or of the model, would be another run under the same
# name. It is refused, except for settings that no weight depends on.

# %%
#| export
_MAY_CHANGE = {"evaluate_every", "log_every", "checkpoint_every", "keep_last", "max_skipped"}
_MAY_CHANGE |= {"prefetch"}


def _settings_of(trainer: _Saved) -> dict[str, Any]:
    """Return what a checkpoint and the trainer that takes it must agree on."""
    model = getattr(trainer.model, "config", None)
    entries = model.to_dict() if isinstance(model, ModelConfig) else {}
    return trainer.config.to_dict() | {f"model.{name}": entries[name] for name in entries}


def _load_state(trainer: _Saved, state: Mapping[str, Any]) -> None:
    here, there = _settings_of(trainer), state["config"]
    for name in sorted((here.keys() | there.keys()) - _MAY_CHANGE):
        if here.get(name) != there.get(name):
            then = f"expected {there.get(name)!r}, as in the checkpoint"
            raise ValueError(f"{name}: {then}, got {here.get(name)!r}")
    trainer.batches.load_state_dict(state["batches"])
    trainer.model.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    set_random_states(state["random"])
    for name in _COUNTERS:
        setattr(trainer, name, state["counters"][name])
    trainer.spikes.recent.clear()
    trainer.spikes.recent.extend(state["norms"])


# %% [markdown]
# A disk that refuses is a warning, and the run goes on: the checkpoint before is still there.


# %%
#| export
def _save(path: Path, state: Mapping[str, Any]) -> bool:
    try:
        save_checkpoint(path, state)
    except OSError as error:
        message = f"{path}: not saved: {error}; what was saved before stays"
        warnings.warn(message, CheckpointWarning, stacklevel=4)
        return False
    return True


# %% [markdown]
# ## The trainer
#
# The first Ctrl-C only leaves a note: the step under way is finished and saved. And two processes
# in one folder would destroy each other's files, so a lock keeps the second out.


# %%
#| export
@contextmanager
def _patient() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed; only a second one interrupts."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """Let no second process train in ``folder`` meanwhile."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise TrainingError(f"{folder}: another process is training there") from None


# %% [markdown]
# Now what a trainer is given, and what surrounds each step.


# %%
#| export
class _Prepared(_Saved):
    """Everything that a trainer is given, checked."""

    def __init__(
        self,
        model: nn.Module,
        batches: ResumableBatches,
        config: TrainingConfig,
        *,
        validation: Sequence[Any] | None = None,
        folder: str | Path | None = None,
        objective: Objective | None = None,
        probes: Sequence[Callable[[nn.Module], Row]] = (),
        sinks: Sequence[Sink] = (),
        peak: float | None = None,
    ):
        super().__init__(model, config, objective)
        if config.evaluate_every is not None and not validation and not probes:
            raise ValueError("validation: expected batches, as evaluate_every is set, got none")
        self.batches, self.validation, self.probes, self.peak = batches, validation, probes, peak
        self.folder = None if folder is None else Path(folder)
        self.log = MetricsLog(None if self.folder is None else self.folder / "metrics.jsonl")
        self.sinks: list[Sink] = [self.log, *sinks]
        self.interrupted = False
        for block in getattr(model, "blocks", [model]) if config.compile else ():
            block.compile()


# %% [markdown]
# Around each step: a first evaluation of the untrained model, then whatever is due.


# %%
#| export
class _Tended(_Prepared):
    """What surrounds a step: a first evaluation, the log, checkpoints, the best model."""

    def begin(self) -> None:
        """Before the first step of all: evaluate the untrained model, if that is asked for."""
        self.model.train()
        if self.step == 0 and self.config.evaluate_every is not None:
            self.record(self.evaluation())
        self.clock = time.perf_counter()

    def after_step(self, batch: Any, report: Row) -> None:
        """Log, evaluate, save: whatever is due."""
        due = self.is_due(self.config.log_every)
        row = _measurements(self, batch, report) if due else dict[str, float]()
        if (self.validation or self.probes) and self.is_due(self.config.evaluate_every):
            row |= self.evaluation()
        if row:
            self.record(row)
        if self.is_due(self.config.checkpoint_every):
            self.save()
        self.clock = time.perf_counter()  # what was done here is no part of the speed

    def record(self, row: Row) -> None:
        """Send a row to all sinks, and keep the model if it is the best so far."""
        for sink in self.sinks:
            sink.write({"step": self.step, **row})
        if row.get("validation_loss", math.inf) < self.best:
            self.best = row["validation_loss"]
            _save_best(self)


# %% [markdown]
# Its helpers: a batch of the wrong size would make the schedule a lie, so it is refused.


# %%
#| export
def _checked(trainer: _Saved, batch: Any) -> Any:
    """Return ``batch`` if it has the rows that the configuration says, else raise."""
    if len(batch[0]) != trainer.config.batch_size:
        expected = f"batches of {trainer.config.batch_size} rows"
        raise ValueError(f"batch_size: expected {expected}, got one of {len(batch[0])}")
    return batch


def _save_best(trainer: _Saved) -> None:
    if trainer.folder is not None:
        state = {"step": trainer.step, "loss": trainer.best, "model": trainer.model.state_dict()}
        _save(trainer.folder / "best.safetensors", state)


def _load_best(trainer: _Saved) -> int:
    if trainer.folder is None:
        raise ValueError("folder: expected the one with best.safetensors, got None")
    state = load_checkpoint(trainer.folder / "best.safetensors")
    trainer.model.load_state_dict(state["model"])
    return state["step"]


def _resume(trainer: _Saved) -> int:
    state = None if trainer.folder is None else newest_checkpoint(trainer.folder)
    if state is not None:
        trainer.load_state_dict(state)
    return trainer.step


# %% [markdown]
# On a GPU the processor can prepare the next batch meanwhile. It is a function of the step, so a
# thread that is one ahead changes no bit; the sampler's step counts what was handed out.


# %%
#| export
def _ahead(batches: ResumableBatches) -> Iterator[Any]:
    """Like iterating, but a thread prepares the next batch while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batches.__getitem__, batches.step)
        while True:
            batch = coming.result()
            batches.step += 1
            coming = pool.submit(batches.__getitem__, batches.step)
            yield batch


# %% [markdown]
# The loop itself is four lines again. What is around them undoes itself, however the loop ends.


# %%
#| export
def _train(trainer: "Trainer") -> None:
    """The loop itself, with what must be closed or set back around it."""
    with _alone_in(trainer.folder), _patient() as is_interrupted, ExitStack() as stack:
        trainer.resume()
        for sink in trainer.sinks:
            stack.callback(sink.close)
            sink.start(trainer.step or -1)  # the row of step 0 comes again, too
        trainer.begin()
        batches = iter(trainer.batches)
        if trainer.config.prefetch:
            batches = stack.enter_context(closing(cast(Any, _ahead(trainer.batches))))
        while trainer.step < trainer.config.n_steps and not is_interrupted():
            batch = _checked(trainer, next(batches))
            trainer.after_step(batch, trainer.train_step(batch))
        trainer.interrupted = trainer.step < trainer.config.n_steps
        if trainer.interrupted and trainer.step not in list_checkpoints(trainer.folder or ""):
            trainer.save()


# %% [markdown]
# The class that others use is left with three methods.


# %%
#| export
class Trainer(_Tended):
    """Trains ``model`` on ``batches`` as ``config`` says: the same run, however often it is killed.

    ``validation`` batches are scored every ``evaluate_every`` steps; ``probes`` are functions of
    the model whose numbers are logged with that. ``folder`` gets ``metrics.jsonl`` and checkpoints,
    from which ``train`` goes on by itself. ``objective`` is by default ``next_token_objective``;
    ``sinks`` get what is logged; "mfu" there is a share of ``peak``, in operations a second.
    """

    def train(self) -> MetricsLog:
        """Take the steps that are missing, and return the log.

        Ctrl-C ends training after the step under way, with a checkpoint: ``interrupted`` is then
        true, and the same call goes on. A second Ctrl-C is a ``KeyboardInterrupt`` at once.
        """
        _train(self)
        return self.log

    def resume(self) -> int:
        """Go on from the newest whole checkpoint in the folder, if any; return the step."""
        return _resume(self)

    def load_best(self) -> int:
        """Give the model the weights of the best evaluation; return the step they are from."""
        return _load_best(self)


# %% [markdown]
# We train, with a live plot and a validation batch:

# %% mystnb={"figure": {"caption": "The live plot as it looks at the end. Loss and validation loss fall together; the update ratio follows the schedule.", "name": "fig-training-live"}, "image": {"alt": "Three curves one above the other over 150 steps: the training loss falls from 7 to below 2, the validation loss falls along with it, and the update ratio rises during warmup and then falls to a tenth."}}
steps = {"n_steps": 150, "warmup": 15, "log_every": 10, "evaluate_every": 30}
recipe = {"batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 30}
config = TrainingConfig(**steps, **recipe)
validation = [rows.batch(range(1900, 1964))]
training_rows = BatchSampler(rows, batch_size=8, seed=1)
live = LivePlot(("loss", "validation_loss", "update_ratio"))
board = TensorBoard(folder / "board")
trainer = Trainer(
    small_model(dropout=0.1),
    training_rows,
    config,
    validation=validation,
    folder=folder / "first",
    sinks=[live, board],
    peak=peak_flops(),
)
log = trainer.train()

# %% [markdown]
# Rows are there for each evaluation, and files for the last two checkpoints and the best model:

# %%
steps_logged, validation_losses = log.column("validation_loss")
assert validation_losses[0] > 6 and validation_losses[-1] < 1.6
print("evaluated at:", steps_logged)
print(
    "kept:",
    list(list_checkpoints(folder / "first")),
    "and",
    load_checkpoint(folder / "first/best.safetensors")["step"],
)
print("a row:", ", ".join(list(log.rows[-1])[:8]), "...")

# %% [markdown]
# ## A divergence, provoked and cured
#
# Let us break it: gradient descent with momentum at a rate of 3, without any precaution, on the
# same model. Then the same, with a gradient clipped to norm 1 and nothing else changed.


# %%
def attempt(**changes: Any) -> tuple[MetricsLog, str]:
    options = {"optimizer": "sgd", "learning_rate": 3.0, "weight_decay": 0.0, "log_every": 1}
    config = TrainingConfig(n_steps=60, batch_size=8, max_skipped=5, **options | changes)
    trainer = Trainer(small_model(), BatchSampler(rows, batch_size=8), config)
    try:
        return trainer.train(), "finished"
    except TrainingError as error:
        return trainer.log, str(error)


broken, message = attempt(clip_norm=None)
cured, outcome = attempt(clip_norm=1.0)
assert message != "finished" and cured.column("loss")[1][-1] < 3.5
print("without clipping:", re.sub(r"step \d+: |, the last.*", "", message))
print("with clipping:", outcome)

# %% [markdown]
# Which of the numbers was first to grow to twice its first value?


# %%
def doubled(log: MetricsLog, name: str) -> int:
    steps, values = log.column(name)
    return next(step for step, v in zip(steps, values, strict=True) if v > 2 * values[0])


when = {name: doubled(broken, name) for name in ("loss", "gradient_norm", "logits/max")}
assert max(when["gradient_norm"], when["logits/max"]) < when["loss"]
print("before the loss doubled:", ", ".join(n for n in when if when[n] < when["loss"]))

# %% [markdown]
# The loss is the last to know ({numref}`fig-training-divergence`).

# %% mystnb={"figure": {"caption": "A divergence, and the same run cured. When the loss of the broken run begins to rise, gradient norm and largest logit have left their usual range some steps before.", "name": "fig-training-divergence"}, "image": {"alt": "Three panels with logarithmic axes over 30 steps: loss, gradient norm and largest logit. In the broken run all three climb by many powers of ten until step 12, norm and logits some steps before the loss. In the cured run the loss falls, the norm stays near one, and the logits stay near ten."}}
fig, axes = plt.subplots(1, 3, figsize=(7, 2.8))
for axis, name in zip(axes, ("loss", "gradient_norm", "logits/max"), strict=True):
    for some, label in ((broken, "broken"), (cured, "cured")):
        axis.plot(*some.column(name), label=label)
    axis.set(title=name.replace("_", " "), xlabel="step", yscale="log", xlim=(0, 30))
axes[0].legend()
plt.show()

# %% [markdown]
# ## Killed
#
# Resuming is a claim that can be tested in one way only. A process of its own trains the run from
# above and kills itself in the middle of a step, by SIGKILL, which no program can catch or answer;
# the notebook then takes over its folder.

# %%
script = f"""
import os, signal, sys, torch
from llmbook.training import *
from llmbook.model import ModelConfig, TransformerLM
from llmbook.batches import BatchSampler, TokenShards, pack_documents

torch.set_num_threads(1)
rows = pack_documents(TokenShards({str(folder / "stories")!r}), 128, "one_per_row")
config = TrainingConfig.from_dict({config.to_dict()!r})
torch.manual_seed(0)
model = TransformerLM(ModelConfig.from_dict({trainer.model.config.to_dict()!r}))
trainer = Trainer(model, BatchSampler(rows, 8, seed=1), config,
                  validation=[rows.batch(range(1900, 1964))], folder={str(folder / "second")!r})
step = trainer.update
trainer.update = lambda r: os.kill(os.getpid(), signal.SIGKILL) if trainer.step == 100 else step(r)
trainer.train()
"""
done = subprocess.run([sys.executable, "-c", script])
print("ended by signal", -done.returncode, "with", list(list_checkpoints(folder / "second")))

# %% [markdown]
# We go on:

# %%
sampler_again = BatchSampler(rows, batch_size=8, seed=1)
options = {"validation": validation, "folder": folder / "second"}
second = Trainer(small_model(dropout=0.1), sampler_again, config, **options)
print("goes on from step", second.resume())
second.train()
pairs = zip(trainer.parameters, second.parameters, strict=True)
print("weights that differ in any bit:", sum(int((a != b).sum()) for a, b in pairs))
print("same losses in the log:", second.log.column("loss") == log.column("loss"))

# %% [markdown]
# That was one kill at one place. The tests of this chapter kill 24 times, at random moments, at
# random operations on files, and between two tensors of a save; not a bit differs. The claim is
# for one machine, one PyTorch, one number of threads. On a GPU it also needs kernels that add in a
# fixed order, and those of attention's gradient need not.
#
# Two more accidents. The newest checkpoint has lost its end, and then the disk is full, which we
# simulate by letting every `fsync` fail:


# %%
def accident(**changes: Any) -> Trainer:
    batches = BatchSampler(rows, batch_size=8, seed=1)
    options = {"validation": validation, "folder": folder / "second"}
    return Trainer(small_model(dropout=0.1), batches, config, **options | changes)


newest = list_checkpoints(folder / "second")[150]
newest.write_bytes(newest.read_bytes()[:-1000])
full = OSError(errno.ENOSPC, "No space left on device")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print("goes on from step", accident().resume())
    newest.unlink()
    with unittest.mock.patch("os.fsync", side_effect=full):
        third = accident()
        third.train()
for warning in caught[:1] + caught[-1:]:
    print(str(warning.message).replace(f"{folder}{os.sep}", ""))
pairs = zip(trainer.parameters, third.parameters, strict=True)
print(
    "finished all the same:",
    all(torch.equal(a, b) for a, b in pairs),
    list(list_checkpoints(folder / "second")),
)

# %% [markdown]
# And Ctrl-C, sent here by a sink. The step is finished and saved, and the same call goes on.


# %%
class Impatient(MetricsLog):
    def write(self, row: Row) -> None:
        super().write(row)
        if row["step"] == 60:
            signal.raise_signal(signal.SIGINT)


for sinks in ([Impatient()], []):
    fourth = accident(folder=folder / "third", sinks=sinks)
    fourth.train()
    print(f"stopped by Ctrl-C: {fourth.interrupted}, after step {fourth.step}")
pairs = zip(trainer.parameters, fourth.parameters, strict=True)
print("the same bits:", all(torch.equal(a, b) for a, b in pairs))

# %% [markdown]
# ## A run in a file
#
# Text, tokenizer, model and settings, written down together, are an experiment that somebody else
# can repeat.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run learns from.

    Kinds are "tinyworld", for stories; "documentation", of installed ``packages``; "files", for
    ``paths`` of files and folders; "shards", for two folders of them, to train and to validate.
    """

    kind: str
    packages: tuple[str, ...] = ("stdlib", "numpy", "matplotlib")
    paths: tuple[str, ...] = ()
    n_stories: int = 20_000
    n_held_out: int = 400  # stories
    held_out: float = 0.03  # share of the files, else
    validation_rows: int = 128  # at most, while training
    clean: bool = True  # and remove duplicates
    layout: str = "best_fit"  # of documents in rows, or one_per_row, or windows for cut ones

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("tinyworld", "documentation", "files", "shards"))
        check_choice("layout", self.layout, ("best_fit", "one_per_row", "windows"))
        check_at_least(n_stories=(1, self.n_stories), n_held_out=(1, self.n_held_out))
        check_at_least(validation_rows=(1, self.validation_rows))
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out}")
        needed = {"files": 1, "shards": 2}.get(self.kind, 0)
        if len(self.paths) < needed or (self.kind == "shards" and len(self.paths) != 2):
            raise ValueError(f"paths: expected {needed} for {self.kind!r}, got {len(self.paths)}")


# %% [markdown]
# A tokenizer is trained on the text of the run, or read from a file.

# %%
#| export
_PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of a run: one that is trained on its text, or that of a file at ``path``."""

    vocab_size: int = 2048  # at most: there are fewer if the text has no more pairs
    pattern: str = "gpt4"  # or gpt2
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    path: str | None = None

    def __post_init__(self) -> None:
        check_at_least(vocab_size=(256 + len(self.special_tokens), self.vocab_size))
        check_choice("pattern", self.pattern, tuple(_PATTERNS))
        if "<|endoftext|>" not in self.special_tokens:
            expected = "expected '<|endoftext|>' among them"
            raise ValueError(f"special_tokens: {expected}, got {list(self.special_tokens)}")


# %% [markdown]
# A run has four sections.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is: data, tokenizer, model, training.

    ``model`` has the fields of ``ModelConfig`` but ``vocab_size``, which is the tokenizer's.
    A ``ValueError`` names the setting that is wrong, as in "training.n_steps".
    """

    data: DataConfig
    tokenizer: TokenizerConfig
    model: Mapping[str, Any]
    training: TrainingConfig

    def __post_init__(self) -> None:
        _check_run(self)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the configuration of the model, for a tokenizer of this size."""
        return _model_config(self.model, vocab_size)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "RunConfig":
        """Return the configuration with these settings; the inverse of ``to_dict``."""
        return _run_config(cls, entries)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as numbers, texts and lists, fit for JSON and YAML."""
        return _plain(asdict(self))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "RunConfig":
        """Read a YAML file; a ``ValueError`` names the file and what is wrong in it."""
        return _from_yaml(cls, Path(path))

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file that ``from_yaml`` reads."""
        _to_yaml(self, Path(path))


# %% [markdown]
# The size of the vocabulary is known when the tokenizer is, and not before. Messages get the name
# of their section in front.


# %%
#| export
def _model_config(fields_of_model: Mapping[str, Any], vocab_size: int) -> ModelConfig:
    if "vocab_size" in fields_of_model:
        raise ValueError("vocab_size: follows from the tokenizer, leave it out")
    return ModelConfig.from_dict({**fields_of_model, "vocab_size": vocab_size})


def _check_run(config: RunConfig) -> None:
    _within("model", config.model_config, config.tokenizer.vocab_size)
    if config.data.kind == "shards" and config.tokenizer.path is None:
        raise ValueError("tokenizer.path: expected the file that made the shards, got None")


def _within(part: str, build: Callable[..., _T], *arguments: Any) -> _T:
    """Build a part of a configuration; what is wrong is named with the part."""
    try:
        return build(*arguments)
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from None


# %% [markdown]
# Sections that are missing or too many are named as well.


# %%
#| export
def _run_config(kind: type[RunConfig], entries: Any) -> RunConfig:
    parts = {"data": DataConfig, "tokenizer": TokenizerConfig, "training": TrainingConfig}
    names = (*parts, "model")
    if not isinstance(entries, Mapping) or set(entries) != set(names):
        got = sorted(map(str, entries)) if isinstance(entries, Mapping) else entries
        raise ValueError(f"expected the sections {', '.join(names)}, got {got}")
    built = {name: _within(name, _from_dict, part, entries[name]) for name, part in parts.items()}
    if not isinstance(entries["model"], Mapping):
        raise ValueError(f"model: expected settings by name, got {entries['model']!r}")
    return kind(**built, model=dict(entries["model"]))


# %% [markdown]
# YAML is what people edit.


# %%
#| export
def _to_yaml(config: RunConfig, path: Path) -> None:
    with requires_extra("YAML", extra="train"):
        import yaml
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _from_yaml(kind: type[RunConfig], path: Path) -> RunConfig:
    with requires_extra("YAML", extra="train"):
        import yaml
    try:
        return _run_config(kind, yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


# %% [markdown]
# Text is prepared as in Part I: read, cleaned, deduplicated, so that no held-out text has a copy
# in the training text, and whole files are held out, whose docstrings resemble each other. One
# thing we do not do: remove from the training text whatever shares thirteen words with held-out
# text. Documentation repeats itself by nature.


# %%
#| export
def _documents(data: DataConfig) -> list[Document]:
    read = read_files(data.paths) if data.kind == "files" else read_installed_docs(data.packages)
    documents = list(deduplicate(clean_documents(read)) if data.clean else read)
    if not documents:
        raise ValueError("data: expected at least one document after cleaning, got none")
    return documents


def _is_held_out(document: Document, share: float) -> bool:
    """Hold out whole files: their documents resemble each other more than those of others."""
    file = str(document.metadata.get("path", document.id)).encode()
    return int.from_bytes(blake2b(file, digest_size=8).digest()) < share * 2**64


def _train_and_held_out(data: DataConfig) -> tuple[list[str], list[str]]:
    """Return the texts to learn from, and those to be judged by."""
    if data.kind == "tinyworld":
        world, sizes = TinyWorld(), (data.n_stories, data.n_held_out)
        return cast(Any, tuple([s.text for s in world.stories(n, i)] for i, n in enumerate(sizes)))
    parts: tuple[list[str], list[str]] = ([], [])
    for document in _documents(data):
        parts[_is_held_out(document, data.held_out)].append(document.text)
    if not all(parts):
        got = f"{len(parts[0])} documents to train and {len(parts[1])} to validate"
        raise ValueError(f"held_out: expected a share that leaves some of both, got {got}")
    return parts


# %% [markdown]
# Tokenizer, shards and held-out texts are written together or not at all.


# %%
#| export
def _write_data(config: RunConfig, folder: Path) -> None:
    """Write tokenizer, shards and held-out texts to ``folder``, all or nothing."""
    data, settings = config.data, config.tokenizer
    with whole_directory(folder) as draft:
        train, held_out = ([], []) if data.kind == "shards" else _train_and_held_out(data)
        if settings.path is None:
            pattern, special = _PATTERNS[settings.pattern], settings.special_tokens
            tokenizer = train_bpe(
                train, settings.vocab_size, pattern=pattern, special_tokens=special
            )
        else:
            tokenizer = BPETokenizer.load(settings.path)
        tokenizer.save(draft / "tokenizer.json")
        if data.kind != "shards":
            write_shards(train, draft / "train", tokenizer)
            write_shards(held_out, draft / "validation", tokenizer)
            documents = (Document(text, id=f"{i:06d}") for i, text in enumerate(held_out))
            write_jsonl(documents, draft / "held_out.jsonl")


def _open_data(config: RunConfig, folder: Path) -> tuple[BPETokenizer, TokenShards, TokenShards]:
    tokenizer = BPETokenizer.load(folder / "tokenizer.json")
    both = config.data.paths if config.data.kind == "shards" else ("train", "validation")
    train, validation = (TokenShards(folder / name, tokenizer) for name in both)
    return tokenizer, train, validation


# %% [markdown]
# Two measures judge what comes out. In the tiny world it is the gap to the floor, told apart by
# kind of word: whose name comes next nobody can know, the species of that character one can learn.

# %%
#| export
#: What a token of a tiny-world story can be, see ``word_kinds``.
WORD_KINDS = ("who", "name again", "species", "fact", "wording", "certain")


def word_kinds(world: TinyWorld, story: Story, cut: Callable[[str], list[str]]) -> list[str]:
    """Return the kind of each token of ``story`` and of the end of text after it.

    "who" is a name at its first appearance, "name again" a later one; "species" and "fact" are the
    values of claims; "wording" is what else the world draws, such as the weather; all other tokens
    are "certain": they follow from those before them. ``cut`` makes the tokens of a text.
    """
    tokens = [token for _, text in story.parts for token in cut(text)]
    names = {*world.cast.facts, *world.cast.strangers}
    species = {claim.value for claim in story.claims if claim.attribute == "species"}
    values = {claim.value for claim in story.claims} - species
    kinds, seen = [], set[str]()
    for token, floor in zip(tokens, world.surprises(tokens, cut), strict=True):
        word = token.strip()
        kind = "wording" if floor > 1e-9 else "certain"
        if word in names:
            drawn = "who" if floor > 1e-9 else "fact"  # a friend, whom the world knows
            kind = "name again" if word in seen else drawn
            seen.add(word)
        elif word in species | values:
            kind = "species" if word in species else "fact"
        kinds.append(kind)
    return [*kinds, "certain"]


# %% [markdown]
# The probe adds up losses and floors, kind by kind, over held-out stories.


# %%
#| export
class GapToFloor:
    """A probe: how far a model is from the floor of the tiny world, in all and by kind of word.

    Called with a model it returns "gap", the excess of its loss over the floor as a share of the
    floor; and for each kind "loss/kind" and "floor/kind", in nats per story.
    """

    def __init__(self, world: TinyWorld, stories: Iterable[Story], tokenizer: BPETokenizer):
        self.stories = list(stories)
        check_at_least(stories=(1, len(self.stories)))
        end = tokenizer.special_tokens["<|endoftext|>"]
        cut = lru_cache(maxsize=None)(partial(_cut, tokenizer))
        self.kinds = [word_kinds(world, story, cut) for story in self.stories]
        floors = [world.surprises(cut(story.text), cut) for story in self.stories]
        self.floors = [[*floor, 0.0] for floor in floors]
        rows = [[end, *tokenizer.encode(story.text), end] for story in self.stories]
        self.batches = [_padded(rows[i : i + 64], end) for i in range(0, len(rows), 64)]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure ``model``, a ``TransformerLM``."""
        device = next(model.parameters()).device
        losses = [row for batch in self.batches for row in _token_losses(model, batch.to(device))]
        sums = {f"{what}/{kind}": 0.0 for kind in WORD_KINDS for what in ("loss", "floor")}
        for kinds, floors, row in zip(self.kinds, self.floors, losses, strict=True):
            for kind, floor, loss in zip(kinds, floors, row, strict=False):
                sums[f"loss/{kind}"] += loss / len(self.stories)
                sums[f"floor/{kind}"] += floor / len(self.stories)
        floor = sum(sums[f"floor/{kind}"] for kind in WORD_KINDS)
        loss = sum(sums[f"loss/{kind}"] for kind in WORD_KINDS)
        return {"gap": loss / floor - 1, **sums}


# %% [markdown]
# Its helpers put stories in rows and give the loss of each token.


# %%
#| export
def _cut(tokenizer: BPETokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Batch:
    """Put texts, each between two ends of text, in the rows of a batch."""
    length = max(map(len, rows))
    windows = torch.full((len(rows), length), padding)
    targets = torch.full((len(rows), length - 1), -100)
    for number, row in enumerate(rows):
        windows[number, : len(row)] = torch.tensor(row)
        targets[number, : len(row) - 1] = windows[number, 1 : len(row)]
    return Batch(windows[:, :-1].clone(), targets)


@torch.no_grad()
def _token_losses(model: nn.Module, batch: Batch) -> list[list[float]]:
    """Return the loss of each target, in nats, 0 where there is none."""
    logits = model(batch.inputs)
    losses = cross_entropy(logits, batch.targets, reduction="none")
    return losses.tolist()


# %% [markdown]
# For real text it is {term}`bits per byte`, which knows no tokens, and so can be held against any
# compressor. The end of each text is predicted too, and charged.


# %%
#| export
def documents_score(
    model: nn.Module, tokenizer: BPETokenizer, texts: Iterable[str], batch_tokens: int = 4096
) -> tuple[float, int]:
    """Return the surprise of ``texts`` in bits, ends of text included, and their UTF-8 bytes.

    A text begins after an end of text, and with nothing else in sight. One longer than the
    context length is cut; each piece sees the token before it, and no more.
    """
    config, device = cast(Any, model).config, next(model.parameters()).device
    end = tokenizer.special_tokens["<|endoftext|>"]
    size, bits, n_bytes = config.context_length, 0.0, 0
    rows: list[list[int]] = []
    for text in texts:
        ids = [end, *tokenizer.encode(text), end]
        rows += [ids[start : start + size + 1] for start in range(0, len(ids) - 1, size)]
        n_bytes += len(text.encode())
    rows.sort(key=len)  # rows of a batch have about one length, so little is padding
    with unnoticed(model):
        while rows:
            few = max(1, batch_tokens // len(rows[-1]))
            rows, batch = rows[:-few], _padded(rows[-few:], end)
            total, _ = next_token_objective(model, batch.to(device))
            bits += float(total) / math.log(2)
    return bits, n_bytes


# %% [markdown]
# The rivals, at their best settings.


# %%
#| export
def compressors(texts: Sequence[str], seen: Sequence[str] = ()) -> dict[str, float]:
    """Return the bits per byte that gzip and xz need for ``texts``, at their best settings.

    Texts are joined by a zero byte. With texts that were ``seen``, what is counted is by how much
    a compressed file of these grows when the others are appended.
    """
    first, second = ("\0".join([*some, ""]).encode() for some in (seen, texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    if not n_bytes:
        raise ValueError("texts: expected at least one byte, got none")
    best = {"gzip": partial(gzip.compress, mtime=0), "xz": partial(lzma.compress, preset=9)}
    bits = {}
    for name, compress in best.items():
        before = len(compress(first)) if seen else 0
        bits[name] = 8 * (len(compress(first + second)) - before) / n_bytes
    return bits


# %% [markdown]
# All is put together in a trainer.


# %%
#| export
def _trainer(config: RunConfig, folder: Path, sinks: Sequence[Sink]) -> Trainer:
    tokenizer, train, validation = _open_data(config, folder / "data")
    training, data = config.training, config.data
    seed_everything(training.seed)
    model = TransformerLM(config.model_config(tokenizer.vocab_size)).to(best_device())
    length = model.config.context_length
    layout = {"windows": lambda: train}.get(data.layout)
    source = layout() if layout else pack_documents(train, length, data.layout)
    packed = pack_documents(validation, length)
    rows = range(min(len(packed), data.validation_rows))
    probes = []
    if data.kind == "tinyworld":
        world = TinyWorld()
        probes.append(GapToFloor(world, world.stories(data.n_held_out, 1), tokenizer))
    return Trainer(
        model,
        BatchSampler(source, training.batch_size, length, seed=training.seed),
        training,
        validation=[packed.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)],
        folder=folder / "training",
        probes=probes,
        sinks=sinks,
        peak=peak_flops(best_device(), getattr(torch, training.precision)),
    )


# %% [markdown]
# What comes out can be loaded again.


# %%
#| export
class Pretrained(NamedTuple):
    """What a run made: model, tokenizer, log, held-out texts, and where all this is kept."""

    model: TransformerLM
    tokenizer: BPETokenizer
    log: MetricsLog
    held_out: list[str]
    folder: Path


def load_run(folder: str | Path) -> Pretrained:
    """Return what ``run`` left in ``folder``; the model is in ``eval`` mode, on the CPU."""
    folder = Path(folder)
    model = TransformerLM.from_pretrained(folder / "model")
    tokenizer = BPETokenizer.load(folder / "model" / "tokenizer.json")
    texts = folder / "data" / "held_out.jsonl"  # a run on shards has none
    held_out = [document.text for document in read_jsonl(texts)] if texts.exists() else []
    log = MetricsLog(folder / "training" / "metrics.jsonl")
    return Pretrained(model, tokenizer, log, held_out, folder)


# %% [markdown]
# The run: each stage leaves something behind, and is skipped when that is there.


# %%
#| export
def run(config: RunConfig, folder: str | Path, sinks: Sequence[Sink] = ()) -> Pretrained:
    """Do everything that ``config`` says, and return what came out; it is in ``folder``, too.

    A run that was stopped or killed goes on where it was when it is called again; one that is
    complete is loaded. Ctrl-C is a ``KeyboardInterrupt`` after a checkpoint. A ``ValueError`` if
    ``folder`` has a run of another configuration.
    """
    folder = Path(folder)
    _claim(folder, config)
    if not (folder / "model").exists():
        with _private_state(config.training.threads):
            if not (folder / "data").exists():
                _write_data(config, folder / "data")
            trainer = _trainer(config, folder, sinks)
            trainer.train()
        if trainer.interrupted:
            raise KeyboardInterrupt
        _finish(trainer.model, folder)
    return load_run(folder)


# %% [markdown]
# A folder belongs to one configuration. And whoever calls `run` in the middle of something else
# finds random generators and threads as they were.


# %%
#| export
def _claim(folder: Path, config: RunConfig) -> None:
    """Write the configuration to ``folder``, or check that it is the one that is there."""
    path, text = folder / "run.json", json.dumps(config.to_dict(), indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not (folder / "data").exists():  # nothing has begun there
        with whole_file(path) as draft:
            draft.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        other = f"{folder} has a run of another configuration, see {path.name}"
        raise ValueError(f"folder: expected a new one, {other}")


@contextmanager
def _private_state(threads: int | None) -> Iterator[None]:
    """Seeds and threads in here are nobody else's business."""
    states, before = random_states(), torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        set_random_states(states)


# %% [markdown]
# The model is saved with its tokenizer.


# %%
#| export
def _finish(model: nn.Module, folder: Path) -> None:
    """Save the model with its tokenizer, as Hugging Face's library expects a model's folder."""
    tokenizer = BPETokenizer.load(folder / "data" / "tokenizer.json")
    with whole_directory(folder / "model") as draft:
        end = tokenizer.special_tokens["<|endoftext|>"]
        save_model(cast(TransformerLM, model), draft / "model", eos_token_id=end)
        for path in (draft / "model").iterdir():
            path.rename(draft / path.name)
        (draft / "model").rmdir()
        tokenizer.save(draft / "tokenizer.json")


# %% [markdown]
# Three of the runs that are known to work fit a laptop. The first is the tiny world: Muon, one
# story in a row, a linear decay to zero.

# %%
#| export
_SMALL: dict[str, Any] = {"threads": 1, "schedule": "linear", "final": 0.0, "spike_factor": 10.0}
#: Configurations that are known to work, by name.
RUNS = {
    "tinyworld": RunConfig(
        data=DataConfig(kind="tinyworld", n_stories=18_000, layout="one_per_row"),
        tokenizer=TokenizerConfig(
            vocab_size=1024, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ),
        model={
            "context_length": 128,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "d_ff": 128,
        },
        training=TrainingConfig(
            n_steps=2200,
            batch_size=8,
            optimizer="muon",
            learning_rate=0.01,
            weight_decay=0.0,
            warmup=50,
            evaluate_every=200,
            log_every=50,
            checkpoint_every=200,
            **_SMALL,
        ),
    ),
}


# %% [markdown]
# For documentation, half a million parameters and half a minute,

# %%
#| export
_DOCS = {"tie_embeddings": True, "n_heads": 4}
_DOCS_TRAINING: dict[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 0.01,
    "weight_decay": 0.05,
    "warmup": 30,
}
RUNS["documentation"] = RunConfig(
    data=DataConfig(kind="documentation", validation_rows=48),
    tokenizer=TokenizerConfig(vocab_size=2048),
    model={"context_length": 128, "d_model": 96, "n_layers": 3, **_DOCS},
    training=TrainingConfig(
        n_steps=400,
        batch_size=8,
        evaluate_every=150,
        log_every=25,
        checkpoint_every=150,
        **_DOCS_TRAINING,
        **_SMALL,
    ),
)


# %% [markdown]
# or a million parameters and some ten minutes, depending on the cores.

# %%
#| export
RUNS["documentation-long"] = RunConfig(
    data=DataConfig(kind="documentation", validation_rows=64),
    tokenizer=TokenizerConfig(vocab_size=2048),
    model={"context_length": 256, "d_model": 128, "n_layers": 4, **_DOCS},
    training=TrainingConfig(
        n_steps=2400,
        batch_size=8,
        evaluate_every=200,
        checkpoint_every=100,
        **_DOCS_TRAINING,
        **_SMALL | {"threads": None},
    ),
)


# %% [markdown]
# The last one is for a GPU: 100 million parameters, half a million tokens in a step, sixteen
# micro-batches, `bfloat16`, blocks compiled. Its texts are yours. It has not been run to its end.

# %%
#| export
RUNS["gpu"] = RunConfig(
    data=DataConfig(kind="files", paths=("texts",), held_out=0.01),
    tokenizer=TokenizerConfig(vocab_size=32_768),
    model={
        "context_length": 1024,
        "d_model": 768,
        "n_layers": 12,
        "n_heads": 12,
        "n_kv_heads": 4,
        "qk_norm": True,
        "tie_embeddings": True,
    },
    training=TrainingConfig(
        n_steps=5000,  # of half a million tokens
        batch_size=512,
        micro_batch_size=32,
        optimizer="muon",
        learning_rate=2e-3,
        warmup=100,
        z_loss=1e-4,
        precision="bfloat16",
        compile=True,
        prefetch=True,
        evaluate_every=250,
        checkpoint_every=250,
        **_SMALL | {"threads": None, "schedule": "wsd"},
    ),
)


# %% [markdown]
# ## Trained once
#
# Chapters to come need a trained model, and should not train it again. {py:func}`load_or_train
# <llmbook.training.load_or_train>` keeps it under a name that holds a hash of all it depends on:
# settings, the code of every module that training imports, the version of PyTorch, and those of
# the packages whose documentation is read.


# %%
#| export
def artifacts_folder() -> Path:
    """Return where trained models are kept: $LLMBOOK_ARTIFACTS, or ``artifacts`` in the checkout.

    Where the package is installed without a checkout around it, it is ``artifacts`` in the working
    directory.
    """
    if chosen := os.environ.get("LLMBOOK_ARTIFACTS"):
        return Path(chosen)
    root = _package_folder().parent
    return (root if (root / "pyproject.toml").exists() else Path.cwd()) / "artifacts"


def _package_folder() -> Path:
    """The folder of the package; a notebook that runs this cell has no file of its own."""
    spec = importlib.util.find_spec("llmbook")
    return Path(cast(Any, spec).origin).parent


# %% [markdown]
# Comments and empty lines do not count, so that a remark costs no training.


# %%
#| export
def _module_sources(names: Iterable[str]) -> dict[str, str]:
    """Return the code of modules of this package and of all that they import, without comments."""
    found, waiting = dict[str, str](), list(names)
    while waiting:
        path = _package_folder() / f"{waiting.pop()}.py"
        if path.stem in found or not path.exists():
            continue
        source = path.read_text(encoding="utf-8")
        found[path.stem] = re.sub(r"(?m)^\s*(#.*)?\n", "", source)
        waiting += re.findall(r"(?m)^\s*from \.(\w+) import", source)
    return dict(sorted(found.items()))


def _fingerprint(depends_on: Any, train: Callable[..., Any]) -> str:
    """Hash what a trained model depends on: settings, the package's code, and torch's version."""
    code = getattr(train, "func", train)  # of a partial
    module = str(getattr(code, "__module__", "")).removeprefix("llmbook.")
    sources = _module_sources(["training", module])
    content = json.dumps([depends_on, sources, torch.__version__], sort_keys=True)
    return blake2b(content.encode(), digest_size=6).hexdigest()


# %% [markdown]
# `train` fills a draft folder, which a kill leaves in place, so that a trainer in it goes on; a
# lock lets others wait.


# %%
#| export
def load_or_train(
    name: str,
    depends_on: Mapping[str, Any],
    train: Callable[[Path], Any],
    *,
    load: Callable[[Path], Any] = TransformerLM.from_pretrained,
    folder: str | Path | None = None,
) -> Any:
    """Return what ``load`` makes of ``artifacts/<name>-<hash>``, which ``train`` fills if it must.

    The hash is of ``depends_on`` (as JSON), of the package's code that training uses, and of the
    version of torch; code of yours is not in it, unless you put it there. ``train`` gets a draft
    folder, which gets its name in the end and is there again after a kill: a ``Trainer`` in it
    goes on. Processes that ask at once train once.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ValueError(f"name: expected letters, digits, '.', '_' and '-', got {name!r}")
    place = artifacts_folder() if folder is None else Path(folder)
    target = place / f"{name}-{_fingerprint(depends_on, train)}"
    if not target.exists():
        place.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.draft")
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.exists():  # else another process has trained meanwhile
                draft.mkdir(exist_ok=True)
                train(draft)
                draft.rename(target)
    return load(target)


# %% [markdown]
# Later chapters call this:


# %%
#| export
def _versions(data: DataConfig) -> dict[str, str]:
    """Return the versions that installed documentation depends on."""
    versions = dict[str, str]()
    for name in data.packages if data.kind == "documentation" else ():
        versions[name] = platform.python_version()  # of stdlib and its modules
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def pretrained(name: str = "tinyworld") -> Pretrained:
    """Return the outcome of a run of ``RUNS``, trained on the first call and kept (see there).

    Training "tinyworld" takes a minute or two on a laptop.
    """
    check_choice("name", name, tuple(RUNS))
    config = RUNS[name]
    depends_on = {**config.to_dict(), "versions": _versions(config.data)}
    return load_or_train(name, depends_on, partial(run, config), load=load_run)


# %% [markdown]
# ## The tiny world
#
# Now the world whose floor we know, for a minute.

# %%
result = pretrained("tinyworld")
gap_steps, gaps = result.log.column("gap")
assert 0.01 < gaps[-1] < 0.045
print("parameters:", f"{count_parameters(result.model):,}", " tokens:", result.tokenizer.vocab_size)
print("the gap to the floor is below 4.5 %:", gaps[-1] < 0.045)

# %% [markdown]
# And we can ask what it learned when.

# %% mystnb={"figure": {"caption": "Excess over the floor by kind of word, in nats per story. First come fixed phrases, then facts, then names that must be copied from the story. What remains is mostly wording.", "name": "fig-training-kinds"}, "image": {"alt": "Left: the gap in percent falls from almost 80 at step 200 to about 3 at the end, on a logarithmic scale. Right: excess loss of six kinds of words over training steps. Species and facts fall fastest, to a few hundredths of a nat; certain words end near a tenth; names again fall late; wording stays highest, near half a nat."}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6))
left.plot(gap_steps[1:], [100 * gap for gap in gaps[1:]], marker="o")
left.set(yscale="log", xlabel="step", ylabel="gap to the floor (%)", title="In all")
left.set_yticks([3, 10, 30], ["3", "10", "30"])
left.minorticks_off()
for kind in WORD_KINDS:
    loss, floor = (np.array(result.log.column(f"{what}/{kind}")[1]) for what in ("loss", "floor"))
    right.plot(gap_steps[1:], (loss - floor)[1:].clip(1e-3), marker="o", label=kind)
right.set(yscale="log", xlabel="step", ylabel="excess (nats per story)", title="By kind of word")
fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6)
plt.show()

# %% [markdown]
# In numbers, at the end and at step 400:

# %%
last = result.log.rows[-1]
excess = {kind: last[f"loss/{kind}"] - last[f"floor/{kind}"] for kind in WORD_KINDS}
early = result.log.rows[[row["step"] for row in result.log.rows].index(400)]
early_excess = {kind: early[f"loss/{kind}"] - early[f"floor/{kind}"] for kind in WORD_KINDS}
assert excess["fact"] + excess["species"] < 0.1 and excess["wording"] > 0.2
assert early_excess["name again"] > 4 * early_excess["species"]
print(
    "facts and species together cost less than 0.1 nats:", excess["fact"] + excess["species"] < 0.1
)
print("most of what remains is:", max(excess, key=lambda kind: excess[kind]))

# %% [markdown]
# The order tells what is easy. Most of the fixed phrases are learned in the first two hundred
# steps. The eight facts of 48 characters, 384 in all, follow within a few hundred more: they never
# change, so they can be stored in weights. To repeat the hero's name, a model must *look it up* in
# the story, and that comes later. Last is the wording. A story may go on in many ways, all of which
# the model must give their exact probabilities; and it must know which facts the story has told
# already, since none is told twice.
#
# ## The documentation
#
# The second text is real: docstrings and comments of Python, NumPy and matplotlib. We train a
# model of half a million parameters for half a minute, and compress the same held-out text with
# gzip and xz.

# %%
documentation = pretrained("documentation")
bits, n_bytes = documents_score(*documentation[:2], documentation.held_out)
others = compressors(documentation.held_out)
assert bits / n_bytes < 2.5
print("held-out bytes, in ten thousands:", round(n_bytes, -4) // 10_000)
print("below gzip:", bits / n_bytes < others["gzip"], " below xz:", bits / n_bytes < others["xz"])

# %% [markdown]
# Who has won? The comparison is not fair, in three ways. The compressors saw nothing before the
# held-out text, the model a million bytes of its kind. So we show them the training text, all five
# million bytes, and count by how much the archive grows. Second, whoever unpacks our file needs
# the model, whose weights take 2 MB, twenty times the text; a compressor is judged with its
# program included {cite}`deletang2024compression`. Third, gzip does this in milliseconds.

# %% mystnb={"figure": {"caption": "Bits per byte of held-out documentation. Light bars: compressors that have seen the training text first.", "name": "fig-training-bits"}, "image": {"alt": "Bars of bits per byte. gzip near 2.9 and xz near 2.7 alone; gzip that has seen the training text only slightly lower, xz that has seen it clearly lower; the model near 2.2."}}
train_shards = TokenShards(documentation.folder / "data/train")
seen = documentation.tokenizer.decode(train_shards[:], skip_special_tokens=True)
primed = compressors(documentation.held_out, [seen])
values = {"gzip": others["gzip"], "gzip, primed": primed["gzip"], "xz": others["xz"]}
values |= {"xz, primed": primed["xz"], "the model": bits / n_bytes}
fig, ax = plt.subplots(figsize=(6, 2.6))
colors = ["C0", "C5", "C0", "C5", "C1"]
ax.barh(list(values), list(values.values()), color=colors)
ax.invert_yaxis()
ax.set(xlabel="bits per byte", title="The same text, compressed and predicted")
plt.show()

# %% [markdown]
# xz gains so much that our short run is not below it:

# %%
assert primed["xz"] < others["xz"]
print("seeing the training text helps xz:", primed["xz"] < others["xz"])
print("the model is below the xz that has seen it:", bits / n_bytes < primed["xz"])

# %% [markdown]
# gzip looks back 32 kilobytes only, so what it saw before hardly helps; xz looks back over all of
# it, and finds whole sentences again. Half a minute of training does not reach that. Some ten
# minutes do: a million parameters, trained by `--preset documentation-long` on 4.9 million tokens,
# needed 1.73 bits per byte of the same text when this was written, where xz with all the training
# text in sight needed 2.06 (`python benchmarks/compression.py` measures both).
#
# ## From the command line
#
# The same runs start without a notebook:
#
# ```text
# python -m llmbook.training --preset tinyworld --folder runs/tiny
# python -m llmbook.training --preset gpu --write config.yaml
# python -m llmbook.training config.yaml --folder runs/large --tensorboard
# ```
#
# The second writes a preset to a file to edit. A run that was stopped or killed goes on when the
# same command is given again; at the end there is a report.


# %%
#| export
def report(result: Pretrained) -> dict[str, float]:
    """Return the numbers that a run is judged by: last losses, and bits per byte beside others'."""
    names = ("loss", "validation_loss", "gap", "tokens_per_second", "mfu", "targets", "skipped")
    known = {name for row in result.log.rows for name in row}
    numbers = {name: result.log.column(name)[1][-1] for name in names if name in known}
    if result.held_out:
        bits, n_bytes = documents_score(result.model, result.tokenizer, result.held_out)
        numbers |= {"held-out bytes": float(n_bytes), "bits per byte": bits / n_bytes}
        others = compressors(result.held_out)
        numbers |= {f"bits per byte of {name}": value for name, value in others.items()}
    return numbers


# %% [markdown]
# A file or a preset, not both.


# %%
#| export
def _chosen(config: Path | None, preset: str | None) -> RunConfig:
    if (config is None) == (preset is None):
        raise ValueError(f"expected a file CONFIG or a --preset, one of {', '.join(RUNS)}")
    if config is not None:
        return RunConfig.from_yaml(config)
    check_choice("preset", preset, tuple(RUNS))
    return RUNS[str(preset)]


def _execute(config: RunConfig, folder: Path, tensorboard: bool) -> None:
    sinks: list[Sink] = [ProgressBar(config.training.n_steps)]
    if tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    for name, value in report(run(config, folder, sinks)).items():
        print(f"{name}: {value:,.4g}")


def _write(config: RunConfig, path: Path) -> None:
    if path.exists():
        raise ValueError(f"--write: expected a new file, {path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    config.to_yaml(path)
    print(f"{path} is written; train with: python -m llmbook.training {path}")


# %% [markdown]
# The command is a thin shell around `run`.


# %%
#| export
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, ``python -m llmbook.training``, and exit.

    The code is 0, or 2 for a bad request, 1 if training failed, 130 if it was stopped by Ctrl-C.
    """
    with requires_extra("The command line", extra="train"):
        import typer
    argument, option = typer.Argument, typer.Option

    def train(
        config: Annotated[Path | None, argument(help="A YAML file, see --write.")] = None,
        preset: Annotated[str | None, option(help=f"One of {', '.join(RUNS)}.")] = None,
        write: Annotated[Path | None, option(help="Write a YAML file, train nothing.")] = None,
        folder: Annotated[Path, option(help="Where the run is kept.")] = Path("runs/latest"),
        tensorboard: Annotated[bool, option(help="Write curves into its folder, too.")] = False,
    ) -> Callable[[], None]:
        """Train a model as a file or a preset says; a run that was stopped goes on."""
        chosen = _chosen(config, preset)
        if write is None:
            return partial(_execute, chosen, folder, tensorboard)
        return partial(_write, chosen, write)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    sys.exit(_exit_code(partial(app, args=arguments, standalone_mode=False)))


# %% [markdown]
# Errors that a user can mend are one line, without a traceback; the exit code tells scripts what
# happened.


# %%
#| export
def _exit_code(command: Callable[[], Any]) -> int:
    """Do what ``command`` returns; say in one line what went wrong, if something did."""
    try:
        work = command()
        if callable(work):  # the library that reads options would hide a Ctrl-C
            work()
    except (KeyboardInterrupt, TrainingError, ImportError, OSError, ValueError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        text = "stopped; the same command goes on" if stopped else f"error: {error}"
        print(text, file=sys.stderr)
        return 130 if stopped else 2 if isinstance(error, ValueError) else 1
    except Exception as error:  # a wrong option
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return 2
    return 0


if __name__ == "__main__" and "__file__" in globals():  # a notebook has no file
    main()


# %% [markdown]
# A file, its last lines, and what happens when a setting cannot be:

# %%
RUNS["documentation"].to_yaml(folder / "config.yaml")
text = (folder / "config.yaml").read_text()
print("\n".join(text.splitlines()[-8:]))
(folder / "config.yaml").write_text(text.replace("n_heads: 4", "n_heads: 5"))
try:
    RunConfig.from_yaml(folder / "config.yaml")
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## Is it the real thing?
#
# The industrial counterpart of a loop is PyTorch's own parts, put together by hand: `AdamW`,
# `LambdaLR`, `clip_grad_norm_`, mean losses. Same model, same batches, forty steps:

# %%
config = TrainingConfig(n_steps=40, batch_size=8, learning_rate=5e-3, warmup=5, log_every=40)
ours = Trainer(small_model(), BatchSampler(rows, batch_size=8), config)
ours.train()
theirs = small_model()
matrices = [p for n, p in theirs.named_parameters() if p.ndim > 1 and "embedding" not in n]
undecayed = [p for n, p in theirs.named_parameters() if p.ndim < 2 or "embedding" in n]
groups = [{"params": matrices, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ours.schedule)
for step in range(40):
    batch = BatchSampler(rows, batch_size=8)[step]
    logits = theirs(batch.inputs, document_ids=batch.document_ids)
    optimizer.zero_grad()
    nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    optimizer.step()
    schedule.step()
pairs = zip(ours.parameters, theirs.parameters(), strict=True)
difference = max((a - b).abs().max().item() for a, b in pairs)
print("largest difference of a weight below 1e-3:", difference < 1e-3)

# %% [markdown]
# And TensorBoard reads what our sink wrote:

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(str(folder / "board")).Reload()
points = [(event.step, event.value) for event in events.Scalars("validation_loss")]
print("same steps:", [step for step, _ in points] == steps_logged)
print("same values:", np.allclose([value for _, value in points], validation_losses))

# %% [markdown]
# ## How fast is it?
#
# The trainer against the bare loop of PyTorch's parts, on the same
# batches, the mask of documents left out by both, best of three:


# %% tags=["nbval-ignore-output"]
def bare_loop(batches: list[Batch]) -> None:
    model = small_model(d_model=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    for batch in batches:
        logits = model(batch.inputs)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def our_loop(batches: list[Batch]) -> None:
    config = TrainingConfig(
        n_steps=len(batches), batch_size=8, learning_rate=5e-3, spike_factor=10.0
    )
    layer = _Measured(small_model(d_model=64), config)
    for batch in batches:
        layer.train_step(batch)


batches, best = [compact(sampler[step]) for step in range(40)], {}
for loop in (bare_loop, our_loop) * 3:
    start = time.perf_counter()
    loop(batches)
    best[loop.__name__] = min(best.get(loop.__name__, math.inf), time.perf_counter() - start)
print(f"ours takes {best['our_loop'] / best['bare_loop']:.2f} times as long")

# %% [markdown]
# ## Exercises
#
# ````{exercise} How much is noise?
# :label: ex-training-noise
# *Fifteen minutes.* The loss of one small batch is noisy. Write `noise_scale(trainer, batch)`:
# split `batch` into single rows, take the gradient of the mean loss of each, and return $\sum_i
# \operatorname{Var}(g_i) \,/\, \lVert \bar g \rVert^2$: the variance of the rows' gradients
# (unbiased, summed over all parameters) over the squared norm of their mean. It says how many rows
# it takes until noise and signal are equal. Leave the gradients of the model empty.
# ````


# %% tags=["solution"]
def noise_scale(trainer: _Gradients, batch: Batch) -> float:
    """Return the variance of the gradients of single rows over the square of their mean."""
    gradients = []
    for row in split_rows(batch, 1):
        trainer.model.zero_grad()
        _, count = trainer.accumulate(row)
        gradients.append(torch.cat([(p.grad / count).flatten() for p in trainer.parameters]))
    trainer.model.zero_grad()
    stacked = torch.stack(gradients)
    return float(stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum())


# %% tags=["check"]
layer = _Gradients(small_model(), TrainingConfig(n_steps=1, batch_size=8))
same_rows = Batch(*[None if field is None else field[:1].repeat(4, 1) for field in sampler[0]])
assert noise_scale(layer, same_rows) < 1e-6, "equal rows have no noise"
two = Batch(*[None if field is None else field[:2] for field in sampler[0]])
vectors = []
for row in split_rows(two, 1):
    layer.model.zero_grad()
    count = layer.accumulate(row)[1]
    vectors.append(torch.cat([p.grad.flatten() / count for p in layer.parameters]))
expected = (
    (vectors[0] - vectors[1]).square().sum() / 2 / ((vectors[0] + vectors[1]) / 2).square().sum()
)
assert abs(noise_scale(layer, two) / float(expected) - 1) < 1e-3, "unbiased variance, squared mean"
assert all(p.grad is None for p in layer.parameters), "the gradients must be left empty"

# %% [markdown]
# ````{exercise} A moving average of weights
# :label: ex-training-average
# *Twenty minutes.* Evaluations are often made with an average of the weights over time. Write a
# layer `Averaged`, a subclass of `Trainer` that keeps `average`, a list of tensors that begin as
# copies of the parameters, and after each step that was *taken* become $0.9$ times themselves plus
# $0.1$ times the parameters. A skipped step must not count. It must survive a resume: put it into
# the state dict, and take it from there.
# ````


# %% tags=["solution"]
class Averaged(Trainer):
    """A trainer that keeps a moving average of the weights."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self, report: dict[str, float]) -> None:
        """Update the weights, and the average if the step was taken."""
        skipped = self.skipped
        super().update(report)
        if self.skipped == skipped:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 0.1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the average."""
        return super().state_dict() | {"average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take everything from the state, the average too."""
        super().load_state_dict(state)
        self.average = list(state["average"])


# %% tags=["check"]
def averaged(where: Path, n_steps: int, objective: Objective | None = None) -> Averaged:
    config = TrainingConfig(n_steps=6, batch_size=8, checkpoint_every=1)
    batches = BatchSampler(rows, batch_size=8)
    trainer = Averaged(small_model(), batches, config, folder=where, objective=objective)
    trainer.resume()
    for step in range(trainer.step, n_steps):
        trainer.train_step(batches[step])
        batches.step = step + 1
    trainer.save()
    return trainer


here = Path(tempfile.mkdtemp())
one = averaged(here / "1", 1)
start = small_model()
for mean, p, q in zip(one.average, start.parameters(), one.parameters, strict=True):
    assert torch.allclose(mean, 0.9 * p + 0.1 * q, atol=1e-6), "0.9 of the old, 0.1 of the new"
skipping = averaged(here / "2", 1, poisoned_at(0, math.nan))
unmoved = zip(skipping.average, start.parameters(), strict=True)
assert all(torch.equal(a, b) for a, b in unmoved), "a skipped step must not count"
whole, again = averaged(here / "3", 3), averaged(here / "1", 3)
pairs = zip(whole.average, again.average, strict=True)
assert all(torch.equal(a, b) for a, b in pairs), "the average must be in the state, and come back"

# %% [markdown]
# ````{exercise} The price of a checkpoint
# :label: ex-training-interval
# *Ten minutes.* A checkpoint takes $s$ seconds, and the machine fails once in $F$ seconds on
# average, $F$ much larger than all else. With one checkpoint every $t$ seconds, a share $s/t$ of
# the time goes into saving, and each failure costs $t/2$ on average. Write
# `best_interval(save_seconds, failure_seconds)`, the $t$ that wastes least, and
# `wasted(interval, save_seconds, failure_seconds)`, the share of time that is lost.
# ````


# %% tags=["solution"]
def wasted(interval: float, save_seconds: float, failure_seconds: float) -> float:
    """Return the share of time that is lost to saving and to repeating."""
    return save_seconds / interval + interval / 2 / failure_seconds


def best_interval(save_seconds: float, failure_seconds: float) -> float:
    """Return the interval at which the derivative, -s/t^2 + 1/(2F), is zero."""
    return math.sqrt(2 * save_seconds * failure_seconds)


# %% tags=["check"]
assert abs(wasted(100, 1, 10_000) - 0.015) < 1e-12, "one part for saving, one for repeating"
for save, failure in ((1.0, 3600.0), (30.0, 86_400.0)):
    best = best_interval(save, failure)
    nearby = [wasted(best * factor, save, failure) for factor in (0.9, 1.0, 1.1)]
    assert nearby[1] < min(nearby[0], nearby[2]), "a longer or shorter interval wastes less"

# %% [markdown]
# ````{exercise} Which layer is it?
# :label: ex-training-layers
# *Fifteen minutes.* `update_ratio` is one number for the whole model. Write
# `ratio_by_part(trainer, batch)`: take one step on `batch`, and return the ratio for each of
# "embedding", "blocks.0", "blocks.1", "norm" and "lm_head", by the names of the parameters.
# ````


# %% tags=["solution"]
def ratio_by_part(trainer: _Steps, batch: Batch) -> dict[str, float]:
    """Return the update ratio of each part of the model in one step."""

    def parts() -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for name, parameter in trainer.model.named_parameters():
            words = name.split(".")
            part = ".".join(words[: 2 if words[0] == "blocks" else 1])
            found.setdefault(part, []).append(parameter.detach().clone())
        return found

    before = parts()
    trainer.train_step(batch)
    after = parts()
    return {part: update_ratio(before[part], after[part]) for part in before}


# %% tags=["check"]
layer = _Steps(small_model(), TrainingConfig(n_steps=9, batch_size=8, learning_rate=1e-2))
ratios = ratio_by_part(layer, sampler[0])
assert set(ratios) == {"embedding", "blocks.0", "blocks.1", "norm", "lm_head"}, "one for each part"
assert layer.step == 1, "take exactly one step"
assert abs(ratios["norm"] - 0.01) < 1e-3, "Adam's first step changes a gain of 1 by the rate, 0.01"
assert ratios["embedding"] < ratios["lm_head"], "the embedding has the larger weights"

# %% [markdown]
# ## Summary
#
# A loss travels as a sum and a count; then micro-batches of any size add up to the large batch. A
# step that is not finite, or whose gradient is far above the median, is skipped and counted.
# Looking does not change a run: random generators are set back. Norms and scales tell what is
# wrong before the loss does. A checkpoint is written under another name, forced to the disk,
# renamed, and verified when it is read; it holds all that the next step depends on, so a killed
# run ends with the same bits. The tiny world is learned to within a few percent of the best that
# can be. On documentation half a minute of training predicts better than gzip and xz alone
# compress, if one forgets what the model weighs.
#
# **Checklist for a run that matters.** Overfit ten batches first: a loss that does not fall to
# nothing there is a bug. Evaluate before the first step: the loss must be near $\ln V$, some nats
# above it if the head is tied ({doc}`11_model`). Kill it once, on purpose, and look at the log.
# Save so often that what a failure costs on average equals what saving costs. Log norm, update
# ratio, activations, logits and skipped steps from the first day. Warm up, clip at 1, and try the
# rate above the one you want, to know how far the cliff is.
#
# **Further reading.** The logbook of OPT {cite}`zhang2022opt` is a frank account of a large
# run. PaLM's report {cite}`chowdhery2023palm` has spikes and MFU; Wortsman and others
# {cite}`wortsman2024proxies` reproduce the instabilities of large models in small ones. How file
# systems lose data that programs thought safe is studied by Pillai and others
# {cite}`pillai2014crash`. That prediction and compression are one is shown, with the model's size
# in the bill, by Delétang and others {cite}`deletang2024compression`.
