"""Files from the Hugging Face Hub: never without saying so, and after consent where the owner wants it."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from _flux_features_weights import PUBLISHED

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.safetensors)")  # a missing file is no repository

_log = logging.getLogger("flux_features")


class Terms(NamedTuple):
    """Licence of a repository's weights, and whether the Hub asks for consent to it."""

    licence: str
    gated: bool


#: Agreement to the licence of a gated repository: yes or no, or a function of its id and terms that is asked then.
Consent = bool | Callable[[str, Terms], bool]


def ask_on_terminal(repository: str, terms: Terms) -> bool:
    """Consent by the person at the terminal; where there is none, no."""
    if not sys.stdin.isatty():
        return False
    print(f"{repository}: licence of the weights: {terms.licence}; {_page(repository)}", file=sys.stderr)
    try:
        print("Do you agree to this licence? [y/N] ", end="", file=sys.stderr, flush=True)
        return input().strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D: no answer
        print(file=sys.stderr)
        return False


def terms_of(repository: str, revision: str | None = None) -> Terms:
    """What the weights of a Hub repository may be used for: of known ones by heart, of others as the Hub says.

    Raises:
        FileNotFoundError: the Hub has no such repository, or refuses to show it.
        ConnectionError: the Hub cannot be asked.
    """
    for entry in PUBLISHED:
        if entry.source == repository:
            return Terms(entry.licence, entry.gated)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository, revision=revision)
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{repository}: the Hub does not show it ({_first_line(error)})") from error
    except Exception as error:  # errors of the connection belong to httpx or to requests, by version of the client
        raise ConnectionError(
            f"{repository}: no such directory here, and the Hub cannot be asked for its licence ({_first_line(error)})"
        ) from error
    card = info.card_data
    stated = card and (card.get("license_name") or card.get("license"))
    return Terms(str(stated or "none stated"), bool(info.gated))


def cached_files(repository: str, files: list[str], revision: str | None = None) -> list[Path]:
    """Paths of files that were downloaded before; empty unless all were."""
    from huggingface_hub import try_to_load_from_cache

    if not HUB_ID.fullmatch(repository):
        return []
    found = [try_to_load_from_cache(repository, file, revision=revision) for file in files]
    return [Path(path) for path in found if isinstance(path, str)] if all(isinstance(p, str) for p in found) else []


def hub_files(repository: str, files: list[str], revision: str | None, accept_licence: Consent) -> list[Path]:
    """Paths of files of a repository; what the local cache has is used as it is, without asking the Hub.

    Anything else is downloaded, with a line on the log (stderr, unless configured) that names the licence.

    Args:
        repository: Hub id.
        files: paths inside it.
        revision: Hub revision; None is its main branch, or what the cache holds of that.
        accept_licence: for gated repositories.

    Raises:
        PermissionError: the Hub asks for consent to a licence that was not given here, or not there.
        FileNotFoundError: that is no Hub id, or there is no such repository or file.
        ConnectionError: the Hub cannot be reached.
    """
    if not HUB_ID.fullmatch(repository):
        raise FileNotFoundError(f"{repository}: no such file or directory, and not a Hub id such as 'owner/name'")
    if cached := cached_files(repository, files, revision):
        return cached
    terms = terms_of(repository, revision)
    if terms.gated and not (accept_licence(repository, terms) if callable(accept_licence) else accept_licence):
        raise PermissionError(
            f"{repository}: not downloaded, its owner asks for consent to the licence ({terms.licence}): read and "
            f"accept it at {_page(repository)}, log in with 'hf auth login', then pass accept_licence=True "
            "(--accept-licence on a command line)"
        )
    _log.warning("downloading %s from the Hugging Face Hub; licence of the weights: %s", repository, terms.licence)
    return [_download(repository, file, revision) for file in files]


def _download(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except GatedRepoError as error:
        raise PermissionError(
            f"{repository}: its owner asks for consent to a licence: read and accept it at "
            f"{_page(repository)}, then log in with 'hf auth login'"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{repository}: {file} is not in the local cache and the Hub cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{repository}: cannot get {file} from the Hub ({_first_line(error)})") from error


def _page(repository: str) -> str:
    return f"https://huggingface.co/{repository}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
