"""Contact sheets and turntables."""

import numpy as np
import pytest
import torch
from gs_render import (
    AutoRenderer,
    Camera,
    RendererConfig,
    contact_sheet,
    framing,
    render,
    save,
    save_video,
    turntable_cameras,
)
from PIL import Image


def test_contact_sheet_holds_every_view_in_reading_order(make_gaussians):
    scene, cameras = make_gaussians(80), turntable_cameras(5, (24, 20))
    sheet = np.array(contact_sheet(scene, cameras, columns=3, background=0.5))
    assert sheet.shape == (40, 72, 3)
    expected = (render(scene, cameras, 0.5).color * 255 + 0.5).clamp(0, 255).byte().numpy()
    assert np.array_equal(sheet[20:40, 24:48], expected[4])
    assert (sheet[20:, 48:] == 255).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_pictures_by_suffix(make_gaussians, tmp_path, suffix):
    scene = make_gaussians(30)
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        assert Image.open(save(scene, path)).size == (1024, 512)
        return
    with Image.open(save_video(scene, path, turntable_cameras(6, 32))) as picture:
        assert (picture.n_frames, picture.size) == (6, (32, 32))


def test_mp4(make_gaussians, tmp_path):
    av = pytest.importorskip("av")
    scene, cameras = make_gaussians(60), turntable_cameras(10, 64)
    path = save_video(scene, tmp_path / "a.mp4", cameras, frames_per_second=12)
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 12
    assert len(frames) == 10
    expected = render(scene, cameras[3]).color[0].clamp(0, 1).numpy()
    assert np.abs(frames[3] / 255 - expected).mean() < 0.02
    with pytest.raises(ValueError, match="even width and height, got 33 x 32"):
        save_video(scene, tmp_path / "b.mp4", turntable_cameras(2, (33, 32)))
    with pytest.raises(ValueError, match=r"\.mp4, \.gif or \.webp, got '\.avi'"):
        save_video(scene, tmp_path / "b.avi", cameras)


def test_framing(make_gaussians):
    scene = make_gaussians(500)
    centre, radius = framing(scene)
    assert torch.equal(centre, torch.zeros(3))
    large = scene.transform(translation=(10.0, 0.0, 3.0), scale=20.0)
    centre, wide = framing(large)
    assert torch.allclose(centre, torch.tensor([10.0, 0.0, 3.0]), atol=1.0)
    assert wide > 10 * radius
    alpha = render(large, turntable_cameras(1, 64, gaussians=large)).alpha[0, ..., 0]
    assert alpha[20:44, 20:44].mean() > 0.3


def test_renderer_component_draws(make_gaussians):
    scene, cameras = make_gaussians(40), Camera.orbit(2, size=32)
    renderer = AutoRenderer(RendererConfig.preset("trellis"))
    assert torch.equal(
        renderer(scene, cameras, 0.2).color, render(scene, cameras, 0.2, filter_2d=0.1, antialias=True).color
    )
    plain = np.array(contact_sheet(scene, cameras))
    assert not np.array_equal(np.array(contact_sheet(scene, cameras, draw=renderer)), plain)
    with pytest.raises(ValueError, match="unknown preset 'x'; expected one of 3dgs, trellis"):
        RendererConfig.preset("x")


def test_gif_frames_keep_their_colours(make_gaussians, tmp_path):
    cameras = turntable_cameras(3, 96)
    gaussians = make_gaussians(300)
    with Image.open(save_video(gaussians, tmp_path / "a.gif", cameras)) as film:
        for index in range(3):
            film.seek(index)
            shown = torch.from_numpy(np.array(film.convert("RGB"))).float() / 255
            assert (shown - render(gaussians, cameras[index]).color[0].clamp(0, 1)).square().mean() < 1e-3  # 30 dB
