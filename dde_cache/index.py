"""An approximate index over a store's vectors, by FAISS: read, and searched. `indexing.py` builds it.

    OUT/index.faiss   vectors of length 1 in FAISS's own format; an inner product is a cosine
    OUT/index.json    what it is of, how it was built, what it found of the exact search's rows, and the file's SHA-256

An index only proposes: some times more rows than are wanted. These are read from the store and scored as the exact
search scores them (`search.py`), so what is found has the same numbers, and what can go wrong is that a row is missed.
FAISS is an extra, imported where an index is built or opened. **An index is for whoever built it**: FAISS reads its
files in C++ and does not promise to survive hostile ones (docs/security.md).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from dde_cache.assets import is_plain_file
from dde_cache.embeddings import EmbeddingStore, read_sealed
from dde_cache.errors import CacheError, InputError, RunError, first_line
from dde_cache.files import hash_file
from dde_cache.inference import Student
from dde_cache.search import Hit, check_search, encode_query, exact_cosines, hits_of, in_order
from dde_cache.spec import Line, Model, Sha256, hash_json
from dde_cache.stored_rows import Kind

FILE, RECORD = "index.faiss", "index.json"
CANDIDATES = 10
"""Rows that are scored exactly, for each one that is wanted."""

PARAMETERS = r"^([A-Za-z_]{1,40}=[1-9][0-9]{0,8}(,|$))*$"
"""FAISS's words for how long it looks: names with whole numbers above 0."""


class Recall(Model):
    """How much of what the exact search finds is found with an index: a row counts when its cosine is that of the
    exact search's last one or more, so that equal rows may stand for each other."""

    value: float = Field(ge=0, le=1)
    at: int = Field(ge=1, description="the first so many rows of the exact search")
    queries: int = Field(ge=1)
    source: Line = Field(description="store of the queries; empty: rows of the store itself, each without itself")


class IndexRecord(Model):
    """`index.json`, and what `index --json` prints. `sha256` is the hash of the rest in canonical form."""

    format_version: Literal[1]
    store: Sha256 = Field(description="`sha256` of the store's store.json: a store that has changed is another one")
    student: Sha256 = Field(description="fingerprint of the student")
    kind: Kind
    rows: int = Field(ge=2)
    width: int = Field(ge=1, le=2**15)
    factory: Line = Field(description="FAISS's words for the kind of index")
    parameters: Line = Field(pattern=PARAMETERS, description="FAISS's words for how long it looks")
    candidates: int = Field(ge=1, description="rows scored exactly for each one that was wanted, in the measurement")
    recall: Recall
    seconds: float = Field(ge=0, description="that building and measuring took")
    size: int = Field(ge=0, description="bytes of index.faiss")
    file: Sha256 = Field(description="SHA-256 of index.faiss")
    versions: dict[Line, Line]
    sha256: str = ""

    def own_hash(self) -> str:
        """SHA-256 of the canonical form of everything but `sha256`."""
        return hash_json(self.model_dump(mode="json", exclude={"sha256"}))


@dataclass(frozen=True)
class VectorIndex:
    """An index of a store, opened; of many searches it is read once."""

    store: EmbeddingStore
    record: IndexRecord
    folder: Path
    faiss_index: Any

    @classmethod
    def open(cls, folder: str | Path, store: EmbeddingStore) -> "VectorIndex":
        """Open the index of a store, all of it in memory. Open your own indexes alone (see the module).

        Raises:
            CacheError: it is damaged, of another store or student, or the store has changed since.
            InputError: FAISS is not installed.
        """
        folder = Path(folder)
        record = read_record(folder)
        _check_store(folder, record, store)
        return cls(store, record, folder, _read_file(load_faiss(), folder / FILE, record))

    def best_rows(
        self, query: Float[np.ndarray, " w"], top: int
    ) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """Numbers and exact cosines of the best rows that the index proposes; fewer than `top` where it proposes fewer.

        Args:
            query: a vector of any length.
            top: how many are wanted.

        Raises:
            CacheError: a unit of the store is damaged, or FAISS cannot search the index.
        """
        query = unit_vector(query.astype(np.float64))
        try:
            rows = proposed_rows(self.faiss_index, query[None], top)[0]
        except RuntimeError as error:
            raise CacheError(f"{self.folder}: FAISS cannot search this index ({reason(error)}); {_AGAIN}") from error
        return in_order(rows, exact_cosines(self.store.vectors(rows.tolist()), query), top)


_AGAIN = "delete the folder and run `dde-cache index` again"


def search_index(student: Student, index: VectorIndex, query: str | Path, *, top: int = 10) -> list[Hit]:
    """What `search` gives, of the rows that an index proposes.

    Args:
        student: whose vectors are stored; one that compares vectors.
        index: of a store of pictures for a text, of texts for a picture.
        query: a text, or the path of a picture.
        top: how many to give.

    Raises:
        CacheError: vectors of another student, or of the wrong kind; a damaged unit or index.
        InputError: a picture that cannot be read.
        RunError: a student whose vectors are not comparable.
    """
    if not student.compares and student.images == 1:
        raise RunError(
            f"{student.name}: trained for {student.model.config.task}, its vectors are not comparable by themselves, "
            "so no index can find rows for it; leave --index out and rank every row with --answer, or train with "
            "--task retrieval"
        )
    check_search(student, None)
    vector = encode_query(student, index.store, query)[0].double().numpy()
    return hits_of(index.store, *index.best_rows(vector, top))


def load_faiss() -> Any:
    """The module `faiss`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            f"an index needs a package that is not installed ({error.name}); pip install 'dde-cache[faiss]'"
        ) from error
    return faiss


def read_record(folder: Path) -> IndexRecord:
    """Read and check `index.json`.

    Raises:
        CacheError: it is missing, changed by hand, or of another version.
    """
    path = folder / RECORD
    if not path.exists():
        raise CacheError(f"{folder}: expected an index of a store, but it has no {RECORD}; make one: `dde-cache index`")
    return read_sealed(path, IndexRecord, "record of an index", f"; {_AGAIN}")


def proposed_rows(index: Any, queries: Float[np.ndarray, "q w"], top: int) -> list[Int[np.ndarray, " c"]]:
    """Rows that an index of FAISS proposes for each query, in the order of the store.

    Args:
        index: of FAISS.
        queries: of length 1.
        top: how many are wanted of each; `CANDIDATES` times as many are proposed.
    """
    count = min(CANDIDATES * top, index.ntotal)
    _, rows = index.search(np.ascontiguousarray(queries, np.float32), count)
    return [np.unique(one[(one >= 0) & (one < index.ntotal)]) for one in rows]


def unit_vector(vector: Float[np.ndarray, " w"]) -> Float[np.ndarray, " w"]:
    """The vector of length 1 of the same direction; zeros stay zeros."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def reason(error: BaseException) -> str:
    """What FAISS says, without the names of its functions."""
    text = first_line(error)
    return re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: ?)?", "", text) or text


def _check_store(folder: Path, record: IndexRecord, store: EmbeddingStore) -> None:
    build = f"build it again: `dde-cache index {store.folder} --out` with a new folder"
    if record.student != store.index.student:
        raise CacheError(
            f"{folder}: expected an index of vectors of the student of {store.folder} (fingerprint "
            f"{store.index.student[:12]}...), got one of another student's ({record.student[:12]}...); {build}"
        )
    own = store.index.sha256, store.index.kind, len(store), store.index.width
    if (record.store, record.kind, record.rows, record.width) != own:
        raise CacheError(
            f"{folder}: expected an index of {store.folder} ({len(store):,} {store.index.kind}s), got one of another "
            f"store, or of this one before it changed ({record.rows:,} {record.kind}s); {build}"
        )


def _read_file(faiss: Any, path: Path, record: IndexRecord) -> Any:
    if not is_plain_file(path):
        raise CacheError(f"{path}: the file of this index is missing; {_AGAIN}")
    size = path.stat().st_size
    if size != record.size or hash_file(path) != record.file:
        raise CacheError(
            f"{path}: expected {record.size:,} bytes with SHA-256 {record.file[:12]}..., got {size:,} with another: "
            f"the file is damaged; {_AGAIN}"
        )
    try:
        with _at_most(faiss, size):
            index = faiss.read_index(str(path), faiss.IO_FLAG_READ_ONLY)
    except (RuntimeError, MemoryError) as error:
        raise CacheError(f"{path}: FAISS {faiss.__version__} cannot read it ({reason(error)}); {_AGAIN}") from error
    got = index.d, index.ntotal, index.metric_type, bool(index.is_trained)
    if got != (record.width, record.rows, faiss.METRIC_INNER_PRODUCT, True):
        raise CacheError(
            f"{path}: expected {record.rows:,} vectors of width {record.width} compared by inner product, got "
            f"{index.ntotal:,} of width {index.d}, or another comparison: it is another index; {_AGAIN}"
        )
    if record.parameters:  # FAISS's file keeps only some of them
        try:
            faiss.ParameterSpace().set_index_parameters(index, record.parameters)
        except RuntimeError as error:
            raise CacheError(
                f"{path}: expected an index {record.factory} that takes {record.parameters}: {reason(error)}; {_AGAIN}"
            ) from error
    return index


@contextmanager
def _at_most(faiss: Any, size: int) -> Iterator[None]:
    """Let no part of a file claim more memory than twice the whole file; older versions of FAISS have no such limit."""
    name = "deserialization_vector_byte_limit"
    if not hasattr(faiss, f"set_{name}"):
        yield
        return
    before = getattr(faiss, f"get_{name}")()
    getattr(faiss, f"set_{name}")(2 * size + 2**20)
    try:
        yield
    finally:
        getattr(faiss, f"set_{name}")(before)
