"""Cache of scores in Redis: one entry per image, keyed by everything that its score depends on.

    rtdmd:score:KEY     float32 score of one image, signed if there is a token
    rtdmd:scores        orders the keys by last use

The cache has a maximum number of entries and evicts the least recently used first. Every entry expires after EXPIRES_S.
Only exact hits count. A request is atomic: if all its images are cached the cache answers, else the whole request is
sent. A cached score may differ in its last bits from a new one, because it was computed in a different batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import cast

import numpy as np
import redis

from common.redis_link import RedisLink
from common.rewards.api import FloatArray, ScoreRequest, ServerInfo
from common.signed_values import Purpose, Signer
from common.wire import pack

EXPIRES_S = 7 * 24 * 3600
SCORE_BYTES = 4
LARGEST_REQUEST = 4096
"""A larger request is neither looked up nor cached: it would block Redis for other clients."""
SCORE_ORDER = "rtdmd:scores"


class ScoreCache:
    """Cached scores by key (`score_keys`).

    Args:
        token: entries are signed with it, and others are not believed.
    """

    def __init__(self, link: RedisLink, max_entries: int, token: str | None = None) -> None:
        self._link = link
        self._max_entries = max_entries
        self._signer = Signer(token, Purpose.SCORE)

    @property
    def ignored(self) -> int:
        """Number of entries that were read and had no valid signature."""
        return self._signer.ignored

    def get(self, keys: Sequence[str]) -> FloatArray | None:
        """Scores float32 [B], or None unless all are cached; StoreError as in `RedisLink.call`."""
        if not 0 < len(keys) <= LARGEST_REQUEST:
            return None

        def read(client: redis.Redis) -> list[bytes | None]:
            now = time.time()
            with client.pipeline() as pipeline:
                pipeline.mget([_score(key) for key in keys])
                pipeline.zadd(SCORE_ORDER, dict.fromkeys(keys, now), xx=True)
                found: list[bytes | None] = pipeline.execute()[0]
                return found

        contents = self._link.call(read)
        if None in contents:
            return None
        found = [self._signer.payload(_score(key), content or b"") for key, content in zip(keys, contents, strict=True)]
        if any(score is None or len(score) != SCORE_BYTES for score in found):
            return None
        return np.frombuffer(b"".join(score or b"" for score in found), dtype="<f4").astype(np.float32)

    def put(self, keys: Sequence[str], scores_B: FloatArray) -> None:
        if len(keys) > LARGEST_REQUEST:
            return
        scores = zip(keys, scores_B.astype("<f4"), strict=True)
        contents = [self._signer.signed(_score(key), score.tobytes()) for key, score in scores]

        def write(client: redis.Redis) -> None:
            now = time.time()
            with client.pipeline() as pipeline:
                for key, content in zip(keys, contents, strict=True):
                    pipeline.set(_score(key), content, ex=EXPIRES_S)
                pipeline.zadd(SCORE_ORDER, dict.fromkeys(keys, now))
                pipeline.zcard(SCORE_ORDER)
                entries: int = pipeline.execute()[-1]
            # Bounded, for entries that another program put there: the next requests take out the others.
            excess = min(entries - self._max_entries, 2 * LARGEST_REQUEST)
            if excess > 0:
                oldest = cast("list[tuple[bytes, float]]", client.zpopmin(SCORE_ORDER, excess))
                client.delete(*(_score("").encode() + entry for entry, _ in oldest))

        self._link.call(write)


def image_digests(request: ScoreRequest) -> tuple[bytes, ...]:
    """The sha256 of each image together with its size, prompt and metadata."""
    metadata = request.metadata or [{}] * len(request.prompts)
    return tuple(
        _digest(
            repr(image_HWC.shape).encode(), np.ascontiguousarray(image_HWC).data, prompt.encode(), pack({"of": about})
        )
        for image_HWC, prompt, about in zip(request.images_BHWC, request.prompts, metadata, strict=True)
    )


def score_keys(digests: Sequence[bytes], info: ServerInfo) -> tuple[str, ...]:
    """Cache keys: image, prompt and the scorer's identity. Empty for weights without identity."""
    if not info.weights_hash:
        return ()
    scored_by = info.to_json()
    return tuple(_digest(digest, scored_by).hex() for digest in digests)


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        # The lengths distinguish ("ab", "c") from ("a", "bc").
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _score(key: str) -> str:
    return f"rtdmd:score:{key}"
