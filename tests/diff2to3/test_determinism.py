"""Claims of docs/determinism.md that no other test shows, and that the page names tests that there are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diff2to3 import Pipeline
from gs_render import Camera
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "determinism.md"


def picture(shift=0, size=96):
    image = Image.new("RGBA", (size, size))
    ImageDraw.Draw(image).ellipse((20 + shift, 10 + shift, 60 + shift, 60 + shift), fill=(200, 30, 40, 255))
    return image


@pytest.fixture(scope="module")
def pipeline(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu")


def tensors(asset):
    g = asset.gaussians
    return asset.voxels, g.means, g.scales, g.quaternions, g.opacities, g.sh


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_page_names_tests_that_there_are():
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", PAGE.read_text())
    assert len(named) >= 12
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    assert all("::" in row for row in rows if not row.startswith("| what")), "a claim without a test"


def test_another_run_in_the_same_process(pipeline):
    first = pipeline(picture(), seed=1)
    pipeline(picture(10), seed=2)
    torch.rand(5)  # the global generator is neither used nor moved
    assert same(pipeline(picture(), seed=1), first)


CODE = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
from diff2to3 import Pipeline
asset = Pipeline.from_pretrained(sys.argv[1], device="cpu")(sys.argv[2], seed=1)
g = asset.gaussians
torch.save([asset.voxels, g.means, g.scales, g.quaternions, g.opacities, g.sh], sys.argv[4])
"""


def test_other_processes_and_numbers_of_threads(micro_pipeline, tmp_path):
    """Two processes of one thread agree in every bit, and one of two threads up to rounding."""
    picture().save(tmp_path / "p.png")
    found = []
    for number, threads in enumerate((1, 1, 2)):
        out = tmp_path / f"{number}.pt"
        arguments = [str(part) for part in (micro_pipeline, tmp_path / "p.png", threads, out)]
        subprocess.run([sys.executable, "-c", CODE, *arguments], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
        found.append(torch.load(out, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert torch.equal(found[0][0], found[2][0])
    for a, b in zip(found[0][1:], found[2][1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_embedded_pipeline_with_other_numbers_of_threads():
    """Sums are divided otherwise: the same voxels, and the Gaussians up to rounding; not the same bits."""
    pipeline, threads = Pipeline.from_pretrained(device="cpu"), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(pipeline(ROOT / "examples" / "chair.png", seed=0, steps=1))
    finally:
        torch.set_num_threads(threads)
    one, other = (tensors(asset) for asset in found)
    assert torch.equal(one[0], other[0])
    for a, b in zip(one[1:], other[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_sample_does_not_depend_on_the_others(pipeline):
    """Nor does an object on its place in a batch, up to rounding."""
    alone = pipeline(picture(), seed=1, sample=2)
    pipeline(picture(), seed=1, sample=0)
    assert same(pipeline(picture(), seed=1, sample=2), alone)
    others = [picture(20), picture(30)]
    for place in range(3):
        batch = [*others[:place], picture(), *others[place:]]
        found = pipeline.batch(batch, seed=1, sample=2)[place]
        assert torch.equal(found.voxels, alone.voxels)
        torch.testing.assert_close(found.gaussians.means, alone.gaussians.means, atol=1e-4, rtol=0)


def test_renderers_of_the_cpu_agree(pipeline):
    """Backends of one package differ by rounding: here Numba's and PyTorch's."""
    from gs_render import render

    gaussians, cameras = pipeline(picture(), seed=1).gaussians, Camera.orbit(num_views=2, size=48)
    one, other = (render(gaussians, cameras, 1.0, backend=name).color for name in ("cpu", "torch"))
    torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


@pytest.mark.gpu
def test_noise_is_the_same_on_every_device(pipeline, micro_pipeline):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    voxels = [torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)]
    there = Pipeline.from_pretrained(micro_pipeline, device="cuda").initial_noise(voxels, seed=3)
    assert torch.equal(there.features.cpu(), pipeline.initial_noise(voxels, seed=3).features)
