"""Classes written in several cells become one class of the module."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from book import BookError, Chapter
from sync import cells_of, export, sync

HEAD = '''\
# %% [markdown]
# # Third
#
# > Counting.
#
# | | |
# |---|---|
# | **Part** | I. Counting |
# | **You build** | a counter |
# | **You need** | nothing |
# | **It takes** | 5 minutes for the main line, 5 minutes for everything, 15 seconds to run |

# %% tags=["remove-cell"]
#| default_exp third

# %%
#| export
from collections import Counter
from dataclasses import dataclass


class Base:
    """What counts."""

    def reset(self) -> str:
        """Return the name of this method's class."""
        return "base"


'''
COUNTS = '''\
# %%
#| export
@dataclass
class Counts(Base):
    """Counted things."""

    total: int = 0  # so far

    # Changed below.
    def add(self) -> int:
        """Add one."""
        self.total += 1
        return self.total

    @property
    def double(self) -> int:
        """Twice the total."""
        return 2 * self.total


# %%
#| export
LIMIT = 3


# %%
#| export
class Counts(Counts):  # continued
    # In steps.
    def add(self, step: int = 1) -> "Counts":
        """Add ``step``."""
        self.total += step
        return self

    def reset(self) -> str:
        """Start anew."""
        self.total = 0
        return super().reset()
        # the end


# %%
one = Counts().add(2)
print(one.total, one.reset(), one.total)


# %%
#| export
class Counts(Counts):  # continued
    def full(self, limit: int = LIMIT) -> bool:
        """Say whether the limit is reached."""
        return self.total >= limit

    __call__ = full


# %%
print(Counts(3)(), Counts(2).full(), Counts(2).double)
'''


def exported(root: Path, script: str) -> str:
    """The module of a chapter with these cells."""
    from nbformat.v4 import new_notebook

    notebook = new_notebook(cells=cells_of(script, None))
    return export(Chapter(root, "02_third"), notebook)


def loaded(text: str, folder: Path) -> ModuleType:
    path = folder / "third.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("third", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["third"] = module
    spec.loader.exec_module(module)
    return module


def test_parts_become_one_class(tmp_path: Path) -> None:
    text = exported(tmp_path, HEAD + COUNTS)
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes] == ["Base", "Counts"]
    counts = classes[1]
    assert ast.get_docstring(counts) == "Counted things."
    assert [ast.unparse(base) for base in counts.bases] == ["Base"]
    assert [ast.unparse(mark) for mark in counts.decorator_list] == ["dataclass"]
    names = [getattr(n, "name", None) or ast.unparse(n) for n in counts.body[1:]]
    assert names == ["total: int = 0", "add", "double", "reset", "full", "__call__ = full"]
    assert "# so far" in text and "# In steps." in text and "# the end" in text
    assert "Changed below" not in text and "continued" not in text
    assert "__all__ = ['LIMIT', 'Base', 'Counts']" in text


def test_the_joined_class_works(tmp_path: Path) -> None:
    module = loaded(exported(tmp_path, HEAD + COUNTS), tmp_path)
    counts = module.Counts(1).add(2)
    assert counts == module.Counts(3) and counts.double == 6
    assert counts() is counts.full() is True
    assert counts.reset() == "base", "super() is the real base"
    assert module.Counts.__mro__ == (module.Counts, module.Base, object)


def test_types_check_as_usual(tmp_path: Path) -> None:
    path = tmp_path / "third.py"
    good = exported(tmp_path, HEAD + COUNTS)
    bad = good.replace("return self.total >= limit", "return self.totl >= limit")
    said = []
    for text in (good, bad):
        path.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir=/dev/null"]
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, cwd=tmp_path)
        said.append(done.stdout)
    assert "Success" in said[0]
    assert '"Counts" has no attribute "totl"' in said[1]


def test_the_notebook_runs_as_it_stands(book: Path) -> None:
    script = HEAD + COUNTS
    (book / "chapters/02_third.py").write_text(script, encoding="utf-8")
    assert sync(book, ["02_third"])
    notebook = (book / "chapters/02_third.ipynb").read_text(encoding="utf-8")
    assert "2 base 0" in notebook and "True False 4" in notebook
    assert (book / "chapters/02_third.py").read_text(encoding="utf-8") == script
    module = (book / "llmbook/third.py").read_text(encoding="utf-8")
    assert module == exported(book, script)


def test_it_stands_where_its_signatures_can_be_read(tmp_path: Path) -> None:
    text = exported(tmp_path, HEAD + COUNTS)
    assert text.index("LIMIT = 3") < text.index("class Counts(Base)")
    early = exported(tmp_path, HEAD + COUNTS.replace("limit: int = LIMIT", "limit: int = 3"))
    assert early.index("LIMIT = 3") > early.index("class Counts(Base)")


def test_what_needs_it_earlier_is_named(tmp_path: Path) -> None:
    needs = COUNTS.replace("LIMIT = 3", "LIMIT = Counts().total")
    message = r"code cell 4 needs Counts while .* cell 7 needs LIMIT .*\"Counts\" in quotes"
    with pytest.raises(BookError, match=message):
        exported(tmp_path, HEAD + needs)


PART = """

# %%
#| export
class Counts(Counts):  # continued
    {}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Counts(Base):", "class Kounts(Base):", "continues nothing: no earlier"),
        ("class Counts(Counts):  # c", "class Counter(Counter):  # c", "continues an imported"),
        ("#| export\n@dataclass", "@dataclass", "whose first part is not exported"),
        ("(Counts):  # continued", "(Counts):", "write `class Counts.Counts.:  # continued`"),
        ("(Counts):  # continued", "(Base):  # continued", "its one base must be Counts"),
        ("class Counts(Counts):  # c", "@dataclass\nclass Counts(Counts):  # c", "a decorator"),
        ("    # In steps.\n", '    """More."""\n\n', "a docstring: it belongs to the first"),
        ("    # In steps.\n", "    more: int = 0\n\n", "adds the field more: the first part"),
        ("    # In steps.\n", "    print()\n\n", "may hold methods and attributes only"),
        ("return super().reset()", "return super().add()", r"super\(\).add, which an earlier"),
    ],
)
def test_faults_are_named_with_chapter_and_cell(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in COUNTS
    with pytest.raises(BookError, match=rf"02_third, code cell \d: class \w+.*{message}"):
        exported(tmp_path, HEAD + COUNTS.replace(old, new, 1))


def test_a_property_and_its_setter_go_together(tmp_path: Path) -> None:
    again = PART.format(
        "@property\n    def double(self) -> int:\n        return 4\n\n"
        "    @double.setter\n    def double(self, value: int) -> None:\n"
        "        self.total = value\n"
    )
    module = loaded(exported(tmp_path, HEAD + COUNTS + again), tmp_path)
    counts = module.Counts()
    counts.double = 5
    assert (counts.total, counts.double) == (5, 4)
