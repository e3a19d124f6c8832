"""Catalogue of the metrics that the driver of a run serves. Workers and learner report theirs to it."""

from __future__ import annotations

from common.metrics.spec import Key, Kind, MetricSpec, Process

REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CAUSED = ("reward", "cause")


def _gauge(name: str, unit: str, meaning: str, labels: tuple[str, ...] = (), keys: tuple[Key, ...] = ()) -> MetricSpec:
    return MetricSpec(f"rtdmd_{name}", Kind.GAUGE, Process.DRIVER, unit, labels, meaning, keys)


def _counter(
    name: str,
    unit: str,
    meaning: str,
    labels: tuple[str, ...] = (),
    keys: tuple[Key, ...] = (),
    *,
    needs_fault: bool = False,
) -> MetricSpec:
    return MetricSpec(
        f"rtdmd_{name}_total", Kind.COUNTER, Process.DRIVER, unit, labels, meaning, keys, needs_fault=needs_fault
    )


def _from(key: str, name: str, unit: str, meaning: str) -> MetricSpec:
    """A gauge without labels of one key of `metrics.jsonl`."""
    return _gauge(name, unit, meaning, (), (Key(key),))


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────
ITERATION = _gauge("iteration", "iterations", "Finished iterations of a stage.", ("stage",))
ITERATIONS_PLANNED = _gauge("iterations_planned", "iterations", "Iterations that a stage will have.", ("stage",))
ITERATION_SECONDS = _gauge(
    "iteration_seconds", "seconds", "Time of a stage's newest iteration.", ("stage",), (Key("seconds/step"),)
)
PROGRESS_TIMESTAMP = _gauge(
    "progress_timestamp_seconds",
    "seconds",
    "When anything last finished (a group, an evaluation call, an iteration, a checkpoint), in seconds since 1970.",
)
PAUSED = _gauge("paused", "1", "1 while the run is paused on request, else 0.")
PART_SECONDS = _counter(
    "part_seconds",
    "seconds",
    "Time spent, by part of an iteration: waits of the driver, parts of the learner's update, evaluations.",
    ("part",),
    (Key("seconds/*"),),
)
IMAGES = _counter("images", "images", "Images sampled for training, in groups that were scored.")
UPDATES = _counter("updates", "updates", "Optimizer steps, by network.", ("network",))
CHECKPOINT_TIMESTAMP = _gauge(
    "checkpoint_timestamp_seconds", "seconds", "When this session wrote its newest checkpoint, in seconds since 1970."
)
CHECKPOINT_BYTES = _gauge("checkpoint_bytes", "bytes", "Size of the newest checkpoint.")
FAILURES = _counter("failures", "failures", "Errors that ended the run, by their class.", ("error",))

# ── workers and machines ─────────────────────────────────────────────────────────────────────────────────────────────
WORKERS = _gauge(
    "workers",
    "workers",
    "Places for workers by state: ready; unhealthy (late with an answer or a step); loading; missing (no worker).",
    ("state",),
)
WORKERS_WANTED = _gauge("workers_wanted", "workers", "Workers that the run starts with.")
WORKER_RESTARTS = _counter("worker_restarts", "restarts", "Workers started in the place of one that is gone.")
LEARNER_RESTARTS = _counter("learner_restarts", "restarts", "Times that the learner was gone and was started again.")
LEARNER_SNAPSHOT = _gauge(
    "learner_snapshot_seconds",
    "seconds",
    "Time from the request for the learner's newest snapshot to its arrival on the driver's machine.",
)
WORKER_SECONDS = _counter(
    "worker_seconds",
    "seconds",
    "Time of the workers, by part of a rollout: weights, rollout, decode, statistics, score, held; idle: the model's.",
    ("part",),
    (Key("seconds/worker_*"),),
)
WORKER_IDLE = _gauge(
    "worker_idle_ratio",
    "1",
    "Part of the newest iteration in which a worker's model was idle, mean over the workers.",
)
PEAK_MEMORY = _gauge(
    "peak_memory_bytes",
    "bytes",
    "Peak memory of the learner, and the largest of the workers: of the GPU, or of the process if it has none.",
    ("process",),
)
GPUS = _gauge("gpus", "GPUs", "GPUs that learner and workers reserve.", ("process",))
MEMORY = _gauge("memory_bytes", "bytes", "Memory of the driver's machine.")
MEMORY_AVAILABLE = _gauge("memory_available_bytes", "bytes", "Available memory of the driver's machine.")
DISK = _gauge("disk_bytes", "bytes", "Size of the file system with the run directory.")
DISK_FREE = _gauge("disk_free_bytes", "bytes", "Free space of the file system with the run directory.")

# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────
REWARD = _gauge("reward", "1", "Mean reward of the newest iteration.", ("reward",), (Key("reward/*"),))
REWARD_SPREAD = _gauge(
    "reward_spread", "1", "Standard deviation within a group, mean over the newest iteration's groups.", ("reward",)
)
ZERO_SPREAD = _gauge(
    "reward_zero_spread_ratio",
    "1",
    "Fraction of the newest iteration's groups in which all samples have the same reward.",
    ("reward",),
    (Key("zero_spread/*"),),
)
REWARD_WEIGHT = _gauge("reward_weight", "1", "Weight in training; 0 for a reward that only evaluates.", ("reward",))
REWARD_SECONDS = MetricSpec(
    "rtdmd_reward_seconds",
    Kind.HISTOGRAM,
    Process.DRIVER,
    "seconds",
    ("reward",),
    "Time from a worker's request for a group's scores to the scores, retries and held time included.",
    buckets=REQUEST_BUCKETS,
)
REWARD_CONNECTIONS = _gauge(
    "reward_connections",
    "connections",
    "Pairs of a worker and a server, by the state of the worker's circuit breaker: closed (healthy), half_open, open.",
    ("reward", "state"),
)
REWARD_HELD = _gauge(
    "reward_held_workers", "workers", "Workers that hold a request until the reward is back.", ("reward",)
)
REWARD_SERVER_RESTARTS = _counter(
    "reward_server_restarts", "restarts", "Local reward servers that died and were started again.", ("reward",)
)

# ── groups and weights ───────────────────────────────────────────────────────────────────────────────────────────────
GROUPS = _counter(
    "groups",
    "groups",
    "Groups by outcome: scored, renormalised, retried (to be sampled once more), dropped.",
    ("outcome",),
)
DROPPED_GROUPS = _counter(
    "dropped_groups", "groups", "Groups dropped whole, by cause.", CAUSED, (Key("dropped_groups"),), needs_fault=True
)
REFUSED_GROUPS = _counter(
    "refused_groups",
    "groups",
    "Groups that arrived damaged or wrong at the learner, by fault; the run's log names the worker.",
    ("cause",),
    needs_fault=True,
)
RENORMALISED_GROUPS = _counter(
    "renormalised_groups",
    "groups",
    "Groups trained without a reward that was out, by cause.",
    CAUSED,
    (Key("renormalised_groups/*"),),
    needs_fault=True,
)
LEFT_OUT_GRADIENTS = _counter(
    "left_out_gradients",
    "samples",
    "Samples trained without the gradient of a reward that was out, by cause.",
    CAUSED,
    (Key("left_out_gradients/*"),),
    needs_fault=True,
)
STALENESS = _gauge(
    "staleness_iterations", "iterations", "Iterations between the newest group's weights and the update it is for."
)
MAX_STALENESS = _gauge("max_staleness_iterations", "iterations", "Largest staleness that the run file allows.")
POLICY_VERSION = _gauge(
    "policy_version", "versions", "Newest policy version that a group was sampled with; stage 2 only."
)
PUBLISH_SECONDS = _gauge(
    "publish_seconds", "seconds", "Time to publish the newest weights.", (), (Key("seconds/update_publish"),)
)
APPLY_SECONDS = _gauge(
    "apply_seconds", "seconds", "Time in which the newest group's worker applied and attested weights."
)

# ── losses and gradients ─────────────────────────────────────────────────────────────────────────────────────────────
GRADIENT_NORM = _gauge(
    "gradient_norm",
    "1",
    "Norm of a network's gradient before clipping.",
    ("network",),
    (
        Key("student_gradient_norm", ("student",)),
        Key("fake_gradient_norm", ("fake_score",)),
        Key("surrogate_gradient_norm", ("surrogate_reward",)),
    ),
)
TERM_NORM = _gauge(
    "term_gradient_norm", "1", "Norm of one term of the student's gradient.", ("term",), (Key("signal_norm/*"),)
)
TERM_COSINE = _gauge(
    "term_gradient_cosine",
    "1",
    "Cosine of a term's gradients on the batch's halves.",
    ("term",),
    (Key("signal_cosine/*"),),
)
TERM_SHARE = _gauge(
    "term_signal_ratio",
    "1",
    "A term's share of the signal in the student's gradient.",
    ("term",),
    (Key("signal_share/*"),),
)
ITERATION_GROUPS = _gauge(
    "iteration_groups", "groups", "Groups that the newest iteration trained on.", (), (Key("groups"),)
)
GROUP_STATISTIC = _gauge(
    "group_statistic",
    "1",
    "Mean of a statistic of the groups' images over the newest iteration.",
    ("statistic",),
    (Key("group_mean/*"),),
)
GROUP_STATISTIC_ERROR = _gauge(
    "group_statistic_error", "1", "Standard error of that mean.", ("statistic",), (Key("group_error/*"),)
)
WATCHDOG_ALARMS = _counter(
    "watchdog_alarms", "alarms", "Alarms of the watchdog, by detector.", ("detector",), needs_fault=True
)
EVALUATION = _gauge("evaluation", "1", "Newest evaluation, by policy and metric.", ("policy", "metric"))
OTHER = _gauge("metric", "1", "Any key of metrics.jsonl that this table does not name.", ("key",))

LOSSES = (
    _from("fake_score_loss", "fake_score_loss", "1", "Loss of the fake score."),
    _from("consistency_loss", "fake_score_consistency_loss", "1", "Consistency loss of the fake score."),
    _from("velocity_norm", "fake_score_velocity_norm", "1", "Root mean square of the fake score's prediction."),
    _from("matching_gradient", "matching_gradient", "1", "Mean absolute gradient of distribution matching."),
    _from("teacher_distance", "teacher_distance", "1", "Mean distance of the teacher's prediction from the sample."),
    _from("ratio_mean", "policy_ratio_mean", "1", "Mean ratio of the new to the old surrogate density."),
    _from("ratio_max_deviation", "policy_ratio_deviation_max", "1", "Largest distance of a ratio from 1."),
    _from("clipped_fraction", "policy_clipped_ratio", "1", "Fraction of samples whose gradient the clip silences."),
    _from("surrogate_gap", "surrogate_gap", "1", "Largest gap between the worker's and the learner's old log-density."),
    _from("effective_samples", "effective_samples", "samples", "Number of samples that carry the policy gradient."),
    _from("hinge_reward", "hinge_reward", "1", "Weighted sum of the differentiable rewards."),
    _from("hinge_active_fraction", "hinge_active_ratio", "1", "Fraction of samples below the reward target."),
    _from("forward_error", "forward_error", "1", "Error of the forward process (policy_gradient: nft)."),
    _from("preference_loss", "preference_loss", "1", "Preference loss of the surrogate reward."),
    _from("surrogate_held", "surrogate_held_ratio", "1", "Fraction of samples outside the surrogate reward's bound."),
    _from("surrogate_distance", "surrogate_distance", "1", "Mean squared distance of the surrogate reward from base."),
    _from("surrogate_gradient", "surrogate_gradient", "1", "Mean absolute gradient of the surrogate reward."),
)  # fmt: skip
"""Gauges without labels that the learner's process computes; their formulas are in `learner/objectives/`."""

DRIVER_METRICS = (
    *(ITERATION, ITERATIONS_PLANNED, ITERATION_SECONDS, PROGRESS_TIMESTAMP, PAUSED, PART_SECONDS, IMAGES, UPDATES),
    *(CHECKPOINT_TIMESTAMP, CHECKPOINT_BYTES, FAILURES),
    *(WORKERS, WORKERS_WANTED, WORKER_RESTARTS, WORKER_SECONDS, WORKER_IDLE, PEAK_MEMORY, GPUS),
    *(LEARNER_RESTARTS, LEARNER_SNAPSHOT),
    *(MEMORY, MEMORY_AVAILABLE, DISK, DISK_FREE),
    *(REWARD, REWARD_SPREAD, ZERO_SPREAD, REWARD_WEIGHT, REWARD_SECONDS, REWARD_CONNECTIONS, REWARD_HELD),
    REWARD_SERVER_RESTARTS,
    *(GROUPS, DROPPED_GROUPS, REFUSED_GROUPS, RENORMALISED_GROUPS, LEFT_OUT_GRADIENTS),
    *(STALENESS, MAX_STALENESS, POLICY_VERSION),
    *(PUBLISH_SECONDS, APPLY_SECONDS),
    *(GRADIENT_NORM, TERM_NORM, TERM_COSINE, TERM_SHARE, *LOSSES, EVALUATION, OTHER),
    *(ITERATION_GROUPS, GROUP_STATISTIC, GROUP_STATISTIC_ERROR, WATCHDOG_ALARMS),
)
