"""A dry run of each published model's run files, on tiny pipelines of the same classes.

Their settings are compared with the authors' in tests/unit/common/config/test_published_settings.py. The dry runs share
one Ray cluster and one reward server of five scorers. What they override only large machines and real models have.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.running_service import DEADLINE, PROJECT_ROOT
from tests.helpers.tiny_flux1 import write_tiny_flux1
from tests.helpers.tiny_flux2 import HEIGHT, TEXT_LAYERS, TEXT_TOKENS, WIDTH, write_tiny_klein
from tests.helpers.tiny_pipeline import IMAGE_SIDE, write_tiny_pipeline
from tests.helpers.waiting import wait_until

RUNS = PROJECT_ROOT / "deploy/runs"
REWARDS = ("clipscore", "hps", "pickscore", "geneval_parts", "geneval")
MODELS = ("sd3m", "sd35m", "flux2_klein_4b", "flux2_klein_9b", "flux1_dev")

CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
         runtime_env={"env_vars": {"PYTHONPATH": sys.argv[1]}})
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


RAY = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
"""Of cluster and drivers."""


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """Lives as long as the block; its standard input stays open as long."""
    environment = os.environ | RAY | {"PYTHONPATH": str(PROJECT_ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *command], cwd=PROJECT_ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
    ) as started:
        try:
            yield started
        finally:
            started.terminate()
            started.wait(DEADLINE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with process("-c", CLUSTER, str(PROJECT_ROOT)) as started:
        assert started.stdout is not None
        yield started.stdout.readline().strip()


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    ready = tmp_path_factory.mktemp("rewards") / "ready.json"
    scorers = [
        word for name in REWARDS for word in ("--scorer", "tests.helpers.toy_scorers:BrightnessScorer", "--name", name)
    ]
    with process("-m", "reward_servers", "--port", "0", "--ready-file", str(ready), *scorers):
        wait_until(ready.exists, "the reward servers to be ready")
        yield f"http://127.0.0.1:{json.loads(ready.read_text())['port']}"


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
def test_a_dry_run_passes(stage: str, model: str, tmp_path: Path, cluster: str, rewards: str) -> None:
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
    options += [f"--rewards.{name}.url={rewards}/{name}" for name in asked]
    done = subprocess.run(
        [sys.executable, "learner/main.py", "--config", str(run_file), "--dry-run", *options],
        cwd=PROJECT_ROOT,
        env=os.environ | RAY | {"RAY_ADDRESS": cluster},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "everything loaded, every reward server answered: ready to run" in done.stdout
