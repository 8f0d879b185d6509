"""What is kept of each run of a study: its figures, and which of the test questions it answered right.

STUDY/study.yaml              settings, which cannot change any more
STUDY/results/questions.npz   `picture` and `kind` of each test question
STUDY/results/teacher.npz     `correct`: one bit a question
STUDY/results/CELL.SEED.npz   the same of a student; written before
STUDY/results/CELL.SEED.json  its figures: a run with this file is finished
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field, ValidationError

from dde_cache.cells import CELLS, Run
from dde_cache.configs import mistakes
from dde_cache.errors import RunError, bullet_list, first_line
from dde_cache.manifest import write_bytes
from dde_cache.spec import Model

RESULTS = "results"
QUESTIONS = "questions"
TEACHER_ANSWERS = "teacher"


class StudyResult(Model):
    """One finished run: a cell with one seed."""

    cell: str
    seed: int
    accuracy: float
    kinds: dict[str, float] = Field(description="accuracy by kind of question")
    bytes_a_pair: float | None = Field(description="of the cache whose records it read; null: none")
    fingerprint: str | None = Field(description="of that cache")
    seconds: float = Field(description="of training steps")
    wall_seconds: float = Field(description="of training and testing, in this call")
    threads: int
    version: str
    code: str | None = Field(default=None, description="SHA-256 of the package's files")
    settings: dict[str, Any] = Field(description="of its training, in full")


@dataclass(frozen=True)
class Questions:
    """The test questions in order: the number of the picture of each, and its kind."""

    picture: Int[np.ndarray, " n"]
    kind: np.ndarray


@dataclass(frozen=True)
class Outcomes:
    """Everything that is finished: the questions, the teacher's answers, and runs by cell and seed."""

    questions: Questions
    teacher: Bool[np.ndarray, " n"]
    results: Mapping[str, Mapping[int, StudyResult]] = field(default_factory=dict)
    correct: Mapping[str, Mapping[int, Bool[np.ndarray, " n"]]] = field(default_factory=dict)


def write_questions(folder: Path, questions: Questions) -> None:
    """Keep the test questions of a study in `folder`."""
    _write_arrays(folder / RESULTS / f"{QUESTIONS}.npz", picture=questions.picture, kind=questions.kind)


def write_correct(folder: Path, name: str, correct: Bool[np.ndarray, " n"]) -> None:
    """Keep which questions were answered right."""
    _write_arrays(folder / RESULTS / f"{name}.npz", correct=np.packbits(correct), count=np.array(len(correct)))


def write_result(folder: Path, name: str, result: StudyResult) -> None:
    """Say that a run is finished, after its answers were kept."""
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    write_bytes(folder / RESULTS / f"{name}.json", (result.model_dump_json(indent=1) + "\n").encode())


def finished(folder: Path, run: Run) -> bool:
    """Whether a run is finished."""
    return all((folder / RESULTS / f"{run.name}{suffix}").is_file() for suffix in (".json", ".npz"))


def finished_runs(folder: Path) -> list[Run]:
    """The runs of a study that are finished, by cell and seed.

    Raises:
        RunError: there are results of cells that this version does not know.
    """
    cells = {Run(cell, 0).name.removesuffix(".0"): cell for cell in CELLS}
    places = [path.name.removesuffix(".json").rpartition(".") for path in (folder / RESULTS).glob("*.json")]
    unknown = sorted(f"{name}.{seed}" for name, _, seed in places if name not in cells or not seed.isdecimal())
    if unknown:
        raise RunError(
            f"{folder / RESULTS}: expected results of cells that this version knows, got others:{bullet_list(unknown)}"
            "\nput them elsewhere"
        )
    runs = [Run(cells[name], int(seed)) for name, _, seed in places]
    return sorted((run for run in runs if finished(folder, run)), key=lambda run: (CELLS.index(run.cell), run.seed))


def has_answers(folder: Path, name: str) -> bool:
    """Whether answers of this name are kept."""
    return (folder / RESULTS / f"{name}.npz").is_file()


def read_result(folder: Path, run: Run) -> StudyResult:
    """The figures of a finished run.

    Raises:
        RunError: the file cannot be read, or is another run's.
    """
    path = folder / RESULTS / f"{run.name}.json"
    try:
        result = StudyResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(path, error) from error
    if (result.cell, result.seed) != (run.cell.name, run.seed):
        raise _damaged(path, ValueError(f"it is of {result.cell}, seed {result.seed}"))
    return result


def read_outcomes(folder: Path) -> Outcomes:
    """What is finished of a study.

    Raises:
        RunError: the questions or the teacher's answers are missing, or a file cannot be read.
    """
    asked = _read_arrays(folder, QUESTIONS, ("picture", "kind"))
    questions = Questions(asked["picture"], asked["kind"])
    if len(questions.picture) != len(questions.kind):
        raise _damaged(folder / RESULTS / f"{QUESTIONS}.npz", ValueError("pictures and kinds of other numbers"))
    teacher = _read_correct(folder, TEACHER_ANSWERS, len(questions.picture))
    results: dict[str, dict[int, StudyResult]] = {}
    correct: dict[str, dict[int, np.ndarray]] = {}
    for run in finished_runs(folder):
        result = read_result(folder, run)
        answers = _read_correct(folder, run.name, len(questions.picture))
        if abs(result.accuracy - answers.mean()) > 1e-9:
            path = folder / RESULTS / f"{run.name}.npz"
            raise _damaged(
                path, ValueError(f"an accuracy of {answers.mean():.4f}, in its neighbour {result.accuracy:.4f}")
            )
        results.setdefault(result.cell, {})[result.seed] = result
        correct.setdefault(result.cell, {})[result.seed] = answers
    return Outcomes(questions, teacher, results, correct)


def _read_correct(folder: Path, name: str, questions: int) -> Bool[np.ndarray, " n"]:
    arrays = _read_arrays(folder, name, ("correct", "count"))
    path = folder / RESULTS / f"{name}.npz"
    if arrays["count"] != questions or arrays["correct"].size != -(-questions // 8):
        raise RunError(f"{path}: expected answers to {questions:,} questions, got {arrays['count']:,}")
    return np.unpackbits(arrays["correct"], count=questions).astype(bool)


def _write_arrays(path: Path, **arrays: np.ndarray) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, stream.getvalue())


def _read_arrays(folder: Path, name: str, fields: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays without Python objects: NumPy refuses those unless it is asked not to."""
    path = folder / RESULTS / f"{name}.npz"
    try:
        with np.load(path) as found:
            return {field: found[field] for field in fields}
    except FileNotFoundError as error:
        raise RunError(f"{path}: missing; run `dde-cache study` without --report-only first") from error
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> RunError:
    why = mistakes(error)[0] if isinstance(error, ValidationError) else first_line(error)
    return RunError(
        f"{path}: expected what a study keeps of a run, but it cannot be read: {why}; delete it, and its "
        "neighbour of the same name, and run the study again"
    )
