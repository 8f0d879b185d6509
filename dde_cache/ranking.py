"""Training on a teacher's ranking of mined candidates: what a batch has of them, and their term in the loss.

docs/mining.md says what is minimised, and which rounds are refused.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dde_cache.batches import Batch
from dde_cache.candidates import NONE, check_shards
from dde_cache.distill import Compared, TrainConfig
from dde_cache.errors import CacheError, InputError
from dde_cache.inference import Student
from dde_cache.initial import is_run
from dde_cache.losses import ranking_sum
from dde_cache.matching import Scores
from dde_cache.preprocess import Preprocessor
from dde_cache.ranks import Ranks
from dde_cache.samples import Shard
from dde_cache.sources import Targets, caches_of
from dde_cache.stream import Pair, Recent
from dde_cache.student import DualEncoderOutput
from dde_cache.tasks import Task
from dde_cache.terms import Objective, Sizes, Term

FRONT = "ranking."
"""Before the names of a batch's candidates."""

_KEPT_SAMPLES = 4096


class RankingReader:
    """The candidates of a batch's pairs, with the teacher's scores; each picture and text once.

    A batch gets, with m different texts, p different pictures and k candidates: `ranking.input_ids`,
    `ranking.attention_mask` [m, t], `ranking.pixels0` [p, c, y, x], `ranking.grid0` [p, 2]; `ranking.picture` and
    `ranking.text` [b, k], which of them are a pair's (-1: none); `ranking.picture_score` and `ranking.text_score`
    [b, k + 1], the teacher's scores, those of the pair itself first.

    Args:
        scores: of the candidates.
        shards: those that were mined.
        preprocessor: of the student.
        top: the first candidates alone; None: all.
    """

    def __init__(
        self, scores: Scores, shards: Sequence[Shard], preprocessor: Preprocessor, top: int | None = None
    ) -> None:
        self._scores, self._found, self._shards = scores, scores.candidates, shards
        self._preprocessor, self._top = preprocessor, top
        self._home = {key: number for number, shard in enumerate(shards) for key in shard.keys}
        self._start()

    def _start(self) -> None:
        self._texts: Recent[int, str] = Recent(self._read, lambda _text: 1, _KEPT_SAMPLES)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_texts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _read(self, text: int) -> str:
        key = self._found.keys[int(self._found.sample[text])]
        return self._shards[self._home[key]].read(key).texts[int(self._found.slot[text])].text

    def __call__(self, pairs: Sequence[Pair], drawn: Callable[[Pair, str, int], Any]) -> dict[str, Tensor]:
        """Read the candidates of a batch; `drawn` gives another sample's pictures (`pixels`) in a pair's view."""
        found, scores = self._found, self._scores
        sample = np.array([found.number[pair.key] for pair in pairs])
        text = found.starts[sample] + np.array([pair.text for pair in pairs])
        pictures, texts = found.pictures[text][:, : self._top], found.texts[sample][:, : self._top]
        # Where no pair of a batch has candidates, a tower still wants something to read: the first pair's own.
        seen: dict[tuple[int, int, bool], np.ndarray] = {}
        places: dict[tuple[int, int, bool], int] = {}
        index = np.full(pictures.shape, -1, np.int64)
        for row, pair in enumerate(pairs):
            for column, number in enumerate(pictures[row].tolist()):
                if number != NONE:
                    place = (number, pair.view, pair.mirrored)
                    if place not in places:
                        key = found.keys[number]
                        seen[place] = drawn(pair, key, self._home[key]).pixels[0]
                    index[row, column] = places.setdefault(place, len(places))
        processed = list(seen.values()) or [drawn(pairs[0], pairs[0].key, pairs[0].shard).pixels[0]]
        stacked = self._preprocessor.stack(processed)
        chosen = np.unique(texts[texts != NONE])
        tokens = self._preprocessor.tokens([self._texts(int(one)) for one in (chosen if len(chosen) else text[:1])])
        own = scores.own[text][:, None]
        batch = {
            "input_ids": tokens.ids,
            "attention_mask": tokens.mask,
            "pixels0": stacked.pixels,
            "grid0": stacked.grid,
            "picture": torch.from_numpy(index),
            "text": torch.from_numpy(np.where(texts == NONE, -1, np.searchsorted(chosen, texts))),
            "picture_score": torch.from_numpy(np.hstack([own, scores.pictures[text][:, : self._top]])),
            "text_score": torch.from_numpy(np.hstack([own, scores.texts[sample][:, : self._top]])),
        }
        return {f"{FRONT}{name}": value for name, value in batch.items()}


class Ranked(NamedTuple):
    """What other terms compare, and the pooled vectors of a batch's candidates."""

    other: Any
    student: DualEncoderOutput
    texts: Float[Tensor, "m w"]
    pictures: Float[Tensor, "p w"]


class RankedLosses(Objective[Ranked]):
    """The terms of other losses, and `ranking`: the mean over pairs and both directions of `ranking_sum`.

    Args:
        other: losses of one teacher or of several.
        config: weight and temperature.
    """

    def __init__(self, other: Objective[Any], config: TrainConfig) -> None:
        self._other, self._heat = other, config.ranking_temperature
        table = {name: Term(term.weight, term.rows, _total(term)) for name, term in other.terms.items()}
        table["ranking"] = Term(config.ranking_weight, _rows, self._ranking)
        super().__init__(self._compare, table, lambda batch: other.sizes([batch]))

    def _compare(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Ranked:
        other = self._other.run(model, batch, sizes)
        first: Compared = other if isinstance(other, Compared) else other[0]
        texts, pictures = (
            [batch[f"{FRONT}{name}"] for name in names]
            for names in (("input_ids", "attention_mask"), ("pixels0", "grid0"))
        )
        towers: Any = model
        return Ranked(other, first.student, towers.text_tower(*texts).pooled, towers.image_tower(*pictures).pooled)

    def _ranking(self, one: Ranked, batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
        text, image, scale = one.student.text.pooled, one.student.image.pooled, one.student.scale
        sides = (
            (text, image, one.pictures, batch[f"{FRONT}picture"], batch[f"{FRONT}picture_score"]),
            (image, text, one.texts, batch[f"{FRONT}text"], batch[f"{FRONT}text_score"]),
        )
        both = [ranking_sum(*side, scale, self._heat) for side in sides]
        return (both[0] + both[1]) / 2


def _total(term: Term[Any]) -> Callable[[Ranked, Batch, Sizes], Tensor]:
    return lambda one, batch, sizes: term.total(one.other, batch, sizes)


def _rows(batch: Batch, _sizes: Sizes) -> float:
    """Pairs that have candidates: half for each direction."""
    return sum(int((batch[f"{FRONT}{side}"] >= 0).any(-1).sum()) for side in ("picture", "text")) / 2


def with_ranking(losses: Objective[Any], config: TrainConfig) -> Objective[Any]:
    """Losses with the ranking of candidates, where it has weight."""
    return RankedLosses(losses, config) if config.ranking_weight else losses


def check_ranking(
    scores: Scores | None,
    shards: Sequence[Shard],
    targets: Targets,
    config: TrainConfig,
    task: Task,
    init: str | None,
) -> None:
    """Refuse candidates without weight or the reverse, of other shards, and of a stale round.

    Every sample is read at each start, also of a resumed run, but by the first rank alone.

    Raises:
        InputError: weight and candidates do not go together, the task compares no vectors, or shards have changed.
        CacheError: another student mined them than the one that training starts from.
        RunError: on the other ranks, where the first one refuses the shards.
    """
    if (scores is None) != (config.ranking_weight == 0):
        raise InputError(
            "expected candidates together with a ranking_weight above 0, got "
            + ("a weight alone; pass --candidates SCORES" if scores is None else "candidates alone")
        )
    if scores is None:
        fields = TrainConfig.model_fields
        idle = [n for n in ("ranking_temperature", "ranking_top") if getattr(config, n) != fields[n].default]
        if idle:
            raise InputError(f"expected {' and '.join(idle)} together with --candidates, whose ranking they are of")
        return
    if task.head != "similarity":
        raise InputError(f"expected --candidates with --task retrieval, got {config.task}: it compares no vectors")
    if any(one.on_missing == "skip" for one in caches_of(targets)):
        raise InputError("expected --on-missing error with --candidates: every candidate must be there")
    Ranks().on_first(lambda: check_shards(scores.candidates, shards, str(scores.folder)))
    if init is not None and is_run(init) and Student.from_pretrained(init).fingerprint != scores.index.student:
        raise CacheError(
            f"{scores.folder}: a stale round: its candidates are of {scores.candidates.name}, which is not the student "
            f"of {init}; `dde-cache mine {init}` proposes what is hard for it now, then extract their scores"
        )
