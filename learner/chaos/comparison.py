"""Whether a disturbed run ended as the undisturbed one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from learner.chaos.disturbed_run import whole_lines
from learner.checkpoint import STATE, CheckpointStore
from learner.driver.ledger import LEDGER


def differences(run_dir: Path, other: Path) -> list[str]:
    """The differences between two finished runs of equal settings, one line each.

    The comparison is bit for bit: every line of `metrics.jsonl` but its times, the ends of all groups, and the last
    checkpoint.
    """
    found = []
    mine, theirs = _metrics(run_dir), _metrics(other)
    if mine != theirs:
        first = next((a for a, b in zip(mine, theirs, strict=False) if a != b), None)
        place = f"{len(mine)} lines for {len(theirs)}" if first is None else f"first in {first[:3]}"
        found.append(f"metrics.jsonl differs: {place}")
    if _ends(run_dir) != _ends(other):
        found.append("ledger.jsonl differs")
    repeated = [group for group, times in Counter(end[:2] for end in _ends(run_dir)).items() if times > 1]
    if repeated:
        found.append(f"ledger.jsonl has {len(repeated)} groups with several ends, first {repeated[0]}")
    states = [_state(path) for path in (run_dir, other)]
    if states[0] != states[1]:
        found.append("the last checkpoints differ")
    return found


def _metrics(run_dir: Path) -> list[tuple[str, int, str, dict[str, float]]]:
    lines = whole_lines(run_dir / "metrics.jsonl")
    return [(line["stage"], line["iteration"], line["kind"], line["metrics"]) for line in lines]


def _ends(run_dir: Path) -> list[tuple[int, int, str]]:
    return [(line["iteration"], line["prompt"], line["outcome"]) for line in whole_lines(run_dir / LEDGER)]


def _state(run_dir: Path) -> bytes | None:
    newest = CheckpointStore.of_run(run_dir).latest()
    return None if newest is None else (newest / STATE).read_bytes()
