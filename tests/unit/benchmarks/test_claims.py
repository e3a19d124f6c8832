"""The statistics and tables of the claims, and that every arm is a possible run."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.claims.arms import CLAIMS, Claim
from benchmarks.claims.paired import difference, scores_of
from benchmarks.claims.prompts import own_rows
from benchmarks.claims.tables import curve_table, difference_table, final_table, teacher_table
from learner.preflight.command_line import parse


def test_the_error_of_a_difference_is_that_of_the_prompts_or_that_of_the_seeds_whichever_is_larger() -> None:
    """Prompts: means 0 and 2, of deviation sqrt 2, over sqrt 2. Seeds: means 1 and 4 differ by 3."""
    alike = difference([[0.0, 2.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert (alike.mean, alike.error) == (1.0, pytest.approx(1.0))
    apart = difference([[0.0, 2.0], [3.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert (apart.mean, apart.error) == (2.5, pytest.approx(1.5))
    assert apart.errors == pytest.approx(2.5 / 1.5)


def test_a_single_seed_has_the_error_of_its_prompts() -> None:
    assert difference([[0.0, 2.0]], [[0.0, 0.0]]).error == pytest.approx(1.0)


def result(gold: list[list[float]], cpu_seconds: float | None = 60.0) -> dict[str, Any]:
    record = {"metrics": {"gold": 0.0, "diversity": 0.0}, "diversity": [0.5] * len(gold)}
    return {
        "cpu_seconds": cpu_seconds,
        "curve": [{"stage": "cold_start", "iteration": 50, "metrics": {"gold": gold[0][0], "diversity": 0.25}}],
        "policies": {"cold_start": record | {"scores": [{"gold": images} for images in gold]}},
    }


CLAIM = Claim("a claim", "run.yaml", reference="plain", policy="cold_start", common={}, arms={})
RESULTS = {
    "plain": {0: result([[0.0, 0.5], [1.0, 1.0]]), 1: result([[0.0, 0.0], [0.0, 0.0]])},
    "other": {0: result([[1.0, 1.0], [1.0, 1.0]], cpu_seconds=90)},
}


def test_a_prompts_score_is_the_mean_over_its_images() -> None:
    assert scores_of(RESULTS["plain"][0], "cold_start", "gold") == [0.25, 1.0]
    assert scores_of(RESULTS["plain"][0], "cold_start", "diversity") == [0.5, 0.5]


def test_a_tables_own_prompts_occur_nowhere_else() -> None:
    texts = ["a", "b", "c", "b", "d", "c", "d", "e"]
    assert own_rows(texts, 2, {"e"}) == [0, 2]
    assert scores_of(RESULTS["plain"][0], "cold_start", "gold", [1]) == [1.0]


def test_the_tables_by_hand() -> None:
    assert final_table(RESULTS).splitlines()[2:] == [
        "| plain | cold_start | 0 1 | 0.312 ± 0.442 | 0.500 ± 0.000 | 1.0 |",
        "| other | cold_start | 0 | 1.000 | 0.500 | 1.5 |",
    ]
    unknown = {"plain": {0: result([[1.0]], cpu_seconds=None)}}
    assert final_table(unknown).splitlines()[2].endswith("| unknown |")
    assert curve_table(RESULTS).splitlines()[2:] == [
        "| plain | cold_start | 50 | 0.000 ± 0.000 | 0.250 ± 0.000 |",
        "| other | cold_start | 50 | 1.000 | 0.250 |",
    ]
    # Differences .75 and 0 of the one seed that both have: mean .375, deviation .53, over the root of two prompts.
    assert difference_table(CLAIM, RESULTS).splitlines()[2:] == [
        "| other | 0 | +0.375 ± 0.375 (+1.0) | +0.000 ± 0.000 (+0.0) |"
    ]


def test_a_policy_is_compared_with_its_own_runs_teacher() -> None:
    assert teacher_table(CLAIM, RESULTS) == ""
    run = result([[1.0, 1.0], [1.0, 1.0]])
    teacher = RESULTS["plain"][0]["policies"]["cold_start"]
    with_teacher = {"all": {0: run | {"policies": {"teacher_28": teacher, **run["policies"]}}}}
    row = "| all | 0 | +0.375 ± 0.375 (+1.0) | +0.000 ± 0.000 (+0.0) |"
    assert teacher_table(CLAIM, with_teacher).splitlines()[2:] == [row]


@pytest.mark.parametrize("name", CLAIMS)
def test_every_arm_is_a_possible_run(name: str) -> None:
    claim = CLAIMS[name]
    assert claim.reference in claim.arms
    for arm in [*claim.arms.values(), *claim.preparing.values()]:
        options = {**claim.common, **arm.options}
        parsed = parse(["--config", claim.config, *(f"--{key}={value}" for key, value in options.items())], {}).config
        assert parsed.evaluation.final_from >= parsed.evaluation.prompts, "tuning and table share prompts"
        assert arm.start is None or arm.start in claim.preparing
