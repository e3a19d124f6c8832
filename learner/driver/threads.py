"""CPU threads of the learner: those of the run file, of the run that is resumed, or the fastest by a probe.

Equal runs need equal numbers, because sums of other numbers of threads round differently. So the number that a probe
has chosen is written into config.yaml, and a resumed run keeps it.
"""

from __future__ import annotations

from pathlib import Path

from common.config.run import Config
from common.console_stream import LOG
from learner.driver.durable_learner import DurableLearner
from learner.preflight.run_file import read_run_file


def with_threads(config: Config, threads: int) -> Config:
    return config.model_copy(update={"learner": config.learner.model_copy(update={"threads": threads})})


def with_known_threads(config: Config, run_dir: Path, *, resume: bool) -> Config:
    """The configuration with the number of threads, unless only a probe can tell it.

    A learner on GPUs gets one, and so does one with a sharded base, where a rank alone cannot run a pass.
    """
    settings = config.learner
    if settings.threads is not None:
        return config
    if settings.num_gpus > 0 or settings.shard_base:
        return with_threads(config, 1)
    saved = run_dir / "config.yaml"
    recorded = read_run_file(saved).get("learner", {}).get("threads") if resume and saved.is_file() else None
    if recorded is None:
        return config
    LOG.info(f"learner: {_threads(recorded)} as before (learner.threads sets another number)")
    return with_threads(config, recorded)


def with_probed_threads(config: Config, learner: DurableLearner) -> Config:
    """Have the loaded learner choose its number of threads, if the configuration has none yet."""
    if config.learner.threads is not None:
        return config
    chosen, seconds = learner.choose_threads()
    timings = ", ".join(f"{number}: {taken:.3g} s" for number, taken in sorted(seconds.items()))
    LOG.info(f"learner: {_threads(chosen)} (a pass by threads: {timings}); learner.threads sets another number")
    return with_threads(config, chosen)


def _threads(number: int) -> str:
    return f"{number} CPU thread{'s' if number > 1 else ''}"
