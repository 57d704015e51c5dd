"""Pictures from strangers, and output folders prepared by them."""

import contextlib
import io
import json
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from diff2to3 import read_image
from diff2to3._atomic import replacing
from diff2to3._errors import ImageInputError, InputError
from diff2to3._settings import load_settings
from diff2to3.data._objects import open_objects
from diff2to3.data._shards import pack
from diff2to3.data._store import Store, write_atomically
from diff2to3.data._tensor_file import DamagedFileError, TensorFile
from diff2to3.train._config import TrainConfig
from gs_render import Gaussians, save
from PIL import EpsImagePlugin, Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra, size=(8, 8), pixels=None):
    """A grey PNG with chunks of one's own before its pixels."""
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(size[1] * (size[0] + 1))) if pixels is None else pixels
    parts = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


INFLATED = zlib.compress(bytes(512 << 20))  # half a gigabyte in 500 kB
DEEP = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
SCRIPT = b"<script>alert(1)</script>"
REFUSED = {
    "no pixels wide": png(size=(0, 8)),
    "two thousand million pixels": png(size=(2**31 - 1, 1)),
    "more than the limit": png(size=(16_000, 16_000), pixels=zlib.compress(b"")),
    "pixels that end early": png(size=(64, 64), pixels=zlib.compress(bytes(100))),
    "a text that unpacks to too much": png(chunk(b"zTXt", b"a\0\0" + INFLATED)),
    "a colour profile that unpacks to too much": png(chunk(b"iCCP", b"a\0\0" + INFLATED)),
    "a program for a printer": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n",
    "half a JPEG": encoded(Image.new("RGB", (200, 200), (9, 9, 9)), "JPEG")[:400],
    "a page": b"<!doctype html>" + SCRIPT,
    "an unknown codec in a TIFF": encoded(Image.new("L", (8, 8)), "TIFF").replace(
        struct.pack("<HHIH", 259, 3, 1, 1), struct.pack("<HHIH", 259, 3, 1, 9999)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_pictures_are_refused_in_little_memory(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(REFUSED[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageInputError, match=r"a\.png") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_no_other_program_is_asked_to_draw_a_picture(tmp_path, monkeypatch):
    """Pillow reads EPS by running Ghostscript."""
    calls = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **options: calls.append(given))
    Image.new("L", (8, 8)).save(tmp_path / "a.png", "EPS")
    with pytest.raises(ImageInputError, match="not a picture that can be read"):
        read_image(tmp_path / "a.png")
    assert not calls


ODD = {
    "animated": (
        encoded(Image.new("P", (5, 4), 1), "GIF", save_all=True, append_images=[Image.new("P", (5, 4))]),
        (5, 4),
    ),
    "16 bit": (encoded(DEEP, "PNG"), (4, 4)),
    "four inks": (encoded(Image.new("CMYK", (5, 4)), "JPEG"), (5, 4)),
    "palette": (encoded(Image.new("P", (5, 4)), "PNG", transparency=0), (5, 4)),
    "picture and page in one": (png() + SCRIPT, (8, 8)),
    "named wrongly": (encoded(Image.new("RGB", (5, 4)), "WEBP"), (5, 4)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_pictures(tmp_path, name):
    data, size = ODD[name]
    (tmp_path / "a.png").write_bytes(data)
    picture = read_image(tmp_path / "a.png")
    assert picture.size == size
    assert picture.mode in ("RGB", "RGBA")
    assert not picture.info.get("comment")


def test_the_rest_of_a_file_after_the_picture_is_not_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(png() + SCRIPT)
    assert SCRIPT not in encoded(read_image(tmp_path / "a.png"), "PNG")


@pytest.fixture
def splat():
    one = torch.ones(1)
    return Gaussians(
        torch.zeros(1, 3), torch.ones(1, 3) * 0.1, torch.tensor([[1.0, 0, 0, 0]]), one, torch.zeros(1, 1, 3)
    )


@pytest.mark.parametrize("suffix", ["ply", "spz", "glb", "html"])
def test_writing_replaces_a_link_and_not_what_it_names(tmp_path, splat, suffix):
    victim, link = tmp_path / "victim", tmp_path / f"a.{suffix}"
    victim.write_text("mine")
    link.symlink_to(victim)
    save(splat, link)
    assert victim.read_text() == "mine"
    assert not link.is_symlink()


def test_replacing_replaces_a_link(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "a.json"
    victim.write_text("mine")
    link.symlink_to(victim)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)
    os.link(victim, tmp_path / "hard")  # a second name of the same file stays as it was
    with replacing(tmp_path / "hard") as temporary:
        temporary.write_text("new")
    assert victim.read_text() == "mine"


def packed(tmp_path):
    """A data set of one object, and the folder of its shards."""
    store, out = Store(tmp_path / "set"), tmp_path / "packed"
    write_atomically(store.root / "objects.csv", b"id,split\na,train\n")
    digest = store.write("voxels", "a", {"coords": np.zeros((1, 3), np.int32)}, {})
    store.write_manifest("voxels", {}, {"a": digest}, {})
    pack(store, out, (), 1 << 20)
    return out


def test_links_in_the_place_of_temporary_files_lead_nowhere(tmp_path):
    """An output folder may hold links under names that can be foreseen."""
    victim, out = tmp_path / "victim", tmp_path / "packed"
    victim.write_text("mine")
    links = [tmp_path / f"set/voxels/.a.safetensors.{os.getpid()}.tmp", out / ".train-000000.tar.tmp"]
    for link in [*links, out / "train-000000.tar"]:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(victim)
    packed(tmp_path)
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == ["SHA256SUMS", "index.json", "train-000000.tar"]


def test_shards_are_read_in_their_folder_alone(tmp_path):
    out = packed(tmp_path)
    (out / "train-000000.tar").rename(tmp_path / "train-000000.tar")
    index = json.loads((out / "index.json").read_text())
    for name in ("../train-000000.tar", str(tmp_path / "train-000000.tar"), "..", "a\0.tar", ["x"], None):
        index["shards"][0]["name"] = name
        (out / "index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="no shard in its folder"):
            open_objects(out, "train", ("voxels",))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", ".", "a\\..\\x"])
def test_an_objects_file_is_in_the_folder_of_its_stage(tmp_path, name):
    store = Store(tmp_path / "set")
    path = store.path("render", name)
    assert path.resolve().parent == (tmp_path / "set" / "render").resolve()


# each line stands for six times the one before
LAUGHS = "a0: &a0 [1,2,3]\n" + "\n".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 6)}]" for n in range(1, 13))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "more than"),
        (f"steps: [{'1,' * 20_001}]", "more than 20,000 values"),
        ("steps: &a [*a]", "more than|aliases|undefined"),
        ("steps: " + "[" * 5000, "nested too deeply"),
        ("steps: " + "[" * 40 + "]" * 40, "deeper than 32"),
        ("#" * (1 << 21), "more than 1,048,576 bytes"),
        ("!!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("steps: " + "x" * 100_000, r"\.\.\.\)"),
    ],
    ids=["aliases", "values", "alias of itself", "deep", "deeper", "long", "code", "long value"],
)
def test_settings_from_elsewhere(tmp_path, monkeypatch, text, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        load_settings(tmp_path / "a.yaml", (), TrainConfig)
    assert len(str(caught.value)) < 5000
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"id,split\na\n", b"name\na\n", b"\xff\xfe", b"id,split\n\0\0", b'id,split\n"' + b"a" * 200_000]
)
def test_tables_that_are_none(tmp_path, content):
    (tmp_path / "objects.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"objects\.csv") as caught:
        Store(tmp_path).objects("train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        {"weight": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}},
        {"weight": {"dtype": "F32", "shape": [1], "data_offsets": ["x", 4]}},
        {"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}},
        {"weight": {"dtype": "F32", "shape": "1", "data_offsets": None}, "__metadata__": 3.5},
        {"__metadata__": {"given": "{", "settings": 3}},
        {"__metadata__": {"given": "[" * 100_000}},
    ],
    ids=range(6),
)
def test_headers_of_tensors_from_elsewhere(tmp_path, header):
    """Found by fuzzing: each was an exception of Python's."""
    store = Store(tmp_path)
    path = store.path("voxels", "a")
    path.parent.mkdir()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert store.settings("voxels", "a") == {}
    assert store.finished("voxels", {"g": 8}, ["a"]) == {}
    with contextlib.suppress(DamagedFileError):
        assert TensorFile.whole(path).read("weight").tolist() == [0.0]
