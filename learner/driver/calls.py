"""Waiting for the learner: every wait has a deadline, and the learner's death has a name."""

from __future__ import annotations

import textwrap
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from common.errors import LearnerError

CALL_TIMEOUT_S = 1800.0
"""The run fails when the learner takes so long for one call, or no worker finishes anything for so long."""
REASON_LENGTH = 160


def answer(reference: ray.ObjectRef[Any]) -> Any:
    """What a call of the learner returned.

    Raises:
        LearnerError: it died, or did not answer within `CALL_TIMEOUT_S`.
        RayTaskError: what the call raised, as `cause`.
    """
    try:
        return ray.get(reference, timeout=CALL_TIMEOUT_S)
    except RayTaskError:
        # Comes first: Ray makes it an instance of its cause's class as well.
        raise
    except GetTimeoutError as error:
        raise LearnerError(f"the learner did not finish a call in {CALL_TIMEOUT_S:.0f} s; see its log") from error
    except RayActorError as error:
        raise death(error) from error


def death(error: BaseException) -> LearnerError:
    """The error for a learner that is gone, in one line."""
    # Ray lists every possible cause of a death, on one line.
    reason = textwrap.shorten(last_line(error), REASON_LENGTH, placeholder=" ...")
    return LearnerError(f"the learner died: {reason}; continue with --resume")


def last_line(error: BaseException) -> str:
    """The last line of a remote traceback: the error itself."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
