"""CLIPScore, the aesthetic predictor and ImageReward against their published recipes, written out here by hand.

The models are tiny and random; ImageReward's reference reads the checkpoint under its published names, so the renaming
of the conversion is part of what is compared.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from common.errors import ModelError
from common.rewards.api import ByteArray
from reward_servers.scorers.aesthetic import AestheticScorer
from reward_servers.scorers.clipscore import ClipScoreScorer
from reward_servers.scorers.image_reward import ImageRewardScorer
from tests.helpers.published_checkpoints import (
    BERT_WORDS,
    IMAGE_REWARD_SETTINGS,
    published_head,
    published_image_reward,
    write_aesthetic,
    write_bert_vocabulary,
    write_image_reward,
)
from tests.helpers.tiny_rewards import CLIP_FEATURES, CONTEXT, END_TOKEN, IMAGE_SIZE, random_images, write_pickscore

SIZES = [(32, 32), (37, 91), (64, 35), (20, 33)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
# A grey level in a few pixels, where Pillow and torch round a tie apart, moves these scores by less.
RECIPE_TOLERANCE = 2e-4

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pickscore(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def aesthetic_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("aesthetic")
    return write_aesthetic(work / "model", work)


@pytest.fixture(scope="module")
def image_reward_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("image_reward")
    return write_image_reward(work / "model", work)


def pillow_recipe(images_BHWC: ByteArray) -> torch.Tensor:
    """torchvision's Resize(bicubic), CenterCrop, ToTensor, Normalize on Pillow pictures."""
    rows = []
    for image in images_BHWC:
        height, width = image.shape[:2]
        size = (int(IMAGE_SIZE * width / min(height, width)), int(IMAGE_SIZE * height / min(height, width)))
        left, top = (round((side - IMAGE_SIZE) / 2) for side in size)
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        rows.append(resized[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
    return (torch.tensor(np.stack(rows)).permute(0, 3, 1, 2) / 255 - MEAN) / STD


def published_layers(features: torch.Tensor, head: State) -> torch.Tensor:
    for name in (0, 2, 4, 6, 7):
        features = features @ head[f"layers.{name}.weight"].T + head[f"layers.{name}.bias"]
    return features[:, 0]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clipscore_is_logits_over_100_of_a_bilinear_resize(clip_directory: Path, height: int, width: int) -> None:
    model = CLIPModel.from_pretrained(clip_directory).eval()
    images = random_images(2, height, width)
    size = [int(IMAGE_SIZE * side / min(height, width)) for side in (height, width)]
    top, left = (round((side - IMAGE_SIZE) / 2) for side in size)
    pixels = torch.tensor(images).permute(0, 3, 1, 2) / 255
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    pixels = (pixels[..., top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] - MEAN) / STD
    # Single letters of the tiny vocabulary: "a" and "b" are the ends of words, hence 256 further on.
    ids = torch.full((2, CONTEXT), END_TOKEN)
    ids[:, 0] = END_TOKEN - 1
    ids[:, 1] = torch.tensor([ord("a"), ord("b")]) - ord("!") + 256
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal() / 100
    scorer = ClipScoreScorer.load(clip_directory, "cpu")
    np.testing.assert_allclose(scorer.score(images, ["a", "B"], [{}, {}]), expected.numpy(), atol=1e-6)
    assert scorer.score_range[1] == pytest.approx(math.exp(float(model.logit_scale.detach())) / 100)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_aesthetic_is_the_head_on_the_normalised_embedding(
    clip_directory: Path, aesthetic_directory: Path, height: int, width: int
) -> None:
    images = random_images(3, height, width)
    with torch.no_grad():
        clip = CLIPModel.from_pretrained(clip_directory).eval()
        embeddings = clip.get_image_features(pixel_values=pillow_recipe(images)).pooler_output
    embeddings = embeddings / torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    expected = published_layers(embeddings, published_head(CLIP_FEATURES))
    scores = AestheticScorer.load(aesthetic_directory, "cpu").score(images, ["a", "b", ""], [{}] * 3)
    np.testing.assert_allclose(scores, expected.numpy(), atol=RECIPE_TOLERANCE)


def test_the_range_of_an_affine_head_is_reached(aesthetic_directory: Path) -> None:
    scorer = AestheticScorer.load(aesthetic_directory, "cpu")
    slope, _ = scorer._model.head.affine()
    with torch.no_grad():
        best = scorer._model.head((slope / slope.norm())[None].float())
        worst = scorer._model.head((-slope / slope.norm())[None].float())
    assert (float(worst), float(best)) == pytest.approx(scorer.score_range, abs=1e-5)


def norm(x: torch.Tensor, state: State, name: str, epsilon: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], epsilon)


def linear(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of 2 heads: [B, L, D], [B, N, D], [B, N, D] -> [B, L, D]; mask [B, N] is 0 for what is not seen."""
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits - 10_000.0 * (1 - mask)[:, None, None, :]
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def blip_vision(pixels: torch.Tensor, state: State) -> torch.Tensor:
    """BLIP's ViT under timm's names."""
    name = "blip.visual_encoder"
    weight, bias = state[f"{name}.patch_embed.proj.weight"], state[f"{name}.patch_embed.proj.bias"]
    patches = F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{name}.cls_token"].expand(len(pixels), 1, -1), patches], dim=1) + state[f"{name}.pos_embed"]
    for layer in range(IMAGE_REWARD_SETTINGS["vision"]["num_hidden_layers"]):
        block = f"{name}.blocks.{layer}"
        qkv = linear(norm(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(mix(*qkv), state, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1"))
        x = x + linear(hidden, state, f"{block}.mlp.fc2")
    return norm(x, state, f"{name}.norm", 1e-6)


def blip_text(ids: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor, state: State) -> torch.Tensor:
    """BLIP's BERT: post-norm layers of attention to the prompt, attention to the picture, and a perceptron."""
    name = "blip.text_encoder"
    x = state[f"{name}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, state, f"{name}.embeddings.LayerNorm", 1e-12)
    for layer in range(IMAGE_REWARD_SETTINGS["text"]["num_hidden_layers"]):
        block = f"{name}.encoder.layer.{layer}"
        for kind, source, seen in (("attention", x, mask), ("crossattention", patches, None)):
            part = f"{block}.{kind}"
            source = x if kind == "attention" else source
            mixed = mix(
                linear(x, state, f"{part}.self.query"),
                linear(source, state, f"{part}.self.key"),
                linear(source, state, f"{part}.self.value"),
                seen,
            )
            x = norm(x + linear(mixed, state, f"{part}.output.dense"), state, f"{part}.output.LayerNorm", 1e-12)
        hidden = F.gelu(linear(x, state, f"{block}.intermediate.dense"))
        x = norm(x + linear(hidden, state, f"{block}.output.dense"), state, f"{block}.output.LayerNorm", 1e-12)
    return x


def bert_ids(words: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [BERT_WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]
    padding = IMAGE_REWARD_SETTINGS["context_length"] - len(ids)
    return torch.tensor([ids + [0] * padding]), torch.tensor([[1] * len(ids) + [0] * padding])


# Prompts, and the tokens BERT's uncased tokenizer makes of them: accents stripped, Chinese characters apart.
TOKENIZED = {
    "": [],
    "A Cát": ["a", "c", "##a", "##t"],
    "京b, c": ["京", "b", ",", "c"],
    "[SEP] a": ["[", "s", "##e", "##p", "]", "a"],
    "[MASK]": ["[", "m", "##a", "##s", "##k", "]"],
    "[ENC]": ["[", "e", "##n", "##c", "]"],
    "✨ x": ["[UNK]", "x"],
    "abcdefghijklmnop": ["a", *(f"##{letter}" for letter in "bcdefghij")],
}


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_reward_is_the_published_forward(image_reward_directory: Path, height: int, width: int) -> None:
    state = {name: tensor.float() for name, tensor in published_image_reward().items()}
    images = random_images(len(TOKENIZED), height, width)
    rows = [bert_ids(words) for words in TOKENIZED.values()]
    ids, mask = (torch.cat(parts) for parts in zip(*rows, strict=True))
    states = blip_text(ids, mask, blip_vision(pillow_recipe(images), state), state)
    head = {name.removeprefix("mlp."): tensor for name, tensor in state.items() if name.startswith("mlp.")}
    expected = (published_layers(states[:, 0], head) - 0.16717362830052426) / 1.0333394966054072
    scorer = ImageRewardScorer.load(image_reward_directory, "cpu")
    scores = scorer.score(images, list(TOKENIZED), [{}] * len(TOKENIZED))
    tolerance = 1e-5 if (height, width) == (IMAGE_SIZE, IMAGE_SIZE) else RECIPE_TOLERANCE
    np.testing.assert_allclose(scores, expected.numpy(), atol=tolerance * float(expected.std()))


def test_image_reward_reads_both_picture_and_prompt(image_reward_directory: Path) -> None:
    scorer = ImageRewardScorer.load(image_reward_directory, "cpu")
    images = np.repeat(random_images(2), 2, axis=0)
    scores = scorer.score(images, ["a cat", "two dogs"] * 2, [{}] * 4)
    assert len(np.unique(np.round(scores, 3))) == 4
    assert scorer.version == "tiny"


def test_the_standardisation_is_part_of_the_weights(image_reward_directory: Path, tmp_path: Path) -> None:
    before = ImageRewardScorer.load(image_reward_directory, "cpu")
    state = load_file(image_reward_directory / "model.safetensors") | {"reward_mean": torch.tensor(1.5)}
    changed = write_bert_vocabulary(tmp_path / "changed")
    save_file(state, changed / "model.safetensors")
    (changed / "config.json").write_text(json.dumps(IMAGE_REWARD_SETTINGS))
    after = ImageRewardScorer.load(changed, "cpu")
    assert after.weights_hash != before.weights_hash
    assert after.score_range[0] == pytest.approx(before.score_range[0] - (1.5 - 0.167173628) / 1.033339497, abs=1e-5)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
def test_a_missing_file_of_image_reward_is_named(image_reward_directory: Path, tmp_path: Path, name: str) -> None:
    directory = write_bert_vocabulary(tmp_path / "copy")
    for file in ("config.json", "model.safetensors"):
        (directory / file).write_bytes((image_reward_directory / file).read_bytes())
    (directory / name).unlink()
    with pytest.raises(ModelError, match=name):
        ImageRewardScorer.load(directory, "cpu")


def test_a_foreign_tokenizer_is_refused(image_reward_directory: Path, tmp_path: Path) -> None:
    directory = write_bert_vocabulary(tmp_path / "copy")
    for file in ("config.json", "model.safetensors"):
        (directory / file).write_bytes((image_reward_directory / file).read_bytes())
    (directory / "vocab.txt").write_text("\n".join(BERT_WORDS[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(ModelError, match="that of bert-base-uncased"):
        ImageRewardScorer.load(directory, "cpu")


@pytest.mark.parametrize("settings", ["{}", '{"vision": 3, "text": 4}', "[]", "nonsense"])
def test_a_config_that_is_none_is_an_error(image_reward_directory: Path, tmp_path: Path, settings: str) -> None:
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises(ModelError, match=r"config\.json"):
        ImageRewardScorer.load(tmp_path, "cpu")


def test_a_missing_or_foreign_aesthetic_head_is_an_error(aesthetic_directory: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((aesthetic_directory / file).read_bytes())
    with pytest.raises(ModelError, match=r"head\.safetensors is missing"):
        AestheticScorer.load(tmp_path, "cpu")
    save_file(published_head(CLIP_FEATURES + 1), tmp_path / "head.safetensors")
    with pytest.raises(ModelError, match=r"head\.safetensors does not fit"):
        AestheticScorer.load(tmp_path, "cpu")
