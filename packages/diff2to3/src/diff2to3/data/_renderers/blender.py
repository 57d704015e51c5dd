"""Mesh pictures by Blender's path tracer Cycles (extra ``blender``): soft uniform light, or unlit base colour."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from diff2to3.data._mesh import Mesh, MeshPart
from diff2to3.data._renderers.cpu import mesh_depth

_SENSOR = 36.0  # mm; what Blender's focal lengths refer to
_COLORS = "base_color"  # of the vertices; Cycles shows black for an attribute that is called "color"
_GPUS = ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI")


class BlenderMeshRendererConfig(BaseModel):
    """How Cycles draws.

    Args:
        light: ``"uniform"``: a white sky all around and diffuse surfaces, which darkens creases and little else;
            ``"none"``: surfaces have their base colour, as the other renderers show it.
        samples: paths a pixel.
        denoise: whether Blender's denoiser smooths what noise is left; never without light, which has none.
        device: ``"gpu"``, ``"cpu"``, or ``"auto"``: a GPU if Cycles finds one.
        threads: of one process, 0 for all cores; `data render` starts a process a core.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    light: Literal["uniform", "none"] = "uniform"
    samples: int = Field(default=64, ge=1)
    denoise: bool = True
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int = Field(default=1, ge=0)


class BlenderMeshRenderer:
    """Draws in the one scene that Blender has in a process; a mesh is built anew for every call.

    Raises:
        ImportError: the module `bpy` or a system library that it needs is missing.
        RuntimeError: no GPU, although the config asks for one.
    """

    def __init__(self, config: BlenderMeshRendererConfig) -> None:
        with _contained():
            import bpy

            self.config, self._bpy = config, bpy
            self._gpu = config.device != "cpu" and self._find_gpu()
        if config.device == "gpu" and not self._gpu:
            raise RuntimeError(f"Cycles finds no GPU (tried {', '.join(_GPUS)}); give device=cpu")

    def close(self) -> None:
        """Empties the scene."""
        with _contained():
            self._bpy.ops.wm.read_factory_settings(use_empty=True)

    def __call__(
        self, mesh: Mesh, world_to_camera: np.ndarray, intrinsics: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures and depth of a mesh: the role ``mesh_renderer``. Pixels are square: both focal lengths are equal."""
        if not np.allclose(intrinsics[:, 0, 0], intrinsics[:, 1, 1], rtol=1e-4):
            raise ValueError("the two focal lengths of a camera differ; Blender's cameras have one")
        images = np.empty((len(world_to_camera), size, size, 4), np.uint8)
        with tempfile.TemporaryDirectory() as folder, _contained():
            self._bpy.ops.wm.read_factory_settings(use_empty=True)
            camera = self._scene(size, Path(folder) / "view.png")
            self._build(mesh, Path(folder))
            for image, pose, matrix in zip(images, world_to_camera, intrinsics, strict=True):
                self._place(camera, pose, matrix, size)
                self._bpy.ops.render.render(write_still=True)
                with Image.open(Path(folder) / "view.png") as picture:
                    image[:] = np.asarray(picture.convert("RGBA"))
            self._bpy.ops.wm.read_factory_settings(use_empty=True)
        images[images[..., 3] == 0] = 0
        return images, mesh_depth(mesh, world_to_camera, intrinsics, size)

    def _find_gpu(self) -> bool:
        """Turns on the first kind of GPU that this Blender and this machine have."""
        preferences = self._bpy.context.preferences.addons["cycles"].preferences
        for kind in _GPUS:
            try:
                preferences.compute_device_type = kind
            except TypeError:  # this Blender was built without it
                continue
            preferences.refresh_devices()
            if found := [device for device in preferences.devices if device.type == kind]:
                for device in preferences.devices:
                    device.use = device in found
                return True
        return False

    def _scene(self, size: int, output: Path) -> Any:
        """Sets the scene up; returns its camera."""
        bpy, config = self._bpy, self.config
        scene = bpy.context.scene
        scene.render.engine = "CYCLES"
        if self._gpu:
            self._find_gpu()  # resetting the scene reset the preferences, too
        scene.cycles.device = "GPU" if self._gpu else "CPU"
        scene.cycles.samples = config.samples
        scene.cycles.use_denoising = config.denoise and config.light == "uniform"
        scene.cycles.use_adaptive_sampling = False
        scene.cycles.pixel_filter_type = "BOX"
        scene.cycles.filter_width = 1.0
        scene.cycles.diffuse_bounces = 1
        scene.cycles.transparent_max_bounces = 64  # holes in front of each other
        scene.render.threads_mode = "FIXED" if config.threads else "AUTO"
        scene.render.threads = config.threads or os.cpu_count() or 1
        scene.render.use_persistent_data = True  # between the views of a mesh
        scene.render.film_transparent = True
        scene.render.dither_intensity = 0.0
        scene.render.resolution_x = scene.render.resolution_y = size
        scene.render.resolution_percentage = 100
        scene.render.filepath = str(output)
        scene.render.image_settings.file_format = "PNG"
        scene.render.image_settings.color_mode = "RGBA"
        scene.render.image_settings.color_depth = "8"
        scene.view_settings.view_transform = "Standard" if config.light == "uniform" else "Raw"
        scene.world = bpy.data.worlds.new("sky")
        sky = scene.world.node_tree.nodes["Background"]
        sky.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
        camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
        camera.data.sensor_fit = "HORIZONTAL"
        camera.data.sensor_width = _SENSOR
        camera.data.clip_start, camera.data.clip_end = 0.05, 100.0
        scene.collection.objects.link(camera)
        scene.camera = camera
        return camera

    def _place(self, camera: Any, pose: np.ndarray, intrinsics: np.ndarray, size: int) -> None:
        """OpenCV's camera as Blender's, which looks along its -z with y up."""
        to_world = np.linalg.inv(pose.astype(np.float64)) @ np.diag([1.0, -1.0, -1.0, 1.0])
        camera.matrix_world = to_world.T.tolist()  # Blender reads columns
        camera.data.lens = float(intrinsics[0, 0]) * _SENSOR / size
        camera.data.shift_x = (size / 2 - float(intrinsics[0, 2])) / size
        camera.data.shift_y = (float(intrinsics[1, 2]) - size / 2) / size

    def _build(self, mesh: Mesh, folder: Path) -> None:
        """One object a part, linked into the scene."""
        bpy, pictures = self._bpy, {}
        for number, part in enumerate(mesh.parts):
            key, flat = id(part.texture), part.texture.shape[:2] == (1, 1)
            if not flat and key not in pictures:
                path = folder / f"{number}.png"
                Image.fromarray(part.texture).save(path, compress_level=1)
                pictures[key] = bpy.data.images.load(str(path))
                pictures[key].colorspace_settings.name = "sRGB" if self.config.light == "uniform" else "Non-Color"
                pictures[key].alpha_mode = "CHANNEL_PACKED"  # colours are not multiplied with alpha
            colors = part.colors / np.float32(255)
            if flat:
                colors = colors * (part.texture[0, 0] / np.float32(255))
            has_holes = bool(colors[:, 3].min() < 1 or (not flat and part.texture[..., 3].min() < 255))
            data = self._mesh(part, colors)
            data.materials.append(self._material(None if flat else pictures[key], has_holes))
            bpy.context.scene.collection.objects.link(bpy.data.objects.new("part", data))

    def _mesh(self, part: MeshPart, colors: np.ndarray) -> Any:
        data = self._bpy.data.meshes.new("part")
        corners = np.ascontiguousarray(part.faces, np.int32)
        data.vertices.add(len(part.vertices))
        data.vertices.foreach_set("co", np.ascontiguousarray(part.vertices, np.float32).ravel())
        data.loops.add(corners.size)
        data.loops.foreach_set("vertex_index", corners.ravel())
        data.polygons.add(len(corners))
        data.polygons.foreach_set("loop_start", np.arange(0, corners.size, 3, dtype=np.int32))
        uv = np.nan_to_num(part.uv[corners], posinf=0, neginf=0).astype(np.float32)
        data.uv_layers.new(name="uv").uv.foreach_set("vector", uv.ravel())
        if self.config.light == "uniform":
            colors = np.concatenate([_linear(colors[:, :3]), colors[:, 3:]], 1)
        layer = data.color_attributes.new(_COLORS, "FLOAT_COLOR", "POINT")
        layer.data.foreach_set("color", np.ascontiguousarray(colors, np.float32).ravel())
        data.update(calc_edges=True)
        data.shade_flat()
        return data

    def _material(self, picture: Any, has_holes: bool) -> Any:
        """Vertex colour, times the picture if there is one; nothing where their alpha is below one half."""
        material = self._bpy.data.materials.new("part")
        tree = material.node_tree
        tree.nodes.clear()

        def node(kind: str, **settings: Any) -> Any:
            made = tree.nodes.new(f"ShaderNode{kind}")
            for name, value in settings.items():
                setattr(made, name, value)
            return made

        def times(kind: str, first: Any, second: Any) -> Any:
            product = node(kind, operation="MULTIPLY")
            tree.links.new(first, product.inputs[0])
            tree.links.new(second, product.inputs[1])
            return product.outputs[0]

        vertex = node("VertexColor", layer_name=_COLORS)
        color, alpha = vertex.outputs["Color"], vertex.outputs["Alpha"]
        if picture is not None:
            texture = node("TexImage", image=picture, interpolation="Linear", extension="REPEAT")
            color = times("VectorMath", color, texture.outputs["Color"])
            alpha = times("Math", alpha, texture.outputs["Alpha"])
        surface = node("BsdfDiffuse" if self.config.light == "uniform" else "Emission")
        tree.links.new(color, surface.inputs["Color"])
        shader = surface.outputs[0]
        if has_holes:
            hole, mix = node("Math", operation="LESS_THAN"), node("MixShader")
            hole.inputs[1].default_value = 0.5
            tree.links.new(alpha, hole.inputs[0])
            tree.links.new(hole.outputs[0], mix.inputs[0])
            tree.links.new(shader, mix.inputs[1])
            tree.links.new(node("BsdfTransparent").outputs[0], mix.inputs[2])
            shader = mix.outputs[0]
        tree.links.new(shader, node("OutputMaterial").inputs["Surface"])
        return material


def _linear(srgb: np.ndarray) -> np.ndarray:
    """Displayed sRGB in [0, 1] -> linear light."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@contextmanager
def _contained() -> Iterator[None]:
    """Keeps what Blender does to the process from the rest of it.

    It reports every sample on standard output, which belongs to the command. And it puts folders first on the path of
    modules, which worker processes inherit: they would find another `bpy` there, so these go to its end.
    """
    path, output, nothing = list(sys.path), os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)
        os.close(nothing)
        sys.path[:] = path + [entry for entry in sys.path if entry not in path]
