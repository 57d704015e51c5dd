"""Weights of FLUX's blocks, as diffusers and black-forest-labs store them, by explicit and strict key maps."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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


def from_bfl_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of one block in the layout of black-forest-labs/flux.

    Double blocks hold "img_attn.qkv.weight" and so on, single ones "linear1.weight"; RMS norms call the weight `scale`.
    """
    modules = FLUX_BFL_SINGLE_BLOCK if "linear1.weight" in state else FLUX_BFL_DOUBLE_BLOCK
    return rename({re.sub(r"_norm\.scale$", "_norm.weight", key): tensor for key, tensor in state.items()}, modules)
