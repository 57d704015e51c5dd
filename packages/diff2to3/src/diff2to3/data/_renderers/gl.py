"""Mesh pictures by OpenGL through EGL, without a window. Unlit base colour, both sides."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from diff2to3.data._mesh import Mesh

_VERTEX = """
#version 330
uniform mat4 world_to_clip;
in vec3 position; in vec2 uv; in vec4 color;
out vec2 f_uv; out vec4 f_color;
void main() { gl_Position = world_to_clip * vec4(position, 1.0); f_uv = uv; f_color = color; }
"""
_FRAGMENT = """
#version 330
uniform sampler2D base;
in vec2 f_uv; in vec4 f_color;
out vec4 result;
void main() { vec4 c = texture(base, f_uv) * f_color; if (c.a < 0.5) discard; result = vec4(c.rgb, 1.0); }
"""
_NEAR = 0.05
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "swiftshader")  # drivers without a GPU, as they name themselves


class GlMeshRendererConfig(BaseModel):
    """How OpenGL is used.

    Args:
        samples: of a pixel's coverage; the driver may have fewer.
        software: whether a driver that draws on the CPU will do; the renderer ``cpu`` is faster than those.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(default=8, ge=1)
    software: bool = True


class GlMeshRenderer:
    """An OpenGL context with multisampled framebuffers; one per process.

    Raises:
        RuntimeError: no EGL device or driver; on Debian ``apt install libegl1 libgl1 libgl1-mesa-dri`` has one.
    """

    def __init__(self, config: GlMeshRendererConfig) -> None:
        import moderngl

        self.config = config
        _load_triton()
        try:
            options: Any = {"backend": "egl"}  # moderngl's annotation of keyword options is wrong
            self.context: Any = moderngl.create_context(standalone=True, **options)
        except Exception as error:  # moderngl and glcontext raise bare Exception
            raise RuntimeError(
                f"no OpenGL through EGL ({error}); install a driver, e.g. `apt install libegl1 libgl1 libgl1-mesa-dri`"
            ) from error
        driver = self.context.info["GL_RENDERER"]
        if not config.software and any(name in driver.lower() for name in _SOFTWARE):
            self.context.release()
            raise RuntimeError(f"its driver draws on the CPU ({driver})")
        self.samples = min(config.samples, self.context.max_samples)
        self.context.enable(moderngl.DEPTH_TEST)
        self.program: Any = self.context.program(vertex_shader=_VERTEX, fragment_shader=_FRAGMENT)
        self._framebuffers: dict[tuple[int, int], tuple[Any, Any]] = {}  # by side and samples, 0 for depth

    def close(self) -> None:
        """Gives the context back; the renderer cannot be used afterwards."""
        self.context.release()

    def __call__(
        self, mesh: Mesh, world_to_camera: np.ndarray, intrinsics: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures and depth of a mesh: the role ``mesh_renderer``."""
        with self.context:  # another renderer of this process may have been the current one
            return self._render(mesh, world_to_camera, intrinsics, size)

    def _render(
        self, mesh: Mesh, world_to_camera: np.ndarray, intrinsics: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        arrays, textures = self._upload(mesh)
        try:
            images = np.empty((len(world_to_camera), size, size, 4), np.uint8)
            depths = np.empty((len(world_to_camera), size // 4, size // 4), np.float32)
            reach = max(float(np.linalg.norm(part.vertices[part.faces], axis=-1).max()) for part in mesh.parts)
            for index, (pose, matrix) in enumerate(zip(world_to_camera, intrinsics, strict=True)):
                planes = _planes(pose, reach)
                clip = _projection(matrix, size, planes) @ pose
                self.program["world_to_clip"].write(np.ascontiguousarray(clip.T, np.float32))
                images[index] = self._color(arrays, textures, size)
                depths[index] = self._depth(arrays, textures, size // 4, planes)
            return images, depths
        finally:
            for array, buffers in arrays:
                array.release()
                for buffer in buffers:
                    buffer.release()
            for texture in set(textures):
                texture.release()

    def _upload(self, mesh: Mesh) -> tuple[list[Any], list[Any]]:
        """Vertex array with its buffers, and texture, of every part; parts may share a texture."""
        arrays, textures, uploaded = [], [], dict[int, Any]()
        for part in mesh.parts:
            packed = np.concatenate([part.vertices, part.uv, part.colors.astype(np.float32) / 255], 1).astype("f4")
            vertices, indices = self.context.buffer(packed.tobytes()), self.context.buffer(part.faces.tobytes())
            layout = [(vertices, "3f 2f 4f", "position", "uv", "color")]
            arrays.append((self.context.vertex_array(self.program, layout, indices), (vertices, indices)))
            if id(part.texture) not in uploaded:
                uploaded[id(part.texture)] = self._texture(part.texture)
            textures.append(uploaded[id(part.texture)])
        return arrays, textures

    def _texture(self, texels: np.ndarray) -> Any:
        height, width = texels.shape[:2]
        texture = self.context.texture((width, height), 4, np.ascontiguousarray(texels[::-1]).tobytes())
        texture.build_mipmaps()
        texture.anisotropy = 8.0
        return texture

    def _framebuffer(self, size: int, samples: int) -> tuple[Any, Any]:
        key = (size, samples)
        if key not in self._framebuffers:
            shape = (size, size)
            target = self.context.framebuffer(
                self.context.renderbuffer(shape, 4, samples=samples),
                self.context.depth_renderbuffer(shape, samples=samples),
            )
            resolved = self.context.framebuffer(self.context.renderbuffer(shape, 4))
            self._framebuffers[key] = (target, resolved)
        return self._framebuffers[key]

    def _draw(self, target: Any, arrays: list[Any], textures: list[Any]) -> None:
        target.use()
        target.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
        for (array, _), texture in zip(arrays, textures, strict=True):
            texture.use()
            array.render()

    def _color(self, arrays: list[Any], textures: list[Any], size: int) -> np.ndarray:
        target, resolved = self._framebuffer(size, self.samples)
        self._draw(target, arrays, textures)
        self.context.copy_framebuffer(resolved, target)
        flipped = np.frombuffer(resolved.read(components=4), np.uint8).reshape(size, size, 4)
        return _straight_alpha(flipped[::-1])

    def _depth(self, arrays: list[Any], textures: list[Any], size: int, planes: tuple[float, float]) -> np.ndarray:
        key = (size, 0)
        if key not in self._framebuffers:
            depth = self.context.depth_texture((size, size))
            target = self.context.framebuffer([self.context.renderbuffer((size, size), 4)], depth)
            self._framebuffers[key] = (target, depth)
        target, depth = self._framebuffers[key]
        self._draw(target, arrays, textures)
        window = np.frombuffer(depth.read(), np.float32).reshape(size, size)[::-1]
        (near, far), ndc = planes, window.astype(np.float64) * 2 - 1
        z = 2 * near * far / (far + near - ndc * (far - near))
        return np.where(window >= 1.0, np.inf, z).astype(np.float32)


def _load_triton() -> None:
    """Loads Triton's library where torch is in use.

    Mesa's software driver brings an LLVM of its own; Triton's crashes the process when it comes second.
    """
    if "torch" in sys.modules and find_spec("triton") is not None:
        with suppress(ImportError):
            import_module("triton._C.libtriton")


def _planes(pose: np.ndarray, reach: float) -> tuple[float, float]:
    """Least and largest depth in a view of what lies within ``reach`` of the origin, a little apart from both."""
    middle = float(pose[2, 3])
    near = max(_NEAR, middle - 1.01 * reach)
    return near, max(middle + 1.01 * reach, 2 * near)


def _projection(intrinsics: np.ndarray, size: int, planes: tuple[float, float]) -> np.ndarray:
    """OpenCV camera space -> OpenGL clip space for a square picture."""
    near, far = planes
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    return np.array(
        [
            [2 * fx / size, 0, 2 * cx / size - 1, 0],
            [0, -2 * fy / size, 1 - 2 * cy / size, 0],
            [0, 0, (far + near) / (far - near), -2 * far * near / (far - near)],
            [0, 0, 1, 0],
        ]
    )


def _straight_alpha(premultiplied: np.ndarray) -> np.ndarray:
    """Multisampling leaves colour multiplied with coverage at edges; divide it out there."""
    result = np.array(premultiplied, order="C")
    pixels = result.reshape(-1, 4)
    edge = np.flatnonzero(pixels[:, 3] - np.uint8(1) < 254)  # 0 wraps around to 255
    mixed = pixels[edge].astype(np.float32)
    pixels[edge, :3] = np.minimum(np.rint(mixed[:, :3] * (255 / mixed[:, 3:])), 255)
    return result
