"""Contract of a reward server: its routes, its messages and their validation. Server and client share this file.

    POST /v1/score      ScoreRequest    -> ScoreResponse      msgpack (see common.wire)
    POST /v1/gradient   GradientRequest -> GradientResponse   msgpack; differentiable scorers only
    GET  /v1/info       ServerInfo                            JSON
    POST /score         base64 images, prompts -> scores      JSON, for trainers that only speak JSON
    POST /              image files, prompts -> scores        pickle of plain containers; with --accept-flow-grpo
    GET  /health        the name of the reward                JSON, as UniRL's client asks for it
    GET  /healthz /readyz /metrics /openapi.json /docs        alive; scored a test image; Prometheus text; all of this

A process with several scorers serves the first six lines for each under `/{name}`. A scorer's base URL is then
`http://host:port/{name}`. A request may carry `DEADLINE_HEADER`: the seconds after which its response is useless,
and `RUN_HEADER`: the run that sent it. Runs that share a server take turns.

A failure is a status code and the JSON body {"error": cause, "message": text}. `CAUSES` lists every cause.
A message validates itself when it is built: a bad request raises RewardRejected, a bad response raises RewardInvalid.

Shape suffixes: B images, H W their height and width, C = 3 colour channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from common.errors import RewardError, RewardInvalid, RewardRejected
from common.metadata import without_nulls
from common.wire import DEFAULT_MAX_BYTES, ArrayCheck, pack, unpack

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
Metadata = Mapping[str, Any]

SCORE_PATH = "/v1/score"
GRADIENT_PATH = "/v1/gradient"
INFO_PATH = "/v1/info"
HEALTH_PATH = "/healthz"
READY_PATH = "/readyz"
METRICS_PATH = "/metrics"
PLAIN_SCORE_PATH = "/score"
FLOW_GRPO_PATH = "/"
UNIRL_HEALTH_PATH = "/health"
OPENAPI_PATH = "/openapi.json"
DOCS_PATH = "/docs"
MEDIA_TYPE = "application/msgpack"
DEADLINE_HEADER = "x-deadline-seconds"
RUN_HEADER = "x-run"
"""Name of the header with the client's deadline: a positive number of seconds, capped by the server's own limit."""

CHANNELS = 3
IMAGE_RANK = 4
DEFAULT_MAX_PIXELS = 2**22
"""The default limit per image is 2048 x 2048 pixels."""
MAX_ASPECT = 32
"""The longer side of an image may be at most this many times the shorter one.

Most recipes enlarge the shorter side to their model's size: a line of 16,000 pixels would become billions of pixels.
"""
MAX_PROMPT_BYTES = 2**15
"""A prompt, and each text in metadata, may have at most this many UTF-8 bytes.

This is far more than any text encoder reads. Runs refuse longer prompts as well.
"""
SURROGATE_REMEDY = (
    "it was cut inside a character, or is not UTF-8: write it anew, or set LC_ALL=C.UTF-8 if a shell gave it"
)
"""Programs that count in UTF-16 cut texts inside a character; Python keeps bytes of other encodings as such halves."""
QUOTED_CHARACTERS = 40
"""An error that refuses a text quotes this many of its characters."""
ANY_REWARD = "any"
"""This name stands for the reward in an error of a message that does not know its reward."""
# Failures are counted by these causes. The set is fixed because each cause becomes a metric label.
REQUEST_CAUSES = ("wire", "request", "too_large", "encoding")
"""The request itself is wrong: no server would accept it."""
ACCESS_CAUSES = ("unauthorized", "not_found", "not_differentiable")
"""The server does not offer this route, or not to this client."""
SERVER_CAUSES = ("overloaded", "deadline", "scorer", "model", "nan", "count", "shape", "dtype")
CLIENT_CAUSES = (
    *("timeout", "hung", "refused", "disconnected", "answer", "range", "weights_changed"),
    *("circuit_open", "no_server"),
)
LAUNCH_CAUSES = ("start", "died")
CAUSES = frozenset(REQUEST_CAUSES + ACCESS_CAUSES + SERVER_CAUSES + CLIENT_CAUSES + LAUNCH_CAUSES)


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Score each image against its prompt.

    Attributes:
        images_BHWC: uint8 [B, H, W, 3], RGB.
        prompts: B texts.
        metadata: one dict per image for scorers that need more than the prompt, or empty. Nulls are left out.
    """

    images_BHWC: ByteArray
    prompts: Sequence[str]
    metadata: Sequence[Metadata] = ()

    def __post_init__(self) -> None:
        _check_images("images_BHWC", self.images_BHWC, np.dtype(np.uint8), channel_axis=3)
        _check_lists(len(self.images_BHWC), self.prompts, self.metadata)
        object.__setattr__(self, "metadata", _each_without_nulls(self.metadata))

    def to_bytes(self) -> bytes:
        return pack(vars(self))

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray, max_bytes: int = DEFAULT_MAX_BYTES, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> Self:
        """WireError if the bytes are not a message, RewardRejected if the message is not a valid request."""
        check = _pixel_check(max_pixels, channel_axis=3)
        return cls(**_read_fields(cls, data, max_bytes, RewardRejected, "request", check))


@dataclass(frozen=True, eq=False)
class GradientRequest:
    """Score each image and differentiate the score.

    Attributes:
        images_BCHW: float32 [B, 3, H, W], RGB in [0, 1].
        prompts: B texts.
        metadata: one dict per image, or empty. Nulls are left out.
    """

    images_BCHW: FloatArray
    prompts: Sequence[str]
    metadata: Sequence[Metadata] = ()

    def __post_init__(self) -> None:
        _check_images("images_BCHW", self.images_BCHW, np.dtype(np.float32), channel_axis=1)
        low, high = float(self.images_BCHW.min()), float(self.images_BCHW.max())
        if not (low >= 0.0 and high <= 1.0):
            _reject(f"images_BCHW spans [{low}, {high}]: pixels of a gradient request lie in [0, 1]")
        _check_lists(len(self.images_BCHW), self.prompts, self.metadata)
        object.__setattr__(self, "metadata", _each_without_nulls(self.metadata))

    def to_bytes(self) -> bytes:
        return pack(vars(self))

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray, max_bytes: int = DEFAULT_MAX_BYTES, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> Self:
        """WireError if the bytes are not a message, RewardRejected if the message is not a valid request."""
        check = _pixel_check(max_pixels, channel_axis=1)
        return cls(**_read_fields(cls, data, max_bytes, RewardRejected, "request", check))


@dataclass(frozen=True, eq=False)
class ScoreResponse:
    """A scorer's response: `scores_B` float32 [B], all finite; `weights_hash` identifies the weights that scored."""

    scorer: str
    weights_hash: str
    scores_B: FloatArray

    def __post_init__(self) -> None:
        _check_answer(self.scorer, "scores_B", self.scores_B, rank=1)

    def to_bytes(self) -> bytes:
        return pack(vars(self))

    @classmethod
    def from_bytes(cls, data: bytes, max_bytes: int = DEFAULT_MAX_BYTES) -> Self:
        """WireError if the bytes are not a message, RewardInvalid if the message is not a valid response."""
        return cls(**_read_fields(cls, data, max_bytes, RewardInvalid, "answer"))


@dataclass(frozen=True, eq=False)
class GradientResponse:
    """Scores and `gradients_BCHW` float32 [B, 3, H, W]: d score_i / d image_i at the requested pixels."""

    scorer: str
    weights_hash: str
    scores_B: FloatArray
    gradients_BCHW: FloatArray

    def __post_init__(self) -> None:
        _check_answer(self.scorer, "scores_B", self.scores_B, rank=1)
        _check_answer(self.scorer, "gradients_BCHW", self.gradients_BCHW, rank=4)
        if len(self.scores_B) != len(self.gradients_BCHW):
            message = f"{len(self.scores_B)} scores but {len(self.gradients_BCHW)} gradients"
            raise RewardInvalid(self.scorer, "count", message)

    def to_bytes(self) -> bytes:
        return pack(vars(self))

    @classmethod
    def from_bytes(cls, data: bytes, max_bytes: int = DEFAULT_MAX_BYTES) -> Self:
        """WireError if the bytes are not a message, RewardInvalid if the message is not a valid response."""
        return cls(**_read_fields(cls, data, max_bytes, RewardInvalid, "answer"))


INFO_TEXTS = ("scorer", "version", "weights_hash", "preprocess_version", "implementation", "precision")
FORMER_PRECISION = "float32"
FORMER_PRECISION_OF = {"reward_servers.scorers.hpsv3:HpsV3Scorer": "bfloat16"}
"""The precision of servers, and of identities in checkpoints, from before it was declared, by implementation."""
INFO_FLAGS = ("differentiable", "reproducible")


@dataclass(frozen=True)
class ServerInfo:
    """A server's declared identity. It is equal for all servers of a reward and does not change during a run.

    Attributes:
        scorer: the name under which it is served.
        weights_hash: "" when the weights have no identity; scores of such a scorer are not cached.
        low, high: every score lies in [low, high]; both may be infinite.
        implementation: class path of the scorer, the first one if its class has moved. Two recipes over the same
            weights are two rewards.
        reproducible: no two requests share a model call, so scores are equal to the last bit.
        precision: type in which the model computes (`common.types.Precision`).
    """

    scorer: str
    version: str
    weights_hash: str
    differentiable: bool
    low: float
    high: float
    preprocess_version: str
    implementation: str = ""
    reproducible: bool = False
    precision: str = FORMER_PRECISION

    def to_json(self) -> bytes:
        """JSON has no infinity, so an infinite bound is written as null."""
        values = asdict(self)
        for end in ("low", "high"):
            values[end] = values[end] if math.isfinite(values[end]) else None
        return json.dumps(values, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """RewardInvalid when the response does not describe a server."""
        try:
            values = json.loads(data)
            low = -math.inf if values["low"] is None else float(values["low"])
            high = math.inf if values["high"] is None else float(values["high"])
            texts = with_precision(values)
            declared: dict[str, Any] = {key: str(texts[key]) for key in INFO_TEXTS}
            declared |= {key: values[key] is True for key in INFO_FLAGS}
            return cls(**declared, low=low, high=high)
        except (ValueError, KeyError, TypeError) as error:
            message = f"{INFO_PATH} did not describe a reward server: {error!r}"
            raise RewardInvalid(ANY_REWARD, "answer", message) from error


def with_precision(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as a map, with the precision that its server had if it was too old to declare one."""
    former = FORMER_PRECISION_OF.get(identity.get("implementation", ""), FORMER_PRECISION)
    return {"precision": former} | dict(identity)


def _reject(message: str) -> NoReturn:
    raise RewardRejected(ANY_REWARD, "request", message)


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """RewardRejected for an image with more than `max_pixels` or extreme sides. Call it before decoding the image."""
    if height * width > max_pixels:
        message = f"an image of {height} x {width} pixels exceeds the limit of {max_pixels}"
        raise RewardRejected(ANY_REWARD, "too_large", f"{message}: shrink it or raise --max-pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        _reject(
            f"an image of {height} x {width} pixels is a sliver: its sides differ by more than {MAX_ASPECT}, crop it"
        )


def check_texts(prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """RewardRejected for a prompt, or any text in metadata, that is no Unicode or longer than MAX_PROMPT_BYTES."""
    # Each object is checked once: a group shares its prompt, and a plain JSON request may share one map among all
    # images.
    for text in _texts_in({id(value): value for value in (*prompts, *metadata)}.values()):
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            begin = max(0, error.start - QUOTED_CHARACTERS // 2)
            quoted = repr(text[begin : begin + QUOTED_CHARACTERS])
            _reject(f"the text {quoted} has half of a surrogate pair, character {error.start + 1}: {SURROGATE_REMEDY}")
        if size > MAX_PROMPT_BYTES:
            quoted = f"{text[:QUOTED_CHARACTERS]!r}..."
            _reject(f"the text {quoted} has {size} bytes, at most {MAX_PROMPT_BYTES} are read: shorten it")


def _texts_in(values: Iterable[object]) -> Iterator[str]:
    """Every string in nested lists and maps, including keys. Iterative, because JSON may be nested deeply."""
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            left += value


def _pixel_check(max_pixels: int, channel_axis: int) -> ArrayCheck:
    def check(_: str, shape: tuple[int, ...]) -> None:
        if len(shape) == IMAGE_RANK:
            height, width = (size for axis, size in enumerate(shape) if axis not in (0, channel_axis))
            check_pixels(height, width, max_pixels)

    return check


def _read_fields(
    kind: type[Any],
    data: bytes | bytearray,
    max_bytes: int,
    error: type[RewardError],
    cause: str,
    check_array: ArrayCheck | None = None,
) -> dict[str, Any]:
    message = unpack(data, max_bytes, check_array)
    expected = {field.name for field in fields(kind)}
    if set(message) != expected:
        given = [name[:QUOTED_CHARACTERS] for name in sorted(message)]
        detail = f"a {kind.__name__} has the fields {sorted(expected)}, this one has {given}"
        raise error(ANY_REWARD, cause, detail)
    return message


def _check_images(field: str, images: object, dtype: np.dtype[Any], channel_axis: int) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != dtype or images.ndim != IMAGE_RANK:
        _reject(f"{field} is {_describe(images)}: a {dtype} array of {IMAGE_RANK} dimensions is wanted")
    elif images.size == 0 or images.shape[channel_axis] != CHANNELS:
        _reject(f"{field} has shape {images.shape}: at least one image of {CHANNELS} channels on axis {channel_axis}")


def _check_lists(count: int, prompts: object, metadata: object) -> None:
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        _reject("prompts is not a list of strings")
    if len(prompts) != count:
        _reject(f"{len(prompts)} prompts for {count} images: one each")
    if not isinstance(metadata, list | tuple) or not all(isinstance(item, Mapping) for item in metadata):
        _reject("metadata is not a list of maps")
    if len(metadata) not in (0, count):
        _reject(f"{len(metadata)} metadata for {count} images: one each, or none")
    check_texts(prompts, metadata)


def _each_without_nulls(metadata: Sequence[Metadata]) -> Sequence[Metadata]:
    """Copies without nulls; images that share a map share its copy."""
    copies = {key: without_nulls(item) for key, item in {id(item): item for item in metadata}.items()}
    return [copies[id(item)] for item in metadata]


def _check_answer(scorer: object, field: str, values: object, rank: int) -> None:
    name = scorer if isinstance(scorer, str) else ANY_REWARD
    if not isinstance(values, np.ndarray) or values.dtype != np.float32:
        raise RewardInvalid(name, "dtype", f"{field} is {_describe(values)}: a float32 array is wanted")
    if values.ndim != rank:
        raise RewardInvalid(name, "shape", f"{field} has shape {values.shape}: {rank} dimensions are wanted")
    if not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).tolist()
        raise RewardInvalid(name, "nan", f"{field} is not finite for images {bad[:8]} of {len(values)}")


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"a {value.dtype} array of shape {value.shape}"
    return f"a {type(value).__name__}"
