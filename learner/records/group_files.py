"""Groups that a run keeps to look at: samples, scores, advantages, and what was trained on them.

    samples/groups/alignment-000010.json      prompts, scores, advantages and trained steps of the kept groups
    samples/groups/alignment-000010-00.png    (or .jpg) the samples of the first of them, side by side

The live page shows them. `dashboard.groups` and `dashboard.groups_every` say which groups are kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import RtdmdError
from common.kept_groups import GroupPicture, TrainedSamples
from common.types import Position, Stage
from common.whole_files import write_whole

FOLDER = Path("samples") / "groups"
NAME = re.compile(r"(?P<stage>cold_start|alignment)-(?P<iteration>\d{6,})(?P<strip>-\d+\.(png|jpg)|\.json)")
DIGITS = 6


def write_groups(
    run_dir: Path, position: Position, pictures: Mapping[int, GroupPicture], trained: TrainedSamples
) -> None:
    """Write the groups of an iteration. `pictures` has the groups' places in the update's batch.

    Raises:
        OSError: they cannot be written.
    """
    groups = []
    for number, (place, picture) in enumerate(pictures.items()):
        strip = f"{position.directory}-{number:02d}{picture.suffix}"
        write_whole(run_dir / FOLDER / strip, picture.strip)
        groups.append(
            {
                "prompt": picture.prompt,
                "strip": strip,
                "scores": {name: _rounded(values.tolist()) for name, values in picture.rewards_G.items()},
                "advantages": _rounded(trained.advantages_PG[place].tolist()),
                "trained": trained.kept_PG[place].tolist(),
            }
        )
    record = {
        "sigmas": _rounded(trained.sigmas),
        "policy_steps": list(trained.policy_steps),
        "final_step": trained.final_step,
        "groups": groups,
    }
    # Last, so that a file names only strips that exist.
    write_whole(run_dir / FOLDER / f"{position.directory}.json", json.dumps(record).encode())


def cut_groups(run_dir: Path, position: Position) -> None:
    """Remove the groups of iterations that a resumed run will repeat."""
    for path in (run_dir / FOLDER).glob("*"):
        found = NAME.fullmatch(path.name)
        if found and Position(Stage(found["stage"]), int(found["iteration"])) >= position:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class KeptGroup:
    """One kept group: G samples.

    Attributes:
        strip: its file in `samples/groups`.
        scores: reward -> the G samples' scores.
        trained: whether each sample was trained on.
    """

    prompt: str
    strip: str
    scores: Mapping[str, Sequence[float]]
    advantages: Sequence[float]
    trained: Sequence[bool]


@dataclass(frozen=True)
class KeptGroups:
    """The kept groups of one iteration, and the steps that were trained on them: see `TrainedSamples`."""

    name: str
    stage: str
    iteration: int
    sigmas: Sequence[float]
    policy_steps: Sequence[int]
    final_step: bool
    groups: Sequence[KeptGroup]


def kept_names(run_dir: Path) -> list[str]:
    """The iterations of which groups are kept, in order, as `alignment-000010`."""
    found = [NAME.fullmatch(path.name) for path in (run_dir / FOLDER).glob("*.json")]
    positions = [Position(Stage(name["stage"]), int(name["iteration"])) for name in found if name]
    return [position.directory for position in sorted(positions)]


def read_groups(run_dir: Path, name: str) -> KeptGroups:
    """The kept groups of one iteration.

    Raises:
        RtdmdError: there is no such iteration, or its file is damaged.
    """
    found = NAME.fullmatch(f"{name}.json")
    path = run_dir / FOLDER / f"{name}.json"
    if found is None or not path.is_file():
        raise RtdmdError(f"{name}: no groups of this iteration are kept in {run_dir / FOLDER}")
    try:
        record = json.loads(path.read_bytes())
        groups = [_group(fields) for fields in record["groups"]]
        sigmas, steps, final = record["sigmas"], record["policy_steps"], record["final_step"]
        return KeptGroups(name, found["stage"], int(found["iteration"]), sigmas, steps, final, groups)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RtdmdError(f"{path}: not what a run writes ({error!r}): restore it, or remove it") from error


def _group(fields: Mapping[str, Any]) -> KeptGroup:
    strip, advantages = str(fields["strip"]), [float(value) for value in fields["advantages"]]
    if not NAME.fullmatch(strip):
        raise ValueError(f"{strip} is not the name of a strip")
    scores = {str(name): [float(value) for value in values] for name, values in fields["scores"].items()}
    trained = [bool(value) for value in fields["trained"]]
    if {len(trained), *map(len, scores.values())} != {len(advantages)}:
        raise ValueError("scores, advantages and trained samples differ in number")
    return KeptGroup(str(fields["prompt"]), strip, scores, advantages, trained)


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, DIGITS) if math.isfinite(value) else value for value in values]
