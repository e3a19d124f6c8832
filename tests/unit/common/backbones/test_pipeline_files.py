"""Pipelines from the hub, and what their small files give away before anything large is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from huggingface_hub import HfApi
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo
from safetensors import safe_open

from common.backbones.files import pipeline_files
from common.backbones.files.pipeline_files import PipelineFiles, find_pipeline
from common.backbones.files.schedules import linear_mu_of, pipeline_sigmas, scheduler_config
from common.errors import ModelError
from common.flow import flux2_mu
from tests.conftest import HUB_NAME
from tests.helpers.reference import REFERENCE, TOLERANCE
from tests.helpers.tiny_families import FAMILIES, TinyFamily
from tests.helpers.tiny_flux2 import SCHEDULER

KIND = "StableDiffusion3Pipeline"


def test_a_pipeline_of_the_hub_is_found_where_it_was_downloaded(cached: Path) -> None:
    files = find_pipeline(HUB_NAME, "sd3", [KIND])
    assert (files.path, files.directory.resolve(), files.kind) == (HUB_NAME, cached.resolve(), KIND)
    assert files.config("vae")["scaling_factor"] == 1.5


@pytest.mark.usefixtures("cached")
def test_a_pipeline_that_the_hub_does_not_give_is_named() -> None:
    expected = (
        "no pipeline at nobody/nothing: there is no such directory, and HF_HUB_OFFLINE = 1 forbids downloads, and the "
        "hub's cache here does not have it; unset HF_HUB_OFFLINE, or set backbone.path to a directory"
    )
    with pytest.raises(ModelError, match=expected):
        find_pipeline(Path("nobody/nothing"), "sd3", [KIND])


class Hub(HfApi):
    """A hub whose files are a directory's; only their headers can be had."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory

    def list_repo_files(self, repo_id: str) -> list[str]:
        assert repo_id == str(HUB_NAME)
        return [str(path.relative_to(self._directory)) for path in self._directory.rglob("*.*")]

    def parse_safetensors_file_metadata(self, repo_id: str, filename: str) -> SafetensorsFileMetadata:
        assert repo_id == str(HUB_NAME)
        with safe_open(self._directory / filename, "pt") as weights:
            shapes = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        tensors = {name: TensorInfo("F32", shape, (0, 0)) for name, shape in shapes.items()}
        return SafetensorsFileMetadata({}, tensors)


def test_sizes_of_the_hub_need_no_weights_and_a_run_does(
    cached: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_files, "HfApi", lambda: Hub(tiny_pipeline))
    local = find_pipeline(tiny_pipeline, "sd3", [KIND])
    for weights in cached.rglob("*.safetensors"):
        weights.unlink()
    files = find_pipeline(HUB_NAME, "sd3", [KIND])
    for part in ("transformer", "text_encoder_3", "vae"):
        assert files.weight_shapes(part) == local.weight_shapes(part) != {}
    with pytest.raises(ModelError, match=r"there is no text_encoder/\*\.safetensors in it"):
        files.fetch_weights()


def test_sizes_of_the_hub_are_those_of_a_variant_where_there_is_nothing_else(
    cached: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_hub = shutil.copytree(tiny_pipeline, tmp_path / "hub")
    file = on_hub / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    monkeypatch.setattr(pipeline_files, "HfApi", lambda: Hub(on_hub))
    for weights in cached.rglob("*.safetensors"):
        weights.unlink()
    local = find_pipeline(tiny_pipeline, "sd3", [KIND])
    for part in ("transformer", "vae"):
        assert find_pipeline(HUB_NAME, "sd3", [KIND]).weight_shapes(part) == local.weight_shapes(part) != {}


def test_a_part_without_weights_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "empty")
    (path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"there is no transformer/\*\.safetensors in it"):
        find_pipeline(path, "sd3", [KIND])


def test_another_kind_of_pipeline_is_refused_with_the_familys_own(tiny_pipeline: Path) -> None:
    expected = f"{tiny_pipeline} holds a {KIND}, but family flux2 needs a Flux2KleinPipeline or Flux2Pipeline"
    with pytest.raises(ModelError, match=expected):
        find_pipeline(tiny_pipeline, "flux2", ["Flux2KleinPipeline", "Flux2Pipeline"])


def sharded(pipeline: Path, tmp_path: Path, weight_map: object) -> Path:
    path = shutil.copytree(pipeline, tmp_path / "sharded")
    index = path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_a_missing_shard_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    path = sharded(tiny_pipeline, tmp_path, {"a": "diffusion_pytorch_model.safetensors", "b": name})
    with pytest.raises(ModelError, match=f"there is no transformer/{name} in it, which diffusion.* names"):
        find_pipeline(path, "sd3", [KIND])


def test_a_damaged_index_of_shards_is_named(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = sharded(tiny_pipeline, tmp_path, ["not a map"])
    with pytest.raises(ModelError, match=r"transformer/diffusion_pytorch_model\.safetensors\.index\.json is damaged"):
        find_pipeline(path, "sd3", [KIND])


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 16, b"\x02" + b"\x00" * 7 + b"[]"])
def test_a_file_that_is_no_safetensors_is_named(tiny_pipeline: Path, tmp_path: Path, content: bytes) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "broken")
    (path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"vae/diffusion_pytorch_model\.safetensors is damaged"):
        find_pipeline(path, "sd3", [KIND])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", r"vae/config\.json is missing or damaged"),
        ("7", r"vae/config\.json is missing or damaged"),
        ("{}", r"vae/config\.json has no scaling_factor"),
    ],
)
def test_a_damaged_configuration_is_named(tiny_pipeline: Path, tmp_path: Path, content: str, expected: str) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "broken")
    (path / "vae" / "config.json").write_text(content)
    with pytest.raises(ModelError, match=expected):
        find_pipeline(path, "sd3", [KIND]).config("vae")["scaling_factor"]


def test_only_the_part_that_is_needed_must_be_there(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "partial", ignore=shutil.ignore_patterns("text_encoder*"))
    assert find_pipeline(path, "sd3", [KIND], only="transformer").directory == path
    with pytest.raises(
        ModelError, match="there is no text_encoder, text_encoder_2, text_encoder_3 in it: download it, or"
    ):
        find_pipeline(path, "sd3", [KIND])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (UniPCMultistepScheduler, {"flow_shift": 3.0}),
        (DPMSolverMultistepScheduler, {"flow_shift": 3.0}),
        (FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    ],
)
def test_another_flow_scheduler_is_refused_by_its_class(
    family: TinyFamily, tmp_path: Path, kind: type[Any], options: dict[str, Any]
) -> None:
    """Saved by diffusers itself; then only its configuration, beside an index that still names the published class."""
    family.write(tmp_path)
    path = family.pipeline_at(tmp_path)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if "flow_shift" in options else {}
    kind(**options, **flow).save_pretrained(path / "scheduler")
    expected = f"its scheduler is a {kind.__name__}, and only FlowMatchEulerDiscreteScheduler is supported: save the"
    for index in (json.loads((path / "model_index.json").read_text()) for _ in range(2)):
        with pytest.raises(ModelError, match=expected):
            family.load(tmp_path)
        (path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind.__name__]}))


def test_a_scheduler_named_by_the_index_alone_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_pipeline, tmp_path / "other")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    with pytest.raises(ModelError, match="its scheduler is a LCMScheduler"):
        scheduler_config(find_pipeline(path, "sd3", [KIND]))


def with_scheduler(tiny_pipeline: Path, path: Path, changes: dict[str, object]) -> PipelineFiles:
    shutil.copytree(tiny_pipeline, path)
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | changes))
    return find_pipeline(path, "sd3", [KIND])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_karras_sigmas": True}, "its scheduler has use_karras_sigmas = True, which is not supported: save the"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas = True"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas = True"),
        ({"invert_sigmas": True}, "invert_sigmas = True"),
        ({"stochastic_sampling": True}, "stochastic_sampling = True"),
        ({"shift_terminal": 0.1}, "shift_terminal = 0.1"),
        ({"time_shift_type": "linear"}, "time_shift_type = linear"),
        ({"num_train_timesteps": 500}, "num_train_timesteps = 500"),
        ({"flow_shift": 3.0}, "flow_shift = 3.0"),
        ({"shift": None}, "shift = None"),
        ({"shift": 0}, "shift = 0"),
        ({"shift": "3"}, "shift = 3"),
        ({"max_shift": False}, "max_shift = False"),
        (
            {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 256},
            "base_image_seq_len = max_image_seq_len = 256, and its shift is a line through both: set them apart",
        ),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "base_image_seq_len = max_image_seq_len = 256"),
    ],
)
def test_a_schedule_of_another_kind_is_refused(
    tiny_pipeline: Path, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    with pytest.raises(ModelError, match=expected):
        scheduler_config(with_scheduler(tiny_pipeline, tmp_path / "other", changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"invert_sigmas": False, "shift_terminal": None, "a_later_switch": False, "_diffusers_version": "0.29.0"},
        {"shift_terminal": 0, "prediction_type": "flow_prediction"},
    ],
)
def test_keys_that_change_nothing_pass(tiny_pipeline: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    files = with_scheduler(tiny_pipeline, tmp_path / "other", changes | {"num_train_timesteps": 1000})
    assert pipeline_sigmas(scheduler_config(files), 4, mu=0.0) == pytest.approx((1, 0.75, 0.5, 0.25, 0))


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_flux2s_schedule_equals_the_reference(tokens: int) -> None:
    """1024 tokens are 512 x 512 pixels."""
    expected = REFERENCE["sigmas"][f"flux2_klein_{tokens}"]["sigmas"]
    assert pipeline_sigmas(SCHEDULER, 4, flux2_mu(tokens, 4))[:-1] == pytest.approx(expected, abs=TOLERANCE)


def test_flux1s_mu_goes_through_its_published_points() -> None:
    assert [linear_mu_of(SCHEDULER, tokens) for tokens in (256, 2176, 4096)] == pytest.approx([0.5, 0.825, 1.15])


def test_the_shift_depends_on_the_resolution_only_where_the_scheduler_says_so() -> None:
    """e^mu / (e^mu + 1 / u - 1) at mu = 0 is u; shift 3 gives 0.9, 0.75, 0.5."""
    assert pipeline_sigmas(SCHEDULER, 4, mu=0.0) == pytest.approx((1, 0.75, 0.5, 0.25, 0))
    fixed = SCHEDULER | {"use_dynamic_shifting": False}
    assert pipeline_sigmas(fixed, 4, mu=7.0) == pytest.approx((1, 0.9, 0.75, 0.5, 0))


def test_a_fixed_shift_needs_no_line_over_resolutions(tiny_pipeline: Path, tmp_path: Path) -> None:
    changes = {"use_dynamic_shifting": False, "shift": 3.0, "base_image_seq_len": 256, "max_image_seq_len": 256}
    config = scheduler_config(with_scheduler(tiny_pipeline, tmp_path / "fixed", changes))
    assert pipeline_sigmas(config, 4, linear_mu_of(config, 1024)) == pytest.approx((1, 0.9, 0.75, 0.5, 0))
