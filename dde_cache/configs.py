"""Configuration from a YAML file and from options: options win, and all mistakes are reported at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dde_cache.errors import InputError, bullet_list

Config = TypeVar("Config", bound=BaseModel)


def resolve_config(
    model: type[Config],
    file: Path | None = None,
    assignments: Sequence[str] = (),
    preset: Mapping[str, Any] | None = None,
    **options: Any,
) -> Config:
    """Build a configuration from, each winning over the one before: preset, file, assignments, options.

    Args:
        model: the pydantic model.
        file: YAML mapping of its fields.
        assignments: `name=value`, the value in YAML.
        preset: fields by name.
        options: fields by name; None means not given.

    Raises:
        InputError: the file is unreadable, or fields are unknown or out of range; the message lists all of them.
    """
    values: dict[str, Any] = dict(preset or {})
    if file is not None:
        values |= read_yaml(file)
    values |= assigned(assignments)
    values |= {name: value for name, value in options.items() if value is not None}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = ", ".join(model.model_fields)
        raise InputError(
            f"the configuration has mistakes:{bullet_list(mistakes(error), 20)}\nknown fields: {known}"
        ) from error


def assigned(assignments: Sequence[str]) -> dict[str, Any]:
    """`name=value` with values in YAML, as a mapping.

    Raises:
        InputError: some are none; all of them are listed.
    """
    values, wrong = {}, []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        try:
            values[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not (name and equals):
            wrong.append(repr(assignment))
    if wrong:
        raise InputError(f"expected --set name=value, got {', '.join(wrong)} (values are YAML)")
    return values


def mistakes(error: ValidationError) -> list[str]:
    """What a model does not take, as `field: why, got value`."""
    return [
        f"{'.'.join(map(str, one['loc'])) or 'together'}: {one['msg']}, got {one['input']!r:.200}"
        for one in error.errors()
    ]


def read_yaml(file: Path) -> Mapping[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: the file is missing or no mapping.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a YAML file, but it cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected a YAML mapping of configuration fields, got {type(values).__name__}")
    return values
