"""``python -m flux_features download ID``: fetch published weights into the Hub's cache, with consent where needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from _flux_features_weights import PUBLISHED

from flux_features._config import FluxFeaturesConfig
from flux_features._hub import hub_files, terms_of
from flux_features._weights import hub_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 refused or impossible, with one line on stderr that says why."""
    parser = argparse.ArgumentParser(prog="python -m flux_features", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    download = commands.add_parser("download", help="fetch weights; asks before it downloads gated ones")
    download.add_argument("repository", help="Hub id, for example black-forest-labs/FLUX.1-schnell")
    download.add_argument("--preset", help="whose layout the weights have; needed for ids that are not well known")
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
    known = {entry.source: entry.preset for entry in PUBLISHED if entry.component == "flux"}
    preset = preset or known.get(repository)
    if preset is None:
        raise ValueError(f"{repository}: pass --preset; without it known are {', '.join(known)}")
    names = hub_names(FluxFeaturesConfig.preset(preset))
    terms = terms_of(repository, revision)
    print(f"{repository}: licence of the weights: {terms.licence}; https://huggingface.co/{repository}")
    if terms.gated and not accepted:
        if not sys.stdin.isatty():
            raise PermissionError(
                f"{repository}: not downloaded, its owner asks for consent to the licence ({terms.licence}): "
                f"read and accept it at https://huggingface.co/{repository}, then pass --accept-licence"
            )
        if _ask("Do you agree to this licence? [y/N] ") not in ("y", "yes"):
            raise PermissionError(f"{repository}: nothing was downloaded, the licence was not agreed to")
    for path in hub_files(repository, names, revision, accept_licence=True):
        print(path)


def _ask(question: str) -> str:
    try:
        return input(question).strip().lower()
    except EOFError:  # Ctrl-D: no answer
        print()
        return ""


if __name__ == "__main__":
    sys.exit(main())
