"""Initial weights and the input check that all flow models have in common."""

from __future__ import annotations

from sparse_vae import SparseConv3d, SparseDownConv3d, SparseTensor, SparseUpConv3d
from torch import Tensor, nn

from smdit._embedding import TimeEmbedding
from smdit._modulation import Modulation, ModulationBias
from smdit._sparse_io import SparseResBlock


def initialise(model: nn.Module) -> None:
    """Xavier-uniform linear layers, small time embedding, zero modulations and residual convolutions."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (SparseConv3d, SparseDownConv3d, SparseUpConv3d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, (Modulation, ModulationBias, SparseResBlock)):
            module.reset_parameters()
        elif isinstance(module, TimeEmbedding):
            nn.init.normal_(module.expand.weight, std=0.02)
            nn.init.normal_(module.contract.weight, std=0.02)


def check_input(x: SparseTensor, t: Tensor, latent_channels: int, grid_size: int) -> None:
    """Raise a ValueError unless latents and times fit the model."""
    topology = x.topology
    if x.num_channels != latent_channels or topology.grid_size != grid_size:
        raise ValueError(
            f"x has {x.num_channels} channels on a grid of {topology.grid_size}, expected {latent_channels} channels "
            f"on a grid of {grid_size}"
        )
    if t.shape != (topology.batch_size,):
        raise ValueError(f"t has shape {tuple(t.shape)}, expected ({topology.batch_size},): one time an object")
