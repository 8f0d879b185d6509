import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dde_cache.errors import InputError
from dde_cache.samples import (
    EncodedImage,
    Sample,
    Shard,
    Text,
    check_key,
    open_shards,
    read_index,
    shard_paths,
)
from dde_cache.tars import list_members
from dde_cache.write_shards import write_shards


def png(colour=(200, 10, 10), size=(4, 3), **saved):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "png", **saved)
    return EncodedImage(buffer.getvalue(), "png")


def sample(key="a", text="is it red", label="yes", images=None, **meta):
    return Sample(key, images or (png(),), (Text(text=text, label=label),), meta)


def write(folder, samples, shard_size=2):
    return write_shards(
        iter(samples), folder, source="test", split="train", shard_size=shard_size, arguments={"seed": 0}
    )


words = st.text(min_size=1, max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
metas = st.dictionaries(words, json_values, max_size=3)
texts = st.builds(Text, text=words, label=st.none() | words, kind=st.none() | words, meta=metas)
images = st.builds(EncodedImage, st.binary(max_size=600), st.sampled_from(["png", "jpg", "jpeg", "webp"]))
keys = st.text(min_size=1, max_size=120).filter(lambda key: check_key(key) is None)
samples = st.builds(
    Sample,
    keys,
    st.lists(images, min_size=1, max_size=2).map(tuple),
    st.lists(texts, min_size=1, max_size=3).map(tuple),
    metas,
)


@given(st.lists(samples, min_size=1, max_size=5, unique_by=lambda one: one.key), st.integers(1, 3))
def test_what_is_written_is_read_back(tmp_path_factory, written, shard_size):
    folder = tmp_path_factory.mktemp("shards")
    index = write(folder, written, shard_size)
    assert [entry.samples for entry in index.shards][:-1] == [shard_size] * (len(index.shards) - 1)
    assert sum(entry.pairs for entry in index.shards) == sum(len(one.texts) for one in written)
    shards = open_shards(folder)
    assert [one for shard in shards for one in shard] == written
    assert [key for shard in shards for key in shard.keys] == [one.key for one in written]
    assert read_index(folder) == index


def test_webdataset_itself_reads_the_shards(tmp_path):
    long = "folder/" + "k" * 150
    write(tmp_path, [sample("a"), sample(long, images=(png(), png((0, 0, 9))))])
    rows = list(webdataset.WebDataset(str(tmp_path / "000000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in rows] == ["a", long]
    assert set(rows[1]) >= {"image0.png", "image1.png", "json"}
    assert json.loads(rows[0]["json"])["texts"] == [{"text": "is it red", "label": "yes"}]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_listed_as_tarfile_lists_them(tmp_path, format_):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format_) as tar:
        for name, size in (("a.json", 0), ("b.png", 512), ("f" * 90 + "/" + "c" * 90, 7), ("d.png", 1025)):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            if name == "d.png":
                tar.addfile(folder)
    with tarfile.open(path) as tar:
        assert list_members(path) == [(one.name, one.offset_data, one.size) for one in tar if one.isfile()]
    whole = path.read_bytes()
    for length in (0, 100, 512 + 100, 2 * 512, len(whole.rstrip(b"\0")) - 200):
        path.write_bytes(whole[:length])
        with pytest.raises(tarfile.TarError):
            list_members(path)


def test_same_samples_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, [sample("a"), sample("b"), sample("c")])
    members = list_members(tmp_path / "one" / "000001.tar")
    assert [offset for _, offset, _ in members] == [512, 512 * 3]  # one header a member
    for file in ("000000.tar", "000001.tar", "shards.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_content_hash_is_of_what_a_teacher_sees():
    first = sample()
    same = [sample(label="no"), sample(key="b"), sample(seen=True)]
    others = [
        sample(text="is it blue"),
        sample(images=(png((0, 0, 9)),)),
        sample(images=(png(), png())),
        Sample("a", first.images, first.texts * 2),
    ]
    assert {one.content_hash() for one in same} == {first.content_hash()}
    assert len({one.content_hash() for one in [first, *others]}) == 5


def test_members_hash_tells_other_data_wherever_it_lies(tmp_path):
    def hashed(name, *some):
        write(tmp_path / name, some)
        return open_shards(tmp_path / name)[0].members_hash()

    one = hashed("one", sample("a"), sample("b"))
    assert hashed("two", sample("a"), sample("b")) == one
    others = [
        hashed("key", sample("a"), sample("c")),
        hashed("text", sample("a"), sample("b", text="is it blue")),
        hashed("picture", sample("a"), sample("b", images=(png(size=(40, 30)),))),
        hashed("images", sample("a", images=(png(), png())), sample("b")),
        hashed("less", sample("a")),
    ]
    assert len({one, *others}) == 6


@pytest.mark.parametrize(
    "key", ["", "a.b", "a b", "a\\b", "/a", "a/", "a//b", "..", "a\0", "a\n", "\ud800", "é" * 101, "a\u202eb"]
)
def test_keys_that_a_tar_would_garble_are_refused(key):
    assert check_key(key) is not None


@pytest.mark.parametrize("key", ["a", "a/b", "é", "7-b_C:x", "k" * 200])
def test_other_keys_are_fine(key):
    assert check_key(key) is None


def test_pixels_are_turned_flattened_and_scaled():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert png(size=(4, 3), exif=exif).decode().size == (3, 4)
    for mode, pixel, expected in (("RGBA", (9, 9, 9, 0), 255), ("LA", (0, 0), 255), ("I;16", 128 << 8, 128)):
        buffer = io.BytesIO()
        if mode == "I;16":
            Image.fromarray(np.full((2, 2), pixel, np.uint16)).save(buffer, "png")
        else:
            Image.new(mode, (2, 2), pixel).save(buffer, "png")
        assert EncodedImage.parse(buffer.getvalue()).decode().getpixel((0, 0)) == (expected,) * 3


def test_an_image_is_known_by_its_bytes():
    for format_, extension in (("png", "png"), ("jpeg", "jpg"), ("webp", "webp")):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, format_)
        assert EncodedImage.parse(buffer.getvalue()).format == extension
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "gif")
    noise = Image.effect_noise((64, 64), 90)
    whole = io.BytesIO()
    noise.save(whole, "png")
    for content, words_ in ((buffer.getvalue(), "GIF"), (b"", "0 bytes"), (whole.getvalue()[:2000], "2000 bytes")):
        with pytest.raises(InputError, match=words_):
            EncodedImage.parse(content)


def tar_of(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("members", "words_"),
    [
        ({"a__json": b'{"texts": [{"text": "t"}]}'}, "expected an image as a.image0.png"),
        ({"a__image0__png": b"x"}, "expected texts in one a.json, found 0"),
        ({"a__image0__png": b"x", "a__json": b'{"texts": []}'}, "breaks the schema at texts"),
        ({"a__image0__png": b"x", "a__json": b"{"}, "breaks the schema"),
        ({"a__image0__png": b"x", "a__json": b'{"texts": [{"text": "t", "colour": 1}]}'}, "texts.0.colour"),
        ({"a__image0__png": b"x", "a__image0__jpg": b"x", "a__json": b"{}"}, "expected one image0, found two"),
    ],
)
def test_tars_that_break_the_schema_are_named(tmp_path, members, words_):
    shard = Shard(tar_of(tmp_path / "x.tar", **members))
    with pytest.raises(InputError, match=words_) as error:
        shard.read("a")
    assert "x.tar" in str(error.value)


def test_a_shard_has_no_such_key(tmp_path):
    write(tmp_path, [sample("a")])
    with pytest.raises(InputError, match="no such key"):
        Shard(tmp_path / "000000.tar").read("b")


def test_shards_that_are_damaged_or_not_there(tmp_path):
    with pytest.raises(InputError, match="data import"):
        shard_paths(tmp_path)
    with pytest.raises(InputError, match="do not exist"):
        shard_paths(tmp_path / "x-{000..002}.tar")
    write(tmp_path, [sample("a"), sample("b"), sample("c")])
    assert [path.name for path in shard_paths(f"{tmp_path}/{{000000..000001}}.tar")] == ["000000.tar", "000001.tar"]
    whole = (tmp_path / "000000.tar").read_bytes()
    (tmp_path / "000000.tar").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(InputError, match=r"000000\.tar"):
        [shard.read(key) for shard in open_shards(tmp_path) for key in shard.keys]
    (tmp_path / "000000.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(InputError, match="cannot be read"):
        open_shards(tmp_path)
    tar_of(tmp_path / "000000.tar", a__json=b"{}")
    with pytest.raises(InputError, match="1 samples, expected 2"):
        open_shards(tmp_path)
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(InputError, match="not an index"):
        open_shards(tmp_path)
    (tmp_path / "shards.json").unlink()
    (tmp_path / "000009.tar.partial").touch()
    with pytest.raises(InputError, match="cut short"):
        open_shards(tmp_path)


def test_a_key_in_two_tars_is_refused(tmp_path):
    for name in ("x-1", "x-2"):
        write(tmp_path / name, [sample("a")])
    with pytest.raises(InputError, match="1 occur twice"):
        open_shards(f"{tmp_path}/x-{{1..2}}/000000.tar")
