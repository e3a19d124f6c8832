"""The runs: one start, three that are made to hack, and clean ones. Run-file options, complete for each."""

from __future__ import annotations

from collections.abc import Mapping

Options = Mapping[str, object]

CONFIG = "deploy/runs/shapes_finished.yaml"
COMMON: Options = {
    "cold_start.objective": "clean",
    "cold_start.consistency_weight": 0,
    "cold_start.iterations": 100,
    "alignment.iterations": 30,
    "alignment.prompts_per_iteration": 6,
    "alignment.group_size": 4,
    "alignment.learning_rate_schedule": "constant",
    "alignment.signal_every": "null",
    "evaluation.every": 3,
    "evaluation.prompts": 256,
    "evaluation.images_per_prompt": 4,
}
"""The start is a short distillation by plain DMD: gold has room in both directions."""


def _held_out(*names: str) -> Options:
    return {
        f"rewards.{name}.{key}": value
        for name in names
        for key, value in (("weight", 0), ("differentiable", False), ("evaluation_only", True))
    }


NO_MATCHING: Options = {"alignment.matching_weight": 0, "alignment.consistency_weight": 0}
HACKS: Mapping[str, Options] = {
    "no_matching": {**NO_MATCHING, "alignment.learning_rate_student": 1e-3},
    "one_reward": {
        **NO_MATCHING,
        **_held_out("pickscore", "detector"),
        "alignment.policy_gradient": "none",
        "alignment.learning_rate_student": 1e-3,
    },
    "grid_reward": {
        **_held_out("pickscore"),
        "rewards.hps.differentiable": False,
        "rewards.detector.scorer": "benchmarks.watchdog.grid_scorer:GridScorer",
        "rewards.detector.model": "null",
        "rewards.detector.differentiable": True,
        "alignment.matching_weight": 0.05,
        "alignment.learning_rate_student": 1.5e-3,
    },
}
"""Runs that hack: no matching at 20 times the run file's rate; back-propagation of hps alone, without matching, at 6
times the rate; and a reward that likes grids, under the name `detector`, at 6 times the rate with matching.
"""
CLEAN: Mapping[str, Options] = {
    "clean": {},
    "clean_policy": {"alignment.reward_gradient_weight": 0, "alignment.matching_weight": 1.0},
}
"""The demo's settings; and the policy gradient with matching, without back-propagation."""
ARMS: Mapping[str, Options] = {**HACKS, **CLEAN}
TRAINED: Mapping[str, tuple[str, ...]] = {
    "no_matching": ("hps", "pickscore", "detector"),
    "one_reward": ("hps",),
    "grid_reward": ("hps", "detector"),
    "clean": ("hps", "pickscore", "detector"),
    "clean_policy": ("hps", "pickscore", "detector"),
}
"""Rewards that each run trains on; the others are held out."""
CLAIMS_TRAINED: Mapping[str, tuple[str, ...]] = {
    "B": ("detector",),
    "C": ("detector", "hps"),
    "D": ("detector", "hps"),
    "E": ("ocr",),
}
"""The same of the claims' runs (`benchmarks/claims`)."""
CLAIMS_HACKED = (("C", "back_propagation"), ("E", "nft"), ("E", "surrogate_reward_002"))
"""Arms of the claims whose gold collapses, as the claims' own sections of docs/results.md say."""
