"""The scoring routes: how each reads a body into a request, and writes the response.

Reading has two steps, because what the second one takes of memory is known after the first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

from common.rewards.api import (
    FLOW_GRPO_PATH,
    GRADIENT_PATH,
    MEDIA_TYPE,
    PLAIN_SCORE_PATH,
    SCORE_PATH,
    GradientRequest,
    ScoreRequest,
)
from reward_servers import flow_grpo, plain_json
from reward_servers.fair_queue import Request, Response
from reward_servers.front.answers import JSON_TYPE
from reward_servers.limits import Patience, RequestLimits
from reward_servers.picture_request import PictureRequest

PICKLE_TYPE = "application/octet-stream"


@dataclass(frozen=True)
class Opened:
    """A body whose outer form has been read.

    Attributes:
        more_bytes: memory that `decode` takes beside the body.
        decode: makes the request; RewardRejected for an invalid one.
        encode: makes the body of the answer.
    """

    more_bytes: int
    decode: Callable[[], Request]
    encode: Callable[[Response], bytes]

    @classmethod
    def of(cls, pictures: PictureRequest) -> Self:
        return cls(pictures.decoded_bytes, pictures.decode, pictures.encode)


class Door(ABC):
    """One scoring route.

    Attributes:
        copies: copies of its body that a request holds.
        at_once: bodies of at most this many bytes are read in the event loop, which is faster than a thread.
        needs_gradient: whether the scorer must be differentiable.
    """

    path: ClassVar[str]
    media_type: ClassVar[str] = MEDIA_TYPE
    copies: ClassVar[int] = 1
    at_once: ClassVar[float] = 65_536
    needs_gradient: ClassVar[bool] = False

    @abstractmethod
    def open(self, body: bytearray, limits: RequestLimits, scorer: str, patience: Patience) -> Opened:
        """Read the outer form of a request to the scorer of this name; RewardRejected or WireError if it is invalid."""


class ScoreDoor(Door):
    """Its pixels are used where they are: reading takes 0.04 ms for any number of them."""

    path = SCORE_PATH
    at_once = math.inf

    def open(self, body: bytearray, limits: RequestLimits, scorer: str, patience: Patience) -> Opened:  # noqa: ARG002
        return Opened(0, lambda: ScoreRequest.from_bytes(body, limits.max_body_bytes, limits.max_pixels), _packed)


class GradientDoor(Door):
    """A gradient request holds four copies of its body: body, pixels, their gradient and the packed response."""

    path = GRADIENT_PATH
    copies = 4
    needs_gradient = True

    def open(self, body: bytearray, limits: RequestLimits, scorer: str, patience: Patience) -> Opened:  # noqa: ARG002
        return Opened(0, lambda: GradientRequest.from_bytes(body, limits.max_body_bytes, limits.max_pixels), _packed)


class PlainDoor(Door):
    """JSON with picture files: always in a thread, since a small file may have many pixels."""

    path = PLAIN_SCORE_PATH
    media_type = JSON_TYPE
    at_once = 0

    def open(self, body: bytearray, limits: RequestLimits, scorer: str, patience: Patience) -> Opened:
        return Opened.of(plain_json.parse(body, limits, scorer, patience.check))


class FlowGrpoDoor(Door):
    """Pickles of picture files; served with `--accept-flow-grpo` alone. It holds the body and the files in it."""

    path = FLOW_GRPO_PATH
    media_type = PICKLE_TYPE
    copies = 2
    at_once = 0

    def open(self, body: bytearray, limits: RequestLimits, scorer: str, patience: Patience) -> Opened:  # noqa: ARG002
        return Opened.of(flow_grpo.read(body, limits, patience.check))


DOORS: tuple[Door, ...] = (ScoreDoor(), GradientDoor(), PlainDoor())


def _packed(response: Response) -> bytes:
    return response.to_bytes()
