"""The run files of the published models against the authors' released configurations.

`tests/data/published_settings.json` has the values of the authors' configurations by file and key (its `source` names
repository and commit), without paths, logging, evaluation and saving. Every key

- is a setting of ours with the same value,
- is `fixed`: our code always does so, and other tests guard it,
- stands in `DEPARTURES`, whose effect docs/method.md states, or
- stands in `WITHOUT_COUNTERPART`, with the reason.

A key that no table has fails the test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from common import renoise_levels
from common.backbones.base import Backbone
from common.config.run import Config
from common.config.stages import AlignmentConfig, ColdStartConfig
from learner.objectives import consistency
from learner.preflight.command_line import parse
from learner.preflight.explanation import matters
from learner.preflight.published import DEPARTURES as OPTIONS_THAT_DEPART
from learner.preflight.published import MODELS as PUBLISHED
from learner.preflight.published import Model, flat, model_of
from learner.training.optimizer import BETAS, EPSILON
from tests.helpers.tiny_families import FAMILIES

PROJECT_ROOT = Path(__file__).resolve().parents[4]
RUNS = PROJECT_ROOT / "deploy/runs"
AUTHORS = json.loads((PROJECT_ROOT / "tests/data/published_settings.json").read_text())["values"]
MODELS = {
    "sd3m": "sd3m",
    "sd35m": "sd35m",
    "flux2_klein_4b": "flux2_4b",
    "flux2_klein_9b": "flux2_9b",
    "flux1_dev": "flux1_dev",
}
"""Our run files' name of a model -> the authors'."""
GPUS = {"sd3m": 16, "sd35m": 8, "flux2_klein_4b": 16, "flux2_klein_9b": 32, "flux1_dev": 32}
"""GPUs of stage 2 as published; each samples `sample_batch_size` x `num_batches_per_epoch` images an iteration."""
COLD_START_GPUS = 8
TRAINED_REWARDS = {"clipscore": "clipscore", "geneval": "geneval_parts", "hpsv2": "hps", "pickscore": "pickscore"}
"""The authors' name of a trained reward -> ours."""

Read = Callable[[Config], object]


def fixed(value: object) -> Read:
    """Settings that our code fixes for every run file; a record of the claim, not a comparison with the code."""
    return lambda _: value


def raw_steps(config: Config) -> list[int]:
    steps = config.sampling.steps
    return [1000 * (steps - step) // steps for step in range(steps)]


def teacher_path(config: Config) -> str:
    settings = config.backbone.model_dump(mode="json")
    return str(settings.get("teacher_path") or settings["path"])


def student_guidance(config: Config) -> float:
    """Of a student that takes guidance as an input; others are not guided, which is 1 too."""
    return float(config.backbone.model_dump().get("student_guidance", 1.0))


def weight_of(reward: str) -> Read:
    return lambda config: {one.name: one.weight for one in config.rewards if one.trained}[TRAINED_REWARDS[reward]]


def optimizer(
    prefix: str, stage: Callable[[Config], ColdStartConfig | AlignmentConfig], network: str
) -> dict[str, Read]:
    def read(name: str) -> Read:
        return lambda config: stage(config).model_dump()[f"{name}_{network}"]

    return {
        f"{prefix}.lr": read("learning_rate"),
        f"{prefix}.weight_decay": read("weight_decay"),
        f"{prefix}.max_grad_norm": read("gradient_clip"),
        f"{prefix}.beta1": fixed(BETAS[0]),
        f"{prefix}.beta2": fixed(BETAS[1]),
        f"{prefix}.eps": fixed(EPSILON),
        f"{prefix}.warmup_steps": fixed(0),
    }


def interval(prefix: str, weight: Read, names: dict[str, str]) -> dict[str, Read]:
    """AC-DMD's sub-interval and consistency regulariser; `names` are the authors' in this stage."""
    keys: dict[str, Read] = {
        "start_mode": fixed("next_sigma"),
        "end_timestep": fixed(1000.0),
        "timestep_offset": fixed(1000 * renoise_levels.RENOISE_MARGIN),
        "min_step": fixed(1000 * renoise_levels.RENOISE_MIN),
        "max_step": fixed(1000 * renoise_levels.RENOISE_MAX),
        "target_formula_move_scale_out": fixed(True),
        "fake_loss_weight_clamp_min": fixed(0.0),
        "fake_loss_weight_clamp_max": lambda config: config.cold_start.fake_max_weight,
        "consistency_enabled": lambda config: float(str(weight(config))) > 0,
        "consistency_epsilon_timestep": fixed(float(consistency.MAX_BACKWARD_STEPS)),
        "consistency_num_steps": fixed(1),
        "consistency_stopgrad_transitions": fixed(True),
        "consistency_use_two_sample_unbiased": fixed(True),
    }
    return {f"{prefix}{names.get(key, key)}": read for key, read in keys.items()}


MODEL: dict[str, Read] = {
    "model.pretrained_path": teacher_path,
    "model.dtype": lambda config: {"bfloat16": "bf16"}[config.backbone.dtype],
    "model.image_resolution": lambda config: config.backbone.height,
    "model.gradient_checkpointing": lambda config: config.backbone.gradient_checkpointing,
    "dmd.num_inference_steps": lambda config: config.sampling.steps,
    "dmd.denoising_step_list": raw_steps,
    "dmd.cps_eta": lambda config: config.sampling.eta,
    "dmd.generator_scheduler": fixed("cps"),
    "train.autocast_dtype": fixed("bf16"),
} | {
    f"model.{network}_lora.{key}": read
    for network in ("generator", "fake_score")
    for key, read in {
        "enabled": fixed(True),
        "rank": lambda config: config.lora.rank,
        "lora_alpha": lambda config: config.lora.alpha,
    }.items()
}

COLD_START: dict[str, Read] = (
    MODEL
    | optimizer("solver.generator", lambda config: config.cold_start, "student")
    | optimizer("solver.fake_score", lambda config: config.cold_start, "fake")
    | interval(
        "ac_dmd.",
        lambda config: config.cold_start.consistency_weight,
        {"min_step": "min_renoise_step", "max_step": "max_renoise_step"},
    )
    | {
        "prompt_path": lambda config: f"dataset/{Path(config.prompts.train).stem.removesuffix('_train')}",
        "model.generator_lora.init_lora_weights": lambda config: {None: "gaussian"}[config.cold_start.lora_init_std],
        "model.fake_score_lora.init_lora_weights": lambda config: {None: "gaussian"}[config.cold_start.lora_init_std],
        "dmd.real_guidance_scale_min": lambda config: config.backbone.guidance_scale,
        "dmd.real_guidance_scale_max": lambda config: config.backbone.guidance_scale,
        "dmd.fake_guidance_scale": student_guidance,
        "dmd.fake_train_guidance_scale": student_guidance,
        "dmd.fake_update_ratio": lambda config: config.cold_start.student_every,
        "dmd.gradient_normalization": fixed(True),
        "dmd.random_stop_idx": fixed(True),
        "ac_dmd.enabled": fixed(True),
        "ac_dmd.consistency_weight": lambda config: config.cold_start.consistency_weight,
        "train.batch_size": lambda config: config.cold_start.batch_size / COLD_START_GPUS,
        "train.gradient_accumulation_steps": fixed(1),
        "train.use_ema": fixed(True),
        "train.ema_decay": lambda config: config.cold_start.ema_decay,
        "train.ema_every": fixed(1),
    }
)

ALIGNMENT: dict[str, Read] = (
    MODEL
    | optimizer("solver.fake_score", lambda config: config.alignment, "fake")
    | interval(
        "grpo.last_step_loss.ac_",
        lambda config: config.alignment.consistency_weight,
        {},
    )
    | {f"grpo.reward_fn.{name}": weight_of(name) for name in TRAINED_REWARDS}
    | {
        "prompt_path": lambda config: f"dataset/{Path(config.prompts.train).stem.removesuffix('_train')}",
        # What the authors' code does for "gaussian" after a merge: A ~ N(0, 1).
        "model.generator_lora.init_lora_weights": lambda config: {1.0: "gaussian"}[config.alignment.lora_init_std],
        "model.fake_score_lora.init_lora_weights": lambda config: {1.0: "gaussian"}[config.alignment.lora_init_std],
        "grpo.learning_rate": lambda config: config.alignment.learning_rate_student,
        "grpo.adam_weight_decay": lambda config: config.alignment.weight_decay_student,
        "grpo.max_grad_norm": lambda config: config.alignment.gradient_clip_student,
        "grpo.adam_beta1": fixed(BETAS[0]),
        "grpo.adam_beta2": fixed(BETAS[1]),
        "grpo.adam_epsilon": fixed(EPSILON),
        "grpo.adv_clip_max": lambda config: config.alignment.advantage_clip,
        "grpo.beta": fixed(0.0),
        "grpo.cfg_in_training": fixed(False),
        "grpo.clip_range": lambda config: config.alignment.clip_low,
        "grpo.clip_range_lt": lambda config: config.alignment.clip_low,
        "grpo.clip_range_gt": lambda config: config.alignment.clip_high,
        "grpo.denoising_step_list": raw_steps,
        "grpo.num_steps": lambda config: config.sampling.steps,
        "grpo.noise_level": lambda config: config.sampling.eta,
        "grpo.sde_type": fixed("cps"),
        "grpo.guidance_scale": student_guidance,
        "grpo.same_latent": fixed(False),
        "grpo.num_image_per_prompt": lambda config: config.alignment.group_size,
        "grpo.num_inner_epochs": fixed(1),
        "grpo.per_prompt_global_std": lambda config: config.alignment.advantage_scale == "batch",
        "grpo.per_prompt_stat_tracking": fixed(True),
        "grpo.weight_advantages": fixed(True),
        "grpo.use_ema": fixed(True),
        "grpo.ema_update_interval": lambda config: config.alignment.ema_every,
        "grpo.step_selection.enabled": lambda config: config.alignment.policy_gradient == "subgrpo",
        "grpo.step_selection.num_train_steps": lambda config: config.alignment.selected_steps,
        "grpo.step_selection.range_start": fixed(0),
        "grpo.step_selection.range_end": lambda config: config.sampling.steps - 2,
        "grpo.last_step_loss.enabled": fixed(True),
        "grpo.last_step_loss.loss_type": fixed("ac_dmd"),
        "grpo.last_step_loss.train_steps": fixed([-1]),
        "grpo.last_step_loss.weight": lambda config: config.alignment.matching_weight,
        "grpo.last_step_loss.gradient_normalization": fixed(True),
        "grpo.last_step_loss.real_guidance_scale_min": lambda config: config.backbone.guidance_scale,
        "grpo.last_step_loss.real_guidance_scale_max": lambda config: config.backbone.guidance_scale,
        "grpo.last_step_loss.fake_guidance_scale": student_guidance,
        "grpo.last_step_loss.ac_fake_train_guidance_scale": student_guidance,
        # Theirs stands beside a switch: a weight that is switched off is 0 here.
        "grpo.last_step_loss.ac_consistency_weight": lambda config: config.alignment.consistency_weight or 0.01,
        "grpo.last_step_loss.bp_enabled": lambda config: config.alignment.reward_gradient_weight > 0,
        "grpo.last_step_loss.bp_grad_scale": lambda config: config.alignment.reward_gradient_weight,
        "grpo.last_step_loss.bp_reward_margin": lambda config: config.alignment.reward_target,
        "grpo.last_step_loss.bp_only_deterministic": fixed(True),
        "grpo.last_step_loss.bp_use_training_reward_fn": fixed(True),
    }
)

INFERENCE: dict[str, Read] = {
    "num_steps": lambda config: config.sampling.steps,
    "cps_eta": lambda config: config.sampling.eta,
    "denoising_step_list": raw_steps,
    "guidance_scale": student_guidance,
    "dtype": lambda config: {"bfloat16": "bf16"}[config.backbone.dtype],
}

DEPARTURES = {
    "model.generator_lora.merge_before_training": "stacked",
    "model.fake_score_lora.merge_before_training": "stacked",
    "grpo.ema_decay": "once per micro-batch",
    "grpo.gradient_accumulation_steps": "once per micro-batch",
    "image_resolution": "1024",
}
"""Keys of the authors that we follow in another way -> words of the row in docs/method.md that says how."""

WITHOUT_COUNTERPART = {
    "model.model_type": "the family",
    "model.fsdp_patch_embed_linear": "their sharding",
    "distributed": "how inference is spread",
    "distributed.*": "their process groups",
    "train.seed": "a seed",
    "train.total_steps": "an upper bound: the published checkpoint is that of INFERENCE's lora_paths",
    "grpo.num_epochs": "an upper bound",
    "dmd.fake_timestep_sampling": "plain DMD's, replaced by ac_dmd",
    "dmd.fake_min_step": "plain DMD's, replaced by ac_dmd",
    "dmd.fake_max_step": "plain DMD's, replaced by ac_dmd",
    "dmd.logit_*": "plain DMD's, replaced by ac_dmd",
    "dmd.dmd_*": "plain DMD's, replaced by ac_dmd",
    "dmd.min_step": "plain DMD's, replaced by ac_dmd",
    "dmd.max_step": "plain DMD's, replaced by ac_dmd",
    "dmd.num_train_timesteps": "their unit of time: 1000 sigma",
    "ac_dmd.boundary_sigma_index": "of another start_mode",
    "ac_dmd.all_include_terminal_when_no_random_stop": "of random_stop_idx = false",
    "grpo.sampling_mode": "the only one that the trainer has",
    "grpo.timestep_fraction": "replaced by step_selection",
    "grpo.train_batch_size": "micro-batches",
    "grpo.vae_decode_batch_size": "micro-batches",
    "grpo.last_step_loss.bp_batch_size": "micro-batches",
    "grpo.last_step_loss.fake_score_batch_size": "micro-batches",
    "grpo.last_step_loss.fake_min_step": "plain DMD's, replaced by ac_*",
    "grpo.last_step_loss.fake_max_step": "plain DMD's, replaced by ac_*",
    "grpo.last_step_loss.fake_timestep_sampling": "plain DMD's, replaced by ac_*",
    "grpo.last_step_loss.fake_logit_*": "plain DMD's, replaced by ac_*",
    "grpo.last_step_loss.timestep_sampling": "plain DMD's, replaced by ac_*",
    "grpo.last_step_loss.logit_*": "plain DMD's, replaced by ac_*",
    "grpo.last_step_loss.min_step": "the same bounds as ac_min_step",
    "grpo.last_step_loss.max_step": "the same bounds as ac_max_step",
}
"""Keys of the authors that say nothing about the method (a star stands for any ending) -> why."""

COMPARED_ELSEWHERE = (
    "model.generator_lora.target_modules",
    "model.fake_score_lora.target_modules",
    "model.generator_init_path",
    "model.fake_score_init_path",
    "model.teacher_init_path",
    "grpo.sample_batch_size",
    "grpo.num_batches_per_epoch",
    "lora_paths",
)
"""Keys that tests of their own compare."""


def run_file(stage: str, model: str) -> Config:
    return parse(["--config", str(RUNS / f"{stage}_{model}.yaml")], {}).config


def authors_model(model: str) -> Model:
    return next(one for one in PUBLISHED if one.run_file == model)


def authors(kind: str, model: str) -> dict[str, Any]:
    return dict(AUTHORS[f"configs/{kind}/{MODELS[model]}.yaml"])


def unexplained(keys: Iterable[str], table: dict[str, Read]) -> list[str]:
    known = (*DEPARTURES, *WITHOUT_COUNTERPART, *COMPARED_ELSEWHERE)
    return [key for key in keys if key not in table and not any(fnmatchcase(key, one) for one in known)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("kind", "stage", "table"),
    [("cold_start", "cold_start", COLD_START), ("rtdmd", "rtdmd", ALIGNMENT), ("inference", "rtdmd", INFERENCE)],
)
def test_every_setting_is_the_authors(kind: str, stage: str, table: dict[str, Read], model: str) -> None:
    config, published = run_file(stage, model), authors(kind, model)
    found = {key: read(config) for key, read in table.items() if key in published}
    assert found == {key: published[key] for key in found}
    assert unexplained(published, table) == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", ["cold_start", "rtdmd"])
def test_a_run_file_has_the_values_of_the_table_but_for_the_departures_that_it_names(stage: str, model: str) -> None:
    """So the table is the authors' too, as far as the test above compares the same run file with theirs."""
    config, table = run_file(stage, model), authors_model(model).values
    assert model_of(config) is authors_model(model)
    found, used = flat(config), {key: value for key, value in table.items() if matters(key, config)}
    if stage == "cold_start":  # stage 1 alone
        assert not any(key.startswith("alignment.") for key in used)
    different = {key for key, value in used.items() if found[key] != value}
    assert different == (set() if stage == "cold_start" else set(OPTIONS_THAT_DEPART))


def test_both_run_files_of_a_model_use_every_option_of_the_table() -> None:
    for model in MODELS:
        configs = [run_file(stage, model) for stage in ("cold_start", "rtdmd")]
        unused = [key for key in authors_model(model).values if not any(matters(key, config) for config in configs)]
        assert unused == []


def test_the_copy_is_the_one_that_lies_beside_the_project() -> None:
    original = PROJECT_ROOT.parent / "shared/parity/published_settings.json"
    if not original.is_file():
        pytest.skip("there is no shared/parity beside this clone: only the copy in tests/data is read")
    assert json.loads(original.read_text())["values"] == AUTHORS


@pytest.mark.parametrize(
    ("kind", "table"), [("cold_start", COLD_START), ("rtdmd", ALIGNMENT), ("inference", INFERENCE)]
)
def test_every_compared_key_is_one_of_the_authors(kind: str, table: dict[str, Read]) -> None:
    assert set(table) <= {key for model in MODELS for key in authors(kind, model)}


def test_no_reason_is_given_for_a_key_that_nobody_has() -> None:
    keys = {key for kind in ("cold_start", "rtdmd", "inference") for model in MODELS for key in authors(kind, model)}
    known = (*DEPARTURES, *WITHOUT_COUNTERPART, *COMPARED_ELSEWHERE)
    assert [one for one in known if not any(fnmatchcase(key, one) for key in keys)] == []


@pytest.mark.parametrize("model", MODELS)
def test_both_stages_have_the_same_model_and_the_published_checkpoints(model: str) -> None:
    first, second = run_file("cold_start", model), run_file("rtdmd", model)
    assert (first.backbone, first.lora, first.sampling) == (second.backbone, second.lora, second.sampling)
    assert first.backbone.height == first.backbone.width
    cold_start, aligned = authors("inference", model)["lora_paths"]
    assert f"checkpoint-{first.cold_start.iterations}/generator_ema" in cold_start
    assert f"checkpoint-{second.alignment.iterations}/generator_ema" in aligned
    assert first.alignment.iterations == 0
    start = Path("runs") / first.run.name / f"checkpoints/cold_start-{first.cold_start.iterations:06d}"
    assert second.cold_start.from_checkpoint == start


@pytest.mark.parametrize("model", MODELS)
def test_an_iteration_has_as_many_samples_as_published(model: str) -> None:
    alignment, published = run_file("rtdmd", model).alignment, authors("rtdmd", model)
    samples = GPUS[model] * published["grpo.num_batches_per_epoch"] * published["grpo.sample_batch_size"]
    assert alignment.prompts_per_iteration * alignment.group_size == samples


@pytest.mark.parametrize("model", MODELS)
def test_the_networks_start_from_the_published_models(model: str) -> None:
    config, published = run_file("rtdmd", model), authors("rtdmd", model)
    for key in ("model.teacher_init_path", "model.fake_score_init_path"):
        assert teacher_path(config) == (published.get(key) or published["model.pretrained_path"])
    student = authors("cold_start", model).get("model.generator_init_path") or published["model.pretrained_path"]
    assert str(config.backbone.path) == student


@pytest.mark.parametrize("model", MODELS)
def test_the_moving_average_of_stage_two_is_theirs_at_one_step_per_update(model: str) -> None:
    published, alignment = authors("rtdmd", model), run_file("rtdmd", model).alignment
    expected = published["grpo.ema_decay"] ** published["grpo.num_batches_per_epoch"]
    assert alignment.ema_decay == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("model", ["sd3m", "sd35m"])
def test_t5_has_as_many_tokens_as_published(model: str) -> None:
    """In the authors' code, not in a configuration: rtdmd/models/sd35.py, line 259."""
    assert run_file("rtdmd", model).backbone.model_dump()["max_sequence_length"] == 128


@pytest.mark.parametrize("model", MODELS)
def test_geneval_is_trained_by_parts_and_measured_by_its_own_verdict(model: str) -> None:
    by_scorer = {reward.scorer: reward for reward in run_file("rtdmd", model).rewards}
    assert by_scorer["geneval_parts"].trained
    assert by_scorer["geneval"].evaluation_only


# ── the layers that get an adapter ───────────────────────────────────────────────────────────────────────────────────


TINY = {
    "sd3m": "sd35m",  # the same layers, beside a second attention that neither has an adapter on
    "sd35m": "sd35m",
    "flux2_klein_4b": "flux2",
    "flux2_klein_9b": "flux2",
    "flux1_dev": "flux1",
}
"""Model -> the tiny family with its layers."""


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    loaded = {}
    for family in FAMILIES:
        directory = tmp_path_factory.mktemp(family.name)
        family.write(directory)
        loaded[family.name] = family.load(directory)
    return loaded


def authors_layers(targets: list[str], module: nn.Module) -> set[str]:
    """Linear layers that the authors' names bind to; `blocks.0..19.x` stands for twenty names."""
    patterns = [re.escape(target).replace(r"0\.\.19", r"\d+").replace(r"0\.\.23", r"\d+") for target in targets]
    layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    return {layer for layer in layers if any(re.search(rf"(^|\.){pattern}$", layer) for pattern in patterns)}


@pytest.mark.parametrize("model", MODELS)
def test_adapters_are_on_the_authors_layers(model: str, backbones: dict[str, Backbone]) -> None:
    backbone, published = backbones[TINY[model]], authors("rtdmd", model)
    assert run_file("rtdmd", model).lora.targets is None  # the family's own
    bank, base = backbone.adapters, backbone.adapters.modules()[0]
    expected = authors_layers(published["model.generator_lora.target_modules"], base)
    assert expected == authors_layers(published["model.fake_score_lora.target_modules"], base)
    bank._targets = type(backbone).lora_targets
    assert set(bank._bound_layers(base)) == expected


def test_every_departure_stands_in_the_documentation() -> None:
    page = (PROJECT_ROOT / "docs/method.md").read_text(encoding="utf-8")
    departures = page[page.index("## Departures") :]
    assert [words for words in DEPARTURES.values() if words not in departures] == []
