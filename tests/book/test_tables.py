"""What a chapter says of itself reaches every table, and nothing else has to be edited."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import checks
import headers
import pytest
import yaml
from book import ROOT, BookError, code_cells, read_notebook, read_text
from sync import main, out_of_date, sync, write_times
from tables import not_current, write_tables
from test_workbook import run_nbval

FIRST = "chapters/00_first.py"
THIRD = '''\
# %% [markdown]
# # Third
#
# > Doubling | halving.
#
# | | |
# |---|---|
# | **Part** | II. Composing |
# | **You build** | {py:func}`~llmbook.third.half` |
# | **You need** | {doc}`00_first` |
# | **It takes** | 5 minutes for the main line, 5 minutes for everything, 15 seconds to run |

# %% tags=["remove-cell"]
#| default_exp third


# %%
#| export
def half(x: int) -> float:
    """Return half of ``x``."""
    return x / 2
'''


def files(root: Path) -> dict[str, str]:
    found = (f for f in root.rglob("*") if f.is_file())
    return {f.relative_to(root).as_posix(): read_text(f) for f in found}


def test_the_tables_say_what_the_chapters_say(book):
    readme = read_text(book / "README.md")
    assert readme.startswith("Before.\n") and readme.endswith("\nAfter.\n")
    assert (
        "| 01 [Second](chapters/01_second.ipynb) | `llmbook.second` | Doubling twice. | 2 minutes |"
    ) in readme
    assert "Chapters 00 and 01 are written; 02 and 03 are planned." in readme
    assert "Planned, and not written yet: 02 Thirds, 03 Fourths." in readme
    assert "This is written" not in readme
    assert "### Part III. Conducting" not in readme  # nothing is written, nothing planned
    teaching = read_text(book / "teaching.md")
    assert "| 20 minutes | 1.5 hours | 2 minutes | 1 (25 minutes) |" in teaching
    assert "| {doc}`chapters/01_second` | twos ({doc}`/chapters/00_first`) |" in teaching
    reference = read_text(book / "api/index.md")
    assert "{py:func}`four times <llmbook.second.quadruple>`" in reference
    first, last = yaml.safe_load(read_text(book / "_toc.yml"))["parts"]
    chapters = [{"file": "chapters/00_first"}, {"file": "chapters/01_second"}]
    assert first == {"caption": "Counting", "chapters": chapters}
    assert last["chapters"] == [{"file": "api/first"}, {"file": "api/second"}]


def test_a_new_chapter_touches_its_own_files_and_the_tables(book):
    (book / "chapters/02_third.py").write_text(THIRD, encoding="utf-8")
    before = files(book)
    assert sync(book)
    after = files(book)
    assert {name for name in after if after[name] != before.get(name)} == {
        "chapters/02_third.ipynb",
        "llmbook/third.py",
        "api/third.md",
        *("README.md", "index.md", "teaching.md", "api/index.md", "_toc.yml"),
    }
    assert ".. automodule:: llmbook.third\n" in after["api/third.md"]
    assert "## Part II. Composing\n\n| Chapter" in after["README.md"]
    assert "Doubling \\| halving." in after["README.md"]
    assert "Planned, and not written yet: 03 Fourths." in after["README.md"]
    assert "caption: Composing" in after["_toc.yml"]
    assert not not_current(book)


def test_a_page_of_the_reference_is_its_authors(book):
    (book / "api/first.md").write_text("mine", encoding="utf-8")
    (book / "api/second.md").unlink()
    assert not_current(book) == ["api/second.md is missing: run `make sync`"]
    assert write_tables(book) == ["api/second.md"]
    assert read_text(book / "api/first.md") == "mine"


def test_a_draft_can_be_run_before_its_header_is_complete(book, edit):
    edit(FIRST, "**It takes**", "**It lasts**")
    edit(FIRST, "double(4)", "double(5)")
    tables = read_text(book / "README.md")
    with pytest.raises(BookError, match=r"all is in sync but(.|\n)*no row \*\*It takes\*\*"):
        sync(book)
    assert not out_of_date(book)
    assert read_text(book / "README.md") == tables


def test_all_faults_are_named_at_once(book, edit):
    edit(FIRST, "I. Counting", "Counting")
    edit(FIRST, "5 minutes for the", "x minutes for the")
    edit("chapters/01_second.py", "**You need**", "**You want**")
    assert [fault.split(" says")[0].split(" cannot")[0] for fault in headers.faults(book)] == [
        "00_first: row **Part**",
        "00_first: row **It takes**",
        "01_second: the header has no row **You need**, or it is empty",
    ]


def test_measured_times_go_into_the_headers(book, capsys):
    headers.record_times(book, {"00_first": 3.14, "01_second": 200.0})
    headers.record_times(book, {"00_first": 15.01})
    lines = headers.stated_and_measured(book).splitlines()
    assert lines[1].split() == [*"00_first 15 seconds 15.0 s".split()]
    assert lines[2].endswith("200.0 s  longer: make sync ARGS=--times")
    write_times(book)
    sync(book)
    assert "1.5 hours for everything, 3.5 minutes to run |" in read_text(
        book / "chapters/01_second.ipynb"
    )
    assert "| Doubling twice. | 3.5 minutes |" in read_text(book / "README.md")
    assert "executing" not in capsys.readouterr().out  # it is prose
    assert not out_of_date(book) and not not_current(book)


def test_nothing_measured_is_said(book):
    with pytest.raises(BookError, match="nothing is measured yet"):
        write_times(book)
    assert "not yet" in headers.stated_and_measured(book)


def test_the_tests_measure_each_chapter(book):
    tools = Path(headers.__file__).parent
    options = "-q -p nbval_exercises --nbval-current-env -W default -p no:cacheprovider".split()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "chapters/01_second.ipynb", *options],
        cwd=book,
        env=os.environ | {"PYTHONPATH": f"{tools}{os.pathsep}{book}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (name,) = times = headers.measured_times(book)
    assert name == "01_second"
    assert 0.2 < times[name] < 60


def test_a_chapter_that_ran_in_part_is_not_measured(book):
    from nbval_exercises import PROOF, Clock

    def report(number: int, passed: bool = True, properties: tuple = ()) -> SimpleNamespace:
        nodeid = f"chapters/00_first.ipynb::Cell {number}"
        found = {"nodeid": nodeid, "duration": 1.0, "passed": passed, "when": "call"}
        return SimpleNamespace(**found, user_properties=list(properties))

    count = len(code_cells(read_notebook(book / "chapters/00_first.ipynb")))
    for last in (report(count - 1, passed=False), None, report(count - 1)):
        clock = Clock(book)
        for cell in filter(None, [*map(report, range(count - 1)), last]):
            clock.pytest_runtest_logreport(cell)
        clock.pytest_runtest_logreport(report(count, properties=([PROOF, True],)))
        clock.pytest_sessionfinish()
        whole = last is not None and last.passed
        assert headers.measured_times(book) == ({"00_first": float(count)} if whole else {})


def test_the_chapter_in_small_of_the_instructions_is_a_chapter(book):
    page = read_text(ROOT / "CONTRIBUTING.md")
    script, wrong = re.findall(r"^```python\n(# %% .*?)^```$", page, re.MULTILINE | re.DOTALL)
    script = script.replace("III. Pretraining", "II. Composing")  # the miniature's parts
    (book / "chapters/02_precision.py").write_text(script, encoding="utf-8")
    (book / "tests/test_precision.py").write_text("", encoding="utf-8")
    (book / "tests/wrong_answers/02_precision.py").write_text(wrong, encoding="utf-8")
    shutil.copy(ROOT / "llmbook/book.mplstyle", book / "llmbook")
    sync(book)
    for check in checks.CHECKS:
        assert not checks.complaints(check, book), check.__name__
    code, output = run_nbval(book)
    assert code == 0, output
    assert "3.14159 becomes 3.14062" in read_text(book / "chapters/02_precision.ipynb")
    assert "def round_to" in read_text(book / "llmbook/precision.py")


def test_a_check_names_what_a_sync_would_change(book, edit, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sync.py", "--check", "--root", str(book)])
    assert main() == 0
    edit("index.md", "Doubling twice", "Doubling once")
    assert main() == 1
    assert "index.md: the row of 01_second is not what the chapters say" in capsys.readouterr().out
    edit(FIRST, "**You need**", "**You want**")
    assert main() == 1
    assert "00_first: the header has no row **You need**" in capsys.readouterr().out
