"""Applies published weights to a worker's backbone and proves that they took effect.

A publication leaves out the adapters that are frozen. The receiver keeps those that it attested with the publication
before, if they are the same. Otherwise it takes them from the call's frozen weights: on a new worker, and
when a stage begins. Either way it hashes all weights that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

from common.backbones.base import Backbone
from common.errors import AttestationError, WeightUpdateError
from common.types import FloatArray, Network, PolicyVersion
from common.weights import Manifest, Payload, PublishedWeights, attestation_velocity, student_state
from common.wire import tensor_hashes, weights_from_bytes

Value = TypeVar("Value")
Hashes = dict[str, str]
"""Path -> hash, of one adapter."""
Weights = dict[str, FloatArray]
"""Path -> float32 array, of one adapter."""
VELOCITY_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference allowed between a worker's and the learner's velocity, because they may order sums differently."""


class WeightReceiver:
    """Tracks the version that a backbone holds; `receive` changes it, or raises an error that names the problem."""

    def __init__(self, backbone: Backbone, velocity_tolerance: float = VELOCITY_TOLERANCE["float32"]) -> None:
        self._backbone = backbone
        self._velocity_tolerance = velocity_tolerance
        self._version: PolicyVersion | None = None
        self._attested: Mapping[str, str] = {}

    def receive(self, published: PublishedWeights, frozen: Payload | None = None) -> PolicyVersion:
        """Apply a publication unless it is already applied; `frozen` has the adapters that it leaves out, if any.

        Raises:
            WeightUpdateError: another base model, a missing or unknown key, a wrong shape.
            WireError: a payload is not valid safetensors.
            AttestationError: the weights were applied but differ from the manifest, or compute something else.
        """
        manifest = published.manifest
        if manifest.version == self._version:
            return manifest.version
        self._require_same_base(manifest)
        before, self._attested, self._version = self._attested, {}, None
        self._apply(manifest, self._changed(published, frozen, _by_adapter(before)))
        self._attest_weights(manifest)
        self._attest_velocity(manifest)
        self._attested, self._version = manifest.tensor_hashes, manifest.version
        return manifest.version

    def _require_same_base(self, manifest: Manifest) -> None:
        own = self._backbone.base_fingerprint()
        if own != manifest.base_fingerprint:
            raise WeightUpdateError(
                f"weights version {manifest.version.number} were trained on base {manifest.base_fingerprint}, but this "
                f"worker loaded base {own}: point learner and workers at the same model directory"
            )

    def _changed(
        self, published: PublishedWeights, frozen: Payload | None, before: Mapping[str, Hashes]
    ) -> dict[str, Weights]:
        """The weights of every adapter in the stack but those that are left out and were attested `before`."""
        manifest = published.manifest
        if not manifest.stack:
            raise WeightUpdateError(f"weights version {manifest.version.number} contain no adapter")
        due, sent = _by_adapter(manifest.tensor_hashes), _unpacked(published.payload)
        foreign = sorted(sent.keys() - set(manifest.stack))
        if foreign:
            raise WeightUpdateError(f"payload has adapters outside the stack {manifest.stack}: {foreign[:3]}")
        kept = {adapter for adapter in due.keys() - sent.keys() if due[adapter] == before.get(adapter)}
        left_out = set(manifest.stack) - sent.keys() - kept
        if left_out and frozen is not None:
            sent |= {adapter: weights for adapter, weights in _unpacked(frozen).items() if adapter in left_out}
        _require_same_keys(sent, {adapter: hashes for adapter, hashes in due.items() if adapter not in kept})
        return {adapter: sent.get(adapter, {}) for adapter in manifest.stack if adapter not in kept}

    def _apply(self, manifest: Manifest, weights: Mapping[str, Weights]) -> None:
        bank = self._backbone.adapters
        for adapter, arrays in weights.items():
            state = {path: torch.from_numpy(array) for path, array in arrays.items()}
            if bank.parameters(adapter):
                bank.load(adapter, state)
            else:
                bank.attach(adapter, state)
        bank.define(Network.STUDENT, manifest.stack)

    def _attest_weights(self, manifest: Manifest) -> None:
        live = tensor_hashes(student_state(self._backbone))
        wrong = sorted(
            key
            for key in manifest.tensor_hashes.keys() | live.keys()
            if manifest.tensor_hashes.get(key) != live.get(key)
        )
        if wrong:
            raise AttestationError(
                f"after applying weights version {manifest.version.number}, {len(wrong)} of {len(live)} tensors are "
                f"not what was published, the first being {wrong[0]}"
            )

    def _attest_velocity(self, manifest: Manifest) -> None:
        published = torch.from_numpy(manifest.attestation_velocity_chw.copy())
        error = (attestation_velocity(self._backbone) - published).abs().max().item()
        # Written so that NaN fails as well.
        if not error <= self._velocity_tolerance:
            raise AttestationError(
                f"weights version {manifest.version.number} are in place, but the attestation velocity is off "
                f"by {error:.2e} (allowed {self._velocity_tolerance:.0e}): worker and learner do not compute the same"
            )


def _by_adapter(flat: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """`adapter/path` -> value as adapter -> path -> value."""
    nested: dict[str, dict[str, Value]] = {}
    for key, value in flat.items():
        adapter, _, path = key.partition("/")
        nested.setdefault(adapter, {})[path] = value
    return nested


def _unpacked(payload: Payload) -> dict[str, Weights]:
    return _by_adapter(weights_from_bytes(payload.tobytes()))


def _require_same_keys(sent: Mapping[str, Weights], due: Mapping[str, Hashes]) -> None:
    """WeightUpdateError unless all weights that are due have been sent, and no others."""
    there, here = ({f"{adapter}/{path}" for adapter, parts in named.items() for path in parts} for named in (due, sent))
    missing, unknown = sorted(there - here), sorted(here - there)
    if missing or unknown:
        raise WeightUpdateError(
            f"payload does not fit its manifest: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(unknown)} unknown {unknown[:2]}"
        )
