"""The card of a cache: a README.md that says what it is, from what, and how to train with it.

Between two marks the program writes; everything else is its maker's. The card's hash stands in the manifest, so that a
card that was changed on the way is noticed; `dde-cache repair --accept-card` and `push` seal it as it is then.
"""

from collections.abc import Sequence
from pathlib import Path

from dde_cache.assets import is_plain_file
from dde_cache.files import hash_file
from dde_cache.spec import Manifest, Provenance, TargetSpec
from dde_cache.store import CacheWriter, read_manifest, write_manifest, write_text

CARD = "README.md"
CARD_LIMIT = 2**20
"""Bytes of a card that are read."""

_BEGIN = "<!-- dde-cache writes from here -->"
_END = "<!-- to here; the rest is yours -->"
_TO_FILL_IN = "fill in"
_UNSIGNED = "| made by | fill in |"

_HEAD = """---
tags: [dde-cache, distillation, cross-modal-attention]
license: # fill in: the licences of teacher and data may bind these targets
---
# Cross-modal attention targets

| | |
|---|---|
| made by | fill in |
| contact | fill in |
| licence of the teacher | fill in |
| licence of pictures and texts | fill in |
| licence of these targets | fill in |

"""


def write_card(folder: Path, manifest: Manifest, provenance: Provenance) -> Manifest:
    """Write the card of a cache, unless somebody has signed the one that is there, and seal it.

    A signed card is left alone, with the seal that it has: only `seal_card` accepts what people have written.
    """
    path = folder / CARD
    if is_plain_file(path) and _UNSIGNED.encode() not in path.read_bytes():
        return manifest
    write_text(path, signed_card([], manifest, provenance))
    return seal_card(folder, manifest)


def close_with_card(writer: CacheWriter, provenance: Provenance) -> Manifest:
    """Write manifest and card over every unit in the folder, and return the manifest.

    Another writer may do the same at this moment, with fewer units in mind; so we look again until what we have sealed
    is there and lists every unit. Whoever writes last does the same.
    """
    while True:
        manifest = write_card(writer.folder, writer.close(), provenance)
        if read_manifest(writer.folder) == manifest and writer.present() <= {entry.name for entry in manifest.units}:
            return manifest


def seal_card(folder: Path, manifest: Manifest) -> Manifest:
    """Put the hash of the card as it is into the manifest."""
    return write_manifest(folder, manifest.model_copy(update={"card": hash_file(folder / CARD)}))


def card_problem(folder: Path, manifest: Manifest) -> str | None:
    """Say what is wrong with the card, or None."""
    path = folder / CARD
    accept = "if you signed or edited it, run `dde-cache repair --accept-card`"
    if not is_plain_file(path):
        return None if manifest.card is None else f"{CARD}: missing; run `dde-cache repair`"
    if manifest.card is None:
        return f"{CARD}: was never sealed; {accept}"
    return None if hash_file(path) == manifest.card else f"{CARD}: changed since it was sealed; {accept}"


def signed_card(texts: Sequence[str | None], manifest: Manifest, provenance: Provenance, place: str = "") -> str:
    """The card of a cache: its maker's part from that one of `texts` in which most is filled in, the rest written anew.

    Args:
        texts: cards that there are; of equal ones the first counts.
        manifest: what the cache holds.
        provenance: how its first unit came to be.
        place: URL or path from which the cache can be read; by default, where the card lies.
    """
    there = [text for text in texts if text is not None]
    text = min(there, key=lambda text: len(to_fill_in(text)), default=_HEAD)
    before, mark, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if mark else ""
    if not before.endswith("\n"):
        before += "\n"
    return before + _BEGIN + "\n" + _facts(manifest, provenance, place or "THIS_FOLDER") + _END + (after or "\n")


def to_fill_in(card: str) -> list[str]:
    """What the maker of a cache has not filled in, line by line."""
    before, _, rest = card.partition(_BEGIN)
    lines = (before + rest.partition(_END)[2]).splitlines()
    return [line.strip("| ").split("|")[0].split(":")[0].strip() for line in lines if _TO_FILL_IN in line]


def _kept(spec: TargetSpec) -> str:
    """Which keys are kept, and what lies beside the maps, in words."""
    whole = "; also rows over the whole sequence" if spec.has_whole else ""
    states = "".join(
        f"; {one.group} states of width {one.width}" + (", int8" if one.codec == "int8" else "") for one in spec.states
    )
    return spec.kept + whole + states


def _facts(manifest: Manifest, provenance: Provenance, place: str) -> str:
    """What the program knows of a cache, in Markdown."""
    spec, units = manifest.spec, manifest.units
    pairs = sum(entry.pairs for entry in units)
    size = sum(entry.size for entry in units)
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    shards = sorted(entry.source for entry in units)
    named = f"`{shards[0]}`" + (f" to `{shards[-1]}`" if len(shards) > 1 else "") if shards else "none"
    return f"""
{pairs:,} pairs of {sum(entry.samples for entry in units):,} samples in {len(units)} units, {size / 1e6:,.1f} MB
({size / max(pairs, 1):,.0f} bytes a pair).

| | |
|---|---|
| teacher | `{provenance.teacher}` ({spec.teacher.family}), weights {spec.teacher.weights[:16]} |
| shards | `{provenance.shards}`: {named} |
| maps | layers {", ".join(map(str, spec.layers))} of {spec.teacher_layers}, {spec.stored_heads} heads; {_kept(spec)} |
| weights | {spec.weights}{"" if spec.steps is None else f" of {spec.steps} steps"}; query rows: {spec.queries} |
| shown to the teacher | {spec.views} {"view" if spec.views == 1 else "views"} ({spec.view}); {"; ".join(spec.passes)} |
| logits | {"none" if spec.classes is None else f"{spec.classes} answers"} |
| fingerprint | `{manifest.fingerprint}` |
| made with | {versions}; {provenance.device} |

Train a dual encoder from it, with the same shards (the teacher is not needed):

    dde-cache train SHARDS --targets {place} --out RUN

Its format is described in docs/format.md of dde-cache; `dde-cache inspect {place}` shows what is inside.

"""
