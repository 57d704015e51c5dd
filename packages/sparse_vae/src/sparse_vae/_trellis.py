"""Checkpoints of TRELLIS: {name, args} JSON beside safetensors, loaded by explicit and strict key maps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _gs_render_reading import PICKLES, read_json, why_missing, why_unreadable
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparse_vae._config import GaussianConfig, SparseVAEConfig, StructureVAEConfig
from sparse_vae._gaussians import offset_start
from sparse_vae._model import GaussianDecoder, SparseVAEEncoder
from sparse_vae._structure import StructureDecoder, StructureEncoder

TrellisModel = SparseVAEEncoder | GaussianDecoder | StructureEncoder | StructureDecoder

_SPARSE_KEYS = (
    (r"input_layer\.(weight|bias)", r"transformer.input_layer.\1"),
    (r"blocks\.(\d+)\.attn\.to_qkv\.(weight|bias)", r"transformer.blocks.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.to_out\.(weight|bias)", r"transformer.blocks.\1.attention.out.\2"),
    (r"blocks\.(\d+)\.attn\.q_rms_norm\.gamma", r"transformer.blocks.\1.attention.query_norm.gamma"),
    (r"blocks\.(\d+)\.attn\.k_rms_norm\.gamma", r"transformer.blocks.\1.attention.key_norm.gamma"),
    (r"blocks\.(\d+)\.mlp\.mlp\.([02])\.(weight|bias)", r"transformer.blocks.\1.mlp.\2.\3"),
    (r"out_layer\.(weight|bias)", r"transformer.output_layer.\1"),
)
_STRUCTURE_KEYS = (
    (r"input_layer\.(weight|bias)", r"input_layer.\1"),
    (r"blocks\.(\d+)\.(norm1|norm2|conv1|conv2)\.(weight|bias)", r"levels.\1.\2.\3"),
    (r"middle_block\.(\d+)\.(norm1|norm2|conv1|conv2)\.(weight|bias)", r"middle.\1.\2.\3"),
    (r"out_layer\.([02])\.(weight|bias)", r"output_layer.\1.\2"),
)
_ENCODER_KEYS = (*_STRUCTURE_KEYS, (r"blocks\.(\d+)\.conv\.(weight|bias)", r"levels.\1.\2"))
_DECODER_KEYS = (*_STRUCTURE_KEYS, (r"blocks\.(\d+)\.conv\.(weight|bias)", r"levels.\1.conv.\2"))

# Arguments that do not change what a model computes in the precision chosen here.
_IGNORED = {"use_fp16", "use_checkpoint", "pe_mode"}


def load_trellis(path: str | os.PathLike[str], grid_size: int = 64) -> TrellisModel:
    """Load an autoencoder half from TRELLIS's files, such as `ckpts/slat_dec_gs_swin8_B_64l8gs32_fp16`.

    Args:
        path: the .json or .safetensors file, or their common path without suffix; both files are needed.
        grid_size: voxels along each axis of a structure VAE's occupancy, which its description does not state.

    Returns:
        `SparseVAEEncoder`, `GaussianDecoder`, `StructureEncoder` or `StructureDecoder` in float32, in eval mode.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: files that are damaged or pickled, a model or an argument that is not supported, or weights that do
            not fit.
    """
    description, tensors = read_trellis(path)
    with explaining_trellis(path, description["name"]):
        model = from_trellis_config(description, grid_size)
        model.load_state_dict(from_trellis_state_dict(description, tensors))
    return model.eval()


@contextmanager
def explaining_trellis(path: str | os.PathLike[str], name: str) -> Iterator[None]:
    """Turns what goes wrong while a model is built from a checkpoint into a ValueError that says so.

    Args:
        path: of the checkpoint.
        name: of the model's class.
    """
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: the arguments of {name} lack {error}") from error
    except TypeError as error:
        raise ValueError(f"{path}: the arguments of {name} are of the wrong type: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the description beside them: {error}") from error


def trellis_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The .json and the .safetensors file of a TRELLIS checkpoint, given either of them or their common path.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the weights are there as a pickle only.
    """
    stem = Path(path)
    if stem.suffix in (".json", ".safetensors", *PICKLES):
        stem = stem.with_suffix("")
    files = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.safetensors")
    for file in files:
        if file.is_file():
            continue
        if file.suffix == ".safetensors" and (reason := why_missing(file)):
            raise ValueError(reason)
        raise FileNotFoundError(f"{file} is missing: a TRELLIS checkpoint is a .json and a .safetensors file")
    return files


def read_trellis(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of a TRELLIS checkpoint hold, for any of its models.

    Args:
        path: as in `load_trellis`.

    Returns:
        {"name": class name in TRELLIS, "args": its constructor's arguments}, and the tensors by TRELLIS's names.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one of them is damaged, or the weights are pickled.
    """
    config_file, weights_file = trellis_files(path)
    try:
        description = read_json(config_file)
    except ValueError as error:
        raise ValueError(f"{config_file} cannot be read as JSON: {error}") from error
    if not isinstance(description, dict) or not isinstance(description.get("args"), dict) or "name" not in description:
        raise ValueError(f"{config_file} does not describe a model of TRELLIS: expected {{name, args}}")
    try:
        return description, load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(why_unreadable(weights_file, error)) from error


def from_trellis_config(description: Mapping[str, Any], grid_size: int = 64) -> TrellisModel:
    """Model with fresh weights from a TRELLIS description.

    Args:
        description: {"name": class name in TRELLIS, "args": its constructor's arguments}.
        grid_size: voxels along each axis of a structure VAE's occupancy, which the description does not state.

    Raises:
        ValueError: an unknown class, or an argument that has no counterpart here.
    """
    name, args = _class_name(description), dict(description["args"])
    if args.pop("pe_mode", "ape") != "ape":
        raise ValueError(f"{name} with pe_mode={description['args']['pe_mode']!r}: only 'ape' runs in TRELLIS itself")
    for key in _IGNORED:
        args.pop(key, None)
    if name == "SLatEncoder":
        return SparseVAEEncoder(_sparse_config(args))
    if name == "SLatGaussianDecoder":
        gaussians = _gaussian_config(args.pop("representation_config"))
        return GaussianDecoder(_sparse_config(args, gaussians=gaussians))
    if name == "SparseStructureEncoder":
        return StructureEncoder(_structure_config(args, grid_size, "encoder_channels", "decoder_channels"))
    return StructureDecoder(_structure_config(args, grid_size, "decoder_channels", "encoder_channels"))


def from_trellis_state_dict(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of TRELLIS -> state dict of the model that `from_trellis_config` makes, in float32.

    Every key must have a counterpart. The one buffer of TRELLIS, the offsets' Hammersley set, is a constant here: it
    is compared with ours and dropped.

    Args:
        description: {"name", "args"} as in `from_trellis_config`.
        state: names and tensors as TRELLIS stores them.

    Raises:
        ValueError: keys without a counterpart, or other offsets than ours.
    """
    name = _class_name(description)
    state = dict(state)
    if name == "SLatGaussianDecoder":
        _check_offsets(state.pop("offset_perturbation", None), description["args"]["representation_config"])
    patterns = {
        "SLatEncoder": _SPARSE_KEYS,
        "SLatGaussianDecoder": _SPARSE_KEYS,
        "SparseStructureEncoder": _ENCODER_KEYS,
        "SparseStructureDecoder": _DECODER_KEYS,
    }[name]
    renamed, unknown = {}, []
    for key, value in state.items():
        matches = [(re.fullmatch(pattern, key), new) for pattern, new in patterns]
        hits = [match.expand(new) for match, new in matches if match]
        if len(hits) != 1:
            unknown.append(key)
            continue
        renamed[hits[0]] = value.float()
    if unknown:
        raise ValueError(
            f"{len(unknown)} keys of the {name} checkpoint have no counterpart here: {sorted(unknown)[:8]}"
        )
    return renamed


def _class_name(description: Mapping[str, Any]) -> str:
    # "Elastic" variants differ in the memory management of their training only.
    name = str(description.get("name", "")).removeprefix("Elastic")
    known = ("SLatEncoder", "SLatGaussianDecoder", "SparseStructureEncoder", "SparseStructureDecoder")
    if name not in known or "args" not in description:
        raise ValueError(f"cannot load {description.get('name')!r}: expected {{name, args}} with a name of {known}")
    return name


def _sparse_config(args: dict[str, Any], **fields: Any) -> SparseVAEConfig:
    mode, window = args.pop("attn_mode", "swin"), args.pop("window_size", 8)
    if mode not in ("swin", "full"):
        raise ValueError(f"attn_mode {mode!r} is not supported: 'swin' and 'full' are")
    fields |= {"grid_size": args.pop("resolution"), "width": args.pop("model_channels")}
    fields |= {"window_size": window if mode == "swin" else None, "qk_norm": args.pop("qk_rms_norm", False)}
    num_heads, head_channels = args.pop("num_heads", None), args.pop("num_head_channels", 64)
    fields["num_heads"] = num_heads or fields["width"] // head_channels
    for key in ("in_channels", "latent_channels", "num_blocks", "mlp_ratio"):
        if key in args:
            fields[key] = args.pop(key)
    _all_used(args)
    return SparseVAEConfig(**fields)


def _gaussian_config(representation: Mapping[str, Any]) -> GaussianConfig:
    values = dict(representation)
    multipliers = values.pop("lr")
    config = GaussianConfig(
        num_gaussians=values.pop("num_gaussians"),
        offset_range=values.pop("voxel_size"),
        perturb_offset=values.pop("perturb_offset"),
        scale_bias=values.pop("scaling_bias"),
        min_scale=values.pop("3d_filter_kernel_size"),
        scale_activation=values.pop("scaling_activation"),
        opacity_bias=values.pop("opacity_bias"),
        means_multiplier=multipliers["_xyz"],
        color_multiplier=multipliers["_features_dc"],
        scales_multiplier=multipliers["_scaling"],
        rotation_multiplier=multipliers["_rotation"],
        opacity_multiplier=multipliers["_opacity"],
        filter_2d=values.pop("2d_filter_kernel_size"),
    )
    _all_used(values)
    return config


def _structure_config(args: dict[str, Any], grid_size: int, own: str, other: str) -> StructureVAEConfig:
    if (channels := args.pop("in_channels", 1)) != 1 or (channels := args.pop("out_channels", 1)) != 1:
        raise ValueError(f"the structure VAE has {channels} occupancy channels: only 1 is supported")
    fields: dict[str, Any] = {own: tuple(args["channels"]), other: tuple(reversed(args.pop("channels")))}
    fields["grid_size"] = grid_size
    fields["latent_channels"] = args.pop("latent_channels")
    fields["num_res_blocks"] = args.pop("num_res_blocks")
    fields["num_middle_blocks"] = args.pop("num_res_blocks_middle", 2)
    fields["norm"] = args.pop("norm_type", "layer")
    _all_used(args)
    return StructureVAEConfig(**fields)


def _all_used(args: Mapping[str, Any]) -> None:
    if args:
        raise ValueError(f"arguments without a counterpart here: {dict(args)}")


def _check_offsets(stored: Tensor | None, representation: Mapping[str, Any]) -> None:
    # TRELLIS stores the set even where perturb_offset is off and nothing reads it.
    ours = offset_start(_gaussian_config({**representation, "perturb_offset": True}))
    if stored is None or stored.shape != ours.shape or not torch.allclose(stored.float(), ours, atol=1e-2, rtol=1e-2):
        raise ValueError("offset_perturbation is missing or is not the Hammersley set of representation_config")
