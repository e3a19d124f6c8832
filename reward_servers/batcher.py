"""Dynamic batching: whole requests that wait together share one model call.

    submit() ──► a scorer's queue ──► the device's turn ──► one batch ──► each request's own slice, or an error

The batch is taken when the device is free, not before: under load it is whatever has come together during the calls
before it, and it never waits. Only an idle device lets a first request wait for company, for `max_wait_s` at most.

A request is never spread over the calls of others. One larger than `max_batch` runs alone, in chunks, and is still
answered at once. Where requests share no calls (`share_calls` off) what a request scores, to the last bit, depends on
nothing but itself, however busy the server is: that makes whole runs reproducible.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from common.errors import RewardError, RewardInvalid, RewardOverloaded
from common.reward_api import (
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
    """Images per model call, seconds a first request waits for company, images that may wait at all.

    With `share_calls` off a request never waits for company and never gets any.
    """

    max_batch: int
    max_wait_s: float
    queue_images: int
    share_calls: bool = True


@dataclass(frozen=True, eq=False)
class _Job:
    request: Request
    answer: asyncio.Future[Response]
    arrived: float
    found_busy: bool
    """The device was at work when the request came: waiting for that is wait enough."""

    @property
    def images(self) -> ByteArray | FloatArray:
        return self.request.images_BHWC if isinstance(self.request, ScoreRequest) else self.request.images_BCHW

    @property
    def vanished(self) -> bool:
        """Nobody waits for the answer any more: the client hung up, or its deadline has passed."""
        return self.answer.done()

    def joins(self, other: _Job) -> bool:
        """Whether both can share a model call."""
        return type(self.request) is type(other.request) and self.images.shape[1:] == other.images.shape[1:]


class Device:
    """What all models of a process run on: one call at a time, in turns, in a thread that is not the event loop's.

    A model is not thread-safe, and two calls at once would only take turns on the same cores.
    """

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    @property
    def busy(self) -> bool:
        return self.turn.locked()

    async def run(self, call: Callable[[], Result]) -> Result:
        """Run `call` in the device's thread. Only for who has the turn."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

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
        """RewardOverloaded when `images` more are too many. An empty queue takes a request of any size."""
        waiting = self._images_waiting
        if waiting > 0 and waiting + images > self._limits.queue_images:
            message = f"{waiting} images wait, {images} more exceed {self._limits.queue_images}: try later"
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
                batch = self._take_batch()
                results = await self._device.run(lambda batch=batch: self._execute(batch)) if batch else []
            for job, result in zip(batch, results, strict=True):
                _deliver(job, result)

    async def _wait_for_work(self) -> None:
        """Return when a batch should start as soon as the device is free."""
        while not self._queue:
            await self._wait_for_arrival(None)
        first = next(iter(self._queue))
        if first.found_busy or not self._limits.share_calls:
            return
        loop = asyncio.get_running_loop()
        until = first.arrived + self._limits.max_wait_s
        while self._queue and not self._batch_is_full():
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

    def _next_batch(self) -> list[_Job]:
        """The requests at the head of the queue that share a call; order of arrival is kept."""
        batch: list[_Job] = []
        images = 0
        for job in self._queue:
            if job.vanished:
                continue
            images += len(job.images)
            if batch and not (self._limits.share_calls and job.joins(batch[0]) and images <= self._limits.max_batch):
                break
            batch.append(job)
        return batch

    def _batch_is_full(self) -> bool:
        """Whether waiting longer could not make the next batch any larger."""
        batch = self._next_batch()
        return len(batch) < len(self._queue) or sum(len(job.images) for job in batch) >= self._limits.max_batch

    def _take_batch(self) -> list[_Job]:
        for job in [job for job in self._queue if job.vanished]:
            self._leave_queue(job)
        batch = self._next_batch()
        for job in batch:
            self._leave_queue(job)
        return batch

    def _leave_queue(self, job: _Job) -> None:
        if job in self._queue:
            del self._queue[job]
            self._count(-len(job.images))

    def _count(self, images: int) -> None:
        self._images_waiting += images
        self._metrics.waiting(self._images_waiting)

    def _execute(self, batch: Sequence[_Job]) -> list[Response | RewardError]:
        """In the device's thread: score all images of the batch, then cut the result back into requests."""
        try:
            scores_B, gradients_BCHW = self._run_scorer(batch)
        except Exception as error:  # whatever a scorer raises is an answer to its requests, never the server's end
            if len(batch) > 1:  # one bad request must not fail those it shared a call with
                return [result for job in batch for result in self._execute([job])]
            if isinstance(error, RewardError):
                return [error]
            logger.exception("the scorer %s failed", self._name)
            return [RewardInvalid(self._name, "scorer", f"{type(error).__name__}: {error}")]
        ends = np.cumsum([len(job.images) for job in batch])[:-1]
        pieces = zip(np.split(scores_B, ends), np.split(gradients_BCHW, ends), strict=True)
        return [self._respond(job, *piece) for job, piece in zip(batch, pieces, strict=True)]

    def _run_scorer(self, batch: Sequence[_Job]) -> tuple[FloatArray, FloatArray]:
        """Scores [B] and gradients [B, 3, H, W] ([B, 0] for score requests) of all images, in chunks of max_batch."""
        images = np.concatenate([job.images for job in batch]) if len(batch) > 1 else batch[0].images
        prompts = [prompt for job in batch for prompt in job.request.prompts]
        metadata = [item for job in batch for item in _metadata_per_image(job)]
        scores, gradients = [], []
        for start in range(0, len(images), self._limits.max_batch):
            if all(job.vanished for job in batch):
                raise RewardInvalid(self._name, "deadline", "nobody waits for the rest of this request any more")
            chunk = slice(start, start + self._limits.max_batch)
            with_gradient = isinstance(batch[0].request, GradientRequest)
            call = self._call_with_gradient if with_gradient else self._call
            started = time.perf_counter()
            chunk_scores, chunk_gradients = call(images[chunk], prompts[chunk], metadata[chunk])
            self._metrics.model_called(len(images[chunk]), time.perf_counter() - started)
            scores.append(chunk_scores)
            gradients.append(chunk_gradients)
        return np.concatenate(scores), np.concatenate(gradients)

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

    def _respond(self, job: _Job, scores_B: FloatArray, gradients_BCHW: FloatArray) -> Response | RewardInvalid:
        """One request's answer; a value that is not finite fails that request and no other."""
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


def _metadata_per_image(job: _Job) -> Sequence[Metadata]:
    return job.request.metadata or [{} for _ in job.request.prompts]


def _deliver(job: _Job, result: Response | RewardError) -> None:
    if job.vanished:
        return
    if isinstance(result, RewardError):
        job.answer.set_exception(result)
    else:
        job.answer.set_result(result)
