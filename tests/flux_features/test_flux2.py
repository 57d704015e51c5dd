"""FLUX.2's autoencoder: our features are the latents that its own pipeline makes, from either layout of weights."""

import pytest
import torch
from flux_features import FluxFeatures, FluxFeaturesConfig
from safetensors.torch import load_file, save_file

SMALL = FluxFeaturesConfig.preset("flux2").model_copy(update={"block_channels": (32, 32, 64, 64)})
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def theirs():
    """diffusers' class with lively weights and batch-norm statistics."""
    import diffusers

    if not hasattr(diffusers, "AutoencoderKLFlux2"):
        pytest.skip(f"NO REFERENCE: diffusers {diffusers.__version__} has no AutoencoderKLFlux2")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        model = diffusers.AutoencoderKLFlux2(block_out_channels=SMALL.block_channels).eval()
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux2")
    theirs.save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def bfl_file(folder):
    """The same weights as black-forest-labs name them: quant convolutions inside encoder and decoder."""
    from flux_features._weights import bfl_name

    tensors = load_file(folder / "vae" / WEIGHTS)
    renamed = {bfl_name(name): value for name, value in tensors.items()}
    assert {"encoder.quant_conv.weight", "decoder.post_quant_conv.bias", "bn.running_mean"} <= renamed.keys()
    assert {"encoder.down.0.block.0.norm1.weight", "decoder.up.3.block.0.conv1.weight"} <= renamed.keys()
    save_file(renamed, folder / "ae.safetensors")
    return folder / "ae.safetensors"


@torch.no_grad()
def test_tokens_are_the_latents_of_flux2(theirs, folder, pictures):
    """As Flux2Pipeline encodes: the mean, packed 2x2, through the batch norm with its running statistics."""
    pytest.importorskip("transformers")  # which diffusers' pipeline needs
    from diffusers import Flux2Pipeline

    model = FluxFeatures.from_pretrained(folder, SMALL)
    packed = Flux2Pipeline._patchify_latents(theirs.encode(pictures * 2 - 1).latent_dist.mode())
    expected = theirs.bn(packed)
    features = model(pictures)
    assert features.shape == (2, 32, 6, 4)
    torch.testing.assert_close(model.tokens(features).permute(0, 3, 1, 2), expected, atol=1e-5, rtol=1e-5)
    pictures_back = theirs.decode(Flux2Pipeline._unpatchify_latents(packed)).sample / 2 + 0.5
    torch.testing.assert_close(model.decode(features), pictures_back, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_black_forest_labs_file(folder, bfl_file, pictures):
    expected = FluxFeatures.from_pretrained(folder, SMALL)
    model = FluxFeatures.from_pretrained(bfl_file, SMALL)
    assert model.config == expected.config  # the statistics among them
    assert torch.equal(model(pictures), expected(pictures))


def test_statistics_are_asked_for(folder, bfl_file, tmp_path):
    tensors = {name: value for name, value in load_file(bfl_file).items() if not name.startswith("bn.")}
    save_file(tensors, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"not FLUX\.2's autoencoder: it has no tensor bn\.running_mean"):
        FluxFeatures.from_pretrained(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"not the weights of this autoencoder: .* unexpected, first bn\."):
        FluxFeatures.from_pretrained(bfl_file, FluxFeaturesConfig.preset("paper"))
    (tmp_path / "vae").mkdir()
    save_file(load_file(folder / "vae" / WEIGHTS), tmp_path / "vae" / WEIGHTS)
    (tmp_path / "vae/config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        FluxFeatures.from_pretrained(tmp_path, SMALL)


def test_preset_is_flux2(theirs):
    with torch.device("meta"):
        model = FluxFeatures(FluxFeaturesConfig.preset("flux2"))
        reference = type(theirs)()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    assert (model.channels, model.stride, model.image_size) == (32, 8, 512)


def test_statistics_of_patches_need_even_sides(kl2):
    with pytest.raises(ValueError, match=r"expected a feature map with even sides, got \(1, 32, 3, 4\)"):
        kl2.decode(torch.zeros(1, 32, 3, 4))
