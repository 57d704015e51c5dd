"""What one user may ask of the server, and the checks of what came."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from diff2to3._errors import ImageInputError, InputError
from diff2to3._inputs import MAX_PIXELS, read_image

#: Seeds are numbers of JavaScript, which are exact up to here.
MAX_SEED = 2**53 - 1
MAX_GUIDANCE = 20.0


class Limits(BaseModel):
    """Limits of the app.

    Args:
        upload_megabytes: size of a picture's file.
        pixels: of a picture; more are refused before anything is decoded.
        samples: variants in one call.
        steps: of one sampler.
        queue: calls that may wait; further ones are turned away.
        sessions: users whose results are kept; of more, the oldest one's are removed.
        minutes: how long files are kept at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    upload_megabytes: int = Field(default=20, ge=1)
    pixels: int = Field(default=25_000_000, ge=1, le=MAX_PIXELS)
    samples: int = Field(default=4, ge=1)
    steps: int = Field(default=100, ge=1)
    queue: int = Field(default=16, ge=1)
    sessions: int = Field(default=32, ge=1)
    minutes: int = Field(default=60, ge=1)


@dataclass(frozen=True)
class Settings:
    """How to generate; None is the pipeline's own setting."""

    seed: int
    samples: int
    steps: int | None
    guidance: float | None


def check_settings(limits: Limits, seed: Any, samples: Any, steps: Any, guidance: Any) -> Settings:
    """Settings from whatever a client sent.

    Raises:
        InputError: not a number, or outside the limits.
    """
    return Settings(
        seed=_whole("seed", seed, 0, MAX_SEED),
        samples=_whole("samples", samples, 1, limits.samples),
        steps=None if steps is None else _whole("steps", steps, 1, limits.steps),
        guidance=None if guidance is None else float(_number("guidance", guidance, 0.0, MAX_GUIDANCE)),
    )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if (number := _number(name, value, low, high)) != int(number):
        raise InputError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
    return int(number)


def _number(name: str, value: Any, low: float, high: float) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not low <= value <= high:
        raise InputError(f"{name} is {repr(value)[:40]}; expected a number from {low} to {high}")
    return value


def uploaded_picture(limits: Limits, upload: Any) -> tuple[Image.Image, str]:
    """The picture of an upload (the dict that Gradio makes of it), and a name for what is made from it.

    Raises:
        ImageInputError: nothing was uploaded, it is no picture, or one that is too large.
    """
    path = Path((upload or {}).get("path") or "")
    if not path.is_file():
        raise ImageInputError("there is no picture yet; upload one, or choose an example")
    if path.stat().st_size > limits.upload_megabytes * 1_000_000:
        raise ImageInputError(f"{path.name} is too large; expected at most {limits.upload_megabytes} MB")
    try:
        _check_pixels(path, limits.pixels)
        return read_image(path), path.stem[:64]
    except ImageInputError as error:
        raise ImageInputError(str(error).replace(str(path), path.name)) from error


def _check_pixels(path: Path, most: int) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return  # read_image says what is wrong
    if width * height > most:
        raise ImageInputError(f"{path.name} has {width} x {height} pixels; expected at most {most / 1e6:g} million")
