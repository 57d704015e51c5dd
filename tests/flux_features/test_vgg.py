"""VGG16 as a feature extractor: its layer, its place in the loader, and what it refuses."""

from pathlib import Path

import pytest
import torch
from flux_features import VGGFeatures, VGGFeaturesConfig, load_extractor
from gs_render.metrics import LPIPS
from pydantic import ValidationError
from safetensors.torch import save_file

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "weights" / "lpips_vgg16_fp16.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The real file, or one of the same layout with random values."""
    if WEIGHTS.is_file():
        return WEIGHTS
    generator, tensors, channels = torch.Generator().manual_seed(0), {}, 3
    widths = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512}
    for index, width in (widths | {28: 512}).items():
        spread = (2 / (9 * channels)) ** 0.5
        tensors[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * spread
        tensors[f"features.{index}.bias"] = torch.zeros(width)
        channels = width
    for level, width in enumerate((64, 128, 256, 512, 512)):
        tensors[f"lin{level}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights, one_thread):
    return load_extractor(weights)


def test_features_are_those_that_lpips_sees_last(extractor, weights):
    assert isinstance(extractor, VGGFeatures)
    images = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(1))
    lpips, seen = LPIPS(weights), []
    lpips.features[29].register_forward_hook(lambda *call: seen.append(call[2]))
    lpips(images, images)
    found = extractor(images)
    assert found.shape == (2, 512, 3, 2)
    torch.testing.assert_close(found, seen[0][:2])
    assert extractor(images[:, :, :40]).shape == (2, 512, 3, 2)  # padded to whole cells


def test_tokens_are_normalised_cells(extractor):
    feature_map = torch.rand(1, 512, 2, 3, generator=torch.Generator().manual_seed(2))
    tokens = extractor.tokens(feature_map)
    assert tokens.shape == (1, 2, 3, 512)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[0, 1, 2].std(unbiased=False), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_refusals(tmp_path, extractor, weights):
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: no such file"):
        VGGFeatures(VGGFeaturesConfig(source=tmp_path / "none.safetensors"))
    with pytest.raises(ValidationError, match="multiple of 16"):
        VGGFeaturesConfig(source=weights, image_size=250)
    with pytest.raises(ValueError, match=r"expected float images \[B, 3, H, W\]"):
        extractor(torch.zeros(3, 32, 32))
