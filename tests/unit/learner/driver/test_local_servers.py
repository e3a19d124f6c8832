"""Which local rewards share a server, and what is started for them."""

from __future__ import annotations

from pathlib import Path

from common.config.rewards import RewardConfig
from common.types import Precision
from learner.driver.local_servers import LocalServers, LocalServerSpec, local_specs, shared


def spec(name: str, device: str = "cpu", max_batch: int = 16, threads: int = 1) -> LocalServerSpec:
    return LocalServerSpec(name, "hps", None, threads, max_batch, device)


def names(specs: list[LocalServerSpec]) -> list[list[str]]:
    return [[one.name for one in group.rewards] for group in shared(specs)]


def test_rewards_on_one_gpu_share_a_server() -> None:
    assert names([spec("a", "cuda"), spec("b", "cuda:1"), spec("c", "cuda:0"), spec("d", "cuda:1")]) == [
        ["a", "c"],
        ["b", "d"],
    ]


def test_rewards_on_the_cpu_and_of_another_max_batch_do_not() -> None:
    assert names([spec("a"), spec("b"), spec("c", "cuda"), spec("d", "cuda", max_batch=8)]) == [
        ["a"],
        ["b"],
        ["c"],
        ["d"],
    ]


def test_a_shared_server_gets_the_most_threads_that_one_of_its_rewards_asks_for() -> None:
    (server,) = shared([spec("a", "cuda", threads=2), spec("b", "cuda", threads=3)])
    assert (server.threads, server.device, server.max_batch) == (3, "cuda", 16)


def test_several_rewards_of_a_server_have_urls_of_their_own() -> None:
    (server,) = shared([spec("a", "cuda"), spec("b", "cuda")])
    assert server.urls("http://h:1") == {"a": "http://h:1/a", "b": "http://h:1/b"}
    assert spec("a").urls("http://h:1") == {"a": "http://h:1"}


def test_the_run_file_says_what_is_started() -> None:
    rewards = [
        RewardConfig(name="a", scorer="hps", model=Path("m"), device="cuda:1", precision=Precision.BFLOAT16, threads=2),
        RewardConfig(name="b", url="http://elsewhere:1"),
        RewardConfig(name="c", scorer="ocr", max_batch=4),
    ]
    assert local_specs(rewards) == [
        LocalServerSpec("a", "hps", Path("m"), 2, 16, "cuda:1", Precision.BFLOAT16),
        LocalServerSpec("c", "ocr", None, 1, 4, "cpu", None),
    ]


def test_warnings_in_a_servers_log_are_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    servers = LocalServers([spec("hps"), spec("clip")], tmp_path, say=said.append)
    log = tmp_path / "reward_hps.log"
    log.write_text("loading hps\nrtdmd WARNING: 3 requests were refused\nrtdmd ERR")
    servers.keep_up()
    servers.keep_up()
    assert said == ["the local reward server hps: 3 requests were refused"]
    with log.open("a") as file:
        file.write("OR: the model process ended\nrtdmd WARNING: 4 requests were refused\n")
    servers.keep_up()
    assert said[1:] == ["the local reward server hps: the model process ended"]
