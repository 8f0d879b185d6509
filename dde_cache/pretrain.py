"""Recipe: pre-train a dual encoder on pairs without labels, with the teacher's attention streamed from a cache.

The authors of DiDE (arXiv 2112.08723) never released this stage; ours is described in docs/pretraining.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dde_cache.batches import PairDataset
from dde_cache.fit import Progress
from dde_cache.initial import build_student
from dde_cache.passes import RECIPES, PassName
from dde_cache.prepare import TrainingPlan, fit_student, plan_training
from dde_cache.pretext import Pretrainer
from dde_cache.pretraining import EVALUATED, PretrainConfig, PretrainLosses, passes_of
from dde_cache.ranks import Ranks
from dde_cache.samples import Shard
from dde_cache.sources import Targets, caches_of
from dde_cache.stream import PairTable
from dde_cache.student import DualEncoder, Head
from dde_cache.tasks.retrieval import Retrieval, image_ranks, text_ranks
from dde_cache.train import Course, RunRecord, follow, output_of


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
    student = build_student(plan.tower, (), config.dropout, init, Head("pretraining", 1, EVALUATED))
    fit_student(student, targets, config, plan)
    course = Course(
        stage="pretrain",
        plan=plan,
        model=Pretrainer(student),
        student=student,
        objective=PretrainLosses(config, targets, plan.mean_heads, passes, Ranks()),
        dataset=_dataset(shards, plan, config, targets, passes),
        score=lambda: _recalls(student, valid, plan),
    )
    return follow(
        course, shards, targets, out, config, init=init, valid=valid, resume=resume, about=about, progress=progress
    )


def _dataset(
    shards: Sequence[Shard],
    plan: TrainingPlan,
    config: PretrainConfig,
    targets: Targets,
    passes: Sequence[PassName],
) -> PairDataset:
    """What a step reads: masked texts always where words are guessed, strange pictures where their attention is."""
    beside: list[PassName] = ["masked"] if config.language_weight or "masked" in passes else []
    beside += ["negative"] if "negative" in passes else []
    known: dict[str, PassName] = {recipe: name for name, recipe in RECIPES.items()}
    caches = caches_of(targets)
    held = caches[0].cache.spec.passes if caches else (RECIPES["matched"],)
    # What a cache calls by a name that is not known has a number, but is not read.
    names: list[PassName] = [known.get(recipe, "matched") for recipe in held]
    return PairDataset(
        shards,
        plan.table.in_views(plan.views, 1 + config.remap_flips),
        plan.preprocessor,
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
    )


def _recalls(student: DualEncoder, valid: Sequence[Shard], plan: TrainingPlan) -> Mapping[str, float]:
    """R@1 both ways on held-out shards, and their mean, by which the best checkpoint is chosen."""
    task = Retrieval()
    held_out = PairDataset(valid, PairTable.of(valid), plan.preprocessor, (), encode=task.targets)
    vectors = task.predict(output_of(student), held_out)
    found = {
        name: float((ranks(vectors) < 1).float().mean())
        for name, ranks in (("t2i_r1", image_ranks), ("i2t_r1", text_ranks))
    }
    return {"accuracy": sum(found.values()) / len(found), **found}
