"""The audit of the pinned dependencies: clean now, and able to fail."""

import json
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AUDIT = runpy.run_path(str(ROOT / ".ci" / "audit.py"))
ADVISORIES = json.loads((ROOT / ".ci" / "advisories.json").read_text())["advisories"]


@pytest.fixture
def lock():
    return tomllib.loads((ROOT / "uv.lock").read_text())


def test_the_pinned_packages_are_clean(lock):
    assert AUDIT["problems"](lock, ADVISORIES) == []


def package(lock, name):
    return next(entry for entry in lock["package"] if entry["name"] == name)


@pytest.mark.parametrize(
    ("name", "version", "advisory"),
    [
        ("pillow", "10.2.0", "CVE-2024-28219"),
        ("torch", "2.5.1", "CVE-2025-32434"),
        ("protobuf", "5.29.1", "CVE-2025-4565"),
    ],
)
def test_a_known_version_is_found(lock, name, version, advisory):
    package(lock, name)["version"] = version
    assert any(advisory in line for line in AUDIT["problems"](lock, ADVISORIES))


@pytest.mark.parametrize(
    "source",
    [
        {"git": "https://example.org/pillow"},
        {"url": "https://example.org/a.whl"},
        {"registry": "http://pypi.org/simple"},
    ],
)
def test_other_sources_are_found(lock, source):
    package(lock, "pillow")["source"] = source
    [line] = AUDIT["problems"](lock, ADVISORIES)
    assert "pillow" in line
    assert "comes from" in line


def test_a_file_without_a_hash_is_found(lock):
    del package(lock, "pillow")["wheels"][0]["hash"]
    [line] = AUDIT["problems"](lock, ADVISORIES)
    assert "has no SHA-256" in line


def test_advisories_are_of_packages_in_use(lock):
    """What is no longer pinned goes from the list."""
    assert {advisory["package"] for advisory in ADVISORIES} <= {entry["name"] for entry in lock["package"]}
