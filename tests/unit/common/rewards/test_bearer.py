"""The bearer token: spaces around it do not count, what no header carries is refused, and no error shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from common.errors import ConfigError
from common.rewards.bearer import bearer_token, reward_token
from common.rewards.client import RewardEndpoint
from common.rewards.http import RewardHttp
from learner.tools.scoring import RewardChoice, started
from reward_servers import score_images
from reward_servers.options import build_parser, check
from reward_servers.scorers.vlm_judge.judge import _http_of_url

UNUSABLE = ["ses\name", "s\xe9same", "\ufeffsesame", "ses\udce9ame", "ses\x7fame"]


@pytest.mark.parametrize(
    ("text", "token"),
    [(None, None), ("", None), (" \n", None), ("sesame\n", "sesame"), ("\tsesame \r\n", "sesame"), ("a b", "a b")],
)
def test_whitespace_around_a_token_does_not_count(text: str | None, token: str | None) -> None:
    assert bearer_token(text, "TOKEN") == token


@pytest.mark.parametrize("token", UNUSABLE)
def test_every_door_refuses_what_no_header_carries_and_shows_nothing(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    monkeypatch.setenv("REWARD_SERVER_TOKEN", token)
    monkeypatch.setenv("JUDGE_API_KEY", token)
    for door in (
        reward_token,
        lambda: RewardHttp(token),
        lambda: check(build_parser().parse_args(["--scorer", "ocr"])),
        lambda: started(RewardChoice((), (), ()), tmp_path, 1.0).__enter__(),
        lambda: _http_of_url("http://127.0.0.1:1"),
    ):
        with pytest.raises(ConfigError, match="no HTTP header can carry") as caught:
            door()
        assert token not in str(caught.value)
    assert score_images.main(["--url", "http://127.0.0.1:1", str(picture), "--prompt", "a"]) == 2
    told = capsys.readouterr().err
    assert (told.count("\n"), "REWARD_SERVER_TOKEN has characters" in told, token in told) == (1, True, False)


@pytest.mark.parametrize("token", ['"sesame"\n', "'sesame'", '""'])
def test_quotes_around_a_token_are_refused(token: str) -> None:
    """`docker --env-file` keeps them; a client whose shell removes them would be refused."""
    with pytest.raises(ConfigError, match=r"TOKEN has quotes around it, .* remove them") as caught:
        bearer_token(token, "TOKEN")
    assert "sesame" not in str(caught.value)
    assert bearer_token("a'b\"", "TOKEN") == "a'b\""


@pytest.mark.parametrize("token", ["sesame", "x" * 15, " " * 20 + "sesame"])
def test_a_token_that_can_be_guessed_stays_on_this_machine(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_SERVER_TOKEN", token)
    for door in (
        lambda: reward_token(["127.0.0.1", "gpu-7"]),
        lambda: RewardHttp(token, ["http://localhost:1", "http://192.0.2.1:1"]),
        lambda: check(build_parser().parse_args(["--scorer", "ocr", "--host", "0.0.0.0"])),
        lambda: check(build_parser().parse_args(["--scorer", "ocr", "--redis-url", "redis://gpu-7:6379/0"])),
        lambda: check(build_parser().parse_args(["--scorer", "ocr", "--advertise-url", "http://gpu-7:1"])),
        lambda: started(RewardChoice((RewardEndpoint("a", "http://gpu-7:1"),), (), ()), tmp_path, 1.0).__enter__(),
    ):
        with pytest.raises(ConfigError, match=r"REWARD_SERVER_TOKEN is too short for .*: use at least 16") as caught:
            door()
        assert token.strip() not in str(caught.value)
    assert reward_token(["localhost", "::1", "127.0.0.2"]) == token.strip()
    check(build_parser().parse_args(["--scorer", "ocr", "--host", "::1"]))


def test_a_token_of_sixteen_characters_may_leave_the_machine() -> None:
    assert bearer_token("x" * 16 + "\n", "TOKEN", ["gpu-7"]) == "x" * 16
