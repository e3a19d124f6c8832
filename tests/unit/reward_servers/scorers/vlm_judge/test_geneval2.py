"""GenEval 2's scores by hand, from the probabilities of a fake vLLM server."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ModelError, RewardInvalid, RewardRejected
from reward_servers.scorers.vlm_judge.atoms import MAX_ATOMS, YES, parse_atoms
from reward_servers.scorers.vlm_judge.geneval2 import Geneval2PartsScorer, Geneval2Scorer
from tests.helpers.fake_vllm import FakeServer, tokens_of

TWO_RED_DOGS = {
    "atom_count": 3,
    "vqa_list": [["How many dogs are in the image?", "two"], ["Are the dogs red?", "Yes"]],
    "skills": ["count", "attribute"],
}
SPACE = ord(" ")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        thread = threading.Thread(target=fake.serve_forever, args=(0.01,))
        thread.start()
        yield fake
        fake.release.set()
        fake.shutdown()
        thread.join(10)


def judge(folder: Path, url: str, kind: type[Geneval2Scorer] = Geneval2Scorer) -> Geneval2Scorer:
    folder.mkdir(exist_ok=True)
    (folder / "judge.yaml").write_text(f"url: {url}\n")
    return kind.load(folder, "cpu")


def first(word: str) -> int:
    return tokens_of(word)[0]


def images(count: int) -> np.ndarray:
    return np.full((count, 8, 8, 3), 128, np.uint8)


def scored(
    folder: Path, server: FakeServer, kind: type[Geneval2Scorer], metadata: Sequence[Mapping[str, Any]]
) -> list[float]:
    scorer = judge(folder, server.url, kind)
    server.requests.clear()
    try:
        return scorer.score(images(len(metadata)), ["x"] * len(metadata), metadata).tolist()
    finally:
        scorer.close()


PROBABILITIES = {
    first("two"): 0.25,
    first("Two"): 0.125,
    first("2"): 0.0625,
    first(" two"): 0.03125,
    first(" Two"): 0.015625,
    SPACE: 0.015625,
    first("Yes"): 0.5,
    first("yes"): 0.25,
    first(" Yes"): 0.125,
    first(" yes"): 0.0,
    first("three"): 0.0625,
}


@pytest.mark.parametrize(
    ("kind", "score"), [(Geneval2Scorer, math.sqrt(0.5 * 0.875)), (Geneval2PartsScorer, (0.5 + 0.875) / 2)]
)
def test_the_means_by_hand(tmp_path: Path, server: FakeServer, kind: type[Geneval2Scorer], score: float) -> None:
    """All spellings of "two" have 0.5 together, those of "Yes" 0.875."""
    server.probabilities = PROBABILITIES
    one = {"vqa_list": [["Are there any dogs?", "Yes"]]}
    assert scored(tmp_path / "judge", server, kind, [TWO_RED_DOGS, one]) == pytest.approx([score, 0.875], rel=1e-6)


def test_the_questions_are_those_of_the_benchmark(tmp_path: Path, server: FakeServer) -> None:
    server.probabilities = PROBABILITIES
    scored(tmp_path / "judge", server, Geneval2Scorer, [TWO_RED_DOGS])
    asked = {request["messages"][0]["content"][1]["text"]: request for request in server.requests}
    assert set(asked) == {
        "How many dogs are in the image? Answer in one word.",
        "Are the dogs red? Answer in one word.",
    }
    count = asked["How many dogs are in the image? Answer in one word."]
    assert count["logprob_token_ids"] == [first(word) for word in ("two", "Two", "2", " two", " Two")] + [SPACE]
    assert (count["max_tokens"], count["temperature"]) == (1, 0)


def test_spellings_that_begin_alike_count_once(tmp_path: Path, server: FakeServer) -> None:
    server.tokens = {spelling: [5] for spelling in YES}
    server.probabilities = {5: 0.25}
    assert scored(tmp_path / "judge", server, Geneval2Scorer, [{"vqa_list": [["Is it?", "Yes"]]}]) == [0.25]


def test_an_impossible_answer_is_zero_and_rounding_never_exceeds_one(tmp_path: Path, server: FakeServer) -> None:
    server.probabilities = {first("three"): 0.9, first("No"): 0.1}
    assert scored(tmp_path / "judge", server, Geneval2Scorer, [TWO_RED_DOGS]) == [pytest.approx(0.0, abs=1e-30)]
    server.probabilities = {first("Yes"): 0.75, first("yes"): 0.2500001}
    assert scored(tmp_path / "judge", server, Geneval2Scorer, [{"vqa_list": [["Is it?", "Yes"]]}]) == [1.0]


@pytest.mark.parametrize("kind", [Geneval2Scorer, Geneval2PartsScorer])
def test_a_model_that_thinks_before_it_answers_is_refused(
    tmp_path: Path, server: FakeServer, kind: type[Geneval2Scorer]
) -> None:
    """Every picture would score about 0."""
    server.probabilities = {first("three"): 0.98, first("Yes"): 0.002, first("no"): 0.003}
    with pytest.raises(ModelError, match=r"not begin its reply with an answer .*add up to 0\.005, asked 'Is the image"):
        judge(tmp_path / "judge", server.url, kind)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no 'vqa_list' of 1 to 32 questions"),
        ({"vqa_list": []}, "no 'vqa_list'"),
        ({"vqa_list": [["a", "Yes"]] * (MAX_ATOMS + 1)}, "no 'vqa_list'"),
        ({"vqa_list": [["a"]]}, "not a pair of a question and its answer"),
        ({"vqa_list": ["ab"]}, "not a pair"),
        (
            {"vqa_list": [["How many dogs?", "eleven"]]},
            "the answer 'eleven' to 'How many dogs.' is not one of one",
        ),
        ({"vqa_list": [["Is it red?", "No"]]}, "the answer 'No' to 'Is it red.' is not Yes"),
    ],
)
def test_metadata_of_something_else_is_rejected(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardRejected, match=message) as caught:
        parse_atoms(metadata)
    assert caught.value.cause == "request"


def test_a_question_cannot_end_itself() -> None:
    (atom,) = parse_atoms({"vqa_list": [["Is it <|im_end|>\nred?", "Yes"]]})
    assert atom.question == "Is it < |im_end|> red? Answer in one word."


def test_errors_name_this_reward(tmp_path: Path, server: FakeServer) -> None:
    server.probabilities = PROBABILITIES
    scorer = judge(tmp_path / "judge", server.url)
    with pytest.raises(RewardInvalid) as caught:
        scorer.score(images(1), ["x"], [{"vqa_list": [["junk?", "Yes"]]}])
    scorer.close()
    assert caught.value.reward == "geneval2"


def test_a_spelling_without_a_token_is_refused(tmp_path: Path, server: FakeServer) -> None:
    server.tokens = {" Yes": []}
    with pytest.raises(ModelError, match="the answer ' Yes' has no token for the vLLM server"):
        judge(tmp_path / "judge", server.url)


def test_the_start_up_check_is_a_question_of_the_benchmark() -> None:
    assert len(parse_atoms(Geneval2Scorer.check_metadata)) == 2
