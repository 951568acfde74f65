"""Tests of ``llmbook.dpo``: the losses, held against trl's, and what is true of each."""

from __future__ import annotations

import math

import pytest
import torch
import trl_losses
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmbook.dpo import (
    LOSSES,
    OF_MEANS,
    PAIR_LOSSES,
    WITHOUT_REFERENCE,
    check_options,
    dpo_loss,
    implicit_rewards,
    kto_loss,
    log_odds,
)
from llmbook.rlhf import bradley_terry_loss, sequence_log_probs

LENGTHS = torch.tensor([3, 5, 7, 2, 4, 6])  # three chosen replies, then three rejected ones
MASK = torch.arange(7) < LENGTHS[:, None]
CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED = torch.tensor(
    [[-3.0, -0.5, -20.0], [-2.0, -8.0, -0.1], [-2.5, -2.0, -4.0], [-2.5, -3.0, -6.0]],
    dtype=torch.float64,
)
PAIRS = (CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)
numbers = st.floats(-50, -0.01)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each token by a policy, which has a gradient, and by a reference."""
    generator = torch.Generator().manual_seed(seed)
    both = -3 * torch.rand(2, *MASK.shape, dtype=torch.float64, generator=generator) * MASK
    return both[0].requires_grad_(), both[1]


def halves(values: Tensor, mean: bool) -> tuple[Tensor, ...]:
    return sequence_log_probs(values, MASK, mean=mean).chunk(2)


def assert_same(ours: Tensor, theirs: Tensor, policy: Tensor, tolerance: float = 1e-12) -> None:
    """The same values, and the same gradient of each token."""
    sides = (torch.autograd.grad(one, policy, retain_graph=True)[0] for one in (ours, theirs))
    found, expected = sides
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# The same values and gradients as trl's trainers


@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize(
    ("loss", "theirs", "smoothing", "mean"),
    [
        ("sigmoid", "sigmoid", 0.0, False),
        ("sigmoid", "sigmoid_norm", 0.0, True),
        ("robust", "robust", 0.2, False),
        ("robust", "robust", 0.0, False),
        ("ipo", "ipo", 0.0, True),
        ("hinge", "hinge", 0.0, False),
        ("apo_zero", "apo_zero", 0.0, False),
        ("apo_down", "apo_down", 0.0, False),
    ],
)
def test_losses_are_those_of_trl(loss, theirs, smoothing, mean, beta):
    policy, reference = drawn()
    known = *halves(policy, mean), *halves(reference, mean)
    ours = dpo_loss(*known, beta=beta, loss=loss, label_smoothing=smoothing).mean()
    expected = trl_losses.dpo(policy * MASK, reference, MASK, theirs, beta, smoothing)
    assert_same(ours, expected, policy)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize("others", [0.7, -0.7])
@pytest.mark.parametrize("n_chosen", [3, 0, 1, 6])  # batches of any mixture: trl#1911
def test_kto_is_that_of_trl(n_chosen, others, weights):
    policy, reference = drawn()
    label = torch.arange(6) < n_chosen
    away, reference_away = torch.full((6,), others), torch.zeros(6)
    ours = kto_loss(
        sequence_log_probs(policy, MASK),
        sequence_log_probs(reference, MASK),
        label,
        (away - reference_away).mean(),
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    ).mean()
    known = (policy * MASK, reference, MASK, label, away, reference_away)
    expected = trl_losses.kto(*known, 0.3, weights)
    assert_same(ours, expected, policy, 1e-7)


def test_orpo_is_that_of_trl():
    policy = drawn()[0]
    chosen, rejected = halves(policy, True)
    ours = dpo_loss(chosen, rejected, beta=0.25, loss="orpo")
    expected = -trl_losses.orpo(chosen, rejected, 0.25)
    assert_same(ours.mean(), expected.double().mean(), policy, 1e-6)  # trl computes in float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trl(smoothing):
    policy = drawn()[0]
    chosen, rejected = halves(policy, True)
    options = {"beta": 2.0, "margin": 0.5, "label_smoothing": smoothing}
    ours = dpo_loss(chosen, rejected, loss="simpo", **options)
    expected = trl_losses.simpo(chosen, rejected, 2.0, 0.5, smoothing)
    assert_same(ours.mean(), expected.mean(), policy)


# What is true of them


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("robust", math.log(2)),
        ("ipo", 25.0),  # (1 / (2 * 0.1)) squared
        ("hinge", 1.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
    ],
)
def test_where_a_run_begins(loss, expected):
    found = dpo_loss(CHOSEN, REJECTED, CHOSEN, REJECTED, loss=loss)
    torch.testing.assert_close(found, torch.full_like(found, expected))


def test_kto_begins_at_one_half():
    desirable = torch.tensor([True, False, True])
    found = kto_loss(CHOSEN, CHOSEN, desirable, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(found, torch.full_like(found, 0.5))


@given(*[st.lists(numbers, min_size=3, max_size=3)] * 2, st.floats(-30, 30))
def test_a_constant_of_a_prompt_cancels(a, b, shift):
    """The partition function, or a longer prompt that both replies share."""
    chosen, rejected = torch.tensor([a, b], dtype=torch.float64)
    for loss in ("sigmoid", "robust", "ipo", "hinge"):
        before = dpo_loss(chosen, rejected, CHOSEN, REJECTED, loss=loss)
        after = dpo_loss(chosen + shift, rejected + shift, CHOSEN, REJECTED, loss=loss)
        torch.testing.assert_close(after, before)


def test_apo_and_kto_see_such_a_constant():
    before = dpo_loss(*PAIRS, loss="apo_zero")
    after = dpo_loss(CHOSEN + 1, REJECTED + 1, *PAIRS[2:], loss="apo_zero")
    assert (before - after).abs().min() > 1e-5


def test_it_is_bradley_terry_on_implicit_rewards():
    rewards = [implicit_rewards(a, b, beta=0.4) for a, b in zip(PAIRS[:2], PAIRS[2:], strict=True)]
    torch.testing.assert_close(dpo_loss(*PAIRS, beta=0.4), bradley_terry_loss(*rewards))


def test_the_gradient_term_by_term():
    """Beta, times how wrong the implicit rewards are, up for the chosen, down for the rejected."""
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    dpo_loss(chosen, rejected, *PAIRS[2:], beta=0.3).sum().backward()
    margin = (CHOSEN - REFERENCE_CHOSEN) - (REJECTED - REFERENCE_REJECTED)
    weight = 0.3 * torch.sigmoid(-0.3 * margin)
    torch.testing.assert_close(chosen.grad, -weight)
    torch.testing.assert_close(rejected.grad, weight)


def test_conservative_labels_by_hand():
    x = 0.1 * ((CHOSEN - REFERENCE_CHOSEN) - (REJECTED - REFERENCE_REJECTED))
    expected = 0.8 * torch.log1p(torch.exp(-x)) + 0.2 * torch.log1p(torch.exp(x))
    torch.testing.assert_close(dpo_loss(*PAIRS, label_smoothing=0.2), expected)


def test_conservative_labels_have_a_least_loss_at_a_finite_margin():
    margin = torch.linspace(-10, 30, 4001, dtype=torch.float64)
    zeros = torch.zeros_like(margin)
    options = {"beta": 0.5, "label_smoothing": 0.1}
    best = margin[dpo_loss(margin, zeros, zeros, zeros, **options).argmin()]
    assert abs(float(best) - math.log(0.9 / 0.1) / 0.5) < 0.02
    robust = dpo_loss(margin, zeros, zeros, zeros, loss="robust", **options)
    assert robust.argmin() == len(margin) - 1, "unbiased: more is always better, as without noise"


def test_the_robust_loss_is_unbiased():
    """Over labels that are wrong with the share it expects, it is the loss of the right ones."""
    swapped = (REJECTED, CHOSEN, REFERENCE_REJECTED, REFERENCE_CHOSEN)
    options = {"loss": "robust", "label_smoothing": 0.3}
    mean = 0.7 * dpo_loss(*PAIRS, **options) + 0.3 * dpo_loss(*swapped, **options)
    torch.testing.assert_close(mean, dpo_loss(*PAIRS))


def test_ipo_is_content_at_its_margin_and_hinge_beyond_its_own():
    zeros = torch.zeros(3, dtype=torch.float64)
    margin = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, zeros, zeros, zeros, loss="ipo").sum().backward()
    assert margin.grad.sign().tolist() == [-1, 0, 1]
    margin = torch.tensor([9.0, 10.5, 12.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, zeros, zeros, zeros, loss="hinge").sum().backward()
    assert margin.grad.sign().tolist() == [-1, 0, 0]


@pytest.mark.parametrize("loss", WITHOUT_REFERENCE)
def test_losses_without_a_reference_ignore_one(loss):
    chosen, rejected = CHOSEN / 10, REJECTED / 10
    found = dpo_loss(chosen, rejected, *PAIRS[2:], loss=loss)
    assert torch.equal(found, dpo_loss(chosen, rejected, loss=loss))


@pytest.mark.parametrize("loss", sorted(set(PAIR_LOSSES) - set(WITHOUT_REFERENCE)))
def test_the_others_need_one(loss):
    with pytest.raises(ValueError, match=f"reference_chosen: expected .* for '{loss}', got None"):
        dpo_loss(CHOSEN, REJECTED, loss=loss)
    with pytest.raises(ValueError, match="reference"):
        dpo_loss(CHOSEN, REJECTED, CHOSEN, loss=loss)


def test_log_odds_by_hand_and_at_the_ends():
    p = torch.tensor([0.1, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()).exp(), p / (1 - p))
    for dtype in (torch.float32, torch.float64):
        certain = torch.tensor([0.0, -1e-9, -200.0], dtype=dtype, requires_grad=True)
        found = log_odds(certain)
        found.sum().backward()
        assert found.isfinite().all() and certain.grad.isfinite().all()  # trl#4763
        assert found[0] > 10 and abs(found[2].item() + 200) < 1e-3


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_extremes_are_finite(loss):
    far = torch.tensor([-1e4, -1e-7, 0.0, -800.0], requires_grad=True)
    away = torch.tensor([-1e-7, -1e4, -1e4, -800.0], requires_grad=True)
    found = dpo_loss(far, away, torch.zeros(4), torch.zeros(4), loss=loss)
    found.sum().backward()
    assert found.isfinite().all() and far.grad.isfinite().all() and away.grad.isfinite().all()


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_the_rejected_reply_is_pushed_down_and_the_chosen_up_but_for_apo_down(loss):
    chosen, rejected = (x.clone().requires_grad_() for x in (CHOSEN / 10, REJECTED / 10))
    dpo_loss(chosen, rejected, *PAIRS[2:], loss=loss).sum().backward()
    assert (rejected.grad > 0).all()
    assert ((chosen.grad if loss == "apo_down" else -chosen.grad) > 0).any()


def test_kto_has_no_gradient_through_its_kl_and_no_negative_one():
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    policy = CHOSEN.clone().requires_grad_()
    desirable = torch.tensor([True, False, True])
    kto_loss(policy, REFERENCE_CHOSEN, desirable, kl).sum().backward()
    assert kl.grad is None and policy.grad.sign().tolist() == [-1, 1, -1]
    below = kto_loss(CHOSEN, REFERENCE_CHOSEN, desirable, torch.tensor(-3.0))
    torch.testing.assert_close(
        below, kto_loss(CHOSEN, REFERENCE_CHOSEN, desirable, torch.tensor(0.0))
    )


def test_apo_zero_is_kto_without_a_kl():
    both = torch.cat([CHOSEN, REJECTED]), torch.cat([REFERENCE_CHOSEN, REFERENCE_REJECTED])
    desirable = torch.arange(6) < 3
    single = kto_loss(*both, desirable, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(single.view(2, 3).sum(0), dpo_loss(*PAIRS, loss="apo_zero"))


def test_names():
    assert set(OF_MEANS) | set(WITHOUT_REFERENCE) <= set(PAIR_LOSSES)
    assert set(LOSSES) == {*PAIR_LOSSES, "kto"}


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta: expected .*, got 0"),
        ({"beta": -0.1}, "beta: expected .*, got -0.1"),
        ({"beta": math.nan}, "beta: expected .*, got nan"),
        ({"beta": math.inf}, "beta: expected .*, got inf"),
        ({"loss": "dpo"}, "loss: expected .*sigmoid.*, got 'dpo'"),
        ({"loss": "kto"}, "loss: expected .*, got 'kto'"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected less than 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected .*, got -0.1"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing: expected .* for ipo"),
        ({"margin": 0.5}, "margin: expected 0, or the loss simpo, got 0.5 for sigmoid"),
        ({"loss": "simpo", "margin": -0.5}, "margin: expected .*, got -0.5"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        dpo_loss(*PAIRS, **options)
    known = {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "margin": 0.0}
    with pytest.raises(ValueError, match=rf"^{message}"):
        check_options(**(known | options))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_elsewhere(beta):
    with pytest.raises(ValueError, match=r"^beta: expected"):
        implicit_rewards(CHOSEN, REJECTED, beta=beta)
    with pytest.raises(ValueError, match=r"^beta: expected"):
        kto_loss(CHOSEN, REJECTED, torch.tensor([True] * 3), torch.tensor(0.0), beta=beta)
