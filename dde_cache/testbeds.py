"""What a study is run on: pictures and questions, a teacher, sizes. Each testbed is a set of settings to begin with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dde_cache.configs import assigned, read_yaml, resolve_config
from dde_cache.distill import TrainConfig
from dde_cache.equivalence import Requirements
from dde_cache.errors import InputError
from dde_cache.extract import ExtractConfig
from dde_cache.importers.common import Source, found_samples
from dde_cache.importers.easy_vqa import easy_vqa_source
from dde_cache.importers.nlvr import nlvr_source
from dde_cache.importers.shapes import shapes_source
from dde_cache.importers.sort_of_clevr import sort_of_clevr_source
from dde_cache.samples import Sample, Shard
from dde_cache.spec import Model, hash_json
from dde_cache.teach import TeachConfig
from dde_cache.teacher import SAMPLE_TEACHER

Testbed = Literal["shapes", "shapes-grid10", "sort-of-clevr", "easy-vqa", "nlvr"]

TEACHER = "teacher"
"""As `init`: the study's own teacher."""


class StudyConfig(Model):
    """What every cell of a study shares."""

    testbed: Testbed = "shapes"
    source: str | None = Field(default=None, description="nlvr: folder with hidden.tar and test.tar")
    pictures: int | None = Field(default=None, ge=1, description="generated testbeds: for training")
    test_pictures: int | None = Field(default=None, ge=1, description="generated testbeds")
    data_seed: int | None = Field(default=None, ge=0, description="generated testbeds; null: 0")
    kinds: tuple[str, ...] | None = Field(default=None, description="shapes: of the questions; null: all")
    teacher: str | None = Field(default=SAMPLE_TEACHER, description="folder or hub id; null: `teach` makes one")
    teach: TeachConfig | None = Field(default=None, description="how a teacher is trained, once")
    teach_init: str | None = Field(default=None, description="checkpoint that it starts from; null: random weights")
    init: str | None = Field(default=TEACHER, description="what students start from; null: random weights")
    train: TrainConfig = Field(default=TrainConfig(), description="of the default cell; its seed is not used")
    extract: ExtractConfig = Field(default=ExtractConfig(), description="of the default cell")
    needs: Requirements = Field(default=Requirements(), description="fixed before anything is measured")

    @model_validator(mode="after")
    def _check_teacher(self) -> "StudyConfig":
        if (self.teacher is None) == (self.teach is None):
            raise ValueError("expected either a teacher, or how to train one (teach)")
        return self

    @model_validator(mode="after")
    def _check_pictures(self) -> "StudyConfig":
        given = {name for name in (*_GENERATED, "kinds", "source") if getattr(self, name) is not None}
        wants = _WANTS[self.testbed]
        idle, lacking = sorted(given - {*wants, *_MAY[self.testbed]}), sorted({*wants} - given)
        if idle:
            raise ValueError(f"testbed {self.testbed} has no {', '.join(idle)}; leave them out")
        if lacking:
            raise ValueError(f"testbed {self.testbed} needs {', '.join(lacking)}")
        return self


_GENERATED = ("pictures", "test_pictures", "data_seed")

_WANTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("shapes", "shapes-grid10", "sort-of-clevr"), ("pictures", "test_pictures")),
    **{"easy-vqa": (), "nlvr": ("source",)},
}
_MAY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("shapes", "shapes-grid10"), ("data_seed", "kinds")),
    **{"sort-of-clevr": ("data_seed",), "easy-vqa": (), "nlvr": ()},
}

_SHORT = {"workers": 0, "warmup": 0.1, "precision": "bf16"}

TESTBEDS: Mapping[str, Mapping[str, Any]] = {
    "shapes": {
        "pictures": 6000,
        "test_pictures": 1000,
        "train": {**_SHORT, "steps": 1200, "batch_size": 32, "learning_rate": 3e-4, "attention_weight": 10.0},
    },
    "shapes-grid10": {
        "pictures": 3000,
        "test_pictures": 1000,
        "kinds": ("exists",),
        "teacher": None,
        "teach_init": SAMPLE_TEACHER,
        "teach": {**_SHORT, "steps": 200, "batch_size": 64, "learning_rate": 4e-4, "warmup": 0.05},
        "train": {**_SHORT, "steps": 600, "batch_size": 32, "learning_rate": 5e-4, "attention_weight": 10.0},
    },
    "sort-of-clevr": {
        "pictures": 6000,
        "test_pictures": 300,
        "teacher": None,
        "teach": {
            **{**_SHORT, "steps": 20000, "batch_size": 64, "learning_rate": 6e-4},
            **{"hidden_size": 128, "layers": 4, "patch_size": 15, "image_size": 75, "text_length": 16},
        },
        "train": {**_SHORT, "steps": 1200, "batch_size": 32, "learning_rate": 3e-4, "attention_weight": 10.0},
    },
    "easy-vqa": {
        "teacher": None,
        "teach": {
            **{**_SHORT, "steps": 6000, "batch_size": 64, "learning_rate": 6e-4},
            **{"hidden_size": 96, "layers": 3, "patch_size": 16, "image_size": 64, "text_length": 20},
        },
        "init": None,
        "train": {**_SHORT, "steps": 1000, "batch_size": 64, "learning_rate": 6e-4},
    },
    "nlvr": {
        "teacher": None,
        "teach": {
            **{**_SHORT, "steps": 1000, "batch_size": 64, "learning_rate": 6e-4},
            **{"hidden_size": 64, "layers": 2, "patch_size": 25, "image_size": 400, "text_length": 40},
        },
        "init": None,
        "train": {**_SHORT, "steps": 600, "batch_size": 64, "learning_rate": 6e-4},
    },
}
"""Settings that each testbed begins with."""

GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "shapes": {"objects": ("exists",), "relations": ("row", "neighbour")},
    "shapes-grid10": {"objects": ("exists",), "relations": ("row", "neighbour")},
    "sort-of-clevr": {"objects": ("shape", "left", "top"), "relations": ("closest", "furthest", "count")},
}
"""Kinds of questions that are shown apart. (`row` relates an object to the picture's frame.)"""


def study_config(file: Path | None = None, assignments: Sequence[str] = (), testbed: str | None = None) -> StudyConfig:
    """The settings of a testbed, with those of a file and of assignments (`train.steps=300`) on top.

    Raises:
        InputError: there is no such testbed, or settings are unknown or out of range; all of them are listed.
    """
    given = _nested(assigned(assignments))
    values = dict(read_yaml(file)) if file is not None else {}
    values = _merged(values, given)
    name = testbed or values.get("testbed", "shapes")
    if not isinstance(name, str) or name not in TESTBEDS:
        raise InputError(f"expected a testbed of {', '.join(TESTBEDS)}, got {name!r}")
    if testbed is not None and values.get("testbed", testbed) != testbed:
        raise InputError(f"expected one testbed, got {testbed} and {values['testbed']}")
    return resolve_config(StudyConfig, preset=_merged(_merged(TESTBEDS[name], values), {"testbed": name}))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train.steps": 3}` as `{"train": {"steps": 3}}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        outer, dot, inner = name.partition(".")
        found = _merged(found, {outer: {inner: value}} if dot else {outer: value})
    return found


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings of settings; where both have a mapping, it is merged too."""
    both = dict(below)
    for name, value in above.items():
        inner = both.get(name)
        both[name] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return both


def source_of(config: StudyConfig, split: Literal["train", "test"]) -> Source:
    """Where a split's samples come from.

    Raises:
        InputError: files or packages are missing, or options are out of range.
    """
    if config.testbed == "easy-vqa":
        return easy_vqa_source(split)
    if config.testbed == "nlvr":
        name = {"train": "hidden", "test": "test"}[split]
        return nlvr_source(name, Path(str(config.source)) / f"{name}.tar")
    count, seed = (config.pictures if split == "train" else config.test_pictures) or 0, config.data_seed or 0
    if config.testbed == "sort-of-clevr":
        return sort_of_clevr_source(split, count, seed=seed)
    options: dict[str, Any] = {"seed": seed, "grid": 10 if config.testbed == "shapes-grid10" else 3}
    if config.kinds is not None:
        options["kinds"] = config.kinds
    return shapes_source(split, count, **options)


def part_source(shards: Sequence[Shard], pictures: float | None, labelled: float | None, *, bare: bool) -> Source:
    """A part of the training samples; which, depends on their keys alone, and a larger share has all of a smaller one.

    Args:
        shards: training data.
        pictures: share of the pictures that are kept; None: all.
        labelled: share of the pictures that keep their labels; None: all.
        bare: also keep those without labels.
    """
    keys = [key for shard in shards for key in shard.keys]
    kept, known = _drawn("picture", keys, pictures), _drawn("label", keys, labelled)

    def samples() -> Iterator[Sample]:
        for sample in (one for shard in shards for one in shard if one.key in kept):
            if sample.key in known:
                yield sample
            elif bare:
                texts = tuple(text.model_copy(update={"label": None, "answers": ()}) for text in sample.texts)
                yield replace(sample, texts=texts)

    arguments = {"pictures": pictures, "labelled": labelled, "bare": bare, "shards": [shard.name for shard in shards]}
    return Source("part", "train", arguments, None, found_samples(samples()))


def _drawn(what: str, keys: Sequence[str], share: float | None) -> frozenset[str]:
    """A share of some keys, rounded up: those whose hashes are smallest."""
    if share is None:
        return frozenset(keys)
    return frozenset(sorted(keys, key=lambda key: hash_json([what, key]))[: math.ceil(share * len(keys))])
