"""The two models of GenEval: an instance segmenter that finds objects, and a CLIP model that names their colours.

`ObjectDetector` follows mmdetection 2.27, which GenEval runs (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco and
MaskFormerFusionHead.instance_postprocess), on transformers' Mask2Former; `ColorNamer` follows evaluate_images.py and
the zero-shot classifier of clip_benchmark.

Shape suffixes: B images, Q queries, K classes, N objects, C channels or colours, D embedding, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

from common.errors import ModelError
from common.rewards.api import MAX_ASPECT, ByteArray
from reward_servers.scorers.clip import PromptTokens
from reward_servers.scorers.geneval.rules import CLASSES, COLORS, THRESHOLD, Box, Detection
from reward_servers.scorers.pixels import ImageRecipe

# mmdetection's test pipeline: the shorter side to 800 unless the longer one would exceed 1333.
SHORT_SIDE, LONG_SIDE, SIZE_DIVISOR = 800, 1333, 32
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_PER_IMAGE = 100
BACKGROUND = 0x99 / 255
"""This grey, "#999", hides an object's surroundings from CLIP."""
COLOR_TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)


class ObjectDetector:
    """Finds COCO objects. It runs one image at a time, because a verdict must not depend on the batch."""

    def __init__(self, model: Mask2FormerForUniversalSegmentation, device: str) -> None:
        labels = model.config.id2label
        # The published config names some classes differently from COCO, so the classes are identified by their order.
        if len(labels) != len(CLASSES) or (labels[0], labels[len(CLASSES) - 1]) != (CLASSES[0], CLASSES[-1]):
            raise ModelError(
                f"the detector has {len(labels)} classes from {labels.get(0)!r}: GenEval needs COCO's {len(CLASSES)} "
                f"from {CLASSES[0]!r} to {CLASSES[-1]!r}, as in facebook/mask2former-swin-small-coco-instance"
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device

    def __call__(self, image_HWC: ByteArray) -> list[Detection]:
        """RGB uint8 [H, W, 3] -> objects, each with its mask [H, W], unordered; those below 0.3 are left out."""
        height, width = image_HWC.shape[:2]
        scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        with torch.no_grad():
            output = self._model(pixel_values=self._prepare(image_HWC, size))
            confidences_QK = output.class_queries_logits[0].softmax(dim=-1)[:, :-1]
            logits_Qhw = output.masks_queries_logits[0]
            return self._objects(confidences_QK, logits_Qhw, size, (height, width))

    def _prepare(self, image_HWC: ByteArray, size: tuple[int, int]) -> torch.Tensor:
        """Resize (bilinear, not antialiased), normalise, then pad the right and the bottom to a multiple of 32."""
        image_CHW = torch.tensor(image_HWC, device=self._device).permute(2, 0, 1).float()
        image_BCHW = F.interpolate(image_CHW[None], size=size, mode="bilinear", align_corners=False)
        mean, std = (image_BCHW.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        height, width = size
        return F.pad((image_BCHW - mean) / std, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))

    def _objects(
        self,
        confidences_QK: torch.Tensor,
        logits_Qhw: torch.Tensor,
        size: tuple[int, int],
        original_size: tuple[int, int],
    ) -> list[Detection]:
        """The 100 best pairs of query and class; confidence = class probability * mean mask probability."""
        best = confidences_QK.flatten().topk(min(MAX_PER_IMAGE, confidences_QK.numel()))
        # A mask can only lower the confidence: a pair that fails here needs no mask.
        kept = best.values > THRESHOLD
        queries_N = best.indices[kept] // confidences_QK.shape[1]
        labels_N = (best.indices[kept] % confidences_QK.shape[1]).tolist()
        padded = [side + -side % SIZE_DIVISOR for side in size]
        found = []
        # One mask at a time: a hundred float masks of a large image would take gigabytes.
        for query, label, probability in zip(queries_N.tolist(), labels_N, best.values[kept].tolist(), strict=True):
            logits_hw = _resize(logits_Qhw[query], padded)[: size[0], : size[1]]
            logits_HW = _resize(logits_hw, original_size)
            mask_HW = logits_HW > 0
            certainty = (logits_HW.sigmoid() * mask_HW).sum() / (mask_HW.sum() + 1e-6)
            confidence = probability * float(certainty)
            if confidence > THRESHOLD:
                mask = mask_HW.cpu().numpy()
                found.append(Detection(CLASSES[label], confidence, box_around(mask), mask))
        return found


class ColorNamer:
    """Names the colour of an object by zero-shot CLIP, on its box with everything but the object greyed out."""

    def __init__(self, model: CLIPModel, tokens: PromptTokens, device: str) -> None:
        self._model = model.to(device).eval().requires_grad_(False)
        self._tokens = tokens
        self._recipe = ImageRecipe(model.config.vision_config.image_size, eight_bit=True)
        self._device = device
        self._classifiers: dict[str, torch.Tensor] = {}

    def __call__(self, image_HWC: ByteArray, objects: Sequence[Detection]) -> list[str]:
        """RGB uint8 [H, W, 3] and objects of one class, each with mask and box -> one colour each."""
        pixels_CHW = torch.tensor(image_HWC, device=self._device).permute(2, 0, 1).float() / 255
        crops = [self._recipe(self._cut_out(pixels_CHW, detection)[None]) for detection in objects]
        with torch.no_grad():
            images_ND = F.normalize(self._model.get_image_features(pixel_values=torch.cat(crops)).pooler_output, dim=-1)
            similarities_NC = images_ND @ self._classifier(objects[0].label).T
        return [COLORS[index] for index in similarities_NC.argmax(dim=-1).tolist()]

    def _cut_out(self, pixels_CHW: torch.Tensor, detection: Detection) -> torch.Tensor:
        left, top, right, bottom = (round(side) for side in detection.box)
        (top, bottom), (left, right) = _middle(top, bottom, right - left), _middle(left, right, bottom - top)
        mask_HW = torch.tensor(detection.mask_HW, device=self._device)[top:bottom, left:right]
        return torch.where(mask_HW, pixels_CHW[:, top:bottom, left:right], BACKGROUND)

    def _classifier(self, label: str) -> torch.Tensor:
        """Unit embeddings [C, D] of the colours for one class: the mean over the templates. At most 80 are cached."""
        if label not in self._classifiers:
            texts = [template.format(color=color, label=label) for color in COLORS for template in COLOR_TEMPLATES]
            ids, _ = self._tokens(texts)
            texts_D = F.normalize(self._model.get_text_features(input_ids=ids.to(self._device)).pooler_output, dim=-1)
            means_CD = texts_D.reshape(len(COLORS), len(COLOR_TEMPLATES), -1).mean(dim=1)
            self._classifiers[label] = F.normalize(means_CD, dim=-1)
        return self._classifiers[label]


def _middle(start: int, stop: int, other_side: int) -> tuple[int, int]:
    """One side of a box, cut to at most MAX_ASPECT times the other side.

    CLIP only uses the middle of a box, but the whole box is enlarged first: a line of 2000 pixels would become a
        hundred
    million pixels.
    """
    surplus = max(0, stop - start - MAX_ASPECT * other_side)
    return start + surplus // 2, stop - (surplus - surplus // 2)


def box_around(mask_HW: np.ndarray) -> Box:
    """(left, top, right, bottom) of a non-empty mask; right and bottom lie one pixel beyond it."""
    columns, rows = np.flatnonzero(mask_HW.any(axis=0)), np.flatnonzero(mask_HW.any(axis=1))
    return cast(Box, tuple(float(side) for side in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))


def _resize(logits_HW: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return F.interpolate(logits_HW[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
