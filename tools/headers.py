"""What each chapter says of itself in its first cell: title, quote line, part, needs, times.

The chapter is the only place where this is written. ``tables.py`` makes every table of chapters
from it, and ``checks.py`` complains about a header that lacks something. The parts of the book, and
the chapters that are planned, are declared in ``chapters/parts.yml``.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from book import BookError, Chapter, chapters, read_text, write_text

ROWS = ("Part", "You build", "You need", "It takes")
LONGEST_MAIN_LINE = 60 * 60
SECONDS = {"second": 1, "minute": 60, "hour": 3600}
TIME = r"(\d+(?:\.\d)?) (second|minute|hour)s?"
TAKES = re.compile(rf"({TIME}) for the main line, ({TIME}) for everything, ({TIME}) to run")
TAKES_EXAMPLE = "40 minutes for the main line, 75 minutes for everything, 45 seconds to run"
ROW = re.compile(r"^\| \*\*(?P<name>[^*|]+)\*\* \|(?P<value>.*)\|\s*$", re.MULTILINE)
QUOTE = re.compile(r"^(?:> ?.*\n)+", re.MULTILINE)
EXERCISE = re.compile(
    r"^(?P<fence>`{3,})\{exercise(?:-start)?\}[ ]*(?P<title>[^\n]*)\n(?P<text>.*?)^(?P=fence)",
    re.MULTILINE | re.DOTALL,
)
NUMERALS = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
TENS = {"five": 5, "ten": 10, "fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40}
TENS |= {"fifty": 50, "sixty": 60, "ninety": 90}
WORDS = TENS | {f"{ten}-five": TENS[ten] + 5 for ten in ("twenty", "thirty", "forty", "fifty")}
# What an exercise is meant to take: *Five minutes.* at its beginning, or (5 minutes) anywhere.
HOURS = {
    "half an hour": 30,
    "three quarters of an hour": 45,
    "an hour": 60,
    "one hour": 60,
    "an hour and a half": 90,
    "two hours": 120,
}
IN_WORDS = re.compile(r"\A\*([A-Z][a-z -]+)\.\*")
IN_DIGITS = re.compile(r"\((\d+) minutes?\)")


@dataclass(frozen=True)
class Part:
    """A part of the book: its place, its name, and the titles of its chapters that are planned."""

    number: int
    name: str
    planned: dict[int, str]

    @property
    def label(self) -> str:
        """The name with its place, as headers write it: ``II. Architecture``."""
        return f"{NUMERALS[self.number]}. {self.name}"


@dataclass(frozen=True)
class Header:
    """What a chapter says of itself. Times are in the words of the chapter."""

    chapter: Chapter
    title: str
    quote: str
    part: Part
    builds: str
    needs: str
    main_line: str
    everything: str
    run: str
    exercises: tuple[int, ...]  # minutes of each


def parts(root: Path) -> list[Part]:
    """Return the parts of the book, in order."""
    file = root / "chapters" / "parts.yml"
    if not file.exists():
        raise BookError("chapters/parts.yml does not exist: it names the parts of the book")
    entries = yaml.safe_load(read_text(file))
    return [Part(i, e["name"], e.get("planned") or {}) for i, e in enumerate(entries)]


def headers(root: Path) -> list[Header]:
    """Return the headers of all chapters, in the order of the book; report all faults at once."""
    read = [read_header(chapter, parts(root)) for chapter in chapters(root)]
    faults = [fault for _, found in read for fault in found] or _out_of_order(
        [header for header, _ in read if header]
    )
    if faults:
        raise BookError("\n".join(faults))
    return [header for header, _ in read if header]


def faults(root: Path) -> list[str]:
    """Return what is wrong in the headers of the chapters."""
    try:
        headers(root)
    except BookError as error:
        return str(error).splitlines()
    return []


def read_header(chapter: Chapter, known: list[Part]) -> tuple[Header | None, list[str]]:
    """Return the header of one chapter, or None, and what is wrong with it."""
    name = chapter.name
    if not chapter.script.exists():
        return None, [f"{name}: the script does not exist yet: run `make sync`"]
    cells = list(markdown_cells(read_text(chapter.script)))
    first = cells[0] if cells else ""
    title = re.match(r"# (\S[^\n]*)\n", first)
    quote = QUOTE.search(first)
    rows = {match["name"].strip(): match["value"].strip() for match in ROW.finditer(first)}
    found = []
    if not title:
        found.append(f"{name}: the first cell does not begin with a title, `# Title`")
    if not quote:
        found.append(f"{name}: the first cell has no line with > under the title")
    if not set(ROWS) & set(rows):
        found.append(f"{name}: the first cell has no table with the rows {', '.join(ROWS)}")
    else:
        found += [
            f"{name}: the header has no row **{r}**, or it is empty"
            for r in ROWS
            if not rows.get(r)
        ]
    part = next((part for part in known if part.label == rows.get("Part")), None)
    if rows.get("Part") and not part:
        labels = ", ".join(part.label for part in known)
        found.append(f"{name}: row **Part** says {rows['Part']!r}; chapters/parts.yml has {labels}")
    takes = TAKES.fullmatch(rows.get("It takes", ""))
    if rows.get("It takes"):
        found += [f"{name}: row **It takes** {fault}" for fault in _wrong_times(takes)]
    exercises = [exercise for cell in cells for exercise in EXERCISE.finditer(cell)]
    minutes = {e["title"]: exercise_minutes(e["text"]) for e in exercises}
    found += [
        f"{name}: the exercise {title!r} does not begin with its time, such as *Twenty minutes.*"
        for title, given in minutes.items()
        if given is None
    ]
    if found or not (title and quote and part and takes):
        return None, found
    sentence = " ".join(line.lstrip("> ") for line in quote[0].splitlines())
    header = Header(
        chapter,
        title[1].strip(),
        sentence.strip(),
        part,
        rows["You build"],
        rows["You need"],
        main_line=takes[1],
        everything=takes[4],
        run=takes[7],
        exercises=tuple(m for m in minutes.values() if m is not None),
    )
    return header, []


def _wrong_times(takes: re.Match[str] | None) -> Iterator[str]:
    if takes is None:
        yield f"cannot be read; it must be like this: {TAKES_EXAMPLE}"
    elif seconds(takes[1]) > seconds(takes[4]):
        yield f"gives the main line more time than everything: {takes[1]}, {takes[4]}"
    elif seconds(takes[1]) > LONGEST_MAIN_LINE:
        yield f"gives the main line {takes[1]}; it must be readable in an hour"


def _out_of_order(read: list[Header]) -> list[str]:
    return [
        f"{after.chapter.name}: row **Part** says {after.part.label!r}, but "
        f"{before.chapter.name} before it belongs to {before.part.label!r}"
        for before, after in pairwise(read)
        if after.part.number < before.part.number
    ]


def markdown_cells(script: str) -> Iterator[str]:
    """Yield the text of the markdown cells of a py:percent script."""
    lines: list[str] | None = None
    for line in [*script.splitlines(), "# %%"]:
        if line.startswith("# %%"):
            if lines is not None:
                yield "\n".join(lines) + "\n"
            lines = [] if "[markdown]" in line else None
        elif lines is not None and line.startswith("#"):
            lines.append(line.removeprefix("#").removeprefix(" "))


def seconds(time: str) -> float:
    """Return the seconds of a time as headers write it.

    >>> seconds("1.5 minutes")
    90.0
    """
    number, unit = time.split()
    return float(number) * SECONDS[unit.removesuffix("s")]


def exercise_minutes(text: str) -> int | None:
    """Return the minutes that an exercise says it takes, None if it does not say.

    >>> exercise_minutes("*Twenty-five minutes.* Write ..."), exercise_minutes("*An hour.* Write")
    (25, 60)
    >>> exercise_minutes(":label: ex\\nWrite `f`. (5\\nminutes)"), exercise_minutes("Write `f`.")
    (5, None)
    """
    options = re.compile(r"\A(?:\s*:\w+:[^\n]*\n)*\s*")
    body = " ".join(options.sub("", text).split())
    if words := IN_WORDS.match(body):
        said = words[1].lower()
        return HOURS.get(said) or WORDS.get(said.removesuffix(" minutes"))
    digits = IN_DIGITS.search(body)
    return int(digits[1]) if digits else None


# --- measured times -----------------------------------------------------------------------------


def times_file(root: Path) -> Path:
    """Return where the tests put how long each chapter ran."""
    return root / "_build" / "times.json"


def measured_times(root: Path) -> dict[str, float]:
    """Return the seconds that chapters took when the tests ran them last, by chapter."""
    file = times_file(root)
    return json.loads(read_text(file)) if file.exists() else {}


def record_times(root: Path, times: dict[str, float]) -> None:
    """Add measured times to those of earlier runs."""
    both = measured_times(root) | {name: round(time, 1) for name, time in times.items()}
    write_text(times_file(root), json.dumps(both, indent=1, sort_keys=True) + "\n")


def coarse(time: float) -> str:
    """Return a time to run, rounded up: in steps of 15 seconds, from one minute on of half minutes.

    >>> [coarse(time) for time in (3.2, 15.0, 46, 61, 121)]
    ['15 seconds', '15 seconds', '60 seconds', '1.5 minutes', '2.5 minutes']
    """
    if time <= 60:
        return f"{max(1, math.ceil(time / 15)) * 15} seconds"
    return f"{math.ceil(time / 30) / 2:g} minutes"


def stated_and_measured(root: Path) -> str:
    """Return a table of what headers say about the time to run, and what was measured last."""
    try:
        found = headers(root)
    except BookError as error:
        return str(error)
    measured = measured_times(root)
    lines = [f"{'chapter':24} {'stated':>12} {'measured':>12}"]
    for header in found:
        name = header.chapter.name
        time = f"{measured[name]:.1f} s" if name in measured else "not yet"
        longer = measured.get(name, 0) > seconds(header.run)
        advice = "  longer: make sync ARGS=--times" if longer else ""
        lines.append(f"{name:24} {header.run:>12} {time:>12}{advice}")
    return "\n".join(lines)


def state_measured_times(root: Path) -> list[str]:
    """Write the measured times, coarsely, into the headers; return the chapters that changed."""
    measured, changed = measured_times(root), []
    if not measured:
        raise BookError("nothing is measured yet: .venv/bin/python tools/test.py notebooks does it")
    for header in headers(root):
        script, name = header.chapter.script, header.chapter.name
        if name in measured:
            old = f", {header.run} to run |"
            new = f", {coarse(measured[name])} to run |"
            if write_text(script, read_text(script).replace(old, new, 1)):
                changed.append(f"{name}: {coarse(measured[name])} to run, not {header.run}")
    return changed
