"""Recipe: find stored pictures for a text, or stored texts for a picture, exactly: every row is scored, block by block.

A student of retrieval scores by cosine, one matrix product a block. Rows that may be among the best are scored again in
float64, row by row, so that a score does not depend on how the store was cut. A student that answers scores by the
probability of an answer: its shallow head runs over every row. Scores are rounded to 1e-6, because the same words
encoded in another batch differ by the noise of float32; equal scores keep the order of the store.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_cache.embeddings import EmbeddingStore
from dde_cache.errors import CacheError, InputError, RunError
from dde_cache.inference import Student
from dde_cache.spec import Model

MARGIN = 1e-5
"""By how much a cosine of a float32 matrix product may be wrong, many times over."""

_DECIMALS = 6


class Hit(Model):
    """A row that was found: its rank from 1, its cosine or probability, key and slot, and of texts the text."""

    rank: int
    score: float
    key: str
    slot: int
    text: str


class SearchReport(Model):
    """What `search --json` prints."""

    hits: tuple[Hit, ...]


Score = Callable[[Float[np.ndarray, "n w"], float, int], tuple[Int[np.ndarray, " c"], Float[np.ndarray, " c"]]]
"""From a block of vectors, the score that is to be reached and the number of hits to the rows that may be hits, with
their scores."""


def search(
    student: Student,
    store: EmbeddingStore,
    query: str | Path,
    *,
    top: int = 10,
    answer: str | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[Hit]:
    """The `top` best rows of a store, the best first.

    Args:
        student: whose vectors are stored.
        store: of pictures for a text, of texts for a picture.
        query: a text, or the path of a picture.
        top: how many to give.
        answer: of a student that answers: the answer whose probability is the score.
        advance: called with the number of rows scored.

    Raises:
        CacheError: vectors of another student, or of the wrong kind.
        InputError: an answer that the student does not know, or a picture that cannot be read.
        RunError: a student that cannot search so.
    """
    check_search(student, answer)
    vector = encode_query(student, store, query)
    score = (
        cosines(vector[0].double().numpy()) if student.compares else _answers(student, vector, store.index.kind, answer)
    )
    return hits_of(store, *best_rows(store.blocks(), score, top, advance))


def encode_query(student: Student, store: EmbeddingStore, query: str | Path) -> Float[Tensor, "1 w"]:
    """The vector of a text or a picture that is looked for in a store.

    Raises:
        CacheError: the store has vectors of another student, or of the wrong kind.
        InputError: a picture that cannot be read.
    """
    store.check_student(student.fingerprint, student.name)
    wanted = "text" if isinstance(query, Path) else "image"
    if store.index.kind != wanted:
        given, need = (
            ("picture", "texts (embed --texts)") if wanted == "text" else ("text", "pictures (embed --images)")
        )
        raise CacheError(f"{store.folder}: expected a store of {need} for a {given}, got one of {store.index.kind}s")
    return student.encode_images([query]) if isinstance(query, Path) else student.encode_texts([query])


def hits_of(store: EmbeddingStore, rows: Int[np.ndarray, " k"], scores: Float[np.ndarray, " k"]) -> list[Hit]:
    """Rows of a store with their scores, the best first, as hits."""
    hits = []
    for rank, (row, value) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True), start=1):
        key, slot, text = store.entry(row)
        hits.append(Hit(rank=rank, score=value, key=key, slot=slot, text=text))
    return hits


def best_rows(
    blocks: Iterable[tuple[int, Float[np.ndarray, "n w"]]],
    score: Score,
    top: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Numbers and scores of the `top` best rows, the best first, equal ones in their order; fewer where there are.

    Args:
        blocks: vectors, with the number of their first row.
        score: how they are scored.
        top: how many to give.
        advance: called with the number of rows scored.
    """
    rows, scores = np.empty(0, np.int64), np.empty(0)
    for start, block in blocks:
        reach = scores[-1] if len(scores) == top else -np.inf
        found, values = score(block, reach, top)
        rows, scores = in_order(np.concatenate([rows, found + start]), np.concatenate([scores, values]), top)
        advance(len(block))
    return rows, scores


def in_order(
    rows: Int[np.ndarray, " n"], scores: Float[np.ndarray, " n"], top: int
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The `top` best of some rows, the best first, equal ones in the order of the store."""
    best = np.lexsort((rows, -scores))[:top]
    return rows[best], scores[best]


def check_search(student: Student, answer: str | None) -> None:
    """Refuse what cannot be searched.

    Raises:
        RunError: a student of two pictures, of an answer that was not named, or one that has no answers.
        InputError: an answer that it does not know.
    """
    if student.compares:
        if answer is not None:
            raise RunError(f"{student.name}: compares vectors and has no answers; leave --answer out")
        return
    if student.images != 1:
        raise RunError(f"{student.name}: reads {student.images} pictures for an answer; search needs a student of one")
    shown = ", ".join(student.labels[:10]) + (f", ... ({len(student.labels)})" if len(student.labels) > 10 else "")
    if answer is None:
        raise RunError(
            f"{student.name}: trained for {student.model.config.task}, its vectors are not comparable by themselves; "
            f"name the answer whose probability ranks the rows with --answer ({shown}), or train with --task retrieval"
        )
    if answer not in student.labels:
        raise InputError(f"expected --answer among the student's answers ({shown}), got {answer!r}")


def cosines(query: Float[np.ndarray, " w"]) -> Score:
    """Score rows by their cosine with a vector."""
    query = query / max(np.linalg.norm(query), 1e-12)
    single = query.astype(np.float32)

    def score(
        block: Float[np.ndarray, "n w"], reach: float, top: int
    ) -> tuple[Int[np.ndarray, " c"], Float[np.ndarray, " c"]]:
        near = block @ single / np.maximum(np.linalg.norm(block, axis=-1), 1e-12)
        return rescored(block, near, query, reach, top)

    return score


def rescored(
    block: Float[np.ndarray, "n w"],
    near: Float[np.ndarray, " n"],
    query: Float[np.ndarray, " w"],
    reach: float,
    top: int,
) -> tuple[Int[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Of a block's rows those that may be among the best, with their exact cosines.

    Args:
        block: vectors, as they are stored.
        near: their cosines in float32.
        query: of length 1, float64.
        reach: the score that is to be reached.
        top: how many are wanted.
    """
    if len(near) > top:
        reach = max(reach, np.partition(near, -top)[-top])
    rows = np.flatnonzero(near >= reach - MARGIN)
    return rows, exact_cosines(block[rows], query)


def exact_cosines(vectors: Float[np.ndarray, "n w"], query: Float[np.ndarray, " w"]) -> Float[np.ndarray, " n"]:
    """Cosines of vectors with a query of length 1, in float64, row by row, rounded to 1e-6."""
    wide = vectors.astype(np.float64)
    norms = np.sqrt((wide * wide).sum(-1))
    return ((wide * query).sum(-1) / np.maximum(norms, 1e-12)).round(_DECIMALS)


def _answers(student: Student, query: Tensor, stored: str, answer: str | None) -> Score:
    column = student.labels.index(str(answer))

    def score(
        block: Float[np.ndarray, "n w"], reach: float, top: int
    ) -> tuple[Int[np.ndarray, " c"], Float[np.ndarray, " c"]]:
        rows = torch.from_numpy(block)
        sides = (query, rows) if stored == "image" else (rows, query)
        values = student.probabilities(*sides)[:, column].double().numpy().round(_DECIMALS)
        return np.arange(len(block)), values

    return score
