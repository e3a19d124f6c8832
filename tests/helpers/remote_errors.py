"""Errors of Ray's remote calls, without a call."""

from __future__ import annotations

from ray.exceptions import RayTaskError


def raised_remotely(cause: Exception) -> Exception:
    """The exception that `ray.get` raises for a failed task: an instance of its cause's class too."""
    error: Exception = RayTaskError("call", f"Traceback\n{cause}", cause, "title", 1, "ip").as_instanceof_cause()
    return error
