"""Copies of a run's state elsewhere, from which a machine that has nothing of the run can continue it.

    URL/metrics.jsonl, ledger.jsonl, watchdog.jsonl, samples/policies/*     as they are when a checkpoint is copied
    URL/checkpoints/alignment-000050/state.safetensors, then checkpoint.json: the copy counts once both are there
    URL/copy_id.txt     the run that they are copies of: a text that only this run has
    URL/lora/*, summary.json, report.html     at the end; they are not needed to continue

A thread copies while the run goes on. The URL is a folder's path or any of fsspec (s3://, gs://); the extra `remote`
has their packages.
"""

from __future__ import annotations

import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.console_stream import LOG
from common.errors import CheckpointError, ConfigError, DamagedCheckpoint
from common.whole_files import write_whole
from learner.checkpoint import ABOUT, FOLDER, STATE, Checkpoint, CheckpointStore
from learner.driver.ledger import LEDGER
from learner.driver.watchdog import WATCHDOG_FILE

FILES, RESULTS = ("metrics.jsonl", LEDGER, WATCHDOG_FILE), ("summary.json", "report.html")
POLICIES, LORA = "samples/policies", "lora"
IDENTITY, PROBE = "copy_id.txt", ".probe"
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
LAST_COPY_S = 300.0
"""Seconds that a run waits at its end for the copy in progress."""


class RunCopies:
    """The copies of one run at a URL.

    Raises:
        ConfigError: the URL's packages are missing, or it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._files, self._root = _file_system(url)
        try:
            self._files.invalidate_cache()
            self._files.exists(self._root)
        except Exception as error:  # each file system has errors of its own
            raise ConfigError(f"checkpoint.copy_to: {url} cannot be reached: {_reason(error)}") from error

    def push(self, run_dir: Path) -> None:
        """Copy what is not there yet, and remove the checkpoints that the run has removed.

        Raises:
            ConfigError: the copies are those of another run; they are left alone.
            Exception: whatever the file system raises.
        """
        self.require_own(run_dir)
        self._mark(run_dir)
        store = CheckpointStore.of_run(run_dir)
        folders = (path for folder in (POLICIES, LORA) for path in sorted((run_dir / folder).glob("*")))
        for path in (*(run_dir / name for name in (*FILES, *RESULTS)), *folders):
            if path.is_file():
                self._put(path, str(path.relative_to(run_dir)))
        complete = self._complete()
        for checkpoint in reversed(store.newest_first()):
            if checkpoint.name not in complete:
                self._put_checkpoint(checkpoint)
        here = [path.name for path in store.newest_first()]
        for name in (name for name in complete if name not in here):
            self._files.rm(f"{self._root}/{FOLDER}/{name}/{ABOUT}")  # first: without it the copy does not count
            self._files.rm(f"{self._root}/{FOLDER}/{name}", recursive=True)

    def _put_checkpoint(self, checkpoint: Path) -> None:
        try:
            for file in (STATE, ABOUT):
                self._put(checkpoint / file, f"{FOLDER}/{checkpoint.name}/{file}")
        except FileNotFoundError:
            if checkpoint.exists():
                raise
            # The run has removed it meanwhile, as old ones are: what was copied of it goes too.
            self._files.rm(f"{self._root}/{FOLDER}/{checkpoint.name}", recursive=True)

    def require_own(self, run_dir: Path) -> None:
        """ConfigError if there are copies of another run."""
        own, there = run_dir / IDENTITY, f"{self._root}/{IDENTITY}"
        if not self._files.exists(there):
            return
        if not own.exists() or own.read_bytes() != self._files.cat_file(there):
            raise ConfigError(
                f"checkpoint.copy_to: {self._url} has the copies of another run: name another folder, or continue that "
                "run with --resume in an empty --run-dir"
            )

    def _mark(self, run_dir: Path) -> None:
        """Mark the copies as this run's."""
        own = run_dir / IDENTITY
        if not own.exists():
            write_whole(own, uuid.uuid4().hex.encode())
        if not self._files.exists(f"{self._root}/{IDENTITY}"):
            self._put(own, IDENTITY)

    def require_writable(self) -> None:
        """ConfigError unless files can be written and removed there."""
        try:
            self._make_folder_of(PROBE)
            self._files.pipe_file(f"{self._root}/{PROBE}", b"rtdmd")
            self._files.rm(f"{self._root}/{PROBE}")
        except Exception as error:
            raise ConfigError(f"checkpoint.copy_to: {self._url} cannot be written: {_reason(error)}") from error

    def fetch(self, run_dir: Path) -> Path | None:
        """Bring the newest whole checkpoint, and the files beside it, into a directory; None if there is none.

        Raises:
            CheckpointError: the copies cannot be read, or all are damaged.
        """
        try:
            names = self._complete()
            for path in self._files.find(self._root) if names else ():
                name = path.removeprefix(f"{self._root}/")
                if name in (*FILES, IDENTITY) or name.rpartition("/")[0] == POLICIES:
                    write_whole(run_dir / name, self._files.cat_file(path))
            return self._newest(names, run_dir)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"checkpoint.copy_to: {self._url}: {error}") from error
        except Exception as error:
            raise CheckpointError(f"checkpoint.copy_to: {self._url} cannot be read: {_reason(error)}") from error

    def _newest(self, names: list[str], run_dir: Path) -> Path | None:
        damaged: DamagedCheckpoint | None = None
        folder = CheckpointStore.of_run(run_dir).root
        for name in names:
            partial = folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in (STATE, ABOUT):
                self._files.get_file(f"{self._root}/{FOLDER}/{name}/{file}", str(partial / file))
            try:
                Checkpoint.open(partial)
            except DamagedCheckpoint as error:
                damaged = damaged or error
                shutil.rmtree(partial)
                continue
            return partial.rename(folder / name)
        if damaged is not None:
            raise damaged
        return None

    def _complete(self) -> list[str]:
        """Names of the checkpoints that were copied whole, the most advanced first."""
        self._files.invalidate_cache()
        found = self._files.glob(f"{self._root}/{FOLDER}/*/{ABOUT}")
        return CheckpointStore.in_order(path.split("/")[-2] for path in found)

    def _put(self, path: Path, name: str) -> None:
        self._make_folder_of(name)
        self._files.put_file(str(path), f"{self._root}/{name}")

    def _make_folder_of(self, name: str) -> None:
        """Object stores have no folders: there this would make a bucket, also of a mistyped name."""
        protocols = self._files.protocol
        if OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols):
            self._files.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)


class _Copier:
    """Pushes in a thread, when asked to; several requests while it is busy are one."""

    def __init__(self, copies: RunCopies, url: str, run_dir: Path) -> None:
        self._copies, self._url, self._run_dir = copies, url, run_dir
        self._changed = threading.Condition()
        self._asked, self._done, self._ending = 0, 0, False
        self._failed = False
        threading.Thread(target=self._work, name="run-copies", daemon=True).start()

    def ask(self) -> None:
        with self._changed:
            self._asked += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Wait for what was asked for."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._done == self._asked, LAST_COPY_S):
                LOG.warning(f"{self._url}: the last copy has taken {LAST_COPY_S:g} s: the run ends without it")
            self._ending = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._done < self._asked)
                if self._ending:
                    return
                asked = self._asked
            self._push()
            with self._changed:
                self._done = asked
                self._changed.notify_all()

    def _push(self) -> None:
        try:
            self._copies.push(self._run_dir)
            if self._failed:
                LOG.warning(f"{self._url}: the newest checkpoint could be copied")
            self._failed = False
        except Exception as error:  # the run needs no copy to go on
            if not self._failed:
                LOG.warning(f"{self._url}: a copy failed: {_reason(error)}; tried again after the next checkpoint")
            self._failed = True


@contextmanager
def copied_run(url: str | None, run_dir: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that has the run's newest state copied to the URL; without a URL it does nothing.

    A block that ends well is followed by one more copy.
    """
    if url is None:
        yield lambda: None
        return
    copier = _Copier(RunCopies(url), url, run_dir)
    try:
        yield copier.ask
        copier.ask()
    finally:
        copier.end()


def require_own_copies(url: str | None, run_dir: Path) -> None:
    """ConfigError if there are copies of another run at the URL."""
    if url is not None:
        RunCopies(url).require_own(run_dir)


def check_copies(url: str | None) -> None:
    """ConfigError if a run could not copy its checkpoints to the URL."""
    if url is not None:
        RunCopies(url).require_writable()


def fetch_run(url: str, run_dir: Path) -> None:
    """Bring a run's state from its copies into a directory that holds no run; say what was found.

    Raises:
        ConfigError, CheckpointError: see `RunCopies`.
    """
    found = RunCopies(url).fetch(run_dir)
    if found is not None:
        print(f"checkpoint.copy_to: {found.name} was fetched from {url} into {run_dir}", file=sys.stderr)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"checkpoint.copy_to: {url}: {error}: pip install 'rtdmd[remote]'") from error
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"checkpoint.copy_to: {url}: {error}: name a folder, s3://BUCKET/... or gs://BUCKET/..."
        ) from error
    return files, str(root).rstrip("/")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
