"""The oracle: splatting in plain PyTorch, any device, any floating dtype, gradients by autograd. Simple, not fast."""

from __future__ import annotations

import torch
from torch import Tensor

from gs_render._project import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, Projected
from gs_render._project import project as project

_TILE = 16


def is_available() -> str | None:
    """Always."""
    return None


def rasterize(projected: Projected, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Blend front to back: (features [H, W, 4] weighted sums, alpha [H, W])."""
    order = _depth_order(projected)
    means, conics = projected.means[order], projected.conics[order]
    opacities, features = projected.opacities[order], projected.features[order]
    low, high = (means - projected.reach[order]).detach(), (means + projected.reach[order]).detach()
    rows, columns = torch.arange(height).to(means) + 0.5, torch.arange(width).to(means) + 0.5

    bands = []
    for top in range(0, height, _TILE):
        y = rows[top : top + _TILE]
        in_band = ((low[:, 1] <= y[-1]) & (high[:, 1] >= y[0])).nonzero()[:, 0]
        band_low, band_high = low[in_band, 0], high[in_band, 0]
        tiles = []
        for left in range(0, width, _TILE):
            x = columns[left : left + _TILE]
            hit = in_band[(band_low <= x[-1]) & (band_high >= x[0])]
            dx = x[None, :, None] - means[hit, 0]
            dy = y[:, None, None] - means[hit, 1]
            tiles.append(_blend(dx, dy, conics[hit], opacities[hit], features[hit]))
        bands.append(torch.cat(tiles, dim=1))
    image = torch.cat(bands, dim=0)
    return image[..., :4], image[..., 4]


def _depth_order(projected: Projected) -> Tensor:
    """Indices of the visible Gaussians, nearest first; equal depths keep the order of the input."""
    visible = projected.visible.nonzero()[:, 0]
    return visible[torch.argsort(projected.features[visible, 3].detach(), stable=True)]


def _blend(dx: Tensor, dy: Tensor, conics: Tensor, opacities: Tensor, features: Tensor) -> Tensor:
    """One tile: offsets [h|1, w|1, n] -> [h, w, 5], features and alpha."""
    xx, xy, yy = conics.unbind(-1)
    power = 0.5 * (xx * dx * dx + yy * dy * dy) + xy * dx * dy
    alpha = (opacities * torch.exp(-power)).clamp_max(MAX_ALPHA)
    with torch.no_grad():
        drawn = alpha >= MIN_ALPHA
        drawn &= torch.cumprod(1 - alpha * drawn, dim=-1) > MIN_TRANSMITTANCE
    alpha = alpha * drawn
    after = torch.cumprod(1 - alpha, dim=-1)
    before = torch.cat([after.new_ones(*after.shape[:-1], 1), after], dim=-1)
    weights = alpha * before[..., :-1]
    return torch.cat([weights @ features, 1 - before[..., -1:]], dim=-1)
