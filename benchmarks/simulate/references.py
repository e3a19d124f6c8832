"""The call protocol of actors: methods that return references, whose futures the simulation completes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.exceptions import RayActorError


class Reference:
    """A reference to a result that comes with time."""

    def __init__(self) -> None:
        self._answer: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self._answer

    def give(self, value: Any) -> None:
        """The result is there, unless the call has failed before."""
        if not self._answer.done():
            self._answer.set_result(value)

    def fail(self, reason: str) -> None:
        """The actor is gone."""
        if not self._answer.done():
            self._answer.set_exception(RayActorError(error_msg=f"The actor died.\n{reason}"))


class Method:
    """A method of a simulated actor."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, **_: object) -> Method:
        return self

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self._call(*arguments, **named)
