"""Recipe: train a dual encoder on targets streamed from a cache; the teacher is never opened.

For comparison the same procedure trains on labels only, or with the teacher run online at every step.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache import __version__
from dde_cache.attention import SparseAttention, sparsify
from dde_cache.batches import Batch, PairDataset, batch_loader, check_labels, pictures_of, to_device, tokens_of
from dde_cache.errors import CacheError, InputError, RunError, bullet_list
from dde_cache.evaluate import Baselines, Predictions, accuracy, predict
from dde_cache.fit import Fit, FitConfig, FitResult, Losses, Progress
from dde_cache.losses import Tail, label_loss, log_attention, soft_label_loss, sparse_kl, weighted_mean
from dde_cache.preprocess import Preprocessor
from dde_cache.samples import Shard
from dde_cache.spec import Model
from dde_cache.store import Cache, write_text
from dde_cache.stream import BatchOrder, PairTable
from dde_cache.student import DualEncoder, DualEncoderOutput, new_student, student_from_vilt
from dde_cache.targets import CacheTargets, OnMissing, decoded, join
from dde_cache.teacher import FusionTeacher

MODEL = "model"
CONFIG = "config.yaml"
RUN = "run.json"
BASELINES = "baselines.json"


class TrainConfig(FitConfig):
    """How a student is trained. A weight of 0 leaves a loss out, and its targets are then not read."""

    attention_weight: float = Field(default=1.0, ge=0)
    soft_weight: float = Field(default=1.0, ge=0)
    hard_weight: float = Field(default=0.0, ge=0)
    tail: Tail = "bucket"
    queries: Literal["valid", "all"] = Field(
        default="valid", description="query rows in the mean of the attention loss: valid ones, or padding too (published)"
    )
    layer: int | None = Field(default=None, ge=0, description="the cache's layer to learn from; null: its last")
    dropout: float = Field(default=0.0, ge=0, lt=1)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dide": {
        "learning_rate": 1e-4,
        "batch_size": 256,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "warmup": 0.1,
        "dropout": 0.1,
        "hard_weight": 0.0,
        "soft_weight": 1.0,
        "attention_weight": 1.0,
        "queries": "all",
        "tail": "bucket",
    }
}
"""Published recipes. `dide`: arXiv 2112.08723, VQAv2 and SNLI-VE columns (NLVR2: batch 128)."""


class RunRecord(Model):
    """`run.json`: what a run was trained on, and how it ended."""

    version: str
    shards: str
    valid: str | None
    targets: str
    cache_fingerprint: str | None
    init: str | None
    preset: str | None
    labels: tuple[str, ...]
    steps: int
    best_accuracy: float | None
    best_step: int | None
    seconds: float
    wait_seconds: float


@dataclass(frozen=True)
class NoTargets:
    """Train on the labels alone, with a processor and tower shape of this teacher's or cache's."""


@dataclass(frozen=True)
class CachedTargets:
    """Train on a cache."""

    cache: Cache
    on_missing: OnMissing = "error"


@dataclass(frozen=True)
class OnlineTargets:
    """Run a teacher at every step (for comparison)."""

    teacher: FusionTeacher
