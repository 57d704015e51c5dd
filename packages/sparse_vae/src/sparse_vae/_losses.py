"""Training losses and their terms, as pure functions in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from gs_render import Gaussians
from gs_render.metrics import LPIPS, ssim
from jaxtyping import Float
from torch import Tensor

from sparse_vae._config import VAELossConfig


def vae_loss(
    image: Float[Tensor, "B 3 H W"],
    target: Float[Tensor, "B 3 H W"],
    gaussians: Sequence[Gaussians],
    mean: Float[Tensor, "N C"],
    logvar: Float[Tensor, "N C"],
    config: VAELossConfig,
    lpips: LPIPS | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The 2to3-VAE's loss: one view of every object against its picture, the Gaussians and the latents (section 3.3).

    Args:
        image: renderings of `gaussians`, RGB in [0, 1]; with `GaussianConfig.filter_2d`, on a black or white
            background at random.
        target: pictures from the same cameras on the same backgrounds.
        gaussians: one an object.
        mean, logvar: of the latents, as `SparseVAE.forward` returns them.
        config: weights.
        lpips: `gs_render.metrics.LPIPS` with its backbone's weights from a local file (TRELLIS: VGG).

    Returns:
        The weighted sum, and the terms that went into it: unweighted, detached, by name.

    Raises:
        ValueError: `lpips_weight` is not 0 but there is no `lpips`.
    """
    loss, terms = picture_loss(image, target, config, lpips)
    divergence = kl_divergence(mean, logvar)
    volume, opacity = _volume(gaussians), _transparency(gaussians)
    loss = loss + config.kl_weight * divergence + config.volume_weight * volume + config.opacity_weight * opacity
    return loss, terms | {"kl": divergence.detach(), "volume": volume.detach(), "opacity": opacity.detach()}


def picture_loss(
    image: Float[Tensor, "B 3 H W"],
    target: Float[Tensor, "B 3 H W"],
    config: VAELossConfig,
    lpips: LPIPS | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The part of `vae_loss` that compares pictures; same arguments and returns."""
    if config.lpips_weight and lpips is None:
        raise ValueError(
            f"lpips_weight is {config.lpips_weight} but there is no LPIPS: give lpips=gs_render.metrics.LPIPS(FILE), "
            "or set lpips_weight to 0"
        )
    image, target = image.float(), target.float()
    weighted = {"l1": (config.l1_weight, F.l1_loss(image, target))}
    if config.mse_weight:
        weighted["mse"] = config.mse_weight, F.mse_loss(image, target)
    if config.ssim_weight:
        weighted["ssim"] = config.ssim_weight, 1 - ssim(image, target).mean()
    if config.lpips_weight and lpips is not None:
        weighted["lpips"] = config.lpips_weight, lpips(image, target).mean()
    loss = torch.stack([weight * term for weight, term in weighted.values()]).sum()
    return loss, {name: term.detach() for name, (_, term) in weighted.items()}


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
    return volume * _volume(gaussians) + opacity * _transparency(gaussians)


def _volume(gaussians: Sequence[Gaussians]) -> Float[Tensor, ""]:
    x, y, z = torch.cat([g.scales for g in gaussians]).float().unbind(dim=-1)
    return (x * y * z).mean()  # the gradient of `prod` would look for zeros, and wait for the device to find them


def _transparency(gaussians: Sequence[Gaussians]) -> Float[Tensor, ""]:
    return (1 - torch.cat([g.opacities for g in gaussians]).float()).square().mean()
