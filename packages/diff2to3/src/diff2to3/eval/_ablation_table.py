"""The ablation's table: means over seeds with their spread, beside the paper's rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diff2to3._errors import InputError
from diff2to3.data._store import Store, write_atomically
from diff2to3.eval._ablation_config import AblationConfig, row_digest
from diff2to3.eval._paper import ABLATION, GENERATION_COLUMNS, RECONSTRUCTION, RECONSTRUCTION_COLUMNS
from diff2to3.eval._protocol import Protocol
from diff2to3.eval._report import PAPER_NOTE, html_page, paper_table
from diff2to3.eval._scores import as_strip
from diff2to3.eval._truth import read_truth

MARKS = ("2to3-VAE", "SMDiT", "MARoPE")
_FIGURES = (
    "psnr",
    "psnr_foreground",
    "ssim",
    "lpips",
    "novel psnr",
    "novel psnr_foreground",
    "novel ssim",
    "novel lpips",
)
_COMPARED = ("psnr", "psnr_foreground", "ssim", "lpips", "novel psnr", "novel lpips")
_PAIRS_NOTE = (
    "Differences object by object, each object's figure being its mean over the seeds that both rows have: their mean"
    " and its 95 % interval (bootstrap over objects). An interval that holds 0 does not say which row is better."
)
_NOTE = (
    "Mean and standard deviation over the seeds. All rows: the same objects, input pictures, true voxels, seeds, steps"
    " and batch sizes. Features: {features}."
)


def write_tables(config: AblationConfig, store: Store, protocol: Protocol, identity: str, merge: Sequence[Path]) -> str:
    """Writes ``table.md``, ``results.json`` and ``index.html`` of all results; returns the tables."""
    results = _collect(config, identity, merge)
    names = {name: f"{name} ({len(results.get(name, {}))} seeds)" for name in config.rows}
    rows: dict[str, dict[str, Any]] = {}
    for name, row in config.rows.items():
        found = list(results.get(name, {}).values())
        rows[names[name]] = dict(zip(MARKS, row.marks, strict=False)) | _spread([r["sets"] for r in found])
    extractors = [name for name in config.extractors if any(row.features == name for row in config.rows.values())]
    used = "; ".join(f"{name} are {_extractor(config, name)}" for name in extractors)
    figures = _figures("generation", {names[n]: list(results.get(n, {}).values()) for n in config.rows}, _FIGURES)
    beside_paper = any(row.marks for row in config.rows.values())  # a study of something else stands alone
    columns = GENERATION_COLUMNS[:-1] if beside_paper else ()
    tables = [
        paper_table(ABLATION if beside_paper else {}, rows, columns, MARKS if beside_paper else ()),
        _NOTE.format(features=used),
        *[PAPER_NOTE] * beside_paper,
        figures,
    ]
    names_before = dict(zip(tuple(config.rows)[1:], config.rows, strict=False))  # the paper adds one part at a time
    pairs = _pairs(results, names_before if beside_paper else dict.fromkeys(names_before, next(iter(config.rows))))
    tables += [pairs, _PAIRS_NOTE] if pairs else []
    vaes = {f"VAE of {n} features": list(results.get(f"vae {n}", {}).values()) for n in extractors}
    if any(vaes.values()):
        own = {n: _spread([_means(r) for r in found]) for n, found in vaes.items()}
        paper = RECONSTRUCTION if beside_paper else {}
        tables.append(paper_table(paper, own, RECONSTRUCTION_COLUMNS))
    everything = [result for seeds in results.values() for result in seeds.values()]
    folder = config.out / config.tables
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(everything, indent=1).encode())
    write_atomically(folder / "table.md", ("\n\n".join(["# Ablation", *tables]) + "\n").encode())
    settings = config.model_dump(mode="json", exclude={"data", "source", "out", "tables"})
    page = html_page("Ablation", tables, settings, _pictures(config, store, protocol), {})
    write_atomically(folder / "index.html", page.encode())
    return "\n\n".join(tables)


def _extractor(config: AblationConfig, name: str) -> str:
    """What made features of that name, by what was lifted."""
    path = config.out / "data" / name / "lifted.json"
    if not path.is_file():
        return "not lifted yet"
    lifted = json.loads(path.read_text())
    return f"{lifted['extractor']}' {lifted['channels']} channels"


def _collect(config: AblationConfig, identity: str, merge: Sequence[Path]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results by row and seed, of the run folder and of those that join it."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for folder in (*merge, config.out):
        files = sorted((folder / "results").glob("*.json"))
        if folder in merge and not files:
            raise InputError(f"--merge {folder}: no results there; expected the run folder of an ablation")
        for file in files:
            try:
                result = json.loads(file.read_text())
                name, seed, row, settings = result["name"], int(result["seed"]), result["row"], result["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file}: not the result of an ablation ({error})") from error
            if settings != identity or (name in config.rows and row != row_digest(config, name)):
                raise InputError(f"{file}: of other settings, objects or cameras than {config.out}; cannot be merged")
            if not row or name in config.rows:  # others are of a configuration that shares the run folder
                found.setdefault(name, {})[seed] = result
    return found


def _means(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: entry["mean"] for key, entry in result["summary"].items()}


def _spread(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """``mean ± deviation`` of every figure that all rows have; the number of parameters alone."""
    cells: dict[str, Any] = {}
    for key in (k for k in (rows[0] if rows else ()) if all(k in row for row in rows)):
        values = np.array([row[key] for row in rows], np.float64)
        spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 and key != "params" else ""
        cells[key] = f"{values.mean():.4g}{spread}"
    return cells


def _figures(title: str, results: Mapping[str, Sequence[Mapping[str, Any]]], figures: Sequence[str]) -> str:
    """Markdown: a line a row of the table, a column a figure that any of them has."""
    cells = {name: _spread([_means(r) for r in found]) for name, found in results.items()}
    shown = [key for key in figures if any(key in row for row in cells.values())]
    lines = [f"| {title} | " + " | ".join(shown) + " |", "|---" + "|--:" * len(shown) + "|"]
    lines += [f"| {name} | " + " | ".join(row.get(key, "") for key in shown) + " |" for name, row in cells.items()]
    return "\n".join(lines)


def _pairs(results: Mapping[str, Mapping[int, Mapping[str, Any]]], against: Mapping[str, str]) -> str:
    """Markdown: a line for every row that shares seeds with the one it is compared with; empty without any."""
    lines = []
    for name, base in against.items():
        seeds = sorted(set(results.get(name, {})) & set(results.get(base, {})))
        if seeds:
            one, other = ([results[row][seed]["objects"] for seed in seeds] for row in (name, base))
            cells = (_difference(one, other, key) for key in _COMPARED)
            lines.append(f"| {name} less {base} | " + " | ".join(cells) + " |")
    head = ["| difference | " + " | ".join(_COMPARED) + " |", "|---" + "|--:" * len(_COMPARED) + "|"]
    return "\n".join(head + lines) if lines else ""


def _difference(one: Sequence[Any], other: Sequence[Any], key: str) -> str:
    """``mean [low, high]`` of a figure's differences; `one` and `other` hold the objects of each seed, in one order."""
    if not all(key in entry for objects in (*one, *other) for entry in objects):
        return ""
    first, second = (np.array([[entry[key] for entry in objects] for objects in rows]).mean(0) for rows in (one, other))
    gaps = first - second
    chosen = np.random.default_rng(0).integers(len(gaps), size=(2000, len(gaps)))
    low, high = np.percentile(gaps[chosen].mean(1), [2.5, 97.5])
    return f"{gaps.mean():+.3g} [{low:+.2g}, {high:+.2g}]"


def _pictures(config: AblationConfig, store: Store, protocol: Protocol) -> dict[str, dict[str, np.ndarray]]:
    """Input, truth and every row's first seed, of the objects whose pictures were kept."""
    made = {name: dict(_kept(config, name)) for name in config.rows}
    rows = {row["id"]: row for row in store.objects()}
    pictures = {}
    for entry in protocol.objects:
        if any(entry.id in kept for kept in made.values()):
            truth = read_truth(store, protocol, entry, rows[entry.id])
            pictures[entry.id] = {"input": truth.seen(protocol.size), "truth": as_strip(truth.views)} | {
                name: kept[entry.id] for name, kept in made.items() if entry.id in kept
            }
    return pictures


def _kept(config: AblationConfig, name: str) -> Iterator[tuple[str, np.ndarray]]:
    for seed in config.seeds:
        path = config.out / "results" / f"{name}-{seed}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                yield from ((key, file[key]) for key in file.files)
            return
