"""Publications: frozen weights are fetched once per stage, and every publication refers to them."""

from __future__ import annotations

from typing import Any

from learner.driver.publisher import Publisher


class FakeLearner:
    """Returns a name for each publication."""

    def __init__(self) -> None:
        self.frozen = 0

    def publish(self, number: int, *, averaged: bool) -> str:
        return f"weights {number} {averaged}"

    def frozen_weights(self) -> str:
        self.frozen += 1
        return f"frozen {self.frozen}"


def test_frozen_weights_are_fetched_once_per_stage() -> None:
    learner: Any = FakeLearner()
    publisher = Publisher(learner)
    first, second = publisher.publish(0, averaged=False), publisher.publish(-1, averaged=True)
    assert first == ("weights 0 False", "frozen 1")
    assert second == ("weights -1 True", "frozen 1")
    publisher.begin_stage()
    assert publisher.publish(1, averaged=False).frozen == "frozen 2"
    assert learner.frozen == 2
