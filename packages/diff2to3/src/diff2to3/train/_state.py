"""Checkpoints to resume from: safetensors and JSON alone, each whole or not there, told apart from damaged ones.

``out/checkpoints/00004000`` has the weights, their average, the optimizer's state, all under the parameters' names, and
``state.json``: step, number of items read, and size and CRC-32 of the other files. Tensors are whole however many
processes hold their parts, so that the number of processes and the sharding may change.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _gs_render_reading import read_json
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diff2to3._atomic import sync
from diff2to3._errors import InputError
from diff2to3.train._average import Average, Clip
from diff2to3.train._learning import Learning
from diff2to3.train._parallel import local, split_like, whole

Optimizers = Sequence[torch.optim.Optimizer]
FORMAT = 2
_META = "state.json"
_MAX_META_BYTES = 64 << 20  # optimizers may keep a number for every parameter in it
_KINDS = {"step": int, "average": int, "clip": int, "item": int, "seconds": int | float, "scalars": dict}
_FILES = {f"{name}.safetensors" for name in ("model", "average", "optimizer", "clip")}
_CHUNK = 1 << 24


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete or not what was written."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        out: run folder; many machines have to share it.
        keep: how many stay.
        accelerator: the main process writes, all give their parts.
    """

    def __init__(self, out: Path, keep: int, accelerator: Accelerator) -> None:
        self.folder, self.keep, self.accelerator = out / "checkpoints", keep, accelerator
        self.old = out / "checkpoint"

    def save(
        self, learning: Learning, average: Average, optimizers: Optimizers, clip: Clip, meta: dict[str, Any]
    ) -> Path | None:
        """Writes the state after ``meta["step"]``, then removes what is older than the last ``keep``.

        What the disk refuses is said on stderr and leaves the checkpoints before as they are.
        """
        tensors, scalars = _optimizer_state(learning, optimizers)
        files: dict[str, Mapping[str, Tensor]] = {
            "model": learning.state(),
            "average": {name: _like(value, average.parameters[name]) for name, value in average.values.items()},
            "optimizer": tensors,
            "clip": {"lengths": clip.lengths},
        }
        main = self.accelerator.is_main_process
        # One tensor at a time is gathered on the device and kept by the main process alone.
        held = {
            name: {key: kept for key, value in state.items() if (kept := _to_cpu(value, main)) is not None}
            for name, state in files.items()
        }
        if not main:
            return None
        meta = meta | {"format": FORMAT, "average": average.count, "clip": clip.count, "scalars": scalars}
        try:
            return self._write(held, meta)
        except (OSError, SafetensorError) as error:  # safetensors has its own way to report a full disk
            reason = " ".join(str(error).split())
            before = self.steps()
            stays = f"that of step {before[-1]} stays" if before else "there is none before it"
            print(
                f"train: the checkpoint of step {meta['step']} cannot be written ({reason}); {stays}", file=sys.stderr
            )
            return None

    def load(self, learning: Learning, average: Average, optimizers: Optimizers, clip: Clip) -> dict[str, Any] | None:
        """Restores the last checkpoint that is whole and returns its ``meta``; None where there is none at all.

        Raises:
            InputError: all are damaged, or they are of another model.
        """
        chosen: list[Any] = [self._choose() if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(chosen)
        step, problem = chosen[0]
        if problem is not None:
            raise InputError(problem)
        if step is None:
            return None
        folder = self.folder / f"{step:08d}"
        try:
            return self._restore(folder, learning, average, optimizers, clip)
        except SafetensorError as error:  # whole by its check sum, so it was written like this
            reason = " ".join(str(error).split())
            raise InputError(f"{folder} holds a file that is not safetensors ({reason}), the only kind read") from error

    def _restore(
        self, folder: Path, learning: Learning, average: Average, optimizers: Optimizers, clip: Clip
    ) -> dict[str, Any]:
        meta = read_json(folder / _META, _MAX_META_BYTES)
        _fill(folder / "model.safetensors", learning.state())
        learning.give_weights()
        _fill(folder / "average.safetensors", average.values, average.parameters)
        average.count = meta["average"]
        _load_optimizers(folder / "optimizer.safetensors", meta["scalars"], learning, optimizers)
        with safe_open(folder / "clip.safetensors", framework="pt") as file:
            lengths = file.get_tensor("lengths")
        if lengths.shape == clip.lengths.shape:  # another window starts anew
            clip.lengths.copy_(lengths)
            clip.count = meta["clip"]
        return meta

    def steps(self) -> list[int]:
        """Steps of the checkpoints, whole or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdigit())

    def _choose(self) -> tuple[int | None, str | None]:
        """The last whole checkpoint and no problem, or why none can be used; damaged ones are said on stderr."""
        steps = self.steps()
        if not steps and self.old.is_dir():
            return None, (
                f"{self.old} was written by an older version, whose checkpoints cannot be gone on from; remove it, or "
                "leave --resume out and start from a trained model with init: FOLDER"
            )
        for step in reversed(steps):
            try:
                verify(self.folder / f"{step:08d}")
                return step, None
            except DamagedCheckpointError as error:
                print(f"train: {error}; trying the checkpoint before it", file=sys.stderr)
        if steps:
            return None, f"{self.folder}: none of {len(steps)} checkpoints is whole; remove them to start anew"
        return None, None

    def _write(self, files: Mapping[str, Mapping[str, Tensor]], meta: dict[str, Any]) -> Path:
        folder, fresh = self.folder / f"{meta['step']:08d}", self.folder / ".new"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir()
            written = {}
            for name, tensors in files.items():
                path = fresh / f"{name}.safetensors"
                save_file(dict(tensors), path)
                sync(path)
                written[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
            (fresh / _META).write_text(json.dumps(meta | {"files": written}))
            sync(fresh / _META)
            sync(fresh)
            if folder.exists():  # a damaged one that was fallen back from
                shutil.rmtree(folder)
            os.rename(fresh, folder)
            sync(self.folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        old = (
            self.folder / ".old"
        )  # a checkpoint under its own name is whole, even if this is killed while it removes one
        shutil.rmtree(old, ignore_errors=True)
        for step in self.steps()[: -self.keep]:
            if step < meta["step"]:
                os.rename(self.folder / f"{step:08d}", old)
                shutil.rmtree(old, ignore_errors=True)
        return folder


def verify(folder: Path) -> None:
    """Compares a checkpoint's files with the sizes and check sums in its ``state.json``.

    Raises:
        DamagedCheckpointError: what is missing or differs.
    """
    try:
        meta = read_json(folder / _META, _MAX_META_BYTES)
        if meta["format"] != FORMAT:
            raise DamagedCheckpointError(f"{folder} has format {meta['format']}, expected {FORMAT}")
        for key, kind in _KINDS.items():
            if not isinstance(meta[key], kind):
                raise DamagedCheckpointError(f"{folder / _META}: {key} is {str(meta[key])[:40]!r}")
        if names := sorted(meta["files"].keys() ^ _FILES):
            raise DamagedCheckpointError(f"{folder / _META} lists other files than expected: {', '.join(names)[:200]}")
        for name, written in meta["files"].items():
            if (size := (folder / name).stat().st_size) != written["bytes"]:
                raise DamagedCheckpointError(f"{folder / name} has {size} bytes, expected {written['bytes']}")
            if _crc32(folder / name) != written["crc32"]:
                raise DamagedCheckpointError(f"{folder / name} is damaged: its check sum differs")
    except DamagedCheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{folder} is not a whole checkpoint ({error})") from error


def _optimizer_state(learning: Learning, optimizers: Optimizers) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the optimizers keep for every parameter, as ``name:entry``: tensors, and plain numbers."""
    names = {id(p): name for name, p in learning.parameters.items()}
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                key = f"{names[id(parameter)]}:{entry}"
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    scalars[key] = value
    return tensors, scalars


def _load_optimizers(path: Path, scalars: Mapping[str, float], learning: Learning, optimizers: Optimizers) -> None:
    names = {id(p): name for name, p in learning.parameters.items()}
    with safe_open(path, framework="pt") as file:
        keys: dict[str, list[str]] = {}
        for key in [*file.keys(), *scalars]:
            keys.setdefault(key.rpartition(":")[0], []).append(key)
        for optimizer in optimizers:
            settings = optimizer.state_dict()["param_groups"]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state: dict[int, dict[str, Any]] = {}
            for number, parameter in enumerate(parameters):
                for key in keys.get(names[id(parameter)], ()):
                    value = scalars[key] if key in scalars else split_like(file.get_tensor(key), parameter)
                    state.setdefault(number, {})[key.rpartition(":")[2]] = value
            if len(state) not in (0, len(parameters)):
                raise InputError(f"{path}: states of {len(state)} parameters; this optimizer has {len(parameters)}")
            optimizer.load_state_dict({"state": state, "param_groups": settings})


@torch.no_grad()
def _fill(path: Path, tensors: Mapping[str, Tensor], examples: Mapping[str, Tensor] | None = None) -> None:
    """Copies a file's tensors into these, which are split as the examples are.

    Raises:
        InputError: names or shapes differ, as they do when the model was changed.
    """
    examples = examples or tensors
    with safe_open(path, framework="pt") as file:
        if differing := sorted(set(file.keys()) ^ set(tensors)):
            where = "the checkpoint" if differing[0] in file.keys() else "the model"  # noqa: SIM118
            raise InputError(
                f"{path} is of another model: {len(differing)} tensors are in one alone, {differing[0]} in {where}; "
                "resume with the settings of the run, or start anew in another folder"
            )
        for name, tensor in tensors.items():
            value = file.get_tensor(name)
            if value.shape != examples[name].shape:
                raise InputError(
                    f"{path} is of another model: {name} has shape {list(value.shape)}, expected "
                    f"{list(examples[name].shape)}; resume with the settings of the run"
                )
            local(tensor).copy_(local(split_like(value, examples[name])))


def _like(value: Tensor, example: Tensor) -> Tensor:
    """A process's part as the tensor that it is part of."""
    from torch.distributed.tensor import DTensor

    if not isinstance(example, DTensor):
        return value
    return DTensor.from_local(
        value, example.device_mesh, example.placements, run_check=False, shape=example.shape, stride=example.stride()
    )


def _to_cpu(value: Tensor, keep: bool) -> Tensor | None:
    gathered = whole(value.detach())
    return gathered.to("cpu", copy=True).contiguous() if keep else None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
