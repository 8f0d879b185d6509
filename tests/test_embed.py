"""Stores of embeddings: what a student gives, by key; whole or not at all; and no others' vectors."""

import hashlib
import json
import signal

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from pipeline import Child, killed_in, make_samples, make_shards, tree
from students import ANSWERS, PAIRS, save_student

from dde_cache.embed import Images, Texts, embed
from dde_cache.embeddings import EmbeddingStore, read_index
from dde_cache.errors import CacheError, InputError
from dde_cache.inference import Student
from dde_cache.pictures import FolderPictures, open_pictures
from dde_cache.questions import Question, read_questions
from dde_cache.samples import Sample, open_shards
from dde_cache.stored_rows import EmbeddingAttributes, Entries, StoredRows, write_rows

ROWS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def student(run):
    return Student.from_pretrained(run)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shards"
    make_shards(folder)
    return str(folder)


@pytest.fixture
def album(tmp_path):
    """A folder of eight pictures at two depths, with what is to be passed over."""
    folder = tmp_path / "album"
    (folder / "deep").mkdir(parents=True)
    (folder / ".thumbs").mkdir()
    for number, sample in enumerate(make_samples(8)):
        (folder / ("deep" if number % 2 else "") / f"{number}.PNG").write_bytes(sample.images[0].content)
    (folder / ".thumbs" / "0.png").write_bytes(b"small")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def whole(student, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "whole"
    embed(student, Images(open_pictures(shards)), out, unit_rows=ROWS)
    return out


def rows_of(store):
    return [store.entry(row) for row in range(len(store))]


def copy_of(folder, out):
    out.mkdir()
    (out / "units").mkdir()
    for name, content in tree(folder).items():
        (out / name).write_bytes(content)
    return out


def test_pictures_of_shards(student, shards, whole):
    samples = [sample for shard in open_shards(shards) for sample in shard]
    store = EmbeddingStore(whole)
    assert rows_of(store) == [(sample.key, 0, "") for sample in samples]
    expected = student.encode_images([sample.images[0] for sample in samples]).numpy()
    np.testing.assert_allclose(store.vectors(range(len(store))), expected, atol=1e-6)
    assert np.array_equal(store.vectors([7, 0, 7]), store.vectors(range(8))[[7, 0, 7]])
    assert np.array_equal(np.concatenate([block for _, block in store.blocks()]), store.vectors(range(8)))
    hashes = np.concatenate([store.unit(number).entries().content for number in range(3)])
    assert [row.tobytes() for row in hashes] == [hashlib.sha256(one.images[0].content).digest() for one in samples]
    assert store.find({("key-005", 0), ("key-005", 1), ("none", 0)}) == {("key-005", 0): 5}
    assert (store.index.kind, store.index.width, store.index.student) == ("image", 24, student.fingerprint)


def test_pictures_of_a_folder_go_by_their_paths(student, album, tmp_path):
    report = embed(student, Images(FolderPictures(album)), tmp_path / "out", batch_size=3, unit_rows=ROWS)
    store = EmbeddingStore(tmp_path / "out")
    keys = ["0.PNG", "2.PNG", "4.PNG", "6.PNG", "deep/1.PNG", "deep/3.PNG", "deep/5.PNG", "deep/7.PNG"]
    assert [key for key, _, _ in rows_of(store)] == keys
    expected = student.encode_images([album / key for key in keys]).numpy()
    np.testing.assert_allclose(store.vectors(range(8)), expected, atol=1e-6)
    assert (report.rows, report.units, report.units_kept) == (8, 3, 0)


def test_each_picture_stands_in_both_slots_of_a_student_of_two(album, tmp_path):
    pair = Student.from_pretrained(save_student(tmp_path / "run", PAIRS))
    embed(pair, Images(open_pictures(str(album), 2)), tmp_path / "out", batch_size=5)
    store = EmbeddingStore(tmp_path / "out")
    assert [slot for _, slot, _ in rows_of(store)] == [0, 1] * 8
    keys = [album / key for key, slot, _ in rows_of(store) if slot == 0]
    for slot in (0, 1):
        expected = pair.encode_images(keys, slot=slot).numpy()
        np.testing.assert_allclose(store.vectors(range(slot, 16, 2)), expected, atol=1e-6)
    make_shards(tmp_path / "two", [Sample("a", make_samples(1)[0].images * 2, make_samples(1)[0].texts)])
    embed(pair, Images(open_pictures(str(tmp_path / "two"), 2)), tmp_path / "out2")
    assert rows_of(EmbeddingStore(tmp_path / "out2")) == [("a", 0, ""), ("a", 1, "")]


def test_texts_of_lines_and_shards(student, shards, tmp_path):
    lines = tmp_path / "texts.jsonl"
    lines.write_text('\ufeff{"text": "blue ?"}\n\n{"key": "k", "texts": [{"text": "a red"}, {"text": "grün"}]}\n')
    report = embed(student, Texts(read_questions(lines), "texts"), tmp_path / "out", unit_rows=2)
    store = EmbeddingStore(tmp_path / "out")
    assert rows_of(store) == [("line-0000001", 0, "blue ?"), ("k", 0, "a red"), ("k", 1, "grün")]
    expected = student.encode_texts(["blue ?", "a red", "grün"]).numpy()
    np.testing.assert_allclose(store.vectors(range(3)), expected, atol=1e-6)
    assert report.texts_cut == 0
    long = Question("long", 0, "red " * 40, ())
    assert embed(student, Texts([long], "long"), tmp_path / "long").texts_cut == 1
    embed(student, Texts(read_questions(shards), "shards"), tmp_path / "shards")
    found = [(sample.key, slot, text.text) for shard in open_shards(shards) for sample in shard
             for slot, text in enumerate(sample.texts)]  # fmt: skip
    assert rows_of(EmbeddingStore(tmp_path / "shards")) == found


def test_any_zarr_tool_reads_a_unit(whole):
    group = zarr.open_group(zarr.storage.ZipStore(whole / "units" / "000001.zarr.zip", mode="r"), mode="r")
    assert np.array_equal(group["vectors"][:], EmbeddingStore(whole).vectors([3, 4, 5]))
    assert group["slot"][:].tolist() == [0, 0, 0]
    assert group.attrs["student"] == read_index(whole).student


def test_a_killed_call_is_continued_and_gives_the_same_bytes(run, student, tmp_path):
    """With the command line: the second unit is written, and never gets its name."""
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": f"blue {number}"}) + "\n" for number in range(2100)))
    out = tmp_path / "out"
    child = Child("embed", run, "--texts", lines, "--out", out, folder=tmp_path, before=killed_in("replace", 2, ".zip"))
    assert child.wait() == -signal.SIGKILL
    assert [path.name for path in (out / "units").glob("*.zip")] == ["000000.zarr.zip"]
    assert list((out / "units").glob(".*.partial"))
    with pytest.raises(CacheError, match=r"it has no store\.json: it was cut short"):
        EmbeddingStore(out)
    kept = (out / "units" / "000000.zarr.zip").stat().st_mtime_ns
    texts = Texts(read_questions(lines), "texts.jsonl")
    assert embed(student, texts, out).units_kept == 1
    assert (out / "units" / "000000.zarr.zip").stat().st_mtime_ns == kept
    embed(student, texts, tmp_path / "other")
    assert tree(out) == tree(tmp_path / "other")


def test_the_same_call_again_changes_nothing(student, shards, whole):
    before = tree(whole)
    assert embed(student, Images(open_pictures(shards)), whole, unit_rows=ROWS).units_kept == 3
    assert tree(whole) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_student_is_refused(whole, shards, tmp_path, finished):
    out = copy_of(whole, tmp_path / "out")
    if not finished:
        (out / "store.json").unlink()
        (out / "units" / "000001.zarr.zip").unlink()
    before = tree(out)
    other = Student.from_pretrained(save_student(tmp_path / "other", ANSWERS, seed=1))
    with pytest.raises(CacheError, match="begun with another student"):
        embed(other, Images(open_pictures(shards)), out, unit_rows=ROWS)
    assert tree(out) == before
    if finished:
        with pytest.raises(CacheError, match="expected vectors of the student in"):
            EmbeddingStore(out).check_student(other.fingerprint, other.name)


def test_other_inputs_than_those_of_the_store_are_refused(student, album, whole, shards, tmp_path):
    def again(out=tmp_path / "out", rows=ROWS):
        return embed(student, Images(FolderPictures(album)), out, unit_rows=rows)

    again()
    (album / "0.PNG").rename(album / "1.PNG")
    with pytest.raises(CacheError, match=r"0.PNG: no longer there\n  - 1.PNG: new"):
        again()
    (album / "1.PNG").rename(album / "0.PNG")
    (album / "2.PNG").write_bytes((album / "4.PNG").read_bytes())
    with pytest.raises(CacheError, match=r"2.PNG: changed since"):
        again()
    for name in ("6.PNG", "deep/1.PNG", "deep/3.PNG"):
        (album / name).unlink()
    with pytest.raises(CacheError, match="holds more than the 5 rows"):
        again()
    with pytest.raises(CacheError, match="holds vectors of images"):
        embed(student, Texts(read_questions(shards), "shards"), tmp_path / "out", unit_rows=ROWS)
    with pytest.raises(InputError, match="expected a new or empty folder, or a store"):
        again(album)


def test_bad_pictures_are_all_listed_and_the_store_is_not_whole(student, album, tmp_path):
    good = (album / "0.PNG").read_bytes()
    for name in ("0.PNG", "deep/5.PNG"):
        (album / name).write_bytes(good[:70])
    (album / "sick.jpg").symlink_to(album / "nowhere.jpg")
    (album / "wide.png").write_bytes(make_samples(1, sizes=((36, 35),))[0].images[0].content)
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        embed(student, Images(FolderPictures(album)), out, unit_rows=ROWS)
    message = str(caught.value)
    assert message.startswith("4 of 10 pictures cannot be used")
    assert all(name in message for name in ("0.PNG", "deep/5.PNG", "sick.jpg", "wide.png"))
    with pytest.raises(CacheError, match="expected a store of embeddings"):
        EmbeddingStore(out)
    report = embed(student, Images(FolderPictures(album)), out, unit_rows=ROWS, skip_bad=True)
    assert (report.rows, report.left_out) == (6, 4)
    assert [key for key, _, _ in rows_of(EmbeddingStore(out))] == [
        "2.PNG", "4.PNG", "6.PNG", "deep/1.PNG", "deep/3.PNG", "deep/7.PNG"
    ]  # fmt: skip
    with pytest.raises(InputError, match="left out by an earlier call with --skip-bad"):
        embed(student, Images(FolderPictures(album)), out, unit_rows=ROWS)
    (album / "sick.jpg").unlink()
    for name in ("0.PNG", "deep/5.PNG"):
        (album / name).write_bytes(good)
    (album / "wide.png").unlink()
    embed(student, Images(FolderPictures(album)), tmp_path / "new", unit_rows=ROWS)
    assert len(EmbeddingStore(tmp_path / "new")) == 8


def test_nothing_to_encode_is_refused(student, album, tmp_path):
    for path in album.rglob("*.PNG"):
        path.write_bytes(b"torn")
    with pytest.raises(InputError, match="got 8 that cannot"):
        embed(student, Images(FolderPictures(album)), tmp_path / "out", skip_bad=True)
    with pytest.raises(InputError, match=r"expected pictures .* or shards, found none"):
        open_pictures(str(tmp_path / "out"))
    with pytest.raises(InputError, match="come again"):
        Texts([Question("k", 0, "a", ()), Question("k", 0, "b", ())], "texts")
    (album / "000000.tar").write_bytes(b"")
    with pytest.raises(InputError, match="got one with both"):
        open_pictures(str(album))


# --- damage


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(whole, tmp_path_factory, place, bit):
    out = copy_of(whole, tmp_path_factory.mktemp("flipped") / "out")
    path = out / ("store.json" if place < 0.1 else "units/000001.zarr.zip")
    content = bytearray(path.read_bytes())
    content[int(place * 10 % 1 * len(content)) if place < 0.1 else int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CacheError):
        EmbeddingStore(out).vectors(range(8))


def test_a_missing_or_cut_unit_is_named(whole, tmp_path):
    out = copy_of(whole, tmp_path / "out")
    path = out / "units" / "000002.zarr.zip"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CacheError, match=r"000002.zarr.zip: expected .* bytes with SHA-256"):
        EmbeddingStore(out).find({("x", 0)})
    path.unlink()
    with pytest.raises(CacheError, match=r"000002.zarr.zip: this unit of the store is missing"):
        EmbeddingStore(out).find({("x", 0)})


def test_a_damaged_unit_of_an_unfinished_store_is_not_sealed(student, shards, whole, tmp_path):
    out = copy_of(whole, tmp_path / "out")
    (out / "store.json").unlink()
    path = out / "units" / "000000.zarr.zip"
    content = bytearray(path.read_bytes())
    place = content.index(b"vectors/c/0/0") + len("vectors/c/0/0") + 20
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheError, match="is damaged"):
        embed(student, Images(open_pictures(shards)), out, unit_rows=ROWS)
    assert not (out / "store.json").exists()


def hostile(path, **changes):
    entries = Entries(["a", "b"], [0, 0], np.zeros((2, 32), np.uint8))
    vectors = np.ones((2, 4), np.float32)
    attributes = {"format_version": 1, "kind": "image", "student": "0" * 64, "width": 4, "left_out": 0}
    write_rows(path, changes.get("entries", entries), changes.get("vectors", vectors),
               EmbeddingAttributes(**(attributes | changes.get("attributes", {}))))  # fmt: skip
    rows = StoredRows(path)
    try:
        rows.entries()
        rows.vectors()
    finally:
        rows.close()


def test_what_a_unit_claims_is_checked(tmp_path):
    hostile(tmp_path / "good.zarr.zip")
    short = Entries(["a"], [0, 0], np.zeros((2, 32), np.uint8))
    for changes in (
        {"attributes": {"width": 5}},
        {"attributes": {"kind": "text"}},
        {"vectors": np.full((2, 4), np.nan, np.float32)},
        {"entries": short},
        {"entries": Entries(["a", "b"], [0, 0, 0], np.zeros((2, 32), np.uint8))},
        {"entries": Entries(["a", "b"], [0, 0], np.zeros((2, 31), np.uint8))},
    ):
        with pytest.raises(CacheError, match="is damaged"):
            hostile(tmp_path / "bad.zarr.zip", **changes)
