"""Runs that the composition root refuses, and errors of other processes in one line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import ray
import torch
from ray.exceptions import ObjectLostError, RayTaskError

from common.config.run import Config
from common.errors import AttestationError, ConfigError, ModelError, RewardRejected, RewardUnavailable, RtdmdError
from common.flow import static_shift_sigmas
from common.rewards.api import ScoreRequest, ScoreResponse
from common.rewards.control_request import ControlRequest
from common.types import Guidance, Prompt
from learner.compose import (
    _checked_prediction,
    _errors_in_one_line,
    _load_prompts,
    _redis,
    _reward_access,
    _token_hosts,
)
from learner.driver.cluster import _say_what_is_waited_for, ray_cluster
from learner.preflight.checks import (
    check_files,
    check_gpus,
    check_guidance,
    check_rewards,
    check_schedule,
    control_requests,
)
from learner.preflight.command_line import Invocation
from learner.preflight.ray_environment import ADDRESS
from tests.helpers.fake_reward_server import INFO, SCORES, error_body, fake_server
from tests.helpers.trained_run import tiny_config

CONTROLS = {"unasked": ControlRequest("a dot", {})}


def config(**sections: object) -> Config:
    base = {
        "run": {"name": "test"},
        "backbone": {"path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "alignment": {"reward_gradient_weight": 0},
        "rewards": [{"name": "unasked", "url": "http://x"}],
        "reward_client": {"attempts": 1, "timeout_s": 5},
    }
    return Config.model_validate(base | sections)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_every_reward_server_is_asked_before_the_run(closed_port: int) -> None:
    chosen = config(rewards=[{"name": "unasked", "url": f"http://127.0.0.1:{closed_port}"}])
    with pytest.raises(RewardUnavailable, match=rf"reward unasked at http://127\.0\.0\.1:{closed_port}"):
        check_rewards(chosen, _reward_access(chosen, {}, None, "run"), CONTROLS)


def test_a_reward_nobody_serves_is_refused_before_the_run() -> None:
    chosen = config(rewards=[{"name": "unasked", "url": "redis"}], redis={"url": "redis://host:1/0"})
    with pytest.raises(RewardUnavailable, match="reward unasked: no usable server is registered under that name"):
        check_rewards(chosen, _reward_access(chosen, {}, None, "run"), CONTROLS)


def test_every_reward_answers_a_control_request_before_the_run() -> None:
    """So every worker can distinguish a bad request from a failing server from its first group on."""
    with fake_server() as server:
        chosen = config(rewards=[{"name": "unasked", "url": server.url}])
        server.replies = [(200, ScoreResponse("fake", "hash", SCORES[:1]).to_bytes())]
        controls = control_requests(chosen, Prompt(0, "a train", {"count": 1}), Prompt(1, "evaluation"))
        assert controls == {"unasked": ControlRequest("a train", {"count": 1})}
        access = check_rewards(chosen, _reward_access(chosen, {}, None, "run"), controls)
        assert (access.infos, access.controls, access.references) == ({"unasked": INFO}, controls, {})
        assert ScoreRequest.from_bytes(server.bodies[0]).metadata == [{"count": 1}]
        server.replies = [(422, error_body("request"))]
        with pytest.raises(RewardRejected):
            check_rewards(chosen, _reward_access(chosen, {}, None, "run"), controls)


@pytest.mark.parametrize(
    ("servers", "redis", "hosts"),
    [
        ("http://a:1", "redis://b:6379/0", ["a", "b"]),
        ("local", "embedded", []),
        ("http://a:1", "none", ["a"]),
        ("redis", "redis://[::1]:6379/0", ["::1"]),
        ("local", "unix:///run/redis.sock", []),
    ],
)
def test_a_token_must_be_long_for_servers_and_for_a_redis_with_signatures(
    servers: str, redis: str, hosts: list[str]
) -> None:
    chosen = config(rewards=[{"name": "unasked", "url": servers, "scorer": "hps"}], redis={"url": redis})
    assert _token_hosts(chosen) == hosts


@pytest.mark.parametrize(("url", "asked"), [("redis://127.0.0.1:1/0", 1), ("embedded", 0), ("none", 0)])
def test_random_pictures_are_asked_of_the_servers_if_others_may_register(url: str, asked: int) -> None:
    """Their answers are then at hand when a server registers, even if its twin is down by then."""
    with fake_server() as server:
        chosen = config(rewards=[{"name": "unasked", "url": server.url}], redis={"url": url})
        server.replies = [(200, ScoreResponse("fake", "hash", SCORES[:1]).to_bytes())]
        controls = control_requests(chosen, Prompt(0, "a train"), Prompt(1, "evaluation"))
        access = check_rewards(chosen, _reward_access(chosen, {}, None, "run"), controls)
        assert len(server.introductions) == len(access.references) == asked
        assert [reference.scores for reference in access.references.values()] == [(0.5, 0.5)] * asked
        assert all("a train" in ScoreRequest.from_bytes(body).prompts for body in server.introductions)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", r"redis\.url = redis://127\.0\.0\.1:\d+/0: no Redis .*redis\.url: none"),
        ("?hurry=yes", r"redis\.url = redis://127\.0\.0\.1:\d+/0: its query cannot be used: .*'hurry'"),
    ],
)
def test_a_named_redis_is_asked_before_the_run(closed_port: int, query: str, expected: str, tmp_path: Path) -> None:
    chosen = config(redis={"url": f"redis://127.0.0.1:{closed_port}/0{query}"})
    with pytest.raises(ConfigError, match=expected), _redis(chosen, tmp_path):
        pytest.fail("entered")


@pytest.mark.parametrize("steps", [3, 33, 34, 100])
def test_a_schedule_without_room_to_renoise_is_refused(steps: int) -> None:
    sigmas = static_shift_sigmas(steps, shift=1.0)  # the second level is 1 - 1 / steps
    chosen = config(sampling={"steps": steps})
    if steps <= 33:
        check_schedule(chosen, sigmas)
        return
    with pytest.raises(ConfigError, match=rf"sampling\.steps = {steps}: .* is {1 - 1 / steps:.3f}, .* at most 0\.97"):
        check_schedule(chosen, sigmas)
    check_schedule(config(sampling={"steps": steps}, cold_start={"iterations": 0}), sigmas)
    alignment = {"policy_gradient": "surrogate_reward", "reward_gradient_weight": 0}
    surrogate = {"cold_start": {"iterations": 0}, "alignment": alignment}
    with pytest.raises(ConfigError, match=r"and the surrogate reward needs it to be at most 0\.97"):
        check_schedule(config(sampling={"steps": steps}, **surrogate), sigmas)


def test_guidance_for_a_teacher_that_takes_none_is_refused_before_training() -> None:
    guided = config(evaluation={"teacher_guidance": 4})
    with pytest.raises(ConfigError, match=r"evaluation\.teacher_guidance = 4: the teacher at model takes no guidance"):
        check_guidance(guided, Guidance.NONE)
    check_guidance(guided, Guidance.INPUT)
    check_guidance(config(evaluation={"teacher_guidance": 1}), Guidance.NONE)
    check_guidance(config(evaluation={"teacher_guidance": 4, "teacher": False}), Guidance.NONE)


def test_everything_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    there = tmp_path / "prompts.txt"
    there.write_text("red")
    rewards = [{"name": "hps", "scorer": "hps", "model": tmp_path / "no-hps", "url": "local"}]
    lacking = config(rewards=rewards, prompts={"train": there, "evaluation": tmp_path / "none.txt"})
    with pytest.raises(ConfigError) as caught:
        check_files(lacking, resuming=False)
    expected = f"prompts.evaluation = {tmp_path}/none.txt, rewards.hps.model = {tmp_path}/no-hps"
    assert str(caught.value) == f"missing: {expected} (looked for from {Path.cwd()})"


def test_a_borrowed_cold_start_must_be_there_until_the_run_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red")
    prompts = {"train": tmp_path / "prompts.txt", "evaluation": tmp_path / "prompts.txt"}
    borrowing = config(prompts=prompts, cold_start={"from_checkpoint": tmp_path / "gone"})
    with pytest.raises(ConfigError, match=f"missing: cold_start.from_checkpoint = {tmp_path}/gone"):
        check_files(borrowing, resuming=False)
    check_files(borrowing, resuming=True)


@pytest.mark.parametrize(
    ("ranks", "rank_gpus", "workers", "worker_gpus", "gpus"),
    [(7, 1, 2, 0.5, 8), (1, 0, 4, 0, 0), (10, 0.1, 2, 0.5, 2), (1, 1, 2, 0.7, 3), (3, 0.5, 3, 0.5, 3), (1, 2, 1, 1, 3)],
)
def test_one_gpu_less_than_a_run_asks_for_is_refused(
    ranks: int, rank_gpus: float, workers: int, worker_gpus: float, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of a GPU is on one: two of 0.7 need two."""
    chosen = config(
        learner={"num_gpus": rank_gpus, "ranks": ranks}, workers={"count": workers, "num_gpus": worker_gpus}
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_gpus(chosen)
    if gpus > 0:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus - 1)
        with pytest.raises(ConfigError, match=f"have no room on this machine's {gpus - 1} GPUs: ask for fewer"):
            check_gpus(chosen)


def test_a_cluster_that_may_still_get_its_gpus_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    _say_what_is_waited_for(config(learner={"num_gpus": 1, "ranks": 2}))
    assert caplog.messages == []
    _say_what_is_waited_for(config(learner={"num_gpus": 1, "ranks": 2}, workers={"num_gpus": 0.5}))
    assert caplog.messages == ["waiting for GPUs: the run asks for 2.5, the cluster has 2 so far"]


def test_a_model_that_only_a_cluster_holds_is_not_looked_for_here(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = config(backbone={"path": tiny_pipeline, "max_sequence_length": 4})
    student = {"family": "flux2", "path": tiny_pipeline, "teacher_path": tmp_path / "on" / "workers"}
    elsewhere, of_two = config(backbone={"path": tmp_path / "on" / "workers"}), config(backbone=student)
    with pytest.raises(ModelError, match=r"no pipeline at .*/on/workers"):
        _checked_prediction(elsewhere)
    monkeypatch.setenv(ADDRESS, "127.0.0.1:6379")
    assert _checked_prediction(elsewhere) is _checked_prediction(of_two) is None
    prediction = _checked_prediction(here)
    assert prediction is not None
    assert prediction.iteration_s > 0


def invocation(run_dir: Path, *, dry_run: bool = False) -> Invocation:
    return Invocation(config(), run_dir, dry_run=dry_run, resume=False)


def raised_remotely(cause: Exception) -> Exception:
    error: Exception = RayTaskError("call", f"Traceback\nremote line\n{cause!r}", cause, "title", 1, "ip")
    return error


def test_an_error_of_ours_comes_out_as_it_was_raised(tmp_path: Path) -> None:
    cause = AttestationError("other weights")
    with pytest.raises(AttestationError) as caught, _errors_in_one_line(invocation(tmp_path)):
        raise raised_remotely(cause)
    assert caught.value is cause


@pytest.mark.parametrize("error", [raised_remotely(ValueError("odd shape")), ObjectLostError("ab" * 14, None, "")])
def test_any_other_error_is_one_line_and_a_file(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(RtdmdError) as caught, _errors_in_one_line(invocation(tmp_path)):
        raise error
    log = tmp_path / "logs" / "error.log"
    assert str(caught.value).endswith(f"; see {log}")
    assert "\n" not in str(caught.value)
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "{}: No space left on device; free space there, or write elsewhere"),
        (OSError(30, "Read-only file system", "/data/x"), "/data/x: Read-only file system; name a path on storage"),
        (raised_remotely(OSError(28, "No space left on device", "/w/x")), "/w/x: No space left on device; free space"),
        (raised_remotely(RuntimeError("first line\nthe remedy")), "RuntimeError: first line the remedy"),
    ],
)
def test_an_error_of_the_system_names_the_path_wherever_it_was_raised(
    tmp_path: Path, error: Exception, told: str
) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(RtdmdError) as caught, _errors_in_one_line(invocation(tmp_path)):
        raise error
    assert str(caught.value).startswith(told.format(tmp_path))
    assert str(caught.value).endswith(f"; see {tmp_path}/logs/error.log")


def test_the_whole_message_of_ray_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy stands in its second line."""

    def fail(**settings: object) -> None:
        raise ConnectionError("Could not connect. To fix this, either:\n1. unset the address\n2. start a cluster")

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray.init", fail)
    expected = "To fix this, either: 1. unset the address 2. start a cluster: is it up, and RAY_AUTH_MODE"
    with pytest.raises(ConfigError, match=expected), ray_cluster(config()):
        pytest.fail("entered")


def test_a_dry_run_leaves_no_log(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(RtdmdError, match="odd shape"), _errors_in_one_line(invocation(tmp_path, dry_run=True)):
        raise raised_remotely(ValueError("odd shape"))
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    with (
        pytest.raises(ConfigError, match=rf"RAY_ADDRESS = 127\.0\.0\.1:{closed_port}: no answer"),
        ray_cluster(config()),
    ):
        pytest.fail("entered")


def test_a_failing_start_of_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**settings: object) -> None:
        raise ValueError("not enough shared memory\nmany details")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", fail)
    expected = "^no Ray cluster to run in: not enough shared memory many details$"
    with pytest.raises(ConfigError, match=expected), ray_cluster(config()):
        pytest.fail("entered")


def test_each_stage_has_its_own_prompts(tmp_path: Path) -> None:
    values = tiny_config(tmp_path, tmp_path).model_dump(mode="json")
    for name in ("train", "cold_start", "evaluation"):
        (tmp_path / f"{name}.txt").write_text(f"{name} prompt\n")
        values["prompts"][name] = str(tmp_path / f"{name}.txt")
    prompts = _load_prompts(Config.model_validate(values))
    assert prompts.cold_start == [Prompt(0, "cold_start prompt")]
    assert prompts.alignment == [Prompt(0, "train prompt")]
    assert prompts.evaluation == [Prompt(0, "evaluation prompt")]


def test_without_a_file_of_its_own_the_cold_start_has_the_training_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dot\n")
    prompts = _load_prompts(tiny_config(tmp_path, tmp_path / "prompts.txt"))
    assert prompts.cold_start == prompts.alignment == [Prompt(0, "a dot")]
