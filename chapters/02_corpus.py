# %% [markdown]
# # Text from the real world
#
# > Read documents from packages, files, web pages and hubs, lose none of them silently, and measure
# > what they are made of.
#
# The stories of chapter 01 came out of a generator. Real text sits in thousands of files by people
# who never met, in formats that disagree, with license headers, broken encodings, copies of
# copies, and addresses of people who did not ask to be memorized. Most of what a language model
# will ever know is decided here, before its first parameter exists.
#
# The web needs a network and a warehouse, but there is a smaller web on your own disk. Every
# Python installation carries docstrings, comments and READMEs: tens of thousands of pieces, on
# everything from time zones to contour plots. We read it, measure it, and write down what is wrong
# with it. That list is the work order for chapters 03 and 04.
#
# | | |
# |---|---|
# | **Part** | I. Foundations and data |
# | **You build** | {py:class}`~llmbook.corpus.Document`, {py:func}`~llmbook.corpus.read_installed_docs`, {py:func}`~llmbook.corpus.read_files`, {py:func}`~llmbook.corpus.read_jsonl`, {py:func}`~llmbook.corpus.read_html`, {py:func}`~llmbook.corpus.stream_hub` |
# | **You need** | Python: generators and regular expressions. {doc}`00_environment` sets up the rest |
# | **It takes** | 60 minutes for the main line, 2.5 hours for everything, 30 seconds to run |

# %% tags=["remove-cell"]
#| default_exp corpus

# %% tags=["engine"]
#| export
# What the engine rooms import; pyarrow, zstandard and datasets are imported where they are used
import bz2
import difflib
import fnmatch
import importlib.metadata
import importlib.util
import lzma
import multiprocessing
import os
import sys
import types
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from itertools import islice

from llmbook.environment import check_choice, check_path, check_text, requires_extra, whole_file

# %% [markdown]
# Nearly all that we need is in the standard library:

# %%
#| export
import ast
import codecs
import gzip
import io
import json
import random
import re
import sysconfig
import tokenize
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from llmbook.environment import check_at_least

# %% [markdown]
# ## What is a document?
#
# A corpus is a stream of documents, and a document is more than its text. When a model recites a
# telephone number, you want to know which file it came from. So a document carries an **id** that
# stays the same from run to run, a **source**, and a dictionary of whatever else is known. Without
# an id it gets one derived from its text by hashing. A running number would not do: it changes as
# soon as a file is added.


# %%
#| export
@dataclass(frozen=True)
class Document:
    """A text with a stable id, where it is from, and whatever else is known of it.

    Without an ``id`` it gets one that is a hash of the text. Text, id and source can always be
    written as UTF-8: a lone surrogate (half a character) raises a ``ValueError``.

    >>> Document("Dough rises.").id
    '3e304b2990b65fdd'
    """

    text: str
    id: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, value in (("text", self.text), ("id", self.id), ("source", self.source)):
            if not isinstance(value, str):
                raise ValueError(f"{name}: expected a str, got {type(value).__name__}")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                broken = f"{value[error.start]!r} at index {error.start}"
                expected = f"{name}: expected text that UTF-8 can encode"
                raise ValueError(f"{expected}, got {broken}") from None
        if not isinstance(self.metadata, dict):
            raise ValueError(f"metadata: expected a dict, got {type(self.metadata).__name__}")
        if not self.id:
            digest = blake2b(self.text.encode(), digest_size=8).hexdigest()
            object.__setattr__(self, "id", digest)


# %% [markdown]
# The same text has the same id on any machine. A single letter more makes another one. And what
# could not be written as UTF-8 never becomes a document:

# %%
for text in ("Dough rises.", "Dough rises.", "Dough rises!"):
    print(Document(text).id, text)
try:
    Document("half an emoji: \ud83d")
except ValueError as error:
    print(error)

# %% [markdown]
# ## A small web on your disk
#
# Where is the prose in a Python file? In **docstrings**, which the language knows about, and in
# **comments**, which it throws away. For docstrings we let Python parse the file and walk over its
# statements; expressions need no visit, since functions and classes are statements. We keep the
# line and the qualified name, such as `JSONDecoder.decode`.


# %%
#| export
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> list[tuple[int, str, str]]:
    """Return line, qualified name and text of every docstring in Python ``source``, by line.

    Indentation is removed as by ``inspect.getdoc``. Raises what ``ast.parse`` raises on bad source.

    >>> docstrings('class Oven:\\n    "Hot."')
    [(2, 'Oven', 'Hot.')]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others' files deserve is not the reader's problem
        todo: list[tuple[ast.AST, str]] = [(ast.parse(check_text(source, "source")), "")]
    found = []
    for node, name in todo:  # grows while we walk
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            found.append((node.body[0].lineno, name, text))
        for part in ("body", "orelse", "handlers", "finalbody", "cases"):
            statements = getattr(node, part, None)
            for child in statements if isinstance(statements, list) else ():
                own_name = getattr(child, "name", None) if isinstance(child, _DOCUMENTED) else None
                todo.append((child, f"{name}.{own_name}".lstrip(".") if own_name else name))
    return sorted(found)


# %% [markdown]
# Comments take more thought. A test for lines that begin with `#` is wrong, because strings hold
# such lines, too. The faithful way is Python's own tokenizer. We take comments that have a line to
# themselves, since those are prose more often than the ones after code, and join neighbors into
# blocks.


# %%
def comments_by_tokenize(source: str) -> list[tuple[int, str]]:
    blocks: list[tuple[int, list[str]]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, column = token.start
        if token.type != tokenize.COMMENT or token.line[:column].strip():
            continue
        if blocks and blocks[-1][0] + len(blocks[-1][1]) == line:
            blocks[-1][1].append(token.string)
        else:
            blocks.append((line, [token.string]))
    return [(line, "\n".join(lines)) for line, lines in blocks]


sample = 'x = 1  # trailing\n# one\n# two\ny = """\n# not a comment\n"""\n'
print(comments_by_tokenize(sample))

# %% [markdown]
# Correct, and slow: it makes an object of every token (and Python 3.11 does so in Python, 3.12 in
# C). The package has a version, `comment_blocks`, that is several times as fast and finds the same
# blocks.

# %% [markdown] tags=["engine"]
# ### Engine room: comments without a tokenizer, several times as fast

# %% [markdown] tags=["engine"]
# To know where comments are, one only has to step over strings, and both can be described by
# one regular expression. It tries, at each position: a block of comment lines; a comment after
# code, to be stepped over because it may contain a quote; a string, to be stepped over because it
# may contain a `#`. The `*+` repeats possessively: what it has matched it never gives back, so the
# search cannot explode. There is one exception: from 3.12 on an f-string may contain its own
# quotes, and a `#` between those can be misread.

# %% tags=["engine"]
#| export
_COMMENT_OR_STRING = re.compile(
    r'''(?P<block>(?:^[ \t\f]*\#[^\n]*(?:\n|\Z))++)  # lines that hold nothing but a comment
      | \#[^\n]*                                     # a comment after code
      | """(?:[^"\\]+|\\.|"(?!""))*+"""              # strings: the long kinds first
      | \'\'\'(?:[^'\\]+|\\.|'(?!''))*+\'\'\'
      | "(?:[^"\\\n]+|\\.)*+"
      | '(?:[^'\\\n]+|\\.)*+'
    ''',
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)


def comment_blocks(source: str) -> list[tuple[int, str]]:
    """Return line and text of every block of whole-line comments in Python ``source``, with ``#``.

    >>> comment_blocks("x = '# no'  # no\\n# one\\n# two\\n")
    [(2, '# one\\n# two')]
    """
    found, line, counted = [], 1, 0
    for match in _COMMENT_OR_STRING.finditer(source):
        if block := match["block"]:
            line += source.count("\n", counted, match.start())
            counted = match.start()
            found.append((line, "\n".join(row.strip() for row in block.rstrip("\n").split("\n"))))
    return found


# %% [markdown] tags=["engine"]
# A clever shortcut must be held against the honest way. Here are all files of five packages of the
# standard library:

# %% tags=["engine"]
import time

stdlib = Path(sysconfig.get_path("stdlib"))
roots = [stdlib / name for name in ("asyncio", "email", "importlib", "json", "unittest")]
sources = []
for path in [p for root in roots for p in sorted(root.rglob("*.py"))]:
    if {"test", "tests"} & set(path.parts):
        continue
    with tokenize.open(path) as file:  # honors the encoding that a file declares
        sources.append(file.read())
start = time.perf_counter()
slow = [comments_by_tokenize(source) for source in sources]
middle = time.perf_counter()
fast = [comment_blocks(source) for source in sources]
speedup = (middle - start) / (time.perf_counter() - middle)
assert slow == fast
assert len(sources) > 75
print("more than 75 files: the same blocks in each of them")

# %% [markdown] tags=["engine"]
# On this machine the shortcut takes a fraction of the time:

# %% tags=["engine", "nbval-ignore-output"]
print(f"{speedup:.0f} times as fast")

# %% [markdown]
# ### Reading must not fail, and must not lie
#
# Among a thousand files one is broken, always. A reader that stops there is useless; one that
# ignores it is worse, because nobody will know that a third of the corpus is missing. So problems
# are **counted, with file, line and reason**, in a report that the caller may pass; otherwise a
# warning after the last document says how many there were. With `errors="strict"` every reader of
# this chapter stops at the first problem, with `"skip"` it goes on without the broken piece, with
# `"replace"` it keeps text whose undecodable bytes are marked `�`.


# %%
#| export
class CorpusWarning(UserWarning):
    """Some of what was to be read could not be; the message says how much, where and why.

    It comes after the last document. Who stops before that asks a ``ReadReport``.
    """


class Problem(NamedTuple):
    """A file, or a line of it (None: the file as a whole), and why it was not read in full."""

    path: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{'' if self.line is None else f':{self.line}'}: {self.reason}"


# %% [markdown]
# The report collects the problems. `strict` reading raises the first one instead.


# %%
#| export
@dataclass
class ReadReport:
    """What a reader read and what it could not; pass one as ``report`` and look at it afterwards.

    ``ignored`` counts files that were never opened, by suffix: folders hold more than text.
    """

    documents: int = 0
    files: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem, errors: str) -> None:
        """Note the ``problem``, or raise it as a ``ValueError`` where ``errors`` is "strict"."""
        if errors == "strict":
            raise ValueError(str(problem))
        self.problems.append(problem)

    def __str__(self) -> str:
        counts = (
            f"{self.documents} documents from {self.files} files, {len(self.problems)} problems"
        )
        first = "; ".join(map(str, self.problems[:3])) + ("; ..." if len(self.problems) > 3 else "")
        return counts + (f" ({first})" if first else "")


# %% [markdown] tags=["engine"]
# ### Engine room: what a report says, and what is refused before anything is read

# %% [markdown] tags=["engine"]
# A reason should help the person who has to mend the file.


# %% tags=["engine"]
#| export
def _reason(error: Exception) -> str:
    """Say what went wrong without repeating any of the text that it went wrong with."""
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON at column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"not {error.encoding}: byte {byte:#04x} at {error.start} cannot be decoded"
    if isinstance(error, SyntaxError):
        return f"not valid Python: {error.msg}"
    message = (isinstance(error, OSError) and error.strerror) or str(error)
    return message if type(error) is ValueError else f"{type(error).__name__}: {message}"


# %% [markdown] tags=["engine"]
# The documents of every reader pass through the next function, which counts them. A corpus of
# nothing is nearly always a mistyped path.


# %% tags=["engine"]
#| export
def _deliver(
    documents: Iterator[Document], report: ReadReport, argument: str, quiet: bool
) -> Iterator[Document]:
    """Count ``documents`` as they pass; in the end refuse an empty corpus and warn of problems.

    A caller who stops before the end gets no warning, but the report is always up to date.
    """
    before = report.documents
    for document in documents:
        report.documents += 1
        yield document
    if report.documents == before:
        raise ValueError(f"{argument}: expected at least one document, got none: {report}")
    if report.problems and not quiet:
        warnings.warn(f"{argument}: {report}", CorpusWarning, stacklevel=2)


def _check_errors(errors: str) -> None:
    check_choice("errors", errors, ("strict", "skip", "replace"))


def _own_report(report: ReadReport | None) -> ReadReport:
    """Return the caller's report, or a new one in the place of None."""
    if not isinstance(report, ReadReport | None):
        raise ValueError(f"report: expected a ReadReport, got {report!r:.60}")
    return report if report is not None else ReadReport()


# %% [markdown] tags=["engine"]
# A string is a collection of letters as far as Python is concerned. Pass a single text where
# several are expected, and a function would take it for a list of one-letter documents. Every
# function of the book that takes documents therefore passes them through one of these two, which
# name the argument, and say where in it the wrong item stands.


# %% tags=["engine"]
#| export
def iter_documents(
    items: Iterable[Any], argument: str = "documents", *, texts: bool = False
) -> Iterator[Document]:
    """Yield ``items``; a ``ValueError`` names ``argument`` and the place of what is no Document.

    A single text or Document is refused at once, before anything is asked for. With ``texts``,
    texts among the items are taken, too, and become Documents.

    >>> iter_documents("one text")
    Traceback (most recent call last):
    ValueError: documents: expected several Documents, got a single str
    """
    if not texts:
        return _each(items, argument, Document, "Documents")
    each = _each(items, argument, Document | str, "Documents or texts")
    return (item if isinstance(item, Document) else Document(item) for item in each)


def iter_texts(items: Iterable[Any], argument: str = "documents") -> Iterator[str]:
    """Yield the texts of ``items``, which are Documents or texts, checked like those above."""
    each = _each(items, argument, Document | str, "Documents or texts")
    return (item.text if isinstance(item, Document) else item for item in each)


# %% tags=["engine"]
#| export
def _each(items: Any, argument: str, kinds: Any, name: str) -> Iterator[Any]:
    check_text(argument, "argument")
    several = isinstance(items, Iterable) and getattr(items, "ndim", 1) > 0
    if isinstance(items, str | bytes | Document) or not several:
        one = "a single " if isinstance(items, str | bytes | Document) else ""
        raise ValueError(f"{argument}: expected several {name}, got {one}{type(items).__name__}")

    def checked() -> Iterator[Any]:
        for i, item in enumerate(items):
            if not isinstance(item, kinds):
                kind = type(item).__name__
                raise ValueError(f"{argument}: expected {name}, got {kind} at index {i}")
            yield item

    return checked()


# %% [markdown]
# ### From a package to documents
#
# A docstring or a block of comments becomes a document when three things are added: an id, which is
# the name of the file with the line; the source, which is the package; and the rest of what we
# know. File names are relative to the package, with forward slashes, and so the same on every
# machine. One file becomes a list of documents. Comment signs go, and a block without a
# letter (a ruler of dashes) is not text. `_unix_lines` ends every line in `\n`. Files may hold
# anything: another Python's syntax, undecodable bytes, nesting that the parser gives up on.


# %%
#| export
def _read_python(package: str, name: str, path: str, kinds: tuple[str, ...]) -> list[Document]:
    data = Path(path).read_bytes()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    source = _unix_lines(data.decode(encoding))
    found = [(*item, "docstring") for item in docstrings(source)]
    for line, block in comment_blocks(source):
        text = re.sub(r"(?m)^#+[:!]? ?", "", block)
        if re.search(r"[^\W\d_]", text):
            found.append((line, "", text, "comment"))
    return [
        Document(
            text,
            f"{name}:{line}",
            package,
            {"kind": kind, "path": name, "line": line, "name": owner},
        )
        for line, owner, text, kind in sorted(found)
        if kind in kinds
    ]


# %% [markdown] tags=["engine"]
# ### Engine room: `read_installed_docs`, by several processes and yet in order

# %% [markdown] tags=["engine"]
# Python can tell where a module lies without importing it. Names on the package index and names in
# imports often differ (`scikit-learn` is imported as `sklearn`), so we accept both. The standard
# library goes by `stdlib`. Tests are left out; some systems do not even install them.


# %% tags=["engine"]
#| export
_NOT_PROSE = {"__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages"}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _find_spec(module: str) -> Any:
    try:
        known = module.isidentifier() and module != "__main__"
        return importlib.util.find_spec(module) if known else None
    except (ImportError, ValueError):  # modules made by hand have no spec
        return None


def _locate(name: str, all_owners: Callable[[], Any]) -> tuple[list[Path], str | None]:
    """Return where the code of a module or distribution lies, and the distribution's name."""
    if name == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))], None
    owners = {} if name in sys.stdlib_module_names else all_owners()  # slow, and often needless
    same = [m for m, ds in owners.items() if _canonical(name) in map(_canonical, ds)]
    specs = {m: s for m in ([name] if _find_spec(name) else sorted(same)) if (s := _find_spec(m))}
    if not specs:
        close = difflib.get_close_matches(
            name, {"stdlib", *owners, *sys.stdlib_module_names}, cutoff=0.75
        )
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"packages: expected 'stdlib' or installed packages, got {name!r}{hint}")
    places = [p for s in specs.values() for p in s.submodule_search_locations or [s.origin or ""]]
    return [Path(p) for p in places], next(iter(owners.get(next(iter(specs)), [])), None)


# %% [markdown] tags=["engine"]
# The Python files at or under a place, with their names:


# %% tags=["engine"]
#| export
def _python_files(place: Path, root: str) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of every Python file at or under ``place``, names starting at ``root``."""
    if place.suffix == ".py" and place.is_file():
        yield place.name, place
    for folder, subfolders, files in os.walk(place):
        subfolders[:] = [name for name in subfolders if name not in _NOT_PROSE]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                yield f"{root}/{path.relative_to(place).as_posix()}", path


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


# %% [markdown] tags=["engine"]
# A worker gets sixteen files at a time. What it cannot read comes back as a problem: files may hold
# another Python's syntax, undecodable bytes, or nesting that the parser gives up on.


# %% tags=["engine"]
#| export
def _read_jobs(jobs: list[tuple[str, str, str, tuple[str, ...]]]) -> list[list[Document] | Problem]:
    """What a worker does: extract the documents of some files, or say why it could not."""
    results: list[list[Document] | Problem] = []
    for job in jobs:
        try:
            results.append(_read_python(*job))
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            results.append(Problem(job[1], getattr(error, "lineno", None), _reason(error)))
    return results


# %% [markdown] tags=["engine"]
# Parsing keeps a processor busy, so we hand files to several processes. Three traps lie here.
# Workers finish in a random order. Forking a process that has threads, as every notebook has, can
# deadlock, so workers are *spawned*: started fresh, on every system. And a spawned worker first
# runs its parent's script once more, unless the author guarded it by `if __name__ == "__main__"`.
# Our workers need nothing of that script, so we hide it while they start.


# %% tags=["engine"]
#| export
@contextmanager
def without_main_script() -> Iterator[None]:
    """Keep workers that start now from running the caller's script once more."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


# %% [markdown] tags=["engine"]
# Results are taken in the order of the jobs. A worker may be killed, when memory runs out for
# instance; then this process does its work.


# %% tags=["engine"]
#| export
def ordered_map(function: Callable[[Any], Any], jobs: list[Any], workers: int) -> Iterator[Any]:
    """Like ``map``, with ``workers`` processes; in this one where others are impossible."""
    if not isinstance(jobs, list):
        raise ValueError(f"jobs: expected a list, got {jobs!r:.60}")
    if workers is None:
        raise ValueError("workers: expected a whole number, got None")
    check_at_least(workers=(1, workers))
    if (
        workers == 1
        or function.__module__ == "__main__"
        or multiprocessing.current_process().daemon
    ):
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        with without_main_script():
            futures = [pool.submit(function, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:  # a worker was killed, for memory perhaps
                yield function(job)
    finally:
        pool.shutdown(cancel_futures=True)


# %% [markdown] tags=["engine"]
# Functions typed into a notebook cannot be found by a worker, so here they run alone; the exported
# ones run in parallel. Now the reader itself:

# %% tags=["engine"]
#| export
KINDS = ("docstring", "comment", "readme")


def read_installed_docs(
    packages: str | Iterable[str] = "stdlib",
    *,
    kinds: Collection[str] = KINDS,
    workers: int | None = None,
    errors: str = "skip",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Read docstrings, comments and READMEs of installed ``packages``; nothing is imported.

    A package is "stdlib", a module (``json``) or a distribution (``scikit-learn``). Folders named
    test or tests are left out. A file that several packages share is read for the first of them.
    Documents come by package (its README first), path and line, whatever ``workers`` is; by
    default several processes read a large job, one a small job.
    ``metadata`` holds kind, path, line, and the qualified name that a docstring belongs to.
    """
    listed = [packages] if isinstance(packages, str) else packages
    names = sorted({check_text(name, "packages") for name in listed})
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not chosen or not set(chosen) <= set(KINDS):
        raise ValueError(f"kinds: expected some of {KINDS}, got {kinds!r}")
    check_at_least(workers=(1, workers))
    _check_errors(errors)
    if not names:
        raise ValueError("packages: expected at least one, got none")
    own, owners = _own_report(report), cache(importlib.metadata.packages_distributions)
    places = {name: _locate(name, owners) for name in names}
    found = _read_packages(places, chosen, workers, errors, own)
    return _deliver(found, own, f"packages={names}", quiet=report is not None)


# %% [markdown] tags=["engine"]
# A large job is one of more than 8 MB of code: below that, starting processes takes longer than it
# saves.


# %% tags=["engine"]
#| export
def _readme(package: str, distribution: str | None) -> Iterator[Document]:
    """Yield the long description of a distribution, which is its README."""
    text = distribution and importlib.metadata.metadata(distribution).json.get("description")
    if isinstance(text, str) and text.strip():
        about = {"kind": "readme", "path": f"{package}/README", "line": 1, "name": distribution}
        yield Document(text.strip(), f"{package}/README:1", package, about)


# %% [markdown] tags=["engine"]
# Files are listed first, sorted by name; their total size decides about processes.


# %% tags=["engine"]
#| export
def _read_packages(
    places: dict[str, tuple[list[Path], str | None]],
    kinds: tuple[str, ...],
    workers: int | None,
    errors: str,
    report: ReadReport,
) -> Iterator[Document]:
    files: dict[str, list[tuple[str, Path]]] = {}
    seen: set[Any] = set()  # one package may be asked for by two names
    for package, (roots, _) in places.items() if set(kinds) != {"readme"} else ():
        inside = (_python_files(p, package if package == "stdlib" else p.name) for p in roots)
        files[package] = sorted(f for each in inside for f in each if f[1] not in seen)
        seen |= {path for _, path in files[package]}
    size = sum(path.stat().st_size for found in files.values() for _, path in found)
    workers = workers or (min(4, os.cpu_count() or 1) if size > 8e6 else 1)
    jobs = [(package, name, str(path), kinds) for package in files for name, path in files[package]]
    chunks = [jobs[i : i + 16] for i in range(0, len(jobs), 16)]
    results = (r for chunk in ordered_map(_read_jobs, chunks, workers) for r in chunk)
    for package, (_, distribution) in places.items():
        if "readme" in kinds and distribution not in seen:
            yield from _readme(package, distribution)
            seen.add(distribution)
        for _ in files.get(package, ()):
            report.files += 1
            result = next(results)
            if isinstance(result, Problem):
                report.add(result, errors)
            else:
                yield from result


# %% [markdown]
# ### The corpus of this book
#
# {py:func}`~llmbook.corpus.read_installed_docs` finds the files of any installed package and reads
# them, in the package with several processes, in the same order every time. (In this notebook one
# process reads them.) Three packages are enough for a corpus. Every count depends on what is
# installed, so we print limits, not counts.

# %%
import math
import time

import matplotlib.pyplot as plt

plt.style.use("llmbook.book")

packages, report = ["stdlib", "numpy", "matplotlib"], ReadReport()
start = time.perf_counter()
corpus = list(read_installed_docs(packages, report=report))
seconds_alone = time.perf_counter() - start
characters = sum(len(document.text) for document in corpus)
ids = {document.id for document in corpus}
assert len(corpus) > 25_000 and characters > 5_000_000 and report.files > 500
print("more than 25,000 documents with 5 million characters, from more than 500 files")
print(f"problems: {len(report.problems)}, ids that occur twice: {len(corpus) - len(ids)}")

# %% [markdown]
# Here is one of them, as it is stored:

# %%
example = next(d for d in corpus if d.metadata["name"] == "JSONDecoder.raw_decode")
print(example.id, example.source, example.metadata["kind"], sep=" | ")
print(example.text)


# %% [markdown]
# A mistyped name is the likeliest bad input of all, so the error helps:

# %%
try:
    read_installed_docs("matplotlob")
except ValueError as error:
    print(error)

# %% [markdown]
# ## Files that others send you
#
# Bytes do not say what they mean. `C3 A9` is `é` in UTF-8 and `Ã©` in Latin-1; both readings
# succeed, one is right. A **byte-order mark** at the start names the encoding. A zero byte near
# the start means that this is no text but a picture or a program; only UTF-16 and UTF-32 text
# contains one. Everything else is decoded as UTF-8 unless the caller says otherwise, *strictly*:
# text in another encoding hardly ever passes for UTF-8, so a failure is information.


# %%
#| export
_MARKS = {  # longest first: UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(check_text(encoding, "encoding"))
    except LookupError:  # no such encoding, or one like base64 that is not of text
        raise ValueError(f"encoding: expected one that Python knows, got {encoding!r}") from None


def decode_text(data: bytes, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Decode a text file: by its byte-order mark, which is removed, else by ``encoding``.

    Lines end in ``\\n`` in the result. A ``ValueError`` says that the data is binary, or, unless
    ``errors`` is "replace", which byte cannot be decoded.

    >>> decode_text(b"\\xef\\xbb\\xbfcaf\\xc3\\xa9\\r\\n")
    'café\\n'
    """
    _check_encoding(encoding)
    for mark, marked in _MARKS.items():
        if data.startswith(mark):
            return _unix_lines(data[len(mark) :].decode(marked, errors))
    if b"\0" in data[:8192] and codecs.lookup(encoding).name[:6] not in ("utf-16", "utf-32"):
        raise ValueError("binary: a zero byte near the start")
    return _unix_lines(data.decode(encoding, errors))


# %% [markdown]
# The same word in three encodings, and a picture's first bytes:

# %%
cases = {
    "UTF-8 with mark": "naïve".encode("utf-8-sig"),
    "UTF-16 with mark": "naïve".encode("utf-16"),
    "Latin-1": "naïve".encode("latin-1"),
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
}
for name, data in cases.items():
    try:
        print(f"{name:16}", decode_text(data))
    except ValueError as error:
        print(f"{name:16}", error)

# %% [markdown] tags=["engine"]
# ### Engine room: compressed files, and those that were cut off

# %% [markdown] tags=["engine"]
# Large collections are stored compressed. Python reads gzip, bzip2 and xz itself and complains
# when such a file ends too early. Zstandard, today's usual choice, needs a package, whose file
# reader returns what it has and keeps silent. So we feed its decompressor ourselves and ask at the
# end whether it was finished.


# %% tags=["engine"]
#| export
def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Yield the contents of a Zstandard file; ``EOFError`` where it was cut off."""
    with requires_extra("Zstandard", extra="scale"):
        import zstandard
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # as zstd --long=31 needs
    frame, data = decompressor.decompressobj(), b""
    with path.open("rb") as file:
        while data or (data := file.read(1 << 16)):
            if frame.eof:  # one file may hold several frames, one after another
                frame = decompressor.decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            data = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("compressed file ended before the end-of-stream marker was reached")


# %% [markdown] tags=["engine"]
# Anything that yields bytes can be made a file, by this adapter. Then the suffix decides which
# opener to use.


# %% tags=["engine"]
#| export
class _Chunks(io.RawIOBase):
    """A file whose contents come from an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._ready = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._ready = chunk
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(_Chunks(_zstd_chunks(path))),
}
_BROKEN_FILE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what opening and reading may raise


def _open(path: Path) -> io.BufferedIOBase:
    """Open a file for reading bytes, decompressed if its suffix says that it is compressed."""
    opener = _OPENERS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")


# %% [markdown] tags=["engine"]
# A file of which half is missing, read by the package and by us:

# %% tags=["engine"]
import tempfile

import zstandard

digits = "".join(map(str, range(200_000))).encode()
whole = zstandard.ZstdCompressor().compress(digits)
with tempfile.TemporaryDirectory() as place:
    half = Path(place, "half.zst")
    half.write_bytes(whole[: len(whole) // 2])
    with zstandard.open(half) as file:
        read = len(file.read())
    assert read < len(digits)
    print("zstandard.open: returns a part of the text and does not complain")
    try:
        _open(half).read()
    except EOFError as error:
        print("ours:", error)

# %% [markdown]
# ### One document a line: JSON Lines
#
# A folder of a million small files is slow to list, to copy and to read. The usual answer is
# **JSON Lines**: one JSON object on each line, compressed as a whole. It can be split at any line
# and read without knowing its end. A damaged line damages nothing but itself, because a line break
# inside a text is written `\n`.
#
# Three documents of our corpus, written and read by hand:

# %%
lines = [json.dumps(vars(document)) for document in corpus[:3]]
for line in lines:
    print(line[:70], "...", len(line), "characters")
assert [Document(**json.loads(line)) for line in lines] == corpus[:3]


# %% [markdown] tags=["engine"]
# ### Engine room: `read_jsonl`, `write_jsonl`, and files that appear whole or not at all

# %% [markdown] tags=["engine"]
# A record's text is in `text`, its id in `id`, unless you say otherwise; its other fields become
# metadata. Whatever may be wrong with a record is one `ValueError`.


# %% tags=["engine"]
#| export
@dataclass
class _Rows:
    """How the rows of a table become documents, and where those that cannot are noted."""

    text_field: str
    id_field: str
    errors: str
    report: ReadReport

    def document(self, row: Any, fallback_id: str, source: str) -> Document:
        if isinstance(row, Exception):
            raise row
        if not isinstance(row, dict) or self.text_field not in row:
            found = f"fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"expected text in a field {self.text_field!r}, got {found}")
        text, id = row[self.text_field], row.get(self.id_field)
        if not isinstance(text, str):
            raise ValueError(f"{self.text_field}: expected text, got {type(text).__name__}")
        if id is not None and type(id) not in (str, int):
            raise ValueError(f"{self.id_field}: expected text or an int, got {type(id).__name__}")
        rest = {k: v for k, v in row.items() if k not in (self.text_field, self.id_field)}
        source = rest.pop("source") if isinstance(rest.get("source"), str) else source
        if isinstance(rest.get("metadata"), dict):
            rest = {**rest.pop("metadata"), **rest}
        id = fallback_id if id in (None, "") else str(id)
        if self.errors == "replace":
            text, id, source = (re.sub("[\ud800-\udfff]", "\ufffd", t) for t in (text, id, source))
        return Document(text, id, source, rest)

    def note(self, name: str, number: int | None, error: Exception) -> None:
        self.report.add(Problem(name, number, _reason(error)), self.errors)


# %% [markdown] tags=["engine"]
# The reader goes line by line, so a file may be larger than memory. One that breaks off gives all
# that came before, and a problem.


# %% tags=["engine"]
#| export
def _read_jsonl(path: Path, name: str, rows: _Rows) -> Iterator[Document]:
    number = 0
    handling = "replace" if rows.errors == "replace" else "strict"
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8", handling)
                    document = rows.document(json.loads(text.rstrip()), f"{name}:{number}", name)
                except (ValueError, RecursionError) as error:
                    rows.note(name, number, error)
                else:
                    yield document
    except _BROKEN_FILE as error:
        rows.note(name, number or None, error)


# %% [markdown] tags=["engine"]
# A program that is killed while it writes leaves a file that looks finished. `whole_file`, from
# {doc}`00_environment`, writes to a temporary name in the same folder and renames at the end.


# %% tags=["engine"]
#| export
def _compressor(raw: Any, suffix: str) -> Any:
    """Return a file that compresses what is written to it into ``raw``, as ``suffix`` asks."""
    if suffix == ".gz":  # no name and no date inside: the same documents give the same bytes
        return gzip.GzipFile("", "wb", 6, raw, mtime=0)
    if suffix == ".bz2":
        return bz2.open(raw, "wb")
    if suffix == ".xz":
        return lzma.open(raw, "wb")
    if suffix == ".zst":
        with requires_extra("Zstandard", extra="scale"):
            import zstandard
        return zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
    return nullcontext(raw)


# %% [markdown] tags=["engine"]
# We write UTF-8 rather than `\u00e9` escapes, which would make Russian three times as long, and
# refuse numbers that JSON has no word for (infinity).


# %% tags=["engine"]
#| export
def _as_json(document: Document, value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"documents: JSON cannot hold {document.id!r}: {error}") from error


def write_jsonl(documents: Iterable[Document], path: str | Path) -> int:
    """Write JSON Lines, compressed as the suffix says (.gz, .bz2, .xz, .zst); return how many.

    The file appears complete or not at all. A ``ValueError`` names a document whose metadata JSON
    cannot hold; tuples come back as lists, keys that are numbers as strings.
    """
    path, count = check_path(path), 0
    whole, suffix = whole_file(path), path.suffix.lower()
    with whole as draft, draft.open("wb") as raw, _compressor(raw, suffix) as file:
        for document in iter_documents(documents):
            file.write(_as_json(document, vars(document)) + b"\n")
            count += 1
        if not count:
            raise ValueError("documents: expected at least one to write, got none")
    return count


# %% [markdown] tags=["engine"]
# The reader of the public interface is a line: what it shares with Parquet comes next.


# %% tags=["engine"]
#| export
def read_jsonl(
    paths: str | Path | Iterable[str | Path],
    *,
    text_field: str = "text",
    id_field: str = "id",
    errors: str = "skip",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Read JSON Lines lazily, compressed or not (.gz, .bz2, .xz, .zst), UTF-8.

    Fields other than text, id and source go into the metadata, and so do the contents of a field
    "metadata". A record without an id gets ``file:line``. Bad lines are reported with their number.
    """
    return _read_tables(paths, _read_jsonl, text_field, id_field, errors, report)


# %% [markdown] tags=["engine"]
# A mistyped name must fail where it was typed, so the files are looked for first.


# %% tags=["engine"]
#| export
def existing_paths(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return ``paths`` as a list of paths that exist."""
    listed = paths if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
    found = [check_path(path, "paths") for path in listed]
    if not found:
        raise ValueError("paths: expected at least one, got none")
    for path in found:
        if not path.exists() and not path.is_symlink():
            raise FileNotFoundError(f"paths: no file or folder {str(path)!r}")
    return found


# %% [markdown] tags=["engine"]
# Names are relative to the folder that contains all the files, so they differ when the files do.


# %% tags=["engine"]
#| export
def _base(paths: list[Path]) -> tuple[Path, list[Path]]:
    """Return the folder that contains all ``paths``, and them as absolute paths."""
    here = [Path(os.path.normpath(Path.cwd() / path)) for path in paths]
    return Path(os.path.commonpath([p if p.is_dir() else p.parent for p in here])), here


def _portable(path: Path) -> str:
    """Return a path as text that is the same everywhere; bytes that are no UTF-8 as ``\\xff``."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _read_tables(
    paths: Any, reader: Any, text_field: str, id_field: str, errors: str, report: ReadReport | None
) -> Iterator[Document]:
    _check_errors(errors)
    check_text(text_field, "text_field")
    check_text(id_field, "id_field")
    files = existing_paths(paths)
    for path in files:
        if path.is_dir():
            raise ValueError(f"paths: expected files, got the folder {str(path)!r}: see read_files")
    base, real = _base(files)
    names = [_portable(path.relative_to(base)) for path in real]
    own = _own_report(report)
    own.files += len(files)
    rows = _Rows(text_field, id_field, errors, own)
    documents = (
        d for path, name in zip(files, names, strict=True) for d in reader(path, name, rows)
    )
    return _deliver(documents, own, f"paths={names}", quiet=report is not None)


# %% [markdown]
# ### A damaged file
#
# `write_jsonl` and `read_jsonl` do the same with compression, with names of fields, and with a
# report of what could not be read. We write our corpus, damage the file in two places, and read it
# back.

# %%
import tempfile

folder = Path(tempfile.mkdtemp())
write_jsonl(corpus, folder / "docs.jsonl.gz")
assert list(read_jsonl(folder / "docs.jsonl.gz")) == corpus, "all documents come back"

lines = gzip.decompress((folder / "docs.jsonl.gz").read_bytes()).splitlines(keepends=True)[:1000]
lines[41] = lines[41][:20] + b"\n"  # cut short
lines[76] = b'{"text": "caf\xe9"}\n'  # Latin-1
(folder / "damaged.jsonl").write_bytes(b"".join(lines))
report = ReadReport()
print(len(list(read_jsonl(folder / "damaged.jsonl", report=report))), "documents")
for problem in report.problems:
    print(str(problem).rpartition(": ")[0])  # the last part is Python's, and differs by version

# %% [markdown]
# Line numbers, as an editor counts them; 998 documents are safe.
#
# ### Columns: Parquet
#
# If only the lengths of a billion documents are wanted, JSON Lines must be read in full.
# **Parquet** stores a table by columns, in groups of rows, with an index at the end: a reader can
# fetch one column, or one group, and skip the rest. Hubs serve data sets in it. Metadata differ
# from document to document while a Parquet column has one type, so our writer stores them as JSON.


# %% [markdown] tags=["engine"]
# ### Engine room: `read_parquet` and `write_parquet`, batch by batch

# %% [markdown] tags=["engine"]
# A reader takes a batch of rows at a time, and hands each row to the code that makes documents of
# JSON records.


# %% tags=["engine"]
#| export
def _read_parquet(path: Path, name: str, rows: _Rows) -> Iterator[Document]:
    with requires_extra("Parquet", extra="scale"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in _batch_rows(batch, rows.errors):
                    number += 1
                    try:
                        document = rows.document(_unpacked(row), f"{name}:{number}", name)
                    except ValueError as error:
                        rows.note(name, number, error)
                    else:
                        yield document
    except (OSError, pa.ArrowException) as error:
        rows.note(name, number or None, error)


# %% [markdown] tags=["engine"]
# Other programs may have written metadata that are no JSON (they stay a string) or bytes that are
# no UTF-8. One such row must not cost us its batch, so then rows are taken one by one.


# %% tags=["engine"]
#| export
def _batch_rows(batch: Any, errors: str) -> Iterator[Any]:
    """Yield the rows of a batch as dictionaries, or the error in place of one."""
    import pyarrow as pa

    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:  # raised before the first row comes
        as_bytes = [f.with_type(pa.binary()) if f.type == pa.string() else f for f in batch.schema]
    for i in range(batch.num_rows):
        one = pa.Table.from_batches([batch.slice(i, 1)])
        try:
            if errors == "replace":
                (row,) = one.cast(pa.schema(as_bytes)).to_pylist()
                text = {k: v.decode("utf-8", errors) for k, v in row.items() if type(v) is bytes}
                yield {**row, **text}
            else:
                yield one.to_pylist()[0]
        except ValueError as error:
            yield error


def _unpacked(row: Any) -> Any:
    """Return ``row`` with metadata that ``write_parquet`` has packed into JSON as a dictionary."""
    try:
        return {**row, "metadata": json.loads(row["metadata"])}
    except (KeyError, TypeError, ValueError):
        return row


# %% [markdown] tags=["engine"]
# The public functions follow JSON Lines.


# %% tags=["engine"]
#| export
def read_parquet(
    paths: str | Path | Iterable[str | Path],
    *,
    text_field: str = "text",
    id_field: str = "id",
    errors: str = "skip",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Read Parquet lazily, a batch of rows at a time; columns become fields as in ``read_jsonl``.

    Rows count from 1, in problems as in the ids of rows without one. Columns of dates become
    metadata that ``write_jsonl`` refuses: JSON has none. Needs pyarrow.
    """
    return _read_tables(paths, _read_parquet, text_field, id_field, errors, report)


# %% [markdown] tags=["engine"]
# Writing goes by groups of rows. Each group is made a table, compressed, and forgotten.


# %% tags=["engine"]
#| export
def write_parquet(documents: Iterable[Document], path: str | Path, row_group: int = 10_000) -> int:
    """Write text, id, source and metadata (as JSON), ``row_group`` rows at a time; return how many.

    The file appears complete or not at all. Needs pyarrow.
    """
    with requires_extra("Parquet", extra="scale"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    names, count = ("text", "id", "source", "metadata"), 0
    schema = pa.schema([(name, pa.string()) for name in names])
    if row_group is None:
        raise ValueError("row_group: expected a whole number, got None")
    check_at_least(row_group=(1, row_group))
    with (
        whole_file(path) as draft,
        pq.ParquetWriter(draft, schema, compression="zstd") as file,
    ):
        for group in _groups(iter_documents(documents), row_group):
            count += len(group)
            rows = [{**vars(d), "metadata": _as_json(d, d.metadata).decode()} for d in group]
            file.write_table(pa.Table.from_pylist(rows, schema))
        if not count:
            raise ValueError("documents: expected at least one to write, got none")
    return count


# %% [markdown] tags=["engine"]
# The groups are cut from the stream of documents:


# %% tags=["engine"]
#| export
def _groups(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


# %% [markdown]
# ### What the formats cost
#
# Compared with the uncompressed file, all three take a fifth; choose by how you read, not by size.

# %%
write_jsonl(corpus, folder / "docs.jsonl")
write_jsonl(corpus, folder / "docs.jsonl.zst")
write_parquet(corpus, folder / "docs.parquet")
sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("docs.*"))}
whole_size = sizes.pop("docs.jsonl")
for name, size in sizes.items():
    print(f"{name:14} {size / whole_size:.1f} of the uncompressed file")

# %% [markdown]
# ## Web pages
#
# A web page is a text wrapped in a menu, a banner about cookies, suggestions what to read next, a
# footer. {numref}`fig-corpus-page` shows the parts of one that we bake ourselves.
#
# ```{figure} ../figures/corpus-page.svg
# :name: fig-corpus-page
# :alt: A web page as boxes with their share of linked text. Menu 100 percent, cookie banner 25, headline and paragraphs 0 to 12, suggestions 100, footer 45. Only headline and paragraphs are the document.
#
# A page and its blocks, with the share of each block's characters that are links. The part that
# one wants is long and hardly linked.
# ```

# %% [markdown]
# We write the page ourselves. It has everything that makes real ones hard:

# %%
page = """<!doctype html>
<html lang="en"><head><title>How bread rises</title><style>p > a { color: red }</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/r">Recipes</a></li>
<li><a href="/s">Shop</a></li></ul></nav>
<div class="cookie-banner">This page uses cookies, and the usual kind, not the kind made of flour
and butter,
<a href="/cookies">as we explain at length here</a>.</div>
<main><h1>How bread rises</h1>
<p>Yeast eats the sugar in the flour and breathes out carbon dioxide, which stays behind as bubbles
in the dough.
<p>Warm dough rises fast. Cold dough rises slowly but <a href="/t">tastes better</a>, so many bakers
mix it in the
evening &amp; bake in the morning.
<pre>flour   500 g
water   350 g</pre>
<p>Salt slows the yeast down and makes the gluten tighter, so weigh it: two percent of the flour is
usual.</p></main>
<aside><h3>More</h3><ul><li><a href="/a">Ten loaves for lazy people</a></li>
<li><a href="/b">Is your oven lying to you?</a></li></ul></aside>
<script>if (1 < 2) { track("visitor"); }</script>
<footer>&copy; The corner bakery. <a href="/i">Imprint</a> <a href="/p">Privacy</a></footer>
</body></html>"""

print(" ".join(re.sub("<[^>]*>", "", page).split())[:300])

# %% [markdown]
# That was the naive way: delete everything between `<` and `>`. The result begins with the style
# sheet, runs menu entries into one another, and holds a piece of the script. HTML needs a parser.
# Python's `html.parser` calls a method for every tag and every piece of text. We cut the page into
# **blocks** at the tags that begin a new line on the screen, skip what is never shown, and note
# how much of each block is inside links.


# %%
#| export
class Block(NamedTuple):
    """A stretch of a page between two line breaks, and the share of its characters inside links."""

    text: str
    link_share: float


_HIDDEN = ("script", "style", "template", "title", "noscript")
_INLINE = set(
    "a abbr b bdi bdo br cite code del em font i img ins kbd label mark q s samp small span strong "
    "sub sup time tt u var wbr".split()
)


# %% [markdown]
# The parser's methods follow. Inside of `pre`, white space is kept; elsewhere any amount of it is
# one space, as in a browser.


# %%
#| export
class _BlockParser(HTMLParser):
    """Collects the visible text of a page in ``blocks``."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self._open: set[str] = set()  # the elements that we are inside of
        self._text, self._linked = list[str](), 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in _INLINE:
            self.end_block()
        if tag == "br":
            self.handle_data("\n" if "pre" in self._open else " ")
        elif tag != "a" or "href" in dict(attrs):  # without one it is a target, not a link
            self._open.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _INLINE:
            self.end_block()
        self._open.discard(tag)

    def handle_data(self, data: str) -> None:
        if self._open.isdisjoint(_HIDDEN):
            self._text.append(data)
            self._linked += len("".join(data.split())) if "a" in self._open else 0

    def end_block(self) -> None:
        text = "".join(self._text)
        size = len("".join(text.split()))
        if size:
            text = text.strip("\n") if "pre" in self._open else " ".join(text.split())
            self.blocks.append(Block(text, self._linked / size))
        self._text, self._linked = [], 0


# %% [markdown]
# Which blocks are the text? Kohlschütter and colleagues {cite}`kohlschutter2010boilerplate` found
# that two features go a long way: the number of words in a block and its share of linked text, for
# the block and its neighbors. In the simplest form: a block is *good* if it has at least ten words
# and at most a third of it is linked. We keep good blocks, and unlinked short ones beside a good
# one, since a headline is short.


# %%
#| export
def html_blocks(page: str) -> list[Block]:
    """Cut a page into its visible blocks, in order.

    >>> html_blocks("<h1>Bread</h1><p>rises <a href='/w'>fast</a>")
    [Block(text='Bread', link_share=0.0), Block(text='rises fast', link_share=0.4444444444444444)]
    """
    parser = _BlockParser()
    parser.feed(page)
    parser.close()
    parser.end_block()
    return parser.blocks


def html_to_text(page: str, main_content: bool = True) -> str:
    """Return the text of a page, unless told otherwise of its main content, by a transparent rule.

    A block is kept if at most a third of it is linked and it, or a block next to it, has ten
    words or more and is as little linked. Blocks are separated by an empty line. For work, take
    ``read_html``. Source: Kohlschütter et al. (2010), simplified.
    """
    blocks = html_blocks(page)
    if main_content:
        plain = [block.link_share <= 1 / 3 for block in blocks]
        good = [p and len(block.text.split()) >= 10 for p, block in zip(plain, blocks, strict=True)]
        keep = [p and any(good[max(i - 1, 0) : i + 2]) for i, p in enumerate(plain)]
        blocks = [block for block, kept in zip(blocks, keep, strict=True) if kept]
    return "\n\n".join(block.text for block in blocks)


# %% [markdown]
# On our page the rule finds the text, with its headline and the two lines of `pre`. It is also
# fooled twice: by the cookie banner, which is long, hardly linked and no part of the text, and by
# the little headline `More`, because it stands beside the last paragraph.

# %%
for block in html_blocks(page):
    kept = block.text in html_to_text(page)
    print(
        f"{'keep' if kept else 'drop'}  {100 * block.link_share:3.0f} % linked  {block.text[:44]!r}"
    )

# %% [markdown]
# The remedy is to look at more: at the names of elements (`nav`, `aside`) and at their classes.
# The exported reader leaves that to Resiliparse, from the makers of the ChatNoir search engine
# {cite}`bevendorff2018chatnoir`. Given bytes, it must know their encoding. What is valid UTF-8 is
# read as UTF-8, whatever the page declares. Otherwise the declaration decides, and if there is
# none, the statistics of the bytes. Declarations mean what browsers take them for
# {cite}`whatwg2026encoding`: a page that claims to be Latin-1 is Windows-1252.


# %% [markdown] tags=["engine"]
# ### Engine room: `read_html`, for any encoding, and for pages that would stop a crawl

# %% [markdown] tags=["engine"]
# Pages name encodings by 228 labels, and programs have always taken some of them for more than they
# say: `shift_jis` for Microsoft's extension of it, `euc-kr` for `cp949`. The Encoding Standard has
# the table, and the package `webencodings` has the standard's table. What is left to us are four
# differences between Python's decoders and those of the standard. The code pages of Windows leave a
# few bytes undefined, which the standard takes for control characters, and KOI8-U and Windows-1255
# lack three letters. So we make a table of 256 characters for each encoding with one byte a
# character; U+FFFE in it means that there is none.


# %% tags=["engine"]
#| export
_LETTERS_LACKING = {"koi8-u": {0xAE: "ў", 0xBE: "Ў"}, "windows-1255": {0xCA: "\u05ba"}}


@cache
def _byte_table(name: str) -> str:
    """Return the character of each byte in an encoding of the standard with one byte for each."""
    import webencodings

    decode = webencodings.lookup(name).codec_info.decode
    table = [decode(bytes([byte]), "replace")[0] for byte in range(256)]
    for byte in [byte for byte, character in enumerate(table) if character == "\ufffd"]:
        control = name.startswith("windows") and 0x80 <= byte < 0xA0
        table[byte] = chr(byte) if control else "\ufffe"
    for byte, letter in _LETTERS_LACKING.get(name, {}).items():
        table[byte] = letter
    return "".join(table)


# %% [markdown] tags=["engine"]
# The other two concern Chinese and Japanese. GBK is part of GB 18030, whose decoder knows more. And
# Japanese pages use characters of NEC and IBM that Python knows in `cp932` only, the code page of
# Windows, such as ① and ㈱. All Japanese encodings number the same table of 94 rows by 94 cells;
# they write the numbers in different ways. So a pair of bytes of EUC-JP can be rewritten as a pair
# of `cp932`.


# %% tags=["engine"]
#| export
_EUC_JP = re.compile(
    rb"(?:[\xa1-\xfe]{2})+|\x8f[\xa1-\xfe]{2}|\x8e[\xa1-\xdf]|[\x00-\x8d\x90-\xa0]+|.", re.DOTALL
)


def _as_cp932(pairs: bytes) -> bytes:
    """Rewrite pairs of bytes of EUC-JP, from A1 to FE each, as pairs of Windows' code page."""
    rewritten = bytearray()
    for row, cell in zip(pairs[::2], pairs[1::2], strict=True):
        lead, trail = divmod(94 * (row - 0xA1) + cell - 0xA1, 188)
        rewritten.append(lead + (0x81 if lead < 0x1F else 0xC1))
        rewritten.append(trail + (0x40 if trail < 0x3F else 0x41))
    return bytes(rewritten)


def _decode_euc_jp(data: bytes, errors: str) -> str:
    pieces = []
    for piece in _EUC_JP.findall(data):
        if piece[0] >= 0xA1 and len(piece) > 1:
            pieces.append(_as_cp932(piece).decode("cp932", errors))
        else:  # ASCII, half-width syllables (8E), and the rare characters of JIS X 0212 (8F)
            pieces.append(piece.decode("euc-jp", errors))
    return "".join(pieces)


# %% [markdown] tags=["engine"]
# ISO-2022-JP writes the same numbers in bytes of ASCII, and says by escape sequences where they
# begin and end. This is why such a page is valid UTF-8, and nonsense.


# %% tags=["engine"]
#| export
_HIGH = bytes(byte | 0x80 if 0x21 <= byte <= 0x7E else byte for byte in range(256))


def _decode_iso_2022_jp(data: bytes, errors: str) -> str:
    first, *rest = re.split(rb"\x1b(\$[@B]|\([BIJ])", data)
    pieces = [first.decode("ascii", errors)]
    for escape, part in zip(rest[::2], rest[1::2], strict=True):
        if escape.startswith(b"$"):  # the table of 94 rows
            pieces.append(_decode_euc_jp(part.translate(_HIGH), errors))
        elif escape == b"(I":  # half-width syllables
            pieces.append(part.translate(_HIGH).decode("cp932", errors))
        else:  # ASCII, or (J) ASCII with a yen sign and an overline
            yen = {0x5C: "¥", 0x7E: "\u203e"} if escape == b"(J" else {}
            pieces.append(part.decode("ascii", errors).translate(yen))
    return "".join(pieces)


# %% [markdown] tags=["engine"]
# One function knows who decodes what. The standard forbids a few old encodings, in which attacks
# can be hidden: their label means *replacement*, and the whole page becomes a single U+FFFD.


# %% tags=["engine"]
#| export
_MULTIBYTE = ("utf-8", "utf-16le", "utf-16be", "big5", "euc-kr", "gb18030", "gbk", "shift_jis")


def _decode_by_label(data: bytes, label: str, errors: str) -> str:
    """Decode as the WHATWG Encoding Standard says for ``label``, which is one of its labels."""
    import webencodings

    encoding = webencodings.lookup(label)
    name = encoding.name
    if name == "replacement":
        if errors == "strict":
            raise ValueError(f"{label}: an encoding that browsers refuse to read")
        return "\ufffd" if data else ""
    try:
        if name == "euc-jp":
            return _decode_euc_jp(data, errors)
        if name == "iso-2022-jp":
            return _decode_iso_2022_jp(data, errors)
    except UnicodeDecodeError as error:  # of a piece, so that its position would mislead
        byte = error.object[error.start]
        raise ValueError(f"not {name}: byte {byte:#04x} cannot be decoded") from None
    if name in _MULTIBYTE:
        return data.decode("gb18030" if name == "gbk" else encoding.codec_info.name, errors)
    return codecs.charmap_decode(data, errors, _byte_table(name))[0]


# %% [markdown] tags=["engine"]
# A declaration stands in a `meta` element among the first 1,024 bytes, or else in an XML
# declaration. A label that the standard does not have counts for nothing. A page whose declaration
# can be read byte by byte is not UTF-16, so that label is taken for UTF-8.


# %% tags=["engine"]
#| export
_DECLARATIONS = (
    re.compile(rb"""(?i)<meta[\s/][^>]*?charset\s*=\s*["']?\s*([^\s"'/>;]+)"""),
    re.compile(rb"""(?i)\A\s*<\?xml\s[^>]*?encoding\s*=\s*["']([^"'>]+)"""),
)


def _declared_encoding(data: bytes) -> str | None:
    """Return the label that the page declares, if it is one of the standard's, else None."""
    import webencodings

    start = re.sub(rb"(?s)<!--.*?(-->|\Z)", b"", data[:1024])
    for pattern in _DECLARATIONS:
        for found in pattern.findall(start):
            label = found.decode("latin-1")
            if encoding := webencodings.lookup(label):
                instead = {"utf-16le": "utf-8", "utf-16be": "utf-8"}
                instead["x-user-defined"] = "windows-1252"  # by the standard of HTML
                return instead.get(encoding.name, label)
    return None


# %% [markdown] tags=["engine"]
# The encoding is found in the order that was described above. One case is left: what hides behind
# bytes of ASCII is valid UTF-8, so there the declaration comes first, and ISO-2022-JP is known by
# its escape sequences.


# %% tags=["engine"]
#| export
def _decode_html(data: bytes, errors: str) -> str:
    import webencodings
    from resiliparse.parse.encoding import detect_encoding

    handling = "replace" if errors == "replace" else "strict"
    if data.startswith(tuple(_MARKS)):
        return decode_text(data, errors=handling)
    if re.match(rb"\s*<[!?a-zA-Z]", data):
        data = data.replace(b"\0", b"")  # stray zero bytes, which browsers drop, too
    label = _declared_encoding(data)
    if data.isascii():
        if label is None and re.search(rb"\x1b\$[@B]", data):
            label = "iso-2022-jp"
        if label and webencodings.lookup(label).name in ("iso-2022-jp", "replacement"):
            return _unix_lines(_decode_by_label(data, label, handling))
    try:
        return decode_text(data)
    except UnicodeDecodeError:
        label = label or detect_encoding(data)
        if label is None or webencodings.lookup(label) is None:
            label = "windows-1252"
        return _unix_lines(_decode_by_label(data, label, handling))


# %% [markdown] tags=["engine"]
# The time to find the main content grows with the square of how deeply tags are nested, so one
# hostile page could stop a crawl. We look at the depth first.


# %% tags=["engine"]
#| export
_NEVER_DEEP = set(
    "a area base br col dd dt hr img input li link meta option p source tbody td tfoot th thead tr "
    "wbr".split()
)  # elements without an end tag, or that end where the next one begins


def _depth(page: str) -> int:
    """Return about how many elements are open where most are."""
    depth, deepest, opened = 0, 0, Counter[str]()
    for end, tag in re.findall(r"<(/?)([a-zA-Z][^\s/>]*)", page):
        if (name := tag.lower()) not in _NEVER_DEEP and (not end or opened[name]):
            step = -1 if end else 1
            opened[name] += step
            depth += step
            deepest = max(deepest, depth)
    return deepest


def _about_page(tree: Any, main_content: bool) -> dict[str, Any]:
    root = tree.document.query_selector("html") if tree.document else None
    language = (root.getattr("lang") if root is not None else None) or ""
    title = (tree.title or "").strip()
    return {"kind": "html", "title": title, "language": language, "main_content": main_content}


# %% [markdown] tags=["engine"]
# The reader puts the pieces together, and says in the metadata what it did.


# %% tags=["engine"]
#| export
def read_html(
    page: str | bytes | Path, *, main_content: bool = True, id: str = "", errors: str = "replace"
) -> Document:
    """Read one web page: HTML as text or bytes, or a ``Path`` of a file; its main content if asked.

    ``metadata`` has the title, the declared language, and whether the text is the main content:
    where none is found, or tags are nested too deeply to look, it is all of the page. Without an
    ``id`` a file's name serves, or a hash. Bytes that are not in the page's encoding are marked;
    ``errors="strict"`` (or "skip": a page is one piece) raises a ``ValueError`` at them.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    _check_errors(errors)
    if isinstance(page, str) and re.fullmatch(r"[^<\n]*\.x?html?", page, re.IGNORECASE):
        raise ValueError(f"page: expected HTML, or a Path for a file, got {page!r}")
    if not isinstance(page, str | bytes | Path):
        raise ValueError(f"page: expected str, bytes or a Path, got {type(page).__name__}")
    check_text(id, "id")
    source = _portable(Path(page.name)) if isinstance(page, Path) else ""
    data = page.read_bytes() if isinstance(page, Path) else page
    html = data if isinstance(data, str) else _decode_html(data, errors)
    tree = HTMLTree.parse(re.sub("[\ud800-\udfff]", "\ufffd", html))
    main_content = main_content and _depth(html) <= 1000
    text = extract_plain_text(tree, main_content=True).strip() if main_content else ""
    found = bool(text)
    text = re.sub(r"[ \t]+\n", "\n", text or extract_plain_text(tree).strip())
    return Document(text, id or source, source, _about_page(tree, found))


# %% [markdown]
# ### The page once more
#
# With {py:func}`~llmbook.corpus.read_html` the banner is gone, `More` too, and the rest is as
# before.

# %%
document = read_html(page)
print("title:", document.metadata["title"], "| language:", document.metadata["language"])
print(document.text)

# %% [markdown]
# ### Any folder: `read_files`
#
# One function ties these readers together: {py:func}`~llmbook.corpus.read_files`. Give it a folder,
# and it finds what it can read by the suffix of each name.
# Markdown stays as it is: an assistant should learn to write it.


# %% [markdown] tags=["engine"]
# ### Engine room: `read_files` walks a folder once, in the same order everywhere

# %% [markdown] tags=["engine"]
# The suffix says the format, inside of a compressed file, too.

# %% tags=["engine"]
#| export
_FORMATS = {
    **dict.fromkeys((".txt", ".text", ".rst"), "text"),
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
}


def _format(path: Path) -> str | None:
    """Return the format that a file's name promises, whether compressed or not."""
    inner = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    kind = _FORMATS.get(inner.suffix.lower())
    return None if kind == "parquet" and inner != path else kind


# %% [markdown] tags=["engine"]
# Links in a file system may lead back, so each folder is entered once.


# %% tags=["engine"]
#| export
def _walk(folder: Path, report: ReadReport, errors: str) -> Iterator[Path]:
    """Yield the files of ``folder`` and of the folders inside, each once; hidden ones are ignored.

    Links to folders are followed last, so that a file goes by its real path where it has one.
    """
    seen, todo = set(), [folder]

    def failed(error: OSError) -> None:
        report.add(Problem(_portable(Path(error.filename)), None, _reason(error)), errors)

    for start in todo:  # grows while we walk
        for here, folders, files in os.walk(start, onerror=failed):
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            hidden = [name for name in (*folders, *files) if name.startswith(".")]
            report.ignored.update({"hidden": len(hidden)} if hidden else {})
            folders[:] = sorted(name for name in folders if name not in hidden)
            todo += [path for name in folders if (path := Path(here, name)).is_symlink()]
            yield from (Path(here, name) for name in sorted(files) if name not in hidden)


# %% [markdown] tags=["engine"]
# Ids are paths relative to the folder that was given, or that contains all that were given. They
# do not change when the folder moves.


# %% tags=["engine"]
#| export
def _found_files(
    paths: list[Path], pattern: str, report: ReadReport, errors: str
) -> dict[str, Path]:
    """Return the files to read by their names, in order of the names."""
    base, here = _base(paths)
    found: dict[str, Path] = {}
    for given, path in zip(paths, here, strict=True):
        if not path.is_dir() and _format(path) is None:
            raise ValueError(
                f"paths: expected a suffix among {' '.join(_FORMATS)}, got {str(given)!r}"
            )
        for file in _walk(path, report, errors) if path.is_dir() else [path]:
            name = _portable(file.relative_to(base))
            if _format(file) is None:
                report.ignored[file.suffix.lower() or "no suffix"] += 1
            elif fnmatch.fnmatchcase(file.relative_to(path).as_posix(), pattern) or file == path:
                found[name] = file
    return dict(sorted(found.items()))


# %% [markdown] tags=["engine"]
# Most files are one document:


# %% tags=["engine"]
#| export
def _read_one(path: Path, name: str, encoding: str, errors: str) -> Document:
    """Read a file that is one document: text, Markdown or a web page."""
    with _open(path) as file:
        data = file.read()
    kind = _format(path) or ""
    if kind == "html":
        document = read_html(data, errors=errors)
        text, metadata = document.text, document.metadata
    else:
        text, metadata = (
            decode_text(data, encoding, "replace" if errors == "replace" else "strict"),
            {"kind": kind},
        )
    if not text.strip():
        raise ValueError("no text in it")
    return Document(text, name, name, metadata)


# %% [markdown] tags=["engine"]
# The public function:


# %% tags=["engine"]
#| export
def read_files(
    paths: str | Path | Iterable[str | Path],
    pattern: str = "*",
    *,
    encoding: str = "utf-8",
    errors: str = "skip",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Read files and folders: .txt .rst .md .html .jsonl, compressed or not, and .parquet.

    A file in a folder is read if ``pattern`` matches its path from there, in which ``*`` matches
    ``/`` too: "*.md", "2024/*". Documents come in the order of their ids, which are such paths.
    ``encoding`` is for text and Markdown without a byte-order mark.
    """
    _check_errors(errors)
    _check_encoding(encoding)
    check_text(pattern, "pattern")
    listed = existing_paths(paths)
    own = _own_report(report)
    files = _found_files(listed, pattern, own, errors)
    own.files += len(files)
    each = (d for name, path in files.items() for d in _read_any(path, name, encoding, errors, own))
    what = f"paths={[str(p) for p in listed]}, pattern={pattern!r}"
    return _deliver(each, own, what, quiet=report is not None)


# %% [markdown] tags=["engine"]
# What is in a file decides who reads it.


# %% tags=["engine"]
#| export
def _read_any(
    path: Path, name: str, encoding: str, errors: str, report: ReadReport
) -> Iterator[Document]:
    if (kind := _format(path)) in ("jsonl", "parquet"):
        reader = _read_jsonl if kind == "jsonl" else _read_parquet
        yield from reader(path, name, _Rows("text", "id", errors, report))
        return
    try:
        document = _read_one(path, name, encoding, errors)
    except (*_BROKEN_FILE, ValueError) as error:
        report.add(Problem(name, None, _reason(error)), errors)
    else:
        yield document


# %% [markdown]
# ### A folder as one finds it
#
# A little of everything, some of it broken, for {py:func}`~llmbook.corpus.read_files`:

# %%
bakery = folder / "bakery"
bakery.mkdir()
(bakery / "page.html").write_text(page, encoding="utf-8")
(bakery / "notes.md").write_bytes("# Crème brûlée\n".encode("utf-8-sig"))
(bakery / "old.txt").write_bytes("Crème brûlée\n".encode("latin-1"))
(bakery / "oven.png").write_bytes(b"\x89PNG")
(bakery / "photo.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00")
(bakery / "empty.txt").touch()
write_jsonl(corpus[:3], bakery / "some.jsonl.zst")

report = ReadReport()
print([document.source for document in read_files(bakery, report=report)])
print("ignored:", dict(report.ignored))
for problem in report.problems:
    print(problem)

# %% [markdown]
# ## Where the big collections come from
#
# The usual source is **Common Crawl**, a public archive of the web. It comes as WARC files of
# records, each with headers (address, date, length) and the server's answer. The way from there is
# the one we have walked, see {numref}`fig-corpus-readers`. Common Crawl also offers text that it
# extracted itself, as WET files. C4 {cite}`raffel2020exploring` started from those. FineWeb
# {cite}`penedo2024fineweb` compared and went back to WARC, because models trained on text that
# FineWeb extracted from it were better. Extractors differ mostly in *what* they keep: in one study
# three of them gave similar results in standard tests, but what passed the same filters differed
# so much that taking the union gave up to 71 percent more tokens {cite}`li2026extractor`.
#
# ```{figure} ../figures/corpus-readers.svg
# :name: fig-corpus-readers
# :alt: Three sources, installed packages, your files and a hub or crawl, each with its reader, flow into a stream of documents with text, id, source and metadata. Beside it a report counts problems. The stream goes on to cleaning, deduplication and the tokenizer.
#
# Every reader gives the same thing: a stream of documents, and a report of what could not be read.
# ```
#
# Finished collections are kept on hubs, too large to fetch whole. One **streams** them: rows
# arrive while you iterate. Data sets change, so a serious run names a `revision`.
#
# A stream can be shuffled only approximately: a buffer is filled, each time a random element
# leaves, and the next row takes its place. With a buffer of 0 rows the order stays as it is:


# %%
#| export
def _shuffled(rows: Iterable[Any], size: int, seed: int) -> Iterator[Any]:
    """Yield ``rows`` in an order shuffled by a buffer of ``size`` rows."""
    generator, buffer = random.Random(seed), list[Any]()
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        elif not size:
            yield row
        else:
            place = generator.randrange(size)
            yield buffer[place]
            buffer[place] = row
    generator.shuffle(buffer)
    yield from buffer


# %% [markdown]
# Twenty rows through buffers of three sizes. A large buffer mixes more, and holds more rows back:

# %%
for size in (0, 4, 20):
    print(f"{size:2}:", *_shuffled(range(20), size, seed=0))

# %% [markdown] tags=["engine"]
# ### Engine room: `stream_hub`, and what can go wrong with it

# %% [markdown] tags=["engine"]
# The public function checks its arguments before it asks anybody for anything.


# %% tags=["engine"]
#| export
def stream_hub(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    id_field: str = "id",
    revision: str | None = None,
    shuffle_buffer: int = 0,
    seed: int = 0,
    limit: int | None = None,
    errors: str = "skip",
    report: ReadReport | None = None,
) -> Iterator[Document]:
    """Stream a data set of the Hugging Face hub, or a local folder of Parquet or JSON Lines files.

    Rows pass through a ``shuffle_buffer`` (in rows, 0 for none), files stay in their order; at most
    ``limit`` rows come out. Rows without an id get a hash of their text. Without a network a
    ``ConnectionError`` is raised. Needs datasets.
    """
    _check_errors(errors)
    if shuffle_buffer is None:
        raise ValueError("shuffle_buffer: expected a whole number, got None")
    check_at_least(shuffle_buffer=(0, shuffle_buffer), limit=(1, limit), seed=(0, seed))
    for argument, value in (("name", name), ("text_field", text_field), ("id_field", id_field)):
        check_text(value, argument)
    table = _open_hub(name, config, split, revision)
    columns = table.column_names
    if columns is not None and text_field not in columns:
        raise ValueError(f"text_field: expected one of {sorted(columns)}, got {text_field!r}")
    numbered: Iterator[Any] = islice(_shuffled(enumerate(table, 1), shuffle_buffer, seed), limit)
    own = _own_report(report)
    documents = _hub_documents(numbered, name, _Rows(text_field, id_field, errors, own))
    return _deliver(documents, own, f"name={name!r}", quiet=report is not None)


# %% [markdown] tags=["engine"]
# Two failures must not look alike: the hub cannot be reached, or it has no such data set.


# %% tags=["engine"]
#| export
def _open_hub(name: str, config: str | None, split: str, revision: str | None) -> Any:
    with requires_extra("stream_hub", extra="hub"), warnings.catch_warnings():
        # in notebooks, of progress bars that we do not show
        warnings.filterwarnings("ignore", message="IProgress not found")
        from datasets import load_dataset
    try:
        return load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (FileNotFoundError, ValueError) as error:
        asked = f"name={name!r}, config={config!r}, split={split!r}, revision={revision!r}"
        wanted = "readable files" if Path(name).exists() else "a data set of the hub or a folder"
        raise ValueError(f"expected {wanted}, got {asked}: {error}") from error
    except OSError as error:
        hint = "without a network, give a local folder"
        raise ConnectionError(
            f"name: the hub could not be asked for {name!r}; {hint}: {error}"
        ) from error


# %% [markdown] tags=["engine"]
# Rows are numbered before they are shuffled, for problems; rows without an id get one from their
# text. Whatever the library raises in the middle of a stream becomes a problem in the report.


# %% tags=["engine"]
#| export
def _hub_documents(numbered: Iterator[Any], name: str, rows: _Rows) -> Iterator[Document]:
    number = 0
    while True:
        try:
            number, row = next(numbered)
        except StopIteration:
            return
        except Exception as error:  # the library's own kinds; what follows cannot be read
            rows.note(name, number + 1, error)
            return
        try:
            document = rows.document(_unpacked(row), "", name)
        except ValueError as error:
            rows.note(name, number, error)
        else:
            yield document


# %% [markdown]
# ### A stream without a network
#
# To `stream_hub`, a folder with Parquet files is a data set, so we can try it without a network.
# The buffer holds 500 rows, and we stop after 1,000 of the 2,000.

# %%
(folder / "my-dataset").mkdir()
write_parquet(corpus[:2000], folder / "my-dataset" / "part-0.parquet")
streamed = list(stream_hub(str(folder / "my-dataset"), shuffle_buffer=500, limit=1000))
position = {document.id: i for i, document in enumerate(corpus[:2000])}
places = [position[document.id] for document in streamed]
print(f"{len(streamed)} documents; the first five were at the places {places[:5]}")
ahead = max(place - i for i, place in enumerate(places))
assert ahead <= 500, "a row cannot come before the buffer has seen it"
print(f"most places that a document has moved forward: {ahead}")

# %% [markdown]
# ## How much, of what, how long?
#
# How much text is of which kind, how long is a document, and in which scripts is it written?

# %%
kinds = ("docstring", "comment", "readme")
total = Counter()
for document in corpus:
    total[document.source, document.metadata["kind"]] += len(document.text)
for source in packages:
    share = total[source, "docstring"] / sum(total[source, kind] for kind in kinds)
    print(f"{source:11} docstrings hold {share:.1f} of the text")
readme_share = sum(total[source, "readme"] for source in packages) / total.total()
comments = sum(document.metadata["kind"] == "comment" for document in corpus)
assert readme_share < 0.01 and comments > len(corpus) / 2
print("READMEs hold less than 1 % of the text, and comments are more than half of the documents")

# %% [markdown]
# Most of the text is docstrings, though comments are more numerous. {numref}`fig-corpus-lengths`
# shows how short they are (the few READMEs are left out). Lengths span four orders of magnitude,
# hence the logarithmic axis. A document is far shorter than a model's context, hence the packing
# of chapter 07.

# %% mystnb={"figure": {"caption": "How long documents are, and where the text is. Most documents are a line or two; most characters are in the few long ones.", "name": "fig-corpus-lengths"}, "image": {"alt": "Two histograms over document length in characters on a logarithmic axis from 1 to 20,000. Left, number of documents: comments and docstrings peak near 60, docstrings with a shoulder at 100 to 300. Right, characters contained: comments peak near 100, docstrings near 1,000."}}
lengths = {k: np.array([len(d.text) for d in corpus if d.metadata["kind"] == k]) for k in kinds[:2]}
edges = np.geomspace(1, 2e4, 36)
figure, (left, right) = plt.subplots(1, 2, sharex=True)
for kind, values in lengths.items():
    left.hist(values, edges, histtype="step", linewidth=1.8, label=kind)
    right.hist(values, edges, weights=values / 1e3, histtype="step", linewidth=1.8, label=kind)
left.set(xscale="log", xlabel="length (characters)", ylabel="documents", title="how many documents")
right.set(xlabel="length (characters)", ylabel="thousand characters", title="how much text")
left.legend()
plt.show()

# %% [markdown]
# The gap between the two histograms, in two numbers:

# %%
sorted_lengths = np.sort([len(document.text) for document in corpus])[::-1]
tenth = sorted_lengths[: len(corpus) // 10].sum()
assert np.median(sorted_lengths) < 100 and tenth > sorted_lengths.sum() / 2
print("half of the documents are shorter than 100 characters,")
print("and the longest tenth holds more than half of all characters")

# %% [markdown]
# For scripts, Unicode gives every character a name, and a letter's begins with its script:
# `CYRILLIC SMALL LETTER A`. That is not quite the standard's script property, but good enough.


# %%
#| export
@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0]


def count_scripts(text: str) -> Counter[str]:
    """Count the letters of ``text`` by script: by the first word of their Unicode names.

    >>> count_scripts("Käse, сыр, 2 ねこ")
    Counter({'LATIN': 4, 'CYRILLIC': 3, 'HIRAGANA': 2})
    """
    counts: Counter[str] = Counter()
    for character, count in Counter(check_text(text)).items():
        if character.isalpha():
            counts[_script(character)] += count
    return counts


# %% [markdown]
# What does our small web speak?

# %%
scripts = count_scripts("".join(document.text for document in corpus))
other = 1e6 * (1 - scripts["LATIN"] / scripts.total())
assert other < 100
print("of a million letters, fewer than 100 are not Latin")
print("scripts with at least 20 letters:", *sorted(s for s, n in scripts.items() if n >= 20))

# %% [markdown]
# Latin letters, with a few Greek ones for mathematics, and nearly all of it English. What the
# corpus lacks, training on it cannot add.
#
# ## Zipf's law
#
# Count how often each word occurs and sort the counts. The most frequent word has rank one, the
# next rank two, and so on. Zipf {cite}`zipf1949human` observed that the word of rank $r$ occurs
# about $1/r$ as often as the first. In general one writes, for the frequency at rank $r$,
#
# $$
# f(r) = C\, r^{-a} .
# $$ (zipf)
#
# Its logarithm is $\log f = \log C - a \log r$: on doubly logarithmic paper, a line of slope $-a$.
#
# To fit the slope we use least squares on the logarithms, with one precaution. There are ten times
# more ranks between 1,000 and 10,000 than between 100 and 1,000, so a plain fit would be a fit of
# the tail. We cut the axis into bins of equal width in $\log r$ and give each one point. This
# describes a curve; as evidence for a power law least squares is unreliable, and there are better
# tests {cite}`clauset2009powerlaw`.


# %%
#| export
def fit_power_law(
    x: Float[np.ndarray, " points"] | Integer[np.ndarray, " points"],
    y: Float[np.ndarray, " points"] | Integer[np.ndarray, " points"],
    bins: int = 30,
) -> tuple[float, float]:
    """Fit ``y = constant * x**exponent`` and return (exponent, constant).

    Least squares on the logarithms of x and y, averaged in ``bins`` of equal width in log x, so
    that every decade has the same say. All values must be positive and finite.
    """
    if bins is None:
        raise ValueError("bins: expected a whole number, got None")
    check_at_least(bins=(2, bins))
    if x.shape != y.shape:
        raise ValueError(f"x, y: expected equal shapes, got {x.shape} and {y.shape}")
    positive = all(v.size and v.min() > 0 and np.isfinite(v).all() for v in (x, y))
    if not positive or x.min() == x.max():
        raise ValueError("x, y: expected positive values, all finite, and two different x")
    log_x, log_y = np.log(x), np.log(y)
    edges = np.linspace(log_x.min(), log_x.max(), bins + 1)[1:-1]
    bin_of = np.digitize(log_x, edges)
    size = np.bincount(bin_of, minlength=bins)
    filled = size > 0
    mean_x, mean_y = (np.bincount(bin_of, v, bins)[filled] / size[filled] for v in (log_x, log_y))
    exponent, intercept = np.polyfit(mean_x, mean_y, 1)
    return float(exponent), float(np.exp(intercept))


# %% [markdown]
# First on exact powers.

# %%
ranks = np.arange(1, 10_001)
exponent, constant = fit_power_law(ranks, 500.0 * ranks**-1.5)
print(f"exponent {exponent:.3f}, constant {constant:.0f}")

# %% [markdown]
# Now on the corpus. Words are letters only; code, of which there is plenty, is cut into its names.


# %%
#| export
def words(text: str) -> list[str]:
    """Return the words of ``text``: runs of letters, in lower case.

    A mark is no letter: accents written as characters of their own, and Hindi's vowel signs, cut
    words in two.

    >>> words("It's 5 o'clock")
    ['it', 's', 'o', 'clock']
    """
    return re.findall(r"[^\W\d_]+", text.lower())


# %% [markdown]
# The head of the list, the first thousand words, and its tail get a line each:

# %%
tokens = [word for document in corpus for word in words(document.text)]
counts = Counter(tokens)
frequencies = np.array(sorted(counts.values(), reverse=True))
ranks = np.arange(1, len(frequencies) + 1)
head, tail = slice(0, 1000), slice(1000, None)
fits = {
    name: fit_power_law(ranks[part], frequencies[part])
    for name, part in (("head", head), ("tail", tail))
}
head_a, tail_a = (-exponent for exponent, _ in fits.values())
assert len(tokens) > 500_000 and len(counts) > 10_000
assert 0.75 < head_a < 1.1 and 1.6 < tail_a < 2.1
print("more than 500,000 words, 10,000 of them different, the most frequent:")
print(" ", *[word for word, _ in counts.most_common(2)])
print(f"the hundred most frequent make up {frequencies[:100].sum() / len(tokens):.1f} of the text")
print(f"{(frequencies == 1).mean():.1f} of the different words occur once")
print("exponent: between 0.75 and 1.1 in the head, between 1.6 and 2.1 in the tail")

# %% [markdown]
# The picture shows both, with all the words:

# %% mystnb={"figure": {"caption": "Zipf's law on the reader's disk: frequency against rank, with lines fitted to the first thousand ranks and to the rest.", "name": "fig-corpus-zipf"}, "image": {"alt": "Frequency against rank on doubly logarithmic axes. The points fall along a line of slope about -0.9 until rank 1,000, then bend to a steeper one. Between ranks 3,000 and 7,000 they lie above the tail's line, and they end in steps at frequencies 3, 2 and 1."}}
plt.loglog(ranks, frequencies, ".", markersize=3, label="words")
for (name, (exponent, constant)), reach in zip(
    fits.items(), ((1, 1e4), (100, len(ranks))), strict=True
):
    line = np.geomspace(*reach, 50)
    plt.loglog(line, constant * line**exponent, label=f"{name}: slope {exponent:.1f}")
plt.xlabel("rank")
plt.ylabel("frequency")
plt.legend()
plt.show()

# %% [markdown]
# {numref}`fig-corpus-zipf` shows no straight line. It bends, from an exponent near one among the
# first thousand words to about two at the end; our two lines are a summary, and the cut at a
# thousand was our choice. The tail's fit also includes the steps at 1, 2 and 3, which are counting
# noise.
#
# For a model it means: a few hundred words are seen all the time, and many thousands once or
# twice, too rarely to learn much from. This is one reason why chapter 05 builds a vocabulary of
# *pieces*.
#
# ## Heaps' law, from Zipf's
#
# How many different words $V(n)$ does one meet in the first $n$? Herdan
# {cite}`herdan1960typetoken` and Heaps {cite}`heaps1978information` found a power,
# $V(n) \approx K n^\beta$ with $\beta < 1$: new words keep coming, ever more slowly. It follows
# from Zipf's law if words are drawn independently. Let the word of rank $r$ have probability
# $p_r = C r^{-a}$ with $a > 1$ (then the sum over all ranks is finite). It is missing from $n$
# draws with probability $(1 - p_r)^n$, so the expected number of words that are *not* missing is
#
# $$
# V(n) = \sum_{r=1}^{\infty} \bigl(1 - (1-p_r)^n\bigr)
# \approx \int_0^\infty \bigl(1 - e^{-n C x^{-a}}\bigr)\, dx .
# $$ (heaps-sum)
#
# (For small $p$, $(1-p)^n \approx e^{-np}$; a sum of many slowly changing terms is nearly an
# integral.) Substitute $u = n C x^{-a}$, that is $x = (nC)^{1/a} u^{-1/a}$ and
# $dx = -\frac1a (nC)^{1/a} u^{-1/a-1}\,du$. As $x$ goes from $0$ to $\infty$, $u$ goes from
# $\infty$ to $0$, which absorbs the minus sign:
#
# $$
# V(n) \approx (nC)^{1/a}\; \frac1a \int_0^\infty u^{-1/a-1} \bigl(1 - e^{-u}\bigr)\, du .
# $$ (heaps-integral)
#
# The integral no longer contains $n$. We have the power already. To get the constant, integrate by
# parts: $u^{-1/a-1}$ is the derivative of $-a\,u^{-1/a}$, and the derivative of $1-e^{-u}$ is
# $e^{-u}$. The boundary term $-a\,u^{-1/a}(1-e^{-u})$ vanishes at infinity, and at zero too, where
# it behaves like $u^{1-1/a}$ with $a > 1$. What is left is
# $a \int_0^\infty u^{-1/a} e^{-u}\, du = a\,\Gamma(1-\tfrac1a)$, hence
#
# $$
# V(n) \approx \Gamma\bigl(1-\tfrac1a\bigr)\, (C n)^{\beta}, \qquad \beta = \frac1a .
# $$ (heaps)
#
# This was derived in more generality by van Leijenhorst and van der Weide
# {cite}`vanleijenhorst2005heaps`. A draw of a million numbers agrees:

# %%
rng = np.random.default_rng(0)
a, n = 1.5, 1_000_000
draws = rng.zipf(a, n)
C = 1 / (
    sum(r**-a for r in range(1, 10_000)) + 10_000 ** (1 - a) / (a - 1)
)  # sum, and the rest as an integral
predicted = math.gamma(1 - 1 / a) * (C * n) ** (1 / a)
print(f"predicted / counted: {predicted / len(np.unique(draws)):.2f}")

# %% [markdown]
# What if $a \le 1$, as at the head of our corpus? Then $\sum r^{-a}$ diverges, and the vocabulary
# must end at some rank $N$. For $a = 1$ we have $C = 1/\sum_{r \le N} \frac1r \approx 1/\ln N$. A
# text of $n$ words reaches down to the word that is expected about once, $n C / N = 1$ (we let the
# end $N$ grow with the text; with $N$ fixed, growth stops at $N$), so $n = N \ln N$. Take
# logarithms, $\ln n = \ln N + \ln\ln N$, and differentiate by $\ln N$:
#
# $$
# \frac{d \ln n}{d \ln N} = 1 + \frac{1}{\ln N}
# \quad\Longrightarrow\quad
# \beta = \frac{d \ln N}{d \ln n} = \frac{1}{1 + 1/\ln N} .
# $$ (heaps-one)
#
# For twenty thousand words that is $0.91$: twice as much text would hold nearly twice as many
# words, and one word in eleven, $dN/dn = 1/(1 + \ln N)$, would still be new. Which exponent
# counts? New words come from the *tail*; the words of the head have all been met early, and are
# never new again. So we predict one over the exponent of the tail.
#
# The formula assumes independent draws, and text is not that. Two comparisons tell how much it
# matters. In a random order of the *same* $M$ words, a word of frequency $f$ is missing from the
# first $n$ with probability of about $(1 - n/M)^f$, which gives the expected growth without
# drawing anything. And if we shuffle whole documents, words stay together with those of their
# document, but not with those of their file and package.


# %%
#| export
def vocabulary_growth(
    tokens: Iterable[str], points: int = 50
) -> tuple[Integer[np.ndarray, " sizes"], Integer[np.ndarray, " sizes"]]:
    """Return lengths n, evenly spaced in log n, and the number of different tokens in the first n.

    >>> [array.tolist() for array in vocabulary_growth("to be or not to be".split(), points=3)]
    [[1, 2, 6], [1, 2, 4]]
    """
    seen: set[str] = set()
    length, new_at = 0, []
    for length, token in enumerate(tokens, 1):
        if check_text(token, "tokens") not in seen:
            seen.add(token)
            new_at.append(length)
    if not length or points < 2:
        raise ValueError(
            f"tokens, points: expected a token and 2 points, got {length} and {points}"
        )
    sizes = np.unique(np.geomspace(1, length, points).round().astype(np.int64))
    return sizes, np.searchsorted(np.array(new_at), sizes, side="right")


# %% [markdown]
# We measure the growth, and compare it with the two orders:

# %%
sizes, distinct = vocabulary_growth(tokens)
shuffled = np.array([(1 - (1 - n / len(tokens)) ** frequencies).sum() for n in sizes])
large = sizes > 1000
beta, K = fit_power_law(sizes[large], distinct[large])
mixed = random.Random(0).sample(corpus, len(corpus))
_, by_document = vocabulary_growth(word for document in mixed for word in words(document.text))
print(f"measured, from 1,000 words on: beta = {beta:.1f}")
assert abs(1 / tail_a - beta) < 0.1
print("one over the exponent of the tail differs from it by less than 0.1")
print(
    f"in random order: {fit_power_law(sizes[large], shuffled[large])[0]:.1f}, falling to "
    f"{fit_power_law(sizes[-10:], shuffled[-10:])[0]:.1f} at the end"
)
at = np.searchsorted(sizes, [100_000, 300_000, 600_000])
closed = (by_document - distinct)[at] / (shuffled - distinct)[at]
assert (closed > 0.5).all()
print("shuffling documents closes more than half of the gap between the two orders")

# %% [markdown]
# All of them in one picture:

# %% mystnb={"figure": {"caption": "Heaps' law: different words against words read, in the corpus's order, with documents shuffled, with words shuffled, and the fitted power.", "name": "fig-corpus-heaps"}, "image": {"alt": "Number of different words against number of words on doubly logarithmic axes, both from 1,000 to a million. The measured curve is close to a line of slope one half. The curve for words in random order lies above it, bends, and meets it at the right end. The curve for shuffled documents lies between, and closer to the one for random order from 100,000 words on."}}
plt.loglog(sizes[large], distinct[large], "o", label="measured")
plt.loglog(sizes[large], K * sizes[large] ** beta, label=f"fit: slope {beta:.1f}")
plt.loglog(sizes[large], by_document[large], ":", label="documents shuffled")
plt.loglog(sizes[large], shuffled[large], "--", label="words shuffled")
plt.xlabel("words read, n")
plt.ylabel("different words, V(n)")
plt.legend()
plt.show()

# %% [markdown]
# The tail's exponent predicts the measured power well, and we should not be too proud of it:
# {numref}`fig-corpus-heaps` shows two errors that cancel. In random order the curve *bends*,
# because the corpus has finitely many words and the power law is the limit of an infinite one
# {cite}`lu2010zipf`. In the real order the curve lies below. From 100,000 words on, shuffling
# whole documents removes most of the gap: words keep to their package and file. What is left is
# repetition inside documents; new words come later than in shuffled text in novels, too
# {cite}`chacoma2020heaps`. A single exponent is a good summary of vocabulary growth, and a poor
# theory of it.
#
# ## What is wrong with it
#
# We look for what is known to do harm in training text, by crude patterns that only count. No
# address and no sentence of anybody is printed here.


# %%
def mostly_code(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    signs = re.compile(
        r"^\s*(>>>|def |class |import |return\b)|\w\(.*\)\s*:?$|\w\s*[-+*/]?=\s*[\w\"'\[({]|[{};]$"
    )
    return sum(bool(signs.search(line)) for line in lines) > len(lines) / 2


patterns = {
    "an e-mail address": (r"[\w.+-]+@[\w-]+\.[\w.-]*[a-z]", "03 masks it"),
    "a web address": (r"https?://", "03 counts, keeps most"),
    "copyright or license": (
        r"(?i)copyright|\(c\) \d{4}|all rights reserved|SPDX-|without warranty",
        "04 finds the copies",
    ),
    "an interactive session": (r"(?m)^\s*>>> ", "kept: it teaches"),
    "a ruler": (r"(?m)^[ \t]*([-=~*^+#_`.])\1{3,}[ \t]*$", "03 removes rulers"),
    "notes to oneself": (r"\b(TODO|FIXME|XXX|noqa|pragma|pylint)\b", "03 drops directives"),
    "not ASCII": (r"[^\x00-\x7f]", "03 normalizes"),
    "mojibake, maybe": (r"[ÂÃâ][\x80-\xbf€™œ]", "03 repairs"),
}
seen: set[str] = set()
found = {"a copy of an earlier one": [d for d in corpus if d.text in seen or seen.add(d.text)]}
found["fewer than 5 words"] = [d for d in corpus if len(words(d.text)) < 5]
found["mostly code"] = [d for d in corpus if mostly_code(d.text)]
found |= {
    name: [d for d in corpus if re.search(pattern, d.text)]
    for name, (pattern, _) in patterns.items()
}

# %% [markdown]
# Which chapter answers what? Counts shift with every version, so we give limits.


# %%
def order(count: int) -> str:
    limits = [limit for limit in (25, 250, 800) if count > limit]
    return f"more than {limits[-1]}" if limits else "a few at most"


answers = {
    "a copy of an earlier one": "04 removes it",
    "fewer than 5 words": "03 drops it",
    "mostly code": "03 judges it",
    **{name: answer for name, (_, answer) in patterns.items()},
}
for name, documents in found.items():
    print(f"{name:26}{order(len(documents)):16}{answers[name]}")

# %% [markdown]
# How many documents, and how much text? The two orders differ:

# %% mystnb={"figure": {"caption": "What is wrong, by share of documents and by share of characters.", "name": "fig-corpus-wrong"}, "image": {"alt": "Horizontal bars for eleven faults. By documents, pieces of fewer than five words lead with about a sixth, then rulers and copies with less than a tenth. By characters, rulers lead with about two fifths, then interactive sessions with about a quarter."}}
names = sorted(found, key=lambda name: len(found[name]))
y = np.arange(len(names))
plt.barh(y + 0.2, [100 * len(found[n]) / len(corpus) for n in names], 0.4, label="% of documents")
plt.barh(
    y - 0.2,
    [100 * sum(len(d.text) for d in found[n]) / characters for n in names],
    0.4,
    label="% of characters",
)
plt.yticks(y, names)
plt.xlabel("percent")
plt.legend()
plt.show()

# %% [markdown]
# {numref}`fig-corpus-wrong` holds a warning for everything that follows. Very short pieces are a
# sixth of the documents and a fiftieth of the text. Documents with a ruler in them are few and
# hold two fifths of all characters. More than nine in ten of them are docstrings with underlined
# section headings, as NumPy writes them: a filter that threw them away would throw away the best
# documentation we have. A filter is judged by what it removes in documents *and* in characters,
# and some faults call for the repair of a line, not the loss of a document.
#
# ### How this differs from the web, and whose text it is
#
# Thresholds found here must be set anew on a crawl. These texts belong to somebody. They were
# installed under licenses that allow using them; we read them where they lie, train small models
# for study, and redistribute none of them. On the web, wishes are expressed in `robots.txt`, which
# crawlers are *requested* to honor and which is not a form of access authorization
# {cite}`koster2022robots`. An audit of 14,000 domains found that within a year more than five
# percent of all tokens of C4, and 28 percent of those from its most actively maintained sources,
# had become fully restricted {cite}`longpre2024consent`. The law differs by country and is not
# settled. So keep source and license with every document from the first day.
#
# ## Is it the real thing?
#
# **Docstrings**, against Python itself: we import modules and ask `inspect.getdoc` for every
# function and class that our reader has found there.

# %%
import importlib
import inspect

compared, same = 0, 0
for module in ("json.decoder", "email.message", "argparse", "textwrap", "numpy.lib._npyio_impl"):
    loaded = importlib.import_module(module)
    for _, name, text in docstrings(Path(loaded.__file__).read_text(encoding="utf-8")):
        thing = loaded
        for part in name.split(".") if name else ():
            thing = inspect.getattr_static(thing, part, None)
        thing = getattr(thing, "__func__", thing)
        if inspect.getdoc(thing):
            compared, same = compared + 1, same + (inspect.getdoc(thing) == text)
assert compared > 100
print(f"more than 100 docstrings compared, {compared - same} different")

# %% [markdown]
# The two that differ, in numpy, fill in a template while they are imported.
#
# **JSON Lines and Parquet**, against `datasets` and pyarrow, which read what we wrote:

# %%
import pyarrow.json
import pyarrow.parquet
from datasets import load_dataset

write_jsonl(corpus[:500], folder / "few.jsonl")
theirs = load_dataset("json", data_files=str(folder / "few.jsonl"), split="train", streaming=True)
rows = [row["text"] for row in theirs]
assert rows == [d.text for d in corpus[:500]]
table = pyarrow.json.read_json(folder / "few.jsonl")
assert table["id"].to_pylist() == [d.id for d in corpus[:500]]
print(f"JSON Lines: the same {len(rows)} texts in datasets, the same {len(table)} ids in pyarrow")
table = pyarrow.parquet.read_table(folder / "docs.parquet")
missing = sum(a != d.text for a, d in zip(table["text"].to_pylist(), corpus, strict=True))
print(f"Parquet: {missing} texts differ in pyarrow")

# %% [markdown]
# **HTML**, our transparent rule against Resiliparse, on pages of another make: the standard
# library's `pydoc` renders any module as HTML. We compare all visible words, and then the main
# content of our own page.

# %%
import pydoc

from resiliparse.extract.html2text import extract_plain_text

for module in ("json", "textwrap", "bisect"):
    rendered = pydoc.html.page(module, pydoc.html.document(importlib.import_module(module)))
    ours, theirs = (
        words(html_to_text(rendered, main_content=False)),
        words(extract_plain_text(rendered)),
    )
    assert ours == theirs, f"{module}: other words, or another order"
print("pydoc's pages of json, textwrap and bisect: the same words in the same order")
ours, theirs = set(html_to_text(page).split("\n\n")), set(read_html(page).text.split("\n\n"))
print(
    f"our page: {len(ours & theirs)} blocks in common,",
    f"{len(ours - theirs)} only ours, {len(theirs - ours)} only theirs",
)

# %% [markdown]
# ## How fast is it?
#
# The reader above, in one process, and the exported one in two; the order must not change. Starting
# a process costs some tenths of a second, so for a single small package one is best.

# %%
from llmbook import corpus as exported

start = time.perf_counter()
again = [document.id for document in exported.read_installed_docs(packages, workers=2)]
seconds_together = time.perf_counter() - start
moved = sum(a != document.id for a, document in zip(again, corpus, strict=True))
print(f"documents that come at another place from two processes: {moved}")

# %% [markdown]
# The times depend on your machine:

# %% tags=["nbval-ignore-output"]
print(f"two processes: {seconds_alone / seconds_together:.1f} times as fast as one")
print(f"{characters / 1e6 / seconds_together:.1f} MB of text a second")

# %% [markdown]
# ## Exercises
#
# ````{exercise} Who has the text?
# :label: ex-corpus-share
# A few long documents hold most of the text. Write `share_of_longest(documents, fraction)`: the
# share of all characters that is in the longest `fraction` of the documents (rounded up to whole
# documents). Of no documents the share is 0. (5 minutes)
# ````


# %% tags=["solution"]
def share_of_longest(documents: list[Document], fraction: float) -> float:
    """Return the share of characters, 0 to 1, in the longest ``fraction`` of ``documents``."""
    sizes = sorted((len(document.text) for document in documents), reverse=True)
    count = math.ceil(round(fraction * len(sizes), 9))  # 0.07 * 100 is 7.000000000000001
    return sum(sizes[:count]) / max(sum(sizes), 1)


# %% tags=["check"]
letters = zip("aéa☕", (1, 70, 9, 20), strict=True)
four = [Document(letter * size) for letter, size in letters]
hundred = [Document("a")] * 100
for documents, fraction, expected, reason in (
    (four, 1.0, 1.0, "all documents hold all of the text: 1, and not 100"),
    ([four[0], four[2]], 0.5, 0.9, "the longest documents count, wherever they stand"),
    (four, 0.25, 0.7, "the longest of four holds 70 of 100 characters, whatever the bytes"),
    (four, 0.3, 0.9, "0.3 of four documents is rounded up to two"),
    (hundred, 0.07, 0.07, "0.07 of a hundred is seven, though not in floating point"),
    ([], 0.5, 0.0, "of no documents the share is 0"),
):
    try:
        share = share_of_longest(documents, fraction)
    except (ZeroDivisionError, IndexError, ValueError):
        share = math.inf
    assert abs(share - expected) < 1e-9, reason

# %% [markdown]
# ````{exercise} Repair mojibake
# :label: ex-corpus-mojibake
# UTF-8 that was decoded as Windows-1252 turns `é` into `Ã©`. Undo it: write
# `repair_mojibake(text)`, which reverses the mistake if that is possible for the whole text, and
# otherwise returns the text unchanged. `naïve café` must stay as it is. Why does it? And which
# correct text does not stay? (20 minutes)
# ````


# %% tags=["solution"]
def repair_mojibake(text: str) -> str:
    """Return ``text`` with UTF-8 that was taken for Windows-1252 restored, if it is such text."""
    # Correct text mostly fails here: a lone é, E9 in Windows-1252, is no UTF-8. Text that is about
    # mojibake does not: the two characters Ã© become é even where they are meant.
    try:
        return text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return text


# %% tags=["check"]
def repaired(text: str) -> str | None:
    try:
        return repair_mojibake(text)
    except UnicodeError:
        return None  # where the text should have been returned unchanged


for good in ("plain", "naïve café", "Ünlü", "5 €", "Ã la carte", "сыр"):
    assert repaired(good) == good, f"{good!r} was correct and must stay"
    broken = good.encode().decode("cp1252", errors="replace")
    if "\ufffd" not in broken:
        assert repaired(broken) == good, f"{broken!r} should become {good!r}"
assert repaired("â‚¬ 5") == "€ 5", "three characters can stand for one"
for letter in "ñßøÿ§":
    broken = letter.encode().decode("cp1252")
    assert repaired(broken) == letter, "any character can be repaired, not just those of a list"
for mixed_text in ("cafÃ© naïve", "naïve cafÃ©"):
    assert repaired(mixed_text) == mixed_text, "all of the text must be mojibake, or none"

# %% [markdown]
# ````{exercise} A fair sample of a stream
# :label: ex-corpus-reservoir
# You want `k` random documents of a stream too long to keep, whose length you do
# not know. Keep the first `k`; when document number `n > k` arrives, let it replace a random one
# of the kept with probability `k / n`. Prove that each document is kept with probability $k/n$, by
# induction on $n$, and write `reservoir(documents, k, seed)`. (20 minutes)
# ````


# %% tags=["solution"]
def reservoir(documents: Iterable[Document], k: int, seed: int) -> list[Document]:
    """Return ``k`` documents drawn uniformly without replacement (all, if there are fewer)."""
    # Proof. At n = k all are kept, k/n = 1. If each of the first n - 1 is kept with probability
    # k/(n-1), it stays when the n-th comes with 1 - (k/n)(1/k) = (n-1)/n, and the product is k/n.
    generator, kept = random.Random(seed), []
    for n, document in enumerate(documents, 1):
        if n <= k:
            kept.append(document)
        elif (place := generator.randrange(n)) < k:  # probability k/n, and a random place at once
            kept[place] = document
    return kept


# %% tags=["check"]
import weakref

twenty = [Document(str(number)) for number in range(20)]
assert reservoir(twenty, 5, 7) == reservoir(twenty, 5, 7), "the same seed, the same sample"
assert len(reservoir(iter(twenty[:3]), 5, 0)) == 3, "a short stream is returned whole"
drawn = Counter(int(d.text) for seed in range(20_000) for d in reservoir(iter(twenty), 5, seed))
assert drawn.total() == 100_000, "five documents each time"
assert min(drawn[i] for i in range(20)) > 4700, "some are drawn too rarely: expected about 5,000"
assert max(drawn.values()) < 5300, "some are drawn too often: expected about 5,000"
alive: weakref.WeakSet[Document] = weakref.WeakSet()


def long_stream() -> Iterator[Document]:
    for number in range(1000):
        assert len(alive) <= 5 + 2, "the stream is too long to keep: only k documents fit"
        alive.add(document := Document(str(number)))
        yield document


reservoir(long_stream(), 5, 0)
assert all(len(set(reservoir(iter(twenty), 5, seed))) == 5 for seed in range(50)), (
    "no document twice"
)

# %% [markdown]
# ````{exercise} The monkey's law
# :label: ex-corpus-monkey
# A monkey hits one of $k$ letters, all equally likely, or, with probability $s$, the space bar;
# words are what is between spaces. Miller {cite}`miller1957silence` noticed that they obey Zipf's
# law. There are $k^L$ words of length $L$, each of probability proportional to $((1-s)/k)^L$, so
# the rank of a word of length $L$ grows like $k^L$. Eliminate $L$ and write the exponent as
# `monkey_exponent(letters, space)`. What does this say about the meaning of the law? (30 minutes)
# ````


# %% tags=["solution"]
def monkey_exponent(letters: int, space: float) -> float:
    """Return Zipf's exponent a for ``letters`` equally likely letters and probability ``space``."""
    # L = log r / log k, so f = ((1-s)/k)^L = r^(log((1-s)/k) / log k) = r^-(1 - log(1-s) / log k)
    # The monkey means nothing by its words, so the law alone is no sign of meaning.
    return 1 - math.log(1 - space) / math.log(letters)


# %% tags=["check"]
typed = np.random.default_rng(0).choice(list("abcde "), 1_000_000, p=[0.16] * 5 + [0.2])
by_length = Counter(map(len, "".join(typed).split()))
mean = {n: by_length[n] / 5**n for n in (2, 4)}  # how often a word of that length was typed
measured = math.log(mean[2] / mean[4]) / math.log(5**2)
found_a = monkey_exponent(5, 0.2)
assert found_a > 0, "the law is written r^-a, so the exponent a is positive"
assert abs(monkey_exponent(5, 1e-9) - 1) < 1e-6, (
    "with hardly any spaces a word of another letter is k times as rare, and there are k times as "
    "many: a is 1"
)
assert monkey_exponent(5, 0.4) > found_a, "more spaces make long words rarer: a grows with s"
assert monkey_exponent(26, 0.2) < found_a, (
    "more letters make more words of a length: a falls with k"
)
assert abs(found_a - measured) < 0.02, f"a million keys give {measured:.2f}, and this {found_a:.2f}"
assert abs(monkey_exponent(2, 0.5) - 2) < 1e-9, (
    "two letters, half of all keys spaces: the exponent is 2"
)

# %% [markdown]
# Two functions write records of a crawl, as the check of the next exercise needs them.


# %%
def record(kind: str, address: str, block: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <{address}-{kind}>\r\n"
    length = "content-length" if "//d." in address else "Content-Length"
    head += f"WARC-Target-URI: {address}\r\n{length}: {len(block)}\r\n\r\n"
    return head.encode() + block + b"\r\n\r\n"


def answer(name: str, body: bytes, status: str = "200 OK", kind: str = "text/html") -> bytes:
    name_of_type = "content-type" if name == "d" else "Content-Type"
    head = f"HTTP/1.1 {status}\r\nX: 200\r\n{name_of_type}: {kind}; charset=utf-8\r\n\r\n"
    return record("response", f"https://{name}.example/", head.encode() + body)


# %% [markdown]
# ````{exercise} Read a crawl
# :label: ex-corpus-warc
# A WARC file is a sequence of records: the line `WARC/1.0`, header lines `Name: value`,
# an empty line, then exactly `Content-Length` bytes, then two empty lines. All lines end in
# `\r\n`; names may be in upper or lower case. The file is compressed with gzip, one member a
# record. The bytes of a record of type `response` are the server's answer: a status line, headers,
# an empty line, the body. Write `read_warc(path)`, which yields a document for every answer with
# status 200 and content type `text/html`: main content, id from `WARC-Record-ID`, the address as
# source. Lengths count bytes, and a page may contain the line `WARC/1.0`. (60 minutes)
# ````


# %% tags=["solution"]
def read_warc(path: Path) -> Iterator[Document]:
    """Yield the main content of every successful HTML answer in a gzipped WARC file."""
    with gzip.open(path, "rb") as file:
        while line := file.readline():
            if not line.startswith(b"WARC/"):
                continue  # the empty lines between records
            lines = (
                row.decode().partition(":") for row in iter(lambda: file.readline().strip(), b"")
            )
            header = {name.lower(): value.strip() for name, _, value in lines}
            answer, _, body = file.read(int(header["content-length"])).partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if header["warc-type"] == "response" and status.split()[1:2] == [b"200"] and is_page:
                found = read_html(body, id=header["warc-record-id"])
                yield Document(found.text, found.id, header["warc-target-uri"], found.metadata)


# %% tags=["check"]
records = [
    record("warcinfo", "", b"software: none"),
    record("request", "https://a.example/", b"GET / HTTP/1.1\r\n\r\n"),
    answer("a", f"<p>Käse {'Räder ' * 9}\r\n\r\nWARC/1.0\r\n</p>".encode()),
    answer("b", b"<p>Nothing here", status="404 Not Found"),
    answer("c", b"\x89PNG", kind="image/png"),
    record(
        "resource", "https://r.example/", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>x"
    ),
    answer("d", page.encode()),
    answer("e", b"<p>A zero\0 byte"),
]
with tempfile.TemporaryDirectory() as place:
    (Path(place) / "crawl.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    crawled = list(read_warc(Path(place) / "crawl.warc.gz"))
found_at = [document.source for document in crawled]
assert crawled and crawled[0].text.split() == ["Käse", *["Räder"] * 9, "WARC/1.0"], (
    "the first page has eleven words: Content-Length counts bytes, and says where a record ends"
)
for reason in ("b has status 404", "c is a picture", "r is a resource, and no server's answer"):
    assert f"https://{reason[0]}.example/" not in found_at, reason
assert "https://d.example/" in found_at, "names of headers may be in lower case, as those of d"
assert found_at == [f"https://{name}.example/" for name in "ade"], (
    "three pages have status 200, and their source is the address"
)
assert crawled[1].text == read_html(page).text, "the main content, as read_html finds it"
assert crawled[2].text == "A zero byte", "all the bytes of a page, but for zeros"
assert crawled[1].id == "<https://d.example/-response>", "the id is the record's"

# %% tags=["remove-cell"]
import shutil

shutil.rmtree(folder)

# %% [markdown]
# ## Summary
#
# A document is a text with a stable id, a source and metadata. Word frequencies follow Zipf's law
# at the head and fall faster in the tail; one over the tail's exponent gives, by a short integral,
# Heaps' law for the growth of the vocabulary. Our corpus is full of copies, fragments, addresses
# and license headers; filters for them must be measured in documents and in characters.
#
# **Checklist: choosing a source and a format.**
#
# - Does the source hold the languages and subjects that the model shall know?
# - May you use it, and is the license kept with every document?
# - Do you have the raw pages, or somebody's extraction of them?
# - Are ids independent of run, machine and order? Is the revision of a data set recorded?
# - Never take a format that runs code when it is read, such as pickle.
# - Look at the report before you look at the text.
#
# **Further reading.** Penedo and colleagues {cite}`penedo2024fineweb` document every step from
# crawl to corpus and measure each by training models; Raffel and colleagues
# {cite}`raffel2020exploring` list C4's rules. Next, {doc}`03_cleaning` takes up
# the list.
