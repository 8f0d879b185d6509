"""Training from a cache is training with the teacher, without the teacher."""

import json
import shutil
from unittest import mock

import pytest
import torch
import transformers
from conftest import TEXT_LENGTH, randomise, vilt_config
from pipeline import LABELS, make_cache, make_samples, make_shards, tree, whole_batch

from dde_cache.attention import block_softmax
from dde_cache.distill import StudentLosses, TrainConfig
from dde_cache.errors import CacheError, DdeCacheError, InputError, RunError, TeacherError
from dde_cache.losses import dense_kl, log_attention, soft_label_sum, sparse_kl, weighted_sum
from dde_cache.prepare import labels_only
from dde_cache.preprocess import TokenBatch
from dde_cache.presets import PRESETS, lacking_of_preset
from dde_cache.sources import CachedTargets, LabelsOnly, OnlineTargets, layers_of, online_targets
from dde_cache.store import Cache
from dde_cache.student import new_student
from dde_cache.targets import CacheTargets, decoded
from dde_cache.teacher import FusionTeacher
from dde_cache.train import train
from dde_cache.vilt import capture_query_key

LAYER = 2
QUICK = {"steps": 4, "batch_size": 4, "workers": 0, "log_every": 1, "save_every": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train")


@pytest.fixture(scope="module")
def caches(shards, teacher_folder, tmp_path_factory):
    """Caches by name, made on first use."""
    folder = tmp_path_factory.mktemp("caches")
    made = {}

    def cache(name="cache", **config):
        if name not in made:
            made[name] = make_cache(shards, teacher_folder, folder / name, **config)
        return made[name]

    return cache


@pytest.fixture(scope="module")
def student():
    return randomise(new_student(vilt_config(), LABELS), seed=5).eval()


def losses_and_gradients(student, config, targets, batch, mean_heads=False):
    student.zero_grad()
    terms = StudentLosses(config, targets, mean_heads)(student, batch)
    terms["loss"].backward()
    gradient = {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}
    return {name: value.detach() for name, value in terms.items()}, gradient


def cached_and_online(student, shards, teacher, cache, config):
    every = config.queries == "all"
    reader = CacheTargets(cache, shards, LAYER, padded_queries=every)
    batch = whole_batch(shards, cache.preprocessor(), LABELS, reader, full_text=every)
    plain = whole_batch(shards, teacher.preprocessor, LABELS, full_text=every)
    return (
        losses_and_gradients(student, config, CachedTargets(cache), batch),
        losses_and_gradients(student, config, OnlineTargets(teacher, LAYER), plain),
    )


def relative(one, other):
    """Relative distance of two gradients as long vectors."""
    first, second = (torch.cat([gradient[name].flatten() for name in sorted(gradient)]) for gradient in (one, other))
    return float((first - second).norm() / second.norm())


class Whole(FusionTeacher):
    """Runs every pass to its end, and gives maps of its first block too."""

    def __call__(self, tokens, pictures, layers, **options):
        return super().__call__(tokens, pictures, {0, *layers}, **options | {"logits": True})


@pytest.mark.parametrize("layer", [0, 1, LAYER])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"queries": "all"},
        {"attention": "whole"},
        {"hidden_weight": 1.0, "pooled_weight": 1.0, "attention_weight": 0},
    ],
)
def test_an_online_teacher_stops_behind_what_is_compared_and_gives_the_same_bits(
    student, shards, teacher, settings, layer
):
    config = TrainConfig(**settings, soft_weight=0.0, layer=layer)
    batch = whole_batch(shards, teacher.preprocessor, LABELS, full_text=config.queries == "all")
    ran, blocks = [], [*teacher.model.vilt.encoder.layer, teacher.model.classifier]
    hooks = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, block in enumerate(blocks)
    ]
    short = OnlineTargets(teacher, layer)
    taught = online_targets(short, batch, config, layers_of(short, config))
    # Queries and keys are at the beginning of a block, states at its end.
    assert ran == list(range(layer + bool(config.states)))
    whole = OnlineTargets(Whole(teacher.model, teacher.preprocessor), layer)
    expected = online_targets(whole, batch, config, layers_of(whole, config))
    assert ran[-1] == len(blocks) - 1
    for hook in hooks:
        hook.remove()
    assert taught.logits is None
    assert expected.logits is not None
    for name in ("rows", "hidden", "pooled"):
        held, other = getattr(taught, name), getattr(expected, name)
        assert held.keys() == other.keys()
        for place, some in held.items():
            parts = [vars(one).values() if hasattr(one, "__dict__") else one for one in (some, other[place])]
            assert all(torch.equal(one, two) for one, two in zip(*parts, strict=True))
    if not config.states:
        found = [losses_and_gradients(student, config, targets, batch) for targets in (short, whole)]
        for one, two in zip(*found, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_online_teacher_of_soft_labels_alone_computes_no_maps(shards, teacher):
    asked = []

    class Listened(FusionTeacher):
        def __call__(self, tokens, pictures, layers, **options):
            asked.append(super().__call__(tokens, pictures, layers, **options))
            return asked[-1]

    targets = OnlineTargets(Listened(teacher.model, teacher.preprocessor), LAYER)
    batch, config = whole_batch(shards, teacher.preprocessor, LABELS), TrainConfig(attention_weight=0.0)
    logits = online_targets(targets, batch, config, layers_of(targets, config)).logits
    assert asked[0].attention == {}
    full = online_targets(targets, batch, TrainConfig(), layers_of(targets, TrainConfig()))
    assert asked[1].attention.keys() == {(0, LAYER)}
    assert torch.equal(logits, full.logits)


@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalise"])
@pytest.mark.parametrize("queries", ["valid", "all"])
def test_cached_training_is_online_training(student, shards, teacher, caches, queries, tail):
    cache = caches("exact-all", k=None, weights="float32", queries="all")
    config = TrainConfig(queries=queries, tail=tail, hard_weight=0.5)
    (cached, gradient), (online, expected) = cached_and_online(student, shards, teacher, cache, config)
    assert cached.keys() == online.keys() == {"loss", "t2i", "i2t", "soft", "hard"}
    for name, value in online.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-5, atol=1e-5)
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-5, atol=1e-5)
    assert relative(gradient, expected) < 1e-5


def test_a_cache_of_valid_rows_gives_the_same_loss_over_valid_rows(student, shards, teacher, caches):
    cache = caches("exact-valid", k=None, weights="float32")
    (cached, gradient), (online, expected) = cached_and_online(student, shards, teacher, cache, TrainConfig())
    torch.testing.assert_close(cached["loss"], online["loss"], rtol=1e-5, atol=1e-5)
    assert relative(gradient, expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "loss_bound", "gradient_bound"),
    [
        ({"k": None, "weights": "log8"}, 1e-3, 5e-3),
        ({"k": None, "weights": "float16"}, 1e-4, 1e-3),
        ({"k": 8}, 0.01, 0.02),
        ({}, 2e-3, 6e-3),
        ({"steps": 254}, 1e-4, 1.5e-3),
    ],
    ids=["all keys log8", "all keys float16", "top 8 log8", "default (sqrt8, 56 steps)", "sqrt8, 254 steps"],
)
def test_what_quantisation_costs(student, shards, teacher, caches, options, loss_bound, gradient_bound):
    """The stated bounds hold for these maps: peaked random ones, 10 image keys and up to 11 text keys."""
    cache = caches("quantised " + "-".join(map(str, options.values())), **options)
    config = TrainConfig(soft_weight=0.0, hard_weight=0.0)
    (cached, gradient), (online, expected) = cached_and_online(student, shards, teacher, cache, config)
    loss_error = abs(float(cached["loss"] / online["loss"]) - 1)
    print(f"relative error {options}: loss {loss_error:.2e}, gradient {relative(gradient, expected):.2e}")
    assert 1e-8 < loss_error < loss_bound
    assert relative(gradient, expected) < gradient_bound


@pytest.mark.parametrize("heads", ["all", "mean"])
def test_padded_rows_of_whole_rows(student, shards, teacher, caches, heads):
    """Every query row, padding too: the stored row of padding stands for all of a picture's."""
    name = f"every {heads}"
    codes = caches(name, queries="all", steps=254, heads=heads)
    exact = caches(f"exact {heads}", queries="all", k=None, weights="float32", heads=heads)
    config = TrainConfig(queries="all", soft_weight=0.0)
    found = []
    for cache in (codes, exact):
        reader = CacheTargets(cache, shards, LAYER, padded_queries=True)
        batch = whole_batch(shards, cache.preprocessor(), LABELS, reader, full_text=True)
        found.append(losses_and_gradients(student, config, CachedTargets(cache), batch, heads == "mean"))
    (got, gradient), (expected, exactly) = found
    for part in ("t2i", "i2t"):
        torch.testing.assert_close(got[part], expected[part], rtol=2e-3, atol=0)
    assert relative(gradient, exactly) < 4e-3


@pytest.mark.parametrize("tail", ["bucket", "uniform", "renormalise"])
def test_a_cache_of_mean_heads_keeps_its_tail_mass(student, shards, caches, tail):
    """The two strongest keys of the mean, and what the others have together: the loss of sparse rows."""
    cache = caches("sparse mean", k=2, weights="float32", heads="mean")
    batch = whole_batch(shards, cache.preprocessor(), LABELS, CacheTargets(cache, shards, LAYER))
    terms, _ = losses_and_gradients(student, TrainConfig(tail=tail), CachedTargets(cache), batch, mean_heads=True)
    output = student(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"])
    query, key, mask = output.text.query_key.query, output.image.query_key.key, output.image.mask
    held = decoded(batch, "t2i", None)
    assert float(held.tail.max()) > 0.1
    rows = sparse_kl(held, log_attention(query, key, mask, mean_heads=True), mask, tail)
    weight = output.text.mask.float()
    expected = weighted_sum(rows, weight) / weight.sum()
    torch.testing.assert_close(terms["t2i"], expected, rtol=1e-6, atol=1e-7)


def test_mean_of_heads_is_compared_with_the_mean_of_heads(student, shards, teacher, caches):
    cache = caches("mean", k=None, weights="float32", heads="mean")
    reader = CacheTargets(cache, shards, LAYER)
    batch = whole_batch(shards, cache.preprocessor(), LABELS, reader)
    terms, _ = losses_and_gradients(student, TrainConfig(), CachedTargets(cache), batch, mean_heads=True)
    maps = teacher(*inputs_of(batch), [LAYER]).attention[0, LAYER]
    output = student(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"])
    own = log_attention(output.text.query_key.query, output.image.query_key.key, output.image.mask).exp().mean(1).log()
    rows = dense_kl(maps.t2i.mean(1, keepdim=True), own[:, None].clamp_min(-1e30))
    valid = output.text.mask[:, None].float()
    torch.testing.assert_close(terms["t2i"], (rows * valid).sum() / valid.sum(), rtol=1e-5, atol=1e-6)


def inputs_of(batch):
    from dde_cache.batches import pictures_of, tokens_of

    return tokens_of(batch), pictures_of(batch)


@pytest.mark.parametrize("source", ["online", "cached"])
def test_the_published_mean_counts_padded_rows(student, shards, teacher, caches, source):
    """The oracle pads densely: texts to the text length, pictures to the largest of the batch, and takes a mean."""
    config = TrainConfig(queries="all", **{"soft_weight": 1.0})
    cache = caches("exact-all", k=None, weights="float32", queries="all")
    reader = CacheTargets(cache, shards, LAYER, padded_queries=True) if source == "cached" else None
    batch = whole_batch(shards, teacher.preprocessor, LABELS, reader, full_text=True)
    targets = CachedTargets(cache) if source == "cached" else OnlineTargets(teacher, LAYER)
    terms = StudentLosses(config, targets, False)(student, batch)

    tokens, (pictures,) = inputs_of(batch)
    assert tokens.ids.shape[1] == TEXT_LENGTH
    with torch.no_grad():
        maps = teacher(tokens, [pictures], [LAYER])  # without the extra padded token: padding as the batch has it
        output = student(batch["input_ids"], batch["attention_mask"], pictures.pixels, pictures.grid)
    text, image = output.text, output.image
    assert not image.mask.all()
    assert not text.mask.all()
    for name, query, key, mask, rows in (
        ("t2i", text.query_key.query, image.query_key.key, image.mask, maps.attention[0, LAYER].t2i),
        ("i2t", image.query_key.query, text.query_key.key, text.mask, maps.attention[0, LAYER].i2t),
    ):
        expected = dense_kl(rows, log_attention(query, key, mask)).mean()
        torch.testing.assert_close(terms[name], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        terms["soft"], soft_label_sum(output.logits, maps.logits) / len(maps.logits), rtol=1e-5, atol=1e-6
    )


def test_teacher_maps_of_the_oracle_are_the_models_own(teacher, shards):
    """That the rows of padding in the oracle above are the model's: computed here from its own projections."""
    batch = whole_batch(shards, teacher.preprocessor, LABELS, full_text=True)
    tokens, (pictures,) = inputs_of(batch)
    with torch.no_grad(), capture_query_key(teacher.model.vilt.encoder.layer, [LAYER]) as capture:
        maps = teacher(tokens, [pictures], [LAYER]).attention[0, LAYER]
    joint = capture[LAYER]
    expected = block_softmax(
        joint.query[:, :, TEXT_LENGTH:],
        joint.key[:, :, :TEXT_LENGTH],
        tokens.mask.bool(),
        joint.query.shape[-1] ** -0.5,
    )
    torch.testing.assert_close(maps.i2t, expected)
    assert isinstance(tokens, TokenBatch)


# --- a run


def run(shards, targets, out, valid=(), **changes):
    init, resume = changes.pop("init", None), changes.pop("resume", False)
    return train(shards, targets, out, TrainConfig(**(QUICK | changes)), init=init, valid=valid, resume=resume)


def steps_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_teacher_is_never_opened(shards, save_teacher, tmp_path):
    """The teacher's folder is deleted, and every way to a ViLT's weights is blocked."""
    folder = save_teacher(seed=3)
    make_cache(shards, folder, tmp_path / "cache", k=None, weights="float32")
    shutil.rmtree(folder)
    assert not [name for name in tree(tmp_path / "cache") if "safetensors" in name or name.endswith(".bin")]

    def opened(*arguments, **options):
        raise AssertionError("the teacher's weights were opened")

    with (
        mock.patch.object(FusionTeacher, "load", opened),
        mock.patch.object(transformers.ViltPreTrainedModel, "from_pretrained", opened),
        mock.patch("dde_cache.teacher.load_weights", opened),
        mock.patch("dde_cache.student.load_weights", opened),
    ):
        record = run(shards, CachedTargets(Cache(tmp_path / "cache")), tmp_path / "run", valid=shards)
    assert record.steps == 4
    assert all({"loss", "t2i", "i2t", "soft"} <= one.keys() for one in steps_of(tmp_path / "run")[:3])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_run_from_the_cache_is_the_run_with_the_teacher(shards, teacher, caches, tmp_path):
    cache = caches("exact-valid", k=None, weights="float32")
    run(shards, CachedTargets(cache), tmp_path / "cached")
    run(shards, OnlineTargets(teacher, LAYER), tmp_path / "online")
    for cached, online in zip(steps_of(tmp_path / "cached"), steps_of(tmp_path / "online"), strict=True):
        assert cached["loss"] == pytest.approx(online["loss"], rel=1e-4)


def test_labels_only_follows_the_same_path(shards, caches, teacher_folder, tmp_path):
    for name, like in (("cache", caches().folder), ("teacher", teacher_folder)):
        targets = labels_only(str(like))
        assert isinstance(targets, LabelsOnly)
        assert targets.labels == LABELS
        run(shards, targets, tmp_path / name)
        assert steps_of(tmp_path / name)[0].keys() >= {"loss", "hard"}
    assert tree(tmp_path / "cache" / "model") == tree(tmp_path / "teacher" / "model")


def test_a_loss_of_weight_zero_reads_no_targets(shards, caches, tmp_path):
    run(shards, CachedTargets(caches()), tmp_path / "soft", attention_weight=0.0)
    assert not {"t2i", "i2t"} & steps_of(tmp_path / "soft")[0].keys()
    with mock.patch.object(CacheTargets, "targets", side_effect=AssertionError("targets were read")):
        run(shards, CachedTargets(caches()), tmp_path / "hard", attention_weight=0.0, soft_weight=0.0, hard_weight=1.0)
    with pytest.raises(ValueError, match="at least one of attention_weight, soft_weight, hard_weight, hidden_weight"):
        TrainConfig(attention_weight=0, soft_weight=0, hard_weight=0)


def test_towers_start_from_a_checkpoint(shards, caches, teacher_folder, tmp_path):
    record = run(
        shards, CachedTargets(caches()), tmp_path / "run", init=str(teacher_folder), steps=1, learning_rate=1e-9
    )
    assert record.steps == 1
    from safetensors.torch import load_file

    name = "encoder.layer.1.attention.attention.query.weight"
    student = load_file(tmp_path / "run" / "model" / "model.safetensors")
    teacher = load_file(teacher_folder / "model.safetensors")
    for tower in ("text_tower", "image_tower"):
        torch.testing.assert_close(student[f"{tower}.{name}"], teacher[f"vilt.{name}"], atol=1e-6, rtol=0)


# --- what does not fit


def refused(error, match, call):
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, DdeCacheError)


def test_the_dide_recipe(shards, caches, teacher_folder, tmp_path):
    every = caches("dide", queries="all", k=4)
    with pytest.raises(InputError, match="pass --init CHECKPOINT"):
        lacking_of_preset("dide", CachedTargets(every), None)
    with pytest.raises(InputError, match="expected a preset of dide, dide-t2i"):
        lacking_of_preset("dede", CachedTargets(every), "x")
    lacking = " ".join(lacking_of_preset("dide", CachedTargets(every), str(teacher_folder)))
    assert "RandAugment" in lacking
    assert "4 strongest keys" in lacking
    recipe = PRESETS["dide"] | {"batch_size": 4}
    refused(
        CacheError,
        "(?s)padded query rows.*extract with --queries all",
        lambda: run(shards, CachedTargets(caches()), tmp_path / "no", **recipe, init=str(teacher_folder)),
    )
    assert not (tmp_path / "no").exists()
    record = run(shards, CachedTargets(every), tmp_path / "run", **recipe, init=str(teacher_folder))
    assert record.steps == 4


def test_what_the_cache_lacks(shards, caches, save_teacher, tmp_path):
    cached = CachedTargets(caches())
    refused(CacheError, r"layer 0: it has \[2\]", lambda: run(shards, cached, tmp_path / "a", layer=0))
    bare = make_cache(shards, save_teacher(transformers.ViltModel), tmp_path / "bare")
    refused(CacheError, "its teacher has no task head", lambda: run(shards, CachedTargets(bare), tmp_path / "b"))
    lacking = labels_only(str(tmp_path / "bare"))
    refused(TeacherError, "expected a teacher with a task head", lambda: run(shards, lacking, tmp_path / "c"))


def test_labels_that_the_teacher_does_not_know(caches, tmp_path):
    samples = make_samples()
    samples = [
        type(one)(one.key, one.images, tuple(text.model_copy(update={"label": "maybe"}) for text in one.texts))
        for one in samples
    ]
    other = make_shards(tmp_path / "other", samples)
    refused(InputError, "got 1 others:\n  - 'maybe'", lambda: run(other, CachedTargets(caches()), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_fewer_pairs_than_a_batch(shards, caches, tmp_path):
    refused(
        InputError,
        "at least one batch of 100 pairs, got 15 pairs",
        lambda: run(shards, CachedTargets(caches()), tmp_path / "run", batch_size=100),
    )


def test_towers_that_read_something_else(shards, caches, save_teacher, tmp_path):
    other = save_teacher(hidden_size=24, num_attention_heads=2)
    refused(
        TeacherError,
        "teacher's 3 attention heads, got 2; train with --heads mean",
        lambda: run(shards, CachedTargets(caches()), tmp_path / "run", init=str(other)),
    )
    words = save_teacher(vocab_size=40)
    refused(
        TeacherError,
        "vocab_size: expected 17, got 40",
        lambda: run(shards, CachedTargets(caches()), tmp_path / "run", init=str(words)),
    )


def test_resume_with_other_inputs(shards, caches, teacher, tmp_path):
    out = tmp_path / "run"
    run(shards, CachedTargets(caches()), out)
    refused(
        RunError,
        "holds a run; choose another --out, or pass --resume",
        lambda: run(shards, CachedTargets(caches()), out),
    )
    refused(
        RunError,
        "steps: begun with 4, now 5",
        lambda: run(shards, CachedTargets(caches()), out, steps=5, resume=True),
    )
    refused(
        RunError,
        "targets: begun with cache",
        lambda: run(shards, OnlineTargets(teacher, LAYER), out, resume=True),
    )
    refused(
        RunError,
        "pairs: begun with 15",
        lambda: run(shards[:2], CachedTargets(caches(), "skip"), out, resume=True),
    )
    run(shards, CachedTargets(caches()), out, resume=True, workers=1, log_every=3)
    refused(
        RunError, "expected a run to resume", lambda: run(shards, CachedTargets(caches()), tmp_path / "x", resume=True)
    )
