"""The learner's death has a name."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from common.errors import AttestationError, LearnerError
from learner.driver.calls import answer
from tests.helpers.remote_errors import raised_remotely

DEAD = RayActorError(error_msg="The actor died.\nThe process was killed: out of memory.")


def ray_that_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get(reference: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)


@pytest.mark.parametrize(("error", "who"), [(DEAD, "the learner"), (raised_remotely(DEAD), "a rank of the learner")])
def test_a_dead_learner_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, who: str) -> None:
    ray_that_raises(monkeypatch, error)
    with pytest.raises(LearnerError) as caught:
        answer("reference")
    assert str(caught.value) == f"{who} died: The process was killed: out of memory."


def test_what_the_learner_raises_is_not_its_death(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = AttestationError("other weights")
    ray_that_raises(monkeypatch, raised_remotely(cause))
    with pytest.raises(RayTaskError) as caught:
        answer("reference")
    assert caught.value.cause is cause
