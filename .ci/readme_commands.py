"""Print the commands of the first shell block of README.md, one a line, as a reader would type them."""

import re
import sys
from pathlib import Path

readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
block = re.search(r"^```sh\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
if block is None:
    sys.exit("README.md has no ```sh block")
print(block.group(1).strip())
