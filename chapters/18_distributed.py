# %% [markdown]
# # Many devices
#
# > Train on many devices as on one: the same gradients, with the bytes and the memory counted.
#
# A model that is trained on sixteen thousand processors is the same model as on one, and so is its
# gradient, or should be. When it is not, nothing crashes. The loss falls, samples look plausible,
# and the run is a little worse than it could have been, for months. So this chapter asks one
# question of everything it builds: is it equal to one process? The second question is what that
# costs, in bytes that are sent and bytes that are kept, because these two decide what can be
# trained where.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.distributed.launch`, {py:func}`~llmbook.distributed.all_reduce_ring`, {py:class}`~llmbook.distributed.ByteCounter`, {py:class}`~llmbook.distributed.DataParallel`, {py:class}`~llmbook.distributed.ShardedOptimizer`, {py:func}`~llmbook.distributed.shard_model`, {py:func}`~llmbook.distributed.run_scheme`, {py:func}`~llmbook.distributed.predict_scheme` |
# | **You need** | training ({doc}`13_training`), memory and 16-bit formats ({doc}`15_precision`) |
# | **It takes** | 30 minutes for the main line, 2 hours for everything, 40 seconds to run |

# %% tags=["remove-cell"]
#| default_exp distributed

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
from importlib import import_module
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, Literal, NamedTuple

# %% [markdown]
# ## A gradient wrong by a factor of two
#
# Two processes train one model. Each has a copy of it, reads its own half of every batch, and
# computes the gradient of its mean loss. Then they average their gradients, so that both take the
# same step and the copies stay equal. This is *data parallelism*. In code it is two lines more than
# training in one process: `all_reduce` adds up a tensor over all processes, and a division makes
# that a mean. Each process has a number, its *rank*, by which it chooses its rows:

# %% tags=["engine"]
#| export
# PyTorch, and what it takes from earlier chapters
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Num
from torch import nn, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmbook.corpus import without_main_script
from llmbook.environment import check_at_least, check_choice, check_whole, seed_everything
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import AdamW, clip_gradients, cross_entropy, parameter_groups

# %% [markdown]
# Every batch has 16 rows of stories, and a rank reads every second one.

# %% tags=["engine"]
# The data of this chapter's runs: 16 rows of stories in each batch, 8 for each of two ranks
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

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
# The batches are not alike. Rank 0 has plain text, with 24 targets in each row; rank 1 has prompts
# with answers, and only the 8 bytes of an answer are targets. Our function
# {py:func}`~llmbook.distributed.launch` runs `train` in two processes and returns what it returned
# in each.

# %% [markdown] tags=["engine"]
# ### Engine room: how processes start, fail and end together

# %% [markdown] tags=["engine"]
# A function reaches a process that has not defined it in one of two ways. One that an installed
# module exports travels as its name, and the process imports it. One of a notebook or a script has
# no such name; it travels as code, which the package `cloudpickle` can send.


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
# What happens in a rank: it joins the group, calls the function, and tells its parent what came
# back. A thread ends the process when the parent is gone, whatever the function is doing then. An
# error is told by its text, with the collective that was called last: gloo says that it waited, but
# not for what.


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
        pipe.send_bytes(_packed(("returned", result)))
        with suppress(EOFError):
            pipe.recv_bytes()  # nobody hangs up before all have finished
        dist.destroy_process_group()
    except BaseException as error:
        pipe.send_bytes(_packed(("raised", _describe(error, timeout))))


# %% [markdown] tags=["engine"]
# The parent listens to all ranks at once. The first failure ends the run; for a moment it waits for
# others, because a rank that lost its neighbor may be heard before the neighbor's end is noticed.


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
                kind, content = pickle.loads(pipes[rank].recv_bytes())
            except (EOFError, OSError):
                processes[rank].join(5)
                failures[rank] = _Failure(_death(processes[rank].exitcode), "", 0)
                continue
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
def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"died of {signal.Signals(-code).name}"
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
# Starting a process by a fork of this one is quick, but a fork copies one thread only: a lock that
# another thread held stays locked for ever, and torch's threads hold some. Starting afresh is safe,
# and imports torch in every process. A *fork server* is both: one fresh process imports torch, does
# nothing with it, and is forked whenever a rank is needed.


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

# %%
for rank, found in enumerate(launch(train, 2, 80)):
    last = sum(found[-8:]) / 8
    print(f"rank {rank}: loss {found[0]:.1f} at first, below {math.ceil(2 * last) / 2} at the end")
    assert last < 0.6 * found[0]

# %% [markdown]
# The curve looks right, so who would look further? Let $s_r$ be the gradient of the loss *summed*
# over the targets of rank $r$, and $n_r$ their number. The gradient of the mean loss over all
# targets is $(s_0 + s_1) / (n_0 + n_1)$. What the two processes used is the mean of two means,
#
# $$
# \frac{1}{2} \Bigl( \frac{s_0}{n_0} + \frac{s_1}{n_1} \Bigr) ,
# $$ (distributed-mean-of-means)
#
# in which a target of rank $r$ has the weight $1 / (2 n_r)$. To see it in the run itself, we take
# the gradient that it used, and ask how much of $s_0$ and of $s_1$ is in it:


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
# weighting is still a weighting, and the loss of either rank can fall. Widely used trainers had
# this error for years, over ranks and over accumulated micro-batches
# ([transformers#34191](https://github.com/huggingface/transformers/pull/34191),
# [#34242](https://github.com/huggingface/transformers/issues/34242)). So we trust no curve, and
# compare with one process, number by number.
#
# ## Processes, ranks, collectives
#
# A *collective* is an operation that all ranks of a group call together, each with a tensor of its
# own. Five of them, on two ranks that hold the numbers 1 and 2:


# %%
def collective(name: str) -> list[float]:
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
    return (torch.cat(both) if "gather" in name else x).tolist()


for name in ("broadcast", "all_reduce", "scatter", "gather", "all_gather"):
    first, second = launch(collective, 2, name)
    print(f"{name:11} rank 0 has {first!s:11} rank 1 has {second}")

# %% [markdown]
# Rank 0 is the root of the rooted ones: what it has is broadcast or scattered, and what the others
# have is gathered there. A sixth, *reduce-scatter*, sums like `all_reduce` but leaves each rank
# with one part of the sum. There is one rule that no compiler checks: all ranks must call the same
# collectives in the same order. A rank that leaves one out leaves the others waiting. Our `launch`
# ends such a run after its timeout, and says who waited in which collective:


# %%
def unequal() -> None:
    for _ in range(3 - dist.get_rank()):  # rank 1 has one batch less
        dist.all_reduce(torch.ones(1))


try:
    launch(unequal, 2, timeout=1)
except RankError as error:
    print("\n".join(str(error).splitlines()[:2]))

# %% [markdown]
# The sum is the safe reduction. An average, `ReduceOp.AVG`, is not known to all backends, and some
# versions of gloo, the one for processors without a GPU, computed it wrongly without a word
# ([pytorch#162338](https://github.com/pytorch/pytorch/issues/162338)). This book sums and divides.

# %% [markdown] tags=["engine"]
# ### Engine room: counting what is sent, and agreeing before work begins

# %% [markdown] tags=["engine"]
# Each collective of torch, those inside DDP and FSDP too, is an operation that a dispatch mode
# sees, like the mode that measures memory in chapter 15. Which argument holds the data, and how
# often a rank sends it, is the table below. A rooted collective is counted with its average over
# ranks. gloo's own `reduce_scatter` sends twice what is counted here: it reduces all, then drops a
# part.


# %% tags=["engine"]
#| export
def _everything(n: int) -> float:
    return n - 1.0


def _most(n: int) -> float:
    return (n - 1) / n


# Of each operation: which argument holds what is sent, and how many times of its bytes leave a rank
# of n. Without suffixes: _ for in place, _base for one tensor, _coalesced for several.
_SENT_BY: dict[str, tuple[int, Callable[[int], float]]] = {
    "send": (0, lambda n: 1.0),
    "allreduce": (0, lambda n: 2 * _most(n)),
    "all_reduce": (0, lambda n: 2 * _most(n)),
    "allgather": (1, _everything),
    "allgather_into_tensor": (1, _everything),
    "all_gather_into_tensor": (0, _everything),
    "reduce_scatter": (1, _most),
    "reduce_scatter_tensor": (1, _most),
    "broadcast": (0, _most),
    "reduce": (0, _most),
    "gather": (1, _most),
    "scatter": (0, _most),
    "alltoall": (1, _most),
    "all_to_all_single": (0, _most),
}
_SUFFIXES = re.compile(r"^_|(_coalesced|_base|_out|_)+$")


# %% tags=["engine"]
#| export
class ByteCounter(TorchDispatchMode):
    """Counts, inside a ``with``, the bytes that this rank sends, and the calls of collectives.

    ``sent`` is in bytes, as if each collective went around a ring: twice (n - 1)/n of its data for
    an all-reduce, (n - 1)/n for a reduce-scatter or all-gather of the whole; what ``send`` sends
    counts as it is. ``by_name`` has the bytes of each collective, ``calls`` the number of calls.
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
# A collective hangs if one rank does not call it, or calls another. So whatever decides about calls
# (how many micro-batches there are, which parameters) is compared first. All ranks see all values,
# so all raise the same error.


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
    must call it, with the same names.
    """
    _, size = place_in_group(group)
    for name, number in numbers.items():
        check_whole(name, number, -(2**63), 2**63 - 1)
    mine = torch.tensor(list(numbers.values()), dtype=torch.int64)
    found = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(found, mine, group=group)
    for name, column in zip(numbers, torch.stack(found, dim=1).tolist(), strict=True):
        if len(set(column)) > 1:
            got = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(column))
            raise ValueError(f"{name}: expected the same on each rank, got {got}")


# %% [markdown] tags=["engine"]
# Two more that all ranks call together: one divides a batch, the other adds up numbers.


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
# Both directions at once: a rank that sent first and received afterwards could wait for a neighbor
# that does the same.


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
# How does a sum of $b$ bytes reach all of $n$ ranks? If all send their tensor to rank 0, it
# receives $(n - 1) b$ bytes, adds, and sends as many: with a thousand ranks, a thousand times the
# time. A ring keeps all lines busy at once, and no rank sends more than $2b$
# {cite}`patarasuk2009bandwidth`. Each rank sends only to the next one, and receives only from the
# one before.
#
# Cut the tensor into $n$ parts. In each step, a rank passes on one part, and adds what arrives to
# its own copy of the part that arrives. A part travels once around the ring and gathers the
# contributions; after $n - 1$ steps each rank holds one part of the sum, complete. That is the
# reduce-scatter. Then the complete parts travel around once more, and each rank copies them, which
# is an all-gather. With `pass_on(x)`, which sends x to the next rank and returns what the previous
# one sends:


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
# :alt: Three rows, one for each rank, and five columns, one for each state. At first each rank has three parts of its own. After two steps of reduce-scatter each rank has one part to which all three have contributed, after two more steps of all-gather each rank has all three.
#
# A ring of three ranks. Each cell is a part of the tensor, and names the ranks whose numbers are in
# it. Arrows lead to the next rank; from the last, back to the first.
# ```
#
# Each of the two takes $n - 1$ steps, and a rank sends $b / n$ bytes in each. An all-reduce is one
# after the other, so a rank sends
#
# $$
# 2 (n - 1) \cdot \frac{b}{n} = \frac{2 (n - 1)}{n} \, b
# $$ (distributed-ring)
#
# bytes, and less than $2b$ for any number of ranks. What grows with $n$ is the number of steps, and
# with it the waiting for the first byte of each message; for small tensors, other ways are faster.


# %% [markdown] tags=["engine"]
# ### Engine room: the two halves, for tensors of any shape

# %% [markdown] tags=["engine"]
# What the package offers are the two halves and the whole, within any group of ranks. A number of
# numbers that the ranks do not divide is filled up with zeros.


# %% tags=["engine"]
#| export
def reduce_scatter_ring(
    parts: Num[Tensor, "n_ranks ..."], group: dist.ProcessGroup | None = None
) -> Num[Tensor, "..."]:
    """Return, of the sum of ``parts`` over ranks, the part of this rank."""
    rank, size = place_in_group(group)
    _check_parts(parts, size)
    parts = parts.clone()
    for step in range(size - 1):
        arrived = pass_on(parts[(rank - step - 1) % size], group)
        parts[(rank - step - 2) % size] += arrived
    return parts[rank]


def all_gather_ring(
    part: Num[Tensor, "..."], group: dist.ProcessGroup | None = None
) -> Num[Tensor, "n_ranks ..."]:
    """Return the parts of all ranks, in order."""
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
    2009).
    """
    _, size = place_in_group(group)
    padded = nn.functional.pad(x.flatten(), (0, -x.numel() % size)).view(size, -1)
    total = all_gather_ring(reduce_scatter_ring(padded, group), group)
    x.copy_(total.flatten()[: x.numel()].view_as(x))


# %% tags=["engine"]
#| export
# What the ring refuses
def _check_parts(parts: Tensor, size: int) -> None:
    if len(parts) != size:
        raise ValueError(f"parts: expected one part for each of {size} ranks, got {len(parts)}")


# %% [markdown]
# ### The same bits, and the bytes of the formula

# %% [markdown]
# All ranks end with the *same bits*, since each part was added up once and then copied. The order
# of the additions differs from one part to the next, so the bits differ from those of a sum in
# order. {py:class}`~llmbook.distributed.ByteCounter` counts what a rank hands to the network:


# %%
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
# Now the gradient of the opening can be mended. The sum of the losses over all targets is a plain
# sum, over ranks and over the micro-batches that each rank accumulates, and so is its gradient. The
# only number that every rank needs of the others is the denominator: how many targets there are in
# all. One `all_reduce` of one number finds it *before* the first backward pass. We compare three
# recipes, each with four micro-batches on each of two ranks, with one process that reads all rows
# at once:


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
# The last equals one process up to rounding (a thousandth is the bound here, a millionth in the
# tests). The one before is the second famous factor of two: a loss already divided by the targets
# of all ranks, in a wrapper that *averages* gradients, as torch's does. Multiplied by the number of
# ranks it is right again. AdamW hides it from the curve, because Adam divides each gradient by its
# own size; it shows in the gradient norm, and so in how often clipping strikes.
#
# A rank without targets contributes zero, and is no problem. A rank without a *batch* is, because
# the others wait for it. So our functions compare over ranks what decides about collectives, and
# all ranks raise the same error ({py:func}`~llmbook.distributed.check_agreed`).
#
# ## While the backward pass still runs
#
# The gradient of the last layer is ready long before that of the first. Why wait? A hook that
# runs when a gradient is complete can start its sum over ranks, and the network works while the
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
# This is the whole idea of {py:class}`~llmbook.distributed.DataParallel`, and five things are
# missing {cite}`li2020pytorch`:
#
# - Hundreds of small messages are slow, so gradients share *buckets*, the last layers first. A
#   bucket is sent when it is full.
# - Gradients may become ready in another order on another rank, but the order of collectives must
#   be the same. So a bucket waits until those before it have been sent.
# - A weight that is used twice, as a tied embedding is, has one gradient, complete after both uses.
#   A frozen weight has none. And one that was not used here, such as an expert without tokens, may
#   have been used on another rank. So when the backward pass ends, buckets that are not full are
#   sent with zeros, and with a mark for each weight that says whether there was a gradient. If no
#   rank had one, the optimizer must leave the weight alone, as in one process.
# - Copies that do not begin equal never become equal: rank 0 broadcasts its weights at the start,
#   and its buffers before each forward pass.
# - Accumulation needs no exchange before the last micro-batch. `no_sync` switches it off, and has
#   to enclose the *forward* pass, too, because there torch's wrapper and ours decide. A backward
#   pass alone inside of it is exchanged in full, which nobody notices, as it only costs time.
#
# Gradients are clipped after the exchange, by the norm of the sum; the norm of one rank's part is
# another number.

# %% [markdown] tags=["engine"]
# ### Engine room: buckets, marks, and gradients that were summed already


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
    A parameter may change whether it is frozen only before. (Li et al. 2020.)
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
                raise RuntimeError(
                    f"module: expected {expected}, got one through the module inside"
                )
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
    """Refuse models that differ between ranks in the shapes, dtypes or names of what they train."""
    told = [
        (n, tuple(p.shape), str(p.dtype)) for n, p in module.named_parameters() if p.requires_grad
    ]
    check_agreed(group, parameters_to_train=len(told), shapes=zlib.crc32(repr(told).encode()))


# %% [markdown]
# ### How much goes out early
#
# How many buckets are under way when the last gradient has been computed?


# %%
def early(bucket_bytes: int) -> str:
    model = DataParallel(TransformerLM(config), bucket_bytes)
    inputs, targets = rows_at(0, dist.get_rank())
    cross_entropy(model(inputs), targets, reduction="sum").backward()
    return f"{model.sent_early:2} of {len(model.buckets):2} buckets out early"


for kib in (8, 32, 1024):
    print(f"at most {kib:4} KiB: {launch(early, 2, kib * 1024)[0]}")

# %% [markdown]
# Only the last bucket is left to wait for at the end. Small buckets hide more of the exchange, and
# large ones have less overhead; torch's default of 25 MiB is meant for models a thousand times as
# large as this one.
#
# ## Less memory: shard the optimizer, then everything
#
# All copies are equal, and that is a waste. Of the 16 bytes that AdamW keeps for each weight in
# float32, the weight itself has 4, its gradient 4, and the two averages 8. ZeRO removes the copies
# in stages {cite}`rajbhandari2020zero`.
#
# **Stage 1** divides the optimizer. Rank $r$ updates only its $n$-th of the weights, so it needs
# only that part of the summed gradient: a reduce-scatter instead of an all-reduce. Afterwards all
# ranks need all new weights: an all-gather. These are the two halves of {eq}`distributed-ring`,
# with the step in between, so the traffic is the same as before. It works for optimizers that treat
# each number by itself, so not for Muon, which needs whole matrices.
#
# **Stage 3**, full sharding, divides the weights as well. Before a block computes, its weights are
# gathered; afterwards they are freed; the backward pass gathers them again. What is the gradient
# of a gather? Every rank computes with all of $w = (w_0, \dots, w_{n-1})$, so the total loss is a
# sum over ranks $q$ of losses $\ell_q(w)$, and
#
# $$
# \frac{\partial}{\partial w_r} \sum_q \ell_q(w)
# = \sum_q \Bigl( \frac{\partial \ell_q}{\partial w} \Bigr)_r .
# $$ (distributed-gather)
#
# Sum over ranks, and keep part $r$. That is a reduce-scatter, and so full sharding is hardly more
# than one function with its derivative:


# %%
class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return all_gather_ring(part).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return reduce_scatter_ring(gradient.unflatten(0, (dist.get_world_size(), -1)))


# %% [markdown]
# Autograd would keep the gathered weight until the backward pass, and with it all memory that was
# to be saved. {py:func}`~llmbook.distributed.shard_model` hands autograd a note in its place, which
# weight of which block, and gathers again when the note is read. Each weight is gathered twice and
# reduced once: $3 (n - 1) / n$ times its bytes, half as much again as before, and in *every*
# micro-batch. 16-bit weights halve the two gathers. The rows that the optimizer sees stay in
# float32, and gradients are summed in float32, so rounding does not pile up over ranks.

# %% [markdown] tags=["engine"]
# ### Engine room: an optimizer in shares, and a model in rows

# %% [markdown] tags=["engine"]
# The optimizer lays all parameters end to end in one vector and cuts it in n equal shares. A cut
# may go through a tensor, so what AdamW gets are *pieces*: vectors that are views of the share, in
# the groups of the tensors they come from. A tensor that has a gradient on no rank has none in its
# pieces, and its decay and its count of steps stay as in one process.


# %% tags=["engine"]
#| export
class ShardedOptimizer:
    """An optimizer whose state and work is divided over ranks (ZeRO-1, Rajbhandari et al. 2020).

    ``parameters`` are a model's, or groups of them, and ``build`` makes the optimizer, which must
    treat each number by itself (AdamW or SGD, not Muon): each rank gives it the numbers of its
    share only, as vectors. ``step`` sums the gradients over ranks, so divide a loss by the number
    of targets of all ranks; no ``DataParallel`` is needed. Weights begin as those of rank 0.
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
        n = sum(p.numel() for p in self.parameters)
        self.share = -(-n // self.size)
        if self.share * (self.size - 1) >= n:
            raise ValueError(f"parameters: expected numbers for all {self.size} ranks, got {n}")
        check_agreed(group, tensors=len(self.parameters), numbers=n)
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
# The model is cut by rows instead, as FSDP2 does, and each row part stays under its name with its
# number of dimensions. So what is built on the model afterwards, decay by shape for example, works
# as before. A number of rows that n does not divide is filled up with zeros for the journey.


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
    check_agreed_parameters(model, group)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), group=group, group_src=0)
    made = []
    for part, places in _places_by_unit(model, parts):
        items = [_divided(at, rank, size) for at in places.values()]
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
def _divided(at: list[tuple[nn.Module, str]], rank: int, size: int) -> _Sharded:
    """Replace a parameter, in all its places, by the rows of this rank."""
    whole = at[0][0]._parameters[at[0][1]]
    assert whole is not None
    if not whole.ndim:
        raise ValueError(f"model: expected parameters with rows, got the number {at[0][1]}")
    rows = -(-len(whole) // size)
    mine = whole.detach()[rank * rows : (rank + 1) * rows].clone()
    piece = nn.Parameter(mine, requires_grad=whole.requires_grad)
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
# Now everything is held against one process. A small model trains for four steps by each scheme, on
# two and on four ranks, in the setting of the opening: half of the ranks have three times as many
# targets as the others. Each rank has two micro-batches, there is weight decay, and gradients are
# clipped. The function `scheme_bytes` has the formulas to the byte. For $P$ weights they come to $2
# (n - 1)/n \cdot 4P$ bytes for the first three schemes. With $m$ micro-batches, full sharding sends
# $m (n - 1)/n \cdot 12 P$, or $8P$ in place of $12P$ with 16-bit weights. A few bytes come on top,
# for marks, buffers, and the norm.

# %% [markdown] tags=["engine"]
# ### Engine room: one run by any scheme

# %% [markdown] tags=["engine"]
# The table needs the same training by each scheme: a few steps of AdamW with decay and clipping,
# each batch divided over ranks and then into micro-batches. Each rank begins with weights of its
# own, so that a run in which rank 0's are not handed out cannot end equal. In the reference, one
# process takes all micro-batches of all ranks in turn. Bytes are counted from the first forward
# pass of a step to its end, and what is kept at the end of the backward pass, before any exchange
# that waits for it.


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
        assert worst_difference(found[0].weights, expected.weights)[1] < 10 * bound
        assert np.allclose(found[-1].norms, expected.norms, rtol=bound)
        assert math.isclose(found[-1].norms[0], expected.norms[0], rel_tol=1e-5)
        first = found[0].weights
        assert all(torch.equal(first[name], w) for run in found for name, w in run.weights.items())
        table[scheme, n] = [run.sent for run in found], found[0].kept

# %% [markdown]
# ### The ten runs

# %%
whole, n_weights = TransformerLM(config), count_parameters(config)
print("scheme         ranks   bytes sent     formula   bytes kept per weight")
for (scheme, n), (sent, kept) in table.items():
    formula = scheme_bytes(scheme, whole, n, micro_batches=2)
    assert set(sent) == {formula}
    print(f"{scheme:14}{n:6}{sent[0]:13,}{formula:12,}{kept / n_weights:24.1f}")

# %% [markdown]
# What a rank sent is the formula, to the byte, in all ten runs, and all ranks end with the same
# bits. The first gradient norm equals that of one process to five digits, those of all four steps
# to four, and the weights differ by less than a thousandth of the largest in their tensor. (Why not
# by a millionth? Adam divides each gradient by its own size, so where it is nearly zero, rounding
# decides the direction of a whole step.) Full sharding in 16 bits is held against one process whose
# products round the weights to 16 bits. It starts with the same norm; later, a weight that lies
# between two 16-bit numbers may be rounded the other way, so there the bounds are a hundred times
# wider.
#
# What is kept falls as predicted: 16 bytes for each weight without sharding, of which stage 1
# divides 8 by $n$, and full sharding all.

# %% [markdown]
# ## Eight, 64, 1,024 GPUs
#
# The formulas do not end at four ranks. {py:func}`~llmbook.distributed.predict_scheme` takes them
# to any number, with ZeRO's bytes for a weight in mixed precision: 2 for the weight, 2 for its
# gradient, and 12 for the optimizer, which keeps a float32 copy. Here is a model of 8 billion
# weights. Activations come on top, and so do the blocks that full sharding has gathered at the
# moment:

# %% [markdown] tags=["engine"]
# ### Engine room: the formulas for any number of GPUs


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
# The published numbers of the section's end, computed. A step of torchtitan's takes as long as a
# GPU needs for its 8,192 tokens.

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

# %% [markdown]
# ### The table

# %%
n_weights = count_parameters(ModelConfig.preset("llama3-8b"))
print("                 GB kept on each GPU      GB sent by each in a step")
print("GPUs                8      64   1,024         8      64   1,024")
for scheme in ("data_parallel", "zero1", "zero2", "full"):
    predicted = [predict_scheme(scheme, n_weights, n) for n in (8, 64, 1024)]
    kept = "".join(f"{p.kept / 1e9:8.1f}" for p in predicted)
    print(f"{scheme:13}{kept}  {''.join(f'{p.sent / 1e9:8.1f}' for p in predicted)}")

# %% [markdown]
# Plain data parallelism needs 128 GB on every GPU, however many there are. Stage 1 brings that to
# 34 GB at 64 GPUs for the same traffic, and full sharding goes on falling for half as much traffic
# again. The traffic hardly depends on the number of GPUs, but the time to hide it in does: with a
# fixed batch, each of 1,024 GPUs has a 128th of the work that each of eight has. That is where
# other ways to divide a model begin. {numref}`fig-distributed-memory` shows a model of 70 billion
# weights.

# %% mystnb={"figure": {"caption": "What each GPU keeps of a model of 70 billion weights, without activations. Below the dashed line it fits into 80 GB.", "name": "fig-distributed-memory"}, "image": {"alt": "Four curves of gigabytes over the number of GPUs from 1 to 1,024, both axes logarithmic. Data parallelism stays at 1,129. ZeRO-1 falls toward 282 and ZeRO-2 toward 141, above the line of 80 GB. Full sharding falls in a straight line, crosses 80 GB between 8 and 16 GPUs and reaches 1 at 1,024."}}
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
# Can such numbers be trusted? The engine room above holds them against three published sources.
# ZeRO's paper gives 120, 31.4, 16.6 and 1.9 GB for 7.5 billion weights on 64 GPUs
# {cite}`rajbhandari2020zero`, as our formulas do. BLOOM's checkpoint, with float32 weights,
# averages and 16-bit weights, is said to have 2.3 TB, and 329 GB of it in 16 bits
# {cite}`bekman2022bloom`: we get 2.2 and 328, counted in powers of 1,024. The third source says
# something new. Torchtitan publishes the speed of full sharding on 64 A100 GPUs of 80 GB
# {cite}`liang2024torchtitan`. At these speeds each GPU must have sent 22 GB in every second, near
# the 25 of a network card of 200 Gbit/s, and for 8B and 70B alike, since the traffic and the work
# to hide it behind grow together. More than half of the GPU's arithmetic was used all the same, so
# most of the traffic was hidden.
#
# Larger runs combine schemes. Llama 3 405B, on 16,384 GPUs, divides each layer over 8 of them and
# the layers over 16 stages, and the 128 GPUs that have the same part shard it among themselves
# {cite}`grattafiori2024llama3`. All of the state comes to 0.4 GB on each GPU.

# %% [markdown]
# ## How to prove a new scheme right
#
# A new scheme is believed when it has been *held against one that is believed*, from the same start
# and on the same data. Torchtitan's developers compare loss curves of 3,000 steps with those of
# plain full sharding, which was itself compared with DDP ([their
# protocol](https://github.com/pytorch/torchtitan/blob/main/docs/converging.md)). Here, curves come
# last, because they are the weakest witness. We take the wrapper that averages, the second factor
# of two from above, and look at its run with two eyes:

# %%
averaging = partial(run_scheme, reduction="mean")
wrong = launch(averaging, 2, "data_parallel", config, batches)[0]
apart = max(abs(a - b) for a, b in zip(wrong.losses, control.losses, strict=True))
ratio = wrong.norms[0] / control.norms[0]
print(f"largest difference of the losses: {'below 0.02' if apart < 0.02 else 'large'}")
print(f"first gradient norm: {ratio:.3f} of the control's")

# %% [markdown]
# So the protocol goes from the sharpest and cheapest check to the dullest and dearest.
#
# 1. **One operation.** Each collective and its backward pass equal the formula on small tensors, in
#    float64, with sizes that the ranks do not divide.
# 2. **One gradient.** From a common start, every weight's gradient equals that of one process up to
#    rounding, with unequal targets, several micro-batches, a tied weight, a frozen one, and one
#    that only one rank uses.
# 3. **A few steps.** With clipping and decay, weights and norms stay equal, and all ranks have the
#    same bits. Ranks start from *different* seeds, so that a missing broadcast shows.
# 4. **Cost.** Bytes sent and bytes kept equal the formula.
# 5. **Failure.** A rank that dies, is late, or has other data ends all ranks with a message. A run
#    that was killed resumes as if it had not been.
# 6. **Faults put in.** Average in place of a sum, leave out the broadcast: a check above must
#    notice. One that has never failed proves little.
# 7. **Curves.** Only now a real run: the same data in the same order, the old scheme as control,
#    and at least two seeds of it, because a difference means something only if it is larger than
#    between seeds. In lower precision this is the only comparison that remains.
#
# {py:func}`~llmbook.distributed.run_scheme` and {py:func}`~llmbook.distributed.worst_difference` do
# steps 2 to 4, and this chapter's tests the others up to 6. All of that runs on a laptop, before
# the first GPU is paid for.

# %% [markdown]
# ## Exercises
#
# ````{exercise} Halving the number of steps
# :label: ex-distributed-doubling
# *Twenty minutes.* The ring takes $2 (n - 1)$ steps. For small tensors, where each step costs its
# waiting time, *recursive doubling* is better: in step $k$, rank $r$ exchanges all it has with rank
# $r \oplus 2^k$ (the bit $k$ of its rank flipped), and both add. Simulate it: given the vectors of
# all ranks, return their vectors afterwards, and how many numbers each rank has sent. The number of
# ranks must be a power of two; refuse others with a `ValueError`. Leave the given vectors alone.
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
for rank, vector in enumerate(after):
    assert np.array_equal(vector, sum(kept)), f"rank {rank} has not the sum over all ranks"
assert sent == 18, "three exchanges of six numbers each, for eight ranks"
assert recursive_doubling(given[:1])[1] == 0, "one rank has nothing to send"
try:
    recursive_doubling(given[:6])
    raise AssertionError("six ranks are no power of two and must be refused")
except ValueError:
    pass

# %% [markdown]
# ````{exercise} A wrapper that averages
# :label: ex-distributed-factors
# *Fifteen minutes.* Your model is wrapped by something that *averages* gradients over ranks, and
# calls you with the numbers of targets: `counts[r][k]` is that of micro-batch $k$ on rank $r$. Each
# micro-batch's loss is the *mean* over its own targets (zero where there are none). Return the
# factors by which these losses have to be multiplied, in the same form, so that the gradient is
# that of the mean over all targets. Refuse with a `ValueError` if there are no targets at all.
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
# *Ten minutes.* With {py:func}`~llmbook.distributed.predict_scheme`, find the smallest number of
# GPUs, a multiple of 8 up to 16,384, on which the state of a model fits into `memory` bytes each.
# Full sharding also needs room for `gathered` weights of 2 bytes; the other schemes have theirs
# whole anyway. Return `None` if no number is enough.
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
alone = fewest_gpus("zero2", 10_000_000_000, 40e9, gathered=9_000_000_000)
assert alone == 8, "only full sharding gathers: the others have all weights"
