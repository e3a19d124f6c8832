"""Prompt files that a dataset was cut into: train-00000-of-00002.parquet, as the Hugging Face hub has them."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from common.errors import PromptError

logger = logging.getLogger(__name__)

SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(parquet|jsonl|txt)", re.IGNORECASE)


def whole_set(path: Path) -> list[Path]:
    """The files that a path names: itself, or all shards of the one dataset in a directory.

    A shard that is named by itself is a warning: it may be a choice, as of one file of the hub.

    Raises:
        PromptError: a directory has not exactly one whole set of shards.
    """
    if not os.path.isdir(path):
        shard = SHARD.fullmatch(path.name)
        if shard is not None and int(shard["count"]) > 1:
            count = int(shard["count"])
            logger.warning("%s is one of %d files of a dataset: name their directory to use all", path, count)
        return [path]
    sets: dict[tuple[str, int], dict[int, Path]] = {}
    for file in path.iterdir():
        if shard := SHARD.fullmatch(file.name):
            sets.setdefault((shard["name"], int(shard["count"])), {})[int(shard["number"])] = file
    if not sets:
        raise PromptError(f"{path}: it is a directory: name a prompt file in it")
    if len(sets) > 1:
        names = ", ".join(sorted(name for name, _ in sets))
        raise PromptError(f"{path} has the files of several datasets, {names}: put those of one into a directory")
    (((name, count), files),) = sets.items()
    missing = [number for number in range(count) if number not in files]
    if missing:
        raise PromptError(f"{path} has {len(files)} of the {count} files of {name}: number {missing[0]} is missing")
    return [files[number] for number in range(count)]
