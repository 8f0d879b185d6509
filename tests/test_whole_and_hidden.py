"""Rows over the whole sequence and hidden states: what is stored is what the teacher gives, through every tool."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TEXTS, picture
from pipeline import all_pairs, cli, make_cache, make_shards, png, tree
from test_teacher import Stock, prepare, row_major
from transformers import ViltForImagesAndTextClassification, ViltForQuestionAnswering

from dde_cache.audit import audit
from dde_cache.codec import dense_rows, from_parts, part_names
from dde_cache.errors import CacheError, InputError, TeacherError
from dde_cache.extract import ExtractConfig, plan_extraction
from dde_cache.identity import config_of
from dde_cache.merge import merge
from dde_cache.plan import generous_bytes
from dde_cache.repair import repair
from dde_cache.samples import Sample, Text
from dde_cache.spec import HIDDEN_STATES, WHOLE_ROWS
from dde_cache.store import Cache
from dde_cache.subset import Selection, cut_unit, subset
from dde_cache.summary import summarise
from dde_cache.targets import CacheTargets, slot_name
from dde_cache.teacher import FusionTeacher
from dde_cache.unit import Unit, write_unit
from dde_cache.verify import verify

LAYERS = (1, 2)
EVERY = ("cross", "whole", "hidden")
ROWS = ("t2i", "i2t", "t2w", "i2w")
CODECS = {
    "float32": ({"k": None, "weights": "float32"}, 1e-5),
    "sqrt8": ({"steps": 254}, 5e-3),
    "log8": ({"k": None, "weights": "log8"}, 0.03),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def folder(shards, teacher_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "cache"
    make_cache(shards, teacher_folder, out, targets=EVERY, layers=LAYERS)
    return out


@pytest.fixture
def cache(folder):
    return Cache(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Cache(shutil.copytree(folder, tmp_path / "copy"))


# --- the teacher


@pytest.mark.parametrize("padded", [False, True])
def test_whole_rows_and_hidden_states_are_those_of_the_stock_model(teacher_folder, pictures, texts, padded):
    """`output_attentions` and `output_hidden_states`, patches in row-major order, padding left out."""
    teacher = FusionTeacher.load(teacher_folder)
    stock = Stock(ViltForQuestionAnswering.from_pretrained(teacher_folder), teacher.preprocessor.processor)
    stock.model.config.output_hidden_states = True
    inputs, output, index, mask = stock(pictures, texts, 12 if padded else None)
    tokens, pixels = prepare(teacher, pictures, texts, full=padded)
    ours = teacher(tokens, [pixels], (0, 2), padded_queries=padded, whole=True, hidden=True)
    words = inputs["input_ids"].shape[1]
    assert words == tokens.ids.shape[1]
    for layer in (0, 2):
        found, states = ours.whole[0, layer], ours.hidden[0, layer]
        for row in range(len(texts)):
            count, patches = int(tokens.mask[row].sum()), int(mask[row].sum())
            order = words + row_major(index[row], mask[row])
            queries = torch.cat([torch.arange(words), order])
            keys = torch.cat([torch.arange(count), order[:patches]])
            expected = output.attentions[layer][row][:, queries]
            assert (expected[..., keys].sum(-1) - 1).abs().max() < 1e-5, "the stock model pays nothing to padding"
            expected = expected[..., keys]
            # Padded text rows are rows too; of padded image rows the one that is kept.
            rows = patches + int(padded and patches < len(order))
            torch.testing.assert_close(found.t2w[row, :, :, : len(keys)], expected[:, :words], atol=1e-5, rtol=0)
            torch.testing.assert_close(
                found.i2w[row, :, :rows, : len(keys)], expected[:, words : words + rows], atol=1e-5, rtol=0
            )
            assert not found.t2w[row, :, :, len(keys) :].any()
            assert not found.i2w[row, :, :, len(keys) :].any()
            every = output.hidden_states[layer + 1][row]
            torch.testing.assert_close(states.text[row, :count], every[:count], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(states.image[row, :patches], every[order[:patches]], atol=1e-4, rtol=1e-5)


def test_the_block_softmax_is_not_enough(teacher, pictures, texts):
    """Why this is a group of its own: two rows of the whole sequence may have one and the same cross-modal block."""
    tokens, pixels = prepare(teacher, pictures[:1], texts[:1])
    output = teacher(tokens, [pixels], (2,), whole=True)
    words = tokens.ids.shape[1]
    own = output.whole[0, 2].t2w[..., :words].sum(-1)
    assert float(own.max() - own.min()) > 0.1
    block = output.whole[0, 2].t2w[..., words:]
    torch.testing.assert_close(block / block.sum(-1, keepdim=True), output.attention[0, 2].t2i, atol=1e-5, rtol=0)


# --- from extraction to a batch


def exact_of(teacher, sample, slot, config, images=1):
    """The oracle: the teacher on one pair alone, hidden states in float16."""
    every = config.get("queries") == "all"
    tokens = teacher.preprocessor.tokens([sample.texts[slot].text], full=every)
    pixels = [
        teacher.preprocessor.stack([teacher.preprocessor.pixels(sample.images[number].decode())])
        for number in range(images)
    ]
    return tokens, teacher(tokens, pixels, LAYERS, padded_queries=every, whole=True, hidden=True)


def dense_of(batch, name, row, spec, keys):
    parts = {part: batch[f"{name}.{part}"][row : row + 1] for part in part_names(spec.steps)}
    return dense_rows(from_parts(parts, spec.steps), keys)[0]


@pytest.mark.parametrize("queries", ["valid", "all"])
@pytest.mark.parametrize("heads", ["all", "mean"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_has_what_the_teacher_gives_each_pair(shards, teacher, teacher_folder, tmp_path, codec, heads, queries):
    config, bound = CODECS[codec]
    config = config | {"heads": heads, "queries": queries, "layers": LAYERS, "targets": EVERY}
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", **config)
    pairs = all_pairs(shards)[::-1]
    # The second layer first: numbers in a batch are those of the call.
    reader = CacheTargets(cache, shards, (2, 1), rows=ROWS, hidden=True, padded_queries=queries == "all")
    batch = reader.targets(pairs)
    compare(batch, cache, shards, teacher, pairs, config, bound, (2, 1))


def compare(batch, cache, shards, teacher, pairs, config, bound, layers, images=1):
    for row, pair in enumerate(pairs):
        sample = shards[pair.shard].read(pair.key)
        tokens, output = exact_of(teacher, sample, pair.text, config, images)
        for image in range(images):
            for number, layer in enumerate(layers):
                for name in ROWS:
                    expected = output.rows(name, image, layer)[0]
                    expected = expected.mean(0, keepdim=True) if config.get("heads") == "mean" else expected
                    found = dense_of(batch, slot_name(name, image, number), row, cache.spec, expected.shape[-1])
                    found = found[:, : expected.shape[1]]
                    assert float((found - expected).abs().max()) < bound, (name, image, layer, pair)
                words = int(tokens.mask.sum())
                for name, part in (
                    ("text", output.hidden[image, layer].text),
                    ("image", output.hidden[image, layer].image),
                ):
                    found = batch[slot_name(f"hidden/{name}", image, number)][row]
                    count = words if name == "text" else int(batch[slot_name("grid", image)][row].prod()) + 1
                    # Alone and in a batch differ in their last bits, which may round to the next float16.
                    torch.testing.assert_close(found[:count].float(), part[0, :count], rtol=2e-3, atol=1e-3)
                    assert not found[count:].any()


@pytest.mark.parametrize("config", [{}, {"k": 4}], ids=str)
def test_both_pictures_of_a_sample_have_rows_of_their_own(save_teacher, tmp_path, config):
    made = save_teacher(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3)
    sizes = ((36, 36), (24, 36), (48, 12))
    samples = [
        Sample(
            f"key-{number}",
            (png(picture(*sizes[number], number)), png(picture(*sizes[(number + 1) % 3], 9 + number))),
            (Text(text=TEXTS[number], label="yes"),),
        )
        for number in range(3)
    ]
    two = make_shards(tmp_path / "two", samples)
    config = config | {"targets": EVERY, "layers": LAYERS}
    cache = make_cache(two, made, tmp_path / "cache", **config)
    batch = CacheTargets(cache, two, LAYERS, rows=ROWS, hidden=True).targets(all_pairs(two))
    assert {"t2w1@1.weight", "hidden/image1@1"} <= set(batch)
    if not config.get("k"):
        compare(batch, cache, two, FusionTeacher.load(made), all_pairs(two), config, 0.02, LAYERS, images=2)
    report = verify(cache.folder, against=two, teacher=str(made), sample=3)
    assert report.sound, report.findings


def test_only_what_is_asked_for_is_read(cache, shards):
    pairs = all_pairs(shards)
    batch = CacheTargets(cache, shards, 2, rows=("i2w",)).targets(pairs)
    assert set(batch) == {"logits", "token_ids", "grid", "i2w.weight"}
    batch = CacheTargets(cache, shards, 2, attention=False, hidden=True).targets(pairs)
    assert set(batch) == {"logits", "token_ids", "grid", "hidden/text", "hidden/image"}


# --- the format


def test_the_groups_are_optional_and_in_the_identity(cache, shards, teacher_folder, tmp_path):
    assert cache.spec.groups == {"whole": WHOLE_ROWS, "hidden": {"states": HIDDEN_STATES, "width": 24}}
    unit = cache.unit(cache.manifest.units[0])
    assert {name: group.required for name, group in unit.attributes.groups.items()} == {
        "samples": True, "maps": True, "predictions": True, "whole": False, "hidden": False,
    }  # fmt: skip
    maps = unit.maps
    for name in ("whole/t2w/weight", "whole/i2w/weight", "hidden/text", "hidden/image"):
        assert unit.length(name) == len(maps.sample)
    assert unit.array("whole/t2w/weight").shape[3] == (maps.text_tokens + maps.image_tokens).max()
    assert unit.array("hidden/image").shape[1:] == (maps.image_tokens.max(), 24)
    unit.close()
    plain = make_cache(shards, teacher_folder, tmp_path / "plain", layers=LAYERS)
    assert plain.spec.groups == {}
    assert plain.spec.fingerprint != cache.spec.fingerprint
    assert config_of(cache.spec).targets == EVERY


def test_twice_gives_the_same_bytes(cache, shards, teacher_folder, tmp_path):
    again = make_cache(shards, teacher_folder, tmp_path / "again", targets=EVERY[::-1], layers=LAYERS, workers=1)
    assert tree(again.folder) == tree(cache.folder)


@pytest.mark.parametrize(
    ("group", "later"),
    [
        ("whole", {"keys": "another order v2"}),
        ("hidden", {"states": "final norm v2", "width": 24}),
        ("hidden", {"states": HIDDEN_STATES, "width": -1}),
    ],
)
def test_a_group_in_a_later_form_is_as_one_that_is_not_known(copy, group, later):
    """Parameters that this version does not know: the other targets are read, the group is left alone."""
    entry = copy.manifest.units[0]
    unit = copy.unit(entry)
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    unit.close()
    groups = copy.spec.groups | {group: later}
    spec = copy.spec.model_copy(update={"groups": groups})
    attributes = attributes.model_copy(update={"spec": spec, "fingerprint": spec.fingerprint})
    write_unit(unit.path, arrays, attributes)
    unit = Unit(unit.path)
    assert list(audit(unit)) == []
    with pytest.raises(CacheError, match=f"has {group}, which this version cannot cut"):
        cut_unit(unit, unit.keys, spec)
    unit.close()


def test_a_unit_without_the_groups_of_its_specification_is_refused(copy):
    unit = copy.unit(copy.manifest.units[0])
    arrays, attributes = cut_unit(unit, unit.keys, copy.spec)
    groups = {name: group for name, group in attributes.groups.items() if name != "whole"}
    write_unit(unit.path, arrays, attributes.model_copy(update={"groups": groups}))
    with pytest.raises(CacheError, match="whole: expected among the groups, as the specification says"):
        Unit(unit.path)


# --- the tools


def test_a_part_has_the_bytes_of_an_extraction_of_that_part(cache, shards, teacher_folder, tmp_path):
    subset(cache, tmp_path / "layer", Selection(layers=(2,)))
    direct = make_cache(shards, teacher_folder, tmp_path / "direct", targets=EVERY, layers=(2,))
    assert tree(tmp_path / "layer" / "units") == tree(direct.folder / "units")
    subset(cache, tmp_path / "whole", Selection(fields=("maps", "predictions", "whole")))
    direct = make_cache(shards, teacher_folder, tmp_path / "direct-whole", targets=("cross", "whole"), layers=LAYERS)
    assert tree(tmp_path / "whole" / "units") == tree(direct.folder / "units")
    subset(cache, tmp_path / "plain", Selection(fields=("maps", "predictions")))
    direct = make_cache(shards, teacher_folder, tmp_path / "direct-plain", layers=LAYERS)
    assert tree(tmp_path / "plain" / "units") == tree(direct.folder / "units")
    with pytest.raises(InputError, match="expected maps together with whole, hidden and pooled"):
        subset(cache, tmp_path / "none", Selection(fields=("predictions", "hidden")))


def test_some_keys_keep_their_targets(cache, shards, tmp_path):
    keys = ("key-001", "key-006")
    subset(cache, tmp_path / "some", Selection(keys=frozenset(keys)))
    part = Cache(tmp_path / "some")
    assert verify(part.folder).sound
    pairs = [pair for pair in all_pairs(shards) if pair.key in keys]
    before, after = (CacheTargets(one, shards, LAYERS, rows=ROWS, hidden=True).targets(pairs) for one in (cache, part))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_merged_and_repaired_caches_have_the_groups(cache, shards, teacher_folder, tmp_path):
    for name in ("000000", "000001"):
        subset(cache, tmp_path / name, Selection(units=(name,)))
    merged = merge([Cache(tmp_path / "000000"), Cache(tmp_path / "000001")], tmp_path / "merged")
    assert merged.units == 2
    whole = tree(cache.folder / "units")
    assert tree(tmp_path / "merged" / "units").items() <= whole.items()
    bad = tmp_path / "merged" / "units" / "000001.zarr.zip"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    assert not verify(tmp_path / "merged").sound
    repair(tmp_path / "merged", shards=shards, teacher=str(teacher_folder))
    assert tree(tmp_path / "merged" / "units")["000001.zarr.zip"] == whole["000001.zarr.zip"]


def test_the_judge_asks_the_teacher_again(copy, shards, teacher_folder):
    report = verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert report.sound, report.findings
    assert report.recomputed.pairs == 15


def rewritten(cache, change):
    """Write the first unit again with other arrays, and bless it."""
    entry = cache.manifest.units[0]
    unit = cache.unit(entry)
    arrays, attributes = cut_unit(unit, unit.keys, cache.spec)
    change(arrays)
    unit.close()
    write_unit(unit.path, arrays, attributes)


def _other_heads(arrays):
    code = arrays.whole["t2w"].weight
    code[:] = code.flip(1)


def _other_signs(arrays):
    arrays.further["hidden/image"][:, 0] *= -1


def _infinite(arrays):
    arrays.further["hidden/text"][0, 0, 0] = np.inf


def _behind(arrays):
    counts = arrays.maps.text_tokens
    row = int(counts.argmin())
    arrays.further["hidden/text"][row, counts[row] :] = 1


def _empty(arrays):
    arrays.whole["i2w"].weight[0, 0, 0] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_infinite, "hidden/text: not finite"),
        (_behind, "hidden/text: states behind the valid tokens"),
        (_empty, "whole/i2w: rows without a weight for every key"),
    ],
)
def test_the_judge_reads_every_number(copy, change, message):
    rewritten(copy, change)
    unit = Unit(copy.folder / "units" / copy.manifest.units[0].name)
    assert any(message in problem.message for problem in audit(unit)), list(audit(unit))
    unit.close()


@pytest.mark.parametrize(("change", "message"), [(_other_heads, "t2w: "), (_other_signs, "hidden: a state is off by")])
def test_other_targets_than_the_teachers_are_found(copy, shards, teacher_folder, change, message):
    rewritten(copy, change)
    # The change is blessed: only the teacher knows.
    (copy.folder / "manifest.json").unlink()
    repair(copy.folder)
    report = verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert [finding.kind for finding in report.findings] == ["targets"]
    assert any(message in example for example in report.findings[0].examples)


def test_infinite_states_never_reach_a_batch(copy, shards):
    rewritten(copy, _infinite)
    (copy.folder / "manifest.json").unlink()
    shutil.rmtree(copy.folder / "assets", ignore_errors=True)
    unit = Unit(copy.folder / "units" / copy.manifest.units[0].name)
    with pytest.raises(CacheError, match="hidden/text is damaged"):
        unit.hidden("text")
    unit.close()


def test_states_that_float16_cannot_hold_are_refused(shards, tmp_path, save_teacher):
    large = save_teacher()
    teacher = FusionTeacher.load(large)
    with torch.no_grad():
        teacher.model.vilt.encoder.layer[2].output.dense.bias.fill_(1e5)
    teacher.model.save_pretrained(large)
    with pytest.raises(TeacherError, match="expected hidden states from the teacher that fit float16"):
        make_cache(shards, large, tmp_path / "cache", targets=("cross", "hidden"))


# --- what is said of it


def test_a_plan_counts_the_groups(shards, teacher_folder, cache, tmp_path):
    plan = plan_extraction(
        shards, str(teacher_folder), tmp_path / "new", ExtractConfig(batch_size=4, targets=EVERY, layers=LAYERS)
    )
    size = sum(entry.size for entry in cache.manifest.units)
    assert 0.8 < plan.bytes / size < 1.25
    plain = plan_extraction(shards, str(teacher_folder), tmp_path / "new", ExtractConfig(batch_size=4, layers=LAYERS))
    assert plain.bytes < plan.bytes


@pytest.mark.parametrize("codec", [{}, {"k": 4}, {"k": None, "weights": "float32"}], ids=str)
def test_what_a_disk_must_hold_counts_the_groups(shards, teacher_folder, tmp_path, codec):
    """The rough estimate is larger by more than the arrays of a group, uncompressed."""
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", targets=EVERY, layers=LAYERS, **codec)
    pairs = sum(entry.pairs for entry in cache.manifest.units)
    sizes = dict.fromkeys(("whole", "hidden"), 0)
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        for name in unit.blocks.arrays:
            group = name.split("/")[0]
            if group in sizes:
                sizes[group] += unit.array(name).nbytes
        unit.close()
    every = generous_bytes(cache.spec, 10, pairs, 3)
    for group, size in sizes.items():
        groups = {name: value for name, value in cache.spec.groups.items() if name != group}
        less = generous_bytes(cache.spec.model_copy(update={"groups": groups}), 10, pairs, 3)
        assert every - less > size > 0


def test_the_command_line_and_what_it_says(shards, teacher_folder, tmp_path):
    made = cli(
        "extract", shards[0].path.parent, "--teacher", teacher_folder, "--out", tmp_path / "cache",
        "--targets", "cross,whole,hidden", "--layers", "1,2", "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert json.loads(made.out)["pairs"] == 15
    shown = cli("inspect", tmp_path / "cache")
    assert "rows over the whole sequence, hidden states of width 24" in " ".join(shown.out.replace("│", " ").split())
    assert "rows over the whole sequence; hidden states of width 24" in (tmp_path / "cache" / "README.md").read_text()
    for targets in ("whole", "cross,cross", "cross,smell"):
        wrong = cli("extract", shards[0].path.parent, "--teacher", teacher_folder, "--out", tmp_path / "x",
                    "--targets", targets)  # fmt: skip
        assert wrong.code == 1
        assert "cross" in wrong.message
        assert "Traceback" not in wrong.err


def test_targets_of_no_layer_are_refused():
    with pytest.raises(ValueError, match="expected layers with whole, hidden and pooled"):
        ExtractConfig(targets=EVERY, layers=())


def test_the_dense_size_counts_every_row_and_state(cache):
    heads, width = 3, 24
    expected = pairs = 0
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        words, patches = unit.maps.text_tokens, unit.maps.image_tokens
        expected += int(
            (2 * heads * (2 * words * patches + (words + patches) ** 2) + 2 * width * (words + patches)).sum()
        )
        pairs += entry.pairs
        unit.close()
    assert summarise(cache).dense_bytes_a_pair == pytest.approx(expected / pairs)
