"""Timeline of a run: stages, evaluations, outages, restarts and alarms, on the clock.

Stages, evaluations and groups without some reward come from metrics.jsonl. Restarts, alarms and the reason of an end
come from `logs/run.log`. A run of an earlier version has no times in metrics.jsonl: its axis is seconds of training,
and its log is only listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from common.types import Stage
from learner.metric_names import DROPPED_GROUPS, LEFT_OUT_GRADIENTS, RENORMALISED_GROUPS
from learner.records.run_files import EVALUATION, Record, policy_label
from learner.records.run_log import OURS

PAUSE_S = 60.0
"""A longer pause between two records ends a bar: the run was interrupted, or an outage held it."""
MOST_LISTED = 200
"""The list has the newest events; the log has all."""
LOG_LINE = re.compile(
    rf"(?P<time>\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (?:{'|'.join(OURS)})(?:\.\S+)? (?P<level>[A-Z]+) (?P<text>.*)"
)
KINDS = {
    "alarm": re.compile(r"\balarm|watchdog|roll(ed|s|ing)? back", re.IGNORECASE),
    "session": re.compile(r"resum|paused|continuing|the run ends|stopped on request", re.IGNORECASE),
    "restart": re.compile(r"is gone|started again|replaced|restart", re.IGNORECASE),
    "outage": re.compile(r"outage|unhealthy|dropped|not available", re.IGNORECASE),
}
"""Kinds of events by their words in the log; the first that fits counts."""
LANES = {"outage": "Outages", "restart": "Restarts", "alarm": "Alarms", "session": "Sessions"}


@dataclass(frozen=True)
class Event:
    """Something that happened at a time: seconds since 1970, or of training where the run has no times."""

    time: float
    kind: str
    text: str


@dataclass(frozen=True)
class Span:
    """A stretch of one stage without a long pause."""

    stage: str
    start: float
    end: float
    iterations: tuple[int, int]


def log_events(log: Path) -> list[Event]:
    """The events of a run's log; none if there is no log. Its times are this machine's local time."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        found = LOG_LINE.fullmatch(line)
        kind = next((kind for kind, words in KINDS.items() if found and words.search(found["text"])), None)
        if found and (kind or found["level"] != "INFO"):
            events.append(Event(datetime.fromisoformat(found["time"]).timestamp(), kind or "other", found["text"]))
    return events


def timeline(records: Sequence[Record], events: Sequence[Event]) -> str:
    """The section as HTML; "" for a run without a record."""
    if not records:
        return ""
    timed = all(record.time is not None for record in records)
    placed = list(_placed(records, timed=timed))
    spans, marks = _spans(placed), _marks(placed)
    start = min(span.start for span in spans)
    if timed:
        marks += [event for event in events if event.time >= start - 3600]
    end = max([*(span.end for span in spans), *(mark.time for mark in marks)])
    axis = _Axis(min([start, *(mark.time for mark in marks)]), end, timed)
    lanes = [("Stages", "".join(_bar(span, axis) for span in spans))]
    lanes += [
        (title, "".join(_mark(mark, axis) for mark in marks if mark.kind == kind))
        for kind, title in (("evaluation", "Evaluations"), *LANES.items())
    ]
    rows = "".join(f'<div>{title}</div><div class="lane">{bars}</div>' for title, bars in lanes if bars)
    ends = (
        f'<div></div><div class="ends"><span>{axis.label(axis.start)}</span><span>{axis.label(axis.end)}</span></div>'
    )
    told = [event for event in (*marks, *([] if timed else events)) if event.kind != "evaluation"]
    note = "Times are UTC." if timed else "By seconds of training: this run kept no times."
    return (
        f'<h2>Timeline</h2><p class="note">{note} Point at a mark to read it.</p><div class="card">'
        f'<div class="timeline">{rows}{ends}</div>{_list(told, timed=timed)}</div>'
    )


@dataclass(frozen=True)
class _Axis:
    start: float
    end: float
    timed: bool

    def percent(self, time: float) -> float:
        return 100 * (time - self.start) / max(self.end - self.start, 1e-9)

    def label(self, time: float) -> str:
        return _clock(time, timed=self.timed)


def _clock(time: float, *, timed: bool) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}" if timed else f"{time:,.0f} s"


def _placed(records: Sequence[Record], *, timed: bool) -> Iterable[tuple[Record, float, float]]:
    """Each record with its start and end, in the order of the run."""
    stages = [str(stage) for stage in Stage]
    order = sorted(records, key=lambda r: (stages.index(r.stage) if r.stage in stages else len(stages), r.iteration))
    spent = 0.0
    for record in order:
        seconds = record.seconds.get("evaluation" if record.kind == EVALUATION else "step", 0.0)
        end = record.time if timed and record.time is not None else spent + seconds
        spent = end
        yield record, end - seconds, end


def _spans(placed: Sequence[tuple[Record, float, float]]) -> list[Span]:
    spans: list[Span] = []
    for record, start, end in sorted(placed, key=lambda item: item[2]):
        last = spans[-1] if spans else None
        if last is not None and last.stage == record.stage and start - last.end <= PAUSE_S:
            first, newest = last.iterations
            reached = max(newest, record.iteration)
            spans[-1] = Span(last.stage, last.start, end, (min(first, record.iteration), reached))
        else:
            spans.append(Span(record.stage, start, end, (record.iteration, record.iteration)))
    return spans


def _marks(placed: Sequence[tuple[Record, float, float]]) -> list[Event]:
    """Evaluations, and iterations with groups or gradients without some reward."""
    marks = []
    for record, _, end in placed:
        if record.kind == EVALUATION:
            values = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
            marks.append(Event(end, "evaluation", f"evaluation after {record.iteration} iterations: {values}"))
            continue
        lost = {
            name: value
            for name, value in record.metrics.items()
            if value > 0 and name.partition("/")[0] in (DROPPED_GROUPS, RENORMALISED_GROUPS, LEFT_OUT_GRADIENTS)
        }
        if lost:
            counts = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in lost.items())
            marks.append(Event(end, "outage", f"iteration {record.iteration} of {record.stage}: {counts}"))
    return marks


def _bar(span: Span, axis: _Axis) -> str:
    left, width = axis.percent(span.start), axis.percent(span.end) - axis.percent(span.start)
    first, last = span.iterations
    label = policy_label(span.stage).capitalize()
    title = f"{label}, iterations {first} to {last}: {axis.label(span.start)} to {axis.label(span.end)}"
    return (
        f'<span class="span {escape(span.stage)}" style="left:{left:.2f}%;width:{width:.2f}%" '
        f'title="{escape(title)}">{escape(label)}</span>'
    )


def _mark(event: Event, axis: _Axis) -> str:
    title = f"{axis.label(event.time)}: {event.text}"
    return (
        f'<span class="mark {escape(event.kind)}" style="left:{axis.percent(event.time):.2f}%" title="{escape(title)}">'
        "</span>"
    )


def _list(events: Sequence[Event], *, timed: bool) -> str:
    if not events:
        return '<p class="note">No restart, outage or alarm.</p>'
    newest = sorted(events, key=lambda event: event.time)[-MOST_LISTED:]
    rows = "".join(
        f"<tr><td>{_clock(event.time, timed=timed or event.time > 1e9)}</td><td>{escape(event.kind)}</td>"
        f"<td>{escape(event.text)}</td></tr>"
        for event in newest
    )
    left = f", the newest {MOST_LISTED} of them" if len(events) > MOST_LISTED else ""
    table = f'<table class="events"><tbody>{rows}</tbody></table>'
    return f"<details><summary>{len(events)} events{left}</summary>{table}</details>"
