"""Settings from a YAML file, every key of which a command line can override."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from diff2to3._errors import InputError

Settings = TypeVar("Settings", bound=BaseModel)


def load_settings(path: Path, overrides: Sequence[str], model: type[Settings]) -> Settings:
    """Reads the file and applies ``key=value`` overrides (dotted keys reach into mappings, values are YAML).

    Raises:
        InputError: not YAML, an unknown key, or a value of the wrong type.
    """
    try:
        values = _parse(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{path}: got {type(values).__name__}, expected a mapping of settings")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override}: expected key=value")
        target, (*parents, last) = values, key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise InputError(f"--set {override}: {parent} is no mapping")
        try:
            target[last] = _parse(text)
        except ValueError as error:
            raise InputError(f"--set {override}: the value is not YAML ({' '.join(str(error).split())})") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise InputError(f"{path}: {problems}") from error


def _parse(text: str) -> Any:
    """The value of a YAML text; a `ValueError` says what is wrong with it."""
    import yaml  # not at the top: it comes with the extras that read such files

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
