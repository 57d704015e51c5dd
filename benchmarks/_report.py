"""Tables and reports of the scripts beside it, and the voxels that several of them use."""

from __future__ import annotations

from pathlib import Path

import torch


def shells(count: int, grid_size: int, thickness: float = 1.0, innermost: int = 4) -> torch.Tensor:
    """`count` voxels [count, 3] of concentric spherical shells, `thickness` thick and four apart, outermost first."""
    voxels = torch.cartesian_prod(*[torch.arange(grid_size)] * 3)
    distance = (voxels - (grid_size - 1) / 2).square().sum(dim=1).sqrt()
    radii = range(grid_size // 2 - 2, innermost, -4)
    rows = torch.cat([voxels[(distance - radius).abs() < thickness / 2] for radius in radii])
    if len(rows) < count:
        raise ValueError(f"a grid of {grid_size} holds {len(rows)} such voxels, not {count}")
    return rows[:count]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Report:
    """Parts of a report, printed and written as they come, so that a run that is cut leaves what it has measured."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.parts = out, []

    def add(self, part: str) -> None:
        print(part, end="\n\n", flush=True)
        self.parts.append(part)
        if self.out:
            self.out.write_text("\n\n".join(self.parts) + "\n")
