"""TDM-R1's objectives: hand-computed values, and the gradient of the group's preference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from common.flow import ambient_target
from learner.objectives.surrogate_reward import (
    ascent_loss,
    denoising_errors,
    preference_log_odds,
    preference_loss,
    reference_penalty,
)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def image(*values: float) -> Tensor:
    return vector(*values).reshape(-1, 1, 1, 1)


GROUPS = torch.tensor([0, 0, 1, 1])
ADVANTAGES = vector(1.0, -1.0, 2.0, 0.5)
ERRORS, REFERENCE = vector(1.0, 2.0, 3.0, 1.0), vector(2.0, 2.5, 1.0, 3.0)


def test_the_error_is_that_of_the_unscaled_target() -> None:
    # At s = 0 the target is z - x0 = 1.5: the error of a velocity of 1 is .25.
    target, scale = ambient_target(image(0.5), image(2.0), 0.0, 0.4)
    assert denoising_errors(image(1.0), target, scale).tolist() == pytest.approx([0.25])


def test_the_log_odds_by_hand() -> None:
    # Group 0: 1 (2 - 1) - 1 (2.5 - 2) = .5; group 1: 2 (1 - 3) + .5 (3 - 1) = -3; times .25.
    log_odds = preference_log_odds(ERRORS, REFERENCE, ADVANTAGES, GROUPS, 3, 0.25)
    assert log_odds.tolist() == pytest.approx([0.125, -0.75, 0.0])


def test_parts_of_a_group_add_up() -> None:
    whole = preference_log_odds(ERRORS, REFERENCE, ADVANTAGES, GROUPS, 2, 0.25)
    parts = [
        preference_log_odds(ERRORS[rows], REFERENCE[rows], ADVANTAGES[rows], GROUPS[rows], 2, 0.25)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    torch.testing.assert_close(parts[0] + parts[1] + parts[2], whole)


def test_the_preference_loss_by_hand() -> None:
    log_odds_B = preference_log_odds(ERRORS, REFERENCE, ADVANTAGES, GROUPS, 2, 0.25)[GROUPS]
    loss = preference_loss(ERRORS, REFERENCE, ADVANTAGES, log_odds_B, too_far=False)
    doubt = [1 / (1 + math.exp(0.125)), 1 / (1 + math.exp(-0.75))]
    assert loss.value.item() == pytest.approx((doubt[0] * (1 - 2) + doubt[1] * (6 + 0.5)) / 4, rel=1e-5)
    expected = -(math.log(1 - doubt[0]) + math.log(1 - doubt[1])) / 2
    assert float(loss.metrics["preference_loss"]) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_that_of_the_log_likelihood_divided_by_beta() -> None:
    beta, size = 3.0, 2
    errors = ERRORS.clone().requires_grad_()
    log_odds_B = preference_log_odds(errors, REFERENCE, ADVANTAGES, GROUPS, 2, beta / size)[GROUPS]
    preference_loss(errors, REFERENCE, ADVANTAGES, log_odds_B, too_far=False).value.backward()
    plain = ERRORS.clone().requires_grad_()
    gains_P = (ADVANTAGES * (REFERENCE - plain)).view(2, 2).sum(dim=1)
    (-logsigmoid(beta / size * gains_P).mean() / beta).backward()
    torch.testing.assert_close(errors.grad, plain.grad, rtol=1e-5, atol=1e-8)


def test_without_advantages_nothing_is_learned() -> None:
    errors = ERRORS.clone().requires_grad_()
    loss = preference_loss(errors, REFERENCE, torch.zeros(4).double(), torch.zeros(4).double(), too_far=False)
    loss.value.backward()
    assert errors.grad is not None
    assert not errors.grad.any()
    assert float(loss.metrics["preference_loss"]) == pytest.approx(math.log(2))


def test_too_far_away_only_samples_with_the_wrong_sign_train() -> None:
    """A (e_ref - e) is 1, -.5, -4 and 1."""
    errors = ERRORS.clone().requires_grad_()
    loss = preference_loss(errors, REFERENCE, ADVANTAGES, torch.zeros(4).double(), too_far=True)
    loss.value.backward()
    assert errors.grad is not None
    assert errors.grad.tolist() == pytest.approx([0, -0.5 / 4, 1 / 4, 0])
    assert float(loss.metrics["surrogate_held"]) == 0.5


def test_the_penalty_by_hand() -> None:
    loss = reference_penalty(image(1.0, 3.0), image(0.0, 1.0))
    assert (loss.value.item(), float(loss.metrics["surrogate_distance"])) == (2.5, 2.5)


def test_the_ascent_by_hand() -> None:
    # g = (x0_ref - x0_surrogate) / |x0 - x0_surrogate| = (2 - 5) / |1 - 5|: descending it moves towards the surrogate.
    clean = image(1.0).requires_grad_()
    loss = ascent_loss(clean, image(5.0), image(2.0))
    loss.value.backward()
    assert clean.grad is not None
    assert clean.grad.item() == pytest.approx(-0.75)
    assert loss.value.item() == pytest.approx(0.5 * 0.75**2)
    assert float(loss.metrics["surrogate_gradient"]) == pytest.approx(0.75)
