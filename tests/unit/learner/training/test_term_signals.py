"""The terms' parts in the student's gradient: values by hand. Measuring changes no gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.backbones.flat_adapter import FlatAdapter
from learner.training.networks import ALIGNED, StageSettings
from learner.training.ranks import ALONE
from learner.training.term_signals import TermSignals
from tests.helpers.tiny_training import alignment_settings, alignment_trainer, new_networks, scored_groups

TERMS = ("policy", "matching", "reward_gradient")


def test_norm_cosine_and_share_by_hand() -> None:
    adapter = FlatAdapter("own", {"w": (2,)}, trainable=True)
    adapter.clear_gradient()
    signals = TermSignals(adapter, ("a", "b", "silent"))
    gradients = {("a", 0): [3.0, 0.0], ("a", 1): [3.0, 4.0], ("b", 0): [0.0, 1.0], ("b", 1): [0.0, -1.0]}
    for (term, half), gradient in gradients.items():
        with signals.on(half).of(term):
            (adapter.parameters["w"] * torch.tensor(gradient)).sum().backward()
    assert adapter.gradient_n.tolist() == [6.0, 4.0]
    # a: |(6, 4)| = sqrt(52), cosine 9 / (3 * 5); b: its halves cancel, so neither norm nor signal.
    assert signals.metrics(ALONE) == {
        "signal_norm/a": pytest.approx(52**0.5),
        "signal_norm/b": 0.0,
        "signal_norm/silent": 0.0,
        "signal_cosine/a": pytest.approx(0.6),
        "signal_cosine/b": -1.0,
        "signal_cosine/silent": 0.0,
        "signal_share/a": 1.0,
        "signal_share/b": 0.0,
        "signal_share/silent": 0.0,
    }


@pytest.mark.parametrize(("micro_batch", "recomputed"), [(2, False), (4, True), (6, False)])
def test_measuring_changes_no_gradient_and_finds_every_term(
    tiny_pipeline: Path, micro_batch: int, recomputed: bool
) -> None:
    """Also if a micro-batch would reach over the middle of the batch. 0.1 of the gradient is AdamW's first moment."""
    moments, found = [], {}
    for every in (None, 1):
        settings = alignment_settings(signal_every=every, micro_batch=micro_batch)
        networks = new_networks(tiny_pipeline)
        if recomputed:
            networks.backbone.enable_gradient_checkpointing()
        networks.begin_alignment(StageSettings.of(settings))
        totals = alignment_trainer(networks, settings).update(scored_groups(networks.backbone, 0, settings)).totals
        moments.append(networks.student_optimizer.state())
        found[every] = {name: value for name, value in totals.values().items() if name.startswith("signal_")}
    assert moments[0].keys() == moments[1].keys()
    for key, value in moments[0].items():
        torch.testing.assert_close(moments[1][key], value, rtol=1e-3, atol=1e-7)
    assert found[None] == {}
    assert sorted(found[1]) == sorted(f"signal_{name}/{term}" for name in ("norm", "cosine", "share") for term in TERMS)
    assert all(found[1][f"signal_norm/{term}"] > 0 for term in TERMS)
    assert sum(found[1][f"signal_share/{term}"] for term in TERMS) == pytest.approx(1.0)


def test_each_half_has_its_own_rows(tiny_pipeline: Path) -> None:
    """Six samples in parts of four: the middle ends a part."""
    settings = alignment_settings(signal_every=1, micro_batch=4)
    networks = new_networks(tiny_pipeline)
    networks.begin_alignment(StageSettings.of(settings))
    trainer = alignment_trainer(networks, settings)
    batch = trainer._assemble(scored_groups(networks.backbone, 0, settings))
    whole = [rows for rows, *_ in trainer._parts(batch, "student")]
    halved = [rows for rows, *_ in trainer._parts(batch, "student", halves=True)]
    assert (whole, halved) == ([slice(0, 4), slice(4, 6)], [slice(0, 3), slice(3, 6)])
    assert batch.middle == 3


def test_the_terms_norms_are_those_of_the_terms_alone(tiny_pipeline: Path) -> None:
    switches = {
        "policy": {"matching_weight": 0.0, "reward_gradient_weight": 0.0},
        "matching": {"policy_gradient": "none", "reward_gradient_weight": 0.0, "matching_weight": 0.3},
        "reward_gradient": {"policy_gradient": "none", "matching_weight": 0.0},
    }
    whole = _signals_and_norm(tiny_pipeline, {})[0]
    for term, off in switches.items():
        signals, norm = _signals_and_norm(tiny_pipeline, off)
        assert signals == pytest.approx({f"signal_norm/{term}": norm}, rel=1e-3)
        # The policy term is a mean over the steps and the final step: alone the final step has a share of 1, not 1/3.
        part = 1.0 if term == "policy" else 3.0
        assert whole[f"signal_norm/{term}"] * part == pytest.approx(norm, rel=1e-3)


def _signals_and_norm(pipeline: Path, changes: dict[str, object]) -> tuple[dict[str, float], float]:
    settings = alignment_settings(signal_every=1, **changes)
    networks = new_networks(pipeline)
    networks.begin_alignment(StageSettings.of(settings))
    # One plan for all, whichever steps it trains.
    groups = scored_groups(networks.backbone, 0, alignment_settings())
    metrics = alignment_trainer(networks, settings).update(groups)[0].values()
    assert networks.student_adapter == ALIGNED
    signals = {name: value for name, value in metrics.items() if name.startswith("signal_norm")}
    return signals, metrics["student_gradient_norm"]
