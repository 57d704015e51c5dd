"""Flow checkpoints of TRELLIS: {name, args} JSON beside safetensors, loaded by explicit and strict key maps."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sparse_vae import explaining_trellis, read_trellis
from torch import Tensor

from smdit._config import CrossDiTConfig, StructureDiTConfig
from smdit._cross_dit import CrossDiT
from smdit._flux_weights import rename
from smdit._structure_dit import StructureDiT

# Module paths; the last part of a key (weight, bias, gamma) is the same on both sides.
TRELLIS_CROSS_BLOCK = {
    "adaLN_modulation.1": "modulation.linear",
    "self_attn.to_qkv": "self_attention.qkv",
    "self_attn.q_rms_norm": "self_attention.q_norm",
    "self_attn.k_rms_norm": "self_attention.k_norm",
    "self_attn.to_out": "self_attention.out",
    "norm2": "cross_norm",
    "cross_attn.to_q": "cross_attention.q",
    "cross_attn.to_kv": "cross_attention.kv",
    "cross_attn.q_rms_norm": "cross_attention.q_norm",
    "cross_attn.k_rms_norm": "cross_attention.k_norm",
    "cross_attn.to_out": "cross_attention.out",
    "mlp.mlp.0": "mlp.0",
    "mlp.mlp.2": "mlp.2",
}
TRELLIS_RES_BLOCK = {
    "norm1": "norm1",
    "conv1.conv": "conv1",
    "conv2.conv": "conv2",
    "emb_layers.1": "modulation.linear",
    "skip_connection": "skip",
}
TRELLIS_TRUNK = {
    "t_embedder.mlp.0": "time.expand",
    "t_embedder.mlp.2": "time.contract",
    "adaLN_modulation.1": "shared_modulation.linear",
    "out_layer": "output",
}
# Arguments that do not change what a model computes in the precision chosen here.
_IGNORED = frozenset({"use_fp16", "use_checkpoint"})
_COMMON = frozenset(
    {
        "resolution", "in_channels", "out_channels", "model_channels", "cond_channels", "num_blocks", "num_heads",
        "num_head_channels", "mlp_ratio", "patch_size", "pe_mode", "share_mod", "qk_rms_norm", "qk_rms_norm_cross",
    }
)  # fmt: skip
_SPARSE = frozenset({"num_io_res_blocks", "io_block_channels", "use_skip_connection"})


def load_trellis(path: str | os.PathLike[str]) -> CrossDiT | StructureDiT:
    """Load a flow from TRELLIS's files, such as `ckpts/slat_flow_img_dit_L_64l8p2_fp16`.

    Args:
        path: the .json or .safetensors file, or their common path without suffix; both files are needed.

    Returns:
        `CrossDiT` for a SLatFlowModel, `StructureDiT` for a SparseStructureFlowModel, in float32, in eval mode.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: files that are damaged or pickled, a model or an argument that is not supported, or weights that do
            not fit.
    """
    description, tensors = read_trellis(path)
    loaders: dict[str, Callable[[Mapping, Mapping], CrossDiT | StructureDiT]] = {
        "SLatFlowModel": cross_dit_from_trellis,
        "SparseStructureFlowModel": structure_dit_from_trellis,
    }
    # "Elastic" variants differ in the memory management of their training only.
    name = str(description["name"]).removeprefix("Elastic")
    if name not in loaders:
        raise ValueError(f"{path} is {description['name']!r}, expected one of {', '.join(loaders)}")
    with explaining_trellis(path, name):
        model = loaders[name](description["args"], tensors)
    return model.eval()


def cross_dit_config(args: Mapping[str, Any]) -> CrossDiTConfig:
    """Config of the `CrossDiT` that equals TRELLIS's SLatFlowModel(**args), with TRELLIS's defaults."""
    _check_arguments(args, _COMMON | _SPARSE)
    io_channels = tuple(args.get("io_block_channels") or ())
    patch_size = args.get("patch_size", 2)
    if patch_size != 2 ** len(io_channels):
        raise ValueError(f"patch_size={patch_size} does not match io_block_channels={io_channels}")
    if args["out_channels"] != args["in_channels"]:
        raise ValueError(f"a flow returns what it takes, got {args['in_channels']} and {args['out_channels']} channels")
    return CrossDiTConfig(
        latent_channels=args["in_channels"],
        grid_size=args["resolution"],
        io_channels=io_channels,
        num_io_blocks=args.get("num_io_res_blocks", 2),
        use_skip=args.get("use_skip_connection", True),
        **_common(args),
    )


def structure_dit_config(args: Mapping[str, Any]) -> StructureDiTConfig:
    """Config of the `StructureDiT` that equals TRELLIS's SparseStructureFlowModel(**args), with TRELLIS's defaults."""
    _check_arguments(args, _COMMON)
    return StructureDiTConfig(
        latent_channels=args["in_channels"],
        out_channels=args["out_channels"],
        grid_size=args["resolution"],
        patch_size=args.get("patch_size", 2),
        **_common(args),
    )


def _check_arguments(args: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := sorted(set(args) - known - _IGNORED):
        raise ValueError(f"arguments without a counterpart here: {', '.join(unknown)}")
    if args.get("pe_mode", "ape") != "ape":
        raise ValueError(f"pe_mode={args['pe_mode']!r} does not run in TRELLIS itself; only 'ape' can be converted")


def _common(args: Mapping[str, Any]) -> dict[str, Any]:
    width = args["model_channels"]
    return {
        "condition_channels": args["cond_channels"],
        "width": width,
        "num_heads": args.get("num_heads") or width // args.get("num_head_channels", 64),
        "num_blocks": args["num_blocks"],
        "mlp_ratio": args.get("mlp_ratio", 4),
        "qk_norm": args.get("qk_rms_norm", False),
        "qk_norm_cross": args.get("qk_rms_norm_cross", False),
        "shared_modulation": args.get("share_mod", False),
    }


def cross_dit_from_trellis(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> CrossDiT:
    """TRELLIS's SLatFlowModel with its weights.

    Args:
        args: what its .json calls "args".
        state: the tensors of its .safetensors.
    """
    config = cross_dit_config(args)
    modules = {**TRELLIS_TRUNK, "input_layer": "encoder.input"}
    modules.update(_numbered("blocks", "blocks", config.num_blocks, TRELLIS_CROSS_BLOCK))
    num_io_blocks = len(config.io_channels) * config.num_io_blocks
    modules.update(_numbered("input_blocks", "encoder.blocks", num_io_blocks, TRELLIS_RES_BLOCK))
    modules.update(_numbered("out_blocks", "decoder.blocks", num_io_blocks, TRELLIS_RES_BLOCK))
    model = CrossDiT(config)
    model.load_state_dict({**_zero_biases(model), **rename(state, modules)})
    return model


def structure_dit_from_trellis(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> StructureDiT:
    """TRELLIS's SparseStructureFlowModel with its weights; its stored position table must be the computed one.

    Args:
        args: what its .json calls "args".
        state: the tensors of its .safetensors.
    """
    config = structure_dit_config(args)
    modules = {**TRELLIS_TRUNK, "input_layer": "input"}
    modules.update(_numbered("blocks", "blocks", config.num_blocks, TRELLIS_CROSS_BLOCK))
    model = StructureDiT(config)
    remaining = dict(state)
    stored = remaining.pop("pos_emb", None)
    if stored is not None and not torch.allclose(stored.float(), model.positions, atol=1e-3):
        raise ValueError("pos_emb is not the sin/cos table of this grid: the checkpoint does not fit its config")
    model.load_state_dict({**_zero_biases(model), **rename(remaining, modules)})
    return model


def _numbered(theirs: str, ours: str, count: int, block: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{i}.{a}": f"{ours}.{i}.{b}" for i in range(count) for a, b in block.items()}


def _zero_biases(model: CrossDiT | StructureDiT) -> dict[str, Tensor]:
    """Blocks under a shared modulation have a learned bias here and none in TRELLIS."""
    if not model.config.shared_modulation:
        return {}
    return {
        key: torch.zeros_like(value) for key, value in model.state_dict().items() if key.endswith("modulation.bias")
    }
