"""What ComfyUI does with custom nodes, as far as its protocol goes: load the folder, check a graph, run it.

A graph is in ComfyUI's API format: {id: {"class_type": name, "inputs": {name: value or [id of a node, its output]}}}.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


def load_package(folder, name):
    """Import a folder of `custom_nodes` as ComfyUI does: by its path, under a name that is not on sys.path."""
    spec = importlib.util.spec_from_file_location(
        name, Path(folder) / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def folder_paths(output):
    """The module of this name, with the two functions that nodes which save use."""
    module = types.ModuleType("folder_paths")
    module.get_output_directory = lambda: str(output)

    def get_save_image_path(prefix, folder, width=0, height=0):
        subfolder, name = os.path.split(os.path.normpath(prefix))
        full = os.path.join(folder, subfolder)
        if os.path.commonpath((folder, os.path.abspath(full))) != str(folder):
            raise ValueError("Saving image outside the output folder is not allowed.")
        os.makedirs(full, exist_ok=True)
        numbers = [int(file[len(name) + 1 :].split("_")[0]) for file in os.listdir(full) if file.startswith(f"{name}_")]
        return full, name, max(numbers, default=0) + 1, subfolder, prefix

    module.get_save_image_path = get_save_image_path
    return module


def comfy_utils(moves):
    """The module `comfy.utils` with a progress bar that notes its positions."""
    module = types.ModuleType("comfy.utils")

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None):
            assert 0 <= value <= self.total
            moves.append(value / self.total)

    module.ProgressBar = ProgressBar
    return module


def core_nodes(folder):
    """The two nodes of ComfyUI itself that the graphs of the tests begin and end with."""

    class LoadImage:
        RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "MASK"), "load", "image"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"image": (sorted(path.name for path in folder.glob("*.png")),)}}

        def load(self, image):
            picture = Image.open(folder / image)
            rgb = torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]
            if "A" not in picture.getbands():
                return rgb, torch.zeros(1, 64, 64)
            return rgb, 1 - torch.from_numpy(np.asarray(picture.getchannel("A"), np.float32) / 255)[None]

    class SaveImage:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "image", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

        def save(self, images, filename_prefix):
            check_value("IMAGE", images)
            return {"ui": {"images": [tuple(image.shape) for image in images]}}

    return {"LoadImage": LoadImage, "SaveImage": SaveImage}


def check_node(name, node):
    """That a class is a node: the attributes that ComfyUI reads have the types that it expects."""
    assert isinstance(node.CATEGORY, str)
    assert node.CATEGORY, name
    assert callable(getattr(node, node.FUNCTION)), name
    assert isinstance(node.RETURN_TYPES, tuple), name
    assert all(isinstance(kind, str) for kind in node.RETURN_TYPES), name
    for attribute in ("RETURN_NAMES", "OUTPUT_IS_LIST"):
        assert len(getattr(node, attribute, node.RETURN_TYPES)) == len(node.RETURN_TYPES), (name, attribute)
    inputs = node.INPUT_TYPES()
    assert set(inputs) <= {"required", "optional", "hidden"}, name
    for key, (kind, *options) in {**inputs["required"], **inputs.get("optional", {})}.items():
        assert key.isidentifier(), (name, key)
        assert len(options) <= 1, (name, key)
        if isinstance(kind, list):
            assert kind, (name, key)
            assert all(isinstance(choice, str) for choice in kind), (name, key)
        elif kind in WIDGETS:
            check_value(kind, options[0]["default"], options[0])


def check_value(kind, value, options=None):
    """That a value is of a type of ComfyUI."""
    options = options or {}
    if isinstance(kind, list):
        assert value in kind, f"{value!r} is none of {kind}"
    elif kind in WIDGETS:
        assert isinstance(value, WIDGETS[kind]), (kind, value)
        if kind in ("INT", "FLOAT"):
            assert options.get("min", value) <= value <= options.get("max", value), value
    elif kind in ("IMAGE", "MASK"):
        assert value.dtype == torch.float32
        assert value.ndim == (4 if kind == "IMAGE" else 3)
        assert 0 <= float(value.min()) <= float(value.max()) <= 1
        assert value.device.type == "cpu"
        assert kind == "MASK" or value.shape[-1] in (3, 4)


@torch.inference_mode()  # as ComfyUI runs nodes
def execute(graph, nodes):
    """Run a graph; returns what its output nodes have for the page, by id, and all results of all nodes."""
    done, shown = {}, {}

    def run(key):
        if key in done:
            return done[key]
        node = nodes[graph[key]["class_type"]]
        declared, given = node.INPUT_TYPES(), graph[key]["inputs"]
        known = {**declared["required"], **declared.get("optional", {})}
        assert set(declared["required"]) <= set(given) <= set(known), (key, set(given) ^ set(known))
        values = {}
        for name, value in given.items():
            kind, options = known[name][0], (known[name][1:] or ({},))[0]
            if isinstance(value, list):
                source, index = value
                offered = nodes[graph[source]["class_type"]].RETURN_TYPES[index]
                assert offered == kind, f"{key}.{name}: a link of {offered}, expected {kind}"
                values[name] = run(source)[index]
            else:
                check_value(kind, value, options)
                values[name] = [value]
        length = max(map(len, values.values()))  # a node that takes no lists runs once for each of their entries
        results = []
        for turn in range(length):
            entry = {name: value[min(turn, len(value) - 1)] for name, value in values.items()}
            result = getattr(node(), node.FUNCTION)(**entry)
            if isinstance(result, dict):
                shown.setdefault(key, []).append(result["ui"])
                result = result.get("result", ())
            assert isinstance(result, tuple)
            assert len(result) == len(node.RETURN_TYPES), key
            results.append(result)
        lists = getattr(node, "OUTPUT_IS_LIST", (False,) * len(node.RETURN_TYPES))
        done[key] = [
            [item for result in results for item in (result[i] if is_list else [result[i]])]
            for i, is_list in enumerate(lists)
        ]
        for kind, outputs in zip(node.RETURN_TYPES, done[key], strict=True):
            for output in outputs:
                check_value(kind, output)
        return done[key]

    for key, entry in graph.items():
        if getattr(nodes[entry["class_type"]], "OUTPUT_NODE", False):
            run(key)
    return shown, done
