"""Stage 2 on the tiny pipeline: what trains, on which signal, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common import seeding
from common.errors import AttestationError, RewardUnavailable, TrainingError
from common.flow import cps_transition, gaussian_log_density, surrogate_log_density
from common.types import Network, PolicyVersion, Position, Prompt, ScoredGroup, Stage
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.objectives.advantage import group_advantages
from learner.training.distribution_matching import DrawKey, MatchingSettings, renoise_samples, student_objective
from learner.training.networks import ALIGNED, ALIGNED_FAKE_SCORE, Networks, StageSettings
from learner.training.reward_gradients import DifferentiableRewards, RequestedRewards
from tests.helpers.tiny_pipeline import UNUSED_MODULE
from tests.helpers.tiny_training import (
    GUIDANCE,
    REWARDS,
    SAMPLING,
    Brightness,
    alignment_settings,
    alignment_trainer,
    changed,
    cold_start_settings,
    cold_start_trainer,
    new_networks,
    scored_groups,
    snapshot,
    trainable,
)


def aligned_networks(pipeline: Path, **settings: object) -> Networks:
    """Networks in stage 2, on a student that one cold start update has moved off the teacher."""
    networks = new_networks(pipeline)
    cold_start_trainer(networks).update(0)
    networks.begin_alignment(StageSettings.of(alignment_settings(**settings)))
    return networks


@pytest.fixture
def networks(tiny_pipeline: Path) -> Networks:
    return aligned_networks(tiny_pipeline)


def adapters(names: set[str]) -> set[str]:
    return {name.split(".")[-1] for name in names}


def test_two_updates_change_every_trainable_parameter_and_no_other(networks: Networks) -> None:
    trainer, before = alignment_trainer(networks), snapshot(networks.backbone)
    for iteration in range(2):
        totals, seconds, _ = trainer.update(scored_groups(networks.backbone, iteration))
        metrics = totals.values()
        assert all(math.isfinite(value) for value in metrics.values())
        assert all(value >= 0 for value in seconds.values())
    found = changed(networks.backbone, before)
    assert found == {name for name in trainable(networks.backbone) if UNUSED_MODULE not in name}
    assert adapters(found) == {ALIGNED, ALIGNED_FAKE_SCORE}


def test_metrics_tell_what_the_rewards_said(networks: Networks) -> None:
    groups = scored_groups(networks.backbone, 0)
    groups[0] = replace(groups[0], rewards_G={**groups[0].rewards_G, "left": np.zeros(3, np.float32)})
    totals, seconds, _ = alignment_trainer(networks).update(groups)
    metrics = totals.values()
    for name in REWARDS:
        expected = np.mean([group.rewards_G[name] for group in groups])
        assert metrics[f"reward/{name}"] == pytest.approx(expected, rel=1e-5)
    assert metrics["zero_spread/left"] == 0.5
    assert metrics["zero_spread/bright"] == 0
    assert seconds.keys() == {"prepare", "fake_score", "student", "reward_gradient"}


def test_learner_and_sampler_agree(networks: Networks) -> None:
    metrics = alignment_trainer(networks).update(scored_groups(networks.backbone, 0))[0].values()
    assert metrics["surrogate_gap"] < 1e-6
    assert metrics["ratio_max_deviation"] == 0
    assert metrics["clipped_fraction"] == 0


def disagreeing(networks: Networks, iteration: int = 0) -> list[ScoredGroup]:
    """Groups of which one has a surrogate that is off by 0.25."""
    groups = scored_groups(networks.backbone, iteration)
    off = replace(groups[1].trajectory, surrogate_TG=groups[1].trajectory.surrogate_TG + np.float32(0.25))
    groups[1] = replace(groups[1], trajectory=off)
    return groups


def test_a_disagreement_beyond_its_limit_stops_before_the_student_changes(networks: Networks) -> None:
    before = snapshot(networks.backbone)
    trainer = alignment_trainer(networks, surrogate_gap_limit=0.2)
    with pytest.raises(AttestationError, match=r"surrogate_gap is 2\.5e-01, above its limit of 0\.2:"):
        trainer.update(disagreeing(networks))
    assert all(ALIGNED_FAKE_SCORE in name for name in changed(networks.backbone, before))
    alignment_trainer(networks, surrogate_gap_limit=0.3).update(disagreeing(networks))


def test_stale_groups_may_disagree(networks: Networks) -> None:
    """The student has moved since they were sampled."""
    groups = [
        replace(group, trajectory=replace(group.trajectory, policy=PolicyVersion(0, "unused")))
        for group in disagreeing(networks, iteration=1)
    ]
    metrics = alignment_trainer(networks, surrogate_gap_limit=0.2).update(groups)[0].values()
    assert metrics["surrogate_gap"] > 0.2


def test_a_disagreement_is_measured(networks: Networks) -> None:
    groups = disagreeing(networks)
    settings = alignment_settings(old_surrogate="rollout", micro_batch=2)
    metrics = alignment_trainer(networks, settings).update(groups)[0].values()
    assert metrics["surrogate_gap"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["ratio_mean"] == pytest.approx((1 + math.exp(-0.25)) / 2, abs=1e-4)


@pytest.mark.parametrize("surrogate", ["squared_error", "gaussian"])
def test_the_policy_gradient_is_minus_advantage_times_surrogate(tiny_pipeline: Path, surrogate: str) -> None:
    """Against plain autograd, with AdamW's first moment as the witness of the gradient."""
    pure = {"matching_weight": 0.0, "reward_gradient_weight": 0.0, "gradient_clip_student": 1e9}
    networks = aligned_networks(tiny_pipeline, **pure)
    settings = alignment_settings(**pure, surrogate=surrogate)
    groups = scored_groups(networks.backbone, 0, settings)
    expected = policy_gradient_by_hand(networks, groups, exact=surrogate == "gaussian")
    alignment_trainer(networks, settings).update(groups)
    moments = networks.student_optimizer.state()
    for key, gradient in expected.items():
        assert torch.allclose(moments[f"{key}|exp_avg"], 0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4


def policy_gradient_by_hand(networks: Networks, groups: Sequence[ScoredGroup], *, exact: bool) -> dict[str, Tensor]:
    backbone, plan = networks.backbone, groups[0].trajectory.plan
    rewards = {name: torch.stack([torch.tensor(group.rewards_G[name]) for group in groups]) for name in REWARDS}
    advantages = group_advantages(rewards, REWARDS, "batch", 5.0)
    total = torch.zeros(())
    for group, advantages_G in zip(groups, advantages, strict=True):
        states = torch.tensor(group.trajectory.latents_SGchw)
        conditioning = backbone.encode_prompts([group.trajectory.prompt.text]).repeat(states.shape[1])
        for step in plan.selected:
            sigma, sigma_next = plan.sigmas[step], plan.sigmas[step + 1]
            velocity = backbone.velocity(Network.STUDENT, states[step], torch.full((3,), sigma), conditioning)
            transition = cps_transition(states[step], velocity, sigma, sigma_next, plan.eta)
            mean, after = transition.mean_Bchw, states[step + 1]
            surrogate = (
                gaussian_log_density(mean, transition.std, after) if exact else surrogate_log_density(mean, after)
            )
            # Averaged over samples, and over the selected steps and the final one.
            total = total - (advantages_G * surrogate).sum() / advantages.numel() / (len(plan.selected) + 1)
    return student_gradient(networks, total)


def student_gradient(networks: Networks, value: Tensor) -> dict[str, Tensor]:
    parameters = networks.backbone.adapters.parameters(ALIGNED)
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {key: gradient for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def test_the_final_steps_matching_gradient_by_hand(tiny_pipeline: Path) -> None:
    """On the clean prediction of the last step, with draws of its own, against the fake score as just updated."""
    pure = {
        "policy_gradient": "none",
        "matching_weight": 0.3,
        "reward_gradient_weight": 0.0,
        "gradient_clip_student": 1e9,
        "learning_rate_student": 0.0,  # so that the gradient can be had afterwards
    }
    networks, settings = aligned_networks(tiny_pipeline, **pure), alignment_settings(**pure)
    backbone, groups = networks.backbone, scored_groups(networks.backbone, 0, settings)
    alignment_trainer(networks, settings).update(groups)

    states = torch.cat([torch.tensor(group.trajectory.latents_SGchw) for group in groups], dim=1)
    conditioning = backbone.encode_prompts([group.trajectory.prompt.text for group in groups]).repeat(3)
    sigma_B = torch.full((6,), groups[0].trajectory.plan.sigmas[3])
    velocity = backbone.velocity(Network.STUDENT, states[3], sigma_B, conditioning)
    sample, key = states[3] - sigma_B.view(-1, 1, 1, 1) * velocity, DrawKey(0, "alignment/student", 0, range(6), 6)
    torch.testing.assert_close(sample.detach(), states[4])
    matching, empty = MatchingSettings.of(cold_start_settings(), SAMPLING, GUIDANCE, 0.0), backbone.encode_prompts([""])
    renoised = renoise_samples(sample, 0.0, key)
    loss = student_objective(backbone, sample, renoised, conditioning, empty, matching, key)
    moments, expected = networks.student_optimizer.state(), student_gradient(networks, 0.3 * loss.value)
    largest = float(max(gradient.abs().max() for gradient in expected.values()))
    assert largest > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(moments[f"{name}|exp_avg"], 0.1 * gradient, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_the_micro_batch_changes_no_result(tiny_pipeline: Path, micro_batch: int) -> None:
    results = []
    for size in (2, micro_batch):
        networks = aligned_networks(tiny_pipeline)
        trainer = alignment_trainer(networks, alignment_settings(micro_batch=size))
        metrics = trainer.update(scored_groups(networks.backbone, 0))[0].values()
        results.append((metrics, {**networks.student_optimizer.state(), **networks.fake_optimizer.state()}))
    (metrics, moments), (other_metrics, other_moments) = results
    assert other_metrics == pytest.approx(metrics, abs=1e-6, rel=1e-5)
    assert all(torch.allclose(moments[key], other_moments[key], atol=1e-6) for key in moments)


@pytest.mark.usefixtures("one_thread")
def test_a_restored_alignment_goes_on_bit_by_bit(tiny_pipeline: Path, tmp_path: Path) -> None:
    networks = aligned_networks(tiny_pipeline)
    trainer = alignment_trainer(networks)
    trainer.update(scored_groups(networks.backbone, 0))
    saved = CheckpointStore(tmp_path).save(Position(Stage.ALIGNMENT, 1), networks.state(), {})
    expected = [trainer.update(scored_groups(networks.backbone, iteration))[0].values() for iteration in (1, 2)]

    restored = new_networks(tiny_pipeline)
    restored.begin_alignment(StageSettings.of(alignment_settings()))
    restored.load(Checkpoint.open(saved).state())
    trainer = alignment_trainer(restored)
    assert [trainer.update(scored_groups(restored.backbone, iteration))[0].values() for iteration in (1, 2)] == expected
    after, wanted = restored.state(), networks.state()
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("policy_gradient", "matching_weight", "reward_gradient_weight"),
    [
        ("subgrpo", 0.0, 0.0),
        ("grpo", 0.0, 0.0),
        ("none", 0.3, 0.0),
        ("none", 0.0, 0.05),
        ("grpo", 0.3, 0.0),
        ("subgrpo", 0.0, 0.05),
    ],
)
def test_every_part_trains_the_student_and_matching_the_fake_score(
    networks: Networks, policy_gradient: str, matching_weight: float, reward_gradient_weight: float
) -> None:
    settings = alignment_settings(
        policy_gradient=policy_gradient,
        matching_weight=matching_weight,
        reward_gradient_weight=reward_gradient_weight,
    )
    before = snapshot(networks.backbone)
    metrics = alignment_trainer(networks, settings).update(scored_groups(networks.backbone, 0, settings))[0].values()
    trained = {ALIGNED, ALIGNED_FAKE_SCORE} if matching_weight > 0 else {ALIGNED}
    assert adapters(changed(networks.backbone, before)) == trained
    assert metrics["student_gradient_norm"] > 0
    assert ("fake_gradient_norm" in metrics) == (matching_weight > 0)
    assert ("ratio_mean" in metrics) == (policy_gradient != "none")
    assert ("teacher_distance" in metrics) == (matching_weight > 0)
    assert ("hinge_reward" in metrics) == (reward_gradient_weight > 0)


def test_shuffled_advantages_stay_in_their_group(networks: Networks) -> None:
    groups = scored_groups(networks.backbone, 1, alignment_settings(group_size=8))
    size, prompts = groups[0].trajectory.group_size, [group.trajectory.prompt.index for group in groups]
    plain = alignment_trainer(networks)._assemble(groups).advantages_B.view(-1, size)
    control = alignment_trainer(networks, alignment_settings(shuffled_advantages=True))
    shuffled = control._assemble(groups).advantages_B.view(-1, size)
    orders = [seeding.shuffled_group(0, 1, prompt, size) for prompt in prompts]
    assert any(order != tuple(range(size)) for order in orders)
    for before, after, order in zip(plain, shuffled, orders, strict=True):
        assert after.tolist() == [before[place] for place in order]


def test_equal_rewards_carry_no_policy_signal(networks: Networks) -> None:
    settings = alignment_settings(matching_weight=0.0, reward_gradient_weight=0.0)
    groups = [
        replace(group, rewards_G={name: np.full(3, place, np.float32) for name in REWARDS})
        for place, group in enumerate(scored_groups(networks.backbone, 0, settings))
    ]
    metrics = alignment_trainer(networks, settings).update(groups)[0].values()
    assert metrics["student_gradient_norm"] == 0


def test_a_reward_out_of_reach_leaves_the_student_alone(networks: Networks) -> None:
    class Unreachable(Brightness):
        def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
            raise RewardUnavailable("bright", "refused", "is the server running?")

    before = snapshot(networks.backbone)
    trainer = alignment_trainer(networks, served=Unreachable())
    with pytest.raises(RewardUnavailable, match="is the server running"):
        trainer.update(scored_groups(networks.backbone, 0))
    assert adapters(changed(networks.backbone, before)) == {ALIGNED_FAKE_SCORE}


class Late(Brightness):
    """Answers only when it is asked for the answer, and notes the student's gradient at both moments."""

    def __init__(self, gradient_n: Tensor) -> None:
        super().__init__()
        self._gradient_n = gradient_n
        self.norms: list[tuple[str, float]] = []

    def request(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> RequestedRewards:
        self.norms.append(("request", float(self._gradient_n.norm())))

        def collect() -> DifferentiableRewards:
            self.norms.append(("collect", float(self._gradient_n.norm())))
            return self.differentiable(images_BCHW, prompts)

        return RequestedRewards(lambda: False, collect)


def test_rewards_are_requested_before_the_policys_backward_and_collected_after_it(
    tiny_pipeline: Path, networks: Networks
) -> None:
    late = Late(networks.student.gradient_n)
    groups = scored_groups(networks.backbone, 0)
    alignment_trainer(networks, served=late).update(groups)
    (first, at_request), (second, at_collect), *rest = late.norms
    assert (first, second) == ("request", "collect")
    assert at_request == 0 < at_collect
    assert len(rest) == 2  # the second micro-batch
    at_once = aligned_networks(tiny_pipeline)
    alignment_trainer(at_once).update(groups)
    assert all(torch.equal(value, at_once.state()[name]) for name, value in networks.state().items())


class HalfOut(Brightness):
    """Of bright and left only bright can be had, and for the second half of the batch not even that."""

    def __init__(self) -> None:
        super().__init__()
        self.names = ("left", "bright")
        self.seen: list[float] = []

    def differentiable(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> DifferentiableRewards:
        left_out = {"left:nan": len(prompts)}
        if self.seen:
            return DifferentiableRewards({}, left_out | {"bright:timeout": len(prompts)})
        scores = super().differentiable(images_BCHW, prompts).scores
        self.seen.append(scores["bright"].mean().item())
        return DifferentiableRewards(scores, left_out)


def test_without_a_rewards_gradient_the_others_take_its_weight_and_no_mean_is_diluted(networks: Networks) -> None:
    served, settings = HalfOut(), alignment_settings(micro_batch=3)
    trainer = alignment_trainer(networks, settings, served=served)
    metrics = trainer.update(scored_groups(networks.backbone, 0))[0].values()
    assert metrics["hinge_reward"] == pytest.approx(sum(REWARDS.values()) * served.seen[0], rel=1e-5)
    assert metrics["left_out_gradients/left:nan"] == 6
    assert metrics["left_out_gradients/bright:timeout"] == 3


def test_a_group_without_a_reward_is_trained_on_the_others(networks: Networks) -> None:
    groups = scored_groups(networks.backbone, 0)
    groups[0] = replace(groups[0], rewards_G={"bright": groups[0].rewards_G["bright"]})
    metrics = alignment_trainer(networks).update(groups)[0].values()
    assert metrics["reward/left"] == pytest.approx(float(groups[1].rewards_G["left"].mean()), rel=1e-5)
    assert metrics["student_gradient_norm"] > 0
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("network", ["fake score", "student"])
def test_a_gradient_that_is_not_finite_stops_its_network_by_name(networks: Networks, network: str) -> None:
    groups = scored_groups(networks.backbone, 5)
    if network == "student":
        states = groups[0].trajectory.latents_SGchw.copy()
        states[0] = np.inf  # not the final state, on which the fake score trains
        states[1] = np.inf
        states[2] = np.inf
        states[3] = np.inf
    else:
        states = np.full_like(groups[0].trajectory.latents_SGchw, np.nan)
    groups[0] = replace(groups[0], trajectory=replace(groups[0].trajectory, latents_SGchw=states))
    before = snapshot(networks.backbone)
    with pytest.raises(TrainingError, match=rf"gradient of the {network} has norm nan in iteration 5"):
        alignment_trainer(networks).update(groups)
    expected = set() if network == "fake score" else {ALIGNED_FAKE_SCORE}
    assert adapters(changed(networks.backbone, before)) == expected


def test_the_average_moves_every_kth_iteration(networks: Networks) -> None:
    trainer, averages = alignment_trainer(networks, alignment_settings(ema_every=2)), [networks.average.state()]
    for iteration in range(3):
        trainer.update(scored_groups(networks.backbone, iteration))
        averages.append(networks.average.state())
    moved = [any(not torch.equal(now[key], before[key]) for key in now) for before, now in pairwise(averages)]
    assert moved == [False, True, False]


def test_reward_back_propagation_raises_the_reward(tiny_pipeline: Path) -> None:
    settings = alignment_settings(policy_gradient="none", matching_weight=0.0, reward_gradient_weight=1.0)
    networks = aligned_networks(tiny_pipeline)
    trainer = alignment_trainer(networks, settings, rewards={"bright": 1.0})
    first, *_, last = [trainer.update(scored_groups(networks.backbone, 0, settings))[0].values() for _ in range(6)]
    assert last["reward/bright"] > first["reward/bright"]


def test_each_clip_width_is_on_its_own_side(networks: Networks) -> None:
    """Ratios of exp(-.25) on half the batch lie above 1 - .5, and would lie below 1 - 1e-3."""
    groups = scored_groups(networks.backbone, 0)
    off = replace(groups[1].trajectory, surrogate_TG=groups[1].trajectory.surrogate_TG + np.float32(0.25))
    groups[1] = replace(groups[1], trajectory=off)
    settings = alignment_settings(old_surrogate="rollout", clip_low=0.5, clip_high=1e-3)
    assert alignment_trainer(networks, settings).update(groups)[0].values()["clipped_fraction"] == 0
    settings = alignment_settings(old_surrogate="rollout", clip_low=1e-3, clip_high=0.5)
    assert alignment_trainer(networks, settings).update(groups)[0].values()["clipped_fraction"] > 0


def test_the_policy_gradient_raises_a_reward_without_gradient(tiny_pipeline: Path) -> None:
    settings = alignment_settings(matching_weight=0.0, reward_gradient_weight=0.0, group_size=8)
    networks = aligned_networks(tiny_pipeline)
    trainer = alignment_trainer(networks, settings, rewards={"left": 1.0})
    first, *_, last = [trainer.update(scored_groups(networks.backbone, 0, settings))[0].values() for _ in range(8)]
    assert last["reward/left"] > first["reward/left"]


def test_clipping_scales_every_samples_reward_gradient(tiny_pipeline: Path) -> None:
    """Below every sample's own norm, half the clip is half the student's gradient; a clip above all changes nothing."""

    def norm(clip: float | None) -> float:
        settings = alignment_settings(
            policy_gradient="none", matching_weight=0.0, reward_gradient_weight=1.0, reward_gradient_clip=clip
        )
        networks = aligned_networks(tiny_pipeline)
        trainer = alignment_trainer(networks, settings, rewards={"bright": 1.0})
        return trainer.update(scored_groups(networks.backbone, 0, settings))[0].values()["student_gradient_norm"]

    unclipped = norm(None)
    assert unclipped > 0
    assert norm(1e6) == pytest.approx(unclipped, rel=1e-5)
    assert norm(1e-6) == pytest.approx(2 * norm(5e-7), rel=1e-3)
    assert norm(1e-6) < 1e-2 * unclipped
