"""Services that these tests share, and their order when two processes of pytest run them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.running_service import PROMPTS, Run, Service, write_config
from tests.helpers.shared_services import Cluster, ServedScorer, ray_cluster, reward_servers
from tests.helpers.tiny_rewards import write_hps

GROUPS = {
    "test_service": "service",
    "test_service_faults": "service",
    "test_using_a_run": "service",
}
"""Files whose tests stay in one process, because they share a finished run. Each other file is a group of its own."""
LONGEST_FIRST = ("service", "test_shapes_runs", "test_published_run_files")


def _group(nodeid: str) -> str:
    stem = Path(nodeid.partition("::")[0]).stem
    return GROUPS.get(stem, stem)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest groups first."""
    ranks = {group: rank for rank, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(_group(item.nodeid), len(ranks)))


class ByGroup(LoadScopeScheduling):
    """All tests of a group run in one process."""

    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByGroup:
    config.option.loadscopereorder = False
    return ByGroup(config, log)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster for runs that need none of their own."""
    with ray_cluster() as started:
        yield started


@pytest.fixture(scope="session")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    return write_config(folder / "run.yaml", tiny_pipeline, write_hps(folder / "hps"), PROMPTS)


@pytest.fixture(scope="session")
def service(config: Path, cluster: Cluster) -> Iterator[Service]:
    scorers = {
        "hps": ServedScorer("hps", config.parent / "hps"),
        "bright": ServedScorer("tests.helpers.toy_scorers:BrightnessScorer"),
    }
    with reward_servers(scorers, config.parent, max_batch=4) as urls:
        yield Service(config, urls, cluster)


@pytest.fixture(scope="session")
def finished(config: Path) -> Run:
    """An undisturbed run as a user starts it, with a cluster and servers of its own; moved after its end.

    Every other run of `config` must repeat it.
    """
    tracked = [] if find_spec("tensorboard") is None else ["--trackers.kinds", "[tensorboard]"]
    run = Run(config, config.parent / "undisturbed", *tracked)
    run.finish()
    run.move(config.parent / "elsewhere" / "moved")
    return run
