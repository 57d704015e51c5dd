"""Results as JSON, as a Markdown table beside the paper's rows, and as one HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diff2to3.data._store import write_atomically
from diff2to3.eval._paper import (
    COLUMNS,
    GENERATION,
    GENERATION_COLUMNS,
    RECONSTRUCTION,
    RECONSTRUCTION_COLUMNS,
    Rows,
)
from diff2to3.eval._protocol import Protocol
from diff2to3.eval._scores import Scores, summary, table

Pictures = Mapping[str, Mapping[str, np.ndarray]]
Row = Mapping[str, str | float]
PAPER_NOTE = (
    "Rows of the paper are of 1,000 assets of Toys4k with its own cameras: other objects or another protocol give other"
    " figures, and FD grows as objects become fewer."
)
_STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right;vertical-align:top}"
    "td:first-child,th:first-child{text-align:left}img{height:160px;display:block}pre{white-space:pre-wrap}"
)


def paper_table(paper: Rows, own: Mapping[str, Row], columns: Sequence[str], marks: Sequence[str] = ()) -> str:
    """Markdown in the paper's layout: its rows, then ours.

    Args:
        own: figures by row and column; text stands as it is.
        columns: of the paper, in order; those that only our rows have follow.
        marks: columns of text before them, such as the ablation's ticks.
    """
    shown = [*columns, *(c for c in COLUMNS if c not in columns and any(c in row for row in own.values()))]
    lines = ["| Method | " + " | ".join([*marks, *(COLUMNS[c] for c in shown)]) + " |"]
    lines.append("|---" + "|:-:" * len(marks) + "|--:" * len(shown) + "|")
    for name, row in {f"{name} (paper)": row for name, row in paper.items()}.items():
        lines.append(_line(name, row, [*marks, *shown]))
    lines += [_line(name, row, [*marks, *shown]) for name, row in own.items()]
    return "\n".join(lines)


def _line(name: str, row: Row, columns: Sequence[str]) -> str:
    cells = [value if isinstance(value := row.get(c, ""), str) else f"{value:.5g}" for c in columns]
    return "| " + " | ".join([name.replace("|", "\\|"), *cells]) + " |"


def report_reconstruction(scores: Scores, settings: Mapping[str, Any], output: Path | None) -> str:
    """The tables of a reconstruction, written beside ``output`` if that is given; returns them."""
    means = {key: entry["mean"] for key, entry in summary(scores.objects).items()}
    own = {f"this ({len(scores.objects)} objects)": means}
    tables = [
        paper_table(RECONSTRUCTION, own, RECONSTRUCTION_COLUMNS),
        PAPER_NOTE,
        figures_table(scores.objects),
    ]
    if output is not None:
        results = {**settings, "summary": summary(scores.objects), "objects": scores.objects}
        write_report(output, "Reconstruction", tables, results, scores.pictures)
    return "\n\n".join(tables)


def report_generation(scores: Scores, settings: Mapping[str, Any], protocol: Protocol, output: Path | None) -> str:
    """The tables of a generation, written beside ``output`` if that is given; returns them."""
    name = str(settings.get("method") or settings.get("pipeline"))
    own = {f"{name} ({len(scores.objects)} objects)": scores.sets}
    tables = [paper_table(GENERATION, own, GENERATION_COLUMNS), PAPER_NOTE, figures_table(scores.objects)]
    if output is not None:
        results = {
            **settings,
            "sets": scores.sets,
            "summary": summary(scores.objects),
            "protocol": protocol.model_dump(mode="json"),
            "objects": scores.objects,
        }
        write_report(output, f"Generation: {name}", tables, results, scores.pictures)
    return "\n\n".join(tables)


def figures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means and medians of every figure, over all objects and over those whose row says that they have a texture."""
    textured = [row for row in rows if row["has_texture"] == "1"]
    return table(rows, {"has_texture = 1": textured} if textured else {})


def write_report(
    output: Path, title: str, tables: Sequence[str], results: Mapping[str, Any], pictures: Pictures
) -> None:
    """Writes ``output`` (JSON), and beside it the tables as ``.md`` and the page as ``.html``.

    Args:
        tables: Markdown.
        results: what the JSON file holds.
        pictures: by object and by what they show, uint8 [H, W, 3].
    """
    write_atomically(output, json.dumps(results, indent=1).encode())
    write_atomically(output.with_suffix(".md"), ("\n\n".join([f"# {title}", *tables]) + "\n").encode())
    settings = {name: value for name, value in results.items() if name != "objects"}
    page = html_page(title, tables, settings, pictures, {row["id"]: row for row in results.get("objects", ())})
    write_atomically(output.with_suffix(".html"), page.encode())


def html_page(
    title: str, tables: Sequence[str], settings: Mapping[str, Any], pictures: Pictures, rows: Mapping[str, Row]
) -> str:
    """One page that needs no other file; every text in it is escaped."""
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        *(_html_table(table) for table in tables),
    ]
    kinds = list(dict.fromkeys(kind for shown in pictures.values() for kind in shown))
    if kinds:
        head = "".join(f"<th>{html.escape(kind)}</th>" for kind in ["object", *kinds])
        body = "".join(_html_row(name, shown, kinds, rows.get(name, {})) for name, shown in pictures.items())
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
    parts.append(f"<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre></html>")
    return "\n".join(parts)


def _html_row(name: str, shown: Mapping[str, np.ndarray], kinds: Sequence[str], row: Row) -> str:
    figures = "<br>".join(
        f"{html.escape(key)} {row[key]:.4g}" for key in ("psnr", "novel psnr", "lpips", "f-score") if key in row
    )
    cells = "".join(f"<td>{_image(shown[kind], kind) if kind in shown else ''}</td>" for kind in kinds)
    return f"<tr><td>{html.escape(name)}<br>{figures}</td>{cells}</tr>"


def _image(picture: np.ndarray, kind: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(kind, quote=True)}' src='data:image/jpeg;base64,{data}'>"


def _html_table(markdown: str) -> str:
    """A Markdown table of this module; other text becomes a paragraph."""
    lines = markdown.splitlines()
    if not lines or not lines[0].startswith("|"):
        return f"<p>{html.escape(markdown)}</p>"
    cells = [[html.escape(c.strip()) for c in line.strip("|").replace("\\|", "&#124;").split("|")] for line in lines]
    cells = [[cell.replace("&amp;#124;", "&#124;") for cell in row] for row in cells]
    head = "".join(f"<th>{cell}</th>" for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[2:])
    return f"<table><tr>{head}</tr>{body}</table>"
