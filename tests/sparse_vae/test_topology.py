"""Invariants of the topology and what it derives from coordinates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_vae import SparseTensor, Topology
from sparse_vae import _topology as topology_module

GRID = 6


@st.composite
def scenes(draw):
    """Coordinates [L, 3] of up to three objects on a small grid, some of them possibly empty."""
    cells = st.lists(st.integers(0, GRID**3 - 1), unique=True, max_size=25)
    objects = draw(st.lists(cells, min_size=1, max_size=3))
    tensors = [torch.tensor(cell, dtype=torch.int64) for cell in objects]
    return [torch.stack([c // GRID**2, c // GRID % GRID, c % GRID], dim=1) for c in tensors]


@settings(max_examples=30, deadline=None)
@given(scenes())
def test_from_coords_sorts_and_counts(objects):
    topology, order = Topology.from_coords(objects, GRID)
    rows = [(b, *voxel) for b, voxels in enumerate(objects) for voxel in voxels.tolist()]
    assert [tuple(row) for row in topology.coords.tolist()] == sorted(rows)
    assert [rows[i] for i in order.tolist()] == sorted(rows)
    assert topology.lengths == [len(voxels) for voxels in objects]
    assert topology.offsets.tolist() == [sum(topology.lengths[:b]) for b in range(len(objects) + 1)]
    assert topology.batch_index.tolist() == [row[0] for row in sorted(rows)]
    Topology(topology.coords, GRID, len(objects))


@settings(max_examples=30, deadline=None)
@given(scenes(), st.sampled_from([1, 3, 5]))
def test_neighbours(objects, kernel_size):
    topology, _ = Topology.from_coords(objects, GRID)
    rows = [tuple(row) for row in topology.coords.tolist()]
    found = topology.neighbours(kernel_size).tolist()
    steps = range(-(kernel_size // 2), kernel_size // 2 + 1)
    offsets = [(i, j, k) for i in steps for j in steps for k in steps]
    for k, offset in enumerate(offsets):
        for i, (b, *voxel) in enumerate(rows):
            wanted = (b, *(v + o for v, o in zip(voxel, offset, strict=True)))
            assert found[k][i] == (rows.index(wanted) if wanted in rows else len(rows))


def test_neighbours_by_search_equal_those_by_table(objects, monkeypatch):
    by_table = Topology.from_coords(objects, 16)[0].neighbours()
    monkeypatch.setattr(topology_module, "DENSE_TABLE_LIMIT", 0)
    assert torch.equal(Topology.from_coords(objects, 16)[0].neighbours(), by_table)


@settings(max_examples=30, deadline=None)
@given(scenes())
def test_coarser(objects):
    fine, _ = Topology.from_coords(objects, GRID)
    coarse, parent, octant = fine.coarser()
    Topology(coarse.coords, GRID // 2, len(objects))
    assert fine.coarser().topology is coarse
    halved = fine.coords.clone()
    halved[:, 1:] //= 2
    assert torch.equal(coarse.coords[parent], halved)
    x, y, z = (fine.coords[:, 1:] % 2).unbind(dim=1)
    assert torch.equal(octant, (4 * x + 2 * y + z).long())
    children = fine.children()
    assert torch.equal(children[octant, parent], torch.arange(len(fine)))
    assert int((children < len(fine)).sum()) == len(fine)


@settings(max_examples=30, deadline=None)
@given(scenes(), st.sampled_from([(2, 0), (2, 1), (3, 2), (6, 3), (8, 0)]))
def test_windows(objects, window):
    size, shift = window
    topology, _ = Topology.from_coords(objects, GRID)
    layout = topology.windows(size, shift)
    rows = layout.to_segments(topology.coords)
    keys = torch.cat([rows[:, :1], (rows[:, 1:] + shift) // size], dim=1).tolist()
    segments = [number for number, length in enumerate(layout.lengths) for _ in range(length)]
    assert len(segments) == len(keys)
    for key, segment in zip(keys, segments, strict=True):
        assert (key == keys[0]) == (segment == segments[0])
    assert torch.equal(layout.from_segments(rows), topology.coords)
    assert topology.windows(size, shift) is layout


def test_subdivide_is_undone_by_coarser(objects):
    topology, _ = Topology.from_coords(objects, 16)
    fine = topology.subdivide()
    assert fine.grid_size == 32
    assert len(fine) == 8 * len(topology)
    assert torch.equal(fine.coarser().topology.coords, topology.coords)


def test_full_grid_rows_run_like_a_flattened_volume():
    volume = torch.arange(2 * 4**3).view(2, 4, 4, 4)
    topology = Topology.full(2, 4)
    b, x, y, z = topology.coords.long().unbind(dim=1)
    assert torch.equal(volume[b, x, y, z], volume.flatten())
    assert topology.layout.is_uniform


def test_memo_makes_a_value_once_and_outside_inference_mode(objects):
    topology, _ = Topology.from_coords(objects, 16)
    with torch.inference_mode():
        first = topology.memo("key", lambda: torch.ones(2))
    assert topology.memo("key", lambda: torch.zeros(2)) is first
    (torch.ones(2, requires_grad=True) * first).sum().backward()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 0, 0, 8]], r"voxels in \[0, 8\)"),
        ([[0, 0, -1, 0]], r"voxels in \[0, 8\)"),
        ([[1, 0, 0, 0]], r"objects in \[0, 1\)"),
        ([[0, 0, 0, 1], [0, 0, 0, 0]], "sorted"),
        ([[0, 0, 0, 1], [0, 0, 0, 1]], "repeated"),
    ],
)
def test_constructor_checks_the_invariants(rows, message):
    with pytest.raises(ValueError, match=message):
        Topology(torch.tensor(rows, dtype=torch.int32), 8, 1)


def test_constructor_checks_the_form():
    # Called directly: under pytest the annotations would catch these first.
    check = topology_module._check_form
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \[N, 4\]"):
        check(torch.zeros(3, 3, dtype=torch.int32), 8, 1)
    with pytest.raises(ValueError, match=r"dtype torch.float32, expected torch.int32"):
        check(torch.zeros(1, 4), 8, 1)
    with pytest.raises(ValueError, match="grid_size must be positive"):
        check(torch.zeros(1, 4, dtype=torch.int32), 0, 1)


def test_from_coords_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"repeat 1 rows, for example .* \(0, 1, 2, 3\)"):
        Topology.from_coords(torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 2, 3]]), 8)
    with pytest.raises(ValueError, match="expected objects"):
        Topology.from_coords([torch.tensor([[0, 1, 9]])], 8)
    with pytest.raises(ValueError, match="lists 1 objects"):
        Topology.from_coords([torch.zeros(1, 3, dtype=torch.int32)], 8, batch_size=2)
    with pytest.raises(ValueError, match="cannot be halved"):
        Topology.from_coords([torch.zeros(1, 3, dtype=torch.int32)], 5)[0].coarser()
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        Topology.full(1, 4).neighbours(2)
    with pytest.raises(ValueError, match="shift < size"):
        Topology.full(1, 4).windows(4, 4)


def test_sparse_tensor_checks_rows_and_topologies():
    topology = Topology.full(1, 2)
    with pytest.raises(ValueError, match=r"expected \[8, C\]"):
        SparseTensor(torch.zeros(7, 3), topology)
    with pytest.raises(ValueError, match="different topologies"):
        SparseTensor.cat(
            [SparseTensor(torch.zeros(8, 1), topology), SparseTensor(torch.zeros(8, 1), Topology.full(1, 2))]
        )
    larger = SparseTensor(torch.zeros(64, 1), Topology.full(1, 4))
    with pytest.raises(ValueError, match=r"grid sizes \[2, 4\]"):
        SparseTensor.batch([SparseTensor(torch.zeros(8, 1), topology), larger])


def test_batch_and_unbatch(objects):
    x = SparseTensor.from_coords(objects, [torch.randn(len(o), 3) for o in objects], 16)
    pieces = x.unbatch()
    assert [len(piece.topology) for piece in pieces] == [len(o) for o in objects]
    assert all(piece.topology.batch_size == 1 for piece in pieces)
    again = SparseTensor.batch(pieces)
    assert torch.equal(again.features, x.features)
    assert torch.equal(again.topology.coords, x.topology.coords)
    twice = SparseTensor.batch([x, x])
    assert twice.topology.lengths == x.topology.lengths * 2
    Topology(twice.topology.coords, 16, 6)


def test_cat_and_to(objects):
    x = SparseTensor.from_coords(objects, [torch.randn(len(o), 3) for o in objects], 16)
    assert SparseTensor.cat([x, x.replace(x.features[:, :1])]).num_channels == 4
    half = x.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.topology is x.topology


def test_objects_may_be_empty():
    empty = torch.empty(0, 3, dtype=torch.int32)
    topology, _ = Topology.from_coords([empty, torch.tensor([[1, 1, 1]]), empty], 4)
    assert topology.lengths == [0, 1, 0]
    assert topology.coarser().topology.lengths == [0, 1, 0]
    nothing, _ = Topology.from_coords([empty], 4)
    assert nothing.neighbours().shape == (27, 0)
    assert nothing.windows(2, 1).num_rows == 0
