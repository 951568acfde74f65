"""The model cut over ranks: by layers, by the sequence, by depth; each equal to one process."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmbook.attention import scaled_dot_product_attention
from llmbook.blocks import FeedForward
from llmbook.distributed import (
    AttentionPart,
    ColumnParallelLinear,
    DataParallel,
    PipelineAction,
    PipelineStage,
    RankError,
    RowParallelLinear,
    cut_sequence,
    enter_parallel,
    gpipe_schedule,
    launch,
    leave_parallel,
    merge_attention,
    one_forward_one_backward,
    pipeline_step,
    pipeline_timing,
    ring_attention,
    ring_work,
    shard_by_torch,
    shard_model,
    split_by_torch,
    sum_over_ranks,
    tensor_parallel,
    tensor_parallel_plan,
)
from llmbook.environment import seed_everything
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import cross_entropy

SCHEDULES = {"gpipe": gpipe_schedule, "1f1b": one_forward_one_backward}
SIZES = {"vocab_size": 50, "d_model": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
KINDS = {
    "llama": {},
    "qwen": {"qk_norm": True, "qkv_bias": True},
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "bias": True,
        "qkv_bias": True,
    },
    "tied": {"tie_embeddings": True},
    "window": {"sliding_window": 5},
}
SCHEDULE = st.tuples(st.integers(1, 6), st.integers(0, 8)).map(lambda pm: (pm[0], sum(pm)))


def model_of(kind="llama", **changes):
    seed_everything(0)
    return TransformerLM(ModelConfig(context_length=32, **SIZES | KINDS[kind] | changes)).double()


def rows(n=4, length=17):
    return torch.randint(50, (n, length), generator=torch.Generator().manual_seed(1))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model, ids):
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:].contiguous())
    loss.backward()
    return loss.item(), gradients(model)


def assert_equal(found, expected):
    """Each rank has the whole of a gradient, its share of it, or none."""
    for name, whole in expected.items():
        parts = [rank[name] for rank in found if name in rank]
        assert parts, f"no rank has {name}"
        if parts[0].shape != whole.shape:
            sizes = zip(parts[0].shape, whole.shape, strict=True)
            parts = [torch.cat(parts, [a == b for a, b in sizes].index(False))]
        for part in parts:
            torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-12, msg=name)


# Tensor parallelism


def cut_models():
    return {kind: step(tensor_parallel(model_of(kind)), rows()) for kind in KINDS}


def test_a_model_cut_by_layers_has_the_loss_and_gradients_of_one_process():
    found = launch(cut_models, 2)
    for kind in KINDS:
        loss, expected = step(model_of(kind), rows())
        assert all(rank[kind][0] == pytest.approx(loss, abs=1e-12) for rank in found)
        assert_equal([rank[kind][1] for rank in found], expected)


def layers_and_operators():
    seed_everything(0)
    rank = dist.get_rank()
    up, down = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    copies = [copy.deepcopy(x.detach()).requires_grad_() for _ in range(2)]
    results = []
    for is_entered, own_x in zip((True, False), copies, strict=True):
        inner = ColumnParallelLinear(up)(enter_parallel(own_x) if is_entered else own_x)
        RowParallelLinear(down)(inner.tanh()).square().sum().backward()
        results.append(own_x.grad)
    whole = down(up(x).tanh())
    whole.square().sum().backward()
    again = RowParallelLinear(down)(ColumnParallelLinear(up)(x).tanh())
    own = torch.full((2,), float(rank + 1), dtype=torch.float64, requires_grad=True)
    left = leave_parallel(own)
    left.sum().backward()
    return (again - whole).abs().max().item(), x.grad, results, left.tolist(), own.grad.tolist()


def test_the_operators_are_each_others_transpose_and_without_the_first_a_gradient_is_partial():
    ranks = launch(layers_and_operators, 2)
    for error, whole, (right, partial), left, passed in ranks:
        assert error < 1e-12
        torch.testing.assert_close(right, whole)
        assert (partial - whole).abs().max() > 1e-3  # the famous mistake: a part of the gradient
        assert left == [3.0, 3.0] and passed == [1.0, 1.0]
    torch.testing.assert_close(ranks[0][2][1] + ranks[1][2][1], ranks[0][1])  # parts of the whole


def raises_everywhere(function, world_size, *arguments):
    """The message of a ``ValueError`` that every rank raises."""
    with pytest.raises(RankError) as caught:
        launch(function, world_size, *arguments, timeout=20.0)
    told = str(caught.value)
    for rank in range(world_size):
        assert re.search(rf"rank {rank}\b[^\n]*ValueError", told), told
    return told


def cut(model):
    tensor_parallel(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"n_heads": 3, "n_kv_heads": 1, "d_head": 8},
            "n_ranks: expected a divisor of n_kv_heads = 1, got 2",
        ),
        ({"d_ff": 33}, "n_ranks: expected a divisor of d_ff = 33, got 2"),
        ({"n_experts": 4, "n_active_experts": 2}, "got MixtureOfExperts in"),
    ],
)
def test_what_cannot_be_cut_by_layers_is_refused_on_every_rank(changes, says):
    assert says in raises_everywhere(cut, 2, model_of(**changes))


def test_alone_nothing_is_cut_and_nothing_is_cut_twice():
    model = tensor_parallel(model_of("qwen"))
    loss, found = step(model, rows())
    expected_loss, expected = step(model_of("qwen"), rows())
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_equal([found], expected)
    with pytest.raises(ValueError, match="module: expected whole layers, got one in"):
        tensor_parallel(model)
    with pytest.raises(ValueError, match="module: expected attention or feed-forward networks"):
        tensor_parallel(nn.Linear(2, 2))


def one_norm(model):
    """The same gains for queries and keys, in the first block."""
    model.blocks[0].attention.k_norm = model.blocks[0].attention.q_norm
    return model


def on_a_mesh():
    """Layers are cut in one direction, and rows in the other, from unequal weights."""
    rank = dist.get_rank()
    groups = {ranks: dist.new_group(ranks) for ranks in ((0, 1), (2, 3), (0, 2), (1, 3))}
    layers, data = (
        next(g for r, g in groups.items() if r in pairs and rank in r) for pairs in AXES
    )
    ids = rows()[rank // 2 :: 2]
    found = []
    for wrap in (DataParallel, shard_model):
        model = one_norm(model_of("qwen"))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + rank)  # only rank 0 has the right ones
        options = {"reduce_dtype": torch.float64} if wrap is shard_model else {}
        wrapped = wrap(tensor_parallel(model, layers), group=data, **options)
        logits = wrapped(ids[:, :-1])
        count = sum_over_ranks(ids[:, 1:].numel(), data)
        loss = cross_entropy(logits, ids[:, 1:].contiguous(), reduction="sum") / count
        loss.backward()
        dist.all_reduce(loss, group=data)
        found.append((loss.item(), gradients(model)))
    return found


AXES = ((0, 1), (2, 3)), ((0, 2), (1, 3))


def test_on_a_mesh_cut_layers_and_divided_rows_equal_one_process():
    loss, expected = step(one_norm(model_of("qwen")), rows())
    found = launch(on_a_mesh, 4)
    for rank in found:
        assert [value for value, _ in rank] == pytest.approx([loss] * 2, abs=1e-12)
    for pair in (found[:2], found[2:]):
        assert_equal([of_copies for (_, of_copies), _ in pair], expected)
    for column in (0, 1):  # of full sharding, each rank has some rows of what the cut left
        both = [found[row + column][1][1] for row in (0, 2)]
        for name, whole in found[column][0][1].items():
            torch.testing.assert_close(torch.cat([grads[name] for grads in both]), whole, msg=name)


def on_a_mesh_of_torch(kind):
    """The same by torch: heads and inner vectors along one axis, rows along the other."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "layers"))
    model = model_of(kind)
    shard_by_torch(split_by_torch(model, mesh["layers"]), mesh["rows"])
    _, found = step(model, rows()[mesh.get_local_rank("rows") :: 2])
    return {name: gradient.full_tensor() for name, gradient in found.items()}


@pytest.mark.parametrize("kind", ["qwen", "tied"])
def test_on_a_mesh_torchs_wrappers_equal_one_process(kind):
    _, expected = step(model_of(kind), rows())
    for found in launch(on_a_mesh_of_torch, 4, kind):
        assert_equal([found], expected)


def frozen_parts():
    """What is frozen of a model, and what has a gradient, whole and cut over two ranks."""
    found = []
    for wrap in (lambda model: model, tensor_parallel, split_by_torch):
        model = model_of("qwen", bias=True)
        for name, p in model.named_parameters():
            parts = ("q_proj.weight", "k_proj.bias", "o_proj", "up_proj", "q_norm", "embedding")
            p.requires_grad_(not any(part in name for part in parts))
        wrap(model)
        step(model, rows())
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        found.append((frozen, [name for name, p in model.named_parameters() if p.grad is None]))
    return found


def test_what_is_frozen_stays_so_when_layers_are_cut():
    for (frozen, without), *others in launch(frozen_parts, 2):
        assert len(frozen) > 20 and without == frozen
        assert others == [(frozen, frozen)] * 2


def by_dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    model = model_of()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, tensor_parallel_plan(model, mesh.size()))
    loss, found = step(model, rows())
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    return loss, whole


def test_dtensor_cuts_the_model_as_it_is():
    loss, expected = step(model_of(), rows())
    for found, gradient in launch(by_dtensor, 2):
        assert found == pytest.approx(loss, abs=1e-12)
        assert_equal([gradient], expected)


def test_the_plan_names_every_linear_layer_and_refuses_what_would_cut_a_head():
    model = model_of()
    plan = tensor_parallel_plan(model, 2)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert set(plan) == linear
    assert set(tensor_parallel_plan(FeedForward(8, 16), 2)) == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ValueError, match="n_ranks: expected a divisor of n_kv_heads = 2, got 4"):
        tensor_parallel_plan(model, 4)


# Ring attention


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.floats(1, 1000),
    st.integers(0, 99),
)
def test_merged_tiles_are_attention_to_all_keys(queries, tiles, scale, seed):
    seed_everything(seed)
    scores = torch.randn(queries, sum(tiles), dtype=torch.float64) * scale
    values = torch.randn(sum(tiles), 3, dtype=torch.float64)
    hidden = torch.full((queries,), -torch.inf, dtype=torch.float64)
    part = AttentionPart(torch.zeros(queries, 3, dtype=torch.float64), hidden)
    assert merge_attention(part, part).out.tolist() == part.out.tolist()  # no keys, no NaN
    for some, v in zip(scores.split(tiles, 1), values.split(tiles), strict=True):
        tile = AttentionPart(some.softmax(-1) @ v, some.logsumexp(-1))
        part = merge_attention(part, tile)
    torch.testing.assert_close(part.out, scores.softmax(-1) @ values)
    torch.testing.assert_close(part.log_sum, scores.logsumexp(-1))


def attention_inputs():
    seed_everything(2)
    shapes = ((2, 4, 24, 8), (2, 2, 24, 8), (2, 2, 24, 6), (2, 4, 24, 6))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def rings():
    *inputs, d_out = attention_inputs()
    found = {}
    for is_causal in (True, False):
        for zigzag in (False, True):
            chunks = [cut_sequence(x, -2, zigzag=zigzag).requires_grad_() for x in inputs]
            out = ring_attention(*chunks, is_causal=is_causal, zigzag=zigzag)
            out.backward(cut_sequence(d_out, -2, zigzag=zigzag))
            places = cut_sequence(torch.arange(24), 0, zigzag=zigzag)
            found[is_causal, zigzag] = places, [out.detach(), *(x.grad for x in chunks)]
    dist.barrier()  # nothing that was sent is left over
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_ring_is_attention_of_one_process_forward_and_backward(world_size):
    found = launch(rings, world_size)
    for is_causal in (True, False):
        *inputs, d_out = attention_inputs()
        inputs = [x.requires_grad_() for x in inputs]
        out = scaled_dot_product_attention(*inputs, is_causal=is_causal)
        out.backward(d_out)
        expected = [out.detach(), *(x.grad for x in inputs)]
        for zigzag in (False, True):
            seen = []
            for rank in found:
                places, tensors = rank[is_causal, zigzag]
                seen += places.tolist()
                for one, whole in zip(tensors, expected, strict=True):
                    torch.testing.assert_close(one, whole[..., places, :], rtol=1e-9, atol=1e-12)
            assert sorted(seen) == list(range(24))


def test_alone_a_ring_is_attention_and_has_no_second_derivative():
    *inputs, _ = attention_inputs()
    out = ring_attention(*inputs)  # causal unless told otherwise
    expected = scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(out, expected)
    out = ring_attention(inputs[0].requires_grad_(), *inputs[1:])
    with pytest.raises(RuntimeError, match="create_graph: ring attention has first derivatives"):
        torch.autograd.grad(out.sum(), inputs[0], create_graph=True)


def chunks_of(length, zigzag):
    cut_sequence(torch.zeros(2, length), zigzag=zigzag)


def unequal_chunks():
    rank, said = dist.get_rank(), []
    for chunk, dtype in ((4 + 2 * rank, torch.float32), (4, (torch.float32, torch.float64)[rank])):
        q = torch.randn(1, 2, chunk, 8, dtype=dtype)
        with pytest.raises(ValueError, match="expected the same on each rank") as caught:
            ring_attention(q, q, q)
        said.append(str(caught.value))
    return said


def test_sequences_that_do_not_fit_are_refused_on_every_rank():
    said = raises_everywhere(chunks_of, 2, 7, False)
    assert "x: expected a sequence that 2 pieces divide, got 7 in dimension 1" in said
    assert "4 pieces divide, got 6" in raises_everywhere(chunks_of, 2, 6, True)
    first, second = launch(unequal_chunks, 2)
    assert first == second
    assert first[0] == "chunk: expected the same on each rank, got 4 on rank 0, 6 on rank 1"
    assert first[1].startswith("dtypes: expected the same on each rank, got (torch.float32, ")


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_the_work_of_a_ring_is_the_triangle_and_zigzag_divides_it_evenly(n, pieces, zigzag):
    length = 2 * n * pieces
    work = ring_work(n, length, zigzag=zigzag)
    assert work.sum() == length * (length + 1) // 2
    if zigzag:
        assert len(set(work.sum(dim=1).tolist())) == 1
        assert all(len(set(column)) == 1 for column in work.T.tolist())
    else:
        assert (work[0, 1:] == 0).all()
    assert ring_work(1, 2).tolist() == [[3]]


# Pipelines


@settings(deadline=None)
@given(SCHEDULE, st.sampled_from(sorted(SCHEDULES)), st.floats(0.1, 3), st.floats(0.1, 3))
def test_schedules_have_the_bubble_of_the_formula_and_keep_what_they_say(sizes, kind, f, b):
    p, m = sizes
    timing = pipeline_timing(SCHEDULES[kind](p, m), forward=f, backward=b)
    assert timing.duration == pytest.approx((m + p - 1) * (f + b))
    assert timing.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-9)
    assert timing.kept == ([m] * p if kind == "gpipe" else [p - stage for stage in range(p)])


def test_a_backward_pass_takes_twice_as_long_unless_told_otherwise():
    timing = pipeline_timing(one_forward_one_backward(2, 2))
    assert timing.duration == 9


def broken(change):
    schedule = one_forward_one_backward(2, 2)
    change(schedule)
    return schedule


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        ([], "schedule: expected a list of actions for each stage"),
        (broken(lambda s: s[0].pop()), "once each, got .* in stage 0"),
        (broken(lambda s: s[1].append(s[1][0])), "once each, got .* in stage 1"),
        (broken(lambda s: s[0].reverse()), "stage 0 waits for ever before"),
        (broken(lambda s: s[1].insert(0, s[1].pop())), "stage 0 waits for ever before"),
    ],
)
def test_schedules_that_would_hang_are_refused(schedule, says):
    with pytest.raises(ValueError, match=says):
        pipeline_timing(schedule)


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_fewer_microbatches_than_stages_are_refused(make):
    expected = "n_microbatches: expected at least one for each of the 4 stages, got 3"
    with pytest.raises(ValueError, match=expected):
        make(4, 3)


def piped():
    rank, n = dist.get_rank(), dist.get_world_size()
    found = {}
    ids = rows()
    targets = ids[:, 1:].clone()
    targets[0, 3:] = -100  # micro-batches with unequal numbers of targets
    for kind in KINDS:
        for name, make in SCHEDULES.items():
            model = model_of(kind)
            stage = PipelineStage(model, rank, n)
            for _ in range(2):  # gradients of two batches add up
                loss = pipeline_step(stage, ids[:, :-1], targets, make(n, 4))
            found[kind, name] = loss, gradients(model)
    dist.barrier()  # nothing that was sent is left over
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_pipeline_has_the_loss_and_gradients_of_one_process(world_size):
    found = launch(piped, world_size)
    ids = rows()
    targets = ids[:, 1:].clone()
    targets[0, 3:] = -100
    for kind in KINDS:
        model = model_of(kind)
        loss = cross_entropy(model(ids[:, :-1]), targets)
        (2 * loss).backward()
        for name in SCHEDULES:
            losses = [rank[kind, name][0] for rank in found]
            assert losses[:-1] == [None] * (world_size - 1)
            assert losses[-1] == pytest.approx(loss.item(), abs=1e-12)
            assert_equal([rank[kind, name][1] for rank in found], gradients(model))


def torch_pipeline():
    from torch.distributed.pipelining import PipelineStage as TorchStage
    from torch.distributed.pipelining import Schedule1F1B

    rank, n = dist.get_rank(), dist.get_world_size()
    ids = rows()
    model = model_of()
    stage = TorchStage(PipelineStage(model, rank, n), rank, n, torch.device("cpu"))

    def loss_of(logits, targets):
        return cross_entropy(logits, targets.contiguous())

    schedule = Schedule1F1B(stage, 4, loss_fn=loss_of)
    if rank == 0:
        schedule.step(ids[:, :-1])
    else:
        schedule.step(target=ids[:, 1:].contiguous())
    return gradients(model)


def test_torch_runs_our_stages_with_the_same_gradients():
    _, expected = step(model_of(), rows())
    assert_equal(launch(torch_pipeline, 2), expected)


def run_stage(n_rows, stages, schedule, n_layers=4):
    rank, n = dist.get_rank(), dist.get_world_size()
    stage = PipelineStage(model_of(n_layers=n_layers), rank, stages or n)
    ids = rows(n_rows)
    pipeline_step(stage, ids[:, :-1], ids[:, 1:].contiguous(), schedule)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((5, None, gpipe_schedule(2, 4)), "ids: expected rows that 4 micro-batches divide, got 5"),
        ((4, None, gpipe_schedule(3, 4)), "schedule: expected 2 stages, as there are ranks, got 3"),
        ((4, 4, gpipe_schedule(2, 4)), "stage: expected stage"),
        ((4, None, gpipe_schedule(2, 4), 3), "n_stages: expected a divisor of n_layers = 3, got 2"),
        ((4, None, broken(lambda s: s[0].reverse())), "waits for ever before"),
    ],
)
def test_pipelines_that_cannot_run_are_refused_on_every_rank(arguments, says):
    assert says in raises_everywhere(run_stage, 2, *arguments)


def unlike_pipelines():
    rank = dist.get_rank()
    stage = PipelineStage(model_of(), rank, 2)
    unlike = [
        (4, gpipe_schedule(2, 4) if rank else one_forward_one_backward(2, 4)),
        (4, gpipe_schedule(2, 2 + 2 * rank)),
        (4 + 4 * rank, gpipe_schedule(2, 4)),
    ]
    said = []
    for n_rows, schedule in unlike:
        ids = torch.zeros(n_rows, 17, dtype=torch.int64)
        with pytest.raises(ValueError, match="expected the same on each rank") as caught:
            pipeline_step(stage, ids[:, :-1], ids[:, 1:], schedule)
        said.append(str(caught.value))
    return said


def test_stages_that_would_follow_different_plans_are_refused_on_every_rank():
    first, second = launch(unlike_pipelines, 2)
    assert first == second
    same = "expected the same on each rank, got"
    assert first[0].startswith(f"schedule: {same} ('backward', 0) on rank 0, ('forward', 2)")
    assert first[1:] == [
        f"micro_batches: {same} 2 on rank 0, 4 on rank 1",
        f"ids.shape: {same} (4, 16) on rank 0, (8, 16) on rank 1",
    ]


def test_a_stage_drops_out_what_the_model_does():
    model, ids = model_of("gpt2", dropout=0.5), rows()
    found = []
    for module in (model, PipelineStage(model, 0, 1)):
        seed_everything(3)
        found.append(module.train()(ids))
    assert torch.equal(*found) and not torch.equal(found[0], model.eval()(ids))


def test_a_pipeline_of_one_stage_is_one_process():
    model, ids = model_of("tied"), rows()
    stage = PipelineStage(model, 0, 1)
    loss = pipeline_step(stage, ids[:, :-1], ids[:, 1:].contiguous(), gpipe_schedule(1, 2))
    expected_loss, expected = step(model_of("tied"), ids)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_equal([gradients(model)], expected)
    assert stage.tied_weight is None
    with pytest.raises(ValueError, match="targets: expected at least one that counts, got none"):
        nothing = torch.full((4, 16), -100)
        pipeline_step(stage, ids[:, :-1], nothing, gpipe_schedule(1, 2))
    assert PipelineAction("forward", 0) == ("forward", 0)
