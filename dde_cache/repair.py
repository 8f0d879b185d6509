"""Recipe: repair a cache. What is bad is put aside, and extracted again where shards and teacher are given.

Nothing else is touched. A manifest that is lost is made again from the units, each of them checked in full first. Bad
units are moved to `units/.bad/`, not deleted: they may hold what somebody still wants to look at, and readers do not
see them there.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from dde_cache.assets import ASSETS, asset_problems
from dde_cache.audit import Problem
from dde_cache.candidates import is_candidates, is_scores, no_cache
from dde_cache.card import CARD, card_problem, seal_card, write_card
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.extract import ExtractProgress, extract
from dde_cache.files import hash_file
from dde_cache.identity import config_of, save_assets
from dde_cache.samples import Shard
from dde_cache.spec import FORMAT_VERSION, Manifest, Model, Provenance, UnitAttributes, UnitEntry, difference
from dde_cache.store import MANIFEST, UNITS, read_manifest, write_manifest
from dde_cache.teacher import FusionTeacher
from dde_cache.unit import SUFFIX, Unit
from dde_cache.verify import VerifyProgress, VerifyReport, check_unit, unit_files, verify

BAD = ".bad"
"""Folder inside `units/` for what was put aside."""


class BadUnit(Model):
    """A unit that is not as it should be."""

    name: str
    problems: tuple[str, ...] = Field(description="the first few")


class RepairReport(Model):
    """What a repair did."""

    cache: str
    manifest: Literal["kept", "updated", "made again"]
    kept: int = Field(description="units that were found sound")
    bad: tuple[BadUnit, ...]
    set_aside: tuple[str, ...] = Field(description="files that were moved")
    extracted: tuple[str, ...] = Field(description="units that were extracted again")
    assets: tuple[str, ...] = Field(description="files of the teacher that were written again")
    card: Literal["kept", "written again", "accepted", "not accepted"]
    after: VerifyReport = Field(description="a fast look at the cache as it is now")


@dataclass
class _Survey:
    """What is there: sound units as manifest rows, bad and missing ones with their problems."""

    manifest: Manifest
    rebuilt: bool
    sound: dict[str, UnitEntry] = field(default_factory=dict)
    bad: dict[str, list[str]] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)


def repair(
    folder: Path,
    *,
    drop: bool = False,
    shards: Sequence[Shard] | None = None,
    teacher: str | None = None,
    accept_card: bool = False,
    device: str = "cpu",
    progress: VerifyProgress | None = None,
    extraction: ExtractProgress | None = None,
) -> RepairReport:
    """Check every unit in full, then drop or extract again the bad and missing ones, and write the manifest.

    Args:
        folder: the cache.
        drop: leave bad and missing units out.
        shards: extract them again from these, with `teacher`.
        teacher: folder, hub id, or `sample`; its identity must be the cache's. It also gives damaged assets again.
        accept_card: seal README.md as it is now.
        device: where the teacher runs.
        progress: hooks to show the check.
        extraction: hooks to show the extraction.

    Raises:
        InputError: both ways or half of one are asked for, or a shard that is needed is not among `shards`.
        CacheError: there are bad units and no way was asked for, or the cache cannot be repaired; nothing is changed.
    """
    if drop and (shards is not None or teacher is not None):
        raise InputError("expected --drop, or --shards with --teacher, got both")
    if shards is not None and teacher is None:
        raise InputError("expected --teacher together with --shards")
    survey = _survey(folder, progress or VerifyProgress())
    wrong_assets = asset_problems(folder, survey.manifest)
    _check_way(folder, survey, drop, shards, wrong_assets, teacher)
    restored = _restore_assets(folder, survey.manifest, teacher) if wrong_assets and teacher is not None else ()
    aside = _set_aside(folder, survey.bad)
    # Rows of units that are extracted again stay until then: were it to fail, the next repair must know of them.
    rows = survey.sound if drop else {entry.name: entry for entry in survey.manifest.units} | survey.sound
    manifest = survey.manifest.model_copy(update={"units": tuple(rows[name] for name in sorted(rows))})
    changed = survey.rebuilt or manifest.units != survey.manifest.units
    if changed:
        manifest = write_manifest(folder, manifest)
    card = _card(folder, manifest, survey.provenance, accept_card, changed)
    extracted: tuple[str, ...] = ()
    if shards is not None and teacher is not None:
        needed = _needed(shards, survey)
        if needed:
            config = config_of(manifest.spec, device, survey.provenance.batch_size or 64)
            extract(needed, teacher, folder, config, extraction)
            extracted = tuple(shard.path.stem + SUFFIX for shard in needed)
    return RepairReport(
        cache=str(folder),
        manifest="made again" if survey.rebuilt else "updated" if changed or extracted else "kept",
        kept=len(survey.sound),
        bad=tuple(BadUnit(name=name, problems=tuple(lines[:5])) for name, lines in sorted(survey.bad.items())),
        set_aside=aside,
        extracted=extracted,
        assets=restored,
        card=card,
        after=verify(folder, fast=True),
    )


def _survey(folder: Path, progress: VerifyProgress) -> _Survey:
    """Check every unit in full, with the manifest or, where it cannot be read, without.

    Raises:
        InputError: there is no cache.
        CacheError: there is no manifest and the units do not say of one accord what it was.
    """
    if is_candidates(folder) or (is_scores(folder) and not (folder / MANIFEST).exists()):
        raise InputError(f"{folder}: expected the folder of a cache, {no_cache(folder)}")
    if not (folder / UNITS).is_dir():
        raise InputError(f"{folder}: expected the folder of a cache, found no {UNITS}/ in it")
    try:
        survey = _Survey(read_manifest(folder), rebuilt=False)
    except CacheError as error:
        if (folder / UNITS).is_symlink() or (folder / ASSETS).is_symlink():
            raise
        survey = _Survey(_manifest_of_units(folder, str(error)), rebuilt=True)
    entries = {entry.name: entry for entry in survey.manifest.units}
    names = sorted(entries.keys() | {name for name in unit_files(folder) if name.endswith(SUFFIX)})
    paths = {name: folder / UNITS / name for name in names}
    progress.start(sum(path.stat().st_size for path in paths.values() if path.is_file()))
    for name, path in paths.items():
        size = path.stat().st_size if path.is_file() else 0
        problems = list(check_unit(path, entries.get(name), survey.manifest.fingerprint, fast=False))
        entry = None if problems else _entry(path, problems)
        if entry is None:
            survey.bad[name] = [f"{problem.kind}: {problem.message}" for problem in problems]
        else:
            survey.sound[name] = entries.get(name, entry)
            survey.provenance = _attributes(path).provenance
        progress.unit(name, size)
    return survey


def _entry(path: Path, problems: list[Problem]) -> UnitEntry | None:
    """The row of a unit that was found sound; None, with the problem, where its name cannot stand in a manifest."""
    attributes = _attributes(path)
    try:
        return attributes.entry(path.name, path.stat().st_size, hash_file(path))
    except ValueError as error:
        problems.append(Problem("unlisted", f"its name is not that of a unit: {error}"[:200]))
        return None


def _attributes(path: Path) -> UnitAttributes:
    unit = Unit(path)
    unit.close()
    return unit.attributes


def _manifest_of_units(folder: Path, reason: str) -> Manifest:
    """The manifest that the readable units agree on, still without rows; bad units have no say in it.

    Raises:
        CacheError: there is no sound unit, they are of different targets, or the assets are those of none of them.
    """
    found: dict[str, UnitAttributes] = {}
    assets: list[dict[str, str]] = []
    for name in unit_files(folder):
        path = folder / UNITS / name
        if list(check_unit(path, None, None, fast=False)):
            continue
        attributes = _attributes(path)
        found.setdefault(attributes.fingerprint, attributes)
        if attributes.assets not in assets:
            assets.append(attributes.assets)
    if not found:
        raise CacheError(f"{reason}\nand no sound unit says what it was; extract again")
    if len(found) > 1:
        first, other = list(found.values())[:2]
        raise CacheError(
            f"{reason}\nand the units are of {len(found)} different targets, for example:"
            f"{bullet_list(difference(first.spec, other.spec), 20)}\nmove those of one kind elsewhere"
        )
    [attributes] = found.values()
    base = Manifest(
        format_version=FORMAT_VERSION, spec=attributes.spec, fingerprint=attributes.fingerprint, assets=assets[0]
    )
    for one in assets:
        candidate = base.model_copy(update={"assets": one})
        if not asset_problems(folder, candidate):
            return candidate
    return base


def _check_way(
    folder: Path,
    survey: _Survey,
    drop: bool,
    shards: Sequence[Shard] | None,
    wrong_assets: Sequence[str],
    teacher: str | None,
) -> None:
    """Refuse, before anything is changed, what cannot be repaired in the way that was asked for.

    Raises:
        CacheError, InputError: see `repair`.
    """
    if wrong_assets and teacher is None:
        raise CacheError(
            f"{folder / ASSETS}: expected the teacher's files, got:{bullet_list(wrong_assets)}\n"
            "pass --teacher, which has them, or copy them from another copy of the cache; remove what is not listed"
        )
    if survey.bad and not drop and shards is None:
        lines = [f"{name}: {'; '.join(problems[:2])}" for name, problems in sorted(survey.bad.items())]
        raise CacheError(
            f"{folder}: {len(lines)} units are bad or missing:{bullet_list(lines)}\n"
            "pass --drop to leave them out, or --shards and --teacher to extract them again"
        )
    if shards is not None and not survey.rebuilt:
        given = {shard.path.stem + SUFFIX for shard in shards}
        lacking = sorted(survey.bad.keys() - given)
        if lacking:
            raise InputError(f"expected the shards of all bad units, but these have none:{bullet_list(lacking)}")


def _needed(shards: Sequence[Shard], survey: _Survey) -> list[Shard]:
    """The shards of bad and missing units; where the manifest was lost, of all units that are not there."""
    return [
        shard
        for shard in shards
        if (name := shard.path.stem + SUFFIX) in survey.bad or (survey.rebuilt and name not in survey.sound)
    ]


def _set_aside(folder: Path, bad: dict[str, list[str]]) -> tuple[str, ...]:
    """Move bad units out of the sight of readers; return where they are, below the cache."""
    moved = []
    for name in sorted(bad):
        path = folder / UNITS / name
        if path.is_symlink() or path.exists():
            (folder / UNITS / BAD).mkdir(exist_ok=True)
            os.replace(path, folder / UNITS / BAD / name)
            moved.append(f"{UNITS}/{BAD}/{name}")
    return tuple(moved)


def _restore_assets(folder: Path, manifest: Manifest, teacher_name: str) -> tuple[str, ...]:
    """Write the damaged files of the teacher again, where it gives the very same ones.

    Raises:
        CacheError: it gives others, or there are files that do not belong there.
    """
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        save_assets(FusionTeacher.load(teacher_name), made)
        written = []
        for asset, digest in manifest.assets.items():
            target = folder / ASSETS / asset
            if target.is_file() and hash_file(target) == digest:
                continue
            if not (made / asset).is_file() or hash_file(made / asset) != digest:
                raise CacheError(
                    f"{target}: the teacher given writes another {asset} (another teacher, or another version of "
                    "transformers); copy it from another copy of the cache"
                )
            target.parent.mkdir(exist_ok=True)
            partial = target.with_name(f".{asset}.{os.getpid()}.partial")
            shutil.copyfile(made / asset, partial)
            os.replace(partial, target)
            written.append(asset)
    left = asset_problems(folder, manifest)
    if left:
        raise CacheError(f"{folder / ASSETS}: these do not belong there; remove them:{bullet_list(left)}")
    return tuple(written)


def _card(
    folder: Path, manifest: Manifest, provenance: Provenance, accept: bool, changed: bool
) -> Literal["kept", "written again", "accepted", "not accepted"]:
    if accept:
        if not (folder / CARD).is_file():
            raise InputError(f"{folder / CARD}: expected a card to accept, found none")
        seal_card(folder, manifest)
        return "accepted"
    if not changed and card_problem(folder, manifest) is None:
        return "kept"
    after = write_card(folder, manifest, provenance)
    if card_problem(folder, after) is not None:
        return "not accepted"
    return "written again" if after != manifest else "kept"
