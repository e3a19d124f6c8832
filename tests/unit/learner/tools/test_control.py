"""`rtdmd control`: what it writes is what the run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.run import Config
from common.redis_link import RedisLink
from common.run_control import RunControl
from learner.driver.embedded_redis import embedded_redis
from learner.preflight.run_file import dump_config
from learner.tools.control import main

TOKEN = "0123456789abcdef"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    sections: dict[str, Any] = {
        "run": {"name": "shapes"},
        "backbone": {"path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "rewards": [{"name": "a", "url": "http://x", "differentiable": True}],
    }
    (directory / "config.yaml").write_text(dump_config(Config.model_validate(sections)))
    return directory


def with_redis(run_dir: Path, url: str) -> None:
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    values["redis"] = {"url": url}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("named", [True, False])
def test_a_run_is_paused_continued_and_stopped(
    token: str | None, named: bool, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if token is not None:
        monkeypatch.setenv("REWARD_SERVER_TOKEN", token)
    with embedded_redis(run_dir / "logs" / "redis.log") as address:
        with_redis(run_dir, address.url if named else "embedded")
        if named:
            monkeypatch.setenv("REDIS_PASSWORD", str(address.password))
        link = RedisLink(address)
        control = RunControl(link, "shapes", token)
        for request, asked in (("pause", "pause"), ("continue", None), ("stop", "stop")):
            assert main([str(run_dir), request]) == 0
            assert control.asked() == asked
            said = capsys.readouterr().out
            assert ("the run shapes" in said, "signed: " in said) == (True, token is not None)
        link.close()


def test_a_run_is_asked_to_use_more_workers(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with embedded_redis(run_dir / "logs" / "redis.log") as address:
        with_redis(run_dir, "embedded")
        assert main([str(run_dir), "workers", "8"]) == 0
        link = RedisLink(address)
        assert RunControl(link, "shapes").workers_asked() == 8
        link.close()
    assert "uses 8 rollout workers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["workers"], "workers needs a number from 1 to 4096\n"),
        (["workers", "0"], "workers needs a number from 1 to 4096, not 0"),
        (["pause", "3"], "pause takes no number: leave 3 out"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(
    words: list[str], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir), *words]) == 2
    told = capsys.readouterr().err
    assert (told.count("\n"), message in told) == (1, True)


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("none", 2, "the run has no Redis (redis.url: none): stop it with Ctrl-C"),
        ("embedded", 2, "no run with a Redis of its own is running there"),
        ("redis://127.0.0.1:1/0", 1, "Redis at redis://127.0.0.1:1/0 cannot be used"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(
    url: str, status: int, message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_redis(run_dir, url)
    assert main([str(run_dir), "pause"]) == status
    told = capsys.readouterr().err
    assert (told.count("\n"), message in told) == (1, True)
