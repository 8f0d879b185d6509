"""Recipe: let a student propose hard negatives: of every text the nearest pictures, of every picture the nearest texts.

Every text and every picture is encoded once, and all cosines are looked at, block by block. A true match is never a
candidate: a picture is known by its bytes, a text by its words, and what any sample pairs belongs together.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from pydantic import ValidationError

from dde_cache.candidates import NONE, CandidateAttributes, Candidates, samples_of, write_candidates
from dde_cache.errors import InputError, RunError, bullet_list
from dde_cache.inference import Student
from dde_cache.passes import plain
from dde_cache.samples import Shard
from dde_cache.spec import Model
from dde_cache.train import RUN, RunRecord

_BLOCK = 2**22
"""Cosines that are held at once."""

_DECIMALS = 6
"""As in `search`: the same words in another batch differ by the noise of float32."""


class MineReport(Model):
    """What a call of `mine` did."""

    round: int
    student: str
    samples: int
    texts: int
    top: int
    short: int
    bytes: int
    seconds: float


@dataclass
class _Seen:
    """What is known of the samples: each text and each picture as it comes first."""

    keys: list[str] = field(default_factory=list)
    content: list[bytes] = field(default_factory=list)
    picture: list[int] = field(default_factory=list)  # of each sample, the number of its picture among different ones
    sample: list[int] = field(default_factory=list)
    slot: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)  # of each text, the number of its words among different ones
    first_picture: list[int] = field(default_factory=list)  # of each different picture, the sample it comes first in
    first_text: list[int] = field(default_factory=list)  # of each different text, the text it comes first as
    texts: list[str] = field(default_factory=list)


def mine(
    run: str | Path,
    shards: Sequence[Shard],
    out: Path,
    *,
    top: int = 8,
    batch_size: int = 32,
    device: str = "cpu",
    advance: Callable[[int], None] = lambda samples: None,
) -> MineReport:
    """Write the candidates that a run's student proposes.

    Args:
        run: of a student that compares vectors, with one picture a sample.
        shards: all samples, among which candidates are looked for.
        out: the file; there must be none.
        top: candidates of each text and picture, where there are so many.
        batch_size: pictures or texts a forward pass.
        device: where the student runs.
        advance: called with the number of samples that were read.

    Raises:
        RunError: the student cannot be read, or compares no vectors.
        InputError: `out` is taken, a key comes twice, samples have two pictures, or pictures cannot be read.
    """
    begin = time.monotonic()
    if out.exists():
        raise InputError(f"{out}: expected a new file, but it is there; each round has a file of its own")
    student = Student.from_pretrained(run, device)
    if not student.compares:
        raise RunError(
            f"{run}: trained for {student.model.config.task}, its vectors are not comparable; mine with a student of "
            "--task retrieval, or one that is pre-trained"
        )
    seen, pictures = _read(student, shards, batch_size, advance)
    texts = student.encode_texts([seen.texts[number] for number in seen.first_text], batch_size=batch_size).numpy()
    found = Candidates(
        CandidateAttributes(
            format_version=1,
            round=round_of(run) + 1,
            student=student.fingerprint,
            top=top,
            samples=len(seen.keys),
            texts=len(seen.texts),
        ),
        seen.keys,
        np.frombuffer(b"".join(seen.content), np.uint8).reshape(-1, 32),
        np.array(seen.sample, np.int64),
        np.array(seen.slot, np.int64),
        *_nearest(seen, texts, pictures, top),
    )
    write_candidates(out, found)
    return MineReport(
        round=found.attributes.round,
        student=student.fingerprint,
        samples=len(seen.keys),
        texts=len(seen.texts),
        top=top,
        short=int((found.pictures == NONE).any(-1).sum() + (found.texts == NONE).any(-1).sum()),
        bytes=out.stat().st_size,
        seconds=time.monotonic() - begin,
    )


def round_of(run: str | Path) -> int:
    """The round of candidates that a run has learned from; 0: none, or no record of it.

    Raises:
        RunError: its record cannot be read.
    """
    path = Path(run) / RUN
    if not path.is_file():
        return 0
    try:
        return RunRecord.model_validate(json.loads(path.read_bytes())).mining_round
    except (OSError, ValueError, ValidationError) as error:
        raise RunError(f"{path}: expected the record of a run, but it cannot be read: {error}") from error


def _read(
    student: Student, shards: Sequence[Shard], batch_size: int, advance: Callable[[int], None]
) -> tuple[_Seen, Float[np.ndarray, "p w"]]:
    """Read every sample, and encode every picture that comes for the first time."""
    seen, problems, twice = _Seen(), list[str](), list[str]()
    pictures: dict[bytes, int] = {}
    words: dict[str, int] = {}
    known: set[str] = set()
    vectors, waiting = [np.empty((0, student.width), np.float32)], list[np.ndarray]()
    for sample in samples_of(shards):
        if len(sample.images) != 1:
            raise InputError(f"sample {sample.key!r}: expected one picture a sample, got {len(sample.images)}")
        twice += [sample.key] if sample.key in known else []
        known.add(sample.key)
        picture = pictures.setdefault(sample.pictures_hash(), len(pictures))
        if picture == len(seen.first_picture):
            seen.first_picture.append(len(seen.keys))
            try:
                waiting.append(student.pixels(sample.images[0]))
            except InputError as error:
                problems.append(f"{sample.key}: {error}")
        for slot, text in enumerate(sample.texts):
            own = words.setdefault(plain(text.text), len(words))
            if own == len(seen.first_text):
                seen.first_text.append(len(seen.texts))
            seen.sample.append(len(seen.keys))
            seen.slot.append(slot)
            seen.words.append(own)
            seen.texts.append(text.text)
        seen.keys.append(sample.key)
        seen.content.append(sample.content_hash())
        seen.picture.append(picture)
        if len(waiting) == batch_size:
            vectors.append(student.encode_pixels(waiting).numpy())
            waiting = []
        advance(1)
    if twice:
        raise InputError(f"expected each key once in the shards, but these come again:{bullet_list(twice)}")
    if problems:
        raise InputError(f"{len(problems)} pictures cannot be used:{bullet_list(problems, 20)}")
    return seen, np.concatenate([*vectors, student.encode_pixels(waiting).numpy()])


def _nearest(
    seen: _Seen, texts: Float[np.ndarray, "q w"], pictures: Float[np.ndarray, "p w"], top: int
) -> tuple[Int[np.ndarray, "t k"], Int[np.ndarray, "n k"]]:
    """Candidates of every text and every sample, by their numbers."""
    true_pictures: dict[int, set[int]] = {}
    true_texts: dict[int, set[int]] = {}
    for sample, words in zip(seen.sample, seen.words, strict=True):
        true_pictures.setdefault(words, set()).add(seen.picture[sample])
        true_texts.setdefault(seen.picture[sample], set()).add(words)
    for_text = nearest(texts, pictures, true_pictures, top)
    for_picture = nearest(pictures, texts, true_texts, top)
    first_picture, first_text = (np.array([*first, NONE]) for first in (seen.first_picture, seen.first_text))
    return first_picture[for_text[np.array(seen.words)]], first_text[for_picture[np.array(seen.picture)]]


def nearest(
    queries: Float[np.ndarray, "q w"],
    others: Float[np.ndarray, "p w"],
    true: Mapping[int, set[int]],
    top: int,
) -> Int[np.ndarray, "q k"]:
    """The `top` rows of `others` of the largest cosine for each query, the nearest first, equal ones in their order.

    Args:
        queries, others: vectors.
        true: for each query, the rows that are left out.
        top: how many; where there are fewer, -1 behind them.

    Raises:
        RunError: vectors are not finite.
    """
    if not (np.isfinite(queries).all() and np.isfinite(others).all()):
        raise RunError("expected finite vectors from the student, got others; its training has failed")
    left, right = (_normalised(side) for side in (queries, others))
    found = np.full((len(left), top), -1, np.int64)
    step = max(_BLOCK // max(len(right), 1), 1)
    for start in range(0, len(left), step):
        block = (left[start : start + step] @ right.T).round(_DECIMALS)
        for row, cosine in enumerate(block, start):
            cosine[list(true.get(row, ()))] = -np.inf
            reach = np.partition(cosine, -top)[-top] if len(cosine) > top else -np.inf
            near = np.flatnonzero((cosine >= reach) & (cosine > -np.inf))
            best = near[np.lexsort((near, -cosine[near]))[:top]]
            found[row, : len(best)] = best
    return found


def _normalised(vectors: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n w"]:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
