"""The 2to3-VAE: feature volume -> latents -> Gaussians."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from gs_render import Gaussians
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_vae._blocks import AbsolutePositionEmbedding, TransformerBlock
from sparse_vae._config import SparseVAEConfig
from sparse_vae._gaussians import channels_per_voxel, to_gaussians
from sparse_vae._layout import AttentionLayout, permute
from sparse_vae._tensor import SparseTensor
from sparse_vae._topology import Topology


class SparseTransformer(nn.Module):
    """Linear layer, absolute positions, windowed blocks, linear layer (TRELLIS structured_latent_vae/base.py).

    Under autocast the residual stream and the output layer stay in the dtype of the parameters.

    Args:
        config: sizes; `in_channels` and `latent_channels` are not read.
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, config: SparseVAEConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.config = config
        self.input_layer = nn.Linear(in_channels, config.width)
        self.positions = AbsolutePositionEmbedding(config.width)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.width,
                config.num_heads,
                config.mlp_ratio,
                qk_norm=config.qk_norm,
                backend=config.attention_backend,
            )
            for _ in range(config.num_blocks)
        )
        self.output_layer = nn.Linear(config.width, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers without bias; the output layer starts at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output_layer.weight)

    def forward(self, x: SparseTensor) -> Float[Tensor, "N D"]:
        """[N, in_channels] -> [N, out_channels], float32 under autocast."""
        _check_input(x, self.config.grid_size, self.input_layer.in_features)
        dtype = self.input_layer.weight.dtype
        h = self.input_layer(x.features.to(dtype)).to(dtype) + self.positions.of(x.topology).to(dtype)
        layout = x.topology.layout
        for number, block in enumerate(self.blocks):
            # All but attention acts on single rows, so rows go straight from the windows of one block to the next.
            previous, layout = layout, self._layout(x.topology, number)
            h = self._reorder(h, x.topology, previous, layout)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, layout.segment_major, use_reentrant=False)
            else:
                h = block(h, layout.segment_major)
        h = self._reorder(h, x.topology, layout, x.topology.layout)
        with torch.autocast(h.device.type, enabled=False):
            return self.output_layer(F.layer_norm(h.float(), h.shape[-1:]).to(dtype))

    def prepare(self, topology: Topology) -> None:
        """Derive all that a forward reads from the topology, so that the forward never waits for the device."""
        layouts = [topology.layout, *(self._layout(topology, number) for number in range(len(self.blocks)))]
        for previous, layout in pairwise([*layouts, topology.layout]):
            self._order(topology, previous, layout)
        self.positions.of(topology)

    def _reorder(self, h: Tensor, topology: Topology, previous: AttentionLayout, layout: AttentionLayout) -> Tensor:
        order = self._order(topology, previous, layout)
        return h if order is None else permute(h, *order)

    def _order(
        self, topology: Topology, previous: AttentionLayout, layout: AttentionLayout
    ) -> tuple[Tensor, Tensor] | None:
        return topology.memo(("reorder", previous, layout), lambda: layout.after(previous))

    def _layout(self, topology: Topology, number: int) -> AttentionLayout:
        size = self.config.window_size
        if size is None:
            return topology.layout
        return topology.windows(size, shift=size // 2 if number % 2 else 0)


class SparseVAEEncoder(nn.Module):
    """Feature volume -> distribution of the latents.

    Args:
        config: `SparseVAEConfig`.
    """

    def __init__(self, config: SparseVAEConfig):
        super().__init__()
        self.config = config
        self.transformer = SparseTransformer(config, config.in_channels, 2 * config.latent_channels)

    def forward(self, x: SparseTensor) -> tuple[SparseTensor, SparseTensor]:
        """Features [N, in_channels] -> mean and log-variance, each [N, latent_channels] in float32."""
        mean, logvar = self.transformer(x).float().chunk(2, dim=1)
        return x.replace(mean), x.replace(logvar)


class GaussianDecoder(nn.Module):
    """Latents -> Gaussians, `config.gaussians.num_gaussians` a voxel.

    Args:
        config: `SparseVAEConfig`.
    """

    def __init__(self, config: SparseVAEConfig):
        super().__init__()
        self.config = config
        self.transformer = SparseTransformer(config, config.latent_channels, channels_per_voxel(config.gaussians))

    def forward(self, z: SparseTensor) -> list[Gaussians]:
        """Latents [N, latent_channels] in their natural scale -> one `Gaussians` an object, float32.

        Object b gets `num_gaussians` rows for each of its voxels, in the order of the topology. Gaussians lie in
        [-0.5, 0.5]^3 but for the reach of rim voxels.
        """
        return to_gaussians(self.transformer(z), z.topology, self.config.gaussians)

    def decode(self, z: SparseTensor) -> list[Gaussians]:
        """The same as calling the module."""
        return self(z)


class SparseVAE(nn.Module):
    """Encoder and decoder of the 2to3-VAE.

    Args:
        config: `SparseVAEConfig`.
    """

    def __init__(self, config: SparseVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = SparseVAEEncoder(config)
        self.decoder = GaussianDecoder(config)

    def encode(self, x: SparseTensor, generator: torch.Generator | None = None) -> SparseTensor:
        """Features [N, in_channels] -> latents [N, latent_channels]: the mean, or a sample if a generator is given."""
        mean, logvar = self.encoder(x)
        return mean if generator is None else mean.replace(sample_normal(mean.features, logvar.features, generator))

    def decode(self, z: SparseTensor) -> list[Gaussians]:
        """Latents [N, latent_channels] -> one `Gaussians` an object."""
        return self.decoder(z)

    def forward(
        self, x: SparseTensor, generator: torch.Generator
    ) -> tuple[list[Gaussians], SparseTensor, SparseTensor]:
        """Features -> Gaussians of a sampled latent, mean, log-variance: what training needs."""
        mean, logvar = self.encoder(x)
        z = mean.replace(sample_normal(mean.features, logvar.features, generator))
        return self.decoder(z), mean, logvar


def sample_normal(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """A sample of N(mean, exp(logvar)), differentiable; noise is drawn on the generator's device."""
    noise = torch.randn(mean.shape, generator=generator, device=generator.device, dtype=mean.dtype)
    return mean + torch.exp(0.5 * logvar) * noise.to(mean.device)


def _check_input(x: SparseTensor, grid_size: int, channels: int) -> None:
    if x.num_channels != channels:
        raise ValueError(f"the input has {x.num_channels} channels, expected {channels}")
    if x.topology.grid_size != grid_size:
        raise ValueError(f"the input lies on a grid of {x.topology.grid_size} voxels, expected {grid_size}")
