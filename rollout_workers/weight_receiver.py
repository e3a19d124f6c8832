"""Applies published weights to a worker's backbone and proves that they took effect."""

from __future__ import annotations

import torch

from common.backbones.base import Backbone
from common.errors import AttestationError, WeightUpdateError
from common.types import Network, PolicyVersion
from common.weights import Manifest, PublishedWeights, attestation_velocity, student_state
from common.wire import tensor_hashes, weights_from_bytes

VELOCITY_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference allowed between a worker's and the learner's velocity, because they may order sums differently."""


class WeightReceiver:
    """Tracks the version that a backbone holds; `receive` changes it, or raises an error that names the problem."""

    def __init__(self, backbone: Backbone, velocity_tolerance: float = VELOCITY_TOLERANCE["float32"]) -> None:
        self._backbone = backbone
        self._velocity_tolerance = velocity_tolerance
        self._version: PolicyVersion | None = None

    def receive(self, published: PublishedWeights) -> PolicyVersion:
        """Apply a publication unless it is already applied.

        Raises:
            WeightUpdateError: another base model, a missing or unknown key, a wrong shape.
            WireError: the payload is not valid safetensors.
            AttestationError: the weights were applied but differ from the manifest, or compute something else.
        """
        manifest = published.manifest
        if manifest.version == self._version:
            return manifest.version
        self._require_same_base(manifest)
        self._version = None
        self._apply(published)
        self._attest_weights(manifest)
        self._attest_velocity(manifest)
        self._version = manifest.version
        return manifest.version

    def _require_same_base(self, manifest: Manifest) -> None:
        own = self._backbone.base_fingerprint()
        if own != manifest.base_fingerprint:
            raise WeightUpdateError(
                f"weights version {manifest.version.number} were trained on base {manifest.base_fingerprint}, but this "
                f"worker loaded base {own}: point learner and workers at the same model directory"
            )

    def _apply(self, published: PublishedWeights) -> None:
        bank, stack = self._backbone.adapters, published.manifest.stack
        if not stack:
            raise WeightUpdateError(f"weights version {published.manifest.version.number} contain no adapter")
        state = weights_from_bytes(published.payload.tobytes())
        foreign = sorted(key for key in state if key.split("/", 1)[0] not in stack)
        if foreign:
            raise WeightUpdateError(f"payload has keys of adapters outside the stack {stack}: {foreign[:3]}")
        hashed = published.manifest.tensor_hashes.keys()
        missing, unknown = sorted(hashed - state.keys()), sorted(state.keys() - hashed)
        if missing or unknown:
            raise WeightUpdateError(
                f"payload does not fit its manifest: {len(missing)} tensors missing {missing[:2]}, "
                f"{len(unknown)} unknown {unknown[:2]}"
            )
        for adapter in stack:
            mine = {
                key.split("/", 1)[1]: torch.from_numpy(v) for key, v in state.items() if key.startswith(f"{adapter}/")
            }
            if bank.parameters(adapter):
                bank.load(adapter, mine)
            else:
                bank.attach(adapter, mine)
        bank.define(Network.STUDENT, stack)

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
