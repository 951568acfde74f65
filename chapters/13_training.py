# %% [markdown]
# # The training loop
#
# > Train a model that can be watched, stopped, killed and resumed, and that ends with the same
# > weights every time.
#
# We have a model, a stream of batches, a loss and an optimizer, and ten lines join them. Then the
# run begins, and what happens next is not in the ten lines. The batch does not fit into memory.
# One bad batch turns every weight into NaN. The loss climbs on the third night, and nobody can
# say since when. The machine restarts, and the file that should hold the model is cut in half. A
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
# | **It takes** | 60 minutes for the main line, 4 hours for everything, 3 minutes to run |

# %% tags=["remove-cell"]
#| default_exp training

# %% tags=["engine"]
#| export
# The imports of the module, from Python itself
import base64
import difflib
import gzip
import importlib.metadata
import importlib.util
import io
import json
import lzma
import math
import os
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
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar
from typing import cast, get_args, get_type_hints, runtime_checkable

# %% [markdown]
# This chapter uses most of what the chapters before it have built. The imports are folded.

# %% tags=["engine"]
#| export
# The imports of the module, from other libraries and from earlier chapters
import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from llmbook.batches import Batch, BatchSampler, ResumableBatches, TokenShards
from llmbook.batches import pack_documents, write_shards
from llmbook.cleaning import CleaningReport, clean_documents
from llmbook.corpus import Document, ReadReport, read_files
from llmbook.corpus import read_installed_docs, read_jsonl, write_jsonl
from llmbook.deduplication import deduplicate
from llmbook.environment import best_device, check_at_least, check_choice, check_fraction
from llmbook.environment import check_text, requires_extra, seed_everything
from llmbook.environment import whole_directory, whole_file
from llmbook.model import ModelConfig, TransformerLM, count_parameters, flops_per_token, save_model
from llmbook.optimization import build_optimizer, chunked_cross_entropy, clip_gradients
from llmbook.optimization import constant_schedule, cosine_schedule, cross_entropy
from llmbook.optimization import linear_schedule, parameter_groups, wsd_schedule
from llmbook.tinyworld import Story, TinyWorld
from llmbook.tokenizer import GPT2_PATTERN, GPT4_PATTERN, BPETokenizer, train_bpe

# %% [markdown]
# ## Ten lines
#
# Our data are stories of the tiny world, one in each row, and our model has two small blocks:

# %%
import tempfile

import matplotlib.pyplot as plt

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
print(f"the loss, in nats per token: {losses[0]:.1f} at first, {losses[-1]:.1f} after 60 steps")

# %% [markdown] tags=["engine"]
# ### Engine room: what a function asks of its arguments

# %% [markdown] tags=["engine"]
# Kinds, amounts and shares come first. NaN fails every comparison, so an amount is asked whether it
# is a finite number before it is compared.


# %% tags=["engine"]
#| export
def _check_kind(name: str, value: object, kind: Any, expected: str) -> None:
    """Refuse what is of another type."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {expected}, got {value!r:.60}")


def _check_amount(name: str, value: object, above: float | None = None) -> None:
    """Refuse what is negative, infinite or NaN, or not ``above`` what is given; None passes."""
    if value is None:
        return
    least = "0 or more" if above is None else f"more than {above:g}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    number = number and math.isfinite(cast(float, value))
    if not number or (cast(float, value) < 0 if above is None else cast(float, value) <= above):
        raise ValueError(f"{name}: expected a finite number, {least}, got {value!r}")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value!r}")


# %% [markdown] tags=["engine"]
# Then paths, devices and texts, several of them and not one.


# %% tags=["engine"]
#| export
def _as_path(name: str, path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name}: expected a path, got {path!r:.60}")
    return Path(path)


def _as_device(device: object) -> torch.device:
    try:
        return torch.device(cast(str, device))
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected one of PyTorch's, got {device!r:.60}") from None


def _check_texts(name: str, value: Any) -> None:
    """A single text would be taken for a sequence of characters."""
    if isinstance(value, str):
        raise ValueError(f"{name}: expected a tuple of texts, got {value!r}")
    _check_kind(name, value, Iterable, "a tuple of texts")
    for place, text in enumerate(value):
        check_text(text, f"{name}[{place}]")


def _as_texts(name: str, value: Any) -> list[str]:
    """Return several texts, which may come from an iterator, as a list."""
    texts = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
    _check_texts(name, texts)
    return cast(list[str], texts)


# %% [markdown] tags=["engine"]
# And a row of a log, which has numbers by name.


# %% tags=["engine"]
#| export
#: What is measured at once: numbers by name.
Row = Mapping[str, int | float]


def _check_row(row: object) -> None:
    """Demand numbers by name, the step among them."""
    _check_kind("row", row, Mapping, "numbers by name")
    for name, value in cast(Row, row).items():
        _check_kind(f"row[{name!r}]", value, int | float, "a number")
    if "step" not in cast(Row, row):
        raise ValueError(f"row: expected a step among its numbers, got {row!r:.60}")


# %% [markdown]
# ## A sum and a count
#
# The first number one wants is the loss on text that was not trained on. We take two batches of it
# (sixty steps have not come as far as batches 100 and 101), one full and one with few targets.
# They invite the first mistake, which is to average the two means.

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
print(f"{counts[0]} targets and {counts[1]} targets")
print(f"mean of the two means: {of_means:.1f}, mean over all targets: {of_targets:.1f} nats")

# %% [markdown]
# Three targets got the same weight as five hundred. So what we pass around is never a mean: an
# {term}`objective` returns a **sum** of losses and the **number** of targets. With the chunked
# loss of {doc}`12_optimization` the logits are never all in memory.

# %%
#| export
#: From a model and a batch to the summed loss of its targets and their number. A third value may
#: hold other sums by name, such as the number of right guesses; they are averaged like the loss.
Objective = Callable[[nn.Module, Any], tuple[Any, ...]]


def next_token_objective(
    model: nn.Module, batch: Batch, *, z_loss: float = 0.0, balance_loss: float = 0.0
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""]]:
    """Return the loss of predicting each next token, summed, in nats, and the number of targets.

    ``model`` is a ``TransformerLM``. ``z_loss`` is that of ``cross_entropy``; ``balance_loss``
    weighs the balance loss of experts, which counts once for each target; it is no sum over
    targets, so with it micro-batches are only nearly the whole batch.
    """
    if not hasattr(model, "hidden_states"):
        expected = "a TransformerLM; any other needs an objective of its own"
        raise ValueError(f"model: expected {expected}, got {model!r:.60}")
    _check_kind("batch", batch, Batch, "a Batch, with inputs and targets")
    _check_amount("z_loss", z_loss)
    _check_amount("balance_loss", balance_loss)
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


# %% [markdown] tags=["engine"]
# ### Engine room: leaving out what no loss depends on saves much of the work

# %% [markdown] tags=["engine"]
# Rows of one story are mostly padding, and a mask of documents has nothing to hide in a row that
# holds a single one: in a causal model nothing looks to the right, where the padding is. Both can
# be left out without changing any loss.


# %% tags=["engine"]
#| export
def compact(batch: Batch) -> Batch:
    """Return ``batch`` without what no loss depends on.

    That is padding at the end of all rows, and the numbers of documents where each row has one
    document and then padding: the causal mask hides the padding from it.
    """
    _check_kind("batch", batch, Batch, "a Batch, with inputs and targets")
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


# %% [markdown] tags=["engine"]
# The loss of a batch before and after, and what is left of its places:

# %% tags=["engine"]
batch = sampler[0]
before, after = (next_token_objective(model, b) for b in (batch, compact(batch)))
assert torch.allclose(before[0], after[0], rtol=1e-4) and before[1] == after[1]
share = compact(batch).inputs.numel() / batch.inputs.numel()
print(f"{share:.0%} of the places are left, and all {int(after[1])} targets")

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
# same only if all $N_m$ are equal. With padding or masked prompts they are not. To measure the
# difference we first need to cut a batch.


# %%
#| export
def split_rows(batch: Any, rows: int | None) -> Iterator[Any]:
    """Yield micro-batches of at most ``rows`` rows; None leaves the batch whole.

    A batch that is split is a tuple of tensors, named or not, with one row for each example, and
    None where there is nothing.
    """
    check_at_least(rows=(1, rows))
    if rows is None:
        yield batch
        return
    kind: Any = type(batch)
    if not isinstance(batch, tuple) or not batch or not isinstance(batch[0], Tensor):
        raise ValueError(f"batch: expected a tuple of tensors to split, got {batch!r:.60}")
    for start in range(0, len(batch[0]), rows):
        parts = [None if field is None else field[start : start + rows] for field in batch]
        yield tuple(parts) if kind is tuple else kind(*parts)


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
errors = {}
for name, right in (("gradient of sums", True), ("gradient of means", False)):
    errors[name] = (gradient(split_rows(uneven, 2), right) - whole).norm() / whole.norm()
assert errors["gradient of sums"] < 1e-5
print("sums over the count: off by less than 0.001%")
print(f"mean of the means:   off by {errors['gradient of means']:.0%}")

# %% [markdown]
# ## Settings
#
# A run that fails after a day because of a typing error in a file is a day lost. So everything
# that decides a run sits in one place, is checked at once, and can be written to a file and read
# back. The text beside each setting is a part of its type. It becomes the comment in such a file
# and the help of the command line. Some settings have not come up yet. The sections below explain
# those of evaluation, logs, checkpoints and spikes; `precision`, `compile`, `prefetch` and
# `threads` are explained in the rooms, optimizers and schedules in {doc}`12_optimization`.
# `check`, in the room, refuses what cannot be.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides how a model is trained, checked, but for the model and the data.

    Rates are peaks; ``warmup``, ``evaluate_every`` and the like count steps of the optimizer. What
    cannot be raises a ``ValueError`` that names the field, its value and what was expected.
    """

    n_steps: Annotated[int, "steps of the optimizer"]
    batch_size: Annotated[int, "rows for each of them"]
    micro_batch_size: Annotated[int | None, "rows in one forward pass; null for all"] = None
    optimizer: Annotated[str, "adamw, muon, sgd, or a class of torch.optim"] = "adamw"
    optimizer_options: Annotated[Mapping[str, Any], "other arguments of it"] = field(
        default_factory=dict
    )
    learning_rate: Annotated[float, "the peak; with muon, that of the matrices"] = 1e-3
    adamw_rate: Annotated[float | None, "with muon, that of all else; null for the same"] = None
    weight_decay: Annotated[float, "of matrices"] = 0.1
    betas: Annotated[tuple[float, float], "of adamw"] = (0.9, 0.95)
    clip_norm: Annotated[float | None, "largest length of a gradient; null for any"] = 1.0
    schedule: Annotated[str, "cosine, wsd, linear or constant"] = "cosine"
    warmup: Annotated[int, "steps in which the rate rises"] = 0
    final: Annotated[float, "share of the peak rate at the end"] = 0.1
    z_loss: Annotated[float, "weight of the squared log of the softmax's sum"] = 0.0
    balance_loss: Annotated[float, "weight of the balance of experts"] = 0.01
    evaluate_every: Annotated[int | None, "steps; null for the end"] = None
    best: Annotated[str, "the number of an evaluation that tells the best model"] = (
        "validation_loss"
    )
    best_is: Annotated[str, "lowest or highest"] = "lowest"
    log_every: Annotated[int, "steps"] = 10
    checkpoint_every: Annotated[int | None, "steps; null for the end"] = None
    keep_last: Annotated[int, "checkpoints that are kept"] = 2
    seed: Annotated[int, "of weights and order, in a run; a Trainer gets both ready"] = 0
    precision: Annotated[str, "float32, or bfloat16 by autocast"] = "float32"
    compile: Annotated[bool, "compile the blocks"] = False
    threads: Annotated[int | None, "of the processor in a run; null for as it is"] = None
    parallel: Annotated[str | None, "ddp, fsdp or tp on several processes; null for one"] = None
    prefetch: Annotated[bool, "prepare the next batch in a thread"] = False
    spike_factor: Annotated[float | None, "skip a gradient more than so many times the usual"] = (
        None
    )
    max_skipped: Annotated[int, "skipped steps in a row that end training"] = 20

    def __post_init__(self) -> None:
        self.check()


# %% [markdown] tags=["engine"]
# ### Engine room: settings are checked, and read from files and command lines

# %% [markdown] tags=["engine"]
# What is checked: counts, choices, shares, amounts, and what must fit together. An optimizer may
# be one of ours or any class of `torch.optim`, except LBFGS, whose step needs a function, and
# SparseAdam, which wants sparse gradients.


# %% tags=["engine"]
#| export
class TrainingConfig(TrainingConfig):  # continued
    def check(self) -> None:
        """Raise a ``ValueError`` for the first setting that cannot be."""
        counts = {"n_steps": 1, "batch_size": 1, "log_every": 1, "keep_last": 1, "warmup": 0}
        counts |= {"evaluate_every": 1, "checkpoint_every": 1, "max_skipped": 0, "seed": 0}
        counts |= {"micro_batch_size": 1, "threads": 1}
        for f in fields(self):
            if getattr(self, f.name) is None and f.name not in _MAY_BE_NONE:
                raise ValueError(f"{f.name}: expected a value, got None")
        check_at_least(**{name: (least, getattr(self, name)) for name, least in counts.items()})
        if self.batch_size % (self.micro_batch_size or 1):
            expected = f"a divisor of batch_size = {self.batch_size}"
            raise ValueError(f"micro_batch_size: expected {expected}, got {self.micro_batch_size}")
        if self.precision == "float16":  # it needs more than a name
            expected = "float32 or bfloat16, or a Trainer with precision=MixedPrecision('float16')"
            raise ValueError(f"precision: expected {expected}, got 'float16'")
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:  # which was refused above where it cannot be
                check_choice(name, getattr(self, name), choices)
        _check_optimizer(self.optimizer, self.optimizer_options)
        for name in ("learning_rate", "adamw_rate", "clip_norm"):
            _check_amount(name, getattr(self, name), above=0.0)
        for name in ("weight_decay", "z_loss", "balance_loss"):
            _check_amount(name, getattr(self, name))
        _check_amount("spike_factor", self.spike_factor, above=1.0)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas!r}")
        for place, beta in enumerate(self.betas):
            check_fraction(f"betas[{place}]", beta)
        for name in ("compile", "prefetch"):
            _check_kind(name, getattr(self, name), bool, "True or False")
        check_text(self.best, "best")
        if self.seed >= 2**32:
            raise ValueError(f"seed: expected less than 2**32, got {self.seed}")
        _check_share("final", self.final)
        if self.warmup > self.n_steps:
            expected = f"at most n_steps = {self.n_steps}"
            raise ValueError(f"warmup: expected {expected}, got {self.warmup}")


# %% [markdown] tags=["engine"]
# A setting that does not exist is a slip of the pen, or the habit of another library: chapter 12's
# `lr` is a `learning_rate` here, where it stands beside other rates. Python's own message would
# name neither.


# %% tags=["engine"]
#| export
from inspect import Signature, signature

_OTHER_NAMES = {"lr": "learning_rate", "steps": "n_steps", "max_steps": "n_steps"}
_OTHER_NAMES |= {"warmup_steps": "warmup", "max_norm": "clip_norm", "grad_clip": "clip_norm"}
_OTHER_NAMES |= {"accumulation_steps": "micro_batch_size", "eval_every": "evaluate_every"}


def _no_such_setting(name: str, known: Sequence[str]) -> str:
    """Say which of the ``known`` settings was perhaps meant."""
    close = [_OTHER_NAMES[name]] if _OTHER_NAMES.get(name) in known else []
    close += difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


class TrainingConfig(TrainingConfig):  # continued
    def __new__(cls, **settings: Any) -> "TrainingConfig":
        known = [f.name for f in fields(cls)]
        for name, value in settings.items():
            if name not in known:
                hint = _no_such_setting(name, known)
                raise TypeError(f"{name}: no such setting; {hint} (got {name}={value!r})")
        return object.__new__(cls)


# What help shows are the settings.
TrainingConfig.__signature__ = Signature(  # type: ignore[attr-defined]
    list(signature(TrainingConfig.__init__).parameters.values())[1:]
)


# %% [markdown] tags=["engine"]
# What there is to choose from, what may be left open, and which optimizers PyTorch has.


# %% tags=["engine"]
#| export
_CHOICES = {"schedule": ("cosine", "wsd", "linear", "constant"), "best_is": ("lowest", "highest")}
_CHOICES |= {"precision": ("float32", "bfloat16"), "parallel": ("ddp", "fsdp", "tp")}
_OPTIMIZERS = ("adamw", "muon", "sgd")
_MAY_BE_NONE = {"micro_batch_size", "adamw_rate", "clip_norm", "evaluate_every"}
_MAY_BE_NONE |= {"checkpoint_every", "threads", "spike_factor", "parallel"}


def _torch_optimizer(name: str) -> Any:
    """The class of that name in ``torch.optim`` that steps without more arguments, or None."""
    kind = getattr(torch.optim, name, None) if name not in ("LBFGS", "SparseAdam") else None
    is_one = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    return kind if is_one and kind is not torch.optim.Optimizer else None


def _check_optimizer(name: object, options: object) -> None:
    if name not in _OPTIMIZERS and (not isinstance(name, str) or _torch_optimizer(name) is None):
        expected = f"one of {', '.join(_OPTIMIZERS)}, or a class of torch.optim such as NAdam"
        raise ValueError(f"optimizer: expected {expected}, got {name!r}")
    if not isinstance(options, Mapping):
        raise ValueError(f"optimizer_options: expected settings by name, got {options!r}")


# %% [markdown] tags=["engine"]
# Files have traps of their own: misspelled names, lists where tuples are meant, and `1e-3`, which
# YAML takes for a text because it has no dot. All of that, and the reading of a command line, is
# done by [jsonargparse](https://jsonargparse.readthedocs.io): we hand it one option for each
# field, with its type, its default and the text beside it.


# %% tags=["engine"]
#| export
_T = TypeVar("_T")


def settings_parser(sections: Mapping[str, Any], *, required: bool = True, **options: Any) -> Any:
    """Return a parser of settings, with an option for each field of some dataclasses.

    ``sections`` are dataclasses by name; a field is then called as in "training.n_steps", and where
    the name is empty as in "n_steps". Fields without a default must be there if ``required``.
    ``options`` are those of ``jsonargparse.ArgumentParser``.
    """
    with requires_extra("Reading settings", extra="train"):
        from jsonargparse import ArgumentParser
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
    for section, kind in sections.items():
        types, about = get_type_hints(kind), get_type_hints(kind, include_extras=True)
        for f in fields(kind):
            texts = types[f.name] == tuple[str, ...]  # one text will do as well
            how: dict[str, Any] = {"type": tuple[str, ...] | str if texts else types[f.name]}
            made = f.default_factory() if f.default_factory is not MISSING else f.default
            how |= {"required": required} if made is MISSING else {"default": made}
            name = f"--{section}.{f.name}" if section else f"--{f.name}"
            parser.add_argument(name, help=get_args(about[f.name])[-1], **how)
    return parser


# %% [markdown] tags=["engine"]
# Its messages are good, and are put into the words of all others: the setting, what was expected,
# what came. A name that does not exist gets the nearest one that does.


# %% tags=["engine"]
#| export
def _reworded(message: str, known: Iterable[str]) -> str:
    """Say what a parser of settings found wrong as all errors here do."""
    found = re.search(r"""(?:key|[Oo]ption|required:|arguments:) ["']?(?:--)?([\w.+-]+)""", message)
    if found is None:
        return " ".join(message.split())
    name, value = found[1], re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    if "required:" in message:
        return f"{name}: expected a value, but it is missing"
    if value is None:
        section = name.rpartition(".")[0]
        there = [k.removeprefix(section + ".") for k in known if k.rpartition(".")[0] == section]
        wanted = name.rpartition(".")[2]
        if not there:  # it is the section that is misspelled
            there, wanted = list(dict.fromkeys(k.partition(".")[0] for k in known)), section
        return f"{name}: no such setting; {_no_such_setting(wanted, there)}"
    size = re.search(r"Expected a (\w+ with .*?)\. Got", message)
    kinds = dict.fromkeys(re.findall(r"[Ee]xpected a <class '(\w+)'>", message))
    names = ["nothing" if kind == "NoneType" else kind for kind in kinds]
    expected = f"a {size[1]}" if size else " or ".join(names)
    return f"{name}: expected {expected}, got {value[1]}"


# %% [markdown] tags=["engine"]
# With these two, reading settings is a few lines. On the way back, tuples become lists.


# %% tags=["engine"]
#| export
def read_settings(sections: Mapping[str, Any], entries: Any) -> dict[str, Any]:
    """Return the settings in ``entries``, as a file has them, as their dataclasses want them.

    ``sections`` are those of ``settings_parser``. A ``ValueError`` names the setting that is
    unknown, missing or of another type.
    """
    if not isinstance(entries, Mapping):
        raise ValueError(f"entries: expected settings by name, got {entries!r}")
    parser = settings_parser(sections)
    with _named_errors(_names(sections)):
        found = parser.parse_object(_plain(dict(entries))).as_dict()
    for section, kind in sections.items():
        part = found[section] if section else found
        for name, hint in get_type_hints(kind).items():
            if hint == tuple[str, ...] and isinstance(part[name], str):
                part[name] = (part[name],)
    return found


@contextmanager
def _named_errors(known: Iterable[str]) -> Iterator[None]:
    """Turn what a parser of settings finds wrong in this block into a ValueError."""
    from jsonargparse import ArgumentError

    try:
        yield
    except ArgumentError as error:
        raise ValueError(_reworded(str(error), known)) from None


# %% [markdown] tags=["engine"]
# Its helpers:


# %% tags=["engine"]
#| export
def _names(sections: Mapping[str, Any]) -> list[str]:
    """The names of all settings, as ``settings_parser`` has them."""
    parts = ((section + "." if section else "", kind) for section, kind in sections.items())
    return [start + f.name for start, kind in parts for f in fields(kind)]


def _plain(value: Any) -> Any:
    """Return nested settings as JSON and YAML have them: tuples as lists."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


# %% [markdown] tags=["engine"]
# The configuration gets both directions as methods.


# %% tags=["engine"]
#| export
class TrainingConfig(TrainingConfig):  # continued
    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "TrainingConfig":
        """Return the configuration with these fields; the inverse of ``to_dict``."""
        return cls(**read_settings({"": cls}, entries))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as numbers, texts and lists, fit for JSON and YAML."""
        return _plain(asdict(self))


# %% [markdown] tags=["engine"]
# Each message names the setting, what it was and what was expected:

# %% tags=["engine"]
for wrong in ({"learning_rat": 0.1}, {"learning_rate": -1}, {"micro_batch_size": 3}):
    try:
        TrainingConfig.from_dict({"n_steps": 100, "batch_size": 8} | wrong)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Steps that do harm
#
# One overflow in 16 bits, and the loss is NaN. Then so are all gradients, all weights that have
# one, and both of Adam's averages, for good. It takes a single step:


# %%
def weights_after(n_steps: int, bad: float) -> list[Tensor]:
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for step in range(n_steps):
        total, count = next_token_objective(model, sampler[step])
        loss = total / count * (bad if step == 2 else 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return list(model.parameters())


spoiled = sum(bool(p.isnan().any()) for p in weights_after(4, bad=math.nan))
print(f"one NaN at the third step: NaN in {spoiled} of {len(list(model.parameters()))} parameters")

# %% [markdown]
# A step that is not finite must not be taken: weights and optimizer stay as they were, the
# schedule goes on, and the step is *counted*. Many in a row mean that the run is dead, and it
# should say so.
#
# A finite step can do harm as well. A batch of garbage makes a gradient many times the usual one.
# Clipping limits its length, not its direction, and Adam's memory of squared gradients is inflated
# for $1/(1 - \beta_2)$ steps. PaLM's authors met **spikes** of the loss some twenty times, though
# they clipped, and each time went back a hundred steps and passed over a few hundred batches
# {cite}`chowdhery2023palm`. We look *before* the step: a norm far above the median of the last 64
# is refused. The median, unlike the mean, is not moved by the very outliers that we look for.


# %%
#| export
class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and why."""


class SpikeDetector:
    """Tells a gradient norm ``factor`` times the median of the last ``window`` remembered ones.

    It says nothing before it has seen a quarter of the window; a ``factor`` of None never does.
    """

    def __init__(self, factor: float | None, window: int = 64):
        _check_amount("factor", factor, above=1.0)
        _check_kind("window", window, int, "a whole number")
        check_at_least(window=(1, window))
        self.factor, self.recent = factor, deque[float](maxlen=window)

    def is_spike(self, norm: float) -> bool:
        """Judge ``norm``; asking changes nothing."""
        ready = 4 * len(self.recent) >= cast(int, self.recent.maxlen)
        return self.factor is not None and ready and norm > self.factor * median(self.recent)

    def remember(self, norm: float) -> None:
        """Count ``norm`` among the usual ones."""
        if self.factor is not None:
            self.recent.append(norm)


# %% [markdown]
# A **guard** puts the two reasons together, and counts.


# %%
#| export
class Guard:
    """Decides which steps are taken, and counts those that are not.

    A step is refused if it has no targets, if its loss or its gradient norm is not finite, or if
    the norm is more than ``spike_factor`` times the usual one. More than ``max_skipped`` in a row
    end training.
    """

    def __init__(self, spike_factor: float | None = None, max_skipped: int = 20):
        _check_amount("spike_factor", spike_factor, above=1.0)
        _check_kind("max_skipped", max_skipped, int, "a whole number")
        check_at_least(max_skipped=(0, max_skipped))
        self.spikes, self.max_skipped = SpikeDetector(spike_factor), max_skipped
        self.skipped = self.skipped_in_a_row = 0

    def reason_to_skip(self, loss: float, gradient_norm: float, targets: float = 1.0) -> str | None:
        """Say why a step should not be taken, or None; asking changes nothing."""
        if not targets:
            return "there were no targets"
        for name, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if not math.isfinite(value):
                return f"the {name} was {value}"
        if self.spikes.is_spike(gradient_norm):
            usual = f"more than {self.spikes.factor:g} times the usual"
            return f"the gradient norm was {gradient_norm:.3g}, {usual}"
        return None


# %% [markdown]
# Asking changes nothing. To judge a step is to ask and to count.


# %%
#| export
class Guard(Guard):  # continued
    def judge(
        self, step: int, loss: float, gradient_norm: float, targets: float = 1.0
    ) -> str | None:
        """Decide about a step and count it; return why it is not taken, or None if it is."""
        reason = self.reason_to_skip(loss, gradient_norm, targets)
        if reason is None:
            self.spikes.remember(gradient_norm)
            self.skipped_in_a_row = 0
            return None
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.max_skipped:
            row = f"{self.skipped_in_a_row} steps in a row were skipped"
            raise TrainingError(f"step {step}: {row}, the last because {reason}")
        return reason


# %% [markdown]
# Sixteen steps, a quarter of the window of 64, teach it what is usual. Then come a good step and
# three bad ones:

# %%
guard = Guard(spike_factor=10.0)
for step in range(16):
    guard.judge(step, 3.0, 1.0 + 0.1 * (step % 5))
for loss, norm in ((3.0, 1.5), (3.0, 1200.0), (math.nan, math.nan), (3.0, math.inf)):
    reason = guard.judge(16, loss, norm)
    print(f"loss {loss}, norm {norm:6}: {'taken' if reason is None else 'skipped, ' + reason}")
print(f"{guard.skipped} steps skipped, {guard.skipped_in_a_row} of them in a row")

# %% [markdown]
# ## To look without touching
#
# Evaluation must change nothing. Dropout is off in it, and gradients are not recorded. There is
# one more trap: whoever draws a random number while looking shifts all those of the training that
# follows. So the generators of Python, NumPy and PyTorch are set back. Everything that looks at
# the model does so inside this block:


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


# %% [markdown] tags=["engine"]
# ### Engine room: the states of all random generators as plain data, which checkpoints can hold

# %% [markdown] tags=["engine"]
# The states are made of numbers, lists and tensors, which a checkpoint can hold.


# %% tags=["engine"]
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
# | `memory`, `skipped` | peak memory in bytes; steps not taken | climb |
#
# Instabilities of large models can be provoked in small ones by a high rate, and some of them can
# be foretold from the norms of activations and gradients {cite}`wortsman2024proxies`. MFU,
# **model FLOPs utilization** {cite}`chowdhery2023palm`, is the arithmetic that the model needs,
# `flops_per_token` of {doc}`11_model` times tokens per second, over what the machine could do at
# best. That peak we measure with a large matrix product of the same precision.
#
# The update ratio wants the weights of before, so it costs a copy on the steps that are logged.


# %%
#| export
def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the norm of the change of all weights over the norm of the weights before it.

    ``before`` and ``after`` have the same shapes. From nothing but zeros the change is infinite.
    """
    shapes = [[tuple(t.shape) for t in some] for some in (before, after)]
    if not shapes[0] or shapes[0] != shapes[1]:
        expected = f"tensors shaped as before, {shapes[0]!s:.60}"
        raise ValueError(f"after: expected {expected}, got {shapes[1]!s:.60}")
    changes = torch._foreach_norm(torch._foreach_sub(list(after), list(before)))
    norms = torch._foreach_norm(list(before))
    both = (torch.linalg.vector_norm(torch.stack(n)).item() for n in (changes, norms))
    change, norm = both
    return change / norm if norm else math.inf


# %% [markdown]
# What the blocks hand on is caught by hooks, which PyTorch calls with the output of a module. They
# are kept from being compiled with it.


# %%
#| export
@torch.no_grad()
def activation_scales(model: nn.Module, ids: Int64[Tensor, "batch sequence"]) -> dict[str, float]:
    """Return how large the numbers are inside a ``TransformerLM`` that reads ``ids``.

    "stream/0" and so on are the root-mean-square of what each block hands on, "logits" that of
    the logits, "logits/max" the largest of them in absolute value.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(f"model: expected a TransformerLM, got {model!r:.60}")
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
# A model with fresh weights and one after sixty steps, on the same row of text:

# %%
for name, some in (("fresh", small_model()), ("after 60 steps", model)):
    scales = activation_scales(some, sampler[0].inputs[:1])
    print(f"{name:15}", ", ".join(f"{what} {value:.1f}" for what, value in scales.items()))

# %% [markdown]
# Each step leaves a report, and a **monitor** adds reports up until a row of the log is due. The
# loss that is logged is thus the mean over all targets since the last row. The clock runs while a
# step waits for its batch, and stands still while we look.


# %%
#| export
@dataclass(frozen=True)
class StepReport:
    """What came of a step: means over its targets, and the reason if it was not taken."""

    loss: float
    gradient_norm: float
    targets: float
    metrics: Mapping[str, float] = field(default_factory=dict)  # what else the objective counts
    measured: Mapping[str, float] = field(default_factory=dict)  # such as the update ratio
    skipped: str | None = None

    @property
    def taken(self) -> bool:
        """Whether the weights were changed."""
        return self.skipped is None


# %% [markdown]
# The monitor keeps sums, since sums can be added, and a clock.


# %%
#| export
class Monitor:
    """Adds up what steps report until a row of the log is due, and measures their speed."""

    def __init__(self) -> None:
        self.sums, self.target_sum = dict[str, float](), 0.0  # since the last row
        self.probed = dict[str, list[float]]()  # of probes: a sum and a count of steps
        self.all_targets = 0.0  # since the beginning
        self.seconds = self.recent_targets = 0.0  # since the last row, in this process
        self.clock: float | None = None  # when the work on the step before had ended

    def start(self) -> None:
        """Let the clock run from now."""
        self.clock = time.perf_counter()

    def note(self, report: StepReport) -> None:
        """Add a step that has just ended."""
        now = time.perf_counter()
        self.seconds += now - (now if self.clock is None else self.clock)
        self.clock = now
        if math.isfinite(report.loss):
            for name, mean in {**report.metrics, "loss": report.loss}.items():
                self.sums[name] = self.sums.get(name, 0.0) + mean * report.targets
            self.target_sum += report.targets
        self.all_targets += report.targets
        self.recent_targets += report.targets

    def note_probed(self, numbers: Row) -> None:
        """Add what a probe says of a step."""
        for name, value in numbers.items():
            total, count = self.probed.get(name, (0.0, 0))
            self.probed[name] = [total + value, count + 1]

    def row(self) -> dict[str, float]:
        """Return means over all targets since the last row, and begin anew."""
        row = {name: total / self.target_sum for name, total in self.sums.items()}
        row = {"loss": math.nan, **row, "targets": self.all_targets}
        row |= {name: total / count for name, (total, count) in self.probed.items()}
        row["tokens_per_second"] = self.recent_targets / self.seconds if self.seconds else math.nan
        self.sums, self.target_sum, self.seconds, self.recent_targets = {}, 0.0, 0.0, 0.0
        self.probed = {}
        return row


# %% [markdown]
# The rows go to a **sink**: whatever takes rows, with `start`, `write` and `close`. The first
# sink is a log. The room has three more, `TensorBoard`, `ProgressBar` and `LivePlot`, and what
# the machine can do at best: `peak_flops`, for the MFU, and `peak_memory`.


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
        self.path = None if path is None else _as_path("path", path)
        self.rows: list[Row] = [] if self.path is None else _read_rows(self.path)

    def write(self, row: Row) -> None:
        """Add a row; a line is written whole or, when the disk is full, not at all."""
        _check_row(row)
        self.rows.append(dict(row))
        if self.path is not None:
            _append_row(self.path, row)

    def column(self, name: str) -> tuple[list[int], list[int | float]]:
        """Return the steps that have a value called ``name``, and the values."""
        there = sorted({key for row in self.rows for key in row})
        if name not in there:
            raise ValueError(f"name: expected one of {', '.join(there)}, got {name!r}")
        rows = [row for row in self.rows if name in row]
        return [int(row["step"]) for row in rows], [row[name] for row in rows]


# %% [markdown] tags=["engine"]
# ### Engine room: logs that survive a kill, TensorBoard, bars, plots, and the machine's peaks

# %% [markdown] tags=["engine"]
# A {term}`sink` takes rows of numbers. The file of the log has **JSON lines**: text that any tool
# reads, to which a line is appended in one piece. After a kill some rows belong to steps that
# come again; `start` cuts them off, so that no step is there twice.


# %% tags=["engine"]
#| export
class MetricsLog(MetricsLog):  # continued
    def start(self, step: int) -> None:
        """Drop the rows of later steps, which will come again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if self.path is not None and self.path.exists():
            _write_rows(self.path, self.rows)

    def close(self) -> None:
        """Do nothing: the file has all rows already."""


# %% [markdown] tags=["engine"]
# What a sink must be able to do:


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# A line that was cut off in the middle has no newline at its end, and is left out. When the disk
# is full a row is given up, with a warning; a missing point in a curve is no reason to lose a run.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# Appending bypasses Python's buffer, so that a line reaches the system whole.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# The second sink speaks TensorBoard's format, whose `purge_step` does what our `start` does. The
# third is a bar of `tqdm` for the command line.


# %% tags=["engine"]
#| export
class TensorBoard:
    """A sink that writes curves into ``folder``; see them by ``tensorboard --logdir folder``."""

    def __init__(self, folder: str | Path):
        self.folder, self._writer = _as_path("folder", folder), cast(Any, None)

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


# %% [markdown] tags=["engine"]
# The bar writes to standard output and knows where a resumed run begins.


# %% tags=["engine"]
#| export
class ProgressBar:
    """A sink that shows a bar of ``n_steps`` on standard output, with the last loss."""

    def __init__(self, n_steps: int):
        _check_kind("n_steps", n_steps, int, "a whole number")
        check_at_least(n_steps=(1, n_steps))
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


# %% [markdown] tags=["engine"]
# The fourth draws in the notebook while training goes on: one figure, replaced again and again.


# %% tags=["engine"]
#| export
class LivePlot:
    """A sink that draws the columns ``names`` in the notebook, anew with each row that has one."""

    def __init__(self, names: Sequence[str] = ("loss", "validation_loss")):
        _check_texts("names", names)
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


# %% [markdown] tags=["engine"]
# Each column gets a panel of its own.


# %% tags=["engine"]
#| export
def plot_columns(log: MetricsLog, names: Sequence[str], figure: Any) -> None:
    """Draw columns of ``log`` against steps, one above the other, into a matplotlib ``figure``."""
    _check_kind("log", log, MetricsLog, "a MetricsLog")
    _check_texts("names", names)
    if not hasattr(figure, "add_subplot"):
        raise ValueError(f"figure: expected one of Matplotlib's, got {figure!r:.60}")
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


# %% [markdown] tags=["engine"]
# Peaks: of arithmetic, and of memory.


# %% tags=["engine"]
#| export
@cache
def peak_flops(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return the operations a second of the fastest large matrix product, measured once here."""
    _check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
    size = 8192 if _as_device(device).type == "cuda" else 1024
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)  # draws no random number
    fastest = math.inf
    for _ in range(6):  # the first warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits until it is there
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def peak_memory(device: torch.device | str = "cpu") -> float:
    """Return the most bytes that this process has held, on a GPU those of tensors; or NaN."""
    if _as_device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


# %% [markdown]
# ## A file that is whole or absent
#
# `torch.save(state, path)` opens the file, which empties it, and writes. A kill in between leaves
# neither the old checkpoint nor the new. The cure is to write under another name, force the
# bytes to the disk, and rename, which replaces the old name in one step. The order matters, and
# the second step is the one that is forgotten: file systems may carry out a rename before the
# writes that came first {cite}`pillai2014crash`. {numref}`fig-training-checkpoint` shows what a
# kill leaves at each moment. Below, the second save fails: the disk refuses to take the bytes.
#
# ```{figure} ../figures/training-checkpoint.svg
# :name: fig-training-checkpoint
# :alt: A time line of a save with four stages: writing the draft, fsync, rename, removal of old checkpoints. Below each stage stands what a kill at that moment leaves: a draft that is swept away and the checkpoint of step 200; the same; checkpoints of steps 200 and 300; the newest two.
#
# A save, and what a kill leaves: at every moment there is a whole checkpoint.
# ```


# %%
import unittest.mock


def write_whole(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.part")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # the bytes are on the disk
    draft.replace(path)  # and only then get their name


note = folder / "note.txt"
write_whole(note, b"old")
with unittest.mock.patch("os.fsync", side_effect=OSError), suppress(OSError):
    write_whole(note, b"new")
left = ", ".join(sorted(path.name for path in folder.iterdir() if "note" in path.name))
assert note.read_text() == "old"
print(f"after a save that failed, the note is: {note.read_text()}; files: {left}")

# %% [markdown]
# The format of our checkpoints is safetensors, as for models: it opens everywhere and can run no
# code. What is no tensor (step, rates, random states) is JSON in the header. Disks also damage
# files at rest, so the last tensor is a checksum of all bytes before it. `save_checkpoint(path,
# state)` writes a nested state in this way, and `load_checkpoint(path)` checks the sum and gives
# the state back. In a room below, each byte of a file is damaged in turn, and every such file is
# refused.

# %% [markdown] tags=["engine"]
# ### Engine room: nested states in one file, and refusing to save what could not be loaded

# %% [markdown] tags=["engine"]
# Errors first: a checkpoint that cannot be believed, and one that could not be written.


# %% tags=["engine"]
#| export
class CheckpointError(ValueError):
    """A checkpoint is not what it should be; the message names the file."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, is of an earlier version, or was passed over."""


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
_DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHECKSUM, _DIGEST_SIZE = "checksum", 32


# %% [markdown] tags=["engine"]
# A nested state becomes a tree of JSON with tensors by name. JSON knows neither tuples nor keys
# that are numbers, which optimizers have; a key that begins with a dollar sign marks them. Tied
# weights are stored once. Two tensors of the same name, as in `{"a": {"b": x}, "a/b": y}`, would
# come back as one, and some keys would not come back at all, so both are refused.


# %% tags=["engine"]
#| export
def _to_tree(value: Any, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """Return ``value`` as JSON has it; its tensors go to ``tensors`` under the names in it."""
    if isinstance(value, Tensor):
        return {"$tensor": _stored(value, name, tensors, seen)}
    if isinstance(value, Mapping):
        entries = [
            [_checked_key(key, name), _to_tree(entry, _below(name, key), tensors, seen)]
            for key, entry in value.items()
        ]
        plain_keys = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(entries) if plain_keys else {"$items": entries}
    if isinstance(value, list | tuple):
        parts = [_to_tree(part, f"{name}/{i}", tensors, seen) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"state: {name}: expected tensors, numbers and texts, got {type(value)}")


def _below(name: str, key: Any) -> str:
    return f"{name}/{key}" if name else str(key)


def _checked_key(key: Any, name: str) -> Any:
    """Return a key of a dictionary if JSON gives the same key back."""
    if type(key) not in (str, int, float, bool, type(None)) or key != key:  # NaN is not itself
        expected = "expected keys that are texts or numbers"
        raise ValueError(f"state: {name or 'the outermost'}: {expected}, got {key!r}")
    return key


# %% [markdown] tags=["engine"]
# A tensor is stored under its path, unless the same memory is there already.


# %% tags=["engine"]
#| export
def _stored(tensor: Tensor, name: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> str:
    """Put ``tensor`` among ``tensors``; return the name under which it is found there."""
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"state: {name}: expected one of {list(_DTYPES)}, got {tensor.dtype}")
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else str(tensor.layout)
        raise ValueError(f"state: {name}: expected a dense tensor with values, got {kind}")
    place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    if tensor.numel() and place in seen:  # tied weights are stored once
        return seen[place]
    if name in tensors:
        raise ValueError(
            f"state: {name!r}: expected names that differ, two tensors come to this one"
        )
    if name in (_CHECKSUM, "__metadata__") or not _is_unicode(name):
        raise ValueError(f"state: {name!r}: expected another name, the format cannot have this one")
    seen[place], tensors[name] = name, tensor.detach()
    return name


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a surrogate pair cannot."""
    with suppress(UnicodeEncodeError):
        text.encode()
        return True
    return False


# %% [markdown] tags=["engine"]
# And the way back:


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# The header of a safetensors file says where each tensor is. Ours is written by hand, so that the
# bytes go from the tensors' memory to the disk and through the checksum once, without a copy.


# %% tags=["engine"]
#| export
def _header(tree: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the beginning of a safetensors file: where each tensor is, and the rest as JSON."""
    header: dict[str, Any] = {"__metadata__": {"state": json.dumps(tree)}}
    end = 0
    for name, tensor in tensors.items():
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


# %% [markdown] tags=["engine"]
# Write, force, rename. At the end the folder too is forced to the disk: the name is in it. Whoever
# writes into an archive or a socket gives an open file in place of a path, and does without.


# %% tags=["engine"]
#| export
@runtime_checkable
class _Writable(Protocol):
    def write(self, data: Any, /) -> Any: ...


@runtime_checkable
class _Readable(Protocol):
    def read(self) -> bytes: ...


def save_checkpoint(path: str | Path | _Writable, state: Mapping[str, Any]) -> None:
    """Write ``state``, nested dictionaries of tensors, numbers and texts, to one file, or nothing.

    It is a safetensors file; what is no tensor is JSON in its header, and the last tensor is a
    checksum of all before it. The file is complete and on the disk when it gets its name. ``path``
    may be a file that is open for bytes, and then stays open: what becomes of it is your affair. A
    ``ValueError`` names what could not be read back, an ``OSError`` says that the disk refused.
    """
    _check_kind("state", state, Mapping, "a dictionary")
    tensors = dict[str, Tensor]()
    try:
        tree = _to_tree(state, "", tensors, {})
    except RecursionError:
        raise ValueError("state: expected an end, but something in it contains itself") from None
    if not isinstance(path, str | Path) and hasattr(path, "write"):
        _write_state(path, tree, tensors)
        return
    path = _as_path("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft, draft.open("wb") as file:
        _write_state(file, tree, tensors)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


# %% tags=["engine"]
#| export
def _write_state(file: Any, tree: Any, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(file, io.TextIOBase):
        raise ValueError(f"path: expected a file that is open for bytes, got {file!r:.60}")
    digest = blake2b(digest_size=_DIGEST_SIZE)
    for part in (_header(tree, tensors), *map(_raw, tensors.values())):
        digest.update(part)
        file.write(part)
    file.write(digest.digest())


def _sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk, too, where the system can do that."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# %% [markdown] tags=["engine"]
# Loading compares the checksum before anything in the file is believed. Whatever is wrong, the
# message names the file.


# %% tags=["engine"]
#| export
def load_checkpoint(path: str | Path | _Readable) -> dict[str, Any]:
    """Return the state that ``save_checkpoint`` wrote, its tensors on the CPU.

    ``path`` may be a file that is open for bytes; it is read from where it stands to its end. A
    ``CheckpointError`` names the file and what is wrong: missing, damaged, or another format.
    """
    source: Any = path if hasattr(path, "read") else _as_path("path", path)
    path = getattr(source, "name", source) if hasattr(path, "read") else source
    try:
        # Bytes in memory: tensors that are mapped to the file would need it for ever.
        content = source.read_bytes() if isinstance(source, Path) else source.read()
        if isinstance(content, str):
            raise CheckpointError(f"path: expected a file that is open for bytes, got {source!r}")
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
# ## Which one to go on from
#
# A run goes on from its newest whole checkpoint. A damaged one is passed over with a warning, and
# since the last *k* are kept, there is one before it. Besides these, the best model is kept,
# however long ago it was. A **checkpointer** does all this in the folder of a run, with
# `list_checkpoints`, `newest_checkpoint` and two helpers from the room. A disk that refuses is a
# warning, and the run goes on: the checkpoint before is still there.


# %%
#| export
class Checkpointer:
    """Keeps the newest ``keep_last`` checkpoints of a run in ``folder``, and the best model.

    Without a folder it keeps nothing.
    """

    def __init__(self, folder: str | Path | None, keep_last: int = 2):
        _check_kind("keep_last", keep_last, int, "a whole number")
        check_at_least(keep_last=(1, keep_last))
        self.folder = None if folder is None else _as_path("folder", folder)
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, whole or damaged."""
        return [] if self.folder is None else list(list_checkpoints(self.folder))

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint and remove old ones; if the disk refuses, that is a warning."""
        if self.folder is not None and _save(self.folder / f"step-{step:09d}.safetensors", state):
            _sweep(self.folder, self.keep_last)

    def save_best(self, state: Mapping[str, Any]) -> None:
        """Keep ``state`` as that of the best model."""
        if self.folder is not None:
            _save(self.folder / "best.safetensors", state)

    def newest(self) -> dict[str, Any] | None:
        """Return the state to go on from, or None if there is none."""
        return None if self.folder is None else newest_checkpoint(self.folder)

    def best(self) -> dict[str, Any]:
        """Return what ``save_best`` kept."""
        if self.folder is None:
            raise ValueError("folder: expected the one with best.safetensors, got None")
        return load_checkpoint(self.folder / "best.safetensors")


# %% [markdown] tags=["engine"]
# ### Engine room: finding the newest whole file, and sweeping up

# %% [markdown] tags=["engine"]
# Drafts of killed saves are removed with the old checkpoints.


# %% tags=["engine"]
#| export
_CHECKPOINT = re.compile(r"step-(\d{9})\.safetensors", re.ASCII)


def list_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a trainer's ``folder`` by step, oldest first, whole or damaged."""
    found = {
        int(match[1]): path
        for path in _as_path("folder", folder).glob("step-*.safetensors")
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
            warnings.warn(f"{error}; taking the one before", CheckpointWarning, stacklevel=4)
    if paths:
        raise CheckpointError(f"{folder}: no checkpoint is whole; remove them to begin anew")
    return None


# %% [markdown] tags=["engine"]
# What is not needed any more is swept up, and a full disk is a warning.


# %% tags=["engine"]
#| export
def _sweep(folder: Path, keep_last: int) -> None:
    """Remove old checkpoints, and drafts that killed saves left."""
    surplus = list(list_checkpoints(folder).values())[:-keep_last]
    for path in (*surplus, *folder.glob(".*.part")):
        path.unlink(missing_ok=True)


def _save(path: Path, state: Mapping[str, Any]) -> bool:
    try:
        save_checkpoint(path, state)
    except OSError as error:
        message = f"{path}: not saved: {error}; what was saved before stays"
        warnings.warn(message, CheckpointWarning, stacklevel=4)
        return False
    return True


# %% [markdown] tags=["engine"]
# A flipped bit is found, in whichever byte it is:

# %% tags=["engine"]
path = folder / "demo.safetensors"
save_checkpoint(path, {"weights": torch.arange(8.0), "step": 3, "betas": (0.9, 0.95)})
assert load_checkpoint(path)["betas"] == (0.9, 0.95)
whole, found = path.read_bytes(), 0
for place in range(len(whole)):
    broken = bytearray(whole)
    broken[place] ^= 1 << place % 8
    path.write_bytes(broken)
    try:
        load_checkpoint(path)
    except CheckpointError:
        found += 1
assert found == len(whole)
print(f"{len(whole)} bytes, one bit of each flipped in turn: {found} files refused")

# %% [markdown]
# ## The trainer
#
# All parts but a few are there ({numref}`fig-training-parts`; the rest is in the room at the end
# of this section), and the class that uses them reads like the ten lines from the beginning. We
# write it in pieces: what it is given, a step, the loop, evaluation, and what outlives the
# process.
#
# ```{figure} ../figures/training-parts.svg
# :name: fig-training-parts
# :alt: On the left the loop of the trainer, four boxes in a circle: next batch, learn, count, attend. On the right five boxes with what it uses: the objective, which gives sums and counts of micro-batches; the guard, which skips steps that are not finite or spike; the monitor, which adds up reports; the checkpointer, which keeps whole states; and probes and sinks, which look on. Beside each box stands the failure that calls for it.
#
# The trainer and its parts, and the failure that each one is there for.
# ```
#
# What looks on is called a **probe**. It is attached once, may look at four moments, and overrides
# what it needs.


# %%
#| export
class Probe:
    """Looks on while a model is trained; a subclass overrides what it needs.

    Random numbers that ``evaluate`` draws do not change training; those that others draw do.
    """

    def attach(self, trainer: "Trainer") -> None:
        """Once, when ``trainer`` is made: the place for ``trainer.register``."""

    def before_update(self, trainer: "Trainer") -> None:
        """Before each update of the weights, when ``.grad`` is empty; a step may have several."""

    def after_micro_batch(self, trainer: "Trainer", batch: Any, sums: "Sums") -> None:
        """After each micro-batch: its gradients have joined those in ``.grad``."""

    def after_step(self, trainer: "Trainer", report: StepReport) -> Row | None:
        """After each step: return what is to be logged, as means over steps, or nothing.

        ``report.taken`` says whether the weights were changed. ``.grad`` is by now divided by the
        targets and clipped; ``report.gradient_norm`` is that of before clipping.
        """
        return None

    def evaluate(self, trainer: "Trainer") -> Row:
        """At each evaluation, without gradients or dropout: return what is to be logged of it."""
        return {}


# %% [markdown]
# Here is what a trainer is given. `config` names the optimizer and the schedule; everything else
# has a default.


# %%
#| export
class Trainer:
    """Trains ``model`` on ``batches`` as ``config`` says: the same run, however often it is killed.

    ``validation`` batches are scored every ``evaluate_every`` steps. ``folder`` gets
    ``metrics.jsonl`` and checkpoints, from which ``train`` goes on by itself. ``objective`` is by
    default ``next_token_objective``. ``optimizer``, a function of the model that returns one,
    takes the place of the one that ``config`` names; its rates are then the peaks, and
    ``learning_rate``, ``weight_decay`` and ``betas`` of ``config`` are not used. ``precision``
    and ``parallel`` take the place of those that ``config`` names. ``probes`` look on: each is a
    ``Probe``, or a function of the model whose numbers are logged with each evaluation. ``sinks``
    get what is logged; "mfu" there is a share of ``peak``, in operations a second.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: ResumableBatches,
        config: TrainingConfig,
        *,
        validation: Sequence[Any] | None = None,
        folder: str | Path | None = None,
        objective: Objective | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        precision: "Precision | None" = None,
        parallel: "Parallel | None" = None,
        probes: "Sequence[Probe | Callable[[nn.Module], Row]]" = (),
        sinks: Sequence[Sink] = (),
        peak: float | None = None,
    ):
        _check_kinds(batches, config, validation, optimizer, objective)
        _check_amount("peak", peak, above=0.0)
        for sink in sinks:
            _check_kind("sinks", sink, Sink, "things that start, write and close")
        self.parallel = _checked_parallel(parallel, config)
        self.parallel.prepare(model, batches, config)
        self.model, self.batches, self.config = model, batches, config
        self.validation, self.peak = validation, peak
        self.folder = Path(folder) if folder is not None and self.parallel.is_main else None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        _check_given(self, probes)
        self.device = self.parameters[0].device
        self.objective = objective or _default_objective(model, config)
        self.score = objective or next_token_objective  # what evaluation adds up
        made = (optimizer or partial(_optimizer, config=config))(model)
        self.optimizer = _checked_optimizer(made, model)
        self.precision = _checked_precision(precision, config, model)
        self.schedule = _schedule(config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.set_up(probes, sinks)


# %% [markdown]
# Around these stand the parts from above: guard, monitor, checkpointer, log and probes.


# %%
#| export
class Trainer(Trainer):  # continued
    def set_up(self, probes: Sequence[Any], sinks: Sequence[Sink]) -> None:
        """Make the parts that surround the steps; the constructor calls this once."""
        config = self.config
        self.guard = Guard(config.spike_factor, config.max_skipped)
        self.monitor, self.checkpoints = Monitor(), Checkpointer(self.folder, config.keep_last)
        self.log = MetricsLog(self.folder / "metrics.jsonl" if self.folder else None)
        self.sinks: list[Sink] = [self.log, *(sinks if self.parallel.is_main else ())]
        self.step, self.interrupted = 0, False  # how many steps were taken
        self.evaluation_failed = False  # that of this step
        self.best = _worst(config)
        self.registered = dict[str, Any]()
        self.probes = [_as_probe(probe) for probe in probes]
        for probe in self.probes:
            probe.attach(self)
        for block in getattr(self.model, "blocks", [self.model]) if config.compile else ():
            block.compile()


# %% [markdown]
# What an objective returns travels as one value, `Sums`: summed loss, number of targets, other
# sums by name. `+` adds two of them, `numbers` turns them into numbers of Python, and `report`
# divides by the count.


# %%
#| export
class Sums(NamedTuple):
    """What an objective found: a summed loss, the number of targets, and other sums by name."""

    loss: Any
    targets: Any
    others: Mapping[str, Any]

    def __add__(self, other: "Sums") -> "Sums":  # type: ignore[override]
        """Add loss, count, and all else by name."""
        names = {**self.others, **other.others}
        others = {k: self.others.get(k, 0.0) + other.others.get(k, 0.0) for k in names}
        return Sums(self.loss + other.loss, self.targets + other.targets, others)

    def detached(self) -> "Sums":
        """Return the same sums without what made them."""
        others = {name: torch.as_tensor(total).detach() for name, total in self.others.items()}
        return Sums(self.loss.detach(), self.targets, others)

    def numbers(self) -> "Sums":
        """Return the same sums as numbers of Python; this waits for a GPU."""
        others = {name: float(total) for name, total in self.others.items()}
        return Sums(float(self.loss), float(self.targets), others)

    def report(self, norm: Tensor) -> StepReport:
        """Return means over all targets; this waits for a GPU, once."""
        loss, count = self.loss, self.targets
        others = [total.to(loss) / count for total in self.others.values()]
        numbers = torch.stack([loss / count, norm.to(loss), count, *others]).tolist()
        means = dict(zip(self.others, numbers[3:], strict=True))
        return StepReport(numbers[0], numbers[1], numbers[2], metrics=means)


# %% [markdown]
# `compute` runs an objective on a batch, at the precision that was asked for.


# %%
#| export
class Trainer(Trainer):  # continued
    def compute(self, objective: Objective, batch: Any, model: nn.Module | None = None) -> Sums:
        """Return what ``objective`` finds in a batch, at the precision that was asked for."""
        batch = compact(batch) if isinstance(batch, Batch) else batch
        batch = batch.to(self.device) if hasattr(batch, "to") else batch
        with self.precision.computing(self.device):
            model = self.model if model is None else model
            return _checked_sums(self.parallel.call(objective, model, batch))


# %% [markdown]
# A step adds up the gradients of all micro-batches, which is {eq}`training-accumulation` without
# the division.


# %%
#| export
class Trainer(Trainer):  # continued
    def accumulate(self, batch: Any, objective: Objective | None = None) -> "Sums":
        """Add up the gradients of all micro-batches, and what the objective counts in them."""
        loss, count = torch.zeros((2,), device=self.device).unbind()
        sums = Sums(loss, count, {})
        for part in self.parallel.parts(split_rows(batch, self.config.micro_batch_size)):
            found = self.compute(self.objective if objective is None else objective, part)
            _check_gradient(found.loss)
            self.precision.scaled(found.loss).backward()
            found = found.detached()
            sums = sums + found
            for probe in self.probes:
                probe.after_micro_batch(self, part, found)
        return self.parallel.total(sums)


# %% [markdown]
# Then it divides by the count, clips, and updates the weights if the guard has no reason against
# it. Loss, norm and counts are fetched from the device together: on a GPU each `.item()` waits
# until all queued work is done, so there is one wait in a step and not one in each micro-batch.
# (`scaled`, above, and `settle` do nothing here. {doc}`15_precision` gives them work, where it
# trains in 16 bits.)


# %%
#| export
class Trainer(Trainer):  # continued
    def learn(self, batch: Any, objective: Objective | None = None) -> StepReport:
        """Learn from a batch by one update; override this for a step of your own."""
        settled = False
        while not settled:  # gradients in 16 bits may overflow: then the batch is tried again
            self.optimizer.zero_grad()
            for probe in self.probes:
                probe.before_update(self)
            sums = self.accumulate(batch, objective)
            settled = self.parallel.settle(self.precision, self.optimizer, sums.loss)
        if gradients := self.parallel.local(p.grad for p in self.parameters if p.grad is not None):
            torch._foreach_div_(gradients, sums.targets)  # from the sum over targets to the mean
        norm = self.parallel.clip(self.parameters, self.config.clip_norm or math.inf)
        report = sums.report(norm)
        numbers = report.loss, report.gradient_norm, report.targets
        skipped = self.guard.judge(self.step + 1, *numbers)
        measured = self.update() if skipped is None else {}
        return replace(report, skipped=skipped, measured=measured)


# %% [markdown]
# An update sets the rates and lets the optimizer take its step.


# %%
#| export
class Trainer(Trainer):  # continued
    def update(self) -> dict[str, float]:
        """Change the weights; if the step is logged, return by how much."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(self.step)
        if not self.is_due(self.config.log_every, self.step + 1):
            self.parallel.step(self.optimizer)
            return {}
        before = [parameter.detach().clone() for parameter in self.parameters]
        self.parallel.step(self.optimizer)
        return {"update_ratio": self.parallel.update_ratio(before, self.parameters)}


# %% [markdown]
# Around the steps is the loop. `session` does what must be done before and undone after it: lock
# the folder, go on from the newest checkpoint, open the logs, and turn the first Ctrl-C into a
# note.


# %%
#| export
class Trainer(Trainer):  # continued
    def train(self) -> MetricsLog:
        """Take the steps that are missing, and return the log.

        Ctrl-C ends training after the step under way, with a checkpoint: ``interrupted`` is then
        true, and the same call goes on. A second Ctrl-C is a ``KeyboardInterrupt`` at once.
        """
        with self.session() as (batches, is_interrupted):
            while self.step < self.config.n_steps and not is_interrupted():
                batch = _checked_batch(next(batches), self.config.batch_size, self.parallel.shares)
                report = self.train_step(batch)
                self.attend(batch, report)
        return self.log

    def train_step(self, batch: Any) -> StepReport:
        """Learn from one batch, count the step, and tell the monitor and the probes."""
        if self.monitor.clock is None:
            self.monitor.start()
        report = _checked_report(self.learn(_for_learn(self, batch)))
        self.step += 1
        self.monitor.note(report)
        names = set(report.metrics)
        for probe in self.probes:
            if (said := probe.after_step(self, report)) is not None:
                numbers = _numbers(probe, said, names)
                self.monitor.note_probed(numbers)
                names |= numbers.keys()
        return report


# %% [markdown]
# After a step comes what is due: a row for the log, an evaluation, a checkpoint. `measurements`,
# in the room, makes the row: what was measured in the step, the monitor's means, the MFU, and the
# scales of activations.


# %%
#| export
class Trainer(Trainer):  # continued
    def attend(self, batch: Any, report: StepReport) -> None:
        """Log, evaluate, save: do what is due after a step."""
        due = self.is_watched and self.is_due(self.config.evaluate_every)
        with self.saved_if_it_fails():
            evaluation = self.evaluation() if due else {}
            row = self.measurements(batch, report) if self.is_due(self.config.log_every) else {}
            self.record(row, evaluation)
        if self.is_due(self.config.checkpoint_every):
            self.save()
        self.monitor.start()  # what was done here is no part of the speed

    def is_due(self, every: int | None, step: int | None = None) -> bool:
        """Whether what is done ``every`` so many steps, and at the end, is done after ``step``."""
        check_at_least(every=(1, every))
        step = self.step if step is None else step
        return step == self.config.n_steps or (every is not None and step % every == 0)


# %% [markdown]
# Evaluation is a sum over a count again, over all validation batches.


# %%
#| export
class Trainer(Trainer):  # continued
    def evaluate(self) -> float:
        """Return the mean loss over all targets of the validation batches, in nats.

        A ``ValueError`` if there are no batches, NaN if they have no targets.
        """
        if not self.validation:
            raise ValueError("validation: expected at least one batch to evaluate on, got none")
        return self.scores()["validation_loss"]

    def scores(self, model: nn.Module | None = None) -> dict[str, float]:
        """Return the mean loss on validation batches, and means of what else the objective sums.

        They are those of ``model``, if it is another one than the trainer's; and nothing if there
        are no validation batches.
        """
        if not self.validation:
            return {}
        with unnoticed(self.model if model is None else model):
            each = partial(self.compute, self.score, model=model)
            sums = self.parallel.added(each, self.validation)
        totals, count = {"loss": sums.loss, **sums.others}, sums.targets
        means = {name: total / count if count else math.nan for name, total in totals.items()}
        return {f"validation_{name}": mean for name, mean in means.items()}


# %% [markdown]
# What probes measure joins the row, and if the number that `best` names is better than ever, the
# model is kept.


# %%
#| export
class Trainer(Trainer):  # continued
    def evaluation(self) -> dict[str, int | float]:
        """Return what is logged of an evaluation: the scores, and what the probes say."""
        row: dict[str, int | float] = {**self.scores()}
        with unnoticed(self.model):
            for probe in self.probes:
                row |= _numbers(probe, probe.evaluate(self), row)
        return self.parallel.agreed(lambda: row)

    def record(self, row: Row, evaluation: Row) -> None:
        """Send a row and an evaluation to all sinks; keep the model if it is the best so far.

        The weights that are kept are the model's own, even if ``best`` is a number of an average.
        """
        if twice := sorted(row.keys() & evaluation.keys()):
            raise ValueError(f"probes: expected names that differ, got {twice[0]!r} twice")
        if row or evaluation:
            for sink in self.sinks:
                sink.write({"step": self.step, **row, **evaluation})
        value = _told(evaluation, self.config.best)
        if value < self.best if self.config.best_is == "lowest" else value > self.best:
            self.best = value
            state: Any = {"step": self.step, "metric": self.config.best, "value": value}
            state["model"] = self.parallel.gathered(model_state(self.model))
            self.checkpoints.save_best(state)


# %% [markdown]
# What must a checkpoint hold, so that the steps to come are the same to the last bit? Everything
# they depend on: the weights; the optimizer's averages; the step, of which the schedule is a
# function; the sampler's step and the identity of its data; the random generators, for dropout;
# the sums since the last row of the log; the norms by which spikes are judged. A missing one gives
# a run that looks fine and is another. `identity` is the list of settings that must not differ.


# %%
#| export
class Trainer(Trainer):  # continued
    def state_dict(self) -> dict[str, Any]:
        """Return everything that the steps to come depend on, fit for ``save_checkpoint``."""
        return {
            "config": self.identity(),
            "counters": _counters(self),
            "norms": list(self.guard.spikes.recent),
            "model": self.parallel.gathered(model_state(self.model)),
            "optimizer": self.parallel.gathered(self.optimizer.state_dict()),
            "precision": self.precision.state_dict(),
            "batches": self.batches.state_dict(),
            "random": self.parallel.random_states(),
            "registered": {name: thing.state_dict() for name, thing in self.registered.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; a ``ValueError`` says what is not as it was then."""
        _check_identity(self.identity(), state["config"])
        self.batches.load_state_dict(state["batches"])
        self.parallel.load_model(self.model, state["model"])
        self.parallel.load_optimizer(self.optimizer, state["optimizer"])
        self.precision.load_state_dict(state.get("precision", {}))  # which the first ones lack
        self.parallel.set_random_states(state["random"])
        _set_counters(self, state["counters"])
        if _changed_best(self.config, state["config"]):
            self.best = _worst(self.config)  # of another number, and anew
        self.guard.spikes.recent.clear()
        self.guard.spikes.recent.extend(state["norms"])
        for name, thing in self.registered.items():
            thing.load_state_dict(state["registered"][name])


# %% [markdown]
# With these two, saving and resuming is short. Whatever else a run depends on is put on the list
# by `register`.


# %%
#| export
class Trainer(Trainer):  # continued
    def register(self, name: str, thing: Any) -> Any:
        """Make ``thing`` a part of all checkpoints, and return it.

        It has a ``state_dict`` and a ``load_state_dict``, as modules and optimizers have. A run
        resumes only if the same names are registered.
        """
        return _register(self, name, thing)

    def save(self) -> None:
        """Write a checkpoint and remove old ones; if the disk refuses, that is a warning."""
        self.checkpoints.save(self.step, self.state_dict())

    def resume(self) -> int:
        """Go on from the newest whole checkpoint in the folder, if any; return the step."""
        if (state := self.parallel.agreed(self.checkpoints.newest)) is not None:
            self.load_state_dict(state)
        return self.step

    def load_best(self) -> int:
        """Give the model the weights of the best evaluation; return the step they are from."""
        state = self.parallel.agreed(self.checkpoints.best)
        self.parallel.load_model(self.model, state["model"])
        return state["step"]


# %% [markdown] tags=["engine"]
# ### Engine room: what must agree for a run to be the same run, and what happens around the loop

# %% [markdown] tags=["engine"]
# The row that is logged:


# %% tags=["engine"]
#| export
class Trainer(Trainer):  # continued
    @property
    def is_watched(self) -> bool:
        """Whether an evaluation has anything to say."""
        return bool(self.validation or self.probes)

    @contextmanager
    def saved_if_it_fails(self) -> Iterator[None]:
        """Save what was learned if what looks at it fails; a resumed run evaluates first."""
        try:
            yield
        except Exception:
            self.evaluation_failed = True
            if self.parallel.world_size == 1:  # else the others may not be here to take part
                self.save()
            raise

    @property
    def skipped(self) -> int:
        """How many steps were skipped."""
        return self.guard.skipped

    def measurements(self, batch: Any, report: StepReport) -> dict[str, float]:
        """Return what is logged of the steps since the last time."""
        row = {"gradient_norm": report.gradient_norm, **report.measured, **self.monitor.row()}
        row |= {"rate": float(self.rates[0]) * self.schedule(self.step - 1)}
        row |= {"skipped": float(self.guard.skipped), "memory": peak_memory(self.device)}
        row |= self.precision.numbers()
        model = uncompiled(self.model)
        if self.peak is not None and isinstance(getattr(model, "config", None), ModelConfig):
            flops = flops_per_token(cast(Any, model).config)
            row["mfu"] = flops * row["tokens_per_second"] / self.peak / self.parallel.world_size
        if isinstance(model, TransformerLM) and isinstance(batch, Batch):
            ids = compact(next(split_rows(batch, 1))).inputs.to(self.device)
            with unnoticed(model):
                row |= activation_scales(model, ids)
        return row


# %% [markdown] tags=["engine"]
# What the settings ask for is built by the names of {doc}`12_optimization`.


# %% tags=["engine"]
#| export
def _default_objective(model: nn.Module, config: TrainingConfig) -> Objective:
    experts = getattr(getattr(model, "config", None), "n_experts", 0)
    balance_loss = config.balance_loss if experts else 0.0
    return partial(next_token_objective, z_loss=config.z_loss, balance_loss=balance_loss)


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    name, rate, options = config.optimizer, config.learning_rate, config.optimizer_options
    if (kind := _torch_optimizer(name)) is not None:
        make = partial(kind, parameter_groups(model, config.weight_decay), lr=rate)
    else:
        decay = {"weight_decay": config.weight_decay, "betas": config.betas}
        rates = {"lr": rate, "adamw_lr": config.adamw_rate}
        make = partial(build_optimizer, model, cast(Any, name), **cast(Any, rates | decay))
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"optimizer_options: expected arguments of {name}: {error}") from None


def _schedule(config: TrainingConfig) -> Callable[[int], float]:
    if config.schedule == "constant":
        return constant_schedule(warmup=config.warmup)
    make = {"cosine": cosine_schedule, "wsd": wsd_schedule, "linear": linear_schedule}
    return make[config.schedule](config.n_steps, warmup=config.warmup, final=config.final)


# %% [markdown] tags=["engine"]
# How a step computes is an object, too. This one has float32, and bfloat16 by autocast. Both have
# the same range, so no gradient has to be scaled. {doc}`15_precision` adds float16, which needs
# that: `settle` then undoes the scale, and says whether the gradients had overflowed.


# %% tags=["engine"]
#| export
class Precision:
    """How a step computes: ``name`` is float32, or bfloat16 by autocast; weights stay as they are.

    A subclass may scale losses. Then ``.grad`` is scaled from ``backward`` until ``settle``.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")

    def __init__(self, name: str = "float32"):
        check_choice("name", name, self.NAMES)
        self.name = name

    def check(self, model: nn.Module) -> None:
        """Refuse a ``model`` that cannot be trained in this way."""

    def computing(self, device: torch.device) -> Any:
        """Return the context of a forward pass on ``device``."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.name == "bfloat16")

    def scaled(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return what the backward pass begins with, which is ``loss`` itself here."""
        return loss

    def settle(self, optimizer: torch.optim.Optimizer, loss: Float[Tensor, ""]) -> bool:
        """Undo the scale of all gradients; return whether they are fit for a step.

        If they are not, the trainer computes the same batch again, and counts no step.
        """
        return True

    def numbers(self) -> dict[str, float]:
        """Return what is logged: a subclass has ``loss_scale`` and ``overflows``."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the steps to come depend on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""


# %% [markdown] tags=["engine"]
# One that is given takes the place of the setting, and is asked about the model first.


# %% [markdown] tags=["engine"]
# So is what several processes have to say to each other while they train one model. Here there is
# one, which has nothing to say: each method does what the trainer would do without it.
# {doc}`18_distributed` has the other kind, and `config.parallel` asks for it by name.


# %% tags=["engine"]
#| export
class Parallel:
    """How many processes train one model, and what they exchange: here one, and nothing.

    A subclass overrides all of it; then every process, or rank, makes the same calls in the same
    order. ``shares`` is into how many parts the rows of a batch are divided.
    """

    rank, world_size, shares = 0, 1, 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that logs and saves."""
        return self.rank == 0

    def prepare(self, model: nn.Module, batches: Any, config: TrainingConfig) -> None:
        """Divide the model and the rows of batches, in place; refuse what cannot be divided."""

    def watching(self) -> Any:
        """Return a context in which the loss of another process is a ``TrainingError``."""
        return nullcontext()

    def call(self, objective: Objective, model: nn.Module, batch: Any) -> Any:
        """Return what ``objective`` finds, so that gradients will be exchanged."""
        return objective(model, batch)

    def parts(self, parts: Iterator[Any]) -> Iterator[Any]:
        """Yield the micro-batches of a step; after the last one gradients are sums over all."""
        return parts

    def total(self, sums: "Sums") -> "Sums":
        """Return sums over all processes."""
        return sums

    def added(self, compute: Callable[[Any], "Sums"], batches: Sequence[Any]) -> "Sums":
        """Return the sum, as numbers, of what ``compute`` finds in ``batches``."""
        return sum((compute(batch).numbers() for batch in batches), Sums(0.0, 0.0, {}))

    def settle(self, precision: "Precision", optimizer: Any, loss: Tensor) -> bool:
        """Let ``precision`` settle gradients, with the same outcome in all processes."""
        return precision.settle(optimizer, loss)


# %% [markdown] tags=["engine"]
# If each process has a piece of each tensor, then norms, updates and checkpoints need the whole.


# %% tags=["engine"]
#| export
class Parallel(Parallel):  # continued
    def local(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return what this process has of some tensors."""
        return list(tensors)

    def clip(self, parameters: Sequence[Tensor], max_norm: float) -> Float[Tensor, ""]:
        """Clip gradients by the norm of all of them, and return it."""
        return clip_gradients(parameters, max_norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take its step."""
        optimizer.step()

    def update_ratio(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """Return the ``update_ratio`` of all weights."""
        return update_ratio(before, after)

    def gathered(self, state: Any) -> Any:
        """Return nested states with whole tensors, as one process would have them."""
        return state

    def whole(self, model: nn.Module) -> nn.Module:
        """Return a model with whole weights, on which nothing is exchanged any more."""
        return model

    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Give the model what it needs of a state of whole tensors."""
        load_model_state(model, state)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Give the optimizer what it needs of a state of whole tensors."""
        optimizer.load_state_dict(state)


# %% [markdown] tags=["engine"]
# Decisions are made once. What only one process can know, such as what is in a file, it tells the
# others, and if it fails, all fail with the same message.


# %% tags=["engine"]
#| export
class Parallel(Parallel):  # continued
    def agreed(self, job: Callable[[], _T]) -> _T:
        """Return what ``job`` returns, or raise what it raises, in the main process."""
        return job()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        return flag

    def random_states(self) -> dict[str, Any]:
        """Return the random states of all processes, fit for ``set_random_states``."""
        return random_states()

    def set_random_states(self, states: Mapping[str, Any]) -> None:
        """Go on drawing random numbers where ``random_states`` was called."""
        set_random_states(states)

    def leave(self) -> None:
        """End what the processes have in common."""


# %% [markdown] tags=["engine"]
# Chapter 18's module is imported by its name, when it is asked for: modules import earlier ones.


# %% tags=["engine"]
#| export
def _checked_parallel(parallel: Any, config: TrainingConfig) -> Parallel:
    made = _join(config.parallel) if parallel is None else parallel
    _check_kind("parallel", made, Parallel, "a Parallel, such as Ranks('ddp')")
    return made


def _join(name: str | None) -> Parallel:
    """Return how ``name`` trains on several processes; join the others that torchrun started."""
    if name is None:
        return Parallel()
    return importlib.import_module("llmbook.distributed").Ranks(name)


# %% tags=["engine"]
#| export
def _checked_precision(precision: Any, config: TrainingConfig, model: nn.Module) -> Precision:
    made = Precision(config.precision) if precision is None else precision
    _check_kind("precision", made, Precision, "a Precision, such as MixedPrecision('float16')")
    made.check(model)
    return made


# %% [markdown] tags=["engine"]
# A function of the model is a probe that looks at evaluations only.


# %% tags=["engine"]
#| export
class _Function(Probe):
    def __init__(self, function: Callable[[nn.Module], Row]):
        self.function = function

    def evaluate(self, trainer: "Trainer") -> Any:  # checked where it is used
        return self.function(trainer.model)


def _as_probe(probe: Any) -> Probe:
    if isinstance(probe, Probe):
        return probe
    if not callable(probe) or isinstance(probe, type):
        raise ValueError(f"probes: expected probes or functions of the model, got {probe!r}")
    return _Function(probe)


# %% [markdown] tags=["engine"]
# What a trainer is given is checked where it enters. A batch of the wrong size would make the
# schedule a lie, so it is refused as well.


# %% tags=["engine"]
#| export
def _check_given(trainer: "Trainer", probes: Sequence[Any]) -> None:
    if not trainer.parameters:
        raise ValueError("model: expected parameters to train, got none")
    if trainer.config.evaluate_every is not None and not trainer.validation and not probes:
        raise ValueError("validation: expected batches, as evaluate_every is set, got none")


def _check_kinds(
    batches: Any, config: Any, validation: Any, optimizer: Any, objective: Any
) -> None:
    def refuse(name: str, expected: str, value: Any) -> None:
        raise ValueError(f"{name}: expected {expected}, got {type(value).__qualname__}")

    if not isinstance(config, TrainingConfig):
        refuse("config", "a TrainingConfig", config)
    if not callable(getattr(batches, "load_state_dict", None)):
        refuse("batches", "ResumableBatches, such as a BatchSampler", batches)
    several = isinstance(validation, Sequence) and not hasattr(validation, "_fields")
    if validation is not None and (not several or isinstance(validation, str | bytes)):
        refuse("validation", "a list of batches", validation)
    if optimizer is not None and (isinstance(optimizer, type) or not callable(optimizer)):
        refuse("optimizer", "a function of the model that returns one", optimizer)
    if objective is not None and not callable(objective):
        refuse("objective", "a function of a model and a batch", objective)


# %% tags=["engine"]
#| export
def _checked_optimizer(optimizer: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer if it is one, and of the parameters of this model."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        got = f"got {type(optimizer).__qualname__}"
        raise ValueError(f"optimizer: expected a function that returns one of torch.optim, {got}")
    known = {id(p) for p in model.parameters()}
    strange = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if strange:
        expected = "expected one of the model's own parameters"
        raise ValueError(f"optimizer: {expected}, got {strange} of another model")
    return optimizer


# %% [markdown] tags=["engine"]
# What an objective, a step and a probe return is checked, too, and so are the names under which
# numbers are logged: none may hide another.


# %% tags=["engine"]
#| export
_TAKEN = {"step", "loss", "targets", "tokens_per_second", "gradient_norm", "update_ratio", "rate"}
_TAKEN |= {"skipped", "memory", "mfu", "logits", "logits/max", "loss_scale", "overflows"}


def _checked_sums(found: Any) -> Sums:
    """Return what an objective found, if it is a sum, a count, and perhaps other sums by name."""
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        got = f"{len(found)} values" if isinstance(found, tuple) else type(found).__qualname__
        raise ValueError(f"objective: expected a sum, a count, and perhaps more sums, got {got}")
    loss, others = found[0], found[2] if len(found) == 3 else {}
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__qualname__
        raise ValueError(f"objective: expected a loss that is a tensor of one number, got {got}")
    if not isinstance(others, Mapping):
        got = type(others).__qualname__
        raise ValueError(f"objective: expected other sums by name, got {got}")
    if taken := sorted(_TAKEN & others.keys()):
        raise ValueError(f"objective: expected another name, {taken[0]!r} is taken")
    return Sums(loss, found[1], others)


def _check_gradient(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ValueError("objective: expected a loss with a gradient, got one that is detached")


def _checked_report(report: Any) -> StepReport:
    if not isinstance(report, StepReport):
        raise ValueError(f"learn: expected a StepReport, got {type(report).__qualname__}")
    return report


# %% tags=["engine"]
#| export
def _numbers(probe: Any, row: Any, taken: Iterable[str]) -> dict[str, int | float]:
    """Return what a probe measured as numbers of Python, by names that are not ``taken``."""
    name = getattr(probe, "function", type(probe))
    source = f"probes: {_callable_name(name)}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{source}: expected numbers by name, got {row!r}")
    if twice := sorted(({*taken} | _TAKEN) & row.keys()):
        raise ValueError(f"{source}: expected another name, {twice[0]!r} is taken")
    numbers = dict[str, int | float]()
    for key, value in row.items():
        try:
            numbers[key] = value if isinstance(value, int) else float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{source}: {key}: expected a number, got {value!r}") from None
    return numbers


def _for_learn(trainer: "Trainer", batch: Any) -> Any:
    """Return a batch as a ``learn`` gets it: one of your own finds it on the model's device."""
    is_ours = getattr(trainer.learn, "__func__", None) is Trainer.learn
    return batch if is_ours or not hasattr(batch, "to") else batch.to(trainer.device)


# %% tags=["engine"]
#| export
def _checked_batch(batch: Any, batch_size: int, shares: int = 1) -> Any:
    """Return ``batch`` if it has the rows that the configuration says, else raise."""
    if isinstance(batch, tuple) and len(batch[0]) != batch_size // shares:
        expected = f"batches of {batch_size // shares} rows"
        raise ValueError(f"batch_size: expected {expected}, got one of {len(batch[0])}")
    return batch


def _told(evaluation: Row, name: str) -> float:
    """The number that tells the best model, NaN if the evaluation has no validation loss."""
    if evaluation and name not in evaluation and name != "validation_loss":
        raise ValueError(f"best: expected one of {', '.join(evaluation)}, got {name!r}")
    return float(evaluation.get(name, math.nan))


def _worst(config: Any) -> float:
    return math.inf if config.best_is == "lowest" else -math.inf


def _changed_best(config: Any, then: Mapping[str, Any]) -> bool:
    """Whether "best" meant another thing when a checkpoint was made."""
    before = then.get("best", "validation_loss"), then.get("best_is", "lowest")
    return (config.best, config.best_is) != before


def _register(trainer: "Trainer", name: str, thing: Any) -> Any:
    check_text(name, "name")
    if name in trainer.registered:
        raise ValueError(f"name: expected one that is not registered yet, got {name!r}")
    if trainer.step:
        raise ValueError(f"name: expected to register before the first step, got {name!r} after it")
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(thing, method, None)):
            raise ValueError(f"thing: expected something with {method}(), got {type(thing)}")
    trainer.registered[name] = thing
    return thing


# %% [markdown] tags=["engine"]
# Resuming with other settings, of training or of the model, another optimizer or another objective
# would be another run under the same name. It is refused, except for settings that no weight
# depends on, or, with `compile`, only in its rounding. All this is compared by name, so that a
# message can name what differs.


# %% tags=["engine"]
#| export
class Trainer(Trainer):  # continued
    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint and the trainer that takes it must agree on, by name."""
        model = getattr(uncompiled(self.model), "config", None)
        entries = model.to_dict() if isinstance(model, ModelConfig) else {}
        return {
            **self.config.to_dict(),
            **{f"model.{name}": _plain(value) for name, value in entries.items()},
            **_optimizer_identity(self.optimizer, self.rates),
            "precision": self.precision.name,
            "objective": _callable_name(self.objective),
            "trainer class": type(self).__qualname__,
            "registered": sorted(self.registered),
        }


# %% [markdown] tags=["engine"]
# An optimizer is its class and the settings of its groups, an objective its name and those of its
# arguments that are numbers or texts, a trainer the name of its class. Only names are compared:
# two lambdas are alike.


# %% tags=["engine"]
#| export
_SCALARS = (bool, int, float, str, type(None))


def _optimizer_identity(optimizer: torch.optim.Optimizer, rates: Sequence[Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"optimizer class": type(optimizer).__qualname__}
    for number, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
        entries = {name: _plain(value) for name, value in group.items() if name != "params"}
        entries |= {"lr": float(rate), "initial_lr": None}  # while training, the schedule sets it
        for name, value in entries.items():
            parts = value if isinstance(value, list) else [value]
            if all(isinstance(part, _SCALARS) for part in parts) and name != "param_names":
                told[f"optimizer group {number}, {name}"] = value
    return told


def _callable_name(function: Any) -> str:
    """The name of a function, with the arguments that a partial one has."""
    if isinstance(function, partial):
        given = {k: v for k, v in sorted(function.keywords.items()) if isinstance(v, _SCALARS)}
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{_callable_name(function.func)}({arguments})"
    return getattr(function, "__qualname__", type(function).__qualname__)


# %% [markdown] tags=["engine"]
# An older checkpoint may lack some of these names. Settings that it lacks had their default, and
# the rest is taken on trust, with a warning.


# %% tags=["engine"]
#| export
_MAY_CHANGE = {"evaluate_every", "log_every", "checkpoint_every", "keep_last", "max_skipped"}
_MAY_CHANGE |= {"prefetch", "compile", "best", "best_is", "parallel"}


def _check_identity(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` that names the first thing in which a run differs from a checkpoint.

    Both are what ``Trainer.identity`` returns.
    """
    is_old = "objective" not in there
    if is_old:
        message = (
            "the checkpoint is of an earlier version, and says nothing of optimizer and objective"
        )
        warnings.warn(message, CheckpointWarning, stacklevel=5)
        defaults = {f.name: _plain(f.default) for f in fields(TrainingConfig)}
        defaults |= {"optimizer_options": {}, "registered": []}
        there = {**{k: v for k, v in here.items() if k not in defaults}, **defaults, **there}
    there = {"trainer class": here["trainer class"], **there}  # which the first ones do not tell
    for name in sorted((here.keys() | there.keys()) - _MAY_CHANGE):
        if here.get(name) != there.get(name):
            then = f"expected {there.get(name)!r}, as in the checkpoint"
            raise ValueError(f"{name}: {then}, got {here.get(name)!r}")


# %% [markdown] tags=["engine"]
# The counters are one flat table.


# %% tags=["engine"]
#| export
def _counters(trainer: "Trainer") -> dict[str, Any]:
    monitor, guard = trainer.monitor, trainer.guard
    return {
        "step": trainer.step,
        "best": trainer.best,
        "skipped": guard.skipped,
        "skipped_in_a_row": guard.skipped_in_a_row,
        "loss_sum": monitor.sums.get("loss", 0.0),
        "target_sum": monitor.target_sum,
        "all_targets": monitor.all_targets,
        "other_sums": {name: total for name, total in monitor.sums.items() if name != "loss"},
        "probed": {name: list(pair) for name, pair in monitor.probed.items()},
        "evaluation_failed": trainer.evaluation_failed,
    }


def _set_counters(trainer: "Trainer", counters: Mapping[str, Any]) -> None:
    monitor, guard = trainer.monitor, trainer.guard
    trainer.step, trainer.best = counters["step"], counters["best"]
    guard.skipped, guard.skipped_in_a_row = counters["skipped"], counters["skipped_in_a_row"]
    monitor.target_sum, monitor.all_targets = counters["target_sum"], counters["all_targets"]
    monitor.sums = dict(counters.get("other_sums", {}))
    monitor.probed = {name: list(pair) for name, pair in counters.get("probed", {}).items()}
    trainer.evaluation_failed = counters.get("evaluation_failed", False)
    if monitor.target_sum:
        monitor.sums["loss"] = counters["loss_sum"]


# %% [markdown] tags=["engine"]
# A compiled module hides the original one behind a prefix in all names. Checkpoints hold the names
# without it, so a run that was compiled goes on without, and the other way around.


# %% tags=["engine"]
#| export
_COMPILED = "_orig_mod."


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` was given, or ``model`` itself."""
    _check_kind("model", model, nn.Module, "a module of PyTorch")
    return getattr(model, "_orig_mod", model)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of a model, with the names that it has when it is not compiled."""
    _check_kind("model", model, nn.Module, "a module of PyTorch")
    return {name.replace(_COMPILED, ""): value for name, value in model.state_dict().items()}


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a model, compiled or not, the ``state`` of one that may be the other."""
    _check_kind("model", model, nn.Module, "a module of PyTorch")
    _check_kind("state", state, Mapping, "a state dict")
    names = {name.replace(_COMPILED, ""): name for name in model.state_dict()}
    clean = {name.replace(_COMPILED, ""): value for name, value in state.items()}
    model.load_state_dict({names.get(name, name): value for name, value in clean.items()})


# %% [markdown] tags=["engine"]
# Two processes in one folder would destroy each other's files, so a lock keeps the second out. And
# the first Ctrl-C only leaves a note: the step under way is finished and saved.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# On a GPU the processor can prepare the next batch meanwhile. It is a function of the step, so a
# thread that is one ahead changes no bit; the sampler's step counts what was handed out.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# A session surrounds the loop, and undoes what it has done however the loop ends. An untrained
# model is evaluated first, if evaluation is asked for, or if probes or another idea of the best
# could fail at the end: then that should show before the first step. And an evaluation that failed
# is made up for.


# %% tags=["engine"]
#| export
class Trainer(Trainer):  # continued
    @contextmanager
    def session(self) -> Iterator[tuple[Iterator[Any], Callable[[], bool]]]:
        """Prepare for steps; give the batches to come, and whether Ctrl-C was pressed."""
        with _patient() as is_interrupted, ExitStack() as stack:
            stack.enter_context(self.parallel.watching())
            stack.enter_context(_alone_in(self.folder))
            self.resume()
            for sink in self.sinks:
                stack.callback(sink.close)
                sink.start(self.step or -1)  # the row of step 0 comes again, too
            self.model.train()
            self.first_look()
            self.monitor.start()
            batches = iter(self.batches)
            if self.config.prefetch:
                batches = stack.enter_context(closing(cast(Any, _ahead(self.batches))))
            yield batches, lambda: self.parallel.any(is_interrupted())
            self.interrupted = self.step < self.config.n_steps
            saved = self.parallel.agreed(self.checkpoints.steps)
            if self.interrupted and self.step not in saved:
                self.save()

    def first_look(self) -> None:
        """Evaluate before any step, if that is asked for or could fail, and after a failure."""
        if self.evaluation_failed or (self.step == 0 and self.config.evaluate_every is not None):
            self.record({}, self.evaluation())
            if self.evaluation_failed:
                self.evaluation_failed = False
                self.save()
        elif self.step == 0 and (self.probes or self.config.best != "validation_loss"):
            _told(self.evaluation(), self.config.best)


# %% [markdown]
# ## A first run
#
# We train with a live plot ({numref}`fig-training-live`) and a validation batch of stories that
# are kept out of training:

# %% mystnb={"figure": {"caption": "The live plot as it looks at the end. Loss and validation loss fall together; the update ratio follows the schedule.", "name": "fig-training-live"}, "image": {"alt": "Three curves one above the other over 150 steps: the training loss falls from 7 to below 2, the validation loss falls along with it, and the update ratio rises during warmup and then falls to about a twentieth."}}
steps = {"n_steps": 150, "warmup": 15, "log_every": 10, "evaluate_every": 30}
recipe = {"batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 30}
config = TrainingConfig(**steps, **recipe)
learned = pack_documents(
    write_shards(stories[:1936], folder / "train", tokenizer), 128, "one_per_row"
)
held_out = pack_documents(
    write_shards(stories[1936:], folder / "held_out", tokenizer), 128, "one_per_row"
)
validation = [held_out.batch(range(64))]
live = LivePlot(("loss", "validation_loss", "update_ratio"))
board = TensorBoard(folder / "board")


def new_trainer(where: str, **options: Any) -> Trainer:
    batches = BatchSampler(learned, batch_size=8, seed=1)
    options = {"validation": validation, "folder": folder / where, **options}
    return Trainer(small_model(dropout=0.1), batches, config, **options)


trainer = new_trainer("first", sinks=[live, board], peak=peak_flops())
log = trainer.train()

# %% [markdown]
# The log has a row for each evaluation, and the folder has the last two checkpoints and the best
# model:

# %%
steps_logged, validation_losses = log.column("validation_loss")
assert validation_losses[0] > 6 and validation_losses[-1] < 1.6
for step, loss in zip(steps_logged, validation_losses, strict=True):
    print(f"step {step:3}: validation loss {loss:.1f} nats")
kept = ", ".join(map(str, trainer.checkpoints.steps()))
print(f"checkpoints of steps {kept}; best model of step {trainer.checkpoints.best()['step']}")

# %% [markdown]
# ### What can be changed
#
# A trainer that cannot be bent to a new idea is rewritten for it. These are the places where yours
# goes in. All of them work from a file of settings, too: `run`, below, takes `probes`, and
# `trainer`, which is a class or a function that makes one.
#
# | you want | give |
# |---|---|
# | another optimizer | its name in `torch.optim` as a setting, or `optimizer=`, a function of the model |
# | another arithmetic | `precision=`, such as the `MixedPrecision` of {doc}`15_precision` |
# | another loss | `objective=`, a function of model and batch that returns a sum and a count, and other sums if you like |
# | to measure the model at evaluations | a function of the model, among `probes=` |
# | to look on at micro-batches and steps | a {py:class}`~llmbook.training.Probe` |
# | more state in the checkpoints | `trainer.register(name, thing)` |
# | another idea of the best model | the settings `best`, a number of the evaluation, and `best_is` |
# | another kind of step | a subclass with a `learn` of its own |
#
# As an example we count how often the most likely token is the right one. The objective returns
# that sum beside its loss, and evaluation uses it as well. The best model is now the one that
# guesses best, and is kept in the folder. A probe adds how much the output matrix has grown, and
# the optimizer is PyTorch's NAdam, with weight decay as AdamW has it.


# %%
def with_accuracy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits = model(batch.inputs, document_ids=batch.document_ids)
    total = cross_entropy(logits, batch.targets, reduction="sum")
    right = (logits.argmax(-1) == batch.targets).sum()
    return total, (batch.targets != -100).sum(), {"accuracy": right}


best = {"best": "validation_accuracy", "best_is": "highest"}
nadam = {"optimizer": "NAdam", "optimizer_options": {"decoupled_weight_decay": True}}
settings = TrainingConfig(n_steps=120, **recipe, evaluate_every=40, **nadam, **best)
at_first = small_model().lm_head.weight.detach().norm()
counting = Trainer(
    small_model(),
    BatchSampler(learned, batch_size=8),
    settings,
    objective=with_accuracy,
    validation=validation,
    folder=folder / "counting",
    probes=[lambda model: {"growth": float(model.lm_head.weight.norm() / at_first)}],
)
for row in counting.train().rows:
    if row["step"] in (0, 40, 120):
        right, growth = round(row["validation_accuracy"], 1), row["growth"]
        found = f"about {right:.0%} right, output matrix {growth:.1f} times as large"
        print(f"step {row['step']:3}: {found}")
print("the best model is of step", counting.checkpoints.best()["step"])

# %% [markdown]
# A step of one's own is what the second half of this book needs, where a model learns from what
# it says itself. It makes texts, they are rated, and it learns from them, perhaps more than once.
# All that goes into `learn`, and clipping, guard, log and checkpoints stay as they are. As a toy,
# let a model be rewarded for each token below 100. It draws a token after each prompt. The loss
# is minus the log-probability of that token, times the amount by which its reward exceeds the
# mean reward.


# %%
class Drawn(NamedTuple):
    prompts: Tensor
    tokens: Tensor
    rewards: Tensor
    advantages: Tensor


class Rewarded(Trainer):
    def learn(self, batch: Any, objective: Objective | None = None) -> StepReport:
        with torch.no_grad():  # the batch brings the prompts, the model the rest
            probabilities = self.model(batch.inputs)[:, -1].softmax(-1)
            tokens = probabilities.multinomial(1)[:, 0]
            rewards = (tokens < 100).float()
        drawn = Drawn(batch.inputs, tokens, rewards, rewards - rewards.mean())
        return super().learn(drawn, policy_gradient)


def policy_gradient(model: nn.Module, batch: Drawn) -> tuple[Tensor, int, dict[str, Tensor]]:
    log_probs = model(batch.prompts)[:, -1].log_softmax(-1)
    chosen = log_probs.gather(1, batch.tokens[:, None])[:, 0]
    return -(chosen * batch.advantages).sum(), len(batch.tokens), {"reward": batch.rewards.sum()}


prompts = BatchSampler(shards, batch_size=64, context_length=8)
options = {"schedule": "constant", "weight_decay": 0.0, "log_every": 20}
settings = TrainingConfig(n_steps=100, batch_size=64, learning_rate=3e-3, **options)
rewarded = Rewarded(small_model(), prompts, settings).train().column("reward")[1]
assert rewarded[-1] > 3 * rewarded[0]
print(f"mean reward: {rewarded[0]:.1f} in the first 20 steps, {rewarded[-1]:.1f} in the last 20")

# %% [markdown]
# ## A divergence, provoked and cured
#
# Let us break it: gradient descent with momentum at a rate of 3, with the guard as the only
# precaution, on the same model. Then the same, with a gradient clipped to norm 1 and nothing else
# changed.


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
refused = re.sub(r"step \d+: |, the last.*", "", message)
print(f"without clipping: {refused}: the loss or the gradient was not finite")
print(f"with clipping: {outcome} with a loss of {cured.column('loss')[1][-1]:.1f} nats")

# %% [markdown]
# Which number would have warned us, and when? The simplest alarm fires when a number is twice its
# first value. But numbers grow in healthy runs, too. So we compare with what is usual, and ask
# when a number of the broken run is twice the *largest* value that it has in the cured run.


# %%
def first_above(log: MetricsLog, name: str, limit: float) -> str:
    steps, values = log.column(name)
    return next((f"{s}" for s, v in zip(steps, values, strict=True) if not v <= limit), "never")


names = ("update_ratio", "logits/max", "gradient_norm", "loss")
print(f"{'alarm at step':20} twice the first value, broken / cured   twice the usual")
for name in names:
    first, usual = broken.column(name)[1][0], max(cured.column(name)[1])
    both = " / ".join(first_above(some, name, 2 * first) for some in (broken, cured))
    print(f"{name:20} {both:>37} {first_above(broken, name, 2 * usual):>17}")

# %% [markdown]
# Twice the first value is no alarm: all but the loss pass it in the cured run, too, at the same
# step or the next. Against the usual range, the update ratio warns four steps before the loss
# ({numref}`fig-training-divergence`). We know what is usual from the cured run; in practice it
# comes from earlier runs. For the update ratio the range is roughly known beforehand: with Adam
# $10^{-3}$ to $10^{-2}$. Here, at a rate as high as gradient descent bears, it is two to three
# times more, and the broken run is at $7 \cdot 10^{-2}$ in step 4. After step 12 its gradient is
# not finite. No step is taken any more, so loss and logits stay where they are until the guard
# gives up.

# %% mystnb={"figure": {"caption": "A divergence, and the same run cured. The update ratio of the broken run leaves the range of the cured one at step 4, the largest logit at step 7, the loss at step 8.", "name": "fig-training-divergence"}, "image": {"alt": "Three panels with logarithmic axes over 30 steps: update ratio, largest logit and loss. In the cured run the update ratio stays near two percent, the logits stay near ten and the loss falls to three. In the broken run the update ratio leaves that range at step 4, the logits at step 7 and the loss at step 8; then all three climb by many powers of ten until step 12."}}
fig, axes = plt.subplots(1, 3, figsize=(7, 2.8))
for axis, name in zip(axes, ("update_ratio", "logits/max", "loss"), strict=True):
    for some, label in ((broken, "broken"), (cured, "cured")):
        axis.plot(*some.column(name), label=label)
    axis.set(title=name.replace("_", " "), xlabel="step", yscale="log", xlim=(0, 30))
axes[0].legend()
plt.show()

# %% [markdown]
# ## Killed
#
# Resuming is a claim that can be tested in one way only. A process of its own trains the run from
# above and kills itself in the middle of a step, by SIGKILL, which no program can catch or answer.
# The notebook then takes over its folder.

# %%
import subprocess

script = f"""
import os, signal, sys, torch
from llmbook.training import *
from llmbook.model import ModelConfig, TransformerLM
from llmbook.batches import BatchSampler, TokenShards, pack_documents

torch.set_num_threads(1)
learned, held_out = (pack_documents(TokenShards({str(folder)!r} + part), 128, "one_per_row")
                     for part in ("/train", "/held_out"))
config = TrainingConfig.from_dict({config.to_dict()!r})
torch.manual_seed(0)
model = TransformerLM(ModelConfig.from_dict({trainer.model.config.to_dict()!r}))
trainer = Trainer(model, BatchSampler(learned, 8, seed=1), config,
                  validation=[held_out.batch(range(64))], folder={str(folder / "second")!r})
update = trainer.update
trainer.update = lambda: os.kill(os.getpid(), signal.SIGKILL) if trainer.step == 100 else update()
trainer.train()
"""
done = subprocess.run([sys.executable, "-c", script])
left = ", ".join(map(str, list_checkpoints(folder / "second")))
print(f"ended by signal {-done.returncode}, with checkpoints of steps {left}")

# %% [markdown]
# The same run, in this process, in the folder of the dead one:


# %%
def differing(some: Trainer, others: Trainer) -> int:
    pairs = zip(some.parameters, others.parameters, strict=True)
    return sum(int((a != b).sum()) for a, b in pairs)


second = new_trainer("second")
print("goes on from step", second.resume())
second.train()
assert second.log.column("loss") == log.column("loss")
print(f"of {count_parameters(second.model):,} weights, {differing(trainer, second)} differ")

# %% [markdown]
# That was one kill at one place. The tests of this chapter kill 24 times, at random moments, at
# random operations on files, and between two tensors of a save; not a bit differs. The claim is
# for one machine, one PyTorch, one number of threads. On a GPU it also needs kernels that add in a
# fixed order, and those of attention's gradient need not.
#
# Here are two more accidents. The newest checkpoint has lost its end, and then the disk is full,
# which we simulate by letting every `fsync` fail:

# %%
import errno

newest = list_checkpoints(folder / "second")[150]
newest.write_bytes(newest.read_bytes()[:-1000])
full = OSError(errno.ENOSPC, "No space left on device")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print("goes on from step", new_trainer("second").resume())
    newest.unlink()
    with unittest.mock.patch("os.fsync", side_effect=full):
        third = new_trainer("second")
        third.train()
for warning in caught[:1] + caught[-1:]:
    print(str(warning.message).replace(f"{folder}{os.sep}", ""))
print(f"ended at step {third.step}; weights that differ: {differing(trainer, third)}")

# %% [markdown]
# The last one is Ctrl-C, sent here by a probe. The step is finished and saved, and the same call
# goes on.


# %%
class Impatient(Probe):
    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.step == 60:
            signal.raise_signal(signal.SIGINT)


for probes in ([Impatient()], []):
    fourth = new_trainer("third", probes=probes)
    fourth.train()
    print("stopped by Ctrl-C" if fourth.interrupted else "ended", "after step", fourth.step)
print("weights that differ:", differing(trainer, fourth))

# %% [markdown]
# ## A run in a file
#
# Text, tokenizer, model and settings, written down together, are an experiment that somebody else
# can repeat. The text comes first.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run learns from.

    Kinds are "tinyworld", for stories; "documentation", of installed ``packages``; "files", for
    ``paths`` of files and folders; "shards", for two folders of them, to train and to validate.
    """

    kind: Annotated[str, "tinyworld, documentation, files or shards"]
    packages: Annotated[tuple[str, ...], "whose documentation is read"] = (
        "stdlib",
        "numpy",
        "matplotlib",
    )
    paths: Annotated[tuple[str, ...], "files and folders; of shards, two folders"] = ()
    n_stories: Annotated[int, "stories to learn from"] = 20_000
    n_held_out: Annotated[int, "stories to be judged by"] = 400
    held_out: Annotated[float, "share of the text to be judged by"] = 0.03
    validation_rows: Annotated[int, "rows to validate on, at most, while training"] = 128
    clean: Annotated[bool, "clean the text, and remove duplicates"] = True
    layout: Annotated[str, "of documents in rows: best_fit, one_per_row or windows"] = "best_fit"

    def __post_init__(self) -> None:
        self.check()


# %% [markdown]
# A tokenizer is trained on the text of the run, or read from a file; its settings are in the room.
# The settings of a run have four sections.


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is: data, tokenizer, model, training.

    ``model`` has the fields of ``ModelConfig`` but ``vocab_size``, which is the tokenizer's; or it
    has ``start_from``, a folder with a saved model and its tokenizer, and training goes on from its
    weights. A ``ValueError`` names the setting that is wrong, as in "training.n_steps".
    """

    data: DataConfig
    tokenizer: "TokenizerConfig"
    model: Mapping[str, Any]
    training: TrainingConfig

    def __post_init__(self) -> None:
        self.check()


# %% [markdown] tags=["engine"]
# ### Engine room: sections that fit together, and YAML that explains itself

# %% [markdown] tags=["engine"]
# Each kind of data has settings of its own, which are checked together.


# %% tags=["engine"]
#| export
class DataConfig(DataConfig):  # continued
    def check(self) -> None:
        """Raise a ``ValueError`` for the first setting that cannot be."""
        for name in ("packages", "paths"):
            _check_texts(name, getattr(self, name))
        check_choice("kind", self.kind, tuple(_FIELDS_OF_KIND))
        check_choice("layout", self.layout, ("best_fit", "one_per_row", "windows"))
        check_at_least(n_stories=(1, self.n_stories), n_held_out=(1, self.n_held_out))
        check_at_least(validation_rows=(1, self.validation_rows))
        for name in ("n_stories", "n_held_out", "validation_rows"):
            _check_kind(name, getattr(self, name), int, "a whole number")
        _check_kind("clean", self.clean, bool, "True or False")
        if not isinstance(self.held_out, int | float) or not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out!r}")
        needed = {"files": 1, "shards": 2}.get(self.kind, 0)
        if len(self.paths) < needed or (self.kind == "shards" and len(self.paths) != 2):
            raise ValueError(f"paths: expected {needed} for {self.kind!r}, got {len(self.paths)}")


# %% [markdown] tags=["engine"]
# These are the settings of a tokenizer:


# %% tags=["engine"]
#| export
_PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer of a run: one that is trained on its text, or that of a file at ``path``."""

    vocab_size: Annotated[int, "at most; fewer if the text has no more pairs"] = 2048
    pattern: Annotated[str, "how text is cut first: gpt2 or gpt4"] = "gpt4"
    special_tokens: Annotated[tuple[str, ...], "with the one that ends texts"] = ("<|endoftext|>",)
    path: Annotated[str | None, "a tokenizer.json to use; null to train one"] = None

    def __post_init__(self) -> None:
        _check_texts("special_tokens", self.special_tokens)
        if self.path is not None:
            check_text(self.path, "path")
        _check_kind("vocab_size", self.vocab_size, int, "a whole number")
        check_at_least(vocab_size=(256 + len(self.special_tokens), self.vocab_size))
        check_choice("pattern", self.pattern, tuple(_PATTERNS))
        if "<|endoftext|>" not in self.special_tokens:
            expected = "expected '<|endoftext|>' among them"
            raise ValueError(f"special_tokens: {expected}, got {list(self.special_tokens)}")


# %% [markdown] tags=["engine"]
# The size of the vocabulary is known when the tokenizer is, and not before. Messages get the name
# of their section in front.


# %% tags=["engine"]
#| export
_FIELDS_OF_KIND = {
    "tinyworld": ("kind", "n_stories", "n_held_out", "validation_rows", "layout"),
    "documentation": ("kind", "packages", "held_out", "validation_rows", "clean", "layout"),
    "files": ("kind", "paths", "held_out", "validation_rows", "clean", "layout"),
    "shards": ("kind", "paths", "validation_rows", "layout"),
}
_SECTIONS = {"data": DataConfig, "tokenizer": TokenizerConfig, "training": TrainingConfig}


def _within(part: str, build: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Build a part of a configuration; what is wrong is named with the part."""
    try:
        return build(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from None


# %% [markdown] tags=["engine"]
# What the sections demand of each other:


# %% tags=["engine"]
#| export
class RunConfig(RunConfig):  # continued
    def check(self) -> None:
        """Raise a ``ValueError`` for the first setting that cannot be with the others."""
        for name, kind in _SECTIONS.items():
            _check_kind(name, getattr(self, name), kind, f"a {kind.__name__}")
        _check_kind("model", self.model, Mapping, "settings by name")
        path, start = self.tokenizer.path, self.model.get("start_from")
        if start is not None:
            if others := sorted(self.model.keys() - {"start_from"}):
                expected = "expected nothing else with start_from, which tells the sizes"
                raise ValueError(f"model.{others[0]}: {expected}, got {self.model[others[0]]!r}")
            check_text(start, "model.start_from")
        else:
            _within("model", self.model_config, self.tokenizer.vocab_size)
        if self.data.kind == "shards" and path is None and start is None:
            raise ValueError("tokenizer.path: expected the file that made the shards, got None")


# %% [markdown] tags=["engine"]
# And how they are made from what a file says:


# %% tags=["engine"]
#| export
def _run_config(kind: type[RunConfig], entries: Any) -> RunConfig:
    if not isinstance(entries, Mapping) or set(entries) - {*_SECTIONS, "model"}:
        got = sorted(map(str, entries)) if isinstance(entries, Mapping) else entries
        raise ValueError(f"expected the sections {', '.join((*_SECTIONS, 'model'))}, got {got}")
    model = entries.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(f"model: expected settings by name, got {model!r}")
    found = read_settings(_SECTIONS, {k: v for k, v in entries.items() if k != "model"})
    parts = {name: _within(name, part, **found[name]) for name, part in _SECTIONS.items()}
    return kind(**cast(Any, parts), model=dict(model))


# %% [markdown] tags=["engine"]
# Both directions are methods:


# %% tags=["engine"]
#| export
class RunConfig(RunConfig):  # continued
    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "RunConfig":
        """Return the configuration with these settings; the inverse of ``to_dict``."""
        return _run_config(cls, entries)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as numbers, texts and lists, fit for JSON and YAML."""
        return _plain(asdict(self))


# %% [markdown] tags=["engine"]
# YAML is what people edit. Each setting has its comment, which is the text beside it in the code,
# and settings that are of no use for this kind of run are left out, unless somebody has set them.


# %% tags=["engine"]
#| export
class RunConfig(RunConfig):  # continued
    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the configuration of the model, for a tokenizer of this size."""
        if "vocab_size" in self.model:
            raise ValueError("vocab_size: follows from the tokenizer, leave it out")
        if "start_from" in self.model:
            return TransformerLM.from_pretrained(self.model["start_from"]).config
        known = [f.name for f in fields(ModelConfig)]
        for name in self.model:
            if name not in known and (close := difflib.get_close_matches(str(name), known, 1)):
                raise ValueError(f"{name}: not a field of ModelConfig; did you mean {close[0]}?")
        return ModelConfig.from_dict({**self.model, "vocab_size": vocab_size})

    @classmethod
    def from_yaml(cls, path: str | Path) -> "RunConfig":
        """Read a YAML file; a ``ValueError`` names the file and what is wrong in it."""
        return _from_yaml(cls, Path(path))

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file that ``from_yaml`` reads, with a comment for each setting."""
        with whole_file(Path(path)) as draft:
            draft.write_text(_yaml_text(self), encoding="utf-8")


# %% [markdown] tags=["engine"]
# Which settings are of no use?


# %% tags=["engine"]
#| export
def _useless(config: RunConfig) -> set[str]:
    """Return the settings that this kind of run has no use for, as in "data.paths"."""
    data, training = config.data, config.training
    useless = {f"data.{f.name}" for f in fields(data)}
    useless -= {f"data.{name}" for name in _FIELDS_OF_KIND[data.kind]}
    if config.tokenizer.path is not None or "start_from" in config.model:
        useless |= {"tokenizer.vocab_size", "tokenizer.pattern", "tokenizer.special_tokens"}
    if training.optimizer != "muon":
        useless |= {"training.adamw_rate"}
    if training.optimizer not in ("adamw", "muon"):
        useless |= {"training.betas"}
    if training.schedule == "constant":
        useless |= {"training.final"}
    if not config.model.get("n_experts"):
        useless |= {"training.balance_loss"}
    return useless


# %% [markdown] tags=["engine"]
# All others become lines.


# %% tags=["engine"]
#| export
def _yaml_text(config: RunConfig) -> str:
    with requires_extra("YAML", extra="train"):
        import yaml

    def line(name: str, value: Any, about: str = "") -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
        said = f"{name}: {text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
        return f"  {said:34}  # {about}" if about else f"  {said}"

    useless, lines = _useless(config), list[str]()
    for section, kind in _SECTIONS.items():
        part, types = getattr(config, section), get_type_hints(kind, include_extras=True)
        lines.append(f"{section}:")
        for f in fields(kind):
            value, default = getattr(part, f.name), f.default
            if f"{section}.{f.name}" not in useless or value != default:
                lines.append(line(f.name, _plain(value), get_args(types[f.name])[-1]))
        if section == "tokenizer":
            lines += ["model:  # fields of ModelConfig; vocab_size is the tokenizer's"]
            lines += [line(name, _plain(value)) for name, value in config.model.items()]
    return "\n".join(lines) + "\n"


# %% [markdown] tags=["engine"]
# And the way back. A file's name stands before every message.


# %% tags=["engine"]
#| export
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
# ## From settings to a model
#
# Text is prepared as in Part I: read, cleaned, deduplicated, so that no held-out text has a copy
# in the training text. Whole files are held out, because docstrings of one file resemble each
# other. If there is one file only, some of its documents are held out, and if that is one
# document, its end. One thing we do not do: remove from the training text whatever shares
# thirteen words with held-out text. Documentation repeats itself by nature.
#
# Each stage of a run leaves something behind, and is skipped when that is there. So a run that was
# stopped or killed goes on where it was.


# %%
#| export
class Pretrained(NamedTuple):
    """What a run made: model, tokenizer, log, held-out texts, and where all this is kept."""

    model: TransformerLM
    tokenizer: BPETokenizer
    log: MetricsLog
    held_out: list[str]
    folder: Path


# %% [markdown]
# `run` is then short. `_begin` makes sure that the folder belongs to this configuration, and
# prepares text and tokenizer, once for all processes. `_private_state` sets threads and random
# generators back at the end, `_make_trainer` builds model and trainer, `_finish` saves the model,
# and `load_run` reads all of it.


# %%
#| export
def run(
    config: RunConfig,
    folder: str | Path,
    sinks: Sequence[Sink] = (),
    *,
    trainer: Callable[..., Trainer] = Trainer,
    probes: Sequence[Probe | Callable[[nn.Module], Row]] = (),
    say: Callable[[str], None] | None = None,
) -> Pretrained:
    """Do everything that ``config`` says, and return what came out; it is in ``folder``, too.

    ``trainer`` makes the trainer: a subclass, or ``partial(Trainer, objective=...)``. ``probes``
    join those of the run. ``say`` gets a line for each stage. A run that was stopped or killed goes
    on where it was when it is called again; one that is complete is loaded. Ctrl-C is a
    ``KeyboardInterrupt`` after a checkpoint. A ``ValueError`` if ``folder`` has another run. The
    model has the last weights, not the best, which are in ``training/best.safetensors``.
    """
    _check_kind("config", config, RunConfig, "a RunConfig")
    folder, say = _as_path("folder", folder), say or (lambda line: None)
    with _processes(config.training) as parallel:
        parallel.agreed(partial(_begin, config, folder, say))
        if not (folder / "model").exists():
            with _private_state(config.training.threads), _settings_named():
                made = _make_trainer(config, folder, trainer, sinks, probes, say)
                made.train()
            if made.interrupted:
                raise KeyboardInterrupt
            parallel.agreed(partial(_finish, made.parallel.whole(made.model), folder))
        return load_run(folder)


# %% [markdown] tags=["engine"]
# ### Engine room: from text on the disk to a trainer and back, so that `run` can go on anywhere

# %% [markdown] tags=["engine"]
# A preparation that drops or masks something says so. The lines are also kept beside the data.


# %% tags=["engine"]
#| export
def _read(data: DataConfig, say: Callable[[str], None]) -> list[Document]:
    read = ReadReport()
    if data.kind == "files":
        say(f"reading {', '.join(data.paths)}")
        try:
            documents = list(read_files(data.paths, report=read))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"data.{error}{_passed_over(read)}") from None
    else:
        say(f"reading the documentation of {', '.join(data.packages)}")
        documents = list(read_installed_docs(data.packages, report=read))
    say(f"read {read}{_passed_over(read)}")
    return documents


def _passed_over(read: ReadReport) -> str:
    """Which files are of a kind that is not read."""
    some = ", ".join(f"{suffix} {n:,}" for suffix, n in read.ignored.most_common(8))
    return f"; passed over, by suffix: {some}" if some else ""


# %% [markdown] tags=["engine"]
# Of cleaning, what was dropped and why, and what was masked:


# %% tags=["engine"]
#| export
def _documents(data: DataConfig, say: Callable[[str], None]) -> list[Document]:
    documents = _read(data, say)
    if not data.clean:
        return documents
    report = CleaningReport()
    cleaned = list(clean_documents(documents, report=report))
    size, left = (sum(len(d.text) for d in some) for some in (documents, cleaned))
    kept = f"cleaning keeps {len(cleaned):,} of {len(documents):,} documents"
    why = f"failed {_listed(report.failed)}; masked {_listed(report.masked)}"
    say(f"{kept} and {left / max(size, 1):.1%} of the characters")
    for before, after in zip(report.steps, report.steps[1:], strict=False):
        lost = before.documents - after.documents, before.characters - after.characters
        if any(lost):
            say(f"  {after.step}: {lost[0]:,} documents and {lost[1]:,} characters less")
    say(f"  {why}")
    if not cleaned:
        raise ValueError(f"data.clean: expected some text after cleaning, got none: {why}")
    unique = deduplicate(cleaned)
    say(f"removing duplicates keeps {len(unique):,} documents")
    return unique


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items()) or "nothing"


# %% [markdown] tags=["engine"]
# Which texts are held out is decided by a hash of the file, so that other files do not change it.


# %% tags=["engine"]
#| export
def _share_of(name: str) -> float:
    """A number from 0 to 1 that looks random, and is the same for the same name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) / 2**64


def _held_out(documents: Sequence[Document], share: float) -> tuple[list[str], list[str]]:
    """Split texts into those to learn from and those to be judged by: by files, if they differ."""
    files = [str(document.metadata.get("path", document.id)) for document in documents]
    if len(documents) == 1:
        return _split_text(documents[0].text, share)
    names = files if len(set(files)) > 1 else [document.id for document in documents]
    drawn = {name: _share_of(name) for name in names}
    chosen = {name for name, number in drawn.items() if number < share}
    chosen = chosen or {min(drawn, key=lambda name: drawn[name])}  # at least one
    if chosen == set(drawn):
        expected = "expected a share that leaves some of both"
        raise ValueError(f"data.held_out: {expected}, got {share}, which holds out everything")
    parts: tuple[list[str], list[str]] = ([], [])
    for name, document in zip(names, documents, strict=True):
        parts[name in chosen].append(document.text)
    return parts


def _split_text(text: str, share: float) -> tuple[list[str], list[str]]:
    """Hold out the end of a text, from the beginning of a line on."""
    at = text.rfind("\n", 0, round(len(text) * (1 - share))) + 1 or round(len(text) * (1 - share))
    if not 0 < at < len(text):
        expected = "expected a share that leaves some of the text for both"
        raise ValueError(f"data.held_out: {expected}, got {share} of {len(text)} characters")
    return [text[:at]], [text[at:]]


# %% [markdown] tags=["engine"]
# Tokenizer, shards, held-out texts and the report are written together or not at all.


# %% tags=["engine"]
#| export
def _train_and_held_out(
    data: DataConfig, say: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """Return the texts to learn from, and those to be judged by."""
    if data.kind == "tinyworld":
        world, counts = TinyWorld(), (data.n_stories, data.n_held_out)
        say(f"writing {counts[0]:,} stories of the tiny world, and {counts[1]:,} to be judged by")
        return cast(Any, tuple([s.text for s in world.stories(n, i)] for i, n in enumerate(counts)))
    train, held_out = _held_out(_documents(data, say), data.held_out)
    sizes = tuple(sum(len(text.encode()) for text in texts) for texts in (train, held_out))
    say(f"{sizes[0]:,} bytes to learn from, {sizes[1]:,} to be judged by")
    return train, held_out


# %% [markdown] tags=["engine"]
# A tokenizer is trained, read from a file, or taken from the model that training starts from.


# %% tags=["engine"]
#| export
def _tokenizer(config: RunConfig, texts: list[str], say: Callable[[str], None]) -> BPETokenizer:
    settings, start = config.tokenizer, config.model.get("start_from")
    path = settings.path or (start and Path(start) / "tokenizer.json")
    if path:
        return BPETokenizer.load(path)
    say(f"training a tokenizer of {settings.vocab_size:,} tokens")
    special = {"special_tokens": settings.special_tokens}
    pattern = _PATTERNS[settings.pattern]
    return train_bpe(texts, settings.vocab_size, pattern=pattern, **cast(Any, special))


# %% [markdown] tags=["engine"]
# And all of it goes to the disk.


# %% tags=["engine"]
#| export
def _begin(config: RunConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Claim a folder for a run, and prepare its data, if that is not done."""
    _check_start(config)
    _claim(folder, config)
    if not (folder / "model").exists() and not (folder / "data").exists():
        with _private_state(config.training.threads):
            _write_data(config, folder / "data", say)


@contextmanager
def _processes(config: TrainingConfig) -> Iterator[Parallel]:
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    n = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel is None and n > 1:
        expected = f"ddp, fsdp or tp, as {n} processes were started"
        raise ValueError(f"training.parallel: expected {expected}, got None")
    parallel = _within("training", _join, config.parallel)
    try:
        yield parallel
    finally:
        parallel.leave()


# %% tags=["engine"]
#| export
def _check_there(name: str, paths: Sequence[str]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise ValueError(f"{name}: no file or folder {path!r}")


def _write_data(config: RunConfig, folder: Path, say: Callable[[str], None]) -> None:
    """Write tokenizer, shards and held-out texts to ``folder``, all or nothing."""
    data, lines = config.data, list[str]()
    _check_there("tokenizer.path", [config.tokenizer.path or "."])
    _check_there("data.paths", data.paths if data.kind == "shards" else ())

    def note(line: str) -> None:
        lines.append(line)
        say(line)

    with whole_directory(folder) as draft:
        shards = data.kind == "shards"
        train, held_out = ([], []) if shards else _train_and_held_out(data, note)
        tokenizer = _tokenizer(config, train, note)
        tokenizer.save(draft / "tokenizer.json")
        if not shards:
            note("writing tokens")
            write_shards(train, draft / "train", tokenizer)
            write_shards(held_out, draft / "validation", tokenizer)
            documents = (Document(text, id=f"{i:06d}") for i, text in enumerate(held_out))
            write_jsonl(documents, draft / "held_out.jsonl")
        (draft / "preparation.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# %% [markdown] tags=["engine"]
# All is put together in a trainer. A model that training goes on from must know all tokens.


# %% tags=["engine"]
#| export
def _open_data(config: RunConfig, folder: Path) -> tuple[BPETokenizer, TokenShards, TokenShards]:
    tokenizer = BPETokenizer.load(folder / "tokenizer.json")
    both = config.data.paths if config.data.kind == "shards" else ("train", "validation")
    train, validation = (TokenShards(folder / name, tokenizer) for name in both)
    return tokenizer, train, validation


def _check_start(config: RunConfig) -> None:
    """Before anything else is done: is there what training is to start from?"""
    if (start := config.model.get("start_from")) is None:
        return
    needed = ["config.json"] if config.tokenizer.path else ["config.json", "tokenizer.json"]
    for name in needed:
        if not (Path(start) / name).exists():
            expected = f"a folder of a saved model, with {' and '.join(needed)}"
            raise ValueError(f"model.start_from: expected {expected}, got {start!r}")


def _first_model(config: RunConfig, vocab_size: int) -> TransformerLM:
    """Return the model that training begins with: a fresh one, or one that was saved."""
    seed_everything(config.training.seed)
    start = config.model.get("start_from")
    if start is None:
        return TransformerLM(config.model_config(vocab_size))
    model = TransformerLM.from_pretrained(start)
    if model.config.vocab_size < vocab_size:
        expected = f"a model of at least {vocab_size} tokens, as the tokenizer has"
        raise ValueError(f"model.start_from: expected {expected}, got {model.config.vocab_size}")
    return model.float()


# %% [markdown] tags=["engine"]
# With these a trainer can be made.


# %% tags=["engine"]
#| export
def _make_trainer(
    config: RunConfig,
    folder: Path,
    trainer: Callable[..., Trainer],
    sinks: Sequence[Sink],
    probes: Sequence[Any],
    say: Callable[[str], None],
) -> Trainer:
    tokenizer, train, validation = _open_data(config, folder / "data")
    training, data = config.training, config.data
    model = _first_model(config, tokenizer.vocab_size).to(best_device())
    size = f"{count_parameters(model):,} parameters"
    length = model.config.context_length
    source = train if data.layout == "windows" else pack_documents(train, length, data.layout)
    packed = pack_documents(validation, length)
    rows = range(min(len(packed), data.validation_rows))
    if data.kind == "tinyworld":
        world = TinyWorld()
        probes = [GapToFloor(world, world.stories(data.n_held_out, 1), tokenizer), *probes]
    made = trainer(
        model,
        BatchSampler(source, training.batch_size, length, seed=training.seed),
        training,
        validation=[packed.batch(rows[i : i + 16]) for i in range(0, len(rows), 16)],
        folder=folder / "training",
        probes=probes,
        sinks=sinks,
        peak=peak_flops(best_device(), getattr(torch, training.precision)),
    )
    if not isinstance(made, Trainer):
        got = type(made).__qualname__
        raise ValueError(f"trainer: expected a function that returns a Trainer, got {got}")
    if made.parallel.is_main:
        n = made.parallel.world_size
        say(f"training {size}" + (f" on {n} ranks ({training.parallel})" if n > 1 else ""))
    return made


# %% [markdown] tags=["engine"]
# What is wrong in a section of the file is named with the section:


# %% tags=["engine"]
#| export
@contextmanager
def _settings_named() -> Iterator[None]:
    """Put the section before the name of a setting of training that is wrong."""
    try:
        yield
    except ValueError as error:
        if str(error).partition(":")[0] in {f.name for f in fields(TrainingConfig)}:
            raise ValueError(f"training.{error}") from error
        raise


# %% [markdown] tags=["engine"]
# What comes out can be loaded again. The model is saved with its tokenizer.


# %% tags=["engine"]
#| export
def load_run(folder: str | Path) -> Pretrained:
    """Return what ``run`` left in ``folder``; the model is in ``eval`` mode, on the CPU."""
    folder = _as_path("folder", folder)
    if not (folder / "model").is_dir():
        raise ValueError(f"folder: expected one with a finished run, got {folder}")
    model = TransformerLM.from_pretrained(folder / "model")
    tokenizer = BPETokenizer.load(folder / "model" / "tokenizer.json")
    texts = folder / "data" / "held_out.jsonl"  # a run on shards has none
    held_out = [document.text for document in read_jsonl(texts)] if texts.exists() else []
    log = MetricsLog(folder / "training" / "metrics.jsonl")
    return Pretrained(model, tokenizer, log, held_out, folder)


def _finish(model: nn.Module, folder: Path) -> None:
    """Save the model with its tokenizer, as Hugging Face's library expects a model's folder."""
    tokenizer = BPETokenizer.load(folder / "data" / "tokenizer.json")
    with whole_directory(folder / "model") as draft:
        end = tokenizer.special_tokens["<|endoftext|>"]
        save_model(cast(TransformerLM, uncompiled(model)), draft / "model", eos_token_id=end)
        for path in (draft / "model").iterdir():
            path.rename(draft / path.name)
        (draft / "model").rmdir()
        tokenizer.save(draft / "tokenizer.json")


# %% [markdown] tags=["engine"]
# A folder belongs to one configuration, but for settings that no weight depends on, and those of
# training as long as there is no checkpoint. And whoever
# calls `run` in the middle of something else finds random generators and threads as they were.


# %% tags=["engine"]
#| export
def _claim(folder: Path, config: RunConfig) -> None:
    """Write the configuration to ``folder``, or check that it is the one that is there."""
    path, entries = folder / "run.json", config.to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and (folder / "data").exists():  # else nothing has begun there
        begun = (folder / "model").exists() or bool(list_checkpoints(folder / "training"))
        _check_same_run(entries, json.loads(path.read_text(encoding="utf-8")), path, begun)
    with whole_file(path) as draft:
        draft.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _check_same_run(
    here: Mapping[str, Any], there: Mapping[str, Any], path: Path, begun: bool
) -> None:
    defaults = {"training": {"optimizer_options": {}, "best": "validation_loss"}}
    defaults["training"] |= {"best_is": "lowest"}  # a file of an earlier version has none
    for section, settings in here.items():
        before = {**defaults.get(section, {}), **there.get(section, {})}
        for name in sorted(settings.keys() | before.keys()):
            free = section == "training" and (name in _MAY_CHANGE or not begun)
            if settings.get(name) != before.get(name) and not free:
                other = f"{path} is of a run with {before.get(name)!r}; take another folder"
                raise ValueError(f"{section}.{name}: got {settings.get(name)!r}, but {other}")


# %% [markdown] tags=["engine"]
# A run seeds the random generators and sets the number of threads. Its caller gets both back as
# they were:


# %% tags=["engine"]
#| export
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
# ## Two measures
#
# Two measures judge what comes out. In the tiny world it is the gap to the floor, told apart by
# kind of word: nobody can know whose name comes next, but the species of that character can be
# learned. `word_kinds` tells six kinds of tokens apart, and the probe `GapToFloor` adds up losses
# and floors of held-out stories, kind by kind (both in the room).
#
# | kind | what it is |
# |---|---|
# | `who` | a name at its first appearance |
# | `name again` | a later appearance of that name |
# | `species` | the value of a claim about a species |
# | `fact` | the value of any other claim |
# | `wording` | what else the world draws, such as the weather |
# | `certain` | all other tokens: they follow from those before them |

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
    if not hasattr(model, "hidden_states"):
        raise ValueError(f"model: expected a TransformerLM, got {model!r:.60}")
    _check_kind("tokenizer", tokenizer, BPETokenizer, "a BPETokenizer")
    _check_kind("batch_tokens", batch_tokens, int, "a whole number")
    check_at_least(batch_tokens=(1, batch_tokens))
    texts = _as_texts("texts", texts)
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
# The rivals are gzip and xz, each at its strongest setting.


# %%
#| export
def compressors(texts: Sequence[str], seen: Sequence[str] = ()) -> dict[str, float]:
    """Return the bits per byte that gzip and xz need for ``texts``, at their best settings.

    Texts are joined by a zero byte. With texts that were ``seen``, what is counted is by how much
    a compressed file of these grows when the others are appended.
    """
    texts, seen = _as_texts("texts", texts), _as_texts("seen", seen)
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


# %% [markdown] tags=["engine"]
# ### Engine room: kinds of words and the loss of each token, which the gap is made of

# %% [markdown] tags=["engine"]
# Rows are padded to the longest, and padding has no target.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# The kind of a token follows from the world's own account of a story: its names, its claims, and
# the surprise that each token must have.


# %% tags=["engine"]
#| export
#: What a token of a tiny-world story can be, see ``word_kinds``.
WORD_KINDS = ("who", "name again", "species", "fact", "wording", "certain")


def word_kinds(world: TinyWorld, story: Story, cut: Callable[[str], list[str]]) -> list[str]:
    """Return the kind of each token of ``story`` and of the end of text after it.

    "who" is a name at its first appearance, "name again" a later one; "species" and "fact" are the
    values of claims; "wording" is what else the world draws, such as the weather; all other tokens
    are "certain": they follow from those before them. ``cut`` makes the tokens of a text.
    """
    _check_kind("world", world, TinyWorld, "a TinyWorld")
    _check_kind("story", story, Story, "a Story")
    _check_kind("cut", cut, Callable, "a function from a text to its tokens")
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


# %% [markdown] tags=["engine"]
# The probe adds up losses and floors, kind by kind, over held-out stories.


# %% tags=["engine"]
#| export
class GapToFloor:
    """A probe: how far a model is from the floor of the tiny world, in all and by kind of word.

    Called with a model it returns "gap", the excess of its loss over the floor as a share of the
    floor; and for each kind "loss/kind" and "floor/kind", in nats per story.
    """

    def __init__(self, world: TinyWorld, stories: Iterable[Story], tokenizer: BPETokenizer):
        _check_kind("world", world, TinyWorld, "a TinyWorld")
        _check_kind("tokenizer", tokenizer, BPETokenizer, "a BPETokenizer")
        _check_kind("stories", stories, Iterable, "several stories")
        self.stories = list(stories)
        for story in self.stories:
            _check_kind("stories", story, Story, "stories of the tiny world")
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
        _check_kind("model", model, nn.Module, "a TransformerLM")
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
# ## Known runs
#
# Four runs have names. The first is the tiny world: Muon, one story in a row, a linear decay to
# zero. The others, in the room, are two for documentation, short and long, and one for a GPU.
# `pretrained(name)` does the run of that name and keeps what came out under a hash of all that it
# depends on, which is what `load_or_train` does for anything. So each is trained once. Whoever
# asks again, in this chapter or a later one, gets it from the disk.

# %%
#| export
_SMALL: dict[str, Any] = {"threads": 1, "schedule": "linear", "final": 0.0, "spike_factor": 10.0}
#: Configurations of runs, by name.
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

# %% [markdown] tags=["engine"]
# ### Engine room: three larger runs, and models that are trained once and kept

# %% [markdown] tags=["engine"]
# The first is for documentation: half a million parameters and half a minute.

# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# The same for longer: a million parameters and some ten minutes, depending on the cores.

# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# The last one is for a GPU: 100 million parameters, half a million tokens in a step, sixteen
# micro-batches, `bfloat16`, blocks compiled. Its texts are yours. It has not been run to its end,
# so its rate is a proposal, not a finding.

# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# Chapters to come need a trained model, and should not train it again. {py:func}`load_or_train
# <llmbook.training.load_or_train>` keeps it under a name that holds a hash of all it depends on:
# settings, the code of every module that training imports, the version of PyTorch, and those of
# the packages whose documentation is read.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# Comments and empty lines do not count, so that a remark costs no training.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# `train` fills a draft folder, which a kill leaves in place, so that a trainer in it goes on; a
# lock lets others wait.


# %% tags=["engine"]
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
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ValueError(f"name: expected letters, digits, '.', '_' and '-', got {name!r}")
    for argument, function in (("train", train), ("load", load)):
        _check_kind(argument, function, Callable, "a function of a folder")
    place = artifacts_folder() if folder is None else _as_path("folder", folder)
    _check_kind("depends_on", depends_on, Mapping, "settings by name")
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


# %% [markdown] tags=["engine"]
# What installed documentation depends on:


# %% tags=["engine"]
#| export
def _versions(data: DataConfig) -> dict[str, str]:
    """Return the versions that installed documentation depends on."""
    versions = dict[str, str]()
    for name in data.packages if data.kind == "documentation" else ():
        versions[name] = ".".join(map(str, sys.version_info[:3]))  # of stdlib and its modules
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# %% [markdown] tags=["engine"]
# Training takes minutes, and says so: in a terminal by lines and a bar, in a notebook by a picture
# that is gone when the model is there.


# %% tags=["engine"]
#| export
class NotebookBar:
    """A sink that shows in a notebook how far a run is, in a picture that is gone at the end."""

    def __init__(self, n_steps: int):
        _check_kind("n_steps", n_steps, int, "a whole number")
        check_at_least(n_steps=(1, n_steps))
        self.n_steps, self._shown, self._next = n_steps, cast(Any, None), 0.0

    def say(self, line: str, share: float = 0.0) -> None:
        """Show a line of text, and a bar of which a ``share`` is filled."""
        from IPython.display import display
        from matplotlib.figure import Figure

        figure, buffer = Figure(figsize=(7, 0.35)), io.BytesIO()
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.axis("off")
        axes.barh(0.1, share, height=0.2)
        axes.text(0.0, 0.4, line if len(line) < 90 else line[:87] + "...", fontsize=9)
        figure.savefig(buffer, format="png")
        data = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
        if self._shown is None:
            self._shown = display(data, raw=True, display_id=True)
        elif self._shown:
            self._shown.update(data, raw=True)

    def start(self, step: int) -> None:
        """Show the bar, filled up to ``step``."""
        self.write({"step": max(step, 0)})

    def write(self, row: Row) -> None:
        """Fill it further, at most once a second."""
        if time.monotonic() >= self._next:
            self._next, loss = time.monotonic() + 1.0, row.get("loss")
            said = f"step {row['step']:,} of {self.n_steps:,}"
            said += "" if loss is None else f", loss {loss:.2f}"
            self.say(said, float(row["step"]) / self.n_steps)

    def close(self) -> None:
        """Take it away."""
        from IPython.display import clear_output

        clear_output()


# %% [markdown] tags=["engine"]
# A notebook gets the picture, a terminal the bar:


# %% tags=["engine"]
#| export
def _shown(n_steps: int, progress: bool | None) -> tuple[list[Sink], Callable[[str], None] | None]:
    """What shows the progress of a run here, if it is to be shown."""
    if progress is False:
        return [], None
    if "ipykernel" in sys.modules:
        bar = NotebookBar(n_steps)
        return [bar], bar.say
    if progress or sys.stdout.isatty():
        return [ProgressBar(n_steps)], print
    return [], None


# %% [markdown] tags=["engine"]
# Later chapters call this:


# %% tags=["engine"]
#| export
def pretrained(name: str = "tinyworld", *, progress: bool | None = None) -> Pretrained:
    """Return the outcome of a run of ``RUNS``, trained on the first call and kept (see there).

    Training "tinyworld" takes a minute or two on a laptop. Its ``progress`` is shown in notebooks
    and terminals, always if true, never if false.
    """
    check_choice("name", name, tuple(RUNS))
    config = RUNS[name]
    depends_on = {**config.to_dict(), "versions": _versions(config.data)}
    sinks, say = _shown(config.training.n_steps, progress)
    train = partial(run, config, sinks=sinks, say=say)
    return load_or_train(name, depends_on, train, load=load_run)


# %% [markdown]
# ## The tiny world
#
# Now the world whose floor we know, for a minute (or none, if the model is kept already). Which
# kinds of words are far above the floor early on, and which at the end?

# %%
result = pretrained("tinyworld")
gap_steps, gaps = result.log.column("gap")
assert 0.01 < gaps[-1] < 0.045
print(f"{count_parameters(result.model):,} parameters, {result.tokenizer.vocab_size} tokens")
at = {row["step"]: row for row in result.log.rows}
excess = {
    step: {kind: at[step][f"loss/{kind}"] - at[step][f"floor/{kind}"] for kind in WORD_KINDS}
    for step in (400, 2200)
}
assert excess[2200]["fact"] + excess[2200]["species"] < 0.1 and excess[2200]["wording"] > 0.2
assert excess[400]["name again"] > 4 * excess[400]["species"]
print("more than 0.2 nats per story above the floor:")
for step in (400, 2200):
    far = [kind for kind in WORD_KINDS if excess[step][kind] > 0.2]
    print(f"step {step}: {', '.join(far)}")
print(f"all kinds together: {100 * gaps[-1]:.0f}% above the floor")

# %% [markdown]
# Only the species are there early; at the end only the wording is not. Now we can ask what was
# learned when ({numref}`fig-training-kinds`).

# %% mystnb={"figure": {"caption": "Excess over the floor by kind of word, in nats per story. The fixed phrases, called certain, fall from 290 nats to two in the first 200 steps. Then come facts, then names that must be copied from the story. What remains is mostly wording.", "name": "fig-training-kinds"}, "image": {"alt": "Left: the gap in percent falls from almost 80 at step 200 to about 3 at the end, on a logarithmic scale. Right: excess loss of six kinds of words over training steps, from step 0 on, where certain words are near 300 nats. Species and facts fall fastest, to a few hundredths of a nat; certain words end near a tenth; names again fall late; wording stays highest, near half a nat."}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6))
left.plot(gap_steps[1:], [100 * gap for gap in gaps[1:]], marker="o")
left.set(yscale="log", xlabel="step", ylabel="gap to the floor (%)", title="In all")
left.set_yticks([3, 10, 30], ["3", "10", "30"])
left.minorticks_off()
for kind in WORD_KINDS:
    loss, floor = (np.array(result.log.column(f"{what}/{kind}")[1]) for what in ("loss", "floor"))
    right.plot(gap_steps, (loss - floor).clip(1e-3), marker="o", label=kind)
right.set(yscale="log", xlabel="step", ylabel="excess (nats per story)", title="By kind of word")
fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=6)
plt.show()

# %% [markdown]
# The order tells what is easy. At the beginning the fixed phrases cost 290 nats a story above the
# floor, and after two hundred steps two. The eight facts of 48 characters, 384 in all, follow
# within a few hundred more: they never change, so they can be stored in weights. To repeat the
# hero's name, a model must *look it up* in the story, and that comes later. (The jump of *name
# again* at step 2000 is noise between evaluations, which a falling rate removes.) Last is the
# wording. A story may go on in many ways, all of which the model must give their exact
# probabilities; and it must know which facts the story has told already, since none is told
# twice.
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
assert bits / n_bytes < 2.5 and bits / n_bytes < min(others.values())
print(f"bits per byte: the model {bits / n_bytes:.1f}")
print(f"               gzip {others['gzip']:.1f}, xz {others['xz']:.1f}")

# %% [markdown]
# Who has won? The comparison is not fair, in three ways. The compressors saw nothing before the
# held-out text, the model a million bytes of its kind (400 steps of 8 times 128 tokens; its
# tokenizer saw all five million). So we show them the training text, all five
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
assert primed["xz"] < others["xz"] and primed["xz"] < bits / n_bytes
gained = 1 - primed["xz"] / others["xz"]
print(
    f"having seen the training text, xz needs {gained:.0%} less: {primed['xz']:.1f} bits per byte"
)

# %% [markdown]
# gzip looks back 32 kilobytes only, so what it saw before hardly helps; xz looks back over all of
# it, and finds whole sentences again. Half a minute of training does not reach that. Some ten
# minutes do: a million parameters, trained by `--preset documentation-long` on 4.9 million
# tokens, nearly three times through the text, needed 1.73 bits per byte of the same text when
# this was written, where xz with all the training text in sight needed 2.06 (`python
# benchmarks/compression.py` measures both).
#
# ## From the command line
#
# The same runs start without a notebook:
#
# ```text
# python -m llmbook.training --preset tinyworld --folder runs/tiny
# python -m llmbook.training --preset gpu --write config.yaml
# python -m llmbook.training config.yaml --folder runs/large --tensorboard
# python -m llmbook.training --preset documentation --data.kind files --data.paths input.txt
# python -m llmbook.training --preset tinyworld --model.start_from runs/tiny/model
# ```
#
# The second writes a preset to a file to edit. Any setting can be given on the command line, as in
# the last two: a text file of one's own, and a model to start from. `--help` lists them all. A run
# that was stopped or killed goes on when the same command is given again. At the end there is a
# report, and a line that says where the model is and how to let it write. A file looks like this:

# %%
RUNS["documentation"].to_yaml(folder / "config.yaml")
text = (folder / "config.yaml").read_text()
print("\n".join([*text.splitlines()[:21], "  ..."]))

# %% [markdown] tags=["engine"]
# ### Engine room: a report, overrides, and exit codes that tell scripts what happened

# %% [markdown] tags=["engine"]
# What a run is judged by:


# %% tags=["engine"]
#| export
def report(result: Pretrained) -> dict[str, float]:
    """Return the numbers that a run is judged by: last losses, and bits per byte beside others'."""
    _check_kind("result", result, Pretrained, "what run and pretrained return")
    names = ("loss", "validation_loss", "gap", "tokens_per_second", "mfu", "targets", "skipped")
    known = {name for row in result.log.rows for name in row}
    numbers = {name: result.log.column(name)[1][-1] for name in names if name in known}
    if result.held_out:
        bits, n_bytes = documents_score(result.model, result.tokenizer, result.held_out)
        numbers |= {"held-out bytes": float(n_bytes), "bits per byte": bits / n_bytes}
        others = compressors(result.held_out)
        numbers |= {f"bits per byte of {name}": value for name, value in others.items()}
    return numbers


# %% [markdown] tags=["engine"]
# The command begins with a file or a preset, not both, and changes what is given beside it.


# %% tags=["engine"]
#| export
def _chosen(config: str | None, preset: str | None) -> RunConfig:
    if (config is None) == (preset is None):
        raise ValueError(f"expected a file CONFIG or a --preset, one of {', '.join(RUNS)}")
    if config is not None:
        return RunConfig.from_yaml(config)
    check_choice("preset", preset, tuple(RUNS))
    return RUNS[str(preset)]


def _overridden(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """Return ``config`` with the settings that were given by section."""
    entries = config.to_dict()
    if "start_from" in given.get("model", {}):  # the sizes are those of the saved model
        entries["model"] = {}
    for section in (*_SECTIONS, "model"):
        entries[section] |= given.get(section, {})
    return RunConfig.from_dict(entries)


# %% [markdown] tags=["engine"]
# A run is done and judged, and the command says where the model is.


# %% tags=["engine"]
#| export
def _execute(config: RunConfig, folder: Path, tensorboard: bool) -> None:
    sinks: list[Sink] = [ProgressBar(config.training.n_steps)]
    if tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    result = run(config, folder, sinks, say=print)
    if os.environ.get("RANK", "0") != "0":  # one process speaks for all
        return
    for name, value in report(result).items():
        print(f"{name}: {value:,.4g}")
    print(_farewell(folder))


def _farewell(folder: Path) -> str:
    """Say where the model is, and how to let it write."""
    options = "tokenizer=result.tokenizer, max_new_tokens=60"
    return f"""The model is in {folder / "model"}. To let it write, in Python:
  from llmbook.generation import generate
  from llmbook.training import load_run
  result = load_run({str(folder)!r})
  print(generate(result.model, ["The"], {options})[0].text)"""


def _write(config: RunConfig, path: Path) -> None:
    if path.exists():
        raise ValueError(f"--write: expected a new file, {path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    config.to_yaml(path)
    print(f"{path} is written; train with: python -m llmbook.training {path}")


# %% [markdown] tags=["engine"]
# The options are those of the settings and a few more.


# %% tags=["engine"]
#| export
def _command(arguments: Sequence[str] | None) -> None:
    """Do what the command line says."""
    about = "Train a model as a file or a preset says; a run that was stopped goes on."
    prog = "python -m llmbook.training"
    parser = settings_parser(_SECTIONS, required=False, prog=prog, description=about)
    parser.add_argument("--model", type=dict[str, Any], default={}, help="fields of ModelConfig")
    options = {
        "config": {"nargs": "?", "help": "a YAML file, see --write"},
        "--preset": {"help": f"one of {', '.join(RUNS)}"},
        "--write": {"help": "write a YAML file, train nothing"},
        "--folder": {"default": "runs/latest", "help": "where the run is kept"},
        "--tensorboard": {"action": "store_true", "help": "write curves into its folder, too"},
    }
    for name, how in options.items():
        parser.add_argument(name, **cast(Any, how))
    known = [*_names(_SECTIONS), "model", *(name.removeprefix("--") for name in options)]
    with _named_errors(known):
        given = parser.parse_args(arguments, defaults=False).as_dict()
    config = _overridden(_chosen(given.get("config"), given.get("preset")), given)
    if given.get("write") is not None:
        return _write(config, Path(given["write"]))
    folder = Path(given.get("folder") or "runs/latest")
    return _execute(config, folder, bool(given.get("tensorboard")))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, ``python -m llmbook.training``, and exit.

    The code is 0, or 2 for a bad request, 1 if training failed, 130 if it was stopped by Ctrl-C.
    """
    sys.exit(_exit_code(partial(_command, arguments)))


# %% [markdown] tags=["engine"]
# Errors that a user can mend are one line, without a traceback.


# %% tags=["engine"]
#| export
def _exit_code(command: Callable[[], Any]) -> int:
    """Do ``command``; say in one line what went wrong, if something did."""
    try:
        command()
    except (KeyboardInterrupt, TrainingError, ImportError, OSError, ValueError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        text = "stopped; the same command goes on" if stopped else f"error: {error}"
        print(text, file=sys.stderr)
        return 130 if stopped else 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__" and "__file__" in globals():  # a notebook has no file
    importlib.import_module("llmbook.training").main()  # not a second module beside that one


# %% [markdown] tags=["engine"]
# What happens when a setting cannot be:

# %% tags=["engine"]
(folder / "config.yaml").write_text(text.replace("n_heads: 4", "n_heads: 5"))
try:
    RunConfig.from_yaml(folder / "config.yaml")
except ValueError as error:
    print(str(error).replace(f"{folder}{os.sep}", ""))

# %% [markdown]
# ## Is it the real thing?
#
# The industrial counterpart of a loop is PyTorch's own parts, put together by hand: `AdamW`,
# `LambdaLR`, `clip_grad_norm_`, mean losses. We take the same model and the same batches, forty
# steps, and a largest norm that the gradients exceed, so that clipping has something to do. Both
# sides compute in 64 bits, so that what differs is not rounding.

# %%
settings = {"n_steps": 40, "batch_size": 8, "learning_rate": 5e-3, "warmup": 5, "log_every": 1}
config = TrainingConfig(**settings, clip_norm=0.5)
ours = Trainer(small_model().double(), BatchSampler(rows, batch_size=8), config)
norms = ours.train().column("gradient_norm")[1]
theirs = small_model().double()
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
    nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    optimizer.step()
    schedule.step()
pairs = zip(ours.parameters, theirs.parameters(), strict=True)
difference = max((a - b).abs().max().item() for a, b in pairs)
assert difference < 1e-8 and sum(norm > 0.5 for norm in norms) > 20
print("clipped in more than half of the steps; no weight differs by more than 1e-8")

# %% [markdown]
# And TensorBoard reads what our sink wrote:

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(str(folder / "board")).Reload()
points = [(event.step, event.value) for event in events.Scalars("validation_loss")]
assert [step for step, _ in points] == steps_logged
assert np.allclose([value for _, value in points], validation_losses)
last = f"the last one {points[-1][1]:.1f} nats at step {points[-1][0]}"
print(f"{len(points)} validation losses, as in our log; {last}")

# %% [markdown]
# ## How fast is it?
#
# The trainer against the bare loop of PyTorch's parts, on the same batches, from which `compact`
# (in a room above) has removed padding and the mask of documents, best of three. Logs and
# checkpoints are not in it:


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
    settings = {"batch_size": 8, "learning_rate": 5e-3, "spike_factor": 10.0}
    config = TrainingConfig(n_steps=len(batches), **settings)
    trainer = Trainer(small_model(d_model=64), sampler, config)
    for batch in batches:
        trainer.train_step(batch)


batches, best = [compact(sampler[step]) for step in range(40)], {}
for loop in (bare_loop, our_loop) * 3:
    start = time.perf_counter()
    loop(batches)
    best[loop.__name__] = min(best.get(loop.__name__, math.inf), time.perf_counter() - start)
print(f"ours takes {best['our_loop'] / best['bare_loop']:.2f} times as long")

# %% [markdown]
# Guard, clipping and monitor cost nothing that can be seen.
#
# ## Exercises
#
# ````{exercise} How much is noise?
# :label: ex-training-noise
# *Fifteen minutes.* The loss of one small batch is noisy. Write `noise_scale(trainer, batch)`:
# split `batch` into single rows, take the gradient of the mean loss of each, and return $\sum_i
# \operatorname{Var}(g_i) \,/\, \lVert \bar g \rVert^2$: the variance of the rows' gradients
# (unbiased, summed over all parameters) over the squared norm of their mean. It says how many rows
# it takes until noise and signal are equal. `trainer.accumulate(row)` adds the gradient of the
# summed loss to those in `.grad`, and returns an object with the number of `targets`. Leave the
# gradients of the model empty (None).
# ````


# %% tags=["solution"]
def noise_scale(trainer: Trainer, batch: Batch) -> float:
    """Return the variance of the gradients of single rows over the square of their mean."""
    gradients = []
    for row in split_rows(batch, 1):
        trainer.model.zero_grad()
        count = trainer.accumulate(row).targets
        gradients.append(torch.cat([(p.grad / count).flatten() for p in trainer.parameters]))
    trainer.model.zero_grad()
    stacked = torch.stack(gradients)
    return float(stacked.var(dim=0).sum() / stacked.mean(dim=0).square().sum())


# %% tags=["check"]
def fresh_trainer(n_steps: int = 9, **changes: Any) -> Trainer:
    config = TrainingConfig(n_steps=n_steps, batch_size=8, learning_rate=1e-2)
    return Trainer(small_model(), BatchSampler(rows, batch_size=8), config, **changes)


def noise_of(vectors: Tensor, correction: int = 1) -> float:
    return float(
        vectors.var(dim=0, correction=correction).sum() / vectors.mean(dim=0).square().sum()
    )


def near(a: float, b: float) -> bool:
    return abs(a / b - 1) < 1e-3


trainer = fresh_trainer()
sums = []
few = Batch(*[None if field is None else field[:3] for field in uneven])  # 4, 5 and 6 targets
for row in split_rows(few, 1):
    total, count = next_token_objective(trainer.model, row)
    gradients = torch.autograd.grad(total, trainer.parameters)
    sums.append((torch.cat([g.flatten() for g in gradients]), int(count)))
means = torch.stack([gradient / count for gradient, count in sums])
found = noise_scale(trainer, few)
undivided = noise_of(torch.stack([gradient for gradient, _ in sums]))
assert not near(found, undivided), "divide each gradient by the number of its targets"
assert not near(found, noise_of(means, 0)), (
    "the unbiased variance divides by one less than the rows"
)
piled = torch.stack([gradient for gradient, _ in sums]).cumsum(dim=0)
piled = torch.stack([gradient / count for gradient, (_, count) in zip(piled, sums, strict=True)])
assert not near(found, noise_of(piled)), "each row has a gradient of its own, begun from nothing"
unsquared = noise_of(means) * float(means.mean(dim=0).norm())
assert not near(found, unsquared), "the norm of the mean is squared"
assert near(found, noise_of(means)), "the variance, summed, over the squared norm of the mean"
assert all(p.grad is None for p in trainer.parameters), "the gradients must be left empty"

# %% [markdown]
# ````{exercise} A moving average of weights
# :label: ex-training-average
# *Twenty minutes.* Evaluations are often made with an average of the weights over time. Write a
# probe `Averaged` that keeps `average`, a list of tensors that begin as copies of the trainer's
# `parameters`, and after each step that was *taken* become $0.9$ times themselves plus $0.1$ times
# the parameters. It must survive a resume: register it as "average", and give it a `state_dict`
# and a `load_state_dict`.
# ````


# %% tags=["solution"]
class Averaged(Probe):
    """A probe that keeps a moving average of the weights."""

    def attach(self, trainer: Trainer) -> None:
        """Begin with copies of the parameters, and register."""
        self.average = [p.detach().clone() for p in trainer.parameters]
        trainer.register("average", self)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Move the average, if the step was taken."""
        if report.taken:
            torch._foreach_lerp_(self.average, [p.detach() for p in trainer.parameters], 0.1)

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return {"average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the average from a state."""
        self.average = list(state["average"])


# %% tags=["check"]
def means_after(n_steps: int, where: Path | None = None) -> tuple[list, list]:
    probe, batches = Averaged(), BatchSampler(rows, batch_size=8)
    config = TrainingConfig(n_steps=40, batch_size=8, spike_factor=2.0)
    given = {"folder": where, "probes": [probe], "objective": spiking}
    trainer = Trainer(small_model(), batches, config, **given)
    trainer.resume()
    while trainer.step < n_steps:
        trainer.train_step(next(iter(batches)))
        trainer.save()
    return [a.clone() for a in probe.average], [p.detach().clone() for p in trainer.parameters]


def spiking(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    total, count = next_token_objective(model, batch)
    is_bad = torch.equal(batch.inputs, compact(sampler[20]).inputs)
    return total * (1000.0 if is_bad else 1.0), count


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(some, others, strict=True))


average, weights = means_after(1)
assert not same(average, weights), "copy the parameters, or the average moves with them"
both = zip(small_model().parameters(), weights, strict=True)
assert same(average, [0.9 * a + 0.1 * b for a, b in both]), "0.9 of the old, 0.1 of the new"
before, after = means_after(20)[0], means_after(21)[0]  # a finite spike, which is skipped
assert same(before, after), "a step that was skipped must not count, whatever its loss"
here = Path(tempfile.mkdtemp())
means_after(2, here)
assert "average" in newest_checkpoint(here)["registered"], "register the probe as 'average'"
resumed, whole = means_after(4, here)[0], means_after(4)[0]
assert same(resumed, whole), "the average must be in the state, and come back"

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
for save, failure in ((1.0, 3600.0), (30.0, 86_400.0), (0.5, 1e5)):
    best = best_interval(save, failure)
    slope = -save / best**2 + 1 / (2 * failure)
    assert abs(slope) < 1e-6 / failure, (
        "there is an interval that wastes less: set the slope to zero"
    )

# %% [markdown]
# ````{exercise} Which part is it?
# :label: ex-training-layers
# *Fifteen minutes.* `update_ratio` is one number for the whole model. Write
# `ratio_by_part(trainer, batch)`: take one step on `batch`, and return the ratio for each of
# "embedding", "blocks.0", "blocks.1", "norm" and "lm_head", by the names of the parameters.
# ````


# %% tags=["solution"]
def ratio_by_part(trainer: Trainer, batch: Batch) -> dict[str, float]:
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
trainer, twin = fresh_trainer(), fresh_trainer()
ratios = ratio_by_part(trainer, sampler[0])
assert set(ratios) == {"embedding", "blocks.0", "blocks.1", "norm", "lm_head"}, "one for each part"
assert trainer.step == 1, "take exactly one step"
old = {name: p.detach().clone() for name, p in twin.model.named_parameters()}
twin.train_step(sampler[0])
for part, ratio in ratios.items():
    mine = [(old[n], p.detach()) for n, p in twin.model.named_parameters() if n.startswith(part)]
    change = sum(float((b - a).square().sum()) for a, b in mine) ** 0.5
    sizes = [sum(float(pair[i].square().sum()) for pair in mine) ** 0.5 for i in (0, 1)]
    each = [float((b - a).norm() / a.norm()) for a, b in mine]
    mean = sum(each) / len(each)
    assert len(mine) == 1 or not near(ratio, mean), f"{part}: one ratio, not a mean of ratios"
    after = abs(ratio - change / sizes[1]) < abs(ratio - change / sizes[0])
    assert not after, f"{part}: divide by the norm of the weights before the step"
    assert near(ratio, change / sizes[0]), (
        f"{part}: the norm of the change over that of the weights"
    )

# %% [markdown]
# ## Summary
#
# A loss travels as a sum and a count; then micro-batches of any size add up to the large batch. A
# step that is not finite, or whose gradient is far above the median, is skipped and counted.
# Looking does not change a run: random generators are set back. Norms and scales tell *what* is
# wrong. A checkpoint is written under another name, forced to the disk, renamed, and verified when
# it is read. It holds all that the next step depends on, so a killed run ends with the same bits,
# and a changed one is refused. The tiny world is learned to within a few percent of the best that
# can be. On documentation half a minute of training predicts better than gzip and xz alone
# compress, if one forgets what the model weighs.
#
# **Checklist for a run that matters.** Overfit ten batches first: a loss that does not fall to
# nothing there is a bug. Evaluate before the first step: the loss must be near $\ln V$ plus half
# the variance of the first logits: 7.4 here, not 6.9, and some nats more if the head is tied
# ({doc}`11_model`). Kill it once, on purpose, and look at the log.
# Save so often that the time lost to failures is about the time spent on saving. Log norm, update
# ratio, activations, logits and skipped steps from the first day. Warm up, clip at 1, and try the
# rate above the one you want, to know how far the cliff is.
#
# **Further reading.** The logbook of OPT {cite}`zhang2022opt` is a frank account of a large
# run. PaLM's report {cite}`chowdhery2023palm` has spikes and MFU; Wortsman and others
# {cite}`wortsman2024proxies` reproduce the instabilities of large models in small ones. How file
# systems lose data that programs thought safe is studied by Pillai and others
# {cite}`pillai2014crash`. That prediction and compression are one is shown, with the model's size
# in the bill, by Delétang and others {cite}`deletang2024compression`.
