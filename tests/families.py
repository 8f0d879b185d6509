"""Tiny random teachers of every family, saved as their checkpoints are."""

import torch
from conftest import PATCH, TEXT_LENGTH, WORDS, randomise, vilt_config, vilt_processor
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    BridgeTowerImageProcessorPil,
    BridgeTowerProcessor,
    FlavaConfig,
    FlavaForPreTraining,
    FlavaImageProcessorPil,
    FlavaProcessor,
    LxmertConfig,
    LxmertForQuestionAnswering,
    RobertaTokenizer,
    ViltForQuestionAnswering,
)

SIDE = 36
FEATURES = 6
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIDED = {"height": SIDE, "width": SIDE}
ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
}
TEXT = ENCODER | {"vocab_size": len(WORDS) + 5, "max_position_embeddings": TEXT_LENGTH, "pad_token_id": 0}
IMAGE = ENCODER | {"image_size": SIDE, "patch_size": PATCH}


def bert_tokenizer():
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    return BertTokenizer(vocab=words, model_max_length=TEXT_LENGTH)


def roberta_tokenizer():
    """Whole words behind a space are one token each, as frequent words are in the real one."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted({letter for word in WORDS for letter in word}), "Ġ"]
    merges = []
    for word in WORDS:
        joined = ""
        for letter in ("Ġ", *word):
            if joined and (joined, letter) not in merges:
                merges.append((joined, letter))
            joined += letter
            if joined not in words:
                words.append(joined)
    vocabulary = {word: number for number, word in enumerate(words)}
    return RobertaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=True, model_max_length=TEXT_LENGTH)


def vilt(model=ViltForQuestionAnswering, **changes):
    return model(vilt_config(**changes)), vilt_processor()


def bridgetower(model=BridgeTowerForImageAndTextRetrieval):
    tokenizer = roberta_tokenizer()
    # Its picture encoder has heads of 64 numbers each.
    text = TEXT | {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH + 2,
        "pad_token_id": 1,
    }
    vision = {"hidden_size": 64, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": PATCH}
    shape = BridgeTowerConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, text_config=text, vision_config=vision
    )
    edge = {"shortest_edge": SIDE}
    images = BridgeTowerImageProcessorPil(size=edge, crop_size=edge, size_divisor=PATCH)
    return model(shape), BridgeTowerProcessor(images, tokenizer)


def blip(model=BlipForImageTextRetrieval):
    shape = BlipConfig(text_config=TEXT, vision_config=IMAGE | {"num_attention_heads": 2}, image_text_hidden_size=8)
    return model(shape), BlipProcessor(BlipImageProcessorPil(size=SIDED), bert_tokenizer())


def flava(model=FlavaForPreTraining):
    # The library's own check wants one width for all three.
    shape = FlavaConfig(
        hidden_size=24,
        text_config=TEXT,
        image_config=IMAGE,
        multimodal_config=ENCODER | {"num_attention_heads": 4},
        projection_dim=8,
        init_codebook=False,
    )
    return model(shape), FlavaProcessor(FlavaImageProcessorPil(size=SIDED, crop_size=SIDED), bert_tokenizer())


def lxmert(model=LxmertForQuestionAnswering):
    shape = LxmertConfig(
        **(TEXT | {"num_hidden_layers": None}),
        num_qa_labels=3,
        id2label={0: "no", 1: "yes", 2: "red"},
        label2id={"no": 0, "yes": 1, "red": 2},
        l_layers=1,
        r_layers=1,
        x_layers=2,
        visual_feat_dim=FEATURES,
    )
    return model(shape), bert_tokenizer()


BUILDERS = {"vilt": vilt, "bridgetower": bridgetower, "blip": blip, "flava": flava, "lxmert": lxmert}
OF_PICTURES = tuple(name for name in BUILDERS if name != "lxmert")


def save_family(name, folder, seed=0, positions=True, **options):
    """Save a random teacher of a family with its processor; return the folder.

    Without `positions`, neither words nor patches have a place.
    """
    model, processor = BUILDERS[name](**options)
    randomise(model, seed)
    with torch.no_grad():
        for called, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and "norm" not in called.lower():
                module.weight.add_(1)
        for called, parameter in model.named_parameters():
            if "position_embed" in called and not positions:
                parameter.zero_()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
