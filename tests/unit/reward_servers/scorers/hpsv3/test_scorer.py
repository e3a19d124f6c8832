"""HPSv3 with tiny random weights, against the published class run on the transformers it pins."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError, RewardRejected
from common.rewards.api import MAX_ASPECT, ByteArray
from reward_servers.scorers.hpsv3 import prompt
from reward_servers.scorers.hpsv3.prompt import HpsV3Prompt, extract_prompt, read_prompt
from reward_servers.scorers.hpsv3.scorer import HpsV3Scorer
from tests.helpers.tiny_vision import HPSV3_PROMPT, HPSV3_TOKENS, hpsv3_state, write_hpsv3

# Made by tests/data/make_hpsv3_reference.py; see there.
REFERENCE = json.loads((Path(__file__).parents[4] / "data/hpsv3_reference.json").read_text(encoding="utf-8"))


def picture(height: int, width: int) -> ByteArray:
    return np.random.default_rng(height).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hpsv3(tmp_path_factory.mktemp("models") / "hpsv3")


@pytest.fixture(scope="module")
def scorer(directory: Path) -> HpsV3Scorer:
    return HpsV3Scorer.load(directory, "cpu")


@pytest.mark.parametrize("entry", REFERENCE, ids=lambda entry: f"{entry['height']}x{entry['width']}")
def test_scores_are_those_of_the_published_class(scorer: HpsV3Scorer, entry: dict[str, Any]) -> None:
    scores = scorer.score(picture(entry["height"], entry["width"]), [entry["prompt"]], [{}])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [entry["score"]], atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, MAX_ASPECT), (MAX_ASPECT, 1)])
def test_the_longest_pictures_are_scored(scorer: HpsV3Scorer, height: int, width: int) -> None:
    assert np.isfinite(scorer.score(picture(height, width), ["a"], [{}])).all()


def test_positions_of_images_would_score_otherwise(scorer: HpsV3Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published positions ignore the image's grid; transformers' own choice for this model would not."""
    entry = REFERENCE[0]
    inner = scorer._model.language_model.forward

    def on_a_grid(**inputs: torch.Tensor) -> object:
        positions = inputs["position_ids"].clone()
        positions[1:] = positions[1:] % 16
        return inner(**inputs | {"position_ids": positions})

    monkeypatch.setattr(scorer._model.language_model, "forward", on_a_grid)
    (score,) = scorer.score(picture(entry["height"], entry["width"]), [entry["prompt"]], [{}])
    assert abs(score - entry["score"]) > 1e-3


def test_a_score_does_not_depend_on_its_batch(scorer: HpsV3Scorer) -> None:
    images = np.concatenate([picture(40, 60), picture(40, 60)[:, ::-1], picture(40, 60) // 2])
    prompts = ["a", "a much longer prompt than that", ""]
    together = scorer.score(images, prompts, [{}] * 3)
    alone = [scorer.score(images[i : i + 1], prompts[i : i + 1], [{}])[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together) > 1e-3


def test_the_conversation_is_that_of_the_chat_template(scorer: HpsV3Scorer) -> None:
    tokens = scorer._tokens
    text = HPSV3_PROMPT["instruction"].format(text_prompt="a {red} cat") + HPSV3_PROMPT["request"]
    conversation = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokens("a {red} cat", 2) == tokens._tokenizer(conversation)["input_ids"]


@pytest.mark.parametrize("spelt", ["<|Reward|>", "<|image_pad|>", "<|im_end|>"])
def test_special_tokens_in_a_prompt_are_plain_characters(scorer: HpsV3Scorer, spelt: str) -> None:
    tokens = scorer._tokens
    assert tokens(f"a {spelt} b", 1).count(tokens.id_of(spelt)) == tokens("", 1).count(tokens.id_of(spelt))
    assert np.isfinite(scorer.score(picture(28, 28), [f"a {spelt} b"], [{}])).all()


def test_an_endless_prompt_is_rejected(scorer: HpsV3Scorer) -> None:
    with pytest.raises(RewardRejected, match="8194 bytes, at most 8192"):
        scorer.score(picture(28, 28).repeat(2, axis=0), ["fine", "é" * 4097], [{}, {}])


def test_weights_with_newer_names_are_the_same_model(scorer: HpsV3Scorer, tmp_path: Path) -> None:
    newer = {}
    for name, tensor in hpsv3_state().items():
        if name.startswith("visual."):
            newer[f"model.{name}"] = tensor
        elif name.startswith("model."):
            newer[f"model.language_model.{name.removeprefix('model.')}"] = tensor
        else:
            newer[name] = tensor
    assert HpsV3Scorer.load(write_hpsv3(tmp_path / "newer", newer), "cpu").weights_hash == scorer.weights_hash


def test_the_prompt_belongs_to_the_weights_hash(directory: Path, scorer: HpsV3Scorer, tmp_path: Path) -> None:
    other = write_hpsv3(tmp_path / "other")
    words = HPSV3_PROMPT | {"instruction": "Another: {text_prompt}"}
    (other / "prompt.json").write_text(json.dumps(words))
    assert HpsV3Scorer.load(other, "cpu").weights_hash != scorer.weights_hash


def test_the_body_runs_in_the_dtype_of_its_config_and_the_head_in_float32(scorer: HpsV3Scorer, tmp_path: Path) -> None:
    half = write_hpsv3(tmp_path / "half")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    loaded = HpsV3Scorer.load(half, "cpu")
    assert {parameter.dtype for parameter in loaded._model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded._head.parameters()} == {torch.float32}
    entry = REFERENCE[0]
    scores = loaded.score(picture(entry["height"], entry["width"]), [entry["prompt"]], [{}])
    np.testing.assert_allclose(scores, [entry["score"]], atol=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompt.json", "scorers.hpsv3.prompt"),
        ("config.json", r"config\.json is missing"),
        ("tokenizer.json", r"tokenizer\.json is missing"),
        ("HPSv3.safetensors", r"HPSv3\.safetensors is missing"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, message: str) -> None:
    directory = write_hpsv3(tmp_path / "hpsv3")
    (directory / name).unlink()
    with pytest.raises(ModelError, match=message):
        HpsV3Scorer.load(directory, "cpu")


def test_weights_must_match_one_to_one(tmp_path: Path) -> None:
    directory = write_hpsv3(tmp_path / "hpsv3")
    weights = directory / "HPSv3.safetensors"
    whole = load_file(weights)

    def load_with(change: dict[str, torch.Tensor], without: str = "") -> None:
        save_file({name: tensor for name, tensor in (whole | change).items() if name != without}, weights)
        HpsV3Scorer.load(directory, "cpu")

    with pytest.raises(ModelError, match="a tensor 'extra'"):
        load_with({"extra": torch.ones(1)})
    with pytest.raises(ModelError, match=r"missing keys, such as language_model\.norm\.weight"):
        load_with({}, without="model.norm.weight")
    with pytest.raises(ModelError, match="does not fit the architecture"):
        load_with({}, without="rm_head.5.bias")
    with pytest.raises(ModelError, match=f"embed {HPSV3_TOKENS + 1} tokens, the tokenizer has {HPSV3_TOKENS}"):
        load_with({"model.embed_tokens.weight": torch.ones(HPSV3_TOKENS + 1, 32)})
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="truncated or corrupt"):
        HpsV3Scorer.load(directory, "cpu")


def write_package(path: Path, source: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hpsv3/dataset/data_collator_qwen.py", source)
    return path


def test_the_prompt_is_read_from_the_package_without_running_it(tmp_path: Path) -> None:
    words = HpsV3Prompt(**HPSV3_PROMPT)
    source = f"raise SystemExit\nINSTRUCTION = {words.instruction!r}\nprompt_with_special_token = {words.request!r}\n"
    package = write_package(tmp_path / "hpsv3.whl", source)
    assert prompt.main([str(package), str(tmp_path)]) == 0
    assert read_prompt(tmp_path) == extract_prompt(package) == words
    assert json.loads((tmp_path / "prompt.json").read_text()) == asdict(words)


@pytest.mark.parametrize(
    "source", ["INSTRUCTION = 'no mark'\nprompt_with_special_token = '<|Reward|>'", "x = 1", "INSTRUCTION = (", ""]
)
def test_a_package_without_the_prompt_is_an_error(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    package = write_package(tmp_path / "hpsv3.whl", source)
    assert prompt.main([str(package), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("reward_servers.scorers.hpsv3.prompt: ")
    assert not (tmp_path / "prompt.json").exists()


def test_a_prompt_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    for text in ("{}", "[]", "nonsense", '{"instruction": "x", "request": "<|Reward|>"}'):
        (tmp_path / "prompt.json").write_text(text)
        with pytest.raises(ModelError):
            read_prompt(tmp_path)
