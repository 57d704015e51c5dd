"""Meshes by depth fusion."""

import pytest
import torch
from gs_render import Gaussians, extract_mesh, load
from gs_render._mesh import surface_nets


def test_surface_nets_of_a_ball():
    axes = torch.arange(24.0)
    grid = torch.stack(torch.meshgrid(axes, axes, axes, indexing="ij"), dim=-1)
    vertices, faces = surface_nets((grid - 11.3).norm(dim=-1) - 8)
    assert ((vertices - 11.3).norm(dim=1) - 8).abs().max() < 0.06
    a, b, c = (vertices[faces[:, corner]] - 11.3 for corner in range(3))
    assert ((torch.linalg.cross(b - a, c - a) * a).sum(-1) > 0).all()  # wound outwards
    volume = (torch.linalg.cross(a, b) * c).sum() / 6
    assert abs(volume / (4 / 3 * torch.pi * 8**3) - 1) < 0.02
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert len({tuple(sorted(edge)) for edge in edges.tolist()}) * 2 == len(edges)  # every edge has two faces


def test_sphere_of_gaussians(tmp_path):
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(6000, 3, generator=generator), dim=1)
    ball = Gaussians.from_rgb(
        0.4 * direction,
        torch.full((6000, 3), 0.01),
        torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(6000, 4),
        torch.full((6000,), 0.95),
        direction / 2 + 0.5,
    )
    mesh = extract_mesh(ball, resolution=40, num_views=20, size=112)
    voxel = 0.9 / 40
    # Chamfer distance to the true sphere, both ways: mesh -> sphere in closed form, sphere -> mesh by its points.
    there = (mesh.vertices.norm(dim=1) - 0.4).abs().mean()
    back = torch.cdist(0.4 * direction[:1000], mesh.vertices).amin(dim=1).mean()
    assert (there + back) / 2 < voxel
    assert (mesh.colors - (mesh.vertices / mesh.vertices.norm(dim=1, keepdim=True) / 2 + 0.5)).abs().mean() < 0.05
    trimesh = pytest.importorskip("trimesh")
    for suffix in (".obj", ".glb"):
        read = trimesh.load(mesh.save(tmp_path / f"a{suffix}"), force="mesh", process=False)
        assert len(read.faces) == len(mesh.faces)
        assert torch.allclose(torch.tensor(read.vertices[:, 1]).float(), mesh.vertices[:, 2], atol=1e-5)  # y up
    assert b'"COLOR_0"' in (tmp_path / "a.glb").read_bytes()
    first = (tmp_path / "a.obj").read_text().split("\n")[0].split()
    assert first[0] == "v"
    assert [float(value) for value in first[4:]] == pytest.approx(mesh.colors[0].tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="without a primitive"):
        load(tmp_path / "a.glb")


def test_errors(make_gaussians, tmp_path):
    with pytest.raises(ValueError, match="got none"):
        extract_mesh(Gaussians.empty())
    with pytest.raises(ValueError, match=r"8..512, got 4"):
        extract_mesh(make_gaussians(3), resolution=4)
