"""Convolution over a kernel map; in plain PyTorch it runs everywhere and is the oracle of the other backends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_vae import _cpu_conv
from sparse_vae._cpu_conv import RowPairs
from sparse_vae._tile_plan import PairPlan, TilePlan

GATHER_BUDGET = 2**29
"""Bytes that the gathered operand of the CUDA path may take; longer inputs go through in pieces."""


@dataclass(frozen=True, eq=False)
class KernelMap:
    """Which input row meets which output row at every kernel offset. An output row sees each offset at most once.

    Attributes:
        sources: int64 [K, M], input row that offset k contributes to output row i, or `num_inputs` for none.
        targets: int64 [K, N], the transpose: output row to which offset k carries input row j, or M for none.
        identity: offset that carries every row to itself, if there is one.
    """

    sources: Int[Tensor, "K M"]
    targets: Int[Tensor, "K N"]
    identity: int | None = None

    @property
    def num_outputs(self) -> int:
        return self.sources.shape[1]

    @property
    def num_inputs(self) -> int:
        return self.targets.shape[1]

    @cached_property
    def transposed(self) -> KernelMap:
        """The map that carries outputs back to inputs."""
        return KernelMap(self.targets, self.sources, self.identity)

    @cached_property
    @torch.inference_mode(False)
    def tile_plan(self) -> TilePlan:
        """How a GPU walks through the map when it computes outputs."""
        return TilePlan.build(self.sources, self.num_inputs)

    @cached_property
    @torch.inference_mode(False)
    def pair_plan(self) -> PairPlan:
        """How a GPU walks through the map when it computes the gradient of the weight."""
        return PairPlan.build(self.sources, self.num_inputs)

    @cached_property
    @torch.inference_mode(False)
    def pairs(self) -> RowPairs:
        """How a CPU walks through the map."""
        return RowPairs.build(self.sources, self.num_inputs, self.identity)


def convolve(
    x: Float[Tensor, "N C"], weight: Float[Tensor, "D K C"], kernel_map: KernelMap, triton: bool = False
) -> Float[Tensor, "M D"]:
    """Sum over offsets: `out[i] = sum_k weight[:, k] @ x[sources[k, i]]`. Differentiable in `x` and `weight`.

    Saves nothing for the backward besides its arguments, and adds up in a fixed order in both directions. With `triton`
    the kernels of `_triton_conv` do the work, in the forward and in the backward, instead of plain PyTorch.
    """
    return _Convolve.apply(x, weight, kernel_map, triton)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, kernel_map, triton):
        ctx.save_for_backward(x, weight)
        ctx.kernel_map, ctx.triton = kernel_map, triton
        return _forward(x, weight, kernel_map, triton)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        # Autocast does not reach into a custom backward, so the products run in the dtype of their operands.
        grad = grad.to(x.dtype).contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = _forward(grad, weight.permute(2, 1, 0), ctx.kernel_map.transposed, ctx.triton)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(x, grad, ctx.kernel_map, ctx.triton).to(weight.dtype)
        return grad_x, grad_weight, None, None


# A CPU is bound by arithmetic and multiplies only the pairs that exist; a GPU is bound by memory traffic and launches
# and makes one large product, absent neighbours being a row of zeros. Triton spares it the gathered copy.


def _forward(x: Tensor, weight: Tensor, kernel_map: KernelMap, triton: bool = False) -> Tensor:
    if triton:
        from sparse_vae import _triton_conv

        return _triton_conv.forward(x, weight, kernel_map)
    if x.device.type != "cpu":
        return _gathered_forward(x, weight, kernel_map)
    return _cpu_conv.forward(x, weight, kernel_map.pairs)


def _weight_gradient(x: Tensor, grad: Tensor, kernel_map: KernelMap, triton: bool = False) -> Tensor:
    if triton:
        from sparse_vae import _triton_conv

        return _triton_conv.weight_gradient(x, grad, kernel_map)
    if x.device.type != "cpu":
        return _gathered_weight_gradient(x, grad, kernel_map)
    return _cpu_conv.weight_gradient(x, grad, kernel_map.pairs)


def _gathered_forward(x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
    matrix = weight.flatten(1).T
    pieces = [gathered @ matrix for gathered in _gather(x, kernel_map)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _gathered_weight_gradient(x: Tensor, grad: Tensor, kernel_map: KernelMap) -> Tensor:
    # Pieces add up in float32: their number, and so the rounding, must not matter.
    total = x.new_zeros(grad.shape[1], kernel_map.sources.shape[0] * x.shape[1], dtype=torch.float32)
    row = 0
    for gathered in _gather(x, kernel_map):
        total += grad[row : row + len(gathered)].T @ gathered
        row += len(gathered)
    return total.unflatten(1, (-1, x.shape[1]))


def _gather(x: Tensor, kernel_map: KernelMap):
    """Rows of all offsets side by side [m, K C], in pieces of the output rows that fit the memory budget."""
    num_offsets, channels = kernel_map.sources.shape[0], x.shape[1]
    padded = torch.cat([x, x.new_zeros(1, channels)])
    size = max(1024, GATHER_BUDGET // (num_offsets * channels * x.element_size()))
    for sources in kernel_map.sources.split(size, dim=1):
        yield padded.index_select(0, sources.T.reshape(-1)).view(sources.shape[1], num_offsets * channels)
