"""Settings of earlier versions: saved runs stay usable, and an old key in a run file names the new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.upgrade import RENAMED, upgraded
from common.errors import ConfigError
from learner.preflight.run_file import Draft, dump_config, load_config, load_saved_config
from tests.helpers.trained_run import tiny_config

OLD = {"weight_decay": 0.25, "gradient_clip": 0.5}


def saved_by_an_earlier_version(path: Path, backbone: dict[str, Any]) -> Path:
    """A dump from the version in which both networks of a stage shared their optimizer's settings."""
    values = yaml.safe_load(dump_config(tiny_config(path / "pipeline", path / "prompts.txt")))
    for stage in ("cold_start", "alignment"):
        new = [key for key in values[stage] if key.startswith(tuple(OLD)) or key == "lora_init_std"]
        values[stage] = {key: value for key, value in values[stage].items() if key not in new} | OLD
    del values["alignment"]["consistency_weight"]
    values["cold_start"]["consistency_weight"] = 0.75
    values["backbone"] |= backbone
    values["backbone"].pop("student_guidance", None)
    saved = path / "config.yaml"
    saved.write_text(yaml.safe_dump(values))
    return saved


def test_a_saved_run_means_what_it_did(tmp_path: Path) -> None:
    config = load_saved_config(saved_by_an_earlier_version(tmp_path, {}))
    for stage in (config.cold_start, config.alignment):
        assert (stage.weight_decay_student, stage.weight_decay_fake) == (0.25, 0.25)
        assert (stage.gradient_clip_student, stage.gradient_clip_fake) == (0.5, 0.5)
        assert (stage.consistency_weight, stage.lora_init_std) == (0.75, None)


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_a_saved_student_keeps_the_guidance_it_was_trained_with(tmp_path: Path, family: str) -> None:
    saved = saved_by_an_earlier_version(tmp_path, {"family": family, "guidance_scale": 3.5})
    assert load_saved_config(saved).backbone.model_dump()["student_guidance"] == 3.5


def test_what_is_written_today_is_left_as_it_is(tmp_path: Path) -> None:
    values = yaml.safe_load(dump_config(tiny_config(tmp_path, tmp_path)))
    assert upgraded(values) == values


def test_the_saved_values_are_not_changed(tmp_path: Path) -> None:
    values = yaml.safe_load(saved_by_an_earlier_version(tmp_path, {}).read_text())
    upgraded(values)
    assert values["alignment"]["weight_decay"] == 0.25


@pytest.mark.parametrize("key", RENAMED)
def test_an_old_key_in_a_run_file_is_an_error_that_names_the_new_keys(tmp_path: Path, key: tuple[str, str]) -> None:
    stage, name = key
    draft = Draft("run.yaml")
    draft.lay(yaml.safe_load(dump_config(tiny_config(tmp_path, tmp_path))), "run.yaml")
    draft.lay({stage: {name: 0.1}}, f"option --{stage}.{name}")
    with pytest.raises(ConfigError, match=rf"{stage}\.{name}: unknown key; it is now {stage}\.{name}_student and "):
        draft.build()


def test_a_run_file_is_not_upgraded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is now"):
        load_config(saved_by_an_earlier_version(tmp_path, {}))


def test_a_saved_run_with_values_that_are_refused_today_stays_usable(tmp_path: Path) -> None:
    values = yaml.safe_load(dump_config(tiny_config(tmp_path / "pipeline", tmp_path / "prompts.txt")))
    values["reward_client"]["trusted_hosts"] = ["gpu-8"]
    values["redis"] = {"url": "redis://h:6379/0?password=secret"}
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(values))
    config = load_saved_config(saved)
    assert config.redis.url == "redis://h:6379/0"
    with pytest.raises(
        ConfigError, match=r"trusted_hosts: unknown key; it is no longer needed: servers that sign their registration"
    ):
        load_config(saved)
