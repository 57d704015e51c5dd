"""Plans of the GPU kernels hold exactly the pairs of a kernel map, and skip what they promise to skip."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_vae import Topology
from sparse_vae._conv import _neighbour_map, _octant_map
from sparse_vae._tile_plan import TILE, PairPlan, TilePlan


def pairs_of(sources, num_inputs):
    k, i = (sources < num_inputs).nonzero(as_tuple=True)
    return set(zip(k.tolist(), i.tolist(), sources[k, i].tolist(), strict=True))


def pairs_of_tile_plan(plan):
    found = set()
    groups, num_tiles, size = plan.tile_offsets.shape
    for group in range(groups):
        for tile in range(num_tiles):
            count = int(plan.tile_counts[group, tile])
            for k in plan.tile_offsets[group, tile, :count].tolist():
                assert k // size == group
                places = range(tile * TILE, min((tile + 1) * TILE, plan.order.shape[1]))
                found |= {
                    (k, int(plan.order[group, p]), int(plan.sources[k, p])) for p in places if plan.sources[k, p] >= 0
                }
    return found


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 300), st.integers(2, 12), st.integers(0, 10**6))
def test_plans_hold_every_pair_once(count, grid_size, seed):
    cells = torch.randperm(grid_size**3, generator=torch.Generator().manual_seed(seed))[:count]
    coords = torch.stack([cells // grid_size**2, cells // grid_size % grid_size, cells % grid_size], dim=1)
    topology = Topology.from_coords([coords], 2 * (grid_size // 2 + 1))[0]
    octants = _octant_map(topology)
    for kernel_map in (_neighbour_map(topology, 3), octants, octants.transposed):
        expected = pairs_of(kernel_map.sources, kernel_map.num_inputs)
        assert pairs_of_tile_plan(TilePlan.build(kernel_map.sources, kernel_map.num_inputs)) == expected
        plan = PairPlan.build(kernel_map.sources, kernel_map.num_inputs)
        rows = zip(plan.counts.tolist(), plan.sources.tolist(), plan.outputs.tolist(), strict=True)
        assert {(k, i, j) for k, (n, a, b) in enumerate(rows) for j, i in zip(a[:n], b[:n], strict=True)} == expected


def test_tiles_of_a_surface_skip_most_absent_offsets():
    voxels = torch.cartesian_prod(*[torch.arange(64)] * 3)
    distance = (voxels - 31.5).square().sum(dim=1).sqrt()
    topology = Topology.from_coords([voxels[(distance - 28).abs() < 0.5]], 64)[0]
    kernel_map = _neighbour_map(topology, 3)
    plan = kernel_map.tile_plan
    walked = float(plan.tile_counts.sum(dim=0).float().mean())
    needed = float((kernel_map.sources < len(topology)).sum(dim=0).float().mean())
    assert needed < walked < 1.5 * needed  # without sorting: all 27, which is 2.6 times as many
