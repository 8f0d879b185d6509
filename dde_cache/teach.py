"""Recipe: train or fine-tune a ViLT with a task head, for those who have no teacher for their task."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    ViltConfig,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
    ViltImageProcessorPil,
    ViltModel,
    ViltProcessor,
)

from dde_cache import __version__
from dde_cache.batches import (
    Batch,
    PairDataset,
    batch_loader,
    check_batch_size,
    check_labels,
    pictures_of,
    to_device,
    tokens_of,
)
from dde_cache.errors import InputError, RunError
from dde_cache.fit import Fit, FitResult, Progress
from dde_cache.preprocess import Preprocessor
from dde_cache.ranks import Ranks
from dde_cache.replay import order_in_views
from dde_cache.runs import AugmentedConfig, open_run, with_steps
from dde_cache.samples import Shard, Text
from dde_cache.scores import EvaluationReport
from dde_cache.stream import PairTable, Share
from dde_cache.student import DualEncoderOutput
from dde_cache.tasks import Task, load_task
from dde_cache.teacher import load_weights, read_config, resolve, task_logits
from dde_cache.terms import Objective, Term, pairs
from dde_cache.vilt import position_deviation

TRAINING = "training"
"""Folder of the checkpoints and metrics, inside the teacher's."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TeachConfig(AugmentedConfig):
    """How a teacher is trained: the shape of a new ViLT, and the fit."""

    task: str = Field(default="classification", description="a name of dde_cache.tasks, or module:Class")
    hidden_size: int = Field(default=128, ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    patch_size: int = Field(default=12, ge=1, description="pixels")
    image_size: int = Field(default=36, ge=1, description="side in pixels of the grid of learned positions")
    text_length: int = Field(default=16, ge=3, description="tokens, [CLS] and [SEP] included")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    initializer_range: float | None = Field(
        default=None, gt=0, description="deviation of a new model's weights; null: hidden_size ** -0.5"
    )


@dataclass(frozen=True)
class TaughtTeacher:
    """A finished run: how the fit went, and the score on the validation shards where there are some (first rank)."""

    fit: FitResult
    score: EvaluationReport | None


def train_teacher(
    shards: Sequence[Shard],
    out: Path,
    config: TeachConfig,
    *,
    init: str | None = None,
    valid: Sequence[Shard] = (),
    resume: bool = False,
    source: str = "",
    progress: Progress | None = None,
) -> TaughtTeacher:
    """Train a ViLT with a classification head and save it in `save_pretrained` form with processor and card.

    Args:
        shards: labelled training data.
        out: folder of the teacher; checkpoints and metrics go to `out/training`.
        config: shape and fit. With `init` the shape is the checkpoint's.
        init: a ViLT checkpoint to fine-tune; None starts from random weights and a word list of the training texts.
        valid: data that chooses the best checkpoint.
        resume: go on from the newest checkpoint.
        source: how the data was made, for the card.
        progress: hooks to show what happens.

    Raises:
        InputError: no labels, labels of `valid` that the training shards lack, or a task without a head.
        TeacherError: `init` cannot be used.
        RunError: see `Fit`.
    """
    task = load_task(config.task)
    labels = _answers(shards, task, config.task)
    if task.closed:
        check_labels(valid, labels, "validation shards")
    images = task.images or len(shards[0].read(shards[0].keys[0]).images)
    torch.manual_seed(config.seed)
    begun = _from_checkpoint(init, labels, config, images) if init else _from_scratch(shards, labels, config, images)
    vilt, preprocessor = begun
    table = PairTable.of(shards)
    check_batch_size(table, config.batch_size)
    recipe, views = config.drawn
    in_views = table.in_views(views)
    dataset = PairDataset(shards, in_views, preprocessor, labels, recipe=recipe, encode=task.targets)
    held_out = PairDataset(valid, PairTable.of(valid), preprocessor, labels, encode=task.targets)

    def measure(model: nn.Module) -> Any:
        device = next(model.parameters()).device
        model.eval()
        return task.predict(lambda batch: _output(model, to_device(batch, device)), held_out)

    def save(model: nn.Module) -> None:
        model.vilt.save_pretrained(out)  # type: ignore[operator, union-attr]
        preprocessor.save(out)

    def loader(step: int, share: Share) -> Iterable[Batch]:
        order = order_in_views(table, views, config, step, config.steps, share)
        return batch_loader(dataset, order, config.workers)

    ranks = Ranks()
    _check_out(out)
    config = with_steps(config, len(table))
    ranks.on_first(lambda: open_run(out / TRAINING, config, resume=resume))
    fit = Fit(
        JointClassifier(vilt),
        _objective(task),
        config,
        out / TRAINING,
        validate=(lambda model: task.score(measure(model))) if valid else None,
        save_best=save,
        progress=progress,
    )
    if resume:
        fit.resume()
    result = fit(loader)
    score = None
    if ranks.first:
        best = JointClassifier(_family(images).from_pretrained(out))
        score = task.report(measure(best), valid, labels) if valid else None
        (out / "README.md").write_text(_card(config, labels, result, score, source, init))
    return TaughtTeacher(result, score)


def _check_out(out: Path) -> None:
    """Refuse to write a teacher over files that no training of ours put there."""
    if out.exists() and not (out / TRAINING).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: expected a new or empty folder, or a teacher of ours; choose another --out")


class JointClassifier(nn.Module):
    """A ViLT with a task head, called with a batch of pairs."""

    def __init__(self, vilt: nn.Module) -> None:
        super().__init__()
        self.vilt = vilt

    def forward(self, batch: Batch) -> Float[Tensor, "b c"]:
        """Logits of a batch."""
        return task_logits(self.vilt, tokens_of(batch), pictures_of(batch))


def _output(model: nn.Module, batch: Batch) -> DualEncoderOutput:
    """A teacher's logits as tasks read them."""
    return DualEncoderOutput(logits=model(batch))


def _objective(task: Task) -> Objective[DualEncoderOutput]:
    """The task's hard loss alone."""
    return Objective(
        lambda model, batch, _sizes: _output(model, batch),
        {"hard": Term(1.0, pairs, lambda output, batch, _: task.hard_sum(output, batch))},
    )


def _answers(shards: Sequence[Shard], task: Task, name: str) -> list[str]:
    """The answers that a teacher learns.

    Raises:
        InputError: there are not two, or the task has none.
    """
    if task.head != "classes":
        raise InputError(f"task {name} needs no task head: extract with any ViLT")
    labels = task.answers(shards)
    if len(labels) < 2:
        raise InputError(f"expected at least two different labels in the training shards, got {labels}")
    return labels


def _family(images: int) -> Any:
    """The stock model with a head over one or two images."""
    return ViltForImagesAndTextClassification if images == 2 else ViltForQuestionAnswering


def _texts(shards: Sequence[Shard]) -> Iterator[Text]:
    return (text for shard in shards for sample in shard for text in sample.texts)


def _class_names(labels: Sequence[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def _from_scratch(
    shards: Sequence[Shard], labels: Sequence[str], config: TeachConfig, images_a_sample: int
) -> tuple[nn.Module, Preprocessor]:
    """A ViLT with random weights, and a word tokenizer of the training texts."""
    blank = BertTokenizer(vocab={token: number for number, token in enumerate(SPECIAL_TOKENS)}).backend_tokenizer
    words: set[str] = set()
    for text in {text.text for text in _texts(shards)}:
        pieces = blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    vocabulary = [*SPECIAL_TOKENS, *sorted(words)]
    tokenizer = BertTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)}, model_max_length=config.text_length
    )
    images = ViltImageProcessorPil(
        do_resize=False, size_divisor=config.patch_size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    model = _family(images_a_sample)(
        ViltConfig(
            num_images=images_a_sample if images_a_sample > 1 else -1,
            modality_type_vocab_size=images_a_sample + 1,
            vocab_size=len(vocabulary),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.hidden_size,
            image_size=config.image_size,
            patch_size=config.patch_size,
            max_position_embeddings=config.text_length,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            # 0.02 is BERT's, for a width of 768; at a width of 100 a network that small in its numbers hardly learns.
            initializer_range=config.initializer_range or config.hidden_size**-0.5,
            pad_token_id=0,
            **_class_names(labels),
        )
    )
    embeddings = model.vilt.embeddings
    projection = embeddings.patch_embeddings.projection
    nn.init.normal_(embeddings.position_embeddings, std=position_deviation(projection, model.config.initializer_range))
    return model, Preprocessor(ViltProcessor(images, tokenizer), config.patch_size, config.text_length)


def _from_checkpoint(
    init: str, labels: Sequence[str], config: TeachConfig, images: int
) -> tuple[nn.Module, Preprocessor]:
    """A ViLT checkpoint; its head starts anew unless it has as many answers as ours."""
    path = resolve(init)
    shape = read_config(path)
    shape.update(
        {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout, **_class_names(labels)}
    )
    # A checkpoint of masked language modelling has neither of them.
    optional = ["classifier", "vilt.pooler"]
    single = images == 2 and shape.modality_type_vocab_size < 3
    if images == 2:
        shape.update({"num_images": 2, "modality_type_vocab_size": 3})
    model = load_weights(
        _family(images), path, shape, optional + ["vilt.embeddings.token_type_embeddings"] * int(single)
    )
    if single:
        # The token type of a second image starts as that of the first (ViLT, NLVR2).
        types = load_weights(ViltModel, path, read_config(path), ["pooler"]).embeddings.token_type_embeddings.weight
        with torch.no_grad():
            model.vilt.embeddings.token_type_embeddings.weight.copy_(types[[0, 1, 1]])
    return model, Preprocessor.load(path, shape.patch_size, shape.max_position_embeddings)


def _card(
    config: TeachConfig,
    labels: Sequence[str],
    result: FitResult,
    score: EvaluationReport | None,
    source: str,
    init: str | None,
) -> str:
    """The README.md of a teacher: data, recipe, seed, accuracy."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: visual-question-answering",
        "tags: [vilt, fusion-encoder, dde-cache]",
        "---",
        "# A ViLT teacher",
        "",
        f"Trained with `dde-cache teacher train` {__version__} for {result.steps} steps"
        + (f" from `{init}`." if init else " from random weights."),
        "",
        f"- Data: {source or 'not stated'}",
        f"- Answers: {', '.join(labels[:20])}" + (f" and {len(labels) - 20} more" if len(labels) > 20 else ""),
        f"- Seed: {config.seed}",
        f"- Time: {result.seconds / 60:.0f} minutes of training steps",
        "",
    ]
    if score is not None:
        lines += ["| kind | pairs | accuracy on the validation shards |", "|---|---|---|"]
        rows = {**score.kinds, "all": score.overall}
        lines += [f"| {kind} | {row.pairs} | {row.accuracy:.4f} |" for kind, row in rows.items()]
    return "\n".join([*lines, "", "```json", config.model_dump_json(indent=2), "```", ""])
