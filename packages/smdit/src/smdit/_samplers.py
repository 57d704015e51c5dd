"""From noise to data: ODE solvers for flow models, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, NamedTuple

import torch
from jaxtyping import Float
from sparse_vae import SparseTensor, Topology
from torch import Tensor

from smdit._capture import CapturedVelocity, can_capture
from smdit._config import SamplerConfig
from smdit._flow import State, Velocity, _batch_size, _features, _replace, per_object_std, per_row

CAPTURE_STEPS = 4
"""Runs of up to so many steps are not worth a recording."""

Callback = Callable[[int, int], None]
"""Called with (steps done, steps in all) after every step."""


@dataclass(frozen=True)
class SamplingStep(Generic[State]):
    """State of a sampling run after a step.

    Attributes:
        index: number of the step, from 0.
        t: time before the step.
        t_next: time after it.
        x: latents at `t_next`.
        x0: data that the velocity at `t` pointed to, x - t v.
    """

    index: int
    t: float
    t_next: float
    x: State
    x0: State


@dataclass(frozen=True, kw_only=True)
class EulerSampler:
    """Explicit Euler steps from t = 1 to t = 0, with classifier-free guidance.

    Attributes:
        steps: number of steps.
        guidance: w in `(1 + w) conditional - w unconditional`; 0 is the conditional velocity alone. For a scale in the
            other usual convention see `guidance_from_scale`.
        interval: times (after the shift, both ends included) at which guidance acts; outside it the conditional
            velocity is taken, at half the cost.
        shift: r of the schedule t <- r t / (1 + (r - 1) t) over equally spaced times; above 1 spends more steps near
            noise (TRELLIS: 3).
        rescale: share in [0, 1] of the guided prediction of the data that is brought back to the standard deviation of
            the conditional one, object by object (Lin et al. 2023, section 3.4); counters over-saturation.
        capture: on CUDA, record the forward of a model that is `capturable` once and replay it at every step (a CUDA
            graph). The results are the same; it pays from a few steps on.
    """

    steps: int = 25
    guidance: float = 5.0
    interval: tuple[float, float] = (0.0, 1.0)
    shift: float = 1.0
    rescale: float = 0.0
    capture: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.shift <= 0:
            raise ValueError(f"steps must be at least 1 and shift positive, got {self.steps} and {self.shift}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must lie in [0, 1], got {self.rescale}")
        if not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval must be (low, high) with low <= high, got {self.interval}")

    def times(self) -> list[float]:
        """The `steps + 1` times from 1 to 0."""
        uniform = [1 - i / self.steps for i in range(self.steps + 1)]
        return [self.shift * t / (1 + (self.shift - 1) * t) for t in uniform]

    def sample(
        self,
        model: Velocity[State],
        noise: State,
        condition: Float[Tensor, "B ..."],
        null: Float[Tensor, "B ..."] | None = None,
        callback: Callback | None = None,
    ) -> State:
        """Latents at t = 0.

        Args:
            model: called as `model(x, t, condition)`; with guidance on a batch that holds every object twice, first
                conditional, then unconditional.
            noise: latents at t = 1 of B objects, dense or voxels.
            condition: condition of every object.
            null: condition of the unconditional velocity; zeros by default.
            callback: called with (steps done, steps in all) after every step.
        """
        x = noise
        for step in self.trajectory(model, noise, condition, null):
            x = step.x
            if callback is not None:
                callback(step.index + 1, self.steps)
        return x

    def trajectory(
        self,
        model: Velocity[State],
        noise: State,
        condition: Float[Tensor, "B ..."],
        null: Float[Tensor, "B ..."] | None = None,
    ) -> Iterator[SamplingStep[State]]:
        """The run as an iterator over its steps; arguments as in `sample`."""
        if len(condition) != _batch_size(noise):
            raise ValueError(f"condition has {len(condition)} rows for {_batch_size(noise)} objects")
        field = _GuidedVelocity(self, model, condition, torch.zeros_like(condition) if null is None else null)
        times = self.times()
        wide = torch.promote_types(_features(noise).dtype, torch.float32)
        x = _replace(noise, _features(noise).to(wide))  # steps can be smaller than half precision resolves
        for index, (t, t_next) in enumerate(pairwise(times)):
            with torch.no_grad():
                velocity, at_start = self._velocity(field, x, t, t_next)
                x0 = _replace(x, _features(x) - t * at_start)
                x = _replace(x, _features(x) + (t_next - t) * velocity)
            yield SamplingStep(index, t, t_next, x, x0)

    def _velocity(self, field: _GuidedVelocity, x: State, t: float, t_next: float) -> tuple[Tensor, Tensor]:
        """The mean velocity to use between `t` and `t_next`, and the velocity at `t`."""
        velocity = field(x, t)
        return velocity, velocity


@dataclass(frozen=True, kw_only=True)
class HeunSampler(EulerSampler):
    """Heun's method, second order: an Euler step, then the mean of the velocities at both of its ends.

    Two model calls a step, one in the last step, where the second would be at t = 0 and no model is trained.
    """

    def _velocity(self, field: _GuidedVelocity, x: State, t: float, t_next: float) -> tuple[Tensor, Tensor]:
        start = field(x, t)
        if t_next == 0:
            return start, start
        end = field(_replace(x, _features(x) + (t_next - t) * start), t_next)
        return (start + end) / 2, start


@dataclass(frozen=True, kw_only=True)
class MultistepSampler(EulerSampler):
    """Adams-Bashforth of second order for unequal steps: one model call a step, as Euler, but the error falls as
    1 / steps^2.

    The velocity is extrapolated to the middle of the step from its last two values. Where there is no such pair, at the
    first step and where guidance sets in or ends and the velocity jumps, the step is Euler's.
    """

    def _velocity(self, field: _GuidedVelocity, x: State, t: float, t_next: float) -> tuple[Tensor, Tensor]:
        before = field.last
        velocity = field(x, t)
        if before is None or before.guided != field.guides(t):
            return velocity, velocity
        slope = (velocity - before.velocity) / (t - before.t)
        return velocity + slope * (t_next - t) / 2, velocity


def guidance_from_scale(scale: float) -> float:
    """w of a scale s in the convention `unconditional + s (conditional - unconditional)`, as diffusers has it: s - 1.

    So a scale of 1 is no guidance, `EulerSampler(guidance=guidance_from_scale(1.0))`, and one of 0 is the unconditional
    velocity.
    """
    return scale - 1


_SAMPLERS = {"euler": EulerSampler, "heun": HeunSampler, "multistep": MultistepSampler}


def make_sampler(config: SamplerConfig) -> EulerSampler:
    """The sampler that a config describes."""
    options = dict(config)
    return _SAMPLERS[options.pop("method")](**options)


class _Value(NamedTuple):
    t: float
    velocity: Tensor
    guided: bool


class _GuidedVelocity:
    """The velocity field of one sampling run: model, condition and guidance. It remembers its `last` value."""

    def __init__(self, options: EulerSampler, model: Velocity, condition: Tensor, null: Tensor) -> None:
        capture = options.capture and options.steps > CAPTURE_STEPS and can_capture(model, condition.device)
        self.options, self.condition = options, condition
        self.model: Velocity = CapturedVelocity(model) if capture else model
        self.both = torch.cat([condition, null.expand_as(condition)]) if options.guidance != 0 else condition
        self.last: _Value | None = None

    def guides(self, t: float) -> bool:
        """Whether guidance acts at time `t`."""
        low, high = self.options.interval
        return self.options.guidance != 0 and low <= t <= high

    def __call__(self, x: State, t: float) -> Tensor:
        velocity = self._guided(x, t) if self.guides(t) else self._conditional(x, t)
        self.last = _Value(t, velocity, self.guides(t))
        return velocity

    def _conditional(self, x: State, t: float) -> Tensor:
        return _features(self.model(x, self._time(x, t), self.condition)).to(_features(x).dtype)

    def _guided(self, x: State, t: float) -> Tensor:
        twice = _twice(x)
        velocities = _features(self.model(twice, self._time(twice, t), self.both))
        conditional, unconditional = velocities.to(_features(x).dtype).chunk(2)
        w = self.options.guidance
        velocity = (1 + w) * conditional - w * unconditional
        if self.options.rescale > 0:
            features = _features(x)
            wanted = per_object_std(_replace(x, features - t * conditional))
            x0 = features - t * velocity
            factor = wanted / per_object_std(_replace(x, x0)).clamp(min=1e-8)
            factor = 1 + self.options.rescale * (factor - 1)
            velocity = (features - per_row(factor, x) * x0) / t
        return velocity

    def _time(self, x: Tensor | SparseTensor, t: float) -> Tensor:
        return torch.full((_batch_size(x),), t, dtype=torch.float32, device=_features(x).device)


def _twice(x: State) -> State:
    """A batch that holds every object of `x` twice; the doubled topology is made once."""
    if not isinstance(x, SparseTensor):
        return torch.cat([x, x])  # type: ignore[return-value]
    topology: Topology = x.topology.memo("smdit.twice", lambda: SparseTensor.batch([x, x]).topology)
    return SparseTensor(torch.cat([x.features, x.features]), topology)  # type: ignore[return-value]
