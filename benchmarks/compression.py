"""Some minutes of training on documentation, in bits per byte, against gzip and xz.

The preset ``documentation-long`` is trained in ``runs/documentation-long``; a run that is there
already is gone on with, or only judged. The same held-out text for all, and the compressors once
more with the training text in sight, as the model had it.
"""

from __future__ import annotations

from pathlib import Path

from measure import environment, report, table

from llmbook.batches import TokenShards
from llmbook.model import count_parameters
from llmbook.training import RUNS, ProgressBar, compressors, documents_score, run

PRESET = "documentation-long"
FOLDER = Path(__file__).resolve().parents[1] / "runs" / PRESET


def main() -> None:
    """Train, compress, report."""
    config = RUNS[PRESET]
    result = run(config, FOLDER, [ProgressBar(config.training.n_steps)])
    bits, n_bytes = documents_score(result.model, result.tokenizer, result.held_out)
    shards = TokenShards(FOLDER / "data" / "train")
    seen = result.tokenizer.decode(shards[:].tolist(), skip_special_tokens=True)
    lines = [["the model", f"{bits / n_bytes:.2f}"]]
    lines += [[name, f"{value:.2f}"] for name, value in compressors(result.held_out).items()]
    primed = compressors(result.held_out, [seen])
    lines += [[f"{name}, training text in sight", f"{v:.2f}"] for name, v in primed.items()]
    tokens = int(result.log.column("targets")[1][-1])
    report(
        "compression",
        environment("llmbook", "torch"),
        f"A model of {count_parameters(result.model) / 1e6:.2f} million parameters after "
        f"{tokens / 1e6:.1f} million tokens of documentation ({len(seen.encode()) / 1e6:.1f} MB, "
        f"some of it read more than once), on {n_bytes / 1e3:.0f} KB of documentation from other "
        "files. What the model itself would take in the archive is not counted.",
        table(["what", "bits per byte"], lines),
    )


if __name__ == "__main__":
    main()
