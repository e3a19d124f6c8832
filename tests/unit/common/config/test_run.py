"""The schema refuses what cannot run, and says which key of which file is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from common.config.run import Config
from common.errors import ConfigError
from learner.preflight.run_file import Draft, dump_config, knobs, load_config, parse_yaml, read_run_file

REPOSITORY = Path(__file__).parents[4]


def minimal(**sections: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": {"name": "test"},
        "backbone": {"family": "sd3", "path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "rewards": [{"name": "hps", "scorer": "hps", "model": "m", "differentiable": True}],
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return values


def build(**sections: Any) -> Config:
    draft = Draft("run.yaml")
    draft.lay(minimal(**sections), "run.yaml")
    return draft.build()


def complaint(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    return str(caught.value)


def test_defaults_are_the_published_setting() -> None:
    config = build()
    assert (config.lora.rank, config.lora.alpha) == (32, 64)
    assert (config.sampling.steps, config.sampling.eta) == (4, 0.9)
    assert (config.cold_start.student_every, config.cold_start.learning_rate_student) == (10, 3e-5)
    assert config.cold_start.consistency_weight == 0.01
    assert (config.alignment.learning_rate_student, config.alignment.learning_rate_fake) == (3e-6, 3e-5)
    assert (config.alignment.clip_low, config.alignment.clip_high) == (1e-5, 1e-5)
    assert (config.alignment.matching_weight, config.alignment.reward_gradient_weight) == (1e-3, 1e-4)
    assert (config.alignment.ema_decay, config.alignment.ema_every) == (pytest.approx(0.9**16, abs=5e-4), 8)
    assert (config.alignment.weight_decay_student, config.alignment.weight_decay_fake) == (1e-4, 0.0)
    assert (config.cold_start.lora_init_std, config.alignment.lora_init_std) == (None, 1.0)


@pytest.mark.parametrize(
    ("family", "expected"), [("sd3", 7.0), ("flux2", 4.0), ("flux1", 3.5), ("my.module:MyFamily", 1.0)]
)
def test_every_family_has_its_own_section(family: str, expected: float) -> None:
    backbone = build(backbone={"family": family}).backbone
    assert (backbone.family, backbone.guidance_scale) == (family, expected)


def test_a_family_that_is_not_named_is_sd3() -> None:
    values = minimal()
    del values["backbone"]["family"]
    draft = Draft("run.yaml")
    draft.lay(values, "run.yaml")
    assert draft.build().backbone.family == "sd3"


def test_every_knob_has_a_description() -> None:
    undescribed = [knob.dotted for knob in knobs() if not knob.field.description]
    assert undescribed == []
    assert "rewards.NAME.weight" in [knob.dotted for knob in knobs()]


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build().run.seed = 3


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"alignment": {"gruop_size": 4}},
            "run.yaml: alignment.gruop_size: unknown key; did you mean alignment.group_size",
        ),
        ({"alignmnet": {"group_size": 4}}, "run.yaml: alignmnet: unknown key; did you mean alignment?"),
        ({"run": {"group_size": 4}}, "run.yaml: run.group_size: unknown key; did you mean alignment.group_size?"),
        ({"run": {"seed": "four"}}, 'run.yaml: run.seed = "four": input should be a valid integer'),
        ({"run": {"seed": True}}, "run.yaml: run.seed = true: input should be a valid integer"),
        ({"run": {"name": "a/b"}}, "run.yaml: run.name"),
        ({"alignment": {"group_size": 1}}, "alignment.group_size = 1: input should be greater than or equal to 2"),
        ({"alignment": {"iterations": 7}}, "alignment.iterations: 7, fewer than alignment.ema_every = 8"),
        (
            {"alignment": {"surrogate": "gaussian", "old_surrogate": "rollout"}},
            "alignment.old_surrogate: rollout, but workers compute the squared error alone",
        ),
        ({"evaluation": {"images_per_prompt": 1}}, "evaluation.images_per_prompt = 1"),
        ({"evaluation": {"final_images_per_prompt": 1}}, "evaluation.final_images_per_prompt = 1"),
        ({"evaluation": {"teacher_steps": 4}}, "evaluation.teacher_steps: 4, as many as sampling.steps"),
        ({"lora": {"init": "gaussian"}}, "run.yaml: lora.init: unknown key"),
        ({"alignment": {"selected_steps": 5}}, "alignment.selected_steps: 5 steps cannot be selected from the 3"),
        ({"alignment": {"advantage_clip": float("inf")}}, "alignment.advantage_clip = Infinity"),
        ({"alignment": None}, "run.yaml: alignment = null"),
        ({"sampling": {"eta": 0}}, "sampling.eta: 0 makes every step deterministic"),
        (
            {"alignment": {"policy_gradient": "nft", "selected_steps": 5}},
            "alignment.selected_steps: 5, more than sampling.steps = 4",
        ),
        (
            {"alignment": {"policy_gradient": "nft", "same_latent": True}, "sampling": {"eta": 0}},
            "alignment.same_latent: true, with sampling.eta = 0",
        ),
        (
            {"alignment": {"policy_gradient": "surrogate_reward", "step_weights": "balanced"}},
            "alignment.step_weights: balanced, but policy_gradient: surrogate_reward has no transition density",
        ),
        (
            {"alignment": {"policy_gradient": "surrogate_reward", "matching_weight": 0}},
            "alignment.matching_weight: 0: a student that climbs a learned reward needs matching as its anchor",
        ),
        (
            {"alignment": {"policy_gradient": "none", "train_fraction": 0.5}},
            "alignment.train_fraction: 0.5, with policy_gradient: none: samples would be chosen by advantages that",
        ),
        (
            {"alignment": {"policy_gradient": "nft", "surrogate": "gaussian"}},
            "alignment.surrogate: gaussian, but policy_gradient: nft has no transition density: use squared_error",
        ),
        (
            {"alignment": {"policy_gradient": "nft", "old_surrogate": "rollout"}},
            "alignment.old_surrogate: rollout, but policy_gradient: nft has no transition density: use learner",
        ),
        (
            {
                "alignment": {"policy_gradient": "surrogate_reward"},
                "rewards": [{"name": "a", "url": "http://x", "weight": 0}],
            },
            "rewards: no reward is trained on",
        ),
        (
            {
                "alignment": {"policy_gradient": "none", "matching_weight": 0},
                "rewards": [{"name": "a", "url": "http://x"}],
            },
            "alignment.reward_gradient_weight: 0.0001, but no trained reward is differentiable",
        ),
        ({"backbone": {"family": "sd4"}}, "backbone.family = \"sd4\": input should be 'sd3', 'flux2', 'flux1'"),
        ({"backbone": {"family": "flux2", "teacher": "x"}}, "run.yaml: backbone.teacher: unknown key; did you mean"),
        (
            {"backbone": {"family": "flux1", "teacher_path": "x"}},
            "run.yaml: backbone.teacher_path: unknown key for backbone.family = flux1",
        ),
        (
            {"backbone": {"family": "my.module:Family", "max_sequence_length": 8}},
            "unknown key for backbone.family = my.module:Family; what it needs goes into backbone.options",
        ),
        ({"backbone": {"family": "flux1", "height": 0}}, "run.yaml: backbone.height = 0: input should be greater"),
        ({"backbone": {"family": "my.module:"}}, 'run.yaml: backbone.family = "my.module:": string should match'),
        ({"backbone": None}, "run.yaml: backbone = null"),
        ({"learner": {"ranks": 17}}, "learner.ranks: 17, more than alignment.group_size = 16: use fewer ranks"),
        ({"learner": {"shard_base": True}}, "learner.shard_base: true, with one rank"),
        (
            {"learner": {"shard_base": True, "ranks": 2, "num_gpus": 0.5}},
            "learner.shard_base: true, with a part of a GPU per rank",
        ),
        (
            {"learner": {"shard_base": True, "ranks": 3}},
            "alignment.group_size: 16, not a multiple of learner.ranks = 3, as learner.shard_base needs",
        ),
        (
            {"learner": {"shard_base": True, "ranks": 2}, "alignment": {"matching_weight": 0}},
            "alignment.matching_weight: 0: with learner.shard_base every rank must always have a gradient",
        ),
        (
            {"learner": {"shard_base": True, "ranks": 2}, "alignment": {"train_fraction": 0.5}},
            "alignment.train_fraction: 0.5, which gives ranks unequal work: learner.shard_base needs 1",
        ),
        (
            {"learner": {"ranks": 9}, "alignment": {"train_fraction": 0.5}},
            "learner.ranks: 9, more than alignment.group_size = 8: use fewer ranks",
        ),
        (
            {"learner": {"shard_base": True, "ranks": 2}, "cold_start": {"consistency_fraction": 0.5}},
            "cold_start.consistency_fraction: 0.5, which gives ranks unequal work",
        ),
        ({"metrics": {"port": 70_000}}, "metrics.port = 70000"),
        ({"metrics": {"host": "http://x"}}, "metrics.host = "),
        ({"rewards": []}, "rewards = []"),
        ({"rewards": [{"name": "hps"}]}, 'rewards.hps.scorer: url is "local" but no scorer is named'),
        ({"rewards": [{"name": "a", "url": "ftp://x"}]}, "rewards.a.url"),
        ({"rewards": [{"name": "a", "scorer": "hps", "device": "gpu"}]}, 'rewards.a.device = "gpu"'),
        ({"rewards": [{"name": "a", "scorer": "hps", "precision": "half"}]}, 'rewards.a.precision = "half"'),
        (
            {"rewards": [{"name": "a", "url": "http://x", "device": "cuda"}]},
            "rewards.a.device: cuda, but url is not local: give --device to that server",
        ),
        (
            {"rewards": [{"name": "a", "url": "http://x", "precision": "float32"}]},
            "rewards.a.precision: float32, but url is not local: give --precision to that server",
        ),
        ({"rewards": [{"name": "a", "url": ["http://x", "local"]}]}, "rewards.a.url"),
        ({"rewards": [{"name": "a", "url": ["http://x", "http://x"]}]}, "nor http(s) URLs that all differ"),
        (
            {"rewards": [{"name": "a", "url": "http://me:secret@h"}]},
            '"http://...@h": neither local nor redis, and',
        ),
        ({"rewards": [{"name": "a", "url": ["http://a", "http://me:secret@h"]}]}, "user or password"),
        ({"rewards": [{"name": "a", "url": []}]}, "rewards.a.url = []"),
        ({"rewards": [{"name": "a", "url": "http://x", "outage": "ignore"}]}, 'rewards.a.outage = "ignore"'),
        ({"rewards": [{"name": "a", "url": "http://x", "outage_limit_s": 1600}]}, "rewards.a.outage_limit_s = 1600"),
        (
            {"rewards": [{"name": "a", "url": "http://x", "outage": "renormalise"}]},
            "rewards.a.outage: renormalise, but no other reward is trained on",
        ),
        (
            {"rewards": [{"name": "a", "url": "redis", "differentiable": True}], "redis": {"url": "none"}},
            "rewards.a.url: redis, but redis.url is none",
        ),
        (
            {"rewards": [{"name": "a", "url": "redis", "differentiable": True}]},
            "rewards.a.url: redis, but redis.url is embedded",
        ),
        (
            {"reward_client": {"timeout_s": 300}},
            "outage_limit_s: 600: with reward_client.attempts = 3 of 300 s a request could take 1800 s",
        ),
        ({"redis": {"url": "redis://user:secret@host"}}, '"redis://...@host": a user or password would be written'),
        ({"redis": {"url": "user:secret@h:6379/0"}}, '"h:6379/0": a user or password would be written'),
        ({"redis": {"url": "h:6379/0?password=secret"}}, '"h:6379/0": not a URL of Redis'),
        ({"redis": {"url": "redis://h:6379/0?password=secret"}}, '"redis://h:6379/0?...": a user or password in its'),
        ({"redis": {"url": 'redis://user:a" secret#@host'}}, "redis.url"),
        ({"redis": {"url": "redis://h:http/0"}}, "its port is no number"),
        ({"rewards": [{"name": "a", "url": "http://h/?token=secret"}]}, '"http://h/?...": neither local nor redis'),
        ({"rewards": [{"url": "http://x"}]}, "run.yaml: rewards.0.name: required, but not set"),
        (
            {"rewards": [{"name": "a", "url": "http://x", "wieght": 1}]},
            "rewards.a.wieght: unknown key; did you mean rewards.a.weight?",
        ),
        ({"rewards": [{"name": "a", "url": "http://x"}] * 2}, "rewards: the name 'a' is used more than once"),
        (
            {"rewards": [{"name": "a", "url": "http://x"}]},
            "alignment.reward_gradient_weight: 0.0001, but no trained reward",
        ),
        ({"rewards": [{"name": "a", "url": "http://x", "weight": 0}]}, "rewards: no reward is trained on"),
        (
            {"rewards": [{"name": "a", "url": "http://x", "evaluation_only": True}]},
            "rewards.a.weight: 1 on an evaluation-only",
        ),
        (
            {"alignment": {"policy_gradient": "none", "reward_gradient_weight": 0, "matching_weight": 0}},
            "alignment.matching_weight: 0, with neither",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(sections: dict[str, Any], expected: str) -> None:
    told = complaint(**sections)
    assert expected in told
    assert "secret" not in told


REDIS = {"url": "redis://host:6379/0"}


def test_a_reward_may_have_several_servers() -> None:
    urls = ("http://a:1", "http://b:2")
    several = {"name": "hps", "url": list(urls), "differentiable": True, "outage": "renormalise"}
    config = build(rewards=[several, {"name": "two", "url": "redis"}, {"name": "three", "scorer": "x"}], redis=REDIS)
    assert [reward.urls for reward in config.rewards] == [urls, (), ()]
    assert [reward.outage for reward in config.rewards] == ["renormalise", "pause", "pause"]
    assert build(rewards=[several, {"name": "three", "scorer": "x"}]).redis.url == "embedded"


def test_all_problems_are_told_at_once() -> None:
    lines = complaint(run={"seed": -1}, lora={"rank": 0}).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("run.yaml: run.seed = -1")
    assert lines[1].startswith("run.yaml: lora.rank = 0")


def test_all_step_grpo_needs_no_selection_and_a_distillation_run_no_trained_reward() -> None:
    build(alignment={"policy_gradient": "grpo", "selected_steps": 5})
    for rival in ("nft", "surrogate_reward"):  # they need no stochastic step
        build(alignment={"policy_gradient": rival, "selected_steps": 4}, sampling={"eta": 0})
    unused = [{"name": "gold", "url": "http://x", "weight": 0, "evaluation_only": True}]
    config = build(alignment={"iterations": 0}, rewards=unused)
    assert not config.rewards[0].trained


def test_the_last_layer_wins_and_is_named() -> None:
    draft = Draft("run.yaml")
    draft.lay(minimal(), "run.yaml")
    draft.lay({"rewards": {"hps": {"weight": 0.5}}, "run": {"seed": 1}}, "second")
    draft.lay({"run": {"seed": 2}}, "third")
    config = draft.build()
    assert (config.rewards[0].weight, config.rewards[0].scorer, config.run.seed) == (0.5, "hps", 2)
    draft.lay({"run": {"seed": "x"}}, "fourth")
    with pytest.raises(ConfigError, match=r"^fourth: run\.seed"):
        draft.build()


def test_an_override_of_an_unknown_reward_lists_the_known() -> None:
    draft = Draft("run.yaml")
    draft.lay(minimal(), "run.yaml")
    with pytest.raises(ConfigError, match=r"option: rewards\.hsp: no such entry in rewards; there are hps"):
        draft.lay({"rewards": {"hsp": {"weight": 1}}}, "option")


def test_laying_does_not_change_the_given_values() -> None:
    values = minimal()
    draft = Draft("run.yaml")
    draft.lay(values, "run.yaml")
    draft.lay({"rewards": {"hps": {"weight": 0.5}}, "lora": {"rank": 4}}, "second")
    assert values == minimal()


def test_a_dumped_config_loads_back_equal(tmp_path: Path) -> None:
    config = build(cold_start={"learning_rate_fake": 1e-6, "from_checkpoint": "runs/a"}, metrics={"port": 0})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("shapes", ["detector", "hps", "pickscore", "gold"]),
        ("shapes_finished", ["hps", "pickscore", "detector", "gold"]),
        ("shapes_judge", ["hps", "judge", "gold"]),
        ("text", ["ocr", "gold"]),
    ],
)
def test_a_shipped_run_file_is_valid_with_and_without_its_quick_block(name: str, rewards: list[str]) -> None:
    path = REPOSITORY / f"deploy/runs/{name}.yaml"
    values = read_run_file(path)
    quick = values.pop("quick")
    draft = Draft(str(path))
    draft.lay(values, str(path))
    full = draft.build()
    draft.lay(quick, "quick")
    assert draft.build().alignment.iterations < full.alignment.iterations
    assert [reward.name for reward in full.rewards] == rewards


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-5", 1e-5), ("1.5E+3", 1500.0), ("-2e0", -2.0), (".5", 0.5), ("1.", 1.0), ("007.5", 7.5), ("e5", "e5")),
        *(("12", 12), ("-0", 0), ("1_000", 1000), ("0x1F", 31), ("1.2.3", "1.2.3"), ("null", None), ("yes", True)),
        *(("010", "010"), ("08", "08"), ("0b11", "0b11"), ("12:30", "12:30"), ("1:30.5", "1:30.5")),
        *(("2026-11-31", "2026-11-31"), ("2026-11-29", "2026-11-29"), ("'010'", "010")),
    ],
)
def test_numbers_are_decimal_and_may_have_an_exponent(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_mapping_may_be_merged_into_another() -> None:
    """Keys that are written beside `<<` win, as YAML says, also in a mapping that is merged itself."""
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b, z: 4}\nd: {z: 5, <<: [*b, *a]}\n"
    merged = {"x": 1, "y": 3}
    expected = {"a": {"x": 1, "y": 2}, "b": merged, "c": merged | {"z": 4}, "d": merged | {"z": 5}}
    assert parse_yaml(text, "here") == expected


def test_an_alias_inside_of_what_it_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^here: not valid YAML: an alias .* stands inside of what it names$"):
        parse_yaml("run: &a {name: *a}\n", "here")


def test_what_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^here: not valid YAML: nested too deeply$"):
        parse_yaml("a: " + "[" * 5000, "here")


def test_a_home_directory_may_be_written_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    local = {"name": "hps", "scorer": "hps", "model": "~/hps", "differentiable": True}
    config = build(
        backbone={"path": "~/sd3"},
        prompts={"train": "~/a.txt", "evaluation": "b/~.txt"},
        cold_start={"from_checkpoint": "~/runs/a"},
        rewards=[local],
    )
    assert config.backbone.path == Path("/home/ada/sd3")
    assert (config.prompts.train, config.prompts.evaluation) == (Path("/home/ada/a.txt"), Path("b/~.txt"))
    assert config.cold_start.from_checkpoint == Path("/home/ada/runs/a")
    assert config.rewards[0].model == Path("/home/ada/hps")


def test_the_home_of_somebody_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.train = \"~nobody-here/a\": there is no home directory for ~"):
        build(prompts={"train": "~nobody-here/a", "evaluation": "b.txt"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run: {<<: {name: a}, <<: {name: b}}\n", "key '<<' is given twice"),
        (b"run: {[1, 2]: a}\n", "key of several parts is not a word"),
        (b"run: {name: a}\nrun: {name: b}\n", "line 2: not valid YAML: key 'run' is given twice"),
        (b"run: {1: a}\n", "key 1 is not a word"),
        (b"run: [\n", "not valid YAML"),
        (b"run: !!python/name:os.system\n", "not valid YAML"),
        (b"- a\n", "a run file is a mapping of sections"),
        (b"", "a run file is a mapping of sections, this one holds null"),
        (b"\xff\xfe", "byte 0 is not UTF-8: save the file as UTF-8"),
    ],
)
def test_a_damaged_run_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_a_missing_run_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such run file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_minimal_is_yaml_the_loader_reads(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(minimal()), encoding="utf-8")
    assert load_config(path) == build()


@pytest.mark.parametrize("name", ["1e5", "010", "12", "2026-11-29", "no"])
def test_a_name_that_looks_like_another_value_is_read_back(name: str, tmp_path: Path) -> None:
    config = build(run={"name": name})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


GOLD = {"name": "gold", "url": "http://x", "weight": 0, "evaluation_only": True}


def test_the_watchdog_takes_the_first_held_out_reward_or_the_named_one() -> None:
    rewards = [*minimal()["rewards"], GOLD, GOLD | {"name": "other"}]
    assert build().watchdog.gold_of(build().rewards) is None
    for named, found in (({}, "gold"), ({"gold": "other"}, "other")):
        config = build(rewards=rewards, watchdog=named)
        assert config.watchdog.gold_of(config.rewards) == found


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"watchdog": {"gold": "hps"}}, "watchdog.gold: hps, which is no evaluation_only reward: there are none"),
        ({"watchdog": {"on_alarm": "roll_back"}}, "roll_back, but no reward is evaluation_only"),
        (
            {
                "rewards": [*minimal()["rewards"], GOLD],
                "watchdog": {"on_alarm": "roll_back"},
                "evaluation": {"every": 20},
                "checkpoint": {"every": 50},
            },
            "roll_back, but checkpoint.every = 50 is not a multiple of evaluation.every = 20",
        ),
        ({"watchdog": {"on_alarm": "stop"}}, "watchdog.on_alarm"),
        ({"watchdog": {"false_alarm_rate": 0}}, "watchdog.false_alarm_rate"),
    ],
)
def test_a_watchdog_that_cannot_act_is_refused(sections: dict[str, Any], message: str) -> None:
    assert message in complaint(**sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"checkpoint": {"copy_to": "s3://KEY:SECRET@bucket/run"}},
            "without a password: keys come from the environment",
        ),
        ({"checkpoint": {"copy_to": ""}}, "name a folder or s3://BUCKET/"),
        ({"checkpoint": {"best": "god"}}, "checkpoint.best: god, which no evaluation has: there are "),
        (
            {"checkpoint": {"best": "diversity", "every": 50}, "evaluation": {"every": 20}},
            "diversity, but checkpoint.every = 50 is not a multiple of evaluation.every = 20",
        ),
    ],
)
def test_checkpoints_that_cannot_be_kept_as_asked_are_refused(sections: dict[str, Any], message: str) -> None:
    assert message in complaint(**sections)
