"""Time and memory of start-up, the feature extractors, encoding in tiles, and lifting; what hidden voxels cost.

python benchmarks/features.py [MODE ...] [--threads N] [--device cpu|cuda]

Modes: lifting, extractors, diffusers, asset, tiling, start, and occlusion, which takes --assets DIR and --split NAME
(meshes; default: synthesized ones), --count N and --extractor SOURCE. Without a mode all of them.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]  # it has smdit.py

import numpy as np
import torch
import torch.nn.functional as F
from flux_features import FluxFeatures, FluxFeaturesConfig, lift_features, voxel_centres
from gs_render import Camera

if TYPE_CHECKING:
    from diff2to3.data._store import Store

GRID, SIZE, VIEWS = 32, 256, 32  # of mode occlusion: as `tiny` was trained
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
        finish()
        start = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - start)
    return min(times)


def finish() -> None:
    """Waits for the device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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
import sys, time, torch
from flux_features import FluxFeatures, FluxFeaturesConfig
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
preset, size, tile, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, sys.argv[4]
torch.set_num_threads(int(sys.argv[5]))
dtype = torch.bfloat16 if device == "cuda" else torch.float32
model = FluxFeatures(FluxFeaturesConfig.preset(preset)).eval().to(device, dtype)
image = torch.rand(1, 3, size, size, device=device, dtype=dtype)
with torch.inference_mode():
    model(image[..., :64, :64], tile=tile and 32)
    before = peak()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    start = time.perf_counter()
    model(image, tile=tile)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    most = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak()
print(f"| {preset} | {size}^2 | {tile or 'whole'} | {seconds:.1f} | {most - before:.0f} |")
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


def loop(maps: torch.Tensor, cameras: Camera, points: torch.Tensor, depth: torch.Tensor | None) -> torch.Tensor:
    """What lifting is defined as: a view at a time, in float64, by `F.grid_sample`; zero out of frame."""
    total = torch.zeros(len(points), maps.shape[1], dtype=torch.float64, device=maps.device)
    everywhere, count = total.clone(), total[:, :1].clone()
    size = torch.tensor([cameras.width, cameras.height], device=maps.device)
    for v in range(len(maps)):
        pose, matrix = cameras.world_to_camera[v].double(), cameras.intrinsics[v].double()
        projected = (points.double() @ pose[:3, :3].T + pose[:3, 3]) @ matrix.T
        place = projected[:, :2] / projected[:, 2:] / size * 2 - 1
        options = {"padding_mode": "border", "align_corners": False}
        inside = (place.abs() <= 1).all(1) & (projected[:, 2] > 0)
        found = F.grid_sample(maps[v : v + 1].double(), place[None, None], **options)[0, :, 0].T * inside[:, None]
        everywhere += found
        if depth is not None:
            near = F.grid_sample(depth[v : v + 1, None].double(), place[None, None], "nearest", "border", False)
            seen = (inside & (projected[:, 2] <= near[0, 0, 0] + 0.03)).double()[:, None]
            total, count = total + found * seen, count + seen
    return torch.where(count > 0, total / count.clamp_min(1), everywhere / len(maps))


@torch.inference_mode()
def lifting(device: str) -> None:
    """150 views and 32,768 voxels, maps of FLUX at 512^2 and of DINOv2-L at 518^2."""
    columns = ("seconds", "inputs, MB", "peak above inputs, MB", "largest difference to a loop in float64")
    print(f"\n| lifting 150 views onto 32,768 voxels | {' | '.join(columns)} |\n|{'---|' * 5}")
    cameras = orbit(150, 512, device)
    points = some_voxels(32768, device)
    for name, channels, side in (("FLUX, 16 x 64^2", 16, 64), ("DINOv2-L, 1024 x 37^2", 1024, 37)):
        maps = torch.randn(150, channels, side, side, device=device)
        depth = torch.full((150, 512, 512), 2.0, device=device)
        for visibility in ("all", "depth"):
            if device == "cuda":  # an operation that waits for the device is an error
                lift_features(maps, cameras, points, visibility, depth=depth)
                torch.cuda.set_sync_debug_mode("error")
            before = reset_peak(device)
            lifted = lift_features(maps, cameras, points, visibility, depth=depth)
            torch.cuda.set_sync_debug_mode("default") if device == "cuda" else None
            above = peak(device) - before
            seconds = best(
                lambda maps=maps, v=visibility, d=depth: lift_features(maps, cameras, points, v, depth=d),
                1 if channels > 16 and device == "cpu" else 3,
            )
            expected = loop(maps, cameras, points[:1000], depth if visibility == "depth" else None)
            error = (lifted[:1000] - expected).abs().max()
            size = (maps.numel() + (depth.numel() if visibility == "depth" else 0)) * 4 / 2**20
            print(f"| {name}, {visibility} | {seconds:.4f} | {size:.0f} | {above:.0f} | {error:.1e} |", flush=True)


@torch.inference_mode()
def asset(device: str) -> None:
    """One asset: views on the host, uint8 RGBA, are encoded by FLUX's network (random weights) and lifted."""
    views, size, count, dtype = (150, 512, 32768, torch.bfloat16) if device == "cuda" else (6, 64, 2000, torch.float32)
    model = FluxFeatures(FluxFeaturesConfig.preset("paper")).eval().to(device, dtype)
    cameras, points = orbit(views, size, device), some_voxels(count, device)
    rgba = torch.randint(256, (views, 4, size, size), dtype=torch.uint8)
    depth = torch.full((views, size // 4, size // 4), 2.0, device=device)

    def encode() -> torch.Tensor:
        maps = []
        for part in rgba.split(8):
            color, alpha = (part.to(device).to(dtype) / 255).split([3, 1], 1)
            maps.append(model(color * alpha + 1 - alpha).float())
        return torch.cat(maps)

    maps = encode()
    rows = {
        "encoding": best(encode),
        "lifting, all": best(lambda: lift_features(maps, cameras, points)),
        "lifting, depth": best(lambda: lift_features(maps, cameras, points, "depth", depth=depth)),
        "end to end, depth": best(lambda: lift_features(encode(), cameras, points, "depth", depth=depth)),
    }
    print(f"\n| {views} views of {size}^2 onto {count:,} voxels of 64^3, {dtype} | ms |\n|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {1000 * seconds:.1f} |")


def hidden(eye: torch.Tensor, points: torch.Tensor, triangles: torch.Tensor, slack: float) -> torch.Tensor:
    """Whether a triangle [F, 3, 3] crosses the way from the eye to each point [L, 3] more than ``slack`` before it.

    Moller and Trumbore's test. All ways start at one eye, so that what it asks of a triangle are products with its
    direction.
    """
    corner, one, two = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    turned = torch.linalg.cross(eye - corner, one)
    asked = torch.stack([torch.linalg.cross(two, one), torch.linalg.cross(two, eye - corner), turned])
    depth, found = (two * turned).sum(-1), []
    for part in points.split(max(1, 4_000_000 // len(triangles))):
        length = (part - eye).norm(dim=1, keepdim=True)
        scale, u, v = ((part - eye) / length) @ asked.mT  # [3, l, F]
        u, v, distance = u / scale, v / scale, depth / scale
        found.append(((u >= 0) & (v >= 0) & (u + v <= 1) & (distance > 0) & (distance < length - slack)).any(1))
    return torch.cat(found)


def surface_points(triangles: np.ndarray, coords: np.ndarray, count: int) -> np.ndarray:
    """The surface point nearest to the centre of each voxel, of ``count`` drawn by area; NaN where none fell."""
    rng = np.random.default_rng(0)
    area = np.linalg.norm(np.cross(*(triangles[:, 1:] - triangles[:, :1]).transpose(1, 0, 2)), axis=1)
    chosen = triangles[rng.choice(len(triangles), count, p=area / area.sum())]
    points = (rng.dirichlet((1, 1, 1), count)[..., None] * chosen).sum(1)
    cells = np.clip(np.floor((points + 0.5) * GRID), 0, GRID - 1).astype(np.int64)
    distance = np.linalg.norm((cells + 0.5) / GRID - 0.5 - points, axis=1)
    order = np.argsort(-distance)  # the nearest is written last
    table = np.full((GRID, GRID, GRID, 3), np.nan)
    table[tuple(cells[order].T)] = points[order]
    return table[tuple(coords.T)]


def occlusion(device: str, assets: Path | None, split: str | None, count: int, source: str) -> None:
    """Error of lifted features that hidden views cause, with `all` and with `depth`, against true visibility.

    A view truly sees a voxel if no triangle lies between its eye and the voxel's surface point (the nearest to the
    centre of many points on the mesh), but for the last 0.002. The truth is the mean over those views of the features
    at the voxel's centre, so that the three means differ by their views alone. Voxels that no view sees are left out.
    The error is the mean distance to the truth over the mean distance of the truth to its mean.
    """
    from diff2to3.data._extractor import ExtractorChoice, open_extractor
    from diff2to3.data._store import Store

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "set"
        if assets is None:
            assets = Path(folder) / "assets"
            run("data", "synthesize", assets, "--count", count, "--seed", 3)
        options = [assets, data, "--limit", count, "--workers", 2, *(("--split", split) if split else ())]
        run("data", "render", *options, "--size", SIZE, "--views", VIEWS, "--extra-views", 0, "--condition-views", 0)
        run("data", "voxelize", *options, "--grid-size", GRID)
        columns = ["object", "triangles", "voxels", "seen by none", "share of views", "error, all", "error, depth"]
        print(f"\nFeatures of `{source}`, {VIEWS} views of {SIZE}^2, {GRID}^3.\n")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        extractor = open_extractor(ExtractorChoice(source=source)).to(device)
        table = [lifting_errors(extractor, device, Store(data), row, assets) for row in Store(data).objects()]
        share, everywhere, by_depth = np.mean(table, 0)
        print(f"| mean of {len(table)} | | | | {share:.2f} | {everywhere:.3f} | {by_depth:.3f} |")


@torch.inference_mode()
def lifting_errors(
    extractor: FluxFeatures, device: str, store: Store, row: dict[str, str], assets: Path
) -> list[float]:
    """A row of the table; share of the views that see a voxel, error with `all`, error with `depth`."""
    from diff2to3.data._mesh import load_mesh
    from diff2to3.data._render_stage import asset_path
    from diff2to3.data._store import decode_png

    triangles = load_mesh(asset_path(assets, row["id"], row.get("path"))).triangles.astype(np.float64)
    rendered, coords = store.read("render", row["id"]), store.read("voxels", row["id"])["coords"]
    points = torch.from_numpy(surface_points(triangles, coords, 400_000)).to(device)
    pose = torch.from_numpy(rendered["view_pose"]).double().to(device)
    eyes = -(pose[:, :3, :3].mT @ pose[:, :3, 3:])[..., 0]
    faces = torch.from_numpy(triangles).to(device)
    seen = torch.stack([~hidden(eye, points, faces, 0.002) for eye in eyes])  # [V, L]
    kept = seen.any(0) & points.isfinite().all(1)
    seen = seen[:, kept]

    images = np.stack([decode_png(rendered["view_png"], rendered["view_bounds"], v) for v in range(VIEWS)])
    rgba = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    maps = torch.cat([extractor(part[:, :3] * part[:, 3:] + 1 - part[:, 3:]) for part in rgba.split(8)]).float()
    cameras = Camera(pose.float(), torch.from_numpy(rendered["view_intrinsics"]).to(device), SIZE, SIZE)
    centres = voxel_centres(torch.from_numpy(coords.astype(np.int64)).to(device)[kept], GRID)
    depth = torch.from_numpy(rendered["view_depth"]).to(device).float()
    each = torch.stack([lift_features(maps[v : v + 1], cameras[v], centres) for v in range(VIEWS)])
    truth = (each * seen[..., None]).sum(0) / seen.sum(0)[:, None]
    spread = (truth - truth.mean(0)).norm(dim=1).mean()
    errors = [
        float((lift_features(maps, cameras, centres, visibility, depth=depth) - truth).norm(dim=1).mean() / spread)
        for visibility in ("all", "depth")
    ]
    share, lost = float(seen.float().mean()), len(coords) - int(kept.sum())
    counts = f"{len(triangles)} | {len(coords)} | {lost} | {share:.2f}"
    print(f"| {row['id']} | {counts} | {errors[0]:.3f} | {errors[1]:.3f} |", flush=True)
    return [share, *errors]


def run(*arguments: object) -> None:
    """A command of diff2to3."""
    subprocess.run([sys.executable, "-m", "diff2to3", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def orbit(views: int, size: int, device: str) -> Camera:
    return Camera.orbit(num_views=views, radius=2.0, fov_degrees=40.0, size=size, elevation_degrees=20.0).to(device)


def some_voxels(count: int, device: str) -> torch.Tensor:
    cells = torch.randperm(64**3, generator=torch.Generator().manual_seed(0))[:count]
    return voxel_centres(torch.stack([cells // 4096, cells // 64 % 64, cells % 64], 1), 64).to(device)


def reset_peak(device: str) -> float:
    """Forgets the peak of memory so far; MB in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS:")


def peak(device: str) -> float:
    """MB since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else memory("VmHWM:")


def memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def main() -> None:
    modes = {
        "lifting": lambda a: lifting(a.device),
        "extractors": lambda a: extractors(a.device),
        "diffusers": lambda a: against_diffusers(a.device),
        "asset": lambda a: asset(a.device),
        "tiling": lambda a: tiling(a.device, a.threads),
        "start": lambda a: start_up(),
        "occlusion": lambda a: occlusion(a.device, a.assets, a.split, a.count, a.extractor),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(modes))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--split")
    parser.add_argument("--count", type=int, default=15)
    parser.add_argument("--extractor", default="tiny")
    arguments = parser.parse_args()
    if unknown := [mode for mode in arguments.modes if mode not in modes]:
        parser.error(f"no mode {unknown[0]!r}; expected {', '.join(modes)}")
    torch.set_num_threads(arguments.threads)
    chip = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} thread(s)"
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {chip}\n")
    for mode in arguments.modes or modes:
        modes[mode](arguments)


if __name__ == "__main__":
    main()
