"""Tiny saved students with random weights."""

from pathlib import Path

from conftest import PATCH, TEXT_LENGTH, randomise, vilt_config, vilt_processor
from pipeline import LABELS

from dde_cache.preprocess import Preprocessor
from dde_cache.student import Head, new_student
from dde_cache.train import MODEL

ANSWERS = Head()
PAIRS = Head(images=2, task="nlvr2")
SIMILARITY = Head("similarity", task="retrieval")


def save_student(folder: Path, head: Head = ANSWERS, seed: int = 0, **shape) -> Path:
    """Save a student as a run has it."""
    randomise(new_student(vilt_config(**shape), LABELS, head=head), seed).save_pretrained(folder / MODEL)
    Preprocessor(vilt_processor(), PATCH, TEXT_LENGTH).save(folder / MODEL)
    return folder
