# %% [markdown]
# # Text from the real world
#
# > Read documents from packages, files, web pages and hubs, lose none of them silently, and measure
# > what they are made of.
#
# The stories of chapter 01 came out of a generator, and we knew the probability of each. Real text
# sits in thousands of files by people who never met, in formats that disagree, with license
# headers, broken encodings, copies of copies, and addresses of people who did not ask to be
# memorized. Most of what a language model will ever know is decided here, before its first
# parameter exists.
#
# The usual place to study this is the web, which needs a network and a warehouse. There is a
# smaller web on your own disk. Every Python installation carries docstrings, comments and READMEs:
# tens of thousands of pieces, on everything from time zones to contour plots. It is real, and
# messy in the same ways. We read it, measure it, and write down what is wrong with it. That list
# is the work order for chapters 03 and 04.
#
# | | |
# |---|---|
# | **You build** | {py:class}`~llmbook.corpus.Document`, {py:func}`~llmbook.corpus.read_installed_docs`, {py:func}`~llmbook.corpus.read_files`, {py:func}`~llmbook.corpus.read_jsonl`, {py:func}`~llmbook.corpus.read_html`, {py:func}`~llmbook.corpus.stream_hub` |
# | **You need** | Python: generators and regular expressions. {doc}`00_environment` sets up the rest |
# | **It takes** | 60 minutes to read, 45 seconds to run |

# %% tags=["remove-cell"]
#| default_exp corpus

# %%
#| export
import ast
import bz2
import codecs
import difflib
import fnmatch
import gzip
import importlib.metadata
import importlib.util
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import sys
import sysconfig
import tokenize
import types
import unicodedata
import warnings
import zlib

# %% [markdown]
# These come with Python, and so do the next ones. Whatever else a reader needs (pyarrow,
# zstandard, datasets) is imported where it is used, so that importing the module stays quick.

# %%
#| export
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

# %% [markdown]
# ## What is a document?
#
# A corpus is a stream of documents, and a document is more than its text. When chapter 04 finds
# two equal documents, it must be able to say *which* two. When a model recites a telephone number,
# you want to know which file it came from. So a document carries an **id** that stays the same
# from run to run, a **source**, and a dictionary of whatever else is known. Without an id it gets
# one derived from its text by hashing. A running number would not do: it changes as soon as a file
# is added.


# %%
#| export
@dataclass(frozen=True)
class Document:
    """A text with a stable id, where it is from, and whatever else is known of it.

    Without an ``id`` it gets one that is a hash of the text. The text can always be written as
    UTF-8: a lone surrogate (half a character) raises a ``ValueError``.

    >>> Document("Dough rises.").id
    '3e304b2990b65fdd'
    """

    text: str
    id: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        try:
            encoded = self.text.encode()
        except UnicodeEncodeError as error:
            broken = f"{self.text[error.start]!r} at index {error.start}"
            raise ValueError(f"text: expected text that UTF-8 can encode, got {broken}") from None
        if not self.id:
            object.__setattr__(self, "id", blake2b(encoded, digest_size=8).hexdigest())


# %% [markdown]
# Same text, same id, on any machine. And one thing is settled at the door for all later chapters:
# the text of a document can be written as UTF-8.

# %%
print(Document("Dough rises.").id == Document("Dough rises.").id)
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
        todo: list[tuple[ast.AST, str]] = [(ast.parse(source), "")]
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
# Comments take more thought. A test for lines that begin with `#` is wrong, because a string may
# hold such lines: docstrings are full of them. The faithful way is Python's own tokenizer. We take
# comments that have a line to themselves, since those are prose more often than the ones after
# code, and join neighbors into blocks.


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
# Correct, and slow: Python 3.11 tokenizes in Python. But we do not need all tokens. To know where
# comments are, one only has to step over strings, and both can be described by one regular
# expression, which runs in C. It tries, at each position: a block of comment lines; a comment
# after code, to be stepped over because it may contain a quote; a string, to be stepped over
# because it may contain a `#`. The `*+` repeats possessively: what it has matched it never gives
# back, so the search cannot explode.

# %%
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


# %% [markdown]
# A clever shortcut must be held against the honest way. Here are all files of five packages of the
# standard library:

# %%
import time

stdlib = Path(sysconfig.get_path("stdlib"))
roots = [stdlib / name for name in ("asyncio", "email", "importlib", "json", "unittest")]
sources = []
for path in [p for root in roots for p in sorted(root.rglob("*.py"))]:
    with tokenize.open(path) as file:  # honors the encoding that a file declares
        sources.append(file.read())
start = time.perf_counter()
slow = [comments_by_tokenize(source) for source in sources]
middle = time.perf_counter()
fast = [comment_blocks(source) for source in sources]
speedup = (middle - start) / (time.perf_counter() - middle)
print(f"same blocks in all of about {10 * round(len(sources) / 10)} files:", slow == fast)
print("at least 5 times faster:", speedup > 5)

# %% [markdown]
# ### Reading must not fail, and must not lie
#
# Among a thousand files one is broken, always. A reader that stops there is useless; one that
# shrugs it off is worse, because nobody will know that a third of the corpus is missing. So
# problems are **counted, with file, line and reason**, in a report that the caller may pass;
# otherwise a warning at the end says how many there were. With `errors="strict"` every reader of
# this chapter stops at the first problem, with `"skip"` it goes on without the broken piece, with
# `"replace"` it keeps text whose undecodable bytes are marked `�`.


# %%
#| export
class CorpusWarning(UserWarning):
    """Some of what was to be read could not be; the message says how much, where and why."""


class Problem(NamedTuple):
    """A file, or a line of it (None: the file as a whole), and why it was not read in full."""

    path: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{'' if self.line is None else f':{self.line}'}: {self.reason}"


# %% [markdown]
# A reason should help the person who has to mend the file. Python's own messages do not always:
# inside of a file of a thousand lines, "line 1 column 21" means the line just parsed.


# %%
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


# %% [markdown]
# The report is a plain object that the reader fills while you iterate.


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


# %% [markdown]
# Every reader sends its documents through this turnstile. It counts, warns at the end, and refuses
# a corpus of nothing, which is nearly always a mistyped path.


# %%
#| export
def _deliver(
    documents: Iterator[Document], report: ReadReport, argument: str, quiet: bool
) -> Iterator[Document]:
    """Count ``documents`` as they pass; in the end refuse an empty corpus and warn of problems."""
    before = report.documents
    for document in documents:
        report.documents += 1
        yield document
    if report.documents == before:
        raise ValueError(f"{argument}: expected at least one document, got none: {report}")
    if report.problems and not quiet:
        warnings.warn(f"{argument}: {report}", CorpusWarning, stacklevel=2)


def _check_errors(errors: str) -> None:
    if errors not in ("strict", "skip", "replace"):
        raise ValueError(f"errors: expected 'strict', 'skip' or 'replace', got {errors!r}")


def _check_at_least(**bounds: tuple[int, int | None]) -> None:
    for argument, (least, value) in bounds.items():
        if value is not None and value < least:
            raise ValueError(f"{argument}: expected at least {least}, got {value}")


# %% [markdown]
# ### Which files belong to a package?
#
# Python can tell where a module lies without importing it. Names on the package index and names in
# imports often differ (`scikit-learn` is imported as `sklearn`), so we accept both. The standard
# library goes by `stdlib`. Tests are left out; some systems do not even install them.


# %%
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


def _locate(name: str, owners: Any) -> tuple[list[Path], str | None]:
    """Return where the code of a module or distribution lies, and the distribution's name."""
    if name == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))], None
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


# %% [markdown]
# The walk names every file relative to its package, with forward slashes: such a name, and the ids
# made from it, is the same on every machine.


# %%
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


# %% [markdown]
# One file becomes a list of documents, or a problem. Comment signs go, and a block without a
# letter (a ruler of dashes) is not text. Files may hold anything: the syntax of another Python,
# bytes that are not what they are declared to be, nesting that the parser gives up on. All of that
# is reported and none of it is fatal.


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


# %% [markdown]
# A worker gets sixteen files at a time and answers with the documents of each, or with its
# problem.


# %%
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


# %% [markdown]
# ### In parallel, and in the same order every time
#
# Parsing keeps a processor busy, so we hand files to several processes. Three traps lie here.
# Workers finish in a random order. Forking a process that has threads, as every notebook has, can
# deadlock, so workers are *spawned*: started fresh, on every system. And a spawned worker first
# runs its parent's script once more, unless the author guarded it by `if __name__ == "__main__"`.
# Our workers need nothing of that script, so we hide it while they start.


# %%
#| export
@contextmanager
def _no_script() -> Iterator[None]:
    """Keep workers that start now from running the caller's script once more."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


# %% [markdown]
# Results are taken in the order of the jobs. A worker may be killed by the system, when memory
# runs out for instance; then this process does its work, more slowly, rather than lose it.


# %%
#| export
def _in_order(function: Callable[[Any], Any], jobs: list[Any], workers: int) -> Iterator[Any]:
    """Like ``map``, with ``workers`` processes; in this one where others are impossible."""
    if (
        workers == 1
        or function.__module__ == "__main__"
        or multiprocessing.current_process().daemon
    ):
        yield from map(function, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        with _no_script():
            futures = [pool.submit(function, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:  # a worker was killed, for memory perhaps
                yield function(job)
    finally:
        pool.shutdown(cancel_futures=True)


# %% [markdown]
# A process that is told to run a function looks it up by module and name. One typed into a
# notebook has the module `__main__`, which is another `__main__` in the worker; hence the first
# lines of `_in_order`, by which the functions of this notebook work alone. The exported ones live
# in `llmbook.corpus` and do run in parallel. Now the reader itself:

# %%
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
    test or tests are left out. Documents come by package (its README first), path and line,
    whatever ``workers`` is; by default several processes read a large job, one a small job.
    ``metadata`` holds kind, path, line, and the qualified name that a docstring belongs to.
    """
    names = sorted({packages} if isinstance(packages, str) else set(packages))
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not chosen or not set(chosen) <= set(KINDS):
        raise ValueError(f"kinds: expected some of {KINDS}, got {kinds!r}")
    _check_at_least(workers=(1, workers))
    _check_errors(errors)
    owners = importlib.metadata.packages_distributions()
    places = {name: _locate(name, owners) for name in names}
    own = report if report is not None else ReadReport()
    documents = _read_packages(places, chosen, workers, errors, own)
    return _deliver(documents, own, f"packages={names}", quiet=report is not None)


# %% [markdown]
# Arguments are checked when it is called; files are read while you iterate. A large job is one of
# more than 8 MB of code: below that, starting processes takes longer than it saves.


# %%
#| export
def _readme(package: str, distribution: str | None) -> Iterator[Document]:
    """Yield the long description of a distribution, which is its README."""
    text = distribution and importlib.metadata.metadata(distribution).json.get("description")
    if isinstance(text, str) and text.strip():
        about = {"kind": "readme", "path": f"{package}/README", "line": 1, "name": distribution}
        yield Document(text.strip(), f"{package}/README:1", package, about)


# %% [markdown]
# Files are listed first, sorted by name; their total size decides about processes.


# %%
#| export
def _read_packages(
    places: dict[str, tuple[list[Path], str | None]],
    kinds: tuple[str, ...],
    workers: int | None,
    errors: str,
    report: ReadReport,
) -> Iterator[Document]:
    files = {
        package: sorted(
            f for p in roots for f in _python_files(p, p.name if package != "stdlib" else package)
        )
        for package, (roots, _) in places.items()
        if set(kinds) != {"readme"}
    }
    size = sum(path.stat().st_size for found in files.values() for _, path in found)
    workers = workers or (min(4, os.cpu_count() or 1) if size > 8e6 else 1)
    jobs = [(package, name, str(path), kinds) for package in files for name, path in files[package]]
    chunks = [jobs[i : i + 16] for i in range(0, len(jobs), 16)]
    results = (r for chunk in _in_order(_read_jobs, chunks, workers) for r in chunk)
    for package, (_, distribution) in places.items():
        if "readme" in kinds:
            yield from _readme(package, distribution)
        for _ in files.get(package, ()):
            report.files += 1
            result = next(results)
            if isinstance(result, Problem):
                report.add(result, errors)
            else:
                yield from result


# %% [markdown]
# The moment has come. Every count below depends on what is installed, so we print one significant
# digit.

# %%
import math

import matplotlib.pyplot as plt

plt.style.use("llmbook.book")


def about(count: float) -> str:
    """Round to one significant digit, since counts differ from version to version."""
    return f"{float(f'{count:.1g}'):,.0f}"


packages, report = ["stdlib", "numpy", "matplotlib"], ReadReport()
start = time.perf_counter()
corpus = list(read_installed_docs(packages, report=report))
seconds_alone = time.perf_counter() - start
characters = sum(len(document.text) for document in corpus)
print(f"about {about(len(corpus))} documents, {about(characters / 1e6)} million characters")
print("files:", about(report.files), "| problems:", len(report.problems))
print("every id is different:", len({document.id for document in corpus}) == len(corpus))

# %% [markdown]
# A typing error in a package's name is the likeliest bad input of all, so the error helps:

# %%
try:
    read_installed_docs("matplotlob")
except ValueError as error:
    print(error)
# %% [markdown]
# ## Files that others send you
#
# Before anything is said about formats there are bytes, and bytes do not say what they mean.
# `C3 A9` is `é` in UTF-8 and `Ã©` in Latin-1; both readings succeed, one is right. A **byte-order
# mark** at the start names the encoding. A zero byte near the start means that this is no text but
# a picture or a program; only UTF-16 and UTF-32 text contains one. Everything else is decoded as
# UTF-8 unless the caller says otherwise, *strictly*: text in another encoding hardly ever passes
# for UTF-8, so a failure is information.


# %%
#| export
_MARKS = {  # longest first: UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def decode_text(data: bytes, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Decode a text file: by its byte-order mark, which is removed, else by ``encoding``.

    Lines end in ``\\n`` in the result. A ``ValueError`` says that the data is binary, or, unless
    ``errors`` is "replace", which byte cannot be decoded.

    >>> decode_text(b"\\xef\\xbb\\xbfcaf\\xc3\\xa9\\r\\n")
    'café\\n'
    """
    for mark, marked in _MARKS.items():
        if data.startswith(mark):
            return _unix_lines(data[len(mark) :].decode(marked, errors))
    if b"\0" in data[:8192] and not re.match("utf.?(16|32)", encoding.lower()):
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

# %% [markdown]
# ### Compressed, truncated
#
# Large collections are stored compressed. Python reads gzip, bzip2 and xz itself and complains
# when such a file ends too early, after a broken download say. Zstandard, today's usual choice,
# needs a package, whose file reader returns what it has and keeps silent, as we shall see. So we
# feed its decompressor ourselves and ask at the end whether it was finished.


# %%
#| export
def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Yield the contents of a Zstandard file; ``EOFError`` where it was cut off."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("Zstandard files need an extra: pip install 'llmbook[scale]'") from error
    frame, data = zstandard.ZstdDecompressor().decompressobj(), b""
    with path.open("rb") as file:
        while data or (data := file.read(1 << 16)):
            if frame.eof:  # one file may hold several frames, one after another
                frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
            data = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("compressed file ended before the end-of-stream marker was reached")


# %% [markdown]
# Wrapped as a file, it joins the others behind one function that looks at the last suffix of a
# name.


# %%
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


# %% [markdown]
# A file of which half is missing, read by the package and by us:

# %%
import tempfile

import zstandard

folder = Path(tempfile.mkdtemp())
whole = zstandard.ZstdCompressor().compress("".join(map(str, range(200_000))).encode())
(folder / "half.zst").write_bytes(whole[: len(whole) // 2])
with zstandard.open(folder / "half.zst") as file:
    print("zstandard.open: fewer bytes and no complaint:", len(file.read()) < 1_000_000)
try:
    _open(folder / "half.zst").read()
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
# A record's text is in `text`, its id in `id`, unless you say otherwise; its other fields become
# metadata. Whatever may be wrong with a record is one `ValueError`.


# %%
#| export
@dataclass
class _Rows:
    """How the rows of a table become documents, and where those that cannot are noted."""

    text_field: str
    id_field: str
    errors: str
    report: ReadReport

    def document(self, row: Any, fallback_id: str, source: str) -> Document:
        text = row.get(self.text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"expected text in a field {self.text_field!r}, got {found}")
        if self.errors == "replace":
            text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        rest = {k: v for k, v in row.items() if k not in (self.text_field, self.id_field)}
        if isinstance(rest.get("metadata"), dict):
            rest = {**rest.pop("metadata"), **rest}
        source = rest.pop("source") if isinstance(rest.get("source"), str) else source
        id = row.get(self.id_field)
        return Document(text, fallback_id if id in (None, "") else str(id), source, rest)

    def note(self, name: str, number: int | None, error: Exception) -> None:
        self.report.add(Problem(name, number, _reason(error)), self.errors)


# %% [markdown]
# The reader goes line by line, so a file may be larger than memory. One that breaks off in the
# middle gives all that came before, and a problem.


# %%
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


# %% [markdown]
# A program that is killed while it writes leaves a file that looks finished. So we write to a
# temporary name in the same folder and rename at the end, which the operating system does in one
# step.


# %%
#| export
@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path; move it to ``path`` at the end, or remove it after an exception."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _compressor(raw: Any, suffix: str) -> Any:
    """Return a file that compresses what is written to it into ``raw``, as ``suffix`` asks."""
    if suffix == ".gz":  # no name and no date inside: the same documents give the same bytes
        return gzip.GzipFile("", "wb", 6, raw, mtime=0)
    if suffix == ".bz2":
        return bz2.open(raw, "wb")
    if suffix == ".xz":
        return lzma.open(raw, "wb")
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdCompressor().stream_writer(raw, closefd=False)
    return nullcontext(raw)


# %% [markdown]
# We write UTF-8 rather than `\u00e9` escapes, which would make Russian three times as long, and
# refuse numbers that JSON has no word for (infinity), since other readers would trip over them.


# %%
#| export
def _as_json(document: Document, value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"documents: JSON cannot hold {document.id!r}: {error}") from error


def write_jsonl(documents: Iterable[Document], path: str | Path) -> int:
    """Write JSON Lines, compressed as the suffix says (.gz, .bz2, .xz, .zst); return how many.

    The file appears complete or not at all. A ``ValueError`` names a document whose metadata JSON
    cannot hold; tuples come back as lists.
    """
    path, count = Path(path), 0
    whole, suffix = _whole_file(path), path.suffix.lower()
    with whole as draft, draft.open("wb") as raw, _compressor(raw, suffix) as file:
        for document in documents:
            file.write(_as_json(document, vars(document)) + b"\n")
            count += 1
        if not count:
            raise ValueError("documents: expected at least one to write, got none")
    return count


# %%
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


# %% [markdown]
# Both of these rest on one more function, which `read_parquet` will share: it looks whether the
# files exist *before* it returns, so that a mistyped name fails where it was typed.


# %%
#| export
def _listed(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return ``paths`` as a list of paths that exist."""
    found = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    if not found:
        raise ValueError("paths: expected at least one, got none")
    for path in found:
        if not path.exists() and not path.is_symlink():
            raise FileNotFoundError(f"paths: no file or folder {str(path)!r}")
    return found


def _read_tables(
    paths: Any, reader: Any, text_field: str, id_field: str, errors: str, report: ReadReport | None
) -> Iterator[Document]:
    _check_errors(errors)
    files = _listed(paths)
    for path in files:
        if path.is_dir():
            raise ValueError(f"paths: expected files, got the folder {str(path)!r}: see read_files")
    own = report if report is not None else ReadReport()
    own.files += len(files)
    rows = _Rows(text_field, id_field, errors, own)
    documents = (document for path in files for document in reader(path, path.name, rows))
    return _deliver(documents, own, f"paths={[p.name for p in files]}", quiet=report is not None)


# %% [markdown]
# We write our corpus, damage the file in two places, and read it back.

# %%
write_jsonl(corpus, folder / "docs.jsonl.gz")
print("same documents after a round trip:", list(read_jsonl(folder / "docs.jsonl.gz")) == corpus)

lines = gzip.decompress((folder / "docs.jsonl.gz").read_bytes()).splitlines(keepends=True)[:1000]
lines[41] = lines[41][:20] + b"\n"  # cut short
lines[76] = b'{"text": "caf\xe9"}\n'  # Latin-1
(folder / "damaged.jsonl").write_bytes(b"".join(lines))
report = ReadReport()
print(len(list(read_jsonl(folder / "damaged.jsonl", report=report))), "documents")
for problem in report.problems:
    print(problem)

# %% [markdown]
# Line numbers, as an editor counts them; 998 documents are safe.
#
# ### Columns: Parquet
#
# If only the lengths of a billion documents are wanted, JSON Lines must be read in full.
# **Parquet** stores a table by columns, in groups of rows, with an index at the end: a reader can
# fetch one column, or one group, and skip the rest. Hubs serve data sets in it. Metadata differ
# from document to document while a Parquet column has one type, so our writer stores them as JSON.


# %%
#| export
def _read_parquet(path: Path, name: str, rows: _Rows) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet needs an extra: pip install 'llmbook[scale]'") from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        document = rows.document(_unpacked(row), f"{name}:{number}", name)
                    except ValueError as error:
                        rows.note(name, number, error)
                    else:
                        yield document
    except (OSError, pa.ArrowException) as error:
        rows.note(name, number or None, error)


# %% [markdown]
# Metadata that some other program wrote may be a string that is no JSON; then it stays a string.


# %%
#| export
def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    """Return ``row`` with metadata that ``write_parquet`` has packed into JSON as a dictionary."""
    try:
        return {**row, "metadata": json.loads(row["metadata"])}
    except (KeyError, TypeError, ValueError):
        return row


# %% [markdown]
# The public reader and the writer follow the pattern of JSON Lines.


# %%
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

    Rows count from 1, in problems as in the ids of rows without one. Needs pyarrow.
    """
    return _read_tables(paths, _read_parquet, text_field, id_field, errors, report)


# %%
#| export
def write_parquet(documents: Iterable[Document], path: str | Path, row_group: int = 10_000) -> int:
    """Write text, id, source and metadata (as JSON), ``row_group`` rows at a time; return how many.

    The file appears complete or not at all. Needs pyarrow.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, count = ("text", "id", "source", "metadata"), 0
    schema = pa.schema([(name, pa.string()) for name in names])
    _check_at_least(row_group=(1, row_group))
    with (
        _whole_file(Path(path)) as draft,
        pq.ParquetWriter(draft, schema, compression="zstd") as file,
    ):
        for group in _groups(documents, row_group):
            count += len(group)
            rows = [{**vars(d), "metadata": _as_json(d, d.metadata).decode()} for d in group]
            file.write_table(pa.Table.from_pylist(rows, schema))
        if not count:
            raise ValueError("documents: expected at least one to write, got none")
    return count


# %%
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
# What do the formats cost? The uncompressed file is the yardstick.

# %%
write_jsonl(corpus, folder / "docs.jsonl")
write_jsonl(corpus, folder / "docs.jsonl.zst")
write_parquet(corpus, folder / "docs.parquet")
sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("docs.*"))}
for name, size in sizes.items():
    print(f"{name:16} about {about(100 * size / sizes['docs.jsonl'])} %")

# %% [markdown]
# ## Web pages
#
# A web page is a text wrapped in what surrounds it: a menu, a banner about cookies, suggestions
# what to read next, a footer. {numref}`fig-corpus-page` shows the parts of one that we bake
# ourselves.
#
# ```{figure} ../figures/corpus-page.svg
# :name: fig-corpus-page
# :alt: A web page as boxes with their share of linked text. Menu 100 percent, cookie banner 25, headline and paragraphs 0 to 12, suggestions 100, footer 45. Only headline and paragraphs are the document.
#
# A page and its blocks, with the share of each block's characters that are links. The part that
# one wants is long and hardly linked.
# ```

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
    "sub "
    "sup time tt u var wbr".split()
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
        self._text: list[str] = []
        self._linked = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in _INLINE:
            self.end_block()
        self._open.add(tag)
        self.handle_data(" " if tag == "br" else "")

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
# This is tedious to get right and must be fast, so the exported reader leaves it to Resiliparse
# {cite}`bevendorff2018chatnoir`, written in compiled code for web archives. Given bytes, it must
# know their encoding. Valid UTF-8 is UTF-8 whatever the page declares; else the declaration
# decides, else the statistics of its bytes.


# %%
#| export
def _decode_html(data: bytes, errors: str) -> str:
    from resiliparse.parse.encoding import detect_encoding

    try:
        return decode_text(data)
    except UnicodeDecodeError:
        declared = detect_encoding(data, from_html_meta=True) or "cp1252"
        return decode_text(data, declared, "replace" if errors == "replace" else "strict")


# %% [markdown]
# The reader itself:


# %%
#| export
def read_html(
    page: str | bytes | Path, *, main_content: bool = True, id: str = "", errors: str = "replace"
) -> Document:
    """Read one web page: HTML as text or bytes, or a ``Path`` of a file; its main content if asked.

    ``metadata`` has the title, the declared language, and whether the text is the main content:
    where no main content is found it is all of the page. Without an ``id`` a file's name serves,
    or a hash. ``errors="strict"`` refuses bytes that are not in the page's encoding.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    _check_errors(errors)
    if isinstance(page, str) and re.fullmatch(r"[^<\n]*\.x?html?", page, re.IGNORECASE):
        raise ValueError(f"page: expected HTML, or a Path for a file, got {page!r}")
    source = page.name if isinstance(page, Path) else ""
    data = page.read_bytes() if isinstance(page, Path) else page
    tree = HTMLTree.parse(_decode_html(data, errors) if isinstance(data, bytes) else data)
    text = extract_plain_text(tree, main_content=True).strip() if main_content else ""
    found = bool(text)
    text = re.sub(r"[ \t]+\n", "\n", text or extract_plain_text(tree).strip())
    root = tree.document.query_selector("html") if tree.document else None
    language = (root.getattr("lang") if root is not None else None) or ""
    about = {
        "kind": "html",
        "title": (tree.title or "").strip(),
        "language": language,
        "main_content": found,
    }
    return Document(text, id or source, source, about)


# %% [markdown]
# Now the banner is gone, `More` too, and the rest is as before.

# %%
document = read_html(page)
print(document.metadata)
print(document.text)

# %% [markdown]
# ### Any folder: `read_files`
#
# One function remains: give it a folder, it finds what it can read and looks at the suffix of each
# name. Markdown stays as it is: its few signs mean something, and an assistant should learn to
# write them. Files of other kinds are counted as ignored.


# %%
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


# %% [markdown]
# Links in a file system may lead back to where one came from, so each folder is entered once.


# %%
#| export
def _walk(folder: Path, report: ReadReport, errors: str) -> Iterator[Path]:
    """Yield the files of ``folder`` and of those inside, each once; hidden ones are ignored."""
    seen = set()

    def failed(error: OSError) -> None:
        report.add(Problem(str(error.filename), None, _reason(error)), errors)

    for here, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        seen.add(os.path.realpath(here))
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        report.ignored.update({"hidden": len(hidden)} if hidden else {})
        folders[:] = sorted(
            n for n in folders if n not in hidden and os.path.realpath(Path(here, n)) not in seen
        )
        yield from (Path(here, name) for name in sorted(files) if name not in hidden)


# %% [markdown]
# Ids are paths relative to the folder that was given, so they do not change when the folder moves.
# With several folders they are relative to the one that contains them all.


# %%
#| export
def _found_files(
    paths: list[Path], pattern: str, report: ReadReport, errors: str
) -> dict[str, Path]:
    """Return the files to read by their names, in order of the names."""
    here = [Path(os.path.normpath(Path.cwd() / path)) for path in paths]
    base = os.path.commonpath([p if p.is_dir() else p.parent for p in here])
    found: dict[str, Path] = {}
    for given, path in zip(paths, here, strict=True):
        if not path.is_dir() and _format(path) is None:
            raise ValueError(
                f"paths: expected a suffix among {' '.join(_FORMATS)}, got {str(given)!r}"
            )
        for file in _walk(path, report, errors) if path.is_dir() else [path]:
            name = file.relative_to(base).as_posix()
            if _format(file) is None:
                report.ignored[file.suffix.lower() or "no suffix"] += 1
            elif fnmatch.fnmatchcase(file.relative_to(path).as_posix(), pattern) or file == path:
                found[name] = file
    return dict(sorted(found.items()))


# %% [markdown]
# A file that is one document is read at once.


# %%
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


# %% [markdown]
# The public function checks what it was given, finds the files, and leaves the reading to a
# generator.


# %%
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
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"encoding: expected one that Python knows, got {encoding!r}") from None
    listed = _listed(paths)
    own = report if report is not None else ReadReport()
    files = _found_files(listed, pattern, own, errors)
    own.files += len(files)
    each = (d for name, path in files.items() for d in _read_any(path, name, encoding, errors, own))
    what = f"paths={[str(p) for p in listed]}, pattern={pattern!r}"
    return _deliver(each, own, what, quiet=report is not None)


# %% [markdown]
# What is in a file decides who reads it.


# %%
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
# A folder as one finds them: a little of everything, some of it broken.

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
# The usual source is **Common Crawl**, a public archive of the web. It comes as WARC files:
# records one after another, each with a few lines of headers (address, date, length) and the
# server's answer, byte for byte. The way from there is the one we have walked, see
# {numref}`fig-corpus-readers`. Common Crawl also offers text that it extracted itself, as WET
# files. C4 {cite}`raffel2020exploring` started from those. FineWeb {cite}`penedo2024fineweb`
# compared and went back to WARC, because models trained on its own extraction were better.
# Extractors differ mostly in *what* they keep: in one study fewer than half of the pages that
# passed a fixed set of filters did so with more than one of three extractors
# {cite}`li2026extractor`.
#
# ```{figure} ../figures/corpus-readers.svg
# :name: fig-corpus-readers
# :alt: Three sources, installed packages, your files and a hub or crawl, each with its reader, flow into a stream of documents with text, id, source and metadata. Beside it a report counts problems. The stream goes on to cleaning, deduplication and the tokenizer.
#
# Every reader gives the same thing: a stream of documents, and a report of what could not be read.
# ```
#
# Finished collections are kept on hubs, too large to fetch whole. One **streams** them: rows
# arrive while you iterate. A stream can be shuffled only approximately: a buffer is filled, each
# time a random element leaves, and the next row takes its place. Data sets on a hub change, so a
# serious run names a `revision`.


# %%
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
    _check_at_least(shuffle_buffer=(0, shuffle_buffer), limit=(1, limit))
    table = _open_hub(name, config, split, revision)
    columns = table.column_names
    if columns is not None and text_field not in columns:
        raise ValueError(f"text_field: expected one of {sorted(columns)}, got {text_field!r}")
    numbered: Iterator[Any] = islice(_shuffled(enumerate(table, 1), shuffle_buffer, seed), limit)
    own = report if report is not None else ReadReport()
    documents = _hub_documents(numbered, name, _Rows(text_field, id_field, errors, own))
    return _deliver(documents, own, f"name={name!r}", quiet=report is not None)


# %% [markdown]
# Two things may go wrong at the door, and they must not look alike: the hub cannot be reached, or
# it has no such data set.


# %%
#| export
def _open_hub(name: str, config: str | None, split: str, revision: str | None) -> Any:
    try:
        with warnings.catch_warnings():  # in notebooks, of progress bars that we do not show
            warnings.filterwarnings("ignore", message="IProgress not found")
            from datasets import load_dataset
    except ImportError as error:
        raise ImportError("stream_hub needs an extra: pip install 'llmbook[hub]'") from error
    try:
        return load_dataset(name, config, split=split, revision=revision, streaming=True)
    except (FileNotFoundError, ValueError) as error:
        asked = f"name={name!r}, config={config!r}, split={split!r}, revision={revision!r}"
        raise ValueError(
            f"expected a data set of the hub or a folder, got {asked}: {error}"
        ) from error
    except OSError as error:
        hint = "without a network, give a local folder"
        raise ConnectionError(
            f"name: the hub could not be asked for {name!r}; {hint}: {error}"
        ) from error


# %% [markdown]
# The buffer is the few lines just described. Rows are numbered before they are shuffled, for
# problems; rows without an id get one from their text.


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


# %%
#| export
def _hub_documents(numbered: Iterable[Any], name: str, rows: _Rows) -> Iterator[Document]:
    for number, row in numbered:
        try:
            document = rows.document(_unpacked(row), "", name)
        except ValueError as error:
            rows.note(name, number, error)
        else:
            yield document


# %% [markdown]
# A folder with Parquet files is a data set to it, so we can try it without a network. Our
# `Document` travels well:

# %%
(folder / "my-dataset").mkdir()
write_parquet(corpus[:2000], folder / "my-dataset" / "part-0.parquet")
streamed = list(stream_hub(str(folder / "my-dataset"), shuffle_buffer=500, limit=1000))
print(
    len(streamed), "documents, in order:", [d.id for d in streamed] == [d.id for d in corpus[:1000]]
)
print("all among ours:", {d.text for d in streamed} <= {d.text for d in corpus[:2000]})

# %% [markdown]
# ## How much, of what, how long?
#
# Back to the corpus on disk. Three questions come before all others: how much text is of which
# kind, how long is a document, and in which scripts is it written?

# %%
kinds = ("docstring", "comment", "readme")
total = Counter()
for document in corpus:
    total[document.source, document.metadata["kind"]] += len(document.text)
print(f"{'% of characters':16}" + "".join(f"{kind:>12}" for kind in kinds))
for source in ("stdlib", "numpy", "matplotlib"):
    shares = [100 * total[source, kind] / total.total() for kind in kinds]
    print(f"{source:16}" + "".join(f"{share:12.0f}" for share in shares))

# %% [markdown]
# Most of it is docstrings, though comments are more numerous. {numref}`fig-corpus-lengths` shows
# how short they are. Lengths span four orders of magnitude, hence the logarithmic axis. A document
# is far shorter than a model's context, hence the packing of chapter 07.

# %% mystnb={"figure": {"caption": "How long documents are, and where the text is. Most documents are a line or two; most characters are in the few long ones.", "name": "fig-corpus-lengths"}, "image": {"alt": "Two histograms over document length in characters on a logarithmic axis from 1 to 100,000. Left, number of documents: comments peak near 60, docstrings near 100 to 200. Right, characters contained: the mass lies between 300 and 5,000."}}
lengths = {k: np.array([len(d.text) for d in corpus if d.metadata["kind"] == k]) for k in kinds[:2]}
edges = np.geomspace(1, 1e5, 41)
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
print("most documents are shorter than 100 characters:", np.median(sorted_lengths) < 100)
print(
    f"the longest tenth holds about {about(100 * tenth / sorted_lengths.sum())} % of all characters"
)

# %% [markdown]
# For scripts, Unicode gives every character a name, and a letter's begins with its script:
# `CYRILLIC SMALL LETTER A`. That is not quite the script property of the standard: the micro sign
# becomes the script `MICRO`, full-width Latin `FULLWIDTH`. To see what a corpus holds it is good
# enough.


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
    for character, count in Counter(text).items():
        if character.isalpha():
            counts[_script(character)] += count
    return counts


# %% [markdown]
# What does our small web speak?

# %%
scripts = count_scripts("".join(document.text for document in corpus))
print("Latin letters: more than 99.9 %:", scripts["LATIN"] > 0.999 * scripts.total())
print("at least 20 letters:", sorted(name for name, count in scripts.items() if count >= 20))

# %% [markdown]
# Latin letters, with a few Greek ones for mathematics, and nearly all of it English. A model
# trained on it will know no other language: no method of a later chapter can add what the corpus
# lacks.
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
# Take logarithms on both sides: $\log f = \log C - a \log r$. With $x = \log r$ and $y = \log f$
# this is $y = \log C - a x$, a straight line with slope $-a$. So on doubly logarithmic paper
# Zipf's law is a line.
#
# To fit the slope we use least squares on the logarithms, with one precaution. There are ten times
# more ranks between 1,000 and 10,000 than between 100 and 1,000, so a plain fit would be a fit of
# the tail. We cut the axis into bins of equal width in $\log r$ and give each one point. This
# describes a curve; as evidence for a power law least squares is unreliable, and there are better
# tests {cite}`clauset2009powerlaw`.


# %%
#| export
def words(text: str) -> list[str]:
    """Return the words of ``text``: runs of letters, in lower case.

    >>> words("It's 5 o'clock")
    ['it', 's', 'o', 'clock']
    """
    return re.findall(r"[^\W\d_]+", text.lower())


def fit_power_law(
    x: Float[np.ndarray, " points"] | Integer[np.ndarray, " points"],
    y: Float[np.ndarray, " points"] | Integer[np.ndarray, " points"],
    bins: int = 30,
) -> tuple[float, float]:
    """Fit ``y = constant * x**exponent`` and return (exponent, constant).

    Least squares on the logarithms of x and y, averaged in ``bins`` of equal width in log x, so
    that every decade has the same say. All values must be positive.
    """
    if x.size < 2 or x.min() <= 0 or y.min() <= 0 or x.min() == x.max():
        raise ValueError("x, y: expected positive values and two different x")
    log_x, log_y = np.log(x), np.log(y)
    edges = np.linspace(log_x.min(), log_x.max(), bins + 1)[1:-1]
    bin_of = np.digitize(log_x, edges)
    size = np.bincount(bin_of, minlength=bins)
    filled = size > 0
    mean_x, mean_y = (np.bincount(bin_of, v, bins)[filled] / size[filled] for v in (log_x, log_y))
    exponent, intercept = np.polyfit(mean_x, mean_y, 1)
    return float(exponent), float(np.exp(intercept))


# %% [markdown]
# First on data whose answer we know: exact powers.

# %%
ranks = np.arange(1, 10_001)
exponent, constant = fit_power_law(ranks, 500.0 * ranks**-1.5)
print(f"exponent {exponent:.3f}, constant {constant:.0f}")

# %% [markdown]
# Now on the corpus. Words are letters only; code, of which there is plenty, is cut into its names.

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
print(f"about {about(len(tokens))} words, about {about(len(counts))} different ones")
print("most frequent:", " ".join(word for word, _ in counts.most_common(4)))
print(f"occur once: about {about(100 * (frequencies == 1).mean())} %")
for name, (exponent, _) in fits.items():
    print(f"exponent of the {name}: a = {-exponent:.1f}")

# %% mystnb={"figure": {"caption": "Zipf's law on the reader's disk: frequency against rank, with lines fitted to the first thousand ranks and to the rest.", "name": "fig-corpus-zipf"}, "image": {"alt": "Frequency against rank on doubly logarithmic axes. The points fall along a line of slope about -0.9 until rank 1,000, then along a steeper one, and end in steps at frequencies 3, 2 and 1."}}
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
# {numref}`fig-corpus-zipf` is not one line but two. The first thousand words obey the classical
# law, with an exponent near one. Rarer words, those of a trade and the names that programmers
# invent, fall off twice as fast.
#
# For a model it means: a few hundred words are seen all the time, and tens of thousands once or
# twice, too rarely to be learned. This is one reason why chapter 05 builds a
# vocabulary of *pieces*.
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
# Two approximations are in it: $(1-p)^n \approx e^{-np}$, which holds for the small $p$ that
# matter, and an integral for a sum of many slowly changing terms. Substitute $u = n C x^{-a}$,
# that is $x = (nC)^{1/a} u^{-1/a}$ and $dx = -\frac1a (nC)^{1/a} u^{-1/a-1}\,du$. As $x$ goes from
# $0$ to $\infty$, $u$ goes from $\infty$ to $0$, which absorbs the minus sign:
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
# text of $n$ words reaches down to the word that is expected about once, $n C / N = 1$, so
# $n = N \ln N$. Take logarithms, $\ln n = \ln N + \ln\ln N$, and differentiate by $\ln N$:
#
# $$
# \frac{d \ln n}{d \ln N} = 1 + \frac{1}{\ln N}
# \quad\Longrightarrow\quad
# \beta = \frac{d \ln N}{d \ln n} = \frac{1}{1 + 1/\ln N} .
# $$ (heaps-one)
#
# For twenty thousand words that is $0.91$: if our words followed the head's law all the way down,
# nearly every token would be new. Which exponent counts? New words come from the *tail*; those of
# the head are met once, early, and never again new. So we predict one over the exponent of the
# tail.
#
# One comparison more. The formula assumes independent draws, but a word, once used, comes back on
# the next line. In a random order of the *same* $M$ words, a word of frequency $f$ is missing from
# the first $n$ with probability of about $(1 - n/M)^f$, which gives the expected growth without
# drawing anything.


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
        if token not in seen:
            seen.add(token)
            new_at.append(length)
    if not length or points < 2:
        raise ValueError(
            f"tokens, points: expected a token and 2 points, got {length} and {points}"
        )
    sizes = np.unique(np.geomspace(1, length, points).round().astype(np.int64))
    return sizes, np.searchsorted(np.array(new_at), sizes, side="right")


# %%
sizes, distinct = vocabulary_growth(tokens)
shuffled = np.array([(1 - (1 - n / len(tokens)) ** frequencies).sum() for n in sizes])
large = sizes > 1000
beta, K = fit_power_law(sizes[large], distinct[large])
tail_a = -fits["tail"][0]
print(f"measured, from 1,000 words on: beta = {beta:.1f}")
print("1/a of the tail is within 0.1 of it:", abs(1 / tail_a - beta) < 0.1)
print(
    f"in random order: {fit_power_law(sizes[large], shuffled[large])[0]:.1f}, falling to "
    f"{fit_power_law(sizes[-10:], shuffled[-10:])[0]:.1f} at the end"
)

# %% mystnb={"figure": {"caption": "Heaps' law: different words against words read, in the corpus's order, in random order, and the fitted power.", "name": "fig-corpus-heaps"}, "image": {"alt": "Number of different words against number of words on doubly logarithmic axes, both from 1,000 to a million. The measured curve is close to a line of slope one half. The curve for random order lies above it, bends, and meets it at the right end."}}
plt.loglog(sizes[large], distinct[large], "o", label="measured")
plt.loglog(sizes[large], K * sizes[large] ** beta, label=f"fit: slope {beta:.1f}")
plt.loglog(sizes[large], shuffled[large], "--", label="same words in random order")
plt.xlabel("words read, n")
plt.ylabel("different words, V(n)")
plt.legend()
plt.show()

# %% [markdown]
# The tail's exponent predicts the measured power well, and we should not be too proud of it:
# {numref}`fig-corpus-heaps` shows two errors that cancel. In random order the curve *bends*,
# because the corpus has finitely many words and the power law is the limit of an infinite one
# {cite}`lu2010zipf`. In the real order the curve lies below, because words come in clusters, as
# others found in novels {cite}`chacoma2020heaps`, and new packages straighten it. A single
# exponent is a good summary of vocabulary growth, and a poor theory of it.
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
    "rulers, tables": (r"(?m)^\W{5,}$", "03 removes rulers"),
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
# Which chapter answers what? Counts are given by order of magnitude; they shift with every
# version.


# %%
def order(count: int) -> str:
    return ("fewer than 10", "tens", "hundreds", "thousands", "tens of thousands")[
        len(str(count)) - 1
    ]


answers = {
    "a copy of an earlier one": "04 removes it",
    "fewer than 5 words": "03 drops it",
    "mostly code": "03 judges it",
    **{name: answer for name, (_, answer) in patterns.items()},
}
for name, documents in found.items():
    print(f"{name:26}{order(len(documents)):16}{answers[name]}")

# %% mystnb={"figure": {"caption": "What is wrong, by share of documents and by share of characters.", "name": "fig-corpus-wrong"}, "image": {"alt": "Horizontal bars for eleven faults. By documents, pieces of fewer than five words lead with about a sixth, then rulers and copies with less than a tenth. By characters, rulers and tables lead with about two fifths, then interactive sessions with about a quarter."}}
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
plt.legend()
plt.show()

# %% [markdown]
# {numref}`fig-corpus-wrong` holds a warning for everything that follows. Very short pieces are a
# sixth of the documents and a fiftieth of the text. Documents with a ruler in them are few and
# hold two fifths of all characters: a filter that threw them away would throw away the best
# documentation we have. A filter is judged by what it removes in documents *and* in characters,
# and some faults call for the repair of a line, not the loss of a document.
#
# ### How this differs from the web, and whose text it is
#
# Our small web has no advertisements, one language and one subject. Its duplicates are license
# headers and inherited docstrings instead of mirrored sites, and its pages are already text.
# Methods that work here are needed on a crawl, but thresholds must be set anew.
#
# It also belongs to somebody. These texts were installed under licenses that allow using them; we
# read them where they lie, train small models for study, and redistribute none of them. On the
# web, wishes are expressed in `robots.txt`, which crawlers are *requested* to honor and which is
# not a form of access authorization {cite}`koster2022robots`. An audit of 14,000 domains found
# them changing fast: within a year, more than five percent of all tokens of C4, and 28 percent of
# those from its most actively maintained sources, had become fully restricted
# {cite}`longpre2024consent`. The law differs by country and is not settled. A practical rule: keep
# source and license with every document from the first day. What you did not keep, you cannot
# honor later.
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
print(f"more than 100 compared: {compared > 100}, different: {compared - same}")

# %% [markdown]
# The two that differ, in numpy, rewrite their docstring while they are imported: a template is
# filled in. We read what the author wrote, Python shows what the program made of it.
#
# **JSON Lines and Parquet**, against `datasets` and pyarrow, which read what we wrote:

# %%
import pyarrow.json
import pyarrow.parquet
from datasets import load_dataset

write_jsonl(corpus[:500], folder / "few.jsonl")
theirs = load_dataset("json", data_files=str(folder / "few.jsonl"), split="train", streaming=True)
print("datasets:", [row["text"] for row in theirs] == [d.text for d in corpus[:500]])
table = pyarrow.json.read_json(folder / "few.jsonl")
print("pyarrow, JSON Lines:", table["id"].to_pylist() == [d.id for d in corpus[:500]])
table = pyarrow.parquet.read_table(folder / "docs.parquet")
print("pyarrow, Parquet:", table["text"].to_pylist() == [d.text for d in corpus])

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
    ratio = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio()
    print(f"{module:9} same words in the same order: {100 * ratio:.0f} %")
ours, theirs = set(html_to_text(page).split("\n\n")), set(read_html(page).text.split("\n\n"))
print(
    f"our page: {len(ours & theirs)} blocks in common,",
    f"{len(ours - theirs)} only ours, {len(theirs - ours)} only theirs",
)

# %% [markdown]
# ## How fast is it?
#
# The exported reader in one process and in two; the order must not change. Starting a process
# costs some tenths of a second, so two are not twice as fast, and for a single small package one
# is best.

# %%
from llmbook import corpus as exported

start = time.perf_counter()
again = [document.id for document in exported.read_installed_docs(packages, workers=2)]
seconds_together = time.perf_counter() - start
print("same documents in the same order:", again == [document.id for document in corpus])

# %% tags=["nbval-ignore-output"]
print(f"two processes: {seconds_alone / seconds_together:.1f} times as fast as one")
print(f"{characters / 1e6 / seconds_together:.1f} MB of text a second")

# %% [markdown]
# ## Exercises
#
# ````{exercise} Who has the text?
# :label: ex-corpus-share
# *Five minutes.* A few long documents hold most of the text. Write
# `share_of_longest(documents, fraction)`: the share of all characters that is in the longest
# `fraction` of the documents (rounded up to whole documents).
# ````


# %% tags=["solution"]
def share_of_longest(documents: list[Document], fraction: float) -> float:
    """Return the share of characters, 0 to 1, in the longest ``fraction`` of ``documents``."""
    sizes = sorted((len(document.text) for document in documents), reverse=True)
    return sum(sizes[: math.ceil(fraction * len(sizes))]) / sum(sizes)


# %% tags=["check"]
four = [Document("a" * size) for size in (1, 70, 9, 20)]
assert share_of_longest(four, 0.25) == 0.70, "one document of four, the longest"
assert share_of_longest(four, 0.3) == 0.90, "0.3 of four documents is rounded up to two"
assert share_of_longest(four, 1.0) == 1.0, "all of them hold everything"

# %% [markdown]
# ````{exercise} Repair mojibake
# :label: ex-corpus-mojibake
# *Twenty minutes.* UTF-8 that was decoded as Windows-1252 turns `é` into `Ã©`. Undo it: write
# `repair_mojibake(text)`, which reverses the mistake if that is possible for the whole text, and
# otherwise returns the text unchanged. Correct text, `naïve café` included, must stay as it is.
# Why does it stay?
# ````


# %% tags=["solution"]
def repair_mojibake(text: str) -> str:
    """Return ``text`` with UTF-8 that was taken for Windows-1252 restored, if it is such text."""
    try:  # correct text fails here: a lone é, E9 in Windows-1252, is no UTF-8
        return text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return text


# %% tags=["check"]
for good in ("naïve café", "Ünlü", "plain", "сыр", "5 €", "Ã la carte"):
    assert repair_mojibake(good) == good, f"{good!r} was correct and must stay"
    broken = good.encode().decode("cp1252", errors="replace")
    if "\ufffd" not in broken:
        assert repair_mojibake(broken) == good, f"{broken!r} should become {good!r}"
assert repair_mojibake("â‚¬ 5") == "€ 5", "three characters can stand for one"

# %% [markdown]
# ````{exercise} A fair sample of a stream
# :label: ex-corpus-reservoir
# *Twenty minutes.* You want `k` random documents of a stream too long to keep, whose length you do
# not know. Keep the first `k`; when document number `n > k` arrives, let it replace a random one
# of the kept with probability `k / n`. Prove that each document is kept with probability $k/n$, by
# induction on $n$, and write `reservoir(documents, k, seed)`.
# ````


# %% tags=["solution"]
def reservoir(documents: Iterable[Document], k: int, seed: int) -> list[Document]:
    """Return ``k`` documents drawn uniformly without replacement (all, if there are fewer)."""
    generator, kept = random.Random(seed), []
    for n, document in enumerate(documents, 1):
        if n <= k:
            kept.append(document)
        elif (place := generator.randrange(n)) < k:  # probability k/n, and a random place at once
            kept[place] = document
    return kept


# %% tags=["check"]
twenty = [Document(str(number)) for number in range(20)]
drawn = Counter(int(d.text) for seed in range(2000) for d in reservoir(iter(twenty), 5, seed))
assert drawn.total() == 10_000, "five documents each time"
assert min(drawn[i] for i in range(20)) > 400, (
    "some documents are drawn too rarely: expected 500 of 2,000"
)
assert max(drawn.values()) < 600, "some documents are drawn too often: expected 500 of 2,000"
assert len(set(reservoir(iter(twenty), 5, 1))) == 5, "no document twice"
assert len(reservoir(iter(twenty[:3]), 5, 0)) == 3, "a short stream is returned whole"
assert reservoir(twenty, 5, 7) == reservoir(twenty, 5, 7), "the same seed, the same sample"

# %% [markdown]
# ````{exercise} The monkey's law
# :label: ex-corpus-monkey
# *Half an hour.* A monkey hits one of $k$ letters or, with probability $s$, the space bar; words
# are what is between spaces. Miller {cite}`miller1957silence` noticed that they obey Zipf's law.
# There are $k^L$ words of length $L$, each of probability proportional to $((1-s)/k)^L$, so the
# rank of a word of length $L$ grows like $k^L$. Eliminate $L$ and write the exponent as
# `monkey_exponent(letters, space)`. What does this say about the meaning of the law?
# ````


# %% tags=["solution"]
def monkey_exponent(letters: int, space: float) -> float:
    """Return Zipf's exponent a for ``letters`` equally likely letters and probability ``space``."""
    # L = log r / log k, so f = ((1-s)/k)^L = r^(log((1-s)/k) / log k) = r^-(1 - log(1-s) / log k)
    return 1 - math.log(1 - space) / math.log(letters)


# %% tags=["check"]
typed = np.random.default_rng(0).choice(list("abcde "), 1_000_000, p=[0.16] * 5 + [0.2])
monkey = np.array(sorted(Counter("".join(typed).split()).values(), reverse=True))
measured = -fit_power_law(np.arange(1, 3001), monkey[:3000])[0]
assert abs(monkey_exponent(5, 0.2) - measured) < 0.1, f"the monkey's fit is {measured:.2f}"
assert abs(monkey_exponent(2, 0.5) - 2) < 1e-9, (
    "two letters, half of all keys spaces: the exponent is 2"
)

# %% [markdown]
# ````{exercise} Read a crawl
# :label: ex-corpus-warc
# *An hour.* A WARC file is a sequence of records: the line `WARC/1.0`, header lines `Name: value`,
# an empty line, then exactly `Content-Length` bytes, then two empty lines. All lines end in
# `\r\n`. The bytes of a record of type `response` are the server's answer: a status line, headers,
# an empty line, the body. Write `read_warc(path)`, which yields a document for every answer with
# status 200 and content type `text/html`: main content, id from `WARC-Record-ID`, the address as
# source. Lengths count bytes, and a page may contain the line `WARC/1.0`.
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
            header = {name: value.strip() for name, _, value in lines}
            answer, _, body = file.read(int(header["Content-Length"])).partition(b"\r\n\r\n")
            status, _, fields = answer.partition(b"\r\n")
            is_page = re.search(rb"(?im)^content-type:\s*text/html", fields)
            if header["WARC-Type"] == "response" and status.split()[1:2] == [b"200"] and is_page:
                found = read_html(body, id=header["WARC-Record-ID"])
                yield Document(found.text, found.id, header["WARC-Target-URI"], found.metadata)


# %% tags=["check"]
def record(kind: str, address: str, block: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <{address}-{kind}>\r\n"
    head += f"WARC-Target-URI: {address}\r\nContent-Length: {len(block)}\r\n\r\n"
    return head.encode() + block + b"\r\n\r\n"


def answer(name: str, body: bytes, status: str = "200 OK", kind: str = "text/html") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\n\r\n"
    return record("response", f"https://{name}.example/", head.encode() + body)


records = [
    record("warcinfo", "", b"software: none"),
    record("request", "https://a.example/", b"GET / HTTP/1.1\r\n\r\n"),
    answer("a", "<p>Käse\r\n\r\nWARC/1.0\r\n</p>".encode()),
    answer("b", b"<p>Nothing here", status="404 Not Found"),
    answer("c", b"\x89PNG", kind="image/png"),
    answer("d", page.encode()),
]
with tempfile.TemporaryDirectory() as place:
    (Path(place) / "crawl.warc.gz").write_bytes(b"".join(map(gzip.compress, records)))
    crawled = list(read_warc(Path(place) / "crawl.warc.gz"))
found_at = [document.source for document in crawled]
assert found_at == ["https://a.example/", "https://d.example/"], "two pages have status 200"
assert crawled[0].text.split() == ["Käse", "WARC/1.0"], "Content-Length counts bytes"
assert crawled[1].text == read_html(page).text, "the main content, as read_html finds it"
assert crawled[1].id == "<https://d.example/-response>", "the id is the record's"

# %% tags=["remove-cell"]
import shutil

shutil.rmtree(folder)

# %% [markdown]
# ## Summary
#
# A document is a text with a stable id, a source and metadata. Every reader gives a lazy stream of
# them in a fixed order, and a report of what could not be read, with file and line; files are
# written whole or not at all. A page's text is what is long and hardly linked. Word frequencies
# follow Zipf's law, with two exponents, and the tail's exponent gives, by a short integral, Heaps'
# law for the growth of the vocabulary. Our corpus is full of copies, fragments, addresses and
# license headers; filters for them must be measured in documents and in characters.
#
# **Checklist: choosing a source and a format.** Does the source hold the languages and subjects
# that the model shall know? May you use it, and is the license kept with every document? Do you
# have the raw pages, or somebody's extraction of them? Are ids independent of run, machine and
# order? Is the revision of a data set recorded? To read from front to back, take JSON Lines with
# Zstandard or gzip, in several files, so that workers can share them. To read columns or samples,
# take Parquet. Never take a format that runs code when it is read, such as pickle. And look at the
# report before you look at the text.
#
# **Further reading.** Penedo and colleagues {cite}`penedo2024fineweb` document every step from
# crawl to corpus and measure each by training models; Raffel and colleagues
# {cite}`raffel2020exploring` list C4's rules. Lü, Zhang and Zhou {cite}`lu2010zipf` treat Heaps'
# law in finite systems, Longpre and colleagues {cite}`longpre2024consent` consent. Next, chapter
# 03 takes up the list.
