"""Model folders (``config.json`` + ``model.safetensors``) and resumable training checkpoints; no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

C = TypeVar("C", bound=BaseModel)
Optimizers = Sequence[torch.optim.Optimizer]


class Trained(nn.Module):
    """What a checkpoint holds: a model that learns, and buffers beside it."""

    model: nn.Module


def save_model(folder: Path, config: BaseModel, weights: dict[str, Tensor]) -> None:
    """Writes a model folder, replacing an older one as a whole."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, fresh / "model.safetensors")
    (fresh / "config.json").write_text(config.model_dump_json(indent=1))
    _replace(fresh, folder)


def read_config(folder: Path, config_class: type[C]) -> C:
    """The config of a model folder.

    Raises:
        ValueError: missing or invalid ``config.json``.
    """
    try:
        return config_class.model_validate_json((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no usable config.json for {config_class.__name__} ({error})") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a model folder.

    Raises:
        ValueError: missing or broken ``model.safetensors``.
    """
    try:
        return load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: no usable model.safetensors ({error})") from error


def save_state(folder: Path, stage: Trained, ema: nn.Module, optimizers: Optimizers, meta: dict[str, Any]) -> None:
    """Writes a training checkpoint of ``stage.model`` and the stage's buffers; the one before stays until then."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(_plain(stage.model.state_dict()), fresh / "model.safetensors")
    save_file(_plain(dict(stage.named_buffers(recurse=False))), fresh / "buffers.safetensors")
    save_file(_plain(ema.state_dict()), fresh / "ema.safetensors")
    moments: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for number, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                key = f"{number}.{index}.{name}"
                if isinstance(value, Tensor):
                    moments[key] = value
                else:
                    scalars[key] = value
    save_file(_plain(moments), fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(meta | {"optimizer_scalars": scalars}))
    _replace(fresh, folder)


def load_state(folder: Path, stage: Trained, ema: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """Restores :func:`save_state`; returns its ``meta``."""
    meta = json.loads((folder / "state.json").read_text())
    stage.model.load_state_dict(load_file(folder / "model.safetensors"))
    for name, value in load_file(folder / "buffers.safetensors").items():
        stage.get_buffer(name).copy_(value)
    ema.load_state_dict(load_file(folder / "ema.safetensors"))
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for key, value in (load_file(folder / "optimizer.safetensors") | meta.pop("optimizer_scalars")).items():
        number, index, name = key.split(".", 2)
        states[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _replace(fresh: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
