"""The card of a cache: a README.md that says what it is, from what, and how to train with it."""

from pathlib import Path

from dde_cache.spec import Manifest, Provenance
from dde_cache.store import write_text

CARD = "README.md"
_UNSIGNED = "| made by | fill in |"


def write_card(folder: Path, manifest: Manifest, provenance: Provenance) -> None:
    """Write the card of a cache, unless somebody has signed the one that is there."""
    path = folder / CARD
    if not path.exists() or _UNSIGNED in path.read_text():
        write_text(path, cache_card(manifest, provenance))


def cache_card(manifest: Manifest, provenance: Provenance) -> str:
    """Write the card of a cache in Markdown; what only its maker knows is left to fill in."""
    spec = manifest.spec
    pairs = sum(entry.pairs for entry in manifest.units)
    size = sum(entry.size for entry in manifest.units)
    kept = "all keys" if spec.k is None else f"the {spec.k} strongest keys and the tail mass"
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    return f"""---
tags: [dde-cache, distillation, cross-modal-attention]
license: # fill in: the licences of teacher and data may bind these targets
---
# Cross-modal attention targets

{pairs:,} pairs in {len(manifest.units)} units, {size / 1e6:,.1f} MB ({size / max(pairs, 1):,.0f} bytes a pair).

| | |
|---|---|
| teacher | `{provenance.teacher}` ({spec.teacher.family}), weights {spec.teacher.weights[:16]} |
| shards | `{provenance.shards}` |
| maps | layers {", ".join(map(str, spec.layers))} of {spec.teacher_layers}, {spec.stored_heads} heads; {kept} |
| weights | {spec.weights}; query rows: {spec.queries} |
| logits | {"none" if spec.classes is None else f"{spec.classes} answers"} |
| fingerprint | `{manifest.fingerprint}` |
| made with | {versions}; {provenance.device} |
{_UNSIGNED}

Train a dual encoder from it, with the same shards (the teacher is not needed):

    dde-cache train SHARDS --targets THIS_FOLDER --out RUN

Its format is described in docs/format.md of dde-cache; `dde-cache inspect THIS_FOLDER` shows what is inside.
"""
