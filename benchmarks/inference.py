"""A student at work against its teacher: single pairs, stored pictures, many questions a picture, and retrieval.

Measured, by turns in one process, teacher and student of the same sizes with random weights, float32, on the same
processed pictures (tensors: decoding is the same for both) and the same texts of 12 or of 40 tokens:

- single pairs: one picture and one question, one after the other; the student runs both towers and the head.
- stored pictures: one batch of questions; the student's picture vectors are there, so its text tower and head run.
- ten questions a picture, pictures not stored: the student encodes each picture once.
- retrieval of N x N pairs: the student encodes N texts and N pictures and multiplies; the teacher's passes are measured
  on a sample of pairs in batches, and scaled to N x N (it has no scores to add up: its forward pass alone counts).

Latencies are those of single pairs and of single questions on a stored picture. Peak memory is that of a process which
answers one batch one way.

Bound: multiply-adds of the blocks by token counts, of the teacher over the student. A block of n tokens of width w
takes 12 n w^2 + 2 n^2 w.

    python benchmarks/inference.py
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from common import (
    CLOCKS,
    SPECIAL_TOKENS,
    TINY,
    VILT_B32,
    TeacherShape,
    arguments,
    by_turns,
    print_machine,
    print_ratio,
    save_teacher,
    timed,
)
from memory import peak_of_this_process
from torch import Tensor

from dde_cache.inference import Student
from dde_cache.preprocess import PixelBatch, TokenBatch
from dde_cache.student import new_student
from dde_cache.teacher import FusionTeacher

LENGTHS = (12, 40)
REACH = {("stored", 12): ">= 10", ("stored", 40): ">= 4", ("retrieval", 12): ">= 500", ("retrieval", 40): ">= 500"}
QUESTIONS = 10
"""A picture, where it is asked more than once."""


class Sides:
    """Teacher and student of one shape, and inputs for them."""

    def __init__(self, folder: Path, shape: TeacherShape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.teacher = FusionTeacher.load(folder)
        labels = self.teacher.labels or ()
        self.student = Student(new_student(self.teacher.config, labels), self.teacher.preprocessor)
        self.random = np.random.default_rng(0)

    def texts(self, count: int, tokens: int) -> list[str]:
        """Texts of made-up words with exactly so many tokens, [CLS] and [SEP] included."""
        words = self.random.integers(0, self.shape.vocabulary - len(SPECIAL_TOKENS), (count, tokens - 2))
        return [" ".join(f"w{word}" for word in row) for row in words]

    def pictures(self, count: int) -> list[np.ndarray]:
        """Processed pictures."""
        side = self.shape.side
        return list(self.random.normal(size=(count, 3, side, side)).astype(np.float32))

    def joint(self, texts: Sequence[str], pictures: Sequence[np.ndarray]) -> Tensor | None:
        """The teacher on pairs."""
        tokens: TokenBatch = self.teacher.preprocessor.tokens(texts)
        stacked: PixelBatch = self.teacher.preprocessor.stack(pictures)
        return self.teacher(tokens, [stacked], ()).logits

    def alone(self, texts: Sequence[str], pictures: Sequence[np.ndarray]) -> Tensor:
        """The student on pairs, nothing stored."""
        return self.student.logits(self.student.encode_texts(texts), self.student.encode_pixels(pictures))

    def stored(self, texts: Sequence[str], vectors: Tensor) -> Tensor:
        """The student on stored pictures."""
        return self.student.logits(self.student.encode_texts(texts), vectors)


def cost(tokens: int, shape: TeacherShape) -> float:
    """Multiply-adds of the blocks on one sequence."""
    return shape.layers * (12 * tokens * shape.hidden_size**2 + 2 * tokens**2 * shape.hidden_size)


def bound(case: str, tokens: int, shape: TeacherShape, many: int) -> float:
    """The ratio that token counts set: the teacher's multiply-adds over the student's."""
    image = shape.image_tokens
    joint, text, picture = cost(tokens + image, shape), cost(tokens, shape), cost(image, shape)
    student = {
        "single": text + picture,
        "stored": text,
        "questions": text + picture / QUESTIONS,
        "retrieval": (text + picture) / many,
    }[case]
    return joint / student


def percentiles(seconds: Sequence[float]) -> str:
    """Median, 90th and 99th percentile in ms."""
    return ", ".join(f"p{rank} {np.percentile(seconds, rank) * 1e3:.1f}" for rank in (50, 90, 99)) + " ms"


def measure(
    sides: Sides, tokens: int, batch: int, many: int, sample: int, rounds: int, clock: Callable[[], float]
) -> Mapping[str, tuple[list[float], list[float]]]:
    """Seconds of the teacher and of the student, round by round, for every case."""
    texts, pictures = sides.texts(batch, tokens), sides.pictures(batch)
    vectors = sides.student.encode_pixels(pictures)
    asked = [picture for picture in pictures[: max(batch // QUESTIONS, 1)] for _ in range(QUESTIONS)]
    questions = sides.texts(len(asked), tokens)
    found, shown = sides.texts(many, tokens), sides.pictures(batch)
    singles: dict[str, list[float]] = {"teacher": [], "student": [], "stored": []}

    def one_by_one(name: str, run: Callable[[int], object]) -> float:
        times = [timed(lambda number=number: run(number), clock) for number in range(batch)]
        singles[name] += times
        return statistics.median(times)

    def spread() -> None:
        images = sides.student.encode_pixels(asked[::QUESTIONS])
        sides.student.logits(sides.student.encode_texts(questions), images.repeat_interleave(QUESTIONS, 0))

    def retrieve() -> None:
        images = [sides.student.encode_pixels(shown[: min(batch, many - start)]) for start in range(0, many, batch)]
        torch.mm(sides.student.encode_texts(found), torch.cat(images).T)

    def sampled() -> float:
        spent = sum(timed(lambda: sides.joint(texts, pictures), clock) for _ in range(sample))
        return spent / (sample * batch) * many**2

    ways: dict[str, Callable[[], float]] = {
        "single/teacher": lambda: one_by_one("teacher", lambda n: sides.joint([texts[n]], [pictures[n]])),
        "single/student": lambda: one_by_one("student", lambda n: sides.alone([texts[n]], [pictures[n]])),
        "stored/teacher": lambda: timed(lambda: sides.joint(texts, pictures), clock),
        "stored/student": lambda: timed(lambda: sides.stored(texts, vectors), clock),
        "questions/teacher": lambda: timed(lambda: sides.joint(questions, asked), clock),
        "questions/student": lambda: timed(spread, clock),
        "retrieval/teacher": sampled,
        "retrieval/student": lambda: timed(retrieve, clock),
        "one stored": lambda: one_by_one("stored", lambda n: sides.stored([texts[n]], vectors[n : n + 1])),
    }
    times = by_turns(ways, rounds, warm_up=1)
    for name, what in (
        ("teacher", "teacher, one pair"),
        ("student", "student, one pair, nothing stored"),
        ("stored", "student, one question on a stored picture"),
    ):
        print(f"  latency, {tokens} tokens, {what}: {percentiles(singles[name][batch:])}")
    return {case: (times[f"{case}/teacher"], times[f"{case}/student"]) for case in CASES}


CASES = {
    "single": "single pairs",
    "stored": "stored pictures",
    "questions": f"{QUESTIONS} questions a picture, not stored",
    "retrieval": "retrieval",
}


def memory(folder: Path, size: str, way: str, batch: int) -> int:
    """Peak bytes of a process that answers one batch one way."""
    command = [
        sys.executable,
        __file__,
        "--size",
        size,
        "--alone",
        way,
        "--folder",
        str(folder),
        "--batch-size",
        str(batch),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_alone(folder: Path, shape: TeacherShape, way: str, batch: int) -> None:
    """Load one side, answer one batch, and print the peak of this process."""
    sides = Sides(folder, shape)
    texts, pictures = sides.texts(batch, LENGTHS[-1]), sides.pictures(batch)
    if way == "teacher":
        del sides.student
        sides.joint(texts, pictures)
    else:
        del sides.teacher
        sides.stored(texts, torch.zeros(batch, shape.hidden_size)) if way == "stored" else sides.alone(texts, pictures)
    print(json.dumps(peak_of_this_process()))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, help="pairs a forward pass of both sides")
    parser.add_argument("--many", type=int, help="texts and pictures of retrieval")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, help="of the texts; both lengths take long")
    parser.add_argument("--alone", choices=("teacher", "student", "stored"), help="internal: peak memory of one way")
    parser.add_argument("--folder", type=Path, help="internal: where the teacher is")
    given = parser.parse_args()
    full = given.size == "full"
    shape = VILT_B32 if full else TINY
    batch = given.batch_size or (20 if full else 4)
    if given.alone:
        run_alone(given.folder, shape, given.alone, batch)
        return
    many, sample, rounds = given.many or (1000 if full else 16), 2 if full else 1, given.repeats or (5 if full else 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder, shape)
        peaks = {way: memory(folder, given.size, way, batch) for way in ("teacher", "student", "stored")}
        sides = Sides(folder, shape)
    for tokens in given.tokens:
        measured = measure(sides, tokens, batch, many, sample, rounds, CLOCKS[given.clock])
        for case, title in CASES.items():
            over, under = measured[case]
            scaled = f" {many:,} x {many:,} (teacher: {sample * batch} pairs, scaled)" if case == "retrieval" else ""
            print_ratio(
                f"teacher / student, {title}{scaled}, {tokens} text tokens",
                over,
                under,
                reach=REACH.get((case, tokens), "report"),
                limit=f"{bound(case, tokens, shape, many):,.1f}: blocks of {tokens} and {shape.image_tokens} tokens",
            )
    print(
        "  peak memory, batch "
        + f"{batch}: "
        + ", ".join(f"{way} {peak / 2**20:,.0f} MiB" for way, peak in peaks.items())
    )
    print(f"  {shape.side} px, width {shape.hidden_size}, {shape.layers} blocks, float32, {given.clock} time")
    print_machine()


if __name__ == "__main__":
    main()
