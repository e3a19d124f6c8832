"""Runs pytest in forked children, two at a time: the libraries are imported once, the project in each child anew."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.mutants.mutant import REPOSITORY, Mutant, MutantFinder
from tests.mutants.verdict import Recorder, Verdict

CHILDREN = 2
LIBRARIES = ("torch", "numpy", "peft", "diffusers", "transformers", "hypothesis", "pydantic", "msgpack")
LAZY = {
    "diffusers": ("StableDiffusion3Pipeline", "FluxPipeline", "Flux2KleinPipeline", "Flux2Pipeline"),
    "transformers": ("CLIPTextModelWithProjection", "T5EncoderModel", "Qwen3ForCausalLM", "CLIPTokenizer"),
}
"""Modules that these libraries import on demand."""
OURS = ("common", "learner", "rollout_workers", "reward_servers", "zoo")
# Without the other plugins, which take a second to load; their imports here would be warnings there.
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin", "-m", "not gpu"]


@dataclass(frozen=True)
class Job:
    """One run of pytest.

    Attributes:
        arguments: node ids, folders and options.
        mutant: what is changed; None for the code as it is.
    """

    arguments: Sequence[str]
    timeout_s: float
    mutant: Mutant | None = None


@dataclass(frozen=True)
class Outcome:
    """A job's verdict; None when it ended without one, and `output` is the end of what it printed."""

    job: Job
    verdict: Verdict | None
    seconds: float
    output: str


@dataclass
class _Child:
    job: Job
    directory: Path
    pid: int
    started: float = field(default_factory=time.monotonic)

    def outcome(self) -> Outcome | None:
        """Its verdict; None while it runs."""
        seconds = time.monotonic() - self.started
        ended = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        if not ended and seconds < self.job.timeout_s:
            return None
        if not ended:
            self.stop()
        found, output = self.directory / "verdict.json", self.directory / "output"
        verdict = Verdict.read(found) if ended and found.exists() else None
        text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        return Outcome(self.job, verdict, seconds, text[-3000:] if ended else f"no end after {seconds:.0f} s")

    def stop(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def import_libraries() -> None:
    """Import what is the same for every mutant, and nothing of the project."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(REPOSITORY)
    for name in LIBRARIES:
        importlib.import_module(name)
    for library, names in LAZY.items():
        for name in names:
            getattr(sys.modules[library], name)
    import torch

    torch.set_num_threads(1)
    loaded = [name for name in sys.modules if name.split(".")[0] in OURS]
    if loaded:
        raise RuntimeError(f"{loaded[0]} is imported already, so no mutant of it could be served")
    gc.freeze()  # or the first collection of every child would copy all of it


def outcomes(jobs: Sequence[Job], work: Path) -> Iterator[Outcome]:
    """The outcomes as they come; each job has a directory of its own in `work`."""
    waiting, running = list(enumerate(jobs)), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < CHILDREN:
                number, job = waiting.pop(0)
                running.append(_start(job, work / f"job{number}"))
            time.sleep(0.02)
            for child in list(running):
                outcome = child.outcome()
                if outcome is not None:
                    running.remove(child)
                    yield outcome
    finally:
        for child in running:
            child.stop()


def _start(job: Job, directory: Path) -> _Child:
    directory.mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return _Child(job, directory, pid)
    try:
        _run(job, directory)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _run(job: Job, directory: Path) -> None:
    """In the child: run pytest and leave the verdict."""
    os.setsid()
    output = os.open(directory / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    _quiet_hypothesis()
    finder = None
    if job.mutant is not None:
        finder = MutantFinder(job.mutant)
        sys.meta_path.insert(0, finder)
    recorder = Recorder()
    options = [*OPTIONS, f"--basetemp={directory / 'tmp'}"]
    code = pytest.main([*job.arguments, *options], plugins=[recorder])
    recorder.verdict.exit_code = int(code)
    recorder.verdict.served = finder is None or finder.served
    recorder.verdict.write(directory / "verdict.json")


def _quiet_hypothesis() -> None:
    """The same examples every time, and no failing one remembered or minimised."""
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", database=None, derandomize=True, deadline=None, phases=phases)
    settings.load_profile("mutants")
