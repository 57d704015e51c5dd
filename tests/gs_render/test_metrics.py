"""PSNR, SSIM and LPIPS: against their definitions, published values and the ways they can lose precision."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gs_render.metrics import LPIPS, psnr, ssim
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "weights"
FILES = {"vgg": "lpips_vgg16_fp16.safetensors", "alex": "lpips_alexnet.safetensors"}


pytestmark = pytest.mark.usefixtures("one_thread")


def pair(*shape, seed=0, noise=0.1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(shape, generator=generator, dtype=dtype)
    return image, (image + noise * torch.randn(shape, generator=generator, dtype=dtype)).clamp(0, 1)


def slow_ssim(image, target, window, sigma):
    """The formula of Wang et al., a window at a time, with variances as sums of squared deviations."""
    taps = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    kernel = torch.exp(-(taps[:, None] ** 2 + taps**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    values = []
    for i in range(image.shape[1] - window + 1):
        for j in range(image.shape[2] - window + 1):
            for channel in range(3):
                x = image[channel, i : i + window, j : j + window]
                y = target[channel, i : i + window, j : j + window]
                mean_x, mean_y = (kernel * x).sum(), (kernel * y).sum()
                var_x, var_y = (kernel * (x - mean_x) ** 2).sum(), (kernel * (y - mean_y) ** 2).sum()
                covariance = (kernel * (x - mean_x) * (y - mean_y)).sum()
                luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
                values.append(luminance * (2 * covariance + 9e-4) / (var_x + var_y + 9e-4))
    return torch.stack(values).mean()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.floats(0, 1), window=st.sampled_from([3, 11]), sigma=st.floats(0.8, 3))
def test_ssim_is_the_formula(seed, noise, window, sigma):
    image, target = pair(1, 3, 13, 12, seed=seed, noise=noise, dtype=torch.float64)
    expected = torch.stack([slow_ssim(x, y, window, sigma) for x, y in zip(image, target, strict=True)])
    torch.testing.assert_close(ssim(image, target, window, sigma), expected, atol=1e-10, rtol=0)


def test_ssim_of_torchmetrics_example():
    """The figure in the documentation of torchmetrics (window 11, sigma 1.5), whose border is cut off as here."""
    torch.manual_seed(42)
    image = torch.rand(3, 3, 256, 256)
    assert float(ssim(image, image * 0.75).mean()) == pytest.approx(0.9219, abs=2e-4)


def test_ssim_known_cases():
    image, _ = pair(1, 3, 32, 32)
    assert float(ssim(image, image)) == pytest.approx(1.0, abs=1e-6)
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert float(ssim(black, white)) == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-3)
    with pytest.raises(ValueError, match=r"\(1, 3, 10, 32\), expected sides of at least window = 11"):
        ssim(image[:, :, :10], image[:, :, :10])


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_float32_whatever_surrounds_it(metric):
    """Autocast changes nothing; half-precision pictures are widened, not the other way round."""
    image, target = pair(2, 3, 32, 24)
    expected = metric(image, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metric(image, target), expected)
        assert metric(image.double(), target.double()).dtype == torch.float64
    half = metric(image.half(), target.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, metric(image.half().float(), target.half().float()))


def test_psnr():
    image = torch.full((3, 3, 4, 4), 0.5)
    target = torch.stack([image[0], image[0] + 0.1, image[0] + 0.5])
    torch.testing.assert_close(psnr(image, target), torch.tensor([100.0, 20.0, 20 * torch.tensor(2.0).log10()]))
    assert psnr(image[:1], image[:1] + 1e-7).item() == 100.0


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_differentiable(metric):
    image, target = pair(2, 3, 12, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: metric(x, target), image.requires_grad_())
    same = target.clone().requires_grad_()
    metric(same, target).sum().backward()
    assert torch.isfinite(same.grad).all()


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    "shapes", [((1, 3, 16, 16), (1, 3, 16, 17)), ((3, 16, 16), (3, 16, 16)), ((1, 4, 16, 16),) * 2]
)
def test_refuses_what_cannot_be_compared(metric, shapes):
    with pytest.raises(ValueError, match=r"expected two batches of pictures \[B, 3, H, W\] of one size, got"):
        metric(*(torch.zeros(shape) for shape in shapes))


def test_pictures_of_a_batch_are_independent():
    image, target = pair(3, 3, 16, 16)
    for metric in (psnr, ssim):
        alone = torch.cat([metric(image[i : i + 1], target[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(metric(image, target), alone)


@pytest.fixture(scope="module", params=["vgg", "alex"])
def lpips(request):
    path = WEIGHTS / FILES[request.param]
    if not path.is_file():
        pytest.skip(f"NO REAL WEIGHTS: {path} does not exist")
    return LPIPS(path, request.param)


def test_lpips_real_weights(lpips):
    image, target = pair(2, 3, 64, 64)
    assert lpips(image, image).tolist() == [0.0, 0.0]
    distance = lpips(image, target)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    assert (lpips(image, pair(2, 3, 64, 64, noise=0.4)[1]) > distance).all()
    torch.testing.assert_close(distance, lpips(target, image))
    alone = torch.cat([lpips(image[i : i + 1], target[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(distance, alone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lpips(image, target).dtype == torch.float32
    assert not any(p.requires_grad for p in lpips.parameters())


# Architectures as their papers give them: (kernel, stride, padding) of a convolution and its ReLU, or a pool's kernel.
TWINS = {
    "vgg": [*[(3, 1, 1)] * 2, 2, *[(3, 1, 1)] * 2, 2, *[(3, 1, 1)] * 3, 2, *[(3, 1, 1)] * 3, 2, *[(3, 1, 1)] * 3],
    "alex": [(11, 4, 2), 3, (5, 1, 2), 3, (3, 1, 1), (3, 1, 1), (3, 1, 1)],
}


@pytest.mark.parametrize("backbone", ["vgg", "alex"])
def test_lpips_is_the_formula(backbone):
    """Features after each block (VGG) or layer (AlexNet): unit length, squared difference, weighted mean, sum."""
    path = WEIGHTS / FILES[backbone]
    if not path.is_file():
        pytest.skip(f"NO REAL WEIGHTS: {path} does not exist")
    tensors = {name: value.float() for name, value in load_file(path).items()}
    image, target = pair(1, 3, 70, 64, noise=0.2)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    states = [((2 * x[0].movedim(0, 2) - 1 - shift) / scale).movedim(2, 0)[None] for x in (image, target)]
    index, total, taps = 0, 0.0, []
    layers = TWINS[backbone]
    for step, layer in enumerate(layers):
        if isinstance(layer, int):
            states = [F.max_pool2d(x, layer, 2) for x in states]
            index += 1
            continue
        kernel, stride, padding = layer
        weight, bias = tensors[f"features.{index}.weight"], tensors[f"features.{index}.bias"]
        assert weight.shape[-1] == kernel
        states = [F.conv2d(x, weight, bias, stride, padding).relu() for x in states]
        index += 2
        if backbone == "alex" or step + 1 == len(layers) or isinstance(layers[step + 1], int):
            taps.append(states)
    assert len(taps) == 5
    for level, (x, y) in enumerate(taps):
        difference = (F.normalize(x, eps=1e-10) - F.normalize(y, eps=1e-10)).square()
        total += float((difference * tensors[f"lin{level}.model.1.weight"]).sum(1).mean())
    assert float(LPIPS(path, backbone)(image, target)) == pytest.approx(total, rel=1e-5)


def test_lpips_of_noise():
    """torchmetrics documents 0.3493 for ten pairs of noise; draws of other seeds differ by 0.004."""
    path = WEIGHTS / FILES["vgg"]
    if not path.is_file():
        pytest.skip(f"NO REAL WEIGHTS: {path} does not exist")
    model, generator = LPIPS(path), torch.Generator().manual_seed(123)
    first, second = torch.rand(2, 10, 3, 100, 100, generator=generator)
    assert float(model(first, second).mean()) == pytest.approx(0.3493, abs=0.006)


def test_lpips_gradient(lpips):
    """In float64 the gradient is that of finite differences along a direction, and finite for identical pictures."""
    model = deepcopy(lpips).double()
    image, target = pair(1, 3, 64, 64, dtype=torch.float64)
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    image.requires_grad_()
    [gradient] = torch.autograd.grad(model(image, target).sum(), image)
    with torch.no_grad():
        step = 1e-8  # ReLUs and pools have kinks close by
        difference = (model(image + step * direction, target) - model(image - step * direction, target)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-3)
    [gradient] = torch.autograd.grad(model(image, image.detach()).sum(), image)
    assert torch.isfinite(gradient).all()


def test_lpips_errors(tmp_path):
    with pytest.raises(ValueError, match="no LPIPS backbone 'squeeze'; expected one of vgg, alex"):
        LPIPS(tmp_path / "x", "squeeze")
    with pytest.raises(FileNotFoundError, match="no such file; LPIPS needs the weights of vgg"):
        LPIPS(tmp_path / "x.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        LPIPS(tmp_path / "bad.safetensors", "alex")
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"(?s)not LPIPS alex weights .*lin0\.model\.1\.weight"):
        LPIPS(tmp_path / "part.safetensors", "alex")


def test_lpips_knows_its_layouts():
    """Names and number of the tensors of both files."""
    for backbone, count in (("vgg", 31), ("alex", 15)):
        path = WEIGHTS / FILES[backbone]
        if not path.is_file():
            pytest.skip(f"NO REAL WEIGHTS: {path} does not exist")
        assert len(load_file(path)) == count == len(LPIPS(path, backbone).state_dict())
