"""Partners: the samples whose pictures the negative pass shows beside a text.

A partner is chosen by hash among the samples of the same shard, so that a reader which has the shard has the partner.
A cache names the partners that its teacher saw, in the group `partners`; docs/format.md describes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from dde_cache.arrays import key_arrays
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.layout import PARTNER_COLUMNS
from dde_cache.passes import NEGATIVE, plain
from dde_cache.samples import Sample, Shard, Text
from dde_cache.stream import Pair, Recent
from dde_cache.unit import Unit
from dde_cache.views import draws

EXCHANGED = {"exchanged": "picture"}
"""What `spec.groups["partners"]` says: the text stays, the other sample's picture comes."""

Place = tuple[int, int, int, int]
"""Number of the sample in its unit, text slot, view, pass."""

_POOLS = 2
"""Shards whose samples are remembered at a time."""


@dataclass(frozen=True)
class Partner:
    """The sample whose picture a pair was given: its key, and its content hash (32 bytes)."""

    key: str
    content: bytes


@dataclass(frozen=True)
class _Candidate:
    """What decides whether a sample may lend its picture."""

    content: bytes
    images: int
    pictures: bytes
    texts: frozenset[str]


class PartnerPool:
    """The samples of one shard, from which partners are taken.

    Args:
        name: of the shard, for messages.
        samples: all of them.
    """

    def __init__(self, name: str, samples: Iterable[Sample]) -> None:
        self._name = name
        self._samples = {sample.key: _candidate(sample) for sample in samples}
        self._keys = sorted(self._samples)

    @classmethod
    def of(cls, shard: Shard) -> "PartnerPool":
        """Read a shard.

        Raises:
            InputError: a sample cannot be read.
        """
        return cls(shard.name, shard)

    def suits(self, key: str, text: str, other: str) -> bool:
        """Whether another sample's picture is a negative for a text: not of this sample, nor with its picture, nor with
        this text among its own."""
        own, candidate = self._samples[key], self._samples[other]
        return (
            candidate.images == own.images and candidate.pictures != own.pictures and plain(text) not in candidate.texts
        )

    def pick(self, key: str, slot: int, text: str, view: int = 0, recipe: str = NEGATIVE) -> Partner:
        """Choose the partner of a pair: from a random place on in the order of the keys, the first that suits.

        Args:
            key, slot, view: of the pair.
            text: its text.
            recipe: with its version.

        Raises:
            InputError: no sample of the shard suits.
        """
        first = int(next(draws(f"{recipe}\n{key}\n{slot}\n{view}")) * len(self._keys))
        for step in range(len(self._keys)):
            other = self._keys[(first + step) % len(self._keys)]
            if self.suits(key, text, other):
                return Partner(other, self._samples[other].content)
        raise InputError(
            f"shard {self._name}, sample {key!r}, text {slot}: expected another sample with another picture and "
            f"without the text {text[:60]!r} in the shard, found none among {len(self._keys)}; make larger shards, or "
            "leave negative out of --passes"
        )

    def lacking(self) -> list[str]:
        """The pairs for which no sample suits, in words."""
        return [
            f"shard {self._name}, sample {key!r}: {text[:60]!r}"
            for key, own in self._samples.items()
            for text in sorted(own.texts)
            if not any(self.suits(key, text, other) for other in self._keys)
        ]


def _candidate(sample: Sample) -> _Candidate:
    texts = frozenset(plain(text.text) for text in sample.texts)
    return _Candidate(sample.content_hash(), len(sample.images), sample.pictures_hash(), texts)


class PartnerSource(Protocol):
    """Where the partner of a pair comes from."""

    def partner(self, pair: Pair, text: Text) -> Partner:
        """The partner of a pair."""


@dataclass
class PartnersOfShards:
    """Partners chosen anew from the shards, each of which is read once for it."""

    shards: Sequence[Shard]
    _pools: Recent[int, PartnerPool] = field(init=False)

    def __post_init__(self) -> None:
        self._pools = self._start()

    def _start(self) -> Recent[int, PartnerPool]:
        return Recent(lambda number: PartnerPool.of(self.shards[number]), lambda _pool: 1, _POOLS)

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shards = state["shards"]
        self._pools = self._start()

    def partner(self, pair: Pair, text: Text) -> Partner:
        """Choose the partner of a pair.

        Raises:
            InputError: no sample of its shard suits.
        """
        return self._pools(pair.shard).pick(pair.key, pair.text, text.text, pair.view)


def check_partners(shards: Sequence[Shard]) -> None:
    """See that every pair of some shards has a sample that suits, before hours are spent.

    Raises:
        InputError: some have none; they are listed.
    """
    lacking = [line for shard in shards for line in PartnerPool.of(shard).lacking()]
    if lacking:
        raise InputError(
            f"the negative pass takes the picture of another sample of the shard, with another picture and without the "
            f"text; {len(lacking)} texts have none:{bullet_list(lacking)}\nmake larger shards, or leave negative out "
            "of --passes"
        )


def partner_arrays(partners: Mapping[Place, Partner]) -> dict[str, np.ndarray]:
    """The arrays of a unit's `partners` group.

    Args:
        partners: by place, in any order.
    """
    places = sorted(partners)
    columns = np.array(places, np.int64).reshape(len(places), 4).T
    key_bytes, key_offsets = key_arrays([partners[place].key for place in places])
    content = np.frombuffer(b"".join(partners[place].content for place in places), np.uint8)
    return {
        **{
            f"partners/{name}": column.astype(dtype)
            for (name, dtype), column in zip(PARTNER_COLUMNS.items(), columns, strict=True)
        },
        "partners/key_bytes": key_bytes,
        "partners/key_offsets": key_offsets,
        "partners/content": content.reshape(len(places), 32),
    }


def read_partners(unit: Unit) -> dict[Place, Partner]:
    """The partners that a unit names, by place.

    Raises:
        CacheError: the unit is damaged.
    """
    columns = [unit.array(f"partners/{name}").tolist() for name in PARTNER_COLUMNS]
    content = unit.array("partners/content")
    if len(content) != len(unit.partner_keys):
        raise CacheError(f"{unit.path}: partners is damaged; delete the unit and run `dde-cache extract` again")
    named = [Partner(key, row.tobytes()) for key, row in zip(unit.partner_keys, content, strict=True)]
    return dict(zip(zip(*columns, strict=True), named, strict=True))


def cut_partners(unit: Unit, place: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Keep the partners of some samples, also where the partners themselves are not kept.

    Args:
        unit: where they come from.
        place: new number of each sample, or -1.

    Raises:
        CacheError: the unit is damaged.
    """
    partners = read_partners(unit)
    if any(sample >= len(place) for sample, *_ in partners):
        raise CacheError(f"{unit.path}: partners/sample is damaged; delete the unit and run `dde-cache extract` again")
    return partner_arrays(
        {(int(place[sample]), *rest): one for (sample, *rest), one in partners.items() if place[sample] >= 0}  # type: ignore[misc]
    )
