"""All five stages at the smallest size, and the pipeline that comes out of them."""

import itertools
import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diff2to3._errors import InputError
from diff2to3._locate import locate
from diff2to3._settings import build_settings
from diff2to3._store import read_config
from diff2to3.train._assemble import assemble, unpack
from diff2to3.train._batches import place
from diff2to3.train._checkpoint import load_model
from diff2to3.train._cli import train as cli
from diff2to3.train._data import open_data
from diff2to3.train._engine import train
from diff2to3.train.stages import STAGES, build_stage
from diff2to3.train.stages.structure_vae import dense_occupancy
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file
from smdit import SamplerConfig
from sparse_vae import SparseVAE, SparseVAEConfig

SAMPLING = {
    "threshold": -2.0,
    "structure_sampler": SamplerConfig(steps=2, guidance=1.0),
    "sampler": SamplerConfig(steps=2, guidance=1.0),
}


@pytest.fixture
def trained(micro_config, tmp_path):
    """Run folder with every stage trained for two steps."""
    for name in STAGES:
        config = micro_config(name)
        train(build_stage(name, config), config)
        if name == "vae":  # what `diff2to3 data latents` writes
            path = config.out / "model" / "config.json"
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"latent_mean": [0.0] * 8, "latent_std": [1.0] * 8})
            )
    return tmp_path


def test_the_five_stages_make_a_pipeline_that_generates(trained, tmp_path):
    from diff2to3 import Pipeline

    count = assemble(trained, tmp_path / "pipe", "micro", **SAMPLING)
    pipeline = Pipeline.from_pretrained(tmp_path / "pipe")
    assert pipeline.config.frame == "view-snapped"
    stored = sum(file.stat().st_size for file in (tmp_path / "pipe").glob("*.safetensors"))
    assert stored == pytest.approx(2 * count, rel=0.3)  # fp16
    asset = pipeline(_picture(), seed=1)
    assert len(asset.gaussians) == 2 * len(asset.voxels)


def test_how_the_stages_sample_is_said_when_they_are_put_together(trained, tmp_path):
    command = ["assemble", str(trained), str(tmp_path / "pipe"), "--sampler", "steps=3"]
    for setting in ("method=multistep", "guidance=1.5", "interval=[0.5, 1]"):
        command += ["--structure-sampler", setting]
    outcome = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "pipe" / "pipeline.json").read_text())
    structure = written["roles"]["structure"]["config"]["sampler"]
    assert structure == SamplerConfig(method="multistep", guidance=1.5, interval=(0.5, 1.0)).model_dump(mode="json")
    assert written["sampler"] == SamplerConfig(steps=3, guidance=2.0).model_dump(mode="json")
    for setting, complaint in (
        ("method=midpoint", "--sampler: method"),
        ("steps", "--sampler steps: expected key=value"),
    ):
        with pytest.raises(InputError, match=complaint):
            CliRunner().invoke(cli, [*command, "--sampler", setting], catch_exceptions=False)


def test_the_embedded_pipeline_samples_as_its_training_script_says():
    script = (Path(__file__).parents[2] / "configs" / "tiny" / "train.sh").read_text()
    command = shlex.split(script[script.index("run train assemble") :].replace("\\\n", " "))

    def said(option):
        given = [value for name, value in pairwise(command) if name == option]
        return build_settings({}, given, SamplerConfig, source=option)

    config = read_config(locate(None))
    assert said("--sampler") == config.sampler
    structure = config.roles["structure"].config
    assert said("--structure-sampler") == SamplerConfig.model_validate(structure["sampler"])
    assert float(command[command.index("--threshold") + 1]) == structure["decoder"]["threshold"]


def _picture():
    picture = Image.new("RGBA", (40, 40))
    picture.paste((200, 30, 30, 255), (10, 10, 30, 30))
    return picture


def test_an_unpacked_pipeline_is_trained_on_from(trained, micro_config, tmp_path):
    """Unpacking undoes assembling, and `init` makes the first step start from the unpacked weights."""
    assemble(trained, tmp_path / "pipe", "micro", **SAMPLING)
    stages = unpack(tmp_path / "pipe", tmp_path / "again")
    (tmp_path / "again" / "structure_vae").symlink_to(trained / "structure_vae")
    assemble(tmp_path / "again", tmp_path / "pipe2", "micro", **SAMPLING)
    assert sorted(stages) == ["autoencoder", "flow", "structure_flow", "vae"]
    for file in (tmp_path / "pipe").iterdir():
        assert file.read_bytes() == (tmp_path / "pipe2" / file.name).read_bytes(), file.name

    start = tmp_path / "again" / "flow" / "model"
    config = micro_config("flow", init=start, steps=1, learning_rate=1e-9, out=tmp_path / "more")
    train(build_stage("flow", config), config)
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "more" / "model"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


class MeanConfig(BaseModel):
    latent_channels: int = 8
    condition_channels: int = 48
    grid_size: int = 16


class Mean(torch.nn.Module):
    """Somebody's backbone: a linear map of the latents and the mean of the picture."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.map = torch.nn.Linear(config.latent_channels + config.condition_channels + 1, config.latent_channels)

    def forward(self, x, t, condition):
        whole = torch.cat([condition.mean((1, 2, 3)), t[:, None]], 1)[x.topology.coords[:, 0].long()]
        return x.replace(self.map(torch.cat([x.features, whole], 1)))


class Blocks(torch.nn.Module):
    """Somebody's extractor, without weights: colours of 8 x 8 blocks, four times over."""

    channels, stride, image_size = 12, 8, 32

    def forward(self, images):
        return torch.nn.functional.avg_pool2d(images, 8).repeat(1, 4, 1, 1)

    def tokens(self, feature_map):
        return torch.nn.functional.pixel_unshuffle(feature_map, 2).permute(0, 2, 3, 1)


def test_somebody_s_backbone_and_extractor_become_a_pipeline(trained, micro_config, tmp_path, monkeypatch):
    """Named in the settings of the flows they are trained, put together, loaded by name, and used."""
    import diff2to3
    from diff2to3._plugins import registry

    monkeypatch.setattr(registry(), "components", list(registry().components))
    diff2to3.register(Mean, role="backbone", name="mean", config=MeanConfig)
    diff2to3.register(Blocks, role="feature_extractor", name="blocks")
    options = {"extractor": {"name": "blocks"}, "frame": "canonical"}
    structure = micro_config("structure-flow", options=options)
    structure = structure.model_copy(update={"model": structure.model | {"condition_channels": 48}})
    flow = micro_config("flow", options=options, model={"name": "mean"})
    for stage, config in (("structure-flow", structure), ("flow", flow)):
        train(build_stage(stage, config), config)
    assemble(trained, tmp_path / "pipe", "mine", **SAMPLING, flow=flow)
    pipeline = diff2to3.Pipeline.from_pretrained(tmp_path / "pipe", device="cpu")
    assert (type(pipeline.backbone), type(pipeline.feature_extractor)) == (Mean, Blocks)
    assert pipeline.config.frame == "canonical"
    learned = load_file(trained / "flow" / "model" / "model.safetensors")["map.weight"]
    torch.testing.assert_close(pipeline.backbone.map.weight, learned.half().float())
    assert len(pipeline(_picture(), seed=1).gaussians)
    with pytest.raises(ValueError, match=r"flow.model: no usable config.json for SMDiTConfig"):
        assemble(trained, tmp_path / "other", "mine", **SAMPLING)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 1 << 10, "num_heads": 16}, r"model.safetensors has [\d,]+ bytes, but the config asks for a model"),
        ({"latent_channels": 4}, r"vae.model: .*size mismatch"),
        ({"width": "wide"}, "no usable config.json for SparseVAEConfig"),
    ],
)
def test_a_model_folder_whose_config_is_not_of_its_weights_is_refused(micro_config, change, reason):
    config = micro_config("vae")
    train(build_stage("vae", config), config)
    folder = config.out / "model"
    assert load_model(folder, SparseVAEConfig, SparseVAE).config.width == config.model["width"]
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=reason):
        load_model(folder, SparseVAEConfig, SparseVAE)


def test_stage_two_refuses_a_vae_without_statistics(micro_config):
    for name in ("autoencoder", "vae"):
        config = micro_config(name)
        train(build_stage(name, config), config)
    with pytest.raises(InputError, match="latent statistics are missing"):
        build_stage("flow", micro_config("flow"))


def test_the_decoder_alone_can_go_on_and_leaves_the_latents_as_they_are(micro_config, tmp_path):
    config = micro_config("vae")
    train(build_stage("vae", config), config)
    more = micro_config("vae", parts={"vae": config.out / "model"}, out=tmp_path / "more", learning_rate=1e-2)
    stage = build_stage("vae", more)
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    train(stage, more)
    after = stage.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_the_volume_weight_is_that_of_the_model_s_size_unless_it_is_given(micro_config):
    from sparse_vae import VAELossConfig

    stage = build_stage("vae", micro_config("vae"))
    expected = VAELossConfig.for_model(stage.model_config).model_copy(update={"lpips_weight": 0.0})
    assert stage.weights == expected  # no LPIPS file, no such term
    stage = build_stage("vae", micro_config("vae", options={"volume_weight": 7.0, "ssim_weight": 0.5}))
    assert stage.weights == expected.model_copy(update={"volume_weight": 7.0, "ssim_weight": 0.5})


def test_autoencoder_statistics_normalise_the_features(micro_config):
    config = micro_config("autoencoder", steps=4)
    stage = build_stage("autoencoder", config)
    train(stage, config)
    settings = json.loads((config.out / "model" / "config.json").read_text())
    assert len(settings["channel_mean"]) == len(settings["channel_std"]) == 16
    assert min(settings["channel_std"]) > 0


def test_structure_statistics_are_those_of_the_kept_weights_on_the_training_objects(micro_config):
    config = micro_config("structure-vae", steps=3)
    stage = build_stage("structure-vae", config)
    train(stage, config)
    settings = json.loads((config.out / "model" / "config.json").read_text())
    data = stage.batches(config, "train", torch.device("cpu")).data
    latents = []
    for mirror, turn in itertools.product(range(2), range(4)):
        coords, batch = data.voxels(torch.arange(2))
        coords = place(coords, batch, *(torch.full((2,), v) for v in (mirror, turn)), 16)
        latents.append(stage.model.encode(dense_occupancy(coords, 2, 16))[0])
    values = torch.cat(latents).detach().transpose(0, 1).flatten(1)  # every placement of every object, once
    mean, std = values.mean(1), values.std(1)
    assert ((torch.tensor(settings["latent_mean"]) - mean).abs() < 0.1 * std).all()
    assert torch.tensor(settings["latent_std"]).tolist() == pytest.approx(std.tolist(), rel=0.1)


@pytest.mark.parametrize("streaming", [False, True])
def test_structure_latents_are_those_of_the_placed_voxels(trained, micro_config, streaming):
    """Held data are encoded once for every turn and mirror image, and looked up; streamed ones in every step."""
    config = micro_config("structure-flow", batch_size=2, streaming=streaming)
    stage = build_stage("structure-flow", config)
    batches = stage.batches(config, "train", torch.device("cpu"))
    data = open_data(config, "train", ("voxels",), torch.device("cpu"))
    for step in range(6):
        batch = batches[step]
        stage.prepare(batch)
        coords, owner = data.voxels(batch["object"])
        coords = place(coords, owner, batch["mirror"], batch["turn"], stage.vae_grid)
        expected = stage._encode(coords, config.batch_size)
        assert torch.allclose(batch["latents"].float(), expected, atol=4e-3, rtol=2e-3)
