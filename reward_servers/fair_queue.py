"""The requests that wait for one scorer, in turns of the runs that sent them.

    run a:  a1 a2 a3        the next call takes  a1 b1 c1 a2 b2 a3, as far as they fit it
    run b:  b1 b2           then it is b's turn to be first
    run c:  c1

A run is a name that its clients send (`RUN_HEADER`). Requests without one belong to one run. Within a run the order is
that of arrival. Only runs that wait are known, so nothing is kept of those that are gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.rewards.api import (
    ByteArray,
    FloatArray,
    GradientRequest,
    GradientResponse,
    ScoreRequest,
    ScoreResponse,
)

ANONYMOUS = b""
"""The run of requests that name none."""
MOST_RUNS = 64
"""With so many runs waiting, the requests of further ones count as anonymous."""
LARGEST_SHARE = 0.75
"""A run that has a name leaves the rest of the queue to others."""

Request = ScoreRequest | GradientRequest
Response = ScoreResponse | GradientResponse


@dataclass(eq=False)
class Job:
    """One request, from its arrival to its answer.

    Attributes:
        arrived: time of the event loop.
    """

    request: Request
    answer: asyncio.Future[Response]
    arrived: float
    found_busy: bool
    """The device was busy when the request came: it needs no further wait for others."""
    run: bytes = ANONYMOUS
    begun: int = 0
    """Number of images given to calls so far, counted from the first."""
    parts: list[tuple[FloatArray, FloatArray]] = field(default_factory=list)
    """Scores and gradients of the images that are done."""

    @property
    def images(self) -> ByteArray | FloatArray:
        return self.request.images_BHWC if isinstance(self.request, ScoreRequest) else self.request.images_BCHW

    @property
    def waiting(self) -> int:
        return len(self.images) - self.begun

    @property
    def vanished(self) -> bool:
        """The response is no longer needed: the client left, its deadline has passed, or a part has failed."""
        return self.answer.done()

    def joins(self, other: Job) -> bool:
        """Whether both requests can share a model call."""
        return type(self.request) is type(other.request) and self.images.shape[1:] == other.images.shape[1:]


class FairQueue:
    """Requests in the order in which calls should take them."""

    def __init__(self) -> None:
        # In the order of their turns. Dicts, so that a withdrawn request is removed at once from any position.
        self._runs: dict[bytes, dict[Job, None]] = {}
        self._images: dict[bytes, int] = {}

    @property
    def images(self) -> int:
        """Images that wait, of all runs."""
        return sum(self._images.values())

    def __len__(self) -> int:
        return sum(map(len, self._runs.values()))

    def __contains__(self, job: Job) -> bool:
        return job in self._runs.get(job.run, ())

    def __iter__(self) -> Iterator[Job]:
        """One request of each run, in turns, until none is left."""
        turns = [iter(jobs) for jobs in self._runs.values()]
        while turns:
            left = []
            for jobs in turns:
                job = next(jobs, None)
                if job is not None:
                    left.append(jobs)
                    yield job
            turns = left

    def has_room(self, run: bytes, images: int, most: int) -> bool:
        """Whether `images` more of a run may wait where `most` may. A run without a request there may send one."""
        own = self._images.get(self._known(run), 0)
        share = most if run == ANONYMOUS or own == 0 else int(LARGEST_SHARE * most)
        return self.images + images <= most and own + images <= share

    def ahead(self, run: bytes, images: int) -> int:
        """Images that calls take before `images` more of a run, if shares are equal. With one run, all that wait."""
        run = self._known(run)
        own = self._images.get(run, 0)
        return own + sum(min(waiting, own + images) for other, waiting in self._images.items() if other != run)

    def add(self, job: Job) -> None:
        job.run = self._known(job.run)
        self._runs.setdefault(job.run, {})[job] = None
        self._images[job.run] = self._images.get(job.run, 0) + job.waiting

    def took(self, job: Job, images: int) -> None:
        """So many images of a waiting request were given to a call; with the last one it leaves."""
        job.begun += images
        self._images[job.run] -= images
        if job.waiting == 0:
            self._leave(job)

    def remove(self, job: Job) -> None:
        self._images[job.run] -= job.waiting
        self._leave(job)

    def end_turn(self, run: bytes) -> None:
        """It is the next run's turn to be first."""
        if run in self._runs:
            self._runs[run] = self._runs.pop(run)

    def _known(self, run: bytes) -> bytes:
        return run if run in self._runs or len(self._runs) < MOST_RUNS else ANONYMOUS

    def _leave(self, job: Job) -> None:
        del self._runs[job.run][job]
        if not self._runs[job.run]:
            del self._runs[job.run], self._images[job.run]
