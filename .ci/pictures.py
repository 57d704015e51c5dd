"""Draw docs/pictures: every example beside four views, a quarter turn apart, of what `tiny` makes of it.

diff2to3 generate examples/*.png -o OUT --format ply    # seed 0, the pipeline's own settings
python .ci/pictures.py OUT
"""

import sys
from pathlib import Path

from gs_render import contact_sheet, load, turntable_cameras
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIDE = 192
PAGES = {
    "mushroom": ["mushroom"],
    "results": ["house", "mushroom", "cake"],
    "failures": ["chair", "robot", "sailboat"],
}


def row(name: str, out: Path) -> Image.Image:
    splat = load(out / f"{name}.ply")
    views = contact_sheet(splat, turntable_cameras(4, SIDE, gaussians=splat))
    given = Image.open(ROOT / "examples" / f"{name}.png").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (SIDE + views.width, SIDE), "white")
    picture.paste(given, mask=given.getchannel("A"))
    picture.paste(views, (SIDE, 0))
    return picture


for page, names in PAGES.items():
    rows = [row(name, Path(sys.argv[1])) for name in names]
    picture = Image.new("RGB", (rows[0].width, SIDE * len(rows)), "white")
    for index, part in enumerate(rows):
        picture.paste(part, (0, SIDE * index))
    picture.save(ROOT / "docs" / "pictures" / f"{page}.webp", quality=82, method=6)
