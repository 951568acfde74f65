# %% [markdown]
# # Batches
#
# > Turn documents into shards of token ids, and shards into batches that come in the same order
# > however often training stops, and never mix documents that do not belong together.
#
# A model learns from rectangles: so many rows, so many tokens each, thousands of times an hour
# for weeks. Text comes as documents, some of three tokens and some of a million. Between the two
# lies a part of the system that nobody talks about until it fails. It reads a file that was cut
# off when the disk was full, and trains on zeros. It starts again at the first document after
# every crash, so that the model has read the beginning of the corpus five times and the end
# never. It predicts the end of a recipe from a license. None of this raises an error. All of it
# makes the model worse.
#
# So this chapter is about being exact. What the batch at step 1,000,000 holds shall follow from a
# seed and the number 1,000,000, whatever happened before and however many machines take part.
#
# | | |
# |---|---|
# | **Part** | I. Foundations and data |
# | **You build** | {py:func}`~llmbook.batches.write_shards`, {py:class}`~llmbook.batches.TokenShards`, {py:class}`~llmbook.batches.BatchSampler`, {py:func}`~llmbook.batches.pack_documents`, {py:func}`~llmbook.batches.document_mask` |
# | **You need** | documents ({doc}`02_corpus`), a tokenizer ({doc}`05_tokenizer`), NumPy arrays and tensors, elementary probability |
# | **It takes** | 60 minutes for the main line, 2.5 hours for everything, 30 seconds to run |

# %% tags=["remove-cell"]
#| default_exp batches

# %% tags=["engine"]
#| export
# The imports that only the module needs
import pickle
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Int64, UInt64

from llmbook.corpus import CorpusWarning, Document, ordered_map, without_main_script
from llmbook.environment import check_at_least, check_path, whole_directory

# %% [markdown]
# ## One text, many predictions
#
# A text of $n$ tokens is not one example but $n - 1$: each token but the first is to be predicted
# from those before it, as in the chain rule of {doc}`01_tinyworld`. A transformer makes all these
# predictions at once. It gets $x_1, \dots, x_T$ as **inputs** and is judged on the **targets**
# $x_2, \dots, x_{T+1}$: the same tokens, shifted by one ({numref}`fig-batches-shift`). $T$ is the
# {term}`context length`, and $B$ such rows make a batch, because hardware is fast on rectangles.
#
# ```{figure} ../figures/batches-shift.svg
# :name: fig-batches-shift
# :alt: A row of tokens: the sign, The, dough, rises, the sign, Bake, at, 220, the sign. Below it the inputs, which are the first eight, and the targets, which are the last eight; an arrow leads from each input down to its target. The sign that ends the first document opens the second.
#
# Inputs and targets are two views of one window of $T + 1$ tokens. `<|endoftext|>`, here drawn as
# ◆, ends a document as a target and opens the next one as an input.
# ```
#
# The chapter works with NumPy's arrays and PyTorch's tensors, and with a few tools of the standard
# library:

# %%
#| export
import math
import os
import struct
import warnings
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# %% [markdown]
# We take the corpus and the tokenizer from the chapters before:

# %%
import tempfile
from fractions import Fraction

import matplotlib.pyplot as plt

from llmbook.cleaning import clean_documents
from llmbook.corpus import read_installed_docs
from llmbook.deduplication import deduplicate
from llmbook.tokenizer import train_bpe

plt.style.use("llmbook.book")
documents = deduplicate(clean_documents(read_installed_docs(["numpy", "matplotlib"])))
tokenizer = train_bpe((document.text for document in documents[::4]), 2048)
end_id = tokenizer.special_tokens["<|endoftext|>"]
print(f"about {round(len(documents), -3):,} documents, {tokenizer.vocab_size:,} ids")

# %% [markdown]
# One special token, `<|endoftext|>`, goes after each document. The smallest loader there is puts
# all tokens into one list and cuts windows of $T + 1$ tokens out of it at any places, usually
# random:


# %%
def get_batch(tokens: list[int], starts: Iterable[int], context_length: int) -> tuple:
    windows = torch.tensor([tokens[s : s + context_length + 1] for s in starts])
    return windows[:, :-1], windows[:, 1:]


encoded = [[*tokenizer.encode(document.text), end_id] for document in documents[:2000]]
tokens = [token for ids in encoded for token in ids]
inputs, targets = get_batch(tokens, starts=[0, 500, 1000, 1500], context_length=8)
assert torch.equal(inputs[:, 1:], targets[:, :-1]), "a target is the next input"
print(f"{len(inputs)} rows of {inputs.size(1)} inputs: {targets.numel()} predictions to learn from")

# %% [markdown]
# The first row and its targets, token by token:

# %% tags=["nbval-ignore-output"]
for name, row in (("inputs", inputs[0]), ("targets", targets[0])):
    print(f"{name:8}", [tokenizer.decode([token]) for token in row.tolist()])

# %% [markdown]
# For a few million tokens this is fine, and small projects stop here. It does not grow. A Python
# list holds a pointer of 8 bytes for each token, and the number that it points to takes 28 more,
# unless tokens share it. But an id below $2^{16} = 65{,}536$ fits into two bytes:

# %%
import sys

number_in_list = struct.calcsize("P") + sys.getsizeof(1000)  # a pointer and an object
for name, size in (("list", number_in_list), ("int64", 8), ("uint32", 4), ("uint16", 2)):
    print(f"{name:7} {size:3.0f} bytes a token, 10 billion tokens: {10 * size:4.0f} GB")

# %% [markdown]
# At 20 GB the corpus fits on any disk, but not into the memory of each of sixteen processes. It
# does not have to. A **memory-mapped** file looks like an array; the operating system reads a page
# of it (usually 4 KB) when somebody touches it, keeps it while there is room, and shares it among
# all processes. Vocabularies above 65,536 take `uint32`. In a batch, ids are always int64, which
# PyTorch takes as indices.
#
# ## A file that can be trusted
#
# A bare array of 16-bit numbers is a fine format until something goes wrong, and then it is the
# worst: *any* even number of bytes is a valid file. A truncated one is a shorter corpus. One from
# another tokenizer is a corpus in a language that nobody speaks. So each file, called a
# {term}`shard`, begins with 96 bytes that say what it is ({numref}`fig-batches-shard`).
#
# ```{figure} ../figures/batches-shard.svg
# :name: fig-batches-shard
# :alt: Three shard files in a row. Each has a header, token ids, and document ends. The header of the first is opened up: magic and version, counts, vocabulary size and id of end of text, number and whether it is the last, fingerprint of the tokenizer, digest of the previous shard, own digest, checksum of the header. An arrow leads from the digest of each shard to the field previous of the next.
#
# A set of shards. Each header holds the digest of the shard before, so the last digest vouches
# for the whole set.
# ```
#
# The counts give the length that the file must have, which is checked on opening at no cost. The
# **digest** is a hash (BLAKE2, 128 bits) of everything else in the file; checking it means reading
# the whole file. Every header also repeats the digest of the shard before, so the shards form a
# chain: one that is missing, duplicated, or from another run breaks it, and the digest of the last
# one stands for the whole set. That is the identity we will compare when training resumes. In
# miniature, with three parts of 10,000 numbers:


# %%
def chained(parts: list[np.ndarray]) -> str:
    """The start of the digest of the last part, which depends on all parts and on their order."""
    digest = b""
    for part in parts:
        digest = blake2b(digest + part.tobytes(), digest_size=16).digest()
    return digest.hex()[:8]


a, b, c = np.arange(30_000, dtype="<u2").reshape(3, -1)
one_bit_off = a ^ (np.arange(10_000) == 5000).astype("<u2")
for what, parts in (
    ("as written", [a, b, c]),
    ("one bit of the first", [one_bit_off, b, c]),
    ("two exchanged", [b, a, c]),
    ("the middle one missing", [a, c]),
):
    print(f"{what:23} {chained(parts)}")

# %% [markdown]
# Three more things are settled when shards are written, because nobody can check them later.
#
# *Which tokenizer was it?* Two tokenizers of the same size give ids in the same range. So the
# tokenizer identifies itself by what it does: its {term}`fingerprint` is a hash of its special
# tokens, its size, and its ids for a fixed text that has a bit of everything.
#
# *Are the ids right?* They may not be whole numbers. They may lie outside the vocabulary, where a
# conversion to 16 bits would silently turn 65,536 into 0. And they may contain end of text, if a
# tokenizer takes the characters `<|endoftext|>` in a web page for the token, so that the author of
# any page can end documents at will. What enters a shard is checked once, here, and trusted from
# then on.
#
# *Is it all there?* A process that writes for an hour may be killed at any moment. What must never
# exist is a directory that looks complete and is not. So {py:func}`~llmbook.batches.write_shards`
# writes into a hidden directory beside the target and renames it at the end: a rename happens
# completely or not at all.

# %% [markdown] tags=["engine"]
# ### Engine room: writing shards: header, fingerprint, checked ids, many encoders and one writer

# %% [markdown] tags=["engine"]
# **The header.** The order on disk is: the magic number and the version, so that a foreign file is
# recognized at once; the fields; and a CRC-32 of all that, against a flipped bit in the header
# itself.


# %% tags=["engine"]
#| export
class ShardError(ValueError):
    """A shard, or a directory of them, is not what it should be; the message names the file."""


class ShardHeader(NamedTuple):
    """What the first 96 bytes of a shard say (little endian, with a checksum of their own)."""

    n_tokens: int
    n_documents: int
    token_bytes: int
    vocab_size: int
    end_of_text: int
    number: int
    is_last: bool
    tokenizer: bytes
    previous: bytes
    digest: bytes


# %% [markdown] tags=["engine"]
# The header becomes bytes by a `struct.Struct`, little endian on every machine.

# %% tags=["engine"]
#| export
_MAGIC, _VERSION, _NO_DIGEST = b"llmbook\x07", 1, bytes(16)
_FIELDS = struct.Struct("<8sI2Q4I?8s16s16s7x")
_HEADER_SIZE = _FIELDS.size + 4


def _pack_header(header: ShardHeader) -> bytes:
    fields = _FIELDS.pack(_MAGIC, _VERSION, *header)
    return fields + zlib.crc32(fields).to_bytes(4, "little")


# %% [markdown] tags=["engine"]
# The header determines the sizes of the two parts that follow, the ids and the ends of documents,
# so a truncated file is noticed by its length alone.


# %% tags=["engine"]
#| export
def _layout(header: ShardHeader) -> tuple[int, int]:
    """Return where the document ends begin, on a multiple of 8, and the size of the file."""
    ends_at = -(-(_HEADER_SIZE + header.n_tokens * header.token_bytes) // 8) * 8
    return ends_at, ends_at + 8 * header.n_documents


def _read_header(path: Path) -> ShardHeader:
    """Return the header of a shard whose header and length are right, else raise ShardError."""
    with path.open("rb") as file:
        raw = file.read(_HEADER_SIZE)
    if raw[: len(_MAGIC)] != _MAGIC:
        raise ShardError(f"{path}: not a shard of tokens: it begins with {raw[:8]!r}")
    if len(raw) < _HEADER_SIZE or raw[-4:] != zlib.crc32(raw[:-4]).to_bytes(4, "little"):
        raise ShardError(f"{path}: the header is damaged")
    _, version, *fields = _FIELDS.unpack(raw[:-4])
    if version != _VERSION:
        raise ShardError(f"{path}: expected version {_VERSION}, got {version}")
    header = ShardHeader(*fields)
    if header.token_bytes not in (2, 4) or not 0 < header.n_documents <= header.n_tokens:
        raise ShardError(f"{path}: the header makes no sense: {header}")
    expected, size = _layout(header)[1], path.stat().st_size
    if size != expected:
        raise ShardError(f"{path}: expected {expected} bytes, got {size}: truncated or damaged")
    return header


# %% [markdown] tags=["engine"]
# The ends of documents could be found by a search for `<|endoftext|>`, but that would mean reading
# the whole file, so they are stored, in 8 bytes each.


# %% tags=["engine"]
#| export
def _write_shard(path: Path, documents: list[np.ndarray], header: ShardHeader) -> bytes:
    """Write ``documents`` (ids, each ending in end of text) as a shard; return its digest."""
    tokens = np.concatenate(documents)
    ends = np.cumsum([len(ids) for ids in documents], dtype="<u8")
    header = header._replace(n_tokens=len(tokens), n_documents=len(documents))
    payload = tokens.astype(f"<u{header.token_bytes}").tobytes()
    payload += bytes(_layout(header)[0] - _HEADER_SIZE - len(payload)) + ends.tobytes()
    digest = blake2b(_pack_header(header) + payload, digest_size=16).digest()
    with path.open("wb") as file:
        file.write(_pack_header(header._replace(digest=digest)))
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())  # on the disk, not on its way, before anybody can see the name
    return digest


# %% [markdown] tags=["engine"]
# **The tokenizer's fingerprint.** It works for any object with the three attributes that shards
# need, written down as a protocol.


# %% tags=["engine"]
#| export
@runtime_checkable
class Tokenizer(Protocol):
    """What shards need of a tokenizer: ids of a text, how many ids there are, special tokens."""

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of ``text``."""


# %% [markdown] tags=["engine"]
# The fixed text has words, numbers, code, five scripts, an emoji, and the characters of a special
# token:

# %% tags=["engine"]
#| export
_PROBE = """The quick brown fox doesn't jump: 1, 22, 333, 4444 times 3.14 makes 98%!
Training language models from scratch requires information, attention and computation.
    def encode(self, text: str = "") -> list[int]:\n\t\treturn [x**2 for x in range(256)]  # TODO
naïve façade, größer, señor, été; привет, мир; γλώσσα; 日本語の文章; 你好; हिन्दी; שלום; 🙂
https://www.example.org/index.html?a=1&b=2 <|endoftext|> {"key": null}\r\n===---...   end"""


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return 16 hexadecimal digits that tell tokenizers apart by what they do to a fixed text.

    Two that agree on this text and on their special tokens, but not elsewhere, look the same.
    """
    _check_tokenizer(tokenizer)
    special = sorted(tokenizer.special_tokens.items())
    ids = [int(token) for token in tokenizer.encode(_PROBE)]
    return blake2b(repr((tokenizer.vocab_size, special, ids)).encode(), digest_size=8).hexdigest()


# %% tags=["engine"]
#| export
# What is no tokenizer, and a number that is not given, are named.
def _check_tokenizer(tokenizer: object) -> None:
    if not isinstance(tokenizer, Tokenizer):
        expected = "expected an object with vocab_size, special_tokens and encode"
        raise ValueError(f"tokenizer: {expected}, got {tokenizer!r:.60}")


def _check_given(**bounds: tuple[int, object]) -> None:
    """Demand whole numbers of at least so much, as ``check_at_least``, but not None."""
    for argument, (_, value) in bounds.items():
        if value is None:
            raise ValueError(f"{argument}: expected a whole number, got None")
    check_at_least(**bounds)


def _check_window(start: object, length: object) -> None:
    _check_given(length=(0, length))
    if isinstance(start, bool) or not isinstance(start, int | np.integer):
        raise ValueError(f"start: expected a whole number, got {start!r}")


# %% [markdown] tags=["engine"]
# **Ids that cannot be wrong.** A document is a text, a {py:class}`~llmbook.corpus.Document`, or ids
# that somebody has already made. An error names the document.


# %% tags=["engine"]
#| export
def _checked(ids: Any, name: str, vocab_size: int, end_of_text: int) -> np.ndarray:
    """Return ``ids`` with end of text after them; a ValueError names the document."""
    try:
        array = np.asarray(ids)
    except ValueError:  # rows of unequal lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        got = f"{type(ids).__name__} ({array.ndim} dimensions of {array.dtype})"
        raise ValueError(f"texts: {name}: expected a text or a row of ids, got {got}")
    if array.size and not 0 <= array.min() <= array.max() < vocab_size:
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise ValueError(f"texts: {name}: expected ids from 0 to {vocab_size - 1}, got {wrong}")
    if np.any(array == end_of_text):
        where = f"{end_of_text} at position {np.argmax(array == end_of_text)}"
        raise ValueError(f"texts: {name}: expected no end of text inside a document, got {where}")
    return np.append(array, end_of_text).astype(np.uint32)


# %% [markdown] tags=["engine"]
# An empty document would be two ends of text in a row and would teach the model that after an end
# comes an end. Empty documents are left out, with a warning that counts them. This is what a worker
# process does with a group of documents:


# %% tags=["engine"]
#| export
@lru_cache(maxsize=1)
def _unpickled(tokenizer: bytes) -> Tokenizer:
    """The tokenizer of this worker process: unpickled once, and its caches stay warm."""
    return pickle.loads(tokenizer)


def _encode_job(job: tuple[Any, int, int, int, list[Any]]) -> list[np.ndarray]:
    """What a worker does: the checked ids of some documents, an empty array for an empty one."""
    tokenizer, vocab_size, end_of_text, first, items = job
    tokenizer = _unpickled(tokenizer) if isinstance(tokenizer, bytes) else tokenizer
    encoded = []
    for number, item in enumerate(items, first):
        name = f"document {number}"
        if isinstance(item, Document):
            name, item = f"{name} ({item.id!r})", item.text
        ids = tokenizer.encode(item) if isinstance(item, str) else item
        checked = _checked(ids, name, vocab_size, end_of_text)
        encoded.append(checked if len(checked) > 1 else checked[:0])
    return encoded


# %% [markdown] tags=["engine"]
# **In parallel, and the same bytes.** Encoding is slow and writing is fast: our tokenizer makes
# about a megabyte of ids a second, a disk takes hundreds. So worker processes encode, and one
# process writes. It takes results in the order of the jobs, with the `ordered_map` of
# {doc}`02_corpus`, and cuts shards by a rule that looks at nothing but the documents. The files are
# therefore the same, byte for byte, with one worker or with sixty. Documents are taken in rounds of
# about 64 million characters, so that a corpus larger than memory can be a stream.


# %% tags=["engine"]
#| export
def _rounds(texts: Iterable[Any], job_size: int = 1 << 20, round_size: int = 1 << 26) -> Iterator:
    """Group documents into jobs of about ``job_size`` characters, and jobs into rounds.

    Yields (characters, [(number of the first document, documents), ...]).
    """
    jobs: list[tuple[int, list[Any]]] = []
    in_job, in_round = 0, 0
    for number, item in enumerate(texts):
        if not jobs or in_job >= job_size:
            if in_round >= round_size:
                yield in_round, jobs
                jobs, in_round = [], 0
            jobs.append((number, []))
            in_job = 0
        jobs[-1][1].append(item)
        text = getattr(item, "text", item)
        size = len(text) if hasattr(text, "__len__") else 1  # what it is, is checked later
        in_job, in_round = in_job + size + 1, in_round + size
    if jobs:
        yield in_round, jobs


# %% [markdown] tags=["engine"]
# A tokenizer that no other process could import, such as a class defined in a notebook, does its
# work in this one.


# %% tags=["engine"]
#| export
def _portable(tokenizer: Tokenizer) -> bytes | None:
    """Return the pickled tokenizer, or None if another process could not unpickle it."""
    if type(tokenizer).__module__ == "__main__":
        return None
    try:
        return pickle.dumps(tokenizer)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _encoded(
    texts: Iterable[Any], tokenizer: Tokenizer, header: ShardHeader, workers: int | None
) -> Iterator[np.ndarray]:
    """Yield the ids of every document that is not empty, in order; warn of the empty ones."""
    portable, empty = _portable(tokenizer), 0
    for size, groups in _rounds(texts):
        many = min(4, os.cpu_count() or 1) if size > 8e6 else 1
        processes = 1 if portable is None else workers or many
        sent = tokenizer if processes == 1 else portable
        jobs = [(sent, header.vocab_size, header.end_of_text, *group) for group in groups]
        for encoded in ordered_map(_encode_job, jobs, processes):
            empty += sum(not len(ids) for ids in encoded)
            yield from (ids for ids in encoded if len(ids))
    if empty:
        warnings.warn(f"texts: {empty} empty documents were left out", CorpusWarning, stacklevel=4)


# %% [markdown] tags=["engine"]
# A shard is full with the document that makes it reach `shard_tokens`. It then waits until another
# document arrives, for only then do we know that it is not the last.


# %% tags=["engine"]
#| export
def _shards_of(
    documents: Iterable[np.ndarray], shard_tokens: int
) -> Iterator[tuple[list[np.ndarray], bool]]:
    """Group documents into shards; yield each with whether it is the last."""
    group: list[np.ndarray] = []
    size = 0
    for ids in documents:
        if size >= shard_tokens:
            yield group, False
            group, size = [], 0
        group.append(ids)
        size += len(ids)
    if group:
        yield group, True


# %% [markdown] tags=["engine"]
# The header of each shard begins as a blank one that has only what all shards of a set share.


# %% tags=["engine"]
#| export
def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _blank_header(tokenizer: Tokenizer, end_of_text: str) -> ShardHeader:
    """The header of an empty shard of ids by ``tokenizer``."""
    special, size = dict(tokenizer.special_tokens), tokenizer.vocab_size
    if end_of_text not in special:
        raise ValueError(f"end_of_text: expected one of {sorted(special)}, got {end_of_text!r}")
    fingerprint = bytes.fromhex(tokenizer_fingerprint(tokenizer))
    return ShardHeader(
        n_tokens=0,
        n_documents=0,
        token_bytes=2 if size <= 1 << 16 else 4,
        vocab_size=size,
        end_of_text=special[end_of_text],
        number=0,
        is_last=False,
        tokenizer=fingerprint,
        previous=_NO_DIGEST,
        digest=_NO_DIGEST,
    )


# %% [markdown] tags=["engine"]
# **All or nothing.** {py:func}`~llmbook.environment.whole_directory` of {doc}`00_environment` does
# the renaming. What a killed run leaves behind, the next one with the same target sweeps away.


# %% tags=["engine"]
#| export
def write_shards(
    texts: Iterable[Any],
    directory: str | Path,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = 50_000_000,
    end_of_text: str = "<|endoftext|>",
    workers: int | None = None,
) -> "TokenShards":
    """Encode ``texts``, put end of text after each, and write them to a new ``directory``.

    An item is a text, a ``Document``, or ids (a list or an array). Shards hold whole documents,
    and end with the one that makes them reach ``shard_tokens``; ids take 2 bytes up to a
    vocabulary of 65,536, else 4. Files do not depend on ``workers`` (by default several for a large
    corpus). The directory appears complete or not at all. Empty documents are left out, with a
    warning. A ``ValueError`` tells of wrong ids, no text at all, or files in the directory.
    """
    _check_given(shard_tokens=(1, shard_tokens))
    check_at_least(workers=(1, workers))
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected several texts, got one {type(texts).__name__}")
    _check_tokenizer(tokenizer)
    check_path(directory, "directory")
    header, digest = _blank_header(tokenizer, end_of_text), _NO_DIGEST
    target = Path(directory).resolve()
    with whole_directory(target) as draft:
        documents = _encoded(texts, tokenizer, header, workers)
        for number, (group, is_last) in enumerate(_shards_of(documents, shard_tokens)):
            header = header._replace(number=number, is_last=is_last, previous=digest)
            digest = _write_shard(draft / _shard_name(number), group, header)
        if digest == _NO_DIGEST:
            raise ValueError("texts: expected at least one document that is not empty, got none")
    return TokenShards(target)


# %% [markdown]
# ### Reading: one ring of tokens
#
# To its user, a set of shards is one long sequence. Where does it end? A window that reaches past
# the last token would have to be cut, and every loader has its own rule for that. There is a
# neater way. The last token is an end of text and the first begins a document, so the end can be
# joined to the beginning, and the junction looks like any other. On this **ring**, $n$ tokens
# give $n$ predictions, every position can begin a window, and there is no rule for ends
# ({numref}`fig-batches-ring`).
#
# ```{figure} ../figures/batches-ring.svg
# :name: fig-batches-ring
# :alt: A ring of 16 tokens in four documents A, B, C and D of 3, 6, 2 and 5 tokens, each with a sign at its end. Four cuts from a random place on give the windows AB, BC, CD, DA of four tokens, which cut every document. Beside them two packed rows of eight tokens, B with C and D with A, in which all documents are whole.
#
# The corpus as a ring, and the two ways to fill rows from it that this chapter builds.
# ```
#
# Slices, `end_of_text` and the checks that the docstring speaks of are added in the room below.


# %%
#| export
class TokenRing:
    """Ids joined end to end and closed to a ring; nothing is copied until it is read.

    ``tokens`` are a row of ids (an array, a tensor, a list of numbers) or several such rows.
    ``end_of_text`` is the id that ends each document, the last one included; without it there are
    no documents to tell apart. What are not ids raises a ``ValueError``.

    >>> ring = TokenRing([np.array([5, 6, 7]), np.array([8, 9])])
    >>> ring[1:4].tolist(), ring.window(3, 4).tolist()
    ([6, 7, 8], [8, 9, 5, 6])
    """

    def __init__(self, tokens: Sequence[np.ndarray]):
        self._parts = list(tokens)
        self._first = [0, *np.cumsum([len(part) for part in self._parts]).tolist()]

    def __len__(self) -> int:
        """The number of tokens."""
        return self._first[-1]

    def window(self, start: int, length: int) -> Int64[np.ndarray, " length"]:
        """Return ``length`` ids from position ``start`` on, going round as often as it takes."""
        _check_window(start, length)
        window, done = np.empty(length, np.int64), 0
        while done < length:
            at = (start + done) % len(self)
            number = bisect_right(self._first, at) - 1  # the part that holds position `at`
            piece = self._parts[number][at - self._first[number] :][: length - done]
            window[done : done + len(piece)] = piece
            done += len(piece)
        return window


# %% [markdown]
# Two parts of three and two tokens, and a window that goes past the end:

# %%
ring = TokenRing([np.array([5, 6, 7]), np.array([8, 9])])
print(f"{len(ring)} tokens; 4 of them from position 3 on: {ring.window(3, 4).tolist()}")

# %% [markdown] tags=["engine"]
# ### Engine room: tokens in memory become a ring, and so does a directory of shards

# %% [markdown] tags=["engine"]
# **Tokens in memory.** What people try first is an array, a tensor, or a list of ids. All of them
# make a ring, and what is not a row of ids is refused at once.


# %% tags=["engine"]
#| export
def _rows_of_ids(tokens: Any) -> list[np.ndarray]:
    """Return ``tokens``, a row of ids or several rows, as arrays."""
    if not hasattr(tokens, "__iter__"):
        raise ValueError(f"tokens: expected a row of ids or several, got {tokens!r:.60}")
    is_list = isinstance(tokens, Sequence) and len(tokens) > 0
    is_row = isinstance(tokens, np.ndarray | Tensor) or (
        is_list and isinstance(tokens[0], int | np.integer)
    )
    rows = []
    for part in [tokens] if is_row else tokens:
        row = part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            got = f"{type(part).__name__} ({row.ndim} dimensions of {row.dtype})"
            raise ValueError(f"tokens: expected rows of ids, which are whole numbers, got {got}")
        if row.dtype.kind == "i" and row.size and row.min() < 0:
            raise ValueError(f"tokens: expected ids from 0 on, got {row.min()}")
        rows.append(row)
    return rows


def _as_ring(tokens: Any, argument: str, or_else: str = "") -> "TokenRing":
    """Return ``tokens`` if they are a ring, else make one; an error names ``argument``."""
    if isinstance(tokens, TokenRing):
        return tokens
    try:
        return TokenRing(tokens)
    except (TypeError, ValueError) as error:
        got = f"got {tokens!r:.60}" if isinstance(error, TypeError) else str(error)
        expected = f"expected a row of token ids, a TokenRing, TokenShards{or_else}"
        raise ValueError(f"{argument}: {expected}; {got}") from error


# %% [markdown] tags=["engine"]
# With these checks a ring in memory has all that a sampler asks of its source: slices, and a
# fingerprint of its ids, however they are stored and divided.


# %% tags=["engine"]
#| export
class TokenRing(TokenRing):  # continued
    def __init__(self, tokens: Any, *, end_of_text: int | None = None):
        check_at_least(end_of_text=(0, end_of_text))
        self._parts = [part for part in _rows_of_ids(tokens) if len(part)]
        self._first = [0, *np.cumsum([len(part) for part in self._parts]).tolist()]
        self.end_of_text = end_of_text
        check_at_least(tokens=(1, self._first[-1]))

    def __getitem__(self, where: slice) -> Int64[np.ndarray, " tokens"]:
        """Return the ids of a slice, as int64."""
        if not isinstance(where, slice) or where.step not in (None, 1):
            raise ValueError(f"where: expected a slice with a step of 1, got {where!r}")
        start, stop, _ = where.indices(len(self))
        return self.window(start, max(stop - start, 0))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the ids and of ``end_of_text``; the first look reads all tokens."""
        digest = blake2b(repr(self.end_of_text).encode(), digest_size=16)
        for part in self._parts:
            for at in range(0, len(part), 1 << 20):
                digest.update(part[at : at + (1 << 20)].astype("<i8").tobytes())
        return digest.hexdigest()


# %% [markdown] tags=["engine"]
# Documents can be told apart where the ring knows which id ends them, and where the last one is
# ended, too: otherwise the last document would go on in the first.


# %% tags=["engine"]
#| export
class TokenRing(TokenRing):  # continued
    @cached_property
    def document_ends(self) -> Int64[np.ndarray, " documents"]:
        """Where each document ends: the position after its end of text."""
        if self.end_of_text is None:
            raise ValueError("end_of_text: a TokenRing needs it to tell documents apart, got None")
        pairs = zip(self._first, self._parts, strict=False)
        ends = [np.flatnonzero(part == self.end_of_text) + 1 + first for first, part in pairs]
        if self._parts[-1][-1] != self.end_of_text:
            expected = f"end of text, {self.end_of_text}, after the last document"
            raise ValueError(f"tokens: expected {expected}, got {self._parts[-1][-1]}")
        return np.concatenate(ends).astype(np.int64)


# %% [markdown] tags=["engine"]
# **Shards on disk.** A shard is opened by its header and mapped; verifying it means reading it all.


# %% tags=["engine"]
#| export
class _Shard:
    """One file: its header, and its ids and document ends, memory-mapped."""

    def __init__(self, path: Path):
        self.path, self.header = path, _read_header(path)
        ids = np.dtype(f"<u{self.header.token_bytes}")
        ends_at, _ = _layout(self.header)
        mapped = np.memmap(path, np.uint8, "r")
        end = _HEADER_SIZE + self.header.n_tokens * ids.itemsize
        self.tokens = np.asarray(mapped[_HEADER_SIZE:end]).view(ids)  # slices faster than memmap
        self.ends = np.asarray(mapped[ends_at:]).view("<u8")

    def verify(self) -> None:
        digest = blake2b(_pack_header(self.header._replace(digest=_NO_DIGEST)), digest_size=16)
        with self.path.open("rb") as file:
            file.seek(_HEADER_SIZE)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.digest() != self.header.digest:
            raise ShardError(f"{self.path}: the contents do not match the checksum: damaged")


# %% [markdown] tags=["engine"]
# That the shards are those of one set, in order and complete, their headers tell.


# %% tags=["engine"]
#| export
def _check_chain(directory: Path, headers: list[ShardHeader]) -> None:
    """Raise ShardError unless ``headers`` are those of one whole set, in order."""
    previous = _NO_DIGEST
    for number, header in enumerate(headers):
        path = directory / _shard_name(number)
        if header.number != number or header.previous != previous:
            raise ShardError(f"{path}: belongs to another set than the shards before it")
        if header.is_last and number + 1 < len(headers):
            raise ShardError(f"{path}: is the last of its set, but {len(headers)} shards are here")
        previous = header.digest
    if not headers[-1].is_last:
        raise ShardError(f"{directory / _shard_name(len(headers))}: missing, the set goes on")


# %% [markdown] tags=["engine"]
# One trap is left: a memory-mapped array that is pickled, to be sent to another process, is pickled
# as an array, all 20 GB of it. So a set of shards is sent as the name of its directory and opened
# there anew.


# %% tags=["engine"]
#| export
def _shard_paths(directory: Path) -> list[Path]:
    found = sorted(directory.glob("shard-*.bin"))
    if not found:
        raise ShardError(f"{directory}: no shards here")
    paths = [directory / _shard_name(number) for number in range(len(found))]
    if missing := sorted(set(paths) - set(found)):
        raise ShardError(f"{missing[0]}: missing, but {found[-1].name} is there")
    return paths


# %% tags=["engine"]
#| export
class TokenShards(TokenRing):
    """A directory that ``write_shards`` has written: a ring of tokens that knows its documents.

    Opening checks names, headers, lengths, and that the shards are of one set; the tokens are
    checked by ``verify``. What is wrong raises a ``ShardError`` that names the file. If a
    ``tokenizer`` is given, it must be the one that the shards were written with.
    """

    end_of_text: int

    def __init__(self, directory: str | Path, tokenizer: Tokenizer | None = None):
        check_path(directory, "directory")
        self.directory = Path(directory).resolve()
        self._shards = [_Shard(path) for path in _shard_paths(self.directory)]
        _check_chain(self.directory, [shard.header for shard in self._shards])
        header = self._shards[-1].header
        super().__init__([shard.tokens for shard in self._shards], end_of_text=header.end_of_text)
        self.vocab_size = header.vocab_size
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != header.tokenizer.hex():
            raise ShardError(f"{self.directory}: written with another tokenizer than the one given")

    @cached_property
    def fingerprint(self) -> str:
        """The digest of the last shard, which stands for all: their digests are a chain."""
        return self._shards[-1].header.digest.hex()

    @cached_property
    def document_ends(self) -> Int64[np.ndarray, " documents"]:
        """Where each document ends: the position after its end of text."""
        offsets = zip(self._first, self._shards, strict=False)
        return np.concatenate([shard.ends.astype(np.int64) + first for first, shard in offsets])

    def verify(self) -> None:
        """Read everything and compare it with the checksums; raise ShardError at a fault."""
        for shard in self._shards:
            shard.verify()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenShards, (self.directory,)


# %% [markdown]
# ### Shards at work
#
# We write the corpus in shards of 200,000 tokens, small enough that there are several. A
# {py:class}`~llmbook.batches.TokenShards` is the ring of a directory: it reads slices, knows where
# documents end (`document_ends`), and `verify` compares everything with the digests.

# %%
folder = Path(tempfile.mkdtemp())
shards = write_shards(documents, folder / "train", tokenizer, shard_tokens=200_000)
shards.verify()
assert len(shards.document_ends) == sum(bool(document.text) for document in documents)
assert tokenizer.decode(shards[: shards.document_ends[0] - 1]) == documents[0].text
files = list(shards.directory.iterdir())
size = sum(file.stat().st_size for file in files) / len(shards)
print(f"{len(shards) / 1e6:.1f} million tokens in {len(files)} files, {size:.1f} bytes a token")

# %% [markdown]
# (The ends of documents take what is above two bytes a token: 8 bytes each.)
#
# And now the accidents, to four small shards that hold nothing but sevens. Each must be found, and
# each message must name the file:

# %%
import shutil

sevens = write_shards([[7] * 1000] * 10, folder / "sevens", tokenizer, shard_tokens=3000)


def accident(what: str, damage) -> None:
    broken = Path(shutil.copytree(sevens.directory, folder / "broken"))
    damage(broken)
    try:
        TokenShards(broken).verify()
        print(f"{what:22} NOT FOUND")
    except ShardError as error:
        print(f"{what:22} {str(error).replace(str(broken.resolve()) + os.sep, '')}")
    shutil.rmtree(broken)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


accident("one bit in a token", lambda at: flip(at / "shard-00001.bin", 5000))
accident("one bit in the header", lambda at: flip(at / "shard-00001.bin", 20))
accident("an arbitrary file", lambda at: (at / "shard-00000.bin").write_bytes(b"PK\3\4" * 100))
accident("an interrupted copy", lambda at: os.truncate(at / "shard-00000.bin", 4096))
accident("a lost shard", lambda at: (at / "shard-00001.bin").unlink())
accident("one shard twice", lambda at: shutil.copy(at / "shard-00000.bin", at / "shard-00001.bin"))

# %% [markdown]
# What should be checked when? Header and length at every opening: that takes microseconds and
# finds copies that were interrupted. The tokens after every copy from another machine: at 300 MB
# a second, 20 GB take a minute, too long for every start of every process.
#
# ## Which window comes next?
#
# ### Draw it at random
#
# The simplest order is none: each row starts at a random position of the ring. A position is the
# target of a row if the window starts at one of the $T$ positions before it, which has
# probability $T/n$. After $n/T$ rows, as many as would cover the ring once, it has been missed by
# all of them with probability
#
# $$
# \left(1 - \frac{T}{n}\right)^{n/T} \approx e^{-1} \approx 0.37 ,
# $$ (batches-missed)
#
# because $(1 - 1/k)^k$ tends to $e^{-1}$ as $k = n/T$ grows. So after an {term}`epoch`'s worth of
# training more than a third of the corpus has never been a target. The number of visits is close
# to a Poisson distribution with mean 1, in which $1 - 2/e$, about a quarter, is visited at least
# twice ({numref}`fig-batches-visits`).
#
# ### Shuffle the windows
#
# The alternative is to cut the ring into $W = \lfloor n/T \rfloor$ windows and to visit each
# exactly once an epoch, in a random order. The cuts should move, too, or the first target of a
# window would have a single token of context in every epoch. So each epoch cuts from a random
# position on.

# %%
context_length = 128
rng = np.random.default_rng(0)
n, windows = len(shards), len(shards) // context_length


def visits(starts: np.ndarray) -> np.ndarray:
    targets = (starts[:, None] + 1 + np.arange(context_length)) % n
    return np.bincount(targets.ravel(), minlength=n)


at_random = visits(rng.integers(n, size=windows))
shuffled = visits(rng.integers(n) + rng.permutation(windows) * context_length)
assert shuffled.max() == 1, "no token is seen twice"
assert np.sum(shuffled == 0) < context_length, "fewer are left over than fill a window"
print(
    f"random:   {np.mean(at_random == 0):.0%} never seen, "
    f"{np.mean(at_random > 1):.0%} twice or more"
)
print(f"shuffled: {np.mean(shuffled == 0):.1%} never seen, none twice")

# %% [markdown]
# {numref}`fig-batches-visits` has the whole distribution, beside that of Poisson.

# %% mystnb={"figure": {"caption": "How often each token was a target after one epoch's worth of rows: windows at random positions, a Poisson distribution with mean 1, and shuffled windows.", "name": "fig-batches-visits"}, "image": {"alt": "Bars over the number of visits, 0 to 5. Random windows: 0.37, 0.37, 0.18, 0.06, 0.02 and almost nothing, each with a dot of the Poisson distribution at its tip. Shuffled windows: a single bar of height 1 at one visit."}}
times = np.arange(6)
poisson = np.exp(-1) / np.cumprod(np.maximum(times, 1))
plt.bar(times - 0.2, [np.mean(at_random == k) for k in times], 0.4, label="random windows")
plt.bar(times + 0.2, [np.mean(shuffled == k) for k in times], 0.4, label="shuffled windows")
plt.plot(times - 0.2, poisson, "o", color="black", label="Poisson, mean 1")
plt.xlabel("visits as a target")
plt.ylabel("share of tokens")
plt.legend()
plt.show()

# %% [markdown]
# ### A generator without a state
#
# Both orders above came out of a random generator, and a generator has a state that changes with
# every use. To resume at row 1,000,000 one has to store it, or to draw a million numbers again;
# and a worker that prepares every other row has to skip the rest. All this vanishes if the number
# for row $i$ is a *function* of $i$: a hash. Such generators are called **counter-based**
# {cite}`salmon2011parallel`. Ours is SplitMix64 {cite}`steele2014splittable`, which mixes the
# bits of seed plus counter by shifts and multiplications until each bit of the result depends on
# all. Being our own code, it cannot change with the version of a library.


# %%
#| export
def _mix(bits: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finalizer of SplitMix64: a bijection that scatters every bit (Steele et al., 2014)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _next_bits(
    state: UInt64[np.ndarray, "..."], counter: UInt64[np.ndarray, "..."]
) -> UInt64[np.ndarray, " n"]:
    return _mix(state + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def random_bits(*counters: int | np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Return 64 random bits for each combination of ``counters``: whole numbers, or arrays of them.

    The same counters give the same bits everywhere and for ever. Arrays go element by element.

    >>> random_bits(0, np.arange(3)) % 100
    array([55, 54, 31], dtype=uint64)
    """
    state = np.zeros(1, np.uint64)
    for counter in counters:
        array = np.atleast_1d(counter)
        if array.dtype.kind not in "biu":
            raise ValueError(f"counters: expected whole numbers of 64 bits, got {counter!r}")
        state = _next_bits(state, array.astype(np.uint64))
    return state


# %% [markdown]
# ### A permutation without a table
#
# Random positions are now one line, `random_bits(seed, row) % n`. Shuffling needs a permutation
# of $W$ windows. `rng.permutation(W)` makes a table, and for a run with 15 trillion tokens in
# windows of 8,192 that is 15 GB in every process. Again a function would do: a bijection of the
# numbers below $W$ that looks random. A hash is none, because it sends two windows to one place.
# But a hash can be *part* of one. Write the numbers into a rectangle of $a$ rows and $b$ columns,
# $ab \ge W$. Turn each row, like the dial of a lock, by a number of places that is a hash of the
# row's number. Whatever the hash, this is a bijection, for one can turn back. Then turn each
# column by a hash of *its* number, then the rows again, and so on, with new hashes in each round.
# This is a **Feistel network** {cite}`luby1988construct`, in the form that Black and Rogaway gave
# it for numbers of any size {cite}`black2002ciphers`. We do eight rounds, and sixteen if the
# rectangle is small. One side should be even: turning a row of odd length is an even permutation,
# so with two odd sides half of all orders of the rectangle could never occur.


# %%
#| export
def _turned(
    numbers: UInt64[np.ndarray, " n"], a: int, b: int, keys: UInt64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """Permute the numbers below a * b: rows and columns are turned alternately."""
    sides = np.uint64(a), np.uint64(b)
    place = list(np.divmod(numbers, sides[1]))  # row, column
    for number in range(16 if a < 32 else 8):  # small rectangles take longer to mix
        moved, fixed = (number + 1) % 2, number % 2  # in round 0, the column moves
        counter = place[fixed] << np.uint64(4) | np.uint64(number)
        turn = _next_bits(keys, counter) % sides[moved]
        place[moved] = (place[moved] + turn) % sides[moved]
    return place[0] * sides[1] + place[1]


# %% [markdown]
# The rectangle may be larger than $W$. If a number lands at $W$ or above, it is sent
# through the network again, until it is below. This **cycle walking** ends, because repeating a
# permutation leads back to the start; and it is a bijection, because each number below $W$ is
# sent to the next one below $W$ on its cycle. With $a \approx b \approx \sqrt{W}$ it is rarely
# needed.


# %%
#| export
def permuted(
    numbers: Int64[np.ndarray, " n"], size: int, *keys: int | np.ndarray
) -> Int64[np.ndarray, " n"]:
    """Return where a random permutation of 0 to ``size - 1`` sends each of ``numbers``.

    ``keys`` choose the permutation: whole numbers, or arrays with one for each number. There is no
    table. Source: Black and Rogaway (2002), generalized Feistel cipher and cycle walking.

    >>> permuted(np.arange(10), 10, 0).tolist()
    [5, 3, 6, 0, 9, 2, 4, 7, 8, 1]
    """
    _check_given(size=(1, size))
    if not isinstance(numbers, np.ndarray) or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ValueError(f"numbers: expected an array of whole numbers, got {numbers!r:.60}")
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < size:
        wrong = numbers[(numbers < 0) | (numbers >= size)][0]
        raise ValueError(f"numbers: expected 0 to {size - 1}, got {wrong}")
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    result = numbers.astype(np.uint64)
    keys_of = np.broadcast_to(random_bits(*keys), numbers.shape)
    walking = np.ones(len(numbers), bool)
    while walking.any():
        result[walking] = _turned(result[walking], a, b + b % 2, keys_of[walking])
        walking = result >= np.uint64(size)
    return result.astype(np.int64)


# %% [markdown]
# Is it a permutation, and is it random enough? Of the $4! = 24$ orders of four numbers, 24,000
# seeds should give each about 1,000 times. Then $\chi^2$, the sum of (observed − expected)² /
# expected, has a mean of 23 and a standard deviation of about 7.

# %%
size = 100_003
assert len(np.unique(permuted(np.arange(size), size, 7))) == size, "a permutation"
seeds = np.repeat(np.arange(24_000), 4)
orders = permuted(np.tile(np.arange(4), 24_000), 4, seeds).reshape(-1, 4)
_, counts = np.unique(orders @ 4 ** np.arange(4), return_counts=True)
chi_square = np.sum((counts - 1000) ** 2 / 1000)
print(f"{len(counts)} of 24 orders, chi-square {chi_square:.0f}, expected 23 ± 7")

# %% [markdown]
# With these two functions the place where any row of any epoch begins can be computed on the spot.
# The ring has $n$ positions; a row takes a *unit* of them, $T$ for windows and 1 for packed rows,
# whose ring is the list of rows. Three orders are worth having: `"shuffled"`, `"random"`, and
# `"sequential"` for evaluation. Some loaders draw only windows that lie within the text and never
# reach around its end; with `wrap` false, so do we: then there are $\lfloor (n - 1)/T \rfloor$
# windows, and the cuts move only as far as the rest allows.


# %%
#| export
def _starts_of_rows(
    rows: Int64[np.ndarray, " rows"], size: int, unit: int, order: str, seed: int, wrap: bool
) -> Int64[np.ndarray, " rows"]:
    """Return where the ``rows`` of all training begin in a ring of ``size`` positions."""
    if order == "random":
        return (random_bits(seed, rows) % np.uint64(size if wrap else size - unit)).astype(np.int64)
    windows = size // unit if wrap else (size - 1) // unit  # their last target, too, lies within
    epoch, place = np.divmod(rows, windows)
    if order == "sequential":
        return place * unit
    cuts = np.uint64(size if wrap else size - windows * unit)  # how many first cuts there are
    cut = (random_bits(seed, epoch, 1) % cuts).astype(np.int64)
    return (permuted(place, windows, seed, epoch, 0) * unit + cut) % size


# %% [markdown]
# A batch holds rows. The last two fields are for the next section:


# %%
#| export
class Batch(NamedTuple):
    """Rows to learn from. A target of -100 does not count.

    ``document_ids`` number the documents of a row (-1: padding), ``position_ids`` count from 0 in
    each; both are None where documents were not asked for. ``document_mask`` makes the mask.
    """

    inputs: Int64[Tensor, "batch sequence"]
    targets: Int64[Tensor, "batch sequence"]
    position_ids: Int64[Tensor, "batch sequence"] | None = None
    document_ids: Int64[Tensor, "batch sequence"] | None = None


# %% [markdown]
# Its rows are the windows that begin at the computed places:


# %%
#| export
def window_batch(
    ring: TokenRing | np.ndarray | Tensor | Sequence[int],
    starts: Sequence[int] | np.ndarray,
    context_length: int,
) -> Batch:
    """Return the windows that begin at ``starts``: ``context_length`` inputs, targets one later."""
    ring = _as_ring(ring, "ring")
    _check_given(context_length=(1, context_length))
    places = np.asarray(starts)
    if places.ndim != 1 or not places.size or places.dtype.kind not in "iu":
        raise ValueError(
            f"starts: expected at least one position, whole numbers, got {starts!r:.60}"
        )
    windows = np.stack([ring.window(int(start), context_length + 1) for start in places])
    inputs, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


# %% [markdown]
# Row 1,000,000 alone, and among its neighbors, 999,990 to 1,000,009, in one call:

# %%
how = {"size": n, "unit": context_length, "order": "shuffled", "seed": 0, "wrap": True}
alone = _starts_of_rows(np.array([1_000_000]), **how)
together = _starts_of_rows(np.arange(999_990, 1_000_010), **how)
assert alone[0] == together[10]
epoch = round(1_000_000 // windows, -1)
batch = window_batch(shards, together, context_length)
print(f"row 1,000,000, in about epoch {epoch}, begins at the same place both times")
print(f"{len(batch.inputs)} rows of {batch.inputs.size(1)} inputs")

# %% [markdown] tags=["engine"]
# ### Engine room: a batch moves to another device

# %% [markdown] tags=["engine"]
# All fields that are there move; the others stay None.


# %% tags=["engine"]
#| export
class Batch(Batch):  # continued
    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on ``device``."""
        if not isinstance(device, str | torch.device | int) or isinstance(device, bool):
            raise ValueError(f"device: expected a device or its name, got {device!r:.60}")
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device: expected a device or its name, got {device!r}") from error
        positions, documents = self.position_ids, self.document_ids
        return Batch(
            self.inputs.to(device),
            self.targets.to(device),
            None if positions is None else positions.to(device),
            None if documents is None else documents.to(device),
        )


# %% [markdown]
# ## Documents that share a row
#
# A window of 128 tokens begins in the middle of one document and ends in the middle of another.
# How many does it meet on the way?

# %%
opened = np.mean([(shards.window(s, context_length) == end_id).sum() for s in range(0, n, 5000)])
print(f"documents in a window of {context_length} tokens: about {1 + opened:.0f}")

# %% [markdown]
# A transformer looks back by **attention** ({doc}`09_attention`): at each position it takes a
# weighted mean of what other positions hold. A **mask** says which of them count. The *causal* mask
# lets each position attend to itself and to all before it, and so also to other documents, with
# which it shares nothing but the row. Zhao and colleagues {cite}`zhao2024analysing` pretrained
# models both ways, and those whose attention stayed inside the document were better. So we must
# know where documents begin.
#
# Here `<|endoftext|>` does double duty. As a *target* it ends a document: the model learns to
# stop. As an *input* it opens the next one: the model learns how documents begin, and to generate
# from nothing means to start from this token. So every document of $m$ tokens gives $m + 1$
# predictions, its first token among them. In a row, a new document begins wherever the input is
# end of text. A cumulative sum numbers the documents, and **position ids** count from 0 in each,
# so that a document looks the same to the model wherever in a row it lies.


# %%
#| export
def document_fields(
    inputs: Int64[Tensor, "batch sequence"], end_of_text: int
) -> tuple[Int64[Tensor, "batch sequence"], Int64[Tensor, "batch sequence"]]:
    """Return position ids and document ids; each end of text among ``inputs`` opens a document.

    A row that begins inside a document has the rest of it as document 0, from position 0 on.

    >>> positions, documents = document_fields(torch.tensor([[7, 7, 0, 7, 7]]), end_of_text=0)
    >>> positions.tolist(), documents.tolist()
    ([[0, 1, 0, 1, 2]], [[0, 0, 1, 1, 1]])
    """
    _check_ids("inputs", inputs)
    _check_given(end_of_text=(0, end_of_text))
    opens = inputs == end_of_text
    places = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
    begin = torch.where(opens, places, 0).cummax(dim=1).values
    return places - begin, opens.cumsum(dim=1) - opens[:, :1].long()


def document_mask(
    document_ids: Int64[Tensor, "batch sequence"],
) -> Bool[Tensor, "batch 1 sequence sequence"]:
    """Return where attention is allowed (True): to earlier places of the same document, and itself.

    Padding, document -1, attends to padding, so that no row of the mask is empty and no softmax is
    taken over nothing.
    """
    _check_ids("document_ids", document_ids)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]  # the 1 stands for all heads


# %% tags=["engine"]
#| export
# Anything but a batch of ids is named
def _check_ids(argument: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2:
        is_tensor = isinstance(ids, Tensor)
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if is_tensor else f"{ids!r:.60}"
        expected = "expected a tensor of int64, (batch, sequence)"
        raise ValueError(f"{argument}: {expected}, got {got}")


# %% [markdown]
# {numref}`fig-batches-mask` shows the mask of a window that four documents share, beside the causal
# mask.

# %% mystnb={"figure": {"caption": "Who may attend to whom in one window: with the causal mask alone, and inside documents.", "name": "fig-batches-mask"}, "image": {"alt": "Two square matrices over the 64 positions of a row. Left, causal: the lower triangle is filled. Right, inside documents: several smaller triangles along the diagonal, one for each document, and nothing else."}}
openings = shards.document_ends - 1
begin = next(at for at in openings if (shards.window(at, 64) == end_id).sum() == 4)
one = window_batch(shards, [begin], 64)
position_ids, document_ids = document_fields(one.inputs, end_id)
figure, axes = plt.subplots(1, 2)
causal = torch.ones(64, 64, dtype=torch.bool).tril()
for ax, mask, title in zip(
    axes, (causal, document_mask(document_ids)[0, 0]), ("causal", "inside documents"), strict=True
):
    ax.imshow(mask, cmap="Blues", vmin=0, vmax=1.4)
    ax.set(title=title, xlabel="attended position", ylabel="position")
    ax.grid(False)
plt.show()

# %% [markdown]
# Does it do what it should? Then attention must give each document what it would get alone. We
# fill the inputs of PyTorch's attention, called query, key and value, with random numbers, and
# run it twice: on the shared row under the mask, and on each document by itself.

# %%
torch.manual_seed(0)
attention = torch.nn.functional.scaled_dot_product_attention
query, key, value = torch.randn(3, 1, 4, 64, 16)
together = attention(query, key, value, attn_mask=document_mask(document_ids))
apart = []
for number in range(4):
    here = document_ids[0] == number
    alone = attention(query[:, :, here], key[:, :, here], value[:, :, here], is_causal=True)
    apart.append((together[:, :, here] - alone).abs().max().item())
assert max(apart) < 1e-5
causal_only = attention(query, key, value, is_causal=True)
assert (causal_only - together).abs().max() > 1
print("largest difference from each alone: below 0.00001; with the causal mask only: above 1")

# %% [markdown]
# ### What fits into a row
#
# The mask keeps documents apart, but the cuts remain: a window ends in the middle of a document,
# whose rest has to do without what was said before. Ding and colleagues {cite}`ding2024fewer`
# choose for each row whole documents that just fill it, and found that models trained on such rows
# invented facts less often. Room that is left over is **padding**, computed in vain. Its targets
# are -100, which count for nothing ({doc}`12_optimization`), and its document id is -1.
#
# To fill rows with as little padding as possible is the **bin packing** problem, which is NP-hard.
# A greedy rule comes close, and Ding and colleagues use it, too. *Best fit, decreasing*: take
# documents from long to short, and put each into the fullest row that has room for it. To search
# all rows for each document would take quadratic time. But lengths are whole numbers up to $T$: it
# is enough to keep, for each amount of room, a stack of the rows that have just so much left. We
# note which amounts occur in the bits of one Python integer: bit $k$ is set if some row has room
# for $k$. The fullest row with room for $\ell$ tokens is then the lowest set bit from $\ell$ on,
# which a shift and `x & -x` find at once.


# %%
#| export
def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> Int64[np.ndarray, " documents"]:
    """Return the row of each document when all are packed into rows of ``capacity`` tokens.

    Best-fit decreasing: from long to short, each into the fullest row that has room, else into a
    new row. Raises a ``ValueError`` for a length below 1 or above ``capacity``.

    >>> best_fit([3, 5, 2, 6], capacity=8).tolist()
    [1, 1, 0, 0]
    """
    sizes = _checked_lengths(lengths, capacity)
    row_of = np.empty(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    bits, n_rows = 0, 0  # bit k: some row has room for exactly k
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        enough = bits >> size
        room = size + (enough & -enough).bit_length() - 1 if enough else int(capacity)
        if enough:
            row = with_room[room].pop()
            bits ^= (not with_room[room]) << room
        else:
            row, n_rows = n_rows, n_rows + 1
        row_of[index] = row
        with_room[room - size].append(row)
        bits |= 1 << (room - size)
    return row_of


# %% [markdown]
# A document in the ring is itself a window: it begins at the end of text *before* it, which opens
# it, and has as many inputs as the document has tokens, end of text included. So a packed row is
# a list of windows, of unequal lengths. A document that is longer than a row is cut into pieces
# of $T$, which count as documents. {py:func}`~llmbook.batches.pack_documents` arranges all
# documents of a ring in this way, and {py:class}`~llmbook.batches.PackedDocuments` hands out the
# rows and knows the share of `padding`.

# %% [markdown] tags=["engine"]
# ### Engine room: packed rows, their padding, and what does not fit

# %% [markdown] tags=["engine"]
# Lengths that cannot be packed are named before the packing begins.


# %% tags=["engine"]
#| export
def _checked_lengths(
    lengths: Sequence[int] | np.ndarray, capacity: int
) -> Int64[np.ndarray, " documents"]:
    _check_given(capacity=(1, capacity))
    sizes = np.asarray(lengths)
    if sizes.size and sizes.dtype.kind not in "iu":
        raise ValueError(f"lengths: expected whole numbers, got {sizes.flat[0]!r}")
    if sizes.ndim != 1:
        raise ValueError(f"lengths: expected a row of them, got shape {sizes.shape}")
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= capacity:
        wrong = sizes[(sizes < 1) | (sizes > capacity)][0]
        raise ValueError(f"lengths: expected 1 to {capacity}, the capacity, got {wrong}")
    return sizes.astype(np.int64)


# %% [markdown] tags=["engine"]
# A packing is four arrays: where each window begins, how long it is, and which windows a row has.


# %% tags=["engine"]
#| export
@dataclass(frozen=True, eq=False)
class PackedDocuments:
    """Rows of whole documents: row r has the windows ``rows[r]`` to ``rows[r + 1] - 1``."""

    shards: TokenRing
    context_length: int
    starts: Int64[np.ndarray, " windows"]
    lengths: Int64[np.ndarray, " windows"]
    rows: Int64[np.ndarray, " rows_and_one"]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows) - 1

    @property
    def padding(self) -> float:
        """The share of all places that hold no token."""
        return 1 - int(self.lengths.sum()) / (len(self) * self.context_length)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shards' digest and of what is in each row."""
        digest = blake2b(self.shards.fingerprint.encode(), digest_size=16)
        for array in (self.starts, self.lengths, self.rows):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return the given rows; padding has targets -100 and document id -1."""
        _check_rows(rows, len(self))
        fields = np.stack([_packed_row(self, int(row)) for row in rows], axis=1)
        return Batch(*torch.from_numpy(fields))


# %% [markdown] tags=["engine"]
# Padding comes last in its row, so causal attention never reaches it. Its inputs are end of text,
# an id that every model knows.


# %% tags=["engine"]
#| export
def _check_rows(rows: Any, size: int) -> None:
    if not isinstance(rows, Sequence | np.ndarray | Tensor) or isinstance(rows, str):
        raise ValueError(f"rows: expected numbers of rows, got {rows!r:.60}")
    numbers = [row for row in rows if isinstance(row, int | np.integer)]
    wrong = [row for row in rows if not isinstance(row, int | np.integer)]
    wrong += [row for row in numbers if not 0 <= row < size]
    if wrong or not len(rows):
        raise ValueError(f"rows: expected 0 to {size - 1}, got {[*wrong, 'none'][0]}")


def _packed_row(packed: PackedDocuments, row: int) -> Int64[np.ndarray, "4 sequence"]:
    """Return inputs, targets, position ids and document ids of a row."""
    length, at = packed.context_length, 0
    fields = np.empty((4, length), np.int64)
    fields.T[:] = packed.shards.end_of_text or 0, -100, 0, -1
    counting = np.arange(length)
    for number, index in enumerate(range(packed.rows[row], packed.rows[row + 1])):
        size = int(packed.lengths[index])
        window = packed.shards.window(int(packed.starts[index]), size + 1)
        here = fields[:, at : at + size]
        here[0], here[1], here[2], here[3] = window[:-1], window[1:], counting[:size], number
        at += size
    fields[2, at:] = counting[: length - at]
    return fields


# %% [markdown] tags=["engine"]
# The rest is bookkeeping, done for all documents at once.


# %% tags=["engine"]
#| export
def pack_documents(
    shards: TokenRing, context_length: int, strategy: str = "best_fit"
) -> PackedDocuments:
    """Arrange the documents of ``shards`` in rows of ``context_length``, none cut without need.

    Strategies are "best_fit", and "one_per_row" for a row of its own for each. Longer documents are
    cut into pieces of ``context_length``; each piece counts as a document, its positions from 0.
    A ``TokenRing`` in memory must know its ``end_of_text``.
    """
    if not isinstance(shards, TokenRing):
        raise ValueError(f"shards: expected TokenShards or a TokenRing, got {shards!r:.60}")
    _check_given(context_length=(1, context_length))
    if strategy not in ("best_fit", "one_per_row"):
        raise ValueError(f"strategy: expected 'best_fit' or 'one_per_row', got {strategy!r}")
    sizes = np.diff(shards.document_ends, prepend=0)
    pieces = -(-sizes // context_length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.repeat(shards.document_ends - sizes, pieces) + number * context_length
    lengths = np.minimum(np.repeat(sizes, pieces) - number * context_length, context_length)
    one = strategy == "one_per_row"
    row_of = np.arange(len(lengths)) if one else best_fit(lengths, context_length)
    order = np.argsort(row_of, kind="stable")
    rows = np.searchsorted(row_of[order], np.arange(row_of.max() + 2))
    starts = (begin - 1) % len(shards)
    return PackedDocuments(shards, context_length, starts[order], lengths[order], rows)


# %% [markdown]
# ### How much does it help?
#
# We compare four ways to fill rows: one document each; documents in the
# order in which they come, a new row when the next does not fit; best fit; and windows of the
# stream, which need no padding but cut.

# %%
sizes = np.diff(shards.document_ends, prepend=0)


def in_order(lengths: np.ndarray, capacity: int) -> int:
    rows, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, capacity
        room -= length
    return rows


lengths_of_rows = 2 ** np.arange(5, 12)
padding, cut_by_windows, longer = [], [], []
for T in lengths_of_rows.tolist():
    fitting = pack_documents(shards, T)
    alone = pack_documents(shards, T, "one_per_row")
    in_turn = 1 - n / (in_order(fitting.lengths[np.argsort(fitting.starts)], T) * T)
    padding.append((alone.padding, in_turn, fitting.padding))
    first, last = shards.document_ends - sizes, shards.document_ends - 1
    cut_by_windows.append(np.mean(first // T != last // T))
    longer.append(np.mean(sizes > T))
print("padding in percent")
print("row length    one a row  in order  best fit")
for T, row in zip(lengths_of_rows.tolist(), padding, strict=True):
    print(f"{T:10,} {100 * row[0]:12.0f} {100 * row[1]:9.0f} {100 * row[2]:9.1f}")

# %% [markdown]
# {numref}`fig-batches-packing` draws the padding, and beside it what padding buys: documents that
# stay whole.

# %% mystnb={"figure": {"caption": "Left: share of padding for three ways to fill rows. Right: share of documents that are cut.", "name": "fig-batches-packing"}, "image": {"alt": "Two plots over the length of a row from 32 to 2,048 on a logarithmic axis. Left, padding in percent: one document a row rises from about 15 to over 90; documents in order stay between about 10 and 16; best fit is near zero throughout. Right, documents that are cut: with windows of the stream the share falls from about 75 percent to a few percent, with packing from about 45 percent to nearly zero, always below."}}
figure, (left, right) = plt.subplots(1, 2, sharex=True)
names = ("one a row", "in order", "best fit")
for name, shares in zip(names, zip(*padding, strict=True), strict=True):
    left.semilogx(lengths_of_rows, 100 * np.array(shares), "o-", base=2, label=name)
left.set(xlabel="length of a row, T", ylabel="padding (%)")
left.legend()
right.semilogx(lengths_of_rows, 100 * np.array(cut_by_windows), "o-", base=2, label="windows")
right.semilogx(lengths_of_rows, 100 * np.array(longer), "s-", base=2, label="packed")
right.set(xlabel="length of a row, T", ylabel="documents that are cut (%)")
right.legend()
plt.show()

# %% [markdown]
# ## A sampler without a memory
#
# Everything is in place to make the batch a function of the step. The rows of all training are
# numbered $0, 1, 2, \dots$; step $s$ takes the rows $sB$ to $sB + B - 1$; with $W$ rows an epoch,
# row $i$ is row $i \bmod W$ of epoch $\lfloor i/W \rfloor$, sent through its permutation. An
# epoch may end inside a batch; nothing is dropped or padded there. Three things come for free. To
# **resume**, one number is enough, the next step. When $R$ processes share a batch, the one of
# **rank** $r$ computes the rows $r, r + R, r + 2R, \dots$ of it; together they have the batch that
# one process would have, so a run may continue on another number of machines. And a **worker**
# that prepares batch 7 need not know the batches 0 to 6.
#
# What iterates and resumes does not depend on what a batch holds, so it is a class of its own.
# Its state has the step and the **identity** of the run: the digest of the data, the seed, and the
# size of the batch. Whoever resumes with another corpus gets an error, not a model that has seen
# half of each.


# %%
#| export
class ResumableBatches(Dataset[Batch]):
    """Batches that are functions of the step; a subclass defines ``__getitem__`` and ``identity``.

    Iterating begins at ``step`` and goes on for ever. The state counts the batches that were handed
    out, which are fewer than the workers may have prepared.
    """

    step: int = 0

    def identity(self) -> dict[str, Any]:
        """What must be the same for training to resume."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the next step and the identity: numbers and texts, fit for JSON."""
        return {"step": int(self.step), **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; a ValueError says what is not as it was."""
        self.step = _step_of(state, self.identity())

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batch of ``step``, of the next step, and so on, in this process."""
        while True:
            batch = self[self.step]
            self.step += 1  # before the batch leaves: a state taken while it is used counts it
            yield batch


# %% [markdown] tags=["engine"]
# ### Engine room: states that do not fit are refused, and workers prepare batches

# %% [markdown] tags=["engine"]
# **The state.** It must come from a sampler with the same identity, and its step must leave room: a
# step times a batch size must fit into 64 bits.

# %% tags=["engine"]
#| export
_MOST_STEPS = 1 << 40


def _check_step(step: int) -> None:
    check_at_least(step=(0, step))
    if step is None or step >= _MOST_STEPS:
        raise ValueError(f"step: expected a number below {_MOST_STEPS}, got {step}")


def _step_of(state: dict[str, Any], identity: dict[str, Any]) -> int:
    """Return the step of a ``state`` that agrees with ``identity``, else raise a ValueError."""
    if not isinstance(state, dict):
        raise ValueError(f"state: expected a dictionary, got {state!r}")
    for name in sorted({*identity, *state} - {"step"}, key=str):
        here, there = identity.get(name), state.get(name)
        if here != there:
            raise ValueError(f"state: {name}: expected {here!r}, as it is here, got {there!r}")
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"state: step: expected a whole number from 0 on, got {step!r}")
    if step >= _MOST_STEPS:
        raise ValueError(f"state: step: expected less than {_MOST_STEPS}, got {step}")
    return step


# %% [markdown] tags=["engine"]
# **Workers.** They hold a trap, because they run ahead: while the model is at step 100, they
# prepare step 104. If the state counts what has been *prepared*, a run that resumes skips four
# batches and nobody notices. So the step is counted where a batch is handed out. The workers are
# those of PyTorch's `DataLoader`, which takes any object with `__getitem__`, and the numbers to
# ask it for.


# %% tags=["engine"]
#| export
class ResumableBatches(ResumableBatches):  # continued
    def prefetch(self, workers: int = 1, ahead: int = 2) -> Iterator[Batch]:
        """Like iterating, with ``workers`` processes that prepare ``ahead`` batches each.

        Each process gets a copy of tokens in memory, also of a memory-mapped array; ``TokenShards``
        are opened there anew.
        """
        _check_given(workers=(1, workers), ahead=(1, ahead))
        return _prefetched(self, workers, ahead)


# %% tags=["engine"]
#| export
def _prefetched(batches: ResumableBatches, workers: int, ahead: int) -> Iterator[Batch]:
    loader: DataLoader[Batch] = DataLoader(
        batches,
        batch_size=None,  # an item is a whole batch
        sampler=count(batches.step),
        num_workers=workers,
        prefetch_factor=ahead,
        multiprocessing_context="spawn",
        generator=torch.Generator(),  # it draws a seed for the workers, else from the global one
    )
    with without_main_script():
        prepared = iter(loader)
    for expected, batch in zip(count(batches.step), prepared, strict=False):
        if batches.step != expected:
            raise RuntimeError(f"step: expected {expected}, got {batches.step}: prefetch anew")
        batches.step += 1
        yield batch


# %% [markdown]
# ### Which rows?
#
# The sampler decides which rows to take and says what its batches depend on.


# %%
#| export
@dataclass(eq=False)
class BatchSampler(ResumableBatches):
    """Batches from ``source``: windows of a ring of tokens, or the rows of packed documents.

    A ring may be given as ``TokenShards``, a ``TokenRing``, or a row of ids in memory (an array, a
    tensor, a list). ``batch_size`` counts the rows of all ranks together, of which this one gets
    every ``world_size``-th, from ``rank`` on. Orders: "shuffled", each row once an epoch; "random",
    any row or window, with replacement; "sequential". Windows need a ``context_length``; they have
    position and document ids if ``documents`` is true, packed rows always. With ``wrap`` false no
    window reaches around the end of the ring. ``sampler[step]`` is the batch of any step.
    """

    source: TokenRing | PackedDocuments | np.ndarray | Tensor | Sequence[int]
    batch_size: int
    context_length: int | None = None
    _: KW_ONLY
    order: str = "shuffled"
    documents: bool = False
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    wrap: bool = True

    def __post_init__(self) -> None:
        self.source = _source(self.source)
        _check_sampler(self)

    def __getitem__(self, step: int) -> Batch:
        source, starts = _source(self.source), self._starts(step)
        if isinstance(source, PackedDocuments):
            return source.batch(starts)
        batch = window_batch(source, starts, _context_length(self))
        if not self.documents:
            return batch
        return Batch(*batch[:2], *document_fields(batch.inputs, _end_of_text(source)))


# %% [markdown]
# Step $s$ takes the rows from $sB$ on, of which this rank has every $R$-th:


# %%
#| export
class BatchSampler(BatchSampler):  # continued
    def _starts(self, step: int) -> Int64[np.ndarray, " rows"]:
        rows = step * self.batch_size + np.arange(self.rank, self.batch_size, self.world_size)
        size, wrap = len(self.source), self.wrap
        return _starts_of_rows(rows, size, _unit(self), self.order, self.seed, wrap)

    def identity(self) -> dict[str, Any]:
        """The data, and what decides on the rows; not the rank, nor how many there are."""
        names = ("batch_size", "context_length", "order", "documents", "seed")
        identity = {"source": _source(self.source).fingerprint}
        identity |= {name: getattr(self, name) for name in names}
        return identity if self.wrap else {**identity, "wrap": False}


# %% [markdown] tags=["engine"]
# ### Engine room: what a sampler refuses, and places computed in blocks, for speed

# %% [markdown] tags=["engine"]
# First: what a sampler may draw from, and how long a row is.


# %% tags=["engine"]
#| export
def _source(source: Any) -> TokenRing | PackedDocuments:
    """Return ``source`` as what a sampler draws from; a ValueError if it cannot be that."""
    return (
        source
        if isinstance(source, PackedDocuments)
        else _as_ring(source, "source", " or PackedDocuments")
    )


def _end_of_text(ring: TokenRing) -> int:
    if ring.end_of_text is None:
        raise ValueError("documents: the source must know its end_of_text, got a ring without it")
    return ring.end_of_text


def _context_length(sampler: BatchSampler) -> int:
    source, length = sampler.source, sampler.context_length
    if isinstance(source, PackedDocuments):
        if length not in (None, source.context_length):
            raise ValueError(f"context_length: rows have {source.context_length}, got {length}")
        return source.context_length
    if length is None:
        raise ValueError("context_length: expected a number of tokens for windows, got None")
    check_at_least(context_length=(1, length))
    return length


def _unit(sampler: BatchSampler) -> int:
    """How far apart rows begin in the source: a context length of tokens, or one packed row."""
    return 1 if isinstance(sampler.source, PackedDocuments) else _context_length(sampler)


# %% [markdown] tags=["engine"]
# All settings are checked when the sampler is made, not when the first batch is.

# %% tags=["engine"]
#| export
_ORDERS = ("shuffled", "random", "sequential")


def _check_sampler(sampler: BatchSampler) -> None:
    source, order = _source(sampler.source), sampler.order
    if order not in _ORDERS:
        raise ValueError(f"order: expected one of {_ORDERS}, got {order!r}")
    for name in ("documents", "wrap"):
        if not isinstance(getattr(sampler, name), bool | np.bool_):
            expected = "expected True or False"
            raise ValueError(f"{name}: {expected}, got {getattr(sampler, name)!r:.60}")
    sampler.context_length = int(_context_length(sampler))
    is_packed = isinstance(source, PackedDocuments)
    sampler.documents = bool(sampler.documents or is_packed)
    sampler.wrap = bool(sampler.wrap or is_packed)  # packed rows never reach around
    if sampler.documents and isinstance(source, TokenRing):
        _end_of_text(source)
    for name, least in {"batch_size": 1, "world_size": 1, "rank": 0, "seed": 0}.items():
        value = getattr(sampler, name)
        if value is None:
            raise ValueError(f"{name}: expected a whole number, got None")
        check_at_least(**{name: (least, value)})
        setattr(sampler, name, int(value))  # NumPy's integers are not fit for JSON
    _check_sizes(sampler, len(source))


# %% tags=["engine"]
#| export
def _check_sizes(sampler: BatchSampler, size: int) -> None:
    if sampler.seed >= 1 << 64:
        raise ValueError(f"seed: expected at most 64 bits, got {sampler.seed}")
    if sampler.batch_size > 1 << 22:
        raise ValueError(f"batch_size: expected at most {1 << 22}, got {sampler.batch_size}")
    if sampler.rank >= sampler.world_size or sampler.batch_size % sampler.world_size:
        ranks = f"rank {sampler.rank} of {sampler.world_size}"
        raise ValueError(f"batch_size: cannot share {sampler.batch_size} rows out for {ranks}")
    if _unit(sampler) > size - (not sampler.wrap):
        fewer = "at most" if sampler.wrap else "less than"
        wanted = f"expected {fewer} the {size} tokens that there are"
        raise ValueError(f"context_length: {wanted}, got {sampler.context_length}")


# %% [markdown] tags=["engine"]
# **Places remembered.** Hashing a few thousand numbers takes hardly longer than hashing sixteen. So
# the places of 4,096 rows are computed at once and remembered.

# %% tags=["engine"]
#| export
_BLOCK = 4096


@lru_cache(maxsize=16)
def _block_of_places(
    block: int, size: int, unit: int, order: str, seed: int, wrap: bool
) -> Int64[np.ndarray, " rows"]:
    """Return where the rows of a ``block`` of 4,096 begin."""
    return _starts_of_rows(block * _BLOCK + np.arange(_BLOCK), size, unit, order, seed, wrap)


class BatchSampler(BatchSampler):  # continued
    def _starts(self, step: int) -> Int64[np.ndarray, " rows"]:
        _check_step(step)
        rows = int(step) * self.batch_size + np.arange(self.rank, self.batch_size, self.world_size)
        blocks, within = np.divmod(rows, _BLOCK)
        how = len(self.source), _unit(self), self.order, self.seed, self.wrap
        touched = range(int(blocks[0]), int(blocks[-1]) + 1)
        return np.concatenate([_block_of_places(b, *how)[within[blocks == b]] for b in touched])


# %% [markdown]
# ### What a batch looks like
#
# {numref}`fig-batches-drawn` shows rows of each kind, with a color for each document.

# %%
kinds = {
    "windows": BatchSampler(shards, 8, 256, documents=True, seed=1),
    "best fit": BatchSampler(pack_documents(shards, 256), 8, seed=1),
    "one a row": BatchSampler(pack_documents(shards, 256, "one_per_row"), 8, seed=1),
}
for name, sampler in kinds.items():
    rows, length = sampler[0].inputs.shape
    counted = np.mean([(sampler[step].targets != -100).float().mean() for step in range(50)])
    print(f"{name:10} {rows} rows of {length}, of 100 targets {100 * counted:3.0f} count")

# %% mystnb={"figure": {"caption": "Eight rows of each kind; a color for each document, a mark where one begins, white for padding. In best fit, a color without a mark is a piece of a document longer than a row.", "name": "fig-batches-drawn"}, "image": {"alt": "Three grids of 8 rows by 256 positions. Windows: bands of color fill every row; at the left edge they have no mark, because the window begins inside a document. Best fit: nearly every cell is filled, and most bands begin with a mark; the others are pieces of documents longer than a row. One a row: a single band at the left of each row, and white to its right."}}
figure, axes = plt.subplots(1, 3, figsize=(7, 2.4), sharey=True)
for ax, (title, sampler) in zip(axes, kinds.items(), strict=True):
    batch = sampler[0]
    numbers = np.ma.masked_equal(batch.document_ids.numpy(), -1)
    ax.imshow(numbers % 6, cmap="Set2", aspect="auto", vmin=0, vmax=7, interpolation="nearest")
    opens = (batch.inputs == end_id) & (batch.document_ids >= 0)
    row, column = np.nonzero(opens.numpy())
    ax.plot(column, row, "|", color="black", markersize=9)
    ax.set(title=title, xlabel="position", xticks=(0, 128, 256))
    ax.grid(False)
axes[0].set_ylabel("row")
plt.show()

# %% [markdown]
# ### Does it resume?
#
# We stop after seven batches, write the state down as JSON, and go on with a new sampler in one
# process, with two workers, and as two ranks. All must see the batches that an unbroken run sees.
# We take the classes from the package, as worker processes cannot import from a notebook;
# `prefetch`, from the room above, prepares batches in workers.

# %%
import json

from llmbook import batches as exported

shards = exported.TokenShards(folder / "train")
whole = exported.BatchSampler(shards, 8, 64, seed=3)
stopped = exported.BatchSampler(shards, 8, 64, seed=3)
for _ in zip(range(7), stopped, strict=False):
    pass
written = json.dumps(stopped.state_dict())
print(f"the next step is {stopped.step}; written down:")
print(written.replace(shards.fingerprint, "(digest of the last shard)"))

# %% [markdown]
# The three ways to go on, and for each how many of the next five batches are those of the unbroken
# run:

# %%
resumed = exported.BatchSampler(shards, 8, 64, seed=3)
for name, batches in (("one process", resumed), ("two workers", resumed.prefetch(workers=2))):
    resumed.load_state_dict(json.loads(written))
    pairs = zip(range(7, 12), batches, strict=False)
    same = sum(torch.equal(batch.inputs, whole[step].inputs) for step, batch in pairs)
    print(f"{name}: {same} of 5 batches are the same, next step {resumed.step}")
ranks = [exported.BatchSampler(shards, 8, 64, seed=3, rank=r, world_size=2) for r in (0, 1)]
steps = range(7, 12)
together = [torch.stack([rank[s].inputs for rank in ranks], 1).flatten(0, 1) for s in steps]
same = sum(torch.equal(both, whole[s].inputs) for s, both in zip(steps, together, strict=True))
print(f"two ranks:   {same} of 5 batches are the same")

# %% [markdown]
# Tokens in memory are a source like any other. What nanoGPT calls `get_batch` is a sampler in
# random order whose windows do not wrap around; unlike it, this one resumes:

# %%
in_memory = exported.BatchSampler(np.arange(100), 32, 7, order="random", wrap=False)
inputs = in_memory[0].inputs
print(f"{len(inputs)} windows of {inputs.size(1)} ids from {inputs.min()} to {inputs.max()}")
print("its state:", ", ".join(in_memory.state_dict()))

# %% [markdown]
# ## Is it the real thing?
#
# **nanoGPT** {cite}`karpathy2022nanogpt` reads a bare file of 16-bit ids with the lines below,
# here without the transfer to a GPU. Given the same positions, we must make the same batch:

# %%
(folder / "train.bin").write_bytes(shards[:].astype(np.uint16).tobytes())
data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
ix = torch.randint(len(data) - 64, (8,))
x = torch.stack([torch.from_numpy((data[i : i + 64]).astype(np.int64)) for i in ix])
y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + 64]).astype(np.int64)) for i in ix])
ours = exported.window_batch(shards, ix.tolist(), 64)
assert torch.equal(x, ours.inputs) and torch.equal(y, ours.targets)
print(f"nanoGPT: {x.numel() + y.numel():,} of {2 * x.numel():,} ids are the same")

# %% [markdown]
# **Hugging Face** examples prepare text for pretraining by a function `group_texts` that
# concatenates all documents and cuts blocks. Our sequential order gives the same blocks:

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would like a widget for its progress
    import datasets
datasets.disable_progress_bars()


def group_texts(examples: dict[str, list]) -> dict[str, list]:
    concatenated = [token for ids in examples["input_ids"] for token in ids]
    total = len(concatenated) // 64 * 64
    return {"input_ids": [concatenated[i : i + 64] for i in range(0, total, 64)]}


few = exported.write_shards([ids[:-1] for ids in encoded[:1000]], folder / "few", tokenizer)
theirs = datasets.Dataset.from_dict({"input_ids": encoded[:1000]})
theirs = theirs.map(group_texts, batched=True, batch_size=None)["input_ids"]
in_turn = exported.BatchSampler(few, len(theirs), 64, order="sequential")
assert in_turn[0].inputs.tolist() == list(theirs)
print(f"datasets: all blocks of 64 ids are the same, more than {len(theirs) // 100 * 100:,}")

# %% [markdown]
# **FlexAttention**, PyTorch's compiler for attention masks, takes a document mask as a function
# of positions. The same mask comes out:

# %%
from torch.nn.attention.flex_attention import create_mask

ids = kinds["best fit"][0].document_ids


def same_document(batch, head, q, k):
    return (ids[batch, q] == ids[batch, k]) & (q >= k)


flex = create_mask(same_document, 8, 1, 256, 256, device="cpu")
assert torch.equal(flex, document_mask(ids))
print(f"FlexAttention: all {flex.numel():,} entries of the mask are the same")

# %% [markdown]
# ## How fast is it?
#
# Against what many projects use, a `DataLoader` that shuffles a data set of windows and collates
# them, and against the list of the beginning; for batches of 16 rows of 256. The question is
# whether a model ever has to wait, so we also time one that learns: a Transformer of some
# 660,000 parameters, on this machine.

# %%
import time


class WindowDataset(Dataset):
    def __len__(self) -> int:
        return (len(data) - 1) // 256

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(data[256 * i : 256 * i + 257].astype(np.int64))
        return window[:-1], window[1:]


usual = iter(DataLoader(WindowDataset(), batch_size=16, shuffle=True))
packed = exported.pack_documents(shards, 256)
loaders = {
    "DataLoader": lambda step: next(usual),
    "list": lambda step: get_batch(tokens, rng.integers(len(tokens) - 257, size=16), 256),
    "windows": exported.BatchSampler(shards, 16, 256).__getitem__,
    "packed": exported.BatchSampler(packed, 16).__getitem__,
}

# %% [markdown]
# Each makes 150 batches. Ours also shuffle without a table and can start anywhere. Packed rows cost
# more than windows: each is put together from several documents, and has four fields.

# %%
rates = {}
for name, loader in loaders.items():
    start = time.perf_counter()
    for step in range(150):
        loader(step)
    rates[name] = 150 * 16 * 256 / (time.perf_counter() - start)

# %% [markdown]
# And the model, five steps forward and backward:

# %% tags=["nbval-ignore-output"]
layer = torch.nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
body = torch.nn.TransformerEncoder(layer, 2)
table = torch.nn.Embedding(shards.vocab_size, 128)
causal = torch.nn.Transformer.generate_square_subsequent_mask(256)
batch, start = loaders["windows"](0), time.perf_counter()
for _ in range(5):
    logits = body(table(batch.inputs), mask=causal, is_causal=True) @ table.weight.T
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
model = 5 * 16 * 256 / (time.perf_counter() - start)
ratio = min(rates.values()) / model
print(f"the model learns {model:,.0f} tokens a second;", end=" ")
print(f"the slowest loader makes {ratio:,.0f} times as many")
for name, rate in rates.items():
    ratio = rate / rates["DataLoader"]
    print(f"{name:10} {rate / 1e6:5.1f} million tokens a second, {ratio:.1f} times DataLoader")

# %% [markdown]
# Even the slowest loader is hundreds of times faster than this model, which never waits. A GPU that
# learns millions of tokens a second would, and there `prefetch` helps.
#
# ## From raw text to batches
#
# The first part of the book in ten lines, here on three modules of the standard library. With the
# whole standard library, NumPy and Matplotlib together, some 33,000 documents, the same lines take
# less than a minute.

# %%
from llmbook.batches import BatchSampler, pack_documents, write_shards

documents = clean_documents(read_installed_docs(["argparse", "email", "json"]))
unique = deduplicate(documents)
tokenizer = train_bpe((document.text for document in unique), 512)
shards = write_shards(unique, folder / "pipeline", tokenizer)
sampler = BatchSampler(pack_documents(shards, 128), batch_size=16, seed=0)
for batch in sampler:
    print(f"{len(batch.inputs)} rows of {batch.inputs.size(1)} tokens, next step: {sampler.step}")
    break

# %% [markdown]
# ## Exercises
#
# ````{exercise} Until everything has been read
# :label: ex-batches-missed
# *Ten minutes.* With random windows, how many rows does it take until a given `share` of all
# tokens has been a target, in expectation? Solve {eq}`batches-missed` for the number of rows and
# write `rows_until_seen(share, n_tokens, context_length)`, rounded up. How many epochs' worth is
# it for 99 %?
# ````


# %% tags=["solution"]
def rows_until_seen(share: float, n_tokens: int, context_length: int) -> int:
    """Return the least number of random windows after which ``share`` is seen, in expectation."""
    # (1 - T/n)^rows <= 1 - share. For 99 %, about ln 100 = 4.6 epochs' worth.
    missed_by_one = math.log1p(-context_length / n_tokens)
    return math.ceil(math.log1p(-share) / missed_by_one)


# %% tags=["check"]
generator = np.random.default_rng(0)
for share, n_tokens, context_length in ((0.5, 4000, 16), (0.99, 3000, 30), (0.9, 50, 25)):
    needed = rows_until_seen(share, n_tokens, context_length)
    assert isinstance(needed, int), f"{needed}: rows are counted in whole numbers"
    enough, fewer = (1 - (1 - context_length / n_tokens) ** drawn for drawn in (needed, needed - 1))
    assert enough >= share, f"too few: after {needed} rows {enough:.4f} of the tokens are seen"
    assert fewer < share, f"not the least: after {needed - 1} rows {fewer:.4f} are seen already"
    seen = np.zeros((200, n_tokens), bool)
    for trial in seen:
        starts = generator.integers(n_tokens, size=needed)
        trial[(starts[:, None] + np.arange(context_length)) % n_tokens] = True
    assert seen.mean() > share - 0.02, f"a simulation sees {seen.mean():.2f}, not {share}"

# %% [markdown]
# ````{exercise} How much does a prediction see?
# :label: ex-batches-context
# *Fifteen minutes.* The first tokens of a document are predicted from little. Write
# `mean_context(batch)`: the number of inputs that a prediction may attend to, its own included,
# as a mean over all targets that count. A batch without document ids has the causal mask. Compare
# windows and packed rows for the corpus of this chapter: what is lost by the mask, and what would
# longer rows gain?
# ````


# %% tags=["solution"]
def mean_context(batch: Batch) -> float:
    """Return how many inputs a prediction may attend to on average."""
    # In rows of 256, 128.5 without documents, about 76 in windows and 79 in packed rows: the mask
    # takes away what was another document's. In rows of 1,024, of 512.5 about 164 and 186 remain:
    # longer rows gain little where documents are short.
    ids = batch.document_ids
    mask = document_mask(torch.zeros_like(batch.inputs) if ids is None else ids)
    return mask.sum(dim=-1)[:, 0][batch.targets != -100].float().mean().item()


# %% tags=["check"]
T = 64
plain = BatchSampler(shards, 8, T)[0]
causal = mean_context(plain)
assert abs(causal - (T + 1) / 2) < 1e-4, "causal: 1, 2, ..., T inputs, its own place included"
two = Batch(
    torch.zeros(1, 6, dtype=torch.long),
    torch.tensor([[1, 1, 1, 1, 1, 1]]),
    torch.tensor([[0, 1, 2, 0, 1, 2]]),
    torch.tensor([[0, 0, 0, 1, 1, 1]]),
)
assert abs(mean_context(two) - 2) < 1e-6, "a prediction sees its own document only"
by_document = two._replace(
    targets=torch.tensor([[1, 1, 1, 1, 1, -100]]), document_ids=torch.tensor([[0, 0, 0, 1, 1, -1]])
)
expected = "places without a target do not count: here 1 + 2 + 3 and 1 + 2 of 5 predictions"
assert abs(mean_context(by_document) - 9 / 5) < 1e-6, expected
uneven = Batch(*(torch.cat([field, field]) for field in by_document))
uneven.targets[1, 3:] = -100
assert abs(mean_context(uneven) - 15 / 8) < 1e-6, "the mean is over all targets, not over rows"

# %% [markdown]
# ````{exercise} Mix two sources
# :label: ex-batches-mixture
# *Half an hour.* Code and prose shall be mixed: a share $p$ of all rows from source 0, the rest
# from source 1, evenly spread. The obvious program counts how many rows each source has given,
# and has a state again. Write `mixed_row(row, share)`, which returns the source of row number
# `row` and the row's number within that source, without a loop: among the first $i$ rows, exactly
# $\lfloor ip \rfloor$ shall come from source 0. The share is a `Fraction`; why not a float?
# ````


# %% tags=["solution"]
def mixed_row(row: int, share: Fraction) -> tuple[int, int]:
    """Return the source (0 or 1) of a row, and the row's number within it."""
    # A float has 53 bits: row * share is wrong by whole rows once the row number is large enough.
    before, after = math.floor(row * share), math.floor((row + 1) * share)
    return (0, before) if after > before else (1, row - before)


# %% tags=["check"]
for share in (Fraction(1, 2), Fraction(3, 10), Fraction(2, 3), Fraction(0), Fraction(1)):
    given = [0, 0]
    for row in range(300):
        source, number = mixed_row(row, share)
        already = f"source {source} has given {given[source]} rows before"
        assert number == given[source], f"row {row} is number {number} of its source, but {already}"
        given[source] += 1
        expected = math.floor((row + 1) * share)
        so_far = f"of the first {row + 1} rows with a share of {share}"
        assert given[0] == expected, f"{so_far}, {expected} are from source 0, not {given[0]}"
for far, answer in ((10**17 + 1, (1, 9 * 10**16 + 1)), (10**17 + 9, (0, 10**16))):
    found = mixed_row(far, Fraction(1, 10))
    assert found == answer, f"not exact far from the start: row {far:,} is {answer}, not {found}"

# %% [markdown]
# ````{exercise} Read another program's shards
# :label: ex-batches-llmc
# *Half an hour.* llm.c {cite}`karpathy2024llmc` has shards of its own: a header of 256 32-bit
# numbers, little endian, of which the first three are the magic number 20240520, the version 1,
# and the number of tokens; then the tokens, 16 bits each. Write `read_llmc(path)`, which maps
# such a file and returns a `TokenRing`. It raises a `ShardError` that names the file if the magic
# number, the version or the length is wrong. Which faults of this chapter's list can it not find?
# ````


# %% tags=["solution"]
def read_llmc(path: Path) -> TokenRing:
    """Return the tokens of a shard of llm.c, memory-mapped."""
    # It cannot find a changed bit in a token, a shard that is missing, or another tokenizer's ids.
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256 or header[0] != 20240520:
        raise ShardError(f"{path}: not a shard of llm.c")
    if header[1] != 1:
        raise ShardError(f"{path}: expected version 1, got {header[1]}")
    if path.stat().st_size != 1024 + 2 * int(header[2]):
        raise ShardError(f"{path}: expected {header[2]} tokens: truncated or damaged")
    return TokenRing([np.memmap(path, "<u2", "r", 1024)])


# %% tags=["check"]
def llmc_answer(magic: int, version: int, n_tokens: int, tokens: list[int], size: int = 9999):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, n_tokens
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        path = Path(place) / "llmc.bin"
        path.write_bytes((header.tobytes() + np.array(tokens, "<u2").tobytes())[:size])
        try:
            return read_llmc(path)[:].tolist()
        except ShardError as error:
            assert "llmc.bin" in str(error), f"the error does not name the file: {error}"
            return "a ShardError"
        except Exception as error:
            return f"{type(error).__name__}: {error}"


good = llmc_answer(20240520, 1, 4, [50256, 7, 65535, 9])
assert good == [50256, 7, 65535, 9], f"unsigned 16-bit numbers after 1,024 bytes, not {good}"
for reason, fields in {
    "the magic number is that of another format": (20240801, 1, 4, [1, 2, 3, 4]),
    "version 2": (20240520, 2, 4, [1, 2, 3, 4]),
    "a token is missing": (20240520, 1, 4, [1, 2, 3]),
    "there is a token too many": (20240520, 1, 4, [1, 2, 3, 4, 5]),
    "the header is cut off": (20240520, 1, 0, [], 100),
}.items():
    found = llmc_answer(*fields)
    assert found == "a ShardError", f"{reason}: expected a ShardError, got {found}"

# %% tags=["remove-cell"]
shutil.rmtree(folder, ignore_errors=True)

# %% [markdown]
# ## Summary
#
# A row is a window of $T + 1$ tokens: $T$ inputs, and as targets the same shifted by one. Shards
# keep ids in 16 or 32 bits, memory-mapped, behind a header whose digests form a chain; they
# appear whole or not at all. Closed to a ring, $n$ tokens give $n$ predictions. Random windows
# miss a share of $1/e$ in one epoch's worth of rows; shuffled windows miss nothing. A hash of the
# row's number replaces the state of a generator, and a Feistel network the table of a
# permutation, so any batch of any rank can be made at any time, and the state of the sampler is
# one number. End of text opens a document as an input and ends it as a target; the document mask
# keeps attention inside, and best fit packs whole documents with almost no padding.
#
# **Checklist: filling rows.**
#
# - Documents much longer than a row: windows. Cuts are unavoidable, and padding is nil.
# - Many documents shorter than a row: packed rows, with mask and position ids.
# - Few documents, or exact probabilities wanted: one a row, and accept the padding.
# - Shuffled order to train, sequential to evaluate; random only where the corpus is far larger than
#   what will be read of it.
# - Verify checksums after every copy. Keep the sampler's state in the same file as the model's.
# - Stop a run on purpose once, resume it, and compare the batches.
#
# **Further reading.** Ding and colleagues {cite}`ding2024fewer` on packing, Zhao and colleagues
# {cite}`zhao2024analysing` on masks, Salmon and colleagues {cite}`salmon2011parallel` on
# counter-based generators. Next, {doc}`08_positions` turns the ids into vectors, and their
# positions, too.
