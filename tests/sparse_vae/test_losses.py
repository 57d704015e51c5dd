"""The 2to3-VAE's loss as a whole; its terms have their known values in test_models.py."""

import pytest
import torch
import torch.nn.functional as F
from gs_render import Gaussians
from gs_render.metrics import LPIPS, ssim
from pydantic import ValidationError
from sparse_vae import VAELossConfig, picture_loss, vae_loss


class SquaredDistance(LPIPS):
    """In the place of LPIPS, whose weights tests do not have."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def forward(self, image, target):
        return (image - target).square().flatten(1).sum(1)


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, target = (torch.rand(2, 3, 16, 16, generator=generator).requires_grad_() for _ in range(2))
    objects = []
    for count in (5, 3):
        rows = [torch.rand(count, width, generator=generator) for width in (3, 3, 4, 1, 3)]
        means, scales, quaternions, opacities, sh = (r.requires_grad_() for r in rows)
        objects.append(Gaussians(means, scales, F.normalize(quaternions, dim=1), opacities[:, 0], sh[:, None]))
    mean, logvar = (torch.randn(8, 4, generator=generator).requires_grad_() for _ in range(2))
    return image, target, objects, mean, logvar


def test_the_loss_is_the_weighted_sum_of_its_terms():
    image, target, objects, mean, logvar = draw()
    lpips = SquaredDistance()
    scales, opacities = torch.cat([g.scales for g in objects]), torch.cat([g.opacities for g in objects])
    expected = {
        "l1": (image - target).abs().mean(),
        "mse": (image - target).square().mean(),
        "ssim": 1 - ssim(image, target).mean(),
        "lpips": lpips(image, target).mean(),
        "kl": 0.5 * (mean**2 + logvar.exp() - logvar - 1).mean(),
        "volume": (scales[:, 0] * scales[:, 1] * scales[:, 2]).mean(),
        "opacity": ((1 - opacities) ** 2).mean(),
    }
    weights = {f"{name}_weight": float(number) for number, name in enumerate(expected, 2)}
    loss, terms = vae_loss(image, target, objects, mean, logvar, VAELossConfig(**weights), lpips)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach())
        assert not terms[name].requires_grad
    total = sum(weights[f"{name}_weight"] * value for name, value in expected.items())
    torch.testing.assert_close(loss, total)
    inputs = (image, mean, logvar, objects[0].scales, objects[1].opacities)
    for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_default_weights_are_those_of_trellis():
    expected = {"l1": 1.0, "mse": 0.0, "ssim": 0.2, "lpips": 0.2, "kl": 1e-6, "volume": 1e4, "opacity": 1e-3}
    for config in (VAELossConfig(), VAELossConfig.preset("paper")):
        assert config.model_dump() == {f"{name}_weight": value for name, value in expected.items()}


def test_the_volume_weight_follows_the_spacing_of_gaussians():
    """At the same weights the term keeps its value when all lengths double."""
    assert VAELossConfig.preset("tiny").volume_weight == pytest.approx(1e4 / 4**3)  # half the grid, a quarter a voxel
    assert VAELossConfig.preset("small").volume_weight == pytest.approx(1e4 / 2**1.5)  # half the Gaussians


def test_losses_are_computed_in_float32():
    image, target, objects, mean, logvar = draw()
    config = VAELossConfig(lpips_weight=0)
    half = [t.detach().bfloat16() for t in (image, target)]
    loss, _ = picture_loss(*half, config)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, picture_loss(*(t.float() for t in half), config)[0])
    loss, _ = vae_loss(*half, objects, mean.detach().bfloat16(), logvar.detach().bfloat16(), config)
    assert loss.dtype == torch.float32


def test_lpips_is_left_out_by_its_weight_only():
    image, target, *_ = draw()
    with pytest.raises(ValueError, match=r"lpips_weight is 0.2 but there is no LPIPS: give lpips="):
        picture_loss(image, target, VAELossConfig())
    _, terms = picture_loss(image, target, VAELossConfig(lpips_weight=0), SquaredDistance())
    assert terms.keys() == {"l1", "ssim"}
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        VAELossConfig(kl_weight=-1.0)
