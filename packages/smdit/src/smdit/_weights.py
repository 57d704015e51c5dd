"""Weights of other implementations: which of their tensors becomes which of ours.

Every map is explicit and strict: a tensor that a map does not know, or one that the model misses, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smdit._config import CrossDiTConfig, StructureDiTConfig
from smdit._cross_dit import CrossDiT
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
FLUX_SINGLE_BLOCK = {
    "norm.linear": "modulation.linear",
    "attn.norm_q": "q_norm",
    "attn.norm_k": "k_norm",
    "proj_out": "contract",
}
FLUX_DOUBLE_BLOCK = {
    "norm1.linear": "voxel.modulation.linear",
    "norm1_context.linear": "image.modulation.linear",
    "attn.norm_q": "voxel.q_norm",
    "attn.norm_k": "voxel.k_norm",
    "attn.norm_added_q": "image.q_norm",
    "attn.norm_added_k": "image.k_norm",
    "attn.to_out.0": "voxel.out",
    "attn.to_add_out": "image.out",
    "ff.net.0.proj": "voxel.mlp.0",
    "ff.net.2": "voxel.mlp.2",
    "ff_context.net.0.proj": "image.mlp.0",
    "ff_context.net.2": "image.mlp.2",
}
FLUX_DOUBLE_FUSED = {
    "voxel.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
FLUX_SINGLE_FUSED = {"expand": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def rename(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """`state` with the module path of every tensor replaced; a path without an entry is an error."""
    renamed = {}
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        if module not in modules:
            raise ValueError(f"no counterpart for {key!r}: known modules are {', '.join(sorted(modules))}")
        renamed[f"{modules[module]}.{parameter}"] = tensor
    return renamed


def from_diffusers_double_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of diffusers' FluxTransformerBlock as those of a `DoubleStreamBlock`.

    What FLUX calls the image stream (latents to denoise) is the voxel stream here; its text stream (the condition,
    first in the joint sequence) is the image stream here.
    """
    return _from_diffusers(state, FLUX_DOUBLE_BLOCK, FLUX_DOUBLE_FUSED)


def from_diffusers_single_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of diffusers' FluxSingleTransformerBlock as those of a `SingleStreamBlock`."""
    return _from_diffusers(state, FLUX_SINGLE_BLOCK, FLUX_SINGLE_FUSED)


def _from_diffusers(
    state: Mapping[str, Tensor], modules: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]
) -> dict[str, Tensor]:
    remaining = dict(state)
    joined = {}
    for target, sources in fused.items():
        for parameter in ("weight", "bias"):
            joined[f"{target}.{parameter}"] = torch.cat([remaining.pop(f"{source}.{parameter}") for source in sources])
    return {**rename(remaining, modules), **joined}


FLUX_BFL_SINGLE_BLOCK = {
    "modulation.lin": "modulation.linear",
    "linear1": "expand",
    "linear2": "contract",
    "norm.query_norm": "q_norm",
    "norm.key_norm": "k_norm",
}
FLUX_BFL_DOUBLE_BLOCK = {
    f"{theirs}_{part}": f"{ours}.{target}"
    for theirs, ours in (("img", "voxel"), ("txt", "image"))
    for part, target in {
        "mod.lin": "modulation.linear",
        "attn.qkv": "qkv",
        "attn.norm.query_norm": "q_norm",
        "attn.norm.key_norm": "k_norm",
        "attn.proj": "out",
        "mlp.0": "mlp.0",
        "mlp.2": "mlp.2",
    }.items()
}


def from_bfl_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one block in the layout of black-forest-labs/flux.

    Double blocks hold "img_attn.qkv.weight" and so on, single ones "linear1.weight"; RMS norms call the weight `scale`.
    """
    modules = FLUX_BFL_SINGLE_BLOCK if "linear1.weight" in state else FLUX_BFL_DOUBLE_BLOCK
    return rename({re.sub(r"_norm\.scale$", "_norm.weight", key): tensor for key, tensor in state.items()}, modules)


def cross_dit_config_from_trellis(args: Mapping[str, Any]) -> CrossDiTConfig:
    """Config of the `CrossDiT` that equals TRELLIS's SLatFlowModel(**args), with TRELLIS's defaults."""
    io_channels = tuple(args.get("io_block_channels") or ())
    patch_size = args.get("patch_size", 2)
    if patch_size != 2 ** len(io_channels):
        raise ValueError(f"patch_size={patch_size} does not match io_block_channels={io_channels}")
    if args.get("out_channels", args["in_channels"]) != args["in_channels"]:
        raise ValueError(f"a flow returns what it takes, got {args['in_channels']} and {args['out_channels']} channels")
    return CrossDiTConfig(
        latent_channels=args["in_channels"],
        grid_size=args["resolution"],
        io_channels=io_channels,
        num_io_blocks=args.get("num_io_res_blocks", 2),
        use_skip=args.get("use_skip_connection", True),
        **_common(args),
    )


def structure_dit_config_from_trellis(args: Mapping[str, Any]) -> StructureDiTConfig:
    """Config of the `StructureDiT` that equals TRELLIS's SparseStructureFlowModel(**args), with TRELLIS's defaults."""
    return StructureDiTConfig(
        latent_channels=args["in_channels"],
        out_channels=args["out_channels"],
        grid_size=args["resolution"],
        patch_size=args.get("patch_size", 2),
        **_common(args),
    )


def _common(args: Mapping[str, Any]) -> dict[str, Any]:
    if args.get("pe_mode", "ape") != "ape":
        raise ValueError(f"pe_mode={args['pe_mode']!r} does not run in TRELLIS itself; only 'ape' can be converted")
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
    config = cross_dit_config_from_trellis(args)
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
    config = structure_dit_config_from_trellis(args)
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
