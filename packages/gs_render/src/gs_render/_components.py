"""Renderers as components: a config in, a callable out."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gs_render._camera import Camera
from gs_render._gaussians import Gaussians
from gs_render._render import Backend, RenderOutput, render


class RendererConfig(BaseModel):
    """Options of a renderer.

    filter_2d: variance in pixels^2 added to every projected Gaussian (3DGS 0.3, TRELLIS 0.1).
    antialias: scale opacities so that the filter adds no energy (Mip-Splatting; TRELLIS True).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    filter_2d: float = Field(default=0.3, ge=0.0, allow_inf_nan=False)
    antialias: bool = False

    @classmethod
    def preset(cls, name: str) -> RendererConfig:
        """`"3dgs"` or `"trellis"`, the settings that the assets of each were trained with."""
        presets = {"3dgs": cls(), "trellis": cls(filter_2d=0.1, antialias=True)}
        if name not in presets:
            raise ValueError(f"RendererConfig: unknown preset {name!r}; expected one of {', '.join(presets)}")
        return presets[name]


class AutoRenderer:
    """`render` with fixed options, on the first backend that suits the Gaussians' device and dtype."""

    backend: ClassVar[Backend] = "auto"

    def __init__(self, config: RendererConfig | None = None) -> None:
        self.config = config or RendererConfig()

    def __call__(
        self, gaussians: Gaussians, cameras: Camera, background: float | Float[Tensor, ...] = 1.0
    ) -> RenderOutput:
        """See `gs_render.render`."""
        options = self.config
        return render(
            gaussians,
            cameras,
            background,
            self.backend,
            filter_2d=options.filter_2d,
            antialias=options.antialias,
        )


class CpuRenderer(AutoRenderer):
    """On the numba backend."""

    backend: ClassVar[Backend] = "cpu"


class TorchRenderer(AutoRenderer):
    """On the plain PyTorch backend."""

    backend: ClassVar[Backend] = "torch"


class GsplatRenderer(AutoRenderer):
    """On gsplat's CUDA kernels."""

    backend: ClassVar[Backend] = "gsplat"
