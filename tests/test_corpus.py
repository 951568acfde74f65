"""Readers of chapter 02: round trips, bad input of every kind, order, statistics."""

import bz2
import codecs
import contextlib
import gzip
import inspect
import json
import lzma
import os
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmbook import corpus
from llmbook.corpus import (
    CorpusWarning,
    Document,
    Problem,
    ReadReport,
    comment_blocks,
    count_scripts,
    decode_text,
    docstrings,
    fit_power_law,
    html_blocks,
    html_to_text,
    read_files,
    read_html,
    read_installed_docs,
    read_jsonl,
    read_parquet,
    stream_hub,
    vocabulary_growth,
    words,
    write_jsonl,
    write_parquet,
)

try:
    import zstandard
except ImportError:
    zstandard = None
try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    pa = pq = None
needs_zstandard = pytest.mark.skipif(zstandard is None, reason="zstandard is not installed")
needs_parquet = pytest.mark.skipif(pa is None, reason="pyarrow is not installed")

SUFFIXES = ["", ".gz", ".bz2", ".xz", pytest.param(".zst", marks=needs_zstandard)]
WRITERS = [write_jsonl, pytest.param(write_parquet, marks=needs_parquet)]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=6,
)
documents = st.lists(
    st.builds(
        Document,
        text=texts,
        id=texts.filter(bool),
        source=texts,
        metadata=st.dictionaries(
            st.sampled_from(["text", "id", "source", "metadata"]) | texts,
            json_values,
            max_size=3,
        ),
    ),
    min_size=1,
    max_size=6,
)
relaxed = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def untyped():
    """Switch jaxtyping's checks off, as they are for a reader, to see our own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def some(count: int = 3) -> list[Document]:
    return [Document(f"Text {n}, naïve café\u2028☕", f"d{n}", "s", {"n": n}) for n in range(count)]


def lines_of(*rows: object) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


# --- documents -----------------------------------------------------------------------------------


def test_document_gets_an_id_from_its_text():
    assert Document("a").id == Document("a", source="elsewhere", metadata={"k": 1}).id
    assert Document("a").id != Document("b").id
    assert Document("a", "mine").id == "mine"


def test_documents_are_values():
    assert Document("a", metadata={"k": [1]}) == Document("a", metadata={"k": [1]})
    assert len({Document("a"), Document("a"), Document("b")}) == 2
    with pytest.raises(AttributeError):
        Document("a").text = "b"  # type: ignore[misc]
    assert Document("a").metadata is not Document("a").metadata


def test_document_refuses_half_characters():
    with pytest.raises(ValueError, match=r"text: expected text that UTF-8 can encode.*index 2"):
        Document("ab\ud800")
    with pytest.raises(ValueError, match=r"id: expected text that UTF-8 can encode.*index 0"):
        Document("a", "\ud800")
    with pytest.raises(ValueError, match="source: expected text that UTF-8 can encode"):
        Document("a", "b", "\ud800")


@pytest.mark.parametrize("wrong", [(5,), (None,), ("a", 7), ("a", "b", Path("c"))])
@pytest.mark.usefixtures("untyped")
def test_documents_are_made_of_text(wrong):
    with pytest.raises(ValueError, match=r"(text|id|source): expected a str, got"):
        Document(*wrong)


# --- Python source -------------------------------------------------------------------------------

SOURCE = '''"""Module."""
# first
#   second
x = "# no"  # trailing
y = """
# inside a string
"""
    # indented, another block


class Oven:
    """Hot.

    Very.
    """

    if True:
        def bake(self):
            'Bakes.'

    async def cool(self):
        f"not a {x}"
z = 'it''s' + '\\'# no'
# last'''


def test_docstrings_have_lines_and_qualified_names():
    found = docstrings(SOURCE.replace("    # indented", "# indented"))
    assert found == [
        (1, "", "Module."),
        (12, "Oven", "Hot.\n\nVery."),
        (19, "Oven.bake", "Bakes."),
    ]


def test_docstrings_of_bad_source():
    with pytest.raises(SyntaxError):
        docstrings("def (:")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert docstrings('"\\d is an invalid escape"') == [(1, "", "\\d is an invalid escape")]


def test_comments_are_blocks_of_whole_lines():
    assert comment_blocks(SOURCE) == [
        (2, "# first\n#   second"),
        (8, "# indented, another block"),
        (24, "# last"),
    ]
    assert comment_blocks("") == []
    assert comment_blocks("x = 1\n\n#\n\f# b\n") == [(3, "#\n# b")]


def test_comments_agree_with_the_tokenizer():
    import io
    import tokenize

    for path in [*sorted(Path(json.__file__).parent.rglob("*.py")), Path(bz2.__file__)]:
        source = path.read_text(encoding="utf-8")
        lines = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
        }
        ours = {
            line + offset
            for line, block in comment_blocks(source)
            for offset in range(block.count("\n") + 1)
        }
        assert ours == lines


@given(st.text("\"'#\\\n x", max_size=200))
@relaxed
def test_comment_search_never_explodes(source):
    for line, block in comment_blocks(source):
        assert block.startswith("#")
        assert 1 <= line <= source.count("\n") + 1


# --- installed packages --------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with everything that may go wrong, importable but never imported."""
    root = tmp_path / "bakery_for_tests"
    (root / "inner").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text('raise SystemExit("imported")\n# Never run.\n', "utf-8")
    (root / "b.py").write_bytes(b'"""B."""\r\n#-----\r\n# Comment\r\n# two.\r\n')
    (root / "a.py").write_bytes('# -*- coding: latin-1 -*-\n"""Ä."""\n'.encode("latin-1"))
    (root / "inner" / "c.py").write_bytes('"""Ç."""\n'.encode("utf-8-sig"))
    (root / "broken.py").write_text('"""Never closed\n', "utf-8")
    (root / "bytes.py").write_bytes(b'"""\xff\xfe"""\n')
    (root / "nul.py").write_bytes(b'"""a\0b"""\n')
    (root / "half.py").write_text('"""\\ud800"""\n', "utf-8")
    (root / "cookie.py").write_text("# coding: no-such-thing\n", "utf-8")
    (root / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000, "utf-8")
    (root / "tests" / "test_a.py").write_text('"""A test."""', "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "bakery_for_tests"


def test_a_package_with_broken_files(package):
    report = ReadReport()
    found = list(read_installed_docs(package, report=report))
    root = package
    assert [(d.id, d.text, d.metadata["kind"]) for d in found] == [
        (f"{root}/__init__.py:2", "Never run.", "comment"),
        (f"{root}/a.py:1", "-*- coding: latin-1 -*-", "comment"),
        (f"{root}/a.py:2", "Ä.", "docstring"),
        (f"{root}/b.py:1", "B.", "docstring"),
        (f"{root}/b.py:2", "-----\nComment\ntwo.", "comment"),
        (f"{root}/inner/c.py:1", "Ç.", "docstring"),
    ]
    assert {d.source for d in found} == {package}
    broken = ["broken.py", "bytes.py", "cookie.py", "deep.py", "half.py", "nul.py"]
    assert [problem.path for problem in report.problems] == [f"{root}/{name}" for name in broken]
    assert report.problems[0].line == 1
    assert (report.documents, report.files) == (6, 10)


def test_broken_files_are_warned_of_or_raised(package):
    with pytest.warns(CorpusWarning, match="6 documents from 10 files, 6 problems"):
        list(read_installed_docs(package))
    with pytest.raises(ValueError, match=r"broken\.py:1: not valid Python"):
        list(read_installed_docs(package, errors="strict"))


def test_order_does_not_depend_on_workers(package, monkeypatch):
    names = [package, "json", "email", "concurrent"]
    alone, together = ReadReport(), ReadReport()
    one = list(read_installed_docs(names, workers=1, report=alone))
    two = list(read_installed_docs(reversed(names), workers=2, report=together))
    assert one == two
    assert alone.problems == together.problems
    assert len(one) > 200
    keys = [(d.source, d.metadata["path"], d.metadata["line"]) for d in one]
    assert keys == sorted(keys)
    assert len({d.id for d in one}) == len(one)


def test_workers_can_be_abandoned():
    stream = read_installed_docs("json", workers=2)
    assert next(stream).source == "json"
    stream.close()  # type: ignore[attr-defined]


def test_kinds():
    everything = list(read_installed_docs("numpy", kinds="readme"))
    assert [d.metadata["kind"] for d in everything] == ["readme"]
    assert everything[0].id == "numpy/README:1"
    only = list(read_installed_docs("json", kinds=["docstring"]))
    assert {d.metadata["kind"] for d in only} == {"docstring"}
    assert "JSONDecoder.decode" in {d.metadata["name"] for d in only}


def test_packages_by_either_name():
    by_module = list(read_installed_docs("_pytest", kinds=["docstring"], workers=1))
    by_distribution = list(read_installed_docs("PyTest", kinds=["docstring"], workers=1))
    assert {d.text for d in by_module} <= {d.text for d in by_distribution}
    modules = {d.metadata["path"].split("/")[0] for d in read_installed_docs("six", workers=1)}
    assert modules <= {"six.py", "six"}


def test_packages_are_by_default_pythons_own_library():
    first = next(read_installed_docs(workers=1))
    assert first.source == "stdlib" and first.metadata["path"].startswith("stdlib/")
    assert first.text == next(read_installed_docs("stdlib", workers=1)).text


@pytest.mark.parametrize("name", ["nunpy", "", "no such", "a.b", "__main__", "../x"])
def test_unknown_packages(name):
    with pytest.raises(ValueError, match="packages: expected 'stdlib' or installed packages, got"):
        read_installed_docs(name)


def test_near_matches_are_offered():
    with pytest.raises(ValueError, match=r"did you mean .*'numpy'"):
        read_installed_docs(["json", "nunpy"])


def test_packages_without_text():
    with pytest.raises(ValueError, match=r"packages=\['sys'\]: expected at least one document"):
        list(read_installed_docs("sys"))
    with pytest.raises(ValueError, match="packages: expected at least one, got none"):
        read_installed_docs([])


def test_a_package_by_two_names_is_read_once():
    once = list(read_installed_docs("numpy", kinds="readme"))
    twice = list(read_installed_docs(["numpy", "NumPy"], kinds="readme"))
    assert [d.text for d in twice] == [d.text for d in once]
    found = list(read_installed_docs(["_pytest", "PyTest"], kinds=["docstring"], workers=1))
    assert len({d.id for d in found}) == len(found)


def test_modules_of_python_need_no_search(monkeypatch):
    def search():
        raise AssertionError("half a second, for nothing")

    monkeypatch.setattr(corpus.importlib.metadata, "packages_distributions", search)
    assert next(read_installed_docs("json", workers=1)).source == "json"


@pytest.mark.parametrize(
    "wrong",
    [{"kinds": []}, {"kinds": ["poem"]}, {"workers": 0}, {"workers": 1.5}, {"errors": "ignore"}],
)
@pytest.mark.usefixtures("untyped")
def test_bad_arguments_fail_when_called(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}: expected"):
        read_installed_docs("json", **wrong)


SCRIPT = """
import sys
print("ran once")
from llmbook.corpus import read_installed_docs
print(len(list(read_installed_docs("json", workers=2))) > 10)
"""


def test_a_script_without_a_guard_runs_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, "utf-8")
    path = os.pathsep.join([str(Path(corpus.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=60,
    )
    assert (done.stdout.split("\n"), done.stderr) == (["ran once", "True", ""], "")


def test_functions_of_a_notebook_work_alone(monkeypatch):
    def double(number: int) -> int:
        return 2 * number

    double.__module__ = "__main__"
    assert list(corpus.ordered_map(double, [1, 2, 3], workers=2)) == [2, 4, 6]


def test_jobs_and_workers_that_cannot_be(untyped):
    for jobs, workers, message in (
        ((1, 2), 1, "jobs: expected a list, got"),
        ([1, 2], None, "workers: expected a whole number, got None"),
        ([1, 2], 0, "workers: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(corpus.ordered_map(str, jobs, workers))


# --- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_marks_decide(encoding):
    assert decode_text("naïve ☕\r\nb\rc".encode(encoding)) == "naïve ☕\nb\nc"
    if encoding != "utf-8":
        assert decode_text("naïve".encode(encoding), "latin-1") == "naïve"


def test_declared_encodings():
    assert decode_text("naïve".encode("latin-1"), "latin-1") == "naïve"
    assert decode_text("naïve".encode("utf-16-le"), "utf-16-le") == "naïve"
    with pytest.raises(UnicodeDecodeError):
        decode_text("naïve".encode("latin-1"))
    assert decode_text("naïve".encode("latin-1"), errors="replace") == "na\ufffdve"
    with pytest.raises(ValueError, match="binary"):
        decode_text(b"a\0b")
    assert decode_text(b"") == ""
    assert decode_text("na".encode("utf-16-le"), "UTF_16LE") == "na"
    assert decode_text("na".encode("utf-16"), "U16") == "na"


@given(texts)
def test_text_survives_any_mark(text):
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert decode_text(text.encode(encoding)) == expected


# --- JSON Lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_jsonl_round_trip(tmp_path, suffix):
    path = tmp_path / f"docs.jsonl{suffix}"
    assert write_jsonl(iter(some()), path) == 3
    assert list(read_jsonl(path)) == some()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@needs_parquet
@given(documents)
@settings(relaxed, max_examples=15)
def test_any_documents_survive_jsonl_and_parquet(tmp_path, corpus_of_any_kind):
    write_jsonl(corpus_of_any_kind, tmp_path / "any.jsonl.gz")
    assert list(read_jsonl(tmp_path / "any.jsonl.gz")) == corpus_of_any_kind
    write_parquet(corpus_of_any_kind, tmp_path / "any.parquet", row_group=2)
    assert list(read_parquet(tmp_path / "any.parquet")) == corpus_of_any_kind


def test_the_same_documents_give_the_same_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_jsonl(some(), tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_fields_of_others(tmp_path):
    path = tmp_path / "theirs.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf"
        + lines_of({"content": "a", "url": "u", "key": 7, "metadata": "m"})
        + b"\n  \r\n"
        + lines_of({"content": "b", "metadata": {"x": 1}, "source": ["list"]})
    )
    a, b = read_jsonl(path, text_field="content", id_field="key")
    assert a == Document("a", "7", "theirs.jsonl", {"url": "u", "metadata": "m"})
    assert b == Document("b", "theirs.jsonl:4", "theirs.jsonl", {"x": 1, "source": ["list"]})


def test_ids_are_text_or_whole_numbers(tmp_path):
    path = tmp_path / "ids.jsonl"
    rows = [{"text": "t", "id": id} for id in (False, [1], 1.5, {}, 0, "", None)]
    path.write_bytes(lines_of(*rows, {"text": None}))
    report = ReadReport()
    assert [d.id for d in read_jsonl(path, report=report)] == ["0", "ids.jsonl:6", "ids.jsonl:7"]
    assert [p.reason for p in report.problems] == [
        *(f"id: expected text or an int, got {name}" for name in ("bool", "list", "float", "dict")),
        "text: expected text, got NoneType",
    ]


@pytest.mark.parametrize(
    "write, suffix",
    [(write_jsonl, "jsonl"), pytest.param(write_parquet, "parquet", marks=needs_parquet)],
)
def test_files_of_one_name_in_two_folders(tmp_path, write, suffix):
    reader = read_jsonl if write is write_jsonl else read_parquet
    for place in "pq":
        (tmp_path / place).mkdir()
        write([Document("text", place)], tmp_path / place / f"x.{suffix}")
    paths = [tmp_path / place / f"x.{suffix}" for place in "pq"]
    ids = [d.id for d in reader(paths, id_field="none")]
    assert ids == [f"p/x.{suffix}:1", f"q/x.{suffix}:1"]


def test_bad_lines_are_reported_with_their_numbers(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        lines_of({"text": "good"})
        + b'{"text": "cut\n'
        + b'{"text": "caf\xe9"}\n'
        + lines_of(["a list"], {"txt": "a"}, {"text": 5})
        + b'{"text": "\\ud800"}\n'
        + b"[" * 100_000
        + b"\n"
        + lines_of({"text": "also good"})
    )
    report = ReadReport()
    assert [d.text for d in read_jsonl(path, report=report)] == ["good", "also good"]
    assert [(p.path, p.line) for p in report.problems] == [("bad.jsonl", n) for n in range(2, 9)]
    assert "malformed JSON" in report.problems[0].reason
    assert "not utf-8: byte 0xe9" in report.problems[1].reason
    assert "got fields ['txt']" in report.problems[3].reason
    assert str(report.problems[0]).startswith("bad.jsonl:2: ")
    with pytest.warns(CorpusWarning, match=r"2 documents from 1 files, 7 problems.*bad\.jsonl:2"):
        list(read_jsonl(path))
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: malformed JSON"):
        list(read_jsonl(path, errors="strict"))


def test_replace_keeps_text_with_marks(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud800!"}\n{"text": 1}\n')
    report = ReadReport()
    found = [d.text for d in read_jsonl(path, errors="replace", report=report)]
    assert found == ["caf\ufffd", "\ufffd!"]
    assert [p.line for p in report.problems] == [3]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_truncated_files_give_what_they_hold(tmp_path, suffix):
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 122, (2000, 300), dtype=np.uint8)
    rows = [{"text": bytes(row).decode(), "id": str(n)} for n, row in enumerate(letters)]
    data = COMPRESS[suffix](lines_of(*rows))
    path = tmp_path / f"cut.jsonl{suffix}"
    path.write_bytes(data[: 2 * len(data) // 3])
    report = ReadReport()
    try:
        found = list(read_jsonl(path, report=report))
    except ValueError as error:  # all in one block: nothing can be read
        assert suffix == ".bz2" or "no" in str(error)
        found = []
    assert len(found) < 2000
    assert len(report.problems) >= 1
    assert "end" in report.problems[-1].reason.lower()
    path.write_bytes(b"this is not compressed")
    report = ReadReport()
    with pytest.raises(ValueError, match="expected at least one document, got none"):
        list(read_jsonl(path, report=report))
    assert len(report.problems) == 1


@needs_zstandard
def test_zstd_frames_in_a_row(tmp_path):
    compress = zstandard.ZstdCompressor().compress
    rows = [{"text": str(n), "id": str(n)} for n in range(10)]
    path = tmp_path / "frames.jsonl.zst"
    path.write_bytes(b"".join(compress(lines_of(row)) for row in rows) + compress(b""))
    assert [d.id for d in read_jsonl(path)] == [str(n) for n in range(10)]


@needs_zstandard
def test_zstd_with_a_long_window(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "long.jsonl.zst"
    path.write_bytes(compressor.compress(lines_of({"text": "t", "id": "i"})) + compressor.flush())
    assert [d.id for d in read_jsonl(path)] == ["i"]


def test_several_files_in_the_order_given(tmp_path):
    for name in "ab":
        write_jsonl([Document(name)], tmp_path / f"{name}.jsonl")
    found = read_jsonl([tmp_path / "b.jsonl", str(tmp_path / "a.jsonl")])
    assert [d.text for d in found] == ["b", "a"]


def test_reading_is_lazy(tmp_path):
    write_jsonl(some(), tmp_path / "docs.jsonl")
    with (tmp_path / "docs.jsonl").open("ab") as file:
        file.write(b"garbage\n")
    stream = read_jsonl(tmp_path / "docs.jsonl", errors="strict")
    assert [next(stream).id for _ in range(3)] == ["d0", "d1", "d2"]
    with pytest.raises(ValueError, match=r"docs\.jsonl:4"):
        next(stream)


@pytest.mark.parametrize("reader", [read_jsonl, read_parquet, read_files])
def test_missing_files_fail_when_called(tmp_path, reader):
    with pytest.raises(FileNotFoundError, match="paths: no file or folder"):
        reader(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="paths: expected at least one"):
        reader([])
    with pytest.raises(ValueError, match="errors: expected one of strict, skip, replace"):
        reader(tmp_path, errors="loud")


@pytest.mark.parametrize("reader", [read_jsonl, read_parquet])
def test_folders_are_for_read_files(tmp_path, reader):
    with pytest.raises(ValueError, match="expected files, got the folder"):
        reader(tmp_path)


def test_empty_files_hold_no_corpus(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"paths=\['empty.jsonl'\]: expected at least one"):
        list(read_jsonl(tmp_path / "empty.jsonl"))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("write", WRITERS)
def test_writers_name_what_is_no_document(tmp_path, write):
    path = tmp_path / "x.any"
    with pytest.raises(ValueError, match="documents: expected several Documents, got a single str"):
        write("one text", path)
    with pytest.raises(ValueError, match="documents: expected Documents, got str at index 1"):
        write([Document("a"), "a text"], path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", WRITERS)
def test_files_appear_whole_or_not_at_all(tmp_path, write):
    path = tmp_path / ("x.jsonl.gz" if write is write_jsonl else "x.parquet")
    write(some(), path)
    before = path.read_bytes()

    def interrupted():
        yield from some()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(interrupted(), path)
    for unfit in ({"a": {1, 2}}, {"a": float("nan")}, {"a": "\ud800"}):
        with pytest.raises(ValueError, match="documents: JSON cannot hold 'bad'"):
            write([*some(), Document("t", "bad", metadata=unfit)], path)
    with pytest.raises(ValueError, match="documents: expected at least one"):
        write([], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- Parquet -------------------------------------------------------------------------------------


@needs_parquet
def test_parquet_of_others(tmp_path):
    table = pa.table(
        {"content": ["a", None, "c"], "n": [1, 2, 3], "metadata": [{"k": 1}, {"k": 2}, {"k": 3}]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    report = ReadReport()
    found = list(read_parquet(tmp_path / "t.parquet", text_field="content", report=report))
    assert [d.metadata for d in found] == [{"k": 1, "n": 1}, {"k": 3, "n": 3}]
    assert [d.id for d in found] == ["t.parquet:1", "t.parquet:3"]
    assert [p.line for p in report.problems] == [2]


@needs_parquet
def test_broken_parquet(tmp_path):
    write_parquet(some(), tmp_path / "ok.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "ok.parquet").read_bytes()[:-20])
    (tmp_path / "text.parquet").write_text("no", "utf-8")
    report = ReadReport()
    paths = [tmp_path / f"{name}.parquet" for name in ("cut", "ok", "text")]
    assert list(read_parquet(paths, report=report)) == some()
    assert [(p.path, p.line) for p in report.problems] == [
        ("cut.parquet", None),
        ("text.parquet", None),
    ]
    with pytest.raises(ValueError, match="row_group: expected at least 1"):
        write_parquet(some(), tmp_path / "x.parquet", row_group=0)


@needs_parquet
def test_parquet_that_is_not_utf8(tmp_path):
    raw = pa.array([b"good", b"caf\xe9", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text, "n": [1, 2, 3]}), tmp_path / "t.parquet")
    report = ReadReport()
    found = list(read_parquet(tmp_path / "t.parquet", report=report))
    assert [(d.text, d.metadata) for d in found] == [("good", {"n": 1}), ("fine", {"n": 3})]
    assert [(p.line, p.reason[:19]) for p in report.problems] == [(2, "not utf-8: byte 0xe")]
    marked = [d.text for d in read_parquet(tmp_path / "t.parquet", errors="replace")]
    assert marked == ["good", "caf\ufffd", "fine"]
    with pytest.raises(ValueError, match=r"t\.parquet:2: not utf-8"):
        list(read_parquet(tmp_path / "t.parquet", errors="strict"))


# --- HTML ----------------------------------------------------------------------------------------

TEN = "one two three four five six seven eight nine ten"
PAGE = f"""<html lang=de><head><title>T&amp;T</title><script>if (a < b) {{}}</script></head>
<body><nav><a href=x>{TEN}</a></nav><main><h1>Head</h1><p>{TEN} &auml;<br>x<p>{TEN}
<pre>a  b
c</pre></main><footer><a href=x>menu</a></footer></body></html>"""


def test_blocks_and_text():
    assert html_to_text(f"<a name=top><p>{TEN}") == TEN
    assert html_to_text(f"<p>{TEN}<pre>a<br>b</pre>") == f"{TEN}\n\na\nb"
    assert html_to_text(PAGE) == f"Head\n\n{TEN} ä x\n\n{TEN}\n\na  b\nc"
    assert html_to_text(PAGE, main_content=False).startswith(TEN)
    assert [round(b.link_share, 1) for b in html_blocks(PAGE)] == [1, 0, 0, 0, 0, 1]
    assert html_to_text("") == ""
    assert html_to_text("<p>short") == ""


@given(st.text("<>/ap&;!-\"' script", max_size=80))
@relaxed
def test_no_page_is_too_broken(page):
    for block in html_blocks(page):
        assert block.text.strip()
        assert 0 <= block.link_share <= 1
    read_html(page.replace(".htm", ""))


def test_read_html():
    document = read_html(PAGE)
    assert document.metadata == {
        "kind": "html",
        "title": "T&T",
        "language": "de",
        "main_content": True,
    }
    assert TEN in document.text
    assert "menu" not in document.text
    assert "menu" in read_html(PAGE, main_content=False).text
    assert read_html(PAGE, id="mine").id == "mine"
    assert read_html("").text == ""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1", "koi8-r"])
def test_encodings_of_pages(tmp_path, encoding):
    word = "дрожжи" if encoding == "koi8-r" else "Käse"
    page = f"<html><head><meta charset={encoding}></head><p>{word} {TEN}</p></html>"
    assert word in read_html(page.encode(encoding)).text
    (tmp_path / "page.html").write_bytes(page.encode(encoding))
    document = read_html(tmp_path / "page.html")
    assert word in document.text
    assert (document.id, document.source) == ("page.html", "page.html")


# --- encodings of the web -----------------------------------------------------------------------

# CRC-32 of what Chromium's TextDecoder makes of the bytes 0 to 255, U+FFFD where it refuses one.
BYTE_TABLES = [
    ("ibm866", 0x18354155),
    ("iso-8859-10", 0x62541EB6),
    ("iso-8859-13", 0xFE9A6B74),
    ("iso-8859-14", 0x3447425B),
    ("iso-8859-15", 0x0B55713A),
    ("iso-8859-16", 0xC3F72EA5),
    ("iso-8859-2", 0xEC22F3A0),
    ("iso-8859-3", 0x102C87E8),
    ("iso-8859-4", 0xD69A214D),
    ("iso-8859-5", 0xEF4AAD4C),
    ("iso-8859-6", 0x6682A7A7),
    ("iso-8859-7", 0x0855B3F3),
    ("iso-8859-8", 0x86610D82),
    ("iso-8859-8-i", 0x86610D82),
    ("koi8-r", 0x4C6B86EB),
    ("koi8-u", 0x21A76D43),
    ("macintosh", 0xE21E6838),
    ("windows-1250", 0x195809A9),
    ("windows-1251", 0xBA6A44B7),
    ("windows-1252", 0x040EC49F),
    ("windows-1253", 0x7F7B0A97),
    ("windows-1254", 0x6BE1F4ED),
    ("windows-1255", 0xF550490B),
    ("windows-1256", 0x430F134A),
    ("windows-1257", 0x6735C8B9),
    ("windows-1258", 0x3CD26C53),
    ("windows-874", 0xA64C2C4E),
    ("x-mac-cyrillic", 0x72FFF6CA),
    ("x-user-defined", 0xF866972C),
]


@pytest.mark.parametrize(("name", "checksum"), BYTE_TABLES)
def test_single_bytes_are_decoded_as_browsers_do(name, checksum):
    decoded = [corpus._decode_by_label(bytes([byte]), name, "replace") for byte in range(256)]
    assert zlib.crc32("".join(decoded).encode()) == checksum
    whole = corpus._decode_by_label(bytes(range(256)), name, "replace")
    assert whole == "".join(decoded)


def test_japanese_pairs_are_decoded_as_browsers_do():
    # All pairs of bytes that Chromium's TextDecoder takes for EUC-JP, as a checksum of the text.
    text = []
    for lead in range(0x80, 0x100):
        for trail in range(0x30, 0x100):
            with contextlib.suppress(ValueError):
                text.append(corpus._decode_by_label(bytes([lead, trail]), "euc-jp", "strict"))
    assert len(text) == 7399
    assert zlib.crc32("".join(text).encode()) == 0xFDF22443


PAGES = [
    ("shift_jis", b"\x87\x40 \x81\x60", "① ～"),  # of Windows-31J, not of Python's shift_jis
    ("x-sjis", b"\x87\x8a", "㈱"),
    ("euc-kr", b"\x8c\x63", "똠"),  # of cp949
    ("KS_C_5601-1987", b"\x8c\x63", "똠"),
    ("iso-2022-jp", b"\x1b$B$3$s-!\x1b(B ok \x1b(I1\x1b(J\\~\x1b(B", "こん① ok ｱ¥\u203e"),
    ("csiso2022jp", b"\x1b$@$3\n$s\x1b(B", "こ ん"),
    ("euc-jp", b"\xad\xa1 \xa1\xc1 \x8e\xb1 \x8f\xb0\xa1 x", "① ～ ｱ 丂 x"),
    ("gb2312", b"\x81\x30\x81\x34 \x84\xe4", "\x84 勪"),  # of GB 18030
    ("big5", b"\xa4\x40 \x87\x40", "一 䏰"),  # the second is of the Hong Kong extension
    ("latin1", b"\x93x\x94 \x80 \x81", "“x” € \x81"),  # Windows-1252, with its controls
    ("US-ASCII", b"caf\xe9", "café"),
    ("iso-8859-9", b"\xfd \x80", "ı €"),  # Windows-1254
    ("tis-620", b"\xa1\x80", "ก€"),  # Windows-874
    ("iso-8859-8-i", b"\xe0", "א"),
    ("koi8-ru", b"\xae", "ў"),
    ("windows-1255", b"\xca\xe0", "\u05baא"),
    ("x-mac-ukrainian", b"\xff", "€"),
    ("macintosh", b"\x8a", "ä"),
    ("x-user-defined", b"\x80", "€"),  # in a page, Windows-1252
    ("utf-16", "é".encode(), "é"),  # what can be read byte by byte is not UTF-16
    ("utf-16be", "é".encode(), "é"),
    ("no-such-encoding", "é".encode(), "é"),
]


@pytest.mark.parametrize(("label", "data", "text"), PAGES)
def test_labels_mean_what_the_standard_says(label, data, text):
    for head in (
        f"<meta charset={label}>",
        f"<META CHARSET = '{label.upper()}' >",
        f'<meta http-equiv="content-type" content="text/html; charset={label}">',
        f'<?xml version="1.0" encoding="{label}"?>',
        f"<!-- <meta charset=koi8-r> --><meta name=x><meta charset=unheard><meta charset={label}>",
    ):
        page = f"<html>{head}<p>".encode() if head[1] != "?" else f"{head}<html><p>".encode()
        assert read_html(page + data, main_content=False).text == text


def test_all_labels_of_the_standard_are_known():
    from webencodings.labels import LABELS

    assert len(LABELS) >= 228
    for label, name in LABELS.items():
        page = f"<meta charset={label}><p>Dough rises.".encode()
        expected = "\ufffd" if name == "replacement" else "Dough rises."
        assert read_html(page, main_content=False).text == expected, label


def test_declarations_that_do_not_count():
    late = b"<p>" + b" " * 1024 + b"<meta charset=iso-2022-jp>\x1b(B"
    assert "\x1b" not in read_html(b"<meta charset=iso-2022-jp><p>a\x1b(Bb").text
    assert corpus._declared_encoding(late) is None
    for page in (b"<!-- <meta charset=hz-gb-2312> --><p>plain", b"<p>charset=hz-gb-2312"):
        assert "\ufffd" not in read_html(page, main_content=False).text
    assert read_html("<meta charset=hz-gb-2312><p>é".encode()).text == "é"
    marked = codecs.BOM_UTF8 + "<meta charset=iso-2022-jp><p>é".encode()
    assert read_html(marked).text == "é"
    assert read_html(codecs.BOM_UTF16_LE + "<p>é".encode("utf-16-le") + b"x").text == "é\ufffd"


def test_encodings_without_a_declaration():
    assert read_html(b"<p>\x1b$B$3$s\x1b(B").text == "こん"
    assert read_html(b"<p>caf\xe9 \x93au lait\x94").text == "café “au lait”"
    russian = "Утром над портом лежит туман, и первые лодки возвращаются раньше. " * 3
    assert read_html(f"<p>{russian}".encode("windows-1251")).text == russian.strip()
    japanese = "朝、港は霧に包まれ、町が目を覚ます前に最初の船が戻ってくる①。" * 3
    assert read_html(f"<p>{japanese}".encode("cp932")).text == japanese


@pytest.mark.parametrize(
    ("label", "data", "reason"),
    [
        ("hz-gb-2312", b"x", "hz-gb-2312: an encoding that browsers refuse to read"),
        ("euc-jp", b"\xa4\xb3\xff", "not euc-jp: byte 0xff cannot be decoded"),
        ("iso-2022-jp", b"\x1b$B$3$", "not iso-2022-jp: byte 0xa4 cannot be decoded"),
        ("euc-kr", b"\xff", "can't decode byte 0xff"),
        ("windows-1253", b"\xd2", "can't decode byte 0xd2"),
    ],
)
def test_what_an_encoding_does_not_have(tmp_path, label, data, reason):
    page = f"<meta charset={label}><p>".encode() + data
    assert read_html(page).text.endswith("\ufffd")
    with pytest.raises(ValueError, match=reason):
        read_html(page, errors="strict")
    (tmp_path / "a.html").write_bytes(page)
    (tmp_path / "b.html").write_bytes(b"<p>fine")
    report = ReadReport()
    assert [d.text for d in read_files(tmp_path, report=report)] == ["fine"]
    assert [problem.path for problem in report.problems] == ["a.html"]


@pytest.mark.usefixtures("untyped")
def test_bad_pages():
    with pytest.raises(ValueError, match="page: expected HTML, or a Path"):
        read_html("folder/page.html")
    with pytest.raises(FileNotFoundError):
        read_html(Path("none.html"))
    with pytest.raises(ValueError, match="errors: expected"):
        read_html("<p>", errors="loud")
    with pytest.raises(ValueError, match="binary"):
        read_html(b"\x89PNG\0\0")
    for wrong_type in (None, bytearray(b"<p>"), 5):
        with pytest.raises(ValueError, match="page: expected str, bytes or a Path, got"):
            read_html(wrong_type)
    assert read_html(b"<p>a\0b").text == read_html("<p>a\0b").text == "ab"
    assert read_html("<p>a\ud800b").text == "a\ufffdb"
    wrong = b"<meta charset=utf-8><p>caf\xe9 au lait"
    with pytest.raises(UnicodeDecodeError):
        read_html(wrong, errors="strict")
    assert "caf" in read_html(wrong).text


@pytest.mark.parametrize("tag", ["<div>", "</x><div>", "<B>", "<ul><li>"])
def test_deep_pages_are_read_in_time(tag):
    document = read_html(tag * 100_000 + TEN)
    assert TEN in document.text
    assert document.metadata["main_content"] is False


def test_long_pages_are_not_deep():
    items = "".join(f"<li>{TEN} {n}<br><img src=x>" for n in range(3000))
    page = f"<nav><a href=x>menu</a></nav><main>{items}</main>" + "</div>" * 2000
    document = read_html(page)
    assert document.metadata["main_content"] is True
    assert "menu" not in document.text


# --- folders -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    if zstandard is None or pa is None:
        pytest.skip("the folder has Zstandard and Parquet files")
    root = tmp_path / "docs"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "config.txt").write_text("no", "utf-8")
    (root / "b.md").write_bytes("# Über\r\n".encode("utf-8-sig"))
    (root / "a.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (root / "sub" / "page.HTML").write_text(PAGE, "utf-8")
    (root / "sub" / "deep" / "c.txt").write_text("c", "utf-8")
    (root / "z.png").write_bytes(b"\x89PNG")
    (root / "README").write_text("no suffix", "utf-8")
    write_jsonl(some(2), root / "rows.jsonl.zst")
    write_parquet([Document("p", "p1")], root / "rows.parquet")
    return root


IDS = ["a.txt.gz", "b.md", "d0", "d1", "p1", "sub/deep/c.txt", "sub/page.HTML"]


def test_a_folder(folder):
    report = ReadReport()
    found = list(read_files(folder, report=report))
    assert [d.id for d in found] == IDS
    assert found[1].text == "# Über\n"
    assert [d.metadata.get("kind") for d in found] == [
        "text",
        "markdown",
        None,
        None,
        None,
        "text",
        "html",
    ]
    assert report.ignored == {".png": 1, "no suffix": 1, "hidden": 1}
    assert (report.files, report.documents, report.problems) == (6, 7, [])
    assert list(read_files(str(folder))) == found


def test_patterns_and_several_paths(folder, monkeypatch):
    assert [d.id for d in read_files(folder, "*.txt")] == ["sub/deep/c.txt"]
    assert [d.id for d in read_files(folder, "sub/*")] == IDS[-2:]
    both = read_files([folder / "sub", folder / "b.md", folder / "b.md"])
    assert [d.id for d in both] == ["b.md", *IDS[-2:]]
    monkeypatch.chdir(folder / "sub")
    assert [d.id for d in read_files("../b.md")] == ["b.md"]
    assert [d.id for d in read_files(".")] == ["deep/c.txt", "page.HTML"]


def test_folders_with_nothing_in_them(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"paths=.*expected at least one document, got none"):
        list(read_files(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"pattern='\*.rst': expected at least one"):
        list(read_files(folder, "*.rst"))
    with pytest.raises(ValueError, match=r"paths: expected a suffix among .*z\.png"):
        read_files(folder / "z.png")
    for encoding in ("latin-99", "rot13", "base64"):
        with pytest.raises(ValueError, match="encoding: expected one that Python knows"):
            read_files(folder, encoding=encoding)


def test_bad_files_in_a_folder(tmp_path):
    (tmp_path / "bad.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "binary.md").write_bytes(b"\0\1\2")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-12])
    (tmp_path / "empty.txt").write_text(" \n", "utf-8")
    (tmp_path / "not.txt.xz").write_bytes(b"not")
    (tmp_path / "ok.txt").write_text("ok", "utf-8")
    report = ReadReport()
    assert [d.text for d in read_files(tmp_path, report=report)] == ["ok"]
    names = ["bad.txt", "binary.md", "cut.txt.gz", "empty.txt", "not.txt.xz"]
    assert [p.path for p in report.problems] == names
    assert [p.reason for p in report.problems][1] == "binary: a zero byte near the start"
    with pytest.warns(CorpusWarning, match="1 documents from 6 files, 5 problems"):
        list(read_files(tmp_path))
    with pytest.raises(ValueError, match=r"bad\.txt: not utf-8: byte 0xe9 at 3"):
        list(read_files(tmp_path, errors="strict"))
    (latin,) = read_files(tmp_path / "bad.txt", encoding="latin-1")
    assert latin.text == "café"
    (marked,) = read_files(tmp_path / "bad.txt", errors="replace")
    assert marked.text == "caf\ufffd"


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except (OSError, NotImplementedError):
        pytest.skip("this system does not let us make symbolic links")


def test_links_that_lead_back(folder):
    link(folder / "sub" / "up", folder)
    link(folder / "gone.txt", folder / "nowhere.txt")
    report = ReadReport()
    assert [d.id for d in read_files(folder, report=report)] == IDS
    assert [p.path for p in report.problems] == ["gone.txt"]


def test_links_do_not_hide_real_paths(tmp_path):
    (tmp_path / "y" / "z").mkdir(parents=True)
    (tmp_path / "y" / "z" / "t.txt").write_text("t", "utf-8")
    link(tmp_path / "a", tmp_path / "y" / "z")
    link(tmp_path / "b", tmp_path / "y" / "z")
    assert [d.id for d in read_files(tmp_path)] == ["y/z/t.txt"]
    assert [d.id for d in read_files(tmp_path / "a")] == ["t.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_names_that_are_not_utf8(tmp_path):
    for name in (b"x\xfe.txt", b"x\xff.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("t", "utf-8")
    found = list(read_files(tmp_path))
    assert [d.id for d in found] == ["x\\xfe.txt", "x\\xff.txt"]
    assert write_jsonl(found, tmp_path / "ok.jsonl") == 2


@pytest.mark.skipif(os.name == "nt", reason="permissions work otherwise on Windows")
def test_unreadable_files(folder):
    (folder / "b.md").chmod(0)
    (folder / "sub" / "deep").chmod(0)
    if os.access(folder / "b.md", os.R_OK):
        (folder / "sub" / "deep").chmod(0o755)
        pytest.skip("root reads everything")
    report = ReadReport()
    found = [d.id for d in read_files(folder, report=report)]
    (folder / "sub" / "deep").chmod(0o755)
    assert found == [i for i in IDS if i not in ("b.md", "sub/deep/c.txt")]
    assert len(report.problems) == 2
    assert all("ermission" in p.reason for p in report.problems)


def test_an_unreadable_file_is_a_problem(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(corpus, "_open", refuse)
    report = ReadReport()
    assert [d.id for d in read_files(folder, report=report)] == ["p1"]
    assert {p.reason for p in report.problems} == {"PermissionError: Permission denied"}


# --- hub -----------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("pyarrow")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(some(50), folder / "train.parquet", row_group=10)
    return str(folder)


def test_a_local_folder_is_a_data_set(dataset):
    assert list(stream_hub(dataset)) == some(50)
    assert [d.id for d in stream_hub(dataset, limit=3)] == ["d0", "d1", "d2"]
    shuffled = [d.id for d in stream_hub(dataset, shuffle_buffer=20, seed=1)]
    assert shuffled != [d.id for d in some(50)]
    assert Counter(shuffled) == Counter(d.id for d in some(50))
    assert shuffled == [d.id for d in stream_hub(dataset, shuffle_buffer=20, seed=1)]
    assert shuffled != [d.id for d in stream_hub(dataset, shuffle_buffer=20, seed=2)]


def test_a_jsonl_folder_with_other_fields(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "part.jsonl").write_bytes(lines_of({"body": "a"}, {"body": None}, {"body": "c"}))
    report = ReadReport()
    found = list(stream_hub(str(tmp_path), text_field="body", report=report))
    assert [d.text for d in found] == ["a", "c"]
    assert found[0].id == Document("a").id
    assert [p.line for p in report.problems] == [2]


def test_a_stream_that_breaks_off(dataset, monkeypatch):
    class Table:
        column_names = None

        def __iter__(self):
            yield {"text": "good"}
            raise RuntimeError("connection lost")

    monkeypatch.setattr(corpus, "_open_hub", lambda *args: Table())
    report = ReadReport()
    assert [d.text for d in stream_hub("some/set", report=report)] == ["good"]
    assert report.problems == [Problem("some/set", 2, "RuntimeError: connection lost")]


def test_bad_requests_to_a_hub(dataset):
    with pytest.raises(ValueError, match=r"text_field: expected one of .*'text'.*, got 'body'"):
        stream_hub(dataset, text_field="body")
    with pytest.raises(ValueError, match="split='tset'"):
        stream_hub(dataset, split="tset")
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        stream_hub(dataset, limit=0)
    with pytest.raises(ValueError, match="shuffle_buffer: expected at least 0, got -1"):
        stream_hub(dataset, shuffle_buffer=-1)


def test_without_a_network(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConnectionError, match="the hub could not be asked for 'some/set'"):
        stream_hub("some/set")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"llmbook\[hub\]"):
        stream_hub("some/set")


@pytest.mark.parametrize("missing, name", [("zstandard", "x.jsonl.zst"), ("pyarrow", "x.parquet")])
def test_without_the_formats(tmp_path, monkeypatch, missing, name):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"llmbook\[scale\]"):
        list(read_files(tmp_path / name))
    with pytest.raises(ImportError, match=r"llmbook\[scale\]"):
        (write_parquet if missing == "pyarrow" else write_jsonl)([Document("a")], tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"x", "what was there is not lost"


# --- statistics ----------------------------------------------------------------------------------


def test_words_and_scripts():
    assert words("Don't stop_me 2 ÜBER") == ["don", "t", "stop", "me", "über"]
    assert count_scripts("aä б 中 7") == {"LATIN": 2, "CYRILLIC": 1, "CJK": 1}
    assert count_scripts("") == {}


@given(st.floats(-3, 3), st.floats(0.1, 100), st.integers(2, 60))
@relaxed
def test_exact_powers_are_found(exponent, constant, bins):
    x = np.arange(1, 500)
    found = fit_power_law(x, constant * x.astype(float) ** exponent, bins)
    assert found == pytest.approx((exponent, constant), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "x, y",
    [
        ([1], [1]),
        ([1, 2], [0, 1]),
        ([0, 1], [1, 1]),
        ([2, 2], [1, 3]),
        ([1, np.inf], [1, 1]),
        ([1, 2], [1, np.nan]),
    ],
)
def test_powers_need_positive_values(x, y):
    with pytest.raises(ValueError, match="x, y: expected positive values"):
        fit_power_law(np.array(x), np.array(y))


@pytest.mark.usefixtures("untyped")
def test_powers_need_points_and_bins():
    x = np.arange(1, 10)
    with pytest.raises(ValueError, match=r"y: expected .* got .*\(8,\)"):
        fit_power_law(x, x[:-1])
    for bins in (0, 1):
        with pytest.raises(ValueError, match=f"bins: expected at least 2, got {bins}"):
            fit_power_law(x, x, bins)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60))
@relaxed
def test_growth_counts_different_tokens(tokens):
    sizes, distinct = vocabulary_growth(tokens, points=10)
    assert [len(set(tokens[:n])) for n in sizes] == distinct.tolist()
    assert sizes[0] == 1
    assert sizes[-1] == len(tokens)


def test_growth_of_nothing():
    with pytest.raises(ValueError, match="expected a token and 2 points"):
        vocabulary_growth([])


def test_problems_read_well():
    assert str(Problem("a.txt", None, "why")) == "a.txt: why"
    report = ReadReport(problems=[Problem("a", n, "why") for n in range(5)])
    assert str(report).endswith("5 problems (a:0: why; a:1: why; a:2: why; ...)")


@pytest.mark.parametrize("items", ["abc", b"abc"])
def test_one_is_not_several(items):
    for check in (corpus.iter_documents, corpus.iter_texts):
        with pytest.raises(ValueError, match=r"given: expected several .*, got a single"):
            check(items, "given")


def test_what_is_no_document_is_named_by_its_place():
    mixed = [Document("a"), "b", 5]
    with pytest.raises(ValueError, match="documents: expected Documents, got str at index 1"):
        list(corpus.iter_documents(mixed))
    with pytest.raises(ValueError, match="given: expected Documents or texts, got int at index 2"):
        list(corpus.iter_texts(mixed, "given"))
    assert list(corpus.iter_texts(mixed[:2])) == ["a", "b"]
    assert list(corpus.iter_documents(mixed[:2], texts=True)) == [Document("a"), Document("b")]


def test_importing_is_quick():
    code = (
        "import sys, llmbook.corpus;"
        "heavy = {'torch', 'datasets', 'pyarrow', 'zstandard', 'resiliparse', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("metadata", lambda: Document("a", metadata=["k"])),
        ("source", lambda: docstrings(b"x = 1")),
        ("packages", lambda: read_installed_docs(["json", 3])),
        ("encoding", lambda: decode_text(b"a", "latin-99")),
        ("encoding", lambda: decode_text(b"a", None)),
        ("paths", lambda: read_files([5])),
        ("paths", lambda: read_files(5)),
        ("pattern", lambda: read_files(".", 5)),
        ("text_field", lambda: read_jsonl(".", text_field=["text"])),
        ("id_field", lambda: read_parquet(".", id_field=None)),
        ("path", lambda: write_jsonl([Document("a")], 5)),
        ("name", lambda: stream_hub(5)),
        ("seed", lambda: stream_hub("x", seed="1")),
        ("shuffle_buffer", lambda: stream_hub("x", shuffle_buffer=None)),
        ("bins", lambda: fit_power_law(np.arange(1, 9), np.arange(1, 9), None)),
        ("documents", lambda: corpus.iter_documents(np.array(3))),
        ("report", lambda: read_files(".", report=[])),
        ("report", lambda: read_installed_docs("json", report={})),
    ],
)
def test_bad_arguments_are_named(argument, call):
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        call()


# --- documented defaults and limits --------------------------------------------------------------

TABLES = {"text_field": "text", "id_field": "id", "errors": "skip", "report": None}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (
            read_installed_docs,
            {
                "packages": "stdlib",
                "kinds": ("docstring", "comment", "readme"),
                "workers": None,
                "errors": "skip",
                "report": None,
            },
        ),
        (decode_text, {"encoding": "utf-8", "errors": "strict"}),
        (read_jsonl, TABLES),
        (read_parquet, TABLES),
        (write_parquet, {"row_group": 10_000}),
        (html_to_text, {"main_content": True}),
        (read_html, {"main_content": True, "id": "", "errors": "replace"}),
        (read_files, {"pattern": "*", "encoding": "utf-8", "errors": "skip", "report": None}),
        (
            stream_hub,
            {
                **TABLES,
                "config": None,
                "split": "train",
                "revision": None,
                "shuffle_buffer": 0,
                "seed": 0,
                "limit": None,
            },
        ),
        (fit_power_law, {"bins": 30}),
        (vocabulary_growth, {"points": 50}),
        (corpus.iter_documents, {"argument": "documents", "texts": False}),
        (corpus.iter_texts, {"argument": "documents"}),
    ],
)
def test_documented_defaults(function, defaults):
    parameters = inspect.signature(function).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


@pytest.mark.parametrize(("size", "cores", "workers"), [(8e6, 8, 1), (9e6, 8, 4), (9e6, 2, 2)])
def test_large_jobs_are_shared_out(monkeypatch, tmp_path, size, cores, workers):
    path = tmp_path / "large.py"
    path.write_text("x = 1\n" + "#" * int(size - 6), "utf-8")
    given = []
    monkeypatch.setattr(corpus, "_locate", lambda name, owners: ([path], None))
    monkeypatch.setattr(corpus.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(corpus, "ordered_map", lambda f, jobs, n: given.append(n) or map(f, jobs))
    monkeypatch.setattr(corpus, "_read_python", lambda *job: [Document("a")])
    list(read_installed_docs("any"))
    list(read_installed_docs("any", workers=3))
    assert given == [workers, 3]


@needs_parquet
def test_rows_are_written_in_groups(tmp_path):
    for count, group, groups in ((5, 2, 3), (4, 2, 2), (10_001, None, 2)):
        options = {} if group is None else {"row_group": group}
        some_more = (Document(str(n)) for n in range(count))
        assert write_parquet(some_more, tmp_path / "x.parquet", **options) == count
        assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == groups


def test_zero_bytes_near_the_start_are_binary():
    with pytest.raises(ValueError, match="binary: a zero byte near the start"):
        decode_text(b"a" * 8191 + b"\0")
    assert decode_text(b"a" * 8192 + b"\0").endswith("a\0")
    assert decode_text(b"a\0" * 9, "utf-16-le") == "a" * 9


def test_blocks_at_the_limits_of_the_rule():
    nine = TEN.rpartition(" ")[0]
    assert html_to_text(f"<p>{TEN}") == TEN
    assert html_to_text(f"<p>{nine}") == ""
    third = "<p><a href=x>aaaa aaaa</a> aaaa a a a a a a a a a a a a"
    assert [block.link_share for block in html_blocks(third)] == [8 / 24]
    assert html_to_text(third).startswith("aaaa")
    assert html_to_text(third.removesuffix(" a")) == ""
    pages = [f"<p>{TEN}<p>next", f"<p>before<p>{TEN}", f"<p>{TEN}<p>a<p>b"]
    kept = [f"{TEN}\n\nnext", f"before\n\n{TEN}", f"{TEN}\n\na"]
    assert [html_to_text(page) for page in pages] == kept


def test_a_thousand_open_elements_are_not_too_deep():
    for depth, looked in ((1000, True), (1001, False)):
        assert read_html("<div>" * depth + TEN).metadata["main_content"] is looked


def test_growth_has_as_many_points_as_asked_for():
    sizes, _ = vocabulary_growth(map(str, range(100_000)))
    assert len(sizes) == len(np.unique(np.geomspace(1, 100_000, 50).round()))
    with pytest.raises(ValueError, match="expected a token and 2 points, got 3 and 1"):
        vocabulary_growth("abc", points=1)
    assert len(vocabulary_growth("abc", points=2)[0]) == 2


def test_three_problems_are_named():
    problems = [Problem("a", n, "why") for n in range(4)]
    assert str(ReadReport(problems=problems[:3])).endswith("(a:0: why; a:1: why; a:2: why)")
    assert str(ReadReport(problems=problems)).endswith("a:2: why; ...)")
    assert str(ReadReport(2, 1)) == "2 documents from 1 files, 0 problems"


def test_a_warning_only_without_a_report(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\nbroken\n')
    with pytest.warns(CorpusWarning, match="1 documents from 1 files, 1 problems"):
        list(read_jsonl(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(read_jsonl(path, report=ReadReport()))


def test_a_buffer_of_rows_shuffles_by_its_size():
    rows = list(range(100))
    assert list(corpus._shuffled(rows, 0, 0)) == list(corpus._shuffled(rows, 1, 0)) == rows
    for size in (2, 10, 200):
        mixed = list(corpus._shuffled(rows, size, 0))
        assert sorted(mixed) == rows != mixed
        assert max(row - place for place, row in enumerate(mixed)) <= size
        assert mixed == list(corpus._shuffled(iter(rows), size, 0))
