"""Recipe: a teacher scores candidates; see `matching` for the folder, docs/mining.md for what it is good for."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dde_cache.arrays import table_members
from dde_cache.candidates import NONE, Candidates, check_shards, read_candidates
from dde_cache.drift import versions
from dde_cache.errors import CacheError, InputError, TeacherError
from dde_cache.files import hash_file, partial_path, place, remove_abandoned, write_members
from dde_cache.identity import DTYPES, ExtractConfig, target_spec
from dde_cache.interrupt import FinishStep
from dde_cache.manifest import UNITS, write_bytes
from dde_cache.matching import (
    CANDIDATES,
    INDEX,
    Pairs,
    ScoreAttributes,
    ScoreIndex,
    ScoreReport,
    ScoreUnit,
    fingerprint_of,
    pairs_of,
    plan_units,
    read_unit,
)
from dde_cache.preprocess import PixelBatch, TokenBatch
from dde_cache.samples import Sample, Shard
from dde_cache.spec import Dtype, indented_json
from dde_cache.stream import Recent
from dde_cache.teacher import FusionTeacher
from dde_cache.teachers.vilt import embed_picture, joint_pass
from dde_cache.unit import SUFFIX

_MATCHED = ("matched", "match", "yes", "true")
"""What a class of two may be called whose logit says that text and picture belong together."""

_KEPT_SAMPLES = 2048


@dataclass(frozen=True)
class ScoreConfig:
    """How scores are made."""

    dtype: Dtype = "float32"
    batch_size: int = 64
    device: str = "cpu"


def check_matching(teacher: FusionTeacher, name: str) -> None:
    """Refuse a teacher that does not say whether text and picture belong together.

    Raises:
        TeacherError: it has no matching head, and not two classes of which one is named so.
    """
    if hasattr(teacher.model, "rank_output") or _column(teacher) is not None:
        return
    answers = "none" if teacher.labels is None else ", ".join(teacher.labels[:5])
    raise TeacherError(
        f"{name}: expected a teacher with a matching head, or with two classes of which one is "
        f"{', '.join(_MATCHED)}; its answers are: {answers}"
    )


def _column(teacher: FusionTeacher) -> int | None:
    """Which of two classes says that a pair matches."""
    labels = [label.casefold() for label in teacher.labels or ()]
    found = [number for number, label in enumerate(labels) if label in _MATCHED]
    return found[0] if len(labels) == 2 and len(found) == 1 and teacher.images == 1 else None


@torch.inference_mode()
def matching_scores(teacher: FusionTeacher, tokens: TokenBatch, pictures: PixelBatch) -> Float[Tensor, " b"]:
    """How well texts suit pictures: the logit of a matching head, or of `matched` minus the other of two classes."""
    model: Any = teacher.model
    if hasattr(model, "rank_output"):  # ViltForImageAndTextRetrieval
        embedded = embed_picture(model.vilt, pictures)
        return model.rank_output(joint_pass(model.vilt, tokens, *embedded))[:, 0].float()
    logits, column = teacher(tokens, [pictures], ()).logits, _column(teacher)
    if logits is None or column is None:
        raise TeacherError("expected a teacher with a matching head")
    return logits[:, column] - logits[:, 1 - column]


def score(
    shards: Sequence[Shard],
    teacher_name: str,
    candidates: Path,
    out: Path,
    config: ScoreConfig | None = None,
    *,
    advance: Callable[[int], None] = lambda pairs: None,
    start: Callable[[int], None] = lambda pairs: None,
) -> ScoreReport:
    """Score candidates with a teacher, or go on where an earlier call was cut short.

    Args:
        shards: those that were mined.
        teacher_name: folder or hub id.
        candidates: file of `mine`.
        out: new, empty, or begun with the same teacher and candidates; this call is the only one that writes there.
        config: how.
        advance: called with the number of pairs that are done.
        start: called with the number of pairs that are to score.

    Raises:
        InputError: the shards have changed since they were mined; `out` holds something else.
        TeacherError: the teacher cannot be used, or gives NaN or infinity.
        CacheError: the candidates are damaged, or `out` holds scores of others, or of another teacher.
    """
    begin = time.monotonic()
    config = config or ScoreConfig()
    found = read_candidates(candidates)
    check_shards(found, shards, str(candidates))
    teacher = FusionTeacher.load(teacher_name, DTYPES[config.dtype], config.device)
    check_matching(teacher, teacher_name)
    identity = target_spec(teacher, ExtractConfig()).teacher
    fingerprint = fingerprint_of(found.sha256, identity, config.dtype)
    kept = _begin(out, candidates, found, fingerprint)
    plan = plan_units(found)
    todo = {name: pairs_of(found, rows) for name, rows in plan.items() if name not in kept}
    start(sum(len(pairs) for pairs in todo.values()))
    scorer = _Scorer(shards, found, teacher, config, advance)
    for name, pairs in todo.items():
        scores = dict(zip(pairs, scorer(pairs).tolist(), strict=True))
        _write(out / UNITS / name, found, plan[name], scores, fingerprint)
    units = tuple(_listed(out / UNITS / name) for name in plan)
    index = ScoreIndex(
        format_version=1,
        round=found.attributes.round,
        student=found.attributes.student,
        candidates=found.sha256,
        teacher=identity,
        dtype=config.dtype,
        fingerprint=fingerprint,
        samples=len(found.keys),
        texts=len(found.sample),
        source=Path(teacher_name).name,
        versions=versions(),
        units=units,
    )
    index = index.model_copy(update={"sha256": index.own_hash()})
    write_bytes(out / INDEX, indented_json(index.model_dump(mode="json")))
    scored = sum(len(some) for some in todo.values())
    size = sum(unit.size for unit in units)
    seconds = time.monotonic() - begin
    return ScoreReport(
        round=index.round, pairs=scored, units=len(plan), units_kept=len(kept), bytes=size, seconds=seconds
    )


def _begin(out: Path, candidates: Path, found: Candidates, fingerprint: str) -> set[str]:
    """Make the folder, or name the units that it has.

    Raises:
        InputError, CacheError: it holds something else.
    """
    ours = {INDEX, CANDIDATES, UNITS}
    strange = [
        path.name
        for path in (out.iterdir() if out.is_dir() else ())
        if path.name not in ours and path.suffix != ".partial"
    ]
    if strange or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: expected a new or empty folder, or scores to continue; choose another --out")
    (out / UNITS).mkdir(parents=True, exist_ok=True)
    for folder in (out, out / UNITS):  # of a call that was killed: only one writes here at a time
        remove_abandoned(folder, after=0)
    held = out / CANDIDATES
    if held.exists():
        other = read_candidates(held)
        if other.sha256 != found.sha256:
            raise CacheError(
                f"{out}: holds scores of the candidates of {other.name}, but these are of {found.name}: a round has a "
                "folder of its own; choose another --out"
            )
    else:
        partial = partial_path(held)
        shutil.copyfile(candidates, partial)
        place(partial, held, replace=True)
    kept = set()
    for path in sorted((out / UNITS).glob(f"[!.]*{SUFFIX}")):
        attributes, _ = read_unit(path, found)
        if attributes.fingerprint != fingerprint:
            raise CacheError(
                f"{out}: holds scores of another teacher, or of this one in another dtype; choose another --out"
            )
        kept.add(path.name)
    return kept


class _Scorer:
    """Runs the teacher over pairs; pictures are processed once while they are near."""

    def __init__(
        self,
        shards: Sequence[Shard],
        found: Candidates,
        teacher: FusionTeacher,
        config: ScoreConfig,
        advance: Callable[[int], None],
    ) -> None:
        self._found, self._teacher, self._config, self._advance = found, teacher, config, advance
        self._home = {key: shard for shard in shards for key in shard.keys}
        self._samples: Recent[int, Sample] = Recent(self._read, lambda _sample: 1, _KEPT_SAMPLES)
        self._pixels: Recent[int, np.ndarray] = Recent(self._process, lambda pixels: pixels.nbytes, 2**28)

    def _read(self, number: int) -> Sample:
        key = self._found.keys[number]
        return self._home[key].read(key)

    def _process(self, number: int) -> np.ndarray:
        try:
            return self._teacher.preprocessor.pixels(self._samples(number).images[0].decode())
        except InputError as error:
            raise InputError(f"sample {self._found.keys[number]!r}: {error}") from error

    def _text(self, number: int) -> str:
        return self._samples(int(self._found.sample[number])).texts[int(self._found.slot[number])].text

    def __call__(self, pairs: Pairs) -> Float[np.ndarray, " n"]:
        scores = np.empty(len(pairs), np.float32)
        # Texts of one length together: what is padded is computed in vain.
        order = sorted(range(len(pairs)), key=lambda row: len(self._text(pairs[row][0])))
        device = torch.device(self._config.device)
        with FinishStep() as interrupt:
            for start in range(0, len(order), self._config.batch_size):
                rows = order[start : start + self._config.batch_size]
                tokens = self._teacher.preprocessor.tokens([self._text(pairs[row][0]) for row in rows])
                pixels = self._teacher.preprocessor.stack([self._pixels(pairs[row][1]) for row in rows])
                moved = TokenBatch(tokens.ids.to(device), tokens.mask.to(device))
                pictures = PixelBatch(pixels.pixels.to(device, DTYPES[self._config.dtype]), pixels.grid)
                found = matching_scores(self._teacher, moved, pictures)
                if not bool(found.isfinite().all()):
                    raise TeacherError(
                        f"expected finite matching scores from the teacher, got others in {self._config.dtype}; try "
                        "--dtype float32, or look at its weights"
                    )
                scores[rows] = found.cpu().numpy()
                self._advance(len(rows))
                interrupt.check()
        return scores


def _write(path: Path, found: Candidates, rows: range, scores: dict[tuple[int, int], float], fingerprint: str) -> None:
    first, last = int(found.starts[rows.start]), int(found.starts[rows.stop])
    pictures, texts = found.pictures[first:last], found.texts[rows.start : rows.stop]
    sample = found.sample[first:last]
    arrays = {
        "own": np.array([scores[first + row, number] for row, number in enumerate(sample.tolist())], np.float32),
        "pictures": np.array(
            [
                [0.0 if other == NONE else scores[first + row, other] for other in others]
                for row, others in enumerate(pictures.tolist())
            ],
            np.float32,
        ).reshape(pictures.shape),
        "texts": np.array(
            [
                [0.0 if text == NONE else scores[text, number] for text in some]
                for number, some in zip(rows, texts.tolist(), strict=True)
            ],
            np.float32,
        ).reshape(texts.shape),
    }
    attributes = ScoreAttributes(
        format_version=1, fingerprint=fingerprint, first=rows.start, samples=len(rows), texts=last - first
    )
    write_members(path, table_members(arrays, attributes.model_dump(mode="json")))


def _listed(path: Path) -> ScoreUnit:
    return ScoreUnit(name=path.name, size=path.stat().st_size, sha256=hash_file(path))
