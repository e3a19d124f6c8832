"""What a pass of the student costs more than the plain pipeline's, counted at full width with few blocks."""

from __future__ import annotations

import pytest

from benchmarks.count import STEPS, count, over

LIMITS = {
    "sd35_medium": {"kernels": 1.4, "elementwise_gb": 1.12, "modelled_ms": 1.10},
    "flux2_klein_4b": {"kernels": 1.4, "elementwise_gb": 1.20, "modelled_ms": 1.10},
}


@pytest.mark.parametrize("model", LIMITS)
def test_the_student_costs_little_more_than_the_plain_pipeline(model: str) -> None:
    counts = count(model, batch=24, layers=2)
    student, teacher = (over(counts[name], counts["plain"]) for name in ("student", "teacher"))
    assert all(1 < ratio <= LIMITS[model][name] for name, ratio in student.items()), student
    assert all(1 < ratio < 1.02 for ratio in teacher.values()), teacher


@pytest.mark.parametrize("model", LIMITS)
def test_the_host_runs_ahead_of_the_device_for_a_whole_group(model: str) -> None:
    """Nothing between a group's first kernel and its last makes the host wait; noise is copied from pinned memory."""
    group = count(model, batch=3, layers=2)["group"]
    assert (group.copies, group.waits) == (1 + STEPS, 0)
