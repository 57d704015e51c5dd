"""Terms of the training losses, as pure functions in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gs_render import Gaussians
from jaxtyping import Float
from torch import Tensor


def kl_divergence(mean: Float[Tensor, ...], logvar: Float[Tensor, ...]) -> Float[Tensor, ""]:
    """Divergence of N(mean, exp(logvar)) from the standard normal, averaged over all elements.

    TRELLIS weighs it 1e-6 in the 2to3-VAE and 1e-3 in the structure VAE.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()


def dice_loss(logits: Float[Tensor, ...], target: Float[Tensor, ...]) -> Float[Tensor, ""]:
    """1 - Dice coefficient of sigmoid(logits) and a target in [0, 1], sums taken over the whole batch.

    Args:
        logits: any shape.
        target: same shape as `logits`.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have one shape")
    probability, target = logits.float().sigmoid(), target.float()
    overlap = (probability * target).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + target.sum() + 1)


def gaussian_regularisation(
    gaussians: Sequence[Gaussians], volume: float = 1e4, opacity: float = 1e-3
) -> Float[Tensor, ""]:
    """`volume` * mean(product of scales) + `opacity` * mean((1 - opacity)^2) over the Gaussians of all objects.

    The default weights are TRELLIS's, for 64^3 voxels with 32 Gaussians each. The volume of a Gaussian grows with the
    cube of the spacing: at 32^3 voxels with 8 Gaussians a weight near 150 has the same effect.
    """
    scales = torch.cat([g.scales for g in gaussians]).float()
    opacities = torch.cat([g.opacities for g in gaussians]).float()
    x, y, z = scales.unbind(dim=-1)  # the gradient of `prod` looks for zeros, and waits for the device to find them
    return volume * (x * y * z).mean() + opacity * (1 - opacities).square().mean()
