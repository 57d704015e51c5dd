"""DINOv2 features: what TRELLIS reads off the network, from weights that must be complete."""

import json
import sys

import pytest
import torch
from flux_features import DinoFeatures, DinoFeaturesConfig, load_extractor
from flux_features._dino_weights import read_weights, transformers_layout
from safetensors.torch import load_file, save_file

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
IMAGENET = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
MEAN, STD = IMAGENET


@pytest.fixture(scope="module")
def folder(save_dinov2, tmp_path_factory):
    return save_dinov2(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory, folder):
    """The same weights as timm's repositories on the Hub have them, made by timm's own conversion.

    DINOv2's own file, which timm converts, has transformers' tensors under names close to timm's.
    """
    found = load_file(folder / "model.safetensors")
    original = {
        "cls_token": found["embeddings.cls_token"],
        "pos_embed": found["embeddings.position_embeddings"],
        "register_tokens": found["embeddings.register_tokens"],
        "mask_token": found["embeddings.mask_token"],
        "norm.weight": found["layernorm.weight"],
        "norm.bias": found["layernorm.bias"],
    }
    for part in ("weight", "bias"):
        original[f"patch_embed.proj.{part}"] = found[f"embeddings.patch_embeddings.projection.{part}"]
        for i in range(2):
            ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                original[f"{ours}.{layer}.{part}"] = found[f"{theirs}.{layer}.{part}"]
            original[f"{ours}.attn.proj.{part}"] = found[f"{theirs}.attention.output.dense.{part}"]
            stacked = [found[f"{theirs}.attention.attention.{name}.{part}"] for name in ("query", "key", "value")]
            original[f"{ours}.attn.qkv.{part}"] = torch.cat(stacked)
            for scale in (1, 2):
                original[f"{ours}.ls{scale}.gamma"] = found[f"{theirs}.layer_scale{scale}.lambda1"]
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}
    name = "vit_large_patch14_reg4_dinov2"
    network = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
    network.load_state_dict(timm.models.vision_transformer._convert_dinov2(original, network))
    path = tmp_path_factory.mktemp("timm")
    timm.models._hub.save_for_hf(network, path, model_args=sizes, safe_serialization=True)
    return path


@pytest.fixture(scope="module", params=["transformers", "timm"])
def dino(request, folder):
    return DinoFeatures(DinoFeaturesConfig(source=str(folder), library=request.param, image_size=56))


@torch.no_grad()
@pytest.mark.parametrize("library", ["transformers", "timm"])
@pytest.mark.parametrize("size", [(56, 56), (28, 84), (30, 57)], ids=["own size", "interpolated", "padded"])
def test_both_libraries_and_both_layouts_give_the_same_tokens(folder, timm_folder, library, size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))
    reference = DinoFeatures(DinoFeaturesConfig(source=str(folder), image_size=56)).sequence(images)
    for source in (folder, timm_folder):
        extractor = load_extractor(source, library=library)
        assert type(extractor.backbone).__module__.split(".")[0] == library
        torch.testing.assert_close(extractor.sequence(images), reference, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tokens_are_those_of_a_network_that_timm_loads_itself(timm_folder):
    theirs = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    expected = theirs.forward_features((images - MEAN) / STD)  # after the last norm
    extractor = DinoFeatures(DinoFeaturesConfig(source=str(timm_folder), library="timm", image_size=56))
    features = extractor(images).flatten(2).mT
    torch.testing.assert_close(theirs.norm(features), expected[:, 5:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gated_layers_of_the_giant(save_dinov2, tmp_path):
    source = save_dinov2(tmp_path, use_swiglu_ffn=True)
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    one, two = (load_extractor(source, library=library) for library in ("transformers", "timm"))
    torch.testing.assert_close(one.sequence(images), two.sequence(images), atol=1e-4, rtol=1e-4)


def test_key_map_there_and_back(folder, timm_folder):
    """Every tensor survives; the class token comes back with its position, which only their sum tells."""
    found = load_file(folder / "model.safetensors")
    for source in (folder, timm_folder):
        weights = read_weights([source / "config.json", source / "model.safetensors"], "here")
        assert (weights.width, weights.depth, weights.num_heads, weights.image_size) == (32, 2, 2, 56)
        back = transformers_layout(weights)
        assert back.keys() == found.keys()
        own = {"embeddings.cls_token", "embeddings.position_embeddings", "embeddings.mask_token"}
        assert all(torch.equal(back[name], found[name]) for name in found.keys() - own)
        cls, position = ((t["embeddings.cls_token"], t["embeddings.position_embeddings"]) for t in (back, found))
        assert torch.equal(cls[0] + cls[1][:, :1], position[0] + position[1][:, :1])
        assert torch.equal(cls[1][:, 1:], position[1][:, 1:])


@torch.no_grad()
def test_tokens_before_the_last_norm(dino, folder):
    """The network's own last norm, applied to our tokens, gives the network's own output."""
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    original = transformers.Dinov2WithRegistersModel.from_pretrained(folder).eval()
    expected = original((images - MEAN) / STD).last_hidden_state
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


def test_errors(folder, timm_folder, tmp_path, monkeypatch):
    def load(source, size=56, library="transformers"):
        return DinoFeatures(DinoFeaturesConfig(source=str(source), image_size=size, library=library))

    with pytest.raises(ValueError, match=r"image_size = 50: expected a multiple of the patch, 14 px"):
        load(folder, 50)
    with pytest.raises(
        FileNotFoundError, match=r"no DINOv2 weights there: expected config\.json and model\.safetensors"
    ):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a/b is not on this machine: run 'hf download a/b'"):
        load("a/b")
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("dinov2_with_registers", "vit"))
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no DINOv2 weights there"):  # a pickle can run any program
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(tmp_path)
    tensors = load_file(folder / "model.safetensors")

    def message(change, config=config):
        (tmp_path / "config.json").write_text(config)
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=": ") as caught:
            load(tmp_path)
        return str(caught.value)

    assert "is a 'vit', expected 'dinov2_with_registers'" in message({}, config.replace("dinov2_with_registers", "vit"))
    lost = "embeddings.patch_embeddings.projection.bias"
    assert f"1 tensors are missing, first {lost}" in message({lost: None})
    query = "encoder.layer.1.attention.attention.query.bias"
    assert f"1 tensors are missing, first {query}" in message({query: None})
    assert "1 tensors are unexpected, first head.weight" in message({"head.weight": torch.zeros(1)})
    assert "not DINOv2's weights: " in message({"encoder.layer.1.mlp.fc2.bias": torch.zeros(3)})
    assert "15 position embeddings" in message({"embeddings.position_embeddings": torch.zeros(1, 16, 32)})
    assert "5 attention heads do not divide 32" in message(
        {}, config.replace('"num_attention_heads": 2', '"num_attention_heads": 5')
    )
    stated = json.loads((timm_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"architecture": "vit_large_patch14_dinov2"}))
    with pytest.raises(ValueError, match=r"expected .* or 'vit_large_patch14_reg4_dinov2' \(timm\)"):
        load(tmp_path)
    for library, extra in (("transformers", "dino"), ("timm", "timm")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=rf"needs {library}: pip install 'flux-features\[{extra}\]'"):
            load(folder, library=library)


def test_what_is_missing_is_known_without_loading(folder, tmp_path, monkeypatch):
    def reason(source, library="transformers"):
        return DinoFeatures.is_available(DinoFeaturesConfig(source=str(source), library=library))

    assert reason(folder) is None
    assert reason(folder, "timm") is None
    assert "no such directory" in reason(tmp_path / "none")
    assert "a/b is not on this machine: run 'hf download a/b', or name a directory" in reason("a/b")
    assert "expected config.json and model.safetensors" in reason(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{")
    assert "not a JSON file" in reason(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "is a 'vit', expected" in reason(tmp_path)
    for library, extra in (("transformers", "dino"), ("timm", "timm")):
        monkeypatch.setitem(sys.modules, library, None)
        assert f"pip install 'flux-features[{extra}]'" in reason(folder, library)


@torch.no_grad()
def test_condition_with_and_without_extra_tokens(dino):
    images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    assert torch.equal(dino.condition(images), dino.tokens(dino(images)))
    longer = DinoFeatures(dino.config.model_copy(update={"extra_tokens": True}))
    assert longer.condition(images).shape == (2, 1, 1 + 4 + 16, 32)
    assert torch.equal(longer.condition(images)[:, 0], dino.sequence(images))


@torch.no_grad()
def test_default_is_the_network_of_trellis(save_dinov2, tmp_path):
    config = DinoFeaturesConfig()
    assert (config.source, config.image_size) == ("facebook/dinov2-with-registers-large", 518)
    save_dinov2(tmp_path, image_size=518)
    images = torch.rand(1, 3, 518, 518, generator=torch.Generator().manual_seed(7))
    one, two = (load_extractor(tmp_path, library=library) for library in ("transformers", "timm"))
    assert one.sequence(images).shape == (1, 1374, 32)
    torch.testing.assert_close(one.sequence(images), two.sequence(images), atol=1e-4, rtol=1e-4)
    assert one(images).shape == two(images).shape == (1, 32, 37, 37)


def test_contract(dino):
    """The checks that diff2to3 ships for every feature extractor."""
    contract = pytest.importorskip("diff2to3.testing").FeatureExtractorContract()
    checks = [name for name in dir(contract) if name.startswith("test_")]
    assert len(checks) > 8
    for name in checks:
        getattr(contract, name)(DinoFeatures(dino.config))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dino, dtype):
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(6))
    half = DinoFeatures(dino.config).to(dtype)
    tokens = half.sequence(images)
    assert tokens.dtype == dtype
    torch.testing.assert_close(tokens.float(), dino.sequence(images), atol=0.1, rtol=0.1)


def test_loading_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    for library in ("transformers", "timm"):
        load_extractor(folder, library=library)
    assert torch.equal(torch.get_rng_state(), state)
