"""``python -m flux_features download ID``: fetch published weights into the Hub's cache, with consent where needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flux_features._config import FluxFeaturesConfig
from flux_features._dino_weights import FILES as DINO_FILES
from flux_features._hub import ask_on_terminal, hub_files
from flux_features._sources import preset_of
from flux_features._weights import hub_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused or impossible, with one line on stderr that says why."""
    parser = argparse.ArgumentParser(prog="python -m flux_features", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    download = commands.add_parser("download", help="fetch weights; asks before it downloads gated ones")
    download.add_argument("repository", help="Hub id, for example black-forest-labs/FLUX.1-schnell")
    download.add_argument("--preset", help="paper, flux2, taef1, taef2 or dino; needed for ids that are not well known")
    download.add_argument("--revision", help="Hub revision")
    download.add_argument("--accept-licence", action="store_true", help="agree to the licence without being asked")
    options = parser.parse_args(arguments)
    try:
        _download(options.repository, options.preset, options.revision, options.accept_licence)
    except (OSError, ValueError) as error:
        print(f"flux_features: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _download(repository: str, preset: str | None, revision: str | None, accepted: bool) -> None:
    preset = preset or preset_of(repository)
    files = DINO_FILES if preset == "dino" else hub_names(FluxFeaturesConfig.preset(preset or "paper"))
    for path in hub_files(repository, files, revision, accepted or ask_on_terminal):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
