"""The CPU backend: projection in PyTorch, binning and blending by numba (extra `cpu`), gradients by hand."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from gs_render import _project
from gs_render._gaussians import Gaussians
from gs_render._project import Projected

_logger = logging.getLogger(__name__)

_ROWS_PER_THREAD = 10_000
_CHUNKS_PER_THREAD = 8  # tiles differ much in cost: small shares keep every thread busy to the end


def is_available() -> str | None:
    """None if numba is installed, else what is missing."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'gs-render[cpu]'"
    return None


def project(
    gaussians: Gaussians, pose: Tensor, intrinsics: Tensor, size: tuple[int, int], filter_2d: float, antialias: bool
) -> Projected:
    """As `gs_render._project.project`, compiled; float32 on the host. Other tensors take the plain way."""
    if gaussians.dtype != torch.float32 or gaussians.device.type != "cpu" or intrinsics.requires_grad:
        return _project.project(gaussians, pose, intrinsics, size, filter_2d, antialias)
    options = (*size, np.float32(filter_2d), antialias)
    fields = (gaussians.means, gaussians.scales, gaussians.quaternions, gaussians.opacities)
    centres, conics, opacities, depths, reach, visible = _Project.apply(*fields, pose, intrinsics, options)
    return Projected(centres, conics, opacities, _project.features(gaussians, pose, depths), reach, visible)


class _Project(torch.autograd.Function):
    """Projection with a hand-written gradient (see `_cpu_projection`)."""

    @staticmethod
    def forward(ctx, means, scales, quaternions, opacities, pose, intrinsics, options):  # type: ignore[override]
        count = len(means)
        inputs = tuple(_numpy(value) for value in (means, scales, quaternions, opacities))
        camera = (_numpy(pose), _numpy(intrinsics))
        shapes = ((count, 2), (count, 3), (count,), (count,), (count, 2))
        outputs = (*(np.empty(shape, np.float32) for shape in shapes), np.empty(count, np.bool_))
        _over_rows(_projection().project_rows, count, inputs, *camera, options, outputs)
        ctx.work = (inputs, camera, options, outputs[-1])
        tensors = [torch.from_numpy(output) for output in outputs]
        ctx.mark_non_differentiable(*tensors[4:])
        return tuple(tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):  # type: ignore[override]
        inputs, camera, options, visible = ctx.work
        gradients = tuple(np.zeros_like(value) for value in inputs)
        arrays = tuple(_numpy(value) for value in upstream[:4])
        kernel = _projection().project_rows_backward
        pose_gradient = _over_rows(
            functools.partial(_with_pose, kernel),
            len(visible), inputs, *camera, options, visible, arrays, gradients,
        )  # fmt: skip
        total = np.zeros((4, 4), np.float32)
        total[:3] = sum(pose_gradient)
        return (*map(torch.from_numpy, gradients), torch.from_numpy(total), None, None)


def rasterize(projected: Projected, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Blend front to back: (features [H, W, 4] weighted sums, alpha [H, W]). Computes in float32 on the host."""
    device, dtype = projected.means.device, projected.means.dtype
    fields = (projected.means, projected.conics, projected.opacities, projected.features)
    host = [field.to("cpu", torch.float32) for field in fields]
    image, alpha = _Blend.apply(*host, projected.reach, projected.visible, (width, height))
    return image.to(device, dtype), alpha.to(device, dtype)


class _Blend(torch.autograd.Function):
    """Blending of projected Gaussians with a hand-written gradient (see `_cpu_kernels.blend_tiles_backward`)."""

    @staticmethod
    def forward(ctx, means, conics, opacities, features, reach, visible, size):  # type: ignore[override]
        width, height = size
        kernels = _kernels()
        tiles_x, tiles_y = -(-width // kernels.TILE), -(-height // kernels.TILE)
        arrays = [_numpy(value) for value in (means, conics, opacities, features, reach)]
        ids = np.flatnonzero(visible.cpu().numpy()).astype(np.int32)
        ids = kernels.sort_by_depth(np.ascontiguousarray(arrays[3][:, 3]), ids)
        boxes, total = kernels.tile_boxes(ids, arrays[0], arrays[4], tiles_x, tiles_y)
        offsets, hits = kernels.bin_hits(boxes, total, tiles_x, tiles_x * tiles_y)
        table = kernels.pack(ids, *arrays)
        image = np.empty((kernels.CHANNELS, tiles_y * kernels.TILE, tiles_x * kernels.TILE), np.float32)
        transmittance = np.empty(image.shape[1:], np.float32)
        _over_tiles(kernels.blend_tiles, offsets, tiles_x, offsets, hits, table, image, transmittance)
        ctx.work = (ids, boxes, offsets, hits, table, image, transmittance, tiles_x, means.shape[0])
        color = torch.from_numpy(image)[:, :height, :width].permute(1, 2, 0)
        return color, 1 - torch.from_numpy(transmittance)[:height, :width]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, image_gradient, alpha_gradient):  # type: ignore[override]
        kernels = _kernels()
        ids, boxes, offsets, hits, table, image, transmittance, tiles_x, count = ctx.work
        height, width = alpha_gradient.shape
        padded = np.zeros_like(image)
        padded[:, :height, :width] = image_gradient.permute(2, 0, 1).numpy()
        remaining = np.einsum("khw,khw->hw", padded, image)
        remaining[:height, :width] -= transmittance[:height, :width] * alpha_gradient.numpy()
        per_hit = np.empty((hits.size, kernels.NUM_GRADIENTS), np.float32)
        _over_tiles(kernels.blend_tiles_backward, offsets, tiles_x, offsets, hits, table, padded, remaining, per_hit)
        out = np.zeros((count, kernels.NUM_GRADIENTS), np.float32)
        starts, positions = kernels.hits_of_each(boxes, offsets, hits.size, tiles_x)
        _over_rows(kernels.sum_hits, ids.size, starts, positions, per_hit, ids, out)
        means, conics, opacities, features = torch.from_numpy(out).split([2, 3, 1, 4], dim=1)
        return means, conics, opacities[:, 0], features, None, None, None


def _over_tiles(kernel: Callable[..., None], offsets: np.ndarray, *arguments) -> None:
    """Run `kernel(first, last, *arguments)` over all tiles on as many threads as PyTorch uses, shared out by hits."""
    num_tiles = len(offsets) - 1
    threads = min(torch.get_num_threads(), num_tiles)
    if threads == 1:
        kernel(0, num_tiles, *arguments)
        return
    chunks = _CHUNKS_PER_THREAD * threads
    # An empty tile costs about as much as a few hits, hence the ramp.
    cost = offsets + 4 * np.arange(num_tiles + 1)
    bounds = np.searchsorted(cost, np.linspace(0, cost[-1], chunks + 1)[1:-1])
    edges = np.unique([0, *bounds.tolist(), num_tiles]).tolist()
    pool = _pool(os.getpid(), threads)
    jobs = [pool.submit(kernel, first, last, *arguments) for first, last in itertools.pairwise(edges)]
    for job in jobs:
        job.result()


def _over_rows(kernel: Callable, count: int, *arguments) -> list:
    """Results of `kernel(first, last, *arguments)` over `count` rows, in order, on several threads if that pays."""
    threads = min(torch.get_num_threads(), 1 + count // _ROWS_PER_THREAD)
    edges = np.linspace(0, count, threads + 1).astype(int).tolist()
    if threads == 1:
        return [kernel(0, count, *arguments)]
    pool = _pool(os.getpid(), torch.get_num_threads())
    jobs = [pool.submit(kernel, first, last, *arguments) for first, last in itertools.pairwise(edges)]
    return [job.result() for job in jobs]


def _with_pose(kernel: Callable[..., None], *arguments) -> np.ndarray:
    """Run one range of the backward projection with a pose gradient of its own."""
    pose_gradient = np.zeros((3, 4))
    kernel(*arguments, pose_gradient)
    return pose_gradient


@functools.lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Lazy, and keyed by the process: a forked child must not wait for threads that exist only in its parent."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"gs-render-{process}")


@functools.cache
def _kernels() -> ModuleType:
    _announce_compilation()
    from gs_render._backends import _cpu_kernels

    return _cpu_kernels


@functools.cache
def _projection() -> ModuleType:
    _announce_compilation()
    from gs_render._backends import _cpu_projection

    return _cpu_projection


@functools.cache
def _announce_compilation() -> None:
    """Log, once, that kernels are being compiled: numba broadcasts it only if its cache on disk does not have them."""
    from numba.core import event

    class Announcer(event.Listener):
        told = False

        def on_start(self, compilation: event.Event) -> None:
            ours = compilation.data["dispatcher"].py_func.__module__.startswith("gs_render.")
            if ours and not self.told:
                self.told = True
                _logger.info("compiling the CPU renderer, once for this installation: about 10 s")

        def on_end(self, compilation: event.Event) -> None:
            """Nothing to tell."""

    event.register("numba:compile", Announcer())


def _numpy(value: Tensor) -> np.ndarray:
    return np.ascontiguousarray(value.detach().to("cpu", torch.float32).numpy())
