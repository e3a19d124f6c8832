"""The embedded Redis: the newer server is started, with everything off that a run does not need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import redis

from common.errors import ConfigError
from learner.driver import embedded_redis as embedding
from learner.driver.embedded_redis import RedisBinary, embedded_redis, running_address


def program(path: Path, output: str) -> str:
    """A redis-server that only states a version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("Redis server v=6.2.14 sha=40305114:0 malloc=libc bits=64 build=dff95a8e7a99d269", (6, 2, 14)),
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=e08dbad3e06f3fb", (7, 0, 15)),
        ("Valkey server v=8.0.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=a", (8, 0, 1)),
        ("server", ()),
    ],
)
def test_a_server_states_its_version(tmp_path: Path, output: str, version: tuple[int, ...]) -> None:
    assert RedisBinary.at(program(tmp_path / "redis-server", output)).version == version


def test_what_cannot_be_started_has_no_version(tmp_path: Path) -> None:
    assert RedisBinary.at(str(tmp_path / "none")).version == ()


@pytest.mark.parametrize(
    ("bundled", "installed", "chosen"),
    [
        ("6.2.14", "7.0.15", "installed"),
        ("6.2.14", "6.2.9", "bundled"),
        ("6.2.14", "6.2.20", "installed"),
        ("7.2.0", "7.0.15", "bundled"),
        ("7.0.15", "7.0.15", "bundled"),
        ("6.2.14", "10.0.0", "installed"),
        ("6.2.14", "unknown", "bundled"),
        ("6.2.14", None, "bundled"),
        (None, "6.0.16", "installed"),
    ],
)
def test_the_newer_server_is_started(
    bundled: str | None, installed: str | None, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {
        place: program(tmp_path / place / "redis-server", f"Redis server v={version} sha=0")
        for place, version in (("bundled", bundled), ("installed", installed))
        if version is not None
    }
    monkeypatch.setattr(embedding, "_bundled", lambda: paths.get("bundled"))
    monkeypatch.setenv("PATH", str(tmp_path / "installed"))
    assert embedding._binary().path == paths[chosen]


def test_scripts_modules_and_settings_are_off(tmp_path: Path) -> None:
    with embedded_redis(tmp_path / "redis.log") as address, address.connect() as client:
        assert client.set("a", "b")
        for command in (
            "EVAL return(1) 0",
            "EVALSHA 0 0",
            "SCRIPT LOAD return(1)",
            "FUNCTION LIST",
            "FCALL f 0",
            "EVAL_RO return(1) 0",
            "MODULE LIST",
            "CONFIG GET dir",
            "DEBUG SLEEP 0",
            "SLAVEOF 127.0.0.1 1",
            "REPLICAOF 127.0.0.1 1",
        ):
            with pytest.raises(redis.ResponseError, match="unknown command"):
                client.execute_command(*command.split())


def test_commands_for_scripts_are_off_in_every_version() -> None:
    def off(version: tuple[int, ...]) -> set[str]:
        lines = embedding._settings(1, "password", version).splitlines()
        return {line.split()[1] for line in lines if line.startswith("rename-command")}

    assert {"EVAL", "EVALSHA", "SCRIPT"} < off((6, 2, 14))
    assert off((7, 0, 0)) - off((6, 2, 14)) == {"EVAL_RO", "EVALSHA_RO", "FUNCTION", "FCALL", "FCALL_RO"}
    assert off((10, 1, 0)) == off((7, 0, 0))
    assert off(()) == off((6, 2, 14))


def test_the_address_is_found_in_the_settings_while_it_runs(tmp_path: Path) -> None:
    settings = tmp_path / "redis.conf"
    with embedded_redis(tmp_path / "redis.log") as address:
        assert running_address(settings) == address
        assert os.stat(settings).st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match=r"redis\.conf: .*: no run with a Redis of its own is running there"):
        running_address(settings)
