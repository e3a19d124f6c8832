"""The rivals of SubGRPO in the same loop, on the tiny pipeline: what trains, on which signal, what must not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common import seeding
from common.errors import CheckpointError, ModelError
from common.flow import add_noise
from common.types import Network, Position, ScoredGroup, Stage, StepPlan
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.objectives.advantage import group_advantages
from learner.training.distribution_matching import DrawKey
from learner.training.networks import ALIGNED, ALIGNED_FAKE_SCORE, SURROGATE_REWARD, Networks, StageSettings
from learner.training.surrogate_reward import learned_step
from tests.helpers.tiny_training import (
    REWARDS,
    alignment_settings,
    alignment_trainer,
    changed,
    cold_start_trainer,
    new_networks,
    scored_groups,
    snapshot,
)

RIVALS = ("nft", "surrogate_reward")
ALONE = {"matching_weight": 0.0, "reward_gradient_weight": 0.0}


def aligned_networks(pipeline: Path, **settings: object) -> Networks:
    networks = new_networks(pipeline)
    cold_start_trainer(networks).update(0)
    networks.begin_alignment(StageSettings.of(alignment_settings(**settings)))
    return networks


def trained(names: set[str]) -> set[str]:
    return {name.split(".")[-1] for name in names}


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_trains_the_student_beside_the_other_terms(tiny_pipeline: Path, rival: str) -> None:
    networks = aligned_networks(tiny_pipeline, policy_gradient=rival)
    settings = alignment_settings(policy_gradient=rival, signal_every=1)
    trainer, before = alignment_trainer(networks, settings), snapshot(networks.backbone)
    totals, seconds, _ = trainer.update(scored_groups(networks.backbone, 0, settings))
    metrics = totals.values()
    own = {SURROGATE_REWARD} if rival == "surrogate_reward" else set()
    assert trained(changed(networks.backbone, before)) == {ALIGNED, ALIGNED_FAKE_SCORE} | own
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["signal_norm/policy"] > 0
    assert {"teacher_distance", "hinge_reward", "effective_samples"} <= metrics.keys()
    assert "ratio_mean" not in metrics
    assert ("surrogate_reward" in seconds) == bool(own)


@pytest.mark.parametrize("rival", RIVALS)
def test_it_raises_a_reward_without_gradient(tiny_pipeline: Path, rival: str) -> None:
    settings = alignment_settings(policy_gradient=rival, group_size=8, selected_steps=4, **ALONE)
    networks = aligned_networks(tiny_pipeline, policy_gradient=rival)
    trainer = alignment_trainer(networks, settings, rewards={"left": 1.0})
    first, *_, last = [trainer.update(scored_groups(networks.backbone, 0, settings))[0].values() for _ in range(8)]
    assert last["reward/left"] > first["reward/left"]


@pytest.mark.parametrize("rival", RIVALS)
def test_equal_rewards_carry_no_signal(tiny_pipeline: Path, rival: str) -> None:
    settings = alignment_settings(policy_gradient=rival, **ALONE)
    networks = aligned_networks(tiny_pipeline, policy_gradient=rival)
    groups = [
        replace(group, rewards_G={name: np.full(3, place, np.float32) for name in REWARDS})
        for place, group in enumerate(scored_groups(networks.backbone, 0, settings))
    ]
    metrics = alignment_trainer(networks, settings).update(groups)[0].values()
    assert metrics["student_gradient_norm"] == 0
    assert metrics.get("surrogate_gradient_norm", 0) == 0


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_micro_batch_changes_no_result(tiny_pipeline: Path, rival: str, micro_batch: int) -> None:
    """Groups of three are cut by micro-batches of one, two and four."""
    results = []
    for size in (2, micro_batch):
        networks = aligned_networks(tiny_pipeline, policy_gradient=rival)
        settings = alignment_settings(policy_gradient=rival, micro_batch=size, signal_every=None)
        trainer = alignment_trainer(networks, settings)
        metrics = trainer.update(scored_groups(networks.backbone, 0))[0].values()
        results.append((metrics, {key: value for key, value in networks.state().items() if key.endswith("|exp_avg")}))
    (metrics, moments), (other_metrics, other_moments) = results
    assert other_metrics == pytest.approx(metrics, abs=1e-6, rel=1e-5)
    assert all(torch.allclose(moments[key], other_moments[key], atol=1e-6) for key in moments)


@pytest.mark.parametrize("rival", RIVALS)
def test_a_part_of_the_samples_can_be_trained(tiny_pipeline: Path, rival: str) -> None:
    settings = alignment_settings(policy_gradient=rival, train_fraction=0.5)
    networks = aligned_networks(tiny_pipeline, policy_gradient=rival)
    update = alignment_trainer(networks, settings).update(scored_groups(networks.backbone, 0, settings))
    assert update.totals.values()["student_gradient_norm"] > 0
    kept_PG, advantages_PG = update.trained.kept_PG, np.abs(update.trained.advantages_PG)
    assert kept_PG.sum() == kept_PG.size / 2
    assert advantages_PG[kept_PG].min() >= advantages_PG[~kept_PG].max()
    assert len(update.trained.policy_steps) == settings.selected_steps
    assert update.trained.final_step


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rival", RIVALS)
def test_a_restored_run_goes_on_bit_by_bit(tiny_pipeline: Path, tmp_path: Path, rival: str) -> None:
    settings = alignment_settings(policy_gradient=rival)
    networks = aligned_networks(tiny_pipeline, policy_gradient=rival)
    trainer = alignment_trainer(networks, settings)
    trainer.update(scored_groups(networks.backbone, 0, settings))
    saved = CheckpointStore(tmp_path).save(Position(Stage.ALIGNMENT, 1), networks.state(), {})
    expected = trainer.update(scored_groups(networks.backbone, 1, settings))[0].values()

    restored = new_networks(tiny_pipeline)
    restored.begin_alignment(StageSettings.of(settings))
    restored.load(Checkpoint.open(saved).state())
    trainer = alignment_trainer(restored, settings)
    assert trainer.update(scored_groups(restored.backbone, 1, settings))[0].values() == expected
    after, wanted = restored.state(), networks.state()
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)


# ── DiffusionNFT ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_nft_gradient_by_hand(tiny_pipeline: Path) -> None:
    """Advantage times the gradient of the normalised error, at the drawn levels, on the final samples."""
    changes = {"policy_gradient": "nft", "gradient_clip_student": 1e9, **ALONE}
    networks, settings = aligned_networks(tiny_pipeline, **changes), alignment_settings(**changes)
    groups = scored_groups(networks.backbone, 0, settings)
    expected = nft_gradient_by_hand(networks, groups)
    alignment_trainer(networks, settings).update(groups)
    moments = networks.student_optimizer.state()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4
    for key, gradient in expected.items():
        assert torch.allclose(moments[f"{key}|exp_avg"], 0.1 * gradient, rtol=1e-3, atol=1e-6)


def nft_gradient_by_hand(networks: Networks, groups: Sequence[ScoredGroup]) -> dict[str, Tensor]:
    backbone, plan = networks.backbone, groups[0].trajectory.plan
    rewards = {name: torch.stack([torch.tensor(group.rewards_G[name]) for group in groups]) for name in REWARDS}
    advantages_B = group_advantages(rewards, REWARDS, "batch", 5.0).flatten()
    clean = torch.cat([torch.tensor(group.trajectory.latents_SGchw[-1]) for group in groups])
    conditioning = backbone.encode_prompts([group.trajectory.prompt.text for group in groups]).repeat(3)
    steps = seeding.trained_steps(0, plan.iteration, 4, 2)
    key = DrawKey(0, "alignment/student", plan.iteration, range(6), 6)
    total = torch.zeros(())
    for step in steps:
        sigma = plan.sigmas[step]
        noised = add_noise(clean, key.normal(f"forward{step}", clean), sigma)
        error = noised - sigma * backbone.velocity(Network.STUDENT, noised, torch.full((6,), sigma), conditioning)
        error = error - clean
        sizes_B = error.detach().abs().mean(dim=(1, 2, 3))
        total = total + (advantages_B * error.square().mean(dim=(1, 2, 3)) / sizes_B).mean() / (len(steps) + 1)
    parameters = backbone.adapters.parameters(ALIGNED)
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {key: gradient for key, gradient in zip(parameters, found, strict=True) if gradient is not None}


# ── the surrogate reward ─────────────────────────────────────────────────────────────────────────────────────────────


def test_later_states_are_learned_on_more_often() -> None:
    plans = [StepPlan(iteration, (1.0, 0.9, 0.75, 0.5, 0.0), 0.9, (0, 1, 2)) for iteration in range(4000)]
    counts = np.bincount([learned_step(0, plan) for plan in plans]) / len(plans)
    assert counts.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)


def test_the_surrogate_starts_as_the_teacher_and_learns_to_order_a_group(tiny_pipeline: Path) -> None:
    changes = {"policy_gradient": "surrogate_reward", "learning_rate_student": 0.0, **ALONE}
    networks, settings = aligned_networks(tiny_pipeline, **changes), alignment_settings(**changes)
    backbone = networks.backbone
    latents, sigma = torch.randn(2, *backbone.latent_shape), torch.tensor([0.9, 0.2])
    conditioning = backbone.encode_prompts(["red", "blue"])
    with torch.no_grad():
        velocities = [
            backbone.velocity(network, latents, sigma, conditioning)
            for network in (Network.TEACHER, Network.SURROGATE_REWARD)
        ]
    assert torch.equal(*velocities)
    trainer, groups = alignment_trainer(networks, settings), scored_groups(backbone, 0, settings)
    losses = [trainer.update(groups)[0].values()["preference_loss"] for _ in range(4)]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses == sorted(losses, reverse=True)


def test_the_samples_of_a_group_are_compared_at_one_level_and_noise(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a micro-batch cuts the group. Two samples then differ by what is left of them alone."""
    settings = alignment_settings(policy_gradient="surrogate_reward", micro_batch=2, **ALONE)
    networks = aligned_networks(tiny_pipeline, policy_gradient="surrogate_reward")
    groups, backbone, seen = scored_groups(networks.backbone, 0, settings), networks.backbone, []
    plain = backbone.velocity

    def recorded(network: Network, latents: Tensor, sigma_B: Tensor, *rest: Any) -> Tensor:
        if network is Network.SURROGATE_REWARD and not torch.is_grad_enabled():
            seen.append((latents, sigma_B))
        return plain(network, latents, sigma_B, *rest)

    monkeypatch.setattr(backbone, "velocity", recorded)
    trainer = alignment_trainer(networks, settings)
    trainer.update(groups)
    # Three micro-batches of the learning, before those of the student's ascent.
    latents, levels = (torch.cat(part) for part in zip(*seen[:3], strict=True))
    step = learned_step(0, groups[0].trajectory.plan)
    start = groups[0].trajectory.plan.sigmas[step + 1]
    for place, group in enumerate(groups):
        rows = slice(3 * place, 3 * place + 3)
        assert len(set(levels[rows].tolist())) == 1
        left = (1 - levels[rows][0]) / (1 - start)
        states = torch.tensor(group.trajectory.latents_SGchw[step + 1])
        torch.testing.assert_close(latents[rows] - latents[rows][:1], left * (states - states[:1]))
    assert levels[0] != levels[3]


def test_only_this_option_has_a_surrogate_in_its_checkpoints(tiny_pipeline: Path) -> None:
    plain = aligned_networks(tiny_pipeline)
    with_one = aligned_networks(tiny_pipeline, policy_gradient="surrogate_reward")
    assert {key.split("/")[1] for key in with_one.state().keys() - plain.state().keys()} == {SURROGATE_REWARD}
    with pytest.raises(CheckpointError, match="has no adapter 'surrogate_reward'"):
        with_one.load(plain.state())
    with pytest.raises(ModelError, match="has not begun with policy_gradient: surrogate_reward"):
        _ = plain.surrogate_optimizer
