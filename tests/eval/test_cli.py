"""What the evaluation says about the voxels it takes as the truth."""

import numpy as np
import pytest
from diff2to3.data._store import Store
from diff2to3.eval._cli import _say_rule


@pytest.mark.parametrize(
    ("rules", "embedded", "said", "warned"),
    [
        (["sampled"], True, "rule sampled\n", False),
        (["exact"], True, "rule exact\n", True),
        (["exact", "sampled"], True, "rule exact and sampled\n", True),
        (["exact"], False, "rule exact\n", False),
    ],
)
def test_the_rule_of_the_voxels_is_said(tmp_path, capsys, rules, embedded, said, warned):
    store = Store(tmp_path)
    for rule in rules:
        store.write("voxels", rule, {"coords": np.zeros((1, 3), np.uint8)}, {"grid_size": 32, "rule": rule})
    _say_rule(store, [{"id": rule} for rule in rules], embedded)
    error = capsys.readouterr().err
    assert said in error
    assert ("warning" in error) == warned
