"""Command lines with several scorers: valid ones, and refused ones."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from common.errors import ConfigError
from common.types import Precision
from reward_servers.loading import ScorerSettings
from reward_servers.options import ServerSettings, build_parser, check, check_names


def parse(*arguments: str) -> ServerSettings:
    return check(build_parser().parse_args(list(arguments)))


def test_model_and_name_belong_to_the_scorer_before_them() -> None:
    line = "--scorer hps --model a --port 1 --scorer pickscore --name p --model b --scorer x:Y"
    assert parse(*line.split()).scorers == (
        ScorerSettings("hps", Path("a"), None),
        ScorerSettings("pickscore", Path("b"), "p"),
        ScorerSettings("x:Y", None, None),
    )


def test_each_scorer_may_have_a_precision_of_its_own() -> None:
    line = "--scorer hps --precision bfloat16 --scorer pickscore --scorer x:Y --precision float32"
    assert [one.precision for one in parse(*line.split()).scorers] == [Precision.BFLOAT16, None, Precision.FLOAT32]


@pytest.mark.parametrize("line", ["--scorer hps --model a --name n", "--name n --model a --scorer hps"])
def test_a_single_scorer_may_be_described_in_any_order(line: str) -> None:
    assert parse(*line.split()).scorers == (ScorerSettings("hps", Path("a"), "n"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--port 1", "--scorer is missing"),
        ("--model a --scorer hps --scorer pickscore --model b", "--model a is before the first of 2"),
        ("--scorer hps --model a --model b --scorer pickscore", "--model b: hps has --model a already"),
        ("--precision float16 --scorer hps --scorer ocr", "--precision float16 is before the first of 2"),
        ("--scorer hps --name a --name b", "--name b: hps has --name a already"),
        ("--scorer hps --queue-mb 3 --max-body-mb 2", "less than twice --max-body-mb 2: .* would never be accepted"),
        ("--scorer hps --redis-url redis://redis:6379/0", "give a URL that they can reach with --advertise-url"),
        ("--scorer hps --redis-url foo", "--redis-url foo: not a URL of Redis; write redis://HOST:PORT/DB"),
        ("--scorer hps --redis-url redis://redis:port/0", "--redis-url redis://redis:port/0: its port is no number"),
        (
            "--scorer hps --redis-url redis://h:6379/0?db=x",
            "--redis-url redis://h:6379/0: its query cannot be used: Invalid value for 'db'",
        ),
        (
            "--scorer hps --redis-url redis://h:6379/0?decode_responses=true",
            "its query cannot be used: decode_responses",
        ),
        (
            "--scorer hps --redis-url redis://h:6379/0?hurry=yes",
            "its query cannot be used: .* unexpected keyword argument 'hurry'",
        ),
        ("--scorer hps --port 99999", "--port 99999: not a port: give 1 to 65535, or 0 for a free one"),
        ("--scorer hps --port -1", "--port -1: not a port"),
        ("--scorer hps --host 127.0.0.1:8000", "--host 127.0.0.1:8000: not a host alone"),
        ("--scorer hps --host http://127.0.0.1", "--host http://127.0.0.1: not a host alone"),
        ("--scorer hps --host 0.0.0.0", "set REWARD_SERVER_TOKEN"),
        ("--scorer hps --redis-url redis://:pw@shared:1/0", "redis://shared:1/0: .* as 127.0.0.1: give a URL"),
        ("--scorer hps --redis-url redis://shared:1/0 --advertise-url http://localhost:2", "reach it as localhost"),
        (
            "--scorer hps --redis-url redis://shared:1/0 --advertise-url http://here/hps",
            r"--advertise-url http://here/hps: a registered URL is http\(s\)://HOST:PORT",
        ),
        (
            "--scorer hps --scorer ocr --redis-url redis://shared:1/0 --advertise-url http://here:1/hps",
            "http://here:1/hps: .*; a server of several scorers registers under /NAME for each",
        ),
    ],
)
def test_an_ambiguous_or_impossible_command_line_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*line.split())


@pytest.mark.parametrize(
    "line",
    [
        "--redis-url redis://127.0.0.1:6379/0",
        "--redis-url redis://redis:6379/0 --advertise-url http://here:8000",
        "--redis-url REDIS://redis:6379/0 --advertise-url HTTP://here:8000",
        "--redis-url redis://redis:6379/0 --advertise-url http://here:8000/one",
        "--redis-url unix:///run/redis@1.sock?db=1",
        "--queue-mb 2 --max-body-mb 1",
    ],
)
def test_what_others_can_reach_and_what_fits_is_taken(line: str) -> None:
    assert parse("--scorer", "hps", *line.split()).scorers[0].scorer == "hps"


@pytest.mark.parametrize(
    "option",
    [
        "--mod a",
        "--max-batch 0",
        "--deadline-s -1",
        "--deadline-s inf",
        "--deadline-s 0",
        "--advertise-url http://me:pw@h",
        "--port http",
    ],
)
def test_a_value_out_of_range_or_half_an_option_is_no_option(option: str) -> None:
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        parse("--scorer", "hps", *option.split())


@pytest.mark.parametrize(
    "url",
    [
        "redis://worker:s3cr3t#pw@redis.corp:6379/0",
        "redis://worker:s3cr3t/pw@redis.corp:6379/0",
        "redis://worker:12?s3cr3t@redis.corp:6379/0",
        "redis://worker:s3cr3t[pw@redis.corp:6379/0",
        "redis://redis.corp:6379/0?password=s3cr3t",
        "redis://redis.corp:6379/0?username=me&password=s3cr3t",
    ],
)
def test_no_password_in_a_url_of_redis_is_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"must be percent-encoded|set REDIS_USERNAME and REDIS_PASSWORD") as caught:
        parse("--scorer", "hps", "--redis-url", url)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(("host", "expected"), [("[::1]", "::1"), ("::1", "::1"), ("localhost", "localhost")])
def test_brackets_of_an_address_do_not_count(host: str, expected: str) -> None:
    assert parse("--scorer", "hps", "--host", host).host == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["hps", "hps"], "two scorers are named hps"),
        (["a/b"], "letters, digits"),
        (["metrics"], "none of"),
        (["..", "x"], "letters, digits"),
        ([""], "letters, digits"),
    ],
)
def test_names_can_stand_in_urls(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_names(names)
