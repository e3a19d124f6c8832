"""Weights from learner to worker: whatever is wrong with them is named, and the next good publication is accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.backbones.sd3 import StableDiffusion3
from common.config.run import LoraConfig
from common.errors import AttestationError, RtdmdError, WeightUpdateError, WireError
from common.types import Network, PolicyVersion
from common.weights import PublishedWeights, attestation_velocity, frozen_weights, publish, student_state
from common.wire import fingerprint, tensor_hashes, weights_from_bytes, weights_to_bytes
from rollout_workers.weight_receiver import WeightReceiver
from tests.helpers.tiny_pipeline import load_tiny_backbone, randomise

KEY = "cold_start/transformer_blocks.0.attn.to_q.lora_A.weight"


@pytest.fixture
def learner(tiny_pipeline: Path) -> StableDiffusion3:
    backbone = load_tiny_backbone(tiny_pipeline)
    for seed, name in enumerate(("cold_start", "aligned", "fake_score")):
        backbone.adapters.add(name, seed=0, trainable=True)
        randomise(backbone, name, seed)
    backbone.adapters.define(Network.STUDENT, ("cold_start",))
    return backbone


@pytest.fixture
def worker(tiny_pipeline: Path) -> StableDiffusion3:
    return load_tiny_backbone(tiny_pipeline)


def repacked(published: PublishedWeights, edit: Callable[[dict[str, np.ndarray]], None]) -> PublishedWeights:
    """The same manifest over an edited payload."""
    state = weights_from_bytes(published.payload.tobytes())
    edit(state)
    return replace(published, payload=np.frombuffer(weights_to_bytes(state), dtype=np.uint8))


def test_a_publication_is_applied_and_attested(learner: StableDiffusion3, worker: StableDiffusion3) -> None:
    published = publish(learner, 3)
    version = WeightReceiver(worker).receive(published)
    assert version == PolicyVersion(3, fingerprint(tensor_hashes(student_state(worker))))
    assert np.array_equal(attestation_velocity(worker).numpy(), published.manifest.attestation_velocity_chw)
    assert set(published.manifest.tensor_hashes) == set(student_state(learner))
    assert KEY in published.manifest.tensor_hashes
    assert not any(key.startswith("fake_score/") for key in published.manifest.tensor_hashes)


def test_a_worker_follows_the_learner_from_one_stage_to_the_next(
    learner: StableDiffusion3, worker: StableDiffusion3
) -> None:
    receiver = WeightReceiver(worker)
    receiver.receive(publish(learner, 0))
    before = attestation_velocity(worker)
    learner.adapters.define(Network.STUDENT, ("cold_start", "aligned"))
    receiver.receive(publish(learner, 1))
    assert worker.adapters.stack(Network.STUDENT) == ("cold_start", "aligned")
    assert torch.equal(attestation_velocity(worker), attestation_velocity(learner))
    assert not torch.equal(attestation_velocity(worker), before)


def test_an_adapter_of_another_rank_on_other_layers_is_published_too(
    learner: StableDiffusion3, worker: StableDiffusion3
) -> None:
    layer = "transformer_blocks.1.ff.net.2"
    own = {f"{layer}.lora_A.weight": torch.full((3, 64), 0.1), f"{layer}.lora_B.weight": torch.full((16, 3), 0.1)}
    learner.adapters.attach("own", own)
    learner.adapters.define(Network.STUDENT, ("own", "cold_start"))
    WeightReceiver(worker).receive(publish(learner, 0), frozen_weights(learner))
    assert worker.adapters.parameters("own").keys() == own.keys()
    assert torch.equal(attestation_velocity(worker), attestation_velocity(learner))


def test_receiving_is_idempotent(
    learner: StableDiffusion3, worker: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, published = WeightReceiver(worker), publish(learner, 0)
    first = receiver.receive(published)
    loads: list[str] = []
    monkeypatch.setattr(worker.adapters, "load", lambda name, state: loads.append(name))
    assert receiver.receive(published) == first
    assert loads == []


def test_equal_numbers_with_other_weights_are_another_version(
    learner: StableDiffusion3, worker: StableDiffusion3
) -> None:
    """Evaluations all carry the same number."""
    receiver = WeightReceiver(worker)
    receiver.receive(publish(learner, -1))
    randomise(learner, "cold_start", seed=7)
    receiver.receive(publish(learner, -1))
    assert torch.equal(attestation_velocity(worker), attestation_velocity(learner))


# ── what is frozen is sent once ──────────────────────────────────────────────────────────────────────────────────────


def keys_of(payload: np.ndarray) -> set[str]:
    return {key.partition("/")[0] for key in weights_from_bytes(payload.tobytes())}


@pytest.fixture
def aligning(learner: StableDiffusion3) -> StableDiffusion3:
    """The learner in stage 2, whose first adapter is frozen."""
    learner.adapters.freeze("cold_start")
    learner.adapters.define(Network.STUDENT, ("cold_start", "aligned"))
    return learner


def test_a_publication_leaves_out_what_is_frozen_and_names_its_hashes(aligning: StableDiffusion3) -> None:
    published = publish(aligning, 1)
    assert keys_of(published.payload) == {"aligned"}
    assert keys_of(frozen_weights(aligning)) == {"cold_start"}
    assert published.manifest.tensor_hashes == tensor_hashes(student_state(aligning))
    assert published.manifest.tensor_hashes.keys() > {KEY}


def test_nothing_is_frozen_in_stage_one(learner: StableDiffusion3) -> None:
    assert keys_of(frozen_weights(learner)) == set()
    assert keys_of(publish(learner, 0).payload) == {"cold_start"}


def test_a_new_worker_takes_the_frozen_weights_and_an_old_one_keeps_them(
    aligning: StableDiffusion3, worker: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, frozen, loaded = WeightReceiver(worker), frozen_weights(aligning), list[str]()
    receiver.receive(publish(aligning, 0), frozen)
    load = worker.adapters.load
    monkeypatch.setattr(worker.adapters, "load", lambda name, state: (loaded.append(name), load(name, state)))
    # Weights that are kept need no payload.
    for version, payload in enumerate((frozen, None), 1):
        randomise(aligning, "aligned", seed=version)
        receiver.receive(publish(aligning, version), payload)
        assert loaded == ["aligned"] * version
        assert torch.equal(attestation_velocity(worker), attestation_velocity(aligning))


def test_a_worker_of_stage_one_replaces_the_weights_that_were_frozen_since(
    learner: StableDiffusion3, worker: StableDiffusion3
) -> None:
    """It holds an adapter of that name, with the weights of an earlier evaluation."""
    receiver = WeightReceiver(worker)
    receiver.receive(publish(learner, -1), frozen_weights(learner))
    randomise(learner, "cold_start", seed=8)
    learner.adapters.freeze("cold_start")
    learner.adapters.define(Network.STUDENT, ("cold_start", "aligned"))
    assert receiver.receive(publish(learner, 0), frozen_weights(learner)).number == 0
    assert torch.equal(attestation_velocity(worker), attestation_velocity(learner))


def test_a_publication_of_all_adapters_needs_no_frozen_weights(
    aligning: StableDiffusion3, worker: StableDiffusion3
) -> None:
    """As earlier versions published them."""
    published = repacked(publish(aligning, 1), lambda state: state.update(student_state(aligning)))
    assert WeightReceiver(worker).receive(published).number == 1
    assert torch.equal(attestation_velocity(worker), attestation_velocity(aligning))


@pytest.mark.parametrize("known", [False, True])
def test_frozen_weights_that_are_missing_or_of_another_stage_are_refused(
    aligning: StableDiffusion3, worker: StableDiffusion3, known: bool
) -> None:
    receiver, published, frozen = WeightReceiver(worker), publish(aligning, 1), frozen_weights(aligning)
    if known:
        receiver.receive(published, frozen)
        randomise(aligning, "cold_start", seed=8)
        published = publish(aligning, 2)
    with pytest.raises(WeightUpdateError, match=r"does not fit its manifest: \d+ tensors missing \['cold_start/"):
        receiver.receive(published)
    old = weights_to_bytes({key: value + 1 for key, value in weights_from_bytes(frozen.tobytes()).items()})
    with pytest.raises(AttestationError, match=r"\d+ of \d+ tensors are not what was published.* cold_start/"):
        receiver.receive(published, np.frombuffer(old, np.uint8))
    assert receiver.receive(published, frozen_weights(aligning)).number == published.manifest.version.number
    assert torch.equal(attestation_velocity(worker), attestation_velocity(aligning))


def test_kept_weights_are_hashed_as_they_are_and_replaced_after_a_mismatch(
    aligning: StableDiffusion3, worker: StableDiffusion3
) -> None:
    receiver, frozen = WeightReceiver(worker), frozen_weights(aligning)
    receiver.receive(publish(aligning, 0), frozen)
    worker.adapters.adapter("cold_start").flat_n[0] += 1
    randomise(aligning, "aligned", seed=1)
    with pytest.raises(AttestationError, match=r"version 1, 1 of \d+ tensors are not what was published.* cold_start/"):
        receiver.receive(publish(aligning, 1), frozen)
    assert receiver.receive(publish(aligning, 1), frozen).number == 1
    assert torch.equal(attestation_velocity(worker), attestation_velocity(aligning))


def test_no_worker_weight_trains(learner: StableDiffusion3, worker: StableDiffusion3) -> None:
    WeightReceiver(worker).receive(publish(learner, 0))
    assert not any(parameter.requires_grad for parameter in worker._transformer.parameters())


# ── what can be wrong ────────────────────────────────────────────────────────────────────────────────────────────────


def flipped_value(published: PublishedWeights) -> PublishedWeights:
    def flip(state: dict[str, np.ndarray]) -> None:
        state[KEY][0, 0] += 1e-3

    return repacked(published, flip)


def flipped_byte(published: PublishedWeights) -> PublishedWeights:
    payload = published.payload.copy()
    payload[-1] ^= 1
    return replace(published, payload=payload)


def truncated(published: PublishedWeights) -> PublishedWeights:
    return replace(published, payload=published.payload[:-10])


def missing_key(published: PublishedWeights) -> PublishedWeights:
    return repacked(published, lambda state: state.__delitem__(KEY))


def unknown_key(published: PublishedWeights) -> PublishedWeights:
    return repacked(published, lambda state: state.update({"cold_start/elsewhere.lora_A.weight": state[KEY]}))


def extra_adapter(published: PublishedWeights) -> PublishedWeights:
    return repacked(published, lambda state: state.update({KEY.replace("cold_start", "spare"): state[KEY]}))


def wrong_shape(published: PublishedWeights) -> PublishedWeights:
    return repacked(published, lambda state: state.update({KEY: state[KEY][:1]}))


def adapter_without_weights(published: PublishedWeights) -> PublishedWeights:
    return replace(published, manifest=replace(published.manifest, stack=("cold_start", "aligned")))


def empty_stack(published: PublishedWeights) -> PublishedWeights:
    return replace(published, manifest=replace(published.manifest, stack=()))


def another_base(published: PublishedWeights) -> PublishedWeights:
    return replace(published, manifest=replace(published.manifest, base_fingerprint="0" * 32))


def wrong_velocity(published: PublishedWeights) -> PublishedWeights:
    velocity = published.manifest.attestation_velocity_chw.copy()
    velocity[0, 0, 0] += 1e-4
    return replace(published, manifest=replace(published.manifest, attestation_velocity_chw=velocity))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (flipped_value, AttestationError, rf"version 1, 1 of \d+ tensors .* the first being {KEY}"),
        (flipped_byte, AttestationError, r"version 1, 1 of \d+ tensors"),
        (truncated, WireError, "not valid safetensors"),
        (missing_key, WeightUpdateError, r"does not fit its manifest: 1 tensors missing .*to_q"),
        (unknown_key, WeightUpdateError, r"does not fit its manifest: .*1 unknown .*elsewhere"),
        (extra_adapter, WeightUpdateError, "outside the stack.*spare"),
        (wrong_shape, WeightUpdateError, r"to_q\.lora_A\.weight is \[1, 16\], expected \[2, 16\]"),
        (adapter_without_weights, WeightUpdateError, "'aligned' has no weights"),
        (empty_stack, WeightUpdateError, "version 1 contain no adapter"),
        (another_base, WeightUpdateError, "trained on base 0000.*same model directory"),
        (wrong_velocity, AttestationError, "attestation velocity is off by 1.00e-04"),
    ],
)
def test_what_is_wrong_is_named_and_a_good_publication_afterwards_is_accepted(
    learner: StableDiffusion3,
    worker: StableDiffusion3,
    damage: Callable[[PublishedWeights], PublishedWeights],
    error: type[RtdmdError],
    message: str,
) -> None:
    receiver = WeightReceiver(worker)
    receiver.receive(publish(learner, 0))
    randomise(learner, "cold_start", seed=5)
    good = publish(learner, 1)
    for _ in range(2):  # a repeated call must not take the half-applied version for applied
        with pytest.raises(error, match=message) as caught:
            receiver.receive(damage(good))
        assert caught.type is error
    assert receiver.receive(good).number == 1
    assert torch.equal(attestation_velocity(worker), attestation_velocity(learner))


def test_weights_that_are_not_numbers_are_refused(learner: StableDiffusion3, worker: StableDiffusion3) -> None:
    receiver, good = WeightReceiver(worker), publish(learner, 0)
    with torch.no_grad():
        next(iter(learner.adapters.parameters("cold_start").values()))[0, 0] = float("nan")
    with pytest.raises(AttestationError, match="off by nan"):
        receiver.receive(publish(learner, 1))
    assert receiver.receive(good).number == 0


def test_a_worker_on_another_base_refuses(learner: StableDiffusion3, tmp_path: Path) -> None:
    from tests.helpers.tiny_pipeline import write_tiny_pipeline

    other = load_tiny_backbone(write_tiny_pipeline(tmp_path / "other", seed=1))
    with pytest.raises(WeightUpdateError, match=f"loaded base {other.base_fingerprint()}"):
        WeightReceiver(other).receive(publish(learner, 0))


def test_a_new_adapter_binds_to_the_layers_of_the_publication(learner: StableDiffusion3, tiny_pipeline: Path) -> None:
    """Whatever targets the worker itself was given."""
    from tests.helpers.tiny_pipeline import tiny_lora

    fewer = load_tiny_backbone(tiny_pipeline, tiny_lora(("to_q", "to_k")))
    WeightReceiver(fewer).receive(publish(learner, 0))
    assert torch.equal(attestation_velocity(fewer), attestation_velocity(learner))


def test_a_worker_with_another_scale_refuses(learner: StableDiffusion3, tiny_pipeline: Path) -> None:
    from tests.helpers.tiny_pipeline import TARGETS

    other = load_tiny_backbone(tiny_pipeline, LoraConfig(rank=2, alpha=2, targets=TARGETS))
    with pytest.raises(AttestationError, match="attestation velocity is off by"):
        WeightReceiver(other).receive(publish(learner, 0))
