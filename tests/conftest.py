"""What several test files share: one thread, no network, and a tiny teacher with random weights."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Of programs that tests start, too: threads of several tests at a time would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from browser import Browser, find_browser
from hypothesis import settings
from PIL import Image
from strictness import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from transformers import (
    BertTokenizer,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessorPil,
    ViltProcessor,
)

from dde_cache.teacher import FusionTeacher

torch.set_num_threads(1)

# The same draws on every run, so that a red test always means a change; `--hypothesis-profile search` draws new ones.
settings.register_profile("same", derandomize=True, deadline=None, max_examples=60)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("same")

WORDS = ("is", "there", "a", "red", "green", "blue", "square", "circle", "left", "of", "the", "?")
PATCH = 12
TEXT_LENGTH = 12
TEXTS = ("is there a red square ?", "blue ?", "is the green circle left of the square ?", "a red circle")
SIZES = ((36, 36), (24, 36), (48, 12), (12, 12))
"""Width and height of the pictures of `pictures`: four grids, one of them the grid of the learned positions."""


def picture(width, height, seed=0):
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def pictures():
    return [picture(width, height, seed) for seed, (width, height) in enumerate(SIZES)]


@pytest.fixture(scope="session")
def texts():
    return list(TEXTS)


def vilt_config(**changes):
    shape = {
        "vocab_size": len(WORDS) + 5,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 32,
        "image_size": 36,
        "patch_size": PATCH,
        "max_position_embeddings": TEXT_LENGTH,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
        "id2label": {0: "no", 1: "yes", 2: "red"},
        "label2id": {"no": 0, "yes": 1, "red": 2},
    }
    return ViltConfig(**(shape | changes))


def randomise(model, seed=0):
    """Give every parameter large random values: fresh ones make all attention near uniform, and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model


def vilt_processor(**images):
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=TEXT_LENGTH)
    options = {"do_resize": False, "size_divisor": PATCH, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return ViltProcessor(ViltImageProcessorPil(**(options | images)), tokenizer)


@pytest.fixture(scope="session")
def save_teacher(tmp_path_factory):
    """Save a random ViLT with processor and tokenizer: `save_teacher(family, seed, **config)` gives its folder."""

    def save(family=ViltForQuestionAnswering, seed=0, **changes):
        folder = tmp_path_factory.mktemp("teacher")
        randomise(family(vilt_config(**changes)), seed).save_pretrained(folder)
        vilt_processor().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def teacher_folder(save_teacher):
    return save_teacher()


@pytest.fixture(scope="session")
def teacher(teacher_folder):
    """A tiny random fusion teacher: 3 layers, 3 heads, width 24, patch 12 px, answers no/yes/red."""
    return FusionTeacher.load(teacher_folder)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium."""
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium here; install one (Debian: chromium-headless-shell) or name it in DDE_CACHE_BROWSER")
    opened = Browser(executable, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()
