"""FD, KD, SSIM and LPIPS against other implementations on the same tensors, and against closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diff2to3._errors import InputError
from diff2to3.eval._distances import frechet_distance, kernel_distance, similarity
from diff2to3.eval._networks import open_networks
from gs_render.metrics import LPIPS, psnr, ssim

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "weights"


def features(count, width, seed, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (count, width))).float()


def test_distances_agree_with_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    real, made = features(200, 16, 0), features(200, 16, 1, shift=0.4)
    statistics = [fid.fid_features_to_statistics(x) for x in (real, made)]
    [expected] = fid.fid_statistics_to_metric(*statistics, verbose=False).values()
    assert frechet_distance(real, made) == pytest.approx(expected, rel=1e-5)
    options = {"kid_subsets": 1, "kid_subset_size": 200, "kid_kernel": "poly", "verbose": False, "rng_seed": 0}
    found = kid.kid_features_to_metric(real, made, **options)
    assert kernel_distance(real, made) == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-5)


def test_distances_of_known_gaussians():
    """Equal covariances: the squared distance of the means. One set with itself: zero, and nothing is drawn."""
    real = features(4000, 3, 2)
    state = torch.random.get_rng_state()
    assert frechet_distance(real, real + torch.tensor([3.0, 0, 4])) == pytest.approx(25, rel=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
    turned = kernel_distance(real[:50].flip(0), real[50:100])
    assert kernel_distance(real[:50], real[50:100]) == pytest.approx(turned, rel=1e-9)
    assert torch.equal(state, torch.random.get_rng_state())


def test_kernel_distance_is_the_formula():
    x, y = features(7, 4, 3).double(), features(7, 4, 4).double()
    kernel = lambda a, b: float((a @ b / 4 + 1) ** 3)  # noqa: E731
    own = [kernel(z[i], z[j]) for z in (x, y) for i in range(7) for j in range(7) if i != j]
    cross = [kernel(a, b) for a in x for b in y]
    assert kernel_distance(x, y) == pytest.approx(sum(own) / 42 - 2 * sum(cross) / 49, rel=1e-9)


def test_similarity():
    first = torch.tensor([[1.0, 0], [1, 1], [2, 0]])
    second = torch.tensor([[0.0, 3], [1, 0], [5, 0]])
    torch.testing.assert_close(similarity(first, second), torch.tensor([0.0, 70.710678, 100]))


def test_picture_figures_agree_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(2, 3, 48, 40, generator=generator)
    target = (image + 0.2 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    expected = functional.peak_signal_noise_ratio(image, target, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(image, target), expected, rtol=1e-5, atol=0)
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, everywhere = functional.structural_similarity_index_measure(image, target, **options)
    # torchmetrics counts the border too, where it mirrors the picture; as Wang et al. we take whole windows alone
    torch.testing.assert_close(ssim(image, target), everywhere[..., 5:-5, 5:-5].mean((1, 2, 3)), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("net", "file"), [("vgg", "lpips_vgg16_fp16"), ("alex", "lpips_alexnet")])
def test_lpips_agrees_with_its_own_package(net, file):
    package = pytest.importorskip("lpips")
    path = WEIGHTS / f"{file}.safetensors"
    if not path.is_file():
        pytest.skip(f"NO REAL WEIGHTS: {path} does not exist")
    ours = LPIPS(path, net)
    theirs = package.LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False).eval()
    trunk = [layer for name, layer in theirs.net.named_modules() if isinstance(layer, torch.nn.Conv2d)]
    for own, other in zip((x for x in ours.features if isinstance(x, torch.nn.Conv2d)), trunk, strict=True):
        other.load_state_dict(own.state_dict())
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(2, 3, 64, 64, generator=generator)
    target = (image + 0.2 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    with torch.no_grad():
        expected = theirs(image, target, normalize=True).flatten()
    torch.testing.assert_close(ours(image, target), expected, rtol=1e-4, atol=1e-6)


def test_networks_from_directories(tmp_path):
    """Small networks of the real kinds: a row a picture, the same on its own as in a batch."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**size, mlp_ratio=2, image_size=224))
    clip = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**size, intermediate_size=64, projection_dim=24, patch_size=32)
    )
    dino.save_pretrained(tmp_path / "dino")
    clip.save_pretrained(tmp_path / "clip")
    networks = open_networks({"dinov2": tmp_path / "dino", "clip": tmp_path / "clip"})
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    for name, width in (("dinov2", 32), ("clip", 24)):
        found = networks[name](pictures)
        assert found.shape == (3, width)
        torch.testing.assert_close(networks[name](pictures[1:2]), found[1:2], rtol=1e-4, atol=1e-5)


def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    """Weights are random here: what counts is that the same network sees the same bytes."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patched:
        patched.setattr(inception, "load_state_dict_from_url", lambda *args, **options: {})
        patched.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        plain = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(plain.state_dict(), tmp_path / "inception.pth")
    network = open_networks({"inception": tmp_path / "inception.pth"})["inception"]
    pictures = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(8))
    [expected] = plain(pictures.mul(255).round().byte())
    torch.testing.assert_close(network(pictures), expected.float())


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["vgg", "inception", "dinov2", "clip"])
def test_a_pickle_is_not_run(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder, trace = tmp_path / "weights", tmp_path / "ran"
    folder.mkdir()
    if name in ("vgg", "inception"):
        source = folder / {"vgg": "a.safetensors", "inception": "a.pth"}[name]
        torch.save({"a": Bomb(trace)}, source)
    else:
        source = folder
        kind = {"dinov2": transformers.Dinov2Config, "clip": transformers.CLIPVisionConfig}[name]
        kind(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
        torch.save({"a": Bomb(trace)}, folder / "pytorch_model.bin")
    reason = "Weights only load failed" if name == "inception" else "is a pickle, which can run any program"
    with pytest.raises(InputError, match=reason) as error:
        open_networks({name: source})
    assert "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["vgg", "inception", "dinov2", "clip"])
def test_missing_weights_are_one_line(tmp_path, name):
    with pytest.raises(InputError, match=rf"^{name} weights .*nothing.*expected ") as error:
        open_networks({name: str(tmp_path / "nothing" / "here" / "at" / "all")})
    assert "\n" not in str(error.value)
