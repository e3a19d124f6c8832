"""The consistency regulariser of the fake score (AC-DMD, arXiv 2605.26108).

A velocity that describes one distribution at all noise levels predicts on average the same image before and after one
of its own steps: E[h(x', t') | x_t] = h(x_t, t) with h(x, t) = x - t v(x, t).
"""

from __future__ import annotations

from torch import Tensor

from common.flow import require_shapes, upcast
from learner.objectives.loss import Loss

MAX_BACKWARD_STEPS = 200
STEP = 0.001
"""The earlier level t' lies 1 to 200 steps of 0.001 below t."""


def earlier_sigma(uniform_B: Tensor, sigma_B: Tensor) -> Tensor:
    """t' = max(t - U{1 .. 200} / 1000, 0) from uniforms in [0, 1); shapes [B]."""
    require_shapes(1, uniform_B=uniform_B, sigma_B=sigma_B)
    # The clamp handles a uniform so close to 1 that the product rounds up.
    steps_B = (uniform_B * MAX_BACKWARD_STEPS).floor().clamp(max=MAX_BACKWARD_STEPS - 1) + 1
    return (upcast(sigma_B) - steps_B * STEP).clamp(min=0.0)


def consistency_loss(
    anchor_prediction_Bchw: Tensor, first_prediction_Bchw: Tensor, second_prediction_Bchw: Tensor
) -> Loss:
    """mean[ (h(x'_1, t') - h(x_t, t)) (h(x'_2, t') - h(x_t, t)) ] for two independent transitions x'_1, x'_2 from x_t.

    The product of two independent deviations is an unbiased estimate of the squared mean deviation, so it can be
    negative. The square of one deviation would also penalise the transition's variance.

    Args:
        anchor_prediction_Bchw: h(x_t, t).
        first_prediction_Bchw, second_prediction_Bchw: h(x'_1, t'), h(x'_2, t'). All three keep the graph of the
            velocity inside h; the caller detaches the transitions that made x'_1 and x'_2.
    """
    require_shapes(
        4,
        anchor_prediction_Bchw=anchor_prediction_Bchw,
        first_prediction_Bchw=first_prediction_Bchw,
        second_prediction_Bchw=second_prediction_Bchw,
    )
    anchor_Bchw = upcast(anchor_prediction_Bchw)
    value = ((upcast(first_prediction_Bchw) - anchor_Bchw) * (upcast(second_prediction_Bchw) - anchor_Bchw)).mean()
    return Loss(value, {"consistency_loss": value.detach()})
