"""`rtdmd train --explain`: where every value of a run file stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.run import Config
from learner.main import main
from learner.preflight.command_line import parse
from learner.preflight.explanation import Standing, explained, explanation
from learner.preflight.published import BACK_PROPAGATED, MODELS, TRAINED, model_of

RUNS = Path(__file__).resolve().parents[4] / "deploy/runs"


def config(name: str, *overrides: str) -> Config:
    return parse(["--config", str(RUNS / name), *overrides], {}).config


def standings(run: Config) -> dict[str, tuple[Standing, str]]:
    return {line.key: (line.standing, line.published) for line in explained(run)}


def test_a_published_run_file_departs_where_it_says_so_and_only_there() -> None:
    found = standings(config("rtdmd_sd35m.yaml"))
    of_method = {
        key: value for key, value in found.items() if key.partition(".")[0] in ("lora", "sampling", "alignment")
    }
    others = {key: value for key, value in of_method.items() if value[0] is not Standing.PUBLISHED}
    assert others.keys() == {"alignment.old_surrogate"}  # micro_batch is at its default, 16
    assert others["alignment.old_surrogate"][0] is Standing.VETTED
    assert found[TRAINED][0] is found[BACK_PROPAGATED][0] is Standing.PUBLISHED
    assert found["prompts.train"][0] is Standing.YOURS
    assert "GenEval's in stage 2" in found["prompts.train"][1]


def test_a_changed_value_is_yours_and_the_published_one_is_named() -> None:
    run = config("rtdmd_flux2_klein_9b.yaml", "--alignment.matching_weight", "0.5", "--rewards.hps.weight", "2")
    found = standings(run)
    assert found["alignment.matching_weight"] == (Standing.YOURS, "0.001")
    assert found[TRAINED][0] is Standing.YOURS
    assert "geneval_parts 1, hps 1" in found[TRAINED][1]


def test_the_table_is_chosen_by_the_model_and_not_by_the_name_of_a_file(tmp_path: Path) -> None:
    text = (RUNS / "rtdmd_sd3m.yaml").read_text().replace("stabilityai/stable-diffusion-3-medium-diffusers", "MODEL")
    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    mine.write_text(text.replace("MODEL", "/models/stable-diffusion-3.5-medium"))
    other.write_text(text.replace("MODEL", "somebody/fine-tuned"))
    run = config(str(mine))
    assert model_of(run) is MODELS[1]
    found = standings(run)
    assert found["alignment.group_size"] == (Standing.VETTED, "24")  # 16 is the default
    assert found["backbone.guidance_scale"] == (Standing.VETTED, "4.5")
    assert found["backbone.path"] == (Standing.YOURS, "stabilityai/stable-diffusion-3.5-medium")
    run = config(str(other))
    assert model_of(run) is None
    assert "alignment.group_size" not in standings(run)
    assert standings(run)["alignment.ema_every"][0] is Standing.PUBLISHED


def test_values_of_a_measured_run_file_are_vetted_for_its_own_model_alone() -> None:
    assert standings(config("shapes.yaml"))["cold_start.student_every"] == (Standing.VETTED, "10")
    assert (
        standings(config("shapes.yaml", "--cold_start.student_every", "7"))["cold_start.student_every"][0]
        is Standing.YOURS
    )
    run = config("cold_start_sd3m.yaml", "--cold_start.student_every", "1")
    assert standings(run)["cold_start.student_every"] == (Standing.YOURS, "10")


@pytest.mark.parametrize(
    ("name", "absent", "said"),
    [
        ("cold_start_flux1_dev.yaml", "alignment.", "Stage 1 alone"),
        (
            "rtdmd_flux1_dev.yaml",
            "cold_start.learning_rate",
            "Stage 2 alone, from runs/cold_start_flux1_dev/checkpoints",
        ),
    ],
)
def test_options_of_a_stage_that_does_not_run_are_left_out(name: str, absent: str, said: str) -> None:
    text = explanation(config(name))
    assert said in text
    assert not any(line.startswith(absent) for line in text.splitlines())
    assert "cold_start.fake_max_weight" in text


def test_the_command_explains_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--config", str(RUNS / "shapes.yaml"), "--run-dir", str(tmp_path / "run"), "--explain"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "zoo/weights/early_pipeline is no published model" in printed
    assert printed.splitlines()[-1].endswith(" yours")
    assert not (tmp_path / "run").exists()
