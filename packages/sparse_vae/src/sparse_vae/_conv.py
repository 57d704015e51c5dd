"""Convolution and pooling on sparse tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_vae import _spconv
from sparse_vae._kernel_map import KernelMap, convolve
from sparse_vae._tensor import SparseTensor
from sparse_vae._topology import Topology
from sparse_vae._triton_probe import triton_failure

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_preferred: ContextVar[str | None] = ContextVar("convolution_backend", default=None)


class _SparseConv(nn.Module):
    """Weight and bias common to all sparse convolutions.

    The weight is [out, k_x, k_y, k_z, in], the layout of spconv 2 and of the TRELLIS checkpoints; the operation is a
    cross-correlation as in `torch.nn.Conv3d`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.weight = nn.Parameter(torch.empty(out_channels, *[kernel_size] * 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of `torch.nn.Conv3d`."""
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size**3)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, bias={self.bias is not None}"

    def _operands(self, x: SparseTensor) -> tuple[Tensor, Tensor]:
        """Features and weight in the dtype of the product."""
        if x.num_channels != self.in_channels:
            raise ValueError(f"the input has {x.num_channels} channels, expected {self.in_channels}")
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            return x.features.to(dtype), self.weight.to(dtype)
        return x.features, self.weight

    def _with_bias(self, features: Tensor) -> Tensor:
        return features if self.bias is None else features + self.bias.to(features.dtype)


class SparseConv3d(_SparseConv):
    """Submanifold convolution: the output lives on the input's voxels, absent neighbours count as zeros.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        bias: whether to add one.
        backend: "torch", "triton", "spconv" or "spconv-triton"; None takes that of the enclosing `convolution_backend`
            context, else "triton" on CUDA in half or single precision where Triton works, else "torch". All backends
            share parameters and state dict. spconv knows no bfloat16.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True, backend: str | None = None
    ):
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        super().__init__(in_channels, out_channels, kernel_size, bias)
        if backend is not None:
            _find(backend)
        self.backend = backend

    def forward(self, x: SparseTensor) -> SparseTensor:
        """[N, in_channels] -> [N, out_channels] on the same topology."""
        features, weight = self._operands(x)
        backend = _resolve(self.backend, features, weight)
        return x.replace(self._with_bias(backend.run(features, weight, x.topology)))


class SparseDownConv3d(_SparseConv):
    """Strided convolution, kernel 2 and stride 2: a coarse voxel sees the active ones of its eight octants."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 2, bias)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """[N, in_channels] -> [M, out_channels] on `x.topology.coarser().topology`."""
        features, weight = self._operands(x)
        out = _strided(features, weight, _octant_map(x.topology))
        return SparseTensor(self._with_bias(out), x.topology.coarser().topology)


class SparseUpConv3d(_SparseConv):
    """Transposed counterpart of `SparseDownConv3d`: a fine voxel receives its parent through its octant's matrix."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 2, bias)

    def forward(self, x: SparseTensor, topology: Topology) -> SparseTensor:
        """[M, in_channels] -> [N, out_channels] on the fine `topology`, whose coarse level is `x.topology`."""
        _check_coarse(x, topology)
        features, weight = self._operands(x)
        out = _strided(features, weight, _octant_map(topology).transposed)
        return SparseTensor(self._with_bias(out), topology)


def downsample(x: SparseTensor, mode: Literal["mean", "sum", "max", "trellis"] = "mean") -> SparseTensor:
    """Pool features over 2x2x2 regions.

    Args:
        x: fine tensor [N, C].
        mode: "mean", "sum" or "max" over the active voxels of a region; "trellis" is sum / (count + 1), what TRELLIS's
            `SparseDownsample` computes (modules/sparse/spatial.py) and its weights were trained with.

    Returns:
        [M, C] on `x.topology.coarser().topology`, in the dtype of `x`.
    """
    topology = x.topology
    coarse = topology.coarser().topology
    if mode == "max":
        empty = x.features.new_full((1, x.num_channels), -torch.inf)
        return SparseTensor(torch.cat([x.features, empty])[topology.children()].amax(dim=0), coarse)
    total = _PoolSum.apply(x.features, topology)
    if mode == "sum":
        return SparseTensor(total, coarse)
    if mode not in ("mean", "trellis"):
        raise ValueError(f"unknown mode {mode!r}: choose 'mean', 'sum', 'max' or 'trellis'")
    counts = topology.memo("child_counts", lambda: (topology.children() < len(topology)).sum(dim=0)[:, None])
    return SparseTensor(total / (counts + (mode == "trellis")).to(total.dtype), coarse)


def upsample(x: SparseTensor, topology: Topology) -> SparseTensor:
    """Copy the features of every coarse voxel to its active fine voxels.

    Args:
        x: coarse tensor [M, C].
        topology: the fine topology; `topology.coarser().topology` must be `x.topology` itself.

    Returns:
        [N, C] on `topology`.
    """
    _check_coarse(x, topology)
    return SparseTensor(_Unpool.apply(x.features, topology), topology)


class _PoolSum(torch.autograd.Function):
    """Sum over the octants of a region; gathers in both directions, so results are reproducible on every device."""

    @staticmethod
    def forward(ctx, x, topology):
        ctx.topology = topology
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[topology.children()].sum(dim=0)

    @staticmethod
    def backward(ctx, grad):
        return _Unpool.apply(grad, ctx.topology), None


class _Unpool(torch.autograd.Function):
    """Transpose of `_PoolSum`."""

    @staticmethod
    def forward(ctx, x, topology):
        ctx.topology = topology
        return x.index_select(0, topology.coarser().parent)

    @staticmethod
    def backward(ctx, grad):
        return _PoolSum.apply(grad, ctx.topology), None


def _check_coarse(x: SparseTensor, topology: Topology) -> None:
    if topology.coarser().topology is not x.topology:
        raise ValueError(
            "the tensor does not lie on the coarse level of that topology: pass the fine topology it was pooled from"
        )


def _neighbour_map(topology: Topology, kernel_size: int) -> KernelMap:
    def make() -> KernelMap:
        sources = topology.neighbours(kernel_size)
        # The neighbour relation is symmetric: what lies at +d of i has i at -d.
        return KernelMap(sources, sources.flip(0), identity=len(sources) // 2)

    return topology.memo(("neighbour_map", kernel_size), make)


def _octant_map(topology: Topology) -> KernelMap:
    def make() -> KernelMap:
        coarse, parent, octant = topology.coarser()
        octants = torch.arange(8, device=topology.device)
        targets = torch.where(octant == octants[:, None], parent, len(coarse))
        return KernelMap(topology.children(), targets)

    return topology.memo("octant_map", make)


@dataclass(frozen=True)
class ConvolutionBackend:
    """An implementation of submanifold convolution.

    Attributes:
        name: what `SparseConv3d(backend=...)` calls it.
        run: (features [N, in], weight [out, k, k, k, in], topology) -> [N, out].
        is_available: device -> None, or the reason why it cannot be used.
        dtypes: what features and weight may be, both the same; empty for anything.
    """

    name: str
    run: Callable[[Tensor, Tensor, Topology], Tensor]
    is_available: Callable[[torch.device], str | None]
    dtypes: tuple[torch.dtype, ...] = ()


@contextmanager
def convolution_backend(name: str | None) -> Iterator[None]:
    """Prefer a backend for every `SparseConv3d` inside the block that names none itself.

    Strided convolutions heed "torch" and "triton"; the other backends leave them to "torch".
    """
    if name is not None:
        _find(name)
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def convolution_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """All backends, and for each None if it can be used on the device or the reason why not."""
    return {backend.name: backend.is_available(torch.device(device)) for backend in _BACKENDS}


def _resolve(name: str | None, features: Tensor, weight: Tensor) -> ConvolutionBackend:
    backend = _find(name or _preferred.get() or _default(features))
    reason = backend.is_available(features.device)
    if reason is not None:
        raise RuntimeError(f"convolution backend {backend.name!r} is not available: {reason}")
    if backend.dtypes and (features.dtype not in backend.dtypes or weight.dtype != features.dtype):
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        raise ValueError(
            f"convolution backend {backend.name!r} takes features and weight of one dtype out of {known}; got "
            f"{features.dtype} and {weight.dtype}"
        )
    return backend


def _default(features: Tensor) -> str:
    return "triton" if features.dtype in _TRITON_DTYPES and _triton_reason(features.device) is None else "torch"


def _find(name: str) -> ConvolutionBackend:
    for backend in _BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"no convolution backend {name!r}: choose one of {', '.join(b.name for b in _BACKENDS)}")


def _strided(features: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
    name = _preferred.get() or _default(features)
    if name == "triton":
        _resolve(name, features, weight)  # explains why it cannot be used
    return convolve(features, weight.flatten(1, 3), kernel_map, triton=name == "triton")


def _torch(features: Tensor, weight: Tensor, topology: Topology) -> Tensor:
    return convolve(features, weight.flatten(1, 3), _neighbour_map(topology, weight.shape[1]))


def _triton(features: Tensor, weight: Tensor, topology: Topology) -> Tensor:
    return convolve(features, weight.flatten(1, 3), _neighbour_map(topology, weight.shape[1]), triton=True)


def _triton_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a GPU, got {device.type}"
    return triton_failure(device)


_BACKENDS = (
    ConvolutionBackend("torch", _torch, lambda device: None),
    ConvolutionBackend("triton", _triton, _triton_reason, _TRITON_DTYPES),
    ConvolutionBackend("spconv", _spconv.run_spconv, _spconv.spconv_reason, (torch.float16, torch.float32)),
    ConvolutionBackend("spconv-triton", _spconv.run_triton, _spconv.triton_reason),
)
