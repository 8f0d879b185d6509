"""Recipe: pre-train a dual encoder on pairs without labels, with the teacher's attention streamed from a cache.

The authors of DiDE (arXiv 2112.08723) never released this stage; ours is described in docs/pretraining.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dde_cache.batches import Batch, PairDataset, batch_loader, check_batch_size
from dde_cache.errors import InputError, bullet_list
from dde_cache.fit import Fit, Progress
from dde_cache.initial import MODEL
from dde_cache.model_card import CARD, student_card
from dde_cache.passes import RECIPES, PassName
from dde_cache.prepare import Ready, TrainingPlan, exported, plan_training, ready_student
from dde_cache.pretext import Pretrainer
from dde_cache.pretraining import EVALUATED, PretrainConfig, PretrainLosses, passes_of
from dde_cache.ranks import Ranks
from dde_cache.replay import check_first_views, order_in_views
from dde_cache.runs import open_run, with_steps
from dde_cache.samples import Shard
from dde_cache.scores import Baselines
from dde_cache.sources import CachedTargets, Targets
from dde_cache.store import write_text
from dde_cache.stream import PairTable, Share
from dde_cache.student import Head
from dde_cache.tasks.retrieval import Retrieval, image_ranks, text_ranks
from dde_cache.train import BASELINES, RUN, RunRecord, announce, inputs_of, output_of, record_of


def pretrain(
    shards: Sequence[Shard],
    targets: Targets,
    out: Path,
    config: PretrainConfig,
    *,
    init: str | None = None,
    valid: Sequence[Shard] = (),
    resume: bool = False,
    about: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> RunRecord:
    """Pre-train a student and keep the best checkpoint by retrieval in `out/model` (the last, without `valid`).

    Args:
        shards: samples of one image and one or more texts; labels are not read.
        targets: where the teacher's attention comes from.
        out: the run's folder.
        config: losses and fit.
        init: ViLT checkpoint, or a run, that the towers start from; None: random weights.
        valid: data on which retrieval is measured, both ways.
        resume: go on from the newest checkpoint in `out`.
        about: `shards`, `valid`, `targets`, `init` in the user's words, for the record.
        progress: hooks to show what happens.

    Raises:
        InputError, CacheError, TeacherError, RunError: the parts do not fit each other; nothing was trained.
    """
    task, passes = Retrieval(), passes_of(targets, config)
    plan = plan_training(shards, valid, targets, config, task, passes or ("matched",))
    torch.manual_seed(config.seed)
    ready = ready_student(plan, targets, config, init, Head("pretraining", 1, EVALUATED), shards)
    student = ready.student
    _check_words(ready, config, passes)
    check_batch_size(plan.table, config.batch_size)
    if isinstance(targets, CachedTargets):
        check_first_views(targets.cache, shards, plan.table, config, allow_drift=targets.allow_pixel_drift)
    dataset = _dataset(shards, plan, config, targets, passes, ready)
    config = with_steps(config, len(plan.table))
    ranks = Ranks()
    card = student_card(student, targets, config, shards, valid, init, ready.matched.notes)

    def begin() -> None:
        announce(ready, progress)
        about_run = inputs_of(shards, valid, plan, targets, init) | {"stage": "pretrain"}
        open_run(out, config, resume=resume, inputs=about_run)
        write_text(out / BASELINES, Baselines.of(shards).model_dump_json(indent=1) + "\n")

    ranks.on_first(begin)

    def save(model: nn.Module) -> None:
        student = model.student
        student.save_pretrained(out / MODEL, state_dict=exported(student))  # type: ignore[union-attr, operator, arg-type]
        ready.preprocessor.save(out / MODEL)
        write_text(out / MODEL / CARD, card)

    def loader(step: int, share: Share) -> Iterable[Batch]:
        sides = 1 + config.remap_flips
        order = order_in_views(plan.table, plan.views, config, step, config.steps, share, sides=sides)
        return batch_loader(dataset, order, config.workers)

    fit = Fit(
        Pretrainer(student),
        PretrainLosses(config, targets, plan.mean_heads, passes, ranks, ready.matched.axes),
        config,
        out,
        validate=(lambda model: _recalls(model, valid, ready)) if valid else None,
        save_best=save,
        progress=progress,
    )
    if resume:
        fit.resume()
    record = record_of(fit(loader), (), targets, about or {}, EVALUATED, "pretrain")
    ranks.on_first(lambda: write_text(out / RUN, record.model_dump_json(indent=2) + "\n"))
    return record


def _dataset(
    shards: Sequence[Shard],
    plan: TrainingPlan,
    config: PretrainConfig,
    targets: Targets,
    passes: Sequence[PassName],
    ready: Ready,
) -> PairDataset:
    """What a step reads: masked texts always where words are guessed, strange pictures where their attention is."""
    beside: list[PassName] = ["masked"] if config.language_weight or "masked" in passes else []
    beside += ["negative"] if "negative" in passes else []
    known: dict[str, PassName] = {recipe: name for name, recipe in RECIPES.items()}
    held = targets.cache.spec.passes if isinstance(targets, CachedTargets) else (RECIPES["matched"],)
    # What a cache calls by a name that is not known has a number, but is not read.
    names: list[PassName] = [known.get(recipe, "matched") for recipe in held]
    return PairDataset(
        shards,
        plan.table.in_views(plan.views, 1 + config.remap_flips),
        ready.reads,
        (),
        plan.reader,
        full_text=config.queries == "all",
        encode=Retrieval().targets,
        recipe=plan.recipe,
        passes=names,
        beside=beside,
        taught=passes,
        partners=plan.reader,
        identities=True,
        tokens=ready.tokens,
    )


def _check_words(ready: Ready, config: PretrainConfig, passes: Sequence[PassName]) -> None:
    """Refuse to guess words with a text tower that has others.

    Raises:
        InputError: masked words are asked for, and the text tower is no twin; or their attention, and its tokens are
            others.
    """
    wrong = []
    if config.language_weight and ready.student.config.text is not None:
        wrong.append("masked words are guessed with the word embeddings of a twin; train with --set language_weight=0")
    if "masked" in passes and ready.tokens is not None:
        wrong.append("the teacher's masked words are tokens of its own; train with --passes matched,negative")
    if wrong:
        raise InputError(f"this pre-training does not suit the text tower:{bullet_list(wrong)}")


def _recalls(model: nn.Module, valid: Sequence[Shard], ready: Ready) -> Mapping[str, float]:
    """R@1 both ways on held-out shards, and their mean, by which the best checkpoint is chosen."""
    task = Retrieval()
    held_out = PairDataset(valid, PairTable.of(valid), ready.preprocessor, (), encode=task.targets)
    vectors = task.predict(output_of(model.student), held_out)  # type: ignore[arg-type]
    found = {
        name: float((ranks(vectors) < 1).float().mean())
        for name, ranks in (("t2i_r1", image_ranks), ("i2t_r1", text_ranks))
    }
    return {"accuracy": sum(found.values()) / len(found), **found}
