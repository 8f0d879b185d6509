"""A study's folder: its settings, and whether what is finished in it was made by them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

import dde_cache
from dde_cache.cells import Cell
from dde_cache.configs import mistakes
from dde_cache.distill import TrainConfig
from dde_cache.errors import RunError, bullet_list, first_line
from dde_cache.extract import ExtractConfig
from dde_cache.files import hash_file
from dde_cache.manifest import write_bytes
from dde_cache.outcomes import RESULTS, finished_runs, read_result
from dde_cache.spec import difference, hash_json
from dde_cache.testbeds import StudyConfig, source_of

CONFIG = "study.yaml"


def open_study(out: Path, config: StudyConfig) -> None:
    """Begin a study's folder, or check that it was begun with these settings.

    Raises:
        RunError: it holds something else.
        InputError: a new study's pictures cannot be had.
    """
    path = out / CONFIG
    values = config.model_dump(mode="json")
    if not path.is_file():
        if out.exists() and (not out.is_dir() or not all(one.name.startswith(f".{CONFIG}.") for one in out.iterdir())):
            raise RunError(f"{out}: expected a new or empty folder, or a study; choose another --out")
        for split in ("train", "test"):
            source_of(config, split)
        out.mkdir(parents=True, exist_ok=True)
        # Of two calls that begin at once, the other's settings may be there first.
        write_bytes(path, yaml.safe_dump(values, sort_keys=False).encode(), replace=False)
    begun = read_study(out).model_dump(mode="json")
    wrong = [f"{name}: begun with {begun[name]}, now {value}" for name, value in values.items() if begun[name] != value]
    if wrong:
        raise RunError(
            f"{out}: expected the settings that this study was begun with:{bullet_list(wrong, 20)}\nleave the settings "
            f"out (those in {path} hold), or choose another --out"
        )


def read_study(out: Path) -> StudyConfig:
    """The settings of a study that was begun.

    Raises:
        RunError: there is none, or its settings cannot be read.
    """
    path = out / CONFIG
    try:
        return StudyConfig.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = mistakes(error) if isinstance(error, ValidationError) else [first_line(error)]
        raise RunError(
            f"{path}: expected the settings of a study, but they cannot be read:{bullet_list(why, 20)}\nmend the "
            "file, or choose another --out"
        ) from error


def check_results(out: Path, config: StudyConfig) -> None:
    """Refuse results of runs that were trained otherwise than their cells now say.

    Raises:
        RunError: there are some.
    """
    wrong = []
    for run in finished_runs(out):
        try:
            kept = TrainConfig.model_validate(read_result(out, run).settings)
            wrong += [f"{run.name}: {line}" for line in difference(training(config.train, run.cell, run.seed), kept)]
        except ValidationError as error:
            wrong += [f"{run.name}: {line}" for line in mistakes(error)]
    if wrong:
        raise RunError(
            f"{out / RESULTS}: expected runs that were trained as their cells say now:{bullet_list(wrong, 20)}\ndelete "
            "these results and run the study again, or choose another --out"
        )


def hash_code() -> str:
    """SHA-256 of the names and texts of the package's modules: which code made a run."""
    root = Path(dde_cache.__file__).parent
    return hash_json({str(path.relative_to(root)): hash_file(path) for path in sorted(root.rglob("*.py"))})


def training(base: TrainConfig, cell: Cell, seed: int) -> TrainConfig:
    """The training settings of a cell with a seed."""
    return TrainConfig.model_validate(base.model_dump() | dict(cell.train) | {"seed": seed})


def extraction(base: ExtractConfig, cell: Cell) -> ExtractConfig:
    """The extraction settings of a cell: what follows from the codec follows from the cell's, where it names one."""
    changes: dict[str, Any] = dict(cell.extract)
    codec = {"k", "mass", "weights", "steps"}
    given = base.model_dump(exclude=codec if codec & changes.keys() else set())
    return ExtractConfig.model_validate(given | changes)
