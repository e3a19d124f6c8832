"""Gradients of rewards that are served elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Barrier, Event

import numpy as np
import pytest
import torch

from common.errors import RewardError, RewardOutage, RewardUnavailable
from common.rewards.api import FloatArray, Metadata
from common.rewards.client import RewardClient
from common.rewards.control_request import ControlRequest
from common.rewards.guard import Outage, RewardGuard
from common.types import OutagePolicy, Prompt
from learner.training.reward_gradients import DifferentiableRewards, ServedRewards

PROMPTS = [Prompt(0, "a dot", {"count": 1}), Prompt(1, "two")]


def refused(name: str) -> RewardError:
    return RewardUnavailable(name, "refused", f"no {name}")


def raised(name: str) -> RewardError:
    error = RewardUnavailable(name, "scorer", f"{name} raised")
    error.url = "http://server"
    return error


class Client(RewardClient):
    """Scores factor * sum of an image, once every reward has been asked."""

    def __init__(self, factors: dict[str, float], failure: Callable[[str], RewardError] = refused) -> None:
        self._factors = factors
        self._failure = failure
        self._all_asked = Barrier(len(factors))

    def gradient(
        self,
        name: str,
        images_BCHW: FloatArray,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        *,
        again: bool = False,
    ) -> tuple[FloatArray, FloatArray]:
        assert list(prompts) == ["a dot", "two"]
        assert metadata == [{"count": 1}, {}]
        self._all_asked.wait(timeout=30)
        if self._factors[name] < 0:
            raise self._failure(name)
        factor = np.float32(self._factors[name])
        return factor * images_BCHW.sum(axis=(1, 2, 3)), np.full_like(images_BCHW, factor)

    def send_control(
        self, name: str, control: ControlRequest, *, url: str | None = None, gradient: bool = False
    ) -> None:
        assert (url, gradient) == ("http://server", True)


def served_by(
    factors: dict[str, float], policy: OutagePolicy = OutagePolicy.PAUSE, pause: float = 5.0
) -> ServedRewards:
    guard = RewardGuard(Client(factors), dict.fromkeys(factors, Outage(policy, pause)))
    return ServedRewards(guard, list(factors))


def test_all_rewards_are_asked_at_once_with_metadata_and_carry_their_graph() -> None:
    images = torch.full((2, 3, 2, 2), 0.5, requires_grad=True)
    served = served_by({"hps": 2.0, "bright": 0.5})
    rewards = served.request(images, PROMPTS).collect().scores
    assert list(rewards) == ["hps", "bright"]
    assert rewards["hps"].tolist() == [12.0, 12.0]
    assert rewards["bright"].tolist() == [3.0, 3.0]
    (rewards["hps"].sum() + 2 * rewards["bright"][0]).backward()
    assert images.grad is not None
    assert images.grad[:, 0, 0, 0].tolist() == [3.0, 2.0]


def test_a_request_returns_before_the_servers_answer() -> None:
    answer_now = Event()

    class Slow(Client):
        def gradient(self, *arguments: object, **options: object) -> tuple[FloatArray, FloatArray]:
            assert answer_now.wait(timeout=30)
            return super().gradient(*arguments, **options)

    guard = RewardGuard(Slow({"hps": 2.0}), {"hps": Outage(OutagePolicy.PAUSE, 5.0)})
    images = torch.full((2, 3, 2, 2), 0.5, requires_grad=True)
    requested = ServedRewards(guard, ["hps"]).request(images, PROMPTS)
    assert not requested.answered()
    answer_now.set()
    assert requested.collect().scores["hps"].tolist() == [12.0, 12.0]
    assert requested.answered()


def test_a_reward_that_fails_is_raised_where_it_is_collected() -> None:
    requested = served_by({"hps": 2.0, "bright": -1.0}, pause=0.0).request(torch.zeros(2, 3, 2, 2), PROMPTS)
    with pytest.raises(RewardOutage, match="no bright"):
        requested.collect()


def test_a_reward_that_is_out_is_left_out_and_counted() -> None:
    """Renormalised: the other stays. Dropped: the samples get no reward gradient at all."""
    images = torch.full((2, 3, 2, 2), 0.5)
    served = served_by({"hps": 2.0, "bright": -1.0}, OutagePolicy.RENORMALISE)
    found = served.request(images, PROMPTS).collect()
    assert {name: values.tolist() for name, values in found.scores.items()} == {"hps": [12.0, 12.0]}
    assert found.left_out == {"bright:refused": 2}
    dropping = served_by({"hps": 2.0, "bright": -1.0}, OutagePolicy.DROP_GROUP).request(images, PROMPTS).collect()
    assert dropping == DifferentiableRewards({}, {"bright:refused": 2})


def test_samples_that_a_reward_fails_at_alone_do_not_end_a_run_that_would_wait_for_it() -> None:
    client = Client({"hps": 2.0, "bright": -1.0}, raised)
    outages = dict.fromkeys(("hps", "bright"), Outage(OutagePolicy.PAUSE, 5.0))
    guard = RewardGuard(client, outages, {"bright": ControlRequest("a dot", {})})
    served = ServedRewards(guard, ["hps", "bright"])
    found = served.request(torch.zeros(2, 3, 2, 2), PROMPTS).collect()
    assert found == DifferentiableRewards({}, {"bright:scorer": 2})


def test_with_every_reward_out_nothing_is_left() -> None:
    served = served_by({"hps": -2.0, "bright": -1.0}, OutagePolicy.RENORMALISE)
    found = served.request(torch.zeros(2, 3, 2, 2), PROMPTS).collect()
    assert found == DifferentiableRewards({}, {"hps:refused": 2, "bright:refused": 2})
