"""Teachers that start from a checkpoint. Training itself is tested with the command line and with `Fit`."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViltForMaskedLM, ViltForQuestionAnswering

from dde_cache.errors import TeacherError
from dde_cache.importers.common import import_samples
from dde_cache.importers.shapes import shapes_source
from dde_cache.samples import open_shards
from dde_cache.teach import TeachConfig, train_teacher

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
