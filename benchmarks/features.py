"""Time and memory of start-up, the feature extractors, encoding in tiles, and lifting.

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
    for preset, size in (("tiny", 256), ("small", 512), ("taef2", 512), ("paper", 512), ("flux2", 512)):
        model = FluxFeatures(FluxFeaturesConfig.preset(preset)).eval().to(device, dtype)
        count = 8 if device == "cuda" else 1
        images = torch.rand(count, 3, size, size, device=device, dtype=dtype)
        seconds = best(lambda model=model, images=images: model(images))
        print(f"| {preset} | {count} x {size}^2, {dtype} | {1000 * seconds / count:.1f} |")


@torch.inference_mode()
def against_diffusers(device: str) -> None:
    """FLUX.1's encoder with random weights through FluxFeatures and through diffusers alone, in turns."""
    dtype, size, count = (torch.bfloat16, 512, 8) if device == "cuda" else (torch.float32, 256, 1)
    model = FluxFeatures(FluxFeaturesConfig.preset("paper")).eval().to(device, dtype)
    images = torch.rand(count, 3, size, size, device=device, dtype=dtype)
    autoencoder, scaled = model.autoencoder, images * 2 - 1
    ours, theirs = [], []
    for _ in range(8):
        ours.append(best(lambda: model(images), 1))
        theirs.append(best(lambda: autoencoder.encode(scaled).latent_dist.mode(), 1))
    a, b = min(ours), min(theirs)
    print(f"\n| FLUX.1's encoder, {count} x {size}^2, {dtype} | ms |\n|---|---|")
    print(f"| diffusers alone | {1000 * b:.1f} |\n| FluxFeatures | {1000 * a:.1f} ({100 * (a / b - 1):+.1f} %) |")


# A process of its own for each row: peaks of memory are of a process. The picture is encoded once.
TILING = """
import resource, sys, time, torch
from flux_features import FluxFeatures, FluxFeaturesConfig
preset, size, tile, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, sys.argv[4]
torch.set_num_threads(int(sys.argv[5]))
dtype = torch.bfloat16 if device == "cuda" else torch.float32
model = FluxFeatures(FluxFeaturesConfig.preset(preset)).eval().to(device, dtype)
image = torch.rand(1, 3, size, size, device=device, dtype=dtype)
with torch.inference_mode():
    model(image[..., :64, :64], tile=tile and 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    model(image, tile=tile)
    if device == "cuda":
        torch.cuda.synchronize()
        before, peak = torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    seconds = time.perf_counter() - start
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"| {preset} | {size}^2 | {tile or 'whole'} | {seconds:.1f} | {peak - before:.0f} |")
"""


def tiling(device: str, threads: int) -> None:
    """Seconds and memory of one large picture, whole and in tiles."""
    print("\n| extractor | picture | tile | seconds | peak above weights and picture, MB |\n|---|---|---|---|---|")
    large, small = (4096, 2048) if device == "cuda" else (2048, 512)
    for preset, size, tile in (("tiny", large, 512), ("taef2", small, small // 4), ("paper", small, small // 4)):
        for side in (0, tile):
            options = (preset, size, side, device, threads)
            done = subprocess.run(
                [sys.executable, "-c", TILING, *map(str, options)], check=True, capture_output=True, text=True
            )
            print(done.stdout.strip(), flush=True)


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
    against_diffusers(arguments.device)
    tiling(arguments.device, arguments.threads)
    start_up()


if __name__ == "__main__":
    main()
