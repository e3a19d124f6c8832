"""The learner's death has a name."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from common.errors import AttestationError, LearnerError, RewardUnavailable
from learner.driver import calls as learner_calls
from learner.driver.calls import answer

DEAD = RayActorError(error_msg="The actor died.\nThe process was killed: out of memory.")


def raised_remotely(cause: Exception) -> Exception:
    """The exception that `ray.get` raises for a failed task: an instance of its cause's class too."""
    error: Exception = RayTaskError("call", f"Traceback\n{cause}", cause, "title", 1, "ip").as_instanceof_cause()
    return error


def ray_that_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get(reference: Any, timeout: float | None = None) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda references, num_returns, timeout: (references[:1], references[1:]))


def test_an_answer_is_waited_for_with_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda reference, timeout: (reference, timeout))
    reference, seconds = answer("reference")
    assert reference == "reference"
    assert seconds == pytest.approx(learner_calls.CALL_TIMEOUT_S, abs=60)


def test_the_rest_of_the_run_is_watched_while_the_learner_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def watch() -> None:
        raise RewardUnavailable("bright", "died", "the local server bright ended")

    monkeypatch.setattr(ray, "wait", lambda references, timeout: ([], references))
    with pytest.raises(RewardUnavailable, match="bright ended"):
        answer("reference", watch)


def test_a_dead_learner_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_that_raises(monkeypatch, DEAD)
    with pytest.raises(LearnerError) as caught:
        answer("reference")
    assert str(caught.value) == ("the learner died: The process was killed: out of memory.; continue with --resume")


def test_a_silent_learner_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_that_raises(monkeypatch, GetTimeoutError("late"))
    with pytest.raises(LearnerError, match="did not finish a call in 1800 s"):
        answer("reference")


@pytest.mark.parametrize("cause", [AttestationError("other weights"), DEAD])
def test_what_the_learner_raises_is_not_its_death(monkeypatch: pytest.MonkeyPatch, cause: Exception) -> None:
    ray_that_raises(monkeypatch, raised_remotely(cause))
    with pytest.raises(RayTaskError) as caught:
        answer("reference")
    assert caught.value.cause is cause
