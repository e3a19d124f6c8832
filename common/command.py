"""Exit status and final line on standard error, the same for every command."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from common.console_stream import lasting_output
from common.errors import ConfigError, ModelError, PromptError, RtdmdError, RunStopped

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT): "free space there, or write elsewhere",
    (errno.EACCES, errno.EPERM): "give this user the permission, or name another path",
    (errno.EROFS,): "name a path on storage that can be written",
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG): "name another path",
    (errno.EMFILE, errno.ENFILE): "allow more open files (ulimit -n)",
    (errno.EAGAIN, errno.ENOMEM): "free memory or processes (ulimit -u)",
    (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK): "its file system cannot do this: name a path on another one",
    (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO): "check the storage, then start again",
}
"""Remedies for the errors of an operating system; any other one is explained by its traceback alone."""

TARGETS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of what is written: of the two paths of a copy they are about the second."""


def user_path(text: str) -> Path:
    """Argparse type of a path. Shells expand `--out ~/x`, but not `--out=~/x`."""
    if not text:  # a variable that is not set; `Path` would take the current directory
        raise argparse.ArgumentTypeError("it is empty: name a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such home: the file will be reported missing, by the name that was written
        return Path(text)


def duration(text: str) -> float:
    """Argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def some_time(text: str) -> float:
    """Argparse type: finite seconds above 0."""
    value = duration(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0 seconds")
    return value


def exit_status(
    command: Callable[[], None],
    interrupted: str = "interrupted",
    *,
    prefix: str = "error",
    failed: int = FAILED,
    place: Path | None = None,
) -> int:
    """Run a command. Return 0 if done, 1 if failed, 2 if refused at its start, 130 if interrupted or asked to stop.

    Neither an error of the operating system nor a lost standard output ends in a traceback.

    Args:
        interrupted: the message after Ctrl-C.
        prefix: the first word of an error's line.
        failed: the status of a failure, for commands that know only one.
        place: where the command writes; see `system_error`.
    """
    with lasting_output():
        try:
            _require_current_directory()
            _require_docstrings()
            command()
        except (ConfigError, ModelError, PromptError) as error:
            return _told(f"{prefix}: {error}", REFUSED)
        except RunStopped as stop:
            return _told(f"{stop}; continue with --resume", INTERRUPTED)
        except RtdmdError as error:
            return _told(f"{prefix}: {error}", failed)
        except OSError as error:
            return _told(f"{prefix}: {system_error(error, place)}{_traceback_file(error)}", failed)
        except KeyboardInterrupt:
            return _told(interrupted, INTERRUPTED)
        return DONE


def system_error(error: OSError, place: Path | None = None) -> str:
    """One line for an error of the operating system: the path, the reason and a remedy.

    Args:
        place: where the command writes; it is named if the error itself names no path.
    """
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    path = error.filename if error.filename is not None else place
    if error.errno in TARGETS and error.filename2 is not None:
        path = error.filename2
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    remedy = next((f"; {text}" for numbers, text in REMEDIES.items() if error.errno in numbers), "")
    return f"{f'{path}: ' if path is not None else ''}{reason}{remedy}"


def _require_current_directory() -> None:
    """Libraries end the process, without our words, if their own files cannot be found from here."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current directory does not exist any more: change to another one (cd)") from error


def _require_docstrings() -> None:
    """transformers makes documentation from docstrings when it is imported, and fails without them."""
    if sys.flags.optimize > 1:
        raise ConfigError(
            "Python runs without docstrings, which transformers needs: unset PYTHONOPTIMIZE, or set it to 1"
        )


def _traceback_file(error: OSError) -> str:
    """Where the traceback was written, as the end of a sentence; "" if no place can be written."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="rtdmd-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return ""
    return f"; see {name}"


def _told(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
