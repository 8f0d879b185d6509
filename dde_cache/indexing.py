"""Recipe: an index of a store, built block by block, and measured: how much of what the exact search finds is found.

The measurement searches with rows of the store itself, each left out of what it finds, or with another store of the
same student. Rows of the store lie among their likes: what is looked for in earnest (texts among pictures) may be found
less often, and a store of such texts measures that.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dde_cache import __version__
from dde_cache.embeddings import EmbeddingStore
from dde_cache.errors import CacheError, InputError
from dde_cache.files import hash_file, replaced_folder
from dde_cache.index import (
    CANDIDATES,
    FILE,
    PARAMETERS,
    RECORD,
    IndexRecord,
    Recall,
    load_faiss,
    proposed_rows,
    reason,
    unit_vector,
)
from dde_cache.manifest import write_bytes
from dde_cache.search import exact_cosines, in_order, rescored
from dde_cache.spec import indented_json
from dde_cache.staging import check_free

AT, QUERIES = 10, 200
"""Recall is that of the first `AT` rows, over so many queries."""

_LARGE = 2**20
"""Rows from which a graph takes long to build, and much memory."""

_TRAINING_BYTES = 2**29
_ROWS_A_LIST = 39
"""Fewer rows for each centroid, and FAISS warns."""


def build_index(
    store: EmbeddingStore,
    out: Path,
    *,
    factory: str | None = None,
    parameters: str | None = None,
    queries: EmbeddingStore | None = None,
    advance: Callable[[str, int], None] = lambda stage, rows: None,
) -> IndexRecord:
    """Build an index of a store into a new folder, whole or not at all, and measure its recall.

    The store is read once, block by block; the exact search of the measurement sees the same blocks. In memory are
    the index, and for one that has to be trained up to 512 MiB of vectors.

    Args:
        store: at least 2 rows.
        out: new or empty.
        factory: FAISS's words for another kind of index than `default_factory`, for example HNSW32.
        parameters: FAISS's words for how long it looks, for example nprobe=64; kept in the index.
        queries: vectors of the same student whose search is measured; without it, rows of the store, each of which is
            left out of what it finds.
        advance: called with the name of the stage and the number of rows that it has done since.

    Raises:
        InputError: `out` is taken, FAISS is not installed or refuses `factory` or `parameters`.
        CacheError: a store of one row or none, a damaged one, or queries of another student.
    """
    check_free(out)
    if len(store) < 2:
        raise CacheError(f"{store.folder}: expected at least 2 rows, got {len(store)}; search it without an index")
    if queries is not None and queries.index.sha256 == store.index.sha256:
        queries = None
    if queries is not None:
        _check_queries(store, queries)
    faiss = load_faiss()
    start = time.monotonic()
    chosen = default_factory(len(store), store.index.width) if factory is None else factory
    exact = _Exact(store, queries)
    with _refusals(chosen, store):
        index = _new(faiss, chosen, store.index.width)
        looks = _default_parameters(faiss, index) if parameters is None else parameters
        _set_parameters(faiss, index, looks)
        if not index.is_trained:
            advance("train", 0)
            index.train(_training_vectors(store))
        for first, block in store.blocks():
            units = _units(block)
            index.add(units)
            exact.see(first, block, units)
            advance("index", len(block))
        advance("measure", 0)
        recall = exact.recall(index)
    advance("write", 0)
    found = {name: getattr(store.index, name) for name in ("student", "kind", "rows", "width")}
    names = {"dde-cache": __version__, "faiss": faiss.__version__, "numpy": np.__version__}
    record = {"format_version": 1, "store": store.index.sha256, **found, "factory": chosen, "parameters": looks}
    record |= {"candidates": CANDIDATES, "recall": recall, "versions": names}
    return _write(faiss, index, out, record, start)


def default_factory(rows: int, width: int) -> str:
    """A graph over vectors of one byte a number; from 2^20 rows on, where it takes long to build, lists of them.

    (HNSW: Malkov and Yashunin, arXiv 1603.09320; 32 links. Lists: 4 sqrt(rows), as FAISS's guidelines have it.)
    """
    if rows < _LARGE:
        return "HNSW32,SQ8"
    return f"IVF{max(1, min(4 * math.isqrt(rows), _training_rows(rows, width) // _ROWS_A_LIST))},SQ8"


class _Exact:
    """The exact search for the queries of the measurement, fed block by block."""

    def __init__(self, store: EmbeddingStore, queries: EmbeddingStore | None) -> None:
        source = queries or store
        self._store = store
        self._chosen = _evenly(len(source), QUERIES)
        vectors = source.vectors(self._chosen).astype(np.float64)
        self._queries = np.stack([unit_vector(vector) for vector in vectors])
        self._single = self._queries.astype(np.float32).T
        self._own = queries is None
        self._source = "" if queries is None else _name(queries)
        self._at = min(AT, len(store) - self._own)
        self._top = self._at + self._own
        self._best = [(np.empty(0, np.int64), np.empty(0)) for _ in self._chosen]

    def see(self, first: int, block: Float[np.ndarray, "n w"], units: Float[np.ndarray, "n w"]) -> None:
        near = units @ self._single
        for number, (rows, scores) in enumerate(self._best):
            reach = scores[-1] if len(scores) == self._top else -np.inf
            found, values = rescored(block, near[:, number], self._queries[number], reach, self._top)
            both = np.concatenate([rows, found + first]), np.concatenate([scores, values])
            self._best[number] = in_order(*both, self._top)

    def recall(self, index: Any) -> Recall:
        proposed = proposed_rows(index, self._queries, self._top)
        # In the order of the store: each of its units is then opened once.
        wanted = np.unique(np.concatenate(proposed))
        vectors = self._store.vectors(wanted.tolist())
        found = 0
        for number, rows in enumerate(proposed):
            scores = exact_cosines(vectors[np.searchsorted(wanted, rows)], self._queries[number])
            last = self._scores(number, *self._best[number])[-1]
            found += int((self._scores(number, *in_order(rows, scores, self._top)) >= last).sum())
        value = found / (self._at * len(self._chosen))
        return Recall(value=value, at=self._at, queries=len(self._chosen), source=self._source)

    def _scores(self, number: int, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Without the row that is the query itself."""
        others = scores[rows != self._chosen[number]] if self._own else scores
        return others[: self._at]


def _name(store: EmbeddingStore) -> str:
    name = "".join(letter if letter.isprintable() else "?" for letter in store.folder.resolve().name)
    return name[:200] or "another store"


def _units(block: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n w"]:
    return block / np.maximum(np.linalg.norm(block, axis=-1, keepdims=True), 1e-12)


def _training_vectors(store: EmbeddingStore) -> Float[np.ndarray, "n w"]:
    vectors = store.vectors(_evenly(len(store), _training_rows(len(store), store.index.width)))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors


def _check_queries(store: EmbeddingStore, queries: EmbeddingStore) -> None:
    if (queries.index.student, queries.index.width) != (store.index.student, store.index.width):
        raise CacheError(
            f"{queries.folder}: expected vectors of the student of {store.folder} (fingerprint "
            f"{store.index.student[:12]}...), got those of another ({queries.index.student[:12]}...)"
        )
    if len(queries) == 0:
        raise CacheError(f"{queries.folder}: expected vectors to search with, got a store of none")


def _evenly(rows: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, rows - 1, min(rows, count)).astype(np.int64)).tolist()


def _training_rows(rows: int, width: int) -> int:
    return min(rows, _TRAINING_BYTES // (4 * width))


def _new(faiss: Any, factory: str, width: int) -> Any:
    # FAISS 1.15 ends the whole program at a graph of fewer than 2 links.
    if re.search(r"HNSW0*[01](?![0-9])", factory):
        raise RuntimeError("a graph needs at least 2 links a row")
    return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)


def _default_parameters(faiss: Any, index: Any) -> str:
    """Lists: one of 32, at least 8. A graph: 128 rows kept in view."""
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        return f"nprobe={max(1, min(lists.nlist, max(8, lists.nlist // 32)))}"
    return "efSearch=128" if isinstance(faiss.downcast_index(index), faiss.IndexHNSW) else ""


def _set_parameters(faiss: Any, index: Any, parameters: str) -> None:
    if not re.fullmatch(PARAMETERS, parameters):
        raise InputError(f"expected --parameters such as nprobe=64 or efSearch=256, got {parameters!r}")
    if parameters:
        faiss.ParameterSpace().set_index_parameters(index, parameters)


@contextmanager
def _refusals(factory: str, store: EmbeddingStore) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError, AssertionError) as error:
        raise InputError(
            f"FAISS cannot build {factory!r} for {len(store):,} vectors of width {store.index.width}: {reason(error)}; "
            "give another --factory or --parameters, or none"
        ) from error


def _write(faiss: Any, index: Any, out: Path, record: dict[str, Any], start: float) -> IndexRecord:
    with replaced_folder(out) as staged:
        path = staged / FILE
        with open(path, "wb") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
            file.flush()
            os.fsync(file.fileno())
        written = {"size": path.stat().st_size, "file": hash_file(path), "seconds": time.monotonic() - start}
        made = IndexRecord.model_validate(record | written)
        made = made.model_copy(update={"sha256": made.own_hash()})
        write_bytes(staged / RECORD, indented_json(made.model_dump(mode="json")))
    return made
