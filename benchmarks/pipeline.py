"""Memory and time of the whole pipeline at the paper's size: a picture in, a .ply out. Weights are random.

    python benchmarks/pipeline.py --device cuda [--repeats 3] [--out FILE.md]
    python benchmarks/pipeline.py --tiny            # the same at the smallest size, on the CPU

Stage 1 runs as it always does; what it finds with random weights means nothing, so stage 2 gets shells of `--voxels`
voxels instead. Memory is PyTorch's peak of tensors, and what it has reserved; between two pictures only weights stay.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from _report import Report, shells, table

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]

import torch
from diff2to3 import Pipeline, PipelineConfig
from diff2to3._plugins import PIPELINE_ROLES, build
from flux_features import FluxFeaturesConfig
from gs_render import load, save
from PIL import Image, ImageDraw
from smdit import SamplerConfig, SMDiTConfig, StructureFlowConfig
from sparse_vae import SparseVAEConfig

STEPS, GUIDANCE = 50, 3.0
"""Of stage 2; stage 1 keeps its preset's, TRELLIS's."""
STAGES = ("features", "structure", "latents", "gaussians", ".ply")


def paper_config(tiny: bool) -> PipelineConfig:
    """The paper's extractor, stage 1 of TRELLIS's size on FLUX's tokens, the paper's SMDiT and decoder."""
    preset = "tiny" if tiny else "paper"
    structure = StructureFlowConfig.preset(preset)
    if not tiny:
        flow = structure.flow.model_copy(update={"condition_channels": 64, "condition_position": "absolute"})
        structure = structure.model_copy(update={"flow": flow})
    parts = {
        "feature_extractor": ("flux", FluxFeaturesConfig.preset(preset)),
        "structure": ("structure-flow", structure),
        "backbone": ("smdit", SMDiTConfig.preset(preset)),
        "latent_decoder": ("gaussian", SparseVAEConfig.preset(preset)),
    }
    roles = {role: {"name": name, "config": config.model_dump(mode="json")} for role, (name, config) in parts.items()}
    sampler = SamplerConfig(steps=2 if tiny else STEPS, guidance=GUIDANCE)
    return PipelineConfig(name=preset, roles=roles, sampler=sampler)


def make_pipeline(config: PipelineConfig, device: str, dtype: str, low_vram: bool) -> Pipeline:
    """The pipeline with normal random weights: fresh ones would be zero where it matters."""
    torch.manual_seed(0)
    components = {}
    for role in PIPELINE_ROLES:
        chosen = config.roles[role.name]
        with torch.device(device):  # a billion random weights take half a minute on a CPU
            component = build(role, chosen.name, chosen.config)
            for parameter in component.parameters() if isinstance(component, torch.nn.Module) else ():
                torch.nn.init.normal_(parameter, std=0.02)
        components[role.name] = component.cpu() if isinstance(component, torch.nn.Module) else component
    return Pipeline(config, components, device=device, dtype=dtype, low_vram=low_vram)


def picture() -> Image.Image:
    image = Image.new("RGBA", (768, 768), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((150, 90, 620, 700), fill=(200, 60, 40, 255), outline=(30, 30, 90, 255), width=40)
    return image


def generate(pipeline: Pipeline, image: Image.Image, voxels: torch.Tensor, path: Path) -> dict[str, float]:
    """Seconds of every stage, from the picture to the written file."""
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def took(stage: str) -> None:
        nonlocal begin
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[stage] = time.perf_counter() - begin
        begin = time.perf_counter()

    condition = pipeline.encode([[pipeline.cut_out(image)]])
    took("features")
    pipeline.find_voxels(condition)
    took("structure")
    latents = pipeline.fill_voxels([voxels], condition)
    took("latents")
    [gaussians] = pipeline.decode(latents)
    took("gaussians")
    save(gaussians, path)
    took(".ply")
    count = len(load(path))
    if count != len(voxels) * pipeline.latent_decoder.config.gaussians.num_gaussians:
        raise RuntimeError(f"{path} has {count} Gaussians")
    return seconds


def row(label: str, pipeline: Pipeline, voxels: torch.Tensor, folder: Path, repeats: int) -> list[str]:
    is_cuda = pipeline.device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated() if is_cuda else 0
    begin = time.perf_counter()
    generate(pipeline, picture(), voxels, folder / "asset.ply")
    first = time.perf_counter() - begin
    runs = [generate(pipeline, picture(), voxels, folder / "asset.ply") for _ in range(repeats)]
    warm = min(runs, key=lambda run: sum(run.values()))
    peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if is_cuda else [0, 0]
    sizes = [f"{value / 1e9:.2f}" for value in (resting, *peaks)]
    return [label, *sizes, f"{first:.1f}", f"{sum(warm.values()):.2f}", *(f"{warm[stage]:.2f}" for stage in STAGES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="everything at the smallest size")
    parser.add_argument("--voxels", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    device = arguments.device
    dtype = "bfloat16" if device == "cuda" else "float32"
    config = paper_config(arguments.tiny)
    grid = config.roles["backbone"].config["grid_size"]
    voxels = shells(min(arguments.voxels, grid**3 // 13), grid, thickness=2.2, innermost=2).int()
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = Report(arguments.out)
    report.add(f"# Pipeline, {device}")
    command = " ".join(["python", "benchmarks/pipeline.py", *sys.argv[1:]])
    report.add(
        f"`{command}`: {machine}; Python {platform.python_version()}; torch {version('torch')}; commit "
        f"{commit.stdout.strip()}. Preset {config.name}, {dtype}, {len(voxels):,} voxels, "
        f"{config.sampler.steps} steps with guidance in stage 2; random weights. Warm: the shortest of "
        f"{arguments.repeats} runs after the first. Sizes in GB (1e9 bytes), times in seconds."
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for label in ("default", "low_vram"):
            pipeline = make_pipeline(config, device, dtype, label == "low_vram")
            rows.append(row(label, pipeline, voxels, Path(folder), arguments.repeats))
            models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
            size = sum(parameter.numel() for model in models for parameter in model.parameters())
            del pipeline, models
    head = ["mode", "resting", "peak", "reserved", "first", "warm", *STAGES]
    report.add(f"{size / 1e6:,.0f} M parameters.\n\n{table(head, rows)}")


if __name__ == "__main__":
    main()
