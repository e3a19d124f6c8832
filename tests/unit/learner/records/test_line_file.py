"""Lines of a run's files on a disk that refuses them for a while."""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.console_stream import LOG
from learner.records.line_file import LineFile


@contextmanager
def disk_full_at(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, LOG.name):
        yield caplog


def test_lines_that_a_full_disk_refuses_are_written_later_in_their_order(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    file = LineFile(tmp_path / "metrics.jsonl")
    file.append("first\n")
    with disk_full_at(8):
        file.append("second\n")
        assert file.path.read_text() == "first\n"  # not the two bytes that there was room for
        file.append("third\n")
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            file.settle()
    file.append("fourth\n")
    assert file.path.read_text() == "first\nsecond\nthird\nfourth\n"
    (warning,) = [record.getMessage() for record in warnings.records]
    assert warning.startswith(f"{file.path}: ")
    assert warning.endswith("its lines are held in memory until then; the run goes on")


def test_each_time_that_a_disk_is_full_is_a_warning_of_its_own(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    file = LineFile(tmp_path / "ledger.jsonl")
    for size in (2, 10):
        with disk_full_at(size):
            file.append("a line\n")
        file.settle()
    assert file.path.read_text() == "a line\n" * 2
    assert len(warnings.records) == 2


def test_a_directory_that_is_away_for_a_while_loses_nothing(tmp_path: Path) -> None:
    run_dir, away = tmp_path / "run", tmp_path / "away"
    run_dir.mkdir()
    file = LineFile(run_dir / "ledger.jsonl")
    file.append("first\n")
    run_dir.rename(away)
    file.append("second\n")
    away.rename(run_dir)
    file.settle()
    assert file.path.read_text() == "first\nsecond\n"
