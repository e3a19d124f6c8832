"""A run directory as the live page shows it: its sections, made again only when the files behind them have changed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from common.errors import RtdmdError
from common.types import Stage
from learner.preflight.run_file import load_saved_config
from learner.records.group_files import FOLDER, KeptGroups, kept_names, read_groups
from learner.records.live_sections import (
    Tiles,
    group_cards,
    group_detail,
    groups_section,
    now_section,
    pictures_section,
    result_section,
)
from learner.records.run_files import MetricsFile, Record, read_run
from learner.records.sections import curves_of, curves_section
from learner.records.timeline import log_events, timeline

SECTIONS = ("now", "result", "groups", "pictures", "curves", "timeline")
"""Names of the sections, in the order of the page."""
SLOW = {"curves": 30.0, "timeline": 30.0}
"""Seconds between two makings of the sections that take longest."""
AGE_S = 3.0
"""The age of the newest record is shown to this precision."""
GRID = re.compile(r"(cold_start|alignment)-\d{6,}\.png")

Stamp = str
"""Says which state of the files a section was made from."""


@dataclass(frozen=True)
class Section:
    """A section as HTML, and when it was made (by the monotonic clock)."""

    stamp: Stamp
    markup: str
    made: float


class LiveRun:
    """Serves any number of threads: a lock lets one of them read at a time."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._made: dict[str, Section] = {}
        self._lock = threading.Lock()
        self._config: tuple[Stamp, Mapping[str, int]] = ("", {})

    def changed(self, have: Mapping[str, Stamp]) -> dict[str, dict[str, str]]:
        """Section -> its stamp and markup, of those whose stamp is not the given one."""
        with self._lock:
            sections = {name: self._section(name) for name in SECTIONS}
        return {
            name: {"stamp": section.stamp, "markup": section.markup}
            for name, section in sections.items()
            if have.get(name) != section.stamp
        }

    def cards(self, name: str) -> str:
        """The cards of the groups of one iteration; RtdmdError if there are none."""
        kept = read_groups(self.run_dir, name)
        return group_cards(kept, {group.strip: self._tiles(kept, place) for place, group in enumerate(kept.groups)})

    def detail(self, name: str, place: int) -> str:
        """One group, with everything that is known of it; RtdmdError if there is none."""
        kept = read_groups(self.run_dir, name)
        if not 0 <= place < len(kept.groups):
            raise RtdmdError(f"{name}: it has {len(kept.groups)} groups; there is no group {place}")
        return group_detail(kept, place, self._tiles(kept, place))

    def _section(self, name: str) -> Section:
        last, now = self._made.get(name), time.monotonic()
        if last is not None and now - last.made < SLOW.get(name, 0.0):
            return last
        stamp = self._stamp(name)
        if last is None or last.stamp != stamp:
            last = self._made[name] = Section(stamp, self._markup(name), now)
        return last

    def _markup(self, name: str) -> str:
        """The section; a damaged file takes the place of its section alone."""
        try:
            return self._makers[name]()
        except (RtdmdError, OSError) as error:
            return f'<p class="note warning">{escape(str(error))}</p>'

    def _stamp(self, name: str) -> Stamp:
        """The state of the files that a section is made from."""
        run_dir = self.run_dir
        files = {
            "now": [run_dir / "metrics.jsonl", run_dir / "config.yaml", run_dir / "summary.json"],
            "result": [run_dir / "summary.json", *sorted((run_dir / "samples" / "policies").glob("*.json"))],
            "groups": [run_dir / FOLDER],
            "pictures": [run_dir / "samples" / "gallery.json", *([grid] if (grid := self._newest_grid()) else [])],
            "curves": [run_dir / "metrics.jsonl", run_dir / "summary.json"],
            "timeline": [run_dir / "metrics.jsonl", run_dir / "logs" / "run.log"],
        }
        stamp = " ".join(f"{path.name} {_state(path)}" for path in files[name])
        return f"{stamp} {time.time() // AGE_S}" if name == "now" and not self._finished else stamp

    @property
    def _makers(self) -> Mapping[str, Callable[[], str]]:
        return {
            "now": self._now,
            "result": lambda: result_section(read_run(self.run_dir)),
            "groups": self._groups,
            "pictures": self._pictures,
            "curves": lambda: curves_section({"": curves_of(self._records())}, read_run(self.run_dir).policies),
            "timeline": lambda: timeline(self._records(), log_events(self.run_dir / "logs" / "run.log")),
        }

    @property
    def _finished(self) -> bool:
        """Whether the summary is newer than the metrics. A finished run may be continued with more iterations."""
        summary, metrics = self.run_dir / "summary.json", self.run_dir / "metrics.jsonl"
        return summary.exists() and metrics.exists() and summary.stat().st_mtime_ns >= metrics.stat().st_mtime_ns

    def _records(self) -> Sequence[Record]:
        return self._metrics.records() if (self.run_dir / "metrics.jsonl").exists() else []

    def _now(self) -> str:
        metrics = self.run_dir / "metrics.jsonl"
        newest = metrics.stat().st_mtime if metrics.exists() else None
        return now_section(self._records(), self._planned(), newest, finished=self._finished)

    def _planned(self) -> Mapping[str, int]:
        """Iterations by stage; empty while there is no configuration, or one that this version cannot read."""
        path = self.run_dir / "config.yaml"
        stamp = _state(path)
        if self._config[0] != stamp:
            self._config = stamp, _iterations(path)
        return self._config[1]

    def _groups(self) -> str:
        names = kept_names(self.run_dir)
        return groups_section(names, self.cards(names[-1]) if names else "")

    def _pictures(self) -> str:
        samples = self.run_dir / "samples"
        return pictures_section(samples, self._newest_grid(), read_run(self.run_dir).gallery if self._finished else [])

    def _tiles(self, kept: KeptGroups, place: int) -> Tiles:
        group = kept.groups[place]
        strip = self.run_dir / FOLDER / group.strip
        try:
            with Image.open(strip) as image:  # reads the head alone
                return Tiles(image.width // len(group.advantages), image.height)
        except (OSError, ZeroDivisionError) as error:
            raise RtdmdError(f"{strip}: named in {kept.name}.json, but cannot be read: {error}") from error

    def _newest_grid(self) -> Path | None:
        """The newest evaluation's pictures. Alignment comes after the cold start, against the alphabet."""
        grids = [path for path in (self.run_dir / "samples").glob("*.png") if GRID.fullmatch(path.name)]
        return max(grids, key=lambda path: (path.name.startswith(Stage.ALIGNMENT), path.name), default=None)


def _iterations(saved: Path) -> dict[str, int]:
    try:
        config = load_saved_config(saved)
    except RtdmdError:
        return {}
    return {Stage.COLD_START: config.cold_start.iterations, Stage.ALIGNMENT: config.alignment.iterations}


def _state(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "-"
    return f"{status.st_mtime_ns} {status.st_size}"
