"""The extractor: its networks equal diffusers', its features, tokens, padding and number formats are as documented."""

import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderTiny
from flux_features import FluxFeatures, FluxFeaturesConfig
from pydantic import ValidationError

ALL = pytest.mark.parametrize("name", ["tiny", "kl", "kl2"])


@pytest.fixture
def model(name, request):
    return request.getfixturevalue(name)


@pytest.mark.parametrize("preset", ["tiny", "small", "taef1"])
@torch.no_grad()
def test_tiny_layout_equals_diffusers(preset, pictures):
    """The same parameters by name and order, and with the same weights the same latents and pictures."""
    config = FluxFeaturesConfig.preset(preset)
    ours = FluxFeatures(config).eval()
    theirs = AutoencoderTiny(
        latent_channels=16, num_encoder_blocks=config.encoder_blocks, num_decoder_blocks=config.decoder_blocks
    ).eval()
    assert list(ours.autoencoder.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.autoencoder.state_dict())
    latents = ours(pictures)
    torch.testing.assert_close(latents, theirs.encode(pictures * 2 - 1).latents, atol=1e-6, rtol=1e-6)
    far = 4 * torch.randn(1, 16, 4, 6)  # beyond the soft limit
    torch.testing.assert_close(ours.decode(far), theirs.decode(far).sample / 2 + 0.5, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_kl_features_are_scaled_means(kl, pictures):
    """FLUX.1: 0.3611 (z - 0.1159) of the mean latent; decode undoes it."""
    posterior = kl.autoencoder.encode(pictures * 2 - 1).latent_dist
    features = kl(pictures)
    torch.testing.assert_close(features, 0.3611 * (posterior.mean - 0.1159))
    assert features.shape == (2, 16, 6, 4)
    expected = kl.autoencoder.decode(posterior.mean).sample / 2 + 0.5
    torch.testing.assert_close(kl.decode(features), expected, atol=1e-5, rtol=1e-5)


def test_paper_preset_is_flux():
    with torch.device("meta"):
        model = FluxFeatures(FluxFeaturesConfig.preset("paper"))
    assert sum(p.numel() for p in model.parameters()) == 83_819_683  # FLUX.1's ae.safetensors
    assert (model.channels, model.stride, model.image_size) == (16, 8, 512)
    assert (model.config.scale, model.config.shift) == (0.3611, 0.1159)
    assert model(torch.empty(1, 3, 512, 512, device="meta")).shape == (1, 16, 64, 64)


@torch.no_grad()
def test_normalised_by_channel(tiny, pictures):
    plain = FluxFeatures(FluxFeaturesConfig()).eval()
    plain.load_state_dict(tiny.state_dict())
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (tiny.config.channel_mean, tiny.config.channel_std))
    torch.testing.assert_close(tiny(pictures), (plain(pictures) - mean) / std)
    torch.testing.assert_close(tiny.decode(tiny(pictures)), plain.decode(plain(pictures)), atol=1e-5, rtol=1e-5)
    assert not {"channel_mean", "channel_std"} & set(tiny.state_dict())


def test_tokens_are_patches_in_reading_order(tiny):
    """Token (i, j) holds channel by channel the 2 x 2 cells from (2i, 2j), rows first."""
    feature_map = torch.arange(2 * 16 * 4 * 6.0).reshape(2, 16, 4, 6)
    tokens = tiny.tokens(feature_map)
    assert tokens.shape == (2, 2, 3, 64)
    for i, j in ((0, 0), (1, 2), (0, 1)):
        patch = feature_map[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        assert torch.equal(tokens[:, i, j], patch.flatten(1))
    with pytest.raises(ValueError, match=r"even sides, got \(1, 16, 3, 4\)"):
        tiny.tokens(torch.zeros(1, 16, 3, 4))


@ALL
@pytest.mark.parametrize("size", [(16, 16), (17, 31), (1, 40), (33, 16)])
@torch.no_grad()
def test_any_size_is_padded_by_its_edge(model, size):
    """Padding is at the right and at the bottom, repeats the edge, and fills up to multiples of 16."""
    height, width = size
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(-(-height // 16) * 16).clamp_max(height - 1)
    columns = torch.arange(-(-width // 16) * 16).clamp_max(width - 1)
    features = model(image)
    assert torch.equal(features, model(image[:, :, rows][:, :, :, columns]))
    assert features.shape[-2:] == (len(rows) // 8, len(columns) // 8)
    assert model.decode(features).shape == (1, 3, len(rows), len(columns))
    assert torch.equal(model.decode(features, size), model.decode(features)[..., :height, :width])
    model.tokens(features)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 16, 16),
        torch.zeros(1, 4, 16, 16),
        torch.zeros(1, 3, 0, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
    ],
    ids=["no batch", "alpha", "empty", "bytes"],
)
def test_refuses_other_things_than_pictures(tiny, images):
    with pytest.raises(ValueError, match=r"expected float images \[B, 3, H, W\] in \[0, 1\], got torch\."):
        tiny(images)


@ALL
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@torch.no_grad()
def test_half_precision(model, name, dtype, tolerance, pictures):
    """Features in the weights' dtype, near those of float32; statistics stay float32."""
    half = FluxFeatures(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(dtype)
    exact, features = model(pictures), half(pictures)
    assert features.dtype == dtype
    assert float((features.float() - exact).norm() / exact.norm()) < tolerance
    assert torch.equal(half.channel_mean, model.channel_mean)
    assert half.channel_std.dtype == torch.float32
    decoded = half.decode(features)
    assert decoded.dtype == dtype
    assert torch.isfinite(decoded).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float((model(pictures).float() - exact).norm() / exact.norm()) < 0.05


@ALL
@torch.no_grad()
def test_batch_independent_and_deterministic(model, pictures):
    state = torch.random.get_rng_state()
    together = model(pictures)
    assert torch.equal(model(pictures), together)
    for index in (0, 1):
        torch.testing.assert_close(model(pictures[index : index + 1]), together[index : index + 1])
    assert torch.equal(torch.random.get_rng_state(), state)


@ALL
def test_trains_end_to_end(model, name, pictures):
    copy = FluxFeatures(model.config)
    copy.load_state_dict(model.state_dict())
    (copy.decode(copy(pictures)) - pictures).square().mean().backward()
    gradients = [p.grad for p in copy.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert sum(float(g.abs().sum()) > 0 for g in gradients) > 0.9 * len(gradients)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channel_mean": (0.0,)}, "channel_mean has 1 values, expected latent_channels = 16, or 4 times as many"),
        ({"channel_std": (0.0,) * 16}, "channel_std must be positive"),
        ({"encoder_blocks": (1, 2)}, "expected 4 entries"),
        ({"block_channels": (16, 32, 64, 64)}, "multiples of 32"),
        ({"scale": 0}, "greater than 0"),
        ({"image_size": 100}, "multiple of 16"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValidationError, match=message):
        FluxFeaturesConfig(**fields)


def test_unknown_preset():
    with pytest.raises(ValueError, match="no FluxFeaturesConfig preset 'huge'; expected one of tiny, small, paper"):
        FluxFeaturesConfig.preset("huge")


def test_the_small_architecture_does_without_diffusers():
    code = (
        "import sys, flux_features as f; f.FluxFeatures(f.FluxFeaturesConfig());"
        "assert not {'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
