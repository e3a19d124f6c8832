"""Waits for the learner: every wait has a deadline, and the learner's death raises a named error."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from common.command import system_error
from common.errors import LearnerError, one_line

CALL_TIMEOUT_S = 1800.0
"""The run fails when one call of the learner takes longer, or when no worker starts or finishes in this time."""
WATCH_S = 1.0
"""Seconds between two looks at the rest of the run while the learner works."""
REASON_LENGTH = 160


def answer(reference: ray.ObjectRef[Any], watch: Callable[[], None] | None = None) -> Any:
    """The result of a call of the learner; meanwhile `watch` is called at intervals, and may raise.

    Raises:
        LearnerError: the learner died, or did not answer within `CALL_TIMEOUT_S`.
        RayTaskError: the call raised; the exception is its `cause`.
    """
    until = time.monotonic() + CALL_TIMEOUT_S
    try:
        while watch is not None and time.monotonic() < until and not ray.wait([reference], timeout=WATCH_S)[0]:
            watch()
        return ray.get(reference, timeout=max(0.0, until - time.monotonic()))
    except RayTaskError:
        # Must come first: Ray makes it an instance of its cause's class as well.
        raise
    except GetTimeoutError as error:
        raise LearnerError(f"the learner did not finish a call in {CALL_TIMEOUT_S:.0f} s; see its log") from error
    except RayActorError as error:
        raise death(error) from error


def death(error: BaseException) -> LearnerError:
    """The error for a dead learner, in one line."""
    # Ray's message lists every possible cause of a death, on one line.
    reason = textwrap.shorten(_last_line(error), REASON_LENGTH, placeholder=" ...")
    return LearnerError(f"the learner died: {reason}; continue with --resume")


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
