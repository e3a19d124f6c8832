"""A dry run of each published model's run files, on tiny pipelines of the same classes.

Their settings are compared with the authors' in tests/unit/common/config/test_published_settings.py. The dry runs share
one Ray cluster and one reward server of five scorers. What they override only large machines and real models have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.running_service import DEADLINE, PROJECT_ROOT
from tests.helpers.shared_services import Cluster, ServedScorer, reward_servers
from tests.helpers.tiny_flux1 import write_tiny_flux1
from tests.helpers.tiny_flux2 import HEIGHT, TEXT_LAYERS, TEXT_TOKENS, WIDTH, write_tiny_klein
from tests.helpers.tiny_pipeline import IMAGE_SIDE, write_tiny_pipeline

RUNS = PROJECT_ROOT / "deploy/runs"
REWARDS = ("clipscore", "hps", "pickscore", "geneval_parts", "geneval")
OF_THE_SAME_CLASSES = pytest.mark.slow
"""Its pipeline's classes are those of another model here, with other sizes."""
MODELS = (
    pytest.param("sd3m", marks=OF_THE_SAME_CLASSES),
    pytest.param("sd35m", marks=pytest.mark.slow),
    "flux2_klein_4b",
    pytest.param("flux2_klein_9b", marks=OF_THE_SAME_CLASSES),
    pytest.param("flux1_dev", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def reward_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    brightness = ServedScorer("tests.helpers.toy_scorers:BrightnessScorer")
    with reward_servers(dict.fromkeys(REWARDS, brightness), tmp_path_factory.mktemp("rewards")) as urls:
        yield urls


def tiny_backbone(model: str, folder: Path) -> dict[str, object]:
    """A pipeline of the model's class, and what fits it."""
    if model.startswith("flux2"):
        student = write_tiny_klein(folder / "student", distilled=True)
        teacher = write_tiny_klein(folder / "teacher", seed=1)
        sizes = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TEXT_TOKENS}
        return {"path": student, "teacher_path": teacher, "text_encoder_layers": list(TEXT_LAYERS), **sizes}
    if model == "flux1_dev":
        sizes = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": 8}
        return {"path": write_tiny_flux1(folder / "student"), **sizes}
    dual_attention = (0,) if model == "sd35m" else ()
    path = write_tiny_pipeline(folder / "student", dual_attention=dual_attention)
    return {"path": path, "height": IMAGE_SIDE, "width": IMAGE_SIDE, "max_sequence_length": 10}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [pytest.param("cold_start", marks=pytest.mark.slow), "rtdmd"])
def test_a_dry_run_passes(
    stage: str, model: str, tmp_path: Path, cluster: Cluster, reward_urls: dict[str, str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(80)))
    small = {"num_gpus": 0, "num_cpus": 0.01}
    sections: dict[str, dict[str, object]] = {
        "backbone": tiny_backbone(model, tmp_path),
        "prompts": {"train": prompts, "evaluation": prompts},
        "learner": {"ranks": 1, **small},
        "workers": {"count": 1, **small},
        "lora": {"rank": 2},
        "cold_start": {"from_checkpoint": "null"},
    }
    options = [f"--{section}.{key}={value}" for section, keys in sections.items() for key, value in keys.items()]
    run_file = RUNS / f"{stage}_{model}.yaml"
    asked = [name for name in REWARDS if f"name: {name}," in run_file.read_text()]
    options += [f"--rewards.{name}.url={reward_urls[name]}" for name in asked]
    done = subprocess.run(
        [sys.executable, "learner/main.py", "--config", str(run_file), "--dry-run", *options],
        cwd=PROJECT_ROOT,
        env=os.environ | cluster.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "everything loaded, every reward server answered: ready to run" in done.stdout
