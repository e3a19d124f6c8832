"""DiffusionNFT's objective: hand-computed values, and the gradient where the old velocity is the new one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.objectives.diffusion_nft import nft_loss, optimality


def image(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def advantages(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_an_advantage_becomes_a_probability() -> None:
    assert optimality(advantages(-5, -10, 0, 2.5, 5), 5.0).tolist() == [0, 0, 0.5, 0.75, 1]


def test_the_loss_by_hand() -> None:
    # x = 3, sigma .5, x0 = 1; v = 2, v_old = 1, beta .5: v+ = 1.5, v- = .5, so x0_hat is 2.25 and 2.75.
    # One value a sample: D = error^2 / |error| = |error|, 1.25 and 1.75. A = 2 of at most 4: r = .75.
    loss = nft_loss(image(1), image(3), 0.5, image(2), image(1), advantages(2.0), 4.0, 0.5)
    assert loss.value.item() == pytest.approx(4 / 0.5 * (0.75 * 1.25 + 0.25 * 1.75))
    assert float(loss.metrics["forward_error"]) == pytest.approx(1.25)


def test_the_gradient_by_hand() -> None:
    # The divisor is constant: dD/dv = 2 error / |error| times d x0_hat / dv = -sigma beta for v+, +sigma beta for v-.
    velocity = image(2).requires_grad_()
    nft_loss(image(1), image(3), 0.5, velocity, image(1), advantages(2.0), 4.0, 0.5).value.backward()
    assert velocity.grad is not None
    assert velocity.grad.item() == pytest.approx(4 / 0.5 * (0.75 * 2 * -0.25 + 0.25 * 2 * 0.25))


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_on_policy_the_gradient_is_advantage_times_that_of_the_error_whatever_beta(beta: float) -> None:
    velocity = image(2, 2, 2).requires_grad_()
    loss = nft_loss(image(1, 1, 1), image(3, 3, 3), 0.5, velocity, velocity.detach(), advantages(2, -1, 0), 4.0, beta)
    loss.value.backward()
    assert velocity.grad is not None
    # x0_hat = 2, error 1: dD/dv = -2 sigma = -1; a mean over three samples.
    assert velocity.grad.flatten().tolist() == pytest.approx([-2 / 3, 1 / 3, 0])
    assert velocity.grad[2].item() == 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="beta = 0"):
        nft_loss(image(1), image(3), 0.5, image(2), image(1), advantages(2.0), 4.0, 0.0)
    with pytest.raises(ValueError, match="bound = 0"):
        optimality(advantages(1.0), 0.0)
