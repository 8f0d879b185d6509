"""What a student may learn from: every choice x every codec against dense maths, and the cache against the teacher.

The oracle takes one pair at a time, cuts its tensors to the valid tokens, and knows no masks, no gathering and no
tables: softmax, logarithm, sum. Its targets are read record by record from the units.
"""

import math

import pytest
import torch
from conftest import TEXTS, picture, randomise
from pipeline import all_pairs, make_cache, make_shards, png, whole_batch
from test_ranks import global_loss
from test_train import losses_and_gradients
from transformers import ViltForImagesAndTextClassification

from dde_cache.codec import decode, dense_rows
from dde_cache.distill import PROJECTIONS, CachedTargets, OnlineTargets, StudentLosses, TrainConfig, layers_of
from dde_cache.prepare import fit_student, plan_training
from dde_cache.samples import Sample, Text
from dde_cache.student import Head, new_student
from dde_cache.tasks import load_task
from dde_cache.teacher import FusionTeacher

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


def kl_of_row(target, student, tail):
    """KL of one row; where there is a tail, all keys that were not kept are one outcome."""
    kept = target > 0
    total = (target[kept] * (target[kept].log() - student[kept])).sum()
    if tail is not None and tail > 0 and not kept.all():
        total = total + tail * (tail.log() - student[~kept].logsumexp(0))
    return total


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
                    total = total + kl_of_row(target[head, stored_at], log[head, place], left) / log.shape[0]
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
