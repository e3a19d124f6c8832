"""Beginnings of metric names that count something by its cause, as `NAME/reward:cause`.

The learner's process and the driver both write them; the records read them.
"""

LEFT_OUT_GRADIENTS = "left_out_gradients"
"""Samples that were trained without the gradient of a reward that could not be had."""
DROPPED_GROUPS = "dropped_groups"
"""Groups that were dropped whole."""
RENORMALISED_GROUPS = "renormalised_groups"
"""Groups that were trained without one of the rewards."""
