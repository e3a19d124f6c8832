"""The scorers of a server: each in a model process, or in the server's own process.

on CPUs                        each scorer has a model process
on a GPU                       all scorers share one
--in-process                   none
clients of other processes     always in the server's own process
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from reward_servers.batcher import Device
from reward_servers.loading import class_path, is_cpu, load, require_directory, scorer_class
from reward_servers.model_process.remote_scorer import RemoteScorer
from reward_servers.model_process.supervisor import Supervisor
from reward_servers.options import ServerSettings, check_names
from reward_servers.scorers import CLIENTS_OF_MODELS
from reward_servers.scorers.base import Scorer

STOP_SECONDS, STOP_SHARE = 1.0, 0.2
"""Model processes have this long to end by themselves, at most this share of what a stop signal leaves the server."""

Places = list[int]
"""Scorers by their places on the command line."""


@dataclass(frozen=True)
class Model:
    """A loaded scorer.

    Attributes:
        device: shared with the scorers whose models run in the same process.
        supervisor: of its model process; None if it runs in the server's own process.
    """

    scorer: Scorer
    device: Device
    supervisor: Supervisor | None = None


@contextmanager
def loaded_models(settings: ServerSettings) -> Iterator[dict[str, Model]]:
    """Context in which the models are loaded, by served name. Their processes end with it.

    Everything that can be checked before loading is checked first, and all processes load at once.

    Raises:
        ConfigError, ModelError: a scorer that cannot be found, named or loaded.
    """
    for one in settings.scorers:
        class_path(one.scorer)
        require_directory(one.model)
    here, groups = _plan(settings)
    supervisors: list[Supervisor] = []
    try:
        for group in groups:
            supervisors.append(
                Supervisor([settings.scorers[place] for place in group], settings.device, settings.call_s)
            )
        yield _load(settings, here, list(zip(groups, supervisors, strict=True)))
    finally:
        stop(supervisors)


def stop(supervisors: Iterable[Supervisor]) -> None:
    """End the model processes: those that are idle by themselves, those in a call at once."""
    stopping = list(supervisors)
    for supervisor in stopping:
        supervisor.begin_stop()
    left_s, _ = signal.getitimer(signal.ITIMER_REAL)  # see `front.listener`; 0 without a stop signal
    until = time.monotonic() + (min(STOP_SECONDS, STOP_SHARE * left_s) if left_s else STOP_SECONDS)
    for supervisor in stopping:
        supervisor.finish_stop(until)


def supervisors_of(models: Iterable[Model]) -> list[Supervisor]:
    """Each supervisor once."""
    return list(dict.fromkeys(model.supervisor for model in models if model.supervisor is not None))


def _plan(settings: ServerSettings) -> tuple[Places, list[Places]]:
    """Scorers in this process, and groups of scorers with a process each."""
    places = range(len(settings.scorers))
    here = [
        place
        for place in places
        if settings.in_process or class_path(settings.scorers[place].scorer) in CLIENTS_OF_MODELS
    ]
    elsewhere = [place for place in places if place not in here]
    if is_cpu(settings.device):
        return here, [[place] for place in elsewhere]
    return here, [elsewhere] if elsewhere else []


def _load(settings: ServerSettings, here: Places, groups: Sequence[tuple[Places, Supervisor]]) -> dict[str, Model]:
    kinds = {place: scorer_class(settings.scorers[place].scorer) for place in here}
    named = {place: settings.scorers[place].name or kind.name for place, kind in kinds.items()}
    for group, supervisor in groups:
        named |= zip(group, supervisor.find(), strict=True)
    names = [named[place] for place in sorted(named)]
    check_names(names)
    for group, supervisor in groups:
        supervisor.begin_load([named[place] for place in group])
    device = Device()
    models = {
        named[place]: Model(load(kinds[place], settings.scorers[place], settings.device), device) for place in here
    }
    for _, supervisor in groups:
        device = Device(stuck=f"its process is ended after {supervisor.call_s:g} s")
        for name, declared in supervisor.finish_load().items():
            models[name] = Model(RemoteScorer(supervisor, name, declared), device, supervisor)
    return {name: models[name] for name in names}
