"""Fixed points of the method's losses, against a closed form: a Gaussian teacher N(mu, C), a linear reward a . x.

**Stage 1.** A generator whose every state x_s has the teacher's distribution at s is a fixed point of AC-DMD: fake
score and teacher then agree everywhere. An affine four-step generator can be exact (`exact_steps`), so training must
reach mean mu and covariance C.

**Stage 2, the force of distribution matching.** At s = 0, without normaliser, the loss has the gradient g / (B d) in a
sample x of dimension d, with g = E_fake[x0 | x_t] - E_teacher[x0 | x_t], x_t = (1 - t) x + t z. For a student N(m, C)
the two posterior means differ by a constant: with S_t = (1 - t)^2 C + t^2 I,

    g = (I - (1 - t)^2 C S_t^-1)(m - mu) = t^2 S_t^-1 (m - mu),      E_t[g] = K (m - mu),   K = E_t[t^2 S_t^-1].

**Back-propagation.** The hinge, active everywhere, adds -lambda a / B. With matching weight w the forces on the mean
cancel at

    m - mu = (lambda d / w) K^-1 a,                                                                      (1)

and g being the same for every sample, so do those on every linear map of the samples: the covariance stays C. The
tilted teacher p exp(beta r) is N(mu + beta C a, C): the same covariance, the mean moved along C a. (1) is that tilt

- in every direction a as the renoise level t goes to 0, where the matching gradient is that of the exact KL: there
  K^-1 = ((1 - t)^2 C + t^2 I) / t^2, so beta = lambda d (1 - t)^2 / (w t^2), up to t^2 a;
- for every distribution of t when a is an eigenvector of C: K is a function of C, so K^-1 a lies along a and C a.

**SubGRPO.** Let one bias delta, added to the velocity of all steps, be all that is trained, from the exact generator.
It moves only means. The surrogate of selected step j has the gradient -(2 / d) kappa_j std_j z_j in delta, and the
advantage is c / std(c), c the reward minus its group's mean. What z_j adds to the reward is std_j (R_j a) . z_j, R_j
the product of the later linear maps (symmetric here), so that with groups of G, and V the reward's variance within a
group (from the initial noise and the selected steps alone: the other noise is shared),

    E[A z_j] = std_j R_j a sqrt((G - 1) / G) / sqrt(V).

The final step moves by -sigma_last delta, so matching, hinge and the policy loss of weight p cancel at

    (w / d) sigma_last K (m - mu) = lambda sigma_last a                                                  (2)
                                    + p (2 / d) mean_subsets sum_j kappa_j std_j^2 R_j a sqrt((G - 1) / G) / sqrt(V).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from common.flow import (
    ambient_target,
    cps_transition,
    renoise,
    sample_renoise_level,
    static_shift_sigmas,
    surrogate_log_density,
)
from common.seeding import selected_steps
from learner.objectives.ac_dmd import distribution_matching_loss, fake_score_loss
from learner.objectives.advantage import group_advantages
from learner.objectives.reward_gradient import attach_gradient, reward_hinge_loss
from learner.objectives.subgrpo import subgrpo_loss
from tests.helpers.gaussian_world import (
    AffineGenerator,
    Gaussian,
    exact_steps,
    teachers_own_steps,
    to_latent,
    to_vector,
)

DTYPE = torch.float64
FACTOR = torch.tensor([[1.0, 0.5, -0.3], [0.0, 0.8, 0.4], [0.0, 0.0, 0.6]], dtype=DTYPE)
TEACHER = Gaussian(torch.tensor([1.0, -0.5, 2.0], dtype=DTYPE), FACTOR @ FACTOR.T)
DIMENSION = 3
SIGMAS, ETA = static_shift_sigmas(4, 3.0), 0.9
LAST = len(SIGMAS) - 2
FAR = 1e3  # a hinge target that no sample reaches
GENERAL = torch.tensor([0.6, -0.8, 0.5], dtype=DTYPE)
EIGENVECTOR = torch.linalg.eigh(TEACHER.covariance_cc)[1][:, 2]


class Draws:
    """Standard normal noise [B, c, 1, 1] whose sample moments are exact: mean 0, covariance I, also between draws.

    An affine world only sees these moments, so its equilibrium is not blurred by sampling.
    """

    def __init__(self, seed: int, batch: int) -> None:
        self.generator, self.batch = torch.Generator().manual_seed(seed), batch

    def uniform(self) -> Tensor:
        return torch.rand((), generator=self.generator, dtype=DTYPE)

    def uniforms(self) -> Tensor:
        """One level per sample, one in each of B equal strata of [0, 1]."""
        return (torch.arange(self.batch, dtype=DTYPE) + self.uniform()) / self.batch

    def normals(self, count: int) -> list[Tensor]:
        raw = torch.randn(self.batch, count * DIMENSION, generator=self.generator, dtype=DTYPE)
        exact = torch.linalg.qr(raw - raw.mean(dim=0))[0] * math.sqrt(self.batch)
        return [to_latent(part) for part in exact.split(DIMENSION, dim=1)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def projections(sample: Tensor, noise: Tensor, start: float, level: Tensor, fake: Gaussian) -> tuple[Tensor, Tensor]:
    """Renoise to t, then one CPS transition back with the fake score and one with the teacher, with the same noise."""
    with torch.no_grad():
        renoised = renoise(sample, noise, start, level)
        velocities = (fake.velocity(renoised, level), TEACHER.velocity(renoised, level))
        back = [cps_transition(renoised, velocity, level, start, ETA).sample(noise) for velocity in velocities]
    return back[0], back[1]


# ── stage 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("start", "level"), [(0.0, 0.3), (0.5, 0.55), (0.75, 0.9), (0.9, 0.98)])
def test_fake_loss_is_least_at_the_students_own_velocity(start, level):
    """With exact moments the least squares solution is the closed-form regression, for clean and for noisy samples."""
    student = Gaussian(torch.tensor([0.3, 1.0, -2.0], dtype=DTYPE), FACTOR.T @ FACTOR).noisy(start)
    first, noise = Draws(seed=0, batch=64).normals(2)
    root = torch.linalg.cholesky(student.covariance_cc)
    sample = to_latent(to_vector(first) @ root.T + student.mean_c)
    target, scale = ambient_target(sample, noise, start, level)
    renoised = renoise(sample, noise, start, level)
    slope = torch.zeros(DIMENSION, DIMENSION, dtype=DTYPE, requires_grad=True)
    offset = torch.zeros(DIMENSION, dtype=DTYPE, requires_grad=True)
    best = student.velocity(renoised, torch.tensor(level, dtype=DTYPE))
    fake_score_loss(best + to_latent(to_vector(renoised) @ slope.T + offset), target, scale, 10.0).value.backward()
    assert slope.grad.abs().max() < 1e-9
    assert offset.grad.abs().max() < 1e-9


class TrainedFakeScore:
    """One Gaussian of images for each interval between the generator's levels, seen through `Gaussian.velocity`.

    One for all levels would not do: it would pin down only the mixture of what the four steps make.
    """

    def __init__(self) -> None:
        self.edges = torch.tensor(sorted(SIGMAS[1:-1]), dtype=DTYPE)
        self.means = TEACHER.mean_c.repeat(len(SIGMAS) - 1, 1).requires_grad_()
        self.factors = torch.linalg.cholesky(TEACHER.covariance_cc).repeat(len(SIGMAS) - 1, 1, 1).requires_grad_()

    def at(self, level: Tensor) -> Gaussian:
        interval = int(torch.bucketize(level, self.edges))
        return Gaussian(self.means[interval], self.factors[interval] @ self.factors[interval].T)


def train_cold_start(iterations: int, student_every: int, rate: float) -> AffineGenerator:
    """AC-DMD as METHOD has it: random step, fake score every iteration, student every few."""
    student, fake, draws = teachers_own_steps(TEACHER, SIGMAS, ETA), TrainedFakeScore(), Draws(seed=0, batch=32)
    groups = ([student.weights_Tcc.requires_grad_(), student.biases_Tc.requires_grad_()], [fake.means, fake.factors])
    student_optimizer, fake_optimizer = (torch.optim.Adam(g, lr=rate, betas=(0.5, 0.99), fused=True) for g in groups)
    for iteration in range(iterations):
        for optimizer in (student_optimizer, fake_optimizer):
            optimizer.param_groups[0]["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * iteration / iterations))
        step = int(draws.uniform() * student.num_steps)
        initial, *noises, noise = draws.normals(step + 3)
        with torch.no_grad():
            state = initial
            for earlier in range(step):
                state = student.transition(state, earlier).sample(noises[earlier])
        sample, start = student.transition(state, step).sample(noises[step]), SIGMAS[step + 1]
        level = sample_renoise_level(draws.uniform()[None], start)[0]
        renoised = renoise(sample.detach(), noise, start, level)
        velocity = fake.at(level).velocity(renoised, level)
        fake_optimizer.zero_grad()
        fake_score_loss(velocity, *ambient_target(sample.detach(), noise, start, level), 10.0).value.backward()
        fake_optimizer.step()
        if iteration % student_every == 0:
            back = projections(sample.detach(), noise, start, level, fake.at(level))
            student_optimizer.zero_grad()
            distribution_matching_loss(sample, *back).value.backward()
            student_optimizer.step()
    return student


def test_the_exact_generator_is_a_fixed_point_at_every_step():
    student = exact_steps(TEACHER, SIGMAS, ETA)
    draws = Draws(seed=1, batch=64)
    for step in range(student.num_steps):
        reached, wanted = student.state(step + 1), TEACHER.noisy(SIGMAS[step + 1])
        torch.testing.assert_close(reached.mean_c, wanted.mean_c)
        torch.testing.assert_close(reached.covariance_cc, wanted.covariance_cc)
        first, noise = draws.normals(2)
        sample = (first + 3.0).requires_grad_()  # anywhere
        level_B = sample_renoise_level(draws.uniforms(), SIGMAS[step + 1])
        back = projections(sample.detach(), noise, SIGMAS[step + 1], level_B, reached)
        distribution_matching_loss(sample, *back).value.backward()
        assert sample.grad.abs().max() < 1e-9


def test_cold_start_recovers_the_teachers_mean_and_covariance():
    before = teachers_own_steps(TEACHER, SIGMAS, ETA).state(4)
    assert relative_error(before.covariance_cc, TEACHER.covariance_cc) > 0.6  # four steps alone lose most of the spread
    after = train_cold_start(iterations=1500, student_every=3, rate=0.03).state(4)
    assert relative_error(after.mean_c, TEACHER.mean_c) < 0.03
    assert relative_error(after.covariance_cc, TEACHER.covariance_cc) < 0.03


# ── stage 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def matching_stiffness(levels: Tensor) -> Tensor:
    """K = E_t[t^2 S_t^-1], the mean over the given levels."""
    return torch.stack([t**2 * torch.linalg.inv(TEACHER.noisy(float(t)).covariance_cc) for t in levels]).mean(dim=0)


def all_levels() -> Tensor:
    """Midpoints of the uniform draw: a quadrature over the renoise level's distribution at s = 0."""
    return sample_renoise_level((torch.arange(2000, dtype=DTYPE) + 0.5) / 2000, 0.0)


def served_reward(sample: Tensor, direction_c: Tensor) -> Tensor:
    """The reward a . x with its gradient, as a reward server answers."""
    scores_B = (to_vector(sample) @ direction_c).detach()
    return attach_gradient(scores_B, to_latent(direction_c.expand(len(sample), -1)), sample)


def final_step_loss(
    sample: Tensor, noise: Tensor, level_B: Tensor, fake: Gaussian, direction_c: Tensor, weights: tuple[float, float]
) -> Tensor:
    """matching weight x AC-DMD + reward weight x hinge on the final, clean samples."""
    matching, reward = weights
    back = projections(sample.detach(), noise, 0.0, level_B, fake)
    hinge = reward_hinge_loss({"linear": served_reward(sample, direction_c)}, {"linear": 1.0}, FAR)
    return matching * distribution_matching_loss(sample, *back, normalize=False).value + reward * hinge.value


def train_by_back_propagation(direction_c: Tensor, weights: tuple[float, float], lowest_level: bool) -> Gaussian:
    """Train the final step's affine map; return the student averaged over the second half of the run."""
    student, draws = exact_steps(TEACHER, SIGMAS, ETA), Draws(seed=2, batch=64)
    parameters = [student.weights_Tcc.requires_grad_(), student.biases_Tc.requires_grad_()]
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    root, before = torch.linalg.cholesky(student.state(LAST).covariance_cc), student.state(LAST).mean_c
    means, covariances = [], []
    for iteration in range(220):
        first, noise = draws.normals(2)
        sample = student.transition(to_latent(to_vector(first) @ root.T + before), LAST).mean_Bchw
        level_B = sample_renoise_level(torch.zeros(draws.batch) if lowest_level else draws.uniforms(), 0.0)
        now = student.state(LAST + 1)
        optimizer.zero_grad()
        final_step_loss(sample, noise, level_B, now, direction_c, weights).backward()
        optimizer.step()
        if iteration >= 120:
            means.append(now.mean_c)
            covariances.append(now.covariance_cc)
    return Gaussian(torch.stack(means).mean(dim=0), torch.stack(covariances).mean(dim=0))


@pytest.mark.parametrize("direction_c", [EIGENVECTOR, GENERAL], ids=["eigenvector", "general"])
def test_back_propagation_moves_the_mean_by_what_the_weights_predict(direction_c):
    matching, reward = 1.0, 0.1
    student = train_by_back_propagation(direction_c, (matching, reward), lowest_level=False)
    stiffness = matching_stiffness(all_levels())
    predicted = reward * DIMENSION / matching * torch.linalg.solve(stiffness, direction_c)
    assert predicted.norm() > 0.5
    assert relative_error(student.mean_c - TEACHER.mean_c, predicted) < 0.05
    assert relative_error(student.covariance_cc, TEACHER.covariance_cc) < 0.05
    if direction_c is EIGENVECTOR:
        along = TEACHER.covariance_cc @ direction_c
        assert torch.cosine_similarity(student.mean_c - TEACHER.mean_c, along, dim=0) > 0.998


def test_back_propagation_at_the_lowest_level_is_the_tilted_teacher_in_any_direction():
    level = 0.02
    matching, beta = 1 / level**2, 1.0
    reward = beta * matching * level**2 / (DIMENSION * (1 - level) ** 2)
    student = train_by_back_propagation(GENERAL, (matching, reward), lowest_level=True)
    tilt = beta * TEACHER.covariance_cc @ GENERAL
    assert relative_error(student.mean_c - TEACHER.mean_c, tilt) < 0.05
    assert relative_error(student.covariance_cc, TEACHER.covariance_cc) < 0.05


GROUPS, GROUP_SIZE = 64, 16
STOCHASTIC_STEPS, SELECTED = 3, 2


def rollout(student: AffineGenerator, selected: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """States 0 .. T of all groups; noise is each sample's own at the start and on selected steps, else the group's."""

    def noise(shared: bool) -> Tensor:
        own = 1 if shared else GROUP_SIZE
        drawn = torch.randn(GROUPS, own, DIMENSION, generator=generator, dtype=DTYPE)
        return to_latent(drawn.expand(GROUPS, GROUP_SIZE, DIMENSION).reshape(-1, DIMENSION))

    states = [noise(shared=False)]
    for step in range(student.num_steps):
        states.append(student.transition(states[-1], step).sample(noise(shared=step not in selected)))
    return states


def later_maps(student: AffineGenerator, step: int) -> Tensor:
    """R_j: what a displacement after step j becomes in the final sample."""
    product = torch.eye(DIMENSION, dtype=DTYPE)
    for later in range(step + 1, student.num_steps):
        product = student.linear_map(later) @ product
    return product


def predicted_shift(direction_c: Tensor, weights: tuple[float, float], policy_weight: float) -> Tensor:
    """Equation (2) of the module's docstring."""
    student, (matching, reward) = exact_steps(TEACHER, SIGMAS, ETA), weights
    subsets = [(0, 1), (0, 2), (1, 2)]
    initial = (later_maps(student, -1).T @ direction_c).square().sum()
    # All maps are symmetric (functions of C), so R_j a = R_j^T a.
    pulls = [later_maps(student, step).T @ direction_c for step in range(STOCHASTIC_STEPS)]
    force = reward * SIGMAS[LAST] * direction_c
    for subset in subsets:
        variance = initial + sum(student.std(step) ** 2 * pulls[step].square().sum() for step in subset)
        for step in subset:
            gain = student.velocity_weight(step) * student.std(step) ** 2 * math.sqrt((GROUP_SIZE - 1) / GROUP_SIZE)
            force = force + policy_weight * 2 / DIMENSION * gain * pulls[step] / variance.sqrt() / len(subsets)
    stiffness = matching / DIMENSION * SIGMAS[LAST] * matching_stiffness(all_levels())
    return torch.linalg.solve(stiffness, force)


def train_hybrid(direction_c: Tensor, weights: tuple[float, float], policy_weight: float) -> Tensor:
    """Stage 2 with one shared bias as all parameters; return the mean shift averaged over the last 150 iterations."""
    frozen, draws = exact_steps(TEACHER, SIGMAS, ETA), Draws(seed=3, batch=GROUPS * GROUP_SIZE)
    shared_bias = torch.zeros(DIMENSION, dtype=DTYPE, requires_grad=True)
    optimizer = torch.optim.SGD([shared_bias], lr=3.0)
    shifts = []
    for iteration in range(250):
        student = AffineGenerator(SIGMAS, ETA, frozen.weights_Tcc, frozen.biases_Tc + shared_bias)
        selected = selected_steps(0, iteration, STOCHASTIC_STEPS, SELECTED)
        with torch.no_grad():
            states = rollout(student, selected, draws.generator)
        rewards_PG = (to_vector(states[-1]) @ direction_c).reshape(GROUPS, GROUP_SIZE)
        advantages_B = group_advantages({"linear": rewards_PG}, {"linear": 1.0}, "batch", 5.0).flatten()
        sample = student.transition(states[LAST], LAST).mean_Bchw
        level_B = sample_renoise_level(draws.uniforms(), 0.0)
        now = student.state(LAST + 1)
        loss = final_step_loss(sample, draws.normals(1)[0], level_B, now, direction_c, weights)
        for step in selected:
            surrogate_B = surrogate_log_density(student.transition(states[step], step).mean_Bchw, states[step + 1])
            policy = subgrpo_loss(surrogate_B, surrogate_B.detach(), advantages_B, 1e-5, 1e-5)
            loss = loss + policy_weight * policy.value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration >= 100:
            shifts.append(now.mean_c - TEACHER.mean_c)
    return torch.stack(shifts).mean(dim=0)


@pytest.mark.parametrize(
    ("direction_c", "reward"), [(EIGENVECTOR, 0.0), (GENERAL, 0.2)], ids=["policy-eigenvector", "hybrid-general"]
)
def test_policy_gradient_moves_the_mean_by_what_the_weights_predict(direction_c, reward):
    weights, policy_weight = (1.0, reward), 0.7
    predicted = predicted_shift(direction_c, weights, policy_weight)
    assert predicted.norm() > 0.5
    actual = train_hybrid(direction_c, weights, policy_weight)
    assert relative_error(actual, predicted) < 0.05
    if direction_c is EIGENVECTOR:
        along = TEACHER.covariance_cc @ direction_c
        assert torch.cosine_similarity(actual, along, dim=0) > 0.998
