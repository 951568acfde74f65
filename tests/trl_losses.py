"""What trl's trainers make of given log-probabilities, without a model, a tokenizer or a data set.

Each of its losses sits in a method of a trainer, which asks a model for the log-probability of each
token. Here the method is called with an object that has just the attributes that it reads.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def trainer(name: str) -> Any:
    """Return a class of trl; what it says of the future while it is imported is not heard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "DPOTrainer":
            from trl.trainer.dpo_trainer import DPOTrainer as found
        elif name == "KTOTrainer":
            from trl.trainer.kto_trainer import KTOTrainer as found
        elif name == "ORPOTrainer":
            from trl.experimental.orpo.orpo_trainer import ORPOTrainer as found
        else:
            from trl.experimental.cpo.cpo_trainer import CPOTrainer as found
    return found


def _stub(**settings: Any) -> SimpleNamespace:
    device = torch.device("cpu")
    same = SimpleNamespace(
        device=device, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, _: x
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=same,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def _model(log_probs: Tensor) -> Any:
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(
        log_probs=log_probs,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
        log_sum_sq_probs=zeros,
    )
    return lambda **_: outputs


def _inputs(mask: Tensor) -> dict[str, Tensor]:
    """A prompt of one token, and answers as long as the mask says."""
    shape = (len(mask), mask.size(1) + 1)
    prompt = mask.new_zeros(len(mask), 1)
    return {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "completion_mask": torch.cat([prompt, mask], dim=1).long(),
    }


def dpo(
    log_probs: Tensor, reference: Tensor, mask: Tensor, loss: str, beta: float, smoothing: float
) -> Tensor:
    """Return ``DPOTrainer``'s loss; chosen rows come first, then as many rejected ones."""
    known = _stub(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = _inputs(mask) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return trainer("DPOTrainer")._compute_loss(known, _model(log_probs), inputs, False)


def kto(
    log_probs: Tensor,
    reference: Tensor,
    mask: Tensor,
    label: Tensor,
    others: Tensor,
    reference_others: Tensor,
    beta: float,
    weights: tuple[float, float],
) -> Tensor:
    """Return ``KTOTrainer``'s loss; ``others`` belong to answers of other prompts."""
    known = _stub(
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda *_: others,
    )
    more = {"label": label, "ref_logps": reference.sum(1), "ref_KL_logps": reference_others}
    return trainer("KTOTrainer")._compute_loss(
        known, _model(log_probs), _inputs(mask) | more, False
    )


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return what ``ORPOTrainer`` takes from the loss of the chosen answers, from means."""
    return trainer("ORPOTrainer").odds_ratio_loss(_stub(beta=beta), chosen, rejected)[0]


def simpo(chosen: Tensor, rejected: Tensor, beta: float, margin: float, smoothing: float) -> Tensor:
    """Return ``CPOTrainer``'s loss of the type "simpo", from means over tokens."""
    known = _stub(
        alpha=0.0, loss_type="simpo", beta=beta, simpo_gamma=margin, label_smoothing=smoothing
    )
    return trainer("CPOTrainer").cpo_loss(known, chosen, rejected)[0]
