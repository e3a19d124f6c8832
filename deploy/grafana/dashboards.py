"""Writes the Grafana dashboards training.json, service.json and rewards.json from `panels.py`.

python -m deploy.grafana.dashboards
"""

from __future__ import annotations

import json
from pathlib import Path

from deploy.grafana.panels import DASHBOARDS, Panel

FOLDER = Path(__file__).parent
COLUMNS, HEIGHT = 3, 8
"""Panels per row of Grafana's 24 columns, and their height in its units."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]


def dashboard(name: str, panels: tuple[Panel, ...]) -> dict[str, Json]:
    """One dashboard as Grafana reads it."""
    return {
        "uid": f"rtdmd-{name}",
        "title": f"RTDMD {name}",
        "tags": ["rtdmd"],
        "timezone": "utc",
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": [_panel(place, panel) for place, panel in enumerate(panels)],
    }


def _datasource_variable() -> Json:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _run_variable() -> Json:
    query = "label_values(rtdmd_progress_timestamp_seconds, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": dict(DATASOURCE),
        "query": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _panel(place: int, panel: Panel) -> Json:
    width = 24 // COLUMNS
    custom: dict[str, Json] = {"fillOpacity": 10 if panel.stacked else 0, "lineWidth": 1, "showPoints": "never"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    targets: list[Json] = [
        {"refId": chr(ord("A") + number), "datasource": dict(DATASOURCE), "expr": expression, "legendFormat": legend}
        for number, (expression, legend) in enumerate(panel.curves.items())
    ]
    return {
        "id": place + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": dict(DATASOURCE),
        "gridPos": {"x": place % COLUMNS * width, "y": place // COLUMNS * HEIGHT, "w": width, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom if panel.kind == "timeseries" else {}},
            "overrides": [],
        },
        "targets": targets,
    }


def text(name: str) -> str:
    """The file of one dashboard."""
    return json.dumps(dashboard(name, DASHBOARDS[name]), indent=1) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(text(each), encoding="utf-8")
