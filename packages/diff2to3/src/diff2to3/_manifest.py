"""The manifest beside a generated asset: everything needed to make it again."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from _gs_render_reading import read_json
from pydantic import BaseModel, ConfigDict, ValidationError

from diff2to3._errors import InputError
from diff2to3._locate import file_sha256

if TYPE_CHECKING:
    from diff2to3._pipeline import Pipeline

_PACKAGES = ("diff2to3", "marope", "smdit", "sparse-vae", "flux-features", "gs-render", "torch", "numpy", "pillow")


class PictureRecord(BaseModel):
    """An input picture: its path as it was given, and the SHA-256 of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    sha256: str


class Manifest(BaseModel):
    """Contents of ``NAME.json``.

    Args:
        pictures: the input; several are views of one object.
        pipeline: source as given to `Pipeline.from_pretrained`; None is the embedded one.
        revision: the commit, of a pipeline from the Hub.
        components: role -> name of the components that replaced the pipeline's own.
        config: the whole `PipelineConfig` in use.
        weights: role -> SHA-256.
        seed, sample, steps, guidance: as given; None is the pipeline's own setting.
        device, dtype: what it ran on and in.
        num_voxels, num_gaussians: of the result.
        versions: of Python and the packages.
        timings: seconds of each stage, of loading, and of each written file.
        files: format -> name of the file beside the manifest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    name: str
    pictures: tuple[PictureRecord, ...]
    pipeline: str | None
    revision: str | None = None
    components: dict[str, str]
    config: dict[str, Any]
    weights: dict[str, str]
    seed: int
    sample: int
    steps: int | None
    guidance: float | None
    device: str
    dtype: str
    num_voxels: int
    num_gaussians: int
    versions: dict[str, str]
    timings: dict[str, float]
    files: dict[str, str]


def read_manifest(path: Path) -> Manifest:
    """A manifest written by ``diff2to3 generate``.

    Raises:
        InputError: missing, not JSON, or not a manifest.
    """
    try:
        return Manifest.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{path} is not a manifest of 'diff2to3 generate': {where}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a manifest: {' '.join(str(error).split())}") from error


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """The part of a manifest that is the same for everything that a pipeline makes."""
    return {
        "revision": pipeline.revision,
        "config": pipeline.config.model_dump(mode="json", exclude={"weights"}),
        "weights": pipeline.weight_hashes(),
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "versions": _versions(),
    }


def finished(path: Path, recipe: dict[str, Any]) -> Manifest | None:
    """The manifest at `path`, if there is one of this recipe and its files are there; else None.

    Args:
        path: of the manifest; its files lie beside it, and were written before it.
        recipe: all fields of a `Manifest` that are known before the object is made. Where the pictures lie does not
            matter, what they show does.
    """
    try:
        manifest = read_manifest(path)
    except InputError:  # none yet, or damaged
        return None
    plans = (manifest, manifest.model_copy(update=recipe))
    before, now = (
        plan.model_dump(mode="json", exclude={"pictures"}) | {"pictures": [picture.sha256 for picture in plan.pictures]}
        for plan in plans
    )
    whole = all((path.parent / file).is_file() for file in manifest.files.values())
    return manifest if before == now and whole else None


def find_picture(record: PictureRecord, folder: Path) -> str:
    """Where a picture of a manifest in `folder` is now: at its path, seen from here or from there, or beside it.

    Raises:
        InputError: nowhere, or what is there has another hash.
    """
    path = Path(record.path)
    places = [place for place in (path, folder / path, folder / path.name) if place.is_file()]
    hashes = [file_sha256(place) for place in places]
    if record.sha256 in hashes:
        return str(places[hashes.index(record.sha256)])
    if not places:
        raise InputError(
            f"{path}: no such file; the manifest was made from it: put it into {folder}, or give it as IMAGE"
        )
    raise InputError(
        f"{places[0]} is not the picture of the manifest: SHA-256 {hashes[0][:12]}..., expected {record.sha256[:12]}..."
    )


def other_versions(manifest: Manifest) -> str | None:
    """What a manifest was made with and is not what is here, in one line; None where all is the same."""
    here, there = _versions(), manifest.versions
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} (here {here.get(name)})" for name in names) or None


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
