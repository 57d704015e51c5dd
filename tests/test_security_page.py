"""Every claim of docs/security.md names a test that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_named_test_exists(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_claim_has_one():
    rows = [line for line in PAGE.partition("## What holds")[2].splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not row.startswith("| claim")]
    assert len(claims) > 25
    assert not [row for row in claims if "::" not in row.split(" | ")[-1]]
