"""What every component promises, whatever its role."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from diff2to3._device import default_device
from diff2to3._plugins import Role, registry

#: Top-level modules that a manifest must not import.
HEAVY_MODULES = ("torch", "numpy", "diffusers", "transformers", "jax", "tensorflow")


class ComponentContract:
    """Checks for any role. A subclass for a role says how to run a component; yours gives the fixture `component`.

    Attributes:
        role: the role whose promises are checked.
        tolerance: largest difference allowed between a batch and single calls, relative to the largest value.
    """

    role: ClassVar[Role[Any]]
    tolerance: ClassVar[float] = 1e-4

    @pytest.fixture
    def component(self) -> Any:
        """The component to check, in its smallest configuration."""
        raise NotImplementedError("override the fixture `component` in your subclass of the contract")

    def run(self, component: Any, seeds: Sequence[int]) -> list[list[Tensor]]:
        """Outputs of the component for one made-up input a seed, processed as one batch: a list of tensors an input."""
        raise NotImplementedError

    def test_plays_its_role(self, component: Any) -> None:
        """It has every member that the role's protocol names."""
        assert self.role.missing(component) == []

    def test_deterministic(self, component: Any) -> None:
        """In eval mode the same input gives the same output, bit by bit, whatever came in between."""
        _eval(component)
        first = self.run(component, [1])
        self.run(component, [2])
        _assert_equal(self.run(component, [1]), first, "a second call with the same input gave another output")

    def test_batch_independent(self, component: Any) -> None:
        """An input gives the same output alone as in a batch."""
        _eval(component)
        together = self.run(component, [1, 2])
        assert len(together) == 2, f"2 inputs gave {len(together)} outputs"
        for seed, output in zip((1, 2), together, strict=True):
            [alone] = self.run(component, [seed])
            assert [t.shape for t in output] == [t.shape for t in alone], (
                "shapes differ between a batch and a single call"
            )
            for a, b in zip(output, alone, strict=True):
                scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
                error = float((a.double() - b.double()).abs().max()) / scale if b.numel() else 0.0
                assert error <= self.tolerance, f"a batch differs from a single call by {error:.2e} (relative)"

    def test_output_is_finite(self, component: Any) -> None:
        """No NaN or infinity comes out."""
        _eval(component)
        for output in self.run(component, [3]):
            assert all(bool(torch.isfinite(t.double()).all()) for t in output), "the output is not finite"

    def test_global_randomness_is_left_alone(self, component: Any) -> None:
        """It neither draws from the global generators nor seeds them."""
        _eval(component)
        before = torch.random.get_rng_state()
        self.run(component, [1])
        assert torch.equal(torch.random.get_rng_state(), before), "the global torch generator was used"

    def test_config_round_trip(self, component: Any) -> None:
        """Its config survives JSON, is frozen, and refuses unknown fields."""
        config = getattr(component, "config", None)
        if config is None:
            pytest.skip("the component has no config")
        assert isinstance(config, BaseModel), f"config is a {type(config).__name__}, expected a pydantic model"
        assert type(config).model_validate_json(config.model_dump_json()) == config, (
            "config changes in a JSON round trip"
        )
        assert config.model_config.get("frozen"), "config is not frozen"
        with pytest.raises(ValidationError):
            type(config).model_validate({**config.model_dump(), "a_field_that_nobody_has": 1})

    def test_weights_round_trip(self, component: Any) -> None:
        """Saved as safetensors and loaded into a new component of the same config, it gives the same output."""
        if not isinstance(component, nn.Module) or not component.state_dict():
            pytest.skip("the component has no weights")
        _eval(component)
        data = save_safetensors({name: t.contiguous() for name, t in component.state_dict().items()})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12345)
            fresh = type(component)(component.config)
        fresh.load_state_dict(load_safetensors(data), strict=True)
        _eval(fresh)
        message = "after a round trip through safetensors the output differs: some state is not in state_dict()"
        _assert_equal(self.run(fresh, [1]), self.run(component, [1]), message)

    def test_moves_as_a_whole(self, component: Any) -> None:
        """`to(device)` takes every tensor along; where there is a GPU it also runs there."""
        if not isinstance(component, nn.Module):
            pytest.skip("the component is no torch module")
        for path, module in component.named_modules():
            left = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
            assert not left, (
                f"{path or 'it'} holds tensors that to(device) leaves behind: {left}; register them as buffers"
            )
        if (gpu := default_device()).type != "cpu":
            _eval(component.to(gpu))
            assert all(t.device.type == gpu.type for output in self.run(component, [1]) for t in output)
            component.to("cpu")

    def test_manifest_is_light(self, component: Any) -> None:
        """The entry point that announces it imports nothing heavy and finishes quickly."""
        kind = type(component)
        owners = [
            c.distribution
            for c in registry().components
            if c.spec.role == self.role.name
            and c.spec.target.rpartition(":")[2] == kind.__name__
            and c.provided is None
        ]
        if not owners:
            pytest.skip(f"no installed distribution announces {kind.__name__}")
        check_manifest_is_light(owners[0])


def check_manifest_is_light(distribution: str) -> None:
    """Load a distribution's manifest in a new interpreter and fail if it imports a heavy module."""
    code = (
        "import sys; from importlib.metadata import distribution as d;"
        f"[e.load() for e in d({distribution!r}).entry_points if e.group == 'diff2to3'];"
        f"print([m for m in {HEAVY_MODULES!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"the manifest of {distribution} cannot be loaded: {result.stderr.strip()[-300:]}"
    assert result.stdout.strip() == "[]", f"the manifest of {distribution} imports {result.stdout.strip()}"


def generator(seed: int) -> torch.Generator:
    """A CPU generator of its own."""
    return torch.Generator().manual_seed(seed)


def device_of(component: Any) -> torch.device:
    """Where a component's tensors are."""
    if isinstance(component, nn.Module):
        for tensor in [*component.parameters(), *component.buffers()]:
            return tensor.device
    return torch.device("cpu")


def _eval(component: Any) -> None:
    if isinstance(component, nn.Module):
        component.eval()


def _assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]], message: str) -> None:
    assert len(found) == len(expected), message
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), message
