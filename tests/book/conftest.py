"""A miniature book, made and executed once, for the tests to break."""

import shutil
import sys
from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REAL / "tools"))

FIRST = '''\
# %% [markdown]
# # First
#
# > Doubling.
#
# | | |
# |---|---|
# | **Part** | I. Counting |
# | **You build** | {py:func}`~llmbook.first.double` |
# | **You need** | nothing |
# | **It takes** | 5 minutes for the main line, 10 minutes for everything, 15 seconds to run |

# %% tags=["remove-cell"]
#| default_exp first


# %%
#| export
def double(x: int) -> int:
    """Return twice ``x``."""
    return 2 * x


# %% [markdown]
# ![A dot](dot.svg)

# %%
print(double(4))

# %% mystnb={"image": {"alt": "A dot."}}
from IPython.display import SVG

SVG("<svg xmlns='http://www.w3.org/2000/svg'><circle r='1'/></svg>")

# %% tags=["raises-exception"]
1 / 0
'''

# The end of the first chapter: a lone engine cell, then a section that an engine room closes.
ENGINE = '''
# %% tags=["engine"]
#| export
# The limits of the machine
import sys


# %% [markdown]
# ## Halves

# %%
#| export
def half(x: int) -> int:
    """Return half of ``x``."""
    return check_even(x) // 2


# %% [markdown] tags=["engine"]
# ### Engine room: an odd number is refused

# %% [markdown] tags=["engine"]
# Half of an odd number would be rounded down, and twice that is another number.


# %% tags=["engine"]
#| export
def check_even(x: int) -> int:
    """Return ``x`` if it is even and not too large."""
    if x % 2 or x > sys.maxsize:
        raise ValueError(f"x: expected an even number, got {x}")
    return x


# %% [markdown]
# ## Summary

# %%
half(8)
'''

SECOND = '''\
# %% [markdown]
# # Second
#
# > Doubling
# > twice.
#
# | | |
# |---|---|
# | **Part** | I. Counting |
# | **You build** | {py:func}`four times <llmbook.second.quadruple>` |
# | **You need** | twos ({doc}`00_first`) |
# | **It takes** | 20 minutes for the main line, 1.5 hours for everything, 2 minutes to run |

# %% tags=["remove-cell"]
#| default_exp second

# %%
#| export
from llmbook.first import double


# %%
#| export
def quadruple(x: int) -> int:
    """Return four times ``x``."""
    return double(double(x))


# %% tags=["nbval-ignore-output"]
import time

print(time.time())

# %%
print("four times two:", quadruple(2))

# %% [markdown]
# ````{exercise} Eight times
# :label: ex-eight
# *Twenty-five minutes.* Write `octuple`.
# ````


# %% tags=["solution"]
def octuple(x: int) -> int:
    """Return eight times ``x``."""
    return double(quadruple(x))


# %% tags=["check"]
assert octuple(1) == 8, "eight times one is eight"
assert octuple(2) == 16, "each factor counts once"
'''

WRONG = """\
# %% exercise="ex-eight" says="eight times one"
# Four times
def octuple(x):
    return quadruple(x)


# %% exercise="ex-eight" says="each factor counts once"
# Right for one only
def octuple(x):
    return 8


# %% exercise="ex-eight" says="each factor counts once"
# A power
def octuple(x):
    return 8**x
"""

PARTS = """\
- name: Counting
- name: Composing
  planned: {1: This is written, 2: Thirds, 3: Fourths}
- name: Conducting
"""
TABLE = "<!-- {0}: begin (made) -->\n<!-- {0}: end -->\n"
CONTENTS = """\
root: index
parts:
  # chapters: begin
  # chapters: end
  - caption: Reference
    chapters:
      # modules: begin
      # modules: end
"""
CONDA = """\
dependencies: [python=3.11, pip, {pip: [-c constraints.txt, "-e .[book,dev]"]}]
"""
OTHERS = {
    "environment.yml": CONDA,
    "Makefile": 'x:\n\ttools/install.py --constraint constraints.txt --editable ".[book,dev]"\n',
    "chapters/parts.yml": PARTS,
    "_toc.yml": CONTENTS,
    "README.md": f"Before.\n\n{TABLE.format('chapters')}\nAfter.\n",
    "index.md": TABLE.format("chapters"),
    "teaching.md": f"{TABLE.format('times')}\n{TABLE.format('needs')}",
    "api/index.md": TABLE.format("modules"),
    "CONTRIBUTING.md": "[all](README.md), [elsewhere](https://example.org/none)\n",
    "figures/dot.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
    "llmbook/__init__.py": "",
    "tests/wrong_answers/01_second.py": WRONG,
    **{f"tests/test_{name}.py": "" for name in ("first", "second")},
    **{f"api/{name}.md": "" for name in ("first", "second")},
}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def scripts() -> dict[str, str]:
    """The chapters of the miniature, as their author wrote them."""
    return {"chapters/00_first.py": FIRST + ENGINE, "chapters/01_second.py": SECOND}


@pytest.fixture(scope="session")
def finished_book(scripts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sync import sync  # needs the path above

    root = tmp_path_factory.mktemp("finished")
    write(root, scripts | OTHERS)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REAL / name, root)
    assert sync(root)
    return root


@pytest.fixture
def book(finished_book: Path, tmp_path: Path) -> Path:
    """A copy of the miniature, in which all is well, for one test to change."""
    return Path(shutil.copytree(finished_book, tmp_path / "book"))


@pytest.fixture
def edit(book: Path):
    """A function that replaces text in a file of the miniature."""

    def replace(name: str, old: str, new: str) -> None:
        text = (book / name).read_text(encoding="utf-8")
        assert old in text
        (book / name).write_text(text.replace(old, new), encoding="utf-8")

    return replace
