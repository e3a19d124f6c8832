"""Weights as older versions and training scripts save them, in every scorer that reads weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from reward_servers.convert import convert_aesthetic, convert_hps, convert_image_reward
from reward_servers.scorers.aesthetic import AestheticScorer
from reward_servers.scorers.base import Scorer
from reward_servers.scorers.clipscore import ClipScoreScorer
from reward_servers.scorers.geneval.scorer import GenevalPartsScorer, GenevalScorer
from reward_servers.scorers.hps import HpsScorer
from reward_servers.scorers.hpsv3.scorer import HpsV3Scorer
from reward_servers.scorers.image_reward import ImageRewardScorer
from reward_servers.scorers.pickscore import PickScoreScorer
from reward_servers.scorers.processor import clip_processor, require_processor
from tests.helpers.published_checkpoints import (
    IMAGE_REWARD_SETTINGS,
    published_head,
    published_image_reward,
    write_aesthetic,
    write_bert_vocabulary,
    write_image_reward,
)
from tests.helpers.tiny_rewards import (
    CLIP_FEATURES,
    HPS_SETTINGS,
    hps_state,
    write_hps,
    write_pickscore,
    write_tokenizer,
)
from tests.helpers.tiny_vision import write_geneval, write_hpsv3

State = dict[str, torch.Tensor]
WRITERS: Mapping[type[Scorer], Callable[[Path, Path], Path]] = {
    HpsScorer: lambda path, _: write_hps(path),
    PickScoreScorer: lambda path, _: write_pickscore(path),
    ClipScoreScorer: lambda path, _: write_pickscore(path),
    AestheticScorer: write_aesthetic,
    ImageRewardScorer: write_image_reward,
    HpsV3Scorer: lambda path, _: write_hpsv3(path),
    GenevalScorer: lambda path, _: write_geneval(path),
    GenevalPartsScorer: lambda path, _: write_geneval(path),
}


@pytest.fixture(scope="module", params=WRITERS, ids=lambda scorer: scorer.name)
def scorer_class(request: pytest.FixtureRequest) -> type[Scorer]:
    return request.param


@pytest.fixture(scope="module")
def clean(scorer_class: type[Scorer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp(scorer_class.name)
    return WRITERS[scorer_class](work / "clean", work)


def changed(clean: Path, path: Path, change: Callable[[State], State]) -> Path:
    """A copy of a model directory with every file of weights changed."""
    shutil.copytree(clean, path)
    for file in path.rglob("*.safetensors"):
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return path


@pytest.mark.usefixtures("one_thread")
def test_bookkeeping_of_older_versions_passes(scorer_class: type[Scorer], clean: Path, tmp_path: Path) -> None:
    """Beside a real weight, as they lay in the published files; the weights are the same, and so is their hash."""

    def with_bookkeeping(state: State) -> State:
        beside = min(state, key=len).rpartition(".")[0]
        names = ("position_ids", "relative_position_index", "num_batches_tracked", "rotary_emb.inv_freq")
        return state | {f"{beside}.{name}".lstrip("."): torch.zeros(2, 2, dtype=torch.int64) for name in names}

    if scorer_class is HpsV3Scorer:
        older = changed(clean, tmp_path / "older", lambda state: state | {"model.rotary_emb.inv_freq": torch.ones(4)})
    else:
        older = changed(clean, tmp_path / "older", with_bookkeeping)
    found, expected = scorer_class.load(older, "cpu"), scorer_class.load(clean, "cpu")
    assert found.weights_hash == expected.weights_hash
    check = found.check_request()
    scores = [each.score(check.images_BHWC, check.prompts, check.metadata) for each in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


OWN_SETTINGS = (HpsScorer, ImageRewardScorer)
"""These scorers read a config.json of our own, and no image processor."""


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_an_image_processor_that_prepares_otherwise_is_refused(
    scorer_class: type[Scorer], clean: Path, tmp_path: Path, file: str
) -> None:
    if scorer_class in OWN_SETTINGS:
        return
    folder = "detector" if scorer_class is GenevalPartsScorer else "clip" if scorer_class is GenevalScorer else "."
    path = shutil.copytree(clean, tmp_path / "copy") / folder
    other = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / file).write_text(json.dumps(other if file.startswith("pre") else {"image_processor": other}))
    with pytest.raises(ModelError, match=rf"{file}: image_mean is \[0\.5, .*\], but this scorer always applies"):
        scorer_class.load(tmp_path / "copy", "cpu")


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("size", 64, False),
        ("size", {"height": 64, "width": 64}, True),
        ("crop_size", {"height": 64, "width": 64}, False),
        ("crop_size", 32, True),
        ("resample", 2, True),
        ("do_center_crop", False, True),
        ("do_normalize", True, False),
        ("rescale_factor", 0.00392156862745098, False),
        ("image_mean", [0.48145466, 0.4578275, 0.40821073], False),
        ("image_std", [0.229, 0.224, 0.225], True),
        ("do_convert_rgb", False, False),
        ("image_mean", None, False),
    ],
)
def test_a_processor_is_compared_with_that_of_clip(tmp_path: Path, key: str, value: object, refused: bool) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: value}))
    if not refused:
        require_processor(tmp_path, clip_processor(64))
        return
    with pytest.raises(ModelError, match=f"{key} is "):
        require_processor(tmp_path, clip_processor(64))


def test_swins_saved_index_passes(tmp_path: Path) -> None:
    """facebook/mask2former-swin-small-coco-instance has it beside every table of relative positions."""
    path = write_geneval(tmp_path / "geneval")
    file = path / "detector" / "model.safetensors"
    state = load_file(file)
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    assert len(tables) == 4
    saved = {name.replace("bias_table", "index"): torch.zeros(16, 16, dtype=torch.int64) for name in tables}
    before = GenevalScorer.load(path, "cpu").weights_hash
    save_file(state | saved, file, metadata={"format": "pt"})
    assert GenevalScorer.load(path, "cpu").weights_hash == before


@pytest.mark.parametrize("foreign", ["foreign.weight", "position_ids.weight"])
def test_a_foreign_weight_is_refused(scorer_class: type[Scorer], clean: Path, tmp_path: Path, foreign: str) -> None:
    path = changed(clean, tmp_path / "foreign", lambda state: state | {foreign: torch.zeros(2)})
    with pytest.raises(ModelError, match=foreign):
        scorer_class.load(path, "cpu")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
def test_a_training_wrappers_prefix_is_removed(
    scorer_class: type[Scorer], clean: Path, tmp_path: Path, prefix: str
) -> None:
    wrapped = changed(clean, tmp_path / "wrapped", lambda state: {f"{prefix}{name}": state[name] for name in state})
    assert scorer_class.load(wrapped, "cpu").weights_hash == scorer_class.load(clean, "cpu").weights_hash


def test_a_prefix_that_one_weight_lacks_is_refused(scorer_class: type[Scorer], clean: Path, tmp_path: Path) -> None:
    def all_but_one(state: State) -> State:
        return {name if name == min(state) else f"module.{name}": value for name, value in state.items()}

    with pytest.raises(ModelError, match=r"missing keys|module\.|does not fit|no tensor"):
        scorer_class.load(changed(clean, tmp_path / "half", all_but_one), "cpu")


def test_published_checkpoints_with_a_prefix_are_converted(tmp_path: Path) -> None:
    """Once with the prefix and once without: the model directories are equal."""
    write_tokenizer_of(tmp_path / "tokenizer")
    write_bert_vocabulary(tmp_path / "bert")
    write_pickscore(tmp_path / "clip")

    def saved(name: str, content: object) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    for prefix in ("", "module.", "_orig_mod."):

        def wrapped(state: State, prefix: str = prefix) -> State:
            return {f"{prefix}{name}": value for name, value in state.items()}

        out = tmp_path / f"out{prefix}"
        hps = saved("hps.pt", {"state_dict": wrapped(hps_state())})
        convert_hps(hps, out / "hps", "2.1", tmp_path / "tokenizer", HPS_SETTINGS)
        convert_aesthetic(
            saved("head.pth", wrapped(published_head(CLIP_FEATURES))), out / "aesthetic", tmp_path / "clip"
        )
        image_reward = saved("image_reward.pt", wrapped(published_image_reward()))
        convert_image_reward(image_reward, out / "image_reward", tmp_path / "bert", IMAGE_REWARD_SETTINGS)
    for file in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        for prefix in ("module.", "_orig_mod."):
            assert (tmp_path / f"out{prefix}" / file.relative_to(tmp_path / "out")).read_bytes() == file.read_bytes()


def write_tokenizer_of(directory: Path) -> None:
    directory.mkdir()
    write_tokenizer(directory)


def test_a_sharded_model_with_a_prefix_is_read(tmp_path: Path) -> None:
    """Its index names the prefixed weights too."""
    path = write_pickscore(tmp_path / "clip")
    before = PickScoreScorer.load(path, "cpu").weights_hash
    state = {f"module.{name}": value for name, value in load_file(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in shards.items():
        save_file({name: state[name] for name in chosen}, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, chosen in shards.items() for name in chosen}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert PickScoreScorer.load(path, "cpu").weights_hash == before


def test_a_half_precision_copy_alone_is_read(tmp_path: Path) -> None:
    path = write_pickscore(tmp_path / "clip")
    before = PickScoreScorer.load(path, "cpu").weights_hash
    (path / "model.safetensors").rename(path / "model.fp16.safetensors")
    assert PickScoreScorer.load(path, "cpu").weights_hash == before


@pytest.mark.parametrize(
    ("scorer", "part"), [(PickScoreScorer, ""), (GenevalScorer, "detector"), (GenevalScorer, "clip"), (HpsV3Scorer, "")]
)
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantised_weights_are_refused(tmp_path: Path, scorer: type[Scorer], part: str, method: str) -> None:
    path = WRITERS[scorer](tmp_path / "quantised", tmp_path)
    file = path / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
    expected = rf"{file.parent} are quantised \(quantization_config\.quant_method = {method}\), and scores are those"
    with pytest.raises(ModelError, match=expected):
        scorer.load(path, "cpu")


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")])
def test_a_quantised_weight_is_refused_whatever_the_configuration_says(
    scorer_class: type[Scorer], clean: Path, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    """As a float it would be a weight without its scale: the scores would be wrong."""

    def cast(state: State) -> State:
        name = next(name for name in sorted(state) if state[name].ndim == 2)
        return state | {name: state[name].to(dtype)}

    with pytest.raises(ModelError, match=rf"\.safetensors are quantised \(.* is {kind}\), and scores are those of the"):
        scorer_class.load(changed(clean, tmp_path / "quantised", cast), "cpu")


@pytest.mark.parametrize("moved", [False, True])
def test_an_unmerged_lora_is_named(scorer_class: type[Scorer], clean: Path, tmp_path: Path, moved: bool) -> None:
    """As peft saves a model that has one, or written among the model's own weights."""
    named: list[str] = []

    def adapted(state: State) -> State:
        name = next(name for name in sorted(state) if state[name].ndim == 2 and name.endswith(".weight"))
        base = name.removesuffix(".weight")
        lora = {f"{base}.lora_{half}.default.weight": torch.ones(2, 2) for half in "AB"}
        named.append(f"{base}.base_layer.weight" if moved else f"{base}.lora_A.default.weight")
        if moved:
            return {
                f"{base}.base_layer.weight" if each == name else each: value for each, value in state.items()
            } | lora
        return state | lora

    path = changed(clean, tmp_path / "adapted", adapted)
    with pytest.raises(
        ModelError, match=r"have an unmerged LoRA \(.*\), and only merged .*: merge and unload it"
    ) as error:
        scorer_class.load(path, "cpu")
    assert any(f"({name})" in str(error.value) for name in named)


def test_an_adapter_beside_the_weights_is_refused(scorer_class: type[Scorer], clean: Path, tmp_path: Path) -> None:
    """transformers adds it to the weights where peft is installed: a merged model would have it twice."""
    path = shutil.copytree(clean, tmp_path / "adapted")
    folders = {file.parent for file in path.rglob("*.safetensors")}
    for folder in folders:
        file = folder / "adapter_config.json"
        file.write_text('{"peft_type": "LORA"}')
        with pytest.raises(
            ModelError, match=rf"the model in {folder} has an adapter beside its weights \(adapter_config"
        ):
            scorer_class.load(path, "cpu")
        file.unlink()
    assert scorer_class.load(path, "cpu").weights_hash == scorer_class.load(clean, "cpu").weights_hash


@pytest.mark.parametrize(
    ("scorer", "part"),
    [(PickScoreScorer, ""), (ClipScoreScorer, ""), (AestheticScorer, ""), (GenevalScorer, "detector")],
)
@pytest.mark.parametrize("other", ["pytorch_model.bin", None])
def test_a_model_without_safetensors_is_named_with_its_remedy(
    tmp_path: Path, scorer: type[Scorer], part: str, other: str | None
) -> None:
    path = WRITERS[scorer](tmp_path / "old", tmp_path)
    (path / part / "model.safetensors").rename(path / part / "model")
    if other:
        (path / part / other).write_bytes(b"weights")
    found = r" but pytorch_model\.bin" if other else ""
    expected = rf"there is no model\.safetensors in {path / part}{found}: load the model with transformers and save it"
    with pytest.raises(ModelError, match=expected):
        scorer.load(path, "cpu")


def test_a_checkpoint_that_was_not_converted_is_named(tmp_path: Path) -> None:
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"weights")
    expected = r"config\.json is missing: convert HPS_v2\.1_compressed\.pt, which is there, with rtdmd convert"
    with pytest.raises(ModelError, match=expected):
        HpsScorer.load(tmp_path, "cpu")


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("beside", ["optimizer.safetensors", "adapter_model.safetensors", "model.fp8.safetensors"])
def test_files_that_are_not_read_do_not_matter(tmp_path: Path, variant: str, beside: str) -> None:
    """A wrapped model is read beside other files, which lack its prefix or are quantised."""
    path = write_pickscore(tmp_path / "clip")
    before = PickScoreScorer.load(path, "cpu").weights_hash
    state = {f"module.{name}": value for name, value in load_file(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    save_file(state, path / f"model{variant}.safetensors", metadata={"format": "pt"})
    save_file({"step": torch.zeros(2).to(torch.float8_e4m3fn)}, path / beside)
    assert PickScoreScorer.load(path, "cpu").weights_hash == before


def test_a_copy_without_the_prefix_beside_a_wrapped_model_does_not_matter(tmp_path: Path) -> None:
    path = write_pickscore(tmp_path / "clip")
    before = PickScoreScorer.load(path, "cpu").weights_hash
    state = load_file(path / "model.safetensors")
    save_file(state, path / "model.fp16.safetensors", metadata={"format": "pt"})
    wrapped = {f"module.{name}": value for name, value in state.items()}
    save_file(wrapped, path / "model.safetensors", metadata={"format": "pt"})
    assert PickScoreScorer.load(path, "cpu").weights_hash == before
