"""Keeps the models of a server running in a process of their own.

ready ──► a call ──► ready
           │ the process ends, or the call takes longer than `call_s`: it is killed
           ▼
         lost: each call fails at once with ModelUnavailable
           │ loaded again, the same identity, a picture scored
           ├──────────────► ready
           │ in vain three times in a row, or another identity
           ▼
         `failed`: the server ends
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import ModelError, RewardError, RewardInvalid, RewardRejected, WireError, one_line
from common.rewards.api import FloatArray, ScoreRequest
from common.wire import AnyArray
from reward_servers.loading import ScorerSettings
from reward_servers.model_process.process import ModelProcess, Replied
from reward_servers.scorers.base import ModelUnavailable

ATTEMPTS = 3
"""The server ends when its models could not be loaded again so many times in a row."""
PAUSE_SECONDS = 1.0
"""Pause before each further attempt to load the models again."""
LOADS, SHORTEST_LOAD_SECONDS = 10, 60.0
"""Loading again may take this many times as long as the first time, and at least this long."""

AGAIN = ": the model is loading again"

logger = logging.getLogger(__name__)


class IdentityChanged(ModelError):
    """The models that were loaded again are not those that the server declared."""


@dataclass(frozen=True)
class Declared:
    """A scorer as its process declares it (`child.declared`), and its request of the start-up check."""

    values: dict[str, Any]
    check: ScoreRequest


class Supervisor:
    """One process with the models of some scorers. `ask` belongs to one thread, all else to the thread that made it.

    Attributes:
        names: the scorers' served names, once they are known.
        problem: why no call can be answered at present, or None.
        call_s: seconds that a call may take.
    """

    def __init__(self, settings: Sequence[ScorerSettings], device: str, call_s: float) -> None:
        self.problem: str | None = None
        self.call_s = call_s
        self._settings = tuple(settings)
        self._device = device
        self.names: list[str] = []
        self._declared: dict[str, Declared] = {}
        self._load_began = 0.0
        self._load_limit_s = SHORTEST_LOAD_SECONDS
        self._calling = self._watched = False
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        """Held to replace the process, and to change `problem`."""
        self._process = ModelProcess()

    @property
    def pid(self) -> int:
        """The id of the present process."""
        return self._process.pid

    def find(self) -> list[str]:
        """The scorers' names, once their classes are imported; ConfigError if they cannot be."""
        try:
            return _find(self._process, self._settings)
        except EOFError as error:
            raise self._ended_early() from error

    def begin_load(self, names: Sequence[str]) -> None:
        """Load the models under these names. `finish_load` waits for it, so several processes load at once."""
        self.names, self._load_began = list(names), time.monotonic()
        try:
            self._process.send(self._load_call())
        except EOFError as error:
            raise self._ended_early() from error

    def finish_load(self) -> dict[str, Declared]:
        """The scorers by their names; ModelError or ConfigError if they cannot be loaded."""
        try:
            self._declared = self._declarations(self._process.reply())
        except EOFError as error:
            raise self._ended_early() from error
        self._load_limit_s = max(SHORTEST_LOAD_SECONDS, LOADS * (time.monotonic() - self._load_began))
        return self._declared

    def watch(self, restarted: Callable[[], None], failed: Callable[[ModelError], None]) -> None:
        """Begin to start the process again when it is lost. A thread calls `restarted` each time, or `failed` once."""
        self._watched = True
        threading.Thread(target=self._watch, args=(restarted, failed), name="supervisor", daemon=True).start()

    def ask(
        self, name: str, call: str, images: AnyArray, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> list[FloatArray]:
        """The arrays that a scorer's call returns. Raises what the call raised, or ModelUnavailable."""
        if (problem := self.problem) is not None:
            raise ModelUnavailable(name, "model", problem)
        process, self._calling = self._process, True
        try:
            return _call(process, name, call, images, prompts, metadata, self.call_s)
        except TimeoutError:
            why = f"took longer than {self.call_s:g} s for a call (--call-s)"
        except EOFError:
            why = process.ending()
        except RewardError:
            raise
        except Exception as error:  # what follows on the channel cannot be read either
            why = f"sent a reply that cannot be read ({one_line(error)})"
        finally:
            self._calling = False
        raise ModelUnavailable(name, "model", self._lose(process, why))

    def begin_stop(self) -> None:
        """Let the process end; kill it if a call is under way."""
        with self._lock:
            self._stopping.set()
            process = self._process
        process.close()
        if self._calling:
            process.kill()

    def finish_stop(self, until: float) -> None:
        """Return when the process is gone. It is killed at `until`, a time of the monotonic clock."""
        self._process.end(max(0.0, until - time.monotonic()))

    def _watch(self, restarted: Callable[[], None], failed: Callable[[ModelError], None]) -> None:
        while True:
            process = self._process
            process.wait()
            if self._stopping.is_set():
                return
            began = time.monotonic()
            self._lose(process, process.ending())
            try:
                self._start_again()
            except ModelError as error:
                failed(error)
                return
            if self._stopping.is_set():
                return
            with self._lock:
                self.problem = None
            restarted()
            logger.warning("%s: ready again after %.1f s", self._what, time.monotonic() - began)

    def _lose(self, process: ModelProcess, why: str) -> str:
        """End a process that is lost; return the present problem. The first reason counts."""
        with self._lock:
            if self.problem is None and process is self._process and not self._stopping.is_set():
                self.problem = f"{self._what} {why}{AGAIN if self._watched else ''}"
                logger.warning("%s", self.problem)
            problem = self.problem or f"{self._what} {why}"
        process.end()
        return problem

    def _start_again(self) -> None:
        """Start a process with the same models; ModelError when that is not possible."""
        reason = ""
        for attempt in range(ATTEMPTS):
            if attempt and self._stopping.wait(PAUSE_SECONDS):
                return
            try:
                with self._lock:
                    if self._stopping.is_set():
                        return
                    self._process = ModelProcess()
                self._load_again(self._process)
                return
            except IdentityChanged:
                self._process.end()
                raise
            except EOFError:
                reason = f"its process {self._process.ending()}"
            except TimeoutError:
                reason = f"it took longer than {self._load_limit_s:.0f} s"
            except Exception as error:  # also of the operating system, which may not be able to start a process now
                reason = one_line(error)
            self._process.end()
            if self._stopping.is_set():
                return
            logger.warning("%s could not be loaded again: %s", self._what, reason)
        raise ModelError(
            f"{self._what} could not be loaded again, {ATTEMPTS} times in a row; the last reason: {reason}"
        )

    def _load_again(self, process: ModelProcess) -> None:
        until = time.monotonic() + self._load_limit_s
        _find(process, self._settings, until)
        declared = self._declarations(process.ask(self._load_call(), until=until))
        for name, now in declared.items():
            before = self._declared[name].values
            if now.values != before:
                changed = ", ".join(key for key in before if before[key] != now.values[key])
                raise IdentityChanged(
                    f"{self._what}: {name} is another one after it was loaded again ({changed}): start the server anew"
                )
            check = now.check
            (scores_B,) = _call(process, name, "score", check.images_BHWC, check.prompts, check.metadata, self.call_s)
            if not np.isfinite(scores_B).all():
                raise RewardInvalid(name, "nan", f"{name} scored its test image {scores_B.tolist()}")

    def _load_call(self) -> dict[str, Any]:
        return {"call": "load", "names": self.names, "device": self._device}

    def _declarations(self, replied: Replied) -> dict[str, Declared]:
        message, pictures = replied
        return {
            name: Declared(values, ScoreRequest(picture, *values.pop("check")))
            for name, values, picture in zip(self.names, message["scorers"], pictures, strict=True)
        }

    @property
    def _what(self) -> str:
        return f"the model process of {', '.join(self.names or [one.scorer for one in self._settings])}"

    def _ended_early(self) -> ModelError:
        return ModelError(f"{self._what} {self._process.ending()} while it loaded")


def _find(process: ModelProcess, settings: Sequence[ScorerSettings], until: float = math.inf) -> list[str]:
    of = [
        [one.scorer, None if one.model is None else str(one.model), one.name, one.precision and str(one.precision)]
        for one in settings
    ]
    message, _ = process.ask({"call": "find", "of": of}, until=until)
    names: list[str] = message["names"]
    return names


def _call(
    process: ModelProcess,
    name: str,
    call: str,
    images: AnyArray,
    prompts: Sequence[str],
    metadata: Sequence[Any],
    limit_s: float,
) -> list[FloatArray]:
    message = {"call": call, "scorer": name, "prompts": list(prompts), "metadata": list(metadata)}
    try:
        return process.ask(message, [images], time.monotonic() + limit_s)[1]
    except WireError as error:
        raise RewardRejected(name, "request", f"the metadata cannot reach the model: {error}") from error
