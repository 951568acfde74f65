"""Vocabulary size against compression, up to 128,000 tokens, by language: one training run."""

from __future__ import annotations

import measure
from tokenizer import PACKAGES, read_text

from llmbook.cleaning import read_translations
from llmbook.tokenizer import BPETokenizer, train_bpe

SIZES = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)
LANGUAGES = {
    "es": "Spanish",
    "fr": "French",
    "tr": "Turkish",
    "el": "Greek",
    "ru": "Russian",
    "fa": "Persian",
    "hi": "Hindi",
    "ka": "Georgian",
    "ko": "Korean",
    "ja": "Japanese",
    "zh_CN": "Chinese",
}


def measures(tokenizer: BPETokenizer, texts: list[str]) -> tuple[float, float, float]:
    """Return bytes per token, characters per token, and tokens per word (between spaces)."""
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    size = sum(len(text.encode()) for text in texts)
    words = sum(len(text.split()) for text in texts)
    return size / tokens, sum(map(len, texts)) / tokens, tokens / words


def main() -> None:
    """Train once, truncate, measure on text that was not trained on."""
    documents = read_text(40_000_000)
    catalogs = read_translations()
    halves = {code: (catalogs[code][::2], catalogs[code][1::2]) for code in LANGUAGES}
    seen = [text for number, text in enumerate(documents) if number % 20]
    tests = {"English and code": [text for number, text in enumerate(documents) if not number % 20]}
    tests |= {name: halves[code][1] for code, name in LANGUAGES.items()}
    largest = train_bpe([*seen, *(m for half, _ in halves.values() for m in half)], max(SIZES))
    tokenizers = {size: largest.truncated(size) for size in SIZES}
    found = {n: [measures(t, texts) for t in tokenizers.values()] for n, texts in tests.items()}
    header = ["vocabulary", *(f"{size // 1000}k" for size in SIZES)]

    def rows(which: int, names: list[str]) -> list[list[str]]:
        return [[name, *(f"{values[which]:.2f}" for values in found[name])] for name in names]

    spaced = [n for n in tests if n not in ("Japanese", "Chinese")]
    measure.report(
        "vocabulary",
        measure.environment("llmbook", "regex"),
        f"Trained on 38 MB, 19 of 20 documents of the documentation of {', '.join(PACKAGES)} and "
        "the source code of installed packages, with one half of Sphinx's translated messages in "
        f"each language. {len(largest.merges):,} merges. Measured on the rest. Messages are alike "
        "within a language, which flatters large vocabularies.",
        "Bytes per token:",
        measure.table(header, rows(0, list(tests))),
        "Characters per token:",
        measure.table(header, rows(1, list(tests))),
        "Fertility, tokens per word between spaces:",
        measure.table(header, rows(2, spaced)),
    )


if __name__ == "__main__":
    main()
