"""Recipe: pre-train a dual encoder on pairs without labels, with the teacher's attention streamed from a cache.

The authors of DiDE (arXiv 2112.08723) never released this stage; ours is described in docs/pretraining.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dde_cache.batches import PairDataset
from dde_cache.errors import InputError, bullet_list
from dde_cache.fit import Progress
from dde_cache.passes import RECIPES, PassName
from dde_cache.prepare import TrainingPlan, plan_training
from dde_cache.pretext import Pretrainer
from dde_cache.pretraining import EVALUATED, PretrainConfig, PretrainLosses, passes_of
from dde_cache.ranks import Ranks
from dde_cache.ready import Ready, ready_student
from dde_cache.samples import Shard
from dde_cache.sources import Targets, caches_of
from dde_cache.stream import PairTable
from dde_cache.student import Head
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
    ready = ready_student(plan, targets, config, init, Head("pretraining", 1, EVALUATED), shards)
    _check_words(ready, config, passes)
    course = Course(
        stage="pretrain",
        plan=plan,
        model=Pretrainer(ready.student),
        ready=ready,
        objective=PretrainLosses(config, targets, plan.mean_heads, passes, Ranks(), ready.matched.axes),
        dataset=_dataset(shards, plan, config, targets, passes, ready),
        score=lambda: _recalls(ready, valid),
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
    ready: Ready,
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


def _recalls(ready: Ready, valid: Sequence[Shard]) -> Mapping[str, float]:
    """R@1 both ways on held-out shards, and their mean, by which the best checkpoint is chosen."""
    task = Retrieval()
    held_out = PairDataset(valid, PairTable.of(valid), ready.preprocessor, (), encode=task.targets)
    vectors = task.predict(output_of(ready.student), held_out)
    found = {
        name: float((ranks(vectors) < 1).float().mean())
        for name, ranks in (("t2i_r1", image_ranks), ("i2t_r1", text_ranks))
    }
    return {"accuracy": sum(found.values()) / len(found), **found}
