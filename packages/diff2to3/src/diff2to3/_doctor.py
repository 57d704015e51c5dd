"""What works on this machine, as a report of sections with entries."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from diff2to3._plugins import registry

PACKAGES = ("diff2to3", "marope", "smdit", "sparse-vae", "flux-features", "gs-render")
GIB = 2**30


def report() -> dict[str, dict[str, Any]]:
    """Sections of entries: versions, devices and memory, backends with reasons, pipelines and plugins."""
    broken = {f"{f.distribution} {f.version}": f.error for f in registry().failures}
    return {
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in PACKAGES},
            "memory": _memory(),
        },
        "torch": _torch(),
        **{f"{kind} backends": found for kind, found in _backends().items()},
        "pipelines": _pipelines(),
        "plugins": {"loaded": len(registry().components), **broken},
    }


def _memory() -> str:
    try:
        page, total, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on Windows; macOS does not say what is free
        return "unknown"
    return f"{page * total / GIB:.1f} GiB, {page * free / GIB:.1f} GiB free"


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "not built in",
    }
    if torch.backends.mps.is_available():
        facts["mps"] = "available"
    elif not torch.cuda.is_available():
        facts["device"] = "cpu only: no CUDA device is visible"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        facts[f"cuda:{index}"] = f"{name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    return facts


def _backends() -> dict[str, dict[str, str]]:
    import gs_render
    import marope
    import sparse_vae
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        **gs_render.backend_report(),
        **sparse_vae.backend_report(),
        "fused kernel": marope.kernel_backends(device),
    }
    return {
        kind: {name: "available" if reason is None else f"no: {reason}" for name, reason in status.items()}
        for kind, status in found.items()
    }


def _pipelines() -> dict[str, str]:
    from diff2to3._errors import PipelineFormatError
    from diff2to3._locate import EMBEDDED, embedded_names
    from diff2to3._store import read_config, weights_path

    found = {}
    for name in embedded_names():
        try:
            config = read_config(EMBEDDED / name)
        except PipelineFormatError as error:
            found[name] = f"broken: {error}"
            continue
        sizes = [weights_path(EMBEDDED / name, role) for role in config.roles]
        total = sum(path.stat().st_size for path in sizes if path.is_file())
        found[name] = f"embedded, {total / 1e6:.1f} MB of weights"
    return found or {"none": "this installation has no embedded pipeline"}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed" if distribution not in sys.modules else "unknown"
