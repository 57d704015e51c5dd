"""Published weights: layouts, exact conversion, and errors that say what is wrong with a file."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from flux_features import FluxFeatures, FluxFeaturesConfig
from flux_features._weights import bfl_name, config_of
from PIL import Image
from safetensors.torch import load_file, save_file

SMALL_KL = FluxFeaturesConfig(architecture="kl", block_channels=(32, 32, 64, 64), shift=0.1159, scale=0.3611)
TAEF1, TAEF2 = FluxFeaturesConfig.preset("taef1"), FluxFeaturesConfig.preset("taef2")


def bfl_shapes(widths):
    """Names and shapes of ae.safetensors, as black-forest-labs' modules define them; widths finest first."""
    shapes = {}

    def conv(name, inputs, outputs, kernel=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, kernel, kernel), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def middle(part):
        width = widths[-1]
        block(f"{part}.mid.block_1", width, width)
        norm(f"{part}.mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{part}.mid.attn_1.{name}", width, width, 1)
        block(f"{part}.mid.block_2", width, width)

    conv("encoder.conv_in", 3, widths[0])
    for level, width in enumerate(widths):
        block(f"encoder.down.{level}.block.0", widths[max(level - 1, 0)], width)
        block(f"encoder.down.{level}.block.1", width, width)
        if level < 3:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder")
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", widths[-1], 32)
    conv("decoder.conv_in", 16, widths[-1])
    middle("decoder")
    for level, width in enumerate(widths):
        block(f"decoder.up.{level}.block.0", widths[min(level + 1, 3)], width)
        block(f"decoder.up.{level}.block.1", width, width)
        block(f"decoder.up.{level}.block.2", width, width)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", widths[0], 3)
    return shapes


def random_bfl(widths, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in bfl_shapes(widths).items()
    }


@pytest.fixture(scope="module")
def bfl_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bfl") / "ae.safetensors"
    save_file(random_bfl(SMALL_KL.block_channels), path)
    return path


def test_a_pickle_is_refused_with_the_reason(tmp_path):
    reason = "is a pickle, which can run any program when it is read"
    state = {"encoder.conv_in.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a\.safetensors {reason}"):
        FluxFeatures.from_pretrained(tmp_path / "a.safetensors", SMALL_KL)
    for name in ("diffusion_pytorch_model.bin", "ae.pt"):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(state, folder / name)
        with pytest.raises(ValueError, match=rf"{name} {reason}"):
            FluxFeatures.from_pretrained(folder, SMALL_KL)


def test_bfl_names_of_the_real_layout():
    """All 244 tensors of FLUX.1's file correspond one to one to tensors of the same size."""
    with torch.device("meta"):
        model = FluxFeatures(FluxFeaturesConfig.preset("paper")).autoencoder
    expected = bfl_shapes((128, 256, 512, 512))
    assert len(expected) == 244
    found = {bfl_name(name): value.shape for name, value in model.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, shape in found.items():
        assert tuple(shape) == expected[name] or (*shape, 1, 1) == expected[name], name


def test_bfl_file_exact_and_as_diffusers_converts_it(bfl_file):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = FluxFeatures.from_pretrained(bfl_file, SMALL_KL)
    assert not model.training
    source = load_file(bfl_file)
    expected = convert_ldm_vae_checkpoint(dict(source), {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
    state = model.autoencoder.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.isfinite(model(torch.rand(1, 3, 32, 32))).all()


def test_bfl_directory_and_bfloat16(tmp_path):
    save_file(random_bfl(SMALL_KL.block_channels, torch.bfloat16), tmp_path / "ae.safetensors")
    model = FluxFeatures.from_pretrained(tmp_path, SMALL_KL)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("as_pipeline", [False, True])
@torch.no_grad()
def test_diffusers_directory(tmp_path, kl, pictures, as_pipeline):
    """Its config.json says how latents are scaled."""
    folder = tmp_path / "vae" if as_pipeline else tmp_path
    kl.autoencoder.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.5305, "shift_factor": 0.0609}))
    model = FluxFeatures.from_pretrained(str(tmp_path), SMALL_KL)
    assert (model.config.scale, model.config.shift) == (1.5305, 0.0609)
    theirs = AutoencoderKL.from_pretrained(folder).encode(pictures * 2 - 1).latent_dist.mean
    torch.testing.assert_close(model(pictures), 1.5305 * (theirs - 0.0609))
    single = FluxFeatures.from_pretrained(folder / "diffusion_pytorch_model.safetensors", SMALL_KL)
    assert single.config == SMALL_KL


@torch.no_grad()
def test_tiny_from_diffusers_directory(tmp_path, pictures):
    theirs = AutoencoderTiny(latent_channels=16).eval()
    theirs.save_pretrained(tmp_path)
    model = FluxFeatures.from_pretrained(tmp_path, TAEF1)
    torch.testing.assert_close(model(pictures), theirs.encode(pictures * 2 - 1).latents, atol=1e-6, rtol=1e-6)


def test_tiny_from_a_pair(tmp_path, pictures, lively):
    """taesd.py counts the decoder's layers from its clamp."""
    model = lively(TAEF2)
    state = {name.replace(".layers.", "."): value for name, value in model.autoencoder.state_dict().items()}
    encoder = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    decoder = {}
    for name, value in state.items():
        part, index, rest = name.split(".", 2)
        if part == "decoder":
            decoder[f"{int(index) + 1}.{rest}"] = value
    save_file(encoder, tmp_path / "a_encoder.safetensors")
    with pytest.raises(FileNotFoundError, match=r"a_decoder\.safetensors: no such file; .* the other is needed"):
        FluxFeatures.from_pretrained(tmp_path, TAEF2)
    save_file(decoder, tmp_path / "a_decoder.safetensors")
    for source in (tmp_path, tmp_path / "a_encoder.safetensors", tmp_path / "a_decoder.safetensors"):
        loaded = FluxFeatures.from_pretrained(source, TAEF2)
        assert torch.equal(loaded(pictures), model(pictures))
    save_file(encoder, tmp_path / "b_encoder.safetensors")
    with pytest.raises(ValueError, match=r"several encoders \(a_encoder\.safetensors, b_encoder\.safetensors\)"):
        FluxFeatures.from_pretrained(tmp_path, TAEF2)


def test_errors_name_the_tensors(bfl_file, tmp_path):
    tensors = load_file(bfl_file)
    changed = tmp_path / "changed.safetensors"

    def message(state):
        save_file(state, changed)
        with pytest.raises(ValueError, match=r"changed\.safetensors: ") as caught:
            FluxFeatures.from_pretrained(changed, SMALL_KL)
        return str(caught.value)

    lost = {k: v for k, v in tensors.items() if not k.startswith("encoder.mid.attn_1")}
    assert "10 tensors missing, first encoder.mid.attn_1.k.bias" in message(lost)
    assert "1 tensors unexpected, first quant_conv.weight" in message(tensors | {"quant_conv.weight": torch.zeros(1)})
    wrong = message(tensors | {"decoder.conv_in.weight": torch.zeros(64, 4, 3, 3)})
    assert "decoder.conv_in.weight has the shape (64, 4, 3, 3), expected (64, 16, 3, 3)" in wrong
    assert "missing" in message({"unrelated": torch.zeros(1)})


def test_truncated_and_foreign_files(bfl_file, tmp_path):
    data = bfl_file.read_bytes()
    for name, content in (("cut", data[: len(data) // 2]), ("empty", b""), ("text", b"not weights at all")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is damaged or truncated"):
            FluxFeatures.from_pretrained(path, SMALL_KL)


def test_missing_places(tmp_path):
    for source in (tmp_path / "ae.safetensors", "ae.safetensors", "a/ae.safetensors", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or directory, and not a Hub id"):
            FluxFeatures.from_pretrained(source, SMALL_KL)
    with pytest.raises(
        FileNotFoundError, match=r"neither diffusion_pytorch_model\.safetensors .* nor ae\..* nor a pair"
    ):
        FluxFeatures.from_pretrained(tmp_path, SMALL_KL)


def test_layout_is_told_by_the_tensors(tmp_path, lively, kl, kl2):
    """Without a config the preset follows from names and shapes; a model folder of diff2to3 has its own config."""
    for preset in ("taef1", "taef2"):
        folder = tmp_path / preset
        folder.mkdir()
        state = lively(FluxFeaturesConfig.preset(preset)).autoencoder.state_dict()
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        assert FluxFeatures.from_pretrained(folder).config == FluxFeaturesConfig.preset(preset)
    assert config_of(kl.autoencoder.state_dict(), "here") == FluxFeaturesConfig.preset("paper")
    assert config_of(random_bfl(SMALL_KL.block_channels), "here") == FluxFeaturesConfig.preset("paper")
    flux2 = kl2.autoencoder.state_dict() | {"bn.running_mean": torch.zeros(128)}
    assert config_of(flux2, "here") == FluxFeaturesConfig.preset("flux2")

    with pytest.raises(ValueError, match="here: not the weights of an autoencoder: its first tensor is head"):
        config_of({"head": torch.zeros(1)}, "here")

    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(kl.config.model_dump_json())
    save_file(kl.state_dict(), own / "model.safetensors")
    loaded = FluxFeatures.from_pretrained(own)
    assert loaded.config == kl.config
    assert all(torch.equal(value, kl.state_dict()[name]) for name, value in loaded.state_dict().items())


# What taesd.py of github.com/madebyollin/taesd, commit 5cccb12, gives for the same files and pixels in float32.
REFERENCE_PSNR = {
    "typical_building_castle": 35.0766,
    "typical_creature_elephant": 32.9522,
    "typical_humanoid_goblin": 34.9100,
    "typical_vehicle_pirate_ship": 31.9029,
    "typical_misc_telephone": 32.7386,
}


@pytest.mark.parametrize(("name", "expected"), REFERENCE_PSNR.items())
@torch.no_grad()
def test_taef2_real_weights(real_weights, real_images, name, expected):
    """Real weights reconstruct real pictures as well as their own code does, to 0.01 dB."""
    model = FluxFeatures.from_pretrained(real_weights, TAEF2)
    picture = Image.open(real_images / f"{name}.png").convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    pixels = np.asarray(ground.convert("RGB").resize((512, 512), Image.Resampling.LANCZOS))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    features = model(image)
    assert features.shape == (1, 32, 64, 64)
    decoded = (model.decode(features).clamp(0, 1) * 255).round() / 255
    assert float(-10 * (decoded - image).square().mean().log10()) == pytest.approx(expected, abs=0.01)
