"""Stage 2 by its real trainer, in a world whose answers are known on paper (`tests/helpers/gaussian_backbone.py`).

A sample is N pixels of c channels, d = c N. The reward is linear in the mean pixel: a . x_bar in latents, the decoder's
factor included. The student is the exact generator of N(mu, C), mu the guided teacher's mean, so that its state m_j
before step j and its samples are known; kappa_j, std_j and the products R_j of later maps are as in
`test_gaussian_fixed_point`. Only b_j is derived: the gradient in W_j is that in b_j times m_j, the rest being odd
moments of Gaussians.

**Back-propagation.** A hinge active everywhere adds -lambda a / (B N) to the loss's gradient in a pixel. The final step
subtracts sigma_last b_last from it, so over all pixels b_last gets lambda sigma_last a.

**Matching.** A fake score N(mu + D, C) differs from the teacher by g = t^2 S_t^-1 D in every pixel, with
S_t = (1 - t)^2 C + t^2 I. The normaliser n is the mean of |x - x^teacher|, whose entries are Gaussian with variance
t^2 C S_t^-1 and mean t^2 S_t^-1 (m - mu) for a student N(m, C): a folded normal's mean for many pixels.
So b_last gets -(w / c) sigma_last K D with K = E_t[t^2 S_t^-1 / n_t].

**SubGRPO.** The surrogate of step j has the gradient -(2 / d) kappa_j std_j sum_n z_n in b_j. What z_bar, of variance
1 / N, adds to the reward is std_j (R_j^T a) . z_bar, and the reward's variance within a group is V / N,
V = |R_-1^T a|^2 + sum over the selected steps of std_j^2 |R_j^T a|^2. So b_j gets

    (2 / c) kappa_j std_j E[A z_bar],     E[A z_bar] = std_j R_j^T a sqrt((G - 1) / G) / sqrt(V N).

The average over m selected steps and the final one divides everything by m + 1.

**Rest.** Where matching, by a fake score that has learned the student, and back-propagation cancel, the mean has moved
by D = (lambda c / w) K^-1 a, with K at m - mu = D; the force is the same on all samples, and the covariance stays C.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.stages import AlignmentConfig
from common.types import Network, ScoredGroup
from learner.training.networks import ALIGNED, ALIGNED_FAKE_SCORE, COLD_START, FAKE_SCORE, Networks
from tests.helpers.gaussian_backbone import (
    DIRECTION,
    ETA,
    FAKE_SHAPES,
    SIGMAS,
    STEPS,
    TEACHER,
    prompted,
    student,
    student_deltas,
)
from tests.helpers.gaussian_training import (
    GUIDANCE,
    ONE_PROMPT,
    PROMPTS,
    SEED,
    Served,
    aligned_networks,
    alignment_settings,
    alignment_trainer,
    gradients,
    scattered_networks,
    scored_groups,
)
from tests.helpers.gaussian_world import AffineGenerator, exact_steps
from tests.helpers.method_by_hand import (
    Draws,
    FakeScore,
    advantages,
    assert_gradients,
    fake_score_loss,
    matching_direction,
    pixels,
    student_gradient,
    transition,
)

LAST = STEPS - 1
CHANNELS = len(DIRECTION)
A = torch.tensor([2.4, -3.2, 2.0], dtype=torch.float64)
"""Of the reward in images; a decoded image is a quarter of its latents."""
DECODED = 0.25
FAR = 1e3  # a hinge target that no sample reaches


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# ── one update by hand ───────────────────────────────────────────────────────────────────────────────────────────────

WEIGHTS = {"linear": 0.1, "square": 1.5}
SELECTED = (0, 2)
BY_HAND = {
    "reward_target": 0.665,
    "learning_rate_student": 0.02,
    "learning_rate_fake": 0.02,
    "matching_weight": 0.3,
    "reward_gradient_weight": 0.05,
    "consistency_weight": 0.4,
    "micro_batch": 3,
}


def policy_force(states: list[Tensor], students: list[AffineGenerator], step: int, advantages_B: np.ndarray) -> Tensor:
    """The gradient of -mean_b A_b surrogate_b in the transition's mean."""
    x, nothing = states[step], torch.zeros(())
    v = torch.stack([x_Nc @ s.weights_Tcc[step].T + s.biases_Tc[step] for s, x_Nc in zip(students, x, strict=True)])
    deviation = states[step + 1] - transition(x, v, SIGMAS[step], SIGMAS[step + 1], nothing)
    return -torch.as_tensor(advantages_B)[:, None, None] * 2 * deviation / deviation.numel()


def hinge_force(sample: Tensor, target: float, clip: float | None) -> Tensor:
    """The gradient of mean relu(target - weighted sum) in the latents, each sample's own part clipped."""
    images = 0.5 + DECODED * sample
    linear, square = WEIGHTS["linear"], WEIGHTS["square"]
    reward_B = linear * (images.mean(dim=1) @ A) + square * images.square().mean(dim=(1, 2))
    each = -DECODED * (linear * A / images.shape[1] + square * 2 * images / images[0].numel())
    norms = each.flatten(1).norm(dim=1)
    if clip is not None:
        assert norms.min() < clip < norms.max()
        each = each * (clip / norms).clamp(max=1)[:, None, None]
    active = reward_B < target
    assert 0 < active.sum() < len(active)
    return each * active[:, None, None] / len(sample)


def flattened(groups: list[ScoredGroup]) -> tuple[list[float], list[Tensor]]:
    """Every sample's prompt, and the states of all samples: row b is sample b % G of group b // G."""
    words = [float(group.trajectory.prompt.text) for group in groups for _ in range(group.trajectory.group_size)]
    states_SBchw = torch.cat([torch.tensor(group.trajectory.latents_SGchw) for group in groups], dim=1)
    return words, [pixels(state) for state in states_SBchw]


def final_gradient(
    fake: FakeScore, sample: Tensor, words: list[float], draws: Draws, settings: AlignmentConfig
) -> Tensor:
    """The gradient of matching and hinge in the final samples."""
    direction = matching_direction(fake, sample, 0.0, words, draws, GUIDANCE).detach()
    force = settings.matching_weight * direction / direction.numel()
    if settings.reward_gradient_weight == 0:
        return force
    hinge = hinge_force(sample, settings.reward_target, settings.reward_gradient_clip)
    return force + settings.reward_gradient_weight * hinge


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward_gradient_clip": 0.0757, "reward_gradient_weight": 5.0, "policy_gradient": "none"},
        {"reward_gradient_weight": 0.0},
    ],
    ids=["all", "clipped-hinge", "policy-and-matching"],
)
def test_the_students_gradient_by_hand(changes: dict[str, object]) -> None:
    """The fake score that judges the student is the one this iteration has already updated."""
    settings, served = alignment_settings(**BY_HAND | changes), Served(A, ("linear", "square"))
    networks = scattered_networks(settings)
    groups = scored_groups(networks, 7, settings, served, PROMPTS, SELECTED)
    words, states = flattened(groups)
    students = [student(networks.backbone, word) for word in words]
    alignment_trainer(networks, settings, WEIGHTS, served).update(groups)

    draws = Draws(SEED, "alignment/student", 7, len(words), networks.backbone.latent_shape)
    final = final_gradient(FakeScore.of(networks.backbone), states[-1], words, draws, settings)
    terms = [student_gradient(final, states, LAST)]
    if settings.policy_gradient != "none":
        rewards_PG = {name: np.stack([group.rewards_G[name] for group in groups]).astype(float) for name in WEIGHTS}
        advantages_B = advantages(rewards_PG, WEIGHTS).flatten()
        terms += [student_gradient(policy_force(states, students, j, advantages_B), states, j) for j in SELECTED]
    actual = gradients(networks, Network.STUDENT)
    assert_gradients(actual, {key: sum(term[key] for term in terms) / len(terms) for key in actual})
    assert actual["bias"][1].abs().max() == 0  # the stochastic step that was not selected


def test_the_fake_scores_gradient_by_hand() -> None:
    """It learns on the final states, from level 0, with this stage's own consistency weight."""
    settings = alignment_settings(**BY_HAND)
    networks, served = scattered_networks(settings), Served(A, ("linear",))
    groups = scored_groups(networks, 7, settings, served, PROMPTS)
    words, states = flattened(groups)
    fake = FakeScore.of(networks.backbone)
    draws = Draws(SEED, "alignment/fake", 7, len(words), networks.backbone.latent_shape)
    fake_score_loss(fake, states[-1], 0.0, words, draws, 0.4).backward()
    alignment_trainer(networks, settings, WEIGHTS, served).update(groups)
    assert_gradients(gradients(networks, Network.FAKE_SCORE), fake.gradients())


def test_each_stage_begins_its_adapters_at_its_own_width() -> None:
    networks = scattered_networks(alignment_settings(lora_init_std=0.7))
    expected = {COLD_START: None, FAKE_SCORE: None, ALIGNED: 0.7, ALIGNED_FAKE_SCORE: 0.7}
    assert networks.backbone.adapters.widths == expected


# ── expected gradients in closed form ────────────────────────────────────────────────────────────────────────────────

SIDE = 8
PIXELS = SIDE * SIDE
GROUPS, GROUP_SIZE = 4, 16
ITERATIONS = 60
PULL = DECODED * A
"""a of the docstring: the reward's gradient in the mean latent pixel."""
TILTED = prompted(GUIDANCE)
OFFSET = torch.tensor([0.3, 0.2, -0.25], dtype=torch.float64)
"""D: what the fake score's mean is ahead of the guided teacher's."""
NOTHING = {"policy_gradient": "none", "matching_weight": 0.0, "reward_gradient_weight": 0.0}
PARTS = {
    "policy": {"policy_gradient": "subgrpo"},
    "matching": {"matching_weight": 0.3},
    "back-propagation": {"reward_gradient_weight": 0.2},
}


def exact_student() -> AffineGenerator:
    return exact_steps(TILTED, SIGMAS, ETA)


def exact_networks(offset_c: Tensor, settings: AlignmentConfig, side: int = SIDE) -> Networks:
    """The student is exact for the guided teacher; the fake score's mean is `offset_c` ahead of it."""
    fake = {key: torch.zeros(shape) for key, shape in FAKE_SHAPES.items()}
    fake["mean"] += ((GUIDANCE - 1) * DIRECTION + offset_c).float()
    return aligned_networks(settings, student_deltas(exact_student(), 1.0), fake, side)


def stiffness(shift_c: Tensor) -> Tensor:
    """K of a student whose mean is `shift_c` off the teacher's, by quadrature over the renoise level."""
    total = torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
    levels = [min(max(0.01 + 0.99 * (place + 0.5) / 400, 0.02), 0.98) for place in range(400)]
    for t in levels:
        inverse_cc = torch.linalg.inv((1 - t) ** 2 * TEACHER.covariance_cc + t**2 * torch.eye(CHANNELS).double())
        mean_c = t**2 * inverse_cc @ shift_c
        deviation_c = (t**2 * TEACHER.covariance_cc @ inverse_cc).diagonal().sqrt()
        folded_c = deviation_c * math.sqrt(2 / math.pi) * (-(mean_c**2) / (2 * deviation_c**2)).exp()
        folded_c += mean_c * torch.erf(mean_c / (deviation_c * math.sqrt(2)))
        total += t**2 * inverse_cc / folded_c.mean()
    return total / len(levels)


def later_pull(generator: AffineGenerator, step: int) -> Tensor:
    """R_j^T a: what the reward gains by a displacement after step j."""
    pull_c = PULL
    for later in reversed(range(step + 1, STEPS)):
        pull_c = generator.linear_map(later).T @ pull_c
    return pull_c


def policy_bias_gradient(selected: tuple[int, ...]) -> Tensor:
    generator = exact_student()
    pulls = {step: later_pull(generator, step) for step in (-1, *selected)}
    spread = pulls[-1].square().sum() + sum(generator.std(j) ** 2 * pulls[j].square().sum() for j in selected)
    bias_Tc = torch.zeros(STEPS, CHANNELS, dtype=torch.float64)
    for step in selected:
        followed_c = generator.std(step) * pulls[step] * math.sqrt((GROUP_SIZE - 1) / GROUP_SIZE)
        gain = 2 / CHANNELS * generator.velocity_weight(step) * generator.std(step)
        # The loss is minimised: b_j is subtracted, so a lower b_j is a higher reward.
        bias_Tc[step] = gain * followed_c / (spread * PIXELS).sqrt()
    return bias_Tc


def predicted_gradient(parts: tuple[str, ...], selections: list[tuple[int, ...]]) -> dict[str, Tensor]:
    bias_Tc = torch.zeros(STEPS, CHANNELS, dtype=torch.float64)
    if "matching" in parts:
        force_c = stiffness(torch.zeros(CHANNELS).double()) @ OFFSET / CHANNELS
        bias_Tc[LAST] -= PARTS["matching"]["matching_weight"] * SIGMAS[LAST] * force_c
    if "back-propagation" in parts:
        bias_Tc[LAST] += PARTS["back-propagation"]["reward_gradient_weight"] * SIGMAS[LAST] * PULL
    if "policy" in parts:
        policies = torch.stack([policy_bias_gradient(selected) for selected in selections])
        bias_Tc = (bias_Tc + policies.mean(dim=0)) / (len(selections[0]) + 1)
    states_Tc = torch.stack([exact_student().state(step).mean_c for step in range(STEPS)])
    return {"bias": bias_Tc, "weight": bias_Tc[:, :, None] * states_Tc[:, None, :]}


SAMPLING = {
    "prompts_per_iteration": GROUPS,
    "group_size": GROUP_SIZE,
    "consistency_weight": 0.0,
    "reward_target": FAR,
    "micro_batch": 32,
}


@cache
def exact_groups() -> list[list[ScoredGroup]]:
    """Samples of the exact student, drawn once for all tests."""
    settings, served = alignment_settings(**SAMPLING), Served(A, ("linear",))
    networks = exact_networks(OFFSET, settings)
    return [scored_groups(networks, iteration, settings, served, ONE_PROMPT) for iteration in range(ITERATIONS)]


@pytest.mark.parametrize(
    "parts", [("policy",), ("matching",), ("back-propagation",), tuple(PARTS)], ids=lambda parts: "+".join(parts)
)
def test_the_expected_gradient_is_what_the_weights_predict(parts: tuple[str, ...]) -> None:
    changes = NOTHING | {key: value for part in parts for key, value in PARTS[part].items()}
    still = {"learning_rate_student": 0.0, "learning_rate_fake": 0.0}
    settings = alignment_settings(**SAMPLING, **changes, **still)
    networks = exact_networks(OFFSET, settings)
    trainer = alignment_trainer(networks, settings, {"linear": 1.0}, Served(A, ("linear",)))
    batches = exact_groups() if "policy" in parts else exact_groups()[:20]
    found: dict[str, Tensor] = {}
    for groups in batches:
        trainer.update(groups)
        for key, value in gradients(networks, Network.STUDENT).items():
            found[key] = found.get(key, 0) + value / len(batches)
    expected = predicted_gradient(parts, [groups[0].trajectory.plan.selected for groups in batches])
    if "policy" in parts:
        assert relative_error(found["bias"][:LAST], expected["bias"][:LAST]) < 0.1
    else:
        assert not found["bias"][:LAST].any()
    if parts != ("policy",):
        assert relative_error(found["bias"][LAST], expected["bias"][LAST]) < 0.02
        assert relative_error(found["weight"][LAST], expected["weight"][LAST]) < 0.03


# ── where training comes to rest ─────────────────────────────────────────────────────────────────────────────────────


def predicted_shift(matching: float, reward: float) -> Tensor:
    """D = (lambda c / w) K(D)^-1 a."""
    shift_c = torch.zeros(CHANNELS, dtype=torch.float64)
    for _ in range(30):
        shift_c = reward * CHANNELS / matching * torch.linalg.solve(stiffness(shift_c), PULL)
    return shift_c


def test_matching_and_back_propagation_come_to_rest_where_the_weights_predict() -> None:
    """Student and fake score are trained together, from the student at rest without reward."""
    changes = NOTHING | {"matching_weight": 1.0, "reward_gradient_weight": 0.2, "group_size": 8}
    rates = {"learning_rate_student": 0.02, "learning_rate_fake": 0.05, "prompts_per_iteration": 2}
    settings, served = alignment_settings(**SAMPLING | changes | rates), Served(A, ("linear",))
    networks = exact_networks(torch.zeros(CHANNELS), settings, side=16)
    trainer = alignment_trainer(networks, settings, {"linear": 1.0}, served)
    reached = []
    for iteration in range(140):
        trainer.update(scored_groups(networks, iteration, settings, served, ONE_PROMPT))
        reached.append(student(networks.backbone, 1.0).state(STEPS))
    predicted = predicted_shift(matching=1.0, reward=0.2)
    assert predicted.norm() > 0.5
    mean_c = torch.stack([state.mean_c for state in reached[60:]]).mean(dim=0)
    covariance_cc = torch.stack([state.covariance_cc for state in reached[60:]]).mean(dim=0)
    assert relative_error(mean_c - TILTED.mean_c, predicted) < 0.05
    assert relative_error(covariance_cc, TILTED.covariance_cc) < 0.05


# ── what the policy gradient is for ──────────────────────────────────────────────────────────────────────────────────


def fresh_reward(networks: Networks, served: Served) -> float:
    """The mean reward of prompts and noise that training never meets."""
    settings = alignment_settings(group_size=16)
    groups = scored_groups(networks, 1000, settings, served, PROMPTS[4:])
    return float(np.mean([group.rewards_G["linear"] for group in groups]))


def shuffled(groups: list[ScoredGroup], generator: np.random.Generator) -> list[ScoredGroup]:
    """The same rewards, each group's dealt out anew."""
    return [
        replace(group, rewards_G={name: generator.permutation(values) for name, values in group.rewards_G.items()})
        for group in groups
    ]


def gain_on_fresh_prompts(policy: str, *, shuffle: bool) -> float:
    """Gain in the reward of other prompts from training with the policy gradient alone."""
    changes = NOTHING | {"policy_gradient": policy, "group_size": 16, "learning_rate_student": 0.02}
    settings, served = alignment_settings(**changes), Served(A, ())
    networks = exact_networks(OFFSET, settings, side=4)
    trainer, generator = alignment_trainer(networks, settings, {"linear": 1.0}, served), np.random.default_rng(0)
    before = fresh_reward(networks, served)
    for iteration in range(20):
        groups = scored_groups(networks, iteration, settings, served, PROMPTS[:4])
        trainer.update(shuffled(groups, generator) if shuffle else groups)
    return fresh_reward(networks, served) - before


@pytest.mark.parametrize("policy", ["subgrpo", "nft"])
def test_the_policy_gradient_raises_the_reward_of_fresh_prompts_and_shuffled_advantages_do_not(policy: str) -> None:
    gain, without = (gain_on_fresh_prompts(policy, shuffle=shuffle) for shuffle in (False, True))
    assert gain > 0.1
    assert abs(without) < gain / 3


def test_the_surrogate_reward_learns_the_direction_of_the_reward() -> None:
    """Its mean moves along the reward's gradient, in all intervals together, while the student stands still."""
    changes = NOTHING | {"policy_gradient": "surrogate_reward", "group_size": 16, "prompts_per_iteration": 4}
    settings = alignment_settings(**changes, learning_rate_student=0.0, learning_rate_fake=0.01)
    networks, served = exact_networks(OFFSET, settings, side=4), Served(A, ())
    trainer = alignment_trainer(networks, settings, {"linear": 1.0}, served)
    for iteration in range(20):
        trainer.update(scored_groups(networks, iteration, settings, served, ONE_PROMPT))
    moved_c = networks.backbone.adapters.state("surrogate_reward")["mean"].double().sum(dim=0)
    assert torch.cosine_similarity(moved_c, A, dim=0) > 0.8
