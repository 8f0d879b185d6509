"""Two pictures a sample: the text encoded once, attention of both summed, cached training equal to online training."""

import json

import numpy as np
import pytest
import torch
from conftest import picture, randomise, vilt_config
from pipeline import all_pairs, cli, make_cache, make_samples, make_shards, png, whole_batch
from transformers import ViltForImagesAndTextClassification, ViltModel

from dde_cache.batches import pictures_of, tokens_of
from dde_cache.distill import StudentLosses, TrainConfig
from dde_cache.errors import CacheError, InputError
from dde_cache.evaluate import evaluate, load_subject
from dde_cache.losses import dense_kl, log_attention
from dde_cache.samples import Sample
from dde_cache.sources import CachedTargets, LabelsOnly, OnlineTargets
from dde_cache.student import Head, new_student, student_from_vilt
from dde_cache.targets import CacheTargets
from dde_cache.teacher import FusionTeacher
from dde_cache.train import train

LAYER = 2
ANSWERS = ("False", "True")
QUICK = {"steps": 3, "batch_size": 4, "workers": 0, "log_every": 1}


def pairs_of_pictures(count=6, seed=0):
    """The second picture is another one, of another size."""
    return [
        Sample(
            one.key,
            (*one.images, png(picture(*((36, 24), (12, 36), (24, 24))[number % 3], seed=900 + number))),
            tuple(
                text.model_copy(
                    update={
                        "label": ANSWERS[(number + slot) % 2],
                        "meta": {"identifier": f"dev-{number // 2}-{number % 2}-{slot}"},
                    }
                )
                for slot, text in enumerate(one.texts)
            ),
        )
        for number, one in enumerate(make_samples(count, seed))
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", pairs_of_pictures(), size=4)


@pytest.fixture(scope="module")
def folder(save_teacher):
    return save_teacher(
        ViltForImagesAndTextClassification,
        num_images=2,
        modality_type_vocab_size=3,
        id2label=dict(enumerate(ANSWERS)),
        label2id={name: number for number, name in enumerate(ANSWERS)},
    )


@pytest.fixture(scope="module")
def teacher(folder):
    return FusionTeacher.load(folder)


@pytest.fixture(scope="module")
def caches(shards, folder, tmp_path_factory):
    made = {}

    def cache(**config):
        name = str(sorted(config.items()))
        if name not in made:
            made[name] = make_cache(shards, folder, tmp_path_factory.mktemp("cache") / "cache", **config)
        return made[name]

    return cache


@pytest.fixture(scope="module")
def student(folder):
    tower = vilt_config(modality_type_vocab_size=3)
    return randomise(new_student(tower, ANSWERS, head=Head("classes", 2, "nlvr2")), seed=5).eval()


EXACT = {"k": None, "weights": "float32", "queries": "all"}


@pytest.mark.parametrize("queries", ["valid", "all"])
def test_cached_training_is_online_training(student, shards, teacher, caches, queries):
    cache, every = caches(**EXACT), queries == "all"
    config = TrainConfig(task="nlvr2", queries=queries, hard_weight=0.5)
    reader = CacheTargets(cache, shards, LAYER, padded_queries=every)
    batch = whole_batch(shards, cache.preprocessor(), ANSWERS, reader, full_text=every)
    plain = whole_batch(shards, teacher.preprocessor, ANSWERS, full_text=every)
    found = []
    for targets, one in ((CachedTargets(cache), batch), (OnlineTargets(teacher, LAYER), plain)):
        student.zero_grad()
        terms = StudentLosses(config, targets, False)(student, one)
        terms["loss"].backward()
        gradients = {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}
        found.append(({name: float(value.detach()) for name, value in terms.items()}, gradients))
    (cached, gradient), (online, expected) = found
    assert cached == pytest.approx(online, rel=1e-5)
    assert gradient.keys() == expected.keys()
    assert "image_tower.token_type" in gradient
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-5, atol=1e-5)


def test_the_attention_loss_is_the_sum_of_both_pictures_dense_losses(student, shards, teacher, caches):
    cache = caches(**EXACT)
    batch = whole_batch(shards, cache.preprocessor(), ANSWERS, CacheTargets(cache, shards, LAYER))
    terms = StudentLosses(TrainConfig(task="nlvr2"), CachedTargets(cache), False)(student, batch)
    taught = teacher(tokens_of(batch), pictures_of(batch), [LAYER])
    with torch.no_grad():
        text = student.text_tower(batch["input_ids"], batch["attention_mask"])
        images = [student.image_tower(batch[f"pixels{slot}"], batch[f"grid{slot}"], slot) for slot in range(2)]
    expected = {"t2i": [], "i2t": []}
    for slot, image in enumerate(images):
        maps = taught.attention[slot, LAYER]
        for way, query, key, target in (("t2i", text, image, maps.t2i), ("i2t", image, text, maps.i2t)):
            rows = dense_kl(target, log_attention(query.query_key.query, key.query_key.key, key.mask))
            valid = query.mask[:, None].expand_as(rows)
            expected[way].append(float(rows[valid].mean()))
    for way, (first, second) in expected.items():
        assert abs(first - second) > 1e-3, "a loss of one picture twice would show"
        assert float(terms[f"{way}0"].detach()) == pytest.approx(first, rel=1e-5)
        assert float(terms[f"{way}1"].detach()) == pytest.approx(second, rel=1e-5)
    total = sum(float(terms[name].detach()) for name in ("t2i0", "t2i1", "i2t0", "i2t1", "soft"))
    assert float(terms["loss"].detach()) == pytest.approx(total, rel=1e-6)


def test_each_picture_gets_its_own_targets(shards, teacher, caches):
    """The teacher alone with one pair is the oracle; also from a shuffled order and with the default weights."""
    cache = caches(**EXACT)
    pairs = all_pairs(shards)
    order = np.random.default_rng(0).permutation(len(pairs))
    batch = CacheTargets(cache, shards, LAYER).targets([pairs[number] for number in order])
    plain = whole_batch(shards, teacher.preprocessor, ANSWERS)
    taught = teacher(tokens_of(plain), pictures_of(plain), [LAYER])
    for slot, suffix in enumerate(("", "1")):
        assert torch.equal(batch[f"grid{suffix}"], plain[f"grid{slot}"][order])
        index, weight = batch[f"t2i{suffix}.index"].long(), batch[f"t2i{suffix}.weight"].float()
        expected = taught.attention[slot, LAYER].t2i[order]
        dense = torch.zeros_like(expected).scatter_add(-1, index, weight)
        for row, words in enumerate(plain["attention_mask"].sum(-1)[order].tolist()):
            torch.testing.assert_close(dense[row, :, :words], expected[row, :, :words], atol=1e-5, rtol=0)


def test_swapped_pictures_are_noticed(shards, caches, tmp_path):
    cache = caches(**EXACT)
    swapped = make_shards(
        tmp_path / "s", [Sample(one.key, one.images[::-1], one.texts) for one in pairs_of_pictures()], size=4
    )
    with pytest.raises(CacheError, match="its picture or texts are not those"):
        whole_batch(swapped, cache.preprocessor(), ANSWERS, CacheTargets(cache, swapped, LAYER))


def test_the_second_grid_is_compared_too(shards, caches, monkeypatch):
    cache = caches(**EXACT)
    right = CacheTargets.targets
    monkeypatch.setattr(
        CacheTargets, "targets", lambda self, pairs: (b := right(self, pairs)) | {"grid1": b["grid1"].flip(-1)}
    )
    with pytest.raises(CacheError, match="the teacher saw patch grid of image 1"):
        whole_batch(shards, cache.preprocessor(), ANSWERS, CacheTargets(cache, shards, LAYER))


def test_towers_of_the_second_picture_start_from_the_first_ones(folder, save_teacher):
    """Token type 2 is the checkpoint's, or a copy of 1 where it has none (DiDE)."""
    three = student_from_vilt(folder, ANSWERS, head=Head("classes", 2))
    assert not torch.equal(three.image_tower.token_type[0], three.image_tower.token_type[1])
    two = student_from_vilt(save_teacher(ViltModel), ANSWERS, head=Head("classes", 2))
    assert torch.equal(two.image_tower.token_type[0], two.image_tower.token_type[1])
    assert three.head[0].in_features == 2 * vilt_config().hidden_size


def test_the_order_of_the_pictures_matters(student, shards, teacher):
    batch = whole_batch(shards, teacher.preprocessor, ANSWERS)
    one = [batch["pixels0"], batch["grid0"]]
    two = [batch["pixels1"], batch["grid1"]]
    texts = [batch["input_ids"], batch["attention_mask"]]
    assert (student(*texts, *one, *two).logits - student(*texts, *two, *one).logits).abs().max() > 1e-3
    with pytest.raises(InputError, match="expected 2 images a sample for this student, got 1"):
        student(*texts, *one)


def test_a_run_by_the_command_line(shards, folder, caches, tmp_path):
    cache = caches()
    data = shards[0].path.parent
    options = ["--task", "nlvr2", "--steps", 3, "--batch-size", 4, "--workers", 0, "--valid", data]
    done = cli("train", data, "--targets", cache.folder, "--out", tmp_path / "run", *options)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run/run.json").read_text())["task"] == "nlvr2"
    assert json.loads((tmp_path / "run/model/config.json").read_text())["images"] == 2
    done = cli("eval", tmp_path / "run", data, "--targets", cache.folder, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert 0 <= report["metrics"]["consistency"] <= report["overall"]["accuracy"] <= 1
    assert report["overall"]["agreement"] is not None
    done = cli("eval", folder, data, "--task", "nlvr2")
    assert done.code == 0, done.err
    assert "consistency" in done.out
    done = cli("eval", tmp_path / "run", data, "--task", "vqa")
    assert done.code == 1
    assert "expected --task nlvr2, for which it was trained, got vqa" in done.message
    done = cli("train", data, "--targets", "none", "--like", folder, "--out", tmp_path / "plain", *options)
    assert done.code == 0, done.err


def test_a_number_of_pictures_that_does_not_fit(shards, caches, teacher_folder, tmp_path):
    single = make_shards(tmp_path / "single", make_samples(4))
    cache = make_cache(single, teacher_folder, tmp_path / "cache")
    with pytest.raises(InputError, match="expected samples with 2 images for this task and teacher, got 1"):
        train(single, CachedTargets(cache), tmp_path / "run", TrainConfig(task="nlvr2", **QUICK))
    with pytest.raises(InputError, match="expected samples with 2 images for this task and teacher, got 1"):
        train(shards, CachedTargets(caches()), tmp_path / "run", TrainConfig(**QUICK), valid=single)
    assert not (tmp_path / "run").exists()


def test_classification_takes_pairs_of_pictures_too(shards, caches, tmp_path):
    train(shards, CachedTargets(caches()), tmp_path / "run", TrainConfig(**QUICK))
    found = evaluate(load_subject(str(tmp_path / "run")), shards)
    assert found.overall.pairs == len(all_pairs(shards))
    assert found.metrics == {}


# --- retrieval by the same road: from targets of a teacher without a task head


def test_retrieval_from_a_teacher_without_answers(save_teacher, tmp_path):
    samples = [
        Sample(one.key, one.images, tuple(text.model_copy(update={"label": None}) for text in one.texts))
        for one in make_samples(6)
    ]
    shards = make_shards(tmp_path / "shards", samples)
    cache = make_cache(shards, save_teacher(ViltModel), tmp_path / "cache")
    options = ["--task", "retrieval", "--steps", 2, "--batch-size", 4, "--workers", 0, "--valid", tmp_path / "shards"]
    done = cli("train", tmp_path / "shards", "--targets", cache.folder, "--out", tmp_path / "run", *options)
    assert done.code == 0, done.err
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert "valid_accuracy" in first
    # Batches of 2 cut samples of three texts; whatever the batches, the ranking is one.
    reports = [evaluate(load_subject(str(tmp_path / "run")), shards, batch_size=size) for size in (2, 5, 256)]
    assert reports[0] == reports[1] == reports[2]
    assert set(reports[0].metrics) == {f"{way}_r{recall}" for way in ("t2i", "i2t") for recall in (1, 5, 10)}
    assert reports[0].metrics["t2i_r10"] == 1, "there are six pictures"
    assert reports[0].overall.pairs == len(all_pairs(shards))
    with pytest.raises(InputError, match="task retrieval has no soft labels"):
        train(shards, CachedTargets(cache), tmp_path / "soft", TrainConfig(task="retrieval", **QUICK))
    with pytest.raises(InputError, match="evaluate a run, not a teacher"):
        evaluate(load_subject(str(save_teacher()), task="retrieval"), shards)


def test_labels_only_of_retrieval_needs_no_answers(save_teacher, tmp_path):
    shards = make_shards(tmp_path / "shards", make_samples(6))
    teacher = FusionTeacher.load(save_teacher(ViltModel))
    targets = LabelsOnly(teacher.preprocessor, teacher.config, ())
    config = TrainConfig(task="retrieval", soft_weight=0, hard_weight=1, **QUICK)
    record = train(shards, targets, tmp_path / "run", config)
    assert (record.task, record.labels) == ("retrieval", ())
