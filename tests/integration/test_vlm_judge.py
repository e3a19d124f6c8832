"""A vLLM server as child of a reward server: real processes and sockets, a fake in the place of vLLM itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import ModelError, RewardUnavailable
from common.rewards.client import RewardClient, RewardEndpoint
from learner.driver.local_servers import LocalServers, LocalServerSpec
from reward_servers.scorers.vlm_judge.scorer import VlmJudgeScorer
from tests.helpers.fake_vllm import write_python

PROJECT_ROOT = Path(__file__).parents[2]
DEADLINE = 180.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def write_judge(folder: Path, arguments: str = "[]") -> Path:
    """A judge whose vLLM is the fake; the fake writes its process id to `folder`/pid."""
    write_python(folder / "python")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    (folder / "rubric.yaml").write_text('faithfulness: is it "{prompt}"?\nquality: is it clean?\n')
    (folder / "judge.yaml").write_text(
        f"launch: {{python: python, arguments: {arguments}}}\n"
        'positive_answer: "yes"\nnegative_answer: "no"\nconcurrency: 2\n'
    )
    return folder


def with_pid(folder: Path) -> Path:
    return write_judge(folder, f"[--write-pid, {folder / 'pid'}]")


def grey(level: int) -> np.ndarray:
    return np.full((1, 16, 16, 3), level, np.uint8)


def test_a_local_judge_scores_and_ends_with_the_run(tmp_path: Path) -> None:
    folder = with_pid(tmp_path)
    with LocalServers([LocalServerSpec("judge", "vlm_judge", folder)], tmp_path / "logs") as servers:
        vllm = int((folder / "pid").read_text())
        with RewardClient([RewardEndpoint("judge", servers.urls["judge"])], DEADLINE, 1) as client:
            assert client.score(grey(204), ["a cat"])["judge"] == pytest.approx([(0.8 * 0.25) ** 0.5], abs=1e-6)
            info = client.info("judge")
            assert (info.low, info.high, info.differentiable) == (0.0, 1.0, False)
        assert alive(vllm)
    wait_until(lambda: not alive(vllm))


def test_a_judge_that_loses_its_vllm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with (
        LocalServers([LocalServerSpec("judge", "vlm_judge", write_judge(tmp_path))], tmp_path / "logs") as servers,
        RewardClient([RewardEndpoint("judge", servers.urls["judge"])], DEADLINE, 1) as client,
    ):
        for prompt in ("die", "a cat"):
            with pytest.raises(RewardUnavailable, match=r"(?s)vLLM server of .*status 3.*out of memory, says the fake"):
                client.score(grey(100), [prompt])
    assert not list(tmp_path.glob("judge_*")), "the folder with its log outlives the server"


def test_vllm_ends_when_its_reward_server_is_killed(tmp_path: Path) -> None:
    folder, ready = with_pid(tmp_path), tmp_path / "ready.json"
    command = [sys.executable, "-m", "reward_servers", "--scorer", "vlm_judge", "--model", str(folder)]
    with subprocess.Popen(
        [*command, "--port", "0", "--ready-file", str(ready)],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "TMPDIR": str(tmp_path), "REWARD_SERVER_TOKEN": "sesame"},
    ) as server:
        wait_until(lambda: ready.exists() or server.poll() is not None)
        vllm = int((folder / "pid").read_text())
        variables = Path(f"/proc/{vllm}/environ").read_bytes()
        server.send_signal(signal.SIGKILL)
    wait_until(lambda: not alive(vllm))
    # Its folder with socket and log goes as well; the server's token never came to it.
    wait_until(lambda: not list(tmp_path.glob("judge_*")))
    assert b"sesame" not in variables
    assert b"VLLM_NO_USAGE_STATS=1" in variables


def test_a_vllm_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)exit status 1; the end of its log:.*not for me, says the fake"):
        VlmJudgeScorer.load(write_judge(tmp_path, "[--fail]"), "cpu")


def test_a_python_that_is_missing_is_named(tmp_path: Path) -> None:
    write_judge(tmp_path)
    (tmp_path / "python").unlink()
    with pytest.raises(ModelError, match="python is missing: run `make judge-env`"):
        VlmJudgeScorer.load(tmp_path, "cpu")


def test_closing_the_scorer_ends_vllm(tmp_path: Path) -> None:
    folder = with_pid(tmp_path)
    scorer = VlmJudgeScorer.load(folder, "cuda:1")
    vllm = int((folder / "pid").read_text())
    assert b"CUDA_VISIBLE_DEVICES=1" in Path(f"/proc/{vllm}/environ").read_bytes().split(b"\0")
    hash_before = scorer.weights_hash
    scorer.close()
    assert not alive(vllm)
    (folder / "model.safetensors").write_bytes(b"other weights")
    again = VlmJudgeScorer.load(folder, "cpu")
    assert again.weights_hash != hash_before
    again.close()
