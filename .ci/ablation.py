"""Draw docs/pictures/ablation.webp and docs/figures/ablation.svg from the run folder of an ablation.

uv run --with matplotlib python .ci/ablation.py runs/ablation/run
"""

import base64
import io
import json
import re
import sys
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "ablation"  # the same bytes every time
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).resolve().parents[1] / "docs"
RUN = Path(sys.argv[1])
ROWS = {"Exp 1": "C7", "Exp 2": "C1", "Exp 3": "C2", "Exp 4": "C0"}
SIDE, VIEWS, OBJECTS, MARGIN = 112, 2, 5, 20


def curves() -> None:
    """Validation loss of every flow; a seed a line. Exp 1's latents are another VAE's: its level says nothing."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for row, color in ROWS.items():
        for seed, style in enumerate(("-", "--")):
            log = RUN / "flow" / f"{row}-{seed}" / "log.jsonl"
            lines = [line for line in map(json.loads, log.read_text().splitlines()) if "val_loss" in line]
            steps, losses = ([line[key] for line in lines] for key in ("step", "val_loss"))
            axes.plot(steps, losses, style, color=color, label=row if seed == 0 else None)
    axes.set(xlabel="step", ylabel="validation loss", yscale="log")
    axes.legend()
    figure.savefig(DOCS / "figures" / "ablation.svg", metadata={"Date": None})


def sheet() -> None:
    """Input, then the first of the four views around each object: the truth and every row's first seed."""
    rows = re.findall(r"<tr><td>[^<]*<br></td>(.*?)</tr>", (RUN / "index.html").read_text())[:OBJECTS]
    shown = [re.findall(r"<img alt='([^']*)' src='data:image/jpeg;base64,([^']*)'", row) for row in rows]
    font, left, kinds = ImageFont.load_default(11), 0, [kind for kind, _ in shown[0]]
    picture = Image.new("RGB", (SIDE * (1 + VIEWS * (len(kinds) - 1)), MARGIN + SIDE * len(rows)), "white")
    for kind in kinds:
        wide = 1 if kind == "input" else VIEWS
        ImageDraw.Draw(picture).text((left + 4, 3), kind, "black", font)
        for index, row in enumerate(shown):
            strip = Image.open(io.BytesIO(base64.b64decode(dict(row)[kind])))
            part = strip.crop((0, 0, strip.height * wide, strip.height))
            picture.paste(part.resize((SIDE * wide, SIDE), Image.Resampling.LANCZOS), (left, MARGIN + SIDE * index))
        left += SIDE * wide
    picture.save(DOCS / "pictures" / "ablation.webp", quality=82, method=6)


curves()
sheet()
