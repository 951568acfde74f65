# %% [markdown]
# # Many devices
#
# > Train on many devices as on one: the same gradients, with the bytes and the memory counted.
#
# A model trained on sixteen thousand processors is the same model as on one, and its gradient is
# the same gradient, or should be. When it isn't, nothing crashes. The loss falls, the samples look
# plausible, and for months the run is a little worse than it could have been. So this chapter asks
# one question of everything it builds: does it equal one process? The second question is what that
# costs, in bytes sent and in bytes kept, because these two decide what can be trained where. We
# divide the batch first, then the model's state, then the model itself, and at the end the
# preparation of its data.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.distributed.launch`, {py:func}`~llmbook.distributed.all_reduce_ring`, {py:class}`~llmbook.distributed.DataParallel`, {py:class}`~llmbook.distributed.ShardedOptimizer`, {py:func}`~llmbook.distributed.shard_model`, {py:func}`~llmbook.distributed.tensor_parallel`, {py:func}`~llmbook.distributed.ring_attention`, {py:func}`~llmbook.distributed.pipeline_step`, {py:func}`~llmbook.distributed.predict_scheme`, {py:class}`~llmbook.distributed.Ranks`, {py:func}`~llmbook.distributed.prepare` |
# | **You need** | attention in tiles ({doc}`09_attention`), training ({doc}`13_training`), memory and 16-bit formats ({doc}`15_precision`); for the last section, {doc}`02_corpus` to {doc}`05_tokenizer`, and {doc}`07_batches` |
# | **It takes** | 60 minutes for the main line, 5 hours for everything, 90 seconds to run |

# %% tags=["remove-cell"]
#| default_exp distributed

# %% [markdown]
# ## A gradient wrong by a factor of two
#
# Two processes train one model. Each has its own copy, reads its own half of every batch, and
# computes the gradient of its mean loss. Then they average their gradients, so that both take the
# same step and the copies stay equal. This is *data parallelism*. Does this give the gradient that
# one process would find on the whole batch?

# %% [markdown] tags=["engine"]
# ### Engine room: what the code imports, and sixteen rows of stories

# %% tags=["engine"]
#| export
# The imports of the module
import io
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import accumulate, zip_longest
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, Literal, NamedTuple

# %% tags=["engine"]
#| export
# PyTorch, and what it takes from earlier chapters
import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Num
from torch import nn, Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes, TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmbook.corpus import without_main_script
from llmbook.environment import check_at_least, check_choice
from llmbook.environment import check_whole, seed_everything
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import SGD, AdamW, clip_gradients, cross_entropy
from llmbook.optimization import parameter_groups

# %% tags=["engine"]
# The data of this chapter's runs: 16 rows of stories in each batch, 8 for each of two ranks
import matplotlib.pyplot as plt

from llmbook.model import count_parameters
from llmbook.tinyworld import TinyWorld

plt.style.use("llmbook.book")
text = " ".join(story.text for story in TinyWorld().stories(300, 0)).encode()
rows = torch.tensor(list(text))[: 1280 * 25].view(1280, 25)
config = ModelConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=2, context_length=24)


def rows_at(step: int, rank: int) -> tuple[Tensor, Tensor]:
    mine = rows[16 * step : 16 * step + 16][rank::2]
    targets = mine[:, 1:].clone()
    if rank == 1:
        targets[:, :-8] = -100  # a prompt: only the last 8 bytes, the answer, are targets
    return mine[:, :-1], targets


# %% [markdown]
# ### Three lines more
#
# In code, data parallelism takes three lines more than training in one process: a loop over the
# weights, in which `all_reduce` adds up a gradient over all processes, and a division turns the sum
# into a mean. Each process has a number, its *rank*. Every batch has 16 rows of stories, and
# `rows_at` gives each rank every second one:


# %%
def train(n_steps: int) -> list[float]:
    seed_everything(0)  # both ranks begin with the same weights
    model, losses = TransformerLM(config), []
    optimizer = AdamW(model.parameters(), lr=0.005)
    for step in range(n_steps):
        inputs, targets = rows_at(step, dist.get_rank())
        loss = cross_entropy(model(inputs), targets)  # the mean over the targets of this rank
        loss.backward()
        for weight in model.parameters():
            dist.all_reduce(weight.grad)  # the sum over ranks
            weight.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% [markdown]
# The two halves are not alike. Rank 0 gets plain text, with 24 targets in each row; rank 1 gets
# prompts with answers, and only the 8 bytes of each answer are targets. Our function
# {py:func}`~llmbook.distributed.launch` runs `train` in two processes and returns what each of them
# returned.

# %% [markdown] tags=["engine"]
# ### Engine room: how processes start, fail and end together

# %% [markdown] tags=["engine"]
# A function can reach a process that has not defined it in one of two ways. If an installed module
# exports it, it travels as its name, and the process imports it. A function of a notebook or a
# script has no such name; it travels as code, which the package `cloudpickle` can send.


# %% tags=["engine"]
#| export
def _packed(what: Any) -> bytes:
    """Bytes that become ``what`` in another process, by ``pickle.loads``."""
    try:
        kind = import_module("cloudpickle").Pickler
    except ImportError:
        return pickle.dumps(what)

    def by_name(pickler: Any, found: Any) -> Any:
        # It sends modules by name, but not those of torch that hold settings.
        if isinstance(found, ModuleType) and sys.modules.get(found.__name__) is found:
            return import_module, (found.__name__,)
        return kind.reducer_override(pickler, found)

    file = io.BytesIO()
    type("Pickler", (kind,), {"reducer_override": by_name})(file).dump(what)
    return file.getvalue()


class _Sent:
    """A function that another process receives by value if it cannot import it."""

    def __init__(self, function: Callable[..., Any]):
        self.payload = _packed(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.payload,)


# %% tags=["engine"]
#| export
def _packed_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    if not callable(function):
        raise ValueError(f"function: expected a function, got {function!r:.60}")
    expected = "expected what can be sent to another process"
    for name, value in (("function", function), ("arguments", arguments)):
        try:
            payload = _packed(value)
        except Exception as error:
            raise ValueError(f"{name}: {expected}, got {value!r:.60}: {error}") from error
        # A name in this script means nothing to a process that does not run it.
        if b"__main__" in payload and "cloudpickle" not in sys.modules:
            raise ValueError(f"{name}: {expected}, got {value!r:.60}: install cloudpickle for it")
    return _packed((function, arguments))


# %% [markdown] tags=["engine"]
# This is what happens in a rank: it joins the group, calls the function, and tells its parent what
# came back. A thread ends the process when the parent is gone, whatever the function is doing at
# that moment. An error is reported by its text, together with the collective that was called last:
# gloo says that it waited, but not for what.


# %% tags=["engine"]
#| export
class _Lines(io.TextIOBase):
    """What a rank prints goes to its parent, in whole lines."""

    def __init__(self, pipe: Connection):
        self.pipe, self.rest = pipe, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.pipe.send_bytes(_packed(("printed", lines)))
        return len(text)


class _Failure(NamedTuple):
    """Why a rank ended: what it says, where, and how likely it is the cause (0 is likeliest)."""

    message: str
    traceback: str
    order: int
    error: BaseException | None = None


_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused")


# %% tags=["engine"]
#| export
def _describe(error: BaseException, timeout: float) -> _Failure:
    """Put the error of a rank into words; in a collective, say which and for how long."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.name for f in frames if f.filename.endswith("distributed_c10d.py")]
    named = next((name for name in inside if name.lstrip("_") == name != "wrapper"), None)
    where = named or ("a collective" if frames and "wait" in (frames[-1].line or "") else None)
    notes: list[str] = getattr(error, "__notes__", [])
    if notes:
        where = f"{where or 'a collective'} ({'; '.join(notes)})"
    message, order = f"raised {type(error).__name__}: {error}", 0
    if where and isinstance(error, RuntimeError) and "imed out" in str(error):
        message, order = f"waited {timeout:g} s in {where} for the others", 1
    elif where and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST):
        message, order = f"lost another rank in {where}", 2
    elif any(text in str(error.__cause__) for text in _LOST):
        order = 2  # the same in other words
    sent: BaseException | None = None
    with suppress(Exception):  # not every exception can travel
        if type(pickle.loads(_packed(error))) is type(error):
            sent = error
    text = "".join(traceback.format_exception(error))
    return _Failure(message, text, order, sent)


# %% tags=["engine"]
#| export
def _leave_with_parent(folder: str) -> None:
    """End this process, and remove what the run wrote, when the parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _loopback() -> dict[str, str]:
    """Tell gloo to listen only on the network interface that leads nowhere else."""
    with suppress(AttributeError, OSError):  # not every system lists its interfaces
        for _, name in socket.if_nameindex():
            if name.startswith("lo"):
                return {"GLOO_SOCKET_IFNAME": name}
    return {}


# %% tags=["engine"]
#| export
def _packed_result(result: Any) -> bytes:
    try:
        return _packed(("returned", result))
    except Exception as error:
        got = f"{result!r:.60}: {error}"
        raise ValueError(f"what the function returned cannot be sent, got {got}") from error


# %% tags=["engine"]
#| export
def _run_rank(
    call: bytes, pipe: Connection, rank: int, world_size: int, folder: str, options: dict[str, Any]
) -> None:
    """Join the group as ``rank``, call the function, and send what it returns or raises."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, interrupted too, ends this process
    threading.Thread(target=_leave_with_parent, args=(folder,), daemon=True).start()
    os.environ.update(options["environment"])
    torch.set_num_threads(options["threads"])
    timeout = options["timeout"]
    try:
        function, arguments = pickle.loads(call)
        store = dist.FileStore(f"{folder}/store", world_size)
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
        )
        with redirect_stdout(_Lines(pipe)) as lines:
            result = function(*arguments)
            lines.write("\n" if lines.rest else "")
        pipe.send_bytes(_packed_result(result))
        with suppress(EOFError):
            pipe.recv_bytes()  # nobody hangs up before all have finished
        dist.destroy_process_group()
    except BaseException as error:
        pipe.send_bytes(_packed(("raised", _describe(error, timeout))))


# %% [markdown] tags=["engine"]
# The parent listens to all ranks at once. The first failure ends the run; but the parent waits a
# moment for others, because a rank that lost its neighbor may be heard before the neighbor's end is
# noticed.


# %% tags=["engine"]
#| export
class RankError(RuntimeError):
    """A rank raised an exception, died, or waited too long; the others were ended."""

    def __init__(self, message: str, rank: int = 0):
        super().__init__(message)
        self.rank = rank


# %% tags=["engine"]
#| export
def _listen(processes: list[Any], pipes: list[Connection]) -> list[Any]:
    """Return what each rank returned, or raise for the one that failed first."""
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
    until: float | None = None
    while len(results) + len(failures) < len(pipes):
        known = results.keys() | failures.keys()
        still = [pipe for rank, pipe in enumerate(pipes) if rank not in known]
        ready = wait(still, None if until is None else max(0.0, until - time.monotonic()))
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                message = pipes[rank].recv_bytes()
            except (EOFError, OSError):
                processes[rank].join(5)
                failures[rank] = _Failure(_death(processes[rank].exitcode), "", 0)
                continue
            kind, content = _unpacked(message)
            if kind == "printed":
                print("\n".join(f"rank {rank}: {line}" for line in content))
            elif kind == "returned":
                results[rank] = content
            else:
                failures[rank] = content
        if failures:
            patience = 0.2 if any(f.order == 0 for f in failures.values()) else 2.0
            until = min(until or math.inf, time.monotonic() + patience)
            if not ready:
                break
    if failures:
        raise _rank_error(failures, results.keys(), len(pipes))
    return [results[rank] for rank in range(len(pipes))]


# %% tags=["engine"]
#| export
def _unpacked(message: bytes) -> tuple[str, Any]:
    """What a rank sent: its kind and content, or a failure if it cannot be read here."""
    try:
        kind, content = pickle.loads(message)
        return kind, content
    except Exception as error:
        told = f"returned what cannot be received: {type(error).__name__}: {error}"
        text = "".join(traceback.format_exception(error))
        return "raised", _Failure(told, text, 0, error)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = " (gloo does this when ranks send different sizes)" if name == "SIGABRT" else ""
        return f"died of {name}{why}"
    return f"died with exit code {code}"


def _rank_error(failures: dict[int, _Failure], done: Collection[int], size: int) -> RankError:
    rank, cause = min(failures.items(), key=lambda item: (item[1].order, item[0]))
    lines = [f"rank {rank} of {size} {cause.message}"]
    for other in range(size):
        if other != rank:
            found = failures.get(other)
            state = "had returned" if other in done else "was still at work"
            lines.append(f"  rank {other} {found.message if found else state}")
    if cause.traceback:
        lines.append(f"in rank {rank}:\n{cause.traceback.rstrip()}")
    error = RankError("\n".join(lines), rank)
    error.__cause__ = cause.error
    return error


# %% [markdown] tags=["engine"]
# Starting a process by forking this one is quick, but a fork copies only one thread: a lock that
# another thread held stays locked forever, and torch's threads hold some. Starting afresh is safe,
# but imports torch in every process. A *fork server* is both quick and safe: one fresh process
# imports torch, does nothing with it, and is forked whenever a rank is needed.


# %% tags=["engine"]
#| export
def launch(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout: float = 60.0,
    threads: int = 1,
) -> list[Any]:
    """Call ``function(*arguments)`` in ``world_size`` processes; return their results by rank.

    The processes form a gloo group, which listens on the loopback interface only and meets through
    a file, so that no port has to be free; ``torch.distributed`` tells each its rank. What they
    print comes out here, behind the rank. A collective waits ``timeout`` seconds for the others.
    torch computes with ``threads`` threads in each. Functions of a notebook or a script, and
    lambdas, can be sent if ``cloudpickle`` is installed, others if they can be imported.

    A rank that raises an exception, dies, or waits too long ends all others: ``RankError`` says
    which it was, and what became of the others; its ``__cause__`` is what the rank raised. No
    process and no file is left behind, whichever way the call ends.

    >>> launch(dist.get_rank, 2)
    [0, 1]
    """
    check_whole("world_size", world_size, 1)
    check_whole("threads", threads, 1)
    if isinstance(timeout, bool) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout: expected a finite number above 0 (seconds), got {timeout!r}")
    call, run = _packed_call(function, arguments), _Sent(_run_rank)
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        # The third is what the first optimizer of a process imports, for seconds.
        preload = ["torch.distributed", "llmbook.distributed", "torch._dynamo"]
        context.set_forkserver_preload(preload)
    environment = {**_loopback(), **os.environ}
    options = {"timeout": timeout, "threads": threads, "environment": environment}
    folder = tempfile.mkdtemp(prefix="llmbook-ranks-")
    processes: list[Any] = []
    pipes: list[Connection] = []
    try:
        with without_main_script():
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                given = (call, theirs, rank, world_size, folder, options)
                process = context.Process(target=run, args=given, name=f"rank {rank}")
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
        results = _listen(processes, pipes)
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join(10)
        return results
    finally:
        for process in processes:
            process.kill()
        for process, pipe in zip(processes, pipes, strict=True):
            process.join()
            process.close()
            pipe.close()
        shutil.rmtree(folder, ignore_errors=True)


# %% [markdown]
# ### It trains
#
# We let both ranks train for eighty steps. Losses are in nats per byte:

# %%
for rank, found in enumerate(launch(train, 2, 80)):
    last = sum(found[-8:]) / 8
    print(f"rank {rank}: loss {found[0]:.1f} at first, below {math.ceil(2 * last) / 2} at the end")
    assert last < 0.6 * found[0]

# %% [markdown]
# Both losses fall, so who would look further? Let $s_r$ be the gradient of the loss *summed*
# over the targets of rank $r$, and let $n_r$ be the number of these targets. The gradient of the
# mean loss over all targets is $(s_0 + s_1) / (n_0 + n_1)$. What the two processes used is the mean
# of two means,
#
# $$
# \frac{1}{2} \Bigl( \frac{s_0}{n_0} + \frac{s_1}{n_1} \Bigr) ,
# $$ (distributed-mean-of-means)
#
# in which a target of rank $r$ has the weight $1 / (2 n_r)$. To see this in the run itself, we take
# the gradient that it used and solve for the shares of $s_0$ and $s_1$ in it. Times 256, the number
# of all targets, each share should be 1:


# %%
def gradient(reduction: str) -> Tensor:
    seed_everything(0)
    model = TransformerLM(config)
    inputs, targets = rows_at(0, dist.get_rank())
    cross_entropy(model(inputs), targets, reduction=reduction).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


used, sums = sum(launch(gradient, 2, "mean")) / 2, torch.stack(launch(gradient, 2, "sum"), dim=1)
shares = torch.linalg.lstsq(sums, used[:, None]).solution.flatten() * (192 + 64)
for rank, n in enumerate((192, 64)):
    print(f"rank {rank}: {n:3} targets, each counts {shares[rank]:.2f} times")

# %% [markdown]
# Every target of the short batch pulls twice as hard as it should. Nothing fails, because a wrong
# weighting is still a weighting. A widely used trainer had this error, over accumulated
# micro-batches and over ranks
# ([transformers#34191](https://github.com/huggingface/transformers/pull/34191),
# [#34242](https://github.com/huggingface/transformers/issues/34242)). So we won't trust a curve. We
# will compare with one process, number by number.

# %% [markdown]
# ## Processes, ranks, collectives
#
# A *collective* is an operation that all ranks of a group call together, each with a tensor of its
# own. Suppose that rank 0 holds the number 1 and rank 1 holds the number 2. Here is what five
# collectives leave them with:
#
# | collective | on rank 0 | on rank 1 |
# |---|---|---|
# | broadcast from rank 0 | 1 | 1 |
# | all-reduce by a sum | 3 | 3 |
# | scatter of 10 and 20 from rank 0 | 10 | 20 |
# | gather on rank 0 | 1, 2 | nothing |
# | all-gather | 1, 2 | 1, 2 |
#
# A sixth, *reduce-scatter*, sums like an all-reduce but leaves each rank with only one part of the
# sum.

# %% [markdown] tags=["engine"]
# ### Engine room: the five collectives, called by their names


# %% tags=["engine"]
def collective(name: str) -> list[float] | str:
    x, both = torch.tensor([dist.get_rank() + 1.0]), [torch.zeros(1), torch.zeros(1)]
    root = dist.get_rank() == 0
    given = {
        "broadcast": (x, 0),
        "all_reduce": (x,),
        "scatter": (x, [10 * x, 20 * x] if root else None),
        "gather": (x, both if root else None),
        "all_gather": (both, x),
    }
    getattr(dist, name)(*given[name])
    if name == "gather" and not root:
        return "nothing"
    return (torch.cat(both) if "gather" in name else x).tolist()


for name in ("broadcast", "all_reduce", "scatter", "gather", "all_gather"):
    first, second = launch(collective, 2, name)
    print(f"{name:11} rank 0 has {first!s:11} rank 1 has {second}")

# %% [markdown] tags=["engine"]
# The sum is the safe reduction. Not every backend knows the average, `ReduceOp.AVG`, and some
# versions of gloo, the backend for processors without a GPU, silently computed it wrong
# ([pytorch#162338](https://github.com/pytorch/pytorch/issues/162338)). This book sums and divides.

# %% [markdown]
# ### A rank that leaves one out
#
# There is one rule that no compiler checks: all ranks must call the same collectives in the same
# order. If one rank leaves out a call, the others wait for it. Our `launch` ends such a run after a
# timeout and says who waited in which collective:


# %%
def unequal() -> None:
    for _ in range(3 - dist.get_rank()):  # rank 1 has one batch less
        dist.all_reduce(torch.ones(1))


try:
    launch(unequal, 2, timeout=1)
except RankError as error:
    print("\n".join(str(error).splitlines()[:2]))

# %% [markdown]
# Rank 1 had one batch less, and has left; rank 0 is still waiting in `all_reduce`.

# %% [markdown] tags=["engine"]
# ### Engine room: counting what is sent, and agreeing before work begins

# %% [markdown] tags=["engine"]
# Every collective of torch, including those inside DDP and FSDP, is an operation that a dispatch
# mode sees, like the mode that measures memory in chapter 15. The table below says which argument
# holds the data and how many times a rank sends it. A rooted collective is counted with its average
# over ranks. gloo's own `reduce_scatter` sends twice what is counted here: it reduces everything,
# then drops a part.


# %% tags=["engine"]
#| export
def _everything(n: int) -> float:
    return n - 1.0


def _most(n: int) -> float:
    return (n - 1) / n


# Of each operation: which argument holds what is sent, and how many times of its bytes leave a rank
# of n. Without suffixes: _ for in place, _base for one tensor, _coalesced for several. A functional
# collective returns what arrives, so with it the first argument is always what is sent.
_SENT_BY: dict[str, tuple[int, Callable[[int], float]]] = {
    "send": (0, lambda n: 1.0),
    "allreduce": (0, lambda n: 2 * _most(n)),
    "all_reduce": (0, lambda n: 2 * _most(n)),
    "allgather": (1, _everything),
    "allgather_into_tensor": (1, _everything),
    "all_gather_into_tensor": (1, _everything),
    "reduce_scatter": (1, _most),
    "reduce_scatter_tensor": (1, _most),
    "broadcast": (0, _most),
    "reduce": (0, _most),
    "gather": (1, _most),
    "scatter": (0, _most),
    "alltoall": (1, _most),
    "all_to_all_single": (1, _most),
}
_SUFFIXES = re.compile(r"^_|(_coalesced|_base|_out|_)+$")


# %% tags=["engine"]
#| export
class ByteCounter(TorchDispatchMode):
    """Counts, inside a ``with``, the bytes that this rank sends, and the calls of collectives.

    ``sent`` is in bytes, as if each collective went around a ring: twice (n - 1)/n of its data for
    an all-reduce, (n - 1)/n for a reduce-scatter or all-gather of the whole; what ``send`` sends
    counts as it is. ``by_name`` has the bytes of each collective, ``calls`` the number of calls.
    The few bytes by which ranks compare what they are about to do (``check_agreed``) are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def sent(self) -> int:
        """All bytes that this rank has sent."""
        return sum(self.by_name.values())

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count the operation, and run it."""
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it will call the collectives itself
        if operation.namespace in ("c10d", "_c10d_functional"):
            name = _SUFFIXES.sub("", operation._schema.name.partition("::")[2])
            if name in _SENT_BY:
                place, share = _SENT_BY[name]
                place = place if operation.namespace == "c10d" else 0
                size = sum(t.nbytes for t in tree_leaves(args[place]) if isinstance(t, Tensor))
                self.calls[name] += 1
                self.by_name[name] += round(size * share(_size_of_group(args)))
        return operation(*args, **(kwargs or {}))


# %% tags=["engine"]
#| export
def _size_of_group(arguments: Any) -> int:
    """How many ranks take part in the collective that was called with ``arguments``."""
    for argument in reversed(arguments):
        if isinstance(argument, torch.ScriptObject):
            with suppress(RuntimeError, TypeError):  # another object, such as the operation
                return dist.ProcessGroup.unbox(argument).size()
        elif isinstance(argument, str) and argument != "sum":
            named: Any = argument
            return dist.distributed_c10d._resolve_process_group(named).size()
    return dist.get_world_size()


# %% [markdown] tags=["engine"]
# A collective hangs if one rank does not call it, or calls another one. A rank without targets
# contributes zero, which is fine; a rank without a *batch* is not, because the others wait for it.
# So whatever decides about calls (how many micro-batches there are, which parameters) is compared
# first. All ranks see all values, so all raise the same error.


# %% tags=["engine"]
#| export
def place_in_group(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return the rank of this process in ``group`` (None for all), and the number of ranks."""
    if not dist.is_available() or not dist.is_initialized():
        expected = "a process group, as in a function that launch or torchrun started"
        raise ValueError(f"group: expected {expected}, got none")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group: expected one that has rank {dist.get_rank()}, got one without it")
    return rank, dist.get_world_size(group)


def check_agreed(group: dist.ProcessGroup | None = None, **numbers: int) -> None:
    """Refuse whole numbers that differ between ranks, on each rank with the same ``ValueError``.

    For example ``check_agreed(micro_batches=len(batches))`` before a loop of collectives. All ranks
    must call it; names that differ are refused, too.
    """
    place_in_group(group)
    for name, number in numbers.items():
        check_whole(name, number, -(2**63), 2**63 - 1)
    _check_same({name: int(number) for name, number in numbers.items()}, group)


# %% tags=["engine"]
#| export
def _check_same(told: dict[str, Any], group: dist.ProcessGroup | None, device: Any = None) -> None:
    """Refuse what ranks tell differently, with the same ``ValueError`` on each; not counted."""
    _, size = place_in_group(group)
    with _disable_current_modes():
        mine = torch.tensor(zlib.crc32(repr(told).encode()), device=device)
        found = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(found, mine, group=group)
        if len({int(checksum) for checksum in found}) == 1:
            return
        all_told: list[Any] = [None] * size
        dist.all_gather_object(all_told, told, group=group)
    rows = [("names", [list(of_rank) for of_rank in all_told])]
    rows += [(name, [of_rank.get(name) for of_rank in all_told]) for name in told]
    for name, row in rows:
        values = [str(value) for value in _apart(row)]
        if len(set(values)) > 1:
            got = ", ".join(f"{value:.100} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"{name}: expected the same on each rank, got {got}")


def _apart(row: list[Any]) -> list[Any]:
    """Of lists, return the first items that differ; of anything else, what was given."""
    while all(isinstance(value, list) for value in row):
        columns = zip_longest(*row, fillvalue="nothing")
        different = next((c for c in columns if any(item != c[0] for item in c)), None)
        if different is None:
            break
        row = list(different)
    return row


# %% [markdown] tags=["engine"]
# Two more functions that all ranks call together: one divides a batch, the other adds up numbers.


# %% tags=["engine"]
#| export
def rows_of_rank(
    batch: Num[Tensor, "n_rows ..."], group: dist.ProcessGroup | None = None
) -> Num[Tensor, "n_own ..."]:
    """Return the rows of this rank: every n-th, for n ranks, which must divide their number."""
    rank, size = place_in_group(group)
    if not isinstance(batch, Tensor):
        raise ValueError(f"batch: expected a tensor with rows, got {batch!r:.60}")
    if not len(batch) or len(batch) % size:
        expected = f"a multiple of {size} rows, so that each of {size} ranks has as many"
        raise ValueError(f"batch: expected {expected}, got {len(batch)}")
    return batch[rank::size]


def sum_over_ranks(number: int, group: dist.ProcessGroup | None = None) -> int:
    """Return the sum of whole numbers, one of each rank, such as its number of targets."""
    place_in_group(group)
    check_whole("number", number, -(2**63), 2**63 - 1)
    total = torch.tensor(number)
    dist.all_reduce(total, group=group)
    return int(total)


# %% [markdown] tags=["engine"]
# A rank sends and receives at the same time. If it sent first and received afterwards, it could
# wait for a neighbor that does the same. And both are awaited: with gloo, an `isend` that nobody
# waits for hangs the *next* operation of that process, such as a barrier, which is not where one
# looks for the fault.


# %% tags=["engine"]
#| export
def pass_on(
    x: Num[Tensor, "*shape"], group: dist.ProcessGroup | None = None
) -> Num[Tensor, "*shape"]:
    """Send ``x`` to the next rank of the ring, and return what the previous one sends."""
    rank, size = place_in_group(group)
    if size == 1:
        return x.clone()
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    sending: Any = dist.isend(x.contiguous(), group=group, group_dst=(rank + 1) % size)
    receiving: Any = dist.irecv(received, group=group, group_src=(rank - 1) % size)
    receiving.wait()
    sending.wait()
    return received


# %% [markdown]
# ## A ring
#
# How does a sum of $b$ bytes reach all of $n$ ranks? If all of them send their tensors to rank 0,
# it receives $(n - 1) b$ bytes, adds them up, and sends as many back: with a thousand ranks, that
# takes a thousand times as long as with two. In a ring, each rank sends only to the next one, and
# no rank sends more than $2b$ bytes {cite}`patarasuk2009bandwidth`.
#
# Cut the tensor into $n$ parts. In each step, a rank passes on one part, and adds the part that
# arrives to its own copy of that part. A part travels once around the ring and gathers the
# contributions; after $n - 1$ steps, each rank holds one complete part of the sum. That is the
# reduce-scatter. Then the complete parts travel around once more, and each rank keeps a copy, which
# is an all-gather. With `pass_on(x)`, which sends `x` to the next rank and returns what the
# previous one sent, this becomes:


# %%
def ring(parts: list[Tensor]) -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    for step in range(n - 1):  # reduce-scatter: what arrives is added
        parts[(rank - step - 2) % n] += pass_on(parts[(rank - step - 1) % n])
    for step in range(n - 1):  # all-gather: what arrives is kept
        parts[(rank - step - 1) % n] = pass_on(parts[(rank - step) % n])


# %% [markdown]
# ```{figure} ../figures/distributed-ring.svg
# :name: fig-distributed-ring
# :class: narrow
# :alt: Three columns, one for each rank, and five rows, one for each state. At first each rank has three parts of its own. After two steps of reduce-scatter each rank has one part to which all three have contributed, after two more steps of all-gather each rank has all three.
#
# A ring of three ranks. Each cell is a part of the tensor, and names the ranks whose numbers are in
# it. An arrow takes a part to the next rank; those from the last one to the first are left out.
# ```
#
# Each of the two halves takes $n - 1$ steps, and a rank sends $b / n$ bytes in each step. So the
# whole all-reduce sends
#
# $$
# 2 (n - 1) \cdot \frac{b}{n} = \frac{2 (n - 1)}{n} \, b
# $$ (distributed-ring)
#
# bytes from each rank, less than $2b$ for any number of ranks. What does grow with $n$ is the
# number of steps, each with a wait for its first byte.
#
# All ranks end up with the *same bits*, because each part was added up once and then copied.
# {py:class}`~llmbook.distributed.ByteCounter` counts what a rank hands to the network. For 120,000
# float32 numbers, it finds 480,000 bytes on two ranks, 640,000 on three, and 720,000 on four, as
# the formula says.

# %% [markdown] tags=["engine"]
# ### Engine room: the two halves, for tensors of any shape, and the bytes counted

# %% [markdown] tags=["engine"]
# The package offers the two halves and the whole, within any group of ranks. The order of the
# additions differs from part to part, so the bits, though the same on all ranks, can differ from
# those of a sum taken in the order of ranks. If the number of ranks does not divide the number of
# elements, zeros fill up the rest.


# %% tags=["engine"]
#| export
def reduce_scatter_ring(
    parts: Num[Tensor, "n_ranks ..."], group: dist.ProcessGroup | None = None
) -> Num[Tensor, "..."]:
    """Return, of the sum of ``parts`` over ranks, the part of this rank.

    A ``ValueError`` on all ranks tells of shapes or dtypes that differ between them.
    """
    _, size = place_in_group(group)
    _check_alike("parts", parts, group)
    _check_parts(parts, size)
    return _scattered(parts, group)


def all_gather_ring(
    part: Num[Tensor, "..."], group: dist.ProcessGroup | None = None
) -> Num[Tensor, "n_ranks ..."]:
    """Return the parts of all ranks, in order; they must have one shape and dtype."""
    place_in_group(group)
    _check_alike("part", part, group)
    return _gathered(part, group)


# %% tags=["engine"]
#| export
def _scattered(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    rank, size = place_in_group(group)
    parts = parts.clone()
    for step in range(size - 1):
        arrived = pass_on(parts[(rank - step - 1) % size], group)
        parts[(rank - step - 2) % size] += arrived
    return parts[rank]


def _gathered(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    rank, size = place_in_group(group)
    parts = part.new_empty(size, *part.shape)
    parts[rank] = part
    for step in range(size - 1):
        parts[(rank - step - 1) % size] = pass_on(parts[(rank - step) % size], group)
    return parts


# %% tags=["engine"]
#| export
def all_reduce_ring(x: Num[Tensor, "*shape"], group: dist.ProcessGroup | None = None) -> None:
    """Replace ``x`` on each rank by its sum over ranks, with the same bits on all of them.

    A rank sends 2 (n - 1)/n of the bytes, padded to a multiple of n numbers (Patarasuk and Yuan
    2009). A ``ValueError`` on all ranks tells of shapes or dtypes that differ between them.
    """
    _, size = place_in_group(group)
    _check_alike("x", x, group)
    padded = nn.functional.pad(x.flatten(), (0, -x.numel() % size)).view(size, -1)
    total = _gathered(_scattered(padded, group), group)
    x.copy_(total.flatten()[: x.numel()].view_as(x))


# %% tags=["engine"]
#| export
# What the ring refuses
def _check_alike(name: str, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Refuse tensors that differ between ranks: gloo would abort, or mix up their numbers."""
    if place_in_group(group)[1] > 1:
        _check_same({name: f"{tuple(x.shape)} of {x.dtype}"}, group, x.device)


def _check_parts(parts: Tensor, size: int) -> None:
    if len(parts) != size:
        raise ValueError(f"parts: expected one part for each of {size} ranks, got {len(parts)}")


# %% [markdown] tags=["engine"]
# The smallest ring first, on three ranks, then `ByteCounter` against the formula:


# %% tags=["engine"]
def ring_sum() -> Tensor:
    parts = list((torch.arange(6.0) * (dist.get_rank() + 1)).chunk(3))
    ring(parts)
    return torch.cat(parts)


assert all(torch.equal(total, torch.arange(6.0) * (1 + 2 + 3)) for total in launch(ring_sum, 3))


# %% tags=["engine"]
def counted(n_numbers: int) -> int:
    with ByteCounter() as traffic:
        all_reduce_ring(torch.ones(n_numbers))
    return traffic.sent


for n in (2, 3, 4):
    (sent,) = set(launch(counted, n, 120_000))
    print(f"{n} ranks: {sent:,} bytes sent by each, formula {2 * (n - 1) * 480_000 // n:,}")

# %% [markdown]
# ## The mean over tokens, done right
#
# Now we can mend the gradient of the opening. The sum of the losses over all targets is a plain
# sum, over ranks and over the micro-batches that each rank accumulates, and so is its gradient. The
# only number that a rank needs from the others is the denominator: how many targets there are in
# all. One `all_reduce` of one number (`sum_over_ranks`) finds it *before* the first backward pass.
# We compare three recipes, each with four micro-batches on each of two ranks, with one process that
# reads all rows at once:


# %%
def gradient_by(recipe: str) -> Tensor:
    seed_everything(0)
    model = TransformerLM(config)
    inputs, targets = rows_at(0, dist.get_rank())
    n_all = sum_over_ranks(int((targets != -100).sum()))
    for x, t in zip(inputs.chunk(4), targets.chunk(4), strict=True):
        if recipe == "mean of means":
            loss = cross_entropy(model(x), t) / 4
        else:
            loss = cross_entropy(model(x), t, reduction="sum") / n_all
        loss.backward()
    total = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    all_reduce_ring(total)
    return total if recipe == "sum over all" else total / dist.get_world_size()


right = sums.sum(dim=1) / (192 + 64)
for recipe in ("mean of means", "sum over all, then averaged", "sum over all"):
    found = launch(gradient_by, 2, recipe)[0]
    error = ((found - right).norm() / right.norm()).item()
    print(f"{recipe:28} {f'off by {error:.0%}' if error > 1e-3 else 'equal to one process'}")

# %% [markdown]
# Only the last recipe equals one process up to rounding (within a thousandth here, and a millionth
# in the tests). The second is the other famous factor of two: a loss already divided by the targets
# of all ranks, inside a wrapper that *averages* gradients, as torch's does. Multiply it by the
# number of ranks, and it is right again. AdamW hides this error from the curve, because Adam
# divides each gradient by its own size. The error does show in the gradient norm, and so in how
# often clipping strikes.

# %% [markdown]
# ## While the backward pass still runs
#
# The gradient of the last layer is ready long before that of the first. Why wait? A hook that runs
# when a gradient is complete can start its sum over ranks, and the network works while the
# processor goes on:


# %%
def exchange_early(model: nn.Module) -> list[tuple[nn.Parameter, Any]]:
    under_way = []

    def send(weight: nn.Parameter) -> None:
        under_way.append((weight, dist.all_reduce(weight.grad, async_op=True)))

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(send)
    return under_way  # to be waited for before the step


# %% [markdown]
# An asynchronous collective returns a handle at once; its tensor may be used only after `wait`.
# This is the idea of {py:class}`~llmbook.distributed.DataParallel`. Four rules make it fit for use
# {cite}`li2020pytorch`. Hundreds of small messages are slow, so gradients share *buckets*, the last
# layers first, and a bucket is sent when it is full. Gradients may become ready in a different
# order on another rank, but collectives must not, so a bucket waits until those before it have been
# sent. Copies that start out unequal stay unequal, so rank 0 broadcasts its weights at the
# beginning. Finally, accumulation needs no exchange before the last micro-batch: `no_sync` switches
# it off. It has to enclose the *forward* pass, too, because that is where torch's wrapper and ours
# decide.
#
# With buckets of at most 8 KiB, 14 of our small model's 15 were on their way before the backward
# pass ended; with 1,024 KiB there was only one, and nothing to hide it behind.

# %% [markdown] tags=["engine"]
# ### Engine room: buckets, marks, and gradients that were summed already

# %% [markdown] tags=["engine"]
# A weight that is used twice, as a tied embedding is, has one
# gradient, which is complete after both uses. A frozen weight has none. And a weight that was not
# used here, such as an expert without tokens, may have been used on another rank. So every bucket
# carries a mark for each weight, which says whether it had a gradient; what is not complete when
# the backward pass ends is sent with zeros. If no rank had one, the optimizer must leave the weight
# alone, as it would in one process. Buffers are broadcast before each forward pass. If `no_sync`
# encloses only the backward pass, everything is exchanged in full, which nobody notices, because it
# costs nothing but time.


# %% tags=["engine"]
#| export
class _Bucket:
    """Some parameters whose gradients travel together, and how many are still missing."""

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.missing = set(parameters)
        self.flat = torch.empty(0)
        self.work: Any = None

    def send(self, group: dist.ProcessGroup | None) -> None:
        """Start the sum of the gradients, and of a mark for each that there is."""
        given = [p.grad for p in self.parameters]
        pairs = zip(self.parameters, given, strict=True)
        parts = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]
        marks = parts[0].new_tensor([g is not None for g in given])
        self.flat = torch.cat([*parts, marks])
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def receive(self, name: str, scale: float) -> None:
        """Wait for the sum, and put it in the place of the gradients."""
        try:
            self.work.wait()
        except RuntimeError as error:
            error.add_note(name)
            raise
        *parts, marks = self.flat.split(
            [*(p.numel() for p in self.parameters), len(self.parameters)]
        )
        for p, part, mark in zip(self.parameters, parts, marks.tolist(), strict=True):
            # No rank has a gradient: as in one process, the optimizer must leave it alone.
            p.grad = part.view_as(p).mul(scale) if mark else None
        self.missing, self.flat, self.work = set(self.parameters), torch.empty(0), None


# %% tags=["engine"]
#| export
class DataParallel(nn.Module):
    """A model of which each rank has a copy; after ``backward``, all have the same gradients.

    They are the sums over ranks, so that a loss divided by the number of targets of all ranks has
    the gradient of one process; "mean" divides by the number of ranks, as torch's DDP does. The
    gradients travel in buckets of at most ``bucket_bytes`` (a larger one has a bucket alone), the
    last layers first, while ``backward`` goes on. Call this module and not the one inside. Frozen
    parameters are left out; one that has a gradient on no rank has none afterwards. Weights and
    buffers begin as those of rank 0, and buffers are its at each forward pass that exchanges.
    A parameter may change whether it is frozen only before, and ``tensor_parallel`` comes before,
    too: what replaces parameters afterwards is refused. (Li et al. 2020.)
    """

    def __init__(
        self,
        module: nn.Module,
        bucket_bytes: int = 25 * 2**20,
        reduction: Literal["sum", "mean"] = "sum",
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        check_whole("bucket_bytes", bucket_bytes, 1)
        check_choice("reduction", reduction, ("sum", "mean"))
        _, size = place_in_group(group)
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: expected a module, got {module!r:.60}")
        _check_not_shares("module", module.parameters(), group)
        _check_not_exchanged("module", module.parameters())
        check_agreed_parameters(module, group)
        self.module, self.group = module, group
        self.scale = 1 / size if reduction == "mean" else 1.0
        self.buckets = [_Bucket(some) for some in _in_buckets(module, bucket_bytes)]
        #: How many buckets were under way when the last gradient arrived.
        self.sent_early = 0
        self._exchanges, self._local, self._armed = True, False, False
        self._ending, self._next = False, 0
        self._summed: dict[nn.Parameter, Tensor] = {}
        self._bucket_of = {p: b for b in self.buckets for p in b.parameters}
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), group=group, group_src=0)
        for p in self._bucket_of:
            p.register_post_accumulate_grad_hook(self._arrived)
            _mark_exchanged(p, "DataParallel")


# %% tags=["engine"]
#| export
class DataParallel(DataParallel):  # continued
    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Call the module; what it returns leads to gradients that are exchanged."""
        if torch.is_grad_enabled():
            self._armed, self._local = self._exchanges, not self._exchanges
        if self._armed and torch.is_grad_enabled():
            self._check_not_summed()
            for buffer in self.module.buffers():
                dist.broadcast(buffer, group=self.group, group_src=0)
        return self.module(*arguments, **options)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients on this rank, to accumulate: for the forward pass, too, and not the last.

        As in torch, the *forward* pass decides: a backward pass alone inside of this exchanges.
        """
        before, self._exchanges = self._exchanges, False
        try:
            yield
        finally:
            self._exchanges = before

    def _arrived(self, parameter: nn.Parameter) -> None:
        """Note that the gradient is there, and send what is complete, in the same order on all."""
        if not self._armed:
            if not self._local:
                expected = "a forward pass through DataParallel before each backward pass"
                got = "one through the module inside, or two with no forward pass between them"
                raise RuntimeError(f"module: expected {expected}, got {got}")
            return
        if not self._ending:
            self._ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self.sent_early = self._next
        self._bucket_of[parameter].missing.discard(parameter)
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            self.buckets[self._next].send(self.group)
            self._next += 1

    def _end(self) -> None:
        """When the backward pass has ended: send what was not complete, and wait for all."""
        for bucket in self.buckets[self._next :]:
            bucket.send(self.group)
        for number, bucket in enumerate(self.buckets, 1):
            bucket.receive(f"bucket {number} of {len(self.buckets)} of DataParallel", self.scale)
        self._armed, self._local, self._ending, self._next = False, False, False, 0
        self._summed = {p: p.grad for p in self._bucket_of if p.grad is not None}


# %% tags=["engine"]
#| export
class DataParallel(DataParallel):  # continued
    def _check_not_summed(self) -> None:
        """Refuse to add to gradients that are sums over ranks, which would be summed once more."""
        for p, grad in self._summed.items():
            if p.grad is grad and grad.any():
                expected = "none from before (zero_grad), or no_sync for all but the last backward"
                raise ValueError(f"gradients: expected {expected}, got some that were exchanged")


def _in_buckets(module: nn.Module, most: int) -> list[list[nn.Parameter]]:
    """The parameters to train, last first, in groups of one dtype and at most ``most`` bytes."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for p in reversed([p for p in module.parameters() if p.requires_grad]):
        if not buckets or p.nbytes > room or p.dtype != buckets[-1][-1].dtype:
            buckets.append([])
            room = most
        buckets[-1].append(p)
        room -= p.nbytes
    if not buckets:
        raise ValueError(f"module: expected parameters to train, got none in {module!r:.60}")
    return buckets


# %% tags=["engine"]
#| export
def check_agreed_parameters(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Refuse models that differ between ranks in names, shapes, dtypes, or in what is frozen.

    The ``ValueError``, the same on all ranks, names the first parameter or buffer that differs.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    told = [
        f"{name} {tuple(t.shape)} of {t.dtype}{'' if t.requires_grad else ', not trained'}"
        for name, t in named
    ]
    _check_same({"parameters": told}, group)


# %% tags=["engine"]
#| export
def _ranks_of(group: dist.ProcessGroup | None) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group)) if dist.is_initialized() else (0,)


def _mark_share(
    share: Tensor, made_by: str, group: dist.ProcessGroup | None, whole: Tensor
) -> None:
    """Note on a parameter that others in ``group`` have other shares of ``whole``."""
    marks = (*getattr(whole, "shares", ()), (made_by, _ranks_of(group)))
    setattr(share, "shares", marks)  # noqa: B010


def _check_not_shares(
    argument: str,
    tensors: Iterable[Tensor],
    group: dist.ProcessGroup | None,
    anywhere: Collection[str] = (),
) -> None:
    """Refuse shares that differ in ``group``, which would be taken for copies of one weight."""
    here = set(_ranks_of(group))
    for tensor in tensors:
        for made_by, ranks in getattr(tensor, "shares", ()):
            if made_by in anywhere or len(here & set(ranks)) > 1:
                got = f"shares ({made_by} was called before)"
                raise ValueError(f"{argument}: expected whole weights in this group, got {got}")


# %% tags=["engine"]
#| export
def _mark_exchanged(parameter: Tensor, made_by: str) -> None:
    """Note on a parameter that its gradients are summed over ranks already."""
    setattr(parameter, "exchanged_by", made_by)  # noqa: B010


def _check_not_exchanged(argument: str, tensors: Iterable[Tensor], replaces: bool = False) -> None:
    """Refuse to sum gradients twice, or, if it ``replaces`` parameters, to lose hooks of theirs."""
    for tensor in tensors:
        if made_by := getattr(tensor, "exchanged_by", None):
            expected = "weights whose gradients nothing exchanges yet"
            got = f"some that {made_by} exchanges (call it last, and once)"
            raise ValueError(f"{argument}: expected {expected}, got {got}")
        if replaces and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks):
            expected = "weights without hooks, which the new ones would not have"
            raise ValueError(f"{argument}: expected {expected}, got some: register them afterwards")


# %% [markdown] tags=["engine"]
# Does the smallest form, of one hook, find the gradient of one process? And how many of our buckets
# are under way when the last gradient has been computed?


# %% tags=["engine"]
def hooked() -> Tensor:
    seed_everything(0)
    model = TransformerLM(config)
    under_way = exchange_early(model)
    inputs, targets = rows_at(0, dist.get_rank())
    (cross_entropy(model(inputs), targets, reduction="sum") / (192 + 64)).backward()
    for _, sum_of_ranks in under_way:
        sum_of_ranks.wait()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


assert all((found - right).norm() < 1e-3 * right.norm() for found in launch(hooked, 2))


# %% tags=["engine"]
def early(bucket_bytes: int) -> str:
    model = DataParallel(TransformerLM(config), bucket_bytes)
    inputs, targets = rows_at(0, dist.get_rank())
    cross_entropy(model(inputs), targets, reduction="sum").backward()
    return f"{model.sent_early:2} of {len(model.buckets):2} buckets out early"


for kib in (8, 32, 1024):
    print(f"at most {kib:4} KiB: {launch(early, 2, kib * 1024)[0]}")

# %% [markdown]
# ## Less memory: shard the optimizer, then everything
#
# All copies are equal, which is a waste. Training with AdamW in float32 keeps 16 bytes for each
# weight: 4 for the weight itself, 4 for its gradient, and 8 for the two averages. ZeRO removes the
# copies in stages {cite}`rajbhandari2020zero`.
#
# **Stage 1** divides the optimizer. Rank $r$ updates only its $n$-th of the weights, so it needs
# only that part of the summed gradient: a reduce-scatter instead of an all-reduce. Afterwards all
# ranks need all new weights: an all-gather. These are the two halves of {eq}`distributed-ring` with
# the optimizer's step in between, so the traffic is the same as before. This works for optimizers
# that treat each number by itself, so not for Muon, which needs whole matrices.
#
# **Stage 2** divides the gradients as well: once a rank has the sum of its part, it frees all other
# gradients. **Stage 3**, full sharding, divides the weights, too. Before a block computes, its
# weights are gathered; afterwards they are freed; the backward pass gathers them again. What is the
# gradient of a gather? Every rank computes with all of $w = (w_0, \dots, w_{n-1})$, so the total
# loss is a sum over ranks $q$ of losses $L_q(w)$, and
#
# $$
# \frac{\partial}{\partial w_r} \sum_q L_q(w)
# = \sum_q \Bigl( \frac{\partial L_q}{\partial w} \Bigr)_r .
# $$ (distributed-gather)
#
# Sum over ranks, and keep part $r$. That is a reduce-scatter, so full sharding is hardly more than
# one function with its derivative:


# %%
class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return all_gather_ring(part).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return reduce_scatter_ring(gradient.unflatten(0, (dist.get_world_size(), -1)))


# %% [markdown]
# Left alone, autograd would keep each gathered weight until the backward pass, and nothing would be
# saved. {py:func}`~llmbook.distributed.shard_model` hands autograd a note instead, saying which
# weight of which block it was, and gathers again when the note is read. Each weight is gathered
# twice and reduced once, so a rank sends $3 (n - 1) / n$ times its bytes: half as much again as
# before, and in *every* micro-batch. With 16-bit weights, the two gathers cost half.

# %% [markdown] tags=["engine"]
# ### Engine room: an optimizer in shares, and a model in rows

# %% [markdown] tags=["engine"]
# The optimizer lays all parameters end to end in one vector and cuts it into n equal shares. A cut
# may go through a tensor, so AdamW gets *pieces*: vectors that are views of the share, in the
# groups of the tensors they come from. If a tensor has a gradient on no rank, its pieces have none
# either, and its decay and its count of steps stay as in one process.


# %% tags=["engine"]
# First, does `Gather` find the derivative? Rank r takes each gathered number r + 1 times its place.
def through_gather() -> Tensor:
    part = (torch.arange(3.0) + 3 * dist.get_rank()).requires_grad_()
    (Gather.apply(part) * torch.arange(6.0) * (dist.get_rank() + 1)).sum().backward()
    return part.grad


assert torch.equal(torch.cat(launch(through_gather, 2)), torch.arange(6.0) * (1 + 2))


# %% tags=["engine"]
#| export
class ShardedOptimizer:
    """An optimizer whose state and work is divided over ranks (ZeRO-1, Rajbhandari et al. 2020).

    ``parameters`` are a model's, or groups of them, and ``build`` makes the optimizer, which must
    treat each number by itself (AdamW or SGD, not Muon): each rank gives it the numbers of its
    share only, as vectors. ``step`` sums the gradients over ranks, so divide a loss by the number
    of targets of all ranks; a model of ``DataParallel``, which would sum them twice, is refused.
    Weights begin as those of rank 0.
    ``state_dict`` is that of this rank's share. The parameters become views of one vector, so move
    or convert the model before.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        build: Callable[..., torch.optim.Optimizer],
        *,
        group: dist.ProcessGroup | None = None,
        **options: Any,
    ):
        self.group = group
        self.rank, self.size = place_in_group(group)
        groups = _as_groups(parameters)
        self.parameters = [p for given in groups for p in given["params"]]
        _check_not_shares("parameters", self.parameters, group)
        _check_not_exchanged("parameters", self.parameters)
        n = sum(p.numel() for p in self.parameters)
        self.share = -(-n // self.size)
        if self.share * (self.size - 1) >= n:
            raise ValueError(f"parameters: expected numbers for all {self.size} ranks, got {n}")
        shapes = [f"{tuple(p.shape)} of {p.dtype}" for p in self.parameters]
        _check_same({"parameters": shapes}, group)
        self.flat = torch.zeros(self.share * self.size, dtype=self.parameters[0].dtype)
        self.pieces: dict[nn.Parameter, nn.Parameter] = {}
        start = 0
        for p in self.parameters:
            end, own = start + p.numel(), self.rank * self.share
            self.flat[start:end] = p.detach().flatten()
            p.data = self.flat[start:end].view_as(p)
            first, last = max(start, own), min(end, own + self.share)
            if first < last:
                self.pieces[p] = nn.Parameter(self.flat[first:last])
            _mark_exchanged(p, "ShardedOptimizer")
            start = end
        dist.broadcast(self.flat, group=group, group_src=0)
        mine = [[self.pieces[p] for p in g["params"] if p in self.pieces] for g in groups]
        pairs = zip(groups, mine, strict=True)
        self.optimizer = build([{**g, "params": some} for g, some in pairs], **options)
        self._reduced = False


# %% tags=["engine"]
#| export
class ShardedOptimizer(ShardedOptimizer):  # continued
    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the gradients over ranks; each keeps its share, and the others are freed.

        ``step`` does it if it was not done; to clip or to look at gradients, do it before.
        """
        self._check_in_place()
        if self._reduced:
            return
        marks = torch.tensor([p.grad is not None for p in self.parameters], dtype=self.flat.dtype)
        dist.all_reduce(marks, group=self.group)
        grads = torch.zeros_like(self.flat)
        for p, place in zip(self.parameters, self._views(grads), strict=True):
            if p.grad is not None:
                place.copy_(p.grad.flatten())
                p.grad = None
        mine = reduce_scatter_ring(grads.view(self.size, -1), self.group)
        start = 0
        for p, mark in zip(self.parameters, marks.tolist(), strict=True):
            if p in self.pieces:
                piece = self.pieces[p]
                piece.grad = mine[start : start + piece.numel()] if mark else None
                start += piece.numel()
        self._reduced = True

    def clip_gradients(self, max_norm: float) -> Float[Tensor, ""]:
        """Clip by the norm over all ranks, as ``clip_sharded_gradients``; return the norm."""
        self.reduce_gradients()
        return clip_sharded_gradients(self.pieces.values(), max_norm, self.group)

    @torch.no_grad()
    def step(self) -> None:
        """Update the own share, and gather those of the others."""
        self.reduce_gradients()
        self.optimizer.step()
        mine = self.flat.view(self.size, -1)[self.rank]
        self.flat.copy_(all_gather_ring(mine, self.group).flatten())
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in (*self.parameters, *self.pieces.values()):
            p.grad = None
        self._reduced = False

    def _views(self, flat: Tensor) -> tuple[Tensor, ...]:
        sizes = [p.numel() for p in self.parameters]
        return flat[: sum(sizes)].split(sizes)

    def _check_in_place(self) -> None:
        """Refuse to update a vector from which the model does not read any more."""
        for p, place in zip(self.parameters, self._views(self.flat), strict=True):
            if (p.dtype, p.data_ptr()) != (place.dtype, place.data_ptr()):
                expected = "those that the optimizer was built on, in their place"
                advice = "call to, double or half before it is built"
                raise ValueError(
                    f"parameters: expected {expected}, got {p.dtype} elsewhere: {advice}"
                )


# %% tags=["engine"]
#| export
class ShardedOptimizer(ShardedOptimizer):  # continued
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer, with the rates that a schedule sets."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's share, for as many ranks as there are now."""
        return {"ranks": self.size, "rank": self.rank, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the state of the same share; a ``ValueError`` for one of another."""
        for name, here in (("ranks", self.size), ("rank", self.rank)):
            if not isinstance(state_dict, Mapping) or state_dict.get(name) != here:
                got = state_dict.get(name) if isinstance(state_dict, Mapping) else state_dict
                raise ValueError(f"state_dict: expected {name} {here}, got {got!r:.60}")
        self.optimizer.load_state_dict(state_dict["optimizer"])


# %% tags=["engine"]
#| export
def _as_groups(parameters: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups of the parameters to train, each parameter once; refuse what has no gradient."""
    given = list(parameters)
    groups = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    flat = [p for group in groups for p in group["params"]]
    if not all(isinstance(p, Tensor) and p.is_floating_point() for p in flat) or not flat:
        raise ValueError(f"parameters: expected parameters or groups of them, got {given!r:.60}")
    if len({(p.dtype, p.device) for p in flat}) > 1:
        kinds = ", ".join(sorted({f"{p.dtype} on {p.device}" for p in flat}))
        raise ValueError(f"parameters: expected one dtype and device, got {kinds}")
    if len(set(flat)) < len(flat):
        raise ValueError("parameters: expected each parameter once, got some twice")
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return groups


# %% tags=["engine"]
#| export
@torch.no_grad()
def clip_sharded_gradients(
    parameters: Iterable[Tensor], max_norm: float, group: dist.ProcessGroup | None = None
) -> Float[Tensor, ""]:
    """Like ``clip_gradients``, where each rank has a share of the gradients; return their norm."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, got {max_norm!r}")
    place_in_group(group)
    grads = [p.grad for p in parameters if p.grad is not None]
    square = torch.zeros((), dtype=torch.float64)  # the same on all ranks, whatever they have
    for grad in grads:
        wide = grad if grad.dtype == torch.float64 else grad.float()
        square += wide.square().sum().cpu()
    dist.all_reduce(square, group=group)
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).masked_fill(~norm.isfinite(), 1.0)
    for grad in grads:
        grad.mul_(scale.to(grad.dtype))
    return norm


# %% [markdown] tags=["engine"]
# The model, in contrast, is cut by rows, as FSDP2 does it, and each part stays under its name with
# its number of dimensions. So what is built on the model afterwards, such as decay by shape, works
# as before. If n does not divide the number of rows, zeros fill it up for the journey. The rows
# that the optimizer sees stay in float32, and gradients are summed in float32, so rounding does not
# pile up over ranks.


# %% tags=["engine"]
#| export
@dataclass(eq=False)
class _Sharded:
    """A parameter of which each rank has some rows: where it stands, its shape, the own rows."""

    places: list[tuple[nn.Module, str]]
    shape: torch.Size
    piece: nn.Parameter
    rows: int

    @property
    def numbers(self) -> int:
        """How many numbers each rank has, with rows of zeros to fill up."""
        return self.rows * self.shape[1:].numel()


# %% tags=["engine"]
#| export
class _Unit:
    """A part of a model whose parameters are gathered, used and freed together."""

    def __init__(self, items: list[_Sharded], group: Any, compute: Any, reduce: torch.dtype):
        self.items, self.group, self.compute, self.reduce = items, group, compute, reduce
        self.rank, self.size = place_in_group(group)
        self.full: tuple[Tensor, ...] | None = None
        self.again: tuple[Tensor, ...] | None = None

    def gather(self, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """Return the whole parameters, in ``dtype``."""
        parts = []
        for item in self.items:
            rows = item.piece.detach().to(dtype or item.piece.dtype)
            fill = (0, item.numbers - rows.numel())
            parts.append(nn.functional.pad(rows.flatten(), fill))
        gathered = all_gather_ring(torch.cat(parts), self.group)
        columns = gathered.split([item.numbers for item in self.items], dim=1)
        return tuple(
            column.reshape(-1)[: item.shape.numel()].view(item.shape).clone()
            for item, column in zip(self.items, columns, strict=True)
        )

    def scatter(self, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Sum whole gradients over ranks, and return the rows of this rank."""
        pairs = list(zip(self.items, grads, strict=True))
        fills = [(0, item.numbers * self.size - item.shape.numel()) for item in self.items]
        flat = [
            nn.functional.pad(grad.to(self.reduce).flatten(), fill).view(self.size, -1)
            for (_, grad), fill in zip(pairs, fills, strict=True)
        ]
        mine = reduce_scatter_ring(torch.cat(flat, dim=1), self.group)
        rows = mine.split([item.numbers for item in self.items])
        return tuple(
            part[: item.piece.numel()].view_as(item.piece).to(item.piece.dtype)
            if item.piece.requires_grad
            else None
            for item, part in zip(self.items, rows, strict=True)
        )


# %% tags=["engine"]
#| export
class _Gather(torch.autograd.Function):
    """From the own rows to the whole parameters; backward, from whole gradients to own rows."""

    @staticmethod
    def forward(ctx: Any, unit: _Unit, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        return unit.gather(unit.compute)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.unit.again = None  # all that needed the weights has been computed: free them
        return None, *ctx.unit.scatter(grads)


# %% tags=["engine"]
#| export
class _Unit(_Unit):  # continued
    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps of a weight for the backward pass: its number and its view only."""
        where = tensor.untyped_storage().data_ptr()
        for number, whole in enumerate(self.full or ()):
            if whole.untyped_storage().data_ptr() == where and tensor.dtype == whole.dtype:
                return number, tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor

    def unpack(self, kept: Any) -> Tensor:
        """The weight when the backward pass asks for it: gathered once more."""
        if isinstance(kept, Tensor):
            return kept
        if self.again is None:
            with torch.no_grad():
                self.again = self.gather(self.compute)
        number, *view = kept
        return self.again[number].as_strided(*view)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Put the whole parameters where the modules look for them, and take them away again."""
        self.full = _Gather.apply(self, *(item.piece for item in self.items))
        try:
            for item, whole in zip(self.items, self.full, strict=True):
                for module, name in item.places:
                    module.__dict__[name] = whole  # found before the parameter of that name
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            for item in self.items:
                for module, name in item.places:
                    module.__dict__.pop(name, None)
            self.full = None


# %% tags=["engine"]
#| export
def shard_model(
    model: nn.Module,
    units: Sequence[nn.Module] | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """Divide the parameters of ``model`` over ranks, in place: fully sharded data parallelism.

    Each rank keeps some rows of each parameter (none perhaps, where there are fewer rows than
    ranks), under its name, so any optimizer that treats each number by itself can be built on it
    afterwards. ``units``, by default ``model.blocks``, and the model itself for all the rest,
    gather their parameters when ``forward`` begins and free them when it ends, and once more in the
    backward pass, which sums the gradients over ranks in ``reduce_dtype``. Divide a loss by the
    targets of all ranks; clip by ``clip_sharded_gradients``. With ``compute_dtype``, parameters
    travel and compute in it, and the rows that the optimizer sees keep theirs. A tied parameter
    stays tied; weights begin as those of rank 0; one that is not used has a gradient of zeros.
    Parameters are replaced, so those with hooks, as of ``DataParallel``, are refused.
    Source: Rajbhandari et al. (2020), stage 3; Zhao et al. (2023).
    """
    rank, size = place_in_group(group)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a module, got {model!r:.60}")
    for name, dtype in (("compute_dtype", compute_dtype), ("reduce_dtype", reduce_dtype)):
        if dtype is None and name == "compute_dtype":
            continue
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating dtype, got {dtype!r}")
    parts = list(getattr(model, "blocks", ()) if units is None else units)
    _check_not_shares("model", model.parameters(), group, anywhere=("shard_model",))
    _check_not_exchanged("model", model.parameters(), replaces=True)
    check_agreed_parameters(model, group)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    made = []
    for part, places in _places_by_unit(model, parts):
        items = [_divided(at, rank, size, group) for at in places.values()]
        if items:
            made.append(_Unit(items, group, compute_dtype, reduce_dtype))
            part.forward = _present(made[-1], part.forward)
    if not made:
        raise ValueError(f"model: expected parameters, got none in {model!r:.60}")
    model.__dict__["sharding"] = made
    return model


# %% tags=["engine"]
#| export
_Places = dict[nn.Parameter, list[tuple[nn.Module, str]]]


def _places_by_unit(model: nn.Module, parts: list[nn.Module]) -> list[tuple[nn.Module, _Places]]:
    """For each unit, and last the model: its parameters, and where each stands."""
    inside = set(model.modules())
    owner: dict[nn.Module, nn.Module] = {}
    for part in parts:
        if not isinstance(part, nn.Module) or part not in inside or part is model:
            raise ValueError(f"units: expected modules inside of the model, got {part!r:.60}")
        for module in part.modules():
            if owner.setdefault(module, part) is not part:
                raise ValueError("units: expected modules that share none, got one in two")
    places: _Places = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((module, name))
    by_unit: dict[nn.Module, _Places] = {part: {} for part in (*parts, model)}
    for p, at in places.items():
        owners = {owner.get(module, model) for module, _ in at}
        # One that several units use has to be there for all of them.
        by_unit[owners.pop() if len(owners) == 1 else model][p] = at
    return list(by_unit.items())


# %% tags=["engine"]
#| export
def _divided(at: list[tuple[nn.Module, str]], rank: int, size: int, group: Any) -> _Sharded:
    """Replace a parameter, in all its places, by the rows of this rank."""
    whole = at[0][0]._parameters[at[0][1]]
    assert whole is not None
    if not whole.ndim:
        raise ValueError(f"model: expected parameters with rows, got the number {at[0][1]}")
    rows = -(-len(whole) // size)
    mine = whole.detach()[rank * rows : (rank + 1) * rows].clone()
    piece = nn.Parameter(mine, requires_grad=whole.requires_grad)
    _mark_share(piece, "shard_model", group, whole)
    for module, name in at:
        module._parameters[name] = piece
    return _Sharded(at, whole.shape, piece, rows)


def _present(unit: _Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
    def with_parameters(*arguments: Any, **options: Any) -> Any:
        with unit.present():
            return forward(*arguments, **options)

    return with_parameters


# %% tags=["engine"]
#| export
def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole tensors of a model that ``shard_model`` divided, on each rank."""
    units = model.__dict__.get("sharding")
    if units is None:
        raise ValueError("model: expected one that shard_model divided, got another")
    whole: dict[nn.Parameter, Tensor] = {}
    for unit in units:
        gathered = unit.gather(None)
        whole |= {item.piece: tensor for item, tensor in zip(unit.items, gathered, strict=True)}
    found = model.state_dict(keep_vars=True)
    return {name: whole.get(t, t).detach() for name, t in found.items()}


# %% [markdown]
# ## One table
#
# Now we compare everything with one process. A small model trains for four steps by each scheme, on
# two and on four ranks, in the setting of the opening. Each rank has two micro-batches, there is
# weight decay, and gradients are clipped. The function `scheme_bytes` has the formulas to the byte.
# For $P$ weights they come to $2 (n - 1)/n \cdot 4P$ bytes for the first three schemes. With $m$
# micro-batches, full sharding sends $m (n - 1)/n \cdot 12 P$ bytes, or $8P$ in place of $12P$ with
# 16-bit weights. Marks, buffers, and the norm add a few more bytes. (Stage 2, which this chapter
# does not build, comes back in the predictions further on.)

# %% [markdown] tags=["engine"]
# ### Engine room: one run by any scheme

# %% [markdown] tags=["engine"]
# The table needs the same training by each scheme: a few steps of AdamW with decay and clipping,
# with each batch divided over ranks and then into micro-batches. Each rank begins with weights of
# its own, so that a run in which rank 0's weights are not handed out cannot end up equal. In the
# reference, one process takes all micro-batches of all ranks in turn. Bytes sent are counted from
# the first forward pass of a step to its end. Bytes kept are counted at the end of the backward
# pass, before any exchange that waits for it. The weights can differ by more than rounding: Adam
# divides each gradient by its own size, so where a gradient is nearly zero, rounding decides the
# direction of a whole step.

# %% tags=["engine"]
#| export
SCHEMES = ("all_reduce", "data_parallel", "zero1", "full", "full_bf16")
Scheme = Literal[
    "one_process", "one_process_bf16", "all_reduce", "data_parallel", "zero1", "full", "full_bf16"
]


class SchemeRun(NamedTuple):
    """What a run gave: of each step the loss over all ranks and the norm before clipping.

    ``weights`` are whole. ``sent`` is how many bytes this rank sent in the last step, and ``kept``
    how many it held in weights, gradients and averages when its last backward pass had ended.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    sent: int
    kept: int


# %% tags=["engine"]
#| export
class _SchemeModel:
    """A model and an optimizer under one scheme, behind the same few calls for all of them."""

    def __init__(self, scheme: str, config: ModelConfig, rate: float, reduction: Any, seed: int):
        rank, self.size = place_in_group()
        seed_everything(seed if scheme == "all_reduce" else seed + rank)
        self.scheme, self.model = scheme, TransformerLM(config)
        self.forward: Callable[..., Any] = self.model
        if scheme == "data_parallel":
            self.forward = DataParallel(self.model, 2**18, reduction)
        elif scheme == "one_process_bf16":
            self.forward = self._rounded
        elif scheme.startswith("full"):
            dtype = torch.bfloat16 if scheme == "full_bf16" else None
            shard_model(self.model, compute_dtype=dtype)
        groups = parameter_groups(self.model, 0.1)
        build: Any = ShardedOptimizer if scheme == "zero1" else _without_ranks
        self.optimizer = build(groups, AdamW, lr=rate)

    def _rounded(self, ids: Tensor) -> Tensor:
        weights = {name: p.bfloat16() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, weights, (ids,))

    def accumulating(self, more: bool) -> Any:
        """What a backward pass runs in, if ``more`` of them follow before the step."""
        wrapped = more and isinstance(self.forward, DataParallel)
        return self.forward.no_sync() if wrapped else nullcontext()  # type: ignore[attr-defined]

    def clip(self, max_norm: float) -> Tensor:
        """Exchange what was not, clip, and return the norm before."""
        if self.scheme == "all_reduce":
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            all_reduce_ring(flat)
            for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        if self.scheme == "zero1":
            return self.optimizer.clip_gradients(max_norm)
        if self.scheme.startswith("full"):
            return clip_sharded_gradients(self.model.parameters(), max_norm)
        return clip_gradients(self.model.parameters(), max_norm)


# %% tags=["engine"]
#| export
def _without_ranks(groups: Any, build: Any, **options: Any) -> Any:
    return build(groups, **options)


# %% tags=["engine"]
#| export
class _SchemeModel(_SchemeModel):  # continued
    def kept(self) -> int:
        """Bytes of weights, gradients and averages that this rank holds now."""
        weights = list(self.model.parameters())
        held = [p.nbytes for p in weights] + [p.grad.nbytes for p in weights if p.grad is not None]
        optimizer = self.optimizer.optimizer if self.scheme == "zero1" else self.optimizer
        averages = (t for state in optimizer.state.values() for t in state.values() if t.ndim)
        return sum(held) + sum(t.nbytes for t in averages)

    def weights(self) -> dict[str, Tensor]:
        """Whole copies of the weights."""
        sharded = self.scheme.startswith("full")
        found = full_state_dict(self.model) if sharded else self.model.state_dict()
        return {name: tensor.detach().clone() for name, tensor in found.items()}


# %% tags=["engine"]
#| export
def run_scheme(
    scheme: Scheme,
    config: ModelConfig,
    batches: Sequence[tuple[Int64[Tensor, "rows length"], Int64[Tensor, "rows length"]]],
    *,
    micro_batches: int = 2,
    shares: int | None = None,
    learning_rate: float = 1e-3,
    max_norm: float = 1.0,
    reduction: Literal["sum", "mean"] = "sum",
    seed: int = 0,
) -> SchemeRun:
    """Train a new model on ``batches`` of all ranks, inputs and targets; call it in each rank.

    Rank r of n takes every n-th row, in ``micro_batches`` parts; the loss is the mean over all
    targets. "one_process" is for one rank, which takes the parts of ``shares`` ranks one after
    the other; with "_bf16", products are of weights rounded to 16 bits. ``reduction`` is that of
    ``DataParallel``: "mean" is wrong here, to see what finds it.
    """
    check_choice("scheme", scheme, ("one_process", "one_process_bf16", *SCHEMES))
    check_choice("reduction", reduction, ("sum", "mean"))
    check_whole("micro_batches", micro_batches, 1)
    check_at_least(shares=(1, shares), seed=(0, seed))
    if not 0 <= learning_rate < math.inf:
        expected = "a finite number of at least 0"
        raise ValueError(f"learning_rate: expected {expected}, got {learning_rate!r}")
    _, size = place_in_group()
    if scheme.startswith("one_process") and size > 1:
        raise ValueError(f"scheme: expected one for {size} ranks, got {scheme!r}")
    check_agreed(batches=len(batches), rows=sum(len(x) for x, _ in batches))
    run = _SchemeModel(scheme, config, learning_rate, reduction, seed)
    losses, norms, sent, kept = [], [], 0, 0
    for inputs, targets in batches:
        both = [_parts(rows_of_rank(t), shares or 1, micro_batches) for t in (inputs, targets)]
        parts = list(zip(*both, strict=True))
        count = sum_over_ranks(sum(int((t != -100).sum()) for _, t in parts))
        if not count:
            raise ValueError("batches: expected targets in each, got one in which all are -100")
        loss = torch.zeros(())
        with ByteCounter() as traffic:
            for number, (x, t) in enumerate(parts, 1):
                with run.accumulating(number < len(parts)):
                    part = cross_entropy(run.forward(x), t, reduction="sum") / count
                    part.backward()
                loss += part.detach()
            kept = run.kept()
            norms.append(run.clip(max_norm).item())
            run.optimizer.step()
            run.optimizer.zero_grad()
        sent = traffic.sent
        dist.all_reduce(loss)
        losses.append(loss.item())
    return SchemeRun(losses, norms, run.weights(), sent, kept)


# %% tags=["engine"]
#| export
def _parts(rows: Tensor, shares: int, micro_batches: int) -> list[Tensor]:
    """The micro-batches of each share in turn."""
    if len(rows) % (shares * micro_batches):
        expected = f"a multiple of {shares * micro_batches} rows for each rank"
        raise ValueError(f"micro_batches: expected {expected}, got {len(rows)} rows")
    return [part for share in range(shares) for part in rows[share::shares].chunk(micro_batches)]


# %% tags=["engine"]
#| export
def scheme_bytes(scheme: Scheme, model: nn.Module, world_size: int, micro_batches: int = 1) -> int:
    """Return what a rank sends in a step of ``run_scheme``, in bytes, by the formulas.

    Weights are of 4 bytes; ``model`` is whole. Beside them travel, where a scheme needs it, a mark
    for each tensor, the norm, and buffers.
    """
    check_choice("scheme", scheme, SCHEMES)
    check_whole("world_size", world_size, 1)
    check_whole("micro_batches", micro_batches, 1)
    n, shapes = world_size, [p.shape for p in model.parameters()]
    total, tensors = sum(shape.numel() for shape in shapes), len(shapes)
    share = -(-total // n)
    padded = sum(-(-shape[0] // n) * n * shape[1:].numel() for shape in shapes)
    if scheme == "all_reduce":
        return 2 * (n - 1) * 4 * share
    if scheme == "data_parallel":
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        return round(2 * (n - 1) / n * 4 * (total + tensors) + (n - 1) / n * buffers)
    if scheme == "zero1":
        return 2 * (n - 1) * 4 * share + round(2 * (n - 1) / n * (4 * tensors + 8))
    gathered = 2 if scheme == "full_bf16" else 4
    each = (n - 1) * padded // n * (2 * gathered + 4)
    return micro_batches * each + round(2 * (n - 1) / n * 8)


# %% tags=["engine"]
#| export
def worst_difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[str, float]:
    """Return the tensor that differs most, and by how much of its largest number.

    The same names and shapes are expected, and anything but a finite number is a difference of
    infinity.
    """
    if not found or found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise ValueError(f"found: expected the names of expected, got other ones: {odd}")
    differences = {}
    for name, right in expected.items():
        if found[name].shape != right.shape:
            got = f"{tuple(found[name].shape)} for {name}"
            raise ValueError(f"found: expected shape {tuple(right.shape)}, got {got}")
        scale = right.abs().max().double().clamp(min=torch.finfo(torch.float32).tiny)
        by = ((found[name].double() - right.double()).abs().max() / scale).item()
        differences[name] = by if math.isfinite(by) else math.inf
    name = max(differences, key=lambda name: differences[name])
    return name, differences[name]


# %% tags=["engine"]
# The runs of the table, each held against one process
batches = []
for step in range(4):
    pairs = zip(rows_at(step, 0), rows_at(step, 1), strict=True)
    batches.append(tuple(torch.stack(pair, dim=1).flatten(0, 1) for pair in pairs))
control = launch(run_scheme, 1, "one_process", config, batches)[0]
table = {}
for n in (2, 4):
    rounded = launch(partial(run_scheme, shares=n), 1, "one_process_bf16", config, batches)[0]
    for scheme in SCHEMES:
        found = launch(run_scheme, n, scheme, config, batches)
        expected, bound = (rounded, 1e-2) if scheme == "full_bf16" else (control, 1e-4)
        apart = worst_difference(found[0].weights, expected.weights)[1]
        assert apart < 10 * bound
        assert np.allclose(found[-1].norms, expected.norms, rtol=bound)
        assert math.isclose(found[-1].norms[0], expected.norms[0], rel_tol=1e-5)
        first = found[0].weights
        assert all(torch.equal(first[name], w) for run in found for name, w in run.weights.items())
        table[scheme, n] = [run.sent for run in found], found[0].kept, f"< {10 * bound:g}"

# %% [markdown]
# ### The ten runs
#
# Bytes are those that each rank sends in one step. Every row of `table` is a run of the room above,
# compared with one process (`control`, on the same `batches`). Weights may differ by a share of the
# largest in their tensor:

# %%
whole, n_weights = TransformerLM(config), count_parameters(config)
print("scheme         ranks  bytes sent    formula  kept per weight  weights differ by")
for (scheme, n), (sent, kept, apart) in table.items():
    formula = scheme_bytes(scheme, whole, n, micro_batches=2)
    assert set(sent) == {formula}
    print(f"{scheme:14}{n:6}{sent[0]:12,}{formula:11,}{kept / n_weights:11.1f} bytes{apart:>19}")

# %% [markdown]
# In all ten runs, what a rank sent is the formula to the byte, and all ranks ended with the same
# bits. The first gradient norm equals that of one process to five digits. (Full sharding in 16 bits
# is compared with one process that rounds its weights as well, within wider bounds.) What is kept
# falls as predicted: of 16 bytes for each weight, stage 1 divides 8 by $n$, and full sharding
# divides them all (the unit that is gathered at the moment comes on top).

# %% [markdown]
# ## Cutting a layer: tensor parallelism
#
# So far, ranks divided the batch and the storage, but each of them multiplied whole matrices. If a
# layer is too large for that, we have to divide the product itself.
#
# Take a feed-forward network $Y = \phi(XA)\,C$ with an activation $\phi$. Cut $A$ by columns,
# $A = [A_0 \dots A_{n-1}]$, and give $A_r$ to rank $r$. A column of $XA$ needs only one column of
# $A$, and $\phi$ acts on each number by itself, so
# $\phi(XA) = [\phi(XA_0) \dots \phi(XA_{n-1})]$: each rank computes its part alone. Now cut $C$ by
# *rows*, at the same places. A product of matrices is a sum over the columns of the left one and
# the rows of the right one, and we can take that sum in groups:
#
# $$
# Y = \phi(XA)\,C = \sum_{r=0}^{n-1} \phi(XA_r)\, C_r .
# $$ (distributed-columns-rows)
#
# Each rank has one term, and one all-reduce adds them up. If $A$ were cut by rows, $XA$ itself
# would be a sum over ranks, and since $\phi$ of a sum is not the sum of the $\phi$, the ranks would
# have to meet before the activation as well. So columns come first, then rows
# {cite}`shoeybi2019megatron`.
#
# ```{figure} ../figures/distributed-columns-rows.svg
# :name: fig-distributed-columns-rows
# :alt: X is copied to two ranks. Each multiplies it by half of the columns of A, applies the activation, and multiplies by half of the rows of C. An all-reduce adds the two products.
#
# Two ranks compute one feed-forward network. Nothing is sent between the two products.
# ```
#
# Attention has the same form. A head uses its own columns of $W_Q$, $W_K$ and $W_V$, its output
# meets its own rows of $W_O$, and in between, heads ignore each other. Queries that share a key
# head must stay with it, so the number of ranks has to divide `n_kv_heads`.
#
# ### What goes backward
#
# Let $dY$ be the gradient of the loss with respect to $Y$. From $Y = \sum_r Y_r$ it follows that
# $dY_r = dY$: the gradient passes the sum unchanged. At the other end, rank $r$ used a copy of $X$
# and finds $dX_r$, which accounts only for its own part of the layer. $X$ acts on the loss through
# all copies, so $dX = \sum_r dX_r$, which is another all-reduce. Each of these two operators is the
# other one turned around:
#
# | operator | where | forward | backward |
# |---|---|---|---|
# | $f$, {py:func}`~llmbook.distributed.enter_parallel` | before the columns | identity | all-reduce |
# | $g$, {py:func}`~llmbook.distributed.leave_parallel` | after the rows | all-reduce | identity |
#
# Without $f$, everything below would get a partial gradient, a different one on each rank, and the
# loss might fall all the same. A block has two branches, each with one all-reduce forward and one
# backward. Each of the four covers $B\,T\,d$ numbers, where $B$ counts the rows of a batch, $T$
# their tokens, and $d$ is the width. A ring sends $2\frac{n-1}{n}$ times what it reduces. With $b$
# bytes in each number (no longer in the whole tensor), each rank sends for each block
#
# $$
# 4 \cdot 2\,\tfrac{n-1}{n} \cdot b\,B\,T\,d \quad \text{bytes.}
# $$ (distributed-tensor-bytes)

# %% tags=["engine"]
# What the cells below use besides
import itertools

from llmbook.attention import scaled_dot_product_attention
from llmbook.blocks import places_by_expert, route

# %% [markdown]
# With the two operators, what a rank computes fits in one line:


# %%
def column_then_row(x, own_columns, own_rows):
    return leave_parallel(F.silu(enter_parallel(x) @ own_columns) @ own_rows)


# %% [markdown] tags=["engine"]
# ### Engine room: the two operators and the two layers, and how a model is cut

# %% tags=["engine"]
#| export
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.parallel import RowwiseParallel

from llmbook.attention import causal_mask, flash_attention, MultiHeadAttention
from llmbook.attention import MultiHeadLatentAttention
from llmbook.blocks import FeedForward, MixtureOfExperts
from llmbook.positions import check_tensor

# %% [markdown] tags=["engine"]
# A module that knows its place among the ranks can also be used outside of a launch; there it is
# the only rank. If the number of ranks does not divide something, all ranks refuse it alike before
# anything is sent, because all of them compute the same remainder.


# %% tags=["engine"]
#| export
def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in ``group`` and the number of ranks; alone it is rank 0 of 1."""
    if group is None and not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _own_share(argument: str, size: int, group: dist.ProcessGroup | None) -> slice:
    """Return which of ``size`` things belong to this rank."""
    rank, n = _place(group)
    if size % n:
        raise ValueError(f"{argument}: expected a number that {n} ranks divide, got {size}")
    return slice(rank * size // n, (rank + 1) * size // n)


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of ``x`` over all ranks."""
    if _place(group)[1] == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


# %% [markdown] tags=["engine"]
# The operators are functions that autograd does not look into:


# %% tags=["engine"]
#| export
class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:
        return _summed(d_x, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:
        return d_x, None


# %% tags=["engine"]
#| export
def enter_parallel(
    x: Float[Tensor, "*shape"], group: dist.ProcessGroup | None = None
) -> Float[Tensor, "*shape"]:
    """Return ``x``, the same on all ranks; its gradient is summed over them.

    Source: Shoeybi et al. (2019), section 3, the operator f.
    """
    check_tensor("x", x, "...")
    _place(group)  # what is no group is named here, and not in the backward pass
    return _Enter.apply(x, group)


def leave_parallel(
    x: Float[Tensor, "*shape"], group: dist.ProcessGroup | None = None
) -> Float[Tensor, "*shape"]:
    """Return the sum of ``x`` over all ranks; its gradient passes unchanged.

    Source: Shoeybi et al. (2019), section 3, the operator g.
    """
    check_tensor("x", x, "...")
    return _Leave.apply(x, group)


# %% [markdown] tags=["engine"]
# The layers take a rank's share out of a whole `nn.Linear`. The bias of the second one belongs to
# the sum, not to its terms; otherwise it would be added once for each rank.


# %% tags=["engine"]
#| export
class ColumnParallelLinear(nn.Module):
    """This rank's share of the outputs of ``linear``, whose input is the same on all ranks.

    Nothing is sent: put ``enter_parallel`` before it, once for all layers that read the same input.
    """

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup | None = None):
        super().__init__()
        rows = _own_share("linear.out_features", linear.out_features, group)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = _part_of(linear.weight, rows)
        _mark_share(self.weight, "tensor_parallel", group, linear.weight)
        self.bias = None
        if linear.bias is not None:
            self.bias = _part_of(linear.bias, rows)
            _mark_share(self.bias, "tensor_parallel", group, linear.bias)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Return as many numbers for each vector as this rank has rows of the weight."""
        check_tensor("x", x, "...", self.in_features)
        return F.linear(x, self.weight, self.bias)


# %% tags=["engine"]
#| export
def _part_of(parameter: Tensor, where: Any = ...) -> nn.Parameter:
    """Return a copy of a part of a parameter, which is frozen if the whole is."""
    return nn.Parameter(parameter.detach()[where].clone(), parameter.requires_grad)


# %% tags=["engine"]
#| export
class RowParallelLinear(nn.Module):
    """``linear`` applied to inputs of which each rank has its share; one all-reduce.

    All ranks get the whole output. The bias is added to the sum.
    """

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup | None = None):
        super().__init__()
        columns = _own_share("linear.in_features", linear.in_features, group)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group = group
        self.weight = _part_of(linear.weight, (slice(None), columns))
        self.bias = None if linear.bias is None else _part_of(linear.bias)
        _mark_share(self.weight, "tensor_parallel", group, linear.weight)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Return the whole output, the same on all ranks."""
        check_tensor("x", x, "...", self.weight.size(1))
        y = leave_parallel(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


# %% [markdown] tags=["engine"]
# One more gradient is only a part. Where queries and keys are normalized, all heads share the
# gains, but each rank has seen only its own heads. So the gains go through $f$, too, and their
# gradients are summed. A hook on the parameter would do the same until a wrapper puts another
# parameter in its place, as full sharding does: then it is gone, and nothing says so.

# %% tags=["engine"]
#| export
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _enter_gains(norm: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Let ``norm`` read its gains by ``enter_parallel``: each rank uses them for its own heads."""

    def enter(layer: nn.Module, inputs: Any) -> None:
        names = [name for name, gain in layer._parameters.items() if gain is not None]
        before = {name: layer.__dict__[name] for name in names if name in layer.__dict__}
        gains = {name: enter_parallel(getattr(layer, name), group) for name in names}
        layer.__dict__.update(gains, outside=before)  # found before the parameters of these names

    def leave(layer: nn.Module, inputs: Any, output: Any) -> None:
        for name in layer._parameters:
            layer.__dict__.pop(name, None)
        layer.__dict__.update(layer.__dict__.pop("outside", {}))

    norm.register_forward_pre_hook(enter)
    norm.register_forward_hook(leave, always_call=True)


# %% tags=["engine"]
#| export
def _branches(
    module: nn.Module, n_ranks: int
) -> list[tuple[str, MultiHeadAttention | FeedForward]]:
    """Return the layers that are cut, with their names; a ``ValueError`` if they cannot be."""
    found = list(module.named_modules())
    for name, layer in found:
        if isinstance(layer, MixtureOfExperts | MultiHeadLatentAttention):
            expected = "MultiHeadAttention and FeedForward only"
            raise ValueError(f"module: expected {expected}, got {type(layer).__name__} in {name!r}")
    branches = [(n, m) for n, m in found if isinstance(m, MultiHeadAttention | FeedForward)]
    for name, branch in branches:
        if isinstance(branch, MultiHeadAttention):
            key, size = "n_kv_heads", branch.n_kv_heads
        else:
            key, size = "d_ff", branch.up_proj.out_features
        if any(isinstance(layer, RowParallelLinear) for layer in branch.children()):
            raise ValueError(f"module: expected whole layers, got one in {name!r} that is cut")
        if size % n_ranks:
            raise ValueError(f"n_ranks: expected a divisor of {key} = {size}, got {n_ranks}")
    if not branches:
        expected = "attention or feed-forward networks inside"
        raise ValueError(f"module: expected {expected}, got {type(module).__name__}")
    return branches


# %% tags=["engine"]
#| export
def tensor_parallel(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Cut all attention and feed-forward networks in ``module`` over the ranks; return ``module``.

    It is changed in place; weights begin as those of rank 0. Input, output and all other parameters
    are the same on all ranks, and so are their gradients. Dropout draws on each rank; in training
    with it, seed all ranks alike. A ``ValueError`` on all ranks tells of key heads or a width that
    their number does not divide, or of a model that ``shard_model`` has divided: cut it before.
    Source: Shoeybi et al. (2019), section 3.
    """

    def enter(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (enter_parallel(inputs[0], group), *inputs[1:])

    n = _place(group)[1]
    branches = _branches(module, n)
    _check_not_shares("module", module.parameters(), group, anywhere=("shard_model",))
    _check_not_exchanged("module", module.parameters(), replaces=True)
    if n > 1:
        check_agreed_parameters(module, group)
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), group=group, group_src=0)
    for _, branch in branches:
        for name, layer in list(branch.named_children()):
            if isinstance(layer, nn.Linear):
                cut = ColumnParallelLinear if name in _COLUMNS else RowParallelLinear
                setattr(branch, name, cut(layer, group))
            else:  # gains for queries or keys of all heads
                _enter_gains(layer, group)
        if isinstance(branch, MultiHeadAttention):
            branch.n_heads, branch.n_kv_heads = branch.n_heads // n, branch.n_kv_heads // n
        branch.register_forward_pre_hook(enter)
    return module


# %% [markdown] tags=["engine"]
# The one line above, `column_then_row`, gives every rank what one process computes:


# %% tags=["engine"]
def one_line(x: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    rank = dist.get_rank()
    return column_then_row(x, columns.chunk(2, dim=1)[rank], rows.chunk(2, dim=0)[rank])


given = [torch.randn(size, dtype=torch.float64) for size in ((3, 4), (4, 6), (6, 5))]
whole = F.silu(given[0] @ given[1]) @ given[2]
assert all((found - whole).abs().max() < 1e-12 for found in launch(one_line, 2, *given))

# %% [markdown] tags=["engine"]
# For the comparison, the gradients of all ranks are put together. A rank has the whole gradient of
# a parameter, a share of it, or none. `cut_step` is what each rank runs:


# %% tags=["engine"]
def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compared(losses: list[float], ranks: list[dict[str, Tensor]]) -> str:
    """Demand what one process has found, to 12 digits after the point."""
    assert all(abs(found - loss) < 1e-12 for found in losses), "the loss differs"
    for name, gradient in whole.items():
        parts = [found[name] for found in ranks if name in found]
        if parts[0].shape != gradient.shape:
            sizes = zip(parts[0].shape, gradient.shape, strict=True)
            parts = [torch.cat(parts, [part == all_ for part, all_ in sizes].index(False))]
        for part in parts:
            assert (part - gradient).abs().max() < 1e-12, f"the gradient of {name} differs"
    return f"loss and {len(whole)} gradients within 1e-12 of one process"


def whole_tensor(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def next_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids[:, :-1]), ids[:, 1:].contiguous())


# %% tags=["engine"]
def cut_step(model: nn.Module, ids: Tensor):
    model = tensor_parallel(model)
    with ByteCounter() as sent:
        loss = next_loss(model, ids)
        loss.backward()
    return loss.item(), gradients(model), sent.sent


sizes = {"d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
narrow = ModelConfig(vocab_size=64, context_length=64, **sizes)
seed_everything(0)
n, b, B, T = 2, 8, 4, 32  # ranks, bytes of a number, rows, and their tokens
model, ids = TransformerLM(narrow).double(), torch.randint(64, (B, T + 1))
loss = next_loss(model, ids)
loss.backward()
loss, whole = loss.item(), gradients(model)
model.zero_grad()


# %% [markdown]
# ### Equal to one process
#
# {py:func}`~llmbook.distributed.tensor_parallel` cuts the linear layers of all attention and
# feed-forward networks of a model and puts $f$ and $g$ around them. In `cut_step`, two ranks do so
# with a model of four layers (its sizes are in `narrow`) and take a step in double precision on
# $B = 4$ rows of $T = 32$ tokens; `compared` holds them against one process:

# %%
losses, found, sent = zip(*launch(cut_step, 2, model, ids), strict=True)
print(compared(losses, found))
formula = narrow.n_layers * 4 * 2 * (n - 1) / n * b * B * T * narrow.d_model
print(f"each rank sent {sent[0]:,} bytes; the formula says {formula:,.0f}")
assert set(sent) == {formula}

# %% [markdown]
# Everything agrees, and so does the formula. The bytes grow with the tokens of a batch, and not
# with the parameters as those of data parallelism do. And all ranks *wait* for them, four times in
# every block. So tensor parallelism stays inside a server, whose devices have the fastest links
# {cite}`narayanan2021efficient`.

# %% [markdown] tags=["engine"]
# ### Engine room: the same by torch, with DTensor

# %% [markdown] tags=["engine"]
# PyTorch's DTensor is a tensor that knows how it is cut. `parallelize_module` takes a plan that
# says which linear layers are cut by columns and which by rows, inserts the all-reduces, and finds
# the same gradients. But torch cuts a matrix wherever the number of ranks puts the edge. If that is
# inside a head, the model fails later, or half a head is taken for a whole one. So we refuse a plan
# whose cuts would be wrong.


# %% tags=["engine"]
#| export
def tensor_parallel_plan(module: nn.Module, n_ranks: int) -> dict[str, Any]:
    """Return the plan by which torch's ``parallelize_module`` cuts ``module`` over ``n_ranks``.

    A ``ValueError`` tells of key heads or a width that ``n_ranks`` does not divide.

    >>> plan = tensor_parallel_plan(FeedForward(8, 16), 2)
    >>> {name: type(style).__name__ for name, style in plan.items()}
    {'gate_proj': 'ColwiseParallel', 'up_proj': 'ColwiseParallel', 'down_proj': 'RowwiseParallel'}
    """
    check_whole("n_ranks", n_ranks, 1)
    plan: dict[str, Any] = {}
    for place, branch in _branches(module, n_ranks):
        for name, layer in branch.named_children():
            if isinstance(layer, nn.Linear):
                style = ColwiseParallel() if name in _COLUMNS else RowwiseParallel()
                plan[f"{place}.{name}".lstrip(".")] = style
    return plan


# %% [markdown] tags=["engine"]
# With the plan, our model can be cut as it is:


# %% tags=["engine"]
def dtensor_step(model, ids):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, tensor_parallel_plan(model, mesh.size()))
    loss = next_loss(model, ids)
    loss.backward()
    whole = {name: whole_tensor(gradient) for name, gradient in gradients(model).items()}
    return loss.item(), whole


print(compared(*zip(*launch(dtensor_step, 2, model, ids), strict=True)))

# %% [markdown]
# ## Cutting the sequence: ring attention
#
# A text of a million tokens fits on no device, even as the only row of a batch. So the row is cut:
# each of $n$ ranks gets a chunk of $T/n$ tokens. Norms, feed-forward networks, and the loss treat
# each token by itself and do not notice. Only attention looks across the cut.
#
# {doc}`09_attention` had the same difficulty inside one device.
# {py:func}`~llmbook.attention.flash_attention` reads keys in tiles, and keeps the largest score $m$
# and the sum $s$ of $e^{\text{score} - m}$ (letters of that chapter, for this section only). Now a
# tile comes from another rank. Let tile $j$ have
# the {term}`log-sum-exp` $\ell_j = m_j + \ln s_j$ and the output $o_j$, its own weighted mean of
# values. Then $e^{\ell_j}$ is its sum of $e^{\text{score}}$, and $e^{\ell_j} o_j$ its sum of
# $e^{\text{score}} v$. Both simply add up over the tiles:
#
# $$
# o = \frac{\sum_j e^{\ell_j} o_j}{\sum_j e^{\ell_j}} = \sum_j w_j\, o_j , \qquad
# w_j = e^{\ell_j - \ell} , \quad \ell = \ln \sum_j e^{\ell_j} .
# $$ (distributed-merge)
#
# Merging is attention over tiles: $\ell_j$ is the score of a tile, and $o_j$ is its value.


# %% tags=["engine"]
#| export
# What flash_attention returns with return_lse
class AttentionPart(NamedTuple):
    """Attention to some of the keys: the output, and the log-sum-exp of each query's scores."""

    out: Float[Tensor, "*batch queries d_value"]
    log_sum: Float[Tensor, "*batch queries"]


# %% [markdown]
# In code, for two tiles at a time (an `AttentionPart` has the output `out` and the log-sum-exps
# `log_sum`):


# %%
#| export
def merge_attention(a: AttentionPart, b: AttentionPart) -> AttentionPart:
    """Return attention to the keys of both parts; a log-sum-exp of -inf is of no keys."""
    log_sum = torch.logaddexp(a.log_sum, b.log_sum)
    finite = log_sum.masked_fill(log_sum == -torch.inf, 0.0)
    in_a, in_b = ((part.log_sum - finite).exp().unsqueeze(-1) for part in (a, b))
    return AttentionPart((in_a * a.out + in_b * b.out).to(a.out.dtype), log_sum)


# %% [markdown]
# The ranks form a ring. Each attends to its own keys, then sends keys and values to the next rank
# and receives those of the one before. After $n - 1$ such steps, every rank has seen everything
# {cite}`liu2023ring`. For the way back, we differentiate {eq}`distributed-merge` like any softmax:
#
# $$
# do_j = w_j\, do , \quad dw_j = do \cdot o_j , \quad
# d\ell_j = w_j \Bigl( dw_j - \sum_i w_i\, dw_i \Bigr) = w_j\; do \cdot (o_j - o) .
# $$ (distributed-merge-backward)
#
# A rank has $\ell$ and $o$ of the whole row for its queries when the forward pass ends. So keys and
# values go around once more. Each rank computes a tile again, applies the backward pass of
# {doc}`09_attention`, and adds its share to the gradients of these keys and values. The gradients
# *travel with them* and are home after $n$ steps. With $c$ bytes for the keys and values of a
# chunk, a rank sends
#
# $$
# \underbrace{(n-1)\,c}_{\text{forward}} + \underbrace{(n-1)\,c}_{\text{again}} +
# \underbrace{n\,c}_{\text{gradients}} = (3n-2)\,c \quad \text{bytes.}
# $$ (distributed-ring-bytes)
#
# ### Who has work, and when?
#
# A causal mask hides later chunks. Rank 0 is finished after its own chunk, while the last rank
# works at every step, and each step takes as long as its busiest rank. The remedy is the *zigzag*
# cut: cut the row into $2n$ pieces, and give rank $r$ an early one and a late one, $r$ and
# $2n - 1 - r$. Of the four pairs of pieces that two different ranks form, exactly two are visible,
# so all ranks have the same work at every step. {py:func}`~llmbook.distributed.ring_work` counts
# it: on eight ranks, contiguous chunks take 1.87 times as long as even shares would, and the zigzag
# cut takes 1.00. A token's place in the text no longer follows from its place on the rank, so
# positions and targets must be cut like the tokens, by
# {py:func}`~llmbook.distributed.cut_sequence`.

# %% [markdown] tags=["engine"]
# ### Engine room: the ring, its tiles, and its way back

# %% [markdown] tags=["engine"]
# A chunk consists of one piece of the row, or of two. Of two pieces, the later one sees all of the
# earlier one, the earlier one sees nothing of the later one, and each sees itself through a
# triangle. So no mask is ever made: tiles are whole, triangles, or left out.


# %% tags=["engine"]
#| export
def _pieces(rank: int, n_ranks: int, zigzag: bool) -> list[int]:
    """Return which pieces of the row a rank has, in its order."""
    return [rank, 2 * n_ranks - 1 - rank] if zigzag else [rank]


def _visible(
    mine: list[int], theirs: list[int], is_causal: bool, length: int
) -> Iterator[tuple[slice, slice, bool]]:
    """Yield queries and keys of each visible tile of two chunks, and whether it is a triangle."""
    size = length // len(mine)
    for i, query in enumerate(mine):
        for j, key in enumerate(theirs):
            if key <= query or not is_causal:
                rows, columns = (slice(at * size, (at + 1) * size) for at in (i, j))
                yield rows, columns, is_causal and key == query


# %% tags=["engine"]
#| export
def cut_sequence(
    x: Num[Tensor, "*shape"],
    dim: int = 1,
    *,
    zigzag: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Num[Tensor, "*chunk"]:
    """Return this rank's chunk of ``x`` along ``dim``, of ids, positions, targets, or vectors.

    With ``zigzag``, it is an early and a late piece of 2 ``n_ranks``. A ``ValueError`` on all ranks
    tells of a sequence that they do not divide.
    """
    check_whole("dim", dim, -x.ndim, x.ndim - 1)
    rank, n = _place(group)
    pieces = 2 * n if zigzag else n
    if x.size(dim) % pieces:
        expected = f"a sequence that {pieces} pieces divide"
        raise ValueError(f"x: expected {expected}, got {x.size(dim)} in dimension {dim}")
    parts = x.chunk(pieces, dim)
    return torch.cat([parts[piece] for piece in _pieces(rank, n, zigzag)], dim)


# %% tags=["engine"]
#| export
def ring_work(
    n_ranks: int, length: int, *, zigzag: bool = False
) -> Int64[Tensor, "n_ranks n_ranks"]:
    """Return how many pairs of query and key each rank (row) has at each step of a causal ring."""
    check_whole("n_ranks", n_ranks, 1)
    check_whole("length", length, 1)
    pieces = 2 * n_ranks if zigzag else n_ranks
    if length % pieces:
        raise ValueError(f"length: expected a number that {pieces} pieces divide, got {length}")
    work = torch.zeros(n_ranks, n_ranks, dtype=torch.int64)
    size = length // pieces
    for rank in range(n_ranks):
        for step in range(n_ranks):
            mine, theirs = (
                _pieces(which, n_ranks, zigzag) for which in (rank, (rank - step) % n_ranks)
            )
            for _, _, triangle in _visible(mine, theirs, True, length // n_ranks):
                work[rank, step] += size * (size + 1) // 2 if triangle else size * size
    return work


# %% [markdown] tags=["engine"]
# The forward and the backward pass walk the same way around. Keys and values are joined in one
# tensor, so that each step sends one message.


# %% tags=["engine"]
#| export
class _Ring(NamedTuple):
    """How a row is cut and attended to."""

    is_causal: bool
    zigzag: bool
    group: dist.ProcessGroup | None

    def tiles(self, step: int, length: int) -> Iterator[tuple[slice, slice, bool]]:
        """Yield the visible tiles of this rank's chunk and the one that is here at ``step``."""
        rank, n = _place(self.group)
        mine, theirs = (_pieces(at, n, self.zigzag) for at in (rank, (rank - step) % n))
        return _visible(mine, theirs, self.is_causal, length)


def _tile_attention(q: Tensor, kv: Tensor, is_triangle: bool) -> AttentionPart:
    k, v = kv.split([q.size(-1), kv.size(-1) - q.size(-1)], dim=-1)
    return AttentionPart(*flash_attention(q, k, v, is_causal=is_triangle, return_lse=True))


def _ring_forward(q: Tensor, kv: Tensor, ring: _Ring) -> AttentionPart:
    """Return attention of this rank's queries to all keys."""
    n, wide = _place(ring.group)[1], torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(*q.shape[:-1], kv.size(-1) - q.size(-1))
    log_sum = q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    for step in range(n):
        for rows, columns, triangle in ring.tiles(step, q.size(-2)):
            part = _tile_attention(q[..., rows, :], kv[..., columns, :], triangle)
            before = AttentionPart(out[..., rows, :], log_sum[..., rows])
            out[..., rows, :], log_sum[..., rows] = merge_attention(before, part)
        if step < n - 1:
            kv = pass_on(kv, ring.group)
    return AttentionPart(out, log_sum)


# %% tags=["engine"]
#| export
class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, ring: _Ring) -> Tensor:
        out, log_sum = _ring_forward(q, kv, ring)
        ctx.save_for_backward(q, kv, out, log_sum)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: ring attention has first derivatives only")
        q, kv, out, log_sum = ctx.saved_tensors
        ring, n = ctx.ring, _place(ctx.ring.group)[1]
        d_q, d_kv = torch.zeros_like(q), torch.zeros_like(kv)
        for step in range(n):
            for rows, columns, triangle in ring.tiles(step, q.size(-2)):
                inputs = [
                    x.detach().requires_grad_() for x in (q[..., rows, :], kv[..., columns, :])
                ]
                with torch.enable_grad():
                    part = _tile_attention(inputs[0], inputs[1], triangle)
                share = (part.log_sum.detach() - log_sum[..., rows]).exp().unsqueeze(-1)
                d_part = share * d_out[..., rows, :]
                d_log_sum = (d_part * (part.out.detach() - out[..., rows, :])).sum(dim=-1)
                found = torch.autograd.grad(part, inputs, (d_part.to(q.dtype), d_log_sum))
                d_q[..., rows, :] += found[0]
                d_kv[..., columns, :] += found[1]
            d_kv = pass_on(d_kv, ring.group) if n > 1 else d_kv
            if step < n - 1:
                kv = pass_on(kv, ring.group)
        return d_q, d_kv, None


# %% [markdown] tags=["engine"]
# Ranks with chunks of different lengths would wait for bytes that never come. A small message
# before the first step turns that into an error on every rank.


# %% tags=["engine"]
#| export
def ring_attention(
    q: Float[Tensor, "*batch n_heads chunk d_head"],
    k: Float[Tensor, "*batch n_kv_heads chunk d_head"],
    v: Float[Tensor, "*batch n_kv_heads chunk d_value"],
    *,
    is_causal: bool = True,
    zigzag: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, "*batch n_heads chunk d_value"]:
    """Return this rank's chunk of the attention to a row that is cut over all ranks.

    Each rank gives its chunk, made by ``cut_sequence`` with the same ``zigzag``. Scores are scaled
    by 1 / sqrt(d_head). All ranks must call it, and all must go backward. Chunks that differ in
    shape or dtype raise a ``ValueError`` on all ranks. Source: Liu et al. (2023), algorithm 1.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, "...", "heads", "chunk", "feature")
    length = q.size(-2)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.size(-2) != length:
            raise ValueError(f"{name}: expected {length} tokens, as q has, got {tensor.size(-2)}")
    if k.size(-1) != q.size(-1):
        raise ValueError(f"k: expected vectors of {q.size(-1)}, as q has, got {k.size(-1)}")
    if zigzag and length % 2:
        raise ValueError(f"q: expected an even number of tokens for zigzag, got {length}")
    if _place(group)[1] > 1:
        sizes = {"chunk": length, "d_head": q.size(-1), "d_value": v.size(-1)}
        heads = {"n_heads": q.size(-3), "n_kv_heads": k.size(-3), "rows": q[..., 0, 0, 0].numel()}
        kinds = {"dtypes": (q.dtype, k.dtype, v.dtype), "is_causal": bool(is_causal)}
        _check_same({**sizes, **heads, **kinds, "zigzag": bool(zigzag)}, group)
    return _RingAttention.apply(q, torch.cat([k, v], dim=-1), _Ring(is_causal, zigzag, group))


# %% [markdown] tags=["engine"]
# This is what two ranks run below, and what is demanded of the result:


# %% tags=["engine"]
def ring_step(inputs: list[Tensor], d_out: Tensor, zigzag: bool):
    chunks = [cut_sequence(x.detach(), -2, zigzag=zigzag).requires_grad_() for x in inputs]
    with ByteCounter() as sent:
        ring_attention(*chunks, zigzag=zigzag).backward(cut_sequence(d_out, -2, zigzag=zigzag))
    places = cut_sequence(torch.arange(d_out.size(-2)), 0, zigzag=zigzag)
    return places, [x.grad for x in chunks], sent.by_name["send"]


def ring_compared(ranks) -> str:
    for places, found, _ in ranks:
        for name, x, gradient in zip("qkv", inputs, found, strict=True):
            error = (x.grad[..., places, :] - gradient).abs().max()
            assert error < 1e-12, f"the gradient of {name} differs by {error:.1g}"
    return "gradients of q, k and v within 1e-12 of one process"


B, T = 2, 64  # rows and tokens; keys and values have 2 heads of 16 numbers
sizes = (B, 4, T, 16), (B, 2, T, 16), (B, 2, T, 16)
inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
d_out = torch.randn(B, 4, T, 16, dtype=torch.float64)
scaled_dot_product_attention(*inputs, is_causal=True).backward(d_out)


# %% [markdown] tags=["engine"]
# The next cell counts the work of each rank, in pairs of a query and a key that it sees. (Another
# way to even it out is to deal out single tokens {cite}`brandon2023striped`.)

# %% tags=["engine"]
print("ranks  cut         least work  most work  time / even shares")
for n, cut in itertools.product((2, 4, 8), ("contiguous", "zigzag")):
    work = ring_work(n, 16 * n, zigzag=cut == "zigzag")
    each, total = work.sum(dim=1), work.sum()
    lockstep = work.amax(dim=0).sum() * n / total
    print(f"{n:5}  {cut:10} {each.min() / total:11.0%} {each.max() / total:10.0%} {lockstep:19.2f}")
n, b = 2, 8  # ranks and bytes of a number, in the run below

# %% [markdown]
# ### Equal to one process, and to the formula
#
# In `ring_step`, two ranks attend to $B = 2$ rows of $T = 64$ tokens and go backward, with either
# cut. Keys and values have two heads of 16 numbers, each of $b = 8$ bytes. `ring_compared` judges:

# %%
for zigzag in (False, True):
    ranks = launch(ring_step, 2, inputs, d_out, zigzag)
    print(f"{'zigzag' if zigzag else 'contiguous':10}: {ring_compared(ranks)}")
formula = (3 * n - 2) * 2 * (B * T // n * 2 * 16 * b)
print(f"each rank sent {ranks[0][2]:,} bytes; the formula says {formula:,}")

# %% [markdown]
# Both cuts give the gradients of one process, and send the bytes of {eq}`distributed-ring-bytes`.

# %% [markdown]
# ## Cutting the depth: pipelines
#
# The plainest cut gives the first layers to rank 0, the next to rank 1, and so on. Only neighboring
# *stages* talk, and send $BTd$ numbers at each cut, once forward and once backward. But while one
# stage works on the batch, all others wait.
#
# So the batch is cut into $m$ micro-batches, and stage 0 starts on the second while stage 1 has the
# first. Let there be $p$ stages, and let a micro-batch take the times $t_f$ forward and $t_b$
# backward in each of them. The simplest schedule, GPipe {cite}`huang2019gpipe`, sends all
# micro-batches forward, then all backward. The last stage starts when the first micro-batch has
# passed the $p - 1$ others, and has finished its forward passes after $(p-1+m)t_f$. The backward
# passes run the other way, in $(p-1+m)t_b$. Each stage works for $m(t_f+t_b)$ of that time. The
# rest is the *bubble*:
#
# $$
# \text{bubble} = 1 - \frac{m(t_f+t_b)}{(m+p-1)(t_f+t_b)} = \frac{p-1}{m+p-1} .
# $$ (distributed-bubble)
#
# More micro-batches make it smaller. But with GPipe, each stage keeps the activations of all $m$ of
# them until the backward passes, which need not wait that long. In *one forward, one backward*
# (1F1B), a stage sends forward as many micro-batches as there are stages behind it, then alternates
# one forward pass with one backward pass, and at the end takes the backward passes that are left
# {cite}`narayanan2021efficient`.
#
# A schedule is data: for each stage, a list of passes in order.
# {py:func}`~llmbook.distributed.pipeline_timing` runs it without a model, with backward passes
# twice as long as forward ones, since they multiply twice, for inputs and for weights.

# %% [markdown] tags=["engine"]
# ### Engine room: schedules, and how to run them on paper


# %% tags=["engine"]
#| export
# What a schedule consists of
class PipelineAction(NamedTuple):
    """One thing that a stage does: ``"forward"`` or ``"backward"`` with one micro-batch."""

    kind: str
    microbatch: int


# %% tags=["engine"]
#| export
def one_forward_one_backward(n_stages: int, n_microbatches: int) -> list[list[PipelineAction]]:
    """Return the 1F1B schedule: for each stage, what it does, in order.

    Source: Narayanan et al. (2021), section 2.2, there PipeDream-Flush.
    """
    _check_pipeline(n_stages, n_microbatches)
    schedule = []
    for stage in range(n_stages):
        ahead = n_stages - 1 - stage  # forward passes before the first backward one
        order = [("forward", i) for i in range(ahead)]
        for i in range(n_microbatches - ahead):
            order += [("forward", ahead + i), ("backward", i)]
        order += [("backward", i) for i in range(n_microbatches - ahead, n_microbatches)]
        schedule.append([PipelineAction(*action) for action in order])
    return schedule


# %% tags=["engine"]
#| export
def _check_pipeline(n_stages: int, n_microbatches: int) -> None:
    check_whole("n_stages", n_stages, 1)
    check_whole("n_microbatches", n_microbatches, 1)
    if n_microbatches < n_stages:
        expected = f"at least one for each of the {n_stages} stages"
        raise ValueError(f"n_microbatches: expected {expected}, got {n_microbatches}")


def gpipe_schedule(n_stages: int, n_microbatches: int) -> list[list[PipelineAction]]:
    """Return the schedule in which each stage goes forward with all, then backward with all.

    Source: Huang et al. (2019), section 2.3.
    """
    _check_pipeline(n_stages, n_microbatches)
    kinds = ("forward", "backward")
    order = [PipelineAction(kind, i) for kind in kinds for i in range(n_microbatches)]
    return [list(order) for _ in range(n_stages)]


# %% tags=["engine"]
#| export
class PipelineTiming(NamedTuple):
    """When the actions of a schedule begin, how long all take, and what is idle and kept."""

    starts: list[list[float]]
    """For each stage, when each of its actions begins."""
    duration: float
    bubble: float
    """The share of the time of all stages in which they do nothing."""
    kept: list[int]
    """How many micro-batches each stage keeps at most, forward done and backward not."""


# %% [markdown] tags=["engine"]
# Each pass over the stages runs as many actions as have what they need. If no stage can go on and
# something is left to do, the stages are waiting for each other. A program that followed such a
# schedule would hang; here it is refused before anything is sent.


# %% tags=["engine"]
#| export
def pipeline_timing(
    schedule: Sequence[Sequence[PipelineAction]], forward: float = 1.0, backward: float = 2.0
) -> PipelineTiming:
    """Run ``schedule`` without a model; a pass of a micro-batch takes so long in each stage.

    A ``ValueError`` tells of stages that would wait for each other for ever, of actions that are
    missing, and of actions that are there twice.
    """
    costs = {"forward": forward, "backward": backward}
    for name, cost in costs.items():
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {cost!r}")
    _check_schedule(schedule)
    last, ends = len(schedule) - 1, [dict[tuple[str, int], float]() for _ in schedule]
    starts: list[list[float]] = [[] for _ in schedule]
    clocks, going = [0.0] * len(schedule), True
    while going:
        going = False
        for stage, actions in enumerate(schedule):
            for kind, i in actions[len(starts[stage]) :]:
                source = stage - 1 if kind == "forward" else stage + 1
                needs = [ends[stage].get(("forward", i))] if kind == "backward" else [0.0]
                needs += [ends[source].get((kind, i))] if 0 <= source <= last else []
                if None in needs:
                    break
                start = max(clocks[stage], *(need for need in needs if need is not None))
                starts[stage].append(start)
                clocks[stage] = ends[stage][kind, i] = start + costs[kind]
                going = True
    for stage, actions in enumerate(schedule):
        if len(starts[stage]) < len(actions):
            stuck = f"stage {stage} waits for ever before {tuple(actions[len(starts[stage])])}"
            raise ValueError(f"schedule: expected one that can be run, got one in which {stuck}")
    duration, work = max(clocks), sum(costs[kind] for actions in schedule for kind, _ in actions)
    return PipelineTiming(starts, duration, 1 - work / (duration * len(schedule)), _kept(schedule))


# %% tags=["engine"]
#| export
def _kept(schedule: Sequence[Sequence[PipelineAction]]) -> list[int]:
    """Return the most micro-batches that each stage keeps."""
    changes = ([1 if kind == "forward" else -1 for kind, _ in actions] for actions in schedule)
    return [max(accumulate(change)) for change in changes]


def _check_schedule(schedule: Sequence[Sequence[PipelineAction]]) -> None:
    """Demand that each stage does the same micro-batches, each forward and backward, once."""
    if not isinstance(schedule, list | tuple) or not schedule or not all(schedule):
        raise ValueError(
            f"schedule: expected a list of actions for each stage, got {schedule!r:.60}"
        )
    n = max(1, len(schedule[0]) // 2)
    expected = sorted((kind, i) for kind in ("forward", "backward") for i in range(n))
    for stage, actions in enumerate(schedule):
        if sorted(map(tuple, actions)) != expected:
            each = f"forward and backward of micro-batches 0 to {n - 1}, once each"
            got = f"{[tuple(action) for action in actions]!r:.60}"
            raise ValueError(f"schedule: expected {each}, got {got} in stage {stage}")


# %% tags=["engine"]
# Draws what pipeline_timing returns
def draw_schedule(ax, title: str, schedule) -> None:
    timing, width = pipeline_timing(schedule), {"forward": 1, "backward": 2}
    for stage, (actions, starts) in enumerate(zip(schedule, timing.starts, strict=True)):
        for (kind, i), start in zip(actions, starts, strict=True):
            color = "C0" if kind == "forward" else "C1"
            ax.barh(stage, width[kind], left=start, color=color, edgecolor="white", height=0.8)
            ax.text(start + width[kind] / 2, stage, i, ha="center", va="center", color="white")
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(yticks=range(len(schedule)), ylabel="stage", title=title)
    ax.text(1.01, 0.5, f"keeps\n{timing.kept}", transform=ax.transAxes, va="center")


# %% [markdown]
# ### Two schedules compared
#
# The timing draws itself, for four stages and six micro-batches:

# %% mystnb={"figure": {"caption": "GPipe (above) and 1F1B (below) with 4 stages and 6 micro-batches, drawn from the schedules. Numbers are micro-batches; blue is forward, orange backward. Empty space is the bubble, and it is equally large in both.", "name": "fig-distributed-schedules"}, "image": {"alt": "Two charts with a row for each of four stages over time. Above, all six short forward passes of a stage come first and then six long backward passes. Below, stages alternate forward and backward after a start of three, two, one and no forward passes. Both end at time 27."}}
kinds = {"GPipe": gpipe_schedule, "1F1B": one_forward_one_backward}
fig, axes = plt.subplots(2, 1, figsize=(7.2, 4), sharex=True)
for ax, (name, make) in zip(axes, kinds.items(), strict=True):
    draw_schedule(ax, name, make(4, 6))
axes[1].set_xlabel("time, in forward passes of one micro-batch through one stage")
plt.show()

# %% [markdown]
# Both schedules have the bubble of {eq}`distributed-bubble`: a third of the time here, and 17.9
# percent for 8 stages and 32 micro-batches. 1F1B is not faster. But its stage 0 keeps $p$
# micro-batches instead of $m$, so we can afford a large $m$. The bubble itself shrinks if each rank
# has several short stages, at the price of more messages {cite}`narayanan2021efficient`, or if the
# gradients of weights, for which nobody waits, are put off to fill the gaps {cite}`qi2024zero`.

# %% [markdown] tags=["engine"]
# ### Engine room: bubbles of other sizes, stages, messages, and a matrix at both ends

# %% tags=["engine"]
print("stages  micro-batches  formula   GPipe: bubble, kept      1F1B: bubble, kept")
for p, m in ((2, 4), (4, 4), (4, 16), (8, 32), (8, 128)):
    row = [f"{p:6} {m:14} {(p - 1) / (m + p - 1):8.1%}"]
    for make in kinds.values():
        timing = pipeline_timing(make(p, m))
        row.append(f"{timing.bubble:14.1%} {max(timing.kept):7}")
        assert abs(timing.bubble - (p - 1) / (m + p - 1)) < 1e-9
    print("".join(row))

# %% [markdown] tags=["engine"]
# A stage shares its parameters with the model that it was cut from. (A model too large for that is
# first built on the `meta` device.) Tied embeddings are the one thing that a cut by depth tears
# apart: the first and the last stage each have the matrix, with a part of its gradient.


# %% tags=["engine"]
#| export
class PipelineStage(nn.Module):
    """The ``stage``-th of ``n_stages`` equal shares of the blocks of ``model``.

    Parameters are those of ``model``, not copies. The first stage turns ids into vectors, the last
    one vectors into logits, and the others vectors into vectors. Rows are whole texts: positions
    count from 0. Balance losses of experts are not part of it.
    """

    def __init__(self, model: TransformerLM, stage: int, n_stages: int):
        super().__init__()
        config = model.config
        check_whole("n_stages", n_stages, 1)
        check_whole("stage", stage, 0, n_stages - 1)
        if config.n_layers % n_stages:
            expected = f"a divisor of n_layers = {config.n_layers}"
            raise ValueError(f"n_stages: expected {expected}, got {n_stages}")
        share = config.n_layers // n_stages
        first, last = stage == 0, stage == n_stages - 1
        self.config, self.stage, self.n_stages = config, stage, n_stages
        self.embedding = model.embedding if first else None
        self.positions = model.positions if first else None
        self.rope = model.rope
        self.blocks = nn.ModuleList(model.blocks[stage * share : (stage + 1) * share])
        self.norm = model.norm if last else None
        self.lm_head = model.lm_head if last else None

    def forward(
        self, x: Num[Tensor, "batch sequence *d_model"]
    ) -> Float[Tensor, "batch sequence d"]:
        """Return what the next stage reads, or logits; ``x`` is what the one before returned."""
        length, window = x.size(1), self.config.sliding_window
        places = torch.arange(length, device=x.device)[None]
        if self.embedding is not None:
            x = self.embedding(x)
            x = x if self.positions is None else x + self.positions(places).to(x.dtype)
            x = F.dropout(x, self.config.dropout, self.training)
        rope = None if self.rope is None else self.rope(places)
        cut = window is not None and length > window
        mask = causal_mask(length, window, x.device) if cut else None
        for block in self.blocks:
            x = block(x, rope=rope, mask=mask)
        return x if self.norm is None or self.lm_head is None else self.lm_head(self.norm(x))

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The matrix whose other copy is at the other end of the pipeline, if there is one."""
        ends = [layer.weight for layer in (self.embedding, self.lm_head) if layer is not None]
        is_torn = self.config.tie_embeddings and len(ends) == 1
        return ends[0] if is_torn and isinstance(ends[0], nn.Parameter) else None


# %% tags=["engine"]
#| export
class _Mail:
    """Messages between neighboring stages; ``close`` waits for what was sent."""

    def __init__(self, stage: int, group: dist.ProcessGroup | None):
        self.stage, self.group = stage, group
        self.sent: list[tuple[Any, Tensor]] = []

    def send(self, x: Tensor, to: int) -> None:
        """Begin to send; ``x`` is kept until it is gone."""
        x = x.contiguous()
        self.sent.append((dist.isend(x, group=self.group, group_dst=to), x))

    def receive(self, like: Tensor, source: int) -> Tensor:
        """Wait for a tensor from another stage."""
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(x, group=self.group, group_src=source)
        return x

    def close(self) -> None:
        """Wait for all that was sent; without this, the next barrier may hang."""
        for work, _ in self.sent:
            work.wait()


def _add_tied(stage: PipelineStage, mail: _Mail) -> None:
    """Add the gradient of the tied matrix at the other end of the pipeline to the one here."""
    weight = stage.tied_weight
    if weight is not None and weight.grad is not None:
        other = 0 if stage.stage else stage.n_stages - 1
        own = weight.grad.clone()
        mail.send(own, other)
        weight.grad = own + mail.receive(own, other)


# %% tags=["engine"]
#| export
def _check_batch_of(
    stage: PipelineStage,
    ids: Tensor,
    targets: Tensor,
    schedule: Sequence[Sequence[PipelineAction]],
    group: dist.ProcessGroup | None,
) -> int:
    """Return the number of micro-batches; all ranks get the same error, for all see the same."""
    check_tensor("ids", ids, "batch", "sequence", kind="whole numbers")
    check_tensor("targets", targets, *ids.shape, kind="whole numbers")
    pipeline_timing(schedule)  # it can be run
    (rank, n), m = _place(group), len(schedule[0]) // 2
    if n > 1:  # else stages would wait for messages of other sizes, or for others
        plan = [[tuple(action) for action in actions] for actions in schedule]
        model = {"d_model": stage.config.d_model, "dtype": next(stage.parameters()).dtype}
        told = {"micro_batches": m, "schedule": plan, "ids.shape": tuple(ids.shape)}
        _check_same(told | model, group)
    if len(schedule) != n:
        raise ValueError(f"schedule: expected {n} stages, as there are ranks, got {len(schedule)}")
    if (stage.stage, stage.n_stages) != (rank, n):
        got = f"{stage.stage} of {stage.n_stages}"
        raise ValueError(f"stage: expected stage {rank} of {n} on this rank, got {got}")
    if not len(ids) or len(ids) % m:
        raise ValueError(f"ids: expected rows that {m} micro-batches divide, got {len(ids)}")
    if not bool((targets != -100).any()):
        raise ValueError("targets: expected at least one that counts, got none")
    return m


# %% tags=["engine"]
#| export
def pipeline_step(
    stage: PipelineStage,
    ids: Int64[Tensor, "batch sequence"],
    targets: Int64[Tensor, "batch sequence"],
    schedule: Sequence[Sequence[PipelineAction]],
    group: dist.ProcessGroup | None = None,
) -> float | None:
    """Run a batch forward and backward through all stages, one on each rank of ``group``.

    All ranks give the same batch and schedule; rows are divided among the micro-batches. Gradients
    of the mean loss over all targets, -100 left out, are added to those of the stage's parameters.
    The last stage returns that mean, in nats, the others None.
    """
    m = _check_batch_of(stage, ids, targets, schedule, group)
    rank, last, mail = stage.stage, stage.n_stages - 1, _Mail(stage.stage, group)
    n_targets, total = int((targets != -100).sum()), 0.0
    rows, answers = ids.chunk(m), targets.chunk(m)
    dtype = next(stage.parameters()).dtype
    template = torch.empty(*rows[0].shape, stage.config.d_model, dtype=dtype, device=ids.device)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    earlier, weight = None, stage.tied_weight
    if weight is not None:  # what earlier batches left has been added up already
        earlier, weight.grad = weight.grad, None
    for kind, i in schedule[rank]:
        if kind == "forward":
            x = rows[i] if rank == 0 else mail.receive(template, rank - 1).requires_grad_()
            y = stage(x)
            if rank == last:
                y = cross_entropy(y, answers[i], reduction="sum") / n_targets
                total += y.item()
            else:
                mail.send(y.detach(), rank + 1)
            kept[i] = x, y
        else:
            x, y = kept.pop(i)
            y.backward(None if rank == last else mail.receive(template, rank + 1))
            if rank > 0 and x.grad is not None:
                mail.send(x.grad, rank - 1)
    _add_tied(stage, mail)
    if weight is not None and weight.grad is not None and earlier is not None:
        weight.grad += earlier
    mail.close()
    return total if rank == last else None


# %% [markdown] tags=["engine"]
# What each rank runs in the comparison that follows:


# %% tags=["engine"]
def pipeline_worker(model, ids, make):
    rank, size = dist.get_rank(), dist.get_world_size()
    stage = PipelineStage(model, rank, size)
    found = pipeline_step(stage, ids[:, :-1], ids[:, 1:].contiguous(), make(size, 4))
    return found, gradients(model)  # of those parameters that this stage has


# %% [markdown]
# ### A pipeline that runs
#
# A {py:class}`~llmbook.distributed.PipelineStage` has a share of a model's blocks; the first one
# also has the embedding, and the last one the head. {py:func}`~llmbook.distributed.pipeline_step`
# follows a schedule. Autograd does not reach across processes, so a stage keeps its input $x$ and
# its output $y$ for each micro-batch. When $dy$ arrives, `y.backward(dy)` fills in the gradients of
# its weights and of $x$, and the latter is sent back. Losses are summed and divided by the targets
# of the *whole* batch. In `pipeline_worker`, each of two ranks has two blocks and takes four
# micro-batches:

# %%
for name, make in kinds.items():
    (_, first), (found, last) = launch(pipeline_worker, 2, model, ids, make)
    print(f"{name:5}: {compared([found], [first, last])}")

# %% [markdown]
# Both schedules find the loss and the gradients of one process.

# %% [markdown]
# ## Experts on several devices
#
# Each rank has some of the experts of a mixture ({doc}`10_blocks`), undivided, and its own share of
# the tokens. Tokens travel to their experts, and results back. Every rank sends something different
# to every other one, an *all-to-all*. If a rank has $N$ tokens with $k$ active experts each, and
# routing is even, $\frac{n-1}{n}$ of its $Nk$ vectors leave. There are two exchanges forward and
# their mirror images backward, so for each layer a rank sends
#
# $$
# 4\,\tfrac{n-1}{n}\, b\, N k d \quad \text{bytes.}
# $$ (distributed-expert-bytes)
#
# But routing is not even, and all ranks wait for the busiest one. A *capacity* bounds the wait
# {cite}`lepikhin2021gshard`; a bias on the router evens out the loads {cite}`deepseek2024v3`.

# %% [markdown] tags=["engine"]
# ### Engine room: what a capacity drops

# %% [markdown] tags=["engine"]
# With a capacity, each of $E$ experts takes at most $\gamma M k / E$ of all $M$ tokens, and the
# rest skip it. Here are 4 ranks with 2 experts each, 4,096 tokens, $k = 2$, and a router with
# random preferences. A capacity shortens the wait, and the price is dropped tokens:

# %% tags=["engine"]
torch.manual_seed(0)
logits = torch.randn(4096, 8) + 0.5 * torch.randn(8)
print("capacity factor  dropped  busiest rank / even share")
for factor in (None, 2.0, 1.25, 1.0):
    routing = route(logits, 2, capacity=factor and math.ceil(factor * 4096 * 2 / 8))
    loads = [len(places) for places in places_by_expert(routing)]
    busiest = max(loads[i] + loads[i + 1] for i in range(0, 8, 2)) / (4096 * 2 / 4)
    print(f"{factor or 'none':>15} {1 - sum(loads) / (4096 * 2):8.0%} {busiest:18.2f}")

# %% [markdown]
# ## Which cut, and when?
#
# | cut | a rank holds | and sends (numbers) | when |
# |---|---|---|---|
# | data (and ZeRO, FSDP) | rows of the batch | those of gradients or parameters, each step | always, over all devices that are left |
# | tensor | columns and rows of matrices | $8\frac{n-1}{n} BTd$ a block | a layer is too large; inside a server |
# | sequence | a chunk of each row | $3n-2$ chunks of keys and values a block | rows are too long |
# | pipeline | some of the layers | $2BTd$ at each cut | the model is too deep; between servers |
# | expert | some of the experts | $4\frac{n-1}{n}Nkd$ a layer | there are many experts |
#
# The cuts combine, since each goes along an axis of its own. Devices are numbered by coordinates in
# a *mesh*: in one of $2 \times 4 \times 2$ for data, pipeline, and tensor, each of the 16 belongs
# to a data group of 2, a pipeline of 4, and a tensor group of 2. Each collective stays within one
# group, so our functions take a `group`; the tests cut layers and rows at once on four ranks, by
# our functions and by torch's. The axis that talks most gets the shortest links. From the innermost
# outward, Llama 3 orders its axes as tensor, context (its name for the sequence), pipeline, data
# {cite}`grattafiori2024llama3`.

# %% [markdown]
# ## Eight, 64, 1,024 GPUs
#
# How far does cutting the batch alone go? {py:func}`~llmbook.distributed.predict_scheme` takes the
# formulas to any number of GPUs, with ZeRO's count of bytes for each weight in mixed precision: 2
# for the weight, 2 for its gradient, and 12 for the optimizer, which keeps a float32 copy. For a
# model of 8 billion weights, each GPU keeps this many gigabytes, without activations and the blocks
# that full sharding has gathered at the moment:
#
# | | 8 GPUs | 64 GPUs | 1,024 GPUs |
# |---|--:|--:|--:|
# | data parallelism | 128.5 | 128.5 | 128.5 |
# | ZeRO stage 1 | 44.2 | 33.6 | 32.2 |
# | ZeRO stage 2 | 30.1 | 17.8 | 16.2 |
# | full sharding | 16.1 | 2.0 | 0.1 |
#
# In a step, the first three send 28 GB from each of eight GPUs and 32 GB from each of 1,024; full
# sharding sends half as much again. So the traffic hardly depends on the number of GPUs, but the
# time to hide it in does: with a fixed batch, each of 1,024 GPUs has a 128th of the work that each
# of eight has. That is where the other cuts come in.

# %% [markdown] tags=["engine"]
# ### Engine room: the formulas for any number of GPUs, and published numbers


# %% tags=["engine"]
#| export
class PredictedScheme(NamedTuple):
    """Bytes on each GPU for a model's state, and bytes that each sends in a step."""

    weights: float
    gradients: float
    optimizer: float
    sent: float

    @property
    def kept(self) -> float:
        """All of the state: weights, gradients, and what the optimizer keeps."""
        return float(self.weights + self.gradients + self.optimizer)


# %% tags=["engine"]
#| export
def predict_scheme(
    scheme: Literal["data_parallel", "zero1", "zero2", "full"],
    n_parameters: int,
    world_size: int,
    *,
    precision: Literal["float32", "mixed"] = "mixed",
    reduce_bytes: int | None = None,
    micro_batches: int = 1,
) -> PredictedScheme:
    """Return memory and traffic of a model of ``n_parameters`` on ``world_size`` GPUs, by formula.

    "mixed" is that of ZeRO: weights and gradients of 2 bytes, and 12 for the optimizer (weights and
    two averages in float32). ``reduce_bytes`` is the size of a gradient on its way, if another.
    "full" gathers and reduces for each of ``micro_batches``, the others reduce once. Left out are
    activations, and the unit that "full" has gathered. (Rajbhandari et al. 2020, sections 5, 7.)

    >>> predicted = predict_scheme("zero1", 7_500_000_000, 64)
    >>> round(predicted.kept / 1e9, 1), round(predicted.sent / 1e9, 1)  # in GB
    (31.4, 29.5)
    """
    stages = ("data_parallel", "zero1", "zero2", "full")
    check_choice("scheme", scheme, stages)
    check_choice("precision", precision, ("float32", "mixed"))
    check_whole("n_parameters", n_parameters, 1)
    check_whole("world_size", world_size, 1)
    check_at_least(reduce_bytes=(1, reduce_bytes), micro_batches=(1, micro_batches))
    weight, gradient, state = (4, 4, 8) if precision == "float32" else (2, 2, 12)
    stage, share = stages.index(scheme), n_parameters / world_size
    sent = gradient if reduce_bytes is None else reduce_bytes
    moved = {0: 2 * sent, 3: micro_batches * (2 * weight + sent)}.get(stage, sent + weight)
    return PredictedScheme(
        weights=weight * (share if stage >= 3 else n_parameters),
        gradients=gradient * (share if stage >= 2 else n_parameters),
        optimizer=state * (share if stage >= 1 else n_parameters),
        sent=moved * share * (world_size - 1),
    )


# %% [markdown] tags=["engine"]
# The formulas can be compared with three published sources. BLOOM's checkpoint is said to have 2.3
# TB, 329 GB of it 16-bit weights {cite}`bekman2022bloom`; our numbers count in powers of 1,024. A
# step of torchtitan's {cite}`pytorch2024titanspeed` takes as long as a GPU needs for its 8,192
# tokens.

# %% tags=["engine"]
stages: tuple[Any, ...] = ("data_parallel", "zero1", "zero2", "full")
kept = [predict_scheme(stage, 7_500_000_000, 64).kept / 1e9 for stage in stages]
print("ZeRO, 7.5B:   ", ", ".join(f"{x:.1f}" for x in kept), "GB; published 120, 31.4, 16.6, 1.9")
sizes = 14 * 176_247e6 / 2**40, 2 * 176_247e6 / 2**30
print(f"BLOOM:         {sizes[0]:.1f} TiB and {sizes[1]:.0f} GiB; published 2.3 TB and 329 GB")
for preset, speed, mfu in (("llama3-8b", 2904, 57), ("llama3-70b", 331, 52)):
    n_weights = count_parameters(ModelConfig.preset(preset))
    p = predict_scheme("full", n_weights, 64, reduce_bytes=4)
    rate = p.sent / 1e9 / (8192 / speed)
    print(f"{preset + ':':14} {p.kept / 1e9:.0f} GB kept, {rate:.0f} GB/s sent at {mfu} % MFU")

# %% [markdown] tags=["engine"]
# These are the predictions for 8 billion weights:

# %% tags=["engine"]
n_weights = count_parameters(ModelConfig.preset("llama3-8b"))
print("                 GB kept on each GPU      GB sent by each in a step")
print("GPUs                8      64   1,024         8      64   1,024")
for scheme in ("data_parallel", "zero1", "zero2", "full"):
    predicted = [predict_scheme(scheme, n_weights, n) for n in (8, 64, 1024)]
    kept = "".join(f"{p.kept / 1e9:8.1f}" for p in predicted)
    print(f"{scheme:13}{kept}  {''.join(f'{p.sent / 1e9:8.1f}' for p in predicted)}")

# %% [markdown] tags=["engine"]
# {numref}`fig-distributed-memory` shows a model of 70 billion weights.

# %% tags=["engine"] mystnb={"figure": {"caption": "What each GPU keeps of a model of 70 billion weights, without activations. Below the dashed line it fits into 80 GB.", "name": "fig-distributed-memory"}, "image": {"alt": "Four curves of gigabytes over the number of GPUs from 1 to 1,024, both axes logarithmic. Data parallelism stays at 1,129. ZeRO-1 falls toward 282 and ZeRO-2 toward 141, above the line of 80 GB. Full sharding falls in a straight line, crosses 80 GB between 8 and 16 GPUs and reaches 1 at 1,024."}}
n_weights = count_parameters(ModelConfig.preset("llama3-70b"))
worlds = [2**k for k in range(11)]
names = {"data_parallel": "data parallel", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "full": "full"}
for scheme, name in names.items():
    kept = [predict_scheme(scheme, n_weights, n).kept / 1e9 for n in worlds]
    plt.loglog(worlds, kept, marker="o", markersize=3, label=name)
plt.axhline(80, linestyle="--", color="gray")
plt.xlabel("GPUs")
plt.ylabel("GB on each")
plt.legend()
plt.show()

# %% [markdown]
# ### Can such numbers be trusted?
#
# For 7.5 billion weights on 64 GPUs, ZeRO's paper gives 120, 31.4, 16.6 and 1.9 GB
# {cite}`rajbhandari2020zero`, and so do our formulas. At the speed that torchtitan publishes for
# full sharding on 64 A100 GPUs {cite}`pytorch2024titanspeed`, each must have sent 22 GB per second,
# seven of eight GPUs to a neighbor in the same server, yet used more than half of its arithmetic:
# most of the traffic was hidden.
#
# Larger runs combine the cuts. On 16,384 GPUs, Llama 3 405B divides each layer over 8 of them and
# the layers over 16 stages, and the 128 GPUs that have the same part shard it among themselves
# {cite}`grattafiori2024llama3`. Between steps, all of the state then comes to 0.4 GB on each GPU;
# during one, the gathered 16-bit weights of the GPU's part come on top.

# %% [markdown]
# ## The same by torch's own
#
# PyTorch has all of this ready-made. Having built it, we know what to ask: does it return sums or
# means of gradients, and when does it exchange them? `torchrun` starts one process per device,
# tells each its rank and the number of ranks through environment variables, and ends all of them
# when one dies. `DistributedDataParallel` (DDP) exchanges gradients in buckets during the backward
# pass. `fully_shard` (FSDP2) gives each rank a piece of every parameter, gathers a block before it
# computes, and frees it afterwards. `parallelize_module` splits single layers.
#
# All three hook into the **forward pass** of a module, and here lies a trap for our own code.
# `next_token_objective` calls `hidden_states` and multiplies by the head in chunks; it never calls
# `forward`. A DDP wrapper has no `hidden_states`, so one calls
# `next_token_objective(ddp.module, batch)`, and that runs. The losses fall. But the wrapper's
# `forward` was never called, so it does not know that a backward pass will come, and exchanges
# nothing. Silently, each rank trains a model of its own.
#
# The cure is to make the objective the forward pass of a small module,
# {py:class}`~llmbook.distributed.ObjectiveModule`, and to wrap *that*. FSDP2 has a function that
# registers other methods beside `forward`, and we register `hidden_states`.

# %% [markdown] tags=["engine"]
# ### Engine room: the three wrappers around our model, and checkpoints in pieces

# %% tags=["engine"]
#| export
from pathlib import Path
from typing import cast

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from llmbook.batches import Batch, BatchSampler
from llmbook.environment import check_path
from llmbook.optimization import build_optimizer
from llmbook.training import load_model_state, model_state, next_token_objective, Objective
from llmbook.training import Parallel, Precision, random_states, set_random_states
from llmbook.training import Sums, Trainer, TrainingConfig, TrainingError

# %% [markdown] tags=["engine"]
# DDP needs only the module whose forward pass is an objective. `shard_by_torch` makes each block a
# unit of its own and the rest another one: the embedding and a head that is tied to it are then in
# the same unit, and stay tied.


# %% tags=["engine"]
#| export
class ObjectiveModule(nn.Module):
    """A module whose forward pass is ``objective(model, batch)``, for wrappers of forward passes.

    ``DistributedDataParallel`` exchanges the gradients of what its own ``forward`` computed, so an
    objective that calls other methods of the model must be inside.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a module of PyTorch, got {model!r:.60}")
        self.model = model

    def forward(self, objective: Objective, batch: Any) -> Any:
        """Return what ``objective`` finds in ``batch``."""
        return objective(self.model, batch)


# %% tags=["engine"]
#| export
def shard_by_torch(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Shard ``model`` in place by FSDP2, each of its ``blocks`` a unit of its own; return it.

    Gradients become means over the ranks of ``mesh``, by default all. Weights that are tied stay
    so. ``hidden_states``, if the model has it, may be called like ``forward``.
    """
    mesh = _all_ranks() if mesh is None else mesh
    _check_not_exchanged("model", model.parameters(), replaces=True)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "hidden_states"):
        register_fsdp_forward_method(model, "hidden_states")
    return model


# %% tags=["engine"]
#| export
def _all_ranks() -> DeviceMesh:
    if not dist.is_initialized():
        raise ValueError("mesh: expected one, or a process group, as launch makes; got neither")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (dist.get_world_size(),))


# %% [markdown] tags=["engine"]
# Tensor parallelism splits the matrices of a block by heads and by inner vectors: q, k, v, gate,
# and up by their outputs, and the two that follow by their inputs, so that a block exchanges two
# sums in the forward and two in the backward pass {cite}`shoeybi2019megatron`. Our attention asks
# for heads by `view(..., -1, d_head)`, so it does not notice that it has only a part of them. One
# thing torch cannot know: the gain that normalizes queries or keys is used for different heads on
# each rank, so its gradient must be summed, as by our own `tensor_parallel`.
#
# Both wrappers combine on a mesh of two axes, for example of four ranks with
# `mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "layers"))`: first
# `split_by_torch(model, mesh["layers"])`, then `shard_by_torch(model, mesh["rows"])`. The tests
# hold this against one process. The trainer's setting `parallel`, further on, takes one of them.


# %% tags=["engine"]
#| export
def split_by_torch(model: TransformerLM, mesh: DeviceMesh | None = None) -> TransformerLM:
    """Split the heads and inner vectors of ``model`` over ranks, in place; return it.

    Each rank gets the whole batch. Embedding, norms and head stay whole on each. A ``ValueError``
    if the ranks of ``mesh``, by default all, do not divide heads or inner vectors.
    """
    mesh = _all_ranks() if mesh is None else mesh
    _check_split(model, mesh.size())
    _check_not_exchanged("model", model.parameters(), replaces=True)
    for block in cast(Any, model).blocks:
        plan: dict[str, Any] = {f"attention.{x}_proj": ColwiseParallel() for x in "qkv"}
        plan |= {f"feed_forward.{x}_proj": ColwiseParallel() for x in ("gate", "up")}
        plan |= {"attention.o_proj": RowwiseParallel(), "feed_forward.down_proj": RowwiseParallel()}
        there = dict(block.named_modules())
        parallelize_module(block, mesh, {k: v for k, v in plan.items() if k in there})
        for norm in (block.attention.q_norm, block.attention.k_norm):  # sees a part of the heads
            if norm is not None:
                _enter_gains(norm, mesh.get_group())
    return model


# %% tags=["engine"]
#| export
def _check_split(model: Any, n: int) -> None:
    if not isinstance(model, TransformerLM):
        raise ValueError(f"model: expected a TransformerLM to split, got {model!r:.60}")
    config = model.config
    if config.n_experts:
        raise ValueError(f"n_experts: expected 0 to split a model by tp, got {config.n_experts}")
    d_ff = cast(Any, model.blocks[0]).feed_forward.up_proj.out_features
    sizes = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads, "d_ff": d_ff}
    for name, size in sizes.items():
        if size % n:
            raise ValueError(f"{name}: expected a multiple of {n} ranks, got {size}")


# %% [markdown] tags=["engine"]
# All ranks write a sharded checkpoint at once, each what it has, together with a table of what is
# where. So it can be read at another number of ranks, or by a model that is sharded in another way,
# and no rank ever holds the whole.


# %% tags=["engine"]
#| export
def save_sharded(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write model and optimizer to ``folder``, each rank what it has; all ranks call this."""
    from torch.distributed import checkpoint

    checkpoint.save(_both(model, optimizer), checkpoint_id=check_path(folder, "folder"))


def load_sharded(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what ``save_sharded`` wrote, at any number of ranks and in any way of sharding.

    A ``ValueError`` on all ranks if one of them does not see it.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    path = check_path(folder, "folder")
    is_there = (path / ".metadata").exists()
    if dist.is_initialized():  # on another machine it may not be: then none begins to read
        _check_same({"folder": "a checkpoint" if is_there else "no checkpoint"}, None)
    if not is_there:
        raise ValueError(f"folder: expected one that save_sharded wrote, got {path}")
    state = _both(model, optimizer)
    checkpoint.load(state, checkpoint_id=path)
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **parts)


# %% tags=["engine"]
#| export
def _both(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    states = get_state_dict(model, optimizer)
    return dict(zip(("model", "optimizer"), states, strict=True))


# %% [markdown] tags=["engine"]
# For the comparison, we take a tiny model with tied weights, and the rows of a rank:


# %% tags=["engine"]
def tiny_model() -> TransformerLM:
    """A model of which all ranks have the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "context_length": 32, "d_model": 32, "n_layers": 2, "n_heads": 4}
    return TransformerLM(ModelConfig(**sizes, tie_embeddings=True))


def batch_rows(of_all: bool = False) -> Batch:
    """Every second row of a batch of 8, or all."""
    ids = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(1))
    ids = ids if of_all else ids[dist.get_rank() :: dist.get_world_size()]
    return Batch(ids[:, :-1], ids[:, 1:])


def as_one(tensors: Iterable[Tensor | None]) -> Tensor:
    """Whole tensors, one after the other, as one vector."""
    given = [t.detach() for t in tensors if t is not None]
    return torch.cat([(t.full_tensor() if isinstance(t, DTensor) else t).flatten() for t in given])


# %% tags=["engine"]
def save_half(folder: str) -> Tensor:
    """Take a step on two ranks, save the pieces, and return the weights."""
    model = shard_by_torch(tiny_model())
    optimizer = build_optimizer(model, "adamw", lr=0.1)
    next_token_objective(model, batch_rows())[0].backward()
    optimizer.step()
    save_sharded(folder, model, optimizer)
    return as_one(model.parameters())


def load_part(folder: str) -> Tensor:
    """Read them at any number of ranks, and return the weights."""
    model = shard_by_torch(tiny_model())
    optimizer = build_optimizer(model, "adamw", lr=0.1)
    load_sharded(folder, model, optimizer)
    return as_one(model.parameters())


# %% [markdown] tags=["engine"]
# On two ranks, each with half of the rows, the gradient of the mean loss should be the one that a
# single process finds on all of them.


# %% tags=["engine"]
def gradient(way: str) -> Tensor:
    model = tiny_model()
    if way == "FSDP2":
        loss, count = next_token_objective(shard_by_torch(model), batch_rows())
    elif way == "DDP of an ObjectiveModule":
        ddp = DistributedDataParallel(ObjectiveModule(model))
        loss, count = ddp(next_token_objective, batch_rows())
    else:
        ddp = DistributedDataParallel(model)
        loss, count = next_token_objective(ddp.module, batch_rows())
    (loss / count).backward()
    return as_one(p.grad for p in model.parameters())


# %% tags=["engine"]
# The gradient of each way, and that of one process
model = tiny_model()
total, count = next_token_objective(model, batch_rows(of_all=True))
(total / count).backward()
expected = as_one(p.grad for p in model.parameters())
errors = {}
for way in ("DDP, objective of its .module", "DDP of an ObjectiveModule", "FSDP2"):
    first, second = launch(gradient, 2, way)
    errors[way] = float((first - expected).norm() / expected.norm())
    alike = "the same on both ranks" if torch.equal(first, second) else "another on each rank"
    size = "below 0.00001" if errors[way] < 1e-5 else f"about {errors[way]:.1f}"
    print(f"{way:30} error {size:13} of the norm, {alike}")
assert errors.pop("DDP, objective of its .module") > 0.1 and max(errors.values()) < 1e-5


# %% [markdown]
# ### Equal to one process, or not
#
# Do two ranks find the gradient that one process finds on all rows? In the room above they do, to
# five digits, both with DDP around an `ObjectiveModule` and with FSDP2. With `ddp.module`, the
# gradient is off by 80 percent of its norm, and differs between the ranks. No loss curve shows
# that.
#
# A checkpoint of FSDP2 is written in pieces, here by `save_half` after one step. It must not matter
# how many ranks read it, here by `load_part`:

# %%
with tempfile.TemporaryDirectory() as folder:
    weights = launch(save_half, 2, folder)[0]
    for n, readers in ((1, "1 rank"), (3, "3 ranks")):
        apart = int((launch(load_part, n, folder)[0] != weights).sum())
        print(f"read by {readers}: {apart} of {len(weights):,} weights differ")


# %% [markdown]
# Not a single weight differs.

# %% [markdown]
# ## The Trainer on several ranks
#
# The trainer of {doc}`13_training` knows nothing of ranks. But wherever several processes would
# have something to say to each other, it calls a method of an object, `parallel`, which does
# nothing in one process. {py:class}`~llmbook.distributed.Ranks` fills these methods in. There are
# few such places, and each is a known pitfall:
#
# | where | what one process does | what ranks must do |
# |---|---|---|
# | data | take the next batch | take every n-th row of the same batch |
# | micro-batches | add gradients up | exchange them in the last one only, with the forward pass inside `no_sync` |
# | mean | divide by the targets | divide by the targets of all ranks *and* all micro-batches |
# | clipping | take the norm | take it over all pieces, after the exchange |
# | decisions | skip a step, shrink the scale, stop | decide on the same numbers, or one rank waits forever |
# | evaluation | score all batches | score some each, and add sums and counts |
# | logs and files | write | let only rank 0 write, and tell the others what it read |
# | checkpoints | save the state | gather it first, with the random states of all ranks |
#
# The third line is the opening of this chapter again: torch's wrappers take the mean over ranks,
# and ranks have unequal numbers of targets. So the trainer turns means into sums, and divides once
# by the count of everything. The last line decides what a checkpoint *is*: the file that one
# process would have written, so that one process, three, or another scheme can continue from it. A
# model too large for that is written in pieces, by `save_sharded`.
#
# One setting, `parallel: ddp`, `fsdp` or `tp`, asks for all this, and `torchrun` starts the run:
#
# ```
# torchrun --nproc_per_node=2 -m llmbook.training config.yaml --folder runs/two
# ```

# %% [markdown] tags=["engine"]
# ### Engine room: what the ranks of a trainer say to each other

# %% [markdown] tags=["engine"]
# First, `Ranks` joins the group and divides model and data. From here on, the ranks have different
# seeds, because each draws the dropout of its own rows; with tp they all have the same rows, and
# the same seed. A setting that does not fit, such as heads that two ranks cannot share, is refused
# by every rank before the first step. If a rank dies, the same command goes on from the newest
# checkpoint. If one stands still, the others wait in a collective until its time is up, and say in
# which. Ctrl-C ends all of them after the step under way, with a checkpoint.


# %% tags=["engine"]
#| export
class Ranks(Parallel):
    """How the ranks of a group train one model: by ``ddp``, ``fsdp`` or ``tp`` of torch.

    For the ``parallel`` of a ``Trainer``, whose ``config`` may name it, too. The group is that of
    ``launch``, or else the one that ``torchrun`` asks for, which is joined here and waits at most
    ``timeout`` seconds for a rank. With ddp and fsdp each rank learns from a part of each batch;
    with tp all learn from all of it, each with a part of the model. While a step is under way,
    gradients are those of a rank's own rows; after its last micro-batch, sums over all.
    """

    def __init__(self, name: str, *, timeout: float = 1800.0):
        check_choice("parallel", name, ("ddp", "fsdp", "tp"))
        if isinstance(timeout, bool) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected a finite number above 0, got {timeout!r}")
        self.name = name
        self.has_joined = not dist.is_initialized()
        if self.has_joined:
            _join_torchrun(timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.shares = 1 if name == "tp" else self.world_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: nn.Module | None = None
        self.wrapped: DistributedDataParallel | None = None

    def prepare(self, model: nn.Module, batches: Any, config: TrainingConfig) -> None:
        """Divide the model and the rows of batches, in place; refuse what cannot be divided."""
        if config.batch_size % self.shares:
            expected = f"a multiple of {self.shares} ranks"
            raise ValueError(f"batch_size: expected {expected}, got {config.batch_size}")
        if self.shares > 1:
            if not hasattr(batches, "rank") or not hasattr(batches, "world_size"):
                expected = "a sampler with a rank and a world_size, such as BatchSampler"
                raise ValueError(f"batches: expected {expected}, got {type(batches).__name__}")
            batches.rank, batches.world_size = self.rank, self.shares
            if self.rank:  # dropout differs from rank to rank
                torch.manual_seed(torch.initial_seed() + self.rank)
        if self.name == "tp":
            _check_split(model, self.world_size)
        with torch.no_grad():
            for tensor in model.state_dict().values():  # all begin with the weights of one
                dist.broadcast(tensor, 0)
        self.model = model
        if self.name == "ddp":
            self.wrapped = DistributedDataParallel(ObjectiveModule(model))
        elif self.name == "fsdp":
            shard_by_torch(model)
        else:
            split_by_torch(cast(TransformerLM, model))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the loss of another rank in this block into a ``TrainingError``."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, TrainingError) or (why := _others(error)) is None:
                raise
            again = "the same command goes on from the newest checkpoint"
            raise TrainingError(f"rank {self.rank} of {self.world_size} {why}; {again}") from error

    def leave(self) -> None:
        """Leave the group, if it was joined here."""
        if self.has_joined and dist.is_initialized():
            dist.destroy_process_group()


# %% tags=["engine"]
#| export
def _join_torchrun(timeout: float) -> None:
    if "RANK" not in os.environ:
        command = "torchrun --nproc_per_node=2 -m llmbook.training config.yaml"
        raise ValueError(f"parallel: expected several processes, as in: {command}; got one alone")
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # all on this machine
        for name, value in _loopback().items():
            os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=timedelta(seconds=timeout))


def _others(error: BaseException) -> str | None:
    """Say what an error tells of the other ranks, if anything."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.name for f in frames if f.filename.endswith("distributed_c10d.py")]
    names = [name for name in inside if name.lstrip("_") == name != "wrapper"]
    where = names[0] if names else "the exchange of gradients"
    if "imed out" in str(error):
        return f"waited too long for the others in {where}"
    return f"lost another rank in {where}" if any(text in str(error) for text in _LOST) else None


# %% [markdown] tags=["engine"]
# Next comes a step. `parts` looks one micro-batch ahead, to know which is the last. An evaluation
# deals out whole batches; if their number is uneven, a rank goes through its last one twice and
# counts it once, because a sharded model needs all ranks for every pass.


# %% tags=["engine"]
#| export
class Ranks(Ranks):  # continued
    def call(self, objective: Objective, model: nn.Module, batch: Any) -> Any:
        """Return what ``objective`` finds, so that gradients will be exchanged."""
        if self.wrapped is not None and model is self.model and torch.is_grad_enabled():
            return self.wrapped(objective, batch)
        return objective(model, batch)

    def parts(self, parts: Iterator[Any]) -> Iterator[Any]:
        """Yield the micro-batches of a step, and exchange gradients in the last one only."""
        coming = next(parts, None)
        while coming is not None:
            part, coming = coming, next(parts, None)
            with self._exchanging(coming is None):
                yield part
        if gradients := self._gradients():  # torch's wrappers take the mean over ranks
            torch._foreach_mul_(self.local(gradients), float(self.shares))

    def _exchanging(self, is_last: bool) -> Any:
        if self.name == "fsdp":
            cast(Any, self.model).set_requires_gradient_sync(is_last)
        quiet = self.wrapped is not None and not is_last
        return cast(Any, self.wrapped).no_sync() if quiet else nullcontext()

    def _gradients(self) -> list[Tensor]:
        parameters = cast(nn.Module, self.model).parameters()
        return [p.grad for p in parameters if p.requires_grad and p.grad is not None]

    def total(self, sums: Sums) -> Sums:
        """Return sums over all ranks."""
        if self.shares == 1:
            return sums
        values = [sums.loss, sums.targets, *sums.others.values()]
        numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])
        numbers = numbers.to(self.device)
        dist.all_reduce(numbers)
        if isinstance(sums.loss, Tensor):
            loss, count, *others = numbers.to(sums.loss).unbind()
        else:
            loss, count, *others = numbers.tolist()
        return Sums(loss, count, dict(zip(sums.others, others, strict=True)))

    def added(self, compute: Callable[[Any], Sums], batches: Sequence[Any]) -> Sums:
        """Return the sum of what ``compute`` finds in ``batches``, of which each rank has some.

        A sharded model needs all ranks in every pass: one that has no batch left repeats the last,
        and does not count it.
        """
        total, first = Sums(0.0, 0.0, {}), self.rank % self.shares
        for number in range(first, len(batches) + first, self.shares):
            found = compute(batches[min(number, len(batches) - 1)]).numbers()
            if number >= len(batches):
                found = Sums(0.0, 0.0, dict.fromkeys(found.others, 0.0))
            total = total + found
        return self.total(total)


# %% [markdown] tags=["engine"]
# Some tensors are in pieces. Their norm is that of all pieces: squares of pieces are summed over
# ranks; those of whole tensors, which every rank has, are not. An optimizer gets the two kinds one
# after the other. In float16, an overflow on one rank must be an overflow on all, or their scales
# would differ.


# %% tags=["engine"]
#| export
class Ranks(Ranks):  # continued
    def local(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return what this rank has of some tensors."""
        given = (tensor.detach() for tensor in tensors)
        return [t.to_local() if isinstance(t, DTensor) else t for t in given]

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the norm of all tensors together, those in pieces and those that are whole."""
        squares = torch.stack([t.double().square().sum() for t in self.local(tensors)])
        is_piece = torch.tensor([_is_piece(t) for t in tensors], device=squares.device)
        pieces, wholes = squares[is_piece].sum(), squares[~is_piece].sum()
        if is_piece.any():
            dist.all_reduce(pieces)
        return (pieces + wholes).sqrt().float()

    def clip(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor:
        """Clip gradients by the norm over all ranks, and return it."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = self.norm(gradients) if gradients else torch.zeros((), device=self.device)
        dist.broadcast(norm, 0)  # what is decided by it is decided alike
        if norm.isfinite() and norm > max_norm:
            torch._foreach_mul_(self.local(gradients), max_norm / (norm + 1e-6))
        return norm

    def settle(self, precision: Precision, optimizer: Any, loss: Tensor) -> bool:
        """Let ``precision`` settle gradients; what overflows on one rank has done so on all."""
        if self.name == "ddp" or precision.name != "float16":
            return precision.settle(optimizer, loss)
        pieces = [piece for piece in self.local(self._gradients()) if piece.numel()]
        if self.any(not all(piece.isfinite().all() for piece in pieces)):
            pieces[0].fill_(math.inf)  # on every rank, whether it had one or not
        stand_ins = [nn.Parameter(piece) for piece in pieces]
        for stand_in, piece in zip(stand_ins, pieces, strict=True):
            stand_in.grad = piece
        return precision.settle(torch.optim.SGD(stand_ins), loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take its step: torch's functions on lists want tensors of one kind."""
        if isinstance(optimizer, SGD) and self.name != "ddp":
            optimizer.backend = "reference"  # torch's fused kernel takes no pieces
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for kind in (True, False):
            others = [(p, p.grad) for p in parameters if isinstance(p, DTensor) is not kind]
            for parameter, _ in others:
                parameter.grad = None
            optimizer.step()
            for parameter, gradient in others:
                parameter.grad = gradient

    def update_ratio(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
        """Return the norm of the change of all weights over that of the weights before it."""
        changes = [b.detach() - a for a, b in zip(before, after, strict=True)]
        change, norm = float(self.norm(changes)), float(self.norm(before))
        return change / norm if norm else math.inf


# %% tags=["engine"]
#| export
def _is_piece(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(p.is_shard() for p in tensor.placements)


# %% [markdown] tags=["engine"]
# Whole tensors go into a checkpoint and come out of it, so the file does not know about ranks.


# %% tags=["engine"]
#| export
class Ranks(Ranks):  # continued
    def gathered(self, state: Any) -> Any:
        """Return nested states with whole tensors, on every rank."""
        if isinstance(state, Mapping):
            return {name: self.gathered(value) for name, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.gathered(value) for value in state)
        return state.full_tensor() if isinstance(state, DTensor) else state

    def whole(self, model: nn.Module) -> nn.Module:
        """Return a ``TransformerLM`` with whole weights, on which nothing is exchanged any more."""
        if self.name == "ddp":
            return model
        with torch.random.fork_rng(devices=[]):
            fresh = TransformerLM(cast(TransformerLM, model).config)
        load_model_state(fresh, self.gathered(model_state(model)))
        return fresh

    def load_model(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Give the model this rank's part of a state of whole tensors."""
        own = model_state(model)
        load_model_state(model, {k: _divided_alike(v, own.get(k)) for k, v in state.items()})

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Give the optimizer this rank's part of a state of whole tensors."""
        optimizer.load_state_dict(state)
        for part in getattr(optimizer, "optimizers", [optimizer]):
            for parameter, entries in part.state.items():
                for name, value in entries.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        entries[name] = _divided_alike(value, parameter)


# %% tags=["engine"]
#| export
def _divided_alike(value: Any, pattern: Any) -> Any:
    """Return this rank's part of a tensor, divided like ``pattern``."""
    if not isinstance(pattern, DTensor) or isinstance(value, DTensor):
        return value
    where = pattern.device_mesh, pattern.placements
    return distribute_tensor(value.to(pattern.device), *where, src_data_rank=None)


# %% [markdown] tags=["engine"]
# Some things have to be agreed on. Rank 0 does what only one rank may do, and tells the others what
# came of it, even if it is an error. Random states are kept for each rank; another number of ranks
# cannot draw the same dropout, and gets new states drawn from the first one.


# %% tags=["engine"]
#| export
class Ranks(Ranks):  # continued
    def agreed(self, job: Callable[[], Any]) -> Any:
        """Return what ``job`` returns, or raise what it raises, on rank 0."""
        found: list[Any] = [None, None]
        failed: Exception | None = None
        if self.is_main:
            try:
                found[0] = job()
            except Exception as error:
                found[1] = failed = error
        dist.broadcast_object_list(found, 0)
        if found[1] is not None:
            raise failed or found[1]
        return found[0]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def random_states(self) -> dict[str, Any]:
        """Return the random states of rank 0 and, if they differ, of all ranks."""
        if self.shares == 1:
            return random_states()
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, random_states())
        return {**everyone[0], "ranks": everyone}

    def set_random_states(self, states: Mapping[str, Any]) -> None:
        """Go on where ``random_states`` was called; at another number of ranks, draw new ones."""
        everyone = states.get("ranks", [])
        if len(everyone) == self.shares > 1:
            return set_random_states(everyone[self.rank])
        set_random_states(states)
        if self.shares > 1 and self.rank:
            torch.manual_seed(int(torch.randint(2**62, ())) + self.rank)
        return None


# %% tags=["engine"]
def losses(way: str | None) -> list[float]:
    """Train the tiny model for 20 steps, and return the loss of each."""
    ids = np.random.default_rng(0).integers(64, size=4000) // 2 * 2  # even ones, which is learned
    settings: dict[str, Any] = {"n_steps": 20, "batch_size": 8, "micro_batch_size": 2}
    settings |= {"learning_rate": 0.01, "log_every": 1, "parallel": way}
    batches = BatchSampler(ids, settings["batch_size"], 32)
    trainer = Trainer(tiny_model(), batches, TrainingConfig(**settings))
    return [float(loss) for loss in trainer.train().column("loss")[1]]


# %% [markdown]
# ### The same curve
#
# The room's `losses` trains a tiny model for twenty steps, with four micro-batches in a step on one
# process and two on each of two ranks (all four on both with `tp`, which divides the model and not
# the batch). How far apart are the curves?

# %%
alone = losses(None)
for way in ("ddp", "fsdp", "tp"):
    apart = max(abs(a - b) for a, b in zip(alone, launch(losses, 2, way)[0], strict=True))
    size = "less than 0.0001" if apart < 1e-4 else f"{apart:.4f}"
    print(f"{way:4}: {alone[0]:.1f} to {alone[-1]:.1f} nats, apart from one process by {size}")

# %% [markdown]
# They agree. But a curve is a weak test, and a kill is a strong one. `benchmarks/killing_ranks.py`
# trains with dropout on two ranks, kills one of them by SIGKILL at a random moment, twenty times
# over, and starts again each time. Weights, optimizer, random states of both ranks, best model, and
# log must then be those of an undisturbed run. After twenty kills, eight of them in the middle of a
# save, not a bit differed, and every attempt had ended within 8 seconds.

# %% [markdown]
# ## How to prove a new scheme right
#
# We believe a new scheme once it has been *compared with one that we already believe*, from the
# same start and on the same data. Torchtitan's developers [compare loss
# curves](https://github.com/pytorch/torchtitan/blob/main/docs/converging.md) of 3,000 steps. Here,
# curves come last, because they are the weakest witness. Take the wrapper that averages, in the
# setting of the table above, and look at its losses and at its gradient norm:

# %%
averaging = partial(run_scheme, reduction="mean")
wrong = launch(averaging, 2, "data_parallel", config, batches)[0]
apart = max(abs(a - b) for a, b in zip(wrong.losses, control.losses, strict=True))
print(f"largest difference of the losses: {'below 0.02' if apart < 0.02 else 'large'}")
print(f"first gradient norm: {wrong.norms[0] / control.norms[0]:.3f} of the control's")

# %% [markdown]
# The losses look right, and the norm is half of what it should be. So the protocol goes from the
# sharpest and cheapest check to the dullest and most expensive:
#
# 1. **One operation.** Each collective and its backward pass equal the formula on small tensors, in
#    float64, of sizes that do not divide evenly.
# 2. **One gradient.** From a common start, every gradient equals that of one process up to
#    rounding, with unequal targets, micro-batches, and weights that are tied, frozen, or used by
#    one rank only.
# 3. **A few steps.** With clipping and decay, weights and norms stay equal, and all ranks have the
#    same bits. Ranks start from *different* seeds, so that a missing broadcast shows.
# 4. **Cost.** Bytes sent and bytes kept equal the formula.
# 5. **Failure.** A rank that dies, is late, or has other data ends all ranks with a message. A run
#    that was killed resumes as if it had not been.
# 6. **Faults put in.** Average instead of summing, or leave out the broadcast: a check above must
#    notice.
# 7. **Curves.** Only now comes a real run on the same data, with the old scheme as control and at
#    least two seeds of it, because only a difference larger than between seeds means something.
#
# This chapter and its tests do steps 1 to 6, on a laptop, before anybody pays for a GPU.

# %% [markdown]
# ## The data pipeline on an engine
#
# The data can be divided, too. Chapters 02 to 05 read, clean, and deduplicate text and count its
# words for a tokenizer; {doc}`07_batches` writes its tokens to shards. For the 33,000 documents of
# three packages, one process needs 21 seconds. A crawl of the web needs many processes, some slow,
# some dying. The result should show none of this: **the same bytes as from one process.**
#
# Most steps are easy to divide, because they look at one document at a time. Three look at
# documents that may lie anywhere: at a line that another document has, at a near copy, and at a
# word that occurs in both. What these documents have in common is a **key**: the line, a band of
# the MinHash signature ({doc}`04_deduplication`), the word. If everything with the same key goes to
# one process, this process sees all that it needs.

# %% tags=["engine"]
#| export
# What a pipeline on an engine needs besides
import json
import logging
import platform
from collections import defaultdict
from dataclasses import asdict, replace
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from typing import Annotated

from filelock import FileLock, Timeout
from jaxtyping import UInt32, UInt64

from llmbook.batches import TokenShards, write_shards
from llmbook.cleaning import gopher_quality, mask_pii, normalize_text, remove_license
from llmbook.cleaning import remove_repeated_lines
from llmbook.corpus import Document, iter_texts, read_files, read_installed_docs
from llmbook.corpus import read_jsonl, ReadReport, write_jsonl
from llmbook.deduplication import canonical_text, jaccard, MinHasher, optimal_bands, shingles
from llmbook.deduplication import UnionFind
from llmbook.environment import check_fraction
from llmbook.environment import check_text, requires_extra
from llmbook.environment import whole_file
from llmbook.tokenizer import GPT2_PATTERN, GPT4_PATTERN, BPETokenizer, count_words
from llmbook.tokenizer import learn_merges
from llmbook.training import settings_parser


# %% [markdown]
# So two functions describe a step. `emit` looks at one part of the data and yields values, each
# with the number of the box that it is meant for; `reduce` looks at all values of one box. Moving
# them there, the *shuffle*, is the only communication. This is MapReduce {cite}`dean2008mapreduce`,
# and in one process it takes five lines:


# %%
#| export
def map_reduce(
    items: Iterable[Any],
    emit: Callable[[Any], Iterable[tuple[int, Any]]],
    reduce: Callable[[int, list[Any]], Iterable[Any]],
) -> list[Any]:
    """Call ``emit`` on each item, ``reduce`` on each box of values. Dean and Ghemawat (2008)."""
    boxes: dict[int, list[Any]] = defaultdict(list)
    for item in items:
        for box, value in _as_pairs(emit(item)):  # else refused: see the room below
            boxes[box].append(value)
    return [result for box, values in boxes.items() for result in reduce(box, values)]


# %% [markdown]
# A key must belong to the same box in every process. Python's `hash` of a text starts from a random
# number in each process ({doc}`00_environment`), so a pipeline that used it would run without an
# error and find hardly any copies. We hash by BLAKE2 instead and call the result, a whole number
# $h$ below $2^{64}$, the *place* of a text. Of $n$ boxes, its box is number
# $\lfloor hn / 2^{64} \rfloor$.
#
# ### Order, and a worker that dies
#
# On an engine, values may arrive in any order. A task whose process died is run again, so its first
# half may run twice. Under these conditions, a step gives the same bytes if it obeys three rules:
#
# 1. **Nothing depends on the order of arrival.** `reduce` sorts. *First* means first by place, and
#    the corpus is ordered by place, a shuffle that does not depend on the number of boxes.
# 2. **A file has one name and appears whole.** A task renames its draft to the name of its box. If
#    it dies before that, nothing is there; if it runs twice, the second file equals the first. So a
#    preparation that was stopped can also go on where it was.
# 3. **Emitting changes nothing else.** The values of a failed attempt can then be thrown away.
#
# As a check, the room below runs {py:func}`~llmbook.distributed.prepare` in order and on the worst
# engine allowed, which takes items and values in random order, and lets every third item die after
# its first value and start again. All files of tokens were equal to the byte.

# %% [markdown] tags=["engine"]
# ### Engine room: places and boxes, two copies that meet, and the worst engine allowed


# %% tags=["engine"]
#| export
# What emit has to yield
def _as_pairs(emitted: Any) -> Iterator[tuple[Any, Any]]:
    expected = "emit: expected one that yields pairs of a box and a value, got"
    if not isinstance(emitted, Iterable):
        raise ValueError(f"{expected} {emitted!r:.60}")
    for pair in emitted:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{expected} {pair!r:.60}")
        yield pair[0], pair[1]


# %% tags=["engine"]
#| export
# The place of a text, and its box
def stable_hash(text: str) -> int:
    """Return a whole number from 0 below 2**64 that is the same for ``text`` in every process.

    >>> stable_hash("Dough rises.")
    4481164271127257053
    """
    return int.from_bytes(blake2b(check_text(text).encode(), digest_size=8).digest(), "big")


def box_of(place: int, n_boxes: int) -> int:
    """Return the box of a ``place`` below 2**64: places in order fill ``n_boxes`` in order.

    >>> [box_of(place, 4) for place in (0, 2**62, 2**63, 2**64 - 1)]
    [0, 1, 2, 3]
    """
    check_whole("place", place, 0, 2**64 - 1)
    check_whole("n_boxes", n_boxes, 1)
    return int(place) * n_boxes >> 64


# %% [markdown] tags=["engine"]
# For near-duplicates, the hash of a band's number and its rows is the key
# ({doc}`04_deduplication`). Two documents that agree in a band meet in its box, whichever parts
# they came from:


# %% tags=["engine"]
#| export
# The keys of the bands
def band_keys(
    signatures: UInt32[np.ndarray, "documents permutations"], bands: int, rows: int
) -> UInt64[np.ndarray, "documents bands"]:
    """Return one key for each band of each document: equal ones agree in all rows of that band.

    Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.
    """
    check_whole("bands", bands, 1)
    check_whole("rows", rows, 1)
    if signatures.shape[1] < bands * rows:
        most = f"at most {signatures.shape[1]} permutations"
        raise ValueError(f"bands, rows: expected {most} in all, got {bands} times {rows}")
    cut = np.ascontiguousarray(signatures[:, : bands * rows], "<u4").reshape(-1, bands, rows)
    keys = [[stable_hash(f"{b} {row.tobytes().hex()}") for b, row in enumerate(d)] for d in cut]
    return np.array(keys, np.uint64).reshape(len(signatures), bands)


# %% tags=["engine"]
parts = [
    {"a1": "Mix the flour with water and salt, wait for an hour, then bake it.", "a2": "Yeast."},
    {"b1": "Let it rest.", "b2": "Mix the flour with water and salt, wait for an hour, then bake."},
]


def emit(part):
    signatures = MinHasher(n=3).signatures(part.values())
    for name, keys in zip(part, band_keys(signatures, 32, 4).tolist(), strict=True):
        yield from ((box_of(key, 8), (key, name)) for key in keys)


def meet(box, values):
    for key in {key for key, _ in values}:
        yield from combinations(sorted(name for k, name in values if k == key), 2)


print(set(map_reduce(parts, emit, meet)))

# %% [markdown] tags=["engine"]
# The two recipes lie in different parts, and neither part has seen the other. The rest is as in
# chapter 04: the candidates' texts go to a box once more, which computes their similarity;
# union-find joins the similar ones, and the longest of each cluster stays.
#
# All steps have this form:
#
# | step | looks at | key | leaves behind |
# |---|---|---|---|
# | read | a file or a package | the document's id | documents in boxes |
# | normalize | a box | each line | the first owner of each repeated line |
# | clean | a box | band keys | candidate pairs |
# | compare | candidates | the pair's first id | similar pairs, hence survivors |
# | unique | a box of survivors | the word | word counts, hence merges |
# | encode | a box of survivors | none | token ids, hence shards |
#
# Now comes the worst engine that the rules allow:

# %% tags=["engine"]
# The worst engine that is still allowed
import random

dice = random.Random(0)


def chaos(items, emit, reduce):
    boxes, items = defaultdict(list), list(items)
    for number, item in enumerate(dice.sample(items, len(items))):
        if number % 3 == 0:
            next(iter(emit(item)), None)  # dies after its first value
        for box, value in emit(item):
            boxes[box].append(value)
    return [r for box in boxes for r in reduce(box, dice.sample(boxes[box], len(boxes[box])))]


# %% tags=["engine"]
from llmbook.distributed import PrepareConfig, prepare

folder = Path(tempfile.mkdtemp())
sources = ["package:asyncio", "package:email"]
tidy = prepare(sources, folder / "tidy", PrepareConfig(vocab_size=600, n_boxes=4))
prepare(sources, folder / "messy", PrepareConfig(vocab_size=600, n_boxes=7), engine=chaos)
files = [path.relative_to(tidy.folder) for path in tidy.folder.glob("*/shard-*.bin")]
same = [(tidy.folder / p).read_bytes() == (folder / "messy" / p).read_bytes() for p in files]
print(f"{sum(same)} of {len(same)} files of tokens are equal to the byte")
assert len(same) == 2 and all(same)

# %% [markdown]
# ### The same steps on Ray
#
# Ray {cite}`moritz2018ray` runs workers on one machine or many, moves data between them, and runs
# again what died. Its library Ray Data has our engine in three calls, which
# {py:class}`~llmbook.distributed.RayEngine` wraps:
#
# ```python
# data = ray.data.from_items(items).flat_map(emit)
# data.groupby("box").map_groups(reduce).take_all()
# ```
#
# The tests prepare a small corpus on two workers, and again while one worker is killed as it reads
# and another as it cleans: nothing was lost, nothing was doubled, and all files were equal to the
# byte to those of one process. `python benchmarks/prepare.py --kill` does the same with the
# documentation of three packages, and found 19 of 19 files equal:
#
# | seconds | one process | Ray, 2 workers | the same, 2 killed |
# |---|--:|--:|--:|
# | to read | 7 | 11 | 10 |
# | to clean | 7 | 7 | 11 |
# | in all | 21 | 29 | 31 |
#
# So on two cores, Ray gains nothing: each worker first imports this package, and PyTorch with it;
# all values are written out and read again on their way; and Ray's own processes need the same
# cores. What it offers here is that two deaths cost two seconds and no file. In time, it pays only
# where the work of a step is long beside these fixed costs: with hours of it, on more cores than
# these, or on several machines.

# %% [markdown] tags=["engine"]
# ### Engine room: files that appear once, errors that say where, and reading into boxes

# %% [markdown] tags=["engine"]
# A box of documents is a file of JSON Lines, sorted by place. What is there is read and not made
# again; resuming takes nothing more. An empty box is an empty file, so a missing one always means
# work to be done.


# %% tags=["engine"]
#| export
# Boxes of documents as files
def _path(folder: str, step: str, box: int, suffix: str = "jsonl") -> Path:
    return Path(folder, step, f"box-{box:05d}.{suffix}")


def _in_box(path: Path) -> list[Document]:
    return list(read_jsonl(path, errors="strict")) if path.stat().st_size else []


def _by_place(id: str) -> tuple[int, str]:
    return stable_hash(id), id


def _once(path: Path, make: Callable[[], Iterable[Document]]) -> list[Document]:
    """Return the documents in a file; where it is missing, make and write them, in order."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if documents := sorted(make(), key=lambda document: _by_place(document.id)):
            write_jsonl(documents, path)
        else:
            with whole_file(path) as draft:
                draft.touch()
    return _in_box(path)


def _size(documents: Collection[Document]) -> dict[str, int]:
    """What a step reports of a box, among the values that it returns."""
    return {"documents": len(documents), "characters": sum(len(d.text) for d in documents)}


# %% [markdown] tags=["engine"]
# An error in a worker has to say where it happened: a file that lies on one machine and not on
# another can be found only there.


# %% tags=["engine"]
#| export
# Errors of a step
class StepError(ValueError):
    """A step of a preparation failed; the message names the step, what it worked at, and where."""


def _emitting(item: Any, step: str, emit: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    try:
        yield from emit(item)
    except (OSError, ValueError) as error:
        raise _failure(step, item if isinstance(item, str) else f"box {item}", error) from error


def _reducing(
    box: int, values: list[Any], step: str, reduce: Callable[[int, list[Any]], Iterable[Any]]
) -> Iterator[Any]:
    try:
        yield from reduce(box, values)
    except (OSError, ValueError) as error:
        raise _failure(step, f"box {box}", error) from error


def _failure(step: str, where: str, error: Exception) -> StepError:
    return StepError(f"{step}: {where}: {error} (on the machine {platform.node()})")


# %% [markdown] tags=["engine"]
# A source is a package, a file, or a folder, whose files are found before the work is divided. The
# id of a file's document is its path from the folder, as in `read_files`. The same file named twice
# is read once; two texts with one id are refused. What cannot be read is counted and reported.

# %% tags=["engine"]
#| export
# Which sources there are
_PACKAGE = "package:"


def _listed(sources: Iterable[str | Path]) -> list[tuple[str, str, str]]:
    """Return (source, what its ids begin with, fingerprint) of all packages and files, in order."""
    if isinstance(sources, str | Path):
        raise ValueError(f"sources: expected a list of them, got {sources!r:.60}")
    if not (asked := list(sources)):
        raise ValueError("sources: expected at least one file, folder or package, got none")
    found: dict[str, tuple[str, str]] = {}
    for source in asked:
        if str(source).startswith(_PACKAGE):
            name = str(source).removeprefix(_PACKAGE)
            read_installed_docs(name)  # complains of an unknown name; nothing is read yet
            found[str(source)] = ("", _version(name))
        else:
            given = check_path(source, "sources")
            if not given.exists():
                raise FileNotFoundError(f"sources: no file or folder {str(source)!r}")
            for path, prefix in _files(given.resolve()):
                about = path.stat()
                found[str(path)] = (prefix, f"{about.st_size} bytes, {about.st_mtime_ns}")
    if not found:
        raise ValueError(f"sources: expected files of text, got {[str(s) for s in asked]}")
    return [(source, *found[source]) for source in sorted(found)]


# %% tags=["engine"]
#| export
def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that can be read at or under ``path``, and the folders between."""
    if not path.is_dir():
        read_files(path)  # complains of a suffix that it does not know
        yield path, ""
        return
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            with suppress(ValueError):
                read_files(file)
                yield file, "".join(f"{part}/" for part in inside.parts[:-1])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # the standard library, or a module of another name
        return platform.python_version()


# %% tags=["engine"]
#| export
# Read
def _read(source: str, prefixes: Mapping[str, str], n_boxes: int) -> Iterator[tuple[int, Any]]:
    """Yield the documents of a source, and what could not be read, as problems."""
    report, documents = ReadReport(), list[Document]()
    try:
        if source.startswith(_PACKAGE):
            name = source.removeprefix(_PACKAGE)
            documents += read_installed_docs(name, workers=1, report=report)
        else:
            documents += read_files(source, report=report)
    except ValueError:
        if not report.problems:  # else there is nothing in it that can be read, and we say why
            raise
    prefix, name = prefixes[source], Path(source).name
    for document in documents:
        if document.id == name or document.id.startswith(f"{name}:"):
            document = replace(document, id=prefix + document.id, source=prefix + document.source)
        yield box_of(stable_hash(document.id), n_boxes), vars(document)
    for problem in report.problems:
        yield 0, {"problem": f"{prefix}{problem}"}


# %% tags=["engine"]
#| export
def _write_read(box: int, values: list[Any], folder: str) -> Iterator[Any]:
    found: dict[str, Document] = {}
    for value in values:
        if "problem" in value:
            yield value
            continue
        document, known = Document(**value), found.get(value["id"])
        if known is not None and known.text != document.text:
            raise ValueError(f"sources: two different texts have the id {document.id!r}")
        both = [document] if known is None else [document, known]
        found[document.id] = min(both, key=lambda d: json.dumps(vars(d), sort_keys=True))
    yield _size(_once(_path(folder, "read", box), found.values))


# %% [markdown]
# ### Lines and copies
#
# The steps themselves follow the rules of {doc}`03_cleaning` and {doc}`04_deduplication`. A line
# that several documents have stays with its first owner. Near copies meet in the box of a band, and
# of each cluster of copies the longest document stays. The room below has these steps.

# %% [markdown] tags=["engine"]
# ### Engine room: cleaning with the lines of others, pairs, and who stays

# %% [markdown] tags=["engine"]
# The order of steps is that of `clean_documents`. Its one step that looks beyond a document is
# `remove_repeated_lines`. To apply it to one document, we call it with two: a text made of the
# lines that belong to others, and the document.


# %% tags=["engine"]
#| export
# Normalize, and find who owns a line
def _edited(documents: Iterable[Document], edit: Callable[[str], str]) -> Iterator[Document]:
    for document in documents:
        if (text := edit(document.text)).strip():
            yield replace(document, text=text)


def _line_keys(text: str, min_length: int) -> dict[int, str]:
    """Return the lines of a text by the hash of their words in lower case, without short ones."""
    plain = ((line, " ".join(line.lower().split())) for line in text.splitlines())
    return {stable_hash(key): line for line, key in plain if key and len(key) >= min_length}


def _normalize(box: int, folder: str, config: "PrepareConfig") -> Iterator[tuple[int, Any]]:
    def make() -> Iterator[Document]:
        normal = _edited(_in_box(_path(folder, "read", box)), normalize_text)
        return _edited(normal, remove_license)

    documents = _once(_path(folder, "normalize", box), make)
    yield box, _size(documents)
    for document in documents:
        for key in _line_keys(document.text, config.min_line_length):
            yield box_of(key, config.n_boxes), [key, document.id]


# %% tags=["engine"]
#| export
def _first_owners(box: int, values: list[Any]) -> Iterator[Any]:
    """Yield [key, id] of the first document with a line that several have."""
    owners: dict[int, list[str]] = defaultdict(list)
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            owners[value[0]].append(value[1])
    for key, ids in owners.items():
        if len(ids) > 1:
            yield [key, min(ids, key=_by_place)]


# %% tags=["engine"]
#| export
# Clean, and send the keys of the bands
def _cleaned(
    documents: Iterable[Document], config: "PrepareConfig", owners: Mapping[int, str]
) -> Iterator[Document]:
    for document in documents:
        lines = _line_keys(document.text, config.min_line_length)
        foreign = [
            line for key, line in lines.items() if owners.get(key, document.id) != document.id
        ]
        group = [Document("\n".join(foreign)), document] if foreign else [document]
        left = list(remove_repeated_lines(group, min_length=config.min_line_length))
        for found in left[len(group) - 1 :]:
            if not gopher_quality(found.text, min_words=config.min_words, min_stop_words=None):
                yield from _edited([found], lambda text: mask_pii(text, keep_private=True).text)


def _clean(
    box: int, folder: str, config: "PrepareConfig", owners: Mapping[int, str]
) -> Iterator[tuple[int, Any]]:
    source = _path(folder, "normalize", box)
    documents = _once(
        _path(folder, "clean", box), lambda: _cleaned(_in_box(source), config, owners)
    )
    yield box, _size(documents)
    bands, rows = optimal_bands(config.threshold, MinHasher().n_permutations)
    keys = band_keys(MinHasher().signatures(documents), bands, rows)
    for document, row in zip(documents, keys.tolist(), strict=True):
        plain = canonical_text(document.text)
        for key in row:
            yield box_of(key, config.n_boxes), [key, document.id, stable_hash(plain), len(plain)]


# %% [markdown] tags=["engine"]
# Exact copies agree in all bands. In each bucket, the first of them stands for all, so a text with
# a thousand copies makes a thousand links instead of half a million pairs. In a bucket with more
# than a thousand different texts, each is compared only with the first. The pairs go to the driver,
# the process that runs the steps. At the size of a crawl, union-find would need an engine of its
# own.

# %% tags=["engine"]
#| export
# Pairs of candidates
_ALL_PAIRS_UP_TO = 1000


def _pairs(box: int, values: list[Any]) -> Iterator[Any]:
    """Yield [is a copy, first id, second id, lengths] of documents that share a key, each once."""
    buckets: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            buckets[value[0]].append(tuple(value[1:]))
    found = set()
    for bucket in buckets.values():
        first: dict[int, tuple[str, int, int]] = {}
        for member in sorted(bucket, key=lambda member: _by_place(member[0])):
            one = first.setdefault(member[1], member)
            if one is not member:
                found.add((True, one[0], member[0], one[2], member[2]))
        different = list(first.values())
        several = combinations(different, 2)
        if len(different) > _ALL_PAIRS_UP_TO:
            several = ((different[0], other) for other in different[1:])  # type: ignore[assignment]
        found |= {(False, a[0], b[0], a[2], b[2]) for a, b in several}
    yield from map(list, sorted(found))


# %% tags=["engine"]
#| export
# Compare them, and choose
_Pairs = Sequence[tuple[str, str]]


def _lend(box: int, folder: str, pairs: _Pairs, n_boxes: int) -> Iterator[tuple[int, Any]]:
    """Send the texts of candidates to where their pairs are compared."""
    boxes: dict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        for id in pair:
            boxes[id].add(box_of(stable_hash(pair[0]), n_boxes))
    for document in _in_box(_path(folder, "clean", box)):
        for to in sorted(boxes.get(document.id, ())):
            yield to, [document.id, document.text]


def _similar(
    box: int, values: list[Any], pairs: _Pairs, threshold: float, n_boxes: int
) -> Iterator[Any]:
    texts: dict[str, str] = dict(values)
    cut = cache(lambda id: shingles(texts[id]))
    for a, b in pairs:
        if box_of(stable_hash(a), n_boxes) == box and jaccard(cut(a), cut(b)) >= threshold:
            yield [a, b]


# %% tags=["engine"]
#| export
def _not_kept(links: Iterable[Sequence[str]], lengths: Mapping[str, int]) -> list[str]:
    """Return the ids of all but the best of each cluster: the longest, and the first of equals."""
    ids = sorted(lengths, key=_by_place)
    number, forest = {id: i for i, id in enumerate(ids)}, UnionFind(len(ids))
    for a, b in links:
        forest.union(number[a], number[b])
    best = {max(c, key=lambda i: (lengths[ids[i]], -i)): c for c in forest.clusters()}
    return sorted(ids[i] for kept, cluster in best.items() for i in cluster if i != kept)


# %% [markdown]
# ### Words, tokens, and all steps in order
#
# What survives is counted, encoded, and written. Equal words meet in one box and are added up
# there; from the counts, one process learns the merges of the tokenizer. Then each box is encoded
# by itself, and one process writes the shards, since these have an order.

# %% [markdown] tags=["engine"]
# ### Engine room: counting and encoding, the manifest, and a preparation that goes on

# %% [markdown] tags=["engine"]
# Documents with the smallest places are held out: no tokenizer learns from them, and their tokens
# become shards of their own. Shards have an order, so one process writes them, from ids that the
# workers have encoded.

# %% tags=["engine"]
#| export
# Count words, encode
_SPECIAL = ("<|endoftext|>",)
_PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}


def _count(
    box: int, folder: str, config: "PrepareConfig", dropped: Collection[str]
) -> Iterator[tuple[int, Any]]:
    source = _path(folder, "clean", box)
    documents = _once(
        _path(folder, "unique", box), lambda: (d for d in _in_box(source) if d.id not in dropped)
    )
    yield box, _size(documents)
    learned = [document for document in documents if not config.holds_out(document.id)]
    for word, n in count_words(learned, _PATTERNS[config.pattern], _SPECIAL).items():
        yield box_of(stable_hash(word), config.n_boxes), [word, n]


def _summed_counts(box: int, values: list[Any]) -> Iterator[Any]:
    counts: Counter[str] = Counter()
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            counts[value[0]] += value[1]
    yield from map(list, counts.items())


# %% tags=["engine"]
#| export
def _encode(
    box: int, folder: str, config: "PrepareConfig", tokenizer: BPETokenizer
) -> Iterator[tuple[int, Any]]:
    path, documents = _path(folder, "encode", box, "npz"), _in_box(_path(folder, "unique", box))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [np.array(tokenizer.encode(text), np.uint32) for text in iter_texts(documents)]
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez(
                file,
                ids=np.concatenate([np.empty(0, np.uint32), *rows]),
                sizes=np.array([len(row) for row in rows], np.int64),
                held_out=np.array([config.holds_out(d.id) for d in documents], bool),
            )
    yield box, _size(documents)


def _encoded(folder: Path, n_boxes: int, held_out: bool) -> Iterator[np.ndarray]:
    """Yield the ids of each document, in order, of those that are held out or of the others."""
    for box in range(n_boxes):
        with np.load(_path(str(folder), "encode", box, "npz"), allow_pickle=False) as found:
            ends = np.cumsum(found["sizes"])
            rows = np.split(found["ids"], ends[:-1]) if len(ends) else []
            yield from (
                r for r, out in zip(rows, found["held_out"], strict=True) if out == held_out
            )


# %% [markdown] tags=["engine"]
# The manifest has the settings, the sources with their sizes and times of change, and the counts of
# each step. It is written first, so that a folder knows what it is for: the same command goes on,
# and a different one is refused.


# %% tags=["engine"]
#| export
# The settings
@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How text becomes tokens. The result does not depend on ``n_boxes``."""

    vocab_size: Annotated[int, "of the tokenizer that is trained, special tokens included"] = 8192
    pattern: Annotated[str, "how it splits text into words: gpt2 or gpt4"] = "gpt4"
    min_words: Annotated[int, "a document of fewer words is dropped"] = 5
    min_line_length: Annotated[int, "a repeated line of fewer characters stays"] = 30
    threshold: Annotated[float, "Jaccard similarity from which documents are near-duplicates"] = 0.8
    held_out: Annotated[float, "share of the documents that validate"] = 0.01
    shard_tokens: Annotated[int, "tokens in a shard"] = 50_000_000
    n_boxes: Annotated[int, "into how many parts the work is divided"] = 16

    def __post_init__(self) -> None:
        check_whole("vocab_size", self.vocab_size, 256 + len(_SPECIAL), 1_000_000)
        check_choice("pattern", self.pattern, tuple(_PATTERNS))
        for name in ("min_words", "min_line_length"):
            check_whole(name, getattr(self, name), 0)
        for name in ("shard_tokens", "n_boxes"):
            check_whole(name, getattr(self, name), 1)
        check_fraction("held_out", self.held_out)
        optimal_bands(self.threshold)

    def holds_out(self, id: str) -> bool:
        """Say whether the document with this ``id`` is held out: by its place alone."""
        return stable_hash(id) < self.held_out * 2**64


# %% tags=["engine"]
#| export
# The result, and what a run of the steps knows
class Prepared(NamedTuple):
    """What ``prepare`` left in ``folder``: documents by step, problems, and tokens of the shards.

    ``train/`` and ``validation/`` are shards (no document may be held out in a small corpus),
    ``tokenizer.json`` is the tokenizer, ``unique/`` has the documents.
    """

    folder: Path
    counts: dict[str, int]
    characters: dict[str, int]
    problems: list[str]
    tokens: dict[str, int]


# %% tags=["engine"]
#| export
@dataclass
class _Run:
    folder: Path
    config: PrepareConfig
    engine: Callable[..., list[Any]]
    say: Callable[[str], None]
    manifest: dict[str, Any]

    def step(self, name: str, items: Iterable[Any], emit: Any, reduce: Any) -> list[Any]:
        """Run one step; note its counts, return its other values."""
        start, values, sums = time.perf_counter(), list[Any](), Counter[str]()
        emit, reduce = (
            partial(_emitting, step=name, emit=emit),
            partial(_reducing, step=name, reduce=reduce),
        )
        for value in self.engine(items, emit, reduce):
            if isinstance(value, dict) and "documents" in value:
                sums.update(value)
            else:
                values.append(value)
        seconds = time.perf_counter() - start
        if sums:
            self.manifest["steps"][name] = dict(sums)
        told = (
            f"{sums['documents']:,} documents, {sums['characters']:,} characters, " if sums else ""
        )
        self.say(f"{name}: {told}{seconds:.1f} s")
        return values

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what a file of JSON holds; where it is missing, make and write it, with counts."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            found = {"found": make(), "steps": self.manifest["steps"]}
            with whole_file(path) as draft:
                draft.write_text(json.dumps(found), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        self.manifest["steps"] |= found["steps"]
        return found["found"]


# %% tags=["engine"]
#| export
# Steps one after the other
def _survivors(run: _Run) -> list[str]:
    """Read, normalize and clean; return the ids of documents that are copies of better ones."""
    folder, config, boxes = str(run.folder), run.config, range(run.config.n_boxes)
    prefixes = {source: prefix for source, prefix, _ in run.manifest["sources"]}

    def read() -> list[str]:
        emit = partial(_read, prefixes=prefixes, n_boxes=config.n_boxes)
        problems = run.step("read", list(prefixes), emit, partial(_write_read, folder=folder))
        for box in boxes:  # nothing was sent to some of them
            _once(_path(folder, "read", box), list)
        return sorted(problem["problem"] for problem in problems)

    def lines() -> list[list[Any]]:
        emit = partial(_normalize, folder=folder, config=config)
        return sorted(run.step("normalize", boxes, emit, _first_owners))

    def copies() -> list[str]:
        emit = partial(_clean, folder=folder, config=config, owners=dict(owners))
        found = sorted({tuple(pair) for pair in run.step("clean", boxes, emit, _pairs)})
        pairs = [(a, b) for copy, a, b, *_ in found if not copy]
        lengths = {id: size for _, a, b, m, n in found for id, size in ((a, m), (b, n))}
        lend = partial(_lend, folder=folder, pairs=pairs, n_boxes=config.n_boxes)
        similar = partial(_similar, pairs=pairs, threshold=config.threshold, n_boxes=config.n_boxes)
        near = run.step("compare", boxes, lend, similar) if pairs else []
        return _not_kept([*near, *((a, b) for copy, a, b, *_ in found if copy)], lengths)

    run.kept("problems", read)
    owners = run.kept("lines", lines)
    return run.kept("copies", copies)


# %% tags=["engine"]
#| export
def _tokens(run: _Run, dropped: list[str]) -> dict[str, int]:
    """Count, learn, encode and write shards; return the number of tokens of each kind."""
    folder, config, boxes = str(run.folder), run.config, range(run.config.n_boxes)
    pattern = _PATTERNS[config.pattern]

    def learn() -> list[list[str]]:
        emit = partial(_count, folder=folder, config=config, dropped=frozenset(dropped))
        counts = dict(run.step("unique", boxes, emit, _summed_counts))
        if not counts:
            raise ValueError("sources: expected some text to learn from, got none after cleaning")
        merges = learn_merges(counts, config.vocab_size - 256 - len(_SPECIAL))
        return [[a.hex(), b.hex()] for a, b in merges]

    merges = [(bytes.fromhex(a), bytes.fromhex(b)) for a, b in run.kept("merges", learn)]
    tokenizer = BPETokenizer.from_merges(merges, _SPECIAL, pattern=pattern)
    tokenizer.save(run.folder / "tokenizer.json")
    emit = partial(_encode, folder=folder, config=config, tokenizer=tokenizer)
    run.step("encode", boxes, emit, lambda box, values: values)
    tokens = {}
    for name, held_out in (("train", False), ("validation", True)):
        rows = _encoded(run.folder, config.n_boxes, held_out)
        if next(_encoded(run.folder, config.n_boxes, held_out), None) is not None:
            if not (run.folder / name).exists():
                write_shards(rows, run.folder / name, tokenizer, shard_tokens=config.shard_tokens)
            tokens[name] = len(TokenShards(run.folder / name, tokenizer))
    return tokens


# %% tags=["engine"]
#| export
# Everything
def _claim(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a folder, which is new or was made for the same."""
    path = folder / "manifest.json"
    if not path.exists():
        if any(p.name != ".lock" for p in folder.iterdir()):
            raise ValueError(f"folder: expected a new or an empty one, got {str(folder)!r}")
        _write_manifest(folder, wanted | {"steps": {}})
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("config", "sources"):
        if found.get(name) != wanted[name]:
            other = f"other {'settings' if name == 'config' else 'sources, or they have changed'}"
            raise ValueError(f"folder: {str(folder)!r} was prepared with {other}: take a new one")
    return found


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / "manifest.json") as draft:
        draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


# %% tags=["engine"]
#| export
def prepare(
    sources: Iterable[str | Path],
    folder: str | Path,
    config: PrepareConfig | None = None,
    *,
    engine: Callable[..., list[Any]] = map_reduce,
    say: Callable[[str], None] | None = None,
) -> Prepared:
    """Read, clean, deduplicate and encode ``sources`` into ``folder``, by any ``engine``.

    A source is a file, a folder, or "package:NAME" for installed documentation. Every engine that
    does what ``map_reduce`` does, in whatever order, leaves the same files. What is there is not
    done again, so the same call goes on after a kill. A ``StepError`` says which step failed at
    what and where, a ``ValueError`` that the folder was made for something else. Workers on other
    machines must see sources and ``folder`` under the same paths. ``say`` is told of each step.
    """
    config = PrepareConfig() if config is None else config
    say = (lambda line: None) if say is None else say
    for name, value, fits in (
        ("config", config, isinstance(config, PrepareConfig)),
        ("engine", engine, callable(engine)),
        ("say", say, callable(say)),
    ):
        if not fits:
            kind = "a PrepareConfig" if name == "config" else "a function"
            raise ValueError(f"{name}: expected {kind}, got {value!r:.60}")
    wanted = {"config": asdict(config), "sources": [list(s) for s in _listed(sources)]}
    folder = check_path(folder, "folder").resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: expected a folder, got the file {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            run = _Run(folder, config, engine, say, _claim(folder, wanted))
            if "tokens" not in run.manifest:
                for draft in folder.glob("*/.*.part"):  # of workers that were killed
                    draft.unlink()
                run.manifest["tokens"] = _tokens(run, _survivors(run))
                run.manifest["problems"] = run.kept("problems", list)
                _write_manifest(folder, run.manifest)
                for step in ("read", "normalize", "clean", "encode"):
                    shutil.rmtree(folder / step, ignore_errors=True)
    except Timeout:
        raise ValueError(f"folder: somebody else is at work in {str(folder)!r}") from None
    steps = run.manifest["steps"]
    counts, characters = ({n: s[k] for n, s in steps.items()} for k in ("documents", "characters"))
    return Prepared(folder, counts, characters, run.manifest["problems"], run.manifest["tokens"])


# %% [markdown]
# ### One command
#
# With the extra `cluster`, one command runs everything:
#
# ```
# python -m llmbook.distributed prepare --packages stdlib numpy matplotlib --workers 2
# ```

# %% [markdown] tags=["engine"]
# ### Engine room: starting Ray quietly, what goes over the wire, and the command

# %% [markdown] tags=["engine"]
# Ray's own defaults are meant for a cluster: a dashboard, usage statistics, an address that others
# can reach, a third of the memory, logs that stay. We start it on the loopback, small, and remove
# its logs. Ray started in 9 seconds when the table below was measured, and takes longer on a busy
# machine, so this chapter does not start it; the tests do. A start gives up after 30 seconds,
# so we try three times. Ray's default shuffle starts a process for each of its receivers, before
# the first row moves; a shuffle by sorting needs none.
#
# Ray Data runs a task again without end if its process dies. A document that is too large for the
# memory would kill one worker after the other, and nobody would be told. On a cluster of its own,
# our engine counts, and gives up when one task has killed five.
#
# These are the seconds of `benchmarks/prepare.py --kill`, measured on two cores at rest:
#
# | step | documents | one process | Ray, 2 workers | the same, 2 killed |
# |---|--:|--:|--:|--:|
# | read | 33,301 | 7 | 11 | 10 |
# | normalize | 33,215 | 2 | 3 | 3 |
# | clean | 24,941 | 7 | 7 | 11 |
# | compare | | 0 | 1 | 1 |
# | unique | 24,821 | 2 | 2 | 3 |
# | encode | 24,821 | 1 | 2 | 2 |
# | all | | 21 | 29 | 31 |
#
# The rest is learning merges and writing shards, in one process. Reading cannot gain much, because
# its three packages are not divided.

# %% tags=["engine"]
#| export
# Ray's start
_QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: stay on the loopback
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def _import_ray() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with requires_extra("Preparing on several processes", extra="cluster"):
        import ray
        import ray.data
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.shuffle_strategy = ray.data.context.ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


# %% tags=["engine"]
#| export
def _start_ray(ray: Any, workers: int, logs: str) -> None:
    options = {
        "num_cpus": workers,
        "include_dashboard": False,
        "object_store_memory": 200 * 2**20,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": logs,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    for attempt in (1, 2, 3):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray has no class of its own for this
            ray.shutdown()
            if attempt == 3:
                message = "Ray did not start, three times; is the machine busy, or out of memory?"
                raise OSError(f"{message} {error}") from error


# %% [markdown] tags=["engine"]
# Values travel as JSON, all values of one item for one box in one row. An exception in a task would
# come back as a page of another program's stack trace, so a failed task sends its message as a
# value.

# %% tags=["engine"]
#| export
# What a worker does
_FAILED, _NOTHING = -1, -2  # no boxes: a message, and a row where there is nothing to send
_DEATHS = 5


@contextmanager
def _attempt(notes: str, task: str) -> Iterator[None]:
    """Refuse a task that has killed too many workers, if there is a folder to count in."""
    if not notes:
        yield
        return
    note = Path(notes, f"{stable_hash(task):x}")
    with note.open("ab") as file:
        file.write(b".")
    if note.stat().st_size > _DEATHS:
        raise ValueError(f"{task:.200}: {_DEATHS} workers died of it, out of memory perhaps")
    yield
    note.unlink()


# %% tags=["engine"]
#| export
def _emit_rows(
    row: dict[str, str], emit: Callable[[Any], Iterable[Any]], notes: str
) -> list[dict[str, Any]]:
    boxes: dict[int, list[Any]] = defaultdict(list)
    try:
        with _attempt(notes, row["item"]):
            for box, value in _as_pairs(emit(json.loads(row["item"]))):
                boxes[box].append(value)
    except Exception as error:
        boxes = defaultdict(list, {_FAILED: [f"{error}"]})
    return [{"box": b, "data": json.dumps(v)} for b, v in (boxes or {_NOTHING: []}).items()]


def _reduce_rows(
    rows: dict[str, Any], reduce: Callable[..., Iterable[Any]], notes: str
) -> dict[str, Any]:
    box = int(rows["box"][0])
    values = [value for data in rows["data"] for value in json.loads(str(data))]
    if box >= 0:
        try:
            with _attempt(notes, f"values of box {box}"):
                values = list(reduce(box, values))
        except Exception as error:
            box, values = _FAILED, [f"{error}"]
    return {"box": [box], "data": [json.dumps(values)]}


# %% tags=["engine"]
#| export
# The engine
class RayEngine:
    """``map_reduce`` on Ray Data: in a ``with`` block, starts a local cluster of ``workers``.

    With ``address`` it joins a cluster that runs already. A task whose process dies is run again;
    on a cluster of its own, a task that has killed five workers is a ``StepError``. Values must be
    what JSON can hold. Needs the extra "cluster". Source: Moritz et al. (2018).
    """

    def __init__(self, workers: int = 2, address: str | None = None) -> None:
        check_whole("workers", workers, 1)
        if address is not None:
            check_text(address, "address")
        self.workers, self.address = workers, address
        self._ray: Any = None
        self._logs = ""

    def __enter__(self) -> "RayEngine":
        self._ray = _import_ray()
        if self.address is not None:
            self._ray.init(address=self.address, log_to_driver=False)
            return self
        # Not where TMPDIR points: names of sockets may have a hundred characters.
        short = "/tmp" if Path("/tmp").is_dir() else None
        self._logs = tempfile.mkdtemp(prefix="ray", dir=short)
        try:
            _start_ray(self._ray, self.workers, self._logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()
        self._ray = None
        if self._logs:
            shutil.rmtree(self._logs, ignore_errors=True)

    def __call__(
        self, items: Iterable[Any], emit: Callable[[Any], Any], reduce: Callable[[int, Any], Any]
    ) -> list[Any]:
        """Do what ``map_reduce`` does; the order of the results is any."""
        if self._ray is None:
            raise ValueError("RayEngine: expected to be called in its with block")
        rows = [{"item": json.dumps(item)} for item in items]
        notes = tempfile.mkdtemp(prefix="deaths-", dir=self._logs) if self._logs else ""
        data = self._ray.data.from_items(rows, override_num_blocks=max(len(rows), 1))
        data = data.flat_map(partial(_emit_rows, emit=emit, notes=notes)).groupby("box")
        results = list[Any]()
        reduce = partial(_reduce_rows, reduce=reduce, notes=notes)
        done = data.map_groups(reduce, batch_format="numpy")
        for row in done.take_all():
            if row["box"] == _FAILED:
                raise StepError(json.loads(row["data"])[0])
            results += json.loads(row["data"])
        return results


# %% [markdown] tags=["engine"]
# The command is `python -m llmbook.distributed prepare`:


# %% tags=["engine"]
#| export
# The command line
def _prepare_command(arguments: Sequence[str]) -> None:
    prog = "python -m llmbook.distributed prepare"
    about = "Make tokens of text; a preparation that was stopped goes on."
    parser = settings_parser({"": PrepareConfig}, required=False, prog=prog, description=about)
    parser.add_argument("sources", nargs="*", help="files and folders of text")
    parser.add_argument("--packages", nargs="+", default=[], help="installed ones, or stdlib")
    parser.add_argument("--folder", type=str, default="corpus", help="where everything is written")
    parser.add_argument(
        "--workers", type=int, help="processes of a local Ray; else one, without it"
    )
    parser.add_argument("--address", type=str, help="of a Ray cluster that runs already")
    from jsonargparse import ArgumentError
    from tqdm import tqdm

    try:
        given = vars(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    config = PrepareConfig(**{name: given[name] for name in PrepareConfig.__dataclass_fields__})
    sources = [*given["sources"], *(_PACKAGE + name for name in given["packages"])]
    check_at_least(workers=(1, given["workers"]))
    with tqdm(total=6, desc="steps", disable=None, leave=False) as bar:

        def say(line: str) -> None:
            bar.write(line)
            bar.update()

        options: dict[str, Any] = {"config": config, "say": say}
        if given["workers"] is None and given["address"] is None:
            result = prepare(sources, given["folder"], **options)
        else:
            with RayEngine(given["workers"] or 2, given["address"]) as engine:
                result = prepare(sources, given["folder"], engine=engine, **options)
    for problem in result.problems:
        print(f"not read: {problem}", file=sys.stderr)
    kinds = ", ".join(f"{n:,} tokens in {name}" for name, n in result.tokens.items())
    print(f"{result.counts['unique']:,} documents, {kinds}; see {result.folder}")


# %% tags=["engine"]
#| export
# Commands by name, and how they end
_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"prepare": _prepare_command}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, ``python -m llmbook.distributed``, and exit.

    The code is 0, or 2 for a bad request, 1 if a step failed, 130 if it was stopped by Ctrl-C.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    code = 0
    try:
        known = f"python -m llmbook.distributed {{{','.join(_COMMANDS)}}} [--help]"
        if name in ("-h", "--help"):
            print(f"usage: {known}")
        elif name not in _COMMANDS:
            raise ValueError(f"expected a command, got {name!r}: {known}")
        else:
            _COMMANDS[name](rest[:-1])
    except (KeyboardInterrupt, ImportError, OSError, ValueError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        text = "stopped; the same command goes on" if stopped else f"error: {error}"
        print(text, file=sys.stderr)
        asked = isinstance(error, ValueError | FileNotFoundError)
        bad = asked and not isinstance(error, StepError)
        code = 130 if stopped else 2 if bad else 1
    sys.exit(code)


if __name__ == "__main__" and "__file__" in globals():  # a notebook has no file
    main()


# %% [markdown]
# ## Exercises
#
# ````{exercise} Halving the number of steps
# :label: ex-distributed-doubling
# *Twenty minutes.* The ring takes $2 (n - 1)$ steps. For small tensors, *recursive doubling* is
# faster: in step $k$, rank $r$ exchanges all it has with rank $r \oplus 2^k$ (the bit $k$ of its
# rank flipped), and both add. Simulate it: given the vectors of all ranks, return their vectors
# afterwards, and how many numbers a rank has sent, which is one number, the same for all ranks. The
# number of ranks must be a power of two; refuse others, and no ranks at all, with a `ValueError`.
# Leave the given vectors alone.
# ````


# %% tags=["solution"]
def recursive_doubling(vectors: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Return the sum of all vectors, for each rank, and how many numbers a rank has sent."""
    n = len(vectors)
    if n == 0 or n & (n - 1):
        raise ValueError(f"vectors: expected a power of two of them, got {n}")
    held, sent, distance = [vector.copy() for vector in vectors], 0, 1
    while distance < n:
        held = [held[rank] + held[rank ^ distance] for rank in range(n)]
        sent += held[0].size
        distance *= 2
    return held, sent


# %% tags=["check"]
given = [np.arange(6.0) + 100 * rank for rank in range(8)]
kept = [vector.copy() for vector in given]
after, sent = recursive_doubling(given)
assert all(np.array_equal(a, b) for a, b in zip(given, kept, strict=True)), (
    "the given vectors must not change"
)
assert len(after) == 8, "one vector for each rank"
assert np.shape(sent) == (), "how many numbers a rank has sent is one number, the same for all"
for rank, vector in enumerate(after):
    assert np.array_equal(vector, sum(kept)), f"rank {rank} has not the sum over all ranks"
assert sent == 18, "three exchanges of six numbers each, for eight ranks"
assert recursive_doubling(given[:1])[1] == 0, "one rank has nothing to send"
for n, name in ((6, "six ranks"), (0, "no ranks at all")):
    refused = None
    try:
        recursive_doubling(given[:n])
    except Exception as error:
        refused = error
    assert isinstance(refused, ValueError), f"{name} must be refused with a ValueError"

# %% [markdown]
# ````{exercise} A wrapper that averages
# :label: ex-distributed-factors
# *Fifteen minutes.* A wrapper around your model *averages* gradients over ranks and tells you the
# numbers of targets: `counts[r][k]` is that of micro-batch $k$ on rank $r$. Each micro-batch's loss
# is the *mean* over its own targets (zero where there are none). Return the factors by which these
# losses have to be multiplied, in the same form, so that the gradient is that of the mean over all
# targets. Refuse with a `ValueError` if there are no targets at all.
# ````


# %% tags=["solution"]
def loss_factors(counts: list[list[int]]) -> list[list[float]]:
    """Return the factor of each micro-batch's mean loss, for a wrapper that averages over ranks."""
    total = sum(map(sum, counts))
    if total == 0:
        raise ValueError("counts: expected at least one target, got none")
    return [[len(counts) * n / total for n in of_rank] for of_rank in counts]


# %% tags=["check"]
counts = [[6, 2], [4, 0], [1, 3]]
numbers = np.random.default_rng(0)
terms = [[numbers.normal(size=n) for n in of_rank] for of_rank in counts]
everything = np.concatenate([term for of_rank in terms for term in of_rank]).mean()
factors = loss_factors(counts)
assert all(isinstance(f, list) for f in factors), "a list of factors for each rank is needed"
assert [len(f) for f in factors] == [2, 2, 2], "one factor for each micro-batch of each rank"
means = [[term.mean() if term.size else 0.0 for term in of_rank] for of_rank in terms]
of_ranks = [
    sum(f * m for f, m in zip(*both, strict=True)) for both in zip(factors, means, strict=True)
]
averaged = sum(of_ranks) / 3
assert not np.isclose(averaged, everything / 3), "the wrapper divides by the ranks: make up for it"
assert np.isclose(averaged, everything), "every target must count the same in the average"
assert loss_factors([[5, 0]]) == [[1.0, 0.0]], "one rank: the share of the targets is the factor"
try:
    loss_factors([[0], [0]])
    raise AssertionError("no targets at all must be refused")
except ValueError:
    pass

# %% [markdown]
# ````{exercise} Where does it fit?
# :label: ex-distributed-fit
# *Ten minutes.* Use {py:func}`~llmbook.distributed.predict_scheme`: for a scheme, a number of
# weights, and a number of GPUs, its result's `kept` is the bytes on each. Find the smallest number
# of GPUs, a multiple of 8 up to 16,384, on which the state of a model fits into `memory` bytes
# each. Full sharding also needs room for `gathered` weights of 2 bytes. Return `None` if no number
# is enough.
# ````


# %% tags=["solution"]
def fewest_gpus(scheme: str, n_weights: int, memory: float, gathered: int = 0) -> int | None:
    """Return the smallest multiple of 8 GPUs on which the state fits, or None."""
    room = memory - (2 * gathered if scheme == "full" else 0)
    for n in range(8, 16_384 + 1, 8):
        if predict_scheme(scheme, n_weights, n).kept <= room:
            return n
    return None


# %% tags=["check"]
assert fewest_gpus("full", 70_000_000_000, 80e9) == 16, "14 GPUs are enough: the next multiple of 8"
assert fewest_gpus("full", 40_000_000_000, 80e9) == 8, "8 GPUs of exactly enough memory do fit"
assert fewest_gpus("zero1", 70_000_000_000, 80e9) is None, (
    "4 bytes of each weight are never divided"
)
more = fewest_gpus("full", 70_000_000_000, 80e9, gathered=4_000_000_000)
assert more == 16, "8 GB are gathered, so 72 GB are left, which 16 GPUs still have"
more = fewest_gpus("full", 70_000_000_000, 80e9, gathered=10_000_000_000)
assert more == 24, "20 GB are gathered, so only 60 GB are left for the state"
most = fewest_gpus("full", 16_384_000_000, 16e6)
assert most == 16_384, "16,384 GPUs are still allowed, and are needed here"
alone = fewest_gpus("zero2", 10_000_000_000, 40e9, gathered=9_000_000_000)
assert alone == 8, "only full sharding gathers: the others have all weights"

# %% [markdown]
# ````{exercise} Two tiles from two ranks
# :label: ex-distributed-merge
# *Ten minutes.* A rank that has attended to some keys holds, for each query, the largest score `m`,
# the sum `s` of $e^{\text{score} - m}$, and the sum `o` of $e^{\text{score} - m}$ times the values,
# not yet divided. Write `merge_states(a, b)`, which makes one such triple `(m, s, o)` of two. `m`
# and `s` have the shape `(queries,)`, and `o` has `(queries, d_value)`. Scores of 1,000 must not
# overflow. If a query sees nothing of a tile, `m` is -inf there, and `s` and `o` are zero; no NaN
# may come of it (`isnan().any()`). Leave the given tensors alone.
# ````


# %% tags=["solution"]
def merge_states(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest score, the sum of exponentials and that of values for both tiles."""
    m = torch.maximum(a[0], b[0])
    # Each part was computed relative to its own m; what it is short of the common one is made up.
    # Where both are -inf there is nothing to rescale, and the difference would be NaN.
    finite = m.masked_fill(m == -torch.inf, 0.0)
    in_a, in_b = torch.exp(a[0] - finite), torch.exp(b[0] - finite)
    return m, in_a * a[1] + in_b * b[1], in_a[:, None] * a[2] + in_b[:, None] * b[2]


# %% tags=["check"]
def one_state(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = scores.amax(dim=-1)
    weights = torch.exp(scores - m.masked_fill(m == -torch.inf, 0.0)[:, None])
    return m, weights.sum(dim=-1), weights @ values


torch.manual_seed(0)
scores, values = torch.randn(3, 10), torch.randn(10, 4)
scores[0] += 1000
scores[1, :5] += 30
expected = one_state(scores, values)
tiles = [one_state(scores[:, part], values[part]) for part in (slice(5), slice(5, 10))]
kept = [x.clone() for tile in tiles for x in tile]
found = merge_states(*tiles)
unchanged = all(torch.equal(x, y) for x, y in zip((*tiles[0], *tiles[1]), kept, strict=True))
assert unchanged, "the given tensors must not change"
finite = all(x.isfinite().all() for x in found)
assert finite, "scores of 1,000 overflow: subtract the common maximum"
assert torch.equal(found[0], expected[0]), "m is not the largest score of both tiles"
assert torch.allclose(found[1], expected[1]), "s: the two sums were made relative to different m"
assert torch.allclose(found[2], expected[2], atol=1e-5), "o must be rescaled as s is"
nothing = one_state(torch.full((3, 5), -torch.inf), values[:5])
for one, other in ((nothing, expected), (expected, nothing)):
    for x, right in zip(merge_states(one, other), expected, strict=True):
        assert torch.allclose(x, right), "a tile in which nothing is visible changes the result"
assert not any(x.isnan().sum() for x in merge_states(nothing, nothing)), "two blind tiles give NaN"
scores = torch.randn(3, 10)
scores[1, :5] = scores[2] = -torch.inf  # query 1 sees nothing of one tile, query 2 nothing at all
found = merge_states(one_state(scores[:, :5], values[:5]), one_state(scores[:, 5:], values[5:]))
assert not any(x.isnan().sum() for x in found), "a query that sees nothing of both tiles gives NaN"
for x, right in zip(found, one_state(scores, values), strict=True):
    assert torch.allclose(x, right, atol=1e-5), "one query sees nothing of a tile, others do"

# %% [markdown]
# ````{exercise} Less memory than 1F1B
# :label: ex-distributed-limit
# *Thirty minutes.* Under 1F1B, stage 0 keeps `n_stages` micro-batches. Suppose that there is memory
# for only `limit` of them. Write `limited_schedule(n_stages, n_microbatches, limit)`, which returns
# for each stage its list of pairs such as `("forward", 0)`. (The check turns them into
# {py:class}`~llmbook.distributed.PipelineAction` and asks
# {py:func}`~llmbook.distributed.pipeline_timing`.) No stage may ever keep more than `limit`
# micro-batches, and none may keep more than under 1F1B. Begin as 1F1B does, with as many
# micro-batches as `limit` allows, then alternate; any other order must take no longer. Before you
# run the check: what will the bubble be with a limit of 1?
# ````


# %% tags=["solution"]
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    """Return, for each stage, what it does in order, keeping at most ``limit`` micro-batches."""
    schedule = []
    for stage in range(n_stages):
        # 1F1B keeps one more than it starts with: the forward pass before each backward one.
        # With a limit of 1 a micro-batch is alone in the pipeline: the bubble is 1 - 1/n_stages.
        # With a limit of 2, four stages take 69 for eight micro-batches. Groups of two (two forward
        # passes, then two backward ones, in all stages but the last) take only 60.
        ahead = min(n_stages - 1 - stage, limit - 1, n_microbatches - 1)
        order = [("forward", i) for i in range(ahead)]
        for i in range(n_microbatches):
            if ahead + i < n_microbatches:
                order.append(("forward", ahead + i))
            order.append(("backward", i))
        schedule.append(order)
    return schedule


# %% tags=["check"]
def kept_by(order: list[tuple[str, int]]) -> int:
    kept = np.cumsum([1 if kind == "forward" else -1 for kind, _ in order])
    return int(max(kept))


def time_of(found: list[list[tuple[str, int]]], given: str) -> float:
    try:
        return pipeline_timing([[PipelineAction(*a) for a in order] for order in found]).duration
    except ValueError as error:
        raise AssertionError(f"{given}: {error}") from None


for p, m, limit in ((4, 8, 4), (4, 8, 2), (4, 8, 1), (3, 7, 2), (2, 4, 9), (4, 2, 4)):
    found = limited_schedule(p, m, limit)
    given = f"{p} stages, {m} micro-batches, limit {limit}"
    assert len(found) == p, f"{given}: one list for each stage is needed"
    everything = sorted((kind, i) for kind in ("forward", "backward") for i in range(m))
    assert all(sorted(order) == everything for order in found), (
        f"{given}: each stage takes each micro-batch forward once and backward once"
    )
    kept = [kept_by(order) for order in found]
    assert max(kept) <= limit, f"{given}: a stage keeps {max(kept)}"
    assert all(n <= p - stage for stage, n in enumerate(kept)), f"{given}: more than 1F1B: {kept}"
    duration, least = time_of(found, given), (m + p - 1) * 3
    assert limit < p or duration == least, f"{given}: slower than 1F1B"
    if limit == 1:
        assert duration == m * p * 3, f"{given}: it takes {duration}, not {m * p * 3}"
durations = [time_of(limited_schedule(4, 8, n), f"4, 8, {n}") for n in (1, 2, 3, 4)]
for n, took, bound in zip((1, 2, 3, 4), durations, (96, 69, 48, 33), strict=True):
    assert took <= bound, f"limit {n}: {took} where alternating takes {bound}"

# %% [markdown]
# ````{exercise} Lines that meet
# :label: ex-distributed-lines
# *Fifteen minutes.* Write `shared_lines(parts, n_boxes)`, the list of lines that at least two
# documents have, each line once, by one call of `map_reduce`. Each part is a dictionary of texts by
# the names of their documents. `stable_hash(line)` is the place of a line, and
# `box_of(place, n_boxes)` its box. A line that one document repeats is not shared.
# ````


# %% tags=["solution"]
def shared_lines(parts: list[dict[str, str]], n_boxes: int) -> list[str]:
    """The lines that at least two documents have, each once."""

    def emit(part):
        for name, text in part.items():
            for line in text.splitlines():
                yield box_of(stable_hash(line), n_boxes), (line, name)

    def reduce(box, values):
        names = defaultdict(set)
        for line, name in values:
            names[line].add(name)
        return [line for line, found in names.items() if len(found) > 1]

    return map_reduce(parts, emit, reduce)


# %% tags=["check"]
pages = [
    {"a": "echo\nnotice\necho", "b": "one\nboth"},
    {"c": "notice\ntwo\nboth"},
    {"x": "pair\nnotice", "y": "pair"},  # two documents of one part
]
lines = {line for part in pages for text in part.values() for line in text.splitlines()}
in_one_process, boxes = map_reduce, set()


def map_reduce(items, emit, reduce):  # as before, but it notes which boxes are filled
    items = list(items)
    boxes.update(box for item in items for box, _ in emit(item))
    return in_one_process(items, emit, reduce)


try:
    for n_boxes in (1, 3, 64):
        boxes.clear()
        shared = shared_lines(pages, n_boxes)
        assert {"notice", "both"} <= set(shared), "equal lines of two parts must meet in one box"
        assert "pair" in shared, "two documents of one part can share a line, too"
        assert "echo" not in shared, "a line that one document repeats is not shared"
        assert sorted(shared) == ["both", "notice", "pair"], "each shared line once"
        assert boxes, "the lines must meet by map_reduce"
        needed, right = (
            {box_of(stable_hash(x), n_boxes) for x in some} for some in (shared, lines)
        )
        assert needed <= boxes <= right, "a line's box must be that of its stable_hash"
finally:
    map_reduce = in_one_process

# %% [markdown]
# ## Summary
#
# Every scheme of this chapter finds the gradients of one process, and sends the bytes that its
# formula predicts. A mean of means over ranks weighs targets wrongly and still trains, so losses
# are summed, and divided once by the targets of all ranks and micro-batches. To sum $b$ bytes, a
# ring sends $2(n-1)/n \cdot b$ from each rank. Data parallelism exchanges buckets of gradients
# while the backward pass still runs; the sharded optimizer takes its step between the two halves of
# that exchange, at no extra cost; full sharding gathers weights twice to keep only its share of
# everything.
#
# The model itself can be cut, too. A layer cut by columns and then by rows needs one all-reduce in
# each direction, attention travels around a ring and is merged by log-sum-exps, and a pipeline of
# $p$ stages and $m$ micro-batches idles for $(p-1)/(m+p-1)$ of the time. The trainer of
# {doc}`13_training` runs under PyTorch's own wrappers by asking one object wherever ranks have
# something to say to each other, and its checkpoints continue at any number of ranks.
#
# The data pipeline follows the same rule. Steps that look at several documents meet at a key. On an
# engine that promises no order, and with workers killed on purpose, the files were those of one
# process, byte for byte.
#
# ### Checklist
#
# - Count targets over ranks *and* micro-batches before the first backward pass, divide once, and
#   sum (or multiply by the number of ranks, if the wrapper averages).
# - Wrap the objective, not the model: what bypasses `forward` is not exchanged.
# - Clip after the exchange, by the norm over all ranks.
# - Let the number of tensor ranks divide `n_kv_heads` and `d_ff`, and keep them inside one server.
# - Use at least four times as many micro-batches as stages.
# - Let every rank decide on the same numbers: skipped steps, scales, the end of the run.
# - In a data pipeline: one hash in every process, any order of arrival, files that appear whole.
#
# ### Further reading
#
# {cite:t}`patarasuk2009bandwidth` derive the ring and prove that no all-reduce sends less.
# {cite:t}`li2020pytorch` describe PyTorch's data parallelism, {cite:t}`rajbhandari2020zero` the
# three stages of sharding, and {cite:t}`zhao2023fsdp` how they were built into PyTorch.
# {cite:t}`shoeybi2019megatron` cut layers, {cite:t}`narayanan2021efficient` combine three cuts,
# {cite:t}`liu2023ring` send keys and values around a ring, and {cite:t}`huang2019gpipe` introduced
# micro-batches. {cite:t}`grattafiori2024llama3` combine them all. {cite:t}`dean2008mapreduce`
# divide work so that it survives the failure of machines, and {cite:t}`moritz2018ray` built the
# engine that we used.
