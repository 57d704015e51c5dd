"""The roles of pipelines and data tools: what each part is asked to do. `docs/plugins.md` is generated from this."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from gs_render import Camera, Gaussians
    from gs_render import RenderOutput as Rendering
    from jaxtyping import Float, Float32, Int, UInt8
    from PIL import Image
    from sparse_vae import SparseTensor
    from torch import Tensor

    from diff2to3.data._mesh import Mesh

T = TypeVar("T")


class Matting(Protocol):
    """Cuts the object out of a picture that has no alpha channel."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB picture -> RGBA picture of the same size, straight alpha."""
        ...


class FeatureExtractor(Protocol):
    """Turns condition images into the feature maps and tokens that the flow models see. A `torch.nn.Module`.

    One whose condition is more than its feature map (class tokens, registers) has besides a method
    `condition(images) -> [B, rows, columns, channels]`, which a pipeline then calls instead of `tokens(self(images))`.
    """

    channels: int
    """C, channels of the feature map."""
    stride: int
    """Image pixels a feature-map cell."""
    image_size: int
    """Side of the square condition image it wants, pixels."""

    def __call__(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b c h w"]:
        """RGB in [0, 1] -> feature map, normalised per channel, h = height / stride."""
        ...

    def tokens(self, feature_map: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rows columns channels"]:
        """Feature map -> condition tokens on their grid (2 x 2 patches: [B, h/2, w/2, 4C])."""
        ...


class Structure(Protocol):
    """Stage 1: decides which voxels the object occupies. A `torch.nn.Module`."""

    condition_channels: int
    """Channels of the condition tokens it takes."""
    grid_size: int
    """N of the N^3 voxel grid that its coordinates live in."""

    def sample(
        self,
        condition: Float[Tensor, "b images rows columns channels"],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> list[Int[Tensor, "voxels 3"]]:
        """One set of occupied voxels (x, y, z), int32, for each of the B conditions; seeds has one entry for each."""
        ...


class Backbone(Protocol):
    """Stage 2: the velocity model of the latent flow. A `torch.nn.Module`."""

    config: Any
    """Has latent_channels, condition_channels and grid_size."""

    def __call__(
        self,
        x: SparseTensor,
        t: Float[Tensor, " b"],
        condition: Float[Tensor, "b images rows columns channels"],
    ) -> SparseTensor:
        """Noisy normalised latents at time t in [0, 1] (1 is noise) -> velocity eps - z0 on the same topology."""
        ...


class LatentDecoder(Protocol):
    """Turns latents into Gaussians. A `torch.nn.Module`."""

    config: Any
    """Has latent_channels, grid_size, and latent_mean and latent_std (a value a channel, or None)."""

    def __call__(self, latents: SparseTensor) -> list[Gaussians]:
        """De-normalised latents of B objects -> B sets of Gaussians with activated values."""
        ...


class Renderer(Protocol):
    """Draws Gaussians."""

    def __call__(self, gaussians: Gaussians, cameras: Camera, background: float | Tensor = 1.0) -> Rendering:
        """Gaussians and V cameras -> color [V, H, W, 3], alpha and depth [V, H, W, 1]."""
        ...


class MeshRenderer(Protocol):
    """Draws textured meshes for data sets; knows nothing of Gaussians."""

    def __call__(
        self,
        mesh: Mesh,
        world_to_camera: Float[np.ndarray, "v 4 4"],
        intrinsics: Float[np.ndarray, "v 3 3"],
        size: int,
    ) -> tuple[UInt8[np.ndarray, "v size size 4"], Float32[np.ndarray, "v size/4 size/4"]]:
        """A mesh inside [-0.5, 0.5]^3 and V cameras (OpenCV; pixels, their centres at +0.5) -> RGBA with straight
        alpha, and view-space z of the nearest surface at the centre of each 4 x 4 pixels, inf where there is none.

        Both sides of a triangle show, alpha below one half is a hole. ``size`` is a multiple of 4.
        """
        ...

    def close(self) -> None:
        """Free what it holds outside Python; it is not called afterwards."""
        ...


class Exporter(Protocol):
    """A function that writes Gaussians to a file; its name is the suffix it serves, without the dot."""

    def __call__(self, gaussians: Gaussians, path: Path, /) -> None:
        """Write gaussians to path, whose suffix is the exporter's name."""
        ...


class Metric(Protocol):
    """A function that compares images with the true ones."""

    def __call__(self, images: Float[Tensor, "b 3 h w"], targets: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, " b"]:
        """RGB in [0, 1] -> one figure an image."""
        ...


@dataclass(frozen=True)
class Role(Generic[T]):
    """A part that can be swapped, with the protocol that a component of it keeps.

    Args:
        name: as in the pipeline file and in `ComponentSpec.role`.
        protocol: the Protocol class.
        is_function: the spec's target is the component itself, not a class to build.
    """

    name: str
    protocol: type
    is_function: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        """Names that a component must have, besides being callable."""
        names = {*inspect.get_annotations(self.protocol), *vars(self.protocol)}
        return tuple(sorted(name for name in names if not name.startswith("_")))

    def missing(self, component: object) -> list[str]:
        """What component lacks to play this role; empty when nothing."""
        lacking = [name for name in self.members if not hasattr(component, name)]
        if "__call__" in vars(self.protocol) and not callable(component):
            lacking.append("__call__")
        return lacking


MATTING: Role[Matting] = Role("matting", Matting)
FEATURE_EXTRACTOR: Role[FeatureExtractor] = Role("feature_extractor", FeatureExtractor)
STRUCTURE: Role[Structure] = Role("structure", Structure)
BACKBONE: Role[Backbone] = Role("backbone", Backbone)
LATENT_DECODER: Role[LatentDecoder] = Role("latent_decoder", LatentDecoder)
RENDERER: Role[Renderer] = Role("renderer", Renderer)
MESH_RENDERER: Role[MeshRenderer] = Role("mesh_renderer", MeshRenderer)
EXPORTER: Role[Exporter] = Role("exporter", Exporter, is_function=True)
METRIC: Role[Metric] = Role("metric", Metric, is_function=True)

ROLES: dict[str, Role[Any]] = {
    role.name: role
    for role in (
        MATTING,
        FEATURE_EXTRACTOR,
        STRUCTURE,
        BACKBONE,
        LATENT_DECODER,
        RENDERER,
        MESH_RENDERER,
        EXPORTER,
        METRIC,
    )
}
#: The roles that make up a pipeline, in the order in which they work.
PIPELINE_ROLES: tuple[Role[Any], ...] = (MATTING, FEATURE_EXTRACTOR, STRUCTURE, BACKBONE, LATENT_DECODER, RENDERER)
