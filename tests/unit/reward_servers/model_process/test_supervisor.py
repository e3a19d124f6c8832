"""Real model processes of a scorer without a model: equal answers and errors, losses, restarts, the end."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, ModelError, RewardInvalid, RewardRejected
from common.rewards.api import ByteArray
from reward_servers.loading import ScorerSettings
from reward_servers.model_process import channel
from reward_servers.model_process import supervisor as module
from reward_servers.model_process.process import ModelProcess
from reward_servers.model_process.remote_scorer import RemoteScorer
from reward_servers.model_process.supervisor import Supervisor
from reward_servers.scorers.base import ModelUnavailable
from tests.helpers.fragile_scorer import ERRORS, FragileScorer
from tests.helpers.waiting import wait_until

FRAGILE = "tests.helpers.fragile_scorer:FragileScorer"
IMAGES: ByteArray = np.random.default_rng(1).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
CALL_SECONDS = 60.0
IDENTITY = (
    "name",
    "score_range",
    "differentiable",
    "weights_hash",
    "version",
    "preprocess_version",
    "limits",
    "precision",
)
NOTHING: tuple[dict[str, Any], ...] = ({}, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_text("first")
    return tmp_path


class Watched:
    """A process with one scorer, and what its supervisor has reported."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.restarts = 0
        self.failure: list[ModelError] = []
        assert supervisor.find() == ["fragile"]
        supervisor.begin_load(["mine"])
        self.scorer = RemoteScorer(supervisor, "mine", supervisor.finish_load()["mine"])
        supervisor.watch(self._restarted, self.failure.append)

    @property
    def pid(self) -> int:
        return self.supervisor._process.pid

    def _restarted(self) -> None:
        self.restarts += 1

    def score(self, prompt: str = "a", **metadata: Any) -> list[float]:
        return self.scorer.score(IMAGES, [prompt, "b"], [metadata, metadata]).tolist()


@contextmanager
def watched(folder: Path, call_s: float = CALL_SECONDS, scorer: str = FRAGILE) -> Iterator[Watched]:
    with started(folder, call_s, scorer) as supervisor:
        yield Watched(supervisor)


@contextmanager
def started(folder: Path | None, call_s: float = CALL_SECONDS, scorer: str = FRAGILE) -> Iterator[Supervisor]:
    supervisor = Supervisor([ScorerSettings(scorer, folder, None)], "cpu", call_s)
    try:
        yield supervisor
    finally:
        supervisor.begin_stop()
        supervisor.finish_stop(time.monotonic() + CALL_SECONDS)


def test_scores_gradients_and_identity_are_the_scorers_own(folder: Path) -> None:
    here = FragileScorer.load(folder, "cpu")
    with watched(folder) as there:
        assert there.score() == here.score(IMAGES, ["a", "b"], NOTHING).tolist()
        assert there.score(add=np.arange(3)) == here.score(IMAGES, ["a", "b"], [{"add": 3}] * 2).tolist()
        pixels = np.random.default_rng(2).random((2, 3, 4, 6), dtype=np.float32)
        for found, expected in zip(
            there.scorer.score_with_gradient(pixels, ["a", "b"], NOTHING),
            here.score_with_gradient(pixels, ["a", "b"], NOTHING),
            strict=True,
        ):
            assert found.dtype == np.float32
            assert found.tobytes() == expected.tobytes()
        for name in IDENTITY:
            assert vars(there.scorer)[name] == getattr(here, name)
        assert there.scorer.implementation() == here.implementation() == FRAGILE
        there_check, here_check = there.scorer.check_request(), here.check_request()
        assert there_check.images_BHWC.tobytes() == here_check.images_BHWC.tobytes()
        assert (there_check.prompts, there_check.metadata) == (here_check.prompts, here_check.metadata)


def test_errors_of_a_call_are_the_same_and_the_process_goes_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with watched(folder) as there:
        for prompt in ("refuse", "busy", "away"):
            expected = ERRORS[prompt]
            with pytest.raises(type(expected)) as caught:
                there.score(prompt)
            assert vars(caught.value) == vars(expected)
            assert str(caught.value) == str(expected)
        with pytest.raises(RewardInvalid, match="RuntimeError: two\nlines") as bug:
            there.score("bug")
        assert (bug.value.reward, bug.value.cause) == ("mine", "scorer")
        with pytest.raises(RewardRejected, match="the metadata cannot reach the model"):
            there.score(number=10**30)
        assert there.score() == there.score()
        assert there.restarts == 0
    log = capfd.readouterr().err
    assert "the scorer mine failed\nTraceback" in log
    assert log.count("Traceback") == 1


@pytest.mark.parametrize(
    ("lose", "message"),
    [
        ("exit", "the model process of mine ended with exit status 3: the model is loading again"),
        ("kill", "the model process of mine was ended by SIGKILL (out of memory?): the model is loading again"),
        ("stop", "the model process of mine took longer than 0.5 s for a call (--call-s): the model is loading again"),
    ],
)
def test_a_call_whose_process_is_lost_says_why_and_the_next_one_is_answered(
    lose: str, message: str, folder: Path, tmp_path: Path
) -> None:
    with watched(folder, 0.5 if lose == "stop" else CALL_SECONDS) as there:
        expected, first = there.score(), there.pid
        until, begun = tmp_path / "until", tmp_path / "begun"

        def disturb() -> None:
            wait_until(begun.exists)
            os.kill(first, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[lose])

        if lose != "exit":
            threading.Thread(target=disturb).start()
        with pytest.raises(ModelUnavailable) as caught:
            there.score("exit" if lose == "exit" else "wait", until=str(until), started=str(begun))
        assert (caught.value.reward, caught.value.cause, str(caught.value)) == ("mine", "model", message)
        wait_until(lambda: there.restarts == 1)
        assert there.supervisor.problem is None
        assert there.pid != first
        assert there.score() == expected


def test_a_process_that_ends_between_two_calls_is_started_again(folder: Path) -> None:
    with watched(folder) as there:
        for count in (1, 2):
            os.kill(there.pid, signal.SIGKILL)
            wait_until(lambda count=count: there.restarts == count)
        assert len(there.score()) == 2


def test_calls_fail_at_once_while_the_model_is_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on = threading.Event(), threading.Event()
    load_again = Supervisor._load_again

    def held(supervisor: Supervisor, process: Any) -> None:
        loading.set()
        assert go_on.wait(CALL_SECONDS)
        load_again(supervisor, process)

    monkeypatch.setattr(Supervisor, "_load_again", held)
    with watched(folder) as there:
        os.kill(there.pid, signal.SIGKILL)
        assert loading.wait(CALL_SECONDS)
        with pytest.raises(ModelUnavailable, match=r"was ended by SIGKILL .*: the model is loading again"):
            there.score()
        go_on.set()
        wait_until(lambda: there.restarts == 1)


def test_a_model_that_cannot_be_loaded_again_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    with watched(folder) as there:
        (folder / "weights").unlink()
        os.kill(there.pid, signal.SIGKILL)
        wait_until(lambda: bool(there.failure))
        assert str(there.failure[0]) == (
            "the model process of mine could not be loaded again, 3 times in a row; the last reason: "
            "its weights are missing"
        )
        assert there.restarts == 0


def test_a_process_that_cannot_be_started_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    start, failures = ModelProcess, [OSError(errno.EAGAIN, "no processes left")]

    def tried() -> ModelProcess:
        if failures:
            raise failures.pop()
        return start()

    with watched(folder) as there:
        monkeypatch.setattr(module, "ModelProcess", tried)
        os.kill(there.pid, signal.SIGKILL)
        wait_until(lambda: there.restarts == 1)
        assert failures == []
        assert len(there.score()) == 2


def test_a_reply_that_cannot_be_read_costs_the_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(folder) as there:
        first = there.pid
        with monkeypatch.context() as patch:
            patch.setattr(channel, "unpack_map", lambda data: 1 // 0)
            with pytest.raises(ModelUnavailable, match=r"of mine sent a reply that cannot be read \(integer division"):
                there.score()
        wait_until(lambda: there.restarts == 1)
        assert there.pid != first


def test_a_model_that_is_another_one_after_a_restart_is_given_up_at_once(folder: Path) -> None:
    with watched(folder) as there:
        (folder / "weights").write_text("second")
        os.kill(there.pid, signal.SIGKILL)
        wait_until(lambda: bool(there.failure))
        assert "mine is another one after it was loaded again (weights_hash)" in str(there.failure[0])


@pytest.mark.parametrize(
    ("scorer", "kind", "message"),
    [
        (FRAGILE, ConfigError, "its weights are missing"),
        ("tests.helpers.fragile_scorer:BoundlessScorer", ModelError, "limits of the type Limits: use ScorerLimits, or"),
    ],
)
def test_what_cannot_be_loaded_says_so_as_before(
    scorer: str, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    if kind is ModelError:
        (tmp_path / "weights").write_text("first")
    with started(tmp_path, scorer=scorer) as supervisor:
        supervisor.find()
        supervisor.begin_load(["mine"])
        with pytest.raises(kind, match=message):
            supervisor.finish_load()


def test_an_unexpected_failure_of_loading_is_one_line_with_its_traceback_in_the_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with started(None) as supervisor:
        supervisor.find()
        supervisor.begin_load(["mine"])
        with pytest.raises(ModelError, match=f"^--scorer {FRAGILE} cannot be loaded: AssertionError: no directory;"):
            supervisor.finish_load()
    assert f"--scorer {FRAGILE} cannot be loaded\nTraceback" in capfd.readouterr().err


def test_a_process_that_ends_while_it_loads_says_how(folder: Path) -> None:
    with started(folder) as supervisor:
        os.kill(supervisor._process.pid, signal.SIGKILL)
        with pytest.raises(ModelError, match=r"^the model process of .* was ended by SIGKILL .* while it loaded$"):
            supervisor.find()


def test_a_stop_signal_to_the_group_does_not_end_it(folder: Path) -> None:
    with watched(folder) as there:
        os.kill(there.pid, signal.SIGTERM)
        os.kill(there.pid, signal.SIGINT)
        assert len(there.score()) == 2
        assert there.restarts == 0


def test_it_gets_no_secret_of_the_servers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REWARD_SERVER_TOKEN", "open sesame, open sesame")
    monkeypatch.setenv("REDIS_PASSWORD", "sesame")
    monkeypatch.setenv("JUDGE_API_KEY", "kept")
    with watched(folder) as there:
        there.score("environment")
    names = capfd.readouterr().err.split()
    assert "JUDGE_API_KEY" in names
    assert not {"REWARD_SERVER_TOKEN", "REDIS_PASSWORD"} & set(names)


def test_an_idle_process_ends_by_itself_and_one_in_a_call_at_once(folder: Path, tmp_path: Path) -> None:
    with watched(folder) as there:
        there.supervisor.begin_stop()
        there.supervisor._process.wait()
        assert there.supervisor._process.ending() == "ended with exit status 0"
    errors: list[str] = []
    with watched(folder) as there:

        def ask() -> None:
            with pytest.raises(ModelUnavailable) as caught:
                there.score("wait", started=str(tmp_path / "begun"), until=str(tmp_path / "until"))
            errors.append(str(caught.value))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until((tmp_path / "begun").exists)
        os.kill(there.pid, signal.SIGSTOP)
        there.supervisor.begin_stop()
        there.supervisor._process.wait()
        asking.join(CALL_SECONDS)
        assert errors == ["the model process of mine was ended by SIGKILL (out of memory?)"]
        assert there.failure == []
