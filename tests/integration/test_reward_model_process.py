"""Real servers whose models run in processes of their own: the same answers, and what happens when a model is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import numpy as np
import pytest

from common.rewards.api import (
    GRADIENT_PATH,
    HEALTH_PATH,
    INFO_PATH,
    METRICS_PATH,
    READY_PATH,
    SCORE_PATH,
    GradientRequest,
    ScoreRequest,
    ScoreResponse,
)
from tests.helpers.running_service import Process, descendants
from tests.helpers.tiny_rewards import random_images, write_hps, write_pickscore
from tests.helpers.waiting import wait_until
from tests.integration.test_reward_servers import BRIGHTNESS, DEADLINE, Waiting, launch, running

FRAGILE = "tests.helpers.fragile_scorer:FragileScorer"
SMALL = ScoreRequest(random_images(2), ["a", "b"]).to_bytes()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("first")
    return folder


def model_processes(server: int) -> list[Process]:
    return [process for process in descendants(server) if "reward_servers.model_process" in process.command]


def ready(url: str) -> bool:
    return httpx.get(url + READY_PATH, timeout=DEADLINE).status_code == 200


def restarts(url: str) -> float:
    lines = httpx.get(url + METRICS_PATH, timeout=DEADLINE).text.splitlines()
    return float(next(line for line in lines if line.startswith("reward_server_model_restarts_total{")).split()[-1])


def score(url: str) -> bytes:
    answer = httpx.post(url + SCORE_PATH, content=SMALL, timeout=DEADLINE)
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.mark.slow
def test_two_models_in_two_processes_answer_as_in_one_to_the_last_bit(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name, write in (("hps", write_hps), ("pickscore", write_pickscore)):
        write(tmp_path / name)
    both = [word for name in ("hps", "pickscore") for word in ("--scorer", name, "--model", str(tmp_path / name))]
    scores = ScoreRequest(random_images(3, 40, 48), ["a red cat", "two dogs", "x"]).to_bytes()
    pixels = np.random.default_rng(5).random((2, 3, 40, 48), dtype=np.float32)
    gradients = GradientRequest(pixels, ["a red cat", "two dogs"]).to_bytes()
    answers: list[list[bytes]] = []
    for options, processes in ((), 2), (("--in-process",), 0):
        folder = tmp_path / f"{processes}"
        folder.mkdir()
        with running(folder, *both, *options, "--reproducible") as (url, server):
            assert len(model_processes(server)) == processes
            answers.append([httpx.get(url + READY_PATH).content])
            for name in ("hps", "pickscore"):
                base = f"{url}/{name}"
                answers[-1] += [httpx.get(base + INFO_PATH).content]
                answers[-1] += [httpx.post(base + SCORE_PATH, content=scores, timeout=DEADLINE).content]
                answers[-1] += [httpx.post(base + GRADIENT_PATH, content=gradients, timeout=DEADLINE).content]
            os.kill(server, signal.SIGKILL)  # its drain is not asked about, and a busy machine unloads torch slowly
    apart, together = answers
    assert apart == together
    assert ScoreResponse.from_bytes(apart[2]).scores_B.shape == (3,)


def test_a_model_process_killed_in_a_call_is_a_503_and_comes_back(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, "--scorer", FRAGILE, "--model", str(model)) as (url, server):
        expected, (process,) = score(url), model_processes(server)
        assert restarts(url) == 0
        waiting = Waiting(url, tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        assert waiting.release() == 503
        body = waiting.answers[0].json()
        assert body["error"] == "model"
        assert body["message"].startswith("the model process of fragile was ended by SIGKILL")
        assert "\n" not in body["message"]
        assert httpx.get(url + HEALTH_PATH).status_code == 200
        wait_until(lambda: restarts(url) == 1)
        assert ready(url)
        assert score(url) == expected
        metrics = httpx.get(url + METRICS_PATH).text
        assert 'reward_server_model_process_resident_memory_bytes{scorer="fragile"}' in metrics
        assert 'reward_server_model_process_cpu_seconds_total{scorer="fragile"}' in metrics


def test_while_the_model_is_lost_nobody_waits_for_it(tmp_path: Path, model: Path) -> None:
    """Without its weights it cannot be loaded: the server answers 503 until it gives up, and ends with one line."""
    process = launch(
        *("--scorer", FRAGILE, "--model", str(model), "--port", "0", "--ready-file", str(tmp_path / "ready.json"))
    )
    try:
        wait_until((tmp_path / "ready.json").exists)
        url = f"http://127.0.0.1:{json.loads((tmp_path / 'ready.json').read_text())['port']}"
        (model / "weights").unlink()
        os.kill(model_processes(process.pid)[0].pid, signal.SIGKILL)
        wait_until(lambda: not ready(url))
        lost = httpx.get(url + READY_PATH).json()
        refused = httpx.post(url + SCORE_PATH, content=SMALL, timeout=DEADLINE)
        assert (refused.status_code, refused.json()) == (503, lost)
        assert lost["error"] == "model"
        assert lost["message"].endswith("was ended by SIGKILL (out of memory?): the model is loading again")
        assert httpx.get(url + HEALTH_PATH).status_code == 200
    finally:
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    last = "reward_servers: the model process of fragile could not be loaded again, 3 times in a row; the last reason: "
    assert errors.splitlines()[-1] == f"{last}its weights are missing"
    assert "Traceback" not in errors


def test_a_model_that_changed_ends_the_server(tmp_path: Path, model: Path) -> None:
    process = launch(
        *("--scorer", FRAGILE, "--model", str(model), "--port", "0", "--ready-file", str(tmp_path / "ready.json"))
    )
    wait_until((tmp_path / "ready.json").exists)
    (model / "weights").write_text("second")
    os.kill(model_processes(process.pid)[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, "is another one after it was loaded again (weights_hash)" in errors) == (2, True)


def test_a_stopped_model_process_is_killed_after_its_limit(tmp_path: Path, model: Path) -> None:
    with running(tmp_path, "--scorer", FRAGILE, "--model", str(model), "--call-s", "0.5") as (url, server):
        expected, (process,) = score(url), model_processes(server)
        os.kill(process.pid, signal.SIGSTOP)
        refused = httpx.post(url + SCORE_PATH, content=SMALL, timeout=DEADLINE)
        assert (refused.status_code, refused.json()["error"]) == (503, "model")
        assert "took longer than 0.5 s for a call (--call-s)" in refused.json()["message"]
        wait_until(lambda: restarts(url) == 1)
        assert not process.alive
        assert score(url) == expected


def test_one_lost_model_does_not_touch_another(tmp_path: Path, model: Path) -> None:
    options = ("--scorer", FRAGILE, "--model", str(model), "--scorer", BRIGHTNESS)
    with running(tmp_path, *options) as (url, _):
        expected = score(f"{url}/brightness")
        waiting = Waiting(f"{url}/fragile", tmp_path)
        assert score(f"{url}/brightness") == expected
        body = ScoreRequest(random_images(1), ["exit"]).to_bytes()
        assert waiting.release() == 200
        lost = httpx.post(f"{url}/fragile{SCORE_PATH}", content=body, timeout=DEADLINE)
        assert (lost.status_code, "ended with exit status 3" in lost.json()["message"]) == (503, True)
        assert score(f"{url}/brightness") == expected
        wait_until(lambda: ready(url))
        assert score(f"{url}/fragile") != expected


@pytest.mark.parametrize("how", ["in a call", "stopped", "started again"])
def test_a_model_process_never_outlasts_its_server(how: str, tmp_path: Path, model: Path) -> None:
    with running(tmp_path, "--scorer", FRAGILE, "--model", str(model)) as (url, server):
        (process,) = model_processes(server)
        if how == "started again":
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda: restarts(url) == 1)
            (process,) = model_processes(server)
        waiting = Waiting(url, tmp_path)
        if how == "stopped":
            os.kill(process.pid, signal.SIGSTOP)
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: not process.alive)
        assert not process.alive
        waiting.abandon()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_to_the_whole_group_lets_the_model_finish(number: int, tmp_path: Path, model: Path) -> None:
    ready_file = tmp_path / "ready.json"
    options = ("--scorer", FRAGILE, "--model", str(model), "--port", "0", "--ready-file", str(ready_file))
    process = launch(*options, own_group=True)
    wait_until(ready_file.exists)
    waiting = Waiting(f"http://127.0.0.1:{json.loads(ready_file.read_text())['port']}", tmp_path)
    os.killpg(process.pid, number)
    assert waiting.release() == 200
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, "")


def test_on_a_gpu_all_models_share_a_process(tmp_path: Path, model: Path) -> None:
    """These scorers ask for no device, so that this runs without one."""
    options = ("--scorer", FRAGILE, "--model", str(model), "--scorer", BRIGHTNESS, "--device", "cuda:0")
    with running(tmp_path, *options) as (url, server):
        assert len(model_processes(server)) == 1
        assert score(f"{url}/fragile") != score(f"{url}/brightness")
        body = ScoreRequest(random_images(1), ["exit"]).to_bytes()
        assert httpx.post(f"{url}/fragile{SCORE_PATH}", content=body, timeout=DEADLINE).status_code == 503
        wait_until(lambda: ready(url))
        assert score(f"{url}/fragile") != score(f"{url}/brightness")
        counted = [line for line in httpx.get(url + METRICS_PATH).text.splitlines() if "model_restarts_total{" in line]
        assert [line.split()[-1] for line in counted] == ["1.0", "1.0"]
