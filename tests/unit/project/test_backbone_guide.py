"""docs/backbones.md: a family is one file and one run file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.backbones import load_backbone
from common.config.run import Config
from common.errors import ModelError
from common.types import Network
from common.weights import frozen_weights, publish
from learner.preflight.run_file import Draft
from learner.training.networks import ALIGNED, ALIGNED_FAKE_SCORE, COLD_START, FAKE_SCORE, Networks, StageSettings
from rollout_workers.weight_receiver import WeightReceiver
from tests.helpers.tiny_training import (
    alignment_settings,
    alignment_trainer,
    changed,
    cold_start_settings,
    cold_start_trainer,
    scored_groups,
    snapshot,
    trainable,
)
from tests.helpers.toy_family import write_toy


def run_file(directory: Path, **backbone: object) -> Config:
    values = {
        "run": {"name": "toy"},
        "backbone": {
            "family": "tests.helpers.toy_family:ToyFlow",
            "path": str(directory),
            "width": 6,
            "options": {"shift": 3.0},
            "guidance_scale": 3.0,
            **backbone,
        },
        "lora": {"rank": 2, "alpha": 4},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "rewards": [{"name": "bright", "url": "http://somewhere", "differentiable": True}],
    }
    draft = Draft("toy.yaml")
    draft.lay(values, "toy.yaml")
    return draft.build()


def networks_of(config: Config) -> Networks:
    backbone = load_backbone(config.backbone, config.lora, torch.device("cpu"))
    return Networks(backbone, StageSettings.of(cold_start_settings()), seed=0)


def test_a_family_of_ones_own_trains_in_both_stages_and_is_published(tmp_path: Path) -> None:
    config = run_file(write_toy(tmp_path))
    networks = networks_of(config)
    backbone = networks.backbone
    assert backbone.latent_shape == (3, 4, 6)
    before = snapshot(backbone)
    for iteration in range(2):
        cold_start_trainer(networks).update(iteration)
    assert changed(backbone, before) == trainable(backbone)
    assert {name.split(".")[-1] for name in trainable(backbone)} == {COLD_START, FAKE_SCORE}

    networks.begin_alignment(StageSettings.of(alignment_settings()))
    before = snapshot(backbone)
    for iteration in range(2):
        alignment_trainer(networks).update(scored_groups(backbone, iteration))
    assert changed(backbone, before) == trainable(backbone)
    assert {name.split(".")[-1] for name in trainable(backbone)} == {ALIGNED, ALIGNED_FAKE_SCORE}

    worker = load_backbone(config.backbone, config.lora, torch.device("cpu"))
    assert WeightReceiver(worker).receive(publish(backbone, 1), frozen_weights(backbone)).number == 1
    assert worker.adapters.stack(Network.STUDENT) == (COLD_START, ALIGNED)


def test_a_family_that_cannot_be_sharded_is_named(tmp_path: Path) -> None:
    config = run_file(write_toy(tmp_path))
    with pytest.raises(ModelError, match=r"ToyFlow: it takes no `sharded`: set learner.shard_base to false"):
        load_backbone(config.backbone, config.lora, torch.device("cpu"), sharded=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"family": "tests.helpers.toy_family:NoSuchClass"}, "cannot import NoSuchClass from tests.helpers.toy_family"),
        ({"family": "tests.no_such_file:Toy"}, "cannot import Toy from tests.no_such_file"),
        ({"width": 5}, "backbone.width = 5: this model's images are multiples of 2: use 4 or 6"),
        ({"path": "nowhere"}, "no toy at nowhere"),
    ],
)
def test_a_family_that_cannot_be_had_is_named(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    config = run_file(write_toy(tmp_path), **changes)
    with pytest.raises(ModelError, match=expected):
        load_backbone(config.backbone, config.lora, torch.device("cpu"))
