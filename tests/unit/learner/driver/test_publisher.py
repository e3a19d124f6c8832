"""Publications: frozen weights are fetched once per stage, and every publication refers to them."""

from __future__ import annotations

from typing import Any

from learner.driver.publisher import Publication, Publisher


class FakeMethod:
    """Stands for a remote method: returns a name for each call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.calls = 0

    def remote(self, *arguments: object, **options: object) -> str:
        self.calls += 1
        return f"{self._name} {self.calls} {arguments} {options}"


class FakeLearner:
    def __init__(self) -> None:
        self.publish, self.frozen_weights = FakeMethod("weights"), FakeMethod("frozen")


def test_frozen_weights_are_fetched_once_per_stage() -> None:
    learner: Any = FakeLearner()
    publisher = Publisher(learner)
    first, second = publisher.publish(0, averaged=False), publisher.publish(-1, averaged=True)
    assert first == Publication("weights 1 (0,) {'averaged': False}", "frozen 1 () {}")
    assert second == Publication("weights 2 (-1,) {'averaged': True}", "frozen 1 () {}")
    publisher.begin_stage()
    assert publisher.publish(1, averaged=False).frozen == "frozen 2 () {}"
    assert learner.frozen_weights.calls == 2
