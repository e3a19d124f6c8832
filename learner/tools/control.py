"""Command `rtdmd control`: pauses, continues, stops or scales a running run through its Redis."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.command import exit_status, user_path
from common.config.run import Config
from common.errors import ConfigError
from common.redis_link import RedisAddress, RedisLink
from common.rewards.bearer import REWARD_TOKEN, reward_token
from common.run_control import MOST_WORKERS, RunControl, RunRequest
from common.urls import host_of
from learner.driver.embedded_redis import running_address
from learner.preflight.run_file import load_saved_config

REQUESTS: dict[str, RunRequest | None] = {"pause": "pause", "stop": "stop", "continue": None}
DONE = {
    "pause": "the run {name} pauses after its iteration",
    "stop": "the run {name} writes a checkpoint after its iteration and ends; continue it with --resume",
    "continue": "nothing is asked of the run {name}: it goes on",
    "workers": "the run {name} uses {count} rollout workers after its iteration, or as many as the cluster can place",
}


def main(argv: Sequence[str]) -> int:
    """Run `rtdmd control RUN_DIR pause`; the exit status is 1 when Redis cannot be reached."""
    parser = argparse.ArgumentParser(prog="rtdmd control", description="Pause, continue, stop or scale a running run.")
    parser.add_argument("run_dir", type=user_path, metavar="RUN_DIR", help="directory of the run, such as runs/NAME")
    parser.add_argument("request", choices=list(DONE), help="what the run is asked after its current iteration")
    parser.add_argument("count", nargs="?", type=int, metavar="N", help="number of rollout workers, after `workers`")
    return exit_status(lambda: _ask(parser.parse_args(argv)))


def _ask(options: argparse.Namespace) -> None:
    _check(options)
    config = load_saved_config(options.run_dir / "config.yaml")
    address = _redis(config, options.run_dir)
    # The run reads only requests that are signed with its own token.
    token = reward_token([host for host in (host_of(address.url),) if host])
    link = RedisLink(address)
    try:
        control = RunControl(link, config.run.name, token)
        if options.count is None:
            control.ask(REQUESTS[options.request])
        else:
            control.ask_workers(options.count)
    finally:
        link.close()
    signed = "" if token is None else f" (signed: a run that was started without {REWARD_TOKEN} ignores it)"
    print(DONE[options.request].format(name=config.run.name, count=options.count) + signed)


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError: `workers` without a usable number, or another request with one."""
    if options.request != "workers" and options.count is not None:
        raise ConfigError(f"rtdmd control: {options.request} takes no number: leave {options.count} out")
    if options.request == "workers" and not 1 <= (options.count or 0) <= MOST_WORKERS:
        given = "" if options.count is None else f", not {options.count}"
        raise ConfigError(f"rtdmd control: workers needs a number from 1 to {MOST_WORKERS}{given}")


def _redis(config: Config, run_dir: Path) -> RedisAddress:
    if config.redis.url == "none":
        raise ConfigError(f"{run_dir}: the run has no Redis (redis.url: none): stop it with Ctrl-C")
    if config.redis.url == "embedded":
        return running_address(run_dir / "logs" / "redis.conf")
    return RedisAddress.from_environment(config.redis.url)
