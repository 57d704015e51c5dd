"""`diff2to3 doctor`: its report, the self test that can fail, licences."""

import dataclasses
import json
import math

import pytest
from click.testing import CliRunner
from diff2to3 import _self_test
from diff2to3._cli import cli
from diff2to3._licenses import licenses
from diff2to3._self_test import Check


def doctor(*arguments):
    return CliRunner().invoke(cli, ["doctor", *arguments])


def test_says_what_works():
    report = json.loads(doctor("--json", "--no-test").stdout)
    assert report["render backends"]["torch"] == "available"
    assert report["fused kernel backends"]["torch"] == "available"
    assert report["plugins"] == {"loaded": report["plugins"]["loaded"]}
    assert "GiB" in report["system"]["memory"]
    assert {"system", "torch", "pipelines"} <= set(report)
    assert "self test" not in report


def test_self_test_gives_the_stored_numbers():
    """After other weights were embedded: python -m diff2to3._self_test > .../diff2to3/_self_test.json"""
    checks = list(_self_test.self_test("cpu"))
    assert [check.name for check in checks] == ["features", "flow", "structure", "gaussians", "picture"]
    for check in checks:
        assert check.error < 1e-4, check


def test_a_wrong_part_is_named_and_is_a_fault(monkeypatch):
    good = Check("flow", (0.1, 1.0), (0.1, 1.0), 0.1)
    wrong = dataclasses.replace(good, name="picture", values=(0.2, 1.0))
    monkeypatch.setattr(_self_test, "self_test", lambda device: iter([good, wrong]))
    result = doctor()
    assert result.exit_code == 1
    assert "flow: ok" in result.output
    assert "picture: WRONG" in result.output
    assert doctor("--json").exit_code == 1


@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 1.0), (0.1,), ()])
def test_a_missing_or_infinite_figure_is_wrong(values):
    assert not Check("flow", values, (0.1, 1.0), 0.1).passed


def test_licenses_of_all_that_is_needed():
    rows = {name: licence for name, _, licence in licenses()}
    assert rows["diff2to3"] == rows["marope"] == "Apache-2.0"
    assert {"torch", "numpy", "pydantic", "pillow"} <= set(rows)
    assert all(rows.values())
    listed = json.loads(doctor("--licenses", "--json").stdout)
    assert {row["name"] for row in listed} == set(rows)
    assert "numpy" in doctor("--licenses").stdout


def test_a_package_without_a_licence_and_one_that_is_not_installed(tmp_path, monkeypatch):
    info = tmp_path / "acme_thing-1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: acme-thing", "Version: 1.0", "Requires-Dist: no-such-thing", ""]
    (info / "METADATA").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert licenses("acme-thing") == [("acme-thing", "1.0", "not stated")]
