"""Norms, feed-forward networks, mixtures of experts and blocks of chapter 10, held against torch
and transformers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from llmbook.blocks import (
    FeedForward,
    LayerNorm,
    MixtureOfExperts,
    RMSNorm,
    TransformerBlock,
    initialize_weights,
)


class Averaging(nn.Module):
    """Stands for attention: each token gets the mean of those so far."""

    def forward(self, x: Tensor, *, rope=None, mask=None, cache=None) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.size(1) + 1)[:, None]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_norms_equal_torch(backend):
    x = torch.randn(2, 5, 16, requires_grad=True)
    for ours, theirs in (
        (RMSNorm(16, backend=backend), nn.RMSNorm(16, eps=1e-5)),
        (LayerNorm(16, backend=backend), nn.LayerNorm(16)),
    ):
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_()
        theirs.load_state_dict(ours.state_dict())
        g = torch.randn(2, 5, 16)
        got = torch.autograd.grad(ours(x), [x, *ours.parameters()], g)
        want = torch.autograd.grad(theirs(x), [x, *theirs.parameters()], g)
        torch.testing.assert_close(ours(x), theirs(x))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_block_runs():
    for position in ("pre", "post"):
        block = TransformerBlock(16, Averaging(), FeedForward(16), norm_position=position)
        assert block(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_mixture_runs_and_copies():
    moe = MixtureOfExperts(16, 24, 4, 2, d_shared=8, capacity_factor=1.0)
    moe(torch.randn(2, 5, 16)).sum().backward()
    copy.deepcopy(moe)
    assert abs(moe.load.sum().item() - 2) < 1e-5
    assert moe.balance_loss > 0
    initialize_weights(moe, 3)
