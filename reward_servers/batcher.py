"""Dynamic batching: waiting images share a model call, even if they came with different requests.

    submit() ──► a scorer's queue ──► the device's turn ──► one call ──► each request's own slice, or an error

A call is put together when the device becomes free, never before. Under load it holds the images that arrived during
the previous calls and does not wait. Only on an idle device does a first request wait for others, at most `max_wait_s`.

Runs that wait take turns (`fair_queue`). The head of the queue always goes first. Every call is filled up to
`max_batch` with images that fit it, even if that splits a request: groups of 9 fill calls of 16. A request is answered
as a whole, as soon as its last image is done. Without shared calls (`share_calls` off) a request's scores depend only
on the request itself, to the last bit and at any load. That makes whole runs reproducible.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from common.errors import RewardError, RewardInvalid, RewardOverloaded, RewardRejected
from common.rewards.api import ByteArray, FloatArray, GradientRequest, GradientResponse, Metadata, ScoreResponse
from reward_servers.fair_queue import ANONYMOUS, FairQueue, Job, Request, Response
from reward_servers.metrics import ScorerMetrics
from reward_servers.scorers.base import ModelUnavailable, Scorer

RETRY_AFTER_SECONDS = 1
"""Retry-After is given in whole seconds; clients add their own jitter."""
KEPT_SHARE = 0.9
"""Each call weighs this share of the one after it in the measured speed."""

RESTART = "restart the server if it is stuck"

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchLimits:
    """Images per model call, seconds that a first request waits for others, and images that may wait.

    The last limit also bounds the images of one request. With `share_calls` off a request never waits for others and
    never shares a call.
    """

    max_batch: int
    max_wait_s: float
    queue_images: int
    share_calls: bool = True


@dataclass(frozen=True)
class _Piece:
    """A slice of one request's images, as one model call gets it."""

    job: Job
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
        """One map per image."""
        return self.job.request.metadata[self.start : self.stop] or [{} for _ in self.prompts]

    @property
    def last(self) -> bool:
        return self.stop == len(self.job.images)


class Device:
    """The device of all models of a process. It runs one call at a time, in a thread outside the event loop.

    A model is not thread-safe, and two calls at once would only share the same cores. Models in several processes have
    a device each.

    Attributes:
        stuck: the way out of a call that does not end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, stuck: str = RESTART) -> None:
        self.stuck = stuck
        self.turn = asyncio.Lock()
        self._clock = clock
        self._call_began: float | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    @property
    def busy(self) -> bool:
        return self.turn.locked()

    @property
    def call_seconds(self) -> float:
        """Seconds that the current call has been running; 0 between calls."""
        return 0.0 if self._call_began is None else self._clock() - self._call_began

    async def run(self, call: Callable[[], Result]) -> Result:
        """Run `call` in the device's thread. The caller must hold the turn."""
        self._call_began = self._clock()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        finally:
            self._call_began = None

    def close(self) -> None:
        """Release the thread without waiting for a call in progress."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Speed:
    """Images per second under load, from the calls after which others still waited: those were as full as can be.

    The time of a call includes the wait for a device that several scorers share.
    """

    def __init__(self) -> None:
        self._images = 0.0
        self._seconds = 0.0

    def measured(self, images: int, seconds: float) -> None:
        self._images = KEPT_SHARE * self._images + images
        self._seconds = KEPT_SHARE * self._seconds + seconds

    def seconds(self, images: int) -> float:
        """Expected seconds for so many images; 0 before anything was measured."""
        return images * self._seconds / self._images if self._images > 0 else 0.0


class Batcher:
    """Feeds one scorer. Belongs to one event loop; `run` must be running for requests to be answered."""

    def __init__(self, scorer: Scorer, name: str, limits: BatchLimits, device: Device, metrics: ScorerMetrics) -> None:
        self._scorer = scorer
        self._name = name
        self._limits = limits
        self._device = device
        self._metrics = metrics
        self._queue = FairQueue()
        self._arrival = asyncio.Event()
        self._speed = Speed()

    def has_room(self, images: int, within_s: float, run: bytes = ANONYMOUS) -> bool:
        """Whether `images` more of a run fit into the queue, and can be answered `within_s` seconds as fast as now."""
        return self._queue.has_room(run, images, self._limits.queue_images) and (
            self._queue.images == 0 or self._seconds(images, run) <= within_s
        )

    def require_room(self, images: int, within_s: float, run: bytes = ANONYMOUS) -> None:
        """RewardOverloaded when `images` more do not fit now, RewardRejected when they can never fit."""
        waiting, most = self._queue.images, self._limits.queue_images
        if images > most:
            message = f"{images} images in one request, at most {most} may wait: send fewer or raise --queue-items"
            raise RewardRejected(self._name, "too_large", message)
        if not self.has_room(images, within_s, run):
            reason = f"{waiting} images wait, {images} more exceed {most}"
            if self._queue.has_room(run, images, most):
                seconds = self._seconds(images, run)
                reason = f"{waiting} images wait, {images} more would take {seconds:.1f} s of {within_s:g} s"
            elif waiting + images <= most:
                reason = f"{waiting} images wait, {images} more exceed the share that a run has of {most}"
            raise RewardOverloaded(self._name, "overloaded", f"{reason}: try later", RETRY_AFTER_SECONDS)

    def _seconds(self, images: int, run: bytes) -> float:
        """Expected seconds until so many more images of a run are answered."""
        return self._speed.seconds(self._queue.ahead(run, images) + images)

    def submit(self, request: Request, within_s: float = math.inf, run: bytes = ANONYMOUS) -> asyncio.Future[Response]:
        """Queue a request, or raise as `require_room`. Cancelling the future withdraws the request before it runs."""
        loop = asyncio.get_running_loop()
        job = Job(request, loop.create_future(), loop.time(), self._device.busy, run)
        self.require_room(len(job.images), within_s, run)
        self._queue.add(job)
        job.answer.add_done_callback(lambda _: self._leave_queue(job))
        self._metrics.waiting(self._queue.images)
        self._arrival.set()
        return job.answer

    async def run(self) -> None:
        """Answer requests until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_work()
            began = loop.time()
            async with self._device.turn:
                pieces = self._take_call()
                results = await self._device.run(partial(self._execute, pieces)) if pieces else []
            if self._queue and not any(isinstance(result, ModelUnavailable) for result in results):
                self._speed.measured(sum(len(piece.images) for piece in pieces), loop.time() - began)
            for piece, result in zip(pieces, results, strict=True):
                _deliver(piece.job, result)

    async def _wait_for_work(self) -> None:
        """Return when a call should start as soon as the device is free."""
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
        """The first images that can share a call: the head of the queue, then all that fit it, in the queue's order."""
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
        """Whether further waiting is useless: the call is full, or a request that cannot join it is already waiting."""
        pieces = self._next_call()
        return len(pieces) < len(self._queue) or sum(len(piece.images) for piece in pieces) == self._limits.max_batch

    def _take_call(self) -> list[_Piece]:
        for job in [job for job in self._queue if job.vanished]:
            self._leave_queue(job)
        pieces = self._next_call()
        for piece in pieces:
            self._queue.took(piece.job, len(piece.images))
        if pieces:
            self._queue.end_turn(pieces[0].job.run)
        self._metrics.waiting(self._queue.images)
        return pieces

    def _leave_queue(self, job: Job) -> None:
        if job in self._queue:
            self._queue.remove(job)
            self._metrics.waiting(self._queue.images)

    def _execute(self, pieces: Sequence[_Piece]) -> list[Response | RewardError | None]:
        """Run one call in the device's thread and cut its result into pieces. None for all but a request's last piece.

        A bad request must not fail those that share its call: a call that fails is halved until the request is alone.
        A call whose model process is lost fails as a whole.
        """
        try:
            scores_B, gradients_BCHW = self._run_scorer(pieces)
        except Exception as error:  # anything a scorer raises fails its requests and never stops the server
            if isinstance(error, ModelUnavailable):
                return [error] * len(pieces)
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
        """A request's response after its last piece, else None. A value that is not finite fails only that request."""
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


def _deliver(job: Job, result: Response | RewardError | None) -> None:
    if job.vanished or result is None:
        return
    if isinstance(result, RewardError):
        job.answer.set_exception(result)
    else:
        job.answer.set_result(result)
