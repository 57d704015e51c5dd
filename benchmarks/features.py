"""Time and memory of start-up, the feature extractors and lifting.

python benchmarks/features.py [--threads N] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from flux_features import FluxFeatures, FluxFeaturesConfig, lift_features, voxel_centres
from gs_render import Camera

START = {
    "torch, gs_render, pydantic, jaxtyping": "import torch, gs_render, pydantic, jaxtyping, safetensors.torch",
    "FluxFeatures, architecture tiny": "import flux_features as f; f.FluxFeatures(f.FluxFeaturesConfig())",
    "the same and diffusers": (
        "import flux_features as f; f.FluxFeatures(f.FluxFeaturesConfig()); from diffusers import AutoencoderKL"
    ),
}


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def start_up() -> None:
    print("| new process | seconds |\n|---|---|")
    for name, code in START.items():
        print(f"| {name} | {best(lambda code=code: subprocess.run([sys.executable, '-c', code], check=True)):.2f} |")


@torch.inference_mode()
def extractors(device: str) -> None:
    print("\n| extractor | pictures | ms a picture |\n|---|---|---|")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for preset, size in (("tiny", 256), ("small", 512), ("taef2", 512), ("paper", 512)):
        model = FluxFeatures(FluxFeaturesConfig.preset(preset)).eval().to(device, dtype)
        count = 8 if device == "cuda" else 1
        images = torch.rand(count, 3, size, size, device=device, dtype=dtype)
        seconds = best(lambda model=model, images=images: model(images))
        print(f"| {preset} | {count} x {size}^2, {dtype} | {1000 * seconds / count:.1f} |")


@torch.inference_mode()
def lifting(device: str) -> None:
    """150 views and 32,768 voxels, maps of FLUX at 512^2 and of DINOv2-L at 518^2."""
    print(
        "\n| lifting 150 views onto 32,768 voxels | seconds | inputs, MB | peak above inputs, MB |\n|---|---|---|---|"
    )
    cameras = Camera.orbit(num_views=150, radius=2.0, fov_degrees=40.0, size=512, elevation_degrees=20.0).to(device)
    cells = torch.randperm(64**3, generator=torch.Generator().manual_seed(0))[:32768]
    points = voxel_centres(torch.stack([cells // 4096, cells // 64 % 64, cells % 64], 1), 64).to(device)
    for name, channels, side in (("FLUX, 16 x 64^2", 16, 64), ("DINOv2-L, 1024 x 37^2", 1024, 37)):
        maps = torch.randn(150, channels, side, side, device=device)
        depth = torch.full((150, 512, 512), 2.0, device=device)
        for visibility in ("all", "depth"):
            before = peak(device)
            seconds = best(
                lambda maps=maps, v=visibility, d=depth: lift_features(maps, cameras, points, v, depth=d),
                1 if channels > 16 else 3,
            )
            size = (maps.numel() + (depth.numel() if visibility == "depth" else 0)) * 4 / 2**20
            print(f"| {name}, {visibility} | {seconds:.3f} | {size:.0f} | {peak(device) - before:.0f} |")
    print(f"\npeak resident memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def peak(device: str) -> float:
    """MB; on the CPU the most that the process has ever had, so that later rows can only show less."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chip = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} thread(s)"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {chip}\n")
    lifting(arguments.device)
    extractors(arguments.device)
    start_up()


if __name__ == "__main__":
    main()
