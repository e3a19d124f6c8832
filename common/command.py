"""Exit status and final line on standard error, the same for every command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import ConfigError, ModelError, PromptError, RtdmdError, RunStopped

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def user_path(text: str) -> Path:
    """Argparse type of a path. Shells expand `--out ~/x`, but not `--out=~/x`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such home: the file will be reported missing, by the name that was written
        return Path(text)


def exit_status(command: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Run a command. Return 0 if done, 1 if failed, 2 if refused at its start, 130 if interrupted or asked to stop.

    Args:
        interrupted: the message after Ctrl-C.
    """
    try:
        command()
    except (ConfigError, ModelError, PromptError) as error:
        return _told(f"error: {error}", REFUSED)
    except RunStopped as stop:
        return _told(f"{stop}; continue with --resume", INTERRUPTED)
    except RtdmdError as error:
        return _told(f"error: {error}", FAILED)
    except KeyboardInterrupt:
        return _told(interrupted, INTERRUPTED)
    return DONE


def _told(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
