"""Markdown tables of a claim's results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.claims.arms import Claim
from benchmarks.claims.paired import Result, difference, mean_and_spread, scores_of

Results = Mapping[str, Mapping[int, Result]]
"""arm -> seed -> result."""
Rows: TypeAlias = Sequence[int] | None
"""The rows of the final table that count; None: all."""


def tables(claim: Claim, results: Results, rows: Rows = None) -> str:
    """The final policies, the periodic evaluations, and the paired differences from the reference arm."""
    parts = [
        final_table(results, rows),
        curve_table(results),
        difference_table(claim, results, rows),
        teacher_table(claim, results, rows),
    ]
    return "\n".join(filter(None, parts))


def final_table(results: Results, rows: Rows = None) -> str:
    """Mean and standard deviation over the seeds, at the start of stage 2 and at the end."""
    metrics = _metrics(results)
    lines = _header(["arm", "policy", "seeds", *metrics, "CPU min"])
    for arm, seeds in results.items():
        for policy in next(iter(seeds.values()))["policies"]:
            cells = [
                mean_and_spread(
                    [statistics.fmean(scores_of(result, policy, metric, rows)) for result in seeds.values()]
                )
                for metric in metrics
            ]
            lines.append(_row([arm, policy, " ".join(map(str, seeds)), *cells, _minutes(seeds.values())]))
    return "\n".join(lines) + "\n"


def _minutes(results: Iterable[Mapping[str, Any]]) -> str:
    """Mean processor minutes of the runs that they are known of."""
    known = [result["cpu_seconds"] for result in results if result["cpu_seconds"] is not None]
    return f"{statistics.fmean(known) / 60:.1f}" if known else "unknown"


def curve_table(results: Results) -> str:
    """Means over the seeds of the periodic evaluations."""
    metrics = _metrics(results)
    lines = _header(["arm", "stage", "iteration", *metrics])
    for arm, seeds in results.items():
        points: dict[tuple[str, int], list[Mapping[str, float]]] = {}
        for result in seeds.values():
            for event in result["curve"]:
                points.setdefault((event["stage"], event["iteration"]), []).append(event["metrics"])
        for (stage, iteration), found in points.items():
            cells = [mean_and_spread([values[metric] for values in found]) for metric in metrics]
            lines.append(_row([arm, stage, str(iteration), *cells]))
    return "\n".join(lines) + "\n"


def difference_table(claim: Claim, results: Results, rows: Rows = None) -> str:
    """Paired differences from the reference arm over the seeds that both have; ± is one standard error."""
    metrics = _metrics(results)
    reference = results.get(claim.reference, {})
    lines = _header([f"minus {claim.reference}", "seeds", *metrics])
    for arm, seeds in results.items():
        common = [seed for seed in seeds if seed in reference]
        if arm == claim.reference or not common:
            continue
        cells = []
        for metric in metrics:
            found = difference(
                *([scores_of(runs[seed], claim.policy, metric, rows) for seed in common] for runs in (seeds, reference))
            )
            cells.append(f"{found.mean:+.3f} ± {found.error:.3f} ({found.errors:+.1f})")
        lines.append(_row([arm, " ".join(map(str, common)), *cells]))
    return "\n".join(lines) + "\n"


def teacher_table(claim: Claim, results: Results, rows: Rows = None) -> str:
    """Paired differences of each arm's policy from the many-step teacher; "" if no run has evaluated it."""
    metrics = _metrics(results)
    lines = _header(["minus the teacher", "seeds", *metrics])
    for arm, seeds in results.items():
        teacher = next(iter(next(iter(seeds.values()))["policies"]))
        if not teacher.startswith("teacher"):
            continue
        cells = []
        for metric in metrics:
            found = difference(
                *(
                    [scores_of(run, policy, metric, rows) for run in seeds.values()]
                    for policy in (claim.policy, teacher)
                )
            )
            cells.append(f"{found.mean:+.3f} ± {found.error:.3f} ({found.errors:+.1f})")
        lines.append(_row([arm, " ".join(map(str, seeds)), *cells]))
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _metrics(results: Results) -> list[str]:
    result = next(iter(next(iter(results.values())).values()))
    return list(next(iter(result["policies"].values()))["metrics"])


def _header(columns: Sequence[str]) -> list[str]:
    return [_row(columns), "|---" * len(columns) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
