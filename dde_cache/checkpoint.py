"""Checkpoints of teachers: where they are, what they say of themselves, and their weights."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, ViltConfig

from dde_cache.errors import TeacherError, first_line
from dde_cache.preprocess import Preprocessor
from dde_cache.teachers import ARCHITECTURES, FAMILIES, Family

SAMPLE_TEACHER = "sample"
"""Name of the teacher that ships with the package."""


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str | Path) -> str:
    """Turn `sample` into the folder of the teacher that ships with the package; leave folders and hub ids as they are.

    Raises:
        TeacherError: no such folder, and not the form of a hub id.
    """
    text = str(name)
    if text == SAMPLE_TEACHER:
        return str(Path(__file__).parent / "sample_teacher")
    path = Path(text)
    if not path.is_dir() and (path.exists() or path.parent.is_dir() or not _HUB_ID.fullmatch(text)):
        raise TeacherError(
            f"{text}: expected a checkpoint folder, a hub id (owner/name) or `{SAMPLE_TEACHER}`; no such folder"
        )
    return text


def read_config(name: str) -> ViltConfig:
    """Read the configuration of a ViLT, whose weights a student can start from.

    Raises:
        TeacherError: it is missing, unreadable, or not a ViLT's.
    """
    config = _any_config(name)
    if not isinstance(config, ViltConfig):
        raise TeacherError(f"{name}: expected a fusion encoder (model_type vilt), got model_type {config.model_type}")
    return config


def read_family(name: str) -> tuple[Any, type[Family], type[nn.Module]]:
    """Read a teacher's configuration; say its family and the class of its model.

    Raises:
        TeacherError: it is missing, unreadable, or of no family that we know.
    """
    config = _any_config(name)
    if config.model_type not in FAMILIES:
        families = ", ".join(FAMILIES)
        raise TeacherError(
            f"{name}: expected a fusion encoder (model_type {families}), got model_type {config.model_type}"
        )
    family = FAMILIES[config.model_type]
    names = [model.__name__ for model in family.architectures]
    architecture = (config.architectures or [_default(names)])[0]
    if architecture not in names:
        raise TeacherError(
            f"{name}: expected a fusion encoder that we can read attention from ({', '.join(names)}), got "
            f"{architecture}"
        )
    return config, *ARCHITECTURES[architecture]


def _default(architectures: Sequence[str]) -> str:
    """The model without a head, which a checkpoint that does not say is taken for."""
    return next((name for name in architectures if name.endswith("Model")), architectures[0])


def load_preprocessor(name: str, config: Any, family: type[Family]) -> Preprocessor:
    """The processor that stands beside a checkpoint.

    Raises:
        TeacherError: it is missing, or does not give what the model reads.
    """
    try:
        shape = family.shape(config.to_dict())
    except (KeyError, TypeError) as error:
        raise TeacherError(f"{name}: expected a configuration with the sizes of a {family.name}: {error}") from error
    return Preprocessor.load(name, shape.patch_size, shape.text_length, kind=family.processor, side=shape.side)


def _any_config(name: str) -> PreTrainedConfig:
    """Read a checkpoint's configuration.

    Raises:
        TeacherError: it is missing or unreadable.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"{name}: expected a folder or hub id with a checkpoint of a fusion encoder (config.json, "
            f"model.safetensors, processor), but it cannot be read: {first_line(error)}"
        ) from error


def load_weights(family: Any, path: str, config: Any, optional: Sequence[str] = ()) -> Any:
    """Load a checkpoint into a model class, and see that nothing is left at random numbers.

    Args:
        family: a model class of Hugging Face.
        path: folder or hub id.
        config: its configuration.
        optional: modules that the checkpoint may lack or hold in another shape; they start from random numbers then.

    Raises:
        TeacherError: the files cannot be read, or tensors are missing or of another shape.
    """
    try:
        model, report = family.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TeacherError(f"{path}: the weights cannot be loaded: {first_line(error)}") from error
    missing = sorted({*report["missing_keys"], *(name for name, *_shapes in report["mismatched_keys"])})
    missing = [name for name in missing if not name.startswith(tuple(f"{part}." for part in optional))]
    if missing:
        raise TeacherError(
            f"{path}: expected the weights of {family.__name__}, but {len(missing)} tensors are missing or of another "
            f"shape, for example {missing[0]}; it would run with random numbers in their place"
        )
    return model
