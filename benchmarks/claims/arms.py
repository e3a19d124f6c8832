"""The claims, and the arms that are compared for each: run file and options.

An arm's options are complete: it does not change when the demo's settings do. `{seed}` and `{runs}` are filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Options = Mapping[str, object]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        options: run-file options, as on the command line.
        start: the arm whose cold start this one begins from; None: it makes its own.
    """

    options: Options
    start: str | None = None


@dataclass(frozen=True)
class Claim:
    """Arms that are compared with each other.

    Attributes:
        statement: what the paper or we say.
        reference: the arm that the others' differences are taken from.
        policy: the policy of the final table that is compared, `cold_start` or `rtdmd`.
        common: options of every arm; an arm's own win.
        prompts: files of the evaluation's and the training's prompts, see `prompts.py`.
        preparing: arms that only make a start for the others.
    """

    statement: str
    config: str
    reference: str
    policy: str
    common: Options
    arms: Mapping[str, Arm]
    prompts: tuple[str, str] = ("zoo/prompts/evaluation.txt", "zoo/prompts/train.txt")
    preparing: Mapping[str, Arm] = field(default_factory=dict)


FINAL_FROM = 256
FINAL_TABLE: Options = {
    "evaluation.final_from": FINAL_FROM,
    "evaluation.final_prompts": 256,
    "evaluation.final_images_per_prompt": 2,
    "evaluation.teacher": False,
    "checkpoint.every": 50,
    "learner.threads": 1,
}
"""Of these prompts a table uses those that are its own, see `prompts.py`."""

COLD_START: Options = {
    "cold_start.batch_size": 16,
    "cold_start.student_every": 1,
    "cold_start.learning_rate_student": 1e-3,
    "cold_start.learning_rate_fake": 1e-3,
    "cold_start.learning_rate_schedule": "linear",
    "cold_start.gradient_clip_student": 0.01,
    "cold_start.gradient_clip_fake": 0.01,
    "cold_start.ema_decay": 0.9,
}
AMBIENT: Options = {
    "cold_start.objective": "ambient",
    "cold_start.consistency_weight": 0.01,
    "cold_start.consistency_fraction": 0.25,
}
CLEAN: Options = {"cold_start.objective": "clean", "cold_start.consistency_weight": 0.0}


def _cold_start(objective: Options, iterations: int, every: int, **others: object) -> Arm:
    length = {"cold_start.iterations": iterations, "evaluation.cold_start_every": every}
    return Arm({**objective, **length, **{f"cold_start.{name}": value for name, value in others.items()}})


ALIGNMENT: Options = {
    "alignment.prompts_per_iteration": 12,
    "alignment.group_size": 16,
    "alignment.learning_rate_schedule": "linear",
    "alignment.weight_decay_student": 0.0,
    "alignment.lora_init_std": "null",
    "alignment.ema_decay": 0.8,
    "alignment.ema_every": 1,
    "alignment.signal_every": 10,
    "alignment.micro_batch": 32,
    "evaluation.every": 20,
    "evaluation.prompts": 128,
}
"""Options of every arm that aligns."""
NO_MATCHING: Options = {"alignment.matching_weight": 0.0, "alignment.consistency_weight": 0.0}
NO_BACK_PROPAGATION: Options = {"alignment.reward_gradient_weight": 0.0}
NO_POLICY: Options = {"alignment.policy_gradient": "none"}
POLICY_ALONE: Options = {
    **ALIGNMENT,
    **NO_MATCHING,
    **NO_BACK_PROPAGATION,
    "alignment.iterations": 40,
    "alignment.train_fraction": 0.5,
    "alignment.learning_rate_student": 1e-3,
}
DETECTOR_ALONE: Options = {
    f"rewards.{name}.{key}": value
    for name in ("hps", "pickscore")
    for key, value in (("weight", 0), ("differentiable", False), ("evaluation_only", True))
}
"""The only trained reward has no gradient; hps, pickscore and gold are held out."""

HYBRID: Options = {
    **ALIGNMENT,
    "alignment.train_fraction": 1.0,
    "alignment.matching_weight": 0.03,
    "alignment.reward_gradient_weight": 0.4,
    "alignment.reward_gradient_clip": 0.02,
    "alignment.learning_rate_student": 5e-4,
    "alignment.learning_rate_fake": 1e-3,
    "cold_start.consistency_fraction": 0.25,
}
"""At the start of stage 2 matching has a third of the measured signal, back-propagation two thirds. The policy
gradient's norm is the largest, and two half batches agree on too little of it for an estimate of its share.
"""
EARLY_START = _cold_start(AMBIENT, 300, 150)
"""A student of the early teacher, with room."""


def _aligned(*changes: Options) -> Arm:
    """An arm that starts from the student of the early teacher."""
    merged = dict(EARLY_START.options)
    for change in changes:
        merged |= change
    return Arm(merged, start="start")


def _policy(policy_gradient: str, **others: object) -> Arm:
    chosen = {"policy_gradient": policy_gradient, **others}
    return Arm({f"alignment.{name}": value for name, value in chosen.items()})


TEXT: Options = {
    **ALIGNMENT,
    **NO_BACK_PROPAGATION,
    "alignment.iterations": 30,
    "alignment.prompts_per_iteration": 8,
    "alignment.train_fraction": 0.5,
    "alignment.matching_weight": 0.02,
    "alignment.learning_rate_student": 2e-3,
    "alignment.learning_rate_fake": 1e-3,
    "alignment.ema_decay": 0.9,
    "evaluation.every": 10,
    "evaluation.prompts": 64,
}
"""The OCR engine is the only trained reward, and has no gradient."""
TEXT_START = _cold_start(CLEAN, 25, 25)
"""A short distillation: rewards have room."""


def _text(policy_gradient: str, **others: object) -> Arm:
    """An arm that starts from a short distillation of the text world's teacher."""
    return Arm({**TEXT_START.options, **_policy(policy_gradient, **others).options}, start="start")


CLAIMS: dict[str, Claim] = {
    "A": Claim(
        statement="AC-DMD distils better than plain DMD",
        config="deploy/runs/shapes_finished.yaml",
        reference="plain",
        policy="cold_start",
        common={**FINAL_TABLE, **COLD_START, "alignment.iterations": 0, "evaluation.prompts": 128},
        arms={
            "plain": _cold_start(CLEAN, 600, 150),
            "ac_dmd": _cold_start(AMBIENT, 600, 150),
            "plain_150": _cold_start(CLEAN, 150, 50),
            "plain_300": _cold_start(CLEAN, 300, 50),
            "ac_dmd_batch_64": _cold_start(AMBIENT, 150, 50, batch_size=64),
            "ac_dmd_two_fake_updates": _cold_start(AMBIENT, 900, 150, student_every=2),
            "plain_1450": _cold_start(CLEAN, 1450, 150),
            "ac_dmd_1450": _cold_start(AMBIENT, 1450, 150),
        },
    ),
    "B": Claim(
        statement="SubGRPO trains better than all-step GRPO (from the teacher in four steps, no cold start)",
        config="deploy/runs/shapes_finished.yaml",
        reference="grpo",
        policy="rtdmd",
        common={**FINAL_TABLE, **POLICY_ALONE, **DETECTOR_ALONE, "cold_start.iterations": 0},
        arms={
            "grpo": _policy("grpo"),
            "subgrpo_2": _policy("subgrpo", selected_steps=2),
            "subgrpo_1": _policy("subgrpo", selected_steps=1),
            "shuffled": _policy("subgrpo", selected_steps=2, shuffled_advantages=True),
        },
    ),
    "C": Claim(
        statement="All three terms train better than any of them alone",
        config="deploy/runs/shapes.yaml",
        reference="all",
        policy="rtdmd",
        common={
            **FINAL_TABLE,
            **COLD_START,
            **HYBRID,
            "alignment.iterations": 40,
            "alignment.prompts_per_iteration": 8,
            "alignment.group_size": 12,
        },
        arms={
            "all": _aligned(),
            "policy": _aligned(NO_MATCHING, NO_BACK_PROPAGATION),
            "back_propagation": _aligned(NO_MATCHING, NO_POLICY),
            "matching": _aligned(NO_BACK_PROPAGATION, NO_POLICY),
            "policy_and_matching": _aligned(NO_BACK_PROPAGATION),
            "gentle": _aligned({"alignment.reward_gradient_weight": 0.1, "alignment.matching_weight": 0.09}),
        },
        preparing={"start": Arm({**EARLY_START.options, "alignment.iterations": 0})},
    ),
    "D": Claim(
        statement="Four aligned steps beat the teacher's 28",
        config="deploy/runs/shapes.yaml",
        reference="all",
        policy="rtdmd",
        common={
            **FINAL_TABLE,
            **COLD_START,
            **HYBRID,
            "alignment.iterations": 60,
            "alignment.learning_rate_student": 1.5e-3,
            "evaluation.teacher": True,
        },
        arms={"all": _aligned()},
        preparing={"start": Arm({**EARLY_START.options, "alignment.iterations": 0, "evaluation.teacher": False})},
    ),
    "E": Claim(
        statement="SubGRPO trains on a reward that has no gradient",
        config="deploy/runs/text.yaml",
        reference="shuffled",
        policy="rtdmd",
        common={**FINAL_TABLE, **COLD_START, **TEXT},
        prompts=("zoo/prompts/text_evaluation.txt", "zoo/prompts/text_train.txt"),
        arms={
            "shuffled": _text("subgrpo", shuffled_advantages=True),
            "subgrpo": _text("subgrpo"),
            "surrogate_reward": _text("surrogate_reward", matching_weight=1.0),  # as published: about as large
            "surrogate_reward_002": _text("surrogate_reward"),  # SubGRPO's weight of matching
            "nft": _text("nft"),
        },
        preparing={"start": Arm({**TEXT_START.options, "alignment.iterations": 0})},
    ),
}
