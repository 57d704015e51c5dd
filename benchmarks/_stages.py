"""Objects a minute through the stages of `diff2to3 data`, by the commands that a user types; part of `data.py`."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diff2to3.data._render_stage import list_assets
from diff2to3.data._store import Store, write_rows
from flux_features import FluxFeatures, FluxFeaturesConfig
from safetensors.torch import save_file
from sparse_vae import SparseVAE, SparseVAEConfig

PARTS = ("voxels", "render", "features", "latents")
HEAD = ["| stage | processes | objects | failed | seconds | objects a minute |", "|---|---|---|---|---|---|"]


def index_of(assets: Path, count: int, folder: Path, seed: int) -> Path:
    """`index.csv` with `count` objects of a folder drawn at random, all if it is 0."""
    beside = [place / "index.csv" for place in (assets, assets.parent)]
    rows = list_assets(assets, next((file for file in beside if file.is_file()), None))
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[: count or None])
    write_rows(folder / "index.csv", [{"id": rows[i]["id"], "split": rows[i]["split"]} for i in chosen])
    return folder / "index.csv"


def random_model(folder: Path, model: torch.nn.Module, config: str) -> Path:
    """A model folder with the weights that a fresh model has: what they say does not matter here, their shapes do."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(config)
    return folder


def extractor(name: str, folder: Path) -> str | Path:
    """`tiny` is the embedded one; `paper`, `taef2` ... are networks with random weights."""
    if name == "tiny":
        return name
    torch.manual_seed(0)
    config = FluxFeaturesConfig.preset(name)
    return random_model(folder / f"extractor-{name}", FluxFeatures(config), config.model_dump_json())


def vae(preset: str, folder: Path) -> Path:
    """A 2to3-VAE with random weights."""
    torch.manual_seed(0)
    config = SparseVAEConfig.preset(preset)
    model = SparseVAE(config)
    for parameter in model.parameters():  # a fresh one's last layer is zero, and constant latents are refused
        torch.nn.init.normal_(parameter, std=0.02)
    return random_model(folder / f"vae-{preset}", model, config.model_dump_json())


class StageRun:
    """Runs the commands over one index, and counts what comes of them.

    Args:
        folder: data sets are its folders `grid-N` and `size-N`; what is finished is not done again.
        count: objects, 0 for all.
        processes: of the stages that read assets.
        model_processes: of `features` and `latents`; they share the objects, and the device.
        model_objects: the first of the objects alone go through these two; 0 for all.
    """

    def __init__(
        self,
        assets: Path,
        folder: Path,
        count: int,
        seed: int,
        *,
        processes: int,
        model_processes: int,
        model_objects: int,
        device: str,
    ) -> None:
        self.assets, self.folder, self.device = assets, folder.resolve(), device
        self.processes, self.model_processes, self.model_objects = processes, model_processes, model_objects
        self.index = index_of(assets, count, folder, seed)
        with self.index.open(newline="") as file:
            self.ids = [row["id"] for row in csv.DictReader(file)]

    def rows(self, parts: Sequence[str], size: int, network: str) -> Iterator[str]:
        """Rows of the table, one as soon as its stage has ended.

        Features take 24 views, one variant, and voxels of 64^3 on CUDA, of 32^3 elsewhere; latents then a 2to3-VAE of
        preset `paper` or `tiny` with random weights.
        """
        grid, preset = (64, "paper") if self.device.startswith("cuda") else (32, "tiny")
        data = f"size-{size}"
        if "voxels" in parts:
            for n in (32, 64):
                yield self.over_assets("voxelize", "voxels", f"grid-{n}", ("--grid-size", n))
        if "render" in parts:
            views = ("--size", size, "--views", 24, "--extra-views", 0, "--condition-views", 0)
            yield self.over_assets("render", "render", data, views)
        if {"features", "latents"} & set(parts) and not (self.folder / data / "voxels").exists():
            (self.folder / data / "voxels").symlink_to(self.folder / f"grid-{grid}" / "voxels")
        if "features" in parts:
            source = extractor(network, self.folder)
            options = ("--extractor", source, "--views", 24, "--variants", 1, "--grid-size", grid)
            yield self.over_objects("features", data, options)
        if "latents" in parts:
            yield self.over_objects("latents", data, ("--vae", vae(preset, self.folder)))

    def over_assets(self, command: str, stage: str, data: str, options: tuple[object, ...]) -> str:
        """A stage that reads assets, in its own processes."""
        call = (command, self.assets, self.folder / data, "--index", self.index, "--workers", self.processes, *options)
        return self._row(command, options, stage, data, [call], self.processes, self.ids)

    def over_objects(self, stage: str, data: str, options: tuple[object, ...]) -> str:
        """A stage that runs a model."""
        ids, count = self.ids[: self.model_objects or None], self.model_processes
        write_rows(self.folder / data / "objects.csv", [{"id": i, "split": "train"} for i in ids])
        start = (stage, self.folder / data, "--device", self.device)
        calls = [(*start, "--shard", f"{number}/{count}", *options) for number in range(count)]
        return self._row(stage, options, stage, data, calls, count, ids)

    def _row(
        self,
        command: str,
        options: tuple[object, ...],
        stage: str,
        data: str,
        calls: list[tuple[object, ...]],
        processes: int,
        ids: list[str],
    ) -> str:
        """Runs the calls at the same time; their start-up is in the seconds."""
        title = " ".join([command, *(o.name if isinstance(o, Path) else str(o) for o in options)])
        store = Store(self.folder / data)
        todo = [i for i in ids if not store.path(stage, i).is_file()]
        logs = [self.folder / f"{data}-{stage}-{number}.log" for number in range(len(calls))]
        start = time.perf_counter()
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "diff2to3", "data", *map(str, call)],
                stdout=subprocess.DEVNULL,
                stderr=log.open("w"),
            )
            for call, log in zip(calls, logs, strict=True)
        ]
        codes = [process.wait() for process in running]
        seconds = time.perf_counter() - start
        if any(codes):
            log = logs[next(number for number, code in enumerate(codes) if code)]
            title += f" (exit codes {sorted(set(codes))}: {' '.join(log.read_text().strip().splitlines()[-1:])})"
        elif renderer := store.manifest(stage)["settings"].get("renderer"):
            title += f" ({renderer})"
        done = sum(store.path(stage, i).is_file() for i in todo)
        rate = f"{done / seconds * 60:,.0f}" if todo else "done before"
        return f"| {title} | {processes} | {len(todo):,} | {len(todo) - done} | {seconds:.1f} | {rate} |"


def failures(folder: Path) -> list[str]:
    """Reasons in the manifests of the data sets."""
    lines = []
    for manifest in sorted(folder.glob("*-*/*/manifest.json")):
        for object_id, reason in json.loads(manifest.read_text())["failures"].items():
            lines.append(f"- {manifest.parent.parent.name}, {manifest.parent.name}, {object_id}: {reason}")
    return lines
