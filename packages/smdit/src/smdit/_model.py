"""SMDiT: the sparse-structure multi-modal diffusion transformer (Diff2to3, section 3.2, figure 3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from marope import MARoPE
from sparse_vae import SparseTensor, Topology
from torch import Tensor, nn

from smdit._blocks import DoubleStreamBlock, JointTokens, SingleStreamBlock
from smdit._config import SMDiTConfig
from smdit._embedding import TimeEmbedding, flatten_condition, patch_grid, sincos_embedding
from smdit._init import check_input, initialise
from smdit._modulation import Modulation, modulated_norm
from smdit._sparse_io import SparseDecoder, SparseEncoder, voxel_rows


class SMDiT(nn.Module):
    """Velocity of noisy voxel latents, given image tokens.

    A new model returns zero: modulations and the output layer start at zero.

    Args:
        config: sizes and options; `SMDiTConfig.preset(name)` gives known ones.
    """

    capturable = True  # see EulerSampler.capture

    def __init__(self, config: SMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, shared = config.width, config.shared_modulation
        self.rope = (
            MARoPE(config.head_dim, config.token_grid_size, **dict(config.rotary))
            if config.position == "marope"
            else None
        )
        self.time = TimeEmbedding(width)
        self.image_input = nn.Linear(config.condition_channels, width)
        io = (config.io_channels, config.num_io_blocks, config.io_pooling)
        self.encoder = SparseEncoder(config.latent_channels, width, *io)
        self.shared_modulation = nn.ModuleDict()
        if shared:
            self.shared_modulation.update(
                {"image": Modulation(width, 6), "voxel": Modulation(width, 6), "joint": Modulation(width, 3)}
            )
        sizes = (width, config.num_heads, config.mlp_ratio, config.qk_norm, shared)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*sizes) for _ in range(config.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*sizes) for _ in range(config.num_single_blocks))
        self.decoder = SparseDecoder(width, *io)
        self.output_modulation = Modulation(width, 2, self.decoder.out_channels)
        self.output = nn.Linear(self.decoder.out_channels, config.latent_channels)
        initialise(self)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        x: SparseTensor,
        t: Float[Tensor, " B"],
        condition: Float[Tensor, "B images rows columns channels"],
    ) -> SparseTensor:
        """Velocity of `x` at time `t`.

        Args:
            x: noisy latents [N, latent_channels] of B objects.
            t: flow time of every object in [0, 1]; 1 is noise.
            condition: tokens of the condition images of every object, the same number of images and patches for all;
                zeros for the unconditional velocity.

        Returns:
            SparseTensor of the same shape, on the same topology, float32 under autocast.
        """
        batch_size = x.topology.batch_size
        check_input(x, t, self.config.latent_channels, self.config.grid_size)
        tokens, shape = flatten_condition(condition, self.config.condition_channels, batch_size)
        if shape is None:
            raise ValueError(
                f"condition has shape {tuple(condition.shape)}: SMDiT places patches in space, so it needs "
                f"[B, images, rows, columns, {self.config.condition_channels}]"
            )
        embedding = self.time(t)
        voxels, outputs = self.encoder(x, embedding)
        image, voxel = self._embed(tokens, shape, voxels)
        voxel = self._trunk(image, voxel, embedding, self.joint_tokens(voxels.topology, shape))
        h = self.decoder(voxels.replace(voxel), outputs, embedding, x.topology)
        shift, scale = self.output_modulation(embedding).chunk(2, dim=-1)
        velocity = self.output(modulated_norm(h.features, shift, scale, voxel_rows(x.topology)))
        return x.replace(velocity.to(self.output.weight.dtype))

    def _embed(self, tokens: Tensor, shape: tuple[int, int, int], voxels: SparseTensor) -> tuple[Tensor, Tensor]:
        """Rows of the two streams at the entrance of the trunk, in the dtype of the weights."""
        dtype, width = self.image_input.weight.dtype, self.config.width
        image = self.image_input(tokens.to(dtype)).to(dtype)
        if self.rope is not None:
            return image.flatten(0, 1), voxels.features
        images, h, w = shape
        topology = voxels.topology
        patches = topology.memo(
            ("smdit.patch_sincos", images, h, w, width),
            lambda: sincos_embedding(patch_grid(h, w, topology.device), width).repeat(images, 1),
        )
        places = topology.memo(("smdit.sincos", width), lambda: sincos_embedding(topology.coords[:, 1:], width))
        return (image + patches.to(dtype)).flatten(0, 1), voxels.features + places.to(dtype)

    def _trunk(self, image: Tensor, voxel: Tensor, embedding: Tensor, tokens: JointTokens) -> Tensor:
        """Rows of the voxel stream after all blocks."""
        shared = {name: projection(embedding) for name, projection in self.shared_modulation.items()}
        for_streams = (shared.get("image", embedding), shared.get("voxel", embedding))
        for block in self.double_blocks:
            image, voxel = block(image, voxel, for_streams, tokens, self.rope)
        joint = tokens.join(image, voxel)
        for block in self.single_blocks:
            joint = block(joint, shared.get("joint", embedding), tokens, self.rope)
        return tokens.part(joint)[1]

    def prepare(self, topology: Topology, shape: tuple[int, int, int]) -> None:
        """Derive all that `forward` reads from the latents' topology, so that it never waits for the device.

        Training loops call this for the next batch while the device works on this one.

        Args:
            topology: of the latents.
            shape: (images, rows, columns) of the condition's patches.
        """
        self.joint_tokens(self.encoder.prepare(topology), shape)

    def joint_tokens(self, topology: Topology, shape: tuple[int, int, int]) -> JointTokens:
        """Packing and rotary tables for voxel tokens on `topology` and (images, rows, columns) of patches, made once.

        They are kept with the topology, so every sampling step and every model of equal options shares them.
        """
        rope = self.rope
        key = ("smdit.joint", shape, self.config.head_dim, self.config.rotary if rope is not None else None)

        def build() -> JointTokens:
            images, h, w = shape
            if rope is None:
                return JointTokens.build(topology.lengths, images * h * w, topology.device)
            planes = [rope.plane(h, w, index, device=topology.device) for index in range(images)]
            return JointTokens.build(
                topology.lengths,
                images * h * w,
                topology.device,
                rope,
                torch.cat(planes),
                rope.volume(topology.coords[:, 1:]),
            )

        return topology.memo(key, build)
