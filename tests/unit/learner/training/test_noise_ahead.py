"""Noise that is drawn before it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import current_thread

import pytest
import torch
from torch import Tensor

from common import seeding
from learner.training.distribution_matching import DrawKey
from learner.training.networks import StageSettings
from learner.training.noise_ahead import NoiseAhead
from tests.helpers.tiny_training import (
    alignment_settings,
    alignment_trainer,
    cold_start_trainer,
    new_networks,
    scored_groups,
)

SAMPLES = torch.empty(2, 4, 3, 3)


def key(ahead: NoiseAhead | None, rows: Sequence[int] = (3, 5)) -> DrawKey:
    return DrawKey(0, "test", 7, rows, 8, ahead)


def test_noise_that_was_begun_is_the_noise_that_would_be_drawn() -> None:
    ahead = NoiseAhead()
    key(ahead).begin("renoise", SAMPLES.shape[1:], SAMPLES.device)
    begun = key(ahead).normal("renoise", SAMPLES)
    assert torch.equal(begun, key(None).normal("renoise", SAMPLES))
    assert torch.equal(begun, key(ahead).normal("renoise", SAMPLES))  # taken before, so it is drawn again
    assert not torch.equal(begun, key(ahead, (3, 6)).normal("renoise", SAMPLES))


def test_each_draw_is_taken_once_or_forgotten() -> None:
    ahead = NoiseAhead()
    for name in "ab":
        ahead.begin(name, lambda: torch.ones(1))
    assert ahead.take("a") is not None
    assert ahead.take("a") is None
    ahead.clear()
    assert ahead.take("b") is None


@pytest.fixture
def drawn_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Purpose of a draw -> names of the threads that drew it."""
    threads: dict[str, set[str]] = {}
    draw = seeding.normal

    def noted(shape: Sequence[int], *, seed: int, purpose: str, **keys: int) -> Tensor:
        threads.setdefault(purpose, set()).add(current_thread().name.partition("_")[0])
        return draw(shape, seed=seed, purpose=purpose, **keys)

    monkeypatch.setattr(seeding, "normal", noted)
    return threads


def test_all_noise_of_both_updates_is_drawn_ahead(tiny_pipeline: Path, drawn_by: dict[str, set[str]]) -> None:
    networks = new_networks(tiny_pipeline)
    networks.begin_alignment(StageSettings.of(alignment_settings()))
    groups = scored_groups(networks.backbone, 0)
    drawn_by.clear()
    alignment_trainer(networks).update(groups)
    expected = [f"fake/{name}" for name in ("renoise", "first", "second")]
    expected += [f"student/{name}" for name in ("renoise", "project")]
    assert drawn_by == {f"alignment/{name}": {"noise"} for name in expected}


def test_the_cold_start_draws_the_noise_of_its_next_iteration(
    tiny_pipeline: Path, drawn_by: dict[str, set[str]]
) -> None:
    trainer = cold_start_trainer(new_networks(tiny_pipeline))
    drawn_by.clear()
    trainer.update(0)
    here = {purpose for purpose, threads in drawn_by.items() if "MainThread" in threads}
    assert "cold_start/fake/initial" in here
    drawn_by.clear()
    trainer.update(1)
    assert drawn_by
    assert not any("MainThread" in threads for threads in drawn_by.values())
