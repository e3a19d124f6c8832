"""Requests to a run in a real Redis: with a token they are signed, and neither forged nor repeated."""

from __future__ import annotations

import pytest
import redis

from common.redis_link import RedisLink
from common.run_control import RunControl
from common.signed_values import CLOCK_TOLERANCE_S
from tests.helpers.hand_clock import HandClock

TOKEN = "0123456789abcdef"
EPOCH_S = 1_700_000_000.5
KEY = "rtdmd:run:shapes"


def test_without_a_token_redis_cli_is_enough(link: RedisLink, client: redis.Redis) -> None:
    control = RunControl(link, "shapes")
    assert control.asked() is None
    for request in ("pause", "stop"):
        client.set(KEY, request)
        assert control.asked() == request
        control.ask(request)
        assert client.get(KEY) == request.encode()
        assert RunControl(link, "another").asked() is None
    control.ask(None)
    assert control.asked() is None
    for other in ("dance", "pause 1", "pause "):
        client.set(KEY, other)
        assert control.asked() is None


def test_a_number_of_workers_is_asked_for_beside_a_pause(link: RedisLink, client: redis.Redis) -> None:
    control = RunControl(link, "shapes")
    assert control.workers_asked() is None
    control.ask_workers(8)
    control.ask("pause")
    assert (control.workers_asked(), control.asked()) == (8, "pause")
    assert client.get(f"{KEY}:workers") == b"8"
    for other in ("0", "-1", "1e3", " 4", "4097", "٣", "many", "1" * 5000):
        client.set(f"{KEY}:workers", other)
        assert control.workers_asked() is None


def test_with_a_token_only_a_signed_number_of_workers_counts(link: RedisLink, client: redis.Redis) -> None:
    control = RunControl(link, "shapes", TOKEN)
    client.set(f"{KEY}:workers", "8")
    assert control.workers_asked() is None
    RunControl(link, "shapes", TOKEN).ask("pause")
    client.rename(KEY, f"{KEY}:workers")
    assert control.workers_asked() is None
    RunControl(link, "shapes", TOKEN).ask_workers(8)
    assert control.workers_asked() == control.workers_asked() == 8


def test_with_a_token_only_a_signed_request_of_this_run_counts(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    control = RunControl(link, "shapes", TOKEN)
    for planted in (b"stop", b"stop 1e12", bytes(32) + b"stop 1e12"):
        client.set(KEY, planted)
        assert control.asked() is None
    RunControl(link, "shapes", TOKEN + "x").ask("stop")
    assert control.asked() is None
    RunControl(link, "another", TOKEN).ask("stop")
    client.rename("rtdmd:run:another", KEY)
    assert control.asked() is None
    assert [KEY in record.getMessage() for record in caplog.records] == [True]
    for request in ("pause", "stop"):
        RunControl(link, "shapes", TOKEN).ask(request)
        assert control.asked() == control.asked() == request
    control.ask(None)
    assert control.asked() is None


def test_a_request_of_an_earlier_run_is_not_repeated(
    link: RedisLink, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    clock = HandClock(EPOCH_S)
    RunControl(link, "shapes", TOKEN, clock).ask("stop")
    captured = client.get(KEY)
    clock.now += CLOCK_TOLERANCE_S + 1
    control = RunControl(link, "shapes", TOKEN, clock)
    for _ in range(2):
        client.set(KEY, captured)
        assert control.asked() is None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["Redis"]
    assert "a request from before this run started" in caplog.text
    control.ask("stop")
    assert control.asked() == "stop"


def test_a_request_made_while_a_run_starts_counts(link: RedisLink) -> None:
    clock = HandClock(EPOCH_S)
    RunControl(link, "shapes", TOKEN, clock).ask("pause")
    clock.now += CLOCK_TOLERANCE_S - 1
    assert RunControl(link, "shapes", TOKEN, clock).asked() == "pause"


@pytest.mark.parametrize("withdrawn", ["deleted", "overwritten", "followed"])
def test_a_pause_that_is_over_is_not_repeated(link: RedisLink, client: redis.Redis, withdrawn: str) -> None:
    clock = HandClock(EPOCH_S)
    control = RunControl(link, "shapes", TOKEN, clock)
    control.ask("pause")
    captured = client.get(KEY)
    assert control.asked() == "pause"
    clock.now += 1
    if withdrawn == "deleted":
        control.ask(None)
    elif withdrawn == "overwritten":
        client.set(KEY, "junk")
    else:
        control.ask("stop")
    assert control.asked() == ("stop" if withdrawn == "followed" else None)
    client.set(KEY, captured)
    assert control.asked() is None
    clock.now += 1
    control.ask("pause")
    assert control.asked() == "pause"
