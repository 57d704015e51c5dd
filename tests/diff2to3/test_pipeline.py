"""The pipeline: reproducible, batched, from several pictures, with parts replaced, saved and loaded."""

import diff2to3
import numpy as np
import pytest
import torch
from diff2to3 import Pipeline
from diff2to3._errors import ComponentError, ComponentNotFoundError, ImageInputError, InputError
from diff2to3._matting import BorderMatting
from diff2to3._plugins import registry
from gs_render import Camera
from PIL import Image, ImageDraw

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline(micro_pipeline):
    return Pipeline.from_pretrained(micro_pipeline, device="cpu")


def picture(shape="ellipse", colour=(200, 30, 40), mode="RGBA"):
    image = Image.new("RGBA", (96, 80), (0, 0, 0, 0) if mode == "RGBA" else (255, 255, 255, 255))
    getattr(ImageDraw.Draw(image), shape)((20, 10, 70, 60), fill=(*colour, 255))
    return image.convert(mode)


BALL, BOX = picture(), picture("rectangle", (20, 180, 60))


def same(a, b):
    return len(a.gaussians) == len(b.gaussians) and torch.equal(a.gaussians.means, b.gaussians.means)


def test_same_seed_same_bytes(pipeline, tmp_path):
    first, second = pipeline(BALL, seed=3), pipeline(BALL, seed=3)
    first.save(tmp_path / "a.ply")
    second.save(tmp_path / "b.ply")
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    assert (tmp_path / "a.ply").stat().st_mode & 0o044  # readable by others, as any new file
    assert len(first.gaussians) == 2 * len(first.voxels)


def test_seed_sample_and_picture_matter(pipeline):
    base = pipeline(BALL, seed=0)
    for other in (pipeline(BALL, seed=1), pipeline(BALL, seed=0, sample=1), pipeline(BOX, seed=0)):
        assert not same(base, other)
    assert same(pipeline(BALL, seed=0, sample=1), pipeline(BALL, seed=0, sample=1))


def test_steps_and_guidance_matter(pipeline):
    base = pipeline(BALL)
    assert same(base, pipeline(BALL, steps=2, guidance=5.0))  # the settings of the pipeline
    assert not same(base, pipeline(BALL, steps=3))
    assert not same(base, pipeline(BALL, guidance=1.0))


def test_stages_one_by_one_are_the_whole(pipeline):
    options = {"seed": 5, "sample": 1, "steps": 3, "guidance": 1.5}
    condition = pipeline.encode([[BALL], [BOX]])
    calls = []
    voxels = pipeline.find_voxels(condition, **options, callback=lambda *call: calls.append(call))
    latents = pipeline.fill_voxels(voxels, condition, **options, callback=lambda *call: calls.append(call))
    objects = pipeline.decode(latents)
    for asset, gaussians, coords in zip(pipeline.batch([BALL, BOX], **options), objects, voxels, strict=True):
        assert torch.equal(asset.gaussians.means, gaussians.means)
        assert torch.equal(asset.gaussians.sh, gaussians.sh)
        assert torch.equal(asset.voxels, coords)
    assert {stage for stage, *_ in calls} == {"structure", "latents"}
    assert calls[-1] == ("latents", 3, 3)
    assert not latents.features.requires_grad
    for changed in ({"seed": 6}, {"sample": 2}, {"steps": 2}, {"guidance": 2.0}):
        other = pipeline.fill_voxels(voxels, condition, **options | changed)
        assert not torch.equal(other.features, latents.features), changed


def test_batch_equals_single_calls(pipeline):
    together = pipeline.batch([BALL, BOX], seed=5)
    for asset, alone in zip(together, (pipeline(BALL, seed=5), pipeline(BOX, seed=5)), strict=True):
        assert torch.equal(asset.voxels, alone.voxels)
        torch.testing.assert_close(asset.gaussians.means, alone.gaussians.means, atol=1e-4, rtol=0)


def test_several_pictures_of_one_object(pipeline):
    tokens = pipeline.encode([[BALL, BOX]])
    assert tokens.shape == (1, 2, 4, 4, 64)
    torch.testing.assert_close(tokens[:, :1], pipeline.encode([[BALL]]))
    asset = pipeline([BALL, BOX])
    assert len(asset.pictures) == 2
    assert not same(asset, pipeline(BALL))
    with pytest.raises(ImageInputError, match="same number"):
        pipeline.batch([BALL, [BALL, BOX]])
    with pytest.raises(ImageInputError, match="empty list"):
        pipeline([])


def test_low_vram_brings_one_model_at_a_time(pipeline, micro_pipeline, monkeypatch):
    """The same result; every model goes to the device for its own stage and back, also when the stage fails."""
    thrifty = Pipeline.from_pretrained(micro_pipeline, device="cpu", low_vram=True)
    roles = {id(model): role for role, model in thrifty.components.items()}
    thrifty.device, seen = torch.device("cpu", 0), []  # told apart from the models' home, and the same memory
    move = torch.nn.Module.to

    def watched(module, device):
        seen.append((roles[id(module)], str(device)))
        return move(module, device)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    assert same(thrifty(picture(), steps=2), pipeline(picture(), steps=2))
    stages = ["feature_extractor", "structure", "backbone", "latent_decoder"]
    assert seen == [(role, device) for role in stages for device in ("cpu:0", "cpu")]
    seen.clear()
    monkeypatch.setattr(thrifty.backbone, "forward", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        thrifty(picture(), steps=2)
    assert seen[-1] == ("backbone", "cpu")


def test_path_array_tensor_and_image_are_one(pipeline, tmp_path):
    BALL.save(tmp_path / "ball.png")
    array = np.array(BALL)
    base = pipeline(BALL)
    for source in (tmp_path / "ball.png", str(tmp_path / "ball.png"), array, torch.from_numpy(array).permute(2, 0, 1)):
        assert same(base, pipeline(source))


def test_alpha_is_used_and_matting_only_without_it(pipeline):
    assert pipeline.cut_out(BALL) == BALL
    cut = pipeline.cut_out(picture(mode="RGB"))
    assert cut.mode == "RGBA"
    alpha = np.asarray(cut)[..., 3]
    assert abs(alpha.mean() - np.asarray(BALL)[..., 3].mean()) < 2


def test_noise_of_a_voxel_depends_on_the_voxel_alone(pipeline):
    coords = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.int32)
    every, some = pipeline.initial_noise([coords], seed=0), pipeline.initial_noise([coords[1:]], seed=0)
    torch.testing.assert_close(every.features[1:], some.features, rtol=0, atol=0)


def test_global_randomness_is_left_alone(micro_pipeline):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    pipeline = Pipeline.from_pretrained(micro_pipeline, device="cpu")
    pipeline(BALL)
    assert torch.equal(torch.rand(3), expected)


def test_progress_is_reported(pipeline):
    seen = []
    pipeline(BALL, steps=2, callback=lambda *event: seen.append(event))
    assert seen == [("structure", 1, 2), ("structure", 2, 2), ("latents", 1, 2), ("latents", 2, 2)]


def test_asset_renders_and_records(pipeline):
    asset = pipeline(BALL, seed=4, sample=2)
    out = asset.render(Camera.orbit(num_views=2, size=32))
    assert out.color.shape == (2, 32, 32, 3)
    assert asset.settings == {"seed": 4, "sample": 2, "steps": None, "guidance": None}
    assert set(asset.timings) == {"image", "features", "structure", "latents", "gaussians"}
    assert not asset.gaussians.means.is_inference()
    assert float(asset.gaussians.means.abs().max()) < 0.7


def test_asset_save_refuses_what_it_cannot_write(pipeline, tmp_path):
    asset = pipeline(BALL)
    with pytest.raises(InputError, match="no suffix"):
        asset.save(tmp_path / "asset")
    with pytest.raises(ComponentNotFoundError, match="no exporter named 'xyz'"):
        asset.save(tmp_path / "asset.xyz")
    with pytest.raises(InputError, match="not a folder"):
        asset.save(tmp_path / "missing" / "asset.ply")
    assert list(tmp_path.iterdir()) == []


def test_half_precision_stays_close(pipeline, micro_pipeline):
    half = Pipeline.from_pretrained(micro_pipeline, device="cpu", dtype="bfloat16")
    asset = half(BALL, steps=1)
    assert asset.gaussians.means.dtype == torch.float32
    tokens, expected = half.encode([[BALL]]).float(), pipeline.encode([[BALL]])
    assert (tokens - expected).norm() < 0.05 * expected.norm()


def test_save_and_load_again(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    copy = Pipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert copy.config == pipeline.config
    assert same(copy(BALL), pipeline(BALL))
    hashes = copy.weight_hashes()
    assert set(hashes) == {"feature_extractor", "structure", "backbone", "latent_decoder"}
    assert all(len(value) == 64 for value in hashes.values())


class Fixed(torch.nn.Module):
    """A feature extractor of somebody else: colours of 16 x 16 blocks, as many channels as asked for."""

    stride, image_size = 8, 64

    def __init__(self, channels=16):
        super().__init__()
        self.channels = channels

    def forward(self, images):
        pooled = torch.nn.functional.avg_pool2d(images, 8)
        return pooled.repeat(1, self.channels, 1, 1)[:, : self.channels]

    def tokens(self, feature_map):
        return torch.nn.functional.pixel_unshuffle(feature_map, 2).permute(0, 2, 3, 1)


def test_objects_take_roles(pipeline, micro_pipeline, tmp_path):
    cut = BorderMatting()
    swapped = Pipeline.from_pretrained(micro_pipeline, device="cpu", feature_extractor=Fixed(), matting=cut)
    assert swapped.matting is cut
    assert not same(swapped(BALL), pipeline(BALL))
    with pytest.raises(ComponentNotFoundError, match="BorderMatting"):  # a directory could not name it
        swapped.save_pretrained(tmp_path / "swapped")
    assert not (tmp_path / "swapped").exists()


def test_what_does_not_fit_is_refused_before_anything_runs(micro_pipeline):
    with pytest.raises(ComponentError, match=r"Fixed gives tokens of 32 channels, but the structure .* for 64"):
        Pipeline.from_pretrained(micro_pipeline, device="cpu", feature_extractor=Fixed(8))
    with pytest.raises(ComponentError, match=r"lacks .*tokens"):
        Pipeline.from_pretrained(micro_pipeline, device="cpu", feature_extractor=lambda images: images)


def test_component_without_weights_is_refused(micro_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(registry(), "components", list(registry().components))
    diff2to3.register(Fixed, role="feature_extractor", name="fixed")
    swapped = Pipeline.from_pretrained(micro_pipeline, device="cpu", feature_extractor="fixed")
    swapped.save_pretrained(tmp_path / "fixed")
    assert same(Pipeline.from_pretrained(tmp_path / "fixed", device="cpu")(BALL), swapped(BALL))
    with pytest.raises(ComponentError, match=r"'flux' has no weights of its own"):
        Pipeline.from_pretrained(tmp_path / "fixed", device="cpu", feature_extractor="flux")
    with pytest.raises(ComponentError, match="config of backbone 'cross-dit': grid_size"):
        Pipeline.from_pretrained(micro_pipeline, device="cpu", backbone="cross-dit")


def test_own_component_by_its_full_name_keeps_its_weights(micro_pipeline):
    named = Pipeline.from_pretrained(micro_pipeline, device="cpu", feature_extractor="flux-features:flux")
    assert "feature_extractor" in named.weight_hashes()


def test_replaced_renderer_keeps_the_settings_of_the_pipeline(micro_pipeline, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(micro_pipeline, tmp_path / "trellis")
    config = json.loads((folder / "pipeline.json").read_text())
    config["roles"]["renderer"] = {"name": "auto", "config": {"filter_2d": 0.1, "antialias": True}}
    (folder / "pipeline.json").write_text(json.dumps(config))
    pipeline = Pipeline.from_pretrained(folder, device="cpu", renderer="torch")
    assert pipeline.renderer.backend == "torch"
    assert pipeline.renderer.config.filter_2d == 0.1


def test_bad_device_and_dtype(micro_pipeline):
    with pytest.raises(InputError, match="device 'gpu'"):
        Pipeline.from_pretrained(micro_pipeline, device="gpu")
    with pytest.raises(InputError, match="dtype 'int8'"):
        Pipeline.from_pretrained(micro_pipeline, device="cpu", dtype="int8")


@pytest.mark.gpu
def test_cpu_and_gpu_agree(pipeline, micro_pipeline):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    there = Pipeline.from_pretrained(micro_pipeline, device="cuda")(BALL)
    cameras = Camera.orbit(num_views=4, size=64)
    here = pipeline(BALL).render(cameras).color
    assert float((there.render(cameras).color.cpu() - here).abs().mean()) < 1e-2
