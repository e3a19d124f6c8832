"""SubGRPO, AC-DMD, consistency, reward back-propagation: reference values, hand-computed values, limits, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.flow import cps_transition, surrogate_log_density
from learner.objectives.ac_dmd import distribution_matching_loss, fake_score_loss
from learner.objectives.consistency import consistency_loss, earlier_sigma
from learner.objectives.loss import Loss
from learner.objectives.reward_gradient import attach_gradient, clip_sample_norms, reward_hinge_loss
from learner.objectives.subgrpo import subgrpo_loss
from tests.helpers.reference import REFERENCE, assert_near, tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def image(*values: float) -> Tensor:
    return vector(*values).reshape(-1, 1, 1, 1)


def metric(loss: Loss, name: str) -> float:
    return float(loss.metrics[name])


# ── SubGRPO ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_policy_loss_by_hand():
    # Ratios 1.1, 1.3, .7, 1.3 at clip .2: only the second (A > 0, too far up) and the third (A < 0, too far down) clip.
    surrogate_B = vector(1.1, 1.3, 0.7, 1.3).log().requires_grad_()
    advantages_B = vector(2.0, 1.0, -1.0, -1.0)
    loss = subgrpo_loss(surrogate_B, torch.zeros_like(surrogate_B), advantages_B, 0.2, 0.2)
    assert loss.value.item() == pytest.approx((-2.2 - 1.2 + 0.8 + 1.3) / 4)
    assert metric(loss, "ratio_mean") == pytest.approx(1.1)
    assert metric(loss, "ratio_max_deviation") == pytest.approx(0.3)
    assert metric(loss, "clipped_fraction") == 0.5
    loss.value.backward()
    torch.testing.assert_close(surrogate_B.grad, vector(-2.2, 0, 0, 1.3) / 4)


def test_clip_widths_are_separate():
    # Swapped, the bounds would give (-1.1 + 0.6) / 2.
    surrogate_B = vector(1.3, 0.6).log()
    loss = subgrpo_loss(surrogate_B, torch.zeros(2).double(), vector(1.0, -1.0), 0.1, 0.5)
    assert loss.value.item() == pytest.approx((-1.3 + 0.9) / 2)
    assert metric(loss, "clipped_fraction") == 0.5


def test_on_policy_gradient_is_minus_advantage_times_surrogate_gradient():
    sample, velocity = draw(4, 2, 2, 2), draw(4, 2, 2, 2, seed=1).requires_grad_()
    advantages_B = vector(1.0, -2.0, 0.0, 0.5)
    transition = cps_transition(sample, velocity, 0.9, 0.75, 0.9)
    next_sample = transition.sample(draw(4, 2, 2, 2, seed=2)).detach()
    surrogate_B = surrogate_log_density(transition.mean_Bchw, next_sample)
    loss = subgrpo_loss(surrogate_B, surrogate_B.detach(), advantages_B, 1e-5, 1e-5)
    (actual,) = torch.autograd.grad(loss.value, velocity, retain_graph=True)
    (expected,) = torch.autograd.grad(-(advantages_B * surrogate_B).mean(), velocity)
    torch.testing.assert_close(actual, expected)
    assert metric(loss, "ratio_mean") == 1.0
    assert metric(loss, "clipped_fraction") == 0.0


def test_policy_loss_without_advantage_has_no_gradient():
    surrogate_B = vector(0.1, 0.2).requires_grad_()
    subgrpo_loss(surrogate_B, surrogate_B.detach(), torch.zeros(2).double(), 1e-5, 1e-5).value.backward()
    assert torch.equal(surrogate_B.grad, torch.zeros(2).double())


def test_policy_gradient_agrees_with_finite_differences():
    # Away from the kinks: ratios between .85 and 1.15, or far outside the clip of .2.
    surrogate_B, advantages_B = vector(0.1, -0.1, 0.4, -0.5).requires_grad_(), vector(1.0, -1.0, 2.0, -2.0)
    old_B = torch.zeros(4).double()
    assert torch.autograd.gradcheck(lambda s: subgrpo_loss(s, old_B, advantages_B, 0.2, 0.2).value, (surrogate_B,))


# ── fake score ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fake_score_loss_by_hand():
    # w = .1: weight min(100, 10), error .1 * 3 - .1; w = 2: weight 1/4, error 2 * 1 - 4.
    loss = fake_score_loss(image(3.0, 1.0), image(0.1, 4.0), vector(0.1, 2.0), 10.0)
    assert loss.value.item() == pytest.approx((10 * 0.2**2 + 0.25 * 2**2) / 2)
    assert metric(loss, "fake_score_loss") == pytest.approx(loss.value.item())
    assert metric(loss, "velocity_norm") == pytest.approx((3 + 1) / 2)


@pytest.mark.parametrize("case", REFERENCE["subinterval"], ids=lambda case: f"{case['sigma_start']}")
def test_fake_score_loss_uses_the_reference_weight(case):
    target, scale = tensor(case["scaled_target"]), case["scale"]
    velocity = tensor(case["x_end"])
    expected = (case["weight"] * (scale * velocity - target).square()).mean()
    assert_near(fake_score_loss(velocity, target, scale, 10.0).value, expected.item())


def test_fake_score_loss_is_the_plain_velocity_error_where_the_weight_is_unbounded():
    velocity, target, scale = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1), vector(0.4, 0.6, 0.9)
    loss = fake_score_loss(velocity, target * scale.reshape(3, 1, 1, 1), scale, 10.0)
    torch.testing.assert_close(loss.value, (velocity - target).square().mean())


def test_fake_score_gradient_agrees_with_finite_differences():
    velocity, target = draw(2, 2, 2, 2).requires_grad_(), draw(2, 2, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda v: fake_score_loss(v, target, vector(0.1, 0.8), 10.0).value, (velocity,))


# ── distribution matching ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", REFERENCE["dmd"], ids=lambda case: f"normalize={case['normalize']}")
def test_distribution_matching_equals_the_reference(case):
    sample = tensor(case["sample"]).requires_grad_()
    loss = distribution_matching_loss(sample, tensor(case["fake"]), tensor(case["teacher"]), case["normalize"])
    assert_near(loss.value.detach(), case["loss"])
    loss.value.backward()
    assert_near(sample.grad, case["grad_of_sample"])


def test_distribution_matching_by_hand():
    sample = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 2, 1, 1).requires_grad_()
    fake, teacher = vector(3.0, 0.0).reshape(1, 2, 1, 1), vector(0.0, 1.0).reshape(1, 2, 1, 1)
    loss = distribution_matching_loss(sample, fake, teacher)  # g = (3, -1) / mean(1, 1)
    assert loss.value.item() == pytest.approx(0.5 * (9 + 1) / 2)
    assert metric(loss, "matching_gradient") == pytest.approx(2.0)
    assert metric(loss, "teacher_distance") == pytest.approx(1.0)
    loss.value.backward()
    torch.testing.assert_close(sample.grad.flatten(), vector(1.5, -0.5))


def test_distribution_matching_rests_where_fake_and_teacher_agree():
    sample, both = draw(2, 3, 2, 2).requires_grad_(), draw(2, 3, 2, 2, seed=1)
    loss = distribution_matching_loss(sample, both, both)
    loss.value.backward()
    assert loss.value.item() == 0
    assert torch.equal(sample.grad, torch.zeros_like(sample))


def test_distribution_matching_survives_a_sample_the_teacher_reproduces():
    sample = draw(1, 2, 2, 2).requires_grad_()
    loss = distribution_matching_loss(sample, sample.detach(), sample.detach())
    loss.value.backward()
    assert torch.isfinite(sample.grad).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_distribution_matching_gradient_agrees_with_finite_differences_at_a_fixed_target(normalize):
    sample, fake, teacher = draw(2, 2, 1, 1), draw(2, 2, 1, 1, seed=1), draw(2, 2, 1, 1, seed=2)
    distance = (sample - teacher).abs().mean(dim=(1, 2, 3), keepdim=True) if normalize else 1.0
    target = sample - (fake - teacher) / distance
    moving = sample.clone().requires_grad_()
    distribution_matching_loss(moving, fake, teacher, normalize).value.backward()
    step = 1e-6
    for position in range(sample.numel()):
        nudge = torch.zeros_like(sample)
        nudge.view(-1)[position] = step
        ahead, behind = ((0.5 * (sample + sign * nudge - target).square().mean()).item() for sign in (1, -1))
        assert moving.grad.view(-1)[position].item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)


# ── consistency ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_consistency_by_hand_can_be_negative():
    loss = consistency_loss(image(1.0, 0.0), image(3.0, 1.0), image(0.0, 4.0))
    assert loss.value.item() == pytest.approx((2 * -1 + 1 * 4) / 2)
    assert consistency_loss(image(0.0), image(1.0), image(-1.0)).value.item() == -1.0


def test_consistency_is_unbiased_where_one_squared_deviation_is_not():
    """Predictions that agree on average: the product averages to 0, the square to the transition's variance."""
    anchor, first, second = torch.zeros(20_000, 1, 1, 1).double(), draw(20_000, 1, 1, 1), draw(20_000, 1, 1, 1, seed=1)
    assert consistency_loss(anchor, first, second).value.item() == pytest.approx(0.0, abs=0.03)
    assert consistency_loss(anchor, first, first).value.item() == pytest.approx(1.0, abs=0.05)


def test_consistency_gradient_agrees_with_finite_differences():
    predictions = tuple(draw(2, 2, 1, 1, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda *p: consistency_loss(*p).value, predictions)


def test_earlier_sigma_spans_1_to_200_thousandths_and_stops_at_zero():
    uniform_B, sigma_B = vector(0.0, 0.004999, 0.005, 1 - 1e-12, 1.0, 0.5), vector(0.5, 0.5, 0.5, 0.5, 0.5, 0.05)
    torch.testing.assert_close(earlier_sigma(uniform_B, sigma_B), vector(0.499, 0.499, 0.498, 0.3, 0.3, 0.0))


# ── reward back-propagation ──────────────────────────────────────────────────────────────────────────────────────────


def test_hinge_by_hand():
    rewards = {"hps": vector(1.0, 2.0).requires_grad_(), "pick": vector(1.0, 4.0), "watched": vector(9.0, 9.0)}
    loss = reward_hinge_loss(rewards, {"hps": 1.0, "pick": 0.5}, 3.0)
    assert loss.value.item() == pytest.approx((1.5 + 0) / 2)
    assert metric(loss, "hinge_reward") == pytest.approx((1.5 + 4.0) / 2)
    assert metric(loss, "hinge_active_fraction") == 0.5
    loss.value.backward()
    torch.testing.assert_close(rewards["hps"].grad, vector(-0.5, 0.0))


def test_hinge_gradient_agrees_with_finite_differences():
    one, other = vector(0.3, 2.0, 4.0).requires_grad_(), vector(0.1, 0.5, 3.0).requires_grad_()
    weights = {"one": 1.0, "other": 0.5}
    assert torch.autograd.gradcheck(
        lambda a, b: reward_hinge_loss({"one": a, "other": b}, weights, 3.0).value, (one, other)
    )


def remote_reward(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """A server's response: a score and its derivative, as numbers without history."""
    leaf = images_BCHW.detach().requires_grad_()
    scores_B = leaf.tanh().square().sum(dim=(1, 2, 3))
    (gradients_BCHW,) = torch.autograd.grad(scores_B.sum(), leaf)
    return scores_B.detach(), gradients_BCHW


def test_sample_norms_are_clipped_by_hand():
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]).view(3, 1, 1, 2)
    clipped = clip_sample_norms(gradients, 1.0)
    assert torch.allclose(clipped.view(3, 2), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert clip_sample_norms(gradients, None) is gradients


def test_attached_gradient_equals_autograd_through_the_reward():
    latents = draw(3, 2, 2, 2).requires_grad_()
    images = latents.sin() * 2
    scores_B, gradients = remote_reward(images)
    attached_B = attach_gradient(scores_B, gradients, images)
    assert torch.equal(attached_B.detach(), scores_B)
    (served,) = torch.autograd.grad(reward_hinge_loss({"r": attached_B}, {"r": 0.7}, 9.0).value, latents)
    images_again = latents.sin() * 2
    in_process = images_again.tanh().square().sum(dim=(1, 2, 3))
    (direct,) = torch.autograd.grad(reward_hinge_loss({"r": in_process}, {"r": 0.7}, 9.0).value, latents)
    torch.testing.assert_close(served, direct)
    assert direct.abs().max() > 0.01  # the target is above all rewards


def test_attached_gradient_agrees_with_finite_differences_of_the_remote_score():
    latents, direction = draw(2, 1, 2, 2), draw(2, 1, 2, 2, seed=1)
    leaf = latents.clone().requires_grad_()
    images = leaf.sin()
    attach_gradient(*remote_reward(images), images).sum().backward()
    step = 1e-6
    ahead, behind = (remote_reward((latents + sign * step * direction).sin())[0].sum().item() for sign in (1, -1))
    assert (leaf.grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)


def test_attached_gradient_reaches_half_precision_images():
    images = draw(2, 1, 2, 2).to(torch.bfloat16).requires_grad_()
    attached_B = attach_gradient(torch.tensor([0.1, 0.2]), torch.ones(2, 1, 2, 2), images)
    attached_B.sum().backward()
    assert attached_B.tolist() == pytest.approx([0.1, 0.2])
    assert torch.equal(images.grad, torch.ones(2, 1, 2, 2, dtype=torch.bfloat16))


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────

IMAGE, VECTOR = torch.zeros(2, 1, 1, 1), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subgrpo_loss(VECTOR, VECTOR, VECTOR[:1], 0.1, 0.1), r"advantages_B \[1\]"),
        (lambda: subgrpo_loss(VECTOR, VECTOR, VECTOR, 0.1, 1.1), r"clip_high = 1\.1"),
        (lambda: fake_score_loss(IMAGE, IMAGE[:1], 0.5, 10.0), "scaled_target_Bchw"),
        (lambda: fake_score_loss(IMAGE, IMAGE, 0.0, 10.0), r"scale = 0\.0"),
        (lambda: fake_score_loss(IMAGE, IMAGE, 0.5, 0.0), r"max_weight = 0\.0"),
        (lambda: distribution_matching_loss(IMAGE, IMAGE[0], IMAGE), "rank 4"),
        (lambda: consistency_loss(IMAGE, IMAGE, IMAGE[:1]), "second_prediction_Bchw"),
        (lambda: earlier_sigma(VECTOR, VECTOR[:1]), "sigma_B"),
        (lambda: reward_hinge_loss({"hps": VECTOR}, {"pick": 1.0}, 3.0), r"\['pick'\]"),
        (lambda: attach_gradient(VECTOR[:1], IMAGE, IMAGE), "there are 2 images"),
        (lambda: attach_gradient(VECTOR, IMAGE[:1], IMAGE), "gradients_BCHW"),
        (lambda: Loss(VECTOR, {}), "a loss is a scalar"),
        (lambda: Loss(VECTOR.sum(), {"leak": torch.zeros(1, requires_grad=True).sum()}), "metric leak"),
    ],
)
def test_impossible_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_half_precision_inputs_give_float32_losses():
    half = IMAGE.to(torch.bfloat16)
    losses = [
        fake_score_loss(half, half, 0.5, 10.0),
        distribution_matching_loss(half, half, half),
        consistency_loss(half, half, half),
        subgrpo_loss(VECTOR.half(), VECTOR.half(), VECTOR.half(), 0.1, 0.1),
        reward_hinge_loss({"r": VECTOR.half()}, {"r": 1.0}, 3.0),
    ]
    assert {loss.value.dtype for loss in losses} == {torch.float32}
