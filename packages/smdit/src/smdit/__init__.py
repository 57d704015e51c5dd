"""Sparse-structure multi-modal diffusion transformer (SMDiT), flow matching and samplers."""

from smdit._blocks import DoubleStreamBlock, JointTokens, SingleStreamBlock
from smdit._capture import CapturedVelocity, compile_blocks
from smdit._config import (
    CrossDiTConfig,
    RotaryConfig,
    SamplerConfig,
    SMDiTConfig,
    StructureDiTConfig,
    StructureFlowConfig,
)
from smdit._cross_dit import CrossDiT
from smdit._flow import flow_matching_loss, sample_time, voxel_noise
from smdit._flux_weights import from_bfl_block, from_diffusers_double_block, from_diffusers_single_block
from smdit._masters import MasterWeights
from smdit._model import SMDiT
from smdit._samplers import (
    EulerSampler,
    HeunSampler,
    MultistepSampler,
    SamplingStep,
    guidance_from_scale,
    make_sampler,
)
from smdit._structure_dit import StructureDiT
from smdit._structure_flow import StructureFlow
from smdit._trellis import cross_dit_from_trellis, load_trellis, structure_dit_from_trellis

__all__ = [
    "CapturedVelocity",
    "CrossDiT",
    "CrossDiTConfig",
    "DoubleStreamBlock",
    "EulerSampler",
    "HeunSampler",
    "JointTokens",
    "MasterWeights",
    "MultistepSampler",
    "RotaryConfig",
    "SMDiT",
    "SMDiTConfig",
    "SamplerConfig",
    "SamplingStep",
    "SingleStreamBlock",
    "StructureDiT",
    "StructureDiTConfig",
    "StructureFlow",
    "StructureFlowConfig",
    "compile_blocks",
    "cross_dit_from_trellis",
    "flow_matching_loss",
    "from_bfl_block",
    "from_diffusers_double_block",
    "from_diffusers_single_block",
    "guidance_from_scale",
    "load_trellis",
    "make_sampler",
    "sample_time",
    "structure_dit_from_trellis",
    "voxel_noise",
]
__version__ = "0.1.0"
