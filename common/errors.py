"""Every error this project raises on purpose. Each message names the thing, the value and the remedy.

RtdmdError
├── ConfigError               a run file or override that cannot be run
├── PromptError               a prompt file or a prompt that cannot be used
├── ModelError                a model directory that is missing, incomplete or corrupt
├── CheckpointError           a checkpoint that is missing, incomplete or of another run
├── WireError                 bytes that are not a valid message
├── WeightUpdateError         published weights that do not fit the receiver (keys, shapes, base model)
│   └── AttestationError      weights were applied, but what the receiver now computes is not what was published
├── WorkerError               rollout workers are gone and could not be brought back
├── LearnerError              the learner died or does not answer
├── TrainingError             an update that must not be made: its gradient is not finite
├── StoreError                Redis does not answer; whoever asked goes on without it
├── RunStopped                somebody asked the run to stop, through Redis; --resume goes on
└── RewardError               a reward that could not be had; carries `reward`, `cause` and the `url` of its server
    ├── RewardUnavailable     refused, reset, timed out, 5xx, no access: worth another try, at another server
    ├── RewardOverloaded      429: worth another try, after `retry_after` seconds
    ├── RewardRejected        400, 413, 422: the request itself is wrong, another try would fail as well
    ├── RewardInvalid         an answer of the wrong count or shape, or one that is not finite
    └── RewardOutage          did not come back in the time a run was told to wait for it
"""

from __future__ import annotations


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


class WireError(RtdmdError):
    """Bytes that are not a valid message of ours."""


class WeightUpdateError(RtdmdError):
    """Published weights that do not fit the receiver."""


class AttestationError(WeightUpdateError):
    """Weights were applied, yet the receiver does not compute what the publisher computed."""


class WorkerError(RtdmdError):
    """Rollout workers are gone and could not be brought back."""


class LearnerError(RtdmdError):
    """The learner died or does not answer."""


class TrainingError(RtdmdError):
    """An update that must not be made: its gradient is not finite."""


class StoreError(RtdmdError):
    """Redis does not answer. Nothing that matters is kept there alone: whoever asked goes on without it."""


class RunStopped(RtdmdError):
    """Somebody asked the run to stop, through Redis; it has written a checkpoint."""


class RewardError(RtdmdError):
    """A reward that could not be had.

    `cause` is a short fixed word ("timeout", "refused", "nan", ...), used as a metric label when failures are counted.
    `url` is the server that failed, empty when it was none in particular.
    """

    def __init__(self, reward: str, cause: str, message: str) -> None:
        super().__init__(message)
        self.reward = reward
        self.cause = cause
        self.url = ""

    def __reduce__(self) -> tuple[type[RewardError], tuple[str, str, str], dict[str, object]]:
        """Survive the trip between processes (the default would call the class with the message alone)."""
        return type(self), (self.reward, self.cause, str(self)), dict(vars(self))


class RewardUnavailable(RewardError):
    """The server could not be reached or broke: worth another try."""


class RewardOverloaded(RewardError):
    """The server's queue is full (429): worth another try, after `retry_after` seconds."""

    def __init__(self, reward: str, cause: str, message: str, retry_after: float = 0.1) -> None:
        super().__init__(reward, cause, message)
        self.retry_after = retry_after


class RewardRejected(RewardError):
    """The request itself is wrong: another try would fail as well."""


class RewardInvalid(RewardError):
    """An answer of the wrong count or shape, or one that is not finite."""


class RewardOutage(RewardError):
    """A reward did not come back in the time a run was told to wait for it; `cause` is its last failure's."""
