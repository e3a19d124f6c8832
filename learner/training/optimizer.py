"""AdamW over one adapter with gradient clipping, and the moving average of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.backbones.flat_adapter import FlatAdapter
from common.errors import TrainingError
from learner.training.ranks import ALONE, Ranks

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Running means of the gradient and of its square, by their names in torch's AdamW and in checkpoints."""


@dataclass(frozen=True)
class LearningRate:
    """Learning rate over a stage: a function of the iteration alone, so a resumed run has the same one.

    Attributes:
        initial: the rate in iteration 0.
        schedule: constant, or linear, which would reach zero in iteration `iterations`.
        iterations: number of iterations of the stage.
    """

    initial: float
    schedule: Literal["constant", "linear"]
    iterations: int

    def at(self, iteration: int) -> float:
        remaining = 1.0 if self.schedule == "constant" else max(0.0, 1 - iteration / self.iterations)
        return self.initial * remaining


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's settings for one network in one stage; `gradient_clip` is the largest norm of its whole gradient."""

    learning_rate: LearningRate
    weight_decay: float
    gradient_clip: float


class AdapterOptimizer:
    """AdamW for one adapter, one step at a time, as one tensor; its state has the moments of each parameter by name.

    All parameters share one count of steps. It differs from torch's own count for a parameter that only some
    iterations reach; no family has one.
    """

    def __init__(self, network: str, adapter: FlatAdapter, settings: OptimizerSettings, ranks: Ranks = ALONE) -> None:
        """`network` is the name of the adapter's owner in errors."""
        self._network = network
        self._ranks = ranks
        self._adapter = adapter
        self._settings = settings
        self._weights = Parameter(adapter.flat_n)
        self._adamw = torch.optim.AdamW(
            [self._weights],
            lr=settings.learning_rate.initial,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,  # part of `_step_at`
            fused=True,
        )

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Backward passes inside this block add up to one gradient, summed over the ranks at its end.

        Raises:
            RankError: see `Ranks.summing`.
        """
        self._adapter.clear_gradient()
        with self._ranks.summing(self._network, self._adapter):
            yield

    def step(self, iteration: int) -> float:
        """Clip, step, and return the gradient's norm before clipping. Without any gradient nothing changes.

        Raises:
            TrainingError: the norm is not finite; nothing has changed then.
        """
        self._weights.grad = self._adapter.gradient_n
        reached = self._reached()
        norm = get_total_norm([parameter.grad for parameter in reached if parameter.grad is not None])
        if not norm.isfinite():
            raise TrainingError(
                f"the gradient of the {self._network} has norm {norm.item()} in iteration {iteration}: start "
                "another run with a lower learning rate"
            )
        if reached:
            clip_grads_with_norm_(self._weights, self._settings.gradient_clip, norm)
            self._step_at(self._settings.learning_rate.at(iteration), reached)
        return float(norm)

    def _reached(self) -> list[Tensor]:
        """The parameters that a backward pass has reached, on any rank."""
        parameters = self._adapter.parameters.values()
        return [parameter for parameter, due in zip(parameters, self._adapter.reached(), strict=True) if due]

    @torch.no_grad()
    def _step_at(self, rate: float, reached: list[Tensor]) -> None:
        """Step with this learning rate. A parameter that no pass has ever reached does not change.

        One that was reached in an earlier iteration moves by its momentum alone, without weight decay.
        """
        if self._settings.weight_decay > 0:
            torch._foreach_mul_(reached, 1 - rate * self._settings.weight_decay)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        # The adapters' layers notice changes by torch's count, and a fused step does not count its own.
        torch.autograd.graph.increment_version(self._weights)

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and number of steps by parameter: `name|exp_avg`, `name|exp_avg_sq`, `name|step`.

        Empty before the first step.
        """
        if not self._adamw.state:
            return {}
        flat = {kind: value.detach().to("cpu", copy=True) for kind, value in self._adamw.state[self._weights].items()}
        found = {f"{name}|step": flat["step"].clone() for name in self._adapter.parameters}
        for kind in MOMENTS:
            found |= {f"{name}|{kind}": part for name, part in self._adapter.split(flat[kind]).items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of `state`. A parameter that is not in it has never had a gradient: its moments are zero."""
        self._adamw.state.clear()
        steps = [value for key, value in state.items() if key.endswith("|step")]
        if steps:
            flat = {kind: self._moment(state, kind) for kind in MOMENTS} | {"step": torch.stack(steps).max()}
            self._adamw.state[self._weights] = {kind: value.to(self._weights) for kind, value in flat.items()}

    def _moment(self, state: Mapping[str, Tensor], kind: str) -> Tensor:
        zeros = self._adapter.split(torch.zeros(len(self._weights)))
        return self._adapter.joined({name: state.get(f"{name}|{kind}", zero) for name, zero in zeros.items()})


class MovingAverage:
    """Exponential moving average of an adapter: average <- decay average + (1 - decay) weights."""

    def __init__(self, adapter: FlatAdapter, decay: float) -> None:
        """Start at the adapter's present weights, on its device."""
        self._adapter = adapter
        self._decay = decay
        self._average_n = adapter.flat_n.clone()

    def update(self) -> None:
        """Move towards the adapter's present weights."""
        self._average_n.lerp_(self._adapter.flat_n, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this block the adapter has its averaged weights."""
        trained_n = self._adapter.flat_n.clone()
        self._adapter.flat_n.copy_(self._average_n)
        try:
            yield
        finally:
            self._adapter.flat_n.copy_(trained_n)

    def state(self) -> dict[str, Tensor]:
        """A copy of the average by parameter, on the CPU."""
        return self._adapter.split(self._average_n.to("cpu", copy=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of `state`."""
        self._average_n.copy_(self._adapter.joined(state))
