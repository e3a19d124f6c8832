"""Prefixes of metric names: counts by cause, as `NAME/reward:cause`, and figures by term, as `NAME/term`.

The learner's process and the driver both write them; the records read them.
"""

LEFT_OUT_GRADIENTS = "left_out_gradients"
"""Counts samples that were trained without the gradient of an unavailable reward."""
DROPPED_GROUPS = "dropped_groups"
"""Counts groups that were dropped whole."""
RENORMALISED_GROUPS = "renormalised_groups"
"""Counts groups that were trained without one of the rewards."""
GROUPS = "groups"
"""The number of groups that an iteration trained on."""
GROUP_MEAN, GROUP_ERROR = "group_mean", "group_error"
"""Of each statistic of the groups (`rollout_workers/image_statistics.py`): mean over the groups, its standard error."""
EFFECTIVE_SAMPLES = "effective_samples"
"""The number of samples that carry the policy gradient, see `learner/training/alignment_batch.py`."""
SURROGATE_GAP = "surrogate_gap"
"""The largest difference between the sampler's and the learner's surrogate of a transition."""
SIGNAL_NORM, SIGNAL_COSINE, SIGNAL_SHARE = "signal_norm", "signal_cosine", "signal_share"
"""Of each term of the student's gradient, see `learner/training/term_signals.py`."""
