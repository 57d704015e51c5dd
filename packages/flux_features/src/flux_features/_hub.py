"""Files from the Hugging Face Hub: never without saying so, and after consent where the owner wants it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from _flux_features_weights import PUBLISHED

_log = logging.getLogger("flux_features")


class Terms(NamedTuple):
    """Licence of a repository's weights, and whether the Hub asks for consent to it."""

    licence: str
    gated: bool


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


def in_cache(repository: str, files: list[str], revision: str | None = None) -> bool:
    """Whether all the files were downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(repository, file, revision=revision), str) for file in files)


def announce(repository: str, terms: Terms, accept_licence: bool, remedy: str) -> None:
    """Say on the log (stderr, unless configured) what is downloaded and under which licence.

    Args:
        repository: Hub id.
        terms: as :func:`terms_of` found them.
        accept_licence: whether the caller agreed to the licence.
        remedy: what to do to agree; part of the error.

    Raises:
        PermissionError: the Hub asks for consent, and the caller did not give it.
    """
    page = f"https://huggingface.co/{repository}"
    if terms.gated and not accept_licence:
        raise PermissionError(
            f"{repository}: not downloaded, its owner asks for consent to the licence ({terms.licence}): "
            f"read and accept it at {page}, log in with 'hf auth login', then {remedy}"
        )
    _log.warning("downloading %s from the Hugging Face Hub; licence of the weights: %s", repository, terms.licence)


def hub_files(
    repository: str, files: list[str], revision: str | None, accept_licence: bool, remedy: str | None = None
) -> list[Path]:
    """Paths of files of a repository; what the local cache has is used as it is, without asking the Hub.

    Args:
        repository: Hub id.
        files: paths inside it.
        revision: Hub revision; None is its main branch, or what the cache holds of that.
        accept_licence: see :func:`announce`.
        remedy: see :func:`announce`; None names the ways of the FLUX autoencoders.

    Raises:
        PermissionError: the Hub asks for consent to a licence that was not given here, or not there.
        FileNotFoundError: there is no such repository or file.
        ConnectionError: the Hub cannot be reached.
    """
    cached = in_cache(repository, files, revision)
    if not cached:
        remedy = remedy or f"pass accept_licence=True, or run 'python -m flux_features download {repository}'"
        announce(repository, terms_of(repository, revision), accept_licence, remedy)
    return [_download(repository, file, revision, cached) for file in files]


def _download(repository: str, file: str, revision: str | None, cached: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=cached))
    except GatedRepoError as error:
        raise PermissionError(
            f"{repository}: its owner asks for consent to a licence: read and accept it at "
            f"https://huggingface.co/{repository}, then log in with 'hf auth login'"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{repository}: {file} is not in the local cache and the Hub cannot be reached: run "
            f"'hf download {repository}' when it can be, or name a directory that has the files"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"{repository}: cannot get {file} from the Hub ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
