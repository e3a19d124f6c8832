"""Dynamic batching: images that wait together share a model call, whichever requests they came with.

    submit() ──► a scorer's queue ──► the device's turn ──► one call ──► each request's own slice, or an error

A call is put together when the device is free, not before: under load it is whatever has come together during the calls
before it, and it never waits. Only an idle device lets a first request wait for company, for `max_wait_s` at most.

The head of the queue always goes first, and every call is filled up to `max_batch` with what can share it, across the
borders of requests: groups of 9 fill calls of 16. A request is answered whole, as soon as its last image is done.
Where requests share no calls (`share_calls` off) what a request scores, to the last bit, depends on nothing but itself,
however busy the server is: that makes whole runs reproducible.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from common.errors import RewardError, RewardInvalid, RewardOverloaded, RewardRejected
from common.rewards.api import (
    ByteArray,
    FloatArray,
    GradientRequest,
    GradientResponse,
    Metadata,
    ScoreRequest,
    ScoreResponse,
)
from reward_servers.metrics import ScorerMetrics
from reward_servers.scorers.base import Scorer

# HTTP counts it in whole seconds; clients add jitter of their own.
RETRY_AFTER_SECONDS = 1

Request = ScoreRequest | GradientRequest
Response = ScoreResponse | GradientResponse
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchLimits:
    """Images per model call, seconds a first request waits for company, images that may wait (and a request may have).

    With `share_calls` off a request never waits for company and never gets any.
    """

    max_batch: int
    max_wait_s: float
    queue_images: int
    share_calls: bool = True


@dataclass(eq=False)
class _Job:
    request: Request
    answer: asyncio.Future[Response]
    arrived: float
    found_busy: bool
    """The device was at work when the request came: waiting for that is wait enough."""
    begun: int = 0
    """Images that calls have been given: the first ones."""
    parts: list[tuple[FloatArray, FloatArray]] = field(default_factory=list)
    """Scores and gradients of those that are done."""

    @property
    def images(self) -> ByteArray | FloatArray:
        return self.request.images_BHWC if isinstance(self.request, ScoreRequest) else self.request.images_BCHW

    @property
    def waiting(self) -> int:
        return len(self.images) - self.begun

    @property
    def vanished(self) -> bool:
        """Nobody waits for the answer any more: the client hung up, its deadline has passed, or a part has failed."""
        return self.answer.done()

    def joins(self, other: _Job) -> bool:
        """Whether both can share a model call."""
        return type(self.request) is type(other.request) and self.images.shape[1:] == other.images.shape[1:]


@dataclass(frozen=True)
class _Piece:
    """Some images of one request: what a model call has of it."""

    job: _Job
    start: int
    stop: int

    @property
    def images(self) -> ByteArray | FloatArray:
        return self.job.images[self.start : self.stop]

    @property
    def prompts(self) -> Sequence[str]:
        return self.job.request.prompts[self.start : self.stop]

    @property
    def metadata(self) -> Sequence[Metadata]:
        """One map for each image."""
        return self.job.request.metadata[self.start : self.stop] or [{} for _ in self.prompts]

    @property
    def last(self) -> bool:
        return self.stop == len(self.job.images)


class Device:
    """What all models of a process run on: one call at a time, in turns, in a thread that is not the event loop's.

    A model is not thread-safe, and two calls at once would only take turns on the same cores.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.turn = asyncio.Lock()
        self._clock = clock
        self._call_began: float | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    @property
    def busy(self) -> bool:
        return self.turn.locked()

    @property
    def call_seconds(self) -> float:
        """For how long the present call has been running; 0 between calls."""
        return 0.0 if self._call_began is None else self._clock() - self._call_began

    async def run(self, call: Callable[[], Result]) -> Result:
        """Run `call` in the device's thread. Only for who has the turn."""
        self._call_began = self._clock()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        finally:
            self._call_began = None

    def close(self) -> None:
        """Let go of the thread; a call it is in the middle of is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Batcher:
    """Feeds one scorer. Lives in one event loop; `run` must be running for anything to be answered."""

    def __init__(self, scorer: Scorer, name: str, limits: BatchLimits, device: Device, metrics: ScorerMetrics) -> None:
        self._scorer = scorer
        self._name = name
        self._limits = limits
        self._device = device
        self._metrics = metrics
        # In order of arrival; a dict, so that a client that vanishes leaves at once, wherever it stands.
        self._queue: dict[_Job, None] = {}
        self._images_waiting = 0
        self._arrival = asyncio.Event()

    def require_room(self, images: int = 1) -> None:
        """RewardOverloaded when `images` more are too many now, RewardRejected when they are too many ever."""
        waiting, most = self._images_waiting, self._limits.queue_images
        if images > most:
            message = f"{images} images in one request, at most {most} may wait: send fewer or raise --queue-items"
            raise RewardRejected(self._name, "too_large", message)
        if waiting + images > most:
            message = f"{waiting} images wait, {images} more exceed {most}: try later"
            raise RewardOverloaded(self._name, "overloaded", message, RETRY_AFTER_SECONDS)

    def submit(self, request: Request) -> asyncio.Future[Response]:
        """Queue a request, or raise as `require_room`. Cancel the future to withdraw it: it is then never executed."""
        loop = asyncio.get_running_loop()
        job = _Job(request, loop.create_future(), loop.time(), self._device.busy)
        self.require_room(len(job.images))
        self._queue[job] = None
        job.answer.add_done_callback(lambda _: self._leave_queue(job))
        self._count(len(job.images))
        self._arrival.set()
        return job.answer

    async def run(self) -> None:
        """Answer requests until cancelled."""
        while True:
            await self._wait_for_work()
            async with self._device.turn:
                pieces = self._take_call()
                results = await self._device.run(partial(self._execute, pieces)) if pieces else []
            for piece, result in zip(pieces, results, strict=True):
                _deliver(piece.job, result)

    async def _wait_for_work(self) -> None:
        """Return when a batch should start as soon as the device is free."""
        while not self._queue:
            await self._wait_for_arrival(None)
        first = next(iter(self._queue))
        if first.found_busy or first.begun or not self._limits.share_calls:
            return
        loop = asyncio.get_running_loop()
        until = first.arrived + self._limits.max_wait_s
        while self._queue and not self._call_is_full():
            if not await self._wait_for_arrival(until - loop.time()):
                return

    async def _wait_for_arrival(self, seconds: float | None) -> bool:
        self._arrival.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrival.wait()
        except TimeoutError:
            return False
        return True

    def _next_call(self) -> list[_Piece]:
        """The first images that share a call: the head of the queue, then whatever can join it, in order of arrival."""
        pieces: list[_Piece] = []
        room = self._limits.max_batch
        for job in self._queue:
            if room == 0 or (pieces and not self._limits.share_calls):
                break
            if job.vanished or (pieces and not job.joins(pieces[0].job)):
                continue
            count = min(job.waiting, room)
            pieces.append(_Piece(job, job.begun, job.begun + count))
            room -= count
        return pieces

    def _call_is_full(self) -> bool:
        """Whether waiting longer could only make somebody wait: no room is left, or one who cannot join is there."""
        pieces = self._next_call()
        return len(pieces) < len(self._queue) or sum(len(piece.images) for piece in pieces) == self._limits.max_batch

    def _take_call(self) -> list[_Piece]:
        for job in [job for job in self._queue if job.vanished]:
            self._leave_queue(job)
        pieces = self._next_call()
        for piece in pieces:
            piece.job.begun = piece.stop
            self._count(-len(piece.images))
            if piece.last:
                del self._queue[piece.job]
        return pieces

    def _leave_queue(self, job: _Job) -> None:
        if job in self._queue:
            del self._queue[job]
            self._count(-job.waiting)

    def _count(self, images: int) -> None:
        self._images_waiting += images
        self._metrics.waiting(self._images_waiting)

    def _execute(self, pieces: Sequence[_Piece]) -> list[Response | RewardError | None]:
        """In the device's thread: one call, cut back into its pieces. None for a piece that is not its request's last.

        A bad request must not fail those it shares a call with. A call that fails is halved until it is alone.
        """
        try:
            scores_B, gradients_BCHW = self._run_scorer(pieces)
        except Exception as error:  # whatever a scorer raises is an answer to its requests, never the server's end
            if len(pieces) > 1:
                middle = len(pieces) // 2
                return self._execute(pieces[:middle]) + self._execute(pieces[middle:])
            if isinstance(error, RewardError):
                return [error]
            logger.exception("the scorer %s failed", self._name)
            return [RewardInvalid(self._name, "scorer", f"{type(error).__name__}: {error}")]
        ends = np.cumsum([len(piece.images) for piece in pieces])[:-1]
        parts = zip(np.split(scores_B, ends), np.split(gradients_BCHW, ends), strict=True)
        return [self._respond(piece, part) for piece, part in zip(pieces, parts, strict=True)]

    def _run_scorer(self, pieces: Sequence[_Piece]) -> tuple[FloatArray, FloatArray]:
        """Scores [B] and gradients [B, 3, H, W] ([B, 0] for score requests) of all images, in one call."""
        images = np.concatenate([piece.images for piece in pieces]) if len(pieces) > 1 else pieces[0].images
        prompts = [prompt for piece in pieces for prompt in piece.prompts]
        metadata = [item for piece in pieces for item in piece.metadata]
        with_gradient = isinstance(pieces[0].job.request, GradientRequest)
        call: Callable[..., tuple[FloatArray, FloatArray]] = self._call_with_gradient if with_gradient else self._call
        started = time.perf_counter()
        answer = call(images, prompts, metadata)
        self._metrics.model_called(len(images), time.perf_counter() - started)
        return answer

    def _call(
        self, images_BHWC: ByteArray, prompts: list[str], metadata: list[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        scores_B = np.asarray(self._scorer.score(images_BHWC, prompts, metadata), dtype=np.float32)
        self._check_shape("scores", scores_B, (len(images_BHWC),))
        return scores_B, np.empty((len(images_BHWC), 0), dtype=np.float32)

    def _call_with_gradient(
        self, images_BCHW: FloatArray, prompts: list[str], metadata: list[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        answer = self._scorer.score_with_gradient(images_BCHW, prompts, metadata)
        scores_B, gradients_BCHW = (np.asarray(part, dtype=np.float32) for part in answer)
        self._check_shape("scores", scores_B, (len(images_BCHW),))
        self._check_shape("gradients", gradients_BCHW, images_BCHW.shape)
        return scores_B, gradients_BCHW

    def _check_shape(self, what: str, values: FloatArray, expected: tuple[int, ...]) -> None:
        if values.shape != expected:
            cause = "count" if values.shape[:1] != expected[:1] else "shape"
            message = f"the scorer returned {what} of shape {values.shape} where {expected} is due"
            raise RewardInvalid(self._name, cause, message)

    def _respond(self, piece: _Piece, part: tuple[FloatArray, FloatArray]) -> Response | RewardInvalid | None:
        """A request's answer, once this was its last piece; a value that is not finite fails that request alone."""
        job = piece.job
        job.parts.append(part)
        if not piece.last:
            return None
        scores_B, gradients_BCHW = (np.concatenate(values) for values in zip(*job.parts, strict=True))
        weights_hash = self._scorer.weights_hash
        response: Response
        try:
            if isinstance(job.request, GradientRequest):
                response = GradientResponse(self._name, weights_hash, scores_B, gradients_BCHW)
            else:
                response = ScoreResponse(self._name, weights_hash, scores_B)
        except RewardInvalid as error:
            return error
        self._metrics.scored(scores_B)
        return response


def _deliver(job: _Job, result: Response | RewardError | None) -> None:
    if job.vanished or result is None:
        return
    if isinstance(result, RewardError):
        job.answer.set_exception(result)
    else:
        job.answer.set_result(result)
