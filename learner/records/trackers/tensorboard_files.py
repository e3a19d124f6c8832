"""TensorBoard: event files in the run's folder `tensorboard`. It needs neither torch nor TensorFlow."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from learner.records.trackers.protocol import Cell, TrackedRun, markdown_table

RGB = 3
"""TensorBoard's number for this color space."""


class TensorBoardFiles:
    """Writes event files for `tensorboard --logdir runs`."""

    def __init__(self, run: TrackedRun) -> None:
        self._writer = EventFileWriter(str(run.directory / "tensorboard"))

    def configuration(self, values: Mapping[str, str]) -> None:
        self._add(0, text_pb("configuration", markdown_table(("option", "value"), list(values.items()))))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, Summary(value=parts))

    def picture(self, step: int, name: str, png: Path) -> None:
        with Image.open(png) as opened:
            width, height = opened.size
        image = Summary.Image(encoded_image_string=png.read_bytes(), width=width, height=height, colorspace=RGB)
        self._add(step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        self._add(step, text_pb(name, markdown_table(columns, rows)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Summary) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
