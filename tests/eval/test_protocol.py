"""The frozen protocol, the pictures drawn for it, and the report."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from diff2to3._errors import InputError
from diff2to3.data._store import Store
from diff2to3.eval._protocol import Condition, Protocol, freeze_protocol, read_protocol
from diff2to3.eval._report import html_page, paper_table, report_generation
from diff2to3.eval._scores import Scores
from diff2to3.eval._truth import draw_truth, read_truth, shrink, write_inputs
from gs_render import Camera
from PIL import Image


@pytest.fixture(scope="module")
def protocol(eval_data):
    return freeze_protocol(eval_data, "val", 2, 32)


def test_round_trip(protocol, tmp_path):
    protocol.write(tmp_path / "p.json")
    found = read_protocol(tmp_path / "p.json")
    assert found == protocol
    assert found.digest == protocol.digest
    assert found.model_copy(update={"fov": 41.0}).digest != protocol.digest
    assert [entry.id for entry in found.objects] == ["d", "e"]
    with pytest.raises(InputError, match="not a readable protocol file"):
        read_protocol(tmp_path / "none.json")
    (tmp_path / "p.json").write_text(protocol.model_dump_json().replace('"area"', '"box"'))
    with pytest.raises(InputError, match="not a protocol: resize"):
        read_protocol(tmp_path / "p.json")


def test_cameras_are_those_of_the_field(protocol):
    """The same as gs_render's own cameras on an orbit."""
    views = protocol.cameras(48)
    expected = Camera.orbit(num_views=4, radius=2.0, fov_degrees=40.0, size=48, elevation_degrees=30.0)
    torch.testing.assert_close(torch.from_numpy(views.world_to_camera), expected.world_to_camera, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(views.intrinsics), expected.intrinsics, atol=1e-4, rtol=0)


def test_elevation_of_a_condition():
    camera = Camera.orbit(num_views=1, elevation_degrees=25.0, size=64)
    entry = Condition(
        id="x",
        azimuth=0.0,
        world_to_camera=camera.world_to_camera[0].tolist(),
        intrinsics=camera.intrinsics[0].tolist(),
    )
    assert entry.elevation == pytest.approx(25, abs=1e-3)
    assert entry.frame == 64


def test_truth_is_drawn_once(protocol, eval_data, eval_assets, tmp_path):
    fresh = Store(tmp_path)
    for name in ("objects.csv", "render", "voxels"):
        (tmp_path / name).symlink_to(eval_data.root / name)
    with pytest.raises(InputError, match=r"2 objects are not drawn for this protocol yet; expected .*--source DIR"):
        draw_truth(fresh, None, protocol)
    draw_truth(fresh, eval_assets, protocol, "cpu")
    draw_truth(fresh, None, protocol)
    draw_truth(fresh, eval_assets, protocol.model_copy(update={"size": 64}), "cpu")
    draw_truth(fresh, None, protocol)  # another protocol has not taken its place
    rows = {row["id"]: row for row in fresh.objects()}
    truth = read_truth(fresh, protocol, protocol.objects[0], rows["d"])
    assert truth.views.shape == (4, 3, 32, 32)
    assert truth.alpha.amax() > 0.9
    assert truth.seen(32).shape == (32, 32, 3)
    assert write_inputs(fresh, protocol, tmp_path / "inputs") == 2
    with Image.open(tmp_path / "inputs" / "d.png") as picture:
        assert picture.mode == "RGBA"
        assert np.array_equal(np.asarray(picture), np.asarray(truth.picture))
    unknown = protocol.model_copy(update={"objects": (protocol.objects[0].model_copy(update={"id": "zz"}),)})
    with pytest.raises(InputError, match="1 objects of the protocol are not in it, first zz"):
        draw_truth(fresh, eval_assets, unknown)


def test_shrinking_weights_colour_by_alpha():
    rgba = np.zeros((1, 2, 2, 4), np.uint8)
    rgba[0, 0, 0] = (200, 100, 50, 255)
    rgba[0, 0, 1] = (9, 9, 9, 0)  # not seen: its colour must not count
    assert shrink(rgba, 2)[0, 0, 0].tolist() == [200, 100, 50, 64]
    assert np.array_equal(shrink(rgba, 1), rgba * (rgba[..., 3:] > 0))


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]


def test_page_stands_alone_and_escapes():
    evil = "<script>alert(1)</script>|' onerror='x"
    picture = np.zeros((4, 4, 3), np.uint8)
    table = paper_table({}, {evil: {"CLIP": 1.0}}, ("CLIP",))
    page = html_page(evil, [table, evil], {"k": evil}, {evil: {"input": picture, evil: picture}}, {evil: {"psnr": 1.0}})
    reader = _Tags()
    reader.feed(page)
    assert "script" not in reader.tags
    assert len(reader.links) == 2
    assert all(link.startswith("data:image/jpeg;base64,") for link in reader.links)
    assert not re.search(r"<img[^>]*onerror='x", page)
    assert "http" not in page


def test_table_has_the_papers_layout(protocol, tmp_path):
    scores = Scores([{"id": "d", "has_texture": "1", "psnr": 20.0}], {"FD_vgg": 12.5, "KD_vgg": 0.25})
    text = report_generation(scores, {"method": "LGM"}, protocol, tmp_path / "r.json")
    lines = text.splitlines()
    assert lines[0].startswith("| Method | CLIP ↑ | FD_incep ↓ | KD_incep (%) ↓ | FD_dinov2 ↓ | KD_dinov2 (%) ↓ |")
    assert "| TRELLIS (paper) | 98.02 | 24.57 | 0.0421 | 146.14 | 8.74 | 770 |  |  |" in lines
    assert "| LGM (1 objects) |  |  |  |  |  |  | 12.5 | 0.25 |" in lines
    assert "| psnr | 20 (20) | 20 (20) |" in lines
    assert json.loads((tmp_path / "r.json").read_text())["protocol"] == protocol.model_dump(mode="json")
    assert (tmp_path / "r.md").read_text().startswith("# Generation: LGM\n")
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_protocol_is_validated():
    with pytest.raises(ValueError, match="at least 1 item"):
        Protocol(objects=())
