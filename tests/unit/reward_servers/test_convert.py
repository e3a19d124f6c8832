"""The conversion of published checkpoints, on tiny files of their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer

from reward_servers import convert
from reward_servers.convert import main
from reward_servers.convert_published import HPS_SETTINGS as PUBLISHED_HPS
from reward_servers.convert_published import IMAGE_REWARD_SETTINGS as PUBLISHED_IMAGE_REWARD
from reward_servers.scorers.aesthetic import AestheticScorer
from reward_servers.scorers.hps import HpsScorer, clip_config
from reward_servers.scorers.image_reward import ImageRewardModel, ImageRewardScorer
from tests.helpers.published_checkpoints import (
    IMAGE_REWARD_SETTINGS,
    published_head,
    published_image_reward,
    write_bert_vocabulary,
)
from tests.helpers.tiny_rewards import (
    CLIP_FEATURES,
    HPS_SETTINGS,
    hps_state,
    random_images,
    write_hps,
    write_pickscore,
    write_tokenizer,
)

IMAGES, PROMPTS, METADATA = random_images(2), ["a cat", "two dogs"], [{}, {}]


class Convertible:
    """A folder with everything the three conversions read, and the command line of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "models" / "out"
        self.tokenizer = folder / "tokenizer"
        self.tokenizer.mkdir()
        write_tokenizer(self.tokenizer)
        write_bert_vocabulary(folder / "bert")
        (folder / "hps.json").write_text(json.dumps(HPS_SETTINGS))
        (folder / "image_reward.json").write_text(json.dumps(IMAGE_REWARD_SETTINGS))

    def save(self, content: Any) -> Path:
        path = self.folder / "published.pt"
        torch.save(content, path)
        return path

    def command(self, scorer: str, checkpoint: Path) -> list[str]:
        options = {
            "hps": f"--version 2.1 --tokenizer {self.tokenizer} --architecture {self.folder / 'hps.json'}",
            "aesthetic": f"--clip {self.folder / 'clip'}",
            "image_reward": f"--tokenizer {self.folder / 'bert'} --architecture {self.folder / 'image_reward.json'}",
        }
        return [scorer, str(checkpoint), "--out", str(self.out), *options[scorer].split()]

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.out.parent.glob("*")) if self.out.parent.exists() else []


@pytest.fixture
def convertible(tmp_path: Path) -> Convertible:
    return Convertible(tmp_path)


def published_hps(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """As HPS_v2.1_compressed.pt: the tensors beside what training left in the file."""
    return {"epoch": 1, "name": "hps", "state_dict": {name: tensor.to(dtype) for name, tensor in hps_state().items()}}


@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_hps_is_converted_in_its_own_float_type_and_keeps_its_version(
    convertible: Convertible, capsys: pytest.CaptureFixture[str], tmp_path: Path, version: str
) -> None:
    command = convertible.command("hps", convertible.save(published_hps(torch.float16)))
    command[command.index("2.1")] = version
    assert main(command) == 0
    scorer = HpsScorer.load(convertible.out, "cpu")
    said = capsys.readouterr().out
    assert scorer.version == version
    assert f"hps {version}, weights {scorer.weights_hash}" in said
    assert f"python -m reward_servers --scorer hps --model {convertible.out}" in said
    kept = load_file(convertible.out / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    half = HpsScorer.load(write_hps(tmp_path / "half", torch.float16), "cpu")
    np.testing.assert_array_equal(scorer.score(IMAGES, PROMPTS, METADATA), half.score(IMAGES, PROMPTS, METADATA))
    assert convertible.leftovers() == ["out"]


@pytest.mark.parametrize("name", ["bare.pt", "HPS.safetensors"])
def test_hps_is_converted_from_its_tensors_alone(convertible: Convertible, tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / name
    save_file(hps_state(), checkpoint) if name.endswith("tensors") else torch.save(hps_state(), checkpoint)
    assert main(convertible.command("hps", checkpoint)) == 0
    expected = HpsScorer.load(write_hps(tmp_path / "own"), "cpu").weights_hash
    assert HpsScorer.load(convertible.out, "cpu").weights_hash == expected
    readable = convertible.folder / "readable"
    readable.touch()
    assert {path.stat().st_mode for path in convertible.out.iterdir()} == {readable.stat().st_mode}


def test_a_full_disk_is_named_and_leaves_nothing(
    convertible: Convertible, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(convert, "save_file", full)
    said = refused(convertible, convertible.command("hps", convertible.save(published_hps())), capsys)
    assert f"the conversion failed: {convertible.out}: No space left on device; free space there" in said


def test_a_git_lfs_pointer_is_named(convertible: Convertible, capsys: pytest.CaptureFixture[str]) -> None:
    path = convertible.folder / "published.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4169\n")
    told = refused(convertible, convertible.command("hps", path), capsys)
    assert "published.pt is a Git LFS pointer, not the file itself: fetch it with git lfs pull" in told


def test_a_directory_that_names_no_release_says_so(tmp_path: Path) -> None:
    assert HpsScorer.load(write_hps(tmp_path / "own"), "cpu").version == "unreleased"


def test_aesthetic_takes_the_image_half_of_clip(convertible: Convertible) -> None:
    write_pickscore(convertible.folder / "clip")
    assert main(convertible.command("aesthetic", convertible.save(published_head(CLIP_FEATURES)))) == 0
    assert sorted(path.name for path in convertible.out.iterdir()) == [
        "config.json",
        "head.safetensors",
        "model.safetensors",
    ]
    assert not any("text" in name for name in load_file(convertible.out / "model.safetensors"))
    assert AestheticScorer.load(convertible.out, "cpu").version == "2"


def test_image_reward_is_renamed_one_to_one(convertible: Convertible) -> None:
    published = published_image_reward()
    assert main(convertible.command("image_reward", convertible.save(published))) == 0
    kept = load_file(convertible.out / "model.safetensors")
    # The two contrastive projections and the table of positions are not read; the two constants come from the code.
    assert len(kept) == len(published) - 5 + 2
    torch.testing.assert_close(
        kept["text_model.encoder.layer.1.crossattention.self.key.weight"],
        published["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"],
    )
    assert ImageRewardScorer.load(convertible.out, "cpu").version == "tiny"


def test_the_published_architectures_are_as_large_as_the_published_models(convertible: Convertible) -> None:
    """ViT-H-14 has 986.11 M parameters (open_clip's table); ImageReward.pt is 1.79 GB of float32.

    The latter counts BLIP's two projections to 256 numbers, which the reward does not read.
    """
    with torch.device("meta"):
        hps = CLIPModel(clip_config(PUBLISHED_HPS, CLIPTokenizer.from_pretrained(convertible.tokenizer)))
        image_reward = ImageRewardModel(PUBLISHED_IMAGE_REWARD["vision"], PUBLISHED_IMAGE_REWARD["text"])
    projections = (1024 + 1) * 256 + (768 + 1) * 256
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (hps, image_reward)]
    assert round(parameters[0] / 1e6, 2) == 986.11
    assert round((parameters[1] + projections) * 4 / 1e9, 2) == 1.79


def refused(convertible: Convertible, command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a conversion that must fail: exit code 2, one line, nothing left behind."""
    before = convertible.leftovers()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert convertible.leftovers() == before
    return said


@pytest.mark.parametrize("scorer", ["hps", "aesthetic", "image_reward"])
def test_unreadable_files_are_refused(
    convertible: Convertible, capsys: pytest.CaptureFixture[str], scorer: str
) -> None:
    path = convertible.save(published_hps())
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        assert "published.pt is corrupt" in refused(convertible, convertible.command(scorer, path), capsys)
    path.unlink()
    assert "published.pt cannot be read" in refused(convertible, convertible.command(scorer, path), capsys)


class Hostile:
    """Would run a command when unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('owned', 'w')",)


def test_a_file_that_could_run_code_is_refused_and_runs_none(
    convertible: Convertible, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(convertible.folder)
    path = convertible.save(published_hps() | {"optimizer": Hostile()})
    assert "could run code" in refused(convertible, convertible.command("hps", path), capsys)
    assert not (convertible.folder / "owned").exists()


@pytest.mark.parametrize(
    ("scorer", "content", "message"),
    [
        ("hps", published_head(24), "no tensor 'logit_scale'"),
        ("hps", {"epoch": 3}, "is not an HPSv2 checkpoint"),
        ("hps", {"state_dict": {}}, "is not an HPSv2 checkpoint"),
        ("hps", {"state_dict": published_head(24)}, "no tensor 'logit_scale'"),
        ("hps", [1, 2], "holds a list"),
        ("hps", torch.ones(3), "holds a Tensor"),
        ("aesthetic", {"state_dict": published_head(24)}, "is not a head of the aesthetic predictor"),
        ("aesthetic", published_head(25), "does not fit"),
        ("aesthetic", published_image_reward(), "does not fit"),
        ("image_reward", published_head(24), "a tensor named 'layers.0.weight'"),
        ("image_reward", {"epoch": 3}, "is not an ImageReward checkpoint"),
    ],
)
def test_the_wrong_checkpoint_is_named(
    convertible: Convertible, capsys: pytest.CaptureFixture[str], scorer: str, content: Any, message: str
) -> None:
    write_pickscore(convertible.folder / "clip")
    command = convertible.command(scorer, convertible.save(content))
    assert message in refused(convertible, command, capsys)


def test_a_missing_tensor_is_found_before_anything_is_published(
    convertible: Convertible, capsys: pytest.CaptureFixture[str]
) -> None:
    published = published_image_reward()
    del published["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    command = convertible.command("image_reward", convertible.save(published))
    assert "does not fit" in refused(convertible, command, capsys)


def test_weights_that_are_not_finite_are_refused(convertible: Convertible, capsys: pytest.CaptureFixture[str]) -> None:
    published = published_hps()
    published["state_dict"]["visual.proj"][0, 0] = float("nan")
    command = convertible.command("hps", convertible.save(published))
    assert "its weights are damaged" in refused(convertible, command, capsys)


def test_what_exists_is_not_overwritten(convertible: Convertible, capsys: pytest.CaptureFixture[str]) -> None:
    command = convertible.command("hps", convertible.save(published_hps()))
    convertible.out.mkdir(parents=True)
    assert "exists: choose another directory" in refused(convertible, command, capsys)


def test_a_directory_without_a_tokenizer_is_refused(
    convertible: Convertible, capsys: pytest.CaptureFixture[str]
) -> None:
    command = convertible.command("hps", convertible.save(published_hps()))
    for path in convertible.tokenizer.iterdir():
        path.unlink()
    assert "holds none of tokenizer.json" in refused(convertible, command, capsys)


def test_an_unknown_release_is_a_usage_error(convertible: Convertible, capsys: pytest.CaptureFixture[str]) -> None:
    command = convertible.command("hps", convertible.save(published_hps()))
    command[command.index("2.1")] = "3.0"
    with pytest.raises(SystemExit):
        main(command)
    assert "invalid choice: '3.0'" in capsys.readouterr().err
