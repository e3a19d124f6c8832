"""Run file < quick block < environment < options; every mistake is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from common.errors import ConfigError
from common.project_files import found_path
from learner.preflight.command_line import parse, parse_forecast
from learner.preflight.run_file import knobs
from learner.records.run_log import LogLevel

RUN_FILE = """
run: {name: base, seed: 1}
backbone: {path: model}
prompts: {train: a.txt, evaluation: b.txt}
rewards:
  - {name: hps, scorer: hps, model: m, differentiable: true}
quick:
  run: {seed: 2}
  rewards: {hps: {threads: 2}}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE, encoding="utf-8")
    return str(path)


def test_precedence_is_file_quick_environment_option(run_file: str) -> None:
    file = ["--config", run_file]
    environment = {"RTDMD_RUN__SEED": "3", "PATH": "/bin"}
    assert parse(file, {}).config.run.seed == 1
    assert parse([*file, "--quick"], {}).config.run.seed == 2
    assert parse([*file, "--quick"], environment).config.run.seed == 3
    assert parse([*file, "--quick", "--run.seed", "4"], environment).config.run.seed == 4
    assert parse([*file, "--run.seed=5", "--quick"], environment).config.run.seed == 5


def test_rewards_are_overridden_by_name(run_file: str) -> None:
    invocation = parse(
        ["--config", run_file, "--quick", "--rewards.hps.weight", "2e-1"], {"RTDMD_REWARDS__HPS__MAX_BATCH": "7"}
    )
    reward = invocation.config.rewards[0]
    assert (reward.weight, reward.max_batch, reward.threads) == (0.2, 7, 2)


def test_values_are_yaml_but_text_stays_text(run_file: str) -> None:
    options = ["--lora.targets", "[a, b]", "--metrics.port", "null", "--run.name", "007"]
    config = parse(["--config", run_file, *options], {}).config
    assert (config.lora.targets, config.metrics.port, config.run.name) == (("a", "b"), None, "007")


def test_flags_and_run_directory(run_file: str) -> None:
    plain = parse(["--config", run_file], {})
    assert (plain.run_dir, plain.dry_run, plain.resume) == (Path("runs/base"), False, False)
    assert plain.log_level is LogLevel.INFO
    assert parse(["--config", run_file, "--log-level", "error"], {}).log_level is LogLevel.ERROR
    flagged = parse(["--config", run_file, "--run-dir", "/x/y", "--dry-run", "--resume"], {})
    assert (flagged.run_dir, flagged.dry_run, flagged.resume) == (Path("/x/y"), True, True)


def test_resume_takes_auto_and_nothing_else(run_file: str) -> None:
    for options, expected in (
        ([], (False, False)),
        (["--resume"], (True, False)),
        (["--resume", "auto"], (False, True)),
    ):
        asked = parse(["--config", run_file, *options, "--run.seed", "1"], {})
        assert (asked.resume, asked.resume_auto) == expected
    with pytest.raises(ConfigError, match="argument --resume: invalid choice: 'always'"):
        parse(["--config", run_file, "--resume", "always"], {})


@pytest.mark.parametrize(
    ("options", "port"),
    [([], None), (["--dashboard"], 8720), (["--dashboard", "0"], 0), (["--dashboard", "--dry-run"], 8720)],
)
def test_a_live_page_is_asked_for_with_or_without_a_port(run_file: str, options: list[str], port: int | None) -> None:
    assert parse(["--config", run_file, *options], {}).config.dashboard.port == port


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (
            ["--alignment.gruop_size", "4"],
            {},
            "option --alignment.gruop_size: alignment.gruop_size: unknown key; did you mean alignment.group_",
        ),
        (["--alignment.group_size", "1"], {}, "option --alignment.group_size: alignment.group_size = 1"),
        (
            ["--rewards.hsp.weight", "1"],
            {},
            "option --rewards.hsp.weight: rewards.hsp: no such entry in rewards; there are hps",
        ),
        (["--rewards.hps", "1"], {}, "name the field, rewards.hps.FIELD"),
        (["--group_size", "4"], {}, "unknown option --group_size; did you mean --alignment.group_size?"),
        (["--quik"], {}, "unknown option --quik; did you mean --quick?"),
        (["--run.seed"], {}, "--run.seed needs a value"),
        (["--config"], {}, "command line: argument --config: expected one argument"),
        (["stray"], {}, "unexpected 'stray'"),
        (["--dashboard", "70000"], {}, "option --dashboard.port: dashboard.port"),
        (["--dashbord"], {}, "unknown option --dashbord; did you mean --dashboard?"),
        (["--lora.targets", "[a"], {}, "option --lora.targets: line 1: not valid YAML"),
        (
            [],
            {"RTDMD_WORKERS__CUONT": "2"},
            "environment variable RTDMD_WORKERS__CUONT: workers.cuont: unknown key; did you mean workers.count",
        ),
        (
            [],
            {"RTDMD_SERVER__PORT": "1"},
            "environment variable RTDMD_SERVER__PORT: server: unknown key",
        ),
        (
            [],
            {"RTDMD_RUN__SEDE": "2"},
            "environment variable RTDMD_RUN__SEDE: run.sede: unknown key; did you mean run.s",
        ),
    ],
)
def test_mistakes_are_named(run_file: str, options: list[str], environment: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--config", run_file, *options], environment)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_variables_of_kubernetes_services_are_not_ours(run_file: str) -> None:
    """For a Service named rtdmd, rtdmd-head-svc or rtdmd-a--b every container of the namespace gets these."""
    environment = {
        "RTDMD_HEAD_SVC_SERVICE_HOST": "10.0.0.7",
        "RTDMD_HEAD_SVC_SERVICE_PORT_GCS_SERVER": "6379",
        "RTDMD_HEAD_SVC_PORT_6379_TCP": "tcp://10.0.0.7:6379",
        "RTDMD_HEAD_SVC_PORT_6379_TCP_PROTO": "tcp",
        "RTDMD_SERVICE_HOST": "10.0.0.8",
        "RTDMD_PORT": "tcp://10.0.0.8:80",
        "RTDMD_A__B_SERVICE_HOST": "10.0.0.9",
        "RTDMD_A__B_SERVICE_PORT": "80",
        "RTDMD_A__B_PORT": "tcp://10.0.0.9:80",
        "RTDMD_A__B_PORT_80_TCP_ADDR": "10.0.0.9",
    }
    file = ["--config", run_file]
    assert parse(file, environment) == parse(file, {})
    assert parse(file, environment | {"RTDMD_RUN__SEED": "3"}).config.run.seed == 3
    assert parse_forecast(file, environment) == parse_forecast(file, {})


def test_a_home_directory_may_be_written_in_every_layer(run_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands `--option=~/x` or a quoted value of an environment variable."""
    monkeypatch.setenv("HOME", "/home/ada")
    environment = {"RTDMD_PROMPTS__TRAIN": "~/train.txt"}
    asked = parse(["--config", run_file, "--run-dir=~/runs/a", "--backbone.path=~/sd3"], environment)
    assert asked.run_dir == Path("/home/ada/runs/a")
    assert asked.config.backbone.path == Path("/home/ada/sd3")
    assert asked.config.prompts.train == Path("/home/ada/train.txt")


def test_the_run_file_may_be_in_the_home_directory(run_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(run_file).parent))
    assert parse(["--config=~/run.yaml"], {}).config.run.name == "base"


def test_a_misspelt_quick_block_is_found_before_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE.replace("run: {seed: 2}", "run: {sede: 2}"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml \(quick\): run\.sede: unknown key; did you mean run\.seed\?"):
        parse(["--config", str(path)], {})


def test_quick_without_a_quick_block_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN_FILE.partition("quick:")[0], encoding="utf-8")
    assert parse(["--config", str(path)], {}).config.run.seed == 1
    with pytest.raises(ConfigError, match="--quick needs a quick: mapping"):
        parse(["--config", str(path), "--quick"], {})


def test_help_explains_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    missing = [knob.dotted for knob in knobs() if f"--{knob.dotted} " not in text]
    assert missing == []
    assert '--alignment.policy_gradient subgrpo|grpo|nft|surrogate_reward|none  (default "subgrpo")' in text
    assert "--cold_start.from_checkpoint path|null  (default null)" in text


@pytest.mark.parametrize("text", ["/data/run #3/sd3", "/d/a: b", "[a]", "2026", "no", "{x}", "/data/'quoted'"])
def test_a_path_is_what_was_typed(run_file: str, text: str) -> None:
    """Read as YAML it would be cut at the comment, be another value, or be refused."""
    by_option = parse(["--config", run_file, "--backbone.path", text], {}).config
    by_variable = parse(["--config", run_file], {"RTDMD_BACKBONE__PATH": text}).config
    assert by_option.backbone.path == by_variable.backbone.path == found_path(Path(text))


def test_an_empty_path_is_refused_in_every_layer(run_file: str) -> None:
    """A variable that is not set. `Path("")` would be the current directory."""
    for key in ("backbone.path", "prompts.evaluation"):
        with pytest.raises(ConfigError, match=f"^option --{key}: {key} is empty: name a path$"):
            parse(["--config", run_file, f"--{key}", ""], {})
    with pytest.raises(
        ConfigError, match=r"^environment variable RTDMD_PROMPTS__TRAIN: prompts\.train is empty: name a"
    ):
        parse(["--config", run_file], {"RTDMD_PROMPTS__TRAIN": ""})
    written = Path(run_file).read_text().replace("path: model", 'path: ""', 1)
    assert 'path: ""' in written
    Path(run_file).write_text(written)
    with pytest.raises(ConfigError, match=rf"^{run_file}: backbone\.path is empty: name a path$"):
        parse(["--config", run_file], {})
    for option in ("--run-dir", "--config"):
        with pytest.raises(ConfigError, match=f"argument {option}: it is empty: name a path"):
            parse(["--config", run_file, option, ""], {})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("caf\udce9", r"prompts\.train = \"caf\\udce9\" has bytes that are not UTF-8: rename it"),
        ("train.txt\r", r"prompts\.train = \"train\.txt\\r\" has a control character, such as a line end: remove it"),
    ],
)
def test_what_is_no_text_is_named_in_every_layer(run_file: str, text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=rf"^environment variable RTDMD_PROMPTS__TRAIN: {fault}$"):
        parse(["--config", run_file], {"RTDMD_PROMPTS__TRAIN": text})
    content = yaml.safe_load(Path(run_file).read_text())
    content["prompts"]["train"] = text
    Path(run_file).write_text(json.dumps(content))  # JSON is YAML
    with pytest.raises(ConfigError, match=rf"^{run_file}: {fault}$"):
        parse(["--config", run_file], {})


@pytest.mark.parametrize("end", ["\n", "\udce9"])
def test_no_text_that_is_refused_shows_a_secret(run_file: str, end: str) -> None:
    with pytest.raises(ConfigError, match=r"redis\.url = ") as caught:
        parse(["--config", run_file], {"RTDMD_REDIS__URL": f"redis://:secret@h:6379/0{end}"})
    assert "secret" not in str(caught.value)


def test_a_variable_in_a_path_is_not_expanded_and_said_to_be(run_file: str, tmp_path: Path) -> None:
    for text in ("$SCRATCH/model", "${SCRATCH}/model"):
        with pytest.raises(
            ConfigError, match=r"backbone\.path = .*: variables are not expanded here: write the whole path"
        ):
            parse(["--config", run_file, "--backbone.path", text], {"SCRATCH": str(tmp_path)})
    (tmp_path / "$HOME").mkdir()
    kept = parse(["--config", run_file, "--backbone.path", str(tmp_path / "$HOME")], {})
    assert kept.config.backbone.path == tmp_path / "$HOME"


def test_quotes_around_the_value_of_a_variable_are_named(run_file: str) -> None:
    for name, value in (("RTDMD_RUN__SEED", '"3"'), ("RTDMD_BACKBONE__PATH", "'a/model'")):
        with pytest.raises(ConfigError, match=f"^environment variable {name}: its value has quotes around it"):
            parse(["--config", run_file], {name: value})


def test_a_switch_is_true_or_false(run_file: str) -> None:
    for text in ("0", "1", "maybe"):
        with pytest.raises(ConfigError, match=f"evaluation.teacher = .*{text}.*: input should be true or false"):
            parse(["--config", run_file], {"RTDMD_EVALUATION__TEACHER": text})


@pytest.mark.parametrize(("written", "read"), [("20261001", "20261001"), ("yes", "true"), ("1.5", "1.5")])
def test_a_name_that_yaml_reads_as_a_number_is_told_to_be_quoted(run_file: str, written: str, read: str) -> None:
    content = yaml.safe_load(Path(run_file).read_text())
    others = yaml.safe_dump({key: value for key, value in content.items() if key != "run"})
    Path(run_file).write_text(f"{others}run: {{name: {written}}}\n")
    with pytest.raises(ConfigError, match=rf"run\.name = {read}: input should be text, .*: write it in quotes$"):
        parse(["--config", run_file], {})
    Path(run_file).write_text(f"{others}run: {{name: '{written}'}}\n")
    assert parse(["--config", run_file], {}).config.run.name == written
    assert parse(["--config", run_file, "--run.name", "1.0"], {}).config.run.name == "1.0"


def test_null_is_no_path_and_a_list_is_a_list_of_servers(run_file: str) -> None:
    def with_url(text: str) -> object:
        options = ["--rewards.hps.scorer", "null", "--rewards.hps.model", "null", "--rewards.hps.url", text]
        return parse(["--config", run_file, *options], {}).config.rewards[0].url

    assert parse(["--config", run_file, "--cold_start.from_checkpoint", "null"], {}).config.cold_start.iterations > 0
    assert with_url("http://127.0.0.1:1") == "http://127.0.0.1:1"
    assert with_url("[http://127.0.0.1:1, http://127.0.0.1:2]") == ("http://127.0.0.1:1", "http://127.0.0.1:2")


@pytest.mark.parametrize("text", ["010", "008", "0512", "12:30", "2026-11-29"])
def test_a_number_is_decimal(run_file: str, text: str) -> None:
    """YAML 1.1 reads 010 as 8 and 12:30 as 750."""
    for options, environment in ([["--run.seed", text], {}], [[], {"RTDMD_RUN__SEED": text}]):
        with pytest.raises(ConfigError, match=rf"run.seed = \"{text}\": input should be a valid integer"):
            parse(["--config", run_file, *options], environment)


def test_what_is_no_text_is_refused_before_anything_starts(run_file: str) -> None:
    with pytest.raises(ConfigError, match=r"^command line: 'caf\\udce9' has bytes that are not UTF-8: rename it$"):
        parse(["--config", run_file, "--run-dir", "caf\udce9"], {})
