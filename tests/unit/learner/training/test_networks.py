"""Networks and stage 1 on the tiny pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from common.backbones.flat_adapter import FlatAdapter
from common.config.stages import AlignmentConfig, ColdStartConfig
from common.errors import CheckpointError
from common.types import Network, Position, Stage
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.training.networks import ALIGNED, ALIGNED_FAKE_SCORE, COLD_START, FAKE_SCORE, Networks, StageSettings
from learner.training.optimizer import LearningRate, MovingAverage, OptimizerSettings
from tests.helpers.tiny_pipeline import UNUSED_MODULE, load_tiny_backbone, tiny_lora
from tests.helpers.tiny_training import (
    alignment_settings,
    changed,
    cold_start_settings,
    cold_start_trainer,
    new_networks,
    snapshot,
    trainable,
)


def student_velocity(networks: Networks) -> torch.Tensor:
    backbone = networks.backbone
    latents = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.velocity(Network.STUDENT, latents, torch.tensor([0.5]), backbone.encode_prompts(["red"]))


def test_stage_one_starts_as_the_teacher(tiny_pipeline: Path) -> None:
    networks = new_networks(tiny_pipeline)
    backbone = networks.backbone
    latents, sigma = torch.randn(2, *backbone.latent_shape), torch.tensor([0.9, 0.2])
    conditioning = backbone.encode_prompts(["red", "blue"])
    with torch.no_grad():
        teacher, student, fake = (
            backbone.velocity(network, latents, sigma, conditioning)
            for network in (Network.TEACHER, Network.STUDENT, Network.FAKE_SCORE)
        )
    assert torch.equal(student, teacher)
    assert torch.equal(fake, teacher)


def test_two_updates_change_every_trainable_parameter_and_no_other(tiny_pipeline: Path) -> None:
    networks = new_networks(tiny_pipeline)
    trainer, before = cold_start_trainer(networks), snapshot(networks.backbone)
    for iteration in range(2):
        metrics = trainer.update(iteration).values()
        assert all(math.isfinite(value) for value in metrics.values())
    found = changed(networks.backbone, before)
    assert found == {name for name in trainable(networks.backbone) if UNUSED_MODULE not in name}
    assert {name.split(".")[-1] for name in found} == {COLD_START, FAKE_SCORE}


def test_the_student_updates_every_kth_time_and_the_fake_score_always(tiny_pipeline: Path) -> None:
    settings = cold_start_settings(student_every=2)
    networks = new_networks(tiny_pipeline, settings)
    trainer = cold_start_trainer(networks, settings)
    for iteration, expected in enumerate(({FAKE_SCORE}, {FAKE_SCORE, COLD_START}, {FAKE_SCORE})):
        before = snapshot(networks.backbone)
        metrics = trainer.update(iteration).values()
        assert {name.split(".")[-1] for name in changed(networks.backbone, before)} == expected
        assert ("student_gradient_norm" in metrics) == (COLD_START in expected)


def test_stage_two_begins_at_the_averaged_student(tiny_pipeline: Path) -> None:
    networks = new_networks(tiny_pipeline)
    trainer = cold_start_trainer(networks)
    trainer.update(0)
    trainer.update(1)
    with networks.averaged_student():
        averaged = student_velocity(networks)
    assert not torch.equal(student_velocity(networks), averaged)
    networks.begin_alignment(StageSettings.of(alignment_settings()))
    assert torch.equal(student_velocity(networks), averaged)
    assert networks.backbone.adapters.stack(Network.STUDENT) == (COLD_START, ALIGNED)
    assert networks.backbone.adapters.stack(Network.FAKE_SCORE) == (FAKE_SCORE, ALIGNED_FAKE_SCORE)
    assert {name.split(".")[-1] for name in trainable(networks.backbone)} == {ALIGNED, ALIGNED_FAKE_SCORE}
    assert networks.student_optimizer.state() == {}


@pytest.mark.parametrize("settings_of", [cold_start_settings, alignment_settings])
def test_each_network_is_trained_by_its_own_settings(
    tiny_pipeline: Path, settings_of: Callable[..., ColdStartConfig | AlignmentConfig]
) -> None:
    student = {"learning_rate_student": 0.1, "weight_decay_student": 0.2, "gradient_clip_student": 0.3}
    fake = {"learning_rate_fake": 0.4, "weight_decay_fake": 0.5, "gradient_clip_fake": 0.6}
    stage = StageSettings.of(settings_of(**student, **fake, ema_decay=0.7, lora_init_std=0.8, iterations=9))
    assert stage.student == OptimizerSettings(LearningRate(0.1, "constant", 9), 0.2, 0.3)
    assert stage.fake == OptimizerSettings(LearningRate(0.4, "constant", 9), 0.5, 0.6)
    assert (stage.ema_decay, stage.init_std) == (0.7, 0.8)
    networks = Networks(load_tiny_backbone(tiny_pipeline), stage, seed=0)
    assert networks.student_optimizer._settings == stage.student
    assert networks.fake_optimizer._settings == stage.fake


def test_stage_twos_adapters_are_fresh_and_of_its_own_size(tiny_pipeline: Path) -> None:
    """A of standard deviation 1 / rank = .5 in stage 1 and 1 in stage 2, B zero; stage 1's weights stay behind."""
    networks = new_networks(tiny_pipeline)
    bank = networks.backbone.adapters
    for name in (COLD_START, FAKE_SCORE):
        assert spread(bank.state(name)) == pytest.approx((0.5, 0.0), rel=0.1)
    cold_start_trainer(networks).update(0)
    before = bank.state(FAKE_SCORE)
    networks.begin_alignment(StageSettings.of(alignment_settings()))
    for name in (ALIGNED, ALIGNED_FAKE_SCORE):
        assert spread(bank.state(name)) == pytest.approx((1.0, 0.0), rel=0.1)
    assert all(torch.equal(bank.state(FAKE_SCORE)[key], before[key]) for key in before)


def spread(state: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
    """Root mean squares of an adapter's A and B."""
    parts = [[value.flatten() for key, value in state.items() if kind in key] for kind in (".lora_A.", ".lora_B.")]
    return tuple(torch.cat(part).square().mean().sqrt().item() for part in parts)


def test_the_average_moves_in_every_iteration_of_stage_one(tiny_pipeline: Path) -> None:
    """Also in those that do not train the student: by a hundredth of the way to the same weights."""
    settings = cold_start_settings(student_every=2)
    networks = new_networks(tiny_pipeline, settings)
    trainer = cold_start_trainer(networks, settings)
    trainer.update(0)
    trainer.update(1)
    before = networks.average.state()
    trainer.update(2)
    weights, after = networks.backbone.adapters.state(COLD_START), networks.average.state()
    assert any((weights[key] - before[key]).abs().max() > 1e-4 for key in before)
    for key, value in before.items():
        torch.testing.assert_close(after[key], 0.99 * value + 0.01 * weights[key], rtol=0, atol=1e-6)


def test_the_averaged_student_is_lent_even_when_its_block_fails(tiny_pipeline: Path) -> None:
    networks = new_networks(tiny_pipeline)
    cold_start_trainer(networks).update(0)
    before = student_velocity(networks)
    with pytest.raises(RuntimeError), networks.averaged_student():
        raise RuntimeError
    assert torch.equal(student_velocity(networks), before)


def test_the_moving_average_by_hand() -> None:
    adapter = FlatAdapter("own", {"x": (1,)}, trainable=True)
    adapter.load({"x": torch.tensor([1.0])})
    average = MovingAverage(adapter, decay=0.9)
    adapter.load({"x": torch.tensor([2.0])})
    average.update()
    average.update()
    assert average.state()["x"].item() == pytest.approx(2 - 0.81)
    with average.applied():
        assert adapter.flat_n.item() == pytest.approx(2 - 0.81)
    assert adapter.flat_n.item() == 2


@pytest.mark.usefixtures("one_thread")
def test_a_restored_cold_start_goes_on_bit_by_bit(tiny_pipeline: Path, tmp_path: Path) -> None:
    networks = new_networks(tiny_pipeline)
    trainer = cold_start_trainer(networks)
    trainer.update(0)
    trainer.update(1)
    saved = CheckpointStore(tmp_path).save(Position(Stage.COLD_START, 2), networks.state(), {})
    expected = [trainer.update(2).values(), trainer.update(3).values()]

    restored = new_networks(tiny_pipeline)
    restored.load(Checkpoint.open(saved).state())
    trainer = cold_start_trainer(restored)
    assert [trainer.update(2).values(), trainer.update(3).values()] == expected
    after, wanted = restored.state(), networks.state()
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)


def test_a_state_of_other_adapters_is_refused(tiny_pipeline: Path) -> None:
    networks = new_networks(tiny_pipeline)
    fewer = load_tiny_backbone(tiny_pipeline, tiny_lora(("to_q",)))

    other = Networks(fewer, StageSettings.of(cold_start_settings()), seed=0)
    with pytest.raises(CheckpointError, match=r"'cold_start' is on \d+ layers, lora.targets bind to 2\. "):
        other.load(networks.state())


def test_a_state_of_the_other_stage_is_refused(tiny_pipeline: Path) -> None:
    state = new_networks(tiny_pipeline).state()
    aligned = new_networks(tiny_pipeline)
    aligned.begin_alignment(StageSettings.of(alignment_settings()))
    with pytest.raises(CheckpointError, match="no adapter 'aligned': it is of the other stage or an earlier"):
        aligned.load(state)


def test_stage_two_may_train_another_rank_at_the_same_scale(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Its checkpoint is restored too; A is as wide as 1 / its own rank."""
    settings = StageSettings.of(alignment_settings(lora_rank=8, lora_init_std=None))
    networks = new_networks(tiny_pipeline)
    networks.begin_alignment(settings)
    bank = networks.backbone.adapters
    for name, rank in ((COLD_START, 2), (FAKE_SCORE, 2), (ALIGNED, 8), (ALIGNED_FAKE_SCORE, 8)):
        assert {value.shape[0] for key, value in bank.state(name).items() if ".lora_A." in key} == {rank}
    assert bank.scale == 2
    values = torch.cat([value.flatten() for key, value in bank.state(ALIGNED).items() if ".lora_A." in key])
    assert values.std().item() == pytest.approx(1 / 8, rel=0.1)

    saved = CheckpointStore(tmp_path).save(Position(Stage.ALIGNMENT, 0), networks.state(), {})
    restored = new_networks(tiny_pipeline)
    restored.begin_alignment(settings)
    restored.load(Checkpoint.open(saved).state())
    assert all(
        torch.equal(value, bank.state(ALIGNED)[key]) for key, value in restored.backbone.adapters.state(ALIGNED).items()
    )
