"""Which samples an update trains on, and how they are shared out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.flow import cps_transition, surrogate_log_density
from common.types import StepPlan
from learner.training.alignment_batch import assemble, effective_samples, largest
from learner.training.networks import StageSettings
from learner.training.policy_gradient import balanced_weight
from learner.training.ranks import Ranks
from tests.helpers.tiny_pipeline import load_tiny_backbone
from tests.helpers.tiny_training import alignment_settings, new_networks, scored_groups
from tests.helpers.tiny_training import alignment_trainer as new_trainer

ADVANTAGES_PG = torch.tensor([[0.1, -2.0, 0.5], [1.5, 0.0, -1.5]])


def test_the_largest_advantages_are_kept_in_their_order() -> None:
    advantages_B = ADVANTAGES_PG.flatten()
    assert largest(advantages_B, 1.0) == [0, 1, 2, 3, 4, 5]
    assert largest(advantages_B, 0.5) == [1, 3, 5]
    assert largest(advantages_B, 0.51) == [1, 2, 3, 5]
    assert largest(advantages_B, 1 / 3) == [1, 3]  # of the two equal ones the first
    assert largest(torch.zeros(4), 0.25) == [0]


def test_the_effective_number_of_samples_by_hand() -> None:
    assert effective_samples(torch.tensor([1.0, -1.0, 1.0, 1.0])) == pytest.approx(4.0)
    assert effective_samples(torch.tensor([0.0, 0.0, -3.0])) == pytest.approx(1.0)
    assert effective_samples(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 10)
    assert effective_samples(torch.zeros(3)) == 0.0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_ranks_have_the_kept_rows_once_each(tiny_pipeline: Path, ranks: int) -> None:
    backbone = new_networks(tiny_pipeline).backbone
    groups = [group.trajectory for group in scored_groups(backbone, 0)]
    latents = np.concatenate([group.latents_SGchw for group in groups], axis=1)[:, [1, 3, 5]]
    parts = [assemble(groups, ADVANTAGES_PG, 0.5, Ranks(index, ranks), backbone) for index in range(ranks)]
    assert [row for part in parts for row in part.rows] == [0, 1, 2]
    assert all(part.total == 3 for part in parts)
    assert torch.cat([part.advantages_B for part in parts]).tolist() == [-2.0, 1.5, -1.5]
    assert np.array_equal(torch.cat([part.latents_SBchw for part in parts], dim=1).numpy(), latents)
    names = [prompt.text for part in parts for prompt in part.prompts]
    assert names == [groups[0].prompt.text, groups[1].prompt.text, groups[1].prompt.text]
    # The first group has one row, so the halves of the batch are one and two rows.
    assert sum(part.middle for part in parts) == 1
    assert {part.effective_samples for part in parts} == {effective_samples(torch.tensor([-2.0, 1.5, -1.5]))}


def test_the_conditioning_is_that_of_each_rows_prompt(tiny_pipeline: Path) -> None:
    backbone = load_tiny_backbone(tiny_pipeline)
    groups = [group.trajectory for group in scored_groups(new_networks(tiny_pipeline).backbone, 0)]
    batch = assemble(groups, ADVANTAGES_PG, 0.5, Ranks(), backbone)
    expected = backbone.encode_prompts([prompt.text for prompt in batch.prompts])
    for name, tensor in batch.conditioning(slice(0, 3)).tensors.items():
        assert torch.equal(tensor, expected.tensors[name])
        assert torch.equal(batch.conditioning(slice(2, 3)).tensors[name], tensor[2:])
    assert all(len(tensor) == 2 for tensor in batch.encoded.tensors.values())  # two prompts, three rows


def test_a_fraction_trains_on_the_largest_advantages_alone(tiny_pipeline: Path) -> None:
    """With all but one sample's advantage at 0 the gradient is that one's: twice as large as over two kept samples."""
    norms = []
    for fraction in (1.0, 0.5, 1 / 6):
        networks = new_networks(tiny_pipeline)
        settings = alignment_settings(train_fraction=fraction, matching_weight=0.0, reward_gradient_weight=0.0)
        networks.begin_alignment(StageSettings.of(settings))
        groups = scored_groups(networks.backbone, 0, settings)
        for place, group in enumerate(groups):
            group.rewards_G["left"][:] = [1.0, 0.0, 0.0] if place == 0 else 0.0  # type: ignore[index]
            group.rewards_G["bright"][:] = 0.0  # type: ignore[index]
        totals = new_trainer(networks, settings).update(groups).totals
        norms.append(totals.values()["student_gradient_norm"])
    # 6, 3 and 1 samples share a sum that hardly differs: only the first group's three have an advantage.
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)
    assert norms[2] > 2 * norms[1] * 0.5


def test_balanced_weights_give_every_step_the_same_gradient() -> None:
    """Measured with autograd: the norm of the surrogate's gradient with respect to the velocity, for the same noise."""
    plan = StepPlan(0, (1.0, 0.9, 0.75, 0.5, 0.0), 0.9, (0, 1, 2))
    generator = torch.Generator().manual_seed(0)
    sample, noise = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
    sizes, weights = [], []
    for step, one in enumerate(plan.steps[:-1]):
        velocity = torch.randn(1, 4, 4, 4, generator=generator).requires_grad_()
        transition = cps_transition(sample, velocity, one.sigma, one.sigma_next, one.eta)
        surrogate = surrogate_log_density(transition.mean_Bchw, transition.sample(noise).detach())
        (gradient,) = torch.autograd.grad(surrogate.sum(), velocity)
        weights.append(balanced_weight(plan, step, "squared_error"))
        sizes.append(weights[-1] * float(gradient.norm()))
    assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-4)
    assert math.fsum(weights) == pytest.approx(3.0)
    # Of the Gaussian density the gradient falls with std^2, so the weights are others.
    gaussian = [balanced_weight(plan, step, "gaussian") for step in range(3)]
    ratios = [(0.9 / 0.75) ** 2, (0.75 / 0.5) ** 2]
    assert gaussian[0] / gaussian[1] == pytest.approx(weights[0] / weights[1] * ratios[0])
    assert gaussian[1] / gaussian[2] == pytest.approx(weights[1] / weights[2] * ratios[1])
