"""Imports: adapters that peft and diffusers themselves have written, and pictures that equal those of diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import seeding
from common.backbones.base import Backbone
from common.backbones.lora_targets import binds
from common.config.run import Config
from common.errors import ModelError
from common.policies import SamplingSpec
from common.rewards.access import RewardAccess
from common.types import Network, Position, Prompt, Stage
from learner.checkpoint import Checkpoint
from learner.driver.run_directory import claimed, continuity
from learner.preflight.command_line import Invocation
from learner.preflight.run_file import dump_config, load_saved_config
from learner.tools.export import main as export
from learner.tools.generate import main as generate
from learner.tools.import_weights import main
from learner.tools.lora_file_formats import read_lora
from learner.tools.lora_sources import find_lora
from learner.tools.trained_run import TrainedRun
from learner.training.learner_rank import LearnerRank
from learner.training.networks import ALIGNED, COLD_START, FAKE_SCORE
from rollout_workers.sampler import EVALUATION, sample_for_evaluation
from tests.helpers.tiny_families import FAMILIES, STEPS, TinyFamily
from tests.helpers.trained_run import tiny_config

PROMPT = Prompt(4, "red circle")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    chosen: TinyFamily = request.param
    return chosen


@pytest.fixture(scope="module")
def directory(family: TinyFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family.name)
    family.write(path)
    return path


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3")
    FAMILIES[0].write(path)
    return path


def run_file(directory: Path, family: TinyFamily = FAMILIES[0], **lora: object) -> Path:
    """A run file of the tiny family, with the values of its backbone as the helpers load it."""
    prompts = directory / "prompts.txt"
    prompts.write_text("red circle\n")
    whole = tiny_config(directory / "student", prompts).model_dump(mode="json")
    own = family.load(directory)._settings  # type: ignore[attr-defined]
    whole["backbone"] = own.model_dump(mode="json")
    whole["lora"] = {"rank": 4, "alpha": 8, "targets": None} | lora
    path = directory / "run.yaml"
    path.write_text(dump_config(Config.model_validate(whole)))
    return path


def targets(family: TinyFamily, directory: Path) -> list[str]:
    """The layers that the family adapts by default, by their whole names: an ending may be that of a container too."""
    backbone = family.load(directory)
    endings = type(backbone).lora_targets  # type: ignore[attr-defined]
    layers = [name for name, part in backbone.adapters.modules()[0].named_modules() if isinstance(part, nn.Linear)]
    return [layer for layer in layers if any(binds(ending, layer) for ending in endings)]


def peft_transformer(
    family: TinyFamily, directory: Path, seed: int, *, rank: int = 2, alpha: int = 4, **more: object
) -> Any:
    """The family's own pipeline with a peft adapter of random weights on its transformer."""
    pipeline = family.pipeline.from_pretrained(family.pipeline_at(directory))
    names = more.pop("target_modules", None) or targets(family, directory)
    settings = PeftConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian", **more)
    pipeline.transformer.add_adapter(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return pipeline


def write_authors(pipeline: Any, checkpoint: Path, name: str = "generator_ema", rank: int = 2, alpha: int = 4) -> Path:
    """A checkpoint as RTDMD's authors write it: `transformer/` in peft's layout, and the same tensors in a .pt file."""
    tensors = {key: value for key, value in pipeline.transformer.state_dict().items() if "lora_" in key}
    folder = checkpoint / "transformer"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "peft_type": "LORA",
        "task_type": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about | {"use_rslora": False}))
    torch.save(tensors, checkpoint / f"{name}.pt")
    return checkpoint


def write_diffusers(pipeline: Any, folder: Path, **more: object) -> Path:
    state = get_peft_model_state_dict(pipeline.transformer)
    settings = pipeline.transformer.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=settings | more)
    return folder


def drawn_by_diffusers(family: TinyFamily, pipeline: Any, shape: tuple[int, ...]) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = seeding.initial_noise_Gchw(4, EVALUATION, PROMPT.index, 2, shape)
    images: Tensor = pipeline(
        prompt=PROMPT.text, num_images_per_prompt=2, latents=family.pack(noise), output_type="pt", **family.call
    ).images
    return images


def drawn_by_us(backbone: Backbone) -> Tensor:
    spec, empty = SamplingSpec(Network.STUDENT, STEPS, 1.0, eta=0.0), backbone.encode_prompts([""])
    with torch.no_grad():
        return backbone.decode(sample_for_evaluation(backbone, [PROMPT], spec, seed=4, count=2, empty=empty))


def imported(sources: list[Path], config: Path, out: Path, *more: str) -> int:
    return main([*map(str, sources), "--config", str(config), "--out", str(out), *more])


@pytest.mark.parametrize("layout", ["authors", "diffusers", "averaged"])
def test_the_imported_student_draws_what_diffusers_draws(
    family: TinyFamily, directory: Path, tmp_path: Path, layout: str
) -> None:
    """Also with rank and alpha that the run file does not have: scale 6 / 2 there, 8 / 4 here."""
    pipeline = peft_transformer(family, directory, seed=1, alpha=6)
    if layout == "diffusers":
        source = write_diffusers(pipeline, tmp_path / "lora")
    else:
        source = write_authors(pipeline, tmp_path / "checkpoint-15000", alpha=6)
        source = source / "generator_ema.pt" if layout == "averaged" else source
    config = run_file(directory, family)
    assert imported([source], config, tmp_path / "run") == 0
    backbone = TrainedRun.open(tmp_path / "run").load("cold_start", "cpu")
    theirs = drawn_by_diffusers(family, pipeline, backbone.latent_shape)
    assert (drawn_by_us(backbone) - theirs).abs().max() <= 1e-4
    without = family.pipeline.from_pretrained(family.pipeline_at(directory))
    assert (drawn_by_diffusers(family, without, backbone.latent_shape) - theirs).abs().max() > 1e-2


def test_two_stacked_adapters_are_merged_without_loss(family: TinyFamily, directory: Path, tmp_path: Path) -> None:
    """As the authors' inference does: each is merged into the weights in turn."""
    pipelines = [peft_transformer(family, directory, seed) for seed in (1, 2)]
    sources = [write_authors(one, tmp_path / name) for one, name in zip(pipelines, ("cold", "rl"), strict=True)]
    assert imported(sources, run_file(directory, family), tmp_path / "run") == 0
    backbone = TrainedRun.open(tmp_path / "run").load("cold_start", "cpu")

    merged = family.pipeline.from_pretrained(family.pipeline_at(directory))
    for number, source in enumerate(sources):
        tensors = load_file(source / "transformer/adapter_model.safetensors")
        merged.load_lora_weights(
            {
                f"transformer.{key.replace('.default.', '.')}": 2 * v if "lora_B" in key else v
                for key, v in tensors.items()
            },
            adapter_name=f"adapter{number}",
        )
        merged.fuse_lora(adapter_names=[f"adapter{number}"])
        merged.unload_lora_weights()
    theirs = drawn_by_diffusers(family, merged, backbone.latent_shape)
    assert (drawn_by_us(backbone) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_import_of_our_own_rank_and_scale_is_bit_for_bit(sd3: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The authors' adapters are bfloat16, which float32 holds exactly."""
    pipeline = peft_transformer(FAMILIES[0], sd3, seed=1, rank=4, alpha=8)
    pipeline.transformer.to(dtype)
    source = write_authors(pipeline, tmp_path / "theirs", rank=4, alpha=8)
    assert imported([source], run_file(sd3), tmp_path / "run") == 0
    state = Checkpoint.open(tmp_path / "run/checkpoints/cold_start-000000").state()
    tensors = load_file(source / "transformer/adapter_model.safetensors")
    for key, value in tensors.items():
        name = key.replace(".default.", ".")
        assert value.dtype == dtype
        assert torch.equal(state[f"adapter/{COLD_START}/{name}"], value.float())
        assert torch.equal(state[f"average/{name}"], value.float())
        assert not state[f"adapter/{FAKE_SCORE}/{name}"].any() or ".lora_A." in name


def test_ranks_that_are_left_and_layers_without_weights_start_fresh(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = peft_transformer(FAMILIES[0], sd3, seed=1, rank=3, alpha=3, target_modules=["attn.to_q"])
    source = write_diffusers(pipeline, tmp_path / "lora")
    assert imported([source], run_file(sd3), tmp_path / "run") == 0
    assert "imported on 2 of the 15 layers" in capsys.readouterr().out
    state = Checkpoint.open(tmp_path / "run/checkpoints/cold_start-000000").state()
    a = state[f"adapter/{COLD_START}/transformer_blocks.0.attn.to_q.lora_A.weight"]
    b = state[f"adapter/{COLD_START}/transformer_blocks.0.attn.to_q.lora_B.weight"]
    assert a.shape[0] == b.shape[1] == 4
    assert a[3].any()  # else neither A nor B of this rank would ever have a gradient
    assert not b[:, 3].any()
    assert not state[f"adapter/{COLD_START}/transformer_blocks.0.attn.to_k.lora_B.weight"].any()


def test_the_fake_score_is_imported_too(sd3: Path, tmp_path: Path) -> None:
    student = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1), tmp_path / "checkpoint-15000")
    fake = peft_transformer(FAMILIES[0], sd3, seed=2)
    write_authors(fake, tmp_path / "fake", "fake_score_net")
    source = tmp_path / "fake/fake_score_net.pt"
    assert imported([student], run_file(sd3), tmp_path / "run", "--fake-score", str(source)) == 0
    state = Checkpoint.open(tmp_path / "run/checkpoints/cold_start-000000").state()
    key = "transformer_blocks.0.attn.to_q.lora_B"
    expected = fake.transformer.state_dict()[f"{key}.default.weight"]
    assert torch.equal(state[f"adapter/{FAKE_SCORE}/{key}.weight"][:, :2], expected)


def test_the_fake_score_may_have_several_adapters_too(sd3: Path, tmp_path: Path) -> None:
    student = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1), tmp_path / "checkpoint")
    fakes = [peft_transformer(FAMILIES[0], sd3, seed=seed) for seed in (2, 3)]
    files = []
    for number, fake in enumerate(fakes):
        write_authors(fake, tmp_path / f"fake{number}", "fake_score_net")
        files.append(str(tmp_path / f"fake{number}/fake_score_net.pt"))
    assert imported([student], run_file(sd3), tmp_path / "run", "--fake-score", *files) == 0
    state = Checkpoint.open(tmp_path / "run/checkpoints/cold_start-000000").state()
    key = "transformer_blocks.0.attn.to_q.lora_B"
    own = [fake.transformer.state_dict()[f"{key}.default.weight"] for fake in fakes]
    assert torch.equal(state[f"adapter/{FAKE_SCORE}/{key}.weight"], torch.cat(own, dim=1))


# ── starts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported run, whose config.yaml is its run file."""
    path = tmp_path_factory.mktemp("imported")
    source = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1), path / "checkpoint-15000")
    assert imported([source], run_file(sd3), path / "run") == 0
    return path / "run"


def test_another_run_starts_its_stage_2_from_it(run: Path, tmp_path: Path) -> None:
    saved = load_saved_config(run / "config.yaml")
    checkpoint = run / "checkpoints/cold_start-000000"
    config = saved.model_copy(
        update={"cold_start": saved.cold_start.model_copy(update={"from_checkpoint": checkpoint})}
    )
    with claimed(Invocation(config, tmp_path / "other", dry_run=False, resume=False)) as (_, start):
        assert start.checkpoint == checkpoint
        assert (start.position, start.resumes) == (Position(Stage.COLD_START, config.cold_start.iterations), False)


def test_the_imported_run_itself_trains_stage_1_from_the_first_iteration(run: Path) -> None:
    config = load_saved_config(run / "config.yaml")
    with claimed(Invocation(config, run, dry_run=False, resume=True)) as (_, start):
        assert (start.position, start.resumes) == (Position(Stage.COLD_START, 0), True)


@pytest.mark.parametrize("resumed", [True, False])
def test_the_learner_trains_either_stage_from_it(sd3: Path, tmp_path: Path, resumed: bool) -> None:
    """Stage 1 as a resumed run, whose settings are compared; stage 2 as another run, which takes the weights alone."""
    source = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1), tmp_path / "checkpoint-15000")
    assert imported([source], run_file(sd3), tmp_path / "run") == 0
    config, checkpoint = load_saved_config(tmp_path / "run/config.yaml"), tmp_path / "run/checkpoints/cold_start-000000"
    settings = continuity(config) if resumed else None
    small = config.cold_start.model_copy(update={"batch_size": 2, "student_every": 1})
    config = config.model_copy(update={"cold_start": small})
    access = RewardAccess((), {}, config.reward_client, token=None, redis=None, cached_scores=1)
    rank = LearnerRank(config, [Prompt(0, "red circle"), Prompt(1, "two dots")], access, "cpu", None)
    assert rank.restore(checkpoint, settings) == Position(Stage.COLD_START, 0)
    bank, before = rank._networks.backbone.adapters, Checkpoint.open(checkpoint).state()
    own = {key: before[f"adapter/{COLD_START}/{key}"] for key in bank.state(COLD_START)}
    assert all(torch.equal(value, own[key]) for key, value in bank.state(COLD_START).items())
    if resumed:
        rank.cold_start(0)
        assert any(not torch.equal(value, own[key]) for key, value in bank.state(COLD_START).items())
    else:
        rank.begin_alignment()
        assert bank.stack(Network.STUDENT) == (COLD_START, ALIGNED)
        assert all(torch.equal(value, own[key]) for key, value in bank.state(COLD_START).items())


def test_pictures_and_exports_are_made_of_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--run", str(run), "--policy", "cold_start", "--out", str(tmp_path / "out")]
    assert generate([*line, "--prompt", "red circle", "--device", "cpu"]) == 0
    assert (tmp_path / "out/0000-00.png").is_file()
    assert export([*line, "--format", "lora"]) == 0
    source = load_file(run.parent / "checkpoint-15000/transformer/adapter_model.safetensors")
    exported = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    key = "transformer_blocks.1.attn.to_v.lora_{}"
    update = 2 * source[f"{key.format('B')}.default.weight"] @ source[f"{key.format('A')}.default.weight"]
    a, b = (exported[f"transformer.{key.format(part)}.weight"] for part in "AB")
    assert torch.allclose(b @ a, update, atol=1e-6)
    capsys.readouterr()
    assert generate(["--run", str(run), "--prompt", "x", "--out", str(tmp_path / "out"), "--device", "cpu"]) != 0
    assert "use --policy cold_start" in capsys.readouterr().err


# ── what is refused, and what is said ────────────────────────────────────────────────────────────────────────────────


def refused(sources: list[Path], config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert imported(sources, config, tmp_path / "run", *more) in (1, 2)
    assert not (tmp_path / "run/config.yaml").exists()
    return capsys.readouterr().err.strip()


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Q = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"text_encoder.layer.lora_A.default.weight": torch.ones(2, 3)},
            "text_encoder.layer has only one of",
        ),
        (lambda t: t | {f"{Q}.bias": torch.ones(2)}, f"{Q}.bias is no weight of a LoRA that is known here"),
        (lambda t: t | {f"{Q}.lora_A.other.weight": torch.ones(2, 16)}, "several adapters, ['default', 'other']"),
        (
            lambda t: {key.replace(Q, "blocks.0.q"): value for key, value in t.items()},
            "blocks.0.q is not a linear layer of it",
        ),
        (
            lambda t: (
                t | {f"{Q}.lora_A.default.weight": torch.ones(2, 24), f"{Q}.lora_B.default.weight": torch.ones(24, 2)}
            ),
            f"does not fit {Q}: its A and B are [2, 24] and [24, 2], expected [rank, 16] and [16, rank]",
        ),
        (lambda t: t | {f"{Q}.lora_B.default.weight": torch.ones(16, 3)}, "which are not of one rank"),
        (lambda t: t | {f"{Q}.lora_A.default.weight": torch.full((2, 16), torch.nan)}, "expected a finite matrix"),
        (lambda t: t | {f"{Q}.lora_magnitude_vector.dora_scale": torch.ones(16)}, "it is a DoRA"),
        (lambda t: {f"x.{Q}.alpha": torch.tensor(4.0)} | t, f"x.{Q}.alpha is of a layer without weights"),
        (lambda _: {}, "has no weights: name the file of a LoRA"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named(
    change: Change, message: str, sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1), tmp_path / "checkpoint")
    file = source / "transformer/adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    assert message in refused([source], run_file(sd3), tmp_path, capsys)


def test_too_high_a_rank_and_other_layers_are_refused_with_the_remedy_that_works(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [write_authors(peft_transformer(FAMILIES[0], sd3, seed=seed), tmp_path / str(seed)) for seed in (1, 2, 3)]
    config = run_file(sd3)
    message = refused(sources, config, tmp_path, capsys)
    assert "the LoRA has rank 6 in total, lora.rank is 4: add --lora.rank 6 --lora.alpha 12" in message
    assert imported(sources, config, tmp_path / "wide", "--lora.rank", "6", "--lora.alpha", "12") == 0

    wide = write_diffusers(
        peft_transformer(FAMILIES[0], sd3, seed=1, target_modules=["attn.to_q", "attn2.to_q"]), tmp_path / "attn2"
    )
    message = refused([wide], config, tmp_path, capsys)
    assert message.startswith("error: lora.targets do not bind to transformer_blocks.0.attn2.to_q and 0 more layers")
    listed = message.partition('--lora.targets "')[2].rstrip('"')
    assert imported([wide], config, tmp_path / "both", "--lora.targets", listed) == 0


def test_a_scale_that_nobody_states_is_asked_for(sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1, alpha=6), tmp_path / "checkpoint", alpha=6)
    config = run_file(sd3)
    assert "states its own scale: leave the option out" in refused([source], config, tmp_path, capsys, "--alpha", "4")
    (source / "transformer/adapter_config.json").unlink()
    assert "name its lora_alpha with --alpha N" in refused([source], config, tmp_path, capsys)
    assert imported([source], config, tmp_path / "run", "--alpha", "6") == 0
    state = Checkpoint.open(tmp_path / "run/checkpoints/cold_start-000000").state()
    own = load_file(source / "transformer/adapter_model.safetensors")[f"{Q}.lora_B.default.weight"]
    assert torch.equal(state[f"average/{Q}.lora_B.weight"][:, :2], own * 1.5)  # 6 / 2 there, 8 / 4 here


def test_a_given_scale_is_that_of_the_files_which_state_none(sd3: Path, tmp_path: Path) -> None:
    stated, silent = (
        write_authors(peft_transformer(FAMILIES[0], sd3, seed=seed, alpha=4), tmp_path / str(seed)) for seed in (1, 2)
    )
    (silent / "transformer/adapter_config.json").unlink()
    assert imported([stated, silent], run_file(sd3), tmp_path / "run", "--alpha", "6") == 0
    state = Checkpoint.open(tmp_path / "run/checkpoints/cold_start-000000").state()
    for columns, directory, factor in ((slice(2), stated, 1.0), (slice(2, 4), silent, 1.5)):  # scale 2 here
        own = load_file(directory / "transformer/adapter_model.safetensors")[f"{Q}.lora_B.default.weight"]
        assert torch.equal(state[f"average/{Q}.lora_B.weight"][:, columns], own * factor)


def test_the_remedy_for_too_high_a_rank_has_a_whole_alpha(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 4 and alpha 6 are a scale of 3 / 2: rank 5 would need an alpha of 7.5."""
    source = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1, rank=5), tmp_path / "checkpoint", rank=5)
    message = refused([source], run_file(sd3, rank=4, alpha=6), tmp_path, capsys)
    assert "add --lora.rank 6 --lora.alpha 9, which keep the scale" in message


def test_alphas_in_the_file_and_the_scales_of_patterns_are_read(sd3: Path, tmp_path: Path) -> None:
    names = {"target_modules": ["attn.to_q", "attn.to_k"]}
    pattern = peft_transformer(FAMILIES[0], sd3, seed=1, alpha_pattern={"attn.to_q": 10}, use_rslora=True, **names)
    alphas = peft_transformer(FAMILIES[0], sd3, seed=1, **names)
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(alphas.transformer).items()}
    alpha = {f"transformer.{Q}.alpha": torch.tensor(10.0)}
    (tmp_path / "b").mkdir()
    save_file(state | alpha, tmp_path / "b/mine.safetensors")
    config = run_file(sd3)
    for source, scale_q, scale_k in (
        (write_diffusers(pattern, tmp_path / "a"), 10 / 2**0.5, 4 / 2**0.5),
        (tmp_path / "b", 5.0, 1.0),
    ):
        out = tmp_path / f"run-{source.name}"
        assert imported([source], config, out) == 0
        found = Checkpoint.open(out / "checkpoints/cold_start-000000").state()
        for layer, scale in ((Q, scale_q), (Q.replace("to_q", "to_k"), scale_k)):
            own = state[f"transformer.{layer}.lora_B.weight"]
            assert torch.allclose(found[f"average/{layer}.lora_B.weight"][:, :2], own * (scale / 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("r", 3),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_settings_of_more_than_a_plain_lora_are_refused(
    key: str, value: object, sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1), tmp_path / "checkpoint")
    path = source / "transformer/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    message = refused([source], run_file(sd3), tmp_path, capsys)
    assert re.search("only a plain LoRA can be imported|says rank 3 of|its base was changed as well", message)


def test_another_adapters_settings_beside_a_file_are_not_its_own(tmp_path: Path) -> None:
    """alpha = rank is a scale of 1, whatever lies beside the file."""
    state = {"block.lora_A.weight": torch.ones(2, 3), "block.lora_B.weight": torch.ones(4, 2)}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({**state, "block.alpha": torch.tensor(2.0)}, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 64, "peft_type": "LORA"}))
    assert read_lora(file, dict).scales == {"block": 1.0}
    own = tmp_path / "adapter_model.safetensors"
    save_file(state, own)
    assert read_lora(own, dict).scales == {"block": 32.0}


class Dangerous:
    """Would run a command when unpickled without care."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("unpickled",)


def test_a_file_with_code_in_it_is_refused_without_running_it(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"x": Dangerous()}, tmp_path / "generator_ema.pt")
    assert imported([tmp_path / "generator_ema.pt"], run_file(sd3), tmp_path / "run") in (1, 2)
    printed = capsys.readouterr()
    assert "cannot be read as tensors" in printed.err
    assert "unpickled" not in printed.out


def test_sources_are_found_or_named(tmp_path: Path) -> None:
    for name in ("cold_start", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").touch()
    assert find_lora(str(tmp_path / "rl")) == tmp_path / "rl/adapter_model.safetensors"
    with pytest.raises(ModelError, match=r"has several LoRA files: .*cold_start/adapter_model.safetensors, .*rl/"):
        find_lora(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no LoRA in it: expected one of adapter_model\.safetensors"):
        find_lora(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="is empty: name a directory"):
        find_lora("")
    with pytest.raises(ModelError, match="there is no nothing-here: name a directory, a file, or ORGANISATION/NAME"):
        find_lora("nothing-here")


def test_without_a_source_or_into_a_used_directory_nothing_happens(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_file(sd3)
    assert main(["--config", str(config), "--out", str(tmp_path / "run")]) == 2
    assert "name a LoRA to import" in capsys.readouterr().err
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").touch()
    assert imported([tmp_path], config, tmp_path / "used") == 2
    assert "is there and not empty" in capsys.readouterr().err


def test_the_names_of_kohya_are_converted_by_diffusers(tmp_path: Path) -> None:
    """FLUX.1's image attention: theirs fuses q, k and v, the base has them apart; their alpha divides by the rank."""
    family = next(one for one in FAMILIES if one.name == "flux1")
    family.write(tmp_path)
    width = family.load(tmp_path).adapters.modules()[0].inner_dim  # type: ignore[union-attr]
    assert isinstance(width, int)
    a, b = torch.randn(2, width), torch.randn(3 * width, 2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "kohya.safetensors",
    )
    assert imported([tmp_path / "kohya.safetensors"], run_file(tmp_path, family), tmp_path / "run") == 0
    backbone = TrainedRun.open(tmp_path / "run").load("cold_start", "cpu")
    state, scale = backbone.adapters.state(COLD_START), backbone.adapters.scale
    for part, name in enumerate(("to_q", "to_k", "to_v")):
        layer = f"transformer_blocks.0.attn.{name}"
        update = scale * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        assert torch.allclose(update, 0.5 * b[part * width : (part + 1) * width] @ a, atol=1e-5)


def test_names_that_diffusers_does_not_convert_are_refused(
    sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kohya.safetensors"
    save_file({"lora_unet_joint_blocks_0_x.lora_down.weight": torch.ones(2, 16)}, file)
    message = refused([file], run_file(sd3), tmp_path, capsys)
    assert "lora_unet_joint_blocks_0_x.lora_down.weight is no weight of a LoRA that is known here" in message


def test_a_name_of_the_hub_downloads_the_adapters_alone(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client gets a fake: what it would download are the files that match the patterns."""
    written = write_authors(peft_transformer(FAMILIES[0], sd3, seed=1), tmp_path / "hub/cold_start")
    asked = []

    def downloaded(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr("learner.tools.lora_sources.snapshot_download", downloaded)
    found = find_lora("Harahan/SD35M-RTDMD/cold_start")
    assert found == written / "transformer/adapter_model.safetensors"
    assert asked[0][0] == "Harahan/SD35M-RTDMD"
    assert {"cold_start/adapter_config.json", "cold_start/*/adapter_model.safetensors"} < set(asked[0][1])
    assert all(pattern.startswith("cold_start/") for pattern in asked[0][1])
    file = "cold_start/transformer/adapter_model.safetensors"
    assert find_lora(f"Harahan/SD35M-RTDMD/{file}") == tmp_path / "hub" / file
    assert {file, "cold_start/transformer/adapter_config.json"} < set(asked[1][1])  # it states the scale
    with pytest.raises(ModelError, match="Harahan/SD35M-RTDMD on the hub has no rl"):
        find_lora("Harahan/SD35M-RTDMD/rl")
