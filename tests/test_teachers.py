"""The contract of every family of teachers. The oracle is the stock model of Hugging Face, run as it stands."""

import json
from functools import cache, partial

import pytest
import torch
from conftest import PATCH, TEXTS, picture
from families import BUILDERS, FEATURES, OF_PICTURES, SIDE, blip, bridgetower, flava, lxmert, save_family
from PIL import Image
from test_teacher import Stock, row_major, stock_blocks
from transformers import (
    BlipForQuestionAnswering,
    BridgeTowerModel,
    FlavaModel,
    LxmertForPreTraining,
    LxmertModel,
)

from dde_cache.errors import InputError, TeacherError
from dde_cache.identity import ExtractConfig, target_spec
from dde_cache.preprocess import PixelBatch, RegionBatch
from dde_cache.scoring import check_matching, matching_scores
from dde_cache.spec import TargetSpec
from dde_cache.teacher import FusionTeacher
from dde_cache.teachers import ARCHITECTURES, FAMILIES

SIZES = ((36, 36), (24, 36), (48, 12), (12, 12))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return cache(lambda name: FusionTeacher.load(save_family(name, tmp_path_factory.mktemp(name))))


@pytest.fixture(scope="module", params=BUILDERS)
def teacher(request, load):
    return load(request.param)


@pytest.fixture(scope="module", params=OF_PICTURES)
def of_pictures(request, load):
    return load(request.param)


def regions(counts, seed=0, pad=0):
    """As many regions of random features as `counts` says, with noise where the padding is."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(counts) + pad
    features = torch.randn(len(counts), longest, FEATURES, generator=generator)
    boxes = torch.rand(len(counts), longest, 4, generator=generator)
    return RegionBatch(features, boxes, torch.tensor(counts))


def pictures_for(teacher, rows=(0, 1, 2, 3)):
    """The pictures, or regions, of some rows of a batch of four."""
    if teacher.family.name not in OF_PICTURES:
        every = regions((5, 3, 1, 4))
        count = every.count[list(rows)]
        longest = int(count.max())
        return RegionBatch(every.features[list(rows), :longest], every.boxes[list(rows), :longest], count)
    images = [picture(*SIZES[row], row) for row in rows]
    return teacher.preprocessor.stack([teacher.preprocessor.pixels(image) for image in images])


def texts_for(teacher, rows=(0, 1, 2, 3), full=False):
    return teacher.preprocessor.tokens([TEXTS[row] for row in rows], full=full)


def image_tokens_of(batch):
    return batch.count if isinstance(batch, RegionBatch) else batch.grid.prod(-1) + 1


# --- oracles: (t2i, i2t or None) by layer, and logits


def normalised(block):
    return block / block.sum(-1, keepdim=True)


def of_vilt(teacher, tokens, batch):
    images = [picture(*size, row) for row, size in enumerate(SIZES)]
    _inputs, output, index, mask = Stock(teacher.model, teacher.preprocessor.processor)(images, list(TEXTS))
    length = tokens.mask.shape[1]
    maps = {}
    for layer in range(teacher.layers):
        blocks = [
            stock_blocks(output.attentions[layer], row, length, row_major(index[row], mask[row]))
            for row in range(len(TEXTS))
        ]
        maps[layer] = tuple(torch.stack(side) for side in zip(*blocks, strict=True))
    return maps, output.logits


def of_bridgetower(teacher, tokens, batch):
    found = {}

    def keep(name, _module, _inputs, output):
        found[name] = output[1]

    sides = {
        "t2i": teacher.model.bridgetower.cross_modal_text_layers,
        "i2t": teacher.model.bridgetower.cross_modal_image_layers,
    }
    handles = [
        layer.crossattention.self.register_forward_hook(partial(keep, (side, number)))
        for side, layers in sides.items()
        for number, layer in enumerate(layers)
    ]
    output = teacher.model(tokens.ids, tokens.mask, pixel_values=batch.pixels, output_attentions=True)
    for handle in handles:
        handle.remove()
    # What the trap is: the documented way gives square maps, a modality's attention to itself.
    text, image = output.attentions[0]
    assert text.shape[2] == text.shape[3]
    assert image.shape[2] == image.shape[3]
    return {layer: (found["t2i", layer], found["i2t", layer]) for layer in range(teacher.layers)}, output.logits


def of_blip(teacher, tokens, batch):
    model = teacher.model
    image = model.vision_model(pixel_values=batch.pixels).last_hidden_state
    mask = torch.ones(image.shape[:2], dtype=torch.long)
    read = {"encoder_hidden_states": image, "encoder_attention_mask": mask, "output_attentions": True}
    output = model.text_encoder(input_ids=tokens.ids, attention_mask=tokens.mask, **read)
    logits = model(input_ids=tokens.ids, pixel_values=batch.pixels, attention_mask=tokens.mask).itm_score
    return {layer: (t2i, None) for layer, t2i in enumerate(output.cross_attentions)}, logits


def of_flava(teacher, tokens, batch):
    model = teacher.model
    inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "pixel_values": batch.pixels}
    alone = model.flava(**inputs, skip_multimodal_encoder=True)
    image = model.flava.image_to_mm_projection(alone.image_output.hidden_states[-1])
    text = model.flava.text_to_mm_projection(alone.text_output.hidden_states[-1])
    seen = torch.cat([torch.ones(len(text), image.shape[1] + 1, dtype=torch.long), tokens.mask], dim=1)
    joint = model.flava.multimodal_model(
        torch.cat([image, text], dim=1), attention_mask=seen, output_attentions=True, output_hidden_states=True
    )
    torch.testing.assert_close(joint[0], model.flava(**inputs).multimodal_embeddings)
    end = 1 + image.shape[1]
    maps = {
        layer: (normalised(whole[:, :, end:, 1:end]), normalised(whole[:, :, 1:end, end:]))
        for layer, whole in enumerate(joint.attentions)
    }
    return maps, model(**inputs, return_loss=False).itm_logits


def of_lxmert(teacher, tokens, batch):
    found = {}
    blocks = teacher.model.lxmert.encoder.x_layers

    def both(layer, stock, *arguments, output_attentions=False):
        context, weights = stock(*arguments, output_attentions=True)
        found.setdefault(layer, []).append(weights)
        return (context, weights) if output_attentions else (context,)

    for layer, block in enumerate(blocks):
        attention = block.visual_attention.att
        attention.forward = partial(both, layer, type(attention).forward.__get__(attention))
    mask = torch.arange(batch.features.shape[1]) < batch.count[:, None]
    output = teacher.model(
        tokens.ids,
        batch.features,
        batch.boxes,
        attention_mask=tokens.mask,
        visual_attention_mask=mask.long(),
        output_attentions=True,
    )
    for layer, block in enumerate(blocks):
        del block.visual_attention.att.forward
        torch.testing.assert_close(output.cross_encoder_attentions[layer], found[layer][0])
    return {layer: tuple(calls) for layer, calls in found.items()}, output.question_answering_score


ORACLES = {
    "vilt": of_vilt,
    "bridgetower": of_bridgetower,
    "blip": of_blip,
    "flava": of_flava,
    "lxmert": of_lxmert,
}


def stock_of(teacher, tokens, batch):
    with torch.inference_mode():
        return ORACLES[teacher.family.name](teacher, tokens, batch)


# --- the contract


def test_maps_and_logits_are_those_of_the_stock_model(teacher):
    tokens, batch = texts_for(teacher), pictures_for(teacher)
    expected, logits = stock_of(teacher, tokens, batch)
    layers = tuple(range(teacher.layers))
    ours = teacher(tokens, [batch], layers)
    torch.testing.assert_close(ours.logits, logits, atol=1e-5, rtol=1e-6)
    assert ours.logits.shape[1] == len(teacher.labels)
    for layer in layers:
        maps = ours.attention[0, layer]
        assert (maps.i2t is None) == ("i2t" not in teacher.directions)
        for row in range(len(TEXTS)):
            words, seen = int(tokens.mask[row].sum()), int(image_tokens_of(batch)[row])
            for got, want, rows in ((maps.t2i, expected[layer][0], words), (maps.i2t, expected[layer][1], seen)):
                if got is None:
                    continue
                keys = seen if got is maps.t2i else words
                want = want[row, :, :rows, :keys].float()
                torch.testing.assert_close(got[row, :, :rows, :keys], want, atol=5e-6, rtol=0)


def test_maps_are_far_from_uniform(teacher):
    """Otherwise the other tests would see nothing."""
    maps = teacher(texts_for(teacher), [pictures_for(teacher)], [0]).attention[0, 0]
    assert maps.t2i[0].amax(-1).mean() > 2 * maps.t2i[0].mean()


def test_rows_sum_to_one_and_padding_has_nothing(teacher):
    tokens, batch = texts_for(teacher), pictures_for(teacher)
    words, seen = tokens.mask.sum(-1), image_tokens_of(batch)
    for maps in teacher(tokens, [batch], range(teacher.layers)).attention.values():
        for rows, keys in ((maps.t2i, seen), (maps.i2t, words)):
            if rows is None:
                continue
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-6, rtol=0)
            for row, count in enumerate(keys.tolist()):
                assert (rows[row, ..., count:] == 0).all()
                assert (rows[row, ..., :count] > 0).all()


def test_a_pair_has_the_same_maps_alone_and_beside_longer_ones(teacher):
    last = teacher.layers - 1
    together = teacher(texts_for(teacher), [pictures_for(teacher)], [last])
    for row in range(len(TEXTS)):
        tokens, batch = texts_for(teacher, [row]), pictures_for(teacher, [row])
        alone = teacher(tokens, [batch], [last])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-6)
        words, seen = tokens.mask.shape[1], int(image_tokens_of(batch)[0])
        maps, one = together.attention[0, last], alone.attention[0, last]
        torch.testing.assert_close(maps.t2i[row, :, :words, :seen], one.t2i[0], atol=1e-5, rtol=0)
        if one.i2t is not None:
            torch.testing.assert_close(maps.i2t[row, :, :seen, :words], one.i2t[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BUILDERS)
def test_each_axis_is_in_the_order_of_what_it_is_of(name, tmp_path):
    """Where nothing has a position, swapping two words or two patches swaps their places on the axes, and no more."""
    teacher = FusionTeacher.load(save_family(name, tmp_path, positions=False))
    tokens, batch = texts_for(teacher, [0]), pictures_for(teacher, [0])
    last = teacher.layers - 1
    before = teacher(tokens, [batch], [last]).attention[0, last]
    words, seen = torch.arange(tokens.mask.shape[1]), torch.arange(int(image_tokens_of(batch)[0]))
    ids = tokens.ids.clone()
    ids[0, [2, 4]] = ids[0, [4, 2]]
    words[[2, 4]] = words[[4, 2]]
    if isinstance(batch, PixelBatch):
        pixels = batch.pixels.clone()
        pixels[:, :, :PATCH, PATCH : 2 * PATCH] = batch.pixels[:, :, 2 * PATCH :, :PATCH]  # row 0 column 1: patch 1
        pixels[:, :, 2 * PATCH :, :PATCH] = batch.pixels[:, :, :PATCH, PATCH : 2 * PATCH]  # row 2 column 0: patch 6
        moved, places = PixelBatch(pixels, batch.grid), [2, 7]  # behind CLS
    else:
        order = torch.tensor([0, 3, 2, 1, 4])
        moved, places = RegionBatch(batch.features[:, order], batch.boxes[:, order], batch.count), [1, 3]
    seen[places] = seen[places[::-1]]
    after = teacher(type(tokens)(ids, tokens.mask), [moved], [last]).attention[0, last]
    torch.testing.assert_close(after.t2i, before.t2i[:, :, words][..., seen], atol=1e-5, rtol=0)
    assert (after.t2i - before.t2i).abs().max() > 1e-3
    if before.i2t is not None:
        torch.testing.assert_close(after.i2t, before.i2t[:, :, seen][..., words], atol=1e-5, rtol=0)
        assert (after.i2t - before.i2t).abs().max() > 1e-3


# --- whole rows, hidden states, padded rows: what a family has, and what it says where it has not


def test_whole_rows_hold_the_maps(teacher):
    tokens, batch = texts_for(teacher, [0, 2]), pictures_for(teacher, [0, 2])
    if not teacher.family.whole:
        with pytest.raises(TeacherError, match="no attention over the whole sequence: leave whole out of --targets"):
            teacher(tokens, [batch], [0], whole=True)
        return
    output = teacher(tokens, [batch], [0], whole=True)
    maps, whole = output.attention[0, 0], output.whole[0, 0]
    for row in range(2):
        words, seen = int(tokens.mask[row].sum()), int(image_tokens_of(batch)[row])
        t2w, i2w = whole.t2w[row, :, :words], whole.i2w[row, :, :seen]
        torch.testing.assert_close(t2w.sum(-1), torch.ones(t2w.shape[:-1]), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            normalised(t2w[..., words : words + seen]), maps.t2i[row, :, :words, :seen], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(normalised(i2w[..., :words]), maps.i2t[row, :, :seen, :words], atol=1e-5, rtol=0)


def test_hidden_states_are_those_of_the_stock_blocks(teacher):
    tokens, batch = texts_for(teacher), pictures_for(teacher)
    if not teacher.family.hidden:
        with pytest.raises(TeacherError, match="no states of the image: leave hidden and pooled out"):
            teacher(tokens, [batch], [0], hidden=True)
        return
    held = teacher(tokens, [batch], [0, 1], hidden=True).hidden
    assert held[0, 0].text.shape[2] == held[0, 0].image.shape[2] == teacher.width
    with torch.inference_mode():
        for layer in (0, 1):
            text, image = stock_states(teacher, tokens, batch, layer)
            for row in range(len(TEXTS)):
                words, seen = int(tokens.mask[row].sum()), int(image_tokens_of(batch)[row])
                near = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
                near(held[0, layer].text[row, :words], text[row, :words])
                if teacher.family.name != "vilt":  # there the stock patches have no order; test_whole_and_hidden has it
                    near(held[0, layer].image[row, :seen], image[row, :seen])


def stock_states(teacher, tokens, batch, layer):
    """What a block of the stock model puts out, by modality."""
    model, asked = teacher.model, {"output_hidden_states": True}
    if teacher.family.name == "vilt":
        images = [picture(*size, row) for row, size in enumerate(SIZES)]
        inputs = teacher.preprocessor.processor(images=images, text=list(TEXTS), return_tensors="pt", padding=True)
        joint = model(**inputs, **asked).hidden_states[layer + 1]
        return joint[:, : tokens.mask.shape[1]], joint[:, tokens.mask.shape[1] :]
    if teacher.family.name == "bridgetower":
        return model(tokens.ids, tokens.mask, pixel_values=batch.pixels, **asked).hidden_states[2][layer]
    if teacher.family.name == "flava":
        flava = model.flava
        alone = flava(tokens.ids, batch.pixels, tokens.mask, skip_multimodal_encoder=True)
        image = flava.image_to_mm_projection(alone.image_output.hidden_states[-1])
        text = flava.text_to_mm_projection(alone.text_output.hidden_states[-1])
        seen = torch.cat([torch.ones(len(text), image.shape[1] + 1, dtype=torch.long), tokens.mask], dim=1)
        joint = flava.multimodal_model(torch.cat([image, text], 1), attention_mask=seen, **asked)
        states = joint.hidden_states[layer + 1]
        return states[:, 1 + image.shape[1] :], states[:, 1 : 1 + image.shape[1]]
    mask = (torch.arange(batch.features.shape[1]) < batch.count[:, None]).long()
    inputs = {"attention_mask": tokens.mask, "visual_attention_mask": mask}
    output = model(tokens.ids, batch.features, batch.boxes, **inputs, **asked)
    # One layer of each encoder comes first.
    return output.language_hidden_states[1 + layer], output.vision_hidden_states[1 + layer]


def test_padded_query_rows(teacher):
    tokens, batch = texts_for(teacher, full=True), pictures_for(teacher)
    if not teacher.family.padded_queries:
        with pytest.raises(TeacherError, match="no padded image row: use --queries valid"):
            teacher(tokens, [batch], [0], padded_queries=True)
        return
    output = teacher(tokens, [batch], [0], padded_queries=True)
    assert output.attention[0, 0].i2t.shape[2] == int(image_tokens_of(batch).max()) + 1


def test_a_target_specification_says_what_the_family_has(of_pictures):
    spec = target_spec(of_pictures, ExtractConfig())
    family = of_pictures.family
    assert (spec.teacher.family, spec.directions) == (family.name, family.directions)
    assert spec.rule == family.rule == "block-softmax, cls first, row-major patches"
    assert (spec.teacher_layers, spec.teacher_heads, spec.classes) == (
        of_pictures.layers,
        of_pictures.heads,
        len(of_pictures.labels),
    )
    assert spec.layers == (of_pictures.layers - 1,)
    assert TargetSpec.model_validate(spec.model_dump()) == spec


def test_where_a_teacher_lay_is_no_part_of_what_it_is(of_pictures, tmp_path):
    """Configurations of a model's parts repeat such names."""
    of_pictures.model.save_pretrained(tmp_path)
    of_pictures.preprocessor.save(tmp_path)

    def moved(value):
        if not isinstance(value, dict):
            return value
        own = {"_name_or_path": "/elsewhere"} if "model_type" in value else {}
        return {name: moved(inner) for name, inner in value.items()} | own

    shape = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(moved(shape)))
    there, here = (target_spec(one, ExtractConfig()) for one in (FusionTeacher.load(tmp_path), of_pictures))
    assert there.teacher.config == here.teacher.config


@pytest.mark.parametrize(
    ("options", "has", "message"),
    [
        ({"targets": ("cross", "whole")}, "whole", "leave whole out of --targets"),
        ({"targets": ("cross", "hidden")}, "hidden", "leave hidden and pooled out of --targets"),
        ({"targets": ("cross", "pooled")}, "hidden", "leave hidden and pooled out of --targets"),
        ({"queries": "all"}, "padded_queries", "use --queries valid"),
    ],
)
def test_a_target_specification_refuses_what_it_has_not(of_pictures, options, has, message):
    if getattr(of_pictures.family, has):
        target_spec(of_pictures, ExtractConfig(**options))
        return
    with pytest.raises(InputError, match=message):
        target_spec(of_pictures, ExtractConfig(**options))


def test_regions_are_refused_where_shards_hold_pictures(tmp_path):
    teacher = FusionTeacher.load(save_family("lxmert", tmp_path))
    with pytest.raises(InputError, match="reads features of regions"):
        target_spec(teacher, ExtractConfig())
    with pytest.raises(InputError, match="expected regions of pictures, got a picture"):
        teacher.preprocessor.pixels(picture(36, 36))
    with pytest.raises(TeacherError, match="no student has an axis of regions"):
        _ = teacher.tower


def test_what_stands_behind_the_last_region_changes_nothing(tmp_path):
    teacher = FusionTeacher.load(save_family("lxmert", tmp_path))
    tokens, few = texts_for(teacher), regions((5, 3, 1, 4))
    many = regions((5, 3, 1, 4), seed=1, pad=2)
    for row, count in enumerate(few.count.tolist()):
        many.features[row, :count], many.boxes[row, :count] = few.features[row, :count], few.boxes[row, :count]
    one, two = (teacher(tokens, [batch], [1]) for batch in (few, many))
    torch.testing.assert_close(one.logits, two.logits, atol=1e-5, rtol=1e-6)
    for row, count in enumerate(few.count.tolist()):
        i2t = [output.attention[0, 1].i2t[row, :, :count] for output in (one, two)]
        torch.testing.assert_close(*i2t, atol=1e-5, rtol=0)


def test_two_pictures_are_refused_where_one_is_read(teacher):
    batch = pictures_for(teacher)
    with pytest.raises(InputError, match="expected 1 images a sample for this teacher, got 2"):
        teacher(texts_for(teacher), [batch, batch], [0])


@pytest.mark.parametrize("name", ["bridgetower", "blip", "flava"])
def test_pictures_of_another_size_are_refused(name, tmp_path):
    """BLIP would give a smaller picture the first of its positions, and say nothing."""
    model, processor = BUILDERS[name]()
    processor.image_processor.do_resize = False
    processor.image_processor.do_center_crop = False
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = FusionTeacher.load(tmp_path)
    assert teacher.preprocessor.pixels(picture(SIDE, SIDE)).shape == (3, SIDE, SIDE)
    with pytest.raises(InputError, match=r"expected a picture of 36 x 36 px, got 24 x 36 px"):
        teacher.preprocessor.pixels(picture(24, 36))


@pytest.mark.parametrize("name", ["bridgetower", "blip", "flava"])
def test_a_processor_of_another_size_is_refused(name, tmp_path):
    model, processor = BUILDERS[name]()
    edge = {"shortest_edge": 24} if name == "bridgetower" else {"height": 24, "width": 24}
    images = type(processor.image_processor)(size=edge, crop_size=edge, size_divisor=PATCH)
    model.save_pretrained(tmp_path)
    type(processor)(images, processor.tokenizer).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"makes pictures of 24 x 24 px, but the teacher reads 36 x\s+36 px"):
        FusionTeacher.load(tmp_path)


def test_a_processor_that_makes_nothing_is_refused(tmp_path):
    model, processor = BUILDERS["bridgetower"]()
    model.save_pretrained(tmp_path)
    images = type(processor.image_processor)(crop_size={"height": SIDE, "width": SIDE}, size_divisor=PATCH)
    type(processor)(images, processor.tokenizer).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="look at size and crop_size"):
        FusionTeacher.load(tmp_path)


def test_a_line_of_pixels_is_refused(load):
    """A processor that keeps sides in proportion makes nothing of it."""
    with pytest.raises(InputError, match="a picture of 400 x 1 px cannot be processed"):
        load("bridgetower").preprocessor.pixels(picture(400, 1))


@pytest.mark.parametrize("size", [(36, 36), (24, 36), (48, 36), (60, 60), (36, 48)])
def test_a_margin_is_lost_where_a_line_at_the_edge_leaves_no_trace(of_pictures, size):
    reads, width, height = of_pictures.preprocessor, *size
    lost = []
    for box in ((0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height)):
        edge = Image.new("RGB", size)
        edge.paste("white", box)
        lost.append(not reads.levels(reads.pixels(edge)).any())
    assert reads.loses_margin(width, height) == any(lost)
    assert any(lost) == (of_pictures.family.name == "bridgetower" and width != height)


def test_levels_undo_what_each_processor_does(of_pictures):
    image = picture(SIDE, SIDE, 7)
    levels = of_pictures.preprocessor.levels(of_pictures.preprocessor.pixels(image))
    assert levels.transpose(1, 2, 0).tobytes() == image.tobytes()


# --- heads


@pytest.mark.parametrize(
    ("build", "model", "labels"),
    [
        (bridgetower, BridgeTowerModel, None),
        (blip, BlipForQuestionAnswering, None),
        (flava, FlavaModel, None),
        (lxmert, LxmertModel, None),
        (lxmert, LxmertForPreTraining, ("unmatched", "matched")),
    ],
)
def test_without_a_task_head_there_is_attention_alone(build, model, labels, tmp_path):
    made, processor = build(model)
    made.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = FusionTeacher.load(tmp_path)
    output = teacher(texts_for(teacher), [pictures_for(teacher)], [0])
    assert teacher.labels == labels
    assert (output.logits is None) == (labels is None)
    assert set(output.attention) == {(0, 0)}


def test_matching_scores_of_lxmert_are_the_stock_ones(tmp_path):
    made, processor = lxmert(LxmertForPreTraining)
    made.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = FusionTeacher.load(tmp_path)
    tokens, batch = texts_for(teacher, [0]), regions((5,))
    with torch.inference_mode():
        stock = teacher.model(tokens.ids, batch.features, batch.boxes, attention_mask=tokens.mask)
    ours = teacher(tokens, [batch], [0]).logits
    torch.testing.assert_close(ours, stock.cross_relationship_score, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["bridgetower", "blip", "flava"])
def test_a_matching_head_scores_candidates(load, name):
    """Mining asks how much more a pair matches than not."""
    teacher = load(name)
    tokens, batch = texts_for(teacher), pictures_for(teacher)
    check_matching(teacher, name)
    _maps, logits = stock_of(teacher, tokens, batch)
    scores = matching_scores(teacher, tokens, batch)
    torch.testing.assert_close(scores, logits[:, 1] - logits[:, 0], atol=1e-5, rtol=1e-5)


# --- nothing that nobody asked for


def called(teacher, layers, **options):
    """Modules that ran, by name."""
    names = []
    handles = [
        module.register_forward_hook(lambda *_arguments, name=name: names.append(name))
        for name, module in teacher.model.named_modules()
        if not list(module.children())
    ]
    output = teacher(texts_for(teacher), [pictures_for(teacher)], layers, **options)
    for handle in handles:
        handle.remove()
    return set(names), output


def test_nothing_behind_the_last_layer_runs_unless_logits_are_wanted(teacher):
    every, with_logits = called(teacher, [0])
    some, without = called(teacher, [0], logits=False)
    assert with_logits.logits is not None
    assert without.logits is None
    assert some < every
    for name in ("t2i", "i2t"):
        ours, whole = (getattr(one.attention[0, 0], name) for one in (without, with_logits))
        assert (ours is None) == (whole is None)
        if ours is not None:
            assert torch.equal(ours, whole)
    # The head, and every cross-modal block but the first, are among what did not run.
    skipped = every - some
    heads = {"vilt": "classifier", "bridgetower": "itm_score", "blip": "itm_head", "flava": "itm_head"}
    assert any(name.startswith(heads.get(teacher.family.name, "answer_head")) for name in skipped)
    stacks = {
        "vilt": "vilt.encoder.layer.1.",
        "bridgetower": "bridgetower.cross_modal_text_layers.1.",
        "blip": "text_encoder.encoder.layer.1.",
        "flava": "flava.multimodal_model.encoder.layer.1.",
        "lxmert": "lxmert.encoder.x_layers.1.",
    }
    later = {name for name in every if name.startswith(stacks[teacher.family.name])}
    assert later
    assert later <= skipped


def test_with_neither_layers_nor_logits_nothing_runs(teacher):
    names, output = called(teacher, [], logits=False)
    assert not names
    assert (output.attention, output.logits) == ({}, None)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.hidden])
def test_states_of_the_last_layer_are_there_without_logits(load, name):
    teacher = load(name)
    tokens, batch = texts_for(teacher), pictures_for(teacher)
    last = teacher.layers - 1
    some, every = (teacher(tokens, [batch], [0, last], hidden=True, logits=wanted) for wanted in (False, True))
    for place, states in every.hidden.items():
        assert torch.equal(states.text, some.hidden[place].text)
        assert torch.equal(states.image, some.hidden[place].image)


def hooks(model):
    """The library leaves some of its own where somebody asked it for attention weights."""
    assert not any("forward" in vars(module) for module in model.modules())
    return [len(module._forward_hooks) for module in model.modules()]


def test_the_model_is_the_stock_one_again_after_each_call(teacher):
    before = hooks(teacher.model)
    teacher(texts_for(teacher), [pictures_for(teacher)], [0], logits=False)
    assert hooks(teacher.model) == before
    tokens = texts_for(teacher)
    with pytest.raises((RuntimeError, IndexError)):
        teacher(type(tokens)(tokens.ids + 10**6, tokens.mask), [pictures_for(teacher)], [0])
    assert hooks(teacher.model) == before


def test_no_attention_module_writes_out_its_weights(teacher, monkeypatch):
    """The stock forward of every module that a family replaces is out of reach."""

    def broken(*_arguments, **_options):
        raise AssertionError("the stock attention ran")

    for module in teacher.family.attention:
        monkeypatch.setattr(module, "forward", broken)
    teacher(texts_for(teacher), [pictures_for(teacher)], [0])
    assert teacher.family.attention


# --- the registry


def test_every_family_says_what_the_contract_asks():
    assert set(BUILDERS) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert family.name == name
        assert family.directions in (("t2i", "i2t"), ("t2i",), ("i2t",))
        assert all(ARCHITECTURES[model.__name__] == (family, model) for model in family.architectures)


def test_a_teacher_of_another_kind_is_refused(tmp_path):
    made, processor = blip()
    made.config.architectures = ["BlipModel"]
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace("BlipForImageTextRetrieval", "BlipForConditionalGeneration")
    )
    processor.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"that we can read attention from \(BlipForImageTextRetrieval, .*got"):
        FusionTeacher.load(tmp_path)
