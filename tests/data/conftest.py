"""Meshes and the renderer that the tests of the data toolkit share."""

import numpy as np
import pytest
from diff2to3.data._mesh import Mesh, MeshPart


@pytest.fixture(scope="session", params=["gl", "cpu"])
def renderer(request, mesh_renderer):
    """The renderers of meshes that show the base colour."""
    return mesh_renderer(request.param)


@pytest.fixture(scope="session")
def flat_mesh():
    """Factory of a mesh from triangles [F, 3, 3] and a colour per triangle [F, 4]."""

    def build(triangles, colors):
        triangles = np.asarray(triangles, np.float32)
        count = len(triangles) * 3
        return Mesh(
            (
                MeshPart(
                    triangles.reshape(-1, 3),
                    np.arange(count, dtype=np.int32).reshape(-1, 3),
                    np.zeros((count, 2), np.float32),
                    np.full((1, 1, 4), 255, np.uint8),
                    np.repeat(np.asarray(colors, np.uint8), 3, axis=0),
                ),
            )
        )

    return build


@pytest.fixture(scope="session")
def lopsided(flat_mesh):
    """Forty coloured triangles without any symmetry."""
    rng = np.random.default_rng(5)
    corners = rng.uniform(-0.45, 0.45, (40, 1, 3)) * 0.8 + rng.uniform(-0.12, 0.12, (40, 3, 3))
    colors = np.concatenate([rng.integers(0, 256, (40, 3)), np.full((40, 1), 255)], 1)
    return flat_mesh(corners, colors)
