"""`python -m reward_servers.tiny`: directories that their scorers load, and refusals that say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from reward_servers.loading import load, scorer_class
from reward_servers.main import server_info
from reward_servers.options import build_parser, check
from reward_servers.scorers import BUILT_IN_SCORERS
from reward_servers.tiny.main import ELSEWHERE, WRITERS, main


def test_every_built_in_scorer_has_a_model_or_a_word_on_it() -> None:
    assert {*WRITERS, *ELSEWHERE} == set(BUILT_IN_SCORERS)
    assert set(WRITERS) & set(ELSEWHERE) == set()


def test_every_directory_is_a_model_that_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "tiny")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(WRITERS)
    for line in lines:
        # The command that is printed, as the server reads it.
        settings = check(build_parser().parse_args(line.removeprefix("python -m reward_servers ").split()))
        (one,) = settings.scorers
        kind = scorer_class(one.scorer)
        name, scorer = kind.name, load(kind, one, settings.device)
        assert one.model == tmp_path / "tiny" / name
        request = scorer.check_request()
        score = float(scorer.score(request.images_BHWC, request.prompts, request.metadata)[0])
        low, high = scorer.score_range
        assert low <= score <= high
        assert server_info(name, scorer, reproducible=False).weights_hash


def test_only_what_was_asked_for_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--scorer", "hps", "--scorer", "pickscore"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hps", "pickscore"]
    before = (tmp_path / "hps/config.json").stat().st_mtime_ns
    assert main([str(tmp_path), "--scorer", "clipscore", "--scorer", "hps"]) == 2
    assert "hps is there already: remove it, or name another directory" in capsys.readouterr().err
    assert not (tmp_path / "clipscore").exists()
    assert (tmp_path / "hps/config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("scorer", ELSEWHERE)
def test_a_scorer_without_weights_of_its_own_says_how_to_start_it(
    scorer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--scorer", scorer]) == 2
    assert f"python -m reward_servers --scorer {scorer}" in capsys.readouterr().err
