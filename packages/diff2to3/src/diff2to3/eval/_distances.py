"""Distances between two sets of pictures, from the features that a network has of them."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn


class _Known(nn.Module):
    """Takes the place of a metric's network: the features were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Float[Tensor, "N D"], made: Float[Tensor, "M D"]) -> float:
    """Frechet distance of the Gaussians fitted to both sets (Heusel et al. 2017), by torchmetrics.

    It is biased by the number of pictures: compare sets of one size alone.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Known(real.shape[1]))
    metric.update(real.cpu().float(), real=True)
    metric.update(made.cpu().float(), real=False)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # fewer pictures than features: the covariance is singular, and still a distance
        return float(metric.compute())


def kernel_distance(real: Float[Tensor, "N D"], made: Float[Tensor, "N D"]) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), by torchmetrics; can be negative.

    Taken over both sets as a whole: with subsets drawn at random the figure would depend on the draw.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features, which is the point
        metric = KernelInceptionDistance(
            feature=_Known(real.shape[1]), subsets=1, subset_size=min(len(real), len(made))
        )
        metric.update(real.cpu().double(), real=True)
        metric.update(made.cpu().double(), real=False)
        with torch.random.fork_rng(devices=[]):  # it draws the order of the pictures, on which only rounding depends
            torch.manual_seed(0)
            return float(metric.compute()[0])


def similarity(first: Float[Tensor, "N D"], second: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Cosine of each pair of rows times 100: with CLIP's image features the CLIP score."""
    return 100 * torch.nn.functional.cosine_similarity(first, second, dim=-1)
