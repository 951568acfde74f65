"""Chapter 18: processes that end together, and schemes that equal one process."""

import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch import nn

from llmbook.blocks import FeedForward
from llmbook.distributed import (
    SCHEMES,
    ByteCounter,
    DataParallel,
    RankError,
    ShardedOptimizer,
    all_gather_ring,
    all_reduce_ring,
    check_agreed,
    check_agreed_parameters,
    clip_sharded_gradients,
    full_state_dict,
    launch,
    pass_on,
    place_in_group,
    predict_scheme,
    reduce_scatter_ring,
    rows_of_rank,
    run_scheme,
    scheme_bytes,
    shard_by_torch,
    shard_model,
    sum_over_ranks,
    tensor_parallel,
    worst_difference,
)
from llmbook.model import ModelConfig, TransformerLM, count_parameters
from llmbook.optimization import SGD, AdamW, clip_gradients, parameter_groups

# The functions below travel by value: ranks need not import this file, and pytest with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
LINUX = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's /proc")


def refused(call, *arguments, **options):
    """The message of a ValueError; it must be one."""
    try:
        call(*arguments, **options)
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


# Processes


config = {"a": "name that torch.distributed has for a module that cannot be pickled"}


def answer(factor, *, offset=0):
    x = torch.tensor([dist.get_rank() + 1.0])
    dist.all_reduce(x)
    print("part of a line, ", end="")
    print("and its end")
    print("no newline", end="")
    return factor * x.item() + offset * len(config), torch.get_num_threads()


def test_results_come_by_rank_and_lines_with_their_rank(capfd):
    assert launch(answer, 3, 10.0) == [(60.0, 1)] * 3
    assert launch(partial(answer, offset=1), 1, 10.0, threads=2) == [(11.0, 2)]
    printed = capfd.readouterr().out
    for rank in range(3):
        assert f"rank {rank}: part of a line, and its end\n" in printed
        assert f"rank {rank}: no newline" in printed
    assert launch(dist.get_rank, 4) == [0, 1, 2, 3]  # an importable function, in order
    assert launch(lambda: {"x": torch.arange(3)}, 1)[0]["x"].tolist() == [0, 1, 2]


class Bomb:
    """It can be sent, but not received."""

    def __reduce__(self):
        return int, ("no number",)


def fail(how):
    if dist.get_rank() == 1:
        if how == "raise":
            raise KeyError("no such thing")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "aborts":
            os.kill(os.getpid(), signal.SIGABRT)
        if how == "sends a lock":
            return threading.Lock()
        if how == "sends a bomb":
            return Bomb()
        if how == "exit":
            os._exit(3)
        if how == "leave":
            raise SystemExit(4)
        if how == "return":
            return None
        if how == "sleep":
            time.sleep(60)
        if how == "another":
            dist.broadcast(torch.zeros(5), 1)
    if how == "asynchronous":
        dist.irecv(torch.zeros(1), (dist.get_rank() + 1) % 2).wait()
    dist.all_reduce(torch.ones(2))


@pytest.mark.parametrize(
    ("how", "rank", "says", "other"),
    [
        ("raise", 1, "rank 1 of 2 raised KeyError: 'no such thing'", "lost another rank"),
        ("killed", 1, "rank 1 of 2 died of SIGKILL", "lost another rank in all_reduce"),
        ("exit", 1, "rank 1 of 2 died with exit code 3", "lost another rank in all_reduce"),
        ("aborts", 1, "died of SIGABRT (gloo does this when ranks send different sizes)", "lost"),
        (
            "sends a lock",
            1,
            "rank 1 of 2 raised ValueError: what the function returned cannot be sent, got",
            "",
        ),
        ("sends a bomb", 1, "rank 1 of 2 returned what cannot be received: ValueError: inv", ""),
        ("leave", 1, "rank 1 of 2 raised SystemExit: 4", "lost another rank"),
        ("return", 0, "rank 0 of 2 waited 1 s in all_reduce", "rank 1 had returned"),
        ("sleep", 0, "rank 0 of 2 waited 1 s in all_reduce", "rank 1 was still at work"),
        ("another", None, " of 2 waited 1 s in ", ""),  # either may be the first to give up
        ("asynchronous", None, " of 2 waited 1 s in a collective", ""),
    ],
)
def test_a_rank_that_fails_ends_all_and_is_named(how, rank, says, other):
    begin = time.monotonic()
    with pytest.raises(RankError) as caught:
        launch(fail, 2, how, timeout=1.0)
    assert time.monotonic() - begin < 45  # and not the minute that rank 1 sleeps
    message = str(caught.value)
    assert says in message.splitlines()[0] and rank in (None, caught.value.rank)
    if how == "another":
        assert "rank 0" in message and "all_reduce" in message
        assert "rank 1" in message and "broadcast" in message
    if how not in ("raise", "leave"):  # the other may be heard too late to tell
        assert other in message
    if how == "raise":
        assert isinstance(caught.value.__cause__, KeyError)
        assert 'raise KeyError("no such thing")' in message  # the traceback of the rank
    assert not multiprocessing.active_children()


def test_of_several_that_fail_the_first_rank_is_told_and_none_forgotten():
    with pytest.raises(RankError, match="rank 0 of 2 raised ValueError: number") as caught:
        launch(sum_over_ranks, 2, 2.5)
    assert str(caught.value).splitlines()[1].startswith("  rank 1 ")


def test_after_the_parent_used_many_threads_ranks_start_and_compute():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x = torch.randn(400, 400)
        (x @ x).sum().item()
        for _ in range(5):
            assert launch(multiply, 2, x) == [pytest.approx((x @ x).sum().item(), 1e-3)] * 2
    finally:
        torch.set_num_threads(before)


def multiply(x):
    return (x @ x).sum().item()


@LINUX
def test_the_server_that_is_forked_has_one_thread():
    launch(dist.get_rank, 1)
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    assert "Threads:\t1\n" in Path(f"/proc/{server}/status").read_text()


def listening():
    """The addresses on which this process listens, as Linux writes them."""
    dist.barrier()
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    own = {str(link.readlink()) for link in links}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].partition(":")[0])
    return found


@LINUX
@pytest.mark.skipif("GLOO_SOCKET_IFNAME" in os.environ, reason="another interface was chosen")
def test_ranks_listen_on_the_loopback_only():
    assert set().union(*launch(listening, 2)) == {"0100007F"}  # 127.0.0.1, last byte first


SCRIPT = """
import sys, tempfile, time, os
from llmbook.distributed import launch
tempfile.tempdir = sys.argv[1]
def wait(folder):
    open(f"{folder}/pid-{os.getpid()}", "w").close()
    time.sleep(60)
if __name__ == "__main__":
    launch(wait, 2, sys.argv[1])
"""


@LINUX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_parent_is_interrupted_or_killed(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    parent = subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.PIPE, text=True)
    pids = wait_for(lambda: (p := list(tmp_path.glob("pid-*"))) and len(p) == 2 and p)
    ranks = [int(path.name.partition("-")[2]) for path in pids]
    parent.send_signal(how)
    errors = parent.communicate(timeout=60)[1]
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    wait_for(lambda: not list(tmp_path.glob("llmbook-ranks-*")))


def wait_for(condition, seconds=90):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"world_size": 0}, "world_size: expected a whole number of at least 1"),
        ({"timeout": 0.0}, "timeout: expected a finite number above 0"),
        ({"timeout": float("inf")}, "timeout"),
        ({"threads": 0}, "threads"),
    ],
)
def test_what_cannot_be_launched_is_refused(change, says):
    given = {"function": dist.get_rank, "world_size": 1} | change
    with pytest.raises(ValueError, match=says):
        launch(given.pop("function"), given.pop("world_size"), **given)


def test_what_cannot_be_sent_is_refused_by_name():
    lock = threading.Lock()
    with pytest.raises(ValueError, match="arguments: expected what can be sent"):
        launch(dist.get_rank, 1, lock)
    with pytest.raises(ValueError, match="function: expected what can be sent"):
        launch(lambda: lock, 1)


# Collectives


def try_rings():
    rank, size = place_in_group()
    wrong = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        for shape in ((0,), (1,), (7,), (3, 4), (2, 2, 3)):
            seed = torch.Generator().manual_seed(rank)
            x = torch.randint(-8, 8, shape, generator=seed).to(dtype)  # exact in any order
            right, given = x.clone(), x.t() if x.ndim == 2 else x
            dist.all_reduce(right)
            with ByteCounter() as traffic:
                all_reduce_ring(given)
            share = -(-x.numel() // size)
            if not torch.equal(x, right):
                wrong.append((dtype, shape, x, right))
            if traffic.sent != 2 * (size - 1) * share * x.element_size():
                wrong.append((shape, traffic.sent))
            if set(traffic.by_name) != ({"send"} if size > 1 else set()) and x.numel():
                wrong.append(traffic.by_name)
    parts = torch.arange(size * 3.0).view(size, 3) * (rank + 1)
    total = size * (size + 1) / 2
    if not torch.equal(reduce_scatter_ring(parts), total * parts[rank] / (rank + 1)):
        wrong.append("reduce_scatter")
    if not torch.equal(all_gather_ring(torch.tensor(rank)), torch.arange(size)):
        wrong.append("all_gather")
    if pass_on(torch.tensor([rank])).item() != (rank - 1) % size:
        wrong.append("pass_on")
    odd = refused(reduce_scatter_ring, torch.zeros(size + 1))
    if odd != f"parts: expected one part for each of {size} ranks, got {size + 1}":
        wrong.append(odd)
    return wrong


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_ring_sums_exactly_and_sends_what_the_formula_says(size):
    assert launch(try_rings, size) == [[]] * size


def ring_bits():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(dist.get_rank()))
    all_reduce_ring(x)
    return x


def test_all_ranks_have_the_same_bits_after_a_ring():
    first, *others = launch(ring_bits, 4)
    assert all(torch.equal(first, other) for other in others)


def ring_in_half():
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    x = torch.tensor([float(dist.get_rank())])
    with ByteCounter() as traffic:
        all_reduce_ring(x, mine)
        dist.all_reduce(torch.zeros(8), group=mine)
    there = refused(place_in_group, groups[1 - dist.get_rank() % 2])
    return x.item(), place_in_group(mine), traffic.by_name["allreduce"], there


def test_rings_and_counts_within_a_group():
    found = launch(ring_in_half, 4)
    assert [x for x, *_ in found] == [2.0, 4.0, 2.0, 4.0]
    assert [place for _, place, *_ in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert {sent for *_, sent, _ in found} == {32}
    assert found[0][3] == "group: expected one that has rank 0, got one without it"


def count_all():
    """For each collective: what is counted, and what the operating system saw leave."""
    size, rank, k = dist.get_world_size(), dist.get_rank(), 120_000
    x, wide = torch.ones(k), torch.ones(k * size)
    lists = [torch.ones(k) for _ in range(size)]
    single = hasattr(dist, "all_gather_single")  # the new name of the same
    gather = dist.all_gather_single if single else dist.all_gather_into_tensor
    scatter = dist.reduce_scatter_single if single else dist.reduce_scatter_tensor
    calls = {
        "allreduce": lambda: dist.all_reduce(x.bfloat16()),
        "allgather": lambda: dist.all_gather(lists, x),
        "allgather ": lambda: gather(wide, x),
        "reduce_scatter": lambda: scatter(x, wide),
        "broadcast": lambda: dist.broadcast(x, 0),
        "gather": lambda: dist.gather(x, lists if rank == 0 else None),
        "scatter": lambda: dist.scatter(x, lists if rank == 0 else None),
        "reduce": lambda: dist.reduce(x, 0),
        "alltoall": lambda: dist.all_to_all_single(torch.zeros(k), x),
        "send": lambda: pass_on(x),
    }
    found = {}
    for name, call in calls.items():
        dist.barrier()
        before = written()
        with ByteCounter() as traffic:
            call()
        dist.barrier()
        found[name] = traffic.by_name[name.strip()], traffic.calls[name.strip()], written() - before
    return found


def written():
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


@LINUX
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_that_the_operating_system_sees(size):
    found = launch(count_all, size)
    for name in found[0]:
        counted = sum(of_rank[name][0] for of_rank in found)
        seen = sum(of_rank[name][2] for of_rank in found)
        assert all(of_rank[name][1] == 1 for of_rank in found), name
        if name == "reduce_scatter":  # gloo reduces all, and drops a part
            counted *= 2
        if name == "reduce":  # by a reduce-scatter, and a gather of its parts
            counted *= 1 + 1 / size
        assert counted == pytest.approx(seen, rel=0.02, abs=4000), name


def count_functional():
    from torch.distributed import _functional_collectives as functional

    x = torch.ones(8)
    with ByteCounter() as traffic:
        functional.all_reduce(x, "sum", dist.group.WORLD).sum()
        functional.all_gather_tensor(x, 0, dist.group.WORLD).sum()
        functional.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD).sum()
        functional.all_to_all_single(x, None, None, dist.group.WORLD).sum()
    return dict(traffic.by_name)


def test_functional_collectives_are_counted():
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    expected = dict(zip(names, (32, 32, 16, 16), strict=True))
    assert launch(count_functional, 2) == [expected] * 2


def unlike_rings():
    rank = dist.get_rank()
    pairs = [
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3), torch.zeros(5)),
        (torch.zeros(3, 2), torch.zeros(2, 3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    ]
    rings = (all_reduce_ring, all_gather_ring, reduce_scatter_ring)
    return [refused(ring, pair[rank]) for ring in rings for pair in pairs]


def test_tensors_that_differ_between_ranks_do_not_go_around_a_ring():
    first, second = launch(unlike_rings, 2)
    assert first == second and len(first) == 12
    assert first[0] == (
        "x: expected the same on each rank, got (3,) of torch.float32 on rank 0, "
        "(4,) of torch.float32 on rank 1"
    )
    assert "(3, 2) of torch.float32 on rank 0, (2, 3) of" in first[6]
    assert "(2,) of torch.float64 on rank 1" in first[11]


def count_torch():
    from torch.distributed.fsdp import fully_shard

    layer = nn.Linear(8, 8, bias=False)
    wrapped = nn.parallel.DistributedDataParallel(layer)
    with ByteCounter() as ddp:
        wrapped(torch.ones(2, 8)).sum().backward()
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    with ByteCounter() as fsdp:
        model(torch.ones(2, 8)).sum().backward()
    return ddp.sent, fsdp.sent, dict(fsdp.calls)


def test_the_collectives_inside_of_torchs_wrappers_are_counted():
    # Torch's root unit keeps its weights between forward and backward pass.
    assert launch(count_torch, 2) == [(256, 512, {"allgather": 1, "reduce_scatter": 1})] * 2


def disagree():
    rank = dist.get_rank()
    check_agreed(same=3, also=-5)
    check_agreed()
    model = nn.Linear(3, 2 + rank)
    unlike = {"frozen": nn.Linear(3, 2).requires_grad_(rank == 1), "buffer": nn.BatchNorm1d(2)}
    unlike["buffer"].running_mean = torch.zeros(2 + rank)
    for kind, got in (("frozen", "not trained on rank 0"), ("buffer", "running_mean (2,)")):
        assert got in refused(check_agreed_parameters, unlike[kind])
    return (
        refused(check_agreed, a=1, micro_batches=3 - rank),
        refused(check_agreed_parameters, model),
        refused(DataParallel, model),
        refused(shard_model, model),
        refused(ShardedOptimizer, model.parameters(), AdamW),
        refused(rows_of_rank, torch.zeros(3, 2)),
        refused(rows_of_rank, torch.zeros(0, 2)),
        rows_of_rank(torch.arange(6)).tolist(),
        sum_over_ranks(rank + 1),
        refused(check_agreed, **({"a": 1, "b": 2} if rank else {"a": 1, "c": 2})),
        refused(check_agreed, **({"a": 1} if rank else {})),
        refused(DataParallel, nn.Sequential(nn.Linear(3, 3), *[nn.Linear(3, 3)] * rank)),
    )


def test_what_differs_between_ranks_is_refused_on_all_with_the_same_words():
    first, second = launch(disagree, 2)
    assert first[:7] == second[:7]
    assert first[0] == (
        "micro_batches: expected the same on each rank, got 3 on rank 0, 2 on rank 1"
    )
    assert all("expected the same on each rank" in message for message in first[1:5])
    got = "got weight (2, 3) of torch.float32 on rank 0, weight (3, 3) of torch.float32 on rank 1"
    assert first[2] == f"parameters: expected the same on each rank, {got}"
    assert first[4].startswith("parameters: expected the same on each rank, got (2, 3) of")
    assert (
        first[9:]
        == second[9:]
        == (
            "names: expected the same on each rank, got c on rank 0, b on rank 1",
            "names: expected the same on each rank, got nothing on rank 0, a on rank 1",
            "parameters: expected the same on each rank, got nothing on rank 0, "
            "1.weight (3, 3) of torch.float32 on rank 1",
        )
    )
    assert first[5].startswith("batch: expected a multiple of 2 rows") and "got 3" in first[5]
    assert "got 0" in first[6]
    assert (first[7], second[7]) == ([0, 2, 4], [1, 3, 5]) and first[8] == second[8] == 3


def test_without_a_group_each_function_says_so():
    layer = nn.Linear(2, 2)
    calls = [
        (place_in_group,),
        (check_agreed,),
        (sum_over_ranks, 1),
        (rows_of_rank, torch.zeros(2)),
        (all_reduce_ring, torch.zeros(2)),
        (pass_on, torch.zeros(2)),
        (DataParallel, layer),
        (ShardedOptimizer, layer.parameters(), AdamW),
        (shard_model, layer),
        (clip_sharded_gradients, layer.parameters(), 1.0),
        (run_scheme, "zero1", ModelConfig.preset("tiny"), []),
    ]
    for call, *arguments in calls:
        assert "group: expected a process group" in refused(call, *arguments), call


# Data parallel


class Odd(nn.Module):
    """Tied, frozen, never used and sometimes used weights, a buffer, and sizes of no shape."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.expert = nn.Linear(6, 6)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.rand(1) + 1)

    def forward(self, ids, expert=False):
        x = self.frozen(self.inner(self.table(ids))) * self.scale
        return self.head(self.expert(x) if expert else x)


def odd_model(seed):
    torch.manual_seed(seed)
    return Odd().double()


def odd_batches(size, micro_batches):
    """Of each rank: ids, and whether its expert is used, which only the last rank does."""
    source = torch.Generator().manual_seed(5)
    return [
        [
            (torch.randint(7, (2 + rank, 3), generator=source), rank == size - 1)
            for _ in range(micro_batches)
        ]
        for rank in range(size)
    ]


def odd_loss(model, ids, expert, count):
    logits = model(ids, expert=expert)
    return (
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        / count
    )


def odd_gradients(size, micro_batches=2):
    """What one process finds, for the batches of all ranks."""
    model = odd_model(0)
    batches = odd_batches(size, micro_batches)
    count = sum(2 * len(ids) for of_rank in batches for ids, _ in of_rank)
    for of_rank in batches:
        for ids, expert in of_rank:
            odd_loss(model, ids, expert, count).backward()
    return {name: p.grad for name, p in model.named_parameters()}, count


def odd_parallel(bucket_bytes, reduction="sum"):
    rank, size = place_in_group()
    model = odd_model(rank)  # all but rank 0 begin with other weights and another buffer
    wrapped = DataParallel(model, bucket_bytes, reduction)
    count = odd_gradients(size)[1]
    *before, (ids, expert) = odd_batches(size, 2)[rank]
    with wrapped.no_sync(), ByteCounter() as quiet:
        for x, e in before:
            odd_loss(wrapped, x, e, count).backward()
    if rank:
        model.scale.mul_(2)
    with ByteCounter() as traffic:
        odd_loss(wrapped, ids, expert, count).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    numbers = sum(p.numel() + 1 for p in model.parameters() if p.requires_grad)
    assert quiet.sent == 0
    assert traffic.sent == pytest.approx(8 * (2 * numbers + 1) * (size - 1) / size, abs=9)
    return gradients, len(wrapped.buckets), wrapped.sent_early, model.scale.item()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 400, 2**20])
def test_data_parallel_equals_one_process(size, bucket_bytes):
    expected, _ = odd_gradients(size)
    found = launch(odd_parallel, size, bucket_bytes)
    trained = [name for name, g in expected.items() if not name.startswith("frozen")]
    n_buckets = {1: len(trained), 400: 5, 2**20: 1}[bucket_bytes]
    for gradients, n, early, scale in found:
        assert n == n_buckets and 0 <= early < n + (size == 1)
        assert scale == found[0][3]
        for name, right in expected.items():
            if right is None:
                assert gradients[name] is None, name
            else:
                torch.testing.assert_close(gradients[name], right, rtol=1e-10, atol=1e-12)
    assert expected["expert.weight"] is not None and expected["unused.weight"] is None


def test_the_mean_is_the_sum_over_the_ranks_as_torchs():
    sums, means = (launch(odd_parallel, 2, 400, r)[0][0] for r in ("sum", "mean"))
    for name, gradient in sums.items():
        assert gradient is None or torch.allclose(gradient / 2, means[name])


def torch_parallel():
    model = odd_model(0)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    ids, _ = odd_batches(2, 1)[dist.get_rank()][0]
    odd_loss(wrapped, ids, False, 10).backward()
    mine = odd_model(dist.get_rank())
    odd_loss(DataParallel(mine, 400, "mean"), ids, False, 10).backward()
    theirs = dict(model.named_parameters())
    for name, p in mine.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-12, atol=1e-14)
    return [name for name, p in mine.named_parameters() if p.grad is None]


def test_gradients_are_those_of_torchs_wrapper():
    for absent in launch(torch_parallel, 2):
        assert set(absent) == {
            f"{layer}.{kind}"
            for layer in ("expert", "unused", "frozen")
            for kind in ("weight", "bias")
        }


def misuse():
    """What is sent when no_sync encloses less than it should, and what is refused."""
    wrapped = DataParallel(nn.Linear(4, 1))
    x, sent = torch.ones(2, 4), []
    with ByteCounter() as traffic:
        loss = wrapped(x).sum()
        with wrapped.no_sync():
            loss.backward()
    sent.append(traffic.sent)
    again = refused(wrapped, x)  # the gradients are sums already
    with ByteCounter() as traffic:
        wrapped.zero_grad()
        with wrapped.no_sync():
            loss = wrapped(x).sum()
        loss.backward()
    sent.append(traffic.sent)
    try:
        wrapped.zero_grad()
        losses = [wrapped(x).sum() for _ in range(2)]
        losses[0].backward()
        losses[1].backward()
        twice = ""
    except RuntimeError as error:
        twice = str(error)
    try:
        wrapped.zero_grad()
        wrapped(x).sum().backward()
        wrapped.zero_grad(set_to_none=False)
        wrapped(x).sum().backward()  # zeros may be added to
        wrapped.zero_grad()
        wrapped.module(x).sum().backward()
        around = ""
    except RuntimeError as error:
        around = str(error)
    with torch.no_grad(), ByteCounter() as traffic:
        wrapped(x)
    sent.append(traffic.sent)
    frozen = refused(DataParallel, nn.Linear(2, 2).requires_grad_(False))
    return sent, again, around, frozen, twice


def test_no_sync_is_decided_by_the_forward_pass_and_misuse_is_refused():
    for sent, again, around, frozen, twice in launch(misuse, 2):
        assert "or two with no forward pass between them" in twice
        assert sent == [28, 0, 0]  # 5 weights and 2 marks
        assert again.startswith("gradients: expected none from before")
        assert "forward pass through DataParallel" in around
        assert frozen.startswith("module: expected parameters to train, got none")


class Mixed(nn.Module):
    """Weights of two kinds, each of 8 bytes."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float32))
        self.fine = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.last = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self):
        return self.wide.sum() / 3 + (self.fine + self.last).sum() / 3


def mixed_buckets(bucket_bytes):
    wrapped = DataParallel(Mixed(), bucket_bytes)
    wrapped().backward()
    module = wrapped.module
    sizes = [len(bucket.parameters) for bucket in wrapped.buckets]
    return sizes, module.wide.grad.dtype, module.fine.grad.item(), module.last.grad.item()


@pytest.mark.parametrize("bucket_bytes", [16, 24])
def test_a_bucket_is_filled_to_the_byte_and_has_one_dtype(bucket_bytes):
    assert launch(mixed_buckets, 2, bucket_bytes) == [([2, 1], torch.float32, 2 / 3, 2 / 3)] * 2


def late_bucket():
    wrapped = DataParallel(nn.Linear(4, 1))
    loss = wrapped(torch.ones(2, 4)).sum()
    if dist.get_rank() == 1:
        time.sleep(30)
    loss.backward()


def test_a_bucket_that_waits_too_long_is_named():
    with pytest.raises(RankError, match=r"waited 1 s in .*bucket 1 of 1 of DataParallel"):
        launch(late_bucket, 2, timeout=1.0)


# Shares


def odd_steps(size, optimizer_of, backward, clip, n_steps=3):
    """The weights and norms after some steps on the batches of all ranks or of one."""
    norms = []
    for step in range(n_steps):
        backward(step)
        norms.append(clip().item())
        optimizer_of.step()
        optimizer_of.zero_grad()
    return norms


def odd_groups(model):
    return parameter_groups(model, 0.1)


def one_odd_process(size, build, max_norm):
    model = odd_model(0)
    optimizer = build(odd_groups(model))

    def backward(step):
        batches = odd_batches(size, 3)
        count = sum(2 * len(of_rank[step][0]) for of_rank in batches)
        for of_rank in batches:
            odd_loss(model, *of_rank[step], count).backward()

    norms = odd_steps(
        size, optimizer, backward, lambda: clip_gradients(model.parameters(), max_norm)
    )
    return model.state_dict(), norms


def odd_sharded_optimizer(build, max_norm):
    rank, size = place_in_group()
    model = odd_model(rank)
    model.scale.fill_(odd_model(0).scale.item())
    model.frozen.load_state_dict(odd_model(0).frozen.state_dict())
    optimizer = ShardedOptimizer(odd_groups(model), build)

    def backward(step):
        batches = odd_batches(size, 3)
        count = sum(2 * len(of_rank[step][0]) for of_rank in batches)
        odd_loss(model, *batches[rank][step], count).backward()

    norms = odd_steps(size, optimizer, backward, lambda: optimizer.clip_gradients(max_norm))
    state = optimizer.state_dict()
    again = ShardedOptimizer(odd_groups(odd_model(0)), build)
    again.load_state_dict(state)
    other = refused(again.load_state_dict, state | {"ranks": 7})
    assert f"expected rank {rank}, got 9" in refused(again.load_state_dict, state | {"rank": 9})
    held = sum(t.numel() for s in optimizer.optimizer.state.values() for t in s.values() if t.ndim)
    rates = [group["weight_decay"] for group in optimizer.param_groups]
    return model.state_dict(), norms, held, rates, other


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("build", [partial(AdamW, lr=0.01), partial(SGD, lr=0.1, momentum=0.9)])
def test_a_sharded_optimizer_equals_one_process(size, build):
    expected, norms = one_odd_process(size, build, 0.5)
    found = launch(odd_sharded_optimizer, size, build, 0.5)
    for weights, found_norms, _, rates, other in found:
        assert worst_difference(weights, expected)[1] < 1e-9
        assert found_norms == pytest.approx(norms, rel=1e-6) and max(norms) > 0.5
        assert rates == [0.1, 0.0]
        assert other == f"state_dict: expected ranks {size}, got 7"
    assert torch.equal(found[0][0]["unused.weight"], odd_model(0).unused.weight)
    stepped = sum(
        p.numel()
        for n, p in odd_model(0).named_parameters()
        if not n.startswith(("unused", "frozen"))
    )
    averages = 2 if build.func is AdamW else 1
    assert sum(held for _, _, held, *_ in found) == averages * stepped


def shares_that_cannot_be():
    layer, half = nn.Linear(2, 2), nn.Linear(2, 2).half()
    parameters = list(layer.parameters())
    return [
        refused(ShardedOptimizer, [nn.Parameter(torch.zeros(2))], AdamW),
        refused(ShardedOptimizer, [], AdamW),
        refused(ShardedOptimizer, [5], AdamW),
        refused(ShardedOptimizer, [parameters[0], half.weight], AdamW),
        refused(ShardedOptimizer, parameters + parameters, AdamW),
        refused(clip_sharded_gradients, parameters, 0.0),
        refused(shard_model, layer, [nn.Linear(2, 2)]),
        refused(shard_model, layer, [layer]),
        refused(shard_model, layer, compute_dtype=torch.int64),
        refused(shard_model, nn.Tanh()),
        refused(full_state_dict, layer),
    ]


def test_shares_that_cannot_be_are_refused():
    found = launch(shares_that_cannot_be, 3)
    assert found[0] == found[1] == found[2]
    starts = (
        ["parameters: expected numbers for all 3 ranks, got 2"]
        + ["parameters: expected parameters or groups"] * 2
        + ["parameters: expected one dtype", "parameters: expected each parameter once"]
        + ["max_norm: expected a number above 0", "units: expected modules inside of the model"]
        + ["units: expected modules inside", "compute_dtype: expected a floating dtype"]
        + ["model: expected parameters, got none", "model: expected one that shard_model divided"]
    )
    for message, start in zip(found[0], starts, strict=True):
        assert message.startswith(start)


def clip_odd():
    """Clipped gradients of both ranks: too large, small, and with an infinity on one of them."""
    rank, found = dist.get_rank(), []
    for first in (3.0, 0.03, torch.inf if rank else 3.0):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([first, 0.0 if rank else 1.0])
        norm = clip_sharded_gradients([weight], 1.0)
        found.append((norm.item(), weight.grad.tolist()))
    return found


def test_clipping_over_ranks_only_shrinks_and_leaves_infinities_to_be_judged():
    norms = [19**0.5, (1 + 2 * 0.03**2) ** 0.5]
    for rank, found in enumerate(launch(clip_odd, 2)):
        for (norm, gradient), right, first in zip(found, norms, (3.0, 0.03), strict=False):
            given = [first, 0.0 if rank else 1.0]
            assert norm == pytest.approx(right, rel=1e-6)
            assert gradient == pytest.approx([x / right for x in given], rel=1e-5)
        assert found[2] == (torch.inf, [torch.inf, 0.0] if rank else [3.0, 1.0])
    assert launch(clip_small, 2) == [[0.1, 0.2]] * 2


def clip_small():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    weight.grad = torch.tensor([0.1, 0.2], dtype=torch.float64)
    clip_sharded_gradients([weight], 1.0)
    return weight.grad.tolist()


def divided_already():
    """Of a model that is divided, what each wrapper says, and whether it is as it was."""

    def small(width=8):
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))

    torch.manual_seed(0)
    model = shard_model(small())
    before = full_state_dict(model)
    said = [
        refused(shard_model, model),
        refused(DataParallel, model),
        refused(ShardedOptimizer, model.parameters(), AdamW),
    ]
    kept = worst_difference(full_state_dict(model), before)[1]
    cut = tensor_parallel(FeedForward(4, 8))
    said += [
        refused(shard_model, cut),
        refused(DataParallel, cut),
        refused(ShardedOptimizer, cut.parameters(), AdamW),
        refused(tensor_parallel, shard_model(FeedForward(4, 8))),
    ]
    moved, names = small(), []
    optimizer = ShardedOptimizer(moved.parameters(), AdamW)
    for change in (nn.Module.double, nn.Module.float):
        change(moved)
        names.append(refused(optimizer.step))
    return kept, said, names


def test_a_model_that_is_divided_already_is_refused_and_stays_as_it_was():
    for kept, said, moved in launch(divided_already, 2):
        assert kept == 0
        causes = ["shard_model"] * 3 + ["tensor_parallel"] * 3 + ["shard_model"]
        names = ["model", "module", "parameters"] * 2 + ["module"]
        assert said == [
            f"{name}: expected whole weights in this group, got shares ({cause} was called before)"
            for name, cause in zip(names, causes, strict=True)
        ]
        assert all(message.startswith("parameters: expected those that") for message in moved)
        assert "got torch.float64 elsewhere" in moved[0]


def exchanged_already():
    """What each wrapper says to a model whose gradients another one exchanges, and to hooks."""
    wrappers = {
        "DataParallel": DataParallel,
        "ShardedOptimizer": lambda model: ShardedOptimizer(model.parameters(), AdamW),
        "shard_model": shard_model,
        "tensor_parallel": tensor_parallel,
        "shard_by_torch": shard_by_torch,
    }
    said = []
    for first in ("DataParallel", "ShardedOptimizer"):
        for second in wrappers:
            model = FeedForward(4, 8)
            wrappers[first](model)
            said.append((first, refused(wrappers[second], model)))
    for second in ("shard_model", "tensor_parallel", "shard_by_torch"):
        for kind in ("register_hook", "register_post_accumulate_grad_hook"):
            model = FeedForward(4, 8)
            getattr(model.up_proj.weight, kind)(print)
            said.append((None, refused(wrappers[second], model)))
    return said


def test_gradients_are_not_exchanged_twice_and_hooks_are_not_lost():
    for said in launch(exchanged_already, 2):
        for first, message in said:
            if first is None:
                assert (
                    "expected weights without hooks, which the new ones would not have" in message
                )
            else:
                assert "expected weights whose gradients nothing exchanges yet" in message
                assert f"got some that {first} exchanges" in message


def odd_sharded_model(build, max_norm, units):
    rank, size = place_in_group()
    model = odd_model(rank)
    parts = [getattr(model, name) for name in units]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shard_model(model, parts) is model
    for name, p in model.named_parameters():
        rows = -(-shapes[name][0] // size)
        assert p.shape[1:] == shapes[name][1:] and len(p) <= rows, name
    optimizer = build(odd_groups(model))

    def backward(step):
        batches = odd_batches(size, 3)
        count = sum(2 * len(of_rank[step][0]) for of_rank in batches)
        # All ranks call the same parts: what is not called is not gathered.
        ids, expert = batches[rank][step]
        both = odd_loss(model, ids, False, count), odd_loss(model, ids, True, count)
        (both[0] * (not expert) + both[1] * expert).backward()
        for unit in model.sharding:
            assert unit.full is None and unit.again is None
        assert not any(
            isinstance(v, torch.Tensor) for m in model.modules() for v in vars(m).values()
        )

    norms = odd_steps(
        size, optimizer, backward, lambda: clip_sharded_gradients(model.parameters(), max_norm)
    )
    with torch.no_grad():
        logits = model(torch.arange(6).view(2, 3))
    try:
        model("no ids")
    except TypeError:
        assert not any("weight" in vars(m) for m in model.modules())
    return full_state_dict(model), norms, logits


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("units", [(), ("inner", "expert"), ("table", "inner", "head")])
def test_full_sharding_equals_one_process(size, units):
    build = partial(SGD, lr=0.1, momentum=0.9)
    expected, norms = one_odd_process(size, build, 0.5)
    reference = odd_model(0)
    reference.load_state_dict(expected)
    for weights, found_norms, logits in launch(odd_sharded_model, size, build, 0.5, units):
        # A weight that is not used has a gradient of zeros, and decays.
        different = {k: v for k, v in weights.items() if not k.startswith("unused")}
        kept = {k: v for k, v in expected.items() if not k.startswith("unused")}
        assert worst_difference(different, kept)[1] < 1e-6  # summed in float32
        assert found_norms == pytest.approx(norms, rel=1e-5)
        assert torch.equal(weights["head.weight"], weights["table.weight"])
        assert torch.allclose(logits, reference(torch.arange(6).view(2, 3)), atol=1e-5)


def sixteen_bits():
    torch.manual_seed(dist.get_rank())
    model = shard_model(
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), compute_dtype=torch.bfloat16
    )
    with ByteCounter() as traffic:
        out = model(torch.ones(3, 4, dtype=torch.bfloat16))
        out.sum().backward()
    dtypes = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
    return traffic.sent, out.dtype, dtypes


def test_sixteen_bits_are_gathered_and_thirty_two_reduced_and_kept():
    # 44 weights: two gathers of 2 bytes, one reduction of 4, half of each on two ranks
    assert launch(sixteen_bits, 2) == [(44 * 4, torch.bfloat16, {torch.float32})] * 2


def float64_sums(reduce_dtype):
    torch.manual_seed(0)
    model = shard_model(nn.Linear(4, 2).double(), reduce_dtype=reduce_dtype)
    model(torch.full((1, 4), 1 / 3, dtype=torch.float64)).sum().backward()
    return model.weight.grad[0, 0].item()


def test_gradients_are_summed_in_the_chosen_dtype():
    single, double = (launch(float64_sums, 2, d)[0] for d in (torch.float32, torch.float64))
    assert double == 2 / 3 and single != double and single == pytest.approx(double, rel=1e-6)


# Schemes

TINY = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2, context_length=8)


def tiny_batches(rows, n=2):
    source = torch.Generator().manual_seed(1)
    found = []
    for _ in range(n):
        ids = torch.randint(32, (rows, 9), generator=source)
        targets = ids[:, 1:].clone()
        targets[::2, :-2] = -100
        found.append((ids[:, :-1], targets))
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_on_three_ranks_equals_one_process_and_its_formula(scheme):
    batches = tiny_batches(6)
    single = "one_process_bf16" if scheme == "full_bf16" else "one_process"
    control = launch(partial(run_scheme, shares=3), 1, single, TINY, batches)[0]
    found = launch(run_scheme, 3, scheme, TINY, batches)
    model = TransformerLM(TINY)
    kept = {"all_reduce": 16, "data_parallel": 16, "zero1": 8 + 8 / 3}.get(scheme, 16 / 3)
    for run in found:
        assert worst_difference(run.weights, control.weights)[1] < 2e-2  # two steps of Adam
        assert run.losses == pytest.approx(control.losses, rel=1e-5)
        assert run.norms == pytest.approx(control.norms, rel=1e-4)
        assert run.sent == pytest.approx(scheme_bytes(scheme, model, 3, 2), abs=40)  # thirds
        assert all(torch.equal(run.weights[k], found[0].weights[k]) for k in run.weights)
    mean = sum(run.kept for run in found) / 3 / count_parameters(TINY)
    assert mean == pytest.approx(kept, rel=0.03)


def test_the_defaults_of_a_run_are_as_documented():
    batches = tiny_batches(4)
    told = {"micro_batches": 2, "shares": 1, "learning_rate": 1e-3, "max_norm": 1.0, "seed": 0}
    first = launch(run_scheme, 1, "one_process", TINY, batches)[0]
    same = launch(partial(run_scheme, **told), 1, "one_process", TINY, batches)[0]
    assert first.losses == same.losses and first.norms == same.norms
    assert worst_difference(same.weights, first.weights)[1] == 0
    for change in ({"learning_rate": 1e-2}, {"seed": 1}, {"max_norm": 0.01}):
        other = launch(partial(run_scheme, **change), 1, "one_process", TINY, batches)[0]
        assert worst_difference(other.weights, first.weights)[1] > 1e-4, change


def without_broadcast(*arguments):
    dist.broadcast = lambda *_, **__: None
    return run_scheme(*arguments)


@pytest.mark.parametrize("fault", ["mean", "no broadcast"])
def test_faults_that_are_put_in_are_found(fault):
    batches = tiny_batches(4)
    control = launch(run_scheme, 1, "one_process", TINY, batches)[0]
    faulty = partial(run_scheme, reduction="mean") if fault == "mean" else without_broadcast
    found = launch(faulty, 2, "data_parallel", TINY, batches)
    if fault == "mean":
        assert found[0].norms[0] == pytest.approx(control.norms[0] / 2, rel=1e-4)
    else:
        assert worst_difference(found[0].weights, found[1].weights)[1] > 0.1


def refuse_runs():
    batches, four = tiny_batches(6), tiny_batches(4)
    return [
        refused(run_scheme, "one_process", TINY, batches),
        refused(run_scheme, "ddp", TINY, batches),
        refused(run_scheme, "zero1", TINY, tiny_batches(5)),
        refused(run_scheme, "zero1", TINY, batches),  # three rows for each, two micro-batches
        refused(run_scheme, "zero1", TINY, batches[: 1 + dist.get_rank()]),
        refused(run_scheme, "zero1", TINY, batches, micro_batches=0),
        refused(run_scheme, "zero1", TINY, [(x, torch.full_like(t, -100)) for x, t in four]),
    ]


def test_runs_that_do_not_divide_are_refused_on_all_ranks():
    first, second = launch(refuse_runs, 2)
    assert first == second
    starts = ("scheme: expected one for 2 ranks", "scheme: expected one of")
    starts += ("batch: expected a multiple of 2 rows", "micro_batches: expected a multiple of 2")
    starts += (
        "batches: expected the same on each rank",
        "micro_batches: expected a whole number of at least 1",
        "batches: expected targets in each, got one in which all are -100",
    )
    for message, start in zip(first, starts, strict=True):
        assert message.startswith(start)


@pytest.mark.parametrize(
    ("scheme", "kept", "sent"),
    [("data_parallel", 16, 4), ("zero1", 7, 4), ("zero2", 5.5, 4), ("full", 4, 6)],
)
def test_predictions_are_the_papers_formulas(scheme, kept, sent):
    found = predict_scheme(scheme, 1000, 4)
    assert found.kept == kept * 1000 and found.sent == sent * 750
    wide = predict_scheme(scheme, 1000, 4, precision="float32")
    assert wide.sent == 2 * found.sent and wide.optimizer in (8000, 2000)
    alone = predict_scheme(scheme, 1000, 1)
    assert alone.kept == 16_000 and alone.sent == 0
    more = predict_scheme(scheme, 1000, 4, reduce_bytes=4, micro_batches=3)
    assert more.sent == {"data_parallel": 8, "full": 24}.get(scheme, 6) * 750


def test_predictions_are_those_of_runs():
    n, model = count_parameters(TINY), TransformerLM(TINY)
    for scheme, name in (("data_parallel", "data_parallel"), ("zero1", "zero1"), ("full", "full")):
        predicted = predict_scheme(scheme, n, 4, precision="float32", micro_batches=2)
        assert predicted.sent == pytest.approx(scheme_bytes(name, model, 4, 2), rel=0.01)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheme": "zero4"}, "scheme"),
        ({"n_parameters": 0}, "n_parameters"),
        ({"world_size": 0}, "world_size"),
        ({"precision": "half"}, "precision"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"reduce_bytes": 0}, "reduce_bytes"),
    ],
)
def test_predictions_refuse_by_name(change, says):
    given = {"scheme": "full", "n_parameters": 10, "world_size": 2} | change
    assert refused(predict_scheme, **given).startswith(f"{says}: expected")


def test_the_worst_difference_is_relative_and_sees_what_is_not_a_number():
    right = {"a": torch.tensor([1.0, 100.0]), "b": torch.tensor([0.5])}
    found = {"a": torch.tensor([1.0, 101.0]), "b": torch.tensor([0.5])}
    assert worst_difference(found, right) == ("a", pytest.approx(0.01))
    broken = right | {"b": torch.tensor([float("nan")])}
    assert worst_difference(broken, right) == ("b", float("inf"))
    assert "b" in refused(worst_difference, {"a": right["a"]}, right)
    assert "shape" in refused(worst_difference, right | {"b": torch.zeros(2)}, right)
