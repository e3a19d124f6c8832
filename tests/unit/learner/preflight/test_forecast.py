"""The output of `rtdmd forecast`: sizes read from files equal those of the loaded model, and arithmetic by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
import yaml

from common.backbones import load_backbone, model_sizes
from common.backbones.files.sizes import ModelSizes
from common.config.run import Config
from common.errors import ConfigError, ModelError
from common.project_files import PROJECT_ROOT
from common.types import Guidance
from learner.main import forecast
from learner.preflight.command_line import parse
from learner.preflight.forecast import (
    BLOCK_ACTIVATIONS,
    DECODE_VALUES,
    DEVICES,
    FLOAT32,
    GIB,
    PROCESS_GIB,
    VAE_ACTIVATIONS,
    choose_device,
    compared,
    predict,
    requirements_text,
    this_cpu,
)

SIZES = ModelSizes(
    transformer=10**9,
    text_encoders=2 * 10**9,
    vae=10**8,
    bases=1,
    adapter=10**7,
    layers=20,
    width=1000,
    image_tokens=900,
    text_tokens=100,
    latents=4096,
    forward_flops=2e12,
    pixels=10**6,
    vae_width=100,
    guided_passes=2,
    guidance=Guidance.CLASSIFIER_FREE,
)
H100 = DEVICES["h100"]


def config(path: Path = Path("nowhere"), backbone: dict[str, object] | None = None, **sections: object) -> Config:
    base = {"path": path, "max_sequence_length": 4} | (backbone or {})
    rewards = [{"name": "bright", "url": "http://127.0.0.1:1", "differentiable": True}]
    prompts = {"train": "train.txt", "evaluation": "evaluation.txt"}
    whole = {"run": {"name": "plan"}, "backbone": base, "prompts": prompts, "rewards": rewards, **sections}
    return Config.model_validate(whole)


def test_sizes_are_those_of_the_loaded_model(tiny_pipeline: Path) -> None:
    run = config(tiny_pipeline, {"dtype": "float32"}, lora={"rank": 2, "targets": ["to_q", "to_out.0"]})
    sizes = model_sizes(run.backbone, run.lora)
    assert sizes is not None
    backbone = load_backbone(run.backbone, run.lora, torch.device("cpu"))
    backbone.adapters.add("student", seed=0, trainable=True)
    adapter = sum(weight.numel() for weight in backbone.adapters.parameters("student").values())
    assert sizes.adapter == adapter
    _, height, width = backbone.latent_shape
    assert sizes.pixels == backbone.decode(torch.zeros(1, *backbone.latent_shape)).shape[-1] ** 2
    patch = backbone._transformer.config.patch_size  # type: ignore[attr-defined]
    assert sizes.image_tokens == height * width // patch**2
    frozen = sum(weight.numel() for weight in backbone._transformer.state_dict().values())  # type: ignore[attr-defined]
    assert sizes.transformer == frozen - adapter


def test_a_misspelt_lora_target_is_refused(tiny_pipeline: Path) -> None:
    run = config(tiny_pipeline, lora={"targets": ["to_q", "to_qq"]})
    with pytest.raises(ModelError, match=r"lora\.targets \['to_qq'\] bind to no module"):
        model_sizes(run.backbone, run.lora)


def test_memory_by_hand() -> None:
    lean = {"gradient_checkpointing": True, "idle_on_cpu": True, "decode_chunk": 1}
    alignment = {"micro_batch": 2, "reward_gradient_weight": 0.0}
    prediction = predict(config(backbone=lean, alignment=alignment, cold_start={"iterations": 0}), SIZES, H100)
    frozen = 2 * (10**9 + 10**8)
    adapters = 10**7 * FLOAT32 * (2 + 2 * 5)
    # The fake score's pass, and two of its regulariser.
    activations = 3 * 2 * 1000 * 1000 * 2 * (20 + BLOCK_ACTIVATIONS)
    latents = 2 * 5 * 4096 * FLOAT32  # the states of the others are on the host
    assert prediction.learner_gib == pytest.approx(
        PROCESS_GIB["cuda"] + (frozen + adapters + activations + latents) / GIB
    )


def test_the_last_step_is_kept_while_its_rewards_are_awaited() -> None:
    """Without the fake score's regulariser: a pass of the last step and one of a policy step, else one at a time."""
    passes = 16 * 1000 * 1000 * 2 * 20 * BLOCK_ACTIVATIONS / GIB

    def gib(**changes: object) -> float:
        alignment = {"consistency_weight": 0.0, "micro_batch": 16, **changes}
        return predict(config(alignment=alignment, cold_start={"iterations": 0}), SIZES, H100).learner_gib

    assert gib() - gib(policy_gradient="none") == pytest.approx(passes)
    assert gib(reward_gradient_weight=0.0) < gib(policy_gradient="none")  # no image is decoded


def test_decoding_by_hand() -> None:
    """A chunk of two images, of 10^6 pixels in 100 channels: with its backward pass in a rank, without in a worker."""

    def both(chunk: int) -> tuple[float, float]:
        prediction = predict(config(backbone={"decode_chunk": chunk}), SIZES, H100)
        return prediction.learner_gib, prediction.worker_gib

    one, two = both(1), both(2)
    image = 10**6 * 100 * 2 / GIB
    assert two[0] - one[0] == pytest.approx(image * VAE_ACTIVATIONS)
    assert two[1] - one[1] == pytest.approx(image * DECODE_VALUES)


TWO_BASES = replace(SIZES, bases=2)


def sharing(staleness: int) -> Config:
    return config(learner={"num_gpus": 0.5}, workers={"num_gpus": 0.5}, alignment={"max_staleness": staleness})


def peaks(staleness: int) -> tuple[float, float]:
    prediction = predict(sharing(staleness), TWO_BASES, H100)
    return prediction.learner_gib, prediction.worker_gib


def both(staleness: int) -> float:
    """GiB in the row of both."""
    run = sharing(staleness)
    text = requirements_text(run, TWO_BASES, predict(run, TWO_BASES, H100), H100)
    (row,) = [line for line in text.splitlines() if line.startswith("both on one GPU")]
    return float(row.split()[6])


def test_a_gpu_that_holds_a_rank_and_a_worker_needs_the_memory_of_both() -> None:
    """With max_staleness 0 one of them is between its passes, without activations and without the teacher's base."""
    assert both(1) == pytest.approx(sum(peaks(1)), abs=0.06)
    learner, worker = peaks(0)
    adapters = 10**7 * FLOAT32 / GIB
    idle = PROCESS_GIB["cuda"] + 2 * (10**9 + 2 * 10**9 + 10**8) / GIB
    idle_learner, idle_worker = idle + 2 * 10**9 / GIB + adapters * 12, idle + adapters * 2
    assert both(0) == pytest.approx(max(learner + idle_worker, worker + idle_learner), abs=0.06)
    apart = config(learner={"num_gpus": 1}, workers={"num_gpus": 1})
    assert "both on one GPU" not in requirements_text(apart, SIZES, predict(apart, SIZES, H100), H100)


def test_the_run_file_for_one_gpu_fits_80_gb() -> None:
    """FLUX.2-klein 4B's sizes, counted from its configuration; Qwen3-4B without its last nine layers."""
    klein = ModelSizes(
        transformer=3_875_544_576,
        text_encoders=3_110_000_000,
        vae=84_046_115,
        bases=2,
        adapter=37_355_520,
        layers=25,
        width=3072,
        image_tokens=1024,
        text_tokens=512,
        latents=128 * 32 * 32,
        forward_flops=1.0e13,
        pixels=512**2,
        vae_width=128,
        guided_passes=2,
        guidance=Guidance.CLASSIFIER_FREE,
    )
    run = parse(["--config", "deploy/runs/rtdmd_flux2_klein_4b_one_gpu.yaml"], {}).config
    prediction = predict(run, klein, H100)
    (row,) = [line for line in requirements_text(run, klein, prediction, H100).splitlines() if "both on" in line]
    assert 40 < float(row.split()[6]) < 60  # of 80; the rewards need about 5 more
    published = parse(["--config", "deploy/runs/rtdmd_flux2_klein_4b.yaml"], {}).config
    assert predict(published, klein, H100).learner_gib > prediction.learner_gib


SD35_MEDIUM = ModelSizes(
    transformer=2_243_171_520,
    text_encoders=5_580_000_000,
    vae=83_819_683,
    bases=1,
    adapter=23_900_000,
    layers=24,
    width=1536,
    image_tokens=1024,
    text_tokens=333,
    latents=16 * 64 * 64,
    forward_flops=2.23e12,
    pixels=512**2,
    vae_width=128,
    guided_passes=2,
    guidance=Guidance.CLASSIFIER_FREE,
)
"""At 512 x 512: transformer and VAE counted from the configuration, operations as in docs/performance.md, text encoders
and adapters rounded.
"""


def test_the_quickstarts_run_file_fits_80_gb() -> None:
    page = (PROJECT_ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    run = Config.model_validate(yaml.safe_load(text))
    prediction = predict(run, SD35_MEDIUM, H100)
    assert 20 < prediction.learner_gib < 75
    assert 10 < prediction.worker_gib < 75


def test_of_two_stages_the_hungrier_one_counts() -> None:
    """9 rows of three passes in stage 1; in stage 2 micro-batches of three: 13 are more, 8 are fewer."""
    cold_start = {"batch_size": 18, "consistency_fraction": 1}
    learner = {"ranks": 2}
    block = 1000 * 1000 * 2 * 20 * BLOCK_ACTIVATIONS

    def gib(micro_batch: int) -> float:
        alignment = {"micro_batch": micro_batch, "reward_gradient_weight": 0.0}
        return predict(config(cold_start=cold_start, alignment=alignment, learner=learner), SIZES, H100).learner_gib

    latents = 5 * 4096 * FLOAT32  # of a sample of the micro-batch
    assert gib(13) - gib(8) == pytest.approx(((13 * 3 - 9 * 3) * block + (13 - 8) * latents) / GIB)


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"gradient_checkpointing": True}, -1),
        ({"idle_on_cpu": True}, -1),
        ({"text_encoder_int8": True}, -1),
        ({"dtype": "float32"}, +1),
    ],
)
def test_what_needs_less_memory_is_predicted_to(change: dict[str, object], sign: int) -> None:
    before = predict(config(), SIZES, H100).learner_gib
    after = predict(config(backbone=change), SIZES, H100).learner_gib
    assert (after - before) * sign > 0


def test_a_sharded_base_costs_a_rank_its_part_and_two_blocks() -> None:
    learner = {"ranks": 4}
    whole = predict(config(learner=learner), SIZES, H100)
    sharded = predict(config(learner=learner | {"shard_base": True}), SIZES, H100)
    saved = 2 * (10**9 - 10**9 / 4 - 2 * 10**9 / 20)
    assert whole.learner_gib - sharded.learner_gib == pytest.approx(saved / GIB)
    assert whole.worker_gib == sharded.worker_gib


def test_seconds_by_hand() -> None:
    run = config(alignment={"consistency_weight": 0.0}, learner={"ranks": 2}, workers={"count": 4})
    one_pass = 32 * 16 * 2e12 / (0.4 * H100.peak_flops)
    seconds = predict(run, SIZES, H100).seconds
    assert seconds["rollouts"] == pytest.approx(one_pass * 4 / 4)
    assert seconds["fake_score"] == pytest.approx(one_pass * 2 / 2)
    # Three trained passes forth and back; the fake score's and the teacher's two for matching.
    assert seconds["student"] == pytest.approx(one_pass * (2 * 3 + 3) / 2)


def test_a_cold_start_alone_by_hand() -> None:
    cold_start = {"batch_size": 8, "student_every": 5, "consistency_weight": 0.0}
    lean = {"gradient_checkpointing": True, "idle_on_cpu": True}
    run = config(backbone=lean, cold_start=cold_start, alignment={"iterations": 0}, learner={"ranks": 2})
    prediction = predict(run, SIZES, H100)
    one_pass = 8 * 2e12 / (0.4 * H100.peak_flops) / 2
    # 2.5 steps on the way and three of the fake score; every fifth time 2.5 steps and the student's five.
    assert prediction.seconds == pytest.approx({"fake_score": one_pass * 5.5, "student": one_pass * 7.5 / 5})
    activations = 4 * 1000 * 1000 * 2 * (20 + BLOCK_ACTIVATIONS)  # of one pass of 4 rows
    weights = 2 * (10**9 + 10**8) + 10**7 * FLOAT32 * 10
    assert prediction.learner_gib == pytest.approx(PROCESS_GIB["cuda"] + (weights + activations) / GIB)


def test_both_stages_are_told_with_their_hours() -> None:
    lengths = {"cold_start": {"iterations": 1000}, "alignment": {"iterations": 500}}
    run = config(**lengths)
    prediction = predict(run, SIZES, H100)
    text = requirements_text(run, SIZES, prediction, H100)
    for stage, seconds, count in (
        ("the cold start", prediction.cold_start, 1000),
        ("alignment", prediction.seconds, 500),
    ):
        one = sum(seconds.values())
        assert f"an iteration of {stage}: {one:.2f} s (" in text
        assert f"; all {count:,}: {one * count / 3600:.1f} h" in text
    alone = config(cold_start={"iterations": 1000}, alignment={"iterations": 0})
    text = requirements_text(alone, SIZES, predict(alone, SIZES, H100), H100)
    assert "an iteration of the cold start" in text
    assert "an iteration of alignment" not in text


def test_what_does_not_fit_is_said_with_the_remedy() -> None:
    run = config(learner={"ranks": 2, "num_gpus": 1})
    small = DEVICES["l40s"]
    text = requirements_text(run, SIZES, predict(run, SIZES, small), small)
    assert "DOES NOT FIT" in text
    assert "gradient_checkpointing" in text
    assert "l40s, 48 GiB" in text


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device abacus: known devices are a100"):
        choose_device("abacus", config())


def test_prediction_stands_beside_measurement() -> None:
    prediction = predict(config(), SIZES, H100)
    both = compared(prediction, learner_gib=12.345, iteration_s=6.789)
    assert both["learner_gib"] == {"predicted": round(prediction.learner_gib, 2), "measured": 12.35}
    assert both["iteration_s"]["measured"] == 6.79


def test_a_forecast_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert forecast(["--config", "deploy/runs/shapes.yaml"]) == 0
    assert "learner rank" in capsys.readouterr().out
    assert not ray.is_initialized()


@pytest.mark.parametrize(("threads", "expected"), [(3, 3), (None, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_this_cpu_is_timed_with_the_runs_own_threads_and_type(
    threads: int | None, expected: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("learner.preflight.forecast.this_cpu", lambda *how: timed.append(how) or H100)
    assert choose_device("auto", config(backbone={"dtype": dtype}, learner={"threads": threads})) is H100
    assert timed == [(expected, dtype)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_speed_of_this_cpu_is_measured(dtype: str) -> None:
    one, four = this_cpu(1, dtype), this_cpu(4, dtype)
    assert one.peak_flops > 0
    assert one.memory_gib == four.memory_gib > 0
