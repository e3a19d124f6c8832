"""Every tiny model in one real server, written by the command and asked over HTTP as a newcomer would."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from common.project_files import PROJECT_ROOT
from reward_servers.tiny.main import WRITERS
from tests.integration.test_reward_servers import running

TASK = {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
DEADLINE = 120.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, "-m", "reward_servers.tiny", str(folder / "models")]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    # The libraries of all models are imported once.
    options = ["--in-process"]
    for line in done.stdout.splitlines():
        options += line.removeprefix("python -m reward_servers ").rsplit(" --port", 1)[0].split()
    with running(folder, *options) as (base, _):
        yield base


@pytest.mark.parametrize("scorer", WRITERS)
def test_each_answers(scorer: str, url: str) -> None:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((48, 48)).convert("RGB").save(buffer, "PNG")
    images = [base64.b64encode(buffer.getvalue()).decode()] * 2
    body = {"images": images, "prompts": ["a dog", "a dog"], "metadata": TASK}
    answer = httpx.post(f"{url}/{scorer}/score", json=body, timeout=DEADLINE)
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["scores"]
    declared = httpx.get(f"{url}/{scorer}/v1/info").json()
    assert first == pytest.approx(second, abs=1e-5)
    assert declared["low"] is None or declared["low"] <= first <= declared["high"]
