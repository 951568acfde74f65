# %% [markdown]
# # Byte-pair encoding
#
# > Cut text into tokens: learn from counted pairs which bytes belong together, encode any text
# > with them, decode without loss, and speak the file formats of others.
#
# A model reads numbers from a fixed list. A list of words will not do: by Heaps' law new ones
# never stop coming. A list of characters will not do either: Unicode has more than 150,000, and a
# text spelled out is several times as long as in words, which a model pays for at every step.
#
# **Byte-pair encoding** lets the data decide. It starts from the 256 bytes, in which any text can
# be written, and joins the most frequent pair of neighbors, again and again, until the list is as
# long as you want. Frequent words become one token, rare ones a few, and nothing is unknown. GPT-2
# introduced it in this form {cite}`radford2019language`; most of today's models use it.
#
# | | |
# |---|---|
# | **Part** | I. Foundations and data |
# | **You build** | {py:func}`~llmbook.tokenizer.train_bpe`, {py:func}`~llmbook.tokenizer.train_bpe_files`, {py:class}`~llmbook.tokenizer.BPETokenizer`, {py:func}`~llmbook.tokenizer.pretokenize`, {py:func}`~llmbook.tokenizer.learn_merges` |
# | **You need** | Python and regular expressions; the documents of {doc}`02_corpus`, and the laws named there |
# | **It takes** | 60 minutes for the main line, 2.5 hours for everything, 30 seconds to run |

# %% tags=["remove-cell"]
#| default_exp tokenizer

# %% tags=["engine"]
#| export
# The imports of the module
import codecs
import json
import operator
import os
import re
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, partial
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, SupportsInt
from unicodedata import normalize

import regex  # type: ignore[import-untyped, unused-ignore]

from llmbook.cleaning import whole_characters
from llmbook.corpus import Document, existing_paths, iter_texts, ordered_map
from llmbook.environment import check_at_least, check_choice, check_text, whole_file

# %% [markdown]
# The folded cell above has the imports of the module. Of these you will meet `Counter`,
# `pairwise`, `insort`, which keeps a list sorted, `heappush` and `heappop`, which keep a heap,
# `codecs`, and the package `regex`, which knows Unicode's classes of characters, as Python's own
# `re` does not. For this chapter alone we need a few things more:

# %%
import random
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import tokenizers

from llmbook.cleaning import read_translations
from llmbook.corpus import read_installed_docs
from llmbook.tinyworld import TinyWorld

plt.style.use("llmbook.book")
folder = tempfile.TemporaryDirectory()  # for the files that this chapter writes

# %% [markdown]
# ## Characters, code points, bytes
#
# What is the length of `é`? Unicode numbers characters; the number is a **code point**, at most
# 10FFFF in base sixteen. But `é` can be one code point, or an `e` followed by an accent. And a code
# point has to be stored as bytes, which hold numbers up to 255.

# %%
for name, text in (
    ("é", "\u00e9"),
    ("é", "e\u0301"),
    ("ж", "ж"),
    ("猫", "猫"),
    ("family", "👨‍👩‍👧"),
):
    points = " ".join(f"{ord(character):X}" for character in text)
    print(f"{name:7} code points: {points:28} UTF-8: {text.encode().hex(' ')}")

# %% [markdown]
# One picture on the screen may be five code points and eighteen bytes. A fixed four bytes for each
# code point would make English four times as long as it needs to be. A code of variable length
# must say where a character ends. UTF-8 {cite}`yergeau2003utf8` writes that into the first bits of
# every byte.
#
# - A byte that begins with `0` is a character by itself; 7 bits are left for its code point.
# - A byte that begins with `10` continues a character, and carries 6 bits.
# - A byte that begins with $k$ ones and a zero, $k = 2, 3, 4$, opens a character of $k$ bytes. It
#   carries the $8 - (k + 1) = 7 - k$ highest bits.
#
# So $k$ bytes hold $7 - k + 6(k - 1) = 5k + 1$ bits: 11, 16 and 21. The largest code point,
# 10FFFF, has 21. A code point takes the shortest form that holds it
# ({numref}`fig-tokenizer-utf8`).
#
# ```{figure} ../figures/tokenizer-utf8.svg
# :name: fig-tokenizer-utf8
# :alt: Four rows of bytes as bit patterns. One byte 0 and 7 bits, example a. Two bytes, 110 with 5 bits and 10 with 6 bits, example é. Three bytes, 1110 with 4 bits and twice 10 with 6 bits, example €. Four bytes, 11110 with 3 bits and three times 10 with 6 bits, example 🙂.
#
# The four forms of UTF-8. Gray bits say what a byte is, colored ones carry the code point.
# ```

# %% [markdown]
# In code, the continuation bytes are cut off from the right, six bits at a time, and what is left
# goes into the opening byte. Python's own encoder is the judge, on every code point that can be
# encoded.


# %%
def utf8_bytes(code_point: int) -> bytes:
    if code_point < 1 << 7:
        return bytes([code_point])
    size = 2 if code_point < 1 << 11 else 3 if code_point < 1 << 16 else 4
    continuation = []
    for _ in range(size - 1):
        continuation.append(0b10_000000 | code_point & 0b111111)  # the lowest six bits
        code_point >>= 6
    opening = 0x100 - (1 << (8 - size))  # as many ones as there are bytes, then zeros
    return bytes([opening | code_point, *reversed(continuation)])


valid = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
sizes = Counter()
for code_point in valid:
    written = utf8_bytes(code_point)
    assert written == chr(code_point).encode()
    sizes[len(written)] += 1
for size, number in sizes.items():
    print(f"{number:>9,} code points take {size} byte{'s' * (size > 1)}")

# %% [markdown]
# The gap in `valid` is taken by the **surrogates**, numbers that the older encoding UTF-16 uses in
# pairs. They are no characters, and UTF-8 has no bytes for them.
#
# One property matters below: a cut at an arbitrary byte can break a character in two, and the
# halves are no text by themselves.

# %% [markdown] tags=["engine"]
# ### Engine room: half a character becomes `�`

# %% [markdown] tags=["engine"]
# UTF-16 writes a code point above FFFF as two surrogates. A single one is half a character.
# Python's strings can contain it, UTF-8 cannot. As in chapter 03, and as tiktoken does, we join two
# halves that meet, and write `�` for one that is alone: the code point FFFD, which stands for what
# could not be decoded. Every text that enters this chapter's functions passes through here.


# %% tags=["engine"]
#| export
def valid_text(text: object, argument: str = "text") -> str:
    """Return ``text`` with surrogates joined or replaced; what is no text raises a ValueError."""
    return whole_characters(check_text(text, argument))


# %% [markdown]
# ## Join the most frequent pair
#
# The algorithm was invented to compress data {cite}`gage1994new`. Sennrich, Haddow and Birch
# {cite}`sennrich2016neural` used it to translate rare words. Try it by eye on `sing singing ring
# ringing`. The pair `n g` occurs six times, and so does `i n`. No other pair does.
#
# In general, let $c(a, b)$ be the number of positions at which token $a$ is followed by token $b$.
# The next pair to be merged is the largest under the order
#
# $$
# (a^*, b^*) = \operatorname*{arg\,max}_{(a, b)} \;\bigl(c(a, b),\; a,\; b\bigr),
# $$ (bpe-merge)
#
# compared from left to right: the count first, and between equal counts the bytes of $a$, then
# those of $b$, as in a dictionary. A rule for ties is needed if two programs are to learn the same
# tokens; this one is ours. Every $a$ followed by $b$ becomes one token $ab$, from left to right,
# so that `aaa` becomes `aa a`.


# %%
def merge_pair(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(tokens):
        size = 2 if tuple(tokens[i : i + 2]) == pair else 1
        merged.append(b"".join(tokens[i : i + size]))
        i += size
    return merged


def naive_bpe(words: list[bytes], size: int) -> list[tuple[bytes, bytes]]:
    split = [[bytes([byte]) for byte in word] for word in words]
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < size:
        counts = Counter(pair for tokens in split for pair in pairwise(tokens))
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        split = [merge_pair(tokens, merges[-1]) for tokens in split]
    return merges


for a, b in naive_bpe([b"sing singing ring ringing"], 6):
    print(f"{a.decode()!r:7} + {b.decode()!r:7} -> {(a + b).decode()!r}")

# %% [markdown]
# Between `ng` and `in` the dictionary decides, then `ing` grows in one step. The third merge joins
# `ing` and a space, and that is a nuisance: `sing` before a space and `sing` before a comma become
# different tokens. On longer text such merges take over. Here are the longest tokens that the
# algorithm learns from stories of chapter 01's world:

# %%
world = TinyWorld()
stories = [story.text for story in world.stories(300, seed=0)]
whole = naive_bpe([" ".join(stories).encode()[:10_000]], 300)
for token in sorted((a + b for a, b in whole), key=len)[-3:]:
    print(repr(token.decode()))

# %% [markdown]
# Whole phrases have become tokens. They are of no use in any other text.
#
# ## Words first: pre-tokenization
#
# So merges are confined. A regular expression cuts the text into **pre-tokens**, which we call
# words for short, and no merge crosses from one to the next. GPT-2's pattern
# {cite}`radford2019language` and GPT-4's, which tiktoken publishes, are alternatives, tried from
# left to right at each position:
#
# | GPT-2 | GPT-4 | catches |
# |---|---|---|
# | `'s` `'t` `'re` … | the same, in upper case too | endings after an apostrophe |
# | <code>&nbsp;?\p{L}+</code> | `[^\r\n\p{L}\p{N}]?\p{L}+` | letters, with the space or sign before them |
# | <code>&nbsp;?\p{N}+</code> | `\p{N}{1,3}` | digits; for GPT-4 at most three |
# | <code>&nbsp;?[^\s\p{L}\p{N}]+</code> | the same and line breaks after them | signs |
# | `\s+(?!\S)`, `\s+` | the same, with line breaks apart | white space, but for the space before a word |
#
# The space goes with the word that follows. A sentence then needs no tokens of its own for spaces.
# The look-ahead `(?!\S)` leaves the last of several spaces to the next word.

# %%
#| export
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
)
GPT4_PATTERN = _GPT4_WORDS + r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
_LLAMA3_PATTERN = _GPT4_WORDS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # what tiktoken had formerly
_KNOWN_PATTERNS = {GPT2_PATTERN, GPT4_PATTERN, _LLAMA3_PATTERN}

# %% [markdown]
# Here are both patterns on a line of code with a number. Digits in threes keep a number's tokens
# regular, but they are cut from the left, so `12345` becomes `123` and `45`.

# %%
line = "if loaves > 12345:\n        bake('rye')  # don't wait"
for name, pattern in (("GPT-2", GPT2_PATTERN), ("GPT-4", GPT4_PATTERN)):
    print(name, regex.findall(pattern, line))

# %% [markdown]
# In the package, {py:func}`~llmbook.tokenizer.pretokenize` does this for any pattern and any text.
# It is what `regex.findall` is here, plus the care that follows.

# %% [markdown] tags=["engine"]
# ### Engine room: a pattern of your own, and nothing lost

# %% [markdown] tags=["engine"]
# With a pattern of your own, there may be stretches that it does not match. They become words, too,
# so that no text is lost. What is no regular expression is refused, and so is one with capturing
# groups, for which `findall` would return something else. Compiled patterns are kept.
#
# tiktoken writes GPT-4's pattern with `{1,3}+`, where the plus forbids giving back what was
# matched. We leave it out, since nothing follows that could want it back, and since the engine
# inside of `tokenizers` reads it as "repeat", which takes any number of digits.


# %% tags=["engine"]
#| export
def _splitter(pattern: str) -> Callable[[str], list[str]]:
    """Return the function that cuts a text into words by ``pattern``; bad ones raise ValueError."""
    return _compiled(check_text(pattern, "pattern"))


@cache
def _compiled(pattern: str) -> Callable[[str], list[str]]:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern: not a regular expression: {pattern!r}: {error}") from None
    if compiled.groups:
        raise ValueError(f"pattern: expected groups to be (?:...), got {pattern!r}")
    return compiled.findall if pattern in _KNOWN_PATTERNS else partial(_with_gaps, compiled)


def _with_gaps(compiled: Any, text: str) -> list[str]:
    """Return matches, and the stretches between them, in order; none is empty."""
    spans = [match.span() for match in compiled.finditer(text)]
    cuts = [0, *(place for span in spans for place in span), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]


def pretokenize(text: str, pattern: str = GPT4_PATTERN) -> list[str]:
    """Cut ``text`` into words that no token crosses; joined they are the text again.

    Lone surrogates become U+FFFD. A ``pattern`` that is no regular expression, or has capturing
    groups, raises a ``ValueError``.

    >>> pretokenize("It's  2026!")
    ['It', "'s", ' ', ' ', '202', '6', '!']
    """
    return _splitter(pattern)(valid_text(text))


# %% [markdown]
# ## Training that scales
#
# The naive trainer walks through the whole text for every merge. For 32,000 merges on ten
# megabytes that would take hours. Four observations bring it down to seconds.
#
# ### Count words
#
# A word occurs many times, and is cut the same way each time. So each *different* word is stored
# once with its count $f$, and a pair in it counts $f$ times.
#
# Our text is chapter 02's documents, without exact copies. Every twentieth is set aside, to
# measure on later.

# %%
packages = ["stdlib", "numpy", "matplotlib"]
texts = list(dict.fromkeys(document.text for document in read_installed_docs(packages)))
held_out = texts[::20]
texts = [text for number, text in enumerate(texts) if number % 20]
start = time.perf_counter()
counts = Counter()
for text in texts:
    counts.update(regex.findall(GPT4_PATTERN, text))
seconds_counting = time.perf_counter() - start
million, often = counts.total() // 10**6, round(counts.total() / len(counts), -1)
print(f"more than {million} million words; each occurs about {often:.0f} times")

# %% [markdown]
# {py:func}`~llmbook.tokenizer.count_words` counts in the same way, in several processes if you
# wish, and can read files.

# %% [markdown] tags=["engine"]
# #### Engine room: counting in several processes, from texts and from files (`count_words`)

# %% [markdown] tags=["engine"]
# If texts contain special tokens, such as a mark between documents, these separate and are not
# counted. They must be told apart, so a list with an empty or a repeated one is refused.


# %% tags=["engine"]
#| export
def check_special_tokens(tokens: Collection[str]) -> tuple[str, ...]:
    """Return ``tokens`` as a tuple of texts; an empty, broken or repeated one is refused."""
    if isinstance(tokens, str):
        raise ValueError(f"special_tokens: expected several, such as [{tokens!r}], got one str")
    if isinstance(tokens, bytes) or not isinstance(tokens, Iterable):
        raise ValueError(f"special_tokens: expected several texts, got {tokens!r:.60}")
    tokens = tuple(tokens)
    for token in tokens:
        if not isinstance(token, str) or not token or valid_text(token) != token:
            raise ValueError(f"special_tokens: expected non-empty, valid texts, got {token!r}")
    if repeated := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"special_tokens: expected each once, got {repeated[0]!r} several times")
    return tokens


# %% tags=["engine"]
#| export
@cache
def _finder(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds any of ``tokens``, the longest where several begin."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")  # (?!) never matches


def _count_texts(job: tuple[list[str], str, tuple[str, ...]]) -> Counter[str]:
    """What a worker does: count the words of some texts."""
    texts, pattern, special = job
    split, find = _splitter(pattern), _finder(special)
    counts: Counter[str] = Counter()
    for text in texts:
        for part in find.split(text) if special else [text]:
            counts.update(split(part))
    return counts


# %% [markdown] tags=["engine"]
# Texts go to workers a million characters at a time.


# %% tags=["engine"]
#| export
def _batches(texts: Iterable[str | Document], size: int = 1_000_000) -> Iterator[list[str]]:
    """Group ``texts`` to about ``size`` characters each; refuse what is no text."""
    batch: list[str] = []
    total = 0
    for text in iter_texts(texts, "texts"):
        batch.append(whole_characters(text))
        total += len(text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


# %% tags=["engine"]
#| export
def count_words(
    texts: Iterable[str | Document],
    pattern: str = GPT4_PATTERN,
    special_tokens: Collection[str] = (),
    workers: int = 1,
) -> Counter[str]:
    """Count the words (pre-tokens) of ``texts``; ``special_tokens`` separate and are not counted.

    Texts may be chapter 02's Documents. One worker reads ``texts`` as they come; several need all
    of them in memory.

    >>> count_words(["to be", "not to be"])
    Counter({' be': 2, 'to': 1, 'not': 1, ' to': 1})
    """
    check_at_least(workers=(1, workers))
    special = check_special_tokens(special_tokens)
    jobs = ((batch, pattern, special) for batch in _batches(texts))
    counts: Counter[str] = Counter()
    for found in (
        ordered_map(_count_texts, list(jobs), workers) if workers > 1 else map(_count_texts, jobs)
    ):
        counts.update(found)
    return counts


# %% [markdown] tags=["engine"]
# Files can be counted in parts: counts of parts add up to the counts of the whole. But where may a
# file be cut? A cut through a word changes the counts. A special token is a safe place, because no
# word crosses it. So we jump ahead by some megabytes, search for the next special token and cut
# before it. The search may begin in the middle of one, which is harmless unless special tokens
# overlap: in `aaaa`, the token `aa` can be found at places where reading from the beginning would
# not find it. Tokens that overlap with any are not used for cuts.


# %% tags=["engine"]
#| export
def _separators(special: tuple[str, ...]) -> list[bytes]:
    """Return the special tokens that cannot overlap with one of them, as UTF-8."""

    def overlap(a: str, b: str) -> bool:
        return (a != b and (a in b or b in a)) or any(
            a.endswith(b[:size]) or b.endswith(a[:size]) for size in range(1, min(len(a), len(b)))
        )

    return [a.encode() for a in special if not any(overlap(a, b) for b in special)]


def _chunks(path: Path, separators: list[bytes], size: int) -> list[tuple[int, int]]:
    """Cut a file into stretches of about ``size`` bytes or more, (start, end), at separators."""
    find = re.compile(b"|".join(map(re.escape, separators)) or rb"(?!)")
    total, cuts = path.stat().st_size, [0]
    with path.open("rb") as file:
        while separators and (place := cuts[-1] + size) < total:
            file.seek(place)
            window = b""
            while not (match := find.search(window)) and (block := file.read(1 << 20)):
                kept = window[-max(map(len, separators)) :]
                place += len(window) - len(kept)
                window = kept + block
            if not match:
                break
            cuts.append(place + match.start())
    return list(pairwise([*cuts, total]))


# %% [markdown] tags=["engine"]
# A worker gets a file's name and two positions, reads, decodes and counts.


# %% tags=["engine"]
#| export
def _count_chunk(job: tuple[str, int, int, str, str, tuple[str, ...]]) -> Counter[str]:
    """What a worker does: count the words of a stretch of a file."""
    path, start, end, errors, pattern, special = job
    with Path(path).open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    try:
        text = data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        broken = f"byte {data[error.start]:#04x} at {start + error.start}"
        raise ValueError(f"paths: {path} is not UTF-8: {broken}") from None
    return _count_texts(([text], pattern, special))


# %% tags=["engine"]
#| export
def _count_files(
    paths: list[Path], pattern: str, special: tuple[str, ...], workers: int | None, errors: str
) -> Counter[str]:
    """Count the words of UTF-8 files, in parallel if that pays."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"paths: expected files, got the folder {str(path)!r}")
    total = sum(path.stat().st_size for path in paths)
    workers = workers or (min(4, os.cpu_count() or 1) if total > 4e6 else 1)
    size = max(1_000_000, min(16_000_000, total // (4 * workers)))
    jobs = [
        (str(path), start, end, errors, pattern, special)
        for path in paths
        for start, end in _chunks(path, _separators(special), size)
    ]
    counts: Counter[str] = Counter()
    for found in ordered_map(_count_chunk, jobs, workers):
        counts.update(found)
    return counts


# %% [markdown]
# ### Remember where, and change what changed
#
# A merge of `t h` concerns only the words that contain `th`. So we keep an **inverted index**, from
# each pair to the words that have it, as the index of a book leads from terms to pages. And when
# `t h` is merged in `other`, only the pairs at the seams change: `o t` and `h e` lose the word's
# count, `o th` and `th e` gain it.
#
# How should a word be stored, so that this is fast in Python? Strings are what Python does best, so
# we write a word as a *string of tokens*: the character with number $i$ stands for token $i$. In
# the beginning these are the bytes. A pair is a string of two characters, and a merge is
# `word.split(pair)` and `join`, which run in C, from left to right as demanded.


# %%
#| export
def _index_pairs(
    words: list[str], frequencies: list[int]
) -> tuple[dict[str, int], defaultdict[str, list[int]]]:
    """Return how often each pair of neighbors occurs, and the numbers of the words it occurs in."""
    counts: defaultdict[str, int] = defaultdict(int)
    where: defaultdict[str, list[int]] = defaultdict(list)
    for number, (word, frequency) in enumerate(zip(words, frequencies, strict=True)):
        for pair in map(str.__add__, word, word[1:]):
            counts[pair] += frequency
            if where[pair][-1:] != [number]:  # once a word, which may be long and all the same
                where[pair].append(number)
    return counts, where


# %% [markdown]
# Between two pieces of the split word lay the pair. If the pieces around it are `left` and
# `right`, the token before it is the last of `left`. If `left` is empty and the word does not begin
# here, another pair was merged just before: the token before this pair was the second half of that
# one, and is now the new token. The token after the pair is the first of `right`; if that is empty,
# the next round of the loop sees to it. Counts of pairs with the new token are collected apart. The
# index may list a word that has lost a pair since; it is seen and skipped, which is cheaper than
# keeping the index clean.


# %%
#| export
def _merge_everywhere(
    pair: str,
    new: str,
    words: list[str],
    frequencies: list[int],
    counts: dict[str, int],
    where: defaultdict[str, list[int]],
) -> dict[str, int]:
    """Replace ``pair`` by the token ``new`` in all ``words``; return the counts of new pairs."""
    first, second = pair[0], pair[1]
    found: defaultdict[str, int] = defaultdict(int)
    for number in where.pop(pair):
        pieces = words[number].split(pair)
        frequency, made = frequencies[number], list[str]()
        for seam, (left, right) in enumerate(pairwise(pieces)):
            if left or seam:
                before, now = (left[-1], left[-1]) if left else (second, new)
                counts[before + first] -= frequency
                made.append(now + new)
            if right:
                counts[second + right[0]] -= frequency
                made.append(new + right[0])
        for each in made:
            found[each] += frequency
            if where[each][-1:] != [number]:
                where[each].append(number)
        words[number] = new.join(pieces)
    del counts[pair]
    return found


# %% [markdown]
# ### Find the most frequent pair without looking at all of them
#
# A heap gives its largest entry in logarithmic time, but must not be searched when a count changes,
# and ties need the bytes compared. Three facts about counts help. A pair that exists only ever
# loses counts, because merges use up its tokens. A new pair is created, all of it, in the one merge
# that creates the later of its tokens. And a new pair cannot be more frequent than the pair that
# was merged, since each of its occurrences contains one of that. So the best count never rises.
#
# We can therefore work through counts from the top, level by level
# ({numref}`fig-tokenizer-training`). A **heap of levels** holds the counts at which pairs are
# waiting. A level's pairs are sorted once, by their bytes, and taken from the end. A pair whose
# count has fallen since it was filed is filed anew, at its lower level; a new pair goes to its own
# level, or, if that is the present one, to its place in the sorted list.
#
# ```{figure} ../figures/tokenizer-training.svg
# :name: fig-tokenizer-training
# :alt: Three structures. A heap of levels: 15 holds the pairs h e and t h, 4 holds e n, 2 holds e r and o t. The last pair of the top level, t h, leads to an index, which names the words the (9 times), then (4 times) and other (2 times), each a row of tokens.
#
# The trainer's three structures. The top level's greatest pair is looked up in the index, and only
# the words found there are changed.
# ```


# %%
#| export
def _with_bytes(pair: str, tokens: list[bytes]) -> tuple[bytes, bytes, str]:
    """Return what pairs are sorted by, and the pair."""
    return tokens[ord(pair[0])], tokens[ord(pair[1])], pair


# %% [markdown]
# The queue files pairs by their counts. `push` puts a pair on its level, `pop` takes the next one
# to merge.


# %%
#| export
class _PairQueue:
    """Pairs in waiting; gives the most frequent, of equal ones that of the greatest bytes."""

    def __init__(self, counts: dict[str, int], tokens: list[bytes]) -> None:
        self._counts, self._tokens = counts, tokens  # both go on changing
        self._level, self._open = 0, list[tuple[bytes, bytes, str]]()
        self._waiting, self._heap = defaultdict[int, list[str]](list), list[int]()
        for pair in counts:
            self.push(pair)

    def push(self, pair: str) -> None:
        """File ``pair`` under its present count, which is at most that of the last pair given."""
        count = self._counts[pair]
        if count == self._level:
            insort(self._open, _with_bytes(pair, self._tokens))
        elif count:
            if count not in self._waiting:
                heappush(self._heap, -count)
            self._waiting[count].append(pair)

    def pop(self) -> str | None:
        """Remove and return the pair to merge next; None when no pair is left."""
        while self._open or self._heap:
            if not self._open:
                self._level = -heappop(self._heap)
                pairs = self._waiting.pop(self._level)
                self._open = sorted(_with_bytes(pair, self._tokens) for pair in pairs)
            pair = self._open.pop()[2]
            if self._counts[pair] == self._level:
                return pair
            self.push(pair)  # it has lost counts since it was filed
        return None


# %% [markdown]
# The trainer is now short. Bytes become characters 0 to 255 by decoding them as Latin-1.


# %%
#| export
def learn_merges(counts: Mapping[str, int], size: int) -> list[tuple[bytes, bytes]]:
    """Learn up to ``size`` merges from words and how often each occurs, the first merge first.

    The most frequent pair is merged, of equally frequent ones the lexicographically greatest pair
    of byte strings. There are fewer than ``size`` where every word has become one token. Source:
    Gage (1994), Sennrich et al. (2016), on bytes as in Radford et al. (2019).

    >>> learn_merges({"to": 2, "toe": 1}, 2)
    [(b't', b'o'), (b'to', b'e')]
    """
    check_at_least(size=(0, size), counts=(0, min(counts.values(), default=0)))
    words = [valid_text(word).encode().decode("latin-1") for word in counts]
    pairs, where = _index_pairs(words, frequencies := list(counts.values()))
    tokens = [bytes([byte]) for byte in range(256)]
    queue, merges = _PairQueue(pairs, tokens), list[tuple[bytes, bytes]]()
    while len(merges) < size and (pair := queue.pop()):
        first, second = (tokens[ord(token)] for token in pair)
        new = chr(len(tokens))
        tokens.append(first + second)
        merges.append((first, second))
        found = _merge_everywhere(pair, new, words, frequencies, pairs, where)
        pairs.update(found)
        for each in found:
            queue.push(each)
    return merges


# %% [markdown]
# The naive trainer is the judge. On words of few letters, ties and overlaps abound.

# %%
generator = random.Random(0)
agreements = 0
for _ in range(200):
    words = ["".join(generator.choices("aabn ", k=generator.randrange(12))) for _ in range(8)]
    slow = naive_bpe([word.encode() for word in words], 30)
    agreements += slow == learn_merges(Counter(words), 30)
print("the same merges in the same order for", agreements, "of 200 random texts")

few = count_words(stories[:20])
assert naive_bpe([word.encode() for word in few.elements()], 100) == learn_merges(few, 100)

# %% [markdown]
# Now 31,743 merges at once. With 256 bytes and a special token they make a vocabulary of 32,000.

# %%
start = time.perf_counter()
merges = learn_merges(counts, 32_000 - 257)
seconds_merging = time.perf_counter() - start
print(f"{len(merges):,} merges; the first joins {merges[0][0]} and {merges[0][1]}")

# %% [markdown]
# ## From merges to a tokenizer
#
# The merges, in order, are the tokenizer. To **encode** a word, cut it into bytes and apply the
# merges in the order in which they were learned: always the pair of neighbors with the lowest
# **rank**, the leftmost first. Applied to a word of the training text, this repeats what training
# did to it.


# %%
def naive_encode(word: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    tokens = [bytes([byte]) for byte in word]
    while found := [pair for pair in pairwise(tokens) if pair in ranks]:
        tokens = merge_pair(tokens, min(found, key=ranks.get))
    return tokens


story_merges = learn_merges(count_words(stories), 300)
ranks = {pair: rank for rank, pair in enumerate(story_merges)}
for word in (" night", " knight", " goodness", " Zoë"):
    print(f"{word!r:13}", *naive_encode(word.encode(), ranks))

# %% [markdown]
# The stories are full of nights, so this word is one token. A word that training never saw falls
# into pieces that it did see, in the worst case into bytes.

# %% [markdown] tags=["engine"]
# ### Engine room: long words in a time of order n log n, and words seen before

# %% [markdown] tags=["engine"]
# Searching all pairs before each merge takes a time that grows with the square of the word's
# length. Most words are short, but there are texts without spaces, and hostile users who send a
# million times the letter `a`. So we link the tokens to a chain and keep the mergeable pairs in a
# heap, by rank and position: $n$ bytes take a time of order $n \log n$. An entry may be stale,
# since a neighbor has been merged in the meantime. Then the pair at its position has another rank,
# and the entry is dropped.


# %% tags=["engine"]
#| export
def _apply_merges(
    tokens: list[int], ranks: dict[tuple[int, int], int], merged: list[int]
) -> list[int]:
    """Merge neighbors by rank, then from the left; ``merged`` has the token for each rank."""
    size = len(tokens)
    after, before = list(range(1, size + 1)), list(range(-1, size - 1))
    found = map(ranks.get, pairwise(tokens))
    heap = [rank * size + place for place, rank in enumerate(found) if rank is not None]
    heapify(heap)
    while heap:
        rank, place = divmod(heappop(heap), size)
        neighbor = after[place]
        if neighbor == size or ranks.get((tokens[place], tokens[neighbor])) != rank:
            continue
        new = tokens[place] = merged[rank]
        tokens[neighbor] = -1  # no token, so entries that begin here are stale
        beyond = after[place] = after[neighbor]
        if beyond < size:
            before[beyond] = place
            if (rank_after := ranks.get((new, tokens[beyond]))) is not None:
                heappush(heap, rank_after * size + place)
        previous = before[place]
        if previous >= 0 and (rank_before := ranks.get((tokens[previous], new))) is not None:
            heappush(heap, rank_before * size + previous)
    return [token for token in tokens if token >= 0]


# %% [markdown] tags=["engine"]
# Even so this runs in Python, byte by byte. But words repeat, and the merges of a word never depend
# on its neighbors. So its ids are remembered, in a dictionary that calls `__missing__` for keys
# that it does not have. It is emptied when it is full, and long words are not kept: memory stays
# constant on endless text.


# %% tags=["engine"]
#| export
class WordCache(dict[str, tuple[int, ...]]):
    """Ids of words, found by ``encode`` when first asked for; bounded in number and length."""

    def __init__(
        self, encode: Callable[[str], tuple[int, ...]], size: int = 1 << 17, longest: int = 64
    ) -> None:
        """Make an empty cache for ``size`` words of at most ``longest`` characters."""
        super().__init__()
        check_at_least(size=(1, size), longest=(0, longest))
        if not callable(encode):
            raise ValueError(f"encode: expected a function of a word, got {encode!r:.60}")
        self._encode, self._size, self._longest = encode, size, longest

    def __missing__(self, word: str) -> tuple[int, ...]:
        """Encode a new word, and remember it if it is not too long."""
        ids = self._encode(word)
        if len(word) <= self._longest:
            if len(self) >= self._size:
                self.clear()
            self[word] = ids
        return ids


# %% [markdown]
# ## Special tokens, and text that pretends
#
# A model needs marks for the end of a document and the turns of a conversation. `<|endoftext|>` is
# such a **special token**: one id, outside of all merges. But what if a user types these thirteen
# characters? If they became the special id, anybody could end the assistant's turn and speak in
# its name. So by default they are *ordinary text*, and whoever wants the id says so with
# `allowed_special`. Where several begin at one place, the longest wins.
#
# Encoding then has two layers: find the special tokens that are allowed, and give what lies between
# them to the merges, here called `ordinary`. `_finder` is a regular expression of the allowed
# tokens, the longest first.

# %%
#| export
_Allowed = Literal["all"] | Collection[str]


class SpecialTokens(dict[str, int]):
    """Special tokens and their ids; finds those that are allowed in a text, the longest first."""

    def allowed(self, allowed_special: _Allowed) -> tuple[str, ...]:
        """Return the tokens that are allowed, after a check that all of them are known."""
        chosen = self if allowed_special == "all" else allowed_special
        if isinstance(chosen, str) or not set(chosen) <= set(self):
            expected = f"'all' or some of {sorted(self)}"
            raise ValueError(f"allowed_special: expected {expected}, got {allowed_special!r}")
        return tuple(sorted(chosen))

    def encode(
        self, text: str, allowed: tuple[str, ...], ordinary: Callable[[str], list[int]]
    ) -> list[int]:
        """Give ``allowed`` tokens their ids, and what lies between them those of ``ordinary``."""
        if not allowed:
            return ordinary(text)
        ids, place = list[int](), 0
        for match in _finder(allowed).finditer(text):
            ids += ordinary(text[place : match.start()])
            ids.append(self[match[0]])
            place = match.end()
        return ids + ordinary(text[place:])


# %% [markdown]
# With bytes alone as ordinary tokens, and one special token, the two readings of a message are:

# %%
marks = SpecialTokens({"<|endoftext|>": 256})
for allowed in ((), "all"):
    ids = marks.encode("Hi<|endoftext|>", marks.allowed(allowed), lambda text: list(text.encode()))
    print(f"allowed_special={allowed!r}:", *ids)

# %% [markdown]
# ## Decoding, and half characters
#
# Decoding is easier: look up the bytes of each id, join them, read them as UTF-8. But a model may
# produce *any* sequence of ids, and bytes that are no UTF-8 become `�`. When text appears on the
# screen while the model writes, a token may end in the middle of a character; an incremental
# decoder keeps the bytes of an unfinished character until the rest is there.


# %%
#| export
def _decode_stream(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield text as soon as its characters are complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


# %% [markdown]
# A smiley has four bytes, which come in two pieces here. Decoded one by one, each half is broken:

# %%
pieces = [b"Good", b" night ", b"\xf0\x9f", b"\x99\x82"]
print("each by itself:", [piece.decode("utf-8", "replace") for piece in pieces])
print("as a stream:   ", list(_decode_stream(pieces)))

# %% [markdown]
# ## The tokenizer
#
# A tokenizer knows its tokens, its merges, its special tokens and a pattern. Ids may come in any
# order, since GPT-2's do: its first 256 are the bytes in an order of their own. What is known is a
# frozen dataclass, so two tokenizers that know the same are equal. From it, look-up tables are made
# once: the ids of bytes, the rank of each pair, the bytes of each id, and the cache of words
# (`_Tables`, in the engine room below).


# %%
#| export
@dataclass(frozen=True, repr=False)
class BPETokenizer:
    """A byte-level BPE tokenizer: text to ids and back, without loss for any valid text.

    ``vocabulary`` has the bytes of each id, all 256 single bytes among them; ``merges`` apply in
    their order; ``special_tokens`` have ids of their own; ``pattern`` cuts words. With
    ``ignore_merges`` a word that is a token is taken as it is. Bad input raises a ``ValueError``.
    """

    vocabulary: Mapping[int, bytes]
    merges: Sequence[tuple[bytes, bytes]]
    _: KW_ONLY
    special_tokens: dict[str, int] = field(default_factory=dict)
    pattern: str = GPT4_PATTERN
    ignore_merges: bool = False
    steps: "TextSteps" = field(default_factory=lambda: TextSteps())
    _tables: "_Tables" = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Copy what was given, check it, and make the look-up tables."""
        own = vars(self)  # what is frozen for others
        own.update(vocabulary=dict(self.vocabulary), merges=list(self.merges))
        own.update(special_tokens=dict(self.special_tokens))
        own["_tables"] = _Tables(self)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; of ids without gaps, how many there are."""
        return self._tables.size

    def encode(self, text: str, *, allowed_special: _Allowed = ()) -> list[int]:
        """Return the ids of ``text``. Special tokens in it are ordinary text unless allowed."""
        special, ordinary = self._tables.special, self._tables.encode
        return special.encode(valid_text(text), special.allowed(allowed_special), ordinary)


# %% [markdown]
# A long class is written in several cells. A cell that continues it says so: in the notebook it
# makes a subclass of the same name, in the package all parts are one class. Here are decoding and
# its stream; `_pieces` yields the bytes of each id.


# %%
#| export
class BPETokenizer(BPETokenizer):  # continued
    def decode_bytes(
        self, ids: Iterable[SupportsInt], *, skip_special_tokens: bool = False
    ) -> bytes:
        """Return the bytes that ``ids`` stand for, valid UTF-8 or not."""
        return b"".join(self._pieces(ids, skip_special_tokens))

    def decode(self, ids: Iterable[SupportsInt], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``ids`` (a list, array or tensor); invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode(
            "utf-8", "replace"
        )

    def decode_stream(
        self, ids: Iterable[SupportsInt], *, skip_special_tokens: bool = False
    ) -> Iterator[str]:
        """Yield text as soon as its characters are complete; joined it is what ``decode`` gives."""
        return _decode_stream(self._pieces(ids, skip_special_tokens))


# %% [markdown]
# After training, ids 0 to 255 are the bytes, then come the merges in their order, special tokens
# last. Therefore the first merges of a tokenizer are what training with a smaller vocabulary would
# have learned, and a smaller tokenizer costs nothing.


# %%
#| export
def _in_order_of_training(
    merges: Sequence[tuple[bytes, bytes]], special: Collection[str]
) -> tuple[dict[int, bytes], dict[str, int]]:
    """Give ids: to the bytes, then to what merges make, then to special tokens."""
    tokens = [*(bytes([byte]) for byte in range(256)), *(a + b for a, b in merges)]
    return dict(enumerate(tokens)), {text: len(tokens) + i for i, text in enumerate(special)}


class BPETokenizer(BPETokenizer):  # continued
    @classmethod
    def from_merges(
        cls,
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Collection[str] = ("<|endoftext|>",),
        *,
        pattern: str = GPT4_PATTERN,
    ) -> "BPETokenizer":
        """Return the tokenizer with ids as training gives them: bytes, merges, special tokens."""
        vocabulary, special = _in_order_of_training(merges, check_special_tokens(special_tokens))
        return cls(vocabulary, merges, special_tokens=special, pattern=pattern)

    def truncated(self, vocab_size: int) -> "BPETokenizer":
        """Return what training with a smaller ``vocab_size`` gives; special tokens stay last."""
        special = list(self.special_tokens)
        check_at_least(vocab_size=(256 + len(special), vocab_size))
        in_order = _in_order_of_training(self.merges, special)
        if (self.vocabulary, self.special_tokens) != in_order or self.ignore_merges:
            raise ValueError("truncated: expected a tokenizer with ids in the order of training")
        merges = self.merges[: vocab_size - 256 - len(special)]
        return BPETokenizer.from_merges(merges, special, pattern=self.pattern)


# %% [markdown]
# Training is now to count words, learn merges, and number the tokens. `_train` does so after it has
# checked the settings.


# %%
#| export
def train_bpe(
    texts: Iterable[str | Document],
    vocab_size: int,
    *,
    pattern: str = GPT4_PATTERN,
    special_tokens: Collection[str] = ("<|endoftext|>",),
    workers: int = 1,
) -> BPETokenizer:
    """Train a tokenizer on ``texts``: ids 0-255 are the bytes, then merges, special tokens last.

    ``vocab_size`` counts all of them; there are fewer where the texts have no more pairs. Special
    tokens in the texts separate, and are not learned. Words are counted by ``workers`` processes;
    with one, texts are read as they come. No text at all raises a ``ValueError``.

    >>> tokenizer = train_bpe(["low lower lowest"], 260)
    >>> tokenizer.encode("low"), tokenizer.decode([257, 101])
    ([257], 'lowe')
    """
    return _train(
        lambda special: count_words(texts, pattern, special, workers),
        vocab_size,
        pattern,
        special_tokens,
    )


# %% [markdown] tags=["engine"]
# ### Engine room: vocabularies checked, tables made, files trained on (`train_bpe_files`)

# %% [markdown] tags=["engine"]
# All bytes must have an id, or some text could not be encoded. Bad vocabularies are refused when
# they are given, not when a text hits them.


# %% tags=["engine"]
#| export
def _checked_vocabulary(vocabulary: object) -> dict[bytes, int]:
    """Return the ids of ordinary tokens by their bytes, or say what is wrong with them."""
    if not isinstance(vocabulary, Mapping):
        kind, example = type(vocabulary).__name__, "such as {0: b'a'}"
        raise ValueError(f"vocabulary: expected ids with their bytes, {example}, got {kind}")
    ids: dict[bytes, int] = {}
    for id, token in vocabulary.items():
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise ValueError(f"vocabulary: expected ids from 0 on, got {id!r:.60}")
        if not isinstance(token, bytes):
            raise ValueError(f"vocabulary: expected bytes for id {id}, got {token!r:.60}")
        if not token or token in ids:
            raise ValueError(f"vocabulary: expected different, non-empty tokens, got {token!r}")
        ids[token] = id
    if missing := [byte for byte in range(256) if bytes([byte]) not in ids]:
        raise ValueError(f"vocabulary: expected all 256 bytes, {missing[0]:#04x} is missing")
    return ids


# %% [markdown] tags=["engine"]
# Merges must be pairs, and about tokens of the vocabulary.


# %% tags=["engine"]
#| export
def _checked_pairs(merges: object) -> list[tuple[bytes, bytes]]:
    """Return ``merges`` as a list of pairs of bytes."""
    if isinstance(merges, str | bytes | Mapping) or not isinstance(merges, Iterable):
        raise ValueError(f"merges: expected pairs of bytes in order, got {merges!r:.60}")
    pairs: list[tuple[bytes, bytes]] = []
    for place, pair in enumerate(merges):
        if not isinstance(pair, tuple | list) or list(map(type, pair)) != [bytes, bytes]:
            raise ValueError(f"merges: expected pairs of bytes, got {pair!r:.60} at index {place}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _ranked(
    merges: Sequence[tuple[bytes, bytes]], ids: dict[bytes, int]
) -> tuple[dict[tuple[int, int], int], list[int]]:
    """Return the rank of each pair of ids, and the id that each merge makes."""
    for a, b in merges:
        if unknown := [token for token in (a, b, a + b) if token not in ids]:
            raise ValueError(f"merges: {a!r} and {b!r}: {unknown[0]!r} is not in the vocabulary")
    ranks = {(ids[a], ids[b]): rank for rank, (a, b) in enumerate(merges)}
    if len(ranks) < len(merges):
        repeated = Counter(merges).most_common(1)[0][0]
        raise ValueError(f"merges: expected each pair once, got {repeated} several times")
    return ranks, [ids[a + b] for a, b in merges]


# %% [markdown] tags=["engine"]
# Special tokens come with their ids, or as a list. From a list, a token that the vocabulary has
# keeps the id it has there, as `<|endoftext|>` does in GPT-2's files; the others get the next ids.


# %% tags=["engine"]
#| export
def _token_ids(argument: str, tokens: object) -> dict[str, int]:
    """Return ``tokens``, texts with their ids, or say what is wrong with them."""
    if not isinstance(tokens, Mapping):
        kind, example = type(tokens).__name__, "such as {'<a>': 0}"
        raise ValueError(f"{argument}: expected texts with their ids, {example}, got {kind}")
    for text, id in tokens.items():
        if not isinstance(text, str) or not text or valid_text(text) != text:
            raise ValueError(f"{argument}: expected non-empty, valid texts, got {text!r:.60}")
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise ValueError(f"{argument}: expected ids from 0 on, got {id!r:.60} for {text!r}")
    return dict(tokens)


def _numbered(tokens: object, ids: dict[bytes, int], added: Mapping[str, int]) -> dict[str, int]:
    """Return special tokens with their ids; those of a list are the vocabulary's or the next."""
    if isinstance(tokens, Mapping):
        return _token_ids("special_tokens", tokens)
    texts = check_special_tokens(tokens)  # type: ignore[arg-type]
    first = 1 + max(chain(ids.values(), added.values()), default=-1)
    new = [text for text in texts if text.encode() not in ids]
    known = {text: ids[text.encode()] for text in texts if text not in new}
    ids_of = known | {text: first + place for place, text in enumerate(new)}
    return {text: ids_of[text] for text in texts}


# %% [markdown] tags=["engine"]
# The files of others ask for more than cuts and merges, and `TextSteps` gathers it. A *normalizer*
# makes equal what looks equal: NFC writes an `e` and an accent as the one code point `é`. *Added
# tokens* that are not special, such as the `<think>` of some models, are found in every text, but
# they belong to the text: decoding never skips them. A *post-processor* puts tokens around every
# text, such as Llama's mark for the beginning.


# %% tags=["engine"]
#| export
@dataclass(frozen=True)
class TextSteps:
    """What is done to a text besides cutting and merging; by default, nothing.

    ``normalizer`` is None or "NFC". ``added_tokens`` and their ids are found in every text, and are
    not special. Tokens are looked for before the text is normalized; those in ``normalized``,
    special or added, after that. ``encode`` puts the tokens of ``prefix`` and ``suffix``, which
    are special or added, around a text.
    """

    normalizer: Literal["NFC"] | None = None
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    normalized: Collection[str] = ()
    prefix: Sequence[str] = ()
    suffix: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Copy what was given, and check what can be checked without the vocabulary."""
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, ("NFC",))
        own = vars(self)  # what is frozen for others
        own.update(added_tokens=_token_ids("added_tokens", self.added_tokens))
        for argument in ("normalized", "prefix", "suffix"):
            tokens = own[argument]
            if isinstance(tokens, str) or not isinstance(tokens, Iterable):
                raise ValueError(f"{argument}: expected several tokens, got {tokens!r:.60}")
            own[argument] = tuple(check_text(token, argument) for token in tokens)
        own.update(normalized=tuple(sorted(set(self.normalized))))


# %% [markdown] tags=["engine"]
# A text must not have two ids, nor an id two texts. An ordinary token may be made special, though,
# if it keeps its id: it is then found where it is allowed, skipped by `skip_special_tokens`, and
# made by merges as before, also from what a user types.


# %% tags=["engine"]
#| export
def _checked_names(
    ids: dict[bytes, int], special: Mapping[str, int], steps: TextSteps
) -> SpecialTokens:
    """Return special and added tokens, after a check that their ids are their own."""
    if both := sorted(special.keys() & steps.added_tokens.keys()):
        raise ValueError(f"added_tokens: expected tokens that are not special, got {both[0]!r}")
    named = SpecialTokens({**special, **steps.added_tokens})
    ordinary = {id: token for token, id in ids.items()}
    used = Counter(named.values())
    for text, id in named.items():
        argument, data = "special_tokens" if text in special else "added_tokens", text.encode()
        if ids.get(data, id) != id:
            expected = f"{text!r} is an ordinary token already, with id {ids[data]}"
            raise ValueError(f"{argument}: {expected}, got {id}")
        if used[id] > 1 or ordinary.get(id, data) != data:
            raise ValueError(f"{argument}: expected ids of their own, got {id} again")
    for argument in ("normalized", "prefix", "suffix"):
        if unknown := [text for text in getattr(steps, argument) if text not in named]:
            expected = "expected special or added tokens"
            raise ValueError(f"{argument}: {expected}, got {unknown[0]!r}")
    return named


# %% [markdown] tags=["engine"]
# The constructor sorts this out. A token of the vocabulary that is special and has no part in a
# merge is no ordinary token.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def __init__(
        self,
        vocabulary: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        *,
        special_tokens: Mapping[str, int] | Collection[str] = (),
        pattern: str = GPT4_PATTERN,
        ignore_merges: bool = False,
        steps: "TextSteps | None" = None,
    ) -> None:
        """Make a tokenizer; a list of ``special_tokens`` gets the vocabulary's or the next ids."""
        if not isinstance(ignore_merges, bool):
            raise ValueError(f"ignore_merges: expected True or False, got {ignore_merges!r:.60}")
        if not isinstance(steps, TextSteps | None):
            raise ValueError(f"steps: expected TextSteps, got {type(steps).__name__}")
        steps, merges, ids = (
            steps or TextSteps(),
            _checked_pairs(merges),
            _checked_vocabulary(vocabulary),
        )
        special = _numbered(special_tokens, ids, steps.added_tokens)
        named = {text.encode(): id for text, id in {**special, **steps.added_tokens}.items()}
        if apart := {token for token, id in named.items() if ids.get(token) == id}:
            apart -= {part for a, b in merges for part in (a, b, a + b)} | {
                bytes([byte]) for byte in range(256)
            }
            vocabulary = {id: token for id, token in vocabulary.items() if token not in apart}
        own: Any = vars(self)
        own.update(vocabulary=vocabulary, merges=merges, special_tokens=special)
        own.update(pattern=pattern, ignore_merges=ignore_merges, steps=steps)
        self.__post_init__()


# %% [markdown] tags=["engine"]
# From what it knows a tokenizer makes its tables. `ignore_merges` is a switch in some tokenizers'
# files: a word that is a token is taken as it is, even where merges would not make it.


# %% tags=["engine"]
#| export
class _Tables:
    """What encoding and decoding look things up in, made from what a tokenizer knows."""

    def __init__(self, known: BPETokenizer) -> None:
        self.special, self.steps = SpecialTokens(known.special_tokens), known.steps
        self.ids = _checked_vocabulary(known.vocabulary)
        self.named = _checked_names(self.ids, self.special, self.steps)
        self.tokens = {**known.vocabulary, **{id: t.encode() for t, id in self.named.items()}}
        self.size = max(self.tokens) + 1
        self.byte_ids = [self.ids[bytes([byte])] for byte in range(256)]
        self.ranks, self.merged = _ranked(known.merges, self.ids)
        self.ignore_merges = known.ignore_merges
        self.split, self.words = _splitter(known.pattern), WordCache(self.encode_word)
        self.prefix, self.suffix = (
            [self.named[text] for text in texts] for texts in (self.steps.prefix, self.steps.suffix)
        )

    def merge(self, data: bytes) -> list[int]:
        """Return the ids that the merges make of ``data``."""
        return _apply_merges([self.byte_ids[byte] for byte in data], self.ranks, self.merged)

    def encode_word(self, word: str) -> tuple[int, ...]:
        """Return the ids of ``word``, which is cut no further if it is a token and that counts."""
        data = word.encode()
        whole = self.ids.get(data) if self.ignore_merges else None
        return tuple(self.merge(data)) if whole is None else (whole,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without special tokens."""
        return list(chain.from_iterable(map(self.words.__getitem__, self.split(text))))


# %% [markdown] tags=["engine"]
# Tokens are found in two passes, as `tokenizers` does it: most of them in the text as it is given,
# and those in `normalized` in what the normalizer makes of the stretches between.


# %% tags=["engine"]
#| export
class _Tables(_Tables):  # continued
    def normalize(self, text: str) -> str:
        """Return ``text`` as the normalizer writes it."""
        return normalize("NFC", text) if self.steps.normalizer else text

    def encode_named(
        self, text: str, allowed: tuple[str, ...], ordinary: Callable[[str], list[int]]
    ) -> list[int]:
        """Return the ids of ``text``, in which ``allowed`` and all added tokens are found."""
        steps = self.steps
        if not steps.added_tokens and not steps.normalizer:
            return self.special.encode(text, allowed, ordinary)
        found = {*allowed, *steps.added_tokens}
        late = SpecialTokens(
            {self.normalize(t): self.named[t] for t in found & {*steps.normalized}}
        )

        def between(part: str) -> list[int]:
            return late.encode(self.normalize(part), tuple(sorted(late)), ordinary)

        return self.named.encode(text, tuple(sorted(found - {*steps.normalized})), between)


# %% [markdown] tags=["engine"]
# Which special tokens may stand in a text, and which must not? Ordinary text is one answer to a
# user who types them; an error is another, which tiktoken gives by default. `disallowed_special`
# asks for it.


# %% tags=["engine"]
#| export
class SpecialTokens(SpecialTokens):  # continued
    def allowed(self, allowed_special: _Allowed) -> tuple[str, ...]:
        """Return the tokens that are allowed, after a check that all of them are known."""
        return self._chosen("allowed_special", allowed_special, self)

    def disallowed(
        self, disallowed_special: _Allowed, allowed: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Return the tokens that must not stand in a text; "all" are those not in ``allowed``."""
        rest = [token for token in self if token not in allowed]
        return self._chosen("disallowed_special", disallowed_special, rest)

    def _chosen(self, argument: str, chosen: object, whole: Iterable[str]) -> tuple[str, ...]:
        every = whole if isinstance(chosen, str) and chosen == "all" else chosen
        if (
            isinstance(every, str | bytes)
            or not isinstance(every, Collection)
            or not all(isinstance(token, str) and token in self for token in every)
        ):
            expected = f"'all' or some of {sorted(self)}"
            raise ValueError(f"{argument}: expected {expected}, got {chosen!r}")
        return tuple(sorted(every))

    def refuse(self, text: str, disallowed: tuple[str, ...]) -> None:
        """Raise a ``ValueError`` if ``text`` has one of the ``disallowed`` tokens."""
        if disallowed and (match := _finder(disallowed).search(text)):
            place = f"the special token {match[0]!r}, at character {match.start()}"
            raise ValueError(f"text: expected none of disallowed_special, got {place}")

    def between(self, text: str) -> list[str]:
        """Return the stretches of ``text`` before, between and after special tokens."""
        return _finder(tuple(self)).split(valid_text(text))


# %% [markdown] tags=["engine"]
# With all this, encoding is:


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def encode(
        self,
        text: str,
        *,
        allowed_special: _Allowed = (),
        disallowed_special: _Allowed = (),
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Return the ids of ``text``. Special tokens in it are ordinary text unless allowed.

        Those in ``disallowed_special`` raise a ``ValueError``; "all" are those not allowed. A
        prefix and a suffix that the tokenizer has are added unless ``add_special_tokens=False``.
        """
        tables, text = self._tables, valid_text(text)
        allowed = tables.special.allowed(allowed_special)
        tables.special.refuse(text, tables.special.disallowed(disallowed_special, allowed))
        ids = tables.encode_named(text, allowed, tables.encode)
        return [*tables.prefix, *ids, *tables.suffix] if add_special_tokens else ids


# %% [markdown] tags=["engine"]
# Decoding looks closely at what it is given: a float or a boolean is no id, nor is a number outside
# of the vocabulary, or in a gap of it. Pickle gets what is known without the tables: another
# process makes its own, and begins with an empty cache.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def _pieces(self, ids: Iterable[SupportsInt], skip_special_tokens: bool) -> Iterator[bytes]:
        """Return the bytes of each id, of special tokens only if they are not to be skipped."""
        values = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(values, str | bytes) or not isinstance(values, Iterable):
            raise ValueError(f"ids: expected several ids, such as [65], got {ids!r:.60}")
        hidden = set(self.special_tokens.values()) if skip_special_tokens else set[int]()
        return (piece for id, piece in self._checked_pieces(values) if id not in hidden)

    def _checked_pieces(self, ids: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
        """Yield each id and its bytes; a ``ValueError`` says where something else stands."""
        for place, given in enumerate(ids):
            try:
                id = -1 if isinstance(given, bool) else operator.index(given)
            except TypeError:
                id = -1
            if (piece := self._tables.tokens.get(id)) is None:
                gap = 0 <= id < self.vocab_size
                expected = f"ids of the vocabulary, below {self.vocab_size}"
                expected = "ids that a token has" if gap else expected
                raise ValueError(f"ids: expected {expected}, got {given!r:.60} at index {place}")
            yield id, piece

    def __repr__(self) -> str:
        """Return the size and the special tokens; all of it would fill a screen."""
        special = self.special_tokens
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, special_tokens={special})"

    def __reduce__(self) -> Any:
        """Pickle what is known, without the tables."""
        options: Any = {"pattern": self.pattern, "ignore_merges": self.ignore_merges}
        options |= {"special_tokens": self.special_tokens, "steps": self.steps}
        return partial(type(self), **options), (self.vocabulary, self.merges)


# %% [markdown] tags=["engine"]
# A batch of texts can be spread over processes. The answers come in the order of the texts.


# %% tags=["engine"]
#| export
def _encode_job(job: tuple[BPETokenizer, list[str], dict[str, Any]]) -> list[list[int]]:
    """What a worker does: encode some texts."""
    tokenizer, texts, options = job
    return [tokenizer.encode(text, **options) for text in texts]


class BPETokenizer(BPETokenizer):  # continued
    def encode_batch(
        self,
        texts: Iterable[str],
        workers: int = 1,
        *,
        allowed_special: _Allowed = (),
        disallowed_special: _Allowed = (),
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Return the ids of each of ``texts``, in order, encoded by ``workers`` processes."""
        check_at_least(workers=(1, workers))
        special = self._tables.special
        options = {
            "allowed_special": special.allowed(allowed_special),
            "disallowed_special": special.disallowed(disallowed_special, allowed_special),
            "add_special_tokens": add_special_tokens,
        }
        jobs = [(self, batch, options) for batch in _batches(texts)]
        return list(chain.from_iterable(ordered_map(_encode_job, jobs, workers)))


# %% [markdown] tags=["engine"]
# Training from texts and from files differs only in how words are counted.


# %% tags=["engine"]
#| export
def _train(
    count: Callable[[tuple[str, ...]], Counter[str]],
    vocab_size: int,
    pattern: str,
    special_tokens: Collection[str],
    argument: str = "texts",
) -> BPETokenizer:
    """Check, count, learn, and build; ``argument`` is what the caller calls the texts."""
    special = check_special_tokens(special_tokens)
    check_at_least(vocab_size=(256 + len(special), vocab_size))
    if vocab_size > 1_000_000:
        raise ValueError(f"vocab_size: expected at most 1,000,000, got {vocab_size}")
    _splitter(pattern)
    if clash := [token for token in special if len(token.encode()) == 1]:
        raise ValueError(f"special_tokens: {clash[0]!r} is an ordinary token, a byte")
    counts = count(special)
    if not counts:
        raise ValueError(f"{argument}: expected some text to train on, got none")
    merges = learn_merges(counts, vocab_size - 256 - len(special))
    return BPETokenizer.from_merges(merges, special, pattern=pattern)


# %% tags=["engine"]
#| export
def train_bpe_files(
    paths: str | Path | Iterable[str | Path],
    vocab_size: int,
    *,
    pattern: str = GPT4_PATTERN,
    special_tokens: Collection[str] = ("<|endoftext|>",),
    workers: int | None = None,
    errors: Literal["strict", "replace"] = "strict",
) -> BPETokenizer:
    """Train as ``train_bpe`` does, on UTF-8 files, whose words several processes count.

    Files are cut into chunks only at special tokens, so a file without any is one chunk, in the
    memory of one worker. By default as many work as there are cores, at most four. Bytes that are
    no UTF-8 raise a ``ValueError`` with file and place, or become U+FFFD (``errors="replace"``).
    """
    check_at_least(workers=(1, workers))
    if errors not in ("strict", "replace"):
        raise ValueError(f"errors: expected 'strict' or 'replace', got {errors!r}")
    files = existing_paths(paths)
    return _train(
        lambda special: _count_files(files, pattern, special, workers, errors),
        vocab_size,
        pattern,
        special_tokens,
        "paths",
    )


# %% [markdown]
# ## The tokenizer at work
#
# For the documents the merges are there already. For the stories we train:

# %%
tokenizer = BPETokenizer.from_merges(merges)
print(tokenizer)
of_stories = train_bpe(stories, 600)
sentence = "Mia said: good night, baker 🙂!"
ids = of_stories.encode(sentence)
print([of_stories.decode([id]) for id in ids])
assert of_stories.decode(ids) == sentence and "�" not in list(of_stories.decode_stream(ids))
print(f"{len(sentence.encode())} bytes in {len(ids)} tokens")

# %% [markdown]
# The stories hold no emoji, so it is cut into its four bytes; `decode_stream` shows no `�` all the
# same. {numref}`fig-tokenizer-cut` shows how vocabularies of different size cut the same text.

# %% mystnb={"figure": {"caption": "One text, cut with four vocabularies. Each stretch of one color is a token; a dot is a byte of the unfinished character ë.", "name": "fig-tokenizer-cut"}, "image": {"alt": "Four rows of colored stretches over the same text, a line of code and a comment about 12345 loaves, Zoë and documentation. As bytes every character has a color of its own and ë has two. With 1,000 tokens short pieces appear. With 8,000 and 32,000 most words have one color, loaves has two, and the number is cut into 123 and 45."}}
example = "def bake(loaves):  # 12345 loaves, said Zoë; the documentation follows"
figure, ax = plt.subplots(figsize=(7, 2.2))
for row, size in enumerate((257, 1_000, 8_000, 32_000)):
    small = tokenizer.truncated(size)
    x = 0.0
    for number, id in enumerate(small.encode(example)):
        piece = small.decode([id]).replace("�", "·")
        width = len(piece) if "·" not in piece else 0.5
        ax.add_patch(plt.Rectangle((x, row), width, 0.8, color=f"C{number % 5}", alpha=0.3, lw=0))
        for place, character in enumerate(piece):
            middle = x + (place + 0.5) * width / len(piece)
            ax.text(
                middle, row + 0.4, character, ha="center", va="center", family="monospace", size=7
            )
        x += width
    ax.text(-1, row + 0.4, f"{size:,}" if size > 257 else "bytes", ha="right", va="center")
ax.set(xlim=(-6, x), ylim=(4, -0.2))
ax.axis("off")
plt.show()

# %% [markdown]
# Each row has fewer and longer pieces than the one above it. No piece reaches from `123` into `45`:
# that is the pattern's doing, not the training's.

# %% [markdown] tags=["engine"]
# ### Engine room: encoding a stream in constant memory

# %% [markdown] tags=["engine"]
# A crawl does not fit into memory. `encode_iterable` takes its pieces and gives ids as it goes,
# *the same ids* as for the whole text, wherever the pieces end. So we hold text back until a place
# where cutting is safe: where the words to the left do not depend on what comes to the right, nor
# the other way.
#
# The right side is no problem. None of the patterns looks behind, so from a border between words
# on, the words depend only on what follows. For the left side, take a place between a character
# $x$ that is not white space and a space (or other white space that is no line break). It is a
# border: in no alternative does such white space follow anything but white space. And the words
# before it would be the same if the text ended there: the alternatives that look ahead are those
# for white space, and what they see is $x$ or something before it; all others stop before the
# space, as they would at the end. A place between a letter or digit and something that is no
# letter, digit, mark or apostrophe is safe for the same reasons. That helps Chinese, which has no
# spaces.
#
# With a pattern of your own no place is known to be safe but a special token. These may be cut
# themselves: if the longest has $m$ characters, then whether one begins at a place is certain once
# $m$ characters from there have arrived. We look for a cut only up to there. The `(?r)` makes the
# search run backward, so that it finds the last safe place first.

# %% tags=["engine"]
#| export
_STREAM_SIZE = 1 << 16  # characters to gather before looking for a place to cut
_SAFE_CUT = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{M}\p{N}'])|(?<=\S)(?=[^\S\r\n])")


def _safe_end(text: str, pattern: str, allowed: tuple[str, ...]) -> int:
    """Return a place in ``text`` up to which its ids cannot depend on what follows it."""
    certain, end = len(text) - max(map(len, allowed), default=1), 0
    for match in _finder(allowed).finditer(text):
        if match.start() > certain:
            break
        end = match.end()
    if pattern in _KNOWN_PATTERNS and end < certain:
        cut = _SAFE_CUT.search(text, end, certain + 1)
        end = cut.start() if cut else end
    return end


# %% [markdown] tags=["engine"]
# A piece may end in the first half of a surrogate pair.


# %% tags=["engine"]
#| export
def _joined_halves(texts: Iterable[str]) -> Iterator[str]:
    """Return ``texts`` in valid Unicode, joining a surrogate that ends one to what follows."""
    if isinstance(texts, str):
        raise ValueError("texts: expected an iterable of texts, got one str: use encode")
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected an iterable of texts, got {texts!r:.60}")
    return _each_joined(texts)


def _each_joined(texts: Iterable[str]) -> Iterator[str]:
    half = ""
    for number, text in enumerate(texts):
        text = half + check_text(text, f"texts[{number}]")
        half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        yield whole_characters(text[: len(text) - len(half)])
    yield whole_characters(half)


# %% [markdown] tags=["engine"]
# Pieces are gathered, and the search begins when there is enough; if it finds nothing, it waits for
# twice as much. So a run of a million letters without any safe place takes memory for itself, and
# time that grows no faster than its length. A normalizer changes nothing about this: no character
# after which we cut, nor the one before, is composed with the other.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def encode_iterable(
        self,
        texts: Iterable[str],
        *,
        allowed_special: _Allowed = (),
        disallowed_special: _Allowed = (),
        add_special_tokens: bool = True,
    ) -> Iterator[int]:
        """Yield the joined texts' ids: in constant memory with GPT-2's and GPT-4's patterns.

        Where tokens are looked for in normalized text, all of it is gathered first.
        """
        tables = self._tables
        allowed = tables.special.allowed(allowed_special)
        disallowed = tables.special.disallowed(disallowed_special, allowed)
        stream = self._encode_stream(_joined_halves(texts), allowed, disallowed)
        around = (tables.prefix, tables.suffix) if add_special_tokens else ((), ())
        return chain(around[0], chain.from_iterable(stream), around[1])


# %% [markdown] tags=["engine"]
# The loop over the pieces:


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def _encode_stream(
        self, texts: Iterator[str], allowed: tuple[str, ...], disallowed: tuple[str, ...]
    ) -> Iterator[list[int]]:
        """Yield the ids of the joined ``texts``, some thousands at a time."""
        encode = partial(self.encode, allowed_special=allowed, disallowed_special=disallowed)
        marks = tuple({*allowed, *disallowed, *self.steps.added_tokens})
        parts, gathered, enough = list[str](), 0, _STREAM_SIZE
        for text in texts:
            parts.append(text)
            gathered += len(text)
            if gathered >= enough and not self.steps.normalized:
                whole = "".join(parts)
                end = _safe_end(whole, self.pattern, marks)
                yield encode(whole[:end], add_special_tokens=False)
                parts, gathered = [whole[end:]], len(whole) - end
                enough = max(_STREAM_SIZE, 2 * gathered)
        yield encode("".join(parts), add_special_tokens=False)


# %% [markdown] tags=["engine"]
# Pieces that cut words, white space and a special token give the ids of the whole:

# %% tags=["engine"]
streaming = BPETokenizer.from_merges(merges)
pieces = ["Dough ri", "ses.<|end", "oftext|>\n", " \n  Ba", "ke."] * 10_000
stream = streaming.encode_iterable(pieces, allowed_special="all")
ids = streaming.encode("".join(pieces), allowed_special="all")
assert list(stream) == ids
special = ids.count(streaming.special_tokens["<|endoftext|>"])
print(f"{len(pieces):,} pieces give the ids of the whole, {special:,} of them special")

# %% [markdown] tags=["engine"]
# And a file that two processes read in chunks gives what its texts give in one:

# %% tags=["engine"]
from llmbook.tokenizer import train_bpe_files as exported_train_bpe_files

path = Path(folder.name, "docs.txt")
path.write_text("<|endoftext|>".join(texts[:8_000]), encoding="utf-8", newline="")
chunks = _chunks(path, [b"<|endoftext|>"], path.stat().st_size // 4)
from_file = exported_train_bpe_files(path, 1_000, workers=2)
assert from_file.merges == train_bpe(texts[:8_000], 1_000).merges
print(f"a file cut into {len(chunks)} chunks; {len(from_file.merges)} merges as from its texts")

# %% [markdown]
# ## Files that others read
#
# Three formats matter. Hugging Face's `tokenizer.json` holds everything in one file. GPT-2 left
# two files, `vocab.json` and `merges.txt`. tiktoken builds its encodings from ids alone.
#
# The first two store tokens as text, which arbitrary bytes are not. GPT-2's way out was to give
# each byte a printable character: bytes that are printable in Latin-1 stand for themselves, the 68
# others get the characters from 256 on. The space, byte 32, is the 33rd of those, and becomes `Ġ`,
# number 288.

# %%
#| export
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + number) for number, byte in enumerate(_UNPRINTABLE)
}


def _as_text(token: bytes) -> str:
    """Write bytes as printable characters, one for each, as GPT-2's files do."""
    return "".join(map(_BYTE_TO_CHARACTER.__getitem__, token))


# %% [markdown]
# This is how tokens look in such files:

# %%
for text in (" baker", "\n\t", "Zoë", "🙂"):
    print(f"{text!r:10} {_as_text(text.encode())}")

# %% [markdown]
# ### Merges from ids alone
#
# tiktoken knows no merges. It joins *any* two neighbors whose bytes together are a token, the one
# with the lowest id first. Is that the same? Not for any list of merges. It is, if
#
# 1. a token's id is greater than those of the tokens that it is made of, ids of merges rising in
#    the order of the merges, and
# 2. every token is *reachable*: encoding its own bytes gives that one token.
#
# *Proof.* By (1) merging by lowest id goes through the ids from low to high, and so do we: a merge
# creates only pairs of higher rank. Suppose that both have done the same so far, and that tiktoken
# now joins neighbors $u$ and $v$ to the token $t = uv$, whereas our merge for $t$ is of another
# pair. By (2), our merges turn the bytes of $t$, standing alone, into $t$. In this there is a first
# merge that crosses the border between $u$ and $v$. It is not the last one, which joins at another
# place, so its id is lower than that of $t$. Until then, the same merges have been made in the
# text, where nothing has crossed the ends of $t$, since $u$ and $v$ still begin and end there.
# Hence this pair stood there as well, and was merged when its turn came, before $t$. Then $u$ and
# $v$ are no neighbors now, a contradiction. $\square$
#
# Tokenizers that were trained have both properties: a token was made of bytes that stood beside
# each other, and until then nothing had crossed their ends, so alone they take the same way. For
# vocabularies of other origin we check.


# %%
#| export
class BPETokenizer(BPETokenizer):  # continued
    def to_tiktoken(self, name: str = "llmbook") -> Any:
        """Return a ``tiktoken.Encoding`` with the same ids. A ``ValueError`` says why not."""
        import tiktoken

        ids, merged = self._tables.ids, self._tables.merged
        longer = ((part, a + b) for a, b in self.merges for part in (a, b) if len(part) > 1)
        rising = all(low < high for low, high in pairwise(merged))
        if not rising or any(ids[part] > ids[token] for part, token in longer):
            raise ValueError("merges: expected ids that rise in the order of the merges")
        for id, token in self.vocabulary.items():
            if self._tables.merge(token) != [id]:
                raise ValueError(f"vocabulary: expected tokens that merges make, got {token!r}")
        return tiktoken.Encoding(
            name,
            pat_str=self.pattern,
            mergeable_ranks=ids,
            special_tokens=self.special_tokens,
        )


# %% [markdown] tags=["engine"]
# #### Engine room: tokenizer.json and GPT-2's files, written and read with care

# %% [markdown] tags=["engine"]
# What goes into `tokenizer.json`: the pattern as a pre-tokenizer, the byte alphabet as a second
# one and as the decoder, and the model. Special tokens stand in the vocabulary, too, since
# `tokenizers` takes their ids from there.

# %% tags=["engine"]
#| export
_CHARACTER_TO_BYTE = {character: byte for byte, character in _BYTE_TO_CHARACTER.items()}


def _as_bytes(token: str) -> bytes:
    """Undo ``_as_text``."""
    try:
        return bytes(map(_CHARACTER_TO_BYTE.__getitem__, token))
    except KeyError:
        raise ValueError(f"expected tokens in GPT-2's byte alphabet, got {token!r}") from None


# %% tags=["engine"]
#| export
def _file_vocabulary(tables: _Tables) -> dict[str, int]:
    """Return all tokens as text with their ids, in the order of the ids."""
    ordinary, named = {_as_text(token): id for token, id in tables.ids.items()}, tables.named
    if clash := sorted(text for text, id in named.items() if ordinary.get(text, id) != id):
        raise ValueError(f"special_tokens: files write an ordinary token as {clash[0]!r}, too")
    return dict(sorted((ordinary | named).items(), key=lambda item: item[1]))


def _portable_pattern(pattern: str) -> str:
    """Return ``pattern``, unless the engine inside tokenizers would read it in another way."""
    possessive, anchor = r"\{\d*,?\d*\}\+", r"(?<![\\\[])[\^$]"
    if re.search(possessive, pattern):
        message = "expected no possessive {m,n}+, which tokenizers reads as a repetition"
        raise ValueError(f"pattern: {message}, got {pattern!r}")
    if pattern not in _KNOWN_PATTERNS and re.search(anchor, pattern):
        message = "expected no ^ or $, which tokenizers finds at every line"
        raise ValueError(f"pattern: {message}, got {pattern!r}")
    return pattern


# %% [markdown] tags=["engine"]
# What stands around a text is written as a template, `A` for the text; for two texts `A` and `B`,
# which we do not have, each gets its own.


# %% tags=["engine"]
#| export
def _template(tables: _Tables) -> dict[str, Any] | None:
    """Return the post-processor that puts prefix and suffix around a text, if there are any."""
    prefix, suffix = tables.steps.prefix, tables.steps.suffix
    if not prefix and not suffix:
        return None

    def around(name: str, number: int) -> list[dict[str, Any]]:
        before, after = (
            [{"SpecialToken": {"id": text, "type_id": number}} for text in texts]
            for texts in (prefix, suffix)
        )
        return [*before, {"Sequence": {"id": name, "type_id": number}}, *after]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            text: {"id": text, "ids": [tables.named[text]], "tokens": [text]}
            for text in sorted({*prefix, *suffix})
        },
    }


# %% [markdown] tags=["engine"]
# The list of added tokens says which are special, and which are looked for after the normalizer.


# %% tags=["engine"]
#| export
def _added_tokens(tables: _Tables) -> list[dict[str, Any]]:
    """Return special and added tokens as files list them, in the order of their ids."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return [
        {
            "id": id,
            "content": text,
            **flags,
            "normalized": text in tables.steps.normalized,
            "special": text in tables.special,
        }
        for text, id in sorted(tables.named.items(), key=lambda item: item[1])
    ]


# %% [markdown] tags=["engine"]
# Here is the whole file:


# %% tags=["engine"]
#| export
def _tokenizer_json(tokenizer: BPETokenizer) -> dict[str, Any]:
    """Return the contents of tokenizer.json."""
    tables = tokenizer._tables
    regular = {"type": "Split", "pattern": {"Regex": _portable_pattern(tokenizer.pattern)}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [{**regular, "behavior": "Isolated", "invert": False}]
    normalizer = tokenizer.steps.normalizer
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tables),
        "normalizer": {"type": normalizer} if normalizer else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, {**byte_level, "use_regex": False}],
        },
        "post_processor": _template(tables),
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token")),
            **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
            "ignore_merges": tokenizer.ignore_merges,
            "vocab": _file_vocabulary(tables),
            "merges": [[_as_text(a), _as_text(b)] for a, b in tokenizer.merges],
        },
    }


# %% [markdown] tags=["engine"]
# Reading is harder than writing, because others put more into such files than we understand. What
# would change the ids is refused by name, never ignored. `tokenizers` looks for special tokens in
# *all* text, so compare with `allowed_special="all"`.


# %% tags=["engine"]
#| export
def _read_pattern(step: Any) -> str:
    """Return the pattern of a pre-tokenizer that is byte-level, or name what it has instead."""
    steps = step["pretokenizers"] if step and step["type"] == "Sequence" else [step or {}]
    kinds = [each.get("type") for each in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space", True):
        raise ValueError(f"pre_tokenizer: expected ByteLevel without a prefix space, got {kinds}")
    use_regex = steps[-1].get("use_regex", True)
    if len(steps) == 1 and use_regex:
        return GPT2_PATTERN
    if kinds != ["Split", "ByteLevel"] or use_regex or "Regex" not in steps[0]["pattern"]:
        raise ValueError(f"pre_tokenizer: expected one Split by Regex, then ByteLevel, got {kinds}")
    how, pattern = (steps[0]["behavior"], steps[0].get("invert")), steps[0]["pattern"]["Regex"]
    keeps_all = how == ("Removed", True) and pattern in _KNOWN_PATTERNS  # they match all text
    if how not in (("Isolated", False), ("Isolated", None)) and not keeps_all:
        raise ValueError(f"pre_tokenizer: expected Split to isolate, got {how}")
    return _portable_pattern(pattern)


# %% [markdown] tags=["engine"]
# The other parts of a file are checked in one go.


# %% tags=["engine"]
#| export
def _check_supported(data: dict[str, Any]) -> None:
    """Raise a ``ValueError`` that names the first part of tokenizer.json that we cannot honor."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"model: expected BPE, got {model['type']}")
    for part in ("truncation", "padding"):
        if found := data.get(part):
            raise ValueError(f"{part}: expected none, got {found.get('type', found)}")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if found := model.get(setting):
            raise ValueError(f"model: expected no {setting}, got {found!r}")
    decoder = data.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise ValueError(f"decoder: expected ByteLevel, got {decoder.get('type')}")
    for token in data.get("added_tokens") or ():
        if flags := [f for f in ("lstrip", "rstrip", "single_word") if token.get(f)]:
            raise ValueError(f"added_tokens: {token['content']!r} has {flags[0]}, unsupported")


def _read_merges(lines: list[Any]) -> list[tuple[bytes, bytes]]:
    """Return merges that were written as "a b" or as ["a", "b"]."""
    merges = []
    for line in lines:
        parts = line.split(" ") if isinstance(line, str) else line
        if len(parts) != 2:
            raise ValueError(f"merges: expected pairs of tokens, got {line!r}")
        merges.append((_as_bytes(parts[0]), _as_bytes(parts[1])))
    return merges


# %% [markdown] tags=["engine"]
# Normalizers and post-processors may be sequences of others. The post-processor named `ByteLevel`
# only moves the places where tokens are reported; BERT's and RoBERTa's are templates of their own
# kind.


# %% tags=["engine"]
#| export
def _read_normalizer(step: Any) -> str | None:
    """Return the name of the normalizer, or None."""
    if not step:
        return None
    steps = step["normalizers"] if step["type"] == "Sequence" else [step]
    if kinds := [each["type"] for each in steps if each["type"] != "NFC"]:
        raise ValueError(f"normalizer: expected none or NFC, got {kinds[0]}")
    return "NFC" if steps else None


# %% [markdown] tags=["engine"]
# A template must have one place for one text, and tokens that are listed as added:


# %% tags=["engine"]
#| export
def _read_template(step: Any, names: dict[int, str]) -> tuple[list[str], list[str]]:
    """Return the tokens that a post-processor puts before a text, and after it."""
    steps = [step] if step else []
    steps = step["processors"] if step and step["type"] == "Sequence" else steps
    steps = [each for each in steps if each["type"] != "ByteLevel"]
    if len(steps) > 1:
        raise ValueError(f"post_processor: expected one template at most, got {len(steps)}")
    step = steps[0] if steps else {"type": "none"}
    kind = step["type"]
    around: list[list[int] | None] = [None]
    if kind in ("BertProcessing", "RobertaProcessing"):
        around = [[step["cls"][1]], None, [step["sep"][1]]]
    elif kind == "TemplateProcessing":
        known, pieces = step["special_tokens"], step["single"]
        around = [
            known[p["SpecialToken"]["id"]]["ids"] if "SpecialToken" in p else None for p in pieces
        ]
    elif kind != "none":
        raise ValueError(f"post_processor: expected a template, got {kind}")
    if around.count(None) != 1:
        raise ValueError("post_processor: expected a template with one text, got another")
    if unknown := [id for ids in around for id in ids or () if id not in names]:
        raise ValueError(f"post_processor: expected added tokens, got id {unknown[0]}")
    text = around.index(None)
    prefix, suffix = (
        [names[id] for ids in part for id in ids or ()]
        for part in (around[:text], around[text + 1 :])
    )
    return prefix, suffix


# %% [markdown] tags=["engine"]
# A file may be cut off, or be no tokenizer at all. Whatever is wrong becomes one kind of error,
# and names the file.


# %% tags=["engine"]
#| export
def checked_path(path: object, argument: str = "path") -> Path:
    """Return ``path`` as a Path; what is neither a str nor a Path raises a ``ValueError``."""
    if not isinstance(path, str | Path):
        raise ValueError(f"{argument}: expected a str or a Path, got {path!r:.60}")
    return Path(path)


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    data = json.loads(checked_path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {type(data).__name__}")
    return data


@contextmanager
def naming_file(path: str | Path) -> Iterator[Path]:
    """Give ``path``; whatever is wrong with its contents becomes a ``ValueError`` that names it."""
    path = checked_path(path)
    try:
        yield path
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(path)!r}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        message = f"not a tokenizer's file: {type(error).__name__} {error}"
        raise ValueError(f"path: {str(path)!r}: {message}") from error


# %% [markdown] tags=["engine"]
# What a tokenizer is made of, from `tokenizer.json`. Added tokens stand in the vocabulary, too. One
# that is a byte or has a part in a merge is an ordinary token that was made special.


# %% tags=["engine"]
#| export
def _from_tokenizer_json(path: Path) -> dict[str, Any]:
    """Return what a tokenizer is made of, from tokenizer.json."""
    data = read_json_object(path)
    _check_supported(data)
    vocabulary, listed = data["model"]["vocab"], data.get("added_tokens") or ()
    for token in listed:
        if (known := vocabulary.get(token["content"], token["id"])) != token["id"]:
            has = f"{token['content']!r} has id {token['id']}, in the vocabulary {known}"
            raise ValueError(f"added_tokens: expected one id for each, got: {has}")
    names = {token["content"]: token["id"] for token in listed}
    special = {t["content"]: t["id"] for t in listed if t.get("special", True)}
    merges = _read_merges(data["model"]["merges"])
    parts = {
        _as_text(part) for a, b in merges for part in (a, b, a + b)
    } | _CHARACTER_TO_BYTE.keys()
    tokens = {t: id for t, id in vocabulary.items() if t not in names or t in parts}
    prefix, suffix = _read_template(data.get("post_processor"), {i: t for t, i in names.items()})
    normalizer: Any = _read_normalizer(data.get("normalizer"))
    return {
        "vocabulary": {id: _as_bytes(token) for token, id in tokens.items()},
        "merges": merges,
        "special_tokens": special,
        "pattern": _read_pattern(data.get("pre_tokenizer")),
        "ignore_merges": bool(data["model"].get("ignore_merges")),
        "steps": TextSteps(
            normalizer=normalizer,
            added_tokens={text: id for text, id in names.items() if text not in special},
            normalized=[token["content"] for token in listed if token.get("normalized")],
            prefix=prefix,
            suffix=suffix,
        ),
    }


# %% [markdown] tags=["engine"]
# GPT-2's two files hold neither the pattern nor the word "special". But a token that is not a byte
# and that no merge makes can only be a special one.


# %% tags=["engine"]
#| export
def _from_gpt2(folder: Path) -> dict[str, Any]:
    """Return what a tokenizer is made of, but for the pattern, from vocab.json and merges.txt."""
    tokens = read_json_object(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines[lines[0].startswith("#version") :] if line]
    pairs = _read_merges(lines)
    made = {_as_text(a + b) for a, b in pairs} | set(_BYTE_TO_CHARACTER.values())
    return {
        "vocabulary": {id: _as_bytes(token) for token, id in tokens.items() if token in made},
        "merges": pairs,
        "special_tokens": {token: id for token, id in tokens.items() if token not in made},
    }


# %% [markdown] tags=["engine"]
# Files are written beside their place and moved there, so that a stopped program leaves no half.


# %% tags=["engine"]
#| export
def _write_text(path: Path, text: str) -> None:
    """Write a file in one step."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


class BPETokenizer(BPETokenizer):  # continued
    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json``. A ``ValueError`` says what this format cannot hold."""
        text = json.dumps(_tokenizer_json(self), ensure_ascii=False, indent=1)
        _write_text(checked_path(path), text)

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read ``tokenizer.json``. A ``ValueError`` says what is damaged, or cannot be honored."""
        with naming_file(path) as found:
            made = cls(**_from_tokenizer_json(found))
        return made


# %% [markdown] tags=["engine"]
# GPT-2's two files come from the same parts.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def save_gpt2(self, folder: str | Path) -> None:
        """Write ``vocab.json`` and ``merges.txt`` into ``folder``; the pattern is not in them.

        What else they cannot hold raises a ``ValueError``.
        """
        if self.steps != TextSteps() or self.ignore_merges:
            raise ValueError(
                "save_gpt2: expected no steps and no ignore_merges, got some: use save"
            )
        if both := [t for t in self.special_tokens if t.encode() in self._tables.ids]:
            raise ValueError(
                f"special_tokens: these files cannot make {both[0]!r} special: use save"
            )
        tokens = _file_vocabulary(self._tables)
        lines = [f"{_as_text(a)} {_as_text(b)}" for a, b in self.merges]
        folder = checked_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "vocab.json", json.dumps(tokens, ensure_ascii=False))
        _write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))

    @classmethod
    def load_gpt2(cls, folder: str | Path, *, pattern: str = GPT2_PATTERN) -> "BPETokenizer":
        """Read ``vocab.json`` and ``merges.txt``. Tokens that no merge makes become special."""
        with naming_file(checked_path(folder, "folder")) as found:
            made = cls(**_from_gpt2(found), pattern=pattern)
        return made


# %% [markdown]
# ## How large a vocabulary?
#
# What does a larger vocabulary buy? We measure **compression**, the mean number of bytes in a
# token, on the documents that were set aside. One training run gives the whole curve, since a
# smaller vocabulary is the beginning of a larger one. Each different word is encoded once. (The
# class has grown since the tokenizer was made, so we make it again.)

# %%
tokenizer = BPETokenizer.from_merges(merges)
sizes = [257, 512, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000]
smaller = {size: tokenizer.truncated(size) for size in sizes}


def count_tokens(tokenizer: BPETokenizer, counts: Counter[str]) -> int:
    return sum(count * len(tokenizer.encode(word)) for word, count in counts.items())


curves = {}
for name, sample in (("trained on", texts[::20]), ("set aside", held_out)):
    words, size = count_words(sample), sum(len(text.encode()) for text in sample)
    curves[name] = [size / count_tokens(each, words) for each in smaller.values()]
at = dict(zip(sizes, curves["set aside"], strict=True))
assert 2.2 < at[1_000] < 2.6 and 3.9 < at[32_000] < 4.3
for size in (1_000, 8_000, 32_000):
    print(f"{size:6,} tokens: {at[size]:.1f} bytes in a token of new text")
print(f"from 16,000 to 32,000 tokens: {at[32_000] / at[16_000] - 1:.0%} more")

# %% [markdown]
# {numref}`fig-tokenizer-compression` shows the whole curve, and how often each token is used.

# %% mystnb={"figure": {"caption": "Left: bytes in a token against the size of the vocabulary. Right: how often each token is used, against its rank by use.", "name": "fig-tokenizer-compression"}, "image": {"alt": "Left, bytes per token rise from 1 at 257 tokens to about 4.1 at 32,000 on new text, more slowly with each doubling; on the training text to 4.3. Right, on doubly logarithmic axes the use of tokens falls from 50,000, in the middle with a slope near -1, and ends in steps at 3, 2 and 1."}}
figure, (left, right) = plt.subplots(1, 2)
for name, values in curves.items():
    left.semilogx(sizes, values, "o-", label=name)
left.set(xlabel="vocabulary size", ylabel="bytes per token", ylim=(0, None))
left.legend()
uses = np.zeros(32_000, dtype=np.int64)
for word, count in counts.items():
    for id in tokenizer.encode(word):
        uses[id] += count
used = np.sort(uses[uses > 0])[::-1]
right.loglog(np.arange(1, len(used) + 1), used)
right.set(xlabel="rank of the token", ylabel="occurrences")
plt.show()

# %% [markdown]
# Each doubling of the vocabulary buys less than the one before. The right-hand plot shows why: the
# use of tokens falls like Zipf's law, so the tokens that come late are rare. And they are not free.
# Every token needs a vector of its own in the model; at 32,000 tokens of 512 numbers that is 16
# million parameters. A token that is seen a dozen times in training will have a poor one.
#
# ### In which language?
#
# Our documents are English. What do they give speakers of other languages? Chapter 03 reads
# translated messages from the disk. We train a second tokenizer, of the same size, on every fourth
# document and one half of the messages, and compare both on the other half.
#
# Two measures suit this. **Characters per token** say how far a model's context reaches.
# **Fertility** is the number of tokens per word {cite}`rust2021good`; it needs a language that
# puts spaces between words.

# %%
catalogs = read_translations()
halves = {
    code: (messages[::2], messages[1::2])
    for code, messages in catalogs.items()
    if sum(map(len, messages)) > 9_000
}
shown = dict(
    es="Spanish", sk="Slovak", tr="Turkish", el="Greek", ru="Russian",
    fa="Persian", hi="Hindi", ka="Georgian", ko="Korean", zh_CN="Chinese",
)  # fmt: skip
samples = {"English": held_out} | {name: halves[code][1] for code, name in shown.items()}
mixed = train_bpe([*texts[::4], *(m for half, _ in halves.values() for m in half)], 32_000)
reach, fertility = {}, {}
mixed_sizes = {size: mixed.truncated(size) for size in sizes[2:]}
for name, sample in samples.items():
    words, characters = count_words(sample), sum(map(len, sample))
    reach[name] = [characters / count_tokens(each, words) for each in (tokenizer, mixed)]
    spaced = sum(len(text.split()) for text in sample)
    fertility[name] = [count_tokens(each, words) / spaced for each in mixed_sizes.values()]

# %% [markdown]
# Here is what both tokenizers make of languages that the first has never seen:

# %%
gain = {name: after / before for name, (before, after) in reach.items() if name != "English"}
spaced = {name: values for name, values in fertility.items() if name != "Chinese"}
print(f"Hindi, trained on English: {reach['Hindi'][0]:.1f} characters in a token")
print(f"trained on both: {min(gain.values()):.1f} to {max(gain.values()):.0f} times as many")
print(f"what English loses: {1 - reach['English'][1] / reach['English'][0]:.0%}")
for size, column in ((1_000, 0), (32_000, -1)):
    values = {name: values[column] for name, values in spaced.items()}
    least, most = min(values, key=values.get), max(values, key=values.get)
    print(
        f"tokens per word, {size:,} tokens: {values[least]:.0f} in {least}, "
        f"{values[most]:.0f} in {most}"
    )

# %% [markdown]
# The picture has the other languages, and the sizes between.

# %% mystnb={"figure": {"caption": "Left: characters per token with 32,000 tokens learned from English documents, and from a mixture. Right: tokens per word against the size of the vocabulary, for the mixture.", "name": "fig-tokenizer-languages"}, "image": {"alt": "Left, horizontal bars for eleven languages, two each. Trained on English: English has 4.1 characters per token, Spanish 2.4, Slovak and Turkish 1.6, the seven others 0.4 to 0.8. Trained on the mixture: English 3.9, Spanish 4.1, the others between 2 and 3.5. Right, five falling curves. At 1,000 tokens Russian and Georgian need 8 to 10 tokens per word, Hindi and Turkish 5 to 6, English 3; at 32,000 all need 1.7 to 2.9."}}
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.8))
y = np.arange(len(reach))
for offset, (label, index) in zip((-0.2, 0.2), (("English only", 0), ("mixed", 1)), strict=True):
    left.barh(y + offset, [values[index] for values in reach.values()], 0.4, label=label)
left.set(yticks=y, yticklabels=list(reach), xlabel="characters per token", xlim=(0, 5.2))
left.invert_yaxis()
left.legend(title="trained on", loc="lower right")
for name in ("Georgian", "Russian", "Hindi", "Turkish", "English"):
    right.semilogx(list(mixed_sizes), fertility[name], "o-", label=name)
right.set(xlabel="vocabulary size", ylabel="tokens per word", ylim=(0, None))
right.legend()
plt.show()

# %% [markdown]
# {numref}`fig-tokenizer-languages` should give pause. With a tokenizer trained on English alone, a
# Hindi text takes more than one token for each *character*: the bytes of UTF-8, three to a
# character, hardly merged. The same text costs several times as much. Petrov and colleagues
# {cite}`petrov2023unfairness` found lengths differing up to fifteen times between translations of
# one text, also with tokenizers meant to be multilingual. A little text in the training mixture
# repairs most of it, at a small price for English. (The messages are technical and partly alike,
# so the repair is flattered here.) A larger vocabulary helps the languages of which there is
# little text more than it helps English.
#
# ### What goes wrong
#
# *Numbers* are cut irregularly: with GPT-2's pattern a number is a word like any other, and where
# it is cut depends on which numbers were frequent.

# %%
by_gpt2 = train_bpe(texts[::6], 8_000, pattern=GPT2_PATTERN)


def ways_to_cut(tokenizer: BPETokenizer) -> int:
    years = (tokenizer.encode(f" {year}") for year in range(1_900, 2_030))
    return len({tuple(len(tokenizer.decode([id]).strip()) for id in ids) for ids in years})


for name, each in (("GPT-2", by_gpt2), ("GPT-4", smaller[8_000])):
    print(f"{name}'s pattern: the years 1900 to 2029 are cut in {ways_to_cut(each)} ways")

# %% [markdown]
# *Tokens that never come.* A merge on the way to a longer token leaves a token behind that may
# never be used again, because everything that contains it goes on to merge. A token that the
# model's training text does not have keeps the random vector it started with. Such under-trained
# tokens were found in many published models {cite}`land2024fishing`. How many does our tokenizer
# never use on its own training text?

# %%
never = [id for id in range(256, 32_000 - 1) if not uses[id]]
parents = {part for pair in tokenizer.merges for part in pair}
steps = sum(tokenizer.vocabulary[id] in parents for id in never)
print(f"never used: {len(never) / 32_000:.0%} of the vocabulary")
print(f"of these, steps to a longer token: {steps / len(never):.0%}")
assert (uses[:256] == 0).sum() > 100
print("never used, either: more than 100 of the 256 bytes")

# %% [markdown]
# *A trailing space* in a prompt is a token of its own, after which words hardly ever came in
# training, because they carry their space themselves.
#
# ## Is it the real thing?
#
# The same merges in three programs. tiktoken gets our ids, `tokenizers` our file. The text is in
# many scripts, with emoji, code, runs of white space, and characters broken in half. Ids and
# decoded text must be equal, or the cell fails.

# %%
text = """Der Bäcker backt, пекарь печёт, ο φούρναρης ψήνει, パン屋は焼く, 빵을 굽는다, बेकर बनाता है,
הָאוֹפֶה אופה, الخباز يخبز، 👩🏽‍🍳🥖🥐 e\u0301 \u200d½ ² Ⅷ ٣٤٥ 1234567.89 it's WE'LL don't\r\n\r\n
def bake(n):\n\t\treturn  [i ** 2   for i in range(n)]  # \u2028 <|endoftext|>   \n  \ufffd\x00 """
encoding = tokenizer.to_tiktoken()
file = Path(folder.name, "tokenizer.json")
tokenizer.save(file)
theirs = tokenizers.Tokenizer.from_file(str(file))
assert BPETokenizer.load(file) == tokenizer
ids = tokenizer.encode(text, allowed_special="all")
assert ids == encoding.encode(text, allowed_special="all") == theirs.encode(text).ids
assert tokenizer.decode(ids) == text == theirs.decode(ids, skip_special_tokens=False)
assert tokenizer.encode("\ud83e!") == encoding.encode("\ud83e!")  # half a character
print(f"three programs: the same ids, more than {len(ids) // 50 * 50}, and the same text again")

# %% [markdown]
# Then we compare documents, and messages in more than forty languages, text by text:

# %%
sample = held_out[:500] + [text for messages in catalogs.values() for text in messages[:50]]
pairs = zip(tokenizer.encode_batch(sample), encoding.encode_ordinary_batch(sample), strict=True)
different = sum(ours != others for ours, others in pairs)
print(f"texts with other ids than tiktoken's: {different} of more than {len(sample) // 1000},000")

# %% [markdown]
# The other way round: `tokenizers` trains, we read its file. It breaks ties in another way, so
# some of its tokens differ from ours; most do not.

# %%
from tokenizers import models, pre_tokenizers, trainers

few_texts = texts[::16]
split = pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), "isolated")
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
rival = tokenizers.Tokenizer(models.BPE())
rival.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
rival.decoder = tokenizers.decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=4_000, show_progress=False, initial_alphabet=alphabet)
rival.train_from_iterator(few_texts, trainer)
rival.save(str(file))
loaded, own = BPETokenizer.load(file), train_bpe(few_texts, 4_000, special_tokens=())
assert loaded.encode(text) == rival.encode(text).ids
common = set(loaded.vocabulary.values()) & set(own.vocabulary.values())
print(f"tokens in common: {len(common) / 4_000:.0%}")

# %% [markdown]
# The three programs carry tables of Unicode from different years. A letter that is new may be a
# letter to one and a sign to another, and be cut differently. On older characters they agree.
#
# ## How fast is it?
#
# Against the naive trainer, on 4,000 different words and 100 merges; against `tokenizers` and
# tiktoken on the documents that were set aside, one document at a time, with a cold cache.


# %%
def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


few = dict(list(counts.items())[:4_000])
flat = [word.encode() for word in few]
naive_seconds = seconds(lambda: naive_bpe(flat, 100))
fast_seconds = seconds(lambda: learn_merges(dict.fromkeys(few, 1), 100))
fresh = BPETokenizer.from_merges(merges)
sample = held_out
times = {
    "this chapter": seconds(lambda: [fresh.encode(text) for text in sample]),
    "tokenizers": seconds(lambda: [theirs.encode(text) for text in sample]),
    "tiktoken": seconds(lambda: [encoding.encode_ordinary(text) for text in sample]),
}

# %% tags=["nbval-ignore-output"]
print(f"training, naive: {naive_seconds / fast_seconds:.0f} times as long")
megabytes = sum(len(text.encode()) for text in texts) / 1e6
print(f"{megabytes:.1f} MB counted in {seconds_counting:.1f} s, merged in {seconds_merging:.1f} s")
size = sum(len(text.encode()) for text in sample) / 1e6
for name, value in times.items():
    print(f"encoding, {name}: {size / value:.1f} MB a second")

# %% [markdown]
# Training is bound by the regular expression and by the merges in pure Python; what saves them is
# that the number of *different* words grows slowly, by Heaps' law. With a cold cache, encoding is
# bound by the merges of new words, later by the regular expression and one look-up for each word.
# `tokenizers` also records where each token stands in the text, and uses all cores in its batch
# mode. The repository's folder `benchmarks/results` has tables for more text, and for vocabularies
# up to 128,000.
#
# ## Exercises
#
# ````{exercise} Count characters without decoding
# :label: ex-tokenizer-count
# *Five minutes.* Write `count_characters(data)`: how many code points are in valid UTF-8 bytes,
# found by looking at the first two bits of each byte.
# ````


# %% tags=["solution"]
def count_characters(data: bytes) -> int:
    """Return the number of code points in ``data``, which is valid UTF-8."""
    return sum(byte >> 6 != 0b10 for byte in data)  # all but continuations


# %% tags=["check"]
for sample_text in ("", "abc", "naïve", "€5", "🙂🙂", "e\u0301", "\u07ff\u0800\uffff\U00010000"):
    assert count_characters(sample_text.encode()) == len(sample_text), f"wrong for {sample_text!r}"

# %% [markdown]
# ````{exercise} Digits from the right
# :label: ex-tokenizer-digits
# *Fifteen minutes.* People write `1,234,567`, but GPT-4's pattern cuts `123|456|7`: the same digit
# has another meaning in `123|4` than in `123|45`. Write a function `digits_pattern()` that returns
# a pattern for runs of digits, so that `pretokenize` cuts them in threes *from the right*:
# `1|234|567`. Use a look-ahead. What is not a digit may be cut in any way, but not joined to
# digits.
# ````


# %% tags=["solution"]
def digits_pattern() -> str:
    """Return a pattern that cuts runs of digits in threes from the right."""
    return r"\p{N}{1,3}(?=(?:\p{N}{3})*+(?!\p{N}))|\P{N}+"  # whole threes up to the run's end


# %% tags=["check"]
for run in ("1", "12", "123", "1234", "12345", "123456", "1234567", "9" * 20, "٣٤٥٦"):
    grouped = [run[max(end - 3, 0) : end] for end in range(len(run), 0, -3)][::-1]
    for before, after in (("", ""), ("a ", "."), ("x", "y")):
        found = pretokenize(before + run + after, digits_pattern())
        assert [word for word in found if word[0].isdigit()] == grouped, (
            f"wrong for {run!r}: {found}"
        )
assert pretokenize("1234 567", digits_pattern())[:2] == ["1", "234"], "each run has its own end"

# %% [markdown]
# ````{exercise} The fewest tokens
# :label: ex-tokenizer-fewest
# *Half an hour.* Merging by rank is greedy. How few tokens could spell a word? Let $m_j$ be the
# least number for its first $j$ bytes; then $m_0 = 0$ and $m_j$ is one more than the least $m_i$
# over all $i < j$ for which bytes $i$ to $j$ are a token. Write `fewest_tokens(word, tokens)`. On
# the words of our corpus, how much shorter would texts be?
# ````


# %% tags=["solution"]
def fewest_tokens(word: bytes, tokens: set[bytes]) -> int:
    """Return the least number of ``tokens`` (all single bytes among them) that spell ``word``."""
    least = [0]
    for end in range(1, len(word) + 1):
        least.append(1 + min(n for start, n in enumerate(least) if word[start:end] in tokens))
    return least[-1]


# %% tags=["check"]
single = {bytes([byte]) for byte in range(256)}
assert fewest_tokens(b"", single) == 0, "nothing needs no token"
assert fewest_tokens(b"abcd", single) == 4, "bytes alone"
assert fewest_tokens(b"abcd", single | {b"ab", b"bcd"}) == 2, "a + bcd beats ab + c + d"
assert fewest_tokens(b"abab", single | {b"ab", b"aba", b"abab"}) == 1
assert fewest_tokens("é".encode() * 3, single | {"éé".encode()}) == 3, "éé and two bytes"
all_tokens = set(smaller[16_000].vocabulary.values())
ratios = [
    fewest_tokens(word.encode(), all_tokens) / len(smaller[16_000].encode(word))
    for word in list(counts)[:3_000]
    if len(word) < 30
]
assert 0.9 < sum(ratios) / len(ratios) < 1, "greedy is only a little worse"

# %% [markdown]
# ````{exercise} Merges from ranks
# :label: ex-tokenizer-ranks
# *Forty minutes.* tiktoken's files hold only tokens and their ids. `BPETokenizer` needs merges.
# Write `merges_from_ranks(ranks)`, which finds them: for a token of two bytes or more, merge its
# own bytes as tiktoken does (always the neighbors whose joined bytes have the lowest rank), but
# only with ranks *lower than its own*. By the proof above two parts are left. Which?
# ````


# %% tags=["solution"]
def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merges, in order, of a trained vocabulary given by the rank of each token."""
    merges = []
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
            place = joined.index(min(joined))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# %% tags=["check"]
for each in (own, by_gpt2.truncated(2_000), of_stories):
    ranks = {token: id for id, token in each.vocabulary.items()}
    assert merges_from_ranks(ranks) == each.merges, "not the merges that were learned"
shuffled = dict(sorted(ranks.items()))
assert merges_from_ranks(shuffled) == of_stories.merges, (
    "ranks decide the order, not the dictionary"
)
assert merges_from_ranks({bytes([byte]): byte for byte in range(256)}) == [], "bytes need no merge"

# %% tags=["remove-cell"]
folder.cleanup()

# %% [markdown]
# ## Summary
#
# Text is characters, characters are code points, code points are one to four bytes of UTF-8.
# Byte-pair encoding starts from the bytes and merges the most frequent pair, ties broken by a
# fixed rule; a pattern keeps merges within words. Counted words, an inverted index and a queue by
# count bring training from hours to seconds. The merges, applied in order, encode any text, and
# decoding loses nothing.
#
# **Checklist: choosing a tokenizer.**
#
# - Does its training text have the languages, the code and the numbers that the model shall read?
#   Measure characters per token for each.
# - Is the vocabulary large enough that another doubling would buy little, and small enough that the
#   rarest tokens are seen hundreds of times?
# - Compare models of different tokenizers in bits per byte, never in loss per token.
# - Are special tokens ordinary text when a user types them?
# - Do encoding and decoding give the text back, for broken characters and white space, too?
# - Is the tokenizer stored with the model, and its format one that others read?
#
# **Further reading.** Gage {cite}`gage1994new` and Sennrich and colleagues
# {cite}`sennrich2016neural` are short and clear. Zouhar and colleagues {cite}`zouhar2023formal`
# bound how far the greedy choice of merges can be from the best. Chapter 06 builds the
# two rivals, WordPiece and Unigram, and compares.
