"""Licences of everything that an installation of diff2to3 uses, from the packages' own metadata."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def licenses(root: str = "diff2to3") -> list[tuple[str, str, str]]:
    """(name, version, licence) of a distribution and of all that it needs, by name.

    Of the root's extras those packages count that are installed. A package that states no licence has "not stated".
    """
    found: dict[str, Distribution] = {}
    waiting = [(root, frozenset(distribution(root).metadata.get_all("Provides-Extra") or ()))]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            package = found[name] = distribution(name)
        except PackageNotFoundError:  # of an extra that is not installed, or for another platform
            continue
        for text in package.requires or ():
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))
    return [(name, package.version, _license(package)) for name, package in sorted(found.items())]


def _license(package: Distribution) -> str:
    facts = package.metadata.json
    if expression := facts.get("license_expression"):
        return str(expression)
    classifiers = [c for c in facts.get("classifier", ()) if c.startswith("License :: ")]
    if classifiers:
        return ", ".join(c.rsplit(" :: ", 1)[-1] for c in classifiers)
    lines = str(facts.get("license", "")).strip().splitlines()  # some put the whole text there
    return lines[0][:80] if lines and lines[0] else "not stated"
