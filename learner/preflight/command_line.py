"""Command lines of `rtdmd train` and `rtdmd forecast`: run file < environment < options, and help for every option.

    rtdmd train [--config FILE] [--section.key VALUE ...] [--run-dir DIR] [--quick] [--explain] [--dry-run]
                [--resume [auto]] [--dashboard [PORT]]

A run file may carry a `quick:` block, a partial configuration that `--quick` applies on top of the rest of the file.
Environment variables are RTDMD_SECTION__KEY. A reward is addressed by name: `--rewards.hps.weight 0.5`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import EnumType
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from common.command import user_path
from common.config.run import DASHBOARD_PORT, Config
from common.errors import ConfigError
from common.project_files import found_path, with_found_paths
from learner.preflight.run_file import Draft, Key, Knob, kinds_of, knobs, parse_yaml, read_run_file
from learner.records.run_log import LogLevel

DEFAULT_RUN_FILE = Path("deploy/runs/shapes.yaml")
ENVIRONMENT_PREFIX = "RTDMD_"
KEY_SEPARATOR = "__"
QUOTED = re.compile(r"([\"']).*\1", re.DOTALL)
OF_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)(_\w+)?=|_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=|=(tcp|udp|sctp)://")
"""Variables of a Service; one named rtdmd-a--b has "__" in them."""
QUICK_BLOCK = "quick"
NEWEST, AUTO = "newest", "auto"
"""The values of `--resume`; without a value it is `newest`, which needs a run to continue."""
HELP_WIDTH = 110


@dataclass(frozen=True)
class Invocation:
    """The parsed request of a command line.

    Attributes:
        resume: continue the run in `run_dir`.
        resume_auto: `--resume auto`: `learner.driver.run_directory.decided` sets `resume` from what `run_dir` holds.
    """

    config: Config
    run_dir: Path
    dry_run: bool
    resume: bool
    explain: bool = False
    log_level: LogLevel = LogLevel.INFO
    resume_auto: bool = False


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Invocation:
    """Parse the command line of `rtdmd train`: the run file, overridden by environment and options.

    Args:
        argv: the arguments, without the program's name. `--help` prints the help and exits, as usual.
        environ: usually `os.environ`.

    Raises:
        ConfigError: one line per problem, with its origin, key and value.
    """
    _require_text(argv)
    arguments, overrides = _train_parser().parse_known_args(argv)
    if arguments.dashboard is not None:
        overrides.append(f"--dashboard.port={arguments.dashboard}")
    config = _configured(arguments, overrides, environ)
    run_dir = arguments.run_dir or Path("runs") / config.run.name
    level = LogLevel(arguments.log_level)
    auto = arguments.resume == AUTO
    resume = arguments.resume is not None and not auto
    return Invocation(config, run_dir, arguments.dry_run, resume, arguments.explain, level, resume_auto=auto)


def parse_forecast(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Config, str]:
    """The run for `rtdmd forecast`, and the name of the device ("auto" by default).

    Raises:
        ConfigError: see `parse`.
    """
    arguments, overrides = _forecast_parser().parse_known_args(argv)
    return _configured(arguments, overrides, environ), arguments.device


def parse_with(
    parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str]
) -> tuple[Config, argparse.Namespace]:
    """The run of another command that takes a run file and overrides; `parser` is from `run_file_parser`.

    Raises:
        ConfigError: see `parse`.
    """
    _require_text(argv)
    arguments, overrides = parser.parse_known_args(argv)
    return _configured(arguments, overrides, environ), arguments


def _configured(arguments: argparse.Namespace, overrides: Sequence[str], environ: Mapping[str, str]) -> Config:
    run_file = read_run_file(found_path(arguments.config))
    quick = run_file.pop(QUICK_BLOCK, None)
    draft = Draft(str(arguments.config))
    draft.lay(run_file, str(arguments.config))
    if quick is not None or arguments.quick:
        _lay_quick(draft, run_file, quick, arguments)
    for key, text, origin in (*_from_environment(environ), *_from_options(overrides)):
        draft.lay(_nested(key, _value(key, text, origin)), origin)
    return with_found_paths(draft.build())


def _require_text(argv: Sequence[str]) -> None:
    """Ray cannot pass on names that are not text: refuse them before anything starts."""
    for what, word in (("current directory", os.getcwd()), *(("command line", word) for word in argv)):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{what}: {word!a} has bytes that are not UTF-8: rename it") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def _train_parser() -> argparse.ArgumentParser:
    parser = run_file_parser(
        "rtdmd train",
        "[--run-dir DIR] [--quick] [--explain] [--dry-run] [--resume [auto]] [--dashboard [PORT]] [--log-level LEVEL]",
        "Distil a text-to-image model into a few-step student, then align it with rewards.",
    )
    parser.add_argument("--run-dir", type=user_path, metavar="DIR", help="where the run writes (default runs/NAME)")
    parser.add_argument(
        "--dry-run", action="store_true", help="start everything once, say what would be trained, and stop"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        choices=[NEWEST, AUTO],
        const=NEWEST,
        metavar=AUTO,
        help="continue from the newest checkpoint of the run directory; with auto, start a run if there is none",
    )
    parser.add_argument(
        "--explain", action="store_true", help="say which values are published, vetted here or yours, and stop"
    )
    parser.add_argument(
        "--log-level",
        choices=[level.value for level in LogLevel],
        default=LogLevel.INFO.value,
        help="least important lines that the console shows: info (default) has the progress, debug also Ray's lines",
    )
    parser.add_argument(
        "--dashboard",
        nargs="?",
        const=str(DASHBOARD_PORT),
        metavar="PORT",
        help=f"serve a live page of the run on this port of loopback (default {DASHBOARD_PORT}; 0 is any free one)",
    )
    parser.add_argument("--plan", nargs="?", action=_Renamed, help=argparse.SUPPRESS)
    return parser


def _forecast_parser() -> argparse.ArgumentParser:
    parser = run_file_parser(
        "rtdmd forecast",
        "[--device DEVICE] [--quick]",
        "Print the placement, memory and seconds that a run will need, estimated from the sizes of its model.",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="a100, l40s, h100, h200 or b200 (default: h200 where the run file asks for GPUs, else this machine)",
    )
    return parser


def run_file_parser(program: str, options: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--config` and `--quick`, whose help lists every option of a run."""
    parser = _Parser(
        prog=program,
        usage=f"{program} [--config FILE] [--section.key VALUE ...] {options}",
        description=description,
        epilog=_knobs_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=user_path,
        default=DEFAULT_RUN_FILE,
        metavar="FILE",
        help=f"run file (default {DEFAULT_RUN_FILE})",
    )
    parser.add_argument("--quick", action="store_true", help="apply the run file's quick block on top: a smoke run")
    return parser


class _Renamed(argparse.Action):
    """An option of an earlier version, which now raises an error."""

    def __call__(self, *_: object) -> NoReturn:
        raise ConfigError("command line: --plan is now a command: rtdmd forecast [--device DEVICE]")


def _lay_quick(draft: Draft, run_file: dict[str, Any], quick: Any, arguments: argparse.Namespace) -> None:
    """Lay the quick block if requested; validate it in any case, so that a misspelling is found early."""
    origin = f"{arguments.config} ({QUICK_BLOCK})"
    if not isinstance(quick, dict):
        raise ConfigError(f"{arguments.config}: --quick needs a {QUICK_BLOCK}: mapping in the run file")
    with_quick = Draft(str(arguments.config))
    with_quick.lay(run_file, str(arguments.config))
    with_quick.lay(quick, origin)
    with_quick.build()
    if arguments.quick:
        draft.lay(quick, origin)


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[Key, str, str]]:
    """RTDMD_SECTION__KEY. Others are not ours: Kubernetes sets RTDMD_PORT for a Service named rtdmd."""
    for variable in sorted(environ):
        name = variable.removeprefix(ENVIRONMENT_PREFIX)
        if name != variable and KEY_SEPARATOR in name and not OF_KUBERNETES.search(f"{name}={environ[variable]}"):
            if QUOTED.fullmatch(environ[variable]):
                raise ConfigError(
                    f"environment variable {variable}: its value has quotes around it, which are a part of it (docker "
                    "--env-file keeps them): remove them"
                )
            key = tuple(name.lower().split(KEY_SEPARATOR))
            yield key, environ[variable], f"environment variable {variable}"


def _from_options(words: Sequence[str]) -> Iterator[tuple[Key, str, str]]:
    """`--section.key value` and `--section.key=value`."""
    remaining = list(words)
    while remaining:
        option, equals, text = remaining.pop(0).partition("=")
        if not option.startswith("--"):
            raise ConfigError(f"command line: unexpected {option!r}; overrides are --section.key VALUE, see --help")
        key = tuple(option.removeprefix("--").split("."))
        if len(key) == 1:
            raise ConfigError(f"command line: unknown option {option}{_option_suggestion(option)}; see --help")
        if not equals:
            if not remaining:
                raise ConfigError(f"command line: {option} needs a value")
            text = remaining.pop(0)
        yield key, text, f"option {option}"


def _option_suggestion(option: str) -> str:
    flags = ["--config", "--run-dir", "--quick", "--explain", "--dry-run", "--resume", "--dashboard", "--log-level"]
    by_leaf = [f"--{knob.dotted}" for knob in knobs() if knob.key[-1] == option.removeprefix("--")]
    close = by_leaf or difflib.get_close_matches(option, flags, n=1)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _value(key: Key, text: str, origin: str) -> Any:
    """The YAML value of an override. Where the schema expects text or a path, it is the text as it was typed.

    There, `null` stands for no value, and `[` begins a list, if the option may have these.
    """
    kinds = kinds_of(key)
    if kinds.isdisjoint({str, Path}) or (tuple in kinds and text.startswith("[")):
        return parse_yaml(text, origin)
    return None if types.NoneType in kinds and text in ("", "null") else text


def _nested(key: Key, value: Any) -> dict[str, Any]:
    for part in reversed(key):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _knobs_help() -> str:
    """Every option with type, default and description, one paragraph per section."""
    lines = ["Options of a run, with their defaults (a run file sets its own):"]
    for (prefix, section), group in groupby(knobs(), key=lambda knob: (knob.key[:-1], knob.section)):
        title, *_ = (section.__doc__ or "").strip().split("\n")
        lines += ["", f"{'.'.join(prefix)}: {title}"]
        for knob in group:
            lines.append(f"  --{knob.dotted} {_type_name(knob.field.annotation)}  ({_default_text(knob)})")
            lines += textwrap.wrap(
                knob.field.description or "", HELP_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) in (types.UnionType, Union):
        return "|".join(_type_name(member) for member in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if isinstance(annotation, EnumType):
        return "|".join(annotation)
    if get_origin(annotation) is tuple:
        return f"[{_type_name(get_args(annotation)[0])}, ...]"
    return "null" if annotation is type(None) else annotation.__name__.lower()


def _default_text(knob: Knob) -> str:
    if knob.field.is_required():
        return "required"
    return f"default {json.dumps(knob.field.default, default=str)}"
