"""The scorers against an independent computation of the published recipes, written out here by hand."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from common.errors import ConfigError, ModelError
from common.rewards.api import MAX_ASPECT
from reward_servers.scorers.aesthetic import AestheticScorer
from reward_servers.scorers.clip import ClipScorer
from reward_servers.scorers.clipscore import ClipScoreScorer
from reward_servers.scorers.hps import HpsScorer, clean_text
from reward_servers.scorers.image_reward import ImageRewardScorer
from reward_servers.scorers.model_directory import read_weights
from reward_servers.scorers.pickscore import PickScoreScorer
from reward_servers.scorers.pixels import OPENAI_MEAN, OPENAI_STD
from reward_servers.scorers.torch_scorer import TorchScorer
from tests.helpers.published_checkpoints import write_aesthetic, write_image_reward
from tests.helpers.tiny_rewards import (
    CONTEXT,
    END_TOKEN,
    HPS_SETTINGS,
    IMAGE_SIZE,
    hps_state,
    random_images,
    write_hps,
    write_pickscore,
)

PROMPTS = ["a red cat", "", "naïve café — 東京", "x " * 200, "a <|endoftext|> b"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def hps_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hps(tmp_path_factory.mktemp("models") / "hps")


@pytest.fixture(scope="module")
def hps(hps_directory: Path) -> HpsScorer:
    return HpsScorer.load(hps_directory, "cpu")


@pytest.fixture(scope="module")
def pickscore_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickscore(tmp_path_factory.mktemp("models") / "pickscore")


@pytest.fixture(scope="module")
def pickscore(pickscore_directory: Path) -> PickScoreScorer:
    return PickScoreScorer.load(pickscore_directory, "cpu")


@pytest.fixture(scope="module")
def clipscore(pickscore_directory: Path) -> ClipScoreScorer:
    return ClipScoreScorer.load(pickscore_directory, "cpu")


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory: pytest.TempPathFactory) -> AestheticScorer:
    work = tmp_path_factory.mktemp("aesthetic")
    return AestheticScorer.load(write_aesthetic(work / "model", work), "cpu")


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory: pytest.TempPathFactory) -> ImageRewardScorer:
    work = tmp_path_factory.mktemp("image_reward")
    return ImageRewardScorer.load(write_image_reward(work / "model", work), "cpu")


@pytest.fixture(params=["hps", "pickscore", "clipscore"])
def clip_scorer(
    request: pytest.FixtureRequest, hps: HpsScorer, pickscore: PickScoreScorer, clipscore: ClipScoreScorer
) -> ClipScorer:
    return {"hps": hps, "pickscore": pickscore, "clipscore": clipscore}[request.param]


@pytest.fixture(params=["hps", "pickscore", "clipscore", "aesthetic", "image_reward"])
def scorer(
    request: pytest.FixtureRequest,
    hps: HpsScorer,
    pickscore: PickScoreScorer,
    clipscore: ClipScoreScorer,
    aesthetic: AestheticScorer,
    image_reward: ImageRewardScorer,
) -> TorchScorer:
    every = (hps, pickscore, clipscore, aesthetic, image_reward)
    return {one.name: one for one in every}[request.param]


def letters(text: str) -> list[int]:
    """Token ids of one lower-case ASCII word by the tiny vocabulary: bytes, the last one marked as a word's end."""
    table = [chr(code) for code in range(256)]
    printable = [c for c in table if 33 <= ord(c) <= 126 or 161 <= ord(c) <= 172 or ord(c) >= 174]
    alphabet = sorted([*printable, *(chr(256 + n) for n in range(256 - len(printable)))])
    ids = [alphabet.index(letter) for letter in text]
    return [*ids[:-1], ids[-1] + 256]


def attention(x: torch.Tensor, state: dict[str, torch.Tensor], name: str, heads: int, causal: bool) -> torch.Tensor:
    batch, length, width = x.shape
    q, k, v = (x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]).split(width, dim=-1)
    q, k, v = (part.reshape(batch, length, heads, width // heads).transpose(1, 2) for part in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(width // heads)
    if causal:
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    mixed = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
    return mixed @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def norm(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def tower(
    x: torch.Tensor, state: dict[str, torch.Tensor], name: str, layers: int, heads: int, causal: bool
) -> torch.Tensor:
    for layer in range(layers):
        block = f"{name}.resblocks.{layer}"
        x = x + attention(norm(x, state, f"{block}.ln_1"), state, f"{block}.attn", heads, causal)
        hidden = norm(x, state, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + hidden @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    return x


def open_clip_image(pixels: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    config = HPS_SETTINGS["vision_cfg"]
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=config["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], dim=1)
    x = norm(x + state["visual.positional_embedding"], state, "visual.ln_pre")
    heads = config["width"] // config["head_width"]
    x = tower(x, state, "visual.transformer", config["layers"], heads, causal=False)
    return norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]


def open_clip_text(ids: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    config = HPS_SETTINGS["text_cfg"]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = norm(tower(x, state, "transformer", config["layers"], config["heads"], causal=True), state, "ln_final")
    return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ state["text_projection"]


def test_hps_is_the_open_clip_forward(hps: HpsScorer) -> None:
    images = random_images(2)
    words = [[*letters("a"), *letters("red"), *letters("cat")], [*letters("blue")]]
    ids = torch.zeros(2, CONTEXT, dtype=torch.long)
    for row, tokens in enumerate(words):
        ids[row, : len(tokens) + 2] = torch.tensor([END_TOKEN - 1, *tokens, END_TOKEN])
    pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    state = hps_state()
    expected = F.cosine_similarity(open_clip_image(pixels, state), open_clip_text(ids, state))
    scores = hps.score(images, ["A  Red\ncat", "blue"], [{}, {}])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-6)


def test_pickscore_is_scaled_cosine_over_26(pickscore: PickScoreScorer, pickscore_directory: Path) -> None:
    model = CLIPModel.from_pretrained(pickscore_directory).eval()
    images = random_images(2)
    ids = torch.full((2, CONTEXT), END_TOKEN)
    for row, word in enumerate(["red", "blue"]):
        tokens = [END_TOKEN - 1, *letters(word)]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        pixels = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - MEAN) / STD
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal() / 26
    np.testing.assert_allclose(pickscore.score(images, ["red", "Blue"], [{}, {}]), expected.numpy(), atol=1e-6)
    assert pickscore.score_range[1] == pytest.approx(math.exp(float(model.logit_scale.detach())) / 26)


def test_the_end_token_is_found_whatever_the_config_says(pickscore: PickScoreScorer, tmp_path: Path) -> None:
    """Old CLIP configs declare end token 2, for which transformers pools at the highest id of a row instead."""
    legacy = PickScoreScorer.load(write_pickscore(tmp_path / "legacy", end_token=2), "cpu")
    images = random_images(len(PROMPTS))
    metadata = [{}] * len(PROMPTS)
    np.testing.assert_array_equal(legacy.score(images, PROMPTS, metadata), pickscore.score(images, PROMPTS, metadata))


def test_text_is_cleaned_as_open_clip_does() -> None:
    assert clean_text("  A  Cat &amp;amp;\n it’s schÃ¶n ") == "a cat & it's schön"


def test_tokens_end_in_the_one_true_end_token(clip_scorer: ClipScorer) -> None:
    ids, ends = clip_scorer._tokens(PROMPTS)
    assert ids.shape == (len(PROMPTS), CONTEXT)
    assert (ids[:, 0] == END_TOKEN - 1).all()
    for row, end in zip(ids, ends.tolist(), strict=True):
        assert (row[1:end] < END_TOKEN - 1).all()
        assert (row[end:] == END_TOKEN).all()
    assert ends.tolist()[1] == 1
    assert ends.tolist()[3] == CONTEXT - 1


def test_a_spelt_out_end_token_does_not_end_the_prompt(clip_scorer: ClipScorer) -> None:
    images = np.repeat(random_images(1), 2, axis=0)
    first, second = clip_scorer.score(images, ["a <|endoftext|> b", "a"], [{}, {}])
    assert abs(first - second) > 1e-4


def test_a_score_does_not_depend_on_its_batch(scorer: TorchScorer) -> None:
    images = random_images(len(PROMPTS), 40, 52)
    together = scorer.score(images, PROMPTS, [{}] * len(PROMPTS))
    alone = [scorer.score(images[i : i + 1], PROMPTS[i : i + 1], [{}])[0] for i in range(len(PROMPTS))]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert np.ptp(together) > 1e-3


def test_the_gradient_is_the_slope_of_the_score(scorer: TorchScorer) -> None:
    """At the model's own size: where a recipe rounds to 8 bits, its gradient is that of the recipe without rounding."""
    images = np.random.default_rng(3).uniform(0.2, 0.8, (2, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    prompts, metadata = ["a cat", "two dogs"], [{}, {}]
    _, gradients = scorer.score_with_gradient(images, prompts, metadata)
    assert gradients.shape == images.shape
    lengths = np.linalg.norm(gradients.reshape(2, -1), axis=1)
    assert (lengths > 1e-4).all()
    direction = gradients / lengths.reshape(2, 1, 1, 1)
    step = 1e-2
    ahead, _ = scorer.score_with_gradient(images + step * direction, prompts, metadata)
    behind, _ = scorer.score_with_gradient(images - step * direction, prompts, metadata)
    np.testing.assert_allclose((ahead - behind) / (2 * step), lengths, rtol=2e-2)


def test_scores_with_and_without_a_gradient_agree(scorer: TorchScorer) -> None:
    images = random_images(3, 44, 40)
    prompts, metadata = ["a cat", "two dogs", "a cat"], [{}] * 3
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    with_gradient, gradients = scorer.score_with_gradient(pixels, prompts, metadata)
    np.testing.assert_allclose(scorer.score(images, prompts, metadata), with_gradient, atol=1e-6)
    assert np.isfinite(gradients).all()


def test_a_gradient_does_not_depend_on_its_batch(scorer: TorchScorer) -> None:
    pixels = np.random.default_rng(4).uniform(0, 1, (2, 3, 36, 33)).astype(np.float32)
    prompts = ["a cat", "two dogs"]
    _, together = scorer.score_with_gradient(pixels, prompts, [{}, {}])
    for i in range(2):
        _, alone = scorer.score_with_gradient(pixels[i : i + 1], prompts[i : i + 1], [{}])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-3, atol=1e-5 * float(np.abs(together).max()))


def test_scores_lie_in_the_declared_range(scorer: TorchScorer) -> None:
    low, high = scorer.score_range
    pictures = [random_images(2, 30, 50), np.zeros((1, 30, 50, 3), np.uint8), np.full((1, 30, 50, 3), 255, np.uint8)]
    scores = scorer.score(np.concatenate(pictures), ["a", "b", "c", "d"], [{}] * 4)
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert (low <= scores).all()
    assert (scores <= high).all()


def test_half_precision_weights_are_read_as_float32(hps: HpsScorer, tmp_path: Path) -> None:
    half = HpsScorer.load(write_hps(tmp_path / "half", torch.float16), "cpu")
    images = random_images(2)
    np.testing.assert_allclose(
        half.score(images, ["a", "b"], [{}] * 2), hps.score(images, ["a", "b"], [{}] * 2), atol=5e-3
    )
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.float32}
    assert half.weights_hash != hps.weights_hash


def test_the_weights_hash_names_the_weights(hps: HpsScorer, hps_directory: Path) -> None:
    assert HpsScorer.load(hps_directory, "cpu").weights_hash == hps.weights_hash
    assert len(hps.weights_hash) == 32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json is missing"),
        ("open_clip_model.safetensors", "safetensors is missing"),
        ("vocab.json", "has no tokenizer"),
        ("merges.txt", "has no tokenizer"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, message: str) -> None:
    directory = write_hps(tmp_path / "hps")
    (directory / name).unlink()
    with pytest.raises(ModelError, match=message):
        HpsScorer.load(directory, "cpu")


def test_a_file_that_may_not_be_read_and_a_pointer_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hps_dir, pickscore_dir = write_hps(tmp_path / "hps"), write_pickscore(tmp_path / "pickscore")
    for weights in (hps_dir / "open_clip_model.safetensors", pickscore_dir / "model.safetensors"):
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4169\n")
    for scorer_class, directory in ((HpsScorer, hps_dir), (PickScoreScorer, pickscore_dir)):
        with pytest.raises(ModelError, match="safetensors is a Git LFS pointer, not the file itself: fetch it"):
            scorer_class.load(directory, "cpu")

    def forbidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("common.git_lfs.is_pointer", forbidden)
    with pytest.raises(ModelError, match=r"open_clip_model\.safetensors cannot be read: Permission denied"):
        read_weights(hps_dir / "open_clip_model.safetensors")


@pytest.mark.parametrize("size", [0, 7, 100, 20_000])
def test_truncated_weights_are_an_error(tmp_path: Path, size: int) -> None:
    hps_dir, pickscore_dir = write_hps(tmp_path / "hps"), write_pickscore(tmp_path / "pickscore")
    for weights in (hps_dir / "open_clip_model.safetensors", pickscore_dir / "model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelError, match="truncated or corrupt"):
        HpsScorer.load(hps_dir, "cpu")
    with pytest.raises(ModelError, match="no readable CLIPModel"):
        PickScoreScorer.load(pickscore_dir, "cpu")


def with_keys(section: str, **keys: object) -> str:
    """config.json of an HPS model with more keys in one section."""
    return json.dumps(HPS_SETTINGS | {section: HPS_SETTINGS.get(section, {}) | keys})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("not json", "cannot be read"),
        ("{}", "not an open_clip model config"),
        (json.dumps(HPS_SETTINGS | {"quick_gelu": True}), "quick_gelu"),
        (json.dumps(HPS_SETTINGS | {"embed_dim": 25}), "does not fit"),
        (json.dumps(HPS_SETTINGS | {"multimodal_cfg": {"width": 8}}), "multimodal_cfg is"),
        (json.dumps(HPS_SETTINGS | {"text_cfg": [8]}), "not an open_clip model config"),
        (with_keys("text_cfg", no_causal_mask=True), r"text_cfg\.no_causal_mask is True, which models of HPSv2 do not"),
        (with_keys("text_cfg", pool_type="first"), r"text_cfg\.pool_type is 'first'"),
        (with_keys("text_cfg", act_kwargs={"approximate": "tanh"}), r"text_cfg\.act_kwargs"),
        (with_keys("text_cfg", mlp_ratio=2.0), "does not fit"),
        (with_keys("text_cfg", hf_model_name="roberta-base"), r"text_cfg\.hf_model_name"),
        (
            with_keys("vision_cfg", layers=[2, 2]),
            r"vision_cfg\.layers is .*, but in models of HPSv2 it is a number",
        ),
        (with_keys("vision_cfg", image_size=[64, 64]), r"vision_cfg\.image_size is \[64, 64\], but"),
        (with_keys("vision_cfg", pool_type="avg"), r"vision_cfg\.pool_type is 'avg'"),
        (with_keys("vision_cfg", norm_kwargs={"eps": 1e-3}), r"vision_cfg\.norm_kwargs"),
        (with_keys("vision_cfg", no_ln_pre=True), r"vision_cfg\.no_ln_pre"),
        (with_keys("vision_cfg", ls_init_value=0.1), r"vision_cfg\.ls_init_value"),
        (with_keys("vision_cfg", image_mean=[0.5] * 3), r"vision_cfg\.image_mean"),
        (with_keys("preprocess_cfg", mean=[0.5] * 3), r"mean is \[0\.5, 0\.5, 0\.5\], but this scorer always applies"),
        (with_keys("preprocess_cfg", resize_mode="squash"), "resize_mode is squash, but"),
        (json.dumps(HPS_SETTINGS | {"text_cfg": HPS_SETTINGS["text_cfg"] | {"vocab_size": 500}}), "tokens"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(tmp_path: Path, settings: str, message: str) -> None:
    directory = write_hps(tmp_path / "hps")
    (directory / "config.json").write_text(settings)
    with pytest.raises(ModelError, match=message):
        HpsScorer.load(directory, "cpu")


def test_open_clip_s_defaults_written_out_pass(hps: HpsScorer, tmp_path: Path) -> None:
    vision = {"pool_type": "tok", "patch_dropout": 0.1, "ls_init_value": None, "timm_pool": "avg", "norm_kwargs": {}}
    text = {"pool_type": "argmax", "mlp_ratio": 4.0, "no_causal_mask": False, "hf_pooler_type": "mean_pooler"}
    prepared = {"size": 224, "mean": OPENAI_MEAN, "std": [round(value, 5) for value in OPENAI_STD], "fill_color": 0}
    settings = {
        "vision_cfg": HPS_SETTINGS["vision_cfg"] | vision,
        "text_cfg": HPS_SETTINGS["text_cfg"] | text,
        "preprocess_cfg": prepared,
    }
    directory = write_hps(tmp_path / "hps")
    (directory / "config.json").write_text(json.dumps(HPS_SETTINGS | settings))
    images = random_images(1, 20, 30)
    scores = HpsScorer.load(directory, "cpu").score(images, ["a"], [{}])
    assert scores == pytest.approx(hps.score(images, ["a"], [{}]), abs=1e-6)


def test_weights_must_match_one_to_one(tmp_path: Path) -> None:
    hps_dir, pickscore_dir = write_hps(tmp_path / "hps"), write_pickscore(tmp_path / "pickscore")
    state = hps_state()
    save_file(state | {"extra": torch.ones(1)}, hps_dir / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match="'extra'"):
        HpsScorer.load(hps_dir, "cpu")
    del state["ln_final.bias"]
    save_file(state, hps_dir / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor 'ln_final\.bias'"):
        HpsScorer.load(hps_dir, "cpu")
    state = load_file(pickscore_dir / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, pickscore_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys, such as text_projection\.weight"):
        PickScoreScorer.load(pickscore_dir, "cpu")


def test_a_scorer_without_its_model_says_so(scorer: TorchScorer) -> None:
    with pytest.raises(ModelError, match=f"the {scorer.name} scorer needs its model directory: pass --model DIR"):
        type(scorer).load(None, "cpu")


@pytest.mark.parametrize(("height", "width"), [(1, MAX_ASPECT), (MAX_ASPECT, 1)])
def test_the_longest_pictures_have_scores_and_gradients(scorer: TorchScorer, height: int, width: int) -> None:
    images = random_images(2, height, width)
    scores = scorer.score(images, ["a", "b"], [{}] * 2)
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    same, gradients = scorer.score_with_gradient(pixels, ["a", "b"], [{}] * 2)
    np.testing.assert_allclose(scores, same, atol=1e-5)
    assert np.isfinite(gradients).all()
    np.testing.assert_allclose(scores[1:], scorer.score(images[1:], ["b"], [{}]), atol=1e-6)


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_a_device_that_is_none_is_named_with_a_remedy(device: str, hps_directory: Path) -> None:
    with pytest.raises(ConfigError, match=f"--device {device} cannot be used: .*; usable here: cpu"):
        HpsScorer.load(hps_directory, device)
