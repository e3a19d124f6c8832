"""Every error this project raises on purpose. Each message names the thing, the value and the remedy.

RtdmdError
├── ConfigError               a run file or override that cannot be run
├── PromptError               a prompt file or a prompt that cannot be used
├── ModelError                a model directory that is missing, incomplete or corrupt
├── CheckpointError           a checkpoint that is missing, incomplete or of another run
├── WireError                 bytes that are not a valid message
├── WeightUpdateError         published weights that do not fit the receiver (keys, shapes, base model)
│   └── AttestationError      weights were applied, but what the receiver now computes is not what was published
├── WorkerError               rollout workers died and could not be restarted
├── LearnerError              the learner died or does not answer
│   └── RankError             one of the learner's ranks failed or died, so the others cannot continue
├── TrainingError             an update that must not be applied: its gradient is not finite
├── StoreError                Redis does not answer; the caller continues without it
├── RunStopped                a stop was requested, by a signal or through Redis; --resume continues the run
└── RewardError               a reward that is not available; carries `reward`, `cause` and the `url` of its server
    ├── RewardUnavailable     refused, reset, timed out, 5xx, no access: retry, at another server
    ├── RewardOverloaded      429: retry after `retry_after` seconds
    ├── RewardRejected        400, 413, 415, 422: the request itself is wrong, a retry would fail as well
    ├── RewardInvalid         a response of the wrong count or shape, or one that is not finite
    └── RewardOutage          the reward did not recover within the run's limit for an outage
"""

from __future__ import annotations

MESSAGE_CHARACTERS = 800
"""A library's message is cut to this many characters in ours."""


def one_line(error: BaseException, most: int = MESSAGE_CHARACTERS) -> str:
    """A library's whole message on one line: the remedy often stands in its second line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 4]} ..."


class RtdmdError(Exception):
    """Base class: catch this to catch everything the project raises on purpose."""


class ConfigError(RtdmdError):
    """A run file or an override that cannot be run."""


class PromptError(RtdmdError):
    """A prompt file or a prompt that cannot be used."""


class ModelError(RtdmdError):
    """A model directory that is missing, incomplete or corrupt."""


class CheckpointError(RtdmdError):
    """A checkpoint that is missing, incomplete or belongs to another run."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose content is not what was written."""


class WireError(RtdmdError):
    """Bytes that are not a valid message."""


class WeightUpdateError(RtdmdError):
    """Published weights that do not fit the receiver."""


class AttestationError(WeightUpdateError):
    """Weights or groups are not what was sent, or a receiver does not compute what the sender computed."""


class WorkerError(RtdmdError):
    """Rollout workers died and could not be restarted."""


class LearnerError(RtdmdError):
    """The learner died or does not answer."""


class RankError(LearnerError):
    """One of the learner's ranks failed or died, so the others cannot continue."""


class TrainingError(RtdmdError):
    """An update that must not be applied: its gradient is not finite."""


class StoreError(RtdmdError):
    """Redis does not answer. Redis never holds the only copy of important data: the caller continues without it."""


class RunStopped(RtdmdError):
    """A stop was requested through Redis; the run has written a checkpoint."""


class RewardError(RtdmdError):
    """A reward that is not available.

    `cause` is one of a fixed set of short words ("timeout", "refused", "nan", ...): the metric label of the failure.
    `url` is the server that failed; it is empty when no single server failed.
    """

    def __init__(self, reward: str, cause: str, message: str) -> None:
        super().__init__(message)
        self.reward = reward
        self.cause = cause
        self.url = ""

    def __reduce__(self) -> tuple[type[RewardError], tuple[str, str, str], dict[str, object]]:
        """Keep all fields when pickled between processes (the default would call the class with the message alone)."""
        return type(self), (self.reward, self.cause, str(self)), dict(vars(self))


class RewardUnavailable(RewardError):
    """The server is unreachable or failed: a retry may succeed."""


class RewardOverloaded(RewardError):
    """The server's queue is full (429): retry after `retry_after` seconds."""

    def __init__(self, reward: str, cause: str, message: str, retry_after: float = 0.1) -> None:
        super().__init__(reward, cause, message)
        self.retry_after = retry_after


class RewardRejected(RewardError):
    """The request itself is wrong: a retry would fail as well."""


class RewardInvalid(RewardError):
    """A response of the wrong count or shape, or one that is not finite."""


class RewardOutage(RewardError):
    """A reward did not recover within the run's limit for an outage; `cause` is that of its last failure."""
