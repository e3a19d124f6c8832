"""Dynamic batching: whole requests that wait together share one model call.

    submit() ──► queue ──► one batch at a time ──► the model thread ──► each request's own slice, all of it or an error

A request is never spread over the calls of others. One larger than `max_batch` runs alone, in chunks, and is still
answered at once. Where requests share no calls (`share_calls` off) what a request scores, to the last bit, depends on
nothing but itself, however busy the server is: that makes whole runs reproducible.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
from reward_servers.metrics import ServerMetrics
from reward_servers.scorers.base import Scorer

RETRY_AFTER_SECONDS = 1

Request = ScoreRequest | GradientRequest
Response = ScoreResponse | GradientResponse

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchLimits:
    """Images per model call, seconds the first request of a batch waits for company, images that may wait at all.

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

    @property
    def images(self) -> ByteArray | FloatArray:
        return self.request.images_BHWC if isinstance(self.request, ScoreRequest) else self.request.images_BCHW

    @property
    def vanished(self) -> bool:
        """Nobody waits for the answer any more."""
        return self.answer.done()

    def joins(self, other: _Job) -> bool:
        """Whether both can share a model call."""
        return type(self.request) is type(other.request) and self.images.shape[1:] == other.images.shape[1:]


class Batcher:
    """Feeds one scorer. Lives in one event loop; `run` must be running for anything to be answered."""

    def __init__(self, scorer: Scorer, name: str, limits: BatchLimits, metrics: ServerMetrics) -> None:
        self._scorer = scorer
        self._name = name
        self._limits = limits
        self._metrics = metrics
        self._queue: deque[_Job] = deque()
        self._arrival = asyncio.Event()
        # A model is not thread-safe, and two calls at once would only take turns on the same cores.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scorer")
        self.busy = False

    def submit(self, request: Request) -> asyncio.Future[Response]:
        """Queue a request. Cancel the future to withdraw it. RewardOverloaded when too many images wait already.

        A request into an empty queue is always taken, whatever its size. RewardRejected when the scorer refuses it.
        """
        self._scorer.check(request.prompts, _metadata_per_image(request))
        job = _Job(request, asyncio.get_running_loop().create_future())
        waiting = self._count_waiting()
        if waiting > 0 and waiting + len(job.images) > self._limits.queue_images:
            message = f"{waiting} images wait, {len(job.images)} more exceed {self._limits.queue_images}: try later"
            raise RewardOverloaded(self._name, "overloaded", message, RETRY_AFTER_SECONDS)
        self._queue.append(job)
        self._metrics.waiting(waiting + len(job.images))
        self._arrival.set()
        return job.answer

    async def run(self) -> None:
        """Answer requests until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [job for job in await self._next_batch() if not job.vanished]
            if not batch:
                continue
            self.busy = True
            results = await loop.run_in_executor(self._thread, self._execute, batch)
            self.busy = False
            for job, result in zip(batch, results, strict=True):
                _deliver(job, result)

    def close(self) -> None:
        """Let go of the model thread; a call it is in the middle of is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _next_batch(self) -> list[_Job]:
        """Wait for a request, then for its company: until the batch is full, the next does not fit, or time is up."""
        while not self._drop_vanished():
            await self._wait_for_arrival(None)
        batch = [self._queue.popleft()]
        if not self._limits.share_calls:
            self._metrics.waiting(self._count_waiting())
            return batch
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.max_wait_s
        while True:
            self._collect(batch)
            full = sum(len(job.images) for job in batch) >= self._limits.max_batch
            if full or self._queue or not await self._wait_for_arrival(until - loop.time()):
                break
        self._metrics.waiting(self._count_waiting())
        return batch

    def _collect(self, batch: list[_Job]) -> None:
        """Move the queue's head into `batch` while it fits; order of arrival is kept."""
        images = sum(len(job.images) for job in batch)
        while self._drop_vanished():
            job = self._queue[0]
            if not job.joins(batch[0]) or images + len(job.images) > self._limits.max_batch:
                return
            batch.append(self._queue.popleft())
            images += len(job.images)

    def _drop_vanished(self) -> bool:
        """Forget requests at the head whose client is gone; whether one is left."""
        while self._queue and self._queue[0].vanished:
            self._queue.popleft()
        return bool(self._queue)

    async def _wait_for_arrival(self, seconds: float | None) -> bool:
        self._arrival.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._arrival.wait()
        except TimeoutError:
            return False
        return True

    def _count_waiting(self) -> int:
        return sum(len(job.images) for job in self._queue if not job.vanished)

    def _execute(self, batch: Sequence[_Job]) -> list[Response | RewardError]:
        """In the model thread: score all images of the batch, then cut the result back into requests."""
        try:
            scores_B, gradients_BCHW = self._run_scorer(batch)
        except RewardInvalid as error:
            return [error] * len(batch)
        except Exception as error:  # whatever a scorer raises is an answer to its requests, never the server's end
            logger.exception("the scorer failed on %d requests", len(batch))
            return [RewardInvalid(self._name, "scorer", f"{type(error).__name__}: {error}")] * len(batch)
        ends = np.cumsum([len(job.images) for job in batch])[:-1]
        pieces = zip(np.split(scores_B, ends), np.split(gradients_BCHW, ends), strict=True)
        return [self._respond(job, *piece) for job, piece in zip(batch, pieces, strict=True)]

    def _run_scorer(self, batch: Sequence[_Job]) -> tuple[FloatArray, FloatArray]:
        """Scores [B] and gradients [B, 3, H, W] ([B, 0] for score requests) of all images, in chunks of max_batch."""
        images = np.concatenate([job.images for job in batch])
        prompts = [prompt for job in batch for prompt in job.request.prompts]
        metadata = [item for job in batch for item in _metadata_per_image(job.request)]
        scores, gradients = [], []
        for start in range(0, len(images), self._limits.max_batch):
            chunk = slice(start, start + self._limits.max_batch)
            with_gradient = isinstance(batch[0].request, GradientRequest)
            call = self._call_with_gradient if with_gradient else self._call
            chunk_scores, chunk_gradients = call(images[chunk], prompts[chunk], metadata[chunk])
            scores.append(chunk_scores)
            gradients.append(chunk_gradients)
        return np.concatenate(scores), np.concatenate(gradients)

    def _call(
        self, images_BHWC: ByteArray, prompts: list[str], metadata: list[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        self._metrics.model_called(len(images_BHWC))
        scores_B = np.asarray(self._scorer.score(images_BHWC, prompts, metadata), dtype=np.float32)
        self._check_shape("scores", scores_B, (len(images_BHWC),))
        return scores_B, np.empty((len(images_BHWC), 0), dtype=np.float32)

    def _call_with_gradient(
        self, images_BCHW: FloatArray, prompts: list[str], metadata: list[Metadata]
    ) -> tuple[FloatArray, FloatArray]:
        self._metrics.model_called(len(images_BCHW))
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


def _metadata_per_image(request: Request) -> Sequence[Metadata]:
    return request.metadata or [{} for _ in request.prompts]


def _deliver(job: _Job, result: Response | RewardError) -> None:
    if job.vanished:
        return
    if isinstance(result, RewardError):
        job.answer.set_exception(result)
    else:
        job.answer.set_result(result)
