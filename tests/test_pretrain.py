"""Pre-training: every loss against dense maths, two ranks as one, exact resume, and what fine-tuning takes from it."""

import json
import math
import shutil

import pytest
import torch
from conftest import randomise, vilt_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pipeline import LABELS, changed, cli, make_cache, make_shards, tree
from safetensors.torch import load_file
from test_passes import ALL, make_samples
from test_ranks import assert_same_run, metrics, on_two_ranks
from torch import nn
from transformers import ViltForImagesAndTextClassification

from dde_cache.batches import PairDataset
from dde_cache.configs import resolve_config
from dde_cache.contrast import Everyone, contrastive_sum
from dde_cache.distill import StudentLosses, TrainConfig
from dde_cache.errors import CacheError, InputError, RunError
from dde_cache.fit import Progress
from dde_cache.inference import Student
from dde_cache.initial import announced, build_student
from dde_cache.passes import UNMASKED, of_pass
from dde_cache.prepare import labels_only
from dde_cache.pretext import (
    Pretrainer,
    gumbel,
    hard_negatives,
    matching_logits,
    word_logits,
)
from dde_cache.pretrain import pretrain
from dde_cache.pretraining import PretrainConfig, PretrainLosses, passes_of
from dde_cache.ranks import Ranks
from dde_cache.sources import CachedTargets, LabelsOnly, OnlineTargets
from dde_cache.stream import PairTable
from dde_cache.student import DualEncoder, Head, new_student
from dde_cache.targets import CacheTargets
from dde_cache.train import train

LAYER = 2
EXACT = {"weights": "float32", "k": None, "passes": ALL, "queries": "all"}
SETTINGS = {
    "steps": 6, "batch_size": 7, "workers": 0, "log_every": 1, "save_every": 100, "valid_every": 3,
    "queries": "all", "learning_rate": 1e-3, "eps": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Without labels."""
    samples = [
        changed(one, texts=tuple(text.model_copy(update={"label": None}) for text in one.texts))
        for one in make_samples(12)
    ]
    return make_shards(tmp_path_factory.mktemp("shards") / "train", samples, size=6)


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "cache", **EXACT)


def pretrainer(seed=5):
    student = new_student(vilt_config(hidden_dropout_prob=0.0), (), head=Head("pretraining"))
    model = randomise(Pretrainer(student), seed).eval()
    with torch.no_grad():
        student.logit_scale.fill_(math.log(3.0))
    return model


# Dense maths.


@st.composite
def everyones(draw):
    """Pairs of two ranks, the second with padding; pictures and texts come several times."""
    most, width = draw(st.integers(1, 5)), 6
    counts = most, draw(st.integers(1, most))
    rank = draw(st.integers(0, 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    valid = torch.cat([torch.arange(most) < count for count in counts])
    text, image = (torch.randn(2 * most, width, generator=generator) * valid[:, None] for _ in range(2))
    ids = [torch.tensor(draw(st.lists(st.integers(1, 4), min_size=2 * most, max_size=2 * most))) for _ in range(2)]
    own = slice(rank * most, rank * most + counts[rank])
    return Everyone(text, image, ids[0] * valid, ids[1] * valid, valid, own)


def belongs(one, side, i, j):
    """Whether some pair has the text (side 0) or picture (side 1) of pair i, and the picture or text of pair j."""
    own, other = (one.text_id, one.picture_id) if side == 0 else (one.picture_id, one.text_id)
    return any(
        bool(one.valid[k]) and int(own[k]) == int(own[i]) and int(other[k]) == int(other[j])
        for k in range(len(one.valid))
    )


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@given(everyones(), st.floats(0.5, 20))
def test_contrast_is_cross_entropy_with_an_even_target(one, scale):
    rows = [number for number in range(len(one.valid)) if one.valid[number]]
    expected = 0.0
    for i in range(one.own.start, one.own.stop):
        for side, (own, others) in enumerate(((one.text, one.image), (one.image, one.text))):
            chances = {j: math.exp(scale * cosine(own[i], others[j])) for j in rows}
            right = [j for j in rows if belongs(one, side, i, j)]
            expected -= sum(math.log(chances[j] / sum(chances.values())) for j in right) / len(right) / 2
    assert float(contrastive_sum(one, torch.tensor(scale))) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@given(everyones(), st.floats(0.5, 20))
def test_hard_negatives_never_belong_to_the_pair(one, scale):
    drawn, found = hard_negatives(one, torch.tensor(scale))
    again, _ = hard_negatives(one, torch.tensor(scale))
    assert torch.equal(drawn, again)
    rows = [number for number in range(len(one.valid)) if one.valid[number]]
    for number, i in enumerate(range(one.own.start, one.own.stop)):
        strange = [any(not belongs(one, side, i, j) for j in rows) for side in (0, 1)]
        assert bool(found[number]) == all(strange)
        if found[number]:
            for side, j in enumerate(drawn[:, number].tolist()):
                assert j in rows
                assert not belongs(one, side, i, j)


def test_hard_negatives_come_as_often_as_they_are_near():
    """Over many texts with one vector: shares of pictures are the softmax of their similarities."""
    count, generator = 3000, torch.Generator().manual_seed(1)
    text = torch.tensor([[1.0, 0.0]]).repeat(count + 3, 1)
    near = torch.tensor([0.9, 0.5, -0.2])
    image = torch.stack([near, (1 - near**2).sqrt()], -1)
    ids = torch.randint(-(2**62), 2**62, (count + 3,), generator=generator)
    one = Everyone(
        text,
        torch.cat([torch.tensor([[1.0, 0.0]]).repeat(count, 1), image]),
        ids,
        torch.cat([torch.full((count,), 7), torch.tensor([1, 2, 3])]),
        torch.ones(count + 3, dtype=torch.bool),
        slice(0, count),
    )
    drawn, _ = hard_negatives(one, torch.tensor(2.0))
    shares = torch.bincount(drawn[0] - count, minlength=3) / count
    torch.testing.assert_close(shares, (2 * near).softmax(0), atol=0.04, rtol=0)


def test_the_noise_is_gumbels_and_a_function_of_the_pair():
    generator = torch.Generator().manual_seed(0)
    own, others = (torch.randint(-(2**63), 2**63 - 1, (300,), generator=generator) for _ in range(2))
    noise = gumbel(own, others)
    # Distribution function exp(-exp(-x)), at some places: five deviations of 90,000 draws are 0.0083.
    for place in (-1.0, 0.0, 1.0, 3.0):
        assert float((noise < place).float().mean()) == pytest.approx(math.exp(-math.exp(-place)), abs=0.0083)
    order = torch.randperm(300, generator=generator)
    assert torch.equal(gumbel(own[order], others), noise[order])
    assert not torch.equal(gumbel(others, own), noise.T)
    neighbours = gumbel(torch.arange(200), torch.arange(200))
    assert abs(float(torch.corrcoef(torch.stack([neighbours[:-1].flatten(), neighbours[1:].flatten()]))[0, 1])) < 0.03


def test_matching_and_words_by_hand():
    model, width = pretrainer(), 24
    generator = torch.Generator().manual_seed(3)
    text, image = (torch.randn(5, width, generator=generator) for _ in range(2))
    ids = torch.tensor([1, 2, 3, 3, 4]), torch.tensor([1, 1, 2, 3, 4])
    one = Everyone(text, image, *ids, torch.ones(5, dtype=torch.bool), slice(0, 5))
    scale = torch.tensor(3.0)
    logits, labels = matching_logits(model, one, scale)
    (pictures, texts), found = hard_negatives(one, scale)
    assert found.all()
    assert labels.tolist() == [1] * 5 + [0] * 10
    rows = (
        [(i, i) for i in range(5)] + [(i, int(pictures[i])) for i in range(5)] + [(int(texts[i]), i) for i in range(5)]
    )
    for row, (t, v) in enumerate(rows):
        fused = model.student.fusion(torch.cat([text[t], image[v]])[None])
        torch.testing.assert_close(logits[row : row + 1], model.matching(fused))
    alone = Everyone(text[:1], image[:1], ids[0][:1], ids[1][:1], torch.ones(1, dtype=torch.bool), slice(0, 1))
    assert matching_logits(model, alone, scale)[1].tolist() == [1, UNMASKED, UNMASKED], "no strange pair in the batch"

    states = torch.randn(5, 4, width, generator=generator)
    guess = torch.full((5, 4), UNMASKED)
    guess[1, 2], guess[4, 0] = 7, 9
    found_logits, words = word_logits(model, states, image, guess)
    embedding = model.student.text_tower.text_embeddings.word_embeddings.weight
    for row, (b, t) in enumerate(((1, 2), (4, 0))):
        hidden = states[b, t] + model.condition.weight @ image[b]
        linear, _, norm = model.transform
        hidden = norm(nn.functional.gelu(linear.weight @ hidden + linear.bias))
        torch.testing.assert_close(found_logits[row], embedding @ hidden + model.word_bias)
    assert words.tolist() == [7, 9]


def whole(shards, cache, targets, reader, numbers=None, full=True):
    table = PairTable.of(shards)
    dataset = PairDataset(
        shards, table, cache.preprocessor(), (), reader, full_text=full, passes=ALL, beside=ALL[1:], partners=reader,
        identities=True,
    )  # fmt: skip
    return dataset.__getitems__(list(range(len(table))) if numbers is None else numbers)


@pytest.mark.parametrize("queries", ["valid", "all"])
def test_the_attention_of_each_pass_is_that_of_fine_tuning_on_what_it_shows(shards, cache, teacher, queries):
    """And from the cache it is what the teacher gives on the very batch: masked texts, strange pictures."""
    every = queries == "all"
    config = PretrainConfig(queries=queries, contrastive_weight=0.0)
    model = pretrainer()
    reader = CacheTargets(cache, shards, LAYER, passes=(0, 1, 2), padded_queries=every)
    batch = whole(shards, cache, None, reader, full=every)
    single = TrainConfig(queries=queries, soft_weight=0.0)
    values = {}
    for name, targets in (("cache", CachedTargets(cache)), ("teacher", OnlineTargets(teacher, LAYER))):
        values[name] = PretrainLosses(config, targets, False, ALL, Ranks())(model, batch)
        for each in ALL:
            expected = StudentLosses(single, targets, False)(model.student, of_pass(batch, each))
            for part in ("t2i", "i2t"):
                term = part if each == "matched" else f"{each}.{part}"
                torch.testing.assert_close(values[name][term], expected[part], rtol=1e-5, atol=1e-6)
    assert values["cache"].keys() == values["teacher"].keys()
    for term, value in values["cache"].items():
        torch.testing.assert_close(value, values["teacher"][term], rtol=1e-5, atol=1e-5)
    maps = [float(values["cache"][term].detach()) for term in ("t2i", "masked.t2i", "negative.t2i")]
    assert len({round(value, 4) for value in maps}) == 3, "passes differ"


def test_the_loss_is_the_weighted_sum_and_figures_have_no_weight(shards, cache):
    weights = {"contrastive": 0.5, "matching": 2.0, "language": 3.0, "attention": 0.25}
    config = PretrainConfig(queries="valid", **{f"{name}_weight": value for name, value in weights.items()})
    reader = CacheTargets(cache, shards, LAYER, passes=(0, 1, 2))
    batch = whole(shards, cache, None, reader, full=False)
    with torch.no_grad():
        losses = PretrainLosses(config, CachedTargets(cache), False, ALL, Ranks())(pretrainer(), batch)
    attention = sum(float(value) for name, value in losses.items() if name.endswith(("t2i", "i2t")))
    expected = sum(weights[name] * float(losses[name]) for name in ("contrastive", "matching", "language"))
    assert float(losses["loss"]) == pytest.approx(expected + 0.25 * attention, rel=1e-5)
    assert float(losses["temperature"]) == pytest.approx(1 / 3)
    assert 0 <= float(losses["matching_accuracy"]) <= 1
    assert 0 <= float(losses["language_accuracy"]) <= 1
    assert set(losses) == {
        "loss", "contrastive", "temperature", "matching", "matching_accuracy", "language", "language_accuracy",
        *(f"{name}{way}" for name in ("", "masked.", "negative.") for way in ("t2i", "i2t")),
    }  # fmt: skip


def test_what_has_no_weight_is_not_there(shards, cache):
    config = PretrainConfig(matching_weight=0.0, language_weight=0.0, attention_weight=0.0)
    targets = CachedTargets(cache)
    assert passes_of(targets, config) == ()
    losses = PretrainLosses(config, targets, False, (), Ranks())
    assert set(losses.terms) == {"contrastive", "temperature"}
    assert passes_of(targets, PretrainConfig(passes=["negative", "matched"])) == ("matched", "negative")
    assert passes_of(targets, PretrainConfig()) == ALL


# Whole runs.


@pytest.fixture(scope="module")
def done(shards, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("done") / "run"
    pretrain(shards, CachedTargets(cache), out, PretrainConfig(**SETTINGS), valid=shards)
    return out


def arguments(shards, cache, out, **changes):
    settings = [part for name, value in (SETTINGS | changes).items() for part in ("--set", f"{name}={value}")]
    folder = shards[0].path.parent
    options = ["--stage", "pretrain", "--targets", cache.folder, "--valid", folder, "--out", out]
    return ["train", folder, *options, *settings]


def test_two_ranks_are_one(shards, cache, done, tmp_path):
    """A batch of 7: the ranks have 3 and 4 pairs. Losses and weights to 1e-6, through the gathered vectors too."""
    out = tmp_path / "run"
    on_two_ranks(tmp_path, *arguments(shards, cache, out))
    assert_same_run(out, done)
    assert {"contrastive", "masked.t2i", "temperature"} <= metrics(done)[0].keys()


def test_resumed_is_uninterrupted_with_heads_and_temperature(shards, cache, done, tmp_path):
    class Stopped(Exception):
        pass

    def stop(step, _record):
        if step == 4:
            raise Stopped

    out, config = tmp_path / "run", PretrainConfig(**SETTINGS | {"save_every": 3})
    with pytest.raises(Stopped):
        pretrain(shards, CachedTargets(cache), out, config, valid=shards, progress=Progress(step=stop))
    held = load_file(out / "checkpoints" / "00000003" / "model.safetensors")
    assert {"student.logit_scale", "matching.weight", "word_bias", "condition.weight", "transform.0.weight"} <= set(
        held
    )
    resumed = cli(*arguments(shards, cache, out, save_every=3, workers=1), "--resume")
    assert resumed.code == 0, resumed.err
    assert metrics(out) == metrics(done)
    assert tree(out / "model") == tree(done / "model")
    last = f"{SETTINGS['steps']:08d}/model.safetensors"
    assert tree(out / "checkpoints")[last] == tree(done / "checkpoints")[last]


def test_a_run_says_its_stage_and_goes_on_in_no_other(shards, cache, done, teacher_folder):
    record = json.loads((done / "run.json").read_text())
    assert (record["stage"], record["task"], record["labels"]) == ("pretrain", "retrieval", [])
    assert json.loads((done / "inputs.json").read_text())["stage"] == "pretrain"
    folder = shards[0].path.parent
    other = cli("train", folder, "--targets", cache.folder, "--out", done, "--resume", "--batch-size", 4)
    assert other.code == 1
    assert "--resume needs what the run was begun with" in other.message
    figures = [line for line in metrics(done) if "valid_accuracy" in line]
    assert [line["step"] for line in figures] == [3, 6]
    for line in figures:
        assert line["valid_accuracy"] == pytest.approx((line["valid_t2i_r1"] + line["valid_i2t_r1"]) / 2)
    best = max(line["valid_accuracy"] for line in figures)
    scored = json.loads(cli("eval", done, folder, "--json").out)["metrics"]
    assert (scored["t2i_r1"] + scored["i2t_r1"]) / 2 == pytest.approx(best)


def test_losses_go_down_and_pairs_are_found(shards, save_teacher, tmp_path):
    """Twelve samples can be learned by heart: each text finds its picture, hidden words are guessed."""
    cache = make_cache(shards, save_teacher(initializer_range=0.2), tmp_path / "cache", passes=ALL)
    config = PretrainConfig(
        steps=150, batch_size=12, learning_rate=3e-3, workers=0, log_every=10, valid_every=150, save_every=500
    )
    pretrain(shards, CachedTargets(cache), tmp_path / "run", config, valid=shards)
    lines = metrics(tmp_path / "run")
    first, last, valid = lines[0], lines[-2], lines[-1]
    for name in ("contrastive", "matching", "language", "t2i", "i2t", "masked.t2i", "negative.t2i"):
        assert last[name] < 0.8 * first[name], name
    assert last["matching_accuracy"] > 0.9
    assert last["language_accuracy"] > first["language_accuracy"]
    assert last["temperature"] != first["temperature"]
    assert valid["valid_t2i_r1"] > 0.7


def test_labels_only_and_the_online_teacher(shards, cache, teacher, tmp_path):
    config = PretrainConfig(**SETTINGS | {"steps": 2})
    alone = LabelsOnly(cache.preprocessor(), teacher.config, ())
    pretrain(shards, alone, tmp_path / "alone", config)
    assert not {"t2i", "masked.t2i"} & set(metrics(tmp_path / "alone")[0])
    online = config.model_copy(update={"passes": ALL})
    pretrain(shards, OnlineTargets(teacher, LAYER), tmp_path / "online", online)
    pretrain(shards, CachedTargets(cache), tmp_path / "cached", config)
    for one, other in zip(metrics(tmp_path / "online"), metrics(tmp_path / "cached"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_views_and_passes_together(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", passes=ALL, views=2, view="crop")
    config = PretrainConfig(**SETTINGS | {"queries": "valid", "steps": 8})
    pretrain(shards, CachedTargets(cache), tmp_path / "run", config)
    assert len(metrics(tmp_path / "run")) == 8


def test_other_records_of_the_teacher_are_learned_in_every_pass(shards, teacher_folder, teacher, tmp_path):
    """Rows over the whole sequence, hidden states and two layers, from the cache and from the teacher itself."""
    kept = {"layers": (1, LAYER), "targets": ("cross", "whole", "hidden")}
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", **EXACT | kept)
    choices = {"attention": "whole", "layer_map": "1:1,2:2", "hidden_weight": 1.0, "steps": 2, "passes": ALL}
    config = PretrainConfig(**SETTINGS | choices)
    pretrain(shards, CachedTargets(cache), tmp_path / "cached", config)
    pretrain(shards, OnlineTargets(teacher, LAYER), tmp_path / "online", config)
    one, other = (metrics(tmp_path / name) for name in ("cached", "online"))
    assert {f"{name}{row}@{layers}" for name in ("", "masked.", "negative.") for row in ("t2w", "i2w", "hidden")
            for layers in ("1:1", "2:2")} <= one[0].keys()  # fmt: skip
    for cached, online in zip(one, other, strict=True):
        # Hidden states are stored in 16 bits.
        assert cached == pytest.approx(online, rel=2e-3, abs=1e-4)


# Fine-tuning from it.


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, teacher_folder):
    folder = tmp_path_factory.mktemp("labelled")
    shards = make_shards(folder / "train", make_samples(12, seed=2), size=6)
    return shards, make_cache(shards, teacher_folder, folder / "cache")


def test_fine_tuning_takes_towers_and_interaction(labelled, done, tmp_path):
    shards, cache = labelled
    out = tmp_path / "run"
    options = ["--targets", cache.folder, "--out", out, "--batch-size", 4, "--workers", 0]
    still = ["--steps", 1, "--learning-rate", 1e-30]
    ended = cli("train", shards[0].path.parent, *options, *still, "--init", done)
    assert ended.code == 0, ended.err
    assert "text tower, image tower, shallow interaction; new: classifier" in ended.message
    before, after = (load_file(run / "model" / "model.safetensors") for run in (done, out))
    assert {name.partition(".")[0] for name in after} == {"text_tower", "image_tower", "fusion", "head"}
    for name, tensor in after.items():
        if not name.startswith("head."):
            torch.testing.assert_close(tensor, before[name], msg=name)
    assert {name.partition(".")[0] for name in before} == {"text_tower", "image_tower", "fusion", "logit_scale"}
    assert DualEncoder.from_pretrained(out / "model").config.num_labels == len(LABELS)


def test_what_each_head_takes(done):
    assert "text tower, image tower, temperature; new: nothing" in announced(str(done), Head("similarity"))
    every = "text tower, image tower, shallow interaction, temperature; new: nothing"
    assert every in announced(str(done), Head("pretraining"))
    assert "text tower, image tower, shallow interaction; new: classifier" in announced(str(done), Head())


@pytest.mark.parametrize("change", [{"hidden_size": 36}, {"num_hidden_layers": 2}, {"image_size": 48}], ids=str)
def test_another_architecture_is_refused(change, done, save_teacher, tmp_path):
    shards = make_shards(tmp_path / "train", make_samples(6))
    cache = make_cache(shards, save_teacher(**change), tmp_path / "cache")
    config = TrainConfig(steps=1, batch_size=2, workers=0)
    [(name, value)] = change.items()
    with pytest.raises(RunError, match=f"{name}: expected {value}"):
        train(shards, CachedTargets(cache), tmp_path / "run", config, init=str(done))


def test_a_damaged_run_is_refused(labelled, done, tmp_path):
    shards, cache = labelled
    broken = shutil.copytree(done, tmp_path / "broken")
    (broken / "model" / "model.safetensors").write_bytes(b"no")
    ended = cli("train", shards[0].path.parent, "--targets", cache.folder, "--out", tmp_path / "x", "--init", broken)
    assert ended.code == 1
    assert "expected a student of `dde-cache train`" in ended.message


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["accumulate=2"], "accumulate 1"),
        (["soft_weight=1"], "soft_weight"),
        (["passes=[masked]"], "matched"),
        (["contrastive_weight=0", "matching_weight=0", "language_weight=0", "attention_weight=0"], "at least one of"),
        (["task=vqa"], "task"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        resolve_config(PretrainConfig, None, settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "pretrain", "--task", "vqa"], "no labels"),
        (["--stage", "pretrain", "--preset", "dide"], "no labels"),
        (["--passes", "matched"], "--stage pretrain alone"),
        (["--stage", "both"], "--stage pretrain or finetune"),
        (["--stage", "pretrain", "--passes", "matched,other"], "passes"),
        (
            ["--stage", "pretrain", "--passes", "matched", "--set", "attention_weight=0"],
            "passes with attention or hidden",
        ),
        (["--stage", "pretrain", "--passes", "matched, negative", "--batch-size", "999"], "at least one batch of 999"),
        (["--stage", "pretrain", "--set", "head_learning_rate_factor=10"], "head_learning_rate_factor"),
        (["--stage", "pretrain", "--passes", ""], "passes"),
    ],
)
def test_options_of_another_stage(options, message, shards, cache, tmp_path):
    ended = cli("train", shards[0].path.parent, "--targets", cache.folder, "--out", tmp_path / "x", *options)
    assert ended.code == 1
    assert message in ended.message
    assert not (tmp_path / "x").exists()


def test_a_pass_that_the_cache_lacks_is_refused(labelled, tmp_path):
    shards, cache = labelled
    config = PretrainConfig(**SETTINGS | {"passes": ("matched", "negative"), "queries": "valid"})
    with pytest.raises(CacheError, match=r"it has matched; extract with --passes matched,negative"):
        pretrain(shards, CachedTargets(cache), tmp_path / "x", config)
    assert not (tmp_path / "x").exists()


def test_passes_without_a_teacher_are_refused(labelled, tmp_path):
    shards, cache = labelled
    config = PretrainConfig(**SETTINGS | {"passes": ("matched",)})
    with pytest.raises(InputError, match="expected passes with a cache or a teacher"):
        pretrain(shards, labels_only(cache), tmp_path / "x", config)


def test_two_images_a_sample_are_refused(save_teacher, tmp_path):
    samples = [changed(one, images=one.images * 2) for one in make_samples(6)]
    shards = make_shards(tmp_path / "two", samples)
    folder = save_teacher(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3)
    cache = make_cache(shards, folder, tmp_path / "cache")
    with pytest.raises(InputError, match="expected samples with 1 image"):
        pretrain(shards, CachedTargets(cache), tmp_path / "x", PretrainConfig(steps=1, batch_size=2))


def test_a_second_picture_starts_as_the_first(done, teacher):
    """Nobody has trained what marks a second picture: random numbers beside a trained mark would set it apart."""
    student = build_student(teacher.config, ("no", "yes"), 0.0, str(done), Head("classes", 2, "nlvr2"))
    first, second = student.image_tower.token_type.detach()[:2]
    assert torch.equal(first, second)
    assert first.abs().max() > 0


def test_retrieval_in_micro_batches_is_refused(shards, cache, tmp_path):
    """Each would be contrasted with itself alone."""
    config = TrainConfig(task="retrieval", soft_weight=0.0, hard_weight=1.0, batch_size=8, accumulate=2)
    with pytest.raises(InputError, match="expected accumulate 1"):
        train(shards, CachedTargets(cache), tmp_path / "run", config)


def test_a_pretrained_student_compares_vectors(done):
    student = Student.from_pretrained(done)
    assert student.compares
    texts = student.encode_texts(["red ?", "is blue"])
    assert student.similarity(texts, student.encode_images([Image.new("RGB", (24, 24))])).shape == (2, 1)
    with pytest.raises(RunError):
        student.answer(texts, texts)
