"""What is installed here, which devices there are, and whether the toolchain works: a tiny cache, written and read."""

import importlib.metadata
import io
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image
from pydantic import Field

from dde_cache import __version__
from dde_cache.errors import DdeCacheError
from dde_cache.evaluate import load_subject
from dde_cache.extract import ExtractConfig, extract
from dde_cache.images import EncodedImage
from dde_cache.samples import Sample, Text, open_shards
from dde_cache.spec import Model
from dde_cache.store import Cache
from dde_cache.targets import teacher_logits
from dde_cache.teacher import SAMPLE_TEACHER
from dde_cache.verify import verify
from dde_cache.write_shards import write_shards

FEATURES = {
    "http": "caches behind https://",
    "s3": "caches in s3://",
    "hf": "caches and teachers on the Hugging Face Hub",
    "tensorboard": "train --tensorboard",
    "report": "report: charts of runs",
    "onnx": "export --format onnx",
    "faiss": "index, search --index",
    "easy-vqa": "data import easy-vqa",
}
"""What the optional packages are for, by extra; an extra that is not here is shown by its name alone."""

_NOT_FEATURES = ("test", "dev")
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Package(Model):
    """One package: its version here, and whether it is the one that is asked for."""

    name: str
    version: str | None = Field(description="null: not installed")
    wanted: str
    fits: bool


class Feature(Model):
    """An optional part."""

    extra: str
    use: str
    packages: list[Package]
    installed: bool
    install: str


class Device(Model):
    """Something to train on."""

    name: str
    about: str
    precisions: list[str]


class Check(Model):
    """One step of the toolchain: it works, or what went wrong."""

    name: str
    problem: str | None


class DoctorReport(Model):
    """What `dde-cache doctor` finds."""

    version: str
    python: str
    platform: str
    packages: list[Package]
    features: list[Feature]
    devices: list[Device]
    checks: list[Check]
    healthy: bool = Field(description="every package that is needed is here, and every check works")


def examine(stage: Callable[[str], None] = lambda name: None) -> DoctorReport:
    """Look at this installation.

    Args:
        stage: called with the name of each check before it runs.
    """
    needed, extras = _requirements()
    packages = [find_package(one) for one in needed]
    features = []
    for extra, wanted in extras.items():
        found = [find_package(one) for one in wanted]
        features.append(
            Feature(
                extra=extra,
                use=FEATURES.get(extra, extra),
                packages=found,
                installed=all(one.fits for one in found),
                install=f"pip install 'dde-cache[{extra}]'",
            )
        )
    checks = _checks(stage)
    return DoctorReport(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        features=features,
        devices=_devices(),
        checks=checks,
        healthy=all(one.fits for one in packages) and not any(one.problem for one in checks),
    )


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What this package asks for: always, and by extra."""
    extras = importlib.metadata.metadata("dde-cache").get_all("Provides-Extra") or []
    needed = _asked("dde-cache", "")
    known = {str(one) for one in needed}
    return needed, {
        extra: [one for one in _asked("dde-cache", extra) if str(one) not in known]
        for extra in extras
        if extra not in _NOT_FEATURES
    }


def _asked(name: str, extra: str) -> list[Requirement]:
    """What a package asks for on this machine, with one of its extras."""
    lines = map(Requirement, importlib.metadata.requires(name) or ())
    return [one for one in lines if one.marker is None or one.marker.evaluate({"extra": extra})]


def find_package(wanted: Requirement) -> Package:
    """Look for a package here, and for what its extras need."""
    version = _version(wanted.name)
    fits = version is not None and wanted.specifier.contains(version, prereleases=True)
    # Of `fsspec[http]` it is the extra that is looked for.
    inside = [find_package(one) for extra in wanted.extras if fits for one in _asked(wanted.name, extra) if one.marker]
    inside = [one for one in inside if one.name != wanted.name]
    return Package(
        name=" with ".join([wanted.name, *(one.name for one in inside)]),
        version=version,
        wanted=str(wanted.specifier),
        fits=fits and all(one.fits for one in inside),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Device]:
    found = [
        Device(
            name="cpu",
            about=f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
            precisions=["no", *(name for name, dtype in _PRECISIONS.items() if _multiplies("cpu", dtype))],
        )
    ]
    for number in range(torch.cuda.device_count()):
        about, name = torch.cuda.get_device_properties(number), f"cuda:{number}"
        precisions = ["no", *(name_ for name_, dtype in _PRECISIONS.items() if _multiplies(name, dtype))]
        memory = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        found.append(Device(name=name, about=memory, precisions=precisions))
    return found


def _multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether a device can do the one thing that all training is made of, in a precision."""
    try:
        one = torch.ones(8, 8, device=device, dtype=dtype)
        return bool((one @ one == 8).all())
    except RuntimeError:
        return False


def _checks(stage: Callable[[str], None]) -> list[Check]:
    """Write and read a tiny cache in a temporary folder; what comes after a step that fails is not tried."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps: dict[str, Callable[[], None]] = {
            "shards: write and read": lambda: _write_shards(folder),
            "teacher: load the sample": lambda: _load_teacher(),
            "extract: write a cache": lambda: _extract(folder),
            "verify: judge the cache": lambda: _verify(folder),
            "targets: read the cache": lambda: _read(folder),
        }
        checks = []
        for what, step in steps.items():
            stage(what)
            problem = _problem(step)
            checks.append(Check(name=what, problem=problem))
            if problem:
                break
        return checks


def _problem(step: Callable[[], None]) -> str | None:
    try:
        step()
    except (DdeCacheError, OSError, RuntimeError, ValueError, TypeError, LookupError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _write_shards(folder: Path) -> None:
    samples = []
    for number in range(3):
        stream = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (36, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "png")
        text = Text(text="is there a red circle", label="no")
        samples.append(Sample(f"doctor-{number}", (EncodedImage(stream.getvalue(), "png"),), (text,)))
    write_shards(iter(samples), folder / "data", source="doctor", split="check", shard_size=2, arguments={})
    read = [sample for shard in open_shards(folder / "data") for sample in shard]
    if read != samples:
        raise ValueError("expected the samples that were written, got others")


def _load_teacher() -> None:
    load_subject(SAMPLE_TEACHER)


def _extract(folder: Path) -> None:
    extract(open_shards(folder / "data"), SAMPLE_TEACHER, folder / "cache", ExtractConfig(batch_size=2))


def _verify(folder: Path) -> None:
    report = verify(folder / "cache", against=open_shards(folder / "data"), teacher=SAMPLE_TEACHER)
    if not report.sound:
        raise ValueError("; ".join(finding.meaning for finding in report.findings))


def _read(folder: Path) -> None:
    if len(teacher_logits(Cache(folder / "cache"), open_shards(folder / "data"))) != 3:
        raise ValueError("expected the logits of 3 pairs")
