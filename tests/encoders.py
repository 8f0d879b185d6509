"""Tiny encoders of many families with random weights, saved as a hub would have them."""

from pathlib import Path

from conftest import TEXT_LENGTH, WORDS, randomise, vilt_processor
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    Aimv2TextConfig,
    Aimv2TextModel,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

END = 3
"""The id of [SEP], which ends a text."""

HEADS = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3}
"""The teacher's heads and head size."""

SIDE, PIXELS = 4, 32
"""Patches of a side of the image encoders, where the teacher has 3 and fewer, and pixels."""

_PICTURE = {"image_size": PIXELS, "patch_size": PIXELS // SIDE}
_TEXT = {"vocab_size": len(WORDS) + 5, "max_position_embeddings": TEXT_LENGTH + 2, "pad_token_id": 0}

IMAGES = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, {}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {}),
    "dinov2": (Dinov2Model, Dinov2Config, {}),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"num_register_tokens": 3}),
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig, {}),
    "deit": (DeiTModel, DeiTConfig, {}),
    "vit": (ViTModel, ViTConfig, {}),
}
FIRST = {"clip": 1, "siglip": 0, "dinov2": 1, "registers": 4, "aimv2": 0, "deit": 2, "vit": 1}
"""Tokens before the patches."""

TEXTS = {
    "bert": (BertModel, BertConfig, {}),
    "clip": (CLIPTextModel, CLIPTextConfig, {"eos_token_id": END, "bos_token_id": 2}),
    "siglip": (SiglipTextModel, SiglipTextConfig, {}),
    "roberta": (RobertaModel, RobertaConfig, {}),
    "aimv2": (Aimv2TextModel, Aimv2TextConfig, {"eos_token_id": END}),
    "distilbert": (DistilBertModel, DistilBertConfig, {}),
}
_DISTILBERT = {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 32, "max_position_embeddings": TEXT_LENGTH + 2}


def image_model(family, seed=0, **changes):
    model, config, own = IMAGES[family]
    return randomise(model(config(**(HEADS | _PICTURE | own | changes))), seed).eval()


def text_model(family, seed=0, **changes):
    model, config, own = TEXTS[family]
    shape = _DISTILBERT | {"vocab_size": _TEXT["vocab_size"]} if family == "distilbert" else HEADS | _TEXT
    return randomise(model(config(**(shape | own | changes))), seed).eval()


def image_processor(**changes):
    options = {"size": {"height": PIXELS, "width": PIXELS}, "resample": 3}
    return ViTImageProcessorPil(**(options | {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]} | changes))


def save_image_encoder(folder: Path, family="dinov2", seed=0, **changes) -> Path:
    image_model(family, seed, **changes).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def save_text_encoder(folder: Path, family="bert", seed=0, tokenizer=None, **changes) -> Path:
    tokenizer = tokenizer or vilt_processor().tokenizer
    text_model(family, seed, **({"vocab_size": len(tokenizer)} | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_both(folder: Path, family="clip") -> Path:
    """An image-text model, of which either half can be taken."""
    ends = {"eos_token_id": END, "bos_token_id": 2}
    model, config = {"clip": (CLIPModel, CLIPConfig), "siglip": (SiglipModel, SiglipConfig)}[family]
    text = HEADS | _TEXT | (ends if family == "clip" else {})
    randomise(model(config(text_config=text, vision_config=HEADS | _PICTURE))).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    vilt_processor().tokenizer.save_pretrained(folder)
    return folder


def letters(*, opens=True, ends=True, length=64, lower=True) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters, spaces left out: longer texts than words, with or without tokens at the ends."""
    characters = sorted({letter for word in WORDS for letter in word})
    vocabulary = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3} | {one: 4 + n for n, one in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase() if lower else normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    single = " ".join(["<s>"] * opens + ["$A"] + ["</s>"] * ends)
    tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=length,
    )
