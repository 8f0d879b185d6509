"""The oracle is the stock Hugging Face model with `output_attentions=True`, its patches put back in order."""

import json

import numpy as np
import pytest
import torch
from conftest import PATCH, TEXT_LENGTH, picture, randomise, vilt_config, vilt_processor
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    ViltForImagesAndTextClassification,
    ViltForMaskedLM,
    ViltForQuestionAnswering,
    ViltModel,
)

from dde_cache.errors import InputError, TeacherError
from dde_cache.preprocess import Preprocessor, TokenBatch
from dde_cache.teacher import FusionTeacher, resolve, task_logits
from dde_cache.vilt import image_tokens


def prepare(teacher, pictures, texts, full=False):
    preprocessor = teacher.preprocessor
    return preprocessor.tokens(texts, full=full), preprocessor.stack([preprocessor.pixels(image) for image in pictures])


def maps(teacher, pictures, texts, layer=2, **options):
    tokens, pixels = prepare(teacher, pictures, texts, full=options.get("padded_queries", False))
    return teacher(tokens, [pixels], [layer], **options).attention[0, layer]


class Stock:
    """The stock model as its documentation calls it; remembers the patch order that each call drew."""

    def __init__(self, model, processor, seed=0):
        self.model, self.processor = model.eval(), processor
        self.vilt = model.vilt if hasattr(model, "vilt") else model
        self.generator_seed = seed

    def __call__(self, pictures, texts, text_length=None):
        padding = {"padding": True} if text_length is None else {"padding": "max_length", "max_length": text_length}
        inputs = self.processor(images=pictures, text=texts, return_tensors="pt", **padding)
        orders = []
        embeddings, draw = self.vilt.embeddings, type(self.vilt.embeddings).visual_embed

        def visual_embed(*arguments, **options):
            embedded, mask, (index, canvas) = draw(embeddings, *arguments, **options)
            orders.append((index, mask))
            return embedded, mask, (index, canvas)

        embeddings.visual_embed = visual_embed
        torch.manual_seed(self.generator_seed)
        self.generator_seed += 1
        try:
            with torch.inference_mode():
                output = self.model(**inputs, output_attentions=True)
        finally:
            del embeddings.visual_embed
        return inputs, output, *orders[0]


def stock_blocks(attention, sample, text_length, order=None):
    """The two blocks of one sample's whole-sequence attention over their row sums; image axis permuted by `order`."""
    whole = attention[sample].double()
    if order is not None:
        place = torch.cat([torch.arange(text_length), text_length + order])
        whole = whole[:, place][:, :, place]
    t2i, i2t = whole[:, :text_length, text_length:], whole[:, text_length:, :text_length]
    return t2i / t2i.sum(-1, keepdim=True), i2t / i2t.sum(-1, keepdim=True)


def row_major(index, mask):
    """Positions of CLS and the valid patches in row-major order, then the others as they came."""
    place = index[:, 0] * 1000 + index[:, 1]
    place = torch.where(mask[1:].bool(), place, 10**9)
    return torch.cat([torch.zeros(1, dtype=torch.long), 1 + place.argsort(stable=True)])


@pytest.fixture(scope="module")
def stock(teacher_folder):
    return Stock(ViltForQuestionAnswering.from_pretrained(teacher_folder), vilt_processor())


# --- the order of the patches


def test_an_image_has_the_same_map_alone_in_a_batch_and_twice(teacher, pictures, texts):
    together, again = maps(teacher, pictures, texts), maps(teacher, pictures, texts)
    for row, (image, text) in enumerate(zip(pictures, texts, strict=True)):
        alone = maps(teacher, [image], [text])
        words, patches = alone.t2i.shape[2:]
        for batch in (together, again):
            torch.testing.assert_close(batch.t2i[row, :, :words, :patches], alone.t2i[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(batch.i2t[row, :, :patches, :words], alone.i2t[0], atol=1e-5, rtol=0)
            assert (batch.t2i[row, :, :, patches:] == 0).all()
            assert (batch.i2t[row, :, :, words:] == 0).all()


def test_the_stock_order_fails_that_test(stock, pictures, texts):
    """Why `vilt.embed_patches` exists: should this fail, Hugging Face has mended ViLT."""
    image, text = pictures[:1], texts[:1]
    inputs, first, index, _ = stock(image, text)
    _, second, other_index, _ = stock(image, text)
    words = inputs["input_ids"].shape[1]
    assert not torch.equal(index, other_index)
    one, two = (stock_blocks(output.attentions[2], 0, words)[0] for output in (first, second))
    assert (one - two).abs().max() > 1e-2
    torch.testing.assert_close(one.sort(-1).values, two.sort(-1).values, atol=1e-5, rtol=0)


def test_the_image_axis_is_row_major(teacher, pictures, texts):
    """Swapping two patches of a picture whose model has no positions swaps their places on the axis."""
    model = randomise(ViltForQuestionAnswering(vilt_config()))
    with torch.no_grad():
        model.vilt.embeddings.position_embeddings[:, 1:] = 0
    plain = FusionTeacher(model, teacher.preprocessor)
    tokens, pixels = prepare(plain, pictures[1:2], texts[:1])
    assert pixels.grid.tolist() == [[3, 2]]
    before = plain(tokens, [pixels], [2]).attention[0, 2].t2i
    moved = pixels.pixels.clone()
    moved[:, :, :PATCH, PATCH:] = pixels.pixels[:, :, 2 * PATCH :, :PATCH]  # row 0 column 1, patch 1
    moved[:, :, 2 * PATCH :, :PATCH] = pixels.pixels[:, :, :PATCH, PATCH:]  # row 2 column 0, patch 4
    after = plain(tokens, [type(pixels)(moved, pixels.grid)], [2]).attention[0, 2].t2i
    torch.testing.assert_close(after, before[..., [0, 1, 5, 3, 4, 2, 6]], atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-3


# --- equality with the stock model


@pytest.mark.parametrize("layers", [(2,), (0, 2), (0, 1, 2)])
def test_maps_and_logits_are_those_of_the_stock_model(teacher, stock, pictures, texts, layers):
    inputs, output, index, mask = stock(pictures, texts)
    tokens, pixels = prepare(teacher, pictures, texts)
    assert torch.equal(tokens.ids, inputs["input_ids"])
    assert torch.equal(pixels.pixels, inputs["pixel_values"])
    ours = teacher(tokens, [pixels], layers)
    assert set(ours.attention) == {(0, layer) for layer in layers}
    torch.testing.assert_close(ours.logits, output.logits, atol=1e-5, rtol=0)
    words = tokens.ids.shape[1]
    for layer in layers:
        for row in range(len(texts)):
            expected = stock_blocks(output.attentions[layer], row, words, row_major(index[row], mask[row]))
            count = int(tokens.mask[row].sum())
            patches = int(mask[row].sum())
            t2i, i2t = ours.attention[0, layer].t2i[row].double(), ours.attention[0, layer].i2t[row].double()
            # Padded text rows are rows too; padded image rows are compared below.
            torch.testing.assert_close(t2i, expected[0], atol=2e-6, rtol=0)
            torch.testing.assert_close(i2t[:, :patches], expected[1][:, :patches], atol=2e-6, rtol=0)
            assert (t2i[:, :, patches:] == 0).all()
            assert (i2t[:, :, count:] == 0).all()


def test_logits_with_and_without_maps_agree(teacher, pictures, texts):
    tokens, pixels = prepare(teacher, pictures, texts)
    with torch.inference_mode():
        torch.testing.assert_close(
            task_logits(teacher.model, tokens, [pixels]), teacher(tokens, [pixels], [2]).logits, atol=1e-6, rtol=0
        )


def test_two_images_are_two_passes_of_the_stock_model(save_teacher, pictures, texts):
    folder = save_teacher(
        ViltForImagesAndTextClassification,
        num_images=2,
        modality_type_vocab_size=3,
        id2label={0: "False", 1: "True"},
        label2id={"False": 0, "True": 1},
    )
    teacher = FusionTeacher.load(folder)
    stock = ViltForImagesAndTextClassification.from_pretrained(folder).eval()
    left, right = pictures, pictures[::-1]
    inputs = vilt_processor()(images=[*left, *right], text=texts * 2, padding=True, return_tensors="pt")
    paired = {name: inputs[name].unflatten(0, (2, -1)).transpose(0, 1) for name in ("pixel_values", "pixel_mask")}
    text = {name: inputs[name][: len(texts)] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.inference_mode():
        expected = stock(**text, **paired).logits
    tokens, first = prepare(teacher, left, texts)
    _, second = prepare(teacher, right, texts)
    ours = teacher(tokens, [first, second], [1, 2])
    torch.testing.assert_close(ours.logits, expected, atol=1e-5, rtol=0)
    assert set(ours.attention) == {(0, 1), (1, 1), (0, 2), (1, 2)}
    swapped = teacher(tokens, [second, first], [1, 2])
    assert (swapped.logits - ours.logits).abs().max() > 1e-3, "the second picture has a token type of its own"
    assert teacher.images == 2
    assert teacher.labels == ("False", "True")
    with pytest.raises(InputError, match=r"expected 2 images a sample for this teacher, got 1"):
        teacher(tokens, [first], [2])


# --- padded query rows


def test_the_padded_rows_do_not_depend_on_the_batch(teacher, pictures, texts):
    together = maps(teacher, pictures, texts, padded_queries=True)
    assert together.t2i.shape[2] == TEXT_LENGTH
    for row, (image, text) in enumerate(zip(pictures, texts, strict=True)):
        alone = maps(teacher, [image], [text], padded_queries=True)
        patches = alone.t2i.shape[3] - 1
        assert alone.i2t.shape[2] == patches + 1
        torch.testing.assert_close(together.t2i[row, :, :, :patches], alone.t2i[0, :, :, :patches], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            together.i2t[row, :, : patches + 1], alone.i2t[0], atol=1e-5, rtol=0, msg="valid rows and one padded row"
        )
        plain = maps(teacher, [image], [text])
        words = plain.t2i.shape[2]
        torch.testing.assert_close(alone.t2i[0, :, :words, :patches], plain.t2i[0], atol=1e-5, rtol=0)


def test_the_padded_rows_are_those_of_the_stock_model(teacher, stock, pictures, texts):
    ours = maps(teacher, pictures, texts, padded_queries=True)
    inputs, output, index, mask = stock(pictures, texts, TEXT_LENGTH)
    compared = 0
    for row in range(len(pictures)):
        order, patches = row_major(index[row], mask[row]), int(mask[row].sum())
        t2i, i2t = stock_blocks(output.attentions[2], row, TEXT_LENGTH, order)
        torch.testing.assert_close(ours.t2i[row, :, :, : t2i.shape[-1]].double(), t2i, atol=2e-6, rtol=0)
        for padded in range(patches, i2t.shape[1]):
            torch.testing.assert_close(ours.i2t[row, :, patches].double(), i2t[:, padded], atol=2e-6, rtol=0)
            compared += 1
    assert compared >= 3
    assert int(inputs["attention_mask"].sum()) < inputs["attention_mask"].numel()


# --- what a teacher is


def test_layers_heads_labels(teacher):
    assert (teacher.layers, teacher.heads) == (3, 3)
    assert teacher.labels == ("no", "yes", "red")
    assert teacher.images == 1
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_call_leaves_no_hooks_behind(teacher, pictures, texts):
    tokens, pixels = prepare(teacher, pictures, texts)
    teacher(tokens, [pixels], [0, 2])
    with pytest.raises(IndexError):
        teacher(TokenBatch(tokens.ids + 1000, tokens.mask), [pixels], [0, 2])
    assert not any(module._forward_hooks for module in teacher.model.modules())


@pytest.mark.parametrize("family", [ViltModel, ViltForMaskedLM])
def test_a_teacher_without_a_task_head_gives_maps_and_no_logits(save_teacher, pictures, texts, family):
    teacher = FusionTeacher.load(save_teacher(family))
    tokens, pixels = prepare(teacher, pictures, texts)
    output = teacher(tokens, [pixels], [2])
    assert output.logits is None
    assert teacher.labels is None
    torch.testing.assert_close(output.attention[0, 2].t2i.sum(-1), torch.ones(4, 3, tokens.ids.shape[1]))


def test_two_images_for_a_teacher_of_one(teacher, pictures, texts):
    tokens, pixels = prepare(teacher, pictures, texts)
    with pytest.raises(InputError, match=r"expected 1 images a sample for this teacher, got 2"):
        teacher(tokens, [pixels, pixels], [2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_gives_float32_rows_that_sum_to_one(teacher_folder, pictures, texts, dtype):
    teacher = FusionTeacher.load(teacher_folder, dtype=dtype)
    exact = maps(FusionTeacher.load(teacher_folder), pictures, texts, layer=0)
    rough = maps(teacher, pictures, texts, layer=0)
    assert rough.t2i.dtype == torch.float32
    torch.testing.assert_close(rough.t2i.sum(-1), torch.ones_like(rough.t2i.sum(-1)), atol=1e-6, rtol=0)
    assert (rough.t2i - exact.t2i).abs().max() < 0.1


def test_weights_hash_is_about_tensors_not_files(teacher_folder, tmp_path):
    teacher = FusionTeacher.load(teacher_folder)
    before = teacher.weights_hash()
    assert before == FusionTeacher.load(teacher_folder).weights_hash()
    teacher.model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    teacher.preprocessor.processor.save_pretrained(tmp_path)
    split = FusionTeacher.load(tmp_path)
    assert split.weights_hash() == before
    with torch.no_grad():
        split.model.classifier[0].weight[0, 0] += 1e-6
    assert split.weights_hash() != before


# --- errors


def copy_teacher(source, target):
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_missing_folder(tmp_path):
    with pytest.raises(TeacherError, match=r"nowhere: expected a checkpoint folder, a hub id"):
        FusionTeacher.load(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [None, "{", "{}", '{"model_type": "no such model"}'])
def test_a_folder_without_a_readable_config(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(TeacherError, match="expected a folder or hub id with a checkpoint of a fusion encoder"):
        FusionTeacher.load(tmp_path)


def test_a_model_that_is_no_fusion_encoder(tmp_path):
    shape = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(shape).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"expected a fusion encoder \(model_type vilt, .*\), got model_type bert"):
        FusionTeacher.load(tmp_path)


def test_an_architecture_that_we_cannot_read(teacher_folder, tmp_path):
    folder = copy_teacher(teacher_folder, tmp_path)
    edit_json(folder / "config.json", architectures=["ViltForTokenClassification"])
    with pytest.raises(TeacherError, match=r"expected a fusion encoder .*got\s+ViltForTokenClassification"):
        FusionTeacher.load(folder)


def test_weights_that_lack_a_tensor(teacher_folder, tmp_path):
    folder = copy_teacher(teacher_folder, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["vilt.encoder.layer.2.attention.attention.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 tensors are missing .*layer\.2\.attention\.attention\.query\.weight"):
        FusionTeacher.load(folder)


def test_weights_of_another_shape(teacher_folder, tmp_path):
    folder = copy_teacher(teacher_folder, tmp_path)
    edit_json(folder / "config.json", intermediate_size=40)
    with pytest.raises(TeacherError, match=str(folder)):
        FusionTeacher.load(folder)


def test_weights_that_are_cut_off(teacher_folder, tmp_path):
    folder = copy_teacher(teacher_folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TeacherError, match="the weights cannot be loaded"):
        FusionTeacher.load(folder)


def test_no_weights_at_all(teacher_folder, tmp_path):
    folder = copy_teacher(teacher_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="the weights cannot be loaded"):
        FusionTeacher.load(folder)


def test_no_processor(teacher_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((teacher_folder / name).read_bytes())
    with pytest.raises(TeacherError, match="expected a ViLT processor and tokenizer beside the model"):
        FusionTeacher.load(tmp_path)


def test_a_tokenizer_with_more_words_than_the_model(save_teacher):
    with pytest.raises(TeacherError, match="the tokenizer has 17 entries, the model 16; they do not belong together"):
        FusionTeacher.load(save_teacher(vocab_size=16))


def test_a_processor_that_resizes_to_what_the_patch_does_not_divide(teacher_folder, tmp_path):
    folder = copy_teacher(teacher_folder, tmp_path)
    vilt_processor(do_resize=True, size={"shortest_edge": 36}, size_divisor=32).save_pretrained(folder)
    with pytest.raises(TeacherError, match=r"multiples of 32 px, which the patch of 12 px does not divide"):
        FusionTeacher.load(folder)
    vilt_processor(do_resize=True, size={"shortest_edge": 36}, size_divisor=PATCH).save_pretrained(folder)
    teacher = FusionTeacher.load(folder)
    # 100 x 50 at shorter side 36 is 72 x 36, capped at 1333/800 * 36 = 60, and cut to a multiple of 12.
    assert teacher.preprocessor.pixels(picture(100, 50)).shape == (3, 24, 48)


def test_a_picture_that_the_patch_does_not_divide(teacher):
    with pytest.raises(InputError, match=r"multiples of the patch of 12 px, got 30 x\s+24 px \(30 x 24 after"):
        teacher.preprocessor.pixels(picture(30, 24))


def test_texts_are_cut_and_padded_to_the_text_length(teacher):
    long = "red " * 30
    tokens = teacher.preprocessor.tokens([long, "red"])
    assert tokens.ids.shape == (2, TEXT_LENGTH)
    assert tokens.mask.sum(-1).tolist() == [TEXT_LENGTH, 3]
    assert teacher.preprocessor.tokens(["red"]).ids.shape == (1, 3)
    assert teacher.preprocessor.tokens(["red"], full=True).ids.shape == (1, TEXT_LENGTH)
    assert [length > 16 for length in teacher.preprocessor.lengths([long, "red"])] == [True, False]


def test_pictures_are_rescaled_and_padded_with_zero(teacher):
    preprocessor = Preprocessor(vilt_processor(), PATCH, TEXT_LENGTH)
    wide, tall = picture(36, 12), picture(12, 24)
    batch = preprocessor.stack([preprocessor.pixels(wide), preprocessor.pixels(tall)])
    assert batch.grid.tolist() == [[1, 3], [2, 1]]
    assert image_tokens(batch.grid).tolist() == [4, 3]
    expected = np.asarray(tall, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(batch.pixels[1, :, :, :12], expected, atol=1e-6)
    assert (batch.pixels[1, :, :, 12:] == 0).all()
    assert (batch.pixels[0, :, 12:] == 0).all()


def test_names_of_teachers(tmp_path):
    assert resolve("sample").endswith("sample_teacher")
    assert resolve("some/hub-id") == "some/hub-id"
    assert resolve(tmp_path) == str(tmp_path)
    with pytest.raises(TeacherError, match="no such folder"):
        resolve("not/a/hub-id")
