"""The published settings of every model, as options of ours: the one table of them.

Source: the released configurations and code of RTDMD's authors (github.com/Harahan/RTDMD at 6c3cb03).
`tests/unit/common/config/test_published_settings.py` compares our run files with it and with the authors' own files
(`tests/data/published_settings.json`), `rtdmd train --explain` compares a run file of the user's, and the preset tables
of docs/backbones.md are made from it (`learner/preflight/preset_tables.py`).

Values are as `Config.model_dump(mode="json")` has them. Settings that only say where or how fast a run computes are not
in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import MappingProxyType

from common.config.run import Config

Value = object
"""A JSON value: number, text, true, false, null or a list."""

TRAINED, BACK_PROPAGATED = "rewards (trained)", "rewards (back-propagated)"
"""Keys of what the table has of the rewards: scorer -> weight, and the scorers with a gradient."""

SHARED: Mapping[str, Value] = MappingProxyType(
    {
        "backbone.dtype": "bfloat16",
        "backbone.gradient_checkpointing": True,
        "lora.rank": 32,
        "lora.alpha": 64,
        "lora.targets": None,
        "sampling.steps": 4,
        "sampling.eta": 0.9,
        "cold_start.objective": "ambient",
        "cold_start.iterations": 15_000,
        "cold_start.batch_size": 72,
        "cold_start.student_every": 10,
        "cold_start.learning_rate_schedule": "constant",
        "cold_start.weight_decay_student": 0.0,
        "cold_start.weight_decay_fake": 0.0,
        "cold_start.gradient_clip_student": 1.0,
        "cold_start.gradient_clip_fake": 1.0,
        "cold_start.lora_init_std": None,
        "cold_start.ema_decay": 0.99,
        "cold_start.consistency_weight": 0.01,
        "cold_start.consistency_fraction": 1.0,
        "cold_start.fake_max_weight": 10.0,
        "alignment.iterations": 1_000,
        "alignment.policy_gradient": "subgrpo",
        "alignment.selected_steps": 2,
        "alignment.same_latent": False,
        "alignment.train_fraction": 1.0,
        "alignment.step_weights": "equal",
        "alignment.shuffled_advantages": False,
        "alignment.clip_low": 1e-5,
        "alignment.clip_high": 1e-5,
        "alignment.old_surrogate": "rollout",
        "alignment.surrogate": "squared_error",
        "alignment.advantage_scale": "batch",
        "alignment.advantage_clip": 5.0,
        "alignment.matching_weight": 1e-3,
        "alignment.reward_gradient_weight": 1e-4,
        "alignment.reward_gradient_clip": None,
        "alignment.reward_target": 3.0,
        "alignment.learning_rate_student": 3e-6,
        "alignment.learning_rate_schedule": "constant",
        "alignment.weight_decay_student": 1e-4,
        "alignment.weight_decay_fake": 0.0,
        "alignment.gradient_clip_student": 1.0,
        "alignment.gradient_clip_fake": 1.0,
        "alignment.lora_init_std": 1.0,
        "alignment.lora_rank": None,
        "alignment.ema_decay": 0.185,
        "alignment.ema_every": 8,
        "alignment.max_staleness": 0,
        TRAINED: {"clipscore": 1.0, "geneval_parts": 1.0, "hps": 1.0, "pickscore": 1.0},
        BACK_PROPAGATED: ["clipscore", "hps", "pickscore"],
    }
)
"""Values that all models have in common."""

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "lora.targets": "the projections of the joint attention; FLUX.2 also both of the single-stream blocks",
        "cold_start.lora_init_std": "1 / rank",
        "alignment.lora_rank": "lora.rank",
        "alignment.ema_decay": "0.9, applied 16 times in an iteration: 0.9^16",
        TRAINED: "GenEval by parts: a failed position counts differently here, see docs/method.md",
        "alignment.old_surrogate": "ours: the learner evaluates it, see docs/method.md",
    }
)
"""Remarks on values."""

DEPARTURES = ("alignment.old_surrogate",)
"""Options that our run files of the published models set in another way, on purpose."""


@dataclass(frozen=True)
class Model:
    """One published model; `own` are the values that differ between the models."""

    title: str
    run_file: str
    own: Mapping[str, Value]

    @property
    def values(self) -> dict[str, Value]:
        """All published values, by option."""
        return {**self.own, **SHARED}


def _model(
    title: str,
    run_file: str,
    backbone: Mapping[str, Value],
    *,
    side: int,
    rate: float,
    samples: tuple[int, int],
    fake_rate: float,
    consistency: float = 0.01,
) -> Model:
    prompts, group = samples
    return Model(
        title,
        run_file,
        {
            **{f"backbone.{key}": value for key, value in backbone.items()},
            "backbone.height": side,
            "backbone.width": side,
            "cold_start.learning_rate_student": rate,
            "cold_start.learning_rate_fake": rate,
            "alignment.prompts_per_iteration": prompts,
            "alignment.group_size": group,
            "alignment.learning_rate_fake": fake_rate,
            "alignment.consistency_weight": consistency,
        },
    )


def _sd3(path: str, guidance: float) -> dict[str, Value]:
    return {"family": "sd3", "path": path, "guidance_scale": guidance, "max_sequence_length": 128}


def _klein(size: str) -> dict[str, Value]:
    name = "black-forest-labs/FLUX.2-klein-"
    return {
        "family": "flux2",
        "path": f"{name}{size}",
        "teacher_path": f"{name}base-{size}",
        "guidance_scale": 4.0,
        "max_sequence_length": 512,
    }


FLUX1: Mapping[str, Value] = MappingProxyType(
    {
        "family": "flux1",
        "path": "black-forest-labs/FLUX.1-dev",
        "guidance_scale": 3.5,
        "student_guidance": 1.0,
        "max_sequence_length": 512,
    }
)
SD3M, SD35M = "stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3.5-medium"

MODELS = (
    _model("SD3-M", "sd3m", _sd3(SD3M, 7.0), side=1024, rate=3e-5, samples=(32, 16), fake_rate=3e-5),
    _model("SD3.5-M", "sd35m", _sd3(SD35M, 4.5), side=512, rate=3e-5, samples=(48, 24), fake_rate=3e-5),
    _model("FLUX.2-klein 4B", "flux2_klein_4b", _klein("4B"), side=512, rate=1e-6, samples=(64, 24), fake_rate=1e-6),
    _model(
        "FLUX.2-klein 9B",
        "flux2_klein_9b",
        _klein("9B"),
        side=512,
        rate=1e-6,
        samples=(64, 24),
        fake_rate=1e-6,
        consistency=0.0,
    ),
    _model("FLUX.1-dev", "flux1_dev", FLUX1, side=512, rate=3e-5, samples=(64, 24), fake_rate=1e-6, consistency=0.0),
)
"""The published models. `run_file` ends the names of ours: deploy/runs/cold_start_NAME.yaml and rtdmd_NAME.yaml."""


def model_of(config: Config) -> Model | None:
    """The published model that a run trains, by its family and the last part of its path; None for another model.

    A directory counts by its name: `/models/FLUX.1-dev` is FLUX.1-dev.
    """
    backbone = config.backbone.model_dump(mode="json")
    name = PurePath(str(backbone["path"])).name.lower()
    for model in MODELS:
        own = model.own
        if own["backbone.family"] == backbone["family"] and PurePath(str(own["backbone.path"])).name.lower() == name:
            return model
    return None


def flat(config: Config) -> dict[str, Value]:
    """Every option of a run by its key, but for those of the rewards, of which the table has the two keys above."""
    sections = config.model_dump(mode="json")
    values = {
        f"{section}.{key}": value
        for section, options in sections.items()
        if isinstance(options, dict)
        for key, value in options.items()
    }
    trained = [reward for reward in config.rewards if reward.trained]
    values[TRAINED] = {reward.scorer or reward.name: reward.weight for reward in sorted(trained, key=lambda r: r.name)}
    values[BACK_PROPAGATED] = sorted(reward.scorer or reward.name for reward in trained if reward.differentiable)
    return values
