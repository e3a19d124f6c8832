"""Publishes the student's weights from the learner to the workers, as references that calls carry.

    learner.publish          every version: the manifest, and the adapters that train
    learner.frozen_weights   once per stage: the adapters that do not

Each machine fetches a reference once, and its workers share the memory. So the frozen adapters cost a call nothing, and
a new worker finds all that it needs in its first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import ray

from learner.driver.durable_learner import DurableLearner

if TYPE_CHECKING:  # imports torch
    from common.weights import Payload, PublishedWeights


class Publication(NamedTuple):
    """References to one version of the student's weights: the last two arguments of a worker's call."""

    weights: ray.ObjectRef[PublishedWeights]
    frozen: ray.ObjectRef[Payload]


class Publisher:
    """Publishes versions of the weights; remembers the stage's frozen ones."""

    def __init__(self, learner: DurableLearner) -> None:
        self._learner = learner
        self.begin_stage()

    def begin_stage(self) -> None:
        """Fetch the frozen weights again, after the learner has begun a stage or restored a checkpoint."""
        self._frozen: ray.ObjectRef[Payload] = self._learner.frozen_weights()

    def publish(self, number: int, *, averaged: bool) -> Publication:
        """The weights as version `number`: the trained ones, or their moving average for evaluation."""
        return Publication(self._learner.publish(number, averaged=averaged), self._frozen)
