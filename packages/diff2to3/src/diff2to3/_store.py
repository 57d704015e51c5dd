"""Pipeline directories: ``pipeline.json`` and a ``<role>.safetensors`` for every component with weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from _gs_render_reading import read_json, why_unreadable
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diff2to3._atomic import replacing
from diff2to3._errors import InputError, PipelineFormatError
from diff2to3._locate import CONFIG_NAME, file_sha256
from diff2to3._locate import locate as locate
from diff2to3._pipeline_config import PipelineConfig
from diff2to3._plugins import PIPELINE_ROLES

#: The 2to3-VAE's encoder, kept beside the roles: generating does not need it, encoding an object does.
ENCODER = "latent_encoder"


def read_config(directory: Path) -> PipelineConfig:
    """The checked contents of a directory's ``pipeline.json``.

    Raises:
        PipelineFormatError: missing, not JSON, or not what `PipelineConfig` expects.
    """
    path = directory / CONFIG_NAME
    try:
        contents = read_json(path)
        if isinstance(contents, dict) and contents.get("name") == "TrellisImageTo3DPipeline" and "args" in contents:
            raise PipelineFormatError(
                f"{path} is TRELLIS's own: 'diff2to3 import-trellis {directory} DST' makes ours of it"
            )
        return PipelineConfig.model_validate(contents)
    except FileNotFoundError as error:
        raise PipelineFormatError(f"{directory} is not a pipeline: it has no {CONFIG_NAME}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise PipelineFormatError(f"{path}: {problems}") from error
    except PipelineFormatError:
        raise
    except (OSError, ValueError) as error:
        raise PipelineFormatError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}") from error


def weights_path(directory: Path, role: str) -> Path:
    """Where a directory keeps the weights of a role, or of `ENCODER`."""
    return directory / f"{role}.safetensors"


def load_weights(module: nn.Module, path: Path, config: PipelineConfig) -> str:
    """Fill a module with the tensors of a safetensors file: exactly its own, of its shapes, all finite.

    Args:
        module: the module.
        path: the file.
        config: of its directory; the file must have the SHA-256 that stands there, if any do.

    Returns:
        The SHA-256 of the file.

    Raises:
        PipelineFormatError: missing, damaged or exchanged file; missing, unexpected, misshapen or non-finite tensors,
            by name.
    """
    expected = module.state_dict()
    try:
        sha256 = _checked_sha256(path, config)
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            _compare(f"{path}: missing tensors", sorted(expected.keys() - names))
            _compare(f"{path}: unexpected tensors", sorted(names - expected.keys()))
            state = {name: file.get_tensor(name) for name in sorted(names)}
    except FileNotFoundError as error:
        raise PipelineFormatError(f"{path}: no such file; the pipeline lacks these weights") from error
    except (SafetensorError, OSError) as error:
        raise PipelineFormatError(why_unreadable(path, error)) from error
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            wanted = list(expected[name].shape)
            raise PipelineFormatError(f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {wanted}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise PipelineFormatError(f"{path}: tensor {name} holds {count} values that are NaN or infinite")
    module.load_state_dict(state, strict=True)
    return sha256


def _checked_sha256(path: Path, config: PipelineConfig) -> str:
    found, expected = file_sha256(path), config.weights.get(path.name)
    if config.weights and found != expected:
        wanted = f"{expected[:12]}..." if expected else "no such file"
        raise PipelineFormatError(
            f"{path} is damaged, truncated or another file: its SHA-256 is {found[:12]}..., {CONFIG_NAME} says "
            f"{wanted}; delete {path.resolve()} and get it again"  # in the Hub's cache `path` is a link
        )
    return found


def save_pipeline(
    directory: str | os.PathLike[str],
    config: PipelineConfig,
    modules: Mapping[str, nn.Module],
    dtype: torch.dtype | str | None = torch.float16,
) -> None:
    """Write a pipeline directory.

    Args:
        directory: made if missing; files of the same names are replaced, each at once.
        config: becomes ``pipeline.json``, with the SHA-256 of every weights file.
        modules: role (or `ENCODER`) -> module whose parameters and persistent buffers become ``<role>.safetensors``.
        dtype: of the stored floating-point tensors; None halves those that lose nothing by it and keeps the others.

    Raises:
        ValueError: a role that `config` does not have, or weights that are not finite in `dtype`.
        OSError: a file cannot be written.
    """
    directory = Path(directory)
    if unknown := sorted(set(modules) - {role.name for role in PIPELINE_ROLES} - {ENCODER}):
        raise ValueError(f"no such roles: {', '.join(unknown)}; expected {', '.join(r.name for r in PIPELINE_ROLES)}")
    dtype = None if dtype is None else parse_dtype(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for role, module in modules.items():
        state = {name: _stored(tensor, dtype) for name, tensor in module.state_dict().items()}
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{role}: tensor {name} is not finite as {tensor.dtype}; it cannot be saved")
        if state:
            path = weights_path(directory, role)
            with replacing(path) as temporary:
                try:
                    save_file(state, temporary)
                except SafetensorError as error:  # how it reports a full disk
                    raise OSError(" ".join(str(error).split())) from error
                hashes[path.name] = file_sha256(temporary)
    text = json.dumps(config.model_dump(mode="json") | {"weights": hashes}, indent=2) + "\n"
    with replacing(directory / CONFIG_NAME) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        half = tensor.to(dtype or torch.float16)
        tensor = half if dtype is not None or torch.equal(half.to(tensor.dtype), tensor) else tensor
    return tensor.contiguous()


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``"float32"``, ``"float16"`` or ``"bfloat16"`` (or such a `torch.dtype`) as a `torch.dtype`."""
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    found = names.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in names.values():
        raise InputError(f"unknown dtype {dtype!r}; expected one of {', '.join(names)}")
    return found


def state_sha256(component: Any) -> str | None:
    """SHA-256 over names, types, shapes and bytes of a module's state; None for components without tensors."""
    state = component.state_dict() if isinstance(component, nn.Module) else {}
    if not state:
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _compare(message: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise PipelineFormatError(f"{message}: {', '.join(names[:5])}{more}")
