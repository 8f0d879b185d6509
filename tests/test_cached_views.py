"""Views from extraction to training: the teacher and the student see the same pixels, or training stops."""

import dataclasses
import json
import shutil
import warnings
from importlib.metadata import version

import numpy as np
import pytest
import torch
from conftest import randomise, vilt_config
from pipeline import LABELS, all_pairs, cli, make_cache, make_samples, make_shards, tree
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import ViltForImagesAndTextClassification

from dde_cache import views as views_module
from dde_cache.arrays import UnitArrays
from dde_cache.audit import audit
from dde_cache.batches import PairDataset, batch_loader
from dde_cache.codec import dense_rows, from_parts
from dde_cache.distill import StudentLosses, TrainConfig
from dde_cache.drift import PixelHashes
from dde_cache.errors import CacheError, InputError, PixelDrift, PixelDriftWarning
from dde_cache.extract import ExtractConfig, extract, plan_extraction
from dde_cache.fit import Progress
from dde_cache.images import EncodedImage
from dde_cache.merge import merge
from dde_cache.prepare import labels_only
from dde_cache.presets import lacking_of_preset
from dde_cache.repair import repair
from dde_cache.replay import order_in_views
from dde_cache.sources import CachedTargets, OnlineTargets
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.student import new_student
from dde_cache.subset import Selection, cut_unit, subset
from dde_cache.targets import CacheTargets
from dde_cache.teacher import FusionTeacher
from dde_cache.train import train
from dde_cache.unit import Unit, write_unit
from dde_cache.verify import verify
from dde_cache.views import AS_PROCESSED, COLOURS_KEPT, Operation, ViewRecipe, parse_recipe, pixel_hash, view_of

LAYER = 2
VIEWS = 3
RECIPE = "randaugment-2-9-crop-flip"
EXACT = {"weights": "float32", "k": None, "layers": (1, LAYER), "views": VIEWS, "view": RECIPE}
QUICK = {"steps": 4, "batch_size": 4, "workers": 0, "log_every": 1, "save_every": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def folder(shards, teacher_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "cache"
    make_cache(shards, teacher_folder, out, **EXACT)
    return out


@pytest.fixture
def cache(folder):
    return Cache(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Cache(shutil.copytree(folder, tmp_path / "copy"))


def drawn(teacher, sample, view, recipe=RECIPE, slot=0):
    """The oracle: a view's pixels, without any of the readers."""
    image = parse_recipe(recipe)(sample.images[slot].decode(), sample.key, view, slot)
    return teacher.preprocessor.pixels(image)


def in_views(shards, views=VIEWS):
    return [dataclasses.replace(pair, view=view) for pair in all_pairs(shards) for view in range(views)]


def test_every_view_of_every_pair_has_the_targets_of_its_own_pixels(teacher, shards, cache):
    pairs = in_views(shards)
    batch = CacheTargets(cache, shards, LAYER).targets(pairs)
    seen = set()
    for row, pair in enumerate(pairs):
        sample = shards[pair.shard].read(pair.key)
        pixels = teacher.preprocessor.stack([drawn(teacher, sample, pair.view)])
        tokens = teacher.preprocessor.tokens([sample.texts[pair.text].text])
        output = teacher(tokens, [pixels], [LAYER])
        torch.testing.assert_close(batch["logits"][row], output.logits[0], atol=1e-5, rtol=0)
        seen.add(tuple(batch["logits"][row].tolist()))
        assert batch["grid"][row].tolist() == pixels.grid[0].tolist()
        for direction in ("t2i", "i2t"):
            expected = getattr(output.attention[0, LAYER], direction)
            parts = {part: batch[f"{direction}.{part}"][row : row + 1] for part in ("index", "weight", "tail")}
            found = dense_rows(from_parts(parts, None), expected.shape[-1])
            torch.testing.assert_close(found[:, :, : expected.shape[2]], expected, atol=1e-5, rtol=0)
    assert len(seen) > len(pairs) * 0.9, "views differ, or this test shows nothing"


def test_records_and_hashes_lie_as_the_format_says(teacher, shards, cache):
    pairs = len(all_pairs(shards))
    assert sum(entry.pairs for entry in cache.manifest.units) == pairs
    assert cache.spec.view == "randaugment-2-9 v1, colours kept, sides free, cropped"
    assert cache.spec.groups == {"views": {"hash": "sha256-8 of 8-bit levels v1"}}
    for entry, shard in zip(cache.manifest.units, shards, strict=True):
        unit = cache.unit(entry)
        maps = unit.maps
        found = list(zip(maps.sample, maps.text, maps.view, maps.layer, strict=True))
        samples = list(shard)
        assert found == [
            (number, text, view, layer)
            for number, sample in enumerate(samples)
            for text in range(len(sample.texts))
            for view in range(VIEWS)
            for layer in (1, LAYER)
        ]
        predictions = [unit.array(f"predictions/{name}").tolist() for name in ("sample", "text", "view")]
        assert list(zip(*predictions, strict=True)) == [place[:3] for place in found[::2]]
        assert unit.attributes.groups["views"].required is False
        rows = zip(*(unit.array(f"views/{name}").tolist() for name in ("sample", "image", "view")), strict=True)
        hashes = dict(zip(rows, unit.array("views/pixels"), strict=True))
        assert list(hashes) == [(number, 0, view) for number in range(len(samples)) for view in range(VIEWS)]
        for (number, _, view), stored in hashes.items():
            pixels = drawn(teacher, samples[number], view)
            levels = np.rint((pixels * 0.5 + 0.5) * 255).astype(np.uint8)
            assert stored.tobytes() == pixel_hash(levels)
        unit.close()


def test_one_plain_view_is_what_it_always_was(shards, teacher_folder, tmp_path):
    plain = make_cache(shards[:1], teacher_folder, tmp_path / "plain")
    assert (plain.spec.view, plain.spec.views, plain.spec.groups) == (AS_PROCESSED, 1, {})
    unit = plain.unit(plain.manifest.units[0])
    assert set(unit.attributes.groups) == {"samples", "maps", "predictions"}
    unit.close()


def test_both_pictures_of_a_sample_are_drawn_and_hashed(save_teacher, tmp_path):
    teacher_folder = save_teacher(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3)
    samples = [
        dataclasses.replace(one, images=(one.images[0], other.images[0]))
        for one, other in zip(
            make_samples(3, sizes=((36, 24),)), make_samples(3, seed=9, sizes=((24, 36),)), strict=True
        )
    ]
    shards = make_shards(tmp_path / "two", samples)
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", views=2)
    teacher = FusionTeacher.load(teacher_folder)
    unit = cache.unit(cache.manifest.units[0])
    rows = zip(*(unit.array(f"views/{name}").tolist() for name in ("sample", "image", "view")), strict=True)
    hashes = dict(zip(rows, unit.array("views/pixels"), strict=True))
    assert list(hashes) == [(number, slot, view) for number in range(3) for slot in range(2) for view in range(2)]
    for (number, slot, view), stored in hashes.items():
        levels = teacher.preprocessor.levels(drawn(teacher, samples[number], view, "randaugment-2-9", slot))
        assert stored.tobytes() == pixel_hash(levels)
    logits = unit.array("predictions/logits")
    sample, text, view = (unit.array(f"predictions/{name}").astype(int) for name in ("sample", "text", "view"))
    for row in range(len(logits)):
        one = samples[sample[row]]
        pictures = [
            teacher.preprocessor.stack([drawn(teacher, one, view[row], "randaugment-2-9", slot)]) for slot in range(2)
        ]
        output = teacher(teacher.preprocessor.tokens([one.texts[text[row]].text]), pictures, [LAYER])
        np.testing.assert_allclose(logits[row], output.logits[0].numpy(), atol=1e-5)
    unit.close()
    assert verify(cache.folder, against=shards, teacher=str(teacher_folder), sample=6).sound


# Which view, when.


def trained_pairs(shards, cache, steps, **config):
    """The pairs of each step as training reads them."""
    table = PairTable.of(shards)
    settings = TrainConfig(**QUICK | config)
    expanded = table.in_views(cache.spec.views)
    return [[expanded[number] for number in batch] for batch in order_in_views(table, VIEWS, settings, 0, steps)]


def test_an_epoch_takes_one_view_of_each_sample_and_the_next_another(shards, cache):
    pairs = len(all_pairs(shards))
    epochs = VIEWS
    assert pairs % 5 == 0, "a whole number of batches"
    steps = pairs // 5
    batches = trained_pairs(shards, cache, steps * epochs, batch_size=5, seed=3)
    seen = {}
    for epoch in range(epochs):
        rows = [pair for batch in batches[epoch * steps : (epoch + 1) * steps] for pair in batch]
        assert sorted((pair.shard, pair.key, pair.text) for pair in rows) == sorted(
            (pair.shard, pair.key, pair.text) for pair in all_pairs(shards)
        )
        for pair in rows:
            assert pair.view == view_of(3, epoch, pair.key, VIEWS)
            seen.setdefault((pair.key, pair.text), set()).add(pair.view)
    assert all(views == set(range(VIEWS)) for views in seen.values())
    assert len({pair.view for pair in rows}) > 1, "samples do not go in step"


@pytest.mark.parametrize("workers", [0, 1])
def test_training_reads_the_pixels_and_the_targets_of_one_view(teacher, shards, cache, workers):
    table, settings = PairTable.of(shards), TrainConfig(**QUICK)
    dataset = PairDataset(
        shards, table.in_views(VIEWS), cache.preprocessor(), LABELS, CacheTargets(cache, shards, LAYER),
        recipe=parse_recipe(cache.spec.view),
    )  # fmt: skip
    student = randomise(new_student(vilt_config(), LABELS), seed=5).eval()
    config = TrainConfig(**QUICK)
    order = order_in_views(table, VIEWS, settings, 0, 7)
    for batch, numbers in zip(batch_loader(dataset, order, workers), order, strict=True):
        for row, number in enumerate(numbers):
            pair = table.in_views(VIEWS)[number]
            expected = drawn(teacher, shards[pair.shard].read(pair.key), pair.view)
            height, width = expected.shape[1:]
            np.testing.assert_array_equal(batch["pixels0"][row, :, :height, :width].numpy(), expected)
        cached = StudentLosses(config, CachedTargets(cache), False)(student, batch)
        online = StudentLosses(config, OnlineTargets(teacher, LAYER), False)(student, batch)
        for name in ("t2i", "i2t", "soft", "loss"):
            torch.testing.assert_close(cached[name], online[name], atol=1e-5, rtol=1e-5)


def count_decodes(monkeypatch):
    calls, decode = [], EncodedImage.decode
    monkeypatch.setattr(EncodedImage, "decode", lambda image: calls.append(image) or decode(image))
    return calls


def test_a_picture_is_decoded_once_for_its_texts_and_views(shards, teacher_folder, cache, tmp_path, monkeypatch):
    calls = count_decodes(monkeypatch)
    extract(shards, str(teacher_folder), tmp_path / "cache", ExtractConfig(batch_size=3, views=VIEWS))
    pictures = sum(len(shard) for shard in shards)
    # One look at the first picture before anything runs.
    assert len(calls) == pictures + 1
    calls.clear()
    dataset = PairDataset(
        shards, PairTable.of(shards, VIEWS), cache.preprocessor(), LABELS, recipe=parse_recipe(cache.spec.view)
    )
    for number in range(len(PairTable.of(shards, VIEWS))):
        dataset.__getitems__([number])
    assert len(calls) == pictures


def test_a_run_on_views_trains_and_resumes_as_uninterrupted(shards, cache, tmp_path):
    settings = TrainConfig(**QUICK | {"steps": 8})
    whole = train(shards, CachedTargets(cache), tmp_path / "whole", settings)
    assert whole.cache_fingerprint == cache.manifest.fingerprint
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8

    def stop(number, _record):
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(shards, CachedTargets(cache), tmp_path / "cut", settings, progress=Progress(stop))
    train(shards, CachedTargets(cache), tmp_path / "cut", settings, resume=True)
    again = [json.loads(line)["loss"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert again == losses
    one, two = (tree(tmp_path / name / "model")["model.safetensors"] for name in ("whole", "cut"))
    assert one == two


# Other pixels than the teacher's.


def other_pillow(monkeypatch):
    """One operation that gives another pixel."""

    def altered(operation):
        def apply(image, sign):
            image = operation.apply(image, sign).copy()
            image.putpixel((0, 0), tuple(255 - level for level in image.getpixel((0, 0))))
            return image

        return Operation(operation.name, apply)

    monkeypatch.setattr(views_module, "COLOURS_KEPT", tuple(altered(one) for one in COLOURS_KEPT))


def test_changed_pixels_stop_a_run_before_it_begins(shards, cache, tmp_path, monkeypatch):
    other_pillow(monkeypatch)
    with pytest.raises(PixelDrift) as stopped:
        train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(**QUICK))
    text = str(stopped.value)
    here = f"pillow {version('pillow')}, transformers {version('transformers')}, numpy {version('numpy')}"
    assert text.count(here) == 2
    assert "their builds may decode otherwise" in text
    assert "--allow-pixel-drift" in text
    assert not (tmp_path / "run").exists()


def with_versions(cache, **changes):
    """The same cache, made with other versions."""
    spec = cache.spec
    for entry in cache.manifest.units:
        path = cache.folder / "units" / entry.name
        unit = Unit(path)
        arrays, attributes = cut_unit(unit, unit.keys, spec)
        unit.close()
        provenance = attributes.provenance
        provenance = provenance.model_copy(update={"versions": provenance.versions | changes})
        write_unit(path, arrays, attributes.model_copy(update={"provenance": provenance}))
    (cache.folder / "manifest.json").unlink()
    repair(cache.folder)
    return Cache(cache.folder)


def test_the_versions_of_both_sides_are_named(shards, copy, tmp_path, monkeypatch):
    older = with_versions(copy, pillow="1.2.3", transformers="4.5.6")
    train(shards, CachedTargets(older), tmp_path / "same-pixels", TrainConfig(**QUICK))
    other_pillow(monkeypatch)
    with pytest.raises(PixelDrift, match=r"made with pillow 1\.2\.3, transformers 4\.5\.6, numpy") as stopped:
        train(shards, CachedTargets(older), tmp_path / "run", TrainConfig(**QUICK))
    assert f"here are pillow {version('pillow')}, transformers {version('transformers')}" in str(stopped.value)
    assert "install what the cache was made with" in str(stopped.value)


def test_drift_that_is_allowed_is_a_warning(shards, cache, tmp_path, monkeypatch):
    other_pillow(monkeypatch)
    with pytest.warns(PixelDriftWarning, match="expected the pixels that the teacher saw"):
        record = train(shards, CachedTargets(cache, allow_pixel_drift=True), tmp_path / "run", TrainConfig(**QUICK))
    assert record.steps == 4


def test_no_drift_is_no_warning(shards, cache, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PixelDriftWarning)
        train(shards, CachedTargets(cache, allow_pixel_drift=True), tmp_path / "run", TrainConfig(**QUICK))


def test_one_sample_in_a_hundred_is_checked_in_every_batch(teacher, shards, cache, monkeypatch):
    """Of the others the pixels are not hashed."""
    chosen = shards[0].keys[1]
    monkeypatch.setattr("dde_cache.targets.is_spot_checked", lambda key: key == chosen)
    reader = CacheTargets(cache, shards, LAYER)
    asked = []

    def levels(wrong):
        asked.append(wrong)
        pixels = teacher.preprocessor.levels(drawn(teacher, shards[0].read(chosen), 1))
        return [pixels ^ 1 if wrong else pixels]

    reader.check_pixels(0, shards[0].keys[0], 0, lambda: levels(True))
    assert asked == []
    reader.check_pixels(0, chosen, 1, lambda: levels(False))
    with pytest.raises(PixelDrift):
        reader.check_pixels(0, chosen, 1, lambda: levels(True))
    with pytest.raises(PixelDrift):
        reader.check_pixels(0, chosen, 2, lambda: levels(False))
    assert asked == [False, True, False]


def test_a_cache_without_hashes_trains_unchecked(shards, copy, tmp_path, monkeypatch):
    """As other programs may write one."""
    for entry in copy.manifest.units:
        path = copy.folder / "units" / entry.name
        unit = Unit(path)
        arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
        unit.close()
        groups = {name: group for name, group in attributes.groups.items() if name != "views"}
        write_unit(path, dataclasses.replace(arrays, further={}), attributes.model_copy(update={"groups": groups}))
    (copy.folder / "manifest.json").unlink()
    repair(copy.folder)
    other_pillow(monkeypatch)
    bare = Cache(copy.folder)
    assert verify(bare.folder).sound
    assert train(shards, CachedTargets(bare), tmp_path / "run", TrainConfig(**QUICK)).steps == 4


def of_recipe(cache, view):
    """The same units under another recipe's name."""
    spec = cache.spec.model_copy(update={"view": view})
    for entry in cache.manifest.units:
        path = cache.folder / "units" / entry.name
        unit = Unit(path)
        write_unit(path, *cut_unit(unit, unit.keys, spec))
        unit.close()
    (cache.folder / "manifest.json").unlink()
    repair(cache.folder)
    return Cache(cache.folder)


def test_a_recipe_that_is_not_known_is_refused(shards, copy, teacher_folder, tmp_path):
    strange = of_recipe(copy, "example 1")
    assert verify(strange.folder).sound, "its targets can be read"
    with pytest.raises(InputError, match=r"expected a recipe of views that this version can replay.*got 'example 1'"):
        train(shards, CachedTargets(strange), tmp_path / "run", TrainConfig(**QUICK))
    report = verify(strange.folder, against=shards, teacher=str(teacher_folder), sample=2)
    assert [finding.kind for finding in report.findings] == ["teacher"]
    assert "got 'example 1'" in report.findings[0].examples[0]


# Every other command.


def test_verify_and_repair_draw_the_views_again(shards, copy, folder, teacher_folder, monkeypatch):
    report = verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert report.sound, report.findings
    assert report.recomputed.pairs == len(all_pairs(shards))
    assert report.recomputed.largest_weight_error < 1e-5
    lost = copy.manifest.units[1].name
    (copy.folder / "units" / lost).unlink()
    repaired = repair(copy.folder, shards=shards, teacher=str(teacher_folder))
    assert repaired.extracted == (lost,)
    one, two = (Unit(place / "units" / lost) for place in (folder, copy.folder))
    for name in ("predictions/logits", "maps/t2i/weight", "views/pixels", "views/view"):
        np.testing.assert_allclose(one.array(name), two.array(name), atol=1e-5)
    one.close()
    two.close()
    other_pillow(monkeypatch)
    report = verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert not report.sound
    assert "expected the pixels that the teacher saw" in report.findings[0].examples[0]


@pytest.mark.parametrize("view", range(VIEWS))
def test_verify_finds_a_wrong_record_of_any_view(shards, copy, teacher_folder, view):
    for entry in copy.manifest.units:
        path = copy.folder / "units" / entry.name
        unit = Unit(path)
        arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
        unit.close()
        logits = arrays.logits.copy()
        logits[arrays.prediction_view == view] += 1
        write_unit(path, dataclasses.replace(arrays, logits=logits), attributes)
    (copy.folder / "manifest.json").unlink()
    repair(copy.folder)
    report = verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert [finding.kind for finding in report.findings] == ["targets"]
    assert all(f"view {view}: a logit is off" in line for line in report.findings[0].examples)


def test_a_part_of_a_cache_keeps_the_hashes_of_its_samples(shards, cache, teacher_folder, tmp_path):
    keys = frozenset(["key-001", "key-005"])
    subset(cache, tmp_path / "part", Selection(keys=keys, layers=(LAYER,)))
    part = Cache(tmp_path / "part")
    assert verify(part.folder).sound
    wanted = [one for shard in shards for one in shard if one.key in keys]
    alone = make_shards(tmp_path / "alone", wanted, size=1)
    for number, entry in enumerate(part.manifest.units):
        expected = make_cache(
            alone[number : number + 1], teacher_folder, tmp_path / f"cache-{number}", **EXACT | {"layers": (LAYER,)}
        )
        one, two = part.unit(entry), expected.unit(expected.manifest.units[0])
        for name in ("sample", "image", "view", "pixels"):
            np.testing.assert_array_equal(one.array(f"views/{name}"), two.array(f"views/{name}"))
        np.testing.assert_array_equal(one.maps.view, two.maps.view)
        one.close()
        two.close()
    predictions = subset(cache, tmp_path / "logits", Selection(fields=("predictions",)))
    assert predictions.pairs == len(all_pairs(shards))
    assert verify(tmp_path / "logits").sound


def test_merged_parts_are_the_whole(shards, cache, teacher_folder, tmp_path):
    parts = [
        make_cache(some, teacher_folder, tmp_path / f"part-{number}", **EXACT)
        for number, some in enumerate((shards[:1], shards[1:]))
    ]
    merge(parts, tmp_path / "whole")
    merged = Cache(tmp_path / "whole")
    assert {entry.sha256 for entry in merged.manifest.units} == {entry.sha256 for entry in cache.manifest.units}
    other = make_cache(shards[:1], teacher_folder, tmp_path / "other", **EXACT | {"views": 2})
    with pytest.raises(CacheError, match="views: expected 3, got 2"):
        merge([parts[1], other], tmp_path / "mixed")


def broken(arrays: UnitArrays, name, change):
    further = dict(arrays.further)
    further[f"views/{name}"] = change(further[f"views/{name}"].copy())
    return dataclasses.replace(arrays, further=further)


def set_first(value):
    def change(column):
        column[-1] = value
        return column

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("view", set_first(VIEWS), "views: of a view, pass or image that the specification does not have"),
        ("image", set_first(1), "views: of a view, pass or image that the specification does not have"),
        ("view", set_first(0), "views: records out of order or twice"),
        ("sample", set_first(99), "views: records of no sample"),
    ],
)
def test_the_judge_finds_wrong_rows(copy, name, change, message):
    unit = Unit(copy.folder / "units" / copy.manifest.units[0].name)
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    unit.close()
    path = copy.folder / "broken.zarr.zip"
    write_unit(path, broken(arrays, name, change), attributes)
    opened = Unit(path)
    assert message in [problem.message for problem in audit(opened)]
    opened.close()


def test_the_judge_finds_missing_rows_and_arrays_of_another_make(copy):
    unit = Unit(copy.folder / "units" / copy.manifest.units[0].name)
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    unit.close()
    path = copy.folder / "broken.zarr.zip"
    shorter = {name: values[:-1] for name, values in arrays.further.items()}
    write_unit(path, dataclasses.replace(arrays, further=shorter), attributes)
    opened = Unit(path)
    assert "views: expected 9 rows, got 8" in [problem.message for problem in audit(opened)]
    opened.close()
    for wrong, message in (
        ({"views/pixels": arrays.further["views/pixels"][:, :7]}, r"views/pixels: expected shape \[9, 8\]"),
        ({"views/view": arrays.further["views/view"].astype(np.uint32)}, "views/view: expected uint16, got uint32"),
        ({"views/image": arrays.further["views/image"][:-1]}, r"views/image: expected shape \[9\], got \[8\]"),
    ):
        write_unit(path, dataclasses.replace(arrays, further={**arrays.further, **wrong}), attributes)
        with pytest.raises(CacheError, match=message):
            Unit(path)


@pytest.mark.parametrize("table", ["maps", "predictions"])
def test_the_judge_finds_records_of_a_view_that_there_is_not(copy, table):
    unit = Unit(copy.folder / "units" / copy.manifest.units[0].name)
    fewer = copy.spec.model_copy(update={"views": VIEWS - 1})
    arrays, attributes = cut_unit(unit, unit.keys, fewer)
    unit.close()
    path = copy.folder / "broken.zarr.zip"
    write_unit(path, arrays, attributes)
    opened = Unit(path)
    found = [problem.message for problem in audit(opened)]
    assert f"{table}: of a view, pass or image that the specification does not have" in found
    opened.close()


def test_a_lost_hash_is_an_error_of_the_cache(shards, copy, teacher):
    path = copy.folder / "units" / copy.manifest.units[0].name
    unit = Unit(path)
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    unit.close()
    write_unit(path, broken(arrays, "view", set_first(VIEWS + 5)), attributes)
    opened = Unit(path)
    hashes, last = PixelHashes(opened), list(shards[0])[-1]
    with pytest.raises(CacheError, match=r"expected a pixel hash of image 0 of sample .* in view 2, found none"):
        hashes.check(2, last.key, 2, [teacher.preprocessor.levels(drawn(teacher, last, 2))])
    opened.close()


def test_a_plan_counts_views(shards, teacher_folder, tmp_path):
    config = ExtractConfig(batch_size=4, views=VIEWS)
    plan = plan_extraction(shards, str(teacher_folder), tmp_path / "cache", config, sample=1000)
    pairs = len(all_pairs(shards))
    assert (plan.pairs, plan.views, plan.sampled_pairs) == (pairs, VIEWS, pairs)
    done = extract(shards, str(teacher_folder), tmp_path / "cache", config)
    assert (done.pairs, done.views) == (pairs, VIEWS)
    assert plan.bytes == pytest.approx(done.bytes, rel=0.1)
    assert plan.bytes_a_pair == pytest.approx(done.bytes_a_pair, rel=0.1)
    after = plan_extraction(shards, str(teacher_folder), tmp_path / "cache", config)
    assert (after.pairs, after.finished_pairs) == (0, pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 2, "view": AS_PROCESSED}, "expected one view where pictures stay as processed, got 2"),
        ({"view": "blurred"}, "expected a recipe of views that this version can replay"),
        ({"views": 0}, "greater than or equal to 1"),
        ({"views": 2**16}, "less than 65536"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ExtractConfig(**settings)


def test_settings_follow_from_what_is_asked():
    assert ExtractConfig().view == AS_PROCESSED
    assert ExtractConfig(views=4).view == "randaugment-2-9 v1, colours kept, sides kept"
    assert ExtractConfig(view="crop").views == 1
    assert ExtractConfig(views=2, view="plain v1, colours kept, sides free").view == str(
        ViewRecipe(randaugment=False, sides=False)
    )


def test_the_published_recipe_says_what_views_lack(cache, copy):
    lacking = "\n".join(lacking_of_preset("dide", CachedTargets(cache), "init"))
    assert "the published operations of RandAugment" in lacking
    assert "a fresh view at every step" in lacking
    published = of_recipe(copy, str(parse_recipe("randaugment-2-9-published")))
    assert "published operations" not in "\n".join(lacking_of_preset("dide", CachedTargets(published), "init"))


def test_the_commands(shards, teacher_folder, tmp_path, monkeypatch):
    data, out = shards[0].path.parent, tmp_path / "cache"
    asked = ("extract", data, "--teacher", teacher_folder, "--out", out, "--views", 2, "--view-recipe", "crop")
    planned = cli(*asked, "--plan")
    assert planned.code == 0, planned.err
    assert "15 in 3 units, 2 views of each" in " ".join(planned.out.split())
    made = cli(*asked)
    assert made.code == 0, made.err
    assert "15, 2 views of each in" in " ".join(made.out.split())
    shown = cli("inspect", out)
    assert "2 (plain v1, colours kept, sides kept, cropped)" in " ".join(shown.out.replace("│", " ").split())
    assert cli("inspect", out, "--key", "key-001").code == 0
    wrong = cli(*asked[:-1], "blurred")
    assert wrong.code == 1
    assert "a recipe of views that this version can replay (as-processed, randaugment-2-9," in wrong.message
    options = ("train", data, "--targets", out, "--steps", 2, "--batch-size", 4, "--workers", 0)
    assert cli(*options, "--out", tmp_path / "run").code == 0
    original = views_module._crop
    monkeypatch.setattr(views_module, "_crop", lambda image, *draws: original(image.rotate(90), *draws))
    stopped = cli(*options, "--out", tmp_path / "drifted")
    assert stopped.code == 1
    assert "expected the pixels that the teacher saw" in stopped.message
    allowed = cli(*options, "--out", tmp_path / "allowed", "--allow-pixel-drift")
    assert allowed.code == 0, allowed.err
    assert "warning: sample" in allowed.message


# --- views without a cache


def losses_of(shards, targets, out, **settings):
    """Six steps: of the twelve pairs' epoch and the next, in batches of four."""
    train(shards, targets, out, TrainConfig(**QUICK | {"steps": 6, "hard_weight": 0.5}, **settings))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("loss", "hard", "t2i") if name in line] for line in lines]


def test_a_teacher_beside_sees_the_views_of_the_cache(shards, cache, teacher, tmp_path):
    cached = losses_of(shards, CachedTargets(cache), tmp_path / "cached")
    chosen = {"views": VIEWS, "view": RECIPE}
    online = losses_of(shards, OnlineTargets(teacher, LAYER), tmp_path / "online", **chosen)
    assert cached == [pytest.approx(line, rel=1e-4, abs=1e-5) for line in online]
    plain = losses_of(shards, OnlineTargets(teacher, LAYER), tmp_path / "plain")
    assert plain != [pytest.approx(line, rel=1e-3, abs=1e-3) for line in online]


def test_labels_are_learnt_from_the_views_of_the_cache(shards, cache, tmp_path):
    labels = {"attention_weight": 0.0, "soft_weight": 0.0, "hard_weight": 1.0}
    config = TrainConfig(**QUICK, **labels, views=VIEWS, view=RECIPE)
    train(shards, labels_only(cache), tmp_path / "labels", config)
    train(shards, CachedTargets(cache), tmp_path / "cached", TrainConfig(**QUICK, **labels))
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("labels", "cached")]
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_views_belong_to_a_cache_or_to_the_settings(shards, cache, tmp_path):
    with pytest.raises(InputError, match=r"has those that its teacher saw \(3, randaugment-2-9 v1, colours"):
        train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(**QUICK, views=2))
    assert TrainConfig(views=2).view == "randaugment-2-9 v1, colours kept, sides kept"
    assert TrainConfig(views=1).view is None
    for wrong, message in (({"views": 2, "view": AS_PROCESSED}, "all alike"), ({"view": "blurred"}, "can replay")):
        with pytest.raises(ValidationError, match=message):
            TrainConfig(**wrong)
