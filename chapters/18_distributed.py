# %% [markdown]
# # Many devices
#
# > Train on many devices as on one: the same gradients, with the bytes and the memory counted.
#
# The model is cut here, by layers, by the sequence and by depth.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.distributed.launch`, {py:func}`~llmbook.distributed.tensor_parallel`, {py:func}`~llmbook.distributed.ring_attention`, {py:func}`~llmbook.distributed.pipeline_step` |
# | **You need** | training ({doc}`13_training`), memory ({doc}`15_precision`) |
# | **It takes** | 60 minutes for the main line, 3 hours for everything, 90 seconds to run |

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
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import accumulate
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

# %% tags=["engine"]
#| export
# Torch and shapes
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64, Num
from torch import nn, Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# %% [markdown]
# ## A gradient wrong by a factor of two

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.attention import MultiHeadAttention, MultiHeadLatentAttention, causal_mask
from llmbook.attention import flash_attention
from llmbook.blocks import FeedForward, MixtureOfExperts
from llmbook.corpus import without_main_script
from llmbook.environment import check_whole
from llmbook.model import TransformerLM
from llmbook.optimization import cross_entropy
from llmbook.positions import check_tensor

# %% [markdown] tags=["engine"]
# ### Engine room: copied for the time being


# %% tags=["engine"]
#| export
def _packed(what: Any) -> bytes:
    """Bytes that become ``what`` in another process, by ``pickle.loads``."""
    try:
        dumps = import_module("cloudpickle").dumps
    except ImportError:
        dumps = pickle.dumps
    return dumps(what)


class _Sent:
    """A function that another process receives by value if it cannot import it."""

    def __init__(self, function: Callable[..., Any]):
        self.payload = _packed(function)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.payload,)


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


def _describe(error: BaseException, timeout: float) -> _Failure:
    """Put the error of a rank into words; in a collective, say which and for how long."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.name for f in frames if f.filename.endswith("distributed_c10d.py")]
    named = next((name for name in inside if name.lstrip("_") == name != "wrapper"), None)
    where = named or ("a collective" if frames and "wait" in (frames[-1].line or "") else None)
    where = "; ".join([*filter(None, [where]), *getattr(error, "__notes__", ())]) or None
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


# %% tags=["engine"]
#| export
class RankError(RuntimeError):
    """A rank raised an exception, died, or waited too long; the others were ended."""

    def __init__(self, message: str, rank: int = 0):
        super().__init__(message)
        self.rank = rank


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


class ByteCounter(TorchDispatchMode):
    """Counts, inside a ``with``, the bytes that this rank sends, and the calls of collectives.

    ``sent`` is in bytes, as if each collective went around a ring: twice (n - 1)/n of its data for
    an all-reduce, (n - 1)/n for a reduce-scatter or all-gather of the whole; what ``send`` sends
    counts as it is. ``by_name`` has the bytes of each collective, ``calls`` how often it was called.
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


def _size_of_group(arguments: Any) -> int:
    """How many ranks take part in the collective that was called with ``arguments``."""
    for argument in reversed(arguments):
        if isinstance(argument, torch.ScriptObject):
            with suppress(RuntimeError, TypeError):  # another object, such as the operation
                return dist.ProcessGroup.unbox(argument).size()
        elif isinstance(argument, str) and argument != "sum":
            return dist.distributed_c10d._resolve_process_group(argument).size()
    return dist.get_world_size()


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


# %% tags=["engine"]
# What the cells below use besides
import itertools

import matplotlib.pyplot as plt
import numpy as np
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from llmbook.attention import scaled_dot_product_attention
from llmbook.blocks import places_by_expert, route
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig

plt.style.use("llmbook.book")
torch.set_num_threads(1)

# %% [markdown]
# ## Cutting a layer: tensor parallelism
#
# So far, ranks divided the batch and the storage, but each multiplied whole matrices. If a layer is
# too large for that, the product itself has to be divided.
#
# Take a feed-forward network $Y = \phi(XA)\,B$ with an activation $\phi$. Cut $A$ by columns,
# $A = [A_1 \dots A_n]$, and give $A_r$ to rank $r$. A column of $XA$ needs one column of $A$ only,
# and $\phi$ acts on each number by itself, so $\phi(XA) = [\phi(XA_1) \dots \phi(XA_n)]$: each rank
# computes its part alone. Now cut $B$ by *rows*, at the same places. A product of matrices is a sum
# over the columns of the left and the rows of the right one, and that sum can be taken in groups:
#
# $$
# Y = \phi(XA)\,B = \sum_{r=1}^{n} \phi(XA_r)\, B_r .
# $$ (distributed-columns-rows)
#
# Each rank has one term, and one all-reduce adds them up. With $A$ cut by rows, $XA$ itself would
# be a sum over ranks, and since $\phi$ of a sum is not the sum of the $\phi$, they would have to
# meet before the activation as well. So columns come first, then rows {cite}`shoeybi2019megatron`.
#
# ```{figure} ../figures/distributed-columns-rows.svg
# :name: fig-distributed-columns-rows
# :alt: X is copied to two ranks. Each multiplies it by half of the columns of A, applies the activation, and multiplies by half of the rows of B. An all-reduce adds the two products.
#
# Two ranks compute one feed-forward network. Nothing is sent between the two products.
# ```
#
# Attention has the same form. A head uses its own columns of $W_Q$, $W_K$ and $W_V$, its output
# meets its own rows of $W_O$, and in between heads ignore each other. Queries that share a key head
# must stay with it, so the number of ranks has to divide `n_kv_heads`.
#
# ### What goes backward
#
# Let $dY$ be the gradient of the loss with respect to $Y$. From $Y = \sum_r Y_r$ follows
# $dY_r = dY$: the gradient passes the sum unchanged. At the other end, rank $r$ used a copy of $X$
# and finds $dX_r$, which knows of its own part of the layer only. $X$ acts on the loss through all
# copies, so $dX = \sum_r dX_r$, which is another all-reduce. Each of these two operators is the
# other one turned around:
#
# | operator | where | forward | backward |
# |---|---|---|---|
# | $f$, {py:func}`~llmbook.distributed.enter_parallel` | before the columns | identity | all-reduce |
# | $g$, {py:func}`~llmbook.distributed.leave_parallel` | after the rows | all-reduce | identity |
#
# Without $f$ everything below would get a partial gradient, a different one on each rank, and the
# loss might fall all the same. A block has two branches, each with one all-reduce forward and one
# backward, of $BTd$ numbers. A ring sends $2\frac{n-1}{n}$ times what it reduces. With $b$ bytes a
# number, each rank sends for each block
#
# $$
# 4 \cdot 2\,\tfrac{n-1}{n} \cdot b\,B\,T\,d \quad \text{bytes.}
# $$ (distributed-tensor-bytes)
#
# With the two operators, what a rank computes fits into one line:


# %%
def column_then_row(x, own_columns, own_rows):
    return leave_parallel(F.silu(enter_parallel(x) @ own_columns) @ own_rows)


# %% [markdown] tags=["engine"]
# ### Engine room: the two operators and the two layers, and how a model is cut

# %% [markdown] tags=["engine"]
# A module that knows its place among the ranks can be used outside of a launch, too; there it is
# the only rank. What a world size does not divide is refused by all ranks alike, for all of them
# compute the same remainder, before anything is sent.


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
# The layers take a rank's share out of a whole `nn.Linear`. A bias of the second one belongs to the
# sum, not to its terms. Otherwise it would be added once for each rank.


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
        self.weight = nn.Parameter(linear.weight.detach()[rows].clone())
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach()[rows].clone())

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Return as many numbers for each vector as this rank has rows of the weight."""
        check_tensor("x", x, "...", self.in_features)
        return F.linear(x, self.weight, self.bias)


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
        self.weight = nn.Parameter(linear.weight.detach()[:, columns].clone())
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """Return the whole output, the same on all ranks."""
        check_tensor("x", x, "...", self.weight.size(1))
        y = leave_parallel(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


# %% [markdown] tags=["engine"]
# One more gradient is a part only. Where queries and keys are normalized, all heads share the
# gains, and each rank has seen its own heads only. Their gradients are summed as well.

# %% tags=["engine"]
#| export
_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


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

    It must have the same weights on all ranks, and is changed in place. Input, output and all other
    parameters are the same on all ranks, and so are their gradients. Dropout draws on each rank; in
    training with it, seed all ranks alike. A ``ValueError`` on all ranks tells of key heads or a
    width that their number does not divide. Source: Shoeybi et al. (2019), section 3.
    """

    def enter(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (enter_parallel(inputs[0], group), *inputs[1:])

    n = _place(group)[1]
    for _, branch in _branches(module, n):
        for name, layer in list(branch.named_children()):
            if isinstance(layer, nn.Linear):
                cut = ColumnParallelLinear if name in _COLUMNS else RowParallelLinear
                setattr(branch, name, cut(layer, group))
            else:  # gains for queries or keys of all heads
                for gain in layer.parameters():
                    gain.register_hook(partial(_summed, group=group))
        if isinstance(branch, MultiHeadAttention):
            branch.n_heads, branch.n_kv_heads = branch.n_heads // n, branch.n_kv_heads // n
        branch.register_forward_pre_hook(enter)
    return module


# %% [markdown] tags=["engine"]
# To compare, the gradients of all ranks are put together. A rank has the whole gradient of a
# parameter, a share of it, or none. `cut_step` is what each rank runs:


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
    with ByteCounter() as sent:
        loss = next_loss(tensor_parallel(model), ids)
        loss.backward()
    return loss.item(), gradients(model), sent.sent


sizes = {"d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
config = ModelConfig(vocab_size=64, context_length=64, **sizes)
seed_everything(0)
model, ids = TransformerLM(config).double(), torch.randint(64, (4, 33))
loss = next_loss(model, ids)
loss.backward()
loss, whole = loss.item(), gradients(model)
model.zero_grad()


# %% [markdown]
# ### Equal to one process
#
# {py:func}`~llmbook.distributed.tensor_parallel` cuts the linear layers of all attention and
# feed-forward networks of a model and puts $f$ and $g$ around them. Two ranks take a step with a
# model of four layers, in double precision, and are compared with one process:

# %%
losses, found, sent = zip(*launch(cut_step, 2, model, ids), strict=True)
print(compared(losses, found))
formula = config.n_layers * 4 * (2 * 1 / 2) * 8 * 4 * 32 * config.d_model
print(f"each rank sent {sent[0]:,} bytes; the formula says {formula:,.0f}")
assert set(sent) == {formula}

# %% [markdown]
# These bytes grow with the tokens of a batch, and not with the parameters as those of data
# parallelism do. And all ranks *wait* for them, four times in every block. So tensor parallelism
# stays inside a server, whose devices have the fastest links {cite}`narayanan2021efficient`. In the
# room below, torch's DTensor cuts the same model by a plan of names, with the same gradients.

# %% [markdown] tags=["engine"]
# ### Engine room: the same by torch, with DTensor

# %% [markdown] tags=["engine"]
# PyTorch's DTensor is a tensor that knows how it is cut. `parallelize_module` takes a plan that
# says which linear layers are columns and which are rows, and inserts the all-reduces. But torch
# cuts a matrix wherever the number of ranks puts the edge. If that is inside a head, the model
# fails later, or half a head is taken for one. So the plan is refused where the cut would be wrong.


# %% tags=["engine"]
#| export
def tensor_parallel_plan(module: nn.Module, n_ranks: int) -> dict[str, Any]:
    """Return the plan by which torch's ``parallelize_module`` cuts ``module`` over ``n_ranks``.

    A ``ValueError`` tells of key heads or a width that ``n_ranks`` does not divide.

    >>> plan = tensor_parallel_plan(FeedForward(8, 16), 2)
    >>> {name: type(style).__name__ for name, style in plan.items()}
    {'gate_proj': 'ColwiseParallel', 'up_proj': 'ColwiseParallel', 'down_proj': 'RowwiseParallel'}
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

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
# each of $n$ ranks gets a chunk of $T/n$ tokens. Norms, feed-forward networks and the loss treat
# each token by itself and do not notice. Only attention looks across the cut.
#
# Chapter 09 had the same difficulty inside one device.
# {py:func}`~llmbook.attention.flash_attention` reads keys in tiles, and keeps the largest score $m$
# and the sum $s$ of $e^{\text{score} - m}$. Now a tile comes from another rank. Let tile $j$ have
# the {term}`log-sum-exp` $\ell_j = m_j + \ln s_j$ and the output $o_j$, its own weighted mean of
# values. Then $e^{\ell_j}$ is its sum of $e^{\text{score}}$, and $e^{\ell_j} o_j$ its sum of
# $e^{\text{score}} v$. Both just add up:
#
# $$
# o = \frac{\sum_j e^{\ell_j} o_j}{\sum_j e^{\ell_j}} = \sum_j w_j\, o_j , \qquad
# w_j = e^{\ell_j - \ell} , \quad \ell = \ln \sum_j e^{\ell_j} .
# $$ (distributed-merge)
#
# Merging is attention over tiles: $\ell_j$ is the score of a tile, $o_j$ its value. With two at a
# time:


# %% tags=["engine"]
#| export
# What flash_attention returns with return_lse
class AttentionPart(NamedTuple):
    """Attention to some of the keys: the output, and the log-sum-exp of each query's scores."""

    out: Float[Tensor, "*batch queries d_value"]
    log_sum: Float[Tensor, "*batch queries"]


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
# and receives those of the one before. After $n - 1$ such steps everyone has seen everything
# {cite}`liu2023ring`. For the way back, {eq}`distributed-merge` is differentiated like any softmax:
#
# $$
# do_j = w_j\, do , \quad dw_j = do \cdot o_j , \quad
# d\ell_j = w_j \Bigl( dw_j - \sum_i w_i\, dw_i \Bigr) = w_j\; do \cdot (o_j - o) .
# $$ (distributed-merge-backward)
#
# Here $\ell$, which gives $w_j$, and $o$ are those of the whole row, and a rank has both for its
# queries when the forward pass ends. So keys and values go around once more. Each rank computes a
# tile again, applies chapter 09's backward pass, and adds its share to the gradients of these keys
# and values, which *travel with them* and are home after $n$ steps. With $c$ bytes for the keys and
# values of a chunk, a rank sends
#
# $$
# \underbrace{(n-1)\,c}_{\text{forward}} + \underbrace{(n-1)\,c}_{\text{again}} +
# \underbrace{n\,c}_{\text{gradients}} = (3n-2)\,c \quad \text{bytes.}
# $$ (distributed-ring-bytes)

# %% [markdown] tags=["engine"]
# ### Engine room: the ring, its tiles, and its way back

# %% [markdown] tags=["engine"]
# A chunk consists of one piece of the row, or of two. Of two pieces, the later one sees the whole
# earlier one, the earlier one sees nothing, and a piece sees itself through a triangle. So no mask
# is ever made: tiles are whole, triangles, or left out.


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
# Passing on is a message to one rank and another from a second one, and both are waited for. With
# gloo, an `isend` that nobody waits for hangs the *next* operation of that process, a barrier for
# example, which is not where one looks for the fault. And if all ranks of a ring wait for their
# sending to end before they receive, they may wait for ever. So both are started, then both
# awaited.


# %% tags=["engine"]
#| export
def _passed_on(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Send ``x`` to the next rank of the ring; return what came from the one before."""
    rank, n = _place(group)
    if n == 1:
        return x
    x, received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    works = [
        dist.isend(x, group=group, group_dst=(rank + 1) % n),
        dist.irecv(received, group=group, group_src=(rank - 1) % n),
    ]
    for work in works:
        if work is not None:
            work.wait()
    return received


# %% [markdown] tags=["engine"]
# The forward and the backward pass walk the same way round. Keys and values are joined in one
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
            kv = _passed_on(kv, ring.group)
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
            d_kv = _passed_on(d_kv, ring.group)
            if step < n - 1:
                kv = _passed_on(kv, ring.group)
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
    shape raise a ``ValueError`` on all ranks. Source: Liu et al. (2023), algorithm 1.
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
        check_agreed(group, **sizes, **heads, is_causal=int(is_causal), zigzag=int(zigzag))
    return _RingAttention.apply(q, torch.cat([k, v], dim=-1), _Ring(is_causal, zigzag, group))


# %% [markdown] tags=["engine"]
# What two ranks run below, and what is demanded of the result:


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


sizes = (2, 4, 64, 16), (2, 2, 64, 16), (2, 2, 64, 16)
inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
d_out = torch.randn(2, 4, 64, 16, dtype=torch.float64)
scaled_dot_product_attention(*inputs, is_causal=True).backward(d_out)


# %% [markdown]
# ### Who has work, and when?
#
# A causal mask hides later chunks. Rank 0 is finished after its own chunk, while the last rank
# works at every step, and each step takes as long as its busiest rank. The remedy is to cut the row
# into $2n$ pieces and to give rank $r$ an early and a late one, $r$ and $2n - 1 - r$.
# {py:func}`~llmbook.distributed.ring_work` counts pairs of a query and a key that it sees:

# %%
print("ranks  cut         least work  most work  time / even shares")
for n, cut in itertools.product((2, 4, 8), ("contiguous", "zigzag")):
    work = ring_work(n, 16 * n, zigzag=cut == "zigzag")
    each, total = work.sum(dim=1), work.sum()
    lockstep = work.amax(dim=0).sum() * n / total
    print(f"{n:5}  {cut:10} {each.min() / total:11.0%} {each.max() / total:10.0%} {lockstep:19.2f}")

# %% [markdown]
# With contiguous chunks, the time approaches twice that of an even division. With the *zigzag* cut,
# all ranks have the same work at every step: of the four pairs of pieces that two different ranks
# form, two are visible. (Another way is to deal out single tokens {cite}`brandon2023striped`.) A
# token's place in the text no longer follows from its place on the rank, so positions and targets
# must be cut like the tokens, by {py:func}`~llmbook.distributed.cut_sequence`.

# %% [markdown]
# ### Equal to one process, and to the formula
#
# Two ranks attend to rows of 64 tokens and go backward:

# %%
for zigzag in (False, True):
    ranks = launch(ring_step, 2, inputs, d_out, zigzag)
    print(f"{'zigzag' if zigzag else 'contiguous':10}: {ring_compared(ranks)}")
formula = (3 * 2 - 2) * 2 * (2 * 2 * 32 * 16 * 8)
print(f"each rank sent {ranks[0][2]:,} bytes; the formula says {formula:,}")

# %% [markdown]
# ## Cutting the depth: pipelines
#
# The last cut is the plainest: the first layers go to rank 0, the next to rank 1, and so on. Only
# neighboring *stages* talk, $BTd$ numbers at each cut. But while one stage works on the batch, all
# others wait.
#
# So the batch is cut into $m$ micro-batches, and stage 0 takes the second while stage 1 has the
# first. Let there be $p$ stages, and let a micro-batch take $f$ forward and $b$ backward in each.
# The simplest schedule, GPipe {cite}`huang2019gpipe`, sends all micro-batches forward, then all
# backward. The last stage starts when the first micro-batch has passed the $p - 1$ others, and has
# done its forward passes after $(p-1+m)f$. The backward passes run the other way, in $(p-1+m)b$.
# Each stage works for $m(f+b)$ of that time. The rest is the *bubble*:
#
# $$
# \text{bubble} = 1 - \frac{m(f+b)}{(m+p-1)(f+b)} = \frac{p-1}{m+p-1} .
# $$ (distributed-bubble)
#
# More micro-batches make it smaller. But with GPipe each stage keeps the activations of all $m$.
# They are freed by backward passes, which need not wait that long. In *one forward, one backward*
# (1F1B), stage $s$ begins with as many micro-batches as there are stages behind it, $p - 1 - s$,
# and then alternates {cite}`narayanan2021efficient`:


# %% tags=["engine"]
#| export
# What a schedule consists of
class PipelineAction(NamedTuple):
    """One thing that a stage does: ``"forward"`` or ``"backward"`` with one micro-batch."""

    kind: str
    microbatch: int


# %%
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


# %% [markdown]
# A schedule is data. {py:func}`~llmbook.distributed.pipeline_timing` runs it without a model: an
# action begins when its stage is free and what it needs has arrived. A backward pass takes twice as
# long as a forward one, since it multiplies twice, for inputs and for weights.

# %% [markdown] tags=["engine"]
# ### Engine room: running a schedule on paper


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
# Each pass over the stages runs as many actions as have what they need. If no stage can go on, and
# something is left to do, the stages wait for each other. A program that followed such a schedule
# would hang; here it is refused before anything is sent.


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

# %% mystnb={"figure": {"caption": "GPipe (above) and 1F1B (below) with 4 stages and 6 micro-batches, drawn from the schedules. Numbers are micro-batches; blue is forward, orange backward. White space is the bubble, and it is equally large in both.", "name": "fig-distributed-schedules"}, "image": {"alt": "Two charts with a row for each of four stages over time. Above, all six short forward passes of a stage come first and then six long backward passes. Below, stages alternate forward and backward after a start of three, two, one and no forward passes. Both end at time 27."}}
kinds = {"GPipe": gpipe_schedule, "1F1B": one_forward_one_backward}
fig, axes = plt.subplots(2, 1, figsize=(7.2, 4), sharex=True)
for ax, (name, make) in zip(axes, kinds.items(), strict=True):
    draw_schedule(ax, name, make(4, 6))
axes[1].set_xlabel("time, in forward passes of one micro-batch through one stage")
plt.show()

# %%
print("stages  micro-batches  formula   GPipe: bubble, kept      1F1B: bubble, kept")
for p, m in ((2, 4), (4, 4), (4, 16), (8, 32), (8, 128)):
    row = [f"{p:6} {m:14} {(p - 1) / (m + p - 1):8.1%}"]
    for make in kinds.values():
        timing = pipeline_timing(make(p, m))
        row.append(f"{timing.bubble:14.1%} {max(timing.kept):7}")
        assert abs(timing.bubble - (p - 1) / (m + p - 1)) < 1e-9
    print("".join(row))

# %% [markdown]
# Both have the bubble of {eq}`distributed-bubble`. 1F1B is not faster. But stage 0 keeps $p$
# micro-batches and not $m$, so $m$ can be made large. The bubble itself shrinks if each rank has
# several short stages, at the price of more messages {cite}`narayanan2021efficient`, or if
# gradients of weights, for which nobody waits, are put off to fill the gaps {cite}`qi2024zero`.

# %% [markdown] tags=["engine"]
# ### Engine room: stages, messages, and a matrix at both ends

# %% [markdown] tags=["engine"]
# A stage shares its parameters with the model that it was cut from. (A model too large for that is
# built on the `meta` device first.) Tied embeddings are the one thing that a cut by depth tears
# apart: first and last stage have the matrix each, with a part of its gradient each.


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
# A {py:class}`~llmbook.distributed.PipelineStage` has a share of a model's blocks, the first one
# the embedding as well, and the last one the head. {py:func}`~llmbook.distributed.pipeline_step`
# follows a schedule. Autograd does not reach across processes, so a stage keeps its input $x$ and
# output $y$ of each micro-batch. When $dy$ arrives, `y.backward(dy)` fills the gradients of its
# weights and of $x$, and the latter is sent back. Losses are summed and divided by the targets of
# the *whole* batch. Two ranks with two blocks each, and four micro-batches:

# %%
for name, make in kinds.items():
    (_, first), (found, last) = launch(pipeline_worker, 2, model, ids, make)
    print(f"{name:5}: {compared([found], [first, last])}")

# %% [markdown]
# ## Experts on several devices
#
# The experts of a mixture (chapter 10) are cut in their own way: each rank has some experts, whole,
# and its own share of the tokens. Tokens travel to their experts, and the results back. Every rank
# sends something different to every other one, an *all-to-all*. If a rank has $N$ tokens with $k$
# active experts each, and routing is even, $\frac{n-1}{n}$ of its $Nk$ vectors leave. There are two
# exchanges forward and their mirror images backward, so for each layer a rank sends
#
# $$
# 4\,\tfrac{n-1}{n}\, b\, N k d \quad \text{bytes.}
# $$ (distributed-expert-bytes)
#
# But routing is not even, and all wait for the busiest rank. A *capacity* bounds the waiting: of
# all $M$ tokens, each of $E$ experts takes at most $\gamma M k / E$, and the rest skip it
# {cite}`lepikhin2021gshard`. A bias on the router that evens out the loads attacks the cause
# {cite}`deepseek2024v3`.

# %% [markdown] tags=["engine"]
# ### Engine room: what a capacity drops

# %% [markdown] tags=["engine"]
# Here are 4 ranks with 2 experts each, 4,096 tokens, $k = 2$, and a router with random preferences.
# A capacity buys shorter waits with dropped tokens:

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
# | cut | a rank holds | and sends | when |
# |---|---|---|---|
# | data (and ZeRO, FSDP) | rows of the batch | gradients or parameters, each step | always, over all devices that are left |
# | tensor | columns and rows of matrices | $8\frac{n-1}{n} BTd$ a block | a layer is too large; inside a server |
# | sequence | a chunk of each row | $3n-2$ chunks of keys and values a block | rows are too long |
# | pipeline | some of the layers | $2BTd$ at each cut | the model is too deep; between servers |
# | expert | some of the experts | $4\frac{n-1}{n}Nkd$ a layer | there are many experts |
#
# They combine, since each cuts along an axis of its own. Devices are numbered by coordinates in a
# *mesh*: among 16 as $2 \times 4 \times 2$ for data, pipeline and tensor, each belongs to a data
# group of 2, a pipeline of 4 and a tensor group of 2. Each collective stays within one group, so
# our functions take a `group`. The axis that talks most gets the shortest links. Llama 3 orders its
# axes, from the innermost: tensor, context, pipeline, data {cite}`grattafiori2024llama3`.

# %% [markdown]
# ## Exercises
#
# ````{exercise} Two tiles from two ranks
# :label: ex-distributed-merge
# *Ten minutes.* A rank that has attended to some keys holds, for each query, the largest score `m`,
# the sum `s` of $e^{\text{score} - m}$, and the sum `o` of $e^{\text{score} - m}$ times the values,
# not yet divided. Write `merge_states(a, b)`, which makes one such triple `(m, s, o)` of two. `m`
# and `s` have the shape `(queries,)`, `o` has `(queries, d_value)`. Scores of 1,000 must not
# overflow, and a tile of which a query sees nothing has `m` = -inf there, with `s` and `o` zero.
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
found = merge_states(one_state(scores[:, :5], values[:5]), one_state(scores[:, 5:], values[5:]))
assert all(x.isfinite().all() for x in found), (
    "scores of 1,000 overflow: subtract the common maximum"
)
assert torch.equal(found[0], expected[0]), "m is not the largest score of both tiles"
assert torch.allclose(found[1], expected[1]), "s: the two sums were made relative to different m"
assert torch.allclose(found[2], expected[2], atol=1e-5), "o must be rescaled as s is"
blind = torch.full((3, 5), -torch.inf)
nothing = one_state(blind, values[:5])
for one, other in ((nothing, expected), (expected, nothing)):
    found = merge_states(one, other)
    same = all(torch.allclose(x, y) for x, y in zip(found, expected, strict=True))
    assert same, "a tile in which nothing is visible changes the result"
assert not any(x.isnan().any() for x in merge_states(nothing, nothing)), "two blind tiles give NaN"

# %% [markdown]
# ````{exercise} Less memory than 1F1B
# :label: ex-distributed-limit
# *Thirty minutes.* Under 1F1B, stage 0 keeps `n_stages` micro-batches. Suppose that there is memory
# for `limit` of them only. Write `limited_schedule(n_stages, n_microbatches, limit)`, which returns
# for each stage its list of pairs such as `("forward", 0)`. No stage may ever keep more than
# `limit` micro-batches, none may keep more than under 1F1B, and nothing else may be slower than it
# must be. Before you run the check: what will the bubble be with a limit of 1?
# ````


# %% tags=["solution"]
def limited_schedule(n_stages: int, n_microbatches: int, limit: int) -> list[list[tuple[str, int]]]:
    """Return, for each stage, what it does in order, keeping at most ``limit`` micro-batches."""
    schedule = []
    for stage in range(n_stages):
        # 1F1B keeps one more than it starts with: the forward pass before each backward one.
        # With a limit of 1 a micro-batch is alone in the pipeline: the bubble is 1 - 1/n_stages.
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


for p, m, limit in ((4, 8, 4), (4, 8, 2), (4, 8, 1), (3, 7, 2), (2, 4, 9)):
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
    timing = pipeline_timing([[PipelineAction(*action) for action in order] for order in found])
    least = (m + p - 1) * 3 if limit >= p else 0
    assert not least or timing.duration == least, f"{given}: slower than 1F1B"
    if limit == 1:
        assert timing.duration == m * p * 3, f"{given}: it takes {timing.duration}, not {m * p * 3}"
times = [
    pipeline_timing([[PipelineAction(*a) for a in order] for order in limited_schedule(4, 8, n)])
    for n in (1, 2, 3, 4)
]
durations = [timing.duration for timing in times]
assert durations == sorted(durations, reverse=True), "more memory must not make it slower"
assert durations[1] < durations[0], "a limit of 2 must be faster than a limit of 1"
