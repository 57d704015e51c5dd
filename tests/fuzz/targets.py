"""What is fuzzed: each parser with valid input to damage, how it is read, and the errors by which it may refuse.

A new parser gets a `Target` here; `run.py` and `test_fuzz.py` then feed it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diff2to3 import Pipeline, PipelineConfig, read_image
from diff2to3._errors import ImageInputError, InputError
from diff2to3._manifest import read_manifest
from diff2to3._settings import load_settings
from diff2to3._store import load_weights, read_config
from diff2to3._trellis_file import read_description
from diff2to3.data._mesh import load_mesh
from diff2to3.data._objects import open_objects
from diff2to3.data._shards import pack
from diff2to3.data._store import Store, file_metadata
from diff2to3.data._tensor_file import DamagedFileError, TensorFile
from diff2to3.data._voxelize import voxelize
from diff2to3.eval._ablation_config import AblationConfig
from diff2to3.train._config import TrainConfig
from diff2to3.train._state import DamagedCheckpointError, verify
from gs_render import Gaussians, load, save
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from sparse_vae import read_trellis

SPLATS = (".ply", ".compressed.ply", ".splat", ".spz", ".sog", ".glb")


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        name: what `--targets` calls it.
        make: writes a valid input into an empty folder and returns those of its files that are to be damaged, the one
            that a person would name first. One such function for each seed.
        read: reads the folder's input; given the path of the first file.
        refuses: errors that say no. Their message is one line.
        alone: the input may open no file outside its folder.
        gigabytes: of address space that reading may take more than a valid input did.
    """

    name: str
    make: tuple[Callable[[Path], list[Path]], ...]
    read: Callable[[Path], Any]
    refuses: tuple[type[Exception], ...] = (ValueError,)
    alone: bool = False
    gigabytes: float = 1.0


def _scene(count: int, degree: int) -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    return Gaussians(
        torch.rand(count, 3, generator=generator) - 0.5,
        torch.rand(count, 3, generator=generator) * 0.1 + 1e-3,
        torch.randn(count, 4, generator=generator),
        torch.rand(count, generator=generator),
        torch.randn(count, (degree + 1) ** 2, 3, generator=generator) * 0.3,
    )


def _splat(suffix: str, count: int, degree: int, folder: Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [save(_scene(count, degree), folder / f"case{suffix}")]


def _spz4(folder: Path) -> list[Path]:
    """Version 4: a plain header, a table of sizes and a zstd frame a section."""
    import zstandard

    count, widths = 40, (9, 1, 3, 3, 4)
    sections = [np.random.default_rng(k).integers(0, 256, count * w, np.uint8).tobytes() for k, w in enumerate(widths)]
    packed = [zstandard.ZstdCompressor().compress(section) for section in sections]
    header = struct.pack("<IIIBBBBI", 0x5053474E, 4, count, 0, 12, 0, len(packed), 32) + bytes(12)
    table = b"".join(struct.pack("<QQ", len(p), len(s)) for p, s in zip(packed, sections, strict=True))
    (folder / "case.spz").write_bytes(header + table + b"".join(packed))
    return [folder / "case.spz"]


def _mesh(suffix: str, options: dict[str, Any], folder: Path) -> list[Path]:
    """A textured ball, of glTF two of them in a scene graph; beside it a link to a picture outside."""
    import trimesh

    ball = trimesh.creation.icosphere(1)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    uv = np.random.default_rng(1).random((len(ball.vertices), 2))
    ball.visual = trimesh.visual.TextureVisuals(uv=uv, image=Image.fromarray(pixels))
    thing: Any = ball
    if suffix in (".glb", ".gltf"):
        thing = trimesh.Scene()
        thing.add_geometry(ball, node_name="parent")
        shift = trimesh.transformations.translation_matrix((2, 0, 0))
        thing.add_geometry(ball, node_name="child", parent_node_name="parent", transform=shift)
    path = folder / f"asset{suffix}"
    thing.export(path, **options)
    files = [path, *sorted(other for other in folder.iterdir() if other != path)]
    Image.fromarray(pixels).save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    return files


def _picture(kind: str, mode: str, folder: Path, **options: Any) -> list[Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 4), dtype=np.uint8)
    deep = pixels[..., 0].astype(np.uint16) * 257
    picture = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    path = folder / "case.img"
    picture.save(path, kind, **options)
    return [path]


def _animation(folder: Path) -> list[Path]:
    frames = [Image.new("P", (20, 20), colour) for colour in (0, 100, 200)]
    frames[0].save(folder / "case.img", "GIF", save_all=True, append_images=frames[1:])
    return [folder / "case.img"]


def _text(name: str, contents: Any, folder: Path) -> list[Path]:
    path = folder / name
    path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return [path]


@functools.cache
def _micro() -> dict[str, bytes]:
    """Files of the smallest whole pipeline."""
    import runpy
    import tempfile

    conftest = runpy.run_path(str(Path(__file__).resolve().parents[1] / "conftest.py"))
    with tempfile.TemporaryDirectory() as folder:
        conftest["build_micro_pipeline"](Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _pipeline(folder: Path) -> list[Path]:
    for name, content in _micro().items():
        (folder / name).write_bytes(content)
    return [folder / "pipeline.json"]


def _manifest(folder: Path) -> list[Path]:
    contents = {
        "name": "a", "pictures": [{"path": "a.png", "sha256": "0" * 64}], "pipeline": None, "components": {},
        "config": {"name": "x", "roles": {"backbone": {"name": "smdit", "config": {}}}}, "weights": {"backbone": "0"},
        "seed": 0, "sample": 0, "steps": None, "guidance": 5.0, "device": "cpu", "dtype": "float32", "num_voxels": 1,
        "num_gaussians": 1, "versions": {"torch": "2"}, "timings": {"image": 0.1}, "files": {"ply": "a.ply"},
    }  # fmt: skip
    return _text("a.json", contents, folder)


_TENSORS = {"weight": torch.arange(12.0).view(3, 4), "bias": torch.zeros(3, dtype=torch.float16)}


def _weights(folder: Path) -> list[Path]:
    (folder / "w.safetensors").write_bytes(safetensors_bytes(_TENSORS, {"settings": "0", "given": "{}"}))
    return [folder / "w.safetensors"]


_WITHOUT_HASHES = PipelineConfig(
    name="fuzzed",
    roles={role: {"name": "any"} for role in ("feature_extractor", "structure", "backbone", "latent_decoder")},
)


def _read_weights(path: Path) -> None:
    """By every reader: the library's, as pipelines do it, and the data set's own, in parts."""
    problems = []
    file_metadata(path)
    for read in (
        lambda: load_weights(torch.nn.Linear(4, 3), path, _WITHOUT_HASHES),
        lambda: Store(path.parent.parent).read(path.parent.name, "w"),
        lambda: TensorFile.whole(path).read("weight", 1),
        lambda: TensorFile.whole(path).read_rows("bias", 0, 2),
        lambda: TensorFile.whole(path).verify(),
    ):
        try:
            read()
        except (ValueError, InputError) as error:
            problems.append(error)
    if problems:
        raise problems[0]


def _checkpoint(folder: Path) -> list[Path]:
    files = {}
    for name in ("model", "average", "optimizer", "clip"):
        data = safetensors_bytes(_TENSORS)
        (folder / f"{name}.safetensors").write_bytes(data)
        files[f"{name}.safetensors"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    meta = {"format": 2, "step": 3, "item": 6, "seconds": 1.5, "average": 3, "clip": 3, "scalars": {"a:step": 3.0}}
    return _text("state.json", meta | {"files": files}, folder)


def _shards(folder: Path) -> list[Path]:
    store = Store(folder / "set")
    rows = "id,split\n" + "".join(f"o{k},train\n" for k in range(3))
    store.root.mkdir()
    (store.root / "objects.csv").write_text(rows)
    done = {
        f"o{k}": store.write("voxels", f"o{k}", {"coords": np.arange(6, dtype=np.int32).reshape(2, 3)}, {"g": 8})
        for k in range(3)
    }
    store.write_manifest("voxels", {"g": 8}, done, {})
    pack(store, folder / "packed", (), 1 << 20)
    return [folder / "packed" / "index.json", folder / "packed" / "train-000000.tar"]


def _read_shards(path: Path) -> None:
    shard = path.with_name("train-000000.tar")
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        index = json.loads(path.read_bytes())
        for entry in index["shards"]:  # the size is compared first: damage of the shard must get past that
            if entry["name"] == shard.name:
                entry["bytes"] = shard.stat().st_size
        path.write_text(json.dumps(index))
    objects = open_objects(path.parent, "train", ("voxels",))
    for number in range(min(len(objects), 5)):
        file = objects.file(number, "voxels")
        file.read("coords")
        file.verify()


def _table(folder: Path) -> list[Path]:
    return _text("objects.csv", "id,split,family\na,train,x\nb/c,val,y\n", folder)


def _trellis(folder: Path) -> list[Path]:
    description = {"name": "SparseStructureDecoder", "args": {"out_channels": 1, "latent_channels": 8, "channels": [8]}}
    (folder / "m.safetensors").write_bytes(safetensors_bytes(_TENSORS))
    return [*_text("m.json", description, folder), folder / "m.safetensors"]


def _trellis_pipeline(folder: Path) -> list[Path]:
    models = {
        name: f"ckpts/{name}"
        for name in ("slat_flow_model", "sparse_structure_flow_model", "sparse_structure_decoder", "slat_decoder_gs")
    }
    sampler = {"name": "FlowEulerGuidanceIntervalSampler", "args": {}, "params": {"steps": 25, "cfg_strength": 5.0}}
    arguments = {
        "models": models, "sparse_structure_sampler": sampler, "slat_sampler": sampler,
        "slat_normalization": {"mean": [0.0] * 8, "std": [1.0] * 8}, "image_cond_model": "dinov2_vitl14_reg",
    }  # fmt: skip
    return _text("pipeline.json", {"name": "TrellisImageTo3DPipeline", "args": arguments}, folder)


def _settings(file: str, folder: Path) -> list[Path]:
    path = folder / "settings.yaml"
    path.write_text((Path(__file__).resolve().parents[2] / "configs" / file).read_text())
    return [path]


def _inflated(folder: Path) -> list[Path]:
    """Aliases that stand for ten times the line before."""
    lines = ["steps: &a [1,1,1,1,1,1,1,1,1,1]"]
    lines += [f"{n}: &{n} [{','.join([f'*{m}'] * 10)}]" for m, n in zip("abcdefgh", "bcdefghi", strict=True)]
    return _text("settings.yaml", "\n".join(lines), folder)


_PICTURES = (
    functools.partial(_picture, "PNG", "RGBA"),
    functools.partial(_picture, "PNG", "P"),
    functools.partial(_picture, "PNG", "I;16"),
    functools.partial(_picture, "JPEG", "RGB"),
    functools.partial(_picture, "JPEG", "CMYK"),
    functools.partial(_picture, "WEBP", "RGBA", lossless=True),
    functools.partial(_picture, "TIFF", "RGB"),
    functools.partial(_picture, "TIFF", "I;16"),
    functools.partial(_picture, "BMP", "RGB"),
    functools.partial(_picture, "TGA", "RGBA"),
    _animation,
)

TARGETS = {
    target.name: target
    for target in (
        *(
            Target(
                f"splat{suffix}",
                (
                    *(functools.partial(_splat, suffix, n, d) for n, d in ((0, 0), (300, 0), (40, 3))),
                    *((_spz4,) if suffix == ".spz" else ()),
                ),
                load,
            )
            for suffix in SPLATS
        ),
        *(
            Target(
                f"mesh.{name}",
                (functools.partial(_mesh, suffix, options),),
                lambda path: voxelize(load_mesh(path), 16),
                alone=True,
                gigabytes=4.0,
            )
            for name, suffix, options in (
                ("glb", ".glb", {}),
                ("gltf", ".gltf", {}),
                ("obj", ".obj", {}),
                ("ply", ".ply", {}),
                ("ply-text", ".ply", {"encoding": "ascii"}),
            )
        ),
        Target("image", _PICTURES, read_image, (ImageInputError,), gigabytes=2.0),
        Target("pipeline-json", (_pipeline,), lambda path: read_config(path.parent), (InputError,)),
        Target(
            "pipeline", (_pipeline,), lambda path: Pipeline.from_pretrained(path.parent, device="cpu"), (InputError,)
        ),
        Target("manifest", (_manifest,), read_manifest, (InputError,)),
        Target("safetensors", (_weights,), _read_weights),
        Target("checkpoint", (_checkpoint,), lambda path: verify(path.parent), (DamagedCheckpointError,)),
        Target("shards", (_shards,), _read_shards, (InputError, DamagedFileError, LookupError)),
        Target("objects-csv", (_table,), lambda path: Store(path.parent).objects("train"), (InputError,)),
        Target("trellis-model", (_trellis,), read_trellis, (ValueError, FileNotFoundError)),
        Target("trellis-pipeline", (_trellis_pipeline,), lambda path: read_description(path.parent), (InputError,)),
        Target(
            "train-yaml",
            (*(functools.partial(_settings, f"tiny/{n}") for n in ("flow.yaml", "vae.yaml")), _inflated),
            lambda path: load_settings(path, (), TrainConfig),
            (InputError,),
        ),
        Target(
            "ablation-yaml",
            (functools.partial(_settings, "ablation/micro.yaml"),),
            lambda path: load_settings(path, (), AblationConfig),
            (InputError,),
        ),
    )
}
