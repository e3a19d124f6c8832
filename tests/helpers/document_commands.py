"""The command lines that documents show, and their check by the real parser of each tool."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from common.errors import ConfigError
from learner.commands import COMMANDS, _loaded
from learner.preflight import command_line

PROJECT_ROOT = Path(__file__).resolve().parents[2]
INLINE = re.compile(r"`([^`\n]+)`")
STARTS = re.compile(r"(rtdmd|make) |rtdmd$|python3? (-m [a-z]|\S+\.py)|\.\.\. -")
SUBMITTED = re.compile(r"\S*\s*ray job submit .* -- (?=python )")
OPERATORS = ("&&", "|", ">", ";")
WITHOUT_OPTIONS = (
    "benchmarks.ocr_reading",
    "deploy.grafana.dashboards",
    "learner.preflight.configuration_page",
    "learner.preflight.preset_tables",
    "learner.records.metrics_page",
)
"""Modules without a parser."""
NOT_OURS = ("pip", "venv", "http.server")
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
INCOMPLETE = re.compile(
    r"the following arguments are required|one of the arguments .* is required|needs a value|invalid choice: '[A-Z]+'"
)
"""Errors of a command within a sentence, which may leave out what it needs or name it in capitals."""


@dataclass(frozen=True)
class Shown:
    """A command that a document shows; `whole` if it stands in a block, where it can be copied."""

    document: str
    line: int
    words: tuple[str, ...]
    whole: bool

    def __str__(self) -> str:
        return f"{self.document}:{self.line} {' '.join(self.words)}"


class _ParsedError(Exception):
    """Raised in place of running a command whose words the parser took."""


def shown_commands(path: Path) -> Iterator[Shown]:
    """All commands of a markdown document."""
    document, lines = str(path.relative_to(PROJECT_ROOT)), path.read_text(encoding="utf-8").splitlines()
    before: tuple[str, ...] = ()
    for number, line in enumerate(lines, start=1):
        whole = line.startswith("    ")
        joined = line
        following = iter(lines[number:])
        while joined.endswith("\\"):
            joined = joined[:-1] + next(following)
        for text in [joined.strip()] if whole else INLINE.findall(line):
            text = SUBMITTED.sub("", text)
            if not STARTS.match(text):
                continue
            words = _words(text)
            if words[0] == "...":
                words = (*before, *words[1:])
            before = words
            yield Shown(document, number, words, whole)


def _words(text: str) -> tuple[str, ...]:
    """The words up to a comment or an operator; of alternatives such as `lora|pipeline` the first."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # a lone apostrophe
        words = text.split()
    end = next((index for index, word in enumerate(words) if word in OPERATORS), len(words))
    return tuple(word.split("|")[0] for word in words[:end])


def problem(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why its tool does not take the command; None if it does."""
    try:
        _parse(shown.words, monkeypatch)
    except _ParsedError:
        return None
    except (ConfigError, ValueError) as error:
        return None if not shown.whole and INCOMPLETE.search(str(error)) else str(error)
    return None


def _parse(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words
    if program == "make":
        _check_make(rest)
    elif program == "rtdmd":
        _check_rtdmd(rest, monkeypatch)
    elif rest[0] == "-m" and rest[1] not in NOT_OURS:
        _run(rest[1], rest[2:], monkeypatch)
    elif rest[0] == "learner/main.py":
        _check_train("train", rest[1:])
    elif rest[0] != "-m":
        if not (PROJECT_ROOT / rest[0]).is_file():
            raise ValueError(f"{rest[0]} is no file")
        if rest[0].startswith("benchmarks/"):
            _run(rest[0].removesuffix(".py").replace("/", "."), rest[1:], monkeypatch)


def _check_make(words: Sequence[str]) -> None:
    text = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, _, value = word.partition("=")
        known = f"$({name})" in text if value else name in TARGET.findall(text)
        if not known:
            raise ValueError(f"make knows no {word}")


def _check_rtdmd(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not words or words[0] in ("--help", "completion"):
        return
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(f"rtdmd has no command {name}")
    if name == "import":
        from learner.tools import import_weights  # with torch, which the other checks do without

        import_weights.parse(rest, {})
    elif name in ("train", "forecast"):
        _check_train(name, rest)
    else:
        _watch(monkeypatch)
        _loaded(COMMANDS[name][0])(rest)


def _check_train(name: str, words: Sequence[str]) -> None:
    """With the default run file where the document's is only an example's."""
    if "--help" in words:
        return
    words = list(words)
    if "--config" in words and not (PROJECT_ROOT / words[place := words.index("--config") + 1]).is_file():
        words[place] = str(command_line.DEFAULT_RUN_FILE)
    if name == "train":
        command_line.parse(words, {})
    else:
        command_line.parse_forecast(words, {})


def _run(module: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"there is no module {module}")
    if module in WITHOUT_OPTIONS:
        if words:
            raise ValueError(f"{module} takes no options, not {words}")
        return
    _watch(monkeypatch)
    monkeypatch.setattr("sys.argv", [module, *words])
    with warnings.catch_warnings():
        # A module that is imported already is run anew.
        warnings.simplefilter("ignore", RuntimeWarning)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    raise ValueError(f"{module} ran: it has no parser that could be watched")


def _watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parser raises when it is done, with ValueError for what it refuses."""
    inside = False

    def watched(method: Any) -> Any:
        def parse(parser: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:  # a parser calls itself, and those of its subcommands
                return method(parser, *arguments, **options)
            inside = True
            try:
                method(parser, *arguments, **options)
            finally:
                inside = False
            raise _ParsedError

        return parse

    def refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ValueError(message)

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, watched(vars(argparse.ArgumentParser)[name]))
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
