"""Two pictures a sample and encoders of Hugging Face as towers: trained from a cache as with the teacher run beside."""

import json

import numpy as np
import pytest
import torch
from encoders import letters, save_image_encoder, save_text_encoder
from pipeline import all_pairs, cli, make_cache, make_shards, whole_batch
from test_two_images import ANSWERS, EXACT, pairs_of_pictures
from test_view import Page
from transformers import ViltForImagesAndTextClassification

from dde_cache.batches import pictures_of, tokens_of
from dde_cache.distill import StudentLosses, TrainConfig, student_rows
from dde_cache.initial import load_student
from dde_cache.losses import dense_kl
from dde_cache.prepare import plan_training
from dde_cache.ready import ready_student
from dde_cache.samples import open_shards
from dde_cache.sources import CachedTargets
from dde_cache.student import Head
from dde_cache.tasks import load_task
from dde_cache.teacher import FusionTeacher

LAYER = 2
STEPS = ("--task", "nlvr2", "--steps", 4, "--batch-size", 4, "--workers", 0, "--set", "log_every=1")
PAIRS = {
    "words": {"text": "letters"},
    "patches": {"image": "dinov2"},
    "mapped": {"text": "letters", "image": "registers"},
    "dropped": {"text": "bare", "image": "siglip", "missing_tokens": "drop"},
}
"""Other tokens on either side; heads that are mapped; tokens that a side lacks."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", pairs_of_pictures(), size=4)


@pytest.fixture(scope="module")
def teacher(save_teacher):
    return save_teacher(
        ViltForImagesAndTextClassification,
        num_images=2,
        modality_type_vocab_size=3,
        id2label=dict(enumerate(ANSWERS)),
        label2id={name: number for number, name in enumerate(ANSWERS)},
    )


@pytest.fixture(scope="module")
def cache(shards, teacher, tmp_path_factory):
    return make_cache(shards, teacher, tmp_path_factory.mktemp("cache") / "cache", **EXACT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place, wide = tmp_path_factory.mktemp("encoders"), {"hidden_size": 32, "num_attention_heads": 4}
    long = {"max_position_embeddings": 66}
    return {
        "letters": save_text_encoder(place / "letters", tokenizer=letters(), **long, **wide),
        "bare": save_text_encoder(place / "bare", tokenizer=letters(opens=False), **long),
        "dinov2": save_image_encoder(place / "dinov2"),
        "registers": save_image_encoder(place / "registers", "registers", **wide),
        "siglip": save_image_encoder(place / "siglip", "siglip"),
    }


def losses(run):
    """Every loss of every step."""
    kept = ("loss", "soft", "t2i0", "t2i1", "i2t0", "i2t1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in kept] for line in lines if "loss" in line]


@pytest.mark.parametrize("pair", PAIRS)
def test_trained_from_a_cache_as_with_the_teacher_beside(shards, teacher, cache, folders, tmp_path, pair):
    """Step by step the same losses; what is saved is scored, and its scores are those of the run."""
    place, towers = shards[0].path.parent, PAIRS[pair]
    named = [side for side in ("text", "image") if side in towers]
    options = [part for side in named for part in (f"--{side}-tower", folders[towers[side]])]
    options += ["--missing-tokens", "drop"] if "missing_tokens" in towers else []
    found = {}
    for kind, targets in (("cached", ("--targets", cache.folder)), ("online", ("--teacher", teacher))):
        out = tmp_path / kind
        done = cli("train", place, *targets, "--out", out, *STEPS, *options, "--valid", place)
        assert done.code == 0, done.err
        found[kind] = losses(out)
    assert np.shape(found["cached"]) == (4, 6)
    np.testing.assert_allclose(found["cached"], found["online"], rtol=1e-5, atol=1e-5)
    assert min(abs(step[2] - step[3]) for step in found["cached"]) > 1e-4, "a loss of one picture twice would show"
    done = cli("eval", tmp_path / "cached", place, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    record = json.loads((tmp_path / "cached" / "run.json").read_text())
    assert report["overall"]["accuracy"] == pytest.approx(record["best_accuracy"])
    assert 0 <= report["metrics"]["consistency"] <= report["overall"]["accuracy"]
    assert load_student(tmp_path / "cached")[0].config.images == 2


@pytest.mark.parametrize("pair", ["mapped", "dropped"])
def test_each_picture_is_compared_with_its_own_rows(shards, teacher, cache, folders, pair):
    """The teacher's whole rows, the student's mapped ones, one picture at a time, are the oracle."""
    names = {f"{side}_tower": str(folders[PAIRS[pair][side]]) for side in ("text", "image")}
    config = TrainConfig(task="nlvr2", missing_tokens=PAIRS[pair].get("missing_tokens", "refuse"), **names)
    task, targets = load_task("nlvr2"), CachedTargets(cache)
    plan = plan_training(shards, [], targets, config, task)
    torch.manual_seed(0)
    ready = ready_student(plan, targets, config, None, Head(task.head, 2, "nlvr2"), shards)
    student, axes = ready.student.eval(), ready.matched.axes
    batch = whole_batch(shards, ready.reads, plan.labels, plan.reader, tokens=ready.tokens)
    with torch.inference_mode():
        terms = StudentLosses(config, targets, plan.mean_heads, axes)(student, batch)
        taught = FusionTeacher.load(teacher)(tokens_of(batch), pictures_of(batch), [LAYER])
        text = student.text_tower(batch["student_ids"], batch["student_mask"])
        for slot in range(2):
            image = student.image_tower(batch[f"pixels{slot}"], batch[f"grid{slot}"], slot)
            sides = [(name, side.query_key, side.mask) for name, side in (("text", text), ("image", image))]
            maps = getattr(student, "attention_maps", None)
            mapped = [(raw if maps is None else maps[0](name, raw), mask) for name, raw, mask in sides]
            for name in ("t2i", "i2t"):
                log, keys, rows = student_rows(name == "t2i", *mapped, (batch, slot), axes)
                whole = getattr(taught.attention[slot, LAYER], name) * keys[:, None, None]
                kl = dense_kl(whole / whole.sum(-1, keepdim=True).clamp_min(1e-30), log)
                expected = kl[rows[:, None].expand_as(kl)].mean()
                torch.testing.assert_close(terms[f"{name}{slot}"], expected, atol=1e-5, rtol=1e-4)


def test_both_pictures_of_such_a_student_are_on_the_page(shards, cache, folders, tmp_path):
    """Its losses there are those of training, both pictures summed."""
    place, out = shards[0].path.parent, tmp_path / "run"
    towers = ("--text-tower", folders["letters"], "--image-tower", folders["registers"])
    done = cli("train", place, "--targets", cache.folder, "--out", out, *STEPS, *towers)
    assert done.code == 0, done.err
    done = cli("view", cache.folder, place, "--run", out, "--out", tmp_path / "view.html")
    assert done.code == 0, done.err
    page = Page(tmp_path / "view.html")
    assert len(page.pairs) == len(all_pairs(open_shards(place)))
    for number, pair in enumerate(page.pairs):
        rows = [page.maps(number, slot, student=True, sparse=True) for slot in range(2)]
        means = sum(one[name, "kl"].mean() for one in rows for name in ("t2i", "i2t"))
        assert pair["score"] == pytest.approx(means, abs=3e-3)
        assert pair["student"] in ANSWERS
