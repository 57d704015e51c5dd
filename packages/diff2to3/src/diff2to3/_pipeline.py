"""One picture in, Gaussians out: the method from top to bottom."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gs_render import Gaussians
from jaxtyping import Float, Int
from PIL import Image
from smdit import make_sampler, voxel_noise
from sparse_vae import SparseTensor
from torch import Tensor, nn

from diff2to3._assemble import assemble, check_fit
from diff2to3._asset import Asset
from diff2to3._device import release_memory, synchronize, usable_device
from diff2to3._errors import DeviceMemoryError, ImageInputError
from diff2to3._guards import broken_tensors, check_finite, check_weights, device_memory_error
from diff2to3._hub import commit_of, upload
from diff2to3._image import condition_image
from diff2to3._inputs import ImageSource, read_image
from diff2to3._locate import locate
from diff2to3._pipeline_config import PipelineConfig
from diff2to3._plugins import Backbone, FeatureExtractor, LatentDecoder, Matting, Renderer, Structure, registry
from diff2to3._store import parse_dtype, read_config, save_pipeline, state_sha256

#: Called as callback(stage, steps done, steps in all).
Callback = Callable[[str, int, int], None]


class Pipeline:
    """One picture -> 3D Gaussians, by components that can each be replaced.

    Args:
        config: what the pipeline is made of and how it samples.
        components: role -> component, one for each of matting, feature_extractor, structure, backbone, latent_decoder
            and renderer.
        device: where the models run.
        dtype: what they compute in.
        low_vram: keep the models in the CPU's memory and bring each to the device for its stage alone. The same results
            with the memory of the largest model instead of all, at the price of the copies.

    Raises:
        ComponentError: a component lacks what its role asks for, or the components do not fit together.
    """

    def __init__(
        self,
        config: PipelineConfig,
        components: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        low_vram: bool = False,
    ) -> None:
        self.config = config
        self.device, self.dtype, self.low_vram = torch.device(device), parse_dtype(dtype), low_vram
        self.components = check_fit(components)
        self.revision: str | None = None
        self._weight_hashes: dict[str, str] = {}
        for component in self.components.values():
            if isinstance(component, nn.Module):
                home = torch.device("cpu") if low_vram else self.device
                component.to(device=home, dtype=self.dtype).eval().requires_grad_(False)
        self.matting: Matting = self.components["matting"]
        self.feature_extractor: FeatureExtractor = self.components["feature_extractor"]
        self.structure: Structure = self.components["structure"]
        self.backbone: Backbone = self.components["backbone"]
        self.latent_decoder: LatentDecoder = self.components["latent_decoder"]
        self.renderer: Renderer = self.components["renderer"]

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        low_vram: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        matting: Matting | str | None = None,
        feature_extractor: FeatureExtractor | str | None = None,
        structure: Structure | str | None = None,
        backbone: Backbone | str | None = None,
        latent_decoder: LatentDecoder | str | None = None,
        renderer: Renderer | str | None = None,
    ) -> Pipeline:
        """Load a pipeline, with any of its components replaced.

        Args:
            source: None for the embedded pipeline; a directory; the name of an embedded pipeline; or a Hub id.
            device: None is CUDA where there is one, else Apple's MPS, else the CPU.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            low_vram: see `Pipeline`.
            revision: branch, tag or commit of a Hub id; None is its main branch. The commit itself is then the
                pipeline's `revision`.
            local_files_only: download nothing; of the Hub take what its cache has. So does ``HF_HUB_OFFLINE=1``.
            matting, feature_extractor, structure, backbone, latent_decoder, renderer: the component to use instead of
                the pipeline's own: ``"name"``, ``"distribution:name"``, or an object that plays the role.

        Raises:
            PipelineFormatError: no such pipeline, or its files are missing, damaged or not those that were saved
                (``pipeline.json`` holds the SHA-256 of each).
            ComponentNotFoundError, DuplicateComponentError, ComponentError: a component cannot be had, or does not fit.
        """
        overrides = {
            "matting": matting,
            "feature_extractor": feature_extractor,
            "structure": structure,
            "backbone": backbone,
            "latent_decoder": latent_decoder,
            "renderer": renderer,
        }
        directory = locate(source, revision, local_files_only=local_files_only)
        device, dtype = usable_device(device), parse_dtype(dtype)
        assembly = assemble(directory, read_config(directory), overrides)
        pipeline = cls(assembly.config, assembly.components, device=device, dtype=dtype, low_vram=low_vram)
        pipeline.revision, pipeline._weight_hashes = commit_of(directory), assembly.weight_hashes
        return pipeline

    def __call__(
        self,
        image: ImageSource | Sequence[ImageSource],
        *,
        seed: int = 0,
        sample: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        callback: Callback | None = None,
    ) -> Asset:
        """Make one object.

        Args:
            image: a picture of it (path, PIL image, array, tensor; see `diff2to3.read_image`), or a list of pictures
                of the same object.
            seed: the same seed, sample and picture give the same Gaussians on one machine.
            sample: which of the seed's variants.
            steps: sampling steps of both stages; None is each stage's own setting.
            guidance: w of both stages, in (1 + w) conditional - w unconditional; None is each stage's own setting.
            callback: called with (stage, steps done, steps in all) as the work goes on.

        Raises:
            ImageInputError: the picture cannot be used.
        """
        [asset] = self.batch([image], seed=seed, sample=sample, steps=steps, guidance=guidance, callback=callback)
        return asset

    @torch.no_grad()
    def batch(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource]],
        *,
        seed: int = 0,
        sample: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        callback: Callback | None = None,
    ) -> list[Asset]:
        """Make several objects at once, one from each entry (a picture, or as many pictures as the other entries have).

        Every object gets the noise that it would get alone. Where the device's memory does not hold all at once, they
        are made in two halves, and so on. For the arguments see `__call__`.

        Raises:
            DeviceMemoryError: it does not even hold one.
        """
        settings: dict[str, Any] = {"seed": seed, "sample": sample, "steps": steps, "guidance": guidance}
        try:
            return self._at_once(images, settings, callback)
        except DeviceMemoryError:
            if len(images) == 1:
                raise
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(images) // 2
        return [
            asset
            for part in (images[:half], images[half:])
            for asset in self.batch(part, **settings, callback=callback)
        ]

    def _at_once(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource]],
        settings: dict[str, Any],
        callback: Callback | None,
    ) -> list[Asset]:
        timings: dict[str, float] = {}
        timed = functools.partial(_timed, timings, self.device)
        with timed("image"):
            pictures = [[self.cut_out(view) for view in _as_views(entry)] for entry in images]
        with timed("features"):
            condition = self.encode(pictures)
        with timed("structure"):
            voxels = self.find_voxels(condition, **settings, callback=callback)
        with timed("latents"):
            latents = self.fill_voxels(voxels, condition, **settings, callback=callback)
        with timed("gaussians"):
            objects = self.decode(latents)
        return [
            Asset(
                gaussians=gaussians,
                voxels=coords,
                pictures=tuple(views),
                renderer=self.renderer,
                settings=settings,
                timings=timings,
            )
            for gaussians, coords, views in zip(objects, voxels, pictures, strict=True)
        ]

    def cut_out(self, image: ImageSource) -> Image.Image:
        """The picture as RGBA: its own alpha when it has one, else by the pipeline's matting."""
        picture = read_image(image)
        return picture if picture.mode == "RGBA" else self.matting(picture)

    @torch.no_grad()
    def encode(self, pictures: Sequence[Sequence[Image.Image]]) -> Float[Tensor, "b images rows columns channels"]:
        """Condition tokens of B objects with M pictures each, RGBA."""
        counts = {len(views) for views in pictures}
        if len(counts) != 1 or 0 in counts:
            raise ImageInputError(f"every object of a batch needs the same number of pictures, got {sorted(counts)}")
        extractor = self.feature_extractor
        size, background = extractor.image_size, self.config.condition_background
        flat = [_condition(view, size, background) for views in pictures for view in views]
        batch = torch.stack(flat).to(device=self.device, dtype=self.dtype)
        own = getattr(extractor, "condition", None)
        with self._at_work("feature_extractor"):
            tokens = extractor.tokens(extractor(batch)) if own is None else own(batch)
        check_finite("feature_extractor", extractor, tokens)
        return tokens.unflatten(0, (len(pictures), -1))

    @torch.no_grad()
    def find_voxels(
        self,
        condition: Float[Tensor, "b images rows columns channels"],
        *,
        seed: int = 0,
        sample: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        callback: Callback | None = None,
    ) -> list[Int[Tensor, "l 3"]]:
        """Stage 1: the occupied voxels (x, y, z), int32, of B objects.

        Args:
            condition: from `encode`.
            seed, sample, steps, guidance, callback: as in `__call__`; the stage is called "structure".

        Raises:
            ImageInputError: no voxel of some object is occupied.
        """
        with self._at_work("structure"):
            voxels = self.structure.sample(
                condition,
                seeds=[_mix(seed, sample)] * len(condition),
                steps=steps,
                guidance=guidance,
                callback=_stage(callback, "structure"),
            )
        if not all(map(len, voxels)):
            check_weights("structure", broken_tensors(self.structure))
        if empty := [i for i, coords in enumerate(voxels) if not len(coords)]:
            raise ImageInputError(f"no voxel was found occupied for picture {empty[0] + 1}; try another seed")
        return voxels

    @torch.no_grad()
    def fill_voxels(
        self,
        voxels: Sequence[Int[Tensor, "l 3"]],
        condition: Float[Tensor, "b images rows columns channels"],
        *,
        seed: int = 0,
        sample: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        callback: Callback | None = None,
    ) -> SparseTensor:
        """Stage 2: a latent for each voxel, as the flow knows latents (see `denormalise`).

        Args:
            voxels: from `find_voxels`, or any others: one [L, 3] for each of the B objects.
            condition: from `encode`.
            seed, sample, steps, guidance, callback: as in `__call__`; the stage is called "latents".
        """
        noise = self.initial_noise(voxels, seed, sample)
        given = {"steps": steps, "guidance": guidance}
        options = self.config.sampler.model_copy(update={k: v for k, v in given.items() if v is not None})
        with self._at_work("backbone"):
            sampler = make_sampler(options)
            latents = sampler.sample(self.backbone, noise, condition, callback=_stage(callback, "latents"))
        check_finite("backbone", self.backbone, latents.features)
        return latents

    @torch.no_grad()
    def decode(self, latents: SparseTensor) -> list[Gaussians]:
        """Latents from `fill_voxels` -> float32 Gaussians of each object."""
        with self._at_work("latent_decoder"):
            objects = self.latent_decoder(self.denormalise(latents))
        for made in objects:
            check_finite("latent_decoder", self.latent_decoder, made.means, made.scales, made.opacities, made.sh)
        release_memory(self.device)
        return [gaussians.to(dtype=torch.float32) for gaussians in objects]

    @contextmanager
    def _at_work(self, role: str) -> Iterator[None]:
        """A component on the pipeline's device; with `low_vram` it comes for this block and goes back after it.

        Raises:
            DeviceMemoryError: the device has too little memory for it.
        """
        component = self.components[role]
        travels = self.low_vram and isinstance(component, nn.Module)
        try:
            if travels:
                component.to(self.device)
            yield
        except torch.OutOfMemoryError as error:
            ways = [] if self.low_vram else ["--low-vram (low_vram=True)"]
            ways += ["--dtype bfloat16"] if self.dtype == torch.float32 else []
            ways += ["--guidance 0, which halves the batch", "fewer pictures of the object", "--device cpu"]
            raise device_memory_error(self.device, f"the {role}", error, ways) from error
        finally:
            if travels:
                component.to("cpu")

    def initial_noise(self, voxels: Sequence[Int[Tensor, "l 3"]], seed: int, sample: int = 0) -> SparseTensor:
        """float32 noise on the occupied voxels; it depends on (seed, sample, voxel) alone."""
        channels, grid_size = self.backbone.config.latent_channels, self.backbone.config.grid_size
        noise = [voxel_noise(coords.cpu(), channels, grid_size, seed, sample) for coords in voxels]
        return SparseTensor.from_coords([c.cpu() for c in voxels], noise, grid_size).to(self.device)

    def denormalise(self, latents: SparseTensor) -> SparseTensor:
        """Latents as the flow knows them -> as the decoder knows them, by the statistics in the decoder's config."""
        mean, std = self.latent_decoder.config.latent_mean, self.latent_decoder.config.latent_std
        if mean is None or std is None:
            return latents
        return latents.replace(latents.features * latents.features.new_tensor(std) + latents.features.new_tensor(mean))

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | str | None = None) -> Path:
        """Write the pipeline as a directory that `from_pretrained` loads.

        Args:
            directory: made if missing.
            dtype: of the stored tensors; None keeps the pipeline's.
        """
        modules = {}
        for role, component in self.components.items():
            # A directory names its components, so each must be one that somebody announces.
            spec = registry().find(role, self.config.roles[role].name).spec
            if isinstance(component, nn.Module) and spec.weights == "pipeline":
                modules[role] = component
        save_pipeline(directory, self.config, modules, dtype or self.dtype)
        return Path(directory)

    def push_to_hub(
        self,
        repository: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        message: str = "Pipeline of diff2to3",
        token: str | None = None,
    ) -> str:
        """Upload the pipeline to the Hugging Face Hub, for `from_pretrained` to load by its id.

        Args:
            repository: ``"owner/name"``; made if there is none.
            revision: branch; None is the main one.
            private: whether a repository that is made is private; None is the owner's default.
            message: of the commit.
            token: of a user who may write there; None is the one of ``hf auth login``.

        Returns:
            The commit, to pin as `revision`.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            directory = self.save_pretrained(folder)
            return upload(directory, repository, revision=revision, private=private, message=message, token=token)

    def weight_hashes(self) -> dict[str, str]:
        """SHA-256 by role: of the weights file, or of the tensors of a component that has none in the directory."""
        hashes: dict[str, str] = {}
        for role, component in self.components.items():
            value = self._weight_hashes.get(role) or state_sha256(component)
            if value is not None:
                hashes[role] = value
        return hashes


def _as_views(entry: Any) -> list[Any]:
    """The pictures of one object: a list stays, a single picture becomes a list of one."""
    views = list(entry) if isinstance(entry, list | tuple) else [entry]
    if not views:
        raise ImageInputError("got an empty list of pictures; expected at least one")
    return views


def _condition(picture: Image.Image, size: int, background: float) -> Float[Tensor, "3 size size"]:
    try:
        return torch.from_numpy(condition_image(picture, size, background)).permute(2, 0, 1)
    except ValueError as error:
        raise ImageInputError(str(error)) from error


def _mix(seed: int, sample: int) -> int:
    """One 32-bit seed of two numbers (torch's CPU generator uses no more bits); sample 0 keeps the seed as it is."""
    if sample == 0:
        return seed % 2**32
    return int.from_bytes(hashlib.blake2b(f"{seed},{sample}".encode(), digest_size=4).digest(), "little")


def _stage(callback: Callback | None, stage: str) -> Callable[[int, int], None] | None:
    return None if callback is None else lambda done, total: callback(stage, done, total)


@contextmanager
def _timed(timings: dict[str, float], device: torch.device, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    synchronize(device)
    timings[stage] = time.perf_counter() - start
