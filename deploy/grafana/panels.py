"""The panels of the Grafana dashboards: a title, a unit, and expressions with their legends.

Each expression names metrics of `common/metrics/`, or rules of `deploy/prometheus/rules.yml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: Grafana's name of it: s, bytes, percentunit (0 to 1), ops (per second), short.
        curves: PromQL expression -> legend. `$run` is the chosen runs.
        kind: lines over time, or the newest numbers.
        stacked: whether the curves are parts of a whole.
        needs_fault: whether it has no data until something has failed.
    """

    title: str
    about: str
    curves: dict[str, str]
    unit: str = "short"
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    needs_fault: bool = False


RUN = '{run=~"$run"}'

TRAINING = (
    Panel(
        "Progress",
        "Finished part of each stage.",
        {f"rtdmd_iteration{RUN} / on (run, stage) (rtdmd_iterations_planned{RUN} > 0)": "{{run}} {{stage}}"},
        "percentunit",
    ),
    Panel(
        "Rewards",
        "Mean over the newest iteration's samples.",
        {f"rtdmd_reward{RUN}": "{{run}} {{reward}}"},
    ),
    Panel(
        "Evaluations of the student",
        "Held-out prompts, averaged weights.",
        {'rtdmd_evaluation{run=~"$run", policy="student"}': "{{run}} {{metric}}"},
    ),
    Panel(
        "Final table so far",
        "Newest evaluation of every policy.",
        {'rtdmd_evaluation{run=~"$run", policy!="student"}': "{{policy}} {{metric}}"},
        kind="stat",
    ),
    Panel(
        "Reward spread within groups",
        "Standard deviation of the samples of one prompt. What the policy gradient learns from.",
        {f"rtdmd_reward_spread{RUN}": "{{run}} {{reward}}"},
    ),
    Panel(
        "Groups without spread",
        "Fraction of groups in which all samples have one score: they teach nothing.",
        {f"rtdmd_reward_zero_spread_ratio{RUN}": "{{run}} {{reward}}"},
        "percentunit",
    ),
    Panel(
        "Gradient norms",
        "Before clipping.",
        {f"rtdmd_gradient_norm{RUN}": "{{run}} {{network}}"},
    ),
    Panel(
        "Signal of each term",
        "Share of the student's gradient. Measured every alignment.signal_every iterations.",
        {f"rtdmd_term_signal_ratio{RUN}": "{{run}} {{term}}"},
        "percentunit",
        stacked=True,
    ),
    Panel(
        "Norm of each term",
        "Gradient of each term of the student's loss.",
        {f"rtdmd_term_gradient_norm{RUN}": "{{run}} {{term}}"},
    ),
    Panel(
        "Fake score",
        "Losses, and the size of its prediction.",
        {
            f"rtdmd_fake_score_loss{RUN}": "{{run}} loss",
            f"rtdmd_fake_score_consistency_loss{RUN}": "{{run}} consistency",
            f"rtdmd_fake_score_velocity_norm{RUN}": "{{run}} velocity norm",
        },
    ),
    Panel(
        "Distribution matching",
        "Mean absolute gradient, and distance of the teacher's prediction.",
        {
            f"rtdmd_matching_gradient{RUN}": "{{run}} gradient",
            f"rtdmd_teacher_distance{RUN}": "{{run}} teacher distance",
        },
    ),
    Panel(
        "Policy ratio",
        "Largest distance of a ratio from 1, and the fraction that the clip silences.",
        {
            f"rtdmd_policy_ratio_deviation_max{RUN}": "{{run}} deviation",
            f"rtdmd_policy_clipped_ratio{RUN}": "{{run}} clipped",
        },
    ),
    Panel(
        "Surrogate gap",
        "Between the worker's and the learner's old log-density. Rounding only, unless they compute differently.",
        {f"rtdmd_surrogate_gap{RUN}": "{{run}}"},
    ),
    Panel(
        "Effective samples",
        "Samples that carry the policy gradient.",
        {f"rtdmd_effective_samples{RUN}": "{{run}}"},
    ),
    Panel(
        "Hinge on differentiable rewards",
        "Fraction of samples below the reward target.",
        {f"rtdmd_hinge_active_ratio{RUN}": "{{run}} active", f"rtdmd_hinge_reward{RUN}": "{{run}} weighted reward"},
    ),
)

SERVICE = (
    Panel(
        "Alerts",
        "Firing now. docs/operations.md has a runbook for each.",
        {'count by (alertname, severity) (ALERTS{alertstate="firing", run=~"$run"})': "{{severity}} {{alertname}}"},
        needs_fault=True,
    ),
    Panel(
        "Since the last progress",
        "Nothing finished for so long.",
        {f"time() - rtdmd_progress_timestamp_seconds{RUN}": "{{run}}"},
        "s",
    ),
    Panel(
        "Since the last checkpoint",
        "What a crash would cost.",
        {f"time() - rtdmd_checkpoint_timestamp_seconds{RUN}": "{{run}}"},
        "s",
    ),
    Panel(
        "Time per iteration",
        "The newest iteration of each stage.",
        {f"rtdmd_iteration_seconds{RUN}": "{{run}} {{stage}}"},
        "s",
    ),
    Panel(
        "Where the driver's time goes",
        "Fraction of the time in each wait and in evaluations.",
        {
            'sum by (run, part) (rate(rtdmd_part_seconds_total{run=~"$run", part=~"wait_.*|evaluation"}[5m]))': (
                "{{run}} {{part}}"
            )
        },
        "percentunit",
        stacked=True,
    ),
    Panel(
        "Where the learner's time goes",
        "Fraction of the time in each part of an update.",
        {
            'sum by (run, part) (rate(rtdmd_part_seconds_total{run=~"$run", part=~"update_.*"}[5m]))': (
                "{{run}} {{part}}"
            )
        },
        "percentunit",
        stacked=True,
    ),
    Panel(
        "Where the workers' time goes",
        "Workers busy with each part, on average.",
        {f"sum by (run, part) (rate(rtdmd_worker_seconds_total{RUN}[5m]))": "{{run}} {{part}}"},
        stacked=True,
    ),
    Panel(
        "Idle share of the workers",
        "Fraction of their time without a call.",
        {f"run:rtdmd_worker_idle:ratio5m{RUN}": "{{run}}"},
        "percentunit",
    ),
    Panel(
        "Images",
        "Per second, in all and per reserved GPU.",
        {
            f"run:rtdmd_images:rate5m{RUN}": "{{run}} all",
            f"run:rtdmd_images_per_gpu:rate5m{RUN}": "{{run}} per GPU",
        },
        "ops",
    ),
    Panel(
        "Workers",
        "By state.",
        {f"sum by (run, state) (rtdmd_workers{RUN})": "{{run}} {{state}}"},
        stacked=True,
    ),
    Panel(
        "Restarts",
        "Of workers, learner, reward servers and their models, in 10 minutes.",
        {
            f"sum by (run) (increase(rtdmd_worker_restarts_total{RUN}[10m]))": "{{run}} workers",
            f"sum by (run) (increase(rtdmd_learner_restarts_total{RUN}[10m]))": "{{run}} learner",
            f"sum by (run, reward) (increase(rtdmd_reward_server_restarts_total{RUN}[10m]))": "{{run}} {{reward}}",
            f"sum by (run, scorer) (increase(reward_server_model_restarts_total{RUN}[10m]))": "model {{scorer}}",
        },
    ),
    Panel(
        "Groups",
        "Per second, by outcome.",
        {f"sum by (run, outcome) (rate(rtdmd_groups_total{RUN}[5m]))": "{{run}} {{outcome}}"},
        "ops",
        stacked=True,
    ),
    Panel(
        "Weights",
        "Time to publish a version, and to apply and attest it in a worker.",
        {f"rtdmd_publish_seconds{RUN}": "{{run}} publish", f"rtdmd_apply_seconds{RUN}": "{{run}} apply"},
        "s",
    ),
    Panel(
        "Policy version and staleness",
        "Of the newest group.",
        {
            f"rtdmd_policy_version{RUN}": "{{run}} version",
            f"rtdmd_staleness_iterations{RUN}": "{{run}} staleness",
        },
    ),
    Panel(
        "Peak memory",
        "Of the GPU, or of the process without one.",
        {f"rtdmd_peak_memory_bytes{RUN}": "{{run}} {{process}}"},
        "bytes",
    ),
    Panel(
        "The driver's machine",
        "Available memory, and free disk at the run directory.",
        {
            f"rtdmd_memory_available_bytes{RUN}": "{{run}} memory",
            f"rtdmd_disk_free_bytes{RUN}": "{{run}} disk",
        },
        "bytes",
    ),
)

REWARDS = (
    Panel(
        "Servers that answer Prometheus",
        "1 for each that does.",
        {'up{job="reward_server", run=~"$run"}': "{{reward}} {{instance}}"},
    ),
    Panel(
        "Connections of workers with a call",
        "Pairs of such a worker and a server, by the state of its circuit breaker. closed is healthy.",
        {
            f"sum by (run, reward, state) (rtdmd_reward_connections{RUN})": "{{run}} {{reward}} {{state}}",
        },
    ),
    Panel(
        "Held workers",
        "They hold a request until the reward is back.",
        {f"sum by (run, reward) (rtdmd_reward_held_workers{RUN})": "{{run}} {{reward}}"},
    ),
    Panel(
        "Time for a group's scores",
        "95th percentile, as the workers see it.",
        {f"run_reward:rtdmd_reward_seconds:p95_5m{RUN}": "{{run}} {{reward}}"},
        "s",
    ),
    Panel(
        "Time per model call",
        "95th percentile, on the server.",
        {f"run_reward:reward_server_model_seconds:p95_5m{RUN}": "{{run}} {{reward}}"},
        "s",
    ),
    Panel(
        "Groups dropped",
        "Fraction of all, in 15 minutes.",
        {f"run:rtdmd_groups_dropped:ratio15m{RUN}": "{{run}}"},
        "percentunit",
    ),
    Panel(
        "Groups dropped by cause",
        "In 15 minutes.",
        {f"sum by (run, reward, cause) (increase(rtdmd_dropped_groups_total{RUN}[15m]))": "{{reward}} {{cause}}"},
        needs_fault=True,
    ),
    Panel(
        "Trained without a reward",
        "Groups without its score, and samples without its gradient, in 15 minutes.",
        {
            f"sum by (run, reward, cause) (increase(rtdmd_renormalised_groups_total{RUN}[15m]))": (
                "{{run}} groups {{reward}} {{cause}}"
            ),
            f"sum by (run, reward, cause) (increase(rtdmd_left_out_gradients_total{RUN}[15m]))": (
                "{{run}} gradients {{reward}} {{cause}}"
            ),
        },
        needs_fault=True,
    ),
    Panel(
        "Responses",
        "Per second, by HTTP status.",
        {f"sum by (run, scorer, code) (rate(reward_server_requests_total{RUN}[5m]))": "{{run}} {{scorer}} {{code}}"},
        "ops",
    ),
    Panel(
        "Images that wait",
        "In the server's queue.",
        {f"sum by (run, scorer) (reward_server_queue_images{RUN})": "{{run}} {{scorer}}"},
    ),
    Panel(
        "Memory of unanswered requests",
        "In the server.",
        {f"sum by (run, scorer) (reward_server_queue_bytes{RUN})": "{{run}} {{scorer}}"},
        "bytes",
    ),
    Panel(
        "Images per model call",
        "Mean of 5 minutes.",
        {
            f"sum by (run, scorer) (rate(reward_server_batch_images_sum{RUN}[5m]))"
            f" / sum by (run, scorer) (rate(reward_server_batch_images_count{RUN}[5m]))": "{{run}} {{scorer}}"
        },
    ),
    Panel(
        "Scores",
        "Median of 5 minutes, of all clients of the server.",
        {
            f"histogram_quantile(0.5, sum by (run, scorer, le) (rate(reward_server_score_bucket{RUN}[5m])))": (
                "{{run}} {{scorer}}"
            )
        },
    ),
    Panel(
        "Processor of the models",
        "Cores in use.",
        {f"sum by (run, scorer) (rate(reward_server_model_process_cpu_seconds_total{RUN}[5m]))": "{{run}} {{scorer}}"},
    ),
    Panel(
        "Memory of the models",
        "Resident.",
        {f"sum by (run, scorer) (reward_server_model_process_resident_memory_bytes{RUN})": "{{run}} {{scorer}}"},
        "bytes",
    ),
)

DASHBOARDS: dict[str, tuple[Panel, ...]] = {"training": TRAINING, "service": SERVICE, "rewards": REWARDS}
