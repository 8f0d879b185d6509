"""Pairs -> batches of tensors, read in worker processes."""

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dde_cache.agreement import check_inputs
from dde_cache.errors import InputError, bullet_list, first_line
from dde_cache.partners import PartnersOfShards, PartnerSource
from dde_cache.passes import RECIPES, UNMASKED, PassName, Words, identities, mask_batch, plain
from dde_cache.preprocess import PixelBatch, Preprocessor, TokenBatch
from dde_cache.samples import Sample, Shard, Text
from dde_cache.spec import HASH_BYTES
from dde_cache.stream import Pair, PairTable, Recent
from dde_cache.tokens import TokenAligner
from dde_cache.views import ViewRecipe, pixel_hash

NO_LABEL = -100
"""The class number of a text without a label; torch's losses ignore it."""

PICTURE_BUDGET = 256 * 2**20
"""Bytes of processed pictures that one worker keeps, so that a picture is processed once for its texts."""

DECODED_BUDGET = 32 * 2**20
"""Bytes of decoded pictures that one worker keeps, so that a picture is decoded once for its views."""

Batch = dict[str, Tensor]


class TargetSource(Protocol):
    """Where a batch's distillation targets come from."""

    def check(self, shard: int, sample: Sample) -> None:
        """Refuse a sample that is not the one that the teacher saw."""

    def check_pixels(self, shard: int, key: str, view: int, levels: Callable[[], Sequence[np.ndarray]]) -> None:
        """Refuse a view whose pixels (8 bits, by image slot) are not those that the teacher saw."""

    def targets(self, pairs: Sequence[Pair]) -> Mapping[str, Tensor]:
        """Return target tensors by name, one row a pair."""


EncodeLabels = Callable[[Sequence[Text], Mapping[str, int]], Mapping[str, Tensor]]
"""From the texts of a batch and the classes by name to tensors of their labels, one row a text."""


def class_numbers(texts: Sequence[Text], classes: Mapping[str, int]) -> Batch:
    """`label` [b]: the class number of each text, `NO_LABEL` where there is none or the vocabulary lacks it."""
    numbers = [NO_LABEL if text.label is None else classes.get(text.label, NO_LABEL) for text in texts]
    return {"label": torch.tensor(numbers)}


@dataclass(frozen=True)
class _Drawn:
    """A view of a sample: its processed pictures by image slot, and the hashes of their pixels where they are asked."""

    sample: Sample
    pixels: tuple[np.ndarray, ...]
    hashes: np.ndarray


class PairDataset(Dataset[Batch]):
    """Batches of pairs by number, for a `DataLoader` with a batch sampler.

    A batch holds `pair` [b], `sample` [b] (the number of the sample's first pair: equal where pictures are shared),
    `input_ids` and `attention_mask` [b, t], `pixels0` [b, c, y, x] and `grid0` [b, 2] (and `pixels1`, `grid1` for
    samples with two images), what `encode` makes of the labels, and `target.*` where there is a target source.

    Args:
        shards: where the samples are.
        table: pairs by number, with the views that they are in.
        preprocessor: of the teacher.
        labels: answers in the order of their class numbers.
        targets: where targets come from.
        full_text: pad every text to the text length.
        encode: makes tensors of the labels.
        recipe: how views are drawn; None: pictures as processed.
        hashes: with a recipe, also give `pixel_hashes` [b, image slots, 8], uint8.
        identities: also give `picture` and `text` [b]: numbers that are equal where the pictures' bytes or the texts
            (but for case and spaces) are the same, in one sample or in two.
        passes: what the pass numbers of pairs mean.
        beside: passes that each batch also has, of the same pairs: `masked.input_ids` and `masked.guess` [b, t] (the
            tokens to guess, `UNMASKED` elsewhere), `negative.pixels0`, ..., and their targets as `masked.target.*`.
            What a pass shares with the matched one is not there a second time.
        taught: of the passes beside, those whose targets are read, where `passes` has them.
        partners: whose pictures the negative pass shows; None: chosen from the shards.
        others: makes what a batch has of other samples, from its pairs and `_view`, which draws their pictures.
        tokens: where the student has a tokenizer of its own: also give what `TokenAligner` gives.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        table: PairTable,
        preprocessor: Preprocessor,
        labels: Sequence[str],
        targets: TargetSource | None = None,
        *,
        full_text: bool = False,
        encode: EncodeLabels = class_numbers,
        recipe: ViewRecipe | None = None,
        hashes: bool = False,
        passes: Sequence[PassName] = ("matched",),
        beside: Sequence[PassName] = (),
        taught: Collection[PassName] = tuple(RECIPES),
        partners: PartnerSource | None = None,
        identities: bool = False,
        others: Callable[..., Batch] | None = None,
        tokens: TokenAligner | None = None,
    ) -> None:
        self._tokens = tokens
        self._taught_passes, self._identities, self._others = taught, identities, others
        self._passes, self._beside = tuple(passes), tuple(beside)
        self._words = Words.of(preprocessor.processor.tokenizer) if "masked" in (*passes, *beside) else None
        self._partners: PartnerSource = partners or PartnersOfShards(shards)
        self._encode = encode
        self._recipe, self._hashes = recipe, hashes and recipe is not None
        self._shards = shards
        self._table = table
        self._preprocessor = preprocessor
        self._classes = {label: number for number, label in enumerate(labels)}
        self._targets = targets
        self._full_text = full_text
        self._pictures = Recent(self._draw, lambda held: sum(p.nbytes for p in held.pixels), PICTURE_BUDGET)
        self._decoded = Recent(self._read, lambda held: sum(3 * p.width * p.height for p in held[1]), DECODED_BUDGET)

    def __len__(self) -> int:
        return len(self._table)

    def _read(self, place: tuple[int, str]) -> tuple[Sample, tuple[Image, ...]]:
        """Read a sample and decode its pictures."""
        sample = self._shards[place[0]].read(place[1])
        if self._targets is not None:
            self._targets.check(place[0], sample)
        try:
            return sample, tuple(image.decode() for image in sample.images)
        except InputError as error:
            raise InputError(f"{self._shards[place[0]].path}, sample {sample.key!r}: {error}") from error

    def _draw(self, place: tuple[int, str, int, bool]) -> _Drawn:
        """Draw a view of a sample."""
        shard, key, view, mirrored = place
        # Without views nothing comes twice: the decoded picture would only take room.
        sample, images = self._read((shard, key)) if self._recipe is None else self._decoded((shard, key))
        if self._recipe is not None:
            images = tuple(self._recipe(image, key, view, slot) for slot, image in enumerate(images))
        try:
            pixels = tuple(self._preprocessor.pixels(image) for image in images)
        except InputError as error:
            raise InputError(f"{self._shards[shard].path}, sample {key!r}: {error}") from error

        def levels() -> list[np.ndarray]:
            return [self._preprocessor.levels(picture) for picture in pixels]

        if self._targets is not None and self._recipe is not None:
            self._targets.check_pixels(shard, key, view, levels)
        if mirrored:
            pixels = tuple(np.ascontiguousarray(picture[..., ::-1]) for picture in pixels)
        hashes = [np.frombuffer(pixel_hash(picture), np.uint8) for picture in (levels() if self._hashes else ())]
        return _Drawn(sample, pixels, np.stack(hashes) if hashes else np.empty((0, HASH_BYTES), np.uint8))

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        """Read one batch.

        Raises:
            InputError: a sample cannot be read, or the samples of the batch differ in their number of images.
        """
        pairs = [self._table[number] for number in numbers]
        texts = [self._view(pair).sample.texts[pair.text] for pair in pairs]
        tokens = self._preprocessor.tokens([text.text for text in texts], full=self._full_text)
        names = [self._passes[pair.pass_number] for pair in pairs]
        first = [number - pair.text * self._table.states for number, pair in zip(numbers, pairs, strict=True)]
        batch = {
            "pair": torch.tensor(numbers),
            "sample": torch.tensor(first),
            "input_ids": self._masked(tokens, pairs, names)[0],
            "attention_mask": tokens.mask,
            **self._encode(texts, self._classes),
            **self._pictured(pairs, texts, names),
            **({} if self._tokens is None else self._tokens([text.text for text in texts])),
        }
        if self._identities:
            batch |= {"picture": identities([self._view(pair).sample.pictures_hash() for pair in pairs])}
            batch |= {"text": identities([plain(text.text).encode() for text in texts])}
        if self._targets is not None:
            batch |= self._taught(self._targets, pairs, batch)
        if self._others is not None:
            batch |= self._others(pairs, self._view)
        for name in self._beside:
            batch |= {f"{name}.{field}": value for field, value in self._shown(name, pairs, texts, batch).items()}
        return batch

    def _view(self, pair: Pair, key: str | None = None, shard: int | None = None) -> _Drawn:
        """The pictures of a sample (the pair's own, or `key` of its or another shard) as the pair's view has them."""
        return self._pictures((pair.shard if shard is None else shard, key or pair.key, pair.view, pair.mirrored))

    def _masked(self, tokens: TokenBatch, pairs: Sequence[Pair], names: Sequence[PassName]) -> tuple[Tensor, Tensor]:
        """Token ids and tokens to guess, where the pass of a pair masks them."""
        ids, guess = tokens.ids, torch.full_like(tokens.ids, UNMASKED)
        rows = [row for row, name in enumerate(names) if name == "masked"]
        if rows and self._words is not None:
            ids = ids.clone()
            ids[rows], guess[rows] = mask_batch(ids[rows], tokens.mask[rows], [pairs[row] for row in rows], self._words)
        return ids, guess

    def _pictured(self, pairs: Sequence[Pair], texts: Sequence[Text], names: Sequence[PassName]) -> Batch:
        """The pictures of a batch, those of partners where the pass of a pair exchanges them."""
        drawn = [
            self._view(pair, self._partners.partner(pair, text).key if name == "negative" else None)
            for pair, text, name in zip(pairs, texts, names, strict=True)
        ]
        images = {len(one.pixels) for one in drawn}
        if len(images) > 1:
            raise InputError(f"expected samples with one number of images, got {sorted(images)} in one data set")
        batch: Batch = {}
        for slot in range(images.pop()):
            stacked = self._preprocessor.stack([one.pixels[slot] for one in drawn])
            batch |= {f"pixels{slot}": stacked.pixels, f"grid{slot}": stacked.grid}
        if self._hashes:
            batch["pixel_hashes"] = torch.from_numpy(np.stack([one.hashes for one in drawn]))
        return batch

    def _shown(self, name: PassName, pairs: Sequence[Pair], texts: Sequence[Text], batch: Batch) -> Batch:
        """What a pass beside the matched one shows of a batch, and its targets where there are any."""
        names = [name] * len(pairs)
        shown: Batch = {}
        if name == "masked":
            shown["input_ids"], shown["guess"] = self._masked(tokens_of(batch), pairs, names)
        else:
            shown = self._pictured(pairs, texts, names)
        if self._targets is None or name not in self._passes or name not in self._taught_passes:
            return shown
        number = self._passes.index(name)
        return shown | self._taught(self._targets, [replace(pair, pass_number=number) for pair in pairs], batch | shown)

    @staticmethod
    def _taught(targets: TargetSource, pairs: Sequence[Pair], batch: Batch) -> Batch:
        """The targets of a batch, made from what the batch has."""
        taught = {f"target.{name}": value for name, value in targets.targets(pairs).items()}
        inputs = {name: value for name, value in batch.items() if not name.startswith("target.")}
        check_inputs(inputs | taught, pairs)
        return taught


def tokens_of(batch: Batch) -> TokenBatch:
    """The texts of a batch."""
    return TokenBatch(batch["input_ids"], batch["attention_mask"])


def pictures_of(batch: Batch) -> list[PixelBatch]:
    """The pictures of a batch, by image slot."""
    return [PixelBatch(batch[f"pixels{slot}"], batch[f"grid{slot}"]) for slot in range(2) if f"pixels{slot}" in batch]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to where the model is; patch grids stay on the CPU, where they steer shapes."""
    return {
        name: value if name.startswith("grid") or ".grid" in name else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }


def torch_device(name: str) -> torch.device:
    """Parse `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        InputError: there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
        raise InputError(f"expected --device cpu or a GPU that torch can use here, got {name!r}: {why}") from error
    return device


def batch_loader(dataset: PairDataset, order: Iterable[list[int]], workers: int) -> DataLoader[Batch]:
    """Read batches in the given order, `workers` processes ahead (0: in this process)."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=_whole,  # type: ignore[arg-type]  # `__getitems__` returns a batch, no list
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts,
    )


def _leave_interrupts(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of a group; the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none; there SIGTERM ends a worker, and the run with it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process on the SIGTERM of its parent, and on no other."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _whole(batch: Batch) -> Batch:
    return batch


def check_batch_size(table: PairTable, batch_size: int) -> None:
    """Refuse data that does not fill one batch.

    Raises:
        InputError: there are fewer pairs.
    """
    if len(table) < batch_size:
        raise InputError(
            f"expected at least one batch of {batch_size} pairs, got {len(table)} pairs; lower --batch-size"
        )


def check_labels(shards: Sequence[Shard], labels: Sequence[str], where: str) -> None:
    """Refuse shards whose labels the vocabulary does not know.

    Raises:
        InputError: some labels are unknown; all of them are listed.
    """
    known = set(labels)
    unknown = sorted(
        {
            text.label
            for shard in shards
            for sample in shard
            for text in sample.texts
            if text.label is not None and text.label not in known
        }
    )
    if unknown:
        raise InputError(
            f"{where}: expected labels among the teacher's {len(known)} answers, got {len(unknown)} others:"
            f"{bullet_list([repr(label) for label in unknown])}\nuse shards of the task that the teacher knows"
        )
