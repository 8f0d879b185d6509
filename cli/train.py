"""`dde-cache train`."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
import typer
from rich.markup import escape

from dde_cache.configs import resolve_config
from dde_cache.distill import TrainConfig
from dde_cache.errors import InputError, PixelDriftWarning
from dde_cache.fit import Progress as FitProgress
from dde_cache.initial import announced, is_run
from dde_cache.join import OnMissing
from dde_cache.matching import Scores
from dde_cache.prepare import labels_only
from dde_cache.presets import PRESETS, lacking_of_preset, task_settings
from dde_cache.pretrain import pretrain as run_pretrain
from dde_cache.pretraining import PretrainConfig
from dde_cache.ranks import Ranks
from dde_cache.remote import is_url
from dde_cache.samples import open_shards
from dde_cache.several import is_teachers_file, read_teachers
from dde_cache.sources import CachedTargets, OnlineTargets, Targets, caches_of, drift_allowed
from dde_cache.store import Cache
from dde_cache.student import Head
from dde_cache.tasks import load_task
from dde_cache.teacher import FusionTeacher
from dde_cache.train import RunRecord, Stage
from dde_cache.train import train as run_train
from dde_cache.views import AS_PROCESSED

from .console import console, note, print_json, progress, warn
from .places import CACHE_DIR, CACHE_LIMIT, opened

NONE = "none"


def train(
    shards: str = typer.Argument(help="Folder, tar or brace pattern of training shards."),
    out: Path = typer.Option(..., help="Folder of the run; new or empty, but with --resume."),
    targets: str | None = typer.Option(
        None, help="Cache of targets (folder or URL), YAML file of several, or `none` for labels only."
    ),
    teacher: str | None = typer.Option(None, help="Run this teacher at every step instead of reading a cache."),
    like: str | None = typer.Option(
        None, help="With --targets none: cache or teacher whose processor, answers and tower shape are taken."
    ),
    valid: str | None = typer.Option(
        None, help="Shards that choose the best checkpoint; without it, the last is kept."
    ),
    init: str | None = typer.Option(
        None, help="ViLT checkpoint that both towers start from, or a run (of pre-training); without it, random."
    ),
    text_tower: str | None = typer.Option(
        None, help="Text encoder of Hugging Face (folder or hub id), with its weights. Default: a twin of ViLT's shape."
    ),
    image_tower: str | None = typer.Option(None, help="Image encoder of Hugging Face, likewise."),
    grids: str | None = typer.Option(
        None, help="Where the image tower has another patch grid than the teacher: resample (default) or refuse."
    ),
    missing_tokens: str | None = typer.Option(
        None, help="The teacher's tokens that a tower lacks, as a CLS: refuse (default), or drop from rows and keys."
    ),
    candidates: Path | None = typer.Option(
        None, help="Scores of mined candidates (`extract --candidates`), whose ranking is learned."
    ),
    stage: str = typer.Option("finetune", help="pretrain (pairs without labels) or finetune."),
    passes: str | None = typer.Option(
        None, help="With --stage pretrain: passes whose attention is learned. Default: those of the cache."
    ),
    task_name: str | None = typer.Option(
        None, "--task", help="classification, vqa, nlvr2, entailment, retrieval, or module:Class of your own."
    ),
    preset: str | None = typer.Option(None, help=f"A published recipe: {', '.join(PRESETS)}."),
    config: Path | None = typer.Option(
        None, help="YAML file of settings (see docs/cli.md); RUN/config.yaml repeats a run."
    ),
    set_: list[str] = typer.Option(
        [], "--set", help="One setting as name=value, such as soft_weight=0; may be repeated."
    ),
    on_missing: str = typer.Option("error", help="Samples without targets, or the reverse: error or skip."),
    steps: int | None = typer.Option(None, help="Optimizer steps. Default 1000."),
    epochs: int | None = typer.Option(None, help="Passes over the pairs, instead of --steps."),
    batch_size: int | None = typer.Option(None, help="Pairs a step, of all ranks together. Default 128."),
    accumulate: int | None = typer.Option(
        None, help="Micro-batches that a rank cuts its share of a batch into. Default 1."
    ),
    learning_rate: float | None = typer.Option(None, help="Highest rate, after the warm-up. Default 0.0005."),
    precision: str | None = typer.Option(None, help="no (float32), bf16 or fp16. Default no."),
    seed: int | None = typer.Option(None, help="Of weights, order and dropout. Default 0."),
    directions: str | None = typer.Option(None, help="Queries of the attention loss: t2i, i2t or both. Default both."),
    attention: str | None = typer.Option(
        None, help="Its keys: cross (the other modality's), or whole (all tokens'). Default cross."
    ),
    layer_map: str | None = typer.Option(
        None, help="Teacher:student blocks, as 3:2,7:5; or `same`. Default last:last."
    ),
    heads: str | None = typer.Option(None, help="all (head by head) or mean. Default: as the targets have them."),
    queries: str | None = typer.Option(
        None, help="Query rows that count: valid, or all (the padded ones too). Default valid."
    ),
    temperature: float | None = typer.Option(None, help="Of the soft labels. Default 1."),
    hidden_weight: float | None = typer.Option(None, help="Of the hidden states' squared error. Default 0."),
    pooled_weight: float | None = typer.Option(None, help="Of the pooled states' squared error. Default 0."),
    tail: str | None = typer.Option(
        None, help="bucket, uniform or renormalise: what the tail mass is taken for. Default bucket."
    ),
    workers: int | None = typer.Option(None, help="Processes that read ahead. Default 1."),
    remap_flips: bool = typer.Option(
        False, "--remap-flips", help="Mirror every other picture, and its stored maps with it: an approximation."
    ),
    allow_pixel_drift: bool = typer.Option(
        False, "--allow-pixel-drift", help="Go on where views are drawn with other pixels than the teacher saw."
    ),
    tensorboard: bool | None = typer.Option(None, "--tensorboard", help="Write the metrics for TensorBoard too."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest checkpoint in --out."),
    cache_dir: Path | None = CACHE_DIR,
    cache_limit: str | None = CACHE_LIMIT,
    json: bool = typer.Option(False, "--json", help="Print the record of the run as JSON."),
) -> None:
    """Train a dual encoder on SHARDS, with targets streamed from a cache."""
    _check_stage(stage, preset, task_name, passes)
    if candidates is not None and stage == "pretrain":
        raise InputError("expected --candidates with --stage finetune alone")
    # Options that are settings have their names.
    given = {name: value for name, value in locals().items() if name in PretrainConfig.model_fields}
    named = None if passes is None else [name.strip() for name in passes.split(",")]
    given |= {"task": task_name, "remap_flips": remap_flips or None, "passes": named}
    settings = _settings(stage, config, set_, preset, given)
    if candidates is not None and not settings.ranking_weight:
        settings = settings.model_copy(update={"ranking_weight": 1.0})
    ranks = Ranks()
    if not resume:
        _check_idle(settings, targets)
    chosen = _targets(targets, teacher, like, on_missing, settings, lambda place: opened(place, cache_dir, cache_limit))
    if allow_pixel_drift:
        chosen = _drifting(chosen)
    notes = [f"[yellow]not as published:[/] {escape(line)}" for line in _lacking(preset, chosen, init, settings.view)]
    if init is not None and is_run(init):
        notes.append(escape(announced(init, _head(settings))))
    for line in notes if ranks.first else ():
        note(line)
    training, held_out = open_shards(shards), open_shards(valid) if valid else []
    bar = progress("loss {task.fields[loss]}", "valid {task.fields[valid]}", "wait {task.fields[wait]}")
    bar.disable = bar.disable or not ranks.first
    with warnings.catch_warnings(), bar:
        warnings.simplefilter("always", PixelDriftWarning)
        warnings.showwarning = lambda message, *_: warn(escape(str(message)))
        task = bar.add_task("prepare", total=None, loss="-", valid="-", wait="-")

        def step(number: int, record: Mapping[str, float]) -> None:
            wait = record["wait_seconds"] / max(record["seconds"], 1e-9)
            bar.update(task, completed=number, loss=f"{record['loss']:.3f}", wait=f"{wait:.0%}")

        watch = FitProgress(
            step,
            lambda number, accuracy: bar.update(task, valid=f"{accuracy:.3f}"),
            lambda steps: bar.update(task, total=steps, description="train"),
            lambda line: note(escape(line)),
        )
        about = {"shards": shards, "valid": valid, "targets": targets or teacher, "init": init, "preset": preset}
        common: dict[str, Any] = {"valid": held_out, "resume": resume, "about": about, "progress": watch}
        if isinstance(settings, PretrainConfig):
            record = run_pretrain(training, chosen, out, settings, init=init, **common)
        else:
            scores = None if candidates is None else Scores(candidates)
            record = run_train(training, chosen, out, settings, init=init, candidates=scores, **common)
    if ranks.first:
        _show(record, out, json)


def _check_stage(stage: str, preset: str | None, task: str | None, passes: str | None) -> None:
    """Refuse what does not belong to a stage."""
    if stage not in get_args(Stage):
        raise InputError(f"expected --stage {' or '.join(get_args(Stage))}, got {stage!r}")
    if preset is not None and preset not in PRESETS:
        raise InputError(f"expected --preset {' or '.join(PRESETS)}, got {preset!r}")
    if stage == "pretrain" and (preset, task) != (None, None):
        raise InputError("expected --preset and --task with --stage finetune alone: pre-training has no labels")
    if stage == "finetune" and passes is not None:
        raise InputError("expected --passes with --stage pretrain alone: fine-tuning learns from matched pairs")


def _drifting(targets: Targets) -> Targets:
    """Let views of a cache be drawn with other pixels."""
    if all(one.cache.spec.view == AS_PROCESSED for one in caches_of(targets)):
        raise InputError("expected --allow-pixel-drift with a cache of views alone: no other pixels are compared")
    return drift_allowed(targets)


def _lacking(preset: str | None, targets: Targets, init: str | None, view: str | None) -> list[str]:
    return lacking_of_preset(preset, targets, init, view) if preset else []


def _head(settings: TrainConfig) -> Head:
    return Head("pretraining" if isinstance(settings, PretrainConfig) else load_task(settings.task).head)


def _show(record: RunRecord, out: Path, as_json: bool) -> None:
    """Say how a run ended."""
    if as_json:
        print_json(record)
        return
    best = "" if record.best_accuracy is None else f", validation accuracy {record.best_accuracy:.3f}"
    console.print(f"student of step {record.best_step or record.steps} saved in {out}/model{best}", highlight=False)


def _settings(
    stage: str, config: Path | None, set_: list[str], preset: str | None, given: Mapping[str, Any]
) -> TrainConfig:
    """Options over assignments over the file over what the task and the preset begin with."""
    said = {one.partition("=")[0].strip() for one in set_} | {
        name for name, value in given.items() if value is not None
    }
    if {"steps", "epochs"} <= said:
        raise InputError("expected --steps or --epochs, got both")
    if "steps" in said:
        set_ = [*set_, "epochs=null"]  # those of a file
    if stage == "pretrain":
        return resolve_config(PretrainConfig, config, set_, **given)
    given = {name: value for name, value in given.items() if name != "passes"}
    # The task may come from the file; what it begins with then stands below what the file says.
    task = resolve_config(TrainConfig, config, set_, **given).task
    return resolve_config(TrainConfig, config, set_, task_settings(task, preset), **given)


def _check_idle(settings: TrainConfig, targets: str | None) -> None:
    """Refuse what says how attention is compared on other tokens, where no attention is.

    A study has the same settings in all its cells, also in those of labels alone; so only what a user asks for one run
    is held to this.
    """
    if targets != NONE and settings.attention_weight:
        return
    fields = type(settings).model_fields
    idle = [name for name in ("grids", "missing_tokens") if getattr(settings, name) != fields[name].default]
    if idle:
        why = "--targets none" if targets == NONE else "attention_weight 0"
        said = " and ".join(f"{name} {getattr(settings, name)}" for name in idle)
        plain = " ".join(f"--set {name}={fields[name].default}" for name in idle)
        raise InputError(
            f"expected {said} where attention is compared, got {why}; leave it out, or where a file says so, {plain}"
        )


def _targets(
    targets: str | None,
    teacher: str | None,
    like: str | None,
    on_missing: str,
    settings: TrainConfig,
    open_: Callable[[str], Cache],
) -> Targets:
    """Choose one source of targets from the options."""
    if on_missing not in ("error", "skip"):
        raise InputError(f"expected --on-missing error or skip, got {on_missing!r}")
    if on_missing == "skip" and targets in (None, NONE):
        raise InputError("expected --on-missing with --targets CACHE alone: nothing can be missing without a cache")
    if (targets is None) == (teacher is None):
        raise InputError(
            "expected one of --targets CACHE, --targets none (labels only) and --teacher TEACHER (online), got "
            + ("none of them" if targets is None else "both")
        )
    if (like is not None) != (targets == NONE):
        raise InputError("expected --like CACHE|TEACHER together with --targets none, and only there")
    if like is not None:
        return labels_only(open_(like) if is_url(like) else like)
    if targets is not None:
        policy: OnMissing = "skip" if on_missing == "skip" else "error"
        if is_teachers_file(targets):
            return read_teachers(Path(targets), open_, policy)
        return CachedTargets(open_(targets), policy)
    loaded = FusionTeacher.load(str(teacher), device="cuda" if torch.cuda.is_available() else "cpu")
    layer = loaded.layers - 1 if settings.layer is None else settings.layer
    if layer >= loaded.layers:
        raise InputError(f"expected layer up to {loaded.layers - 1} for this teacher, got {layer}")
    return OnlineTargets(loaded, layer)
