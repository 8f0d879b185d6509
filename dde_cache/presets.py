"""Settings that a task or a published recipe begins with."""

from collections.abc import Mapping
from typing import Any

from dde_cache.choices import SAME
from dde_cache.errors import InputError
from dde_cache.replay import lacking_views
from dde_cache.sources import Targets, caches_of
from dde_cache.tasks import load_task
from dde_cache.views import AS_PROCESSED

_DIDE: Mapping[str, Any] = {
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

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "dide-t2i": {"directions": "t2i"},
    "dide-i2t": {"directions": "i2t"},
    "dide-whole": {"attention": "whole"},
    "dide-hidden": {"attention_weight": 0.0, "hidden_weight": 1.0},
    "dide-layer-wise": {"layer_map": SAME},
    "dide-soft": {"attention_weight": 0.0},
}
"""What each ablation of the paper changes: one direction, keys of the whole sequence, hidden states in the
place of attention, every layer that the cache has, and soft labels alone."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dide": _DIDE,
    **{name: {**_DIDE, **change} for name, change in ABLATIONS.items()},
}
"""Published recipes. `dide`: arXiv 2112.08723, what all tasks share; each task adds its own (`Task.dide`)."""


def task_settings(name: str, preset: str | None = None) -> Mapping[str, Any]:
    """The settings that a task, and a published recipe of it, begin with.

    Raises:
        InputError: there is no such task.
    """
    task = load_task(name)
    return {**task.settings, **({**PRESETS[preset], **task.dide} if preset else {}), "task": name}


def lacking_of_preset(preset: str, targets: Targets, init: str | None, view: str | None = None) -> list[str]:
    """What keeps a run from following a published recipe to the letter, in words.

    Args:
        preset: the recipe.
        targets: where the teacher's signals come from.
        init: what the student starts from.
        view: recipe of the views of a run without a cache.

    Raises:
        InputError: the recipe needs `--init`.
    """
    if preset not in PRESETS:
        raise InputError(f"expected a preset of {', '.join(PRESETS)}, got {preset!r}")
    if init is None:
        raise InputError("the dide recipe starts both towers from a ViLT checkpoint: pass --init CHECKPOINT")
    specs = [one.cache.spec for one in caches_of(targets)]
    lacking = lacking_views(specs[0].view if specs else view or AS_PROCESSED)
    lacking += [
        f"whole attention rows: the cache keeps {spec.kept} and the tail mass"
        for spec in specs
        if (spec.k, spec.mass) != (None, None)
    ]
    if len(specs) > 1:
        lacking.append(f"one teacher: there are {len(specs)}")
    return lacking
