"""Settings from a YAML file, every key of which a command line can override."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from diff2to3._errors import InputError

# What no settings need; a file from elsewhere may have it.
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_VALUES = 20_000

Settings = TypeVar("Settings", bound=BaseModel)


def load_settings(path: Path, overrides: Sequence[str], model: type[Settings]) -> Settings:
    """Reads the file and applies ``key=value`` overrides (dotted keys reach into mappings, values are YAML).

    ``base: FILE`` in it names a file of the same folder whose settings stand for those that it does not have itself.

    Raises:
        InputError: not YAML, an unknown key, or a value of the wrong type.
    """
    values = _read(path)
    if (base := values.pop("base", None)) is not None:
        if not isinstance(base, str) or Path(base).name != base:
            raise InputError(f"{path}: base is {_short(base)}, expected the name of a file in the same folder")
        values = _read(path.parent / base) | values
    return build_settings(values, overrides, model, source=str(path))


def build_settings(
    values: dict[str, Any],
    overrides: Sequence[str],
    model: type[Settings],
    *,
    source: str,
    option: str = "--set",
) -> Settings:
    """The settings that values and ``key=value`` overrides make (see `load_settings`).

    Args:
        source: where the values are from, and
        option: where the overrides are from, for what is wrong with them.

    Raises:
        InputError: an override that is none, an unknown key, or a value of the wrong type.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{option} {override}: expected key=value")
        target, (*parents, last) = values, key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise InputError(f"{option} {override}: {parent} is no mapping")
        try:
            target[last] = _parse(text)
        except ValueError as error:
            raise InputError(f"{option} {override}: the value is not YAML ({' '.join(str(error).split())})") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {_short(e['input'])})" for e in error.errors()
        )
        raise InputError(f"{source}: {problems}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        values = _parse(_text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise InputError(f"{path}: got {type(values).__name__}, expected a mapping of settings")
    return values


def _parse(text: str) -> Any:
    """The value of a YAML text; a `ValueError` says what is wrong with it."""
    import yaml  # not at the top: it comes with the extras that read such files

    try:
        value = yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    # An alias stands for what it names: some lines of them can stand for more than memory holds, or for themselves.
    level, count = [value], 0
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        count += len(level)
        if not level:
            return value
        if count > _MAX_VALUES:
            break
    raise ValueError(f"more than {_MAX_VALUES:,} values, or nested deeper than {_MAX_DEPTH} levels")


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES:,} bytes")
    return data.decode("utf-8")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
