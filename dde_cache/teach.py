"""Recipe: train or fine-tune a ViLT with a task head, for those who have no teacher for their task."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import BertTokenizer, ViltConfig, ViltForQuestionAnswering, ViltImageProcessorPil, ViltProcessor

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
from dde_cache.losses import label_sum
from dde_cache.preprocess import Preprocessor
from dde_cache.ranks import Ranks
from dde_cache.runs import FitConfig, open_run, with_steps
from dde_cache.samples import Shard, Text
from dde_cache.scores import EvaluationReport, Predictions, accuracy, predict, report
from dde_cache.stream import BatchOrder, PairTable, Share
from dde_cache.teacher import load_weights, read_config, resolve, task_logits
from dde_cache.terms import Objective, Term, labelled
from dde_cache.vilt import position_deviation

TRAINING = "training"
"""Folder of the checkpoints and metrics, inside the teacher's."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TeachConfig(FitConfig):
    """How a teacher is trained: the shape of a new ViLT, and the fit."""

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
        InputError: no labels, or labels of `valid` that the training shards lack.
        TeacherError: `init` cannot be used.
        RunError: see `Fit`.
    """
    labels = sorted({text.label for text in _texts(shards) if text.label is not None})
    if len(labels) < 2:
        raise InputError(f"expected at least two different labels in the training shards, got {labels}")
    check_labels(valid, labels, "validation shards")
    torch.manual_seed(config.seed)
    vilt, preprocessor = _from_checkpoint(init, labels, config) if init else _from_scratch(shards, labels, config)
    table = PairTable.of(shards)
    check_batch_size(table, config.batch_size)
    dataset = PairDataset(shards, table, preprocessor, labels)
    held_out = PairDataset(valid, PairTable.of(valid), preprocessor, labels)

    def measure(model: nn.Module) -> Predictions:
        device = next(model.parameters()).device
        model.eval()
        return predict(lambda batch: model(to_device(batch, device)), held_out)

    def save(model: nn.Module) -> None:
        model.vilt.save_pretrained(out)  # type: ignore[operator, union-attr]
        preprocessor.save(out)

    def loader(step: int, share: Share) -> Iterable[Batch]:
        order = BatchOrder(table, config.shuffle(), config.batch_size, step, config.steps, share)
        return batch_loader(dataset, order, config.workers)

    ranks = Ranks()
    _check_out(out)
    config = with_steps(config, len(table))
    ranks.on_first(lambda: open_run(out / TRAINING, config, resume=resume))
    fit = Fit(
        JointClassifier(vilt),
        _OBJECTIVE,
        config,
        out / TRAINING,
        validate=(lambda model: accuracy(measure(model))) if valid else None,
        save_best=save,
        progress=progress,
    )
    if resume:
        fit.resume()
    result = fit(loader)
    score = None
    if ranks.first:
        best = JointClassifier(ViltForQuestionAnswering.from_pretrained(out))
        score = report(measure(best), valid, labels) if valid else None
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


_OBJECTIVE: Objective[Tensor] = Objective(
    lambda model, batch, _sizes: model(batch),
    {"hard": Term(1.0, labelled, lambda logits, batch, _sizes: label_sum(logits, batch["label"]))},
)


def _texts(shards: Sequence[Shard]) -> Iterator[Text]:
    return (text for shard in shards for sample in shard for text in sample.texts)


def _class_names(labels: Sequence[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def _from_scratch(
    shards: Sequence[Shard], labels: Sequence[str], config: TeachConfig
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
    model = ViltForQuestionAnswering(
        ViltConfig(
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


def _from_checkpoint(init: str, labels: Sequence[str], config: TeachConfig) -> tuple[nn.Module, Preprocessor]:
    """A ViLT checkpoint; its head starts anew unless it has as many answers as ours."""
    path = resolve(init)
    shape = read_config(path)
    shape.update(
        {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout, **_class_names(labels)}
    )
    # A checkpoint of masked language modelling has neither of them.
    model = load_weights(ViltForQuestionAnswering, path, shape, optional=["classifier", "vilt.pooler"])
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
