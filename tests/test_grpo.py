"""Tests of ``llmbook.grpo``: the losses, held against trl's, and what is true of each."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import trl_grpo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmbook.grpo import (
    VARIANTS,
    Variant,
    group_advantages,
    grpo_loss,
    grpo_terms,
    importance_weights,
    informative,
    kl_penalty,
    log_ratios,
    policy_gradient_loss,
)
from llmbook.rlhf import on_tokens

LENGTHS = torch.tensor([3, 5, 7, 1])
MASK = torch.arange(7) < LENGTHS[:, None]
ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, -0.9], dtype=torch.float64)
LONGEST = 24


def drawn(seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities by a policy, which has a gradient, by an older one and a reference."""
    generator = torch.Generator().manual_seed(seed)
    base = -3 * torch.rand(MASK.shape, dtype=torch.float64, generator=generator)
    shifts = spread * torch.randn(2, *MASK.shape, dtype=torch.float64, generator=generator)
    return base.requires_grad_(), base.detach() + shifts[0], base.detach() + shifts[1]


def assert_same(ours: Tensor, theirs: Tensor, policy: Tensor) -> None:
    """The same values, and the same gradient of each token."""
    sides = (torch.autograd.grad(one, policy, retain_graph=True)[0] for one in (ours, theirs))
    found, expected = sides
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected[MASK].any()


# The same values and gradients as trl's trainer

#: What trl calls each variant. Its cispo bounds the weights at ``epsilon_high`` itself.
NAMES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "longest": LONGEST},
    "dapo": {"loss_type": "dapo", "clip": (0.2, 0.28)},
    "gspo": {"loss_type": "grpo", "level": "sequence", "clip": (3e-4, 4e-4)},
    "cispo": {"loss_type": "cispo", "clip": (0.2, 5.0)},
}


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.2, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_losses_of_trl(name: str, spread: float, kl_weight: float) -> None:
    policy, old, reference = drawn(spread=spread)
    ours = grpo_loss(
        policy,
        old,
        on_tokens(ADVANTAGES, MASK),
        MASK,
        variant=replace(VARIANTS[name], per=LONGEST) if name == "dr_grpo" else VARIANTS[name],
        reference=reference,
        kl_weight=kl_weight,
    )
    options = {"reference": reference, "kl_weight": kl_weight} | NAMES[name]
    assert_same(ours, trl_grpo.grpo(policy, old, ADVANTAGES, MASK, **options), policy)


def test_per_token_is_what_trl_calls_bnpo() -> None:
    policy, old, _ = drawn(spread=0.3)
    ours = grpo_loss(policy, old, on_tokens(ADVANTAGES, MASK), MASK, variant=Variant(per="token"))
    theirs = trl_grpo.grpo(policy, old, ADVANTAGES, MASK, loss_type="bnpo")
    assert_same(ours, theirs, policy)


def test_clips_of_every_width_are_those_of_trl() -> None:
    for seed, low, high in itertools.product(range(3), (0.05, 0.9), (0.05, 3.0)):
        policy, old, _ = drawn(seed)
        variant = Variant(clip=(low, high))
        ours = grpo_loss(policy, old, on_tokens(ADVANTAGES, MASK), MASK, variant=variant)
        theirs = trl_grpo.grpo(policy, old, ADVANTAGES, MASK, clip=(low, high))
        assert_same(ours, theirs, policy)


@pytest.mark.parametrize("name", ["grpo", "dapo", "cispo"])
def test_weights_for_another_engine_are_those_of_trl(name: str) -> None:
    policy, old, behavior = drawn(spread=0.5)
    weights = importance_weights(old, behavior, MASK, most=2.0)
    ours = grpo_loss(
        policy, old, on_tokens(ADVANTAGES, MASK) * weights, MASK, variant=VARIANTS[name]
    )
    theirs = trl_grpo.grpo(policy, old, ADVANTAGES, MASK, weights=weights, **NAMES[name])
    assert_same(ours, theirs, policy)


def test_group_advantages_are_those_of_trl_up_to_its_larger_constant() -> None:
    rewards = torch.rand(5, 8, dtype=torch.float64)
    centered = rewards - rewards.mean(1, keepdim=True)
    theirs = centered / (rewards.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards), theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(group_advantages(rewards, scale="none"), centered)


# Advantages


def test_one_right_reply_of_four() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    found = group_advantages(rewards)
    torch.testing.assert_close(found, torch.tensor([[1.5, -0.5, -0.5, -0.5]]))
    found = group_advantages(rewards, scale="none")
    torch.testing.assert_close(found, torch.tensor([[0.75, -0.25, -0.25, -0.25]]))
    found = group_advantages(rewards, scale="none", baseline="leave_one_out")
    torch.testing.assert_close(found, torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e9, 1 / 3])
def test_equal_rewards_teach_nothing(scale: Any, baseline: Any, value: float) -> None:
    rewards = torch.full((2, 7), value)
    found = group_advantages(rewards, scale=scale, baseline=baseline)
    assert torch.equal(found, torch.zeros(2, 7))
    assert not informative(rewards).any()


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.tensor([[0.0, 1.0], [5.0, 5.0], [2.0, 9.0]])
    both = group_advantages(rewards)
    for row in range(3):
        torch.testing.assert_close(both[row : row + 1], group_advantages(rewards[row : row + 1]))
    assert informative(rewards).tolist() == [True, False, True]


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=9),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_advantages_sum_to_zero_and_ignore_offset_and_scale(
    rewards: list[float], factor: float, offset: float
) -> None:
    group = torch.tensor([rewards], dtype=torch.float64)
    found = group_advantages(group)
    assert abs(float(found.sum())) < 1e-9
    changed = group_advantages(factor * group + offset)
    if informative(group).all():
        torch.testing.assert_close(changed, found, rtol=1e-4, atol=1e-4)


def test_the_deviation_makes_rare_successes_count_most() -> None:
    """Of 8 replies, the sum of sizes is largest at a half, but one alone has the largest one."""
    sizes = []
    for n_right in range(1, 8):
        rewards = torch.tensor([[1.0] * n_right + [0.0] * (8 - n_right)])
        sizes.append(float(group_advantages(rewards)[0, 0]))
    assert sizes == sorted(sizes, reverse=True)
    assert math.isclose(sizes[0], 7 / 8 / math.sqrt(1 / 8), rel_tol=1e-4)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rewards: expected at least 2 for each prompt, got 1"):
        group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="rewards: expected finite numbers"):
        group_advantages(torch.tensor([[0.0, value]]))


def test_leaving_one_out_is_unbiased_and_the_mean_shrinks() -> None:
    """Exact, over all groups of two draws from a policy with three replies."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.2], dtype=torch.float64)
    probabilities = logits.softmax(0)
    (truth,) = torch.autograd.grad((probabilities * reward).sum(), logits, retain_graph=True)
    for baseline, share in (("leave_one_out", 1.0), ("mean", 0.5)):
        total = torch.zeros((), dtype=torch.float64)
        for first, second in itertools.product(range(3), repeat=2):
            pair = torch.tensor([first, second])
            advantages = group_advantages(
                reward[pair][None],
                scale="none",
                baseline=baseline,  # type: ignore[arg-type]
            )
            log_probs = logits.log_softmax(0)[pair][:, None]
            loss = policy_gradient_loss(
                log_probs, advantages.T, torch.ones(2, 1, dtype=torch.bool), per=1
            )
            total = total - probabilities[pair].prod().detach() * loss
        (found,) = torch.autograd.grad(total, logits, retain_graph=True)
        torch.testing.assert_close(found, share * truth)


# Losses


def test_the_first_step_has_the_plain_gradient() -> None:
    """Where nothing has changed, each clipped variant has the policy gradient of its division."""
    policy, _, _ = drawn()
    advantages = on_tokens(ADVANTAGES, MASK)
    for name, variant in VARIANTS.items():
        if variant.level == "sequence":
            continue
        ours = grpo_loss(policy, policy.detach(), advantages, MASK, variant=variant)
        plain = policy_gradient_loss(policy, advantages, MASK, per=variant.per)
        (found,) = torch.autograd.grad(ours, policy)
        (expected,) = torch.autograd.grad(plain, policy)
        torch.testing.assert_close(found, expected, msg=name)


def test_one_ratio_for_a_response() -> None:
    new = torch.tensor([[-1.0, -2.0, -9.0]])
    old = torch.tensor([[-1.5, -1.0, 3.0]])
    mask = torch.tensor([[True, True, False]])
    found = log_ratios(new, old, mask, level="sequence")
    torch.testing.assert_close(found, torch.tensor([[-0.25, -0.25, 0.0]]))
    found = log_ratios(new, old, mask)
    torch.testing.assert_close(found, torch.tensor([[0.5, -1.0, 0.0]]))


def test_clipping_by_hand() -> None:
    """Ratios of 1.5 and 0.5 for a good token, then for a bad one; DAPO leaves more room above."""
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.25]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    old = torch.zeros(1, 5)
    found = grpo_terms(ratio.log(), old, advantages, mask)
    torch.testing.assert_close(found, torch.tensor([[-1.2, -0.5, 1.5, 0.8, -1.2]]))
    found = grpo_terms(ratio.log(), old, advantages, mask, variant=VARIANTS["dapo"])
    torch.testing.assert_close(found, torch.tensor([[-1.28, -0.5, 1.5, 0.8, -1.25]]))


def test_no_token_of_cispo_loses_its_gradient() -> None:
    new = torch.tensor([[3.0, -3.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for name, n_left in (("grpo", 1), ("cispo", 2)):
        loss = grpo_loss(new, torch.zeros(1, 2), mask.float(), mask, variant=VARIANTS[name])
        (gradient,) = torch.autograd.grad(loss, new)
        assert int(gradient.count_nonzero()) == n_left
    assert math.isclose(gradient[0, 0], -5 / 2)  # the weight exp(3) is cut to 5


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_masked_has_no_effect_not_even_nan(name: str) -> None:
    policy, old, reference = drawn(spread=0.1)
    advantages = on_tokens(ADVANTAGES, MASK)
    options: Any = {"variant": VARIANTS[name], "kl_weight": 0.1}
    clean = grpo_loss(policy, old, advantages, MASK, reference=reference, **options)
    (expected,) = torch.autograd.grad(clean, policy)
    spoiled = [one.detach().masked_fill(~MASK, math.nan) for one in (policy, old, advantages)]
    leaf = spoiled[0].requires_grad_()
    reference = reference.masked_fill(~MASK, math.inf)
    found = grpo_loss(leaf, *spoiled[1:], MASK, reference=reference, **options)
    torch.testing.assert_close(found, clean)
    (gradient,) = torch.autograd.grad(found, leaf)
    torch.testing.assert_close(gradient, expected.where(MASK, 0.0))


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_changes_nothing(name: str) -> None:
    policy, old, _ = drawn(spread=0.1)
    advantages = on_tokens(ADVANTAGES, MASK)
    expected = grpo_loss(policy, old, advantages, MASK, variant=VARIANTS[name])
    wider = [torch.nn.functional.pad(one, (2, 3)) for one in (policy, old, advantages, MASK)]
    found = grpo_loss(*wider, variant=VARIANTS[name])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_rewards_have_no_gradient(name: str) -> None:
    policy, old, _ = drawn(spread=0.5)
    variant = VARIANTS[name]
    advantages = group_advantages(
        torch.ones(1, 4, dtype=torch.float64), scale=variant.scale, baseline=variant.baseline
    )
    loss = grpo_loss(policy, old, on_tokens(advantages[0], MASK), MASK, variant=variant)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert not gradient.any()


def test_what_the_divisors_make_of_length() -> None:
    """The weight of a token of a response of 2 tokens beside one of a response of 8."""
    mask = torch.arange(8) < torch.tensor([2, 8])[:, None]
    policy = torch.zeros(2, 8, requires_grad=True)
    ratios = {}
    for per in ("response", "token", 8):
        loss = policy_gradient_loss(policy, mask.float(), mask, per=per)
        (gradient,) = torch.autograd.grad(loss, policy)
        ratios[per] = float(gradient[0, 0] / gradient[1, 0])
    assert ratios == {"response": 4.0, "token": 1.0, 8: 1.0}


def test_the_penalty_is_never_negative_and_has_the_gradient_of_the_divergence() -> None:
    """In the mean over draws from the policy itself, at the first order, as k3 is known to."""
    policy, _, reference = drawn()
    penalty = kl_penalty(policy, reference, MASK, 0.5)
    assert (penalty >= 0).all() and not penalty[~MASK].any()
    assert not kl_penalty(policy, policy.detach(), MASK, 0.5).any()
    assert not kl_penalty(policy, None, MASK, 0.0).any()


def test_a_penalty_needs_a_reference() -> None:
    policy, old, _ = drawn()
    with pytest.raises(ValueError, match="reference: expected log-probabilities"):
        grpo_loss(policy, old, on_tokens(ADVANTAGES, MASK), MASK, kl_weight=0.1)


# Weights for what another engine has drawn


def test_truncated_weights_by_hand() -> None:
    trainer = torch.tensor([[0.0, 1.0, -1.0, math.nan]], requires_grad=True)
    behavior = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    found = importance_weights(trainer, behavior, mask, most=2.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, math.exp(-1), 1.0]]))
    assert not found.requires_grad


def test_weights_make_the_gradient_of_another_policy_unbiased() -> None:
    """Exact: rewards of a token that one policy has drawn, learned by another."""
    logits = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    drew = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    log_probs = logits.log_softmax(0)[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    (truth,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    found = {}
    for most in (100.0, 1.0):
        weights = importance_weights(log_probs, drew.log()[:, None], mask, most=most)
        terms = weights * drew[:, None] * reward[:, None]
        loss = policy_gradient_loss(log_probs, terms, mask, per=1) * 3
        (gradient,) = torch.autograd.grad(-loss, logits, retain_graph=True)
        found[most] = gradient
    torch.testing.assert_close(found[100.0], truth)
    assert not torch.allclose(found[1.0], truth)


# Variants


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": "batch"}, "scale: expected"),
        ({"baseline": "median"}, "baseline: expected"),
        ({"level": "word"}, "level: expected"),
        ({"per": "row"}, "per: expected"),
        ({"per": 0}, "per: expected a number above 0"),
        ({"most": 0.0}, "most: expected a number above 0"),
        ({"draws": 0}, "draws: expected"),
        ({"clip": (1.5, 0.2)}, "clip: expected"),
        ({"clip": -0.1}, "clip: expected"),
        ({"clip": math.nan}, "clip: expected"),
    ],
)
def test_what_no_variant_can_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Variant(**change)
