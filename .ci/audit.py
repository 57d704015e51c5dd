"""Audit the dependencies that uv.lock pins, first without a network, then with pip-audit where its service answers.

python .ci/audit.py            what can be said from the repository alone
python .ci/audit.py --online   that, and pip-audit over every package of every extra

From the repository: each package comes from the package index over https or is of this workspace, every file of it has
a SHA-256, and no version is one of `.ci/advisories.json`, which is kept by hand and knows what its date says. Online:
all that the index's advisories know. Where they cannot be asked this is said and is no failure; what they find is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
INDEX = "https://pypi.org/simple"


def problems(lock: dict[str, Any], advisories: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the pinned packages, a line each."""
    found = []
    for package in lock["package"]:
        label, source = f"{package['name']} {package.get('version', '')}".strip(), package["source"]
        if not source.keys() & {"editable", "virtual"} and source.get("registry") != INDEX:
            found.append(f"{label} comes from {source}, not from {INDEX}")
        for file in (*package.get("wheels", ()), *filter(None, [package.get("sdist")])):
            if not str(file.get("hash", "")).startswith("sha256:"):
                found.append(f"{label}: {file.get('url')} has no SHA-256")
        for advisory in advisories:
            if advisory["package"] == package["name"] and any(
                SpecifierSet(versions).contains(package["version"], prereleases=True)
                for versions in advisory["affected"]
            ):
                found.append(f"{label}: {advisory['id']}: {advisory['what']} (affected: {advisory['affected']})")
    return found


def ask_index() -> tuple[list[str], str]:
    """Vulnerabilities that pip-audit knows of, and what could not be asked."""
    export = ["uv", "export", "--frozen", "--quiet", "--no-hashes", "--no-emit-workspace", "--all-extras"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
        pinned.write(subprocess.run(export, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        pinned.flush()
        command = ["uvx", "pip-audit", "-r", pinned.name, "--no-deps", "--disable-pip", "--format", "json"]
        result = subprocess.run([*command, "--timeout", "15"], cwd=ROOT, capture_output=True, text=True)
    try:
        packages = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        return [], (result.stderr.strip().splitlines() or ["pip-audit gave no answer"])[-1][:200]
    found = [
        f"{package['name']} {package['version']}: {known['id']} (fixed in {', '.join(known['fix_versions']) or 'none'})"
        for package in packages
        for known in package.get("vulns", ())
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    return found, f"{len(skipped)} of {len(packages)} packages could not be asked about" if skipped else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--online", action="store_true", help="ask the advisories of the index as well")
    parser.add_argument("--lock", type=Path, default=ROOT / "uv.lock")
    options = parser.parse_args()
    lock = tomllib.loads(options.lock.read_text(encoding="utf-8"))
    known = json.loads((ROOT / ".ci" / "advisories.json").read_text(encoding="utf-8"))
    found = problems(lock, known["advisories"])
    checked = (
        f"{len(lock['package'])} packages against {len(known['advisories'])} advisories up to {known['known_until']}"
    )
    if options.online:
        more, unasked = ask_index()
        found += more
        checked += f"; NOT CHECKED online: {unasked}" if unasked else "; pip-audit asked about all"
    print(f"audit: {checked}")
    for line in found:
        print(f"audit: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
