"""The registry: what it loads, what it survives, what it selects, and how it words a refusal."""

import json
import re
import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import diff2to3
import pytest
from diff2to3._errors import ComponentError, ComponentNotFoundError, DuplicateComponentError
from diff2to3._plugins import MATTING, METRIC, ROLES, ComponentSpec, Registry, build, check, hookimpl, registry
from pydantic import BaseModel, ConfigDict


class Distribution:
    def __init__(self, name, version):
        self.name, self.version = name, version


@pytest.fixture
def plugin(monkeypatch):
    """Makes an entry point of a made-up distribution whose manifest holds the given names."""

    def make(distribution, specs=None, version="1.0", **members):
        module = types.ModuleType(f"_{distribution.replace('-', '_')}_plugin")
        if specs is not None:

            @hookimpl
            def diff2to3_components():
                return specs

            module.diff2to3_components = diff2to3_components
        for name, member in members.items():
            setattr(module, name, member)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        entry_point = EntryPoint(name=distribution, value=module.__name__, group="diff2to3")
        vars(entry_point)["dist"] = Distribution(distribution, version)
        return entry_point

    return make


def cutter(name="cut", **changes):
    return ComponentSpec(**{"role": "matting", "name": name, "target": "tests_cut:Cut", **changes})


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    level: float = 0.5


class Cut:
    def __init__(self, config=None):
        self.config = config

    def __call__(self, image):
        return image


@pytest.fixture(autouse=True)
def target_module(monkeypatch):
    module = types.ModuleType("tests_cut")
    module.Cut, module.Config, module.not_callable = Cut, Config, object
    module.measure = lambda a, b: a - b
    monkeypatch.setitem(sys.modules, "tests_cut", module)
    module.__spec__ = types.SimpleNamespace(name="tests_cut")


def test_components_are_found_by_name(plugin):
    found = Registry([plugin("acme-cut", [cutter(), cutter("other")])])
    assert not found.failures
    assert found.find(MATTING, "cut").distribution == "acme-cut"
    assert found.find("matting", "acme-cut:other").spec.name == "other"
    assert found.find("matting", "Acme_Cut:other").spec.name == "other"  # as pip compares names


BROKEN = {
    "no hook": ({}, "no function diff2to3_components"),
    "misspelt hook": ({"diff2to3_component": hookimpl(lambda: [])}, "unknown hook"),
    "wrong argument": ({"diff2to3_components": hookimpl(lambda role: [])}, "role"),
    "raises": ({"diff2to3_components": hookimpl(lambda: 1 / 0)}, "ZeroDivisionError"),
    "not a list": ({"diff2to3_components": hookimpl(lambda: 42)}, "list of ComponentSpec"),
    "list of other things": ({"diff2to3_components": hookimpl(lambda: ["cut"])}, "list of ComponentSpec"),
    "unknown role": ({"diff2to3_components": hookimpl(lambda: [cutter(role="painter")])}, "unknown role 'painter'"),
    "other api": ({"diff2to3_components": hookimpl(lambda: [cutter(api=2)])}, "api 2"),
    "twice": ({"diff2to3_components": hookimpl(lambda: [cutter(), cutter()])}, "announced twice"),
    "exits": ({"diff2to3_components": hookimpl(lambda: sys.exit(3))}, "SystemExit"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_plugin_is_remembered_and_disturbs_nobody(plugin, kind):
    members, message = BROKEN[kind]
    first, last = plugin("a-good", [cutter("first")]), plugin("z-good", [cutter("last")])
    found = Registry([first, plugin("broken", None, "0.3", **members), last])
    assert [c.spec.name for c in found.components] == ["first", "last"]
    [failure] = found.failures
    assert (failure.distribution, failure.version) == ("broken", "0.3")
    assert re.search(message, failure.error)
    with pytest.raises(ComponentNotFoundError, match=r"failed to load: broken 0\.3"):
        found.find(MATTING, "cut")


def test_missing_module_is_a_failure_too():
    entry_point = EntryPoint(name="gone", value="a_module_that_nobody_has", group="diff2to3")
    [failure] = Registry([entry_point]).failures
    assert "a_module_that_nobody_has" in failure.error


def test_duplicates_name_both_and_can_be_chosen(plugin):
    found = Registry([plugin("one", [cutter()], "1.0"), plugin("two", [cutter()], "2.0")])
    with pytest.raises(DuplicateComponentError, match=r"one 1\.0 and two 2\.0.*'one:cut' or 'two:cut'"):
        found.find(MATTING, "cut")
    assert found.find(MATTING, "two:cut").version == "2.0"


def test_unknown_name_lists_what_there_is(plugin):
    lacking = cutter("fancy", requires=("a_module_that_nobody_has",), install="acme-cut[fancy]")
    found = Registry([plugin("acme-cut", [cutter(), lacking])])
    with pytest.raises(ComponentNotFoundError) as error:
        found.find(MATTING, "magic")
    message = str(error.value)
    assert "no matting named 'magic'" in message
    assert "available: cut (acme-cut 1.0)" in message
    assert "pip install 'acme-cut[fancy]'" in message
    assert "\n" not in message
    with pytest.raises(ComponentNotFoundError, match=r"not available.*a_module_that_nobody_has"):
        found.find(MATTING, "fancy")


def test_a_check_tells_what_the_machine_lacks(plugin):
    answers = {"fine": lambda: None, "lacking": lambda: "no driver", "broken": lambda: 1 / 0}
    specs = [cutter(name, check=f"_acme_cut_plugin:{name}") for name in answers]
    both = cutter("both", check="_acme_cut_plugin:lacking", requires=("a_module_that_nobody_has",))
    absent = cutter("absent", check="_acme_cut_plugin:absent")
    found = Registry([plugin("acme-cut", [*specs, both, absent], **answers)])
    reasons = {c.spec.name: c.unavailable_reason() for c in found.components}
    assert reasons["fine"] is None
    assert reasons["lacking"] == "no driver"
    assert reasons["broken"] == "its check _acme_cut_plugin:broken failed: ZeroDivisionError: division by zero"
    assert reasons["both"] == "needs the module a_module_that_nobody_has; no driver"
    assert "AttributeError" in reasons["absent"]
    with pytest.raises(ComponentNotFoundError, match="not available: no driver"):
        found.find(MATTING, "lacking")
    assert found.find(MATTING, "fine").spec.name == "fine"


def test_own_checks_name_libraries_and_versions(monkeypatch):
    import _diff2to3_plugin as manifest

    assert manifest._missing_libraries("libno-such-thing.so.1") == "needs the system library libno-such-thing.so.1"
    monkeypatch.setattr(manifest, "_missing_libraries", lambda *names: f"needs {', '.join(names)}")
    assert manifest.without_opengl() == (
        "needs libEGL.so.1, libGL.so.1 (Debian: apt install libegl1 libgl1 libgl1-mesa-dri)"
    )
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    assert "needs libGL.so.1, libSM.so.6" in manifest.without_blender()
    monkeypatch.setattr(sys, "version_info", (3, 12, 4))
    assert manifest.without_blender() == "bpy is for Python 3.11 and 3.13, this is 3.12"


def test_table_rows(plugin):
    lacking = cutter("fancy", requires=("a_module_that_nobody_has",))
    rows = Registry([plugin("acme-cut", [lacking, cutter()]), plugin("broken")]).table()
    assert [set(row) for row in rows] == [
        {"role", "name", "distribution", "version", "target", "available", "reason"}
    ] * 3
    assert [(row["name"], row["available"]) for row in rows] == [("cut", True), ("fancy", False), (None, False)]
    assert rows[0]["reason"] is None
    assert "a_module_that_nobody_has" in rows[1]["reason"]


def test_licences_of_weights_are_listed(plugin, monkeypatch):
    import diff2to3._cli._listing as listing
    from click.testing import CliRunner

    stated = cutter("trained", licence=(("large: acme/cut", "MIT"), ("huge: acme/cut-xl", "non-commercial")))
    found = Registry([plugin("acme-cut", [stated, cutter()])])
    monkeypatch.setattr(listing, "registry", lambda: found)
    rows = json.loads(CliRunner().invoke(listing.plugins, ["--json"]).output)
    assert [row.get("licence") for row in rows] == [
        None,
        {"large: acme/cut": "MIT", "huge: acme/cut-xl": "non-commercial"},
    ]
    text = CliRunner().invoke(listing.plugins).output
    assert re.search(r"matting trained +huge: acme/cut-xl +non-commercial\n", text)
    assert text.count("matting trained") == 2
    monkeypatch.setattr(listing, "registry", lambda: Registry([plugin("acme-cut", [cutter()])]))
    assert "LICENCE" not in CliRunner().invoke(listing.plugins).output


def test_own_extractors_state_every_licence():
    """Every source that the errors and the docs name; FLUX.1-dev's is not to be overlooked."""
    extractors = {
        c.spec.name: dict(c.spec.licence) for c in registry().components if c.spec.role == "feature_extractor"
    }
    assert extractors["dino"] == {
        "transformers: facebook/dinov2-with-registers-large": "Apache-2.0",
        "timm: timm/vit_large_patch14_reg4_dinov2.lvd142m": "Apache-2.0",
    }
    assert {weights.split(":")[0] for weights in extractors["flux"]} == {"tiny", "paper", "flux2", "taef1", "taef2"}
    assert "Non-Commercial" in extractors["flux"]["paper: black-forest-labs/FLUX.1-dev"]
    assert "asks first" in extractors["flux"]["paper: black-forest-labs/FLUX.1-dev"]


BAD_FIELDS = [
    {"name": "Cut"},
    {"name": "a:b"},
    {"name": ""},
    {"target": "tests_cut"},
    {"target": "a b:C"},
    {"target": None},
    {"config": "Config"},
    {"api": "1"},
    {"requires": ["a"]},
    {"check": "a_function"},
    {"check": ("a:b",)},
    {"weights": "none"},
    {"licence": "MIT"},
    {"licence": (("large", ""),)},
    {"licence": ("ab",)},
]


@pytest.mark.parametrize("change", BAD_FIELDS, ids=str)
def test_malformed_specs_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        cutter(**change)


def test_build_validates_config_and_role(plugin):
    specs = [
        cutter(config="tests_cut:Config"),
        cutter("plain"),
        cutter("wrong", target="tests_cut:not_callable"),
        cutter("gone", target="tests_cut:Gone"),
        ComponentSpec(role="metric", name="difference", target="tests_cut:measure"),
    ]
    source = Registry([plugin("acme-cut", specs)])
    assert build(MATTING, "cut", {"level": 0.25}, source=source).config == Config(level=0.25)
    assert build(MATTING, "cut", source=source).config == Config()
    assert build(METRIC, "difference", source=source)(3, 1) == 2
    for name, config, message in [
        ("cut", {"level": "high"}, r"config of matting 'cut': level: .*got 'high'"),
        ("cut", {"depth": 1}, "depth"),
        ("plain", {"level": 1}, "takes no config"),
        ("wrong", None, "lacks __call__"),
        ("gone", None, "cannot import 'tests_cut:Gone'"),
    ]:
        with pytest.raises(ComponentError, match=message):
            build(MATTING, name, config, source=source)


def test_register_in_this_process(monkeypatch):
    monkeypatch.setattr(registry(), "components", list(registry().components))
    diff2to3.register(Cut, role="matting", name="mine", config=Config)
    assert build(MATTING, "mine", {"level": 0.1}).config.level == 0.1
    instance = Cut()
    diff2to3.register(instance, role="matting", name="mine")  # again: the newer one counts
    assert build(MATTING, "mine") is instance
    assert build(MATTING, "in-process:mine") is instance
    with pytest.raises(ValueError, match="unknown role"):
        diff2to3.register(Cut, role="painter", name="mine")
    with pytest.raises(ComponentError, match="lacks"):
        diff2to3.register(object(), role="feature_extractor", name="mine")


def test_roles_know_their_members():
    assert ROLES["feature_extractor"].members == ("channels", "image_size", "stride", "tokens")
    assert ROLES["structure"].members == ("condition_channels", "grid_size", "sample")
    with pytest.raises(ComponentError, match=r"lacks channels, image_size, stride, tokens, __call__"):
        check(ROLES["feature_extractor"], object(), "nothing")


def test_listing_imports_no_stack():
    code = (
        "import sys; from diff2to3._plugins import registry; registry().table();"
        "heavy = {'torch', 'numpy', 'PIL', 'pydantic', 'diffusers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_installed_plugins_all_load():
    assert registry().failures == []
    for component in registry().components:
        if component.unavailable_reason() is None:
            from diff2to3._plugins import load_config_model, load_target

            load_target(component)
            load_config_model(component)
