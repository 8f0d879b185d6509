"""An index proposes, the exact search's numbers decide; what it misses is measured; what is another's is refused."""

import json
import re
import signal
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline import Child, cli, killed_in, make_samples, make_shards, tree
from students import PAIRS, SIMILARITY, save_student

from dde_cache.embed import Images, Texts, embed
from dde_cache.embeddings import EmbeddingIndex, EmbeddingStore, EmbeddingUnit, write_index
from dde_cache.errors import CacheError, InputError, RunError
from dde_cache.files import hash_file
from dde_cache.index import FILE, RECORD, VectorIndex, read_record, search_index
from dde_cache.indexing import build_index, default_factory
from dde_cache.inference import Student
from dde_cache.pictures import open_pictures
from dde_cache.questions import read_questions
from dde_cache.search import best_rows, cosines, search
from dde_cache.spec import hash_json
from dde_cache.stored_rows import EmbeddingAttributes, Entries, write_rows

ROOT = Path(__file__).parent.parent
WIDTH = 16


def make_store(folder, vectors, *, unit_rows=64, student="0" * 64, kind="image"):
    """A store with these vectors, of a student that there is not."""
    (folder / "units").mkdir(parents=True)
    units = []
    for number, start in enumerate(range(0, len(vectors), unit_rows)):
        rows = vectors[start : start + unit_rows]
        keys = [f"row-{start + row:05d}" for row in range(len(rows))]
        texts = keys if kind == "text" else ()
        entries = Entries(keys, [0] * len(rows), np.zeros((len(rows), 32), np.uint8), texts)
        path = folder / "units" / f"{number:06d}.zarr.zip"
        attributes = {"format_version": 1, "kind": kind, "student": student, "width": rows.shape[1], "left_out": 0}
        write_rows(path, entries, rows, EmbeddingAttributes(**attributes))
        size, digest = path.stat().st_size, hash_file(path)
        units.append(EmbeddingUnit(name=path.name, rows=len(rows), left_out=0, size=size, sha256=digest))
    index = EmbeddingIndex(format_version=1, kind=kind, student=student, width=vectors.shape[1], rows=len(vectors),
                           left_out=0, source="test", versions={}, units=tuple(units))  # fmt: skip
    write_index(folder, index)
    return EmbeddingStore(folder)


def clustered(rows, seed=0, width=WIDTH):
    """Vectors around some centres, of lengths that cosines do not see."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(20, width))[random.integers(0, 20, rows)]
    vectors = (centres + 0.5 * random.normal(size=(rows, width))) * 2.0 ** random.integers(-3, 4, (rows, 1))
    return vectors.astype(np.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store of 1,500 rows, and its default index."""
    folder = tmp_path_factory.mktemp("place")
    store = make_store(folder / "store", clustered(1500))
    build_index(store, folder / "index")
    return folder


@pytest.fixture
def copy(place, tmp_path):
    """A copy of that index to spoil."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, content in tree(place / "index").items():
        (folder / name).write_bytes(content)
    return folder


def resealed(folder, **changes):
    """Change a record as somebody would who knows how its hash is made."""
    content = json.loads((folder / RECORD).read_text()) | changes
    content["sha256"] = hash_json({name: value for name, value in content.items() if name != "sha256"})
    (folder / RECORD).write_text(json.dumps(content))


# --- what it finds


@given(
    rows=st.integers(2, 120),
    copies=st.integers(5, 120),
    top=st.integers(1, 12),
    unit_rows=st.integers(40, 120),
    seed=st.integers(0, 2**16),
)
def test_a_flat_index_finds_what_exact_search_finds_bit_for_bit(tmp_path_factory, rows, copies, top, unit_rows, seed):
    """Rows repeat, so there are ties, which keep the order of the store."""
    random = np.random.default_rng(seed)
    vectors = clustered(rows, seed)[random.integers(0, min(copies, rows), rows)]
    folder = tmp_path_factory.mktemp("flat")
    store = make_store(folder / "store", vectors, unit_rows=unit_rows)
    record = build_index(store, folder / "index", factory="Flat")
    assert record.recall.value == 1
    query = random.normal(size=WIDTH)
    found, scores = VectorIndex.open(folder / "index", store).best_rows(query, top)
    expected, numbers = best_rows(store.blocks(), cosines(query), top)
    assert found.tolist() == expected.tolist()
    assert scores.tobytes() == numbers.tobytes()


@pytest.mark.parametrize(
    ("factory", "parameters", "low", "high"),
    [
        (None, None, 0.97, 1),
        ("HNSW32", None, 0.97, 1),
        ("HNSW4,SQ8", "efSearch=4", 0.2, 1),
        ("IVF16,Flat", "nprobe=1", 0.3, 0.9999),
        ("PQ4x4", None, 0.2, 0.9999),
    ],
)
def test_the_recall_is_what_numpy_finds(place, tmp_path, factory, parameters, low, high):
    """Over the same queries: 200 rows, evenly; a row counts when its cosine is the tenth exact one or more."""
    store = EmbeddingStore(place / "store")
    record = build_index(store, tmp_path / "index", factory=factory, parameters=parameters)
    index = VectorIndex.open(tmp_path / "index", store)
    wide = np.concatenate([block for _, block in store.blocks()]).astype(np.float64)
    wide /= np.linalg.norm(wide, axis=-1, keepdims=True)
    chosen = np.linspace(0, len(store) - 1, 200).astype(int)
    found = 0
    for row in chosen:
        cosine = (wide @ wide[row]).round(6)
        tenth = np.sort(np.delete(cosine, row))[-10]
        rows, scores = index.best_rows(wide[row], 11)
        assert np.array_equal(scores, cosine[rows])
        found += int((np.delete(cosine[rows], np.flatnonzero(rows == row))[:10] >= tenth).sum())
    assert record.recall.value == pytest.approx(found / 2000)
    assert low <= record.recall.value <= high
    assert (record.recall.at, record.recall.queries, record.recall.source) == (10, 200, "")


def test_the_recall_of_other_queries_is_theirs(place, tmp_path):
    """Lists that hold the store's rows well are poor for vectors from elsewhere."""
    store = EmbeddingStore(place / "store")
    away = make_store(tmp_path / "texts", np.random.default_rng(5).normal(size=(30, WIDTH)).astype(np.float32))
    options = {"factory": "IVF20,Flat", "parameters": "nprobe=1"}
    own = build_index(store, tmp_path / "own", **options).recall
    other = build_index(store, tmp_path / "other", queries=away, **options).recall
    assert (other.queries, other.source, other.at) == (30, "texts", 10)
    wide = np.concatenate([block for _, block in store.blocks()]).astype(np.float64)
    wide /= np.linalg.norm(wide, axis=-1, keepdims=True)
    index, found = VectorIndex.open(tmp_path / "other", store), 0
    for query in away.vectors(range(30)).astype(np.float64):
        cosine = (wide @ query / np.linalg.norm(query)).round(6)
        found += int((index.best_rows(query, 10)[1] >= np.sort(cosine)[-10]).sum())
    assert other.value == pytest.approx(found / 300)
    assert other.value < own.value
    stranger = make_store(tmp_path / "stranger", clustered(5), student="1" * 64)
    with pytest.raises(CacheError, match="stranger: expected vectors of the student of"):
        build_index(store, tmp_path / "x", queries=stranger)
    assert not (tmp_path / "x").exists()


def test_the_record_says_what_the_index_is_of(place):
    store, record = EmbeddingStore(place / "store"), read_record(place / "index")
    assert (record.store, record.student) == (store.index.sha256, "0" * 64)
    assert (record.rows, record.width, record.kind) == (1500, WIDTH, "image")
    assert (record.factory, record.parameters) == ("HNSW32,SQ8", "efSearch=128")
    assert (record.size, record.file) == ((place / "index" / FILE).stat().st_size, hash_file(place / "index" / FILE))
    assert record.versions["faiss"] == faiss.__version__
    assert faiss.read_index(str(place / "index" / FILE)).hnsw.efSearch == 128


def test_an_index_is_opened_with_the_parameters_it_was_measured_with(place, tmp_path):
    """FAISS's own file forgets max_codes."""
    store = EmbeddingStore(place / "store")
    build_index(store, tmp_path / "index", factory="IVF16,SQ8", parameters="nprobe=3,max_codes=50")
    opened = VectorIndex.open(tmp_path / "index", store).faiss_index
    assert (opened.nprobe, opened.max_codes) == (3, 50)
    resealed(tmp_path / "index", parameters="efSearch=9")
    with pytest.raises(CacheError, match="expected an index IVF16,SQ8 that takes efSearch=9"):
        VectorIndex.open(tmp_path / "index", store)


def test_the_store_itself_as_queries_finds_its_likes_without_itself(place, tmp_path):
    store = EmbeddingStore(place / "store")
    recall = build_index(store, tmp_path / "index", factory="IVF16,Flat", parameters="nprobe=1", queries=store).recall
    assert recall == build_index(store, tmp_path / "other", factory="IVF16,Flat", parameters="nprobe=1").recall
    assert recall.source == ""


@given(rows=st.integers(2, 10**9), width=st.integers(1, 2**15))
def test_the_default_is_a_kind_that_can_be_trained(rows, width):
    """FAISS wants 39 rows for each list; up to 512 MiB of them are at hand."""
    chosen = default_factory(rows, width)
    lists = re.fullmatch(r"IVF(\d+),SQ8", chosen)
    if rows < 2**20:
        assert chosen == "HNSW32,SQ8"
    else:
        assert 1 <= int(lists[1]) <= 4 * rows**0.5
        assert int(lists[1]) * 39 * width * 4 <= 2**29


def test_two_rows_are_enough_and_one_is_not(tmp_path):
    store = make_store(tmp_path / "two", np.array([[1, 0], [0, 0]], np.float32))
    assert build_index(store, tmp_path / "index").recall.at == 1
    rows, scores = VectorIndex.open(tmp_path / "index", store).best_rows(np.array([2.0, 0]), 5)
    assert rows.tolist() == [0, 1]
    assert scores.tolist() == [1, 0]
    with pytest.raises(CacheError, match="expected at least 2 rows, got 1; search it without"):
        build_index(make_store(tmp_path / "one", np.ones((1, 2), np.float32)), tmp_path / "x")


# --- what is refused


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        ("nonsense", None, "could not parse index string nonsense"),
        ("HNSW1", None, "at least 2 links"),
        ("HNSW0,SQ8", None, "at least 2 links"),
        ("PQ3", None, "should be a multiple"),
        ("IVF5000,Flat", None, r"Number of training points \(1500\) should be at least"),
        ("LSH", None, "METRIC_L2"),
        ("IVF99999999999999999999,Flat", None, "FAISS cannot build"),
        (None, "nprobe=4", "could not set parameter nprobe"),
        (None, "efSearch=0", "expected --parameters such as"),
        (None, "efSearch=-1", "expected --parameters such as"),
    ],
)
def test_what_faiss_refuses_is_an_error_of_ours(place, tmp_path, factory, parameters, message):
    with pytest.raises(InputError, match=message):
        build_index(EmbeddingStore(place / "store"), tmp_path / "x", factory=factory, parameters=parameters)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_refused(place):
    before = tree(place / "index")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        build_index(EmbeddingStore(place / "store"), place / "index")
    assert tree(place / "index") == before


def test_the_index_of_another_store_is_refused(place, tmp_path):
    """Another student's; one of other vectors; and the store's own, before a row was added."""
    for name, rows, student, message in (
        ("student", clustered(1500), "1" * 64, "got one of another student's"),
        ("vectors", clustered(1500, seed=1), "0" * 64, "got one of another store, or of this one before it changed"),
        ("grown", clustered(1501), "0" * 64, r"expected an index of .*grown \(1,501 images\)"),
    ):
        other = make_store(tmp_path / name, rows, student=student)
        with pytest.raises(CacheError, match=message) as caught:
            VectorIndex.open(place / "index", other)
        assert f"dde-cache index {other.folder} --out" in str(caught.value)


def test_what_is_no_index_is_refused(copy, place, tmp_path):
    store = EmbeddingStore(place / "store")
    with pytest.raises(CacheError, match=r"it has no index\.json"):
        VectorIndex.open(tmp_path / "nowhere", store)
    (copy / FILE).rename(copy / "kept")
    with pytest.raises(CacheError, match="is missing"):
        VectorIndex.open(copy, store)
    (copy / FILE).symlink_to(copy.parent)
    with pytest.raises(CacheError, match="is missing"):
        VectorIndex.open(copy, store)
    for content in (b"", b"{", b"[]", b'{"format_version": 2}', b"\xff"):
        (copy / RECORD).write_bytes(content)
        with pytest.raises(CacheError, match=r"index\.json"):
            VectorIndex.open(copy, store)


@given(place_=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), name=st.sampled_from([FILE, RECORD]))
def test_a_flipped_bit_is_noticed_before_faiss_reads_it(place, tmp_path_factory, place_, bit, name):
    folder = tmp_path_factory.mktemp("flipped")
    for other, content in tree(place / "index").items():
        (folder / other).write_bytes(content)
    content = bytearray((folder / name).read_bytes())
    content[int(place_ * len(content))] ^= 1 << bit
    (folder / name).write_bytes(content)
    with pytest.raises(CacheError, match=r"the file is damaged|index\.json"):
        VectorIndex.open(folder, EmbeddingStore(place / "store"))


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_file_cut_short_is_an_error_also_when_its_hash_is_made_right(copy, place, kept):
    store, content = EmbeddingStore(place / "store"), (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(content[:kept])
    with pytest.raises(CacheError, match="the file is damaged"):
        VectorIndex.open(copy, store)
    resealed(copy, size=len(content[:kept]), file=hash_file(copy / FILE))
    with pytest.raises(CacheError, match=r"FAISS .* cannot read it"):
        VectorIndex.open(copy, store)


@pytest.mark.parametrize(
    ("rows", "width", "metric"),
    [
        (1499, WIDTH, faiss.METRIC_INNER_PRODUCT),
        (1500, WIDTH + 1, faiss.METRIC_INNER_PRODUCT),
        (1500, WIDTH, faiss.METRIC_L2),
    ],
)
def test_another_index_under_this_record_is_refused(copy, place, rows, width, metric):
    other = faiss.index_factory(width, "Flat", metric)
    other.add(clustered(rows, width=width))
    faiss.write_index(other, str(copy / FILE))
    resealed(copy, size=(copy / FILE).stat().st_size, file=hash_file(copy / FILE))
    with pytest.raises(CacheError, match="it is another index"):
        VectorIndex.open(copy, EmbeddingStore(place / "store"))


def test_a_file_that_claims_more_memory_than_it_has_bytes_is_refused(copy, place):
    """The count of the codes of a flat index says 2^38: as a file of 2^40 bytes would."""
    other = faiss.index_factory(WIDTH, "Flat", faiss.METRIC_INNER_PRODUCT)
    other.add(clustered(1500))
    faiss.write_index(other, str(copy / FILE))
    content = (copy / FILE).read_bytes()
    count = (1500 * WIDTH).to_bytes(8, "little")
    assert content.count(count) == 1
    (copy / FILE).write_bytes(content.replace(count, (2**38 - 1).to_bytes(8, "little")))
    resealed(copy, size=len(content), file=hash_file(copy / FILE))
    limit = faiss.get_deserialization_vector_byte_limit()
    with pytest.raises(CacheError, match=r"cannot read it .*byte_limit"):
        VectorIndex.open(copy, EmbeddingStore(place / "store"))
    assert faiss.get_deserialization_vector_byte_limit() == limit


def test_rows_that_an_index_makes_up_are_left_out(copy, place):
    """Numbers of rows are a file's claim too."""
    store = EmbeddingStore(place / "store")
    other = faiss.index_factory(WIDTH, "IDMap,Flat", faiss.METRIC_INNER_PRODUCT)
    names = np.arange(1500)
    names[::2] = 2**40
    names[1::4] = 7
    other.add_with_ids(clustered(1500), names)
    faiss.write_index(other, str(copy / FILE))
    resealed(copy, size=(copy / FILE).stat().st_size, file=hash_file(copy / FILE), parameters="")
    rows, _ = VectorIndex.open(copy, store).best_rows(np.ones(WIDTH), 100)
    assert len(set(rows.tolist())) == len(rows)
    assert set(rows.tolist()) <= {7, *range(3, 1500, 4)}


# --- the commands


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Shards, a student that compares and one that answers, and a store of pictures of each; texts of the first."""
    folder = tmp_path_factory.mktemp("found")
    make_shards(folder / "shards")
    for name, options in (("find", {"head": SIMILARITY}), ("run", {})):
        student = Student.from_pretrained(save_student(folder / name, **options))
        embed(student, Images(open_pictures(str(folder / "shards"), 1)), folder / f"{name}-images", unit_rows=3)
        embed(student, Texts(read_questions(folder / "shards"), "shards"), folder / f"{name}-texts", unit_rows=4)
        build_index(EmbeddingStore(folder / f"{name}-images"), folder / f"{name}-index")
    return folder


def works(*arguments):
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "--json" in arguments or all(len(line) <= 80 for line in done.out.splitlines())
    return done


def fails(*arguments, expected):
    done = cli(*arguments)
    assert done.code == 1, (done.out, done.err)
    assert "Traceback" not in done.err
    assert expected in done.message, done.message


def test_pictures_for_a_text_and_texts_for_a_picture(found, tmp_path):
    student = Student.from_pretrained(found / "find")
    store = EmbeddingStore(found / "find-images")
    index = VectorIndex.open(found / "find-index", store)
    assert search_index(student, index, "blue ?", top=4) == search(student, store, "blue ?", top=4)
    picture = tmp_path / "picture.png"
    picture.write_bytes(make_samples(3)[2].images[0].content)
    texts = EmbeddingStore(found / "find-texts")
    build_index(texts, tmp_path / "texts")
    index = VectorIndex.open(tmp_path / "texts", texts)
    assert search_index(student, index, picture, top=100) == search(student, texts, picture, top=100)
    with pytest.raises(CacheError, match="expected a store of texts"):
        search_index(student, VectorIndex.open(found / "find-index", store), picture)


def test_the_commands(found, tmp_path):
    out = tmp_path / "index"
    shown = works("index", found / "find-images", "--out", out, "--queries", found / "find-texts").out
    assert "recall@8" in shown
    assert "rows of find-texts" in shown
    printed = works("index", found / "find-images", "--out", tmp_path / "json", "--factory", "Flat", "--json").out
    assert json.loads(printed) == json.loads((tmp_path / "json" / RECORD).read_text())
    words = ("search", found / "find", "--store", found / "find-images", "a red circle")
    done = works(*words, "--index", out, "--top", 3)
    assert done.out == works(*words, "--top", 3).out
    assert "approximate: this index found 1.000 of the best 8 when it was built" in done.message
    assert works(*words, "--index", out, "--json").out == works(*words, "--json").out
    few = ("--factory", "IVF4,Flat", "--parameters", "nprobe=1")
    works("index", found / "find-images", "--out", tmp_path / "few", *few)
    done = works(*words, "--index", tmp_path / "few", "--top", 8, "--quiet", "--json")
    proposed = len(json.loads(done.out)["hits"])
    assert 0 < proposed < 8
    assert f"warning: this index proposed only {proposed} rows" in done.message


def test_wrong_turns(found, tmp_path):
    store = found / "find-images"
    words = ("search", found / "find", "--store", store, "a red circle", "--index")
    fails(*words, tmp_path, expected="expected an index of a store, but it has no index.json")
    fails(*words, found / "run-index", expected="got one of another student's")
    fails(*words, found / "find-index", "--answer", "yes", expected="expected --index or --answer, got both")
    answers = ("search", found / "run", "--store", found / "run-images", "a red circle", "--index", found / "run-index")
    fails(*answers, expected="its vectors are not comparable by themselves, so no index can find rows for it")
    fails("index", tmp_path, "--out", tmp_path / "x", expected="expected a store of embeddings")
    fails("index", store, "--out", found, expected="expected a new or empty folder")
    fails("index", store, "--out", tmp_path / "x", "--factory", "HNSW1", expected="give another --factory")
    pair = Student.from_pretrained(save_student(tmp_path / "pair", PAIRS))
    with pytest.raises(RunError, match="reads 2 pictures for an answer"):
        search_index(pair, VectorIndex.open(found / "find-index", EmbeddingStore(store)), "blue")


def test_without_faiss_the_extra_is_named_and_exact_search_works(found, tmp_path, monkeypatch):
    """And nothing imports it before it is asked for."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    words = ("search", found / "find", "--store", found / "find-images", "a red circle", "--json")
    install = "is not installed (faiss); pip install 'dde-cache[faiss]'"
    fails("index", found / "find-images", "--out", tmp_path / "x", expected=install)
    fails(*words, "--index", found / "find-index", expected=install)
    works(*words)
    assert list(tmp_path.iterdir()) == []
    for path in [*(ROOT / "dde_cache").rglob("*.py"), *(ROOT / "cli").glob("*.py")]:
        assert not re.search(r"^(import|from) faiss\b", path.read_text(), re.M), path


def test_a_killed_call_leaves_nothing_that_looks_whole(found, tmp_path):
    """All is written, and the folder never gets its name."""
    out = tmp_path / "out" / "index"
    words = ("index", found / "find-images", "--out", out)
    child = Child(*words, folder=tmp_path, before=killed_in("replace", 1, "out/index"))
    assert child.wait() == -signal.SIGKILL
    assert [path.suffix for path in out.parent.iterdir()] == [".partial"]
    fails("search", found / "find", "--store", found / "find-images", "a red circle", "--index", out,
          expected="it has no index.json")  # fmt: skip
    works(*words)
    assert VectorIndex.open(out, EmbeddingStore(found / "find-images")).record.rows == 8


def test_a_full_disk_is_an_error_and_leaves_nothing(found, tmp_path):
    out = tmp_path / "out" / "index"
    child = Child("index", found / "find-images", "--out", out, folder=tmp_path, largest_file=1000)
    assert child.wait() == 1
    assert "File too large; make room" in child.message
    assert list(out.parent.iterdir()) == []
