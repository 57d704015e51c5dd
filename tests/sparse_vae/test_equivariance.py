"""Order means nothing: neither that of voxels nor that of objects, nor which objects share a batch."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_vae import (
    GaussianConfig,
    SparseConv3d,
    SparseDownConv3d,
    SparseTensor,
    SparseUpConv3d,
    SparseVAE,
    SparseVAEConfig,
    downsample,
    upsample,
)
from torch import nn

GRID, CHANNELS, CLOSE = 8, 5, {"atol": 1e-5, "rtol": 1e-5}


class Pyramid(nn.Module):
    """Every convolution and pooling once."""

    def __init__(self):
        super().__init__()
        self.first, self.down = SparseConv3d(CHANNELS, 6), SparseDownConv3d(6, 7)
        self.coarse, self.up = SparseConv3d(7, 6), SparseUpConv3d(6, 6)

    def forward(self, x):
        h = self.first(x)
        low = self.coarse(self.down(h.replace(h.features.relu())))
        pooled = upsample(downsample(h), x.topology)
        return h.replace(self.up(low, x.topology).features + pooled.features)


@cache
def models():
    """Functions from features to a row for every voxel."""
    config = SparseVAEConfig(
        grid_size=GRID,
        in_channels=CHANNELS,
        latent_channels=3,
        width=24,
        num_blocks=2,
        num_heads=3,
        window_size=4,
        gaussians=GaussianConfig(num_gaussians=2),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, pyramid = SparseVAE(config).eval(), Pyramid().eval()
        for half in (vae.encoder, vae.decoder):
            nn.init.normal_(half.transformer.output_layer.weight, std=0.2)

    def autoencoder(x):
        objects = vae.decode(vae.encode(x))
        rows = [torch.cat([g.means, g.scales, g.quaternions, g.opacities[:, None], g.sh[:, 0]], 1) for g in objects]
        return x.replace(torch.cat(rows).view(len(x.topology), 2 * 14))

    return {"convolutions": pyramid, "autoencoder": autoencoder}


@st.composite
def scenes(draw):
    """Coordinates and features of up to four objects, some of them possibly empty."""
    cells = st.lists(st.integers(0, GRID**3 - 1), unique=True, max_size=40)
    objects = [torch.tensor(c, dtype=torch.int64) for c in draw(st.lists(cells, min_size=1, max_size=4))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    coords = [torch.stack([c // GRID**2, c // GRID % GRID, c % GRID], dim=1) for c in objects]
    return coords, [torch.randn(len(c), CHANNELS, generator=generator) for c in coords], generator


@torch.no_grad()
def run(name, coords, features):
    """Output rows of every object, in the order in which its voxels were given."""
    x = SparseTensor.from_coords(coords, features, GRID)
    results = []
    for voxels, out in zip(coords, models()[name](x).unbatch(), strict=True):
        keys, given = ((c[:, 0] * GRID + c[:, 1]) * GRID + c[:, 2] for c in (out.topology.coords[:, 1:], voxels))
        results.append(out.features[torch.searchsorted(keys.long(), given)])
    return results


@pytest.mark.parametrize("name", ["convolutions", "autoencoder"])
@settings(max_examples=20, deadline=None)
@given(scenes())
def test_permuting_voxels_and_objects_permutes_the_output(name, scene):
    coords, features, generator = scene
    expected = run(name, coords, features)
    order = torch.randperm(len(coords), generator=generator).tolist()
    shuffles = [torch.randperm(len(coords[i]), generator=generator) for i in order]
    actual = run(
        name,
        [coords[i][s] for i, s in zip(order, shuffles, strict=True)],
        [features[i][s] for i, s in zip(order, shuffles, strict=True)],
    )
    for rows, i, shuffle in zip(actual, order, shuffles, strict=True):
        torch.testing.assert_close(rows, expected[i][shuffle], **CLOSE)


@pytest.mark.parametrize("name", ["convolutions", "autoencoder"])
@settings(max_examples=20, deadline=None)
@given(scenes())
def test_an_object_does_not_depend_on_its_batch_mates(name, scene):
    coords, features, _ = scene
    for voxels, rows, together in zip(coords, features, run(name, coords, features), strict=True):
        torch.testing.assert_close(run(name, [voxels], [rows])[0], together, **CLOSE)
