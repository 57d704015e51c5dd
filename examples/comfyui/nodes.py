"""ComfyUI nodes: a picture (and mask) in, a Gaussian splat, views, a mesh and files out.

ComfyUI's conventions: an IMAGE is a float tensor [B, H, W, C] in [0, 1], a MASK [B, H, W]; a node's outputs are a
tuple.
"""

import os

import torch

try:
    import folder_paths  # ComfyUI's own
except ImportError:  # tried outside ComfyUI
    folder_paths = None

CATEGORY = "diff2to3"
SPLAT_FORMATS = ["ply", "compressed.ply", "splat", "spz", "sog", "glb", "html", "mp4", "gif"]
MESH_FORMATS = ["glb", "obj"]


class LoadPipeline:
    """A pipeline of diff2to3: the embedded "tiny", a directory, or a Hub id."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("DIFF2TO3_PIPELINE",), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pipeline": ("STRING", {"default": "tiny", "tooltip": "tiny, a directory, or a Hub id"}),
                "device": (["auto", "cuda", "mps", "cpu"],),
                "dtype": (["float32", "bfloat16", "float16"],),
                "low_vram": ("BOOLEAN", {"default": False, "tooltip": "one model at a time on the device"}),
            },
            "optional": {"revision": ("STRING", {"default": "", "tooltip": "branch, tag or commit of a Hub id"})},
        }

    def load(self, pipeline, device, dtype, low_vram, revision=""):
        from diff2to3 import Pipeline

        place = None if device == "auto" else device
        options = {"dtype": dtype, "low_vram": low_vram, "revision": revision or None}
        return (Pipeline.from_pretrained(pipeline or None, device=place, **options),)


class Generate:
    """Every picture of the batch becomes an object; with `multi_view` all are views of one."""

    CATEGORY, FUNCTION = CATEGORY, "generate"
    RETURN_TYPES, RETURN_NAMES, OUTPUT_IS_LIST = ("DIFF2TO3_SPLAT",), ("splat",), (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pipeline": ("DIFF2TO3_PIPELINE",),
                "image": ("IMAGE",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 500, "tooltip": "0: the pipeline's own"}),
                "guidance": (
                    "FLOAT",
                    {"default": -1.0, "min": -1.0, "max": 20.0, "step": 0.1, "tooltip": "below 0: the pipeline's own"},
                ),
                "multi_view": ("BOOLEAN", {"default": False}),
            },
            "optional": {
                "mask": ("MASK",),
                "mask_is": (["background", "object"], {"tooltip": "Load Image gives the background"}),
            },
        }

    def generate(self, pipeline, image, seed, steps, guidance, multi_view, mask=None, mask_is="background"):
        pictures = to_pictures(image, mask, mask_is)
        settings = {"seed": seed, "steps": steps or None, "guidance": guidance if guidance >= 0 else None}
        objects = [pictures] if multi_view else pictures
        return ([pipeline(entry, **settings, callback=progress_bar()) for entry in objects],)


class RenderViews:
    """Pictures of the splat from all sides, as a batch."""

    CATEGORY, FUNCTION = CATEGORY, "render"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "MASK"), ("views", "alpha")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "splat": ("DIFF2TO3_SPLAT",),
                "views": ("INT", {"default": 24, "min": 1, "max": 360}),
                "size": ("INT", {"default": 512, "min": 16, "max": 2048, "step": 16}),
                "elevation": ("FLOAT", {"default": 20.0, "min": -85.0, "max": 85.0, "step": 1.0}),
                "background": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            }
        }

    def render(self, splat, views, size, elevation, background):
        from gs_render import turntable_cameras

        out = splat.render(turntable_cameras(views, size, elevation, gaussians=splat.gaussians), background)
        return out.color.clamp(0, 1).cpu(), out.alpha[..., 0].cpu()


class ExtractMesh:
    """The surface of the splat as coloured triangles."""

    CATEGORY, FUNCTION = CATEGORY, "extract"
    RETURN_TYPES, RETURN_NAMES = ("DIFF2TO3_MESH",), ("mesh",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "splat": ("DIFF2TO3_SPLAT",),
                "resolution": ("INT", {"default": 128, "min": 16, "max": 512, "tooltip": "cells along the object"}),
                "views": ("INT", {"default": 48, "min": 8, "max": 200, "tooltip": "that depth is drawn from"}),
                "size": ("INT", {"default": 512, "min": 64, "max": 2048, "step": 64, "tooltip": "of a view, pixels"}),
            }
        }

    def extract(self, splat, resolution, views, size):
        from gs_render import extract_mesh

        return (extract_mesh(splat.gaussians, resolution, views, size, draw=splat.renderer),)


class SaveSplat:
    """Write the splat into ComfyUI's output folder."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "save", True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("path",)

    @classmethod
    def INPUT_TYPES(cls):
        return saving("splat", "DIFF2TO3_SPLAT", SPLAT_FORMATS)

    def save(self, splat, filename_prefix, format):
        return save(splat, filename_prefix, format)


class SaveMesh:
    """Write the mesh into ComfyUI's output folder; its path goes into Preview 3D."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "save", True
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("path",)

    @classmethod
    def INPUT_TYPES(cls):
        return saving("mesh", "DIFF2TO3_MESH", MESH_FORMATS)

    def save(self, mesh, filename_prefix, format):
        return save(mesh, filename_prefix, format)


def to_pictures(image, mask=None, mask_is="background"):
    """IMAGE [B, H, W, 3 or 4] and MASK [B or 1, h, w] -> B PIL pictures, RGBA where a mask or alpha shows the object.

    Load Image gives an empty mask with a picture that has no transparency: that is no mask.
    """
    from PIL import Image

    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise ValueError(f"image: got shape {list(image.shape)}, expected [B, H, W, 3 or 4]")
    pixels = image.cpu().float()
    if mask is not None and bool(mask.any()):
        mask = (mask[None] if mask.ndim == 2 else mask).cpu().float()
        if len(mask) not in (1, len(pixels)):
            raise ValueError(f"got {len(mask)} masks for {len(pixels)} pictures; expected one for each, or one for all")
        size = tuple(pixels.shape[1:3])
        mask = torch.nn.functional.interpolate(mask[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        alpha = (mask if mask_is == "object" else 1 - mask).expand(len(pixels), -1, -1)
        pixels = torch.cat([pixels[..., :3], alpha[..., None]], dim=-1)
    values = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in values]


def progress_bar():
    """A callback that moves the node's bar, through the first half by stage 1; None outside ComfyUI."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bar = ProgressBar(200)
    return lambda stage, done, total: bar.update_absolute(100 * done // total + 100 * (stage == "latents"))


def saving(name, kind, formats):
    """The inputs of a node that saves."""
    prefix = ("STRING", {"default": "3d/diff2to3", "tooltip": "folder and start of the name, below output"})
    return {"required": {name: (kind,), "filename_prefix": prefix, "format": (formats,)}}


def save(thing, prefix, suffix):
    """Write what has a method `save(path)` as the next file of a prefix; the path is relative to the output folder."""
    root = folder_paths.get_output_directory() if folder_paths else os.path.abspath("output")
    if folder_paths:  # refuses a prefix that leads out of the folder
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    else:
        subfolder, name = os.path.split(prefix)
        folder = os.path.join(root, subfolder)
        os.makedirs(folder, exist_ok=True)
        counter = 1 + sum(file.startswith(f"{name}_") for file in os.listdir(folder))
    file = f"{name}_{counter:05}_.{suffix}"
    thing.save(os.path.join(folder, file))
    shown = [{"filename": file, "subfolder": subfolder, "type": "output"}]
    return {"ui": {"3d": shown}, "result": (os.path.join(subfolder, file),)}


NODE_CLASS_MAPPINGS = {
    "Diff2to3LoadPipeline": LoadPipeline,
    "Diff2to3Generate": Generate,
    "Diff2to3RenderViews": RenderViews,
    "Diff2to3ExtractMesh": ExtractMesh,
    "Diff2to3SaveSplat": SaveSplat,
    "Diff2to3SaveMesh": SaveMesh,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Diff2to3LoadPipeline": "Load pipeline (diff2to3)",
    "Diff2to3Generate": "Picture to splat (diff2to3)",
    "Diff2to3RenderViews": "Render views of a splat (diff2to3)",
    "Diff2to3ExtractMesh": "Splat to mesh (diff2to3)",
    "Diff2to3SaveSplat": "Save splat (diff2to3)",
    "Diff2to3SaveMesh": "Save mesh (diff2to3)",
}
