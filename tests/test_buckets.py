"""No forward pass is spent on padding beyond a bucket, and the order of the batches does not show in a unit."""

import io

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image
from pipeline import make_cache, png

from dde_cache.batches import PairDataset, pictures_of, tokens_of
from dde_cache.buckets import IMAGE_BUCKET, TEXT_BUCKET, UnitWork, bucketed
from dde_cache.identity import ExtractConfig, target_spec
from dde_cache.images import EncodedImage
from dde_cache.records import extraction_dataset
from dde_cache.samples import Sample, Text, open_shards
from dde_cache.stream import PairTable
from dde_cache.targets import CacheTargets, decoded
from dde_cache.teacher import FusionTeacher
from dde_cache.write_shards import write_shards

SIZES = ((24, 24), (36, 36), (12, 24), (60, 60))
WORDS = ["is", "a", "red", "square", "above", "the", "blue", "circle", "in", "top", "row"]


def mixed(count=24):
    """Pictures of four sizes, three texts each, of 1 to 12 words: neighbours differ in both."""
    generator = np.random.default_rng(0)
    for number in range(count):
        texts = (" ".join(generator.choice(WORDS, generator.integers(1, 13))) for _ in range(3))
        image = png(picture(*SIZES[number % len(SIZES)], seed=number))
        yield Sample(f"s{number:02d}", (image,), tuple(Text(text=text, label="yes") for text in texts))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(mixed(), folder, source="test", split="train", shard_size=16, arguments={})
    return open_shards(folder)


@given(
    tokens=arrays.arrays(np.int64, st.tuples(st.integers(1, 60), st.just(2)), elements=st.integers(1, 50)),
    batch_size=st.integers(1, 7),
)
def test_every_row_comes_once_in_batches_of_one_bucket(tokens, batch_size):
    batches = list(bucketed(tokens, [8, 16], batch_size))
    assert sorted(row for batch in batches for row in batch) == list(range(len(tokens)))
    buckets = [{(-(-a // 8), -(-b // 16)) for a, b in tokens[batch].tolist()} for batch in batches]
    assert all(len(found) == 1 for found in buckets)
    unfilled = [found.pop() for found, batch in zip(buckets, batches, strict=True) if len(batch) < batch_size]
    assert len(unfilled) == len(set(unfilled)), "one batch a bucket is not full, at most"
    assert all(len(batch) <= batch_size and batch == sorted(batch) for batch in batches)


@pytest.mark.parametrize("queries", ["valid", "all"])
def test_a_batch_is_never_padded_beyond_its_bucket(shards, teacher_folder, queries):
    teacher = FusionTeacher.load(str(teacher_folder))
    spec = target_spec(teacher, ExtractConfig(queries=queries))
    table = PairTable.of(shards)
    dataset = extraction_dataset(shards, table, teacher.preprocessor, spec)
    longest = 0
    for number, shard in enumerate(shards):
        first = table.numbers(number).start
        for batch in UnitWork.of(shard, teacher.preprocessor, spec, 8).batches:
            read = dataset.__getitems__([first + row for row in batch])
            text, image = read["attention_mask"], read["grid0"].prod(-1) + 1
            padding = text.shape[1] - text.sum(-1)
            assert image.max() - image.min() < IMAGE_BUCKET
            if queries == "valid":
                assert padding.max() < TEXT_BUCKET
            longest = max(longest, int(padding.max()))
    assert longest > 0


def test_a_unit_is_sorted_and_holds_what_the_teacher_gives_each_pair_alone(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", batch_size=5, k=None, weights="float32")
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        places = np.stack([unit.array(f"predictions/{name}") for name in ("sample", "text")], axis=1).tolist()
        assert places == sorted(places)
        unit.close()
    teacher = FusionTeacher.load(str(teacher_folder))
    reader = CacheTargets(cache, shards, teacher.layers - 1)
    dataset = PairDataset(shards, PairTable.of(shards), teacher.preprocessor, ("no", "yes"), reader)
    for number in range(len(dataset)):
        batch = dataset.__getitems__([number])
        output = teacher(tokens_of(batch), pictures_of(batch), [teacher.layers - 1])
        torch.testing.assert_close(batch["target.logits"], output.logits, rtol=1e-5, atol=1e-5)
        maps = output.attention[0, teacher.layers - 1]
        for name, dense in (("t2i", maps.t2i), ("i2t", maps.i2t)):
            held = decoded(batch, name, None)
            found = torch.zeros_like(dense).scatter_add(-1, held.index, held.weight)
            torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_picture_is_known_from_its_header(orientation):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    image = EncodedImage(buffer.getvalue(), "jpg")
    assert image.size() == image.decode().size


def test_the_grid_of_a_size_is_that_of_its_pictures(teacher_folder):
    preprocessor = FusionTeacher.load(str(teacher_folder)).preprocessor
    for width, height in SIZES:
        pixels = preprocessor.pixels(Image.fromarray(np.zeros((height, width, 3), np.uint8)))
        patch = preprocessor.patch_size
        assert preprocessor.grid(width, height) == (pixels.shape[1] // patch, pixels.shape[2] // patch)
    assert torch.tensor(preprocessor.grid(24, 12)).tolist() == [1, 2]
