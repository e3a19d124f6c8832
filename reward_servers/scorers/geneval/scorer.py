"""GenEval (Ghosh et al. 2023, arXiv 2310.11513) as a reward: scores whether an image shows the demanded objects.

`geneval` is the benchmark's own verdict, 1 or 0. `geneval_parts` is the mean over the parts of the prompt, the denser
reward that Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) trains on. Both read the demanded objects from the metadata, a
line of GenEval's evaluation_metadata.jsonl (see `rules.py`); a request without metadata is rejected. A model
directory holds two models in transformers' format:

    detector/   Mask2Former over COCO's 80 classes: facebook/mask2former-swin-small-coco-instance
    clip/       CLIP and its tokenizer: openai/clip-vit-large-patch14

Not verified here, because the weights are not available: how often verdicts equal those of GenEval, whose detector is
mmdetection's training of the same architecture. Rules, resizing and post-processing are tested; the models are tested
with tiny random weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

from common.rewards.api import ByteArray, FloatArray, Metadata
from common.torch_device import require_device
from reward_servers.scorers.base import Scorer
from reward_servers.scorers.clip import processor_tokens
from reward_servers.scorers.geneval.models import IMAGENET_MEAN, IMAGENET_STD, ColorNamer, ObjectDetector
from reward_servers.scorers.geneval.rules import (
    MAX_OBJECTS,
    ColorsOf,
    Found,
    Task,
    Verdict,
    judge_by_parts,
    judge_strictly,
    parse_task,
    select,
)
from reward_servers.scorers.model_directory import hash_weights, load_pretrained, require_directory
from reward_servers.scorers.processor import clip_processor, require_processor


class GenevalScorer(Scorer):
    """score = 1 when the image shows everything that is demanded, else 0."""

    name = "geneval"
    score_range = (0.0, 1.0)
    preprocess_version = "geneval-1"
    check_prompt = "a photo of a red dog"
    check_metadata = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}  # noqa: RUF012

    def __init__(self, detector: ObjectDetector, name_colors: ColorNamer, weights_hash: str) -> None:
        self._detect = detector
        self._name_colors = name_colors
        self.weights_hash = weights_hash

    @classmethod
    def load(cls, model_dir: Path | None, device: str) -> Self:
        directory = require_directory(model_dir, cls.name)
        require_device(device)
        torch.backends.cudnn.allow_tf32 = False
        detector = load_pretrained(Mask2FormerForUniversalSegmentation, directory / "detector")
        clip = load_pretrained(CLIPModel, directory / "clip")
        imagenet = {"image_mean": _unit(IMAGENET_MEAN), "image_std": _unit(IMAGENET_STD)}
        require_processor(directory / "detector", imagenet)
        require_processor(directory / "clip", clip_processor(clip.config.vision_config.image_size))
        tokens = processor_tokens(clip, directory / "clip")
        weights_hash = hash_weights(detector, clip)
        return cls(ObjectDetector(detector, device), ColorNamer(clip, tokens, device), weights_hash)

    def score(self, images_BHWC: ByteArray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> FloatArray:  # noqa: ARG002
        tasks = [parse_task(item) for item in metadata]
        verdicts = [self.judge(image, task) for image, task in zip(images_BHWC, tasks, strict=True)]
        return np.array([verdict.score for verdict in verdicts], dtype=np.float32)

    def judge(self, image_HWC: ByteArray, task: Task) -> Verdict:
        """The verdict on one RGB uint8 image, with its reasons."""
        found = select(self._detect(image_HWC), task.tag)
        return self._rule(task, found, partial(self._name_colors, image_HWC))

    def _rule(self, task: Task, found: Found, colors_of: ColorsOf) -> Verdict:
        return judge_strictly(task, found, colors_of)


class GenevalPartsScorer(GenevalScorer):
    """score = mean over the parts of the prompt; 1 when all hold, below 0 when there are far too many objects."""

    name = "geneval_parts"
    # The lowest score: one object is demanded and the image has the maximum number of kept objects.
    score_range = (float(2 - MAX_OBJECTS), 1.0)

    def _rule(self, task: Task, found: Found, colors_of: ColorsOf) -> Verdict:
        return judge_by_parts(task, found, colors_of)


def _unit(levels: Sequence[float]) -> list[float]:
    """From the scale of 8-bit levels to [0, 1], in which transformers' processors have them."""
    return [level / 255 for level in levels]
