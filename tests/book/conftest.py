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
# > Doubling twice.

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
# Write `octuple`.
# ````


# %% tags=["solution"]
def octuple(x: int) -> int:
    """Return eight times ``x``."""
    return double(quadruple(x))


# %% tags=["check"]
assert octuple(1) == 8
'''

CONDA = """\
dependencies: [python=3.11, pip, {pip: [-c constraints.txt, "-e .[book,dev]"]}]
"""
OTHERS = {
    "environment.yml": CONDA,
    "Makefile": 'x:\n\tpip install --constraint constraints.txt --editable ".[book,dev]"\n',
    "_toc.yml": "root: index\nchapters:\n- file: chapters/00_first\n- file: chapters/01_second\n",
    **dict.fromkeys(
        ("README.md", "index.md", "teaching.md", "api/index.md"),
        "[first](chapters/00_first.ipynb), [second](chapters/01_second.ipynb#four)\n",
    ),
    "CONTRIBUTING.md": "[all](README.md), [elsewhere](https://example.org/none)\n",
    "figures/dot.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
    "llmbook/__init__.py": "",
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
