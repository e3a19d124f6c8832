"""Sections of the live page as HTML: what the run does now, kept groups, newest pictures, results, curves, timeline."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote, urlencode

from common.errors import RtdmdError
from common.types import Stage
from learner.records.group_files import KeptGroup, KeptGroups
from learner.records.run_files import EVALUATION, TRAIN, GalleryRow, Record, RunFiles, policy_label
from learner.records.sections import SMALL_IMAGE_BYTES, Sprite, caption, gallery_rows, pictures, policies_table, shown

COMPARED = 10
"""An arrow compares the newest value with the mean of so many before it."""
ROUNDING = 1e-9
"""A smaller relative difference is one of rounding."""
RECENT = 20
"""The time that is left is estimated from so many iterations."""
QUIET_S = 60.0
"""A newest record older than this is pointed out."""
GROUP_PREVIEW = 4
"""Samples that the card of a group shows."""
REWARD, SECONDS = "reward", "seconds"


def now_section(records: Sequence[Record], planned: Mapping[str, int], newest: float | None, *, finished: bool) -> str:
    """Stage, progress and the table of the newest values.

    Args:
        planned: stage -> its iterations, as far as they are known.
        newest: when metrics.jsonl was last written, in seconds since 1970.
    """
    trained = [record for record in records if record.kind == TRAIN]
    if not trained:
        return '<p class="note">No iteration yet: the run starts, or evaluates the teacher first.</p>'
    order = [str(stage) for stage in Stage]
    stage = max((record.stage for record in trained), key=order.index)
    of_stage = [record for record in trained if record.stage == stage]
    done, total = of_stage[-1].iteration + 1, planned.get(stage)
    of_total = "" if total is None else f" of {total}"
    bar = (
        ""
        if total is None
        else f'<progress max="{total}" value="{done}" aria-label="progress of the stage"></progress>'
    )
    left = "" if total is None or finished else _time_left(of_stage, total - done)
    return (
        f'<p class="note"><b>{escape(policy_label(stage).capitalize())}</b>: {done}{of_total} iterations{left}. '
        f'{_state(newest, finished=finished)}</p>{bar}<div class="tables">{_tables(records, of_stage)}</div>'
    )


def _time_left(of_stage: Sequence[Record], iterations: int) -> str:
    seconds = [record.seconds["step"] for record in of_stage[-RECENT:] if "step" in record.seconds]
    if not seconds or iterations <= 0:
        return ""
    return f", about {_duration(iterations * statistics.median(seconds))} left in this stage, without evaluations"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def _state(newest: float | None, *, finished: bool) -> str:
    if finished:
        return "The run has finished."
    if newest is None:
        return ""
    age = max(0.0, time.time() - newest)
    text = f"Newest record {_duration(age)} ago"
    return f'<span class="warning">{text}: an evaluation, an outage or the end.</span>' if age > QUIET_S else f"{text}."


def _tables(records: Sequence[Record], of_stage: Sequence[Record]) -> str:
    newest = of_stage[-1]
    groups: dict[str, dict[str, str]] = {"Rewards": {}, "Evaluation": {}, "Training": {}}
    evaluations = [record for record in records if record.kind == EVALUATION and record.stage == newest.stage]
    if evaluations:
        history = evaluations[-1 - COMPARED :]
        groups["Evaluation"] = {name: _value(name, [r.metrics for r in history], True) for name in history[-1].metrics}
    for name in newest.metrics:
        kind, _, rest = name.partition("/")
        title, label = ("Rewards", rest) if kind == REWARD else ("Training", name)
        groups[title][label] = _value(name, [r.metrics for r in of_stage[-1 - COMPARED :]], kind == REWARD)
    groups["Seconds of an iteration"] = {
        name: _value(name, [r.seconds for r in of_stage[-1 - COMPARED :]], False) for name in newest.seconds
    }
    return "".join(_table(title, rows) for title, rows in groups.items() if rows)


def _value(name: str, history: Sequence[Mapping[str, float]], better_up: bool) -> str:
    """The newest value, and its difference from the mean before it; coloured if more is better."""
    value = history[-1][name]
    before = [values[name] for values in history[:-1] if name in values]
    if not before:
        return f"<td>{value:.4g}</td><td></td>"
    change = value - statistics.fmean(before)
    if abs(change) < ROUNDING * abs(value):
        change = 0.0
    style = ("up" if change > 0 else "down") if better_up and change else ""
    arrow = "▲" if change > 0 else "▼" if change < 0 else "="
    return f'<td>{value:.4g}</td><td class="{style}">{arrow} {abs(change):.2g}</td>'


def _table(title: str, rows: Mapping[str, str]) -> str:
    body = "".join(f"<tr><td>{_breakable(name)}</td>{cells}</tr>" for name, cells in rows.items())
    return f'<div class="card"><h3>{title}</h3><table><tbody>{body}</tbody></table></div>'


def _breakable(name: str) -> str:
    """A name that narrow windows break after an underscore or a slash."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def result_section(run: RunFiles) -> str:
    """The table of all policies that were evaluated so far."""
    if not run.policies:
        return ""
    labels = {name: escape(policy_label(name)) for name in run.policies}
    return f"<h2>Result</h2>{policies_table(run.policies, labels)}"


@dataclass(frozen=True)
class Tiles:
    """Size of a strip's or grid's tiles in pixels."""

    width: int
    height: int

    def sprite(self, url: str, columns: int, rows: int) -> Sprite:
        return Sprite(url, columns, rows, self.width / self.height, max(self.width, self.height) <= 128)


def groups_section(names: Sequence[str], chosen: str) -> str:
    """The choice of iterations, newest first, and the cards of one of them."""
    if not names:
        return ""
    options = "".join(f'<option value="{name}">{_titled(name, "iteration")}</option>' for name in names[::-1])
    return (
        '<h2>Groups</h2><p class="note">A group is the samples of one prompt. Click on one to see its '
        "scores, its advantages and the steps that were trained. <label>Iteration "
        f'<select id="iterations">{options}</select></label></p><div id="chosen">{chosen}</div>'
    )


def _titled(name: str, word: str) -> str:
    """`alignment-000010` -> "Alignment, iteration 10"."""
    stage, _, number = name.rpartition("-")
    return f"{policy_label(stage).capitalize()}, {word} {int(number)}"


def group_cards(kept: KeptGroups, tiles: Mapping[str, Tiles]) -> str:
    """A card per group; `tiles` gives the size of a strip's tiles by the strip's name."""
    cards = "".join(_group_card(kept.name, place, group, tiles[group.strip]) for place, group in enumerate(kept.groups))
    return f'<div class="groups">{cards}</div>'


def _group_card(name: str, place: int, group: KeptGroup, tiles: Tiles) -> str:
    sprite = _strip(group, tiles)
    shown_first = range(min(GROUP_PREVIEW, len(group.advantages)))
    preview = "".join(sprite.tile(column, 0, f"sample {column}", enlarge=False) for column in shown_first)
    means = {name: statistics.fmean(scores) for name, scores in group.scores.items()}
    terms = "".join(f"<dt>{escape(reward)}, mean</dt><dd>{shown(value)}</dd>" for reward, value in means.items())
    return (
        f'<button class="group card" type="button" data-group="{urlencode({"name": name, "place": place})}">'
        f'<p class="prompt">{escape(group.prompt)}</p><div class="strip">{preview}</div>'
        f"<figcaption><dl>{terms}</dl></figcaption></button>"
    )


def group_detail(kept: KeptGroups, place: int, tiles: Tiles) -> str:
    """All samples of one group with their scores and advantages, and the steps that were trained.

    Raises:
        RtdmdError: there is no such group.
    """
    if not 0 <= place < len(kept.groups):
        raise RtdmdError(f"{kept.name}: it has {len(kept.groups)} groups; there is no group {place}")
    group = kept.groups[place]
    sprite = _strip(group, tiles)
    order = sorted(range(len(group.advantages)), key=lambda sample: -group.advantages[sample])
    samples = "".join(_sample(group, sample, sprite) for sample in order)
    return (
        '<button class="close plain" type="button" autofocus>Close</button>'
        f'<p class="prompt">{escape(group.prompt)}</p><p class="note">{escape(policy_label(kept.stage).capitalize())}, '
        f"iteration {kept.iteration}. Highest advantage first.</p>{_steps(kept)}"
        f"{pictures(samples, len(order))}"
    )


def _strip(group: KeptGroup, tiles: Tiles) -> Sprite:
    return tiles.sprite(f"pictures/groups/{quote(group.strip)}", len(group.advantages), 1)


def _steps(kept: KeptGroups) -> str:
    """Each step of the rollout, and what trained it."""
    items, last = [], len(kept.sigmas) - 2
    for step in range(last + 1):
        terms = ["policy gradient"] if step in kept.policy_steps else []
        terms += ["final-step terms"] if step == last and kept.final_step else []
        state = f"trained by {' and '.join(terms)}" if terms else "not trained"
        levels = f"σ {kept.sigmas[step]:.3g} → {kept.sigmas[step + 1]:.3g}"
        items.append(f"<li{' class=trained' if terms else ''}><b>Step {step + 1}</b>, {levels}<br>{state}</li>")
    return f'<ul class="steps">{"".join(items)}</ul>'


def _sample(group: KeptGroup, sample: int, sprite: Sprite) -> str:
    advantage, trained = group.advantages[sample], group.trained[sample]
    label = f"Sample {sample}" if trained else f"Sample {sample}, not trained on"
    style = "up" if advantage > 0 else "down" if advantage < 0 else ""
    scores = {name: values[sample] for name, values in group.scores.items()}
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{shown(value)}</dd>" for name, value in scores.items())
    return (
        f"<figure{'' if trained else ' class=left-out'}>{sprite.tile(sample, 0, f'{label}: {group.prompt}')}"
        f'<figcaption><b>{label}</b><dl><dt>advantage</dt><dd class="{style}">{advantage:+.3f}</dd>{terms}</dl>'
        "</figcaption></figure>"
    )


def pictures_section(samples: Path, grid: Path | None, gallery: Sequence[GalleryRow]) -> str:
    """The gallery, if there is one, else the newest evaluation's pictures (`grid`)."""
    if gallery:

        def source(image: Path) -> tuple[str, bool]:
            small = image.exists() and image.stat().st_size < SMALL_IMAGE_BYTES
            return f"pictures/{quote(image.relative_to(samples).as_posix())}", small

        return f"<h2>Before and after</h2>{gallery_rows(gallery, source)}"
    if grid is None:
        return ""
    title = f'<h2>Newest pictures</h2><p class="note">{_titled(grid.stem, "after iteration")}</p>'
    url = f"pictures/{quote(grid.name)}"
    captions = grid.with_suffix(".json")
    if not captions.exists():  # a run of an earlier version
        return f'{title}<button class="enlarge" type="button"><img alt="{escape(grid.stem)}" src="{url}"></button>'
    return f'{title}<div class="gallery">{_grid_rows(captions, url)}</div>'


def _grid_rows(captions: Path, url: str) -> str:
    """A card per prompt of an evaluation's pictures; `captions` is what `learner.driver.evaluation.save_grid` wrote."""
    try:
        fields = json.loads(captions.read_bytes())
        prompts = [(str(item["prompt"]), item["scores"]) for item in fields["prompts"]]
        sprite = Tiles(int(fields["width"]), int(fields["height"])).sprite(url, int(fields["columns"]), len(prompts))
        return "".join(_grid_card(sprite, row, prompt, scores) for row, (prompt, scores) in enumerate(prompts))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise RtdmdError(f"{captions}: not what a run writes ({error!r}): remove it") from error


def _grid_card(sprite: Sprite, row: int, prompt: str, scores: Mapping[str, Sequence[float]]) -> str:
    figures = []
    for column in range(sprite.columns):
        own = {name: float(values[column]) for name, values in scores.items()}
        tile = sprite.tile(column, row, f"Image {column + 1}: {prompt}")
        figures.append(f"<figure>{tile}{caption('', own)}</figure>")
    shown_side_by_side = pictures("".join(figures), sprite.columns)
    return f'<div class="card"><p class="prompt">{escape(prompt)}</p>{shown_side_by_side}</div>'
