"""Helpers of the smdit tests."""

import json

import pytest
import torch
from sparse_vae import SparseTensor


class GoldenCase:
    """One stored case: its description, tensors by prefix, and the comparison within its tolerance."""

    def __init__(self, path):
        load_file = pytest.importorskip("safetensors.torch").load_file
        self.name = path.stem
        self.spec = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))

    def part(self, prefix):
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    @property
    def args(self):
        return self.spec["kwargs"]

    def check(self, got, name):
        tolerance = self.spec["tolerance"]
        torch.testing.assert_close(
            got,
            self.tensors[f"output.{name}"],
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            msg=lambda text: f"{self.name} {name}: {text}",
        )


@pytest.fixture(scope="session")
def golden_cases(golden_dir):
    """Function from a name prefix to all stored cases with it."""

    def load(prefix):
        paths = sorted(path for path in golden_dir.glob(f"{prefix}*.json"))
        assert paths, f"no case {prefix}* in {golden_dir}"
        return [GoldenCase(path) for path in paths]

    return load


def random_voxels(lengths, grid_size, channels=8, seed=0):
    """Random latents on random voxels, `lengths[b]` of them in object b."""
    generator = torch.Generator().manual_seed(seed)
    coords = []
    for length in lengths:
        cells = torch.randperm(grid_size**3, generator=generator)[:length]
        coords.append(torch.stack([cells // grid_size**2, cells // grid_size % grid_size, cells % grid_size], 1).int())
    features = [torch.randn(length, channels, generator=generator) for length in lengths]
    return SparseTensor.from_coords(coords, features, grid_size)


def awaken(model, seed=0):
    """Give every zero-initialised weight a random value, so that no path of the model is silent."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded_models():
    """Models draw their first weights from the global generator: every test starts it anew."""
    torch.manual_seed(0)


@pytest.fixture
def make_voxels():
    return random_voxels


@pytest.fixture
def awake():
    return awaken
