"""Pipelines on the Hugging Face Hub: down into its cache, up from a directory. Imports no PyTorch."""

from __future__ import annotations

from pathlib import Path

from diff2to3._errors import PipelineFormatError

_CARD = """---
library_name: diff2to3
pipeline_tag: image-to-3d
tags: [gaussian-splatting]
---

# {name}

{description}

```python
from diff2to3 import Pipeline

pipe = Pipeline.from_pretrained("{repository}")
pipe("chair.png").save("chair.ply")
```
"""


def download(repository: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The directory of a pipeline in the Hub's cache; what the cache lacks is fetched, with progress on stderr.

    Args:
        repository: ``"owner/name"``.
        revision: branch, tag or commit; None is the main branch.
        local_files_only: fetch nothing.

    Raises:
        PipelineFormatError: the Hub does not give it, or the cache lacks some of it and nothing may be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=["*.json", "*.safetensors", "*.md", "LICENSE*"],
            ignore_patterns=["*/*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        name = repository if revision is None else f"{repository} at revision {revision}"
        if local_files_only or isinstance(error.__cause__, OfflineModeIsEnabled):
            command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
            reason = f"the Hub's cache lacks it while downloads are off; run once with a network: {command}"
        else:
            reason = f"the Hub does not give it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise PipelineFormatError(f"{name!r} is no directory here, and {reason}") from error
    return Path(folder)


def commit_of(directory: Path) -> str | None:
    """The commit of a directory in the Hub's cache; None of any other."""
    return directory.name if directory.parent.name == "snapshots" else None


def upload(
    directory: Path, repository: str, *, revision: str | None, private: bool | None, message: str, token: str | None
) -> str:
    """Upload a pipeline directory in one commit and return that; see `Pipeline.push_to_hub`."""
    from huggingface_hub import HfApi

    from diff2to3._store import ENCODER, read_config, weights_path

    api, config = HfApi(token=token), read_config(directory)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
    if not api.file_exists(repository, "README.md", revision=revision):
        text = _CARD.format(name=config.name, description=config.description, repository=repository)
        (directory / "README.md").write_text(text, encoding="utf-8")
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=directory,
        revision=revision,
        commit_message=message,
        delete_patterns=[
            weights_path(Path(), part).name for part in (*config.roles, ENCODER)
        ],  # of an earlier pipeline
    )
    return commit.oid
