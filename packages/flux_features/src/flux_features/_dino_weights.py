"""DINOv2 with registers: its weights in the layouts of transformers and timm, and the network of either library.

The network is the same; transformers keeps the class token and its position apart, and queries, keys and values:

| transformers (``model_type`` ``dinov2_with_registers``)                | timm (``vit_*_reg4_dinov2``)     |
|------------------------------------------------------------------------|----------------------------------|
| ``embeddings.cls_token + embeddings.position_embeddings[:, :1]``       | ``cls_token``                    |
| ``embeddings.position_embeddings[:, 1:]``                              | ``pos_embed``                    |
| ``embeddings.register_tokens``                                         | ``reg_token``                    |
| ``embeddings.patch_embeddings.projection.*``                           | ``patch_embed.proj.*``           |
| ``encoder.layer.i.norm1.*``, ``norm2.*``                               | ``blocks.i.norm1.*``, ``norm2.*``|
| ``encoder.layer.i.attention.attention.query.*``, ``key``, ``value``    | ``blocks.i.attn.qkv.*``, stacked |
| ``encoder.layer.i.attention.output.dense.*``                           | ``blocks.i.attn.proj.*``         |
| ``encoder.layer.i.layer_scale1.lambda1``, ``layer_scale2``             | ``blocks.i.ls1.gamma``, ``ls2``  |
| ``encoder.layer.i.mlp.fc1.*``, ``fc2`` (giant: ``weights_in``, ``_out``)| ``blocks.i.mlp.fc1.*``, ``fc2`` |
| ``layernorm.*``                                                        | ``norm.*``                       |
| ``embeddings.mask_token``, of the training alone                       |                                  |
"""

from __future__ import annotations

import re
from importlib import import_module
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flux_features._weights import read_json, read_tensors

FILES = ["config.json", "model.safetensors"]
Library = Literal["transformers", "timm"]

_STEM = ("cls_token", "pos_embed", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias")
_BLOCK = (
    *(f"{layer}.{part}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2") for part in ("weight", "bias")),
    *(f"mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")),
    "ls1.gamma",
    "ls2.gamma",
)
_NORM = ("norm.weight", "norm.bias")
_MASK = "embeddings.mask_token"
_RENAMED = (  # timm's part of a name, transformers'
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
    (r"^reg_token", "embeddings.register_tokens"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
)
_GATED = ((r"\.mlp\.fc1\.", ".mlp.weights_in."), (r"\.mlp\.fc2\.", ".mlp.weights_out."))


class Weights(NamedTuple):
    """Tensors by timm's names, and the number of attention heads, which no tensor tells."""

    tensors: dict[str, Tensor]
    num_heads: int

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.tensors["patch_embed.proj.weight"].shape[-1]

    @property
    def num_registers(self) -> int:
        """Register tokens between the class token and the patches."""
        return self.tensors["reg_token"].shape[1]

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.tensors["cls_token"].shape[-1]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blocks."))

    @property
    def image_size(self) -> int:
        """Side in pixels of the picture that the position embedding was made for."""
        return self.patch_size * isqrt(self.tensors["pos_embed"].shape[1])

    @property
    def is_gated(self) -> bool:
        """Whether the blocks have SwiGLU (giant): the first layer is as wide as both halves of the gate."""
        return self.tensors["blocks.0.mlp.fc1.weight"].shape[0] == 2 * self.tensors["blocks.0.mlp.fc2.weight"].shape[1]


def is_dino(folder: Path) -> bool:
    """Whether a directory's ``config.json`` is DINOv2's, of either library."""
    config = folder / FILES[0]
    return config.is_file() and _layout(read_json(config)) is not None


def layout_of(stated: dict[str, Any], where: str) -> Library:
    """The library whose layout a ``config.json`` announces.

    Raises:
        ValueError: it is of another network.
    """
    if (layout := _layout(stated)) is None:
        raise ValueError(
            f"{where}: is a {stated.get('model_type') or stated.get('architecture')!r}, expected "
            "'dinov2_with_registers' (transformers) or 'vit_large_patch14_reg4_dinov2' (timm)"
        )
    return layout


def _layout(stated: dict[str, Any]) -> Library | None:
    if stated.get("model_type") == "dinov2_with_registers":
        return "transformers"
    return "timm" if re.fullmatch(r"vit_\w+_reg\d+_dinov2", str(stated.get("architecture"))) else None


def missing_library(library: Library) -> str:
    """What to say where a library is not installed."""
    extra = {"transformers": "dino", "timm": "timm"}[library]
    return f"DinoFeatures with library={library!r} needs {library}: pip install 'flux-features[{extra}]'"


def read_weights(files: list[Path], where: str) -> Weights:
    """Weights of either layout, told apart by ``config.json``.

    Args:
        files: config and tensors, as :data:`FILES` names them.
        where: directory or Hub id, for errors.

    Raises:
        ValueError: the weights are of another network, incomplete, or a file cannot be read.
    """
    stated, found = read_json(files[0]), read_tensors(files[1:])
    of_timm = layout_of(stated, where) == "timm"
    heads = (stated.get("model_args") or {}).get("num_heads") if of_timm else stated.get("num_attention_heads")
    blocks = [int(match[1]) for name in found if (match := re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", name))]
    gated = any(".weights_in." in name for name in found)
    names = [*_STEM, *_NORM, *(f"blocks.{i}.{part}" for i in range(max(blocks, default=0) + 1) for part in _BLOCK)]
    sources = {name: [name] if of_timm else _transformers_names(name, gated) for name in names}
    wanted = {source for parts in sources.values() for source in parts}
    for what, wrong in (("missing", wanted - found.keys()), ("unexpected", found.keys() - wanted - {_MASK})):
        if wrong:
            raise ValueError(f"{where}: {len(wrong)} tensors are {what}, first {min(wrong)}")
    parts = {name: [found[source].float() for source in sources[name]] for name in names}
    tensors = {name: value[0] if of_timm else _join(name, value) for name, value in parts.items()}
    width, cells = tensors["cls_token"].shape[-1], tensors["pos_embed"].shape[1]
    if isqrt(cells) ** 2 != cells:
        raise ValueError(f"{where}: {cells} position embeddings, expected those of a square picture")
    heads = heads or width // 64  # what timm's files do not state, because all of DINOv2 have heads of 64 channels
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{where}: {heads!r} attention heads do not divide {width} channels")
    return Weights(tensors, heads)


def build_network(weights: Weights, library: Library, where: str) -> nn.Module:
    """The network of a library with these weights, in float32 and eval mode, without its last norm.

    Raises:
        ImportError: the library is not installed.
        ValueError: tensors do not fit together; the library says which.
    """
    try:
        package: Any = import_module(library)
    except ImportError as error:
        raise ImportError(missing_library(library)) from error
    build = _timm_network if library == "timm" else _transformers_network
    try:
        with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
            network = build(package, weights)
    except RuntimeError as error:
        raise ValueError(f"{where}: not DINOv2's weights: {' '.join(str(error).split())}") from error
    return network.eval()


def _timm_network(timm: Any, weights: Weights) -> nn.Module:
    hidden = weights.tensors["blocks.0.mlp.fc1.weight"].shape[0]
    network = timm.create_model(
        f"vit_{'giant' if weights.is_gated else 'large'}_patch14_reg4_dinov2",
        pretrained=False,
        num_classes=0,
        dynamic_img_size=True,
        img_size=weights.image_size,
        patch_size=weights.patch_size,
        embed_dim=weights.width,
        depth=weights.depth,
        num_heads=weights.num_heads,
        mlp_ratio=hidden / weights.width,
        reg_tokens=weights.num_registers,
    )
    network.load_state_dict(weights.tensors)
    network.norm = nn.Identity()
    return network


def _transformers_network(transformers: Any, weights: Weights) -> nn.Module:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=weights.width,
        num_hidden_layers=weights.depth,
        num_attention_heads=weights.num_heads,
        mlp_ratio=4 if weights.is_gated else weights.tensors["blocks.0.mlp.fc1.weight"].shape[0] // weights.width,
        image_size=weights.image_size,
        patch_size=weights.patch_size,
        num_register_tokens=weights.num_registers,
        use_swiglu_ffn=weights.is_gated,
    )
    # Its modules have other names than its files, and others by version: from_pretrained knows which.
    network = transformers.Dinov2WithRegistersModel.from_pretrained(
        None, config=config, state_dict=transformers_layout(weights)
    )
    network.layernorm = nn.Identity()
    return network


def transformers_layout(weights: Weights) -> dict[str, Tensor]:
    """The tensors as transformers' files have them; the position of the class token, added to it, is zero."""
    result: dict[str, Tensor] = {_MASK: torch.zeros(1, weights.width)}
    for name, value in weights.tensors.items():
        if name == "cls_token":
            result["embeddings.cls_token"] = value
        elif name == "pos_embed":
            result["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(value[:, :1]), value], 1)
        else:
            names = _transformers_names(name, weights.is_gated)
            result |= {n: part.contiguous() for n, part in zip(names, value.chunk(len(names)), strict=True)}
    return result


def _transformers_names(name: str, gated: bool) -> list[str]:
    """Tensors of transformers' files that make up timm's ``name``."""
    if name in ("cls_token", "pos_embed"):
        positions = "embeddings.position_embeddings"
        return ["embeddings.cls_token", positions] if name == "cls_token" else [positions]
    for pattern, replacement in (*_RENAMED, *(_GATED if gated else ())):
        name = re.sub(pattern, replacement, name)
    if ".attn.qkv." in name:
        return [name.replace(".attn.qkv.", f".attention.attention.{part}.") for part in ("query", "key", "value")]
    return [name]


def _join(name: str, parts: list[Tensor]) -> Tensor:
    """Timm's tensor ``name`` from those that :func:`_transformers_names` names."""
    if name == "cls_token":
        return parts[0] + parts[1][:, :1]
    return parts[0][:, 1:] if name == "pos_embed" else torch.cat(parts)
