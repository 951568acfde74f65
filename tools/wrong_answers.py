"""Wrong answers to the exercises, each with what the check must say about it.

``tests/wrong_answers/NN_name.py`` belongs to the chapter of that name. It is a py:percent script
whose cells are answers that a student might give, each to be run in the place of the solution:

    # %% exercise="ex-tinyworld-perplexity" says="the mean over tokens"
    # The mean of the perplexities, and not the perplexity of the mean
    def perplexity(surprises):
        ...

``says`` is a part of the message with which the check must refuse the answer: a check that calls
a right answer right is only half a check, and one that says no more than "wrong" teaches nothing.
``nbval_exercises.py`` runs them all.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jupytext
from book import BookError, Chapter, parse, read_notebook, read_text
from workbook import exercises

FOLDER = Path("tests/wrong_answers")
LEAST = 3


@dataclass(frozen=True)
class WrongAnswer:
    """An answer, the label of its exercise, and a part of the message that it must get."""

    exercise: str
    says: str
    source: str

    @property
    def about(self) -> str:
        """The comment that the answer begins with: what is wrong with it."""
        return self.source.splitlines()[0].removeprefix("#").strip()


def wrong_answers(chapter: Chapter) -> list[WrongAnswer]:
    """Return the wrong answers kept for a chapter; an ill-formed one is an error."""
    path = chapter.root / FOLDER / f"{chapter.name}.py"
    if not path.exists():
        return []
    labels = {exercise.label for exercise in exercises(chapter, read_notebook(chapter.notebook))}
    answers = []
    for number, cell in enumerate(jupytext.reads(read_text(path), fmt="py:percent").cells, 1):
        where = f"{FOLDER / path.name}, cell {number}"
        if cell.cell_type != "code" or "exercise" not in cell.metadata:
            if number == 1:
                continue  # what the file says of itself
            raise BookError(
                f'{where}: expected a code cell that begins # %% exercise="..." says="..."'
            )
        answer = WrongAnswer(
            cell.metadata["exercise"], cell.metadata.get("says", ""), cell.source.strip()
        )
        parse(answer.source, where)
        if answer.exercise not in labels:
            raise BookError(f"{where}: {chapter.name} has no exercise {answer.exercise}")
        if not answer.says.strip():
            raise BookError(f"{where}: says must be a part of the check's message, got none")
        if not answer.source.startswith("#"):
            raise BookError(f"{where}: the first line must be a comment on what is wrong")
        answers.append(answer)
    return answers


def exercises_with_too_few(chapter: Chapter) -> list[str]:
    """Return the labels of exercises for which fewer than three wrong answers are kept."""
    kept = Counter(answer.exercise for answer in wrong_answers(chapter))
    labels = [exercise.label for exercise in exercises(chapter, read_notebook(chapter.notebook))]
    return [label for label in labels if kept[label] < LEAST]
