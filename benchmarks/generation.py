"""Speed of generation: ours against ``transformers.generate``, with the same weights, both cached.

``python benchmarks/generation.py 0.2M 1M`` measures these sizes only.

Random weights, so that nothing ends a text early. Before anything is timed, the greedy tokens of
both must be the same. On a processor a small model's step is mostly calls of functions: that is
what is compared here, and why the ratio falls where the arithmetic grows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from measure import compare, environment, report, table
from model import contestants, sizes_for
from torch import Tensor, nn

from llmbook.environment import best_device
from llmbook.generation import Sampling, generate
from llmbook.model import TransformerLM, count_parameters

PROMPT, NEW = 16, 64
BATCHES = (1, 8, 32)
KINDS = {"greedy": Sampling(temperature=0.0), "top-p": Sampling(temperature=0.8, top_p=0.9)}
Tokens = Callable[[], list[list[int]]]


def ours(model: nn.Module, prompts: Tensor, sampling: Sampling, compile: bool) -> Tokens:
    """Return a function that gives the new tokens of all rows."""
    assert isinstance(model, TransformerLM)

    def tokens() -> list[list[int]]:
        given = {"max_new_tokens": NEW, "sampling": sampling, "compile": compile}
        done = generate(model, prompts.tolist(), **given)
        return [completion.ids for completion in done]

    return tokens


def theirs(model: nn.Module, prompts: Tensor, sampling: Sampling) -> Tokens:
    """Return a function that does the same with transformers."""
    chosen = {"do_sample": False}
    if sampling.temperature:
        # top_k is 50 unless one says otherwise
        chosen = {"do_sample": True, "temperature": 0.8, "top_p": sampling.top_p, "top_k": 0}
    mask = torch.ones_like(prompts)

    def tokens() -> list[list[int]]:
        with torch.inference_mode():
            done = model.generate(prompts, attention_mask=mask, max_new_tokens=NEW, **chosen)
        return done[:, PROMPT:].tolist()

    return tokens


def measure_size(size: str, device: torch.device) -> list[list[str]]:
    """Lines of the table for one size."""
    models, lines = contestants(size, device), []
    models["transformers"].generation_config.update(eos_token_id=None, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    for rows in BATCHES:
        prompts = torch.randint(2048, (rows, PROMPT), generator=generator).to(device)
        for kind, sampling in KINDS.items():
            both = {
                "compiled": ours(models["llmbook"], prompts, sampling, compile=True),
                "by hand": ours(models["llmbook"], prompts, sampling, compile=False),
                "transformers": theirs(models["transformers"], prompts, sampling),
            }
            first = {name: tokens() for name, tokens in both.items()}  # a warm-up, too
            assert first["compiled"] == first["by hand"], f"{size}, {rows} rows, {kind}"
            if kind == "greedy":
                assert first["compiled"] == first["transformers"], f"{size}, {rows} rows"
            times = compare(both, repeats=9)
            speeds = {name: rows * NEW / timing.seconds for name, timing in times.items()}
            lines.append(
                [
                    f"{size}, {rows} rows, {kind}",
                    f"{count_parameters(models['llmbook']) / 1e6:.2f} M",
                    *(f"{speed:,.0f}" for speed in speeds.values()),
                    f"{speeds['compiled'] / speeds['transformers']:.2f}",
                    f"{speeds['by hand'] / speeds['transformers']:.2f}",
                ]
            )
    return lines


def main() -> None:
    """Measure, compare, report."""
    device = best_device()
    if device.type not in {"cpu", "cuda"}:
        device = torch.device("cpu")
    sizes = sys.argv[1:] or sizes_for(device)
    lines = [line for size in sizes for line in measure_size(size, device)]
    header = ["model, batch, choice", "parameters", "compiled, tokens/s", "by hand", "transformers"]
    header += ["ratio, compiled", "by hand"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the processor"
    report(
        "generation",
        f"{environment('llmbook', 'torch', 'transformers')}, {torch.get_num_threads()} threads",
        f"On {name}: {NEW} new tokens after prompts of {PROMPT}, all with a cache. The weights are "
        "the same, random ones; the greedy tokens were compared and are the same, too. Compiled is "
        "`generate(..., compile=True)`, whose tokens are those of the step that is fused by hand; "
        "the first call, which compiles, is not timed. Top-p is 0.9 at temperature 0.8. Ratios are "
        "those of the speeds, to transformers.",
        table(header, lines),
    )


if __name__ == "__main__":
    main()
