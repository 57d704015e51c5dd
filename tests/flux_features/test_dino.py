"""DINOv2 features: what TRELLIS reads off the network, from weights that must be complete."""

import sys

import pytest
import torch
from flux_features import DinoFeatures, DinoFeaturesConfig
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network of DINOv2's shape with random weights, 4 x 4 patches of 14 px."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14, num_register_tokens=4
    )
    path = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.Dinov2WithRegistersModel(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dino(folder):
    return DinoFeatures(DinoFeaturesConfig(source=str(folder), image_size=56))


@torch.no_grad()
def test_tokens_before_the_last_norm(dino, folder):
    """The network's own last norm, applied to our tokens, gives the network's own output."""
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    original = transformers.Dinov2WithRegistersModel.from_pretrained(folder).eval()
    expected = original((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)).last_hidden_state
    features = dino(images)
    assert features.shape == (2, 32, 4, 4)
    torch.testing.assert_close(original.layernorm(features.flatten(2).mT), expected[:, 5:], atol=1e-5, rtol=1e-5)
    sequence = dino.sequence(images)
    assert sequence.shape == (2, 1 + 4 + 16, 32)
    torch.testing.assert_close(sequence.mean(-1), torch.zeros(2, 21), atol=1e-5, rtol=0)
    torch.testing.assert_close(dino.tokens(features).flatten(1, 2), sequence[:, 5:])
    affine = sequence * original.layernorm.weight + original.layernorm.bias
    torch.testing.assert_close(affine, expected, atol=1e-3, rtol=1e-3)  # the two norms have other eps


@torch.no_grad()
def test_condition_with_and_without_extra_tokens(dino, folder):
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    assert torch.equal(dino.condition(images), dino.tokens(dino(images)))
    longer = DinoFeatures(DinoFeaturesConfig(source=str(folder), image_size=56, extra_tokens=True))
    assert longer.condition(images).shape == (2, 1, 1 + 4 + 16, 32)
    assert torch.equal(longer.condition(images)[:, 0], dino.sequence(images))


@torch.no_grad()
def test_patches_in_reading_order(dino):
    """What changes in one corner of the picture changes that corner's feature most."""
    image = torch.full((1, 3, 56, 56), 0.5)
    other = image.clone()
    other[..., :14, 42:] = 1.0
    change = (dino(other) - dino(image)).norm(dim=1)[0]
    assert int(change.argmax()) == 3


@torch.no_grad()
def test_any_size(dino):
    image = torch.rand(1, 3, 30, 57, generator=torch.Generator().manual_seed(2))
    padded = image[:, :, torch.arange(42).clamp_max(29)][:, :, :, torch.arange(70).clamp_max(56)]
    assert torch.equal(dino(image), dino(padded))
    assert dino(image).shape == (1, 32, 3, 5)
    with pytest.raises(ValueError, match=r"expected float images \[B, 3, H, W\]"):
        dino(torch.zeros(3, 14, 14))


def test_errors(folder, tmp_path, monkeypatch):
    def load(source, size=56):
        return DinoFeatures(DinoFeaturesConfig(source=str(source), image_size=size))

    with pytest.raises(ValueError, match=r"image_size = 50: expected a multiple of the patch, 14 px"):
        load(folder, 50)
    with pytest.raises(FileNotFoundError, match="no DINOv2 weights there"):
        load(tmp_path)
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("dinov2_with_registers", "vit"))
    with pytest.raises(ValueError, match="is a 'vit', expected 'dinov2_with_registers'"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "patch_embeddings" in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 tensors are missing, first {lost}"):
        load(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no DINOv2 weights there"):  # a pickle can run any program
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'flux-features\[dino\]'"):
        load(folder)


def test_what_is_missing_is_known_without_loading(folder, tmp_path, monkeypatch):
    def reason(source):
        return DinoFeatures.is_available(DinoFeaturesConfig(source=str(source)))

    assert reason(folder) is None
    assert "no such directory" in reason(tmp_path / "none")
    assert "expected config.json and model.safetensors" in reason(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{")
    assert "not a JSON file" in reason(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "is a 'vit', expected" in reason(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'flux-features[dino]'" in reason(folder)


def test_default_is_the_network_of_trellis():
    config = DinoFeaturesConfig()
    assert (config.source, config.image_size) == ("facebook/dinov2-with-registers-large", 518)
    assert (518 // 14) ** 2 + 5 == 1374


def test_contract(folder):
    """The checks that diff2to3 ships for every feature extractor."""
    contract = pytest.importorskip("diff2to3.testing").FeatureExtractorContract()
    checks = [name for name in dir(contract) if name.startswith("test_")]
    assert len(checks) > 8
    for name in checks:
        for extra in (False, True):
            config = DinoFeaturesConfig(source=str(folder), image_size=56, extra_tokens=extra)
            getattr(contract, name)(DinoFeatures(config))
