"""A data set of a few small meshes, rendered and voxelized, and the folder of the meshes."""

import numpy as np
import pytest

GRID, SIZE = 16, 32


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """All these tests want it."""


@pytest.fixture(scope="session")
def eval_assets(tmp_path_factory):
    """Meshes `a` to `e` with colours at their vertices, none of them symmetric."""
    import trimesh

    folder = tmp_path_factory.mktemp("assets")
    for number, name in enumerate("abcde"):
        rng = np.random.default_rng(number)
        corners = rng.uniform(-0.5, 0.5, (24, 1, 3)) + rng.uniform(-0.25, 0.25, (24, 3, 3))
        colors = np.concatenate([rng.integers(0, 256, (72, 3)), np.full((72, 1), 255)], 1).astype(np.uint8)
        mesh = trimesh.Trimesh(
            corners.reshape(-1, 3), np.arange(72).reshape(-1, 3), vertex_colors=colors, process=False
        )
        mesh.export(folder / f"{name}.glb")
    lines = [f"{name},{'val' if name in 'de' else 'train'}" for name in "abcde"]
    (folder / "index.csv").write_text("\n".join(["id,split", *lines]) + "\n")
    return folder


@pytest.fixture(scope="session")
def eval_data(eval_assets, mesh_renderer, tmp_path_factory):
    """The data set: three objects in split train, two in val, views of 32 px, voxels of a 16^3 grid."""
    from diff2to3.data._render_stage import (
        RenderSettings,
        list_assets,
        render_objects,
        voxelize_objects,
        write_objects,
    )
    from diff2to3.data._store import Store

    mesh_renderer("cpu")
    store, rows = Store(tmp_path_factory.mktemp("data")), list_assets(eval_assets)
    write_objects(store, rows)
    ids = [row["id"] for row in rows]
    settings = RenderSettings(size=SIZE, num_views=4, num_extra_views=2, num_condition_views=3)
    assert not render_objects(eval_assets, store, ids, settings, 0)
    assert not voxelize_objects(eval_assets, store, ids, GRID, 0)
    return store
