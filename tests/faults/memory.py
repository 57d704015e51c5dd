"""Many generations in one process: does its memory grow?

    python tests/faults/memory.py                        # 1000 with the embedded pipeline, about 25 minutes
    python tests/faults/memory.py --count 200 --every 10

Prints resident memory as it goes; exit code 1 where it grows by more than 2 % once it is warm. One step a stage and
pictures of 128^2 keep it short; every object is also written, as ``generate`` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from diff2to3 import Pipeline
from measure import growth, resident
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--every", type=int, default=50, help="generations between two measurements")
    parser.add_argument("--pipeline", help="default: the embedded one")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = [Image.open(path).resize((128, 128)) for path in sorted(EXAMPLES.glob("*.png"))]
    pipeline = Pipeline.from_pretrained(options.pipeline, device=options.device)
    curve, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, options.count + 1):
            asset = pipeline(pictures[number % len(pictures)], seed=number % 7, steps=1)
            for suffix in ("ply", "spz", "html"):
                asset.save(Path(folder) / f"object.{suffix}")
            if number % options.every == 0:
                curve.append(resident())
                print(f"{number:5d} generations  {curve[-1]:8.1f} MB  {time.monotonic() - start:6.0f} s", flush=True)
    grown = growth(curve)
    print(f"growth after the first {options.every}: {100 * grown:+.2f} %, at most {100 * LIMIT:.0f} % wanted")
    return int(grown > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
