"""From positions to rotary angles: the half of a rotary embedding that is computed once per set of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor

Scaling = tuple[Literal["linear", "ntk"], float | Sequence[float]]
"""How positions beyond the trained range are met: a method and a factor, one for all axes or one an axis."""


class RotaryTable(NamedTuple):
    """Cosines and sines of every token's angles, float32, one column for each pair of channels of a head."""

    cos: Float[Tensor, "*batch L half"]
    sin: Float[Tensor, "*batch L half"]


def equal_axes(head_dim: int, num_axes: int = 3) -> tuple[int, ...]:
    """The largest equal even share of `head_dim` for each axis, so that no axis is preferred: 64 -> (20, 20, 20).

    The channels left over (4 of 64) are not rotated and carry content alone, as in TRELLIS
    (trellis/modules/attention/modules.py, RotaryPositionEmbedder).
    """
    if num_axes < 1:
        raise ValueError(f"a rotary embedding needs at least one axis, got num_axes={num_axes}")
    share = 2 * (head_dim // (2 * num_axes))
    if share == 0:
        raise ValueError(
            f"head_dim={head_dim} is too small for {num_axes} axes: every axis takes at least 2 channels, "
            f"so use head_dim >= {2 * num_axes}"
        )
    return (share,) * num_axes


def check_axes(head_dim: int, axes_dim: Sequence[int]) -> tuple[int, ...]:
    """`axes_dim` as a tuple, or a ValueError that says why these shares do not fit into a head."""
    axes = tuple(int(dim) for dim in axes_dim)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least 2 (channels rotate in pairs), got {head_dim}")
    if not axes or any(dim < 2 or dim % 2 for dim in axes):
        raise ValueError(f"axes_dim must hold even numbers of at least 2, one an axis, got {axes}")
    if sum(axes) > head_dim:
        raise ValueError(f"axes_dim={axes} takes {sum(axes)} channels, but a head has head_dim={head_dim}")
    return axes


def ntk_theta(theta: float, scale: float, axis_dim: int) -> float:
    """The base that stretches the longest wavelength of an axis by `scale` and leaves the shortest as it is.

    The NTK-aware alternative to dividing positions when a model meets grids `scale` times as long as in training.
    `axis_dim` is the number of channels of the axis, as in `axes_dim`; with a single pair nothing can be stretched.
    """
    if scale <= 0 or theta <= 0:
        raise ValueError(f"theta and scale must be positive, got theta={theta}, scale={scale}")
    return theta if axis_dim <= 2 else theta * scale ** (axis_dim / (axis_dim - 2))


def per_axis(name: str, value: float | Sequence[float], num_axes: int) -> tuple[float, ...]:
    """`value` as one positive number an axis."""
    values = (value,) * num_axes if isinstance(value, (int, float)) else tuple(value)
    if len(values) != num_axes or any(not number > 0 for number in values):
        raise ValueError(f"{name} must be positive, one number or one for each of {num_axes} axes, got {value}")
    return tuple(float(number) for number in values)


def check_scaling(scaling: Scaling | None, num_axes: int) -> tuple[Literal["linear", "ntk"], tuple[float, ...]] | None:
    """`scaling` with one factor an axis."""
    if scaling is None:
        return None
    if not isinstance(scaling, (tuple, list)) or len(scaling) != 2 or scaling[0] not in ("linear", "ntk"):
        raise ValueError(f'scaling must be ("linear", factor) or ("ntk", factor), got {scaling!r}')
    return scaling[0], per_axis("the factor of scaling", scaling[1], num_axes)


def rotary_table(
    positions: Num[Tensor, "*batch L axes"],
    head_dim: int,
    axes_dim: Sequence[int],
    theta: float | Sequence[float] = 10000.0,
    scaling: Scaling | None = None,
) -> RotaryTable:
    """Cosine and sine of `position * theta^(-i/n)`, i = 0..n-1, for the n = axes_dim[a] / 2 pairs of every axis a.

    Args:
        positions: one position an axis, in token units; integers or fractions, possibly negative.
        head_dim: channels of a head; pairs beyond `sum(axes_dim) / 2` get angle zero (cos 1, sin 0).
        axes_dim: even number of channels of each axis, in the order of the columns of `positions`.
        theta: base of the wavelengths, 2 pi for the first pair of an axis up to nearly 2 pi theta for its last; one
            for all axes or one an axis.
        scaling: for positions that run `factor` times as far as in training. `("linear", factor)` divides them, so that
            they stay in the trained range, closer together; `("ntk", factor)` takes `ntk_theta` of every axis for its
            theta, so that neighbours stay as far apart and the longest wavelength stretches. `factor` is one number,
            or one an axis.

    Returns:
        float32 table with `head_dim / 2` columns on the device of `positions`. Angles are formed in float64 (float32
        where the device has no float64), whatever autocast says: bfloat16 could not even count to 257.
    """
    axes = check_axes(head_dim, axes_dim)
    if positions.shape[-1] != len(axes):
        raise ValueError(
            f"positions must have one column for each of the {len(axes)} axes of axes_dim={axes}, "
            f"got shape {tuple(positions.shape)}"
        )
    bases = per_axis("theta", theta, len(axes))
    method, factors = check_scaling(scaling, len(axes)) or ("linear", (1.0,) * len(axes))
    device = positions.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    exact = positions.to(dtype)
    angles = []
    for axis, (dim, base, factor) in enumerate(zip(axes, bases, factors, strict=True)):
        exponent = torch.arange(dim // 2, device=device, dtype=dtype) * (2.0 / dim)
        position = exact[..., axis, None]
        if method == "ntk":
            base = ntk_theta(base, factor, dim)
        elif factor != 1:
            position = position / factor
        angles.append(position * torch.pow(base, -exponent))
    angle = torch.cat(angles, dim=-1)
    angle = torch.nn.functional.pad(angle, (0, head_dim // 2 - angle.shape[-1]))
    return RotaryTable(angle.cos().float(), angle.sin().float())
