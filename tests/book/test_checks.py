"""The rules of ``tools/checks.py`` hold for the book, and each of them finds its fault."""

import checks
import pytest
from book import ROOT

FIRST, FIRST_NB = "chapters/00_first.py", "chapters/00_first.ipynb"
SECOND, SECOND_NB = "chapters/01_second.py", "chapters/01_second.ipynb"
MODULE, PARTS = "llmbook/first.py", "chapters/parts.yml"
WRONG = "tests/wrong_answers/01_second.py"


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_the_book(check):
    if found := checks.complaints(check, ROOT):
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_the_miniature_is_without_fault(check, book):
    assert not checks.complaints(check, book)


CHAIN = """import sys
class _Odd: ...
class _Even: ...
class Number(_Odd): ...
class Half(_Even): ...
class Double(_Even): ..."""
# By a test below, by one in test_engine.py.
SHOWN_ELSEWHERE = ("each_chapter_has_its_companions", "exercises_need_no_engine_room")
# The rule that must complain, the file with the fault, how it comes about, words of the complaint.
FAULTS = [
    ("files_are_current", MODULE, "2 * x", "3 * x", "is not what 00_first exports"),
    ("files_are_current", FIRST, "double(4)", "double(5)", "must be executed"),
    ("files_are_current", FIRST_NB, "double(4)", "double(5)", "lacks what was"),
    ("files_are_current", FIRST, "2 * x", "3 * x", "01_second must be executed"),
    ("files_are_current", SECOND_NB, '"executed": "', '"executed": "0', "changed"),
    ("files_are_current", SECOND_NB, '_count": 3', '_count": 9', "one after"),
    ("files_are_current", FIRST, "print(", "print((", "was never closed"),
    ("files_are_current", FIRST, "default_exp first", "hide", "the chapter has no"),
    ("headers_are_whole", FIRST, "# # First", "# First", "00_first: the first cell does not begin"),
    (
        "headers_are_whole",
        FIRST,
        "# > Doubling.",
        "#",
        "00_first: the first cell has no line with >",
    ),
    ("headers_are_whole", FIRST, "# | **", "# - **", "00_first: the first cell has no table"),
    (
        "headers_are_whole",
        FIRST,
        "# | **Part**",
        "# - **Part**",
        "00_first: the header has no row **P",
    ),
    (
        "headers_are_whole",
        FIRST,
        "| nothing |",
        "| |",
        "00_first: the header has no row **You need**",
    ),
    (
        "headers_are_whole",
        FIRST,
        "I. Counting",
        "Counting",
        "00_first: row **Part** says 'Counting'",
    ),
    (
        "headers_are_whole",
        FIRST,
        "I. Counting",
        "II. Composing",
        "01_second: row **Part** says 'I. Counting', but 00_first before it",
    ),
    (
        "headers_are_whole",
        FIRST,
        "5 minutes for the main line",
        "five minutes to read",
        "00_first: row **It takes** cannot be read",
    ),
    (
        "headers_are_whole",
        FIRST,
        ", 15 seconds to run",
        "",
        "00_first: row **It takes** cannot be re",
    ),
    (
        "headers_are_whole",
        FIRST,
        "10 minutes for everything",
        "120 seconds for everything",
        "00_first: row **It takes** gives the main line more time than everything",
    ),
    (
        "headers_are_whole",
        SECOND,
        "20 minutes for the main line",
        "1.1 hours for the main line",
        "01_second: row **It takes** gives the main line 1.1 hours",
    ),
    (
        "headers_are_whole",
        SECOND,
        "*Twenty-five minutes.* ",
        "",
        "01_second: the exercise 'Eight times' does not begin with its time",
    ),
    ("headers_are_whole", PARTS, "Counting", "Adding", "chapters/parts.yml has I. Adding, II. Com"),
    (
        "tables_are_current",
        FIRST,
        "> Doubling.",
        "> Twice.",
        "README.md: the row of 00_first is not",
    ),
    (
        "tables_are_current",
        FIRST,
        "| nothing |",
        "| a two |",
        "teaching.md: the row of 00_first is n",
    ),
    (
        "tables_are_current",
        "index.md",
        "Doubling twice",
        "x",
        "index.md: the row of 01_second is not",
    ),
    (
        "tables_are_current",
        "_toc.yml",
        "/01_second",
        "/1_second",
        "_toc.yml: the row of 01_second is",
    ),
    (
        "tables_are_current",
        "api/index.md",
        "00_first",
        "x",
        "api/index.md: the row of 00_first is not",
    ),
    (
        "tables_are_current",
        PARTS,
        "Thirds",
        "3rds",
        "README.md: 'Planned, and not written yet: 02 3",
    ),
    (
        "tables_are_current",
        "api/index.md",
        "s: end",
        "",
        "api/index.md has no place for its table of",
    ),
    ("links_lead_somewhere", "README.md", "00_first", "00_fist", "00_fist.ipynb does not exist"),
    ("links_lead_somewhere", "CONTRIBUTING.md", "README", "READ", "CONTRIBUTING.md: READ.md does"),
    (
        "imports_follow_the_order",
        FIRST,
        "print(",
        "from llmbook.second import quadruple\nprint(",
        "chapters/00_first.py imports llmbook.second",
    ),
    (
        "imports_follow_the_order",
        MODULE,
        "def double",
        "from .second import quadruple\ndef double",
        "llmbook/first.py imports llmbook.second",
    ),
    ("imports_follow_the_order", SECOND, "import time", "import tools", "tools"),
    (
        "cells_are_short",
        FIRST_NB,
        '"print(double(4))"',
        '"' + "x = 1\\n" * 31 + '"',
        "31 lines",
    ),
    ("cells_are_short", FIRST, "# # First", "# " + "a" * 99, "line 2 has 101"),
    ("outputs_are_clean", FIRST_NB, '"stdout"', '"stderr"', "wrote to stderr: 8"),
    (
        "outputs_are_clean",
        FIRST_NB,
        '"name": "stdout",\n     "output_type": "stream",\n     "text": [\n      "8\\n"\n     ]',
        '"output_type": "error", "ename": "E", "evalue": "", "traceback": []',
        "is an error: E",
    ),
    (
        "few_outputs_are_ignored",
        SECOND_NB,
        'print(\\"four',
        '# NBVAL_IGNORE_OUTPUT\\nprint(\\"four',
        "2 of 2",
    ),
    ("images_have_alt_text", FIRST_NB, '"A dot."', '""', "cell 4: its plot"),
    ("images_have_alt_text", FIRST_NB, "![A dot]", "![]", "image dot.svg has"),
    (
        "images_have_alt_text",
        FIRST_NB,
        "![A dot](dot.svg)",
        "```{figure} dot.svg\\n:name: dot\\n:alt:\\nA dot\\n```",
        "image dot.svg has",
    ),
    ("exercises_are_whole", SECOND_NB, '"check"', '"x"', "no cell tagged check"),
    ("exercises_are_whole", SECOND_NB, '"solution"', '"x"', "no cell tagged sol"),
    ("exercises_are_whole", SECOND_NB, "{exercise}", "{note}", "no exercise"),
    ("exercises_are_whole", SECOND_NB, ":label: ", ":name: ", "no :label:"),
    ("exercises_are_whole", SECOND_NB, '":label: ', '":class: a :label: ', "no :label:"),
    (
        "exercises_are_whole",
        SECOND_NB,
        "def octuple(x: int) -> int:",
        "for x in range(3):",
        "01_second, code cell 6: this solution has no function",
    ),
    ("exercises_are_whole", SECOND_NB, "assert octuple", "octuple", "asserts nothing"),
    ("exercises_have_wrong_answers", WRONG, "# %% ", "# %% [raw] ", "cell 2: expected a code cell"),
    ("exercises_have_wrong_answers", WRONG, "ex-eight", "ex-nine", "has no exercise ex-nine"),
    ("exercises_have_wrong_answers", WRONG, "eight times one", " ", "says must be a part"),
    ("exercises_have_wrong_answers", WRONG, "8**x", "8**", "cell 3, line 3: invalid"),
    ("exercises_have_wrong_answers", WRONG, "# A power", "", "cell 3: the first line must"),
    (
        "exercises_have_wrong_answers",
        SECOND_NB,
        "label: ex-eight",
        "label: ex-8",
        "01_second has no exercise ex-eight",
    ),
    (
        "cells_are_short",
        FIRST_NB,
        '"    return check_even',
        '"' + "    x\\n" * 61 + "    return ",
        "65 l",
    ),
    ("engine_rooms_are_whole", FIRST_NB, "### Engine room: an", "### An", "opens with a heading"),
    ("no_class_only_divides", MODULE, "import sys", CHAIN, "first.py: _Odd has one subclass"),
    ("no_class_only_divides", MODULE, "import sys", CHAIN.replace("Odd)", "Odd[int])"), "_Odd"),
    (
        "no_private_names_are_borrowed",
        "llmbook/second.py",
        "double",
        "_double",
        "llmbook/second.py borrows llmbook.first._double",
    ),
    (
        "no_private_names_are_borrowed",
        "llmbook/second.py",
        "return double(",
        "return double._cache(",
        "llmbook/second.py borrows double._cache",
    ),
    ("modules_are_documented", MODULE, '"""Doubling."""', "", "first.py has no docstr"),
    ("modules_are_documented", MODULE, '"""Return twice', 'x = """', "double has no"),
    ("modules_are_documented", MODULE, "x: int", "x", "double lacks type hints"),
    ("modules_are_documented", MODULE, " -> int", "", "double lacks type hints"),
    ("requirements_are_pinned", "constraints.txt", "numpy==", "numpie==", "numpy is not pinned"),
    ("requirements_are_pinned", "constraints.txt", "regex==", "regex==1", "is installed"),
    ("requirements_are_pinned", "pyproject.toml", "tqdm>=", "tqdm>=9", "pyproject.toml wants tqdm"),
    ("conda_agrees_with_pip", "environment.yml", "constraints.txt", "x.txt", "gives pip"),
    ("conda_agrees_with_pip", "Makefile", "book,dev", "book", "gives pip"),
    ("conda_agrees_with_pip", "environment.yml", "python=3.11", "python=3.9", "pyproject.toml wan"),
]


@pytest.mark.parametrize("rule, file, old, new, words", FAULTS)
def test_a_fault_is_found(rule, file, old, new, words, book, edit):
    edit(file, old, new)
    found = checks.complaints(getattr(checks, rule), book)
    assert any(words in complaint for complaint in found), found


def test_an_exported_function_may_be_long_if_it_is_all_of_its_cell(book, edit):
    long = '"    return check_even'
    edit(FIRST_NB, long, '"' + "    x\\n" * 50 + long[1:])
    assert not checks.cells_are_short(book)
    edit(FIRST_NB, '#| export\\n",\n    "def half', '#| export\\n",\n    "y = 1\\ndef half')
    assert checks.cells_are_short(book) == [
        "00_first, code cell 7 has 55 lines; at most 30",
    ]


def test_an_exercise_without_wrong_answers_is_found(book):
    (book / WRONG).unlink()
    assert checks.exercises_have_wrong_answers(book) == [
        "01_second: fewer than three wrong answers to ex-eight are kept"
    ]


def test_a_missing_companion_is_found(book):
    (book / "tests/test_first.py").unlink()
    (book / "api/second.md").unlink()
    assert checks.each_chapter_has_its_companions(book) == [
        "00_first: tests/test_first.py is missing",
        "01_second: api/second.md is missing",
    ]


def test_every_rule_is_shown_to_find_a_fault():
    shown = {rule for rule, *_ in FAULTS} | set(SHOWN_ELSEWHERE)
    assert shown == {check.__name__ for check in checks.CHECKS}
