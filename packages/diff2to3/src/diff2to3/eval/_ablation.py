"""Trains and scores the rows of the paper's table 3. Every part of the work is done once and kept in the run folder:

``data/`` features and latents beside links to the data set, ``vae/`` and ``flow/`` the runs of `diff2to3 train`,
``results/`` what was found, and ``table.md``, ``results.json`` and ``index.html`` of all of it. Several processes may
work in one run folder: each part is done by the first that comes to it, under its file in ``locks/``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from filelock import FileLock, Timeout
from sparse_vae import SparseVAE, SparseVAEConfig

from diff2to3._device import usable_device
from diff2to3._errors import InputError
from diff2to3._pipeline import Pipeline
from diff2to3._pipeline_config import ComponentConfig, PipelineConfig, SamplerConfig
from diff2to3._plugins import BACKBONE, MATTING, RENDERER, build, registry
from diff2to3.data._extractor import open_extractor
from diff2to3.data._feature_stage import encode_objects, latent_statistics, lift_objects
from diff2to3.data._models import load_encoding, load_lifting
from diff2to3.data._store import Store, settings_hash, write_atomically
from diff2to3.eval._ablation_config import AblationConfig, Row, row_digest
from diff2to3.eval._ablation_table import write_tables
from diff2to3.eval._generation import evaluate_generation, pipeline_maker
from diff2to3.eval._known_voxels import KnownVoxels
from diff2to3.eval._networks import open_networks
from diff2to3.eval._protocol import Protocol, freeze_protocol, read_protocol
from diff2to3.eval._reconstruction import evaluate_reconstruction
from diff2to3.eval._scores import Scores, summary
from diff2to3.eval._truth import draw_truth
from diff2to3.train._assemble import load_backbone
from diff2to3.train._checkpoint import load_model, read_config
from diff2to3.train._config import TrainConfig
from diff2to3.train._engine import train
from diff2to3.train.stages import build_stage

_OWN = {"data", "out", "parts", "seed", "device"}  # settings of training that an ablation gives itself


class _OutOfTimeError(Exception):
    """The time that was given is over; everything up to here is kept."""


def run_ablation(
    config: AblationConfig,
    merge: Sequence[Path] = (),
    minutes: float | None = None,
    table_only: bool = False,
    rows: Sequence[str] = (),
) -> str:
    """Does what is left to do and writes the table; returns it.

    Args:
        merge: run folders of the same experiments, with other seeds or on other machines, whose results join the table.
        minutes: begin nothing new after so long; training stops at its next checkpoint.
        table_only: the table of what is there already.
        rows: work on these only, while other processes or machines work on the others; the table has all rows.

    Raises:
        InputError: the folder was begun with other settings, a backbone, row or part of the data set is missing.
    """
    if unknown := [name for name in rows if name not in config.rows]:
        raise InputError(f"row {unknown[0]!r}: unknown; the configuration has {', '.join(config.rows)}")
    for row in config.rows.values():
        registry().find(BACKBONE.name, row.backbone)
    store = Store(config.data)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    run = _Run(config, store, tuple(rows or config.rows), deadline)
    with run.alone("settings"):
        _same_settings(config, run.identity)
    if not table_only:
        try:
            run.all()
        except _OutOfTimeError:
            click.echo("ablation: out of time; the same command goes on", err=True)
    return write_tables(config, store, run.protocol, run.identity, merge)


@dataclass
class _Run:
    """The work, part by part; each part returns at once where it is done."""

    config: AblationConfig
    store: Store
    names: tuple[str, ...]
    deadline: float | None
    _extractors: dict[str, Any] = field(default_factory=dict)

    def all(self) -> None:
        with self.alone("truth"):
            draw_truth(self.store, self.config.source, self.protocol, self.config.scoring.renderer)
        for seed in self.config.seeds:  # the first seed of every row before the second of any
            for name in self.names:
                row = self.config.rows[name]
                with self.alone(f"scores of {name}-{seed}"):
                    self.row_scores(name, row, seed)
                with self.alone(f"scores of vae {row.features}-{seed}"):
                    self.vae_scores(row.features, seed)

    @contextmanager
    def alone(self, part: str) -> Iterator[None]:
        """Other processes that come to the same part wait here until it is done; a dead one's lock is free."""
        left = -1.0 if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        file = self.config.out / "locks" / f"{part}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(file, timeout=left):
                yield
        except Timeout:
            raise _OutOfTimeError from None

    @cached_property
    def protocol(self) -> Protocol:
        """The protocol of the run folder, frozen by its first run."""
        path, scoring = self.config.out / "protocol.json", self.config.scoring
        with self.alone("protocol"):
            if not path.is_file():
                freeze_protocol(self.store, scoring.split, scoring.limit, scoring.size).write(path)
        return read_protocol(path)

    @cached_property
    def ids(self) -> list[str]:
        """Objects with all that is needed."""
        stages = ("render", "voxels")
        found = [r["id"] for r in self.store.objects() if all(self.store.path(s, r["id"]).is_file() for s in stages)]
        if not found:
            raise InputError(f"{self.store.root}: no object has the stages {' and '.join(stages)}; run `diff2to3 data`")
        return found

    @cached_property
    def identity(self) -> str:
        """Changes with what all rows have in common: settings, protocol and the objects trained on."""
        trained = sorted(set(self.ids) & {row["id"] for row in self.store.objects("train")})
        return settings_hash({"config": self.config.digest, "protocol": self.protocol.digest, "train": trained})

    def features(self, name: str) -> Store:
        """Data set with the features of an extractor."""
        with self.alone(f"features {name}"):
            folder = _linked(self.config.out / "data" / name, self.config.data, ("objects.csv", "render", "voxels"))
            lift, lifted = self.config.lift, folder.root / "lifted.json"
            if lifted.is_file():
                return folder
            self._begin(f"features {name}")
            choice = self.config.extractors[name]
            work, digest = load_lifting(choice, self.config.device, folder, lift, self.config.grid_size)
            failures = lift_objects(work, folder, self.ids, lift, digest, self.config.grid_size)
            _refuse(failures, f"features {name}")
            what = {"extractor": type(work.extractor).__name__, "channels": work.extractor.channels, "weights": digest}
            write_atomically(lifted, json.dumps(what).encode())
            return folder

    def vae(self, name: str, seed: int) -> Path:
        """Model folder of a trained 2to3-VAE that knows the statistics of its latents."""
        folder, data = self.config.out / "vae" / f"{name}-{seed}", self.features(name)
        channels = self._extractor(name).channels
        model = {"in_channels": channels, "grid_size": self.config.grid_size}
        self._train("vae", folder, data, seed, self.config.vae, model, {})
        return folder / "model"

    def latents(self, name: str, seed: int) -> Store:
        """Data set with the latents of that VAE."""
        vae, features = self.vae(name, seed), self.features(name)
        stages = ("objects.csv", "render", "voxels", "features")
        with self.alone(f"latents {name}-{seed}"):
            folder = _linked(self.config.out / "data" / f"{name}-{seed}", features.root, stages)
            if read_config(vae, SparseVAEConfig).latent_mean is not None:
                return folder
            self._begin(f"latents {name}, seed {seed}")
            work, digest = load_encoding(vae, self.config.device, folder)
            _refuse(encode_objects(work, folder, self.ids, digest), f"latents {name}")
            train_ids = {row["id"] for row in folder.objects("train")}
            mean, std = latent_statistics(folder, [i for i in self.ids if i in train_ids])
            update = {"latent_mean": tuple(mean), "latent_std": tuple(std)}
            config = read_config(vae, SparseVAEConfig).model_copy(update=update)
            write_atomically(vae / "config.json", config.model_dump_json(indent=1).encode())
            return folder

    def flow(self, name: str, row: Row, seed: int) -> Path:
        """Model folder of a trained flow."""
        folder, data = self.config.out / "flow" / f"{name}-{seed}", self.latents(row.features, seed)
        vae = self.vae(row.features, seed)
        model = {
            "name": row.backbone,
            **row.model,
            "latent_channels": read_config(vae, SparseVAEConfig).latent_channels,
            "condition_channels": self._token_channels(row.features),
            "grid_size": self.config.grid_size,
        }
        parts = {"features": self.config.extractors[row.features].source, "vae": vae}
        settings = self.config.flow | {"options": self.config.flow.get("options", {}) | {"frame": self.config.frame}}
        self._train("flow", folder, data, seed, settings, model, parts)
        return folder / "model"

    def vae_scores(self, name: str, seed: int) -> None:
        """Reconstruction at the stored views that were not lifted, if there are any (the paper's table 1)."""
        if self._has_result(f"vae {name}", seed):
            return
        vae_folder = self.vae(name, seed)
        self._begin(f"vae {name}, seed {seed}: scores")
        rows = {row["id"]: row for row in self.store.objects()}
        views = self.config.lift.num_views
        if len(self.store.read("render", self.protocol.ids[0])["view_pose"]) <= views:
            return
        scores = evaluate_reconstruction(
            self._extractor(name),
            self._vae_model(vae_folder),
            self.store,
            [rows[i] for i in self.protocol.ids],
            num_views=views,
            visibility=self.config.lift.visibility,
            lpips=self._lpips,
        )
        self._keep(f"vae {name}", seed, scores, {})

    def row_scores(self, name: str, row: Row, seed: int) -> None:
        """Generation from the protocol's pictures on the true voxels."""
        if self._has_result(name, seed):
            return
        flow = self.flow(name, row, seed)
        self._begin(f"{name}, seed {seed}: scores")
        scoring, vae = self.config.scoring, self._vae_model(self.vae(row.features, seed))
        backbone = load_backbone(flow, row.backbone)
        structure = KnownVoxels(self._token_channels(row.features), self.config.grid_size)
        components = {
            "matting": build(MATTING, "border"),
            "feature_extractor": self._extractor(row.features),
            "structure": structure,
            "backbone": backbone,
            "latent_decoder": vae.decoder,
            "renderer": build(RENDERER, "auto"),
        }
        config = PipelineConfig(
            name=name,
            frame=self.config.frame,
            roles={role: ComponentConfig(name=role) for role in components},
            sampler=SamplerConfig(steps=scoring.steps, guidance=scoring.guidance),
        )
        pipeline = Pipeline(config, components, device=self._place)
        scores = evaluate_generation(
            pipeline_maker(pipeline, seed=seed, known_voxels=structure),
            self.store,
            self.protocol,
            lpips=self._lpips,
            networks=self._networks,
            shown=scoring.shown,
        )
        count = sum(p.numel() for part in (backbone, vae) for p in part.parameters())
        self._keep(name, seed, scores, {"params": count / 1e6})

    def _train(
        self,
        stage: str,
        folder: Path,
        data: Store,
        seed: int,
        settings: Mapping[str, Any],
        model: Mapping[str, Any],
        parts: Mapping[str, Any],
    ) -> None:
        if given := _OWN & set(settings):
            raise InputError(f"{stage}: the ablation gives {', '.join(sorted(given))} itself; take it out")
        values = {
            **settings,
            "data": data.root,
            "out": folder,
            "seed": seed,
            "device": self.config.device,
            "model": {**settings.get("model", {}), **model},
            "parts": dict(parts),
        }
        try:
            config = TrainConfig.model_validate(values)
        except ValueError as error:
            raise InputError(f"{stage}: {' '.join(str(error).split())}") from error

        def on_step(step: int) -> None:
            every = config.checkpoint_every
            if every is not None and step % every == 0 and step < config.steps:
                self._check_time()

        with self.alone(f"{stage} {folder.name}"):
            if (folder / "model" / "config.json").is_file():
                return
            self._begin(f"{stage} {folder.name}")
            with redirect_stdout(sys.stderr):  # the table alone goes to stdout
                train(build_stage(stage, config), config, resume=True, on_step=on_step)

    def _begin(self, what: str) -> None:
        self._check_time()
        click.echo(f"ablation: {what}", err=True)

    def _check_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise _OutOfTimeError

    def _extractor(self, name: str) -> Any:
        """An extractor on the device; few of them, and small beside the rest."""
        if name not in self._extractors:
            self._extractors[name] = open_extractor(self.config.extractors[name]).to(self._place)  # type: ignore[attr-defined]
        return self._extractors[name]

    @torch.no_grad()
    def _token_channels(self, name: str) -> int:
        extractor = self._extractor(name)
        side = extractor.image_size // extractor.stride
        tokens = extractor.tokens(torch.zeros(1, extractor.channels, side, side, device=self._place))
        return int(tokens.shape[-1])

    @cached_property
    def _place(self) -> torch.device:
        return usable_device(self.config.device)

    def _vae_model(self, folder: Path) -> SparseVAE:
        return load_model(folder, SparseVAEConfig, SparseVAE).to(self._place).eval()

    @cached_property
    def _lpips(self) -> Any:
        if self.config.scoring.lpips is None:
            return None
        from gs_render.metrics import LPIPS

        model = LPIPS(self.config.scoring.lpips).to(self._place)
        return lambda image, target: model(image.to(self._place), target.to(self._place)).cpu()

    @cached_property
    def _networks(self) -> dict[str, Any]:
        return dict(open_networks(self.config.scoring.networks, self._place))

    def _has_result(self, name: str, seed: int) -> bool:
        return (self.config.out / "results" / f"{name}-{seed}.json").is_file()

    def _keep(self, name: str, seed: int, scores: Scores, more: dict[str, Any]) -> None:
        folder = self.config.out / "results"
        folder.mkdir(parents=True, exist_ok=True)
        made = {i: shown["made"] for i, shown in scores.pictures.items()}
        if made:
            np.savez_compressed(folder / f"{name}-{seed}.npz", **made)  # type: ignore[arg-type]
        result = {
            "name": name,
            "seed": seed,
            "identity": self.identity,
            "row": row_digest(self.config, name),
            "sets": scores.sets | more,
            "summary": summary(scores.objects),
            "objects": scores.objects,
        }
        write_atomically(folder / f"{name}-{seed}.json", json.dumps(result, indent=1).encode())


def _same_settings(config: AblationConfig, identity: str) -> None:
    """Keeps what a run folder was begun with, and refuses to go on with anything else."""
    path = config.out / "ablation.json"
    places: Any = dict.fromkeys(("data", "source", "out", "tables", "seeds", "device"), True)
    now = config.model_dump(mode="json", exclude=places | {"rows": {"__all__": {"marks"}}})
    if not path.is_file():
        write_atomically(path, json.dumps({"identity": identity, "config": now}, indent=1).encode())
        return
    before = json.loads(path.read_text())
    known = before["config"]
    changed = [key for key in now if key not in ("rows", "extractors", "scoring") and known.get(key) != now[key]]
    changed += [f"rows.{name}" for name, row in now["rows"].items() if known["rows"].get(name, row) != row]
    old, new = (AblationConfig.scored({**c["scoring"]}) for c in (known, now))
    changed += [f"scoring.{key}" for key in new if old.get(key) != new[key]]
    if changed or before["identity"] != identity:
        what = ", ".join(changed) or "the objects of the data set"
        raise InputError(f"{config.out} was begun with other settings ({what}); expected the same, or another out")


def _linked(folder: Path, source: Path, names: Sequence[str]) -> Store:
    """A data set folder that shares some of its files with another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        link, target = folder / name, os.path.relpath((source / name).resolve(), folder.resolve())
        if link.is_symlink() and os.readlink(link) != target:
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(target)
    return Store(folder)


def _refuse(failures: dict[str, str], what: str) -> None:
    if failures:
        name, reason = next(iter(failures.items()))
        raise InputError(f"{what}: {len(failures)} objects failed; {name}: {reason}")
