"""Engine rooms: their rules, and how notebooks fold them."""

import checks
import engine
import nbformat
import pytest
from book import Chapter, read_notebook, read_text
from jupytext.config import load_jupytext_config
from nbformat import NotebookNode
from needs import hidden_needs
from sync import cells_of, out_of_date, sync

FIRST, FIRST_NB = "chapters/00_first.py", "chapters/00_first.ipynb"
HEADING, SOURCE = "jp-MarkdownHeadingCollapsed", "jupyter"

CHAPTER = """\
# %% [markdown]
# # Title
#
# ## An idea

# %%
x = 1

# %% [markdown] tags=["engine"]
# ### Engine room: when x is wrong

# %% [markdown] tags=["engine"]
# ```
# # no heading
# ```

# %% tags=["engine"]
def check(): ...

# %% [markdown] tags=["engine"]
# More of the same.

# %% tags=["engine"]
def other(): ...

# %% [markdown]
# ## Another idea

# %% tags=["engine"]
#| export
# Only the package needs this
import os

# %%
y = 2
"""


def notebook(script: str, tmp_path) -> NotebookNode:
    """Return the cells of a script, as the book reads it."""
    config = load_jupytext_config(str(tmp_path))
    return nbformat.v4.new_notebook(cells=cells_of(script, config))


def test_a_chapter_without_fault(tmp_path):
    assert list(engine.faults(notebook(CHAPTER, tmp_path))) == []
    last = CHAPTER.partition("# %% [markdown]\n# ## Another")[0]
    assert list(engine.faults(notebook(last, tmp_path))) == [], "a room may end the notebook"


@pytest.mark.parametrize(
    "old, new, fault",
    [
        (
            "### Engine room: when",
            "### When",
            "the cell '### When x is wrong': an engine room opens with a heading `Engine",
        ),
        ("### Engine room: when x is wrong", "When x is wrong", "the cell 'When x is wrong': an e"),
        ("room: when x is wrong", "room:", "an engine room opens with"),
        ("# ### Engine room:", "# Words.\n#\n# ### Engine room:", "an engine room opens with"),
        (
            '[markdown] tags=["engine"]\n# ### Engine',
            "[markdown]\n# ### Engine",
            "has no tag engin",
        ),
        ("## Another idea", "## Engine room: x", "'Engine room: x' is of an engine room, but its"),
        ("# More of", "# ### More\n#\n# of", "when x is wrong' has another heading inside: 'More'"),
        ("## Another idea", "Another idea", "what follows, the cell 'Another idea', opens none"),
        ("## Another idea", "#### Another idea", "what follows, the cell '#### Another idea', ope"),
        (
            "# %% [markdown]\n# ## Another idea",
            "# %%\nz = 3",
            "what follows, code cell 4, opens no",
        ),
        ("is wrong\n", "is wrong\n#\n# Words.\n", "has text in the cell of its heading"),
        ("### Engine room", "# Engine room", "is on the level of the chapter's title"),
        (
            "# Only the package needs this\n",
            "",
            "code cell 4: a lone engine cell begins with a com",
        ),
        (
            'tags=["engine"]\n#|',
            'tags=["engine", "solution"]\n#|',
            "code cell 4: a solution is for",
        ),
        (
            'tags=["engine"]\ndef c',
            'tags=["engine", "check"]\ndef c',
            "code cell 2: a check is for",
        ),
        ("# More", "# ```{exercise} A\n# ```\n# More", "an exercise is for the reader"),
    ],
)
def test_a_fault_is_found(old, new, fault, tmp_path):
    assert old in CHAPTER
    found = list(engine.faults(notebook(CHAPTER.replace(old, new, 1), tmp_path)))
    assert any(fault in complaint for complaint in found), found


# --- what exercises need ------------------------------------------------------------------------

EXERCISE = """\
# %%
from llmbook.first import shown

# %% tags=["engine"]
# What only engine cells define
import math
from llmbook.first import folded

def helper(): ...

class Counter: ...

LIMIT = 3

# %% [markdown]
# ## Exercises
#
# ```{exercise} Count
# :label: ex-count
# Count with `shown`.
# ```

# %% tags=["solution"]
def count() -> int:
    return shown

# %% tags=["check"]
assert count() == 1
"""


def needs(script: str, tmp_path) -> list[str]:
    return list(hidden_needs(Chapter(tmp_path, "00_first"), notebook(script, tmp_path)))


@pytest.mark.parametrize("name", ["folded", "helper", "Counter", "LIMIT"])
@pytest.mark.parametrize("where", ["    return shown", "assert count()"])
def test_an_exercise_that_needs_what_is_folded_is_found(name, where, tmp_path):
    faulty = EXERCISE.replace(where, where.replace("shown", name).replace("count", name))
    (need,) = needs(faulty, tmp_path)
    assert need.startswith(f"ex-count needs {name}, which the main line never shows, only code c")
    assert not needs(faulty.replace("with `shown`", f"with `{name}`"), tmp_path)
    assert not needs(EXERCISE.replace("# %%\n", f"# %%\n{name}\n", 1), tmp_path)


@pytest.mark.parametrize(
    "solution",
    [
        "    return math.pi",  # which anyone can import
        "    helper = 1\n    return helper",
        "    from llmbook.first import folded\n\n    return folded",
        "    return [LIMIT for LIMIT in shown]",
        "    return f(helper=1).helper",
    ],
)
def test_what_an_exercise_has_from_elsewhere_is_no_need(solution, tmp_path):
    assert not needs(EXERCISE.replace("    return shown", solution), tmp_path)


def test_an_exercise_that_continues_a_folded_class_is_found(tmp_path):
    goes_on = "class Counter(Counter):\n    def count(self):\n        return 1\n\ncount = Counter"
    found = needs(EXERCISE.replace("def count() -> int:\n    return shown", goes_on), tmp_path)
    assert [need.split(",")[0] for need in found] == ["ex-count needs Counter"]


def test_an_exercise_that_needs_a_method_from_an_engine_room_is_found(tmp_path):
    shown = "class Tally:\n    def add(self): ...\n"
    further = "\n\nclass Tally(Tally):  # continued\n    def total(self): ..."
    script = EXERCISE.replace("# %%\n", f"# %%\n{shown}", 1)
    script = script.replace("LIMIT = 3", f"LIMIT = 3{further}")
    assert not needs(script.replace("return shown", "return Tally().add()"), tmp_path)
    faulty = script.replace("return shown", "return Tally().total()")
    (need,) = needs(faulty, tmp_path)
    assert need.startswith("ex-count needs a method .total, which the main line never shows")
    assert not needs(faulty.replace("Count with `shown`", "Count with `Tally.total`"), tmp_path)


def test_what_only_notebooks_allow_is_read(tmp_path):
    code = "%time helper()\nz = await shown\nasync with shown:\n    pass\n"
    assert not needs(EXERCISE.replace("# %%\n", f"# %%\n{code}", 1), tmp_path)
    assert needs(EXERCISE.replace("    return shown", "    return LIMIT"), tmp_path)


def test_the_rule_names_chapter_cell_and_name(book, edit):
    edit(FIRST_NB, "## Summary", "```{exercise} Odd\\n:label: ex-odd\\nFind it.\\n```")
    edit(FIRST_NB, '"import sys"', '"import sys\\nLIMIT = sys.maxsize"')
    edit(FIRST_NB, '"half(8)"', '"def odd(): return LIMIT"')
    solved = read_notebook(book / FIRST_NB)
    solved.cells[-1].metadata["tags"] = ["solution"]
    check = nbformat.v4.new_code_cell("assert odd()", metadata={"tags": ["check"]})
    solved.cells.append(check)
    nbformat.write(solved, book / FIRST_NB)
    (found,) = checks.exercises_need_no_engine_room(book)
    assert found.startswith("00_first: ex-odd needs LIMIT")
    assert "code cell 6" in found


# --- JupyterLab ---------------------------------------------------------------------------------


def test_notebooks_fold_rooms_and_lone_cells(book):
    cells = read_notebook(book / FIRST_NB).cells
    folded = [cell.source.splitlines()[0] for cell in cells if cell.metadata.get(HEADING)]
    assert folded == ["### Engine room: an odd number is refused"]
    hidden = [cell.source for cell in cells if cell.metadata.get(SOURCE, {}).get("source_hidden")]
    assert hidden == ["#| export\n# The limits of the machine\nimport sys"]


def test_a_room_that_a_reader_opened_is_current_and_sync_folds_it(book):
    before, script = read_text(book / FIRST_NB), read_text(book / FIRST)
    opened = read_notebook(book / FIRST_NB)  # as JupyterLab stores it then
    opened.metadata.kernelspec.display_name = "Python 3 (ipykernel)"
    opened.metadata.language_info |= {"version": "3.11.7", "nbconvert_exporter": "python"}
    for cell in opened.cells:
        cell.metadata.pop(HEADING, None)
        if SOURCE in cell.metadata:
            cell.metadata[SOURCE]["source_hidden"] = False
    nbformat.write(opened, book / FIRST_NB)
    assert read_text(book / FIRST_NB) != before
    assert not out_of_date(book)
    assert sync(book, run=False)
    assert read_text(book / FIRST_NB) == before
    assert read_text(book / FIRST) == script, "the script knows nothing of it"


def test_another_heading_that_a_reader_folded_is_not_current(book):
    opened = read_notebook(book / FIRST_NB)
    opened.cells[0].metadata[HEADING] = True
    nbformat.write(opened, book / FIRST_NB)
    assert any("plain form" in line for line in out_of_date(book))


def test_sync_sets_the_heading_of_a_room_apart(book, edit):
    before, notebook = read_text(book / FIRST), read_text(book / FIRST_NB)
    mark = '# %% [markdown] tags=["engine"]\n'
    for between in ("#\n", "", "#\n#\n"):
        edit(FIRST, f"refused\n\n{mark}", f"refused\n{between}")
        assert any("in the cell of an engine room's heading" in line for line in out_of_date(book))
        assert sync(book, run=False)
        assert read_text(book / FIRST) == before
        assert read_text(book / FIRST_NB) == notebook, "and its outputs are of this code"
    edit(FIRST_NB, "refused", "refused\\n\\nHalf")
    assert sync(book, run=False)
    assert f"refused\n\n{mark}# Half\n\n{mark}# Half of" in read_text(book / FIRST)


def test_a_tag_in_the_script_is_enough(book, edit):
    edit(FIRST, '# %% tags=["engine"]\n#| export\n# The limits', "# %%\n#| export\n# The limits")
    assert sync(book, run=False)
    assert SOURCE not in read_text(book / FIRST_NB).replace("jupyter-", "")
    edit(FIRST, "# %%\n#| export\n# The limits", '# %% tags=["engine"]\n#| export\n# The limits')
    assert sync(book, run=False)
    assert '"source_hidden": true' in read_text(book / FIRST_NB)
    assert not out_of_date(book), "a tag is not code: nothing is to be executed"
