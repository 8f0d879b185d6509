"""Targets reach the pair that they were made for, or training is refused."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXT_LENGTH, picture, vilt_processor
from pipeline import all_pairs, make_cache, make_samples, make_shards, png, whole_batch
from transformers import BertTokenizer, ViltProcessor

from dde_cache.codec import dense_rows, from_parts, part_names
from dde_cache.errors import CacheError
from dde_cache.files import hash_file
from dde_cache.join import join
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Text, open_shards
from dde_cache.spec import Manifest
from dde_cache.store import Cache
from dde_cache.targets import CacheTargets, teacher_logits


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def exact(shards, teacher_folder, tmp_path_factory):
    return make_cache(
        shards, teacher_folder, tmp_path_factory.mktemp("exact") / "cache", k=None, weights="float32", layers=(1, 2)
    )


def dense(batch, direction, keys):
    steps = None if f"{direction}.index" in batch else 254
    return dense_rows(from_parts({part: batch[f"{direction}.{part}"] for part in part_names(steps)}, steps), keys)


def dense_by_pair(teacher, shards, pair, layer):
    """The oracle: the teacher alone with one pair."""
    sample = shards[pair.shard].read(pair.key)
    pixels = teacher.preprocessor.stack([teacher.preprocessor.pixels(sample.images[0].decode())])
    tokens = teacher.preprocessor.tokens([sample.texts[pair.text].text])
    output = teacher(tokens, [pixels], [layer])
    return tokens, pixels, output.attention[0, layer], output.logits


def assert_right_targets(teacher, shards, cache, pairs, layer):
    batch = CacheTargets(cache, shards, layer).targets(pairs)
    for row, pair in enumerate(pairs):
        tokens, pixels, maps, logits = dense_by_pair(teacher, shards, pair, layer)
        words, patches = tokens.ids.shape[1], maps.i2t.shape[2]
        torch.testing.assert_close(batch["logits"][row], logits[0], atol=1e-5, rtol=0)
        assert batch["token_ids"][row, :words].tolist() == tokens.ids[0].tolist()
        assert (batch["token_ids"][row, words:] == 0).all()
        assert batch["grid"][row].tolist() == pixels.grid[0].tolist()
        for direction, expected, queries in (("t2i", maps.t2i, words), ("i2t", maps.i2t, patches)):
            found = dense({name: value[row : row + 1] for name, value in batch.items()}, direction, expected.shape[-1])
            torch.testing.assert_close(found[:, :, :queries], expected, atol=1e-5, rtol=0)
            assert (found[:, :, queries:] == 0).all(), "rows of padding hold nothing"


@pytest.mark.parametrize("layer", [1, 2])
def test_every_pair_gets_its_own_targets(teacher, shards, exact, layer):
    assert_right_targets(teacher, shards, exact, all_pairs(shards), layer)


def test_order_does_not_matter(teacher, shards, exact, tmp_path):
    """Shards in another order, samples in another order inside them, pairs in random order."""
    for shard in shards:
        samples = list(shard)[::-1]
        make_shards(tmp_path / "one", samples, size=len(samples))
        (tmp_path / "mixed").mkdir(exist_ok=True)
        (tmp_path / "one" / "000000.tar").rename(tmp_path / "mixed" / shard.name)
    mixed = open_shards(tmp_path / "mixed")[::-1]
    assert [shard.keys for shard in mixed] != [shard.keys for shard in shards]
    found = join(mixed, exact, "error")
    assert len(found.table) == len(all_pairs(shards))
    pairs = [found.table[int(number)] for number in np.random.default_rng(0).permutation(len(found.table))]
    assert {(pair.key, pair.text) for pair in pairs} == {(pair.key, pair.text) for pair in all_pairs(shards)}
    assert_right_targets(teacher, mixed, exact, pairs, 2)


def test_a_reader_survives_the_trip_to_a_worker(shards, exact):
    reader = CacheTargets(exact, shards, 2)
    pairs = all_pairs(shards)
    before = reader.targets(pairs)
    after = pickle.loads(pickle.dumps(reader)).targets(pairs)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_logits_of_the_teacher_by_key(teacher, shards, exact):
    found = teacher_logits(exact, shards)
    for pair in all_pairs(shards):
        expected = dense_by_pair(teacher, shards, pair, 2)[3][0]
        torch.testing.assert_close(found[pair.key, pair.text], expected, atol=1e-5, rtol=0)


# --- what does not belong together


def rewritten(tmp_path, change):
    """The shards of the fixtures after `change` was applied to the samples."""
    return make_shards(tmp_path / "changed", change(make_samples()))


@pytest.mark.parametrize("what", ["picture", "text", "texts swapped"])
def test_changed_content_is_refused(shards, exact, tmp_path, what):
    def change(samples):
        one = samples[4]
        if what == "picture":
            samples[4] = replace(one, images=(png(picture(36, 36, 77)),))
        elif what == "text":
            samples[4] = replace(one, texts=(Text(text="a blue square"), *one.texts[1:]))
        else:
            samples[4] = replace(one, texts=one.texts[::-1])
        return samples

    other = rewritten(tmp_path, change)
    reader = CacheTargets(exact, other, 2)
    with pytest.raises(CacheError, match=r"(?s)key-004.*not those that the teacher saw.*000001\.zarr\.zip"):
        whole_batch(other, exact.preprocessor(), exact.labels, reader)
    with pytest.raises(CacheError, match="key-004"):
        teacher_logits(exact, other)


def test_a_changed_label_is_no_other_content(exact, tmp_path):
    def change(samples):
        return [
            replace(one, texts=tuple(text.model_copy(update={"label": "no"}) for text in one.texts)) for one in samples
        ]

    other = rewritten(tmp_path, change)
    whole_batch(other, exact.preprocessor(), exact.labels, CacheTargets(exact, other, 2))


def test_another_tokenizer_is_refused(shards, exact):
    words = exact.preprocessor().processor.tokenizer.get_vocab()
    order = sorted(words, key=words.__getitem__)
    order[5:] = order[:4:-1]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(order)}, model_max_length=TEXT_LENGTH)
    other = Preprocessor(ViltProcessor(vilt_processor().image_processor, tokenizer), 12, TEXT_LENGTH)
    with pytest.raises(CacheError, match=r"(?s)the teacher saw tokens \[2, .*tokenizer or image processor"):
        whole_batch(shards, other, exact.labels, CacheTargets(exact, shards, 2))


def test_another_image_processor_is_refused(shards, exact):
    processor = vilt_processor(do_resize=True, size={"shortest_edge": 24})
    other = Preprocessor(processor, 12, TEXT_LENGTH)
    with pytest.raises(CacheError, match=r"(?s)the teacher saw patch grid \[3, 3\], here.*\[2, 2\]"):
        whole_batch(shards, other, exact.labels, CacheTargets(exact, shards, 2), pairs=[0])


def test_another_text_length_is_refused(shards, exact):
    with pytest.raises(CacheError, match="the teacher saw tokens"):
        whole_batch(shards, Preprocessor(vilt_processor(), 12, 5), exact.labels, CacheTargets(exact, shards, 2))


# --- what is on one side only


def fewer_shards(tmp_path, keep):
    return rewritten(tmp_path, lambda samples: [one for number, one in enumerate(samples) if number in keep])


def test_samples_without_targets(shards, exact, tmp_path):
    extra = make_shards(tmp_path / "more", make_samples(11), size=3)  # 000002 has one more, 000003 is new
    with pytest.raises(CacheError) as caught:
        join(extra, exact, "error")
    for expected in ("without targets (2)", "key-008 in shard 000002.tar", "every key of shard 000003.tar", "skip"):
        assert expected in str(caught.value)
    found = join(extra, exact, "skip")
    keys = {found.table[number].key for number in range(len(found.table))}
    assert keys == {f"key-{number:03d}" for number in range(8)}
    assert len(found.without_targets) == 2


def test_targets_without_samples(shards, exact, tmp_path):
    fewer = make_shards(tmp_path / "fewer", make_samples(5), size=3)
    with pytest.raises(CacheError) as caught:
        join(fewer, exact, "error")
    for expected in ("targets without samples (2)", "key-005 in unit 000001.zarr.zip", "every key of unit 000002"):
        assert expected in str(caught.value)
    found = join(fewer, exact, "skip")
    assert len(found.table) == len(all_pairs(fewer))
    CacheTargets(exact, fewer, 2).targets([found.table[number] for number in range(len(found.table))])


def test_shards_of_another_data_set(exact, tmp_path):
    samples = [replace(one, key=f"other-{one.key}") for one in make_samples()]
    other = make_shards(tmp_path / "other", samples)
    for policy in ("error", "skip"):
        with pytest.raises(CacheError, match="no key is on both sides: the cache was made from another data set"):
            join(other, exact, policy)


def copy_cache(cache, target):
    for path in cache.folder.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(cache.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return target


def test_a_missing_unit(shards, exact, tmp_path):
    folder = copy_cache(exact, tmp_path / "cache")
    (folder / "units" / "000001.zarr.zip").unlink()
    for policy in ("error", "skip"):
        with pytest.raises(CacheError, match=r"unit 000001\.zarr\.zip \(shard 000001\.tar\): missing"):
            join(shards, Cache(folder), policy)


def test_positions_outside_the_key_axis_are_refused(shards, exact, tmp_path):
    """A unit that is whole, hashed and wrong: its positions must not reach a gather."""
    from test_unit import rewrite

    folder = copy_cache(exact, tmp_path / "cache")
    unit = folder / "units" / "000000.zarr.zip"

    def far(name, values):
        if name == "maps/t2i/index":
            values = values.copy()
            values[0, 0, 0, 0] = 200
        return values

    rewrite(unit, far)
    path = folder / "manifest.json"
    manifest = Manifest.model_validate(json.loads(path.read_text()))
    entries = [
        entry.model_copy(update={"sha256": hash_file(unit), "size": unit.stat().st_size})
        if entry.name == unit.name
        else entry
        for entry in manifest.units
    ]
    path.write_text(manifest.model_copy(update={"units": tuple(entries)}).sealed().model_dump_json())
    with pytest.raises(CacheError, match=r"000000\.zarr\.zip: maps/t2i is damaged \(expected key positions inside"):
        CacheTargets(Cache(folder), shards, 2).targets(all_pairs(shards))
