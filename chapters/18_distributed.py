# %% [markdown]
# # Many devices
#
# > Train on many devices as on one: the same gradients, with the bytes and the memory counted.
#
# To be written.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.distributed.launch` |
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
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection, wait
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

# %% [markdown]
# ## A gradient wrong by a factor of two

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.corpus import without_main_script
from llmbook.environment import check_whole

# %% [markdown]
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


def _describe(error: BaseException, timeout: float) -> _Failure:
    """Put the error of a rank into words; in a collective, say which and for how long."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f.name for f in frames if f.filename.endswith("distributed_c10d.py")]
    named = next((name for name in inside if name.lstrip("_") == name != "wrapper"), None)
    where = named or ("a collective" if frames and "wait" in (frames[-1].line or "") else None)
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
        group = {"store": store, "rank": rank, "world_size": world_size}
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **group)
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
        context.set_forkserver_preload(["torch.distributed", "llmbook.distributed"])
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
        for pipe, process in zip(pipes, processes, strict=True):
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
# ## The same by torch's own
#
# PyTorch has all of this ready made, tuned for clusters. Having built it, we know what to ask of
# it: does it return sums or means of gradients, when does it exchange them, and what does it
# save? `torchrun` starts one process per device and tells each its rank and the number of ranks
# by environment variables. It watches them, too: when one dies, it ends the others.
# `DistributedDataParallel` (DDP) exchanges gradients in buckets during the backward pass.
# `fully_shard` (FSDP2) gives each rank a piece of every parameter, gathers a block before it
# computes and frees it afterwards. `parallelize_module` splits single layers.
#
# All three hook into the **forward pass** of a module, and here lies a trap for our own code.
# `next_token_objective` calls `hidden_states`, and multiplies by the head in chunks; it never
# calls `forward`. A DDP wrapper has no `hidden_states`, so the first attempt fails. The obvious
# second one is `next_token_objective(ddp.module, batch)`, and that runs. The losses fall. But
# `forward` of the wrapper was never called, so it does not know that there will be a backward
# pass, and exchanges nothing. Each rank trains a model of its own on its own part of the data, in
# silence.
#
# The cure is to make the objective the forward pass of a small module and wrap *that*. For FSDP2
# there is a function that registers other methods beside `forward`, and we register
# `hidden_states`.

# %% tags=["engine"]
#| export
# What this part takes from elsewhere, and from earlier chapters
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from llmbook.batches import Batch, BatchSampler
from llmbook.environment import check_choice, check_path
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import SGD, build_optimizer
from llmbook.training import Objective, Parallel, Precision, Sums, TrainingConfig, TrainingError
from llmbook.training import Trainer, load_model_state, model_state, next_token_objective
from llmbook.training import random_states, set_random_states


# %% [markdown] tags=["engine"]
# ### Engine room: the three wrappers around our model, and checkpoints in pieces

# %% [markdown] tags=["engine"]
# The module whose forward pass is an objective is all that DDP needs. `shard_by_torch` makes each
# block a unit of its own, and the rest another one: the embedding and a head that is tied to it are
# then in the same unit, and stay tied.


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
# Tensor parallelism splits the matrices of a block by heads and by inner vectors: q, k, v, gate
# and up by their outputs, the two that follow by their inputs, so that a block exchanges two sums
# in the forward and two in the backward pass {cite}`shoeybi2019megatron`. Our attention asks for
# heads by `view(..., -1, d_head)`, so it does not notice that it has a part of them. One thing
# torch cannot know: the gain that normalizes queries or keys is used for different heads on each
# rank, so its gradient must be summed.


# %% tags=["engine"]
#| export
def split_by_torch(model: TransformerLM, mesh: DeviceMesh | None = None) -> TransformerLM:
    """Split the heads and inner vectors of ``model`` over ranks, in place; return it.

    Each rank gets the whole batch. Embedding, norms and head stay whole on each. A ``ValueError``
    if the ranks of ``mesh``, by default all, do not divide heads or inner vectors.
    """
    mesh = _all_ranks() if mesh is None else mesh
    _check_split(model, mesh.size())
    for block in cast(Any, model).blocks:
        plan: dict[str, Any] = {f"attention.{x}_proj": ColwiseParallel() for x in "qkv"}
        plan |= {f"feed_forward.{x}_proj": ColwiseParallel() for x in ("gate", "up")}
        plan |= {"attention.o_proj": RowwiseParallel(), "feed_forward.down_proj": RowwiseParallel()}
        there = dict(block.named_modules())
        parallelize_module(block, mesh, {k: v for k, v in plan.items() if k in there})
        for norm in (block.attention.q_norm, block.attention.k_norm):  # sees a part of the heads
            for parameter in () if norm is None else norm.parameters():
                parameter.register_hook(partial(_summed, group=mesh.get_group()))
    return model


# %% tags=["engine"]
#| export
def _summed(gradient: Tensor, group: Any) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total


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
# A sharded checkpoint is written by all ranks at once, each what it has, with a table of what is
# where. So it can be read at another number of ranks, or by a model that is sharded in another way,
# and no rank ever holds the whole.


# %% tags=["engine"]
#| export
def save_sharded(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write model and optimizer to ``folder``, each rank what it has; all ranks call this."""
    from torch.distributed import checkpoint

    checkpoint.save(_both(model, optimizer), checkpoint_id=check_path(folder, "folder"))


def load_sharded(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read what ``save_sharded`` wrote, at any number of ranks and in any way of sharding."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import set_state_dict

    path = check_path(folder, "folder")
    if not (path / ".metadata").exists():
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
# For the check below, a tiny model with tied weights, and the rows of a rank:


# %% tags=["engine"]
def tiny_model() -> TransformerLM:
    """A model of which all ranks have the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "context_length": 32, "d_model": 32, "n_layers": 2, "n_heads": 4}
    return TransformerLM(ModelConfig(**sizes, tie_embeddings=True))


def rows(of_all: bool = False) -> Batch:
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
    next_token_objective(model, rows())[0].backward()
    optimizer.step()
    save_sharded(folder, model, optimizer)
    return as_one(model.parameters())


def load_part(folder: str) -> Tensor:
    """Read them at any number of ranks, and return the weights."""
    model = shard_by_torch(tiny_model())
    optimizer = build_optimizer(model, "adamw", lr=0.1)
    load_sharded(folder, model, optimizer)
    return as_one(model.parameters())


# %% [markdown]
# ### Equal to one process, or not
#
# On two ranks, each with half of the rows, the gradient of the mean loss should be the one that a
# single process finds on all of them.


# %%
def gradient(way: str) -> Tensor:
    model = tiny_model()
    if way == "FSDP2":
        loss, count = next_token_objective(shard_by_torch(model), rows())
    elif way == "DDP of an ObjectiveModule":
        ddp = DistributedDataParallel(ObjectiveModule(model))
        loss, count = ddp(next_token_objective, rows())
    else:
        ddp = DistributedDataParallel(model)
        loss, count = next_token_objective(ddp.module, rows())
    (loss / count).backward()
    return as_one(p.grad for p in model.parameters())


# %% tags=["engine"]
model = tiny_model()
total, count = next_token_objective(model, rows(of_all=True))
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
# The first line is the silent failure: the gradient is off by a large part of its norm, and the
# ranks drift apart. It shows in no loss curve. What finds it is this comparison, or the simpler
# question whether two ranks have the same gradients. The other two agree with one process to
# float tolerance, tied weights included.
#
# A checkpoint of FSDP2 is written in pieces. It must not matter how many ranks read it:

# %%
with tempfile.TemporaryDirectory() as folder:
    weights = launch(save_half, 2, folder)[0]
    loaded = {n: launch(load_part, n, folder)[0] for n in (1, 3)}
print(", ".join(f"{n} rank(s): {int((w != weights).sum())} differ" for n, w in loaded.items()))


# %% [markdown]
# ## The Trainer on several ranks
#
# The trainer of {doc}`13_training` knows nothing of ranks. It has a place for an object that
# does, as it has one for precision: at each point where several processes have something to say
# to each other it calls a method of `parallel`, which does nothing in one process.
# {py:class}`~llmbook.distributed.Ranks` fills these methods in. There are few such points, and
# each is a pitfall that has cost somebody a run:
#
# | where | what one process does | what ranks must do |
# |---|---|---|
# | data | take the next batch | take every n-th row of the same batch, so that the order of the data does not depend on the number of ranks |
# | micro-batches | add gradients up | exchange them in the last one only, with the forward pass inside `no_sync` |
# | mean | divide by the targets | divide by the targets of all ranks *and* all micro-batches |
# | clipping | take the norm | take it over all pieces, after the exchange |
# | decisions | skip a step, shrink the scale, stop | decide on the same numbers, or one rank waits for ever |
# | evaluation | score all batches | score some each, and add sums and counts |
# | logs and files | write | only rank 0 writes; what it reads, or fails to read, it tells the others |
# | checkpoints | save the state | gather it first, with the random states of all ranks |
#
# The third line is the opening of this chapter again: torch's wrappers take the mean over ranks,
# and rows have unequal numbers of targets. So the trainer turns means into sums, and divides once
# by the count of everything. The last line decides what a checkpoint *is*: here it is the file
# that one process would have written. So it can be continued by one process, by three, or by
# another scheme. Gathering everything on one rank stops working when a model does not fit there;
# then the pieces of `save_sharded` are the way.
#
# A run asks for it by one setting, `parallel: ddp`, `fsdp` or `tp`, and is started by `torchrun`:
#
# ```
# torchrun --nproc_per_node=2 -m llmbook.training config.yaml --folder runs/two
# ```
#
# Several processes can also fail in new ways. If one dies, `torchrun` ends the others and says
# which it was, and the same command goes on from the newest checkpoint. If one stands still, the
# others wait in a collective until its time is up, and say in which. A setting that does not fit,
# such as heads that two ranks cannot share, is refused by every rank before the first step.

# %% [markdown] tags=["engine"]
# ### Engine room: what the ranks of a trainer say to each other

# %% [markdown] tags=["engine"]
# Joining, and dividing model and data. The seeds of ranks differ from here on, because each draws
# the dropout of its own rows; with tp all have the same rows, and the same seed.


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
# A step. `parts` looks one micro-batch ahead, to know which is the last. An evaluation deals out
# whole batches; if their number is uneven, a rank goes through its last one twice and counts it
# once, because a sharded model needs all ranks for every pass.


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
# Tensors in pieces. The norm is that of all of them: squares of pieces are summed over ranks,
# those of whole tensors, which every rank has, are not. An optimizer gets the two kinds one after
# the other. In float16 an overflow on one rank must be one on all, or their scales would part.


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
            pieces[0].fill_(math.nan)
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


def _is_piece(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and any(p.is_shard() for p in tensor.placements)


# %% [markdown] tags=["engine"]
# Checkpoints. Whole tensors go in and out, so the file does not know of ranks.


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
        load_model_state(model, {k: _divided(v, own.get(k)) for k, v in state.items()})

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Give the optimizer this rank's part of a state of whole tensors."""
        optimizer.load_state_dict(state)
        for part in getattr(optimizer, "optimizers", [optimizer]):
            for parameter, entries in part.state.items():
                for name, value in entries.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        entries[name] = _divided(value, parameter)


def _divided(value: Any, pattern: Any) -> Any:
    """Return this rank's part of a tensor, divided like ``pattern``."""
    if not isinstance(pattern, DTensor) or isinstance(value, DTensor):
        return value
    where = pattern.device_mesh, pattern.placements
    return distribute_tensor(value.to(pattern.device), *where, src_data_rank=None)


# %% [markdown] tags=["engine"]
# Agreement. Rank 0 does what only one may do, and tells the others what came of it, be it an
# error. Random states are kept for each rank; at another number of ranks there is no such thing
# as the same dropout, and new states are drawn from the first one.


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
# Twenty steps of a tiny model, with four micro-batches in a step on one process and two on each
# of two ranks: how far are the curves apart?

# %%
alone = losses(None)
for way in ("ddp", "fsdp", "tp"):
    apart = max(abs(a - b) for a, b in zip(alone, launch(losses, 2, way)[0], strict=True))
    size = "less than 0.0001" if apart < 1e-4 else f"{apart:.4f}"
    print(f"{way:4}: {alone[0]:.1f} to {alone[-1]:.1f} nats, apart from one process by {size}")

# %% [markdown]
# One curve is a weak test. The strong one is a kill. `benchmarks/killing_ranks.py` trains with
# dropout on two ranks, kills one of them by SIGKILL at a random moment twenty times, and starts
# again each time; weights, optimizer, random states of both ranks, best model and log must then
# be those of a run that nobody touched. Twenty kills, eight of them in the middle of a save, left
# no differing bit, and every attempt had ended within 8 seconds.
