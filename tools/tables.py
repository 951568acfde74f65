"""Make every table of chapters from the headers of the chapters; ``make sync`` calls it.

A page keeps a table between two comments, ``NAME: begin`` and ``NAME: end``; what stands around
them is written by hand. ``_toc.yml`` works the same way. A module without a page in the reference
gets one; a page that exists is never touched.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from book import PACKAGE, BookError, read_text, write_text
from headers import Header, Part, headers, parts

API_PAGE = """\
# `{package}.{module}`

```{{eval-rst}}
.. automodule:: {package}.{module}
   :members:
```
"""
BAR, ESCAPED_BAR = re.compile(r"(?<!\\)\|"), r"\\|"  # a bar ends a cell
DOC = re.compile(r"\{doc\}`(?P<page>\d\d_\w+)`")
ROLE = re.compile(
    r"\{[\w:-]+\}`(?:(?P<shown>[^`<]+?) ?<[^`>]*>|~(?:\w+\.)*(?P<last>\w+)|(?P<rest>[^`]+))`"
)
MENTIONED = re.compile(r"\b(?:chapters/|api/)(\w+)")
Maker = Callable[[list[Header], list[Part]], Iterator[str]]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(list(heads))}"
    for row in rows:
        yield f"| {' | '.join(BAR.sub(ESCAPED_BAR, cell) for cell in row)} |"


def plain(text: str, titles: dict[str, str]) -> str:
    """Return text of a chapter as GitHub shows it: roles become links to notebooks, or code.

    >>> plain("{py:func}`~llmbook.a.b`, {doc}`02_corpus`, {py:mod}`x <y>`", {"02_corpus": "Text"})
    '`b`, [Text](chapters/02_corpus.ipynb), `x`'
    """

    def link(match: re.Match[str]) -> str:
        return f"[{titles[match['page']]}](chapters/{match['page']}.ipynb)"

    text = DOC.sub(link, text)
    return ROLE.sub(lambda m: f"`{m['shown'] or m['last'] or m['rest']}`", text)


def on_site(text: str) -> str:
    """Return text of a chapter for a page in another folder of the site.

    >>> on_site("text ({doc}`02_corpus`)")
    'text ({doc}`/chapters/02_corpus`)'
    """
    return DOC.sub(r"{doc}`/chapters/\g<page>`", text)


def spans(numbers: Iterable[int]) -> str:
    """Return chapters in words.

    >>> spans([0, 1, 2, 4]), spans([7]), spans([7, 8])
    ('00 to 02 and 04', '07', '07 and 08')
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts: list[str] = []
    for run in runs:
        ends = [f"{number:02}" for number in (run if len(run) < 3 else run[:: len(run) - 1])]
        texts += [" to ".join(ends)] if len(run) > 2 else ends
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def planned(known: list[Part], found: list[Header]) -> dict[int, str]:
    """Return the numbers and titles of the chapters that are planned and not written."""
    written = {header.chapter.number for header in found}
    both = {n: title for part in known for n, title in part.planned.items()}
    return {n: title for n, title in both.items() if n not in written}


# --- the tables ---------------------------------------------------------------------------------


def readme_chapters(found: list[Header], known: list[Part]) -> Iterator[str]:
    """Yield a table for each part, as GitHub shows it."""
    titles = {header.chapter.name: header.title for header in found}
    rows = {
        header.chapter.name: (
            f"{header.chapter.number:02} [{header.title}](chapters/{header.chapter.name}.ipynb)",
            f"`{PACKAGE}.{header.chapter.module}`",
            plain(header.quote, titles),
            header.run,
        )
        for header in found
    }
    yield from by_part(("Chapter", "Module", "In one sentence", "Runs in"), rows, found, known)


def site_chapters(found: list[Header], known: list[Part]) -> Iterator[str]:
    """Yield a table for each part, for the site's first page."""
    rows = {
        header.chapter.name: (f"{{doc}}`chapters/{header.chapter.name}`", on_site(header.quote))
        for header in found
    }
    yield from by_part(("Chapter", "In one sentence"), rows, found, known)


def by_part(
    heads: tuple[str, ...],
    rows: dict[str, tuple[str, ...]],
    found: list[Header],
    known: list[Part],
) -> Iterator[str]:
    """Yield what is written and what is planned, then the parts, each with its table."""
    waiting = planned(known, found)
    numbers = [header.chapter.number for header in found]
    here = f"Chapters {spans(numbers)} are written" if numbers[1:] else "One chapter is written"
    later = f"; {spans(waiting)} {'are' if len(waiting) > 1 else 'is'} planned" if waiting else ""
    yield f"{here}{later}."
    for part in known:
        own = [rows[h.chapter.name] for h in found if h.part == part]
        titles = [f"{n:02} {title}" for n, title in part.planned.items() if n in waiting]
        if own or titles:
            yield from ("", f"### Part {part.label}")
        if own:
            yield from ("", *table(heads, own))
        if titles:
            yield from ("", f"Planned, and not written yet: {', '.join(titles)}.")


def teaching_times(found: list[Header], known: list[Part]) -> Iterator[str]:
    """Yield what a teacher plans with: how long everything takes."""
    heads = ("Chapter", "Main line", "Everything", "To run", "Exercises")
    rows = (
        (
            f"{{doc}}`chapters/{header.chapter.name}`",
            header.main_line,
            header.everything,
            header.run,
            f"{len(header.exercises)} ({sum(header.exercises)} minutes)"
            if header.exercises
            else "none",
        )
        for header in found
    )
    yield from table(heads, rows)


def teaching_needs(found: list[Header], known: list[Part]) -> Iterator[str]:
    """Yield what each chapter asks of those who come to it."""
    heads = ("Chapter", "What its readers need")
    rows = ((f"{{doc}}`chapters/{h.chapter.name}`", on_site(h.needs)) for h in found)
    yield from table(heads, rows)


def reference_modules(found: list[Header], known: list[Part]) -> Iterator[str]:
    """Yield the modules, with the names that their chapters begin with."""
    rows = (
        (
            f"{{doc}}`{PACKAGE}.{header.chapter.module} <{header.chapter.module}>`",
            f"{{doc}}`/chapters/{header.chapter.name}`",
            on_site(header.builds),
        )
        for header in found
    )
    yield from table(("Module", "Chapter", "What it builds"), rows)


def contents_chapters(found: list[Header], known: list[Part]) -> Iterator[str]:
    """Yield the chapters for the table of contents, by part."""
    for part in known:
        if own := [header.chapter.name for header in found if header.part == part]:
            yield from (f"- caption: {part.name}", "  chapters:")
            yield from (f"    - file: chapters/{name}" for name in own)


def contents_modules(found: list[Header], known: list[Part]) -> Iterator[str]:
    """Yield the pages of the reference for the table of contents."""
    yield from (f"- file: api/{header.chapter.module}" for header in found)


TABLES: dict[str, dict[str, Maker]] = {
    "README.md": {"chapters": readme_chapters},
    "index.md": {"chapters": site_chapters},
    "teaching.md": {"times": teaching_times, "needs": teaching_needs},
    "api/index.md": {"modules": reference_modules},
    "_toc.yml": {"chapters": contents_chapters, "modules": contents_modules},
}


# --- files --------------------------------------------------------------------------------------


def region(name: str) -> re.Pattern[str]:
    """Return what finds a region of a page, and its comments: in Markdown, or in YAML."""
    return re.compile(
        rf"^(?P<indent> *)(?P<begin>(?:<!--|#) {name}: begin\b[^\n]*\n)(?P<text>.*?)"
        rf"(?P<end>^ *(?:<!--|#) {name}: end\b)",
        re.MULTILINE | re.DOTALL,
    )


def put(page: str, text: str, name: str, lines: Iterable[str]) -> str:
    """Return the text of a page with ``lines`` in one of its regions."""
    match = region(name).search(text)
    if not match:
        raise BookError(
            f"{page} has no place for its table of {name}: a comment `{name}: begin`, "
            f"and after it one that says `{name}: end`"
        )
    gap = "\n" if match["begin"].startswith("<!--") else ""  # else Markdown sees no table
    body = "".join(f"{match['indent']}{line}".rstrip() + "\n" for line in lines)
    return text[: match.start("text")] + gap + body + gap + text[match.start("end") :]


def pages(root: Path) -> dict[str, str]:
    """Return the pages with tables as they should be, and those of modules that have none."""
    found, known = headers(root), parts(root)
    made = {}
    for page, regions in TABLES.items():
        text = read_text(root / page)
        for name, maker in regions.items():
            text = put(page, text, name, maker(found, known))
        made[page] = text
    for module in (header.chapter.module for header in found):
        if not (root / f"api/{module}.md").exists():
            made[f"api/{module}.md"] = API_PAGE.format(package=PACKAGE, module=module)
    return made


def write_tables(root: Path) -> list[str]:
    """Write the pages whose tables are not current, and return their names."""
    return [page for page, text in pages(root).items() if write_text(root / page, text)]


def not_current(root: Path) -> list[str]:
    """Say which rows of which tables are not what the chapters say, and change nothing."""
    found = []
    for page, text in pages(root).items():
        if not (root / page).exists():
            found.append(f"{page} is missing: run `make sync`")
            continue
        now, then = read_text(root / page).splitlines(), text.splitlines()
        changed = [line for line in {*now} ^ {*then} if line.strip()]
        for line in sorted(changed) or (["its rows"] if now != then else []):
            what = f"the row of {names[0]}" if (names := MENTIONED.findall(line)) else f"{line!r}"
            found.append(f"{page}: {what} is not what the chapters say: run `make sync`")
    return list(dict.fromkeys(found))
