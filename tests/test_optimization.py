"""Losses, optimizers, schedules and clipping of chapter 12, against PyTorch."""

import copy
import inspect
import math
import pickle
import re
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmbook import optimization
from llmbook.model import ModelConfig, TransformerLM
from llmbook.optimization import (
    SGD,
    AdamW,
    Muon,
    Optimizers,
    build_optimizer,
    chunked_cross_entropy,
    clip_gradients,
    constant_schedule,
    cosine_schedule,
    cross_entropy,
    linear_schedule,
    log_sum_exp,
    orthogonalize,
    parameter_groups,
    wsd_schedule,
)

BACKENDS = ("reference", "torch")


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def tiny_model(**changes):
    sizes = {"vocab_size": 40, "context_length": 16, "d_model": 16, "n_layers": 2, "n_heads": 2}
    return TransformerLM(ModelConfig(**sizes | changes))


def problem(rows=30, vocab_size=17, d_model=6, ignored=5, dtype=torch.float64):
    """Hidden states, a head, and targets of which some do not count."""
    hidden = (2 * torch.randn(rows, d_model, dtype=dtype)).requires_grad_()
    weight = torch.randn(vocab_size, d_model, dtype=dtype).requires_grad_()
    targets = torch.randint(vocab_size, (rows,))
    targets[torch.randperm(rows)[:ignored]] = -100
    return hidden, weight, targets


def expected_loss(hidden, weight, targets, reduction="mean", z_loss=0.0, soft_cap=None):
    """The definition, with nothing of ours in it."""
    logits = hidden @ weight.T
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    kept = targets != -100
    losses = F.cross_entropy(logits[kept], targets[kept], reduction="none")
    losses = losses + z_loss * logits[kept].logsumexp(-1) ** 2
    return losses.mean() if reduction == "mean" else losses.sum()


def assert_near(ours, expected, length=1):
    """Equal up to rounding in 32 bits, relative to the largest number, for sums of ``length``."""
    bound = 1e-5 * math.sqrt(length) * float(expected.abs().max())
    assert (ours - expected).abs().max() <= bound


# Log-sum-exp and cross-entropy


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20))
def test_log_sum_exp_is_torchs_and_finite(logits):
    exact = torch.tensor(logits, dtype=torch.float64)
    torch.testing.assert_close(log_sum_exp(exact), exact.logsumexp(-1))
    assert log_sum_exp(exact.float()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_sum_exp_is_computed_in_32_bits_or_more(dtype):
    logits = (30 * torch.randn(5, 300)).to(dtype)
    ours = log_sum_exp(logits)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    assert_near(ours.double(), logits.double().logsumexp(-1), length=300)


def test_log_sum_exp_of_nothing_allowed_is_minus_infinity():
    logits = torch.tensor([[-torch.inf, -torch.inf], [-torch.inf, 2.0], [torch.inf, 0.0]])
    assert log_sum_exp(logits).tolist() == [-math.inf, 2.0, math.inf]


OPTIONS = ({}, {"z_loss": 0.1}, {"soft_cap": 3.0}, {"z_loss": 0.1, "soft_cap": 3.0})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("way", [*BACKENDS, 1, 7, 30, 1000])
def test_loss_and_gradients_are_those_of_the_definition(way, reduction, options):
    hidden, weight, targets = problem()
    expected = expected_loss(hidden, weight, targets, reduction, **options)
    if isinstance(way, int):
        ours = chunked_cross_entropy(
            hidden, weight, targets, chunk_size=way, reduction=reduction, **options
        )
    else:
        logits = hidden @ weight.T
        ours = cross_entropy(logits, targets, reduction=reduction, backend=way, **options)
    torch.testing.assert_close(ours, expected)
    mine, theirs = (torch.autograd.grad(3 * loss, (hidden, weight)) for loss in (ours, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("way", [*BACKENDS, "chunked"])
def test_a_mean_over_nothing_is_nan_and_moves_nothing(way):
    hidden, weight, targets = problem(ignored=30)
    if way == "chunked":
        loss = chunked_cross_entropy(hidden, weight, targets)
    else:
        loss = cross_entropy(hidden @ weight.T, targets, backend=way)
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.eq(0).all()
    assert chunked_cross_entropy(hidden, weight, targets, reduction="sum") == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_are_of_32_bits_and_each_alone_if_asked(backend, dtype):
    logits, targets = 20 * torch.randn(2, 3, 50), torch.randint(50, (2, 3))
    targets[1, 2] = 7
    options = {"ignore_index": 7, "reduction": "none", "backend": backend}
    losses = cross_entropy(logits.to(dtype), targets, **options)
    assert losses.shape == (2, 3) and losses.dtype == torch.float32 and losses[1, 2] == 0
    wide = logits.to(dtype).double().mT
    expected = F.cross_entropy(wide, targets, ignore_index=7, reduction="none")
    assert_near(losses.double(), expected, length=50)


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 9), st.integers(1, 14))
@settings(max_examples=40)
def test_chunks_of_any_size_agree_with_all_at_once(seed, rows, vocab_size, chunk_size):
    torch.manual_seed(seed)
    hidden, weight, targets = problem(rows, vocab_size, 3, ignored=rows // 3)
    ours = chunked_cross_entropy(hidden, weight, targets, chunk_size=chunk_size)
    theirs = cross_entropy(hidden @ weight.T, targets, backend="reference")
    torch.testing.assert_close(ours, theirs)
    mine, peer = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs))
    torch.testing.assert_close(mine, peer)


def test_chunked_gradients_pass_a_check_by_differences():
    hidden, weight, targets = problem(rows=6, vocab_size=5, d_model=3, ignored=1)
    options = {"chunk_size": 4, "z_loss": 0.2, "soft_cap": 2.0}
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, **options), (hidden, weight)
    )


def test_chunked_makes_only_the_gradients_that_are_asked_for():
    hidden, weight, targets = problem()
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, targets).requires_grad
    (only,) = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight.detach(), targets), (hidden,)
    )
    (other,) = torch.autograd.grad(
        chunked_cross_entropy(hidden.detach(), weight, targets), (weight,)
    )
    both = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets), (hidden, weight))
    torch.testing.assert_close((only, other), both)


def test_chunked_takes_any_leading_shape_and_strides():
    hidden = torch.randn(6, 5, 4, dtype=torch.float64).mT[:, :4, :3].requires_grad_()
    weight, targets = torch.randn(11, 3, dtype=torch.float64), torch.randint(11, (4, 6)).T
    ours = chunked_cross_entropy(hidden, weight, targets, chunk_size=5)
    torch.testing.assert_close(ours, cross_entropy(hidden @ weight.T, targets))
    assert torch.autograd.grad(ours, hidden)[0].shape == hidden.shape


@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_in_16_bits_is_near_and_its_gradients_have_the_types_of_the_inputs(autocast):
    hidden, weight, targets = problem(rows=300, dtype=torch.float32)
    theirs = cross_entropy(hidden @ weight.T, targets)
    expected = torch.autograd.grad(theirs, (hidden, weight))
    if not autocast:
        hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = chunked_cross_entropy(hidden, weight, targets, chunk_size=16)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0)
    for mine, peer, given_tensor in zip(
        torch.autograd.grad(ours, (hidden, weight)), expected, (hidden, weight), strict=True
    ):
        assert mine.dtype == given_tensor.dtype
        assert (mine - peer).norm() < 0.02 * peer.norm()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of entries that any result had."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.entries = max(self.entries, *sizes, 0)
        return result


def test_no_tensor_holds_more_logits_than_a_chunk():
    hidden, weight, targets = problem(rows=400, vocab_size=300, d_model=4, dtype=torch.float32)
    with LargestTensor() as largest:
        chunked_cross_entropy(
            hidden, weight, targets, chunk_size=10, z_loss=0.1, soft_cap=3.0
        ).backward()
    assert largest.entries == 10 * 300


def test_the_loss_of_a_model_is_the_same_by_hidden_states():
    model, ids = tiny_model().double(), torch.randint(40, (2, 9))
    targets = ids.roll(-1, dims=1)
    whole = cross_entropy(model(ids), targets)
    chunked = chunked_cross_entropy(model.hidden_states(ids), model.lm_head.weight, targets)
    mine, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (chunked, whole))
    torch.testing.assert_close(mine, theirs)


BAD_LOSSES = [
    ({"z_loss": -1.0}, "z_loss: expected a finite number of at least 0, got -1.0"),
    ({"z_loss": math.nan}, "z_loss"),
    ({"soft_cap": 0.0}, "soft_cap: expected a finite number above 0, got 0.0"),
    ({"reduction": "max"}, "reduction: expected one of"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("options", "message"), BAD_LOSSES)
def test_bad_options_of_losses_are_named(options, message):
    hidden, weight, targets = problem()
    with pytest.raises(ValueError, match=message):
        cross_entropy(hidden @ weight.T, targets, **options)
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(hidden, weight, targets, **options)


@pytest.mark.usefixtures("untyped")
def test_other_bad_arguments_of_losses_are_named():
    hidden, weight, targets = problem()
    with pytest.raises(ValueError, match="backend: expected one of"):
        cross_entropy(hidden @ weight.T, targets, backend="jax")
    with pytest.raises(
        ValueError, match="chunk_size: expected a whole number of at least 1, got 0"
    ):
        chunked_cross_entropy(hidden, weight, targets, chunk_size=0)
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, got 'none'"):
        chunked_cross_entropy(hidden, weight, targets, reduction="none")


BAD_TENSORS = [
    ({"logits": [1.0]}, "logits: expected a tensor of floating-point numbers, got list"),
    ({"logits": torch.ones(3, 4).int()}, "logits: expected a tensor .* got torch.int32"),
    ({"logits": torch.tensor(1.0)}, r"logits: expected a dimension, .* got shape \(\)"),
    ({"logits": torch.ones(3, 0)}, r"logits: expected a dimension, the last of at least 1"),
    ({"hidden": None}, "hidden: expected a tensor of floating-point numbers, got NoneType"),
    ({"hidden": torch.tensor(1.0)}, r"hidden: expected a dimension"),
    ({"weight": torch.ones(7, 5)}, r"weight: expected a shape of \(vocab_size, 4\), got \(7, 5\)"),
    ({"weight": torch.ones(2, 7, 4)}, r"weight: expected a shape of \(vocab_size, 4\)"),
    ({"weight": torch.ones(4)}, r"weight: expected 2 or more dimensions, .* got shape \(4,\)"),
    ({"weight": "head"}, "weight: expected a tensor of floating-point numbers, got str"),
    ({"weight": torch.ones(7, 4).half()}, "weight: expected torch.float32 as hidden has, got"),
    ({"targets": [1, 2, 3]}, "targets: expected a tensor of torch.int64, got list"),
    ({"targets": torch.ones(3)}, "targets: expected a tensor of torch.int64, got torch.float32"),
    ({"targets": torch.ones(3).int()}, "targets: expected a tensor of torch.int64, got torch.int"),
    ({"ignore_index": None}, "ignore_index: expected a whole number, got None"),
    ({"ignore_index": -100.0}, "ignore_index: expected a whole number, got -100.0"),
    ({"z_loss": "0.1"}, "z_loss: expected a finite number of at least 0, got '0.1'"),
    ({"z_loss": None}, "z_loss: expected a finite number of at least 0, got None"),
    ({"soft_cap": "30"}, "soft_cap: expected a finite number above 0, got '30'"),
    ({"chunk_size": None}, "chunk_size: expected a whole number of at least 1, got None"),
    ({"chunk_size": 2.5}, "chunk_size: expected a whole number .* got 2.5"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_what_no_loss_can_take_is_named(change, message):
    shared = {"targets": torch.tensor([1, 0, 2])}
    whole = {"logits": torch.ones(3, 7), **shared} | change
    parts = {"hidden": torch.ones(3, 4), "weight": torch.ones(7, 4), **shared} | change
    some = 0
    for function, arguments in ((cross_entropy, whole), (chunked_cross_entropy, parts)):
        if set(change) <= set(inspect.signature(function).parameters):
            with pytest.raises(ValueError, match=message):
                function(**arguments)
            some += 1
    assert some
    if "logits" in change:
        with pytest.raises(ValueError, match=message):
            log_sum_exp(change["logits"])


def test_defaults_of_losses():
    """Nothing is added to the mean or capped, and -100 does not count."""
    hidden, weight, targets = problem()
    plain = F.cross_entropy(50 * hidden @ weight.T, targets)
    torch.testing.assert_close(cross_entropy(50 * hidden @ weight.T, targets), plain)
    torch.testing.assert_close(chunked_cross_entropy(50 * hidden, weight, targets), plain)
    default = inspect.signature(chunked_cross_entropy).parameters["chunk_size"].default
    with LargestTensor() as largest:
        chunked_cross_entropy(torch.randn(2000, 4), torch.randn(300, 4), targets.new_zeros(2000))
    assert largest.entries == default * 300 == 512 * 300


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("shape", [(1,), (29,), (31,), (5, 6), (30, 1), ()])
def test_targets_of_another_shape_are_refused_and_do_not_broadcast(shape):
    hidden, weight, _ = problem()
    expected = rf"targets: expected a shape of \(30,\), got {re.escape(str(shape))}"
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=expected):
            cross_entropy(hidden @ weight.T, torch.zeros(shape, dtype=torch.long), backend=backend)
    with pytest.raises(ValueError, match=expected):
        chunked_cross_entropy(hidden, weight, torch.zeros(shape, dtype=torch.long), chunk_size=29)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 0, 3)])
def test_losses_take_a_single_place_and_none(rows):
    hidden = torch.randn(*rows, 3, dtype=torch.float64)
    weight, targets = torch.randn(5, 3, dtype=torch.float64), torch.randint(5, rows)
    expected = F.cross_entropy((hidden @ weight.T).view(-1, 5), targets.view(-1))
    for ours in (
        *(cross_entropy(hidden @ weight.T, targets, backend=backend) for backend in BACKENDS),
        chunked_cross_entropy(hidden, weight, targets),
    ):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("wrong", [17, -1, -99])
def test_targets_out_of_range_are_named(wrong):
    hidden, weight, targets = problem()
    targets[3] = wrong
    expected = f"targets: expected ids from 0 to 16, or -100, got {wrong}"
    with pytest.raises(ValueError, match=expected):
        cross_entropy(hidden @ weight.T, targets)
    with pytest.raises(ValueError, match=expected):
        chunked_cross_entropy(hidden, weight, targets)


# Optimizers


def run(optimizer, parameters, gradients):
    for grads in gradients:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = None if grad is None else grad.clone()
        optimizer.step()


def parameters_like(shapes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


def gradients_like(shapes, n_steps, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        for _ in range(n_steps)
    ]


MATRICES = [(4, 6), (6, 4), (5, 5), (4, 6)]
TORCH_MUON = getattr(torch.optim, "Muon", None)  # older versions of torch have none
PAIRS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3}),
    "muon": (Muon, TORCH_MUON, {"lr": 0.1, "weight_decay": 0.3}),
    "matched": (
        Muon,
        TORCH_MUON,
        {"lr": 0.1, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    ),
}


@pytest.fixture
def _muon_in_64_bits(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon calls it


def variants():
    for name, (ours, theirs, options) in PAIRS.items():
        for backend in ("torch",) if ours is Muon else BACKENDS:
            extra = {"ns_dtype": torch.float64} if ours is Muon else {"backend": backend}
            marks = [pytest.mark.skip("this torch has no such optimizer")] if theirs is None else []
            yield pytest.param(ours, theirs, options, extra, id=f"{name}-{backend}", marks=marks)


VARIANTS = list(variants())


@pytest.mark.usefixtures("_muon_in_64_bits")
@pytest.mark.parametrize(("ours", "theirs", "options", "extra"), VARIANTS)
def test_each_step_is_torchs(ours, theirs, options, extra):
    mine, peers = parameters_like(MATRICES), parameters_like(MATRICES)
    optimizer, peer = ours(mine, **options, **extra), theirs(peers, **options)
    for number, grads in enumerate(gradients_like(MATRICES, 20)):
        if number % 3 == 1:
            grads[1] = None  # a parameter that this batch does not touch
        run(optimizer, mine, [grads])
        run(peer, peers, [grads])
        torch.testing.assert_close(mine, peers)


@pytest.mark.usefixtures("_muon_in_64_bits")
@pytest.mark.parametrize(("ours", "theirs", "options", "extra"), VARIANTS)
@pytest.mark.parametrize("fused", [False, True])
def test_states_pass_both_ways_in_the_middle_of_a_run(ours, theirs, options, extra, fused):
    if fused and theirs is TORCH_MUON:
        pytest.skip("torch's Muon has no fused kernel")
    mine, peers = parameters_like(MATRICES), parameters_like(MATRICES)
    optimizer = ours(mine, **options, **extra)
    peer = theirs(peers, **options, **({"fused": True} if fused else {}))
    first, second = gradients_like(MATRICES, 5, seed=1), gradients_like(MATRICES, 5, seed=2)
    run(optimizer, mine, first)
    run(peer, peers, first)
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(peer.state_dict())
    # Fresh ones, with other settings, so that all comes from the state.
    optimizer, peer = ours(mine, lr=7.0, **extra), theirs(peers, lr=7.0)
    optimizer.load_state_dict(saved[1])
    peer.load_state_dict(saved[0])
    run(optimizer, mine, second)
    run(peer, peers, second)
    torch.testing.assert_close(mine, peers)


@pytest.mark.parametrize(("ours", "theirs", "options", "extra"), VARIANTS)
def test_a_run_that_was_saved_goes_on_bitwise(ours, theirs, options, extra):
    mine, others = parameters_like(MATRICES), parameters_like(MATRICES)
    optimizer = ours(mine, **options, **extra)
    gradients = gradients_like(MATRICES, 10)
    run(optimizer, mine, gradients)
    half = ours(others, **options, **extra)
    run(half, others, gradients[:5])
    resumed = ours(others, lr=3.0, **extra)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    run(resumed, others, gradients[5:])
    for a, b in zip(mine, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_step_is_bitwise_torchs(dtype):
    shapes = [(50, 7), (9,)]
    mine, peers = parameters_like(shapes, dtype=dtype), parameters_like(shapes, dtype=dtype)
    gradients = gradients_like(shapes, 10, dtype=dtype)
    run(AdamW(mine), mine, gradients)
    run(torch.optim.AdamW(peers, fused=True), peers, gradients)
    for a, b in zip(mine, peers, strict=True):
        assert torch.equal(a, b)


# Memory laid out in other ways


def contiguous(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


def columns_of_a_table(tensor):
    """The same numbers as the first columns of a wider table."""
    table = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7.0)
    table[..., : tensor.shape[-1]] = tensor
    return table[..., : tensor.shape[-1]]


def every_second_row(tensor):
    table = tensor.new_full((2 * len(tensor), *tensor.shape[1:]), 7.0)
    table[::2] = tensor
    return table[::2]


def transposed(tensor):
    return contiguous(tensor.mT).mT


def shifted(tensor):
    """The same numbers, beginning one number late in their memory."""
    return torch.cat((tensor.new_full((1,), 7.0), tensor.flatten()))[1:].view(tensor.shape)


LAYOUTS = [contiguous, columns_of_a_table, every_second_row, transposed, shifted]


@pytest.mark.usefixtures("_muon_in_64_bits")
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("of_parameter", LAYOUTS)
@pytest.mark.parametrize(("ours", "theirs", "options", "extra"), VARIANTS)
def test_strides_of_parameters_and_gradients_do_not_matter(
    ours, theirs, options, extra, of_parameter, of_gradient
):
    peers = parameters_like(MATRICES)
    mine = [nn.Parameter(of_parameter(p.detach())) for p in peers[:2]]
    mine += [nn.Parameter(p.detach().clone()) for p in peers[2:]]  # ordinary ones beside them
    optimizer, peer = ours(mine, **options, **extra), theirs(peers, **options)
    for step, grads in enumerate(gradients_like(MATRICES, 4)):
        run(peer, peers, [grads])
        for number, (parameter, grad) in enumerate(zip(mine, grads, strict=True)):
            odd = number < 2 and step != 2  # layouts may change between steps
            parameter.grad = of_gradient(grad) if odd else grad.clone()
        optimizer.step()
        torch.testing.assert_close(mine, peers)


@pytest.mark.parametrize("make", [SGD, AdamW, Muon, partial(SGD, momentum=0.9)])
def test_nothing_outside_of_a_parameter_is_written(make):
    table = torch.arange(48.0).view(6, 8)
    before = table.clone()
    parameter = nn.Parameter(table[1:4, 2:5])
    parameter.grad = torch.ones(3, 3)
    optimizer = make([parameter], lr=1.0)
    optimizer.step()
    optimizer.step()
    outside = torch.ones(6, 8, dtype=torch.bool)
    outside[1:4, 2:5] = False
    assert torch.equal(table[outside], before[outside])
    assert (table[~outside] != before[~outside]).all()


def test_the_example_of_a_table_of_which_half_is_trained():
    table = torch.zeros(4, 6)
    parameter = nn.Parameter(table[:, :3])
    parameter.grad = torch.ones(4, 3)
    SGD([parameter], lr=1.0).step()
    assert torch.equal(table[:, :3], -torch.ones(4, 3))
    assert not table[:, 3:].any()


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_states_of_another_layout_are_read_right(kind):
    options = {"momentum": 0.9} if kind is SGD else {}
    mine, peers = parameters_like([(4, 6)]), parameters_like([(4, 6)])
    optimizers = [kind(parameters, lr=0.1, **options) for parameters in (mine, peers)]
    first, second = gradients_like([(4, 6)], 2)
    for optimizer, parameters in zip(optimizers, (mine, peers), strict=True):
        run(optimizer, parameters, [first])
    state = copy.deepcopy(optimizers[0].state_dict())
    for name, value in state["state"][0].items():
        state["state"][0][name] = transposed(value) if value.ndim else value
    optimizers[0].load_state_dict(state)
    for optimizer, parameters in zip(optimizers, (mine, peers), strict=True):
        run(optimizer, parameters, [second])
    torch.testing.assert_close(mine, peers)


def test_dense_tensors_that_are_laid_out_alike_are_fused():
    """As those of models in channels-last order are."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimization, "adamw", lambda *_, fused, **__: taken.append(fused))
        for of_parameter, of_gradient in (
            (contiguous, contiguous),
            (transposed, transposed),
            (transposed, contiguous),
            (columns_of_a_table, columns_of_a_table),
        ):
            parameter = nn.Parameter(of_parameter(torch.ones(4, 6)))
            parameter.grad = of_gradient(torch.ones(4, 6))
            AdamW([parameter]).step()
    assert taken == [True, True, False, False]


# Copies


def unpickled(made):
    return pickle.loads(pickle.dumps(made))


@pytest.mark.parametrize(
    ("kind", "backend", "taken"),
    [
        (SGD, "reference", "_sgd_step"),
        (SGD, "torch", "_fused_sgd_step"),
        (AdamW, "reference", "_adamw_step"),
        (AdamW, "torch", "_fused_adamw_step"),
    ],
)
def test_a_backend_takes_its_own_way(kind, backend, taken, monkeypatch):
    """The results are equal: only the function that is called tells one way from the other."""
    seen = []
    for name in ("_sgd_step", "_fused_sgd_step", "_adamw_step", "_fused_adamw_step"):
        monkeypatch.setattr(optimization, name, lambda *_, name=name: seen.append(name))
    parameters = parameters_like([(2, 3)])
    run(kind(parameters, backend=backend), parameters, gradients_like([(2, 3)], 1))
    assert seen == [taken]


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
@pytest.mark.parametrize(
    "make",
    [
        *(partial(kind, backend=backend) for kind in (SGD, AdamW) for backend in BACKENDS),
        partial(SGD, momentum=0.9),
        Muon,
        partial(Muon, ns_dtype=torch.float64),
    ],
)
def test_a_copied_optimizer_goes_on_as_the_original(make, copied):
    parameters = parameters_like(MATRICES)
    optimizer = make(parameters, lr=0.1)
    first, second = gradients_like(MATRICES, 4), gradients_like(MATRICES, 4, seed=2)
    run(optimizer, parameters, first)
    twin = copied(optimizer)
    twins = twin.param_groups[0]["params"]
    for name in ("backend", "ns_dtype"):
        assert getattr(twin, name, None) == getattr(optimizer, name, None)
    run(optimizer, parameters, second)
    run(twin, twins, second)
    for a, b in zip(parameters, twins, strict=True):
        assert a is not b
        assert torch.equal(a, b)
    twin.zero_grad()
    assert all(p.grad is None for p in twins)
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_model_is_copied_together_with_its_optimizer(name, copied):
    model = tiny_model()
    optimizer = build_optimizer(model, name, lr=0.01)
    ids = torch.randint(40, (2, 9))

    def step(model, optimizer):
        optimizer.zero_grad()
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()

    step(model, optimizer)
    twin_model, twin = copied((model, optimizer))
    for group in twin.param_groups:
        group["lr"] = 0.02  # as a schedule does
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    step(model, optimizer)
    step(twin_model, twin)
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expectation_of_the_first_moment_is_exact(backend):
    """With constant gradients the corrected means are the gradient and its square."""
    (parameter,) = parameters_like([(5,)])
    optimizer = AdamW([parameter], lr=0.25, eps=0.0, weight_decay=0.0, backend=backend)
    before, grad = parameter.detach().clone(), torch.tensor([3.0, -1e-4, 7e5, -2.0, 1e-9]).double()
    for step in range(1, 4):
        run(optimizer, [parameter], [[grad]])
        torch.testing.assert_close(parameter.data, before - step * 0.25 * grad.sign())


@pytest.mark.usefixtures("untyped")
def test_what_is_no_closure_is_named():
    (parameter,) = parameters_like([(3, 3)])
    for optimizer in (SGD([parameter]), AdamW([parameter]), Optimizers(Muon([parameter]))):
        with pytest.raises(ValueError, match=r"^closure: expected a function or None, got 3"):
            optimizer.step(3)


def test_closures_are_called_with_gradients():
    (parameter,) = parameters_like([(3, 3)])
    for optimizer in (SGD([parameter]), AdamW([parameter]), Optimizers(Muon([parameter]))):

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = (parameter**2).sum()
            loss.backward()
            return loss

        before = parameter.detach().clone()
        assert optimizer.step(closure) == (before**2).sum()
        assert not torch.equal(before, parameter)


BAD_SETTINGS = [
    (SGD, {"lr": -1.0}, "lr: expected a finite number of at least 0, got -1.0"),
    (SGD, {"momentum": 1.0}, "momentum: expected at least 0 and less than 1, got 1.0"),
    (SGD, {"nesterov": True}, "nesterov: expected a momentum above 0"),
    (SGD, {"backend": "jax"}, "backend: expected one of"),
    (AdamW, {"lr": math.nan}, "lr: expected a finite number of at least 0, got nan"),
    (AdamW, {"lr": math.inf}, "lr: expected"),
    (AdamW, {"betas": (0.9, 1.0)}, r"betas\[1\]: expected at least 0 and less than 1, got 1.0"),
    (AdamW, {"betas": (-0.1, 0.9)}, r"betas\[0\]"),
    (AdamW, {"betas": (math.nan, 0.9)}, r"betas\[0\]"),
    (AdamW, {"betas": (0.9,)}, r"betas: expected two, got \(0.9,\)"),
    (AdamW, {"betas": (0.9, 0.99, 0.999)}, "betas: expected two"),
    (AdamW, {"eps": -1e-8}, "eps: expected"),
    (AdamW, {"weight_decay": -0.1}, "weight_decay: expected"),
    (AdamW, {"backend": "jax"}, "backend: expected one of"),
    (AdamW, {"lr": "0.1"}, "lr: expected a finite number of at least 0, got '0.1'"),
    (AdamW, {"lr": True}, "lr: expected a finite number of at least 0, got True"),
    (AdamW, {"lr": torch.ones(2)}, "lr: expected a finite number"),
    (AdamW, {"betas": 0.9}, "betas: expected two, got 0.9"),
    (AdamW, {"betas": "ab"}, "betas: expected two, got 'ab'"),
    (AdamW, {"betas": ("0.9", 0.9)}, r"betas(\[0\])?: expected .* got .*'0.9'"),
    (AdamW, {"eps": None}, "eps: expected a finite number of at least 0, got None"),
    (SGD, {"lr": "0.1"}, "lr: expected a finite number of at least 0, got '0.1'"),
    (SGD, {"momentum": "0.9"}, "momentum: expected at least 0 and less than 1, got '0.9'"),
    (SGD, {"momentum": 0.9, "nesterov": "no"}, "nesterov: expected True or False, got 'no'"),
    (SGD, {"weight_decay": "0"}, "weight_decay: expected a finite number"),
    (Muon, {"momentum": "0.9"}, "momentum: expected at least 0 and less than 1, got '0.9'"),
    (Muon, {"nesterov": 1}, "nesterov: expected True or False, got 1"),
    (Muon, {"ns_steps": None}, "ns_steps: expected a whole number of at least 0, got None"),
    (Muon, {"ns_steps": 5.0}, "ns_steps: expected a whole number .* got 5.0"),
    (Muon, {"ns_coefficients": (3.0, -4.0)}, "ns_coefficients: expected three finite numbers"),
    (Muon, {"ns_coefficients": (3.0, "-4", 2.0)}, "ns_coefficients: expected three finite"),
    (Muon, {"ns_coefficients": (3.0, math.nan, 2.0)}, "ns_coefficients: expected three finite"),
    (Muon, {"ns_dtype": torch.int8}, "ns_dtype: expected a floating-point type or None"),
    (Muon, {"ns_dtype": torch.ones(2)}, "ns_dtype: expected a floating-point type or None"),
    (Muon, {"ns_dtype": "bfloat16"}, "ns_dtype: expected a floating-point type or None"),
    (Muon, {"eps": -1.0}, "eps: expected a finite number of at least 0, got -1.0"),
    (Muon, {"lr": math.nan}, "lr: expected"),
    (Muon, {"momentum": -0.1}, "momentum: expected"),
    (Muon, {"momentum": math.nan}, "momentum: expected"),
    (Muon, {"ns_steps": -1}, "ns_steps: expected a whole number of at least 0, got -1"),
    (Muon, {"adjust_lr_fn": "match"}, "adjust_lr_fn: expected None, original or match_rms_adamw"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("kind", "options", "message"), BAD_SETTINGS)
def test_bad_settings_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(parameters_like([(3, 3)]), **options)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", [SGD, AdamW, Muon])
def test_the_rate_is_called_lr(kind):
    parameters = parameters_like([(3, 3)])
    with pytest.raises(TypeError, match="learning_rate: is called lr here"):
        kind(parameters, learning_rate=0.1)
    with pytest.raises(ValueError, match="learning_rate: is called lr here"):
        kind([{"params": parameters, "learning_rate": 0.1}])
    rate = torch.tensor(0.1, dtype=torch.float64)
    before = parameters[0].detach().clone()
    run(kind(parameters, lr=rate), parameters, gradients_like([(3, 3)], 1))
    assert not torch.equal(parameters[0], before), "a rate may be a tensor, or one of NumPy's"
    kind(parameters, lr=np.float32(0.1))


BAD_PARAMETERS = [
    (list, "params: expected at least one parameter, got none$"),
    (lambda: iter([]), "params: expected at least one parameter, got none .an iterator can be rea"),
    (lambda: [{"params": iter([])}], "params: expected at least one parameter, got none .an itera"),
    (lambda: [{"lr": 1.0}], r"param_group: expected a dict with params, got \['lr'\]"),
    (lambda: None, "params: expected an iterable of tensors, got NoneType"),
    (lambda: "weights", "params: expected an iterable of tensors, got str"),
    (lambda: torch.ones(3, 3), "params: expected an iterable of tensors, got Tensor"),
    (lambda: {"weight": torch.ones(3, 3)}, "params: expected an iterable of tensors, got dict"),
    (lambda: nn.Linear(2, 2), r"params: expected tensors, got a Linear; say model.parameters\(\)"),
    (lambda: [nn.Linear(2, 2)], "params: expected tensors, got one of type Linear"),
    (lambda: [("weight", 3)], "params: expected tensors, got one of type int"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("given_parameters", "message"), BAD_PARAMETERS)
def test_what_is_no_parameter_is_named(given_parameters, message):
    for kind in (SGD, AdamW, Muon):
        with pytest.raises(ValueError, match=message):
            kind(given_parameters())


def test_bad_settings_of_a_group_are_named_and_nothing_is_added():
    first, second = parameters_like([(3, 3), (2, 2)])
    optimizer = AdamW([first])
    with pytest.raises(ValueError, match="lr: expected"):
        optimizer.add_param_group({"params": [second], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="params: expected matrices"):
        Muon([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="params: expected matrices"):
        Muon([("bias", nn.Parameter(torch.zeros(3)))])
    with pytest.raises(ValueError, match=r"params: expected matrices.* of torch.complex64"):
        Muon([nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))])


def test_groups_may_be_iterators_tensors_and_named():
    for kind in (SGD, AdamW, Muon):
        for given_parameters in (iter, lambda p: p[0], lambda p: [("name", p[0])], list):
            (parameter,) = parameters_like([(3, 3)])
            before = parameter.detach().clone()
            optimizer = kind([{"params": given_parameters([parameter]), "lr": 0.1}])
            run(optimizer, [parameter], [[torch.eye(3).double()]])
            assert not torch.equal(before, parameter)


def test_a_state_whose_steps_are_plain_numbers_is_taken():
    """As torch wrote them before 1.12."""
    mine, peers = parameters_like([(3, 3)]), parameters_like([(3, 3)])
    gradients = gradients_like([(3, 3)], 4)
    for some in (mine, peers):
        run(torch_made := torch.optim.AdamW(some), some, gradients[:2])
    state = copy.deepcopy(torch_made.state_dict())
    state["state"][0]["step"] = 2
    optimizer = AdamW(mine)
    optimizer.load_state_dict(state)
    run(optimizer, mine, gradients[2:])
    run(torch_made, peers, gradients[2:])
    torch.testing.assert_close(mine, peers)


FOREIGN = [
    (AdamW, torch.optim.AdamW, {"amsgrad": True}, "amsgrad: expected False, got True"),
    (AdamW, torch.optim.Adam, {"weight_decay": 0.1}, "decoupled_weight_decay: expected True"),
    (SGD, torch.optim.SGD, {"maximize": True}, "maximize: expected False, got True"),
    (SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}, "dampening: expected 0, got 0.1"),
]


@pytest.mark.parametrize(("ours", "theirs", "options", "message"), FOREIGN)
def test_states_of_other_algorithms_are_refused(ours, theirs, options, message):
    parameters = parameters_like([(3, 3)])
    state = theirs(parameters, lr=0.5, **options).state_dict()
    optimizer = ours(parameters, lr=0.25)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_adam_without_decay_is_adamw_without_decay():
    mine, peers = parameters_like([(3, 3)]), parameters_like([(3, 3)])
    gradients = gradients_like([(3, 3)], 6)
    peer = torch.optim.Adam(peers, lr=0.1)
    run(peer, peers, gradients[:3])
    optimizer = AdamW(mine, lr=0.1, weight_decay=0.0)
    run(optimizer, mine, gradients[:3])
    optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    run(optimizer, mine, gradients[3:])
    run(peer, peers, gradients[3:])
    torch.testing.assert_close(mine, peers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_optimizers_work_in_other_types(dtype):
    for kind in (SGD, AdamW, Muon):
        wide = parameters_like([(4, 6)], dtype=torch.float32)
        parameters = [nn.Parameter(p.detach().to(dtype)) for p in wide]
        for some in (parameters, wide):
            optimizer = kind(some, lr=0.1)
            run(optimizer, some, [[torch.ones(4, 6, dtype=some[0].dtype)]])
        assert parameters[0].dtype == dtype
        limit = 0.1 if dtype == torch.bfloat16 else 1e-5
        assert (parameters[0].double() - wide[0].double()).abs().max() < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SGD, {}),
        (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.3}),
        (AdamW, {"betas": (0.8, 0.9), "weight_decay": 0.3}),
    ],
)
def test_complex_parameters_are_stepped_as_by_torch(kind, options, backend):
    mine, peers = (parameters_like([(3, 4), (5,)], dtype=torch.complex128) for _ in range(2))
    theirs = getattr(torch.optim, kind.__name__)
    gradients = gradients_like([(3, 4), (5,)], 4, dtype=torch.complex128)
    run(kind(mine, lr=0.1, backend=backend, **options), mine, gradients)
    run(theirs(peers, lr=0.1, **options), peers, gradients)
    torch.testing.assert_close(mine, peers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [SGD, AdamW, partial(SGD, momentum=0.9)])
def test_parameters_without_numbers_are_stepped(kind, backend):
    """On the device "meta" steps have shapes only, and the number of steps is still counted."""
    parameters = [nn.Parameter(torch.empty(3, 4, device="meta"))]
    optimizer = kind(parameters, lr=0.1, backend=backend)
    run(optimizer, parameters, [[torch.empty(3, 4, device="meta")]] * 2)
    again = kind(parameters, lr=0.1, backend=backend)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(again, parameters, [[torch.empty(3, 4, device="meta")]])
    state = again.state[parameters[0]]
    assert all(value.is_meta for name, value in state.items() if name != "step")
    assert kind is not AdamW or state["step"] == 3


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", [SGD, AdamW, Muon])
def test_what_is_no_state_is_named(kind):
    optimizer = kind(parameters_like([(3, 3)]))
    for wrong, got in (({}, r"\[\]"), ({"model": 1}, r"\['model'\]"), ([1], "<class 'list'>")):
        with pytest.raises(
            ValueError, match=f"state_dict: expected one of an optimizer, got {got}"
        ):
            optimizer.load_state_dict(wrong)


@pytest.mark.parametrize("kind", [SGD, AdamW, Muon])
def test_defaults_are_those_of_torch(kind):
    theirs = getattr(torch.optim, kind.__name__, None)
    if theirs is None:
        pytest.skip("this torch has no such optimizer")
    pairs = (inspect.signature(made).parameters for made in (kind, theirs))
    mine, peers = ({name: p.default for name, p in pair.items()} for pair in pairs)
    own = {"backend": "torch", "ns_dtype": None}
    assert {n: v for n, v in mine.items() if n not in own} == {
        n: peers[n] for n in mine if n not in own
    }
    assert all(mine.get(name, value) == value for name, value in own.items())


# Orthogonalization


@pytest.mark.parametrize("shape", [(8, 8), (3, 20), (20, 3), (5, 4, 9), (2, 3, 9, 4)])
def test_singular_values_end_near_one_and_directions_stay(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    result = orthogonalize(matrix)
    assert result.shape == shape and result.dtype == matrix.dtype
    strengths = torch.linalg.svdvals(result)
    assert strengths.min() > 0.6 and strengths.max() < 1.25
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.mT @ result @ v.mT  # diagonal, if the directions are the same
    off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-8


def test_the_polynomial_acts_on_each_singular_value_alone():
    strengths = torch.tensor([0.8, 0.5, 0.1, 0.01, 0.001], dtype=torch.float64)
    expected = strengths / strengths.norm()
    for _ in range(4):
        expected = 3.4445 * expected - 4.775 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(orthogonalize(torch.diag(strengths), 4).diagonal(), expected)


def test_orthogonalize_edges():
    assert orthogonalize(torch.zeros(3, 4)).eq(0).all()
    matrix = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(1e6 * matrix), orthogonalize(matrix))
    torch.testing.assert_close(orthogonalize(matrix, 0), matrix / matrix.norm())
    with pytest.raises(ValueError, match="steps: expected a whole number of at least 0, got -1"):
        orthogonalize(matrix, -1)
    tiny_matrix = 1e-9 * matrix / matrix.norm()
    torch.testing.assert_close(orthogonalize(tiny_matrix, 0), tiny_matrix / 1e-7)
    torch.testing.assert_close(orthogonalize(tiny_matrix, 0, eps=1e-3), tiny_matrix / 1e-3)
    torch.testing.assert_close(orthogonalize(matrix), orthogonalize(matrix, 5))


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_orthogonalized_is_named():
    matrix = torch.ones(3, 4)
    for wrong, message in (
        ([[1.0]], "matrix: expected a tensor of floating-point numbers, got list"),
        (matrix.int(), "matrix: expected a tensor of floating-point numbers, got torch.int32"),
        (matrix[0], r"matrix: expected 2 or more dimensions, .* got shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            orthogonalize(wrong)
    for options, message in (
        ({"steps": None}, "steps: expected a whole number of at least 0, got None"),
        ({"steps": "5"}, "steps: expected a whole number .* got '5'"),
        ({"coefficients": (1.5, -0.5)}, r"coefficients: expected three finite numbers, got \(1.5"),
        ({"coefficients": None}, "coefficients: expected three finite numbers, got None"),
        ({"eps": -1.0}, "eps: expected a finite number of at least 0, got -1.0"),
        ({"eps": "1e-7"}, "eps: expected a finite number of at least 0, got '1e-7'"),
    ):
        with pytest.raises(ValueError, match=message):
            orthogonalize(matrix, **options)


def test_stacked_experts_are_treated_one_by_one():
    stacked, apart = parameters_like([(3, 4, 6)]), parameters_like([(3, 4, 6)])
    pieces = [nn.Parameter(piece.clone()) for piece in apart[0].detach()]
    for (grad,) in gradients_like([(3, 4, 6)], 5):
        run(stacked_muon := Muon(stacked, lr=0.1), stacked, [[grad]])
        run(Muon(pieces, lr=0.1), pieces, [list(grad)])
        assert stacked_muon.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(stacked[0].data, torch.stack([p.data for p in pieces]))


@pytest.mark.skipif(TORCH_MUON is None, reason="this torch has no Muon")
def test_muon_in_16_bits_is_torchs():
    starts, mine, peers = (parameters_like(MATRICES, dtype=torch.float32) for _ in range(3))
    gradients = gradients_like(MATRICES, 10, dtype=torch.float32)
    run(Muon(mine, lr=0.1, ns_dtype=torch.bfloat16), mine, gradients)
    run(TORCH_MUON(peers, lr=0.1), peers, gradients)
    for start, a, b in zip(starts, mine, peers, strict=True):
        assert (a - b).norm() < 0.1 * (b - start).norm()


def test_newton_schulz_takes_32_bits_on_a_processor():
    narrow, wide = parameters_like(MATRICES), parameters_like(MATRICES)
    gradients = gradients_like(MATRICES, 1)
    run(Muon(narrow, lr=1.0), narrow, gradients)
    run(Muon(wide, lr=1.0, ns_dtype=torch.float64), wide, gradients)
    for a, b in zip(narrow, wide, strict=True):
        assert 0 < (a - b).abs().max() < 1e-4, "32 bits, neither 64 nor 16"


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_updates_of_matched_muon_have_the_size_of_adams(scale):
    for shape in ((64, 64), (32, 96), (96, 32)):
        (parameter,) = parameters_like([shape])
        before = parameter.detach().clone()
        optimizer = Muon([parameter], 1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        run(optimizer, [parameter], [[scale * torch.randn(shape, dtype=torch.float64)]])
        assert 0.15 < (parameter - before).square().mean().sqrt() < 0.23


# Groups


def held(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


MODELS = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "gpt2": {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu"},
    "experts": {"n_experts": 4, "n_active_experts": 2, "qk_norm": True},
}


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_each_parameter_is_there_once_with_the_right_decay(changes, name):
    model = tiny_model(**changes)
    optimizer = build_optimizer(model, name, 1e-3, weight_decay=0.3)
    found = held(optimizer)
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            table = names[id(parameter)] in ("embedding.weight", "positions.weight")
            expected = 0.3 if parameter.ndim >= 2 and not table else 0.0
            assert group["weight_decay"] == expected, names[id(parameter)]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_muon_gets_the_matrices_of_blocks_and_nothing_else(changes):
    model = tiny_model(**changes)
    muon, adamw = build_optimizer(model, "muon", 0.02, adamw_lr=0.003).optimizers
    expected = {id(p) for p in model.blocks.parameters() if p.ndim >= 2}
    assert {id(p) for p in held(muon)} == expected
    assert {group["lr"] for group in muon.param_groups} == {0.02}
    assert {group["lr"] for group in adamw.param_groups} == {0.003}
    assert muon.param_groups[0]["momentum"] == 0.95
    assert muon.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"  # one rate for both


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    kept = {id(p) for p in model.parameters() if p.requires_grad}
    for name in ("adamw", "muon", "sgd"):
        assert {id(p) for p in held(build_optimizer(model, name, 0.1))} == kept
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model: expected a parameter that requires a gradient"):
        parameter_groups(model, 0.1)


@pytest.mark.usefixtures("untyped")
def test_bad_arguments_of_builders_are_named():
    with pytest.raises(ValueError, match="weight_decay: expected"):
        parameter_groups(tiny_model(), -0.1)
    with pytest.raises(ValueError, match="name: expected one of adamw, muon, sgd, got 'lion'"):
        build_optimizer(tiny_model(), "lion", 0.1)
    with pytest.raises(ValueError, match="model: expected blocks with matrices"):
        build_optimizer(nn.Linear(3, 3), "muon", 0.1)
    with pytest.raises(ValueError, match="lr: expected a finite number of at least 0, got nan"):
        build_optimizer(tiny_model(), "muon", math.nan)
    for wrong in ([1], None, "model", tiny_model().parameters()):
        with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module, got"):
            parameter_groups(wrong, 0.1)
        with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module, got"):
            build_optimizer(wrong, "adamw", 0.1)
    with pytest.raises(ValueError, match=r"weight_decay: expected a finite number.* got '0.1'"):
        parameter_groups(tiny_model(), "0.1")
    for name in ("adamw", "muon", "sgd"):
        for argument in ("lr", "adamw_lr", "weight_decay"):
            arguments = {"lr": 0.1, argument: "0.1"}
            with pytest.raises(ValueError, match=f"^{argument}: expected a finite .* got '0.1'"):
                build_optimizer(tiny_model(), name, **arguments)
    for name in ("adamw", "muon", "sgd"):
        with pytest.raises(ValueError, match=r"^momentum: expected at least 0 and less than 1"):
            build_optimizer(tiny_model(), name, 0.1, momentum="0.9")
    for optimizers, got in (((), "none"), ((5,), "int"), (([AdamW],), "list")):
        with pytest.raises(ValueError, match=f"optimizers: expected one or more.* got {got}"):
            Optimizers(*optimizers)


def test_defaults_of_the_builder():
    model = tiny_model()
    (first, second) = build_optimizer(model, "adamw", 0.5).param_groups
    assert (first["betas"], first["eps"], first["lr"]) == ((0.9, 0.95), 1e-8, 0.5)
    assert [first["weight_decay"], second["weight_decay"]] == [0.1, 0.0]
    sgd = build_optimizer(model, "sgd", 0.5)
    assert {(g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.9, False)}
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.1, 0.0]
    muon, adamw = build_optimizer(model, "muon", 0.5).optimizers
    assert [g["lr"] for g in (*muon.param_groups, *adamw.param_groups)] == [0.5] * 3
    assert (muon.param_groups[0]["momentum"], muon.param_groups[0]["weight_decay"]) == (0.95, 0.1)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    chosen = build_optimizer(
        model, "muon", 0.5, momentum=0.8, betas=(0.1, 0.2), backend="reference"
    )
    assert chosen.optimizers[0].param_groups[0]["momentum"] == 0.8
    assert chosen.optimizers[1].param_groups[0]["betas"] == (0.1, 0.2)
    assert chosen.optimizers[1].backend == "reference"
    assert build_optimizer(model, "sgd", 0.5, momentum=0.0).param_groups[0]["momentum"] == 0.0


def trained(model, optimizer, n_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        ids = torch.randint(40, (4, 17), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()


def test_two_optimizers_are_saved_loaded_and_scheduled_as_one():
    model = tiny_model()
    copied = copy.deepcopy(model)
    optimizer = build_optimizer(model, "muon", 0.02)
    trained(model, optimizer, 3)
    other = build_optimizer(copied, "muon", 0.5)
    copied.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.02] * len(other.param_groups)
    scheduler = LambdaLR(other, linear_schedule(4))
    other.step()  # nothing has a gradient yet
    scheduler.step()
    rates = [group["lr"] for part in other.optimizers for group in part.param_groups]
    assert rates == [0.015] * len(rates)
    for group in optimizer.param_groups:
        group["lr"] = 0.015
    trained(model, optimizer, 3, seed=1)
    trained(copied, other, 3, seed=1)
    for a, b in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="state_dict: expected 2 optimizers, got 0"):
        other.load_state_dict(AdamW(model.parameters()).state_dict())


def test_a_group_that_nobody_would_step_is_refused():
    first, second = parameters_like([(3, 3), (2, 2)])
    both = Optimizers(SGD([first], 0.1))
    with pytest.raises(ValueError, match="param_group: expected a group of one of the optimizers"):
        both.add_param_group({"params": [second]})
    assert len(both.param_groups) == 1
    both.optimizers[0].add_param_group({"params": [second], "lr": 0.2})
    both.add_param_group(both.optimizers[0].param_groups[1])
    before = second.detach().clone()
    run(both, [first, second], gradients_like([(3, 3), (2, 2)], 1))
    assert not torch.equal(before, second) and both.param_groups[1]["lr"] == 0.2
    both.zero_grad()
    assert second.grad is None


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_each_optimizer_learns(name):
    model, ids = tiny_model(), torch.randint(40, (4, 17))
    optimizer = build_optimizer(model, name, 0.3 if name == "sgd" else 0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Schedules

SCHEDULES = {
    "cosine": lambda n, warmup: cosine_schedule(n, warmup=warmup, final=0.1),
    "linear": lambda n, warmup: linear_schedule(n, warmup=warmup, final=0.1),
    "wsd": lambda n, warmup: wsd_schedule(n, warmup=warmup, final=0.1),
    "wsd-sqrt": lambda n, warmup: wsd_schedule(n, warmup=warmup, final=0.1, shape="sqrt"),
    "constant": lambda n, warmup: constant_schedule(warmup=warmup),
}


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 60), st.data())
def test_schedules_rise_fall_and_stay(name, n_steps, data):
    warmup = data.draw(st.integers(0, n_steps - 1))
    factors = [SCHEDULES[name](n_steps, warmup)(step) for step in range(n_steps + 20)]
    assert factors[0] > 0 and factors[warmup] == 1
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[0] == pytest.approx(1 / (warmup + 1))
    if name != "constant":
        decays = not name.startswith("wsd") or min(n_steps // 5, n_steps - warmup)
        end = 0.1 if decays else 1.0
        assert factors[n_steps:] == pytest.approx([end] * 20)
        assert factors[n_steps - 1] >= end


def test_known_points_of_schedules():
    cosine = cosine_schedule(110, warmup=10, final=0.0)
    expected = [0.5 * (1 + math.cos(math.pi * (step - 10) / 100)) for step in range(10, 110)]
    assert [cosine(step) for step in range(10, 110)] == pytest.approx(expected)
    wsd = wsd_schedule(100, warmup=4, decay=10)
    assert [wsd(step) for step in (0, 4, 50, 90, 95, 99, 100, 500)] == pytest.approx(
        [0.2, 1, 1, 1, 0.5, 0.1, 0, 0]
    )
    assert wsd_schedule(100, decay=16, shape="sqrt")(88) == pytest.approx(0.5)
    assert wsd_schedule(100, decay=0)(1000) == 1.0


def test_defaults_of_schedules():
    assert [constant_schedule()(step) for step in (0, 9)] == [1.0, 1.0]
    for n_steps in (10, 100):
        assert cosine_schedule(n_steps)(0) == linear_schedule(n_steps)(0) == 1.0
        assert cosine_schedule(n_steps)(n_steps) == pytest.approx(0.1)
        assert linear_schedule(n_steps)(n_steps) == 0.0
        wsd = [wsd_schedule(n_steps)(step) for step in range(n_steps + 1)]
        last = n_steps - n_steps // 5
        assert wsd[: last + 1] == [1.0] * (last + 1) and wsd[last + 1] < 1.0
        line = [1 - step / (n_steps // 5) for step in range(n_steps // 5 + 1)]
        assert wsd[last:] == pytest.approx(line), "linear, to 0"
    crowded = [wsd_schedule(10, warmup=9)(step) for step in (9, 10)]
    assert crowded == [1.0, 0.0], "of a fifth only what the warmup leaves"


def test_schedules_fit_torchs():
    optimizer = AdamW(parameters_like([(2, 2)]), lr=0.5)
    schedule = cosine_schedule(10, warmup=2)
    scheduler = LambdaLR(optimizer, schedule)
    for step in range(12):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * schedule(step))
        optimizer.step()
        scheduler.step()


BAD_SCHEDULES = [
    (lambda: cosine_schedule(0), "n_steps: expected a whole number of at least 1, got 0"),
    (lambda: cosine_schedule(5, warmup=6), "warmup: expected warmup"),
    (
        lambda: linear_schedule(5, warmup=-1),
        "warmup: expected a whole number of at least 0, got -1",
    ),
    (lambda: cosine_schedule(5, final=1.5), "final: expected a share from 0 to 1, got 1.5"),
    (lambda: linear_schedule(5, final=math.nan), "final: expected"),
    (lambda: wsd_schedule(10, warmup=6, decay=5), "within n_steps = 10, got 6 and 5"),
    (lambda: wsd_schedule(10, shape="cubic"), "shape: expected one of linear, cosine, sqrt"),
    (lambda: wsd_schedule(10, warmup=11), "warmup"),
    (lambda: constant_schedule(warmup=-1), "warmup: expected a whole number of at least 0, got -1"),
    (lambda: constant_schedule(warmup=None), "warmup: expected a whole number .* got None"),
    (lambda: cosine_schedule(None), "n_steps: expected a whole number of at least 1, got None"),
    (lambda: wsd_schedule("10"), "n_steps: expected a whole number .* got '10'"),
    (lambda: wsd_schedule(None), "n_steps: expected a whole number of at least 1, got None"),
    (lambda: linear_schedule(10.0), "n_steps: expected a whole number .* got 10.0"),
    (lambda: wsd_schedule(10, decay=-1), "decay: expected a whole number of at least 0, got -1"),
    (lambda: wsd_schedule(10, decay=2.5), "decay: expected a whole number .* got 2.5"),
    (lambda: wsd_schedule(10, warmup=None), "warmup: expected a whole number .* got None"),
    (lambda: cosine_schedule(5, final="0.1"), "final: expected a share from 0 to 1, got '0.1'"),
    (lambda: wsd_schedule(5, final=None), "final: expected a share from 0 to 1, got None"),
    (lambda: wsd_schedule(10, shape=None), "shape: expected one of linear, cosine, sqrt"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("make", "message"), BAD_SCHEDULES)
def test_bad_arguments_of_schedules_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Clipping


def with_gradients(*gradients):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
@settings(max_examples=40)
def test_clipping_is_torchs(seed, size, max_norm):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (7,), (2, 2, 2)]
    gradients = [size * torch.randn(s, generator=generator).double() for s in shapes]
    mine, theirs = with_gradients(*gradients), with_gradients(*gradients)
    places = [parameter.grad.data_ptr() for parameter in mine]
    norm = clip_gradients(mine, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b, place in zip(mine, theirs, places, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad.data_ptr() == place, "in place"


def test_clipping_bounds_the_norm_and_keeps_small_gradients_as_they_are():
    large, small = with_gradients(torch.full((4,), 5.0)), with_gradients(torch.full((4,), 0.5))
    assert clip_gradients(large, 2.0) == 10.0 and large[0].grad.norm() <= 2.0
    assert clip_gradients(small, 2.0) == 1.0 and small[0].grad.tolist() == [0.5] * 4


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_leaves_gradients_alone(bad):
    parameters = with_gradients(torch.tensor([1.0, bad]), torch.tensor([300.0]))
    assert not clip_gradients(parameters, 1.0).isfinite()
    assert parameters[0].grad[0] == 1.0 and parameters[1].grad == 300.0


def test_the_norm_of_16_bits_does_not_overflow():
    (parameter,) = with_gradients(torch.full((4,), 6e4, dtype=torch.float16))
    assert clip_gradients([parameter], 1.0).item() == pytest.approx(120_000, rel=1e-3)
    assert parameter.grad.tolist() == pytest.approx([0.5] * 4, rel=1e-2)


def test_clipping_takes_types_together_a_single_tensor_and_nothing():
    mixed = with_gradients(torch.full((16,), 3.0), torch.full((4,), 8.0).bfloat16())
    norm = clip_gradients(iter(mixed), 1.0)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(20.0, rel=1e-5)
    assert mixed[1].grad.dtype == torch.bfloat16
    assert mixed[0].grad[0].item() == pytest.approx(0.15, rel=1e-5)
    assert clip_gradients(with_gradients(torch.ones(4))[0], math.inf) == 2.0
    assert clip_gradients([nn.Parameter(torch.ones(3))], 1.0) == 0.0
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm: expected a number above 0"):
            clip_gradients(mixed, wrong)


def test_parameters_that_were_read_before_are_refused():
    (parameter,) = with_gradients(torch.full((4,), 5.0))
    once = iter([parameter])
    assert clip_gradients(once, 2.0) == 10.0
    for spent in (once, (p for p in ())):
        with pytest.raises(ValueError, match=r"^parameters: expected at least .* only once\)"):
            clip_gradients(spent, 2.0)
    with pytest.raises(
        ValueError, match=r"^parameters: expected at least one parameter, got none$"
    ):
        clip_gradients([], 2.0)


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_clipped_is_named():
    parameters = with_gradients(torch.full((4,), 5.0))
    for wrong in ("1.0", None, True, -math.inf, torch.ones(2)):
        with pytest.raises(ValueError, match="max_norm: expected a number above 0, got"):
            clip_gradients(parameters, wrong)
    for wrong, got in (
        (None, "got NoneType"),
        (3, "got int"),
        ("weights", "got str"),
        ([3], "got one of type int"),
        (nn.Linear(2, 2), r"got a Linear; say model.parameters\(\)"),
    ):
        with pytest.raises(ValueError, match=f"parameters: expected .*tensors, {got}"):
            clip_gradients(wrong, 1.0)
    assert parameters[0].grad.tolist() == [5.0] * 4
    assert clip_gradients(parameters, np.float32(1.0)) == 10.0
    assert clip_gradients(parameters, torch.tensor(0.5)) == pytest.approx(1.0, rel=1e-5)


def test_complex_gradients_are_clipped():
    (parameter,) = with_gradients(torch.full((4,), 3 + 4j))
    assert clip_gradients([parameter], 1.0) == pytest.approx(10.0, rel=1e-5)
    assert parameter.grad.norm() == pytest.approx(1.0, rel=1e-5)
