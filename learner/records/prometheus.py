"""The driver's Prometheus metrics: one method for each thing that happens. Each sets its metrics at once.

Names, labels and meanings are in `common/metrics/driver.py`. Counters and histograms come from prometheus_client: the
sums of Ray's own histograms are bucket midpoints.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

from prometheus_client import CollectorRegistry

from common.config.run import Config
from common.errors import RtdmdError
from common.group_ends import GroupFault
from common.metrics import driver as catalogue
from common.metrics.keys import located
from common.metrics.metric_set import MetricSet
from common.metrics.spec import Kind
from common.rewards.breaker import BreakerState
from common.types import ProcessPlace, RewardHealth, RolloutOutcome, Stage
from learner.metric_names import DROPPED_GROUPS, RENORMALISED_GROUPS

STATES = ("ready", "unhealthy", "loading", "missing")
"""The states of a place for a worker."""
OUTCOMES = ("scored", "renormalised", "retried", "dropped")
ENDINGS = ("AttestationError", "LearnerError", "RewardOutage", "TrainingError", "WeightUpdateError", "WorkerError")
"""Errors that are shown as 0 before they happen."""
COUNTED = (DROPPED_GROUPS, RENORMALISED_GROUPS)
"""Keys that `group_finished` has counted when the iteration ends."""


class RunMetrics:
    """The metrics of a run. Every method may be called from any thread.

    Args:
        run: value of the label `run`: the name of the run.
        clock: seconds since 1970.
    """

    def __init__(self, registry: CollectorRegistry, run: str, clock: Callable[[], float] = time.time) -> None:
        self.registry = registry
        self._set = MetricSet(catalogue.DRIVER_METRICS, registry, run)
        self._clock = clock
        self._health: dict[ProcessPlace, Mapping[str, RewardHealth]] = {}
        self._held: Counter[str] = Counter()
        self._connections: Counter[tuple[str, str]] = Counter()
        self._worker_peak_bytes = 0
        self.paused(False)
        self._set.counter(catalogue.WORKER_RESTARTS)
        self._set.counter(catalogue.LEARNER_RESTARTS)
        self._set.counter(catalogue.IMAGES)
        for outcome in OUTCOMES:
            self._set.counter(catalogue.GROUPS, outcome)
        for error in ENDINGS:
            self._set.counter(catalogue.FAILURES, error)

    def configured(self, config: Config, run_dir: Path) -> None:
        """Set what does not change, and watch the driver's machine."""
        for stage, planned in (
            (Stage.COLD_START, config.cold_start.iterations),
            (Stage.ALIGNMENT, config.alignment.iterations),
        ):
            self._set.gauge(catalogue.ITERATIONS_PLANNED, stage).set(planned)
        self._set.gauge(catalogue.WORKERS_WANTED).set(config.workers.least)
        self._set.gauge(catalogue.MAX_STALENESS).set(config.alignment.max_staleness)
        self._set.gauge(catalogue.GPUS, "learner").set(config.learner.ranks * config.learner.num_gpus)
        self._set.gauge(catalogue.GPUS, "workers").set(config.workers.most * config.workers.num_gpus)
        for reward in config.rewards:
            self._set.gauge(catalogue.REWARD_WEIGHT, reward.name).set(reward.weight if reward.trained else 0.0)
            self._set.gauge(catalogue.REWARD_HELD, reward.name).set(0)
            if reward.url == "local":
                self._set.counter(catalogue.REWARD_SERVER_RESTARTS, reward.name)
        import psutil  # of the trainer's libraries, which the records do without

        self._set.gauge(catalogue.MEMORY).set(psutil.virtual_memory().total)
        self._set.gauge(catalogue.MEMORY_AVAILABLE).set_function(lambda: psutil.virtual_memory().available)
        self._set.gauge(catalogue.DISK).set(shutil.disk_usage(_existing(run_dir)).total)
        self._set.gauge(catalogue.DISK_FREE).set_function(lambda: shutil.disk_usage(_existing(run_dir)).free)

    def progressed(self) -> None:
        """Something has finished."""
        self._set.gauge(catalogue.PROGRESS_TIMESTAMP).set(self._clock())

    def paused(self, paused: bool) -> None:
        self._set.gauge(catalogue.PAUSED).set(paused)
        self.progressed()

    def failed(self, error: BaseException) -> None:
        """The run ends with this error."""
        name = type(error).__name__ if isinstance(error, RtdmdError) else "other"
        self._set.counter(catalogue.FAILURES, name).inc()

    # workers

    def workers(self, states: Mapping[str, int]) -> None:
        """The number of places for workers in each state, `STATES`; those that are not named are 0."""
        for state in STATES:
            self._set.gauge(catalogue.WORKERS, state).set(states.get(state, 0))

    def worker_replaced(self) -> None:
        self._set.counter(catalogue.WORKER_RESTARTS).inc()

    def worker_rests(self, place: ProcessPlace) -> None:
        """A worker has no call, or is gone: forget its view of the rewards, which it no longer renews."""
        if place in self._health:
            self._renew(place, {})
            del self._health[place]

    def worker_reported(self, place: ProcessPlace, rewards: Mapping[str, RewardHealth], peak_bytes: int) -> None:
        """A worker's view of its rewards, and its peak memory."""
        self._worker_peak_bytes = max(self._worker_peak_bytes, peak_bytes)
        self._set.gauge(catalogue.PEAK_MEMORY, "workers").set(self._worker_peak_bytes)
        self._renew(place, rewards)

    def _renew(self, place: ProcessPlace, rewards: Mapping[str, RewardHealth]) -> None:
        """Put a worker's view in the place of its last one. The sums change by the difference: workers may be many."""
        last = self._health.get(place, {})
        for sign, view in ((-1, last), (1, rewards)):
            for name, health in view.items():
                self._held[name] += sign * health.held
                for state, count in health.connections.items():
                    self._connections[name, state] += sign * count
        self._health[place] = rewards
        for name in {*last, *rewards}:
            self._set.gauge(catalogue.REWARD_HELD, name).set(self._held[name])
            for state in BreakerState:
                self._set.gauge(catalogue.REWARD_CONNECTIONS, name, state).set(self._connections[name, state])

    def server_restarted(self, reward: str) -> None:
        self._set.counter(catalogue.REWARD_SERVER_RESTARTS, reward).inc()

    # groups

    def group_finished(
        self,
        outcome: RolloutOutcome,
        group_size: int,
        iteration: int,
        *,
        retried: bool,
        fault: GroupFault | None = None,
    ) -> None:
        """A group was sampled for an iteration. `retried`: it is sampled once more; `fault`: the learner refused it."""
        self.progressed()
        for part, seconds in outcome.seconds.items():
            self._set.counter(catalogue.WORKER_SECONDS, part).inc(max(0.0, seconds))
        if "weights" in outcome.seconds:
            self._set.gauge(catalogue.APPLY_SECONDS).set(outcome.seconds["weights"])
        for name, seconds in outcome.reward_seconds.items():
            self._set.histogram(catalogue.REWARD_SECONDS, name).observe(seconds)
        failed = outcome.failure is not None or fault is not None
        self._set.counter(catalogue.GROUPS, _outcome(outcome, failed=failed, retried=retried)).inc()
        if fault is not None:
            self._set.counter(catalogue.REFUSED_GROUPS, fault).inc()
        if not failed:
            self._set.gauge(catalogue.STALENESS).set(iteration - outcome.version.number)
            self._set.gauge(catalogue.POLICY_VERSION).set(outcome.version.number)
            self._set.counter(catalogue.IMAGES).inc(group_size)
            for left_out in outcome.left_out:
                self._set.counter(catalogue.RENORMALISED_GROUPS, left_out.reward, left_out.cause).inc()
        elif not retried:
            cause = (
                ("infra", str(fault)) if outcome.failure is None else (outcome.failure.reward, outcome.failure.cause)
            )
            self._set.counter(catalogue.DROPPED_GROUPS, *cause).inc()

    def spreads(self, spreads: Mapping[str, list[float]]) -> None:
        """Each reward's standard deviations within the groups of an iteration."""
        for name, values in spreads.items():
            self._set.gauge(catalogue.REWARD_SPREAD, name).set(fmean(values))

    def idle_shares(self, shares: Mapping[str, float]) -> None:
        """Worker -> the part of an iteration in which its model was idle."""
        if shares:
            self._set.gauge(catalogue.WORKER_IDLE).set(fmean(shares.values()))

    # iterations

    def iteration_finished(
        self, stage: str, iteration: int, metrics: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """The content of a line of `metrics.jsonl`. What was counted when it happened is not counted again."""
        self.progressed()
        self._set.gauge(catalogue.ITERATION, stage).set(iteration + 1)
        self._set.gauge(catalogue.ITERATION_SECONDS, stage).set(seconds["step"])
        for name, value in metrics.items():
            if name.partition("/")[0] not in COUNTED:
                self._record(name, value)
        for part, value in seconds.items():
            if not part.startswith("worker_"):
                self._set.counter(catalogue.PART_SECONDS, part).inc(max(0.0, value))
        if "update_publish" in seconds:
            self._set.gauge(catalogue.PUBLISH_SECONDS).set(seconds["update_publish"])
        for network, norm in (("student", "student_gradient_norm"), ("fake_score", "fake_gradient_norm")):
            if norm in metrics:
                self._set.counter(catalogue.UPDATES, network).inc()

    def _record(self, key: str, value: float) -> None:
        spec, labels = located(key)
        if spec.kind is Kind.COUNTER:
            self._set.counter(spec, *labels).inc(value)
        else:
            self._set.gauge(spec, *labels).set(value)

    def learner_restarted(self) -> None:
        self._set.counter(catalogue.LEARNER_RESTARTS).inc()

    def learner_snapshot(self, seconds: float) -> None:
        """A snapshot of the learner has arrived, so many seconds after it was asked for."""
        self._set.gauge(catalogue.LEARNER_SNAPSHOT).set(seconds)

    def learner_memory(self, peak_bytes: int) -> None:
        """Peak memory of the learner's rank 0."""
        self._set.gauge(catalogue.PEAK_MEMORY, "learner").set(peak_bytes)

    def evaluated(self, policy: str, metrics: Mapping[str, float], seconds: float) -> None:
        self.progressed()
        self._set.counter(catalogue.PART_SECONDS, "evaluation").inc(seconds)
        for name, value in metrics.items():
            self._set.gauge(catalogue.EVALUATION, policy, name).set(value)

    def watchdog_alarm(self, detector: str) -> None:
        """The watchdog has found signs of reward hacking."""
        self._set.counter(catalogue.WATCHDOG_ALARMS, detector).inc()

    def checkpoint_written(self, folder: Path) -> None:
        self.progressed()
        self._set.gauge(catalogue.CHECKPOINT_TIMESTAMP).set(self._clock())
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self._set.gauge(catalogue.CHECKPOINT_BYTES).set(size)


def _outcome(outcome: RolloutOutcome, *, failed: bool, retried: bool) -> str:
    if failed:
        return "retried" if retried else "dropped"
    return "renormalised" if outcome.left_out else "scored"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())
