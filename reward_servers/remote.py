"""Reward functions for other trainers, backed by a reward server: `reward_servers.remote_reward`.

    reward = remote_reward("http://127.0.0.1:8101", name="hps")
    GRPOTrainer(..., reward_funcs=[reward])          reward(prompts=, completions=, **columns) -> list[float]
    DDPOTrainer(config, reward.image_reward, ...)    reward.image_reward(images, prompts, metadata) -> (list[float], {})

Both trainers are TRL's. The second shape is also that of Flow-GRPO's reward functions. A failed request raises
RewardError; it never becomes a number.

Shape suffixes: B images, H W their height and width, C = 3 colour channels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
from PIL import Image

from common.errors import RewardRejected
from common.rewards.api import CHANNELS, IMAGE_RANK, ByteArray
from common.rewards.bearer import reward_token
from common.rewards.client import RewardClient, RewardEndpoint, ScoreQuestion
from common.urls import host_of
from reward_servers.picture_files import COLOUR_MODES, GREY16_MODES, pixels_HWC

OVERSHOOT = 0.5
"""Pixels in [0, 1] may exceed the range by this much, as decoders do; they are clamped. More means another range."""
WHITE = 255


class RemoteReward:
    """A reward of one or more equal servers, as a function.

    Args:
        urls: base URLs of servers of this one reward; several are replicas.
        name: the reward's name in errors and in the trainer's logs.
        timeout_s: seconds that one attempt may take.
        attempts: attempts per request; only failures that a retry may fix are retried.
        images_per_request: more images are sent in several requests, one after another.

    Raises:
        ConfigError: a URL or the token of REWARD_SERVER_TOKEN cannot be used.
    """

    def __init__(
        self, urls: Sequence[str], name: str, *, timeout_s: float, attempts: int, images_per_request: int
    ) -> None:
        # Trainers log a reward function under its name.
        self.__name__ = name
        self._name = name
        self._images_per_request = images_per_request
        endpoints = [RewardEndpoint(name, url) for url in urls]
        self._client = RewardClient(endpoints, timeout_s, attempts, reward_token(map(host_of, urls)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Any = None,
        *,
        images: Any = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        **columns: Any,  # noqa: ARG002
    ) -> list[float]:
        """The scores of B pictures, in the shape that TRL calls (`GRPOTrainer`, `RLOOTrainer`).

        Args:
            prompts: B texts.
            completions: B pictures, as `pictures_HWC` takes them.
            images: read if there are no completions.
            metadata: one map for each image, for scorers that need more than the prompt.
            columns: all other columns of the data set, and what else the trainer hands over; not used.

        Raises:
            RewardError: the pictures or texts cannot be scored, or no server answers.
        """
        pictures = pictures_HWC(self._name, images if completions is None else completions)
        return self._scores(pictures, list(prompts), None if metadata is None else [one or {} for one in metadata])

    def image_reward(
        self,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    ) -> tuple[list[float], dict[str, Any]]:
        """The scores of B pictures and no details, in the shape that DDPO (TRL) and Flow-GRPO call.

        One map of metadata stands for all images. RewardError as for a call.
        """
        pictures = pictures_HWC(self._name, images)
        if isinstance(metadata, Mapping):
            metadata = [metadata] * len(pictures)
        return self._scores(pictures, list(prompts), None if metadata is None else list(metadata)), {}

    def _scores(
        self, pictures: Sequence[ByteArray], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None
    ) -> list[float]:
        for what, values in (("prompts", prompts), ("metadata", metadata)):
            if values is not None and len(values) != len(pictures):
                raise RewardRejected(
                    self._name, "request", f"{len(values)} {what} for {len(pictures)} images: one each"
                )
        scores = [0.0] * len(pictures)
        for indices in self._requests(pictures):
            question = ScoreQuestion.of(
                np.stack([pictures[index] for index in indices]),
                [prompts[index] for index in indices],
                None if metadata is None else [metadata[index] for index in indices],
            )
            answer_B = self._client.score_one(self._name, question)
            for index, score in zip(indices, answer_B.tolist(), strict=True):
                scores[index] = score
        return scores

    def _requests(self, pictures: Sequence[ByteArray]) -> list[list[int]]:
        """The indices of each request's images: all of one size, and not too many."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, picture_HWC in enumerate(pictures):
            by_size.setdefault(picture_HWC.shape, []).append(index)
        most = self._images_per_request
        return [of[begin : begin + most] for of in by_size.values() for begin in range(0, len(of), most)]


def pictures_HWC(reward: str, images: Any) -> list[ByteArray]:
    """B pictures as uint8 [H, W, 3] each; RewardRejected, in the name of `reward`, for what is none.

    Args:
        images: a tensor of torch or an array of numpy, [B, 3, H, W] or [B, H, W, 3], of uint8 or of floats in [0, 1];
            or a sequence of Pillow images, or of such tensors or arrays without the axis B.
    """
    images = _as_numpy(images)
    if isinstance(images, np.ndarray):
        if images.ndim != IMAGE_RANK:
            _reject(reward, f"the images have shape {images.shape}: [B, 3, H, W] or [B, H, W, 3] is wanted")
        return [_picture_HWC(reward, image) for image in images]
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        _reject(reward, f"the images are a {type(images).__name__}: a batch of pixels or a list of pictures is wanted")
    return [_picture_HWC(reward, _as_numpy(image)) for image in images]


def _as_numpy(value: Any) -> Any:
    """A tensor of torch as an array; anything else unchanged. A process that has tensors has loaded torch."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    # numpy has no bfloat16.
    return (value.float() if value.is_floating_point() else value).numpy()


def _picture_HWC(reward: str, image: Any) -> ByteArray:
    if isinstance(image, Image.Image):
        if image.mode not in COLOUR_MODES + GREY16_MODES:
            _reject(reward, f"a picture has mode {image.mode}, whose white is not known: convert it to RGB")
        return pixels_HWC(image)
    if not isinstance(image, np.ndarray):
        _reject(reward, f"a picture is a {type(image).__name__}: a Pillow image, an array or a tensor is wanted")
    if image.ndim != IMAGE_RANK - 1 or CHANNELS not in (image.shape[0], image.shape[2]):
        _reject(reward, f"a picture has shape {image.shape}: [3, H, W] or [H, W, 3] is wanted")
    if image.shape[2] != CHANNELS:
        image = image.transpose(1, 2, 0)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        _reject(reward, f"a picture has {image.dtype}: uint8, or floats in [0, 1], are wanted")
    low, high = float(image.min()), float(image.max())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        _reject(reward, f"a picture spans [{low:g}, {high:g}]: floats in [0, 1] are wanted")
    scaled_HWC: ByteArray = (np.clip(image, 0.0, 1.0) * WHITE).round().astype(np.uint8)
    return scaled_HWC


def _reject(reward: str, message: str) -> NoReturn:
    raise RewardRejected(reward, "request", message)
