"""Writes tiny random model directories: `python -m reward_servers.tiny DIR [--scorer NAME]`.

Each writer imports its scorer's libraries, and only the scorers that are asked for are written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from common.command import exit_status, user_path
from common.errors import ConfigError
from common.visible_text import printable
from reward_servers.options import USAGE_ERROR

PORT = 8101
"""The port in the command that is printed."""


def _hps(directory: Path) -> None:
    from reward_servers.tiny.clip import write_hps

    write_hps(directory)


def _clip(directory: Path) -> None:
    from reward_servers.tiny.clip import write_pickscore

    write_pickscore(directory)


def _geneval(directory: Path) -> None:
    from reward_servers.tiny.geneval import write_geneval

    write_geneval(directory)


def _hpsv3(directory: Path) -> None:
    from reward_servers.tiny.hpsv3 import write_hpsv3

    write_hpsv3(directory)


def _aesthetic(directory: Path) -> None:
    from reward_servers.tiny.converted import write_aesthetic

    with TemporaryDirectory() as work:
        write_aesthetic(directory, Path(work))


def _image_reward(directory: Path) -> None:
    from reward_servers.tiny.converted import write_image_reward

    with TemporaryDirectory() as work:
        write_image_reward(directory, Path(work))


WRITERS: dict[str, Callable[[Path], None]] = {
    "aesthetic": _aesthetic,
    "clipscore": _clip,
    "geneval": _geneval,
    "geneval_parts": _geneval,
    "hps": _hps,
    "hpsv3": _hpsv3,
    "image_reward": _image_reward,
    "pickscore": _clip,
}
"""Each scorer maps to what writes its model directory."""
BEHIND_VLLM = "its model is behind vLLM (docs/rewards.md): python -m reward_servers --scorer {} --model DIR"
ELSEWHERE = {
    "geneval2": BEHIND_VLLM.format("geneval2"),
    "geneval2_parts": BEHIND_VLLM.format("geneval2_parts"),
    "ocr": "its models come with rapidocr: python -m reward_servers --scorer ocr",
    "unified_reward": BEHIND_VLLM.format("unified_reward"),
    "vlm_judge": "zoo/weights/judge has a small one, and `make judge-env` its environment: python -m reward_servers "
    "--scorer vlm_judge --model zoo/weights/judge",
}
"""Scorers without a directory here, and how to start them."""


def main(arguments: list[str] | None = None) -> int:
    """0 when every directory was written, else 2 with one line on stderr."""
    options = _build_parser().parse_args(arguments)

    def write() -> None:
        for line in write_models(options.directory, options.scorer or list(WRITERS)):
            print(line, flush=True)

    return exit_status(write, prefix="reward_servers.tiny", failed=USAGE_ERROR, place=options.directory)


def write_models(directory: Path, scorers: Sequence[str]) -> Iterator[str]:
    """Write `directory`/NAME for each scorer; yield the command that starts it.

    Raises:
        ConfigError: one of them is there already, or the scorer has no weights of its own.
    """
    for name in scorers:
        if name in ELSEWHERE:
            raise ConfigError(f"--scorer {name} needs no directory: {ELSEWHERE[name]}")
        if (directory / name).exists():
            raise ConfigError(f"{printable(directory / name)} is there already: remove it, or name another directory")
    for name in scorers:
        WRITERS[name](directory / name)
        yield f"python -m reward_servers --scorer {name} --model {printable(directory / name)} --port {PORT}"


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reward_servers.tiny",
        description="Write tiny random models, one directory for each scorer, and print the command that starts each. "
        "Their scores mean nothing. " + " ".join(f"{name}: {text}." for name, text in ELSEWHERE.items()),
        allow_abbrev=False,
    )
    parser.add_argument("directory", type=user_path, metavar="DIR", help="the directories are made in DIR")
    parser.add_argument(
        "--scorer",
        action="append",
        choices=[*WRITERS, *ELSEWHERE],
        metavar="NAME",
        help=f"write this one alone; may be repeated. Names: {', '.join(WRITERS)} (default: all)",
    )
    return parser
