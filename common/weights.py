"""Published weights: sent from the learner to every rollout worker and verified at both ends.

A publication is a safetensors payload and a manifest. The payload has the adapters that train. Those that are frozen
never change within a stage: `frozen_weights` has them, apart, so that they are sent once. The manifest contains a hash
of every tensor of both, the base model of the adapters, and the velocity that the learner itself computes for a fixed
prompt, noise and noise level. A receiver notices if it holds other weights, binds them to other modules, or computes
something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Backbone
from common.types import FloatArray, Network, PolicyVersion
from common.wire import fingerprint, tensor_hashes, weights_to_bytes

Payload = npt.NDArray[np.uint8]
"""Weights as safetensors bytes, `adapter/path` -> float32. The object store shares an array without a copy."""
ATTESTATION_PROMPT = "attestation probe"
ATTESTATION_SIGMA = 0.7
"""At this noise level a velocity depends on the prompt, the latents and every layer."""


@dataclass(frozen=True)
class Manifest:
    """Description of the student's weights.

    Attributes:
        version: counter and fingerprint of the weights of all adapters in the stack.
        stack: the adapters of the student, in order.
        tensor_hashes: "adapter/module path.lora_A.weight" -> xxh3-128 of dtype, shape and bytes.
        base_fingerprint: hash of the frozen transformer the adapters were trained on.
        attestation_velocity_chw: float32; the student's velocity for the fixed input, computed by the learner.
    """

    version: PolicyVersion
    stack: tuple[str, ...]
    tensor_hashes: dict[str, str]
    base_fingerprint: str
    attestation_velocity_chw: FloatArray


@dataclass(frozen=True)
class PublishedWeights:
    """Manifest of the student's weights, and those of its adapters that train."""

    manifest: Manifest
    payload: Payload


def student_state(backbone: Backbone) -> dict[str, FloatArray]:
    """The live weights of every adapter in the student's stack, as `adapter/path` -> float32 array."""
    return _state(backbone, backbone.adapters.stack(Network.STUDENT))


def _state(backbone: Backbone, adapters: Iterable[str]) -> dict[str, FloatArray]:
    return {
        f"{adapter}/{path}": value.numpy()
        for adapter in adapters
        for path, value in backbone.adapters.state(adapter).items()
    }


def _packed(state: Mapping[str, FloatArray]) -> Payload:
    return np.frombuffer(weights_to_bytes(state), dtype=np.uint8)


@torch.no_grad()
def attestation_velocity(backbone: Backbone) -> Tensor:
    """The student's velocity on a fixed prompt, noise and noise level: [c, h, w]."""
    noise_chw = seeding.normal(backbone.latent_shape, seed=0, purpose="attestation probe")
    conditioning = backbone.encode_prompts([ATTESTATION_PROMPT])
    velocity = backbone.velocity(
        Network.STUDENT, noise_chw[None].to(backbone.device), torch.full((1,), ATTESTATION_SIGMA), conditioning
    )
    return velocity[0].cpu()


def publish(backbone: Backbone, number: int) -> PublishedWeights:
    """Package the student's current weights as version `number`; `frozen_weights` has those that do not train."""
    bank, state = backbone.adapters, student_state(backbone)
    hashes = tensor_hashes(state)
    manifest = Manifest(
        version=PolicyVersion(number, fingerprint(hashes)),
        stack=bank.stack(Network.STUDENT),
        tensor_hashes=hashes,
        base_fingerprint=backbone.base_fingerprint(),
        attestation_velocity_chw=attestation_velocity(backbone).numpy(),
    )
    trained = {key: value for key, value in state.items() if bank.trains(key.partition("/")[0])}
    return PublishedWeights(manifest, _packed(trained))


def frozen_weights(backbone: Backbone) -> Payload:
    """The adapters of the student's stack that do not train: what every publication of this stage leaves out."""
    bank = backbone.adapters
    return _packed(_state(backbone, [name for name in bank.stack(Network.STUDENT) if not bank.trains(name)]))
