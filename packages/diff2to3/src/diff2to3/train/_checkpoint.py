"""Model folders: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from _gs_render_reading import read_json, why_missing, why_unreadable
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diff2to3._errors import InputError
from diff2to3._parameter_limit import no_larger_than

C = TypeVar("C", bound=BaseModel)
M = TypeVar("M")


def save_model(folder: Path, config: BaseModel, weights: dict[str, Tensor]) -> None:
    """Writes a model folder, replacing an older one as a whole."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, fresh / "model.safetensors")
    (fresh / "config.json").write_text(config.model_dump_json(indent=1), encoding="utf-8")
    _replace(fresh, folder)


def read_config(folder: Path, config_class: type[C]) -> C:
    """The config of a model folder.

    Raises:
        InputError: missing or invalid ``config.json``.
    """
    try:
        return config_class.model_validate(read_json(folder / "config.json"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no usable config.json for {config_class.__name__} ({error})") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder.

    Raises:
        InputError: missing or broken ``model.safetensors``, or a tensor that is not finite, by name.
    """
    path = folder / "model.safetensors"
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(why_unreadable(path, error)) from error
    except OSError as error:
        raise InputError(why_missing(path) or f"{folder}: no usable model.safetensors ({error})") from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: tensor {name} holds NaN or infinite numbers")
    return weights


def load_model(folder: Path, config_class: type[C], build: Callable[[C], M]) -> M:
    """The model of a model folder, on the CPU.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        config_class: of the model.
        build: the model's class.

    Raises:
        InputError: a file is missing or broken, or the weights are not those of such a model.
    """
    config, weights = read_config(folder, config_class), read_weights(folder)
    with no_larger_than(folder / "model.safetensors"):
        model: Any = build(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # missing, unexpected and misshapen tensors
        raise InputError(f"{folder}: {' '.join(str(error).split())}") from error
    return model


def _replace(fresh: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
