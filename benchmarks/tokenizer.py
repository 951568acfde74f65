"""Byte-pair encoding: training and encoding against tokenizers and tiktoken.

``python benchmarks/tokenizer.py [megabytes ...]`` trains on that much text, by default 10 and 100.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from llmbook.corpus import ReadReport, read_installed_docs
from llmbook.tokenizer import GPT4_PATTERN, BPETokenizer, count_words, train_bpe

VOCAB_SIZE = 32_000 + 256  # 32,000 merges
PACKAGES = ["stdlib", "numpy", "matplotlib", "torch", "scipy"]


def read_text(size: int) -> list[str]:
    """Documentation, then the source code of all installed packages: ``size`` bytes, exactly."""
    texts: list[str] = []
    left = size
    for text in _documents():
        data = text.encode()[:left]
        texts.append(data.decode("utf-8", "ignore"))
        left -= len(data)
        if not left:
            return texts
    raise SystemExit(f"the installed packages hold {left} bytes less than {size}")


def _documents() -> Iterator[str]:
    documents = read_installed_docs(PACKAGES, workers=2, report=ReadReport())
    yield from (document.text for document in documents)
    for path in sorted(Path(numpy.__file__).parents[1].rglob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace").encode(errors="replace").decode()


def train_theirs(texts: list[str]) -> tokenizers.Tokenizer:
    """Train with the Rust library on as many cores as it likes."""
    split = pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rival = tokenizers.Tokenizer(models.BPE())
    rival.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, show_progress=False, initial_alphabet=alphabet
    )
    rival.train_from_iterator(texts, trainer)
    return rival


def training(size: int, texts: list[str]) -> tuple[list[list[str]], BPETokenizer, str]:
    """Time both trainers; return rows of the table, our tokenizer, and what takes the time."""
    timings = measure.compare(
        {
            "llmbook, 1 process": lambda: train_bpe(texts, VOCAB_SIZE, special_tokens=()),
            "llmbook, 2 processes": lambda: train_bpe(
                texts, VOCAB_SIZE, special_tokens=(), workers=2
            ),
            "tokenizers": lambda: train_theirs(texts),
            "counting": lambda: count_words(texts),
        },
        repeats=3 if size <= 10_000_000 else 1,
    )
    theirs, counting = timings["tokenizers"], timings.pop("counting").seconds
    ours = timings["llmbook, 1 process"].result
    same = len(set(ours.vocabulary.values()) & _tokens(theirs.result)) / VOCAB_SIZE
    rows = [
        [
            f"{size // 10**6} MB, {name}",
            f"{timing.seconds:.1f}",
            f"{theirs.seconds / timing.seconds:.2f}",
            f"{same:.1%}",
        ]
        for name, timing in timings.items()
    ]
    alone = timings["llmbook, 1 process"].seconds
    share = f"On {size // 10**6} MB one process counts words for {counting:.1f} s of {alone:.1f} s."
    return rows, ours, share


def _tokens(theirs: Any) -> set[bytes]:
    path = measure.HERE / ".theirs.json"
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.save(str(path))
    try:
        return set(BPETokenizer.load(path).vocabulary.values())
    finally:
        path.unlink()


def encoding(texts: list[str], ours: BPETokenizer) -> list[list[str]]:
    """Time encoding of ``texts``, one at a time, and check that ids agree."""
    path = measure.HERE / ".ours.json"
    ours.save(path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    path.unlink()
    tiktoken = ours.to_tiktoken()

    def cold() -> list[list[int]]:
        ours._tables.words.clear()  # the cache of words
        return [ours.encode(text) for text in texts]

    timings = measure.compare(
        {
            "llmbook, nothing cached": cold,
            "llmbook": lambda: [ours.encode(text) for text in texts],
            "tokenizers, encode": lambda: [theirs.encode(text).ids for text in texts],
            "tokenizers, encode_batch": lambda: [e.ids for e in theirs.encode_batch(texts)],
            "tiktoken": lambda: [tiktoken.encode_ordinary(text) for text in texts],
        }
    )
    expected = timings["tiktoken"].result
    size = sum(len(text.encode()) for text in texts) / 1e6
    return [
        [name, f"{size / timing.seconds:.1f}", str(timing.result == expected)]
        for name, timing in timings.items()
    ]


def main() -> None:
    """Measure and report."""
    rows: list[list[str]] = []
    encoded: list[list[str]] = []
    shares: list[str] = []
    for size in [int(arg) * 10**6 for arg in sys.argv[1:]] or [10**7, 10**8]:
        texts = read_text(size)
        found, ours, share = training(size, texts)
        rows += found
        shares.append(share)
        encoded = encoded or encoding(texts, ours)
    header = ["32,000 merges on", "seconds", "speed against tokenizers", "tokens in common"]
    measure.report(
        "tokenizer",
        measure.environment("llmbook", "tokenizers", "tiktoken", "regex"),
        f"Text: documentation of {', '.join(PACKAGES)}, then the source code of all installed "
        "packages in the order of their paths, cut at the exact number of bytes. `tokenizers` "
        "counts on all cores; its rule for ties differs, hence not all tokens are in common.",
        measure.table(header, rows),
        "Encoding the first of these texts, document by document:",
        measure.table(["encoder", "MB a second", "ids as tiktoken"], encoded),
        f"{' '.join(shares)} The rest is merges, in one process of pure Python. Words are counted "
        "as fast as the regular expression finds them, in each process; a second one needs about a "
        "second to start.",
    )


if __name__ == "__main__":
    main()
