# %% [markdown]
# # The training loop
#
# > Train a model that can be watched, stopped, killed and resumed, and that ends with the same
# > weights every time.

# %% tags=["remove-cell"]
#| default_exp training

# %%
#| export
import ast
import difflib
import gzip
import importlib.util
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from statistics import median
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    NamedTuple,
    Protocol,
    TypeVar,
    cast,
    get_args,
    get_origin,
    runtime_checkable,
)

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from llmbook.batches import Batch, BatchSampler, ResumableBatches, TokenShards, _whole_directory
from llmbook.batches import pack_documents, write_shards
from llmbook.blocks import _check_choice
from llmbook.cleaning import clean_documents
from llmbook.corpus import Document, _check_at_least, _needing, _whole_file, read_files
from llmbook.corpus import read_installed_docs, read_jsonl, write_jsonl
from llmbook.deduplication import deduplicate
from llmbook.environment import best_device, seed_everything
from llmbook.model import ModelConfig, TransformerLM, flops_per_token, save_model
from llmbook.optimization import build_optimizer, chunked_cross_entropy, clip_gradients
from llmbook.optimization import constant_schedule, cosine_schedule, cross_entropy
from llmbook.optimization import linear_schedule, wsd_schedule
from llmbook.tinyworld import Story, TinyWorld
from llmbook.tokenizer import GPT2_PATTERN, GPT4_PATTERN, BPETokenizer, train_bpe


# %%
#| export
#: From a model and a batch to the summed loss of its targets and their number.
Objective = Callable[[nn.Module, Any], tuple[Float[Tensor, ""], Any]]


def next_token_objective(
    model: nn.Module, batch: Batch, *, z_loss: float = 0.0, balance_loss: float = 0.0
) -> tuple[Float[Tensor, ""], Int64[Tensor, ""]]:
    """Return the loss of predicting each next token, summed, in nats, and the number of targets.

    ``model`` is a ``TransformerLM``. ``z_loss`` is that of ``cross_entropy``; ``balance_loss``
    weighs the balance loss of experts, which counts once for each target.
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


# %%
#| export
_Rows = TypeVar("_Rows", bound=tuple[Any, ...])


def split_rows(batch: _Rows, rows: int | None) -> Iterator[_Rows]:
    """Yield micro-batches of at most ``rows`` rows; None leaves the batch whole.

    A batch is a named tuple of tensors with one row for each example, and None where there is
    nothing.
    """
    _check_at_least(rows=(1, rows))
    n_rows = len(batch[0])
    for start in range(0, n_rows, rows or n_rows):
        parts = (
            None if field is None else field[start : start + (rows or n_rows)] for field in batch
        )
        yield cast(Any, type(batch))(*parts)


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
    seed: int = 0
    precision: str = "float32"  # or bfloat16, by autocast
    compile: bool = False
    threads: int | None = None  # of the CPU; None: as it is
    spike_factor: float | None = None  # skip steps with a gradient so many times the usual one
    max_skipped: int = 20  # in a row


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


# %%
#| export
def _check_settings(config: _Settings) -> None:
    counts = {"n_steps": 1, "batch_size": 1, "log_every": 1, "keep_last": 1, "warmup": 0}
    counts |= {"evaluate_every": 1, "checkpoint_every": 1, "max_skipped": 0, "seed": 0}
    _check_at_least(**{name: (least, getattr(config, name)) for name, least in counts.items()})
    _check_at_least(micro_batch_size=(1, config.micro_batch_size), threads=(1, config.threads))
    if config.batch_size % (config.micro_batch_size or 1):
        expected = f"a divisor of batch_size = {config.batch_size}"
        raise ValueError(f"micro_batch_size: expected {expected}, got {config.micro_batch_size}")
    _check_choice("optimizer", config.optimizer, ("adamw", "muon", "sgd"))
    _check_choice("schedule", config.schedule, ("cosine", "wsd", "linear", "constant"))
    _check_choice("precision", config.precision, ("float32", "bfloat16"))
    for name in ("learning_rate", "adamw_rate", "clip_norm"):
        _check_amount(name, getattr(config, name), above=0.0)
    for name in ("weight_decay", "z_loss", "balance_loss", "final"):
        _check_amount(name, getattr(config, name))
    _check_amount("spike_factor", config.spike_factor, above=1.0)
    if config.warmup > config.n_steps:
        raise ValueError(
            f"warmup: expected at most n_steps = {config.n_steps}, got {config.warmup}"
        )


def _check_amount(name: str, value: float | None, above: float | None = None) -> None:
    """Refuse what is negative, infinite or NaN, or not ``above`` what is given."""
    least = "0 or more" if above is None else f"more than {above:g}"
    low = value is not None and (value < 0 if above is None else value <= above)
    if value is not None and (low or not math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number, {least}, got {value}")


# %%
#| export
class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and why."""


class SpikeDetector:
    """Tells a gradient norm ``factor`` times the median of the last ``window`` ones it accepted.

    It says nothing before it has seen a quarter of the window; a ``factor`` of None never does.
    """

    def __init__(self, factor: float | None, window: int = 64):
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


# %%
#| export
#: What is logged at once: numbers by name, "step" among them.
Row = Mapping[str, int | float]


@runtime_checkable
class Sink(Protocol):
    """Where a trainer sends what it measures, as rows of numbers by name, "step" among them."""

    def start(self, step: int) -> None:
        """Training goes on after ``step`` steps, or begins (-1): forget rows of later ones."""

    def write(self, row: Row) -> None:
        """Take one row."""

    def close(self) -> None:
        """Training has stopped."""


# %%
#| export
class MetricsLog:
    """Rows of numbers by name, in memory and, if there is a ``path``, as JSON lines in a file.

    A file that is there is read; a last line that was cut off is dropped, by ``start`` for good.

    >>> log = MetricsLog()
    >>> log.write({"step": 10, "loss": 3.5})
    >>> log.column("loss")
    ([10], [3.5])
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self.rows: list[Row] = [] if self.path is None else _read_rows(self.path)

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
        """Do nothing: each row is in the file already."""

    def column(self, name: str) -> tuple[list[int], list[int | float]]:
        """Return the steps that have a value called ``name``, and the values."""
        rows = [row for row in self.rows if name in row]
        if not rows:
            there = ", ".join(sorted({key for row in self.rows for key in row})) or "nothing"
            raise ValueError(f"name: expected one of those logged ({there}), got {name!r}")
        return [int(row["step"]) for row in rows], [row[name] for row in rows]


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


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with _whole_file(path) as draft:
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


# %%
#| export
class TensorBoard:
    """A sink that writes curves for TensorBoard into ``folder``: ``tensorboard --logdir folder``."""

    def __init__(self, folder: str | Path):
        self.folder, self._writer = Path(folder), cast(Any, None)

    def start(self, step: int) -> None:
        """Open a file of events that replaces those of later steps."""
        with _needing("TensorBoard", extra="train"):
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


# %%
#| export
class LivePlot:
    """A sink that draws the columns ``names`` in the notebook, anew with each row that has one."""

    def __init__(self, names: Sequence[str] = ("loss", "validation_loss")):
        self.names, self.log = tuple(names), MetricsLog()
        self._figure = self._shown = cast(Any, None)

    def start(self, step: int) -> None:
        """Open the figure."""
        with _needing("A plot in a notebook", extra="book"):
            import matplotlib.pyplot as plt
            from IPython.display import display
        self.log.start(step)
        self._figure = plt.figure()
        self._shown = display(self._figure, display_id=True)
        plt.close(self._figure)  # else the notebook shows it a second time

    def write(self, row: Row) -> None:
        """Draw the figure again with this row."""
        self.log.write(row)
        if any(name in row for name in self.names):
            plot_columns(self.log, self.names, self._figure)
            if self._shown is not None:  # outside of a notebook there is no handle
                self._shown.update(self._figure)

    def close(self) -> None:
        """Leave the figure as it is."""


# %%
#| export
def plot_columns(log: MetricsLog, names: Sequence[str], figure: Any) -> None:
    """Draw columns of ``log`` against steps, one above the other, into a matplotlib ``figure``."""
    figure.clear()
    there = [name for name in names if any(name in row for row in log.rows)]
    for place, name in enumerate(there):
        axes = figure.add_subplot(len(there), 1, place + 1)
        axes.plot(*log.column(name), marker="o", markersize=2.5)
        axes.set(ylabel=name.replace("_", " "))
    if there:
        axes.set(xlabel="step")


# %%
#| export
@torch.no_grad()
def activation_scales(model: nn.Module, ids: Int64[Tensor, "batch sequence"]) -> dict[str, float]:
    """Return how large the numbers are inside a ``TransformerLM`` that reads ``ids``.

    "stream/0" and so on are the root-mean-square of what each block hands on, "logits" that of
    the logits, "logits/max" the largest of them in absolute value.
    """
    scales: dict[str, Tensor] = {}

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


# %%
#| export
@cache
def peak_flops(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Return the operations a second of the fastest large matrix product, measured once here."""
    size = 4096 if torch.device(device).type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
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


# %%
#| export
def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the norm of the change of all weights over the norm of the weights before it."""
    changes = torch._foreach_norm(torch._foreach_sub(list(after), list(before)))
    norms = torch._foreach_norm(list(before))
    both = (torch.linalg.vector_norm(torch.stack(n)).item() for n in (changes, norms))
    change, norm = both
    return change / norm if norm else math.inf


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
    with _whole_file(path) as draft, draft.open("wb") as file:
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


# %%
#| export
def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the state that ``save_checkpoint`` wrote, its tensors on the CPU.

    A ``CheckpointError`` names the file and what is wrong: missing, damaged, or another format.
    """
    path = Path(path)
    try:
        _verify(path)
        tensors = load_file(path)
        header = _read_header(path)
        return _from_tree(json.loads(header["__metadata__"]["state"]), tensors)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (KeyError, OSError, RecursionError, SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no checkpoint of ours: {error}") from error


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size))


def _verify(path: Path) -> None:
    size = path.stat().st_size - _DIGEST_SIZE
    digest = blake2b(digest_size=_DIGEST_SIZE)
    with path.open("rb") as file:
        left = max(size, 0)
        while left and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
        if size <= 0 or file.read() != digest.digest():
            raise CheckpointError(f"{path}: damaged: the contents do not match the checksum")


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
    for path in (*surplus, *folder.glob(".*.safetensors.*.part")):
        path.unlink(missing_ok=True)


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
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set all global random generators to what ``random_states`` returned."""
    random.setstate(states["python"])
    inner = states["numpy"]["state"]
    key = np.array(inner["key"], np.uint32)
    np.random.set_state({**states["numpy"], "state": {**inner, "key": key}})  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


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
# ## The trainer, first layer: gradients


# %%
#| export
class _Gradients:
    """The first layer of the trainer: gradients of a batch, in micro-batches."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, objective: Objective | None = None
    ):
        self.model, self.config = model, config
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = next(model.parameters()).device
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
# second layer


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
# third layer


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
# fourth layer


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
# fifth layer


# %%
#| export
class _Measured(_Evaluated):
    """The fifth layer: what is logged of the steps."""

    peak: float | None = None  # operations a second
    loss_sum = target_sum = all_targets = 0.0  # since the last row of the log; since the beginning
    seconds = recent_targets = 0.0  # since the last row, and since this process began

    def is_due(self, every: int | None) -> bool:
        """Whether what is done ``every`` so many steps, and at the end, is done after this one."""
        last = self.step == self.config.n_steps
        return last or (every is not None and self.step % every == 0)

    def train_step(self, batch: Any) -> dict[str, float]:
        """Learn from one batch, and add it to the sums."""
        start = time.perf_counter()
        report = super().train_step(batch)
        self.seconds += time.perf_counter() - start
        if math.isfinite(report["loss"]):
            self.loss_sum += report["loss"] * report["targets"]
            self.target_sum += report["targets"]
        self.all_targets += report["targets"]
        self.recent_targets += report["targets"]
        return report

    def update(self, report: dict[str, float]) -> None:
        """Change the weights; if the step is logged, measure by how much."""
        due = self.is_due(self.config.log_every)
        before = [p.detach().clone() for p in self.parameters] if due else None
        super().update(report)
        if before is not None:
            report["update_ratio"] = update_ratio(before, self.parameters)

    def measurements(self, batch: Any, report: Row) -> dict[str, float]:
        """Return what is logged of the steps since the last time; the loss is their mean."""
        return _measurements(self, batch, report)


# %%
#| export
def _measurements(trainer: _Measured, batch: Any, report: Row) -> dict[str, float]:
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
# sixth layer

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
            "config": self.config.to_dict(),
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

    def save_best(self, loss: float) -> None:
        """Keep the weights as ``best.safetensors`` if no evaluation before had as low a loss."""
        if loss < self.best:
            self.best = loss
            if self.folder is not None:
                state = {"step": self.step, "loss": loss, "model": self.model.state_dict()}
                _save(self.folder / "best.safetensors", state)


# %%
#| export
_MAY_CHANGE = {"evaluate_every", "log_every", "checkpoint_every", "keep_last", "max_skipped"}


def _load_state(trainer: _Saved, state: Mapping[str, Any]) -> None:
    here, there = trainer.config.to_dict(), state["config"]
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


def _save(path: Path, state: Mapping[str, Any]) -> bool:
    try:
        save_checkpoint(path, state)
    except OSError as error:
        message = f"{path}: not saved: {error}; what was saved before stays"
        warnings.warn(message, CheckpointWarning, stacklevel=4)
        return False
    return True


# %% [markdown]
# last layer


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


# %%
#| export
class Trainer(_Prepared):
    """Trains ``model`` on ``batches`` as ``config`` says: the same run, however often it is killed.

    ``validation`` batches are scored every ``evaluate_every`` steps; ``probes`` are functions of the
    model whose numbers are logged with that. ``folder`` gets ``metrics.jsonl`` and checkpoints, from
    which ``train`` goes on by itself. ``objective`` is by default ``next_token_objective``; ``sinks``
    get what is logged. ``peak``, in operations a second, is what the log's "mfu" is a share of.
    """

    def train(self) -> MetricsLog:
        """Take the steps that are missing, and return the log.

        Ctrl-C ends training after the step under way, with a checkpoint: ``interrupted`` is then
        true, and the same call goes on. A second Ctrl-C is a ``KeyboardInterrupt`` at once.
        """
        with _alone_in(self.folder), _patient() as is_interrupted, ExitStack() as stack:
            self.resume()
            for sink in self.sinks:
                stack.callback(sink.close)
                sink.start(self.step or -1)  # the row of step 0 comes again, too
            self.begin()
            batches = iter(self.batches)
            while self.step < self.config.n_steps and not is_interrupted():
                batch = self.checked(next(batches))
                self.after_step(batch, self.train_step(batch))
            self.interrupted = self.step < self.config.n_steps
            if self.interrupted and self.step not in list_checkpoints(self.folder or ""):
                self.save()
        return self.log

    def resume(self) -> int:
        """Go on from the newest whole checkpoint in the folder, if there is one; return the step."""
        state = None if self.folder is None else newest_checkpoint(self.folder)
        if state is not None:
            self.load_state_dict(state)
        return self.step

    def begin(self) -> None:
        """Before the first step of all: evaluate the untrained model, if that is asked for."""
        self.model.train()
        if self.step == 0 and self.config.evaluate_every is not None:
            self.record(self.evaluation())

    def checked(self, batch: Any) -> Any:
        """Return ``batch`` if it has the rows that the configuration says, else raise."""
        if len(batch[0]) != self.config.batch_size:
            expected = f"batches of {self.config.batch_size} rows"
            raise ValueError(f"batch_size: expected {expected}, got one of {len(batch[0])}")
        return batch

    def after_step(self, batch: Any, report: Row) -> None:
        """Log, evaluate, save: whatever is due."""
        row = dict[str, float]()
        if self.is_due(self.config.log_every):
            row |= self.measurements(batch, report)
        if (self.validation or self.probes) and self.is_due(self.config.evaluate_every):
            row |= self.evaluation()
        if row:
            self.record(row)
        if self.is_due(self.config.checkpoint_every):
            self.save()

    def record(self, row: Row) -> None:
        """Send a row to all sinks, and keep the model if it is the best so far."""
        for sink in self.sinks:
            sink.write({"step": self.step, **row})
        if "validation_loss" in row:
            self.save_best(row["validation_loss"])

    def load_best(self) -> int:
        """Give the model the weights of the best evaluation; return the step they are from."""
        if self.folder is None:
            raise ValueError("folder: expected the one with best.safetensors, got None")
        state = load_checkpoint(self.folder / "best.safetensors")
        self.model.load_state_dict(state["model"])
        return state["step"]


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
            kind = "name again" if word in seen else "fact" if word in values else "who"
            seen.add(word)
        elif word in species | values:
            kind = "species" if word in species else "fact"
        kinds.append(kind)
    return [*kinds, "certain"]


# %%
#| export
class GapToFloor:
    """A probe: how far a model is from the floor of the tiny world, in all and by kind of word.

    Called with a model it returns "gap", the excess of its loss over the floor as a share of the
    floor; and for each kind "loss/kind" and "floor/kind", in nats per story.
    """

    def __init__(self, world: TinyWorld, stories: Iterable[Story], tokenizer: BPETokenizer):
        self.stories = list(stories)
        _check_at_least(stories=(1, len(self.stories)))
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


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run learns from.

    Kinds are "tinyworld", for stories; "documentation", of installed ``packages``; "files", for the
    ``paths`` of files and folders; and "shards", for two folders of shards, to train and to validate.
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
        _check_choice("kind", self.kind, ("tinyworld", "documentation", "files", "shards"))
        _check_choice("layout", self.layout, ("best_fit", "one_per_row", "windows"))
        _check_at_least(n_stories=(1, self.n_stories), n_held_out=(1, self.n_held_out))
        _check_at_least(validation_rows=(1, self.validation_rows))
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out}")
        needed = {"files": 1, "shards": 2}.get(self.kind, 0)
        if len(self.paths) < needed or (self.kind == "shards" and len(self.paths) != 2):
            raise ValueError(f"paths: expected {needed} for {self.kind!r}, got {len(self.paths)}")


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
        _check_at_least(vocab_size=(256 + len(self.special_tokens), self.vocab_size))
        _check_choice("pattern", self.pattern, tuple(_PATTERNS))
        if "<|endoftext|>" not in self.special_tokens:
            expected = "expected '<|endoftext|>' among them"
            raise ValueError(f"special_tokens: {expected}, got {list(self.special_tokens)}")


# %%
#| export
@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is: data, tokenizer, model, training.

    ``model`` has the fields of ``ModelConfig`` but ``vocab_size``, which is the tokenizer's. A
    ``ValueError`` names every setting that is wrong, as in "training.n_steps".
    """

    data: DataConfig
    tokenizer: TokenizerConfig
    model: Mapping[str, Any]
    training: TrainingConfig

    def __post_init__(self) -> None:
        if "vocab_size" in self.model:
            raise ValueError("model.vocab_size: follows from the tokenizer, leave it out")
        _within("model", self.model_config, self.tokenizer.vocab_size)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """Return the configuration of the model, for a tokenizer of this size."""
        return ModelConfig.from_dict({**self.model, "vocab_size": vocab_size})

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "RunConfig":
        """Return the configuration with these settings; the inverse of ``to_dict``."""
        return _run_config(cls, entries)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as numbers, texts and lists, fit for JSON and YAML."""
        parts = {name: asdict(getattr(self, name)) for name in ("data", "tokenizer", "training")}
        return _plain({**parts, "model": dict(self.model)})

    @classmethod
    def from_yaml(cls, path: str | Path) -> "RunConfig":
        """Read a YAML file; a ``ValueError`` names the file and what is wrong in it."""
        return _from_yaml(cls, Path(path))

    def to_yaml(self, path: str | Path) -> None:
        """Write a YAML file that ``from_yaml`` reads."""
        with _needing("YAML", extra="train"):
            import yaml
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        with _whole_file(Path(path)) as draft:
            draft.write_text(text, encoding="utf-8")


# %%
#| export
def _within(part: str, build: Callable[..., _T], *arguments: Any) -> _T:
    """Build a part of a configuration; what is wrong is named with the part."""
    try:
        return build(*arguments)
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from None


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


def _from_yaml(kind: type[RunConfig], path: Path) -> RunConfig:
    with _needing("YAML", extra="train"):
        import yaml
    try:
        return _run_config(kind, yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


# %%
#| export
def compressors(texts: Sequence[str], seen: Sequence[str] = ()) -> dict[str, float]:
    """Return the bits per byte that gzip and xz need for ``texts``, at their best settings.

    Texts are joined by a zero byte. With texts that were ``seen``, what is counted is by how much
    a compressed file of these grows when the others are appended.
    """
    first, second = ("\0".join([*some, ""]).encode() for some in (seen, texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    best = {"gzip": partial(gzip.compress, mtime=0), "xz": partial(lzma.compress, preset=9)}
    bits = {}
    for name, compress in best.items():
        before = len(compress(first)) if seen else 0
        bits[name] = 8 * (len(compress(first + second)) - before) / n_bytes
    return bits


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


# %%
#| export
def _write_data(config: RunConfig, folder: Path) -> None:
    """Write tokenizer, shards and held-out texts to ``folder``, all or nothing."""
    data, settings = config.data, config.tokenizer
    with _whole_directory(folder) as draft:
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
        peak=peak_flops(best_device()),
    )


# %%
#| export
class Pretrained(NamedTuple):
    """What a run made: the model, ready to use, its tokenizer, the log, and held-out texts."""

    model: TransformerLM
    tokenizer: BPETokenizer
    log: MetricsLog
    held_out: list[str]


def load_run(folder: str | Path) -> Pretrained:
    """Return what ``run`` left in ``folder``; the model is in ``eval`` mode, on the CPU."""
    folder = Path(folder)
    model = TransformerLM.from_pretrained(folder / "model")
    tokenizer = BPETokenizer.load(folder / "model" / "tokenizer.json")
    texts = folder / "data" / "held_out.jsonl"  # a run on shards has none
    held_out = [document.text for document in read_jsonl(texts)] if texts.exists() else []
    return Pretrained(model, tokenizer, MetricsLog(folder / "training" / "metrics.jsonl"), held_out)


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


# %%
#| export
def _claim(folder: Path, config: RunConfig) -> None:
    """Write the configuration to ``folder``, or check that it is the one that is there."""
    path, text = folder / "run.json", json.dumps(config.to_dict(), indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with _whole_file(path) as draft:
            draft.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"folder: {folder} has a run of another configuration, see {path.name}")


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


def _finish(model: nn.Module, folder: Path) -> None:
    """Save the model with its tokenizer, as Hugging Face's library expects a model's folder."""
    tokenizer = BPETokenizer.load(folder / "data" / "tokenizer.json")
    with _whole_directory(folder / "model") as draft:
        end = tokenizer.special_tokens["<|endoftext|>"]
        save_model(cast(TransformerLM, model), draft / "model", eos_token_id=end)
        for path in (draft / "model").iterdir():
            path.rename(draft / path.name)
        (draft / "model").rmdir()
        tokenizer.save(draft / "tokenizer.json")


# %%
#| export
_SMALL: dict[str, Any] = {"threads": 1, "schedule": "linear", "final": 0.0, "spike_factor": 10.0}
#: Configurations that are known to work, by name.
RUNS = {
    "tinyworld": RunConfig(
        data=DataConfig(kind="tinyworld", n_stories=24_000, layout="one_per_row"),
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
        n_steps=450,
        batch_size=8,
        evaluate_every=150,
        log_every=25,
        checkpoint_every=150,
        **_DOCS_TRAINING,
        **_SMALL,
    ),
)
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
        schedule="wsd",
        final=0.0,
        warmup=100,
        z_loss=1e-4,
        precision="bfloat16",
        compile=True,
        spike_factor=10.0,
        evaluate_every=250,
        checkpoint_every=250,
    ),
)


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


# %%
#| export
def _module_sources(names: Iterable[str]) -> dict[str, str]:
    """Return the code of modules of this package and of all that they import, without comments."""
    found, waiting = dict[str, str](), list(names)
    while waiting:
        path = _package_folder() / f"{waiting.pop()}.py"
        if path.stem in found or not path.exists():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path.stem] = ast.unparse(tree)
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        waiting += [str(node.module) for node in imports if node.level == 1]  # from .model import
    return dict(sorted(found.items()))


def _fingerprint(depends_on: Any, train: Callable[..., Any]) -> str:
    """Hash what a trained model depends on: settings, the package's code, and torch's version."""
    code = getattr(train, "func", train)  # of a partial
    module = str(getattr(code, "__module__", "")).removeprefix("llmbook.")
    sources = _module_sources(["training", module])
    content = json.dumps([depends_on, sources, torch.__version__], sort_keys=True)
    return blake2b(content.encode(), digest_size=6).hexdigest()


# %%
#| export
def load_or_train(
    name: str,
    depends_on: Mapping[str, Any],
    train: Callable[[Path], Any],
    *,
    load: Callable[[Path], _T] = TransformerLM.from_pretrained,  # type: ignore[assignment]
    folder: str | Path | None = None,
) -> _T:
    """Return what ``load`` makes of ``artifacts/<name>-<hash>``, which ``train`` fills if it must.

    The hash is of ``depends_on`` (as JSON), of the package's code that training uses, and of the
    version of torch. ``train`` gets a draft folder, which gets its name when it returns and is there
    again after a kill: a ``Trainer`` in it goes on. Processes that ask at once train once.
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


# %%
#| export
def pretrained(name: str = "tinyworld") -> Pretrained:
    """Return the outcome of a run of ``RUNS``, trained on the first call and kept (see there).

    Training "tinyworld" takes a minute or two on a laptop.
    """
    _check_choice("name", name, tuple(RUNS))
    config = RUNS[name]
    return load_or_train(name, config.to_dict(), partial(run, config), load=load_run)


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


# %%
#| export
def _chosen(config: Path | None, preset: str | None) -> RunConfig:
    if (config is None) == (preset is None):
        raise ValueError(f"expected a file CONFIG or a --preset, one of {', '.join(RUNS)}")
    if config is not None:
        return RunConfig.from_yaml(config)
    _check_choice("preset", preset, tuple(RUNS))
    return RUNS[str(preset)]


def _execute(config: RunConfig, folder: Path, tensorboard: bool) -> None:
    sinks: list[Sink] = [ProgressBar(config.training.n_steps)]
    if tensorboard:
        sinks.append(TensorBoard(folder / "tensorboard"))
    for name, value in report(run(config, folder, sinks)).items():
        print(f"{name}: {value:,.4g}")


# %%
#| export
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, ``python -m llmbook.training``, and exit.

    The code is 0, or 2 for a bad request, 1 if training failed, 130 if it was stopped by Ctrl-C.
    """
    with _needing("The command line", extra="train"):
        import typer
    argument, option = typer.Argument, typer.Option

    def train(
        config: Annotated[Path | None, argument(help="A YAML file, see --write.")] = None,
        preset: Annotated[str | None, option(help=f"One of {', '.join(RUNS)}.")] = None,
        write: Annotated[Path | None, option(help="Write a YAML file, train nothing.")] = None,
        folder: Annotated[Path, option(help="Where the run is kept.")] = Path("runs/latest"),
        tensorboard: Annotated[bool, option(help="Write curves into its folder, too.")] = False,
    ) -> None:
        """Train a model as a file or a preset says; a run that was stopped goes on."""
        chosen = _chosen(config, preset)
        if write is None:
            _execute(chosen, folder, tensorboard)
        else:
            chosen.to_yaml(write)
            print(f"{write} is written; train with: python -m llmbook.training {write}")

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    sys.exit(_exit_code(partial(app, args=arguments, standalone_mode=False)))


# %%
#| export
def _exit_code(command: Callable[[], Any]) -> int:
    """Run ``command``; say in one line what went wrong, if something did."""
    try:
        command()
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
