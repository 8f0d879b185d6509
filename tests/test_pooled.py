"""Pooled states and the int8 codec: bounds, what is stored, the loss, every tool that knows the groups."""

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pipeline import all_pairs, cli, make_cache, make_shards, tree, whole_batch
from safetensors.torch import load_file
from test_choices import _stop_after, batch_of, metrics_of, planned
from test_train import losses_and_gradients
from test_whole_and_hidden import exact_of, rewritten

from dde_cache.audit import audit
from dde_cache.bounds import inconsistent_states, unsafe_states
from dde_cache.distill import PROJECTIONS, TrainConfig
from dde_cache.errors import CacheError, TeacherError
from dde_cache.extract import ExtractConfig
from dde_cache.fit import Progress
from dde_cache.identity import config_of, target_spec
from dde_cache.pretrain import pretrain
from dde_cache.pretraining import PretrainConfig
from dde_cache.several import SeveralLosses
from dde_cache.sources import CachedTargets, CachedTeacher, OnlineTargets, SeveralTargets
from dde_cache.states import LEAST, decode_int8, encode_int8
from dde_cache.store import Cache
from dde_cache.subset import Selection, subset
from dde_cache.targets import CacheTargets, slot_name
from dde_cache.teacher import FusionTeacher
from dde_cache.train import train
from dde_cache.unit import Unit
from dde_cache.verify import verify

LAYERS = (1, 2)
EVERY = ("cross", "hidden", "pooled")
QUICK = {"steps": 3, "batch_size": 4, "workers": 0, "log_every": 1}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def folders(shards, teacher_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches")
    for codec in ("float16", "int8"):
        make_cache(shards, teacher_folder, out / codec, targets=EVERY, layers=LAYERS, states=codec)
    return out


@pytest.fixture
def copy(folders, tmp_path):
    return Cache(shutil.copytree(folders / "int8", tmp_path / "copy"))


# --- the codec


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=6), elements=numbers))
def test_a_number_is_off_by_half_a_step_of_its_own_vector(vectors):
    code, scale = encode_int8(torch.from_numpy(vectors))
    found = decode_int8(code, scale).double().numpy()
    largest = np.abs(vectors.astype(np.float64)).max(-1, keepdims=True)
    # Half a step, but for the last bits of float32; what is smaller than LEAST is 0.
    assert (np.abs(found - vectors) <= largest / 254 * (1 + 2**-20) + LEAST).all()
    assert not unsafe_states(code.numpy()).any()
    assert not unsafe_states(scale.numpy()).any()
    assert not inconsistent_states(code.numpy(), scale.numpy()).any()


def test_the_bound_is_reached():
    vector = torch.tensor([[127.0, 0.5 - 2**-20, 2.5 + 2**-20]])
    error = (decode_int8(*encode_int8(vector)) - vector).abs().max()
    assert 0.49 < float(error) <= 0.5


def test_the_largest_numbers_stay_finite():
    most = torch.finfo(torch.float32).max
    code, scale = encode_int8(torch.tensor([[most, -most / 2]]))
    assert decode_int8(code, scale).isfinite().all()
    assert not unsafe_states(scale.numpy()).any()
    assert unsafe_states(np.nextafter(scale.numpy(), np.float32(np.inf))).all()
    assert unsafe_states(np.float32([np.nan, np.inf, -1])).all()


def test_vectors_of_nothing_and_of_very_little():
    code, scale = encode_int8(torch.tensor([[0.0, -0.0], [2.0**-140, 0.0], [2.0**-90, 0.0]]))
    assert code.tolist() == [[0, 0], [0, 0], [127, 0]]
    assert scale[:2].tolist() == [0, 0]


# --- from the teacher to a batch


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_batch_has_what_the_teacher_gives_each_pair(shards, teacher, folders, codec):
    cache = Cache(folders / codec)
    pairs = all_pairs(shards)[::-1]
    batch = CacheTargets(cache, shards, (2, 1), rows=(), hidden=True, pooled=True).targets(pairs)
    for row, pair in enumerate(pairs):
        tokens, output = exact_of(teacher, shards[pair.shard].read(pair.key), pair.text, {})
        for number, layer in enumerate((2, 1)):
            for side, states in (("text", output.hidden[0, layer].text), ("image", output.hidden[0, layer].image)):
                count = int(tokens.mask.sum()) if side == "text" else int(batch["grid"][row].prod()) + 1
                exact = states[0, :count]
                for kind, expected in (("hidden", exact), ("pooled", exact.mean(0))):
                    name = slot_name(f"{kind}/{side}", 0, number)
                    found = batch[name][row]
                    if codec == "int8":
                        scale = batch[slot_name(f"{kind}/{side}_scale", 0, number)][row]
                        assert found.dtype == torch.int8
                        found = decode_int8(found, scale)
                    if kind == "hidden":
                        assert not found[count:].any()
                        found = found[:count]
                    allowed = expected.abs().amax(-1, keepdim=True) * (1 / 254 if codec == "int8" else 2**-10) + 1e-4
                    assert bool(((found.float() - expected).abs() <= allowed).all()), (kind, side, layer)


def test_a_cache_without_the_new_options_is_what_it_was(teacher):
    """The fingerprint of `--targets cross,hidden` as versions before int8 and pooled states had it."""
    spec = target_spec(teacher, ExtractConfig(targets=("cross", "hidden")))
    assert spec.groups == {"hidden": {"states": "block output v1", "width": 24}}
    assert [(one.group, one.codec) for one in spec.states] == [("hidden", "float16")]


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_settings_come_back_from_a_specification(teacher, codec):
    config = ExtractConfig(targets=EVERY, states=codec, layers=LAYERS)
    assert config_of(target_spec(teacher, config)) == config


def test_int8_of_nothing_is_refused(teacher):
    with pytest.raises(ValueError, match="expected states int8 with hidden or pooled among the targets"):
        ExtractConfig(states="int8")


@pytest.mark.parametrize("later", [{"codec": "int4 v2"}, {"states": "first token v2"}, {"width": 0}])
def test_another_form_is_as_a_group_that_is_not_known(folders, later):
    spec = Cache(folders / "int8").spec
    other = spec.model_copy(update={"groups": spec.groups | {"pooled": spec.groups["pooled"] | later}})
    assert (spec.pooled_width, other.pooled_width, other.hidden_width) == (24, None, 24)


def test_int8_takes_less_room(folders):
    """Chunks alone: in units of a few pairs metadata is most."""
    sizes = {}
    for codec in ("float16", "int8"):
        cache = Cache(folders / codec)
        unit = cache.unit(cache.manifest.units[0])
        chunks = [name for name in unit.blocks.names if name.startswith("hidden/") and "/c/" in name]
        sizes[codec] = sum(len(unit.blocks.member(name)) for name in chunks)
        unit.close()
    assert sizes["int8"] < 0.7 * sizes["float16"], sizes


# --- the loss


@pytest.mark.parametrize("codec", ["float16", "int8"])
@pytest.mark.parametrize("settings", [{}, {"hidden_weight": 0.5}, {"layer_map": "1:0,2:2", "attention_weight": 1.0}])
def test_loss_and_gradient_are_those_of_dense_maths(shards, folders, codec, settings):
    config = TrainConfig(**({"attention_weight": 0.0, "soft_weight": 0.0, "pooled_weight": 0.7} | settings))
    cache = Cache(folders / codec)
    targets = CachedTargets(cache)
    model, plan = planned(targets, shards, config)
    numbers = [0, 3, 7, 12]
    pairs = [all_pairs(shards)[number] for number in numbers]
    batch = batch_of(plan, shards, config, numbers)
    losses, gradient = losses_and_gradients(model, config, targets, batch, plan.mean_heads)
    model.zero_grad()
    student = model(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"])
    layers = [(1, 0), (2, 2)] if "layer_map" in settings else [(2, None)]
    maps = list(getattr(model, PROJECTIONS))[-len(layers) :]
    assert len(getattr(model, PROJECTIONS)) == len(layers) * (1 + ("hidden_weight" in settings))
    total = 0
    for (layer, block), project in zip(layers, maps, strict=True):
        for row, pair in enumerate(pairs):
            unit = cache.unit(cache.manifest.units[pair.shard])
            at = (unit.maps.sample == unit.keys.index(pair.key)) & (unit.maps.text == pair.text)
            (record,) = (at & (unit.maps.layer == layer)).nonzero()[0]
            for side, tower in (("text", student.text), ("image", student.image)):
                taught = torch.from_numpy(unit.vectors("pooled", side, slice(record, record + 1))[0])
                own = tower.block(block).states[row, : int(tower.mask[row].sum())].mean(0)
                total = total + ((project.weight @ own + project.bias - taught) ** 2).mean() / 8 / len(layers)
    found = sum(value for name, value in losses.items() if name.startswith("pooled")) / len(layers)
    torch.testing.assert_close(found, total.detach(), rtol=1e-5, atol=1e-6)
    if not settings:
        (0.7 * total).backward()
        for name, one in model.named_parameters():
            if one.grad is not None:
                torch.testing.assert_close(gradient[name], one.grad, rtol=1e-4, atol=1e-6)


def test_the_cache_is_the_teacher(shards, folders, teacher):
    config = TrainConfig(attention_weight=0.0, soft_weight=0.0, pooled_weight=1.0, hidden_weight=1.0)
    found = []
    for targets in (CachedTargets(Cache(folders / "float16")), OnlineTargets(teacher, 2)):
        model, plan = planned(targets, shards, config)
        batch = whole_batch(shards, plan.preprocessor, plan.labels, plan.reader)
        found.append(losses_and_gradients(model, config, targets, batch, False)[0])
    for name in ("pooled", "hidden"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-4, atol=1e-5)


def test_a_run_goes_on_and_keeps_no_projections(shards, folders, tmp_path):
    config = TrainConfig(**QUICK | {"steps": 5, "save_every": 2, "pooled_weight": 1.0})
    targets = CachedTargets(Cache(folders / "int8"))
    train(shards, targets, tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        train(shards, targets, tmp_path / "cut", config, progress=Progress(step=_stop_after(3)))
    train(shards, targets, tmp_path / "cut", config, resume=True)
    whole, cut = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not any(name.startswith(PROJECTIONS) for name in whole)
    pretrain(shards, targets, tmp_path / "before", PretrainConfig(**QUICK, pooled_weight=1.0))
    assert metrics_of(tmp_path / "before")[0]["pooled"] > 0


def test_several_teachers_have_projections_of_their_own(shards, folders):
    config = TrainConfig(attention_weight=0.0, soft_weight=0.0, pooled_weight=1.0, hidden_weight=1.0)
    names = ("float16", "int8")
    targets = SeveralTargets(tuple(CachedTeacher(name, CachedTargets(Cache(folders / name))) for name in names))
    model, plan = planned(targets, shards, config)
    batch = whole_batch(shards, plan.preprocessor, plan.labels, plan.reader)
    losses = SeveralLosses(config, targets)(model, batch)
    assert losses.keys() == {"loss", *(f"{name}.{kind}" for name in names for kind in ("hidden", "pooled"))}
    losses["loss"].backward()
    maps = getattr(model, PROJECTIONS)
    assert len(maps) == 4
    assert all(one.weight.grad is not None and one.weight.grad.abs().max() > 0 for one in maps)
    assert abs(losses["float16.pooled"] - losses["int8.pooled"]).item() > 1e-3, "maps are random, and not shared"


def test_what_a_cache_lacks_is_said(shards, teacher_folder, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache")
    with pytest.raises(CacheError, match="pooled states: extract with --targets cross,pooled"):
        train(shards, CachedTargets(cache), tmp_path / "run", TrainConfig(**QUICK, pooled_weight=1.0))
    with pytest.raises(ValueError, match="expected remap_flips with cross attention alone"):
        TrainConfig(remap_flips=True, pooled_weight=1.0)


# --- the tools


def _least(arrays):
    arrays.further["pooled/text"][0, 0] = -128


def _not_filled(arrays):
    arrays.further["pooled/image"][0] //= 2


def _negative(arrays):
    arrays.further["hidden/text_scale"][0, 0] *= -1


def _infinite(arrays):
    arrays.further["hidden/image_scale"][0, 0] = np.inf


def _behind(arrays):
    counts = arrays.maps.text_tokens
    row = int(counts.argmin())
    arrays.further["hidden/text_scale"][row, counts[row] :] = 1


def _signs(arrays):
    arrays.further["pooled/image"] *= -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_least, "pooled/text: codes or scales outside their bounds"),
        (_not_filled, "pooled/image: codes that do not fill their scale"),
        (_negative, "hidden/text: codes or scales outside their bounds"),
        (_infinite, "hidden/image: codes or scales outside their bounds"),
        (_behind, "hidden/text: codes that do not fill their scale"),
    ],
)
def test_the_judge_reads_every_number(copy, change, message):
    rewritten(copy, change)
    unit = Unit(copy.folder / "units" / copy.manifest.units[0].name)
    assert any(message in problem.message for problem in audit(unit)), list(audit(unit))
    if change in (_least, _negative, _infinite):
        group, side = message.split(":")[0].split("/")
        with pytest.raises(CacheError, match="is damaged"):
            unit.vectors(group, side)
    unit.close()


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_the_judge_asks_the_teacher_again(folders, shards, teacher_folder, codec):
    report = verify(folders / codec, against=shards, teacher=str(teacher_folder), sample=100)
    assert report.sound, report.findings


def test_other_means_than_the_teachers_are_found(copy, shards, teacher_folder):
    from dde_cache.repair import repair

    rewritten(copy, _signs)
    (copy.folder / "manifest.json").unlink()
    repair(copy.folder)
    report = verify(copy.folder, against=shards, teacher=str(teacher_folder), sample=100)
    assert [finding.kind for finding in report.findings] == ["targets"]
    assert any("pooled: a state is off by" in example for example in report.findings[0].examples)


def test_a_part_has_the_bytes_of_an_extraction_of_that_part(folders, shards, teacher_folder, tmp_path):
    cache = Cache(folders / "int8")
    subset(cache, tmp_path / "layer", Selection(layers=(2,)))
    direct = make_cache(shards, teacher_folder, tmp_path / "direct", targets=EVERY, layers=(2,), states="int8")
    assert tree(tmp_path / "layer" / "units") == tree(direct.folder / "units")
    subset(cache, tmp_path / "some", Selection(fields=("maps", "predictions", "pooled")))
    direct = make_cache(
        shards, teacher_folder, tmp_path / "direct-some", targets=("cross", "pooled"), layers=LAYERS, states="int8"
    )
    assert tree(tmp_path / "some" / "units") == tree(direct.folder / "units")
    assert verify(tmp_path / "some").sound


def test_states_that_are_not_finite_are_refused(shards, tmp_path, save_teacher):
    broken = save_teacher()
    teacher = FusionTeacher.load(broken)
    with torch.no_grad():
        teacher.model.vilt.encoder.layer[2].output.dense.bias.fill_(float("inf"))
    teacher.model.save_pretrained(broken)
    with pytest.raises(TeacherError):
        make_cache(shards, broken, tmp_path / "cache", targets=("cross", "pooled"), states="int8")


def test_the_command_line(shards, teacher_folder, tmp_path):
    data = shards[0].path.parent
    options = ["--targets", "cross,pooled", "--states", "int8"]
    done = cli("extract", data, "--teacher", teacher_folder, "--out", tmp_path / "cache", *options)
    assert done.code == 0, done.err
    assert "pooled states of width 24, int8" in " ".join(
        cli("inspect", tmp_path / "cache").out.replace("│", " ").split()
    )
    assert "pooled states of width 24, int8" in (tmp_path / "cache" / "README.md").read_text()
    quick = ["--steps", 2, "--batch-size", 4, "--workers", 0, "--set", "log_every=1"]
    run = ["train", data, "--targets", tmp_path / "cache", "--out", tmp_path / "run", *quick, "--pooled-weight", 0.5]
    done = cli(*run)
    assert done.code == 0, done.err
    assert metrics_of(tmp_path / "run")[0]["pooled"] > 0
