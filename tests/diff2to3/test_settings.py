"""Settings files: what stands in one, what in its base, and what overrides say."""

import pytest
from diff2to3._errors import InputError
from diff2to3._settings import load_settings
from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: int = 0
    rate: float = 0.0
    model: dict[str, int] = {}


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_base_stands_for_what_is_missing(tmp_path):
    whole = "steps: 5\nrate: 0.5\nmodel: {a: 1, b: 2}\n"
    write(tmp_path, whole=whole, mine="base: whole.yaml\nsteps: 7\nmodel: {a: 3}\n")
    settings = load_settings(tmp_path / "mine.yaml", ["rate=0.25", "model.c=4"], Options)
    assert settings == Options(steps=7, rate=0.25, model={"a": 3, "c": 4})


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("other.yaml", "other.yaml: not a readable YAML file"),
        ("../whole.yaml", "expected the name of a file in the same folder"),
        ("[whole.yaml]", "expected the name of a file in the same folder"),
        ("second.yaml", r"base: Extra inputs are not permitted"),
    ],
)
def test_bases_that_are_none(tmp_path, base, reason):
    write(tmp_path, whole="steps: 5", second="base: whole.yaml", mine=f"base: {base}\nsteps: 7\n")
    with pytest.raises(InputError, match=reason):
        load_settings(tmp_path / "mine.yaml", (), Options)
