"""Configurations of the models; every one is frozen, refuses unknown fields and has presets by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from sparse_vae import StructureVAEConfig

PresetName = Literal["tiny", "small", "paper"]


# What a config from elsewhere may ask for, as in sparse_vae: far beyond any model that trains.
Count = Annotated[int, Field(gt=0, le=1 << 16)]
Blocks = Annotated[int, Field(gt=0, le=1024)]
GridSize = Annotated[int, Field(gt=0, le=512)]
Ratio = Annotated[float, Field(gt=0, le=64)]
Levels = Annotated[tuple[Count, ...], Field(max_length=8)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _choose(presets: dict[str, dict[str, Any]], name: str, owner: str) -> dict[str, Any]:
    if name not in presets:
        raise ValueError(f"{owner} has no preset {name!r}: choose one of {', '.join(presets)}")
    return presets[name]


class RotaryConfig(_Config):
    """Options of `marope.MARoPE` other than head dimension and grid size; the defaults are the paper's placement."""

    axes_dim: tuple[Count, Count, Count] | None = None
    theta: PositiveFloat | tuple[PositiveFloat, PositiveFloat, PositiveFloat] = 10000.0
    plane_axis: str = "z"
    orientation: tuple[str, str] = ("+x", "+y")
    plane_extent: Literal["index", "grid"] = "index"
    interleaved: bool = True
    scaling: tuple[Literal["linear", "ntk"], PositiveFloat] | None = None


FRONT_PLANE = {"plane_axis": "-y", "orientation": ("-z", "+x")}
"""The plane before the object as the camera at azimuth 0 sees it: from -y, rows downwards (-z), columns to +x."""


class SMDiTConfig(_Config):
    """Sparse-structure multi-modal diffusion transformer (Diff2to3, section 3.2).

    Attributes:
        latent_channels: channels of a voxel's latent, input and output.
        condition_channels: channels of an image token.
        grid_size: side of the latents' voxel grid.
        width: channels of the trunk, `num_heads * head_dim`.
        num_double_blocks: blocks with own weights for image and voxel tokens.
        num_single_blocks: blocks over the concatenated tokens; at least one, since half of a double block that comes
            last would learn nothing.
        mlp_ratio: hidden channels of the MLPs over `width`.
        io_channels: channels of the sparse-convolutional levels before and after the trunk, finest first; each level
            halves the grid. Empty: one token a voxel.
        num_io_blocks: blocks a level, the one that changes the level included.
        io_pooling: how a level gathers 2x2x2 regions. "conv": a strided sparse convolution with a weight for each
            octant (and its transpose); "mean": the mean over active voxels, then submanifold convolutions, as TRELLIS
            has it but for its accidental sum / (count + 1).
        qk_norm: RMS normalisation of queries and keys.
        position: "marope", or "absolute": sin/cos embeddings, 3D for voxels and 2D for patches, added to the tokens.
        rotary: placement of image planes and rotary frequencies, for "marope".
        shared_modulation: one adaLN projection for all blocks of a kind plus a learned bias in each, which saves
            about a third of the parameters.
    """

    kind: Literal["smdit"] = "smdit"
    latent_channels: Count = 8
    condition_channels: Count = 64
    grid_size: GridSize
    width: Count
    num_heads: Count
    head_dim: Count = 64
    num_double_blocks: int = Field(ge=0, le=1024)
    num_single_blocks: Blocks
    mlp_ratio: Ratio = 4.0
    io_channels: Levels = ()
    num_io_blocks: Blocks = 2
    io_pooling: Literal["conv", "mean"] = "conv"
    qk_norm: bool = True
    position: Literal["marope", "absolute"] = "marope"
    rotary: RotaryConfig = RotaryConfig()
    shared_modulation: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width != self.num_heads * self.head_dim:
            raise ValueError(
                f"width must be num_heads * head_dim = {self.num_heads} * {self.head_dim}, got {self.width}"
            )
        _check_levels(self.grid_size, self.io_channels)
        return self

    @property
    def token_grid_size(self) -> int:
        """Side of the grid of voxel tokens, after the sparse-convolutional levels."""
        return self.grid_size >> len(self.io_channels)

    @classmethod
    def preset(cls, name: PresetName) -> SMDiTConfig:
        """`tiny`: 32^3 latents, images of 256^2 (16 x 16 tokens); `small`, `paper`: 64^3 and 512^2 (32 x 32)."""
        return cls(**_choose(_SMDIT, name, "SMDiTConfig"))


_SMDIT: dict[str, dict[str, Any]] = {
    "tiny": {
        "grid_size": 32, "width": 192, "num_heads": 3, "num_double_blocks": 2, "num_single_blocks": 6,
        "io_channels": (64,), "shared_modulation": True, "rotary": FRONT_PLANE,
    },
    "small": {
        "grid_size": 64, "width": 512, "num_heads": 8, "num_double_blocks": 4, "num_single_blocks": 10,
        "io_channels": (128,), "rotary": FRONT_PLANE,
    },
    "paper": {
        "grid_size": 64, "width": 1024, "num_heads": 16, "num_double_blocks": 8, "num_single_blocks": 19,
        "io_channels": (128,), "io_pooling": "mean",
    },
}  # fmt: skip


class CrossDiTConfig(_Config):
    """The cross-attention baseline: TRELLIS's structured-latent flow (trellis/models/structured_latent_flow.py).

    Fields as in `SMDiTConfig`; the others are:
        num_blocks: blocks of self-attention, cross-attention to the condition, and MLP.
        qk_norm: normalise queries and keys of the self-attention; qk_norm_cross: of the cross-attention.
        io_pooling: "trellis" keeps the mean of the public weights, sum / (count + 1); "mean" is the true one.
        use_skip: concatenate the features of the input levels to those of the output levels.
        position: "absolute" (TRELLIS) or "rotary" on the voxels' self-attention.
        condition_position: "absolute" adds 2D sin/cos to condition tokens that carry no position of their own, such
            as FLUX latents; "none" for features that do, such as DINOv2's.
    """

    kind: Literal["cross-dit"] = "cross-dit"
    latent_channels: Count = 8
    condition_channels: Count = 1024
    grid_size: GridSize
    width: Count
    num_heads: Count
    num_blocks: Blocks
    mlp_ratio: Ratio = 4.0
    io_channels: Levels = ()
    num_io_blocks: Blocks = 2
    io_pooling: Literal["trellis", "mean"] = "trellis"
    use_skip: bool = True
    qk_norm: bool = True
    qk_norm_cross: bool = False
    position: Literal["absolute", "rotary"] = "absolute"
    condition_position: Literal["none", "absolute"] = "none"
    shared_modulation: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_heads(self.width, self.num_heads)
        _check_levels(self.grid_size, self.io_channels)
        return self

    @property
    def token_grid_size(self) -> int:
        """Side of the grid of voxel tokens, after the sparse-convolutional levels."""
        return self.grid_size >> len(self.io_channels)

    @classmethod
    def preset(cls, name: PresetName) -> CrossDiTConfig:
        """`paper`: TRELLIS-image-large's SLAT flow. `tiny` and `small`: as wide as SMDiT's presets, about as large."""
        return cls(**_choose(_CROSS, name, "CrossDiTConfig"))


_CROSS: dict[str, dict[str, Any]] = {
    "tiny": {
        "condition_channels": 64, "grid_size": 32, "width": 192, "num_heads": 3, "num_blocks": 6,
        "io_channels": (64,), "io_pooling": "mean", "condition_position": "absolute", "shared_modulation": True,
    },
    "small": {
        "condition_channels": 64, "grid_size": 64, "width": 512, "num_heads": 8, "num_blocks": 12,
        "io_channels": (128,), "io_pooling": "mean", "condition_position": "absolute",
    },
    "paper": {"grid_size": 64, "width": 1024, "num_heads": 16, "num_blocks": 24, "io_channels": (128,)},
}  # fmt: skip


class StructureDiTConfig(_Config):
    """Dense flow over a structure latent: TRELLIS's stage 1 (trellis/models/sparse_structure_flow.py).

    Fields as in `CrossDiTConfig`; `out_channels` defaults to `latent_channels`, `patch_size` is the side of the cubic
    patches of the latent grid that make one token.
    """

    kind: Literal["structure-dit"] = "structure-dit"
    latent_channels: Count = 8
    out_channels: Count | None = None
    condition_channels: Count = 1024
    grid_size: GridSize
    width: Count
    num_heads: Count
    num_blocks: Blocks
    mlp_ratio: Ratio = 4.0
    patch_size: Count = 1
    qk_norm: bool = True
    qk_norm_cross: bool = False
    condition_position: Literal["none", "absolute"] = "none"
    shared_modulation: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_heads(self.width, self.num_heads)
        if self.grid_size % self.patch_size:
            raise ValueError(f"grid_size={self.grid_size} is not a multiple of patch_size={self.patch_size}")
        if (self.grid_size // self.patch_size) ** 3 * self.width > 1 << 28:  # 64 times the paper's
            raise ValueError(
                f"grid_size={self.grid_size} and width={self.width} ask for a position table of more than 1 GB; "
                "raise patch_size"
            )
        return self

    @classmethod
    def preset(cls, name: PresetName) -> StructureDiTConfig:
        """`paper`: TRELLIS-image-large's structure flow. `tiny` and `small`: narrower, for FLUX tokens."""
        return cls(**_choose(_STRUCTURE, name, "StructureDiTConfig"))


_STRUCTURE: dict[str, dict[str, Any]] = {
    "tiny": {
        "condition_channels": 64, "grid_size": 8, "width": 192, "num_heads": 3, "num_blocks": 6,
        "condition_position": "absolute", "shared_modulation": True,
    },
    "small": {
        "condition_channels": 64, "grid_size": 16, "width": 512, "num_heads": 8, "num_blocks": 12,
        "condition_position": "absolute",
    },
    "paper": {"grid_size": 16, "width": 1024, "num_heads": 16, "num_blocks": 24},
}  # fmt: skip


class SamplerConfig(_Config):
    """Defaults of a sampling run; fields as in `smdit.EulerSampler`, `method` chooses the solver."""

    method: Literal["euler", "heun", "multistep"] = "euler"
    steps: Annotated[int, Field(gt=0, le=100_000)] = 25
    guidance: float = 5.0
    interval: tuple[float, float] = (0.0, 1.0)
    shift: PositiveFloat = 1.0
    rescale: float = Field(default=0.0, ge=0, le=1)


class StructureFlowConfig(_Config):
    """Stage 1, image -> occupied voxels: a flow over structure latents and the decoder of the structure VAE.

    Attributes:
        flow: the model of the flow; an SMDiT sees the dense latent grid as voxels that are all active.
        decoder: of the structure VAE, whose decoder half alone is built. It holds the statistics of the latents and
            the occupancy threshold.
        sampler: defaults of `StructureFlow.sample`.
    """

    flow: Annotated[SMDiTConfig | StructureDiTConfig, Field(discriminator="kind")]
    decoder: StructureVAEConfig
    sampler: SamplerConfig = SamplerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        flow = (self.flow.grid_size, self.flow.latent_channels)
        decoder = (self.decoder.latent_size, self.decoder.latent_channels)
        if flow != decoder:
            raise ValueError(f"flow has (grid_size, latent_channels) = {flow}, but the decoder reads {decoder}")
        if isinstance(self.flow, StructureDiTConfig) and self.flow.out_channels not in (None, decoder[1]):
            raise ValueError(f"flow takes {decoder[1]} channels and returns {self.flow.out_channels}: no velocity")
        return self

    @classmethod
    def preset(cls, name: PresetName) -> StructureFlowConfig:
        """`tiny`: an SMDiT on 8^3 latents of a 32^3 grid. `small`: one on 16^3. `paper`: TRELLIS's stage 1."""
        return cls(**_choose(_STAGE_1, name, "StructureFlowConfig"), decoder=StructureVAEConfig.preset(name))


_STAGE_1: dict[str, dict[str, Any]] = {
    "tiny": {
        "flow": {
            "kind": "smdit", "grid_size": 8, "width": 192, "num_heads": 3, "num_double_blocks": 2,
            "num_single_blocks": 5, "shared_modulation": True, "rotary": {**FRONT_PLANE, "plane_extent": "grid"},
        },
    },
    "small": {
        "flow": {
            "kind": "smdit", "grid_size": 16, "width": 512, "num_heads": 8, "num_double_blocks": 4,
            "num_single_blocks": 8, "rotary": {**FRONT_PLANE, "plane_extent": "grid"},
        },
    },
    "paper": {
        "flow": {"kind": "structure-dit", **_STRUCTURE["paper"]},
        "sampler": {"interval": (0.5, 1.0), "shift": 3.0},
    },
}  # fmt: skip


def _check_levels(grid_size: int, io_channels: tuple[int, ...]) -> None:
    if grid_size % 2 ** len(io_channels):
        raise ValueError(
            f"grid_size={grid_size} cannot be halved {len(io_channels)} times, once for each entry of "
            f"io_channels={io_channels}"
        )


def _check_heads(width: int, num_heads: int) -> None:
    if width % (2 * num_heads):
        raise ValueError(f"width={width} does not give num_heads={num_heads} heads of an even number of channels")
