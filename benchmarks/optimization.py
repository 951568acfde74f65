"""Losses, optimizers and clipping against torch's, one thread's worth of each, side by side.

The loss is that of 4,096 tokens and 2,048 words, head included, forward and backward. Its gradients
are compared with torch's before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import compare, environment, report, table
from model import contestants, sizes_for
from torch import Tensor, nn

from llmbook.environment import best_device
from llmbook.model import count_parameters
from llmbook.optimization import AdamW, Muon, chunked_cross_entropy, clip_gradients

TOKENS, WORDS = 4096, 2048


def whole(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(hidden @ head.T, targets)


def gradients(loss: Callable[..., Tensor], hidden: Tensor, head: Tensor, targets: Tensor) -> list:
    """One loss and what its backward pass gives."""
    found = torch.autograd.grad(loss(hidden, head, targets), (hidden, head))
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return list(found)


def measure_loss(d_model: int, device: torch.device) -> list[str]:
    """A line about the two ways to a loss."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, d_model, device=device, requires_grad=True)
    head = (torch.randn(WORDS, d_model, device=device) / d_model**0.5).requires_grad_()
    targets = torch.randint(WORDS, (TOKENS,), device=device)
    ways = {
        name: partial(gradients, loss, hidden, head, targets)
        for name, loss in {"ours": chunked_cross_entropy, "torch": whole}.items()
    }
    torch.testing.assert_close(ways["ours"](), ways["torch"](), rtol=1e-4, atol=1e-6)
    return line(f"loss, d_model {d_model}", compare(ways, repeats=12))


def line(name: str, times: dict) -> list[str]:
    """A row of the table: milliseconds of both, and how much faster ours is."""
    ours, theirs = times["ours"].seconds, times["torch"].seconds
    return [name, f"{1e3 * ours:,.1f}", f"{1e3 * theirs:,.1f}", f"{theirs / ours:.2f}"]


def measure_steps(size: str, device: torch.device) -> list[list[str]]:
    """Lines about one step of the optimizers, and about clipping."""
    model = contestants(size, device)["llmbook"]
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    parameters = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2]
    pairs: dict[str, dict[str, Callable]] = {
        "AdamW, against fused": {
            "ours": AdamW(parameters).step,
            "torch": torch.optim.AdamW(parameters, fused=True).step,
        },
        "AdamW, against the default": {
            "ours": AdamW(parameters).step,
            "torch": torch.optim.AdamW(parameters).step,
        },
        "clipping": {
            "ours": lambda: clip_gradients(parameters, 1e9),
            "torch": lambda: nn.utils.clip_grad_norm_(parameters, 1e9),
        },
        "Muon in bfloat16": {
            "ours": Muon(matrices, ns_dtype=torch.bfloat16).step,
            "torch": torch.optim.Muon(matrices).step,
        },
    }
    count = f"{count_parameters(model) / 1e6:.1f} M"
    lines = []
    for name, both in pairs.items():
        for warm_up in both.values():
            warm_up()
        lines.append(line(f"{name}, {count}", compare(both, repeats=5 if "Muon" in name else 20)))
    return lines


def main() -> None:
    """Measure, compare, report."""
    torch.set_num_threads(1)
    device = best_device()
    if device.type not in {"cpu", "cuda"}:
        device = torch.device("cpu")
    lines = [measure_loss(d_model, device) for d_model in (64, 128, 192, 320)]
    lines += [row for size in sizes_for(device)[1:] for row in measure_steps(size, device)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the processor"
    report(
        "optimization",
        f"{environment('llmbook', 'torch')}, 1 thread",
        f"On {name}: milliseconds for one call, best of several taken in turns. The loss is that "
        f"of {TOKENS:,} tokens and {WORDS:,} words with both gradients, in chunks (ours) and all "
        "at once (torch). Muon's products are in bfloat16 on both sides, torch's only choice; ours "
        "takes float32 on processors unless told otherwise.",
        table(["what", "ours, ms", "torch, ms", "ratio"], lines),
    )


if __name__ == "__main__":
    main()
