"""Log of a run: `logs/run.log` gets what the console is too narrow for, such as Ray's messages and a lost output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.console_stream import LOG, log_lost_streams
from common.errors import one_line

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
LOGGERS = (LOG.name, "ray")


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk ends the run where it is needed, at the next checkpoint, and not here."""


def announce(text: str) -> None:
    """Show a line on the console, above a live table, and write it into the run's log. From any thread."""
    LOG.warning(text)
    print(text, file=sys.stderr, flush=True)


@contextmanager
def run_log(path: Path) -> Iterator[None]:
    """Append our log and that of Ray's driver to a file, and keep both from the console, until the block ends.

    An error that ends the block is its last line: the console may be gone by then, with its terminal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    log_lost_streams()
    try:
        yield
    except BaseException as error:
        LOG.warning("the run ends: %s", one_line(error))
        raise
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        handler.close()
