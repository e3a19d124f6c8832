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

from common.errors import TrainingError
from learner.training.ranks import ALONE, Ranks

BETAS = (0.9, 0.999)
EPSILON = 1e-8


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
    """AdamW for one adapter's parameters, one step at a time; its whole state is a flat dict of tensors."""

    def __init__(
        self,
        network: str,
        parameters: Mapping[str, Parameter],
        settings: OptimizerSettings,
        ranks: Ranks = ALONE,
    ) -> None:
        """`network` is the name of the parameters' owner in errors."""
        self._network = network
        self._ranks = ranks
        self._parameters = dict(parameters)
        self._settings = settings
        self._adamw = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.learning_rate.initial,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=settings.weight_decay,
        )

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Backward passes inside this block add up to one gradient, summed over the ranks at its end.

        Raises:
            RankError: see `Ranks.summing`.
        """
        self._adamw.zero_grad(set_to_none=True)
        with self._ranks.summing(self._network, self._parameters.values()):
            yield

    def step(self, iteration: int) -> float:
        """Clip, step, and return the gradient's norm before clipping.

        Raises:
            TrainingError: the norm is not finite; nothing has changed then.
        """
        parameters = list(self._parameters.values())
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if not norm.isfinite():
            raise TrainingError(
                f"the gradient of the {self._network} has norm {norm.item()} in iteration {iteration}: start "
                "another run with a lower learning rate"
            )
        clip_grads_with_norm_(parameters, self._settings.gradient_clip, norm)
        for group in self._adamw.param_groups:
            group["lr"] = self._settings.learning_rate.at(iteration)
        self._adamw.step()
        # The adapters' layers notice changes by torch's count, and a fused step does not count its own.
        torch.autograd.graph.increment_version(parameters)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        flat = {}
        for name, parameter in self._parameters.items():
            for kind, value in self._adamw.state[parameter].items():
                flat[f"{name}|{kind}"] = value.detach().clone()
        return flat

    def load(self, flat: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            mine = {key.split("|", 1)[1]: value for key, value in flat.items() if key.split("|", 1)[0] == name}
            if mine:
                self._adamw.state[parameter] = {
                    kind: value.clone() if kind == "step" else value.to(parameter) for kind, value in mine.items()
                }


class MovingAverage:
    """Exponential moving average of an adapter: average <- decay average + (1 - decay) weights."""

    def __init__(self, state: Mapping[str, Tensor], decay: float) -> None:
        self._decay = decay
        self._average = {name: value.clone() for name, value in state.items()}

    def update(self, parameters: Mapping[str, Tensor]) -> None:
        for name, average in self._average.items():
            average.lerp_(parameters[name].detach().to(average), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._average.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._average = {name: state[name].clone() for name in self._average}
