"""``make sync``: either file may be edited, nothing is lost, nothing runs twice."""

import sys
from pathlib import Path

import nbformat
import pytest
from book import BookError, read_notebook, read_text, write_text
from sync import make_plans, out_of_date, sync

FIRST, FIRST_NB = "chapters/00_first.py", "chapters/00_first.ipynb"


def times(root: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in root.rglob("*") if f.is_file()}


def test_a_second_sync_changes_nothing(book):
    before = times(book)
    assert not sync(book)
    assert times(book) == before


def test_scripts_stay_as_their_author_wrote_them(scripts, book):
    for name, text in scripts.items():
        assert read_text(book / name) == text  # no header, no metadata of ours


def test_notebook_and_module_follow_from_the_script_alone(book):
    module = read_text(book / "llmbook/first.py")
    ids = [cell.id for cell in read_notebook(book / FIRST_NB).cells]
    (book / FIRST_NB).unlink()
    (book / "llmbook/first.py").unlink()
    assert sync(book, run=False)
    assert read_text(book / "llmbook/first.py") == module
    assert [cell.id for cell in read_notebook(book / FIRST_NB).cells] == ids


def test_only_what_depends_on_a_change_is_executed(book, edit, capsys):
    edit("chapters/01_second.py", "four times two", "4 * 2")
    sync(book)
    printed = capsys.readouterr().out
    assert "01_second: executed" in printed
    assert "00_first" not in printed
    assert "4 * 2: 8" in read_text(book / "chapters/01_second.ipynb")


def test_prose_can_change_without_execution(book, edit, capsys):
    edit(FIRST, "# # First", "# # The first")
    sync(book)
    assert "execut" not in capsys.readouterr().out
    assert not out_of_date(book)


def test_an_edit_in_the_notebook_reaches_the_script(book, edit):
    edit(FIRST_NB, "double(4)", "double(6)")
    sync(book, run=False)
    assert "print(double(6))" in read_text(book / FIRST)
    edit(FIRST, "double(6)", "double(7)")  # and back, though it was not executed in between
    sync(book, run=False)
    assert "print(double(7))" in read_text(book / FIRST_NB)


def test_a_notebook_alone_becomes_a_chapter(book):
    (book / FIRST_NB).rename(book / "chapters/02_third.ipynb")
    notebook = read_notebook(book / "chapters/02_third.ipynb")
    del notebook.metadata["llmbook"]
    notebook.cells[1].source = "#| default_exp third"
    nbformat.write(notebook, book / "chapters/02_third.ipynb")
    sync(book, ["third"], run=False)
    assert read_text(book / "chapters/02_third.py").startswith("# %% [markdown]\n# # First")
    assert "def double" in read_text(book / "llmbook/third.py")


def test_an_edit_during_the_execution_is_not_overwritten(book, edit):
    code = "open('00_first.ipynb', 'a').write(' ')"
    edit(FIRST, "print(double(4))", code)
    with pytest.raises(BookError, match=r"00_first.ipynb was edited meanwhile"):
        sync(book, ["first"])
    assert read_text(book / FIRST_NB).endswith(" ")


def test_saving_in_an_editor_is_not_an_edit(book):
    notebook = read_notebook(book / FIRST_NB)
    notebook.metadata.kernelspec.display_name = "Python 3 (ipykernel)"
    notebook.metadata.language_info.version = "3.99"
    notebook.cells[0].metadata["collapsed"] = True
    notebook.cells.append(nbformat.v4.new_code_cell(""))
    nbformat.write(notebook, book / FIRST_NB)
    before = read_text(book / FIRST)
    sync(book)
    assert read_text(book / FIRST) == before
    assert not out_of_date(book)


def test_edits_on_both_sides_are_never_lost(book, edit):
    edit(FIRST_NB, "double(4)", "double(6)")
    edit(FIRST, "double(4)", "double(7)")
    before = times(book)
    with pytest.raises(BookError, match=r"00_first: both the .py and the .ipynb were edited"):
        sync(book)
    assert times(book) == before
    sync(book, run=False, keep="ipynb")
    assert "double(6)" in read_text(book / FIRST)


@pytest.mark.parametrize(
    "code, complaint",
    [
        ("print(nothing)", "00_first, code cell 3 failed:(.|\n)*print.nothing(.|\n)*NameError"),
        ("import os; os._exit(1)", "00_first, code cell 3 failed:(.|\n)*os._exit(.|\n)*died here"),
        ("import sys; sys.stderr.write('w')", "00_first: code cell 3 wrote to stderr"),
    ],
)
def test_a_cell_that_fails_is_named_and_the_notebook_kept(code, complaint, book, edit):
    edit(FIRST, "print(double(4))", code)
    before = read_text(book / FIRST_NB)
    with pytest.raises(BookError, match=complaint) as caught:
        sync(book)
    assert "\x1b" not in str(caught.value)
    assert read_text(book / FIRST_NB) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_an_interruption_leaves_everything_as_it_was(book, edit):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    edit(FIRST, "print(double(4))", code)
    before = read_text(book / FIRST_NB)
    with pytest.raises(KeyboardInterrupt):
        sync(book)
    assert read_text(book / FIRST_NB) == before


def test_an_expected_error_is_stored_without_the_paths_of_this_machine(book):
    outputs = [o for c in read_notebook(book / FIRST_NB).cells for o in c.get("outputs", [])]
    errors = [o.traceback for o in outputs if o.output_type == "error"]
    assert errors == [["ZeroDivisionError: division by zero"]]


def test_a_chapter_that_goes_takes_its_module_along(book):
    (book / "chapters/01_second.py").unlink()
    with pytest.raises(BookError, match=r"01_second.py is gone, but its notebook is still there"):
        sync(book)
    (book / "chapters/01_second.ipynb").unlink()
    sync(book)
    assert not (book / "llmbook/second.py").exists()
    assert (book / "llmbook/__init__.py").exists()


def test_two_chapters_cannot_make_one_module(book):
    (book / "chapters/02_first.py").write_text(read_text(book / FIRST), encoding="utf-8")
    with pytest.raises(BookError, match=r"two chapters export to llmbook/first.py"):
        make_plans(book)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert read_text(path) == "old"
    assert list(tmp_path.iterdir()) == [path]
