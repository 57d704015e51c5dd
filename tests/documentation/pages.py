"""The pages of the documentation and their blocks of code. As a script: `python pages.py PAGE` runs a page's blocks.

Blocks run in the order of the page, in the current folder: `python` in one namespace, `sh` by bash, and of a `console`
transcript the commands, whose output must be the one printed but for its numbers. A block whose first line is a comment
with a path (`# folder/file.py`) is written to that file instead. A block that cannot run here says why in a comment of
its own before it, which readers of the page do not see; `WHY_NOT` lists all reasons there are:

    <!-- not run: network -->
"""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("packages/*/README.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
)
WHY_NOT = {
    "network": "downloads or installs something",
    "weights": "needs weights or a data set that are not part of the repository",
    "time": "takes longer than a test may",
    "waits": "serves or shows something until it is stopped",
    "source": "printed from the source by .ci/docs.py, which checks that",
    "program": "needs another program that runs",
    "elsewhere": "run by another test or by .ci/run",
}
_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, code, the line it begins at, and why it does not run ("" if it does)."""

    language: str
    code: str
    line: int
    why_not: str

    def commands(self) -> list[tuple[str, str]]:
        """Of `sh` and `console`: each command, continued lines joined, with the output printed below it."""
        if self.language == "console":
            parts = re.split(r"^\$ ", self.code, flags=re.M)[1:]
            return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]
        return [(line, "") for line in self.code.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["code"], text.count("\n", 0, m.start("code")), m["why"] or "")
        for m in _BLOCK.finditer(text)
    ]


def same_but_for_numbers(printed: str, got: str) -> bool:
    def plain(text: str) -> str:
        return re.sub(r"[\s-]+", " ", re.sub(r"\d[\d,]*(\.\d+)?", "0", text)).strip()

    return plain(printed) == plain(got)


def run(page: Path) -> None:
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.why_not:
            continue
        if file := re.match(r"# (\S+/\S+\.\w+)\n", block.code):
            Path(file[1]).write_text(block.code, encoding="utf-8")
            continue
        if block.language not in ("python", "sh", "console"):
            continue
        where = f"{page.relative_to(ROOT)}:{block.line}"
        start = time.perf_counter()
        print(f"{where}: {block.language}", flush=True)
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        elif block.language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        else:
            for command, printed in block.commands():
                bash = ["bash", "-euo", "pipefail", "-c", f"{command} 2>/dev/null"]
                got = subprocess.run(bash, check=True, stdout=subprocess.PIPE, text=True).stdout
                if not same_but_for_numbers(printed, got):
                    sys.exit(f"{where}: '$ {command}' printed\n{got}\nand not\n{printed}")
        print(f"  {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve())
