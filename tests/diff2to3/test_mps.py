"""Apple's MPS: on an emulated device everywhere, on a real one where there is one."""

import pytest
import torch
from diff2to3 import Pipeline
from diff2to3._device import default_device, usable_device
from diff2to3._errors import InputError
from emulated_mps import MPS, EmulatedMps
from flux_features import FluxFeatures, FluxFeaturesConfig
from gs_render import Camera, Gaussians, render
from marope import MARoPE
from PIL import Image, ImageDraw

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mps(monkeypatch):
    """The emulated device, without gradients."""
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    with torch.no_grad(), EmulatedMps() as mode:
        yield mode


def ball():
    image = Image.new("RGBA", (96, 80))
    ImageDraw.Draw(image).ellipse((20, 10, 70, 60), fill=(200, 30, 40, 255))
    return image


def test_the_embedded_pipeline(mps, tmp_path):
    """From picture to files: nothing that MPS lacks, all on the device, and the result of the CPU."""
    pipeline = Pipeline.from_pretrained(device=MPS)
    assert {parameter.device.type for parameter in pipeline.backbone.parameters()} == {"mps"}
    asset = pipeline(ball(), steps=1, seed=2)
    assert asset.gaussians.device.type == "mps"
    expected = Pipeline.from_pretrained(device="cpu")(ball(), steps=1, seed=2)
    torch.testing.assert_close(asset.gaussians.means.cpu(), expected.gaussians.means, atol=1e-5, rtol=0)
    camera = Camera.orbit(num_views=1, size=48)
    drawn = asset.render(camera)
    assert drawn.color.device.type == "mps"
    torch.testing.assert_close(drawn.color.cpu(), expected.render(camera).color, atol=1e-4, rtol=0)
    for suffix in ("ply", "spz", "html"):
        asset.save(tmp_path / f"ball.{suffix}")
    assert {"convolution", "native_layer_norm", "addmm", "sort.stable"} <= mps.used


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_with_one_model_at_a_time(mps, micro_pipeline, dtype):
    pipeline = Pipeline.from_pretrained(micro_pipeline, device=MPS, dtype=dtype, low_vram=True)
    assert {parameter.device.type for parameter in pipeline.backbone.parameters()} == {"cpu"}
    gaussians = pipeline(ball(), steps=1).gaussians
    assert (gaussians.device.type, gaussians.means.dtype) == ("mps", torch.float32)


def test_parts_that_the_pipeline_does_not_use(mps):
    """Large pictures in tiles, turned harmonics, the oracle renderer, stretched rotary positions."""
    extractor = FluxFeatures(FluxFeaturesConfig(image_size=64, architecture="kl", block_channels=(32, 32, 32, 32)))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = extractor(picture, tile=32)
    found = extractor.to(MPS)(picture.to(MPS), tile=32)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)

    fields = (torch.zeros(2, 3), torch.full((2, 3), 0.2), torch.tensor([[1.0, 0, 0, 0]] * 2), torch.ones(2))
    here = Gaussians(*fields, sh=torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(1)))
    there = here.to(MPS)
    turn = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    torch.testing.assert_close(there.transform(rotation=turn).sh.cpu(), here.transform(rotation=turn).sh)
    camera = Camera.orbit(num_views=1, size=16)
    drawn = render(there, camera, backend="torch").color
    torch.testing.assert_close(drawn.cpu(), render(here, camera, backend="torch").color)

    rope = MARoPE(head_dim=12, grid_size=4)
    q = torch.rand(1, 6, 2, 12, generator=torch.Generator().manual_seed(2))
    turned, _ = rope(q.to(MPS), q.to(MPS), rope.plane(2, 3).to(MPS))
    torch.testing.assert_close(turned.cpu(), rope(q, q, rope.plane(2, 3))[0])


def test_the_emulation_refuses_what_mps_refuses(mps):
    there = torch.ones(3, device=MPS)
    for refused in (lambda: there.double(), lambda: torch.zeros(2, dtype=torch.float64, device=MPS)):
        with pytest.raises(TypeError, match="float64"):
            refused()
    with pytest.raises(AssertionError, match=r"add\.Tensor: expected all tensors on one device"):
        there + torch.ones(3)
    with pytest.raises(AssertionError, match="a generator of the CPU"):
        torch.rand(3, device=MPS, generator=torch.Generator())
    with pytest.raises(AssertionError, match="linalg_eig is not implemented for MPS"):
        torch.linalg.eig(torch.ones(2, 2, device=MPS))
    in_place = there.add_(1)
    assert in_place is there
    assert there.cpu().tolist() == [2, 2, 2]


def test_it_is_the_default_where_there_is_no_cuda(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert default_device().type == expected


needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="NO MPS: this is no Apple computer")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is one")
def test_where_there_is_none_it_is_refused():
    with pytest.raises(InputError, match=r"device 'mps' cannot be used .* expected for example 'c"):
        usable_device("mps")


@needs_mps
@pytest.mark.parametrize("low_vram", [False, True])
def test_on_a_real_device(low_vram):
    camera = Camera.orbit(num_views=2, size=64)
    there = Pipeline.from_pretrained(device="mps", low_vram=low_vram)(ball(), steps=2)
    here = Pipeline.from_pretrained(device="cpu")(ball(), steps=2)
    assert float((there.render(camera).color.cpu() - here.render(camera).color).abs().mean()) < 1e-2


@needs_mps
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_a_real_device(micro_pipeline, dtype):
    asset = Pipeline.from_pretrained(micro_pipeline, device="mps", dtype=dtype)(ball(), steps=1)
    assert bool(torch.isfinite(asset.gaussians.means).all())
