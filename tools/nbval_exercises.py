"""A pytest plugin: nbval over the chapters, then, in each, the proof of its exercises.

It also keeps how long each chapter took, for the table that ``test.py`` prints and for ``make sync
ARGS=--times``; nothing fails because of a clock.

The proof runs in the kernel that has run the chapter, so it costs no second execution, and
stores nothing. For each exercise: the blanked solution must fail its check, then the solution
must pass it, then each wrong answer of ``tests/wrong_answers`` must be refused with the message
that it deserves.

Use: ``pytest chapters -p nbval_exercises``, without ``--nbval``, which would collect each notebook
a second time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from book import CHAPTER_NAME, Chapter, code_cells, read_notebook
from headers import record_times
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell, IPyNbFile
from workbook import Exercise, blanked, exercises
from wrong_answers import WrongAnswer, wrong_answers

# Runs in the chapter's kernel; sources are those of the blanked cells and of the check.
BLANK_MUST_FAIL = """\
def __blank_must_fail__(label, *sources):
    try:
        for source in sources:
            exec(get_ipython().transform_cell(source), globals())
    except (NotImplementedError, AssertionError):
        return
    except BaseException as error:
        message = f"the blank of exercise {{label}} fails for another reason: {{error!r}}"
        raise AssertionError(message) from error
    raise AssertionError(f"the blank of exercise {{label}} passes its check")

__blank_must_fail__(*{arguments!r})
"""

# Afterwards every name means again what it meant, for the exercises that follow.
WRONG_MUST_BE_REFUSED = """\
def __wrong_must_be_refused__(label, says, *sources):
    before = dict(globals())
    try:
        for source in sources:
            exec(get_ipython().transform_cell(source), globals())
    except AssertionError as error:
        if says not in str(error):
            message = f"exercise {{label}}: the check says {{str(error)!r}}, but not {{says!r}}"
            raise AssertionError(message) from error
        return
    except BaseException as error:
        message = f"exercise {{label}}: the check fails for another reason: {{error!r}}"
        raise AssertionError(message) from error
    finally:
        for name in set(globals()) - set(before):
            del globals()[name]
        globals().update(before)
    raise AssertionError(f"exercise {{label}}: a wrong answer passes its check")

__wrong_must_be_refused__(*{arguments!r})
"""

# Marks, in the reports, what a reader who runs the chapter does not run.
PROOF = "proof of an exercise"


class Clock:
    """Adds up the seconds of each chapter, from the start of its kernel to its last cell."""

    def __init__(self, root: Path) -> None:
        """Start with nothing, for the book at ``root``."""
        self.root = root
        self.seconds: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add what one cell took; with several workers, all reports come here."""
        chapter = Path(report.nodeid.partition("::")[0]).stem
        if (PROOF, True) in map(tuple, report.user_properties):
            return
        self.seconds[chapter] += report.duration
        self.passed[chapter] += report.when == "call" and report.passed

    def pytest_sessionfinish(self) -> None:
        """Keep the times of the chapters that ran from the first to the last cell."""
        whole = {}
        for chapter, passed in self.passed.items():
            notebook = Chapter(self.root, chapter).notebook
            if notebook.exists() and passed == len(code_cells(read_notebook(notebook))):
                whole[chapter] = self.seconds[chapter]
        if whole:
            record_times(self.root, whole)


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock, in the process that hears of all cells."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Clock(config.rootpath))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the chapters' notebooks."""
    if file_path.suffix == ".ipynb" and CHAPTER_NAME.fullmatch(file_path.stem):
        return ChapterFile.from_parent(parent, path=file_path)
    return None


class ChapterFile(IPyNbFile):
    """A chapter's notebook: its code cells, then its exercises."""

    def collect(self) -> Iterator[IPyNbCell]:
        """Yield the cells that are to be run, in order, all in one kernel."""
        number = -1
        for item in super().collect():
            number = item.cell_num
            yield item
        chapter = Chapter(self.path.parent.parent, self.path.stem)
        notebook = read_notebook(self.path)
        wrong = wrong_answers(chapter)
        for exercise in exercises(chapter, notebook):
            for what, source in proof(chapter, notebook, exercise, wrong):
                number += 1
                # A cell that was never executed has no outputs to compare: it need only run.
                item = IPyNbCell.from_parent(
                    self,
                    name=f"{exercise.label}: {what}",
                    cell_num=number,
                    cell=new_code_cell(source),
                    options=defaultdict(bool),
                )
                item.user_properties.append((PROOF, True))
                yield item


def proof(
    chapter: Chapter, notebook: NotebookNode, exercise: Exercise, wrong: Iterable[WrongAnswer]
) -> Iterator[tuple[str, str]]:
    """Yield what to show and the code that shows it, for one exercise."""
    check = exercise.check.source
    blanks = [blanked(chapter, notebook, cell) for cell in exercise.solutions]
    yield "the blank fails", BLANK_MUST_FAIL.format(arguments=[exercise.label, *blanks, check])
    # Each name comes once: of two tests with one name, xdist's loadfile runs one.
    for number, cell in enumerate(exercise.solutions, 1):
        yield f"solution {number} runs", cell.source
    yield "the solution passes", check
    for number, answer in enumerate(wrong, 1):
        if answer.exercise == exercise.label:
            arguments = [exercise.label, answer.says, answer.source, check]
            refusal = WRONG_MUST_BE_REFUSED.format(arguments=arguments)
            yield f"answer {number} is refused: {answer.about}", refusal
