# %% [markdown]
# # Byte-pair encoding
#
# > Cut text into tokens: learn from counted pairs which bytes belong together, encode any text
# > with them, decode without loss, and speak the file formats of others.
#
# A model reads numbers, so text has to be cut into pieces that stand on a fixed list. A list of
# words will not do: by Heaps' law, new ones never stop coming. A list of characters won't do
# either: Unicode has more than 150,000 of them, and a text that is spelled out is several times as
# long as the same text in words, which a model pays for at every step.
#
# **Byte-pair encoding** lets the data decide. It starts from the 256 bytes, in which any text can
# be written, and joins the most frequent pair of neighbors, again and again, until the list is as
# long as you want. Frequent words end up as one token, rare words as a few, and nothing is ever
# unknown. GPT-2 introduced it in this form {cite}`radford2019language`, and most of today's models
# use it.
#
# | | |
# |---|---|
# | **Part** | I. Foundations and data |
# | **You build** | {py:func}`~llmbook.tokenizer.train_bpe`, {py:func}`~llmbook.tokenizer.train_bpe_files`, {py:class}`~llmbook.tokenizer.BPETokenizer`, {py:func}`~llmbook.tokenizer.pretokenize`, {py:func}`~llmbook.tokenizer.learn_merges` |
# | **You need** | Python and regular expressions; the documents of {doc}`02_corpus`, and the laws named there |
# | **It takes** | 60 minutes for the main line, 5 hours for everything, 30 seconds to run |

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
from base64 import b64decode, b64encode
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import cache, partial
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise
from pathlib import Path
from random import Random
from typing import Any, Literal, SupportsInt
from unicodedata import normalize

import regex  # type: ignore[import-untyped, unused-ignore]

from llmbook.cleaning import whole_characters
from llmbook.corpus import Document, existing_paths, iter_texts, ordered_map
from llmbook.environment import check_at_least, check_choice, check_path, check_text, whole_file

# %% [markdown]
# Three of the imports in the folded cell above do most of the work below: `Counter` counts,
# `pairwise` yields each item of a list together with the next one, and the package `regex` knows
# Unicode's classes of characters, which Python's own `re` does not.
#
# ## A tokenizer in three functions
#
# Try it by eye on the text `sing singing ring ringing`. The pair `n g` occurs six times, and so
# does `i n`; no other pair occurs more than three times. Join `n` and `g` wherever they meet, and
# `ng` is a new token. Then count again.
#
# The algorithm was invented to compress data {cite}`gage1994new`; Sennrich, Haddow, and Birch
# {cite}`sennrich2016neural` first used it to translate rare words. In general, let $c(a, b)$ be the
# number of positions at which token $a$ is followed by token $b$. The pair to merge next is the
# largest one in the order
#
# $$
# (a^*, b^*) = \operatorname*{arg\,max}_{(a, b)} \;\bigl(c(a, b),\; a,\; b\bigr),
# $$ (bpe-merge)
#
# which compares from left to right: first the counts, then, if these are equal, the bytes of $a$,
# and last the bytes of $b$, as in a dictionary. Two programs that are supposed to learn the same
# tokens need the same rule for ties, and this is ours. In the example it prefers `n g` to `i n`,
# since `n` comes after `i`. Every $a$ that is followed by $b$ then becomes one token $ab$, from
# left to right, so `aaa` becomes `aa a`.
#
# In code, a token is a `bytes` object. The first function applies one merge to a list of tokens,
# and the second finds the merges. It takes a list of byte strings and never merges across the end
# of one, which will be useful soon; for now the list has one entry.


# %%
def merge_pair(tokens: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(tokens):
        step = 2 if tuple(tokens[i : i + 2]) == pair else 1
        merged.append(b"".join(tokens[i : i + step]))
        i += step
    return merged


def naive_bpe(words: list[bytes], n_merges: int) -> list[tuple[bytes, bytes]]:
    split = [[bytes([byte]) for byte in word] for word in words]
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges:
        counts = Counter(pair for tokens in split for pair in pairwise(tokens))
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        split = [merge_pair(tokens, merges[-1]) for tokens in split]
    return merges


# %% [markdown]
# Each row below shows the text after one more merge, with bars between the tokens. The first
# column is the new token's id: ids 0 to 255 are the bytes, so the first merge gets 256.

# %%
song = "sing singing ring ringing"
song_merges = naive_bpe([song.encode()], 6)
tokens = [bytes([byte]) for byte in song.encode()]
print(f"bytes        {b'|'.join(tokens).decode()}")
for id, (a, b) in enumerate(song_merges, start=256):
    tokens = merge_pair(tokens, (a, b))
    print(f"{id} {(a + b).decode()!r:8} {b'|'.join(tokens).decode()}")

# %% [markdown]
# Six merges turned 25 tokens into 6. The third function and its reverse do the rest of the job. To
# **encode** a new text, cut it into bytes and apply the merges in the order in which they were
# learned. To **decode**, look up the bytes of each id and join them.


# %%
def all_tokens(merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [*(bytes([byte]) for byte in range(256)), *(a + b for a, b in merges)]


def naive_encode(text: str, merges: list[tuple[bytes, bytes]]) -> list[int]:
    tokens = [bytes([byte]) for byte in text.encode()]
    for pair in merges:
        tokens = merge_pair(tokens, pair)
    ids = {token: id for id, token in enumerate(all_tokens(merges))}
    return [ids[token] for token in tokens]


def naive_decode(ids: list[int], merges: list[tuple[bytes, bytes]]) -> str:
    return b"".join(all_tokens(merges)[id] for id in ids).decode()


# %% [markdown]
# Here is a text that the trainer has never seen, as ids and back again:

# %%
ids = naive_encode("bringing rings", song_merges)
print("ids:    ", *ids)
print("tokens: ", " | ".join(naive_decode([id], song_merges) for id in ids))
print("decoded:", naive_decode(ids, song_merges))

# %% [markdown]
# Fourteen bytes became six ids, and decoding lost nothing. This is a complete tokenizer. The rest
# of the chapter finds out what the bytes of a text are, keeps merges from running wild, and makes
# training fast enough for real text.
#
# ## Characters, code points, bytes
#
# The algorithm never asks what language it reads. This is what it makes of a name and a smiley:

# %%
for text in ("Zoë", "🙂"):
    print(text, "->", *naive_encode(text, song_merges))

# %% [markdown]
# The letter ë became two ids, and the smiley four. Where do these numbers come from?
#
# Unicode gives each character a number, its **code point**, which is at most 10FFFF in base
# sixteen. That isn't quite one number for each thing you see: `é` can be a single code point, or an
# `e` followed by a code point for the accent. And a code point has to be stored as bytes, which
# hold numbers up to 255.

# %%
print("code points       UTF-8 bytes")
for text in ("\u00e9", "e\u0301", "ж", "猫", "👩‍👧"):
    points = " ".join(f"{ord(character):X}" for character in text)
    print(f"{points:17} {text.encode().hex(' '):33} {text}")

# %% [markdown]
# The mother with her daughter is one picture on the screen, but three code points and eleven bytes.
# A fixed four bytes for each code point would make English four times as long as it needs to be. A
# code of variable length, on the other hand, has to say where a character ends. UTF-8
# {cite}`yergeau2003utf8` writes that into the first bits of every byte:
#
# - A byte that begins with `0` is a character by itself. That leaves 7 bits for its code point.
# - A byte that begins with `10` continues a character and carries 6 bits.
# - A byte that begins with $k$ ones and a zero, $k = 2, 3, 4$, opens a character of $k$ bytes. It
#   carries the highest $8 - (k + 1) = 7 - k$ bits.
#
# So $k$ bytes hold $7 - k + 6(k - 1) = 5k + 1$ bits: 11, 16, and 21. The largest code point,
# 10FFFF, needs 21. Each code point takes the shortest form that holds it
# ({numref}`fig-tokenizer-utf8`). The smiley is 1F642, often written U+1F642.
#
# ```{figure} ../figures/tokenizer-utf8.svg
# :name: fig-tokenizer-utf8
# :alt: Four rows of bytes as bit patterns. One byte 0 and 7 bits, example a. Two bytes, 110 with 5 bits and 10 with 6 bits, example é. Three bytes, 1110 with 4 bits and twice 10 with 6 bits, example €. Four bytes, 11110 with 3 bits and three times 10 with 6 bits, example U+1F642.
#
# The four forms of UTF-8. Gray bits say what a byte is, colored ones carry the code point.
# ```
#
# Take the euro sign, code point 20AC. In bits, that is `10000010101100`: fourteen of them, too many
# for two bytes and few enough for three. Fill up with zeros to sixteen, cut off six bits from the
# right, and six more: `0010 000010 101100`. Now put the marks in front: `1110` opens a character of
# three bytes, `10` continues it.

# %%
print("bits: ", *(f"{byte:08b}" for byte in "€".encode()))
print("bytes:", *"€".encode())

# %% [markdown]
# These three numbers are the ids that the tokenizer above gives to `€`. One property of UTF-8 will
# matter later: a cut at an arbitrary byte can break a character in two, and neither half is text by
# itself.

# %% [markdown] tags=["engine"]
# ### Engine room: UTF-8 by hand, and half a character becomes `�` (`valid_text`)

# %% [markdown] tags=["engine"]
# In code, `utf8_bytes` cuts six bits at a time off the right, and what is left goes into the
# opening byte. Python's own encoder is the judge, on all code points that can be encoded.


# %% tags=["engine"]
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

# %% [markdown] tags=["engine"]
# The 2,048 numbers from D800 to DFFF are missing in `valid`. They are the **surrogates**, which an
# older encoding, UTF-16, uses in pairs to write a code point above FFFF. They are not characters,
# and UTF-8 has no bytes for them. A single one is half a character. Python's strings can contain
# it. As in chapter 03, and as tiktoken does, we join two halves that meet, and write `�` for one
# that is alone: the code point FFFD, which stands for what could not be decoded. Every text that
# enters this chapter's functions passes through here.


# %% tags=["engine"]
#| export
def valid_text(text: object, argument: str = "text") -> str:
    """Return ``text`` with surrogates joined or replaced; other types raise a ValueError."""
    return whole_characters(check_text(text, argument))


# %% [markdown]
# ## Words first: pre-tokenization
#
# Look at the song's merges again. From 258 on they swallow spaces, so `sing` before a space and
# `sing` before a comma become different tokens. On longer text such merges take over. Here are the
# longest tokens that the algorithm learns from stories of chapter 01's world:

# %%
from llmbook.tinyworld import TinyWorld

stories = [story.text for story in TinyWorld().stories(300, seed=0)]
unconfined = naive_bpe([" ".join(stories).encode()[:10_000]], 300)
for token in sorted((a + b for a, b in unconfined), key=len)[-3:]:
    print(repr(token.decode()))

# %% [markdown]
# Whole phrases became tokens, which are of no use in any other text. So merges have to be confined.
# A regular expression cuts the text into **pre-tokens**, which we call words for short, and no
# merge crosses from one word into the next. Two patterns are in wide use: GPT-2's
# {cite}`radford2019language` and GPT-4's, which tiktoken publishes. Each is a list of alternatives
# that are tried in order at each position:
#
# | GPT-2 | GPT-4 | matches |
# |---|---|---|
# | `'s` `'t` `'re` … | the same, in upper case too | endings after an apostrophe |
# | <code>&nbsp;?\p{L}+</code> | `[^\r\n\p{L}\p{N}]?\p{L}+` | letters, with one space (GPT-4: or other character) before them |
# | <code>&nbsp;?\p{N}+</code> | `\p{N}{1,3}` | digits; in GPT-4, at most three |
# | <code style="white-space: nowrap">&nbsp;?[^\s\p{L}\p{N}]+</code> | the same, with line breaks after them | punctuation and other symbols |
# | `\s+(?!\S)`, `\s+` | `\s++$`, then the same, with line breaks apart | white space, except one space before a word; in GPT-4, white space at the end of the text in one piece |
#
# A space goes with the letters that follow it, so most words need no token just for their space.
# GPT-4's pattern makes an exception: a number carries no space in it, so the space before it stands
# alone. The look-ahead `(?!\S)` is what leaves the last of several spaces to the next word, and
# `++` is a `+` that gives nothing back of what it has matched.

# %%
#| export
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
)
GPT4_PATTERN = _GPT4_WORDS + r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
# %% [markdown]
# Here is what both patterns do with two lines of code. The bars are cuts, and `↵` is a line break:

# %%
code = "if loaves > 12345:\n    bake('rye')  # don't wait"
for name, pattern in (("GPT-2", GPT2_PATTERN), ("GPT-4", GPT4_PATTERN)):
    print(name, "|".join(regex.findall(pattern, code)).replace("\n", "↵"))

# %% [markdown]
# Both cut `don't` into `don` and `'t`. GPT-4's pattern puts the line break with the colon, and
# three of the four spaces of the indentation become a word of their own. It cuts the number into
# groups of at most three digits, so that a model meets only 1,110 different ones in the digits 0 to
# 9; but it counts from the left, and `12345` becomes `123` and `45`.
#
# In the package, `pretokenize(text, pattern)` cuts any text by any pattern. It does what
# `regex.findall` does here, and it keeps what a pattern leaves out.

# %% [markdown] tags=["engine"]
# ### Engine room: other models' patterns, and a pattern of your own (`pretokenize`)

# %% [markdown] tags=["engine"]
# tiktoken writes GPT-4's pattern with `{1,3}+`, where the plus forbids giving back what was
# matched. We leave it out: nothing follows that could want anything back, and the engine inside
# `tokenizers` reads it as "repeat", which would take any number of digits. The other possessive
# marks (`?+`, `++`, and `*+`) are not needed either, except in `\s++$`: in `tokenizers`, `$` also
# matches before a line break, so `\s+$` would give back the line breaks at the end of white space.
#
# Three more patterns are common: that of Llama 3, which is tiktoken's older form of GPT-4's; that
# of GPT-4o, which keeps marks with their letters and tells upper case from lower; and that of Qwen2
# and Qwen3, for which each digit is a word.

# %% tags=["engine"]
#| export
_LLAMA3_PATTERN = _GPT4_WORDS + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_KNOWN_PATTERNS = {GPT2_PATTERN, GPT4_PATTERN, _LLAMA3_PATTERN, GPT4O_PATTERN, QWEN2_PATTERN}

# %% [markdown] tags=["engine"]
# With a pattern of your own, there may be stretches that it does not match. They become words, too,
# so that no text is lost. A text that isn't a regular expression is refused, and so is one with
# capturing groups, for which `findall` would return something else. Compiled patterns are kept.


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

    Lone surrogates become U+FFFD. A ``pattern`` that is not a regular expression, or that has
    capturing groups, raises a ``ValueError``.

    >>> pretokenize("It's  2026!")
    ['It', "'s", ' ', ' ', '202', '6', '!']
    """
    return _splitter(pattern)(valid_text(text))


# %% [markdown]
# ## Training that scales
#
# The naive trainer walks through the whole text for every merge. For 32,000 merges on the text
# below, that means reading six million bytes 32,000 times, which takes hours. Four ideas bring it
# down to seconds: count each different word once, keep an index from pairs to words, correct the
# counts only at the seams of a new token, and keep the pairs in a queue sorted by count.
#
# ### Count words
#
# A word occurs many times and is cut the same way each time. So each *different* word is stored
# once, along with the number $f$ of times it occurs, and every pair in it counts $f$ times.
#
# Our text is the documentation that chapter 02 found on your disk, without exact copies. Every
# twentieth document is set aside, to measure on later.

# %%
from llmbook.corpus import read_installed_docs

packages = ["stdlib", "numpy", "matplotlib"]
texts = list(dict.fromkeys(document.text for document in read_installed_docs(packages)))
held_out = texts[::20]
texts = [text for number, text in enumerate(texts) if number % 20]
counts = Counter()
for text in texts:
    counts.update(regex.findall(GPT4_PATTERN, text))
millions, mean_count = counts.total() // 10**6, round(counts.total() / len(counts), -1)
print(f"more than {millions} million words; each different one occurs about {mean_count:.0f} times")

# %% [markdown]
# In the package this is `count_words(texts, workers=2)`, which uses several processes.

# %% [markdown] tags=["engine"]
# #### Engine room: counting in several processes, from texts and from files (`count_words`)

# %% [markdown] tags=["engine"]
# Texts may contain special tokens, such as a mark between documents. These separate words and are
# not counted themselves. They have to be told apart, so a list with an empty or a repeated one is
# refused.


# %% tags=["engine"]
#| export
def check_special_tokens(special_tokens: Collection[str]) -> tuple[str, ...]:
    """Return ``special_tokens`` as a tuple; an empty, broken or repeated text is refused."""
    if isinstance(special_tokens, str):
        expected = f"expected several, such as [{special_tokens!r}]"
        raise ValueError(f"special_tokens: {expected}, got one str")
    if isinstance(special_tokens, bytes) or not isinstance(special_tokens, Iterable):
        raise ValueError(f"special_tokens: expected several texts, got {special_tokens!r:.60}")
    tokens = tuple(special_tokens)
    for token in tokens:
        if not isinstance(token, str) or not token or valid_text(token) != token:
            raise ValueError(f"special_tokens: expected non-empty, valid texts, got {token!r:.60}")
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
# You may count words in your own way; the trainer checks that it gets words and whole numbers.


# %% tags=["engine"]
#| export
def _checked_counts(counts: object) -> Iterable[str]:
    """Return the words of ``counts``, after a check that each has a whole number of 0 or more."""
    if not isinstance(counts, Mapping):
        kind = type(counts).__name__
        raise ValueError(f"counts: expected words with their counts, such as a Counter, got {kind}")
    for word, count in counts.items():
        check_text(word, "counts")
        if count is None:
            raise ValueError(f"counts: expected a whole number, got None for {word!r:.60}")
        check_at_least(counts=(0, count))
    return counts


# %% [markdown] tags=["engine"]
# Texts go to workers a million characters at a time.


# %% tags=["engine"]
#| export
def _batches(texts: Iterable[str | Document], size: int = 1_000_000) -> Iterator[list[str]]:
    """Group ``texts`` to about ``size`` characters each; refuse what is not text."""
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
# A file can be counted in parts, since the counts of the parts add up to the counts of the whole.
# But where can it be cut? A cut through a word changes the counts. A special token is a safe place,
# because no word crosses it. So we jump ahead by some megabytes, search for the next special token,
# and cut before it. The search may begin in the middle of one, which is harmless unless special
# tokens overlap: in `aaaa`, the token `aa` can be found at places where reading from the beginning
# would not find it. Tokens that overlap with another, or with themselves, are not used for cuts.


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
# A worker gets a file's name and two positions in it. It reads, decodes, and counts.


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


# %% [markdown] tags=["engine"]
# By default, inputs of up to 4 MB are counted by one process, and larger ones by up to four. Chunks
# are about 1 to 16 MB long. From 16 MB on, there are about four or more for each process, so none
# of them is left with much more work than the others.


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
# ### Change only what a merge changes
#
# A merge of `t h` concerns only the words that contain `th`. So we keep an **inverted index**, from
# each pair to the words that contain it, just as the index of a book leads from a term to its
# pages. Inside such a word, only the pairs at the *seams* of the new token change: those with its
# neighbors. Say that `the` occurs 9 times, `then` 4 times, and `other` twice.
#
# | pair | occurs in | before the merge | after the merge of `t h` |
# |---|---|---|---|
# | `t h` | `the`, `then`, `other` | 9 + 4 + 2 = 15 | 0, merged |
# | `h e` | `the`, `then`, `other` | 9 + 4 + 2 = 15 | 15 − 9 − 4 − 2 = 0 |
# | `th e` | `the`, `then`, `other` | 0 | 0 + 9 + 4 + 2 = 15 |
# | `o t` | `other` | 2 | 2 − 2 = 0 |
# | `o th` | `other` | 0 | 0 + 2 = 2 |
# | `e n` | `then` | 4 | 4, untouched |
# | `e r` | `other` | 2 | 2, untouched |
#
# In general, each occurrence of $a\,b$ in a word that occurs $f$ times takes $f$ from the pair of
# the left neighbor and $a$, and from the pair of $b$ and the right neighbor. It adds $f$ to the
# pairs of the left neighbor and $ab$, and of $ab$ and the right neighbor. Where a neighbor is
# missing, there is nothing to do. (Two copies side by side, as in `hahaha`, are a case of their
# own, which the engine room treats.)

# %% [markdown] tags=["engine"]
# #### Engine room: pairs, index and seams in code (`_index_pairs`, `_merge_everywhere`)

# %% [markdown] tags=["engine"]
# How should a word be stored, so that all this is fast in Python? Strings are what Python does
# best, so we write a word as a *string of tokens*: the character with code point 300 stands for
# token 300, and at first all characters are bytes. A pair is a string of two characters, and a
# merge is `word.split(pair)` and `join`, which run in C and go from left to right, as they should.
# First, the counts of all pairs, and the index:


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# Between two pieces of a split word lay the pair. Say that the pieces around it are `left` and
# `right`. The token before the pair is the last of `left`. If `left` is empty and the word does not
# begin here, another copy of the pair came just before and was merged as well. Take `h a` in
# `hahaha`, which splits into four empty pieces. The first copy has nothing on its left. The second
# one had an `a` there, so `a h` loses the word's count; now it has the new token `ha`, and `ha ha`
# gains it. The third is like the second: `a h` has lost two counts and `ha ha` has gained two.
#
# The token after the pair is the first of `right`. If `right` is empty, another copy follows, and
# the next round of the loop takes care of the pair between them. Counts of pairs with the new token
# are collected apart. The index may still list a word that has lost the pair since; `split` then
# gives one piece and nothing happens, which is cheaper than keeping the index clean.


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# The numbers of the table above, and those of `hahaha` (`*` is the new token):

# %% tags=["engine"]
for example, pair in (({"the": 9, "then": 4, "other": 2}, "th"), ({"hahaha": 1}, "ha")):
    before, where = _index_pairs(list(example), list(example.values()))
    after = dict(before)
    found = _merge_everywhere(pair, "*", list(example), list(example.values()), after, where)
    print("before:", {name: count for name, count in before.items() if count})
    print("after: ", {name: count for name, count in (after | found).items() if count})

# %% [markdown]
# ### Find the most frequent pair without looking at every pair
#
# Which pair is next? Looking through all counts for every merge would be slow again. Three facts
# help:
#
# 1. The count of a pair that exists never rises. Merges only use up its two tokens, and no later
#    merge makes more of them, since every merge makes a token that is new. (Could a later merge
#    make the same bytes from other parts? No: where no token reaches across their two ends, these
#    bytes go through the same merges as anywhere else, so the first such merge has joined them
#    already.)
# 2. A new pair contains the token that has just been made, and all of its occurrences arise in that
#    one merge.
# 3. A new pair cannot be more frequent than the pair that was merged, since each of its
#    occurrences contains a different one of those.
#
# Together they say that the highest count never rises from one merge to the next. So we can work
# through the counts from the top, level by level ({numref}`fig-tokenizer-training`). A **heap of
# levels** gives the highest count at which pairs are waiting. The pairs of that level are sorted
# once, by their bytes, and taken from the end. A pair whose count has fallen since it was filed is
# filed again on its lower level. A new pair goes to the level of its own count or, if that is the
# present one, to its place in the sorted list.
#
# ```{figure} ../figures/tokenizer-training.svg
# :name: fig-tokenizer-training
# :alt: Three structures. A heap of levels: 15 holds the pairs h e and t h, 4 holds e n, 2 holds e r and o t. The last pair of the top level, t h, leads to an index, which names the words the (9 times), then (4 times) and other (2 times), each a row of tokens.
#
# The trainer's three structures. The greatest pair of the top level is looked up in the index, and
# only the words found there change.
# ```


# %% [markdown] tags=["engine"]
# #### Engine room: the queue of pairs, level by level (`_PairQueue`)

# %% [markdown] tags=["engine"]
# Pairs of one level are sorted by the bytes of their tokens:


# %% tags=["engine"]
#| export
def _with_bytes(pair: str, tokens: list[bytes]) -> tuple[bytes, bytes, str]:
    """Return what pairs are sorted by, and the pair."""
    return tokens[ord(pair[0])], tokens[ord(pair[1])], pair


# %% [markdown] tags=["engine"]
# `push` files a pair on its level, and `pop` takes the next one to merge.


# %% tags=["engine"]
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
# ### The trainer
#
# With its parts in the engine rooms above, the trainer is short. `_index_pairs` makes the counts
# and the index, `_PairQueue` is the heap of levels (a heap is a structure that always has its
# greatest entry at hand), and `_merge_everywhere` performs one merge, corrects the counts at the
# seams, and returns the counts of the new pairs. Tokens are numbered here, and a pair is a string
# of two characters whose code points are the numbers of its tokens; `chr` and `ord` translate. The
# first two lines of the body check what they are given (`check_at_least` takes the least value
# allowed, and the value) and prepare the words: `valid_text` replaces what is not valid Unicode,
# and in `latin-1` the character with code point $b$ stands for the byte $b$.


# %%
#| export
def learn_merges(counts: Mapping[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Learn up to ``n_merges`` merges from words and how often each occurs, the first merge first.

    The most frequent pair is merged; of equally frequent ones, the lexicographically greatest
    pair of byte strings. There are fewer than ``n_merges`` if every word has become one token.
    Source: Gage (1994), Sennrich et al. (2016), on bytes as in Radford et al. (2019).

    >>> learn_merges({"to": 2, "toe": 1}, 2)
    [(b't', b'o'), (b'to', b'e')]
    """
    check_at_least(n_merges=(0, n_merges))
    words = [valid_text(word).encode().decode("latin-1") for word in _checked_counts(counts)]
    pairs, where = _index_pairs(words, frequencies := list(counts.values()))
    tokens = [bytes([byte]) for byte in range(256)]
    queue, merges = _PairQueue(pairs, tokens), list[tuple[bytes, bytes]]()
    while len(merges) < n_merges and (pair := queue.pop()):
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
# The naive trainer is the judge. In words made of very few letters, ties and overlaps abound:

# %%
import random

generator, agreements = random.Random(0), 0
for _ in range(200):
    sample = ["".join(generator.choices("aabn ", k=generator.randrange(12))) for _ in range(8)]
    naive = naive_bpe([word.encode() for word in sample], 30)
    agreements += naive == learn_merges(Counter(sample), 30)
print(f"the same merges in the same order for {agreements} of 200 random texts")

# %% [markdown]
# Now we learn 31,743 merges at once. With 256 bytes and one special token they make a vocabulary of
# 32,000.

# %%
import time

start = time.perf_counter()
merges = learn_merges(counts, 32_000 - 257)
seconds_merging = time.perf_counter() - start
print(f"{len(merges):,} merges; the first joins {merges[0][0]} and {merges[0][1]}")

# %% [markdown]
# The most frequent pair in documentation is two spaces, the beginning of an indentation.
#
# ## Encoding by rank
#
# `naive_encode` goes through all merges for each text. With 31,743 of them that is slow even for a
# single word, which contains only a few. There is a shortcut. Call a merge's number in the order
# of learning its **rank**. A merge makes a token that did not exist before, so all merges that use
# this token were learned later and have higher ranks. Therefore, to apply the merges in order, we
# can look for the pair of neighbors with the lowest rank, merge it, and look again, until no pair
# of neighbors has a rank.


# %%
def encode_word(word: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    tokens = [bytes([byte]) for byte in word]
    while found := [pair for pair in pairwise(tokens) if pair in ranks]:
        tokens = merge_pair(tokens, min(found, key=ranks.get))
    return tokens


story_merges = learn_merges(Counter(regex.findall(GPT4_PATTERN, " ".join(stories))), 300)
ranks = {pair: rank for rank, pair in enumerate(story_merges)}
for word in (" night", " knight", " goodness", " Zoë"):
    print(f"{word!r:13}", *encode_word(word.encode(), ranks))

# %% [markdown]
# The stories are full of nights, so ` night` is one token. A word that training never saw falls
# into pieces that it did see, in the worst case into bytes.

# %% [markdown] tags=["engine"]
# ### Engine room: long words in a time of order n log n, and words seen before

# %% [markdown] tags=["engine"]
# Searching all pairs before each merge takes a time that grows with the square of the word's
# length. Most words are short, but there are texts without spaces, and hostile users who send the
# letter `a` a million times. So we link the tokens into a chain and keep the mergeable pairs in a
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
# Even so, this runs in Python, byte by byte. But words repeat, and the merges of a word never
# depend on its neighbors. So its ids are remembered, in a dictionary that calls `__missing__` for
# keys that it does not have. It is emptied when it is full, and long words are not kept: memory
# stays constant on endless text.


# %% tags=["engine"]
#| export
class WordCache(dict[str, tuple[int, ...]]):
    """Ids of words, found by ``encode`` when first asked for; bounded in number and length."""

    def __init__(
        self, encode: Callable[[str], tuple[int, ...]], size: int = 1 << 17, longest: int = 64
    ) -> None:
        """Make an empty cache for ``size`` words of at most ``longest`` characters."""
        super().__init__()
        for argument, value, least in (("size", size, 1), ("longest", longest, 0)):
            if value is None:
                raise ValueError(f"{argument}: expected a whole number, got None")
            check_at_least(**{argument: (least, value)})
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
# ## Special tokens, and text that looks like one
#
# A model needs marks for the end of a document and for the turns of a conversation. `<|endoftext|>`
# is such a **special token**: one id, outside of all merges. But what if a user types these
# thirteen characters? If they became the special id, anybody could end the assistant's turn and
# speak in its name. So by default they are *ordinary text*, and whoever wants the id has to ask for
# it with `allowed_special`. Where several special tokens begin at the same place, the longest wins.
#
# Encoding then has two layers: find the special tokens that are allowed, and give what lies between
# them to the merges.
#
# ## Half characters
#
# Decoding looks up the bytes of each id, joins them, and reads them as UTF-8. A model may produce
# *any* sequence of ids, and bytes that are not UTF-8 become `�`. There is a second trap: when text
# appears on the screen while the model writes, a token may end in the middle of a character.
#
# Say that the smiley, F0 9F 99 82, arrives as two tokens, F0 9F and 99 82. If each is decoded by
# itself, the screen shows `���` for good: one `�` for F0 9F, which begins a character, and one each
# for 99 and 82, which cannot begin any. An incremental decoder sees that F0, `11110000` in bits,
# announces a character of four bytes. It holds back F0 9F until 99 82 has come, and then shows the
# smiley.
#
# ## The tokenizer
#
# A tokenizer knows its tokens, its merges, its special tokens, and a pattern. Ids may come in any
# order, since GPT-2's do: its first 256 are the bytes in an order of their own. The class is a
# frozen dataclass: its fields cannot be assigned anew, and two tokenizers with equal fields are
# equal. From the fields it makes its look-up tables once (`_Tables`): the ids of bytes, the rank of
# each pair, the bytes of each id, and a cache of words that were encoded before. Its `special`
# finds the special tokens that are allowed, and gives the text between them to its `encode`, which
# cuts words and merges by rank. `steps` holds further steps before and after the merges that other
# programs' files may ask for; leave it alone until an engine room below explains it.


# %%
#| export
@dataclass(frozen=True, repr=False)
class BPETokenizer:
    """A byte-level BPE tokenizer: text to ids and back, without loss for any valid text.

    ``vocabulary`` has the bytes of each id, all 256 single bytes among them; ``merges`` apply
    in their order; ``special_tokens`` have ids of their own; ``pattern`` cuts words. With
    ``ignore_merges`` a word that is a token is taken as it is. Bad input raises a
    ``ValueError``.
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
        own = vars(self)  # the fields are frozen, so write past the dataclass
        own.update(vocabulary=dict(self.vocabulary), merges=list(self.merges))
        own.update(special_tokens=dict(self.special_tokens))
        own["_tables"] = _Tables(self)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, which is the number of ids if they have no gaps."""
        return self._tables.size

    def encode(self, text: str, *, allowed_special: "_Allowed" = ()) -> list[int]:
        """Return the ids of ``text``. Special tokens in it are ordinary text unless allowed."""
        special, ordinary = self._tables.special, self._tables.encode
        return special.encode(valid_text(text), special.allowed(allowed_special), ordinary)


# %% [markdown]
# Each engine room below continues the class under the same name, as
# `class BPETokenizer(BPETokenizer)`, and adds methods, and some options of `encode`. The rest of
# the main line uses these:
#
# | | |
# |---|---|
# | `decode(ids)` | the text of the ids |
# | `decode_stream(ids)` | the same, piece by piece: the incremental decoder |
# | `encode_batch(texts)` | the ids of each of several texts |
# | `BPETokenizer.from_merges(merges)` | the tokenizer that training makes of these merges |
# | `truncated(vocab_size)` | a smaller tokenizer, with the first merges of this one |
# | `save(path)` | writes the tokenizer to a file that Hugging Face's library reads |
# | `to_tiktoken()` | the same tokenizer for tiktoken |

# %% [markdown] tags=["engine"]
# ### Engine room: special tokens and decoding (`decode`, `decode_stream`)

# %% [markdown] tags=["engine"]
# A long class is written in several cells. A cell that continues it says so: in the notebook it
# makes a subclass of the same name, and in the package all parts are one class.
#
# `SpecialTokens` finds the tokens that are allowed, and gives what lies between them to the merges,
# here called `ordinary`. `_finder` makes a regular expression of the allowed tokens, the longest
# first.

# %% tags=["engine"]
#| export
_Allowed = Literal["all"] | Collection[str]


class SpecialTokens(dict[str, int]):
    """Special tokens and their ids; finds those that are allowed in a text, the longest first."""

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
# Decoding has three forms: bytes, text, and a stream of text for the screen. `_pieces`, below,
# yields the bytes of each id.


# %% tags=["engine"]
#| export
def _decode_stream(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield text as soon as its characters are complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


# %% tags=["engine"]
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


# %% [markdown] tags=["engine"]
# Decoding looks closely at what it is given: a float or a boolean is not an id, and neither is a
# number outside of the vocabulary or in a gap of it.


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


# %% [markdown]
# ### What is refused, and what files ask for
#
# A tokenizer that is made by hand, or read from a file, may have bytes or tokens missing. So the
# constructor checks all that it is given. And other programs' files may also ask that text be
# normalized first, that tokens be put before and after it, or that added tokens be found in any
# text.

# %% [markdown] tags=["engine"]
# #### Engine room: checks, and what other programs' files ask for (`TextSteps`, `encode`)

# %% [markdown] tags=["engine"]
# All bytes must have an id, or some text could not be encoded.


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
# Merges have to be pairs of tokens that are in the vocabulary.


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
        own = vars(self)  # the fields are frozen, so write past the dataclass
        own.update(added_tokens=_token_ids("added_tokens", self.added_tokens))
        for argument in ("normalized", "prefix", "suffix"):
            tokens = own[argument]
            if isinstance(tokens, str) or not isinstance(tokens, Iterable):
                raise ValueError(f"{argument}: expected several tokens, got {tokens!r:.60}")
            own[argument] = tuple(check_text(token, argument) for token in tokens)
        own.update(normalized=tuple(sorted(set(self.normalized))))


# %% [markdown] tags=["engine"]
# A text must not have two ids, nor an id two texts. An ordinary token may be made special, though,
# if it keeps its id: it is then found where it is allowed, and `skip_special_tokens` skips it. If
# it is a byte or has a part in a merge, it also remains an ordinary token, which merges make as
# before, even from what a user types. Otherwise it is special only.


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
# The constructor applies this rule. All of a tokenizer would fill a screen, so it is shown by its
# size and its special tokens.


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

    def __repr__(self) -> str:
        """Return the size and the special tokens; all of it would fill a screen."""
        special = self.special_tokens
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, special_tokens={special})"


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
# With these steps, and an error for special tokens that must not stand in a text, encoding is:


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


# %% [markdown]
# ### Training, and many texts at once
#
# Training puts the trainer above to work, on texts in memory or on files. And a long list of texts
# is encoded by several processes.

# %% [markdown] tags=["engine"]
# #### Engine room: training and batches (`train_bpe`, `encode_batch`)

# %% [markdown] tags=["engine"]
# After training, ids 0 to 255 are the bytes, then come the merges in their order, and special
# tokens are last. So the first merges of a tokenizer are what training with a smaller vocabulary
# would have learned.


# %% tags=["engine"]
#| export
def _in_order_of_training(
    merges: Sequence[tuple[bytes, bytes]], special: Collection[str]
) -> tuple[dict[int, bytes], dict[str, int]]:
    """Give ids: to the bytes, then to what merges make, then to special tokens."""
    tokens = [*(bytes([byte]) for byte in range(256)), *(a + b for a, b in merges)]
    return dict(enumerate(tokens)), {text: len(tokens) + i for i, text in enumerate(special)}


# %% [markdown] tags=["engine"]
# So merges are enough to make a tokenizer, or a smaller one:


# %% tags=["engine"]
#| export
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
        merges, special_tokens = _checked_pairs(merges), check_special_tokens(special_tokens)
        vocabulary, special = _in_order_of_training(merges, special_tokens)
        return cls(vocabulary, merges, special_tokens=special, pattern=pattern)

    def truncated(self, vocab_size: int) -> "BPETokenizer":
        """Return what training with a smaller ``vocab_size`` gives; special tokens stay last."""
        special = list(self.special_tokens)
        check_at_least(vocab_size=(256 + len(special), vocab_size))
        in_order = _in_order_of_training(self.merges, special)
        others = self.ignore_merges or self.steps.added_tokens
        if (self.vocabulary, self.special_tokens) != in_order or others:
            raise ValueError("truncated: expected a tokenizer with ids in the order of training")
        merges = self.merges[: vocab_size - 256 - len(special)]
        vocabulary, ids = _in_order_of_training(merges, special)
        options: Any = {"pattern": self.pattern, "steps": self.steps}
        return BPETokenizer(vocabulary, merges, special_tokens=ids, **options)


# %% [markdown] tags=["engine"]
# Training means checking the settings, counting words, learning merges, and numbering the tokens.
# From texts and from files it differs only in how words are counted.


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


# %% [markdown] tags=["engine"]
# A file that two processes read in chunks gives what its texts give in one:

# %% tags=["engine"]
import tempfile

from llmbook.tokenizer import train_bpe_files as exported_train_bpe_files

folder = tempfile.TemporaryDirectory()  # for the files that this chapter writes
path = Path(folder.name, "docs.txt")
path.write_text("<|endoftext|>".join(texts[:8_000]), encoding="utf-8", newline="")
chunks = _chunks(path, [b"<|endoftext|>"], path.stat().st_size // 4)
from_file = exported_train_bpe_files(path, 1_000, workers=2)
assert from_file.merges == train_bpe(texts[:8_000], 1_000).merges
print(f"a file cut into {len(chunks)} chunks; {len(from_file.merges)} merges as from its texts")

# %% [markdown] tags=["engine"]
# A batch of texts can be spread over several processes. The answers come in the order of the texts.
# Pickle, which carries the tokenizer to another process, leaves the tables out. The process makes
# its own, and begins with an empty cache.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def __reduce__(self) -> Any:
        """Pickle what is known, without the tables."""
        options: Any = {"pattern": self.pattern, "ignore_merges": self.ignore_merges}
        options |= {"special_tokens": self.special_tokens, "steps": self.steps}
        return partial(type(self), **options), (self.vocabulary, self.merges)


def _encode_job(job: tuple[BPETokenizer, list[str], dict[str, Any]]) -> list[list[int]]:
    """What a worker does: encode some texts."""
    tokenizer, texts, options = job
    return [tokenizer.encode(text, **options) for text in texts]


# %% [markdown] tags=["engine"]
# `encode_batch` checks the options once, and gives each process some of the texts:


# %% tags=["engine"]
#| export
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
        if workers is None:
            raise ValueError("workers: expected a whole number, got None")
        check_at_least(workers=(1, workers))
        special = self._tables.special
        options = {
            "allowed_special": special.allowed(allowed_special),
            "disallowed_special": special.disallowed(disallowed_special, allowed_special),
            "add_special_tokens": add_special_tokens,
        }
        jobs = [(self, batch, options) for batch in _batches(texts)]
        return list(chain.from_iterable(ordered_map(_encode_job, jobs, workers)))


# %% [markdown]
# ## The tokenizer at work
#
# `train_bpe(texts, vocab_size)` counts words, learns merges, and numbers the tokens: first the
# bytes, then the merges in their order, then the special tokens: by default one, `<|endoftext|>`.
# `from_merges` takes merges that
# have been learned before. We have those of the documents already; on the stories we train now.

# %%
tokenizer = BPETokenizer.from_merges(merges)
of_stories = train_bpe(stories, 600)
ids = of_stories.encode("Good night, baker 🙂!")
assert of_stories.decode(ids) == "Good night, baker 🙂!"
print("tokens:", "|".join(of_stories.decode([id]) for id in ids))
print("stream:", "|".join(of_stories.decode_stream(ids)))

# %% [markdown]
# There is no emoji in the stories, so the smiley is cut into its four bytes. One at a time, each of
# them is a `�`; the stream waits for the last one. And here is `<|endoftext|>`, the last of the 600
# tokens with the id 599, as a user types it and as a program asks for it:

# %%
print("as typed:    ", *of_stories.encode("Bye<|endoftext|>"))
print("as asked for:", *of_stories.encode("Bye<|endoftext|>", allowed_special="all"))

# %% [markdown]
# ### The same lines in GPT-2's way, and in ours
#
# GPT-2's vocabulary isn't on your disk, but its way of cutting is: its pattern. We train one
# tokenizer with it and one with GPT-4's pattern, our default, on every sixth document and with
# 8,000 tokens each, and cut the same text with both. Bars separate tokens, and `↵` is a line break.

# %%
some_texts = texts[::6]
by_gpt2 = train_bpe(some_texts, 8_000, pattern=GPT2_PATTERN)
by_gpt4 = train_bpe(some_texts, 8_000)
code = "def bake(n):\n    return 12345  # don't wait"
for name, each in (("GPT-2", by_gpt2), ("ours ", by_gpt4)):
    pieces = [each.decode([id]).replace("\n", "↵") for id in each.encode(code)]
    print(f"{name} {len(pieces)} tokens: {'|'.join(pieces)}")

# %% [markdown]
# In ours, the parenthesis goes with the letter after it, the line break with the colon before it,
# three of the four spaces of the indentation are a token of their own, and so is the space before
# the number. In GPT-2's way, the number's tokens depend on which digits often stood side by side.
# In ours, the pattern sets the groups, and a group that was too rare to become a token is cut
# further. But `123` and `45` can never meet in one token.
#
# How does the size of the vocabulary matter? A smaller tokenizer costs nothing: the first merges of
# a tokenizer are what training with a smaller vocabulary would have learned, and
# `tokenizer.truncated(vocab_size)` keeps just these.

# %% tags=["engine"]
# How the figure is drawn: a colored stretch for each token, a dot for half a character
import matplotlib.pyplot as plt

plt.style.use("llmbook.book")


def draw_cuts(tokenizer: BPETokenizer, sizes: list[int], lines: list[str]) -> None:
    """Draw ``lines`` as cut by the tokenizer's smaller versions, one block for each size."""
    _, ax = plt.subplots(figsize=(4.2, 3.4))
    for block, size in enumerate(sizes):
        small = tokenizer.truncated(size)
        top = block * (len(lines) + 0.9)
        for row, line in enumerate(lines):
            x = 0.0
            for number, id in enumerate(small.encode(line)):
                piece = small.decode([id]).replace("�", "·")
                width = len(piece) if "·" not in piece else 0.5
                box = dict(color=f"C{number % 5}", alpha=0.3, lw=0)
                ax.add_patch(plt.Rectangle((x, top + row), width, 0.86, **box))
                for place, character in enumerate(piece):
                    spot = x + (place + 0.5) * width / len(piece), top + row + 0.46
                    ax.text(*spot, character, ha="center", va="center", family="monospace", size=9)
                x += width
        label = f"{size:,}" if size > 257 else "bytes"
        ax.text(-1, top + len(lines) / 2, label, ha="right", va="center")
    ax.set(xlim=(-6, max(map(len, lines))), ylim=(top + len(lines), -0.2))
    ax.axis("off")
    plt.show()


# %% [markdown]
# Here are two other lines, as bytes and with three vocabularies. Each color is one token, and `··`
# are the two bytes of `ë`:

# %% mystnb={"figure": {"caption": "Two lines, cut with four vocabularies. Each stretch of one color is a token; a dot is a byte of the unfinished character ë.", "name": "fig-tokenizer-cut"}, "image": {"alt": "Four blocks of colored stretches over the same two lines, a line of code with the number 12345 and the words Zoë normalizes histograms. As bytes every character has a color of its own and ë has two. With 1,000 tokens short pieces appear. With 8,000, the number is cut into 123 and 45, normalizes into normal and izes, and histograms into histogram and s. With 32,000, these two words are one token each, and the first line is cut as before."}}
draw_cuts(
    tokenizer,
    [257, 1_000, 8_000, 32_000],
    ["def bake(loaves):  # 12345", "Zoë normalizes histograms"],
)

# %% [markdown]
# As the vocabulary grows, the pieces become fewer and longer, until each word that is frequent
# enough is one token. At 32,000, `normalizes` and `histograms` are; `bake`, `loaves`, and `Zoë` are
# too rare in documentation to gain from that step. No piece reaches from `123` into `45`: that is
# the pattern's doing, not the training's.

# %% [markdown] tags=["engine"]
# ### Engine room: encoding a stream in constant memory (`encode_iterable`)

# %% [markdown] tags=["engine"]
# A crawl does not fit into memory. `encode_iterable` takes its pieces and yields ids as it goes,
# and they are *the same ids* as for the whole text, wherever the pieces end. So text is held back
# until there is a safe place to cut: one where the words on the left don't depend on what comes on
# the right, nor the other way round. Here is one line, cut at several places (`‖`), with the words
# of both halves:

# %% tags=["engine"]
line = "bake 12 loaves, don't wait"
for cut in (6, 20, 4, 15):
    halves = [pretokenize(line[:cut]), pretokenize(line[cut:])]
    verdict = "the same words" if [*halves[0], *halves[1]] == pretokenize(line) else "other words"
    print(f"{'‖'.join(map('|'.join, halves)):36} {verdict}")

# %% [markdown] tags=["engine"]
# A cut through `12` makes two words of one, and a cut after the apostrophe takes it away from the
# `t`. The cuts between a letter or a comma and a space change nothing, and that is so in any text.
# Why?
#
# The right side is no problem. None of the patterns looks behind, so from a border between words
# on, the words depend only on what follows. For the left side, take a place between a character $x$
# that isn't white space and a space (or other white space that isn't a line break). It is a border:
# in no alternative does such white space follow anything but white space. And the words before it
# would be the same if the text ended there. The alternatives that look ahead are those for white
# space, and what they see is $x$ or something before it; all others stop before the space, as they
# would at the end. A place between a letter or digit and something that is not a letter, digit,
# mark, or apostrophe is safe for the same reasons. That helps with Chinese, which has no spaces.
# The same cuts are safe with the other patterns in `_KNOWN_PATTERNS`.
#
# With a pattern of your own, no place is known to be safe except special tokens. These may be cut
# themselves. `<|endoftext|>` has 13 characters, so whether one begins at a place is certain once 13
# characters from there have arrived, and we look for a cut only up to there. The `(?r)` makes the
# search run backward, so it finds the last safe place first.


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
# Pieces are gathered, and the search begins when there is enough. If it finds nothing, it waits for
# twice as much. So a run of a million letters without any safe place takes memory for itself, and
# time in proportion to its length. A normalizer changes nothing about this, because it never
# composes the two characters on either side of such a cut.


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

# %% [markdown]
# ## How large a vocabulary?
#
# What does a larger vocabulary buy? We measure **compression**, the mean number of bytes in a
# token, on the documents that were set aside. One training run gives the whole curve.


# %%
def count_tokens(tokenizer: BPETokenizer, counts: Counter[str]) -> int:
    return sum(count * len(tokenizer.encode(word)) for word, count in counts.items())


sizes = [257, 512, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000]
smaller = {size: tokenizer.truncated(size) for size in sizes}
new_words, new_bytes = count_words(held_out), sum(len(text.encode()) for text in held_out)
compression = {size: new_bytes / count_tokens(each, new_words) for size, each in smaller.items()}
for size in (1_000, 8_000, 32_000):
    print(f"{size:6,} tokens: {compression[size]:.1f} bytes per token of new text")
print(f"from 16,000 to 32,000 tokens: {compression[32_000] / compression[16_000] - 1:.0%} more")

# %% [markdown]
# And how often does each of the 32,000 tokens occur in the text that it was learned from? We call
# a token rare below 12 occurrences, though any small number would do, and frequent from 100 on.

# %%
import numpy as np


def count_uses(tokenizer: BPETokenizer) -> np.ndarray:
    uses = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for word, count in counts.items():
        np.add.at(uses, tokenizer.encode(word), count)
    return uses


uses = count_uses(tokenizer)
unused, rare, frequent = uses == 0, (uses > 0) & (uses < 12), uses >= 100
share_rare = 10 * round(10 * rare.mean())
share_frequent = 10 * round(10 * (count_uses(smaller[4_000]) >= 100).mean())
print(f"never:               more than {unused.sum() // 1_000 * 1_000:,} tokens")
print(f"1 to 11 times:       more than {rare.sum() // 10_000 * 10_000:,}, about {share_rare}%")
print(f"100 times and more:  fewer than {-(-frequent.sum() // 1_000) * 1_000:,}")
print(f"100 times and more, of a vocabulary of 4,000: about {share_frequent}%")

# %% tags=["remove-cell"]
assert 2.2 < compression[1_000] < 2.6 and 3.9 < compression[32_000] < 4.3
assert 2_000 < unused.sum() < 3_000 and 1_200 < frequent.sum() < 1_900
assert rare.sum() > 20_000 and 0.65 < rare.mean() < 0.72
assert 0.65 < (count_uses(smaller[4_000]) >= 100).mean() < 0.72

# %% tags=["engine"]
# How the figure is drawn: compression by size, and uses of tokens in order


def draw_compression(compression: dict[int, float], uses: np.ndarray[Any, Any]) -> None:
    """Plot bytes per token against vocabulary size, and how often each token is used."""
    _, (top, bottom) = plt.subplots(2, 1, figsize=(5.6, 6.2))
    top.semilogx(list(compression), list(compression.values()), "o-")
    top.set(xlabel="vocabulary size", ylabel="bytes per token", ylim=(0, None))
    used = np.sort(uses[uses > 0])[::-1]
    bottom.loglog(np.arange(1, len(used) + 1), used)
    bottom.axhline(12, color="C6", lw=1, ls="--")
    bottom.text(1.2, 14, "12 times", color="C6")
    bottom.set(xlabel="tokens, the most used first", ylabel="occurrences")
    plt.show()


# %% [markdown]
# The figure shows the whole curve of compression, and below it the uses of all tokens.

# %% mystnb={"figure": {"caption": "Above: bytes per token against the size of the vocabulary. Below: how often each token is used, the most used first.", "name": "fig-tokenizer-compression"}, "image": {"alt": "Above, bytes per token rise from 1 at 257 tokens to about 4.1 at 32,000, more slowly with each doubling. Below, on doubly logarithmic axes the use of tokens falls from 50,000, in the middle with a slope near -1. It crosses a dashed line at 12 occurrences near rank 8,000, and ends in steps at 3, 2 and 1 near rank 30,000."}}
draw_compression(compression, uses)

# %% [markdown]
# Each doubling of the vocabulary buys less than the one before, and the lower plot shows why: the
# use of tokens falls like Zipf's law, so the tokens that come late are rare. They aren't free,
# either. Every token needs a vector of its own in the model; at 32,000 tokens of 512 numbers each,
# that is 16 million parameters. About 70% of our tokens are rare, and a vector that training
# has moved at most eleven times is a poor one. For six megabytes, 32,000 tokens are far too many.
# With 4,000, about 70% of them are frequent. Vocabularies of 32,000 and more belong to
# corpora of billions of words.
#
# ### In which language?
#
# Our documents are in English. What does their tokenizer do to speakers of other languages? Chapter
# 03 found translated messages on the disk. We train a second tokenizer of the same size on a
# mixture, every fourth document and half of the messages, and compare both on text that neither has
# seen, by two measures. **Characters per token** say how far a model's context reaches.
# **Fertility** is the number of tokens per word {cite}`rust2021good`. A word is here what stands
# between white space, and not a pre-token, so fertility needs a language that puts spaces between
# words.

# %% tags=["engine"]
# The messages, one half to train on and one half of ten languages to measure on; both measures
from llmbook.cleaning import read_translations

catalogs = read_translations()
halves = {
    code: (messages[::2], messages[1::2])
    for code, messages in catalogs.items()
    if sum(map(len, messages)) > 9_000
}
messages_to_train_on = [message for half, _ in halves.values() for message in half]
shown = dict(
    es="Spanish", sk="Slovak", tr="Turkish", el="Greek", ru="Russian",
    fa="Persian", hi="Hindi", ka="Georgian", ko="Korean", zh_CN="Chinese",
)  # fmt: skip
samples = {"English": held_out} | {name: halves[code][1] for code, name in shown.items()}


def measured(each: BPETokenizer, sample: list[str]) -> tuple[float, float]:
    """Return characters per token and tokens per word (between white space) of a sample."""
    tokens = count_tokens(each, count_words(sample))
    characters, spaced = sum(map(len, sample)), sum(len(text.split()) for text in sample)
    return characters / tokens, tokens / spaced


# %% [markdown]
# The folded cell above reads the messages. `catalogs` has those of each language by its code, such
# as `es`; `messages_to_train_on` is one half of them, in all languages together. `samples` maps the
# names of eleven languages to texts to measure on: the documents that were set aside for English,
# the other half of the messages for the rest. `measured(tokenizer, texts)` returns both measures.

# %%
mixed = train_bpe([*texts[::4], *messages_to_train_on], 32_000)
small = mixed.truncated(1_000)
print("           characters per token,     tokens per word,")
print("           32,000 tokens             trained on the mixture")
print("trained on: English      mixture     1,000 tokens   32,000 tokens")
for name in ("English", "Spanish", "Greek", "Hindi"):
    (before, _), (after, many) = (measured(each, samples[name]) for each in (tokenizer, mixed))
    few = measured(small, samples[name])[1]
    print(f"{name:9} {before:9.1f} {after:12.1f} {few:16.1f} {many:15.1f}")

# %% tags=["engine"]
# How the figure is drawn: bars for each language, curves for some


def draw_languages(
    samples: dict[str, list[str]], english: BPETokenizer, mixed: dict[int, BPETokenizer]
) -> None:
    """Plot characters per token for two tokenizers, and tokens per word against size."""
    _, (top, bottom) = plt.subplots(2, 1, figsize=(5.6, 6.4), height_ratios=(5, 4))
    y, largest = np.arange(len(samples)), mixed[max(mixed)]
    for offset, label, each in ((-0.2, "English only", english), (0.2, "mixed", largest)):
        reach = [measured(each, sample)[0] for sample in samples.values()]
        top.barh(y + offset, reach, 0.4, label=label)
    top.set(yticks=y, yticklabels=list(samples), xlabel="characters per token", xlim=(0, 5.2))
    top.invert_yaxis()
    top.legend(title="trained on", loc="lower right")
    for name in ("Georgian", "Russian", "Hindi", "Turkish", "English"):
        fertility = [measured(each, samples[name])[1] for each in mixed.values()]
        bottom.semilogx(list(mixed), fertility, "o-", label=name)
    bottom.set(xlabel="vocabulary size", ylabel="tokens per word", ylim=(0, None))
    bottom.legend()
    plt.show()


# %% [markdown]
# The figure adds the other languages and the sizes in between.

# %% mystnb={"figure": {"caption": "Above: characters per token with 32,000 tokens learned from English documents, and from a mixture. Below: tokens per word against the size of the vocabulary, for the mixture.", "name": "fig-tokenizer-languages"}, "image": {"alt": "Above, horizontal bars for eleven languages, two each. Trained on English: English has 4.1 characters per token, Spanish 2.4, Slovak and Turkish 1.6, the seven others 0.4 to 0.8. Trained on the mixture: English 3.9, Spanish 4.1, the others between 2 and 3.5. Below, five falling curves. At 1,000 tokens Russian and Georgian need 8 to 10 tokens per word, Hindi and Turkish 5 to 6, English 3; at 32,000 all need 1.7 to 2.9."}}
draw_languages(samples, tokenizer, {size: mixed.truncated(size) for size in sizes[2:]})

# %% [markdown]
# This should give you pause. With a tokenizer trained on English alone, a Hindi text takes more
# than two tokens for each *character*: UTF-8 spends three bytes on each, and they hardly ever
# merge. Petrov and colleagues {cite}`petrov2023unfairness` found that translations of one text can
# differ in length by a factor of fifteen, even with tokenizers that are meant to be multilingual. A
# little text in the training mixture repairs most of the damage, at a small price for English. (The
# messages are technical and much alike, so the repair looks better here than it would elsewhere.) A
# larger vocabulary helps languages with little text more than it helps English.
#
# ### What goes wrong
#
# *Numbers* are cut irregularly. In GPT-2's pattern a number is a word like any other, and where it
# is cut depends on which numbers happened to be frequent:


# %%
def ways_to_cut(tokenizer: BPETokenizer) -> int:
    years = (tokenizer.encode(f" {year}") for year in range(1_900, 2_030))
    return len({tuple(len(tokenizer.decode([id]).strip()) for id in ids) for ids in years})


for name, each in (("GPT-2", by_gpt2), ("GPT-4", by_gpt4)):
    print(f"{name}'s pattern cuts the years 1900 to 2029 in {ways_to_cut(each)} ways")

# %% [markdown]
# GPT-4's pattern always cuts such a number into a group of three digits and one of one digit. There
# are two ways all the same, because not every group is a token: 2029 is cut into `202` and `9`, but
# `198` was too rare to become a token, so 1989 is cut into `19`, `8`, and `9`.
#
# *Tokens that never come.* More than 2,000 of our tokens are never used in the text of the
# training. Among them are the special token and bytes that do not occur, but most were made by a
# merge, and so they did occur at that moment. How can they be gone? A merge on the way to a longer
# token leaves a token behind, and sometimes every copy of it goes on to merge. That has to be the
# reason, since only a later merge can take a token out of the text. The cell checks it:

# %%
made_in_vain = [tokenizer.vocabulary[id] for id in range(256, 32_000 - 1) if unused[id]]
parts = {part for pair in tokenizer.merges for part in pair}
share = sum(token in parts for token in made_in_vain) / len(made_in_vain)
print(f"of the merged tokens that are never used, {share:.0%} are parts of a longer token")

# %% [markdown]
# When a token never occurs in the model's training text, its input vector stays the random one that
# it started with. Such under-trained tokens have been found in many published models
# {cite}`land2024fishing`.
#
# *A space at the end* of a prompt becomes a token of its own. In training, letters hardly ever came
# after that token, because words carry their space themselves. Numbers did: with GPT-4's pattern, a
# number carries no space in it, so the space before it stands alone.
#
# ## Files that others read
#
# Three formats matter. Hugging Face's `tokenizer.json` holds everything in one file. GPT-2 came
# with two files, `vocab.json` and `merges.txt`. tiktoken builds its encodings from tokens and ids
# alone.
#
# The first two store tokens as text, which arbitrary bytes are not. GPT-2's way out was to give
# each byte a printable character: the 188 bytes that are printable in Latin-1 stand for themselves,
# and the 68 others get the characters from 256 on, in order. The space is byte 32. None of the 32
# bytes before it is printable, so the space becomes character 256 + 32 = 288, which is `Ġ`; and
# `␣baker` (`␣` is a space) becomes `Ġbaker`. A line break, byte 10, becomes `Ċ`. The two bytes of
# `ë`, 195 and 171, are printable, so `Zoë` becomes `ZoÃ«`. You'll meet this spelling in many files
# and error messages.

# %% [markdown] tags=["engine"]
# ### Engine room: tokenizer.json and GPT-2's files, with care (`save`, `load`)

# %% [markdown] tags=["engine"]
# The alphabet of printable characters:


# %% tags=["engine"]
#| export
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_TO_CHARACTER = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + number) for number, byte in enumerate(_UNPRINTABLE)
}


def _as_text(token: bytes) -> str:
    """Write bytes as printable characters, one for each, as GPT-2's files do."""
    return "".join(map(_BYTE_TO_CHARACTER.__getitem__, token))


# %% [markdown] tags=["engine"]
# This is how tokens look in such files. The smiley shows the characters of its four bytes:


# %% tags=["engine"]
for text in (" baker", "\n\t", "Zoë", "🙂"):
    print(f"{text!r:10} {_as_text(text.encode())}")
# %% [markdown] tags=["engine"]
# And back, with an error for characters outside the alphabet:


# %% tags=["engine"]
#| export
_CHARACTER_TO_BYTE = {character: byte for byte, character in _BYTE_TO_CHARACTER.items()}


def _as_bytes(token: str) -> bytes:
    """Undo ``_as_text``."""
    try:
        return bytes(map(_CHARACTER_TO_BYTE.__getitem__, token))
    except KeyError:
        raise ValueError(f"expected tokens in GPT-2's byte alphabet, got {token!r}") from None


# %% [markdown] tags=["engine"]
# In a file's vocabulary, special tokens stand beside the ordinary ones, since `tokenizers` takes
# their ids from there.


# %% tags=["engine"]
#| export
def _file_vocabulary(tables: _Tables) -> dict[str, int]:
    """Return all tokens as text with their ids, in the order of the ids."""
    ordinary, named = {_as_text(token): id for token, id in tables.ids.items()}, tables.named
    if clash := sorted(text for text, id in named.items() if ordinary.get(text, id) != id):
        raise ValueError(f"special_tokens: files write an ordinary token as {clash[0]!r}, too")
    return dict(sorted((ordinary | named).items(), key=lambda item: item[1]))


# %% [markdown] tags=["engine"]
# `tokenizers` reads patterns with another engine: `{1,3}+` repeats there, and `^` and `$` match at
# every line. Patterns that would change are refused.


# %% tags=["engine"]
#| export
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
# What stands around a text is written as a template, with `A` for the text. The format also wants a
# template for a pair of texts, which we never encode; in it each text gets its own marks.


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
# The whole file has the pattern as a pre-tokenizer, the byte alphabet as a second one and as the
# decoder, and the model:


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
# would change the ids is refused by name, never ignored.


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
def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    data = json.loads(check_path(path).read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, got {type(data).__name__}")
    return data


@contextmanager
def naming_file(path: str | Path) -> Iterator[Path]:
    """Give ``path``; whatever is wrong with its contents becomes a ``ValueError`` that names it."""
    path = check_path(path)
    try:
        yield path
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(path)!r}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        message = f"not a tokenizer's file: {type(error).__name__} {error}"
        raise ValueError(f"path: {str(path)!r}: {message}") from error


# %% [markdown] tags=["engine"]
# What a tokenizer is made of, from `tokenizer.json`. Added tokens stand in the vocabulary, too;
# those that are bytes or have a part in a merge are taken from there as ordinary tokens.


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
# Files are written beside their place and moved there, so that a program that is stopped leaves no
# half-written file.


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
        _write_text(check_path(path), text)

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
        folder = check_path(folder, "folder")
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder / "vocab.json", json.dumps(tokens, ensure_ascii=False))
        _write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines, ""]))

    @classmethod
    def load_gpt2(cls, folder: str | Path, *, pattern: str = GPT2_PATTERN) -> "BPETokenizer":
        """Read ``vocab.json`` and ``merges.txt``. Tokens that no merge makes become special."""
        with naming_file(check_path(folder, "folder")) as found:
            made = cls(**_from_gpt2(found), pattern=pattern)
        return made


# %% [markdown]
# ### Merges from ids alone
#
# tiktoken knows no merges. It joins *any* two neighbors whose bytes together are a token, taking
# the token with the lowest id first. Is that the same as merging by rank? Not for every list of
# merges. It is the same if
#
# 1. a token's id is greater than the id of each of its two parts (parts that are single bytes don't
#    count), and the ids of merged tokens rise in the order of the merges, and
# 2. every token is *reachable*: encoding its own bytes gives that one token.
#
# Tokenizers that were trained have both properties. A token was made from bytes that stood side by
# side in some word, and until then nothing had crossed their ends; so standing alone, they merge in
# the same way. For vocabularies of other origin, `to_tiktoken()` checks.

# %% [markdown] tags=["engine"]
# #### Engine room: the proof, and an encoding for tiktoken (`to_tiktoken`)

# %% [markdown] tags=["engine"]
# *Proof.* A word that is a token is taken whole by tiktoken. By (2), our merges make the same token
# of it. So take a word that is none.
#
# By (1), a merge makes only pairs of higher rank, so both ways go through the ids from low to high.
# Suppose that both have done the same so far, and that tiktoken now joins the neighbors $u$ and $v$
# into the token $t = uv$, although our merge for $t$ joins another pair. By (2), our merges turn
# the bytes of $t$, standing alone, into $t$. On the way there is a first merge that crosses the
# border between $u$ and $v$. It isn't the last one, which joins at another place, so its id is
# lower than that of $t$. Up to that merge, the same merges have been made inside $t$ in the text as
# in $t$ alone: nothing in the text has crossed the ends of $t$, because $u$ and $v$ still begin and
# end there. So this merge's pair stood in the text as well, and was merged when its turn came,
# before $t$. But then $u$ and $v$ are no longer two tokens, a contradiction. $\square$


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def to_tiktoken(self, name: str = "llmbook") -> Any:
        """Return a ``tiktoken.Encoding`` with the same ids. A ``ValueError`` says why not.

        Added tokens become special there, and it puts nothing around a text.
        """
        import tiktoken

        ids, merged = self._tables.ids, self._tables.merged
        longer = ((part, a + b) for a, b in self.merges for part in (a, b) if len(part) > 1)
        rising = all(low < high for low, high in pairwise(merged))
        if not rising or any(ids[part] > ids[token] for part, token in longer):
            raise ValueError("merges: expected ids that rise in the order of the merges")
        for id, token in self.vocabulary.items():
            if self._tables.merge(token) != [id]:
                raise ValueError(f"vocabulary: expected tokens that merges make, got {token!r}")
        if self.steps.normalizer:
            raise ValueError("normalizer: expected none, which tiktoken has not, got 'NFC'")
        return tiktoken.Encoding(
            check_text(name, "name"),
            pat_str=self.pattern,
            mergeable_ranks=ids,
            special_tokens=self._tables.named,
        )


# %% [markdown]
# ### What else is asked of a tokenizer
#
# Where in the text does each token stand? How can one word be cut in many ways, so that a model
# learns its parts? How are tiktoken's own files read? The book doesn't need the answers; if you do,
# they are in the room that follows.

# %% [markdown] tags=["engine"]
# #### Engine room: where tokens stand, merges left out at random, merges found from ranks

# %% [markdown] tags=["engine"]
# To mark names in a text, or to highlight what a model looked at, we need the *offsets* of the
# tokens: where in the text each begins and ends, in characters. The bytes of the tokens, one after
# the other, are those of the text, so we write down for each byte which character it comes from. A
# token that is part of a character stands where the whole character does.
#
# A normalizer turns several characters into one, or one into several. It never reaches across the
# border of a *grapheme cluster*, which is `\X` in a regular expression. Where it changes a cluster,
# all that it writes stands at the whole cluster. (`tokenizers` reports the first character alone.)


# %% tags=["engine"]
#| export
_CLUSTER = regex.compile(r"\X")


class _Tables(_Tables):  # continued
    def origins(self, text: str, allowed: tuple[str, ...]) -> list[tuple[int, int]]:
        """Return, for each byte of the text that is encoded, the place in ``text`` it is from."""
        early = {*allowed, *self.steps.added_tokens} - {*self.steps.normalized}
        found = [match.span() for match in _finder(tuple(sorted(early))).finditer(text)]
        origins: list[tuple[int, int]] = []
        for between, (start, end) in enumerate(pairwise([0, *chain(*found), len(text)])):
            named = between % 2 == 1
            clusters = [(start, end)] if named else self._clusters(text, start, end)
            for first, last in clusters:
                given = text[first:last]
                written = given if named else self.normalize(given)
                for place, character in enumerate(written):
                    same = written == given
                    origin = (first + place, first + place + 1) if same else (first, last)
                    origins += [origin] * len(character.encode())
        return origins

    def _clusters(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        if not self.steps.normalizer:
            return [(start, end)]
        return [match.span() for match in _CLUSTER.finditer(text, start, end)]


# %% [markdown] tags=["engine"]
# Tokens are then as long as their bytes. Only a token that is found in normalized text may be
# written differently there.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def encode_with_offsets(
        self,
        text: str,
        *,
        allowed_special: _Allowed = (),
        disallowed_special: _Allowed = (),
        add_special_tokens: bool = True,
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of ``encode``, and where in ``text`` each stands: (start, end).

        Places are counted in characters (code points); surrogates that make a pair are one. A
        token that is a part of a character stands at all of it; prefix and suffix stand at (0, 0).
        """
        tables, text = self._tables, valid_text(text)
        ids = self.encode(
            text,
            allowed_special=allowed_special,
            disallowed_special=disallowed_special,
            add_special_tokens=False,
        )
        origins = tables.origins(text, tables.special.allowed(allowed_special))
        late = {tables.named[token]: token for token in self.steps.normalized}
        offsets, place = list[tuple[int, int]](), 0
        for id in ids:
            data = tables.normalize(late[id]).encode() if id in late else tables.tokens[id]
            covered = origins[place : place + len(data)]
            offsets.append((covered[0][0], covered[-1][1]))
            place += len(data)
        if not add_special_tokens:
            return ids, offsets
        nowhere = [[(0, 0)] * len(added) for added in (tables.prefix, tables.suffix)]
        return [*tables.prefix, *ids, *tables.suffix], [*nowhere[0], *offsets, *nowhere[1]]


# %% [markdown] tags=["engine"]
# A model that always sees a word cut in one way learns nothing about its parts. **BPE-dropout**
# {cite}`provilkov2020bpe` cuts it differently each time. Before each merge, every pair that could
# be merged is left out with some probability, and the pair with the lowest rank among the others is
# merged. When all are left out, the word is finished. Nothing is remembered, because the next cut
# should be another.


# %% tags=["engine"]
#| export
def _merge_some(
    tokens: list[int],
    ranks: dict[tuple[int, int], int],
    merged: list[int],
    dropout: float,
    generator: Random,
) -> list[int]:
    """Merge neighbors by rank, each possible merge left out with probability ``dropout``."""
    tokens = list(tokens)
    while True:
        possible = [
            (rank, place)
            for place, pair in enumerate(pairwise(tokens))
            if (rank := ranks.get(pair)) is not None and generator.random() >= dropout
        ]
        if not possible:
            return tokens
        rank, place = min(possible)
        tokens[place : place + 2] = [merged[rank]]


# %% [markdown] tags=["engine"]
# Special and added tokens are found as usual; what lies between them is cut at random.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    def sample(
        self,
        text: str,
        dropout: float = 0.1,
        *,
        generator: Random | None = None,
        allowed_special: _Allowed = (),
        add_special_tokens: bool = True,
    ) -> list[int]:
        """Return ids of ``text``, cut at random by BPE-dropout; they decode to the same text.

        Each possible merge is left out with probability ``dropout``: 0 gives the ids of
        ``encode``, 1 those of the bytes. Source: Provilkov et al. (2020), Algorithm 1.
        """
        if (
            not isinstance(dropout, int | float)
            or isinstance(dropout, bool)
            or not 0 <= dropout <= 1
        ):
            raise ValueError(f"dropout: expected from 0 to 1, got {dropout!r:.60}")
        if not isinstance(generator, Random | None):
            raise ValueError(f"generator: expected a random.Random, got {generator!r:.60}")
        tables, chance = self._tables, generator or Random()

        def ordinary(part: str) -> list[int]:
            ids = list[int]()
            for word in tables.split(part):
                single = [tables.byte_ids[byte] for byte in word.encode()]
                ids += _merge_some(single, tables.ranks, tables.merged, dropout, chance)
            return ids

        allowed = tables.special.allowed(allowed_special)
        ids = tables.encode_named(valid_text(text), allowed, ordinary if dropout else tables.encode)
        return [*tables.prefix, *ids, *tables.suffix] if add_special_tokens else ids


# %% [markdown] tags=["engine"]
# tiktoken's files have a line for each token: its bytes in base64, and its rank, which is its id.
# Special tokens and the pattern are not in them. Our tokenizer needs merges, and they follow from
# the ranks. ({ref}`ex-tokenizer-ranks` asks for the first half; try it first.)
#
# In some vocabularies, such as Llama 3's, not all tokens are reachable in the sense of the section
# above, and more than two parts are left of them. tiktoken makes an unreachable token of *any* two
# parts that meet, so each way to cut it in two becomes a merge; and it never cuts a word that is a
# token, which is our `ignore_merges`.


# %% tags=["engine"]
#| export
def _merges_of_ranks(ranks: Mapping[bytes, int]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Return the merges, in order, that give tiktoken's ids; and whether they make every token."""
    merges: list[tuple[bytes, bytes]] = []
    reached = True
    for token, own in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
            if (lowest := min(joined)) >= own:
                break
            place = joined.index(lowest)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        elif len(parts) > 2:
            reached = False
            cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
            merges += [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
    return merges, reached


# %% [markdown] tags=["engine"]
# A line that isn't a token and its rank is named by its number.


# %% tags=["engine"]
#| export
def _read_ranks(path: Path) -> dict[bytes, int]:
    """Return the ranks in a file of tiktoken's."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            data, id = b64decode(token, validate=True), int(rank)
        except ValueError:
            expected = "expected a token in base64 and its rank"
            raise ValueError(f"line {number}: {expected}, got {line!r:.60}") from None
        if data in ranks:
            raise ValueError(f"line {number}: expected each token once, got {data!r:.60} again")
        ranks[data] = id
    return ranks


# %% [markdown] tags=["engine"]
# What ranks cannot say is refused when the file is written: merges that would not be found again,
# and steps around the merges.


# %% tags=["engine"]
#| export
class BPETokenizer(BPETokenizer):  # continued
    @classmethod
    def load_tiktoken(
        cls,
        path: str | Path,
        *,
        special_tokens: Mapping[str, int] | Collection[str] = (),
        pattern: str = GPT4_PATTERN,
    ) -> "BPETokenizer":
        """Read a rank file of tiktoken's, such as ``cl100k_base.tiktoken``; ids are its ranks.

        The file has no pattern and no ``special_tokens``: a list of these gets the next ids.
        """
        with naming_file(path) as found:
            ranks = _read_ranks(found)
            merges, reached = _merges_of_ranks(ranks)
            vocabulary = {id: token for token, id in ranks.items()}
            if len(vocabulary) < len(ranks):
                raise ValueError("expected a rank of its own for each token, got some twice")
            _checked_vocabulary(vocabulary)
        options: Any = {"pattern": pattern, "ignore_merges": not reached}
        return cls(vocabulary, merges, special_tokens=special_tokens, **options)

    def save_tiktoken(self, path: str | Path) -> None:
        """Write a rank file for tiktoken; pattern and special tokens are not in it."""
        ids = self._tables.ids
        merges, reached = _merges_of_ranks(ids)
        if merges != list(self.merges) or not (reached or self.ignore_merges):
            raise ValueError("merges: expected those that follow from the ids alone, got others")
        if self.steps != TextSteps():
            raise ValueError("steps: expected none, which rank files cannot hold: use save")
        lines = (
            f"{b64encode(t).decode()} {id}" for t, id in sorted(ids.items(), key=lambda i: i[1])
        )
        _write_text(check_path(path), "\n".join([*lines, ""]))


# %% [markdown] tags=["engine"]
# Here are the tokens of a line with their places, and one word cut at random three times:

# %% tags=["engine"]
complete = BPETokenizer.from_merges(merges)
line, word = "Zoë's loaves", " documentation"
_, offsets = complete.encode_with_offsets(line)
print(*(f"{line[start:end]!r} at {start}-{end}" for start, end in offsets), sep=", ")
chance = Random(3)
for _ in range(3):
    ids = complete.sample(word, 0.3, generator=chance)
    print("dropout 0.3:", "|".join(complete.decode([id]) for id in ids))
    assert complete.decode(ids) == word

# %% [markdown]
# ## Is it the real thing?
#
# We compare three programs that hold the same merges: ours, tiktoken with our ids, and
# `tokenizers`, Hugging Face's library, with our file. The text is in many scripts, with emoji,
# code, runs of white space, and a separate accent. Ids and decoded text have to be equal, or the
# cell fails. `tokenizers` looks for special tokens in *all* text, so compare with
# `allowed_special="all"`.

# %%
import tempfile

import tokenizers

text = """Der Bäcker backt, пекарь печёт, ο φούρναρης ψήνει, パン屋は焼く, 빵을 굽는다, बेकर बनाता है,
הָאוֹפֶה אופה, الخباز يخبز، 👩🏽‍🍳🥖🥐 e\u0301 \u200d½ ² Ⅷ ٣٤٥ 1234567.89 it's WE'LL don't\r\n\r\n
def bake(n):\n\t\treturn  [i ** 2   for i in range(n)]  # \u2028 <|endoftext|>   \n  \ufffd\x00 """
compared = tempfile.TemporaryDirectory()
file = f"{compared.name}/tokenizer.json"
# Made anew: the rooms define the class again, with more methods, and the old object lacks save.
tokenizer = BPETokenizer.from_merges(merges)
tokenizer.save(file)
theirs, encoding = tokenizers.Tokenizer.from_file(file), tokenizer.to_tiktoken()
ids = tokenizer.encode(text, allowed_special="all")
assert ids == encoding.encode(text, allowed_special="all") == theirs.encode(text).ids
assert tokenizer.decode(ids) == text == theirs.decode(ids, skip_special_tokens=False)
n_ids = len(ids) // 50 * 50
print(f"all three give the same ids, more than {n_ids} of them, and decode them to the same text")

# %% [markdown]
# Then we compare our ids with tiktoken's, on documents and on messages in more than forty
# languages:

# %%
sample = held_out[:500] + [text for messages in catalogs.values() for text in messages[:50]]
pairs = zip(tokenizer.encode_batch(sample), encoding.encode_ordinary_batch(sample), strict=True)
different = sum(ours != others for ours, others in pairs)
print(f"{different} of more than {len(sample) // 1000},000 texts have other ids in tiktoken")

# %% [markdown]
# The three programs carry tables of Unicode from different years. A character that was added in
# between may count as a letter in one program and as a symbol in another, and be cut differently.
# On older characters they agree.

# %% [markdown] tags=["engine"]
# ### Engine room: a tokenizer trained by `tokenizers`, read by us

# %% [markdown] tags=["engine"]
# The other way round: `tokenizers` trains, and we read its file. The ids are the same again. It
# breaks ties by another rule, so some of its tokens differ from those that we learn from the same
# text, but most do not.

# %% tags=["engine"]
from tokenizers import models, pre_tokenizers, trainers

assert BPETokenizer.load(file) == tokenizer
assert tokenizer.encode("\ud83e!") == encoding.encode("\ud83e!")  # half a character
few_texts = texts[::16]
split = pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), "isolated")
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
rival = tokenizers.Tokenizer(models.BPE())
rival.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
rival.decoder = tokenizers.decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=4_000, show_progress=False, initial_alphabet=alphabet)
rival.train_from_iterator(few_texts, trainer)
rival.save(file)
loaded, own = BPETokenizer.load(file), train_bpe(few_texts, 4_000, special_tokens=())
assert loaded.encode(text) == rival.encode(text).ids
common = set(loaded.vocabulary.values()) & set(own.vocabulary.values())
print(f"{len(common) / 4_000:.0%} of the 4,000 tokens are the same")

# %% [markdown]
# ## How fast is it?
#
# We time our trainer against the naive one, on 4,000 different words and 100 merges, and our
# encoder against `tokenizers` and tiktoken, on the documents that were set aside, one document at a
# time and with a cold cache.

# %% tags=["engine"]
# What is measured: training, both ways, and encoding by three programs


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


few_words = dict.fromkeys(list(counts)[:4_000], 1)
flat = [word.encode() for word in few_words]
slowdown = seconds(lambda: naive_bpe(flat, 100)) / seconds(lambda: learn_merges(few_words, 100))
seconds_counting = seconds(lambda: count_words(texts))
fresh = BPETokenizer.from_merges(merges)
times = {
    "this chapter": seconds(lambda: [fresh.encode(text) for text in held_out]),
    "tokenizers": seconds(lambda: [theirs.encode(text) for text in held_out]),
    "tiktoken": seconds(lambda: [encoding.encode_ordinary(text) for text in held_out]),
}

# %% [markdown]
# The measurements are in the folded cell above, and these are the results:

# %% tags=["nbval-ignore-output"]
megabytes = sum(len(text.encode()) for text in texts) / 1e6
print(f"training: the naive trainer takes {slowdown:.0f} times as long")
print(f"{megabytes:.1f} MB counted in {seconds_counting:.1f} s, merged in {seconds_merging:.1f} s")
for name, value in times.items():
    print(f"encoding, {name}: {new_bytes / 1e6 / value:.1f} MB per second")

# %% [markdown]
# Training spends most of its time on merging, which is pure Python. Since the number of *different*
# words grows slowly, by Heaps' law, the balance shifts as the text grows: on 100 MB most of the
# time goes into counting, and thus into the regular expression. Encoding with a cold cache is bound
# by the merges of words not met before. `tokenizers` also records where each token stands in the
# text, and uses all cores in its batch mode. The folder `benchmarks/results` of the repository has
# tables for more text, and for vocabularies of up to 128,000 tokens.
#
# ## Exercises
#
# ````{exercise} Count characters without decoding
# :label: ex-tokenizer-count
# *Five minutes.* A large file of valid UTF-8 is read in stretches, which may begin and end in the
# middle of a character. Write `count_characters(data)`, which returns how many code points *begin*
# in the bytes `data`. The counts of all stretches then add up to that of the file. The first two
# bits of each byte are all you need.
# ````


# %% tags=["solution"]
def count_characters(data: bytes) -> int:
    """Return how many code points begin in ``data``, a stretch of valid UTF-8."""
    return sum(byte >> 6 != 0b10 for byte in data)  # all but continuations


# %% tags=["check"]
for sample_text in ("", "abc", "naïve", "€5", "🙂🙂", "e\u0301", "\u07ff\u0800\uffff\U00010000"):
    data = sample_text.encode()
    found = count_characters(data)
    right = len(sample_text)
    assert found == right, f"{sample_text!r} has {right} code points, not {found}"
    for cut in range(len(data)):
        try:
            found = count_characters(data[:cut]) + count_characters(data[cut:])
        except UnicodeDecodeError:
            found = "an error"
        where = f"{sample_text!r} cut at byte {cut}"
        assert found == right, (
            f"counts of two stretches do not add up, {where}: expected {right}, got {found}"
        )

# %% [markdown]
# ````{exercise} Digits from the right
# :label: ex-tokenizer-digits
# *Fifteen minutes.* People write `1,234,567`, but GPT-4's pattern cuts `123|456|7`, so the token
# `123` means 1,230 in `123|4` and 12,300 in `123|45`. Write a function `digits_pattern()` that
# returns a pattern with which `pretokenize` cuts every run of decimal digits, in any script
# (`\p{Nd}`), in threes *from the right*: `1|234|567`. Use a look-ahead. A pre-token with decimal
# digits in it has nothing else in it, not even a space. The rest may be cut in any way, and what
# the pattern leaves out, `pretokenize` keeps.
# ````


# %% tags=["solution"]
def digits_pattern() -> str:
    """Return a pattern that cuts runs of digits in threes from the right."""
    return r"\p{Nd}{1,3}(?=(?:\p{Nd}{3})*+(?!\p{Nd}))"  # whole threes up to the run's end


# %% tags=["check"]
mixed_texts = "a 9999999999.", "x56y 1234 567", "x1234567y", "7\n-1234 12345", "34²"
for text in ("1", "12345", "1234567", "٣٤٥٦", *mixed_texts):
    words = pretokenize(text, digits_pattern())
    with_digits = [word for word in words if any(map(str.isdecimal, word))]
    glued = [word for word in with_digits if not word.isdecimal()]
    assert not glued, f"digits are glued to something else in {text!r}: {glued}"
    runs = regex.findall(r"\p{Nd}+", text)
    threes = [run[max(end - 3, 0) : end] for run in runs for end in range(len(run), 0, -3)]
    assert sorted(map(len, with_digits)) == sorted(map(len, threes)), (
        f"the runs of digits in {text!r} are not cut in threes, the rest alone: {words}"
    )
    assert sorted(with_digits) == sorted(threes), f"not cut from the right in {text!r}: {words}"

# %% [markdown]
# ````{exercise} The fewest tokens
# :label: ex-tokenizer-fewest
# *Half an hour.* Merging by rank is greedy: it never takes a merge back. How much does greed cost?
# Write `fewest_tokens(word, tokens)`, the least number of tokens that spell `word`. Here `word` is
# a byte string, and `tokens` is a set of them, all single bytes included. Let $m_j$ be the least
# number of tokens for the first $j$ bytes. Then $m_0 = 0$, and $m_j$ is one more than the least
# $m_i$ over all $i < j$ for which `word[i:j]` is a token. Then write `saving(counts, tokenizer)`:
# the share of its tokens that the tokenizer would save with the best cuts, on a text in which each
# word, a `str`, occurs as often as `counts` says. It takes the tokens from `tokenizer.vocabulary`.
# Guess before you run `saving(count_words(held_out), by_gpt4)`.
# ````


# %% tags=["solution"]
def fewest_tokens(word: bytes, tokens: set[bytes]) -> int:
    """Return the least number of ``tokens`` (all single bytes among them) that spell ``word``."""
    least = [0]
    for end in range(1, len(word) + 1):
        least.append(1 + min(n for start, n in enumerate(least) if word[start:end] in tokens))
    return least[-1]


# %% tags=["solution"]
def saving(counts: dict[str, int], tokenizer: BPETokenizer) -> float:
    """Return the share of tokens saved by the fewest, in a text with these counts of words."""
    tokens = set(tokenizer.vocabulary.values())
    greedy = sum(count * len(tokenizer.encode(word)) for word, count in counts.items())
    best = sum(count * fewest_tokens(word.encode(), tokens) for word, count in counts.items())
    return 1 - best / greedy


# %% tags=["check"]
single = {bytes([byte]) for byte in range(256)}
assert fewest_tokens(b"", single) == 0, "no bytes need no tokens"
generator = random.Random(0)
for _ in range(300):
    word = bytes(generator.choices(b"ab", k=generator.randrange(1, 9)))
    starts = [generator.randrange(len(word)) for _ in range(4)]
    some = {word[start : start + generator.randrange(2, 9)] for start in starts}
    cuts = [[at for at in range(1, len(word)) if bits >> at & 1] for bits in range(2 ** len(word))]
    pieces = [[word[a:b] for a, b in pairwise([0, *at, len(word)])] for at in cuts]
    right = min((cut for cut in pieces if single.union(some).issuperset(cut)), key=len)
    found = fewest_tokens(word, single | some)
    assert found <= len(right), f"{word} can be spelled with fewer tokens: {right}, not {found}"
    assert found == len(right), f"{word} cannot be spelled with {found} of the tokens {some}"
some = single | {"éé".encode()}
assert fewest_tokens("ééé".encode(), some) == 3, "tokens spell bytes: éé, and é in two bytes"
toy = BPETokenizer.from_merges([(b"b", b"c"), (b"a", b"b"), (b"c", b"d")])
found = saving({"abcd": 3, "bc": 1}, toy)
assert abs(found - 0.3) < 1e-9, (
    f"abcd, three times a|bc|d, could be ab|cd, and bc is one token; 3 of 10 saved, not {found}"
)
found = saving(count_words(held_out), by_gpt4)
assert 0.002 < found < 0.01, f"wrong for the words of the documents set aside: {found}"

# %% [markdown]
# ````{exercise} Merges from ranks
# :label: ex-tokenizer-ranks
# *Forty minutes.* tiktoken's files hold only tokens and their ids. `BPETokenizer` needs merges.
# Write `merges_from_ranks(ranks)`, which finds them: for a token of two bytes or more, merge its
# own bytes as tiktoken does (always the neighbors whose joined bytes have the lowest id, which
# tiktoken calls their rank), but only with ranks *lower than its own* (in a trained vocabulary it
# is enough to stop at two parts). These two parts are its merge. Return all merges in order, as
# pairs of `bytes`.
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
bytes_alone = {bytes([byte]): byte for byte in range(256)}
found = merges_from_ranks(bytes_alone)
assert found == [], f"a single byte is the result of no merge; expected an empty list, got {found}"
for each in (of_stories, by_gpt2.truncated(2_000), by_gpt4):
    expected = each.merges
    by_rank = {token: id for id, token in each.vocabulary.items()}
    for given in (by_rank, dict(sorted(by_rank.items()))):
        found = merges_from_ranks(given)
        odd = [x for x in found if not isinstance(x, tuple) or set(map(type, x)) != {bytes}]
        assert not odd, f"a merge is a tuple of two bytes objects, not {odd[0]}"
        assert all(len(pair) == 2 for pair in found), "a merge joins two tokens"
        made = [b"".join(pair) for pair in found]
        longer = set(by_rank) - set(bytes_alone)
        assert len(found) >= len(longer), (
            f"only {len(found)} merges for {len(longer)} longer tokens: "
            "stop at two parts; the token's own rank does not count"
        )
        assert sorted(made) == sorted(longer), "each longer token is the result of one merge"
        assert made == [a + b for a, b in expected], "the ranks decide the order of the merges"
        wrong = next(
            (pair for pair, right in zip(found, expected, strict=True) if pair != right), 0
        )
        assert not wrong, f"the merges of lower rank leave other parts than {wrong}"

# %% tags=["remove-cell"]
folder.cleanup()
compared.cleanup()

# %% [markdown]
# ## Summary
#
# A text is a sequence of characters, characters are code points, and a code point is one to four
# bytes of UTF-8. Byte-pair encoding starts from the bytes and merges the most frequent pair, with a
# fixed rule for ties; a pattern keeps the merges within words. Counting words, an inverted index,
# corrections at the seams, and a queue by count bring training from hours to seconds. The merges,
# applied in order, encode any text, and decoding loses nothing.
#
# **Checklist: choosing a tokenizer.**
#
# - Does its training text contain the languages, the code, and the numbers that the model is
#   supposed to read? Measure characters per token for each.
# - Is the vocabulary so large that another doubling would buy little, and still so small that the
#   rarest tokens are seen hundreds of times in the model's training text?
# - Do you compare models with different tokenizers in bits per byte, since a larger vocabulary has
#   fewer, harder tokens to predict?
# - Are special tokens ordinary text when a user types them?
# - Do encoding and decoding give the text back, even with broken characters and odd white space?
# - Is the tokenizer stored with the model, in a format that others can read?
#
# **Further reading.** Gage {cite}`gage1994new` and Sennrich and colleagues
# {cite}`sennrich2016neural` are short and clear. Zouhar and colleagues {cite}`zouhar2023formal`
# bound how far the greedy choice of merges can be from the best one. Chapter 06 builds the two
# rivals, WordPiece and Unigram, and compares them.
