"""Flow matching: the straight path between data (t = 0) and noise (t = 1), its loss, and reproducible noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from sparse_vae import SparseTensor
from torch import Tensor

from smdit._sparse_io import voxel_rows

State = TypeVar("State", bound=Tensor | SparseTensor)
"""Latents of a batch: a dense tensor [B, ...], or voxels."""

Velocity = Callable[[State, Tensor, Tensor], State]
"""A flow model: (x, t [B] in [0, 1], condition [B, ...]) -> velocity like x."""

_MASK64 = 2**64 - 1


def sample_time(
    batch_size: int,
    generator: torch.Generator,
    time: Literal["uniform", "logit_normal"] = "uniform",
    *,
    mean: float = 1.0,
    std: float = 1.0,
) -> Float[Tensor, " B"]:
    """Training times in (0, 1), float32 on the generator's device.

    "uniform" is the paper's; "logit_normal" is sigmoid(mean + std n) for normal n, TRELLIS's choice with
    mean = std = 1, which spends more of the training near noise.
    """
    if time == "uniform":
        return torch.rand(batch_size, generator=generator, device=generator.device)
    if time == "logit_normal":
        normal = torch.randn(batch_size, generator=generator, device=generator.device)
        return torch.sigmoid(mean + std * normal)
    raise ValueError(f'time must be "uniform" or "logit_normal", got {time!r}')


def flow_matching_loss(
    model: Velocity,
    z0: State,
    condition: Float[Tensor, "B ..."],
    generator: torch.Generator,
    p_uncond: float = 0.1,
    time: Literal["uniform", "logit_normal"] = "uniform",
    time_mean: float = 1.0,
    time_std: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean squared error of the velocity at random times (paper, section 3.3).

    z_t = (1 - t) z0 + t eps, and the velocity to learn is eps - z0.

    Args:
        model: called as `model(z_t, t, condition)`.
        z0: normalised latents of B objects; voxels all count alike, whatever object they belong to.
        condition: image tokens; replaced by zeros for a share `p_uncond` of the objects, which trains the
            unconditional velocity that guidance needs.
        generator: source of times, noise and dropped conditions. Randomness is drawn on its device, so a generator on
            the latents' device avoids copies.
        p_uncond: probability of dropping an object's condition.
        time: distribution of t, see `sample_time`.
        time_mean, time_std: of "logit_normal". What the condition decides is decided early: where it lowers the loss
            most is where the training should be, and the smaller the latents, the nearer to noise that is.

    Returns:
        float32 scalar.
    """
    features = _features(z0)
    batch_size = _batch_size(z0)
    noise = torch.randn(features.shape, generator=generator, device=generator.device).to(features.device)
    t = sample_time(batch_size, generator, time, mean=time_mean, std=time_std).to(features.device)
    keep = torch.rand(batch_size, generator=generator, device=generator.device).to(features.device) >= p_uncond
    if len(condition) != batch_size:
        raise ValueError(f"condition has {len(condition)} rows for {batch_size} objects")
    condition = condition * keep.to(condition.dtype).reshape(-1, *[1] * (condition.ndim - 1))
    data = features.float()
    target = noise - data
    noisy = torch.addcmul(data, per_row(t, z0), target)
    velocity = _features(model(_replace(z0, noisy), t, condition))
    return torch.nn.functional.mse_loss(velocity.float(), target)


def voxel_noise(
    coords: Int[Tensor, "L 3"], channels: int, grid_size: int, seed: int, sample: int = 0
) -> Float[Tensor, "L channels"]:
    """Standard normal noise of voxels, depending on (seed, sample, grid size, voxel) and on nothing else.

    The noise of the whole grid is drawn on the CPU and indexed, so that CPU and GPU start from the same noise and a
    voxel more or less does not change the noise of the others.

    Args:
        coords: voxel indices (x, y, z) in 0..grid_size-1.
        channels: channels of the latents.
        grid_size: side of the grid.
        seed: any integer.
        sample: number of the sample drawn with this seed.

    Returns:
        [L, channels] float32 on the device of `coords`.
    """
    generator = torch.Generator().manual_seed(_mix(_mix(_mix(seed) + sample) + grid_size))
    dense = torch.randn(grid_size**3, channels, generator=generator)
    x, y, z = coords.cpu().long().unbind(-1)
    return dense[(x * grid_size + y) * grid_size + z].to(coords.device)


def _mix(value: int) -> int:
    """A 64-bit integer that changes in every bit with any bit of `value` (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _features(x: Tensor | SparseTensor) -> Tensor:
    return x.features if isinstance(x, SparseTensor) else x


def _replace(x: State, features: Tensor) -> State:
    return x.replace(features) if isinstance(x, SparseTensor) else features  # type: ignore[return-value]


def _batch_size(x: Tensor | SparseTensor) -> int:
    return x.topology.batch_size if isinstance(x, SparseTensor) else len(x)


def per_row(values: Float[Tensor, " B"], x: Tensor | SparseTensor) -> Tensor:
    """One value an object, shaped to multiply the features of `x`."""
    if isinstance(x, SparseTensor):
        return voxel_rows(x.topology).spread(values[:, None])
    return values.reshape(-1, *[1] * (x.ndim - 1))


def per_object_std(x: Tensor | SparseTensor) -> Float[Tensor, " B"]:
    """Standard deviation over all values of an object."""
    if not isinstance(x, SparseTensor):
        return x.flatten(1).std(dim=1, correction=0)
    rows = voxel_rows(x.topology)
    counts = (rows.counts * x.num_channels).clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return torch.segment_reduce(values.sum(dim=1), "sum", lengths=rows.counts, unsafe=True) / counts

    centred = x.features - per_row(mean(x.features), x)
    return mean(centred.square()).sqrt()
