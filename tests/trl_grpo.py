"""What trl's ``GRPOTrainer`` makes of given log-probabilities, without a model or a data set.

Its loss sits in a method that asks a model for the log-probability of each token. Here the method
is called with an object that has just the attributes that it reads.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def trainer() -> Any:
    """Return the class of trl; what it says of the future while it is imported is not heard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer
    return GRPOTrainer


def grpo(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    loss_type: str = "grpo",
    level: str = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    longest: int = 1,
    reference: Tensor | None = None,
    kl_weight: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return ``GRPOTrainer``'s loss; ``weights`` are those for what another engine has drawn."""
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1)
    known = SimpleNamespace(
        accelerator=same,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=kl_weight,
        current_gradient_accumulation_steps=1,
        epsilon_low=clip[0],
        epsilon_high=clip[1],
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=longest,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, 0 * log_probs, None),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_log_probs,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    return trainer()._compute_loss(known, None, inputs)
