"""Passes from extraction to training: teacher and student see the same masks and the same strange pictures."""

import dataclasses
import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import SIZES, WORDS, picture
from hypothesis import given
from hypothesis import strategies as st
from pipeline import all_pairs, cli, make_cache, make_shards, png, tree
from test_unit import rezip

from dde_cache.arrays import UnitArrays
from dde_cache.audit import audit
from dde_cache.batches import PairDataset, batch_loader, pictures_of, tokens_of
from dde_cache.codec import dense_rows, from_parts
from dde_cache.errors import CacheError, InputError
from dde_cache.extract import ExtractConfig, extract, plan_extraction
from dde_cache.merge import merge
from dde_cache.partners import PartnerPool, PartnersOfShards, partner_arrays, read_partners
from dde_cache.passes import MASKED, NEGATIVE, RECIPES, UNMASKED, Words, mask_tokens, of_pass, pass_name
from dde_cache.repair import repair
from dde_cache.samples import Sample, Text
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.subset import Selection, cut_unit, subset
from dde_cache.summary import pair_links
from dde_cache.targets import CacheTargets
from dde_cache.unit import Unit, write_unit
from dde_cache.verify import verify
from dde_cache.views import parse_recipe

LAYER = 2
ALL = ("matched", "masked", "negative")
EXACT = {"weights": "float32", "k": None, "layers": (1, LAYER), "passes": ALL}
VIEWED = {"views": 2, "view": "crop"}
TOKENS = Words(mask=4, special=frozenset(range(5)), others=tuple(range(5, 105)))


def make_samples(count=9, seed=0):
    """Samples of one or two texts, no text twice but one that two samples share, and one picture that two share."""
    samples = []
    for number in range(count):
        said = [f"is there a {WORDS[3 + number % 3]} {WORDS[6 + number % 2]} left of the {WORDS[number % 12]} ?"]
        said += [f"{WORDS[number % 12]} {WORDS[(number + 5) % 12]}"] * (number % 2)
        width, height = SIZES[(number + seed) % len(SIZES)]
        image = png(picture(36, 36, 77)) if number in (1, 4) else png(picture(width, height, seed * 1000 + number))
        said[0] = "the circle" if number in (0, 2) else said[0]
        texts = tuple(Text(text=text, label="no") for text in said)
        samples.append(Sample(f"key-{number:03d}", (image,), texts))
    return samples


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", make_samples(), size=5)


@pytest.fixture(scope="module")
def folder(shards, teacher_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "cache"
    make_cache(shards, teacher_folder, out, **EXACT, **VIEWED)
    return out


@pytest.fixture
def cache(folder):
    return Cache(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Cache(shutil.copytree(folder, tmp_path / "copy"))


# Masks.


def masks(count, length=20):
    ids = [2, *(5 + number % 100 for number in range(length)), 3]
    return [(ids, *mask_tokens(ids, TOKENS, f"key {number}", 0)) for number in range(count)]


def near(found, tries, chance):
    """Within four standard deviations of a binomial."""
    return abs(found - tries * chance) < 4 * math.sqrt(tries * chance * (1 - chance))


def test_fifteen_in_a_hundred_tokens_are_chosen_and_of_these_eight_in_ten_hidden():
    length, drawn = 20, masks(3000)
    chosen = hidden = other = kept = 0
    replaced = set()
    for ids, read, guess in drawn:
        places = [place for place, label in enumerate(guess) if label != UNMASKED]
        assert places, "at least one"
        for place in places:
            assert guess[place] == ids[place]
            hidden += read[place] == TOKENS.mask
            kept += read[place] == ids[place]
            if read[place] not in (TOKENS.mask, ids[place]):
                other += 1
                replaced.add(read[place])
        chosen += len(places)
        assert all(read[place] == ids[place] for place in range(len(ids)) if place not in places)
        assert (read[0], read[-1]) == (2, 3), "special tokens stay"
    tokens = len(drawn) * length
    none = 0.85**length / length  # a text with none chosen gets one
    assert near(chosen, tokens, 0.15 + none)
    assert near(hidden, chosen, 0.8)
    assert near(kept, chosen, 0.1 + 0.1 / 100)  # a random token may be the same
    assert near(other, chosen, 0.1 - 0.1 / 100)
    assert replaced <= set(TOKENS.others)
    assert len(replaced) > 90
    places = np.bincount([p for _, _, guess in drawn for p, label in enumerate(guess) if label != UNMASKED])
    assert all(near(count, len(drawn), 0.15 + none) for count in places[1:]), "everywhere alike"


@given(st.lists(st.integers(0, 30), max_size=12), st.text(max_size=5), st.integers(0, 9), st.integers(0, 9))
def test_a_mask_is_a_pure_function_and_leaves_special_tokens(ids, key, text, view):
    read, guess = mask_tokens(ids, TOKENS, key, text, view)
    assert (read, guess) == mask_tokens(list(ids), TOKENS, key, text, view)
    for before, after, label in zip(ids, read, guess, strict=True):
        assert label in (UNMASKED, before)
        if before in TOKENS.special:
            assert (after, label) == (before, UNMASKED)
        assert after == before or label != UNMASKED
        assert after not in TOKENS.special - {before, TOKENS.mask}
    assert any(label != UNMASKED for label in guess) == any(token not in TOKENS.special for token in ids)


def test_key_text_view_and_recipe_each_change_the_mask():
    ids = [2, *range(5, 45), 3]
    first = mask_tokens(ids, TOKENS, "a", 0, 0)
    others = [("b", 0, 0), ("a", 1, 0), ("a", 0, 1), ("a", 0, 0, "masked 2")]
    assert all(mask_tokens(ids, TOKENS, *other) != first for other in others)


def test_masks_stay_what_they_are_in_every_version():
    ids = [2, *range(5, 25), 3]
    drawn = [mask_tokens(ids, TOKENS, key, 0) for key in ("a", "b", "c")]
    digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
    assert digest[:16] == "5a8902e87279f0f9"


def test_a_tokenizer_without_a_mask_token_is_refused(teacher):
    class NoMask:
        all_special_ids, mask_token_id = (0, 1), None

        def get_vocab(self):
            return {"a": 0, "b": 1, "c": 2}

    with pytest.raises(InputError, match="mask token"):
        Words.of(NoMask())
    words = Words.of(teacher.preprocessor.processor.tokenizer)
    assert (words.mask, len(words.others)) == (4, len(WORDS))


def test_recipes_are_read_back_and_others_refused():
    assert [pass_name(recipe) for recipe in RECIPES.values()] == list(ALL)
    with pytest.raises(InputError, match="masked 2"):
        pass_name("masked 2")


# Partners.


@st.composite
def pools(draw):
    """Shards in which pictures and texts come often."""
    pictures = [png(picture(12, 12, seed)) for seed in range(3)]
    count = draw(st.integers(1, 8))
    said = st.lists(st.sampled_from(["a", "A ", "b", "c", "d"]), min_size=1, max_size=2)
    return [
        Sample(
            f"k{number}",
            tuple(draw(st.lists(st.sampled_from(pictures), min_size=1, max_size=draw(st.integers(1, 2))))),
            tuple(Text(text=text) for text in draw(said)),
        )
        for number in range(count)
    ]


def suits(sample, text, other):
    """The definition."""
    plain = {one.text.strip().lower() for one in other.texts}
    pictures = [[image.content for image in one.images] for one in (sample, other)]
    same_number = len(pictures[0]) == len(pictures[1])
    return sample.key != other.key and same_number and pictures[0] != pictures[1] and text.strip().lower() not in plain


@given(pools(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_partner_is_another_sample_with_another_picture_and_without_the_text(samples, view, random):
    pool = PartnerPool("000000.tar", samples)
    mixed = list(samples)
    random.shuffle(mixed)
    by_key = {sample.key: sample for sample in samples}
    lacking = 0
    for sample in samples:
        for slot, text in enumerate(sample.texts):
            fits = {other.key for other in samples if suits(sample, text.text, other)}
            if not fits:
                lacking += 1
                with pytest.raises(InputError, match="larger shards"):
                    pool.pick(sample.key, slot, text.text, view)
                continue
            partner = pool.pick(sample.key, slot, text.text, view)
            assert partner.key in fits
            assert partner.content == by_key[partner.key].content_hash()
            assert partner == PartnerPool("other.tar", mixed).pick(sample.key, slot, text.text, view)
    assert bool(pool.lacking()) == bool(lacking)


def test_every_other_sample_of_a_shard_comes_as_a_partner():
    samples = [Sample(f"k{n:02d}", (png(picture(12, 12, n)),), (Text(text=f"text {n}"),)) for n in range(20)]
    pool = PartnerPool("000000.tar", samples)
    counts = np.bincount([int(pool.pick("k07", 0, "text 7", view).key[1:]) for view in range(2000)], minlength=20)
    # The sample behind the pair's own takes its place in the draw as well.
    chances = np.full(20, 1 / 20)
    chances[[7, 8]] = 0, 2 / 20
    assert counts[7] == 0
    assert all(near(count, 2000, chance) for count, chance in zip(counts, chances, strict=True) if chance)


# From the teacher to the cache and back.


def shown(teacher, shards, pair, name):
    """The oracle: tokens and picture of a pair in a pass, without the readers."""
    sample = shards[pair.shard].read(pair.key)
    text = sample.texts[pair.text].text
    tokens = teacher.preprocessor.tokens([text])
    if name == "masked":
        words = Words.of(teacher.preprocessor.processor.tokenizer)
        read, _ = mask_tokens(tokens.ids[0].tolist(), words, pair.key, pair.text, pair.view)
        tokens = dataclasses.replace(tokens, ids=torch.tensor([read]))
    if name == "negative":
        pool = PartnerPool("any", list(shards[pair.shard]))
        sample = shards[pair.shard].read(pool.pick(pair.key, pair.text, text, pair.view).key)
    image = parse_recipe("crop")(sample.images[0].decode(), sample.key, pair.view, 0)
    return tokens, teacher.preprocessor.stack([teacher.preprocessor.pixels(image)])


def test_every_pass_of_every_pair_has_the_targets_of_what_the_trainer_shows(teacher, shards, cache):
    """The batch that training reads is what the oracle shows, and its targets are the teacher's on that very batch."""
    table = PairTable.of(shards).in_views(2)
    reader = CacheTargets(cache, shards, LAYER, passes=(0, 1, 2))
    dataset = PairDataset(
        shards, table, cache.preprocessor(), (), reader, recipe=parse_recipe("crop"), passes=ALL, beside=ALL[1:],
        partners=reader,
    )  # fmt: skip
    numbers = list(range(len(table)))
    batch = dataset.__getitems__(numbers)
    assert not {"masked.target.logits", "masked.pixels0", "negative.input_ids"} & set(batch)
    differ = {name: 0 for name in ALL}
    for name in ALL:
        one = of_pass(batch, name)
        output = teacher(tokens_of(one), pictures_of(one), [LAYER])
        for row, number in enumerate(numbers):
            tokens, pixels = shown(teacher, shards, table[number], name)
            length, (height, width) = tokens.ids.shape[1], pixels.pixels.shape[2:]
            assert one["input_ids"][row, :length].tolist() == tokens.ids[0].tolist()
            assert one["grid0"][row].tolist() == pixels.grid[0].tolist()
            assert torch.equal(one["pixels0"][row, :, :height, :width], pixels.pixels[0])
            # Alone, and in the trainer's batch.
            for found in (teacher(tokens, [pixels], [LAYER]).attention[0, LAYER], output.attention[0, LAYER]):
                at = 0 if found is not output.attention[0, LAYER] else row
                image = int(pixels.grid[0].prod()) + 1
                for direction, queries, keys in (("t2i", length, image), ("i2t", image, length)):
                    parts = {p: one[f"target.{direction}.{p}"][row : row + 1] for p in ("index", "weight", "tail")}
                    stored = dense_rows(from_parts(parts, None), keys)[0, :, :queries]
                    expected = getattr(found, direction)[at, :, :queries, :keys]
                    torch.testing.assert_close(stored, expected, atol=1e-5, rtol=0)
            differ[name] += not torch.equal(one["input_ids"][row], batch["input_ids"][row])
            differ[name] += not torch.equal(one["grid0"][row], batch["grid0"][row])
    assert differ["matched"] == 0
    assert differ["masked"] > len(numbers) / 2
    assert differ["negative"] > len(numbers) / 3
    labels = batch["masked.guess"]
    assert ((labels == UNMASKED) | (labels == batch["input_ids"])).all()
    assert ((labels != UNMASKED).sum(-1) >= 1).all()


@pytest.mark.parametrize("options", [{"queries": "all"}, {"weights": "sqrt8", "layers": (LAYER,)}], ids=str)
def test_other_rows_and_codecs_hold_passes_too(options, shards, teacher_folder, tmp_path):
    made = EXACT | options
    if made["weights"] == "sqrt8":
        made = {name: value for name, value in made.items() if name != "k"}
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", **made)
    assert verify(cache.folder, against=shards, teacher=str(teacher_folder), sample=30).sound


def test_records_lie_as_the_format_says(shards, cache):
    assert cache.spec.passes == ("matched", MASKED, NEGATIVE)
    assert cache.spec.groups["partners"] == {"exchanged": "picture"}
    assert sum(entry.pairs for entry in cache.manifest.units) == len(all_pairs(shards))
    for entry, shard in zip(cache.manifest.units, shards, strict=True):
        unit = cache.unit(entry)
        samples, maps = list(shard), unit.maps
        found = list(zip(maps.sample, maps.text, maps.view, maps.passes, maps.layer, strict=True))
        places = [
            (number, text, view, number_of_pass)
            for number, sample in enumerate(samples)
            for text in range(len(sample.texts))
            for view in range(2)
            for number_of_pass in range(3)
        ]
        assert found == [(*place, layer) for place in places for layer in (1, LAYER)]
        columns = [unit.array(f"predictions/{name}").tolist() for name in ("sample", "text", "view", "pass")]
        assert list(zip(*columns, strict=True)) == [place for place in places if place[3] == 0], "logits: matched alone"
        partners = read_partners(unit)
        assert list(partners) == [place for place in places if place[3] == 2]
        pool = PartnerPool("any", samples)
        for (number, slot, view, _), one in partners.items():
            own = samples[number]
            assert one == pool.pick(own.key, slot, own.texts[slot].text, view)
        assert unit.attributes.groups["partners"].required is False
        unit.close()


def test_a_reader_of_matched_targets_sees_no_other_pass(shards, cache, teacher_folder, tmp_path):
    plain = make_cache(shards, teacher_folder, tmp_path / "plain", **EXACT | {"passes": ("matched",)}, **VIEWED)
    assert (plain.spec.passes, "partners" in plain.spec.groups) == (("matched",), False)
    pairs = [dataclasses.replace(pair, view=view) for pair in all_pairs(shards) for view in range(2)]
    own, other = (CacheTargets(one, shards, LAYER).targets(pairs) for one in (plain, cache))
    assert own.keys() == other.keys()
    for name, values in own.items():
        torch.testing.assert_close(values, other[name], atol=1e-5, rtol=0)
    words = [[one.word for one in pair_links(held, "key-003").words] for held in (cache, plain)]
    assert words[0] == words[1]
    assert "[MASK]" not in words[0]


def test_a_pass_that_a_cache_lacks_has_no_targets(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "two", **EXACT | {"passes": ("matched", "masked")})
    pair = dataclasses.replace(all_pairs(shards)[0], pass_number=2)
    with pytest.raises(CacheError, match="pass 2, found none"):
        CacheTargets(cache, shards, LAYER, passes=(0, 1, 2)).targets([pair])


def test_workers_order_and_batch_size_change_nothing_that_is_shown(shards, cache, teacher_folder, tmp_path):
    again = make_cache(shards, teacher_folder, tmp_path / "again", **EXACT, **VIEWED, workers=1)
    assert tree(again.folder / "units") == tree(cache.folder / "units")
    other = make_cache(shards[::-1], teacher_folder, tmp_path / "other", **EXACT | {"batch_size": 7}, **VIEWED)
    for entry in cache.manifest.units:
        one, two = cache.unit(entry), other.unit(next(e for e in other.manifest.units if e.name == entry.name))
        assert np.array_equal(one.maps.token_ids, two.maps.token_ids)
        assert np.array_equal(one.maps.grid, two.maps.grid)
        assert read_partners(one) == read_partners(two)
        one.close(), two.close()
    table = PairTable.of(shards)
    orders = [[number] for number in range(len(table))], [list(range(len(table)))[::-1]]
    seen = []
    for order in orders:
        for workers in (0, 1):
            dataset = PairDataset(shards, table, cache.preprocessor(), (), beside=ALL[1:])
            rows = {}
            for batch in batch_loader(dataset, order, workers):
                for row, number in enumerate(batch["pair"].tolist()):
                    length = int(batch["attention_mask"][row].sum())
                    tokens = [batch[f"masked.{name}"][row, :length].tolist() for name in ("input_ids", "guess")]
                    rows[number] = [*tokens, batch["negative.grid0"][row].tolist()]
            seen.append(rows)
    assert all(rows == seen[0] for rows in seen)


# What happens to a cache.


def test_subset_keeps_partners_also_where_they_themselves_are_cut_away(shards, cache, tmp_path):
    unit = cache.unit(cache.manifest.units[0])
    partners, keys = read_partners(unit), unit.keys
    unit.close()
    kept = keys[0]
    lent = [partners[0, 0, view, 2].key for view in range(2)]
    part = subset(cache, tmp_path / "part", Selection(keys=frozenset({kept})))
    assert part.samples == 1
    small = Cache(tmp_path / "part")
    assert verify(small.folder).sound
    reader = CacheTargets(small, shards, LAYER, passes=(0, 1, 2), pixels="every")
    table = PairTable([[(kept, slot) for slot in range(len(shards[0].read(kept).texts))], []]).in_views(2)
    dataset = PairDataset(
        shards, table, small.preprocessor(), (), reader, recipe=parse_recipe("crop"), passes=ALL, beside=ALL[1:],
        partners=reader,
    )  # fmt: skip
    batch = dataset.__getitems__([0, 1])
    assert batch["negative.target.t2i.weight"].shape[0] == 2
    for view in range(2):
        pair = table[view]
        assert reader.partner(pair, shards[0].read(kept).texts[0]).key == lent[view]
    whole = CacheTargets(cache, shards, LAYER, passes=(0, 1, 2))
    pairs = [dataclasses.replace(table[view], pass_number=2) for view in range(2)]
    for name, values in whole.targets(pairs).items():
        few = reader.targets(pairs)[name]
        assert torch.equal(values[tuple(slice(length) for length in few.shape)], few), "padding apart"


def test_a_partner_that_has_changed_is_noticed(shards, folder, tmp_path):
    samples = list(shards[0])
    cache = Cache(folder)
    unit = cache.unit(cache.manifest.units[0])
    lent = next(iter(read_partners(unit).values())).key
    owner = next(place for place, one in read_partners(unit).items() if one.key == lent)
    unit.close()
    changed = [
        dataclasses.replace(one, images=(png(picture(24, 24, 5)),)) if one.key == lent else one for one in samples
    ]
    others = make_shards(tmp_path / "changed", changed, size=5)
    key = samples[owner[0]].key
    part = Cache(subset(cache, tmp_path / "part", Selection(keys=frozenset({key}))) and tmp_path / "part")
    report = verify(part.folder, against=others)
    assert any(lent in line and "whose picture" in line for one in report.findings for line in one.examples)
    reader = CacheTargets(part, others, LAYER, passes=(0, 2))
    table = PairTable([[(key, owner[1])]]).in_views(2)
    dataset = PairDataset(
        others, table, part.preprocessor(), (), reader, recipe=parse_recipe("crop"), passes=ALL, beside=("negative",),
        partners=reader,
    )  # fmt: skip
    with pytest.raises(CacheError, match=lent):
        dataset.__getitems__([owner[2]])


def test_merge_layers_and_predictions_keep_partners(shards, cache, teacher_folder, tmp_path):
    one, two = (make_cache([shard], teacher_folder, tmp_path / shard.name, **EXACT, **VIEWED) for shard in shards)
    merge([one, two], tmp_path / "merged")
    assert tree(tmp_path / "merged" / "units") == tree(cache.folder / "units")
    first = [entry for entry in cache.manifest.units][:1]
    unit = cache.unit(first[0])
    key = unit.keys[1]
    unit.close()
    subset(cache, tmp_path / "some", Selection(keys=frozenset({key})))
    overlap = merge([Cache(tmp_path / "some"), cache], tmp_path / "overlap", on_overlap="first")
    assert overlap.rewritten == 1
    assert verify(tmp_path / "overlap", against=shards, teacher=str(teacher_folder), sample=60).sound
    subset(cache, tmp_path / "layer", Selection(layers=(LAYER,)))
    same = make_cache(shards, teacher_folder, tmp_path / "same", **EXACT | {"layers": (LAYER,)}, **VIEWED)
    assert tree(tmp_path / "layer" / "units") == tree(same.folder / "units")
    subset(cache, tmp_path / "logits", Selection(fields=("predictions",)))
    assert verify(tmp_path / "logits", against=shards).sound


def test_repair_extracts_passes_again(shards, cache, copy, teacher_folder):
    path = next((copy.folder / "units").iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    assert not verify(copy.folder).sound
    report = repair(copy.folder, shards=shards, teacher=str(teacher_folder))
    assert report.extracted == (path.name,)
    assert verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=60).sound


def test_recomputing_sees_every_pass(shards, copy, teacher_folder):
    """The maps of two passes of a pair exchanged: every bound still holds, but not what the teacher gives."""
    entry = copy.manifest.units[0]
    unit = copy.unit(entry)
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    rows = torch.arange(len(arrays.maps.sample)).reshape(-1, 3, 2)  # (pair and view, pass, layer)
    same = arrays.maps.grid.reshape(-1, 3, 2, 2)
    alike = [number for number in range(len(rows)) if (same[number, 0] == same[number, 2]).all()]
    assert alike, "a partner with the grid of the pair's own picture"
    for number in alike:
        rows[number, [1, 2]] = rows[number, [2, 1]].clone()
    wrong = dataclasses.replace(arrays, t2i=arrays.t2i.records(rows.flatten()))
    unit.close()
    write_unit(unit.path, wrong, attributes)
    assert list(audit(Unit(unit.path))) == []
    (copy.folder / "manifest.json").unlink()
    repair(copy.folder)
    report = verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=60)
    assert {one.kind for one in report.findings} == {"targets"}
    assert all("pass 1" in line or "pass 2" in line for line in report.findings[0].examples)


def damaged(copy, change):
    """Write the first unit with other partners; what the judge says."""
    unit = copy.unit(copy.manifest.units[0])
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    partners, keys = read_partners(unit), unit.keys
    unit.close()
    change(partners, keys)
    further = {**arrays.further, **partner_arrays(partners)}
    fields = {name: getattr(arrays, name) for name in UnitArrays.__dataclass_fields__}
    write_unit(unit.path, UnitArrays(**fields | {"further": further}), attributes)
    opened = Unit(unit.path)
    found = [problem.message for problem in audit(opened)]
    opened.close()
    return found


def lose_one(partners, _keys):
    del partners[next(iter(partners))]


def own_picture(partners, keys):
    place = next(iter(partners))
    partners[place] = dataclasses.replace(partners[place], key=keys[place[0]])


def other_content(partners, _keys):
    place = next(iter(partners))
    partners[place] = dataclasses.replace(partners[place], content=bytes(32))


def no_sample(partners, _keys):
    partners[200, 0, 0, 2] = next(iter(partners.values()))


def no_pass(partners, _keys):
    partners[0, 0, 0, 9] = next(iter(partners.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_one, "one of every record"),
        (own_picture, "its own partner"),
        (other_content, "content of a partner"),
        (no_sample, "records of no sample"),
        (no_pass, "pass or image that the specification does not have"),
    ],
)
def test_the_judge_finds_damaged_partners(copy, change, message):
    assert any(message in line for line in damaged(copy, change))


def test_partners_that_are_not_there_are_missed(shards, copy):
    unit = copy.unit(copy.manifest.units[0])
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    unit.close()
    groups = {name: group for name, group in attributes.groups.items() if name != "partners"}
    views = {name: values for name, values in arrays.further.items() if not name.startswith("partners/")}
    without = dataclasses.replace(arrays, further=views)
    write_unit(unit.path, without, attributes.model_copy(update={"groups": groups}))
    opened = Unit(unit.path)
    assert any("found none" in problem.message for problem in audit(opened))
    opened.close()


PARTNER_ARRAYS = ("sample", "text", "view", "pass", "key_bytes", "key_offsets", "content")


@pytest.mark.parametrize("name", PARTNER_ARRAYS)
@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_damaged_arrays_of_partners(copy, shards, name, damage):
    path = copy.folder / "units" / "000000.zarr.zip"
    chunk = f"partners/{name}/c/0" + ("/0" if name == "content" else "")

    def change(members):
        content = members.pop(chunk)
        return members if damage == "lost" else members | {chunk: bytes([content[0] ^ 1]) + content[1:]}

    rezip(path, change)
    opened = Unit(path)
    with pytest.raises(CacheError, match=f"partners/{name}"):
        read_partners(opened)
    assert any(f"partners/{name}" in problem.message for problem in audit(opened))
    opened.close()


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("key_offsets", lambda values: values[::-1].copy(), "partners/key_offsets is damaged"),
        ("key_offsets", lambda values: values[:-1], "expected shape"),
        ("key_bytes", lambda values: np.full_like(values, 255), "partners/key_bytes is damaged"),
        ("key_bytes", lambda values: np.full_like(values, 27), "without control characters"),
        ("content", lambda values: values[:, :31].copy(), "expected shape"),
        ("sample", lambda values: values.astype(np.uint16), "expected uint32"),
    ],
)
def test_arrays_of_partners_are_not_trusted(copy, name, values, message):
    """Right checksums, wrong numbers."""
    unit = copy.unit(copy.manifest.units[0])
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    unit.close()
    changed_arrays = {**arrays.further, f"partners/{name}": values(arrays.further[f"partners/{name}"])}
    write_unit(unit.path, dataclasses.replace(arrays, further=changed_arrays), attributes)
    with pytest.raises(CacheError, match=message):
        read_partners(Unit(unit.path))


# What the user sees.


def test_extraction_by_options_plan_and_inspection(shards, teacher_folder, tmp_path):
    source, out = shards[0].path.parent, tmp_path / "cache"
    options = ["--teacher", teacher_folder, "--out", out, "--passes", "negative,masked,matched", "--batch-size", 4]
    planned = cli("extract", source, *options, "--plan", "--json")
    plan = json.loads(planned.out)
    pairs = len(all_pairs(shards))
    assert (plan["pairs"], plan["passes"], plan["views"]) == (pairs, 3, 1)
    made = cli("extract", source, *options, "--json")
    assert made.code == 0, made.err
    summary = json.loads(made.out)
    assert (summary["pairs"], summary["passes"]) == (pairs, 3)
    assert summary["bytes"] == pytest.approx(plan["bytes"], rel=0.03)
    cache = Cache(out)
    assert cache.spec.passes == ("matched", MASKED, NEGATIVE), "numbered in one order"
    plain = make_cache(shards, teacher_folder, tmp_path / "plain")
    dense = [json.loads(cli("inspect", one, "--json").out)["dense_bytes_a_pair"] for one in (plain.folder, out)]
    assert dense[1] > 2.5 * dense[0]
    assert "negative 1" in cli("inspect", out).out
    assert "negative 1" in (out / "README.md").read_text()
    again = cli("extract", source, *options, "--json")
    assert json.loads(again.out)["skipped_pairs"] == pairs


@pytest.mark.parametrize("passes", ["masked", "matched,matched", "matched,negatives", ""])
def test_other_passes_are_refused(passes, shards, teacher_folder, tmp_path):
    options = ["--teacher", teacher_folder, "--out", tmp_path / "x", "--passes", passes]
    ended = cli("extract", shards[0].path.parent, *options)
    assert ended.code == 1
    assert "passes" in ended.message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("recipe", [extract, plan_extraction])
def test_shards_without_negatives_are_refused_before_the_first_batch(recipe, teacher_folder, tmp_path):
    samples = [dataclasses.replace(one, texts=(Text(text="a circle"),)) for one in make_samples(4)]
    shards = make_shards(tmp_path / "same", samples)
    with pytest.raises(InputError, match="4 texts have none"):
        recipe(shards, str(teacher_folder), tmp_path / "x", ExtractConfig(passes=("matched", "negative")))
    assert not (tmp_path / "x" / "units").exists() or not list((tmp_path / "x" / "units").iterdir())


def test_partners_from_shards_survive_the_way_to_a_worker(shards):
    import copy as copies

    chosen = PartnersOfShards(shards)
    pair = all_pairs(shards)[3]
    text = shards[pair.shard].read(pair.key).texts[pair.text]
    first = chosen.partner(pair, text)
    sent = copies.copy(chosen)
    assert sent.partner(pair, text) == first
