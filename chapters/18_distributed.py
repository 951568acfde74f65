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
from typing import Any, NamedTuple

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
