"""Importing does nothing observable: no output, no environment read, no optional or heavy module, and it is quick."""

import subprocess
import sys
import time

import pytest

PACKAGES = ["marope", "gs_render", "flux_features", "sparse_vae", "smdit", "diff2to3"]
OPTIONAL = ("gsplat", "spconv", "spconv_triton", "xformers", "numba", "av", "moderngl", "trimesh", "accelerate")
OPTIONAL += ("tensorboard", "rembg", "transformers", "gradio")


def run(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_silent_and_imports_nothing_optional(package):
    code = f"""
import os, sys, random, importlib.util
import torch, pydantic, jaxtyping
if {package!r} == "flux_features": import diffusers
folder = os.path.dirname(importlib.util.find_spec({package!r}).origin)
before = dict(os.environ), torch.random.get_rng_state(), torch.get_num_threads(), random.getstate()
asked = []
class Watched(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.endswith(("os.py", "<frozen os>", "_collections_abc.py")): frame = frame.f_back
        if frame.f_code.co_filename.startswith(folder): asked.append(key)
        return super().__getitem__(key)
os.environ.__class__ = Watched
import {package}
names = [name for name in getattr({package}, "__all__", dir({package})) if not name.startswith("_")]
for name in names: getattr({package}, name)
os.environ.__class__ = Watched.__base__
assert not asked, ("environment variables were read", asked)
assert dict(os.environ) == before[0], "the environment was changed"
assert torch.equal(torch.random.get_rng_state(), before[1]), "the global generator was used"
assert torch.get_num_threads() == before[2] and random.getstate() == before[3]
assert not torch.cuda.is_initialized()
loaded = [m for m in {OPTIONAL!r} if m in sys.modules]
assert not loaded, loaded
"""
    result = run(code)
    assert result.stdout == ""
    assert result.stderr == ""


def test_diff2to3_imports_no_torch():
    heavy = {"torch", "numpy", "PIL", "pydantic", "pluggy"}
    run(f"import sys, diff2to3; found = {heavy!r} & set(sys.modules); assert not found, found")


def test_help_imports_no_torch():
    code = (
        "import sys; sys.argv = ['diff2to3', '--help']\n"
        "from diff2to3._cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    run(code)


@pytest.mark.parametrize(("code", "limit"), [("import diff2to3", 0.3), ("from diff2to3._cli import cli", 0.5)])
def test_import_is_quick(code, limit):
    """The best of five runs, less what the bare interpreter takes, stays within the limit."""

    def best(code):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run(code)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(code) - best("pass") < limit


def test_help_of_the_app_imports_no_gradio():
    code = (
        "import sys; sys.argv = ['diff2to3', 'app', '--help']\n"
        "from diff2to3._cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'gradio'} & set(sys.modules)"
    )
    run(code)


def test_public_names_exist():
    import diff2to3

    for name in diff2to3.__all__:
        assert getattr(diff2to3, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = diff2to3.nonsense
    assert set(diff2to3.__all__) <= set(dir(diff2to3))
