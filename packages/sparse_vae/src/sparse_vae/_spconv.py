"""Submanifold convolution by spconv and its Triton twin, both optional."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparse_vae._topology import Topology


def run_spconv(features: Tensor, weight: Tensor, topology: Topology) -> Tensor:
    """[N, in] -> [N, out] by `spconv.pytorch.SubMConv3d`."""
    return _run("spconv.pytorch", features, weight, topology)


def run_triton(features: Tensor, weight: Tensor, topology: Topology) -> Tensor:
    """[N, in] -> [N, out] by `spconv_triton.pytorch.SubMConv3d`."""
    return _run("spconv_triton.pytorch", features, weight, topology)


def spconv_reason(device: torch.device) -> str | None:
    """Why spconv cannot be used on a device, None if it can."""
    if device.type != "cuda":
        return f"it is used on CUDA only, got {device.type} (its CPU path returns wrong rows with several threads)"
    return _import_error("spconv.pytorch", "sparse-vae[spconv]")


def triton_reason(device: torch.device) -> str | None:
    """Why spconv-triton cannot be used on a device, None if it can."""
    if device.type != "cuda":
        return f"it needs a GPU, got {device.type}"
    return _import_error("spconv_triton.pytorch", "sparse-vae[triton]")


@cache
def _import_error(module: str, extra: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a wheel for another CUDA or torch fails in many ways; each is a reason, not a fault
        return f"{module} cannot be imported ({type(error).__name__}: {error}); install {extra}"
    return None


def _run(module: str, features: Tensor, weight: Tensor, topology: Topology) -> Tensor:
    library = importlib.import_module(module)
    out_channels, kernel_size, *_, in_channels = weight.shape
    # Row pairs belong to the coordinates, so they live as long as the topology and are found once.
    pairs: dict = topology.memo((module, "pairs"), dict)
    x = library.SparseConvTensor(features, topology.coords, [topology.grid_size] * 3, topology.batch_size)
    x.indice_dict = pairs
    layer = _layer(library, in_channels, out_channels, kernel_size)
    return functional_call(layer, {"weight": weight.contiguous()}, (x,)).features


@cache
def _layer(library: ModuleType, in_channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    """A layer that only carries the settings; its own weight is never used."""
    return library.SubMConv3d(in_channels, out_channels, kernel_size, bias=False, indice_key=f"subm{kernel_size}")
