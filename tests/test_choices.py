"""What a student may learn from: every choice x every codec against dense maths, and the cache against the teacher.

The oracle takes one pair at a time, cuts its tensors to the valid tokens, and knows no masks, no gathering and no
tables: softmax, logarithm, sum. Its targets are read record by record from the units.
"""

import json
import math
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, picture, randomise
from pipeline import all_pairs, cli, make_cache, make_shards, png, tree, whole_batch
from safetensors.torch import load_file
from test_ranks import global_loss
from test_train import losses_and_gradients
from transformers import ViltForImagesAndTextClassification

from dde_cache.codec import decode, dense_rows
from dde_cache.distill import PROJECTIONS, StudentLosses, TrainConfig
from dde_cache.errors import CacheError, InputError, TeacherError
from dde_cache.fit import Progress
from dde_cache.prepare import plan_training
from dde_cache.presets import ABLATIONS, task_settings
from dde_cache.pretrain import pretrain
from dde_cache.pretraining import PretrainConfig
from dde_cache.ready import fit_student
from dde_cache.samples import Sample, Text
from dde_cache.sources import CachedTargets, OnlineTargets, layers_of
from dde_cache.student import DualEncoder, Head, new_student
from dde_cache.tasks import load_task
from dde_cache.teacher import FusionTeacher
from dde_cache.train import train

STORED = (0, 1, 2)
CODECS = {
    "exact": {"k": None, "weights": "float32"},
    "sqrt8": {},
    "sparse": {"k": 4},
}
CHOICES = {
    "published": {},
    "t2i": {"directions": "t2i"},
    "i2t": {"directions": "i2t"},
    "whole": {"attention": "whole"},
    "whole, t2i": {"attention": "whole", "directions": "t2i"},
    "whole, i2t": {"attention": "whole", "directions": "i2t"},
    "layer 0": {"layer": 0},
    "layer map": {"layer_map": "2:0,0:1"},
    "layer-wise": {"layer_map": "same"},
    "whole, layer map": {"attention": "whole", "layer_map": "1:2,0:0"},
    "all queries": {"queries": "all"},
    "whole, all queries": {"attention": "whole", "queries": "all"},
    "mean of heads": {"heads": "mean"},
    "whole, mean of heads": {"attention": "whole", "heads": "mean"},
    "head by head": {"heads": "all"},
    "even tail": {"tail": "uniform"},
    "temperature": {"temperature": 3.0},
    "temperature, vqa": {"temperature": 0.5, "task": "vqa"},
    "soft alone": {"attention_weight": 0.0},
    "hidden": {"attention_weight": 0.0, "hidden_weight": 1.0},
    "hidden and attention, layer map": {"hidden_weight": 0.3, "layer_map": "1:0,2:2", "hard_weight": 0.5},
    "weights": {"attention_weight": 0.25, "soft_weight": 2.0, "hard_weight": 0.5},
}
NEEDS_EVERY_KEY = ("mean of heads", "whole, mean of heads")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def caches(shards, teacher_folder, tmp_path_factory):
    targets = ("cross", "whole", "hidden")
    return {
        name: make_cache(
            shards, teacher_folder, tmp_path_factory.mktemp("caches") / name,
            targets=targets, layers=STORED, queries="all", **codec,
        )
        for name, codec in CODECS.items()
    }  # fmt: skip


def planned(targets, shards, config, head=None, seed=5):
    """A student as training makes it, with large random weights, and the plan."""
    plan = plan_training(shards, (), targets, config, load_task(config.task))
    student = new_student(plan.tower, plan.labels, head=head)
    fit_student(student, targets, config, plan)
    return randomise(student, seed=seed).eval(), plan


def batch_of(plan, shards, config, pairs=None):
    task, every = load_task(config.task), config.queries == "all"
    return whole_batch(shards, plan.preprocessor, plan.labels, plan.reader, every, pairs, encode=task.targets)


# --- the oracle


class Stored:
    """Targets of single pairs, straight from the units."""

    def __init__(self, cache, shards):
        self.cache, self.shards = cache, shards
        self.units = [cache.unit(entry) for entry in cache.manifest.units]

    def record(self, pair, layer, image):
        unit = self.units[pair.shard]
        maps, sample = unit.maps, unit.keys.index(pair.key)
        found = (maps.sample == sample) & (maps.text == pair.text) & (maps.layer == layer) & (maps.image == image)
        (row,) = found.nonzero()[0]
        return unit, row

    def rows(self, name, pair, layer, image, keys):
        unit, row = self.record(pair, layer, image)
        encoded = unit.attention(name, slice(row, row + 1))
        return dense_rows(encoded, keys)[0], getattr(decode(encoded), "tail", None)

    def states(self, pair, layer, image):
        unit, row = self.record(pair, layer, image)
        return {
            name: torch.from_numpy(unit.hidden(name, slice(row, row + 1))[0].astype("float32"))
            for name in ("text", "image")
        }


def kl_of_row(target, student, tail, how):
    """KL of one row; a tail is one outcome of all keys that were not kept, or spread over them evenly."""
    kept = target > 0
    total = (target[kept] * (target[kept].log() - student[kept])).sum()
    if tail is None or tail == 0 or kept.all():
        return total
    if how == "bucket":
        return total + tail * (tail.log() - student[~kept].logsumexp(0))
    each = tail / (~kept).sum()
    return total + (each * (each.log() - student[~kept])).sum()


def attention_of(student, stored, pairs, config, pair_of_layers, image):
    """Sums and counts of both kinds of rows, of one layer pair and image slot."""
    teacher_layer, block = pair_of_layers
    towers = {"text": student.text, "image": student.second if image else student.image}
    found = {}
    for kind in config.rows:
        side = "text" if kind[0] == "t" else "image"
        total, count = 0.0, 0
        for row, pair in enumerate(pairs):
            words, patches = (int(towers[name].mask[row].sum()) for name in ("text", "image"))
            given = {name: tower.block(block).query_key for name, tower in towers.items()}
            keys = {
                "i": [given["image"].key[row, :, :patches]],
                "t": [given["text"].key[row, :, :words]],
                "w": [given["text"].key[row, :, :words], given["image"].key[row, :, :patches]],
            }[kind[2]]
            key = torch.cat(keys, dim=1)
            query = given[side].query[row]
            valid = words if side == "text" else patches
            rows = query.shape[1] if config.queries == "all" else valid
            log = (query[:, :rows] @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])).log_softmax(-1)
            target, tail = stored.rows(kind, pair, teacher_layer, image, key.shape[1])
            # Padded rows of a picture are all alike, and lie behind its valid ones; those of a text are their own.
            places = [place if side == "text" else min(place, patches) for place in range(rows)]
            if config.heads == "mean":
                target, log, tail = target.mean(0, keepdim=True), log.exp().mean(0, keepdim=True).log(), None
            for head in range(log.shape[0]):
                for place, stored_at in enumerate(places):
                    left = None if tail is None else tail[0, head, stored_at]
                    total = (
                        total + kl_of_row(target[head, stored_at], log[head, place], left, config.tail) / log.shape[0]
                    )
            count += rows
        found[kind] = total / count
    return found


def hidden_of(student, model, stored, pairs, pair_of_layers, number, image):
    teacher_layer, block = pair_of_layers
    towers = {"text": student.text, "image": student.second if image else student.image}
    projection = getattr(model, PROJECTIONS)[number]
    total, count = 0.0, 0
    for row, pair in enumerate(pairs):
        states = stored.states(pair, teacher_layer, image)
        for name, tower in towers.items():
            tokens = int(tower.mask[row].sum())
            own = tower.block(block).states[row, :tokens] @ projection.weight.T + projection.bias
            total = total + ((own - states[name][:tokens]) ** 2).mean(-1).sum()
            count += tokens
    return total / count


def oracle(model, stored, batch, pairs, config, layers, images=1):
    given = [batch[f"{name}{slot}"] for slot in range(images) for name in ("pixels", "grid")]
    student = model(batch["input_ids"], batch["attention_mask"], *given)
    total = 0.0
    for number, pair_of_layers in enumerate(layers):
        for image in range(images):
            if config.attention_weight:
                parts = attention_of(student, stored, pairs, config, pair_of_layers, image)
                total = total + config.attention_weight * sum(parts.values()) / len(layers)
            if config.hidden_weight:
                part = hidden_of(student, model, stored, pairs, pair_of_layers, number, image)
                total = total + config.hidden_weight * part / len(layers)
    heat = config.temperature
    own, taught = student.logits / heat, batch["target.logits"] / heat
    if config.task == "vqa":
        entropy = -(taught.sigmoid() * own.sigmoid().log() + (1 - taught.sigmoid()) * (1 - own.sigmoid()).log())
        soft = entropy.sum() / len(pairs)
    else:
        p, q = taught.softmax(-1), own.softmax(-1)
        soft = (p * (p.log() - q.log())).sum() / len(pairs)
    total = total + config.soft_weight * heat**2 * soft
    if config.hard_weight:
        chosen = student.logits.log_softmax(-1)[torch.arange(len(pairs)), batch["label"]]
        total = total - config.hard_weight * chosen.mean()
    return total


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("choice", CHOICES)
def test_loss_and_gradient_are_those_of_dense_maths(shards, caches, choice, codec):
    if choice in NEEDS_EVERY_KEY and codec == "sparse":
        return  # refused, see below
    config = TrainConfig(**CHOICES[choice])
    cache = caches[codec]
    targets = CachedTargets(cache)
    model, plan = planned(targets, shards, config)
    numbers = [0, 3, 7, 12]
    pairs = [all_pairs(shards)[number] for number in numbers]
    batch = batch_of(plan, shards, config, numbers)
    losses, gradient = losses_and_gradients(model, config, targets, batch, plan.mean_heads)
    model.zero_grad()
    expected = oracle(model, Stored(cache, shards), batch, pairs, config, layers_of(targets, config))
    expected.backward()
    torch.testing.assert_close(losses["loss"], expected.detach(), rtol=2e-5, atol=1e-5)
    compared = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert compared.keys() == gradient.keys()
    for name, value in compared.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1), msg=name)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_cache_is_the_teacher(shards, caches, teacher, choice):
    """Exact weights: what is stored gives the loss and the gradient that the teacher gives at every step."""
    config = TrainConfig(**CHOICES[choice])
    found = []
    for targets in (CachedTargets(caches["exact"]), OnlineTargets(teacher, STORED[-1])):
        model, plan = planned(targets, shards, config)
        losses, gradient = losses_and_gradients(model, config, targets, batch_of(plan, shards, config), plan.mean_heads)
        found.append((losses, gradient))
    (cached, gradient), (online, expected) = found
    assert cached.keys() == online.keys()
    # Hidden states are stored in float16.
    bound = 1e-3 if config.hidden_weight else 1e-5
    for name, value in online.items():
        torch.testing.assert_close(cached[name], value, rtol=bound, atol=1e-5, msg=name)
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=bound, atol=bound * float(1 + value.abs().max()))


@pytest.mark.parametrize("choice", CHOICES)
def test_parts_of_a_batch_add_up(shards, caches, choice):
    """Pairs sorted by size, so that parts differ in the tokens of their pictures, texts and rows."""
    config = TrainConfig(**CHOICES[choice])
    targets = CachedTargets(caches["sqrt8"])
    model, plan = planned(targets, shards, config)
    numbers = batch_of(plan, shards, config)["grid0"].prod(-1).argsort(stable=True).tolist()
    parts = [batch_of(plan, shards, config, numbers[first : first + 4]) for first in range(0, 15, 4)]
    objective = StudentLosses(config, targets, plan.mean_heads)
    whole, gradient = global_loss(objective, model, [batch_of(plan, shards, config, numbers)])
    cut, added = global_loss(objective, model, parts)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-5, atol=1e-5)
    for name, value in gradient.items():
        torch.testing.assert_close(added[name], value, rtol=1e-4, atol=1e-5 * float(1 + value.abs().max()))


# --- two pictures a sample


@pytest.fixture(scope="module")
def two(save_teacher, tmp_path_factory):
    folder = save_teacher(
        ViltForImagesAndTextClassification,
        num_images=2,
        modality_type_vocab_size=3,
        id2label={0: "False", 1: "True"},
        label2id={"False": 0, "True": 1},
    )
    sizes = ((36, 36), (24, 36), (48, 12))
    samples = [
        Sample(
            f"key-{number}",
            (png(picture(*sizes[number % 3], number)), png(picture(*sizes[(number + 1) % 3], 9 + number))),
            (Text(text=TEXTS[number % 4], label="True"),),
        )
        for number in range(4)
    ]
    where = tmp_path_factory.mktemp("two")
    made = make_shards(where / "train", samples)
    cache = make_cache(
        made, folder, where / "cache",
        targets=("cross", "whole", "hidden"), layers=STORED, queries="all", **CODECS["exact"],
    )  # fmt: skip
    return FusionTeacher.load(folder), made, cache


@pytest.mark.parametrize(("task", "name", "none"), [("classification", "label", -100), ("vqa", "scores", 0)])
def test_a_label_weighs_the_same_whatever_its_company(shards, caches, task, name, none):
    """Otherwise the one labelled pair of a batch outweighs what all of its pairs learn from the teacher."""
    config, targets = TrainConfig(task=task, hard_weight=1.0), CachedTargets(caches["sqrt8"])
    model, plan = planned(targets, shards, config)
    every = batch_of(plan, shards, config)
    chosen = torch.arange(len(every[name])) % 3 == 0
    parts = [mask if every[name].dim() == 1 else mask[:, None] for mask in (chosen, ~chosen)]
    kept = [every | {name: every[name].where(part, none)} for part in parts]
    whole, *some = (losses_and_gradients(model, config, targets, batch, plan.mean_heads)[0] for batch in (every, *kept))
    assert all(0 < float(one["hard"]) < float(whole["hard"]) for one in some)
    torch.testing.assert_close(sum(one["hard"] for one in some), whole["hard"])
    assert all(torch.equal(one["soft"], whole["soft"]) for one in some)


@pytest.mark.parametrize("choice", [name for name in CHOICES if "vqa" not in name and name != "weights"])
def test_every_choice_with_two_pictures(two, choice):
    teacher, shards, cache = two
    config = TrainConfig(**CHOICES[choice] | {"task": "nlvr2", "hard_weight": 0.0})
    found = []
    for targets in (CachedTargets(cache), OnlineTargets(teacher, STORED[-1])):
        model, plan = planned(targets, shards, config, Head("classes", 2, "nlvr2"))
        batch = batch_of(plan, shards, config)
        losses, _ = losses_and_gradients(model, config, targets, batch, plan.mean_heads)
        found.append(losses)
        if plan.reader is not None:
            layers = layers_of(targets, config)
            expected = oracle(model, Stored(cache, shards), batch, all_pairs(shards), config, layers, images=2)
            torch.testing.assert_close(losses["loss"], expected.detach(), rtol=2e-5, atol=1e-5)
    bound = 1e-3 if config.hidden_weight else 1e-5
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=bound, atol=1e-5, msg=name)


# --- runs


QUICK = {"steps": 4, "batch_size": 6, "workers": 0, "log_every": 1, "save_every": 2}


def trained(shards, targets, out, **settings):
    return train(shards, targets, out, TrainConfig(**(QUICK | settings)))


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out):
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in metrics_of(out)]


@pytest.mark.parametrize("choice", ["layer-wise", "whole, layer map", "hidden and attention, layer map"])
def test_a_run_from_the_cache_is_a_run_with_the_teacher(shards, caches, teacher, tmp_path, choice):
    trained(shards, CachedTargets(caches["exact"]), tmp_path / "cached", **CHOICES[choice])
    trained(shards, OnlineTargets(teacher, STORED[-1]), tmp_path / "online", **CHOICES[choice])
    cached, online = losses_of(tmp_path / "cached"), losses_of(tmp_path / "online")
    assert len(cached) == 4
    for one, other in zip(cached, online, strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    first = {"layer-wise": "t2i@0:0", "whole, layer map": "t2w@1:2", "hidden and attention, layer map": "hidden@1:0"}
    assert first[choice] in cached[0]


def test_hidden_states_resume_and_are_not_exported(shards, caches, tmp_path):
    """The projections are part of a checkpoint: the curve goes on to the last bit. The student has none of them."""
    settings = {**CHOICES["hidden and attention, layer map"], "dropout": 0.1}
    trained(shards, CachedTargets(caches["sqrt8"]), tmp_path / "whole", **settings)
    out = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (checkpoint,) = (out / "checkpoints").iterdir()
    names = set(load_file(checkpoint / "model.safetensors"))
    assert {name for name in names if name.startswith(PROJECTIONS)} == {
        f"{PROJECTIONS}.{number}.{part}" for number in (0, 1) for part in ("weight", "bias")
    }
    saved = set(load_file(out / "model" / "model.safetensors"))
    assert saved == {name for name in names if not name.startswith(PROJECTIONS)}
    assert DualEncoder.from_pretrained(out / "model").config.num_labels == 3
    # As if it had been killed after the second step.
    shutil.rmtree(out)
    config = TrainConfig(**(QUICK | settings))
    with pytest.raises(KeyboardInterrupt):
        train(shards, CachedTargets(caches["sqrt8"]), out, config, progress=Progress(step=_stop_after(2)))
    train(shards, CachedTargets(caches["sqrt8"]), out, config, resume=True)
    assert losses_of(out) == losses_of(tmp_path / "whole")
    assert tree(out / "model") == tree(tmp_path / "whole" / "model")


def test_pre_training_has_the_same_choices(shards, caches, tmp_path):
    choices = {"attention": "whole", "directions": "t2i", "layer_map": "0:1,2:2", "heads": "mean", "hidden_weight": 0.5}
    pretrain(shards, CachedTargets(caches["sqrt8"]), tmp_path / "run", PretrainConfig(**QUICK, **choices))
    found = {name for name in metrics_of(tmp_path / "run")[0] if name.startswith(("t2", "i2", "hidden"))}
    assert found == {"t2w@0:1", "t2w@2:2", "hidden@0:1", "hidden@2:2"}
    assert not [name for name in load_file(tmp_path / "run/model/model.safetensors") if name.startswith(PROJECTIONS)]


def test_pre_training_from_hidden_states_alone(shards, caches, tmp_path):
    config = PretrainConfig(**QUICK, attention_weight=0.0, hidden_weight=1.0)
    pretrain(shards, CachedTargets(caches["sqrt8"]), tmp_path / "run", config)
    found = metrics_of(tmp_path / "run")[0].keys()
    assert "hidden" in found
    assert not {"t2i", "i2t"} & found


def _stop_after(step):
    def stop(number, _record):
        if number == step:
            signal.raise_signal(signal.SIGINT)

    return stop


def test_projections_learn(shards, caches, tmp_path):
    """They are in the optimizer: their weights move, and the loss falls."""
    trained(
        shards, CachedTargets(caches["sqrt8"]), tmp_path / "run",
        attention_weight=0.0, soft_weight=0.0, hidden_weight=1.0, steps=30, learning_rate=0.01, batch_size=15,
    )  # fmt: skip
    curve = [line["hidden"] for line in metrics_of(tmp_path / "run")]
    assert curve[-1] < 0.7 * curve[0]


@pytest.fixture(scope="module")
def plain(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("plain") / "cache", layers=(1,), heads="mean")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "whole"}, "attention rows t2w, i2w: it has t2i, i2t; extract with --targets cross,whole"),
        ({"hidden_weight": 1.0}, "hidden states: extract with --targets cross,hidden"),
        ({"layer_map": "2:1"}, r"layer 2: it has \[1\]; extract with --layers"),
        ({"layer": 0}, r"layer 0: it has \[1\]"),
        ({"heads": "all"}, "attention head by head: it has their mean; extract with --heads all"),
        ({"queries": "all"}, "padded query rows"),
    ],
)
def test_what_a_cache_lacks_is_said(shards, plain, tmp_path, settings, message):
    with pytest.raises(CacheError, match=message):
        trained(shards, CachedTargets(plain), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_everything_that_a_cache_lacks_is_said_at_once(shards, plain, tmp_path):
    with pytest.raises(CacheError) as refused:
        trained(
            shards, CachedTargets(plain), tmp_path / "run",
            attention="whole", hidden_weight=1.0, layer_map="0:0", heads="all",
        )  # fmt: skip
    assert str(refused.value).count("\n  - ") == 4


def test_heads_of_sparse_rows_cannot_be_averaged(shards, caches, tmp_path):
    with pytest.raises(CacheError, match="whole rows to average over the heads: it keeps the 4 strongest keys"):
        trained(shards, CachedTargets(caches["sparse"]), tmp_path / "run", heads="mean")


def test_other_numbers_of_heads_are_compared_by_their_mean_alone(shards, caches, tmp_path, save_teacher):
    four = save_teacher(num_attention_heads=4)
    config = TrainConfig(**QUICK)
    with pytest.raises(TeacherError, match="expected a student with the teacher's 3 attention heads, got 4"):
        train(shards, CachedTargets(caches["sqrt8"]), tmp_path / "run", config, init=str(four))
    averaged = config.model_copy(update={"heads": "mean"})
    train(shards, CachedTargets(caches["sqrt8"]), tmp_path / "run", averaged, init=str(four))
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_map_to_blocks_or_layers_that_are_not_there_is_refused(shards, caches, teacher, tmp_path):
    with pytest.raises(InputError, match="expected a layer map to the student's blocks 0 to 2, got 1:7"):
        trained(shards, CachedTargets(caches["sqrt8"]), tmp_path / "run", layer_map="0:0,1:7")
    with pytest.raises(InputError, match="expected the teacher's layers 0 to 2, got 5:0"):
        trained(shards, OnlineTargets(teacher, 2), tmp_path / "run", layer_map="5:0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_map": "1-2"}, "expected layers as teacher:student"),
        ({"layer_map": "1:2,1:0"}, "expected each layer of the teacher once"),
        ({"layer_map": "1:2", "layer": 1}, "expected layer or layer_map"),
        ({"remap_flips": True, "attention": "whole"}, "expected remap_flips with cross attention alone"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_choices_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_only_what_counts_is_read(shards, caches):
    def read(**settings):
        config = TrainConfig(**settings)
        plan = plan_training(shards, (), CachedTargets(caches["sqrt8"]), config, load_task(config.task))
        return {name.removeprefix("target.") for name in batch_of(plan, shards, config) if name.startswith("target.")}

    always = {"logits", "token_ids", "grid"}
    assert read() == always | {"t2i.weight", "i2t.weight"}
    assert read(directions="t2i") == always | {"t2i.weight"}
    assert read(attention="whole", layer_map="0:0,1:1") == always | {
        f"{rows}{number}.weight" for rows in ("t2w", "i2w") for number in ("", "@1")
    }
    assert read(attention_weight=0.0) == {"logits"}
    assert read(attention_weight=0.0, hidden_weight=1.0) == always | {"hidden/text", "hidden/image"}


@pytest.mark.parametrize("preset", ABLATIONS)
def test_an_ablation_changes_what_its_name_says(preset):
    base, changed = (TrainConfig(**task_settings("classification", name)) for name in ("dide", preset))
    found = {name for name in TrainConfig.model_fields if getattr(base, name) != getattr(changed, name)}
    assert found == set(ABLATIONS[preset])


def test_the_commands_of_the_page_run_as_they_stand(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "distillation.md").read_text()
    lines = re.findall(r"^    dde-cache (.*)$", page, re.MULTILINE)
    assert len(lines) >= 11
    monkeypatch.chdir(tmp_path)
    for line in lines:
        done = cli(*shlex.split(line))
        assert done.code == 0, f"{line}\n{done.err}"
    assert {"t2i@0:0", "i2t@3:3"} <= metrics_of(tmp_path / "runs" / "layer-wise")[0].keys()
    assert {"t2w", "i2w"} <= metrics_of(tmp_path / "runs" / "whole")[0].keys()
    options = set(re.findall(r"`(--[a-z-]+)", page))
    known = {name for command in ("train", "extract") for name in re.findall(r"--[a-z-]+", cli(command, "--help").out)}
    assert options <= known
