"""Rules and dashboards: they name only metrics that exist, and the tools that read them accept them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.dashboards import text
from deploy.grafana.panels import DASHBOARDS
from tests.helpers.promql import PROJECT_ROOT, faults, recorded, rules, selectors

DEPLOY = PROJECT_ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
OPERATIONS = PROJECT_ROOT / "docs/operations.md"
ALERTS = [rule for rule in rules() if "alert" in rule]
EXPRESSIONS = {
    **{f"rule {rule.get('alert') or rule['record']}": rule["expr"] for rule in rules()},
    **{
        f"panel {name}: {panel.title}: {expression}": expression
        for name, panels in DASHBOARDS.items()
        for panel in panels
        for expression in panel.curves
    },
}
PAGE_SECONDS = 30
SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds(duration: str) -> int:
    return int(duration[:-1]) * SECONDS[duration[-1]]


def need(tool: str) -> str:
    """The path of a tool of Debian's packages; the test is skipped without it."""
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed: apt-get install prometheus prometheus-alertmanager")
    return path


def check(*command: str, folder: Path = PROMETHEUS) -> None:
    done = subprocess.run([need(command[0]), *command[1:]], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ── expressions ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
def test_every_expression_names_metrics_that_exist(expression: str) -> None:
    assert list(selectors(expression)), expression
    assert faults(expression) == []


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("rtdmd_gone_total > 0", ["rtdmd_gone_total is no metric of the catalogue"]),
        ('sum by (run) (rate(rtdmd_reward{color="red"}[5m]))', ["rtdmd_reward has no label color"]),
        ("rtdmd_reward_seconds > 1", ["rtdmd_reward_seconds is no metric of the catalogue"]),
        ('run:gone:rate5m{run="a"} offset 1h', ["run:gone:rate5m is no metric of the catalogue"]),
        ('label_replace(rtdmd_reward, "x_y", "$1 rtdmd_no", "reward", "(.*)") > 1e9 and on (run) up == 0', []),
        ("histogram_quantile(0.95, sum by (run, le) (rate(rtdmd_reward_seconds_bucket[5m])))", []),
    ],
)
def test_a_metric_or_label_that_is_gone_is_named(expression: str, expected: list[str]) -> None:
    assert faults(expression) == expected


def test_an_expression_is_read_whole() -> None:
    expression = 'a{b="c{d}", e=~"f|g"} / on (h) group_left (i) (j_total[5m] offset 1h > 1e9) unless k:l:m5m{n="o"}'
    assert [str(one) for one in selectors(expression)] == ['a{b="c{d}", e=~"f|g"}', "j_total", 'k:l:m5m{n="o"}']


def test_the_rules_pass_promtools_check() -> None:
    check("promtool", "check", "rules", "rules.yml")


def test_the_panels_pass_promtools_check(tmp_path: Path) -> None:
    """As recording rules, which is all that promtool reads."""
    panels = [one.replace("$run", ".*") for title, one in EXPRESSIONS.items() if title.startswith("panel")]
    group = {"name": "panels", "rules": [{"record": f"panel:{n}", "expr": one} for n, one in enumerate(panels)]}
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [group]}))
    check("promtool", "check", "rules", "--lint=none", "panels.yml", folder=tmp_path)


def test_each_alert_fires_when_it_must_and_not_before() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for alert in ALERTS:
        own = [case for case in cases if case["alertname"] == alert["alert"]]
        assert any(case.get("exp_alerts") for case in own), f"no test in which {alert['alert']} fires"
    check("promtool", "test", "rules", "rules_test.yml")


def test_every_recorded_series_is_used() -> None:
    used = {one.name for expression in EXPRESSIONS.values() for one in selectors(expression)}
    assert recorded().keys() - used == set()


# ── alerts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def heading_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_a_severity_and_a_runbook(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("page", "warning", "info")
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert PROJECT_ROOT / page == OPERATIONS
    assert anchor == alert["alert"].lower()
    assert anchor in heading_anchors(OPERATIONS)


@pytest.mark.parametrize("alert", [a for a in ALERTS if a["labels"]["severity"] == "page"], ids=lambda a: a["alert"])
def test_a_page_comes_within_half_a_minute_of_its_condition(alert: dict[str, Any]) -> None:
    """One scrape and one evaluation until the condition is seen, then its `for`."""
    settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]
    wait = seconds(settings["scrape_interval"]) + seconds(settings["evaluation_interval"])
    assert wait + seconds(alert.get("for", "0s")) <= PAGE_SECONDS


def test_the_examples_of_alertmanager_and_prometheus_are_accepted() -> None:
    check("amtool", "check-config", "alertmanager.yml")
    check("promtool", "check", "config", "prometheus.yml")


def test_the_alertmanager_routes_each_severity_to_its_receiver() -> None:
    for severity, receiver in (("page", "pager"), ("warning", "channel"), ("info", "log")):
        check(
            *("amtool", "config", "routes", "test", "--config.file=alertmanager.yml"),
            *(f"--verify.receivers={receiver}", f"severity={severity}", "run=a"),
        )


def test_prometheus_reads_the_files_that_runs_and_people_write() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["honor_labels"] is True
    patterns = [name for entry in job["file_sd_configs"] for name in entry["files"]]
    assert patterns == ["targets/*.json", "targets/*.yml"]
    example = yaml.safe_load((PROMETHEUS / "targets/reward_servers.yml.example").read_text())
    assert all(entry["labels"]["job"] == "reward_server" for entry in example)


# ── dashboards ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_dashboards_are_current(name: str) -> None:
    found = (DEPLOY / f"grafana/{name}.json").read_text(encoding="utf-8")
    assert found == text(name), "run `python -m deploy.grafana.dashboards`"


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """What a model of the published schema did not keep, or kept otherwise."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{place}/{key} is unknown"
            else:
                yield from lost(value, kept[key], f"{place}/{key}")
    elif isinstance(given, list):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{place}/{index}")
    elif given != kept:
        yield f"{place} is {given!r}, read as {kept!r}"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_published_schema_knows_every_field(name: str) -> None:
    """Grafana's own models of a dashboard, a time series and a query of Prometheus."""
    sdk = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="needs grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import prometheus, timeseries

    def read(model: Any, given: Any) -> Any:
        return json.loads(json.dumps(model.from_json(given), cls=JSONEncoder))

    found = json.loads(text(name))
    assert list(lost(found, read(sdk.Dashboard, found))) == []
    for panel in found["panels"]:
        for query in panel["targets"]:
            assert list(lost(query, read(prometheus.Dataquery, query))) == []
        if panel["type"] == "timeseries":
            custom = panel["fieldConfig"]["defaults"]["custom"]
            assert list(lost(custom, read(timeseries.FieldConfig, custom))) == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_have_their_own_place(name: str) -> None:
    panels = json.loads(text(name))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


# ── compose ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def compose_complaints(file: Path) -> str:
    """What the Compose Specification's schema says against a file; "" if it fits."""
    program = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_compose_fits_the_schema_of_its_specification(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    assert compose_complaints(DEPLOY / "compose.yaml") == ""
    wrong = (DEPLOY / "compose.yaml").read_text().replace("restart: unless-stopped", "restarts: unless-stopped", 1)
    (tmp_path / "compose.yaml").write_text(wrong)
    assert "'restarts' was unexpected" in compose_complaints(tmp_path / "compose.yaml")


def test_compose_names_versions_and_files_that_exist() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"prometheus", "alertmanager", "grafana", "run"}
    for name, service in services.items():
        assert name == "run" or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        mounted = [volume.split(":")[0] for volume in service["volumes"] if volume.startswith(".")]
        assert [one for one in mounted if one != "../runs" and not (DEPLOY / one).exists()] == []
    mounts = " ".join(services["grafana"]["volumes"])
    assert [name for name in DASHBOARDS if f"/var/lib/grafana/dashboards/{name}.json" not in mounts] == []
