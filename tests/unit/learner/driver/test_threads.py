"""The learner's number of threads: given, recorded by the run that is resumed, or left to the probe."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.run import Config
from learner.driver.threads import with_known_threads, with_probed_threads, with_threads
from learner.preflight.run_file import RUN_FILES, dump_config, read_run_file
from tests.helpers.trained_run import tiny_config


@pytest.fixture
def unset(tmp_path: Path) -> Config:
    return tiny_config(tmp_path, tmp_path / "prompts.txt")


def test_a_resumed_run_keeps_the_number_that_was_recorded(
    unset: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rtdmd")
    (tmp_path / "config.yaml").write_text(dump_config(with_threads(unset, 3)))
    assert with_known_threads(unset, tmp_path, resume=True).learner.threads == 3
    assert caplog.messages == ["learner: 3 CPU threads as before (learner.threads sets another number)"]
    assert with_known_threads(with_threads(unset, 5), tmp_path, resume=True).learner.threads == 5
    assert with_known_threads(unset, tmp_path, resume=False) is unset


def test_only_a_probe_knows_the_number_where_none_is_recorded(unset: Config, tmp_path: Path) -> None:
    assert with_known_threads(unset, tmp_path, resume=True) is unset
    (tmp_path / "config.yaml").write_text(dump_config(unset))
    assert with_known_threads(unset, tmp_path, resume=True) is unset


@pytest.mark.parametrize("learner", [{"num_gpus": 0.5}, {"shard_base": True, "ranks": 2}])
def test_a_learner_that_is_not_probed_gets_one_thread(
    unset: Config, tmp_path: Path, learner: dict[str, object]
) -> None:
    changed = Config.model_validate(unset.model_dump(mode="json") | {"learner": learner})
    assert with_known_threads(changed, tmp_path, resume=False).learner.threads == 1


class Chooser:
    """A learner that has chosen two threads."""

    def choose_threads(self) -> tuple[int, dict[int, float]]:
        return 2, {2: 0.0512, 1: 0.0987}


def test_the_choice_is_told_in_one_line(unset: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rtdmd")
    assert with_probed_threads(unset, Chooser()).learner.threads == 2
    expected = (
        "learner: 2 CPU threads (a pass by threads: 1: 0.0987 s, 2: 0.0512 s); learner.threads sets another number"
    )
    assert caplog.messages == [expected]
    given = with_threads(unset, 4)
    assert with_probed_threads(given, Chooser()) is given


@pytest.mark.parametrize("name", ["shapes", "shapes_finished", "shapes_flux2", "shapes_judge", "text"])
def test_equal_seeds_of_the_small_worlds_are_equal_runs(name: str) -> None:
    """Their number of threads is not left to timing."""
    assert read_run_file(RUN_FILES / f"{name}.yaml")["learner"]["threads"] == 1
