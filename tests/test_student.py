import pytest
import torch
from conftest import PATCH, TEXTS, picture, randomise, vilt_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViltForMaskedLM, ViltModel

from dde_cache.attention import mask_keys, sparsify
from dde_cache.errors import TeacherError
from dde_cache.losses import log_attention, sparse_kl, weighted_sum
from dde_cache.student import DualEncoder, new_student, student_from_vilt

LABELS = ("no", "yes")


@pytest.fixture(scope="module")
def student():
    """Random large weights in eval mode: fresh ones would make every output alike."""
    return randomise(new_student(vilt_config(), LABELS)).eval()


@pytest.fixture(scope="module")
def batch(teacher, pictures, texts):
    tokens = teacher.preprocessor.tokens(texts)
    pixels = teacher.preprocessor.stack([teacher.preprocessor.pixels(image) for image in pictures])
    return {
        "input_ids": tokens.ids,
        "attention_mask": tokens.mask,
        "pixel_values": pixels.pixels,
        "grid": pixels.grid,
    }


@torch.inference_mode()
def run(student, batch):
    return student(**batch)


def assert_same_output(one, other, atol=0.0):
    torch.testing.assert_close(one.logits, other.logits, atol=atol, rtol=0)
    for side in ("text", "image"):
        one_side, other_side = getattr(one, side), getattr(other, side)
        torch.testing.assert_close(one_side.pooled, other_side.pooled, atol=atol, rtol=0)
        assert torch.equal(one_side.mask, other_side.mask)
        torch.testing.assert_close(one_side.query_key.query, other_side.query_key.query, atol=atol, rtol=0)
        torch.testing.assert_close(one_side.query_key.key, other_side.query_key.key, atol=atol, rtol=0)


# --- shape


def test_shapes_and_published_layers(student, batch):
    output = run(student, batch)
    texts, width = len(TEXTS), 24
    assert output.logits.shape == (texts, len(LABELS))
    assert output.text.pooled.shape == output.image.pooled.shape == (texts, width)
    assert output.text.query_key.query.shape == (texts, 3, batch["input_ids"].shape[1], 8)
    assert output.image.query_key.key.shape == (texts, 3, 10, 8)
    assert output.image.mask.sum(-1).tolist() == [10, 7, 5, 2]
    assert torch.equal(output.text.mask, batch["attention_mask"].bool())
    fusion, head = list(student.fusion), list(student.head)
    assert [type(layer).__name__ for layer in fusion] == ["Linear", "LayerNorm", "GELU", "Linear"]
    assert [(fusion[0].in_features, fusion[0].out_features), fusion[3].out_features] == [(2 * width, 2 * width), width]
    assert [(head[0].in_features, head[0].out_features), head[3].out_features] == [(width, 2 * width), len(LABELS)]


def test_labels_of_a_new_student():
    student = new_student(vilt_config(), LABELS)
    assert student.config.id2label == {0: "no", 1: "yes"}
    assert student.config.label2id == {"no": 0, "yes": 1}
    assert student.config.vilt().hidden_size == 24


# --- the towers


def test_each_tower_sees_its_own_side_alone(student, batch):
    base = run(student, batch)
    flipped = {name: batch[name].flip(0) for name in ("input_ids", "attention_mask")}
    other_texts = run(student, batch | flipped)
    assert torch.equal(other_texts.image.pooled, base.image.pooled)
    assert torch.equal(other_texts.image.query_key.query, base.image.query_key.query)
    assert (other_texts.text.pooled - base.text.pooled).abs().max() > 1e-3
    assert (other_texts.logits - base.logits).abs().max() > 1e-3
    flipped = {name: batch[name].flip(0) for name in ("pixel_values", "grid")}
    other_images = run(student, batch | flipped)
    assert torch.equal(other_images.text.pooled, base.text.pooled)
    assert torch.equal(other_images.text.query_key.key, base.text.query_key.key)
    assert (other_images.image.pooled - base.image.pooled).abs().max() > 1e-3
    assert (other_images.logits - base.logits).abs().max() > 1e-3


def test_outputs_do_not_depend_on_the_batch(student, teacher, batch, pictures, texts):
    together = run(student, batch)
    for row, (image, text) in enumerate(zip(pictures, texts, strict=True)):
        tokens = teacher.preprocessor.tokens([text])
        pixels = teacher.preprocessor.stack([teacher.preprocessor.pixels(image)])
        alone = student(tokens.ids, tokens.mask, pixels.pixels, pixels.grid)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=0)
        for side in ("text", "image"):
            one, all_ = getattr(alone, side), getattr(together, side)
            count = one.mask.shape[1]
            torch.testing.assert_close(all_.pooled[row], one.pooled[0], atol=1e-5, rtol=0)
            for name in ("query", "key"):
                expected = getattr(one.query_key, name)[0]
                got = getattr(all_.query_key, name)[row, :, :count]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_what_lies_in_the_padding_does_not_matter(student, batch):
    junk = {name: tensor.clone() for name, tensor in batch.items()}
    junk["pixel_values"][3, :, PATCH:] = 9.0
    junk["pixel_values"][3, :, :, PATCH:] = 9.0
    junk["input_ids"][batch["attention_mask"] == 0] = 7
    torch.testing.assert_close(run(student, junk).logits, run(student, batch).logits, atol=1e-6, rtol=0)


def test_without_a_grid_pictures_fill_the_canvas(student, teacher):
    preprocessor = teacher.preprocessor
    pixels = preprocessor.stack([preprocessor.pixels(picture(48, 24, seed)) for seed in range(2)])
    tokens = preprocessor.tokens(["red", "blue ?"])
    inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "pixel_values": pixels.pixels}
    assert pixels.grid.tolist() == [[2, 4], [2, 4]]
    assert_same_output(run(student, inputs), run(student, inputs | {"grid": pixels.grid}))


def test_stored_vectors_give_the_same_answer(student, batch):
    output = run(student, batch)
    with torch.inference_mode():
        text = student.text_tower(batch["input_ids"], batch["attention_mask"]).pooled
        image = student.image_tower(batch["pixel_values"], batch["grid"]).pooled
        assert torch.equal(student.answer(text, image), output.logits)


def test_the_second_image_has_a_token_type_of_its_own(student, batch):
    with torch.inference_mode():
        first, second = (student.image_tower(batch["pixel_values"], batch["grid"], slot).pooled for slot in (0, 1))
    assert (first - second).abs().max() > 1e-3


# --- saving and loading


def test_a_saved_student_is_the_same(student, batch, tmp_path):
    student.save_pretrained(tmp_path)
    loaded = DualEncoder.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.config.to_dict()["tower"] == student.config.to_dict()["tower"]
    assert loaded.config.id2label == student.config.id2label
    assert set(loaded.state_dict()) == set(student.state_dict())
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    positions = loaded.text_tower.text_embeddings.position_ids
    assert torch.equal(positions, torch.arange(12)[None]), "a buffer that is not saved"
    assert_same_output(run(loaded, batch), run(student, batch))


@pytest.mark.parametrize("deviation", [0.02, 0.2])
def test_every_new_weight_has_the_deviation_that_the_towers_shape_says(deviation):
    config = vilt_config()
    config.initializer_range = deviation
    student = new_student(config, LABELS)
    drawn = [module for module in student.modules() if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d)]
    weights = torch.cat([module.weight.flatten() for module in drawn])
    assert len(drawn) > 2 * config.num_hidden_layers * 6
    torch.testing.assert_close(weights.std().item(), deviation, rtol=0.02, atol=0)
    head = torch.cat([p.flatten() for p in (*student.head.parameters(), *student.fusion.parameters()) if p.dim() == 2])
    torch.testing.assert_close(head.std().item(), deviation, rtol=0.05, atol=0)


def test_two_new_students_of_one_seed_are_equal():
    def fresh():
        torch.manual_seed(3)
        return new_student(vilt_config(), LABELS).state_dict()

    one, two = fresh(), fresh()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.isfinite(tensor).all() for tensor in one.values())
    assert (one["text_tower.token_type"] != 0).any()


# --- starting from a teacher


def test_both_towers_start_from_the_checkpoint(save_teacher):
    folder = save_teacher(modality_type_vocab_size=3)
    source = ViltModel.from_pretrained(folder)
    student = student_from_vilt(folder, LABELS)
    embeddings, types = source.embeddings, source.embeddings.token_type_embeddings.weight
    for tower in (student.text_tower, student.image_tower):
        for part in ("encoder", "layernorm", "pooler"):
            expected = getattr(source, part).state_dict()
            got = getattr(tower, part).state_dict()
            assert set(got) == set(expected)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
    text, image = student.text_tower, student.image_tower
    expected = embeddings.text_embeddings.state_dict()
    assert all(torch.equal(text.text_embeddings.state_dict()[name], expected[name]) for name in expected)
    assert torch.equal(image.patch_embeddings.projection.weight, embeddings.patch_embeddings.projection.weight)
    assert torch.equal(image.patch_embeddings.projection.bias, embeddings.patch_embeddings.projection.bias)
    assert torch.equal(image.cls_token, embeddings.cls_token)
    assert torch.equal(image.position_embeddings, embeddings.position_embeddings)
    assert torch.equal(text.token_type, types[0])
    assert torch.equal(image.token_type, types[1:3])
    with torch.no_grad():
        text.encoder.layer[0].attention.attention.query.weight.add_(1)
    source_weight = source.encoder.layer[0].attention.attention.query.weight
    assert torch.equal(image.encoder.layer[0].attention.attention.query.weight, source_weight), "nothing is shared"


def test_without_a_third_token_type_the_second_image_starts_as_the_first(teacher_folder):
    student = student_from_vilt(teacher_folder, LABELS)
    assert torch.equal(student.image_tower.token_type[0], student.image_tower.token_type[1])


def test_a_tower_computes_what_the_checkpoint_does_on_its_side_alone(teacher_folder, teacher, batch):
    """A ViLT whose picture is hidden from the text by the mask is a text tower, and the other way round."""
    student = student_from_vilt(teacher_folder, LABELS).eval()
    vilt = teacher.model.vilt
    output = run(student, batch)
    with torch.inference_mode():
        nothing = torch.zeros(len(TEXTS), 1, 24)
        hidden = vilt(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            image_embeds=nothing,
            pixel_mask=torch.zeros(len(TEXTS), 1, dtype=torch.long),
        )
    torch.testing.assert_close(output.text.pooled, hidden.pooler_output, atol=1e-5, rtol=0)


def test_dropout_is_the_students_own(teacher_folder):
    still = student_from_vilt(teacher_folder, LABELS)
    assert all(module.p == 0 for module in still.modules() if isinstance(module, torch.nn.Dropout))
    noisy = student_from_vilt(teacher_folder, LABELS, dropout=0.25)
    assert {module.p for module in noisy.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def test_a_checkpoint_without_a_pooler_will_do(save_teacher):
    folder = save_teacher(ViltForMaskedLM)
    weights = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if "pooler" not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    student = student_from_vilt(folder, LABELS)
    text, image = student.text_tower.pooler.dense.weight, student.image_tower.pooler.dense.weight
    assert torch.equal(text, image)
    assert torch.isfinite(text).all()


def test_a_checkpoint_that_lacks_a_tensor_or_is_cut_off(save_teacher):
    folder = save_teacher()
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["vilt.embeddings.cls_token"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 tensors are missing .*cls_token"):
        student_from_vilt(folder, LABELS)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TeacherError, match="the weights cannot be loaded"):
        student_from_vilt(folder, LABELS)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(TeacherError, match="nowhere: expected a checkpoint folder, a hub id"):
        student_from_vilt(tmp_path / "nowhere", LABELS)


# --- what the attention loss reaches


def test_the_attention_loss_trains_query_and_key_and_all_below(teacher, batch, pictures):
    """The last block's values, its MLP, the poolers and the head are out of its reach (DiDE); the rest is not."""
    student = randomise(new_student(vilt_config(), LABELS))
    output = student(**batch)
    generator = torch.Generator().manual_seed(0)
    mask = output.image.mask
    target = torch.rand(len(pictures), 3, batch["input_ids"].shape[1], mask.shape[1], generator=generator)
    sparse = sparsify(mask_keys(target, mask).softmax(-1), 4)
    rows = sparse_kl(sparse, log_attention(output.text.query_key.query, output.image.query_key.key, mask), mask)
    weighted_sum(rows, output.text.mask.float()).backward()
    last = "encoder.layer.2."
    reached = {
        name
        for name, parameter in student.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-7
    }
    assert f"text_tower.{last}attention.attention.query.weight" in reached
    assert f"image_tower.{last}attention.attention.key.weight" in reached
    assert f"image_tower.{last}attention.attention.query.weight" not in reached
    assert "text_tower.token_type" in reached
    assert "image_tower.patch_embeddings.projection.weight" in reached
    assert not any(last in name and ("value" in name or "output" in name or "intermediate" in name) for name in reached)
    assert not any(part in name for name in reached for part in ("pooler", "fusion", "head"))
