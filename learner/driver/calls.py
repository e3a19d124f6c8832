"""Answers of the learner, whose death raises a named error, and the reasons of remote errors in one line."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from common.command import system_error
from common.errors import LearnerError, one_line

CALL_TIMEOUT_S = 1800.0
"""The run fails when the learner, or a worker, is not loaded in this time, or when no worker finishes anything."""
WATCH_S = 1.0
"""Seconds between two looks at the rest of the run while the learner loads."""
REASON_LENGTH = 160


def answer(reference: ray.ObjectRef[Any]) -> Any:
    """The result of a call of the learner that is ready.

    Raises:
        LearnerError: the learner died, or one of its ranks.
        RayTaskError: the call raised; the exception is its `cause`.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # Must come first: Ray makes it an instance of its cause's class as well.
        if isinstance(error.cause, RayActorError):
            raise _death("a rank of the learner", error.cause) from error
        raise
    except RayActorError as error:
        raise _death("the learner", error) from error


def _death(who: str, error: RayActorError) -> LearnerError:
    # Ray's message lists every possible cause of a death, on one line.
    reason = textwrap.shorten(_last_line(error), REASON_LENGTH, placeholder=" ...")
    return LearnerError(f"{who} died: {reason}")


def remote_reason(error: BaseException, place: Path | None = None) -> str:
    """The reason of Ray's error in one line: what was raised remotely, if that is known.

    Args:
        place: see `common.command.system_error`.
    """
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, OSError):
        return system_error(cause, place)
    if isinstance(cause, Exception) and str(cause).strip():
        return f"{type(cause).__name__}: {one_line(cause)}"
    return _last_line(error)


def _last_line(error: BaseException) -> str:
    """The last line of a remote traceback: the error itself."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
