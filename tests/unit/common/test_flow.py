from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common import flow
from tests.helpers.reference import REFERENCE, assert_near, tensor

FLUX2_CASES = ["flux2_klein_1024", "flux2_klein_4096"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scalar_image(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


# ── reference values ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", REFERENCE["cps"], ids=lambda case: f"{case['sigma']}-{case['eta']}")
def test_transition_equals_the_reference(case):
    args = (case["sigma"], case["sigma_next"], case["eta"])
    transition = flow.cps_transition(tensor(case["sample"]), tensor(case["velocity"]), *args)
    assert_near(transition.mean_Bchw, case["mean"])
    assert_near(transition.std.reshape(()), case["std"])
    assert_near(transition.sample(tensor(case["noise"])), case["next_sample"])
    for name, points in (("next", "next_sample"), ("other", "other_next")):
        density_B = flow.surrogate_log_density(transition.mean_Bchw, tensor(case[points]))
        assert_near(density_B, case[f"surrogate_logp_of_{name}"])


@pytest.mark.parametrize("case", REFERENCE["subinterval"], ids=lambda case: f"{case['sigma_start']}")
def test_subinterval_equals_the_reference(case):
    args = (tensor(case["x_start"]), tensor(case["noise"]), case["sigma_start"], case["sigma_end"])
    assert_near(flow.renoise(*args), case["x_end"])
    scaled_target, scale = flow.ambient_target(*args)
    assert_near(scaled_target, case["scaled_target"])
    assert_near(scaled_target / scale, case["velocity_target"])
    assert_near(scale.reshape(()), case["scale"])


def test_sd3_schedule_equals_the_reference():
    case = REFERENCE["sigmas"]["sd3_shift3"]
    sigmas = flow.static_shift_sigmas(4, case["shift"])
    assert sigmas == pytest.approx((*case["sigmas"], 0.0), abs=1e-6)
    assert sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0), abs=1e-12)


@pytest.mark.parametrize("name", FLUX2_CASES)
def test_flux2_schedule_equals_the_reference(name):
    case = REFERENCE["sigmas"][name]
    sigmas = flow.exponential_shift_sigmas(4, flow.flux2_mu(case["image_seq_len"], 4))
    assert sigmas == pytest.approx((*case["sigmas"], 0.0), abs=2e-6)


# ── transitions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_transition_by_hand():
    # x = 1, v = 2, from .5 to .25: x0_hat = 0, eps_hat = 2; eta = 1/3 turns by 30 degrees.
    transition = flow.cps_transition(scalar_image(1.0), scalar_image(2.0), 0.5, 0.25, 1 / 3)
    assert transition.mean_Bchw.item() == pytest.approx(0.25 * math.sqrt(3) / 2 * 2)
    assert transition.std.item() == pytest.approx(0.125)
    assert transition.sample(scalar_image(4.0)).item() == pytest.approx(0.25 * math.sqrt(3) + 0.5)


@given(sigma=st.floats(0.01, 1.0), fraction=st.floats(0.0, 0.99))
def test_eta_zero_is_the_euler_step(sigma, fraction):
    sample, velocity = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    sigma_next = sigma * fraction
    transition = flow.cps_transition(sample, velocity, sigma, sigma_next, 0.0)
    torch.testing.assert_close(transition.mean_Bchw, sample + (sigma_next - sigma) * velocity)
    assert transition.std.item() == 0


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
def test_last_step_is_the_clean_prediction_for_every_eta(eta):
    sample, velocity = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    transition = flow.cps_transition(sample, velocity, 0.5, 0.0, eta)
    assert torch.equal(transition.sample(draw(2, 3, 2, 2, seed=2)), flow.clean_prediction(sample, velocity, 0.5))
    assert transition.std.item() == 0


def test_eta_one_renoises_the_clean_prediction():
    sample, velocity, noise = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1), draw(2, 3, 2, 2, seed=2)
    actual = flow.cps_transition(sample, velocity, 0.75, 0.5, 1.0).sample(noise)
    expected = flow.add_noise(flow.clean_prediction(sample, velocity, 0.75), noise, 0.5)
    torch.testing.assert_close(actual, expected)


@given(sigma=st.floats(0.0, 1.0))
def test_predictions_invert_the_flow(sigma):
    clean, noise = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    sample = flow.add_noise(clean, noise, sigma)
    torch.testing.assert_close(flow.clean_prediction(sample, noise - clean, sigma), clean)
    torch.testing.assert_close(flow.noise_prediction(sample, noise - clean, sigma), noise)


def test_one_level_per_sample_equals_each_sample_on_its_own():
    sample, velocity, noise = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1), draw(3, 2, 2, 2, seed=2)
    sigmas, next_sigmas = torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.5, 0.25, 0.0])
    together = flow.cps_transition(sample, velocity, sigmas, next_sigmas, 0.9)
    assert together.std.shape == (3, 1, 1, 1)
    for row in range(3):
        one = slice(row, row + 1)
        alone = flow.cps_transition(sample[one], velocity[one], sigmas[row].item(), next_sigmas[row].item(), 0.9)
        assert torch.equal(together.sample(noise)[one], alone.sample(noise[one]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    sample, velocity = draw(1, 2, 2, 2, dtype=dtype), draw(1, 2, 2, 2, seed=1, dtype=dtype)
    half = flow.cps_transition(sample, velocity, 0.9, 0.75, 0.9)
    full = flow.cps_transition(sample.float(), velocity.float(), 0.9, 0.75, 0.9)
    assert half.mean_Bchw.dtype == half.std.dtype == torch.float32
    assert torch.equal(half.mean_Bchw, full.mean_Bchw)
    assert flow.surrogate_log_density(half.mean_Bchw, sample).dtype == torch.float32


# ── densities ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_densities_by_hand():
    mean, points = torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    assert flow.surrogate_log_density(mean, points).tolist() == [-5.0]
    expected = -0.5 * (0.25 + 2.25) - 2 * math.log(2) - math.log(2 * math.pi)
    assert flow.gaussian_log_density(mean, 2.0, points).item() == pytest.approx(expected)


def test_surrogate_is_the_scaled_gaussian_without_its_constant():
    mean, first, second = draw(3, 2, 2, 2), draw(3, 2, 2, 2, seed=1), draw(3, 2, 2, 2, seed=2)
    std, size = 0.7, 8
    exact = flow.gaussian_log_density(mean, std, first) - flow.gaussian_log_density(mean, std, second)
    surrogate = flow.surrogate_log_density(mean, first) - flow.surrogate_log_density(mean, second)
    torch.testing.assert_close(surrogate, exact * 2 * std**2 / size)


def test_density_gradients_agree_with_finite_differences():
    mean, points = draw(2, 2, 2, 2).requires_grad_(), draw(2, 2, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda m: flow.surrogate_log_density(m, points), (mean,))
    assert torch.autograd.gradcheck(lambda m: flow.gaussian_log_density(m, 0.6, points), (mean,))


def test_transition_gradient_agrees_with_finite_differences():
    sample, velocity, noise = draw(2, 2, 1, 1), draw(2, 2, 1, 1, seed=1).requires_grad_(), draw(2, 2, 1, 1, seed=2)
    assert torch.autograd.gradcheck(lambda v: flow.cps_transition(sample, v, 0.9, 0.5, 0.9).sample(noise), (velocity,))


# ── sub-intervals ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(start=st.floats(0.0, 0.95), fraction=st.floats(0.02, 1.0))
def test_renoising_keeps_the_flow(start, fraction):
    """(1 - s) x0 + s eps, renoised, is (1 - t) x0 plus noise of variance a^2 s^2 + w^2 = t^2."""
    end = start + (1 - start) * fraction
    keep, scale = flow.renoise_coefficients(*torch.tensor([start, end], dtype=torch.float64))
    assert (keep * (1 - start)).item() == pytest.approx(1 - end, abs=1e-12)
    assert (keep**2 * start**2 + scale**2).item() == pytest.approx(end**2, rel=1e-9)


def test_ambient_target_from_a_clean_sample_is_the_velocity():
    clean, noise = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    scaled_target, scale = flow.ambient_target(clean, noise, 0.0, 0.4)
    assert scale.item() == pytest.approx(0.4)
    torch.testing.assert_close(scaled_target / scale, noise - clean)


@given(start=st.floats(0.0, 0.9), fraction=st.floats(0.05, 1.0), variance=st.floats(0.1, 4.0))
def test_ambient_target_regresses_to_the_velocity(start, fraction, variance):
    """For Gaussian x0 the regression slope of v* on x_t must be that of eps - x0, whatever s is.

    x_s and z are independent with variances S = (1 - s)^2 C + s^2 and 1, and both maps are linear, so their
    coefficients (read off unit inputs) give the covariance: Cov(v*, x_t) = t - (1 - t) C = Cov(eps - x0, x_t).
    """
    end = start + (1 - start) * fraction
    from_start, from_noise = (scalar_image(1.0), scalar_image(0.0)), (scalar_image(0.0), scalar_image(1.0))
    start_variance = (1 - start) ** 2 * variance + start**2
    covariance = 0.0
    for (x_start, noise), weight in ((from_start, start_variance), (from_noise, 1.0)):
        scaled_target, scale = flow.ambient_target(x_start, noise, start, end)
        covariance += weight * (scaled_target / scale * flow.renoise(x_start, noise, start, end)).item()
    assert covariance == pytest.approx(end - (1 - end) * variance, rel=1e-6, abs=1e-9)


@given(start=st.floats(0.0, 0.97), uniform=st.floats(0.0, 1.0))
def test_renoise_level_stays_above_the_start_and_inside_the_clamp(start, uniform):
    level = flow.sample_renoise_level(torch.tensor([uniform], dtype=torch.float64), start).item()
    assert 0.02 <= level <= 0.98
    assert level > start
    assert level == pytest.approx(min(max(start + 0.01 + (0.99 - start) * uniform, 0.02), 0.98))


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(steps=st.integers(1, 50), shift=st.floats(0.5, 12.0))
def test_schedules_descend_from_one_to_zero(steps, shift):
    sigmas = flow.static_shift_sigmas(steps, shift)
    assert (len(sigmas), sigmas[0], sigmas[-1]) == (steps + 1, 1.0, 0.0)
    assert list(sigmas) == sorted(sigmas, reverse=True)
    assert flow.exponential_shift_sigmas(steps, math.log(shift)) == pytest.approx(sigmas)


def test_flux2_mu_leaves_the_step_count_out_for_many_tokens():
    assert flow.flux2_mu(5000, 4) == flow.flux2_mu(5000, 50) == pytest.approx(0.00016927 * 5000 + 0.45666666)
    assert flow.flux2_mu(1024, 200) == pytest.approx(0.00016927 * 1024 + 0.45666666)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

IMAGE = torch.zeros(2, 1, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.cps_transition(IMAGE, IMAGE, 0.5, 0.5, 0.9), r"sigma_next = 0\.5 must be below"),
        (lambda: flow.cps_transition(IMAGE, IMAGE, 1.2, 0.5, 0.9), r"sigma = 1\.2 is not a noise level"),
        (lambda: flow.cps_transition(IMAGE, IMAGE, math.nan, 0.5, 0.9), "sigma = nan"),
        (lambda: flow.cps_transition(IMAGE, IMAGE, 0.9, 0.5, 1.5), r"eta = 1\.5"),
        (lambda: flow.cps_transition(IMAGE, IMAGE[:1], 0.9, 0.5, 0.9), r"velocity_Bchw \[1, 1, 1, 1\]"),
        (lambda: flow.cps_transition(IMAGE, IMAGE, torch.ones(3), 0.5, 0.9), r"sigma has shape \[3\]"),
        (lambda: flow.cps_transition(IMAGE, IMAGE, 0.9, 0.5, 0.9).sample(IMAGE[:1]), "noise_Bchw"),
        (lambda: flow.surrogate_log_density(IMAGE[0], IMAGE[0]), "rank 4"),
        (lambda: flow.gaussian_log_density(IMAGE, 0.0, IMAGE), "deterministic step has no density"),
        (lambda: flow.renoise(IMAGE, IMAGE, 0.5, 0.4), "must be above sigma_start"),
        (lambda: flow.ambient_target(IMAGE, IMAGE, 0.5, 0.5), "must be above sigma_start"),
        (lambda: flow.sample_renoise_level(torch.zeros(2), 0.99), "no room to renoise"),
        (lambda: flow.static_shift_sigmas(0, 3.0), "num_steps = 0"),
        (lambda: flow.static_shift_sigmas(4, 0.0), r"shift = 0\.0"),
    ],
)
def test_impossible_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
