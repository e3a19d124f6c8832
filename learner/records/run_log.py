"""Log of a run: `logs/run.log` gets our own lines, `logs/ray.log` those of Ray, the console what its level lets pass.

LOG.info     how the run goes on
LOG.warning  something was lost, and what is done about it: `announce`
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

from common.console_stream import LOG, log_lost_streams
from common.errors import one_line

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
OURS, WARNINGS, RAYS = (LOG.name, "common", "learner", "rollout_workers"), "py.warnings", "ray"
"""Loggers of our packages, of Python's warnings, and of Ray. A logger includes those below it."""


class LogLevel(StrEnum):
    """The least important lines that the console shows. `info` shows progress, `debug` also Ray's lines."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def number(self) -> int:
        """The level as Python's logging counts it."""
        return logging.getLevelNamesMapping()[self.name]


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk ends the run where it is needed, at the next checkpoint, and not here."""


class _ConsoleLines(logging.Handler):
    """One line per record, above a live table. Tracebacks are in the log only."""

    def emit(self, record: logging.LogRecord) -> None:
        word = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with suppress(ValueError):  # the stream was closed
            print(f"{word}{' '.join(record.getMessage().split())}", file=sys.stderr, flush=True)


def announce(text: str) -> None:
    """Show a warning on the console, above a live table, and write it into the run's log. From any thread."""
    LOG.warning(text)


@contextmanager
def run_log(folder: Path, level: LogLevel = LogLevel.INFO) -> Iterator[None]:
    """Append our log and Ray's to files in `folder`, and show lines of this level, until the block ends.

    An error that ends the block is the last line of `run.log`: the console may be gone by then, with its terminal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    console = _ConsoleLines(level.number)
    own, rays = _file(folder / "run.log"), _file(folder / "ray.log")
    handlers: dict[str, list[logging.Handler]] = {name: [own, console] for name in OURS}
    shown: list[logging.Handler] = [console] if level is LogLevel.DEBUG else []
    handlers |= {WARNINGS: [own, *shown], RAYS: [rays, *shown]}
    loggers = {logging.getLogger(name): chosen for name, chosen in handlers.items()}
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger, chosen in loggers.items():
        logger.handlers, logger.propagate = chosen, False
        logger.setLevel(min(logging.INFO, level.number))
    logging.captureWarnings(True)
    log_lost_streams()
    try:
        yield
    except BaseException as error:
        own.handle(LOG.makeRecord(LOG.name, logging.WARNING, "", 0, f"the run ends: {one_line(error)}", (), None))
        raise
    finally:
        logging.captureWarnings(False)
        for logger, found, number, propagate in before:
            logger.handlers, logger.propagate = found, propagate
            logger.setLevel(number)
        for file in (own, rays):
            file.close()


def _file(path: Path) -> logging.FileHandler:
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    return handler
