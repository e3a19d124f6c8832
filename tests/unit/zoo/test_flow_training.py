"""Training of the transformers: which optimizer trains what, and how the learning rate changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from zoo.flow_training import CONSTANT_FRACTION, WARMUP_STEPS, Rates, new_optimizers, rate_factor
from zoo.flux2.teacher import new_flux2_transformer
from zoo.sd3.teacher import new_transformer


@pytest.mark.parametrize("new_model", [new_transformer, new_flux2_transformer])
def test_every_parameter_has_one_optimizer_and_muon_gets_matrices_alone(
    new_model: Callable[[], nn.Module],
) -> None:
    model = new_model()
    muon, adamw = ([p for group in o.param_groups for p in group["params"]] for o in new_optimizers(model, Rates()))
    assert {id(p) for p in muon}.isdisjoint(id(p) for p in adamw)
    assert len(muon) + len(adamw) == len(list(model.parameters()))
    assert all(parameter.ndim == 2 for parameter in muon)
    assert sum(p.numel() for p in muon) > sum(p.numel() for p in adamw)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1 / WARMUP_STEPS),
        (WARMUP_STEPS - 1, 1.0),
        (int(1000 * CONSTANT_FRACTION) - 1, 1.0),
        (int(1000 * CONSTANT_FRACTION), 1.0),
        (1000 - int(1000 * (1 - CONSTANT_FRACTION) / 2), 0.5),
        (1000, 0.0),
    ],
)
def test_the_rate_rises_stays_and_falls_to_nothing(step: int, factor: float) -> None:
    assert rate_factor(1000)(step) == pytest.approx(factor)
