"""What an evaluation of generated objects looks at, frozen in a JSON file so that every method is asked the same."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diff2to3._errors import InputError
from diff2to3.data._store import Store, settings_hash, write_atomically
from diff2to3.data._views import Views, orbit

Matrix = tuple[tuple[float, ...], ...]
_CONDITIONS = 12  # stored condition views that objects take in turn


class Condition(BaseModel):
    """An object and the camera of its input picture.

    Attributes:
        azimuth: of that camera in degrees, 0 in front.
        world_to_camera: [4, 4], OpenCV.
        intrinsics: [3, 3] in pixels of the square frame, whose centre is the principal point.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    azimuth: float
    world_to_camera: Matrix
    intrinsics: Matrix

    @property
    def frame(self) -> int:
        """Side of the input picture in pixels."""
        return round(2 * self.intrinsics[0][2])

    @property
    def elevation(self) -> float:
        """Of the camera above the horizon in degrees."""
        pose = np.array(self.world_to_camera)
        eye = -pose[:3, :3].T @ pose[:3, 3]
        return float(np.degrees(np.arcsin(eye[2] / np.linalg.norm(eye))))


class Protocol(BaseModel):
    """Objects, cameras and pictures of an evaluation.

    Attributes:
        objects: in order, with the camera of each one's input picture.
        azimuths, elevation, radius, fov: cameras that all objects are compared from, degrees and world units.
        size: side of the pictures that are compared, pixels.
        supersampling: truth is drawn this much larger and shrunk by ``resize``.
        background: behind every picture.
        resize: filter of pictures that are shrunk; networks get theirs from `network_resize`.
        network_resize: how DINOv2 and CLIP get 224 px; Inception resizes itself as in FID, VGG sees ``size``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objects: tuple[Condition, ...] = Field(min_length=1)
    azimuths: tuple[float, ...] = (0.0, 90.0, 180.0, 270.0)
    elevation: float = 30.0
    radius: float = 2.0
    fov: float = 40.0
    size: int = Field(default=256, ge=32, multiple_of=4)
    supersampling: Literal[1, 2, 4] = 2
    background: Literal["white"] = "white"
    resize: Literal["area"] = "area"
    network_resize: Literal["bicubic-antialias"] = "bicubic-antialias"

    @property
    def ids(self) -> list[str]:
        """Of the objects, in order."""
        return [entry.id for entry in self.objects]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with anything in it."""
        return settings_hash(self.model_dump(mode="json"))

    def cameras(self, size: int) -> Views:
        """The cameras of the compared pictures, for pictures of a size."""
        ones = np.ones(len(self.azimuths))
        return orbit(np.array(self.azimuths), self.elevation * ones, self.radius * ones, self.fov * ones, size)

    def write(self, path: Path) -> None:
        """Atomic."""
        write_atomically(path, self.model_dump_json(indent=1).encode())


def freeze_protocol(store: Store, split: str, limit: int, size: int = 256) -> Protocol:
    """The protocol of up to ``limit`` rendered objects spread over a split, each with one of its stored cameras.

    Raises:
        InputError: no object of the split has been rendered with condition views.
    """
    rows = choose_objects(store, split, limit)
    return Protocol(objects=tuple(_condition(store, row["id"], i) for i, row in enumerate(rows)), size=size)


def choose_objects(store: Store, split: str, limit: int) -> list[dict[str, str]]:
    """Rows of up to ``limit`` rendered objects, spread over a split.

    Raises:
        InputError: there is none.
    """
    rows = [row for row in store.objects(split) if store.path("render", row["id"]).is_file()]
    if not rows:
        raise InputError(f"{store.root}: no rendered object in split {split!r}; run `diff2to3 data render`")
    step = max(1, len(rows) / limit)
    return [rows[int(i * step)] for i in range(min(limit, len(rows)))]


def refuse_unknown_objects(store: Store, protocol: Protocol) -> None:
    """Raises an InputError where a data set lacks objects of a protocol."""
    if unknown := sorted(set(protocol.ids) - {row["id"] for row in store.objects()}):
        raise InputError(f"{store.root}: {len(unknown)} objects of the protocol are not in it, first {unknown[0]}")


def _condition(store: Store, object_id: str, number: int) -> Condition:
    rendered = store.read("render", object_id)
    if not len(rendered.get("condition_pose", ())):
        raise InputError(f"{store.root}: {object_id} was rendered without condition views; expected at least one")
    view = number % min(_CONDITIONS, len(rendered["condition_pose"]))
    return Condition(
        id=object_id,
        azimuth=float(rendered["condition_azimuth"][view]),
        world_to_camera=rendered["condition_pose"][view].tolist(),
        intrinsics=rendered["condition_intrinsics"][view].tolist(),
    )


def read_protocol(path: Path) -> Protocol:
    """A protocol from its file.

    Raises:
        InputError: it cannot be read or is not one.
    """
    try:
        return Protocol.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable protocol file ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: not a protocol: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
