"""Fixtures of the tests of flux_features."""

from pathlib import Path

import pytest
import torch
from flux_features import FluxFeatures, FluxFeaturesConfig

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """All these tests want it."""


@pytest.fixture(scope="session")
def real_weights():
    """Folder of published weights, beside the checkout."""
    folder = SHARED / "weights"
    if not (folder / "taef2_encoder.safetensors").is_file():
        pytest.skip(f"NO REAL WEIGHTS: {folder} has no taef2_encoder.safetensors")
    return folder


@pytest.fixture(scope="session")
def real_images():
    """Folder of pictures, beside the checkout."""
    folder = SHARED / "images"
    if not folder.is_dir():
        pytest.skip(f"NO PICTURES: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def lively():
    """Makes an extractor with weights from a fixed seed, larger than the default ones so that outputs are lively."""

    def make(config):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(3)
            model = FluxFeatures(config).eval()
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture(scope="session")
def tiny(lively):
    mean, std = tuple(0.1 * c for c in range(16)), tuple(0.5 + 0.1 * c for c in range(16))
    return lively(FluxFeaturesConfig(channel_mean=mean, channel_std=std))


@pytest.fixture(scope="session")
def kl(lively):
    """FLUX.1's layout, a quarter as wide or less."""
    fields = {"block_channels": (32, 32, 64, 64), "shift": 0.1159, "scale": 0.3611}
    return lively(FluxFeaturesConfig(architecture="kl", **fields))


@pytest.fixture(scope="session")
def kl2(lively):
    """FLUX.2's layout, a quarter as wide or less, with statistics of 2x2 patches."""
    mean, std = tuple(0.01 * c for c in range(128)), tuple(0.5 + 0.01 * c for c in range(128))
    fields = {"latent_channels": 32, "block_channels": (32, 32, 64, 64), "channel_mean": mean, "channel_std": std}
    return lively(FluxFeaturesConfig(architecture="kl2", **fields))


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
