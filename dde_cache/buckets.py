"""Which pairs share a forward pass of the teacher: those whose texts and pictures are about as long.

A batch is padded to its longest text and its largest picture. Captions of 5 and of 35 tokens in one batch, or pictures
of 12 x 12 and of 12 x 20 patches, would spend much of the pass on padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dde_cache.errors import InputError
from dde_cache.partners import Partner, Place
from dde_cache.preprocess import Preprocessor
from dde_cache.records import partners_of, places
from dde_cache.samples import Sample, Shard
from dde_cache.spec import TargetSpec

TEXT_BUCKET = 8
"""Tokens by which texts of one batch may differ, and less."""

IMAGE_BUCKET = 16
"""The same of image tokens."""


def bucketed(tokens: Int[np.ndarray, "n axes"], widths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Cut rows into batches of one bucket each, full ones but for the last of each bucket.

    Rows go to the batch of their bucket in the order in which they come, so that neighbours, which share pictures, stay
    close.

    Args:
        tokens: of each row, by axis: text, first picture, second picture.
        widths: of a bucket, by axis.
        batch_size: most rows of a batch.
    """
    filling: dict[tuple[int, ...], list[int]] = {}
    for row, bucket in enumerate(map(tuple, (-(-tokens // np.array(widths))).tolist())):
        batch = filling.setdefault(bucket, [])
        batch.append(row)
        if len(batch) == batch_size:
            yield filling.pop(bucket)
    yield from (filling[bucket] for bucket in sorted(filling))


@dataclass(frozen=True)
class UnitWork:
    """What a unit is made of, and the batches in which the teacher sees it.

    Attributes:
        samples: of the shard.
        place: everything that the teacher sees of them, in the unit's order.
        partners: of those places whose pass exchanges pictures.
        batches: of numbers in `place`.
        cut_texts: texts that are longer than the text length.
        cropped_pictures: pictures of which the processor cuts something off.
    """

    samples: list[Sample]
    place: list[Place]
    partners: dict[Place, Partner]
    batches: list[list[int]]
    cut_texts: int
    cropped_pictures: int

    @classmethod
    def of(cls, shard: Shard, preprocessor: Preprocessor, spec: TargetSpec, batch_size: int) -> "UnitWork":
        """Look at the texts and at the headers of the pictures of a shard.

        Raises:
            InputError: a sample cannot be read, a picture is no whole number of patches, or no partner suits.
        """
        samples = list(shard)
        place = places(samples, spec)
        partners = partners_of(place, samples, shard.name, spec)
        texts = [text.text for sample in samples for text in sample.texts]
        lengths = preprocessor.lengths(texts)
        first = np.cumsum([0, *(len(sample.texts) for sample in samples)])
        sizes = {sample.key: _sizes(shard, sample, preprocessor) for sample in samples}
        pictures = {
            key: [rows * columns + 1 for rows, columns in (preprocessor.grid(*size) for size in some)]
            for key, some in sizes.items()
        }
        every = spec.queries == "all"
        tokens = np.array(
            [
                [
                    spec.text_length if every else min(lengths[first[one[0]] + one[1]], spec.text_length),
                    *pictures[partners[one].key if one in partners else samples[one[0]].key],
                ]
                for one in place
            ]
        )
        batches = list(bucketed(tokens, [TEXT_BUCKET, *[IMAGE_BUCKET] * (tokens.shape[1] - 1)], batch_size))
        cut = sum(length > spec.text_length for length in lengths)
        cropped = sum(preprocessor.loses_margin(*size) for some in sizes.values() for size in some)
        return cls(samples, place, partners, batches, cut, cropped)


def _sizes(shard: Shard, sample: Sample, preprocessor: Preprocessor) -> list[tuple[int, int]]:
    """Width and height in pixels of every picture of a sample, each of which has a grid."""
    try:
        sizes = [image.size() for image in sample.images]
        for size in sizes:
            preprocessor.grid(*size)
    except InputError as error:
        raise InputError(f"{shard.path}, sample {sample.key!r}: {error}") from error
    return sizes
