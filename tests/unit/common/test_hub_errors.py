"""Hub names that cannot be had: the reason is named, and a variable that forbids downloads comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.hub_errors import not_given

PROJECT_ROOT = Path(__file__).resolve().parents[3]
DOORS = """
import sys
from pathlib import Path
from common.backbones import load_backbone, model_sizes
from common.config.backbones import Sd3Backbone
from common.config.run import LoraConfig
from common.errors import RtdmdError
settings = Sd3Backbone(family="sd3", path="nobody/nothing")
def pipeline(): model_sizes(settings, LoraConfig())
def backbone(): load_backbone(settings, LoraConfig(), None)
def prompts():
    from reward_servers.prompt_files import _source
    _source("hub:nobody/nothing/a.txt", "")
def lora():
    from learner.tools.lora_sources import find_lora
    find_lora("nobody/nothing")
for door in (pipeline, backbone, prompts, lora):
    try:
        door()
    except RtdmdError as error:
        print("diffusers" in sys.modules, error)
"""


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_every_door_names_the_variable_and_a_pipeline_is_refused_before_the_libraries_load(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("huggingface_hub")
    inherited = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment = inherited | {name: "true", "HF_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT_ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", DOORS], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    reason = f"{name} = true forbids downloads, and the hub's cache here does not have it; unset {name}"
    at_path = f"False no pipeline at nobody/nothing: there is no such directory, and {reason}"
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"{at_path}, or set backbone.path to a directory"] * 2
    assert lines[2] == f"False hub:nobody/nothing/a.txt: {reason}"
    assert lines[3].endswith(f" there is no nobody/nothing here, and {reason}")


def test_with_the_network_the_reason_is_the_clients_with_one_full_stop_less() -> None:
    pytest.importorskip("huggingface_hub")
    error = OSError("Repository Not Found.\nPlease log in.")
    reason = "the hub does not give it: Repository Not Found. Please log in; check the name"
    gated = "log in (hf auth login, or HF_TOKEN) and accept its terms where it is gated"
    assert not_given(error) == f"{reason}, or {gated}"
    expected = f"{reason}, {gated}, or name a directory"
    assert not_given(error, "name a directory") == expected


def test_an_error_of_another_kind_is_not_blamed_on_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not_given(ValueError("'a b' is no name")).startswith("the hub does not give it: 'a b' is no name; check")
