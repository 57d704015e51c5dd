"""TRELLIS's models as a pipeline: from files in its layout, through the command line, to the same numbers."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise

import gs_render
import numpy as np
import pytest
import smdit
import sparse_vae
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from diff2to3 import Pipeline, condition_image
from diff2to3 import _trellis as trellis
from diff2to3._cli import cli
from diff2to3._errors import InputError
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparse_vae import SparseTensor, Topology

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

GRID, CONDITION = 16, 32
SAMPLER = {
    "name": "FlowEulerGuidanceIntervalSampler",
    "args": {"sigma_min": 1e-05},
    "params": {"steps": 3, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0},
}
MEAN = [-2.17, 0.0, -0.13, -0.08, -0.53, 0.72, -1.14, 1.2]
STD = [2.38, 2.39, 2.12, 2.17, 2.66, 2.37, 2.62, 2.68]
PIPELINE = {
    "name": "TrellisImageTo3DPipeline",
    "args": {
        "models": {
            "sparse_structure_decoder": "ckpts/ss_dec",
            "sparse_structure_flow_model": "ckpts/ss_flow",
            "slat_decoder_gs": "ckpts/slat_dec_gs",
            "slat_decoder_rf": "ckpts/slat_dec_rf",
            "slat_decoder_mesh": "ckpts/slat_dec_mesh",
            "slat_flow_model": "ckpts/slat_flow",
        },
        "sparse_structure_sampler": SAMPLER,
        "slat_sampler": {**SAMPLER, "params": {**SAMPLER["params"], "steps": 4, "cfg_strength": 3.0}},
        "slat_normalization": {"mean": MEAN, "std": STD},
        "image_cond_model": "dinov2_vitl14_reg",
    },
}
FLOW = {
    "in_channels": 8, "out_channels": 8, "model_channels": 32, "cond_channels": CONDITION, "num_blocks": 2,
    "num_heads": 2, "mlp_ratio": 4, "pe_mode": "ape", "qk_rms_norm": True, "use_fp16": True,
}  # fmt: skip
REPRESENTATION = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 4, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip
DESCRIPTIONS = {
    "ss_flow": {"name": "SparseStructureFlowModel", "args": {**FLOW, "resolution": 4, "patch_size": 1}},
    "slat_flow": {
        "name": "ElasticSLatFlowModel",
        "args": {**FLOW, "resolution": GRID, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [16]},
    },
    "ss_dec": {
        "name": "SparseStructureDecoder",
        "args": {
            "out_channels": 1, "latent_channels": 8, "num_res_blocks": 1, "num_res_blocks_middle": 1,
            "channels": [16, 8, 8], "use_fp16": True,
        },
    },
    "slat_dec_gs": {
        "name": "SLatGaussianDecoder",
        "args": {
            "resolution": GRID, "model_channels": 32, "latent_channels": 8, "num_blocks": 2, "num_heads": 2,
            "mlp_ratio": 4, "attn_mode": "swin", "window_size": 4, "use_fp16": True,
            "representation_config": REPRESENTATION,
        },
    },
}  # fmt: skip


# Names and shapes of TRELLIS's tensors, written down independently of the code under test.


def linear(name, width_in, width_out):
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def conv(name, width_in, width_out):
    return {f"{name}.weight": (width_out, width_in, 3, 3, 3), f"{name}.bias": (width_out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def flow_trunk(args):
    width, heads = args["model_channels"], args["num_heads"]
    shapes = linear("t_embedder.mlp.0", 256, width) | linear("t_embedder.mlp.2", width, width)
    for i in range(args["num_blocks"]):
        block = f"blocks.{i}"
        shapes |= linear(f"{block}.adaLN_modulation.1", width, 6 * width) | norm(f"{block}.norm2", width)
        shapes |= linear(f"{block}.self_attn.to_qkv", width, 3 * width)
        shapes |= {f"{block}.self_attn.{x}_rms_norm.gamma": (heads, width // heads) for x in "qk"}
        shapes |= linear(f"{block}.self_attn.to_out", width, width) | linear(f"{block}.cross_attn.to_q", width, width)
        shapes |= linear(f"{block}.cross_attn.to_kv", args["cond_channels"], 2 * width)
        shapes |= linear(f"{block}.cross_attn.to_out", width, width)
        shapes |= linear(f"{block}.mlp.mlp.0", width, 4 * width) | linear(f"{block}.mlp.mlp.2", 4 * width, width)
    return shapes


def sparse_res_block(name, width_in, width_out, width):
    shapes = norm(f"{name}.norm1", width_in) | linear(f"{name}.emb_layers.1", width, 2 * width_out)
    for i, channels in ((1, width_in), (2, width_out)):
        shapes |= {f"{name}.conv{i}.conv.weight": (width_out, 3, 3, 3, channels)}
        shapes |= {f"{name}.conv{i}.conv.bias": (width_out,)}
    return shapes | (linear(f"{name}.skip_connection", width_in, width_out) if width_in != width_out else {})


def slat_flow_layout(args):
    width, [outer] = args["model_channels"], args["io_block_channels"]
    shapes = linear("input_layer", 8, outer) | linear("out_layer", outer, 8) | flow_trunk(args)
    blocks = {
        "input_blocks.0": (outer, outer),
        "input_blocks.1": (outer, width),
        "out_blocks.0": (2 * width, outer),
        "out_blocks.1": (2 * outer, outer),
    }
    for name, (width_in, width_out) in blocks.items():
        shapes |= sparse_res_block(name, width_in, width_out, width)
    return shapes


def slat_decoder_layout(args):
    width = args["model_channels"]
    shapes = linear("input_layer", 8, width)
    shapes |= linear("out_layer", width, 14 * args["representation_config"]["num_gaussians"])
    for i in range(args["num_blocks"]):
        shapes |= linear(f"blocks.{i}.attn.to_qkv", width, 3 * width) | linear(f"blocks.{i}.attn.to_out", width, width)
        shapes |= linear(f"blocks.{i}.mlp.mlp.0", width, 4 * width) | linear(f"blocks.{i}.mlp.mlp.2", 4 * width, width)
    return shapes


def structure_decoder_layout(args):
    channels = args["channels"]
    shapes = conv("input_layer", 8, channels[0]) | norm("out_layer.0", channels[-1]) | conv("out_layer.2", 8, 1)
    blocks = {"middle_block.0": channels[0], **{f"blocks.{2 * i}": width for i, width in enumerate(channels)}}
    for name, width in blocks.items():
        shapes |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
        shapes |= conv(f"{name}.conv1", width, width) | conv(f"{name}.conv2", width, width)
    for i in range(len(channels) - 1):
        shapes |= conv(f"blocks.{2 * i + 1}.conv", channels[i], 8 * channels[i + 1])
    return shapes


def hammersley(count, reach):
    """(i / n, van der Corput of base 2, of base 3), through atanh as decoder_gs.py has it."""

    def inverse(i, base):
        digits, scale = 0.0, 1.0 / base
        while i:
            digits, i, scale = digits + (i % base) * scale, i // base, scale / base
        return digits

    points = torch.tensor([[i / count, inverse(i, 2), inverse(i, 3)] for i in range(count)])
    return torch.atanh((2 * points - 1) / reach)


def random_state(shapes, generator):
    """Lively values of every tensor, as half-precision numbers."""
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1 and not key.endswith("gamma"):
            inputs = math.prod(shape) // shape[0]
            state[key] = noise * inputs**-0.5
        else:
            state[key] = 0.1 * noise + float(not key.endswith("bias"))  # scales of norms are near one
    return {key: value.half() for key, value in state.items()}


def write_checkpoint(folder, name, state, description=None):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(description or DESCRIPTIONS[name]))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def dino(save_dinov2, tmp_path_factory):
    """Random weights for pictures of 518 px, as the real network takes."""
    return save_dinov2(tmp_path_factory.mktemp("dino"), hidden_size=CONDITION, image_size=518)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory as microsoft/TRELLIS-image-large is laid out, of the smallest size."""
    folder = tmp_path_factory.mktemp("hub") / "TRELLIS-image-tiny"
    (folder / "ckpts").mkdir(parents=True)
    (folder / "pipeline.json").write_text(json.dumps(PIPELINE))
    generator = torch.Generator().manual_seed(0)
    args = {name: description["args"] for name, description in DESCRIPTIONS.items()}
    states = {
        "slat_flow": random_state(slat_flow_layout(args["slat_flow"]), generator),
        "ss_flow": random_state(
            linear("input_layer", 8, 32) | linear("out_layer", 32, 8) | flow_trunk(args["ss_flow"]), generator
        ),
        "ss_dec": random_state(structure_decoder_layout(args["ss_dec"]), generator),
        "slat_dec_gs": random_state(slat_decoder_layout(args["slat_dec_gs"]), generator),
    }
    states["ss_flow"]["pos_emb"] = smdit.StructureDiT(
        smdit.StructureDiTConfig(grid_size=4, width=32, num_heads=2, num_blocks=1)
    ).positions.half()
    states["slat_dec_gs"]["offset_perturbation"] = hammersley(4, 1.5)
    states["ss_dec"]["out_layer.2.bias"] -= 0.5  # fewer voxels
    # A tensor that half precision would round.
    states["slat_flow"]["out_layer.bias"] = states["slat_flow"]["out_layer.bias"].float() + 1e-5
    for name, state in states.items():
        write_checkpoint(folder / "ckpts", name, state)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An object with alpha, drawn off centre."""
    image = Image.new("RGBA", (960, 720))
    draw = ImageDraw.Draw(image)
    draw.ellipse((160, 80, 560, 480), fill=(200, 30, 40, 255))
    draw.rectangle((320, 240, 480, 600), fill=(30, 90, 200, 255))
    path = tmp_path_factory.mktemp("picture") / "thing.png"
    image.save(path)
    return path


def diff2to3(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "diff2to3", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=280,
    )


@pytest.fixture(scope="module")
def imported(source, dino, tmp_path_factory):
    target = tmp_path_factory.mktemp("made") / "pipeline"
    return target, diff2to3("import-trellis", source, target, "--dino", dino)


@pytest.fixture(scope="module")
def pipeline(imported):
    return Pipeline.from_pretrained(imported[0], device="cpu")


def convert(source, target, dino=None):
    return trellis.import_trellis(source, target, dino)


def direct(source):
    """The models as this project's packages load TRELLIS's files, without a pipeline."""
    folder = source / "ckpts"
    flows = smdit.load_trellis(folder / "ss_flow"), smdit.load_trellis(folder / "slat_flow")
    return *flows, sparse_vae.load_trellis(folder / "ss_dec", GRID), sparse_vae.load_trellis(folder / "slat_dec_gs")


def test_the_command_reports_what_it_did(imported, source, dino):
    target, result = imported
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{target}: 0.3 M parameters, TRELLIS's image to 3D: 16^3 voxels, 4 Gaussians each")
    assert result.stderr.splitlines()[-1] == (
        "diff2to3: left out slat_decoder_mesh, slat_decoder_rf: only Gaussians are made here"
    )
    roles = ("structure", "backbone", "latent_decoder")
    assert sorted(path.name for path in target.iterdir()) == sorted(
        ["pipeline.json", "import.json", *(f"{role}.safetensors" for role in roles)]
    )
    assert [path.name for path in target.parent.iterdir()] == ["pipeline"]
    record = json.loads((target / "import.json").read_text())
    assert record["weights"] == {role: trellis.file_sha256(target / f"{role}.safetensors") for role in roles}
    names = ["pipeline.json", *(f"ckpts/{n}.{suffix}" for n in DESCRIPTIONS for suffix in ("json", "safetensors"))]
    assert record["source"] == {name: trellis.file_sha256(source / name) for name in names}


def test_the_source_itself_is_no_pipeline(source):
    with pytest.raises(InputError, match=r"is TRELLIS's own: 'diff2to3 import-trellis .* DST' makes ours of it"):
        Pipeline.from_pretrained(source)


def test_everything_in_the_file_is_mapped(pipeline, dino):
    config = pipeline.config
    assert (config.name, config.frame, config.condition_background) == ("TRELLIS-image-tiny", "canonical", 0.0)
    shared = {"method": "euler", "interval": (0.5, 1.0), "shift": 3.0, "rescale": 0.0}
    assert config.sampler.model_dump() == {**shared, "steps": 4, "guidance": 3.0}
    assert pipeline.structure.config.sampler.model_dump() == {**shared, "steps": 3, "guidance": 5.0}
    assert pipeline.latent_decoder.config.latent_mean == tuple(MEAN)
    assert pipeline.latent_decoder.config.latent_std == tuple(STD)
    extractor = pipeline.feature_extractor.config
    assert (extractor.source, extractor.image_size, extractor.extra_tokens) == (str(dino), 518, True)
    assert config.roles["renderer"].config == {"filter_2d": 0.1, "antialias": True}


def test_weights_keep_their_values_and_half_precision(pipeline, imported, source):
    ss_flow, slat_flow, ss_dec, slat_dec = direct(source)
    for ours, theirs in (
        (pipeline.structure.flow, ss_flow),
        (pipeline.structure.decoder, ss_dec),
        (pipeline.backbone, slat_flow),
        (pipeline.latent_decoder, slat_dec),
    ):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    with safe_open(imported[0] / "backbone.safetensors", framework="pt") as file:
        types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert [name for name, dtype in types.items() if dtype != "F16"] == ["output.bias"]
    assert types["output.bias"] == "F32"


def trellis_preprocess(image):
    """trellis_image_to_3d.py, preprocess_image, for a picture with alpha."""
    rows, columns = np.nonzero(np.array(image)[..., 3] > 0.8 * 255)
    left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
    x, y = (left + right) / 2, (top + bottom) / 2
    half = int(max(right - left, bottom - top) * 1.2) // 2
    square = image.crop((x - half, y - half, x + half, y + half)).resize((518, 518), Image.Resampling.LANCZOS)
    values = np.array(square).astype(np.float32) / 255
    return values[..., :3] * values[..., 3:4]


def test_the_condition_image_is_what_trellis_trained_with(pipeline, picture):
    seen = []
    hook = pipeline.feature_extractor.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokens = pipeline.encode([[Image.open(picture)]])
    hook.remove()
    assert tokens.shape == (1, 1, 1, 1374, CONDITION)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = (seen[0][0] * std.view(3, 1, 1) + mean.view(3, 1, 1)).permute(1, 2, 0).numpy()
    difference = np.abs(image - trellis_preprocess(Image.open(picture)))
    assert image[0, 0].max() < 1e-6  # black
    assert difference.mean() < 0.003  # the box differs by less than a pixel, and Lanczos is not bicubic
    white = np.abs(condition_image(Image.open(picture), 518) - trellis_preprocess(Image.open(picture)))
    assert white.mean() > 0.3


@torch.no_grad()
def reference(pipeline, source, dino, picture, seed):
    """TRELLIS's pipeline written down in a line; only the noise is this project's."""
    ss_flow, slat_flow, ss_dec, slat_dec = direct(source)
    image = torch.from_numpy(condition_image(Image.open(picture), 518, background=0.0)).permute(2, 0, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    network = transformers.Dinov2WithRegistersModel.from_pretrained(dino).eval()
    prenorm = []
    network.layernorm.register_forward_pre_hook(lambda module, args: prenorm.append(args[0]))
    network(((image - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None])
    condition = F.layer_norm(prenorm[0], (CONDITION,))

    def sample(velocity, x, steps, strength):
        times = np.linspace(1, 0, steps + 1)
        times = 3.0 * times / (1 + 2.0 * times)
        for t, t_next in pairwise(times):
            now = torch.tensor([t], dtype=torch.float32)
            v = velocity(x, now, condition)
            if 0.5 <= t <= 1.0:
                v = (1 + strength) * v - strength * velocity(x, now, torch.zeros_like(condition))
            x = x - (t - t_next) * v
        return x

    z = sample(ss_flow, pipeline.structure._noise([seed]), 3, 5.0)
    coords = torch.argwhere(ss_dec(z)[0, 0] > 0).int()
    topology = Topology.from_coords(F.pad(coords, (1, 0)), GRID)[0]
    noise = pipeline.initial_noise([coords], seed).features
    latents = sample(lambda x, t, c: slat_flow(SparseTensor(x, topology), t, c).features, noise, 4, 3.0)
    latents = latents * torch.tensor(STD) + torch.tensor(MEAN)
    [gaussians] = slat_dec(SparseTensor(latents, topology))
    return condition, coords, gaussians


def test_generate_makes_what_the_models_make_directly(pipeline, imported, source, dino, picture, tmp_path):
    condition, coords, expected = reference(pipeline, source, dino, picture, seed=3)
    assert 50 < len(coords) < GRID**3 / 2
    torch.testing.assert_close(pipeline.encode([[Image.open(picture)]])[0, 0], condition, atol=1e-5, rtol=1e-4)
    asset = pipeline(picture, seed=3)
    assert torch.equal(asset.voxels.cpu(), coords)
    command = ("generate", picture, "--pipeline", imported[0], "-o", tmp_path, "--seed", 3, "--format", "ply")
    result = CliRunner().invoke(cli, [str(argument) for argument in (*command, "--device", "cpu")])
    assert result.exit_code == 0, result.output  # in this process, which has transformers loaded already
    loaded = gs_render.load(tmp_path / "thing.ply")
    for gaussians in (asset.gaussians, loaded):
        for field in ("means", "scales", "opacities", "sh"):
            torch.testing.assert_close(getattr(gaussians, field), getattr(expected, field), atol=1e-4, rtol=1e-3)
        same = (gaussians.quaternions * expected.quaternions).sum(-1).abs()
        torch.testing.assert_close(same, torch.ones_like(same), atol=1e-4, rtol=0)
    manifest = json.loads((tmp_path / "thing.json").read_text())
    record = json.loads((imported[0] / "import.json").read_text())
    assert {role: manifest["weights"][role] for role in record["weights"]} == record["weights"]


def test_saved_again_it_is_the_same(pipeline, picture, tmp_path):
    again = Pipeline.from_pretrained(pipeline.save_pretrained(tmp_path / "again"), device="cpu")
    assert again.config == pipeline.config
    assert torch.equal(again(picture).gaussians.means, pipeline(picture).gaussians.means)


def test_several_pictures_lengthen_the_condition(pipeline, picture):
    image = Image.open(picture)
    tokens = pipeline.encode([[image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]])
    assert tokens.shape == (1, 2, 1, 1374, CONDITION)
    assert len(pipeline([image, image], steps=1).gaussians) > 0


@pytest.mark.golden
@torch.no_grad()
def test_golden_sampling_through_an_imported_pipeline(golden_dir, source, dino, tmp_path):
    """The reference's own runs, from its noise and condition to its samples, by a pipeline made of its weights."""

    def case(name):
        tensors = load_file(golden_dir / f"{name}.safetensors")
        return json.loads((golden_dir / f"{name}.json").read_text()), tensors

    def state(tensors):
        return {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}

    cases = {
        "ss_flow": case("h_e2e_dense_flow_sampling"),
        "slat_flow": case("h_e2e_sparse_flow_sampling"),
        "slat_dec_gs": case("b_slat_gs_decoder_n8_swin8"),
    }
    folder = tmp_path / "source"
    folder.mkdir()
    write_checkpoint(folder / "ckpts", "ss_dec", load_file(source / "ckpts/ss_dec.safetensors"))
    for name, (spec, tensors) in cases.items():
        write_checkpoint(folder / "ckpts", name, state(tensors), {"name": spec["class"], "args": spec["kwargs"]})
    (dense_spec, dense), (_, sparse), (decoder_spec, decoder) = cases.values()
    run = dense_spec["run"]
    sampler = {"name": run["sampler"], "args": {"sigma_min": run["sigma_min"]}}
    sampler["params"] = {key: run[key] for key in ("steps", "cfg_strength", "cfg_interval", "rescale_t")}
    described = json.loads(json.dumps(PIPELINE))
    described["args"] |= {"sparse_structure_sampler": sampler, "slat_sampler": sampler}
    statistics = {"mean": sparse["input.norm_mean"].tolist(), "std": sparse["input.norm_std"].tolist()}
    described["args"]["slat_normalization"] = statistics
    (folder / "pipeline.json").write_text(json.dumps(described))
    convert(folder, tmp_path / "made", str(dino))
    pipeline = Pipeline.from_pretrained(tmp_path / "made", device="cpu")

    structure = pipeline.structure
    z = smdit.make_sampler(structure.config.sampler).sample(structure.flow, dense["input.noise"], dense["input.cond"])
    torch.testing.assert_close(z, dense["output.samples"], atol=1e-4, rtol=1e-4)

    topology, order = Topology.from_coords(sparse["input.coords"], GRID)
    condition = sparse["input.cond"].expand(topology.batch_size, -1, -1)
    noise = SparseTensor(sparse["input.noise"][order], topology)
    latents = smdit.make_sampler(pipeline.config.sampler).sample(pipeline.backbone, noise, condition)
    torch.testing.assert_close(latents.features, sparse["output.samples"][order], atol=1e-4, rtol=1e-4)
    natural = pipeline.denormalise(latents).features
    torch.testing.assert_close(natural, sparse["output.slat"][order], atol=1e-4, rtol=1e-4)

    topology, order = Topology.from_coords(decoder["input.coords"], GRID)
    objects = pipeline.latent_decoder(SparseTensor(decoder["input.feats"][order], topology))
    count = decoder_spec["kwargs"]["representation_config"]["num_gaussians"]
    rows = order.split(topology.lengths)
    for i, gaussians in enumerate(objects):
        first = int((decoder["input.coords"][:, 0] < i).sum())  # rows of an object lie together
        found = torch.empty_like(gaussians.means).unflatten(0, (-1, count))
        found[rows[i] - first] = gaussians.means.unflatten(0, (-1, count))
        torch.testing.assert_close(found.flatten(0, 1), decoder[f"output.{i}.get_xyz"], atol=1e-4, rtol=1e-4)


# What goes wrong: a message that names it, and nothing left behind.


@pytest.fixture
def copy(source, tmp_path):
    """A source to break."""
    folder = tmp_path / "copy"
    (folder / "ckpts").mkdir(parents=True)
    for path in source.rglob("*.*"):
        if path.is_file():
            (folder / path.relative_to(source)).write_bytes(path.read_bytes())
    return folder


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


def pickled(folder):
    torch.save(load_file(folder / "ckpts/ss_dec.safetensors"), folder / "ckpts/ss_dec.pt")
    (folder / "ckpts/ss_dec.safetensors").unlink()


def renamed_pickle(folder):
    pickled(folder)
    (folder / "ckpts/ss_dec.pt").rename(folder / "ckpts/ss_dec.safetensors")


def truncated(name, keep):
    def change(folder):
        path = folder / "ckpts" / name
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return change


def top(**changes):
    return lambda folder: edit(folder / "pipeline.json", lambda value: value["args"].update(changes))


def in_models(**changes):
    return lambda folder: edit(folder / "pipeline.json", lambda value: value["args"]["models"].update(changes))


def sampler(**changes):
    return top(slat_sampler={**SAMPLER, **changes})


def arguments(name, **changes):
    def change(folder):
        edit(folder / "ckpts" / f"{name}.json", lambda value: value["args"].update(changes))

    return change


def weights(name, change):
    return lambda folder: edit_weights(folder / "ckpts" / f"{name}.safetensors", change)


NAN = {"mean": [float("nan")] * 8, "std": STD}

BROKEN = {
    "no pipeline.json": (lambda f: (f / "pipeline.json").unlink(), "has no pipeline.json; expected a directory like"),
    "not json": (lambda f: (f / "pipeline.json").write_text("{"), "cannot be read as JSON"),
    "not text": (lambda f: (f / "pipeline.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "a list": (lambda f: (f / "pipeline.json").write_text("[]"), "is not TRELLIS's of an image-to-3D pipeline"),
    "our own": (
        lambda f: edit(f / "pipeline.json", lambda value: value.update(format_version=1)),
        "format_version: Extra inputs are not permitted",
    ),
    "text to 3D": (
        lambda f: edit(f / "pipeline.json", lambda value: value.update(name="TrellisTextTo3DPipeline")),
        "name: Input should be 'TrellisImageTo3DPipeline'",
    ),
    "left over": (top(rembg="u2net"), r"args\.rembg: Extra inputs are not permitted"),
    "no model": (
        lambda f: edit(f / "pipeline.json", lambda value: value["args"]["models"].pop("slat_flow_model")),
        "names no slat_flow_model; found models: slat_decoder_gs",
    ),
    "unknown model": (in_models(slat_decoder_nerf="ckpts/x"), "names unknown models slat_decoder_nerf; known:"),
    "unknown sampler": (sampler(name="HeunSampler"), "unknown sampler 'HeunSampler'; known: FlowEulerSampler"),
    "unknown parameter": (
        sampler(params={"steps": 3, "guidance_strength": 7.5}),
        r"slat_sampler\.params\.guidance_strength: Extra inputs",
    ),
    "parameter of another": (sampler(name="FlowEulerSampler"), "FlowEulerSampler takes no cfg_interval, cfg_strength"),
    "no steps": (sampler(params={"steps": 0}), r"params\.steps: Input should be greater than 0"),
    "empty interval": (sampler(params={"cfg_interval": [0.9, 0.1]}), r"interval must be \(low, high\)"),
    "short statistics": (top(slat_normalization={"mean": [0.0], "std": [1.0]}), "latent_mean has 1 values, expected"),
    "nan statistics": (top(slat_normalization=NAN), r"mean\.0: Input should be a finite number"),
    "unknown condition": (top(image_cond_model="dinov2_vitl14"), "unknown image_cond_model 'dinov2_vitl14'; known:"),
    "outside": (in_models(slat_decoder_gs="../ckpts/slat_dec_gs"), r"'\.\./ckpts/slat_dec_gs' is no path inside"),
    "nowhere": (in_models(slat_decoder_gs=""), "'' is no path inside"),
    "no description": (lambda f: (f / "ckpts/ss_flow.json").unlink(), r"ss_flow\.json is missing"),
    "no weights": (lambda f: (f / "ckpts/slat_flow.safetensors").unlink(), r"slat_flow\.safetensors is missing"),
    "pickle": (pickled, r"ss_dec\.pt is a pickle, which can run any program"),
    "renamed pickle": (renamed_pickle, r"ss_dec\.safetensors is a pickle, which can run any program"),
    "half": (truncated("ss_flow.safetensors", 0.5), r"ss_flow\.safetensors is damaged or truncated"),
    "almost": (truncated("slat_dec_gs.safetensors", 0.999), r"slat_dec_gs\.safetensors is damaged or truncated"),
    "empty": (truncated("slat_flow.safetensors", 0), r"slat_flow\.safetensors is damaged or truncated"),
    "half json": (truncated("slat_flow.json", 0.5), r"slat_flow\.json cannot be read as JSON"),
    "unknown class": (
        lambda f: edit(f / "ckpts/slat_dec_gs.json", lambda value: value.update(name="SLatMeshDecoder")),
        "slat_decoder_gs: cannot load 'SLatMeshDecoder'",
    ),
    "swapped": (in_models(slat_flow_model="ckpts/ss_flow"), "describes a StructureDiT, expected a CrossDiT"),
    "unknown argument": (arguments("slat_flow", window=8), "arguments without a counterpart here: window"),
    "no argument": (
        lambda f: edit(f / "ckpts/ss_flow.json", lambda value: value["args"].pop("resolution")),
        "the arguments of SparseStructureFlowModel lack 'resolution'",
    ),
    "endless": (arguments("slat_flow", num_blocks=10**9), "num_blocks: Input should be less than or equal to 1024"),
    "huge": (arguments("slat_flow", model_channels=1 << 16), "the config asks for a model of more than"),
    "wrong type": (arguments("slat_flow", model_channels="wide", num_heads=None), "are of the wrong type"),
    "other width": (arguments("ss_flow", cond_channels=48), "the weights do not fit the description"),
    "other voxels": (
        arguments("slat_dec_gs", resolution=32),
        "backbone and latent decoder do not fit together: 16 and",
    ),
    "other grid": (arguments("ss_dec", channels=[16, 8]), "ss_dec"),
    "extra tensor": (weights("slat_flow", lambda s: s.update(extra=torch.zeros(2))), "no counterpart for 'extra'"),
    "lost tensor": (weights("ss_dec", lambda s: s.pop("out_layer.2.bias")), "the weights do not fit the description"),
    "nan": (weights("slat_flow", lambda s: s["out_layer.bias"].fill_(float("nan"))), "backbone: .* is not finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sources(name, copy, dino, tmp_path):
    change, message = BROKEN[name]
    change(copy)
    before = torch.random.get_rng_state()
    with pytest.raises(InputError, match=message):
        convert(copy, tmp_path / "new" / "made", str(dino))
    assert not (tmp_path / "new").exists()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_command_refuses_in_one_line(source, dino, tmp_path):
    (tmp_path / "file").write_text("")
    cases = [
        ((tmp_path / "none", tmp_path / "made"), "no such directory; expected a directory like microsoft/TRELLIS"),
        ((source, tmp_path), f"{tmp_path} exists; expected the name of a folder to make"),
    ]
    for command, words in cases:
        result = diff2to3("import-trellis", *command, "--dino", dino)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
        assert words in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_targets_that_cannot_be(source, dino, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file exists; expected the name of a folder to make"):
        convert(source, tmp_path / "file", str(dino))
    with pytest.raises(InputError, match="a file is in the way"):
        convert(source, tmp_path / "file" / "made", str(dino))
    with pytest.raises(InputError, match="a file; expected a directory like"):
        convert(tmp_path / "file", tmp_path / "made", str(dino))
    if os.path.isdir("/proc/self"):  # even root cannot write there
        with pytest.raises(InputError, match="not writable"):
            convert(source, trellis.Path("/proc/made"), str(dino))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_interrupted_half_way(fault, source, dino, tmp_path, monkeypatch):
    """After the first weights are written."""
    save = trellis.save_pipeline

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        raise fault

    monkeypatch.setattr(trellis, "save_pipeline", interrupted)
    expected = InputError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(expected) as raised:
        convert(source, tmp_path / "new" / "made", str(dino))
    assert list(tmp_path.iterdir()) == []
    if expected is InputError:
        assert str(raised.value) == f"{tmp_path / 'new' / 'made'} cannot be written: No space left on device"


def test_what_makes_the_condition(copy, save_dinov2, tmp_path):
    with pytest.raises(InputError, match="no such directory, and not a Hub id such as 'facebook/dinov2-with-registers"):
        convert(copy, tmp_path / "made", str(tmp_path / "none"))
    with pytest.raises(InputError, match="no DINOv2 weights there: expected config"):
        convert(copy, tmp_path / "made", str(copy))
    with pytest.raises(InputError, match="large has 1024 channels, but the flows take 32; choose by --dino"):
        convert(copy, tmp_path / "made")
    with pytest.raises(InputError, match="has 48 channels, but the flows take 32"):
        convert(copy, tmp_path / "made", str(save_dinov2(tmp_path / "other", hidden_size=48, image_size=518)))
    made = convert(copy, tmp_path / "made", "owner/dino")
    assert made.missing.startswith("owner/dino is not on this machine: run 'hf download owner/dino', or name a")
    config = json.loads((tmp_path / "made" / "pipeline.json").read_text())
    assert config["roles"]["feature_extractor"]["config"]["source"] == "owner/dino"
