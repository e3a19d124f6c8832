"""The script that makes the Secrets of a cluster, and what its users may do in a real Redis."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from common.redis_link import RedisAddress, RedisLink
from common.rewards.registry import ServerRegistry
from common.run_control import RunControl
from learner.driver.embedded_redis import embedded_redis
from tests.helpers.manifests import KUBERAY

KUBECTL = """#!/bin/sh
echo "$@" >> "$SECRETS/calls"
for argument in "$@"; do
    case "$argument" in --from-file=*) cp "${argument#--from-file=}" "$SECRETS/" ;; esac
done
"""
"""Stands in for kubectl: keeps its arguments, and the files that it would send."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Secrets' files and the arguments of kubectl."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes the random values")
    programs, secrets = tmp_path_factory.mktemp("programs"), tmp_path_factory.mktemp("secrets")
    (programs / "kubectl").write_text(KUBECTL)
    (programs / "kubectl").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SECRETS": str(secrets)}
    done = subprocess.run(
        [KUBERAY / "make_secrets.sh"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    return secrets


@pytest.fixture(scope="module")
def users(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, RedisAddress]]:
    """A Redis with the users of users.acl; the address as each of them."""
    with embedded_redis(tmp_path_factory.mktemp("redis") / "redis.log") as address:
        with address.connect() as client:
            for line in (made / "users.acl").read_text().splitlines()[1:]:
                client.execute_command("ACL", "SETUSER", *line.split()[1:])
        yield {
            name: replace(address, username=name, password=(made / f"{name}-password").read_text())
            for name in ("ray", "rewards")
        }


def test_values_are_random_and_stand_in_no_argument(made: Path) -> None:
    names = ("token", "ray-password", "rewards-password")
    values = {(made / name).read_text() for name in names}
    assert len(values) == len(names)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in values)
    told = (made / "calls").read_text() + (made / "users.acl").read_text()
    assert not [value for value in values if value in told]
    assert hashlib.sha256((made / "ray-password").read_bytes()).hexdigest() in told


def test_only_the_named_users_are_let_in(made: Path) -> None:
    first, *others = (made / "users.acl").read_text().splitlines()
    assert first == "user default off"
    assert [line.split()[1] for line in others] == ["ray", "rewards"]


def test_a_reward_server_registers_and_the_driver_finds_it(users: dict[str, RedisAddress]) -> None:
    server, driver = (RedisLink(users[name]) for name in ("rewards", "ray"))
    ServerRegistry(server, "token-of-16-chars").register("hps", "http://10.0.0.7:8000/hps")
    assert ServerRegistry(driver, "token-of-16-chars").urls("hps") == ("http://10.0.0.7:8000/hps",)
    ServerRegistry(server, "token-of-16-chars").deregister("hps", "http://10.0.0.7:8000/hps")
    assert ServerRegistry(driver, "token-of-16-chars").urls("hps") == ()
    control = RunControl(driver, "rtdmd")
    control.ask("pause")
    assert control.asked() == "pause"
    for link in (server, driver):
        link.close()


@pytest.mark.parametrize(
    "command",
    [
        ("SET", "rtdmd:run:rtdmd", "stop"),
        ("GET", "rtdmd:run:rtdmd"),
        ("SET", "rtdmd:score:abc", "1"),
        ("HSET", "RAY@ACTOR", "a", "b"),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("EVAL", "return 1", "0"),
    ],
)
def test_a_reward_server_may_do_nothing_else(users: dict[str, RedisAddress], command: tuple[str, ...]) -> None:
    with users["rewards"].connect() as client, pytest.raises(redis.ResponseError):
        client.execute_command(*command)


def test_ray_keeps_its_state_and_changes_no_setting(users: dict[str, RedisAddress]) -> None:
    with users["ray"].connect() as client:
        client.hset("RAYdefault@ACTOR", "id", "state")
        assert client.hget("RAYdefault@ACTOR", "id") == b"state"
        assert client.unlink("RAYdefault@ACTOR", "DUMMY") == 1
        assert "redis_version" in client.info()
        for command in (("FLUSHALL",), ("ACL", "LIST"), ("SHUTDOWN",), ("SET", "other", "1")):
            with pytest.raises(redis.ResponseError):
                client.execute_command(*command)
