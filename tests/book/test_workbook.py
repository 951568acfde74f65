"""Blanks hide what a student is to find; nbval proves outputs, exercises and blanks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from book import ROOT, BookError, Chapter, code_cells, read_notebook
from nbval_exercises import proof
from workbook import blank, exercises, write_workbook
from wrong_answers import wrong_answers

BLANKS = {
    "signature, decorator and docstring stay": (
        '''
@cache
def f(
    x: int,  # a number
) -> int:
    """Double.

    Twice.
    """
    # The trick:
    y = x

    return y + x  # sum
    # done


z = 1
''',
        '''
@cache
def f(
    x: int,  # a number
) -> int:
    """Double.

    Twice.
    """
    raise NotImplementedError


z = 1
''',
    ),
    "comments before the body go": (
        "def f():\n    # how\n\n    # and why\n    return 1",
        "def f():\n    raise NotImplementedError",
    ),
    "one line": ("def f(x): return 2 * x", "def f(x): raise NotImplementedError"),
    "one line with letters of two bytes": (
        'def größe(x="ä"): return x',
        'def größe(x="ä"): raise NotImplementedError',
    ),
    "a class keeps its attributes": (
        '''
class A:
    """An A."""

    size: int = 3

    def __init__(self):
        self.x = 1

    async def go(self):
        return self.x
''',
        '''
class A:
    """An A."""

    size: int = 3

    def __init__(self):
        raise NotImplementedError

    async def go(self):
        raise NotImplementedError
''',
    ),
    "functions in functions go with them": (
        "def f():\n    @cache\n    def g():\n        return 1\n\n    return g",
        "def f():\n    raise NotImplementedError",
    ),
    "what is abstract stays": (
        "class P(Protocol):\n    def f(self): ...\n\ndef g():\n    return 1",
        "class P(Protocol):\n    def f(self): ...\n\ndef g():\n    raise NotImplementedError",
    ),
}


@pytest.mark.parametrize("name", BLANKS)
def test_blank(name):
    source, expected = BLANKS[name]
    assert blank(source.strip(), "here") == expected.strip()
    compile(expected, name, "exec")


@pytest.mark.parametrize("source", ["answer = 42", "def f():\n    '''Only words.'''", "%time f()"])
def test_what_cannot_be_blanked_is_an_error(source):
    with pytest.raises(BookError, match="chapter 1, cell 2: "):
        blank(source, "chapter 1, cell 2")


def test_student_notebooks(book, edit):
    edit("chapters/00_first.ipynb", '"jp-MarkdownHeadingCollapsed": true,', "")
    first, second = write_workbook(book)
    opened = [c for c in read_notebook(first).cells if "Engine room" in c.source]
    assert opened[0].metadata["jp-MarkdownHeadingCollapsed"], "a room is folded for every student"
    assert (first.name, second.name) == ("00_first.ipynb", "01_second.ipynb")
    student = read_notebook(second)
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(student))
    (solution,) = [c.source for c in student.cells if "solution" in c.metadata.get("tags", [])]
    assert solution.endswith('"""Return eight times ``x``."""\n    raise NotImplementedError')
    assert len(student.cells) == len(read_notebook(Chapter(book, "01_second").notebook).cells)
    assert (first.parent / "../figures/dot.svg").exists(), "where the notebooks look for it"


def run_nbval(root: Path) -> tuple[int, str]:
    """Run the chapters of a book as ``make test`` does."""
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "--nbval-current-env"]
    done = subprocess.run(
        [*command, "-p", "nbval_exercises", "chapters"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(root)])},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return done.returncode, done.stdout + done.stderr


def test_nbval_finds_outputs_and_exercises_that_are_wrong(book, edit):
    second, third = book / "chapters/01_second.ipynb", book / "chapters/02_third.ipynb"
    shutil.copy(second, third)
    edit("chapters/00_first.ipynb", '"8\\n"', '"9\\n"')
    for fact in ("octuple(1) == 8", "octuple(2) == 16"):
        edit("chapters/01_second.ipynb", f"assert {fact}", "assert octuple")
    edit("chapters/02_third.ipynb", "assert octuple(1) == 8,", "nonsense(),")
    code, output = run_nbval(book)
    assert code == 1
    assert "Cell outputs differ" in output
    assert "the blank of exercise ex-eight passes its check" in output
    assert "exercise ex-eight: a wrong answer passes its check" in output
    assert "the blank of exercise ex-eight fails for another reason: NameError" in output
    # Wrong: an output, in the second chapter the blank and three wrong answers, and in the third
    # the check, its blank and its repetition. Right: the other 20 of nine, seven and seven cells;
    # three solutions and a check, run again.
    assert re.search(r"^8 failed, 24 passed", output, re.MULTILINE), output


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        ("chapters/01_second.ipynb", "eight times one is eight", "no", "the check says 'no'"),
        ("tests/wrong_answers/01_second.py", "return 8**x", "nonsense()", "another reason: Name"),
    ],
)
def test_a_wrong_answer_must_be_refused_with_the_message_it_deserves(
    book, edit, file, old, new, words
):
    edit(file, old, new)
    code, output = run_nbval(book)
    assert code == 1
    assert words in output
    assert re.search(r"^1 failed, 21 passed", output, re.MULTILINE), output


def test_each_step_of_a_proof_has_its_own_name(book, edit):
    for words in ("# Right for one only", "# A power"):
        edit("tests/wrong_answers/01_second.py", words, "# Four times")
    chapter = Chapter(book, "01_second")
    notebook = read_notebook(chapter.notebook)
    (exercise,) = exercises(chapter, notebook)
    exercise.solutions *= 2
    names = [name for name, _ in proof(chapter, notebook, exercise, wrong_answers(chapter))]
    assert len(names) == len(set(names)) == 1 + 2 + 1 + 3
