"""The samples of one alignment update: this rank's rows of the scored groups, flattened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.backbones.base import Backbone, Conditioning
from common.backbones.device.transfer import pinned, to_device
from common.flow import Transition, clean_prediction
from common.sampling import step_transition
from common.types import FloatArray, Network, Prompt, StepPlan, TrajectoryGroup
from learner.training.ranks import Ranks


@dataclass(frozen=True)
class Batch:
    """This rank's rows of a batch. The batch's rows are the trained samples of all groups, in their order.

    Attributes:
        rows: the indices of these rows, out of `total`.
        group_of_B: the number of each row's group, of all `groups` of the batch; int64 on the host.
        middle: the number of these rows that are in the first half of the batch's groups.
        effective_samples: of the whole batch, see `effective_samples`.
        encoded: the prompts of the groups that have a row here, once each: a copy for every row would take gigabytes.
        encoded_of_B: the place of each row's prompt in `encoded`, on its device.
        advantages_PG: of all samples of all groups, trained or not.
        latents_SBchw: on the host; a device holds those of one step and micro-batch at a time.
        kept: the samples of the whole batch that are trained on, as places in all groups' samples.
    """

    rows: range
    total: int
    groups: int
    group_of_B: Tensor
    middle: int
    effective_samples: float
    advantages_PG: Tensor
    kept: list[int]
    plan: StepPlan
    prompts: list[Prompt]
    encoded: Conditioning
    encoded_of_B: Tensor
    latents_SBchw: Tensor
    old_surrogate_TB: Tensor
    advantages_B: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def conditioning(self, rows: slice) -> Conditioning:
        """The encoded prompts of some rows, one each."""
        return self.encoded.rows(self.encoded_of_B[rows])

    def latents(self, step: int, rows: slice) -> Tensor:
        """The state before a step of the rollout, [B, c, h, w], on the device."""
        return to_device(self.latents_SBchw[step, rows], self.encoded_of_B.device)

    def transition(self, backbone: Backbone, step: int, rows: slice) -> Transition:
        """The student's transition at a step of the rollout, with its graph."""
        conditioning = self.conditioning(rows)

        def student(latents_Bchw: Tensor, sigma_B: Tensor) -> Tensor:
            return backbone.velocity(Network.STUDENT, latents_Bchw, sigma_B, conditioning)

        return step_transition(student, self.latents(step, rows), self.plan.steps[step])

    def clean_prediction(self, backbone: Backbone, step: int, rows: slice) -> Tensor:
        """The student's clean prediction at a step of the rollout, with its graph."""
        latents, sigma = self.latents(step, rows), self.plan.steps[step].sigma
        sigma_B = torch.full((len(latents),), sigma, device=latents.device)
        velocity = backbone.velocity(Network.STUDENT, latents, sigma_B, self.conditioning(rows))
        return clean_prediction(latents, velocity, sigma)


def assemble(
    groups: Sequence[TrajectoryGroup], advantages_PG: Tensor, fraction: float, ranks: Ranks, backbone: Backbone
) -> Batch:
    """This rank's rows of these groups' samples; of a `fraction` below 1 those with the largest |advantage|."""
    size = groups[0].group_size
    kept = largest(advantages_PG.flatten(), fraction)
    rows = range(len(kept))[ranks.share(len(kept))]
    mine = kept[rows.start : rows.stop]
    # The groups that have a row on this rank, with the places of these rows in them.
    numbers = sorted({row // size for row in mine})
    chosen = [(groups[number], [row % size for row in mine if row // size == number]) for number in numbers]
    order = torch.tensor([place for place, (_, inside) in enumerate(chosen) for _ in inside])
    device = backbone.device
    return Batch(
        rows=rows,
        total=len(kept),
        groups=len(groups),
        group_of_B=torch.tensor([row // size for row in mine]),
        middle=_in_first_half(rows, mine, size, len(groups), len(kept)),
        effective_samples=effective_samples(advantages_PG.flatten()[kept]),
        advantages_PG=advantages_PG,
        kept=kept,
        plan=groups[0].plan,
        prompts=[group.prompt for group, inside in chosen for _ in inside],
        encoded=backbone.encode_prompts([group.prompt.text for group, _ in chosen]),
        encoded_of_B=to_device(order, device),
        latents_SBchw=pinned(_columns([(group.latents_SGchw, inside) for group, inside in chosen]), device),
        old_surrogate_TB=to_device(_columns([(group.surrogate_TG, inside) for group, inside in chosen]), device),
        advantages_B=to_device(advantages_PG.flatten()[mine], device),
    )


def largest(advantages_B: Tensor, fraction: float) -> list[int]:
    """The rows with the largest |advantage|, a `fraction` of all rounded up, in order; of equal ones the first."""
    if fraction == 1:
        return list(range(len(advantages_B)))
    count = math.ceil(fraction * len(advantages_B) - 1e-9)  # minus a rounding error, so that a tenth of 10 rows is 1
    return sorted(torch.sort(advantages_B.abs(), descending=True, stable=True).indices[:count].tolist())


def effective_samples(advantages_B: Tensor) -> float:
    """(sum |A|)^2 / sum A^2: the number of samples with one |A| whose mean would have the same relative variance."""
    squares = float(advantages_B.square().sum())
    return float(advantages_B.abs().sum()) ** 2 / squares if squares > 0 else 0.0


def _columns(parts: Sequence[tuple[FloatArray, Sequence[int]]]) -> Tensor:
    """Some columns of each array, side by side."""
    return torch.cat([torch.tensor(values[:, inside]) for values, inside in parts], dim=1)


def _in_first_half(rows: range, mine: Sequence[int], size: int, groups: int, total: int) -> int:
    """Number of this rank's rows in the first half of the groups: whole groups, whose samples share noise.

    A single group is halved by its samples.
    """
    if groups == 1:
        return min(max(-(-total // 2) - rows.start, 0), len(rows))
    return sum(row // size < -(-groups // 2) for row in mine)
