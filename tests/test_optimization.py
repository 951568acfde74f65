"""Losses, optimizers, schedules and clipping of chapter 12, against PyTorch."""

import copy
import math

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

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


# Log-sum-exp and cross-entropy


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20))
def test_log_sum_exp_is_torchs_and_finite(logits):
    ours = log_sum_exp(torch.tensor(logits))
    assert ours.isfinite()
    torch.testing.assert_close(ours, torch.tensor(logits).logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_sum_exp_is_computed_in_32_bits_or_more(dtype):
    logits = (30 * torch.randn(5, 300)).to(dtype)
    ours = log_sum_exp(logits)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(ours, logits.to(ours.dtype).logsumexp(-1))


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


# Optimizers


def run(optimizer, parameters, gradients):
    for grads in gradients:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = None if grad is None else grad.clone()
        optimizer.step()


def parameters_like(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients_like(shapes, n_steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(n_steps)]


MATRICES = [(4, 6), (6, 4), (5, 5), (4, 6)]
PAIRS = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.3}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3}),
    "muon": (Muon, torch.optim.Muon, {"lr": 0.1, "weight_decay": 0.3}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_step_is_torchs(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self)  # torch's Muon in 32 bits
    ours_class, theirs_class, settings = PAIRS[name]
    mine, theirs = parameters_like(MATRICES), parameters_like(MATRICES)
    ours, peer = ours_class(mine, **settings), theirs_class(theirs, **settings)
    for grads in gradients_like(MATRICES, 20):
        run(ours, mine, [grads])
        run(peer, theirs, [grads])
        torch.testing.assert_close(mine, theirs)
