"""Several teachers: two caches averaged are one cache of averages; roles; what must agree; exact resume."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomise, vilt_config, vilt_processor
from pipeline import all_pairs, cli, make_cache, make_samples, make_shards, tree, whole_batch
from safetensors.torch import load_file
from test_choices import _stop_after, metrics_of, planned
from transformers import ViltForQuestionAnswering, ViltModel

from dde_cache.attention import mean_over_heads, sparsify
from dde_cache.codec import encode
from dde_cache.distill import PROJECTIONS, StudentLosses, TrainConfig
from dde_cache.errors import CacheError, InputError, RunError
from dde_cache.fit import Progress
from dde_cache.prepare import plan_training
from dde_cache.pretrain import pretrain
from dde_cache.pretraining import PretrainConfig
from dde_cache.several import SeveralLosses, of_teacher, read_teachers
from dde_cache.sources import CachedTargets, CachedTeacher, SeveralTargets
from dde_cache.store import Cache
from dde_cache.targets import decoded
from dde_cache.tasks import load_task
from dde_cache.train import train

EXACT = {"k": None, "weights": "float32", "layers": (0, 2), "targets": ("cross", "hidden")}
QUICK = {"steps": 3, "batch_size": 4, "workers": 0, "log_every": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def caches(shards, save_teacher, tmp_path_factory):
    """Teachers of other weights; `four` has other heads and another width, `plain` has no task head."""
    folder = tmp_path_factory.mktemp("caches")
    teachers = {
        "one": save_teacher(seed=0),
        "two": save_teacher(seed=1),
        "four": save_teacher(seed=2, num_attention_heads=4, hidden_size=16),
        "plain": save_teacher(ViltModel, seed=3),
    }
    return {name: make_cache(shards, teacher, folder / name, **EXACT) for name, teacher in teachers.items()}


def several(caches, *names, **shares):
    """Teachers by the names of their caches; options by name, a value each."""
    each = [{key: values[number] for key, values in shares.items()} for number in range(len(names))]
    return SeveralTargets(
        tuple(CachedTeacher(name, CachedTargets(caches[name]), **own) for name, own in zip(names, each, strict=True))
    )


def gradients(losses, student, batch):
    student.zero_grad()
    found = losses(student, batch)
    found["loss"].backward()
    return float(found["loss"].detach()), {
        name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None
    }


def averaged(batch, shares, soft):
    """The batch of one cache that holds averages: of maps, and of answers' probabilities (as logits)."""
    first = of_teacher(batch, 0)
    for way in ("t2i", "i2t"):
        keys = max(int(batch[f"target.{number}:{way}.index"].max()) for number in (0, 1)) + 1
        dense = []
        for number in (0, 1):
            sparse = decoded(of_teacher(batch, number), way, None)
            empty = torch.zeros(*sparse.weight.shape[:-1], keys)
            dense.append(empty.scatter_add(-1, sparse.index, sparse.weight))
        mean = sum(share * one for share, one in zip(shares, dense, strict=True))
        parts = encode(sparsify(mean, None), "float32", keys).parts
        first |= {f"target.{way}.{name}": part for name, part in parts.items()}
    logits = [batch[f"target.{number}:logits"] for number in (0, 1)]
    if soft == "classes":
        first["target.logits"] = sum(s * one.softmax(-1) for s, one in zip(shares, logits, strict=True)).log()
    else:
        chance = sum(s * one.sigmoid() for s, one in zip(shares, logits, strict=True))
        first["target.logits"] = chance.logit()
    return first


@pytest.mark.parametrize("task", ["classification", "vqa"])
def test_two_caches_are_one_cache_of_their_average(shards, caches, task):
    config = TrainConfig(task=task, attention_weight=0.7, soft_weight=1.3)
    targets = several(caches, "one", "two", attention=(3.0, 1.0), soft=(3.0, 1.0))
    constants = []
    for seed in (5, 6):
        student, plan = planned(targets, shards, config, seed=seed)
        encode_labels = load_task(task).targets
        batch = whole_batch(
            shards, plan.preprocessor, plan.labels, plan.reader, pairs=[0, 3, 7, 12], encode=encode_labels
        )
        loss, gradient = gradients(SeveralLosses(config, targets), student, batch)
        kind = "classes" if task == "classification" else "vqa"
        single = StudentLosses(config, CachedTargets(caches["one"]), False)
        other, expected = gradients(single, student, averaged(batch, (0.75, 0.25), kind))
        assert gradient.keys() == expected.keys()
        for name, value in gradient.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
        constants.append(loss - other)
    assert constants[0] > 1e-3, "two teachers that are alike would show nothing"
    assert constants[0] == pytest.approx(constants[1], abs=1e-5)


def test_shares_are_averages_whatever_their_sum(shards, caches):
    config = TrainConfig(hidden_weight=0.5)
    found = []
    for scale in (1.0, 8.0):
        both = {kind: (scale, 3 * scale) for kind in ("attention", "soft", "hidden")}
        targets = several(caches, "one", "two", **both)
        student, plan = planned(targets, shards, config)
        batch = whole_batch(shards, plan.preprocessor, plan.labels, plan.reader)
        found.append(gradients(SeveralLosses(config, targets), student, batch)[0])
        alone = [StudentLosses(config, CachedTargets(caches[name]), False) for name in ("one", "two")]
        maps = getattr(student, PROJECTIONS)
        output = student(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"])
        parts = []
        for number, losses in enumerate(alone):
            own = of_teacher(batch, number)
            compared = losses.compared(output, own, maps[number : number + 1])
            sums = {name: term.total(compared, own, {}) for name, term in losses.terms.items()}
            parts.append(float(losses.means(sums, losses.rows([own], {}))["loss"].detach()))
        assert found[-1] == pytest.approx(0.25 * parts[0] + 0.75 * parts[1], rel=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_roles_read_and_compare_only_what_has_a_share(shards, caches):
    """One gives answers, another, without any, attention of a layer of its own, by the mean of its four heads."""
    config = TrainConfig(heads="mean")
    targets = several(caches, "two", "four", attention=(0.0, 1.0), soft=(1.0, 0.0), layer_map=(None, "0:1"))
    student, plan = planned(targets, shards, config)
    batch = whole_batch(shards, plan.preprocessor, plan.labels, plan.reader)
    read = {name.removeprefix("target.") for name in batch if name.startswith("target.")}
    kept = {f"1:{way}.{part}" for way in ("t2i", "i2t") for part in ("index", "weight", "tail")}
    assert read == {"0:logits", "token_ids", "grid"} | kept
    found = SeveralLosses(config, targets)(student, batch)
    assert found.keys() == {"loss", "two.soft", "four.t2i", "four.i2t"}
    soft = StudentLosses(config.model_copy(update={"attention_weight": 0.0}), CachedTargets(caches["two"]), True)
    maps = config.model_copy(update={"soft_weight": 0.0, "layer_map": "0:1"})
    attention = StudentLosses(maps, CachedTargets(caches["four"]), True)
    assert float(found["two.soft"].detach()) == pytest.approx(
        float(soft(student, of_teacher(batch, 0))["soft"].detach())
    )
    expected = attention(student, of_teacher(batch, 1))
    for way in ("t2i", "i2t"):
        assert float(found[f"four.{way}"].detach()) == pytest.approx(float(expected[way].detach()))
    teacher = mean_over_heads(decoded(of_teacher(batch, 1), "t2i", None), int(batch["grid0"].prod(-1).max()) + 1)
    assert teacher.shape[1] == 1


def test_a_teacher_without_answers_gives_attention(shards, caches, tmp_path):
    targets = several(caches, "plain", "one", attention=(1.0, 0.0), soft=(0.0, 1.0))
    record = train(shards, targets, tmp_path / "run", TrainConfig(**QUICK))
    assert record.labels == caches["one"].labels
    assert record.cache_fingerprint == ", ".join(caches[name].manifest.fingerprint for name in ("plain", "one"))
    assert {"plain.t2i", "plain.i2t", "one.soft"} < metrics_of(tmp_path / "run")[0].keys()


# --- what must agree


def test_everything_that_disagrees_is_said_at_once(shards, caches, save_teacher, tmp_path):
    folder = tmp_path / "other"
    answers = {"id2label": {0: "yes", 1: "no", 2: "red"}, "label2id": {"no": 1, "yes": 0, "red": 2}}
    randomise(ViltForQuestionAnswering(vilt_config(**answers)), 7).save_pretrained(folder)
    vilt_processor(image_mean=[0.4] * 3).save_pretrained(folder)
    other = make_cache(shards, folder, tmp_path / "cache", views=2, view="flip", **EXACT)
    targets = several(caches | {"other": other}, "one", "other")
    with pytest.raises(CacheError, match="these teachers do not go together") as refused:
        train(shards, targets, tmp_path / "run", TrainConfig(**QUICK, layer=1))
    lines = str(refused.value)
    for said in ("teacher.processor", "view plain v1", "views 2", "answers yes, no, red", "one lacks layer 1"):
        assert said in lines, lines
    assert "other lacks layer 1" in lines
    assert not (tmp_path / "run").exists()


def test_heads_that_differ_are_compared_by_their_mean_alone(shards, caches, tmp_path):
    targets = several(caches, "one", "four")
    with pytest.raises(Exception, match="expected a student with the teacher's 4 attention heads, got 3"):
        train(shards, targets, tmp_path / "run", TrainConfig(**QUICK))
    train(shards, targets, tmp_path / "run", TrainConfig(**QUICK, heads="mean"))


def test_shares_of_what_nobody_wants_and_the_reverse(shards, caches, tmp_path):
    targets = several(caches, "one", "two", soft=(0.0, 0.0))
    with pytest.raises(CacheError, match="no teacher has a share of soft, whose weight is not 0"):
        train(shards, targets, tmp_path / "run", TrainConfig(**QUICK))
    targets = several(caches, "one", "two", attention=(1.0, 0.0), hidden=(0.0, 0.0))
    with pytest.raises(CacheError, match="two: what it has a share in has no weight"):
        train(shards, targets, tmp_path / "run", TrainConfig(**QUICK, soft_weight=0))


def test_caches_of_other_samples(shards, caches, save_teacher, tmp_path):
    fewer = make_shards(tmp_path / "fewer", make_samples(7))
    part = make_cache(fewer, save_teacher(seed=1), tmp_path / "part", **EXACT)
    targets = several(caches | {"part": part}, "one", "part")
    with pytest.raises(CacheError, match=r"(?s)part: shards and cache do not hold the same samples.*key-007"):
        train(shards, targets, tmp_path / "run", TrainConfig(**QUICK))
    skipping = SeveralTargets(
        tuple(CachedTeacher(one.name, CachedTargets(one.targets.cache, on_missing="skip")) for one in targets.teachers)
    )
    plan = plan_training(shards, (), skipping, TrainConfig(), load_task("classification"))
    assert len(plan.table) == len(all_pairs(fewer)) == len(all_pairs(shards)) - 2
    other = make_shards(tmp_path / "other", make_samples(8, seed=4))
    strange = make_cache(other, save_teacher(seed=1), tmp_path / "strange", **EXACT)
    with pytest.raises(CacheError, match=r"teacher strange: sample 'key-004'.*not those that the teacher saw"):
        train(shards, several(caches | {"strange": strange}, "one", "strange"), tmp_path / "r", TrainConfig(**QUICK))


# --- the file, the command line, going on


def write(file, text):
    file.write_text(text)
    return file


def test_a_file_with_mistakes(caches, tmp_path):
    text = "teachers:\n  - {cache: a, attention: -1}\n  - {cache: b, weight: 2}\n  - {name: 'x y', cache: c}\n"
    with pytest.raises(InputError) as refused:
        read_teachers(write(tmp_path / "t.yaml", text), lambda place: Cache(Path(place)))
    assert str(refused.value).count("\n  - ") == 3
    same = "teachers: [{cache: a/c}, {cache: b/c}]"
    with pytest.raises(InputError, match="a name for each teacher, each once, got c, c"):
        read_teachers(write(tmp_path / "t.yaml", same), lambda place: Cache(Path(place)))
    with pytest.raises(CacheError) as missing:
        read_teachers(write(tmp_path / "t.yaml", "teachers: [{cache: a}, {cache: b}]"), lambda p: Cache(Path(p)))
    assert str(missing.value).count("\n  - ") == 2
    done = cli("train", tmp_path, "--targets", tmp_path / "none.yaml", "--out", tmp_path / "run")
    assert done.code == 1
    assert "expected a YAML file" in done.message


def test_a_run_goes_on_bit_for_bit_with_the_same_teachers_alone(shards, caches, tmp_path):
    targets = several(caches, "one", "two", attention=(1.0, 3.0))
    config = TrainConfig(**QUICK | {"steps": 6, "save_every": 2, "hidden_weight": 0.5})
    train(shards, targets, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(shards, targets, tmp_path / "cut", config, progress=Progress(step=_stop_after(3)))
    for other, message in (
        (several(caches, "one", "two", attention=(1.0, 2.0)), "attention 2"),
        (several(caches, "two", "one", attention=(1.0, 3.0)), "begun with caches one"),
        (several(caches, "one", "one", attention=(1.0, 3.0)), "begun with caches one"),
        (CachedTargets(caches["one"]), "now cache "),
    ):
        with pytest.raises(RunError, match=message):
            train(shards, other, tmp_path / "cut", config, resume=True)
    train(shards, targets, tmp_path / "cut", config, resume=True)
    whole, cut = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert not any(name.startswith(PROJECTIONS) for name in whole)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_pre_training_takes_several_teachers(save_teacher, tmp_path):
    shards = make_shards(tmp_path / "shards", size=8)
    both = {
        name: make_cache(
            shards, save_teacher(seed=seed), tmp_path / name, passes=("matched", "masked", "negative"), layers=(2,)
        )
        for name, seed in (("one", 0), ("two", 1))
    }
    pretrain(shards, several(both, "one", "two"), tmp_path / "run", PretrainConfig(**QUICK))
    terms = metrics_of(tmp_path / "run")[0].keys()
    assert {
        f"{way}{name}.{row}" for way in ("", "masked.", "negative.") for name in both for row in ("t2i", "i2t")
    } < terms


def test_the_commands_of_the_page_run_as_they_stand(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/several-teachers.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)```", page, re.S):
        Path(name).write_text(text)
    for line in re.findall(r"^    dde-cache (.*)$", page, re.MULTILINE):
        done = cli(*shlex.split(line))
        assert done.code == 0, f"{line}\n{done.err}"
    assert {"answers.soft", "looks.t2i@2:2"} < metrics_of(tmp_path / "runs/roles")[0].keys()
    inputs = json.loads((tmp_path / "runs/roles/inputs.json").read_text())["targets"]
    assert all(Cache(tmp_path / "caches" / name).manifest.fingerprint in inputs for name in ("last", "two"))
    before = tree(tmp_path / "runs/average")
    shutil.copy("average.yaml", "caches/average.yaml")
    done = cli("train", "data/train", "--targets", "caches/average.yaml", "--out", "runs/lost", "--steps", "1")
    assert done.code == 1
    assert "caches/caches/last" in done.message.replace(" ", "")
    assert tree(tmp_path / "runs/average") == before
