"""UnifiedReward: its prompt out of a published script, and scores out of replies of a fake vLLM server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.errors import ModelError, RewardInvalid
from reward_servers.scorers.vlm_judge import unified_prompt
from reward_servers.scorers.vlm_judge.unified_prompt import PROMPT_FILE, extract_unified_prompt, read_unified_prompt
from reward_servers.scorers.vlm_judge.unified_reward import UnifiedRewardScorer, stated_score
from tests.helpers.fake_vllm import FakeServer

THREE = "Rate it.\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\nCaption: [{prompt}]"
ONE = "Rate it after 'Final Score:'.\nCaption: [{prompt}]"
SCRIPT = """
prompt = ""
path = f"/somewhere/{prompt}"
problem = (
    "Rate it.\\n"
    "Alignment Score (1-5): X\\nCoherence Score (1-5): Y\\n"
    "Style Score (1-5): Z\\n"
    f"Caption: [{prompt}]"
)
"""
"""Built as the published scripts are, with a text of ours."""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        thread = threading.Thread(target=fake.serve_forever, args=(0.01,))
        thread.start()
        yield fake
        fake.release.set()
        fake.shutdown()
        thread.join(10)


def load(folder: Path, url: str, prompt: str) -> UnifiedRewardScorer:
    folder.mkdir(exist_ok=True)
    (folder / "judge.yaml").write_text(f"url: {url}\n")
    (folder / PROMPT_FILE).write_text(json.dumps({"text": prompt}))
    return UnifiedRewardScorer.load(folder, "cpu")


def score(scorer: UnifiedRewardScorer, *captions: str) -> list[float]:
    try:
        return scorer.score(np.zeros((len(captions), 8, 8, 3), np.uint8), captions, [{}] * len(captions)).tolist()
    finally:
        scorer.close()


def test_three_scores_are_averaged_and_divided_by_five(tmp_path: Path, server: FakeServer) -> None:
    said = "reply: Alignment Score (1-5): 2.5|Coherence Score (1-5): 4|Style Score (1-5): 1.0"
    best = "reply: Alignment Score (1-5): 5|Coherence Score (1-5): 5|Style Score (1-5): 5"
    scores = score(load(tmp_path / "judge", server.url, THREE), said, best)
    assert scores == pytest.approx([0.5, 1.0])
    (asked, _) = server.requests
    assert asked["messages"][0]["content"][1]["text"].startswith("Rate it.\nAlignment Score (1-5): X")
    assert (asked["temperature"], "logprobs" in asked) == (0, False)


def test_the_final_score_of_a_list_of_elements(tmp_path: Path, server: FakeServer) -> None:
    said = "reply: cat (object): 1|red (colour): 0|Final Score: 3.75"
    assert score(load(tmp_path / "judge", server.url, ONE), said) == pytest.approx([0.75])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("a fine picture", "the reply states no Final Score from 1 to 5: .*a fine picture"),
        ("Final Score: 7", "states no Final Score from 1 to 5"),
        ("Final Score: 0.5", "states no Final Score from 1 to 5"),
        ("Final Score: good", "states no Final Score"),
        ("endless", "did not end its reply within 1024 tokens"),
    ],
)
def test_a_reply_without_a_score_is_an_error_and_no_number(
    tmp_path: Path, server: FakeServer, said: str, message: str
) -> None:
    with pytest.raises(RewardInvalid, match=message) as caught:
        score(load(tmp_path / "judge", server.url, ONE), f"reply: {said}")
    assert (caught.value.reward, caught.value.cause) == ("unified_reward", "answer")


def test_the_last_statement_of_a_score_counts() -> None:
    assert stated_score("Final Score: 2, no: Final Score: 3", "Final Score") == 3.0


def test_the_identity_knows_the_prompt(tmp_path: Path, server: FakeServer) -> None:
    hashes = []
    for prompt in (ONE, ONE, ONE.replace("Rate", "Judge")):
        scorer = load(tmp_path / "judge", server.url, prompt)
        hashes.append(scorer.weights_hash)
        scorer.close()
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_prompt_is_read_out_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    assert unified_prompt.main([str(tmp_path / "script.py"), str(tmp_path)]) == 0
    assert read_unified_prompt(tmp_path) == THREE
    assert unified_prompt.main([str(tmp_path / "none.py"), str(tmp_path)]) != 0
    assert "none.py is not a Python file that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("x = 1", "holds 0 prompts with scores"),
        ("a = f'Final Score: {prompt}'\nb = f'Final Score:  {prompt}'", "holds 2 prompts with scores"),
        ("a = f'Final Score: {other}'", "holds 0 prompts with scores"),
        ("a = f'", "not a Python file"),
    ],
)
def test_a_script_without_the_prompt_is_refused(tmp_path: Path, script: str, message: str) -> None:
    (tmp_path / "script.py").write_text(script)
    with pytest.raises(ModelError, match=message):
        extract_unified_prompt(tmp_path / "script.py")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prompt.json is missing: write it with python -m"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"text": 1}', "`text` is not a text"),
        ('{"text": "Final Score: of what?"}', "has {prompt} once and asks for"),
        ('{"text": "how good is {prompt}?"}', "has {prompt} once and asks for"),
    ],
)
def test_a_directory_without_a_valid_prompt_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / PROMPT_FILE).write_text(content)
    with pytest.raises(ModelError, match=message):
        read_unified_prompt(tmp_path)
