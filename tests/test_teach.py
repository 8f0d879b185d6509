"""Teachers that start from a checkpoint. Training itself is tested with the command line and with `Fit`."""

import pytest
import torch
from pipeline import changed, make_cache, make_samples, make_shards, png
from safetensors.torch import load_file, save_file
from transformers import ViltForMaskedLM, ViltForQuestionAnswering, ViltModel

from dde_cache.errors import InputError, TeacherError
from dde_cache.importers.common import import_samples
from dde_cache.importers.shapes import shapes_source
from dde_cache.samples import Sample, Text, open_shards
from dde_cache.teach import TeachConfig, train_teacher
from dde_cache.teacher import FusionTeacher

# So low a rate, for one step, leaves the weights where they began.
ONE_STEP = TeachConfig(steps=1, batch_size=4, learning_rate=1e-12, weight_decay=0, workers=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    import_samples(shapes_source("train", 3), folder / "train")
    return open_shards(folder / "train")


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("family", "answers"), [(ViltForQuestionAnswering, 3), (ViltForMaskedLM, 2)])
def test_a_body_is_taken_whole_and_a_head_for_other_answers_starts_anew(
    save_teacher, shards, tmp_path, family, answers
):
    begun = save_teacher(family, num_labels=answers)
    train_teacher(shards, tmp_path / "out", ONE_STEP, init=str(begun))
    before, after = weights(begun), weights(tmp_path / "out")
    body = {name for name in before if name.startswith("vilt.")}
    assert len(body) > 40
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in body)
    assert after["classifier.3.weight"].shape[0] == 2


def test_a_head_for_as_many_answers_is_kept(save_teacher, shards, tmp_path):
    begun = save_teacher(num_labels=2)
    train_teacher(shards, tmp_path / "out", ONE_STEP, init=str(begun))
    torch.testing.assert_close(
        weights(begun)["classifier.3.weight"], weights(tmp_path / "out")["classifier.3.weight"], atol=1e-6, rtol=0
    )


def test_a_body_that_lacks_a_tensor_is_refused(save_teacher, shards, tmp_path):
    begun = save_teacher(num_labels=2)
    tensors = weights(begun)
    del tensors["vilt.encoder.layer.1.attention.attention.key.weight"]
    save_file(tensors, begun / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 tensors are missing .*layer\.1\.attention\.attention\.key"):
        train_teacher(shards, tmp_path / "out", ONE_STEP, init=str(begun))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("begun", ["from random weights", "from a checkpoint of one image"])
def test_a_teacher_of_two_images(begun, tmp_path, save_teacher):
    """Saved, it is a teacher that extraction takes: two images, NLVR2's answers."""
    texts = [Text(text="a red square", label=label) for label in ("False", "True")]
    samples = [Sample(one.key, one.images * 2, tuple(texts)) for one in make_samples(4, sizes=((36, 36),))]
    shards = make_shards(tmp_path / "data", samples)
    folder = save_teacher(ViltModel)
    init = str(folder) if "checkpoint" in begun else None
    config = ONE_STEP.model_copy(update={"task": "nlvr2", "hidden_size": 24, "layers": 1, "heads": 3})
    taught = train_teacher(shards, tmp_path / "out", config, init=init, valid=shards)
    assert taught.score is not None
    teacher = FusionTeacher.load(tmp_path / "out")
    assert (teacher.images, teacher.labels) == (2, ("False", "True"))
    if init:
        types = teacher.model.vilt.embeddings.token_type_embeddings.weight
        source = ViltModel.from_pretrained(folder).embeddings.token_type_embeddings.weight
        torch.testing.assert_close(types, source[[0, 1, 1]], atol=1e-6, rtol=0)
    make_cache(shards, tmp_path / "out", tmp_path / "cache")


def test_views_are_what_the_recipe_draws_of_each_picture(save_teacher, shards, tmp_path):
    """One view a sample: the same weights as from pictures that were drawn beforehand. More: others every epoch."""
    plain = {"steps": 12, "batch_size": 4, "workers": 0}
    config = TeachConfig(**plain, views=1, view="randaugment-2-9")
    recipe, views = config.drawn
    assert (views, str(recipe)) == (1, config.view)
    drawn = [
        changed(sample, images=(png(recipe(sample.images[0].decode(), sample.key, 0)),))
        for shard in shards
        for sample in shard
    ]
    data = make_shards(tmp_path / "data", drawn)
    found = {}
    for name, some, chosen in (
        ("as processed", shards, TeachConfig(**plain)),
        ("views", shards, config),
        ("drawn", data, TeachConfig(**plain)),
        ("four", shards, TeachConfig(**plain, views=4)),
    ):
        train_teacher(some, tmp_path / name, chosen, init=str(save_teacher(num_labels=2)))
        found[name] = weights(tmp_path / name)["vilt.embeddings.cls_token"]
    assert torch.equal(found["views"], found["drawn"])
    assert not torch.equal(found["views"], found["as processed"])
    assert not torch.equal(found["views"], found["four"])


def test_the_vocabulary_of_a_vqa_teacher(tmp_path):
    """Answers below nine occurrences are no answers; questions of those alone teach nothing."""
    labels = ["yes"] * 9 + ["no"] * 10 + ["maybe"] * 8
    samples = [
        Sample(f"s{number}", make_samples(1)[0].images, (Text(text="blue ?", label=label, answers=(label,) * 10),))
        for number, label in enumerate(labels)
    ]
    shards = make_shards(tmp_path / "data", samples, size=30)
    config = ONE_STEP.model_copy(update={"task": "vqa", "hidden_size": 24, "layers": 1, "heads": 3})
    train_teacher(shards, tmp_path / "out", config)
    assert FusionTeacher.load(tmp_path / "out").labels == ("yes", "no")
    with pytest.raises(InputError, match="task retrieval needs no task head"):
        train_teacher(shards, tmp_path / "none", ONE_STEP.model_copy(update={"task": "retrieval"}))
