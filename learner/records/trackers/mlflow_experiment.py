"""MLflow: the server of MLFLOW_TRACKING_URI."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from learner.records.trackers.protocol import Cell, TrackedRun, markdown_table

MOST_METRICS, MOST_PARAMETERS = 1000, 100
"""Limits of MLflow for one request."""
RUN_ID_TAG = "rtdmd.run"


class MlflowExperiment:
    """A run of MLflow, found again by a tag. Figures are sent in requests of many."""

    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(run.project)
        at = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        found = self._client.search_runs([at], f"tags.`{RUN_ID_TAG}` = '{run.id}'", max_results=1)
        opened = found[0] if found else self._client.create_run(at, run_name=run.name, tags={RUN_ID_TAG: run.id})
        self._id: str = opened.info.run_id
        self._client.update_run(self._id, "RUNNING")
        self._waiting: list[Metric] = []

    def configuration(self, values: Mapping[str, str]) -> None:
        known = self._client.get_run(self._id).data.params
        new = [Param(name, value) for name, value in values.items() if name not in known]  # a parameter never changes
        for first in range(0, len(new), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=new[first : first + MOST_PARAMETERS])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now_ms, step) for name, value in values.items()]
        if len(self._waiting) >= MOST_METRICS:
            self.flush()

    def picture(self, step: int, name: str, png: Path) -> None:  # noqa: ARG002 - files of MLflow have no step
        self._client.log_artifact(self._id, str(png), name)

    def table(
        self,
        step: int,  # noqa: ARG002
        name: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Cell]],
    ) -> None:
        self._client.log_text(self._id, markdown_table(columns, rows), f"{name}.md")

    def flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:MOST_METRICS])
            del self._waiting[:MOST_METRICS]

    def close(self) -> None:
        self._client.set_terminated(self._id)
