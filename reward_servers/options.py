"""Command line of a reward server: scorers, each with its own `--model` and `--name`, and shared options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command import duration, some_time, user_path
from common.errors import ConfigError
from common.redis_link import RedisAddress
from common.rewards.api import DEFAULT_MAX_PIXELS
from common.rewards.bearer import REWARD_TOKEN, reward_token
from common.types import Precision
from common.urls import host_fault, host_of, is_loopback, registered_url_fault, server_url_fault, without_secrets
from reward_servers.batcher import BatchLimits
from reward_servers.limits import RequestLimits
from reward_servers.loading import ScorerSettings

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""A name must match this, because it becomes a part of URLs."""
RESERVED_NAMES = ("v1", "score", "health", "healthz", "readyz", "metrics", "openapi.json", "docs")
"""These names are the first parts of a process's own routes."""
LAST_PORT = 65_535
MEBIBYTE = 2**20
ANY_ADDRESS = ("0.0.0.0", "::")
"""These addresses listen on every interface, but no client can connect to them by this name."""
COPIES_OF_A_BODY = 2
"""A plain JSON request's body and its decoded images are in memory at the same time."""
DEADLINES_OF_A_CALL = 2
"""By default a model call may take this many times the deadline. Nobody waits for its scores by then."""
USAGE_ERROR = 2
"""Every command here exits with this status when it could not do what its command line asks for."""


@dataclass(frozen=True)
class ServerSettings:
    """The validated command line.

    Attributes:
        queue_bytes: bound on the bytes that each scorer's requests hold at once.
        accept_flow_grpo: whether pickles of plain containers are read, at `POST /`.
        in_process: whether every model runs in the server's own process.
        call_s: seconds that a call of a model in a process of its own may take.
    """

    scorers: tuple[ScorerSettings, ...]
    host: str
    port: int
    device: str
    batch: BatchLimits
    limits: RequestLimits
    queue_bytes: int
    accept_flow_grpo: bool
    in_process: bool
    call_s: float
    ready_file: Path | None
    redis_url: str | None
    advertise_url: str | None


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows an option's default if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _OfScorer(argparse.Action):
    """Records `--scorer`, `--model`, `--name` and `--precision` in the order in which they are given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,  # noqa: ARG002
    ) -> None:
        namespace.of_scorers = [*namespace.of_scorers, (self.dest, values)]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reward_servers",
        description="Serve rewards over HTTP. Repeat --scorer to serve several; --model, --name and --precision "
        "belong to the --scorer before them.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(of_scorers=[])
    _add_scorers(parser)
    parser.add_argument(
        "--host",
        type=_without_brackets,
        default="127.0.0.1",
        help=f"address to listen on; any but loopback needs {REWARD_TOKEN}",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 picks a free one, see --ready-file"
    )
    parser.add_argument("--device", default="cpu", help="torch device of the models: cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads of each process of models")
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="run the models in the server's own process, for debugging: one that crashes or is stuck takes it along",
    )
    parser.add_argument("--max-batch", type=_positive, default=16, help="images per model call")
    parser.add_argument(
        "--reproducible",
        action="store_true",
        help="give every request a model call of its own: slower, but bitwise reproducible",
    )
    parser.add_argument(
        "--max-wait-ms",
        type=duration,
        default=5.0,
        help="milliseconds that a request waits for others to join its batch while the device is idle",
    )
    parser.add_argument(
        "--accept-flow-grpo",
        action="store_true",
        help="serve POST / as well, for the HTTP reward clients of Flow-GRPO and verl-omni: pickles of plain "
        "containers, read without Python's unpickler",
    )
    _add_limits(parser)
    parser.add_argument("--ready-file", type=user_path, help="write JSON with port and pid to this file when ready")
    parser.add_argument(
        "--redis-url", type=str.strip, help="register in this Redis, so that runs find the server: redis://HOST:PORT/DB"
    )
    parser.add_argument("--advertise-url", type=server_url, help="base URL to register (default: http://HOST:PORT)")
    parser.add_argument("--parent-pid", type=int, help="stop when the process with this id is no longer the parent")
    return parser


def _add_scorers(parser: argparse.ArgumentParser) -> None:
    """Add the options of which each scorer has its own."""
    for option, explanation in (
        ("scorer", "a built-in scorer (hps, pickscore, ...), or package.module:Class"),
        ("model", "the scorer's model directory"),
        ("name", "name in responses, in metrics and, with several scorers, in URLs (default: the scorer's own)"),
    ):
        parser.add_argument(f"--{option}", action=_OfScorer, default=argparse.SUPPRESS, help=explanation)
    parser.add_argument(
        "--precision",
        action=_OfScorer,
        type=Precision,
        choices=list(Precision),
        default=argparse.SUPPRESS,
        help="type in which the scorer's model computes (default: float32 on the CPU; on a GPU that of its published "
        "recipe, see docs/rewards.md)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the limits of a request. A request beyond one of them gets an error status."""
    parser.add_argument(
        "--queue-items",
        type=_positive,
        default=256,
        help="images that may wait per scorer; more get status 429, a larger request 413",
    )
    parser.add_argument(
        "--queue-mb", type=_positive, default=1024, help="MiB of requests that may wait per scorer; more get status 429"
    )
    parser.add_argument(
        "--max-body-mb", type=_positive, default=256, help="largest request body in MiB; a larger one gets status 413"
    )
    parser.add_argument(
        "--max-pixels",
        type=_positive,
        default=DEFAULT_MAX_PIXELS,
        help="largest image in pixels; a larger one gets status 413",
    )
    parser.add_argument(
        "--deadline-s", type=some_time, default=60.0, help="seconds that a request may take; then it gets status 504"
    )
    parser.add_argument(
        "--call-s",
        type=some_time,
        help="seconds that a model call may take; then its requests get status 503 and the model is loaded again "
        f"(default: {DEADLINES_OF_A_CALL} times --deadline-s)",
    )


def check(options: argparse.Namespace) -> ServerSettings:
    """ConfigError for a command line that cannot be served or is ambiguous."""
    _check_place(options.host, options.port)
    token = reward_token(_token_hosts(options))
    if not is_loopback(options.host) and token is None:
        message = f"--host {options.host} is reachable from outside: set {REWARD_TOKEN}, or listen on 127.0.0.1"
        raise ConfigError(message)
    if options.queue_mb < COPIES_OF_A_BODY * options.max_body_mb:
        message = f"--queue-mb {options.queue_mb} is less than twice --max-body-mb {options.max_body_mb}"
        raise ConfigError(f"{message}: raise --queue-mb, or the largest request would never be accepted")
    scorers = _pair(options.of_scorers)
    if options.redis_url is not None:
        _check_reachable(options.redis_url, options.host, options.advertise_url)
        _check_registrable(options.advertise_url, len(scorers))
    return ServerSettings(
        scorers=scorers,
        host=options.host,
        port=options.port,
        device=options.device,
        batch=BatchLimits(options.max_batch, options.max_wait_ms / 1000, options.queue_items, not options.reproducible),
        limits=RequestLimits(options.max_body_mb * MEBIBYTE, options.max_pixels, options.deadline_s, token),
        queue_bytes=options.queue_mb * MEBIBYTE,
        accept_flow_grpo=options.accept_flow_grpo,
        in_process=options.in_process,
        call_s=options.call_s or DEADLINES_OF_A_CALL * options.deadline_s,
        ready_file=options.ready_file,
        redis_url=options.redis_url,
        advertise_url=options.advertise_url,
    )


def check_names(names: Sequence[str]) -> None:
    """ConfigError for names that are invalid in URLs or not unique."""
    for name in names:
        if not NAME_PATTERN.fullmatch(name) or name in RESERVED_NAMES:
            message = f"--name {name}: letters, digits, '_', '.' and '-', and none of {', '.join(RESERVED_NAMES)}"
            raise ConfigError(message)
        if names.count(name) > 1:
            raise ConfigError(f"two scorers are named {name}: give each its own --name, after its --scorer")


def _pair(given: Sequence[tuple[str, Any]]) -> tuple[ScorerSettings, ...]:
    """Give each scorer the options that follow it. A single scorer may also have them before it."""
    count = sum(option == "scorer" for option, _ in given)
    if count == 0:
        raise ConfigError("--scorer is missing: hps, pickscore, ..., or package.module:Class")
    if count == 1:
        given = sorted(given, key=lambda pair: pair[0] != "scorer")
    scorers: list[dict[str, Any]] = []
    for option, value in given:
        if option == "scorer":
            scorers.append({})
        elif not scorers:
            raise ConfigError(f"--{option} {value} is before the first of {count} --scorer: put it after its --scorer")
        if option in scorers[-1]:
            raise ConfigError(
                f"--{option} {value}: {scorers[-1]['scorer']} has --{option} {scorers[-1][option]} already"
            )
        scorers[-1][option] = value
    return tuple(
        ScorerSettings(
            one["scorer"], user_path(one["model"]) if "model" in one else None, one.get("name"), one.get("precision")
        )
        for one in scorers
    )


def _check_reachable(redis_url: str, host: str, advertised: str | None) -> None:
    """ConfigError if clients that read this server's address in that Redis could not connect to it."""
    RedisAddress.from_environment(redis_url).check("--redis-url")
    shown = f"--redis-url {without_secrets(redis_url)}"
    redis_host = host_of(redis_url) or "localhost"
    listed = host if advertised is None else host_of(advertised)
    unknown = advertised is None and host in ANY_ADDRESS
    if unknown or (is_loopback(listed) and not is_loopback(redis_host)):
        raise ConfigError(
            f"{shown}: machines that find this server there cannot reach it as {listed}: give a URL that they can "
            "reach with --advertise-url http://HOST:PORT"
        )


def _check_registrable(advertised: str | None, scorers: int) -> None:
    """ConfigError if clients would ignore this server's address in Redis."""
    fault = "" if advertised is None else registered_url_fault(advertised + ("/NAME" if scorers > 1 else ""))
    if fault:
        several = "; a server of several scorers registers under /NAME for each" if scorers > 1 else ""
        raise ConfigError(f"--advertise-url {advertised}: {fault}{several}")


def _token_hosts(options: argparse.Namespace) -> list[str]:
    """Hosts whose users could try to guess the token: through this server, or from signatures in that Redis."""
    urls = [url for url in (options.redis_url, options.advertise_url) if url is not None]
    return [host for host in (options.host, *map(host_of, urls)) if host]


def server_url(text: str) -> str:
    """Argparse type: the base URL of a reward server."""
    fault = server_url_fault(text)
    if fault:
        raise argparse.ArgumentTypeError(f"{without_secrets(text)}: {fault}")
    return text.rstrip("/")


def _without_brackets(host: str) -> str:
    """Argparse type: a host to listen on. An IPv6 address may have the brackets that it has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _check_place(host: str, port: int) -> None:
    """ConfigError for a host or port that nothing can listen on."""
    fault = host_fault(host)
    if fault:
        raise ConfigError(f"--host {host}: {fault}")
    if not 0 <= port <= LAST_PORT:
        raise ConfigError(f"--port {port}: not a port: give 1 to {LAST_PORT}, or 0 for a free one")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)
