# %% [markdown]
# # Many devices
#
# > Run on many processes what runs on one: the same gradients, the same tokens, and nothing lost
# > when a process dies.
#
# Text outgrows one process just as models do. This part of the chapter prepares the text of the
# earlier chapters on several processes, and shows that neither their number nor their death changes
# a byte of the result.
#
# | | |
# |---|---|
# | **Part** | III. Pretraining |
# | **You build** | {py:func}`~llmbook.distributed.map_reduce`, {py:func}`~llmbook.distributed.band_keys`, {py:class}`~llmbook.distributed.RayEngine`, {py:func}`~llmbook.distributed.prepare` |
# | **You need** | cleaning ({doc}`03_cleaning`), near-duplicates ({doc}`04_deduplication`), word counts ({doc}`05_tokenizer`), shards ({doc}`07_batches`) |
# | **It takes** | 10 minutes for the main line, 40 minutes for everything, 30 seconds to run |

# %% tags=["remove-cell"]
#| default_exp distributed

# %% tags=["engine"]
#| export
# The imports of the module
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import UInt32, UInt64

# %% [markdown]
# ## The data pipeline on an engine
#
# Chapters 02 to 05 read, clean, and deduplicate text and count its words for a tokenizer;
# chapter 07 writes its tokens to shards. For the 33,000 documents of three packages, one process
# needs a minute. For a crawl of the web it would need years, so the work is divided among processes
# that are fast or slow as they please and now and then die. The result should show none of this:
# **the same bytes as from one process.**
#
# Most steps are easy to divide, because they look at one document at a time. Three look at
# documents that may lie anywhere: at a line that another document has, at a near copy, and at a
# word that occurs in both. What these documents have in common is a **key**: the line, a band of
# the MinHash signature, the word. If everything with the same key goes to one process, this process
# sees all that it needs.

# %% tags=["engine"]
#| export
# What it takes from earlier chapters
from llmbook.cleaning import gopher_quality, mask_pii, normalize_text, remove_license
from llmbook.cleaning import remove_repeated_lines
from llmbook.corpus import Document, ReadReport, existing_paths, read_files, read_installed_docs
from llmbook.corpus import iter_texts, read_jsonl, write_jsonl
from llmbook.batches import TokenShards, write_shards
from llmbook.deduplication import MinHasher, UnionFind, canonical_text, jaccard, optimal_bands
from llmbook.deduplication import shingles
from llmbook.environment import check_at_least, check_choice, check_fraction, check_path, check_text
from llmbook.environment import check_whole, requires_extra, whole_file
from llmbook.tokenizer import GPT2_PATTERN, GPT4_PATTERN, BPETokenizer, count_words, learn_merges
from llmbook.training import settings_parser

# %% [markdown]
# So two functions describe a step. `emit` looks at one part of the data and yields values, each
# with the number of the box that it is meant for; `reduce` looks at all values of one box. Moving
# them there, the *shuffle*, is the only communication. This is MapReduce
# {cite}`dean2008mapreduce`, and in one process it takes five lines:


# %%
#| export
def map_reduce(
    items: Iterable[Any],
    emit: Callable[[Any], Iterable[tuple[int, Any]]],
    reduce: Callable[[int, list[Any]], Iterable[Any]],
) -> list[Any]:
    """Call ``emit`` on each item, ``reduce`` on each box of values. Dean and Ghemawat (2008)."""
    boxes: dict[int, list[Any]] = defaultdict(list)
    for item in items:
        for box, value in emit(item):
            boxes[box].append(value)
    return [result for box, values in boxes.items() for result in reduce(box, values)]


# %% [markdown]
# A key must belong to the same box in every process. Python's `hash` of a text starts from a random
# number in each process ({doc}`00_environment`), so a pipeline that uses it runs without an error
# and finds hardly any copies. We hash by BLAKE2 instead and call the result, a whole number $h$
# below $2^{64}$, the *place* of a text. Of $n$ boxes, its box is $\lfloor hn / 2^{64} \rfloor$.


# %% tags=["engine"]
#| export
# The place of a text, and its box
def stable_hash(text: str) -> int:
    """Return a whole number from 0 below 2**64 that is the same for ``text`` in every process.

    >>> stable_hash("Dough rises.")
    4481164271127257053
    """
    return int.from_bytes(blake2b(check_text(text).encode(), digest_size=8).digest(), "big")


def box_of(place: int, n_boxes: int) -> int:
    """Return the box of a ``place`` below 2**64: places in order fill ``n_boxes`` in order.

    >>> [box_of(place, 4) for place in (0, 2**62, 2**63, 2**64 - 1)]
    [0, 1, 2, 3]
    """
    check_whole("place", place, 0, 2**64 - 1)
    check_whole("n_boxes", n_boxes, 1)
    return int(place) * n_boxes >> 64


# %% [markdown]
# For near-duplicates, the hash of a band's number and its rows is the key
# ({doc}`04_deduplication`). Two documents that agree in a band meet in its box, whichever parts
# they came from:


# %% tags=["engine"]
#| export
# The keys of the bands
def band_keys(
    signatures: UInt32[np.ndarray, "documents permutations"], bands: int, rows: int
) -> UInt64[np.ndarray, "documents bands"]:
    """Return one key for each band of each document: equal ones agree in all rows of that band.

    Source: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.
    """
    check_whole("bands", bands, 1)
    check_whole("rows", rows, 1)
    if signatures.shape[1] < bands * rows:
        most = f"at most {signatures.shape[1]} permutations"
        raise ValueError(f"bands, rows: expected {most} in all, got {bands} times {rows}")
    cut = np.ascontiguousarray(signatures[:, : bands * rows], "<u4").reshape(-1, bands, rows)
    keys = [[stable_hash(f"{b} {row.tobytes().hex()}") for b, row in enumerate(d)] for d in cut]
    return np.array(keys, np.uint64).reshape(len(signatures), bands)


# %%
parts = [
    {"a1": "Mix the flour with water and salt, wait for an hour, then bake it.", "a2": "Yeast."},
    {"b1": "Let it rest.", "b2": "Mix the flour with water and salt, wait for an hour, then bake."},
]


def emit(part):
    signatures = MinHasher(n=3).signatures(part.values())
    for name, keys in zip(part, band_keys(signatures, 32, 4).tolist(), strict=True):
        yield from ((box_of(key, 8), (key, name)) for key in keys)


def meet(box, values):
    for key in {key for key, _ in values}:
        yield from combinations(sorted(name for k, name in values if k == key), 2)


print(set(map_reduce(parts, emit, meet)))

# %% [markdown]
# The two recipes lie in different parts, and neither part has seen the other. The rest is as in
# chapter 04: the candidates' texts go to a box once more, which computes their similarity;
# union-find joins the similar ones, and the longest of each cluster stays. All steps have this
# form:
#
# | step | looks at | key | leaves behind |
# |---|---|---|---|
# | read | a file or a package | the document's id | documents in boxes |
# | normalize | a box | each line | the first owner of each repeated line |
# | clean | a box | band keys | candidate pairs |
# | compare | candidates | the pair's first id | similar pairs, hence survivors |
# | unique | a box of survivors | the word | word counts, hence merges |
# | encode | a box of survivors | none | token ids, hence shards |
#
# ### Order, and a worker that dies
#
# An engine promises less than a loop does. Ray Data keeps neither the order of rows nor the sizes
# of batches, unless one pays for it in speed. A task whose process died is run again, so its first
# half may run twice. Under these conditions, a step gives the same bytes if it obeys three rules:
#
# 1. **Nothing depends on the order of arrival.** `reduce` sorts. *First* means first by place, and
#    the corpus is ordered by place: a shuffle of the documents that training wants anyway, and that
#    does not depend on the number of boxes.
# 2. **A file has one name and appears whole.** A task renames its draft to the name of its box. If
#    it dies before, nothing is there; if it runs twice, the second file is equal to the first. So a
#    preparation that was stopped also goes on where it was.
# 3. **Emitting changes nothing else.** The values of a failed attempt can then be thrown away.
#
# To see that the rules suffice, we run the steps in order on one engine, and on another that is as
# bad as it may be: `chaos` takes items and values in random order, and lets every third item die
# after its first value and start again.

# %% tags=["engine"]
# The worst engine that is still allowed
import random

dice = random.Random(0)


def chaos(items, emit, reduce):
    boxes, items = defaultdict(list), list(items)
    for number, item in enumerate(dice.sample(items, len(items))):
        if number % 3 == 0:
            next(iter(emit(item)), None)  # dies after its first value
        for box, value in emit(item):
            boxes[box].append(value)
    return [r for box in boxes for r in reduce(box, dice.sample(boxes[box], len(boxes[box])))]


# %%
from llmbook.distributed import PrepareConfig, prepare

folder = Path(tempfile.mkdtemp())
sources = ["package:asyncio", "package:email"]
tidy = prepare(sources, folder / "tidy", PrepareConfig(vocab_size=600, n_boxes=4))
prepare(sources, folder / "messy", PrepareConfig(vocab_size=600, n_boxes=7), engine=chaos)
files = [path.relative_to(tidy.folder) for path in tidy.folder.glob("*/shard-*.bin")]
same = [(tidy.folder / p).read_bytes() == (folder / "messy" / p).read_bytes() for p in files]
print(f"{sum(same)} of {len(same)} files of tokens are equal to the byte")
assert len(same) == 2 and all(same)

# %% [markdown]
# ### The same steps on Ray
#
# Ray {cite}`moritz2018ray` starts worker processes on one machine or on many, moves data between
# them, and runs again what died. Its library Ray Data has our engine in three calls:
#
# ```python
# data = ray.data.from_items(items).flat_map(emit)
# data.groupby("box").map_groups(reduce).take_all()
# ```
#
# {py:class}`~llmbook.distributed.RayEngine` adds a quiet start and errors that name step, item, and
# machine. With the extra `cluster`, one command runs everything:
#
# ```
# python -m llmbook.distributed prepare --packages stdlib numpy matplotlib --workers 2
# ```
#
# Ray took 18 to 200 seconds to start on our two busy cores, so the chapter does not start it; the
# tests do. They prepare a small corpus on two workers, and again while one worker is killed as it
# reads and another as it cleans. Ray ran the tasks of the dead once more, and all files were equal
# to the byte to those of one process: nothing was lost and nothing doubled. For
# the documentation of three packages, `python benchmarks/prepare.py` found 19 of 19 files equal, and
# took so many seconds:
#
# | step | documents | one process | Ray, 2 workers |
# |---|--:|--:|--:|
# | read | 33,301 | 53 | 57 |
# | normalize | 33,215 | 8 | 5 |
# | clean | 24,941 | 50 | 21 |
# | unique | 24,821 | 8 | 5 |
# | encode | 24,821 | 10 | 4 |
# | all | | 147 | 98 |
#
# Reading gained nothing, because a package is not divided and one is larger than the others.

# %% [markdown] tags=["engine"]
# ### Engine room: files that appear once, and errors that name step, item and machine

# %% [markdown] tags=["engine"]
# A box of documents is a file of JSON Lines, sorted by place. What is there is read and not made
# again; this is all that resuming takes. An empty box is an empty file, so that a missing one
# always means work to be done.


# %% tags=["engine"]
#| export
# Boxes of documents as files
def _path(folder: str, step: str, box: int, suffix: str = "jsonl") -> Path:
    return Path(folder, step, f"box-{box:05d}.{suffix}")


def _in_box(path: Path) -> list[Document]:
    return list(read_jsonl(path, errors="strict")) if path.stat().st_size else []


def _by_place(id: str) -> tuple[int, str]:
    return stable_hash(id), id


def _once(path: Path, make: Callable[[], Iterable[Document]]) -> list[Document]:
    """Return the documents in a file; where it is missing, make and write them, in order."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if documents := sorted(make(), key=lambda document: _by_place(document.id)):
            write_jsonl(documents, path)
        else:
            with whole_file(path) as draft:
                draft.touch()
    return _in_box(path)


def _size(documents: Collection[Document]) -> dict[str, int]:
    """What a step reports of a box, among the values that it returns."""
    return {"documents": len(documents), "characters": sum(len(d.text) for d in documents)}


# %% [markdown] tags=["engine"]
# An error in a worker has to say where it happened: a file that lies on one machine and not on
# another is found there only.


# %% tags=["engine"]
#| export
# Errors of a step
class StepError(ValueError):
    """A step of a preparation failed; the message names the step, what it worked at, and where."""


def _emitting(item: Any, step: str, emit: Callable[[Any], Iterable[Any]]) -> Iterator[Any]:
    try:
        yield from emit(item)
    except (OSError, ValueError) as error:
        raise _failure(step, item if isinstance(item, str) else f"box {item}", error) from error


def _reducing(
    box: int, values: list[Any], step: str, reduce: Callable[[int, list[Any]], Iterable[Any]]
) -> Iterator[Any]:
    try:
        yield from reduce(box, values)
    except (OSError, ValueError) as error:
        raise _failure(step, f"box {box}", error) from error


def _failure(step: str, where: str, error: Exception) -> StepError:
    return StepError(f"{step}: {where}: {error} (on the machine {platform.node()})")


# %% [markdown]
# ### Steps of one document

# %% [markdown] tags=["engine"]
# ### Engine room: reading files and packages into boxes

# %% [markdown] tags=["engine"]
# A source is a package, a file, or a folder, whose files are found before the work is divided. The
# id of a file's document is its path from the folder, as `read_files` has it. The same file named
# twice is read once; two texts with one id are refused. What cannot be read is counted and told.

# %% tags=["engine"]
#| export
# Which sources there are
_PACKAGE = "package:"


def _listed(sources: Iterable[str | Path]) -> list[tuple[str, str, str]]:
    """Return (source, what its ids begin with, fingerprint) of all packages and files, in order."""
    if isinstance(sources, str | Path) or not (asked := list(sources)):
        raise ValueError(f"sources: expected several, got {sources!r:.60}")
    found: dict[str, tuple[str, str]] = {}
    for source in asked:
        if str(source).startswith(_PACKAGE):
            name = str(source).removeprefix(_PACKAGE)
            read_installed_docs(name)  # complains of an unknown name; nothing is read yet
            found[str(source)] = ("", _version(name))
        else:
            (given,) = existing_paths(source)
            for path, prefix in _files(given.resolve()):
                about = path.stat()
                found[str(path)] = (prefix, f"{about.st_size} bytes, {about.st_mtime_ns}")
    if not found:
        raise ValueError(f"sources: expected files of text, got {[str(s) for s in asked]}")
    return [(source, *found[source]) for source in sorted(found)]


# %% tags=["engine"]
#| export
def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that can be read at or under ``path``, and the folders between."""
    if not path.is_dir():
        read_files(path)  # complains of a suffix that it does not know
        yield path, ""
        return
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            with suppress(ValueError):
                read_files(file)
                yield file, "".join(f"{part}/" for part in inside.parts[:-1])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # the standard library, or a module of another name
        return platform.python_version()


# %% tags=["engine"]
#| export
# Read
def _read(source: str, prefixes: Mapping[str, str], n_boxes: int) -> Iterator[tuple[int, Any]]:
    """Yield the documents of a source, and what could not be read, as problems."""
    report, documents = ReadReport(), list[Document]()
    try:
        if source.startswith(_PACKAGE):
            name = source.removeprefix(_PACKAGE)
            documents += read_installed_docs(name, workers=1, report=report)
        else:
            documents += read_files(source, report=report)
    except ValueError:
        if not report.problems:  # else there is nothing in it that can be read, and we say why
            raise
    prefix, name = prefixes[source], Path(source).name
    for document in documents:
        if document.id == name or document.id.startswith(f"{name}:"):
            document = replace(document, id=prefix + document.id, source=prefix + document.source)
        yield box_of(stable_hash(document.id), n_boxes), vars(document)
    for problem in report.problems:
        yield 0, {"problem": f"{prefix}{problem}"}


# %% tags=["engine"]
#| export
def _write_read(box: int, values: list[Any], folder: str) -> Iterator[Any]:
    found: dict[str, Document] = {}
    for value in values:
        if "problem" in value:
            yield value
            continue
        document, known = Document(**value), found.get(value["id"])
        if known is not None and known.text != document.text:
            raise ValueError(f"sources: two different texts have the id {document.id!r}")
        both = [document] if known is None else [document, known]
        found[document.id] = min(both, key=lambda d: json.dumps(vars(d), sort_keys=True))
    yield _size(_once(_path(folder, "read", box), found.values))


# %% [markdown]
# ### Lines, and the rules of chapter 03

# %% [markdown] tags=["engine"]
# ### Engine room: normalizing, and cleaning with the lines of others

# %% [markdown] tags=["engine"]
# The order of steps is that of `clean_documents`. Its one step that looks beyond a document is
# `remove_repeated_lines`. To apply it to one document, we call it with two: a text made of the
# lines that belong to others, and the document.


# %% tags=["engine"]
#| export
# Normalize, and find who owns a line
def _edited(documents: Iterable[Document], edit: Callable[[str], str]) -> Iterator[Document]:
    for document in documents:
        if (text := edit(document.text)).strip():
            yield replace(document, text=text)


def _line_keys(text: str, min_length: int) -> dict[int, str]:
    """Return the lines of a text by the hash of their words in lower case, without short ones."""
    plain = ((line, " ".join(line.lower().split())) for line in text.splitlines())
    return {stable_hash(key): line for line, key in plain if key and len(key) >= min_length}


def _normalize(box: int, folder: str, config: "PrepareConfig") -> Iterator[tuple[int, Any]]:
    def make() -> Iterator[Document]:
        normal = _edited(_in_box(_path(folder, "read", box)), normalize_text)
        return _edited(normal, remove_license)

    documents = _once(_path(folder, "normalize", box), make)
    yield box, _size(documents)
    for document in documents:
        for key in _line_keys(document.text, config.min_line_length):
            yield box_of(key, config.n_boxes), [key, document.id]


# %% tags=["engine"]
#| export
def _first_owners(box: int, values: list[Any]) -> Iterator[Any]:
    """Yield [key, id] of the first document with a line that several have."""
    owners: dict[int, list[str]] = defaultdict(list)
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            owners[value[0]].append(value[1])
    for key, ids in owners.items():
        if len(ids) > 1:
            yield [key, min(ids, key=_by_place)]


# %% tags=["engine"]
#| export
# Clean, and send the keys of the bands
def _cleaned(
    documents: Iterable[Document], config: "PrepareConfig", owners: Mapping[int, str]
) -> Iterator[Document]:
    for document in documents:
        lines = _line_keys(document.text, config.min_line_length)
        foreign = [
            line for key, line in lines.items() if owners.get(key, document.id) != document.id
        ]
        group = [Document("\n".join(foreign)), document] if foreign else [document]
        left = list(remove_repeated_lines(group, min_length=config.min_line_length))
        for found in left[len(group) - 1 :]:
            if not gopher_quality(found.text, min_words=config.min_words, min_stop_words=None):
                yield from _edited([found], lambda text: mask_pii(text, keep_private=True).text)


def _clean(
    box: int, folder: str, config: "PrepareConfig", owners: Mapping[int, str]
) -> Iterator[tuple[int, Any]]:
    source = _path(folder, "normalize", box)
    documents = _once(
        _path(folder, "clean", box), lambda: _cleaned(_in_box(source), config, owners)
    )
    yield box, _size(documents)
    bands, rows = optimal_bands(config.threshold, MinHasher().n_permutations)
    keys = band_keys(MinHasher().signatures(documents), bands, rows)
    for document, row in zip(documents, keys.tolist(), strict=True):
        plain = canonical_text(document.text)
        for key in row:
            yield box_of(key, config.n_boxes), [key, document.id, stable_hash(plain), len(plain)]


# %% [markdown]
# ### Copies that never met

# %% [markdown] tags=["engine"]
# ### Engine room: pairs, their true similarity, and who stays

# %% [markdown] tags=["engine"]
# Exact copies agree in all bands. In each bucket the first of them stands for all, so that a text
# with a thousand copies makes a thousand links instead of half a million pairs. In a bucket with
# more than a thousand different texts, each is compared with the first one only. The pairs go
# to the driver, the process that runs the steps. At the size of a crawl, union-find would need an
# engine of its own.

# %% tags=["engine"]
#| export
# Pairs of candidates
_ALL_PAIRS_UP_TO = 1000


def _pairs(box: int, values: list[Any]) -> Iterator[Any]:
    """Yield [is a copy, first id, second id, lengths] of documents that share a key, each once."""
    buckets: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            buckets[value[0]].append(tuple(value[1:]))
    found = set()
    for bucket in buckets.values():
        first: dict[int, tuple[str, int, int]] = {}
        for member in sorted(bucket, key=lambda member: _by_place(member[0])):
            one = first.setdefault(member[1], member)
            if one is not member:
                found.add((True, one[0], member[0], one[2], member[2]))
        different = list(first.values())
        several = combinations(different, 2)
        if len(different) > _ALL_PAIRS_UP_TO:
            several = ((different[0], other) for other in different[1:])  # type: ignore[assignment]
        found |= {(False, a[0], b[0], a[2], b[2]) for a, b in several}
    yield from map(list, sorted(found))


# %% tags=["engine"]
#| export
# Compare them, and choose
_Pairs = Sequence[tuple[str, str]]


def _lend(box: int, folder: str, pairs: _Pairs, n_boxes: int) -> Iterator[tuple[int, Any]]:
    """Send the texts of candidates to where their pairs are compared."""
    boxes: dict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        for id in pair:
            boxes[id].add(box_of(stable_hash(pair[0]), n_boxes))
    for document in _in_box(_path(folder, "clean", box)):
        for to in sorted(boxes.get(document.id, ())):
            yield to, [document.id, document.text]


def _similar(
    box: int, values: list[Any], pairs: _Pairs, threshold: float, n_boxes: int
) -> Iterator[Any]:
    texts: dict[str, str] = dict(values)
    cut = cache(lambda id: shingles(texts[id]))
    for a, b in pairs:
        if box_of(stable_hash(a), n_boxes) == box and jaccard(cut(a), cut(b)) >= threshold:
            yield [a, b]


# %% tags=["engine"]
#| export
def _not_kept(links: Iterable[Sequence[str]], lengths: Mapping[str, int]) -> list[str]:
    """Return the ids of all but the best of each cluster: the longest, and the first of equals."""
    ids = sorted(lengths, key=_by_place)
    number, forest = {id: i for i, id in enumerate(ids)}, UnionFind(len(ids))
    for a, b in links:
        forest.union(number[a], number[b])
    best = {max(c, key=lambda i: (lengths[ids[i]], -i)): c for c in forest.clusters()}
    return sorted(ids[i] for kept, cluster in best.items() for i in cluster if i != kept)


# %% [markdown]
# ### Words and tokens

# %% [markdown] tags=["engine"]
# ### Engine room: counting, encoding, and writing in order

# %% [markdown] tags=["engine"]
# Documents with the smallest places are held out: no tokenizer learns from them, and their tokens
# become shards of their own. Shards have an order, so one process writes them, from ids that the
# workers have encoded.

# %% tags=["engine"]
#| export
# Count words, encode
_SPECIAL = ("<|endoftext|>",)
_PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN}


def _count(
    box: int, folder: str, config: "PrepareConfig", dropped: Collection[str]
) -> Iterator[tuple[int, Any]]:
    source = _path(folder, "clean", box)
    documents = _once(
        _path(folder, "unique", box), lambda: (d for d in _in_box(source) if d.id not in dropped)
    )
    yield box, _size(documents)
    learned = [document for document in documents if not config.holds_out(document.id)]
    for word, n in count_words(learned, _PATTERNS[config.pattern], _SPECIAL).items():
        yield box_of(stable_hash(word), config.n_boxes), [word, n]


def _summed(box: int, values: list[Any]) -> Iterator[Any]:
    counts: Counter[str] = Counter()
    for value in values:
        if isinstance(value, dict):
            yield value
        else:
            counts[value[0]] += value[1]
    yield from map(list, counts.items())


# %% tags=["engine"]
#| export
def _encode(
    box: int, folder: str, config: "PrepareConfig", tokenizer: BPETokenizer
) -> Iterator[tuple[int, Any]]:
    path, documents = _path(folder, "encode", box, "npz"), _in_box(_path(folder, "unique", box))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [np.array(tokenizer.encode(text), np.uint32) for text in iter_texts(documents)]
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez(
                file,
                ids=np.concatenate([np.empty(0, np.uint32), *rows]),
                sizes=np.array([len(row) for row in rows], np.int64),
                held_out=np.array([config.holds_out(d.id) for d in documents], bool),
            )
    yield box, _size(documents)


def _encoded(folder: Path, n_boxes: int, held_out: bool) -> Iterator[np.ndarray]:
    """Yield the ids of each document, in order, of those that are held out or of the others."""
    for box in range(n_boxes):
        with np.load(_path(str(folder), "encode", box, "npz"), allow_pickle=False) as found:
            ends = np.cumsum(found["sizes"])
            rows = np.split(found["ids"], ends[:-1]) if len(ends) else []
            yield from (
                r for r, out in zip(rows, found["held_out"], strict=True) if out == held_out
            )


# %% [markdown]
# ### All steps

# %% [markdown] tags=["engine"]
# ### Engine room: settings, the manifest, and a preparation that goes on

# %% [markdown] tags=["engine"]
# The manifest has the settings, the sources with their sizes and times of change, and the counts
# of each step. It is written first, so that a folder knows what it is for: the same command goes
# on, and another one is refused.


# %% tags=["engine"]
#| export
# The settings
@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How text becomes tokens. The result does not depend on ``n_boxes``."""

    vocab_size: Annotated[int, "of the tokenizer that is trained, special tokens included"] = 8192
    pattern: Annotated[str, "how it splits text into words: gpt2 or gpt4"] = "gpt4"
    min_words: Annotated[int, "a document of fewer words is dropped"] = 5
    min_line_length: Annotated[int, "a repeated line of fewer characters stays"] = 30
    threshold: Annotated[float, "Jaccard similarity from which documents are near-duplicates"] = 0.8
    held_out: Annotated[float, "share of the documents that validate"] = 0.01
    shard_tokens: Annotated[int, "tokens in a shard"] = 50_000_000
    n_boxes: Annotated[int, "into how many parts the work is divided"] = 16

    def __post_init__(self) -> None:
        check_whole("vocab_size", self.vocab_size, 256 + len(_SPECIAL), 1_000_000)
        check_choice("pattern", self.pattern, tuple(_PATTERNS))
        for name in ("min_words", "min_line_length"):
            check_whole(name, getattr(self, name), 0)
        for name in ("shard_tokens", "n_boxes"):
            check_whole(name, getattr(self, name), 1)
        check_fraction("held_out", self.held_out)
        optimal_bands(self.threshold)

    def holds_out(self, id: str) -> bool:
        """Say whether the document with this ``id`` is held out: by its place alone."""
        return stable_hash(id) < self.held_out * 2**64


# %% tags=["engine"]
#| export
# The result, and what a run of the steps knows
class Prepared(NamedTuple):
    """What ``prepare`` left in ``folder``: documents by step, problems, and tokens of the shards.

    ``train/`` and ``validation/`` are shards (no document may be held out in a small corpus),
    ``tokenizer.json`` is the tokenizer, ``unique/`` has the documents.
    """

    folder: Path
    counts: dict[str, int]
    characters: dict[str, int]
    problems: list[str]
    tokens: dict[str, int]


# %% tags=["engine"]
#| export
@dataclass
class _Run:
    folder: Path
    config: PrepareConfig
    engine: Callable[..., list[Any]]
    say: Callable[[str], None]
    manifest: dict[str, Any]

    def step(self, name: str, items: Iterable[Any], emit: Any, reduce: Any) -> list[Any]:
        """Run one step; note its counts, return its other values."""
        start, values, sums = time.perf_counter(), list[Any](), Counter[str]()
        emit, reduce = (
            partial(_emitting, step=name, emit=emit),
            partial(_reducing, step=name, reduce=reduce),
        )
        for value in self.engine(items, emit, reduce):
            if isinstance(value, dict) and "documents" in value:
                sums.update(value)
            else:
                values.append(value)
        seconds = time.perf_counter() - start
        if sums:
            self.manifest["steps"][name] = dict(sums)
        told = (
            f"{sums['documents']:,} documents, {sums['characters']:,} characters, " if sums else ""
        )
        self.say(f"{name}: {told}{seconds:.1f} s")
        return values

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what a file of JSON holds; where it is missing, make and write it, with counts."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            found = {"found": make(), "steps": self.manifest["steps"]}
            with whole_file(path) as draft:
                draft.write_text(json.dumps(found), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
        self.manifest["steps"] |= found["steps"]
        return found["found"]


# %% tags=["engine"]
#| export
# Steps one after the other
def _survivors(run: _Run) -> list[str]:
    """Read, normalize and clean; return the ids of documents that are copies of better ones."""
    folder, config, boxes = str(run.folder), run.config, range(run.config.n_boxes)
    prefixes = {source: prefix for source, prefix, _ in run.manifest["sources"]}

    def read() -> list[str]:
        emit = partial(_read, prefixes=prefixes, n_boxes=config.n_boxes)
        problems = run.step("read", list(prefixes), emit, partial(_write_read, folder=folder))
        for box in boxes:  # nothing was sent to some of them
            _once(_path(folder, "read", box), list)
        return sorted(problem["problem"] for problem in problems)

    def lines() -> list[list[Any]]:
        emit = partial(_normalize, folder=folder, config=config)
        return sorted(run.step("normalize", boxes, emit, _first_owners))

    def copies() -> list[str]:
        emit = partial(_clean, folder=folder, config=config, owners=dict(owners))
        found = sorted({tuple(pair) for pair in run.step("clean", boxes, emit, _pairs)})
        pairs = [(a, b) for copy, a, b, *_ in found if not copy]
        lengths = {id: size for _, a, b, m, n in found for id, size in ((a, m), (b, n))}
        lend = partial(_lend, folder=folder, pairs=pairs, n_boxes=config.n_boxes)
        similar = partial(_similar, pairs=pairs, threshold=config.threshold, n_boxes=config.n_boxes)
        near = run.step("compare", boxes, lend, similar) if pairs else []
        return _not_kept([*near, *((a, b) for copy, a, b, *_ in found if copy)], lengths)

    run.kept("problems", read)
    owners = run.kept("lines", lines)
    return run.kept("copies", copies)


# %% tags=["engine"]
#| export
def _tokens(run: _Run, dropped: list[str]) -> dict[str, int]:
    """Count, learn, encode and write shards; return the number of tokens of each kind."""
    folder, config, boxes = str(run.folder), run.config, range(run.config.n_boxes)
    pattern = _PATTERNS[config.pattern]

    def learn() -> list[list[str]]:
        emit = partial(_count, folder=folder, config=config, dropped=frozenset(dropped))
        counts = dict(run.step("unique", boxes, emit, _summed))
        if not counts:
            raise ValueError("sources: expected some text to learn from, got none after cleaning")
        merges = learn_merges(counts, config.vocab_size - 256 - len(_SPECIAL))
        return [[a.hex(), b.hex()] for a, b in merges]

    merges = [(bytes.fromhex(a), bytes.fromhex(b)) for a, b in run.kept("merges", learn)]
    tokenizer = BPETokenizer.from_merges(merges, _SPECIAL, pattern=pattern)
    tokenizer.save(run.folder / "tokenizer.json")
    emit = partial(_encode, folder=folder, config=config, tokenizer=tokenizer)
    run.step("encode", boxes, emit, lambda box, values: values)
    tokens = {}
    for name, held_out in (("train", False), ("validation", True)):
        rows = _encoded(run.folder, config.n_boxes, held_out)
        if next(_encoded(run.folder, config.n_boxes, held_out), None) is not None:
            if not (run.folder / name).exists():
                write_shards(rows, run.folder / name, tokenizer, shard_tokens=config.shard_tokens)
            tokens[name] = len(TokenShards(run.folder / name, tokenizer))
    return tokens


# %% tags=["engine"]
#| export
# Everything
def _claim(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a folder, which is new or was made for the same."""
    path = folder / "manifest.json"
    if not path.exists():
        if any(p.name != ".lock" for p in folder.iterdir()):
            raise ValueError(f"folder: expected a new or an empty one, got {str(folder)!r}")
        _write_manifest(folder, wanted | {"steps": {}})
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("config", "sources"):
        if found.get(name) != wanted[name]:
            other = f"other {'settings' if name == 'config' else 'sources, or they have changed'}"
            raise ValueError(f"folder: {str(folder)!r} was prepared with {other}: take a new one")
    return found


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / "manifest.json") as draft:
        draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


# %% tags=["engine"]
#| export
def prepare(
    sources: Iterable[str | Path],
    folder: str | Path,
    config: PrepareConfig | None = None,
    *,
    engine: Callable[..., list[Any]] = map_reduce,
    say: Callable[[str], None] | None = None,
) -> Prepared:
    """Read, clean, deduplicate and encode ``sources`` into ``folder``, by any ``engine``.

    A source is a file, a folder, or "package:NAME" for installed documentation. Every engine that
    does what ``map_reduce`` does, in whatever order, leaves the same files. What is there is not
    done again, so the same call goes on after a kill. A ``StepError`` says which step failed at
    what and where, a ``ValueError`` that the folder was made for something else. Workers on other
    machines must see sources and ``folder`` under the same paths. ``say`` is told of each step.
    """
    config = PrepareConfig() if config is None else config
    say = (lambda line: None) if say is None else say
    for name, value, fits in (
        ("config", config, isinstance(config, PrepareConfig)),
        ("engine", engine, callable(engine)),
        ("say", say, callable(say)),
    ):
        if not fits:
            kind = "a PrepareConfig" if name == "config" else "a function"
            raise ValueError(f"{name}: expected {kind}, got {value!r:.60}")
    wanted = {"config": asdict(config), "sources": [list(s) for s in _listed(sources)]}
    folder = check_path(folder, "folder").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            run = _Run(folder, config, engine, say, _claim(folder, wanted))
            if "tokens" not in run.manifest:
                for draft in folder.glob("*/.*.part"):  # of workers that were killed
                    draft.unlink()
                run.manifest["tokens"] = _tokens(run, _survivors(run))
                run.manifest["problems"] = run.kept("problems", list)
                _write_manifest(folder, run.manifest)
                for step in ("read", "normalize", "clean", "encode"):
                    shutil.rmtree(folder / step, ignore_errors=True)
    except Timeout:
        raise ValueError(f"folder: somebody else is at work in {str(folder)!r}") from None
    steps = run.manifest["steps"]
    counts, characters = ({n: s[k] for n, s in steps.items()} for k in ("documents", "characters"))
    return Prepared(folder, counts, characters, run.manifest["problems"], run.manifest["tokens"])


# %% [markdown]
# ### A cluster of one machine

# %% [markdown] tags=["engine"]
# ### Engine room: starting Ray quietly, and what goes over the wire

# %% [markdown] tags=["engine"]
# Ray's own defaults are meant for a cluster: a dashboard, statistics of use, an address that others
# can reach, a third of the memory, logs that stay. We start it on the loopback, small, and remove
# its logs. Its start gives up after 30 seconds, which a busy machine may need, so we try three
# times. Ray's default shuffle starts a process for each of its receivers, which took 25 seconds for
# a handful of rows on our busy machine. A shuffle by sorting needs none, and took half a second.

# %% tags=["engine"]
#| export
# Ray's start
_QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: stay on the loopback
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


def _import_ray() -> Any:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with requires_extra("Preparing on several processes", extra="cluster"):
        import ray
        import ray.data
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.shuffle_strategy = ray.data.context.ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


# %% tags=["engine"]
#| export
def _start_ray(ray: Any, workers: int, logs: str) -> None:
    options = {
        "num_cpus": workers,
        "include_dashboard": False,
        "object_store_memory": 200 * 2**20,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": logs,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    for attempt in (1, 2, 3):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray has no class of its own for this
            ray.shutdown()
            if attempt == 3:
                message = "Ray did not start, three times; is the machine busy, or out of memory?"
                raise OSError(f"{message} {error}") from error


# %% [markdown] tags=["engine"]
# Values travel as JSON, all of one item for one box in one row. An exception in a task would come
# back as a page of another program's stack, and so a failed task sends its message as a value.

# %% tags=["engine"]
#| export
# What a worker does
_FAILED, _NOTHING = -1, -2  # no boxes: a message, and a row where there is nothing to send


def _emit_rows(row: dict[str, str], emit: Callable[[Any], Iterable[Any]]) -> list[dict[str, Any]]:
    boxes: dict[int, list[Any]] = defaultdict(list)
    try:
        for box, value in emit(json.loads(row["item"])):
            boxes[box].append(value)
    except Exception as error:
        boxes = defaultdict(list, {_FAILED: [f"{error}"]})
    return [{"box": b, "data": json.dumps(v)} for b, v in (boxes or {_NOTHING: []}).items()]


def _reduce_rows(rows: dict[str, Any], reduce: Callable[..., Iterable[Any]]) -> dict[str, Any]:
    box = int(rows["box"][0])
    values = [value for data in rows["data"] for value in json.loads(str(data))]
    if box >= 0:
        try:
            values = list(reduce(box, values))
        except Exception as error:
            box, values = _FAILED, [f"{error}"]
    return {"box": [box], "data": [json.dumps(values)]}


# %% tags=["engine"]
#| export
# The engine
class RayEngine:
    """``map_reduce`` on Ray Data: in a ``with`` block, starts a local cluster of ``workers``.

    With ``address`` it joins a cluster that runs already. A task whose process dies is run again.
    Values must be what JSON can hold. Needs the extra "cluster". Source: Moritz et al. (2018).
    """

    def __init__(self, workers: int = 2, address: str | None = None) -> None:
        check_whole("workers", workers, 1)
        if address is not None:
            check_text(address, "address")
        self.workers, self.address = workers, address
        self._ray: Any = None
        self._logs = ""

    def __enter__(self) -> "RayEngine":
        self._ray = _import_ray()
        if self.address is not None:
            self._ray.init(address=self.address, log_to_driver=False)
            return self
        # Not where TMPDIR points: names of sockets may have a hundred characters.
        short = "/tmp" if Path("/tmp").is_dir() else None
        self._logs = tempfile.mkdtemp(prefix="ray", dir=short)
        try:
            _start_ray(self._ray, self.workers, self._logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()
        self._ray = None
        if self._logs:
            shutil.rmtree(self._logs, ignore_errors=True)

    def __call__(
        self, items: Iterable[Any], emit: Callable[[Any], Any], reduce: Callable[[int, Any], Any]
    ) -> list[Any]:
        """Do what ``map_reduce`` does; the order of the results is any."""
        if self._ray is None:
            raise ValueError("RayEngine: expected to be called in its with block")
        rows = [{"item": json.dumps(item)} for item in items]
        data = self._ray.data.from_items(rows, override_num_blocks=max(len(rows), 1))
        data = data.flat_map(partial(_emit_rows, emit=emit)).groupby("box")
        results = list[Any]()
        done = data.map_groups(partial(_reduce_rows, reduce=reduce), batch_format="numpy")
        for row in done.take_all():
            if row["box"] == _FAILED:
                raise StepError(json.loads(row["data"])[0])
            results += json.loads(row["data"])
        return results


# %% [markdown]
# ### The command

# %% [markdown] tags=["engine"]
# ### Engine room: `python -m llmbook.distributed prepare`


# %% tags=["engine"]
#| export
# The command line
def _prepare_command(arguments: Sequence[str]) -> None:
    prog = "python -m llmbook.distributed prepare"
    about = "Make tokens of text; a preparation that was stopped goes on."
    parser = settings_parser({"": PrepareConfig}, required=False, prog=prog, description=about)
    parser.add_argument("sources", nargs="*", help="files and folders of text")
    parser.add_argument("--packages", nargs="+", default=[], help="installed ones, or stdlib")
    parser.add_argument("--folder", type=str, default="corpus", help="where everything is written")
    parser.add_argument(
        "--workers", type=int, help="processes of a local Ray; else one, without it"
    )
    parser.add_argument("--address", type=str, help="of a Ray cluster that runs already")
    from jsonargparse import ArgumentError
    from tqdm import tqdm

    try:
        given = vars(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    config = PrepareConfig(**{name: given[name] for name in PrepareConfig.__dataclass_fields__})
    sources = [*given["sources"], *(_PACKAGE + name for name in given["packages"])]
    check_at_least(workers=(1, given["workers"]))
    with tqdm(total=6, desc="steps", disable=None, leave=False) as bar:

        def say(line: str) -> None:
            bar.write(line)
            bar.update()

        options: dict[str, Any] = {"config": config, "say": say}
        if given["workers"] is None and given["address"] is None:
            result = prepare(sources, given["folder"], **options)
        else:
            with RayEngine(given["workers"] or 2, given["address"]) as engine:
                result = prepare(sources, given["folder"], engine=engine, **options)
    for problem in result.problems:
        print(f"not read: {problem}", file=sys.stderr)
    kinds = ", ".join(f"{n:,} tokens in {name}" for name, n in result.tokens.items())
    print(f"{result.counts['unique']:,} documents, {kinds}; see {result.folder}")


# %% tags=["engine"]
#| export
# Commands by name, and how they end
_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"prepare": _prepare_command}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, ``python -m llmbook.distributed``, and exit.

    The code is 0, or 2 for a bad request, 1 if a step failed, 130 if it was stopped by Ctrl-C.
    """
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    code = 0
    try:
        if name not in _COMMANDS:
            known = f"python -m llmbook.distributed {{{','.join(_COMMANDS)}}} [--help]"
            raise ValueError(f"expected a command, got {name!r}: {known}")
        _COMMANDS[name](rest[:-1])
    except (KeyboardInterrupt, ImportError, OSError, ValueError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        text = "stopped; the same command goes on" if stopped else f"error: {error}"
        print(text, file=sys.stderr)
        bad = isinstance(error, ValueError) and not isinstance(error, StepError)
        code = 130 if stopped else 2 if bad else 1
    sys.exit(code)


if __name__ == "__main__" and "__file__" in globals():  # a notebook has no file
    main()


# %% [markdown]
# ## Exercises
#
# ````{exercise} Lines that meet :label: ex-distributed-lines *Fifteen minutes.* Write
# `shared_lines(parts, n_boxes)`, the list of lines that at least two documents have, each line
# once, by `map_reduce`. Each part is a dictionary of texts by the names of their documents.
# `stable_hash(line)` is the place of a line, and `box_of(place, n_boxes)` its box. A line that one
# document repeats is not shared. ````


# %% tags=["solution"]
def shared_lines(parts: list[dict[str, str]], n_boxes: int) -> list[str]:
    """The lines that at least two documents have, each once."""

    def emit(part):
        for name, text in part.items():
            for line in text.splitlines():
                yield box_of(stable_hash(line), n_boxes), (line, name)

    def reduce(box, values):
        names = defaultdict(set)
        for line, name in values:
            names[line].add(name)
        return [line for line, found in names.items() if len(found) > 1]

    return map_reduce(parts, emit, reduce)


# %% tags=["check"]
pages = [{"a": "echo\nnotice\necho", "b": "one"}, {"c": "notice\ntwo"}, {"d": "notice"}]
for n_boxes in (1, 3, 64):
    shared = shared_lines(pages, n_boxes)
    assert "notice" in shared, "equal lines of different parts must meet in one box"
    assert "echo" not in shared, "a line that one document repeats is not shared"
    assert shared == ["notice"], "each shared line once, however many documents have it"
