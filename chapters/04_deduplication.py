# %% [markdown]
# # Deduplication
#
# > Find the copies in a corpus, exact and near, in time that grows with its size and not with its
# > square, and keep the best of each.
#
# In one collection of web pages, a single English sentence of 61 words occurs more than 60,000
# times {cite}`lee2022deduplicating`. Models learn such text by heart. The same study found that
# models trained on deduplicated text emit memorized text ten times less often and reach the same
# accuracy in fewer steps. They are also tested more honestly, since the usual validation sets
# contain copies of training text.
#
# Exact copies are easy. The hard ones differ in a year, a name, a comma: license headers,
# generated files, the same notice by another company. To find those one would compare all pairs,
# and a million documents have half a trillion. This chapter builds the way around it and runs it
# on the text of your own installation.
#
# | | |
# |---|---|
# | **Part** | I. Foundations and data |
# | **You build** | {py:func}`~llmbook.deduplication.exact_duplicates`, {py:func}`~llmbook.deduplication.shingles`, {py:func}`~llmbook.deduplication.jaccard`, {py:class}`~llmbook.deduplication.MinHasher`, {py:class}`~llmbook.deduplication.LSHIndex`, {py:func}`~llmbook.deduplication.find_near_duplicates`, {py:func}`~llmbook.deduplication.deduplicate` |
# | **You need** | documents ({doc}`02_corpus`), NumPy arrays, probability of independent events |
# | **It takes** | 60 minutes for the main line, 2.5 hours for everything, 30 seconds to run |

# %% tags=["remove-cell"]
#| default_exp deduplication

# %% tags=["engine"]
#| export
# What the engine rooms import
import json
from dataclasses import asdict
from itertools import chain

from llmbook.environment import check_choice, check_path, check_text, check_whole, whole_file

# %% [markdown]
# Signatures are plain NumPy arrays; nothing here needs a tensor.

# %%
#| export
import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Shaped, UInt, UInt32, UInt64

from llmbook.corpus import Document, iter_documents, iter_texts, ordered_map

# %% [markdown]
# Our corpus is the one of chapter 02 and three more packages, which carry license headers.

# %%
import time

import matplotlib.pyplot as plt

from llmbook.corpus import read_installed_docs

plt.style.use("llmbook.book")

packages = ["stdlib", "numpy", "matplotlib", "scikit-learn", "datasets", "pyarrow"]
corpus = list(read_installed_docs(packages))
size = sum(len(document.text) for document in corpus)
assert len(corpus) > 35_000 and size > 9_000_000
print("more than 35,000 documents with 9 million characters")

# %% [markdown]
# ## Exact duplicates
#
# Two texts that differ only in case, in white space, or in how Unicode writes the same character
# are the same for our purpose. So we bring each into a **canonical** form first.


# %%
#| export
def canonical_text(text: str) -> str:
    """Return ``text`` in Unicode's form NFKC, case folded, any white space as one space.

    >>> canonical_text("Dough  RISES\\n ﬁne.")
    'dough rises fine.'
    """
    return " ".join(unicodedata.normalize("NFKC", check_text(text)).casefold().split())


# %% [markdown]
# To keep every text would take as much memory as the corpus. A **hash** of 128 bits stands for it.
# How likely is it that among $N$ different texts two share a hash of $m$ bits? There are
# $N(N-1)/2$ pairs, each agrees with probability $2^{-m}$, and the probability of a union is at
# most the sum:
#
# $$
# P(\text{any two of } N \text{ agree}) \le \frac{N^2}{2} \, 2^{-m} .
# $$ (dedup-birthday)
#
# For a billion documents that is 3 % with 64 bits, and less than $10^{-20}$ with 128. (Half of a
# surrogate pair, which UTF-8 cannot write, is written by `surrogatepass`.)


# %%
#| export
def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def exact_duplicates(documents: Iterable[Document | str]) -> list[list[int]]:
    """Return groups of indices of documents whose canonical texts are equal, two or more in each.

    Indices ascend in a group, groups come in the order of their first member. Empty documents are
    copies of each other. Texts are read once and not kept: 16 bytes stand for each.

    >>> exact_duplicates(["Dough rises.", "Yeast.", "dough\\n rises."])
    [[0, 2]]
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, text in enumerate(iter_texts(documents)):
        groups[blake2b(_utf8(canonical_text(text)), digest_size=16).digest()].append(i)
    return [group for group in groups.values() if len(group) > 1]


# %% [markdown]
# On the corpus:

# %%
groups = exact_duplicates(corpus)
copies = [i for group in groups for i in group[1:]]
share = len(copies) / len(corpus)
text_share = sum(len(corpus[i].text) for i in copies) / size
assert 0.06 < share < 0.13 and text_share < 0.05 and max(map(len, groups)) > 200
print("between 6 and 13 % of the documents are copies, with less than 5 % of the text")
print("the largest group has more than 200 members")

# %% [markdown]
# About one document in eleven is a copy, mostly a short one. From here on we look at what is left.
#
# ## Near duplicates: which texts are alike?
#
# We need a number for "nearly the same" that does not fall to zero when a word is inserted at the
# front. Broder {cite}`broder1997resemblance` cuts a text into **shingles**, all runs of $n$
# consecutive words, which overlap like the shingles of a roof. He compares the *sets* $A$ and $B$
# of shingles of two texts by their **Jaccard similarity**
#
# $$
# J(A, B) = \frac{|A \cap B|}{|A \cup B|} .
# $$ (dedup-jaccard)
#
# It is 1 for equal sets and 0 for disjoint ones. Two empty sets would give $0/0$; we call that 1,
# since two empty documents are the same.


# %%
#| export
def jaccard(
    a: AbstractSet[Any] | Shaped[np.ndarray, " m"], b: AbstractSet[Any] | Shaped[np.ndarray, " n"]
) -> float:
    """Return the Jaccard similarity of two sets, or of the sets of two arrays' elements, 0 to 1.

    Of two empty sets it is 1: they are equal. Source: Jaccard's coefficient, as in Broder (1997).

    >>> jaccard({1, 2, 3}, {2, 3, 4})
    0.5
    """
    for name, given in (("a", a), ("b", b)):
        if not isinstance(given, AbstractSet) and getattr(given, "ndim", 0) != 1:
            hint = "; cut a text by shingles first" if isinstance(given, str) else ""
            raise ValueError(f"{name}: expected a set or a row of numbers, got {given!r:.60}{hint}")
    first, second = (set(s.tolist()) if isinstance(s, np.ndarray) else set(s) for s in (a, b))
    union = first | second
    return len(first & second) / len(union) if union else 1.0


# %% [markdown]
# Shingles as a set of tuples; a text of fewer than $n$ words is one shingle, the whole of it:


# %%
def word_ngrams(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = canonical_text(text).split()
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))}


recipe = "Mix the flour with the water and the yeast, then wait for an hour in the warm kitchen"
edited = recipe.replace("hour", "evening")
similarity = jaccard(word_ngrams(recipe), word_ngrams(edited))
print(f"{len(word_ngrams(recipe))} shingles; similarity {similarity:.2f} after an edit of one word")

# %% [markdown]
# One word of eighteen was changed, and more than half of the similarity is gone. Why? A word in
# the middle is part of $n$ shingles. If the text has $m$ different ones, the edit destroys $n$ and
# creates $n$. The intersection then has $m - n$ elements, the union $m + n$, and
#
# $$
# J = \frac{m - n}{m + n} .
# $$ (dedup-edit)
#
# Here $m = 14$ and $n = 5$ give $9/19 \approx 0.47$. To be similar to degree $J$ after one edit
# inside, a text needs $m \ge n\,(1+J)/(1-J)$ shingles. At $n = 5$ and $J = 0.8$ that is 45, or 49
# words. By this measure **a short text has hardly any near duplicates, only exact ones**, and most
# documents of our corpus are short. A smaller $n$ forgives more, but then any two texts share
# something: at $n = 1$, the commonest words of the language. Word 5-grams are the custom for
# documents {cite}`lee2022deduplicating,penedo2024fineweb`.
#
# What is a word? Letters and digits, with all punctuation ignored? Python documents its operators
# in one line each:

# %%
import operator
import re

lines = sorted({vars(operator)[name].__doc__ for name in ("add", "sub", "mul", "lt", "gt", "eq")})
without = {" ".join(re.findall(r"\w+", line)) for line in lines}
print(f"{len(lines)} different documents; without punctuation: {len(without)}")

# %% [markdown]
# Addition became a copy of subtraction. We split at white space and keep what is between.
#
# ### Shingles as numbers
#
# A tuple of five strings takes hundreds of bytes. We want a number for each shingle, for a whole
# batch of texts at once, without a loop over words. {py:func}`~llmbook.deduplication.shingles`
# gives the set of a text's shingles as an array of 64-bit hashes. It is cut from the same canonical
# text at the same places, so all similarities stay the same.

# %% [markdown] tags=["engine"]
# ### Engine room: the hashes of all words of a batch at once

# %% [markdown] tags=["engine"]
# Let a word be the bytes $c_0, c_1, \dots, c_\ell$. Its hash is the polynomial
# $\sum_k (c_k + 1)\, g^k$ modulo $2^{64}$, with an odd constant $g$. For a word that starts at
# position $p$ of the batch this is
#
# $$
# g^{-p} \sum_{k} (c_{p+k} + 1)\, g^{p+k} .
# $$ (dedup-polynomial)
#
# An odd number has an inverse modulo $2^{64}$, so $g^{-p}$ exists. The powers now belong to
# *absolute* positions, so all words are hashed by one product of arrays, one sum by segments
# (`reduceat`) and one more product.


# %% tags=["engine"]
#| export
_BASE = 0x9E3779B97F4A7C15  # odd; 2**64 divided by the golden ratio, bits without a pattern
_INK = np.ones(256, np.uint64)
_INK[list(b" \t\n\v\f\r\x1c\x1d\x1e\x1f")] = 0  # what str.split() takes for white space in ASCII


@lru_cache(maxsize=8)
def _powers(base: int, size: int) -> UInt64[np.ndarray, " size"]:
    """Return ``base ** k`` modulo 2**64 for k < size."""
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _mix64(h: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scramble 64-bit numbers one to one: MurmurHash3's finalizer."""
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ (h >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


# %% [markdown] tags=["engine"]
# Words that differ only in the first byte have polynomials that differ by a small number. So every
# hash is scrambled by shifts and products, a mapping that is one to one. Such hashes are fast, but
# no defense against an enemy who *constructs* collisions; that takes a keyed cryptographic hash.


# %% tags=["engine"]
#| export
def _unit_hashes(
    texts: list[str], unit: str
) -> tuple[UInt64[np.ndarray, " units"], Int64[np.ndarray, " documents"]]:
    """Return the hashes of the words (or characters) of all texts, and how many are in each."""
    if unit == "character":
        wide = [canonical_text(t).encode("utf-32-le", "surrogatepass") for t in texts]
        codes = np.frombuffer(b"".join(wide), np.uint32).astype(np.uint64)
        return _mix64(codes + np.uint64(1)), np.array([len(w) // 4 for w in wide], np.int64)
    coded = [_utf8(t.lower() if t.isascii() else canonical_text(t)) for t in texts]
    data = np.frombuffer(b" ".join([b"", *coded, b""]), np.uint8)
    ink = _INK[data]
    starts = np.flatnonzero(ink[1:] > ink[:-1]) + 1
    ends = np.cumsum(np.array([len(c) + 1 for c in coded], np.int64))
    counts = np.diff(np.searchsorted(starts, ends), prepend=0).astype(np.int64)
    if not len(starts):
        return np.zeros(0, np.uint64), counts
    size = 1 << (len(data) - 1).bit_length()  # a power of two: few sizes to remember
    values = (data.astype(np.uint64) + np.uint64(1)) * ink * _powers(_BASE, size)[: len(data)]
    inverse = _powers(pow(_BASE, -1, 1 << 64), size)
    return _mix64(np.add.reduceat(values, starts) * inverse[starts]), counts


# %% [markdown] tags=["engine"]
# The hash of a shingle is $\sum_{j<n} h_{i+j}\, g^j$ over the hashes $h$ of its words, for all
# positions $i$ at once by $n$ additions of shifted arrays. Windows that reach over the end of a
# document are dropped. A document of fewer than $n$ words is padded with zeros and so becomes one
# shingle.


# %% tags=["engine"]
#| export
def _ranges(sizes: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " total"]:
    """Return 0, 1, ..., size - 1 for each size, one after another."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def _shingle_hashes(
    texts: list[str], n: int, unit: str
) -> tuple[UInt64[np.ndarray, " shingles"], Int64[np.ndarray, " documents"]]:
    """Return the hashes of all n-grams, repeated ones too, and how many are in each text."""
    units, counts = _unit_hashes(texts, unit)
    padded = np.where(counts > 0, np.maximum(counts, n), 0)
    ends = np.cumsum(padded)
    row = np.zeros(int(padded.sum()), np.uint64)
    row[np.repeat(ends - padded, counts) + _ranges(counts)] = units
    windows = max(len(row) - n + 1, 0)
    combined = np.zeros(windows, np.uint64)
    inside = np.ones(windows + n, bool)
    for j, power in enumerate(_powers(_BASE, n)):
        combined += row[j : j + windows] * power
        if j:
            inside[ends[padded > 0] - j] = False
    return _mix64(combined[inside[:windows]]), np.maximum(padded - n + 1, 0)


# %% [markdown] tags=["engine"]
# The public function takes one text. It checks how it should be cut.


# %% tags=["engine"]
#| export
def _check_shingles(n: int, unit: str) -> None:
    check_whole("n", n, 1)
    check_choice("unit", unit, ("word", "character"))


def shingles(text: str, n: int = 5, unit: str = "word") -> UInt64[np.ndarray, " shingles"]:
    """Return the set of ``n``-grams of the canonical text as distinct 64-bit hashes, ascending.

    A word is what stands between white space, with its punctuation; where a language does not
    separate words, take ``unit="character"`` and a larger ``n``. A text of fewer than ``n`` units
    is one shingle, one without any has none.

    >>> len(shingles("Mix the flour with the water.")), len(shingles("Mix.")), len(shingles(" "))
    (2, 1, 0)
    """
    _check_shingles(n, unit)
    return np.unique(_shingle_hashes([check_text(text)], n, unit)[0])


# %% [markdown] tags=["engine"]
# Numbers and tuples must give the same similarities, on all pairs of 200 documents and on
# difficult texts: none, white space, half a surrogate pair, a line of a million characters.

# %% tags=["engine"]
from itertools import combinations

few = [document.text for document in corpus[:200]] + ["", " \n", "half: \ud83d", "a\0", "a"]
few.append("dough " * 170_000)
tuples, numbers = [word_ngrams(text) for text in few], [shingles(text) for text in few]
pairs = list(combinations(range(len(few)), 2))
same = [jaccard(tuples[i], tuples[j]) == jaccard(numbers[i], numbers[j]) for i, j in pairs]
assert all(same)
print(f"{len(pairs):,} pairs, all with the same similarity")
print("shingles of the last three:", [len(s) for s in numbers[-3:]])

# %% [markdown]
# ## MinHash: a sample that two documents take without talking
#
# Forty thousand documents have 800 million pairs; at ten microseconds each that is more than two
# hours, and a billion documents would take a hundred thousand years. So we need cheaper
# comparisons, and fewer. First, cheaper ones.
#
# Of elements drawn from $A \cup B$ at random, the share that lies in both sets would estimate $J$.
# But a document must be summarized before it meets the other one. The idea of MinHash: let
# everyone use the *same* random order of all possible shingles, and let each document report which
# of its shingles comes **first** ({numref}`fig-deduplication-minhash`).
#
# ```{figure} ../figures/deduplication-minhash.svg
# :name: fig-deduplication-minhash
# :alt: Ten shingles in three random orders. Set A and set B share some of them. In each order the first element of the union is marked. In the first and third order it lies in both sets and both report the same minimum; in the second it lies in A only and the minima differ.
#
# Three random orders of the shingles of two documents. The first of all that occur decides: if both
# documents have it, both report it.
# ```
#
# **Theorem.** Let $\pi$ be a permutation of all shingles, drawn uniformly, and $A, B$ two sets,
# not both empty. Then
#
# $$
# P\bigl(\min \pi(A) = \min \pi(B)\bigr) = J(A, B) .
# $$ (dedup-minhash)
#
# **Proof.** Let $x$ be the element of $A \cup B$ for which $\pi(x)$ is smallest. Every element of
# $A \cup B$ is equally likely to be $x$: exchanging the values of $\pi$ at two elements maps the
# permutations for which the one is first one to one onto those for which the other is. It remains
# to show that the two minima are equal exactly if $x \in A \cap B$. If $x$ is in both, $\pi(x)$ is
# the minimum of both. Conversely, if the minima are equal, then, as $\pi$ takes each value once,
# the same element attains both. It lies in $A$ and in $B$, and no element of the union comes
# before it, so it is $x$. Of the $|A \cup B|$ elements that are equally likely to be $x$,
# $|A \cap B|$ lie in both. $\blacksquare$
#
# With five elements one can try all 120 orders:

# %%
from itertools import permutations

A, B = {0, 1, 2, 3}, {2, 3, 4}
agree = [min(order[x] for x in A) == min(order[x] for x in B) for order in permutations(range(5))]
print(f"{sum(agree)} of {len(agree)} orders agree; J = {jaccard(A, B)}")

# %% [markdown]
# ### How many permutations?
#
# One permutation gives one bit: agreed or not. Take $k$ independent ones; the minima of a document
# are its **signature**. Estimate $J$ by the share $\hat J$ of positions at which two signatures
# agree. Each agreement $Z_i$ is 1 with probability $J$, else 0, so it has mean $J$ and variance
# $\mathbb{E}[Z_i^2] - J^2 = J - J^2$. The mean of $k$ independent ones has
#
# $$
# \mathbb{E}[\hat J] = J, \qquad
# \operatorname{Var}[\hat J] = \frac{J(1-J)}{k} \le \frac{1}{4k} .
# $$ (dedup-variance)
#
# The error depends neither on the length of the documents nor on how many there are. For a
# standard error $\varepsilon$ one needs $k = J(1-J)/\varepsilon^2$ permutations; 128 give $0.035$
# at $J = 0.8$, and never more than $0.045$. To halve the error costs four times as much.
#
# ### Permutations that a computer can afford
#
# A table for a random permutation of 32-bit numbers takes 16 GB, and we want 128. Is there a
# smaller family that is as good? If each element of a set of $m$ is first in equally many
# permutations of a family, $m$ divides the size of the family. If that holds for all sets of up to
# $m$ elements, the size is a multiple of $\operatorname{lcm}(1, \dots, m)$, which grows about like
# $e^m$ {cite}`broder2000minwise`. So one gives up exactness. The usual choice are linear
# functions, as in universal hashing {cite}`carter1979universal`; here
#
# $$
# \pi_i(x) = a_i x + c_i \bmod 2^{32}, \qquad a_i \text{ odd}.
# $$ (dedup-affine)
#
# An odd $a$ has an inverse modulo $2^{32}$, so this *is* a permutation: no two shingles collide in
# it. But it is one of $2^{63}$, out of $2^{32}!$, and it keeps patterns. For an average set linear
# permutations are good enough: the likeliest of $m$ elements comes first with probability $1/m$ up
# to a term of order $(\log m)^3 / m^{3/2}$ {cite}`bohman2000minwise` (shown for a prime modulus,
# averaged over random sets). For a set with structure they are not. We try the intervals
# $\{0, \dots, 999\}$ and $\{500, \dots, 1499\}$, as they are and after scrambling.


# %%
#| export
def _mix32(h: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Scramble 32-bit numbers one to one: MurmurHash3's finalizer."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


# %% [markdown]
# Twenty thousand such permutations of both sets, in portions of a hundred:

# %%
rng = np.random.default_rng(0)
a = rng.integers(0, 2**31, (20_000, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
b = rng.integers(0, 2**32, (20_000, 1), dtype=np.uint32)
x, y = np.arange(1000, dtype=np.uint32), np.arange(500, 1500, dtype=np.uint32)
print(f"true similarity  {jaccard(x, y):.2f}")
for name, scramble in (("as they are", lambda h: h), ("scrambled", _mix32)):
    first, second = (
        np.concatenate(
            [(a[i : i + 100] * h + b[i : i + 100]).min(1) for i in range(0, 20_000, 100)]
        )
        for h in (scramble(x), scramble(y))
    )
    print(f"{name:16} {(first == second).mean():.2f}")

# %% [markdown]
# With 20,000 draws the standard error is $0.003$: without scrambling the estimate is wrong, by a
# sixth. Scrambling costs one operation for each shingle, not for each permutation, and turns any
# input into the harmless case, as we measure below.
#
# ### A signature in three lines
#
# The signature of one text takes three lines. With vectors of $k$ factors and shifts, $a x + c$ is
# a table with a row for each permutation and a column for each shingle, and the signature is the
# least of each row:


# %%
def signature(text: str, a: np.ndarray, c: np.ndarray) -> np.ndarray:
    x = _mix32(shingles(text).astype(np.uint32))
    return (a[:, None] * x + c[:, None]).min(axis=1)


factors, offsets = rng.integers(0, 2**32, (2, 128), dtype=np.uint32)
factors |= 1  # odd
both = [signature(text, factors, offsets) for text in (recipe, edited)]
print(f"{(both[0] == both[1]).sum()} of {len(factors)} minima agree; J = {similarity:.2f}")


# %% [markdown]
# A class holds what two signatures must have in common to be compared: the kind of shingles, and
# the seed that determines the permutations. It makes signatures from texts, or from hashes that
# somebody has. Its helpers are in the next engine room: `_check_hasher` refuses bad settings,
# `_permutations` draws factors and shifts from the seed, `_minima` is the three lines for many
# documents at once, and `_sign` signs one of the batches that `_batches` makes.


# %%
#| export
_Signatures = UInt32[np.ndarray, "documents permutations"]


@dataclass(frozen=True)
class MinHasher:
    """Makes signatures: ``n_permutations`` 32-bit minima over a document's ``n``-grams of ``unit``.

    Only signatures of equal hashers can be compared. Permutations are those of datasketch 2 with
    the same seed and ``scheme="affine32"``. Source: Broder (1997).

    >>> MinHasher(n_permutations=4).signatures(["Dough rises.", "Yeast.", "dough rises."]).shape
    (3, 4)
    """

    n_permutations: int = 128
    n: int = 5
    unit: str = "word"
    seed: int = 1

    def __post_init__(self) -> None:
        _check_hasher(self)

    def hash_signatures(
        self, hashes: UInt[np.ndarray, " shingles"], sizes: Int64[np.ndarray, " documents"]
    ) -> _Signatures:
        """Sign sets of hashes, one after another, by their lower 32 bits; ``sizes`` cuts them."""
        _check_numbers(1, hashes=(hashes, "u"), sizes=(sizes, "iu"))
        if (sizes < 0).any() or sizes.sum() != len(hashes):
            raise ValueError(f"sizes: expected a sum of {len(hashes)}, got {sizes.sum()}")
        return _minima(_mix32(hashes.astype(np.uint32)), sizes, *_permutations(self))

    def signatures(self, documents: Iterable[Document | str], workers: int = 1) -> _Signatures:
        """Sign documents, reading each once; several ``workers`` hold all texts in memory."""
        check_whole("workers", workers, 1)
        jobs = ((self, texts) for texts in _batches(iter_texts(documents)))
        parts = map(_sign, jobs) if workers == 1 else ordered_map(_sign, list(jobs), workers)
        return np.concatenate([np.empty((0, self.n_permutations), np.uint32), *parts])


# %% [markdown]
# Of a shingle's 64 bits the lower 32 are kept. Two different shingles then agree with probability
# $2^{-32}$; between two texts of a thousand shingles, $0.0002$ such accidents are to be expected.
# The estimate is the share of equal positions:


# %%
#| export
def estimate_jaccard(
    a: UInt32[np.ndarray, "*batch permutations"], b: UInt32[np.ndarray, "*batch permutations"]
) -> Float64[np.ndarray, "*batch"]:
    """Estimate Jaccard similarities from signatures: the share of permutations that agree.

    Unbiased up to the quality of the permutations, with variance J (1 - J) / n_permutations.
    """
    _check_numbers(None, a=(a, "u"), b=(b, "u"))
    if a.shape[-1:] != b.shape[-1:] or a.shape[-1:] in ((), (0,)):
        raise ValueError(f"a, b: expected equally many permutations, got {a.shape} and {b.shape}")
    return np.asarray((a == b).mean(axis=-1))


# %% [markdown] tags=["engine"]
# ### Engine room: the minima of many documents in one pass

# %% [markdown] tags=["engine"]
# NumPy wants long arrays, and documents are short. So we lay the shingles of many documents end to
# end in one array $x$. For each permutation, $a_i x + c_i$ is two operations on the whole array
# (unsigned 32-bit numbers overflow, which *is* the modulus), and `np.minimum.reduceat` takes the
# minimum of each document's segment. The array is cut into blocks of 65,536 numbers, 256 kB, that
# stay in the processor's cache while all 128 permutations pass over them. A block may end inside a
# document; its minimum is then taken again with that of the next block.


# %% tags=["engine"]
#| export
def _minima(
    x: UInt32[np.ndarray, " shingles"],
    sizes: Int64[np.ndarray, " documents"],
    factors: UInt32[np.ndarray, " permutations"],
    shifts: UInt32[np.ndarray, " permutations"],
    block: int = 1 << 16,
) -> _Signatures:
    """Return the least ``factor * x + shift`` modulo 2**32 over the next ``sizes[d]`` of ``x``.

    Documents without any get 2**32 - 1 everywhere, the minimum of nothing.
    """
    filled = np.flatnonzero(sizes)
    starts = np.cumsum(sizes[filled]) - sizes[filled]
    least = np.full((len(factors), len(filled)), 0xFFFFFFFF, np.uint32)
    values = np.empty(block, np.uint32)
    for begin in range(0, len(x), block):
        part = x[begin : begin + block]
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, begin + len(part)))
        offsets = np.maximum(starts[first:last] - begin, 0)
        for row, factor, shift in zip(least[:, first:last], factors, shifts, strict=True):
            permuted = np.multiply(part, factor, out=values[: len(part)])
            permuted += shift
            np.minimum(row, np.minimum.reduceat(permuted, offsets), out=row)
    signatures = np.full((len(sizes), len(factors)), 0xFFFFFFFF, np.uint32)
    signatures[filled] = least.T
    return signatures


# %% [markdown] tags=["engine"]
# The permutations are drawn as the library `datasketch` draws them (version 2, with
# `scheme="affine32"`), so that equal seeds give equal permutations.


# %% tags=["engine"]
#| export
def _check_numbers(dimensions: int | None, **arrays: tuple[Any, str]) -> None:
    """Demand arrays of so many dimensions (None: any), of numbers of one of the kinds given."""
    shape = "an array" if dimensions is None else "a row"
    for argument, (values, kinds) in arrays.items():
        name = "whole numbers without sign" if kinds == "u" else "whole numbers"
        if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds:
            got = values.dtype if isinstance(values, np.ndarray) else f"{values!r:.60}"
            raise ValueError(f"{argument}: expected {shape} of {name}, got {got}")
        if dimensions is not None and values.ndim != dimensions:
            got = f"the shape {values.shape}"
            raise ValueError(f"{argument}: expected {shape} of {name}, got {got}")


def _check_hasher(hasher: MinHasher) -> None:
    check_whole("n_permutations", hasher.n_permutations, 1)
    check_whole("seed", hasher.seed, 0)
    _check_shingles(hasher.n, hasher.unit)
    if hasher.seed >= 2**32:
        raise ValueError(f"seed: expected less than 2**32, got {hasher.seed}")


@lru_cache(maxsize=8)
def _permutations(hasher: MinHasher) -> UInt32[np.ndarray, "2 permutations"]:
    """Return the factors, all odd, and the shifts of the linear functions."""
    random = np.random.RandomState(hasher.seed)  # a frozen generator: same numbers for good
    halves = random.randint(0, 1 << 31, hasher.n_permutations, dtype=np.uint32)
    shifts = random.randint(0, 1 << 32, hasher.n_permutations, dtype=np.uint32)
    return np.stack([halves * np.uint32(2) + np.uint32(1), shifts])


# %% [markdown] tags=["engine"]
# Texts are signed in batches; `_sign` is what a worker process does with one of them.


# %% tags=["engine"]
#| export
def _batches(texts: Iterable[str], characters: int = 1 << 19) -> Iterator[list[str]]:
    """Group ``texts`` until each group has that many characters; a longer text is in the last."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sign(job: tuple[MinHasher, list[str]]) -> _Signatures:
    hasher, texts = job
    hashes, sizes = _shingle_hashes(texts, hasher.n, hasher.unit)
    return hasher.hash_signatures(hashes, sizes)


# %% [markdown] tags=["engine"]
# The three lines above and the package's way give the same numbers:

# %% tags=["engine"]
hasher = MinHasher()
mine, theirs = signature(recipe, *_permutations(hasher)), hasher.signatures([recipe])[0]
assert np.array_equal(mine, theirs)
print(f"{(mine == theirs).sum()} of {hasher.n_permutations} minima are equal")


# %% [markdown]
# ### How far off is the estimate?
#
# We draw a thousand pairs of sets of 200 numbers with a known similarity: if each set has $m$
# elements of which $c$ are common, $J = c/(2m - c)$.
# {numref}`fig-deduplication-variance` shows the estimates with 128 permutations, and how their
# spread falls with more.


# %%
def random_pairs(common: int, count: int = 1000, size: int = 200, seed: int = 0) -> np.ndarray:
    """Return hashes of ``count`` pairs of sets that share ``common`` of ``size`` elements."""
    draws = np.random.default_rng(seed).integers(0, 2**32, (count, 2 * size), dtype=np.uint32)
    return np.stack([draws[:, :size], draws[:, size - common : 2 * size - common]], axis=1)


estimates, many = {}, MinHasher(n_permutations=512)
for common in (67, 133, 178):
    sizes = np.full(2000, 200)
    signatures = many.hash_signatures(random_pairs(common).ravel(), sizes).reshape(1000, 2, 512)
    estimates[common / (400 - common)] = signatures[:, 0] == signatures[:, 1]
for J, agree in estimates.items():
    at_128 = agree[:, :128].mean(1)
    error = (J * (1 - J) / 128) ** 0.5
    assert abs(at_128.mean() - J) < 0.005 and abs(at_128.std() / error - 1) < 0.1
    print(
        f"J = {J:.2f}: mean {at_128.mean():.2f}, spread {at_128.std():.3f}, predicted {error:.3f}"
    )

# %% [markdown]
# The same as a picture, with other numbers of permutations:

# %% mystnb={"figure": {"caption": "Estimates of three similarities with 128 permutations (left; curves are the normal distributions of the predicted variance), and their standard error against the number of permutations (right; lines are the prediction, the same for 0.2 and 0.8).", "name": "fig-deduplication-variance"}, "image": {"alt": "Left: three histograms around 0.2, 0.5 and 0.8, each matched by a bell curve; the one around 0.5 is the widest. Right: standard error against the number of permutations from 8 to 512 on doubly logarithmic axes; points lie on two straight lines of slope minus one half; the upper, for 0.5, falls from 0.18 to 0.02; the lower, from 0.14, holds both 0.2 and 0.8."}}
figure, (left, right) = plt.subplots(1, 2)
ks = 2 ** np.arange(3, 10)
for (J, agree), color in zip(estimates.items(), ("C0", "C1", "C2"), strict=True):
    bins = np.arange(-0.5, 129, 2) / 128
    left.hist(agree[:, :128].mean(1), bins, density=True, alpha=0.4, color=color)
    error = (J * (1 - J) / 128) ** 0.5
    axis = np.linspace(J - 4 * error, J + 4 * error, 100)
    bell = np.exp(-(((axis - J) / error) ** 2) / 2) / (error * math.sqrt(2 * math.pi))
    left.plot(axis, bell, color=color, label=f"J = {J:.2f}")
    spread = [agree[:, :k].mean(1).std() for k in ks]
    right.loglog(ks, spread, "o", color=color)
    right.loglog(ks, (J * (1 - J) / ks) ** 0.5, color=color)
left.set(xlabel="estimate", ylabel="density", title="128 permutations", ylim=(0, 18))
right.set(xlabel="permutations", ylabel="standard error", title="spread")
right.set_xticks(ks, ks)
right.set_yticks([0.02, 0.05, 0.1, 0.2], ["0.02", "0.05", "0.1", "0.2"])
right.minorticks_off()
left.legend(ncols=3, fontsize=8)
plt.show()

# %% [markdown]
# ## Banding: only compare what meets
#
# Signatures are cheap to compare, but there are still all those pairs. We want a table in which
# similar documents fall into the same bucket and others do not, and compare only what shares a
# bucket. This is **locality-sensitive hashing** {cite}`indyk1998approximate`.
#
# The whole signature as the key would be too strict: only documents that agree in all $k$
# positions would meet. A single position would be too loose: documents of similarity $0.1$ meet in
# one case of ten. So cut the signature into $b$ **bands** of $r$ **rows**, and let each band be
# the key of a table of its own ({numref}`fig-deduplication-bands`). Two documents become
# **candidates** if they agree in *all* rows of *some* band.
#
# ```{figure} ../figures/deduplication-bands.svg
# :name: fig-deduplication-bands
# :alt: The signatures of four documents as columns of twelve numbers, cut into four bands of three rows. In band two documents A and C hold the same three numbers and fall into one bucket, so they are candidates. No other pair agrees in a whole band.
#
# Four documents, twelve permutations, four bands of three rows. A and C agree in all rows of the
# second band, so they meet in a bucket there and are compared; the other pairs never are.
# ```
#
# At similarity $s$ the permutations agree independently, each with probability $s$. So a band
# agrees with probability $s^r$, differs with $1 - s^r$, all $b$ bands differ with $(1 - s^r)^b$,
# and
#
# $$
# P(\text{candidates}) = 1 - (1 - s^r)^b .
# $$ (dedup-scurve)
#
# (`check_whole` and `_check_numbers`, from the engine rooms, refuse anything but whole numbers.)


# %%
#| export
def collision_probability(
    similarity: float | Float[np.ndarray, "*shape"], bands: int, rows: int
) -> Float64[np.ndarray, "*shape"]:
    """Return the probability that two documents of this Jaccard similarity become candidates.

    They do if at least one of ``bands`` bands agrees in all of its ``rows`` rows. Source: Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.

    >>> collision_probability(np.array([0.4, 0.8]), bands=16, rows=8).round(2).tolist()
    [0.01, 0.95]
    """
    check_whole("bands", bands, 1)
    check_whole("rows", rows, 1)
    s = np.asarray(similarity)
    one = isinstance(similarity, int | float | np.number | np.ndarray)
    if not one or s.dtype.kind not in "fiu" or not ((s >= 0) & (s <= 1)).all():
        raise ValueError(f"similarity: expected numbers from 0 to 1, got {similarity!r:.60}")
    return np.asarray(1 - (1 - s.astype(np.float64) ** rows) ** bands)


# %% [markdown]
# As a function of $s$ this is an **S-curve**: near 0, then a steep rise, then near 1. The rise is
# where $b\,s^r \approx 1$, around $s = (1/b)^{1/r}$ {cite}`leskovec2020mining`. More rows move it
# to the right, more bands to the left.
#
# ### Choosing bands and rows
#
# Ideally the curve would be a step at the threshold $t$. Its two errors are areas: of candidates
# below $t$ (**false positives**, work in vain) and of pairs above $t$ that never meet (**false
# negatives**, duplicates that stay). `datasketch` takes the $b$ and $r$ with $b\,r \le k$ that
# make the weighted sum
#
# $$
# w_+ \int_0^t \bigl[1 - (1 - s^r)^b\bigr]\, ds \;+\; w_- \int_t^1 (1 - s^r)^b \, ds
# $$ (dedup-bands)
#
# least, and so do we ({py:func}`~llmbook.deduplication.optimal_bands`).

# %% [markdown] tags=["engine"]
# ### Engine room: the best layout, by integrals that are exact

# %% [markdown] tags=["engine"]
# The integrands are polynomials of degree $b\,r \le k$, and Gauss's quadrature with $m$ nodes is
# exact for polynomials up to degree $2m - 1$ {cite}`press2007recipes`. So with
# $\lfloor k/2 \rfloor + 1$ nodes the integrals are exact, up to rounding.


# %% tags=["engine"]
#| export
def _check_threshold(threshold: float) -> None:
    if not isinstance(threshold, int | float | np.number) or not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a number between 0 and 1, got {threshold!r}")


def _check_weights(weights: Sequence[float]) -> None:
    known = (int, float, np.integer, np.floating)
    pair = list(weights) if isinstance(weights, Iterable) else []
    numbers = len(pair) == 2 and all(isinstance(weight, known) for weight in pair)
    if not numbers or not min(pair) >= 0 or not 0 < sum(pair) < math.inf:
        raise ValueError(f"weights: expected two numbers from 0, not both 0, got {weights!r}")


# %% [markdown] tags=["engine"]
# All layouts are tried. There are a few hundred.


# %% tags=["engine"]
#| export
def optimal_bands(
    threshold: float, n_permutations: int = 128, weights: Sequence[float] = (0.05, 0.95)
) -> tuple[int, int]:
    """Return the (bands, rows) whose S-curve has the least weighted error around ``threshold``.

    ``weights`` are those of false positives and false negatives, integrated over similarities
    below and above the threshold. Of equally good choices that with the fewest bands is taken.
    """
    _check_threshold(threshold)
    check_whole("n_permutations", n_permutations, 1)
    _check_weights(weights)
    return _least_error(threshold, n_permutations, *weights)


@lru_cache(maxsize=64)
def _least_error(
    threshold: float, n_permutations: int, false: float, miss: float
) -> tuple[int, int]:
    nodes, node_weights = np.polynomial.legendre.leggauss(n_permutations // 2 + 1)
    below, above = threshold * (1 + nodes) / 2, threshold + (1 - threshold) * (1 + nodes) / 2
    best = (math.inf, 0, 0)
    for bands in range(1, n_permutations + 1):
        for rows in range(1, n_permutations // bands + 1):
            positive = node_weights @ collision_probability(below, bands, rows) * threshold
            missed = 1 - collision_probability(above, bands, rows)
            negative = node_weights @ missed * (1 - threshold)
            error = float(false * positive + miss * negative)
            best = min(best, (error, bands, rows))
    return best[1], best[2]


# %% [markdown]
# ### What the weights decide
#
# The layout for the threshold 0.8, with equal weights and with ours:

# %%
for weights in ((0.5, 0.5), (0.05, 0.95)):
    bands, rows = optimal_bands(0.8, 128, weights)
    at = collision_probability(np.array([0.5, 0.7, 0.8, 0.9]), bands, rows)
    print(f"weights {weights}: {bands} bands of {rows} rows; P at 0.5, 0.7, 0.8, 0.9:", at.round(2))

# %% [markdown]
# Equal weights look fair and are a bad deal: of pairs exactly at the threshold they find 40 %. We
# are going to *verify* every candidate by its true similarity, so a false positive costs a few
# microseconds, while a false negative is a duplicate in the training set. Hence the second line,
# our default. FineWeb, aiming at a similarity of $0.75$, uses 14 bands of 8 rows and takes what
# meets for duplicates, unverified {cite}`penedo2024fineweb`.
#
# ### Does the corpus follow the curve?
#
# To know, we need the similarity of *all* pairs. Only pairs that share a shingle have one above
# zero, and an inverted index, from shingle to documents, lists those. At our size that works; one
# license header in a million files would be half a trillion pairs. We need all pairs of positions
# inside groups of equal numbers (`_ranges` counts 0, 1, ..., size - 1 for each size):


# %%
#| export
def _pairs_within(groups: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, "pairs 2"]:
    """Return the positions i < j of all pairs with equal numbers in the sorted ``groups``."""
    ends = np.searchsorted(groups, groups, side="right")
    later = ends - np.arange(len(groups)) - 1
    first = np.repeat(np.arange(len(groups)), later)
    return np.stack([first, first + 1 + _ranges(later)], axis=1)


def _unique_pairs(pairs: Int64[np.ndarray, "pairs 2"]) -> Int64[np.ndarray, "distinct 2"]:
    """Return distinct rows of nonnegative numbers, sorted; faster than ``np.unique`` by rows."""
    stride = int(pairs.max(initial=0)) + 1
    return np.stack(np.divmod(np.unique(pairs[:, 0] * stride + pairs[:, 1]), stride), axis=1)


# %% [markdown]
# With that, the inverted index is sorting. Entries (shingle, document), sorted by shingle, make
# groups of documents, and a pair occurs once for each shingle that it shares. `_shingle_hashes` is
# `shingles` for many texts: all hashes end to end, repeated ones too, and how many each text has.


# %%
def all_similarities(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of texts that share a shingle, and their true similarities."""
    hashes, counts = _shingle_hashes(texts, 5, "word")
    owners = np.repeat(np.arange(len(texts)), counts)
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    new = (np.diff(hashes, prepend=~hashes[:1]) != 0) | (np.diff(owners, prepend=-1) != 0)
    hashes, owners = hashes[new], owners[new]  # each shingle once in a document
    groups = np.cumsum(np.diff(hashes, prepend=hashes[:1]) != 0)
    i, j = owners[_pairs_within(groups)].T
    pairs, common = np.unique(i * len(texts) + j, return_counts=True)
    pairs = np.stack([pairs // len(texts), pairs % len(texts)], axis=1)
    return pairs, common / (np.bincount(owners)[pairs].sum(1) - common)


# %% [markdown]
# On our corpus, with exact copies gone:

# %%
dropped = set(copies)
unique = [document for i, document in enumerate(corpus) if i not in dropped]
true_pairs, true_similarity = all_similarities([document.text for document in unique])
alike = [(true_similarity >= least).sum() for least in (0.3, 0.8)]
assert len(true_pairs) > 300_000 and alike[0] > 3000 and 150 < alike[1] < 400
print("more than 300,000 pairs share a shingle")
print("more than 3,000 have a similarity of at least 0.3, between 150 and 400 of at least 0.8")

# %% [markdown]
# For all pairs from $0.3$ on we draw new permutations eight times, and count in which share of
# cases a pair became a candidate.

# %%
similar = true_similarity >= 0.3
pairs, similarity = true_pairs[similar], true_similarity[similar]
members, positions = np.unique(pairs, return_inverse=True)
positions = positions.reshape(pairs.shape)
layouts, met = [(9, 13), (16, 8), (32, 4)], defaultdict(list)
for seed in range(8):
    signatures = MinHasher(seed=seed).signatures(unique[i] for i in members)
    equal = signatures[positions[:, 0]] == signatures[positions[:, 1]]
    for b, r in layouts:
        bands_agree = equal[:, : b * r].reshape(len(pairs), b, r).all(2)
        met[b, r].append(bands_agree.any(1))
edges = np.linspace(0.3, 1, 15)
bin_of = np.digitize(similarity, edges) - 1
for b, r in layouts:
    share = np.mean(met[b, r], axis=0)
    expected = collision_probability(similarity, b, r)
    gaps = [abs((share - expected)[bin_of == i].mean()) for i in range(14) if (bin_of == i).any()]
    assert max(gaps) < 0.1
    print(f"{b:2} bands of {r:2} rows: never further than 0.1 from the curve")

# %% [markdown]
# The measured shares lie on the curves of {eq}`dedup-scurve`:

# %% mystnb={"figure": {"caption": "The S-curve for three layouts of 117 to 128 permutations. Points: share of real pairs that met, by their true similarity, over eight draws of the permutations.", "name": "fig-deduplication-scurve"}, "image": {"alt": "Probability of becoming candidates against true similarity. Three S-shaped curves rise from 0 to 1: for 32 bands of 4 rows around similarity 0.4, for 16 bands of 8 rows around 0.7, for 9 bands of 13 rows around 0.83. Measured points lie on the curves. A dashed vertical line marks the threshold 0.8, where the three curves are at 1.0, 0.95 and 0.4."}}
axis = np.linspace(0, 1, 300)
for (b, r), color in zip(layouts, ("C0", "C1", "C2"), strict=True):
    plt.plot(axis, collision_probability(axis, b, r), color=color, label=f"{b} bands of {r} rows")
    share = np.mean(met[b, r], axis=0)
    filled = [i for i in range(14) if (bin_of == i).sum() >= 10]
    centers = [similarity[bin_of == i].mean() for i in filled]
    plt.plot(centers, [share[bin_of == i].mean() for i in filled], "o", color=color)
plt.axvline(0.8, color="C6", linestyle="--", linewidth=1)
plt.xlabel("Jaccard similarity")
plt.ylabel("probability of becoming candidates")
plt.legend()
plt.show()

# %% [markdown]
# ## An index that grows
#
# The table must take new documents without being built anew, and survive the night on disk. A
# dictionary of sets for each band costs hundreds of bytes for each entry. We hash each band, with
# its number, to 64 bits and keep *one sorted array* of hashes beside an array of their owners: 16
# bytes for each entry, searched by bisection.
#
# Inserting into a sorted array shifts all that follows. The **logarithmic method**
# {cite}`bentley1980decomposable` avoids that: keep several sorted runs; a new batch becomes a run
# of its own; as long as the last run is at least half as long as the one before, merge the two.
# Then each run is more than twice as long as the next, so there are at most $\log_2 N$ to search,
# and an entry is moved a logarithmic number of times on average, too.
#
# First each band becomes a number, by the polynomial and the scrambling that shingles have
# (`_powers`, `_BASE` and `_mix64`):


# %%
#| export
def _band_hashes(
    signatures: _Signatures, bands: int, rows: int
) -> UInt64[np.ndarray, "documents bands"]:
    """Return one hash of each document's band, which differs between bands with the same rows."""
    used = signatures[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    combined = (used + np.uint64(1)) @ _powers(_BASE, rows) + np.arange(bands, dtype=np.uint64)
    return _mix64(combined.ravel()).reshape(-1, bands)


# %% [markdown]
# The index proper has keys for its documents (their ids), the layout of bands, and the hasher
# whose signatures it takes: an index that forgot it would one day compare signatures of different
# permutations, and find nothing without a complaint. `_SortedRuns` holds the runs,
# `_checked_hasher`, `_checked` and `_new_keys` refuse what does not fit, `_sharing` lists the pairs
# of all buckets.


# %%
#| export
class LSHIndex:
    """Finds documents that share a band, by their signatures; nothing is verified."""

    def __init__(self, hasher: MinHasher | None = None, bands: int = 16, rows: int = 8) -> None:
        self.hasher, self.bands, self.rows = _checked_hasher(hasher), bands, rows
        _check_bands(bands, rows, self.hasher.n_permutations)
        self.keys, self._known, self._runs = list[str](), set[str](), _SortedRuns()

    def __len__(self) -> int:
        return len(self.keys)

    def insert(self, keys: Iterable[str], signatures: _Signatures) -> None:
        """Add documents by their signatures, under ``keys`` that are new; all of them, or none."""
        new = _new_keys(keys, self._known, len(_checked(signatures, self.hasher)))
        owners = np.repeat(np.arange(len(new)) + len(self), self.bands)
        self._runs.add(_band_hashes(signatures, self.bands, self.rows).ravel(), owners)
        self.keys += new
        self._known.update(new)

    def query(self, signatures: _Signatures) -> list[list[str]]:
        """Return, for each signature, the keys of its candidates in the order of insertion."""
        hashes = _band_hashes(_checked(signatures, self.hasher), self.bands, self.rows)
        found = self._runs.find(hashes.ravel())
        found[:, 0] //= self.bands  # from positions among the bands to those of documents
        answers: list[list[str]] = [[] for _ in signatures]
        for position, owner in _unique_pairs(found).tolist():
            answers[position].append(self.keys[owner])
        return answers

    def candidate_pairs(self) -> list[tuple[str, str]]:
        """Return the keys of all pairs that share a bucket; their number may be quadratic."""
        return [(self.keys[i], self.keys[j]) for i, j in _sharing(*self._runs.merged()).tolist()]


# %% [markdown]
# The default layout is that of `optimal_bands(0.8)`.

# %% [markdown] tags=["engine"]
# ### Engine room: sorted runs, and a file that is checked before it is believed

# %% [markdown] tags=["engine"]
# The runs know nothing of documents. They hold hashes and the numbers of their owners.


# %% tags=["engine"]
#| export
class _SortedRuns:
    """Pairs (hash, owner) in sorted runs, each more than twice as long as the next."""

    def __init__(self) -> None:
        self.runs: list[tuple[UInt64[np.ndarray, " n"], Int64[np.ndarray, " n"]]] = []

    def add(self, hashes: UInt64[np.ndarray, " n"], owners: Int64[np.ndarray, " n"]) -> None:
        order = np.argsort(hashes, kind="stable")
        self.runs.append((hashes[order], owners[order]))
        while len(self.runs) > 1 and 2 * len(self.runs[-1][0]) >= len(self.runs[-2][0]):
            self._merge(2)

    def _merge(self, count: int) -> None:
        last = self.runs[-count:]
        hashes, owners = (np.concatenate(part) for part in zip(*last, strict=True))
        order = np.argsort(hashes, kind="stable")
        self.runs[-count:] = [(hashes[order], owners[order])]

    def merged(self) -> tuple[UInt64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        if len(self.runs) > 1:
            self._merge(len(self.runs))
        return self.runs[0] if self.runs else (np.empty(0, np.uint64), np.empty(0, np.int64))

    def find(self, wanted: UInt64[np.ndarray, " m"]) -> Int64[np.ndarray, "found 2"]:
        """Return (position in ``wanted``, owner) for each entry with a wanted hash."""
        found = [np.empty((0, 2), np.int64)]
        for hashes, owners in self.runs:
            left = np.searchsorted(hashes, wanted)
            counts = np.searchsorted(hashes, wanted, side="right") - left
            position = np.repeat(np.arange(len(wanted)), counts)
            found.append(np.stack([position, owners[left[position] + _ranges(counts)]], axis=1))
        return np.concatenate(found)

    def keep(self, kept: Bool[np.ndarray, " owners"]) -> None:
        """Drop the entries of owners that are not ``kept``, and number the others anew."""
        hashes, owners = self.merged()
        stay = kept[owners]
        self.runs = [(hashes[stay], (np.cumsum(kept) - 1)[owners[stay]])]


# %% [markdown] tags=["engine"]
# Two entries that stand side by side with the same hash are in one bucket. Buckets give pairs:


# %% tags=["engine"]
#| export
def _buckets(
    hashes: UInt64[np.ndarray, " entries"], owners: Int64[np.ndarray, " entries"]
) -> tuple[Int64[np.ndarray, " members"], Int64[np.ndarray, " members"]]:
    """Return bucket numbers and owners of sorted entries, of buckets with two or more."""
    bucket = np.cumsum(np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]) - 1
    shared = np.bincount(bucket)[bucket] > 1
    return bucket[shared], owners[shared]


def _sharing(
    hashes: UInt64[np.ndarray, " entries"], owners: Int64[np.ndarray, " entries"]
) -> Int64[np.ndarray, "pairs 2"]:
    """Return all pairs of owners that share a hash, each once; entries are sorted by hash."""
    buckets, members = _buckets(hashes, owners)
    return _unique_pairs(members[_pairs_within(buckets)])


# %% [markdown] tags=["engine"]
# Keys must be new, and signatures must be of the right hasher:


# %% tags=["engine"]
#| export
def _checked(signatures: _Signatures, hasher: MinHasher) -> _Signatures:
    """Return ``signatures`` if their shape is one that ``hasher`` makes."""
    if getattr(signatures, "dtype", None) != np.uint32:
        got = getattr(signatures, "dtype", type(signatures).__name__)
        raise ValueError(f"signatures: expected an array of uint32, got {got}")
    if signatures.ndim != 2 or signatures.shape[1] != hasher.n_permutations:
        expected = f"expected rows of {hasher.n_permutations} numbers"
        raise ValueError(f"signatures: {expected}, got the shape {signatures.shape}")
    return signatures


def _listed(keys: Any) -> list[str]:
    """Return ``keys`` as a list, if they are several strings."""
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        got = "a single str" if isinstance(keys, str) else f"{keys!r:.60}"
        raise ValueError(f"keys: expected several strings, got {got}")
    listed = list(keys)
    for key in listed:
        if not isinstance(key, str):
            raise ValueError(f"keys: expected strings, got {type(key).__name__}")
    return listed


def _new_keys(keys: Iterable[str], known: set[str], count: int) -> list[str]:
    """Return ``keys`` as a list of ``count`` different strings, none of them known."""
    new, seen = _listed(keys), set[str]()
    if len(new) != count:
        raise ValueError(f"keys: expected {count}, one for each signature, got {len(new)}")
    for key in new:
        if key in known or key in seen:
            raise ValueError(f"keys: expected new ones, got {key!r} again")
        seen.add(key)
    return new


# %% [markdown] tags=["engine"]
# The layout must not need more rows than a signature has:


# %% tags=["engine"]
#| export
def _checked_hasher(hasher: MinHasher | None) -> MinHasher:
    """Return ``hasher``, or the default one in the place of None."""
    if hasher is not None and not isinstance(hasher, MinHasher):
        raise ValueError(f"hasher: expected a MinHasher, got {hasher!r:.60}")
    return hasher or MinHasher()


def _check_bands(bands: int, rows: int, n_permutations: int) -> None:
    check_whole("bands", bands, 1)
    check_whole("rows", rows, 1)
    if bands * rows > n_permutations:
        most = f"at most {n_permutations} permutations"
        raise ValueError(f"bands, rows: expected {most} in all, got {bands} times {rows}")


# %% [markdown] tags=["engine"]
# Documents leave an index, too: when they are withdrawn, or when a crawl is made anew. Entries of
# several documents are dropped in one pass over all runs, so remove many at a time. And two indexes
# become one, if they have the same hasher and layout: two machines may each fill one.


# %% tags=["engine"]
#| export
class LSHIndex(LSHIndex):  # continued
    def remove(self, keys: Iterable[str]) -> None:
        """Take documents out by their ``keys``; all of them, or none if one is not there."""
        gone = set(_listed(keys))
        if unknown := sorted(gone - self._known):
            raise ValueError(f"keys: expected keys of this index, got {unknown[0]!r}")
        self._runs.keep(np.array([key not in gone for key in self.keys], bool))
        self.keys = [key for key in self.keys if key not in gone]
        self._known -= gone

    def merge(self, other: "LSHIndex") -> None:
        """Add the documents of another index after one's own; all of them, or none.

        Both must have the same hasher and layout, and no key in common.
        """
        if not isinstance(other, LSHIndex):
            raise ValueError(f"other: expected an LSHIndex, got {other!r:.60}")
        mine, theirs = ((index.hasher, index.bands, index.rows) for index in (self, other))
        if mine != theirs:
            raise ValueError(f"other: expected hasher, bands and rows {mine}, got {theirs}")
        if common := sorted(self._known & other._known):
            raise ValueError(f"other: expected keys that are new, got {common[0]!r} again")
        hashes, owners = other._runs.merged()
        self._runs.add(hashes, owners + len(self))
        self.keys += other.keys
        self._known |= other._known


# %% [markdown] tags=["engine"]
# Its file is NumPy's `.npz`: a zip archive of arrays, with checksums. Pickle, which could run a
# stranger's code while it loads, is refused. What was read is checked before it is believed: a
# file made by hand could point to documents that are not there.


# %% tags=["engine"]
#| export
_FORMAT = "llmbook.LSHIndex 1"


def _check_entries(hashes: Any, owners: Any, documents: int, bands: int) -> None:
    if (hashes.dtype, owners.dtype) != (np.uint64, np.int64):
        raise ValueError(f"its entries are {hashes.dtype} and {owners.dtype}")
    if hashes.shape != (documents * bands,) or owners.shape != hashes.shape:
        raise ValueError(f"it has {hashes.size} entries for {documents} documents in {bands} bands")
    if (owners.size and owners.min() < 0) or (np.bincount(owners, None, documents) != bands).any():
        raise ValueError(f"it has documents without exactly {bands} entries")


def _restored(header: Any, hashes: Any, owners: Any) -> LSHIndex:
    """Return the index with these contents; whatever is wrong with them raises something."""
    if header["format"] != _FORMAT:
        raise ValueError(f"its format is {header['format']!r}")
    index = LSHIndex(MinHasher(**header["hasher"]), *header["layout"])
    index.keys = _new_keys(header["keys"], set(), len(header["keys"]))
    _check_entries(hashes, owners, len(index), index.bands)
    index._known.update(index.keys)
    index._runs.add(hashes, owners)
    return index


# %% [markdown] tags=["engine"]
# The class goes on with the two methods:


# %% tags=["engine"]
#| export
class LSHIndex(LSHIndex):  # continued
    def save(self, path: str | Path) -> None:
        """Write the index with its hasher to one file, which appears complete or not at all."""
        header = {
            "format": _FORMAT,
            "hasher": asdict(self.hasher),
            "layout": [self.bands, self.rows],
            "keys": self.keys,
        }
        coded = np.frombuffer(json.dumps(header).encode(), np.uint8)
        hashes, owners = self._runs.merged()
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez(file, header=coded, hashes=hashes, owners=owners)

    @classmethod
    def load(cls, path: str | Path) -> "LSHIndex":
        """Read what ``save`` wrote; a ``ValueError`` names a file that is none, or broken."""
        with check_path(path).open("rb") as file:
            try:  # zipfile, zlib, NumPy and JSON have a dozen exceptions for broken files
                with np.load(file, allow_pickle=False) as arrays:
                    header = json.loads(arrays["header"].tobytes())
                    return _restored(header, arrays["hashes"], arrays["owners"])
            except Exception as error:
                message = f"path: expected a saved LSHIndex, got {str(path)!r}: {error}"
                raise ValueError(message) from error


# %% [markdown] tags=["engine"]
# A file that is cut off, or no index at all, must not become a small index:

# %% tags=["engine"]
import tempfile

index = LSHIndex()
index.insert(["recipe"], index.hasher.signatures([recipe]))
with tempfile.TemporaryDirectory() as folder:
    wrecked = Path(folder, "wrecked.npz")
    index.save(wrecked)
    whole = wrecked.read_bytes()
    contents = {"cut off": whole[: len(whole) // 2], "foreign": b"%PDF-1.7", "empty": b""}
    for name, content in contents.items():
        wrecked.write_bytes(content)
        try:
            LSHIndex.load(wrecked)
        except ValueError as error:
            assert "wrecked.npz" in str(error)
            print(f"{name:8} refused, with the name of the file")


# %% [markdown]
# ### Asking the index
#
# A new text is asked about like this:

# %%
index = LSHIndex()
index.insert(["recipe", "rye"], index.hasher.signatures([recipe, "Rye bread keeps for a week."]))
print(index.query(index.hasher.signatures([recipe.upper(), "Nobody has heard of this."])))

# %% [markdown]
# An index over the corpus, filled in three sittings with a night on disk between them, against one
# that was filled at once:

# %%
import tempfile

place = Path(tempfile.mkdtemp())
hasher, keys = MinHasher(), [document.id for document in unique]
signatures = hasher.signatures(unique)
at_once, slowly = LSHIndex(hasher), LSHIndex(hasher)
at_once.insert(keys, signatures)
for part in np.array_split(np.arange(len(keys)), 3):
    slowly.insert([keys[i] for i in part], signatures[part])
    slowly.save(place / "index.npz")
    slowly = LSHIndex.load(place / "index.npz")
candidates = at_once.candidate_pairs()
assert candidates == slowly.candidate_pairs() and 500 < len(candidates) < 2000
print("the same candidates from both, between 500 and 2,000 of almost a billion pairs")
times = (place / "index.npz").stat().st_size / (16 * len(keys) * at_once.bands)
print(f"the file is {times:.1f} times 16 bytes for each document and band")

# %% [markdown]
# ## From candidates to clusters
#
# Candidates come in pairs, and copies come in families. If $A$ is a near duplicate of $B$ and $B$
# of $C$, all three belong together: clusters are the **connected components** of the graph whose
# edges are the similar pairs. The tool for edges that arrive one by one is **union-find**. Each
# item points to a parent, a component is a tree, its root is the component's name. To join two
# components, one root is made to point to the other; the smaller index stays root, so that the
# order of the edges does not matter. On the way up, each step makes an item point to its
# grandparent, so paths get shorter the more they are used.


# %%
#| export
def _root(parent: list[int], argument: str, item: int) -> int:
    size = len(parent)
    whole = isinstance(item, int | np.integer) and not isinstance(item, bool)
    if not whole or not 0 <= item < size:
        raise ValueError(f"{argument}: expected an item from 0 below {size}, got {item!r}")
    while parent[item] != item:
        parent[item] = item = parent[parent[item]]
    return item


# %% [markdown]
# That was the way up. The class remembers the parents:


# %%
#| export
class UnionFind:
    """Disjoint sets of the items 0 to ``size`` - 1; the name of a set is its smallest item.

    >>> forest = UnionFind(5)
    >>> forest.union(3, 1), forest.union(1, 3), forest.clusters()
    (True, False, [[1, 3]])
    """

    def __init__(self, size: int) -> None:
        check_whole("size", size, 0)
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        """Return the name of the set that ``item`` is in."""
        return _root(self._parent, "item", item)

    def union(self, a: int, b: int) -> bool:
        """Join the sets of two items; return whether they were different."""
        low, high = sorted((_root(self._parent, "a", a), _root(self._parent, "b", b)))
        self._parent[high] = low
        return low != high

    def roots(self, items: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the names of the sets that the ``items`` are in."""
        _check_numbers(1, items=(items, "iu"))
        return np.array([self.find(item) for item in items.tolist()], np.int64)

    def clusters(self) -> list[list[int]]:
        """Return the sets of two or more items, in ascending order."""
        sets: dict[int, list[int]] = defaultdict(list)
        for item in range(len(self._parent)):
            sets[self.find(item)].append(item)
        return [items for items in sets.values() if len(items) > 1]


# %% [markdown]
# The order of the edges, and their direction, make no difference:

# %%
for order in ([(0, 3), (3, 5), (1, 2)], [(2, 1), (5, 3), (3, 0)]):
    forest = UnionFind(6)
    for a, b in order:
        forest.union(a, b)
    print(forest.clusters())

# %% [markdown]
# The edges are pairs of candidates whose true similarity reaches the threshold. Two sets and
# `jaccard` would tell, one pair at a time. The package compares thousands of pairs at once.

# %% [markdown] tags=["engine"]
# ### Engine room: the true similarity of many pairs at a time

# %% [markdown] tags=["engine"]
# To verify a pair of candidates we need $|A \cap B|$ of the true sets. For thousands of pairs at
# once: number all distinct shingles, $0$ to $D - 1$, and write the shingle $h$ of document $i$ as
# the single number $i D + h$. All sets together are then *one* sorted array, and whether document
# $j$ has shingle $h$, too, is one bisection for $j D + h$. We look up the smaller set of each pair
# in the larger.


# %% tags=["engine"]
#| export
class _ShingleSets:
    """The shingle sets of some documents as one sorted array, to compare many pairs at once."""

    def __init__(self, texts: list[str], n: int, unit: str) -> None:
        parts = [_shingle_hashes(batch, n, unit) for batch in _batches(texts)]
        hashes = np.concatenate([np.empty(0, np.uint64), *(part[0] for part in parts)])
        counts = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
        distinct, number = np.unique(hashes, return_inverse=True)
        self._distinct = max(len(distinct), 1)
        owner = np.repeat(np.arange(len(texts)), counts)
        self._entries = np.unique(owner * self._distinct + number)
        self.sizes = np.bincount(self._entries // self._distinct, minlength=len(texts))
        self._starts = np.cumsum(self.sizes) - self.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def common(
        self, a: Int64[np.ndarray, " pairs"], b: Int64[np.ndarray, " pairs"]
    ) -> Int64[np.ndarray, " pairs"]:
        sizes = self.sizes[a]
        pair = np.repeat(np.arange(len(a)), sizes)
        own = self._entries[self._starts[a][pair] + _ranges(sizes)]
        wanted = own + (b - a)[pair] * self._distinct
        at = np.searchsorted(self._entries, wanted)
        hit = self._entries[np.minimum(at, len(self._entries) - 1)] == wanted
        return np.bincount(pair[hit], minlength=len(a))


# %% [markdown] tags=["engine"]
# Pairs are taken in portions of four million lookups, which bounds the memory.


# %% tags=["engine"]
#| export
def _similarities(
    sets: _ShingleSets, pairs: Int64[np.ndarray, "pairs 2"]
) -> Float64[np.ndarray, " pairs"]:
    """Return the Jaccard similarity of each pair of documents; of two empty ones it is 1."""
    sizes = sets.sizes[pairs]
    swap = sizes[:, 0] > sizes[:, 1]
    small, large = np.where(swap[:, None], pairs[:, ::-1], pairs).T
    cuts = np.flatnonzero(np.diff(np.cumsum(sets.sizes[small]) >> 22)) + 1
    parts = zip(np.split(small, cuts), np.split(large, cuts), strict=True)
    common = np.concatenate([sets.common(a, b) for a, b in parts])
    union = sizes.sum(1) - common
    return np.where(union > 0, common / np.maximum(union, 1), 1.0)


# %% [markdown]
# ### A bucket with five thousand members
#
# A license header that was copied, with another year, into five thousand files puts them all into
# the same buckets. That is twelve million pairs in each of the bands, for a cluster that 4,999
# edges would describe. So we do not list the pairs. In each bucket, the first member is the
# **center**, and all others are compared with it. Those that are similar join its component. In
# the next round, the next member is the center, and is compared with those that are *not in its
# component* yet. When a bucket is one component, it is done; for our header, after one round.


# %%
def link_bucket(bucket: list[int], similar: Callable[[int, int], bool], forest: UnionFind) -> int:
    compared = 0
    for round, center in enumerate(bucket):
        rest = [i for i in bucket[round + 1 :] if forest.find(i) != forest.find(center)]
        for other in rest:
            compared += 1
            if similar(center, other):
                forest.union(center, other)
        if len({forest.find(i) for i in bucket}) == 1:
            break
    return compared


for families in (1, 2, 10):
    bucket, forest = list(range(500)), UnionFind(500)
    compared = link_bucket(bucket, lambda i, j, n=families: (i - j) % n == 0, forest)
    print(f"{families:2} families: {compared:6,} of {math.comb(500, 2):,} pairs compared")


# %% [markdown]
# The result is exactly the components that comparing all pairs would give, because the only pairs
# left out are connected already. The worst case remains quadratic: many members of which no two
# are similar, or two large components without an edge between them. So there is a limit. In a
# bucket of more than a thousand members, what has been joined to a center is not compared again,
# and at most a hundred centers are tried. That is linear in the size of the bucket, and may miss
# an edge.


# %% [markdown] tags=["engine"]
# ### Engine room: all buckets at once, and a limit for the largest

# %% [markdown] tags=["engine"]
# Pairs that are similar are joined, and those that join two components are kept as links. A group
# whose members have one root is done.

# %% tags=["engine"]
#| export
_NO_LINKS = (np.empty((0, 2), np.int64), np.empty(0))
_CENTERS = 100  # tried in a large bucket


def _join(
    pairs: Int64[np.ndarray, "pairs 2"], sets: _ShingleSets, threshold: float, forest: UnionFind
) -> tuple[Int64[np.ndarray, "links 2"], Float64[np.ndarray, " links"]]:
    """Compare pairs, join the similar ones; return those that were apart, with similarities."""
    similarity = _similarities(sets, pairs)
    similar = np.flatnonzero(similarity >= threshold)
    new = similar[[forest.union(i, j) for i, j in pairs[similar].tolist()]]
    return pairs[new], similarity[new]


def _mixed(
    groups: Int64[np.ndarray, " members"], roots: Int64[np.ndarray, " members"]
) -> Bool[np.ndarray, " members"]:
    """Say of each member whether its group (sorted numbers) has several roots."""
    sizes = np.unique(groups, return_counts=True)[1]
    if not len(sizes):
        return np.zeros(0, bool)
    starts = np.cumsum(sizes) - sizes
    least, most = np.minimum.reduceat(roots, starts), np.maximum.reduceat(roots, starts)
    return np.repeat(least != most, sizes)


# %% [markdown] tags=["engine"]
# A pair may meet in several buckets, and in each of them in another round. It is compared once: the
# pairs that were compared are remembered, as numbers in the sorted runs of the index.


# %% tags=["engine"]
#| export
def _new_pairs(
    pairs: Int64[np.ndarray, "pairs 2"], size: int, seen: _SortedRuns
) -> Int64[np.ndarray, "new 2"]:
    """Return those of the pairs of ``size`` items that are not ``seen``, and remember them."""
    codes = (pairs[:, 0] * size + pairs[:, 1]).astype(np.uint64)
    new = np.ones(len(pairs), bool)
    new[seen.find(codes)[:, 0]] = False
    seen.add(codes[new], pairs[new, 0])
    return pairs[new]


# %% [markdown] tags=["engine"]
# Each turn of the loop is one round for all buckets together. `rest` are the members that stay for
# the next round.


# %% tags=["engine"]
#| export
def _link_similar(
    groups: Int64[np.ndarray, " members"],
    members: Int64[np.ndarray, " members"],
    sets: _ShingleSets,
    threshold: float,
    exact_up_to: int,
    centers: int,
) -> tuple[Int64[np.ndarray, "links 2"], Float64[np.ndarray, " links"], int]:
    """Return similar pairs (center, member) that connect equal groups' components, and more.

    That is, their similarities and the number of pairs compared. ``groups`` are sorted numbers.
    """
    forest, compared, tried, links = UnionFind(len(sets)), 0, 0, [_NO_LINKS]
    seen = _SortedRuns()
    while len(members):
        first = np.append(True, groups[1:] != groups[:-1])  # the centers
        number = np.cumsum(first) - 1  # of each member's group
        limited = np.bincount(number)[number] + tried > exact_up_to
        tried += 1
        alive, place = np.unique(members, return_inverse=True)
        root, center = forest.roots(alive)[place], members[first][number]
        apart = root != root[first][number]
        pairs = _unique_pairs(np.stack([center, members], axis=1)[apart])
        pairs = _new_pairs(pairs, len(sets), seen)
        links.append(_join(pairs, sets, threshold, forest))
        compared, root = compared + len(pairs), forest.roots(alive)[place]
        joined = root == root[first][number]
        rest = ~(first | limited & (joined | (tried >= centers)))
        rest[rest] = _mixed(groups[rest], root[rest])
        groups, members = groups[rest], members[rest]
    pairs, similarities = (np.concatenate(part) for part in zip(*links, strict=True))
    return pairs, similarities, compared


# %% [markdown]
# ### The whole search
#
# First exact copies are set aside, then signatures, buckets, verification. The result keeps,
# beside the clusters, the pairs that connect them: whoever doubts a cluster can look at its edges.


# %%
#| export
@dataclass(frozen=True)
class NearDuplicates:
    """What ``find_near_duplicates`` found, in indices of the documents.

    ``clusters`` have two or more members, ascending. ``pairs`` are similar ones, enough to connect
    each cluster, with their true ``similarities``; ``compared`` counts pairs that were verified.
    """

    clusters: list[list[int]]
    pairs: Int64[np.ndarray, "links 2"]
    similarities: Float64[np.ndarray, " links"]
    compared: int


# %% [markdown]
# The function is this plan, line by line. (`_checked_bands` takes the layout of `optimal_bands`
# unless the caller names another.)


# %%
#| export
def find_near_duplicates(
    documents: Iterable[Document | str],
    threshold: float = 0.8,
    *,
    hasher: MinHasher | None = None,
    weights: Sequence[float] = (0.05, 0.95),
    bands: int | None = None,
    rows: int | None = None,
    exact_up_to: int = 1000,
    workers: int = 1,
) -> NearDuplicates:
    """Find clusters of documents connected by a true Jaccard similarity of ``threshold`` or more.

    ``weights`` (of false positives, of misses) choose the bands, unless ``bands`` and ``rows`` are
    given; a pair at similarity s is found with ``collision_probability(s, bands, rows)``, and
    copies always are. In buckets of more than ``exact_up_to`` members some edges that would join
    two clusters may be missed.
    """
    check_whole("exact_up_to", exact_up_to, 0)
    check_whole("workers", workers, 1)
    hasher = _checked_hasher(hasher)
    bands, rows = _checked_bands(threshold, hasher, weights, bands, rows)
    texts = list(iter_texts(documents))
    copies = [(group[0], copy) for group in exact_duplicates(texts) for copy in group[1:]]
    exact = np.array(copies, np.int64).reshape(-1, 2)
    rest = np.setdiff1d(np.arange(len(texts)), exact[:, 1])
    signatures = hasher.signatures([texts[i] for i in rest], workers)
    groups, members = _candidates(signatures, bands, rows)
    near, values, compared = _verified(texts, groups, rest[members], hasher, threshold, exact_up_to)
    forest, pairs = UnionFind(len(texts)), np.concatenate([exact, near])
    for a, b in pairs.tolist():
        forest.union(a, b)
    values = np.concatenate([np.ones(len(exact)), values])
    return NearDuplicates(forest.clusters(), pairs, values, compared)


# %% [markdown] tags=["engine"]
# ### Engine room: from signatures to buckets, from buckets to links

# %% [markdown] tags=["engine"]
# Published settings name their bands. FineWeb's are
# `hasher=MinHasher(n_permutations=112), bands=14, rows=8`.


# %% tags=["engine"]
#| export
def _checked_bands(
    threshold: float,
    hasher: MinHasher,
    weights: Sequence[float],
    bands: int | None,
    rows: int | None,
) -> tuple[int, int]:
    """Return ``bands`` and ``rows`` if they are given, else the best for ``weights``."""
    _check_threshold(threshold)
    _check_weights(weights)
    if bands is None and rows is None:
        return optimal_bands(threshold, hasher.n_permutations, weights)
    if bands is None or rows is None:
        raise ValueError(f"bands, rows: expected both or neither, got {bands} and {rows}")
    _check_bands(bands, rows, hasher.n_permutations)
    return bands, rows


# %% [markdown] tags=["engine"]
# Members of buckets are few. Only their texts are cut into shingles a second time.


# %% tags=["engine"]
#| export
def _candidates(
    signatures: _Signatures, bands: int, rows: int
) -> tuple[Int64[np.ndarray, " members"], Int64[np.ndarray, " members"]]:
    """Return bucket numbers, sorted, and rows of signatures, ascending in each bucket."""
    hashes = _band_hashes(signatures, bands, rows).ravel()
    order = np.argsort(hashes, kind="stable")
    return _buckets(hashes[order], order // bands)


def _verified(
    texts: list[str],
    groups: Int64[np.ndarray, " members"],
    members: Int64[np.ndarray, " members"],
    hasher: MinHasher,
    threshold: float,
    exact_up_to: int,
) -> tuple[Int64[np.ndarray, "links 2"], Float64[np.ndarray, " links"], int]:
    """Link members of equal groups; only the texts of members are cut into shingles again."""
    used, places = np.unique(members, return_inverse=True)
    sets = _ShingleSets([texts[i] for i in used], hasher.n, hasher.unit)
    links = _link_similar(groups, places, sets, threshold, exact_up_to, _CENTERS)
    return used[links[0]], *links[1:]


# %% [markdown]
# ### How much of the truth it finds
#
# A perfect search would remove all documents but one of each
# true cluster. Recall is the share of those that ours removes, too.

# %%
found = find_near_duplicates(unique)
truth = UnionFind(len(unique))
for i, j in true_pairs[true_similarity >= 0.8].tolist():
    truth.union(i, j)
wanted = {i for cluster in truth.clusters() for i in cluster[1:]}
removed = {i for cluster in found.clusters for i in cluster[1:]}
inside = {(i, j) for cluster in truth.clusters() for i in cluster for j in cluster}
outside = sum((cluster[0], i) not in inside for cluster in found.clusters for i in cluster)
assert len(removed & wanted) > 0.9 * len(wanted) and found.compared < 2000
print("more than 90 % of the documents to remove, after fewer than 2,000 comparisons")
print(f"members of a cluster that do not belong to it: {outside}")

# %% [markdown]
# And the header with five thousand copies: one text, each time with another year and number. Beside
# it the worst case: eight hundred texts of which every pair has a similarity of about $0.7$, too
# little to be joined and enough to meet. There all pairs that meet must be compared. Most of them
# meet in several buckets, but each is compared only once.
#
# The buckets of the bands are searched side by side. For the header, some begin with the first
# member, some with the second, so there are two comparisons for each document, not one.


# %%
def family(clauses: int, count: int) -> list[str]:
    text = " ".join(f"clause{i}" for i in range(clauses))
    return [f"Copyright {1990 + i % 35} by baker {i} who may {text}" for i in range(count)]


for name, texts in (("header", family(120, 5000)), ("worst case", family(35, 800))):
    found, every = find_near_duplicates(texts), math.comb(len(texts), 2)
    joined = sum(map(len, found.clusters))
    assert len(found.clusters) <= 1
    print(f"{name}: {f'one cluster of {joined:,}' if joined else 'no clusters'},", end=" ")
    print(f"{found.compared:,} comparisons for {every:,} pairs")

# %% [markdown]
# ## Keeping the best copy
#
# Which member of a cluster stays? The default is the longest, since the others are often
# truncated, and of equally long ones the first. Trust in a source, or the score of a quality
# classifier, can be passed as a function.
#
# There is a trap. Components are **chains**: $A$ is like $B$ and $B$ like $C$, but $A$ may be
# quite unlike $C$. If only $A$ is kept, $C$ is lost though nothing like it remains. A text that
# from copy to copy loses twenty words at its front and gains twenty at its end shows it:

# %%
words = [f"word{i}" for i in range(260)]
chain_of_texts = [" ".join(words[20 * i : 20 * i + 160]) for i in range(6)]
neighbors = jaccard(shingles(chain_of_texts[0]), shingles(chain_of_texts[1]))
ends = jaccard(shingles(chain_of_texts[0]), shingles(chain_of_texts[-1]))
print(f"neighbors {neighbors:.2f}, ends {ends:.2f}")
print("clusters at 0.7:", find_near_duplicates(chain_of_texts, 0.7).clusters)

# %% [markdown]
# To keep one member of each component is called **single linkage**; FineWeb keeps a random one
# {cite}`penedo2024fineweb`. We prefer a rule with a guarantee. Keep the best document of a
# cluster, remove those that are similar *to it*, and go on with what is left. Every document
# removed is then similar to one that is kept, and a chain leaves several.


# %%
def keep_stars(texts: list[str], threshold: float) -> list[int]:
    sets, kept = [shingles(text) for text in texts], list[int]()
    for i in sorted(range(len(texts)), key=lambda i: (-len(canonical_text(texts[i])), i)):
        if all(jaccard(sets[i], sets[center]) < threshold for center in kept):
            kept.append(i)
    return sorted(kept)


print("kept of the chain:", keep_stars(chain_of_texts, 0.7))


# %% [markdown]
# A long chain leaves many, and to compare each of those with all others of its cluster would be
# quadratic after all. So each is a center for the members of its *buckets* only, and in a bucket
# of more than a thousand, again, only the first hundred centers are tried. The guarantee stands,
# since only what has been compared is removed. The price is that two survivors that never met, or
# met in a crowd, may be alike.


# %% [markdown] tags=["engine"]
# ### Engine room: `deduplicate`, and stars in crowded buckets

# %% [markdown] tags=["engine"]
# The members of each cluster are ranked first. A score that is no number would make the order
# arbitrary, so it is refused.


# %% tags=["engine"]
#| export
def _ranked(
    clusters: list[list[int]], documents: list[Document], score: Callable[[Document], float] | None
) -> Iterator[list[int]]:
    """Sort each cluster from best to worst, equals by index."""
    for cluster in clusters:
        values = {}
        for i in cluster:
            document = documents[i]
            values[i] = score(document) if score else len(canonical_text(document.text))
            number = isinstance(values[i], int | float | np.number)
            if not number or math.isnan(values[i]):
                got = f"{values[i]!r:.40} for document {document.id!r}"
                raise ValueError(f"score: expected numbers, got {got}")
        yield sorted(cluster, key=lambda i: (-values[i], i))


# %% [markdown] tags=["engine"]
# Then each document that is still there is a center:


# %% tags=["engine"]
#| export
def _near_kept(
    clusters: Int64[np.ndarray, " documents"],
    buckets: Int64[np.ndarray, " members"],
    members: Int64[np.ndarray, " members"],
    sets: _ShingleSets,
    threshold: float,
    exact_up_to: int,
) -> Bool[np.ndarray, " documents"]:
    """Say of documents, the best of each cluster first, whether an earlier one kept is similar.

    Those of a cluster are compared if they are ``members`` of the same of the sorted ``buckets``.
    """
    removed = np.zeros(len(sets), bool)
    crowds = np.split(members, np.flatnonzero(np.diff(buckets)) + 1)
    tried, places = [0] * len(crowds), [list[int]() for _ in range(len(sets))]
    for number, crowd in enumerate(crowds):
        for member in crowd.tolist():
            places[member].append(number)
    for center in range(len(sets)):
        if removed[center]:
            continue
        open_ = [b for b in places[center] if len(crowds[b]) <= exact_up_to or tried[b] < _CENTERS]
        for b in open_:
            tried[b] += 1
        near = np.unique(np.concatenate([members[:0], *(crowds[b] for b in open_)]))
        near = near[(near > center) & ~removed[near] & (clusters[near] == clusters[center])]
        pairs = np.stack([np.full_like(near, center), near], axis=1)
        removed[near[_similarities(sets, pairs) >= threshold]] = True
    return removed


# %% [markdown] tags=["engine"]
# Copies have the same shingles, so whatever is similar to one is similar to all: only the best of
# each group of copies takes part.


# %% tags=["engine"]
#| export
def _stars(
    ranked: list[list[int]],
    documents: list[Document],
    threshold: float,
    hasher: MinHasher,
    layout: tuple[int, int],
    exact_up_to: int,
    workers: int,
) -> set[int]:
    """Return what of the ``ranked`` clusters is a copy of, or similar to, one that is kept."""
    best = {canonical_text(documents[i].text): i for cluster in ranked for i in reversed(cluster)}
    originals = set(best.values())
    removed = {i for cluster in ranked for i in cluster} - originals
    varied = [[i for i in cluster if i in originals] for cluster in ranked]
    varied = [cluster for cluster in varied if len(cluster) > 1]
    if varied:
        order = list(chain(*varied))
        clusters = np.repeat(np.arange(len(varied)), [len(cluster) for cluster in varied])
        chosen = [documents[i].text for i in order]
        buckets, members = _candidates(hasher.signatures(chosen, workers), *layout)
        sets = _ShingleSets(chosen, hasher.n, hasher.unit)
        gone = _near_kept(clusters, buckets, members, sets, threshold, exact_up_to)
        removed |= {order[i] for i in np.flatnonzero(gone).tolist()}
    return removed


# %% [markdown] tags=["engine"]
# The public function finds the clusters, and then decides by the linkage what goes:


# %% tags=["engine"]
#| export
def deduplicate(
    documents: Iterable[Document],
    threshold: float = 0.8,
    *,
    score: Callable[[Document], float] | None = None,
    linkage: str = "star",
    hasher: MinHasher | None = None,
    weights: Sequence[float] = (0.05, 0.95),
    bands: int | None = None,
    rows: int | None = None,
    exact_up_to: int = 1000,
    workers: int = 1,
) -> list[Document]:
    """Return ``documents`` in their order without exact and near duplicates, the best copy kept.

    The best has the highest ``score``, by default the longest canonical text; the first of equals.
    With ``linkage="star"`` each document removed has a Jaccard similarity of ``threshold`` or more
    to one that is kept, but two that share no bucket may both be kept; "single" keeps one of each
    connected cluster. Other arguments are those of ``find_near_duplicates``, for both steps.
    """
    check_choice("linkage", linkage, ("star", "single"))
    if score is not None and not callable(score):
        raise ValueError(f"score: expected a function of a Document, got {score!r:.60}")
    listed, hasher = list(iter_documents(documents)), _checked_hasher(hasher)
    layout = bands, rows = _checked_bands(threshold, hasher, weights, bands, rows)
    options: dict[str, Any] = {"exact_up_to": exact_up_to, "workers": workers}
    found = find_near_duplicates(
        listed, threshold, hasher=hasher, bands=bands, rows=rows, **options
    )
    ranked = list(_ranked(found.clusters, listed, score))
    removed = {i for cluster in ranked for i in cluster[1:]}
    if linkage == "star":
        removed = _stars(ranked, listed, threshold, hasher, layout, exact_up_to, workers)
    return [document for i, document in enumerate(listed) if i not in removed]


# %% [markdown] tags=["engine"]
# Both linkages on the chain:

# %% tags=["engine"]
links = [Document(text, id=f"link {i}") for i, text in enumerate(chain_of_texts)]
for linkage in ("single", "star"):
    print(f"{linkage:7}", [d.id for d in deduplicate(links, 0.7, linkage=linkage)])

# %% [markdown]
# ## What it finds
#
# Now the whole corpus, exact and near, with {py:func}`~llmbook.deduplication.deduplicate`.

# %%
found = find_near_duplicates(corpus)
kept = deduplicate(corpus)
gone = 1 - len(kept) / len(corpus)
by_single_linkage = len(corpus) - sum(len(cluster) - 1 for cluster in found.clusters)
assert 0.06 < gone < 0.14 and 0 < len(kept) - by_single_linkage < 100
gone_later = len(kept) - len(deduplicate(kept))
assert gone_later < 20
print("between 6 and 14 % of the documents go")
print("single linkage removes more, but fewer than 100")
print(f"a second run removes {gone_later}")

# %% [markdown]
# The second run looks into the same buckets, so it finds hardly anything new. Another seed would
# find some pairs that the first has missed, since the search is a matter of chance. What are the
# largest clusters?

# %%
import os


def folder_of(cluster: list[int]) -> str:
    paths = [corpus[i].metadata["path"].removeprefix("stdlib/") for i in cluster]
    return os.path.commonpath(paths)


largest = sorted(found.clusters, key=len, reverse=True)[:6]
for cluster in largest[:3]:
    least = max(limit for limit in (60, 80, 200) if len(cluster) > limit)
    words = {len(corpus[i].text.split()) for i in cluster}
    each = " or ".join(map(str, sorted(words)))
    print(f"more than {least} members, in {folder_of(cluster)}, each of {each} words")
in_encodings = sum(folder_of(cluster) == "encodings" for cluster in largest)
print(f"of the six largest clusters, {in_encodings} are in the folder encodings")

# %% [markdown]
# A comment that says nothing, a license header, a warning in functions that a script has written,
# and the headings in the tables of `encodings`, also written by a script. How much of the legal
# text goes? And what of the files of `encodings`, taken whole?

# %%
import sysconfig

legal = re.compile(r"(?i)licen[sc]e|copyright|spdx")
before, after = (sum(bool(legal.search(d.text)) for d in some) for some in (corpus, kept))
assert before > 400 > 200 > after
print("more than 400 legal notices, of which more than half go")
folder = Path(sysconfig.get_path("stdlib")) / "encodings"
files = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
tables = find_near_duplicates(files).clusters
assert len(files) > 100 and sum(map(len, tables)) > 20 and 5 <= max(map(len, tables)) <= 10
print("more than 100 files, more than 20 of them in clusters, the largest between 5 and 10")

# %% [markdown]
# Code pages that differ in a few characters are near duplicates; tables of different alphabets
# look alike to us but share few shingles. {numref}`fig-deduplication-clusters` shows all
# clusters.


# %% mystnb={"figure": {"caption": "Sizes of the clusters, from the largest on: exact copies, and clusters held together by near duplicates.", "name": "fig-deduplication-clusters"}, "image": {"alt": "Cluster size against rank on doubly logarithmic axes. Clusters of exact copies fall from about 300 members at rank 1 to 8 at rank 30, 4 at rank 100, and end in 2 at ranks 400 to 1,900. Clusters with near duplicates are fewer and smaller: 26 members at rank 1, 6 at rank 5, and 2 from rank 40 to 140."}}
def varied(cluster: list[int]) -> bool:
    return len({canonical_text(corpus[i].text) for i in cluster}) > 1


near_sizes = sorted((len(c) for c in found.clusters if varied(c)), reverse=True)
exact_sizes = sorted((len(c) for c in found.clusters if not varied(c)), reverse=True)
plt.loglog(range(1, len(exact_sizes) + 1), exact_sizes, ".", label="exact copies only")
plt.loglog(
    range(1, len(near_sizes) + 1), near_sizes, "s", markersize=4, label="near duplicates too"
)
plt.xlabel("rank of the cluster")
plt.ylabel("documents in it")
plt.xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
plt.yticks([2, 10, 100], ["2", "10", "100"])
plt.legend()
plt.show()

# %% [markdown]
# ## A million documents, a billion
#
# What does it cost? For $N$ documents with $k$ permutations and $b$ bands, signatures take $4kN$
# bytes (512 MB for a million, and they need not be kept), the table $16bN$ (256 MB), and the exact
# hashes about $300N$ (300 MB), most of it the overhead of Python's objects.

# %% tags=["nbval-ignore-output"]
start = time.perf_counter()
hasher.signatures(corpus)
rate = size / (time.perf_counter() - start)
print(f"signatures: {rate / 1e6:.0f} million characters a second on one core")
print(f"a million web pages of 5,000 characters: {5e9 / rate / 60:.0f} minutes")

# %% [markdown]
# A billion pages do not fit on one machine, but every step can be shared out (chapter 18 runs it).
# **Signing** needs nothing but the document, so each machine signs its own shard. **Meeting**
# needs equal band hashes in one place, so each entry (hash, id) is sent to the machine that its
# hash names, the *shuffle* of every framework: 16 entries of 16 bytes for each document.
# **Joining** needs only edges, of which there are far fewer than documents: one machine's
# union-find, or components computed in rounds {cite}`kiveris2014connected`. We simulate three
# machines and compare with the whole.

# %%
machines = 3
shards = [unique[i::machines] for i in range(machines)]
ids = [np.arange(i, len(unique), machines) for i in range(machines)]
sent = []
for shard, own_ids in zip(shards, ids, strict=True):  # each machine alone
    hashes = _band_hashes(hasher.signatures(shard), at_once.bands, at_once.rows).ravel()
    sent.append((hashes, np.repeat(own_ids, at_once.bands)))
hashes, owners = (np.concatenate(part) for part in zip(*sent, strict=True))
met_at = set()
for machine in range(machines):  # after the shuffle
    mine = hashes % machines == machine
    order = np.lexsort((owners[mine], hashes[mine]))
    pairs_here = _sharing(hashes[mine][order], owners[mine][order])
    met_at |= {(keys[i], keys[j]) for i, j in pairs_here.tolist()}
missed, added = set(candidates) - met_at, met_at - set(candidates)
print(f"pairs that three machines miss: {len(missed)}, pairs that they add: {len(added)}")

# %% [markdown]
# More is not always better. FineWeb first deduplicated 96 crawls together, which took up to 90 %
# of the oldest ones, and got worse models than by deduplicating each crawl by itself. In one old
# crawl the tenth that was kept was worse text to train on than what had been removed
# {cite}`penedo2024fineweb`. And an original document may contain a paragraph that is in a thousand
# others. Lee and colleagues therefore also remove repeated *substrings*
# {cite}`lee2022deduplicating`.
#
# ## Is it the real thing?
#
# Against the usual library, `datasketch`: given the same 32-bit hashes and the same seed, our
# signatures must be *identical* to its own, and so must the candidates for the same bands, and the
# choice of bands.

# %%
import datasketch

some = unique[::20]
minhashes = []
for document in some:
    minhash = datasketch.MinHash(128, seed=1, hashfunc=lambda h: h, scheme="affine32")
    minhash.update_batch(shingles(document.text).astype(np.uint32).tolist())
    minhashes.append(minhash)
ours = MinHasher(seed=1).signatures(some)
assert np.array_equal(ours, [m.hashvalues for m in minhashes]) and len(some) > 1500
print("more than 1,500 signatures, number by number the same")

theirs, index = datasketch.MinHashLSH(num_perm=128, params=(32, 4)), LSHIndex(bands=32, rows=4)
index.insert([document.id for document in some], ours)
for document, minhash in zip(some, minhashes, strict=True):
    theirs.insert(document.id, minhash)
same = [set(a) == set(theirs.query(m)) for a, m in zip(index.query(ours), minhashes, strict=True)]
assert all(same)
print("the same answers to as many queries")
for settings in ((0.5, 64, (0.5, 0.5)), (0.8, 128, (0.05, 0.95))):
    lsh = datasketch.MinHashLSH(*settings)
    assert optimal_bands(*settings) == (lsh.b, lsh.r)
    print(f"both choose {lsh.b} bands of {lsh.r} rows for {settings}")

# %% [markdown]
# As each is used in practice, theirs hashes the text of shingles by SHA-1, ours by polynomials.
# The numbers then differ, but their *distribution* should not. On 600 real pairs of similarity
# $0.3$ and more we compare the errors of both with the theory's: an error divided by
# $\sqrt{J(1-J)/k}$ should have mean 0 and standard deviation 1.

# %%
chosen = np.random.default_rng(0).choice(len(pairs), 600, replace=False)
J = similarity[chosen]


def their_signature(text: str) -> np.ndarray:
    minhash = datasketch.MinHash(128)
    minhash.update_batch(" ".join(gram).encode() for gram in word_ngrams(text))
    return minhash.hashvalues


involved = np.unique(pairs[chosen])
signed = {
    "datasketch": np.array([their_signature(unique[i].text) for i in involved]),
    "ours": hasher.signatures(unique[i] for i in involved),
}
for name, rows_of in signed.items():
    left, right = rows_of[np.searchsorted(involved, pairs[chosen])].swapaxes(0, 1)
    error = (estimate_jaccard(left, right) - J) / np.sqrt(J * (1 - J) / 128)
    assert abs(error.mean()) < 0.3 and 0.8 < error.std() < 1.25
    print(f"{name:10} mean within 0.3 of 0, deviation between 0.8 and 1.25")

# %% [markdown]
# (Pairs of one family share documents, so the mean of 600 strays more than $1/\sqrt{600}$.)
#
# ## How fast is it?
#
# Against `datasketch` used as its documentation shows, one `MinHash` for each document, from text
# to signature; and against its `bulk` with the hashes given, which leaves out all that is not
# MinHash.

# %%
texts = [document.text for document in unique[::40]]
sets = [shingles(text).astype(np.uint32) for text in texts]
flat, counts = np.concatenate(sets), np.array([len(s) for s in sets], np.int64)
lists = [s.tolist() for s in sets]
jobs = {
    "loop": lambda: [their_signature(text) for text in texts],
    "ours": lambda: hasher.signatures(texts),
    "bulk": lambda: datasketch.MinHash.bulk(lists, num_perm=128, hashfunc=lambda h: h),
    "ours, given hashes": lambda: hasher.hash_signatures(flat, counts),
}
seconds = dict.fromkeys(jobs, math.inf)
for _ in range(3):
    for name, job in jobs.items():
        start = time.perf_counter()
        job()
        seconds[name] = min(seconds[name], time.perf_counter() - start)

# %% [markdown]
# The best of three runs each:

# %% tags=["nbval-ignore-output"]
print(f"text to signatures: {seconds['loop'] / seconds['ours']:.0f} times as fast as the loop")
ratio = seconds["bulk"] / seconds["ours, given hashes"]
print(f"hashes to signatures: {ratio:.1f} times as fast as bulk")

# %% [markdown]
# The loop loses its time between the multiplications: on objects, on a digest for each shingle, on
# NumPy calls for arrays of thirty numbers.
#
# ## Exercises
#
# ````{exercise} Quotations
# :label: ex-deduplication-containment
# A paragraph quoted in a book has a Jaccard similarity to the book of nearly 0, though all of it is
# there. Write `containment(part, whole)` for two arrays of shingles: the share of the distinct
# shingles of `part` that are in `whole`. An empty part is contained in everything. (5 minutes)
# ````


# %% tags=["solution"]
def containment(part: np.ndarray, whole: np.ndarray) -> float:
    """Return the share, 0 to 1, of the distinct shingles of ``part`` that ``whole`` has, too."""
    inside = np.isin(np.unique(part), whole)
    return float(inside.mean()) if len(inside) else 1.0


# %% tags=["check"]
import warnings

quote, book = np.arange(10, dtype=np.uint64), np.arange(5, 1000, dtype=np.uint64)
assert containment(quote, book) == 0.5, "five of the ten shingles of the quotation are in the book"
assert abs(containment(book, quote) - 5 / 995) < 1e-12, "it is not symmetric: divide by the part"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a mean of nothing is not a number
    try:
        nothing = containment(quote[:0], book)
    except ZeroDivisionError:
        nothing = None
assert nothing == 1.0, "an empty part is contained in everything"
assert containment(quote, book[:0]) == 0.0, "an empty whole contains nothing"
assert containment(quote[[0, 7, 7, 7]], book) == 0.5, "a set has each element once"
assert containment(quote, book[[0, 0, 0, 1, 2]]) == 0.3, "a set has each element once"

# %% [markdown]
# ````{exercise} How many permutations?
# :label: ex-deduplication-permutations
# Write `permutations_needed(similarity, error)`: the least number of
# permutations, at least one, for which the standard error of the estimate is at most `error`.
# Mind that $0.16 / 0.04^2$ is a little more than 100 in floating point. (10 minutes)
# ````


# %% tags=["solution"]
def permutations_needed(similarity: float, error: float) -> int:
    """Return the least k of at least 1 with sqrt(similarity * (1 - similarity) / k) <= error."""
    needed = similarity * (1 - similarity) / error**2
    return max(1, math.ceil(round(needed, 6)))


# %% tags=["check"]
assert permutations_needed(0.5, 0.05) == 100, (
    "J (1 - J) = 0.25 over the squared error 0.0025 is 100: the error is a standard deviation"
)
assert permutations_needed(0.8, 0.02) == 400, "the similarity matters: 0.16 and not 0.25"
assert permutations_needed(0.25, 0.05) == permutations_needed(0.75, 0.05) == 75, (
    "0.25 and 0.75 have the same variance"
)
assert permutations_needed(0.8, 0.01) == 1600, "four times as many for half the error"
assert permutations_needed(0.9, 0.04) == 57, "56.25 permutations do not exist: round up"
assert permutations_needed(0.9, 0.1) == 9, "0.09 / 0.01 is 9, and 10 is not the least"
assert permutations_needed(0.2, 0.04) == 100, "0.16 / 0.0016 is 100, up to rounding"
assert permutations_needed(1.0, 0.1) == 1, "equal sets always agree, but one permutation is needed"
assert isinstance(permutations_needed(0.5, 0.05), int), "a number of permutations is an int"

# %% [markdown]
# ````{exercise} One bit is nearly enough
# :label: ex-deduplication-bits
# Li and König {cite}`li2010bbit` keep only the lowest few bits of each
# minimum. Where the minima are equal, the bits are; where they differ, $m$ bits agree by chance
# with probability about $2^{-m}$. Work out which share $P$ of positions is then expected to
# agree, solve for $J$, and write `estimate_from_bits(a, b, bits)`, which takes two full
# signatures and uses the lowest `bits` only. (20 minutes)
# ````


# %% tags=["solution"]
def estimate_from_bits(a: np.ndarray, b: np.ndarray, bits: int) -> float:
    """Estimate the Jaccard similarity from the lowest ``bits`` of two signatures."""
    differ = (a ^ b) & np.uint32(2**bits - 1)
    chance = 2.0**-bits
    return float(((differ == 0).mean() - chance) / (1 - chance))


# %% tags=["check"]
a, b = np.array([0, 1, 2, 3], np.uint32), np.array([0, 3, 2, 7], np.uint32)
assert estimate_from_bits(a, b, 1) == 1.0, "the lowest bits of all four positions agree"
assert estimate_from_bits(a, a, 8) == 1.0, "equal signatures have an estimate of 1"
assert abs(estimate_from_bits(a, b, 2) - 2 / 3) < 1e-9, (
    "three of four agree; that is J, and a quarter of the rest by chance"
)
wide = np.array([1 << 31, 5], np.uint32)
assert estimate_from_bits(wide, wide & 7, 2) == 1.0, "only the lowest bits count"
drawn = many.hash_signatures(random_pairs(133, seed=1).ravel(), np.full(2000, 200))
for bits in (1, 2, 8):
    mean = np.mean([estimate_from_bits(a, b, bits) for a, b in drawn.reshape(1000, 2, 512)])
    assert abs(mean - 133 / 267) < 0.02, f"with {bits} bits the mean should be 0.50, got {mean:.2f}"

# %% [markdown]
# ````{exercise} One permutation is enough
# :label: ex-deduplication-bottom
# Broder {cite}`broder1997resemblance` also uses a single permutation: the
# sketch of a document is its $k$ smallest distinct hashes. Write `bottom_k(hashes, k)`, sorted,
# and `estimate_bottom_k(a, b, k)` for two sketches: of the $k$ smallest elements of the *union*,
# which the sketches contain (why?), the share that is in both. Two empty sketches have
# similarity 1. (30 minutes)
# ````


# %% tags=["solution"]
def bottom_k(hashes: np.ndarray, k: int) -> np.ndarray:
    """Return the ``k`` smallest distinct hashes, ascending; fewer if there are no more."""
    return np.unique(hashes)[:k]


def estimate_bottom_k(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Estimate the Jaccard similarity of two sets from their bottom-k sketches."""
    least = np.union1d(a, b)[:k]
    both = np.isin(least, a) & np.isin(least, b)
    return float(both.mean()) if len(least) else 1.0


# %% tags=["check"]
assert bottom_k(np.array([5, 3, 9, 1]), 3).tolist() == [1, 3, 5], "the smallest, ascending"
assert bottom_k(np.array([5, 3, 3, 9, 1]), 3).tolist() == [1, 3, 5], "each hash counts once"
assert bottom_k(np.array([5, 3]), 3).tolist() == [3, 5], "fewer, if there are no more"
a, b = np.array([1, 2, 3, 4]), np.array([2, 3, 5, 6])
assert estimate_bottom_k(a, b, 4) == 0.5, (
    "of 1, 2, 3, 4, the four smallest of the union, 2 and 3 are in both"
)
assert estimate_bottom_k(a[:2], a[1:2], 4) == 0.5, (
    "small sets: of two elements in the union, one is in both"
)
a, b = np.array([1, 2, 8, 9]), np.array([3, 4, 8, 9])
assert estimate_bottom_k(a, b, 4) == 0.0, "8 and 9 are not among the four smallest of the union"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a mean of nothing is not a number
    try:
        nothing = estimate_bottom_k(a[:0], b[:0], 4)
    except ZeroDivisionError:
        nothing = None
assert nothing == 1.0, "two empty sets are equal"
draws, values = np.random.default_rng(2), []
for _ in range(300):
    big = draws.integers(0, 2**32, 1000)
    values.append(estimate_bottom_k(bottom_k(big[:100], 50), bottom_k(big, 50), 50))
assert abs(np.mean(values) - 0.1) < 0.01, (
    f"mean 0.1 expected for J = 0.1, got {np.mean(values):.3f}"
)

# %% [markdown]
# ````{exercise} Has the test set leaked?
# :label: ex-deduplication-leak
# Write `leaked(train, test, threshold)`, which returns the indices of
# those texts of `test` that have a Jaccard similarity of at least `threshold` to some text of
# `train`. Sign and index the training texts, query with the test texts, and verify each
# candidate. (45 minutes)
# ````


# %% tags=["solution"]
def leaked(train: list[str], test: list[str], threshold: float = 0.8) -> list[int]:
    """Return the indices, ascending, of texts of ``test`` with a near duplicate in ``train``."""
    index = LSHIndex(MinHasher(), *optimal_bands(threshold))
    index.insert(map(str, range(len(train))), index.hasher.signatures(train))
    found = []
    for i, keys in enumerate(index.query(index.hasher.signatures(test))):
        own = shingles(test[i])
        if any(jaccard(own, shingles(train[int(key)])) >= threshold for key in keys):
            found.append(i)
    return found


# %% tags=["check"]
story = [f"word{i}" for i in range(300)]
train = [" ".join(story[i : i + 100]) for i in (0, 100, 200)] + ["Dough rises."]
close, far = " ".join([*story[100:198], "new", "end"]), " ".join([*story[:84], *story[284:]])
test = ["Nothing of the kind", close, "dough  RISES.", far, train[0]]
assert 4 in leaked(train, test), "a copy has leaked; the indices are those of the test texts"
assert 1 in leaked(train, test), "a near copy has leaked"
assert 2 in leaked(train, test), "a short copy in capitals has leaked"
assert 3 not in leaked(train, test), "candidates are verified: this one has a similarity below 0.8"
assert leaked(train, test) == [1, 2, 4], "each leaked text once, in ascending order"
assert leaked(train * 2, test) == [1, 2, 4], "a text that leaked twice is named once"
assert leaked(train, test, 0.99) == [2, 4], "the threshold is the caller's"
assert leaked(train, [far], 0.6) == [0], (
    "bands fit the threshold: at a lower one this is found, too"
)
assert leaked(["a b c"], ["x y z", "x y z"]) == [], "copies inside the test set are no leak"
assert leaked(train, []) == [] and leaked([], test) == [], (
    "nothing has leaked from, or into, nothing"
)

# %% [markdown]
# ## Summary
#
# - Exact copies have the same canonical text; a hash of 128 bits stands for it.
# - Near copies share most of their shingles. One edit in a short text already makes the Jaccard
#   similarity fall below 0.8.
# - Under a random permutation two sets have the same minimum with probability $J$. The mean over
#   $k$ permutations is unbiased with variance $J(1-J)/k$.
# - Bands turn similarity into meeting: $1 - (1 - s^r)^b$. Who verifies candidates can afford many.
# - Clusters are components; centers instead of pairs keep large buckets cheap; a kept document
#   should be similar to each one removed for its sake.
#
# **Checklist**
#
# | to decide | choose | because |
# |---|---|---|
# | what is the same | case and white space ignored, punctuation not | `a + b` is no copy of `a - b` |
# | shingles | 5 words; 10 to 20 characters where words are not separated | a smaller $n$ joins what is only on one topic |
# | threshold | 0.8, lower for noisy text | look at pairs just above and below it before you decide |
# | permutations | 128 | an error of 0.035 at 0.8; candidates are verified anyway |
# | weights | 0.05 for false positives, 0.95 for misses | verifying is cheap, a missed copy stays |
# | scope | each crawl by itself first | global removal can leave the worse rest |
# | test sets | always, against all of training | {doc}`03_cleaning` removes overlaps in parts |
#
# **Further reading.** Broder {cite}`broder1997resemblance` is short and clear. Chapter 3 of
# Leskovec, Rajaraman and Ullman {cite}`leskovec2020mining` treats other distances in the same way.
# Lee and colleagues {cite}`lee2022deduplicating` measure what duplicates do to a model, and
# FineWeb {cite}`penedo2024fineweb` what removing them does.
