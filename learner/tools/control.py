"""Command `rtdmd control`: pauses, continues or stops a running run through its Redis."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.command import exit_status, user_path
from common.config.run import Config
from common.errors import ConfigError
from common.redis_link import RedisAddress, RedisLink
from common.rewards.bearer import REWARD_TOKEN, reward_token
from common.run_control import RunControl, RunRequest
from common.urls import host_of
from learner.driver.embedded_redis import running_address
from learner.preflight.run_file import load_saved_config

REQUESTS: dict[str, RunRequest | None] = {"pause": "pause", "stop": "stop", "continue": None}
DONE = {
    "pause": "the run {name} pauses after its iteration",
    "stop": "the run {name} writes a checkpoint after its iteration and ends; continue it with --resume",
    "continue": "nothing is asked of the run {name}: it goes on",
}


def main(argv: Sequence[str]) -> int:
    """Run `rtdmd control RUN_DIR pause`; the exit status is 1 when Redis cannot be reached."""
    parser = argparse.ArgumentParser(prog="rtdmd control", description="Pause, continue or stop a running run.")
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR", help="directory of the run, such as runs/NAME")
    parser.add_argument("request", choices=list(REQUESTS), help="what the run is asked after its current iteration")
    return exit_status(lambda: _ask(parser.parse_args(argv)))


def _ask(options: argparse.Namespace) -> None:
    config = load_saved_config(options.run_dir / "config.yaml")
    address = _redis(config, options.run_dir)
    # The run reads only requests that are signed with its own token.
    token = reward_token([host for host in (host_of(address.url),) if host])
    link = RedisLink(address)
    try:
        RunControl(link, config.run.name, token).ask(REQUESTS[options.request])
    finally:
        link.close()
    signed = "" if token is None else f" (signed: a run that was started without {REWARD_TOKEN} ignores it)"
    print(DONE[options.request].format(name=config.run.name) + signed)


def _redis(config: Config, run_dir: Path) -> RedisAddress:
    if config.redis.url == "none":
        raise ConfigError(f"{run_dir}: the run has no Redis (redis.url: none): stop it with Ctrl-C")
    if config.redis.url == "embedded":
        return running_address(run_dir / "logs" / "redis.conf")
    return RedisAddress.from_environment(config.redis.url)
