"""The contracts can fail: for every check, a component that is broken in just that way."""

import dataclasses
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from diff2to3._matting import BorderMatting
from diff2to3.data._mesh import Mesh
from diff2to3.testing import (
    BackboneContract,
    FeatureExtractorContract,
    LatentDecoderContract,
    MattingContract,
    MeshRendererContract,
    RendererContract,
    StructureContract,
)
from diff2to3.testing._contract import check_manifest_is_light
from gs_render import Gaussians, RenderOutput, TorchRenderer
from pydantic import BaseModel, ConfigDict
from sparse_vae import SparseTensor
from torch import nn


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int = 4
    latent_channels: int = 3
    condition_channels: int = 6
    grid_size: int = 8


class Extractor(nn.Module):
    """A small extractor that keeps the contract; the classes below break it."""

    stride, image_size = 8, 32

    def __init__(self, config=None):
        super().__init__()
        self.config = config or Config()
        self.channels = self.config.channels
        self.layer = nn.Conv2d(3, self.channels, 8, stride=8)

    def forward(self, images):
        return self.layer(images)

    def tokens(self, feature_map):
        return feature_map.permute(0, 2, 3, 1)


class WithoutTokens(Extractor):
    tokens = property()


class Noisy(Extractor):
    def forward(self, images):
        source = torch.Generator()
        source.seed()
        return super().forward(images) + torch.randn((), generator=source)


class Counting(Extractor):
    calls = 0

    def forward(self, images):
        self.calls += 1
        return super().forward(images) + self.calls


class BatchNormalised(Extractor):
    def forward(self, images):
        features = super().forward(images)
        return features - features.mean(dim=0, keepdim=True)


class NotFinite(Extractor):
    def forward(self, images):
        return super().forward(images) / 0


class GlobalRandom(Extractor):
    def forward(self, images):
        torch.rand(1)
        return super().forward(images)


class Reseeding(Extractor):
    def forward(self, images):
        torch.manual_seed(0)
        return super().forward(images)


class LooseConfig(BaseModel):
    channels: int = 4


class WithLooseConfig(Extractor):
    def __init__(self, config=None):
        super().__init__()
        self.config = LooseConfig()


class ForgettingConfig(Config):
    def model_dump_json(self, **options):
        return "{}"


class WithForgettingConfig(Extractor):
    def __init__(self, config=None):
        super().__init__(ForgettingConfig(channels=5))


class HiddenState(Extractor):
    def __init__(self, config=None):
        super().__init__(config)
        self.register_buffer("offset", torch.randn(1), persistent=False)

    def forward(self, images):
        return super().forward(images) + self.offset


class LooseTensor(Extractor):
    def __init__(self, config=None):
        super().__init__(config)
        self.offset = torch.zeros(1)


class WrongShape(Extractor):
    def forward(self, images):
        return super().forward(images)[..., :-1]


class Integers(Extractor):
    def forward(self, images):
        return super().forward(images).int()


class FlatTokens(Extractor):
    def tokens(self, feature_map):
        return feature_map.flatten(1)


class WithCondition(Extractor):
    """One that keeps the contract too: what the pipeline gives to the models is more than the feature map."""

    def condition(self, images):
        tokens = self.tokens(self(images)).flatten(1, 2)
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)[:, None]


class FlatCondition(Extractor):
    def condition(self, images):
        return self.tokens(self(images)).flatten(1, 2)


class WideCondition(Extractor):
    def condition(self, images):
        return self.tokens(self(images)).repeat(1, 1, 1, 2)


class BatchCondition(Extractor):
    def condition(self, images):
        tokens = self.tokens(self(images))
        return tokens - tokens.mean(dim=0, keepdim=True)


class Blind(Extractor):
    def forward(self, images):
        return super().forward(torch.zeros_like(images))


EXTRACTOR_FAILURES = [
    ("test_plays_its_role", WithoutTokens),
    ("test_deterministic", Noisy),
    ("test_deterministic", Counting),
    ("test_batch_independent", BatchNormalised),
    ("test_output_is_finite", NotFinite),
    ("test_global_randomness_is_left_alone", GlobalRandom),
    ("test_global_randomness_is_left_alone", Reseeding),
    ("test_config_round_trip", WithLooseConfig),
    ("test_config_round_trip", WithForgettingConfig),
    ("test_weights_round_trip", HiddenState),
    ("test_moves_as_a_whole", LooseTensor),
    ("test_shapes", WrongShape),
    ("test_shapes", Integers),
    ("test_shapes", FlatTokens),
    ("test_shapes", FlatCondition),
    ("test_shapes", WideCondition),
    ("test_batch_independent", BatchCondition),
    ("test_sees_the_image", Blind),
]


@pytest.mark.parametrize(("check", "broken"), EXTRACTOR_FAILURES, ids=lambda v: getattr(v, "__name__", v))
def test_extractor_check_can_fail(check, broken):
    with pytest.raises(AssertionError):
        getattr(FeatureExtractorContract(), check)(broken())


@pytest.mark.parametrize("check", sorted({check for check, _ in EXTRACTOR_FAILURES}))
def test_extractor_check_can_pass(check):
    for extractor in (Extractor, WithCondition):
        getattr(FeatureExtractorContract(), check)(extractor())


class Structure(nn.Module):
    """A structure model that keeps the contract, with switches that break it."""

    condition_channels, grid_size = 6, 8

    def __init__(self, change=lambda voxels: voxels, silent=False, seeded=True):
        super().__init__()
        self.change, self.silent, self.seeded = change, silent, seeded

    def sample(self, condition, *, seeds, steps=None, guidance=None, callback=None):
        for step in range(steps or 2):
            if callback and not self.silent:
                callback(step + 1, steps or 2)
        found = []
        for seed in seeds:
            source = torch.Generator().manual_seed(seed if self.seeded else 0)
            occupied = torch.rand((8, 8, 8), generator=source) > 0.8
            found.append(self.change(occupied.nonzero().int()))
        return found


STRUCTURE_FAILURES = [
    ("test_voxels", Structure(lambda v: v.long())),
    ("test_voxels", Structure(lambda v: v + 1)),
    ("test_voxels", Structure(lambda v: torch.cat([v, v[:1]]))),
    ("test_voxels", Structure(lambda v: v[:, :2])),
    ("test_progress_and_steps", Structure(silent=True)),
    ("test_seed_matters", Structure(seeded=False)),
]


@pytest.mark.parametrize(("check", "broken"), STRUCTURE_FAILURES)
def test_structure_check_can_fail(check, broken):
    getattr(StructureContract(), check)(Structure())
    with pytest.raises(AssertionError):
        getattr(StructureContract(), check)(broken)


class Backbone(nn.Module):
    config: ClassVar = Config()

    def forward(self, x, t, condition):
        return x.replace(x.features * 2)


class WideVelocity(Backbone):
    def forward(self, x, t, condition):
        return x.replace(x.features.repeat(1, 2))


class OtherTopology(Backbone):
    def forward(self, x, t, condition):
        return SparseTensor.from_coords(x.topology.coords, x.features, x.topology.grid_size)


class MixingObjects(Backbone):
    def forward(self, x, t, condition):
        return x.replace(x.features - x.features.mean(dim=0))


@pytest.mark.parametrize(
    ("check", "broken"),
    [("test_shapes", WideVelocity), ("test_shapes", OtherTopology), ("test_batch_independent", MixingObjects)],
)
def test_backbone_check_can_fail(check, broken):
    getattr(BackboneContract(), check)(Backbone())
    with pytest.raises(AssertionError):
        getattr(BackboneContract(), check)(broken())


class Decoder(nn.Module):
    config: ClassVar = Config()

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    def forward(self, latents):
        objects = []
        for rows in latents.split(latents.features):
            n = len(rows)
            fields = {
                "means": rows[:, :3].tanh() / 2,
                "scales": torch.full((n, 3), 0.1),
                "quaternions": torch.tensor([1.0, 0, 0, 0]).repeat(n, 1),
                "opacities": torch.full((n,), 0.5),
                "sh": torch.zeros(n, 1, 3),
            }
            objects.append(Gaussians(**{name: self.changes.get(name, lambda v: v)(v) for name, v in fields.items()}))
        return objects


@pytest.mark.parametrize(
    "broken",
    [
        Decoder(scales=lambda v: -v),
        Decoder(opacities=lambda v: v * 4),
        Decoder(means=lambda v: v * 1e3),
        Decoder(means=lambda v: v / 0),
    ],
)
def test_decoder_check_can_fail(broken):
    LatentDecoderContract().test_gaussians_are_activated(Decoder())
    with pytest.raises((AssertionError, ValueError)):
        LatentDecoderContract().test_gaussians_are_activated(broken)


def inverted(image):
    cut = BorderMatting()(image)
    cut.putalpha(cut.getchannel("A").point(lambda a: 255 - a))
    return cut


def painting(image):
    result = BorderMatting()(image)
    image.paste((0, 0, 0), (0, 0, 9, 9))
    return result


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("test_cuts_the_object_out", inverted),
        ("test_cuts_the_object_out", lambda image: image),
        ("test_cuts_the_object_out", lambda image: BorderMatting()(image).resize((80, 60))),
        ("test_input_is_not_changed", painting),
    ],
)
def test_matting_check_can_fail(check, broken):
    getattr(MattingContract(), check)(BorderMatting())
    with pytest.raises(AssertionError):
        getattr(MattingContract(), check)(broken)


class Renderer(TorchRenderer):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def __call__(self, gaussians, cameras, background=1.0):
        out = super().__call__(gaussians, cameras, background)
        return RenderOutput(*self.change(out.color, out.alpha, out.depth))


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("test_shapes_and_background", lambda c, a, d: (c, a[..., 0], d)),
        ("test_shapes_and_background", lambda c, a, d: (c - (1 - a) * 0.25, a, d)),
        ("test_agrees_with_the_reference", lambda c, a, d: (c.flip(2), a, d)),
        ("test_agrees_with_the_reference", lambda c, a, d: (c * 0.99, a, d)),
    ],
)
def test_renderer_check_can_fail(check, change):
    getattr(RendererContract(), check)(Renderer(lambda *out: out))
    with pytest.raises(AssertionError):
        getattr(RendererContract(), check)(Renderer(change))


class MeshRenderer:
    """Keeps the contract, through a change of what it draws that may break it."""

    def __init__(self, renderer, change=lambda images, depth: (images, depth), parts=lambda parts: parts):
        self.renderer, self.change, self.parts = renderer, change, parts

    def close(self):
        """Nothing."""

    def __call__(self, mesh, world_to_camera, intrinsics, size):
        return self.change(*self.renderer(Mesh(self.parts(mesh.parts)), world_to_camera, intrinsics, size))


def grey_background(images, depth):
    return np.where(images[..., 3:] == 0, np.uint8([9, 9, 9, 0]), images), depth


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("test_shapes_and_types", {"change": lambda i, d: (i / 255, d)}),
        ("test_shapes_and_types", {"change": lambda i, d: (i[..., :3], d)}),
        ("test_shapes_and_types", {"change": lambda i, d: (i, d.repeat(4, 1).repeat(4, 2))}),
        ("test_shapes_and_types", {"change": grey_background}),
        ("test_a_square_is_where_it_should_be", {"change": lambda i, d: (i[:, ::-1], d[:, ::-1])}),
        ("test_a_square_is_where_it_should_be", {"change": lambda i, d: (i[:, :, ::-1], d[:, :, ::-1])}),
        ("test_a_square_is_where_it_should_be", {"change": lambda i, d: (i[..., [2, 1, 0, 3]], d)}),
        ("test_a_square_is_where_it_should_be", {"change": lambda i, d: (i, d - 0.1)}),
        ("test_a_square_is_where_it_should_be", {"change": lambda i, d: (i, np.where(np.isinf(d), 0, d))}),
        ("test_the_nearer_square_hides_the_other", {"parts": lambda parts: parts[1:]}),
        ("test_the_nearer_square_hides_the_other", {"parts": lambda parts: [opaque(part) for part in parts]}),
    ],
)
def test_mesh_renderer_check_can_fail(mesh_renderer, check, broken):
    getattr(MeshRendererContract(), check)(MeshRenderer(mesh_renderer("cpu")))
    with pytest.raises(AssertionError):
        getattr(MeshRendererContract(), check)(MeshRenderer(mesh_renderer("cpu"), **broken))


def opaque(part):
    return dataclasses.replace(part, colors=np.maximum(part.colors, np.uint8([0, 0, 0, 255])))


def test_light_manifest_check_can_fail(monkeypatch, tmp_path):
    info = tmp_path / "heavy_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diff2to3]\nheavy = heavy_manifest\n")
    manifest = tmp_path / "heavy_manifest.py"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    manifest.write_text("import json\n")
    check_manifest_is_light("heavy-plugin")
    manifest.write_text("import numpy\n")
    with pytest.raises(AssertionError, match="numpy"):
        check_manifest_is_light("heavy-plugin")
    manifest.write_text("1 / 0\n")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check_manifest_is_light("heavy-plugin")


def test_fixture_must_be_given():
    assert isinstance(sys.modules["diff2to3.testing"], types.ModuleType)
    with pytest.raises(NotImplementedError, match="override the fixture"):
        FeatureExtractorContract.component.__wrapped__(FeatureExtractorContract())
