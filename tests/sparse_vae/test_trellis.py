"""Checkpoints in the layout of the public TRELLIS files, with random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from sparse_vae import (
    GaussianDecoder,
    SparseVAEEncoder,
    StructureDecoder,
    StructureEncoder,
    from_trellis_config,
    from_trellis_state_dict,
    load_trellis,
    read_trellis,
    trellis_files,
)
from sparse_vae._gaussians import offset_start

REPRESENTATION = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 32,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 4e-3,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}
SLAT = {
    "resolution": 64,
    "model_channels": 768,
    "latent_channels": 8,
    "num_blocks": 12,
    "num_heads": 12,
    "mlp_ratio": 4,
    "attn_mode": "swin",
    "window_size": 8,
    "use_fp16": True,
}
STRUCTURE = {"latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2, "use_fp16": True}
# Names, arguments and parameter counts of the public files.
PUBLIC = {
    "slat_enc_swin8_B_64l8_fp16": ("ElasticSLatEncoder", SLAT | {"in_channels": 1024}, SparseVAEEncoder),
    "slat_dec_gs_swin8_B_64l8gs32_fp16": (
        "ElasticSLatGaussianDecoder",
        SLAT | {"representation_config": REPRESENTATION},
        GaussianDecoder,
    ),
    "ss_enc_conv3d_16l8_fp16": (
        "SparseStructureEncoder",
        STRUCTURE | {"in_channels": 1, "channels": [32, 128, 512]},
        StructureEncoder,
    ),
    "ss_dec_conv3d_16l8_fp16": (
        "SparseStructureDecoder",
        STRUCTURE | {"out_channels": 1, "channels": [512, 128, 32]},
        StructureDecoder,
    ),
}


def linear(name, width_in, width_out):
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def conv(name, width_in, width_out, size=3):
    return {f"{name}.weight": (width_out, width_in, size, size, size), f"{name}.bias": (width_out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def slat_layout(args, width_in, width_out):
    width, hidden = args["model_channels"], args["model_channels"] * args["mlp_ratio"]
    shapes = linear("input_layer", width_in, width) | linear("out_layer", width, width_out)
    for i in range(args["num_blocks"]):
        shapes |= linear(f"blocks.{i}.attn.to_qkv", width, 3 * width) | linear(f"blocks.{i}.attn.to_out", width, width)
        shapes |= linear(f"blocks.{i}.mlp.mlp.0", width, hidden) | linear(f"blocks.{i}.mlp.mlp.2", hidden, width)
    return shapes


def res_block(name, width):
    block = norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
    return block | conv(f"{name}.conv1", width, width) | conv(f"{name}.conv2", width, width)


def structure_layout(args, width_in, width_out, coarse, resample):
    channels = args["channels"]
    shapes = conv("input_layer", width_in, channels[0])
    shapes |= norm("out_layer.0", channels[-1]) | conv("out_layer.2", channels[-1], width_out)
    for i in range(args["num_res_blocks_middle"]):
        shapes |= res_block(f"middle_block.{i}", coarse)
    position = 0
    for level, width in enumerate(channels):
        for _ in range(args["num_res_blocks"]):
            shapes |= res_block(f"blocks.{position}", width)
            position += 1
        if level + 1 < len(channels):
            shapes |= resample(f"blocks.{position}.conv", width, channels[level + 1])
            position += 1
    return shapes


def public_layout(name, args):
    """Keys and shapes of a public checkpoint, written down independently of the code under test."""
    if name.startswith("slat_enc"):
        return slat_layout(args, args["in_channels"], 16)
    if name.startswith("slat_dec"):
        return slat_layout(args, 8, 448) | {"offset_perturbation": (32, 3)}
    if name.startswith("ss_enc"):
        return structure_layout(args, 1, 16, 512, lambda key, a, b: conv(key, a, b, size=2))
    return structure_layout(args, 8, 1, 512, lambda key, a, b: conv(key, a, 8 * b))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_layouts_map_one_to_one(name):
    class_name, args, expected_class = PUBLIC[name]
    description = {"name": class_name, "args": args}
    with torch.device("meta"):
        model = from_trellis_config(description)
        state = {key: torch.empty(shape) for key, shape in public_layout(name, args).items()}
    assert isinstance(model, expected_class)
    if "offset_perturbation" in state:
        state["offset_perturbation"] = offset_start(model.config.gaussians)
    mapped = from_trellis_state_dict(description, state)
    assert {k: tuple(v.shape) for k, v in mapped.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}


def shrink(name):
    """The description of a public file with narrower layers, so that a real file can be written in a test."""
    class_name, args, expected_class = PUBLIC[name]
    args = dict(args)
    if "model_channels" in args:
        args |= {"model_channels": 24, "num_blocks": 2, "num_heads": 2, "resolution": 16}
    else:
        args["channels"] = [width // 32 for width in args["channels"]]
    return {"name": class_name, "args": args}, expected_class


def write(folder, name):
    description, expected_class = shrink(name)
    args = description["args"]
    generator = torch.Generator().manual_seed(0)
    shapes = public_layout(name, args)
    if "channels" in args:
        coarse = max(args["channels"])
        shapes = {
            key: tuple(coarse if key.startswith("middle_block") and width == 512 else width for width in shape)
            for key, shape in shapes.items()
        }
    state = {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}
    if "offset_perturbation" in state:
        state["offset_perturbation"] = offset_start(from_trellis_config(description).config.gaussians)
    (folder / f"{name}.json").write_text(json.dumps(description))
    save_file(state, folder / f"{name}.safetensors")
    return state, expected_class


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_files_load(tmp_path, name, suffix):
    state, expected_class = write(tmp_path, name)
    model = load_trellis(tmp_path / (name + suffix), grid_size=16)
    assert isinstance(model, expected_class)
    assert not model.training
    values = model.state_dict()
    assert {v.dtype for v in values.values()} == {torch.float32}
    ours = sorted(v.sum().item() for v in values.values())
    theirs = sorted(v.float().sum().item() for k, v in state.items() if k != "offset_perturbation")
    assert ours == pytest.approx(theirs)


def test_what_does_not_fit_is_explained(tmp_path):
    name = "slat_dec_gs_swin8_B_64l8gs32_fp16"
    description, _ = shrink(name)
    state, _ = write(tmp_path, name)
    with pytest.raises(ValueError, match="1 keys of the SLatGaussianDecoder checkpoint have no counterpart"):
        from_trellis_state_dict(description, state | {"blocks.0.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="not the Hammersley set"):
        from_trellis_state_dict(description, state | {"offset_perturbation": torch.zeros(32, 3)})
    with pytest.raises(ValueError, match=r"arguments without a counterpart here: \{'dropout': 0.1\}"):
        from_trellis_config({"name": "SLatEncoder", "args": SLAT | {"in_channels": 8, "dropout": 0.1}})
    with pytest.raises(ValueError, match="attn_mode 'shift_window' is not supported"):
        from_trellis_config({"name": "SLatEncoder", "args": SLAT | {"in_channels": 8, "attn_mode": "shift_window"}})
    with pytest.raises(ValueError, match="only 'ape' runs"):
        from_trellis_config({"name": "SLatEncoder", "args": SLAT | {"in_channels": 8, "pe_mode": "rope"}})
    with pytest.raises(ValueError, match="cannot load 'SLatMeshDecoder'"):
        from_trellis_config({"name": "SLatMeshDecoder", "args": {}})
    state.pop("out_layer.bias")
    save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="do not fit"):
        load_trellis(tmp_path / name)
    (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_trellis(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path):
    name = "ss_dec_conv3d_16l8_fp16"
    state, _ = write(tmp_path, name)
    description, weights = (tmp_path / f"{name}.{suffix}" for suffix in ("json", "safetensors"))
    assert trellis_files(tmp_path / name) == trellis_files(weights) == (description, weights)
    read, tensors = read_trellis(tmp_path / name)
    assert read["name"] == "SparseStructureDecoder"
    assert tensors.keys() == state.keys()
    whole = weights.read_bytes()
    for keep in (0, 4, 1000, len(whole) - 1):
        weights.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="is damaged or truncated, not a whole safetensors file"):
            load_trellis(tmp_path / name)
    torch.save(state, weights)
    with pytest.raises(ValueError, match=r"safetensors is a pickle, which can run any program when it is read"):
        load_trellis(tmp_path / name)
    weights.rename(tmp_path / f"{name}.pt")
    for path in (tmp_path / name, tmp_path / f"{name}.pt"):
        with pytest.raises(ValueError, match=r"\.pt is a pickle, which can run any program when it is read"):
            load_trellis(path)
    weights.write_bytes(whole)
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "does not describe"),
        ('{"name": "x"}', "expected {"),
    ):
        description.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_trellis(tmp_path / name)
    description.write_text('{"name": "SparseStructureDecoder", "args": {"channels": [16, 4]}}')
    with pytest.raises(ValueError, match="the arguments of SparseStructureDecoder lack 'latent_channels'"):
        load_trellis(tmp_path / name)
