"""Where the cameras of a data set stand. numpy only: rendering workers do not need torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VIEW_RADIUS = 2.0  # world units; TRELLIS dataset_toolkits/render.py
VIEW_FOV_DEGREES = 40.0


@dataclass(frozen=True)
class Views:
    """``world_to_camera`` [V, 4, 4] (OpenCV) and ``intrinsics`` [V, 3, 3] in pixels of ``size`` x ``size`` pictures."""

    world_to_camera: np.ndarray
    intrinsics: np.ndarray
    size: int


def orbit(azimuth: np.ndarray, elevation: np.ndarray, radius: np.ndarray, fov: np.ndarray, size: int) -> Views:
    """Cameras that look at the origin, z up.

    Args:
        azimuth: degrees [V]; 0 looks from -y, 90 from +x.
        elevation: degrees [V] above the horizon, within (-90, 90).
        radius: distance [V] in world units.
        fov: field of view [V] in degrees.
        size: side of the picture in pixels.
    """
    a, e = np.radians(azimuth), np.radians(elevation)
    back = np.stack([np.cos(e) * np.sin(a), -np.cos(e) * np.cos(a), np.sin(e)], -1)  # from the origin to the eye
    right = np.stack([np.cos(a), np.sin(a), np.zeros_like(a)], -1)
    down = np.cross(-back, right)
    pose = np.zeros((len(a), 4, 4))
    pose[:, :3, :3] = np.stack([right, down, -back], 1)
    pose[:, 2, 3] = radius
    pose[:, 3, 3] = 1
    focal = size / 2 / np.tan(np.radians(fov) / 2)
    intrinsics = np.zeros((len(a), 3, 3))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, :2, 2] = size / 2
    intrinsics[:, 2, 2] = 1
    return Views(pose.astype(np.float32), intrinsics.astype(np.float32), size)


def sphere_views(count: int, size: int, rng: np.random.Generator) -> Views:
    """``count`` views spread evenly over the sphere (Fibonacci lattice, randomly turned), radius 2, 40 degrees."""
    index = np.arange(count) + 0.5
    elevation = np.degrees(np.arcsin(np.clip(1 - 2 * index / count, -0.999, 0.999)))
    azimuth = (np.degrees(index * np.pi * (3 - np.sqrt(5))) + rng.uniform(0, 360)) % 360
    return orbit(azimuth, elevation, np.full(count, VIEW_RADIUS), np.full(count, VIEW_FOV_DEGREES), size)


def random_views(count: int, size: int, rng: np.random.Generator) -> Views:
    """``count`` independent views, uniform on the sphere, radius 2, 40 degrees."""
    elevation = np.degrees(np.arcsin(rng.uniform(-0.99, 0.99, count)))
    azimuth = rng.uniform(0, 360, count)
    return orbit(azimuth, elevation, np.full(count, VIEW_RADIUS), np.full(count, VIEW_FOV_DEGREES), size)


def condition_views(
    count: int, size: int, rng: np.random.Generator, fov_range: tuple[float, float] = (20.0, 60.0)
) -> tuple[Views, np.ndarray]:
    """Views a person might photograph from, and their azimuths in degrees.

    Azimuths are stratified over the full turn, elevations uniform in [-5, 40] degrees, fields of view in
    ``fov_range``, degrees, with the distance that frames the unit cube's sphere.
    """
    azimuth = (np.arange(count) + rng.uniform(0, 1, count)) * 360 / count
    elevation = rng.uniform(-5, 40, count)
    fov = rng.uniform(*fov_range, count)
    radius = np.sqrt(3) / 2 / np.sin(np.radians(fov) / 2) * 0.9
    return orbit(azimuth, elevation, radius, fov, size), azimuth.astype(np.float32)
