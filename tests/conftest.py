"""Options and fixtures of the whole test suite."""

import os
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: each has a core, and PyTorch reads this when imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # a loaded machine is no failure
settings.load_profile("suite")


def pytest_addoption(parser):
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    parser.addoption("--golden", default=str(default), help="folder with tensors of the reference implementation")


@pytest.fixture(scope="session")
def golden_dir(request):
    """Folder of the stored tensors that tests marked `golden` compare with."""
    folder = Path(request.config.getoption("--golden"))
    if not folder.is_dir():
        pytest.skip(f"NO GOLDEN DATA: {folder} does not exist; give its place with --golden DIR")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """Models this small are slower on several threads, worst on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def interpret():
    """Runs a test file as a script in Triton's interpreter, which must be chosen before Triton is imported."""
    pytest.importorskip("triton", reason="NOT TESTED: Triton is not installed")

    def run(file):
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=250)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "all interpreted cases agree" in result.stdout

    return run


@pytest.fixture(scope="session")
def save_dinov2():
    """Writes a network of DINOv2's shape with random weights, 4 x 4 patches of 14 px, as transformers saves it."""
    import torch
    import transformers

    def save(folder, seed=1, **options):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
        config = transformers.Dinov2WithRegistersConfig(**{"patch_size": 14, **sizes, **options})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.Dinov2WithRegistersModel(config)
            for parameter in model.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def mesh_renderer():
    """Opens a renderer of meshes by name, once; skips the test where it does not work."""
    from diff2to3._errors import ComponentError, ComponentNotFoundError
    from diff2to3._plugins import MESH_RENDERER, build

    opened = {}

    def open_by_name(name):
        try:
            if name not in opened:
                opened[name] = build(MESH_RENDERER, name)
        except (ComponentError, ComponentNotFoundError) as error:
            pytest.skip(f"NO RENDERER {name}: {error}")
        return opened[name]

    return open_by_name


@pytest.fixture(scope="session")
def micro_pipeline(tmp_path_factory):
    """Directory of a complete pipeline of the smallest size, with weights from a fixed seed: nonsense, but lively."""
    return build_micro_pipeline(tmp_path_factory.mktemp("micro"))


def build_micro_pipeline(folder):
    """Write the pipeline; the tests of the pipeline check plumbing, not looks, so its weights need no training."""
    import torch
    from diff2to3 import PipelineConfig, save_pipeline
    from flux_features import FluxFeatures, FluxFeaturesConfig
    from smdit import SamplerConfig, SMDiT, SMDiTConfig, StructureFlow, StructureFlowConfig
    from sparse_vae import GaussianConfig, GaussianDecoder, SparseVAEConfig, StructureVAEConfig

    grid = 16
    small = {"width": 32, "num_heads": 2, "head_dim": 16, "num_double_blocks": 1, "num_single_blocks": 1}
    structure_vae = StructureVAEConfig(
        grid_size=grid, latent_channels=4, encoder_channels=(8, 8), decoder_channels=(8, 8), num_middle_blocks=1
    )
    vae = {"grid_size": grid, "width": 32, "num_blocks": 1, "num_heads": 2, "window_size": 4}
    configs = {
        "feature_extractor": FluxFeaturesConfig(image_size=64),
        "structure": StructureFlowConfig(
            flow=SMDiTConfig(latent_channels=4, grid_size=8, **small),
            decoder=structure_vae,
            sampler=SamplerConfig(steps=2),
        ),
        "backbone": SMDiTConfig(grid_size=grid, io_channels=(16,), **small),
        "latent_decoder": SparseVAEConfig(
            gaussians=GaussianConfig(num_gaussians=2, scale_bias=0.03, min_scale=0.004),
            latent_mean=(0.1,) * 8,
            latent_std=(1.5,) * 8,
            **vae,
        ),
    }
    models = {
        "feature_extractor": FluxFeatures,
        "structure": StructureFlow,
        "backbone": SMDiT,
        "latent_decoder": GaussianDecoder,
    }
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        modules = {role: model(configs[role]) for role, model in models.items()}
    for module in (modules["structure"], modules["backbone"], modules["latent_decoder"]):
        for parameter in module.parameters():  # layers that start at zero would hide the condition
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    _occupy_a_tenth(modules["structure"], generator)
    names = {
        "feature_extractor": "flux",
        "structure": "structure-flow",
        "backbone": "smdit",
        "latent_decoder": "gaussian",
    }
    roles = {role: {"name": names[role], "config": config.model_dump(mode="json")} for role, config in configs.items()}
    save_pipeline(folder, PipelineConfig(name="micro", roles=roles, sampler=SamplerConfig(steps=2)), modules)
    return folder


def _occupy_a_tenth(structure, generator):
    """Shift the last bias so that the untrained decoder finds about a tenth of the voxels occupied."""
    import torch

    with torch.no_grad():
        size, channels = structure.latent_size, structure.config.decoder.latent_channels
        logits = structure.decoder(torch.randn(4, channels, size, size, size, generator=generator))
        structure.decoder.output_layer[-1].bias -= logits.flatten().kthvalue(int(logits.numel() * 0.9)).values
